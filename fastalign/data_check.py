"""``fastalign data check``: what files hold, and what training would make of them.

Rows are read by the trainer's own loader.  With a tokenizer they also go through its renderers and
methods, so that lengths, truncations and the rendered rows are those of training.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastalign.config import Config, ConfigError, DatasetConfig, parse_config
from fastalign.data import (
    NOISE,
    Comparison,
    Drops,
    Kind,
    Record,
    RowError,
    SourceReport,
    load_records,
)
from fastalign.printing import printable

if TYPE_CHECKING:
    from fastalign.templates import Renderer

SHOWN_ROWS = 3
# Characters of one part of a rendered row that people are shown; --json has them all.
SHOWN_CHARACTERS = 1200
OVERALL = "overall"
QUANTILES = {"min": 0.0, "median": 0.5, "90 %": 0.9, "99 %": 0.99, "max": 1.0}
METHODS: dict[Kind, str] = {
    "judged": "cut", "completion": "sft", "messages": "sft", "preference": "dpo", "prompt": "cut",
}  # fmt: skip
"""Which method's tokens are shown for a kind of row; ``jsft`` where pairs bring comparisons."""


@dataclass(frozen=True)
class Settings:
    """What the command line asks for; ``recipe`` has the last word on how rows are used."""

    model: str | None = None
    template: str | None = None
    max_length: int | None = None
    kind: Kind | None = None
    recipe: Config | None = None


@dataclass(frozen=True)
class Part:
    """A stretch of a stream, all trained on or all not."""

    text: str
    trained: bool


@dataclass(frozen=True)
class Shown:
    """One stream of a row, as it is rendered."""

    source: str
    stream: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Tally:
    """How often something was met, and where first."""

    count: int
    first: str


@dataclass(frozen=True)
class Compared:
    """Comparisons by one principle, or overall: how many, how many of them prefer the rejected
    answer, how many have rationales."""

    count: int
    rejected: int
    rationales: int


@dataclass(frozen=True)
class FileReport:
    """What became of one file.

    Attributes:
        usable: rows that training would use.
        positive, negative: of those, without and with a judgment (kind ``judged``).
        dropped, noise, cut: counts by reason; ``cut`` are rows that lose the end of an answer to
            ``max_length``, and is empty where no tokens are known.
        duplicates: rows with the prompt and answers of an earlier one, of this file or another.
        comparisons: by principle, "overall" without one; None where no row speaks of any.
        unit: of ``lengths``, "tokens" or "words".
        lengths: part of a row -> its quantiles, see QUANTILES.
        rendered: the streams of a few rows, one of each kind; without a tokenizer, their texts.
    """

    path: str
    kind: Kind
    rows: int
    usable: int
    positive: int | None
    negative: int | None
    dropped: dict[str, Tally]
    noise: dict[str, Tally]
    cut: dict[str, Tally]
    duplicates: Tally | None
    comparisons: dict[str, Compared] | None
    unit: str
    max_length: int | None
    lengths: dict[str, dict[str, float]]
    rendered: tuple[Shown, ...]


def check_files(files: Sequence[str], settings: Settings, *, as_json: bool) -> bool:
    """Report on each file to standard output; whether all of them can be trained on.

    Args:
        files: none where there is a recipe, whose data sets are looked at.

    Raises:
        ConfigError: settings that cannot be used with any file.
    """
    settings, datasets = _settled(files, settings)
    seen: dict[Any, str] = {}
    results: list[FileReport | ConfigError] = []
    for dataset in datasets:
        try:
            report = _check(dataset, settings, seen)
        except ConfigError as error:
            results.append(error)
            print(f"fastalign: {error}", file=sys.stderr, flush=True)
            continue
        results.append(report)
        if not as_json:
            _print(report)
    if as_json:
        trees = [
            {"path": dataset.path, "error": str(result)}
            if isinstance(result, ConfigError)
            else dataclasses.asdict(result)
            for dataset, result in zip(datasets, results, strict=True)
        ]
        print(json.dumps(trees, ensure_ascii=False, indent=1))
    return not any(isinstance(result, ConfigError) for result in results)


