# SPDX-License-Identifier: Apache-2.0
"""What every codec does."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from lorikit.proto.tensors import Encoded

Float32 = npt.NDArray[np.float32]


class QuantizationError(ValueError):
    """Values cannot be encoded, or parts cannot be decoded; the message says which and why."""


class Codec(Protocol):
    """Fewer bits for a tensor, and back."""

    @property
    def name(self) -> str:
        """Name in plans, manifests and on the wire."""
        ...

    def encode(self, values: Float32, *, rng: np.random.Generator | None = None) -> Encoded:
        """Encode finite float32 values of any shape.

        Args:
            values: What to encode.
            rng: Source of stochastic rounding, where the codec has it; None rounds to nearest.

        Raises:
            QuantizationError: Values that are not finite.
        """
        ...

    def decode(self, encoded: Encoded) -> Float32:
        """The values, as float32 in the encoded shape.

        Raises:
            QuantizationError: Parts missing, or their shapes or types do not follow from the shape.
        """
        ...
