"""The ``fastalign`` command: parse, call, exit code.

Exit codes: 0 done, 1 failed, 2 wrong recipe, data or command line, 75 paused with a checkpoint.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import json
import logging
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, get_args

from fastalign import __version__, logs
from fastalign.config import (
    Config,
    ConfigError,
    JudgeConfig,
    ModelConfig,
    RolloutConfig,
    dump_config,
    load_config,
    load_judge,
)
from fastalign.data import Kind
from fastalign.preemption import SIGNALS, Interrupted, Stop

OK, FAILED, USAGE, PAUSED = 0, 1, 2, 75
# How long a rank with a mistake waits for the first one to name it.
PATIENCE_S = 10.0
# Processes that the main thread has started, where the system tells.
CHILDREN = Path(f"/proc/self/task/{os.getpid()}/children")
# What a disk that is full, broken or not ours says; anything else is a mistake of the program.
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
TOO_EARLY = "before the first step: there is nothing to save; start the same again"

TRAIN_HELP = """\
examples:
  fastalign train recipes/cut-offline.yaml model_name_or_path=./model datasets.0.path=data.jsonl
  fastalign train recipe.yaml learning_rate=1e-5 nproc_per_node=2
  fastalign train recipe.yaml --dry-run
  fastalign train recipe.yaml --dry-run --gpus 8 --gpu h100
  fastalign train recipe.yaml nproc_per_node=8 --nnodes 2 --node_rank 0 --master_addr 10.0.0.1

