"""Frames between the caller and the worker."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest

from onnxprune.training import wire


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.float32).reshape(2, 3),
        np.array(2.5),
        np.zeros((0, 4), np.int64),
        np.array([True, False]),
        np.arange(12, dtype=np.int32).reshape(3, 4).T,
    ],
    ids=["matrix", "scalar", "empty", "bool", "strided"],
)
def test_arrays_arrive_as_they_were(array: Any) -> None:
    stream = io.BytesIO()
    wire.send(stream, {"op": "step", "lr": 0.5}, {"x": array, "y": array})
    stream.seek(0)
    head, arrays = wire.receive(stream)
    assert head == {"op": "step", "lr": 0.5}
    assert list(arrays) == ["x", "y"]
    assert arrays["x"].dtype == array.dtype
    np.testing.assert_array_equal(arrays["x"], array)


def test_frames_follow_each_other() -> None:
    stream = io.BytesIO()
    wire.send(stream, {"op": "a"})
    wire.send(stream, {"op": "b"}, {"x": np.ones(3)})
    stream.seek(0)
    assert wire.receive(stream) == ({"op": "a"}, {})
    assert wire.receive(stream)[0] == {"op": "b"}


@pytest.mark.parametrize("length", [0, 2, 10, 40])
def test_an_end_within_a_frame_is_noticed(length: int) -> None:
    stream = io.BytesIO()
    wire.send(stream, {"op": "a"}, {"x": np.ones(3)})
    with pytest.raises(EOFError, match="within a frame"):
        wire.receive(io.BytesIO(stream.getvalue()[:length]))
