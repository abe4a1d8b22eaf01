"""``fastalign train``: by a recipe, in this process or in one for each GPU."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import json
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from fastalign.commands.common import (
    FAILED,
    OK,
    PAUSED,
    USAGE,
    add_command,
    complain,
    whole_number,
)
from fastalign.errors import ConfigError
from fastalign.preemption import SIGNALS, Interrupted, Stop

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from fastalign.config import Config

# Processes that the main thread has started, where the system tells.
CHILDREN = Path(f"/proc/self/task/{os.getpid()}/children")
# What a disk that is full, broken or not ours says; anything else is a mistake of the program.
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
TOO_EARLY = "before the first step: there is nothing to save; start the same again"
EXAMPLES = """\
  fastalign train recipes/cut-offline.yaml model_name_or_path=./model datasets.0.path=data.jsonl
  fastalign train recipe.yaml learning_rate=1e-5 nproc_per_node=2
  fastalign train recipe.yaml --dry-run
  fastalign train recipe.yaml --dry-run --gpus 8 --gpu h100
  fastalign train recipe.yaml nproc_per_node=8 --nnodes 2 --node_rank 0 --master_addr 10.0.0.1

Options after the overrides that start with -- are torchrun's and are passed on to it.
"""


def add(commands: Any) -> None:
    train = add_command(commands, "train", help="train by a recipe", examples=EXAMPLES)
    train.add_argument("recipe", help="YAML file")
    train.add_argument("overrides", nargs="*", default=[], metavar="key.sub=value")
    train.add_argument("--dry-run", action="store_true", help="print the resolved recipe and stop")
    planning = train.add_argument_group("with --dry-run, a plan of the memory").add_argument
    planning("--gpus", type=whole_number(1), metavar="N", help="how many, of all nodes")
    planning("--gpu", metavar="NAME", help="a100-40, a100-80, h100, h200, b200, l40s, 4090, ...")
    planning("--gpu-memory", type=float, metavar="GIB", help="of a GPU that has no name here")
    planning("--calibration", metavar="RUN", help="a run on such a GPU, to take times from")
    planning("--json", action="store_true", help="the whole plan as JSON")
    train.add_argument(
        "--resume", action="store_true", help="continue from the newest checkpoint of output_dir"
    )
    voice = train.add_mutually_exclusive_group()
    for name, said in (
        ("quiet", "say on stderr what is wrong, and nothing else"),
        ("json-logs", "progress as JSON on stderr, one object a line"),
    ):
        voice.add_argument(
            f"--{name}", dest="logs", action="store_const", const=name.split("-")[0], help=said
        )
    train.set_defaults(run=run, torchrun_options=[], logs="plain")


def run(arguments: argparse.Namespace) -> int:
    from fastalign.config import load_config

    overrides = list(arguments.overrides)
    _check_planning(arguments)
    if arguments.resume:
        overrides.append("resume_from_checkpoint=true")
    config = load_config(arguments.recipe, overrides)

    from fastalign.methods import complete, make_method

    try:
        config = complete(config)
        make_method(config)
    except ConfigError as error:
        raise ConfigError(f"{arguments.recipe}: {error}") from None
    if arguments.dry_run:
        return _plan(arguments, config)
    if "LOCAL_RANK" not in os.environ:
        processes = _processes(config)
        if processes > 1 or arguments.torchrun_options:
            try:
                flags = {"plain": [], "quiet": ["--quiet"], "json": ["--json-logs"]}
                own = [arguments.recipe, *overrides, *flags[arguments.logs]]
                return _torchrun(processes, arguments.torchrun_options, own)
            except Interrupted:
                complain(f"paused: a signal {TOO_EARLY}")
                return PAUSED

    return _train_here(config)


def _train_here(config: Config) -> int:
    """One rank's share of a run."""
    from fastalign.checkpoint import CheckpointError
    from fastalign.endpoint import JudgeError
    from fastalign.rollout import EngineError
    from fastalign.train import Paused, train

    stop = Stop()
    try:
        # What is told is told behind it: torchrun ends the ranks that still listen by SIGKILL.
        with stop.listening():
            train(config, stop)
    except Interrupted:
        complain(f"paused: {stop.reason} {TOO_EARLY}")
        return PAUSED
    except EngineError as error:
        complain(f"rollout engine: {error}")
        return FAILED
    except (CheckpointError, FloatingPointError, JudgeError) as error:
        complain(str(error))
        return FAILED
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        complain(f"{error.filename or config.output_dir}: {error.strerror}")
        return FAILED
    except Paused as reason:
        complain(f"paused: {reason}")
        return PAUSED
    return OK


