"""``fastalign report``: everything of the runs is on the page, which is inert and readable."""

from __future__ import annotations

import functools
import json
import re
import shlex
import shutil
from collections import Counter
from collections.abc import Sequence
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import yaml
from pages import CHROMIUM, HOSTILE, Page, check_inert, colours, drawn_by_chromium, ratio
from support import recipe, rows, write_rows

from fastalign.cli import main
from fastalign.config import Config
from fastalign.report import (
    MOST_POINTS,
    make_page,
    metric_names,
    read_run,
    read_runs,
    samples_of,
    settings_tables,
    thinned,
    time_table,
)
from fastalign.train import train

pytest.importorskip("matplotlib", reason="pip install 'fastalign[report]'")

LORA = {"use_peft": True, "lora_r": 4, "learning_rate": 3e-3}
RULE = """
def written(prompt, text):
    return None if len(text) % 3 == 0 else f"<b>Has</b> {len(text)} letters & </script>."
"""
CUT = {
    "iterations": 2,
    "prompts_per_iteration": 4,
    "num_generations": 1,
}


def prompts(folder: Path, name: str, count: int) -> list[dict[str, str]]:
    asked = [{"prompt": f"{i}: {text}"} for i, text in enumerate(HOSTILE)]
    made = (asked + rows("prompt", 12))[:count]
    return [{"path": str(write_rows(folder / name, made))}]


