"""Re-solve the weights of a pruned model by ridge regression on the original's answers."""

from __future__ import annotations

from dataclasses import dataclass

from onnxprune.calibration.layerwise import LayerwiseRepair
from onnxprune.calibration.solve import ridge


@dataclass(frozen=True)
class Reconstruct(LayerwiseRepair):
    """Weights and biases of every linear operator are solved anew, layer after layer.

    min |W p + b - z|^2 + ridge |W - W0|^2, with p the (unfolded) input that the pruned model gives,
    z the original's output at the kept channels, W0 the pruned weights (after He, Zhang and Sun,
    Channel Pruning for Accelerating Very Deep Neural Networks, 2017; Kurtic et al., ZipLM, 2023).
    """

    name = "reconstruct"
    solver = staticmethod(ridge)
