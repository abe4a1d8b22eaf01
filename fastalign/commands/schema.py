"""``fastalign schema``: the recipe's JSON Schema."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fastalign.commands.common import OK, add_command
from fastalign.errors import ConfigError

EXAMPLES = """\
  fastalign schema recipe.schema.json
  fastalign schema | jq .properties.learning_rate

With the line
  # yaml-language-server: $schema=recipe.schema.json
at the top of a recipe, editors with YAML's language server complete and check its keys.
"""
CODES = "  0 done, 2 the file cannot be written"


def add(commands: Any) -> None:
    schema = add_command(
        commands,
        "schema",
        help="write the recipe's JSON Schema, for editors",
        examples=EXAMPLES,
        codes=CODES,
    )
    schema.add_argument("out", nargs="?", metavar="FILE", help="default: standard output")
    schema.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from fastalign.schema import recipe_schema

    text = json.dumps(recipe_schema(), indent=2, ensure_ascii=False)
    if arguments.out is None:
        print(text)
        return OK
    try:
        Path(arguments.out).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{arguments.out}: cannot be written: {error.strerror}") from None
    return OK
