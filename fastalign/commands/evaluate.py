"""``fastalign eval``: a judge, a win rate, benchmarks."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastalign.commands.common import (
    FAILED,
    OK,
    PAUSED,
    add_command,
    complain,
    json_object,
    judge_and_engine,
    whole_number,
)
from fastalign.errors import ConfigError

EXAMPLES = """\
  fastalign eval --pairs held-out.jsonl --model runs/jsft --out runs/judge
  fastalign eval --pairs held-out.jsonl --judge judge.yaml
  fastalign eval --against base --prompts prompts.jsonl --model base --adapter runs/self-judge
  fastalign eval --against stored-answers.jsonl --model runs/cut --judge judge.yaml --out runs/wins
  fastalign eval --tasks arc_easy,hellaswag --model runs/cut

A judge is the model itself, or a YAML file with the keys of a recipe's judge. It is asked in both
orders. Figures have 95 % intervals, resampled over prompts.
"""
# Options that belong to one of the three questions, or to two.
OPTIONS = {
    "judge": ("pairs", "against"), "principle": ("pairs", "against"),
    "template": ("pairs", "against"), "engine": ("pairs", "against"),
    "gpu_memory_utilization": ("pairs", "against"), "chat_template_kwargs": ("pairs", "against"),
    "answers": ("against",), "prompts": ("against",), "against_adapter": ("against",),
    "max_tokens": ("against",), "temperature": ("against",), "top_p": ("against",),
    "include_path": ("tasks",), "num_fewshot": ("tasks",), "batch_size": ("tasks",),
    "apply_chat_template": ("tasks",),
}  # fmt: skip


def add(commands: Any) -> None:
    evaluate = add_command(
        commands,
        "eval",
        help="measure a judge, the win rate of a model, or its benchmarks",
        examples=EXAMPLES,
    )
    evaluate.set_defaults(run=run)
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
    option = evaluate.add_argument
    option("--model", metavar="M", help="folder or hub name")
    option("--adapter", metavar="FOLDER", help="LoRA adapter on it")
    option("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    option("--max-length", type=whole_number(1), metavar="N", help="tokens; default: 4096 or fewer")
    option("--max-samples", type=whole_number(1), metavar="N", help="so many rows, by the seed")
    option("--seed", type=whole_number(0), default=0)
    option("--out", metavar="FOLDER", help="for the report, its rows and its plot")
    option("--json", action="store_true", help="the whole report as JSON")
    judging = evaluate.add_argument_group("with --pairs and --against").add_argument
    judging("--judge", metavar="self|FILE", help="default: self, the model; or a YAML file")
    judging("--principle", action="append", metavar="TEXT", help="judge by it; may be repeated")
    judging("--template", help="of the model, as a dataset's in a recipe")
    judging("--chat-template-kwargs", type=json_object, metavar="JSON", help="for that template")
    judging("--engine", choices=("auto", "vllm", "hf"), help="of local models")
    judging("--gpu-memory-utilization", type=float, metavar="F", help="of vLLM; default: 0.9")
    wins = evaluate.add_argument_group("with --against").add_argument
    wins("--prompts", metavar="FILE", help="default: those of the file of answers")
    wins("--answers", metavar="FILE", help="stored answers in place of the model's own")
    wins("--against-adapter", metavar="FOLDER", help="LoRA adapter on the other model")
    wins("--max-tokens", type=whole_number(1), metavar="N", help="of an answer; default: 768")
    wins("--temperature", type=float, metavar="T", help="default: 1; 0: greedy")
    wins("--top-p", type=float, metavar="P", help="default: 0.9")
    tasks = evaluate.add_argument_group("with --tasks").add_argument
    tasks("--include-path", action="append", metavar="FOLDER", help="tasks of yours")
    tasks("--num-fewshot", type=whole_number(0), metavar="N", help="default: the task's")
    tasks("--batch-size", type=whole_number(1), metavar="N", help="default: 1")
    tasks("--apply-chat-template", action="store_true", default=None)


def run(arguments: argparse.Namespace) -> int:
    modes = ("pairs", "against", "tasks")
    mode = next(name for name in modes if getattr(arguments, name) is not None)
    for name, owners in OPTIONS.items():
        if getattr(arguments, name) is not None and mode not in owners:
            belongs = " and ".join(f"--{owner}" for owner in owners)
            raise ConfigError(f"--{name.replace('_', '-')} goes with {belongs}, not with --{mode}")

    if arguments.out is not None:
        _check_folder(Path(arguments.out))

    from transformers.utils import logging as transformers_logging

    from fastalign.endpoint import BudgetSpent, JudgeError
    from fastalign.rollout import EngineError

    transformers_logging.disable_progress_bar()
    measure = {"pairs": _eval_pairs, "against": _eval_against, "tasks": _eval_tasks}[mode]
    try:
        return measure(arguments)
    except EngineError as error:
        complain(f"engine: {error}")
        return FAILED
    except JudgeError as error:
        complain(str(error))
        return FAILED
    except BudgetSpent as reason:
        complain(f"paused: {reason}: raise it and run the same again")
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
    who, rollout = judge_and_engine(arguments, beside_another=0.9)
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

    stored = os.path.isfile(arguments.against)
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
