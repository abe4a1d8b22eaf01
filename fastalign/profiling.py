"""torch's profiler over a few steps of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from fastalign.config import Config

ROWS = 50
"""Operations in the table."""


class Profiler:
    """Writes ``output_dir/profile/trace-RANK.json.gz``, which chrome://tracing and Perfetto open,
    and ``table-RANK.txt`` with the operations that took longest; nothing without ``profile``.

    Online the steps of a new round bring its rollouts and judgments with them.
    """

    def __init__(self, config: Config, rank: int, say: Callable[[str], None]) -> None:
        self._settings = config.profile
        self._folder = Path(config.output_dir, "profile")
        self._rank, self._say = rank, say
        self._done = 0
        self._running: profile | None = None

    def __enter__(self) -> Profiler:
        self._advance()
        return self

    def __exit__(self, *_: object) -> None:
        self._write()

    def step(self) -> None:
        """A step of the run is over."""
        self._done += 1
        self._advance()

    def _advance(self) -> None:
        if self._settings is None:
            return
        if self._done == self._settings.skip:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._running = profile(activities=activities, profile_memory=True)
            self._running.start()
        elif self._done == self._settings.skip + self._settings.steps:
            self._write()

    def _write(self) -> None:
        profiler, self._running = self._running, None
        if profiler is None or self._settings is None:
            return
        profiler.stop()
        steps = self._done - self._settings.skip
        if not steps:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        trace = self._folder / f"trace-{self._rank}.json.gz"
        profiler.export_chrome_trace(str(trace))
        device = "device" if torch.cuda.is_available() else "cpu"
        table = profiler.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=ROWS)
        (self._folder / f"table-{self._rank}.txt").write_text(table, encoding="utf-8")
        self._say(f"profile of {steps} steps: {trace}")
