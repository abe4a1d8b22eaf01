"""Rows of files become records; records become examples of token streams.

Every loader ends in the same frozen :class:`Record`, whatever the columns were called, so that
nothing behind this module knows a file format.  A method turns records into :class:`Example`
objects (with :mod:`fastalign.templates`), and those are all that batching sees.

Columns that are understood, each a string or a list of ``{"role": ..., "content": ...}`` messages
where that makes sense:

=============  ==================================================================================
kind           columns
=============  ==================================================================================
``prompt``     ``prompt``
``completion`` ``prompt``, ``completion``
``judged``     ``prompt``, ``completion``, ``judgment`` (null or "" means fine), ``score`` optional
``preference`` ``prompt``, ``chosen``, ``rejected``; or ``chosen``, ``rejected`` as whole dialogues;
               ``comparisons`` optional: a list of ``{"preferred": "chosen" or "rejected"}``, with
               ``principle``, ``rationale_chosen`` and ``rationale_rejected`` where they are known
``messages``   ``messages``, with ``"loss": false`` on assistant turns that are not trained on
=============  ==================================================================================

``instruction``, ``input``, ``output`` (Alpaca) stand for ``prompt`` and ``completion``; ``system``,
``tools`` and ``weight`` are optional everywhere.  ``prompt_ids`` and ``token_ids`` beside a
completion are the tokens it was sampled as.

A row of an online run's episode log (``prompt``, ``completions``, ``token_ids``, ...) is read as
one row for each of its completions.  A row of UltraFeedback as it is published (``instruction``,
``completions`` with ``annotations``) is read as one preference with a comparison by principle.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fastalign.config import ConfigError, DatasetConfig
from fastalign.printing import one_line, short

Kind = Literal["prompt", "completion", "judged", "preference", "messages"]
Message = dict[str, Any]

COLUMNS = (
    "prompt", "completion", "judgment", "score", "chosen", "rejected", "messages",
    "instruction", "input", "output", "system", "tools", "weight", "prompt_ids", "token_ids",
    "chosen_ids", "rejected_ids", "comparisons",
)  # fmt: skip
ROLES = ("system", "developer", "user", "assistant", "tool")
# Objects and lists inside each other in a row.
DEEPEST = 64
FINE_SCORE = 7.0
"""A ``score`` of at least this makes a judged record positive, whatever its judgment (CUT)."""

# What a file must have to be read as a kind; the order is the preference when nobody asks.
_NEEDS: dict[Kind, tuple[str, ...]] = {
    "preference": ("chosen", "rejected"),
    "judged": ("prompt", "completion", "judgment"),
    "completion": ("prompt", "completion"),
    "messages": ("messages",),
    "prompt": ("prompt",),
}
# What each kind can be made from when the file does not have it as such, nearest first.
_MADE_FROM: dict[Kind, tuple[Kind, ...]] = {
    "prompt": ("messages", "preference"),
    "completion": ("preference", "messages"),
    "messages": ("judged", "completion", "preference"),
    "judged": (),
    "preference": (),
}


class RowError(ConfigError):
    """One row that cannot be used.  ``reason`` is what is counted when the row is dropped."""

    def __init__(self, message: str, reason: str = "malformed row") -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Sampled:
    """The token ids of a prompt, as a sampler was given them, and of what it answered."""

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Comparison:
    """Which answer of a pair is the better one, by what, and why.

    ``principle`` is None where the answers were compared overall; ``rationales`` are those of the
    chosen and of the rejected answer.
    """

    preferred: Literal["chosen", "rejected"]
    principle: str | None = None
    rationales: tuple[str, str] | None = None


@dataclass(frozen=True)
class Record:
    """One row of any kind, canonical after every loader.

    ``prompt`` holds the messages before the answer (empty for kind ``messages``); ``judgment`` is
    None when the completion is fine.  ``sampled`` holds the recorded tokens of the completion, or
    of a pair's chosen answer beside ``sampled_rejected``; they are its only where the tokenizer
    still writes it so.  ``comparisons`` of a pair are None where its
    row says nothing of them, and empty where it says that there are none.  ``dataset`` is the index
    of the record's DatasetConfig, whose template options render it.
    """

    kind: Kind
    prompt: tuple[Message, ...] = ()
    completion: str | None = None
    judgment: str | None = None
    sampled: Sampled | None = None
    sampled_rejected: Sampled | None = None
    chosen: str | None = None
    rejected: str | None = None
    comparisons: tuple[Comparison, ...] | None = None
    messages: tuple[Message, ...] = ()
    tools: tuple[dict[str, Any], ...] | None = None
    weight: float = 1.0
    source: str = ""
    dataset: int = 0

    @property
    def is_negative(self) -> bool:
        """Whether a judgment says that something is wrong with the completion."""
        return self.judgment is not None


@dataclass(frozen=True, eq=False)
class Stream:
    """One token sequence, teacher forced.

    input_ids: int32 [L].  loss_mask: bool [L], True where the token is a target; the first token
    has nothing before it and is never one.
    """

    role: str
    input_ids: np.ndarray
    loss_mask: np.ndarray

    def __post_init__(self) -> None:
        assert self.input_ids.dtype == np.int32 and self.input_ids.ndim == 1
        assert self.loss_mask.dtype == np.bool_ and self.loss_mask.shape == self.input_ids.shape
        assert self.loss_mask.any(), f"stream {self.role!r} has no target"
        assert not self.loss_mask[0], "the first token cannot be a target"

    @classmethod
    def of(cls, role: str, prompt_ids: np.ndarray, completion_ids: np.ndarray) -> Stream:
        """Prompt [P] then completion [C], the completion's tokens being the targets."""
        ids = np.concatenate([prompt_ids, completion_ids]).astype(np.int32)
        return cls(role, ids, np.arange(len(ids)) >= len(prompt_ids))

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True, eq=False)
class Example:
    """Streams that one loss joins: they stay together in one pack.

    reference_logprobs: float32 [M], the frozen reference's of the targets of all streams in their
    order; None where they are not known beforehand.
    """

    streams: tuple[Stream, ...]
    weight: float
    source: str
    reference_logprobs: np.ndarray | None = None

    @property
    def num_tokens(self) -> int:
        return sum(len(stream) for stream in self.streams)


