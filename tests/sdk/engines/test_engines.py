# SPDX-License-Identifier: Apache-2.0
"""Which engines there are, and what is said about those that are not."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from tests.sdk.engines.tiny_package import build_tiny_package

from lorikit.proto.device import EngineInfo
from lorikit.sdk import engines
from lorikit.sdk._errors import EngineUnavailableError
from lorikit.sdk.engines import available_engines, open_engine


def _installed(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    """Have the interpreter's list of distributions hold just these runtimes."""
    real = metadata.version

    def version(name: str) -> str:
        if name.startswith(("onnxruntime", "torch")):
            if name.replace("-", "_") not in versions:
                raise metadata.PackageNotFoundError(name)
            return versions[name.replace("-", "_")]
        return real(name)

    monkeypatch.setattr(metadata, "version", version)


def test_runtimes_are_told_apart_by_their_distributions(monkeypatch: pytest.MonkeyPatch) -> None:
    _installed(monkeypatch, onnxruntime_training_cpu="1.19.2")
    assert available_engines() == (EngineInfo(name="onnx-training", version="1.19.2"),)
    _installed(monkeypatch, onnxruntime="1.31.1")
    assert available_engines() == (EngineInfo(name="onnx", version="1.31.1"),)
    _installed(monkeypatch, torch="2.13.0+cu130", onnxruntime="1.31.1")
    assert [engine.name for engine in available_engines()] == ["onnx", "torch"]


def test_runtime_that_is_too_old_is_not_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    _installed(monkeypatch, onnxruntime="1.19.2")
    assert available_engines() == ()


@pytest.mark.parametrize(
    ("name", "versions", "message"),
    [
        ("onnx", {}, r'not installed: pip install "lorikit\[onnx\]"$'),
        (None, {}, r'not installed: pip install "lorikit\[onnx\]"$'),
        ("onnx-training", {}, r'not installed: pip install "lorikit\[onnx-training\]"$'),
        (
            "onnx",
            {"onnxruntime": "1.19.9"},
            r"needs onnxruntime 1\.20 or newer, found 1\.19\.9: pip install",
        ),
        ("torch", {}, r'not installed: pip install "lorikit\[torch\]"$'),
        ("torch", {"torch": "2.8.0"}, r"needs torch 2\.9 or newer, found 2\.8\.0: pip install"),
        ("tensorflow", {}, "no engine 'tensorflow'; there are: onnx-training, onnx, torch"),
    ],
)
def test_engine_that_cannot_be_had_names_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    name: str | None,
    versions: dict[str, str],
    message: str,
) -> None:
    package = build_tiny_package(tmp_path)
    _installed(monkeypatch, **versions)
    with pytest.raises(EngineUnavailableError, match=message):
        open_engine(name, package.manifest, tmp_path, threads=1)


def test_looking_for_engines_loads_none() -> None:
    code = (
        "import sys; from lorikit.sdk.engines import available_engines; available_engines();"
        "print([m for m in ('onnxruntime', 'torch', 'tokenizers', 'onnx') if m in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    assert output.strip() == b"[]"


def test_fewer_than_one_thread_is_refused(tmp_path: Path) -> None:
    package = build_tiny_package(tmp_path)
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        open_engine("onnx", package.manifest, tmp_path, threads=0)


def test_every_engine_has_a_module_of_its_own() -> None:
    folder = Path(engines.__file__).parent
    for kind in engines._ENGINES.values():
        assert (folder / f"{kind.module.rpartition('.')[2]}.py").is_file()


def test_loading_the_training_build_never_tries_its_torch_front_end(tmp_path: Path) -> None:
    """A package named like the build stands in for it: its import only records the attempt."""
    stand_in = tmp_path / "onnxruntime"
    (stand_in / "training").mkdir(parents=True)
    (stand_in / "training" / "__init__.py").write_text("raise SystemExit('torch front end')")
    (stand_in / "__init__.py").write_text(
        "try:\n    import onnxruntime.training\nexcept ImportError:\n    pass\n"
    )
    code = (
        "import sys; import lorikit.sdk.engines.onnx_training;"
        "print('onnxruntime.training' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout == "False\n", done.stderr
