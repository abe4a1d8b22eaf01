"""``fastalign data``: a look at data before training."""

from __future__ import annotations

import argparse
from typing import Any

from fastalign.commands.common import OK, USAGE, add_command, whole_number

EXAMPLES = """\
  fastalign data check judgments.jsonl
  fastalign data check judgments.jsonl --model ./model --max-length 1024
  fastalign data check --recipe recipe.yaml
  fastalign data check pairs.parquet more-pairs.jsonl --model ./model --template alpaca --json
"""
CODES = "  0 every file can be trained on, 2 one cannot"
KINDS = ("preference", "judged", "completion", "prompt", "messages")


def add(commands: Any) -> None:
    data = add_command(
        commands, "data", help="look at data before training", examples=EXAMPLES, codes=CODES
    )
    check = add_command(
        data.add_subparsers(dest="data_command", required=True),
        "check",
        help="what files hold, and what training would make of it",
        examples=EXAMPLES,
        codes=CODES,
    )
    check.add_argument("files", nargs="*", metavar="FILE", help="JSONL, JSON or Parquet")
    check.add_argument(
        "--recipe", help="look at a recipe's data sets instead, by its method, model and templates"
    )
    check.add_argument(
        "--model", help="folder or hub name whose tokenizer counts lengths and renders rows"
    )
    check.add_argument("--template", help="as a dataset's in a recipe; needs --model")
    check.add_argument(
        "--max-length", type=whole_number(1), metavar="N", help="as in a recipe; needs --model"
    )
    check.add_argument("--as", dest="kind", choices=KINDS, help="read the rows as this kind")
    check.add_argument("--json", action="store_true", help="the whole report as JSON")
    check.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from fastalign.config import load_config
    from fastalign.data_check import Settings, check_files

    recipe = load_config(arguments.recipe) if arguments.recipe else None
    settings = Settings(
        arguments.model, arguments.template, arguments.max_length, arguments.kind, recipe
    )
    return OK if check_files(arguments.files, settings, as_json=arguments.json) else USAGE
