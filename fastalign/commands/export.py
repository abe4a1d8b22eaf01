"""``fastalign export``: a result as a plain model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fastalign.commands.common import FAILED, OK, add_command, complain
from fastalign.errors import ConfigError

EXAMPLES = """\
  fastalign export runs/cut exported/cut
  fastalign export runs/cut exported/cut --dtype float32
  fastalign export runs/cut/best exported/best --base ./my-model --push-to-hub me/my-model

An adapter is merged into its base in float32. Where the dtype that is written would lose more than
--max-loss of what the adapter changes, nothing is written. Whole weights are held to the same where
--dtype rounds them, against the model that the run began from.
"""
CODES = """\
  0 done, 1 the hub was not reached or refused, 2 the adapter, its base, the dtype or the command
  line will not do"""


def add(commands: Any) -> None:
    export = add_command(
        commands,
        "export",
        help="write a result as a plain model, its adapter merged",
        examples=EXAMPLES,
        codes=CODES,
    )
    option = export.add_argument
    option("source", metavar="RUN_OR_ADAPTER", help="output_dir of a run, or an adapter's folder")
    option("out", metavar="OUT", help="folder that is made")
    option("--base", metavar="MODEL", help="default: the one that the adapter or the run names")
    option(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="default: as the base, or the run, is stored",
    )
    option(
        "--max-loss",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="of what was learnt that the dtype may lose; default: 0.05",
    )
    option("--trust-remote-code", action="store_true", help="run the code that the base brings")
    option("--push-to-hub", metavar="REPO", help="then upload it, as NAME or OWNER/NAME")
    option("--private", action="store_true", help="of a repository that is made for it")
    export.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    if not 0 <= arguments.max_loss <= 1:
        raise ConfigError(f"--max-loss {arguments.max_loss:g}: want a share from 0 to 1")
    if arguments.private and arguments.push_to_hub is None:
        raise ConfigError("--private goes with --push-to-hub")

    from transformers.utils import logging as transformers_logging

    from fastalign.export import PushError, Settings, check_push, export, push

    transformers_logging.disable_progress_bar()
    settings = Settings(
        source=arguments.source,
        out=Path(arguments.out),
        base=arguments.base,
        dtype=arguments.dtype,
        max_loss=arguments.max_loss,
        trust_remote_code=arguments.trust_remote_code,
    )
    repository = arguments.push_to_hub
    try:
        if repository is not None:
            check_push(repository)
        for line in export(settings).lines():
            print(line)
        print(settings.out)
        if repository is not None:
            print(push(settings.out, repository, private=arguments.private))
    except PushError as error:
        complain(str(error))
        return FAILED
    return OK
