"""Tournaments: who wins, who meets whom, what is asked, and what a useless judge leads to."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import recipe

from fastalign.config import ConfigError, JudgeConfig, RolloutConfig
from fastalign.episodes import Verdict
from fastalign.judge import JudgeModel, RulePairwiseJudge, SelfPairwiseJudge, make_judge
from fastalign.model import load_tokenizer
from fastalign.rollout import ServedModel
from fastalign.rollout.hf import HfEngine
from fastalign.templates import Renderer
from fastalign.tournament import Bracket, Contest, Tally, play, rounds_of, tally

USER = ({"role": "user", "content": "the sum"},)


def contests(*sizes: int) -> list[Contest]:
    """The texts of a contest are the numbers from 0 on."""
    return [
        Contest(USER, [str(number) for number in range(n)], index=i) for i, n in enumerate(sizes)
    ]


def by_strength(strengths: list[int]) -> RulePairwiseJudge:
    """A hidden order of the texts, which the judge follows."""
    return RulePairwiseJudge(lambda prompt, a, b: strengths[int(a)] - strengths[int(b)])


class Rounds:
    """A judge that remembers how many pairs it was asked about in each call."""

    def __init__(self, judge) -> None:
        self.judge, self.calls = judge, []

    def compare(self, pairs):
        self.calls.append(len(pairs))
        return self.judge.compare(pairs)


# ------------------------------------------------------------------------------- who meets whom


@given(
    sizes=st.lists(st.integers(1, 33), min_size=1, max_size=4),
    strengths=st.permutations(range(33)),
    seed=st.integers(0, 2**31),
)
def test_the_strongest_wins_in_as_few_matches_as_there_are_losers(sizes, strengths, seed):
    judge = Rounds(by_strength(strengths))
    brackets = play(judge, contests(*sizes), seed)
    for n, bracket in zip(sizes, brackets, strict=True):
        assert bracket.winner == max(range(n), key=strengths.__getitem__)
        assert sorted(bracket.order) == list(range(n))
        assert len(bracket.rounds) == math.ceil(math.log2(n))
        matches = [match for part in bracket.rounds for match in part]
        losers = [m.b if m.winner == m.a else m.a for m in matches]
        assert sorted([*losers, bracket.winner]) == list(range(n))
        assert byes(bracket) <= Counter(range(n))
    # One call for a round of all contests.
    together = [[b.rounds[r] for b in brackets if r < len(b.rounds)] for r in range(6)]
    assert judge.calls == [sum(map(len, parts)) for parts in together if parts]


def byes(bracket: Bracket) -> Counter[int]:
    """How often each entrant went on without a match; checks that everybody else of a round met."""
    row, found = set(bracket.order), Counter()
    for part in bracket.rounds:
        met = [entrant for match in part for entrant in (match.a, match.b)]
        assert len(met) == len(set(met)) and set(met) <= row and len(row) - len(met) <= 1
        found.update(row - set(met))
        row -= {m.b if m.winner == m.a else m.a for m in part}
    assert row == {bracket.winner}
    return found


def test_five_entrants_by_hand():
    order = np.random.default_rng((3, 0)).permutation(5).tolist()
    first, second, third, fourth, fifth = order
    strengths = [order.index(number) for number in range(5)]
    (bracket,) = play(by_strength(strengths), contests(5), seed=3)
    assert bracket.order == tuple(order)
    # The later in the shuffle the stronger; the fifth has a bye, and stands first afterwards.
    assert [[(m.a, m.b, m.winner) for m in part] for part in bracket.rounds] == [
        [(first, second, second), (third, fourth, fourth)],
        [(second, fifth, fifth)],
        [(fourth, fifth, fifth)],
    ]
    assert [rounds_of(n) for n in (0, 1, 2, 3, 4, 5, 16, 17)] == [0, 0, 1, 2, 2, 3, 4, 5]


def test_what_else_is_played_changes_nothing():
    judge = by_strength(np.random.default_rng(0).permutation(9).tolist())
    everything = contests(5, 9, 1, 2, 8)
    together = play(judge, everything, seed=7)
    backwards = play(judge, everything[::-1], seed=7)[::-1]
    alone = [play(judge, [contest], seed=7)[0] for contest in everything]
    assert together == backwards == alone
    # Another seed is another shuffle, and so is another prompt.
    assert [b.order for b in play(judge, everything, seed=8)] != [b.order for b in together]
    same = play(judge, [Contest(USER, everything[1].texts, index=i) for i in range(4)], seed=7)
    assert len({bracket.order for bracket in same}) == 4


def test_ranks_ask_equally_often():
    """A judge may be collective: a rank with less to play, or nothing, asks as often."""
    for mine in (contests(9), contests(2, 3), contests(1), []):
        judge = Rounds(by_strength(list(range(9))))
        brackets = play(judge, mine, seed=0, max_entrants=9)
        assert len(judge.calls) == 4 and sum(judge.calls) == sum(len(c.texts) - 1 for c in mine)
        assert brackets == play(by_strength(list(range(9))), mine, seed=0)
    judge = Rounds(by_strength([0]))
    assert play(judge, [], seed=0) == [] and judge.calls == []


# --------------------------------------------------------------------------------- what is asked


@pytest.fixture
def renderer(sharp_llama: Path, tmp_path: Path) -> Renderer:
    return Renderer(load_tokenizer(recipe("dpo", sharp_llama, tmp_path)))


class Counting(HfEngine):
    """The embedded engine, counting what it is asked."""

    def next_logprobs(self, prompts, token_ids, adapter=None):
        self.asked = [*getattr(self, "asked", []), len(prompts)]
        return super().next_logprobs(prompts, token_ids, adapter)


@pytest.mark.parametrize("principles", [(), ("honesty", "brevity", "wit")])
def test_a_model_is_asked_twice_per_match_and_principle(sharp_llama, renderer, principles):
    engine = Counting(ServedModel(sharp_llama, torch.float32, 512), RolloutConfig())
    config = JudgeConfig(type="self", principles=principles)
    judge = make_judge(config, "pairwise", renderer, JudgeModel(engine))
    texts = ["is one", "two", "Paris", "two", "seven", "is in", "two"]
    sizes = (7, 4, 1)
    brackets = play(judge, [Contest(USER, texts[:n], index=n) for n in sizes], seed=1)
    each = 2 * max(len(principles), 1)
    # Rounds of 3, 2 and 1 matches, and of 2 and 1.
    assert engine.asked == [(3 + 2) * each, (2 + 1) * each, 1 * each]
    assert sum(engine.asked) == sum(n - 1 for n in sizes) * each
    assert tally(brackets).matches == sum(n - 1 for n in sizes)


# ------------------------------------------------------------------------------- useless judges


def constant(renderer: Renderer, logits: list[float], **keys) -> SelfPairwiseJudge:
    """A model that says the same in either order."""

    def next_logprobs(prompts, ids):
        return np.tile(np.array(logits, np.float32), (len(prompts), 1))

    config = JudgeConfig(type="self", principles=("wit", "honesty"))
    return SelfPairwiseJudge(config, renderer, next_logprobs, **({"max_tokens": 1000} | keys))


@pytest.mark.parametrize(
    ("probabilities", "flipped", "first_slot", "mass"),
    [
        # A pure bias for the first slot, and for the second.
        ((0.7, 0.2), 4, 1.0, 0.9),
        ((0.1, 0.4), 4, 0.0, 0.5),
        ((0.3, 0.3), 0, 0.5, 0.6),
        ((np.nan, 0.2), 0, 0.5, 0.0),
    ],
)
def test_a_judge_that_cannot_tell_leaves_it_to_the_shuffle(
    renderer, probabilities, flipped, first_slot, mass
):
    judge = constant(renderer, np.log(probabilities).tolist())
    (bracket,) = play(judge, contests(5), seed=2)
    assert bracket.winner == bracket.order[0]
    seen = tally([bracket])
    assert (seen.matches, seen.ties, seen.flipped) == (4, 4, flipped)
    assert (seen.first_slot, seen.mass) == pytest.approx((first_slot, mass))
    assert (seen.too_long, seen.failed) == (0, 0)


def test_the_shuffle_is_fair(renderer):
    tie = RulePairwiseJudge(lambda prompt, a, b: 0)
    won = Counter(play(tie, contests(5), seed)[0].winner for seed in range(2000))
    # 400 each, give or take four standard deviations of 18.
    assert set(won) == set(range(5)) and all(abs(count - 400) < 72 for count in won.values())


def test_identical_samples_tie_whatever_the_judge_says(renderer):
    for judge in (
        constant(renderer, np.log([0.7, 0.2]).tolist()),
        RulePairwiseJudge(lambda prompt, a, b: 1),
    ):
        (bracket,) = play(judge, [Contest(USER, ["same"] * 6)], seed=0)
        assert bracket.winner == bracket.order[0]
        assert tally([bracket]).ties == 5


def test_what_is_too_long_or_unanswered_is_counted_apart(renderer):
    texts = ["one", "two", "two " * 60]
    room = len(renderer.judge_prompt_ids(USER, "one", "two", "honesty")) + 10
    judge = constant(renderer, np.log([0.7, 0.2]).tolist(), max_tokens=room)
    brackets = play(judge, [Contest(USER, texts), Contest(USER, texts[:2], index=1)], seed=0)
    seen = tally(brackets)
    assert (seen.matches, seen.ties, seen.flipped) == (3, seen.judged, seen.judged)
    assert seen.too_long >= 1 and seen.judged + seen.too_long == 3
    # What was not asked says nothing of the judge.
    assert seen.mass == pytest.approx(0.9)

    class Silent:
        def compare(self, pairs):
            return [Verdict(0.5, 0.5, None, failed=True, mass=0.0) for _ in pairs]

    (bracket,) = play(Silent(), contests(4), seed=0)
    assert bracket.winner == bracket.order[0]
    assert tally([bracket]) == Tally(matches=3, failed=3)
    assert (tally([bracket]).mass, tally([]).mass) == (1.0, 1.0)


def test_tallies_add_up():
    one, two = play(by_strength([2, 0, 1]), contests(3, 2), seed=0)
    assert tally([one]) + tally([two]) == tally([one, two])
    assert tally([one, two]) == Tally(matches=3, first_slot_sum=1.5, mass_sum=3.0)


class Wrong:
    """A judge of a user's own."""

    def __init__(self, *verdicts: Verdict) -> None:
        self.verdicts = verdicts

    def compare(self, pairs):
        return list(self.verdicts)


