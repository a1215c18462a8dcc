# SPDX-License-Identifier: Apache-2.0
"""What is installed: one namespace, a light device side, and a wheel with all it needs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import lorikit

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("proto", "quantization", "sdk", "server")
HEAVY = (
    "bitsandbytes", "onnx", "onnxruntime", "optimum", "peft", "rich", "sqlalchemy", "torch",
    "transformers", "typer",
)  # fmt: skip
"""What a device must not load by importing the SDK; an engine's runtime comes with the engine."""

CLEAN_ROOM = """
import json, sys
import lorikit, lorikit.sdk, lorikit.sdk.engines
print(json.dumps({
    "engines": [engine.name for engine in lorikit.sdk.engines.available_engines()],
    "modules": sorted(sys.modules),
    "origin": lorikit.sdk.__file__,
    "namespace": lorikit.__file__,
}))
"""


def run_python(python: str | Path, program: str, *, folder: Path) -> str:
    """Output of a program in a fresh interpreter, away from the checkout."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [python, "-c", program], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_lorikit_is_a_namespace_without_a_file() -> None:
    assert lorikit.__file__ is None


@pytest.mark.parametrize("part", PARTS)
def test_no_source_root_holds_an_init_file_that_would_hide_the_others(part: str) -> None:
    if not (ROOT / part).is_dir():
        pytest.skip("no checkout here: the installed package is tested alone")

    assert not (ROOT / part / "lorikit/__init__.py").exists()


@pytest.mark.parametrize("module", ["lorikit.sdk", "lorikit.proto", "lorikit.quantization"])
def test_importing_the_device_side_loads_nothing_heavy(module: str, tmp_path: Path) -> None:
    loaded = json.loads(
        run_python(
            sys.executable,
            f"import json, sys, {module}; print(json.dumps(sorted(sys.modules)))",
            folder=tmp_path,
        )
    )

    assert module in loaded
    assert set(loaded).isdisjoint(HEAVY)
    assert not any(name.startswith("lorikit.server") for name in loaded)


def test_public_names_of_the_sdk_are_sorted_and_all_that_a_user_sees() -> None:
    sdk = importlib.import_module("lorikit.sdk")
    visible = {
        name
        for name, value in vars(sdk).items()
        if not name.startswith("_") and getattr(value, "__module__", "").startswith("lorikit.")
    }

    assert list(sdk.__all__) == sorted(sdk.__all__)
    assert set(sdk.__all__) == visible


def all_needed(*wanted: str) -> set[str]:
    """Names of all distributions that the requirements bring to this interpreter."""
    waiting = [(Requirement(line), "") for line in wanted]
    seen: set[tuple[str, str]] = set()
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        for own_extra in ("", *requirement.extras):
            key = canonicalize_name(requirement.name), own_extra
            if key not in seen:
                seen.add(key)
                lines = importlib.metadata.requires(requirement.name) or ()
                waiting += [(Requirement(line), own_extra) for line in lines]
    return {name for name, _ in seen}


def test_constraints_pin_everything_that_is_installed() -> None:
    if not (ROOT / "constraints.txt").is_file() or importlib.util.find_spec("torch") is None:
        pytest.skip("needs a checkout, and lorikit[server] installed")
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    lines = [line.partition("#")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()]
    pins: dict[str, str] = {
        canonicalize_name(name): version
        for name, _, version in (line.strip().partition("==") for line in lines if line.strip())
    }

    needed = all_needed("lorikit[server,onnx,text]", *groups["build"], *groups["lint"])
    needed |= all_needed(*groups["test"])

    # torch itself pins what its build for CUDA brings along
    ours = {name for name in needed if not name.startswith(("cuda-", "nvidia-", "triton"))}
    found: dict[str, str] = {
        name: Version(importlib.metadata.version(name)).public for name in ours - {"lorikit"}
    }
    assert {name: pins.get(name) for name in found} == found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from this checkout with the installed build back end."""
    if not (ROOT / "pyproject.toml").is_file():
        pytest.skip("no checkout to build a wheel from")
    pytest.importorskip("hatchling", reason="needs hatchling: pip install --group dev")
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (built,) = folder.glob("lorikit-*.whl")
    return built


