"""Records and rollouts -> streams, and each method's loss against one worked out record by record
from the model's own logits."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from support import REFINING, as_method, distance, recipe, start, step_with_gradients, write_rows
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM

import fastalign.train as loop
from fastalign import prepare
from fastalign.batch import make_batch
from fastalign.config import ConfigError, parse_config
from fastalign.data import Comparison, Example, Record, RowError, Sampled
from fastalign.episodes import Episode, Verdict, rollout_metrics
from fastalign.methods import METHODS, make_method
from fastalign.methods.base import Dropped
from fastalign.methods.self_training import log_odds
from fastalign.model import load_tokenizer
from fastalign.rollout import Rollout
from fastalign.run import reduce_metrics
from fastalign.templates import Renderer
from fastalign_kernels import _dispatch

USER = ({"role": "user", "content": "the sum"},)


@pytest.fixture
def renderer(tiny_llama: Path) -> Renderer:
    return Renderer(load_tokenizer(recipe("sft", tiny_llama, tiny_llama.parent / "unused")))


def method(name: str, **keys):
    base = {
        "method": name,
        "model_name_or_path": "m",
        "output_dir": "o",
        "datasets": [{"path": "d.jsonl"}],
    }
    return make_method(parse_config(base | keys))


def prompt_of(stream) -> list[int]:
    return stream.input_ids[: int(stream.loss_mask.argmax())].tolist()


def answer_of(stream) -> list[int]:
    assert stream.loss_mask[int(stream.loss_mask.argmax()) :].all()
    return stream.input_ids[stream.loss_mask].tolist()


def text_of(renderer: Renderer, ids) -> str:
    return renderer.tokenizer.decode(list(ids))


# ------------------------------------------------------------------------- records -> streams


def test_sft_and_unlikelihood_train_on_the_answer_and_its_end(renderer):
    record = Record("completion", prompt=USER, completion="is one", weight=3.0, source="f:1")
    for name in ("sft", "unlikelihood"):
        (example,) = method(name).from_record(record, renderer)
        (stream,) = example.streams
        assert text_of(renderer, prompt_of(stream)) == (
            "<|im_start|>user\nthe sum<|im_end|>\n<|im_start|>assistant\n"
        )
        assert text_of(renderer, answer_of(stream)) == "is one<|im_end|>"
        assert (example.weight, example.source) == (3.0, "f:1")


@pytest.mark.parametrize(
    "name", ["sft", "unlikelihood", "cut", "hindsight", "forward-prediction", "jsft"]
)
def test_answers_are_trained_on_as_they_were_sampled(renderer, name):
    """Recorded tokens stay where prompt and text are the recorded ones, behind every prompt."""
    letters = tuple(renderer.tokenizer.convert_tokens_to_ids(x) for x in "Ġthe")
    prompt_ids = tuple(renderer.prompt_ids(USER).tolist())
    kind = "completion" if name in ("sft", "jsft") else "judged"
    record = Record(kind, prompt=USER, completion=" the", sampled=Sampled(prompt_ids, letters))
    if kind == "judged":
        record = replace(record, judgment="Wrong.")
    ours = method(name)
    (example,) = ours.from_record(record, renderer)
    streams = [s for s in example.streams if s.role != "judgment"]
    assert {tuple(answer_of(s)) for s in streams} == {letters}
    # Other tokens of the prompt, tokens of another text, or none: the text is tokenised.
    again = tuple(renderer.completion(USER, " the")[1].tolist())
    assert again != letters
    for sampled in (
        Sampled(prompt_ids[:-1], letters),
        Sampled(prompt_ids, letters[1:]),
        Sampled(prompt_ids, (*letters[:-1], len(renderer.tokenizer))),
        Sampled(prompt_ids, ()),
        None,
    ):
        (example,) = ours.from_record(replace(record, sampled=sampled), renderer)
        streams = [s for s in example.streams if s.role != "judgment"]
        assert {tuple(answer_of(s)) for s in streams} == {again}


def test_sft_trains_on_every_assistant_turn(renderer):
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    record = Record("messages", messages=tuple({"role": r, "content": c} for r, c in turns))
    (example,) = method("sft").from_record(record, renderer)
    (stream,) = example.streams
    assert text_of(renderer, stream.input_ids[stream.loss_mask]) == "b<|im_end|>d<|im_end|>"


def test_cut_makes_one_stream_of_a_fine_record_and_two_of_a_criticised_one(renderer):
    record = Record("judged", prompt=USER, completion="is one", source="f:1")
    (positive,) = method("cut").from_record(record, renderer)
    assert [s.role for s in positive.streams] == ["plain"]
    (negative,) = method("cut").from_record(replace(record, judgment="Too short."), renderer)
    plain, judged = negative.streams
    assert (plain.role, judged.role) == ("plain", "judged")
    assert plain.input_ids.tolist() == positive.streams[0].input_ids.tolist()
    assert answer_of(plain) == answer_of(judged)
    assert "Too short." in text_of(renderer, prompt_of(judged))
    assert "Too short." not in text_of(renderer, prompt_of(plain))


def test_cut_cuts_both_streams_by_the_longer_prompt(renderer):
    record = Record("judged", prompt=USER, completion="is one", judgment="Too short.")
    (whole,) = method("cut").from_record(record, renderer)
    longer = len(prompt_of(whole.streams[1]))
    (cut,) = method("cut", max_length=longer + 2).from_record(record, renderer)
    assert [answer_of(s) for s in cut.streams] == [answer_of(whole.streams[0])[:2]] * 2
    with pytest.raises(Dropped, match="max_length: the prompt leaves no room"):
        method("cut", max_length=longer).from_record(record, renderer)


def test_cut_refuses_an_answer_that_the_template_changes_with_the_prompt(tiny_llama, tmp_path):
    """Token ids are compared one by one, so both prompts have to be followed by the same ones."""
    tokenizer = load_tokenizer(recipe("sft", tiny_llama, tmp_path))
    record = Record("judged", prompt=USER, completion="swer is one", judgment="No.", source="f:7")
    fine = replace(record, judgment=None)

    # A chat template that answers in capitals where it sees a judgment.
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message['content'] +",
        "(message['content'] | upper if 'Judgment' in messages[0]['content'] and "
        "message['role'] == 'assistant' else message['content']) +",
    )
    renderer = Renderer(tokenizer)
    assert len(method("cut").from_record(fine, renderer)) == 1
    with pytest.raises(ConfigError) as caught:
        method("cut").from_record(record, renderer)
    plain = tokenizer.convert_ids_to_tokens(tokenizer("swer is one").input_ids)[:3]
    assert str(caught.value) == (
        "f:7: the template changes the answer with the prompt: from its token 1 on it reads "
        f"{plain} behind the prompt and ['S', 'W', 'E'] behind the one that shows the judgment; "
        "CUT needs the same tokens in both: change the template"
    )

    # A text template whose quotation mark takes the answer's first letter, as in "'s".
    text = tmp_path / "quoted.yaml"
    wording = {"prompt": "Q: {instruction}\nA:\n'", "judged_prompt": "{instruction} {judgment}\n"}
    text.write_text(json.dumps({"format": "text"} | wording))
    renderer = Renderer(tokenizer, str(text))
    with pytest.raises(ConfigError, match=r"from its token 1 on it reads \['s', 'w'.*\['swer'"):
        method("cut").from_record(record, renderer)
    other = replace(record, completion="is one")
    plain_stream, judged_stream = method("cut").from_record(other, renderer)[0].streams
    assert answer_of(plain_stream) == answer_of(judged_stream)


def test_a_template_that_changes_answers_stops_the_run_before_training(tiny_llama, tmp_path):
    text = tmp_path / "quoted.yaml"
    wording = {"prompt": "Q: {instruction}\nA:\n'", "judged_prompt": "{instruction} {judgment}\n"}
    text.write_text(json.dumps({"format": "text"} | wording))
    rows = [{"prompt": "a", "completion": c, "judgment": "No."} for c in ("is one", "swer is")]
    data = [{"path": str(write_rows(tmp_path / "d.jsonl", rows)), "template": str(text)}]
    with pytest.raises(ConfigError, match=r"d\.jsonl:2: the template changes the answer"):
        start(recipe("cut", tiny_llama, tmp_path, datasets=data))


def test_cut_keeps_a_seeded_share_of_the_positives(renderer):
    record = Record("judged", prompt=USER, completion="is one")
    cut = method("cut", cut={"positive_ratio": 0.25})
    (fine,) = cut.from_record(record, renderer)
    (bad,) = cut.from_record(replace(record, judgment="No."), renderer)
    examples = [replace(bad if i % 3 else fine, source=str(i)) for i in range(24)]
    kept = cut.select(examples, seed=5)
    sources = [e.source for e in kept]
    assert [s for s in sources if int(s) % 3] == [e.source for e in examples if int(e.source) % 3]
    positives = [s for s in sources if int(s) % 3 == 0]
    assert len(positives) == round(0.25 * 16) and sources == sorted(sources, key=int)
    assert sources == [e.source for e in cut.select(examples, seed=5)]
    assert any(sources != [e.source for e in cut.select(examples, seed=s)] for s in range(8))
    assert method("cut").select(examples, seed=5) == examples


def test_dpo_makes_a_pair_over_one_prompt_and_drops_equal_answers(renderer):
    record = Record("preference", prompt=USER, chosen="is one", rejected="is two", weight=2.0)
    (example,) = method("dpo").from_record(record, renderer)
    chosen, rejected = example.streams
    assert (chosen.role, rejected.role, example.weight) == ("chosen", "rejected", 2.0)
    assert prompt_of(chosen) == prompt_of(rejected)
    assert text_of(renderer, answer_of(chosen)) == "is one<|im_end|>"
    assert text_of(renderer, answer_of(rejected)) == "is two<|im_end|>"
    room = len(prompt_of(chosen)) + 1  # both answers begin alike
    with pytest.raises(Dropped, match="the same within max_length"):
        method("dpo", max_length=room).from_record(record, renderer)


def test_jsft_shows_the_chosen_answer_once_in_each_slot(renderer):
    record = Record("preference", prompt=USER, chosen="is one", rejected="is two", weight=2.0)
    made = method("jsft", jsft={"judge_weight": 3.0}).from_record(record, renderer)
    demonstration, first, second = made
    assert text_of(renderer, answer_of(demonstration.streams[0])) == "is one<|im_end|>"
    assert [e.weight for e in made] == [2.0, 6.0, 6.0]
    assert [e.streams[0].role for e in made] == ["demonstration", "judgment", "judgment"]
    for example, verdict, a, b in (
        (first, " A", "is one", "is two"),
        (second, " B", "is two", "is one"),
    ):
        stream = example.streams[0]
        assert text_of(renderer, answer_of(stream)) == verdict
        prompt = text_of(renderer, prompt_of(stream))
        assert prompt.index(f"### Response A\n{a}") < prompt.index(f"### Response B\n{b}")
        expected = renderer.judge_prompt_ids(USER, a, b)
        assert prompt_of(stream) == expected.tolist()


def test_jsft_takes_demonstrations_from_completions(renderer):
    record = Record("completion", prompt=USER, completion="is one", weight=2.0)
    # The switch is about what a pair gives; a demonstration is one in any case.
    for switch in (True, False):
        (example,) = method("jsft", jsft={"demonstrations": switch}).from_record(record, renderer)
        assert (example.streams[0].role, example.weight) == ("demonstration", 2.0)
        assert text_of(renderer, answer_of(example.streams[0])) == "is one<|im_end|>"


def test_jsft_trains_every_turn_of_a_conversation(renderer):
    turns = [*USER, {"role": "assistant", "content": "is one"}, *USER]
    last = {"role": "assistant", "content": "is two", "loss": False}
    record = Record("messages", messages=(*turns, last))
    (example,) = method("jsft").from_record(record, renderer)
    (stream,) = example.streams
    assert text_of(renderer, stream.input_ids[stream.loss_mask]) == "is one<|im_end|>"


def test_hindsight_shows_the_judgment_that_there_is(renderer):
    record = Record("judged", prompt=USER, completion="is one", weight=2.0, source="f:1")
    (positive,) = method("hindsight").from_record(record, renderer)
    (negative,) = method("hindsight").from_record(replace(record, judgment="Short."), renderer)
    ((plain,), (judged,)) = positive.streams, negative.streams
    assert (plain.role, judged.role) == ("plain", "judged")
    assert prompt_of(plain) == renderer.prompt_ids(USER).tolist()
    assert prompt_of(judged) == renderer.judged_prompt_ids(USER, "Short.").tolist()
    assert text_of(renderer, answer_of(plain)) == "is one<|im_end|>"
    assert answer_of(plain) == answer_of(judged)
    assert {(e.weight, e.source) for e in (positive, negative)} == {(2.0, "f:1")}
    room = len(prompt_of(judged)) + 2
    (cut,) = method("hindsight", max_length=room).from_record(
        replace(record, judgment="Short."), renderer
    )
    assert answer_of(cut.streams[0]) == answer_of(judged)[:2]


def test_forward_prediction_answers_and_then_judges(renderer):
    record = Record("judged", prompt=USER, completion="is one", source="f:1")
    (positive,) = method("forward-prediction").from_record(record, renderer)
    assert [s.role for s in positive.streams] == ["answer"]
    (both,) = method("forward-prediction").from_record(
        replace(record, judgment="Too short."), renderer
    )
    answer, judgment = both.streams
    assert (answer.role, judgment.role) == ("answer", "judgment")
    assert answer.input_ids.tolist() == positive.streams[0].input_ids.tolist()
    assert text_of(renderer, answer_of(answer)) == "is one<|im_end|>"
    asked, _ = renderer.feedback(USER, "is one", "Too short.")
    assert prompt_of(judgment) == asked.tolist()
    assert text_of(renderer, answer_of(judgment)) == "Too short.<|im_end|>"
    # The answer fits and the question about it does not.
    with pytest.raises(Dropped, match="max_length: the prompt leaves no room"):
        method("forward-prediction", max_length=len(asked)).from_record(
            replace(record, judgment="Too short."), renderer
        )


def test_unlikelihood_leaves_what_is_fine_alone(renderer):
    fine = Record("judged", prompt=USER, completion="is one")
    with pytest.raises(Dropped, match="the answer is fine"):
        method("unlikelihood").from_record(fine, renderer)
    for record in (replace(fine, judgment="No."), replace(fine, kind="completion")):
        assert len(method("unlikelihood").from_record(record, renderer)) == 1


def test_jsft_judges_once_for_each_principle(renderer):
    record = Record("preference", prompt=USER, chosen="is one", rejected="is two")
    judge = {"type": "self", "principles": ["honesty", "brevity"]}
    made = method("jsft", judge=judge, jsft={"demonstrations": False}).from_record(record, renderer)
    prompts = [text_of(renderer, prompt_of(e.streams[0])) for e in made]
    assert ["Honesty: the" in p for p in prompts] == [True, True, False, False]
    assert ["\nbrevity\n" in p for p in prompts] == [False, False, True, True]
    with pytest.raises(Dropped, match="judgment does not fit"):
        method("jsft", max_length=40).from_record(record, renderer)


COMPARED = Record(
    "preference",
    prompt=USER,
    chosen="is one",
    rejected="is two",
    comparisons=(
        Comparison("chosen", "honesty", ("It is sure.", "It is not.")),
        Comparison("rejected", "wit"),
        Comparison("rejected", None, ("Dull.", "Funny.")),
    ),
    weight=2.0,
)


def test_jsft_learns_each_comparison_in_both_orders(renderer):
    made = method("jsft", jsft={"judge_weight": 3.0}).from_record(COMPARED, renderer)
    assert text_of(renderer, answer_of(made[0].streams[0])) == "is one<|im_end|>"
    assert [e.weight for e in made] == [2.0] + [6.0] * 6
    assert {e.streams[0].role for e in made[1:]} == {"judgment"}
    one, two = ("is one", "is two"), ("is two", "is one")
    end = "<|im_end|>"
    expected = [
        (one, "honesty", f" A\n\nResponse A: It is sure.\n\nResponse B: It is not.{end}"),
        (two, "honesty", f" B\n\nResponse A: It is not.\n\nResponse B: It is sure.{end}"),
        (two, "wit", " A"),
        (one, "wit", " B"),
        (two, None, f" A\n\nResponse A: Funny.\n\nResponse B: Dull.{end}"),
        (one, None, f" B\n\nResponse A: Dull.\n\nResponse B: Funny.{end}"),
    ]
    for example, (answers, principle, judgment) in zip(made[1:], expected, strict=True):
        (stream,) = example.streams
        asked = renderer.judge_prompt_ids(USER, *answers, principle)
        assert prompt_of(stream) == asked.tolist()
        assert text_of(renderer, answer_of(stream)) == judgment
        # What is read when the model judges is the first target.
        slot = int(judgment.startswith(" B"))
        assert answer_of(stream)[0] == renderer.decision_ids()[slot]


def test_jsft_takes_of_comparisons_what_the_recipe_wants(renderer):
    judge = {"type": "self", "principles": ["brevity", "wit"]}

    def targets(record=COMPARED, **keys) -> list[tuple[str, str]]:
        made = method("jsft", judge=judge, jsft=keys).from_record(record, renderer)
        streams = [e.streams[0] for e in made if e.streams[0].role == "judgment"]
        principles = ["brevity", "wit", "Honesty: the"]
        asked = [text_of(renderer, prompt_of(s)) for s in streams]
        named = [next((p for p in principles if f"### Principle\n{p}" in t), "") for t in asked]
        texts = [text_of(renderer, answer_of(s)) for s in streams]
        return list(zip(named, texts, strict=True))

    assert [len(text) > 2 for _, text in targets()] == [True, True, False, False, True, True]
    decisions = [(p, text[:2]) for p, text in targets()]
    assert [p for p, _ in decisions] == ["Honesty: the"] * 2 + ["wit"] * 2 + [""] * 2
    assert targets(comparisons="principle") == decisions
    # Nothing of the row's, or a row without any: the recipe's principles and the row's pair.
    by_recipe = [(p, slot) for p in ("brevity", "wit") for slot in (" A", " B")]
    assert targets(comparisons="ignore") == by_recipe
    assert targets(replace(COMPARED, comparisons=None)) == by_recipe
    # One that says that nobody compared is a demonstration alone.
    assert targets(replace(COMPARED, comparisons=())) == []
    assert len(method("jsft").from_record(replace(COMPARED, comparisons=()), renderer)) == 1
    with pytest.raises(Dropped, match="nothing is compared"):
        targets(replace(COMPARED, comparisons=()), demonstrations=False)


def test_jsft_cuts_rationales_and_never_the_decision(renderer):
    record = replace(COMPARED, comparisons=COMPARED.comparisons[:1])
    whole = method("jsft").from_record(record, renderer)[1].streams[0]
    room = len(prompt_of(whole)) + 3
    cut = method("jsft", max_length=room).from_record(record, renderer)[1].streams[0]
    assert answer_of(cut) == answer_of(whole)[:3] and len(answer_of(whole)) > 20
    (alone,) = (
        e.streams[0] for e in method("jsft", max_length=room - 2).from_record(record, renderer)[1:2]
    )
    assert answer_of(alone) == [renderer.decision_ids()[0]]
    with pytest.raises(Dropped, match="judgment does not fit"):
        method("jsft", max_length=room - 3).from_record(record, renderer)


# ------------------------------------------------------------------------ episodes -> streams


def episode(texts, **keys) -> Episode:
    """Rollouts whose tokens are the characters' codes + 3."""
    rollouts = tuple(
        Rollout(np.array([ord(c) for c in t], np.int32), np.zeros(len(t), np.float32), "length", 1)
        for t in texts
    )
    return Episode(
        index=0,
        source="f:7",
        dataset=0,
        prompt=USER,
        tools=None,
        prompt_ids=np.array([1, 2, 3], np.int32),
        rollouts=rollouts,
        texts=tuple(texts),
        **keys,
    )


