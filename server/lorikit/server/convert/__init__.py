# SPDX-License-Identifier: Apache-2.0
"""Converts a folder of weights to other precisions, tensor by tensor, however large it is.

``convert`` reads a Hugging Face folder's safetensors piece by piece and writes one folder per
target codec, or only measures what they would cost; ``ConvertedFolder`` reads the result.
"""

from __future__ import annotations

from lorikit.server.convert.conversion import Report, TensorReport, convert
from lorikit.server.convert.converted import ConvertedFolder
from lorikit.server.convert.errors import ConversionError
from lorikit.server.convert.targets import TARGETS

__all__ = [
    "TARGETS",
    "ConversionError",
    "ConvertedFolder",
    "Report",
    "TensorReport",
    "convert",
]
