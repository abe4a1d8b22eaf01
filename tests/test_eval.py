"""``fastalign eval``: judges and win rates, from the command line to the files."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chat_server import serving
from peft import LoraConfig, get_peft_model
from support import rows, write_rows
from test_cli import one_line
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastalign.cli import main
from fastalign.config import ConfigError, JudgeConfig, ModelConfig, RolloutConfig
from fastalign.judge import verdict
from fastalign.judge_quality import quality
from fastalign.judging import Judging, open_judge
from fastalign.local import open_model

RULES = """
def longer(prompt, a, b):
    return len(a) - len(b)

def first(prompt, a, b):
    return 1

class Always:
    def compare(self, pairs):
        from fastalign.episodes import Verdict
        return [Verdict(1.0, 0.0, "a") for _ in pairs]
"""
HH = "\n\nHuman: {0}?\n\nAssistant: Yes.\n\nHuman: Which?\n\nAssistant: {1}"


class Desk:
    """A folder with data, rules and judges."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, str(model)
        self.pairs = str(write_rows(folder / "pairs.jsonl", rows("preference", 12)))
        self.answers = str(write_rows(folder / "answers.jsonl", rows("completion", 12)))
        self.prompts = str(write_rows(folder / "prompts.jsonl", rows("prompt", 6)))
        (folder / "rules.py").write_text(RULES)

    def judge(self, name: str, text: str = "") -> str:
        """A YAML file with the rule of that name."""
        path = self.folder / f"{name}.yaml"
        path.write_text(text or f"path: {self.folder}/rules.py:{name}\n")
        return str(path)

    def data(self, name: str, content: list[dict[str, Any]]) -> str:
        return str(write_rows(self.folder / name, content))


@pytest.fixture(scope="module")
def desk(sharp_llama, tmp_path_factory) -> Desk:
    return Desk(tmp_path_factory.mktemp("desk"), sharp_llama)


@pytest.fixture(scope="module")
def adapter(sharp_llama, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(3)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(sharp_llama), config).save_pretrained(
        folder
    )
    return str(folder)


LOCAL = ["--engine", "hf", "--dtype", "float32", "--max-length", "512"]


