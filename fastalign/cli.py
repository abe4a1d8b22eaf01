"""The ``fastalign`` command: parse, call, exit code.

Exit codes: 0 done, 1 failed, 2 wrong recipe, data or command line, 75 paused with a checkpoint.
"""

from __future__ import annotations

import argparse
import os
import re
import sys

from fastalign import __version__, _compat, logs
from fastalign.commands import (
    completion,
    data,
    demo,
    doctor,
    evaluate,
    export,
    generate,
    init,
    inspect,
    judge,
    report,
    schema,
    train,
)
from fastalign.commands.common import EXIT_CODES, FAILED, USAGE, complain
from fastalign.errors import ConfigError

# In the order of --help.
COMMANDS = (
    train,
    demo,
    generate,
    inspect,
    data,
    judge,
    evaluate,
    report,
    doctor,
    schema,
    completion,
    export,
    init,
)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastalign",
        description="Align a language model from judgments.",
        epilog=f"exit codes:\n{EXIT_CODES}\n\nfastalign COMMAND --help has examples.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fastalign {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    # Completion is made from all of it.
    parser.set_defaults(parser=parser)
    for command in COMMANDS:
        command.add(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    if not (sys.argv[1:] if argv is None else argv):
        parser.print_help(sys.stderr)
        return USAGE
    arguments, passed_on = parser.parse_known_args(argv)
    options = passed_on
    if hasattr(arguments, "overrides"):
        overrides, options = _separate(passed_on)
        arguments.overrides = [*arguments.overrides, *overrides]
    if hasattr(arguments, "torchrun_options"):
        arguments.torchrun_options = options
    elif options:
        parser.error(f"unrecognized arguments: {' '.join(options)}")
    logs.configure(getattr(arguments, "logs", "plain"))
    if "LOCAL_RANK" not in os.environ:
        for line in _compat.outside_ranges():
            print(logs.line("note", line), file=sys.stderr, end="")
    try:
        code: int = arguments.run(arguments)
        return code
    except ConfigError as error:
        complain(str(error))
        return USAGE
    except KeyboardInterrupt:
        print(logs.line("error", "interrupted"), file=sys.stderr, end="")
        return FAILED


def _separate(passed_on: list[str]) -> tuple[list[str], list[str]]:
    """(overrides, options for torchrun) of what argparse did not take.

    It takes positional arguments in one go: overrides behind an option of ours are left over.
    """
    overrides: list[str] = []
    options: list[str] = []
    for item in passed_on:
        is_value = bool(options) and options[-1].startswith("--") and "=" not in options[-1]
        if re.match(r"[A-Za-z_][\w.]*=", item) and not is_value:
            overrides.append(item)
        else:
            options.append(item)
    return overrides, options
