# SPDX-License-Identifier: Apache-2.0
"""The ``torch`` engine: the package's own graphs on CUDA, or on a CPU, node by node.

A graph already holds its backward pass, so neither autograd nor transformers is needed. Weights
stay in the form they are stored in; on CUDA bitsandbytes' kernels read the 4-bit ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.backends import cudnn

from lorikit.proto.manifest import Graph, Manifest
from lorikit.proto.tensors import Array
from lorikit.sdk._errors import LorikitError, OutOfMemoryError, PackageError
from lorikit.sdk.engines._package import PackageEngine, Session
from lorikit.sdk.engines._torch.program import Program, load_program
from lorikit.sdk.engines.base import Engine

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory")


def open_package(
    manifest: Manifest, folder: Path, *, threads: int, device: str | None = None
) -> Engine:
    """Open a package with torch; see ``engines.open_engine``.

    Args:
        manifest: The package.
        folder: Flat folder that holds its blobs, each named by its digest.
        threads: Processor threads to use; torch has one number of them for the whole process.
        device: ``cuda`` or ``cpu``; None for CUDA where there is a device.

    Raises:
        PackageError: A blob is missing or has another size.
    """
    torch.set_num_threads(threads)
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    blobs = {blob.digest: blob.size for blob in manifest.weight_blobs}

    def open_graph(graph: Graph, path: Path) -> Session:
        with _translated(f"opening graph {path.name}"):
            return _TorchSession(load_program(path, blobs, chosen), graph.name)

    return PackageEngine(manifest, folder, runtime="torch", open_graph=open_graph)


class _TorchSession:
    """One graph in torch."""

    def __init__(self, program: Program, name: str) -> None:
        self._program = program
        self._name = name
        self.inputs = program.inputs
        self.outputs = program.outputs

    def run(self, outputs: Sequence[str], feeds: Mapping[str, Array]) -> Sequence[Array]:
        exact = cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
        with _translated(f"running graph {self._name!r}"), exact:
            return self._program.run(outputs, feeds)


@contextmanager
def _translated(action: str) -> Iterator[None]:
    """Raise the SDK's errors for torch's, which differ mostly by their text."""
    try:
        yield
    except LorikitError:
        raise
    except Exception as error:  # torch's errors share no other base
        text = " ".join(str(error).split())
        if isinstance(error, MemoryError) or any(sign in text.lower() for sign in _OUT_OF_MEMORY):
            raise OutOfMemoryError(
                f"{action}: torch could not get the memory it needs: {text:.200}"
            ) from error
        raise PackageError(f"{action}: {type(error).__name__}: {text:.300}") from error
