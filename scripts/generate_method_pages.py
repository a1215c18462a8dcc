# SPDX-License-Identifier: Apache-2.0
"""Write a page for each federated method, and their index, from the docstrings and facts in code.

With ``--check`` nothing is written: exit code 1 says that a page is stale.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from lorikit.proto.manifest import AdapterTensor
from lorikit.server.methods import CONFIGS, FACTS, METHODS
from lorikit.server.methods.base import AdapterSpace
from lorikit.server.methods.costs import model_costs
from lorikit.server.methods.device_ranks import DeviceRankConfig
from lorikit.server.methods.facts import LORA_AND_HEAD, Cost, MethodFacts

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "methods"

LAYERS, WIDTH, INNER, CLASSES, RANK = 6, 384, 1536, 150, 8
"""Sizes of all-MiniLM-L6-v2, the classes of CLINC150, and the rank of the example's costs."""

_SECTION = re.compile(r"^(Equations|Ours|Source):$", re.MULTILINE)
_LINK = re.compile(r"(?<![(\[])https?://[^\s,;]*[^\s,;.]")
_ELSEWHERE = re.compile(r"See ``DeviceRankConfig\.(\w+)``\.")
_NEEDS = {
    "bias": "bias tensors (BitFit)",
    "delta_A": "base deltas",
    "delta_B": "base deltas",
}


def pages() -> dict[str, str]:
    """Text of every file of the folder, by name."""
    costs = example_costs()
    texts = {f"{name}.md": page(name, costs[name]) for name in METHODS}
    return {"README.md": index(costs), **texts}


def page(name: str, costs: tuple[Cost, ...]) -> str:
    """The page of one method."""
    facts = FACTS[name]
    sections = docstring_sections(METHODS[name])
    parts = [
        f"# {facts.title}",
        f'`method = "{name}"`',
        _linked(sections["Idea"]),
        f"```\n{sections['Equations']}\n```",
        _table(facts, costs),
        "## What differs from the paper",
        _linked(sections["Ours"]),
        "## Options",
        "Fields of `method_options`.",
        _options(name),
        "## Source",
        _linked(sections["Source"]),
        "Generated from the docstrings by `scripts/generate_method_pages.py`.",
    ]
    return "\n\n".join(parts) + "\n"


def index(costs: Mapping[str, tuple[Cost, ...]]) -> str:
    """The table of all methods."""
    lines = [
        "# All methods",
        "",
        f"kB are those of one device and round for all-MiniLM-L6-v2 with {CLASSES} classes and "
        f"LoRA of rank {RANK} on query and value, in `fp32`, base deltas at their largest rank. "
        "`lorikit methods --model FOLDER` gives the numbers of your model.",
        "",
        "| method | a device trains | devices may differ in | mean exact? | kB up | kB down |",
        "|---|---|---|---|---|---|",
    ]
    for name, facts in FACTS.items():
        accepts = ", ".join(facts.accepts) or "nothing"
        cells = (facts.trains, accepts, facts.exact, *_kilobytes(costs[name]))
        lines.append(f"| [`{name}`]({name}.md) | {' | '.join(cells)} |")
    lines += ["", "Generated from the docstrings by `scripts/generate_method_pages.py`.", ""]
    return "\n".join(lines)


def docstring_sections(kind: type) -> dict[str, str]:
    """The docstring's text before its first section as ``Idea``, and each section by its name.

    Raises:
        ValueError: A section is missing.
    """
    parts = _SECTION.split(inspect.getdoc(kind) or "")
    named = zip(parts[1::2], parts[2::2], strict=True)
    sections = {"Idea": parts[0].strip(), **{n: inspect.cleandoc(text) for n, text in named}}
    if missing := {"Equations", "Ours", "Source"} - sections.keys():
        raise ValueError(f"{kind.__name__} has no section {', '.join(sorted(missing))}")
    return sections


def option_texts(config: type) -> Iterator[tuple[str, object, str]]:
    """Name, default and explanation of each option, those of base classes first."""
    seen: dict[str, tuple[object, str]] = {}
    for kind in reversed(config.__mro__[:-1]):
        (tree,) = ast.parse(inspect.getsource(kind)).body
        assert isinstance(tree, ast.ClassDef)
        for field, text in zip(tree.body, tree.body[1:], strict=False):
            is_text = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
            if isinstance(field, ast.AnnAssign) and is_text:
                assert isinstance(field.target, ast.Name)
                assert isinstance(field.value, ast.Constant)
                words = inspect.cleandoc(str(text.value.value))  # type: ignore[attr-defined]  # is_text
                seen[field.target.id] = (field.value.value, " ".join(words.split()))
    for name, (default, words) in seen.items():
        yield name, default, words


