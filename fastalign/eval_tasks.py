"""``fastalign eval --tasks``: benchmarks by lm-evaluation-harness, through its own functions."""

from __future__ import annotations

import difflib
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from rich.table import Table

from fastalign.config import ConfigError, ModelConfig
from fastalign.eval_pairs import write_texts
from fastalign.judge_quality import plain
from fastalign.model import (
    adapter_config,
    context_length,
    load_tokenizer,
    resolve_dtype,
    with_adapters_base,
)
from fastalign.quantization import load_nf4

REPORT = "results.json"


@dataclass(frozen=True)
class Settings:
    """What the command line asks for; what is None is left to the harness and its tasks."""

    tasks: tuple[str, ...]
    model: ModelConfig
    include_path: tuple[str, ...] = ()
    num_fewshot: int | None = None
    batch_size: int | None = None
    max_samples: int | None = None
    max_length: int | None = None
    chat: bool = False
    seed: int = 0


def run_tasks(settings: Settings) -> dict[str, Any]:
    """What ``lm_eval.simple_evaluate`` returns for its own Hugging Face model.

    Raises:
        ConfigError: the harness is not installed, a task or the model is not there, or a task
            cannot be loaded.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("--tasks needs the package lm-eval: pip install 'fastalign[eval]'")
    import lm_eval
    from lm_eval.tasks import TaskManager

    for path in settings.include_path:
        if not Path(path).is_dir():
            raise ConfigError(f"--include-path = {path!r}: no such folder")
    # Who names no model or adapter hears of it before the tasks' data is loaded.
    arguments = model_arguments(settings)
    manager = TaskManager(include_path=list(settings.include_path) or None)
    tasks = _matched(settings.tasks, manager.all_tasks)
    try:
        # Loading is where a task's data is fetched; whatever fails there is the task's.
        manager.load(tasks)
    except Exception as error:  # the library raises its own, datasets' and builtin errors
        problem = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"--tasks = {','.join(settings.tasks)!r}: cannot be loaded: "
            f"{type(error).__name__}: {problem}"
        ) from None
    return lm_eval.simple_evaluate(
        model="hf",
        model_args=arguments,
        tasks=tasks,
        num_fewshot=settings.num_fewshot,
        batch_size=settings.batch_size or 1,
        limit=settings.max_samples,
        apply_chat_template=settings.chat,
        task_manager=manager,
        random_seed=settings.seed,
        numpy_random_seed=settings.seed,
        torch_random_seed=settings.seed,
        fewshot_random_seed=settings.seed,
    )


def model_arguments(settings: Settings) -> dict[str, Any]:
    """The arguments of the harness's ``hf`` model.

    Raises:
        ConfigError: there is no such model or adapter.
    """
    model = with_adapters_base(settings.model)
    tokenizer = load_tokenizer(model)
    adapter = model.adapter_name_or_path
    if adapter is not None:
        adapter_config(adapter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = resolve_dtype(model, torch.device(device))
    arguments: dict[str, Any] = {
        "pretrained": model.model_name_or_path,
        "revision": model.model_revision or "main",
        "dtype": str(dtype).removeprefix("torch."),
        "trust_remote_code": model.trust_remote_code,
        "device": device,
    }
    if model.load_in_4bit:
        # The harness has no words for it.
        loaded: Any = load_nf4(
            model.model_name_or_path,
            dtype=dtype,
            device=torch.device(device),
            revision=model.model_revision,
            trust_remote_code=model.trust_remote_code,
        )
        if adapter is not None:
            loaded = PeftModel.from_pretrained(loaded, adapter)
        arguments = {"pretrained": loaded, "tokenizer": tokenizer}
    elif adapter is not None:
        arguments["peft"] = adapter
    if settings.max_length is not None:
        arguments["max_length"] = min(settings.max_length, context_length(model))
    return arguments


def _matched(wanted: Sequence[str], known: Sequence[str]) -> list[str]:
    """Every name is one of the harness's or a YAML file.

    Raises:
        ConfigError: one that is neither.
    """
    for name in wanted:
        if name not in known and not (name.endswith(".yaml") and Path(name).is_file()):
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "--include-path adds tasks of yours"
            raise ConfigError(f"--tasks has {name!r}, which lm-eval does not know: {hint}")
    return list(wanted)


def figures(results: dict[str, Any]) -> list[tuple[str, str, float, float | None, int | None]]:
    """(task, metric, value, standard error, documents) for each figure of the harness."""
    rows = []
    counts = results.get("n-samples", {})
    for task, metrics in results["results"].items():
        for key, value in metrics.items():
            name, _, how = key.partition(",")
            if name.endswith("_stderr") or not isinstance(value, (int, float)) or not how:
                continue
            error = metrics.get(f"{name}_stderr,{how}")
            title = name if how == "none" else f"{name} ({how})"
            count = counts.get(task, {}).get("effective")
            spread = float(error) if isinstance(error, (int, float)) else None
            rows.append((task, title, float(value), spread, count))
    return rows


def show(results: dict[str, Any], console: Console) -> None:
    """A line for each task and metric."""
    table = Table("task", "metric", "", "standard error", "documents")
    for column in table.columns[2:]:
        column.justify = "right"
    for task, metric, value, error, count in figures(results):
        spread = "" if error is None else f"{error:.3f}"
        table.add_row(task, metric, f"{value:.3f}", spread, "" if count is None else f"{count:,}")
    console.print(table)


def write(results: dict[str, Any], folder: Path) -> list[Path]:
    """Write what the harness returned: the results, and each task's documents with the answers.

    Raises:
        ConfigError: the folder cannot be written to.
    """
    files = {REPORT: json.dumps(plain_results(results), indent=1, ensure_ascii=False) + "\n"}
    for task, documents in results.get("samples", {}).items():
        lines = [json.dumps(document, ensure_ascii=False, default=str) for document in documents]
        files[f"samples-{task}.jsonl"] = "".join(f"{line}\n" for line in lines)
    return write_texts(folder, files)


def plain_results(results: dict[str, Any]) -> dict[str, Any]:
    """Without the documents; what JSON does not know becomes text, and what is no number null."""
    rest = {name: value for name, value in results.items() if name != "samples"}
    return plain(json.loads(json.dumps(rest, default=str)))
