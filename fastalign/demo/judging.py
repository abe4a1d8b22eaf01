"""The orders that SELF-JUDGE's paper reports (arXiv 2402.11253), on the demo's second stage.

``python -m fastalign.demo.judging`` trains from one JSFT model for each seed: on pairs that the
policy samples as it learns, on pairs that the start samples, and on the pairs that JSFT learnt to
judge from; with the frozen judge, with the policy of now, and with one that follows in rounds; and
by the sampling baselines.  The start's own answers are then chosen from by knockout tournaments.
With ``--hh`` a judge is also made from human preferences (Anthropic's hh-rlhf, harmless-base).

It keeps every step in the output folder, so that an interrupted experiment goes on where it
stopped, and writes one JSON with each run's figures, means over seeds and 95 % intervals.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastalign.config import DatasetConfig
from fastalign.data import Record, load_records
from fastalign.demo.experiment import summary, write_result
from fastalign.demo.rules import opening_spans
from fastalign.demo.run import JUDGE_VARIANTS, LORA, Demo, Variant, interval, slug
from fastalign.episodes import LOG
from fastalign.judge_quality import THRESHOLDS

ON_POLICY = {"iterations": 4, "prompts_per_iteration": 40, "num_generations": 2}
ALL_PROMPTS = {"iterations": 1, "prompts_per_iteration": 160, "num_generations": 2}
# As many sampled answers, four to a prompt.
FOUR = {"iterations": 4, "prompts_per_iteration": 20, "num_generations": 4}
FOUR_AT_ONCE = {"iterations": 1, "prompts_per_iteration": 80, "num_generations": 4}
VARIANTS = (
    JUDGE_VARIANTS[0],
    Variant("current policy judges", {"judge.model": "policy"}),
    Variant("judge follows in rounds", {"online": {**ON_POLICY, "rounds_per_reference": 2}}),
    Variant("off-policy", {"online": ALL_PROMPTS}),
    Variant("offline", {"online": None, "judge": None}),
    Variant("RSO", {"method": "rso", "online": FOUR_AT_ONCE}),
    Variant("ReST", {"method": "rest", "online": FOUR}),
    Variant("RAFT", {"method": "raft", "online": FOUR}),
)
ENTRANTS = (1, 2, 4, 8, 16)
"""Answers to a prompt that a tournament chooses from."""
HH_PAIRS, HH_HELD_OUT = 480, 300
HH_CHARACTERS = 700
"""Longest dialogue with both answers that is taken: short ones are quick, and easier to judge."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fastalign.demo.judging")
    parser.add_argument("--output-dir", default="runs/demo", help="shared with the demo's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    names = [variant.name for variant in VARIANTS]
    parser.add_argument("--variants", nargs="*", choices=names, default=names, metavar="NAME")
    parser.add_argument("--hh", type=Path, help="preference pairs of hh-rlhf, harmless-base")
    parser.add_argument("--result", default="bench/results/judging.json")
    arguments = parser.parse_args(argv)

    started = time.monotonic()

    def say(line: str) -> None:
        print(f"[{(time.monotonic() - started) / 60:6.1f} min] {line}", flush=True)

    demos = {
        seed: Demo(Path(arguments.output_dir) / f"seed-{seed}", seed, say)
        for seed in arguments.seeds
    }
    path = Path(arguments.result)
    result: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "fastalign.demo.judging", *sys.argv[1:]]),
        "variants": {v.name: v.changes for v in VARIANTS if v.name in arguments.variants},
    }
    # Written after each run: what is done is never lost.
    measured: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for variant in (v for v in VARIANTS if v.name in arguments.variants):
        for seed, demo in demos.items():
            say(f"seed {seed}: {variant.name}")
            outcome = demo.self_judge(variant)
            measured.setdefault(("self-judge", variant.name), []).append(outcome)
            result["made by"] = outcome["made by"]
            result["training"] = summary(measured)["self-judge"]
            write_result(path, result)
    result["ties"] = ties(
        log
        for variant in result["variants"]
        for demo in demos.values()
        for log in sorted(Path(demo.folder, slug(variant), LOG).glob("*.jsonl"))
    )
    write_result(path, result)
    tournaments = []
    for seed, demo in demos.items():
        say(f"seed {seed}: self-rejection")
        tournaments.append(demo.self_rejection(ENTRANTS))
        result["self-rejection"] = self_rejection(list(demos)[: len(tournaments)], tournaments)
        write_result(path, result)
    if arguments.hh is not None:
        judged = []
        for seed, demo in demos.items():
            say(f"seed {seed}: a judge from human preferences")
            judged.append(human_preferences(demo, arguments.hh))
            result["human preferences"] = {
                "pairs trained on": HH_PAIRS,
                "pairs held out": HH_HELD_OUT,
                "seeds": [{"seed": s, **q} for s, q in zip(demos, judged, strict=False)],
            }
            write_result(path, result)


