"""``fastalign report``: what runs were set to, did and wrote, as one page."""

from __future__ import annotations

import datetime
import importlib.util
import json
import math
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from fastalign.config import Config, ConfigError, EndpointConfig, JudgeConfig, read_yaml
from fastalign.page import embedded_json, read_template

METRICS, EPISODES, SAMPLES = "metrics.jsonl", "episodes", "eval"
MOST_RUNS, MOST_SAMPLES, MOST_FLAGGED = 16, 8, 12
# Points of a curve: as many as a figure is wide.
MOST_POINTS = 400
STEP_PARTS = ("pack", "reference", "forward", "backward", "wait", "optimizer")
ROUND_PARTS = ("sync", "waiting_for_rollout", "rollout", "judge")
PARTS = (*STEP_PARTS, *ROUND_PARTS, "evaluation")
# Beside the training, which it overlaps with: no part of a sum.
OVERLAPPING = "rollout_ahead"

TITLES = {
    "": "Training",
    "cut": "CUT",
    "rewards": "Rewards",
    "logps": "Log-probs",
    "eval": "Evaluation",
    "rollout": "Rollouts",
    "sync": "Weight sync",
    "speed": "Speed",
    "judge": "Judgments of rollouts",
    "judge_quality": "The judge on pairs of which the better answer is known",
}
# An en dash: there is no such thing here.
NOTHING = "\u2013"
WHEN = ("started", "finished")
JUDGE = ("judge", "judge_quality")
MEANINGS = {
    "loss": "what is minimised, mean over the global batch",
    "nll": "negative log-likelihood of the targets, nats a token",
    "grad_norm": "before clipping",
    "skipped_steps": "batches so far whose loss or gradient was no finite number",
    "cut/flagged": "share of the tokens of criticised answers that count as inappropriate",
    "cut/contrast": "log c - log q on criticised answers, nats",
    "cut/positives": "share of the records that nobody criticised",
    "cut/align_p": "likelihood loss of fine answers",
    "cut/align_n": "likelihood loss of criticised answers behind their judgment",
    "cut/misalign_likelihood": "likelihood part of the contrast",
    "cut/misalign_penalty": "unlikelihood part of the contrast",
    "rewards/accuracies": "share of the pairs whose chosen answer has the higher reward",
    "rewards/margins": "reward of chosen less that of rejected",
    "eval/win_rate": "against the start of the run, a tie counting half",
    "eval/kl_to_reference": "nats a token, from sampled answers",
    "eval/empty": "share of empty answers",
    "eval/mean_length": "tokens",
    "rollout/mean_length": "tokens",
    "rollout/truncated": "share that met max_completion_length",
    "rollout/cut": "share that is longer than max_length with its prompt",
    "rollout/examples": "made of a round",
    "rollout/staleness": "rounds that the sampling weights were behind",
    "rollout/prefix_cached": "share of prompt tokens that were not computed anew",
    "rollout/logprob_gap_mean": "sampler against trainer, nats",
    "rollout/logprob_gap_p99": "sampler against trainer, nats, 99th percentile",
    "judge/abstained": "share of pairs without a preference",
    "judge/flipped": "share of pairs whose two orders name different answers",
    "judge/first_slot": "how often the first slot wins; 0.5 is no bias",
    "judge/mass": "P(A) + P(B) at the decision",
    "judge/negatives": "share of answers that were criticised",
    "judge/noise": "share of judgments that are none to train on",
    "judge/failed": "share that was asked and not answered",
    "judge/too_long": "share of questions that did not fit",
    "judge_quality/accuracy": "on judge_datasets, an abstention counting half",
    "judge_quality/ece": "calibration error of the margin; compare with ece_limit",
    "judge_quality/ece_limit": "what 95 of 100 calibrated judges stay below",
    "judge_quality/length_bias": "prefers the longer answer more often than it is better by",
    "speed/tokens_per_second": "of all ranks",
    "speed/peak_memory_gib": "of one rank",
    "speed/mfu": "share of the device's peak operations",
    "sync/mib": "sent at each sync",
}


