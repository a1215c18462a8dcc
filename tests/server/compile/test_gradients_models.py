# SPDX-License-Identifier: Apache-2.0
"""The gradients of whole exported models against torch autograd, for every parameter."""

from __future__ import annotations

import contextlib
import io
import warnings

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
import transformers
from onnxscript import optimizer

from lorikit.server.compile.cleaning import fuse_linear, merge_equal, remove_dead
from lorikit.server.compile.fusions import fuse_forward
from lorikit.server.compile.gradients import add_gradients
from lorikit.server.compile.graph import Graph, Port
from lorikit.server.compile.onnx_format import OPSET, from_onnx, to_onnx

SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}


def llama() -> transformers.PreTrainedModel:
    """With two key heads for four query heads."""
    config = transformers.LlamaConfig(
        **SHAPE, vocab_size=64, num_key_value_heads=2, attn_implementation="eager"
    )
    return transformers.LlamaForCausalLM(config)


def vit() -> transformers.PreTrainedModel:
    config = transformers.ViTConfig(
        **SHAPE, image_size=16, patch_size=8, num_labels=3, attn_implementation="eager"
    )
    return transformers.ViTForImageClassification(config)


def deberta() -> transformers.PreTrainedModel:
    """With relative positions, content to position and back."""
    config = transformers.DebertaV2Config(
        **SHAPE,
        vocab_size=64,
        relative_attention=True,
        position_buckets=8,
        max_position_embeddings=32,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
        type_vocab_size=0,
    )
    return transformers.DebertaV2ForTokenClassification(config)


def mobilenet() -> transformers.PreTrainedModel:
    config = transformers.MobileNetV2Config(image_size=32, depth_multiplier=0.25, num_labels=3)
    model = transformers.MobileNetV2ForImageClassification(config)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    # One batch gives the statistics; with those of a new model hardly anything gets through.
    model.train()(torch.randn(8, 3, 32, 32))
    return model


class Logits(torch.nn.Module):
    """Text models get a mask, image models pixels alone."""

    def __init__(self, base: torch.nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        if len(inputs) == 1:
            return self.base(pixel_values=inputs[0]).logits
        options = {"use_cache": False} if hasattr(self.base, "lm_head") else {}
        return self.base(input_ids=inputs[0], attention_mask=inputs[1], **options).logits


def exported(model: Logits, inputs: tuple[torch.Tensor, ...], names: list[str]) -> Graph:
    """The forward graph with every parameter as an input."""
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    text = {0: batch, 1: length}
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model,
            inputs,
            dynamo=True,
            optimize=False,
            verbose=False,
            opset_version=OPSET,
            input_names=names,
            output_names=["logits"],
            dynamic_shapes=((text, text) if len(inputs) == 2 else ({0: batch},),),
        )
    assert program is not None
    for name, _ in model.named_parameters():
        if name in program.model.graph.initializers:
            value = program.model.graph.initializers.pop(name)
            value.const_value = None
            program.model.graph.inputs.append(value)
    optimizer.optimize_ir(program.model)
    graph = from_onnx(onnx.shape_inference.infer_shapes(onnx_ir.to_proto(program.model)))
    fuse_linear(graph)
    merge_equal(graph)
    return graph


@pytest.mark.slow
@pytest.mark.parametrize("build", [llama, vit, deberta, mobilenet])
def test_every_parameter_gets_the_gradient_of_autograd(build) -> None:
    torch.manual_seed(0)
    model = Logits(build().eval())
    rng = np.random.default_rng(4)
    if build in (llama, deberta):
        names = ["input_ids", "attention_mask"]
        ids = torch.tensor(rng.integers(1, 60, (3, 6)))
        mask = torch.ones_like(ids)
        mask[1, 4:] = 0
        inputs: tuple[torch.Tensor, ...] = (ids, mask)
    else:
        names = ["pixel_values"]
        side = model.base.config.image_size
        inputs = (torch.tensor(rng.normal(size=(3, 3, side, side)), dtype=torch.float32),)
    graph = exported(model, tuple(value[:2] for value in inputs), names)
    fuse_forward(graph)
    parameters = {n: p for n, p in model.named_parameters() if n in graph.input_names()}
    graph.inputs.append(Port("dy", np.dtype(np.float32), graph.shape("logits")))
    graph.shapes["dy"] = graph.shape("logits")

    add_gradients(graph, {"logits": "dy"}, list(parameters))
    merge_equal(graph)
    remove_dead(graph)

    logits = model(*inputs)
    dy = torch.tensor(rng.normal(size=logits.shape), dtype=torch.float32)
    logits.backward(dy)
    feeds = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
    feeds |= {name: value.detach().numpy() for name, value in parameters.items()}
    session = onnxruntime.InferenceSession(to_onnx(graph).SerializeToString())
    outputs = [port.name for port in session.get_outputs()]
    results = dict(zip(outputs, session.run(outputs, {**feeds, "dy": dy.numpy()}), strict=True))
    np.testing.assert_allclose(results["logits"], logits.detach().numpy(), rtol=1e-4, atol=1e-5)
    largest = max(float(p.grad.norm()) for p in parameters.values())
    for name, parameter in parameters.items():
        difference = np.linalg.norm(results[f"{name}.grad"] - parameter.grad.numpy())
        # The gradient of a key's bias is zero but for rounding, hence the share of the largest.
        assert difference <= 1e-4 * float(parameter.grad.norm()) + 1e-7 * largest, name
