"""The demo's judge by rule: phrases that an answer should do without, and words about them.

A rule knows the spans that it objects to, so the demo can count how many of them CUT finds.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fastalign.judge import Answer

OPENINGS = (
    "Great question!",
    "What a lovely topic!",
    "Thank you for asking!",
)
"""The habit that is planted by SFT: an answer should start with the answer."""

FILLERS = (
    r"\bone of the (?:most|best|key|main)\b",
    r"\bthe (?:most|best)\b",
    r"\bcan be an?\b",
    r"\bis a great way to\b",
    r"\bit(?:'s| is) (?:always |also )?(?:important|essential|crucial|best)\b",
    r"\ba (?:wide |large )?(?:variety|range|number) of\b",
    r"\ba sense of\b",
)
"""Crutches that SmolLM2-135M-Instruct writes by itself: superlatives and empty connectives."""


_OPENING = re.compile(
    r"\s*([^.!?\n]{1,40}!|(?:" + "|".join(o.rstrip("!") for o in OPENINGS) + r")\b[.,:;]?)",
    re.IGNORECASE,
)


def opening_spans(text: str) -> list[tuple[int, int]]:
    """Character span of an opening exclamation, in the planted words or others, or of the planted
    words with another mark: a model must not get around the rule by rewording."""
    match = _OPENING.match(text)
    return [match.span(1)] if match else []


def filler_spans(text: str) -> list[tuple[int, int]]:
    """Character spans of filler phrases, in order, not overlapping."""
    found = sorted(
        match.span() for pattern in FILLERS for match in re.finditer(pattern, text, re.IGNORECASE)
    )
    spans: list[tuple[int, int]] = []
    for span in found:
        if not spans or span[0] >= spans[-1][1]:
            spans.append(span)
    return spans


SPANS: dict[str, Callable[[str], list[tuple[int, int]]]] = {
    "habit": opening_spans,
    "natural": filler_spans,
}


def judge_habit(prompt: Sequence[Mapping[str, Any]], answer: str) -> str | None:
    """A written judgment about a planted opening, or None."""
    spans = opening_spans(answer)
    if not spans:
        return None
    a, b = spans[0]
    return (
        f'The response starts with the empty phrase "{answer[a:b]}" instead of the answer itself.'
    )


def judge_natural(prompt: Sequence[Mapping[str, Any]], answer: str) -> str | None:
    """A written judgment about filler phrases, or None."""
    spans = filler_spans(answer)
    if not spans:
        return None
    quoted = ", ".join(f'"{answer[a:b]}"' for a, b in spans)
    return f"The response contains the empty phrases {quoted}, which say nothing."


class Shuffled:
    """A control: the judgments of a batch, dealt out to other answers."""

    def __init__(self, rule: Callable[..., str | None]) -> None:
        self.rule = rule

    def judge(self, answers: Sequence[Answer]) -> list[str | None]:
        judgments = [self.rule(answer.prompt, answer.text) for answer in answers]
        order = np.random.default_rng(len(answers)).permutation(len(answers))
        return [judgments[i] for i in order]


def prefer_by_coin(prompt: Sequence[Mapping[str, Any]], a: str, b: str) -> float:
    """A control: decides the pairs that the rule for openings decides, but tosses a coin for the
    answer it prefers, the same in both orders."""
    if bool(opening_spans(a)) == bool(opening_spans(b)):
        return 0.0
    first, second = sorted((a, b))
    heads = zlib.crc32(f"{first}\0{second}".encode()) % 2 == 0
    return 1.0 if (a == first) == heads else -1.0


WRITTEN = {"habit": judge_habit, "natural": judge_natural}

shuffled_habit = Shuffled(judge_habit)
