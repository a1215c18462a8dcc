# SPDX-License-Identifier: Apache-2.0
"""What the compiler must know of an architecture that its graph does not say.

Adding an architecture means adding a row to ``ARCHITECTURES``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from lorikit.proto.manifest import Task
from lorikit.server.errors import UnsupportedModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """One model type for one task."""

    class_name: str
    """Hugging Face class that transformers builds for the task."""
    layers: str
    """Module path of the list of layers."""
    head: str
    """Module path of the last linear map, the trained head."""
    layer_count_field: str = "num_hidden_layers"
    """Field of the configuration that counts the layers."""

    def layer_of(self, module: str) -> int:
        """Layer a module path belongs to, or -1."""
        match = re.match(re.escape(self.layers) + r"\.(\d+)(\.|$)", module)
        return int(match.group(1)) if match else -1

    def layer_count(self, config: object) -> int:
        """Number of layers in a model of this configuration."""
        return int(getattr(config, self.layer_count_field))


SEQUENCE_CLASSIFICATION = "sequence-classification"

ARCHITECTURES: dict[tuple[str, str], Architecture] = {
    ("bert", SEQUENCE_CLASSIFICATION): Architecture(
        class_name="BertForSequenceClassification",
        layers="bert.encoder.layer",
        head="classifier",
    ),
}
"""By (``model_type`` of the configuration, kind of task)."""


def architecture_of(config: object, task: Task) -> Architecture:
    """The row for a configuration and a task; ``UnsupportedModelError`` lists what there is."""
    model_type = str(getattr(config, "model_type", "unknown"))
    found = ARCHITECTURES.get((model_type, task.kind))
    if found is None:
        known = ", ".join(f"{model} for {kind}" for model, kind in ARCHITECTURES)
        raise UnsupportedModelError(
            f"model type {model_type!r} for task {task.kind!r} is not supported (known: {known}); "
            "a row in compile/architectures.py with its layer list and head would be needed"
        )
    return found
