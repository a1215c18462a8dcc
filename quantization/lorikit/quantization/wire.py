# SPDX-License-Identifier: Apache-2.0
"""What travels of an update: each tensor rotated, rounded with a seed, and compressed at last.

A ``WireHeader`` beside the tensors says all that their codecs do not, so that whoever has the bytes
can read them; a scheme or version that is unknown here is refused, never guessed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import zlib

import numpy as np

from lorikit.proto.plan import ADAPTIVE, WIRE_VERSION
from lorikit.proto.tensors import Bundle, Encoded, Float32, WireHeader, pack, unpack
from lorikit.quantization import codec
from lorikit.quantization.base import Codec, QuantizationError
from lorikit.quantization.hadamard import rotated, unrotated
from lorikit.quantization.int4 import Int4
from lorikit.quantization.int8 import Int8Blocks
from lorikit.quantization.planes import INT1, INT2, INT3, INT6
from lorikit.quantization.topk import TopK

SCHEMES = (
    "fp32", "fp16", "bf16", "int8-block64", "int6", "int4", "int3", "int2", "int1", "topk",
    ADAPTIVE,
)  # fmt: skip
"""Schemes of this version, the most exact first."""

LADDER: tuple[Codec, ...] = (
    TopK(1e-9), TopK(1 / 64), INT1, INT2, INT3, Int4(), INT6, Int8Blocks(),
)  # fmt: skip
"""What ``adaptive`` chooses from; the first keeps a single value and holds the rest back."""

SMALL = 512
"""Tensors with fewer elements, and vectors, travel in 16 bits whatever the scheme."""

_COMPRESSED = "zlib"
"""Codec, and name, of the one tensor of a bundle that holds another one, compressed."""

_LEVEL = 6
_FP16_LIMIT = 60_000.0


class UnknownSchemeError(QuantizationError):
    """An update's scheme or its version is unknown here; update whichever side is older."""


def check_scheme(name: str) -> None:
    """Refuse a scheme that this version does not have.

    Raises:
        UnknownSchemeError: The message lists the known ones.
    """
    if name not in SCHEMES:
        raise UnknownSchemeError(f"unknown wire scheme {name!r:.80}; known are {list(SCHEMES)}")


def check_header(header: WireHeader) -> None:
    """Refuse a header that this version cannot read.

    Raises:
        UnknownSchemeError: Another version, or an unknown scheme.
    """
    if header.version != WIRE_VERSION:
        raise UnknownSchemeError(f"wire version {header.version} is not {WIRE_VERSION}")
    check_scheme(header.scheme)


def scheme_codec(name: str, *, top_share: float) -> Codec:
    """The codec of a scheme's matrices; ``adaptive`` has none of its own.

    Raises:
        UnknownSchemeError: No scheme of that name has one.
    """
    if name == ADAPTIVE:
        raise UnknownSchemeError(f"{ADAPTIVE} chooses a codec per tensor")
    check_scheme(name)
    return TopK(top_share) if name == TopK.name else codec(name)


def small_codec(values: Float32) -> Codec | None:
    """The codec of a tensor that is too small to save anything on; None for a matrix."""
    if values.ndim > 1 and values.size >= SMALL:
        return None
    is_wide = bool(np.abs(values).max(initial=0) > _FP16_LIMIT)
    return codec("fp32" if is_wide else "fp16")


def encode(values: Float32, name: str, header: WireHeader, chosen: Codec) -> Encoded:
    """A tensor as the header says it travels.

    Rotation and rounding draw from generators of their own, which depend on the header's seed and
    the tensor's name alone. Tensors in 16 or 32 bits are not rotated.

    Args:
        values: Finite float32 values, a change or absolute as the header says.
        name: The tensor's.
        header: Of the update.
        chosen: Codec of this tensor.

    Raises:
        QuantizationError: A value is not finite.
    """
    rng = _generator(header.seed, "round", name) if header.stochastic else None
    if not _is_rotated(chosen.name, header):
        return chosen.encode(values, rng=rng)
    turned = rotated(values, header.rotation_block, _generator(header.seed, "rotate", name))
    return dataclasses.replace(chosen.encode(turned, rng=rng), shape=values.shape)


def decode(encoded: Encoded, name: str, header: WireHeader) -> Float32:
    """The values that ``encode`` was given, up to the rounding; a change stays a change.

    Raises:
        QuantizationError: A codec that the scheme does not use, or parts that do not belong
            together.
    """
    if encoded.codec not in _codecs(header.scheme):
        raise QuantizationError(
            f"codec {encoded.codec!r:.80} is none of the wire scheme {header.scheme}"
        )
    values = codec(encoded.codec).decode(encoded)
    if not _is_rotated(encoded.codec, header):
        return values
    signs = _generator(header.seed, "rotate", name)
    return unrotated(values, header.rotation_block, signs).reshape(encoded.shape)


def compressed(bundle: Bundle) -> Bundle:
    """A bundle that holds the given one in fewer bytes, or the same one where none are saved."""
    whole = pack(bundle)
    data = np.frombuffer(zlib.compress(whole, _LEVEL), np.uint8)
    squeezed = Bundle({_COMPRESSED: Encoded(_COMPRESSED, data.shape, {"data": data})})
    return squeezed if len(pack(squeezed)) < len(whole) else bundle


def expanded(bundle: Bundle, *, max_bytes: int) -> Bundle:
    """The bundle that ``compressed`` was given; one that is not compressed comes back as it is.

    No more than ``max_bytes`` are ever unpacked, however many the data promises.

    Raises:
        QuantizationError: Not zlib, cut off, followed by more, or larger than ``max_bytes``.
        MalformedTensorError: What was compressed is no bundle.
    """
    holder = bundle.tensors.get(_COMPRESSED)
    if holder is None or holder.codec != _COMPRESSED:
        return bundle
    if len(bundle.tensors) > 1 or set(holder.parts) != {"data"}:
        raise QuantizationError("a compressed bundle holds one tensor with the part 'data' alone")
    return unpack(_inflated(holder.parts["data"].tobytes(), max_bytes), max_bytes=max_bytes)


def _inflated(data: bytes, max_bytes: int) -> bytes:
    inflater = zlib.decompressobj()
    try:
        whole = inflater.decompress(data, max_bytes + 1)
    except zlib.error as error:
        raise QuantizationError(f"compressed data are damaged: {error}") from error
    if len(whole) > max_bytes:
        raise QuantizationError(f"compressed data unpack to more than {max_bytes} bytes")
    if not inflater.eof or inflater.unused_data:
        raise QuantizationError("compressed data are cut off, or something follows them")
    return whole


def _codecs(scheme: str) -> set[str]:
    own = {each.name for each in LADDER} if scheme == ADAPTIVE else {scheme}
    return own | {"fp16", "fp32"}


def _is_rotated(name: str, header: WireHeader) -> bool:
    return header.rotation_block > 0 and name not in ("fp32", "fp16", "bf16")


def _generator(seed: int, purpose: str, name: str) -> np.random.Generator:
    """A stream of its own for each purpose and tensor, the same wherever it is made."""
    digest = hashlib.sha256(f"{purpose}/{name}".encode()).digest()
    entropy = [seed, int.from_bytes(digest[:16], "big")]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))
