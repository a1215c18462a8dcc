# SPDX-License-Identifier: Apache-2.0
"""What the compiler must know of tasks and architectures that a graph does not say.

Adding an architecture means adding a row to ``ARCHITECTURES``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from lorikit.proto.manifest import Task
from lorikit.server.errors import UnsupportedModelError

TEXT_INPUTS = ("input_ids", "attention_mask")
IMAGE_INPUTS = ("pixel_values",)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskKind:
    """What a kind of task means for graphs."""

    auto_class: str
    """Class of transformers that loads a model folder for it."""
    inputs: tuple[str, ...] = TEXT_INPUTS
    """What the model reads."""
    labels_tokens: bool = False
    """Whether each token has a label, or each example."""
    trains_head: bool = True
    """Whether the last linear map is new with the task and trains; a vocabulary's stays frozen."""


SEQUENCE_CLASSIFICATION = "sequence-classification"
TOKEN_CLASSIFICATION = "token-classification"
MASKED_LANGUAGE_MODELING = "masked-language-modeling"
CAUSAL_LANGUAGE_MODELING = "causal-language-modeling"
IMAGE_CLASSIFICATION = "image-classification"

TASK_KINDS: dict[str, TaskKind] = {
    SEQUENCE_CLASSIFICATION: TaskKind(auto_class="AutoModelForSequenceClassification"),
    TOKEN_CLASSIFICATION: TaskKind(
        auto_class="AutoModelForTokenClassification", labels_tokens=True
    ),
    MASKED_LANGUAGE_MODELING: TaskKind(
        auto_class="AutoModelForMaskedLM", labels_tokens=True, trains_head=False
    ),
    CAUSAL_LANGUAGE_MODELING: TaskKind(
        auto_class="AutoModelForCausalLM", labels_tokens=True, trains_head=False
    ),
    IMAGE_CLASSIFICATION: TaskKind(
        auto_class="AutoModelForImageClassification", inputs=IMAGE_INPUTS
    ),
}
"""By ``Task.kind``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """One model type for one task."""

    class_name: str
    """Hugging Face class that transformers builds for the task."""
    layers: str
    """Module path of the list of layers."""
    head: str
    """Module path of the last linear map."""
    targets: tuple[str, ...]
    """Linear modules that get an adapter where none are named."""
    new_modules: tuple[str, ...] = ()
    """Other modules that are new with the task and train with the head."""

    def layer_of(self, module: str) -> int:
        """Layer a module path belongs to, or -1."""
        match = re.match(re.escape(self.layers) + r"\.(\d+)(\.|$)", module)
        return int(match.group(1)) if match else -1

    def in_layer(self, name: str, layer: int) -> str:
        """The same name in another layer."""
        return re.sub(rf"^({re.escape(self.layers)})\.\d+(?=\.|$)", rf"\1.{layer}", name)


_BERT = ("query", "value")
_LLAMA = ("q_proj", "v_proj")
_DISTILBERT = ("q_lin", "v_lin")
_DEBERTA = ("in_proj",)
_DEBERTA_V2 = ("query_proj", "value_proj")


def _row(
    class_name: str, layers: str, head: str, targets: tuple[str, ...], *new_modules: str
) -> Architecture:
    return Architecture(
        class_name=class_name, layers=layers, head=head, targets=targets, new_modules=new_modules
    )


ARCHITECTURES: dict[tuple[str, str], Architecture] = {
    ("bert", SEQUENCE_CLASSIFICATION): _row(
        "BertForSequenceClassification", "bert.encoder.layer", "classifier", _BERT
    ),
    ("bert", TOKEN_CLASSIFICATION): _row(
        "BertForTokenClassification", "bert.encoder.layer", "classifier", _BERT
    ),
    ("bert", MASKED_LANGUAGE_MODELING): _row(
        "BertForMaskedLM", "bert.encoder.layer", "cls.predictions.decoder", _BERT
    ),
    ("roberta", SEQUENCE_CLASSIFICATION): _row(
        "RobertaForSequenceClassification",
        "roberta.encoder.layer",
        "classifier.out_proj",
        _BERT,
        "classifier.dense",
    ),
    ("roberta", TOKEN_CLASSIFICATION): _row(
        "RobertaForTokenClassification", "roberta.encoder.layer", "classifier", _BERT
    ),
    ("roberta", MASKED_LANGUAGE_MODELING): _row(
        "RobertaForMaskedLM", "roberta.encoder.layer", "lm_head.decoder", _BERT
    ),
    ("distilbert", SEQUENCE_CLASSIFICATION): _row(
        "DistilBertForSequenceClassification",
        "distilbert.transformer.layer",
        "classifier",
        _DISTILBERT,
        "pre_classifier",
    ),
    ("distilbert", TOKEN_CLASSIFICATION): _row(
        "DistilBertForTokenClassification",
        "distilbert.transformer.layer",
        "classifier",
        _DISTILBERT,
    ),
    ("distilbert", MASKED_LANGUAGE_MODELING): _row(
        "DistilBertForMaskedLM", "distilbert.transformer.layer", "vocab_projector", _DISTILBERT
    ),
    ("deberta", SEQUENCE_CLASSIFICATION): _row(
        "DebertaForSequenceClassification",
        "deberta.encoder.layer",
        "classifier",
        _DEBERTA,
        "pooler.dense",
    ),
    ("deberta-v2", SEQUENCE_CLASSIFICATION): _row(
        "DebertaV2ForSequenceClassification",
        "deberta.encoder.layer",
        "classifier",
        _DEBERTA_V2,
        "pooler.dense",
    ),
    ("deberta-v2", TOKEN_CLASSIFICATION): _row(
        "DebertaV2ForTokenClassification", "deberta.encoder.layer", "classifier", _DEBERTA_V2
    ),
    ("llama", CAUSAL_LANGUAGE_MODELING): _row(
        "LlamaForCausalLM", "model.layers", "lm_head", _LLAMA
    ),
    ("qwen2", CAUSAL_LANGUAGE_MODELING): _row(
        "Qwen2ForCausalLM", "model.layers", "lm_head", _LLAMA
    ),
    ("vit", IMAGE_CLASSIFICATION): _row(
        "ViTForImageClassification", "vit.layers", "classifier", _LLAMA
    ),
    ("mobilenet_v2", IMAGE_CLASSIFICATION): _row(
        "MobileNetV2ForImageClassification", "mobilenet_v2.layer", "classifier", ()
    ),
}
"""By (``model_type`` of the configuration, kind of task)."""


def kind_of(task: Task) -> TaskKind:
    """The row of a task; ``UnsupportedModelError`` lists what there is."""
    found = TASK_KINDS.get(task.kind)
    if found is None:
        raise UnsupportedModelError(
            f"task {task.kind!r} is not supported; known are {', '.join(TASK_KINDS)}"
        )
    return found


def architecture_of(config: object, task: Task) -> Architecture:
    """The row for a configuration and a task; ``UnsupportedModelError`` lists what there is."""
    model_type = str(getattr(config, "model_type", "unknown"))
    found = ARCHITECTURES.get((model_type, task.kind))
    if found is None:
        known = ", ".join(sorted({model for model, kind in ARCHITECTURES if kind == task.kind}))
        raise UnsupportedModelError(
            f"model type {model_type!r} for task {task.kind!r} is not supported (known: {known}); "
            "a row in compile/architectures.py with its layer list and head would be needed"
        )
    return found
