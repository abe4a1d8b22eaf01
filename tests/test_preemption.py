"""SIGTERM and SIGINT in every phase of a run, from inside and from outside, on one rank and two."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import outside_environment, recipe
from test_train import LORA, RULE, logged, online, result

import fastalign.train as loop
from fastalign import checkpoint, judge
from fastalign import online as hop
from fastalign.cli import main
from fastalign.config import Config, dump_config
from fastalign.evaluate import Evaluator
from fastalign.model import TrainedModel
from fastalign.rollout.hf import HfEngine

pytestmark = pytest.mark.usefixtures("quiet_process")


def signalled(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int, number: int
) -> Callable[[], int]:
    """Send this process a signal when a function is called for the ``call``-th time; returns how
    often it was called and returned."""
    original, calls, returned = getattr(owner, name), 0, 0

    def watched(*arguments: Any, **keys: Any) -> Any:
        nonlocal calls, returned
        calls += 1
        if calls == call:
            os.kill(os.getpid(), number)
        found = original(*arguments, **keys)
        returned += 1
        return found

    monkeypatch.setattr(owner, name, watched)
    return lambda: returned


# Phase, function and call in which the signal comes, the step that is saved, and whether the phase
# ends first.
PHASES = [
    ("loading", loop, "build_model", 1, None, False),
    ("evaluating at the start", Evaluator, "_answers", 1, 0, False),
    # The first push is the start-up check's, the second the evaluation's.
    ("sync", hop, "push_weights", 3, 0, False),
    ("sampling", HfEngine, "generate", 1, 0, False),
    ("judging", judge, "judge_written", 1, 0, False),
    ("training", TrainedModel, "step", 2, 2, True),
    ("loading a checkpoint", checkpoint, "load_checkpoint", 1, None, False),
    ("saving", checkpoint, "_save_state", 1, 4, True),
    ("evaluating", Evaluator, "_answers", 1, 6, False),
]


def test_a_signal_in_any_phase_leaves_what_an_undisturbed_run_goes_on_from(
    sharp_llama, tmp_path, monkeypatch, capfd
):
    rule = tmp_path / "rule.py"
    rule.write_text(RULE)
    keys = {"lora_dropout": 0.2, "save_steps": 2, "eval_ratio": 0.2, "eval_steps": 6} | LORA
    keys |= online("cut", rule)
    keys["online"] = {"iterations": 2, "prompts_per_iteration": 4, "num_generations": 2}
    keys |= {"global_batch_size": 2}
    whole = recipe("cut", sharp_llama, tmp_path / "whole", **keys)
    loop.train(whole)
    assert len(logged(whole, "loss")) == 8

    config = recipe("cut", sharp_llama, tmp_path / "stopped", **keys)
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_config(config))
    number = signal.SIGTERM
    for phase, owner, name, call, step, ends in PHASES:
        number = signal.SIGINT if number == signal.SIGTERM else signal.SIGTERM
        with monkeypatch.context() as patch:
            returned = signalled(patch, owner, name, call, number)
            assert main(["train", str(path), "--resume"]) == 75, phase
        assert returned() >= call if ends else returned() == call - 1, phase
        line = capfd.readouterr().err.splitlines()[-1]
        if step is None:
            assert line == (
                f"fastalign: paused: {number.name} before the first step: there is nothing to "
                "save; start the same again"
            )
        else:
            folder = Path(config.output_dir, f"checkpoint-{step}")
            assert line == (
                f"fastalign: paused: {number.name}; {folder} is saved: continue with --resume"
            ), phase
            assert checkpoint.checkpoints(Path(config.output_dir))[-1] == folder
    assert main(["train", str(path), "--resume"]) == 0
    expected, resumed = result(whole), result(config)
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    assert [(x["step"], x["loss"]) for x in logged(config, "loss")] == [
        (x["step"], x["loss"]) for x in logged(whole, "loss")
    ]


# ------------------------------------------------------------------------- from outside


def launch(path: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "fastalign", "train", str(path), *arguments],
        env=outside_environment(),
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(process: subprocess.Popen[str], there: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 400
    while not there():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


def ended(process: subprocess.Popen[str]) -> tuple[int, list[str]]:
    _, error = process.communicate(timeout=400)
    return process.returncode, error.splitlines()


def trained(config: Config) -> bool:
    path = Path(config.output_dir, "metrics.jsonl")
    return path.is_file() and '"loss"' in path.read_text()


@pytest.mark.slow
def test_two_ranks_stop_together_and_go_on(tiny_llama, tmp_path):
    """The signal comes to the process that started them."""
    keys = {"zero_stage": 3, "nproc_per_node": 2, "num_train_epochs": 10.0}
    results = []
    for name in ("whole", "stopped"):
        config = recipe("sft", tiny_llama, tmp_path / name, **keys)
        path = tmp_path / f"{name}.yaml"
        path.write_text(dump_config(config))
        process = launch(path)
        if name == "stopped":
            wait_for(process, partial(trained, config))
            process.send_signal(signal.SIGTERM)
            asked = time.monotonic()
            code, lines = ended(process)
            # A step and a checkpoint; the limit is for a machine that does other things as well.
            assert code == 75 and time.monotonic() - asked < 30, lines
            (saved,) = checkpoint.checkpoints(Path(config.output_dir))
            assert f"fastalign: paused: SIGTERM; {saved} is saved: continue with --resume" in lines
            process = launch(path, "--resume")
        code, lines = ended(process)
        assert code == 0, lines
        results.append(load_file(Path(config.output_dir, "model.safetensors")))
        assert [x["step"] for x in logged(config, "loss")] == list(range(1, 31))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


SLOW_RULE = """
import time
from pathlib import Path

def written(prompt, text):
    Path(__file__).with_name("judging").touch()
    time.sleep(0.3)
"""


@pytest.mark.slow
def test_a_second_signal_ends_at_once(sharp_llama, tmp_path):
    """In the middle of judging on two ranks, which the first signal waits for."""
    (tmp_path / "slow.py").write_text(SLOW_RULE)
    keys = online("cut", tmp_path / "slow.py", nproc_per_node=2, zero_stage=3)
    keys["online"] = {"prompts_per_iteration": 12, "num_generations": 8}
    config = recipe("cut", sharp_llama, tmp_path, **keys)
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_config(config))
    process = launch(path)
    wait_for(process, (tmp_path / "judging").exists)
    process.send_signal(signal.SIGINT)
    time.sleep(2.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    asked = time.monotonic()
    code, lines = ended(process)
    assert code == 130 and time.monotonic() - asked < 10, lines
    assert "fastalign: SIGINT: stopping; once more: at once" in lines
    assert not checkpoint.checkpoints(Path(config.output_dir))
