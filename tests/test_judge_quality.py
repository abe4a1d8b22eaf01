"""A judge's quality: judges whose every figure is known, and figures computed another way."""

from __future__ import annotations

import hashlib
import json
import math
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support import recipe
from test_judge import episode, scalars
from transformers import AutoModelForCausalLM

from fastalign import judge_quality
from fastalign.config import ConfigError, JudgeConfig, RolloutConfig
from fastalign.episodes import Episode, Verdict
from fastalign.judge import (
    JudgeModel,
    Pair,
    RulePairwiseJudge,
    SelfPairwiseJudge,
    make_judge,
    verdict,
)
from fastalign.judge_quality import (
    calibration,
    compare_blind,
    preferred,
    quality,
    turned,
)
from fastalign.model import load_tokenizer
from fastalign.rollout import ServedModel
from fastalign.rollout.hf import HfEngine
from fastalign.templates import Renderer

USER = ({"role": "user", "content": "the sum"},)
TIE = 1e-3
COUNT = 60


def known_pairs(count: int = COUNT) -> list[Pair]:
    """a is right; it is the longer one in two pairs of three."""
    rng = np.random.default_rng(0)
    return [
        Pair(USER, f"right {i} " + "x" * (9 if i % 3 else 1), f"wrong {i} " + "y" * 5)
        for i in rng.permutation(count).tolist()
    ]


def measured(rule, pairs=None, seed: int = 0, **keys):
    pairs = known_pairs() if pairs is None else pairs
    verdicts = compare_blind(RulePairwiseJudge(rule, TIE), pairs, seed)
    return quality(verdicts, [(len(p.a), len(p.b)) for p in pairs], tie=TIE, seed=seed, **keys)


def coin(*texts: str) -> float:
    """-1 or 1, the same whenever it is thrown for the same texts."""
    return 2.0 * (hashlib.sha256(" ".join(texts).encode()).digest()[0] % 2) - 1


# ------------------------------------------------------------------------------ known judges


def test_a_perfect_judge():
    found = measured(lambda prompt, a, b: a.startswith("right") - b.startswith("right"))
    assert found.figures() == {
        "accuracy": 1, "accuracy_decided": 1, "abstained": 0, "mass": 1, "flipped": 0,
        "first_slot": 0.5, "length_bias": 0, "ece": 0, "ece_limit": 0,
        "prefers_longer": pytest.approx(2 / 3), "longer_is_better": pytest.approx(2 / 3),
        "pairs": COUNT, "too_long": 0, "failed": 0,
    }  # fmt: skip
    # Sixty of sixty do not prove perfection.
    assert found.overall["accuracy"].low ** COUNT == pytest.approx(0.025)
    assert [row.decided.value for row in found.thresholds] == [1] * len(found.thresholds)


def test_a_judge_that_is_always_wrong():
    found = measured(lambda prompt, a, b: b.startswith("right") - a.startswith("right"))
    figures = found.figures()
    assert (figures["accuracy"], figures["accuracy_decided"], figures["ece"]) == (0, 0, 1)
    assert figures["prefers_longer"] == pytest.approx(1 / 3)
    assert figures["length_bias"] == pytest.approx(-1 / 3)


def test_a_coin_that_sticks_to_its_word():
    found = measured(lambda prompt, a, b: coin(a, b) if a < b else -coin(b, a), known_pairs(300))
    figures, accuracy = found.figures(), found.overall["accuracy"]
    assert (figures["abstained"], figures["flipped"], figures["first_slot"]) == (0, 0, 0.5)
    assert accuracy.low < 0.5 < accuracy.high and 0 < accuracy.value < 1
    # It is as sure of itself as can be, and half right.
    assert figures["ece"] == pytest.approx(1 - figures["accuracy"]) and figures["ece_limit"] == 0


def test_a_coin_for_every_question():
    found = measured(lambda prompt, a, b: coin(a, b), known_pairs(300))
    figures = found.figures()
    # Half of the time it contradicts itself, which leaves nothing to prefer.
    assert figures["abstained"] == figures["flipped"]
    assert found.overall["flipped"].low < 0.5 < found.overall["flipped"].high
    assert found.overall["first_slot"].low < 0.5 < found.overall["first_slot"].high