def _settled(files: Sequence[str], settings: Settings) -> tuple[Settings, list[DatasetConfig]]:
    """What goes together, and the data sets it is about."""
    recipe = settings.recipe
    if recipe is None:
        if not files:
            raise ConfigError("FILE is missing: name files, or a recipe with --recipe")
        for option, value in (("template", settings.template), ("max-length", settings.max_length)):
            if value is not None and settings.model is None:
                raise ConfigError(f"--{option} = {value}: it needs --model, whose tokenizer counts")
        return settings, [DatasetConfig(path=path, template=settings.template) for path in files]
    said = {"FILE": files, "--template": settings.template, "--as": settings.kind}
    twice = [name for name, given in said.items() if given]
    if twice:
        raise ConfigError(f"{twice[0]} is given beside --recipe, which says it: leave one of them")
    changed = {"model_name_or_path": settings.model, "max_length": settings.max_length}
    recipe = recipe.model_copy(update={k: v for k, v in changed.items() if v})
    # All rows, each once.
    whole = {"weight": 1.0, "max_samples": None}
    datasets = [d.model_copy(update=whole) for d in (*recipe.datasets, *recipe.eval_datasets)]
    settled = Settings(recipe.model_name_or_path, max_length=recipe.max_length, recipe=recipe)
    return settled, datasets


def check_file(path: str, settings: Settings, seen: dict[Any, str] | None = None) -> FileReport:
    """What a file holds.  ``seen`` has the rows of earlier files, by prompt and answers.

    Raises:
        ConfigError: the file cannot be read, or nothing of it can be trained on.
    """
    return _check(
        DatasetConfig(path=path, template=settings.template), settings, {} if seen is None else seen
    )


def _check(dataset: DatasetConfig, settings: Settings, seen: dict[Any, str]) -> FileReport:
    path = dataset.path
    records, report = load_records([dataset], strict=False, seed=0, want=_wanted(settings))
    (source,) = report.sources
    drops = Drops()
    duplicates = _duplicates(records, seen)
    if settings.model is None:
        lengths = [_words(record) for record in records]
        cut, max_length = Drops(), None
        usable = records
        rendered = [shown for record in _choose(records) for shown in _as_read(record)]
    else:
        compared = any(record.comparisons is not None for record in records)
        method = "jsft" if compared else METHODS[source.kind]
        tokens = Tokens(_config(dataset, method, settings))
        usable, lengths, cut = tokens.measure(records, drops)
        if not usable:
            raise ConfigError(
                f"{path}: none of {source.rows} rows can be trained on: " + "; ".join(drops.lines())
            )
        max_length = tokens.config.max_length
        rendered = [shown for record in _choose(usable) for shown in tokens.render(record)]
    return FileReport(
        path=path,
        kind=source.kind,
        rows=source.rows,
        usable=len(usable),
        positive=_count(source, usable, negative=False),
        negative=_count(source, usable, negative=True),
        dropped={r: t for r, t in _tallies(source.drops, drops).items() if r not in NOISE},
        noise={r: t for r, t in _tallies(source.drops).items() if r in NOISE},
        cut=_tallies(cut),
        duplicates=duplicates,
        comparisons=_comparisons(usable),
        unit="words" if settings.model is None else "tokens",
        max_length=max_length,
        lengths=_quantiles(lengths),
        rendered=tuple(rendered),
    )


def _count(source: SourceReport, records: Sequence[Record], *, negative: bool) -> int | None:
    if source.kind != "judged":
        return None
    return sum(record.is_negative == negative for record in records)


def _comparisons(records: Sequence[Record]) -> dict[str, Compared] | None:
    if all(record.comparisons is None for record in records):
        return None
    found: dict[str, list[Comparison]] = {}
    for record in records:
        for comparison in record.comparisons or ():
            found.setdefault(comparison.principle or OVERALL, []).append(comparison)
    return {
        principle: Compared(
            count=len(comparisons),
            rejected=sum(c.preferred == "rejected" for c in comparisons),
            rationales=sum(c.rationales is not None for c in comparisons),
        )
        for principle, comparisons in found.items()
    }


def _tallies(*drops: Drops) -> dict[str, Tally]:
    found = {
        reason: Tally(count, part.first[reason])
        for part in drops
        for reason, count in part.counts.items()
    }
    return dict(sorted(found.items(), key=lambda item: -item[1].count))


def _choose(records: Sequence[Record]) -> list[Record]:
    """A few rows in file order, a criticised and a fine one among them if there are both."""
    firsts = {record.is_negative: i for i, record in reversed(list(enumerate(records)))}
    chosen = dict.fromkeys([*firsts.values(), *range(min(len(records), SHOWN_ROWS))])
    return [records[i] for i in sorted(itertools.islice(chosen, SHOWN_ROWS))]


def _duplicates(records: Sequence[Record], seen: dict[Any, str]) -> Tally | None:
    count, first = 0, ""
    for record in records:
        texts = [record.prompt, record.completion, record.chosen, record.rejected, record.messages]
        key = json.dumps(texts, sort_keys=True, default=str)
        if key in seen:
            count += 1
            first = first or f"{record.source}, as {seen[key]}"
        else:
            seen[key] = record.source
    return Tally(count, first) if count else None


