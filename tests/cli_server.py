"""Runs many ``fastalign`` commands, each in a process of its own, and imports torch once.

    python tests/cli_server.py CASES.json RESULTS.json

CASES: name -> arguments.  RESULTS: name -> [exit code, stdout, stderr], as the file descriptors saw
them.  A case runs in a fork of this process, which has only imported: no thread, no random state
and no process group is inherited.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any, NoReturn

import fastalign.train  # noqa: F401  what takes long to import
from fastalign.cli import main


def run(arguments: list[str]) -> list[Any]:
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        pid = os.fork()
        if pid == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            become(arguments)
        _, status = os.waitpid(pid, 0)
        out.seek(0)
        err.seek(0)
        return [os.waitstatus_to_exitcode(status), out.read(), err.read()]


def become(arguments: list[str]) -> NoReturn:
    """What ``python -m fastalign`` does with these arguments, up to the exit."""
    code: Any = 1
    try:
        code = main(arguments)
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)


if __name__ == "__main__":
    cases = json.loads(Path(sys.argv[1]).read_text())
    results = {name: run(arguments) for name, arguments in cases.items()}
    Path(sys.argv[2]).write_text(json.dumps(results))