def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def tracked(*patterns: str) -> list[Path]:
    """Files of the checkout that git knows, by pattern."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs git and a clone, to know which files belong to the project")
    listed = subprocess.run(
        ["git", "ls-files", "-z", *patterns], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    return [Path(name) for name in listed.split("\0") if name and (ROOT / name).is_file()]


def test_wheel_holds_every_file_of_the_four_parts(wheel: Path) -> None:
    expected = {str(path.relative_to(path.parts[0])) for path in tracked(*PARTS)}

    assert expected <= contents(wheel)


@pytest.mark.parametrize("part", PARTS)
def test_wheel_marks_every_part_as_typed(wheel: Path, part: str) -> None:
    assert f"lorikit/{part}/py.typed" in contents(wheel)


@pytest.mark.parametrize(
    "file",
    [
        "lorikit/proto/v1/device_service.proto",
        "lorikit/proto/v1/device_service_pb2.py",
        "lorikit/proto/v1/device_service_pb2.pyi",
        "lorikit/proto/v1/device_service_pb2_grpc.py",
    ],
)
def test_wheel_holds_the_wire_code(wheel: Path, file: str) -> None:
    assert file in contents(wheel)


def test_wheel_holds_the_demo_data_and_its_licence(wheel: Path) -> None:
    folder = "lorikit/server/demo/clinc150"
    with zipfile.ZipFile(wheel) as archive:
        described = archive.read(f"{folder}/README.md").decode()

    assert {f"{folder}/train.jsonl.gz", f"{folder}/test.jsonl.gz"} <= contents(wheel)
    assert "CC BY 3.0" in described


def test_wheel_holds_nothing_but_lorikit(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in contents(wheel)}

    assert {top for top in tops if not top.endswith(".dist-info")} == {"lorikit"}
    assert not any("/test_" in name or "/tests/" in name for name in contents(wheel))
    assert "lorikit/__init__.py" not in contents(wheel)


@pytest.fixture(scope="module")
def clean_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Interpreter of a clean environment that holds the wheel with its extra ``onnx`` alone."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, with_pip=False)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    command += ["-c", str(ROOT / "constraints.txt"), f"lorikit[onnx] @ {wheel.as_uri()}"]
    installed = subprocess.run(command, capture_output=True, text=True)
    if installed.returncode != 0:
        if "CI" in os.environ or "ResolutionImpossible" in installed.stderr:
            pytest.fail(f"the wheel cannot be installed: {installed.stderr}")
        pytest.skip(f"needs the package index, which did not answer: {installed.stderr[-300:]}")
    return python


@pytest.mark.slow
def test_wheel_alone_imports_and_finds_its_engine(clean_python: Path, tmp_path: Path) -> None:
    found = json.loads(run_python(clean_python, CLEAN_ROOM, folder=tmp_path))

    assert found["engines"] == ["onnx"]
    assert found["namespace"] is None
    assert not Path(found["origin"]).is_relative_to(ROOT)
    assert set(found["modules"]).isdisjoint(HEAVY)


@pytest.mark.slow
def test_wheel_alone_installs_no_heavy_distribution(clean_python: Path, tmp_path: Path) -> None:
    program = (
        "import importlib.metadata as m, json;"
        "print(json.dumps([d.name.lower() for d in m.distributions()]))"
    )

    names = set(json.loads(run_python(clean_python, program, folder=tmp_path)))

    assert {"grpcio", "lorikit", "numpy", "onnxruntime", "protobuf"} <= names
    assert names.isdisjoint(set(HEAVY) - {"onnxruntime"})


@pytest.mark.slow
def test_server_command_without_its_extra_says_what_to_install(clean_python: Path) -> None:
    command = clean_python.with_name("lorikit" + clean_python.suffix)

    ended = subprocess.run([command, "run"], capture_output=True, text=True)

    assert ended.returncode != 0
    assert 'pip install "lorikit[server]"' in ended.stderr
