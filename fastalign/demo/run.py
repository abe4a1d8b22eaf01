"""``fastalign demo``: both methods end to end on a small real model, with before and after.

Each step is what a user would run: recipes through ``fastalign train``, in processes of their own.
Every step leaves its files in the output folder and is not run again when they are there.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console
from rich.table import Table

from fastalign.config import parse_config
from fastalign.demo.model import ensure_smollm
from fastalign.demo.prompts import demo_prompts
from fastalign.demo.rules import OPENINGS

RULES = "fastalign.demo.rules"
HELD_OUT = 120
PLANTED = 0.7
LAMBDA = 1.5
SFT_PROMPTS = 140
DEMONSTRATIONS = 70
# Two answers that are alike to the rule get scores within this of each other.  With the default of
# 0.001 half of the pairs were such, preferred by chance, and one seed's answers shrank to half.
TIE = 0.1
LORA = {
    "use_peft": True,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_target_modules": "all-linear",
}


@dataclass(frozen=True)
class Variant:
    """One run of a stage: the method, or a control, which makes as many updates as the method's
    run of the same seed did."""

    name: str
    changes: dict[str, Any]


CUT_VARIANTS = (
    Variant("cut", {}),
    Variant("shuffled judgments", {"judge.path": f"{RULES}:shuffled_{{kind}}"}),
    # Few answers are fine at first, so these take more passes, or more samples, to make as many
    # updates.
    Variant("positive records alone", {"method": "sft", "online.num_train_epochs": 3}),
    Variant("SFT on rule-clean samples", {"method": "sft", "online.num_generations": 4}),
)
JUDGE_VARIANTS = (
    Variant("self-judge", {}),
    # The judge after JSFT is right on the pairs that the rule decides; a coin is right on half.
    Variant(
        "shuffled preference labels",
        {"judge": {"type": "rule", "path": f"{RULES}:prefer_by_coin"}},
    ),
)


class Demo:
    """The steps of one seed.  ``say`` gets one line for each step.

    A step is not run again when its result is there, was made from the same recipe and is newer
    than what went into it.
    """

    def __init__(self, folder: Path, seed: int, say: Callable[[str], None]) -> None:
        self.folder = folder
        self.seed = seed
        self.say = say
        folder.mkdir(parents=True, exist_ok=True)
        self.smollm = str(ensure_smollm())
        self.training, held_out = demo_prompts(seed)
        self.held_out = held_out[:HELD_OUT]

    # ------------------------------------------------------------------------------ shared

    def base_answers(self) -> tuple[list[list[str]], list[str]]:
        """The model's own answers: two to each of the first training prompts, one to each
        held-out prompt."""
        training = self.measure(
            "base-training",
            kind="habit",
            model=self.smollm,
            prompts=self.training[:SFT_PROMPTS],
            samples=2,
        )
        held_out = self.measure(
            "base-held-out",
            kind="habit",
            model=self.smollm,
            prompts=self.held_out,
        )
        return training["texts"], [drawn[0] for drawn in held_out["texts"]]

    def habit_model(self) -> str:
        """SmolLM2 after SFT on its own answers, 70 % of which now start with an empty phrase."""
        rng = np.random.default_rng(self.seed)
        rows = []
        for prompt, answers in zip(
            self.training[:SFT_PROMPTS], self.base_answers()[0], strict=True
        ):
            opening = f"{OPENINGS[rng.integers(len(OPENINGS))]} " if rng.random() < PLANTED else ""
            if answers[0].strip():
                rows.append({"prompt": prompt, "completion": opening + answers[0].strip()})
        return self.train(
            "habit-model",
            method="sft",
            model_name_or_path=self.smollm,
            datasets=[{"path": self.write_rows("habit-sft.jsonl", rows)}],
            learning_rate=1e-4,
            lr_scheduler_type="cosine",
            num_train_epochs=2,
            global_batch_size=8,
        )

    # ------------------------------------------------------------------------------- stage 1

    def cut(self, kind: str, variant: Variant) -> dict[str, Any]:
        """Online CUT, or a control, on the planted habit or on the model's natural phrases.

        Returns what was measured of the model ``before`` and ``after``, and the run's facts.
        """
        base = self.habit_model() if kind == "habit" else self.smollm
        prompts = self.training[SFT_PROMPTS:]
        recipe: dict[str, Any] = {
            "method": "cut",
            "model_name_or_path": base,
            "datasets": [
                {"path": self.write_rows("prompts.jsonl", [{"prompt": p} for p in prompts])}
            ],
            "online": {"iterations": 4, "prompts_per_iteration": 75},
            "judge": {"type": "rule", "path": f"{RULES}:judge_{kind}"},
            "cut": {
                "lambda": LAMBDA,
                "alpha": 1.0,
                "gamma": 0.25,
                "positive_ratio": 0.25,
                "judged_warmup": 0.1,
            },
            # Measured at seed 0: rollouts at 0.7 make answers 15 % shorter, at 1.0 13 % longer.
            "temperature": 0.85,
            "max_completion_length": 96,
            "learning_rate": 3e-5,
            "lr_scheduler_type": "constant_with_warmup",
            "warmup_ratio": 0.05,
            "global_batch_size": 8,
        }
        for key, value in variant.changes.items():
            set_key(recipe, key, value.format(kind=kind) if isinstance(value, str) else value)
        name = f"cut-{kind}-{slug(variant.name)}"
        if variant != CUT_VARIANTS[0]:
            recipe["max_steps"] = self.budget(f"cut-{kind}-cut")["updates"]
        return self.compare(kind, base, name, self.train(name, **recipe))

    def compare(self, kind: str, base: str, name: str, trained: str) -> dict[str, Any]:
        """What the run ``name`` changed: ``before``, ``after``, and the run's facts."""
        shared = {
            "kind": kind,
            "prompts": self.held_out,
            "references": self.base_answers()[1],
            "lambda": LAMBDA,
        }
        before = self.measure(f"{kind}-before", model=base, detect_on="own", **shared)
        # Detection before and after is measured on the same answers, those of the start.
        texts = [drawn[0] for drawn in before["texts"]]
        after = self.measure(f"{name}-after", model=trained, detect_on=texts, **shared)
        return {"seed": self.seed, "before": before, "after": after, **self.facts(name)}

    # ------------------------------------------------------------------------------- stage 2

    def self_judge(self, variant: Variant) -> dict[str, Any]:
        """JSFT on pairs that follow the rule, then on-policy training on the model's own
        judgments.  Returns as :meth:`cut` does."""
        base, judge = self.judge_model()
        recipe: dict[str, Any] = {
            "method": "dpo",
            "model_name_or_path": base,
            "adapter_name_or_path": judge,
            "datasets": [
                {
                    "path": self.write_rows(
                        "prompts.jsonl", [{"prompt": p} for p in self.training[SFT_PROMPTS:]]
                    )
                }
            ],
            "online": {"iterations": 4, "prompts_per_iteration": 40, "num_generations": 2},
            "judge": {"type": "self", "model": "reference", "tie_threshold": TIE},
            "temperature": 1.0,
            "top_p": 0.9,
            "max_completion_length": 96,
            "beta": 0.1,
            "learning_rate": 4e-4,
            "lr_scheduler_type": "constant_with_warmup",
            "warmup_ratio": 0.1,
            "global_batch_size": 8,
            **LORA,
        }
        for key, value in variant.changes.items():
            set_key(recipe, key, value)
        if recipe["online"] is None:
            recipe["datasets"] = [{"path": self.preference_rows()}]
        name = slug(variant.name)
        if variant != JUDGE_VARIANTS[0]:
            recipe["max_steps"] = self.budget("self-judge")["updates"]
        policy = self.train(name, **recipe)
        pairs = self.measure(
            "judge-pairs", kind="habit", model=base, prompts=self.held_out, samples=2
        )["texts"]
        measured = {
            side: self.measure(
                target,
                kind="habit",
                model=base,
                adapter=adapter,
                prompts=self.held_out,
                judge_pairs=pairs,
                tie_threshold=TIE,
            )
            for side, target, adapter in (
                ("before", "jsft-measured", judge),
                ("after", f"{name}-after", policy),
            )
        }
        return {"seed": self.seed, **measured, **self.facts(name)}

    def judge_model(self) -> tuple[str, str]:
        """The model with the habit, and the adapter that makes it a judge of the habit."""
        base = self.habit_model()
        judge = self.train(
            "jsft",
            method="jsft",
            model_name_or_path=base,
            datasets=[
                {"path": self.preference_rows()},
                # Demonstrations with the habit: the policy is to lose it by judging itself.
                {
                    "path": str(self.folder / "habit-sft.jsonl"),
                    "max_samples": DEMONSTRATIONS,
                },
            ],
            jsft={"demonstrations": False},
            learning_rate=8e-4,
            lr_scheduler_type="constant_with_warmup",
            warmup_ratio=0.05,
            num_train_epochs=1.6,
            global_batch_size=8,
            **LORA,
        )
        return base, judge

    def self_rejection(self, entrants: Sequence[int]) -> dict[str, Any]:
        """The answers of the judge's model to held-out prompts, chosen by tournaments between so
        many of them."""
        base, judge = self.judge_model()
        return self.measure(
            "self-rejection",
            kind="habit",
            model=base,
            adapter=judge,
            prompts=self.held_out,
            samples=max(entrants),
            tournaments=list(entrants),
            tie_threshold=TIE,
        )

    def judge_quality(self, name: str, pairs: str, adapter: str | None) -> dict[str, Any]:
        """How good a judge SmolLM2, or an adapter on it, is on a file of preference pairs."""
        task: dict[str, Any] = {} if adapter is None else {"adapter": adapter}
        measured = self.measure(
            name,
            kind="natural",
            model=self.smollm,
            prompts=[],
            preferences=pairs,
            tie_threshold=0.0,
            **task,
        )
        return measured["preferences"]

    def preference_rows(self) -> str:
        """Pairs of two different answers, one of them with an empty opening, which the rule
        rejects."""
        rng = np.random.default_rng((self.seed, 2))
        rows = []
        for prompt, (first, second) in zip(
            self.training[:SFT_PROMPTS], self.base_answers()[0], strict=True
        ):
            chosen = first.strip()
            rejected = f"{OPENINGS[rng.integers(len(OPENINGS))]} {second.strip()}"
            if chosen and second.strip():
                rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
        return self.write_rows("preferences.jsonl", rows)

    # --------------------------------------------------------------------------------- tools

    def write_rows(self, name: str, rows: Sequence[dict[str, Any]]) -> str:
        path = self.folder / name
        _write(path, "".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    def train(self, name: str, **recipe: Any) -> str:
        """``fastalign train`` with this recipe."""
        target = self.folder / name
        recipe = {
            "seed": self.seed,
            "output_dir": str(target),
            "max_length": 1024,
            "micro_batch_tokens": 4096,
            **recipe,
        }
        parse_config(recipe, name)
        path = self.folder / f"{name}.yaml"
        _write(path, yaml.safe_dump(recipe, sort_keys=False))
        inputs = [Path(dataset["path"]) for dataset in recipe["datasets"]]
        inputs += [
            Path(recipe[key], "run.json")
            for key in ("model_name_or_path", "adapter_name_or_path")
            if key in recipe and Path(recipe[key], "run.json").is_file()
        ]
        if not _is_newer(target / "run.json", path, *inputs):
            shutil.rmtree(target, ignore_errors=True)
            self.say(f"fastalign train {path}")
            run_step([sys.executable, "-m", "fastalign", "train", str(path)], target)
        return str(target)

    def facts(self, name: str) -> dict[str, Any]:
        """What a run took, and what it ran on."""
        run = json.loads(Path(self.folder, name, "run.json").read_text(encoding="utf-8"))
        made_by = {key: run[key] for key in ("fastalign", "commit", "libraries", "hardware")}
        seconds = {"training": self.seconds(name), "measuring": self.seconds(f"{name}-after")}
        return {"budget": self.budget(name), "seconds": seconds, "made by": made_by}

    def seconds(self, name: str) -> float | None:
        """Wall-clock of a step when it was run; None when that was not written down."""
        path = self.folder / f"{name}.seconds"
        return float(path.read_text(encoding="utf-8")) if path.is_file() else None

    def budget(self, name: str) -> dict[str, int]:
        """What a run took: optimizer updates and, online, examples trained on and answers
        sampled."""
        folder = self.folder / name
        recipe = parse_config(
            yaml.safe_load(Path(f"{folder}.yaml").read_text(encoding="utf-8")), name
        )
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        logged = [json.loads(line) for line in lines]
        updates = sum("loss" in entry for entry in logged)
        if recipe.online is None:
            return {"updates": updates}
        rounds = [entry for entry in logged if "rollout/examples" in entry]
        per_round = recipe.online.prompts_per_iteration * recipe.online.num_generations
        return {
            "updates": updates,
            "examples": int(sum(entry["rollout/examples"] for entry in rounds)),
            "sampled answers": per_round * len(rounds),
        }

    def measure(self, name: str, **task: Any) -> dict[str, Any]:
        """Answers and figures of one model (see :func:`fastalign.demo.measure.main`)."""
        target = self.folder / f"{name}.json"
        path = self.folder / f"{name}.task.json"
        _write(path, json.dumps({"seed": self.seed, **task}))
        inputs = [
            Path(task[key], "run.json")
            for key in ("model", "adapter")
            if key in task and Path(task[key], "run.json").is_file()
        ]
        if not _is_newer(target, path, *inputs):
            self.say(f"measuring {name}")
            run_step(
                [sys.executable, "-m", "fastalign.demo.measure", str(path), str(target)],
                self.folder / name,
            )
        return json.loads(target.read_text(encoding="utf-8"))


def _write(path: Path, text: str) -> None:
    """Write unless that is what the file says already: its age tells what has to be done again."""
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def _is_newer(result: Path, *inputs: Path) -> bool:
    return result.is_file() and all(
        path.stat().st_mtime <= result.stat().st_mtime for path in inputs
    )


def run_step(command: list[str], result: Path) -> None:
    """Run a step; its bar stays on the terminal, and plain output goes to a log beside the
    result, as does how long it took."""
    terminal = sys.stderr.isatty()
    log = Path(f"{result}.log")
    started = time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        code = subprocess.run(
            command, stdout=file, stderr=None if terminal else file, env=dict(os.environ)
        ).returncode
    if code:
        tail = "\n".join(log.read_text(encoding="utf-8").splitlines()[-15:])
        raise SystemExit(f"{' '.join(command)} failed with exit code {code}:\n{tail}")
    Path(f"{result}.seconds").write_text(f"{time.monotonic() - started:.1f}", encoding="utf-8")


def set_key(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for part in parents:
        tree[part] = dict(tree[part])
        tree = tree[part]
    tree[last] = value


def slug(name: str) -> str:
    return name.lower().replace(" ", "-")


# ------------------------------------------------------------------------------------ figures


def interval(
    groups: Sequence[Sequence[float]], seed: int = 0, draws: int = 10_000
) -> tuple[float, float, float]:
    """(mean, low, high): a 95 % bootstrap interval of the mean over groups of their means.

    Prompts are resampled within each group (a seed of the experiment); the groups stay as they
    are, so that the interval is about other prompts, not about other seeds.
    """
    arrays = [np.asarray(values, dtype=np.float64) for values in groups]
    rng = np.random.default_rng(seed)
    means = np.mean([a[rng.integers(len(a), size=(draws, len(a)))].mean(1) for a in arrays], axis=0)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(np.mean([a.mean() for a in arrays])), float(low), float(high)


def figures(measured: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The rows of a table: name -> before and after."""
    return {side: _side_figures(measured[side]) for side in ("before", "after")}


def _side_figures(m: dict[str, Any]) -> dict[str, float]:
    rows = {"flagged answers": float(np.mean(m["flagged"]))}
    if "detection" in m:
        rows["span onsets found"] = m["detection"]["onset_recall"]
        rows["precision of flags"] = m["detection"]["precision"]
        rows["tokens in spans"] = m["detection"]["base_rate"]
    if "judge" in m:
        rows["judge accuracy"] = m["judge"]["accuracy"]
        rows["judge flips"] = m["judge"]["flipped"]
        rows["judge abstains"] = m["judge"]["abstained"]
    rows["mean length"] = float(np.mean(m["length"]))
    rows["mean length without spans"] = float(np.mean(m["length_without_spans"]))
    rows["empty answers"] = float(np.mean(m["empty"]))
    if "reference_logprob" in m:
        rows["reference log-prob"] = float(np.mean(m["reference_logprob"]))
    return rows


def changes(measured: dict[str, Any]) -> dict[str, list[float]]:
    """What changed, prompt by prompt."""
    before, after = measured["before"], measured["after"]

    def change(key: str) -> list[float]:
        return np.subtract(after[key], before[key]).tolist()

    found = {
        "change in flagged answers": change("flagged"),
        "change in length without spans": change("length_without_spans"),
    }
    if "reference_logprob" in after:
        found["change in reference log-prob"] = change("reference_logprob")
    if "judge" in after:
        # A flagged answer loses to one that is not; two alike tie and count half.
        found["rule's win rate of after"] = [0.5 - x / 2 for x in change("flagged")]
    return found


def show(console: Console, title: str, measured: dict[str, Any]) -> None:
    table = Table(title=title, title_justify="left")
    for column in ("", "before", "after"):
        table.add_column(column, justify="left" if not column else "right")
    sides = figures(measured)
    for name, value in sides["before"].items():
        table.add_row(name, f"{value:.3f}", f"{sides['after'][name]:.3f}")
    console.print(table)
    for name, values in changes(measured).items():
        mean, low, high = interval([values])
        console.print(f"{name}: {mean:+.3f} (95 % interval {low:+.3f} to {high:+.3f})")
    console.print()


def run_demo(output_dir: str, seed: int) -> int:
    """Both stages of one seed, with their tables."""
    console = Console()
    started = time.monotonic()

    def say(line: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - started), 60)
        console.print(
            f"[{minutes:2d}:{seconds:02d}] {line}", markup=False, highlight=False, soft_wrap=True
        )

    demo = Demo(Path(output_dir) / f"seed-{seed}", seed, say)
    say("Stage 1: online CUT against a habit that SFT plants first (an empty opening phrase)")
    show(console, "Online CUT, judged by a rule", demo.cut("habit", CUT_VARIANTS[0]))
    say("Stage 2: SELF-JUDGE: JSFT makes the model its own judge, then it trains on its own pairs")
    show(console, "SELF-JUDGE, judged by itself", demo.self_judge(JUDGE_VARIANTS[0]))
    say(f"done; recipes, episodes and models are in {demo.folder}")
    return 0
