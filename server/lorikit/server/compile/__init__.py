# SPDX-License-Identifier: Apache-2.0
"""Base model -> training graph -> package."""