ONLINE = {"online": {"num_generations": 2}, "judge": {"path": "a:b"}}


def test_rollouts_are_trained_on_as_sampled(renderer):
    judged = episode(["ab", "cd", ""], judgments=(None, "No.", "Empty."))
    fine, bad = method("cut", **ONLINE).from_episode(judged, renderer)
    assert prompt_of(fine.streams[0]) == [1, 2, 3]
    # No end token is added: the model did not produce one.
    assert answer_of(fine.streams[0]) == [ord("a"), ord("b")]
    assert [answer_of(s) for s in bad.streams] == [[ord("c"), ord("d")]] * 2
    expected = renderer.judged_prompt_ids(USER, "No.").tolist()
    assert prompt_of(bad.streams[1]) == expected
    (kept,) = method("sft", **ONLINE).from_episode(judged, renderer)
    assert answer_of(kept.streams[0]) == [ord("a"), ord("b")]
    assert kept.source == "f:7"


def test_dpo_takes_the_judged_pair_or_nothing(renderer):
    dpo = method("dpo", **ONLINE)
    (pair,) = dpo.from_episode(episode(["ab", "cd", "ef"], pairs=((2, 0),)), renderer)
    assert [answer_of(s) for s in pair.streams] == [[101, 102], [97, 98]]
    assert dpo.from_episode(episode(["ab", "cd"]), renderer) == []
    assert dpo.from_episode(episode(["ab", ""], pairs=((0, 1),)), renderer) == []


