# SPDX-License-Identifier: Apache-2.0
"""Errors of the authority."""

from __future__ import annotations

from lorikit.server.errors import LorikitError


class AuthorityError(LorikitError):
    """The authority's folder cannot be used; the message says why and what to do."""
