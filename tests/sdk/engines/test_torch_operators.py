# SPDX-License-Identifier: Apache-2.0
"""Every operator of the torch engine computes what onnxruntime computes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="graphs of one node are written with onnx")
onnxruntime = pytest.importorskip("onnxruntime", reason="the reference is onnxruntime")
torch = pytest.importorskip("torch", reason="these are the torch engine's operators")

from lorikit.proto.tensors import Array  # noqa: E402
from lorikit.quantization.int4 import Int4Rows  # noqa: E402
from lorikit.quantization.nf4 import NF4  # noqa: E402
from lorikit.sdk._errors import UnsupportedPackageError  # noqa: E402
from lorikit.sdk.engines._torch.operators import MICROSOFT, OPERATORS  # noqa: E402
from lorikit.sdk.engines._torch.program import load_program  # noqa: E402

RNG = np.random.default_rng(5)


def f(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype(np.float32)


def s(value: float) -> Array:
    return np.array(value, np.float32)


def i(*values: int) -> Array:
    return np.array(values, np.int64)


@dataclass
class Case:
    op: str
    inputs: tuple[Array | None, ...]
    attributes: dict[str, Any] = field(default_factory=dict)
    outputs: int = 1
    domain: str = ""
    constants: tuple[int, ...] = ()
    """Positions of inputs that onnxruntime wants as constants."""
    types: dict[int, int] = field(default_factory=dict)
    """Positions of four-bit inputs: ONNX's number of the type; packed bytes, two a byte."""
    tolerance: float = 2e-5
    opset: int = 20

    def __str__(self) -> str:
        shapes = "-".join("x".join(map(str, x.shape)) for x in self.inputs if x is not None)
        options = ",".join(f"{k}={v}" for k, v in self.attributes.items())
        return f"{self.op}({shapes}){options}"


def _elementwise() -> list[Case]:
    x, y = f(3, 4), f(3, 4)
    whole = RNG.integers(-9, 9, (3, 4))
    flags = whole > 0
    unsigned = RNG.integers(0, 2**63, 6, dtype=np.uint64) * 2 + 1
    names = (
        "Abs Ceil Cos Erf Exp Floor HardSwish Identity Neg Reciprocal Relu Round Sigmoid Sign Sin "
        "Softplus Tanh Elu LeakyRelu HardSigmoid Softmax LogSoftmax Gelu"
    )
    return [
        *(Case(name, (x,)) for name in names.split()),
        *(Case(name, (np.abs(x),)) for name in ("Sqrt", "Log")),
        *(Case(name, (x, y)) for name in ("Add", "Sub", "Mul", "Div", "Max", "Min", "Sum")),
        *(Case(name, (x, f(1, 4))) for name in ("Add", "Mul", "Max")),
        *(Case(name, (x, y, f(3, 4))) for name in ("Max", "Min", "Sum")),
        Case("Div", (whole, np.full((3, 4), 4))),
        Case("Mod", (whole, np.full((3, 4), 4))),
        Case("Mod", (whole, np.full((3, 4), -4))),
        Case("Mod", (x, y), {"fmod": 1}),
        Case("Pow", (np.abs(x), np.full(1, 3, np.float32))),
        Case("Pow", (x, i(2))),
        *(Case(n, (x, np.round(x))) for n in ("Equal", "Greater", "Less")),
        *(Case(n, (whole, np.flip(whole, 0).copy())) for n in ("GreaterOrEqual", "LessOrEqual")),
        Case("Equal", (whole, whole.copy())),
        *(Case(name, (flags, ~np.flip(flags, 0))) for name in ("And", "Or", "Xor")),
        Case("Not", (flags,)),
        Case("Where", (flags, x, y)),
        Case("Where", (flags, x, s(0.0))),
        Case("IsNaN", (np.where(flags, x, np.float32(np.nan)),)),
        *(Case("Cast", (x,), {"to": to}) for to in (1, 6, 7, 9, 10, 11)),
        Case("Cast", (whole,), {"to": 1}),
        Case("Cast", (flags,), {"to": 1}),
        Case("CastLike", (whole, x)),
        Case("Clip", (x, s(-0.5), s(1.0))),
        Case("Clip", (x, None, s(0.0))),
        Case("Clip", (x,)),
        Case("Gelu", (x,), {"approximate": "tanh"}),
        Case("Gelu", (x,), domain=MICROSOFT),
        Case("BiasGelu", (x, f(4)), domain=MICROSOFT),
        Case("FastGelu", (x,), domain=MICROSOFT, tolerance=1e-4),
        Case("FastGelu", (x, f(4)), domain=MICROSOFT, tolerance=1e-4),
        Case("QuickGelu", (x,), {"alpha": 1.702}, domain=MICROSOFT),
        Case("Softmax", (f(2, 3, 4),), {"axis": 1}),
        Case("LogSoftmax", (f(2, 3, 4),), {"axis": 0}),
        *(Case(n, (whole, whole[::-1].copy())) for n in ("BitwiseAnd", "BitwiseOr", "BitwiseXor")),
        Case("BitwiseNot", (whole,)),
        *(
            Case("BitShift", (bits, counts), {"direction": way})
            for way in ("LEFT", "RIGHT")
            for bits, counts in (
                (unsigned, np.array([0, 1, 7, 31, 32, 63], np.uint64)),
                (unsigned.astype(np.uint32), np.array([0, 1, 7, 16, 30, 31], np.uint32)),
            )
        ),
        # A hash of counters in whole numbers that wrap around, as dropout masks use it.
        Case("Mul", (RNG.integers(-(2**62), 2**62, 8), RNG.integers(-(2**62), 2**62, 8))),
    ]  # fmt: skip


