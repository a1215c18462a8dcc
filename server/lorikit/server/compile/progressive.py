# SPDX-License-Identifier: Apache-2.0
"""Progressive bases: int4 and int8 of the same integers, and patches from one to the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from lorikit.proto.manifest import BlobPatch, BlobRef
from lorikit.proto.tensors import Encoded, Float32
from lorikit.quantization.nested import coarse, nested, residual
from lorikit.quantization.patches import Step, packed_patch
from lorikit.server.compile.base import INT4_BLOCKS, INT8_BLOCKS, Base, Stored

PROGRESSIVE = ("int4", "int8")
"""Precisions that a device can go between by a patch."""


def encode_nested(values: Float32, small: str, precision: str) -> Encoded:
    """A matrix, whose rows fill blocks, in one of the two precisions.

    Args:
        values: [rows, columns].
        small: Its codec at int4; at int8 the blocks are as long.
        precision: ``int4`` or ``int8``.

    Raises:
        QuantizationError: A value is not finite.
    """
    fine = nested(values, INT4_BLOCKS[small])
    return fine if precision == "int8" else coarse(fine)


def base_patches(base: Base, target: Base, put: Callable[[bytes], BlobRef]) -> dict[str, BlobPatch]:
    """Patches that make the blobs of one base from those of another.

    Args:
        base: What a device may hold: ``int4`` or ``int8``.
        target: The other one.
        put: Stores a patch.

    Returns:
        By digest of the target's blob; without blobs that both have.
    """
    patches = {}
    for layer, blob in sorted(target.layer_blobs.items()):
        held = base.layer_blobs[layer]
        if held.digest == blob.digest:
            continue
        names = [name for name, stored in target.stored.items() if stored.blob == blob.digest]
        steps = [s for n in names for s in _steps(base.stored[n], target.stored[n])]
        patch = put(packed_patch(steps, blob.size))
        patches[blob.digest] = BlobPatch(target=blob.digest, base=held.digest, patch=patch)
    return patches


def _steps(held: Stored, wanted: Stored) -> Iterator[Step]:
    """How the parts of one tensor come about."""
    for role, place in wanted.places.items():
        own, part = held.places.get(role), wanted.encoded.parts[role]
        raw = np.asarray(part, order="C").tobytes()
        same = own is not None and np.asarray(held.encoded.parts[role], order="C").tobytes() == raw
        climbs = held.encoded.codec in INT4_BLOCKS and wanted.encoded.codec in INT8_BLOCKS
        descends = held.encoded.codec in INT8_BLOCKS and wanted.encoded.codec in INT4_BLOCKS
        if own is not None and same:
            yield Step("copy", place.offset, start=own.offset, length=len(raw))
        elif own is not None and climbs:
            if role == "codes":
                low = residual(wanted.encoded).tobytes()
                yield Step("join", place.offset, own.offset, low, len(low))
            else:
                yield Step("down", place.offset, start=own.offset, length=len(raw))
        elif own is not None and descends:
            operation = "cut" if role == "codes" else "up"
            yield Step(operation, place.offset, start=own.offset, length=len(raw))
        else:
            yield Step("data", place.offset, data=raw, length=len(raw))
