# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with a folder of weights."""

from __future__ import annotations

from lorikit.server.errors import LorikitError


class ConversionError(LorikitError):
    """A folder cannot be converted or read; the message names the file or tensor and what to do."""
