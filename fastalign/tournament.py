"""Knockout tournaments: the best of several answers to a prompt, by a pairwise judge.

Self-rejection of SELF-JUDGE (arXiv 2402.11253): N answers are shuffled and meet in pairs until one
is left, in N - 1 matches and ceil(log2 N) rounds.  A round of all prompts is one call of the judge.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np

from fastalign.episodes import Verdict
from fastalign.judge import Messages, Pair, PairwiseJudge, compare


@dataclass(frozen=True)
class Contest:
    """The answers to one prompt, of which one is to be chosen.

    ``index`` decides with the seed how they are shuffled: the number of the prompt in its data.
    """

    prompt: Messages
    texts: Sequence[str]
    tools: Sequence[Mapping[str, Any]] | None = None
    index: int = 0


@dataclass(frozen=True)
class Match:
    """Two answers that met, by their indices into ``Contest.texts``.

    ``a`` is the one that the shuffle put first.  It wins where the verdict prefers neither.
    """

    a: int
    b: int
    verdict: Verdict
    winner: int


@dataclass(frozen=True)
class Bracket:
    """How a contest went; ``dataclasses.asdict`` makes JSON of it.

    Attributes:
        order: the shuffled entrants, indices into ``Contest.texts``.
        rounds: the matches of each round; who is in none of them had a bye.
        winner: index into ``Contest.texts``.
    """

    order: tuple[int, ...]
    rounds: tuple[tuple[Match, ...], ...]
    winner: int


@dataclass(frozen=True)
class Tally:
    """Sums over matches; tallies add up.

    Attributes:
        ties: the judge preferred neither, so that the shuffle decided.
        flipped: the two orders named different winners.
        too_long, failed: not asked about, or not answered: the shuffle decided.
        first_slot_sum, mass_sum: see :class:`~fastalign.episodes.Verdict`, of those judged.
    """

    matches: int = 0
    ties: int = 0
    flipped: int = 0
    too_long: int = 0
    failed: int = 0
    first_slot_sum: float = 0.0
    mass_sum: float = 0.0

    def __add__(self, other: Tally) -> Tally:
        return Tally(*(x + y for x, y in zip(astuple(self), astuple(other), strict=True)))

    @property
    def judged(self) -> int:
        """Matches that the judge was asked about and answered."""
        return self.matches - self.too_long - self.failed

    @property
    def first_slot(self) -> float:
        """How often the answer that is shown first wins; 1/2 is no bias."""
        return self.first_slot_sum / self.judged if self.judged else 0.5

    @property
    def mass(self) -> float:
        """Mean P(A) + P(B) at the decision position, 1 for rules."""
        return self.mass_sum / self.judged if self.judged else 1.0


def play(
    judge: PairwiseJudge, contests: Sequence[Contest], seed: int, *, max_entrants: int = 0
) -> list[Bracket]:
    """The bracket of each contest; what else is in the batch does not change it.

    An odd one out has a bye and stands first in the next round, so that nobody has two.

    Args:
        seed: with a contest's index it decides the shuffle, which pairs the entrants and breaks
            ties.
        max_entrants: for a judge that is collective over ranks: the most texts of any contest on
            any rank.  Every rank then asks as often as the longest tournament needs, if for nothing
            (a rank without contests too).

    Raises:
        ValueError: a contest without texts.
        ConfigError: the judge did not give one verdict for each pair.
    """
    empty = next((contest for contest in contests if not contest.texts), None)
    if empty is not None:
        raise ValueError(f"contest {empty.index} has no texts: it must have at least 1")
    orders = [
        np.random.default_rng((seed, contest.index)).permutation(len(contest.texts)).tolist()
        for contest in contests
    ]
    rows = [list(order) for order in orders]
    played: list[list[tuple[Match, ...]]] = [[] for _ in contests]
    for _ in range(rounds_of(max([max_entrants, *map(len, orders)]))):
        meet = [_pairings(row, order) for row, order in zip(rows, orders, strict=True)]
        pairs = [
            Pair(contest.prompt, contest.texts[a], contest.texts[b], contest.tools)
            for contest, pairings in zip(contests, meet, strict=True)
            for a, b in pairings
        ]
        verdicts = iter(compare(judge, pairs))
        for i, pairings in enumerate(meet):
            matches = tuple(_match(a, b, next(verdicts)) for a, b in pairings)
            if matches:
                played[i].append(matches)
            # The odd one out, if there is one, and then the winners.
            rows[i] = [*rows[i][2 * len(matches) :], *(match.winner for match in matches)]
    return [
        Bracket(tuple(order), tuple(rounds), row[0])
        for order, rounds, row in zip(orders, played, rows, strict=True)
    ]


def rounds_of(entrants: int) -> int:
    """ceil(log2 N) rounds; 0 for one entrant or none."""
    return max(entrants - 1, 0).bit_length()


def _pairings(row: list[int], order: list[int]) -> list[tuple[int, int]]:
    """Neighbours meet; the one that the shuffle put first is a."""
    pairs = zip(row[::2], row[1::2], strict=False)
    return [(a, b) if order.index(a) < order.index(b) else (b, a) for a, b in pairs]


def _match(a: int, b: int, verdict: Verdict) -> Match:
    return Match(a, b, verdict, winner=b if verdict.preferred == "b" else a)


def tally(brackets: Iterable[Bracket]) -> Tally:
    """What happened in all matches together."""
    everything = [m.verdict for bracket in brackets for part in bracket.rounds for m in part]
    judged = [v for v in everything if not v.too_long and not v.failed]
    return Tally(
        matches=len(everything),
        ties=sum(v.preferred is None for v in judged),
        flipped=sum(v.flipped for v in judged),
        too_long=sum(v.too_long for v in everything),
        failed=sum(v.failed and not v.too_long for v in everything),
        first_slot_sum=sum(v.first_slot for v in judged),
        mass_sum=sum(v.mass for v in judged),
    )
