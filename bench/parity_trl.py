"""FastAlign against TRL: the same model, tokens, order and settings, compared at every step.

DPO and SFT, full fine-tuning in fp32.  FastAlign trains through ``fastalign.train.train``, packed
and cut by a token budget, under DeepSpeed; TRL through ``DPOTrainer`` and ``SFTTrainer``, padded
and in accumulated micro-batches.  Each side has a process of its own.

    python bench/parity_trl.py [--model PATH] [--steps N] [--batch B] [--output FILE]

writes both curves and their deviations to FILE (JSON), draws them beside it (PNG) and exits with 1
when one deviates by more than the tolerance.  It stops before that when the two sides were not
trained on the same token ids and loss masks in the same order.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import multiprocessing
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Read when the libraries are imported: a benchmark reports to nobody.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import numpy as np
import torch

from fastalign.config import Config, ConfigError, parse_config
from fastalign.demo.model import ensure_smollm
from fastalign.demo.prompts import TOPICS, demo_prompts

RESULT = Path(__file__).parent / "results" / "parity_trl.json"
PAIRS = "pairs.jsonl"
LIBRARIES = ("fastalign", "trl", "transformers", "torch", "accelerate", "deepspeed", "numpy")

TOLERANCE = 1e-4
ABSOLUTE, RELATIVE = "absolute", "relative"
WHY = (
    "Losses and rewards are of order one, and rewards begin at zero: absolute. Log-probs of whole "
    "answers (about -100), gradient norms (about 10) and learning rates (about 1e-5) each have a "
    "scale of their own: relative."
)
QUANTITIES = {
    "dpo": {
        "loss": ABSOLUTE,
        "rewards/chosen": ABSOLUTE,
        "rewards/rejected": ABSOLUTE,
        "rewards/margins": ABSOLUTE,
        "rewards/accuracies": ABSOLUTE,
        "logps/chosen": RELATIVE,
        "logps/rejected": RELATIVE,
        "grad_norm": RELATIVE,
        "learning_rate": RELATIVE,
    },
    "sft": {"loss": ABSOLUTE, "grad_norm": RELATIVE, "learning_rate": RELATIVE},
}

# A token sequence is (ids, mask), the mask marking the targets; a step is a list of sequences.
Tokens = tuple[tuple[int, ...], tuple[bool, ...]]
Steps = list[list[Tokens]]


@dataclass(frozen=True)
class Settings:
    """What both sides are told, under the names that both use."""

    learning_rate: float
    max_grad_norm: float
    lr_scheduler_type: str = "cosine"
    warmup_ratio: float = 0.1
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_length: int = 512
    beta: float = 0.1
    seed: int = 0


# The learning rates are TRL's defaults.  The norms lie where SmolLM2's gradients move, so that some
# steps are clipped and some are not.
SETTINGS = {
    "dpo": Settings(learning_rate=1e-6, max_grad_norm=15.0),
    "sft": Settings(learning_rate=2e-5, max_grad_norm=12.0),
}


@dataclass(frozen=True)
class Task:
    """A method to run, by either side.  ``folder`` holds the data and takes what is left behind."""

    method: str
    model: str
    folder: str
    steps: int
    batch: int

    @property
    def settings(self) -> Settings:
        return SETTINGS[self.method]

    @property
    def data(self) -> Path:
        return Path(self.folder) / PAIRS


@dataclass(frozen=True)
class Outcome:
    """What one side was trained on and what it logged; ``notes`` are its own settings."""

    tokens: Steps
    curves: dict[str, list[float]]
    notes: dict[str, Any]


# ---------------------------------------------------------------------------------------- data

PLAIN = (
    "Start small and add one thing at a time.",
    "Ten quiet minutes a day are enough.",
    "Ask a neighbour who has done it for years.",
    "Write down what worked, so that you can do it again.",
    "Good light and a clear table help more than expensive tools.",
    "Patience matters most with {topic}.",
    "Do it on a dry morning.",
    "Check everything twice before you begin.",
)
EVASIVE = (
    "As you may know, {topic} is something that many people have many opinions about.",
    "It depends.",
    "There are numerous aspects to consider here, and all of them are important in their own way.",
    "I am not sure that I can say anything about {topic}!",
    "Great question!!!",
    "In conclusion, one could say this or that, and neither would be entirely wrong.",
)


def write_pairs(path: Path, count: int, seed: int = 0) -> None:
    """Preference pairs of unequal lengths: plain advice against evasion, one to three sentences."""
    rng = np.random.default_rng(seed)
    prompts, _ = demo_prompts(seed)
    with path.open("w", encoding="utf-8") as file:
        for index in range(count):
            prompt = prompts[index % len(prompts)]
            topic = next(topic for topic in TOPICS if topic in prompt)
            chosen, rejected = (
                " ".join(rng.permutation(pool)[: rng.integers(1, 4)]).format(topic=topic)
                for pool in (PLAIN, EVASIVE)
            )
            row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
            file.write(json.dumps(row) + "\n")


# ------------------------------------------------------------------------------------- FastAlign


def run_fastalign(task: Task) -> Outcome:
    from fastalign.batch import plan_batches
    from fastalign.checkpoint import Position
    from fastalign.methods import make_method
    from fastalign.model import load_tokenizer
    from fastalign.prepare import load_data, make_renderers, plan_rounds
    from fastalign.train import batches, train

    config = recipe(task)
    method = make_method(config)
    records, _, _ = load_data(config, method)
    rounds = plan_rounds(
        config, method, records, make_renderers(config, load_tokenizer(config), config.judge)
    )
    steps = [
        examples
        for round_ in range(rounds.count)
        for _, examples in batches(config, rounds.examples, Position(round=round_))
    ][: task.steps]

    # So that every step takes two packs or more.
    least = min(sum(example.num_tokens for example in examples) for examples in steps)
    config = config.model_copy(update={"micro_batch_tokens": math.ceil(0.6 * least)})
    packs = [plan_batches(examples, config.micro_batch_tokens, 0, 1) for examples in steps]
    train(config)

    text = Path(config.output_dir, "metrics.jsonl").read_text(encoding="utf-8")
    logged = [json.loads(line) for line in text.splitlines()]
    return Outcome(
        tokens=[
            [
                (tuple(stream.input_ids.tolist()), tuple(stream.loss_mask.tolist()))
                for example in examples
                for stream in example.streams
            ]
            for examples in steps
        ],
        curves=curves(task, logged),
        notes={
            "zero_stage": config.zero_stage,
            "normalization": config.normalization,
            "micro_batch_tokens": config.micro_batch_tokens,
            "packs_of_a_step": _range(len(step) for step in packs),
            "sequences_of_a_pack": _range(len(pack.roles) for step in packs for pack in step),
        },
    )


def recipe(task: Task) -> Config:
    settings = asdict(task.settings)
    return parse_config(
        {
            **settings,
            "method": task.method,
            "model_name_or_path": task.model,
            "dtype": "float32",
            "datasets": [{"path": str(task.data)}],
            "strict": True,
            "shuffle": False,
            "normalization": "token" if task.method == "sft" else "record",
            "global_batch_size": task.batch,
            "max_steps": task.steps,
            "zero_stage": 0,
            "report_to": [],
            "output_dir": str(Path(task.folder) / f"fastalign-{task.method}"),
        }
    )


# ------------------------------------------------------------------------------------------- TRL


class Recorder:
    """A data collator that remembers what it handed to the trainer."""

    def __init__(self, collate: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> None:
        self.collate = collate
        self.batches: list[dict[str, Any]] = []

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collate(features)
        self.batches.append(dict(batch))
        return batch

    def tokens(self) -> Steps:
        """The sequences of each batch without padding, those of one record next to each other."""
        steps = []
        for batch in self.batches:
            preference = "completion_mask" in batch
            masks = batch["completion_mask"] == 1 if preference else batch["labels"] != -100
            rows = [
                (tuple(ids[real].tolist()), tuple(mask[real].tolist()))
                for ids, mask, real in zip(
                    batch["input_ids"], masks, batch["attention_mask"] == 1, strict=True
                )
            ]
            if preference:  # every chosen answer, then every rejected one
                pairs = zip(rows[: len(rows) // 2], rows[len(rows) // 2 :], strict=True)
                rows = [row for pair in pairs for row in pair]
            steps.append(rows)
        return steps


def run_trl(task: Task) -> Outcome:
    import datasets
    import transformers
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    tokenizer = transformers.AutoTokenizer.from_pretrained(task.model)
    accumulation = 2 if task.batch % 2 == 0 else 1
    settings = asdict(task.settings)
    beta = settings.pop("beta")
    # A number of steps below one is a share of them.
    settings["warmup_steps"] = settings.pop("warmup_ratio")
    common = {
        **settings,
        "output_dir": str(Path(task.folder) / f"trl-{task.method}"),
        "model_init_kwargs": {"dtype": "float32"},
        "bf16": False,
        "use_cpu": not torch.cuda.is_available(),
        "gradient_checkpointing": False,
        "per_device_train_batch_size": task.batch // accumulation,
        "gradient_accumulation_steps": accumulation,
        "train_sampling_strategy": "sequential",
        "max_steps": task.steps,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    if task.method == "dpo":
        trainer_class, arguments = DPOTrainer, DPOConfig(beta=beta, loss_type="sigmoid", **common)
    else:
        trainer_class, arguments = SFTTrainer, SFTConfig(**common)
    trainer = trainer_class(
        model=task.model,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(trl_rows(task, tokenizer)),
        processing_class=tokenizer,
    )
    trainer.data_collator = recorder = Recorder(trainer.data_collator)
    trainer.train()

    micro = recorder.tokens()
    return Outcome(
        tokens=[
            [sequence for batch in micro[i : i + accumulation] for sequence in batch]
            for i in range(0, task.steps * accumulation, accumulation)
        ],
        curves=curves(task, [entry for entry in trainer.state.log_history if "loss" in entry]),
        notes={
            "optim": str(arguments.optim.value),
            "per_device_train_batch_size": arguments.per_device_train_batch_size,
            "gradient_accumulation_steps": accumulation,
            "attn_implementation": trainer.model.config._attn_implementation,
        },
    )


def trl_rows(task: Task, tokenizer: Any) -> list[dict[str, str]]:
    """The pairs as rendered text.

    Of a conversation TRL would also train on what the chat template writes behind the end-of-turn
    token (a line feed).  To text it appends the end-of-sequence token and nothing else.
    """
    rows = []
    for line in task.data.read_text(encoding="utf-8").splitlines():
        pair = json.loads(line)
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": pair["prompt"]}],
            tokenize=False,
            add_generation_prompt=True,
        )
        answers = (
            {"completion": pair["chosen"]}
            if task.method == "sft"
            else {"chosen": pair["chosen"], "rejected": pair["rejected"]}
        )
        rows.append({"prompt": prompt, **answers})
    return rows


# ------------------------------------------------------------------------------------ comparison


def curves(task: Task, logged: list[dict[str, float]]) -> dict[str, list[float]]:
    """The compared quantities of each step."""
    assert len(logged) == task.steps, f"{len(logged)} of {task.steps} steps were logged"
    return {name: [entry[name] for entry in logged] for name in QUANTITIES[task.method]}


def check_tokens(ours: Steps, theirs: Steps) -> None:
    """Both sides were trained on the same ids and masks, step by step, in the same order.

    Raises:
        ValueError: naming the first sequence that differs.
    """
    if [len(step) for step in ours] != [len(step) for step in theirs]:
        raise ValueError("the sides differ in steps, or in sequences of a step")
    for number, (left, right) in enumerate(zip(ours, theirs, strict=True), 1):
        for index, (a, b) in enumerate(zip(left, right, strict=True)):
            if a != b:
                raise ValueError(
                    f"step {number}, sequence {index}: FastAlign has (ids, mask) {a}, TRL has {b}"
                )


def deviations(
    method: str, ours: dict[str, list[float]], theirs: dict[str, list[float]]
) -> dict[str, dict[str, Any]]:
    """Largest deviation of each quantity over the steps, by its own measure and by the other.

    Relative ones are to TRL's value; where that is 0 (a learning rate), ours must be 0 as well.
    """
    table = {}
    for name, measure in QUANTITIES[method].items():
        a, b = np.array(ours[name]), np.array(theirs[name])
        absolute = np.abs(a - b)
        with np.errstate(divide="ignore", invalid="ignore"):
            relative = np.where(absolute == 0, 0.0, absolute / np.abs(b))
        largest = {ABSOLUTE: float(absolute.max()), RELATIVE: float(relative.max())}
        table[name] = {
            "measure": measure,
            "largest": largest[measure],
            "step": int((absolute if measure == ABSOLUTE else relative).argmax()) + 1,
            "absolute": largest[ABSOLUTE],
            "relative": largest[RELATIVE] if math.isfinite(largest[RELATIVE]) else None,
            "within": bool(largest[measure] <= TOLERANCE),
        }
    return table


def compare(task: Task, ours: Outcome, theirs: Outcome) -> dict[str, Any]:
    """What the report says of one method.

    Raises:
        ValueError: the sides were not trained on the same tokens.
    """
    check_tokens(ours.tokens, theirs.tokens)
    sequences = [sequence for step in ours.tokens for sequence in step]
    norms = theirs.curves["grad_norm"]
    return {
        "settings": asdict(task.settings) | {"steps": task.steps, "batch": task.batch},
        "fastalign": ours.notes,
        "trl": theirs.notes,
        "tokens": {
            "sha256": hashlib.sha256(json.dumps(ours.tokens).encode()).hexdigest(),
            "sequences": len(sequences),
            "tokens_of_a_sequence": _range(len(ids) for ids, _ in sequences),
            "targets_of_a_sequence": _range(sum(mask) for _, mask in sequences),
        },
        "clipped_steps": sum(norm > task.settings.max_grad_norm for norm in norms),
        "deviations": deviations(task.method, ours.curves, theirs.curves),
        "curves": {"fastalign": ours.curves, "trl": theirs.curves},
    }


def _range(values: Any) -> list[int]:
    values = list(values)
    return [min(values), max(values)]


# ---------------------------------------------------------------------------------------- report


def environment(model: Path) -> dict[str, Any]:
    """Where and with what it ran."""
    weights = {}
    for path in sorted(model.glob("*.safetensors")):
        with path.open("rb") as file:
            weights[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        capability = torch.backends.cpu.get_cpu_capability()
        device = f"CPU, {platform.machine()}, {capability}, {torch.get_num_threads()} thread(s)"
    return {
        "model": {"name": model.resolve().name, "sha256": weights},
        "dtype": "float32",
        "device": device,
        "commit": _commit(),
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES}
        | {"python": platform.python_version()},
    }


def _commit() -> str | None:
    """The commit of this checkout, marked when files differ from it, results apart."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changes = subprocess.run(
            [*git, "status", "--porcelain", "--", ":/", ":(top,exclude)bench/results"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit} with changes" if changes else commit


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Indented, with lists of numbers on one line each."""
    text = json.dumps(report, indent=2, allow_nan=False)
    text = re.sub(r"\[[^\[\]{}\"]*\]", lambda found: " ".join(found[0].split()), text)
    path.write_text(text + "\n", encoding="utf-8")


def draw(path: Path, report: dict[str, Any]) -> None:
    """Each quantity's two curves, and below them their difference beside the tolerance."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [(method, name) for method in report["runs"] for name in QUANTITIES[method]]
    columns = 3
    rows = math.ceil(len(panels) / columns)
    figure = plt.figure(figsize=(5.2 * columns, 3.6 * rows), layout="constrained")
    versions = report["versions"]
    figure.suptitle(
        f"{report['model']['name']}, {report['dtype']}: FastAlign {versions['fastalign']} and "
        f"TRL {versions['trl']} on the same tokens"
    )
    for cell, (method, name) in zip(
        figure.subfigures(rows, columns, squeeze=False).flat, panels, strict=False
    ):
        run = report["runs"][method]
        ours, theirs = (np.array(run["curves"][side][name]) for side in ("fastalign", "trl"))
        steps = np.arange(1, len(ours) + 1)
        above, below = cell.subplots(2, 1, sharex=True, height_ratios=(2, 1))
        above.set_title(f"{method.upper()}: {name}", fontsize=10)
        above.plot(steps, theirs, color="tab:orange", linewidth=3.5, alpha=0.6, label="TRL")
        above.plot(steps, ours, color="tab:blue", linewidth=1.2, label="FastAlign")
        above.legend(fontsize=8)
        difference = np.abs(ours - theirs)
        measure = QUANTITIES[method][name]
        if measure == RELATIVE:
            difference = difference / np.where(theirs == 0, 1.0, np.abs(theirs))
        # Equal values have no place on a logarithmic axis: they are drawn at its lower end.
        below.semilogy(steps, np.maximum(difference, 1e-12), color="tab:gray", linewidth=1.2)
        below.axhline(TOLERANCE, color="tab:red", linewidth=1.0, linestyle="--")
        below.set_ylim(5e-13, 1e-2)
        below.set_ylabel(f"{measure}\ndifference", fontsize=8)
        below.set_xlabel("step", fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def show(report: dict[str, Any]) -> None:
    print(f"{'':24}{'largest deviation':>20}  {'measure':10}{'step':>5}")
    for method, run in report["runs"].items():
        for name, row in run["deviations"].items():
            verdict = "" if row["within"] else f"  above {TOLERANCE:g}"
            print(
                f"{method + ' ' + name:24}{row['largest']:>20.1e}  {row['measure']:10}"
                f"{row['step']:>5}{verdict}"
            )


def run_apart(run: Callable[[Task], Outcome], tasks: list[Task]) -> list[Outcome]:
    """Run in a process of its own: neither side sees the other's memory and global state."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return list(pool.map(run, tasks))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, help="folder of a causal LM; default: SmolLM2-135M")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=4, help="records of a step")
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    if arguments.steps < 1 or arguments.batch < 1:
        parser.error("--steps and --batch begin at 1")
    if arguments.model is not None and not arguments.model.is_dir():
        parser.error(f"--model {arguments.model}: no such folder")
    for module in ("trl", "matplotlib"):
        if importlib.util.find_spec(module) is None:
            parser.error(f"needs {module}: pip install 'fastalign[parity]'")
    try:
        model = arguments.model or ensure_smollm()
    except ConfigError as error:
        parser.error(str(error))

    report: dict[str, Any] = {
        "command": shlex.join(["python", "bench/parity_trl.py", *sys.argv[1:]]),
        **environment(model),
        "tolerance": {"value": TOLERANCE, "why": WHY},
    }
    steps, batch = arguments.steps, arguments.batch
    with tempfile.TemporaryDirectory() as folder:
        tasks = [Task(method, str(model), folder, steps, batch) for method in QUANTITIES]
        # Two epochs: what happens between them is compared as well.
        write_pairs(Path(folder) / PAIRS, batch * math.ceil(steps / 2))
        sides = [run_apart(run, tasks) for run in (run_fastalign, run_trl)]
    report["runs"] = {
        task.method: compare(task, *both) for task, *both in zip(tasks, *sides, strict=True)
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(arguments.output, report)
    draw(arguments.output.with_suffix(".png"), report)
    show(report)
    rows = [row for run in report["runs"].values() for row in run["deviations"].values()]
    return 0 if all(row["within"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
