"""Texts and values of strangers, for a terminal and in error lines."""

from __future__ import annotations

import unicodedata
from typing import Any

_REORDERING = ("LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI")
# Controls, halves of surrogate pairs, and what other programs end a line at.
_STEERING = ("Cc", "Cs", "Zl", "Zp")


def printable(text: str) -> str:
    """The text with everything written out that would steer a terminal, reorder a line or cannot be
    encoded; line feeds and tabs stay."""
    return "".join(c if c in "\n\t" else _written(c) for c in text)


def one_line(text: str) -> str:
    """As :func:`printable`, with line feeds and tabs written out too."""
    return "".join(map(_written, text))


def _written(character: str) -> str:
    steers = unicodedata.category(character) in _STEERING
    reorders = unicodedata.bidirectional(character) in _REORDERING
    return character.encode("unicode_escape").decode() if steers or reorders else character


def short(value: Any, limit: int = 60) -> str:
    """The beginning of how Python writes a value."""
    text = repr(value[:limit] if isinstance(value, str) else value)
    return text if len(text) <= limit + 2 else text[:limit] + "..."


def reason(error: BaseException) -> str:
    """The first line of what a library's error says, behind its name where it is one that readers
    of files do not usually raise."""
    name = type(error).__name__
    line = next(iter(str(error).strip().splitlines()), name).rstrip()
    usual = isinstance(error, OSError | ValueError | ImportError) or line == name
    return line if usual else f"{name}: {line}"
