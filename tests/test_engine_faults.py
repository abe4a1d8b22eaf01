"""Engines that say what no model says, fail in a run, or hang in the trainer's process.

What a server of its own survives is in test_rollout_server.py, vLLM in the trainer's process in
test_rollout_vllm.py.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import outside_environment, recipe

from fastalign import checkpoint
from fastalign.cli import main
from fastalign.config import Config, RolloutConfig, dump_config
from fastalign.rollout import EngineFault, Rollout, SamplingSettings, ServedModel, make_engine
from fastalign.rollout.engine import nonsense, nonsense_scores
from fastalign.rollout.hf import HfEngine
from fastalign.rollout.watchdog import Watchdog
from fastalign.train import train

pytestmark = pytest.mark.usefixtures("quiet_process")

# ------------------------------------------------------------------------------------- nonsense

SETTINGS = SamplingSettings(4, stop_token_ids=(2,))
GOOD = Rollout(np.array([5, 9, 2], np.int32), np.array([-1, -0.5, 0], np.float32), "stop", 1)


def tokens(*ids: int) -> dict[str, Any]:
    return {"token_ids": np.array(ids, np.int32), "logprobs": np.full(len(ids), -1.0, np.float32)}


WRONG = [
    (tokens(), "has 0 tokens, where 1 to 4 were asked for"),
    (tokens(5, 5, 5, 5, 2), "has 5 tokens, where 1 to 4"),
    (tokens(5, 10, 2), r"holds a token id outside 0\.\.9"),
    (tokens(5, -1, 2), "holds a token id outside"),
    (tokens(5, 6), "ended with token 6, which is no stop token"),
    (tokens(5, 6) | {"finish_reason": "length"}, "ended at 2 of 4 tokens"),
    ({"finish_reason": "abort"}, "ended with 'abort'"),
    ({"logprobs": np.array([-1, 0], np.float32)}, "has 2 log-probs for 3 tokens"),
    ({"logprobs": np.array([-1, np.nan, 0], np.float32)}, "has log-probs that are none"),
    ({"logprobs": np.array([-1, -np.inf, 0], np.float32)}, "has log-probs that are none"),
    ({"logprobs": np.array([-1, 0.5, 0], np.float32)}, "has log-probs that are none"),
]


@pytest.mark.parametrize(("change", "says"), WRONG, ids=[says for _, says in WRONG])
def test_a_completion_that_no_model_samples_is_named(change, says):
    found = nonsense([GOOD, replace(GOOD, **change)], SETTINGS, 10)
    assert found is not None and re.match(f"completion 1 of 2 {says}", found), found


def test_what_a_model_samples_is_none():
    cut = replace(GOOD, **tokens(5, 6, 7, 8), finish_reason="length")
    assert nonsense([GOOD, cut, replace(cut, **tokens(5, 6, 7, 2))], SETTINGS, 10) is None
    # A stop string ends where it likes.
    ended = replace(GOOD, **tokens(5, 6))
    assert nonsense([ended], replace(SETTINGS, stop=("x",)), 10) is None
    assert nonsense_scores(np.array([[-np.inf, -3.0, 1e-6]], np.float32)) is None
    assert nonsense_scores(np.array([[-1, np.nan, 2]], np.float32)) == (
        "2 of 3 log-probs are none: NaN or above 0"
    )


def test_an_engine_whose_weights_broke_says_so(tiny_llama):
    engine = make_engine(
        ServedModel(tiny_llama, dtype=torch.float32, max_model_len=64), RolloutConfig(engine="hf")
    )
    assert isinstance(engine, HfEngine)
    prompt = np.arange(3, 9, dtype=np.int32)
    assert engine.next_logprobs([prompt], [4, 5]).shape == (1, 2)
    engine._parameters["model.norm.weight"].fill_(float("nan"))
    with pytest.raises(EngineFault, match="engine failed: 2 of 2 log-probs are none"):
        engine.next_logprobs([prompt], [4, 5])
    with pytest.raises(EngineFault, match="cannot be sampled from"):
        engine.generate([prompt], SamplingSettings(2), [0])
    assert not engine.lost()


# ------------------------------------------------------------------------- in the trainer's process

SIZES = {"iterations": 2, "prompts_per_iteration": 4, "num_generations": 2}
SELF = {"type": "self", "tie_threshold": 0.0, "min_decision_mass": 0.0}


def online(model: Path, folder: Path, **keys: Any) -> Config:
    keys = {"online": SIZES, "judge": SELF, "use_peft": True, "lora_r": 4} | keys
    return recipe("dpo", model, folder, learning_rate=1e-2, lora_dropout=0.2, **keys)


def written(config: Config, path: Path) -> Path:
    path.write_text(dump_config(config))
    return path


def result(config: Config) -> dict[str, torch.Tensor]:
    return load_file(Path(config.output_dir, "adapter_model.safetensors"))


def same(left: Config, right: Config) -> bool:
    ours, theirs = result(left), result(right)
    return all(torch.equal(ours[name], theirs[name]) for name in ours.keys() | theirs.keys())


@pytest.fixture(scope="module")
def whole(sharp_llama, tmp_path_factory) -> Config:
    """A run that nothing disturbs."""
    torch.set_num_threads(1)
    config = online(sharp_llama, tmp_path_factory.mktemp("whole"))
    train(config)
    return config


@pytest.mark.parametrize("name", ["generate", "next_logprobs"])
def test_a_failed_call_ends_the_run_with_a_checkpoint(
    whole, sharp_llama, tmp_path, monkeypatch, capfd, name
):
    """Sampling or judging of the second round: an engine of this process has no other start than
    the run's."""
    config = online(sharp_llama, tmp_path)
    path = written(config, tmp_path / "recipe.yaml")
    original, first_round = getattr(HfEngine, name), Path(config.output_dir, "episodes/0000.jsonl")

    def fails(engine: HfEngine, prompts: Any, *arguments: Any) -> Any:
        # Two completions of four prompts, and four pairs in both orders.
        if len(prompts) == 8 and first_round.exists():
            patch.setattr(HfEngine, "_forward", out_of_memory)
        return original(engine, prompts, *arguments)

    def out_of_memory(*arguments: Any, **keys: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    with monkeypatch.context() as patch:
        patch.setattr(HfEngine, name, fails)
        assert main(["train", str(path)]) == 1
    (saved,) = checkpoint.checkpoints(Path(config.output_dir))
    assert capfd.readouterr().err.splitlines()[-1] == (
        "fastalign: rollout engine: the embedded engine failed: OutOfMemoryError: CUDA out of "
        f"memory. Tried to allocate; {saved} is saved: continue with --resume"
    )
    assert main(["train", str(path), "--resume"]) == 0
    assert same(config, whole)


STUCK = """
import ctypes, sys
from fastalign.cli import main
from fastalign.rollout import hf

owner, name, call = eval(sys.argv[2])
original, calls = getattr(owner, name), 0

def stuck(*arguments, **options):
    global calls
    calls += 1
    if calls == call:
        # In C, without end, and without Python's lock, as a kernel is.
        ctypes.CDLL(None).pause()
    return original(*arguments, **options)

setattr(owner, name, stuck)
sys.exit(main(["train", sys.argv[1], "rollout.timeout_s=4"]))
"""


def stuck(recipe: Path, where: str) -> str:
    """The last line of a run that hangs in a call of the embedded engine: (owner, name, which)."""
    command = [sys.executable, "-c", STUCK, str(recipe), where]
    done = subprocess.run(
        command, env=outside_environment(), capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 1
    return done.stderr.splitlines()[-1]


HANGS = (
    "has finished nothing in 4 s (rollout.timeout_s); it runs inside this process, which therefore "
    "ends; it hangs in <string>:14, stuck"
)


def test_a_start_that_hangs_ends_the_process(sharp_llama, tmp_path):
    path = written(online(sharp_llama, tmp_path), tmp_path / "recipe.yaml")
    line = stuck(path, "(hf.AutoModelForCausalLM, 'from_pretrained', 1)")
    assert line == f"fastalign: rollout engine: the embedded engine, while it starts, {HANGS}"


def test_a_hang_in_this_process_ends_it(whole, sharp_llama, tmp_path):
    """In the second round, behind the checkpoint of the first step."""
    config = online(sharp_llama, tmp_path, save_steps=1)
    path = written(config, tmp_path / "recipe.yaml")
    line = stuck(path, "(hf.HfEngine, '_sample', 2)")
    assert line == f"fastalign: rollout engine: the embedded engine {HANGS}"
    assert not Path(config.output_dir, "adapter_model.safetensors").exists()
    assert main(["train", str(path), "--resume", "rollout.timeout_s=3600"]) == 0
    assert same(config, whole)


def sleeps(watchdog: Watchdog, seconds: float, beats: int) -> None:
    with watchdog.watching():
        for _ in range(beats):
            time.sleep(seconds)
            watchdog.beat()
    os._exit(0)


def exit_code(limit_s: float, seconds: float, beats: int, stopped_s: float = 0.0) -> int | None:
    """Of a process that sleeps so long in a call, so many times; stopped for so long, meanwhile."""
    process = multiprocessing.get_context("fork").Process(
        target=sleeps, args=(Watchdog("x", limit_s), seconds, beats)
    )
    process.start()
    assert process.pid is not None
    if stopped_s:
        time.sleep(0.2)
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(stopped_s)
        os.kill(process.pid, signal.SIGCONT)
    process.join(60)
    return process.exitcode


def test_only_a_hang_ends_a_process():
    # Longer than the limit altogether, with something finished in between.
    assert exit_code(limit_s=2.0, seconds=0.5, beats=6) == 0
    assert exit_code(limit_s=0.5, seconds=60.0, beats=1) == 1
    # A scheduler stops the whole of a run for longer than the limit.
    assert exit_code(limit_s=2.0, seconds=0.5, beats=1, stopped_s=3.0) == 0
