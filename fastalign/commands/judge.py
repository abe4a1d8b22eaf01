"""``fastalign judge``: judgments by people."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fastalign.commands.common import OK, add_command

EXAMPLES = """\
  fastalign judge export runs/cut/episodes/0000.jsonl to-judge.jsonl --all
  fastalign judge import to-judge.jsonl judged.jsonl

In each line of the exported file, write into "judgment" what is wrong with the completion, null
where nothing is, or leave "" where you do not judge. The result trains with method: cut.
"""
CODES = "  0 done, 2 something in a file or the command line is wrong"


def add(commands: Any) -> None:
    judge = add_command(
        commands, "judge", help="let people judge answers", examples=EXAMPLES, codes=CODES
    )
    judge.set_defaults(run=run)
    ways = judge.add_subparsers(dest="way", required=True)
    export = add_command(
        ways,
        "export",
        help="write out the answers that need a judgment",
        examples=EXAMPLES,
        codes=CODES,
    )
    export.add_argument("answers", help="episodes of an online run, or rows: prompt, completion")
    export.add_argument("out", help="JSONL file to fill in")
    export.add_argument("--all", action="store_true", help="also answers that have a judgment")
    back = add_command(
        ways,
        "import",
        help="check a filled file and make training data of it",
        examples=EXAMPLES,
        codes=CODES,
    )
    back.add_argument("filled", help="what was exported, with judgments")
    back.add_argument("result", help="JSONL file to train on")


def run(arguments: argparse.Namespace) -> int:
    from fastalign import people

    if arguments.way == "export":
        exported = people.export(arguments.answers, Path(arguments.out), everything=arguments.all)
        print(f"{exported.answers} of {exported.of} answers to judge: {arguments.out}")
        for line in exported.drops.lines():
            print(f"  left out {line}")
        done, sampled = exported.answers, exported.sampled
    else:
        imported = people.import_judgments(Path(arguments.filled), Path(arguments.result))
        print(
            f"{imported.judged} judged, {imported.fine} fine, {imported.left_open} left open: "
            f"{arguments.result}"
        )
        done, sampled = imported.judged + imported.fine, imported.sampled
    if sampled:
        print(f"{sampled} with their tokens as sampled")
    if sampled < done:
        print(f"{done - sampled} without tokens: their text will be tokenised to train on it")
    return OK
