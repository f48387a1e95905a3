"""The errors a caller of onnxprune can meet, one small tree.

Each message says what is wrong, where, and what to do. The command line prints it as one line and
exits with `exit_code`; it never shows a traceback for a mistake in the input.
"""

from __future__ import annotations

from typing import ClassVar


class OnnxPruneError(Exception):
    """Base of every error that onnxprune raises on purpose."""

    exit_code: ClassVar[int] = 2


class InvalidModelError(OnnxPruneError):
    """The model file or proto cannot be read, or holds something onnxprune cannot work with."""


class InvalidDataError(OnnxPruneError):
    """Calibration, training or validation data does not fit the model, or cannot be read."""


class InvalidRecipeError(OnnxPruneError):
    """An option, plan or recipe is malformed or does not fit the model."""


class BudgetError(OnnxPruneError):
    """The asked budget cannot be reached; the message says what can."""

    exit_code: ClassVar[int] = 1


class VerificationError(OnnxPruneError):
    """The pruned model does not do what it should; it is not written."""

    exit_code: ClassVar[int] = 1


class TrainingError(OnnxPruneError):
    """The training worker is missing, failed, or cannot differentiate the model."""
