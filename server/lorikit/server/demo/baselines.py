# SPDX-License-Identifier: Apache-2.0
"""What the federation is compared with: the same model and data in one place, with torch + PEFT.

Run as a program, so that torch's memory and threads go when it ends:
``python -m lorikit.server.demo.baselines TASK.json`` prints the results as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lorikit.proto.manifest import Task
from lorikit.server.compile.architectures import architecture_of
from lorikit.server.demo.baseline_task import BaselineTask
from lorikit.server.methods.head_start import HeadStartConfig, head_from_means

Classes = npt.NDArray[np.int64]
Features = npt.NDArray[np.float32]

_READ_BATCH = 128
"""Texts per forward pass where nothing is trained."""


@dataclass(frozen=True, slots=True)
class LabelledTexts:
    """Texts with the numbers of their classes."""

    texts: tuple[str, ...]
    classes: Classes


class EncoderClassifier:
    """An encoder with a linear head, and its tokenizer."""

    def __init__(self, task: BaselineTask) -> None:
        """Loads the model in float32."""
        torch.manual_seed(task.seed)
        self.model = AutoModelForSequenceClassification.from_pretrained(
            task.model, num_labels=len(task.labels)
        )
        self._tokenizer = AutoTokenizer.from_pretrained(task.model)
        self._max_length = task.max_length

    def tokens(self, texts: Sequence[str]) -> Any:  # noqa: ANN401  # transformers' own type
        """A padded batch of token ids with its mask."""
        return self._tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=self._max_length,
            return_tensors="pt",
        )

    def features(self, texts: Sequence[str]) -> Features:
        """Inputs of the head for each text, float32 [texts, width]."""
        caught: list[torch.Tensor] = []
        handle = self.model.classifier.register_forward_pre_hook(
            lambda _module, inputs: caught.append(inputs[0])
        )
        self._logits_by_length(texts, caught)
        handle.remove()
        return self._in_order(texts, caught)

    def accuracy(self, data: LabelledTexts) -> float:
        """Share of texts whose largest logit is that of their class."""
        logits: list[torch.Tensor] = []
        self._logits_by_length(data.texts, logits, collect=True)
        guesses = self._in_order(data.texts, logits).argmax(axis=1)
        return float((guesses == data.classes).mean())

    def _logits_by_length(
        self, texts: Sequence[str], found: list[torch.Tensor], *, collect: bool = False
    ) -> None:
        self.model.eval()
        order = _by_length(texts)
        with torch.inference_mode():
            for start in range(0, len(order), _READ_BATCH):
                batch = [texts[index] for index in order[start : start + _READ_BATCH]]
                logits = self.model(**self.tokens(batch)).logits
                if collect:
                    found.append(logits)

    @staticmethod
    def _in_order(texts: Sequence[str], rows: Sequence[torch.Tensor]) -> Features:
        together = torch.cat(list(rows)).numpy()
        ordered = np.empty_like(together)
        ordered[_by_length(texts)] = together
        return ordered


def linear_probe(
    features: Features, classes: Classes, *, class_count: int, decay: float = 1e-4
) -> tuple[Features, Features]:
    """Weights [classes, width] and bias [classes] of a logistic regression on frozen features.

    Features are standardised for the fit, and the standardisation is folded into the result. Fitted
    by L-BFGS with l2 penalty ``decay`` on the weights.
    """
    mean, spread = features.mean(axis=0), features.std(axis=0) + 1e-6
    inputs = torch.from_numpy((features - mean) / spread)
    wanted = torch.from_numpy(classes)
    weights = torch.zeros(class_count, features.shape[1], requires_grad=True)
    bias = torch.zeros(class_count, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights, bias], max_iter=60, line_search_fn="strong_wolfe")

    def objective() -> torch.Tensor:
        optimizer.zero_grad()
        logits = inputs @ weights.T + bias
        loss = torch.nn.functional.cross_entropy(logits, wanted) + decay * (weights**2).sum()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return loss

    optimizer.step(objective)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    folded = weights.detach().numpy() / spread
    return folded.astype(np.float32), (bias.detach().numpy() - folded @ mean).astype(np.float32)


def probe_baseline(
    task: BaselineTask,
    encoder: EncoderClassifier,
    features: Features,
    train: LabelledTexts,
    test: LabelledTexts,
) -> dict[str, object]:
    """Accuracy of a linear head on the frozen encoder's features of the training texts."""
    start = time.perf_counter()
    weights, bias = linear_probe(features, train.classes, class_count=len(task.labels))
    guesses = (encoder.features(test.texts) @ weights.T + bias).argmax(axis=1)
    return {
        "name": "linear probe",
        "metric": float((guesses == test.classes).mean()),
        "examples": len(train.texts),
        "seconds": time.perf_counter() - start,
        "note": "logistic regression on the frozen features that the head sees, all data",
    }


