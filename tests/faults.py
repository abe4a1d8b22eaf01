"""Runs killed by SIGKILL at random moments and resumed, beside runs that nothing disturbed.

    python tests/faults.py [--kills 30] [--seed 0] [--only NAME ...] [--output FILE]

For each combination of method, engine and ranks a run is killed in the middle of a phase (sync,
rollout, judging, an update, a save; which one, how far into it and on which rank is drawn), is
resumed and killed again, until a drawn moment does not come any more and the run ends; then the
next run begins, until there were as many kills as asked for.  Every other run writes its
checkpoints behind the training.  Every run has to end with the bits of
the undisturbed one: the trained tensors, the episode log, each step's loss and gradient norm, and
as many lines of metrics.

Processes are forked from one that has imported torch and DeepSpeed already, so that an attempt
takes seconds.  A signal of its own ends all of a run's processes when one dies, as torchrun does.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# One thread repeats bit for bit, and a process with several is not to be forked.
os.environ["OMP_NUM_THREADS"] = "1"

import torch.distributed as dist
from safetensors.torch import load_file
from support import recipe

from fastalign import checkpoint
from fastalign.cli import main as fastalign
from fastalign.config import Config, dump_config
from fastalign.tracking import Tracker

PHASES = ("sync", "rollout", "judge", "train", "save")
LIMIT = 300.0
"""Seconds that an attempt may take: ranks that disagree would wait for ever."""
# A judge by rule, of an answer's length and of two answers' lengths.
RULE = """
import time

def written(prompt, text):
    time.sleep(0.01)
    return None if len(text) % 3 == 0 else f"Has {len(text)} letters."
"""
METHODS: dict[str, dict[str, Any]] = {
    "cut": {"judge": {"path": "rule.py:written"}},
    "dpo": {
        "judge": {"type": "self", "tie_threshold": 0.0, "min_decision_mass": 0.0},
        "use_peft": True,
        "lora_r": 4,
        "lora_alpha": 16,
    },
}
NAMES = {"cut": "cut-online", "dpo": "self-judge"}


@dataclass(frozen=True)
class Combination:
    """``method`` of a recipe, ``engine`` of the rollouts, number of ranks."""

    method: str
    engine: str
    ranks: int

    @property
    def name(self) -> str:
        return f"{NAMES[self.method]}-{self.engine}-{self.ranks}"

    def config(self, model: Path, folder: Path, behind: bool) -> Config:
        """Three rounds of a few updates, with a checkpoint after every other update, which may be
        written ``behind`` the training."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "rule.py").write_text(RULE)
        keys = dict(METHODS[self.method])
        if "path" in keys["judge"]:
            keys["judge"] = {"path": f"{folder / 'rule.py'}:written"}
        return recipe(
            self.method,
            model,
            folder,
            online={"iterations": 3, "prompts_per_iteration": 4, "num_generations": 2},
            rollout={"engine": self.engine, "max_num_seqs": 16},
            global_batch_size=3,
            learning_rate=3e-3,
            save_steps=2,
            async_save=behind,
            resume_from_checkpoint=True,
            zero_stage=3 if self.ranks > 1 and self.method == "cut" else 0,
            **keys,
        )


COMBINATIONS = tuple(
    Combination(method, engine, ranks)
    for engine in ("hf", "vllm")
    for method in METHODS
    for ranks in (1, 2)
)


@dataclass(frozen=True)
class Kill:
    """When a rank dies: so long after a phase began for the n-th time."""

    phase: str
    occurrence: int
    delay: float
    rank: int


