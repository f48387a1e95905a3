"""Gradients as plain ONNX operators, for any runtime: `gradient_model`, and a worker made of it."""

from onnxprune.training.autodiff import (  # noqa: F401
    rules_elementwise,
    rules_linear,
    rules_normalize,
    rules_reduce,
    rules_shape,
)
from onnxprune.training.autodiff.tape import RULES, gradient_model

__all__ = ["RULES", "gradient_model"]
