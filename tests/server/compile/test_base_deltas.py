# SPDX-License-Identifier: Apache-2.0
"""Base deltas: y = Q(W0) x + D_B (D_A x) + s B A x, in every graph of a package."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from peft import PeftModel
from tests.server.compile.test_architectures import compiler_for

from lorikit.proto.manifest import Manifest
from lorikit.proto.tensors import Tensors
from lorikit.server.compile import Compiler
from lorikit.server.compile.insertion import KINDS, AdapterConfig
from lorikit.server.compile.verify import Probe, check_train_graph, make_probe
from lorikit.server.errors import UnsupportedModelError, VerificationError
from lorikit.server.export import write_adapter
from lorikit.server.methods.base_delta import DELTA_ROLES, largest_delta_ranks, merged_adapter
from lorikit.server.planner.step import StepShape

BERT = ("bert", "sequence-classification")
LLAMA = ("llama", "causal-language-modeling")
WITH_DELTAS = AdapterConfig(delta_rank=8)
S = 2.0


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Compiler:
    """BERT with LoRA also on the pooler, whose product has no axis of tokens."""
    adapter = replace(WITH_DELTAS, targets=("query", "dense"), principal_scale=S)
    return compiler_for(tmp_path_factory.mktemp("bert"), *BERT, adapter)


def random_adapter(compiler: Compiler, *, rank: int, delta_rank: int, seed: int = 0) -> Tensors:
    """Every tensor of the space, all of them non-zero, at ranks of their own."""
    rng = np.random.default_rng(seed)
    adapter: Tensors = {}
    for tensor in compiler.space(rank).tensors:
        own = delta_rank if tensor.role in DELTA_ROLES else rank
        shape = [own if n == "rank" else int(n) for n in tensor.shape]
        adapter[tensor.name] = rng.normal(0, 0.2, shape).astype(np.float32)
    return adapter


@pytest.mark.parametrize(
    ("model_type", "kind"),
    [("deberta-v2", "sequence-classification"), LLAMA],
    ids=["deberta-v2", "llama"],
)
def test_an_architecture_with_base_deltas_agrees_with_torch(
    tmp_path: Path, model_type: str, kind: str
) -> None:
    """The reference has D_B D_A merged into the de-quantised weight, in a probe that is not 0."""
    compiler = compiler_for(tmp_path, model_type, kind, WITH_DELTAS)

    manifest = compiler.package(
        precision="int8", lowest_trained_layer=1, recomputed_layers=(2,)
    ).manifest

    assert manifest.facts["verified_relative_error"] <= 1e-4
    deltas = {t.name for t in manifest.adapter if t.role in DELTA_ROLES}
    modules = {t.module for t in manifest.adapter if t.role == "lora_A"}
    assert deltas == {f"{m}.base_delta_{part}" for m in modules for part in "AB"}
    for graph in manifest.graphs:
        assert deltas <= set(graph.inputs), graph.name


@pytest.mark.parametrize("precision", ["int4", "nf4", "int8", "fp16", "fp32"])
def test_every_precision_agrees_with_torch(compiler: Compiler, precision: str) -> None:
    manifest = compiler.package(
        precision=precision, lowest_trained_layer=2, kept_layers=(0, 2, 3)
    ).manifest

    assert manifest.facts["verified_relative_error"] <= 1e-4
    assert {t.layer for t in manifest.adapter if t.role in DELTA_ROLES} == {-1, 0, 2, 3}


def test_no_delta_trains_at_any_depth(compiler: Compiler) -> None:
    manifest = compiler.package(precision="fp32", lowest_trained_layer=0).manifest

    assert not any(t.trained for t in manifest.adapter if t.role in DELTA_ROLES)
    assert not [name for name in manifest.graph("train").outputs if "base_delta" in name]


def test_the_check_notices_a_delta_that_is_not_in_the_graph(compiler: Compiler) -> None:
    package = compiler.package(precision="fp32", lowest_trained_layer=0)
    manifest = package.manifest
    path = compiler.blobs.path(manifest.graph("train").blob.digest)
    base = compiler._base("fp32")
    trained = [t.name for t in manifest.adapter if t.trained]
    probe = make_probe(compiler._model, base, manifest.kept_layers, trained)
    assert check_train_graph(path, probe) <= 1e-4

    with pytest.raises(VerificationError, match="differs from torch"):
        check_train_graph(path, without_deltas(probe))


def without_deltas(probe: Probe) -> Probe:
    adapter = {n: 0 * v if "base_delta" in n else v for n, v in probe.adapter.items()}
    return replace(probe, adapter=adapter)


def test_a_change_is_that_of_the_weight_by_hand(compiler: Compiler) -> None:
    """Logits with a rank-1 change of one weight are torch's after adding the outer product."""
    manifest = compiler.package(precision="fp32", lowest_trained_layer=0).manifest
    initial = compiler.initial(2, 0)
    adapter = {n: 0 * v if n.endswith("lora_B.weight") else v for n, v in initial.items()}
    module = "bert.encoder.layer.1.intermediate.dense"
    column, row = np.arange(80) / 80, np.linspace(-1, 1, 32)
    adapter[f"{module}.base_delta_B"] = column[:, None].astype(np.float32)
    adapter[f"{module}.base_delta_A"] = row[None].astype(np.float32)
    model = classifier(compiler, adapter)
    model.get_submodule(module).weight.data += torch.from_numpy(np.outer(column, row)).float()

    logits = predicted(compiler, manifest, adapter)

    np.testing.assert_allclose(logits, torch_logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_the_exported_folder_gives_stock_peft_the_logits_of_the_package(
    compiler: Compiler, tmp_path: Path
) -> None:
    """One LoRA of the stacked rank holds delta and adapter, and PEFT knows nothing of either."""
    manifest = compiler.package(precision="fp32", lowest_trained_layer=0).manifest
    adapter = random_adapter(compiler, rank=3, delta_rank=5)
    space = compiler.space(3)
    folder = write_adapter(
        tmp_path / "adapter",
        merged_adapter(space, adapter, 3, scale=S),
        space=space,
        base_model=str(compiler._folder),
        targets=compiler.targets,
        scale=S,
        rank=3,
    )

    model = PeftModel.from_pretrained(classifier(compiler, adapter), folder).eval()

    ranks = model.peft_config["default"].rank_pattern
    assert set(ranks.values()) == {3 + 5}
    assert len(ranks) == len(space.pairs())
    package, peft = predicted(compiler, manifest, adapter), torch_logits(model)
    assert np.linalg.norm(package - peft) <= 1e-4 * np.linalg.norm(peft)
    bare = {n: v for n, v in adapter.items() if "base_delta" not in n}
    deltas = {n: 0 * v for n, v in adapter.items() if "base_delta" in n}
    assert np.linalg.norm(predicted(compiler, manifest, bare | deltas) - peft) > 0.01


def classifier(compiler: Compiler, adapter: Tensors) -> transformers.PreTrainedModel:
    """The stock model of the folder, with the adapter's head."""
    model = transformers.BertForSequenceClassification.from_pretrained(
        compiler._folder, num_labels=3, ignore_mismatched_sizes=True
    ).eval()
    head = {n: torch.from_numpy(v) for n, v in adapter.items() if n.startswith("classifier.")}
    assert set(model.load_state_dict(head, strict=False).unexpected_keys) == set()
    return model


IDS = np.array([[2, 3, 1, 1], [3, 3, 2, 1]], np.int64)


def torch_logits(model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        ids = torch.from_numpy(IDS)
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.numpy()


def predicted(compiler: Compiler, manifest: Manifest, adapter: Mapping[str, object]) -> np.ndarray:
    path = compiler.blobs.path(manifest.graph("predict").blob.digest)
    session = onnxruntime.InferenceSession(str(path))
    feeds = {
        "input_ids": IDS,
        "attention_mask": np.ones_like(IDS),
        "lora_scale": np.asarray(S, np.float32),
        **adapter,
    }
    return session.run(["logits"], feeds)[0]


def test_start_values_hold_deltas_of_zero_and_rank_one(compiler: Compiler) -> None:
    initial = compiler.initial(4, 0)

    for tensor in compiler.space(4).named(*DELTA_ROLES):
        shape = tuple(1 if n == "rank" else n for n in tensor.shape)
        assert initial[tensor.name].shape == shape
        assert not initial[tensor.name].any()


def test_a_principal_start_is_the_best_of_its_rank(compiler: Compiler) -> None:
    """s B A of rank 3 leaves the singular values of the frozen weight beyond the third."""
    initial = compiler.initial(3, 0)

    module = "bert.encoder.layer.2.intermediate.dense"
    weight = compiler._model.base_weight(module).detach().numpy()
    product = S * initial[f"{module}.lora_B.weight"] @ initial[f"{module}.lora_A.weight"]
    left = np.linalg.svd(weight - product, compute_uv=False)
    np.testing.assert_allclose(left[:29], np.linalg.svd(weight, compute_uv=False)[3:], atol=1e-5)
    assert weight.shape == (80, 32)


def test_memory_counts_deltas_at_their_largest_rank(compiler: Compiler) -> None:
    """At rank 8, four copies of each number beside what the same graph needs at rank 0."""
    step = StepShape(
        precision="nf4",
        lowest_trained_layer=0,
        kept_layers=(0, 1, 2, 3),
        rank=4,
        micro_batch=2,
        length=16,
    )
    widths = [(t.shape, o.shape) for t, o in compiler.space(4).pairs()]
    variant = compiler._variant("nf4", 0, None, "onnx")

    elements = compiler.adapter_elements(variant, 4)

    lora = sum(4 * (a[1] + b[0]) for a, b in widths)
    deltas = sum(8 * (a[1] + b[0]) for a, b in widths)
    assert elements == lora + deltas + 3 * 32 + 3
    trained = compiler.adapter_elements(variant, 4, trained=True)
    assert trained == elements - deltas  # no gradient, no moments
    used = compiler.footprint(step, baseline_bytes=0)
    assert used.adapter_bytes == 4 * (4 * elements + 5 * trained)


def test_ranks_of_deltas_end_at_the_width_of_the_module(compiler: Compiler) -> None:
    deltas = compiler.space(4).named(*DELTA_ROLES)

    for limit, widest in ((0, 32), (8, 8), (100, 32)):  # the weights are 80 x 32 and 32 x 32
        assert set(largest_delta_ranks(deltas, limit).values()) == {widest}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "lora"])
@pytest.mark.parametrize("change", [{"delta_rank": 4}, {"principal_scale": 2.0}], ids=str)
def test_other_kinds_have_no_base_deltas(kind: str, change: dict[str, float]) -> None:
    with pytest.raises(UnsupportedModelError, match=f"{kind!r} has no base deltas .* fedit"):
        AdapterConfig(kind=kind, **change)
