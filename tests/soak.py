"""A long run of SELF-JUDGE, watched: its memory, open files and threads must not grow.

    python tests/soak.py [--steps 500] [--engine hf vllm] [--output FILE]

``fastalign train`` runs with a tiny model, rounds of a few updates, a checkpoint every 50 steps and
TensorBoard's log.  Beside it the process and its children are looked at twice a second: the median
memory in each fifth of the steps, and the fewest files and threads.  The last fifth is compared
with the second, since the first one fills caches.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from conftest import louder, make_tiny_llama
from support import outside_environment, recipe, rows, write_rows

from fastalign.config import dump_config

PARTS = 5
MEMORY = 0.02
"""Part of its memory by which a run may grow between the second fifth and the last: allocators
give pages back late."""


@dataclass(frozen=True)
class Look:
    """What a run and its children held after so many steps; ``memory`` in MiB, resident, pages
    that are shared counted once for each process."""

    step: int
    memory: float
    files: int
    threads: int


def look(process: psutil.Process, step: int) -> Look | None:
    """None when one of the processes ended meanwhile."""
    try:
        family = [process, *process.children(recursive=True)]
        return Look(
            step,
            sum(p.memory_info().rss for p in family) / 2**20,
            sum(p.num_fds() for p in family),
            sum(p.num_threads() for p in family),
        )
    except psutil.NoSuchProcess:
        return None


class Steps:
    """How many steps a run has logged, read on from where it was read last."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset, self.done = path, 0, 0

    def read(self) -> int:
        if self._path.is_file():
            with self._path.open(encoding="utf-8") as file:
                file.seek(self._offset)
                text = file.read()
            whole = text[: text.rfind("\n") + 1]
            self._offset += len(whole.encode())
            self.done += sum("loss" in json.loads(line) for line in whole.splitlines())
        return self.done


def soak(engine: str, steps: int, model: Path, folder: Path) -> dict[str, Any]:
    """Run it; figures for the report, with what grew under ``grew``."""
    prompts = folder / "prompts.jsonl"
    folder.mkdir(parents=True)
    write_rows(prompts, rows("prompt", 4 * steps))
    config = recipe(
        "dpo",
        model,
        folder,
        datasets=[{"path": str(prompts)}],
        judge={"type": "self", "tie_threshold": 0.0, "min_decision_mass": 0.0},
        # Most pairs of such a judge are told otherwise in the other order; the rest of them stays
        # what it is while the model hardly changes.
        online={
            "iterations": steps,
            "prompts_per_iteration": 4,
            "num_generations": 4,
            "pairs": "all",
        },
        learning_rate=1e-6,
        rollout={"engine": engine, "max_num_seqs": 16},
        report_to=["tensorboard"],
        use_peft=True,
        lora_r=4,
        global_batch_size=2,
        max_steps=steps,
        save_steps=50,
        save_total_limit=2,
    )
    path, log = folder / "recipe.yaml", folder / "log"
    path.write_text(dump_config(config))
    counted = Steps(Path(config.output_dir, "metrics.jsonl"))
    looks: list[Look] = []
    started = time.monotonic()
    with log.open("w") as output:
        run = subprocess.Popen(
            [sys.executable, "-m", "fastalign", "train", str(path)],
            env=outside_environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        process = psutil.Process(run.pid)
        while run.poll() is None:
            time.sleep(0.5)
            seen = look(process, counted.read())
            if seen is not None and 0 < seen.step < steps:
                looks.append(seen)
    if run.returncode or counted.read() < steps:
        raise SystemExit(f"{log}: exit {run.returncode} after {counted.done} of {steps} steps")
    parts = [[x for x in looks if i <= x.step * PARTS / steps < i + 1] for i in range(PARTS)]
    # Threads and files come and go with a checkpoint; what leaks is always there.
    usual = {"memory": statistics.median, "files": min, "threads": min}
    figures = {
        name: [round(of(getattr(x, name) for x in part), 1) for part in parts]
        for name, of in usual.items()
    }
    allowed = {"memory": 1 + MEMORY, "files": 1.0, "threads": 1.0}
    return {
        "steps": steps,
        "seconds": round(time.monotonic() - started, 1),
        "looks": len(looks),
        "memory_mib": figures["memory"],
        "open_files": figures["files"],
        "threads": figures["threads"],
        "grew": [n for n, most in allowed.items() if figures[n][-1] > figures[n][1] * most],
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python tests/soak.py")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--engine", nargs="+", choices=("hf", "vllm"), default=["hf", "vllm"])
    parser.add_argument("--output", type=Path, default=Path("bench/results/soak.json"))
    arguments = parser.parse_args(argv)
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    result: dict[str, Any] = {
        "command": shlex.join(["python", "tests/soak.py", *sys.argv[1:]]),
        "commit": commit,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "deepspeed", "transformers")},
        "each fifth of the steps": {},
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = louder(make_tiny_llama(folder / "plain"), folder / "sharp", seed=None)
        for engine in arguments.engine:
            found = soak(engine, arguments.steps, model, folder / engine)
            result["each fifth of the steps"][engine] = found
            print(engine, json.dumps(found), flush=True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    return int(any(found["grew"] for found in result["each fifth of the steps"].values()))


if __name__ == "__main__":
    sys.exit(main())
