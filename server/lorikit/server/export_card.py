# SPDX-License-Identifier: Apache-2.0
"""The model card of an exported adapter: what it is, and the lines that load it."""

from __future__ import annotations

import json
from collections.abc import Mapping

from lorikit.server.export_layout import Content, is_in_peft

AUTO_CLASSES: Mapping[str, str] = {
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "masked-language-modeling": "AutoModelForMaskedLM",
    "causal-language-modeling": "AutoModelForCausalLM",
    "image-classification": "AutoModelForImageClassification",
}
"""Class of transformers by kind of task, as in ``compile.architectures``, which needs torch."""

_TITLES: Mapping[str, str] = {
    "lora": "LoRA adapter",
    "dora": "DoRA adapter",
    "ia3": "IA3 adapter",
    "prompt": "Soft prompt",
    "bottleneck": "Bottleneck adapters",
    "bitfit": "Biases (BitFit)",
    "head": "Head",
}

_PEFT = """\
from peft import PeftModel
from transformers import {auto_class}

base = {base}
model = PeftModel.from_pretrained(base, ".")
"""

_PLAIN = """\
from safetensors.torch import load_file
from transformers import {auto_class}

model = {base}
left = model.load_state_dict(load_file("adapter_model.safetensors"), strict=False)
assert not left.unexpected_keys, left.unexpected_keys
"""

_BOTTLENECK = """\
import json

import torch
from safetensors.torch import load_file
from transformers import {auto_class}


class Bottleneck(torch.nn.Module):
    def __init__(self, base_layer, size):
        super().__init__()
        self.base_layer = base_layer
        self.adapter_down = torch.nn.Linear(base_layer.out_features, size)
        self.adapter_up = torch.nn.Linear(size, base_layer.out_features)

    def forward(self, x):
        h = self.base_layer(x)
        return h + self.adapter_up(torch.relu(self.adapter_down(h)))


model = {base}
with open("adapter_config.json") as file:
    config = json.load(file)
for name in config["modules"]:
    owner, _, leaf = name.rpartition(".")
    parent = model.get_submodule(owner)
    setattr(parent, leaf, Bottleneck(getattr(parent, leaf), config["size"]))
left = model.load_state_dict(load_file("adapter_model.safetensors"), strict=False)
assert not left.unexpected_keys, left.unexpected_keys
"""


def card(content: Content, labels_file: str) -> str:
    """The text of ``README.md``."""
    title = _TITLES[content.kind]
    library = "peft" if is_in_peft(content.kind) else "transformers"
    head = (
        f", with the trained head of {len(content.labels)} classes (names in `{labels_file}`)"
        if content.head
        else ""
    )
    return (
        f"---\nbase_model: {json.dumps(content.base_model)}\nlibrary_name: {library}\n"
        f"tags: [{content.kind}, federated-learning, lorikit]\n---\n\n"
        f"# {title} trained with Lorikit\n\n"
        f"{_description(content)}{head}. Task: {content.task_kind}.\n\n"
        f"{_how(content)}```python\n{_snippet(content)}```\n{_remark(content)}"
    )


def _description(content: Content) -> str:
    where = f"{', '.join(content.targets) or 'the listed modules'} ({len(content.modules)} modules)"
    if content.kind in ("lora", "dora"):
        low, high = min(content.ranks.values()), max(content.ranks.values())
        spread = f"rank {low}" if low == high else f"ranks {low} to {high}"
        rule = ", stored as alpha / sqrt(r)" if content.use_rslora else ""
        name = "LoRA" if content.kind == "lora" else "DoRA"
        return f"{name} of {spread} on {where}, scale {content.scale:g}{rule}"
    return {
        "ia3": f"IA3 on {where}",
        "prompt": f"A soft prompt of {content.size} tokens",
        "bottleneck": f"Adapters with a bottleneck of {content.size} on {where}",
        "bitfit": f"The biases of {len(content.modules)} modules",
        "head": f"The modules {', '.join(content.head)}",
    }[content.kind]


def _how(content: Content) -> str:
    if is_in_peft(content.kind):
        return ""
    return "PEFT has no such kind; these lines load it, run in this folder:\n\n"


def _snippet(content: Content) -> str:
    template = _PEFT if is_in_peft(content.kind) else _PLAIN
    if content.kind == "bottleneck":
        template = _BOTTLENECK
    auto_class = AUTO_CLASSES[content.task_kind]
    return template.format(auto_class=auto_class, base=_base(content, auto_class))


def _base(content: Content, auto_class: str) -> str:
    """The call that loads the base; where a head is trained, the base's own need not fit."""
    if not content.head:
        return f"{auto_class}.from_pretrained({content.base_model!r})"
    return (
        f"{auto_class}.from_pretrained(\n    {content.base_model!r},\n"
        f"    num_labels={len(content.labels)},\n    ignore_mismatched_sizes=True,\n)"
    )


def _remark(content: Content) -> str:
    if content.kind != "prompt" or content.task_kind == "sequence-classification":
        return ""
    return (
        f"\nThe first {content.size} positions of the logits are those of the prompt: "
        f"`model(...).logits[:, {content.size}:]` belongs to the text.\n"
    )