def centralised_baseline(
    task: BaselineTask,
    encoder: EncoderClassifier,
    features: Features,
    train: LabelledTexts,
    test: LabelledTexts,
) -> dict[str, object]:
    """Accuracy of LoRA trained in one place on as many examples as the federation saw."""
    start = time.perf_counter()
    if task.head_start is not None:
        _start_head(encoder, features, train.classes, HeadStartConfig(**task.head_start))
    lora = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=task.rank,
        lora_alpha=round(task.scale * task.rank),
        target_modules=list(task.targets or _usual_targets(task, encoder.model)),
    )
    encoder.model = get_peft_model(encoder.model, lora)
    optimizer = torch.optim.AdamW(_parameter_groups(task, encoder.model), weight_decay=0.0)
    steps = max(task.examples // task.batch_size, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    seen = 0
    for chosen in _batches(len(train.texts), task):
        if time.perf_counter() - start > task.seconds:
            break
        encoder.model.train()
        batch = encoder.tokens([train.texts[index] for index in chosen])
        loss = encoder.model(**batch, labels=torch.from_numpy(train.classes[chosen])).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        seen += len(chosen)
    note = "torch + PEFT on one machine that sees all the data, same optimiser and head start"
    if seen < task.examples:
        note += f"; stopped at {task.seconds:.0f} s, after {seen:,} of {task.examples:,} examples"
    return {
        "name": "centralised LoRA",
        "metric": encoder.accuracy(test),
        "examples": seen,
        "is_complete": seen >= task.examples,
        "seconds": time.perf_counter() - start,
        "note": note,
    }


def _usual_targets(task: BaselineTask, model: torch.nn.Module) -> tuple[str, ...]:
    """Modules that a federation trains where its run names none."""
    kind = Task(kind="sequence-classification", labels=task.labels)
    return architecture_of(model.config, kind).targets


def read_rows(path: str, task: BaselineTask) -> LabelledTexts:
    """Rows of a JSON lines file as texts and class numbers."""
    numbers = {label: number for number, label in enumerate(task.labels)}
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines if line.strip()]
    classes = np.array([numbers[row[task.label_column]] for row in rows], dtype=np.int64)
    return LabelledTexts(tuple(row[task.text_column] for row in rows), classes)


def _start_head(
    encoder: EncoderClassifier, features: Features, classes: Classes, config: HeadStartConfig
) -> None:
    """Start the head as the federation does, from all features at once."""
    class_count = encoder.model.config.num_labels
    exact = features.astype(np.float64)
    counts = np.bincount(classes, minlength=class_count).astype(np.float64)
    sums = np.zeros((class_count, exact.shape[1]))
    np.add.at(sums, classes, exact)
    weight, bias = head_from_means(sums, counts, config, moments=exact.T @ exact)
    head = encoder.model.classifier
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(weight))
        head.bias.copy_(torch.from_numpy(bias))


def _batches(count: int, task: BaselineTask) -> Iterator[Classes]:
    """Shuffled epochs cut into batches until the promised number of examples is reached."""
    rng = np.random.default_rng(task.seed)
    seen = 0
    while True:
        order = rng.permutation(count)
        for start in range(0, count - task.batch_size + 1, task.batch_size):
            if seen >= task.examples:
                return
            seen += task.batch_size
            yield order[start : start + task.batch_size]


def _parameter_groups(task: BaselineTask, model: torch.nn.Module) -> list[dict[str, object]]:
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    head = [parameter for name, parameter in trained if "lora_" not in name]
    lora = [parameter for name, parameter in trained if "lora_" in name]
    return [
        {"params": lora, "lr": task.learning_rate},
        {"params": head, "lr": task.learning_rate * task.head_factor},
    ]


def _by_length(texts: Sequence[str]) -> npt.NDArray[np.intp]:
    """Indices by length, so that a batch has little padding."""
    return np.argsort([len(text) for text in texts], kind="stable")


def main() -> None:
    """Read a task, print what each baseline reached."""
    task = BaselineTask.from_json(Path(sys.argv[1]).read_text(encoding="utf-8"))
    train, test = read_rows(task.train, task), read_rows(task.test, task)
    encoder = EncoderClassifier(task)
    features = encoder.features(train.texts)
    results = {
        "linear_probe": probe_baseline(task, encoder, features, train, test),
        "centralised": centralised_baseline(task, encoder, features, train, test),
    }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
