"""Runs one rank of many tests, each in a process of its own, and imports torch once.

    python tests/rank_server.py

Each line of standard input asks for one process: {"command": [FILE, ARGUMENT, ...], "environment":
{...}, "log": PATH}.  A line of standard output has its process id, and the next its exit code, when
it has ended.  It is a fork of this process, which has only imported: no random state and no process
group is inherited.  Each rank has a server of its own, because a fork hashes strings as its parent
does: the ranks' sets would all have one order, which they have not in a run.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path

import fastalign.train  # noqa: F401  what takes long to import


def requested() -> list[str] | None:
    """What this process has to run, in the fork that has to; None in the server, at its end."""
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            answers.close()
            with open(os.devnull) as nothing, open(request["log"], "a") as log:
                for descriptor, file in enumerate((nothing, log, log)):
                    os.dup2(file.fileno(), descriptor)
            os.environ.clear()
            os.environ.update(request["environment"])
            return request["command"]
        print(pid, file=answers, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)
    return None


if __name__ == "__main__":
    command = requested()
    if command is not None:
        sys.argv = command
        # As `python FILE` has it.
        sys.path[0] = str(Path(command[0]).resolve().parent)
        runpy.run_path(command[0], run_name="__main__")