@pytest.mark.parametrize(("lead", "slot"), [(1, 1.0), (-1, 0.0)])
def test_a_judge_of_slots_decides_nothing(lead, slot):
    found = measured(lambda prompt, a, b: lead)
    figures = found.figures()
    assert figures["first_slot"] == slot and figures["flipped"] == figures["abstained"] == 1
    assert figures["accuracy"] == 0.5
    # What was never decided has no accuracy, no length bias and no calibration.
    missing = {"accuracy_decided", "prefers_longer", "longer_is_better", "length_bias"}
    assert not (missing | {"ece", "ece_limit"}) & figures.keys()
    assert math.isnan(found.overall["accuracy_decided"].value) and not found.calibration.bins


def test_a_judge_of_length():
    found = measured(lambda prompt, a, b: len(a) - len(b))
    figures = found.figures()
    assert figures["prefers_longer"] == 1
    assert figures["longer_is_better"] == figures["accuracy"] == pytest.approx(2 / 3)
    assert figures["length_bias"] == pytest.approx(1 / 3)
    bias = found.overall["length_bias"]
    assert 0 < bias.low < 1 / 3 < bias.high
    # Equal lengths say nothing of it.
    even = [Pair(USER, f"a {i}", f"b {i}") for i in range(10)]
    assert "length_bias" not in measured(lambda prompt, a, b: a < b, even).figures()


def test_a_judge_without_a_number():
    figures = measured(lambda prompt, a, b: math.nan).figures()
    assert (figures["abstained"], figures["accuracy"], figures["flipped"]) == (1, 0.5, 0)


def test_a_model_without_a_number_has_no_decision_mass_either(sharp_llama, tmp_path):
    renderer = Renderer(load_tokenizer(recipe("dpo", sharp_llama, tmp_path)))
    who = SelfPairwiseJudge(
        JudgeConfig(type="self"),
        renderer,
        lambda prompts, ids: np.full((len(prompts), 2), np.nan),
        1000,
    )
    verdicts = compare_blind(who, known_pairs(8), 0)
    found = quality(verdicts, [(1, 2)] * 8, tie=TIE).figures()
    assert (found["abstained"], found["accuracy"], found["mass"]) == (1, 0.5, 0)


def test_intervals_of_a_judges_accuracy_cover():
    """Judges that are right on 70 % of all pairs there are, each measured on 80 of them."""
    covered = 0
    for trial in range(150):
        pairs = [Pair(USER, f"right {trial} {i}", f"wrong {trial} {i}") for i in range(80)]
        draws = np.random.default_rng(trial).random(80) < 0.7
        right = {p.a: bool(x) for p, x in zip(pairs, draws, strict=True)}
        right |= {p.b: not x for p, x in zip(pairs, draws, strict=True)}
        found = measured(
            lambda prompt, a, b, r=right: r[a] - r[b], pairs, trial, draws=300, thresholds=()
        )
        covered += found.overall["accuracy"].low <= 0.7 <= found.overall["accuracy"].high
    assert 0.89 < covered / 150 < 0.99


# ------------------------------------------------------------------------------ what it is shown


class Positional:
    """A judge of the user's own that always names a, and remembers what it saw."""

    def __init__(self) -> None:
        self.seen: list[Pair] = []

    def compare(self, pairs):
        self.seen += pairs
        return [Verdict(1.0, 0.0, "a") for _ in pairs]


def test_a_judge_that_goes_by_position_is_right_half_the_time():
    who, pairs = Positional(), known_pairs()
    verdicts = compare_blind(who, pairs, seed=3)
    assert [v.preferred for v in verdicts].count("a") == len(pairs) // 2
    for pair, shown, seen in zip(pairs, who.seen, verdicts, strict=True):
        # What it named is what it was shown as a.
        named = pair.a if seen.preferred == "a" else pair.b
        assert named == shown.a and {shown.a, shown.b} == {pair.a, pair.b}
        assert (seen.score_a, seen.score_b) == ((1, 0) if seen.preferred == "a" else (0, 1))
    # Another seed exchanges others.
    again = Positional()
    compare_blind(again, pairs, seed=4)
    assert [p.a for p in again.seen] != [p.a for p in who.seen]