def _reductions() -> list[Case]:
    x = f(2, 3, 4)
    both = ("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1",
            "ReduceL2", "ReduceLogSumExp", "ReduceSumSquare")  # fmt: skip
    return [
        *(Case(name, (x, i(-1))) for name in both),
        *(Case(name, (x, i(0, 2)), {"keepdims": 0}) for name in both),
        *(Case(name, (x,), {"keepdims": 0}) for name in both),
        Case("ReduceSum", (x, i()), {"noop_with_empty_axes": 1}),
        Case("ReduceSum", (RNG.integers(0, 5, (2, 3)), i(1))),
        Case("ArgMax", (x,), {"axis": 1, "keepdims": 0}),
        Case("ArgMax", (np.ones((2, 3), np.float32),), {"axis": -1}),
        Case("ArgMax", (np.ones((2, 3), np.float32),), {"axis": -1, "select_last_index": 1}),
        Case("ArgMin", (x,), {"axis": 2}),
        Case("CumSum", (x, np.array(1, np.int64))),
        Case("CumSum", (x, np.array(2, np.int64)), {"exclusive": 1, "reverse": 1}),
        Case("CumSum", (RNG.integers(0, 5, (2, 3)), np.array(1, np.int64)), {"exclusive": 1}),
    ]


def _shapes() -> list[Case]:
    x = f(2, 3, 4)
    ids = i(2, 0, -1)
    return [
        Case("Shape", (x,)),
        Case("Shape", (x,), {"start": 1}),
        Case("Shape", (x,), {"start": -2, "end": -1}),
        Case("Size", (x,)),
        Case("Reshape", (x, i(0, -1))),
        Case("Reshape", (x, i(4, 6))),
        Case("Reshape", (f(0, 3), i(3, 0)), {"allowzero": 1}),
        Case("Flatten", (x,), {"axis": 2}),
        Case("Flatten", (x,), {"axis": 0}),
        Case("Squeeze", (f(1, 3, 1), i(0))),
        Case("Squeeze", (f(1, 3, 1),)),
        Case("Unsqueeze", (x, i(-1, 0))),
        Case("Unsqueeze", (np.array(3, np.int64), i(0))),
        Case("Transpose", (x,), {"perm": (2, 0, 1)}),
        Case("Transpose", (x,)),
        Case("Concat", (x, f(2, 1, 4)), {"axis": 1}),
        Case("Split", (x,), {"axis": 2, "num_outputs": 2}, outputs=2),
        Case("Split", (f(2, 5), i(2, 3)), {"axis": 1}, outputs=2),
        Case("Split", (f(5),), {"num_outputs": 2}, outputs=2),
        Case("Slice", (x, i(1), i(3), i(2))),
        Case("Slice", (x, i(0, -1), i(9, -9), i(0, 1), i(1, -1))),
        Case("Slice", (x, i(-3), i(-1), i(-1), i(2))),
        Case("Slice", (x, i(3), i(-(2**62)), i(2), i(-2))),
        Case("Slice", (x, i(1), i(2))),
        Case("Expand", (f(3, 1), i(2, 1, 4))),
        Case("Expand", (f(2, 3), i(1))),
        Case("Tile", (f(2, 3), i(2, 1))),
        Case("Range", (np.array(2, np.int64), np.array(11, np.int64), np.array(3, np.int64))),
        Case("Range", tuple(np.array(v, np.float32) for v in (0, 2, 0.5))),
        Case("ConstantOfShape", (i(2, 3),)),
        Case("ConstantOfShape", (i(2),), {
            "value": onnx.helper.make_tensor("v", onnx.TensorProto.INT64, [1], [7])
        }),
        Case("Constant", (), {
            "value": onnx.helper.make_tensor("v", onnx.TensorProto.FLOAT, [2], [1.5, -2.0])
        }),
        Case("Constant", (), {"value_ints": [3, 4]}),
        Case("OneHot", (i(1, 0, -1), np.array(4, np.int64), np.array([0, 1], np.float32))),
        Case("OneHot", (i(1, 9, -9), np.array(4, np.int64), np.array([2, 5], np.float32)), {
            "axis": 0
        }),
        Case("Trilu", (f(3, 4),)),
        Case("Trilu", (f(2, 3, 3), np.array(-1, np.int64)), {"upper": 0}),
        Case("EyeLike", (f(3, 4),)),
        Case("Pad", (f(2, 3), i(0, 1, 1, 2))),
        Case("Pad", (f(2, 3), i(1, -1), np.array(9, np.float32), i(1))),
        Case("Gather", (x, ids), {"axis": 1}),
        Case("Gather", (x, np.array([[0, 1], [1, 0]]))),
        Case("Gather", (x, np.array(2, np.int64)), {"axis": 1}),
        Case("GatherElements", (f(3, 4), np.array([[0, -1, 2, 1]])), {"axis": 0}),
        Case("GatherND", (x, np.array([[0, 1], [1, -1]]))),
        Case("ScatterElements", (f(3, 4), np.array([[0, -1], [2, 1]]), f(2, 2)), {"axis": 1}),
        Case("ScatterElements", (f(3, 4), np.array([[0, 0, 2, 1]]), f(1, 4)), {
            "axis": 0, "reduction": "add"
        }),
        Case("ScatterND", (f(3, 4), np.array([[2], [0]]), f(2, 4))),
        Case("ScatterND", (f(3, 4), np.array([[2], [2]]), f(2, 4)), {"reduction": "add"}),
        Case("TopK", (f(2, 6), i(3)), outputs=2),
        Case("TopK", (f(2, 6), i(2)), {"largest": 0, "axis": 1}, outputs=2),
    ]  # fmt: skip