def _quantiles(lengths: Iterable[dict[str, int]]) -> dict[str, dict[str, float]]:
    columns: dict[str, list[int]] = {}
    for row in lengths:
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
    return {
        name: {label: float(np.quantile(values, q)) for label, q in QUANTILES.items()}
        for name, values in columns.items()
    }


# --- without a tokenizer -----------------------------------------------------------------------


def _texts(record: Record) -> Iterator[tuple[str, str, bool]]:
    """(name, text, whether it is trained on) of a record's parts."""
    for name in ("prompt", "messages"):
        for message in getattr(record, name):
            answers = name == "messages" and message["role"] == "assistant"
            yield name, message["content"], answers and message.get("loss") is not False
    for name in ("completion", "chosen", "rejected"):
        if getattr(record, name) is not None:
            yield name, getattr(record, name), True
    if record.judgment is not None:
        yield "judgment", record.judgment, False


def _words(record: Record) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name, text, _ in _texts(record):
        counts[name] = counts.get(name, 0) + len(text.split())
    for comparison in record.comparisons or ():
        for text in comparison.rationales or ():
            counts["rationales"] = counts.get("rationales", 0) + len(text.split())
    return counts


def _as_read(record: Record) -> Iterator[Shown]:
    turns = [f"{m['role']}: " for m in (*record.prompt, *record.messages)]
    roles = iter(turns if len(turns) > 1 else [""])
    for name, group in itertools.groupby(_texts(record), key=lambda part: part[0]):
        parts: list[Part] = []
        for _, text, trained in group:
            if name in ("prompt", "messages"):
                parts.append(Part(("\n\n" if parts else "") + next(roles), False))
            parts.append(Part(text, trained))
        yield Shown(record.source, name, tuple(part for part in parts if part.text))
    for comparison in record.comparisons or ():
        name = f"{comparison.principle or OVERALL}: {comparison.preferred} is better"
        parts = []
        if comparison.rationales is not None:
            chosen, rejected = comparison.rationales
            parts = [Part("chosen: ", False), Part(chosen, True)]
            parts += [Part("\n\nrejected: ", False), Part(rejected, True)]
        yield Shown(record.source, name, tuple(parts))


# --- with a tokenizer --------------------------------------------------------------------------

# (name, ids [L], which of them are trained on [L])
_Streams = list[tuple[str, np.ndarray, np.ndarray]]


def _wanted(settings: Settings) -> Kind | tuple[Kind, ...] | None:
    """The kind that rows are read as; of a recipe the one that its method wants."""
    if settings.recipe is None:
        return settings.kind
    from fastalign.methods import make_method

    method = make_method(settings.recipe)
    return method.wants if settings.recipe.online is None else method.online_wants


def _config(dataset: DatasetConfig, method: str, settings: Settings) -> Config:
    if settings.recipe is not None:
        only = {"datasets": (dataset,), "eval_datasets": (), "judge_datasets": ()}
        return settings.recipe.model_copy(update=only)
    tree: dict[str, Any] = {
        "method": method,
        "model_name_or_path": settings.model,
        "datasets": [dataset.model_dump()],
        "output_dir": "",
    }
    if settings.max_length is not None:
        tree["max_length"] = settings.max_length
    return parse_config(tree, "data check")


