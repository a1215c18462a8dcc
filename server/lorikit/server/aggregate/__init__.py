# SPDX-License-Identifier: Apache-2.0
"""The few primitives that methods share."""
