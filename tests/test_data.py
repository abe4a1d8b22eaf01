"""Loading, checking, filtering, sampling and splitting of records."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastalign.config import ConfigError, DatasetConfig
from fastalign.data import (
    Comparison,
    Example,
    Record,
    Sampled,
    Stream,
    load_records,
    noise_reason,
    split_records,
)

# A folder with CUT's published data and Anthropic's, where somebody has them.
REAL = Path(os.environ.get("FASTALIGN_REAL_DATA", "real-data"))


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str, **more) -> dict:
    return {"role": "assistant", "content": text, **more}


def write(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def load(path, want=None, strict=True, seed=0, **options):
    return load_records(
        [DatasetConfig(path=str(path), **options)], strict=strict, seed=seed, want=want
    )


def load_rows(tmp_path: Path, rows: list, want=None, strict=True, **options) -> list[Record]:
    return load(write(tmp_path / "rows.jsonl", rows), want, strict, **options)[0]


def load_row(tmp_path: Path, row: dict, want=None, **options) -> Record:
    (record,) = load_rows(tmp_path, [row], want, **options)
    return record


def error_of(tmp_path: Path, row: object, want=None) -> str:
    """The error of one row under strict, its file called F."""
    path = write(tmp_path / "rows.jsonl", [row])
    with pytest.raises(ConfigError) as caught:
        load(path, want)
    return str(caught.value).replace(path, "F")


# --- episode logs ---

EPISODE = {
    "index": 3,
    "source": "prompts.jsonl:7",
    "prompt": [{"role": "user", "content": "p"}],
    "completions": ["one", "two", "three"],
    "judgments": ["Wrong.", None, None],
    "noise": [None, None, "no judgment: the server is down"],
    "tools": [{"name": "f"}],
    "weight": 0.5,
    "finish_reasons": ["stop", "stop", "length"],
    "weight_version": 4,
    "prompt_ids": [1, 2],
    "token_ids": [[3, 4], [5], [6]],
    "logprobs": [[-0.5, -0.5], [-0.25], [-1.0]],
}


def test_an_episode_is_a_row_for_each_completion(tmp_path):
    path = write(tmp_path / "e.jsonl", [EPISODE, {**EPISODE, "noise": None}])
    records, report = load(path, "judged")
    assert [(r.completion, r.judgment, r.source) for r in records] == [
        ("one", "Wrong.", f"{path}:1[0]"),
        ("two", None, f"{path}:1[1]"),
        ("one", "Wrong.", f"{path}:2[0]"),
        ("two", None, f"{path}:2[1]"),
        ("three", None, f"{path}:2[2]"),
    ]
    assert records[1].sampled == Sampled((1, 2), (5,))
    assert all(r.prompt == (user("p"),) and r.tools == ({"name": "f"},) for r in records)
    assert {r.weight for r in records} == {0.5}
    # What nobody judged is not taken for fine.
    assert report.dropped == {"no judgment: the server is down": 1}
    assert report.sources[0].rows == 6


def test_a_judgment_that_was_corrected_counts(tmp_path):
    noise = ["judgment: error sentinel instead of a judgment", None, "no judgment: down"]
    judgments = ["Wrong, it is six.", "$ERROR$", "Wrong too."]
    row = {**EPISODE, "judgments": judgments, "noise": noise}
    records, report = load(write(tmp_path / "e.jsonl", [row]), "judged")
    assert [r.judgment for r in records] == ["Wrong, it is six.", "Wrong too."]
    assert list(report.dropped) == ["judgment: error sentinel instead of a judgment"]


def test_episodes_give_prompts_and_fine_answers_too(tmp_path):
    path = write(tmp_path / "e.jsonl", [EPISODE])
    (prompt,) = load(path, "prompt")[0]
    assert (prompt.kind, prompt.source) == ("prompt", f"{path}:1")
    (fine,) = load(path, ("completion", "messages"))[0]
    assert (fine.completion, fine.sampled) == ("two", Sampled((1, 2), (5,)))
    unjudged = {k: v for k, v in EPISODE.items() if k not in ("judgments", "noise")}
    with pytest.raises(ConfigError, match="this method needs prompt \\+ completion \\+ judgment"):
        load(write(tmp_path / "u.jsonl", [unjudged]), "judged")
    # Completions of another kind are another file's.
    other = {**EPISODE, "completion": "c"}
    record = load_row(tmp_path, other, "completion")
    assert (record.completion, record.sampled) == ("c", None)
    ultra = {"instruction": "p", "completions": [{"response": "r"}]}
    assert load_row(tmp_path, ultra, "prompt").prompt == (user("p"),)


RANKED = {k: v for k, v in EPISODE.items() if k not in ("judgments", "noise")} | {
    "matches": [[0, 1], [0, 2], [1, 2]],
    "verdicts": [{"score_a": 0.9, "score_b": 0.1, "preferred": "a"}] * 3,
    "pairs": [[0, 2], [1, 2]],
    "kept": [],
}


def test_a_compared_episode_is_a_row_for_each_pair(tmp_path):
    undecided = {**RANKED, "pairs": []}
    path = write(tmp_path / "e.jsonl", [RANKED, undecided])
    records, report = load(path, "preference")
    assert [(r.chosen, r.rejected, r.source) for r in records] == [
        ("one", "three", f"{path}:1[0]"),
        ("two", "three", f"{path}:1[1]"),
    ]
    assert [r.sampled for r in records] == [Sampled((1, 2), (3, 4)), Sampled((1, 2), (5,))]
    assert {r.sampled_rejected for r in records} == {Sampled((1, 2), (6,))}
    assert all(r.tools == ({"name": "f"},) and r.weight == 0.5 for r in records)
    assert report.dropped == {"verdicts: the judge placed none above another": 1}
    # What was chosen is a demonstration, once.
    often = {**RANKED, "pairs": [[0, 2], [1, 2], [0, 1]]}
    shown = load(write(tmp_path / "o.jsonl", [often]), ("completion", "messages"))[0]
    assert [(r.completion, r.sampled) for r in shown] == [
        ("one", Sampled((1, 2), (3, 4))),
        ("two", Sampled((1, 2), (5,))),
    ]


def test_what_was_kept_of_an_episode_is_a_demonstration(tmp_path):
    path = write(tmp_path / "e.jsonl", [{**RANKED, "pairs": [], "kept": [2, 0]}])
    records, _ = load(path, ("completion", "messages"))
    assert [(r.completion, r.sampled) for r in records] == [
        ("three", Sampled((1, 2), (6,))),
        ("one", Sampled((1, 2), (3, 4))),
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pairs": [[0, 1], [3, 0]]}, "F:1: field pairs[1]: value 3: want the number of a comple"),
        ({"pairs": [[0]]}, "F:1: field pairs[0]: value [0]: want [chosen, rejected]"),
        ({"pairs": [], "kept": [True]}, "F:1: field kept: value True: want the number of a compl"),
        ({"pairs": None}, "F:1: field pairs: value None: want a list"),
    ],
)
def test_malformed_pairs_are_named(tmp_path, change, message):
    assert error_of(tmp_path, {**RANKED, **change}, "preference").startswith(message)


def test_recorded_tokens_of_a_row(tmp_path):
    row = {"prompt": "p", "completion": "c", "prompt_ids": [1], "token_ids": [2, 3]}
    assert load_row(tmp_path, row, "completion").sampled == Sampled((1,), (2, 3))
    # Alone they say nothing: nobody knows what they followed.
    del row["prompt_ids"]
    assert load_row(tmp_path, row, "completion").sampled is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"completions": "one"}, "F:1: field completions: value 'one': want a list"),
        ({"judgments": [None]}, "F:1: field judgments: value [None]: want a list of 3, as compl"),
        ({"token_ids": [[1]]}, "F:1: field token_ids: value [[1]]: want a list of 3, as complet"),
        ({"noise": 3}, "F:1: field noise: value 3: want a list of 3, as completions"),
        ({"noise": [None, {}, None]}, "F:1: field noise: value {}: want text or null"),
        ({"token_ids": [[1], ["x"], [2]]}, "F:1[1]: field token_ids: value ['x']: want a list of "),
        ({"prompt_ids": [-1]}, "F:1[0]: field prompt_ids: value [-1]: want a list of token ids"),
        ({"judgments": [3, None, None]}, "F:1[0]: field judgment: value 3: want text"),
    ],
)
def test_malformed_episodes_are_named(tmp_path, change, message):
    good = write(tmp_path / "good.jsonl", [EPISODE])
    assert error_of(tmp_path, {**EPISODE, **change}, "judged").startswith(message)
    assert load(good, "judged", strict=False)[0]


# --- UltraFeedback as it is published ---


def rated(response: str, **ratings) -> dict:
    """A completion of UltraFeedback; a rating is "4", or ("4", rationale[, for the rating])."""
    annotations = {}
    for principle, value in ratings.items():
        rating, *why = value if isinstance(value, tuple) else (value,)
        keys = ("Rationale", "Rationale For Rating")
        annotations[principle] = {"Rating": rating, **dict(zip(keys, why, strict=False))}
    return {"model": "m", "response": response, "annotations": annotations, "critique": "c"}


def ultra(*completions: dict, instruction: str = "q") -> dict:
    shared = {"source": "flan", "models": ["m"] * len(completions), "correct_answers": ["None"]}
    return shared | {"instruction": instruction, "completions": list(completions)}


def test_ultrafeedback_is_a_pair_with_comparisons(tmp_path):
    row = ultra(
        rated(
            "good",
            helpfulness=("5", "It helps.", "Nothing lacks."),
            honesty=("3", "It boasts."),
            instruction_following=("4", "It follows."),
            truthfulness=("N/A", "None is needed."),
        ),
        rated(
            "bad",
            helpfulness=("2", "It is short.", "Much lacks."),
            honesty=("4", " It doubts. "),
            instruction_following=("4", "It follows too."),
            truthfulness=("1", "It lies."),
        ),
    )
    record = load_row(tmp_path, row, ("preference", "completion"))
    assert (record.kind, record.prompt) == ("preference", (user("q"),))
    # Means 4 and 11 / 4.
    assert (record.chosen, record.rejected) == ("good", "bad")
    assert record.comparisons == (
        Comparison(
            "chosen", "helpfulness", ("It helps. Nothing lacks.", "It is short. Much lacks.")
        ),
        Comparison("rejected", "honesty", ("It boasts.", "It doubts.")),
    )
    # Other kinds take the demonstration or the prompt.
    (shown,) = load_rows(tmp_path, [row], ("completion", "messages"))
    assert (shown.completion, shown.comparisons) == ("good", None)
    assert load_row(tmp_path, row, "messages").messages == (user("q"), assistant("good"))
    assert load_row(tmp_path, row, "prompt").prompt == (user("q"),)


def test_rationales_that_say_nothing_of_use_are_left_out(tmp_path):
    for why in (
        ("",),
        (None,),
        (),
        (" \n", ""),
        ("Text 2 is better.",),
        ("Fine.", "As Texts 1-3."),
    ):
        row = ultra(rated("a", honesty=(5, "Yes.")), rated("b", honesty=(1, *why)))
        record = load_row(tmp_path, row)
        assert record.comparisons == (Comparison("chosen", "honesty"),), why
    row = ultra(rated("a", honesty=(5, "The text is.")), rated("b", honesty=(1, "Texting 2.")))
    assert load_row(tmp_path, row).comparisons == (
        Comparison("chosen", "honesty", ("The text is.", "Texting 2.")),
    )


def test_the_best_completion_against_one_that_is_rated_lower(tmp_path):
    """Over many seeds every pair that the rule allows is drawn, and no other, about equally often;
    the row decides by its texts, not by where it stands."""
    # Means 4, 4, 3, 3.5, no rating, no answer, 4 in the words of the first.
    row = ultra(
        rated("a", helpfulness="5", honesty="3", truthfulness="N/A"),
        rated("b", helpfulness="4", honesty="4"),
        rated("c", helpfulness="3", honesty=None),
        rated("d", helpfulness=3, honesty="4.0"),
        rated("e", helpfulness="N/A", honesty=None),
        rated("  ", helpfulness="1"),
        rated(" a", helpfulness="2"),
    )
    lines = write(tmp_path / "u.jsonl", [row])
    filler = [
        ultra(rated("x", honesty=2), rated("y", honesty=1), instruction=f"{i}") for i in "abc"
    ]
    later = write(tmp_path / "later.jsonl", [*filler, row])
    seen: Counter = Counter()
    for seed in range(400):
        (record,) = load(lines, "preference", seed=seed)[0]
        pair = record.chosen, record.rejected
        seen[pair] += 1
        if seed < 20:
            *_, again = load(later, "preference", seed=seed)[0]
            assert (again.chosen, again.rejected) == pair
            assert again.comparisons == record.comparisons
    allowed = {("a", "c"), ("a", "d"), ("b", "c"), ("b", "d"), ("b", " a")}
    assert set(seen) == allowed
    # A half each for the best, then even: 5 standard deviations of a binomial with p >= 1 / 6.
    expected = {pair: 1 / 4 if pair[0] == "a" else 1 / 6 for pair in allowed}
    for pair, p in expected.items():
        assert abs(seen[pair] - 400 * p) < 5 * math.sqrt(400 * p * (1 - p)), (pair, seen)


def test_rows_without_a_pair_are_counted(tmp_path):
    tie = ultra(rated("a", honesty="4", helpfulness="2"), rated("b", honesty="3", helpfulness="3"))
    same = ultra(rated("a", honesty="4"), rated("a ", honesty="3"))
    alone = ultra(rated("a", honesty="4"), rated("b", honesty="N/A"))
    good = ultra(rated("a", honesty="4"), rated("b", honesty="3"))
    # By the same principles neither is better; the means are not the same.
    other = ultra(rated("a", honesty="4", helpfulness="2"), rated("b", honesty="4"))
    rows = [tie, same, alone, ultra(), good, other]
    for want, strict in itertools.product(("preference", "completion", None), (True, False)):
        path = write(tmp_path / "u.jsonl", rows)
        records, report = load(path, want, strict)
        assert [record.source for record in records] == [f"{path}:5", f"{path}:6"]
        assert report.dropped == {
            "completions: none is rated below the best": 2,
            "completions: fewer than two have ratings": 2,
        }
    (record,) = load_rows(tmp_path, [other], "preference")
    assert (record.chosen, record.comparisons) == ("b", ())
    # Prompts are of use without.
    assert len(load_rows(tmp_path, rows, "prompt")) == 6
    with pytest.raises(ConfigError, match="none of 1 rows can be used: 1 x completions: none is r"):
        load_rows(tmp_path, [tie], "preference")


def test_ultrafeedback_is_read_alike_from_parquet(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        ultra(rated("a", honesty=("4", "x", "y")), rated("b", honesty=("3", "z"))),
        ultra(rated("a", helpfulness=("4", "x")), rated("b", helpfulness="N/A", honesty="2")),
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "u.parquet")
    expected, _ = load(write(tmp_path / "u.jsonl", rows), "preference")
    found, _ = load(tmp_path / "u.parquet", "preference")
    assert [r.comparisons for r in found] == [r.comparisons for r in expected]
    assert [len(r.comparisons) for r in found] == [1, 0]


@pytest.mark.parametrize(
    ("completions", "message"),
    [
        ("x", "completions: value 'x': want a list"),
        (["x"], 'completions[0]: value \'x\': want {"response": ..., "annotations": ...}'),
        (
            [rated("a", honesty=1), {"response": "b"}],
            "completions[1].annotations: value None: want",
        ),
        ([{"annotations": {}}], "completions[0].response: value None: want text"),
        (
            [{"response": "a", "annotations": {"honesty": "5"}}],
            "completions[0].annotations.honesty: value '5': want {\"Rating\": ..., ...}",
        ),
        *(
            (
                [rated("a", honesty=rating)],
                f"completions[0].annotations.honesty.Rating: value {rating!r}: want a number or "
                '"N/A"',
            )
            for rating in ("five", "nan", "1e999", True, [4], math.inf)
        ),
        (
            [rated("a", honesty=10**400)],
            f"completions[0].annotations.honesty.Rating: value 1{'0' * 59}...: want a number",
        ),
        (
            [rated("a", honesty=("4", 3))],
            "completions[0].annotations.honesty.Rationale: value 3: want text",
        ),
        (
            [rated("a", honesty=("4", "x", "\ud800"))],
            "completions[0].annotations.honesty.Rationale For Rating: value '\\ud800': holds half",
        ),
    ],
)
def test_malformed_ratings_are_named(tmp_path, completions, message):
    row = {"instruction": "q", "completions": completions}
    assert error_of(tmp_path, row, "preference").startswith(f"F:1: field {message}")
    good = ultra(rated("a", honesty="4"), rated("b", honesty="3"))
    records, report = load(write(tmp_path / "two.jsonl", [row, good]), "preference", strict=False)
    assert len(records) == 1 and sum(report.dropped.values()) == 1


def test_episodes_and_rated_completions_are_kept_apart(tmp_path):
    """Both have a column of this name; a file may even hold both."""
    pair = ultra(rated("a", honesty="4"), rated("b", honesty="3"))
    path = write(tmp_path / "both.jsonl", [EPISODE, pair])
    assert [r.completion for r in load(path, "judged", strict=False)[0]] == ["one", "two"]
    assert [r.chosen for r in load(path, "preference", strict=False)[0]] == ["a"]
    # Alpaca's answers and pairs that were chosen by somebody else stay what they are.
    assert load_row(tmp_path, pair | {"output": "own"}, "completion").completion == "own"
    chosen = load_row(tmp_path, pair | {"chosen": "b", "rejected": "a"}, "preference")
    assert (chosen.chosen, chosen.comparisons) == ("b", None)
    # An online run's log may come from a prompt that was called an instruction.
    log = {**EPISODE, "instruction": "p"}
    assert [r.completion for r in load_rows(tmp_path, [log], "judged")] == ["one", "two"]


# --- comparisons ---


def test_comparisons_of_a_pair(tmp_path):
    row = {"prompt": "p", "chosen": "x", "rejected": "y"}
    assert load_row(tmp_path, row).comparisons is None
    assert load_row(tmp_path, row | {"comparisons": None}).comparisons is None
    assert load_row(tmp_path, row | {"comparisons": []}).comparisons == ()
    full = {
        "preferred": "rejected",
        "principle": "wit",
        "rationale_chosen": "dull",
        "rationale_rejected": "funny",
    }
    nulls = {"preferred": "chosen", "principle": None, "rationale_chosen": None}
    found = load_row(tmp_path, row | {"comparisons": [full, nulls]})
    assert found.comparisons == (
        Comparison("rejected", "wit", ("dull", "funny")),
        Comparison("chosen"),
    )
    renamed = row | {"ratings": [{"preferred": "chosen"}]}
    record = load_row(tmp_path, renamed, columns={"comparisons": "ratings"})
    assert record.comparisons == (Comparison("chosen"),)


@pytest.mark.parametrize(
    ("comparisons", "message"),
    [
        ("x", "comparisons: value 'x': want a list of comparisons"),
        (["x"], 'comparisons[0]: value \'x\': want {"preferred": "chosen" or "rejected", ...}'),
        ([{}], "comparisons[0].preferred: value None: want 'chosen' or 'rejected'"),
        ([{"preferred": "a"}], "comparisons[0].preferred: value 'a': want 'chosen' or 'rejected'"),
        ([{"preferred": ["chosen"]}], "comparisons[0].preferred: value ['chosen']: want 'chosen'"),
        (
            [{"preferred": "chosen"}, {"preferred": "chosen", "principle": 3}],
            "comparisons[1].principle: value 3: want text",
        ),
        (
            [{"preferred": "chosen", "rationale": "x"}],
            "comparisons[0].rationale: value 'x': no key of a comparison: known are preferred, pri",
        ),
        (
            [{"preferred": "chosen", "rationale_chosen": " "}],
            "comparisons[0].rationale_chosen: value ' ': must not be empty",
        ),
        (
            [{"preferred": "chosen", "rationale_chosen": "x"}],
            "comparisons[0].rationale_rejected: value None: a rationale of one answer needs that "
            "of the other",
        ),
    ],
)
def test_malformed_comparisons_are_named(tmp_path, comparisons, message):
    row = {"prompt": "p", "chosen": "x", "rejected": "y", "comparisons": comparisons}
    assert error_of(tmp_path, row, "preference").startswith(f"F:1: field {message}")


# --- columns of every kind ---


def test_prompt_completion_as_text(tmp_path):
    record = load_row(tmp_path, {"prompt": " Hi ", "completion": "Hello\n", "id": 3})
    assert record == Record(
        kind="completion",
        prompt=(user(" Hi "),),
        completion="Hello\n",
        source=f"{tmp_path}/rows.jsonl:1",
    )


def test_messages_lists_in_every_column(tmp_path):
    prompt = [{"role": "system", "content": "Be brief."}, user("Hi")]
    plain = {"prompt": prompt, "completion": [assistant("Hello")]}
    repeated = {"prompt": prompt, "completion": [*prompt, assistant("Hello")]}
    without_system = {"prompt": prompt, "completion": [user("Hi"), assistant("Hello")]}
    records = load_rows(tmp_path, [plain, repeated, without_system])
    assert [r.completion for r in records] == ["Hello"] * 3
    assert [r.prompt for r in records] == [tuple(prompt)] * 3


def test_content_parts_are_joined(tmp_path):
    content = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    record = load_row(tmp_path, {"prompt": [{"role": "user", "content": content}]})
    assert record.prompt == (user("Hello"),)


def test_judgment_null_empty_blank_and_missing_are_fine(tmp_path):
    rows = [
        {"prompt": "p", "completion": "c", "judgment": judgment}
        for judgment in (None, "", "  \n", " Too long. ")
    ]
    rows.append({"prompt": "p", "completion": "c"})
    records = load_rows(tmp_path, rows, "judged")
    assert [r.judgment for r in records] == [None, None, None, "Too long.", None]
    assert [r.is_negative for r in records] == [False, False, False, True, False]


@pytest.mark.parametrize(
    ("score", "judgment"),
    [(7, None), (7.0, None), (10, None), (6.99, "Bad."), (-1, "Bad."), (None, "Bad.")],
)
def test_score_overrules_the_judgment(tmp_path, score, judgment):
    row = {"prompt": "p", "completion": "c", "judgment": "Bad.", "score": score}
    assert load_row(tmp_path, row, "judged").judgment == judgment


def test_low_score_without_a_judgment_is_not_positive(tmp_path):
    rows = [
        {"prompt": "p", "completion": "c", "judgment": None, "score": 2},
        {"prompt": "p", "completion": "d", "judgment": None, "score": 9},
    ]
    records, report = load(write(tmp_path / "r.jsonl", rows), "judged")
    assert [r.completion for r in records] == ["d"]
    assert report.dropped == {"judgment: none, but a score below 7": 1}


def test_preference_with_prompt(tmp_path):
    row = {"prompt": "p", "chosen": "good", "rejected": [assistant("bad")]}
    record = load_row(tmp_path, row)
    assert (record.kind, record.prompt, record.chosen, record.rejected) == (
        "preference",
        (user("p"),),
        "good",
        "bad",
    )


def test_preference_as_hh_dialogues(tmp_path):
    head = "\n\nHuman: One?\n\nAssistant: Yes:\n\nsee \n\nHuman: Two?\n\nAssistant:"
    record = load_row(tmp_path, {"chosen": head + " A ", "rejected": head + " B"})
    assert record.prompt == (user("One?"), assistant("Yes:\n\nsee"), user("Two?"))
    assert (record.chosen, record.rejected) == ("A", "B")


@pytest.mark.parametrize("repeat", [False, True])
def test_a_prompt_may_be_an_hh_dialogue(tmp_path, repeat):
    """As others publish Anthropic's data: the dialogue in a prompt column, with or without the
    same dialogue before each answer."""
    prompt = "\n\nHuman: One?\n\nAssistant: Yes.\n\nHuman: Two?\n\nAssistant:"
    before = prompt if repeat else ""
    row = {"prompt": prompt, "chosen": f"{before} A", "rejected": f"{before} B"}
    record = load_row(tmp_path, row)
    assert record.prompt == (user("One?"), assistant("Yes."), user("Two?"))
    assert (record.chosen, record.rejected) == ("A", "B")
    # Text that only mentions such turns is text.
    plain = {"prompt": "Who says Human: and Assistant:?", "chosen": "A", "rejected": "B"}
    assert load_row(tmp_path, plain).prompt == (user("Who says Human: and Assistant:?"),)


def test_preference_as_message_lists_with_system_column(tmp_path):
    head = [user("One?"), assistant("Yes"), user("Two?")]
    row = {"chosen": [*head, assistant("A")], "rejected": [*head, assistant("B")], "system": "S"}
    record = load_row(tmp_path, row)
    assert record.prompt == ({"role": "system", "content": "S"}, *head)
    assert (record.chosen, record.rejected) == ("A", "B")


def test_messages(tmp_path):
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    rows = [
        {
            "messages": [
                user("a"),
                assistant("b", loss=False),
                user("c"),
                call,
                {"role": "tool", "content": ""},
                assistant("d"),
            ],
            "tools": '[{"name": "f"}]',
            "weight": 2,
        }
    ]
    (record,) = load_rows(tmp_path, rows)
    assert record.kind == "messages" and record.prompt == ()
    assert [m["content"] for m in record.messages] == ["a", "b", "c", "", "", "d"]
    assert record.messages[1]["loss"] is False
    assert record.messages[3]["tool_calls"] == [{"function": {"name": "f"}}]
    assert (record.tools, record.weight) == (({"name": "f"},), 2.0)


@pytest.mark.parametrize(
    ("extra", "prompt"),
    [
        ({}, "Add."),
        ({"input": ""}, "Add."),
        ({"input": None}, "Add."),
        ({"input": "No input"}, "Add."),
        ({"input": "< noinput >"}, "Add."),
        ({"input": "\\<noinput\\>"}, "Add."),
        ({"input": "1 2"}, "Add.\n\n1 2"),
        ({"input": "no input was given"}, "Add.\n\nno input was given"),
    ],
)
def test_alpaca(tmp_path, extra, prompt):
    record = load_row(tmp_path, {"instruction": "Add.", "output": "3"} | extra)
    assert (record.kind, record.prompt, record.completion) == ("completion", (user(prompt),), "3")


def test_alpaca_with_preferences_and_system(tmp_path):
    row = {"instruction": "Add.", "chosen": "3", "rejected": "4", "system": "S"}
    record = load_row(tmp_path, row)
    assert record.prompt == ({"role": "system", "content": "S"}, user("Add."))


def test_prompt_alone(tmp_path):
    rows = [{"prompt": "p"}, {"prompt": [user("a"), assistant("b"), user("c")]}]
    records = load_rows(tmp_path, rows)
    assert [r.kind for r in records] == ["prompt", "prompt"]
    assert records[1].prompt == (user("a"), assistant("b"), user("c"))


def test_columns_rename(tmp_path):
    rows = [{"question": "q", "good": "a", "rejected": "unused", "chosen": "b"}]
    columns = {"prompt": "question", "chosen": "good", "rejected": "chosen"}
    record = load_row(tmp_path, rows[0], columns=columns)
    assert (record.prompt, record.chosen, record.rejected) == ((user("q"),), "a", "b")


def test_renames_are_checked(tmp_path):
    path = write(tmp_path / "r.jsonl", [{"question": "q", "answer": "a"}])
    with pytest.raises(ConfigError) as caught:
        load(path, columns={"prompt": "quetion"})
    assert str(caught.value) == (
        f"{path}: columns says that 'prompt' is 'quetion', which no row has: "
        "the file has question, answer"
    )
    with pytest.raises(ConfigError, match="columns names 'promt', no column of ours: did you mean"):
        load(path, columns={"promt": "question"})


# --- kinds and conversions ---

JUDGED = [
    {"prompt": "p", "completion": "good", "judgment": None},
    {"prompt": "q", "completion": "bad", "judgment": "Wrong sum."},
]
PAIR = {"prompt": "p", "chosen": "good", "rejected": "bad"}
DIALOGUE = {"messages": [user("a"), assistant("b"), user("c"), assistant("d")]}


@pytest.mark.parametrize(
    ("rows", "want", "expected"),
    [
        (JUDGED, "prompt", [((user("p"),), None), ((user("q"),), None)]),
        # A criticised answer is not imitated.
        (JUDGED, "completion", [((user("p"),), "good")]),
        ([PAIR], "prompt", [((user("p"),), None)]),
        ([PAIR], "completion", [((user("p"),), "good")]),
        ([DIALOGUE], "prompt", [((user("a"), assistant("b"), user("c")), None)]),
        ([DIALOGUE], "completion", [((user("a"), assistant("b"), user("c")), "d")]),
    ],
)
def test_conversions(tmp_path, rows, want, expected):
    records = load_rows(tmp_path, rows, want)
    assert [(r.prompt, r.completion) for r in records] == expected
    assert {r.kind for r in records} == {want}
    assert all(r.judgment is r.chosen is r.rejected is None and not r.messages for r in records)


def test_conversion_to_messages(tmp_path):
    (judged,) = load_rows(tmp_path, JUDGED, "messages")
    pair = load_row(tmp_path, PAIR, "messages")
    for record in (judged, pair):
        assert record.messages == (user("p"), assistant("good")) and record.prompt == ()


def test_several_wanted_kinds_take_what_the_file_has(tmp_path):
    both = ("completion", "messages")
    assert load_row(tmp_path, DIALOGUE, both).kind == "messages"
    assert load_row(tmp_path, {"prompt": "p", "completion": "c"}, both).kind == "completion"
    assert load_row(tmp_path, PAIR, both).completion == "good"


def test_dialogue_without_an_answer_at_the_end_is_no_completion(tmp_path):
    row = {"messages": [user("a"), assistant("b"), user("c")]}
    assert load_row(tmp_path, row, "prompt").prompt == tuple(row["messages"])
    assert error_of(tmp_path, row, "completion").endswith("must end with an assistant message")


@pytest.mark.parametrize(
    ("row", "want", "needed"),
    [
        (PAIR, "judged", "prompt + completion + judgment"),
        ({"prompt": "p", "completion": "c"}, "judged", "prompt + completion + judgment"),
        ({"prompt": "p", "completion": "c"}, "preference", "chosen + rejected"),
        ({"text": "t"}, ("completion", "messages"), "prompt + completion; or messages"),
    ],
)
def test_columns_that_cannot_serve(tmp_path, row, want, needed):
    assert error_of(tmp_path, row, want) == (
        f"F: has columns {', '.join(row)}: this method needs {needed} "
        "(the dataset's `columns` setting renames)"
    )


# --- malformed rows ---


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": ""}, "F:1: field prompt: value '': must not be empty"),
        ({"prompt": " \n"}, "F:1: field prompt: value ' \\n': must not be empty"),
        ({"prompt": None}, "F:1: field prompt: value None: text is needed here"),
        ({"prompt": 3}, "F:1: field prompt: value 3: want text or a list of messages"),
        ({"prompt": []}, "F:1: field prompt: value []: must not be empty"),
        (
            {"prompt": ["hi"]},
            'F:1: field prompt[0]: value \'hi\': want {"role": ..., "content": ...}',
        ),
        (
            {"prompt": [{"role": "human", "content": "x"}]},
            "F:1: field prompt[0].role: value 'human': want one of system, developer, user, "
            "assistant, tool",
        ),
        (
            {"prompt": [user("x"), assistant("y")]},
            "F:1: field prompt: value [{'role': 'user', 'content': 'x'}, {'role': 'assistant', "
            "'co...: must end before the answer, with a user or tool message",
        ),
        (
            {"prompt": [{"role": "system", "content": "x"}]},
            "F:1: field prompt: value [{'role': 'system', 'content': 'x'}]: needs a user message",
        ),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image"}]}]},
            "F:1: field prompt[0].content: value [{'type': 'image'}]: "
            "want text or a list of text parts",
        ),
        (
            {"prompt": [user("x"), {"role": "user"}]},
            "F:1: field prompt[1].content: value None: text is needed here",
        ),
        (
            {"prompt": "p\ud800"},
            "F:1: field prompt: value 'p\\ud800': holds half of a surrogate pair, which is no text",
        ),
        (
            {"prompt": "p", "completion": " "},
            "F:1: field completion: value ' ': must not be empty",
        ),
        ({"prompt": "p", "completion": 1.5}, "F:1: field completion: value 1.5: want text or"),
        (
            {"prompt": "p", "completion": [user("x")]},
            "F:1: field completion: value [{'role': 'user', 'content': 'x'}]: "
            "must end with an assistant message",
        ),
        (
            {"prompt": "p", "completion": [user("q"), assistant("x")]},
            "F:1: field completion: value [{'role': 'user', 'content': 'q'}, {'role': 'assistant', "
            "'co...: the messages before the answer differ from the prompt's",
        ),
        (
            {"prompt": "p", "completion": [assistant("", tool_calls=[{"name": "f"}])]},
            "an answer with tool calls is trained as `messages`",
        ),
        (
            {"prompt": "p", "completion": "c", "judgment": False},
            "F:1: field judgment: value False: want text",
        ),
        (
            {"prompt": "p", "completion": "c", "judgment": "j", "score": "9"},
            "F:1: field score: value '9': want a number",
        ),
        (
            {"prompt": "p", "completion": "c", "judgment": "j", "score": math.nan},
            "F:1: field score: value nan: want a finite number",
        ),
        (
            {"prompt": "p", "chosen": "x ", "rejected": " x"},
            "F:1: field rejected: value ' x': must differ from chosen",
        ),
        (
            {"chosen": "Hello", "rejected": "x"},
            "F:1: field chosen: value 'Hello': without a prompt column, want messages or",
        ),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"},
            "F:1: field rejected: value '\\n\\nHuman: c\\n\\nAssistant: d': "
            "the dialogue before the last answer differs from that of chosen",
        ),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant:", "rejected": "\n\nHuman: a\n\nAssistant: d"},
            "F:1: field chosen: value '': must not be empty",
        ),
        (
            {"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: a\n\nAssistant: d"},
            "F:1: field chosen: value '\\n\\nHuman: a': must end with an assistant message",
        ),
        (
            {"chosen": "\n\nAssistant: a", "rejected": "\n\nAssistant: d"},
            "F:1: field chosen: value '\\n\\nAssistant: a': holds no prompt before the answer",
        ),
        (
            {"chosen": [user("a"), assistant("b"), assistant("c")], "rejected": "x"},
            "the last answer follows another answer, so there is no prompt that ends before it",
        ),
        ({"messages": "x"}, "F:1: field messages: value 'x': want text or a list of messages"),
        (
            {"messages": [user("x"), assistant("y", loss=False)]},
            "needs an assistant message that is trained on",
        ),
        (
            {"messages": [assistant("y")]},
            "the first message cannot be the assistant's: nothing precedes it",
        ),
        (
            {"messages": [user("x"), assistant("y", loss="no")]},
            "F:1: field messages[1].loss: value 'no': want true or false",
        ),
        (
            {"messages": [user("x"), assistant("")]},
            "F:1: field messages[1].content: value '': must not be empty",
        ),
        ({"prompt": "p", "weight": 0}, "F:1: field weight: value 0: want a finite number above 0"),
        ({"prompt": "p", "weight": True}, "F:1: field weight: value True: want a number"),
        ({"prompt": "p", "weight": math.inf}, "F:1: field weight: value inf: want a finite number"),
        ({"prompt": "p", "tools": "[}"}, "F:1: field tools: value '[}': want a list or its JSON"),
        ({"prompt": "p", "tools": {"a": 1}}, "F:1: field tools: value {'a': 1}: want a list of"),
        (
            {"prompt": [{"role": "system", "content": "a"}, user("b")], "system": "c"},
            "F:1: field system: value 'c': the dialogue already begins with a system message",
        ),
        ({"instruction": "", "output": "x"}, "F:1: field instruction: value '': must not be empty"),
        ({"instruction": "i", "input": 3, "output": "x"}, "F:1: field input: value 3: want text"),
        ({"instruction": "i", "output": ""}, "F:1: field output: value '': must not be empty"),
        ("x", "F:1: value 'x': a row is an object of columns"),
    ],
)
def test_malformed_rows_are_named(tmp_path, row, message):
    assert message in error_of(tmp_path, row)


def test_malformed_rows_are_dropped_and_counted(tmp_path):
    path = tmp_path / "r.jsonl"
    lines = [
        b'\xef\xbb\xbf{"prompt": "one", "completion": "1"}\r',
        b"",
        b'{"prompt": "", "completion": "1"}',
        b"{not json}",
        b'{"prompt": "\xff", "completion": "1"}',
        b"   ",
        b'{"prompt": "", "prompt": "two", "completion": "2\xe2\x80\xa8"}',
        b'{"prompt": "x", "completion": ""}',
        b'{"prompt": "x", "completion": null}',
        b"[" * 100_000,
    ]
    path.write_bytes(b"\n".join(lines))
    records, report = load(path, strict=False)
    assert [(r.source, r.completion) for r in records] == [
        (f"{path}:1", "1"),
        (f"{path}:7", "2\u2028"),
    ]
    assert report.dropped == {
        "not JSON": 2,
        "not UTF-8": 1,
        "prompt: empty": 1,
        "completion: empty": 1,
        "completion: missing": 1,
    }
    text = [line.replace(str(path), "F") for line in report.lines()]
    assert text[:3] == [
        "F: 8 rows, 2 usable (completion)",
        "  dropped 2 x not JSON (first: F:4: not JSON: Expecting property name enclosed in double "
        "quotes at column 2)",
        "  dropped 1 x not UTF-8 (first: F:5: not UTF-8 at byte 13 of the line: "
        "save the file as UTF-8)",
    ]
    with pytest.raises(ConfigError, match=r"r\.jsonl:4: not JSON: Expecting property name"):
        load(path, strict=True)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("content", ["", "\n\r\n", "[]", "\ufeff"])
def test_empty_file(tmp_path, strict, content):
    path = tmp_path / "r.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load(path, strict=strict)
    assert str(caught.value) == f"{path}: holds no rows"


def test_all_bad_file(tmp_path):
    path = write(tmp_path / "r.jsonl", [{"prompt": ""}, {"prompt": 3}, {"prompt": " "}])
    with pytest.raises(ConfigError) as caught:
        load(path, strict=False)
    assert str(caught.value) == (
        f"{path}: none of 3 rows can be used: "
        f"2 x prompt: empty (first: {path}:1: field prompt: value '': must not be empty); "
        f"1 x prompt: wrong type (first: {path}:2: field prompt: value 3: "
        "want text or a list of messages)"
    )


COLUMN_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["\n\nHuman: a\n\nAssistant: b", "user", "assistant", "tool", "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "role",
                    "content",
                    "loss",
                    "tool_calls",
                    "text",
                    "type",
                    "preferred",
                    "principle",
                    "response",
                    "annotations",
                    "honesty",
                    "Rating",
                    "Rationale",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)
NAMES = st.sampled_from(
    ["prompt", "completion", "judgment", "score", "chosen", "rejected", "messages", "instruction",
     "input", "output", "system", "tools", "weight", "other", "completions", "judgments", "noise",
     "token_ids", "prompt_ids", "comparisons"]
)  # fmt: skip


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.lists(COLUMN_VALUES | st.dictionaries(NAMES, COLUMN_VALUES, max_size=6), max_size=4),
    want=st.sampled_from([None, "prompt", "completion", "judged", "preference", "messages"]),
    strict=st.booleans(),
)
def test_no_row_breaks_the_loader(tmp_path, rows, want, strict):
    """Whatever a row holds, it is a record or a ConfigError that can be printed."""
    path = write(tmp_path / "any.jsonl", rows)
    try:
        records, report = load(path, want, strict)
    except ConfigError as error:
        assert str(error).startswith(path)
        str(error).encode("utf-8")
        return
    (source,) = report.sources
    assert len(records) + sum(report.dropped.values()) == source.rows
    assert source.rows == len(rows) or any("completions" in row for row in rows)
    for record in records:
        texts = [m["content"] for m in record.prompt + record.messages]
        texts += [t for t in (record.completion, record.chosen, record.rejected) if t is not None]
        "".join(texts).encode("utf-8")
        assert math.isfinite(record.weight) and record.weight > 0
        assert want is None or record.kind == want


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(content=st.binary(max_size=60), suffix=st.sampled_from(["jsonl", "json", "parquet"]))
def test_no_file_breaks_the_loader(tmp_path, content, suffix):
    path = tmp_path / f"any.{suffix}"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(str(path))):
        load(path, strict=False)


# --- files ---


def test_json_array_with_row_numbers(tmp_path):
    path = tmp_path / "r.json"
    path.write_text("\ufeff \n" + json.dumps([{"prompt": "a"}, {"prompt": "b"}], indent=1), "utf-8")
    assert [r.source for r in load(path)[0]] == [f"{path}:row 1", f"{path}:row 2"]


def test_json_file_of_lines(tmp_path):
    path = tmp_path / "r.json"
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}\n', "utf-8")
    assert [r.prompt[0]["content"] for r in load(path)[0]] == ["a", "b"]


def test_broken_json_array(tmp_path):
    path = tmp_path / "r.json"
    path.write_text('[{"prompt": "a"},\n {"prompt": }]', "utf-8")
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert str(caught.value) == f"{path}:2: not a JSON array: Expecting value at column 13"
    path.write_bytes(b'[{"prompt":\n "\xff"}]')
    with pytest.raises(ConfigError, match=r"r\.json:2: not UTF-8"):
        load(path)


def test_parquet(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    # Arrow gives both messages every key: the nulls it fills in must not reach the template.
    rows = [
        {"messages": [user("a"), assistant("b", loss=False), user("c"), assistant("d")]},
        {"messages": [user("e"), assistant("f")]},
    ]
    path = tmp_path / "r.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    records, _ = load(path)
    assert [r.source for r in records] == [f"{path}:row 1", f"{path}:row 2"]
    assert records[1].messages == (user("e"), assistant("f"))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ConfigError, match=r"r\.parquet: not a readable Parquet file"):
        load(path)


def test_missing_file(tmp_path):
    for name in (f"{tmp_path}/none.jsonl", "none.json", "./none", "a/b/c", "none.parquet"):
        with pytest.raises(ConfigError) as caught:
            load(name)
        assert str(caught.value) == f"{name}: no such file"


def test_hub_dataset(monkeypatch):
    import datasets

    def load_dataset(name, split):
        assert (name, split) == ("owner/name", "test")
        return datasets.Dataset.from_list([{"prompt": "a"}, {"prompt": "b"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    records, _ = load("owner/name", split="test")
    assert [(r.source, r.prompt) for r in records] == [
        ("owner/name[test]:1", (user("a"),)),
        ("owner/name[test]:2", (user("b"),)),
    ]


def test_hub_failure_is_a_named_error(monkeypatch):
    import datasets

    def load_dataset(name, split):
        raise ConnectionError("cannot reach it\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ConfigError) as caught:
        load("owner/name")
    assert str(caught.value) == (
        "owner/name: neither a file nor a dataset that can be loaded from the hub "
        "(split 'train'): ConnectionError: cannot reach it"
    )


def test_datasets_are_concatenated_and_numbered(tmp_path):
    one = write(tmp_path / "one.jsonl", [{"prompt": "a"}])
    two = write(tmp_path / "two.jsonl", [{"instruction": "b"}, {"instruction": "c"}])
    configs = [DatasetConfig(path=one), DatasetConfig(path=two)]
    records, report = load_records(configs, strict=True, seed=0)
    assert [(r.dataset, r.prompt[0]["content"]) for r in records] == [(0, "a"), (1, "b"), (1, "c")]
    assert [s.path for s in report.sources] == [one, two]


# --- noise ---


@pytest.mark.parametrize(
    ("judgment", "reason"),
    [
        ("$ERROR$", "judgment: error sentinel instead of a judgment"),
        (" error. ", "judgment: error sentinel instead of a judgment"),
        ("Error in line 2.", None),
        ("The response is perfect.", "judgment: praise marked negative"),
        ("The response is perfect. It explains why the sky is not red.", "judgment: praise marked"),
        ("The response is perfect as it answers the question.", "judgment: praise marked negative"),
        ("This answer was flawless!", "judgment: praise marked negative"),
        ("Perfect!", "judgment: praise marked negative"),
        ("The response is correct.", "judgment: praise marked negative"),
        ("The response is perfect, but it is too long.", None),
        ("The response is perfect. However, a title was asked for.", None),
        ("The response is almost perfect. The sum is wrong.", None),
        ("The response is not perfect.", None),
        ("The answer is perfect, until it makes a fatal mistake.", None),
        ("The response is good. The sum is wrong.", None),
        ("The response is incorrect.", None),
    ],
)
def test_noise(judgment, reason):
    found = noise_reason(judgment)
    assert found is None if reason is None else found is not None and found.startswith(reason)


def test_noise_is_filtered_and_counted_also_when_strict(tmp_path):
    judgments = ["$ERROR$", "Wrong.", "The response is perfect.", None, "$ERROR$"]
    rows = [{"prompt": "p", "completion": "c", "judgment": j} for j in judgments]
    path = write(tmp_path / "r.jsonl", rows)
    records, report = load(path, "judged", strict=True)
    assert [r.judgment for r in records] == ["Wrong.", None]
    assert report.lines() == [
        f"{path}: 5 rows, 2 usable (judged: 1 fine, 1 with a judgment)",
        f"  dropped 2 x judgment: error sentinel instead of a judgment (first: {path}:1)",
        f"  dropped 1 x judgment: praise marked negative (first: {path}:3)",
    ]


@pytest.mark.skipif(not REAL.is_dir(), reason="the data to try on is not here")
@pytest.mark.parametrize(
    ("name", "want", "rows", "fine", "negative", "dropped"),
    [
        ("cut_online_1.json", "judged", 1000, 713, 225, {"error sentinel": 47, "praise": 15}),
        ("cut_online_4.json", "judged", 1000, 755, 232, {"error sentinel": 1, "praise": 12}),
        ("shepherd.jsonl", "judged", 1000, 0, 1000, {}),
        ("hh_harmless.jsonl", "preference", 1500, 1494, 0, {"chosen": 5, "rejected": 1}),
    ],
)
def test_real_data(name, want, rows, fine, negative, dropped):
    records, report = load(REAL / name, want, strict=False)
    (source,) = report.sources
    assert source.rows == rows and len(records) == fine + negative == source.usable
    assert source.negative == negative
    counted = Counter()
    for reason, count in report.dropped.items():
        counted[next(key for key in dropped if key in reason)] += count
    assert counted == dropped


# --- sampling ---


def contents(records: list[Record]) -> list[str]:
    return [r.prompt[0]["content"] for r in records]


@pytest.mark.parametrize(
    ("weight", "max_samples", "expected"),
    [(1, None, 11), (2, None, 22), (0.5, None, 6), (1.5, None, 17), (0.01, None, 1), (2, 3, 6),
     (0.5, 4, 2), (1, 99, 11)],
)  # fmt: skip
def test_weight_and_max_samples(tmp_path, weight, max_samples, expected):
    path = write(tmp_path / "r.jsonl", [{"prompt": f"{i:02}"} for i in range(11)])
    options = {"weight": weight, "max_samples": max_samples}
    first = contents(load(path, seed=1, **options)[0])
    assert len(first) == expected
    assert first == contents(load(path, seed=1, **options)[0])
    times = Counter(first)
    assert max(times.values()) - (min(times.values()) if weight > 1 else 1) <= 1
    assert max(times.values()) == math.ceil(weight)
    # Every copy and every part is in file order.
    assert sum(a > b for a, b in itertools.pairwise(first)) < math.ceil(weight)


def test_the_seed_decides_the_half(tmp_path):
    path = write(tmp_path / "r.jsonl", [{"prompt": f"{i:02}"} for i in range(40)])
    halves = {tuple(contents(load(path, seed=seed, weight=0.5)[0])) for seed in (-1, 0, 1, 2)}
    assert len(halves) == 4
    _, report = load(path, weight=0.5)
    assert report.lines() == [
        f"{path}: 40 rows, 40 usable (prompt), 20 records after max_samples and weight"
    ]


def judged(positive: int, negative: int) -> list[Record]:
    return [
        Record("judged", (user(str(i)),), "c", judgment="Bad." if i % 7 < 2 and i < 200 else None)
        for i in range(positive + negative)
    ]


# --- splitting ---


def test_split_keeps_prompts_together():
    # Prompt i appears i % 4 + 1 times, with spaces that make no difference.
    records = [
        Record("completion", (user(f" {i} " if k else str(i)),), f"c{k}", source=f"{i}.{k}")
        for i in range(40)
        for k in range(i % 4 + 1)
    ]
    train, held = split_records(records, 0.2, seed=5)
    assert len(train) + len(held) == 100 and 15 <= len(held) <= 20
    sides = [{r.source.split(".")[0] for r in side} for side in (train, held)]
    assert not sides[0] & sides[1]
    # The order of the file does not matter, the seed does.
    again = split_records(records[::-1], 0.2, seed=5)[1]
    assert {r.source for r in again} == {r.source for r in held}
    assert {r.source for r in split_records(records, 0.2, seed=6)[1]} != {r.source for r in held}


def test_split_of_dialogues_goes_by_the_first_question():
    rows = [(user(str(i % 5)), assistant(str(i)), user("and?"), assistant("so")) for i in range(50)]
    train, held = split_records([Record("messages", messages=m) for m in rows], 0.2, seed=0)
    firsts = [{r.messages[0]["content"] for r in side} for side in (train, held)]
    assert len(held) == 10 and not firsts[0] & firsts[1]


def test_split_edges():
    records = [Record("prompt", (user(str(i // 4)),)) for i in range(8)]
    assert split_records(records, 0.0, seed=0) == (records, [])
    for ratio in (0.01, 0.5, 0.99):
        train, held = split_records(records, ratio, seed=0)
        assert (len(train), len(held)) == (4, 4)
    with pytest.raises(ConfigError, match="1 different prompt"):
        split_records(records[:4], 0.5, seed=0)


# --- streams ---


def test_stream_of():
    stream = Stream.of("plain", np.array([5, 6, 7], np.int32), np.array([8, 9], np.int64))
    assert stream.input_ids.tolist() == [5, 6, 7, 8, 9] and stream.input_ids.dtype == np.int32
    assert stream.loss_mask.tolist() == [False, False, False, True, True]
    assert Example((stream, stream), 1.0, "s").num_tokens == 10


@pytest.mark.parametrize("mask", [[True, False], [False, False]])
def test_stream_invariants(mask):
    with pytest.raises(AssertionError):
        Stream("plain", np.array([1, 2], np.int32), np.array(mask))