def test_what_cannot_be_is_no_preference():
    class Odd:
        def compare(self, pairs):
            return [Verdict(math.nan, 0.2, "b"), Verdict(0.9, 0.1, "a")][: len(pairs)]

    unsound, same = compare_blind(Odd(), [Pair(USER, "x", "y"), Pair(USER, "z", "z")], 0)
    assert (unsound.preferred, unsound.mass, same.preferred) == (None, 0.0, None)
    with pytest.raises(ConfigError, match="Odd gave 2 judgments for 3"):
        compare_blind(Odd(), known_pairs(3), 0)


def test_a_verdict_turned_is_that_of_the_exchanged_pair():
    rng = np.random.default_rng(0)
    for _ in range(20):
        table = rng.dirichlet((1, 1, 1), size=(3, 2))[..., :2]
        seen = verdict(table, TIE)
        # Called the other way round, the second order is the first one.
        other = verdict(table[:, ::-1], TIE)
        assert scalars(turned(seen)) == pytest.approx(scalars(other))
        assert turned(seen).probabilities == other.probabilities
        assert turned(turned(seen)) == seen


# ------------------------------------------------------------------------------ independent figures


def random_verdicts(count: int, principles: int, seed: int = 0) -> list[Verdict]:
    """Of a judge that leans towards a, with some mass elsewhere."""
    rng = np.random.default_rng(seed)
    tables = rng.dirichlet((2, 2, 1), size=(count, principles, 2))[..., :2]
    tables[:, :, 0] = np.sort(tables[:, :, 0])[..., ::-1]
    return [verdict(table, 0.05) for table in tables]


def test_every_figure_is_the_one_that_a_loop_counts():
    verdicts = random_verdicts(90, 3)
    lengths = np.random.default_rng(1).integers(1, 9, (90, 2)).tolist()
    found = quality(verdicts, lengths, tie=0.05, principles=("x", "y", "z"))
    right = decided = flips = first = mass = longer = longer_right = unequal = 0.0
    for seen, (length_a, length_b) in zip(verdicts, lengths, strict=True):
        right += {"a": 1.0, "b": 0.0, None: 0.5}[seen.preferred]
        decided += seen.preferred is not None
        flips += seen.flipped
        for a_first, b_first in seen.probabilities:
            first += ((a_first[0] > a_first[1]) + (b_first[0] > b_first[1])) / 6
            mass += (sum(a_first) + sum(b_first)) / 6
        if seen.preferred is not None and length_a != length_b:
            unequal += 1
            longer += (seen.preferred == "a") == (length_a > length_b)
            longer_right += length_a > length_b
    figures = found.figures()
    abstained = 90 - decided
    expected = {
        "accuracy": right / 90, "accuracy_decided": (right - abstained / 2) / decided,
        "abstained": abstained / 90, "mass": mass / 90, "flipped": flips / 90,
        "first_slot": first / 90, "prefers_longer": longer / unequal,
        "longer_is_better": longer_right / unequal,
        "length_bias": (longer - longer_right) / unequal,
    }  # fmt: skip
    assert {name: figures[name] for name in expected} == pytest.approx(expected)
    assert 0 < abstained < 45 and flips > 0


def test_principles_are_measured_as_if_each_were_the_only_one():
    verdicts = random_verdicts(50, 3)
    lengths = [(3, 4)] * 50
    found = quality(verdicts, lengths, tie=0.05, principles=("x", "y", "z"))
    assert list(found.principles) == ["x", "y", "z"]
    for k, name in enumerate(found.principles):
        alone = [verdict(np.array(v.probabilities)[[k]], 0.05) for v in verdicts]
        assert found.principles[name] == quality(alone, lengths, tie=0.05).overall
    accuracies = {name: e["accuracy"].value for name, e in found.principles.items()}
    assert len(set(accuracies.values())) == 3


def test_a_principle_has_a_truth_of_its_own_where_the_data_say_so():
    verdicts = random_verdicts(40, 2)
    lengths = np.random.default_rng(2).integers(1, 9, (40, 2)).tolist()
    truth = [("a", "b", None)[i % 3] for i in range(40)]
    found = quality(
        verdicts, lengths, tie=0.05, principles=("x", "y"), better={"y": truth}, groups=range(40)
    )
    plain = quality(verdicts, lengths, tie=0.05, principles=("x", "y"))
    assert found.principles["x"] == plain.principles["x"] and found.overall == plain.overall
    credit, longer = [], []
    for seen, where, (length_a, length_b) in zip(verdicts, truth, lengths, strict=True):
        alone = verdict(np.array(seen.probabilities)[[1]], 0.05).preferred
        if where is not None:
            credit.append(0.5 if alone is None else float(alone == where))
            if alone is not None and length_a != length_b:
                longer.append((where == "a") == (length_a > length_b))
    estimates = found.principles["y"]
    assert estimates["accuracy"].value == pytest.approx(np.mean(credit))
    assert estimates["accuracy"].count == len(credit) == 27
    assert estimates["longer_is_better"].value == pytest.approx(np.mean(longer))


