"""95 % intervals by resampling: the bootstrap, of shares, means and ratios of sums."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 2000
TAILS = (0.025, 0.975)
# Weights held at once: bounds memory, whatever is resampled how often.
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval; NaN where there was nothing to measure it on.

    ``count``: how many units (pairs, prompts) it was measured on.
    """

    value: float
    low: float
    high: float
    count: int

    @property
    def defined(self) -> bool:
        return math.isfinite(self.value)


@dataclass(frozen=True)
class Ratio:
    """sum(numerators) / sum(denominators), both float [n]: one entry a unit.

    ``share``: each unit's ratio lies in [0, 1], 0 and 1 being its bounds.
    """

    numerators: np.ndarray
    denominators: np.ndarray
    share: bool = True

    @classmethod
    def of(
        cls, values: np.ndarray, among: np.ndarray | None = None, *, share: bool = True
    ) -> Ratio:
        """The mean of ``values`` [n] among the units that the bool mask ``among`` [n] names."""
        counted = np.ones(len(values)) if among is None else among.astype(np.float64)
        return cls(np.where(counted > 0, values, 0.0).astype(np.float64), counted, share)


def resample(units: int, draws: int, seed: int) -> Iterator[np.ndarray]:
    """How often each unit is in each bootstrap sample: float64 [d, units], ``draws`` in all."""
    rng = np.random.default_rng(seed)
    step = max(1, _CHUNK // max(units, 1))
    for start in range(0, draws, step):
        size = min(step, draws - start)
        yield rng.multinomial(units, np.full(units, 1 / units), size=size).astype(np.float64)


def bootstrap(
    ratios: Mapping[str, Ratio],
    groups: Sequence[Hashable] | None = None,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Each ratio with its percentile interval, all from the same bootstrap samples.

    A share that is the same in every unit has no spread to resample: see :func:`without_spread`.

    Args:
        groups: [n]; units of one group (pairs with one prompt) are resampled together.
    """
    summed = {name: _by_group(ratio, groups) for name, ratio in ratios.items()}
    if not summed:
        return {}
    tops = np.stack([ratio.numerators for ratio in summed.values()], axis=1)
    bottoms = np.stack([ratio.denominators for ratio in summed.values()], axis=1)
    samples = np.full((0, len(summed)), np.nan)
    if len(tops):
        with np.errstate(invalid="ignore", divide="ignore"):
            samples = np.concatenate(
                [(w @ tops) / (w @ bottoms) for w in resample(len(tops), draws, seed)]
            )
    return {
        name: _estimate(ratio, samples[:, i], int(np.count_nonzero(ratios[name].denominators)))
        for i, (name, ratio) in enumerate(summed.items())
    }


def _by_group(ratio: Ratio, groups: Sequence[Hashable] | None) -> Ratio:
    if groups is None:
        return ratio
    numbers: dict[Hashable, int] = {}
    index = np.array([numbers.setdefault(group, len(numbers)) for group in groups], dtype=np.int64)
    return Ratio(
        np.bincount(index, ratio.numerators, len(numbers)),
        np.bincount(index, ratio.denominators, len(numbers)),
        ratio.share,
    )


def _estimate(ratio: Ratio, samples: np.ndarray, count: int) -> Estimate:
    total = ratio.denominators.sum()
    if not total:
        return Estimate(math.nan, math.nan, math.nan, 0)
    value = float(ratio.numerators.sum() / total)
    # Small samples may draw no unit that counts.
    low, high = (float(x) for x in np.nanquantile(samples, TAILS))
    counted = ratio.denominators != 0
    each = ratio.numerators[counted] / ratio.denominators[counted]
    if ratio.share and each.min() == each.max():
        low, high = without_spread(value, len(each))
    return Estimate(value, low, high, count)


def without_spread(share: float, units: int) -> tuple[float, float]:
    """95 % interval of the mean of shares in [0, 1] that are all the same in ``units`` of them.

    Exact (Clopper and Pearson, 1934): other units are at most 1 - 0.025^(1/n) of all, or so many
    alike would be seen with less than probability 0.025; at worst these are all 0, or all 1.
    """
    others = 1 - TAILS[0] ** (1 / units)
    return share * (1 - others), share + (1 - share) * others


def wilson(right: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of ``right`` successes in ``count`` trials (1927)."""
    z = 1.959963984540054
    share = right / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count**2))
    half /= 1 + z * z / count
    # Rounding may put an end on the wrong side of a share of 0 or 1.
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))
