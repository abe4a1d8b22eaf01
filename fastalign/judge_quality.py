"""How good a pairwise judge is, measured on pairs of which the better answer is known.

No files and no command line: the trainer measures its judge with the same functions.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fastalign.episodes import Verdict
from fastalign.intervals import DRAWS, Estimate, Ratio, bootstrap, wilson
from fastalign.judge import Pair, PairwiseJudge, compare, verdict

THRESHOLDS = (0.0, 0.001, 0.01, 0.05, 0.1, 0.2, 0.5)
"""Tie thresholds that a choice is made from."""
MOST_BINS, PAIRS_PER_BIN = 10, 10
# Random numbers held at once: bounds memory, whatever the number of pairs.
_CHUNK = 1 << 20


# ----------------------------------------------------------------------------------------- asking


def compare_blind(judge: PairwiseJudge, pairs: Sequence[Pair], seed: int) -> list[Verdict]:
    """Verdicts of pairs whose a and b mean something, such as the better and the worse answer.

    Half of the pairs, drawn by the seed, go to the judge with a and b exchanged, and what it says
    of them is turned back: a judge that knows a from b by position alone is right half the time.
    """
    exchanged = np.random.default_rng(seed).permutation(len(pairs)) % 2 == 1
    shown = [
        replace(pair, a=pair.b, b=pair.a) if other else pair
        for pair, other in zip(pairs, exchanged, strict=True)
    ]
    given = compare(judge, shown)
    return [turned(seen) if other else seen for seen, other in zip(given, exchanged, strict=True)]


def turned(seen: Verdict) -> Verdict:
    """The same verdict when a is called b and b is called a."""
    return replace(
        seen,
        score_a=seen.score_b,
        score_b=seen.score_a,
        preferred={"a": "b", "b": "a", None: None}[seen.preferred],
        # Slots stay what they are; the order that began with a now begins with b.
        probabilities=tuple((b_first, a_first) for a_first, b_first in seen.probabilities),
    )


# -------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Bin:
    """Pairs with margins from ``low`` to ``high``: what the judge promises and what it keeps.

    confidence: mean of (1 + margin) / 2; accuracy with its 95 % interval (Wilson's).
    """

    low: float
    high: float
    pairs: int
    confidence: float
    accuracy: float
    accuracy_low: float
    accuracy_high: float


@dataclass(frozen=True)
class Calibration:
    """Whether a margin m = abs(s_a - s_b) is worth what it says, an accuracy of (1 + m) / 2.

    With P(A) + P(B) = 1 that is the better answer's score itself; below 1 the rest is split evenly.
    A margin of exactly 0 names no answer and is left out.

    Attributes:
        bins: of about equal numbers of pairs.
        ece: expected calibration error, the mean of abs(accuracy - confidence) over bins by pairs
            (Guo et al., arXiv 1706.04599; bins of equal mass as in Nixon et al., arXiv 1904.01685).
        ece_limit: what 95 of 100 calibrated judges stay below on as many pairs: bins are never
            quite right by chance.
    """

    bins: tuple[Bin, ...]
    ece: float
    ece_limit: float


@dataclass(frozen=True)
class Threshold:
    """What a tie threshold leaves decided, and how often that is right."""

    tie: float
    decided: Estimate
    accuracy: Estimate


@dataclass(frozen=True)
class Quality:
    """What :func:`quality` found.

    Attributes:
        pairs: asked about and answered; the others were ``too_long`` or ``failed``.
        overall: by name, see :func:`quality`.
        principles: the same for each principle as if it were the only one.
        tie: the threshold that the judge decides by.
    """

    pairs: int
    too_long: int
    failed: int
    tie: float
    overall: dict[str, Estimate]
    principles: dict[str, dict[str, Estimate]]
    calibration: Calibration
    thresholds: tuple[Threshold, ...]

    def figures(self) -> dict[str, float]:
        """The headline figures by name; one that nothing was there to measure on is left out."""
        found = {name: estimate.value for name, estimate in self.overall.items()}
        found |= {"ece": self.calibration.ece, "ece_limit": self.calibration.ece_limit}
        counts = {"pairs": self.pairs, "too_long": self.too_long, "failed": self.failed}
        found |= {name: float(count) for name, count in counts.items()}
        return {name: value for name, value in found.items() if math.isfinite(value)}


def quality(
    verdicts: Sequence[Verdict],
    lengths: Sequence[tuple[int, int]],
    *,
    tie: float,
    principles: Sequence[str] = (),
    better: Mapping[str, Sequence[str | None]] | None = None,
    groups: Sequence[Hashable] | None = None,
    thresholds: Sequence[float] = THRESHOLDS,
    draws: int = DRAWS,
    seed: int = 0,
) -> Quality:
    """Measure a judge on pairs of which a is the better answer (see :func:`compare_blind`).

    Figures, each with a 95 % bootstrap interval over pairs (or ``groups`` of them):

    =====================  =========================================================================
    accuracy               share of pairs with a preferred, an abstention counting half
    accuracy_decided       the same among the pairs that the judge decides
    abstained              share of pairs without a preference
    mass                   mean P(A) + P(B) at the decision position
    flipped                share of pairs whose two orders name different answers
    first_slot             how often the first slot wins, of all questions
    prefers_longer         share of the decided pairs, of unequal length, whose longer one won
    longer_is_better       share of the same pairs whose longer one is the better answer
    length_bias            the difference of the two
    =====================  =========================================================================

    Args:
        verdicts: [n].
        lengths: [n], of a and b in any one unit.
        tie: the judge's threshold, by which single principles are decided too.
        principles: those of the judge, in its order.
        better: for a principle [n], which answer is better by it, "a" or "b"; None leaves the pair
            out of its figures.  A principle that is not there is held against a.
        groups: [n], such as the prompt; pairs of one group are resampled together.
        thresholds: other values of ``tie`` to show the effect of.
        draws: bootstrap samples.
    """
    assert len(verdicts) == len(lengths)
    kept = [i for i, seen in enumerate(verdicts) if not seen.too_long and not seen.failed]
    judged = [verdicts[i] for i in kept]
    longer = np.array([np.sign(lengths[i][0] - lengths[i][1]) for i in kept], dtype=np.float64)
    of = None if groups is None else [groups[i] for i in kept]

    def by_principle(k: int, name: str) -> dict[str, Estimate]:
        truth = better[name] if better is not None and name in better else ["a"] * len(verdicts)
        known = [i for i, where in enumerate(kept) if truth[where] is not None]
        seen = [_by_principle(judged[i], k, tie) for i in known]
        other = np.array([truth[kept[i]] == "b" for i in known], dtype=bool)
        return bootstrap(
            _ratios(
                [turned(v) if is_b else v for v, is_b in zip(seen, other, strict=True)],
                np.where(other, -longer[known], longer[known]),
            ),
            None if of is None else [of[i] for i in known],
            draws=draws,
            seed=seed,
        )

    ratios = _ratios(judged, longer)
    names = list(ratios)
    for tie_of_row in thresholds:
        right = np.array([_credit(preferred(seen, tie_of_row)) for seen in judged])
        ratios[f"decided at {tie_of_row}"] = Ratio.of(right != 0.5)
        ratios[f"accuracy at {tie_of_row}"] = Ratio.of(right, right != 0.5)
    # The samples of many pairs take long to draw: once for all.
    estimates = bootstrap(ratios, of, draws=draws, seed=seed)

    return Quality(
        pairs=len(judged),
        too_long=sum(seen.too_long for seen in verdicts),
        failed=sum(seen.failed for seen in verdicts),
        tie=tie,
        overall={name: estimates[name] for name in names},
        principles={name: by_principle(k, name) for k, name in enumerate(principles)},
        calibration=calibration(
            np.array([seen.score_a - seen.score_b for seen in judged]), seed=seed
        ),
        thresholds=tuple(
            Threshold(t, estimates[f"decided at {t}"], estimates[f"accuracy at {t}"])
            for t in thresholds
        ),
    )


def _ratios(judged: Sequence[Verdict], longer: np.ndarray) -> dict[str, Ratio]:
    right = np.array([_credit(seen.preferred) for seen in judged])
    decided = right != 0.5
    unequal = decided & (longer != 0)
    prefers_longer = np.where(longer > 0, right, 1 - right)
    longer_is_better = longer > 0
    mass = np.array([seen.mass for seen in judged])
    return {
        "accuracy": Ratio.of(right),
        "accuracy_decided": Ratio.of(right, decided),
        "abstained": Ratio.of(~decided),
        "mass": Ratio.of(mass, share=False),
        "flipped": Ratio.of(np.array([seen.flipped for seen in judged])),
        "first_slot": Ratio.of(np.array([seen.first_slot for seen in judged])),
        "prefers_longer": Ratio.of(prefers_longer, unequal),
        "longer_is_better": Ratio.of(longer_is_better, unequal),
        "length_bias": Ratio.of(prefers_longer - longer_is_better, unequal, share=False),
    }


def _credit(name: str | None) -> float:
    return {"a": 1.0, "b": 0.0, None: 0.5}[name]


def _by_principle(seen: Verdict, k: int, tie: float) -> Verdict:
    """What the judge says by its k-th principle alone; as a whole where that is not known."""
    if not seen.probabilities:
        return seen
    return verdict(np.array(seen.probabilities[k : k + 1]), tie)


def preferred(seen: Verdict, tie: float) -> str | None:
    """What the verdict would have been at another tie threshold."""
    if seen.probabilities:
        return verdict(np.array(seen.probabilities), tie).preferred
    gap = seen.score_a - seen.score_b
    if abs(gap) <= tie:
        return None
    return "a" if gap > 0 else "b"


def calibration(gaps: np.ndarray, *, seed: int = 0, draws: int = 1000) -> Calibration:
    """Of score differences s_a - s_b, float [n], where a is the better answer."""
    gaps = gaps[gaps != 0]
    if not len(gaps):
        return Calibration((), math.nan, math.nan)
    confidence = (1 + np.abs(gaps)) / 2
    right = (gaps > 0).astype(np.float64)
    bins = int(np.clip(len(gaps) // PAIRS_PER_BIN, 1, MOST_BINS))
    # Equal margins stay together, whatever that makes of the bins' sizes.
    edges = np.unique(np.quantile(confidence, np.linspace(0, 1, bins + 1)[1:-1]))
    index = np.searchsorted(edges, confidence)
    rng = np.random.default_rng(seed)
    step = max(1, _CHUNK // len(gaps))
    by_chance = np.concatenate(
        [
            _ece(rng.random((min(step, draws - start), len(gaps))) < confidence, confidence, index)
            for start in range(0, draws, step)
        ]
    )
    return Calibration(
        bins=tuple(_bin(right[index == i], confidence[index == i]) for i in np.unique(index)),
        ece=float(_ece(right[None], confidence, index)[0]),
        ece_limit=float(np.quantile(by_chance, 0.95)),
    )


def _ece(right: np.ndarray, confidence: np.ndarray, index: np.ndarray) -> np.ndarray:
    """[draws] of right [draws, n], float or bool."""
    members = np.equal.outer(index, np.unique(index)).astype(np.float64)
    return np.abs((right - confidence) @ members).sum(axis=1) / len(confidence)


def _bin(right: np.ndarray, confidence: np.ndarray) -> Bin:
    low, high = wilson(float(right.sum()), len(right))
    margins = 2 * confidence - 1
    return Bin(
        low=float(margins.min()),
        high=float(margins.max()),
        pairs=len(right),
        confidence=float(confidence.mean()),
        accuracy=float(right.mean()),
        accuracy_low=low,
        accuracy_high=high,
    )


def plain(value: Any) -> Any:
    """Dataclasses and figures as JSON knows them; what is no number becomes null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "__dataclass_fields__"):
        return plain(vars(value))
    return value