@pytest.mark.parametrize("principles", [1, 3])
def test_thresholds_show_what_the_judge_would_have_decided(principles):
    verdicts = random_verdicts(60, principles)
    found = quality(verdicts, [(1, 2)] * 60, tie=0.05, thresholds=(0.0, 0.05, 0.3))
    for row in found.thresholds:
        again = [verdict(np.array(v.probabilities), row.tie) for v in verdicts]
        named = [v.preferred for v in again if v.preferred is not None]
        assert row.decided.value == pytest.approx(len(named) / 60)
        assert row.accuracy.value == pytest.approx(named.count("a") / len(named))
    own = found.thresholds[1]
    assert own.accuracy.value == found.overall["accuracy_decided"].value
    assert found.thresholds[0].decided.value > found.thresholds[2].decided.value
    # A judge that shows no probabilities is decided by its scores.
    bare = Verdict(0.6, 0.4, "a")
    assert [preferred(bare, tie) for tie in (0.1, 0.25)] == ["a", None]


def test_calibration_is_the_gap_between_promise_and_share():
    # A margin of 0.5 promises 0.75; it is right on 60 of 100.
    found = calibration(np.array([0.5] * 60 + [-0.5] * 40))
    (only,) = found.bins
    assert (only.pairs, only.low, only.high, only.confidence) == (100, 0.5, 0.5, 0.75)
    assert only.accuracy == 0.6 and found.ece == pytest.approx(0.15)
    assert only.accuracy_low < 0.6 < only.accuracy_high < 0.75
    # A margin of 0 names nobody.
    assert calibration(np.array([0.5] * 60 + [-0.5] * 40 + [0.0] * 50)) == found


