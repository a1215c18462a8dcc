# SPDX-License-Identifier: Apache-2.0
"""Server-side encoders built on heavy libraries."""
