# SPDX-License-Identifier: Apache-2.0
"""No package leaves the server before its graph agrees with torch + PEFT.

One step of the compiled graph is compared with autograd on the same model whose frozen weights
were replaced by the de-quantised ones: the loss, the logits and every gradient.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch

from lorikit.proto.tensors import Array, Float32, Tensors
from lorikit.server.compile import run_graph as run_graph_script
from lorikit.server.compile.models import Model
from lorikit.server.compile.weights import Base
from lorikit.server.errors import VerificationError
from lorikit.server.methods.base_delta import DELTA_SUFFIX

TOLERANCE = 1e-4
"""Largest relative error, Frobenius norm of the difference over that of torch's."""

RESOLUTION = 1e-5
"""Gradients smaller than this share of the largest one are compared at its scale: float32 sums
cannot resolve them, in torch no more than here."""

ROUNDINGS = 4.0
"""How many times torch's own rounding error a gradient that is lost in it may be off."""

RANK, DELTA_RANK, SCALE = 3, 2, 2.0

DROPOUT_SEED = 0
"""What devices feed where a probe names no seed."""

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Probe:
    """One step with known result; a device repeats it before it trusts its own engine."""

    inputs: Mapping[str, Array]
    """What the model reads, by name."""
    labels: Int64
    weights: Float32
    scale: float
    adapter: Tensors
    loss: float
    """Of a training step, dropout included."""
    logits: Float32
    """Without dropout."""
    evaluation_loss: float
    """Without dropout."""
    gradients: Tensors
    rounding: Mapping[str, float] = field(default_factory=dict)
    """Norm of torch's rounding error in gradients below ``RESOLUTION``. A bias of keys has none but
    that: softmax does not see it, so its gradient is zero in exact arithmetic."""


def make_probe(
    model: Model, base: Base, kept: Sequence[int], trained: Sequence[str], *, seed: int = 0
) -> Probe:
    """Run one step of torch + PEFT on the de-quantised base.

    Args:
        model: Torch module with PEFT layers; left as it was.
        base: The frozen weights a device will have.
        kept: Layers of the sub-model.
        trained: Adapter tensors to differentiate.
        seed: Of batch and adapter.
    """
    rng = np.random.default_rng(seed)
    inputs = _probe_inputs(model, rng)
    adapter = _probe_adapter(model, rng)
    before = {t.name: model.adapter_parameter(t.name).data for t in model.adapter}
    model.set_adapter(adapter, SCALE)
    wanted = [model.adapter_parameter(name) for name in trained]
    dropping = model.lora_inputs()
    try:
        with _device_view(model, base, kept, adapter):
            arrays = {name: torch.from_numpy(array) for name, array in inputs.items()}
            with torch.no_grad():
                logits, _ = model.forward(arrays)
            labels, weights = _probe_labels(model, inputs, logits, rng)
            evaluated = _loss(logits, labels, weights)
            with model.with_dropout(dropping, DROPOUT_SEED):
                loss = _loss(model.forward(arrays)[0], labels, weights)
                gradients = torch.autograd.grad(loss, wanted)
                found = {n: g.numpy().copy() for n, g in zip(trained, gradients, strict=True)}
                lost = {
                    name: parameter
                    for name, parameter in zip(trained, wanted, strict=True)
                    if np.linalg.norm(found[name]) < _resolved(found)
                }
                rounding = _rounding(model, arrays, labels, weights, found, lost)
    finally:
        model.set_adapter({name: value.numpy() for name, value in before.items()}, SCALE)
    return Probe(
        inputs,
        labels,
        weights,
        SCALE,
        adapter,
        float(loss.detach()),
        logits.numpy().copy(),
        float(evaluated),
        found,
        rounding,
    )


