# SPDX-License-Identifier: Apache-2.0
"""Regenerate the wire code beside its .proto sources.

Run it with the pinned tools: ``pip install --group protos`` in an environment of its own.
With ``--check`` nothing stays changed: exit code 1 says that the checked-in code is stale.
With ``--release`` the descriptors are written as the released ones, which a test holds later
versions to; done once per release, in its commit.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent / "proto"
SOURCES = sorted((ROOT / "lorikit/proto/v1").glob("*.proto"))
RELEASED = ROOT.parent / "tests/proto/released/v1.binpb"
WELL_KNOWN = Path(grpc_tools.__file__).parent / "_proto"


def generate(target: Path) -> None:
    """Write messages for all files and stubs for the services under ``target``."""
    names = [str(source) for source in SOURCES]
    services = [name for name in names if name.endswith("_service.proto")]
    messages = [f"--python_out={target}", f"--mypy_out=quiet:{target}"]
    stubs = [f"--grpc_python_out={target}", f"--mypy_grpc_out=quiet:{target}"]
    for arguments in ([*messages, *names], [*stubs, *services]):
        run_protoc(arguments)


def run_protoc(arguments: list[str]) -> None:
    """Run the compiler, with our sources and the well-known types in its path."""
    if protoc.main(["protoc", f"-I{ROOT}", f"-I{WELL_KNOWN}", *arguments]) != 0:
        raise SystemExit("protoc failed; its message stands above")


def write_release() -> None:
    """Write the descriptors of all files as those of the last release."""
    RELEASED.parent.mkdir(parents=True, exist_ok=True)
    run_protoc([f"--descriptor_set_out={RELEASED}", *(str(source) for source in SOURCES)])


def stale_files(fresh: Path) -> list[str]:
    """Names of the generated files that differ from the checked-in ones."""
    here = {p.relative_to(ROOT): p for p in (ROOT / "lorikit/proto/v1").glob("*_pb2*")}
    there = {p.relative_to(fresh): p for p in fresh.rglob("*_pb2*")}
    return [
        str(name)
        for name in sorted(here.keys() | there.keys())
        if name not in here
        or name not in there
        or here[name].read_bytes() != there[name].read_bytes()
    ]


def main() -> None:
    """Regenerate in place, compare with ``--check``, or release with ``--release``."""
    if sys.argv[1:] == ["--check"]:
        with tempfile.TemporaryDirectory() as folder:
            generate(Path(folder))
            stale = stale_files(Path(folder))
        if stale:
            raise SystemExit(f"stale generated files, run scripts/generate_protos.py: {stale}")
        print("generated wire code is up to date")
    elif sys.argv[1:] == ["--release"]:
        write_release()
    elif sys.argv[1:]:
        raise SystemExit("usage: generate_protos.py [--check | --release]")
    else:
        generate(ROOT)


if __name__ == "__main__":
    main()
