"""Win rates: counted by hand, and at equal length against an independent fit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastalign.episodes import Verdict
from fastalign.win_rate import RIDGE, fit, length_controlled, win_rate

A, B, NEITHER = (Verdict(1, 0, "a"), Verdict(0, 1, "b"), Verdict(0.5, 0.5, None))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_a_win_rate_counts_abstentions_half_and_failures_not_at_all():
    verdicts = [A, A, A, B, NEITHER, Verdict(0.5, 0.5, None, failed=True)]
    verdicts += [Verdict(0.5, 0.5, None, too_long=True)]
    found = win_rate(verdicts, [(10, 5), (20, 5), (30, 5), (4, 5), (6, 5), (99, 5), (99, 5)])
    assert (found.pairs, found.failed, found.too_long) == (5, 1, 1)
    value = {name: estimate.value for name, estimate in found.overall.items()}
    assert value["win_rate"] == pytest.approx(3.5 / 5)
    assert (value["wins"], value["losses"], value["abstained"]) == (0.6, 0.2, 0.2)
    assert (value["length_a"], value["length_b"]) == (14, 5)
    assert found.figures() | {"length_slope": 0.0} == pytest.approx(
        value | {"pairs": 5, "failed": 1, "too_long": 1, "length_slope": 0.0}
    )


def test_of_nothing_there_is_no_win_rate():
    found = win_rate([Verdict(0.5, 0.5, None, failed=True)], [(1, 2)])
    assert found.figures() == {"pairs": 0, "failed": 1, "too_long": 0}


def by_lbfgs(wins, length, weights):
    """The same regression by torch's LBFGS on the likelihood as it is written."""
    wins, length, weights = (torch.tensor(x, dtype=torch.float64) for x in (wins, length, weights))
    w = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS(
        [w],
        max_iter=500,
        tolerance_grad=1e-12,
        tolerance_change=1e-15,
        line_search_fn="strong_wolfe",
    )

    def closure():
        search.zero_grad()
        p = torch.sigmoid(w[0] + w[1] * length)
        likelihood = wins * p.log() + (1 - wins) * (1 - p).log()
        loss = -(weights * likelihood).sum() + RIDGE / 2 * (w**2).sum()
        loss.backward()
        return loss

    search.step(closure)
    return w.detach().numpy()


@pytest.mark.parametrize("kind", ["noisy", "always wins", "wins when longer", "loses most"])
def test_the_fit_is_that_of_an_independent_optimiser(kind):
    rng = np.random.default_rng(0)
    length = np.tanh(rng.normal(size=60))
    wins = {
        "noisy": rng.integers(0, 3, 60) / 2,
        "always wins": np.ones(60),
        "wins when longer": (length > 0).astype(float),
        "loses most": (rng.random(60) < 0.05).astype(float),
    }[kind]
    # A bootstrap sample's weights, and none of some.
    weights = rng.multinomial(60, np.full(60, 1 / 60), size=3).astype(float)
    for found, row in zip(fit(wins, length, weights), weights, strict=True):
        assert found == pytest.approx(by_lbfgs(wins, length, row), abs=1e-5)


def test_length_is_taken_out_and_nothing_else():
    rng = np.random.default_rng(1)
    difference = rng.normal(80, 100, size=4000)
    at_equal_length, slope = 0.3, 1.5
    theta = np.log(at_equal_length / (1 - at_equal_length))
    wins = rng.random(4000) < sigmoid(theta + slope * np.tanh(difference / difference.std()))
    found, phi = length_controlled(wins.astype(float), difference)
    # Mostly longer, a wins more often than it would at the same length.
    assert wins.mean() > 0.42
    assert found.value == pytest.approx(0.3, abs=0.03) and found.low < 0.3 < found.high
    assert phi == pytest.approx(1.5, abs=0.2)


def test_a_judge_of_length_alone_leaves_an_even_match():
    rng = np.random.default_rng(2)
    difference = rng.normal(120, 100, size=400)
    wins = (difference > 0).astype(float)
    found, phi = length_controlled(wins, difference)
    assert wins.mean() > 0.85
    assert found.low < 0.5 < found.high and phi > 5


def test_without_a_difference_in_length_both_readings_are_one():
    wins = np.array([1, 1, 1, 0, 0.5] * 20)
    for difference in (np.zeros(100), np.full(100, 7.0)):
        found, phi = length_controlled(wins, difference)
        assert found.value == pytest.approx(0.7, abs=1e-3) and phi == 0


@pytest.mark.parametrize(("outcome", "low", "high"), [
    (1.0, 0.025 ** (1 / 20), 1.0),
    (0.0, 0.0, 1 - 0.025 ** (1 / 20)),
    (0.5, 0.025 ** (1 / 20) / 2, 1 - 0.025 ** (1 / 20) / 2),
])  # fmt: skip
def test_outcomes_that_are_all_the_same_do_not_make_it_certain(outcome, low, high):
    difference = np.random.default_rng(5).normal(0, 9, size=40)
    # Twenty prompts with two pairs each are no forty proofs.
    found, _ = length_controlled(np.full(40, outcome), difference, groups=list(range(20)) * 2)
    assert (found.low, found.high) == pytest.approx((low, high))
    assert found.low < found.value < found.high and found.count == 40
    assert found.value == pytest.approx(outcome, abs=0.01)


def test_swapping_the_sides_mirrors_every_figure():
    rng = np.random.default_rng(3)
    lengths = [tuple(pair) for pair in rng.integers(1, 90, (50, 2)).tolist()]
    verdicts = [(A, B, NEITHER)[i] for i in rng.integers(0, 3, 50)]
    mirror = {id(A): B, id(B): A, id(NEITHER): NEITHER}
    one = win_rate(verdicts, lengths).overall
    other = win_rate([mirror[id(v)] for v in verdicts], [(b, a) for a, b in lengths]).overall
    for name in ("win_rate", "length_controlled"):
        assert one[name].value == pytest.approx(1 - other[name].value)
        assert one[name].low == pytest.approx(1 - other[name].high)
    assert one["wins"] == other["losses"] and one["length_a"] == other["length_b"]


def test_prompts_with_several_pairs_are_resampled_whole():
    rng = np.random.default_rng(4)
    verdicts = [(A, B)[i] for i in rng.integers(0, 2, 40)]
    lengths = [tuple(pair) for pair in rng.integers(1, 90, (40, 2)).tolist()]
    once = win_rate(verdicts, lengths).overall
    thrice = win_rate(verdicts * 3, lengths * 3, groups=list(range(40)) * 3).overall
    for name in ("win_rate", "length_a"):
        assert thrice[name].low == pytest.approx(once[name].low)
    # The ridge weighs less among three times as many pairs.
    assert thrice["length_controlled"].low == pytest.approx(once["length_controlled"].low, abs=2e-3)
