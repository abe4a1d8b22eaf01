"""SIGTERM and SIGINT: a run ends at the next point where all ranks can, with a checkpoint."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

from fastalign import logs

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# A scheduler's signal may come to a process twice, directly and from the one that started it.
AGAIN_S = 2.0


class Interrupted(BaseException):
    """A signal came where the run may stop at once."""


class Stop:
    """Whether the run was asked to end, on any rank.

    While nothing is trained yet the first signal raises :class:`Interrupted`; from :meth:`started`
    on it waits until all ranks ask, but where :meth:`at_once` says that none waits for another.  A
    second one, ``AGAIN_S`` seconds later, ends the process as if nobody listened.
    """

    def __init__(self) -> None:
        self.heard: signal.Signals | None = None
        self._heard_at = 0.0
        self._at_once = True

    @property
    def reason(self) -> str:
        return self.heard.name if self.heard is not None else "a signal to another process"

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals inside the block, where this thread may."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._hear) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def started(self) -> None:
        """From here on there is something to save, together."""
        self._at_once = False

    @contextlib.contextmanager
    def at_once(self, when: bool) -> Iterator[None]:
        """Inside the block, a signal raises :class:`Interrupted` if ``when``: no other rank waits
        for this one, and what is trained is not being changed."""
        self._at_once = when
        try:
            if when and self.heard is not None:
                raise Interrupted
            yield
        finally:
            self._at_once = False

    def _hear(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.heard is not None:
            if now - self._heard_at > AGAIN_S:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        self.heard, self._heard_at = signal.Signals(number), now
        if os.environ.get("RANK", "0") == "0":
            # Not print: the signal may have come in the middle of one.
            line = logs.line("note", f"{self.reason}: stopping; once more: at once")
            os.write(sys.stderr.fileno(), line.encode())
        if self._at_once:
            raise Interrupted
