# SPDX-License-Identifier: Apache-2.0
"""Runs one micro-batch on any engine, in this interpreter or in another that has its runtime.

The runtimes install the same module, so each needs an environment of its own. An environment
variable names its interpreter, which has to have the runtime, grpcio, protobuf and tokenizers:
LORIKIT_TRAINING_PYTHON for onnxruntime-training-cpu 1.19.2, LORIKIT_OLDEST_PYTHON for onnxruntime
1.20, the oldest release that is supported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lorikit.proto.manifest import Manifest, dump, load
from lorikit.proto.tensors import Bundle, Tensors, pack, raw, unpack
from lorikit.sdk.engines import available_engines, open_engine
from lorikit.sdk.engines._signature import WHOLE_NUMBERS
from lorikit.sdk.engines.base import Batch, Gradients

ROOT = Path(__file__).parents[3]


@dataclass(frozen=True)
class Place:
    """An engine and where it runs."""

    engine: str
    variable: str = ""
    """Environment variable that names the interpreter; empty for this one."""

    def __str__(self) -> str:
        return f"{self.engine}-{self.variable or 'here'}"

    def gradients(
        self, folder: Path, manifest: Manifest, adapter: Tensors, batch: Batch, scale: float = 2.0
    ) -> Gradients:
        tensors = {f"adapter.{name}": raw(value) for name, value in adapter.items()}
        arrays = {**batch.inputs, "labels": batch.labels, "weights": batch.weights}
        tensors |= {f"batch.{name}": raw(array) for name, array in arrays.items()}
        (folder / "manifest").write_bytes(dump(manifest))
        (folder / "request").write_bytes(pack(Bundle(tensors, {"lora_scale": scale})))
        if self.variable:
            _run_elsewhere(self.interpreter(), folder, self.engine)
        else:
            answer(folder, self.engine)
        bundle = unpack((folder / "result").read_bytes())
        gradients = {name: each.parts["values"] for name, each in bundle.tensors.items()}
        return Gradients(bundle.scalars["loss"], bundle.scalars["correct"], gradients)

    def interpreter(self) -> str:
        path = os.environ.get(self.variable, "")
        if not path:
            import pytest  # the other interpreters do not have it

            pytest.skip(f"{self.variable} names no interpreter with the runtime of {self.engine}")
        return path


PLACES = (
    Place("onnx"),
    Place("onnx", "LORIKIT_OLDEST_PYTHON"),
    Place("onnx-training", "LORIKIT_TRAINING_PYTHON"),
    Place("torch"),
)


def answer(folder: Path, engine_name: str) -> None:
    """Run the request that lies in the folder and leave the result beside it."""
    manifest = load((folder / "manifest").read_bytes())
    request = unpack((folder / "request").read_bytes())
    values = {name: each.parts["values"] for name, each in request.tensors.items()}
    adapter = {
        name.removeprefix("adapter."): value
        for name, value in values.items()
        if name.startswith("adapter.")
    }
    arrays = {n.removeprefix("batch."): v for n, v in values.items() if n.startswith("batch.")}
    arrays = {n: v.astype(np.int64) if n in WHOLE_NUMBERS else v for n, v in arrays.items()}
    batch = Batch(labels=arrays.pop("labels"), weights=arrays.pop("weights"), inputs=arrays)
    engine = open_engine(engine_name, manifest, folder, threads=1)
    result = engine.gradients(adapter, batch, request.scalars)
    engine.close()
    tensors = {name: raw(value) for name, value in result.gradients.items()}
    scalars = {"loss": result.loss, "correct": result.correct}
    (folder / "result").write_bytes(pack(Bundle(tensors, scalars)))


def _run_elsewhere(interpreter: str, folder: Path, engine: str) -> None:
    sources = [str(ROOT / part) for part in ("proto", "quantization", "sdk")]
    done = subprocess.run(
        [interpreter, __file__, str(folder), engine],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sources)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    heavy = done.stdout.split()
    assert heavy == [f"{engine}"], f"a device must not load these: {heavy}"


if __name__ == "__main__":
    answer(Path(sys.argv[1]), sys.argv[2])
    print(
        *(e.name for e in available_engines()),
        *(m for m in ("torch", "onnx", "onnxruntime.training") if m in sys.modules),
    )
