# SPDX-License-Identifier: Apache-2.0
"""onnxruntime's operators read the parts as they are."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

from lorikit.proto.tensors import Array  # noqa: E402  # after the skip
from lorikit.quantization import codec  # noqa: E402
from lorikit.quantization.base import Float32  # noqa: E402


def run(
    operator: str,
    inputs: dict[str, Array],
    weights: dict[str, Array],
    *,
    domain: str = "com.microsoft",
    **attributes: int,
) -> npt.NDArray[np.float32]:
    """Output of one operator; the inputs are fed, the weights are initialisers."""
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    fed = [
        helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape
        )
        for name, array in inputs.items()
    ]
    node = helper.make_node(operator, [*inputs, *weights], ["y"], domain=domain, **attributes)
    graph = helper.make_graph(
        [node],
        "one operator",
        fed,
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.ascontiguousarray(a), name) for name, a in weights.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    result: npt.NDArray[np.float32] = session.run(None, inputs)[0]
    return result


def normal(*shape: int) -> Float32:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def assert_close_product(result: Float32, inputs: Float32, weights: Float32) -> None:
    """Equal to inputs @ weights.T but for float32 sums of a few hundred products."""
    expected = inputs.astype(np.float64) @ weights.astype(np.float64).T
    np.testing.assert_allclose(result, expected, atol=1e-4)


@pytest.mark.parametrize(("name", "kind"), [("fp4", 0), ("nf4", 1)])
@pytest.mark.parametrize("shape", [(48, 128), (7, 64), (33, 192), (6, 32)])
def test_matmul_bnb4_reads_table_codecs(name: str, kind: int, shape: tuple[int, int]) -> None:
    outputs, width = shape
    encoded = codec(name).encode(normal(outputs, width))
    inputs = normal(5, width)
    result = run(
        "MatMulBnb4",
        {"a": inputs},
        {role: encoded.parts[role] for role in ("codes", "absmax")},
        N=outputs,
        K=width,
        block_size=64,
        quant_type=kind,
    )
    assert_close_product(result, inputs, codec(name).decode(encoded))


@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("shape", [(48, 256), (7, 128), (5, 33), (16, 200), (3, 1)])
def test_matmul_nbits_reads_int4_rows(block: int, shape: tuple[int, int]) -> None:
    outputs, width = shape
    weights = codec(f"int4-row{block}")
    encoded = weights.encode(normal(outputs, width))
    assert np.signbit(encoded.parts["scale"].astype(np.float32)).any()
    inputs = normal(5, width)
    result = run(
        "MatMulNBits",
        {"a": inputs},
        {role: encoded.parts[role] for role in ("codes", "scale")},
        N=outputs,
        K=width,
        bits=4,
        block_size=block,
        accuracy_level=1,
    )
    assert_close_product(result, inputs, weights.decode(encoded))


@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("shape", [(48, 256), (7, 128), (5, 33), (16, 200), (3, 1)])
def test_matmul_nbits_reads_int8_rows(block: int, shape: tuple[int, int]) -> None:
    outputs, width = shape
    weights = codec(f"int8-row{block}")
    encoded = weights.encode(normal(outputs, width))
    inputs = normal(5, width)
    result = run(
        "MatMulNBits",
        {"a": inputs},
        {role: encoded.parts[role] for role in ("codes", "scale")},
        N=outputs,
        K=width,
        bits=8,
        block_size=block,
        accuracy_level=1,
    )
    assert_close_product(result, inputs, weights.decode(encoded))


@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("shape", [(50, 256), (7, 128), (5, 33)])
def test_gather_block_quantized_reads_int4_rows(block: int, shape: tuple[int, int]) -> None:
    rows, width = shape
    table = codec(f"int4-row{block}")
    encoded = table.encode(normal(rows, width))
    wanted = np.array([rows - 1, 0, 3, 3], np.int64)
    codes, scale = encoded.parts["codes"], encoded.parts["scale"]
    result = run(
        "GatherBlockQuantized",
        {"data": codes.reshape(rows, -1), "indices": wanted, "scales": scale},
        {},
        bits=4,
        block_size=block,
        gather_axis=0,
        quantize_axis=1,
    )
    np.testing.assert_array_equal(result[:, :width], table.decode(encoded)[wanted])


@pytest.mark.parametrize("shape", [(48, 128), (5, 7), (1, 1)])
def test_dequantize_linear_reads_int8_rows(shape: tuple[int, int]) -> None:
    encoded = codec("int8").encode(normal(*shape))
    result = run(
        "DequantizeLinear",
        {role: encoded.parts[role] for role in ("codes", "scale")},
        {},
        domain="",
        axis=0,
    )
    np.testing.assert_array_equal(result, codec("int8").decode(encoded))


def test_cast_reads_fp16() -> None:
    encoded = codec("fp16").encode(normal(5, 7))
    result = run("Cast", dict(encoded.parts), {}, domain="", to=onnx.TensorProto.FLOAT)
    np.testing.assert_array_equal(result, codec("fp16").decode(encoded))
