"""How the benchmarks measure: contestants run in turns, so that whatever disturbs the machine
disturbs them alike.

The time of every turn goes to pytest-benchmark, whose tables and JSON files show medians and
spreads; a contestant's peak memory is measured in a run of its own.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile

SMOKE = os.environ.get("FASTALIGN_BENCH") == "smoke"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The slowest peer takes 20 s a turn on two cores.
ROUNDS = 2 if SMOKE else 3 if DEVICE.type == "cpu" else 15


@dataclass(frozen=True)
class Measured:
    """Seconds of each turn, and the most bytes that tensors took beyond those there before, where
    that was measured."""

    seconds: list[float]
    peak_bytes: int | None


Contestants = dict[str, Callable[[], object]]
RACES: dict[object, dict[str, Measured]] = {}


class Clock:
    """A timer for pytest-benchmark that goes by the turns measured before."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, turns: Iterator[float]) -> None:
        self.now += next(turns)


CLOCK = Clock()


def measure(contestants: Contestants, folder: Path, turns: int, peaks: bool) -> dict[str, Measured]:
    # Also what compiles, tunes and allocates at the first call.
    peak: dict[str, int | None] = {}
    for name, function in contestants.items():
        function()
        peak[name] = peak_memory(function, folder) if peaks else None
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(turns):
        for name, function in contestants.items():
            synchronise()
            start = time.perf_counter()
            function()
            synchronise()
            seconds[name].append(time.perf_counter() - start)
    return {name: Measured(seconds[name], peak[name]) for name in contestants}


def synchronise() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def peak_memory(function: Callable[[], object], folder: Path) -> int:
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    trace = folder / "trace.json"
    profiler.export_chrome_trace(str(trace))
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e["name"] == "[memory]"]
    events.sort(key=lambda event: event["ts"])
    return max(accumulate((e["args"]["Bytes"] for e in events), initial=0))


@functools.cache
def copy_rate() -> float:
    """Bytes a second of a large copy, read and written: what is bound by memory can reach."""
    source = torch.ones(1 << (28 if DEVICE.type == "cuda" else 26), device=DEVICE)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(7):
        synchronise()
        start = time.perf_counter()
        target.copy_(source)
        synchronise()
        seconds.append(time.perf_counter() - start)
    return 2 * source.nbytes / median(seconds)


def told(*command: str) -> str:
    """What a command of the machine prints; nothing where there is no such command."""
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip()


def commit() -> str:
    """Of the sources, as git knows it or FASTALIGN_COMMIT says where no git is."""
    named = os.environ.get("FASTALIGN_COMMIT")
    return named or told("git", "describe", "--always", "--dirty") or "unknown"


@functools.cache
def machine() -> dict[str, str]:
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    if DEVICE.type == "cuda":
        name = torch.cuda.get_device_name()
    else:
        name = f"CPU, {torch.get_num_threads()} threads"
    return {
        "device": name,
        "torch": torch.__version__,
        "triton": triton_version,
        "commit": commit(),
    }
