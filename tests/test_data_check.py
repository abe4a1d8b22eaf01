"""``fastalign data check``: what it says of files is what training makes of them."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import recipe, rows, write_rows

from fastalign import prepare
from fastalign.cli import main
from fastalign.config import ConfigError
from fastalign.data_check import (
    SHOWN_CHARACTERS,
    Compared,
    Part,
    Settings,
    Tally,
    _marked,
    check_file,
    printable,
)
from fastalign.methods import make_method
from fastalign.model import load_tokenizer

REAL = Path(os.environ.get("FASTALIGN_REAL_DATA", "real-data"))
JUDGED = [
    {"prompt": "the sum of two", "completion": "is one", "judgment": "It is two."},
    {"prompt": "the sum", "completion": "is two", "judgment": None},
    {"prompt": "the sum", "completion": "is in Paris", "judgment": "$ERROR$"},
    {"prompt": "the sum", "completion": "is seven", "judgment": "The response is perfect."},
    {"prompt": "the sum", "completion": 7, "judgment": None},
    {"prompt": "the sum", "completion": "is two", "judgment": "Repeated."},
]


def parts_of(report: Any) -> list[list[tuple[str, bool]]]:
    return [[(part.text, part.trained) for part in shown.parts] for shown in report.rendered]


# ------------------------------------------------------------------------------ what is counted


def test_rows_noise_and_duplicates_are_counted_with_their_first_case(tmp_path):
    path = str(write_rows(tmp_path / "d.jsonl", JUDGED))
    seen: dict[Any, str] = {}
    report = check_file(path, Settings(), seen)
    assert (report.kind, report.rows, report.usable) == ("judged", 6, 3)
    assert (report.positive, report.negative) == (1, 2)
    assert report.noise == {
        "judgment: error sentinel instead of a judgment": Tally(1, f"{path}:3"),
        "judgment: praise marked negative": Tally(1, f"{path}:4"),
    }
    message = f"{path}:5: field completion: value 7: want text or a list of messages"
    assert report.dropped == {"completion: wrong type": Tally(1, message)}
    assert report.duplicates == Tally(1, f"{path}:6, as {path}:2")
    # Another file repeats all three that were usable here.
    other = str(write_rows(tmp_path / "e.jsonl", JUDGED[:2]))
    assert check_file(other, Settings(), seen).duplicates == Tally(2, f"{other}:1, as {path}:1")


def test_lengths_are_in_words_without_a_tokenizer(tmp_path):
    content = [{"prompt": "a " * n, "completion": "b", "judgment": "c d"} for n in range(1, 102)]
    report = check_file(str(write_rows(tmp_path / "d.jsonl", content)), Settings())
    assert report.unit == "words" and report.max_length is None
    assert list(report.lengths) == ["prompt", "completion", "judgment"]
    expected = {"min": 1, "median": 51, "90 %": 91, "99 %": 100, "max": 101}
    assert report.lengths["prompt"] == expected
    assert set(report.lengths["judgment"].values()) == {2}


@pytest.mark.parametrize("kind", ["judged", "completion", "preference"])
def test_lengths_and_truncations_are_those_of_training(kind, tiny_llama, tmp_path):
    name = {"judged": "cut", "completion": "sft", "preference": "dpo"}[kind]
    config = recipe(name, tiny_llama, tmp_path, max_length=138)
    (dataset,) = config.datasets
    report = check_file(dataset.path, Settings(str(tiny_llama), max_length=138))

    def examples(max_length: int):
        limited = config.model_copy(update={"max_length": max_length})
        method = make_method(limited)
        renderers = prepare.make_renderers(limited, load_tokenizer(limited), None)
        records, _, _ = prepare.load_data(limited, method)
        return prepare.make_examples(method, records, renderers, limited)

    whole, _ = examples(10_000)
    kept, drops = examples(138)
    targets = {e.source: [int(s.loss_mask.sum()) for s in e.streams] for e in whole}
    cut = [
        e.source for e in kept if targets[e.source] != [int(s.loss_mask.sum()) for s in e.streams]
    ]
    assert report.usable == len(kept) and report.dropped == {
        reason: Tally(count, drops.first[reason]) for reason, count in drops.counts.items()
    }
    if kind == "judged":
        assert 0 < len(kept) < 12 and cut, "the limit has to show in this test"
    assert [tally.count for tally in report.cut.values()] == ([len(cut)] if cut else [])
    assert [tally.first for tally in report.cut.values()] == cut[:1]
    name = "chosen" if kind == "preference" else "completion"
    answers = [counts[0] for counts in targets.values()]
    assert report.unit == "tokens"
    assert report.lengths[name]["median"] == np.quantile(answers, 0.5)
    prompts = [len(e.streams[0]) - targets[e.source][0] for e in whole]
    assert report.lengths["prompt"]["max"] == max(prompts)
    together = [max(len(s) for s in e.streams) for e in whole]
    assert report.lengths["together"]["max"] == max(together)
    assert report.lengths["together"]["median"] == np.quantile(together, 0.5)


def test_the_rendered_rows_are_what_is_trained(tiny_llama, tmp_path):
    path = str(write_rows(tmp_path / "d.jsonl", JUDGED))
    report = check_file(path, Settings(str(tiny_llama)))
    assert [(s.source, s.stream) for s in report.rendered] == [
        (f"{path}:1", "plain"), (f"{path}:1", "judged"), (f"{path}:2", "plain"),
        (f"{path}:6", "plain"), (f"{path}:6", "judged"),
    ]  # fmt: skip
    plain, judged = parts_of(report)[:2]
    opened = "<|im_end|>\n<|im_start|>assistant\n"
    asked = f"<|im_start|>user\nthe sum of two{opened}"
    assert plain == [(asked, False), ("is one<|im_end|>", True)]
    assert "It is two." in judged[0][0] and judged[0][0].endswith(opened)
    assert judged[1] == ("is one<|im_end|>", True)


def test_a_text_template_and_its_limit(tiny_llama, tmp_path):
    path = str(write_rows(tmp_path / "d.jsonl", JUDGED))
    settings = Settings(str(tiny_llama), template="alpaca", max_length=2048)
    (prompt, answer), *_ = parts_of(check_file(path, settings))
    assert prompt[0].endswith("### Instruction:\nthe sum of two\n\n### Response:\n")
    assert answer == ("is one<|im_end|>", True)


def test_three_rows_show_both_kinds(tmp_path):
    fine = [{"prompt": f"{i}", "completion": "b", "judgment": None} for i in range(9)]
    content = [*fine[:7], fine[7] | {"judgment": "No."}, fine[8] | {"judgment": "No."}]
    path = str(write_rows(tmp_path / "d.jsonl", content))
    shown = dict.fromkeys(s.source for s in check_file(path, Settings()).rendered)
    assert list(shown) == [f"{path}:1", f"{path}:2", f"{path}:8"]


def test_dialogues_preferences_and_prompts(tiny_llama, tmp_path):
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    dialogue = [{"role": r, "content": c} for r, c in turns]
    dialogue[1]["loss"] = False
    files = {
        "messages": [{"messages": dialogue}],
        "preference": [{"prompt": "a", "chosen": "one", "rejected": "two"}],
        "prompt": [{"prompt": "the sum"}, {"prompt": "the " * 60}],
    }
    for kind, content in files.items():
        path = str(write_rows(tmp_path / f"{kind}.jsonl", content))
        report = check_file(path, Settings(str(tiny_llama), max_length=64))
        assert report.kind == kind and report.negative is None
        marked = [[text for text, trained in shown if trained] for shown in parts_of(report)]
        expected = {"messages": [["d<|im_end|>"]], "prompt": [[]]}
        assert marked == expected.get(kind, [["one<|im_end|>"], ["two<|im_end|>"]])
        as_read = check_file(path, Settings())
        assert as_read.unit == "words" and as_read.rendered
    assert report.dropped == {
        "max_length: the prompt leaves no room for an answer": Tally(1, f"{path}:2")
    }
    trained = check_file(str(tmp_path / "messages.jsonl"), Settings()).rendered[0].parts
    assert [(p.text, p.trained) for p in trained if len(p.text) == 1] == [
        ("a", False), ("b", False), ("c", False), ("d", True),
    ]  # fmt: skip


WHY = {"rationale_chosen": "It is sure.", "rationale_rejected": "It is not."}
COMPARED = [
    {"preferred": "chosen", "principle": "honesty"} | WHY,
    {"preferred": "rejected", "principle": "wit"},
]


def test_comparisons_are_counted_and_rendered_as_jsft_learns_them(tiny_llama, tmp_path, capsys):
    pair = {"prompt": "the sum", "chosen": "is one", "rejected": "is two"}
    content = [
        pair,
        pair | {"chosen": "is 1", "comparisons": COMPARED},
        pair | {"chosen": "is 2", "comparisons": [COMPARED[0], {"preferred": "chosen"}]},
    ]
    path = str(write_rows(tmp_path / "d.jsonl", content))
    report = check_file(path, Settings(str(tiny_llama)))
    assert report.comparisons == {
        "honesty": Compared(2, 0, 2), "wit": Compared(1, 1, 0), "overall": Compared(1, 0, 0),
    }  # fmt: skip
    # A row without any is judged overall; of each row the demonstration and one judgment.
    names = [(shown.source, shown.stream) for shown in report.rendered]
    assert names == [(f"{path}:{n}", s) for n in (1, 2, 3) for s in ("demonstration", "judgment")]
    _, overall, shown, judged, *_ = parts_of(report)
    assert shown[-1] == ("is 1<|im_end|>", True)
    assert overall[0][0].endswith(
        "Which response is better? Answer with A or B.<|im_end|>\n"
        "<|im_start|>assistant\nThe better response is"
    )
    assert overall[1:] == [(" A", True)]
    assert "### Principle\nHonesty: " in judged[0][0]
    told = " A\n\nResponse A: It is sure.\n\nResponse B: It is not.<|im_end|>"
    assert judged[1:] == [(told, True)]
    # Lengths of the longest judgment of each row, before any cut.
    config = recipe("jsft", tiny_llama, tmp_path, datasets=[{"path": path}])
    method = make_method(config)
    renderers = prepare.make_renderers(config, load_tokenizer(config), None)
    records, _, _ = prepare.load_data(config, method)
    longest = {}
    for example in prepare.make_examples(method, records, renderers, config)[0]:
        (stream,) = example.streams
        if stream.role == "judgment":
            targets = int(stream.loss_mask.sum())
            longest[example.source] = max(targets, longest.get(example.source, 0))
    assert report.lengths["judgment"]["max"] == max(longest.values())
    assert report.lengths["judgment"]["median"] == np.median(list(longest.values()))
    # The command, and what is said without a tokenizer.
    assert main(["data", "check", path]) == 0
    lines = capsys.readouterr().out.splitlines()
    for line in (
        "  comparisons, honesty: 2 (0 for the rejected answer, 2 with rationales)",
        "  comparisons, wit: 1 (1 for the rejected answer, 0 with rationales)",
        f"{path}:2, honesty: chosen is better",
        "chosen: [It is sure.]",
        f"{path}:2, wit: rejected is better",
    ):
        assert line in lines, line
    assert check_file(path, Settings()).lengths["rationales"]["max"] == 6
    # A limit that only the judgments pass drops their row, as training does.
    room = max(
        len(e.streams[0]) for e in prepare.make_examples(method, records[:1], renderers, config)[0]
    )
    limited = check_file(path, Settings(str(tiny_llama), max_length=room))
    assert limited.usable == 1 and limited.comparisons is None
    assert limited.dropped == {"judgment does not fit in max_length": Tally(2, f"{path}:2")}


def test_ultrafeedback_that_ties_by_every_principle(tmp_path, capsys):
    ratings = [{"honesty": {"Rating": "4"}, "wit": {"Rating": "2"}}, {"honesty": {"Rating": "4"}}]
    row = {
        "instruction": "q",
        "completions": [{"response": f"r{i}", "annotations": r} for i, r in enumerate(ratings)],
    }
    path = str(write_rows(tmp_path / "d.jsonl", [row]))
    assert check_file(path, Settings()).comparisons == {}
    assert main(["data", "check", path]) == 0
    assert "  no comparisons" in capsys.readouterr().out.splitlines()


def test_every_format_is_read_alike(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    content = [
        {"instruction": "the", "input": "sum", "output": "is one", "judgment": "No."},
        {"instruction": "the", "input": "", "output": "is two", "judgment": None},
    ]
    lines = write_rows(tmp_path / "d.jsonl", content)
    (tmp_path / "d.json").write_text(json.dumps(content, indent=1))
    pq.write_table(pa.Table.from_pylist(content), tmp_path / "d.parquet")
    expected = check_file(str(lines), Settings())
    assert expected.rendered[0].parts == (Part("the\n\nsum", False),)
    for name in ("d.json", "d.parquet"):
        report = check_file(str(tmp_path / name), Settings())
        assert report.lengths == expected.lengths and report.negative == 1
        assert parts_of(report) == parts_of(expected)
        assert report.rendered[0].source.endswith(f"{name}:row 1")
    imitated = check_file(str(lines), Settings(kind="completion"))
    assert imitated.kind == "completion" and imitated.usable == 1
    assert list(imitated.dropped) == ["judgment: criticised answers are not imitated"]


@pytest.mark.skipif(not REAL.is_dir(), reason="the data to try on is not here")
@pytest.mark.parametrize(
    ("name", "usable", "negative", "noise"),
    [("shepherd.jsonl", 1000, 1000, []), ("cut_online_1.json", 938, 225, [47, 15]),
     ("cut_online_4.json", 987, 232, [12, 1])],
)  # fmt: skip
def test_published_data_is_read_as_it_is(name, usable, negative, noise, capsys):
    assert main(["data", "check", str(REAL / name), "--json"]) == 0
    (report,) = json.loads(capsys.readouterr().out)
    assert (report["usable"], report["negative"], report["dropped"]) == (usable, negative, {})
    assert [tally["count"] for tally in report["noise"].values()] == noise
    assert len({shown["source"] for shown in report["rendered"]}) == 3


# ---------------------------------------------------------------------------------- the command


def test_the_report_marks_what_is_trained_in_brackets(tiny_llama, tmp_path, capsys):
    path = str(write_rows(tmp_path / "d.jsonl", JUDGED))
    assert main(["data", "check", path, "--model", str(tiny_llama), "--max-length", "512"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for line in (
        f"{path}: 6 rows, 3 usable (judged: 1 fine, 2 with a judgment)",
        f"  noise 1 x judgment: praise marked negative (first: {path}:4)",
        f"  dropped 1 x completion: wrong type (first: {path}:5: field completion: value 7: want "
        "text or a list of messages)",
        f"  1 x the same prompt and answer again (first: {path}:6, as {path}:2)",
        "  lengths in tokens, at most 512 of prompt and answer together",
        "  no answer is cut",
        f"{path}:1, judged",
        "[is one<|im_end|>]",
    ):
        assert line in out.splitlines(), line
    assert any(line.split()[:2] == ["judged", "prompt"] for line in out.splitlines())


def test_json_holds_all_of_the_report(tiny_llama, tmp_path, capsys):
    content = [rows("judged", 3)[1] | {"completion": "is one " * SHOWN_CHARACTERS}]
    path = str(write_rows(tmp_path / "d.jsonl", content))
    assert main(["data", "check", path, "--json"]) == 0
    (tree,) = json.loads(capsys.readouterr().out)
    report = check_file(path, Settings())
    assert tree == json.loads(json.dumps(dataclasses.asdict(report)))
    assert tree["rendered"][1]["parts"][0]["text"] == content[0]["completion"]
    assert main(["data", "check", path]) == 0
    shown = capsys.readouterr().out
    assert f"{7 * SHOWN_CHARACTERS - SHOWN_CHARACTERS} characters" in shown
    assert len(shown) < 3 * SHOWN_CHARACTERS


def test_a_wrong_file_is_named_and_the_others_are_shown(tmp_path, capsys):
    good = str(write_rows(tmp_path / "good.jsonl", JUDGED))
    bad = str(write_rows(tmp_path / "bad.jsonl", [{"prompt": "a", "completion": 7}]))
    none = str(tmp_path / "none.jsonl")
    assert main(["data", "check", none, good, bad]) == 2
    out, err = capsys.readouterr()
    assert out.startswith(f"{good}: 6 rows")
    first, second = err.splitlines()
    assert first == f"fastalign: {none}: no such file"
    assert second.startswith(f"fastalign: {bad}: none of 1 rows can be used")
    assert main(["data", "check", bad, good, "--json"]) == 2
    trees = json.loads(capsys.readouterr().out)
    assert [tree["path"] for tree in trees] == [bad, good]
    assert "none of 1 rows" in trees[0]["error"] and trees[1]["usable"] == 3


def test_mistakes_of_the_command_line(tiny_llama, tmp_path, capsys):
    path = str(write_rows(tmp_path / "d.jsonl", JUDGED))
    model = ["--model", str(tiny_llama)]
    for arguments, complaint in (
        (["--template", "alpaca"], "--template = alpaca: it needs --model"),
        (["--max-length", "7"], "--max-length = 7: it needs --model"),
        ([*model, "--max-length", "7"], "none of 6 rows can be trained on: 3 x max_length"),
        ([*model, "--template", "alpacca"], "template 'alpacca' is neither a file nor one of"),
        (["--model", f"{tmp_path}/nowhere"], "nowhere': no such folder"),
        (["--as", "preference"], "needs chosen + rejected"),
    ):
        assert main(["data", "check", path, *arguments]) == 2
        error = capsys.readouterr().err
        assert complaint in error and "Traceback" not in error and len(error.splitlines()) == 1
    for arguments in ([path, "--as", "pairs"], [path, "--max-length", "0"]):
        with pytest.raises(SystemExit) as stopped:
            main(["data", "check", *arguments])
        assert stopped.value.code == 2


def test_a_template_that_breaks_cut_is_found(tiny_llama, tmp_path):
    path = str(write_rows(tmp_path / "d.jsonl", [JUDGED[0] | {"completion": "swer is"}]))
    template = tmp_path / "quoted.yaml"
    wording = {"prompt": "Q: {instruction}\nA:\n'", "judged_prompt": "{instruction} {judgment}\n"}
    template.write_text(json.dumps({"format": "text"} | wording))
    with pytest.raises(ConfigError, match=r"d\.jsonl:1: the template changes the answer"):
        check_file(path, Settings(str(tiny_llama), str(template)))


# -------------------------------------------------------------------------------- on a terminal


def test_colour_marks_the_trained_part_on_a_terminal():
    text = _marked([Part("asked", False), Part("answered", True)], colour=True)
    assert text.plain == "askedanswered"
    assert [(span.start, span.end) for span in text.spans] == [(5, 13)]
    assert _marked([Part("a", False), Part("b", True)], colour=False).plain == "a[b]"


def test_strangers_text_cannot_steer_the_terminal(tmp_path, capsys):
    steering = "red \x1b[31m bell \x07 back \x08\r over\u202eturned\u2066 \x9b2J"
    assert printable(steering) == (
        r"red \x1b[31m bell \x07 back \x08\r over\u202eturned\u2066 \x9b2J"
    )
    for text in ("tab\tand\nline", "naïve 🐍", "שלום [bold]not markup[/bold]"):
        assert printable(text) == text
    content = [{"prompt": steering, "completion": "[bold]x[/bold]", "judgment": steering}]
    path = str(write_rows(tmp_path / "d.jsonl", content))
    assert main(["data", "check", path]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\u202e" not in out and "\x08" not in out
    assert r"red \x1b[31m" in out and "[[bold]x[/bold]]" in out
