"""How long training stands still for a checkpoint: written at once, and behind the training.

    python bench/async_save.py [--model PATH] [--output FILE]

Full fine-tuning in float32, a checkpoint after every step, in turns at once and behind: what else
the machine does disturbs both alike.  One that is being written is waited for before the next is
timed, which a run with fewer checkpoints does not.  Reported are medians; the first copy, for which
memory is allocated, stands apart.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import steps
from steps import Row

TURNS = 3


def run(task: dict[str, Any]) -> Row:
    import fastalign.train as loop
    from fastalign import checkpoint
    from fastalign.config import parse_config

    config = parse_config(
        {
            "method": "sft",
            "model_name_or_path": task["model"],
            "datasets": [{"path": task["data"]}],
            "output_dir": task["output_dir"],
            "dtype": "float32",
            "global_batch_size": 1,
            "max_length": 512,
            "max_steps": 2 * TURNS + 1,
            "num_train_epochs": 2.0 * TURNS + 1,
            "learning_rate": 1e-5,
            "report_to": [],
            "save_steps": 1,
            "save_total_limit": 1,
            "async_save": True,
        }
    )
    found: dict[str, list[float]] = {"at_once_s": [], "behind_s": []}
    size = 0.0
    save = loop.save

    def timed(run: Any, position: Any, pending: Any, behind: bool) -> Any:
        nonlocal size
        checkpoint.finish_checkpoint(run)
        behind = position.step % 2 == 0
        began = time.perf_counter()
        path = save(run, position, pending, behind=behind)
        found["behind_s" if behind else "at_once_s"].append(time.perf_counter() - began)
        size = checkpoint.bytes_to_come(run.model) / 2**20
        return path

    loop.save = timed
    loop.train(config)
    return {"checkpoint_mib": size, **found}


SIDES = {"train": run}


def main() -> None:
    options = steps.parser(__doc__ or "", "async-save.json").parse_args()
    model = steps.model_folder(options.model)
    report = steps.Report("async_save", options.output, {"model": Path(model).name}, options.again)
    if report.lacks():
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder, "rows.jsonl")
            data.write_text(json.dumps({"prompt": "Count.", "completion": "One, two."}) + "\n")
            report.add(steps.alone(__file__, "train", {"model": model, "data": str(data)}))
    (row,) = report.rows
    first, *later = row["behind_s"]
    print(
        f"a checkpoint of {row['checkpoint_mib']:,.0f} MiB: training stands still for "
        f"{median(row['at_once_s']):.2f} s where it is written at once, for {median(later):.2f} s "
        f"where it is written behind, {first:.2f} s the first time"
    )


if __name__ == "__main__":
    steps.start(SIDES, main)