def _rounding(
    model: Model,
    arrays: Mapping[str, torch.Tensor],
    labels: Int64,
    weights: Float32,
    gradients: Tensors,
    wanted: Mapping[str, torch.nn.Parameter],
) -> dict[str, float]:
    """Norm of the difference between float32 and float64 gradients of some tensors."""
    if not wanted:
        return {}
    model.module.double()
    try:
        wide = {n: v.double() if v.is_floating_point() else v for n, v in arrays.items()}
        loss = _loss(model.forward(wide)[0], labels, weights.astype(np.float64))
        exact = torch.autograd.grad(loss, list(wanted.values()))
    finally:
        model.module.float()
    return {
        name: float(np.linalg.norm(gradients[name] - value.numpy()))
        for name, value in zip(wanted, exact, strict=True)
    }


def _loss(logits: torch.Tensor, labels: Int64, weights: npt.NDArray[np.floating]) -> torch.Tensor:
    """Weighted sum of the negative log probabilities of the labels."""
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, -2), torch.from_numpy(labels).flatten(), reduction="none"
    )
    return (losses * torch.from_numpy(weights).flatten()).sum()


def _probe_inputs(model: Model, rng: np.random.Generator) -> dict[str, Array]:
    """A small batch; of three texts the second ends early."""
    if "pixel_values" in model.kind.inputs:
        size = model.config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (2, model.config.num_channels, height, width)
        return {"pixel_values": rng.normal(0, 1, shape).astype(np.float32)}
    ids = rng.integers(1, int(model.config.vocab_size), (3, 9))
    mask = np.ones_like(ids)
    mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _probe_adapter(model: Model, rng: np.random.Generator) -> Tensors:
    """Values near the start, at a rank of their own; both factors of LoRA differ from zero."""
    adapter: Tensors = {}
    for tensor in model.adapter:
        shape = tuple(RANK if n == "rank" else int(n) for n in tensor.shape)
        noise = rng.normal(0, 0.05, shape).astype(np.float32)
        start = model.adapter_parameter(tensor.name).detach().numpy()
        is_factor = tensor.role in ("lora_A", "lora_B")
        adapter[tensor.name] = noise if is_factor or tensor.role == "head" else start + noise
    for tensor in model.deltas:
        shape = tuple(DELTA_RANK if n == "rank" else int(n) for n in tensor.shape)
        adapter[tensor.name] = rng.normal(0, 0.2, shape).astype(np.float32)
    return adapter


def _probe_labels(
    model: Model, inputs: Mapping[str, Array], logits: torch.Tensor, rng: np.random.Generator
) -> tuple[Int64, Float32]:
    """Random labels, and weights that differ, sum to one and are zero on padding."""
    shape = tuple(logits.shape[:-1])
    labels = rng.integers(0, logits.shape[-1], shape)
    weights = 1.0 + np.arange(labels.size, dtype=np.float32).reshape(shape) % 3
    if model.kind.labels_tokens:
        weights *= inputs["attention_mask"].astype(np.float32)
    return labels, (weights / weights.sum()).astype(np.float32)


def check_train_graph(path: Path, probe: Probe, python: Path | None = None) -> float:
    """Run the training graph on the probe and compare; return the worst relative error.

    Args:
        path: The graph, beside its weight blobs.
        probe: What torch + PEFT gives.
        python: Interpreter with the runtime the graph is meant for; None for this one.

    Raises:
        VerificationError: A relative error above ``TOLERANCE`` or not finite; names the tensor.
    """
    results = run_graph(path, probe, python)
    errors = {"loss": abs(float(results["loss"]) - probe.loss) / max(abs(probe.loss), 1e-12)}
    resolved = _resolved(probe.gradients)
    for name, expected in probe.gradients.items():
        floor = max(resolved, ROUNDINGS * probe.rounding.get(name, 0.0) / TOLERANCE)
        error = relative_error(results[f"{name}.grad"], expected, floor=floor)
        errors[f"gradient of {name}"] = error
    return worst_error(errors)


def _resolved(gradients: Tensors) -> float:
    """Norm that a gradient needs for its relative error to mean something."""
    return RESOLUTION * max(float(np.linalg.norm(each)) for each in gradients.values())


