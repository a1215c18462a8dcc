# SPDX-License-Identifier: Apache-2.0
"""A graph as a list of steps: read from its file once, run as often as wanted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from lorikit.proto.tensors import Array
from lorikit.sdk._errors import UnsupportedPackageError
from lorikit.sdk.engines._onnx_file import read_model
from lorikit.sdk.engines._torch.base import Attribute, Attributes, Operator, Value, is_data
from lorikit.sdk.engines._torch.constants import Constants, inline_tensor
from lorikit.sdk.engines._torch.operators import MICROSOFT, OPERATORS, READS_NUMBERS

HIGHEST_OPSETS = {"": 21, MICROSOFT: 1}
"""Newest opset by domain whose operators mean what ours compute."""

HIGHEST_IR = 10
"""Newest file format that is read."""


@dataclass(slots=True)
class Step:
    """One node."""

    op: str
    domain: str
    operator: Operator
    attributes: Attributes
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    released: tuple[str, ...] = ()
    """Values that nobody reads after this step."""


@dataclass(frozen=True, slots=True)
class Program:
    """A graph that is ready to run."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constants: Mapping[str, Value]
    """Weights as they are stored, on the device; mapped from their files on a CPU."""
    steps: Sequence[Step]
    device: torch.device

    def run(self, outputs: Sequence[str], feeds: Mapping[str, Array]) -> list[Array]:
        """The named outputs.

        Every value is released after the last step that reads it, so the peak is that of the
        compiler's memory plan.
        """
        values: dict[str, Value] = {
            name: torch.tensor(array, device=self.device) for name, array in feeds.items()
        }
        with torch.inference_mode():
            for step in self.steps:
                self._do(step, values)
        return [np.asarray(cast(Tensor, values[name]).cpu().numpy()) for name in outputs]

    def _do(self, step: Step, values: dict[str, Value]) -> None:
        inputs = [
            (values[name] if name in values else self.constants[name]) if name else None
            for name in step.inputs
        ]
        if self.device.type != "cpu":
            inputs = _together(step.op, inputs, self.device)
        result = step.operator(step.attributes, *inputs)
        results = result if isinstance(result, tuple) else (result,)
        for name, value in zip(step.outputs, results, strict=False):
            if name and value is not None:
                values[name] = value.to(self.device) if is_data(value) else value
        for name in step.released:
            values.pop(name, None)


def load_program(path: Path, blobs: Mapping[str, int], device: torch.device) -> Program:
    """Read a graph and bring its weights to the device, in the form they are stored in.

    Args:
        path: The graph's file; blobs lie in the same folder.
        blobs: Size of each weight blob by digest.
        device: Where to compute.

    Raises:
        InvalidGraphError: The file is no graph, or names bytes outside the blobs.
        UnsupportedPackageError: A newer format, or an operator that is unknown here; names it.
    """
    model = read_model(path)
    _check_versions(model)
    constants = Constants(path.parent, blobs, device).read(model.graph.initializer)
    steps = [_step(node) for node in model.graph.node]
    outputs = tuple(value.name for value in model.graph.output)
    _release(steps, keep={*outputs, *constants})
    return Program(
        inputs=tuple(value.name for value in model.graph.input),
        outputs=outputs,
        constants=constants,
        steps=steps,
        device=device,
    )


def _check_versions(model: Any) -> None:  # noqa: ANN401  # a message that is declared at run time
    if model.ir_version > HIGHEST_IR:
        raise UnsupportedPackageError(
            f"the graph's format is IR version {model.ir_version}, the torch engine reads up to "
            f"{HIGHEST_IR}; update the SDK"
        )
    for opset in model.opset_import:
        domain = "" if opset.domain == "ai.onnx" else opset.domain
        if domain in HIGHEST_OPSETS and opset.version > HIGHEST_OPSETS[domain]:
            raise UnsupportedPackageError(
                f"the graph needs opset {opset.version} of domain {domain!r}, the torch engine "
                f"has {HIGHEST_OPSETS[domain]}; update the SDK"
            )


def _step(node: Any) -> Step:  # noqa: ANN401  # see above
    domain = "" if node.domain == "ai.onnx" else node.domain
    operator = OPERATORS.get((domain, node.op_type))
    if operator is None:
        where = f" of domain {domain}" if domain else ""
        raise UnsupportedPackageError(
            f"operator {node.op_type!r:.80}{where} (node {node.name!r:.120}) is unknown to the "
            "torch engine; update the SDK or use the onnx engine"
        )
    attributes = {attribute.name: _attribute(attribute) for attribute in node.attribute}
    return Step(node.op_type, domain, operator, attributes, tuple(node.input), tuple(node.output))


_READERS: Mapping[int, Callable[[Any], Attribute]] = {
    1: lambda a: a.f,
    2: lambda a: a.i,
    3: lambda a: a.s.decode(),
    4: lambda a: inline_tensor(a.t),
    6: lambda a: tuple(a.floats),
    7: lambda a: tuple(a.ints),
    8: lambda a: tuple(item.decode() for item in a.strings),
}
"""How to read an attribute, by ONNX's number of its type."""


def _attribute(attribute: Any) -> Attribute:  # noqa: ANN401  # see above
    reader = _READERS.get(attribute.type)
    if reader is None:
        raise UnsupportedPackageError(
            f"attribute {attribute.name!r:.80} of type {attribute.type} is unknown here"
        )
    value: Attribute = reader(attribute)
    return value


def _release(steps: Sequence[Step], keep: set[str]) -> None:
    """Note for each step the values that it is the last to touch."""
    seen = {"", *keep}
    for step in reversed(steps):
        touched = dict.fromkeys((*step.inputs, *step.outputs))
        step.released = tuple(name for name in touched if name not in seen)
        seen.update(touched)


def _together(op: str, inputs: Sequence[Value | None], device: torch.device) -> list[Value | None]:
    """The inputs on one device, unless all of them are small numbers on the host.

    Shapes and axes are computed and read on the host, since reading them from the device would
    wait for it.
    """
    numbers = READS_NUMBERS.get(op, frozenset())
    data = [value for n, value in enumerate(inputs) if value is not None and n not in numbers]
    if all(value.device.type == "cpu" for value in data) and not any(map(is_data, data)):
        return list(inputs)
    return [
        value if value is None or n in numbers or value.device == device else value.to(device)
        for n, value in enumerate(inputs)
    ]