def _nf4(rows: int, columns: int) -> tuple[Array, Array]:
    parts = NF4.encode(f(rows, columns)).parts
    return np.asarray(parts["codes"]).reshape(-1), np.asarray(parts["absmax"]).reshape(-1)


def _int4(rows: int, columns: int, block: int) -> tuple[Array, Array]:
    parts = Int4Rows(block).encode(f(rows, columns)).parts
    return np.asarray(parts["codes"]), np.asarray(parts["scale"])


def _products() -> list[Case]:
    codes4, scale4 = _int4(6, 64, 32)
    nbits = {"K": 64, "N": 6, "bits": 4, "block_size": 32}
    bytes8 = RNG.integers(0, 256, (6, 2, 32), dtype=np.uint8)
    table = {"bits": 4, "block_size": 32, "gather_axis": 0, "quantize_axis": 1}
    signed = RNG.integers(-128, 128, (6, 8)).astype(np.int8)
    packed = RNG.integers(0, 256, 24, dtype=np.uint8)
    return [
        Case("MatMul", (f(2, 3, 4), f(4, 5))),
        Case("MatMul", (f(2, 3, 4), f(2, 4, 5))),
        Case("MatMul", (f(4), f(4, 5))),
        *(
            Case("FusedMatMul", (left, right), {"transA": a, "transB": b, "alpha": 0.5},
                 domain=MICROSOFT)
            for a, left in enumerate((f(2, 3, 4), f(2, 4, 3)))
            for b, right in enumerate((f(2, 4, 5), f(2, 5, 4)))
        ),
        Case("FusedMatMul", (f(2, 3, 4), f(5, 4)), {"transB": 1}, domain=MICROSOFT),
        Case("Gemm", (f(3, 4), f(4, 5))),
        Case("Gemm", (f(4, 3), f(5, 4), f(5)), {"transA": 1, "transB": 1}),
        Case("Gemm", (f(3, 4), f(4, 5), f(3, 1)), {"alpha": 0.5, "beta": 2.0}),
        Case("Einsum", (f(2, 3), f(3, 4)), {"equation": "ij,jk->ik"}),
        *(
            Case("MatMulBnb4", (f(*lead, 64), *_nf4(6, 64)),
                 {"K": 64, "N": 6, "block_size": 64, "quant_type": 1}, domain=MICROSOFT,
                 constants=(1, 2))
            for lead in ((3,), (2, 3), (1,))
        ),
        Case("MatMulBnb4", (f(3, 16), *_nf4(6, 16)[:1], np.abs(f(2))),
             {"K": 16, "N": 6, "block_size": 64, "quant_type": 0}, domain=MICROSOFT,
             constants=(1, 2)),
        Case("MatMulBnb4", (np.ones((1, 1), np.float32), *_nf4(6, 64)),
             {"K": 1, "N": 384, "block_size": 64, "quant_type": 1}, domain=MICROSOFT,
             constants=(1, 2)),
        Case("MatMulNBits", (f(2, 3, 64), codes4, scale4.reshape(-1)), nbits, domain=MICROSOFT,
             constants=(1, 2)),
        Case("MatMulNBits", (f(3, 64), codes4, scale4.reshape(-1),
             RNG.integers(0, 256, 6, dtype=np.uint8)), nbits, domain=MICROSOFT,
             constants=(1, 2, 3)),
        Case("MatMulNBits", (f(3, 64), bytes8, np.abs(f(12)) / 100), {**nbits, "bits": 8},
             domain=MICROSOFT, constants=(1, 2), tolerance=2e-4),
        Case("GatherBlockQuantized", (codes4.reshape(6, 32), np.array([[0, 5], [3, 3]]), scale4),
             table, domain=MICROSOFT, constants=(0, 2)),
        Case("GatherBlockQuantized", (bytes8.reshape(6, 64), i(4, 1), np.abs(f(6, 2))),
             {**table, "bits": 8}, domain=MICROSOFT, constants=(0, 2)),
        Case("GatherBlockQuantized", (codes4.reshape(6, 32), i(4, 1), scale4,
             RNG.integers(0, 256, (6, 1), dtype=np.uint8)), table, domain=MICROSOFT,
             constants=(0, 2, 3)),
        Case("DequantizeLinear", (signed, np.abs(f(6))), {"axis": 0}),
        Case("DequantizeLinear", (signed, s(0.1))),
        Case("DequantizeLinear", (signed, np.abs(f(8)), np.arange(8, dtype=np.int8))),
        Case("DequantizeLinear", (signed, np.abs(f(6, 2))), {"axis": 1, "block_size": 4},
             opset=21),
        *(
            Case("DequantizeLinear", (packed, np.abs(f(6, 2))), {"axis": 1, "block_size": 4},
                 opset=21, types={0: kind}, constants=(0,))
            for kind in (onnx.TensorProto.UINT4, onnx.TensorProto.INT4)
        ),
        *(
            Case("GatherBlockQuantized", (packed, i(2, 0), np.abs(f(3, 1))),
                 {"block_size": 16, "gather_axis": 0, "quantize_axis": 1}, domain=MICROSOFT,
                 opset=21, types={0: kind}, constants=(0, 2))
            for kind in (onnx.TensorProto.UINT4, onnx.TensorProto.INT4)
        ),
        Case("QuantizeLinear", (f(3, 4), s(0.02),
             np.array(3, np.int8))),
        Case("QuantizeLinear", (f(3, 4), np.abs(f(4)) / 50)),
    ]  # fmt: skip


