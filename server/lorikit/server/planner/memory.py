# SPDX-License-Identifier: Apache-2.0
"""Peak resident memory of a device process, part by part.

The constants are of measured device processes (Linux x86-64, onnxruntime 1.31, 2 threads);
``docs/memory.md`` has the comparison. Everything that depends on the model comes from its graph.
"""

from __future__ import annotations

from dataclasses import dataclass

RUNTIME_BYTES = 34_000_000
"""The runtime's library and heap, a session without nodes, and the pages of libraries that training
reads again after the device let go of them: 28 MB where the libraries' files have long been in use,
38 MB in a fresh installation, whose file cache maps them in larger pieces."""

NODE_BYTES = 5_000
"""Anonymous bytes an onnxruntime session holds per node."""

ADAPTER_COPIES = 4
"""Copies of the whole adapter in float32: received, in training, journalled, sent."""

TRAINED_COPIES = 5
"""Copies of the trained part: gradient of the micro-batch, its sum, two moments, an update."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Where the peak of a device process goes, in bytes."""

    app_bytes: int
    """Resident before training: the app, interpreter and SDK."""
    runtime_bytes: int
    """The runtime's library and heap, and the session's nodes."""
    mapped_bytes: int
    """Weights in mapped files; the system may drop these pages and read them again."""
    packed_bytes: int
    """Second copies of weights that fast kernels keep; anonymous."""
    adapter_bytes: int
    """Adapter, gradients and optimiser."""
    activation_bytes: int
    """Values of a micro-batch in the runtime's arena, with what the arena wastes."""
    workspace_bytes: int
    """The part of the arena's peak that are weights de-quantised for one use."""

    @property
    def total_bytes(self) -> int:
        """Predicted peak of the process."""
        return (
            self.app_bytes
            + self.runtime_bytes
            + self.mapped_bytes
            + self.packed_bytes
            + self.adapter_bytes
            + self.activation_bytes
            + self.workspace_bytes
        )

    @property
    def anonymous_bytes(self) -> int:
        """The part of training that no file backs."""
        return self.total_bytes - self.app_bytes - self.mapped_bytes


def footprint(
    *,
    baseline_bytes: int,
    node_count: int,
    weight_bytes: int,
    packed_bytes: int,
    adapter_elements: int,
    trained_elements: int,
    arena_bytes: int,
    workspace_bytes: int,
) -> Footprint:
    """Predicted peak of a device process, part by part.

    Args:
        baseline_bytes: Resident memory of the app before the runtime is loaded.
        node_count: Nodes of the training graph.
        weight_bytes: Bytes of the blobs that a step reads.
        packed_bytes: Bytes of second copies of weights.
        adapter_elements: Numbers in the adapter.
        trained_elements: Numbers in the part of it that trains.
        arena_bytes: What the runtime's arena makes resident; see ``compile.arena``.
        workspace_bytes: De-quantised weights at the peak, a part of ``arena_bytes``.
    """
    return Footprint(
        app_bytes=baseline_bytes,
        runtime_bytes=RUNTIME_BYTES + NODE_BYTES * node_count,
        mapped_bytes=weight_bytes,
        packed_bytes=packed_bytes,
        adapter_bytes=4 * (ADAPTER_COPIES * adapter_elements + TRAINED_COPIES * trained_elements),
        activation_bytes=arena_bytes - workspace_bytes,
        workspace_bytes=workspace_bytes,
    )