def judged_by(score, *texts, asked=combinations) -> Episode:
    """Verdicts of a judge that prefers the higher score and abstains between equal ones."""
    matches = tuple(asked(range(len(texts)), 2))
    verdicts = []
    for a, b in matches:
        gap = score(texts[a]) - score(texts[b])
        share = 1 / (1 + np.exp(-gap))
        winner = None if gap == 0 else "a" if gap > 0 else "b"
        verdicts.append(Verdict(0.9 * share, 0.9 * (1 - share), winner))
    return episode(texts, matches=matches, verdicts=tuple(verdicts))


@pytest.mark.parametrize(
    ("texts", "best_worst", "everything"),
    [
        (("xx", "x"), ((0, 1),), {(0, 1)}),
        (("x", "xx"), ((1, 0),), {(1, 0)}),
        (("xx", "yy"), (), set()),
        (("xx", "x", "xxx"), ((2, 1),), {(0, 1), (2, 0), (2, 1)}),
        # Two share the lead: the first of them.
        (("xx", "yy", "x"), ((0, 2),), {(0, 2), (1, 2)}),
        (("x", "y", "zz"), ((2, 0),), {(2, 0), (2, 1)}),
        (("x", "y", "z"), (), set()),
    ],
)
def test_pairs_are_best_against_worst_or_all_that_are_decided(texts, best_worst, everything):
    judged = judged_by(len, *texts)
    assert method("dpo", **ONLINE).choose(judged).pairs == best_worst
    keys = ONLINE | {"online": {"num_generations": 3, "pairs": "all"}}
    chosen = method("dpo", **keys).choose(judged)
    assert set(chosen.pairs) == everything and len(chosen.pairs) == len(everything)
    assert Episode.from_json(chosen.to_json()).pairs == chosen.pairs


