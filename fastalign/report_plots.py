"""Figures of the report: SVG by matplotlib, in the page's own colours and without words of anybody.

matplotlib draws in stand-in colours.  They become variables of the page's style, so that one
drawing serves light and dark, and runs become classes, which the page can hide.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

SVG = "{http://www.w3.org/2000/svg}"
# Units of the drawing; a figure scales to the column that it stands in.
WIDTH, HEIGHT = 400, 220
# Points of a curve that are marked each.
FEW_POINTS = 30
RUN_COLOURS, PART_COLOURS = 8, 12
INK, SOFT, PAPER = "#000001", "#000002", "#000003"
DASHES = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (6, 1.5, 1.5, 1.5)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_COLOURS = {
    INK: "var(--ink)",
    SOFT: "var(--line)",
    PAPER: "var(--paper)",
    **{f"#0001{i:02x}": f"var(--run{i})" for i in range(RUN_COLOURS)},
    **{f"#0002{i:02x}": f"var(--part{i})" for i in range(PART_COLOURS)},
}
_STYLE: Mapping[str, Any] = {
    "svg.fonttype": "none",
    "font.size": 11,
    "text.color": INK,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": SOFT,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "figure.facecolor": "none",
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-3, 4),
}


def run_colour(run: int) -> str:
    return f"#0001{run % RUN_COLOURS:02x}"


def part_colour(part: int) -> str:
    return f"#0002{part % PART_COLOURS:02x}"


def curve(
    name: str, title: str, lines: Sequence[tuple[int, Sequence[float], Sequence[float]]]
) -> tuple[Markup, list[float], list[float]]:
    """A figure of (run, steps, values), one line each.

    Returns:
        The drawing; left, top, right and bottom of its axes in its own units; and the steps at
        left and right.
    """
    with matplotlib.rc_context(dict(_STYLE)):
        figure, axes = _figure()
        for run, steps, values in lines:
            few = len(steps) <= FEW_POINTS
            axes.plot(
                steps,
                values,
                color=run_colour(run),
                linestyle=DASHES[(run + run // RUN_COLOURS) % len(DASHES)],
                marker=MARKERS[run % len(MARKERS)] if few else None,
                markersize=4,
                linewidth=1.6,
                gid=f"run{run}",
            )
        axes.set_xlabel("step")
        every = [step for _, steps, _ in lines for step in steps]
        if min(every) == max(every):
            axes.set_xlim(every[0] - 1, every[0] + 1)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        low, high = axes.get_xlim()
        box = axes.get_position()
        corners = [
            box.x0 * WIDTH, (1 - box.y1) * HEIGHT, box.x1 * WIDTH, (1 - box.y0) * HEIGHT,
        ]  # fmt: skip
        drawn = _svg(figure, name, f"{title} by step")
    return drawn, [round(float(x), 2) for x in corners], [float(low), float(high)]


def stacked_totals(name: str, runs: Sequence[str], seconds: Sequence[Sequence[float]]) -> Markup:
    """A bar for each run, of the seconds [part] of its parts."""
    with matplotlib.rc_context(dict(_STYLE)):
        height = 70 + 34 * len(runs)
        figure, axes = _figure(height, bottom=46)
        for r, own in enumerate(seconds):
            left = 0.0
            for p, value in enumerate(own):
                axes.barh(
                    r, value, left=left, height=0.7, color=part_colour(p), edgecolor=PAPER,
                    linewidth=0.8, gid=f"run{r}-part{p}",
                )  # fmt: skip
                left += value
        axes.set_ylim(len(runs) - 0.4, -0.6)
        # The names of runs are not ours to draw: they stand in the table, by number.
        axes.set_yticks(range(len(runs)), [f"run {r + 1}" for r in range(len(runs))])
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("seconds")
        return _svg(figure, name, "Seconds by part, one bar for each run", height)


def stacked_steps(
    name: str, parts: Sequence[tuple[int, tuple[Sequence[int], Sequence[float]]]]
) -> Markup:
    """Seconds of (part, (steps, values)) on top of each other."""
    every = sorted({step for _, (steps, _) in parts for step in steps})
    with matplotlib.rc_context(dict(_STYLE)):
        figure, axes = _figure()
        bottom = [0.0] * len(every)
        for p, (steps, values) in parts:
            # What is logged twice at one step, as rounds in which nothing was trained, adds up.
            at: dict[int, float] = {}
            for step, value in zip(steps, values, strict=True):
                at[step] = at.get(step, 0.0) + (value if math.isfinite(value) else 0.0)
            top = [low + at.get(step, 0.0) for step, low in zip(every, bottom, strict=True)]
            axes.fill_between(
                every, bottom, top, step="mid", color=part_colour(p), linewidth=0, gid=f"part{p}"
            )
            bottom = top
        axes.set_ylim(bottom=0)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        return _svg(figure, name, "Seconds by part and step")


def reliability(name: str, run: int, bins: Sequence[Mapping[str, float]]) -> Markup:
    """Accuracy with its interval over what the margins promise."""
    with matplotlib.rc_context(dict(_STYLE)):
        figure, axes = _figure()
        axes.plot([0.5, 1], [0.5, 1], color=INK, linewidth=1, linestyle=DASHES[1])
        accuracy = [b["accuracy"] for b in bins]
        axes.errorbar(
            [b["confidence"] for b in bins],
            accuracy,
            yerr=[
                [a - b["accuracy_low"] for a, b in zip(accuracy, bins, strict=True)],
                [b["accuracy_high"] - a for a, b in zip(accuracy, bins, strict=True)],
            ],
            fmt="o",
            markersize=5,
            color=run_colour(run),
        )
        axes.set(xlim=(0.48, 1.02), ylim=(-0.03, 1.03), xlabel="promised", ylabel="right")
        return _svg(figure, name, "How often the judge is right, by what its margin promises")


def _figure(height: float = HEIGHT, bottom: float = 42) -> tuple[Figure, Any]:
    # 72 points are an inch, and a point is a unit of the drawing.
    figure = Figure(figsize=(WIDTH / 72, height / 72))
    FigureCanvasSVG(figure)
    axes = figure.add_axes(
        (56 / WIDTH, bottom / height, 1 - 72 / WIDTH, 1 - (bottom + 18) / height)
    )
    return figure, axes


def _svg(figure: Figure, name: str, title: str, height: float = HEIGHT) -> Markup:
    """The drawing as an element of a page; ``name`` makes its ids its own."""
    with matplotlib.rc_context({"svg.hashsalt": name}):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            # What is known of the file, a style that the attributes repeat, and what holds nothing.
            empty = child.tag == f"{SVG}defs" and not len(child)
            if empty or child.tag in (f"{SVG}metadata", f"{SVG}style"):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.removeprefix(SVG)
        _declare(element)
    root.attrib.clear()
    return Markup(
        '<svg viewBox="0 0 {} {}" role="img" aria-label="{}" class="drawing">{}</svg>'
    ).format(
        WIDTH,
        round(height),
        title,
        Markup("".join(ElementTree.tostring(child, encoding="unicode") for child in root)),
    )


def _declare(element: ElementTree.Element) -> None:
    """Style as attributes, which a strict policy allows, in the page's colours; names of runs as
    classes; ids only where something refers to them."""
    for key in list(element.attrib):
        # References of SVG 1.1.
        if key.startswith("{http://www.w3.org/1999/xlink}"):
            element.set("href", element.attrib.pop(key))
    declared = element.attrib.pop("style", "")
    for part in filter(None, map(str.strip, declared.split(";"))):
        key, _, value = part.partition(":")
        key, value = key.strip(), value.strip()
        if key == "font":
            size = re.search(r"([\d.]+)px", value)
            key, value = "font-size", size[1] if size else "11"
        if key != "font-family":
            element.set(key, value)
    for key in ("fill", "stroke"):
        colour = element.get(key, INK if (element.tag, key) == ("text", "fill") else "")
        if colour in _COLOURS:
            element.set(key, _COLOURS[colour])
    named = element.get("id", "")
    found = re.fullmatch(r"(run\d+)(-part\d+)?|part\d+", named)
    if found or element.tag not in ("clipPath", "path"):
        element.attrib.pop("id", None)
    if found and found[1]:
        element.set("class", found[1])
