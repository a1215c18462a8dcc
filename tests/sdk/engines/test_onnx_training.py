# SPDX-License-Identifier: Apache-2.0
"""The ``onnx-training`` engine, in an interpreter that has its runtime.

Both runtimes install the same module, so this one needs an environment of its own: set
LORIKIT_TRAINING_PYTHON to its interpreter (onnxruntime-training-cpu 1.19.2, grpcio, protobuf and
tokenizers).
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from tests.sdk.engines.tiny_package import build_tiny_package

from lorikit.proto.manifest import dump
from lorikit.proto.tensors import Bundle, pack, raw, unpack

ROOT = Path(__file__).parents[3]
PYTHON = os.environ.get("LORIKIT_TRAINING_PYTHON", "")

pytestmark = pytest.mark.skipif(
    not PYTHON, reason="LORIKIT_TRAINING_PYTHON names no interpreter with onnxruntime-training"
)

_RUN = """
import sys
from pathlib import Path
import numpy as np
from lorikit.proto.manifest import load
from lorikit.proto.tensors import Bundle, pack, raw, unpack
from lorikit.sdk.engines import available_engines, open_engine
from lorikit.sdk.engines._probe import _part
from lorikit.sdk.engines.base import Batch
folder = Path(sys.argv[1])
manifest = load((folder / "manifest").read_bytes())
bundle = unpack((folder / "request").read_bytes())
batch = _part(bundle, "batch.", "")
engine = open_engine(sys.argv[2] or None, manifest, folder, threads=1)
result = engine.gradients(
    _part(bundle, "adapter.", ""),
    Batch(*(batch[n].astype(np.int64) for n in ("input_ids", "attention_mask", "labels")),
          batch["weights"]),
    {"lora_scale": 2.0},
)
tensors = {name: raw(value) for name, value in result.gradients.items()}
(folder / "result").write_bytes(pack(Bundle(tensors, {"loss": result.loss})))
print(available_engines()[0].name, "torch" in sys.modules, "onnxruntime.training" in sys.modules)
"""


def run_training_python(folder: Path, engine: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(str(ROOT / part) for part in ("proto", "quantization", "sdk"))
    return subprocess.run(
        [PYTHON, "-c", _RUN, str(folder), engine],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("engine", ["onnx-training", ""])
def test_gradients_are_those_of_the_chain_rule_without_torch(tmp_path: Path, engine: str) -> None:
    package = build_tiny_package(tmp_path).with_probe()
    adapter, batch = package.adapter(), package.batch()
    request = {f"adapter.{name}": raw(value) for name, value in adapter.items()}
    for name in ("input_ids", "attention_mask", "labels", "weights"):
        request[f"batch.{name}"] = raw(getattr(batch, name))
    (tmp_path / "manifest").write_bytes(dump(package.manifest))
    (tmp_path / "request").write_bytes(pack(Bundle(request)))

    done = run_training_python(tmp_path, engine)

    assert done.stdout == "onnx-training False False\n", done.stderr
    result = unpack((tmp_path / "result").read_bytes())
    expected = package.reference(adapter, batch)
    assert result.scalars["loss"] == pytest.approx(expected.loss, rel=1e-5)
    for name, gradient in expected.gradients.items():
        np.testing.assert_allclose(
            result.tensors[name].parts["values"], gradient, rtol=1e-4, atol=1e-6
        )


def test_stock_engine_is_not_there(tmp_path: Path) -> None:
    package = build_tiny_package(tmp_path)
    (tmp_path / "manifest").write_bytes(dump(package.manifest))
    (tmp_path / "request").write_bytes(pack(Bundle({"batch.x": raw(0)})))
    done = run_training_python(tmp_path, "onnx")
    assert 'pip install "lorikit[onnx]"' in done.stderr
