"""Win rates from pairwise verdicts, raw and at equal length."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from fastalign.episodes import Verdict
from fastalign.intervals import (
    DRAWS,
    TAILS,
    Estimate,
    Ratio,
    bootstrap,
    resample,
    without_spread,
)

RIDGE = 0.01
# A Newton step goes no further than this; with a ridge every fit ends within a few tens of steps.
_LONGEST_STEP, _STEPS = 1.0, 200


@dataclass(frozen=True)
class WinRate:
    """What :func:`win_rate` found of answers a against answers b.

    Attributes:
        pairs: asked about and answered; the others were ``too_long`` or ``failed``.
        overall: win_rate (an abstention counts half), length_controlled, wins, losses, abstained,
            mass, flipped, first_slot, length_a, length_b.
        length_slope: log-odds of a win that one standard deviation of length brings, before tanh
            flattens it; 0 where no two pairs differ in it.
    """

    pairs: int
    too_long: int
    failed: int
    overall: dict[str, Estimate]
    length_slope: float

    def figures(self) -> dict[str, float]:
        """The figures by name; one that nothing was there to measure on is left out."""
        found = {name: estimate.value for name, estimate in self.overall.items()}
        found |= {"length_slope": self.length_slope}
        counts = {"pairs": self.pairs, "too_long": self.too_long, "failed": self.failed}
        found |= {name: float(count) for name, count in counts.items()}
        return {name: value for name, value in found.items() if math.isfinite(value)}


def win_rate(
    verdicts: Sequence[Verdict],
    lengths: Sequence[tuple[int, int]],
    *,
    groups: Sequence[Hashable] | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> WinRate:
    """How often a wins, with 95 % bootstrap intervals over pairs (or ``groups`` of them, such as
    prompts): both answers to a prompt are resampled together.

    Args:
        verdicts: [n].
        lengths: [n], of a and b in any one unit.
    """
    assert len(verdicts) == len(lengths)
    kept = [i for i, seen in enumerate(verdicts) if not seen.too_long and not seen.failed]
    judged = [verdicts[i] for i in kept]
    wins = np.array([{"a": 1.0, "b": 0.0, None: 0.5}[seen.preferred] for seen in judged])
    length = np.array([lengths[i] for i in kept], dtype=np.float64).reshape(-1, 2)
    of = None if groups is None else [groups[i] for i in kept]
    overall = bootstrap(
        {
            "win_rate": Ratio.of(wins),
            "wins": Ratio.of(wins == 1),
            "losses": Ratio.of(wins == 0),
            "abstained": Ratio.of(wins == 0.5),
            "mass": Ratio.of(np.array([seen.mass for seen in judged]), share=False),
            "flipped": Ratio.of(np.array([seen.flipped for seen in judged])),
            "first_slot": Ratio.of(np.array([seen.first_slot for seen in judged])),
            "length_a": Ratio.of(length[:, 0], share=False),
            "length_b": Ratio.of(length[:, 1], share=False),
        },
        of,
        draws=draws,
        seed=seed,
    )
    controlled, slope = length_controlled(wins, length[:, 0] - length[:, 1], of, draws, seed)
    return WinRate(
        pairs=len(judged),
        too_long=sum(seen.too_long for seen in verdicts),
        failed=sum(seen.failed for seen in verdicts),
        overall={"win_rate": overall.pop("win_rate"), "length_controlled": controlled, **overall},
        length_slope=slope,
    )


def length_controlled(
    wins: np.ndarray,
    difference: np.ndarray,
    groups: Sequence[Hashable] | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> tuple[Estimate, float]:
    """(win rate that is predicted at equal length, slope of the length).

    Length-controlled AlpacaEval (Dubois et al., arXiv 2404.04475, equation 2) without its term for
    the difficulty of an instruction, which takes many models to estimate: P(a wins) =
    sigmoid(theta + phi * tanh(d / std(d))), d being the difference in length, and sigmoid(theta)
    the win rate at d = 0.  A ridge of ``RIDGE`` / 2 on the squares of both keeps them finite where
    a wins always, or exactly when it is longer; it weighs as much as 1/25 of a pair.

    Outcomes that are all the same have no spread to resample, and no length explains any of them:
    their interval is the exact one of the raw win rate (:func:`without_spread`).

    Args:
        wins: float [n], 1, 0 or 1/2.
        difference: float [n], length of a less that of b.
        groups: [n]; units of one group are resampled together.
    """
    if not len(wins):
        return Estimate(math.nan, math.nan, math.nan, 0), math.nan
    spread = difference.std()
    length = np.tanh(difference / spread) if spread > 0 else np.zeros(len(wins))
    theta, phi = fit(wins, length, np.ones((1, len(wins))))[0]
    numbers: dict[Hashable, int] = {}
    labels = range(len(wins)) if groups is None else groups
    index = np.array([numbers.setdefault(label, len(numbers)) for label in labels])
    value = float(_sigmoid(theta))
    if wins.min() == wins.max():
        return Estimate(value, *without_spread(wins[0], len(numbers)), len(wins)), float(phi)
    samples = np.concatenate(
        [fit(wins, length, w[:, index])[:, 0] for w in resample(len(numbers), draws, seed)]
    )
    low, high = (float(x) for x in np.quantile(_sigmoid(samples), TAILS))
    return Estimate(value, low, high, len(wins)), float(phi)


def fit(wins: np.ndarray, length: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(theta, phi) of each weighted ridge logistic regression, float [d, 2], by Newton's method.

    Args:
        wins, length: float [n].
        weights: float [d, n].
    """
    inputs = np.stack([np.ones_like(length), length], axis=1)
    found = np.zeros((len(weights), 2))
    for _ in range(_STEPS):
        p = _sigmoid(found @ inputs.T)
        slope = (weights * (wins - p)) @ inputs - RIDGE * found
        curve = np.einsum("dn,ni,nj->dij", weights * p * (1 - p), inputs, inputs, optimize=True)
        step = np.linalg.solve(curve + RIDGE * np.eye(2), slope[:, :, None])[:, :, 0]
        size = np.linalg.norm(step, axis=1, keepdims=True)
        found += step * np.minimum(1, _LONGEST_STEP / np.maximum(size, 1e-300))
        if size.max() < 1e-10:
            return found
    raise AssertionError(f"the fit did not converge: last step {size.max():.1e}")


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))
