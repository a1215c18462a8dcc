# SPDX-License-Identifier: Apache-2.0
"""Every malformed package is refused by every engine with an error of its own kind."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.sdk.engines.tiny_package import (
    HEAD,
    INPUTS,
    A,
    TinyPackage,
    build_tiny_package,
    put,
)

from lorikit.proto import manifest as manifests
from lorikit.proto.manifest import Manifest
from lorikit.proto.tensors import Bundle, pack, raw
from lorikit.sdk._blobs import BlobCache
from lorikit.sdk._errors import (
    DamagedBlobError,
    ForeignAdapterError,
    InvalidGraphError,
    MissingBlobError,
    PackageError,
    UnsupportedPackageError,
)
from lorikit.sdk._packages import read_adapter, read_manifest
from lorikit.sdk.engines import open_engine
from lorikit.sdk.engines.base import Engine

onnx = pytest.importorskip("onnx", reason="graphs are spoilt with onnx")


@pytest.fixture(params=["onnx", "torch"])
def engine_name(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    runtime = {"onnx": "onnxruntime", "torch": "torch"}[name]
    pytest.importorskip(runtime, reason=f"the {name} engine needs {runtime}")
    return name


@pytest.fixture
def package(tmp_path: Path) -> TinyPackage:
    return build_tiny_package(tmp_path)


def _open(name: str, package: TinyPackage) -> Engine:
    return open_engine(name, package.manifest, package.folder, threads=1)


def _train(name: str, package: TinyPackage) -> None:
    _open(name, package).gradients(package.adapter(), package.batch(), INPUTS)


def _with_train(package: TinyPackage, **changes: object) -> TinyPackage:
    train, *others = package.manifest.graphs
    graphs = (dataclasses.replace(train, **changes), *others)  # type: ignore[arg-type]
    manifest: Manifest = dataclasses.replace(package.manifest, graphs=graphs)
    return dataclasses.replace(package, manifest=manifest)


def _spoilt(package: TinyPackage, change: Callable[[Any], object]) -> TinyPackage:
    """The package with a training graph of its own, changed."""
    path = package.folder / package.manifest.graphs[0].blob.digest
    model = onnx.load(path, load_external_data=False)
    change(model)
    return _with_train(package, blob=put(package.folder, model.SerializeToString()))


def _place(model: Any, **facts: object) -> None:
    """Change where the weight ``embedding`` lies."""
    (tensor,) = (t for t in model.graph.initializer if t.name == "embedding")
    for entry in tensor.external_data:
        if entry.key in facts:
            entry.value = str(facts[entry.key])


def test_missing_blob(engine_name: str, package: TinyPackage) -> None:
    blob = package.manifest.weight_blobs[0]
    (package.folder / blob.digest).unlink()
    with pytest.raises(MissingBlobError, match=f"{blob.digest} of the package is missing"):
        _open(engine_name, package)


def test_truncated_weights(engine_name: str, package: TinyPackage) -> None:
    blob = package.manifest.weight_blobs[0]
    with (package.folder / blob.digest).open("r+b") as file:
        file.truncate(blob.size - 1)
    with pytest.raises(DamagedBlobError, match=f"has {blob.size - 1} bytes, not {blob.size}"):
        _open(engine_name, package)


def test_weights_of_another_digest(package: TinyPackage) -> None:
    blob = package.manifest.weight_blobs[0]
    path = package.folder / blob.digest
    spoilt = bytearray(path.read_bytes())
    spoilt[100] ^= 1
    path.write_bytes(spoilt)
    with pytest.raises(DamagedBlobError, match=f"{blob.digest} is missing or was damaged"):
        BlobCache(package.folder).read(blob)
    assert not path.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: _place(m, location="../../etc/passwd"), r"'../../etc/passwd', which is no blob"),
        (lambda m: _place(m, location="/etc/passwd"), "'/etc/passwd', which is no blob"),
        (lambda m: _place(m, location="a" * 64), "which is no blob of the package"),
        (lambda m: _place(m, offset=1 << 40), r"lies at bytes 1099511627776\.\."),
        (lambda m: _place(m, offset=-64), r"lies at bytes -64\.\."),
        (lambda m: _place(m, length=4), r"has 4 bytes .* needs 2400"),
        (lambda m: _place(m, offset="many"), "no whole numbers as place"),
    ],
)
def test_graph_that_reads_outside_its_blobs(
    engine_name: str, package: TinyPackage, change: Callable[[Any], object], message: str
) -> None:
    with pytest.raises(InvalidGraphError, match=message):
        _train(engine_name, _spoilt(package, change))


def _hide_in_a_constant(model: Any) -> None:
    tensor = onnx.TensorProto(name="hidden", data_type=1, dims=[1], data_location=1)
    tensor.external_data.add(key="location", value="/etc/passwd")
    model.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["hidden"], value=tensor))


def _hide_in_a_branch(model: Any) -> None:
    tensor = onnx.TensorProto(name="hidden", data_type=1, dims=[1], data_location=1)
    tensor.external_data.add(key="location", value="/etc/passwd")
    branch = onnx.helper.make_graph([], "branch", [], [], [tensor])
    model.graph.node.insert(
        0, onnx.helper.make_node("If", ["axis0"], ["y"], then_branch=branch, else_branch=branch)
    )


@pytest.mark.parametrize("change", [_hide_in_a_constant, _hide_in_a_branch])
def test_file_that_a_node_wants_to_read(
    package: TinyPackage, change: Callable[[Any], object]
) -> None:
    pytest.importorskip("onnxruntime", reason="the torch engine knows no such node at all")
    with pytest.raises(InvalidGraphError, match="'hidden' has external data but is no initializer"):
        _train("onnx", _spoilt(package, change))


@pytest.mark.parametrize("data", [b"no graph at all", b"", b"\x08\x08"])
def test_bytes_that_are_no_graph(engine_name: str, package: TinyPackage, data: bytes) -> None:
    blob = put(package.folder, data)
    with pytest.raises(InvalidGraphError, match=f"opening graph {blob.digest}"):
        _train(engine_name, _with_train(package, blob=blob))


def test_graph_whose_nodes_do_not_fit_together(engine_name: str, package: TinyPackage) -> None:
    def cut(model: Any) -> None:
        del model.graph.node[3]

    with pytest.raises(PackageError):
        _train(engine_name, _spoilt(package, cut))


@pytest.mark.parametrize("part", ["inputs", "outputs"])
def test_graph_that_is_not_what_the_manifest_says(
    engine_name: str, package: TinyPackage, part: str
) -> None:
    names = (*getattr(package.manifest.graphs[0], part), "more")
    with pytest.raises(InvalidGraphError, match=f"disagree on {part}: more"):
        _train(engine_name, _with_train(package, **{part: names}))


@pytest.mark.parametrize("what", ["ir_version", "opset"])
def test_graph_of_a_newer_format(engine_name: str, package: TinyPackage, what: str) -> None:
    def change(model: Any) -> None:
        if what == "opset":
            model.opset_import[0].version = 999
        else:
            model.ir_version = 999

    with pytest.raises(UnsupportedPackageError):
        _train(engine_name, _spoilt(package, change))


def test_graph_with_an_operator_of_the_future(engine_name: str, package: TinyPackage) -> None:
    def change(model: Any) -> None:
        model.graph.node[0].op_type = "CastBetter"

    with pytest.raises(UnsupportedPackageError, match="CastBetter"):
        _train(engine_name, _spoilt(package, change))


def test_graph_that_needs_a_newer_runtime_names_both_releases(package: TinyPackage) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="the release is onnxruntime's")
    with pytest.raises(
        UnsupportedPackageError,
        match=rf"graph 'train' needs onnxruntime 99\.1 or newer, here is {onnxruntime.__version__}",
    ):
        _train("onnx", _with_train(package, minimum_runtime="99.1"))


@pytest.mark.parametrize("release", ["1.20", "1.20.0", "1", ""])
def test_graph_that_needs_an_older_runtime_runs(package: TinyPackage, release: str) -> None:
    pytest.importorskip("onnxruntime", reason="the release is onnxruntime's")
    _train("onnx", _with_train(package, minimum_runtime=release))


@pytest.mark.parametrize("prepack", [False, True])
def test_weights_are_prepacked_only_where_the_manifest_says(
    package: TinyPackage, prepack: bool
) -> None:
    pytest.importorskip("onnxruntime", reason="pre-packing is onnxruntime's")
    from lorikit.sdk.engines._runtime import _open_session

    graph = package.manifest.graphs[0]
    session = _open_session(package.folder / graph.blob.digest, 1, prepack)
    options = session.get_session_options()
    disabled = options.get_session_config_entry("session.disable_prepacking")
    assert disabled == ("0" if prepack else "1")


def test_package_of_a_newer_format(package: TinyPackage) -> None:
    data = manifests.dump(package.manifest).replace(b'"format":1', b'"format":2')
    blob = put(package.folder, data)
    with pytest.raises(UnsupportedPackageError, match="manifest format 2 is not 1; update"):
        read_manifest(BlobCache(package.folder), blob)


@pytest.mark.parametrize(("name", "shape"), [("bert.layer.0.lora_A.weight", (4, 12)), (HEAD, None)])
def test_adapter_of_another_model(
    package: TinyPackage, name: str, shape: tuple[int, ...] | None
) -> None:
    adapter = package.adapter()
    if shape is None:
        del adapter[name]
    else:
        adapter[name] = np.zeros(shape, np.float32)
    blob = put(package.folder, pack(Bundle({n: raw(v) for n, v in adapter.items()})))
    with pytest.raises(ForeignAdapterError, match=name):
        read_adapter(BlobCache(package.folder), blob, package.manifest)


def test_adapter_of_another_width(engine_name: str, package: TinyPackage) -> None:
    adapter = {**package.adapter(), A: np.zeros((4, 13), np.float32)}
    with pytest.raises(ForeignAdapterError, match=rf"{A} has shape \(4, 13\), the package needs"):
        _open(engine_name, package).gradients(adapter, package.batch(), INPUTS)


def test_token_outside_the_vocabulary(engine_name: str, package: TinyPackage) -> None:
    batch = package.batch()
    batch.inputs["input_ids"][0, 0] = 10**6
    engine = _open(engine_name, package)
    with pytest.raises(PackageError, match="running graph 'train'"):
        engine.gradients(package.adapter(), batch, INPUTS)
    engine.gradients(package.adapter(), package.batch(), INPUTS)
