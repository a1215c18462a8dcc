# SPDX-License-Identifier: Apache-2.0
"""Runs one graph once, in an interpreter that need not have anything but onnxruntime and numpy.

Usage: ``python run_graph.py GRAPH INPUTS.npz OUTPUTS.npz``. The server uses it to verify graphs of
a runtime that cannot be installed beside its own.
"""

from __future__ import annotations

import sys

import numpy as np
import onnxruntime


def main(graph: str, inputs: str, outputs: str) -> None:
    """Run ``graph`` on the arrays of ``inputs`` and write what it returns to ``outputs``."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    wanted = {port.name for port in session.get_inputs()}
    with np.load(inputs) as given:
        feeds = {name: given[name] for name in given.files if name in wanted}
    names = [output.name for output in session.get_outputs()]
    results = dict(zip(names, session.run(names, feeds), strict=True))
    arrays = {name: np.asarray(value) for name, value in results.items()}
    np.savez(outputs, **arrays)  # type: ignore[arg-type]  # numpy's stub forbids mappings


if __name__ == "__main__":
    main(*sys.argv[1:])
