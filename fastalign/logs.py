"""What a command says on stderr: lines for people, or JSON objects, one a line, for programs."""

from __future__ import annotations

import datetime
import json
import logging
import math
import sys
import traceback
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Literal, TextIO

Style = Literal["plain", "quiet", "json"]
# A process has one stderr: what is said of it belongs to the process, as logging's settings do.
_style: Style = "plain"


def configure(chosen: Style) -> None:
    """Decide how this process speaks.

    ``plain``: lines for people, with a bar on a terminal; ``quiet``: what is wrong, and why a run
    paused; ``json``: everything as events, the warnings of libraries and unforeseen errors among
    them.
    """
    global _style
    _style = chosen
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, _Handler)]:
        root.removeHandler(handler)
    # Who calls from Python may have handlers of their own.
    if chosen == "json" or not root.handlers:
        root.addHandler(_Handler(chosen))
    logging.captureWarnings(chosen == "json")
    sys.excepthook = _excepthook if chosen == "json" else sys.__excepthook__


def style() -> Style:
    return _style


def emit(event: str, **fields: Any) -> None:
    """One JSON object on stderr."""
    sys.stderr.write(_event(event, fields))
    sys.stderr.flush()


def line(event: str, message: str) -> str:
    """What is told in every style: text for people, or an event with this ``message``."""
    if _style == "json":
        return _event(event, {"message": message})
    return f"fastalign: {message}\n"


def finite(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """Metrics as JSON knows them: what is no number becomes null."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def _event(event: str, fields: Mapping[str, Any]) -> str:
    time = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    row = {"time": time, "event": event, **fields}
    return json.dumps(row, ensure_ascii=False, allow_nan=False, default=str) + "\n"


class _Handler(logging.StreamHandler[TextIO]):
    """Warnings and errors of libraries."""

    def __init__(self, chosen: Style) -> None:
        super().__init__()
        plain = logging.Formatter("%(levelname)s %(name)s: %(message)s")
        self.setFormatter(_JsonFormatter() if chosen == "json" else plain)


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = {"message": record.getMessage(), "logger": record.name}
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        kind = "error" if record.levelno >= logging.ERROR else "warning"
        return _event(kind, fields).rstrip("\n")


def _excepthook(
    kind: type[BaseException], error: BaseException, where: TracebackType | None
) -> None:
    lines = "".join(traceback.format_exception(kind, error, where))
    emit("error", message=f"{kind.__name__}: {error}", traceback=lines)
