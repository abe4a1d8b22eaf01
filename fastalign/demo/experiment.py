"""The demo over several seeds, with controls of equal budget.

``python -m fastalign.demo.experiment`` keeps every step in the output folder, so that an
interrupted experiment goes on where it stopped, and writes one JSON with each run's figures and
their means over seeds.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastalign.demo.run import CUT_VARIANTS, JUDGE_VARIANTS, Demo

VARIANTS = {
    "habit": CUT_VARIANTS,
    # Without controls: what a model says by itself is the harder subject, shown for comparison.
    "natural": CUT_VARIANTS[:1],
    "self-judge": JUDGE_VARIANTS,
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fastalign.demo.experiment")
    parser.add_argument("--output-dir", default="runs/demo")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--stages", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--result", default="bench/results/demo.json")
    arguments = parser.parse_args(argv)

    started = time.monotonic()

    def say(line: str) -> None:
        print(f"[{(time.monotonic() - started) / 60:6.1f} min] {line}", flush=True)

    result: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "fastalign.demo.experiment", *sys.argv[1:]]),
        "seeds": arguments.seeds,
        "libraries": {
            name: importlib.metadata.version(name)
            for name in ("fastalign", "torch", "transformers", "deepspeed", "peft")
        },
        "machine": platform.machine(),
        "stages": {stage: {} for stage in arguments.stages},
    }
    for seed in arguments.seeds:
        demo = Demo(Path(arguments.output_dir) / f"seed-{seed}", seed, say)
        for stage in arguments.stages:
            for variant in VARIANTS[stage]:
                say(f"seed {seed}, {stage}: {variant.name}")
                figures = (
                    demo.self_judge(variant) if stage == "self-judge" else demo.cut(stage, variant)
                )
                runs = result["stages"][stage].setdefault(variant.name, {"runs": {}})
                runs["runs"][str(seed)] = figures
                runs["mean"] = _mean(list(runs["runs"].values()))
                # Written after each run: what is done is never lost.
                target = Path(arguments.result)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _mean(trees: list[Any]) -> Any:
    first = trees[0]
    if isinstance(first, dict):
        return {key: _mean([tree[key] for tree in trees]) for key in first}
    return np.mean(trees, axis=0).tolist()


if __name__ == "__main__":
    main()
