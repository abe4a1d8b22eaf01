"""``fastalign report``: what runs did, on one page."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fastalign.commands.common import OK, add_command

EXAMPLES = """\
  fastalign report runs/first
  fastalign report runs/first runs/second --output comparison.html
"""
CODES = "  0 done, 2 a folder holds no run, or the page cannot be written"


def add(commands: Any) -> None:
    report = add_command(
        commands,
        "report",
        help="one page of what runs were set to, did and wrote",
        examples=EXAMPLES,
        codes=CODES,
    )
    report.add_argument("runs", nargs="+", metavar="RUN", help="output_dir of a training run")
    report.add_argument(
        "--output", default="report.html", metavar="FILE", help="default: report.html"
    )
    report.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from fastalign.report import read_runs, status, write

    runs = read_runs([Path(name) for name in arguments.runs])
    write(runs, Path(arguments.output))
    for found in runs:
        print(f"{found.name}: {status(found)}")
    print(f"wrote {arguments.output}")
    return OK
