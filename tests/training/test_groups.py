"""Rates and decays by patterns over parameter names."""

from __future__ import annotations

import numpy as np
import pytest

from onnxprune.errors import InvalidRecipeError
from onnxprune.training.groups import ParameterGroup, rates_and_decays
from onnxprune.training.parameters import Parameter

ZERO = np.zeros(1, np.float32)
PARAMETERS = {
    n: Parameter(n, ZERO, n.endswith("weight")) for n in ("a.weight", "a.bias", "fc.weight")
}


def test_weights_alone_decay() -> None:
    assert rates_and_decays(PARAMETERS, 0.1, ()) == ({}, {"a.weight": 0.1, "fc.weight": 0.1})
    assert rates_and_decays(PARAMETERS, 0.0, ()) == ({}, {})


def test_the_first_group_that_matches_counts() -> None:
    groups = (ParameterGroup("a.b*", rate=0, decay=0.5), ParameterGroup("a.*", rate=0.5))
    rates, decays = rates_and_decays(PARAMETERS, 0.1, groups)
    assert rates == {"a.weight": 0.5, "a.bias": 0}
    assert decays == {"a.weight": 0.1, "fc.weight": 0.1, "a.bias": 0.5}


def test_a_group_without_parameters_is_an_error() -> None:
    with pytest.raises(InvalidRecipeError, match=r"'head\.\*' matches none of the 3 trained"):
        rates_and_decays(PARAMETERS, 0.1, (ParameterGroup("head.*"),))


@pytest.mark.parametrize("options", [{"rate": -1.0}, {"decay": -0.1}])
def test_negative_numbers_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(InvalidRecipeError, match="is below 0"):
        ParameterGroup("*", **options)
