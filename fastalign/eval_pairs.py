"""``fastalign eval --pairs``: how good a judge is on preference data."""

from __future__ import annotations

import contextlib
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from fastalign import __version__
from fastalign.config import ConfigError, DatasetConfig, JudgeConfig, ModelConfig
from fastalign.data import DataReport, Record, load_records
from fastalign.episodes import Verdict
from fastalign.intervals import Estimate
from fastalign.judge import Pair, PairwiseJudge
from fastalign.judge_quality import Calibration, Quality, compare_blind, plain, quality
from fastalign.judging import Judging, open_judge
from fastalign.local import LocalModel, open_model
from fastalign.templates import principle_name

REPORT, PLOT, PAIRS = "judge-report.json", "reliability.png", "judge-pairs.jsonl"
# Pairs of one call of the judge: enough for an engine, few enough to see that it goes on.
CHUNK = 128

ROWS = {
    "accuracy": "accuracy, abstentions counting half",
    "accuracy_decided": "accuracy of the decided pairs",
    "abstained": "abstains",
    "mass": "P(A) + P(B) at the decision",
    "flipped": "flips with the order",
    "first_slot": "prefers the first slot",
    "prefers_longer": "prefers the longer answer",
    "longer_is_better": "  which is the better one",
    "length_bias": "  difference",
}


@dataclass(frozen=True)
class Settings:
    """What the command line asks for; ``model`` is needed where it is the judge."""

    path: str
    judging: Judging
    model: ModelConfig | None = None
    max_samples: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Measured:
    """Every pair with its verdict, a standing for chosen, and what follows."""

    settings: Settings
    records: tuple[Record, ...]
    data: DataReport
    verdicts: tuple[Verdict, ...]
    quality: Quality

    def report(self) -> dict[str, Any]:
        """All figures and what they were measured with, for JSON."""
        settings = self.settings
        return {
            "fastalign": __version__,
            "data": {
                "path": settings.path,
                "rows": self.data.sources[0].rows,
                "dropped": self.data.dropped,
                "max_samples": settings.max_samples,
            },
            "model": settings.model.model_dump() if settings.model is not None else None,
            "judge": settings.judging.judge.model_dump(mode="json"),
            "max_length": settings.judging.max_length,
            "seed": settings.seed,
            "figures": plain(self.quality.figures()),
            "quality": plain(self.quality),
        }


def measure(settings: Settings) -> Measured:
    """Judge the pairs of a file and measure the judge.

    Raises:
        ConfigError: the data, the judge or the model cannot be used.
        EngineError, JudgeError, BudgetSpent: from whoever judges.
    """
    judging = settings.judging
    judging.check()
    if judging.judge.type == "self" and settings.model is None:
        raise ConfigError("--model is missing: the judge is the model itself unless --judge says")
    dataset = DatasetConfig(path=settings.path, max_samples=settings.max_samples)
    records, data = load_records([dataset], strict=False, seed=settings.seed, want="preference")
    with contextlib.ExitStack() as stack:
        own: LocalModel | None = None
        if judging.judge.type == "self":
            assert settings.model is not None
            own = stack.enter_context(
                open_model(settings.model, judging.rollout, max_model_len=judging.max_length)
            )
        judge = stack.enter_context(open_judge(judging, own))
        pairs = [Pair(r.prompt, r.chosen or "", r.rejected or "", r.tools) for r in records]
        verdicts = ask(judge, pairs, settings.seed)
    found = quality(
        verdicts,
        [(len(pair.a), len(pair.b)) for pair in pairs],
        tie=judging.judge.tie_threshold,
        principles=judging.judge.principles,
        better={p: [_better(record, p) for record in records] for p in judging.judge.principles},
        groups=[prompt_key(record) for record in records],
        seed=settings.seed,
    )
    return Measured(settings, tuple(records), data, tuple(verdicts), found)


def _better(record: Record, principle: str) -> str | None:
    """Which answer the data prefers by a principle, a being the chosen one: what its comparisons
    say, where it has any, and chosen otherwise."""
    if record.comparisons is None:
        return "a"
    for comparison in record.comparisons:
        named = comparison.principle
        if named is not None and principle_name(named) == principle_name(principle):
            return "a" if comparison.preferred == "chosen" else "b"
    return None


