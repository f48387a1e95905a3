"""The types of the pieces in which calibration runs a model."""

from __future__ import annotations

import numpy as np

from onnxprune.calibration.walk import value_info


def test_dimensions_are_free_only_where_batches_differ() -> None:
    info = value_info("sizes", [np.zeros((4, 3)), np.ones((2, 3))])
    dims = info.type.tensor_type.shape.dim
    assert (dims[0].dim_param, dims[1].dim_value) == ("sizes.0", 3)
    assert not value_info("one", [np.array(1)]).type.tensor_type.shape.dim
