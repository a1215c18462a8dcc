# SPDX-License-Identifier: Apache-2.0
"""The ``onnx`` engine on a real package, and packages that are not what they say."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from tests.sdk.engines.tiny_package import (
    HIDDEN,
    INPUTS,
    A,
    B,
    TinyPackage,
    build_tiny_package,
    put,
)

from lorikit.proto.manifest import Manifest
from lorikit.proto.tensors import Tensors
from lorikit.sdk._errors import (
    EngineDisagreesError,
    PackageError,
    UnsupportedPackageError,
)
from lorikit.sdk.engines import open_engine
from lorikit.sdk.engines._probe import check_probe, parse_probe
from lorikit.sdk.engines.base import Batch, Engine, Gradients

pytest.importorskip("onnxruntime", reason="these tests run the onnx engine")


@pytest.fixture
def package(tmp_path: Path) -> TinyPackage:
    return build_tiny_package(tmp_path)


def _open(package: TinyPackage, threads: int = 1) -> Engine:
    return open_engine("onnx", package.manifest, package.folder, threads=threads)


@pytest.mark.parametrize("rank", [1, 4, 9])
@pytest.mark.parametrize("lengths", [(1,), (5, 3), (2, 7, 7, 1)])
def test_gradients_are_those_of_the_chain_rule(
    package: TinyPackage, rank: int, lengths: tuple[int, ...]
) -> None:
    adapter, batch = package.adapter(rank), package.batch(lengths)

    result = _open(package).gradients(adapter, batch, INPUTS)

    expected = package.reference(adapter, batch)
    assert result.loss == pytest.approx(expected.loss, rel=1e-5)
    assert result.correct == expected.correct
    assert result.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        # float32 against float64 over a few dozen sums.
        np.testing.assert_allclose(result.gradients[name], gradient, rtol=1e-4, atol=1e-6)


def test_prediction_gives_logits_and_features(package: TinyPackage) -> None:
    adapter, batch = package.adapter(), package.batch()
    result = _open(package).predict(adapter, batch, INPUTS)
    features = package.features(adapter, batch)
    np.testing.assert_allclose(result.features, features, rtol=1e-4, atol=1e-5)
    assert result.logits.shape == (2, 3)


def test_scale_of_zero_switches_lora_off(package: TinyPackage) -> None:
    engine, batch = _open(package), package.batch()
    adapter = package.adapter()
    without = {**adapter, B: np.zeros_like(adapter[B])}
    off = engine.predict(adapter, batch, {"lora_scale": 0.0})
    np.testing.assert_array_equal(off.logits, engine.predict(without, batch, INPUTS).logits)


def test_training_and_prediction_take_turns(package: TinyPackage) -> None:
    engine, adapter, batch = _open(package), package.adapter(), package.batch()
    first = engine.gradients(adapter, batch, INPUTS)
    engine.predict(adapter, batch, INPUTS)
    again = engine.gradients(adapter, batch, INPUTS)
    assert again.loss == first.loss
    for name, gradient in first.gradients.items():
        np.testing.assert_array_equal(again.gradients[name], gradient)


def test_probe_that_agrees_goes_unnoticed(package: TinyPackage) -> None:
    package = package.with_probe()
    adapter, batch = package.adapter(), package.batch()
    result = _open(package).gradients(adapter, batch, INPUTS)
    assert result.loss == pytest.approx(package.reference(adapter, batch).loss, rel=1e-5)


def test_probe_that_disagrees_stops_training_and_names_the_tensor(package: TinyPackage) -> None:
    package = package.with_probe(error=0.005)
    engine, adapter, batch = _open(package), package.adapter(), package.batch()
    for _ in range(2):
        with pytest.raises(EngineDisagreesError, match=rf"gradient of {B} is off by 4\.98e-03"):
            engine.gradients(adapter, batch, INPUTS)


@pytest.mark.parametrize(("is_whole", "sizes"), [(False, [1, 1]), (True, [2])])
def test_probe_takes_an_example_at_a_time(
    package: TinyPackage, is_whole: bool, sizes: list[int]
) -> None:
    engine, manifest = _open(package), package.with_probe().manifest
    assert manifest.probe is not None
    probe = parse_probe((package.folder / manifest.probe.digest).read_bytes())
    seen = []

    def run(adapter: Tensors, batch: Batch, inputs: Mapping[str, float]) -> Gradients:
        seen.append(len(batch.labels))
        return engine.gradients(adapter, batch, inputs)

    check_probe(probe, run, is_whole=is_whole)

    assert seen == sizes


def test_adapter_of_another_shape_is_named(package: TinyPackage) -> None:
    adapter = {**package.adapter(4), B: np.zeros((HIDDEN, 3), np.float32)}
    with pytest.raises(PackageError, match=rf"{B} has shape \(7, 3\).*with rank 4"):
        _open(package).gradients(adapter, package.batch(), INPUTS)


def test_input_that_nobody_gives_is_named(package: TinyPackage) -> None:
    with pytest.raises(PackageError, match="input 'lora_scale'"):
        _open(package).gradients(package.adapter(), package.batch(), {})


def test_token_outside_the_vocabulary_is_an_error_not_a_crash(package: TinyPackage) -> None:
    batch = package.batch()
    batch.inputs["input_ids"][0, 0] = 10**6
    with pytest.raises(PackageError, match="running graph 'train'"):
        _open(package).gradients(package.adapter(), batch, INPUTS)


def test_missing_blob_is_named(package: TinyPackage) -> None:
    digest = package.manifest.weight_blobs[0].digest
    (package.folder / digest).unlink()
    with pytest.raises(PackageError, match=f"{digest} of the package is missing"):
        _open(package)


def test_truncated_weights_are_named(package: TinyPackage) -> None:
    blob = package.manifest.weight_blobs[0]
    with (package.folder / blob.digest).open("r+b") as file:
        file.truncate(blob.size - 1)
    with pytest.raises(PackageError, match=f"{blob.digest}.* has {blob.size - 1} bytes"):
        _open(package)


def _with_graph(package: TinyPackage, **changes: object) -> TinyPackage:
    train, predict = package.manifest.graphs
    graphs = (dataclasses.replace(train, **changes), predict)  # type: ignore[arg-type]
    manifest: Manifest = dataclasses.replace(package.manifest, graphs=graphs)
    return dataclasses.replace(package, manifest=manifest)


def _train(package: TinyPackage) -> None:
    _open(package).gradients(package.adapter(), package.batch(), INPUTS)


def test_graph_that_is_none_is_refused(package: TinyPackage) -> None:
    blob = put(package.folder, b"no graph at all")
    with pytest.raises(PackageError, match=f"opening graph {blob.digest}"):
        _train(_with_graph(package, blob=blob))


def test_graph_of_a_newer_format_is_unsupported(package: TinyPackage) -> None:
    onnx = pytest.importorskip("onnx", reason="the graph is rewritten with onnx")
    path = package.folder / package.manifest.graphs[0].blob.digest
    model = onnx.load(path, load_external_data=False)
    model.ir_version = 999
    blob = put(package.folder, model.SerializeToString())
    with pytest.raises(UnsupportedPackageError, match=r"onnxruntime .* cannot run it"):
        _train(_with_graph(package, blob=blob))


def test_operator_that_the_runtime_lacks_is_unsupported(package: TinyPackage) -> None:
    onnx = pytest.importorskip("onnx", reason="the graph is rewritten with onnx")
    path = package.folder / package.manifest.graphs[0].blob.digest
    model = onnx.load(path, load_external_data=False)
    model.graph.node[-1].domain = "com.example"
    model.opset_import.add(domain="com.example", version=1)
    blob = put(package.folder, model.SerializeToString())
    with pytest.raises(UnsupportedPackageError, match="cannot run it"):
        _train(_with_graph(package, blob=blob))


def test_graph_with_other_inputs_than_the_manifest_says_is_refused(package: TinyPackage) -> None:
    inputs = tuple(name for name in package.manifest.graphs[0].inputs if name != A)
    with pytest.raises(PackageError, match=f"disagree on inputs: {A}"):
        _train(_with_graph(package, inputs=inputs))


def test_package_without_a_graph_to_train_is_unsupported(package: TinyPackage) -> None:
    with pytest.raises(UnsupportedPackageError, match="no graph 'train'"):
        _train(_with_graph(package, name="other"))


_STARVE = """
import resource, sys
from pathlib import Path
import numpy as np
from lorikit.sdk._errors import OutOfMemoryError
from lorikit.sdk.engines import open_engine
from lorikit.sdk.engines.base import Batch
from tests.sdk.engines.tiny_package import build_tiny_package, INPUTS
package = build_tiny_package(Path(sys.argv[1]))
engine = open_engine("onnx", package.manifest, package.folder, threads=1)
engine.gradients(package.adapter(), package.batch(), INPUTS)
used = int(open("/proc/self/statm").read().split()[5]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_DATA, (used + 40_000_000, -1))
ids = np.zeros((64, 20_000), np.int64)
inputs = {"input_ids": ids, "attention_mask": ids + 1}
batch = Batch(inputs, np.zeros(64, np.int64), np.ones(64, np.float32))
try:
    engine.gradients(package.adapter(), batch, INPUTS)
except OutOfMemoryError as error:
    print("out of memory:", error)
    engine.gradients(package.adapter(), package.batch(), INPUTS)
    print("still works")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_running_out_of_memory_is_an_error_that_the_process_survives(tmp_path: Path) -> None:
    pytest.importorskip("onnx", reason="building a package needs onnx")
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", _STARVE, str(tmp_path)],
        capture_output=True, text=True, cwd=root, check=False,
    )  # fmt: skip
    assert "out of memory: running graph 'train'" in done.stdout, done.stderr
    assert "still works" in done.stdout, done.stderr