def report(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """What ``--json`` prints, and nothing beside it."""
    assert main(["eval", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ----------------------------------------------------------------------------------- judges


def test_a_model_that_judges_itself_gets_a_table_a_report_and_a_plot(desk, tmp_path, capsys):
    asked = ["--principle", "wit", "--principle", "truth", "--out", str(tmp_path)]
    assert main(["eval", "--pairs", desk.pairs, "--model", desk.model, *LOCAL, *asked]) == 0
    shown = capsys.readouterr().out
    assert "12 pairs judged in both orders" in shown and f"judge: self, {desk.model}" in shown
    assert "accuracy, abstentions counting half" in shown and "tie threshold" in shown
    assert "wit" in shown and "By each principle alone" in shown
    # A random model has no mass on the letters.
    assert "P(A) + P(B) is below min_decision_mass = 0.5" in shown

    # The pairs as they were written down give the figures of the report once more.
    kept = lines(tmp_path / "judge-pairs.jsonl")
    assert [row["source"] for row in kept] == [f"{desk.pairs}:{i}" for i in range(1, 13)]
    again = [verdict(np.array(row["probabilities"]), 1e-3) for row in kept]
    lengths = [(row["length_chosen"], row["length_rejected"]) for row in kept]
    found = quality(again, lengths, tie=1e-3, principles=("wit", "truth"))
    written = json.loads((tmp_path / "judge-report.json").read_text())
    assert written["figures"] == pytest.approx(found.figures())
    for name, estimates in found.principles.items():
        theirs = written["quality"]["principles"][name]["accuracy"]
        assert theirs["value"] == pytest.approx(estimates["accuracy"].value)
    for row, seen in zip(kept, again, strict=True):
        assert row["preferred"] == {"a": "chosen", "b": "rejected", None: None}[seen.preferred]
    data = rows("preference", 12)
    assert lengths == [(len(row["chosen"]), len(row["rejected"])) for row in data]


def test_the_plot_shows_bins_and_thresholds(desk, tmp_path, capsys):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    asked = ["--pairs", desk.pairs, "--judge", desk.judge("longer"), "--out", str(tmp_path)]
    assert main(["eval", *asked]) == 0
    assert f"wrote {tmp_path}/reliability.png" in capsys.readouterr().out
    image = pyplot.imread(tmp_path / "reliability.png")[..., :3]
    half = image.shape[1] // 2
    blue = np.abs(image - np.array([0x1F, 0x77, 0xB4]) / 255).max(-1) < 0.02
    grey = np.abs(image - np.array([0xD3, 0xD3, 0xD3]) / 255).max(-1) < 0.02
    # Points on both sides, bars on the right one alone.
    assert blue[:, :half].sum() > 20 and blue[:, half:].sum() > 20
    assert grey[:, half:].sum() > 100 * max(grey[:, :half].sum(), 1)


def test_without_matplotlib_the_report_says_what_is_missing(desk, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fastalign.eval_pairs.can_draw", lambda: False)
    asked = ["--pairs", desk.pairs, "--judge", desk.judge("longer"), "--out", str(tmp_path)]
    assert main(["eval", *asked]) == 0
    assert "reliability.png needs matplotlib: pip install" in capsys.readouterr().out
    made = sorted(path.name for path in tmp_path.iterdir())
    assert made == ["judge-pairs.jsonl", "judge-report.json"]


def test_the_adapter_judges_where_there_is_one(desk, adapter, capsys):
    asked = ["--pairs", desk.pairs, "--model", desk.model, *LOCAL, "--max-samples", "4"]
    bare = report(capsys, *asked)
    trained = report(capsys, *asked, "--adapter", adapter)
    assert bare["figures"]["pairs"] == trained["figures"]["pairs"] == 4
    assert bare["figures"]["mass"] != pytest.approx(trained["figures"]["mass"], rel=1e-2)


def test_another_model_judges_by_its_yaml(desk, other_llama, capsys):
    text = f"type: model\nmodel_name_or_path: {other_llama}\ntie_threshold: 0\n"
    judge = desk.judge("other", text)
    asked = ["--pairs", desk.pairs, *LOCAL]
    by_yaml = report(capsys, *asked, "--judge", judge)
    as_self = report(capsys, *asked, "--model", str(other_llama))
    assert by_yaml["figures"]["mass"] == pytest.approx(as_self["figures"]["mass"])
    assert by_yaml["judge"]["tie_threshold"] == 0 and by_yaml["model"] is None


def test_comparisons_by_principle_are_what_a_principle_is_held_against(desk, tmp_path, capsys):
    other = [
        {"principle": "Instruction_Following", "preferred": "rejected"},
        {"preferred": "chosen"},
    ]
    content = [row | {"comparisons": other} for row in rows("preference", 6)]
    content += [row | {"comparisons": []} for row in rows("preference", 8)[6:]]
    path = desk.data("compared.jsonl", content)
    asked = ["--model", desk.model, *LOCAL, "--principle", "instruction following"]
    found = report(capsys, "--pairs", path, *asked, "--principle", "honesty")["quality"]
    by = found["principles"]["instruction following"]
    assert (by["accuracy"]["count"], found["overall"]["accuracy"]["count"]) == (6, 8)
    assert found["principles"]["honesty"]["accuracy"] == {
        "value": None, "low": None, "high": None, "count": 0
    }  # fmt: skip
    # The same six pairs without comparisons are held against chosen: right where this is wrong.
    bare = desk.data("bare.jsonl", rows("preference", 6))
    against = report(capsys, "--pairs", bare, *asked)["quality"]["principles"]
    assert by["accuracy"]["value"] == pytest.approx(
        1 - against["instruction following"]["accuracy"]["value"]
    )
    assert main(["eval", "--pairs", path, *asked, "--out", str(tmp_path)]) == 0


def test_models_are_spoken_to_as_asked(desk, tmp_path, capsys):
    shutil.copytree(desk.model, tmp_path / "loud")
    template = (tmp_path / "loud" / "chat_template.jinja").read_text()
    loud = "{% if loud %}{{ 'one two three ' }}{% endif %}" + template
    (tmp_path / "loud" / "chat_template.jinja").write_text(loud)
    asked = ["--pairs", desk.pairs, "--model", str(tmp_path / "loud"), *LOCAL]
    asked += ["--max-samples", "3"]
    plain = report(capsys, *asked)["figures"]["mass"]
    assert report(capsys, *asked, "--template", "alpaca")["figures"]["mass"] != plain
    kwargs = ["--chat-template-kwargs"]
    assert report(capsys, *asked, *kwargs, '{"loud": false}')["figures"]["mass"] == plain
    assert report(capsys, *asked, *kwargs, '{"loud": true}')["figures"]["mass"] != plain


def test_another_model_that_judges_has_its_own_template(desk, other_llama):
    """What is asked of it is the same whatever the contestants are told."""
    who = JudgeConfig(type="model", model_name_or_path=str(other_llama))
    rollout = RolloutConfig(engine="hf")
    prompt = [{"role": "user", "content": "the sum"}]
    asked = []
    for template in (None, "alpaca"):
        judging = Judging(who, rollout, 512, dtype="float32", template=template)
        with open_judge(judging, None) as judge:
            asked.append(judge.renderer.judge_prompt_ids(prompt, "a", "b").tolist())
    assert asked[0] == asked[1]
    # The model itself is spoken to in one way.
    own = Judging(JudgeConfig(type="self"), rollout, 512, dtype="float32", template="alpaca")
    model = ModelConfig(model_name_or_path=desk.model, dtype="float32")
    with open_model(model, rollout, max_model_len=512) as local, open_judge(own, local) as judge:
        assert judge.renderer.judge_prompt_ids(prompt, "a", "b").tolist() != asked[0]


def test_rules_are_asked_in_both_orders(desk, capsys):
    longer = report(capsys, "--pairs", desk.pairs, "--judge", desk.judge("longer"))
    assert longer["figures"]["prefers_longer"] == 1 and longer["figures"]["flipped"] == 0
    first = report(capsys, "--pairs", desk.pairs, "--judge", desk.judge("first"))
    assert first["figures"]["abstained"] == 1 and first["figures"]["first_slot"] == 1
    # A judge with a batch of its own is asked once, but cannot tell chosen by its place.
    always = report(capsys, "--pairs", desk.pairs, "--judge", desk.judge("Always"))
    assert always["figures"]["accuracy"] == 0.5


def test_dialogues_are_read_as_training_reads_them(desk, capsys):
    content = [
        {"chosen": HH.format(i, "This " * i), "rejected": HH.format(i, "No.")} for i in (1, 2)
    ]
    content.append({"chosen": HH.format(1, "Same."), "rejected": HH.format(2, "Other.")})
    path = desk.data("hh.jsonl", content)
    found = report(capsys, "--pairs", path, "--judge", desk.judge("longer"))
    assert found["figures"]["pairs"] == 2 and found["figures"]["accuracy"] == 1
    assert found["data"]["rows"] == 3 and found["data"]["dropped"] == {
        "rejected: another prompt": 1
    }


def test_a_server_that_judges_needs_no_model_and_is_paid_once(desk, tmp_path, capsys):
    with serving() as server:
        # It prefers whatever has an exclamation mark: the rejected ones.
        server.answer = lambda text: (200, "A" if "!" in text.split("### Response B")[0] else "B")
        text = f"type: endpoint\nendpoint: {{base_url: '{server.url}', model: m, "
        asked = ["--pairs", desk.pairs, "--out", str(tmp_path)]
        little = desk.judge("little", text + "max_requests: 10, max_concurrency: 1}\n")
        assert main(["eval", *asked, "--judge", little]) == 75
        assert "judge.endpoint.max_requests = 10 is reached" in one_line(capsys.readouterr().err)
        found = report(capsys, *asked, "--judge", desk.judge("server", text + "max_retries: 0}\n"))
    assert found["figures"]["accuracy"] == 0 and found["figures"]["flipped"] == 0
    assert len(server.asked) == 24


# -------------------------------------------------------------------------------- win rates


def test_answers_of_two_models_are_their_own(desk, other_llama, adapter, tmp_path, capsys):
    asked = ["--model", desk.model, "--prompts", desk.prompts, "--max-tokens", "8", *LOCAL]
    asked += ["--against", str(other_llama), "--judge", desk.judge("longer")]
    asked += ["--temperature", "0", "--top-p", "1"]
    found = report(capsys, *asked, "--out", str(tmp_path))
    kept = lines(tmp_path / "wins.jsonl")
    assert len(kept) == 6
    tokenizer = AutoTokenizer.from_pretrained(desk.model)
    for side, path in (("a", desk.model), ("b", str(other_llama))):
        model = AutoModelForCausalLM.from_pretrained(path)
        for row in kept[:2]:
            ids = tokenizer.apply_chat_template(
                row["prompt"], add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            out = model.generate(**ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[0]
            new = tokenizer.decode(out[ids["input_ids"].shape[1] :], skip_special_tokens=True)
            assert row[side] == new
    wins = [np.sign(len(row["a"]) - len(row["b"])) for row in kept]
    assert found["figures"]["win_rate"] == pytest.approx((np.mean(wins) + 1) / 2)
    assert found["figures"]["length_a"] == np.mean([len(row["a"]) for row in kept])
    assert not found["judge_is_a_contestant"]
    # With an adapter the first one is another model.
    report(capsys, *asked, "--adapter", adapter, "--out", str(tmp_path))
    again = lines(tmp_path / "wins.jsonl")
    assert [row["b"] for row in again] == [row["b"] for row in kept]
    assert [row["a"] for row in again] != [row["a"] for row in kept]


def test_a_model_against_itself_is_an_even_match_and_says_who_judges(desk, capsys):
    asked = ["--model", desk.model, "--against", desk.model, "--prompts", desk.prompts]
    assert main(["eval", *asked, "--max-tokens", "6", *LOCAL]) == 0
    shown = capsys.readouterr().out
    assert "(one of the two contestants)" in shown
    # A random model has no mass on the letters, and does not stop after six tokens.
    assert "P(A) + P(B) is below min_decision_mass = 0.5: a run would refuse this judge" in shown
    assert f"6 answers of {desk.model} cut at 6 tokens" in shown
    assert f"{desk.model} against {desk.model}" in shown
    even = report(capsys, *asked, "--max-tokens", "6", *LOCAL)
    assert even["figures"]["win_rate"] == 0.5 and even["figures"]["abstained"] == 1
    assert even["figures"]["length_controlled"] == pytest.approx(0.5)
    assert even["judge_is_a_contestant"]
    assert even["cut_at_max_tokens"] == {"contestant": 6, "against": 6}
    drawn = ("max_new_tokens", "temperature", "top_p")
    assert [even["sampling"][name] for name in drawn] == [6, 1.0, 0.9]


def test_stored_answers_meet_by_prompt(desk, tmp_path, capsys):
    one = [{"prompt": p, "completion": c} for p, c in (("x", "aa"), ("y", "b"), ("x", "a"))]
    two = [{"prompt": p, "completion": c} for p, c in (("y", "bbb"), ("x", "c"), ("z", "d"))]
    asked = ["--answers", desk.data("one.jsonl", one), "--against", desk.data("two.jsonl", two)]
    judge = ["--judge", desk.judge("longer"), "--out", str(tmp_path)]
    # The second x has no answer left in the other file.
    found = report(capsys, *asked, *judge)
    kept = lines(tmp_path / "wins.jsonl")
    assert [(row["a"], row["b"]) for row in kept] == [("aa", "c"), ("b", "bbb")]
    assert found["figures"]["win_rate"] == 0.5 and found["figures"]["wins"] == 0.5
    assert found["left_out"] == {f"no answer in {desk.folder}/two.jsonl": 1}
    # Prompts of a file of their own: what neither has an answer to is left out.
    prompts = desk.data("three.jsonl", [{"prompt": "z"}, {"prompt": "y"}])
    found = report(capsys, *asked, *judge, "--prompts", prompts)
    assert found["figures"]["pairs"] == 1 and found["figures"]["win_rate"] == 0


ANSWER = {"role": "assistant", "content": ""}


def test_stored_answers_that_are_empty_are_judged(desk, tmp_path, capsys):
    two = [
        {"prompt": "x", "completion": ""},
        {"prompt": "y", "completion": "b"},
        {"prompt": "x", "completion": "a"},
        {"prompt": "y", "completion": 5},
        {"instruction": "z", "output": " "},
    ]
    one = [{"prompt": p, "completion": "aaa"} for p in ("x", "y", "x", "z")]
    asked = ["--judge", desk.judge("longer"), "--out", str(tmp_path)]
    asked += ["--answers", desk.data("full.jsonl", one)]
    found = report(capsys, *asked, "--against", desk.data("gaps.jsonl", two))
    kept = lines(tmp_path / "wins.jsonl")
    # The second x meets the second one, as if the first were not empty.
    assert [row["b"] for row in kept] == ["", "b", "a", " "]
    assert found["figures"]["win_rate"] == 1 and found["figures"]["pairs"] == 4
    assert found["left_out"] == {"completion: wrong type": 1}
    # A model that says nothing at all is one that can be compared with.
    nothing = desk.data("nothing.jsonl", [row | {"completion": ""} for row in one])
    found = report(capsys, *asked, "--against", nothing)
    assert found["figures"]["wins"] == 1 and found["figures"]["pairs"] == 4
    assert found["left_out"] == {}
    # Said in messages it is as little.
    silent = [
        row | {"completion": [{"role": "user", "content": row["prompt"]}, ANSWER]} for row in one
    ]
    found = report(capsys, *asked, "--against", desk.data("silent.jsonl", silent))
    assert found["figures"]["wins"] == 1 and found["left_out"] == {}


def test_both_questions_may_share_a_folder(desk, tmp_path):
    shared = ["--judge", desk.judge("longer"), "--out", str(tmp_path / "new" / "folder")]
    assert main(["eval", "--pairs", desk.pairs, *shared]) == 0
    assert main(["eval", "--against", desk.answers, "--answers", desk.answers, *shared]) == 0
    made = {path.name for path in (tmp_path / "new" / "folder").iterdir()}
    assert {"judge-report.json", "judge-pairs.jsonl", "wins-report.json", "wins.jsonl"} <= made


def test_generate_and_eval_answer_alike(desk, tmp_path, monkeypatch):
    given = []

    def stop(what):
        given.append(what)
        raise ConfigError("seen")

    monkeypatch.setattr("fastalign.generate.answer_file", lambda a, b, settings: stop(settings))
    monkeypatch.setattr("fastalign.eval_wins.play", stop)
    out = str(tmp_path / "answers.jsonl")
    assert main(["generate", "--model", desk.model, desk.prompts, out]) == 2
    assert main(["eval", "--model", desk.model, "--against", desk.answers]) == 2
    answering, playing = given
    sampling = playing.sampling
    assert (sampling.temperature, sampling.top_p) == (answering.temperature, answering.top_p)
    assert sampling.max_new_tokens == answering.max_tokens == 768
    # An engine of eval is never beside another one.
    assert playing.judging.rollout == answering.rollout


def test_a_model_meets_stored_answers_and_judges(desk, tmp_path, capsys):
    asked = ["--model", desk.model, "--against", desk.answers, "--max-tokens", "6", *LOCAL]
    found = report(capsys, *asked, "--out", str(tmp_path), "--max-samples", "5")
    assert found["figures"]["pairs"] == 5 and found["judge_is_a_contestant"]
    stored = {row["prompt"]: row["completion"] for row in rows("completion", 12)}
    for row in lines(tmp_path / "wins.jsonl"):
        assert row["b"] == stored[row["prompt"][0]["content"]]
        assert len(row["verdict"]["probabilities"]) == 1


def test_prompts_without_room_for_an_answer_are_counted(desk, capsys):
    prompts = desk.data("long.jsonl", [{"prompt": "the " * 600}, {"prompt": "the sum"}])
    asked = ["--model", desk.model, "--against", desk.model, "--prompts", prompts]
    asked += ["--max-tokens", "256"]
    found = report(capsys, *asked, *LOCAL, "--judge", desk.judge("longer"))
    assert found["figures"]["pairs"] == 1
    # Both models left it out.
    assert list(found["left_out"].values()) == [2]


# --------------------------------------------------------------------------------- mistakes


def mistakes(desk: Desk) -> dict[str, tuple[list[str], str]]:
    """Name -> (arguments, what the one line has to contain)."""
    longer, here = desk.judge("longer"), desk.folder
    pairs, against = ["--pairs", desk.pairs], ["--against", desk.answers]
    wit = desk.judge("wit", "type: self\nprinciples: [wit]\n")
    server = "type: endpoint\nendpoint: {base_url: 'http://localhost:1/v1', model: m}\n"
    return {
        "no such file": (
            ["--pairs", f"{here}/none.jsonl", "--judge", longer],
            "none.jsonl: no such file",
        ),
        "no pairs": (
            ["--pairs", desk.answers, "--judge", longer],
            "has columns prompt, completion: this method needs chosen + rejected",
        ),
        "no model": (pairs, "--model is missing: the judge is the model itself"),
        "model that is not there": (
            [*pairs, "--model", f"{here}/none"],
            f"model_name_or_path = '{here}/none': no such folder",
        ),
        "adapter that is not there": (
            [*pairs, "--model", desk.model, "--adapter", f"{here}/none"],
            "adapter_name_or_path",
        ),
        "adapter alone": ([*pairs, "--adapter", "x", "--judge", longer], "--adapter needs --model"),
        "judge that is not there": ([*pairs, "--judge", f"{here}/none.yaml"], "no such judge"),
        "wrong key": (
            [*pairs, "--judge", desk.judge("wrong", "pth: x\n")],
            "wrong.yaml: judge.pth is no key of a recipe: did you mean 'path'?",
        ),
        "wrong value": (
            [*pairs, "--judge", desk.judge("value", "type: self\ntie_threshold: -1\n")],
            "judge.tie_threshold = -1: input should be greater than or equal to 0",
        ),
        "rule that is not named": (
            [*pairs, "--judge", desk.judge("nameless", "type: rule\n")],
            "judge.path is missing: a rule judge names its callable",
        ),
        "rule that is not there": (
            [*pairs, "--judge", desk.judge("absent", f"path: {here}/rules.py:absent\n")],
            "rules.py has no 'absent'",
        ),
        "rule with principles": (
            [*pairs, "--judge", longer, "--principle", "wit"],
            "longer.yaml is a rule, which is told of none",
        ),
        "principles in two places": (
            [*pairs, "--model", desk.model, "--judge", wit, "--principle", "truth"],
            "wit.yaml has principles already: name them in one place",
        ),
        "judge template that is not there": (
            [*pairs, "--model", f"{here}/none",
             "--judge", desk.judge("words", f"type: self\ntemplate: {here}/words.yaml\n")],
            f"{here}/words.yaml",
        ),
        "template of a judge that has its own": (
            [*pairs, "--judge", longer, "--template", "alpaca"],
            "--template says how the model itself is spoken to",
        ),
        "judge model that is not there": (
            [*pairs, "--judge", desk.judge("m", f"type: model\nmodel_name_or_path: {here}/none\n")],
            f"judge.model_name_or_path = '{here}/none': no such folder",
        ),
        "server without a folder": (
            [*pairs, "--judge", desk.judge("server", server)],
            "--out is missing: the replies of a server are kept there",
        ),
        "another question's option": (
            [*pairs, "--judge", longer, "--prompts", desk.prompts],
            "--prompts goes with --against, not with --pairs",
        ),
        "no prompts": (
            ["--against", desk.model, "--model", desk.model],
            "--prompts is missing: two models need something to answer",
        ),
        "nobody to compare": (
            [*against, "--judge", longer],
            "--model or --answers is missing: who is compared with --against",
        ),
        "nobody to judge": ([*against, "--answers", desk.answers], "--model is missing: the judge"),
        "adapter on a file": (
            [*against, "--answers", desk.answers, "--judge", longer, "--against-adapter", "x"],
            "answers.jsonl is a file of answers, no model",
        ),
        "no common prompt": (
            [*against, "--answers", desk.data("lone.jsonl", [{"prompt": "?", "completion": "!"}]),
             "--judge", longer],
            "no prompt has two answers",
        ),
        "top-p": ([*against, "--model", desk.model, "--top-p", "2"], "--top-p is 2.0: it must be"),
        "temperature": (
            [*against, "--model", desk.model, "--temperature", "-1"],
            "--temperature is -1.0: it must be 0 (greedy)",
        ),
        "share of a GPU": (
            [*pairs, "--model", desk.model, "--gpu-memory-utilization", "2"],
            "--gpu-memory-utilization = 2.0: want a share above 0, at most 1",
        ),
        "out is a file": (
            [*pairs, "--judge", longer, "--out", desk.answers],
            f"--out = '{desk.answers}': is no folder",
        ),
        "more tokens than the model has": (
            [*against, "--model", desk.model, "--judge", longer, "--max-length", "512",
             "--engine", "hf"],
            f"--max-tokens = 768: {desk.model} has room for 512 tokens of prompt and answer",
        ),
    }  # fmt: skip


NAMES = [
    "no such file", "no pairs", "no model", "model that is not there", "adapter that is not there",
    "adapter alone", "judge that is not there", "wrong key", "wrong value",
    "rule that is not named", "rule that is not there", "rule with principles",
    "principles in two places", "judge template that is not there",
    "template of a judge that has its own", "judge model that is not there",
    "server without a folder", "another question's option", "no prompts", "nobody to compare",
    "nobody to judge", "adapter on a file", "no common prompt", "top-p", "temperature",
    "share of a GPU", "out is a file", "more tokens than the model has",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_mistake_is_one_line(desk, name, capsys):
    arguments, expected = mistakes(desk)[name]
    assert main(["eval", *arguments]) == 2
    assert expected in one_line(capsys.readouterr().err)


def test_what_is_wrong_shows_before_a_model_is_loaded(desk, tmp_path, capsys, monkeypatch):
    def opened(*arguments, **keys):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("fastalign.eval_wins.open_model", opened)
    monkeypatch.setitem(sys.modules, "openai", None)
    text = "type: endpoint\nendpoint: {base_url: 'http://localhost:1/v1', model: m}\n"
    asked = ["--model", desk.model, "--against", desk.model, "--prompts", desk.prompts]
    server = ["--judge", desk.judge("server", text), "--out", str(tmp_path)]
    assert main(["eval", *asked, *server]) == 2
    assert "needs the package openai" in one_line(capsys.readouterr().err)
    assert main(["eval", *asked, "--out", desk.answers]) == 2
    assert "is no folder" in one_line(capsys.readouterr().err)


def test_every_mistake_is_looked_at(desk):
    assert list(mistakes(desk)) == NAMES
