"""Put what removed channels contributed on average into the biases of the layers that read them."""

from __future__ import annotations

from dataclasses import dataclass

from onnxprune.calibration.gram import FIRST
from onnxprune.calibration.layerwise import LayerwiseRepair
from onnxprune.calibration.solve import mean_only


@dataclass(frozen=True)
class CompensateBias(LayerwiseRepair):
    """Every layer's mean answer becomes the original's, channel by channel; weights stay.

    Means are taken over outputs, so that borders count, where a constant input meets zero padding
    (the idea of bias correction: Nagel et al., Data-Free Quantization, 2019).
    """

    name = "compensate-bias"
    solver = staticmethod(mean_only)
    sums = FIRST

    rows: int = 65536
