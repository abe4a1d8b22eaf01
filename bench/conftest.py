"""The fixture of the benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from racing import CLOCK, RACES, ROUNDS, Contestants, copy_rate, machine, measure


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.benchmark(timer=CLOCK))


@pytest.fixture
def race(benchmark, tmp_path):
    """``race(group, make, name, **facts)``: how ``name`` did among ``make()``'s contestants.

    They run ``turns`` times, once for all tests of a group, and once more for their ``peaks`` of
    memory.  A contestant "product", if there is
    one, is what the others' times are divided by; ``operations`` among the facts gives a rate.  The
    floor is ``passes`` such products, or ``floor_bytes`` at the rate of a large copy.
    """

    def run(
        group: str,
        make: Callable[[], Contestants],
        name: str,
        *,
        turns: int = ROUNDS,
        peaks: bool = True,
        **facts: Any,
    ) -> None:
        if group not in RACES:
            RACES[group] = measure(make(), tmp_path, turns, peaks)
        if name not in RACES[group]:
            pytest.skip(f"{name} does not run here")
        ours = RACES[group][name]
        benchmark.group = group
        typical = median(ours.seconds)
        peak = None if ours.peak_bytes is None else ours.peak_bytes / 2**20
        benchmark.extra_info |= machine() | {"peak_mib": peak} | facts
        if "product" in RACES[group]:
            product = median(RACES[group]["product"].seconds)
            benchmark.extra_info["products"] = typical / product
            if facts.get("passes"):
                benchmark.extra_info["floors"] = typical / product / facts["passes"]
        elif "floor_bytes" in facts:
            benchmark.extra_info["floors"] = typical * copy_rate() / facts["floor_bytes"]
        if "operations" in facts:
            benchmark.extra_info["tflops"] = facts["operations"] / typical / 1e12
        turns = iter(ours.seconds)
        benchmark.pedantic(CLOCK.advance, (turns,), rounds=len(ours.seconds))

    return run