class Drops:
    """Counts of what was left out, by reason, with the first case of each."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.first: dict[str, str] = {}

    def add(self, reason: str, example: str) -> None:
        # An episode log says why its judgment is none, in any words.
        reason = one_line(reason[:200])
        self.counts[reason] = self.counts.get(reason, 0) + 1
        self.first.setdefault(reason, example)

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def lines(self) -> list[str]:
        """One line a reason, the most frequent first."""
        ordered = sorted(self.counts.items(), key=lambda item: -item[1])
        return [f"{count} x {reason} (first: {self.first[reason]})" for reason, count in ordered]


@dataclass(frozen=True)
class SourceReport:
    """What became of one dataset: rows read, records usable, records after sampling."""

    path: str
    kind: Kind
    rows: int
    usable: int
    negative: int
    records: int
    drops: Drops

    def lines(self) -> list[str]:
        line = f"{self.path}: {self.rows} rows, {self.usable} usable ({self.kind}"
        if self.kind == "judged":
            line += f": {self.usable - self.negative} fine, {self.negative} with a judgment"
        line += ")"
        if self.records != self.usable:
            line += f", {self.records} records after max_samples and weight"
        return [line, *(f"  dropped {text}" for text in self.drops.lines())]


@dataclass(frozen=True)
class DataReport:
    """What became of every dataset of a call of :func:`load_records`."""

    sources: tuple[SourceReport, ...]

    @property
    def dropped(self) -> dict[str, int]:
        """Dropped rows by reason, over all datasets."""
        total: dict[str, int] = {}
        for source in self.sources:
            for reason, count in source.drops.counts.items():
                total[reason] = total.get(reason, 0) + count
        return total

    def lines(self) -> list[str]:
        """The report for people: a line per dataset and one per reason below it."""
        return [line for source in self.sources for line in source.lines()]


def load_records(
    datasets: Sequence[DatasetConfig],
    *,
    strict: bool,
    seed: int,
    want: Kind | Sequence[Kind] | None = None,
    empty_answers: bool = False,
) -> tuple[list[Record], DataReport]:
    """Read, check, filter and sample datasets; the records come in file order, not shuffled.

    Args:
        datasets: The sources; each is sampled by its ``max_samples`` and ``weight``.
        strict: A malformed row is an error instead of being dropped and counted.
        seed: Decides which rows a subsample keeps, and which of several completions make a pair.
        want: The kinds that the method can use, the best first; None takes what a file has.
            A file of another kind is converted where no meaning is lost: everything to ``prompt``
            (answers are dropped), ``preference`` and ``messages`` to ``completion`` (the chosen or
            last answer), ``completion`` and ``preference`` to ``messages``.  Where answers are
            imitated (``completion``, ``messages``), judged rows count only if they are fine.
        empty_answers: A completion may say nothing: to be judged, not to be trained on.

    Raises:
        ConfigError: a missing, unreadable or empty file; columns that cannot serve; and, when
            strict, the first malformed row as ``file:line: field ...: value ...: what is right``.
    """
    targets = (want,) if isinstance(want, str) else tuple(want or ())
    records: list[Record] = []
    reports: list[SourceReport] = []
    for index, dataset in enumerate(datasets):
        loaded, report = _load(
            dataset,
            index,
            strict=strict,
            seed=seed,
            targets=targets,
            empty_answers=empty_answers,
        )
        records += loaded
        reports.append(report)
    return records, DataReport(tuple(reports))


def _load(
    dataset: DatasetConfig,
    index: int,
    *,
    strict: bool,
    seed: int,
    targets: tuple[Kind, ...],
    empty_answers: bool,
) -> tuple[list[Record], SourceReport]:
    drops = Drops()
    read: list[tuple[str, dict[str, Any]]] = []
    for item in _read_rows(dataset):
        if isinstance(item, RowError):
            if strict:
                raise item
            drops.add(item.reason, str(item))
            continue
        try:
            answers = (
                [_Answer(*item)]
                if targets == ("prompt",)
                else _answers(
                    *item,
                    seed,
                    ranked="judged" not in targets,
                    imitated=targets[:1] in (("completion",), ("messages",)),
                )
            )
        except RowError as error:
            if strict:
                raise
            drops.add(error.reason, str(error))
            continue
        for answer in answers:
            if answer.unfit is None:
                read.append((answer.source, answer.values))
            else:
                drops.add(answer.unfit, answer.source)
    rows = len(read) + drops.total
    if not rows:
        raise ConfigError(f"{dataset.path}: holds no rows")
    if not read:
        raise ConfigError(f"{dataset.path}: none of {rows} rows can be used: {_summary(drops)}")
    found = tuple(dict.fromkeys(name for _, values in read for name in values))
    _check_renames(dataset, found)
    renamed = [
        _Row(source, _rename(values, dataset.columns), empty_answers) for source, values in read
    ]
    columns = frozenset(name for row in renamed for name in row.values)
    kind, target = _choose_kind(dataset.path, columns, found, targets)

    usable: list[Record] = []
    for row in renamed:
        try:
            record = _record(row, kind, index)
            reason = _unusable(row, record, target)
            if reason is None:
                usable.append(_convert(record, target))
            else:
                drops.add(reason, row.source)
        except RowError as error:
            if strict:
                raise
            drops.add(error.reason, str(error))
    if not usable:
        raise ConfigError(f"{dataset.path}: none of {rows} rows can be used: {_summary(drops)}")
    sampled = _sample(usable, dataset, np.random.default_rng([seed & (2**63 - 1), index]))
    report = SourceReport(
        path=dataset.path,
        kind=target,
        rows=rows,
        usable=len(usable),
        negative=sum(record.is_negative for record in usable),
        records=len(sampled),
        drops=drops,
    )
    return sampled, report


def _summary(drops: Drops) -> str:
    return "; ".join(drops.lines())


# --- reading -----------------------------------------------------------------------------------


def _read_rows(dataset: DatasetConfig) -> Iterator[tuple[str, dict[str, Any]] | RowError]:
    """Yield (source, row) or the error of a row that could not be read."""
    path = Path(os.path.expanduser(dataset.path))
    try:
        is_file = path.is_file()
        if is_file:
            yield from _read_file(path, dataset.path)
    except OSError as error:
        problem = error.strerror or str(error).partition("\n")[0]
        raise ConfigError(f"{dataset.path}: cannot be read: {problem}") from None
    if is_file:
        return
    if not path.is_dir() and _looks_local(dataset.path):
        raise ConfigError(f"{dataset.path}: no such file")
    yield from _read_hub(dataset)


def _looks_local(name: str) -> bool:
    """A hub name is ``name`` or ``owner/name``; everything else was meant as a path."""
    suffixes = (".jsonl", ".json", ".ndjson", ".parquet")
    return name.endswith(suffixes) or name[0] in "./~" or name.count("/") > 1 or "\\" in name


def _read_file(path: Path, name: str) -> Iterator[tuple[str, dict[str, Any]] | RowError]:
    with path.open("rb") as handle:
        start = handle.read(4096)
    if start.startswith(b"PAR1") or path.suffix == ".parquet":
        return _read_parquet(path, name)
    if start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        array = _json_array(path, name)
        if array is not None:
            return (_checked_row(f"{name}:row {row}", value) for row, value in enumerate(array, 1))
    return _read_lines(path, name)


def _read_lines(path: Path, name: str) -> Iterator[tuple[str, dict[str, Any]] | RowError]:
    with path.open("rb") as handle:
        # Bytes are split at \n alone: text may hold U+2028, which str.splitlines would cut at.
        for number, line in enumerate(handle, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            source = f"{name}:{number}"
            try:
                text = line.decode("utf-8").rstrip("\r\n")
                yield _checked_row(source, json.loads(text))
            except UnicodeDecodeError as error:
                message = f"{source}: not UTF-8 at byte {error.start + 1} of the line"
                yield RowError(f"{message}: save the file as UTF-8", "not UTF-8")
            except (ValueError, RecursionError) as error:
                yield RowError(f"{source}: not JSON: {_json_problem(error)}", "not JSON")


def _json_array(path: Path, name: str) -> list[Any] | None:
    """The rows of a file that is one JSON array; None when the file may be JSON lines instead."""
    data = path.read_bytes()
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{name}:{line}: not UTF-8: save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        if path.suffix != ".json":
            return None
        line = getattr(error, "lineno", 1)
        raise ConfigError(f"{name}:{line}: not a JSON array: {_json_problem(error)}") from None
    return value


def _json_problem(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _read_parquet(path: Path, name: str) -> Iterator[tuple[str, dict[str, Any]] | RowError]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for values in batch.to_pylist():
                    number += 1
                    yield _checked_row(f"{name}:row {number}", values)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        problem = str(error).partition("\n")[0]
        raise ConfigError(f"{name}: not a readable Parquet file: {problem}") from None


def _read_hub(dataset: DatasetConfig) -> Iterator[tuple[str, dict[str, Any]] | RowError]:
    import datasets

    try:
        loaded = datasets.load_dataset(dataset.path, split=dataset.split)
    except Exception as error:  # the library raises its own, the hub client's and builtin errors
        problem = str(error).partition("\n")[0]
        raise ConfigError(
            f"{dataset.path}: neither a file nor a dataset that can be loaded from the hub "
            f"(split {dataset.split!r}): {type(error).__name__}: {problem}"
        ) from None
    for number, values in enumerate(loaded, 1):
        yield _checked_row(f"{dataset.path}[{dataset.split}]:{number}", values)


def _checked_row(source: str, value: Any) -> tuple[str, dict[str, Any]] | RowError:
    if isinstance(value, dict):
        if _too_deep(value):
            message = f"{source}: want at most {DEEPEST} objects and lists inside each other"
            return RowError(message, "nested too deeply")
        return source, value
    return RowError(
        f"{source}: value {short(value)}: a row is an object of columns", "not an object"
    )


def _too_deep(value: Any) -> bool:
    """Deeper than anything that people write, and than what walks through a row could follow."""
    level = [value]
    for _ in range(DEEPEST):
        level = [
            item
            for above in level
            for item in (above.values() if isinstance(above, dict) else above)
            if isinstance(item, dict | list)
        ]
        if not level:
            return False
    return True


# --- rows of several completions ---------------------------------------------------------------


@dataclass(frozen=True)
class _Answer:
    """One row, or what one is made into; ``unfit`` says why it is left out."""

    source: str
    values: dict[str, Any]
    unfit: str | None = None


def _answers(
    source: str,
    values: dict[str, Any],
    seed: int = 0,
    *,
    ranked: bool = False,
    imitated: bool = False,
) -> list[_Answer]:
    """A row as it stands; one of an episode log as a row for each completion, or where it is
    ``ranked`` and a judge has compared them, for each pair or winner that was trained on
    (``imitated``: each chosen completion once); one of UltraFeedback as a pair."""
    if {"prompt", "completions", "token_ids"} <= values.keys():
        if ranked and values.get("verdicts") is not None:
            return _ranked_answers(_Row(source, values), imitated)
        return _sampled_answers(source, values)
    if {"instruction", "completions"} <= values.keys() and not values.keys() & {"output", "chosen"}:
        return [_rated_pair(_Row(source, values), seed)]
    return [_Answer(source, values)]


def _sampled_answers(source: str, values: dict[str, Any]) -> list[_Answer]:
    """The completions of an episode, each with its judgment."""
    if "completion" in values:
        # A completion of its own beside those that were sampled: the tokens are theirs.
        own = {k: v for k, v in values.items() if k not in ("prompt_ids", "token_ids")}
        return [_Answer(source, own)]
    row = _Row(source, values)
    completions = _column(row, "completions", None)
    token_ids = _column(row, "token_ids", len(completions))
    judged = values.get("judgments") is not None
    judgments = _column(row, "judgments", len(completions)) if judged else []
    noise = [None] * len(completions)
    if values.get("noise") is not None:
        noise = _column(row, "noise", len(completions))
    wrong = next((x for x in noise if not isinstance(x, str | None)), None)
    if wrong is not None:
        raise row.error("noise", wrong, "want text or null", "wrong type")
    shared = ("prompt", "tools", "weight", "prompt_ids")
    common = {name: values[name] for name in shared if name in values}
    answers = []
    for i, completion in enumerate(completions):
        own = common | {"completion": completion, "token_ids": token_ids[i]}
        unjudged = None
        if judged:
            own["judgment"] = judgments[i]
            # Noise that is a text is looked at again, for it may have been corrected.
            unjudged = noise[i] if judgments[i] is None else None
        answers.append(_Answer(f"{source}[{i}]", own, unjudged))
    return answers


UNDECIDED = "verdicts: the judge placed none above another"


def _ranked_answers(row: _Row, imitated: bool) -> list[_Answer]:
    """The pairs of an episode, or without any the answers that were kept of it."""
    completions = _column(row, "completions", None)
    token_ids = _column(row, "token_ids", len(completions))
    shared = ("prompt", "tools", "weight", "prompt_ids")
    common = {name: row.values[name] for name in shared if name in row.values}

    def place(name: str, value: Any) -> int:
        if type(value) is int and 0 <= value < len(completions):
            return value
        right = f"want the number of a completion, 0 to {len(completions) - 1}"
        raise row.error(name, value, right, "out of range")

    answers = []
    shown: list[int] = []
    for number, pair in enumerate(_column(row, "pairs", None)):
        if not isinstance(pair, list) or len(pair) != 2:
            raise row.error(f"pairs[{number}]", pair, "want [chosen, rejected]", "wrong type")
        chosen, rejected = (place(f"pairs[{number}]", i) for i in pair)
        if imitated:
            shown.append(chosen)
            continue
        own = {
            "chosen": completions[chosen],
            "rejected": completions[rejected],
            "chosen_ids": token_ids[chosen],
            "rejected_ids": token_ids[rejected],
        }
        answers.append(_Answer(f"{row.source}[{number}]", common | own))
    if not answers:
        shown += [place("kept", i) for i in _column(row, "kept", None)]
    for i in dict.fromkeys(shown):
        own = {"completion": completions[i], "token_ids": token_ids[i]}
        answers.append(_Answer(f"{row.source}[{i}]", common | own))
    return answers or [_Answer(row.source, common, UNDECIDED)]


TOO_FEW_RATED = "completions: fewer than two have ratings"
ALL_TIE = "completions: none is rated below the best"


@dataclass(frozen=True)
class _Rated:
    """A completion with its (rating, rationale) by principle, where it has a rating."""

    text: str
    ratings: dict[str, tuple[float, str]]

    @property
    def mean(self) -> float:
        return sum(rating for rating, _ in self.ratings.values()) / len(self.ratings)


def _rated_pair(row: _Row, seed: int) -> _Answer:
    """The pair of a row of UltraFeedback (arXiv 2310.01377), as JSFT takes it (arXiv 2402.11253):
    the completion of the highest mean rating, and one of those that are rated lower.

    Ties for the best and the choice among the others are drawn by ``seed`` and the row's own texts.
    The completions stand in the order of their models' names, so the first is not just any.
    """
    found = _column(row, "completions", None)
    rated = [answer for i, x in enumerate(found) if (answer := _rated(row, i, x)) is not None]
    kept = {name: value for name, value in row.values.items() if name != "completions"}
    if len(rated) < 2:
        return _Answer(row.source, kept, TOO_FEW_RATED)
    rng = _row_rng(seed, row.get("instruction"), rated)
    highest = max(answer.mean for answer in rated)
    best = _draw(rng, [answer for answer in rated if answer.mean == highest])
    lower = [a for a in rated if a.mean < highest and a.text.strip() != best.text.strip()]
    if not lower:
        return _Answer(row.source, kept, ALL_TIE)
    other = _draw(rng, lower)
    pair = {"chosen": best.text, "rejected": other.text, "comparisons": _by_principle(best, other)}
    return _Answer(row.source, kept | pair)


def _rated(row: _Row, index: int, value: Any) -> _Rated | None:
    """One completion; None where it says nothing or nobody rated it."""
    name = f"completions[{index}]"
    if not isinstance(value, dict):
        raise row.error(name, value, 'want {"response": ..., "annotations": ...}', "wrong type")
    text = _text(row, f"{name}.response", value.get("response"), empty=True)
    annotations = value.get("annotations")
    if not isinstance(annotations, dict):
        right = "want an object of principles"
        raise row.error(f"{name}.annotations", annotations, right, "wrong type")
    ratings = {}
    for principle, annotation in annotations.items():
        if annotation is None:
            continue
        field = f"{name}.annotations.{principle}"
        if not isinstance(annotation, dict):
            raise row.error(field, annotation, 'want {"Rating": ..., ...}', "wrong type")
        rating = _rating(row, f"{field}.Rating", annotation.get("Rating"))
        if rating is not None:
            ratings[principle] = (rating, _rationale(row, field, annotation))
    return _Rated(text, ratings) if ratings and text.strip() else None


def _rating(row: _Row, name: str, value: Any) -> float | None:
    if value is None or value == "N/A":
        return None
    number = math.nan
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            number = float(value)
    if not math.isfinite(number):
        raise row.error(name, value, 'want a number or "N/A"', "not a rating")
    return number


# The annotator saw four texts at once, the judge sees two others.
_OTHER_TEXTS = re.compile(r"\bTexts?\s*\d")


def _rationale(row: _Row, name: str, annotation: dict[str, Any]) -> str:
    """Why a completion has its rating, "" where nothing of use is said."""
    parts = []
    for key in ("Rationale", "Rationale For Rating"):
        if annotation.get(key) is not None:
            parts.append(_text(row, f"{name}.{key}", annotation[key], empty=True).strip())
    text = " ".join(part for part in parts if part)
    return "" if _OTHER_TEXTS.search(text) else text


def _by_principle(best: _Rated, other: _Rated) -> list[dict[str, Any]]:
    """A comparison for each principle by which both are rated, and not alike."""
    comparisons = []
    for principle, (rating, rationale) in best.ratings.items():
        rating_other, rationale_other = other.ratings.get(principle, (rating, ""))
        if rating == rating_other:
            continue
        comparison = {
            "principle": principle.replace("_", " "),
            "preferred": "chosen" if rating > rating_other else "rejected",
        }
        if rationale and rationale_other:
            comparison |= {"rationale_chosen": rationale, "rationale_rejected": rationale_other}
        comparisons.append(comparison)
    return comparisons


def _row_rng(seed: int, instruction: Any, rated: Sequence[_Rated]) -> np.random.Generator:
    texts = json.dumps([seed, instruction, [answer.text for answer in rated]], default=str)
    digest = hashlib.blake2b(texts.encode("utf-8"), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))


def _draw(rng: np.random.Generator, answers: Sequence[_Rated]) -> _Rated:
    return answers[int(rng.integers(len(answers)))]


def read_answers(path: str) -> tuple[list[tuple[Record, bool]], Drops]:
    """Every answer of a file of rows or episodes, and whether it has a judgment to train on.

    In rows without a ``judgment`` column nothing is judged; null in one means fine.

    Raises:
        ConfigError: a missing or unreadable file, the first malformed row, or no answer at all.
    """
    drops = Drops()
    answers: list[tuple[Record, bool]] = []
    for item in _read_rows(DatasetConfig(path=path)):
        if isinstance(item, RowError):
            raise item
        for answer in _answers(*item):
            row = _Row(answer.source, answer.values)
            if answer.values.get("completion") == "":
                # Sampled empty: there is nothing to say of it.
                drops.add("completion: empty", row.source)
                continue
            record = _record(row, "judged", 0)
            judged = "judgment" in row.values and answer.unfit is None
            noise = record.judgment is not None and noise_reason(record.judgment) is not None
            answers.append((record, judged and not noise))
    if not answers:
        raise ConfigError(f"{path}: holds no answers")
    return answers, drops


def _column(row: _Row, name: str, length: int | None) -> list[Any]:
    value = row.get(name)
    if not isinstance(value, list) or len(value) != (len(value) if length is None else length):
        right = "want a list" if length is None else f"want a list of {length}, as completions"
        raise row.error(name, value, right, "wrong type")
    return value


# --- columns -----------------------------------------------------------------------------------


def _check_renames(dataset: DatasetConfig, found: tuple[str, ...]) -> None:
    for ours, theirs in dataset.columns.items():
        if ours not in COLUMNS:
            near = difflib.get_close_matches(ours, COLUMNS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(COLUMNS)}"
            raise ConfigError(f"{dataset.path}: columns names {ours!r}, no column of ours: {hint}")
        if theirs not in found:
            raise ConfigError(
                f"{dataset.path}: columns says that {ours!r} is {theirs!r}, which no row has: "
                f"the file has {_listed(found)}"
            )


def _listed(columns: tuple[str, ...], limit: int = 40) -> str:
    """Names of a file's columns, which may be any texts."""
    shown = [name if len(name) <= limit else f"{name[:limit]}..." for name in columns[:limit]]
    more = len(columns) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _rename(values: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    if not columns:
        return values
    taken = set(columns.values())
    kept = {name: value for name, value in values.items() if name not in taken}
    return kept | {ours: values[name] for ours, name in columns.items() if name in values}


def _choose_kind(
    path: str, columns: frozenset[str], found: tuple[str, ...], targets: tuple[Kind, ...]
) -> tuple[Kind, Kind]:
    """(kind to read the rows as, kind to convert them to)."""
    alpaca = "instruction" in columns
    has = columns | ({"prompt"} if alpaca else set())
    has |= {"completion"} if alpaca and "output" in columns else set()
    possible = [kind for kind, needs in _NEEDS.items() if has.issuperset(needs)]
    if not targets:
        if possible:
            return possible[0], possible[0]
        # Worded as the alternatives, since nothing says which of them was meant.
        needed = "; or ".join(" + ".join(needs) for needs in _NEEDS.values())
        raise ConfigError(f"{path}: has columns {_listed(found)}: needed are {needed}")
    for target in targets:
        if target in possible:
            # Read as judged so that criticised answers are not imitated.
            imitated = target == "completion" and "judged" in possible
            return ("judged" if imitated else target), target
    for target in targets:
        for kind in _MADE_FROM[target]:
            if kind in possible:
                return kind, target
    needed = "; or ".join(" + ".join(_NEEDS[target]) for target in targets)
    raise ConfigError(
        f"{path}: has columns {_listed(found)}: this method needs {needed} "
        "(the dataset's `columns` setting renames)"
    )


# --- one row -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    """``empty_answers``: a completion may say nothing."""

    source: str
    values: dict[str, Any]
    empty_answers: bool = False

    def get(self, name: str) -> Any:
        return self.values.get(name)

    def error(self, name: str, value: Any, right: str, reason: str) -> RowError:
        message = f"{self.source}: field {name}: value {short(value)}: {right}"
        return RowError(message, f"{name.partition('[')[0]}: {reason}")


def _record(row: _Row, kind: Kind, dataset: int) -> Record:
    """Read one row as ``kind``; RowError says what is wrong with it."""
    common: dict[str, Any] = {
        "kind": kind,
        "tools": _tools(row),
        "weight": _number(row, "weight", above=0.0, default=1.0),
        "source": row.source,
        "dataset": dataset,
    }
    if kind == "messages":
        return Record(messages=_dialogue(row), **common)
    if kind == "preference":
        prompt, chosen, rejected = _pair(row)
        return Record(
            prompt=prompt,
            chosen=chosen,
            rejected=rejected,
            sampled=_sampled(row, "chosen_ids"),
            sampled_rejected=_sampled(row, "rejected_ids"),
            comparisons=_comparisons(row),
            **common,
        )
    prompt = _prompt(row)
    if kind == "prompt":
        return Record(prompt=prompt, **common)
    name = "output" if "completion" not in row.values and "output" in row.values else "completion"
    completion = _answer(row, name, prompt)
    judgment = _judgment(row) if kind == "judged" else None
    sampled = _sampled(row, "token_ids")
    return Record(
        prompt=prompt, completion=completion, judgment=judgment, sampled=sampled, **common
    )


def _sampled(row: _Row, name: str) -> Sampled | None:
    """Recorded tokens: of use only when those of the prompt are known too."""
    if row.get("prompt_ids") is None or row.get(name) is None:
        return None
    return Sampled(_ids(row, "prompt_ids"), _ids(row, name))


def _ids(row: _Row, name: str) -> tuple[int, ...]:
    value = row.get(name)
    if not isinstance(value, list) or not all(type(x) is int and 0 <= x < 2**31 for x in value):
        raise row.error(name, value, "want a list of token ids", "wrong type")
    return tuple(value)


def _text(row: _Row, name: str, value: Any, *, empty: bool = False) -> str:
    if not isinstance(value, str):
        if value is None and not empty:
            raise row.error(name, value, "text is needed here", "missing")
        raise row.error(name, value, "want text", "wrong type")
    if not empty and not value.strip():
        raise row.error(name, value, "must not be empty", "empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        right = "holds half of a surrogate pair, which is no text"
        raise row.error(name, value, right, "not text") from None
    return value


def _number(row: _Row, name: str, *, above: float, default: float | None) -> Any:
    value = row.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise row.error(name, value, "want a number", "wrong type")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or number <= above:
        bound = "" if above == -math.inf else f" above {above:g}"
        raise row.error(name, value, f"want a finite number{bound}", "out of range")
    return number


def _tools(row: _Row) -> tuple[dict[str, Any], ...] | None:
    value = row.get("tools")
    if value is None or value == "":
        return None
    if isinstance(value, str):
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError):
            raise row.error("tools", value, "want a list or its JSON text", "not JSON") from None
    else:
        parsed = _without_none(value)
    if not isinstance(parsed, list) or not all(isinstance(tool, dict) for tool in parsed):
        raise row.error("tools", value, "want a list of objects", "wrong type")
    if _too_deep(parsed):
        raise row.error("tools", value, f"want at most {DEEPEST} levels", "nested too deeply")
    return tuple(_plain(row, "tools", parsed)) or None


def _without_none(value: Any) -> Any:
    """Parquet gives every object the keys of all objects of its column, null where it had none."""
    if isinstance(value, dict):
        return {name: _without_none(item) for name, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def _plain(row: _Row, name: str, value: Any) -> Any:
    """What nobody looks into, as JSON has it: in Parquet it may hold a date."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        right = "holds half of a surrogate pair, which is no text"
        raise row.error(name, value, right, "not text") from None
    return json.loads(text)


def _messages(row: _Row, name: str, value: Any) -> tuple[Message, ...]:
    """Check a list of messages; content becomes plain text."""
    if not isinstance(value, list):
        raise row.error(name, value, "want text or a list of messages", "wrong type")
    if not value:
        raise row.error(name, value, "must not be empty", "empty")
    last = len(value) - 1
    return tuple(
        _message(row, f"{name}[{i}]", message, empty_answer=row.empty_answers and i == last)
        for i, message in enumerate(value)
    )


def _message(row: _Row, name: str, value: Any, *, empty_answer: bool) -> Message:
    if not isinstance(value, dict):
        raise row.error(name, value, 'want {"role": ..., "content": ...}', "wrong type")
    message = {key: item for key, item in value.items() if item is not None}
    others = {key: item for key, item in message.items() if key not in ("role", "content")}
    if others:
        message |= _plain(row, name, others)
    role = message.get("role")
    if role not in ROLES:
        raise row.error(f"{name}.role", role, f"want one of {', '.join(ROLES)}", "unknown role")
    calls = message.get("tool_calls")
    if calls is not None:
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise row.error(f"{name}.tool_calls", calls, "want a list of objects", "wrong type")
        message["tool_calls"] = _without_none(calls)
    if not isinstance(message.get("loss", True), bool):
        raise row.error(f"{name}.loss", message["loss"], "want true or false", "wrong type")
    content = message.get("content")
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else None for part in content]
        if not all(isinstance(part, str) for part in parts):
            right = "want text or a list of text parts"
            raise row.error(f"{name}.content", content, right, "wrong type")
        content = "".join(part for part in parts if part is not None)
    if content is None and role == "assistant" and calls:
        content = ""
    # A tool may answer nothing and a system message may be blank on purpose.
    may_be_empty = role in ("system", "developer", "tool") or bool(calls)
    may_be_empty |= empty_answer and role == "assistant"
    message["content"] = _text(row, f"{name}.content", content, empty=may_be_empty)
    return message


def _with_system(row: _Row, messages: tuple[Message, ...]) -> tuple[Message, ...]:
    system = row.get("system")
    if system is None or system == "":
        return messages
    if messages[0]["role"] in ("system", "developer"):
        right = "the dialogue already begins with a system message"
        raise row.error("system", system, right, "given twice")
    return ({"role": "system", "content": _text(row, "system", system)}, *messages)


_NO_INPUT = re.compile(r"\W*no\s*input\W*", re.IGNORECASE)


def _prompt(row: _Row) -> tuple[Message, ...]:
    """The prompt as messages that end before the answer."""
    name, value = "prompt", row.get("prompt")
    if "prompt" not in row.values and "instruction" in row.values:
        name, value = "instruction", _text(row, "instruction", row.get("instruction"))
        extra = _text(row, "input", row.get("input") or "", empty=True)
        # Alpaca's data writes an absent input as "<noinput>", "No input" and the like.
        if extra.strip() and not _NO_INPUT.fullmatch(extra):
            value = f"{value}\n\n{extra}"
    if value is None or isinstance(value, str):
        text = _text(row, name, value)
        if _HH_PROMPT.fullmatch(text):
            turns = _hh_dialogue(row, name, text.rstrip().removesuffix("Assistant:").rstrip())
            _check_prompt(row, name, value, turns)
            return _with_system(row, turns)
        return _with_system(row, ({"role": "user", "content": text},))
    messages = _messages(row, name, value)
    _check_prompt(row, name, value, messages)
    return _with_system(row, messages)


def _check_prompt(row: _Row, name: str, value: Any, messages: tuple[Message, ...]) -> None:
    roles = [message["role"] for message in messages]
    if "user" not in roles:
        raise row.error(name, value, "needs a user message", "no user message")
    if roles[-1] == "assistant":
        right = "must end before the answer, with a user or tool message"
        raise row.error(name, value, right, "ends with an answer")


def _answer(row: _Row, name: str, prompt: tuple[Message, ...]) -> str:
    """A completion given as text, as its one message, or as the prompt's messages and its own."""
    value = row.get(name)
    if value is None or isinstance(value, str):
        text = _text(row, name, value, empty=row.empty_answers and value is not None)
        asked_as = row.get("prompt")
        # Whole dialogues beside their prompt: the answer is what follows it.
        if isinstance(asked_as, str) and _HH_PROMPT.fullmatch(asked_as):
            return _text(row, name, text.removeprefix(asked_as)).strip()
        return text
    *before, last = _messages(row, name, value)
    asked = _bare(prompt[1:]) if prompt[0]["role"] in ("system", "developer") else _bare(prompt)
    if before and _bare(before) not in (_bare(prompt), asked):
        right = "the messages before the answer differ from the prompt's"
        raise row.error(name, value, right, "another prompt")
    return _last_answer(row, name, value, last)


def _bare(messages: Iterable[Message]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"].strip()) for message in messages]


def _last_answer(row: _Row, name: str, value: Any, last: Message) -> str:
    if last["role"] != "assistant":
        raise row.error(name, value, "must end with an assistant message", "no answer at the end")
    if last.get("tool_calls"):
        right = "an answer with tool calls is trained as `messages`"
        raise row.error(name, value, right, "tool calls in the answer")
    return last["content"]


def _judgment(row: _Row) -> str | None:
    value = row.get("judgment")
    judgment = _text(row, "judgment", value, empty=True) if value is not None else None
    score = _number(row, "score", above=-math.inf, default=None)
    if score is not None and score >= FINE_SCORE:
        return None
    return (judgment or "").strip() or None


def _pair(row: _Row) -> tuple[tuple[Message, ...], str, str]:
    """(prompt, chosen, rejected), the prompt being given or the dialogues' common part."""
    if row.get("prompt") is not None or row.get("instruction") is not None:
        prompt = _prompt(row)
        chosen, rejected = _answer(row, "chosen", prompt), _answer(row, "rejected", prompt)
    else:
        prompt, chosen = _split_dialogue(row, "chosen")
        other, rejected = _split_dialogue(row, "rejected")
        if _bare(prompt) != _bare(other):
            right = "the dialogue before the last answer differs from that of chosen"
            raise row.error("rejected", row.get("rejected"), right, "another prompt")
        prompt = _with_system(row, prompt)
    if chosen.strip() == rejected.strip():
        raise row.error("rejected", rejected, "must differ from chosen", "same as chosen")
    return prompt, chosen, rejected


_COMPARISON = ("preferred", "principle", "rationale_chosen", "rationale_rejected")


def _comparisons(row: _Row) -> tuple[Comparison, ...] | None:
    value = row.get("comparisons")
    if value is None:
        return None
    if not isinstance(value, list):
        raise row.error("comparisons", value, "want a list of comparisons", "wrong type")
    return tuple(_comparison(row, f"comparisons[{i}]", item) for i, item in enumerate(value))


def _comparison(row: _Row, name: str, value: Any) -> Comparison:
    if not isinstance(value, dict):
        right = 'want {"preferred": "chosen" or "rejected", ...}'
        raise row.error(name, value, right, "wrong type")
    given = {key: item for key, item in value.items() if item is not None}
    unknown = next((key for key in given if key not in _COMPARISON), None)
    if unknown is not None:
        right = f"no key of a comparison: known are {', '.join(_COMPARISON)}"
        raise row.error(f"{name}.{unknown}", given[unknown], right, "unknown key")
    preferred = given.get("preferred")
    if preferred not in ("chosen", "rejected"):
        right = "want 'chosen' or 'rejected'"
        raise row.error(f"{name}.preferred", preferred, right, "prefers neither")
    texts = {
        key: _text(row, f"{name}.{key}", item) for key, item in given.items() if key != "preferred"
    }
    rationales = [texts.get(f"rationale_{answer}") for answer in ("chosen", "rejected")]
    if (rationales[0] is None) != (rationales[1] is None):
        missing = "rationale_chosen" if rationales[0] is None else "rationale_rejected"
        right = "a rationale of one answer needs that of the other"
        raise row.error(f"{name}.{missing}", None, right, "one rationale")
    return Comparison(
        preferred=preferred,
        principle=texts.get("principle"),
        rationales=(rationales[0], rationales[1]) if rationales[0] and rationales[1] else None,
    )


_HH_PROMPT = re.compile(r"\s*Human:.*\n\nAssistant:\s*", re.DOTALL)
_HH_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")


def _split_dialogue(row: _Row, name: str) -> tuple[tuple[Message, ...], str]:
    """(messages before the last answer, that answer) of a whole dialogue."""
    value = row.get(name)
    if value is None or isinstance(value, str):
        messages = _hh_dialogue(row, name, _text(row, name, value))
    else:
        messages = _messages(row, name, value)
    *before, last = messages
    answer = _last_answer(row, name, value, last)
    if not before:
        raise row.error(name, value, "holds no prompt before the answer", "no prompt")
    if before[-1]["role"] == "assistant":
        right = "the last answer follows another answer, so there is no prompt that ends before it"
        raise row.error(name, value, right, "two answers in a row")
    _check_prompt(row, name, value, tuple(before))
    return tuple(before), answer


def _hh_dialogue(row: _Row, name: str, text: str) -> tuple[Message, ...]:
    """Messages of Anthropic's format: "\\n\\nHuman: ...\\n\\nAssistant: ..."."""
    head, *turns = _HH_TURN.split(text)
    if head or not turns:
        right = 'without a prompt column, want messages or "\\n\\nHuman: ...\\n\\nAssistant: ..."'
        raise row.error(name, text, right, "no dialogue")
    roles = {"Human": "user", "Assistant": "assistant"}
    return tuple(
        {"role": roles[who], "content": _text(row, name, content.strip())}
        for who, content in zip(turns[::2], turns[1::2], strict=True)
    )


def _dialogue(row: _Row) -> tuple[Message, ...]:
    """A whole dialogue with at least one assistant turn to train on."""
    value = row.get("messages")
    messages = _messages(row, "messages", value)
    trained = [i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("loss", 1)]
    if not trained:
        right = "needs an assistant message that is trained on"
        raise row.error("messages", value, right, "no answer")
    if messages[0]["role"] == "assistant":
        right = "the first message cannot be the assistant's: nothing precedes it"
        raise row.error("messages", value, right, "no prompt")
    return _with_system(row, messages)


# --- filters and conversions -------------------------------------------------------------------

_SENTINEL = re.compile(r"[\W_]*error[\W_]*", re.IGNORECASE)
_PRAISE = re.compile(
    r"\W*(?:the|this|your)\s+(?:response|answer|completion|output)\s+(?:is|was)\s+"
    # What follows says why, or is a sentence of its own: "perfect, until it ..." criticises.
    r"(?:perfect|flawless)(?:\s*[.!]|\s+(?:as|because|since)\b|\s*\Z)(.*)",
    re.IGNORECASE | re.DOTALL,
)
_BARE_PRAISE = re.compile(
    r"\W*(?:(?:the|this|your)\s+(?:response|answer|completion|output)\s+(?:is|was)\s+)?"
    r"(?:perfect|flawless|correct|accurate|excellent|great|good|fine)\W*",
    re.IGNORECASE,
)
_RESERVATION = re.compile(
    r"\b(?:but|however|although|though|except|unfortunately|should|could|would)\b", re.IGNORECASE
)


SENTINEL = "judgment: error sentinel instead of a judgment"
PRAISE = "judgment: praise marked negative"
NOISE = (SENTINEL, PRAISE)
"""What :func:`noise_reason` finds."""


def takes_back(text: str) -> bool:
    """Whether what follows praise makes a judgment of it: "perfect, but ..."."""
    return _RESERVATION.search(text) is not None


def noise_reason(judgment: str) -> str | None:
    """Why a written judgment is no judgment, or None when it is one.

    Both kinds were seen in CUT's published online data (arXiv 2312.14591): an error sentinel
    ("$ERROR$") instead of a text, and praise ("The response is perfect. ...") that is marked
    negative.  Praise with a reservation ("perfect, but ...") is a judgment.
    """
    if _SENTINEL.fullmatch(judgment):
        return SENTINEL
    return PRAISE if is_praise(judgment) else None


def is_praise(judgment: str) -> bool:
    """Whether a judgment says that nothing is wrong."""
    praise = _PRAISE.match(judgment)
    return bool(_BARE_PRAISE.fullmatch(judgment) or (praise and not takes_back(praise[1])))


def _unusable(row: _Row, record: Record, target: Kind) -> str | None:
    """Why a well-formed record is left out, or None."""
    if record.kind != "judged":
        return None
    if record.judgment is None:
        score = row.get("score")
        if score is not None and score < FINE_SCORE:
            return f"judgment: none, but a score below {FINE_SCORE:g}"
        return None
    if target in ("completion", "messages"):
        return "judgment: criticised answers are not imitated"
    return noise_reason(record.judgment) if target == "judged" else None


def _convert(record: Record, target: Kind) -> Record:
    """The record as another kind (see ``want`` of load_records)."""
    if record.kind == target:
        return record
    prompt, answer = record.prompt, record.completion or record.chosen
    if record.kind == "messages":
        *before, last = record.messages
        row = _Row(record.source, {})
        if target == "completion":
            answer = _last_answer(row, "messages", list(record.messages), last)
        prompt = tuple(before) if last["role"] == "assistant" else record.messages
        _check_prompt(row, "messages", list(record.messages), prompt)
    bare = replace(
        record, kind=target, prompt=(), messages=(), sampled=None, sampled_rejected=None,
        completion=None, judgment=None, chosen=None, rejected=None, comparisons=None,
    )  # fmt: skip
    if target == "prompt":
        return replace(bare, prompt=prompt)
    if target == "completion":
        return replace(bare, prompt=prompt, completion=answer, sampled=record.sampled)
    assert target == "messages", target
    return replace(bare, messages=(*prompt, {"role": "assistant", "content": answer}))


# --- sampling and splitting --------------------------------------------------------------------


def _sample(
    records: list[Record], dataset: DatasetConfig, rng: np.random.Generator
) -> list[Record]:
    """max_samples, then weight: whole copies and a seeded part, each in file order."""
    if dataset.max_samples is not None:
        records = _subset(records, dataset.max_samples, rng)
    copies, part = divmod(dataset.weight, 1.0)
    size = round(part * len(records))
    if not copies:
        size = max(size, 1)  # a small weight thins a dataset out, it does not remove it
    return records * int(copies) + _subset(records, size, rng)


def _subset(records: list[Record], size: int, rng: np.random.Generator) -> list[Record]:
    if size >= len(records):
        return list(records)
    return [records[i] for i in np.sort(rng.permutation(len(records))[:size])]


def split_records(
    records: Sequence[Record], eval_ratio: float, seed: int
) -> tuple[list[Record], list[Record]]:
    """(train, evaluation): whole prompts are held out, so that none is on both sides.

    Prompts are taken in the order of a seeded hash of their text while they fit into
    ``eval_ratio`` of the records (at least one is): the order of the files does not matter.  A
    dialogue (kind ``messages``) counts by what precedes its first answer.

    Raises:
        ConfigError: fewer than two different prompts.
    """
    if not eval_ratio:
        return list(records), []
    groups: dict[bytes, list[int]] = {}
    for i, record in enumerate(records):
        groups.setdefault(_prompt_key(record, seed), []).append(i)
    if len(groups) < 2:
        raise ConfigError(
            f"eval_ratio = {eval_ratio}: the data has {len(groups)} different prompt(s) and a "
            "held-out part needs at least 2: name eval_datasets instead"
        )
    wanted = min(round(eval_ratio * len(records)), len(records) - 1)
    held: set[int] = set()
    for key in sorted(groups):
        if len(held) + len(groups[key]) <= wanted:
            held.update(groups[key])
    if not held:
        held.update(groups[min(groups, key=lambda key: (len(groups[key]), key))])
    train = [record for i, record in enumerate(records) if i not in held]
    return train, [records[i] for i in sorted(held)]


def _prompt_key(record: Record, seed: int) -> bytes:
    messages = record.prompt
    if record.kind == "messages":
        roles = [message["role"] for message in record.messages]
        messages = record.messages[: roles.index("assistant")]
    text = json.dumps([seed, _bare(messages)], ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
