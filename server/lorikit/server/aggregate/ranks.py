# SPDX-License-Identifier: Apache-2.0
"""Cutting and padding the two factors of a LoRA pair to a rank.

Cutting keeps the leading ranks. That is only right where ranks are ordered (HETLORA's tail
penalty, an SVD); for an unordered pair use ``split`` of its thin SVD instead.
"""

from __future__ import annotations

import numpy as np

from lorikit.proto.tensors import Float32


def truncate(a: Float32, b: Float32, rank: int) -> tuple[Float32, Float32]:
    """The first ``rank`` rows of A and columns of B, as copies; fewer if the pair has fewer."""
    return a[:rank].copy(), b[:, :rank].copy()


def pad(a: Float32, b: Float32, rank: int) -> tuple[Float32, Float32]:
    """The pair with zero rows and columns added up to ``rank``; the product is unchanged.

    Raises:
        ValueError: The pair has a larger rank.
    """
    missing = rank - a.shape[0]
    if missing < 0:
        raise ValueError(f"cannot pad rank {a.shape[0]} to {rank}; cut it with truncate")
    return np.pad(a, ((0, missing), (0, 0))), np.pad(b, ((0, 0), (0, missing)))