@pytest.mark.parametrize(
    ("quantile", "kept"), [(0.0, (0, 1, 3)), (0.5, (0, 3)), (0.34, (0, 3)), (0.9, (3,))]
)
def test_rest_keeps_what_wins_more_than_its_quantile(quantile, kept, renderer):
    rest = method("rest", rest={"quantile": quantile}, **ONLINE)
    chosen = rest.choose(judged_by(len, "xxx", "xx", "x", "xxxx"))
    assert chosen.kept == kept
    answers = [answer_of(e.streams[0]) for e in rest.from_episode(chosen, renderer)]
    assert answers == [[ord("x")] * n for n in (3, 2, 1, 4) if (3, 2, 1, 4).index(n) in kept]


def test_jsft_keeps_the_demonstration_of_a_pair_that_is_too_long_to_judge(renderer):
    jsft = method("jsft", max_length=40)
    record = Record("preference", prompt=USER, chosen="is one", rejected="is two", source="f:1")
    with pytest.raises(Dropped, match="judgment does not fit"):
        jsft.from_record(record, renderer)
    examples, drops = prepare.make_examples(jsft, [record], [renderer], jsft.config)
    assert [s.role for e in examples for s in e.streams] == ["demonstration"]
    assert drops.counts == {"judgment does not fit in max_length": 1}


def test_nothing_is_learnt_where_no_match_is_decided(renderer):
    level = judged_by(lambda _: 0, "ab", "cd", "ef")
    won_by_lot = replace(level, winner=1)
    for name, seen in (("dpo", level), ("rso", level), ("rest", level), ("raft", won_by_lot)):
        subject = method(name, rest={"quantile": 0.0}, **ONLINE)
        assert subject.from_episode(subject.choose(seen), renderer) == []