def ask(judge: PairwiseJudge, pairs: Sequence[Pair], seed: int) -> list[Verdict]:
    """The verdicts of :func:`compare_blind`, with a bar on a terminal."""
    console = Console(stderr=True)
    starts = range(0, len(pairs), CHUNK)
    verdicts: list[Verdict] = []
    for start in track(starts, "judging", console=console, disable=not console.is_terminal):
        verdicts += compare_blind(judge, pairs[start : start + CHUNK], seed + start)
    return verdicts


def prompt_key(record: Record) -> str:
    """Equal for equal prompts."""
    return json.dumps([[m["role"], m["content"]] for m in record.prompt])


# ------------------------------------------------------------------------------------ for people


def show(measured: Measured, console: Console) -> None:
    """The report as tables."""
    found, settings = measured.quality, measured.settings

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    for line in measured.data.lines():
        say(line)
    say(f"judge: {settings.judging.describe(settings.model)}")
    say(asked(found.pairs, found.too_long, found.failed))
    say("")
    console.print(estimates_table(found.overall, ROWS))
    if found.principles:
        console.print(_principles_table(found))
    console.print(_thresholds_table(found))
    for note in notes(measured):
        say(note)


def asked(pairs: int, too_long: int, failed: int) -> str:
    """What became of the pairs, in words."""
    line = f"{pairs} pairs judged in both orders"
    if too_long:
        line += f", {too_long} left out because the question is too long"
    if failed:
        line += f", {failed} left out because the judge failed"
    return line


def estimates_table(estimates: dict[str, Estimate], rows: dict[str, str]) -> Table:
    table = Table("", "", "95 % interval", "pairs")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, text in rows.items():
        estimate = estimates[name]
        table.add_row(text, number(estimate), _interval(estimate), f"{estimate.count:,}")
    return table


def number(estimate: Estimate) -> str:
    return _digits(estimate.value) if estimate.defined else "-"


def _interval(estimate: Estimate) -> str:
    return f"{_digits(estimate.low)} to {_digits(estimate.high)}" if estimate.defined else ""


