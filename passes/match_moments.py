"""Give every channel the mean and variance that it had, where BatchNormalization was folded away.

Exporters fold BatchNormalization into the weights before it. After pruning nothing is left that
could be re-estimated: so the weights are scaled and the biases moved instead.
"""

from __future__ import annotations

from dataclasses import dataclass

from onnxprune.calibration.layerwise import LayerwiseRepair
from onnxprune.calibration.solve import matched


@dataclass(frozen=True)
class MatchMoments(LayerwiseRepair):
    """Each output channel of every linear operator gets the original's mean and variance.

    With a = sqrt(var_original / var_pruned):  W <- a W,  b so that the mean is the original's.
    """

    name = "match-moments"
    solver = staticmethod(matched)