def test_raft_imitates_the_winner(renderer):
    raft = method("raft", **ONLINE)
    # A tournament: 0 against 1, then its winner against 2.
    seen = judged_by(len, "xx", "x", "xxx", asked=lambda *_: [(0, 1), (0, 2)])
    (example,) = raft.from_episode(raft.choose(replace(seen, winner=2)), renderer)
    assert answer_of(example.streams[0]) == [ord("x")] * 3


def test_rso_accepts_as_the_paper_does():
    """Over many prompts the first accepted sample is one with probability proportional to its
    chance in a pass, in the order of the samples, and every pair is of accepted ones."""
    rso = method("rso", rso={"beta": 0.7, "num_samples": 2}, **ONLINE)
    texts = ("x", "xxx", "xx", "xxxx")
    seen = judged_by(len, *texts)
    counts = np.zeros(4)
    draws = 4000
    for index in range(draws):
        chosen = rso.choose(replace(seen, index=index))
        (pair,) = chosen.pairs
        assert len(texts[pair[0]]) > len(texts[pair[1]])
        counts[list(pair)] += 1
        assert rso.choose(replace(seen, index=index)) == chosen
    # Worked out pass by pass: accept in order until two are there, the best one always in a pass.
    length = np.array([len(text) for text in texts], dtype=float)
    expected = np.zeros(4)

    def accept(left: tuple[int, ...], taken: tuple[int, ...], p: float) -> None:
        chance = np.exp((length - length[list(left)].max()) / 0.7)

        def walk(k: int, taken: tuple[int, ...], p: float) -> None:
            if len(taken) == 2:
                expected[list(taken)] += p
            elif k == len(left):
                accept(tuple(i for i in left if i not in taken), taken, p)
            else:
                walk(k + 1, (*taken, left[k]), p * chance[left[k]])
                if chance[left[k]] < 1:
                    walk(k + 1, taken, p * (1 - chance[left[k]]))

        walk(0, taken, p)

    accept((0, 1, 2, 3), (), 1.0)
    assert expected.sum() == pytest.approx(2.0)
    assert np.abs(counts / draws - expected).max() < 4 * np.sqrt(0.25 / draws)


def test_rso_rewards_are_those_of_a_logistic_judge():
    rewards = np.array([0.3, -1.0, 2.0, 0.0])
    seen = judged_by(lambda text: rewards[int(text)], "0", "1", "2", "3")
    assert log_odds(seen) == pytest.approx(rewards - rewards.mean())


@pytest.mark.parametrize(("samples", "expected"), [(2, 1), (3, 1), (4, 1), (8, 2)])
def test_rso_learns_from_a_judge_that_is_certain(samples, expected):
    rso = method("rso", **ONLINE)
    assert rso.examples_per_prompt(samples) == expected
    texts = ["x" * n for n in range(1, samples + 1)]
    chosen = rso.choose(judged_by(lambda text: 100.0 * len(text), *texts))
    assert len(chosen.pairs) == expected
    assert all(a > b for a, b in chosen.pairs)
    # The best samples, of which each is beaten by the better ones alone.
    assert {i for pair in chosen.pairs for i in pair} == set(range(samples)) - set(
        range(samples - 2 * expected)
    )


def test_a_pair_that_nobody_decided_is_none():
    """Best and worst of a circle, and of one whose own match failed."""
    dpo = method("dpo", **ONLINE | {"online": {"num_generations": 3}})
    texts = ("a", "b", "c")
    a, b = Verdict(0.9, 0.1, "a"), Verdict(0.1, 0.9, "b")
    matches = ((0, 1), (0, 2), (1, 2))
    failed = episode(texts, matches=matches, verdicts=(a, replace(a, preferred=None), a))
    assert failed.points().tolist() == [1, 0, -1] and dpo.choose(failed).pairs == ()
    four = episode(
        ("a", "b", "c", "d"),
        matches=tuple(combinations(range(4), 2)),
        # 3 beats 0, which beats everybody else, and loses to 1 and 2, which tie.
        verdicts=(a, a, b, Verdict(0.5, 0.5, None), a, a),
    )
    best, worst = int(four.points().argmax()), int(four.points().argmin())
    assert (best, worst) == (0, 3) and (3, 0) in four.preferences()
    assert dpo.choose(four).pairs == ()


def test_rollouts_that_do_not_fit_are_left_out_not_fatal(renderer):
    # Alike within max_length, and no room at all.
    pair = episode(["abc", "abd"], pairs=((0, 1),))
    assert method("dpo", max_length=5, **ONLINE).from_episode(pair, renderer) == []
    assert method("dpo", max_length=3, **ONLINE).from_episode(pair, renderer) == []
    judged = episode(["abc", "abd"], judgments=(None, "No."))
    assert method("sft", max_length=3, **ONLINE).from_episode(judged, renderer) == []
    assert method("cut", max_length=3, **ONLINE).from_episode(judged, renderer) == []


REFINE = {"online": {}}


@pytest.mark.parametrize("name", ["ilf-mle", "ilf-dpo"])
def test_refining_asks_by_the_judgment(renderer, name):
    record = Record("judged", prompt=USER, completion="is one", judgment="Short.", source="f:1")
    asked = method(name, **REFINE).rollout_prompt(record, renderer)
    assert asked.tolist() == renderer.refine_prompt_ids(USER, "is one", "Short.").tolist()
    with pytest.raises(Dropped, match="judgment: none to refine the answer by"):
        method(name, **REFINE).rollout_prompt(replace(record, judgment=None), renderer)
    # As a rejected answer it would teach to end in the middle.
    ended = replace(record, completion="a<|im_end|>b")
    if name == "ilf-dpo":
        with pytest.raises(RowError, match=r"f:1: field completion: .* end-of-turn token"):
            method(name, **REFINE).rollout_prompt(ended, renderer)


