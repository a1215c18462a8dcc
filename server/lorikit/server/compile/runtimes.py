# SPDX-License-Identifier: Apache-2.0
"""Which releases of onnxruntime have the operators of a graph."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lorikit.server.compile.graph import MICROSOFT, Graph, Node
from lorikit.server.errors import CompileError

OLDEST = "1.20"
"""Oldest release of stock onnxruntime that is supported at all."""

CONTRIB_SINCE: Mapping[str, str] = {
    "FusedMatMul": "1.20",
    "GatherBlockQuantized": "1.20",
    "MatMulBnb4": "1.20",
    "MatMulNBits": "1.20",
    "QuickGelu": "1.20",
    "RotaryEmbedding": "1.20",
}
"""Release that has an operator of ``com.microsoft`` on a CPU; ``OLDEST`` where that has it."""

BYTES_SINCE: Mapping[str, str] = {"GatherBlockQuantized": "1.22"}
"""Release since which an operator takes four-bit codes as uint8; before, as uint4 and int4 only."""


def minimum_runtime(graph: Graph) -> str:
    """Oldest release of stock onnxruntime that runs every operator of a graph.

    Standard operators are all there from ``OLDEST`` on, in the opset that we write.

    Raises:
        CompileError: A contrib operator of which the release is not known.
    """
    needed = {OLDEST} | {_since(graph, node) for node in graph.nodes if node.domain == MICROSOFT}
    return max(needed, key=_numbers)


def _since(graph: Graph, node: Node) -> str:
    if node.op not in CONTRIB_SINCE:
        raise CompileError(
            f"operator {node.op} ({MICROSOFT}): the onnxruntime release that has it is not known; "
            "a row in compile/runtimes.py would be needed, tested with that release"
        )
    data = graph.constants.get(node.inputs[0])
    if node.op in BYTES_SINCE and data is not None and data.dtype == np.uint8:
        return BYTES_SINCE[node.op]
    return CONTRIB_SINCE[node.op]


def _numbers(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in release.split("."))
