# SPDX-License-Identifier: Apache-2.0
"""The server with packages that were compiled before, so that it starts in a second.

All of it is the real thing but one part: where ``lorikit server`` exports and verifies the model
anew at each start, this one reads the packages that a compiler has left in a folder. Tests that
kill the server often use it; started as ``python -m tests.integration.compiled_server``.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import tokenizers

from lorikit.proto.manifest import BlobRef, Manifest, load
from lorikit.proto.tensors import Bundle, Tensors, pack, raw, unpack
from lorikit.server.app import Coordinator, make_method, serve
from lorikit.server.config import RunConfig, read_evaluation_data, read_server_config
from lorikit.server.export import write_adapter
from lorikit.server.methods.base import AdapterSpace
from lorikit.server.planner.planner import Planner
from lorikit.server.planner.speed import Operations
from lorikit.server.planner.step import StepShape
from lorikit.server.store.blobs import FolderBlobs
from lorikit.server.work import RunParts

PRECISION = "nf4"


@dataclass(frozen=True)
class CompiledPackage:
    manifest: Manifest
    ref: BlobRef


class CompiledParts:
    """What a compiler made of one model for one precision, at full depth; read from a folder."""

    def __init__(self, folder: Path, blobs: FolderBlobs) -> None:
        self._folder = folder
        self._blobs = blobs
        for path in (folder / "blobs").iterdir():
            blobs.put(path.read_bytes())
        refs = json.loads((folder / "packages.json").read_text())
        self._train, self._predict = (self._open(refs[name]) for name in ("train", "predict"))
        self.layer_count = self._train.manifest.layer_count
        predict = self._predict.manifest.graph("predict").blob
        self._session = onnxruntime.InferenceSession(str(blobs.path(predict.digest)))
        tokenizer = self._predict.manifest.tokenizer
        assert tokenizer is not None
        self._tokenizer = tokenizers.Tokenizer.from_buffer(blobs.read(tokenizer.digest))
        self._tokenizer.enable_padding()

    def space(self, max_rank: int) -> AdapterSpace:
        return AdapterSpace(
            tensors=self._train.manifest.adapter, layer_count=self.layer_count, max_rank=max_rank
        )

    def initial(self, max_rank: int, seed: int) -> Tensors:
        bundle = unpack((self._folder / "initial.bundle").read_bytes())
        assert bundle.scalars == {"max_rank": max_rank}
        return {name: each.parts["values"] for name, each in bundle.tensors.items()}

    def package(
        self,
        *,
        precision: str,
        lowest_trained_layer: int,
        kept_layers: Sequence[int] | None = None,
        runtime: str = "onnx",
        recomputed_layers: Sequence[int] = (),
        kernels: str = "lean",
    ) -> CompiledPackage:
        assert (precision, lowest_trained_layer, kept_layers) == (PRECISION, 0, None)
        return self._train

    def logits(
        self, adapter: Tensors, texts: Sequence[str], *, lora_scale: float, max_length: int
    ) -> np.ndarray:
        self._tokenizer.enable_truncation(max_length)
        rows = self._tokenizer.encode_batch(list(texts))
        feeds = {
            "input_ids": np.array([row.ids for row in rows], np.int64),
            "attention_mask": np.array([row.attention_mask for row in rows], np.int64),
            "lora_scale": np.asarray(lora_scale, np.float32),
            **adapter,
        }
        return self._session.run(["logits"], feeds)[0]

    def predicted_peak_memory(self, step: StepShape, *, baseline_bytes: int) -> int:
        return baseline_bytes + (100 << 20)

    def base_bytes(self, precision: str) -> int:
        return sum(blob.size for blob in self._train.manifest.weight_blobs)

    def tokens(self, length: int) -> int:
        return length

    def operations(self, layers: Sequence[int], step: StepShape) -> Operations:
        rows, count = step.micro_batch * step.length, sum(layer >= 0 for layer in layers)
        flops = int(self._train.manifest.facts["flops_per_token"]) // (2 * self.layer_count)
        return Operations(weights=count * flops // 2, products=count * flops * rows)

    def _open(self, ref: dict[str, object]) -> CompiledPackage:
        blob = BlobRef(**ref)  # type: ignore[arg-type]  # as ``leave_parts`` wrote it
        return CompiledPackage(load(self._blobs.read(blob.digest)), blob)


def leave_parts(
    folder: Path, compiler, config: RunConfig, *, initial: Tensors | None = None
) -> None:
    """Write what ``CompiledParts`` reads; the compiler's blobs lie in ``folder / "blobs"``.

    Args:
        folder: Where to write.
        compiler: Of the run's model.
        config: Settings of the run.
        initial: Start values; None for the compiler's.
    """
    lowest = {"train": (PRECISION, 0), "predict": ("fp32", compiler.layer_count)}
    refs = {
        name: compiler.package(precision=precision, lowest_trained_layer=layer).ref
        for name, (precision, layer) in lowest.items()
    }
    plain = {name: {"digest": ref.digest, "size": ref.size} for name, ref in refs.items()}
    (folder / "packages.json").write_text(json.dumps(plain))
    tensors = initial or compiler.initial(config.max_rank, config.seed)
    bundle = Bundle({n: raw(t) for n, t in tensors.items()}, {"max_rank": config.max_rank})
    (folder / "initial.bundle").write_bytes(pack(bundle))


def open_compiled_parts(folder: Path, config: RunConfig, blobs: FolderBlobs) -> RunParts:
    parts = CompiledParts(folder, blobs)
    space = parts.space(config.max_rank)

    def export(target: Path, adapter: Tensors, rank: int) -> None:
        write_adapter(
            target,
            adapter,
            space=space,
            base_model=str(config.model),
            targets=config.targets,
            scale=config.lora_scale,
            rank=rank,
            labels=config.labels,
        )

    assert config.evaluation_data is not None
    return RunParts(
        method=make_method(config),
        source=parts,
        planner=Planner(
            parts,
            precisions=[PRECISION],
            batch_size=config.batch_size,
            max_length=config.max_length,
            max_rank=config.max_rank,
        ),
        export=export,
        evaluation=read_evaluation_data(config.evaluation_data, config.task),
    )


def main(settings: Path, folder: Path) -> None:
    def listening(server: Coordinator) -> None:
        print(json.dumps({"event": "listening", "address": server.address}), flush=True)

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    config = read_server_config(settings)
    asyncio.run(
        serve(
            config,
            open_parts=lambda run, blobs: open_compiled_parts(folder, run, blobs),
            started=listening,
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
