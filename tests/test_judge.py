"""Judges: verdicts worked out by hand, scores from raw logits, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from chat_server import serving
from support import recipe, rows, write_rows
from transformers import AutoModelForCausalLM

from fastalign import judge
from fastalign.config import ConfigError, JudgeConfig, RolloutConfig
from fastalign.endpoint import Endpoint, JudgeError
from fastalign.episodes import Episode, Verdict
from fastalign.judge import (
    Answer,
    Failed,
    JudgeModel,
    Pair,
    SelfPairwiseJudge,
    judge_metrics,
    judge_pairs,
    judge_written,
    make_judge,
)
from fastalign.model import load_tokenizer
from fastalign.online import check_decision_mass
from fastalign.plugins import load_object
from fastalign.rollout import Rollout, ServedModel
from fastalign.rollout.hf import HfEngine
from fastalign.templates import Renderer
from fastalign.train import train

USER = ({"role": "user", "content": "the sum"},)


# ---------------------------------------------------------------------------------- verdicts


def verdict(*principles, tie: float = 1e-3) -> Verdict:
    """Each principle is (P(A), P(B)) with a shown first, then (P(A), P(B)) with b shown first."""
    return judge.verdict(np.array(principles, dtype=np.float64), tie)


def scalars(seen: Verdict) -> dict[str, object]:
    return {name: value for name, value in vars(seen).items() if name != "probabilities"}


@pytest.mark.parametrize(
    ("orders", "expected"),
    [
        # a wins in both orders: s_a = (.7 + .8) / 2, s_b = (.2 + .1) / 2.
        (((0.7, 0.2), (0.1, 0.8)), Verdict(0.75, 0.15, "a", False, 0.5, 0.9)),
        # b wins in both.
        (((0.1, 0.6), (0.5, 0.2)), Verdict(0.15, 0.55, "b", False, 0.5, 0.7)),
        # The first slot wins in both orders, but more clearly for a: a, and flipped.
        (((0.9, 0.1), (0.6, 0.4)), Verdict(0.65, 0.35, "a", True, 1.0, 1.0)),
        # The second slot wins in both, more clearly for b.
        (((0.1, 0.9), (0.4, 0.6)), Verdict(0.35, 0.65, "b", True, 0.0, 1.0)),
        # Nothing but a bias for the first slot: the same in both orders says nothing of a and b.
        (((0.8, 0.2), (0.8, 0.2)), Verdict(0.5, 0.5, None, True, 1.0, 1.0)),
        (((0.1, 0.3), (0.1, 0.3)), Verdict(0.2, 0.2, None, True, 0.0, 0.4)),
    ],
)
def test_verdicts_of_one_principle(orders, expected):
    seen = verdict(orders)
    assert seen.probabilities == (orders,)
    assert scalars(seen) == pytest.approx(scalars(expected))


def test_scores_within_the_threshold_tie():
    inside = ((0.5 + 4e-4, 0.5), (0.5, 0.5 + 4e-4))
    outside = ((0.5 + 2e-3, 0.5), (0.5, 0.5 + 2e-3))
    assert verdict(inside).preferred is None
    assert verdict(outside).preferred == "a"
    assert verdict(inside, tie=0).preferred == "a"
    # The threshold itself still ties.
    assert verdict(((0.75, 0.25), (0.5, 0.5)), tie=0.25).preferred is None
    assert verdict(((0.75, 0.25), (0.5, 0.5)), tie=0.2499).preferred == "a"


A_CLEAR, B_CLEAR, B_NARROW, TIE = (
    ((0.9, 0.1), (0.1, 0.9)),
    ((0.1, 0.9), (0.9, 0.1)),
    ((0.45, 0.55), (0.55, 0.45)),
    ((0.5, 0.5), (0.5, 0.5)),
)


@pytest.mark.parametrize(
    ("principles", "preferred"),
    [
        # Principles vote; their margins do not count ...
        ((A_CLEAR, B_NARROW, B_NARROW), "b"),
        ((A_CLEAR, TIE), "a"),
        ((B_NARROW, TIE, TIE, TIE), "b"),
        # ... unless the votes are even: then the mean scores decide,
        ((A_CLEAR, B_NARROW), "a"),
        ((A_CLEAR, TIE, B_NARROW), "a"),
        # and abstain when they tie as well.
        ((A_CLEAR, B_CLEAR), None),
        ((TIE, TIE), None),
    ],
)
def test_principles_vote(principles, preferred):
    seen = verdict(*principles)
    assert seen.preferred == preferred
    score = [(a_first[0] + b_first[1]) / 2 for a_first, b_first in principles]
    assert seen.score_a == pytest.approx(np.mean(score))
    # Swapping the answers swaps the verdict.
    swapped = verdict(*((b_first, a_first) for a_first, b_first in principles))
    assert swapped.preferred == {"a": "b", "b": "a", None: None}[preferred]
    assert (swapped.score_a, swapped.score_b) == pytest.approx((seen.score_b, seen.score_a))


def test_flips_are_counted_over_principles():
    # Flipped means that most principles name different answers in the two orders.
    biased = ((0.8, 0.2), (0.7, 0.3))
    assert verdict(biased, biased, A_CLEAR).flipped
    assert not verdict(biased, A_CLEAR, A_CLEAR).flipped
    assert verdict(biased, A_CLEAR, A_CLEAR).first_slot == pytest.approx(4 / 6)
    # An order that names no answer contradicts none, and prefers no slot.
    assert (verdict(TIE).flipped, verdict(TIE).first_slot) == (False, 0.5)
    half = verdict(((0.5, 0.5), (0.8, 0.2)))
    assert (half.flipped, half.first_slot) == (False, 0.75)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_no_number_abstains_and_has_no_mass(bad):
    seen = verdict(A_CLEAR, ((bad, 0.1), (0.1, 0.9)))
    assert (seen.preferred, seen.score_a, seen.score_b, seen.mass) == (None, 0.5, 0.5, 0.0)


# -------------------------------------------------------------------------------- self judge


@pytest.fixture
def renderer(sharp_llama: Path, tmp_path: Path) -> Renderer:
    return Renderer(load_tokenizer(recipe("dpo", sharp_llama, tmp_path)))


@pytest.mark.parametrize("principles", [(), ("honesty", "brevity", "wit")])
def test_self_judge_reads_both_orders_from_raw_logits(sharp_llama, renderer, principles):
    engine = HfEngine(
        ServedModel(sharp_llama, dtype=torch.float32, max_model_len=512), RolloutConfig()
    )
    config = JudgeConfig(type="self", principles=principles, tie_threshold=0.0)
    who = make_judge(config, "pairwise", renderer, JudgeModel(engine))
    pairs = [Pair(USER, "is one", "two"), Pair(USER, "Paris", "is seven in one")]
    verdicts = who.compare(pairs)

    model = AutoModelForCausalLM.from_pretrained(sharp_llama)
    id_a, id_b = (renderer.tokenizer.encode(x, add_special_tokens=False) for x in (" A", " B"))
    assert len(id_a) == len(id_b) == 1
    for pair, seen in zip(pairs, verdicts, strict=True):
        table = []
        for principle in principles or (None,):
            for first, second in ((pair.a, pair.b), (pair.b, pair.a)):
                ids = renderer.judge_prompt_ids(pair.prompt, first, second, principle)
                with torch.no_grad():
                    logits = model(torch.tensor(ids[None].astype(np.int64))).logits[0, -1]
                p = logits.double().softmax(-1)
                table.append([float(p[id_a[0]]), float(p[id_b[0]])])
        p = np.array(table).reshape(-1, 2, 2)
        score_a = (p[:, 0, 0] + p[:, 1, 1]).mean() / 2
        score_b = (p[:, 0, 1] + p[:, 1, 0]).mean() / 2
        assert (seen.score_a, seen.score_b) == pytest.approx((score_a, score_b), rel=1e-4)
        assert seen.mass == pytest.approx(p.sum(-1).mean(), rel=1e-4)
        assert seen.first_slot == pytest.approx((p[:, :, 0] > p[:, :, 1]).mean())
    assert len({v.score_a for v in verdicts}) == 2


def test_a_rule_that_prefers_a_slot_decides_nothing():
    (seen,) = judge.RulePairwiseJudge(lambda prompt, a, b: 1.0).compare([Pair(USER, "x", "y")])
    assert (seen.preferred, seen.flipped, seen.first_slot) == (None, True, 1.0)


@pytest.mark.parametrize("unknown", ["x", "y"])
def test_a_rule_that_fails_in_one_order_decides_nothing(unknown):
    rule = judge.RulePairwiseJudge(lambda prompt, a, b: float("nan") if a == unknown else 1.0)
    (seen,) = rule.compare([Pair(USER, "x", "y")])
    assert (seen.preferred, seen.score_a, seen.score_b) == (None, 0.5, 0.5)


def test_equal_texts_abstain_whatever_the_model_says(renderer):
    scores = np.log([[0.6, 0.1], [0.2, 0.1], [0.6, 0.2], [0.2, 0.5]])
    who = SelfPairwiseJudge(JudgeConfig(type="self"), renderer, lambda prompts, ids: scores, 1000)
    pairs = [Pair(USER, "one", "one"), Pair(USER, "one", "two")]
    same, other = judge.compare(who, pairs)
    assert (same.preferred, same.score_a, same.score_b) == (None, 0.5, 0.5)
    # Their decision mass is real, and no pair of equal texts hides a judge that has none.
    assert same.mass == pytest.approx((0.7 + 0.3) / 2)
    assert other.preferred == "a"


def test_a_pair_too_long_for_the_judge_is_not_asked_about(renderer):
    asked = []

    def next_logprobs(prompts, ids):
        asked.extend(prompts)
        return np.log(np.tile([[0.9, 0.05], [0.05, 0.9]], (len(prompts) // 2, 1)))

    short, long = Pair(USER, "one", "two"), Pair(USER, "one", "two " * 40)
    room = len(renderer.judge_prompt_ids(USER, "one", "two")) + 10
    who = SelfPairwiseJudge(JudgeConfig(type="self"), renderer, next_logprobs, room)
    verdicts = who.compare([long, short, long])
    assert [v.preferred for v in verdicts] == [None, "a", None]
    assert [v.too_long for v in verdicts] == [True, False, True]
    assert len(asked) == 2 and max(map(len, asked)) <= room
    # What was not asked says nothing about the judge.
    metrics = judge_metrics([replace(episode("a", "b"), verdicts=(v,)) for v in verdicts])
    assert metrics["judge/too_long"] == (2.0, 3.0)
    assert metrics["judge/abstained"] == (0.0, 1.0)


def test_the_engine_is_asked_once_also_for_no_pairs(renderer):
    """On several ranks asking may be collective, and a rank may have nothing to ask."""
    calls = []

    def next_logprobs(prompts, ids):
        calls.append((len(prompts), tuple(ids)))
        return np.zeros((len(prompts), 2), np.float32)

    who = SelfPairwiseJudge(JudgeConfig(type="self"), renderer, next_logprobs, 1000)
    assert who.compare([]) == []
    who.compare([Pair(USER, "one", "two")] * 3)
    assert calls == [(0, who.tokens), (6, who.tokens)]


def test_min_decision_mass_stops_a_run_whose_judge_cannot_judge(
    tiny_llama, tmp_path, quiet_process
):
    config = recipe(
        "dpo",
        tiny_llama,
        tmp_path,
        use_peft=True,
        online={"prompts_per_iteration": 4, "num_generations": 2},
        judge={"type": "self"},
    )
    with pytest.raises(ConfigError) as caught:
        train(config)
    message = str(caught.value)
    assert message.startswith("the judge puts P(A) + P(B) = 0.0")
    assert "judge.min_decision_mass = 0.5" in message and "jsft" in message


# ------------------------------------------------------------------------------------- rules


def test_written_rules_say_none_with_an_empty_string():
    who = judge.RuleWrittenJudge(lambda prompt, text: {"x": "No.", "y": " "}.get(text))
    (seen,) = judge_written(who, [episode("x", "y", "z")])
    assert seen.judgments == ("No.", None, None)


def test_judgments_that_are_none_are_set_aside_and_counted():
    said = {"a": "$ERROR$", "b": "The response is perfect.", "c": "It starts with an empty phrase."}
    who = judge.RuleWrittenJudge(lambda prompt, text: said.get(text))
    (seen,) = judge_written(who, [episode("a", "b", "c", "d")])
    assert [reason is not None for reason in seen.noise] == [True, True, False, False]
    assert [judgment for _, judgment in seen.judged()] == [said["c"], None]
    assert judge_metrics([seen])["judge/noise"] == (2.0, 4.0)
    assert json.loads(seen.to_json())["noise"] == list(seen.noise)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["No."], "Batch gave 1 judgments for 2: it must give one for each"),
        (["No.", None, None], "Batch gave 3 judgments for 2"),
        (["No.", True], "Batch gave True for an answer: a written judgment is a text"),
    ],
)
def test_a_judge_that_answers_otherwise_is_named(given, message):
    class Batch:
        def judge(self, answers):
            return given

    with pytest.raises(ConfigError, match=message):
        judge_written(Batch(), [episode("a", "b")])
    if len(given) != 2:
        pairs = type("Batch", (), {"compare": lambda self, asked: [None] * (len(asked) + 1)})()
        with pytest.raises(ConfigError, match="Batch gave 2 judgments for 1"):
            judge_pairs(pairs, [episode("a", "b")])


def test_pairwise_rules_prefer_by_sign():
    who = judge.RulePairwiseJudge(lambda prompt, a, b: float(a or 0) - float(b or 0))
    seen = who.compare([Pair(USER, a, "") for a in ("2", "-0.1", "0", "nan", "inf")])
    assert [v.preferred for v in seen] == ["a", "b", None, None, "a"]
    assert [(v.score_a, v.score_b) for v in seen[:3]] == [(1, 0), (0, 1), (0.5, 0.5)]


RULES = """
def written(prompt, text):
    return f"{prompt[-1]['content']}/{text}"