# ---------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class RunLog:
    """What a run has left in its folder.

    ``name``: no other of the page has it; ``facts``: of ``run.json`` where the run is done, else of
    ``start.json``; ``recipe``: as it was used; ``lines``: of ``metrics.jsonl``; ``notes``: what is
    missing or could not be read.
    """

    name: str
    folder: Path
    finished: bool
    facts: Mapping[str, Any]
    recipe: Mapping[str, Any]
    lines: Sequence[Mapping[str, Any]]
    notes: tuple[str, ...] = ()

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The recipe by dotted keys."""
        return dict(_flat(self.recipe))

    @property
    def step(self) -> int:
        return max((int(line["step"]) for line in self.lines if "loss" in line), default=0)

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """(steps, values) of a metric, in the order in which they were logged."""
        found = [(int(line["step"]), float(line[name])) for line in self.lines if name in line]
        return [step for step, _ in found], [value for _, value in found]

    def last(self, name: str) -> float | None:
        return next((line[name] for line in reversed(self.lines) if name in line), None)

    def total(self, part: str) -> float:
        """Seconds of a part of the time, over all lines."""
        return sum(value for value in self.series(f"time/{part}")[1] if math.isfinite(value))


def read_run(folder: Path, name: str) -> RunLog:
    """
    Raises:
        ConfigError: nothing there is a run's, or what is cannot be read.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder of a run")
    result, start = (_read_json(folder / file) for file in ("run.json", "start.json"))
    if result is None and start is None and not (folder / METRICS).is_file():
        raise ConfigError(
            f"{folder}: no run: it has none of run.json, start.json and {METRICS}; want the "
            "output_dir of a fastalign train"
        )
    # A run that was started anew in the folder of one that is done.
    again = start is not None and result is not None and start["started"] != result.get("started")
    finished = result is not None and not again
    facts = (result if finished else start) or {}
    recipe = facts.get("recipe")
    if recipe is None:
        path = folder / "recipe.yaml"
        recipe = read_yaml(path, "recipe") if path.is_file() else {}
    lines, broken = _read_lines(folder / METRICS)
    notes = []
    if not facts:
        notes.append("It left no start.json: nothing is known of its environment and its data.")
    if broken:
        notes.append(f"{broken} lines of {METRICS} are damaged and left out.")
    if not lines:
        notes.append(f"{METRICS} holds nothing yet.")
    return RunLog(name, folder, finished, facts, recipe, lines, tuple(notes))


