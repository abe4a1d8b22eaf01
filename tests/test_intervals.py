"""Intervals: they cover what they should, and their ends are those of the textbooks."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fastalign.intervals import Ratio, bootstrap, wilson


def interval(values, among=None, groups=None, share=True, **keys):
    return bootstrap({"x": Ratio.of(np.asarray(values), among, share=share)}, groups, **keys)["x"]


def test_intervals_cover_the_true_mean_about_95_times_in_100():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(400):
        seen = interval(rng.random(80) < 0.7, draws=400, seed=trial)
        covered += seen.low <= 0.7 <= seen.high
    # A percentile interval of 80 coins is a little short; 0.93 is its own share.
    assert 0.90 < covered / 400 < 0.98


def test_intervals_of_ratios_cover_where_few_units_count():
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(400):
        among = rng.random(150) < 0.5
        seen = interval(rng.random(150) < 0.6, among, draws=400, seed=trial)
        assert seen.count == among.sum()
        covered += seen.low <= 0.6 <= seen.high
    assert 0.90 < covered / 400 < 0.98


def test_groups_are_resampled_whole():
    rng = np.random.default_rng(2)
    values = (rng.random(60) < 0.6).astype(float)
    once = interval(values)
    # Every unit four times over says no more than once ...
    groups = np.repeat(np.arange(60), 4).tolist()
    grouped = interval(np.repeat(values, 4), groups=groups)
    assert (grouped.value, grouped.low, grouped.high) == (once.value, once.low, once.high)
    assert (grouped.count, once.count) == (240, 60)
    # ... which units taken for their own would hide: half the width.
    blind = interval(np.repeat(values, 4))
    assert (blind.high - blind.low) / (once.high - once.low) == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("units", [1, 7, 200])
def test_a_share_without_spread_has_the_exact_bound(units):
    # So low a share gives a sample of ones alone with probability 0.025.
    ones = interval(np.ones(units))
    assert ones.low**units == pytest.approx(0.025) and (ones.value, ones.high) == (1, 1)
    none = interval(np.zeros(units))
    assert (1 - none.high) ** units == pytest.approx(0.025) and (none.value, none.low) == (0, 0)
    # What is no share has no such bound.
    mean = interval(np.ones(units), share=False)
    assert (mean.low, mean.high) == (1, 1)
    # Halves alone: at worst so many others that they are not seen, and all of these 0, or all 1.
    halves = interval(np.full(units, 0.5))
    assert halves.value == 0.5 and halves.high - 0.5 == pytest.approx(0.5 - halves.low)
    assert (2 * halves.low) ** units == pytest.approx(0.025)


def test_nothing_to_measure_is_no_number():
    for seen in (interval(np.zeros(0)), interval(np.ones(5), np.zeros(5, bool))):
        assert math.isnan(seen.value) and not seen.defined and seen.count == 0


def test_chunks_of_samples_do_not_show(monkeypatch):
    values = np.random.default_rng(3).random(30)
    whole = interval(values, draws=500)
    monkeypatch.setattr("fastalign.intervals._CHUNK", 100)
    assert interval(values, draws=500) == whole


@pytest.mark.parametrize(("right", "count"), [(0, 5), (3, 5), (70, 100), (100, 100)])
def test_wilsons_ends_are_where_the_sample_is_1_96_deviations_away(right, count):
    for end in wilson(right, count):
        away = abs(right / count - end)
        deviation = math.sqrt(end * (1 - end) / count)
        assert away == pytest.approx(1.959964 * deviation, abs=1e-6)
