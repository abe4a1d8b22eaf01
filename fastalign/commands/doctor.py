"""``fastalign doctor``: whether the installation works."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

from fastalign.commands.common import FAILED, OK, add_command
from fastalign.doctor import CHECKS, examine
from fastalign.errors import ConfigError

EXAMPLES = """\
  fastalign doctor
  fastalign doctor gpu kernels
  fastalign doctor --json > doctor.json
"""
CODES = "  0 nothing is wrong (warnings do not count), 1 something is, 2 no such check"
MARKS = {"ok": "ok", "warning": "WARNING", "error": "ERROR"}


def add(commands: Any) -> None:
    doctor = add_command(
        commands,
        "doctor",
        help="check the installation, and say what to do about each finding",
        examples=EXAMPLES,
        codes=CODES,
    )
    doctor.add_argument(
        "checks",
        nargs="*",
        metavar="CHECK",
        help=f"only these, of {', '.join(CHECKS)}; default: all",
    )
    doctor.add_argument("--json", action="store_true", help="the findings as JSON")
    doctor.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    unknown = [name for name in arguments.checks if name not in CHECKS]
    if unknown:
        raise ConfigError(f"{unknown[0]!r} is no check: known are {', '.join(CHECKS)}")
    found = []
    for check, findings in examine(arguments.checks or tuple(CHECKS)):
        found += [{"check": check} | dataclasses.asdict(finding) for finding in findings]
        for finding in findings if not arguments.json else ():
            print(f"{MARKS[finding.level]:8} {check:10} {finding.message}", flush=True)
            if finding.advice:
                print(f"{'':19} -> {finding.advice}", flush=True)
    levels = [finding["level"] for finding in found]
    wrong, doubtful = levels.count("error"), levels.count("warning")
    if arguments.json:
        print(json.dumps({"ok": not wrong, "findings": found}, indent=1))
    else:
        print(f"{wrong} wrong, {doubtful} to look at" if wrong or doubtful else "nothing is wrong")
    return FAILED if wrong else OK
