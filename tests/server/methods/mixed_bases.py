# SPDX-License-Identifier: Apache-2.0
"""A small network whose devices hold bases of different precisions, and train it for real."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch

from lorikit.proto.manifest import AdapterTensor
from lorikit.proto.tensors import Tensors
from lorikit.quantization import codec
from lorikit.server.aggregate.base_error import whitening
from lorikit.server.methods.base import AdapterSpace, Assignment, Contribution, Method, State
from lorikit.server.methods.base_delta import with_deltas

WIDTH, INNER, RANK, SCALE = 32, 48, 4, 2.0
MODULES = ("mlp.up", "mlp.down")
SHAPES = {"mlp.up": (INNER, WIDTH), "mlp.down": (WIDTH, INNER)}
CODECS = {"fp32": "fp32", "fp16": "fp16", "int8": "int8", "int4": "int4-row32", "nf4": "nf4"}


@functools.cache
def _weights(seed: int, module: str) -> np.ndarray:
    rng = np.random.default_rng([seed, MODULES.index(module)])
    shape = SHAPES[module]
    # Heavy tails, as trained weights have them: coarse blocks lose much.
    return (rng.standard_t(4, shape) / np.sqrt(2 * shape[1])).astype(np.float32)


@functools.cache
def _error(seed: int, precision: str, module: str) -> np.ndarray:
    weights, chosen = _weights(seed, module), codec(CODECS[precision])
    return chosen.decode(chosen.encode(weights)) - weights


@dataclass(frozen=True)
class MlpBases:
    """Two frozen maps with a ReLU between them, at every precision of ``CODECS``."""

    seed: int = 0
    digest: str = "0" * 64
    precisions: tuple[str, ...] = tuple(CODECS)

    def weights(self, module: str) -> np.ndarray:
        return _weights(self.seed, module)

    def error(self, precision: str, module: str) -> np.ndarray:
        return _error(self.seed, precision, module)

    def input_root(self, module: str) -> np.ndarray:
        x = self.inputs(7, 256)
        if module == "mlp.down":
            x = np.maximum(x @ self.weights("mlp.up").T, 0)
        return whitening(x.T.astype(np.float64) @ x)

    def inputs(self, seed: int, count: int) -> np.ndarray:
        """Inputs that live in few directions, [count, width]."""
        strength = np.logspace(0, -1.5, WIDTH)
        return (np.random.default_rng(seed).normal(size=(count, WIDTH)) * strength).astype("f4")


def make_space() -> AdapterSpace:
    """LoRA on both maps, with base deltas."""
    tensors = []
    for module, (d_out, d_in) in SHAPES.items():
        for role, shape in (("lora_A", ("rank", d_in)), ("lora_B", (d_out, "rank"))):
            tensors.append(
                AdapterTensor(
                    name=f"{module}.{role}.weight",
                    role=role,
                    module=module,
                    layer=0,
                    shape=shape,
                    trained=True,
                )
            )
    return with_deltas(AdapterSpace(tensors=tuple(tensors), layer_count=1, max_rank=RANK))


def make_initial(seed: int = 0) -> Tensors:
    """A random, B zero, deltas zero."""
    rng = np.random.default_rng([seed, 99])
    initial: Tensors = {}
    for module, (d_out, d_in) in SHAPES.items():
        initial[f"{module}.lora_A.weight"] = rng.normal(0, 0.2, (RANK, d_in)).astype("f4")
        initial[f"{module}.lora_B.weight"] = np.zeros((d_out, RANK), np.float32)
        initial[f"{module}.base_delta_A"] = np.zeros((1, d_in), np.float32)
        initial[f"{module}.base_delta_B"] = np.zeros((d_out, 1), np.float32)
    return initial


@dataclass
class MixedFederation:
    """Devices with bases of given precisions that learn a teacher of low rank."""

    bases: MlpBases
    method: Method
    precisions: tuple[str, ...]
    steps: int = 40
    seed: int = 0

    def __post_init__(self) -> None:
        self.space = make_space()
        self.state: State = self.method.start(self.space, make_initial(self.seed))
        rng = np.random.default_rng([self.seed, 5])
        self.teacher = {
            module: 0.15 * rng.normal(size=(d_out, 2)) @ rng.normal(size=(2, d_in))
            for module, (d_out, d_in) in SHAPES.items()
        }

    def assignment(self, device: int) -> Assignment:
        return Assignment(
            device_id=f"device-{device}",
            ranks=dict.fromkeys(MODULES, RANK),
            trained_layers=(0,),
            kept_layers=(0,),
            scale=SCALE,
            precision=self.precisions[device],
        )

    def round(self, number: int) -> None:
        """Train on every device, each on its own base and inputs, and aggregate."""
        given = [self._given(device) for device in range(len(self.precisions))]
        values = {
            name: torch.stack([torch.from_numpy(adapter[name]) for adapter in given])
            for name in given[0]
            if ".lora_" in name
        }
        for value in values.values():
            value.requires_grad_()
        bases = self._bases(given)
        devices = range(len(given))
        x = torch.stack([self._inputs(1000 * number + device, 64) for device in devices])
        wanted = self._teach(x)
        optimizer = torch.optim.Adam(values.values(), lr=5e-3)
        for _ in range(self.steps):
            optimizer.zero_grad()
            # A sum over devices: each gradient is that of its own mean loss.
            (_forward(x, bases, values) - wanted).square().mean(dim=(1, 2)).sum().backward()
            optimizer.step()
        updates = [
            Contribution(
                device_id=f"device-{device}",
                assignment=self.assignment(device),
                tensors={n: v[device].detach().numpy() for n, v in values.items()},
                scalars={},
                examples=64,
            )
            for device in devices
        ]
        self.state = self.method.aggregate(self.state, self.space, updates)

    def loss(self) -> float:
        """Mean loss over the devices' own bases, each with what it would receive next."""
        given = [self._given(device) for device in range(len(self.precisions))]
        values = {
            name: torch.stack([torch.from_numpy(adapter[name]) for adapter in given])
            for name in given[0]
            if ".lora_" in name
        }
        x = self._inputs(1 << 20, 1000).expand(len(given), -1, -1)
        with torch.no_grad():
            away = _forward(x, self._bases(given), values) - self._teach(x)
        return float(away.square().mean())

    def _given(self, device: int) -> Tensors:
        return self.method.broadcast(self.state, self.space, self.assignment(device))

    def _bases(self, given: list[Tensors]) -> dict[str, torch.Tensor]:
        """What each device's frozen part computes with, [devices, d_out, d_in] by module."""
        bases = {}
        for module in MODULES:
            own = []
            for precision, adapter in zip(self.precisions, given, strict=True):
                base = self.bases.weights(module) + self.bases.error(precision, module)
                if f"{module}.base_delta_A" in adapter:
                    delta = adapter[f"{module}.base_delta_B"] @ adapter[f"{module}.base_delta_A"]
                    base = base + delta
                own.append(torch.from_numpy(base))
            bases[module] = torch.stack(own)
        return bases

    def _inputs(self, seed: int, count: int) -> torch.Tensor:
        return torch.from_numpy(self.bases.inputs(seed, count))

    def _teach(self, x: torch.Tensor) -> torch.Tensor:
        up, down = (
            torch.from_numpy(self.bases.weights(module) + self.teacher[module].astype("f4"))
            for module in MODULES
        )
        return torch.relu(x @ up.T) @ down.T


def _forward(
    x: torch.Tensor, bases: dict[str, torch.Tensor], values: dict[str, torch.Tensor]
) -> torch.Tensor:
    """[devices, samples, width] to the same."""
    for module in MODULES:
        a, b = values[f"{module}.lora_A.weight"], values[f"{module}.lora_B.weight"]
        y = x @ bases[module].mT + SCALE * (x @ a.mT) @ b.mT
        x = torch.relu(y) if module == MODULES[0] else y
    return x