class Tokens:
    """The trainer's own way from a record to streams, with and without its limit of length."""

    UNLIMITED = 2**31

    def __init__(self, config: Config) -> None:
        from fastalign.methods import make_method
        from fastalign.model import load_tokenizer
        from fastalign.prepare import make_renderers

        self.config = config
        self.limited = make_method(config)
        self.whole = make_method(config.model_copy(update={"max_length": self.UNLIMITED}))
        self.renderer: Renderer = make_renderers(config, load_tokenizer(config), None)[0]

    def measure(
        self, records: Sequence[Record], drops: Drops
    ) -> tuple[list[Record], list[dict[str, int]], Drops]:
        """(records that can be trained on, lengths of each before any cut, what was cut)."""
        from fastalign.methods.base import Dropped

        usable: list[Record] = []
        lengths: list[dict[str, int]] = []
        cut = Drops()
        for record in records:
            try:
                whole = self.streams(record, self.whole)
                lengths.append(self._lengths(record, whole))
                if max(len(ids) for _, ids, _ in whole) >= self.config.max_length:
                    limited = self.streams(record, self.limited)
                    if any(len(a[1]) > len(b[1]) for a, b in zip(whole, limited, strict=True)):
                        cut.add("max_length: the end of an answer is cut", record.source)
                usable.append(record)
            except RowError as error:
                drops.add(error.reason, str(error))
            except Dropped as reason:
                drops.add(str(reason), record.source)
        return usable, lengths, cut

    def streams(self, record: Record, method: Any) -> _Streams:
        from fastalign.methods.base import Dropped
        from fastalign.templates import NO_ROOM

        if record.kind == "prompt" or method.config.online is not None:
            ids = method.rollout_prompt(record, self.renderer)
            if len(ids) >= method.config.max_length:
                raise Dropped(NO_ROOM)
            return [("prompt", ids, np.zeros(len(ids), np.bool_))]
        examples = method.from_record(record, self.renderer)
        return [(s.role, s.input_ids, s.loss_mask) for e in examples for s in e.streams]

    def render(self, record: Record) -> Iterator[Shown]:
        # Reversed, so that the first of a name is what is left.
        streams = {stream[0]: stream for stream in reversed(self.streams(record, self.limited))}
        for name, ids, trained in reversed(streams.values()):
            texts = self.renderer.token_texts(ids)
            runs = itertools.groupby(zip(trained.tolist(), texts, strict=True), lambda x: x[0])
            parts = tuple(Part("".join(t for _, t in run), is_trained) for is_trained, run in runs)
            yield Shown(record.source, name, parts)

    def _lengths(self, record: Record, streams: _Streams) -> dict[str, int]:
        if record.kind == "messages":
            return {
                "messages": max(len(ids) for _, ids, _ in streams),
                "trained on": max(int(trained.sum()) for _, _, trained in streams),
            }
        found: dict[str, int] = {}
        for name, ids, trained in streams:
            prompt = {"judged": "judged prompt", "judgment": "judge prompt"}.get(name, "prompt")
            answer = name if name in ("chosen", "rejected", "judgment") else "completion"
            # The longest, where a row makes several of a name.
            found[prompt] = max(len(ids) - int(trained.sum()), found.get(prompt, 0))
            if trained.any():
                found[answer] = max(int(trained.sum()), found.get(answer, 0))
        if record.judgment is not None:
            tokens = self.renderer.tokenizer(record.judgment, add_special_tokens=False)
            found["judgment"] = len(tokens["input_ids"])
        # What max_length has to hold.
        found["together"] = max(len(ids) for _, ids, _ in streams)
        return found


# --- for people --------------------------------------------------------------------------------


def _print(report: FileReport) -> None:
    console = Console(highlight=False, soft_wrap=True)

    def say(text: str, style: str = "") -> None:
        console.print(Text(printable(text), style=style))

    kinds: str = report.kind
    if report.negative is not None:
        kinds += f": {report.positive} fine, {report.negative} with a judgment"
    say(f"{report.path}: {report.rows} rows, {report.usable} usable ({kinds})", "bold")
    for label, tallies in (("dropped", report.dropped), ("noise", report.noise)):
        for reason, tally in tallies.items():
            say(f"  {label} {tally.count} x {reason} (first: {tally.first})")
    if report.kind == "judged" and not report.noise:
        say("  no noise among the judgments")
    if report.duplicates is None:
        say("  no duplicates")
    else:
        say(
            f"  {report.duplicates.count} x the same prompt and answer again "
            f"(first: {report.duplicates.first})"
        )
    for principle, compared in (report.comparisons or {}).items():
        say(
            f"  comparisons, {principle}: {compared.count} ({compared.rejected} for the rejected "
            f"answer, {compared.rationales} with rationales)"
        )
    if report.comparisons == {}:
        say("  no comparisons")
    if report.max_length is None:
        say("  lengths in words; --model counts tokens, truncations and renders the rows")
    else:
        say(f"  lengths in tokens, at most {report.max_length} of prompt and answer together")
        for reason, tally in report.cut.items():
            say(f"  {tally.count} x {reason} (first: {tally.first})")
        if not report.cut:
            say("  no answer is cut")
    table = Table(box=None, pad_edge=False, padding=(0, 2))
    table.add_column(report.unit)
    for label in QUANTILES:
        table.add_column(label, justify="right")
    for name, values in report.lengths.items():
        table.add_row(name, *(f"{value:,.0f}" for value in values.values()))
    console.print(table)
    for shown in report.rendered:
        console.print()
        say(f"{shown.source}, {shown.stream}", "bold")
        console.print(_marked(shown.parts, colour=console.is_terminal))
    console.print()


def _marked(parts: Iterable[Part], *, colour: bool) -> Text:
    """The parts in one text, what is trained on being marked."""
    text = Text()
    for part in parts:
        shown = printable(_shortened(part.text))
        if not part.trained:
            text.append(shown)
        elif colour:
            text.append(shown, style="black on green")
        else:
            text.append(f"[{shown}]")
    return text


def _shortened(text: str) -> str:
    if len(text) <= SHOWN_CHARACTERS:
        return text
    half = SHOWN_CHARACTERS // 2
    return f"{text[:half]} ... {len(text) - 2 * half} characters ... {text[-half:]}"