def self_rejection(seeds: Sequence[int], measured: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """For each number of entrants: share of winners that the rule flags and their length, by seed
    and pooled with intervals over prompts, and what a judge that always is right would reach."""
    sides: dict[str, Any] = {}
    for n in ENTRANTS:
        runs = [m["tournaments"][str(n)] for m in measured]
        sides[str(n)] = {
            "flagged": interval([run["flagged"] for run in runs]),
            # All entrants have to have the habit for the winner of a perfect judge to have it.
            "flagged with a perfect judge": interval([run["all_flagged"] for run in runs]),
            "length": interval([run["length"] for run in runs]),
            "seeds": [
                {"seed": seed, "flagged": float(np.mean(run["flagged"])), "ties": run["ties"]}
                for seed, run in zip(seeds, runs, strict=True)
            ],
        }
    return sides


def ties(logs: Iterable[Path]) -> dict[str, Any]:
    """What a judge decides, by the least difference of scores that counts, of the pairs in episode
    logs: of those that are alike to the rule, and of those that it tells apart, how often
    rightly."""
    alike: list[float] = []
    differ: list[float] = []
    for log in logs:
        for line in log.read_text(encoding="utf-8").splitlines():
            episode = json.loads(line)
            clean = [not opening_spans(text) for text in episode["completions"]]
            for (a, b), verdict in zip(episode["matches"], episode["verdicts"], strict=True):
                margin = verdict["score_a"] - verdict["score_b"]
                if clean[a] == clean[b]:
                    alike.append(abs(margin))
                else:
                    differ.append(margin if clean[a] else -margin)
    table = {}
    for tie in THRESHOLDS:
        decided = [margin for margin in differ if abs(margin) > tie]
        table[str(tie)] = {
            "alike, decided": float(np.mean([margin > tie for margin in alike])),
            "different, decided": len(decided) / len(differ),
            "of these, rightly": float(np.mean([margin > 0 for margin in decided])),
        }
    return {"pairs alike": len(alike), "pairs that differ": len(differ), "thresholds": table}


def human_preferences(demo: Demo, path: Path) -> dict[str, Any]:
    """How well the model judges held-out human preferences before JSFT on others, and after."""
    records, _ = load_records([DatasetConfig(path=str(path))], strict=False, seed=0)
    short = [record for record in records if _characters(record) <= HH_CHARACTERS]
    order = np.random.default_rng(demo.seed).permutation(len(short))
    chosen = [_row(short[i]) for i in order[: HH_PAIRS + HH_HELD_OUT]]
    training = demo.write_rows("hh-training.jsonl", chosen[:HH_PAIRS])
    held_out = demo.write_rows("hh-held-out.jsonl", chosen[HH_PAIRS:])
    judge = demo.train(
        "hh-jsft",
        method="jsft",
        model_name_or_path=demo.smollm,
        datasets=[{"path": training}],
        jsft={"demonstrations": False},
        learning_rate=4e-4,
        lr_scheduler_type="cosine",
        warmup_ratio=0.1,
        global_batch_size=16,
        **LORA,
    )
    return {
        side: demo.judge_quality(name, held_out, adapter)
        for side, name, adapter in (
            ("before", "hh-judge-before", None),
            ("after", "hh-judge-after", judge),
        )
    }


def _characters(record: Record) -> int:
    texts = [str(message["content"]) for message in record.prompt]
    return sum(map(len, [*texts, record.chosen or "", record.rejected or ""]))


def _row(record: Record) -> dict[str, Any]:
    prompt = [{k: m[k] for k in ("role", "content")} for m in record.prompt]
    return {"prompt": prompt, "chosen": record.chosen, "rejected": record.rejected}


if __name__ == "__main__":
    main()
