# SPDX-License-Identifier: Apache-2.0
"""A folder of weights to other precisions, with memory for one tensor's codes and a few pieces."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorikit.proto.tensors import Encoded, Float32
from lorikit.quantization import QuantizationError, codec
from lorikit.quantization._double import DoubleTableCodec
from lorikit.quantization._table import BLOCK, dequantize
from lorikit.quantization.metrics import ErrorMetrics, from_sums
from lorikit.server.convert.errors import ConversionError
from lorikit.server.convert.safetensors import Shard, Stored, read_folder
from lorikit.server.convert.shard_writer import FORMAT, ShardWriter, Written
from lorikit.server.convert.targets import (
    AS_IT_IS,
    TARGETS,
    Errors,
    class_of,
    codec_for,
    encode_piece,
    joined,
    piece_rows,
)

DESCRIPTION = "conversion.json"
"""File of a converted folder that says where each tensor is and how it is encoded."""

_PIECE_VALUES = 1 << 18
"""Values of a piece: its temporaries stay in the cache, which makes coding three times as fast."""
_LARGEST_COMPANION = 32 << 20
_COMPANIONS = (".json", ".txt", ".model", ".jinja")


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorReport:
    """What became of one tensor."""

    name: str
    kind: str
    """``matrix``, ``table``, ``vector`` or ``other``."""
    codec: str
    """Empty where it was copied as it is."""
    shape: tuple[int, ...]
    source_bytes: int
    bytes: int
    errors: Errors


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a conversion to one target did."""

    target: str
    folder: Path | None
    """Where it is; None where it was only measured."""
    tensors: tuple[TensorReport, ...]
    taken_up: int
    """Tensors that an earlier start had converted."""
    seconds: float

    def by_class(self) -> dict[str, tuple[int, int, int, int, ErrorMetrics]]:
        """For each class: tensors, elements, source bytes, bytes, and errors of all together."""
        rows: dict[str, tuple[int, int, int, int, ErrorMetrics]] = {}
        for kind in ("matrix", "table", "vector", "other"):
            chosen = [tensor for tensor in self.tensors if tensor.kind == kind]
            if not chosen:
                continue
            total = Errors()
            for tensor in chosen:
                total.add(tensor.errors)
            rows[kind] = (
                len(chosen),
                sum(math.prod(tensor.shape) for tensor in chosen),
                sum(tensor.source_bytes for tensor in chosen),
                sum(tensor.bytes for tensor in chosen),
                from_sums(total.signal, total.noise, total.largest),
            )
        return rows


@dataclass(slots=True)
class _Progress:
    """Source bytes done, told to whoever wants to know."""

    tell: Callable[[int, int], None]
    total: int
    done: int = 0

    def add(self, nbytes: int) -> None:
        self.done += nbytes
        self.tell(self.done, self.total)


@dataclass(slots=True)
class _Target:
    """One target in the making."""

    name: str
    folder: Path | None
    tensors: list[TensorReport] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    taken_up: int = 0


def convert(
    folder: Path,
    targets: Sequence[str],
    *,
    out: Path | None = None,
    threads: int = 2,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Report]:
    """Convert a model folder to each target, or measure what that would cost.

    Every weight is read once for all targets. A conversion that was killed goes on behind the last
    tensor that it finished, as long as the source files are the same; one that is whole is only
    read back. Memory: the codes of the tensor at hand, and a few pieces of 2**18 values.

    Args:
        folder: Model folder with safetensors, sharded or not.
        targets: Codecs, of ``TARGETS``.
        out: Where to write a folder per target; None writes nothing.
        threads: Pieces encoded at a time.
        progress: Takes source bytes done and in all.

    Raises:
        ConversionError: Unknown target, no weights, a malformed file, or a value that is not finite
            (names the tensor).
    """
    if unknown := [name for name in targets if name not in TARGETS]:
        raise ConversionError(f"cannot convert to {unknown[0]!r}; known are {', '.join(TARGETS)}")
    started = time.monotonic()
    shards = read_folder(folder)
    _check_names(shards)
    counted = _Progress(progress, sum(t.nbytes for shard in shards for t in shard.tensors))
    parts = [_Target(name, None if out is None else out / name) for name in targets]
    with ThreadPoolExecutor(threads) as pool:
        for shard in shards:
            _convert_shard(shard, parts, pool, threads + 2, counted)
    seconds = time.monotonic() - started
    for part in parts:
        if part.folder is not None:
            _describe(part, folder)
    return [
        Report(
            target=part.name,
            folder=part.folder,
            tensors=tuple(part.tensors),
            taken_up=part.taken_up,
            seconds=seconds,
        )
        for part in parts
    ]


def _convert_shard(
    shard: Shard,
    parts: Sequence[_Target],
    pool: ThreadPoolExecutor,
    ahead: int,
    progress: _Progress,
) -> None:
    with ExitStack() as open_files:
        writers: dict[str, ShardWriter] = {}
        for part in parts:
            if part.folder is not None:
                part.folder.mkdir(parents=True, exist_ok=True)
                writer = ShardWriter(part.folder / shard.path.name, shard, part.name)
                writers[part.name] = open_files.enter_context(writer)
        for tensor in shard.tensors:
            _convert_tensor(tensor, parts, writers, pool, ahead)
            progress.add(tensor.nbytes)
        for writer in writers.values():
            writer.finish()