def _layers() -> list[Case]:
    x, image = f(2, 3, 8), f(2, 4, 9, 7)
    wide = {"strides": (2, 1), "pads": (1, 0, 2, 1), "dilations": (1, 2)}
    cosine, sine = f(11, 4), f(11, 4)
    return [
        Case("LayerNormalization", (x, f(8), f(8)), {"epsilon": 1e-6}, outputs=3),
        Case("LayerNormalization", (x, f(3, 8)), {"axis": 1}, outputs=3),
        Case("SimplifiedLayerNormalization", (x, f(8)), {"axis": -1, "epsilon": 1e-6}, outputs=2),
        Case("SkipSimplifiedLayerNormalization", (x, f(2, 3, 8), f(8)), {"epsilon": 1e-6},
             outputs=4, domain=MICROSOFT),
        Case("SkipLayerNormalization", (x, f(2, 3, 8), f(8), f(8), f(8)), {"epsilon": 1e-6},
             outputs=4, domain=MICROSOFT),
        Case("BatchNormalization", (image, f(4), f(4), f(4), np.abs(f(4))), {"epsilon": 1e-3}),
        Case("InstanceNormalization", (image, f(4), f(4))),
        Case("Conv", (image, f(6, 4, 3, 3), f(6)), {"pads": (1, 1, 1, 1), "strides": (2, 2)}),
        Case("Conv", (image, f(6, 4, 3, 3)), wide),
        Case("Conv", (image, f(4, 1, 3, 3), f(4)), {"group": 4, "auto_pad": "SAME_UPPER"}),
        Case("Conv", (image, f(4, 1, 2, 2)), {"group": 4, "auto_pad": "SAME_LOWER"}),
        Case("Conv", (image, f(6, 4, 2, 2)), {"auto_pad": "VALID", "strides": (2, 2)}),
        Case("Conv", (f(2, 4, 9), f(6, 4, 3))),
        Case("ConvTranspose", (image, f(4, 6, 3, 3)), {"pads": (1, 1, 1, 1), "strides": (2, 2)}),
        Case("ConvTranspose", (image, f(4, 6, 3, 3)), {"strides": (2, 2), "pads": (1, 0, 1, 1),
             "output_padding": (1, 0)}),
        Case("ConvTranspose", (image, f(4, 1, 3, 3), f(4)), {"group": 4}),
        Case("AveragePool", (image,), {"kernel_shape": (3, 2), "pads": (1, 0, 1, 1)}),
        Case("AveragePool", (image,), {"kernel_shape": (3, 2), "pads": (1, 0, 1, 1),
             "count_include_pad": 1, "strides": (2, 2)}),
        Case("MaxPool", (image,), {"kernel_shape": (3, 3), "pads": (1, 1, 1, 1),
             "strides": (2, 2)}),
        Case("GlobalAveragePool", (image,)),
        Case("GlobalMaxPool", (image,)),
        *(
            Case("RotaryEmbedding", (f(2, 3, 5, 8), place, cosine, sine), options,
                 domain=MICROSOFT)
            for place in (i(4), np.array([[0, 1, 2, 3, 4], [3, 4, 5, 9, 10]]))
            for options in ({}, {"interleaved": 1})
        ),
        Case("RotaryEmbedding", (f(2, 5, 24), np.array([[0, 1, 2, 3, 4]] * 2), cosine, sine),
             domain=MICROSOFT),
        Case("RotaryEmbedding", (f(2, 5, 36), np.array([[0, 1, 2, 3, 4]] * 2), cosine, sine),
             {"num_heads": 3, "rotary_embedding_dim": 8}, domain=MICROSOFT),
    ]  # fmt: skip


