# SPDX-License-Identifier: Apache-2.0
"""Peak resident memory of a device process, from what its graph needs."""

from __future__ import annotations

NODE_BYTES = 6_000
"""Anonymous bytes an onnxruntime session holds per node; measured over graphs of 300 to 3,000
nodes."""

SESSION_BYTES = 6 << 20
"""Anonymous bytes of a session beside its nodes: arena, threads, allocator slack."""

ADAPTER_COPIES = 3
"""Copies of the whole adapter in float32: received, in training, journalled or sent."""

TRAINED_COPIES = 4
"""Copies of the trained part: gradient of the micro-batch, its sum, two moments."""

ARENA_SLACK = 1.25
"""Held by the arena over the sum of live values; measured over batches and lengths."""


def process_peak(
    *,
    baseline_bytes: int,
    node_count: int,
    weight_bytes: int,
    adapter_elements: int,
    trained_elements: int,
    live_bytes: int,
) -> int:
    """Predicted peak resident bytes: baseline, session, mapped weights, adapter, live values."""
    session = SESSION_BYTES + NODE_BYTES * node_count
    adapter = 4 * (ADAPTER_COPIES * adapter_elements + TRAINED_COPIES * trained_elements)
    return int(baseline_bytes + session + weight_bytes + adapter + ARENA_SLACK * live_bytes)
