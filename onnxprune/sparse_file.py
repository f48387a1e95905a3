"""Weights with many zeros as `sparse_initializer`: the file is smaller, what runs is the same."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxprune.graph import FLOATS

#: From this share of zeros on, values with 8-byte positions take less room than all values.
WORTH = 0.7


def with_sparse_initializers(model: onnx.ModelProto, *, worth: float = WORTH) -> onnx.ModelProto:
    """A copy in which initializers with at least a share `worth` of zeros are stored as sparse.

    ONNX Runtime makes them dense again as it loads them.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    inputs = {value.name for value in copy.graph.input}
    for i in reversed(range(len(copy.graph.initializer))):
        tensor = copy.graph.initializer[i]
        if tensor.data_type not in FLOATS or tensor.name in inputs or len(tensor.dims) < 2:
            continue
        array = numpy_helper.to_array(tensor)
        if array.size == 0 or float((array == 0).mean()) < worth:
            continue
        copy.graph.sparse_initializer.append(_sparse(tensor, array))
        del copy.graph.initializer[i]
    return copy


def _sparse(tensor: TensorProto, array: np.ndarray) -> onnx.SparseTensorProto:
    flat = array.ravel()
    place = np.flatnonzero(flat)
    values = numpy_helper.from_array(np.ascontiguousarray(flat[place]), tensor.name)
    index = numpy_helper.from_array(place.astype(np.int64), f"{tensor.name}_index")
    return helper.make_sparse_tensor(values, index, list(tensor.dims))