@pytest.fixture(scope="module")
def runs(sharp_llama, tmp_path_factory) -> dict[str, Path]:
    """Two runs of online CUT at two learning rates, SELF-JUDGE, and SFT on rows some of which are
    dropped or cut."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs")
    (folder / "rule.py").write_text(RULE)
    judge = {"path": f"{folder / 'rule.py'}:written"}
    held = prompts(folder, "held.jsonl", 3)
    made: dict[str, Config] = {}
    for name, rate in (("cut", 3e-3), ("cut-fast", 1e-2)):
        keys: dict[str, Any] = {"online": CUT, "judge": judge, "eval_steps": "round"}
        keys |= {"datasets": prompts(folder, "p.jsonl", 10), "eval_datasets": held}
        made[name] = recipe(
            "cut", sharp_llama, folder, **LORA | keys | {"learning_rate": rate},
            output_dir=str(folder / name),
        )  # fmt: skip
    pairs = write_rows(folder / "pairs.jsonl", rows("preference", 12))
    made["self"] = recipe(
        "dpo", sharp_llama, folder, **LORA,
        datasets=prompts(folder, "p.jsonl", 10),
        online=CUT | {"num_generations": 2},
        judge={"type": "self", "min_decision_mass": 0.0, "tie_threshold": 0.0},
        judge_datasets=[{"path": str(pairs)}],
        output_dir=str(folder / "self"),
    )  # fmt: skip
    bad = [*rows("completion", 8), {"prompt": "p", "completion": ""}, {"prompt": ""}]
    bad.append({"prompt": "p", "completion": "the sum " * 100})
    data = write_rows(folder / "sft.jsonl", bad)
    made["sft"] = recipe(
        "sft", sharp_llama, folder, **LORA, datasets=[{"path": str(data)}], max_length=100,
        output_dir=str(folder / "sft"),
    )  # fmt: skip
    for config in made.values():
        train(config)
    torch.set_num_threads(threads)
    return {name: Path(config.output_dir) for name, config in made.items()}


def text_of(page: str) -> str:
    """What the page says, as a reader sees it."""
    body = re.sub(r"<(script|style)\b.*?</\1>", "", page, flags=re.DOTALL)
    return unescape(re.sub(r"<[^>]*>", "", body))


def page_of(folders: Sequence[Path]) -> tuple[str, Page]:
    return _page_of(tuple(folders))


@functools.cache
def _page_of(folders: tuple[Path, ...]) -> tuple[str, Page]:
    text = make_page(read_runs(folders))
    return text, Page.of(text)


def test_every_metric_of_every_run_has_a_curve(runs):
    logs = read_runs(list(runs.values()))
    text, page = page_of(list(runs.values()))
    titles = set(re.findall(r'class="curve".*?<h4>(.*?)</h4>', text, re.DOTALL))
    logged = {name for log in logs for line in log.lines for name in line} - {"step"}
    assert {"loss", "cut/flagged", "judge/flipped", "eval/mean_length"} <= titles
    assert titles == {name for name in logged if not name.startswith("time/")}
    assert titles == set(metric_names(logs))
    # Parts of the time stand in the table of time; their sum is a part of none.
    for part in {name for name in logged if name.startswith("time/")} - {"time/step"}:
        assert f"{part.removeprefix('time/').replace('_', ' ')}</th>" in text, part
    for name, values in page.data["curves"].items():
        lines = {line["run"]: line for line in values["lines"]}
        title = re.search(rf'id="{name}".*?<h4>(.*?)</h4>', text, re.DOTALL)[1]
        for r, log in enumerate(logs):
            steps, found = log.series(title)
            assert (r in lines) == bool(steps)
            if steps:
                assert (lines[r]["steps"], lines[r]["values"]) == (steps, found)


def test_runs_lie_over_each_other(runs):
    text, page = page_of([runs["cut"], runs["cut-fast"]])
    drawings = re.findall(r'<figure id="(curve-\d+)".*?<svg(.*?)</svg>', text, re.DOTALL)
    assert len(drawings) > 20
    for name, drawing in drawings:
        shown = {line["run"] for line in page.data["curves"][name]["lines"]}
        assert {r for r in (0, 1) if f'class="run{r}"' in drawing} == shown
    # By their colour and by their dashes.
    loss = next(d for _, d in drawings if 'aria-label="loss by step"' in d)
    assert "var(--run0)" in loss and "var(--run1)" in loss and "stroke-dasharray" in loss


def test_settings_that_differ_stand_out(runs):
    logs = read_runs([runs["cut"], runs["cut-fast"]])
    tables = settings_tables(logs)
    assert [(row.name, row.cells) for row in tables["differ"]] == [
        ("learning_rate", ("0.003", "0.01"))
    ]
    named = {row.name for row in tables["set"]}
    assert {"method", "online.iterations", "judge.path", "eval_steps"} <= named
    assert "rso.beta" in {row.name for row in tables["default"]}
    every = {key for log in logs for key in log.settings} - {"output_dir"}
    assert {row.name for rows in tables.values() for row in rows} == every
    # Of other methods.
    differing = {r.name for r in settings_tables(read_runs(list(runs.values())))["differ"]}
    assert {"method", "online.num_generations", "judge.type", "max_length"} <= differing


def test_what_became_of_the_rows_is_told(runs):
    facts = json.loads((runs["sft"] / "run.json").read_text())
    counts = facts["data_counts"]
    (source,) = counts["sources"]
    assert (source["rows"], source["usable"], source["records"]) == (11, 9, 9)
    assert sorted(source["dropped"].values()) == [1, 1] and counts["eval"] is None
    assert counts["train"]["used"] == 9 and counts["train"]["truncated"] == 1
    text = text_of(page_of([runs["sft"]])[0])
    for reason in source["dropped"]:
        assert reason in text
    assert "9 examples" in text and "Answers cut at max_length = 100: 1" in text
    online = json.loads((runs["cut"] / "start.json").read_text())["data_counts"]
    assert online["train"] == {"unit": "prompts", "used": 10, "dropped": {}}
    assert online["eval"] == {"used": 3, "dropped": {}}


def test_samples_before_and_after_stand_side_by_side(runs):
    (held, rounds) = samples_of(0, read_run(runs["cut"], "cut"))
    last = max(int(p.stem.split("-")[1]) for p in (runs["cut"] / "eval").glob("samples-*.jsonl"))
    assert held.same and len(held.pairs) == 3
    for before, after in held.pairs:
        assert before.prompt == after.prompt
        assert (before.when, after.when) == ("step 0", f"step {last}")
    written = (runs["cut"] / "eval" / f"samples-{last}.jsonl").read_text(encoding="utf-8")
    answers = {json.loads(line)["completions"][0] for line in written.split("\n")[:-1]}
    assert {after.answers[0].pieces[0].text for _, after in held.pairs} == answers
    assert not rounds.same and "different prompts" in rounds.note
    assert {pair[1].when for pair in rounds.pairs} == {"round 2"}
    judged = [a for pair in rounds.pairs for s in pair for a in s.answers]
    assert any(a.judgment and "letters" in a.judgment for a in judged)
    (rounds,) = samples_of(0, read_run(runs["self"], "self"))
    said = [shown.said for pair in rounds.pairs for shown in pair]
    assert all(re.match(r"scores 0\.\d+ and 0\.\d+", each) for each in said)


def test_what_cut_flags_is_marked_where_inspect_wrote_it(runs, tmp_path, monkeypatch):
    folder = tmp_path / "cut"
    shutil.copytree(runs["cut"], folder)
    page = make_page(read_runs([folder]))
    hint = re.search(r"<pre[^>]*>(fastalign inspect.*?)</pre>", page, re.DOTALL)
    commands = text_of(hint[1]).split("\n")
    assert len(commands) == 2
    for command in commands:
        assert main([*shlex.split(command)[1:], "cut.lambda=1.01"]) == 0
    _, rounds = samples_of(0, read_run(folder, "cut"))
    assert rounds.flagged
    written = [json.loads(line) for p in (folder / "inspect").rglob("*.jsonl") for line in p.open()]
    flags = sum(t["flagged"] for row in written for t in row["tokens"])
    shown = [a for pair in rounds.pairs for s in pair if s for a in s.answers]
    assert sum(p.flagged for a in shown for p in a.pieces) == flags > 0
    text = make_page(read_runs([folder]))
    assert text.count('flagged">') == flags + 1 and "fastalign inspect" not in text


def test_a_judge_has_its_figures_and_its_calibration(runs):
    text = text_of(page_of([runs["self"]])[0])
    for name in ("judge/flipped", "judge/abstained", "judge_quality/accuracy", "self: reference"):
        assert name in text
    assert "Calibration error" in text and "judge of the weights of step 0" in text
    kept = json.loads((runs["self"] / "judge-quality" / "0.json").read_text())
    assert sum(b["pairs"] for b in kept["calibration"]["bins"]) <= 12
    text = text_of(page_of([runs["sft"]])[0])
    assert "No judge was asked" in text and "No samples were written" in text


def test_times_add_up(runs):
    logs = read_runs([runs["cut"], runs["sft"]])
    table = time_table(logs)
    parts = {part for part, _, _ in table.rows}
    assert {"forward", "backward", "rollout", "judge", "sync", "evaluation"} <= parts
    for log in logs:
        own = sum(log.total(p) for p in ("pack", "reference", "forward", "backward", "wait"))
        assert own + log.total("optimizer") == pytest.approx(log.total("step"), rel=1e-6)
    assert log.total("rollout") == 0.0


def test_what_it_ran_on_and_how_to_repeat_it(runs):
    facts = json.loads((runs["cut"] / "run.json").read_text())
    assert facts["finished"] >= facts["started"]
    assert facts == json.loads((runs["cut"] / "start.json").read_text()) | {
        key: facts[key] for key in ("finished", "metrics")
    }
    text = text_of(page_of([runs["cut"]])[0])
    assert f"torch=={facts['libraries']['torch']}" in text
    assert f"fastalign train {runs['cut']}/recipe.yaml output_dir={runs['cut']}-again" in text
    assert "The seed is 42" in text and next(iter(facts["data"].values())) in text
    assert facts["chosen"]["attention"]["value"] in text
    quoted = re.search(r"model_name_or_path: .*?declared_licenses: \{\}\n", text, re.DOTALL)[0]
    assert yaml.safe_load(quoted) == facts["recipe"]


def test_runs_that_are_not_done_show_what_there_is(runs, tmp_path):
    folder = tmp_path / "half"
    folder.mkdir()
    for name in ("start.json", "metrics.jsonl", "recipe.yaml"):
        shutil.copy(runs["cut"] / name, folder)
    lines = (runs["cut"] / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text(
        "\n".join([*lines[:3], "{broken", *lines[3:4]]) + '\n{"st'
    )
    log = read_run(folder, "half")
    assert not log.finished and len(log.lines) == 4
    text = text_of(make_page([log, read_run(runs["cut"], "cut")]))
    assert (
        re.search(r"unfinished: step \d of 2, last written 20", text) and "done at step 2" in text
    )
    assert "1 lines of metrics.jsonl are damaged" in text
    # Started anew where another run was done.
    shutil.copy(runs["cut"] / "run.json", folder)
    assert read_run(folder, "half").finished
    start = json.loads((folder / "start.json").read_text()) | {"started": "2026-01-01T00:00:00"}
    (folder / "start.json").write_text(json.dumps(start))
    assert not read_run(folder, "half").finished
    # Before the first step, and what an older run left.
    (folder / "metrics.jsonl").unlink()
    assert "Nothing has been logged yet" in text_of(page_of([folder])[0])
    (tmp_path / "old").mkdir()
    shutil.copy(runs["cut"] / "metrics.jsonl", tmp_path / "old")
    assert "It left no start.json" in text_of(page_of([tmp_path / "old"])[0])


def test_mistakes_are_one_line(runs, tmp_path, capsys, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "run.json").write_text("[1")
    (tmp_path / "a-file").write_text("")
    sft = str(runs["sft"])
    for arguments, complaint in (
        ([str(tmp_path / "none")], "none: no such folder of a run"),
        ([str(tmp_path / "empty")], "empty: no run: it has none of run.json, start.json and"),
        ([str(tmp_path / "bad")], "bad/run.json: cannot be read"),
        ([sft, f"{sft}/../sft"], "sft: the same run is named twice"),
        ([sft] * 17, "17 runs: a report shows at most 16"),
        ([sft, "--output", str(tmp_path / "a-file" / "x.html")], "--output = "),
    ):
        assert main(["report", *arguments]) == 2
        error = capsys.readouterr().err
        assert complaint in error and error.count("\n") == 1, error
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["report", sft, "--output", str(tmp_path / "r.html")]) == 2
    assert "pip install 'fastalign[report]'" in capsys.readouterr().err


def test_the_command_writes_one_page(runs, tmp_path, capsys):
    path = tmp_path / "new" / "report.html"
    assert main(["report", str(runs["cut"]), str(runs["self"]), "--output", str(path)]) == 0
    assert capsys.readouterr().out == (f"cut: done at step 2\nself: done at step 2\nwrote {path}\n")
    page = Page.of(path.read_text(encoding="utf-8"))
    assert page.data["runs"] == ["cut", "self"]


# --------------------------------------------------------------------------------------- the page


@pytest.fixture(scope="module")
def hostile(runs, tmp_path_factory) -> Path:
    """A run that is strange in every string."""
    folder = tmp_path_factory.mktemp("h") / "<img src=x onerror=alert(1)>"
    shutil.copytree(runs["cut"], folder)
    for name in ("start.json", "run.json"):
        facts = json.loads((folder / name).read_text())
        facts["commit"] = facts["hardware"]["device"] = HOSTILE[0]
        facts["recipe"] |= {HOSTILE[0]: HOSTILE[2], "model_name_or_path": HOSTILE[0]}
        facts["data_counts"]["sources"][0]["dropped"] = dict.fromkeys(HOSTILE, 1)
        facts["chosen"]["dtype"]["why"] = HOSTILE[2]
        (folder / name).write_text(json.dumps(facts))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 2} | {f"{text}/{text}": 1.0 for text in HOSTILE}) + "\n")
    (log,) = (folder / "episodes").glob("0001.jsonl")
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").split("\n")[:-1]]
    for row, text in zip(lines, HOSTILE, strict=False):
        row |= {"completions": [text + "\ud800"], "judgments": [text], "noise": [text]}
    log.write_text("".join(json.dumps(row) + "\n" for row in lines))
    return folder


def test_strangers_text_stays_text(hostile, runs, tmp_path):
    text, page = page_of([hostile])
    _, plain = page_of([runs["cut"]])
    assert {tag for tag, _ in page.elements} == {tag for tag, _ in plain.elements}
    scripts = [content for tag, attrs, content in page.contents if tag == "script" and not attrs]
    assert scripts == [c for tag, attrs, c in plain.contents if tag == "script" and not attrs]
    shown = text_of(text)
    for stranger in HOSTILE[:4]:
        assert stranger in shown
    assert page.data["runs"] == ["<img src=x onerror=alert(1)>"]
    check_inert(page)
    assert main(["report", str(hostile), "--output", str(tmp_path / "r.html")]) == 0


def test_the_page_loads_nothing(runs):
    text, page = page_of(list(runs.values()))
    check_inert(page)
    assert "http://" not in re.sub(r'"http://www.w3.org/2000/svg"', "", text)
    assert "https://" not in text and "@import" not in text
    assert set(re.findall(r"url\((.)", text)) == {"#"}
    # No id stands for two things, and what is referred to is there.
    ids = [str(attrs["id"]) for _, attrs in page.elements if "id" in attrs]
    assert not [name for name, count in Counter(ids).items() if count > 1]
    referred = re.findall(r'url\(#(.*?)\)|href="#(.*?)"', text)
    assert {a or b for a, b in referred} <= set(ids)


def test_it_is_read_without_a_pointer(runs):
    _, page = page_of([runs["cut"], runs["sft"]])
    figures = [a for tag, a in page.elements if tag == "figure" and a.get("class") == "curve"]
    assert figures and all(a["tabindex"] == "0" and a["aria-label"] for a in figures)
    drawings = [a for tag, a in page.elements if tag == "svg" and a.get("class") == "drawing"]
    assert all(a["role"] == "img" and a["aria-label"] for a in drawings)
    assert ("html", {"lang": "en"}) in page.elements
    boxes = [a for tag, a in page.elements if tag == "input"]
    assert [a["id"] for a in boxes] == ["show0", "show1"]
    headings = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == 1 and headings.count(1) == 1
    links = {str(a["href"])[1:] for tag, a in page.elements if tag == "a"}
    assert links <= {a.get("id") for tag, a in page.elements if tag == "section"}


@pytest.mark.parametrize("dark", [False, True])
def test_colours_have_the_contrast_of_wcag_aa(runs, dark):
    text, _ = page_of([runs["sft"]])
    named = colours(text, dark)
    steps = [f"{way}{i}" for way in ("up", "down") for i in range(1, 5)]
    for background in ("paper", "panel", "mark", *steps):
        assert ratio(named["ink"], named[background]) >= 4.5, background
        assert ratio(named["flag"], named[background]) >= 3, background
    for background in ("paper", "panel"):
        assert ratio(named["soft"], named[background]) >= 4.5
        assert ratio(named["accent"], named[background]) >= 4.5
    for i in range(8):
        assert ratio(named[f"run{i}"], named["paper"]) >= 4.5, i


# -------------------------------------------------------------------------------------- its script


def test_long_curves_are_thinned_to_means():
    steps = list(range(1, 1001))
    x, y, each = thinned(steps, [float(s) for s in steps])
    assert each == 3 and len(x) == len(y) == 334 <= MOST_POINTS
    assert (x[0], y[0]) == (2.0, 2.0) and (x[-1], y[-1]) == (1000.0, 1000.0)
    assert thinned([1, 2], [5.0, float("nan")])[0] == [1.0, 2.0]


def test_values_that_are_none_leave_gaps(runs, tmp_path):
    folder = tmp_path / "nan"
    shutil.copytree(runs["sft"], folder)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": NaN}\n{"step": 5, "loss": Infinity}\n')
    text, page = page_of([folder])
    (loss,) = [c for c in page.data["curves"].values() if c["lines"][0]["steps"][-1] == 5]
    assert loss["lines"][0]["values"][-2:] == [None, None]
    assert "2 values are no finite numbers" in text_of(text)


def test_values_are_read_by_step(runs):
    mini_racer = pytest.importorskip("py_mini_racer", reason="pip install mini-racer")
    _, page = page_of([runs["sft"]])
    (script,) = [c for tag, attrs, c in page.contents if tag == "script" and not attrs]
    context = mini_racer.MiniRacer()
    context.eval(script)

    def call(expression: str, *values: Any) -> Any:
        arguments = ", ".join(json.dumps(value) for value in values)
        return json.loads(context.eval(f"JSON.stringify({expression}({arguments}))"))

    curve = {
        "box": [50, 10, 350, 90],
        "limits": [0, 10],
        "lines": [
            {"run": 0, "steps": [1, 2, 2, 9], "values": [5, 6, 7, None]},
            {"run": 2, "steps": [2, 4], "values": [0.00012, 3]},
        ],
    }
    assert call("stepsOf", curve) == [1, 2, 4, 9]
    assert call("valuesAt", curve, 2) == [{"run": 0, "value": 7}, {"run": 2, "value": 0.00012}]
    assert call("valuesAt", curve, 4) == [{"run": 2, "value": 3}]
    assert call("nearest", [1, 2, 4, 9], 6.4) == 2 and call("place", curve, 5) == 200
    shown = [call("shown", value) for value in (None, 0, 0.12345678, 0.00012, 123456)]
    assert shown == ["\u2013", "0", "0.1235", "1.20e-4", "1.23e+5"]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_draws_it_and_takes_no_text_for_markup(hostile, runs, tmp_path):
    text = make_page(read_runs([hostile, runs["cut-fast"]]))
    path = tmp_path / "report.html"
    path.write_bytes(text.encode("utf-8", "replace"))
    elements = drawn_by_chromium(path, tmp_path)
    drawn = Page.of(elements)
    tags = [tag for tag, _ in drawn.elements]
    assert "img" not in tags and tags.count("script") == 2
    assert tags.count("figure") == text.count("<figure") and tags.count("svg") == text.count("<svg")
    # Its script has run: below each curve stand the last values.
    loss = re.search(r'<h4>loss</h4>.*?role="status">(.*?)</div>', elements, re.DOTALL)[1]
    last = [f"{log.series('loss')[1][-1]:.4g}" for log in read_runs([hostile, runs["cut-fast"]])]
    names = [hostile.name, "cut-fast"]
    said = [f"{name}: {value}" for name, value in zip(names, last, strict=True)]
    assert text_of(loss) == " ".join(["step 2", *said])
