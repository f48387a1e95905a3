"""Random quantized weights, and the text of quantization steps."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

KINDS = {
    "f": onnx.TensorProto.FLOAT,
    "h": onnx.TensorProto.FLOAT16,
    "i8": onnx.TensorProto.INT8,
    "u8": onnx.TensorProto.UINT8,
    "i16": onnx.TensorProto.INT16,
    "u16": onnx.TensorProto.UINT16,
    "i32": onnx.TensorProto.INT32,
    "i4": onnx.TensorProto.INT4,
    "u4": onnx.TensorProto.UINT4,
    "f8": onnx.TensorProto.FLOAT8E4M3FN,
    "i64": onnx.TensorProto.INT64,
    "b": onnx.TensorProto.BOOL,
}
#: Lowest and highest value of random integers; zero points lie in the middle half of them.
RANGES = {
    "b": (0, 1),
    "i8": (-127, 127),
    "u8": (0, 255),
    "i4": (-7, 7),
    "u4": (0, 15),
    "i32": (-900, 900),
}


def weights(spec: str, seed: int = 0) -> list[onnx.TensorProto]:
    """Initializers from "w:i8:8,3 s:f:8 z:u8: to=0,-1": random ones by type and shape.

    Floats that start with "s" are scales (around 0.02), integers that start with "z" zero
    points, with "o" zeros.
    """
    rng = np.random.default_rng(seed)
    found = []
    for word in spec.split():
        if "=" in word:
            name, values = word.split("=")
            found.append(numpy_helper.from_array(np.array([*map(int, values.split(","))]), name))
            continue
        name, kind, dims = word.split(":")
        shape = [int(n) for n in dims.split(",") if n]
        if kind in ("f", "h", "f8"):
            array = rng.uniform(0.01, 0.03, shape) if name[0] == "s" else rng.normal(0, 0.5, shape)
        elif name[0] == "o":
            array = np.zeros(shape)
        else:
            low, high = RANGES.get(kind, (-90, 90))
            if name[0] == "z":
                low, high = (3 * low + high) // 4, (low + 3 * high) // 4
            array = rng.integers(low, high, shape, endpoint=True)
        dtype = helper.tensor_dtype_to_np_dtype(KINDS[kind])
        found.append(numpy_helper.from_array(np.asarray(array).astype(dtype), name))
    return found


def dq(*names: str, zero: bool = True, attributes: str = "") -> str:
    """w = DequantizeLinear(w_q, sw, zw) for each name."""
    return "  ".join(
        f"{n} = DequantizeLinear{attributes}({n}_q, s{n}{f', z{n}' if zero else ''})" for n in names
    )


def steps(source: str, target: str, *, parameters: str = "sa, za") -> str:
    """The activation `source` quantized and dequantized as `target`."""
    return (
        f"{target}_q = QuantizeLinear({source}, {parameters})  "
        f"{target} = DequantizeLinear({target}_q, {parameters})"
    )
