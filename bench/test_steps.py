"""Steps of whole training runs beside a plain implementation or a peer, in pytest's tables.

    FASTALIGN_BENCH_DATA=FOLDER pytest bench -k step

FOLDER holds hh_harmless.jsonl (hh-rlhf's harmless-base) and shepherd.jsonl (Shepherd's feedback);
without it these are skipped.  Each test shows one side of `python bench/NAME.py`, which runs all of
them one after another, each in a process of its own, and says more: its docstring has the floor.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from racing import CLOCK, DEVICE, machine
from steps import ROOT, WARMUP_STEPS

FOLDER = os.environ.get("FASTALIGN_BENCH_DATA")
# On some CPUs one is faster, on some the other.
DTYPES = ["bfloat16"] if DEVICE.type == "cuda" else ["bfloat16", "float32"]


class Bench(NamedTuple):
    data: str
    sides: list[str]
    options: list[str]


def benches(dtype: str) -> dict[str, Bench]:
    cut = ["fastalign", "compiled", "recomputed", "plain"]
    pairs, judged = "hh_harmless.jsonl", "shepherd.jsonl"
    several = ["--dtypes", dtype]
    return {
        "dpo_step": Bench(pairs, ["fastalign", "trl"], several),
        "cut_step": Bench(judged, cut, several),
        "cut_step 2048": Bench(judged, cut, [*several, "--longest", "2048", "--steps", "3"]),
        "self_judge_step": Bench(pairs, ["vllm", "embedded", "plain"], ["--dtype", dtype]),
    }


def runs_here(side: str) -> bool:
    return side not in ("trl", "vllm") or importlib.util.find_spec(side) is not None


@functools.cache
def measured(name: str, dtype: str) -> list[dict[str, Any]]:
    """The rows of a bench, which runs once for all of its sides."""
    bench = benches(dtype)[name]
    script = name.split()[0]
    with tempfile.TemporaryDirectory(prefix="fastalign-") as folder:
        result = Path(folder, "result.json")
        data = Path(str(FOLDER), bench.data).resolve()
        command = [sys.executable, f"bench/{script}.py", str(data), *bench.options]
        command += ["--sides", *filter(runs_here, bench.sides), "--output", str(result)]
        subprocess.run(command, cwd=ROOT, check=True)
        rows: list[dict[str, Any]] = json.loads(result.read_text(encoding="utf-8"))["rows"]
    return rows


@pytest.mark.skipif(FOLDER is None, reason="FASTALIGN_BENCH_DATA names no folder with its data")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "who"),
    [(name, side) for name, bench in benches("").items() for side in bench.sides],
)
def test_step(benchmark, name, who, dtype):
    if not runs_here(who):
        pytest.skip(f"{who} is not installed")
    (row,) = (row for row in measured(name, dtype) if row["side"] == who)
    seconds = row["seconds"][WARMUP_STEPS:]
    benchmark.group = f"{name} {dtype}"
    kept = ("tokens_per_second", "body", "peak_gib", "version")
    benchmark.extra_info |= machine() | {key: row[key] for key in kept if key in row}
    turns = iter(seconds)
    benchmark.pedantic(CLOCK.advance, (turns,), rounds=len(seconds))
