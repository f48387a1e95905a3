"""Run a model piece by piece over calibration batches, so that it may change on the way.

Between two pieces only the tensors that are still needed are held, for every batch. What a whole
run costs is paid once, however often the model is stopped and changed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from onnxprune import runtime
from onnxprune.calibration.editable import Editable
from onnxprune.protos import reads

Array = NDArray[Any]
Tensors = dict[str, Array]


class Walk:
    """A run of `model` over `batches` that stops where it is told; `held[i]` belongs to batch i.

    Args:
        model: what runs; nodes behind `position` may still be changed.
        batches: feeds by input name.
        wanted: tensors that are held until `release` lets them go.
    """

    def __init__(
        self,
        model: Editable,
        batches: Sequence[Mapping[str, Array]],
        wanted: Iterable[str] = (),
        threads: int | None = None,
    ) -> None:
        self.model = model
        self.position = 0
        self.wanted = set(wanted)
        self.threads = threads
        self.held: list[Tensors] = [dict(feeds) for feeds in batches]

    def advance(self, position: int) -> None:
        """Run the nodes up to, but not including, number `position`."""
        if position <= self.position:
            return
        piece = self.model.nodes[self.position : position]
        made = {name for node in piece for name in node.output if name}
        needed = self._needed(position)
        outputs = sorted(made & needed)
        inputs = sorted({n for node in piece for n in reads(node)} & self._known() - made)
        if outputs:
            model = self.model.part(piece, [{n: h[n] for n in inputs} for h in self.held], outputs)
            session = runtime.session(model, threads=self.threads)
            for held in self.held:
                held.update(runtime.run(session, {n: held[n] for n in inputs}, outputs))
        self.position = position
        self._forget(needed)

    def release(self, names: Collection[str]) -> None:
        """These tensors are no longer wanted."""
        self.wanted.difference_update(names)
        self._forget(self._needed(self.position))

    def _known(self) -> set[str]:
        return set(self.held[0]) if self.held else set()

    def _needed(self, position: int) -> set[str]:
        return self.wanted | self.model.read_from(position)

    def _forget(self, needed: set[str]) -> None:
        for held in self.held:
            for name in [n for n in held if n not in needed]:
                del held[name]


def value_info(name: str, arrays: Sequence[Array]) -> onnx.ValueInfoProto:
    """The type of a tensor with these values; dimensions in which they differ are free.

    ONNX Runtime refuses a Resize whose sizes come in a vector of free length.
    """
    kind = helper.np_dtype_to_tensor_dtype(np.asarray(arrays[0]).dtype)
    lengths = zip(*map(np.shape, arrays), strict=True)
    dims = [of[0] if len(set(of)) == 1 else f"{name}.{axis}" for axis, of in enumerate(lengths)]
    return helper.make_tensor_value_info(name, kind, dims)