def _check_planning(arguments: argparse.Namespace) -> None:
    """Refuse options of a plan that would say nothing."""
    for name in ("gpus", "gpu", "gpu_memory", "calibration", "json"):
        said = getattr(arguments, name) not in (None, False)
        if said and not (arguments.dry_run and arguments.gpus):
            raise ConfigError(f"--{name.replace('_', '-')} goes with --dry-run and --gpus N")


def _plan(arguments: argparse.Namespace, config: Config) -> int:
    """The resolved recipe; with --gpus what it takes of their memory instead."""
    from fastalign.config import dump_config

    if arguments.gpus is None:
        print(dump_config(config), end="")
        return OK

    from rich.console import Console

    from fastalign import plan

    planner = plan.Planner(config, plan.find_gpu(arguments.gpu, arguments.gpu_memory))
    calibration = plan.calibrate(arguments.calibration) if arguments.calibration else None
    advice = plan.advise(planner, arguments.gpus)
    times = planner.times(advice.plan, calibration) if calibration else None
    if arguments.json:
        print(json.dumps(plan.report(advice, times), indent=1))
    else:
        plan.show(advice, Console(), times)
    return OK


def _processes(config: Config) -> int:
    """Processes on this node: one for each GPU that is no server's, one on a CPU, unless the recipe
    says."""
    if config.nproc_per_node != "auto":
        return config.nproc_per_node
    import torch

    server = config.online is not None and config.rollout.engine == "server"
    taken = len(config.rollout.server.devices) if server else 0
    return max(torch.cuda.device_count() - taken, 1)


def _torchrun(processes: int, options: list[str], arguments: list[str]) -> int:
    """Start one process for each rank, by ``arguments`` of ``fastalign train``, and wait; a rank's
    exit code becomes ours.

    SIGTERM and SIGINT are the ranks' to answer, which need their time for it: they are passed on,
    where torchrun would kill the ranks soon after.
    """
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    known = {
        name for action in torchrun.get_args_parser()._actions for name in action.option_strings
    }
    for option in options:
        name = option.partition("=")[0]
        if name.startswith("-") and name.replace("_", "-") not in known and name not in known:
            near = difflib.get_close_matches(name, ["--resume", "--dry-run", *known], 1)
            raise ConfigError(
                f"{name}: neither an option of fastalign train nor one of torchrun"
                + (f"; nearest is {near[0]}" if near else "")
            )
    # torchrun sets one thread a process when nothing is said, which idles a CPU's cores.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // processes)))
    single_node = not any(option.startswith("--nnodes") for option in options)
    # A rank that fails says why itself; torchrun's own report would bury that line.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    heard: list[int] = []
    try:
        with _passing_on(heard):
            torchrun.run(
                torchrun.parse_args(
                    [
                        f"--nproc-per-node={processes}",
                        *(["--standalone"] if single_node else []),
                        *(["--signals-to-handle=SIGHUP,SIGQUIT"] if CHILDREN.exists() else []),
                        *options,
                        "--module",
                        "fastalign",
                        "train",
                        *arguments,
                    ]
                )
            )
    except SignalException as error:
        return 128 + error.sigval
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
        if heard and codes <= {-number for number in SIGNALS}:
            # They were ended before they listened, or at once by a second signal.
            if len(heard) > 1:
                return 128 + heard[-1]
            complain(f"paused: {signal.Signals(heard[0]).name} {TOO_EARLY}")
            return PAUSED
        if not heard:
            _name_killed(error)
        return next((code for code in (USAGE, PAUSED) if code in codes), FAILED)
    return OK


def _name_killed(error: ChildFailedError) -> None:
    """Say which rank a signal ended: it could not itself, and the others know nothing of it."""
    _, first = error.get_first_failure()
    for rank, failure in error.failures.items():
        # torchrun ends the others: by SIGTERM, and half a minute later by SIGKILL.
        late = failure.timestamp - first.timestamp > 10
        if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM and not late:
            why = " (as the system does without free memory)" if failure.exitcode == -9 else ""
            complain(f"rank {rank} was ended by {failure.signal_name()}{why}, and the run with it")
            return


@contextlib.contextmanager
def _passing_on(heard: list[int]) -> Iterator[None]:
    """Pass signals on to the processes that were started, and note them in ``heard``."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        heard.append(number)
        children = [int(pid) for pid in CHILDREN.read_text().split()]
        if not children:
            raise Interrupted
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    if not CHILDREN.exists():
        yield
        return
    before = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