CASES = [*_elementwise(), *_reductions(), *_shapes(), *_products(), *_layers()]


def _model(case: Case) -> bytes:
    """A graph of one node, with the inputs that a kernel wants constant as initializers."""
    helper, names, ports, constants = onnx.helper, [], [], []
    for n, array in enumerate(case.inputs):
        names.append("" if array is None else f"x{n}")
        if array is None:
            continue
        if n in case.types:
            rows = 6 if case.op == "DequantizeLinear" else 3
            shape = (rows, 2 * array.size // rows)
            constants.append(
                helper.make_tensor(f"x{n}", case.types[n], shape, array.tobytes(), raw=True)
            )
        elif n in case.constants:
            constants.append(onnx.numpy_helper.from_array(array, f"x{n}"))
        else:
            kind = helper.np_dtype_to_tensor_dtype(array.dtype)
            ports.append(helper.make_tensor_value_info(f"x{n}", kind, array.shape))
    outputs = [f"y{n}" for n in range(case.outputs)]
    node = helper.make_node(case.op, names, outputs, domain=case.domain, **case.attributes)
    infos = [onnx.ValueInfoProto(name=name) for name in outputs]
    graph = helper.make_graph([node], "one", ports, infos, constants)
    opsets = [helper.make_opsetid("", case.opset), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_operator_computes_what_onnxruntime_computes(case: Case, tmp_path: Path) -> None:
    data = _model(case)
    (tmp_path / "graph").write_bytes(data)
    feeds = {
        f"x{n}": array
        for n, array in enumerate(case.inputs)
        if array is not None and n not in case.constants and n not in case.types
    }
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    names = [f"y{n}" for n in range(case.outputs)]
    program = load_program(tmp_path / "graph", {}, torch.device("cpu"))

    wanted = [n for n in names if not (case.op.startswith("Skip") and n in ("y1", "y2"))]
    for mine, theirs in zip(program.run(wanted, feeds), session.run(wanted, feeds), strict=True):
        assert mine.shape == theirs.shape
        assert mine.dtype == theirs.dtype
        # Sums in another order; kernels of onnxruntime approximate some functions.
        np.testing.assert_allclose(mine, theirs, rtol=case.tolerance, atol=case.tolerance)


def test_every_operator_has_a_case() -> None:
    tested = {(case.domain, case.op) for case in CASES}
    # onnxruntime registers its own domain's forms only for types that ours need not know.
    spared = {(MICROSOFT, "DequantizeLinear"), (MICROSOFT, "QuantizeLinear")}
    assert set(OPERATORS) - spared == tested


def test_unknown_operator_is_named(tmp_path: Path) -> None:
    case = Case("MelWeightMatrix", tuple(np.array(v, np.int64) for v in (8, 16, 8000)))
    (tmp_path / "graph").write_bytes(_model(case))
    with pytest.raises(UnsupportedPackageError, match=r"operator 'MelWeightMatrix' .* is unknown"):
        load_program(tmp_path / "graph", {}, torch.device("cpu"))


def test_newer_opset_and_format_are_refused(tmp_path: Path) -> None:
    for change, message in (("opset", r"needs opset 99 .* has 21"), ("ir", "IR version 99")):
        model = onnx.ModelProto.FromString(_model(Case("Relu", (f(2),))))
        if change == "opset":
            model.opset_import[0].version = 99
        else:
            model.ir_version = 99
        (tmp_path / "graph").write_bytes(model.SerializeToString())
        with pytest.raises(UnsupportedPackageError, match=message):
            load_program(tmp_path / "graph", {}, torch.device("cpu"))


def test_values_are_released_after_their_last_use(tmp_path: Path) -> None:
    nodes = [
        onnx.helper.make_node("Add", ["x", "x"], ["a"]),
        onnx.helper.make_node("Mul", ["a", "x"], ["b"]),
        onnx.helper.make_node("Neg", ["b"], ["c"]),
        onnx.helper.make_node("Add", ["b", "c"], ["y"]),
    ]
    port = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2])
    graph = onnx.helper.make_graph(nodes, "four", [port], [onnx.ValueInfoProto(name="y")])
    (tmp_path / "graph").write_bytes(onnx.helper.make_model(graph, ir_version=10, opset_imports=[
        onnx.helper.make_opsetid("", 20)]).SerializeToString())  # fmt: skip
    program = load_program(tmp_path / "graph", {}, torch.device("cpu"))
    assert [step.released for step in program.steps] == [(), ("a", "x"), (), ("b", "c")]


@pytest.mark.parametrize("shape", [(6, 64), (1, 384), (384, 1)])
def test_bitsandbytes_reads_what_our_codec_wrote(shape: tuple[int, int]) -> None:
    kernels = pytest.importorskip("lorikit.sdk.engines._bitsandbytes", reason="needs bitsandbytes")
    encoded = NF4.encode(f(*shape))
    codes, absmax = (torch.tensor(np.asarray(encoded.parts[n])) for n in ("codes", "absmax"))
    values = kernels.dequantized(codes, absmax, shape, block=64, kind="nf4")
    np.testing.assert_array_equal(values.numpy(), NF4.decode(encoded))