def test_refinements_are_trained_on_after_the_plain_prompt(renderer):
    refined = episode(
        ["ab", " cd\n", "  ", ""],
        completion="cd",
        judgment="No.",
        weight=2.0,
        sampler_ids=np.array([7, 8], np.int32),
    )
    assert refined.refinement_faults() == [None, "unchanged", "empty", "empty"]
    (demonstration,) = method("ilf-mle", **REFINE).from_episode(refined, renderer)
    (stream,) = demonstration.streams
    # The tokens as sampled, without an end that the model did not produce.
    assert (prompt_of(stream), answer_of(stream)) == ([1, 2, 3], [97, 98])
    (pair,) = method("ilf-dpo", **REFINE).from_episode(refined, renderer)
    chosen, rejected = pair.streams
    assert (chosen.role, rejected.role) == ("chosen", "rejected")
    assert prompt_of(chosen) == prompt_of(rejected) == [1, 2, 3]
    assert answer_of(chosen) == [97, 98]
    assert text_of(renderer, answer_of(rejected)) == "cd<|im_end|>"
    assert (pair.weight, demonstration.weight, pair.source) == (2.0, 2.0, "f:7")
    # No room for either, and no fault of the run's.
    for name in ("ilf-mle", "ilf-dpo"):
        assert method(name, max_length=3, **REFINE).from_episode(refined, renderer) == []


def test_figures_of_rollouts_count_what_is_no_refinement():
    answers = [episode(["abc", ""]), episode(["abcd", "a"])]
    assert rollout_metrics(answers, max_length=6) == {
        "rollout/mean_length": 2.0, "rollout/truncated": 1.0, "rollout/cut": 0.25,
        "rollout/staleness": 0.0,
    }  # fmt: skip
    refined = [replace(e, completion="a", judgment="No.") for e in answers]
    found = rollout_metrics(refined, max_length=6)
    assert (found["rollout/empty"], found["rollout/unchanged"]) == (0.25, 0.25)


# ----------------------------------------------------------------------- losses of whole packs


@pytest.fixture
def run(sharp_llama, other_llama, tmp_path, quiet_process):
    """A started run whose reference is another model, so that rewards are not zero."""
    return start(recipe("dpo", sharp_llama, tmp_path), reference=other_llama)[0]


def token_logprobs(model, stream) -> torch.Tensor:
    """float64 log-probs of a stream's targets by transformers alone."""
    ids = torch.from_numpy(stream.input_ids.astype(np.int64))
    logp = model(ids[None]).logits[0].double().log_softmax(-1)
    return logp[:-1].gather(-1, ids[1:, None])[:, 0][torch.from_numpy(stream.loss_mask[1:])]


def expected_loss(name, config, example, policy, reference) -> torch.Tensor:
    """Loss of one record at weight 1, worked out with torch's own operations."""
    logp = {s.role: token_logprobs(policy, s) for s in example.streams}
    reduce = torch.mean if config.normalization == "record" else torch.sum
    if name in ("dpo", "ilf-dpo"):
        with torch.no_grad():
            ref = {s.role: token_logprobs(reference, s) for s in example.streams}
        over = torch.mean if config.loss_type == "ipo" else torch.sum
        gain = {role: over(logp[role]) - over(ref[role]) for role in ("chosen", "rejected")}
        margin = gain["chosen"] - gain["rejected"]
        smooth, x = config.label_smoothing, config.beta * margin
        return {
            "sigmoid": -(1 - smooth) * logsigmoid(x) - smooth * logsigmoid(-x),
            "ipo": (margin - 1 / (2 * config.beta)) ** 2,
            "hinge": (1 - x).clamp(min=0),
        }[config.loss_type]
    if name == "cut":
        return expected_cut(config.cut, reduce, **logp)
    if name == "unlikelihood":
        return reduce(-torch.log1p(-logp["demonstration"].exp()))
    return sum(-reduce(tokens) for tokens in logp.values())


def expected_cut(cut, reduce, plain, judged=None) -> torch.Tensor:
    """METHODS, section 1, table by table."""
    if judged is None:
        return cut.align_p * -reduce(plain)
    gamma, weight = (cut.gamma, 1) if cut.preset == "paper" else (0, 0.5)
    c = judged.detach().exp()
    flagged = (c > cut.lambda_ * plain.detach().exp()) & (c > cut.min_judged_prob)
    if not cut.detection:
        flagged = torch.ones_like(flagged)
    penalty = -cut.alpha * c**gamma * torch.log1p(-plain.exp())
    misalign = reduce(torch.where(flagged, penalty, -plain))
    return weight * (cut.align_n * -reduce(judged) + cut.misalign * misalign)


CASES = [
    ("sft", {}),
    ("unlikelihood", {}),
    ("hindsight", {}),
    ("forward-prediction", {}),
    ("ilf-mle", REFINE),
    ("ilf-dpo", REFINE | {"beta": 0.3}),
    ("jsft", {"jsft": {"judge_weight": 4.0}}),
    ("cut", {"cut": {"alpha": 2.0, "gamma": 0.5}}),
    ("cut", {"cut": {"preset": "reference", "lambda": 1.5}}),
    ("cut", {"cut": {"min_judged_prob": 1e-4, "lambda": 0.5}}),
    ("cut", {"cut": {"align_p": False}}),
    ("cut", {"cut": {"align_n": False, "preset": "reference"}}),
    ("cut", {"cut": {"misalign": False}}),
    ("cut", {"cut": {"detection": False, "min_judged_prob": 0.5}}),
    ("dpo", {"label_smoothing": 0.1}),
    ("dpo", {"loss_type": "ipo"}),
    ("dpo", {"loss_type": "hinge", "beta": 0.02}),
]


@pytest.mark.parametrize(("name", "keys"), CASES, ids=lambda value: str(value))
@pytest.mark.parametrize("normalization", ["record", "token"])
def test_losses_are_those_of_the_models_own_logits(
    run, sharp_llama, other_llama, tmp_path, name, keys, normalization
):
    config = recipe(name, sharp_llama, tmp_path, normalization=normalization, **keys)
    examples = as_method(run, config)
    assert len(examples) > 6
    examples = [replace(e, weight=e.weight * (1 + i % 3)) for i, e in enumerate(examples)]
    policy = AutoModelForCausalLM.from_pretrained(sharp_llama)
    reference = AutoModelForCausalLM.from_pretrained(other_llama)
    with torch.no_grad():
        expected = sum(
            e.weight * expected_loss(name, config, e, policy, reference) for e in examples
        )
    if name in ("dpo", "ilf-dpo") or normalization == "record":
        count = len(examples)
    else:
        streams = [e.streams if name == "forward-prediction" else e.streams[:1] for e in examples]
        count = sum(int(s.loss_mask.sum()) for group in streams for s in group)
    assert run.method.denominator(examples) == count
    loss, _ = evaluate(run, examples)
    # fp32 logits of magnitude 30 against the same in double.
    assert loss == pytest.approx(float(expected), rel=2e-5)


