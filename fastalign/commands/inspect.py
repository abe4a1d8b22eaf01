"""``fastalign inspect``: which tokens CUT flags."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fastalign.commands.common import FAILED, OK, add_command, complain, whole_number

EXAMPLES = """\
  fastalign inspect recipes/cut-offline.yaml model_name_or_path=./model datasets.0.path=data.jsonl
  fastalign inspect recipe.yaml --records 64 --out flags
"""


def add(commands: Any) -> None:
    inspect = add_command(
        commands, "inspect", help="show which tokens CUT flags, and why", examples=EXAMPLES
    )
    inspect.add_argument("recipe", help="YAML file with method: cut")
    inspect.add_argument("overrides", nargs="*", default=[], metavar="key.sub=value")
    inspect.add_argument(
        "--records",
        type=whole_number(1),
        default=32,
        help="how many, negative ones first",
    )
    inspect.add_argument("--seed", type=whole_number(0), help="default: the recipe's")
    inspect.add_argument("--out", help="folder of the results; default: inspect in output_dir")
    inspect.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from fastalign.config import load_config

    config = load_config(arguments.recipe, arguments.overrides)

    from fastalign.inspection import inspect, write

    folder = Path(arguments.out or Path(config.output_dir, "inspect"))
    try:
        inspection = inspect(config, count=arguments.records, seed=arguments.seed)
    except FloatingPointError as error:
        complain(str(error))
        return FAILED
    for line in (*inspection.lines, inspection.summary()):
        print(line)
    for path in write(inspection, folder):
        print(f"wrote {path}")
    return OK
