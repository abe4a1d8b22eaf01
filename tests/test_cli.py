"""The command as a user meets it: one line and exit code 2 for every mistake."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch.distributed.run
import yaml
from safetensors.torch import load_file
from support import TESTS, distance, outside_environment, rows, write_rows
from transformers import AutoTokenizer

from fastalign import __version__
from fastalign.cli import main
from fastalign.config import dump_config, load_config, parse_config

RULE = "def rule(prompt, text):\n    return 'No.'\n"


class Desk:
    """A folder with recipes, data and models, right and wrong."""

    def __init__(self, folder: Path, tiny_llama: Path) -> None:
        self.folder = folder
        self.model = tiny_llama
        write_rows(folder / "pairs.jsonl", rows("preference", 12))
        write_rows(folder / "answers.jsonl", rows("completion", 12))
        write_rows(folder / "prompts.jsonl", rows("prompt", 6))
        good = rows("completion", 3)
        write_rows(folder / "bad.jsonl", [*good[:2], {"prompt": "x", "completion": 7}, good[2]])
        write_rows(folder / "only-bad.jsonl", [{"prompt": "x", "completion": 7}])
        (folder / "rule.py").write_text(RULE)
        (folder / "pairs.yaml").write_text("decision: 'Better:'\n")
        (folder / "empty").mkdir()
        (folder / "a-file").write_text("here")
        plain = folder / "no-template"
        shutil.copytree(tiny_llama, plain)
        for name in ("chat_template.jinja", "chat_template.json"):
            (plain / name).unlink(missing_ok=True)
        tokenizer = AutoTokenizer.from_pretrained(plain)
        tokenizer.chat_template = None
        tokenizer.save_pretrained(plain)

    def recipe(self, name: str, **keys: Any) -> str:
        """A right recipe but for ``keys``; None takes a key away."""
        tree = {
            "method": "sft",
            "model_name_or_path": str(self.model),
            "datasets": [{"path": str(self.folder / "answers.jsonl")}],
            "output_dir": str(self.folder / f"out-{name}"),
            "dtype": "float32",
            "max_steps": 2,
            "global_batch_size": 4,
            "report_to": [],
        } | keys
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in tree.items() if v is not None}))
        return str(path)

    def data(self, name: str) -> list[dict[str, str]]:
        return [{"path": str(self.folder / name)}]

    def online(self, **keys: Any) -> dict[str, Any]:
        return {
            "method": "cut",
            "datasets": self.data("prompts.jsonl"),
            "online": {"prompts_per_iteration": 3},
            "judge": {"path": f"{self.folder}/rule.py:rule"},
            "rollout": {"engine": "hf"},
            "max_completion_length": 4,
            "use_peft": True,
        } | keys


def mistakes(desk: Desk) -> dict[str, tuple[list[str], list[str]]]:
    """Name -> (arguments, what the one line has to contain)."""
    here = desk.folder

    def train(name: str, *overrides: str, **keys: Any) -> list[str]:
        return ["train", desk.recipe(name, **keys), *overrides]

    return {
        "wrong key": (
            train("wrong-key", learning_rte=1),
            ["wrong-key.yaml: learning_rte is no key", "did you mean 'learning_rate'?"],
        ),
        "wrong key in a section": (
            train("wrong-sub", cut={"lamda": 1.1}),
            ["cut.lamda is no key", "did you mean 'lambda'?"],
        ),
        "wrong override": (
            train("override", "dataset.0.path=x"),
            ["dataset is no key", "did you mean 'datasets'?"],
        ),
        "wrong value": (
            train("value", "lr_scheduler_type=cosin"),
            ["lr_scheduler_type = 'cosin'", "'cosine'"],
        ),
        "missing recipe": (["train", f"{here}/nowhere.yaml"], ["nowhere.yaml: no such recipe"]),
        "unknown method": (train("method", method="sfd"), ["method.yaml: method = 'sfd': known"]),
        "missing file": (
            train("missing-file", datasets=desk.data("nowhere.jsonl")),
            ["nowhere.jsonl: no such file"],
        ),
        "bad row": (
            train("bad-row", datasets=desk.data("bad.jsonl"), strict=True),
            ["bad.jsonl:3: field completion: value 7: want text"],
        ),
        "only bad rows": (
            train("only-bad", datasets=desk.data("only-bad.jsonl")),
            ["only-bad.jsonl: none of 1 rows can be used", "only-bad.jsonl:1"],
        ),
        "wrong columns": (
            train("columns", method="dpo"),
            ["answers.jsonl: has columns prompt, completion", "needs chosen + rejected"],
        ),
        "nothing fits": (
            train("no-room", max_length=5),
            ["no record can be trained on: 12 x max_length", "answers.jsonl:1"],
        ),
        "nothing fits, strictly": (
            train("no-room-strict", max_length=5, strict=True),
            ["answers.jsonl:1: max_length: the prompt leaves no room"],
        ),
        "missing model": (
            train("missing-model", model_name_or_path=f"{here}/no-model"),
            [f"model_name_or_path = '{here}/no-model': no such folder"],
        ),
        "empty model folder": (
            train("empty-model", model_name_or_path=f"{here}/empty"),
            [f"model_name_or_path = '{here}/empty'"],
        ),
        "no chat template": (
            train("no-template", model_name_or_path=f"{here}/no-template"),
            ["no-template has no chat template", "'alpaca'"],
        ),
        "missing template": (
            train("template", datasets=[{**desk.data("answers.jsonl")[0], "template": "alpacca"}]),
            ["template 'alpacca' is neither a file nor one of 'chat', 'alpaca'"],
        ),
        "evaluation without data": (train("eval", eval_steps=1), ["eval_steps needs held-out"]),
        "judge missing": (
            train("judge", **desk.online(judge=None)),
            ["judge.yaml: judge is missing: online training with method = 'cut' needs someone"],
        ),
        "judge missing, on a dry run": (
            [*train("dry", **desk.online(judge=None)), "--dry-run"],
            ["dry.yaml: judge is missing"],
        ),
        "rule missing": (
            train("rule", **desk.online(judge={"path": f"{here}/nowhere.py:rule"})),
            [f"judge.path = '{here}/nowhere.py:rule': no such file"],
        ),
        "rule without that name": (
            train("rule-name", **desk.online(judge={"path": f"{here}/rule.py:rul"})),
            ["rule.py has no 'rul'"],
        ),
        "rule of evaluation missing": (
            train(
                "eval-rule",
                **desk.online(eval_judge={"path": f"{here}/nowhere.py:rule"}),
                eval_datasets=desk.data("prompts.jsonl"),
                eval_steps=1,
            ),
            [f"eval_judge.path = '{here}/nowhere.py:rule': no such file"],
        ),
        "judge model missing": (
            train(
                "judge-model",
                **desk.online(judge={"type": "model", "model_name_or_path": f"{here}/no-model"}),
            ),
            [f"judge.model_name_or_path = '{here}/no-model': no such folder"],
        ),
        "judge template of another form": (
            train(
                "judge-template",
                **desk.online(judge={"type": "self", "template": f"{here}/pairs.yaml"}),
            ),
            ["pairs.yaml: decision is no key of a template: known are system, prompt, fine"],
        ),
        "too few prompts": (
            train("few", **desk.online(online={"prompts_per_iteration": 4, "iterations": 2})),
            ["online.iterations = 2", "needs more prompts than the 6"],
        ),
        "fewer prompts than one round": (
            train("fewer", **desk.online(online={"prompts_per_iteration": 7})),
            ["online.prompts_per_iteration = 7", "6"],
        ),
        "unknown modules for LoRA": (
            train("modules", use_peft=True, lora_target_modules=["nope"]),
            ["lora_target_modules", "nope"],
        ),
        "LoRA on the head": (
            train("head", use_peft=True, lora_target_modules=["q_proj", "lm_head"]),
            ["lora_target_modules includes the LM head"],
        ),
        "missing adapter": (
            train("adapter", use_peft=True, adapter_name_or_path=f"{here}/empty"),
            [f"adapter_name_or_path = '{here}/empty'"],
        ),
        "attention that is not installed": (
            train("attention", attn_implementation="flash_attention_2"),
            ["attn_implementation"],
        ),
        "output_dir is a file": (
            train("output", output_dir=f"{here}/a-file"),
            [f"output_dir = '{here}/a-file'"],
        ),
        "service that is not installed": (
            train("service", report_to=["wandb"]),
            ["report_to has 'wandb', which is not installed"],
        ),
        "DeepSpeed against the recipe": (
            train("deepspeed", deepspeed={"zero_optimization": {"stage": 2}}, zero_stage=0),
            ["deepspeed.zero_optimization.stage = 2 contradicts the recipe"],
        ),
        "no checkpoint there": (
            train("resume", f"resume_from_checkpoint={here}/empty"),
            [f"resume_from_checkpoint = '{here}/empty': no checkpoint there"],
        ),
    }


NAMES = [
    "wrong key", "wrong key in a section", "wrong override", "wrong value", "missing recipe",
    "unknown method", "missing file", "bad row", "only bad rows", "wrong columns", "nothing fits",
    "nothing fits, strictly", "missing model", "empty model folder", "no chat template",
    "missing template", "evaluation without data", "judge missing",
    "judge missing, on a dry run", "rule missing",
    "rule without that name", "rule of evaluation missing", "judge model missing",
    "judge template of another form", "too few prompts", "fewer prompts than one round",
    "unknown modules for LoRA", "LoRA on the head", "missing adapter",
    "attention that is not installed", "output_dir is a file", "service that is not installed",
    "DeepSpeed against the recipe", "no checkpoint there",
]  # fmt: skip
ONLINE_RECIPE = {"cut": {"lambda": 1.25}, "datasets.0.weight": 0.5}


@pytest.fixture(scope="module")
def desk(tiny_llama, tmp_path_factory) -> Desk:
    return Desk(tmp_path_factory.mktemp("desk"), tiny_llama)


@pytest.fixture(scope="module")
def answers(desk) -> dict[str, tuple[int, str, str]]:
    """What became of every command, each in its own process."""
    cases = {name: arguments for name, (arguments, _) in mistakes(desk).items()}
    good = desk.recipe("good")
    cases |= {
        "version": ["--version"],
        "dry run": ["train", good, "cut.lambda=1.25", "learning_rate=5e-6", "--dry-run"],
        "dry run first": ["train", "--dry-run", good, "cut.lambda=1.25", "learning_rate=5e-6"],
        "dry run between": ["train", good, "cut.lambda=1.25", "--dry-run", "learning_rate=5e-6"],
        "run": ["train", good],
        "run again": ["train", good],
        "resume": ["train", desk.recipe("resumed", save_steps=1, max_steps=1)],
        "resume on": ["train", desk.recipe("resumed", save_steps=1, max_steps=1), "--resume"],
        "nothing": [],
    }
    request, reply = desk.folder / "cases.json", desk.folder / "results.json"
    request.write_text(json.dumps(cases))
    command = [sys.executable, str(TESTS / "cli_server.py"), str(request), str(reply)]
    subprocess.run(command, env=outside_environment(), check=True, timeout=600)
    return json.loads(reply.read_text())


def one_line(stderr: str) -> str:
    assert "Traceback" not in stderr, stderr
    ours = [line for line in stderr.splitlines() if line.startswith("fastalign: ")]
    assert len(ours) == 1 and stderr.rstrip().splitlines()[-1] == ours[0], stderr
    return ours[0]


@pytest.mark.parametrize("name", NAMES)
def test_a_mistake_is_one_line_that_names_it(desk, answers, name):
    code, out, err = answers[name]
    line = one_line(err)
    for part in mistakes(desk)[name][1]:
        assert part in line
    # DeepSpeed prints a line of its own to stdout when it is first used.
    assert code == 2 and "Traceback" not in out


def test_every_mistake_is_looked_at(desk):
    assert list(mistakes(desk)) == NAMES


@pytest.mark.parametrize("name", ["dry run", "dry run first", "dry run between"])
def test_a_dry_run_prints_the_resolved_recipe(desk, answers, name):
    code, out, err = answers[name]
    assert (code, err) == (0, "")
    expected = load_config(desk.recipe("good"), ["cut.lambda=1.25", "learning_rate=5e-6"])
    assert parse_config(yaml.safe_load(out)) == expected
    assert (expected.cut.lambda_, expected.learning_rate) == (1.25, 5e-6)
    assert out == dump_config(expected)


def test_a_run_says_what_it_does_and_where_the_result_is(desk, answers):
    code, _, err = answers["run"]
    assert code == 0
    assert "12 examples" in err and "2 steps" in err
    assert "step 1/2  loss " in err and "step 2/2  loss " in err
    assert err.rstrip().endswith(f"done: {desk.folder}/out-good")
    folder = desk.folder / "out-good"
    assert {"model.safetensors", "config.json", "run.json", "README.md", "recipe.yaml"} <= {
        path.name for path in folder.iterdir()
    }
    recipe = load_config(folder / "recipe.yaml")
    assert recipe == load_config(desk.recipe("good"))
    # Without checkpoints nothing stands in the way of doing it again.
    assert answers["run again"][0] == 0


def test_a_finished_run_that_is_resumed_is_done(desk, answers):
    assert answers["resume"][0] == 0
    code, _, err = answers["resume on"]
    assert code == 0 and "resumed from" in err and "at step 1" in err


def test_version_and_usage(answers):
    assert answers["version"] == [0, f"fastalign {__version__}\n", ""]
    code, _, err = answers["nothing"]
    assert code == 2 and err.startswith("usage: fastalign")


def shell(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env=outside_environment(**environment),
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


def test_the_installed_command_and_the_module_are_the_same(desk):
    arguments = ["train", desk.recipe("twice", max_stps=1)]
    command = Path(sys.executable).with_name("fastalign")
    for start in ([str(command)], [sys.executable, "-m", "fastalign"]):
        done = shell(*start, *arguments)
        assert "did you mean 'max_steps'?" in one_line(done.stderr)
        assert done.returncode == 2


def test_two_ranks_make_the_same_mistake_once(desk):
    recipe = desk.recipe("two", datasets=desk.data("bad.jsonl"), strict=True)
    done = shell(sys.executable, "-m", "fastalign", "train", recipe, "nproc_per_node=2")
    assert "bad.jsonl:3: field completion: value 7: want text" in one_line(done.stderr)
    assert done.returncode == 2


KILLS = """
import os, signal

