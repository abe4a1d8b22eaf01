"""What a run tells: start-up choices, progress, metrics."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from fastalign.config import Config, ConfigError
from fastalign.printing import printable


class Tracker:
    """Metrics to ``metrics.jsonl`` and the chosen services; a bar on a terminal, plain lines
    elsewhere.  Only rank 0 speaks."""

    def __init__(self, config: Config, rank: int, total_steps: int) -> None:
        self.active = rank == 0
        self.console = Console(stderr=True, quiet=not self.active)
        self.total_steps = total_steps
        self.started = time.monotonic()
        self.first_step: int | None = None
        self._bar: Progress | None = None
        self._writers: list[Any] = []
        self._file: IO[bytes] | None = None
        if not self.active:
            return
        folder = Path(config.output_dir)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise ConfigError(f"output_dir = {config.output_dir!r}: {error.strerror}") from None
        self._path = folder / "metrics.jsonl"
        self._writers = [_WRITERS[name](config) for name in config.report_to]

    def say(self, text: str) -> None:
        """One line for the person who runs it."""
        self.console.print(printable(text), highlight=False, soft_wrap=True, markup=False)

    def start(self, step: int, logged: int = 0) -> None:
        """Go on from ``step``, at which ``metrics.jsonl`` had ``logged`` bytes: what an interrupted
        run logged behind them will be logged again."""
        self.first_step = step
        if self.active:
            # Cut in place: what is written anew may be lost half-way.
            self._file = self._path.open("ab")
            if self._path.stat().st_size > logged:
                self._file.truncate(logged)
        if self.active and sys.stderr.isatty():
            self._bar = _bar(self.console)
            self._task = self._bar.add_task(
                "train", total=self.total_steps, completed=step, phase="start", figures=""
            )
            self._bar.start()

    @property
    def logged(self) -> int:
        """Bytes of ``metrics.jsonl`` on the disk; 0 on ranks that write none."""
        if self._file is None:
            return 0
        os.fsync(self._file.fileno())
        return self._path.stat().st_size

    def phase(self, name: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, phase=name)

    def log(self, step: int, metrics: dict[str, float], show: bool = True) -> None:
        """Record metrics of a step; ``show`` also moves the bar or prints a line."""
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step, **metrics}).encode() + b"\n")
        self._file.flush()
        for writer in self._writers:
            writer(step, metrics)
        if not show:
            return
        keys = ("loss", "grad_norm", "speed/tokens_per_second", "speed/mfu")
        figures = "  ".join(f"{k.split('/')[-1]} {metrics[k]:.4g}" for k in keys if k in metrics)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, figures=figures)
            return
        done = max(step - (self.first_step or 0), 1)
        left = (time.monotonic() - self.started) / done * (self.total_steps - step)
        self.say(f"step {step}/{self.total_steps}  {figures}  left {_clock(left)}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if self._file is not None:
            self._file.close()


class Counter:
    """How much of a job is done: a bar on a terminal, plain lines elsewhere."""

    def __init__(self, what: str, done: int, total: int) -> None:
        self.console = Console(stderr=True)
        self._what = what
        self._started, self._first = time.monotonic(), done
        self._done, self._total = done, total
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            self._bar = _bar(self.console)
            self._task = self._bar.add_task(
                what, total=total, completed=done, phase="start", figures=what
            )

    def __enter__(self) -> Counter:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def phase(self, name: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, phase=name)

    def advance(self, count: int) -> None:
        self._done += count
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done)
            return
        each = (time.monotonic() - self._started) / (self._done - self._first)
        left = _clock(each * (self._total - self._done))
        self.console.print(f"{self._done}/{self._total} {self._what}  left {left}", highlight=False)


def _bar(console: Console) -> Progress:
    """Its tasks have the fields ``phase`` and ``figures``."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.fields[phase]:<8}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _tensorboard(config: Config) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(Path(config.output_dir) / "tensorboard"))

    def write(step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return write


def _service(name: str) -> Any:
    def make(config: Config) -> Any:
        try:
            module = __import__(name)
        except ImportError:
            raise ConfigError(
                f"report_to has {name!r}, which is not installed: pip install {name}"
            ) from None
        run = module.init(
            project="fastalign",
            name=Path(config.output_dir).name,
            config=config.model_dump(mode="json"),
        )
        return lambda step, metrics: run.log(metrics, step=step)

    return make


_WRITERS = {
    "tensorboard": _tensorboard,
    "wandb": _service("wandb"),
    "trackio": _service("trackio"),
}
