"""What the commands share: exit codes, argument types, and how a mistake is told."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fastalign import logs
from fastalign.errors import ConfigError
from fastalign.printing import printable

if TYPE_CHECKING:
    from fastalign.config import JudgeConfig, RolloutConfig

OK, FAILED, USAGE, PAUSED = 0, 1, 2, 75
# How long a rank with a mistake waits for the first one to name it.
PATIENCE_S = 10.0
EXIT_CODES = """\
  0 done, 1 failed, 2 something in the recipe, the data or the command line is wrong,
  75 paused with a checkpoint"""


def add_command(
    commands: Any, name: str, *, help: str, examples: str, codes: str = EXIT_CODES
) -> argparse.ArgumentParser:
    """A command whose ``--help`` ends with examples, what they leave open, and exit codes."""
    description = help[0].upper() + help[1:] + "."
    epilog = f"examples:\n{examples.rstrip()}\n\nexit codes:\n{codes}"
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser


def whole_number(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r}: want a whole number from {least} on")
        return int(text)

    return read


def json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r}: want a JSON object")
    return value


def judge_and_engine(
    arguments: argparse.Namespace, *, beside_another: float
) -> tuple[JudgeConfig, RolloutConfig]:
    """Who judges, and the engine of local models: by default it takes 0.9 of the GPU's memory, or
    ``beside_another`` where another model judges."""
    from fastalign.config import JudgeConfig, RolloutConfig, load_judge

    name, principles = arguments.judge or "self", tuple(arguments.principle or ())
    judge = JudgeConfig(type="self") if name == "self" else load_judge(name)
    if principles and judge.type == "rule":
        raise ConfigError(f"--principle: the judge of {name} is a rule, which is told of none")
    if principles and judge.principles:
        raise ConfigError(f"--principle: {name} has principles already: name them in one place")
    if principles:
        judge = judge.model_copy(update={"principles": principles})
    share = arguments.gpu_memory_utilization
    if share is None:
        share = beside_another if judge.type == "model" else 0.9
    if not 0 < share <= 1:
        raise ConfigError(f"--gpu-memory-utilization = {share}: want a share above 0, at most 1")
    return judge, RolloutConfig(engine=arguments.engine or "auto", gpu_memory_utilization=share)


def complain(message: str) -> None:
    """One line for the user, from one rank.

    Every rank reads the same recipe and data, so the first speaks for all.  The others give it the
    time to, because torchrun stops everybody when one rank ends.
    """
    if os.environ.get("RANK", "0") != "0":
        time.sleep(PATIENCE_S)
    print(logs.line("error", printable(message)), file=sys.stderr, end="", flush=True)
