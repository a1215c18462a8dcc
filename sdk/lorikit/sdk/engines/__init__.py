# SPDX-License-Identifier: Apache-2.0
"""Engines run training graphs; each is loaded by name."""