def check_predict_graph(path: Path, probe: Probe) -> float:
    """Run the prediction graph on the probe and compare its logits with torch's."""
    return worst_error({"logits": relative_error(run_graph(path, probe)["logits"], probe.logits)})


def check_evaluate_graph(path: Path, probe: Probe) -> float:
    """Run the evaluation graph on the probe and compare its loss with torch's."""
    loss = float(run_graph(path, probe)["loss"])
    expected = probe.evaluation_loss
    return worst_error({"loss": abs(loss - expected) / max(abs(expected), 1e-12)})


def run_graph(path: Path, probe: Probe, python: Path | None = None) -> Mapping[str, Float32]:
    """Outputs of a graph for the probe's batch and adapter, by name."""
    feeds: dict[str, npt.NDArray[np.generic]] = {
        **probe.inputs,
        "labels": probe.labels,
        "weights": probe.weights,
        "lora_scale": np.asarray(probe.scale, np.float32),
        "dropout_seed": np.asarray(DROPOUT_SEED, np.int64),
        **probe.adapter,
    }
    if python is not None:
        return _run_elsewhere(python, path, feeds)
    session = open_session(path)
    names = [output.name for output in session.get_outputs()]
    wanted = {port.name for port in session.get_inputs()}
    values = session.run(names, {name: v for name, v in feeds.items() if name in wanted})
    return dict(zip(names, values, strict=True))


def open_session(path: Path) -> onnxruntime.InferenceSession:
    """A graph in this process's runtime, its nodes as they are."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_mem_reuse = False  # planning it takes long in large graphs
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _run_elsewhere(
    python: Path, path: Path, feeds: Mapping[str, npt.NDArray[np.generic]]
) -> Mapping[str, Float32]:
    with tempfile.TemporaryDirectory() as folder:
        inputs, outputs = Path(folder) / "inputs.npz", Path(folder) / "outputs.npz"
        np.savez(inputs, **dict(feeds))  # type: ignore[arg-type]  # numpy's stub forbids mappings
        command = [str(python), run_graph_script.__file__, str(path), str(inputs), str(outputs)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise VerificationError(
                f"{python} could not run the graph; nothing was published: {done.stderr[-500:]}"
            )
        with np.load(outputs) as arrays:
            return {name: arrays[name] for name in arrays.files}


def relative_error(value: Float32, expected: Float32, *, floor: float = 1e-12) -> float:
    """Norm of the difference over that of the expected, or over ``floor`` where that is larger.

    Infinite for NaN and for another shape.
    """
    if value.shape != expected.shape or not np.isfinite(value).all():
        return float("inf")
    scale = float(np.linalg.norm(expected))
    return float(np.linalg.norm(value - expected)) / max(scale, floor)


def worst_error(errors: Mapping[str, float]) -> float:
    """The largest of relative errors by name; ``VerificationError`` above ``TOLERANCE``."""
    what, error = max(errors.items(), key=lambda item: item[1])
    if not error <= TOLERANCE:
        raise VerificationError(
            f"{what} differs from torch + PEFT by {error:.3g} (relative; at most {TOLERANCE:g} is "
            "allowed); nothing was published"
        )
    return error


@contextmanager
def _device_view(model: Model, base: Base, kept: Sequence[int], adapter: Tensors) -> Iterator[None]:
    """Give the torch module the base and the layers that the device will have.

    Base deltas of the adapter are merged into the de-quantised weights.
    """
    parameters = dict(model.module.named_parameters())
    before = {name: parameters[name].data for name in base.stored if name in parameters}
    try:
        for name in before:
            parameters[name].data = torch.from_numpy(base.decoded(name).copy())
        for a, b in zip(model.deltas[::2], model.deltas[1::2], strict=True):
            weight = model.base_weight(a.module.removesuffix(DELTA_SUFFIX))
            weight.data += torch.from_numpy(adapter[b.name] @ adapter[a.name])
        with model.with_layers(kept):
            yield
    finally:
        for name, value in before.items():
            parameters[name].data = value
