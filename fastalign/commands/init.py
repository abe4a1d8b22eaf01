"""``fastalign init``: a recipe for one's own model and data."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fastalign.commands.common import OK, add_command
from fastalign.errors import ConfigError

EXAMPLES = """\
  fastalign init cut --model ./model --data judgments.jsonl
  fastalign init self-judge --model runs/jsft --data prompts.jsonl --output self-judge.yaml
  fastalign init cut --online --data judgments.jsonl
"""
CODES = "  0 done, 2 the data is not for the method, something cannot be read, or the file is there"
METHODS = (
    "sft", "cut", "jsft", "dpo", "self-judge", "unlikelihood", "hindsight", "forward-prediction",
    "ilf-mle", "ilf-dpo", "rso", "rest", "raft",
)  # fmt: skip


def add(commands: Any) -> None:
    init = add_command(
        commands,
        "init",
        help="write a commented recipe for a model and data",
        examples=EXAMPLES,
        codes=CODES,
    )
    init.add_argument("method", choices=METHODS)
    init.add_argument("--model", metavar="M", help="folder or hub name; its size decides on LoRA")
    init.add_argument("--data", metavar="FILE", help="JSONL, JSON or Parquet, or a hub name")
    init.add_argument(
        "--online", action="store_true", help="train on the model's own answers, judged"
    )
    init.add_argument(
        "--output", metavar="FILE", default="recipe.yaml", help="default: recipe.yaml"
    )
    init.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    out = Path(arguments.output)
    if out.exists():
        raise ConfigError(f"{out}: is there already; name another file with --output")

    from fastalign.new_recipe import Request, draft
    from fastalign.schema import MODELINE

    made = draft(Request(arguments.method, arguments.model, arguments.data, arguments.online))
    try:
        # Nobody else's in the meantime either.
        with out.open("x", encoding="utf-8") as file:
            file.write(made.text)
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written: {error.strerror}") from None
    for note in made.notes:
        print(note)
    print(f"wrote {out}; next: fastalign train {out} --dry-run")
    print(
        f"for an editor: fastalign schema recipe.schema.json, and as the first line of {out}: "
        f"{MODELINE}recipe.schema.json"
    )
    return OK
