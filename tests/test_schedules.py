"""Schedules: exact at both ends and in the middle, the last update always there, and clear refusals."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.axes.schedules import Cosine, Exponential, Jump, Linear, Power, Schedule, Steps
from secateur.errors import SettingError

CURVES = [Power(3.0), Power(1.0), Linear(), Cosine(), Exponential(5.0), Jump(), Steps()]


def test_the_cubic_ramp_is_exact_at_start_middle_and_end():
    ramp = Schedule(end=0.8, begin=0.0, until=1.0, every=1)
    assert ramp.at(0.0) == 0.0
    assert ramp.at(0.5) == pytest.approx(0.8 * (1 - 1 / 8), abs=1e-15)  # s_f (1 - (1 - 1/2)^3)
    assert ramp.at(1.0) == 0.8
    assert [ramp.value(t, 4) for t in range(5)] == pytest.approx([0.0, 0.4625, 0.7, 0.7875, 0.8], abs=1e-15)


def test_before_and_after_the_window_the_value_stands_still():
    ramp = Schedule(start=0.2, end=0.9, begin=0.25, until=0.75)
    assert ramp.at(0.1) == ramp.at(0.25) == 0.2
    assert ramp.at(0.75) == ramp.at(0.9) == 0.9
    assert ramp.value(0, 100) == 0.2
    assert ramp.value(99, 100) == 0.9


def test_the_last_update_is_at_the_end_of_the_window_whatever_the_interval_divides():
    ramp = Schedule(end=0.9, begin=0.1, until=0.6, every=20)
    assert ramp.updates(100) == [10, 30, 50, 60]
    assert ramp.value(60, 100) == 0.9
    assert [t for t in range(101) if ramp.due(t, 100)] == [10, 30, 50, 60]


def test_an_interval_longer_than_the_window_leaves_its_two_ends():
    assert Schedule(end=0.9, begin=0.2, until=0.5, every=1000).updates(100) == [20, 50]


def test_a_window_of_no_length_is_one_shot():
    ramp = Schedule(end=0.9, begin=0.0, until=0.0)
    assert ramp.updates(100) == [0]
    assert ramp.value(0, 100) == 0.9


def test_a_jump_acts_only_at_its_end():
    jump = Schedule(end=0.9, until=0.5, curve=Jump(), every=10)
    assert [jump.value(t, 100) for t in (0, 10, 49, 50)] == [0.0, 0.0, 0.0, 0.9]


@given(
    st.sampled_from(CURVES),
    st.floats(0, 0.98),
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(1, 400),
    st.integers(1, 300),
)
def test_values_rise_from_start_to_end_and_the_target_is_always_scheduled(curve, end, a, b, steps, every):
    ramp = Schedule(end=end, begin=min(a, b), until=max(a, b), curve=curve, every=every)
    due = [t for t in range(steps + 1) if ramp.due(t, steps)]
    assert due == ramp.updates(steps)
    values = [ramp.value(t, steps) for t in due]
    assert values == sorted(values)
    assert values[-1] == end
    assert all(0 <= v <= end for v in values)


@pytest.mark.parametrize("curve", CURVES)
def test_every_curve_goes_from_nought_to_one(curve):
    assert curve(0.0) == 0
    assert curve(1.0) == pytest.approx(1, abs=1e-12)


def test_a_falling_schedule_serves_other_knobs_when_it_is_meant():
    fraction = Schedule(start=0.5, end=0.005, until=1.0, curve=Cosine(), falling=True)
    assert fraction.at(0.5) == pytest.approx((0.5 + 0.005) / 2)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"begin": 0.8, "until": 0.2}, "begin at 0.8 of training, but it ends at 0.2"),
        ({"until": 1.2}, "training lasts from 0 to 1"),
        ({"begin": -0.1}, "training lasts from 0 to 1"),
        ({"until": 3000}, "Give begin and until as fractions"),
        ({"every": 0}, "an update every 0 steps"),
        ({"every": -5}, "an update every -5 steps"),
        ({"every": 2.5}, "Give a whole number"),
        ({"start": 0.95}, "its end is below its start"),
        ({"end": math.nan}, "its ends are not finite"),
        ({"curve": lambda u: u / 2}, "A curve is 0 at 0 and 1 at 1"),
    ],
)
def test_schedules_that_cannot_work_are_refused(given, says):
    with pytest.raises(SettingError, match=says):
        Schedule(**{"end": 0.9, **given})


@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (0.0, 1.5), (-0.1, 0.5), (0.0, 90)])
def test_values_that_are_not_sparsities_are_refused_where_one_is_needed(start, end):
    with pytest.raises(SettingError, match=r"the fraction removed, in \[0, 1\)"):
        Schedule(start=start, end=end).check_sparsity()


def test_parts_that_are_no_curves_are_refused():
    with pytest.raises(SettingError, match="power is above 0"):
        Power(0)
    with pytest.raises(SettingError, match="rate is above 0"):
        Exponential(-1)


def test_a_ramp_that_leaves_no_time_to_recover_says_so():
    assert Schedule(end=0.9, until=0.9).late() is None
    assert "5% is left to recover in" in Schedule(end=0.9, until=0.95).late()
    assert Schedule(start=0.9, end=0.9, until=1.0).late() is None


def test_a_learning_rate_falls_tenfold_at_half_and_at_three_quarters():
    from secateur.axes.rules import LearningRate

    rate = LearningRate(Steps(at=(0.5, 0.75)))
    assert [rate.factor(step, 8) for step in range(8)] == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])
    with pytest.raises(SettingError, match="moments of the window"):
        Steps(at=(0.75, 0.5))
    with pytest.raises(SettingError, match="moments of the window"):
        Steps(at=(0.0,))
    with pytest.raises(SettingError, match=r"by a factor of 10 "):
        Steps(by=10.0)