def written(prompt, text):
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_rank_that_the_system_kills_is_named(desk):
    """It says nothing itself, and the others know only that somebody is gone."""
    (desk.folder / "kills.py").write_text(KILLS)
    judge = {"path": f"{desk.folder / 'kills.py'}:written"}
    recipe = desk.recipe("killed", **desk.online(judge=judge, nproc_per_node=2))
    done = shell(sys.executable, "-m", "fastalign", "train", recipe)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "fastalign: rank 1 was ended by SIGKILL (as the system does without free memory), and the "
        "run with it"
    )


def test_two_ranks_by_the_command_end_where_one_does(desk):
    """On one node, and on two of which each starts its own."""
    keys = {
        "use_peft": True,
        "learning_rate": 1e-2,
        # Adam divides by the gradient's size: an epsilon far above its rounding keeps that out.
        "adam_epsilon": 1e-2,
        "max_steps": 3,
        "lr_scheduler_type": "constant",
    }
    weights = []
    for processes in (1, 2):
        recipe = desk.recipe(f"ranks-{processes}", nproc_per_node=processes, **keys)
        done = shell(sys.executable, "-m", "fastalign", "train", recipe)
        assert done.returncode == 0, done.stderr
        assert re.search(rf"^ZeRO stage  {0 if processes == 1 else 3} \(", done.stderr, re.M)
        assert re.search(rf"^processes   {processes} on cpu$", done.stderr, re.M)
        assert done.stderr.count("step 3/3") == 1
        folder = desk.folder / f"out-ranks-{processes}"
        weights.append(load_file(folder / "adapter_model.safetensors"))
        facts = json.loads((folder / "run.json").read_text())
        assert facts["hardware"]["processes"] == processes
    recipe = desk.recipe("nodes", nproc_per_node=1, **keys)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    where = ["--nnodes", "2", "--master_addr", "127.0.0.1", "--master_port", str(port)]
    command = [sys.executable, "-m", "fastalign", "train", recipe, *where, "--node_rank"]
    with ThreadPoolExecutor(2) as pool:
        nodes = list(pool.map(lambda node: shell(*command, node), "01"))
    assert [node.returncode for node in nodes] == [0, 0], nodes
    # One of them speaks for both.
    assert [node.stderr.count("step 3/3") for node in nodes] == [1, 0]
    assert re.search("^ZeRO stage  3 ", nodes[0].stderr, re.M)
    assert re.search("^processes   2 on cpu$", nodes[0].stderr, re.M)
    weights.append(load_file(desk.folder / "out-nodes" / "adapter_model.safetensors"))
    moved = {n: t for n, t in weights[0].items() if "lora_B" in n}
    assert all(t.abs().max() > 1e-4 for t in moved.values())
    for found in weights[1:]:
        assert distance({n: found[n] for n in moved}, moved) < 1e-5


