"""An end for engines that hang inside the trainer's process, where nothing else can end them."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
# Waits are counted instead of reading a clock: what is suspended as a whole does not hang.
_WAITS = 20


class Watchdog:
    """Ends this process when an engine in it finishes nothing for ``limit_s`` seconds.

    A call that is stuck in a kernel or in another library's lock never comes back to Python, so
    that no exception can end it; a run that is killed goes on with ``--resume``.
    """

    def __init__(self, engine: str, limit_s: float) -> None:
        self._engine, self._limit_s = engine, limit_s
        self._beats = 0

    def beat(self) -> None:
        """Something is finished: the limit starts anew."""
        self._beats += 1

    def beats(self, items: Iterable[T]) -> Iterator[T]:
        """``items``, each of which starts the limit anew."""
        for item in items:
            self.beat()
            yield item

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside the block the limit holds."""
        over = threading.Event()
        watched = threading.get_ident()
        thread = threading.Thread(target=self._watch, args=(over, watched), daemon=True)
        try:
            thread.start()
            yield
        finally:
            over.set()

    def _watch(self, over: threading.Event, watched: int) -> None:
        seen, quiet = self._beats, 0
        while not over.wait(self._limit_s / _WAITS):
            quiet = quiet + 1 if self._beats == seen else 0
            seen = self._beats
            if quiet == _WAITS:
                self._end(watched)

    def _end(self, watched: int) -> None:
        line = (
            f"fastalign: rollout engine: {self._engine} has finished nothing in "
            f"{self._limit_s:g} s (rollout.timeout_s); it runs inside this process, which "
            f"therefore ends{_place(watched)}\n"
        )
        os.write(sys.stderr.fileno(), line.encode())
        os._exit(1)


def _place(thread: int) -> str:
    """Where in Python a thread is, for a message."""
    frame = sys._current_frames().get(thread)
    if frame is None:
        return ""
    return f"; it hangs in {frame.f_code.co_filename}:{frame.f_lineno}, {frame.f_code.co_name}"