def test_a_judge_of_ones_own_that_is_wrong():
    with pytest.raises(ConfigError, match="Wrong gave 2 judgments for 1"):
        play(Wrong(*[Verdict(1, 0, "a")] * 2), contests(2), seed=0)
    # Scores that are no numbers prefer nobody, and are nothing that JSON could not hold.
    nan = float("nan")
    for verdict in (Verdict(nan, 0.5, "b"), Verdict(0.5, 1, "b", mass=nan)):
        (bracket,) = play(Wrong(verdict), contests(2), seed=0)
        assert bracket.winner == bracket.order[0] and tally([bracket]).ties == 1
        json.dumps(asdict(bracket), allow_nan=False)
    with pytest.raises(ValueError, match="contest 4 has no texts: it must have at least 1"):
        play(Wrong(), [Contest(USER, [], index=4)], seed=0)


def test_a_bracket_is_json():
    (bracket,) = play(by_strength([1, 0, 2]), contests(3), seed=0)
    row = json.loads(json.dumps(asdict(bracket), allow_nan=False))
    assert row["winner"] == 2 and row["order"] == list(bracket.order)
    last = row["rounds"][-1][0]
    assert last["winner"] == 2 and {last["a"], last["b"]} > {2}
    scores = last["verdict"]["score_a"], last["verdict"]["score_b"]
    assert scores == ((1, 0) if last["a"] == 2 else (0, 1))