def test_a_mistyped_option_is_named(tmp_path, capsys, monkeypatch):
    # A test that trained in this process may have left it.
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    path = tmp_path / "recipe.yaml"
    path.write_text("method: sft\nmodel_name_or_path: m\noutput_dir: o\ndatasets: [{path: d}]\n")
    assert main(["train", str(path), "--resme"]) == 2
    error = capsys.readouterr().err
    assert "--resme: neither an option of fastalign train nor one of torchrun" in error
    assert "nearest is --resume" in error and "Traceback" not in error


def test_options_of_torchrun_reach_it(tmp_path, monkeypatch):
    """Several nodes: what each of them is told goes on to torchrun, word for word."""
    path = tmp_path / "recipe.yaml"
    path.write_text("method: sft\nmodel_name_or_path: m\noutput_dir: o\ndatasets: [{path: d}]\n")
    seen = []
    monkeypatch.setattr(torch.distributed.run, "run", seen.append)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    options = ["--nnodes", "2", "--node_rank=1", "--master-addr", "ten", "--master_port", "29501"]
    assert main(["train", str(path), "nproc_per_node=4", *options, "seed=3"]) == 0
    (arguments,) = seen
    assert (arguments.nnodes, arguments.node_rank, arguments.nproc_per_node) == ("2", 1, "4")
    assert (arguments.master_addr, arguments.master_port) == ("ten", 29501)
    assert not arguments.standalone and arguments.module
    assert arguments.training_script == "fastalign"
    assert arguments.training_script_args == ["train", str(path), "nproc_per_node=4", "seed=3"]
    # One node finds its own port.
    assert main(["train", str(path), "nproc_per_node=2"]) == 0
    assert seen[1].standalone and seen[1].nproc_per_node == "2"
