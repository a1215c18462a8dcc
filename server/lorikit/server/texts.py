# SPDX-License-Identifier: Apache-2.0
"""Texts from outside, made fit for logs, terminals and the audit log."""

from __future__ import annotations


def plain(text: str, most: int) -> str:
    """The text cut to ``most`` letters, in one line and without control characters."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text[:most])
