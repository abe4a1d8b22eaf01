"""People as judges: answers go out as lines to fill in, and come back checked.

A line holds all that is needed to come back, so that the file may travel alone::

    {"id": "17-5d41402abc4b-7d793037a076", "of": 120, "judgment": "", "prompt": [...],
     "completion": "...", "source": "episodes/0003.jsonl:9[0]", ...}

``judgment`` stays "" where nobody judged, becomes null where the answer is fine, and otherwise says
what is wrong.  The id is the line's number and the hashes of what was asked and what was answered.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastalign.config import ConfigError
from fastalign.data import Drops, Record, is_praise, noise_reason, read_answers
from fastalign.printing import short

# Of a line: which part of the id stands for what.
_ASKED = ("prompt", "tools", "prompt_ids")
_ANSWERED = ("completion", "token_ids")
_KEPT = ("prompt", "completion", "judgment", "tools", "weight", "prompt_ids", "token_ids")


@dataclass(frozen=True)
class Exported:
    """What :func:`export` wrote: answers to judge, of how many, and what was left out."""

    answers: int
    of: int
    sampled: int
    drops: Drops


@dataclass(frozen=True)
class Imported:
    """What :func:`import_judgments` found and wrote."""

    judged: int
    fine: int
    left_open: int
    sampled: int


def export(source: str, out: Path, *, everything: bool = False) -> Exported:
    """Write a line for each answer of ``source`` (an episode log, or rows with prompt and
    completion) that has no judgment to train on; ``everything``: for the others as well.

    Raises:
        ConfigError: the source cannot be read, holds nothing to judge, or ``out`` is there.
    """
    if out.exists():
        raise ConfigError(f"{out}: is there already, perhaps filled in: choose another name")
    answers, drops = read_answers(source)
    records = [record for record, judged in answers if everything or not judged]
    if not records:
        raise ConfigError(
            f"{source}: each of {len(answers)} answers has a judgment: --all exports them too"
        )
    lines = [_line(record, number, len(records)) for number, record in enumerate(records, 1)]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    sampled = sum(record.sampled is not None for record in records)
    return Exported(len(records), len(answers), sampled, drops)


def _line(record: Record, number: int, of: int) -> dict[str, Any]:
    line: dict[str, Any] = {
        "judgment": "",
        "prompt": list(record.prompt),
        "completion": record.completion,
        "source": record.source,
    }
    if record.tools is not None:
        line["tools"] = list(record.tools)
    if record.weight != 1.0:
        line["weight"] = record.weight
    if record.sampled is not None:
        line["prompt_ids"] = list(record.sampled.prompt_ids)
        line["token_ids"] = list(record.sampled.token_ids)
    return {"id": _identity(number, line), "of": of, **line}


def import_judgments(filled: Path, result: Path) -> Imported:
    """Check every line of a filled file and write the judged ones as rows to train on.

    Raises:
        ConfigError: the first line that is not as it was exported but for its judgment, naming
            file and line, or a line that is missing; nothing is written then.
    """
    if result.resolve() == filled.resolve():
        raise ConfigError(f"{result}: is the file to import: choose another name for the result")
    lines = _checked_lines(filled)
    rows = [line for line in lines if line["judgment"] is None or line["judgment"].strip()]
    if not rows:
        raise ConfigError(f"{filled}: none of {len(lines)} answers has a judgment yet")
    text = "".join(
        json.dumps({name: row[name] for name in _KEPT if name in row}, ensure_ascii=False) + "\n"
        for row in rows
    )
    result.parent.mkdir(parents=True, exist_ok=True)
    result.write_text(text, encoding="utf-8")
    judged = sum(row["judgment"] is not None for row in rows)
    return Imported(
        judged=judged,
        fine=len(rows) - judged,
        left_open=len(lines) - len(rows),
        sampled=sum("token_ids" in row for row in rows),
    )


def _checked_lines(path: Path) -> list[dict[str, Any]]:
    """Every line that was exported, once."""
    try:
        # Lines end at \n alone: texts may hold others that str.splitlines would cut at.
        texts = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    seen: dict[int, str] = {}
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(texts, 1):
        if not text.strip():
            continue
        where = f"{path}:{number}"
        line = _checked(where, text)
        exported = int(line["id"].partition("-")[0])
        if exported in seen:
            raise ConfigError(f"{where}: field id: value {line['id']!r}: also in {seen[exported]}")
        if line["of"] != (lines or [line])[0]["of"]:
            raise ConfigError(
                f"{where}: is one of {line['of']} answers of another export: one at a time"
            )
        seen[exported] = where
        lines.append(line)
    if not lines:
        raise ConfigError(f"{path}: holds no lines")
    missing = next((n for n in range(1, lines[0]["of"] + 1) if n not in seen), None)
    if missing is not None:
        raise ConfigError(
            f"{path}: answer {missing} of {lines[0]['of']} is missing: put its line back, its "
            "judgment may stay empty"
        )
    return lines


def _checked(where: str, text: str) -> dict[str, Any]:
    """One line as it was exported, with a judgment that is a text, null or ""."""
    try:
        line = json.loads(text)
        right = [_hash(line, _ASKED), _hash(line, _ANSWERED)] if isinstance(line, dict) else []
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not JSON: {error}") from None
    if not isinstance(line, dict):
        raise ConfigError(f"{where}: a line is an object, as it was exported")
    for name in ("id", "of", "prompt", "completion", "judgment"):
        if name not in line:
            raise ConfigError(f"{where}: field {name}: is missing: put it back as it was exported")
    _check_content(where, line, right)
    judgment = line["judgment"]
    if judgment is None:
        return line
    if not isinstance(judgment, str):
        raise ConfigError(
            f"{where}: field judgment: value {short(judgment)}: want text that says what is wrong, "
            'null where nothing is, or "" where nobody judged'
        )
    try:
        judgment.encode("utf-8")
    except UnicodeEncodeError:
        raise ConfigError(
            f"{where}: field judgment: value {short(judgment)}: holds half of a surrogate pair, "
            "which is no text"
        ) from None
    if is_praise(judgment):
        return line | {"judgment": None}
    noise = noise_reason(judgment)
    if noise is not None:
        raise ConfigError(f"{where}: field judgment: value {judgment!r}: {noise}")
    return line


def _check_content(where: str, line: dict[str, Any], right: Sequence[str]) -> None:
    """The id is one that was exported, and belongs to what was, whose hashes are ``right``."""
    name, of = line["id"], line["of"]
    number, *parts = name.split("-") if isinstance(name, str) else [""]
    numbered = number.isdecimal() and len(number) <= len(str(2**63))
    known = numbered and type(of) is int and 1 <= int(number) <= of
    same = [part == content for part, content in zip(parts, right, strict=False)]
    if not known or len(parts) != len(right) or not any(same):
        raise ConfigError(f"{where}: field id: value {short(name)}: no id of what was exported")
    if not all(same):
        changed = _ANSWERED[0] if same[0] else _ASKED[0]
        raise ConfigError(
            f"{where}: field {changed}: is not what was exported as {name!r}: put it back, the "
            "judgment alone may change"
        )


def _identity(number: int, line: Mapping[str, Any]) -> str:
    return f"{number}-{_hash(line, _ASKED)}-{_hash(line, _ANSWERED)}"


def _hash(line: Mapping[str, Any], names: tuple[str, ...]) -> str:
    content = json.dumps([line.get(name) for name in names], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:12]