def pairwise(prompt, a, b):
    return len(a) - len(b)

class Batched:
    def judge(self, answers):
        return [f"{i} of {len(answers)}" for i, _ in enumerate(answers)]

ready = Batched()
number = 3
"""


@pytest.fixture
def rules(tmp_path: Path) -> Path:
    path = tmp_path / "rules.py"
    path.write_text(RULES)
    return path


def made(path: str, kind: str):
    return make_judge(JudgeConfig(path=path), kind, None)


def test_a_rule_is_a_function_or_sees_whole_batches(rules):
    answers = [Answer(USER, "x"), Answer(USER, "y")]
    assert made(f"{rules}:written", "written").judge(answers) == ["the sum/x", "the sum/y"]
    for name in ("Batched", "ready"):
        assert made(f"{rules}:{name}", "written").judge(answers) == ["0 of 2", "1 of 2"]
    (seen,) = made(f"{rules}:pairwise", "pairwise").compare([Pair(USER, "one", "four")])
    assert seen.preferred == "b"


@pytest.mark.parametrize(
    ("path", "kind", "message"),
    [
        ("{rules}:missing", "written", "judge.path = '{rules}:missing': {rules} has no 'missing'"),
        ("{rules}:number", "written", "judge.path = '{rules}:number': neither callable nor has "
         "'judge'"),
        ("{rules}:number", "pairwise", "judge.path = '{rules}:number': neither callable nor has "
         "'compare'"),
        ("{rules}x.py:f", "written", "judge.path = '{rules}x.py:f': no such file {rules}x.py"),
        ("{rules}", "written",
         "judge.path = '{rules}': write package.module:name or file.py:name"),
        ("no.such.package:f", "written",
         "judge.path = 'no.such.package:f': No module named 'no'"),
    ],
)  # fmt: skip
def test_rules_that_cannot_be_loaded_are_named(rules, path, kind, message):
    with pytest.raises(ConfigError) as caught:
        made(path.format(rules=rules), kind)
    assert str(caught.value) == message.format(rules=rules)


def test_a_rule_whose_file_raises_is_named_with_its_error(tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("1 / 0")
    with pytest.raises(ConfigError, match=r"importing .*broken\.py:1 raised ZeroDivisionError"):
        made(f"{broken}:f", "written")


# ---------------------------------------------------------------------------------- episodes


def episode(*texts: str) -> Episode:
    nothing = Rollout(np.zeros(0, np.int32), np.zeros(0, np.float32), "stop", 0)
    return Episode(
        index=0,
        source="f:1",
        dataset=0,
        prompt=USER,
        tools=None,
        prompt_ids=np.array([1], np.int32),
        rollouts=(nothing,) * len(texts),
        texts=texts,
    )


def test_written_judgments_go_to_their_own_rollouts():
    who = judge.RuleWrittenJudge(lambda prompt, text: text.upper() if text > "b" else None)
    first, second = judge_written(who, [episode("a", "c"), episode("d", "b")])
    assert first.judgments == (None, "C") and second.judgments == ("D", None)
    assert judge_metrics([first, second]) == {
        "judge/negatives": (2.0, 4.0),
        "judge/noise": (0.0, 4.0),
        "judge/failed": (0.0, 4.0),
    }


def test_answers_without_a_judgment_are_set_aside_and_counted_apart():
    class Judge:
        def judge(self, answers):
            return ["No.", Failed("the server is down"), None, "$ERROR$"]

    (seen,) = judge_written(Judge(), [episode("a", "b", "c", "d")])
    assert seen.judgments == ("No.", None, None, "$ERROR$")
    assert seen.noise[:3] == (None, "no judgment: the server is down", None)
    assert [judgment for _, judgment in seen.judged()] == ["No.", None]
    # Shares of what was judged, and of all.
    metrics = judge_metrics([seen])
    assert metrics["judge/failed"] == (1.0, 4.0)
    assert (metrics["judge/negatives"], metrics["judge/noise"]) == ((2.0, 3.0), (1.0, 3.0))
    assert Episode.from_json(seen.to_json()).noise == seen.noise


def by_length(prompt, a: str, b: str) -> float:
    return len(a) - len(b)


@pytest.mark.parametrize(
    ("texts", "points"),
    [
        (("xx", "x"), [1, -1]),
        (("xx", "yy"), [0, 0]),
        (("xx", "x", "xxx"), [0, -2, 2]),
        (("xx", "yy", "x"), [1, 1, -2]),
        (("x", "y", "z"), [0, 0, 0]),
    ],
)
def test_each_is_compared_with_each_other(texts, points):
    (seen,) = judge_pairs(judge.RulePairwiseJudge(by_length), [episode(*texts)])
    assert seen.points().tolist() == points
    assert seen.matches == tuple(combinations(range(len(texts)), 2))
    assert len(seen.verdicts) == len(seen.matches)
    assert Episode.from_json(seen.to_json()).verdicts == seen.verdicts


def test_a_circle_of_preferences_places_nobody_first():
    beats = {*pairwise("abca")}
    rule = judge.RulePairwiseJudge(lambda _, a, b: 1 if (a, b) in beats else -1)
    (seen,) = judge_pairs(rule, [episode("a", "b", "c")])
    assert seen.points().tolist() == [0, 0, 0] and seen.wins().tolist() == [1, 1, 1]


def test_verdicts_of_a_batch_go_to_their_own_episodes():
    first, second = judge_pairs(
        judge.RulePairwiseJudge(by_length), [episode("x", "xx"), episode("xxx", "xx", "x")]
    )
    assert first.preferences() == [(1, 0)]
    assert second.preferences() == [(0, 1), (0, 2), (1, 2)]


def test_metrics_are_sums_and_counts_over_verdicts():
    verdicts = (
        Verdict(0.6, 0.2, "a", flipped=True, first_slot=1.0, mass=0.8),
        Verdict(0.5, 0.5, None, first_slot=0.5, mass=0.4),
    )
    episodes = [replace(episode("a", "b"), verdicts=(v,)) for v in verdicts]
    assert judge_metrics(episodes) == {
        "judge/abstained": (1.0, 2.0),
        "judge/flipped": (1.0, 2.0),
        "judge/first_slot": (1.5, 2.0),
        "judge/mass": (pytest.approx(1.2), 2.0),
        "judge/too_long": (0.0, 2.0),
        "judge/failed": (0.0, 2.0),
    }
    missing = replace(episode("a", "b"), verdicts=(Verdict(0.5, 0.5, None, failed=True),))
    metrics = judge_metrics([*episodes, missing])
    assert (metrics["judge/failed"], metrics["judge/mass"][1]) == ((1.0, 3.0), 2.0)


def test_a_judge_of_a_file_is_loaded_once(tmp_path):
    """It keeps its state between rounds, and does not change under a run; files of one name in
    two folders are two judges."""
    paths = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        paths.append(tmp_path / name / "rule.py")
        paths[-1].write_text(f"calls = []\ndef f(prompt, text):\n    return {name!r}\n")
    first, second = (load_object(f"{path}:f", "judge.path") for path in paths)
    assert (first([], ""), second([], "")) == ("one", "two")
    paths[0].write_text("def f(prompt, text):\n    return 'changed'\n")
    assert load_object(f"{paths[0]}:f", "judge.path") is first
    assert load_object(f"{paths[0]}:calls", "judge.path") == []


def test_a_file_that_fails_is_tried_again(tmp_path):
    path = tmp_path / "rule.py"
    path.write_text("1 / 0")
    with pytest.raises(ConfigError, match="ZeroDivisionError"):
        load_object(f"{path}:f", "judge.path")
    path.write_text("f = 3")
    assert load_object(f"{path}:f", "judge.path") == 3


# ---------------------------------------------------------------------------------- endpoints


@pytest.fixture
def server():
    with serving() as running:
        yield running


def endpoint(server, renderer, tmp_path, **keys):
    place = {"base_url": server.url, "model": "m", "api_key_env": "MY_KEY", "max_retries": 2}
    config = JudgeConfig(type="endpoint", endpoint=place, **keys)
    asked = Endpoint(config.endpoint, "judge", tmp_path / "replies.jsonl")
    return make_judge(config, "pairwise", renderer, asked)


def prefers(word: str):
    """Whichever response holds the word; always the first when neither does."""

    def answer(question: str) -> tuple[int, str]:
        a, b = question.split("### Response A")[1].split("### Response B")
        return 200, "B." if word in b and word not in a else "The better response is A"

    return answer


def test_an_endpoint_is_asked_in_both_orders(server, renderer, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    server.answer = staticmethod(prefers("good"))
    who = endpoint(server, renderer, tmp_path, principles=("honesty", "brevity"))
    pairs = [Pair(USER, "good", "bad"), Pair(USER, "bad", "good"), Pair(USER, "bad", "worse")]
    first, second, undecided = who.compare(pairs)
    assert (first.preferred, first.score_a, first.score_b) == ("a", 1.0, 0.0)
    assert (second.preferred, second.flipped, second.first_slot) == ("b", False, 0.5)
    # The same slot in both orders says nothing about the answers.
    assert (undecided.preferred, undecided.flipped, undecided.first_slot) == (None, True, 1.0)
    # The second pair is the first in the other order: the same questions, asked once.
    assert len(server.asked) == 2 * 2 * 2
    request = server.asked[0]
    assert (request["path"], request["key"]) == ("/v1/chat/completions", "Bearer secret")
    assert (request["model"], request["temperature"], request["max_tokens"]) == ("m", 0.0, 16)
    assert [m["role"] for m in request["messages"]] == ["system", "user"]
    questions = [r["messages"][1]["content"] for r in server.asked]
    for principle in ("Honesty: ", "brevity\n"):
        assert sum(f"### Principle\n{principle}" in question for question in questions) == 4


def test_an_endpoint_that_is_busy_is_asked_again(server, renderer, tmp_path):
    refusals = iter([429, 503])

    def answer(question):
        status = next(refusals, 200)
        return status, "A" if status == 200 else "not now"

    server.answer = staticmethod(answer)
    (seen,) = endpoint(server, renderer, tmp_path).compare([Pair(USER, "one", "two")])
    assert (seen.first_slot, seen.mass) == (1.0, 1.0) and len(server.asked) == 4


def test_an_endpoint_without_a_verdict_has_no_mass(server, renderer, tmp_path):
    server.answer = staticmethod(lambda question: (200, "Both are fine, Alice."))
    (seen,) = endpoint(server, renderer, tmp_path).compare([Pair(USER, "one", "two")])
    assert (seen.preferred, seen.mass) == (None, 0.0)
    with pytest.raises(ConfigError, match=r"the eval_judge puts P\(A\) \+ P\(B\) = 0\.00"):
        check_decision_mass(JudgeConfig(type="endpoint"), "eval_judge", seen.mass)


@pytest.mark.parametrize(
    ("status", "kind", "message"),
    [
        (401, ConfigError, "model 'm' refuses: .*no such key"),
        (404, ConfigError, "model 'm' refuses: .*no such key"),
        (400, ConfigError, "model 'm' refuses: .*no such key"),
        (500, JudgeError, "model 'm': no reply to any of 2 questions: .*no such key"),
    ],
)
def test_an_endpoint_that_fails_is_named(server, renderer, tmp_path, status, kind, message):
    server.answer = staticmethod(lambda question: (status, "no such key"))
    with pytest.raises(kind, match=message):
        endpoint(server, renderer, tmp_path).compare([Pair(USER, "one", "two")])


def test_a_pair_that_an_endpoint_does_not_answer_is_set_aside(server, renderer, tmp_path):
    def answer(question):
        return (500, "too hot") if "bad" in question else prefers("good")(question)

    server.answer = staticmethod(answer)
    who = endpoint(server, renderer, tmp_path)
    verdicts = who.compare([Pair(USER, "good", "bad"), Pair(USER, "good", "fair")])
    assert [(v.preferred, v.failed) for v in verdicts] == [(None, True), ("a", False)]


def test_an_endpoint_measures_a_run(server, sharp_llama, tmp_path, quiet_process):
    """The judge of evaluation is another one than that of training."""
    server.answer = staticmethod(prefers("the"))
    held_out = write_rows(tmp_path / "held-out.jsonl", rows("prompt", 3, seed=3))
    config = recipe(
        "cut",
        sharp_llama,
        tmp_path,
        online={"iterations": 1, "prompts_per_iteration": 4},
        judge={"path": "fastalign.demo.rules:judge_natural"},
        eval_datasets=[{"path": str(held_out)}],
        eval_steps=1,
        eval_judge={"type": "endpoint", "endpoint": {"base_url": server.url, "model": "m"}},
    )
    metrics = train(config)
    assert 0 <= metrics["eval/win_rate"] <= 1 and metrics["eval/judge_mass"] == 1.0
    # Against itself the start has one question a pair, later answers have two.
    kept = Path(config.output_dir, "eval_judge-replies.jsonl").read_text().splitlines()
    assert metrics["eval/judge_requests"] == len(server.asked) == len(kept) >= 3
    assert metrics["eval/judge_failed"] == 0 and metrics["eval/judge_prompt_tokens"] > 0