def test_chunks_of_chance_do_not_show_and_bound_the_memory(monkeypatch):
    gaps = np.random.default_rng(7).normal(0.1, 0.3, size=300).clip(-1, 1)
    whole = calibration(gaps)
    monkeypatch.setattr("fastalign.judge_quality._CHUNK", 7 * 300)
    assert calibration(gaps).ece_limit == pytest.approx(whole.ece_limit, abs=1e-12)
    monkeypatch.undo()
    many = np.random.default_rng(7).normal(0.1, 0.3, size=160_000).clip(-1, 1)
    tracemalloc.start()
    calibration(many, draws=20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6


def test_all_thresholds_and_figures_come_from_one_drawing(monkeypatch):
    drawn = []
    real = judge_quality.bootstrap

    def counted(ratios, *rest, **keys):
        drawn.append(list(ratios))
        return real(ratios, *rest, **keys)

    monkeypatch.setattr("fastalign.judge_quality.bootstrap", counted)
    verdicts = random_verdicts(30, 1)
    found = quality(verdicts, [(1, 2)] * 30, tie=0.05)
    assert len(drawn) == 1
    # The same figures as when a threshold is drawn for alone.
    right = np.array([{"a": 1.0, "b": 0.0, None: 0.5}[preferred(v, 0.1)] for v in verdicts])
    alone = real({"x": judge_quality.Ratio.of(right, right != 0.5)}, seed=0)["x"]
    (row,) = [row for row in found.thresholds if row.tie == 0.1]
    assert row.accuracy == alone


def test_bins_and_their_error_are_those_of_a_sort_by_hand():
    rng = np.random.default_rng(5)
    gaps = rng.normal(0.1, 0.3, size=200).clip(-1, 1)
    found = calibration(gaps)
    rows = sorted((abs(gap), gap > 0) for gap in gaps.tolist())
    parts = [rows[i : i + 20] for i in range(0, 200, 20)]
    assert [b.pairs for b in found.bins] == [20] * 10
    error = 0.0
    for part, seen in zip(parts, found.bins, strict=True):
        confidence = sum((1 + margin) / 2 for margin, _ in part) / 20
        share = sum(right for _, right in part) / 20
        assert (seen.low, seen.high) == pytest.approx((part[0][0], part[-1][0]))
        assert (seen.confidence, seen.accuracy) == pytest.approx((confidence, share))
        error += abs(share - confidence) * 20 / 200
    assert found.ece == pytest.approx(error)


def test_a_calibrated_judge_stays_below_the_limit_95_times_in_100():
    rng = np.random.default_rng(6)
    above = 0
    for trial in range(200):
        margin = rng.random(120)
        right = rng.random(120) < (1 + margin) / 2
        found = calibration(np.where(right, margin, -margin), seed=trial, draws=200)
        above += found.ece > found.ece_limit
    assert 0.015 < above / 200 < 0.11


def test_what_was_not_judged_is_left_out_and_counted():
    verdicts = random_verdicts(20, 1)
    lengths = [(i % 7, 3) for i in range(20)]
    missing = [Verdict(0.5, 0.5, None, too_long=True), Verdict(0.5, 0.5, None, failed=True)]
    found = quality([*missing, *verdicts, missing[1]], [(9, 1)] * 2 + lengths + [(9, 1)], tie=0.05)
    alone = quality(verdicts, lengths, tie=0.05)
    assert replace(found, too_long=0, failed=0) == alone
    assert (found.pairs, found.too_long, found.failed) == (20, 1, 2)
    assert all(math.isfinite(x) for x in found.figures().values())


def test_of_no_pairs_there_is_nothing_but_the_count():
    found = quality([Verdict(0.5, 0.5, None, failed=True)], [(1, 2)], tie=TIE)
    assert found.figures() == {"pairs": 0, "too_long": 0, "failed": 1}
    json.dumps(judge_quality.plain(found), allow_nan=False)


def test_a_models_quality_is_what_its_raw_logits_say(sharp_llama, tmp_path):
    renderer = Renderer(load_tokenizer(recipe("dpo", sharp_llama, tmp_path)))
    engine = HfEngine(
        ServedModel(sharp_llama, dtype=torch.float32, max_model_len=512), RolloutConfig()
    )
    config = JudgeConfig(type="self", principles=("wit", "truth"), tie_threshold=0.0)
    pairs = [Pair(USER, f"is one {i}", f"two {i} in") for i in range(9)]
    who = make_judge(config, "pairwise", renderer, JudgeModel(engine))
    found = quality(
        compare_blind(who, pairs, 0), [(1, 2)] * 9, tie=0.0, principles=("wit", "truth")
    )
    model = AutoModelForCausalLM.from_pretrained(sharp_llama)
    token_a, token_b = renderer.decision_ids()
    for principle, estimates in found.principles.items():
        right, mass = [], []
        for pair in pairs:
            score = {pair.a: 0.0, pair.b: 0.0}
            for first, second in ((pair.a, pair.b), (pair.b, pair.a)):
                ids = renderer.judge_prompt_ids(pair.prompt, first, second, principle)
                with torch.no_grad():
                    logits = model(torch.tensor(ids[None].astype(np.int64))).logits[0, -1]
                p = logits.double().softmax(-1)
                score[first] += float(p[token_a])
                score[second] += float(p[token_b])
            right.append(score[pair.a] > score[pair.b])
            mass.append(sum(score.values()) / 2)
        assert estimates["accuracy"].value == pytest.approx(np.mean(right))
        assert estimates["mass"].value == pytest.approx(np.mean(mass), rel=1e-4)


# ------------------------------------------------------------------------------ episode logs


def test_verdicts_survive_the_episode_log(tmp_path: Path):
    seen = (verdict(np.random.default_rng(0).random((2, 2, 2)) / 2, TIE), Verdict(0.5, 0.5, None))
    logged = replace(episode("a", "b"), verdicts=seen)
    assert Episode.from_json(logged.to_json()).verdicts == seen
    # Logs of earlier versions have no probabilities.
    row = json.loads(logged.to_json())
    for old in row["verdicts"]:
        del old["probabilities"]
    bare = tuple(replace(v, probabilities=()) for v in seen)
    assert Episode.from_json(json.dumps(row)).verdicts == bare