GRADIENTS = [case for case in CASES if case[0] not in ("sft", "jsft", "dpo")]


@pytest.mark.parametrize(("name", "keys"), GRADIENTS, ids=str)
def test_gradients_are_those_of_the_models_own_logits(
    run, sharp_llama, other_llama, tmp_path, name, keys
):
    config = recipe(name, sharp_llama, tmp_path, learning_rate=1e-30, **keys)
    examples = as_method(run, config)[:8]
    policy = AutoModelForCausalLM.from_pretrained(sharp_llama)
    reference = AutoModelForCausalLM.from_pretrained(other_llama)
    # One after the other: a graph of all would hold every logit.
    for example in examples:
        loss = expected_loss(name, config, example, policy, reference)
        if loss.requires_grad:
            (example.weight * loss / len(examples)).backward()
    expected = {f"model.{n}": p.grad for n, p in policy.named_parameters()}
    _, gradients = step_with_gradients(run, examples)
    assert distance(gradients, expected) < 2e-5


def evaluate(run, examples: list[Example]) -> tuple[float, dict[str, float]]:
    """Summed loss and the divided metrics of one pack of everything."""
    batch = make_batch(examples)
    with torch.no_grad():
        reference = None
        if run.method.needs_reference:
            with run.model.reference() as forward:
                reference, _ = forward(batch)
        loss, parts = run.model.engine(
            batch, loss=run.method.loss, reference=reference, progress=1.0
        )
    return float(loss), {k: float(s / n) for k, (s, n) in parts.items() if n}


def names(run, examples: list[Example]) -> set[str]:
    batch = make_batch(examples)
    logprob = torch.full((len(batch.targets),), -1.0)
    _, parts = run.method.loss(logprob, logprob, batch, reference=logprob, progress=1.0)
    return set(parts)


# The others' losses are those of SFT and DPO.
@pytest.mark.parametrize("name", [n for n in METHODS if n not in ("rso", "rest", "raft")])
def test_idle_repeats_count_for_nothing(run, sharp_llama, tmp_path, name):
    keys = REFINE if name in REFINING else {}
    examples = as_method(run, recipe(name, sharp_llama, tmp_path, **keys))
    loss, metrics = evaluate(run, examples)
    idle = [replace(examples[i], weight=0.0) for i in (0, 1)]
    again, metrics_again = evaluate(run, [idle[0], *examples, idle[1]])
    assert again == pytest.approx(loss, rel=1e-6)
    assert metrics_again.keys() == metrics.keys()
    for key, value in metrics.items():
        assert metrics_again[key] == pytest.approx(value, rel=1e-6, abs=1e-9), key
    # Alone it gives no loss, and the same names, so that ranks can add theirs up.
    alone, nothing = evaluate(run, idle)
    assert alone == 0 and nothing == {}
    assert names(run, idle) == names(run, examples)


def test_dpo_metrics_are_those_of_trl_and_of_the_logits(run, sharp_llama, other_llama, tmp_path):
    config = recipe("dpo", sharp_llama, tmp_path, beta=0.3)
    examples = as_method(run, config)
    _, metrics = evaluate(run, examples)
    policy = AutoModelForCausalLM.from_pretrained(sharp_llama)
    reference = AutoModelForCausalLM.from_pretrained(other_llama)
    with torch.no_grad():
        table = np.array(
            [
                [float(token_logprobs(m, s).sum()) for m in (policy, reference) for s in e.streams]
                for e in examples
            ]
        )
    chosen, rejected = (0.3 * (table[:, i] - table[:, 2 + i]) for i in (0, 1))
    expected = {
        "rewards/chosen": chosen.mean(),
        "rewards/rejected": rejected.mean(),
        "rewards/margins": (chosen - rejected).mean(),
        "rewards/accuracies": (chosen > rejected).mean(),
        "logps/chosen": table[:, 0].mean(),
        "logps/rejected": table[:, 1].mean(),
    }
    assert 0 < expected["rewards/accuracies"] < 1
    assert metrics == pytest.approx(expected, rel=1e-4)


def test_cut_metrics_describe_the_contrast(run, sharp_llama, tmp_path):
    config = recipe("cut", sharp_llama, tmp_path, cut={"lambda": 1.5})
    examples = as_method(run, config)
    _, metrics = evaluate(run, examples)
    policy = AutoModelForCausalLM.from_pretrained(sharp_llama)
    contrast, flagged, align_n, align_p = [], [], [], []
    for example in examples:
        with torch.no_grad():
            logp = {s.role: token_logprobs(policy, s) for s in example.streams}
        if "judged" not in logp:
            align_p.append(float(-logp["plain"].mean()))
            continue
        rise = logp["judged"] - logp["plain"]
        contrast.append(float(rise.mean()))
        flagged.append(float((rise > math.log(1.5)).double().mean()))
        align_n.append(float(-logp["judged"].mean()))
    assert 0 < np.mean(flagged) < 1
    expected = {
        "cut/contrast": np.mean(contrast),
        "cut/flagged": np.mean(flagged),
        "cut/align_n": np.mean(align_n),
        "cut/align_p": np.mean(align_p),
        "cut/positives": len(align_p) / len(examples),
    }
    assert {k: metrics[k] for k in expected} == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("normalization", ["record", "token"])
