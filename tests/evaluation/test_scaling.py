"""The fit of loss against compute: a law is found again, and what is none has no fit."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fvdm.evaluation.scaling import PowerLaw, fit_power_law

COMPUTE = np.geomspace(0.1, 1000, 20)


@given(st.floats(0, 1), st.floats(0.05, 2), st.floats(0.1, 1))
def test_a_law_is_found_again(floor, scale, exponent):
    law = PowerLaw(floor, scale, exponent)
    found = fit_power_law(COMPUTE, [law(c) for c in COMPUTE])
    assert found is not None
    for compute in (*COMPUTE, 10 * COMPUTE[-1]):
        assert found(compute) == pytest.approx(law(compute), rel=1e-3)


def test_what_does_not_fall_or_is_too_little_has_no_law():
    assert fit_power_law(COMPUTE, np.linspace(1, 2, 20)) is None
    assert fit_power_law(COMPUTE[:3], [3, 2, 1]) is None
    assert fit_power_law([1, 1, 1, 1], [3, 2, 1, 0.5]) is None
    assert fit_power_law([], []) is None
