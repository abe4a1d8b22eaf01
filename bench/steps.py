"""What the benches of whole training steps share.

Each side runs in a process of its own, which nothing else runs beside.  The result is written after
every side; a bench that is started again measures what is not there yet.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

# Read when the libraries are imported: a benchmark looks nothing up and reports to nobody.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from racing import DEVICE, commit, machine, synchronise

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
# What compiles, allocates and fills caches; at the start of each side, not counted.
WARMUP_STEPS = 2
LEAST_STEPS = WARMUP_STEPS + 1

Row = dict[str, Any]
Sides = Mapping[str, Callable[[dict[str, Any]], Row]]


class Report:
    """A result that is written after every row and goes on where it stopped.

    Args:
        name: of the bench, as it is started.
        path: of the JSON file.
        settings: what all rows have in common; rows measured with others are refused.
        again: forget what the file holds.
    """

    def __init__(self, name: str, path: Path, settings: Row, again: bool) -> None:
        self.path = path
        self.rows: list[Row] = []
        self._head = {
            "command": shlex.join(["python", f"bench/{name}.py", *sys.argv[1:]]),
            **machine(),
            **settings,
        }
        if again or not path.is_file():
            return
        held = json.loads(path.read_text(encoding="utf-8"))
        told = [k for k in ("device", "torch", *settings) if held.get(k) != self._head[k]]
        if told:
            sys.exit(f"{path}: measured with another {told[0]}; --again measures all of it anew")
        self.rows = held["rows"]

    def lacks(self, **key: Any) -> bool:
        """Whether there is no row with these values yet."""
        found = any(all(row.get(k) == v for k, v in key.items()) for row in self.rows)
        say(f"{_words(key)}: {'in the file already' if found else 'measuring'}")
        return not found

    def add(self, row: Row) -> None:
        self.rows.append({"commit": commit(), **row})
        text = json.dumps({**self._head, "rows": self.rows}, indent=1, allow_nan=False)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(text + "\n", encoding="utf-8")


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def _words(key: Mapping[str, Any]) -> str:
    return " ".join(f"{name} {value}" for name, value in key.items())


def parser(documentation: str, result: str) -> argparse.ArgumentParser:
    """The options that all of these benches take."""
    made = argparse.ArgumentParser(description=documentation.split("\n")[0])
    made.add_argument("--model", help="default: SmolLM2-135M-Instruct")
    made.add_argument("--output", type=Path, default=RESULTS / result)
    made.add_argument("--again", action="store_true", help="measure anew what is in the file")
    return made


def model_folder(given: str | None) -> str:
    from fastalign.demo.model import ensure_smollm

    return given or str(ensure_smollm())


# ----------------------------------------------------------------------------------------- sides


def alone(file: str, side: str, task: dict[str, Any]) -> Row:
    """What a side of the bench ``file`` returns from a process of its own, and its peak memory:
    resident, or on a GPU what torch allocated."""
    with tempfile.TemporaryDirectory(prefix="fastalign-") as folder:
        answer = Path(folder, "answer.json")
        task = {**task, "output_dir": str(Path(folder, "run"))}
        command = [sys.executable, file, "--side", side, json.dumps(task), str(answer)]
        # Nothing is found that another run has computed.
        environment = {**os.environ, "FASTALIGN_CACHE": str(Path(folder, "cache"))}
        with subprocess.Popen(command, cwd=ROOT, env=environment) as process:
            try:
                _, status, usage = os.wait4(process.pid, 0)
            except BaseException:
                # Nobody would wait for it, and the next bench would run beside it.
                process.terminate()
                raise
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            sys.exit(f"{side}: exit code {process.returncode}")
        found = json.loads(answer.read_text(encoding="utf-8"))
    return {**found, "peak_gib": (found["peak_bytes"] or usage.ru_maxrss * 1024) / 2**30}


def start(sides: Sides, main: Callable[[], None]) -> None:
    """The bench, or the side of it that :func:`alone` asks this process for."""
    if sys.argv[1:2] != ["--side"]:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        main()
        return
    side, task, answer = sys.argv[2:]
    found = sides[side](json.loads(task))
    found["peak_bytes"] = torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else 0
    Path(answer).write_text(json.dumps(found), encoding="utf-8")


def train_steps(
    tree: dict[str, Any], beside: Callable[[Any, Any], Any] | None = None
) -> dict[str, list[Any]]:
    """Train by a recipe in this process.

    ``beside(run, examples)`` is called after each update; its time does not count.

    Returns ``seconds`` of each step, from the end of the last one to its own, rollouts and judging
    included; ``reference``, the seconds that the reference took for all steps before the first;
    ``logged``, what ``metrics.jsonl`` has of each step; ``beside``, what that returned.
    """
    import fastalign.train as loop
    from fastalign.config import parse_config

    rounds, update, score = loop.run_rounds, loop.update, loop.score_reference
    seconds: list[float] = []
    reference = 0.0
    returned: list[Any] = []
    mark = 0.0

    def timed_rounds(*arguments: Any) -> Any:
        nonlocal mark
        mark = time.perf_counter()
        return rounds(*arguments)

    def timed_update(run: Any, examples: Any, *arguments: Any) -> Any:
        nonlocal mark
        figures = update(run, examples, *arguments)
        synchronise()
        seconds.append(time.perf_counter() - mark)
        if beside is not None:
            returned.append(beside(run, examples))
        mark = time.perf_counter()
        return figures

    def timed_score(*arguments: Any) -> Any:
        nonlocal reference
        began = time.perf_counter()
        scored = score(*arguments)
        synchronise()
        reference += time.perf_counter() - began
        return scored

    with ExitStack() as stack:
        stack.enter_context(patch.object(loop, "score_reference", timed_score))
        stack.enter_context(patch.object(loop, "run_rounds", timed_rounds))
        stack.enter_context(patch.object(loop, "update", timed_update))
        loop.train(parse_config(tree))
    return {
        "seconds": seconds,
        "reference": reference,
        "logged": logged(tree["output_dir"]),
        "beside": returned,
    }


def logged(output_dir: str) -> list[Row]:
    """What a run wrote of each step, what it logged of the round before included."""
    text = Path(output_dir, "metrics.jsonl").read_text(encoding="utf-8")
    steps: list[Row] = []
    row: Row = {}
    for line in map(json.loads, text.splitlines()):
        row |= line
        if "loss" in line:
            steps.append(row)
            row = {}
    return steps


def plain_model(task: dict[str, Any], rank: int, modules: str | list[str]) -> Any:
    """The model with a LoRA adapter, as transformers and PEFT make it; trains."""
    import peft
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, task["dtype"])
    model = AutoModelForCausalLM.from_pretrained(task["model"], dtype=dtype).to(DEVICE)
    config = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=modules, task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(model, config).train()


def padded(rows: list[list[int]], *, left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask) int64 [B, L] of sequences, padded to the longest."""
    longest = max(map(len, rows))
    ids, mask = (torch.zeros(len(rows), longest, dtype=torch.int64) for _ in range(2))
    for i, row in enumerate(rows):
        place = slice(longest - len(row), longest) if left else slice(0, len(row))
        ids[i, place] = torch.tensor(row)
        mask[i, place] = 1
    return ids.to(DEVICE), mask.to(DEVICE)
