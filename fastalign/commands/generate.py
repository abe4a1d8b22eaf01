"""``fastalign generate``: answers, each the best of several samples."""

from __future__ import annotations

import argparse
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

EXAMPLES = """\
  fastalign generate --model ./model prompts.jsonl answers.jsonl
  fastalign generate --model runs/jsft --best-of 16 prompts.jsonl answers.jsonl
  fastalign generate --model ./base --adapter runs/jsft --best-of 8 \\
      --principle "It is honest." --principle "It helps." prompts.jsonl answers.jsonl
  fastalign generate --model ./model --best-of 4 --judge judge.yaml prompts.jsonl answers.jsonl

A judge file has the keys of a recipe's judge section (type, path, endpoint, principles, ...).
Where answers.jsonl has answers already, an interrupted run goes on behind them.
"""


def add(commands: Any) -> None:
    generate = add_command(
        commands,
        "generate",
        help="answer prompts, each with the best of several samples",
        examples=EXAMPLES,
    )
    option = generate.add_argument
    option("prompts", help="JSONL, JSON or Parquet file of prompts, messages or Alpaca rows")
    option("answers", help="JSONL file, a line for each prompt")
    option("--model", required=True, help="folder or hub name")
    option("--adapter", metavar="A", help="LoRA adapter on it")
    option(
        "--best-of",
        type=whole_number(1),
        default=1,
        metavar="N",
        help="sample N answers and keep the winner of a knockout tournament; default: 1",
    )
    option(
        "--judge",
        default="self",
        metavar="self|FILE",
        help="who judges the matches: the model that answers (default), or a YAML file",
    )
    option(
        "--principle",
        action="append",
        default=[],
        metavar="TEXT",
        help="judge by it; several are voted on",
    )
    option("--seed", type=whole_number(0), default=0, help="default: 0")
    option("--temperature", type=float, default=1.0, metavar="T", help="default: 1; 0: greedy")
    option("--top-p", type=float, default=0.9, metavar="P", help="default: 0.9")
    option(
        "--max-tokens",
        type=whole_number(1),
        default=768,
        metavar="N",
        help="of an answer; default: 768",
    )
    option("--engine", choices=("auto", "vllm", "hf"), default="auto")
    option("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    option("--template", help="as a dataset's in a recipe")
    option(
        "--chat-template-kwargs",
        type=json_object,
        default={},
        metavar="JSON",
        help="""for the tokenizer's chat template, as '{"enable_thinking": false}'""",
    )
    option(
        "--batch-size",
        type=whole_number(1),
        metavar="N",
        help="prompts answered and written at once; default: those of 64 samples, in vLLM of 256",
    )
    option(
        "--gpu-memory-utilization",
        type=float,
        metavar="F",
        help="share of the GPU's memory that vLLM takes; default: 0.9, 0.4 beside another model "
        "that judges",
    )
    generate.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from fastalign.config import ModelConfig
    from fastalign.endpoint import BudgetSpent, JudgeError
    from fastalign.generate import Settings, answer_file
    from fastalign.rollout import EngineError

    judge, rollout = judge_and_engine(arguments, beside_another=0.4)
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
        complain(f"rollout engine: {error}")
        return FAILED
    except JudgeError as error:
        complain(str(error))
        return FAILED
    except BudgetSpent as error:
        complain(f"paused: {error}; what was answered is in {arguments.answers}")
        return PAUSED
    for line in report.lines():
        print(line)
    print(arguments.answers)
    return OK