def _digits(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"


def _principles_table(found: Quality) -> Table:
    table = Table(title="By each principle alone", title_justify="left", title_style="")
    table.add_column("principle", overflow="fold")
    for title in ("accuracy", "95 % interval", "abstains", "flips", "A + B", "pairs"):
        table.add_column(title, justify="right", no_wrap=True)
    for principle, estimates in found.principles.items():
        rest = [number(estimates[name]) for name in ("abstained", "flipped", "mass")]
        accuracy = estimates["accuracy"]
        count = f"{accuracy.count:,}"
        # As text: its brackets are no markup.
        table.add_row(Text(principle), number(accuracy), _interval(accuracy), *rest, count)
    return table


def _thresholds_table(found: Quality) -> Table:
    table = Table("tie threshold", "decided", "accuracy of these", "95 % interval")
    for column in table.columns:
        column.justify = "right"
    for row in found.thresholds:
        mark = " *" if row.tie == found.tie else ""
        decided = number(row.decided)
        table.add_row(f"{row.tie:g}{mark}", decided, number(row.accuracy), _interval(row.accuracy))
    return table


def notes(measured: Measured) -> list[str]:
    """What the tables do not say by themselves."""
    found = measured.quality
    lines = []
    if any(row.tie == found.tie for row in found.thresholds):
        lines.append("* the judge's own tie_threshold")
    ece = found.calibration
    if ece.bins:
        lines.append(
            f"calibration error of the margin {ece.ece:.3f}: a calibrated judge stays below "
            f"{ece.ece_limit:.3f} on as many pairs, 95 times in 100"
        )
    lines += too_little_mass(measured.settings.judging.judge, found.overall["mass"])
    if measured.settings.judging.replies is not None and not can_draw():
        lines.append(f"{PLOT} needs matplotlib: pip install 'fastalign[eval]'")
    return lines


def too_little_mass(who: JudgeConfig, mass: Estimate) -> list[str]:
    """That a run would refuse the judge, or nothing."""
    if who.type == "rule" or not mass.defined or mass.value >= who.min_decision_mass:
        return []
    return [
        f"P(A) + P(B) is below min_decision_mass = {who.min_decision_mass}: a run would refuse "
        "this judge; train it with method: jsft first"
    ]


# ------------------------------------------------------------------------------------------ files


def write(measured: Measured, folder: Path) -> list[Path]:
    """Write report, pairs and plot; the plot only where matplotlib is installed.

    Raises:
        ConfigError: the folder cannot be written to.
    """
    rows = [_row(r, seen) for r, seen in zip(measured.records, measured.verdicts, strict=True)]
    written = write_texts(
        folder,
        {
            REPORT: json.dumps(measured.report(), indent=1, ensure_ascii=False) + "\n",
            PAIRS: "".join(json.dumps(plain(row), ensure_ascii=False) + "\n" for row in rows),
        },
    )
    if can_draw():
        draw(measured.quality, folder / PLOT, Path(measured.settings.path).name)
        written.append(folder / PLOT)
    return written


def can_draw() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def write_texts(folder: Path, files: dict[str, str]) -> list[Path]:
    """
    Raises:
        ConfigError: the folder cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--out = {str(folder)!r}: {error.strerror or error}") from None
    return [folder / name for name in files]


def _row(record: Record, seen: Verdict) -> dict[str, Any]:
    names = {"a": "chosen", "b": "rejected", None: None}
    return {
        "source": record.source,
        "preferred": names[seen.preferred],
        "score_chosen": seen.score_a,
        "score_rejected": seen.score_b,
        "length_chosen": len(record.chosen or ""),
        "length_rejected": len(record.rejected or ""),
        "flipped": seen.flipped,
        "first_slot": seen.first_slot,
        "mass": seen.mass,
        "too_long": seen.too_long,
        "failed": seen.failed,
        # By principle: P(A), P(B) with chosen first, then with rejected first.
        "probabilities": seen.probabilities,
    }


def draw(found: Quality, path: Path, title: str) -> None:
    """Accuracy over the margin by bins, and what each tie threshold leaves decided."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    figure.suptitle(f"Judge on {title}, {found.pairs} pairs")
    _draw_bins(left, found.calibration)
    _draw_thresholds(right, found)
    for axis in (left, right):
        axis.axhline(0.5, color="grey", linewidth=0.8, linestyle=":", zorder=0)
        axis.set_ylim(0, 1.03)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_bins(axis: Any, found: Calibration) -> None:
    right = 1.05 * max([b.high for b in found.bins], default=1.0)
    axis.plot(
        [0, right], [0.5, (1 + right) / 2], color="tab:orange", linestyle="--", label="calibrated"
    )
    for i, b in enumerate(found.bins):
        margin = 2 * b.confidence - 1
        axis.errorbar(
            margin,
            b.accuracy,
            xerr=_arms([(margin, b.low, b.high)]),
            yerr=_arms([(b.accuracy, b.accuracy_low, b.accuracy_high)]),
            fmt="o",
            color="tab:blue",
            ecolor="lightsteelblue",
            label="" if i else "bins of pairs, 95 % intervals",
        )
    title = "calibration of the margin"
    if found.bins:
        title += f": error {found.ece:.3f}, by chance below {found.ece_limit:.3f}"
    axis.set_title(title, fontsize=10)
    axis.set(xlabel="margin |s_a - s_b|", ylabel="share of pairs that it is right on")
    axis.set_xlim(0, right)
    axis.legend(loc="lower right", frameon=False)


def _arms(intervals: Sequence[tuple[float, float, float]]) -> np.ndarray:
    """Of error bars, [2, n], from (value, low, high); never below 0 by rounding."""
    value, low, high = np.array(intervals).reshape(-1, 3).T
    return np.maximum([value - low, high - value], 0)


def _draw_thresholds(axis: Any, found: Quality) -> None:
    places = range(len(found.thresholds))
    axis.bar(
        places,
        [row.decided.value for row in found.thresholds],
        width=0.7,
        color="lightgrey",
        label="decided",
    )
    shown = [(x, row.accuracy) for x, row in enumerate(found.thresholds) if row.accuracy.defined]
    axis.errorbar(
        [x for x, _ in shown],
        [e.value for _, e in shown],
        yerr=_arms([(e.value, e.low, e.high) for _, e in shown]),
        fmt="o",
        color="tab:blue",
        capsize=3,
        label="right, of these (95 %)",
    )
    names = [f"{row.tie:g}" + ("*" if row.tie == found.tie else "") for row in found.thresholds]
    axis.set_xticks(list(places), names)
    axis.set_title("what a tie threshold leaves (* the judge's own)", fontsize=10)
    axis.set(xlabel="tie threshold", ylabel="share of pairs")
    axis.legend(loc="lower right", frameon=True)
