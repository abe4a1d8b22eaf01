"""A DPO step of `fastalign train` against one of TRL's DPOTrainer: the same pairs and settings.

    python bench/dpo_step.py PAIRS [--model PATH] [--steps N] [--dtypes ...] [--output FILE]

LoRA of rank 8 on all linear layers, batches of 4 pairs of at most 512 tokens a side, the forward
pass of the reference included: FastAlign makes it for all steps before the first, and each step is
charged its share.  Each side has a process of its own, which nothing else runs beside;
tokens are those that enter the step, a prompt counting once for each side of its pair, however
often it is computed.  Reported are tokens/s over the steps behind the first two, the median step,
and the peak of resident memory (on a GPU: of what torch allocated).

The floor of a step, with N parameters of the body and V x D of the head, for T tokens of which M
carry a loss: forward for the policy and the reference and backward to the inputs, 3 x 2 N T for
frozen weights, and the same 3 x 2 V D M in the head; prompts computed once make T smaller.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import steps
from racing import DEVICE, synchronise
from steps import WARMUP_STEPS, Row

PAIRS, LONGEST, RANK = 4, 512, 8


def write_pairs(source: str, path: Path, model: str, count: int) -> list[int]:
    """The first pairs of which both sides are short enough; returns the tokens of each."""
    import transformers

    from fastalign.config import DatasetConfig
    from fastalign.data import load_records
    from fastalign.templates import Renderer

    renderer = Renderer(transformers.AutoTokenizer.from_pretrained(model))
    records, _ = load_records([DatasetConfig(path=source)], strict=False, seed=0, want="preference")
    tokens: list[int] = []
    with path.open("w", encoding="utf-8") as file:
        for record in records:
            assert record.chosen is not None and record.rejected is not None
            sides = [
                sum(map(len, renderer.completion(record.prompt, text)))
                for text in (record.chosen, record.rejected)
            ]
            if max(sides) > LONGEST:
                continue
            row = {
                "prompt": [{k: m[k] for k in ("role", "content")} for m in record.prompt],
                "chosen": [{"role": "assistant", "content": record.chosen}],
                "rejected": [{"role": "assistant", "content": record.rejected}],
            }
            file.write(json.dumps(row) + "\n")
            tokens.append(sum(sides))
            if len(tokens) == count:
                return tokens
    sys.exit(f"{source}: {len(tokens)} pairs of at most {LONGEST} tokens, {count} are needed")


# ----------------------------------------------------------------------------------------- sides


def fastalign_steps(task: dict[str, Any]) -> Row:
    tree = {
        "method": "dpo",
        "model_name_or_path": task["model"],
        "datasets": [{"path": task["data"]}],
        "shuffle": False,
        "output_dir": task["output_dir"],
        "use_peft": True,
        "lora_r": RANK,
        "dtype": task["dtype"],
        "global_batch_size": PAIRS,
        "micro_batch_tokens": task["micro_batch_tokens"],
        "max_length": LONGEST,
        "max_steps": task["steps"],
        "learning_rate": 1e-5,
        "report_to": [],
        "gradient_checkpointing": False,
    }
    found = steps.train_steps(tree)
    # The reference is asked once for all steps, before the first: each has its share of that.
    share = found["reference"] / len(found["seconds"])
    return {
        "seconds": [own + share for own in found["seconds"]],
        "reference_s": share,
        "losses": [row["loss"] for row in found["logged"]],
        "version": importlib.metadata.version("fastalign"),
    }


def trl_steps(task: dict[str, Any]) -> Row:
    import datasets
    import peft
    import transformers
    from trl import DPOConfig, DPOTrainer

    class Stamps(transformers.TrainerCallback):
        def __init__(self) -> None:
            self.times: list[float] = []

        def on_train_begin(self, *arguments: Any, **more: Any) -> None:
            self.times.append(time.perf_counter())

        def on_step_end(self, *arguments: Any, **more: Any) -> None:
            synchronise()
            self.times.append(time.perf_counter())

    rows = Path(task["data"]).read_text(encoding="utf-8").splitlines()
    stamps = Stamps()
    trainer = DPOTrainer(
        model=task["model"],
        args=DPOConfig(
            output_dir=task["output_dir"],
            model_init_kwargs={"dtype": task["dtype"]},
            bf16=False,
            use_cpu=DEVICE.type == "cpu",
            gradient_checkpointing=False,
            per_device_train_batch_size=PAIRS,
            train_sampling_strategy="sequential",
            max_length=LONGEST,
            max_steps=task["steps"],
            learning_rate=1e-5,
            beta=0.1,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_list([json.loads(row) for row in rows]),
        processing_class=transformers.AutoTokenizer.from_pretrained(task["model"]),
        peft_config=peft.LoraConfig(
            r=RANK, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        callbacks=[stamps],
    )
    trainer.train()
    return {
        "seconds": [after - before for before, after in pairwise(stamps.times)],
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "version": importlib.metadata.version("trl"),
    }


SIDES = {"fastalign": fastalign_steps, "trl": trl_steps}


# ----------------------------------------------------------------------------------- measurement


def measure(side: str, task: dict[str, Any], tokens: list[int]) -> Row:
    found = steps.alone(__file__, side, task)
    entering = [sum(tokens[i : i + PAIRS]) for i in range(0, len(tokens), PAIRS)]
    seconds = found["seconds"]
    assert len(seconds) == len(entering), f"{side}: {len(seconds)} steps"
    return {
        "side": side,
        "dtype": task["dtype"],
        **found,
        "tokens": entering,
        "tokens_per_second": sum(entering[WARMUP_STEPS:]) / sum(seconds[WARMUP_STEPS:]),
        "median_step_s": median(seconds[WARMUP_STEPS:]),
    }


def table(rows: list[Row]) -> str:
    lines = ["| trainer | dtype | tokens/s | median step, s | peak GiB |", "|---|---|---|---|---|"]
    lines += [
        f"| {row['side']} {row['version']} | {row['dtype']} | {row['tokens_per_second']:.0f} | "
        f"{row['median_step_s']:.2f} | {row['peak_gib']:.1f} |"
        for row in rows
    ]
    best = {
        side: max(
            (row for row in rows if row["side"] == side), key=lambda row: row["tokens_per_second"]
        )
        for side in {row["side"] for row in rows}
    }
    if len(best) == 2:
        ours, theirs = best["fastalign"], best["trl"]
        lines += [
            "",
            f"best against best: {ours['tokens_per_second'] / theirs['tokens_per_second']:.2f} "
            f"times the tokens/s, {ours['peak_gib'] / theirs['peak_gib']:.2f} of the memory",
        ]
    return "\n".join(lines)


def main() -> None:
    parser = steps.parser(__doc__ or "", "dpo-step.json")
    parser.add_argument("pairs", help="preference pairs, as hh-rlhf's harmless-base")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES))
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--micro-batch-tokens", type=int, default=4096)
    arguments = parser.parse_args()
    if arguments.steps < steps.LEAST_STEPS:
        parser.error(f"--steps {arguments.steps}: the first {WARMUP_STEPS} are not counted")
    model = steps.model_folder(arguments.model)
    settings = {
        "pairs": PAIRS,
        "longest": LONGEST,
        "steps": arguments.steps,
        "micro_batch_tokens": arguments.micro_batch_tokens,
    }
    report = steps.Report("dpo_step", arguments.output, settings, arguments.again)
    with tempfile.TemporaryDirectory(prefix="fastalign-") as folder:
        path = Path(folder, "pairs.jsonl")
        tokens = write_pairs(arguments.pairs, path, model, arguments.steps * PAIRS)
        for dtype in arguments.dtypes:
            for side in arguments.sides:
                if report.lacks(side=side, dtype=dtype):
                    task = {**settings, "model": model, "data": str(path), "dtype": dtype}
                    report.add(measure(side, task, tokens))
                print(table(report.rows), flush=True)


if __name__ == "__main__":
    steps.start(SIDES, main)