def test_rationales_leave_the_decision_its_weight(run, sharp_llama, tmp_path, normalization):
    """Decision and rationales are a mean each, or every token counts alike; what is logged of the
    judge is the decision's."""
    why = {"rationale_chosen": "It is right.", "rationale_rejected": "Wrong."}
    told = {"preferred": "rejected", "principle": "wit"} | why
    content = [
        {"prompt": f"{i}: the sum", "chosen": f"is {i}", "rejected": "is two"}
        | [{}, {"comparisons": [told, {"preferred": "chosen"}]}, {"comparisons": []}][i % 3]
        for i in range(6)
    ]
    data = write_rows(tmp_path / "told.jsonl", content)
    config = recipe(
        "jsft",
        sharp_llama,
        tmp_path,
        datasets=[{"path": str(data)}],
        jsft={"judge_weight": 2.0},
        normalization=normalization,
        learning_rate=1e-30,
    )
    examples = as_method(run, config)
    roles = [e.streams[0].role for e in examples]
    assert (roles.count("judgment"), roles.count("demonstration")) == (12, 6)
    policy = AutoModelForCausalLM.from_pretrained(sharp_llama)
    reduce = torch.mean if normalization == "record" else torch.sum
    expected, firsts, others, count = 0.0, [], [], 0
    for example in examples:
        (stream,) = example.streams
        logp = token_logprobs(policy, stream)
        count += len(logp)
        parts = [logp]
        if stream.role == "judgment":
            assert example.weight == 2.0
            firsts.append(float(logp[0].detach()))
            others += logp[1:].tolist()
            parts = [logp[:1], logp[1:]] if len(logp) > 1 else [logp]
        loss = example.weight * sum(-reduce(part) for part in parts)
        loss.backward()
        expected += float(loss.detach())
        alone, _ = evaluate(run, [example])
        assert alone == pytest.approx(float(loss.detach()), rel=2e-5)
    loss, metrics = evaluate(run, examples)
    assert loss == pytest.approx(expected, rel=2e-5)
    assert len(firsts) == 12 and len(others) == 4 * (len(others) // 4) > 40
    assert metrics["judge/nll"] == pytest.approx(-np.mean(firsts), rel=1e-4)
    assert metrics["judge/sure"] == np.mean(np.array(firsts) > math.log(0.5))
    assert metrics["judge/rationale_nll"] == pytest.approx(-np.mean(others), rel=1e-4)
    # And the gradient of all that.
    denominator = len(examples) if normalization == "record" else count
    assert run.method.denominator(examples) == denominator
    wanted = {f"model.{n}": p.grad / denominator for n, p in policy.named_parameters()}
    _, gradients = step_with_gradients(run, examples)
    assert distance(gradients, wanted) < 2e-5


@pytest.mark.parametrize(
    ("name", "roles"),
    [
        ("hindsight", {"nll": "plain", "judged/nll": "judged"}),
        ("forward-prediction", {"nll": "answer", "judgment/nll": "judgment"}),
        ("jsft", {"nll": "demonstration", "judge/nll": "judgment"}),
    ],
)
def test_parts_of_the_likelihood_are_logged_apart(run, sharp_llama, tmp_path, name, roles):
    examples = as_method(run, recipe(name, sharp_llama, tmp_path))
    _, metrics = evaluate(run, examples)
    policy = AutoModelForCausalLM.from_pretrained(sharp_llama)
    streams = [s for e in examples for s in e.streams]
    with torch.no_grad():
        expected = {
            metric: -torch.cat([token_logprobs(policy, s) for s in streams if s.role == role])
            for metric, role in roles.items()
        }
    for metric, values in expected.items():
        assert len(values) and metrics[metric] == pytest.approx(float(values.mean()), rel=1e-4)


def test_judged_warmup_leaves_the_contrast_out_until_its_share_is_done(run, sharp_llama, tmp_path):
    config = recipe("cut", sharp_llama, tmp_path, cut={"judged_warmup": 0.5})
    examples = as_method(run, config)
    batch = make_batch(examples)
    with torch.no_grad():
        before, early = run.model.engine(batch, loss=run.method.loss, reference=None, progress=0.49)
        after, late = run.model.engine(batch, loss=run.method.loss, reference=None, progress=0.5)
    n, p = (float(early[f"cut/align_{x}"][0]) for x in "np")
    assert float(before) == pytest.approx(n + p, rel=1e-6)
    contrast = float(late["cut/misalign_likelihood"][0] + late["cut/misalign_penalty"][0])
    assert float(after) == pytest.approx(n + p + contrast, rel=1e-6)
    # What was left out is not logged; what would be flagged is, to see detection grow.
    misalign = {"cut/misalign_likelihood", "cut/misalign_penalty"}
    logged = set(reduce_metrics(early))
    assert set(early) == set(late) and set(late) - logged == misalign
    assert {"cut/flagged", "cut/contrast"} <= logged and misalign <= set(reduce_metrics(late))


# ------------------------------------------------------------------------------------ by name


def test_a_method_can_come_from_a_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("from fastalign.methods.sft import Sft\nclass Mine(Sft):\n    pass\n")
    assert type(method(f"{file}:Mine")).__name__ == "Mine"
    with pytest.raises(ConfigError, match="has no 'Other'"):
        method(f"{file}:Other")


def test_unknown_and_unfit_methods_are_refused_by_name():
    with pytest.raises(ConfigError, match="method = 'dop': known are sft, unlikelihood, cut"):
        method("dop")
    for name, kind in METHODS.items():
        if kind.online_wants is None:
            with pytest.raises(ConfigError, match=f"method = '{name}' has no online form"):
                method(name, **ONLINE)
        elif kind.judge_kind is None:
            with pytest.raises(ConfigError, match=f"'{name}' asks nobody to judge .* 'judge'"):
                method(name, **ONLINE)
        else:
            with pytest.raises(ConfigError, match=f"judge is missing: .* method = '{name}'"):
                method(name, online={"num_generations": 2})
        if kind.judge_kind == "pairwise":
            with pytest.raises(ConfigError, match=f"num_generations is 1: .* '{name}' compares"):
                method(name, **ONLINE | {"online": {}})
        elif kind.online_wants is not None:
            pairs = {"judge_datasets": [{"path": "p.jsonl"}], "online": {}}
            judges = {} if kind.judge_kind is None else {"judge": {"path": "a:b"}}
            with pytest.raises(ConfigError, match=f"judge_datasets is set, but .* '{name}' has no"):
                method(name, **pairs, **judges)
        if not kind.wants:
            with pytest.raises(ConfigError, match=f"'{name}' learns from its own rollouts alone"):
                method(name)


@pytest.mark.parametrize("method", ["cut", "dpo"])
def test_training_leaves_the_choice_to_the_device(method, tiny_llama, tmp_path, monkeypatch):
    """On a GPU the same calls run in Triton."""
    asked = set()
    original = _dispatch.choose

    def choose(op, impl, device, dtype):
        asked.add(op)
        assert impl is None
        assert original(op, impl, torch.device("cuda"), dtype) == "triton"
        return original(op, impl, device, dtype)

    monkeypatch.setattr(_dispatch, "choose", choose)
    run, examples = start(recipe(method, tiny_llama, tmp_path))
    loop.update(run, examples, 0.0, 1)
    loss = {"cut": "contrastive_unlikelihood", "dpo": "pair_preference"}[method]
    assert asked == {"linear_logprob", loss}