def read_runs(folders: Sequence[Path]) -> list[RunLog]:
    """
    Raises:
        ConfigError: see :func:`read_run`; a folder that comes twice; too many.
    """
    if len(folders) > MOST_RUNS:
        raise ConfigError(f"{len(folders)} runs: a report shows at most {MOST_RUNS}")
    places = [folder.resolve() for folder in folders]
    for i, place in enumerate(places):
        if place in places[:i]:
            raise ConfigError(f"{folders[i]}: the same run is named twice")
    short = [place.name for place in places]
    names = [
        name if short.count(name) == 1 else str(folder)
        for name, folder in zip(short, folders, strict=True)
    ]
    return [read_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: want a JSON object, as fastalign train writes it")
    return found


def _read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The JSON objects of a file, none where there is no file, and how many lines are none; a last
    line that is still being written is not counted."""
    if not path.is_file():
        return [], 0
    found, broken = [], 0
    # Not splitlines: text within JSON may hold other characters that end lines.
    *lines, rest = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for i, line in enumerate([*lines, rest]):
        try:
            row = json.loads(line)
        except ValueError:
            broken += i < len(lines)
            continue
        if isinstance(row, dict):
            found.append(row)
    return found, broken


def _flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves by dotted keys; an empty section is a leaf."""
    children: Iterable[tuple[Any, Any]] = ()
    if isinstance(tree, Mapping):
        children = tree.items()
    elif isinstance(tree, list) and any(isinstance(item, Mapping) for item in tree):
        children = enumerate(tree)
    else:
        yield prefix, tree
        return
    empty = True
    for key, value in children:
        empty = False
        yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    if empty and prefix:
        yield prefix, tree


# ----------------------------------------------------------------------------------- what is shown


@dataclass(frozen=True)
class Row:
    """A row of a table with a column for each run; ``differs``: its cells are not all the same."""

    name: str
    cells: tuple[str, ...]
    differs: bool = False
    meaning: str = ""


@dataclass(frozen=True)
class Curve:
    """One figure: the drawing, and what its script and its table have to know."""

    id: str
    title: str
    meaning: str
    drawing: str
    summary: tuple[tuple[int, list[str]], ...]
    note: str = ""


@dataclass(frozen=True)
class Section:
    id: str
    title: str
    curves: list[Curve] = field(default_factory=list)


def rows_of(tables: Sequence[Mapping[str, Any]], names: Iterable[str] | None = None) -> list[Row]:
    """A row for each name, with what each of the tables has of it."""
    if names is None:
        names = dict.fromkeys(name for table in tables for name in table)
    made = []
    for name in names:
        cells = tuple(_shown(table[name]) if name in table else NOTHING for table in tables)
        made.append(Row(name, cells, len(set(cells)) > 1))
    return made


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


def settings_tables(runs: Sequence[RunLog]) -> dict[str, list[Row]]:
    """All settings in three tables: those that differ between the runs, others that are not the
    defaults, and the rest."""
    standard = _defaults()
    rows = rows_of([{k: v for k, v in r.settings.items() if k != "output_dir"} for r in runs])
    groups: dict[str, list[Row]] = {"differ": [], "set": [], "default": []}
    for row in rows:
        # A recipe that lacks a section has its settings at their defaults.
        values = [run.settings[row.name] for run in runs if row.name in run.settings]
        key = re.sub(r"\.\d+\.", ".0.", row.name)
        usual = key in standard and all(value == standard[key] for value in values)
        groups["default" if usual else "differ" if row.differs else "set"].append(row)
    return groups


def _defaults() -> dict[str, Any]:
    """What a recipe has that says nothing, by dotted keys; of a list of sections, its first."""
    dataset = {"path": ""}
    needed: dict[str, Any] = {"method": "", "model_name_or_path": "", "output_dir": ""}
    sections: dict[str, Any] = {
        "datasets": [dataset],
        "eval_datasets": [dataset],
        "judge_datasets": [dataset],
        "online": {},
        "profile": {},
    }
    server = {"base_url": "", "model": ""}
    judges = {
        key: JudgeConfig(endpoint=EndpointConfig.model_validate(server)).model_dump(mode="json")
        for key in ("judge", "eval_judge")
    }
    bare = Config.model_validate({**needed, "datasets": [dataset]})
    whole = Config.model_validate({**needed, **sections})
    found: dict[str, Any] = {}
    plain = {key: JudgeConfig().model_dump(mode="json") for key in judges}
    trees = [judges, plain, *(c.model_dump(mode="json", by_alias=True) for c in (whole, bare))]
    for tree in trees:
        found |= dict(_flat(tree))
    said = {key for key, _ in _flat(needed | {"judge": {"endpoint": server}})}
    return {key: v for key, v in found.items() if key not in said and not key.endswith("0.path")}


def overview(runs: Sequence[RunLog]) -> list[Row]:
    tables = []
    for run in runs:
        table: dict[str, Any] = {
            "state": status(run),
            "method": _method(run),
            "model": run.recipe.get("model_name_or_path", NOTHING),
        }
        if run.recipe.get("adapter_name_or_path"):
            table["adapter"] = run.recipe["adapter_name_or_path"]
        for name in ("loss", "eval/loss", "eval/win_rate", "eval/kl_to_reference"):
            if (value := run.last(name)) is not None:
                table[f"last {name}"] = number(value)
        speeds = sorted(run.series("speed/tokens_per_second")[1])
        if speeds:
            table["tokens/s, median step"] = f"{speeds[len(speeds) // 2]:,.0f}"
        memory = run.series("speed/peak_memory_gib")[1]
        if memory:
            table["peak memory"] = f"{max(memory):.2f} GiB"
        if (seconds := _took(run)) is not None:
            table["start to end"] = duration(seconds)
        tables.append(table)
    return rows_of(tables)


def _method(run: RunLog) -> str:
    method = str(run.recipe.get("method", NOTHING))
    if not run.recipe.get("online"):
        return method
    judge = run.recipe.get("judge") or {}
    return f"{method}, online" + (f", judge: {judge['type']}" if judge else "")


def status(run: RunLog) -> str:
    """Whether a run is done, in words."""
    planned = run.facts.get("total_steps")
    if run.finished:
        return f"done at step {run.step}"
    where = f"step {run.step}" + (f" of {planned}" if planned else "")
    path = run.folder / METRICS
    if not path.is_file():
        return f"unfinished: {where}"
    last = datetime.datetime.fromtimestamp(path.stat().st_mtime, datetime.UTC)
    return f"unfinished: {where}, last written {last:%Y-%m-%d %H:%M} UTC"


def _took(run: RunLog) -> float | None:
    try:
        ends = [datetime.datetime.fromisoformat(run.facts[key]) for key in ("started", "finished")]
    except KeyError:
        return None
    return (ends[1] - ends[0]).total_seconds()


def duration(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def number(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return NOTHING
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:.2e}"


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


# ------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class DataTable:
    """What became of a run's rows; ``used`` says it of what is trained on, in words."""

    run: int
    sources: tuple[tuple[str, ...], ...]
    dropped: tuple[tuple[str, str, int], ...]
    used: tuple[str, ...]


def data_table(number_: int, run: RunLog) -> DataTable:
    counts = run.facts.get("data_counts")
    if counts is None:
        return DataTable(number_, (), (), ("It was not recorded what became of its rows.",))
    sources, dropped = [], []
    for source in counts["sources"]:
        kind = source["kind"]
        if source["negative"] is not None:
            kind += f", {source['negative']:,} criticised"
        figures = (f"{source[key]:,}" for key in ("rows", "usable", "records"))
        sources.append((source["part"], source["path"], kind, *figures))
        dropped += [(source["path"], reason, n) for reason, n in source["dropped"].items()]
    train, held = counts["train"], counts["eval"]
    used = [f"{train['used']:,} prompts are sampled from."]
    if train["unit"] == "examples":
        used[0] = f"{train['used']:,} examples of {train['tokens']:,} tokens are trained on."
    if train.get("not_selected"):
        used.append(f"{train['not_selected']:,} others are left out by the method's own selection.")
    if "truncated" in train:
        used.append(
            f"Answers cut at max_length = {run.recipe['max_length']}: {train['truncated']:,}."
        )
    dropped += [("when tokenised", reason, n) for reason, n in train["dropped"].items()]
    if held is not None:
        used.append(f"Held out: {held['used']:,}.")
        dropped += [("held out", reason, n) for reason, n in held["dropped"].items()]
    for name, said in (
        ("rollout/truncated", "of the sampled answers met max_completion_length"),
        ("rollout/cut", "are longer with their prompt than max_length"),
    ):
        values = run.series(name)[1]
        if values:
            used.append(f"{percent(sum(values) / len(values))} {said}, mean over rounds.")
    return DataTable(number_, tuple(sources), tuple(dropped), tuple(used))


# ----------------------------------------------------------------------------------------- curves


def metric_names(runs: Sequence[RunLog]) -> list[str]:
    """Of all runs, in the order in which they first come; parts of the time have figures of their
    own."""
    names = dict.fromkeys(name for run in runs for line in run.lines for name in line)
    return [name for name in names if name != "step" and not name.startswith("time/")]


def thinned(steps: Sequence[int], values: Sequence[float]) -> tuple[list[float], list[float], int]:
    """(steps, values, how many make one point): means of neighbours where there are many."""
    each = max(1, math.ceil(len(steps) / MOST_POINTS))
    if each == 1:
        return [float(step) for step in steps], list(values), 1
    chunks = [slice(i, i + each) for i in range(0, len(steps), each)]
    return [_mean(steps[c]) for c in chunks], [_mean(values[c]) for c in chunks], each


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return sum(known) / len(known) if known else math.nan


def make_curves(runs: Sequence[RunLog]) -> tuple[list[Section], list[Section], dict[str, Any]]:
    """(sections of training, sections of the judge, what the page's script reads values from)."""
    from fastalign import report_plots

    sections: dict[str, Section] = {}
    read: dict[str, Any] = {}
    for i, name in enumerate(metric_names(runs)):
        prefix = name.rpartition("/")[0]
        section = sections.setdefault(
            prefix, Section(f"curves-{len(sections)}", TITLES.get(prefix, prefix))
        )
        lines, summary, most, gaps = [], [], 1, 0
        for r, run in enumerate(runs):
            steps, values = run.series(name)
            if not steps:
                continue
            gaps += sum(not math.isfinite(value) for value in values)
            x, y, each = thinned(steps, values)
            most = max(most, each)
            lines.append((r, x, y))
            known = [value for value in values if math.isfinite(value)] or [math.nan]
            ends = (values[0], values[-1], min(known), max(known))
            summary.append((r, [str(len(values)), *map(number, ends)]))
        drawing, box, limits = report_plots.curve(f"curve-{i}", name, lines)
        notes = [f"Each point is a mean over {most} lines of the log."] if most > 1 else []
        if gaps:
            notes.append(f"{gaps} values are no finite numbers and leave gaps.")
        section.curves.append(
            Curve(
                f"curve-{i}",
                name,
                MEANINGS.get(name, ""),
                drawing,
                tuple(summary),
                " ".join(notes),
            )
        )
        read[f"curve-{i}"] = {
            "box": box,
            "limits": limits,
            "lines": [
                {"run": r, "steps": x, "values": [v if math.isfinite(v) else None for v in y]}
                for r, x, y in lines
            ],
        }
    order = [*(prefix for prefix in TITLES if prefix in sections), *sections]
    judge = [section for prefix, section in sections.items() if prefix in JUDGE]
    training = [sections[prefix] for prefix in dict.fromkeys(order) if prefix not in JUDGE]
    return training, judge, read


# ------------------------------------------------------------------------------------------- time


@dataclass(frozen=True)
class TimeTable:
    """Seconds by part and run: (part, its number, seconds and share for each run)."""

    rows: tuple[tuple[str, int, tuple[tuple[str, str], ...]], ...]
    totals: tuple[str, ...]
    drawing: str
    by_step: tuple[tuple[int, str, str], ...]
    notes: tuple[str, ...]


def time_table(runs: Sequence[RunLog]) -> TimeTable | None:
    """Where the time of each run went; None where no run has logged any."""
    from fastalign import report_plots

    logged = {name for run in runs for line in run.lines for name in line}
    parts = [part for part in PARTS if f"time/{part}" in logged]
    known = {*PARTS, "step", OVERLAPPING}
    parts += sorted(
        name.removeprefix("time/")
        for name in logged
        if name.startswith("time/") and name.removeprefix("time/") not in known
    )
    if not parts:
        return None
    seconds = [[run.total(part) for part in parts] for run in runs]
    rows = []
    for p, part in enumerate(parts):
        cells = tuple((duration(own[p]), percent(own[p] / (sum(own) or 1))) for own in seconds)
        rows.append((part.replace("_", " "), p, cells))
    by_step: list[tuple[int, str, str]] = []
    for r, run in enumerate(runs):
        for what, of in (("each step", STEP_PARTS), ("each round", ROUND_PARTS)):
            shown = [(p, run.series(f"time/{part}")) for p, part in enumerate(parts) if part in of]
            shown = [(p, series) for p, series in shown if series[0]]
            if shown and max(len(series[0]) for _, series in shown) > 1:
                drawing = report_plots.stacked_steps(f"time-{r}-{len(by_step)}", shown)
                by_step.append((r, what, drawing))
    notes = []
    for run in runs:
        every = run.recipe.get("logging_steps", 1)
        if every > 1:
            notes.append(f"{run.name}: one step in {every} is logged, and counts here.")
        if ahead := run.total(OVERLAPPING):
            notes.append(
                f"{run.name}: {duration(ahead)} of sampling ahead went on beside the training, "
                "and are not in the sum."
            )
    return TimeTable(
        tuple(rows),
        tuple(duration(sum(own)) for own in seconds),
        report_plots.stacked_totals("time-all", [run.name for run in runs], seconds),
        tuple(by_step),
        tuple(notes),
    )


# ------------------------------------------------------------------------------------------ judge


@dataclass(frozen=True)
class Reliability:
    """How a judge's margins keep what they promise, at one version of it."""

    run: int
    title: str
    drawing: str
    bins: tuple[tuple[str, str, str, str], ...]
    said: str


def judge_rows(runs: Sequence[RunLog]) -> list[Row]:
    """Who judged, and its figures from the first to the last."""
    names = [
        name
        for name in metric_names(runs)
        if name.partition("/")[0] in JUDGE or name.startswith("eval/judge_")
    ]
    tables = []
    for run in runs:
        table: dict[str, Any] = {}
        if run.recipe.get("judge"):
            table["judge"] = _who(run.recipe["judge"])
        if run.recipe.get("eval_judge"):
            table["judge of evaluation"] = _who(run.recipe["eval_judge"])
        for name in names:
            _, values = run.series(name)
            if values:
                first, last = number(values[0]), number(values[-1])
                table[name] = first if len(values) == 1 else f"{first} → {last}"
        tables.append(table)
    rows = rows_of(tables)
    return [Row(r.name, r.cells, False, MEANINGS.get(r.name, "")) for r in rows]


def _who(judge: Mapping[str, Any]) -> str:
    detail = {
        "rule": judge.get("path"),
        "self": judge.get("model"),
        "model": judge.get("model_name_or_path"),
        "endpoint": (judge.get("endpoint") or {}).get("model"),
    }.get(str(judge["type"]))
    return f"{judge['type']}: {detail}" if detail else str(judge["type"])


def reliabilities(runs: Sequence[RunLog]) -> list[Reliability]:
    """Of the judge that the run measured, the first and the last time, and of ``fastalign eval
    --pairs --out`` within its folder."""
    from fastalign import report_plots

    found: list[Reliability] = []
    for r, run in enumerate(runs):
        measured = sorted((run.folder / "judge-quality").glob("*.json"), key=lambda p: int(p.stem))
        named = [(p, f"judge of the weights of step {p.stem}") for p in measured]
        named = named[:1] + named[1:][-1:]
        reports = sorted(
            [*run.folder.glob("judge-report.json"), *run.folder.glob("*/judge-report.json")]
        )
        named += [(p, str(p.relative_to(run.folder))) for p in reports]
        for path, title in named:
            facts = _read_json(path) or {}
            calibration = facts.get("calibration") or facts.get("quality", {}).get("calibration")
            if not calibration or not calibration["bins"]:
                continue
            bins = tuple(
                (
                    f"{b['low']:.2f} to {b['high']:.2f}",
                    f"{b['pairs']:,}",
                    f"{b['confidence']:.3f}",
                    f"{b['accuracy']:.3f} ({b['accuracy_low']:.3f} to {b['accuracy_high']:.3f})",
                )
                for b in calibration["bins"]
            )
            said = (
                f"Calibration error {number(calibration['ece'])}; 95 of 100 calibrated judges stay "
                f"below {number(calibration['ece_limit'])} on as many pairs."
            )
            drawing = report_plots.reliability(f"reliability-{len(found)}", r, calibration["bins"])
            found.append(Reliability(r, title, drawing, bins, said))
    return found


# ---------------------------------------------------------------------------------------- samples


@dataclass(frozen=True)
class Piece:
    """Text of an answer, or one of its tokens: ``level`` is how strongly a judgment moves it."""

    text: str
    flagged: bool = False
    level: str = ""


@dataclass(frozen=True)
class Answer:
    """``marks``: what was said of it in a word or two; ``judgment``: in writing."""

    pieces: tuple[Piece, ...]
    marks: tuple[str, ...] = ()
    judgment: str | None = None


@dataclass(frozen=True)
class Shown:
    """Answers to one prompt at one time; ``said``: what a judge made of them together."""

    when: str
    prompt: str
    answers: tuple[Answer, ...]
    said: str = ""


@dataclass(frozen=True)
class Samples:
    """Pairs of before and after, either of which may be missing; ``same``: to the same prompts."""

    run: int
    title: str
    pairs: tuple[tuple[Shown | None, Shown | None], ...]
    same: bool
    flagged: bool = False
    note: str = ""


Flags = Mapping[tuple[str, tuple[int, ...]], tuple[Piece, ...]]
LEVELS = (0.1, 0.5, 1.0, 2.0)


def samples_of(number_: int, run: RunLog) -> list[Samples]:
    """Answers to the held-out prompts at the start and at the end, and of the first and the last
    round; what CUT flags in them where `fastalign inspect` has written it."""
    flags, inspected = read_flags(run)
    made = []
    evaluations = _numbered(run.folder / SAMPLES, "samples-")
    if evaluations:
        made.append(
            _before_and_after(number_, "Held-out prompts", evaluations, "step {}", flags, run)
        )
    rounds = _numbered(run.folder / EPISODES, "")
    if rounds:
        rounds = {n + 1: path for n, path in rounds.items()}
        made.append(_before_and_after(number_, "Rollouts", rounds, "round {}", flags, run))
    if inspected and not any(sample.flagged for sample in made):
        pairs = tuple((shown, None) for shown in inspected[:MOST_FLAGGED])
        made.append(Samples(number_, "What CUT flags", pairs, True, True))
    return made


def _numbered(folder: Path, prefix: str) -> dict[int, Path]:
    """JSONL files by the number in their name, in its order."""
    found = {}
    for path in folder.glob(f"{prefix}*.jsonl"):
        rest = path.stem.removeprefix(prefix)
        if rest.isdecimal():
            found[int(rest)] = path
    return dict(sorted(found.items()))


def _before_and_after(
    number_: int, title: str, files: Mapping[int, Path], when: str, flags: Flags, run: RunLog
) -> Samples:
    first, last = min(files), max(files)
    before = _shown_episodes(files[first], when.format(first), flags)
    after = [] if first == last else _shown_episodes(files[last], when.format(last), flags)
    later = {shown.prompt: shown for shown in after}
    common = [(shown, later[shown.prompt]) for shown in before if shown.prompt in later]
    pairs: list[tuple[Shown | None, Shown | None]] = list(common)
    if not common:
        width = max(len(before), len(after))
        pairs = list(zip(_padded(before, width), _padded(after, width), strict=True))
    pairs = pairs[:MOST_SAMPLES]
    flagged = any(
        len(answer.pieces) > 1 for pair in pairs for s in pair if s for answer in s.answers
    )
    note = ""
    if not after:
        note = "There is one such file: nothing to compare with yet."
    elif not common:
        note = "The rounds have different prompts: left and right are not answers to the same."
    return Samples(number_, title, tuple(pairs), bool(common) or not after, flagged, note)


def _padded(shown: Sequence[Shown], width: int) -> list[Shown | None]:
    return [*shown, *[None] * (width - len(shown))]


def _shown_episodes(path: Path, when: str, flags: Flags) -> list[Shown]:
    rows, _ = _read_lines(path)
    rows = [row for row in rows if "completions" in row]
    # What was criticised has more to show.
    rows.sort(key=lambda row: not any(row.get("judgments") or ()))
    return [_shown_episode(row, when, flags) for row in rows]


def _shown_episode(row: Mapping[str, Any], when: str, flags: Flags) -> Shown:
    prompt = _prompt_text(row["prompt"])
    texts = row["completions"]
    judgments = row.get("judgments") or [None] * len(texts)
    noise = row.get("noise") or [None] * len(texts)
    chosen = {pair[0] for pair in row.get("pairs", ())}
    rejected = {pair[1] for pair in row.get("pairs", ())}
    answers = []
    for i, text in enumerate(texts):
        marks = []
        if "judgments" in row and judgments[i] is None and noise[i] is None:
            marks.append("fine")
        for name, where in (
            ("chosen", chosen),
            ("rejected", rejected),
            ("kept", row.get("kept", ())),
        ):
            if i in where:
                marks.append(name)
        if row.get("finish_reasons", [None] * len(texts))[i] == "length":
            marks.append("cut at the length limit")
        if noise[i] is not None:
            marks.append(f"not trained on: {noise[i]}")
        ids = row["token_ids"][i] if "token_ids" in row else ()
        pieces = flags.get((prompt, tuple(ids)), (Piece(text),))
        answers.append(Answer(pieces, tuple(marks), judgments[i]))
    verdicts = row.get("verdicts", ())
    said = ""
    if verdicts:
        abstained = sum(v["preferred"] is None for v in verdicts)
        flipped = sum(bool(v.get("flipped")) for v in verdicts)
        said = f"{len(verdicts)} comparisons: {abstained} abstained, {flipped} flipped"
        if len(verdicts) == 1:
            seen = verdicts[0]
            said = f"scores {seen['score_a']:.3f} and {seen['score_b']:.3f}"
            said += ", abstained" if seen["preferred"] is None else ""
            said += ", the two orders disagree" if seen.get("flipped") else ""
    return Shown(when, prompt, tuple(answers), said)


def _prompt_text(messages: Sequence[Mapping[str, Any]]) -> str:
    if len(messages) == 1:
        return str(messages[0].get("content", ""))
    return "\n\n".join(f"{m.get('role')}: {m.get('content')}" for m in messages)


def read_flags(run: RunLog) -> tuple[Flags, list[Shown]]:
    """What `fastalign inspect` has left in the run's folder: the tokens of each answer, by prompt
    and ids, and the criticised records by themselves."""
    tokens: dict[tuple[str, tuple[int, ...]], tuple[Piece, ...]] = {}
    shown = []
    for path in sorted((run.folder / "inspect").rglob("inspect.jsonl")):
        for row in _read_lines(path)[0]:
            pieces = tuple(
                Piece(t["text"], bool(t["flagged"]), _level(t["log_q"], t["log_c"]))
                for t in row["tokens"]
            )
            prompt = _prompt_text(row["prompt"])
            tokens[prompt, tuple(t["id"] for t in row["tokens"])] = pieces
            count = sum(piece.flagged for piece in pieces)
            answer = Answer(pieces, (f"{count} of {len(pieces)} tokens",), row["judgment"])
            if row["judgment"] is not None:
                shown.append(Shown(str(path.parent.relative_to(run.folder)), prompt, (answer,)))
    return tokens, shown


def _level(log_q: float, log_c: float | None) -> str:
    if log_c is None:
        return ""
    contrast = log_c - log_q
    steps = sum(abs(contrast) >= step for step in LEVELS)
    return f"{'u' if contrast > 0 else 'd'}{steps}" if steps else ""


def flag_hint(run: RunLog) -> str | None:
    """How to have the flags of an online CUT run written, where nobody has."""
    rounds = _numbered(run.folder / EPISODES, "")
    if run.recipe.get("method") != "cut" or not rounds or (run.folder / "inspect").is_dir():
        return None
    logs = [rounds[n] for n in sorted({min(rounds), max(rounds)})]
    return "\n".join(
        shlex.join(
            [
                "fastalign", "inspect", str(run.folder / "recipe.yaml"),
                f"datasets.0.path={path}", "--out", str(run.folder / "inspect" / path.stem),
            ]
        )
        for path in logs
    )  # fmt: skip


# -------------------------------------------------------------------------- environment and repeat


def environment(runs: Sequence[RunLog]) -> list[Row]:
    tables = []
    for run in runs:
        facts = run.facts
        table: dict[str, Any] = {}
        for key in (*WHEN, "fastalign", "commit", "python"):
            if facts.get(key) is not None:
                table[key] = facts[key]
        table |= facts.get("libraries", {})
        table |= {f"hardware: {key}": value for key, value in facts.get("hardware", {}).items()}
        for name, choice in facts.get("chosen", {}).items():
            if isinstance(choice, Mapping):
                table[name] = choice["value"] + (f" ({choice['why']})" if choice["why"] else "")
        for key, value in facts.get("declared_licenses", {}).items():
            table[f"licence: {key}"] = value
        tables.append(table)
    # When they ran is another for each.
    return [replace(r, differs=r.differs and r.name not in WHEN) for r in rows_of(tables)]


@dataclass(frozen=True)
class Repeat:
    run: int
    commands: str
    notes: tuple[str, ...]
    recipe: str
    hashes: tuple[tuple[str, str], ...]


def repeat(number_: int, run: RunLog) -> Repeat:
    facts, notes = run.facts, []
    commands = []
    commit = facts.get("commit")
    if commit:
        commands.append(f"git checkout {commit.removesuffix('-dirty')}")
    if commit and commit.endswith("-dirty"):
        notes.append("The checkout had changes that no commit holds.")
    libraries = facts.get("libraries", {})
    if libraries:
        versions = [f"{name}=={version}" for name, version in libraries.items()]
        commands.append(shlex.join(["pip", "install", *versions]))
    command = ["fastalign", "train", str(run.folder / "recipe.yaml")]
    command.append(f"output_dir={run.folder}-again")
    if "hardware" in facts:
        command.append(f"nproc_per_node={facts['hardware']['processes']}")
    commands.append(shlex.join(command))
    if "seed" in run.recipe:
        notes.append(f"The seed is {run.recipe['seed']}, as the recipe has it.")
    hashes = [(path, digest) for path, digest in facts.get("data", {}).items()]
    for key in ("model_hash", "adapter_hash", "judge_hash"):
        hashes.append((key.removesuffix("_hash"), facts.get(key)))
    shown = tuple((name, digest) for name, digest in hashes if digest)
    recipe = yaml.safe_dump(dict(run.recipe), sort_keys=False, allow_unicode=True)
    return Repeat(number_, "\n".join(commands), tuple(notes), recipe, shown)


# ------------------------------------------------------------------------------------------- page


def make_page(runs: Sequence[RunLog]) -> str:
    """The page: one HTML file that loads nothing and runs no script but its own.

    Whatever comes from the runs is strangers' text: the template escapes all of it, and figures
    hold none.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "fastalign report draws with matplotlib, which is not installed: "
            "pip install 'fastalign[report]'"
        )
    training, judge, read = make_curves(runs)
    values = {"runs": [run.name for run in runs], "curves": read}
    environment_ = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment_.from_string(read_template("report.html"))
    return template.render(
        runs=runs,
        status=status,
        made=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        overview=overview(runs),
        settings=settings_tables(runs),
        data=[data_table(r, run) for r, run in enumerate(runs)],
        training=training,
        time=time_table(runs),
        judge=judge,
        judge_rows=judge_rows(runs),
        reliabilities=reliabilities(runs),
        samples=[sample for r, run in enumerate(runs) for sample in samples_of(r, run)],
        hints=[(r, hint) for r, run in enumerate(runs) if (hint := flag_hint(run)) is not None],
        environment=environment(runs),
        repeats=[repeat(r, run) for r, run in enumerate(runs)],
        values=Markup(embedded_json(values)),
    )


def write(runs: Sequence[RunLog], path: Path) -> None:
    """
    Raises:
        ConfigError: the page cannot be written, or not be drawn.
    """
    # Sampled text may hold halves of characters, which no encoding has.
    page = make_page(runs).encode("utf-8", "replace")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(page)
    except OSError as error:
        raise ConfigError(f"--output = {str(path)!r}: {error.strerror or error}") from None
