"""Which criterion ranks the channels, and what it says."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np

from onnxprune.analysis import Analysis
from onnxprune.calibration.adapt import adapt
from onnxprune.calibration.inputs import Calibration, limited
from onnxprune.errors import InvalidRecipeError
from onnxprune.options import Options
from onnxprune.passes.score import Scores, criteria, score
from onnxprune.verify import FAILURES

_log = logging.getLogger(__name__)
#: Samples that the measured criteria look at.
SAMPLES = 512


@dataclass(frozen=True)
class Ranked:
    """Importance of every unit; `losses`: these are comparable errors, not shares of a layer."""

    scores: Scores
    losses: bool = False
    notes: tuple[str, ...] = ()


def default_criterion(calibration: Calibration | None) -> str:
    """The error after repair where there are typical inputs to measure it with, else the norm."""
    return "reconstruction" if calibration is not None and calibration.is_typical else "l2"


def rank_units(analysis: Analysis, options: Options, calibration: Calibration | None) -> Ranked:
    """Importance of every unit by the criterion in `options`.

    Raises:
        InvalidRecipeError: no criterion has this name, or it lacks data.
    """
    from onnxprune.passes.criteria import MEASURED, measured

    name = options.criterion
    if name not in MEASURED:
        if name not in criteria():
            known = ", ".join(sorted((*criteria(), *MEASURED)))
            raise InvalidRecipeError(f"no criterion {name!r}: choose one of {known}")
        return Ranked(score(analysis.coupling, name, seed=options.seed))
    if calibration is None:
        raise InvalidRecipeError(f"--criterion {name} measures on inputs: add --data")
    calibration = limited(calibration, analysis.coupling)
    share = max(1, round(len(calibration.batches) * SAMPLES / max(calibration.samples, 1)))
    batches = calibration.batches[:share]
    try:
        adapted = None
        if not calibration.is_real:
            adapted = adapt(analysis.model, batches, threads=options.threads)
        scores = measured(
            analysis.coupling,
            analysis.groups,
            name,
            batches,
            original=adapted.model if adapted else None,
            seed=options.seed,
            threads=options.threads,
        )
    except (*FAILURES, np.linalg.LinAlgError) as failure:
        _log.info("the criterion %s cannot be measured: %s", name, failure)
        note = f"criterion {name} could not be measured ({failure}); l2 was used"
        return Ranked(score(analysis.coupling, "l2", seed=options.seed), notes=(note,))
    return Ranked(scores, losses=name in ("reconstruction", "taylor"))