Options after the overrides that start with -- are torchrun's and are passed on to it.
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="fastalign", description="Align a language model from judgments."
    )
    parser.add_argument("--version", action="version", version=f"fastalign {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    train = commands.add_parser(
        "train",
        help="train by a recipe",
        epilog=TRAIN_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument("recipe", help="YAML file")
    train.add_argument("overrides", nargs="*", metavar="key.sub=value")
    train.add_argument("--dry-run", action="store_true", help="print the resolved recipe and stop")
    planning = train.add_argument_group("with --dry-run, a plan of the memory").add_argument
    planning("--gpus", type=_whole_number(1), metavar="N", help="how many, of all nodes")
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
    train.set_defaults(logs="plain")

    demo = commands.add_parser("demo", help="run the main job on this machine, start to finish")
    demo.add_argument("--output-dir", default="runs/demo")
    demo.add_argument("--seed", type=int, default=0)

    _add_generate(commands)
    _add_inspect(commands)
    _add_report(commands)
    _add_data(commands)
    _add_judge(commands)
    _add_eval(commands)

    arguments, passed_on = parser.parse_known_args(argv)
    options = passed_on
    if arguments.command in ("train", "inspect"):
        overrides, options = _separate(passed_on)
        arguments.overrides += overrides
    if options and arguments.command != "train":
        parser.error(f"unrecognized arguments: {' '.join(options)}")
    logs.configure(getattr(arguments, "logs", "plain"))
    try:
        if arguments.command == "train":
            return _train(arguments, options)
        if arguments.command == "generate":
            return _generate(arguments)
        if arguments.command == "inspect":
            return _inspect(arguments)
        if arguments.command == "report":
            return _report(arguments)
        if arguments.command == "data":
            return _check_data(arguments)
        if arguments.command == "judge":
            return _judge(arguments)
        if arguments.command == "eval":
            return _eval(arguments)
        from fastalign.demo.run import run_demo

        return run_demo(arguments.output_dir, arguments.seed)
    except ConfigError as error:
        _complain(str(error))
        return USAGE
    except KeyboardInterrupt:
        print(logs.line("error", "interrupted"), file=sys.stderr, end="")
        return FAILED


GENERATE_HELP = """\
examples:
  fastalign generate --model ./model prompts.jsonl answers.jsonl
  fastalign generate --model runs/jsft --best-of 16 prompts.jsonl answers.jsonl
  fastalign generate --model ./base --adapter runs/jsft --best-of 8 \\
      --principle "It is honest." --principle "It helps." prompts.jsonl answers.jsonl
  fastalign generate --model ./model --best-of 4 --judge judge.yaml prompts.jsonl answers.jsonl

A judge file has the keys of a recipe's judge section (type, path, endpoint, principles, ...).
Where answers.jsonl has answers already, an interrupted run goes on behind them.
"""


def _add_generate(commands: Any) -> None:
    generate = commands.add_parser(
        "generate",
        help="answer prompts, each with the best of several samples",
        epilog=GENERATE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = generate.add_argument
    add("prompts", help="JSONL, JSON or Parquet file of prompts, messages or Alpaca rows")
    add("answers", help="JSONL file, a line for each prompt")
    add("--model", required=True, help="folder or hub name")
    add("--adapter", metavar="A", help="LoRA adapter on it")
    add(
        "--best-of",
        type=_whole_number(1),
        default=1,
        metavar="N",
        help="sample N answers and keep the winner of a knockout tournament; default: 1",
    )
    add(
        "--judge",
        default="self",
        metavar="self|FILE",
        help="who judges the matches: the model that answers (default), or a YAML file",
    )
    add(
        "--principle",
        action="append",
        default=[],
        metavar="TEXT",
        help="judge by it; several are voted on",
    )
    add("--seed", type=_whole_number(0), default=0, help="default: 0")
    add("--temperature", type=float, default=1.0, metavar="T", help="default: 1; 0: greedy")
    add("--top-p", type=float, default=0.9, metavar="P", help="default: 0.9")
    add(
        "--max-tokens",
        type=_whole_number(1),
        default=768,
        metavar="N",
        help="of an answer; default: 768",
    )
    add("--engine", choices=("auto", "vllm", "hf"), default="auto")
    add("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    add("--template", help="as a dataset's in a recipe")
    add(
        "--chat-template-kwargs",
        type=_json_object,
        default={},
        metavar="JSON",
        help="""for the tokenizer's chat template, as '{"enable_thinking": false}'""",
    )
    add(
        "--batch-size",
        type=_whole_number(1),
        metavar="N",
        help="prompts answered and written at once; default: those of 64 samples, in vLLM of 256",
    )
    add(
        "--gpu-memory-utilization",
        type=float,
        metavar="F",
        help="share of the GPU's memory that vLLM takes; default: 0.9, 0.4 beside another model "
        "that judges",
    )


def _add_inspect(commands: Any) -> None:
    inspect = commands.add_parser("inspect", help="show which tokens CUT flags, and why")
    inspect.add_argument("recipe", help="YAML file with method: cut")
    inspect.add_argument("overrides", nargs="*", metavar="key.sub=value")
    inspect.add_argument(
        "--records",
        type=_whole_number(1),
        default=32,
        help="how many, negative ones first",
    )
    inspect.add_argument("--seed", type=_whole_number(0), help="default: the recipe's")
    inspect.add_argument("--out", help="folder of the results; default: inspect in output_dir")


def _add_report(commands: Any) -> None:
    report = commands.add_parser("report", help="one page of what runs were set to, did and wrote")
    report.add_argument("runs", nargs="+", metavar="RUN", help="output_dir of a training run")
    report.add_argument(
        "--output", default="report.html", metavar="FILE", help="default: report.html"
    )


def _report(arguments: argparse.Namespace) -> int:
    from fastalign.report import read_runs, status, write

    runs = read_runs([Path(run) for run in arguments.runs])
    write(runs, Path(arguments.output))
    for run in runs:
        print(f"{run.name}: {status(run)}")
    print(f"wrote {arguments.output}")
    return OK


def _add_data(commands: Any) -> None:
    data = commands.add_parser("data", help="look at data before training")
    check = data.add_subparsers(dest="data_command", required=True).add_parser(
        "check", help="what files hold, and what training would make of it"
    )
    check.add_argument("files", nargs="+", metavar="FILE", help="JSONL, JSON or Parquet")
    check.add_argument(
        "--model", help="folder or hub name whose tokenizer counts lengths and renders rows"
    )
    check.add_argument("--template", help="as a dataset's in a recipe; needs --model")
    check.add_argument(
        "--max-length", type=_whole_number(1), metavar="N", help="as in a recipe; needs --model"
    )
    check.add_argument(
        "--as", dest="kind", choices=get_args(Kind), help="read the rows as this kind"
    )
    check.add_argument("--json", action="store_true", help="the whole report as JSON")


def _whole_number(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r}: want a whole number from {least} on")
        return int(text)

    return read


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r}: want a JSON object")
    return value


def _generate(arguments: argparse.Namespace) -> int:
    judge, rollout = _judge_and_engine(arguments, beside_another=0.4)

    from fastalign.endpoint import BudgetSpent, JudgeError
    from fastalign.generate import Settings, answer_file
    from fastalign.rollout import EngineError

    settings = Settings(
        ModelConfig(
            model_name_or_path=arguments.model,
            adapter_name_or_path=arguments.adapter,
            dtype=arguments.dtype,
        ),
        best_of=arguments.best_of,
        judge=judge,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        max_tokens=arguments.max_tokens,
        seed=arguments.seed,
        template=arguments.template,
        chat_template_kwargs=arguments.chat_template_kwargs,
        rollout=rollout,
        batch_size=arguments.batch_size,
    )
    try:
        report = answer_file(arguments.prompts, Path(arguments.answers), settings)
    except EngineError as error:
        _complain(f"rollout engine: {error}")
        return FAILED
    except JudgeError as error:
        _complain(str(error))
        return FAILED
    except BudgetSpent as error:
        _complain(f"paused: {error}; what was answered is in {arguments.answers}")
        return PAUSED
    for line in report.lines():
        print(line)
    print(arguments.answers)
    return OK


def _judge_and_engine(
    arguments: argparse.Namespace, *, beside_another: float
) -> tuple[JudgeConfig, RolloutConfig]:
    """Who judges, and the engine of local models: by default it takes 0.9 of the GPU's memory, or
    ``beside_another`` where another model judges."""
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


def _inspect(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.recipe, arguments.overrides)

    from fastalign.inspection import inspect, write

    folder = Path(arguments.out or Path(config.output_dir, "inspect"))
    try:
        inspection = inspect(config, count=arguments.records, seed=arguments.seed)
    except FloatingPointError as error:
        _complain(str(error))
        return FAILED
    for line in (*inspection.lines, inspection.summary()):
        print(line)
    for path in write(inspection, folder):
        print(f"wrote {path}")
    return OK


def _check_data(arguments: argparse.Namespace) -> int:
    from fastalign.data_check import Settings, check_files

    settings = Settings(arguments.model, arguments.template, arguments.max_length, arguments.kind)
    return OK if check_files(arguments.files, settings, as_json=arguments.json) else USAGE


JUDGE_HELP = """\
  fastalign judge export runs/cut/episodes/0000.jsonl to-judge.jsonl --all
  fastalign judge import to-judge.jsonl judged.jsonl

In each line of the exported file, write into "judgment" what is wrong with the completion, null
where nothing is, or leave "" where you do not judge. The result trains with method: cut.
"""


def _add_judge(commands: Any) -> None:
    judge = commands.add_parser(
        "judge",
        help="let people judge answers",
        epilog=JUDGE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    ways = judge.add_subparsers(dest="way", required=True)
    export = ways.add_parser("export", help="write out the answers that need a judgment")
    export.add_argument("answers", help="episodes of an online run, or rows: prompt, completion")
    export.add_argument("out", help="JSONL file to fill in")
    export.add_argument("--all", action="store_true", help="also answers that have a judgment")
    back = ways.add_parser("import", help="check a filled file and make training data of it")
    back.add_argument("filled", help="what was exported, with judgments")
    back.add_argument("result", help="JSONL file to train on")


def _judge(arguments: argparse.Namespace) -> int:
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


EVAL_HELP = """\
  fastalign eval --pairs held-out.jsonl --model runs/jsft --out runs/judge
  fastalign eval --pairs held-out.jsonl --judge judge.yaml
  fastalign eval --against base --prompts prompts.jsonl --model base --adapter runs/self-judge
  fastalign eval --against stored-answers.jsonl --model runs/cut --judge judge.yaml --out runs/wins
  fastalign eval --tasks arc_easy,hellaswag --model runs/cut

A judge is the model itself, or a YAML file with the keys of a recipe's judge. It is asked in both
orders. Figures have 95 % intervals, resampled over prompts.
"""
# Options that belong to one of the three questions, or to two.
EVAL_OPTIONS = {
    "judge": ("pairs", "against"), "principle": ("pairs", "against"),
    "template": ("pairs", "against"), "engine": ("pairs", "against"),
    "gpu_memory_utilization": ("pairs", "against"), "chat_template_kwargs": ("pairs", "against"),
    "answers": ("against",), "prompts": ("against",), "against_adapter": ("against",),
    "max_tokens": ("against",), "temperature": ("against",), "top_p": ("against",),
    "include_path": ("tasks",), "num_fewshot": ("tasks",), "batch_size": ("tasks",),
    "apply_chat_template": ("tasks",),
}  # fmt: skip


def _add_eval(commands: Any) -> None:
    evaluate = commands.add_parser(
        "eval",
        help="measure a judge, the win rate of a model, or its benchmarks",
        epilog=EVAL_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = evaluate.add_mutually_exclusive_group(required=True)
    what.add_argument("--pairs", metavar="FILE", help="how good a judge is on preference data")
    what.add_argument(
        "--against",
        metavar="WHOM",
        help="win rate against a model, or a file of answers with prompt and completion",
    )
    what.add_argument(
        "--tasks", metavar="A,B,...", help="benchmarks of lm-evaluation-harness, by name or YAML"
    )
    add = evaluate.add_argument
    add("--model", metavar="M", help="folder or hub name")
    add("--adapter", metavar="FOLDER", help="LoRA adapter on it")
    add("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    add("--max-length", type=_whole_number(1), metavar="N", help="tokens; default: 4096 or fewer")
    add("--max-samples", type=_whole_number(1), metavar="N", help="so many rows, by the seed")
    add("--seed", type=_whole_number(0), default=0)
    add("--out", metavar="FOLDER", help="for the report, its rows and its plot")
    add("--json", action="store_true", help="the whole report as JSON")
    judging = evaluate.add_argument_group("with --pairs and --against").add_argument
    judging("--judge", metavar="self|FILE", help="default: self, the model; or a YAML file")
    judging("--principle", action="append", metavar="TEXT", help="judge by it; may be repeated")
    judging("--template", help="of the model, as a dataset's in a recipe")
    judging("--chat-template-kwargs", type=_json_object, metavar="JSON", help="for that template")
    judging("--engine", choices=("auto", "vllm", "hf"), help="of local models")
    judging("--gpu-memory-utilization", type=float, metavar="F", help="of vLLM; default: 0.9")
    wins = evaluate.add_argument_group("with --against").add_argument
    wins("--prompts", metavar="FILE", help="default: those of the file of answers")
    wins("--answers", metavar="FILE", help="stored answers in place of the model's own")
    wins("--against-adapter", metavar="FOLDER", help="LoRA adapter on the other model")
    wins("--max-tokens", type=_whole_number(1), metavar="N", help="of an answer; default: 768")
    wins("--temperature", type=float, metavar="T", help="default: 1; 0: greedy")
    wins("--top-p", type=float, metavar="P", help="default: 0.9")
    tasks = evaluate.add_argument_group("with --tasks").add_argument
    tasks("--include-path", action="append", metavar="FOLDER", help="tasks of yours")
    tasks("--num-fewshot", type=_whole_number(0), metavar="N", help="default: the task's")
    tasks("--batch-size", type=_whole_number(1), metavar="N", help="default: 1")
    tasks("--apply-chat-template", action="store_true", default=None)


def _eval(arguments: argparse.Namespace) -> int:
    modes = ("pairs", "against", "tasks")
    mode = next(name for name in modes if getattr(arguments, name) is not None)
    for name, owners in EVAL_OPTIONS.items():
        if getattr(arguments, name) is not None and mode not in owners:
            belongs = " and ".join(f"--{owner}" for owner in owners)
            raise ConfigError(f"--{name.replace('_', '-')} goes with {belongs}, not with --{mode}")

    if arguments.out is not None:
        _check_folder(Path(arguments.out))

    from transformers.utils import logging as transformers_logging

    from fastalign.endpoint import BudgetSpent, JudgeError
    from fastalign.rollout import EngineError

    transformers_logging.disable_progress_bar()
    run = {"pairs": _eval_pairs, "against": _eval_against, "tasks": _eval_tasks}[mode]
    try:
        return run(arguments)
    except EngineError as error:
        _complain(f"engine: {error}")
        return FAILED
    except JudgeError as error:
        _complain(str(error))
        return FAILED
    except BudgetSpent as reason:
        _complain(f"paused: {reason}: raise it and run the same again")
        return PAUSED


def _check_folder(folder: Path) -> None:
    """Make the folder of the results before anything is spent on them."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = "is no folder" if folder.is_file() else error.strerror or str(error)
        raise ConfigError(f"--out = {str(folder)!r}: {reason}") from None


def _model(arguments: argparse.Namespace, name: str | None, adapter: str | None) -> Any:
    """The model of that name, or None without one."""
    from fastalign.config import ModelConfig

    if name is None:
        if adapter is not None:
            raise ConfigError("--adapter needs --model: the model that it lies on")
        return None
    return ModelConfig(model_name_or_path=name, adapter_name_or_path=adapter, dtype=arguments.dtype)


def _judging(arguments: argparse.Namespace) -> Any:
    from fastalign.judging import Judging

    # One engine is open at a time.
    who, rollout = _judge_and_engine(arguments, beside_another=0.9)
    if who.type == "endpoint" and not arguments.out:
        raise ConfigError("--out is missing: the replies of a server are kept there")
    return Judging(
        judge=who,
        rollout=rollout,
        max_length=arguments.max_length or 4096,
        dtype=arguments.dtype,
        template=arguments.template,
        chat_template_kwargs=arguments.chat_template_kwargs or {},
        replies=Path(arguments.out, "judge-replies.jsonl") if arguments.out else None,
    )


def _eval_pairs(arguments: argparse.Namespace) -> int:
    from fastalign import eval_pairs

    for name in ("template", "chat_template_kwargs"):
        if getattr(arguments, name) is not None and arguments.judge not in (None, "self"):
            raise ConfigError(
                f"--{name.replace('_', '-')} says how the model itself is spoken to: the judge of "
                f"{arguments.judge} is not asked in it"
            )
    settings = eval_pairs.Settings(
        path=arguments.pairs,
        judging=_judging(arguments),
        model=_model(arguments, arguments.model, arguments.adapter),
        max_samples=arguments.max_samples,
        seed=arguments.seed,
    )
    measured = eval_pairs.measure(settings)
    _tell(
        arguments,
        measured.report(),
        lambda console: eval_pairs.show(measured, console),
        lambda folder: eval_pairs.write(measured, folder),
    )
    return OK


def _eval_against(arguments: argparse.Namespace) -> int:
    from fastalign import eval_wins
    from fastalign.generate import Settings as Answering
    from fastalign.rollout import SamplingSettings

    stored = Path(arguments.against).is_file()
    if stored and arguments.against_adapter is not None:
        raise ConfigError(f"--against-adapter: {arguments.against} is a file of answers, no model")
    temperature, top_p = arguments.temperature, arguments.top_p
    try:
        sampling = SamplingSettings(
            arguments.max_tokens or Answering.max_tokens,
            Answering.temperature if temperature is None else temperature,
            Answering.top_p if top_p is None else top_p,
        )
    except ValueError as error:
        raise ConfigError(f"--{str(error).replace('_', '-', 1)}") from None
    other = None if stored else arguments.against
    settings = eval_wins.Settings(
        judging=_judging(arguments),
        sampling=sampling,
        model=_model(arguments, arguments.model, arguments.adapter),
        answers=arguments.answers,
        against=_model(arguments, other, arguments.against_adapter),
        against_answers=arguments.against if stored else None,
        prompts=arguments.prompts,
        max_samples=arguments.max_samples,
        seed=arguments.seed,
    )
    played = eval_wins.play(settings)
    _tell(
        arguments,
        played.report(),
        lambda console: eval_wins.show(played, console),
        lambda folder: eval_wins.write(played, folder),
    )
    return OK


def _eval_tasks(arguments: argparse.Namespace) -> int:
    from fastalign import eval_tasks

    model = _model(arguments, arguments.model, arguments.adapter)
    if model is None:
        raise ConfigError("--model is missing: whose benchmarks are they")
    settings = eval_tasks.Settings(
        tasks=tuple(name.strip() for name in arguments.tasks.split(",")),
        model=model,
        include_path=tuple(arguments.include_path or ()),
        num_fewshot=arguments.num_fewshot,
        batch_size=arguments.batch_size,
        max_samples=arguments.max_samples,
        max_length=arguments.max_length,
        chat=bool(arguments.apply_chat_template),
        seed=arguments.seed,
    )
    results = eval_tasks.run_tasks(settings)
    _tell(
        arguments,
        eval_tasks.plain_results(results),
        lambda console: eval_tasks.show(results, console),
        lambda folder: eval_tasks.write(results, folder),
    )
    return OK


def _tell(
    arguments: argparse.Namespace,
    report: dict[str, Any],
    show: Callable[[Any], None],
    write: Callable[[Path], list[Path]],
) -> None:
    """Files first: what was measured is kept, whatever becomes of the terminal."""
    from rich.console import Console

    written = write(Path(arguments.out)) if arguments.out else []
    if arguments.json:
        print(json.dumps(report, indent=1, ensure_ascii=False))
        return
    show(Console())
    for path in written:
        print(f"wrote {path}")


def _complain(message: str) -> None:
    """One line for the user, from one rank.

    Every rank reads the same recipe and data, so the first speaks for all.  The others give it the
    time to, because torchrun stops everybody when one rank ends.
    """
    if os.environ.get("RANK", "0") != "0":
        time.sleep(PATIENCE_S)
    print(logs.line("error", message), file=sys.stderr, end="", flush=True)


def _separate(passed_on: list[str]) -> tuple[list[str], list[str]]:
    """(overrides, options for torchrun) of what argparse did not take.

    It takes positional arguments in one go: overrides behind an option of ours are left over.
    """
    overrides: list[str] = []
    options: list[str] = []
    for item in passed_on:
        is_value = bool(options) and options[-1].startswith("--") and "=" not in options[-1]
        if re.match(r"[A-Za-z_][\w.]*=", item) and not is_value:
            overrides.append(item)
        else:
            options.append(item)
    return overrides, options


def _train(arguments: argparse.Namespace, torchrun_options: list[str]) -> int:
    overrides = list(arguments.overrides)
    _check_planning(arguments)
    if arguments.resume:
        overrides.append("resume_from_checkpoint=true")
    config = load_config(arguments.recipe, overrides)

    from fastalign.methods import make_method

    try:
        make_method(config)
    except ConfigError as error:
        raise ConfigError(f"{arguments.recipe}: {error}") from None
    if arguments.dry_run:
        return _plan(arguments, config)
    if "LOCAL_RANK" not in os.environ:
        processes = resolve_processes(config)
        if processes > 1 or torchrun_options:
            try:
                flags = {"plain": [], "quiet": ["--quiet"], "json": ["--json-logs"]}
                own = [arguments.recipe, *overrides, *flags[arguments.logs]]
                return _torchrun(processes, torchrun_options, own)
            except Interrupted:
                _complain(f"paused: a signal {TOO_EARLY}")
                return PAUSED

    stop = Stop()
    try:
        with stop.listening():
            return _train_here(config, stop)
    except Interrupted:
        _complain(f"paused: {stop.reason} {TOO_EARLY}")
        return PAUSED


def _train_here(config: Config, stop: Stop) -> int:
    """One rank's share of a run."""
    from fastalign.checkpoint import CheckpointError
    from fastalign.endpoint import JudgeError
    from fastalign.rollout import EngineError
    from fastalign.train import Paused, train

    try:
        train(config, stop)
    except EngineError as error:
        _complain(f"rollout engine: {error}")
        return FAILED
    except (CheckpointError, FloatingPointError, JudgeError) as error:
        _complain(str(error))
        return FAILED
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        _complain(f"{error.filename or config.output_dir}: {error.strerror}")
        return FAILED
    except Paused as reason:
        _complain(f"paused: {reason}")
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


def resolve_processes(config: Config) -> int:
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
            _complain(f"paused: {signal.Signals(heard[0]).name} {TOO_EARLY}")
            return PAUSED
        return next((code for code in (USAGE, PAUSED) if code in codes), FAILED)
    return OK


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
