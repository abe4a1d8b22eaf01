"""``fastalign demo``: both methods on a small real model."""

from __future__ import annotations

import argparse
from typing import Any

from fastalign.commands.common import add_command

EXAMPLES = """\
  fastalign demo
  fastalign demo --output-dir runs/demo-1 --seed 1
"""


def add(commands: Any) -> None:
    demo = add_command(
        commands,
        "demo",
        help="train a small real model by both methods, and print before and after",
        examples=EXAMPLES,
    )
    demo.add_argument("--output-dir", default="runs/demo")
    demo.add_argument("--seed", type=int, default=0)
    demo.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from fastalign.demo.run import run_demo

    return run_demo(arguments.output_dir, arguments.seed)
