# SPDX-License-Identifier: Apache-2.0
"""Peak resident memory of a device process, from what its graph needs.

The constants were fitted to measured device processes (MiniLM; nf4, int8, fp16 and fp32;
micro-batches of 1 to 8; 32 and 128 tokens; ranks 1 to 16; Linux x86-64, onnxruntime 1.31);
``docs/memory.md`` has the comparison.
"""

from __future__ import annotations

RUNTIME_BYTES = 51_000_000
"""The runtime's library and heap, the tokeniser and a session without nodes."""

NODE_BYTES = 6_000
"""Anonymous bytes an onnxruntime session holds per node."""

ADAPTER_COPIES = 3
"""Copies of the whole adapter in float32: received, in training, journalled or sent."""

TRAINED_COPIES = 4
"""Copies of the trained part: gradient of the micro-batch, its sum, two moments."""

ARENA_SHARE = 0.72
"""Resident bytes per byte of live values: the runtime writes in place more often than the analysis
assumes."""


def process_peak(
    *,
    baseline_bytes: int,
    node_count: int,
    weight_bytes: int,
    adapter_elements: int,
    trained_elements: int,
    live_bytes: int,
) -> int:
    """Predicted peak resident bytes: app, runtime, mapped weights, adapter, live values.

    Args:
        baseline_bytes: Resident memory of the app before the runtime is loaded.
        node_count: Nodes of the training graph.
        weight_bytes: Bytes of the blobs that a step reads.
        adapter_elements: Numbers in the adapter.
        trained_elements: Numbers in the part of it that trains.
        live_bytes: Peak of the live values of one micro-batch.
    """
    runtime = RUNTIME_BYTES + NODE_BYTES * node_count
    adapter = 4 * (ADAPTER_COPIES * adapter_elements + TRAINED_COPIES * trained_elements)
    return int(baseline_bytes + runtime + weight_bytes + adapter + ARENA_SHARE * live_bytes)
