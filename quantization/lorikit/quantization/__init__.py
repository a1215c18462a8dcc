# SPDX-License-Identifier: Apache-2.0
"""Codecs: fewer bits, on the wire and in the base model."""