class Rank:
    """What a forked process does: train, and note when phases begin, or die in one of them."""

    def __init__(self, rank: int, kill: Kill | None, moments: Path) -> None:
        self.rank, self.kill, self.moments = rank, kill, moments
        self.begun: Counter[str] = Counter()

    def begin(self, phase: str) -> None:
        self.begun[phase] += 1
        if self.rank == 0:
            with self.moments.open("a") as file:
                file.write(json.dumps([phase, time.monotonic()]) + "\n")
        kill = self.kill
        if kill is None or (self.rank, phase, self.begun[phase]) != (
            kill.rank, kill.phase, kill.occurrence
        ):  # fmt: skip
            return
        timer = threading.Timer(kill.delay, os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()

    def run(self, config: Path, log: Path, group: dict[str, str]) -> None:
        os.setsid()
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.environ.update(group, RANK=str(self.rank), LOCAL_RANK=str(self.rank))
        shown, save = Tracker.phase, checkpoint.save_checkpoint

        def phase(tracker: Tracker, name: str, detail: str = "") -> None:
            if name in PHASES:
                self.begin(name)
            shown(tracker, name, detail)

        def save_checkpoint(*arguments: Any, **keys: Any) -> Path:
            self.begin("save")
            return save(*arguments, **keys)

        Tracker.phase = phase  # type: ignore[method-assign]
        checkpoint.save_checkpoint = save_checkpoint
        code = fastalign(["train", str(config)])
        sys.stdout.flush()
        os._exit(code)


def serve_store(port: Connection) -> None:
    """Hold the store through which a run's ranks meet, until killed."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port.send(store.port)
    signal.pause()


def attempt(config: Path, ranks: int, kill: Kill | None) -> list[int | None]:
    """Exit codes of the ranks of one start of a run, the negative number of a signal where one
    ended it; None where that was ours."""
    fork = multiprocessing.get_context("fork")
    # In a process of its own: one whose threads serve a store is not to be forked.
    ours, theirs = fork.Pipe()
    store = fork.Process(target=serve_store, args=(theirs,))
    store.start()
    group = {
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(ours.recv()),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    moments, log = config.with_suffix(".moments"), config.with_suffix(".log")
    started = [
        fork.Process(target=Rank(r, kill, moments).run, args=(config, log, group))
        for r in range(ranks)
    ]
    for process in started:
        process.start()
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        codes = [process.exitcode for process in started]
        if all(code is not None for code in codes) or any(codes):
            break
        time.sleep(0.02)
    codes = [process.exitcode for process in started]
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            assert process.pid is not None
            os.killpg(process.pid, signal.SIGKILL)
    for process in (*started, store):
        process.kill()
        process.join()
    return codes


def durations(moments: Path) -> dict[str, float]:
    """Seconds from the beginning of a phase to that of the next one, the longest of each."""
    lines = [json.loads(line) for line in moments.read_text().splitlines()]
    found: dict[str, float] = {}
    for (phase, start), (_, end) in zip(lines, [*lines[1:], lines[-1]], strict=True):
        found[phase] = max(found.get(phase, 0.0), end - start)
    return found


def outcome(config: Config) -> dict[str, Any]:
    """What two runs have to share to the last bit."""
    folder = Path(config.output_dir)
    (weights,) = list(folder.glob("*model.safetensors"))
    tensors = {n: t.numpy().tobytes() for n, t in load_file(weights).items()}
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [(row["step"], row["loss"], row["grad_norm"]) for row in rows if "loss" in row]
    # But where a row's file lies, which is each run's own.
    episodes = [
        {key: value for key, value in json.loads(line).items() if key != "source"}
        for path in sorted(folder.glob("episodes/*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    logged = [row["step"] for row in rows]
    return {"tensors": tensors, "steps": steps, "logged": logged, "episodes": episodes}


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    return [key for key in ours if ours[key] != theirs[key]]


def draw(rng: random.Random, ranks: int, lengths: dict[str, float]) -> Kill:
    phase = rng.choice([p for p in PHASES if p in lengths])
    delay = rng.uniform(0, 1.2 * lengths[phase])
    return Kill(phase, rng.choice((1, 1, 2)), delay, rng.randrange(ranks))


def disturb(
    combination: Combination, model: Path, folder: Path, kills: int, seed: int
) -> dict[str, Any]:
    """Kill and resume runs of a combination until there were so many kills.

    Returns figures for the report; ``failures`` says what went wrong, and is empty where nothing
    did.
    """
    rng = random.Random(f"{combination.name} {seed}")
    shutil.rmtree(folder, ignore_errors=True)
    started = time.monotonic()

    def prepare(name: str, behind: bool = False) -> tuple[Config, Path]:
        config = combination.config(model, folder / name, behind)
        path = folder / name / "recipe.yaml"
        path.write_text(dump_config(config))
        return config, path

    config, path = prepare("undisturbed")
    codes = attempt(path, combination.ranks, None)
    assert codes == [0] * combination.ranks, path.with_suffix(".log").read_text()[-3000:]
    expected, lengths = outcome(config), durations(path.with_suffix(".moments"))
    done: Counter[str] = Counter()
    failures: list[str] = []
    runs = 0
    while sum(done.values()) < kills and not failures:
        runs += 1
        config, path = prepare(f"run-{runs}", behind=runs % 2 == 1)
        history: list[Kill] = []
        while True:
            kill = None
            if sum(done.values()) < kills:
                kill = draw(rng, combination.ranks, lengths)
            codes = attempt(path, combination.ranks, kill)
            if -signal.SIGKILL in codes:
                assert kill is not None
                history.append(kill)
                done[kill.phase] += 1
                continue
            if codes != [0] * combination.ranks:
                failures.append(f"{path}: exit codes {codes} after {list(map(asdict, history))}")
            else:
                other = differences(outcome(config), expected)
                if other:
                    failures.append(f"{path}: other {other} after {list(map(asdict, history))}")
                else:
                    shutil.rmtree(path.parent)
            break
    return {
        "kills": sum(done.values()),
        "by phase": dict(sorted(done.items())),
        "runs": runs,
        "steps": len(expected["steps"]),
        "seconds": round(time.monotonic() - started, 1),
        "failures": failures,
    }


@contextlib.contextmanager
def _model(path: Path | None) -> Iterator[Path]:
    """A folder with the model of the tests."""
    if path is not None:
        yield path
        return
    from conftest import louder, make_tiny_llama

    with tempfile.TemporaryDirectory() as plain, tempfile.TemporaryDirectory() as sharp:
        yield louder(make_tiny_llama(Path(plain)), Path(sharp), seed=None)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python tests/faults.py")
    parser.add_argument("--kills", type=int, default=30, help="of each combination")
    parser.add_argument("--seed", type=int, default=0)
    names = [combination.name for combination in COMBINATIONS]
    parser.add_argument("--only", nargs="*", choices=names, default=names, metavar="NAME")
    parser.add_argument("--output", type=Path, default=Path("bench/results/faults.json"))
    parser.add_argument("--folder", type=Path, default=Path("runs/faults"))
    parser.add_argument("--model", type=Path)
    arguments = parser.parse_args(argv)
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    result: dict[str, Any] = {
        "command": shlex.join(["python", "tests/faults.py", *sys.argv[1:]]),
        "commit": commit,
        "combinations": {},
    }
    if arguments.output.is_file():
        # What an interrupted grid of the same code has done stays.
        before = json.loads(arguments.output.read_text())
        if before["commit"] == commit:
            result["combinations"] = before["combinations"]
    with _model(arguments.model) as model:
        for combination in COMBINATIONS:
            known = result["combinations"].get(combination.name)
            if combination.name not in arguments.only:
                continue
            if known is not None and known["kills"] >= arguments.kills and not known["failures"]:
                continue
            found = disturb(
                combination,
                model,
                arguments.folder.resolve() / combination.name,
                arguments.kills,
                arguments.seed,
            )
            result["combinations"][combination.name] = found
            print(combination.name, json.dumps(found), flush=True)
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    return int(any(found["failures"] for found in result["combinations"].values()))


if __name__ == "__main__":
    sys.exit(main())