def example_costs() -> dict[str, tuple[Cost, ...]]:
    """Costs of each method for the example, bias methods on a package for bias tuning."""
    lora, bias = model_costs(lora_space()), model_costs(bias_space())
    return {name: lora[name].rounds or bias[name].rounds for name in FACTS}


def lora_space() -> AdapterSpace:
    """all-MiniLM-L6-v2 with LoRA on query and value."""
    tensors = []
    for layer in range(LAYERS):
        for part in ("query", "value"):
            module = f"encoder.layer.{layer}.attention.self.{part}"
            for role, shape in (("lora_A", ("rank", WIDTH)), ("lora_B", (WIDTH, "rank"))):
                tensors.append(_tensor(f"{module}.{role}.weight", role, layer, shape))
    return _space(tensors)


def bias_space() -> AdapterSpace:
    """all-MiniLM-L6-v2 with all its bias vectors."""
    parts = ("query", "key", "value", "attention", "attention.norm", "output", "output.norm")
    tensors = [
        _tensor(f"encoder.layer.{layer}.{part}.bias", "bias", layer, (WIDTH,))
        for layer in range(LAYERS)
        for part in parts
    ]
    tensors += [
        _tensor(f"encoder.layer.{layer}.intermediate.bias", "bias", layer, (INNER,))
        for layer in range(LAYERS)
    ]
    outer = [_tensor(f"{part}.bias", "bias", -1, (WIDTH,)) for part in ("embeddings", "pooler")]
    return _space([*tensors, *outer])


def _space(tensors: list[AdapterTensor]) -> AdapterSpace:
    head = [
        _tensor("classifier.weight", "head", -1, (CLASSES, WIDTH)),
        _tensor("classifier.bias", "head", -1, (CLASSES,)),
    ]
    return AdapterSpace(tensors=(*tensors, *head), layer_count=LAYERS, max_rank=RANK)


def _tensor(name: str, role: str, layer: int, shape: tuple[int | str, ...]) -> AdapterTensor:
    module = name.partition(f".{role}.")[0]
    return AdapterTensor(
        name=name, role=role, module=module, layer=layer, shape=shape, trained=True
    )


def _table(facts: MethodFacts, costs: tuple[Cost, ...]) -> str:
    up, down = _kilobytes(costs)
    needs = dict.fromkeys(_NEEDS[r] for r in facts.roles() if r not in LORA_AND_HEAD)
    example = f"all-MiniLM-L6-v2, rank {RANK}, query and value, {CLASSES} classes"
    rows = [
        ("a device trains", facts.trains),
        ("it sends", facts.sends),
        ("devices may differ in", ", ".join(facts.accepts) or "nothing"),
        ("is the mean that of the updates?", facts.exact),
        ("parameters up", f"`{facts.upload}`"),
        ("parameters down", f"`{facts.download}`"),
        (f"kB up and down ({example})", f"{up} and {down}"),
        ("the package must have", ", ".join(needs) or "nothing special"),
    ]
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows)])


def _options(name: str) -> str:
    shared = {option: words for option, _, words in option_texts(DeviceRankConfig)}
    rows = []
    for option, default, words in option_texts(CONFIGS[name]):
        told = _ELSEWHERE.sub(lambda match: shared[match[1]], words)
        rows.append(f"| `{option}` | `{default!r}` | {_escaped(told)} |")
    return "\n".join(["| option | default | |", "|---|---|---|", *rows])


def _kilobytes(costs: tuple[Cost, ...]) -> tuple[str, str]:
    """Kilobytes up and down, joined by a slash where rounds that take turns differ."""
    up = dict.fromkeys(f"{cost.up / 1000:,.0f}" for cost in costs)
    down = dict.fromkeys(f"{cost.down / 1000:,.0f}" for cost in costs)
    return " / ".join(up), " / ".join(down)


def _linked(text: str) -> str:
    links = _LINK.sub(lambda match: f"[{match[0].split('//')[1]}]({match[0]})", text)
    return links.replace("``", "`")


def _escaped(text: str) -> str:
    return text.replace("``", "`").replace("|", "\\|")


def main() -> None:
    """Write the pages, or compare them with ``--check``."""
    if sys.argv[1:] not in ([], ["--check"]):
        raise SystemExit("usage: generate_method_pages.py [--check]")
    texts = pages()
    here = {path.name: path.read_text() for path in FOLDER.glob("*.md")}
    stale = sorted(n for n in texts.keys() | here.keys() if texts.get(n) != here.get(n))
    if sys.argv[1:]:
        if stale:
            raise SystemExit(f"stale pages, run scripts/generate_method_pages.py: {stale}")
        print("pages of the methods are up to date")
        return
    FOLDER.mkdir(exist_ok=True)
    for name in stale:
        if name in texts:
            (FOLDER / name).write_text(texts[name])
        else:
            (FOLDER / name).unlink()


if __name__ == "__main__":
    main()