def _convert_tensor(
    tensor: Stored,
    parts: Sequence[_Target],
    writers: Mapping[str, ShardWriter],
    pool: ThreadPoolExecutor,
    ahead: int,
) -> None:
    """Encode a tensor for all targets that lack it, and write it."""
    wanted = []
    for part in parts:
        writer = writers.get(part.name)
        known = writer.written.get(tensor.name) if writer else None
        if known is not None:
            part.taken_up += 1
            _report(part, known, tensor)
        else:
            wanted.append(part)
    coded = {part.name: codec_for(tensor, part.name) for part in wanted}
    made = _encoded(tensor, {name for name in coded.values() if name != AS_IT_IS}, pool, ahead)
    for part in wanted:
        writer, name = writers.get(part.name), coded[part.name]
        if name == AS_IT_IS:
            if writer is not None:
                writer.copy(tensor, class_of(tensor))
            nbytes, errors = tensor.nbytes, Errors()
        else:
            encoded, errors = made[name]
            nbytes = encoded.nbytes
            if writer is not None:
                writer.append(tensor, encoded, class_of(tensor), errors)
        part.tensors.append(_tensor_report(tensor, name, nbytes, errors))
        part.files[tensor.name] = tensor.path.name


def _encoded(
    tensor: Stored, names: Iterable[str], pool: ThreadPoolExecutor, ahead: int
) -> dict[str, tuple[Encoded, Errors]]:
    """The tensor in each codec, with its errors; one reading for all."""
    wanted = sorted(names)
    pieces: dict[str, list[Encoded]] = {name: [] for name in wanted}
    errors = {name: Errors() for name in wanted}

    def work(values: Float32) -> list[tuple[Encoded, Errors]]:
        return [encode_piece(values, name) for name in wanted]

    if wanted:
        rows = piece_rows(tensor.shape, _PIECE_VALUES)
        try:
            for done in _in_order(pool, work, tensor.pieces(rows), ahead):
                for name, (encoded, error) in zip(wanted, done, strict=True):
                    pieces[name].append(encoded)
                    errors[name].add(error)
        except QuantizationError as error:
            raise ConversionError(f"{tensor.name} in {tensor.path.name}: {error}") from error
    made = {}
    for name in wanted:
        encoded = joined(pieces.pop(name), name, tensor.shape)
        chosen = codec(name)
        if isinstance(chosen, DoubleTableCodec):
            errors[name] = _double_errors(tensor, encoded, chosen)
        made[name] = (encoded, errors[name])
    return made


def _in_order(
    pool: ThreadPoolExecutor,
    work: Callable[[Float32], list[tuple[Encoded, Errors]]],
    pieces: Iterator[Float32],
    ahead: int,
) -> Iterator[list[tuple[Encoded, Errors]]]:
    """Results in the order of the pieces, with at most so many pieces in memory."""
    waiting: deque[Future[list[tuple[Encoded, Errors]]]] = deque()
    for piece in pieces:
        waiting.append(pool.submit(work, piece))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _double_errors(tensor: Stored, encoded: Encoded, chosen: DoubleTableCodec) -> Errors:
    """Errors with quantised magnitudes, which are known only when the whole tensor was read."""
    magnitudes = chosen.magnitudes(encoded)
    codes = encoded.parts["codes"]
    total, start = Errors(), 0
    for values in tensor.pieces(piece_rows(tensor.shape, _PIECE_VALUES)):
        flat = values.reshape(-1)
        own = codes[start // 2 : (start + flat.size + 1) // 2]
        largest = magnitudes[start // BLOCK : -(-(start + flat.size) // BLOCK)]
        error = dequantize(own, largest, chosen.table, flat.size) - flat  # type: ignore[arg-type]  # uint8
        start += flat.size
        total.add(
            Errors(
                signal=float(flat @ flat),
                noise=float(error @ error),
                largest=float(abs(error).max(initial=0)),
            )
        )
    return total


def _report(part: _Target, written: Written, tensor: Stored) -> None:
    report = _tensor_report(tensor, written.codec, written.nbytes, written.errors)
    part.tensors.append(report)
    part.files[tensor.name] = tensor.path.name


def _tensor_report(tensor: Stored, name: str, nbytes: int, errors: Errors) -> TensorReport:
    return TensorReport(
        name=tensor.name,
        kind=class_of(tensor),
        codec=name,
        shape=tensor.shape,
        source_bytes=tensor.nbytes,
        bytes=nbytes,
        errors=errors,
    )


def _check_names(shards: Sequence[Shard]) -> None:
    seen: dict[str, str] = {}
    for shard in shards:
        for tensor in shard.tensors:
            if tensor.name in seen:
                raise ConversionError(
                    f"{tensor.name} stands in {seen[tensor.name]} and in {shard.path.name}; remove "
                    "the file that does not belong to the model"
                )
            seen[tensor.name] = shard.path.name


def _describe(part: _Target, source: Path) -> None:
    """Write the description last: a folder that has one is whole."""
    assert part.folder is not None
    for path in sorted(source.iterdir()):
        if _is_companion(path):
            shutil.copyfile(path, part.folder / path.name)
    tensors: dict[str, Any] = {
        tensor.name: {
            "codec": tensor.codec,
            "shape": list(tensor.shape),
            "file": part.files[tensor.name],
        }
        for tensor in part.tensors
    }
    text = json.dumps({"format": FORMAT, "codec": part.name, "tensors": tensors}, indent=1)
    partial = part.folder / f"{DESCRIPTION}.partial"
    partial.write_text(text, encoding="utf-8")
    partial.replace(part.folder / DESCRIPTION)


def _is_companion(path: Path) -> bool:
    """Whether a file of the source belongs to the model and is no weights."""
    is_index = path.name.endswith(".index.json")
    is_text = path.suffix in _COMPANIONS and not is_index and path.is_file()
    return is_text and path.stat().st_size <= _LARGEST_COMPANION
