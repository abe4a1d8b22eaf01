"""Runs one rank of many tests, each in a process of its own, and imports torch once.

    python tests/rank_server.py

Each line of standard input asks for one process: {"command": [FILE, ARGUMENT, ...], "environment":
{...}, "folder": PATH, "log": PATH}.  Standard output answers with {"pid": ...} and, when the
process has ended, {"exit": ...}.  It is a fork of this one, which has only imported: there is no
process group, and no random state but the one that a fresh process has.  What forks of one server
have alike is how they hash strings, and with it the order of their sets; so each rank has a server
of its own.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

# Libraries that print while they are imported do not answer.
ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)

import fastalign.train  # noqa: E402,F401  what takes long to import


def answer(**what: int) -> None:
    print(json.dumps(what), file=ANSWERS, flush=True)


def become(request: dict[str, Any]) -> list[str]:
    """Turn this fork into the process that is asked for; returns its command."""
    import numpy as np

    ANSWERS.close()
    with open(os.devnull) as nothing, open(request["log"], "a") as log:
        for descriptor, file in enumerate((nothing, log, log)):
            os.dup2(file.fileno(), descriptor)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    np.random.seed()
    return request["command"]


def serve() -> list[str] | None:
    """The command of this process, in a fork; None in the server, at its end."""
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            return become(request)
        answer(pid=pid)
        _, status = os.waitpid(pid, 0)
        answer(exit=os.waitstatus_to_exitcode(status))
    return None


if __name__ == "__main__":
    command = serve()
    if command is not None:
        sys.argv = command
        # As `python FILE` has it.
        sys.path[0] = str(Path(command[0]).resolve().parent)
        runpy.run_path(command[0], run_name="__main__")
