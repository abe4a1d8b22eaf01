"""What a step costs as sequences get longer, prompts get more answers, and ranks are added.

    python bench/scaling.py PAIRS [--axes length group ranks] [--output FILE] [key options]

Steps of `fastalign train` with LoRA of rank 8 on all linear layers:

- length: SFT on one sequence of 256 to 4096 tokens a step;
- group: DPO on 16 answers a step (8 pairs of hh-rlhf's harmless-base), which answer 8, 4, 2
  or 1 prompts of 128 tokens: groups of 2 to 16 answers of one prompt, seconds for one group;
- ranks: DPO on 8 pairs a step by 1 and 2 processes of one thread each.

The result is one JSON file of measured points and a drawing beside it (PNG): the time, and beside
it the line that the work's own growth makes of the first point.  Work is operations that a step
cannot do without, as fastalign.timeline counts them: 2 N forward and 2 N backward a token for
frozen weights, 2 N again for trained ones, attention's pairs of query and key, and the head's rows;
DPO's reference is asked before the first step, and no part of one.  For groups it counts a prompt
once, however many answers it has.
`growth` is time over that line: 1 or less is growth no worse than the work's.

The floor of each point is its operations at the rate of bare products (bench/NOTES.md has the
machine's); bytes are the weights, 2 (N + V D), read three times a pack.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

import steps
import torch
from racing import DEVICE, machine
from steps import Row

RESULT = "scaling.json"
RANK, ANSWERS, PROMPT, PACK = 8, 16, 128, 4096
TURNS_UNCOUNTED = 1
RUNNING_TEXT = 1 << 15  # characters
TITLES = {
    "length": ("tokens of the sequence", "s a step"),
    "group": ("answers of one prompt", "s a group"),
    "ranks": ("ranks", "s a step"),
}


def recipe(task: dict[str, Any]) -> dict[str, Any]:
    return {
        "model_name_or_path": task["model"],
        "datasets": [{"path": task["data"]}],
        "output_dir": task["output_dir"],
        "shuffle": False,
        "use_peft": True,
        "lora_r": RANK,
        "dtype": task["dtype"],
        "max_length": task["longest"],
        "micro_batch_tokens": max(task["longest"], PACK),
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "report_to": [],
    }


# ------------------------------------------------------------------------------------------ data


class Texts:
    """Prompts and answers of a file of preference pairs, and the model's tokenizer."""

    def __init__(self, source: str, model: str) -> None:
        import transformers

        from fastalign.config import DatasetConfig
        from fastalign.data import load_records
        from fastalign.templates import Renderer

        self.tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        data = [DatasetConfig(path=source)]
        records, _ = load_records(data, strict=False, seed=0, want="preference")
        self.prompts = [[{k: m[k] for k in ("role", "content")} for m in r.prompt] for r in records]
        self.answers = [(r.chosen or "", r.rejected or "") for r in records]
        text = " ".join(answer for pair in self.answers for answer in pair)
        self._stream = self.tokenizer.encode(text[:RUNNING_TEXT])

        empty = [{"role": "user", "content": ""}]
        self.template = len(Renderer(self.tokenizer).prompt_ids(empty)) + 1

    def of(self, tokens: int, at: int = 0) -> str:
        """Running text of about so many tokens."""
        repeats = -(-(at + tokens) // len(self._stream))
        return self.tokenizer.decode((self._stream * repeats)[at : at + tokens])


def length_rows(texts: Texts, task: dict[str, Any]) -> list[Row]:
    """One sequence a step, a quarter of it prompt."""
    rows = []
    for length in task["points"]:
        prompt = [{"role": "user", "content": texts.of(length // 4)}]
        answer = texts.of(length - length // 4 - texts.template, at=length)
        rows.append({"prompt": prompt, "completion": answer})
    return rows


def group_rows(texts: Texts, task: dict[str, Any]) -> list[Row]:
    """The same answers in each step, dealt out to fewer and fewer prompts of one length."""
    rows = []
    for size in task["points"]:
        for i, (chosen, rejected) in enumerate(texts.answers[: ANSWERS // 2]):
            content = texts.of(PROMPT, at=PROMPT * (i // (size // 2)))
            prompt = [{"role": "user", "content": content}]
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows


def rank_rows(texts: Texts, task: dict[str, Any]) -> list[Row]:
    pairs = zip(texts.prompts, texts.answers, strict=True)
    return [
        {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        for prompt, (chosen, rejected) in list(pairs)[: ANSWERS // 2]
    ]


def write(rows: list[Row], turns: int, path: Path) -> str:
    """The points in turns: what disturbs the machine disturbs them alike."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text * turns, encoding="utf-8")
    return str(path)


# ----------------------------------------------------------------------------------------- sides


def lengths(task: dict[str, Any]) -> Row:
    tree = {**recipe(task), "method": "sft", "global_batch_size": 1}
    return points(task, steps.train_steps(tree, beside=least_work))


def groups(task: dict[str, Any]) -> Row:
    tree = {**recipe(task), "method": "dpo", "global_batch_size": ANSWERS // 2}
    return points(task, steps.train_steps(tree, beside=least_work))


def points(task: dict[str, Any], found: Row) -> Row:
    """The steps of each point, by turns."""
    by_turn = len(task["points"])
    counted = slice(TURNS_UNCOUNTED, None)
    made = []
    for place, point in enumerate(task["points"]):
        seconds = found["seconds"][place::by_turn][counted]
        work = found["beside"][place::by_turn][counted]
        log = found["logged"][place::by_turn][counted]
        made.append(
            {
                "point": point,
                "seconds": seconds,
                "operations": [one["least"] for one in work],
                "operations_done": [r["speed/tflops"] * 1e12 * r["time/step"] for r in log],
                "tokens": [one["tokens"] for one in work],
            }
        )
    return {"points": made}


def least_work(run: Any, examples: Any) -> Row:
    """Operations of a step in which all answers of a prompt share it, and its tokens."""
    from fastalign.batch import make_batch

    def prompt(example: Any) -> bytes:
        stream = example.streams[0]
        return stream.input_ids[: int(stream.loss_mask.argmax())].tobytes()

    merged = [
        replace(next(iter(same)), streams=tuple(s for e in same for s in e.streams))
        for same in (list(group) for _, group in groupby(examples, prompt))
    ]
    packs = [make_batch([example], share_prefixes=True) for example in merged]
    tokens = sum(len(stream.input_ids) for example in examples for stream in example.streams)
    least = run.operations.of(packs, reference=False)
    return {"least": least, "tokens": tokens}


def ranks(task: dict[str, Any]) -> Row:
    """The command itself, which starts the processes; one thread each."""
    import yaml

    from fastalign import cli

    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)  # where one process is this one
    tree = {
        **recipe(task),
        "method": "dpo",
        "global_batch_size": ANSWERS // 2,
        "nproc_per_node": task["ranks"],
    }
    path = Path(task["data"]).with_name(f"ranks-{task['ranks']}.yaml")
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    code = cli.main(["train", str(path)])
    if code:
        sys.exit(code)
    log = steps.logged(task["output_dir"])[TURNS_UNCOUNTED:]
    return {
        "points": [
            {
                "point": task["ranks"],
                "seconds": [row["time/step"] for row in log],
                # Of this rank.
                "operations": [row["speed/tflops"] * 1e12 * row["time/step"] for row in log],
            }
        ]
    }


SIDES = {"length": lengths, "group": groups, "ranks": ranks}
ROWS = {"length": length_rows, "group": group_rows, "ranks": rank_rows}


# ----------------------------------------------------------------------------------- measurement


def growth(points: list[Row]) -> list[Row]:
    """Medians of each point, and its time over what the growth of the work makes of the first."""
    made: list[Row] = []
    for point in points:
        per_step = ANSWERS // point["point"] if point["axis"] == "group" else 1
        made.append(
            {
                "axis": point["axis"],
                "point": point["point"],
                "seconds": median(point["seconds"]) / per_step,
                "operations": median(point["operations"]) / per_step,
            }
        )
    first = made[0]
    for row in made:
        if row["axis"] == "ranks":
            # An equal share each, whatever the packing made of it.
            row["operations"] = first["operations"] * first["point"] / row["point"]
        row["line"] = first["seconds"] * row["operations"] / first["operations"]
        row["growth"] = row["seconds"] / row["line"]
    return made


def curves(rows: list[Row]) -> dict[str, list[Row]]:
    points = [{"axis": r["axis"], **point} for r in rows for point in r["points"]]
    by_axis = {axis: [p for p in points if p["axis"] == axis] for axis in TITLES}
    return {
        axis: growth(sorted(found, key=lambda p: p["point"]))
        for axis, found in by_axis.items()
        if found
    }


def draw(path: Path, found: dict[str, list[Row]], device: str) -> None:
    """Measured time, and the growth of the work beside it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(found), figsize=(4.6 * len(found), 3.8), layout="constrained", squeeze=False
    )
    figure.suptitle(f"Cost of a training step, {device}")
    for axis, (name, rows) in zip(axes[0], found.items(), strict=True):
        x = [row["point"] for row in rows]
        axis.plot(x, [row["line"] for row in rows], "--", color="gray", label="growth of the work")
        axis.plot(x, [row["seconds"] for row in rows], "o-", color="tab:blue", label="measured")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.set_xticks(x, labels=map(str, x))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set_xlabel(TITLES[name][0])
        axis.set_ylabel(TITLES[name][1])
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def table(found: dict[str, list[Row]]) -> str:
    lines = [
        "| axis | point | seconds | growth of the work | time over it | GFLOP/s |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for axis, rows in found.items():
        for row in rows:
            rate = row["operations"] / row["seconds"] / 1e9
            cells = [
                axis,
                str(row["point"]),
                f"{row['seconds']:.2f}",
                f"{row['line']:.2f}",
                f"{row['growth']:.2f}",
                f"{rate:.0f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = steps.parser(__doc__ or "", RESULT)
    parser.add_argument("pairs", help="preference pairs, as hh-rlhf's harmless-base")
    parser.add_argument("--axes", nargs="+", choices=list(SIDES), default=list(SIDES))
    lengths = [256, 512, 1024, 2048, 4096]
    parser.add_argument("--lengths", type=int, nargs="+", default=lengths)
    parser.add_argument("--groups", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--turns", type=int, default=4, help="of each point; the first not counted")
    parser.add_argument("--dtype", default="bfloat16")
    arguments = parser.parse_args()
    if arguments.turns <= TURNS_UNCOUNTED:
        parser.error(f"--turns {arguments.turns}: the first {TURNS_UNCOUNTED} is not counted")
    if DEVICE.type == "cuda" and "ranks" in arguments.axes:
        arguments.ranks = [n for n in arguments.ranks if n <= torch.cuda.device_count()]
    settings = {"turns": arguments.turns, "dtype": arguments.dtype}
    report = steps.Report("scaling", arguments.output, settings, arguments.again)
    model = steps.model_folder(arguments.model)
    with tempfile.TemporaryDirectory(prefix="fastalign-") as name:
        texts = Texts(arguments.pairs, model)
        for axis in arguments.axes:
            for ranks in arguments.ranks if axis == "ranks" else [None]:
                task = {
                    **settings,
                    "model": model,
                    "points": {"length": arguments.lengths, "group": arguments.groups}.get(
                        axis, []
                    ),
                    "ranks": ranks,
                    "longest": max(arguments.lengths) if axis == "length" else 1024,
                }
                key = {"axis": axis, "ranks": ranks, "of": task["points"]}
                if report.lacks(**key):
                    rows = ROWS[axis](texts, task)
                    task["data"] = write(rows, arguments.turns, Path(name, f"{axis}.jsonl"))
                    report.add({**key, **steps.alone(__file__, axis, task)})
                found = curves(report.rows)
                draw(arguments.output.with_suffix(".png"), found, machine()["device"])
                print(table(found), flush=True)


if __name__ == "__main__":
    steps.start(SIDES, main)
