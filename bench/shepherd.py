"""One epoch of CUT on Shepherd's judgments with the published offline settings, and its curves.

    python bench/shepherd.py shepherd.jsonl [--model PATH] [--output-dir FOLDER]
        [--result FILE] [key.sub=value ...]

trains by recipes/cut-offline.yaml, of which model, data and output alone are changed, and writes
the curves to FILE (JSON) and a drawing beside it (PNG).  Interrupted, it goes on from the newest
checkpoint when it is started again; a finished run is read and not run again.

Every record is seen once: what a step logs is measured on records that no earlier step has seen.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Read when the libraries are imported: a benchmark reports to nobody.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import numpy as np

from fastalign import cli
from fastalign.config import DatasetConfig
from fastalign.data import load_records
from fastalign.demo.model import ensure_smollm

ROOT = Path(__file__).resolve().parent.parent
RECIPE = "recipes/cut-offline.yaml"
RESULT = ROOT / "bench" / "results" / "shepherd.json"
# Name in metrics.jsonl -> what a reader is told.
CURVES = {
    "loss": "loss",
    "cut/align_n": "Align-N: -log c",
    "cut/misalign_likelihood": "Misalign, outside U: -log q",
    "cut/misalign_penalty": "Misalign, inside U: penalty",
    "cut/flagged": "share of tokens in U",
    "cut/contrast": "mean log c - log q",
    "grad_norm": "gradient norm",
    "learning_rate": "learning rate",
}
WINDOW = 10  # steps of the running mean
CHECKPOINT_STEPS = 10


def train(folder: Path, data: Path, model: Path, overrides: Sequence[str]) -> int:
    """``fastalign train`` from where it stopped; its exit code."""
    return cli.main(
        [
            "train",
            str(ROOT / RECIPE),
            f"model_name_or_path={model}",
            f"datasets.0.path={data}",
            f"output_dir={folder}",
            f"save_steps={CHECKPOINT_STEPS}",
            *overrides,
            "--resume",
        ]
    )


def summarise(folder: Path, data: Path) -> dict[str, Any]:
    """What went in, what it took, and the curves, one value for each step."""
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [line for line in map(json.loads, lines) if "loss" in line]
    _, report = load_records([DatasetConfig(path=str(data))], strict=False, seed=0, want="judged")
    (source,) = report.sources
    return {
        "recipe": RECIPE,
        "data": {
            "file": data.name,
            "sha256": run["data"][str(data)],
            "rows": source.rows,
            "negative": source.negative,
            "positive": source.usable - source.negative,
            "dropped": source.drops.counts,
        },
        "steps": len(steps),
        "seconds": round(sum(step["time/step"] for step in steps), 1),
        "made by": {key: run[key] for key in ("fastalign", "commit", "libraries", "hardware")},
        # A batch without a record of some kind has no figure for it.
        "curves": {name: [step.get(name) for step in steps] for name in CURVES},
    }


def draw(path: Path, report: dict[str, Any]) -> None:
    """Each curve, and its running mean over the steps that have a value."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 4, figsize=(16, 6.4), layout="constrained")
    figure.suptitle(f"CUT on {report['data']['file']}: one epoch, {report['steps']} steps")
    for axis, (name, title) in zip(axes.flat, CURVES.items(), strict=True):
        points = [(i, v) for i, v in enumerate(report["curves"][name], 1) if v is not None]
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        if not points:
            continue
        steps, values = np.array(points).T
        width = min(WINDOW, len(values))
        smooth = np.convolve(values, np.ones(width) / width, mode="valid")
        axis.plot(steps, values, color="tab:blue", linewidth=0.8, alpha=0.5)
        axis.plot(steps[width - 1 :], smooth, color="tab:blue", linewidth=1.6)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path, help="shepherd.jsonl")
    parser.add_argument("--model", type=Path, help="folder of a causal LM; default: SmolLM2-135M")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/shepherd"))
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    # Overrides may stand behind options.
    arguments = parser.parse_intermixed_args(argv)
    folder = arguments.output_dir
    if not (folder / "run.json").is_file():
        model = arguments.model or ensure_smollm()
        code = train(folder, arguments.data, model, arguments.overrides)
        if code:
            return code
    report = {
        "command": shlex.join(["python", "bench/shepherd.py", *(argv or sys.argv[1:])]),
        **summarise(folder, arguments.data),
    }
    arguments.result.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=1, allow_nan=False)
    arguments.result.write_text(text + "\n", encoding="utf-8")
    draw(arguments.result.with_suffix(".png"), report)
    print(f"{report['steps']} steps in {report['seconds'] / 60:.1f} minutes: {arguments.result}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
