# SPDX-License-Identifier: Apache-2.0
"""The compiler: one base model and task in, verified packages out."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime

from lorikit.proto.manifest import BlobPatch, BlobRef, Manifest, Task, dump
from lorikit.proto.manifest import Graph as GraphRow
from lorikit.proto.tensors import Float32, Tensors
from lorikit.server.aggregate.product import Float64
from lorikit.server.compile.base_deltas import add_base_deltas
from lorikit.server.compile.calibration import QuantizedBases, input_moments, synthetic_batches
from lorikit.server.compile.decoding import (
    cache_shape,
    can_decode,
    check_decoding_graph,
    decoding_graph,
    export_decoding,
)
from lorikit.server.compile.export import export_forward
from lorikit.server.compile.graph import Graph
from lorikit.server.compile.inputs import image_input, text_input
from lorikit.server.compile.insertion import AdapterConfig
from lorikit.server.compile.layers import check_kept
from lorikit.server.compile.memory import GraphMemory
from lorikit.server.compile.models import Model, load_model
from lorikit.server.compile.onnx_format import to_onnx
from lorikit.server.compile.package import (
    Package,
    Variant,
    adapter_of,
    evaluation_graph,
    manifest_graph,
    prediction_graph,
    probe_bundle,
    training_graph,
    with_base,
)
from lorikit.server.compile.progressive import PROGRESSIVE, base_patches, encode_nested
from lorikit.server.compile.tokens import Tokenizer, TokenLosses, next_tokens
from lorikit.server.compile.verify import (
    Probe,
    check_evaluate_graph,
    check_predict_graph,
    check_train_graph,
    make_probe,
)
from lorikit.server.compile.weights import Base, KernelReport, frozen_weights, store_base
from lorikit.server.compile.work import LayerWork
from lorikit.server.errors import UnsupportedModelError, VerificationError
from lorikit.server.methods.base import AdapterSpace
from lorikit.server.methods.base_delta import DELTA_RANK, largest_delta_ranks, no_deltas
from lorikit.server.methods.principal import principal_start
from lorikit.server.planner.memory import Footprint, footprint
from lorikit.server.planner.speed import Operations
from lorikit.server.planner.step import StepShape
from lorikit.server.store.blobs import FolderBlobs

Progress = Callable[[str], None]


class Compiler:
    """Packages of one base model for one task; safe for use by several threads.

    The model is exported once; each variant (precision, depth, kept layers, runtime) is a few
    passes over the graph, verified against torch + PEFT, published into ``blobs`` and remembered.
    """

    def __init__(
        self,
        model_folder: Path,
        task: Task,
        *,
        adapter: AdapterConfig | None = None,
        targets: Sequence[str] = (),
        blobs: FolderBlobs,
        training_python: Path | None = None,
        is_progressive: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """Load and export the model.

        Args:
            model_folder: Local Hugging Face folder.
            task: What it is trained for.
            adapter: What trains beside the head; None for LoRA on ``targets``.
            targets: Linear modules that get LoRA, by name, for example ``("query", "value")``.
            blobs: Where artefacts are published.
            training_python: Interpreter of an environment with onnxruntime-training, which verifies
                graphs with its fused kernels. Without one, devices that run it get the graph for
                stock onnxruntime, which it runs as well.
            is_progressive: Whether int4 and int8 come from the same integers, so that a device
                goes from one to the other by half a download, or by none.
            progress: Called with a sentence before each long step.

        Raises:
            UnsupportedModelError: The folder cannot be compiled; says what would be needed.
        """
        self._say = progress or (lambda _: None)
        self._folder = Path(model_folder)
        self._task = task
        self.blobs = blobs
        self._training_python = training_python
        self._is_progressive = is_progressive
        self._lock = threading.RLock()
        self._bases: dict[str, Base] = {}
        self._ways: dict[str, dict[str, BlobPatch]] = {}
        self._packages: dict[Variant, Package] = {}
        self._memory: dict[Variant, GraphMemory] = {}
        self._decoder: Graph | None = None
        self._sessions: dict[tuple[int, ...], onnxruntime.InferenceSession] = {}
        self._say(f"loading {self._folder.name}")
        self.adapter = adapter or AdapterConfig(targets=tuple(targets))
        self._model: Model = load_model(self._folder, task, self.adapter)
        self.layer_count = self._model.layer_count
        self.model_digest = _weights_digest(self._folder)
        self.adapter = self.adapter.on(self._model.architecture)
        self.targets = self.adapter.targets
        self.architecture = self._model.architecture.class_name
        self._say("exporting the forward graph")
        self._forward = self._with_deltas(export_forward(self._model))
        self._frozen, self._tables = frozen_weights(
            self._forward, {name for name, _ in self._model.module.named_parameters()}
        )
        self._work = LayerWork(self._forward, self._frozen.keys(), self._model.architecture)
        self._initial = {
            t.name: self._model.adapter_parameter(t.name).detach().numpy().copy()
            for t in self._model.adapter
            if t.role not in ("lora_A", "lora_B")
        }
        self._tokenizer = (
            Tokenizer(self._folder) if "input_ids" in self._model.kind.inputs else None
        )

    def space(self, max_rank: int) -> AdapterSpace:
        """The adapter tensors of the full model."""
        return AdapterSpace(
            tensors=self._model.tensors, layer_count=self.layer_count, max_rank=max_rank
        )

    def initial(self, max_rank: int, seed: int) -> Tensors:
        """Start values: A Kaiming-uniform as in PEFT, B zero, others as the model has them.

        With ``AdapterConfig.principal_scale`` A and B are the principal part of the frozen weight.
        Base deltas start at zero.

        Source: Hu et al. 2021, https://arxiv.org/abs/2106.09685, section 4.1, with PEFT's
        initialisation of A, uniform in +-1 / sqrt(d_in).
        """
        rng = np.random.default_rng(seed)
        space = self.space(max_rank)
        values: Tensors = {}
        for tensor in self._model.adapter:
            shape = tuple(max_rank if n == "rank" else int(n) for n in tensor.shape)
            if tensor.role == "lora_A":
                bound = 1 / np.sqrt(shape[1])
                values[tensor.name] = rng.uniform(-bound, bound, shape).astype(np.float32)
            elif tensor.role == "lora_B":
                values[tensor.name] = np.zeros(shape, np.float32)
            else:
                values[tensor.name] = self._initial[tensor.name].copy()
        if self._model.deltas:
            values |= no_deltas(space, values)
        if self.adapter.principal_scale is not None:
            values |= principal_start(
                space, self._adapted_weights(), scale=self.adapter.principal_scale
            )
        return values

    def package(
        self,
        *,
        precision: str,
        lowest_trained_layer: int,
        kept_layers: Sequence[int] | None = None,
        runtime: str = "onnx",
        recomputed_layers: Sequence[int] = (),
        kernels: str = "lean",
    ) -> Package:
        """The package of a variant: compiled, verified and published at the first call.

        Raises:
            UnsupportedModelError: Layers out of range, or an operator without a rule.
            VerificationError: A graph disagrees with torch + PEFT; names the tensor.
        """
        if self._training_python is None:
            runtime = "onnx"
        variant = self._variant(
            precision,
            lowest_trained_layer,
            kept_layers,
            runtime,
            recomputed_layers=recomputed_layers,
            kernels=kernels,
        )
        with self._lock:
            if variant not in self._packages:
                self._packages[variant] = self._build(variant)
            return self._packages[variant]

    def predicted_peak_memory(self, step: StepShape, *, baseline_bytes: int) -> int:
        """Predicted peak resident bytes of a device process; see ``footprint``."""
        return self.footprint(step, baseline_bytes=baseline_bytes).total_bytes

    def footprint(self, step: StepShape, *, baseline_bytes: int) -> Footprint:
        """Predicted peak of a device process that trains a variant, part by part.

        Args:
            step: Which variant, and the lengths it runs with.
            baseline_bytes: Resident memory of the app before training.
        """
        variant = self._variant(
            step.precision,
            step.lowest_trained_layer,
            step.kept_layers,
            "onnx",
            recomputed_layers=step.recomputed_layers,
            kernels=step.kernels,
        )
        memory = self._memory_of(variant)
        sizes = self._sizes(step)
        return footprint(
            baseline_bytes=baseline_bytes,
            node_count=memory.node_count,
            weight_bytes=memory.mapped_bytes,
            packed_bytes=memory.packed_bytes,
            adapter_elements=self.adapter_elements(variant, step.rank),
            trained_elements=self.adapter_elements(variant, step.rank, trained=True),
            arena_bytes=memory.arena_bytes(sizes),
            workspace_bytes=memory.lifetimes.peak(sizes).workspace_bytes,
        )

    def adapter_elements(self, variant: Variant, rank: int, *, trained: bool = False) -> int:
        """Numbers in a variant's adapter at a rank, or in the part of it that trains."""
        tensors = adapter_of(self._model.tensors, variant, self.layer_count)
        ranks = self._delta_ranks()
        return sum(
            int(np.prod([ranks.get(t.module, rank) if n == "rank" else int(n) for n in t.shape]))
            for t in tensors
            if t.trained or not trained
        )

    def bases(self, precisions: Sequence[str]) -> QuantizedBases:
        """The adapted weights at some precisions, and what they read; for corrections."""
        return QuantizedBases(
            digest=self.model_digest,
            precisions=tuple(precisions),
            weights=self._adapted_weight,
            stored=self._stored_weight,
            moments=self._input_moments,
        )

    def base_bytes(self, precision: str) -> int:
        """Bytes of the whole base at a precision, as a device downloads it."""
        with self._lock:
            return sum(blob.size for blob in self._base(precision).layer_blobs.values())

    def flops_per_token(self, lowest_trained_layer: int, kept_layers: Sequence[int]) -> int:
        """Operations of a training step per token, in matrix products with frozen weights.

        Forward passes every kept layer; backward goes down to the lowest trained layer and costs
        as much as forward there, since the frozen weights need no gradient of their own.
        """
        sizes = [0] * self.layer_count
        for name, value in self._frozen.items():
            layer = self._model.architecture.layer_of(name)
            if layer >= 0 and value.ndim == 2:
                sizes[layer] += value.size
        forward = sum(sizes[layer] for layer in kept_layers)
        backward = sum(sizes[layer] for layer in kept_layers if layer >= lowest_trained_layer)
        return 2 * (forward + backward)

    def tokens(self, length: int) -> int:
        """Tokens of an example: its length, or the patches of an image."""
        return self._work.tokens(length)

    def operations(self, layers: Sequence[int], step: StepShape) -> Operations:
        """Forward pass of some layers in one run of the graph; see ``planner.speed``."""
        return self._work.operations(layers, self._sizes(step))

    def logits(
        self,
        adapter: Tensors,
        texts: Sequence[str],
        *,
        lora_scale: float,
        max_length: int,
        batch_size: int = 32,
        kept_layers: Sequence[int] | None = None,
    ) -> Float32:
        """Logits of the fp32 model with an adapter, [texts, classes]; evaluation on the server."""
        tokenizer = self._tokenizer
        assert tokenizer is not None
        kept = tuple(range(self.layer_count)) if kept_layers is None else tuple(kept_layers)
        session = self._evaluation_session(kept)
        inputs = {port.name for port in session.get_inputs()}
        fixed: dict[str, npt.NDArray[np.generic]] = {
            "lora_scale": np.asarray(lora_scale, np.float32),
            **{name: value for name, value in adapter.items() if name in inputs},
        }
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        result = np.zeros((len(texts), len(self._task.labels)), np.float32)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            ids, mask = tokenizer.batch([texts[i] for i in rows], max_length)
            feeds = {"input_ids": ids, "attention_mask": mask, **fixed}
            result[rows] = session.run(["logits"], feeds)[0]
        return result

    def token_losses(
        self,
        adapter: Tensors,
        texts: Sequence[str],
        *,
        lora_scale: float,
        max_length: int,
        batch_size: int = 8,
    ) -> TokenLosses:
        """How well the fp32 model with an adapter foresees texts; evaluation on the server."""
        tokenizer = self._tokenizer
        assert tokenizer is not None
        session = self._evaluation_session(tuple(range(self.layer_count)), "evaluate")
        inputs = {port.name for port in session.get_inputs()}
        fixed = {"lora_scale": np.asarray(lora_scale, np.float32), **adapter}
        total = TokenLosses(loss=0.0, correct=0.0, tokens=0)
        order = sorted(texts, key=len)
        for start in range(0, len(order), batch_size):
            ids, mask = tokenizer.batch(order[start : start + batch_size], max_length)
            feeds = {"input_ids": ids, "attention_mask": mask, **next_tokens(ids, mask), **fixed}
            loss, correct = session.run(
                ["loss", "correct"], {n: v for n, v in feeds.items() if n in inputs}
            )
            total += TokenLosses(float(loss), float(correct), int(feeds["weights"].sum()))
        return total

    def _variant(
        self,
        precision: str,
        lowest: int,
        kept: Sequence[int] | None,
        runtime: str,
        *,
        recomputed_layers: Sequence[int] = (),
        kernels: str = "lean",
    ) -> Variant:
        layers = tuple(range(self.layer_count)) if kept is None else tuple(kept)
        check_kept(layers, self.layer_count)
        return Variant(
            precision=precision,
            lowest_trained_layer=lowest,
            kept_layers=layers,
            runtime=runtime,
            recomputed_layers=tuple(recomputed_layers),
            kernels=kernels,
        )

    def _with_deltas(self, graph: Graph) -> Graph:
        """A forward graph with what the model offers beside its base."""
        if self._model.deltas:
            add_base_deltas(graph, self._model.adapter)
        return graph

    def _sizes(self, step: StepShape) -> dict[str, int]:
        """What the symbols of the graphs' shapes stand for."""
        return {
            "batch": step.micro_batch,
            "length": step.length,
            "rank": step.rank,
            DELTA_RANK: max(self._delta_ranks().values(), default=0),
        }

    def _delta_ranks(self) -> dict[str, int]:
        """Largest rank of each base delta by its module; empty without any."""
        if self.adapter.delta_rank is None:
            return {}
        return largest_delta_ranks(self._model.deltas, self.adapter.delta_rank)

    def _adapted_weights(self) -> Tensors:
        """Frozen weight by LoRA module, [d_out, d_in], as the model folder has it."""
        modules = {t.module for t in self._model.adapter if t.role == "lora_A"}
        return {m: self._model.base_weight(m).detach().numpy() for m in modules}

    def _adapted_weight(self, module: str) -> Float32:
        """Frozen weight of a LoRA module, as the model folder has it."""
        return np.asarray(self._model.base_weight(module).detach().numpy(), np.float32)

    def _stored_weight(self, precision: str, module: str) -> Float32:
        """The same as a device with that precision computes with it."""
        with self._lock:
            return self._base(precision).decoded(f"{module}.base_layer.weight")

    def _input_moments(self) -> dict[str, Float64]:
        """Second moments of what LoRA modules read, on synthetic inputs."""
        self._say("measuring what the adapted layers read")
        with self._lock:
            return input_moments(
                self._forward,
                self._model,
                self._base("fp32"),
                synthetic_batches(self._model),
                adapter=self.initial(1, 0),
                folder=self.blobs.folder,
            )

    def _base(self, precision: str) -> Base:
        if precision not in self._bases:
            self._say(f"converting the base to {precision}")
            self._bases[precision] = store_base(
                self._frozen,
                self._tables,
                self._model.architecture,
                precision,
                self.blobs.put,
                encode_matrix=encode_nested if self._is_progressive else None,
            )
        return self._bases[precision]

    def _patches(self, base: Base, blobs: set[str]) -> tuple[BlobPatch, ...]:
        """Other ways to those blobs of a base; none unless it is progressive."""
        if not self._is_progressive or base.precision not in PROGRESSIVE:
            return ()
        if base.precision not in self._ways:
            [other] = (each for each in PROGRESSIVE if each != base.precision)
            self._ways[base.precision] = base_patches(self._base(other), base, self.blobs.put)
        ways = self._ways[base.precision]
        return tuple(ways[digest] for digest in sorted(blobs) if digest in ways)

    def _train_graph(self, variant: Variant) -> Graph:
        adapter = adapter_of(self._model.tensors, variant, self.layer_count)
        trained = [tensor.name for tensor in adapter if tensor.trained]
        return training_graph(self._forward, self._model, variant, trained)

    def _with_weights(self, variant: Variant) -> tuple[Graph, KernelReport]:
        """The training graph of a variant, reading its base."""
        base = self._base(variant.precision)
        return with_base(self._train_graph(variant), base, variant)

    def _memory_of(self, variant: Variant) -> GraphMemory:
        """What the training graph of a variant needs; kept, while the graph itself is not."""
        with self._lock:
            if variant not in self._memory:
                self._memory[variant] = GraphMemory(self._with_weights(variant)[0])
            return self._memory[variant]

    def _build(self, variant: Variant) -> Package:
        self._say(
            f"compiling {variant.precision}, layers {_ranges(variant.kept_layers)}, "
            f"trained from {variant.lowest_trained_layer}"
        )
        base = self._base(variant.precision)
        adapter = adapter_of(self._model.tensors, variant, self.layer_count)
        trained = [tensor.name for tensor in adapter if tensor.trained]
        if not trained:
            raise UnsupportedModelError(
                f"nothing trains from layer {variant.lowest_trained_layer} on, the head is frozen; "
                f"train from layer {self.layer_count - 1} at the latest"
            )
        probe = make_probe(self._model, base, variant.kept_layers, trained)
        self._say("verifying against torch + PEFT")
        rows, used, facts = self._graphs_of(variant, base, probe)
        blobs = {base.stored[name].blob for name in used}
        manifest = Manifest(
            model=self._folder.name,
            model_digest=self.model_digest,
            architecture=self.architecture,
            layer_count=self.layer_count,
            precision=variant.precision,
            kept_layers=variant.kept_layers,
            lowest_trained_layer=variant.lowest_trained_layer,
            task=self._task,
            graphs=rows,
            adapter=adapter,
            weights=base.manifest_entries(used),
            weight_blobs=tuple(
                ref for _, ref in sorted(base.layer_blobs.items()) if ref.digest in blobs
            ),
            tokenizer=self.blobs.put(self._tokenizer.file_bytes) if self._tokenizer else None,
            probe=self.blobs.put(probe_bundle(probe, {t.name for t in adapter})),
            text=text_input(self._folder, self._model),
            image=image_input(self._folder, self._model),
            cache=cache_shape(self._model) if can_decode(self._model) else None,
            patches=self._patches(base, blobs),
            facts=facts,
        )
        return Package(manifest, self.blobs.put(dump(manifest)))

    def _graphs_of(
        self, variant: Variant, base: Base, probe: Probe
    ) -> tuple[tuple[GraphRow, ...], set[str], dict[str, float]]:
        """The verified graphs of a variant, the frozen tensors they read, and facts about them."""
        python = self._training_python if variant.runtime == "onnx-training" else None
        train, report = self._with_weights(variant)
        blob, worst = self._verified(train, lambda path: check_train_graph(path, probe, python))
        rows = [manifest_graph("train", variant, train, blob, report)]
        used = report.tensors
        plain = replace(variant, runtime="onnx")
        others = {"evaluate": (evaluation_graph, check_evaluate_graph)}
        if self._model.kind.trains_head:
            others["predict"] = (prediction_graph, check_predict_graph)
        for name, (make, check) in others.items():
            forward = make(self._forward, self._model, plain)
            graph, report = with_base(forward, base, plain)
            blob, _ = self._verified(graph, partial(check, probe=probe))
            rows.append(manifest_graph(name, plain, graph, blob, report))
            used |= report.tensors
        if can_decode(self._model):
            whole = decoding_graph(self._decoding(), self._model, variant.kept_layers)
            graph, report = with_base(whole, base, plain)
            blob, _ = self._verified(graph, partial(check_decoding_graph, probe=probe))
            rows.append(manifest_graph("decode", plain, graph, blob, report))
            used |= report.tensors
        flops = self.flops_per_token(variant.lowest_trained_layer, variant.kept_layers)
        return (
            tuple(rows),
            used,
            {
                "verified_relative_error": worst,
                "nodes": float(len(train.nodes)),
                "flops_per_token": float(flops),
            },
        )

    def _decoding(self) -> Graph:
        """The graph that continues texts, exported when first wanted."""
        if self._decoder is None:
            self._say("exporting the decoding graph")
            self._decoder = self._with_deltas(export_decoding(self._model))
        return self._decoder

    def _verified(self, graph: Graph, check: Callable[[Path], float]) -> tuple[BlobRef, float]:
        """Store a graph beside its weights and check it there; it does not stay if it fails."""
        ref = self.blobs.put(to_onnx(graph).SerializeToString(deterministic=True))
        try:
            return ref, check(self.blobs.path(ref.digest))
        except VerificationError:
            self.blobs.remove(ref.digest)
            raise

    def _evaluation_session(
        self, kept: tuple[int, ...], graph: str = "predict"
    ) -> onnxruntime.InferenceSession:
        with self._lock:
            if kept not in self._sessions:
                trains_head = self._model.kind.trains_head
                package = self.package(
                    precision="fp32",
                    lowest_trained_layer=self.layer_count - (0 if trains_head else 1),
                    kept_layers=kept,
                )
                path = self.blobs.path(package.manifest.graph(graph).blob.digest)
                options = onnxruntime.SessionOptions()
                options.log_severity_level = 3
                self._sessions[kept] = onnxruntime.InferenceSession(
                    str(path), options, providers=["CPUExecutionProvider"]
                )
            return self._sessions[kept]


def _weights_digest(folder: Path) -> str:
    """SHA-256 over the folder's weight files."""
    files = sorted((*folder.glob("*.safetensors"), *folder.glob("*.bin")))
    if not files:
        raise UnsupportedModelError(f"{folder} holds no *.safetensors or *.bin weights")
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _ranges(layers: Sequence[int]) -> str:
    """``0-5`` for consecutive layers, else the list."""
    if list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]}-{layers[-1]}"
    return ",".join(map(str, layers))
