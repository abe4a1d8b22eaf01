"""What a run tells: start-up choices, progress, metrics."""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any, Protocol

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

from fastalign import logs
from fastalign.config import Config, ConfigError
from fastalign.printing import printable

# Columns of a terminal in which a bar has room for all figures.
ROOMY = 110


class Tracker:
    """Metrics to ``metrics.jsonl`` and the chosen services; progress to stderr as
    :func:`fastalign.logs.configure` has it: a bar on a terminal, plain lines elsewhere, events for
    programs, or nothing.  Only rank 0 speaks."""

    def __init__(self, config: Config, rank: int, total_steps: int) -> None:
        self.active = rank == 0
        self._events = self.active and logs.style() == "json"
        plain = self.active and logs.style() == "plain"
        self.console = Console(stderr=True, quiet=not plain)
        self.total_steps = total_steps
        self.started = time.monotonic()
        self.first_step: int | None = None
        self._step = 0
        self._phase = ""
        self._bar: Progress | None = None
        self._writers: list[_Writer] = []
        self._file: IO[bytes] | None = None
        if not self.active:
            return
        self._folder = Path(config.output_dir)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._folder):
                pass
        except OSError as error:
            raise ConfigError(f"output_dir = {config.output_dir!r}: {error.strerror}") from None
        self._path = self._folder / "metrics.jsonl"
        self._writers = [_WRITERS[name](config) for name in config.report_to]
        if plain and sys.stderr.isatty():
            self._bar = _bar(self.console)
            self._task = self._bar.add_task(
                "train", total=total_steps, phase="start", figures="", start=False
            )
            self._bar.start()

    def say(self, text: str) -> None:
        """One line for the person who runs it."""
        if self._events:
            logs.emit("note", message=text.strip())
        self.console.print(printable(text), highlight=False, soft_wrap=True, markup=False)

    def chosen(self, name: str, value: str, why: str) -> None:
        """What was chosen for the person who runs it."""
        if self._events:
            logs.emit("chosen", name=name, value=value, why=why)
        else:
            self.say(f"{name:<10}  {value}" + (f" ({why})" if why else ""))

    @property
    def logged(self) -> int:
        """Bytes of ``metrics.jsonl`` on the disk; 0 on ranks that write none."""
        if self._file is None:
            return 0
        os.fsync(self._file.fileno())
        return self._path.stat().st_size

    def start(self, step: int, logged: int = 0) -> None:
        """Go on from ``step``, at which ``metrics.jsonl`` had ``logged`` bytes: what an interrupted
        run logged behind them will be logged again."""
        self.first_step = self._step = step
        self.started = time.monotonic()
        if not self.active:
            return
        # Cut in place: what is written anew may be lost half-way.
        self._file = self._path.open("ab")
        if self._path.stat().st_size > logged:
            self._file.truncate(logged)
        for writer in self._writers:
            writer.start(step)
        if self._bar is not None:
            self._bar.start_task(self._task)
            self._bar.update(self._task, completed=step)
        if self._events:
            logs.emit(
                "start", step=step, total_steps=self.total_steps, output_dir=str(self._folder)
            )

    def phase(self, name: str, detail: str = "") -> None:
        """What the run does from now on; ``detail`` is shown beside it on a terminal."""
        if self._bar is not None:
            self._bar.update(self._task, phase=f"{name} {detail}".strip())
        if self._events and name != self._phase:
            logs.emit("phase", phase=name, step=self._step)
        self._phase = name

    def log(self, step: int, metrics: dict[str, float], show: bool = True) -> None:
        """Record metrics of a step; ``show`` also moves the bar or prints a line."""
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step, **metrics}).encode() + b"\n")
        self._file.flush()
        for writer in self._writers:
            writer.log(step, metrics)
        self._step = step
        if self._bar is not None:
            if show:
                brief = self.console.width < ROOMY
                self._bar.update(self._task, completed=step, figures=_figures(metrics, brief))
            return
        done = max(step - (self.first_step or 0), 1)
        left = (time.monotonic() - self.started) / done * (self.total_steps - step)
        if self._events:
            more = {"seconds_left": round(left, 1)} if show else {}
            logs.emit(
                "metrics",
                step=step,
                total_steps=self.total_steps,
                **more,
                metrics=logs.finite(metrics),
            )
        elif show:
            self.say(f"step {step}/{self.total_steps}  {_figures(metrics)}  left {_clock(left)}")

    def done(self, metrics: dict[str, float]) -> None:
        """The result is written."""
        self.phase("done")
        if self._events:
            logs.emit("done", output_dir=str(self._folder), metrics=logs.finite(metrics))
        elif self.active:
            self.say(f"done: {self._folder}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        for writer in self._writers:
            writer.close()
        self._writers = []
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
    """Its tasks have the fields ``phase`` and ``figures``.  As wide as the terminal: the bar itself
    takes what the words leave."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.fields[phase]:<8}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        expand=True,
    )


def _figures(metrics: Mapping[str, float], brief: bool = False) -> str:
    """The figures of a step that one wants to see go by; ``brief``: beside a bar in 80 columns."""
    shown = {
        "loss": "loss {:.4g}",
        "grad_norm": "" if brief else "grad norm {:.3g}",
        "speed/tokens_per_second": "{:,.0f} tokens/s",
        "speed/mfu": "" if brief else "{:.0%} MFU",
    }
    return "  ".join(
        form.format(metrics[name]) for name, form in shown.items() if form and name in metrics
    )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class _Writer(Protocol):
    """A service that keeps metrics."""

    def start(self, step: int) -> None:
        """Steps behind ``step``, which an interrupted run logged, will come again."""

    def log(self, step: int, metrics: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    def __init__(self, config: Config) -> None:
        self._folder = Path(config.output_dir, "tensorboard")
        self._writer: Any = None

    def start(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._folder), purge_step=step + 1 if step else None)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class _Service:
    """W&B, or trackio, which has the same interface."""

    def __init__(self, name: str, config: Config) -> None:
        try:
            module = importlib.import_module(name)
        except ImportError:
            raise ConfigError(
                f"report_to has {name!r}, which is not installed: pip install {name}"
            ) from None
        # W&B has much to say on stderr, and its files lie where the process was started.
        own = {
            "dir": config.output_dir,
            "settings": {"silent": logs.style() != "plain"},
        }
        try:
            self._run = module.init(
                project="fastalign",
                name=Path(config.output_dir).name,
                config=config.model_dump(mode="json", by_alias=True),
                **(own if name == "wandb" else {}),
            )
        except Exception as error:
            # No login, no network, a setting of theirs: whatever it is, it is told before loading.
            said = str(error).strip().partition("\n")[0]
            raise ConfigError(f"report_to has {name!r}, which does not start: {said}") from None

    def start(self, step: int) -> None:
        pass

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log(metrics, step=step)

    def close(self) -> None:
        self._run.finish()


_WRITERS: dict[str, Callable[[Config], _Writer]] = {
    "tensorboard": _TensorBoard,
    "wandb": partial(_Service, "wandb"),
    "trackio": partial(_Service, "trackio"),
}
