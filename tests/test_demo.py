"""The demo's rules, figures and bookkeeping: what its tables rest on."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from support import write_rows
from transformers import AutoTokenizer

from fastalign import cli
from fastalign.config import RolloutConfig, parse_config
from fastalign.demo import ablation, experiment, judging, measure, run
from fastalign.demo.prompts import demo_prompts
from fastalign.demo.rules import (
    OPENINGS,
    Shuffled,
    filler_spans,
    judge_habit,
    judge_natural,
    opening_spans,
    prefer_by_coin,
)
from fastalign.judge import Answer, RulePairwiseJudge
from fastalign.methods import make_method
from fastalign.rollout import ServedModel, make_engine
from fastalign.templates import Renderer


@pytest.fixture(scope="module")
def tokenizer(tiny_llama):
    return AutoTokenizer.from_pretrained(tiny_llama)


PROMPT = [{"role": "user", "content": "Why?"}]


# --------------------------------------------------------------------------------------- rules


@pytest.mark.parametrize(
    ("text", "spans"),
    [
        ("Great question! Bread rises.", ["Great question!"]),
        ("  Sure thing! Bread rises.", ["Sure thing!"]),
        # The planted words with another mark, and nothing that only begins like them.
        ("Great question. Bread rises.", ["Great question."]),
        ("Thank you for asking, bread rises.", ["Thank you for asking,"]),
        ("great question bread rises", ["great question"]),
        ("Great questions help. Yes!", []),
        ("Bread rises. It is great!", []),
        ("", []),
    ],
)
def test_openings(text, spans):
    assert [text[a:b] for a, b in opening_spans(text)] == spans
    judgment = judge_habit(PROMPT, text)
    assert (judgment is None) == (not spans)
    if spans:
        assert f'"{spans[0]}"' in judgment


def test_every_planted_opening_is_found():
    for opening in OPENINGS:
        text = f"{opening} Bread rises."
        assert [text[a:b] for a, b in opening_spans(text)] == [opening]


def test_fillers_are_found_in_order_without_overlap():
    text = "It is important to rest. A sense of calm can be a gift, one of the best there is."
    found = [text[a:b] for a, b in filler_spans(text)]
    assert found == ["It is important", "A sense of", "can be a", "one of the best"]
    assert all(f'"{phrase}"' in judge_natural(PROMPT, text) for phrase in found)
    assert judge_natural(PROMPT, "Rest.") is None


def test_shuffling_deals_out_the_same_judgments():
    texts = [f"{OPENINGS[i % 3]} {i}" if i % 2 else str(i) for i in range(20)]
    rule = judge_habit
    plain = [rule(PROMPT, text) for text in texts]
    dealt = Shuffled(rule).judge([Answer(PROMPT, text) for text in texts])
    assert dealt != plain and sorted(map(str, dealt)) == sorted(map(str, plain))


def test_the_coin_decides_what_the_rule_decides_and_nothing_else():
    """Antisymmetric, so that both orders agree; right on about half of the pairs."""
    pairs = [(f"{OPENINGS[i % 3]} Bread {i} rises.", f"Water {i} boils.") for i in range(200)]
    tossed = [prefer_by_coin(PROMPT, a, b) for a, b in pairs]
    assert [prefer_by_coin(PROMPT, b, a) for a, b in pairs] == [-x for x in tossed]
    assert set(tossed) == {1.0, -1.0} and 80 < tossed.count(1.0) < 120
    assert prefer_by_coin(PROMPT, "Bread rises.", "Water boils.") == 0
    assert prefer_by_coin(PROMPT, f"{OPENINGS[0]} A.", f"{OPENINGS[1]} B.") == 0


def test_held_out_prompts_are_about_other_topics():
    training, held_out = demo_prompts(0)
    assert len(set(training)) == len(training) >= run.SFT_PROMPTS + 4 * 75
    assert len(set(held_out)) == len(held_out) >= run.HELD_OUT
    assert not set(training) & set(held_out)
    assert demo_prompts(0) == (training, held_out) != demo_prompts(1)


# ------------------------------------------------------------------------------------- figures


def test_detection_counts_tokens_and_onsets(tokenizer):
    """By hand: every token's plain and judged log-prob is chosen here."""
    renderer = Renderer(tokenizer)
    text = "Great question! Yes."
    pieces = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
    inside = [a < len("Great question!") for a, _ in pieces]
    # Flagged are the onset, the first token outside, and the end of the turn.
    flagged = {0, inside.index(False), len(pieces)}
    answers = []

    def scorer(streams):
        # Called twice: with the plain streams, then with the judged ones.
        judged = bool(answers)
        answers.append(streams)
        n = [int(s.loss_mask.sum()) for s in streams]
        assert n == [len(pieces) + 1]
        up = np.array([np.log(2.1) if i in flagged else np.log(1.9) for i in range(n[0])])
        return [np.full(n[0], -5.0) + (up if judged else 0.0)]

    found = measure.detection(
        scorer, renderer, "habit", judge_habit, ["Why?", "Why?"], [text, "No span."], 2.0
    )
    assert found == {
        "spans": 1,
        "onset_recall": 1.0,
        "precision": pytest.approx(1 / 3),
        "base_rate": pytest.approx(sum(inside) / len(pieces)),
    }


def test_lengths_with_and_without_spans(tokenizer):
    renderer = Renderer(tokenizer)

    def tokens(text):
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    found = measure.answer_metrics("habit", ["Great question! Yes.", "Yes.", " "], renderer)
    assert found["flagged"] == [1, 0, 0] and found["empty"] == [0, 0, 1]
    assert found["length"] == [tokens("Great question! Yes."), tokens("Yes."), tokens(" ")]
    assert found["length_without_spans"] == [tokens(" Yes."), tokens("Yes."), tokens(" ")]


def test_an_interval_is_that_of_the_mean_of_means():
    rng = np.random.default_rng(0)
    groups = [rng.normal(mean, 2.0, size=400) for mean in (0.0, 3.0)]
    mean, low, high = run.interval(groups)
    assert mean == pytest.approx(np.mean([g.mean() for g in groups]))
    # Standard error of the mean of two means, each 2 / sqrt(400).
    half = 1.96 * np.hypot(0.1, 0.1) / 2
    assert (low, high) == (
        pytest.approx(mean - half, abs=0.02),
        pytest.approx(mean + half, abs=0.02),
    )
    assert run.interval([[1.0] * 5]) == (1.0, 1.0, 1.0)


def side(flagged, length, **more):
    return {
        "flagged": flagged,
        "length": length,
        "length_without_spans": length,
        "empty": [0.0] * len(flagged),
        **more,
    }


def outcome(seed, before, after):
    return {
        "seed": seed,
        "before": side(before, [4.0, 6.0], reference_logprob=[-1.0, -2.0]),
        "after": side(after, [5.0, 7.0], reference_logprob=[-1.5, -2.5]),
        "budget": {"updates": 3},
        "seconds": {"training": 2.0, "measuring": 1.0},
        "made by": {"commit": "c"},
    }


def test_changes_are_paired_by_prompt():
    seen = run.changes(outcome(0, [1.0, 1.0], [1.0, 0.0]))
    assert seen == {
        "change in flagged answers": [0.0, -1.0],
        "change in length without spans": [1.0, 1.0],
        "change in reference log-prob": [-0.5, -0.5],
    }
    judged = {"judge": {"accuracy": 1.0, "flipped": 0.5, "abstained": 0.25}}
    measured = {
        "before": side([1.0, 0.0, 1.0], [1.0] * 3, **judged),
        "after": side([0.0, 1.0, 1.0], [1.0] * 3, **judged),
    }
    # One win, one loss, one tie.
    assert run.changes(measured)["rule's win rate of after"] == [1.0, 0.0, 0.5]


def test_the_summary_sets_controls_beside_the_method_seed_by_seed():
    ones, none = [1.0, 1.0], [0.0, 0.0]
    stages = experiment.summary(
        {
            ("habit", "cut"): [outcome(0, ones, none), outcome(1, ones, [1.0, 0.0])],
            # One seed so far.
            ("habit", "shuffled"): [outcome(0, ones, ones)],
        }
    )
    cut, shuffled = stages["habit"]["cut"], stages["habit"]["shuffled"]
    assert cut["mean"]["after"]["flagged answers"] == 0.25
    assert cut["changes"]["change in flagged answers"][0] == -0.75
    assert [entry["seed"] for entry in cut["seeds"]] == [0, 1]
    assert "flagged answers above the method's" not in cut
    assert shuffled["flagged answers above the method's"] == (1.0, 1.0, 1.0)


# --------------------------------------------------------------------------------- bookkeeping


def test_a_result_is_used_again_only_when_nothing_before_it_changed(tmp_path):
    source, result = tmp_path / "recipe.yaml", tmp_path / "run.json"
    assert not run._is_newer(result, source)
    run._write(source, "a: 1")
    result.write_text("{}")
    os.utime(source, (1000, 1000))
    os.utime(result, (2000, 2000))
    run._write(source, "a: 1")
    assert run._is_newer(result, source), "the same recipe is no change"
    run._write(source, "a: 2")
    assert not run._is_newer(result, source)


def test_a_budget_counts_what_was_logged(tmp_path):
    demo = run.Demo.__new__(run.Demo)
    demo.folder = tmp_path
    recipe = {
        "method": "cut",
        "model_name_or_path": "m",
        "datasets": [{"path": "d.jsonl"}],
        "output_dir": "o",
        "online": {"prompts_per_iteration": 5, "num_generations": 2},
        "judge": {"path": "a:b"},
    }
    (tmp_path / "a-run.yaml").write_text(yaml.safe_dump(recipe))
    folder = Path(tmp_path, "a-run")
    folder.mkdir()
    (folder / "metrics.jsonl").write_text(
        '{"step": 0, "rollout/examples": 7.0}\n{"step": 1, "loss": 1.0}\n'
        '{"step": 2, "loss": 1.0}\n{"step": 2, "rollout/examples": 3.0}\n{"step": 3, "loss": 1.0}\n'
    )
    assert demo.budget("a-run") == {"updates": 3, "examples": 10, "sampled answers": 20}


def in_this_process(ran: list[str]) -> Callable[[list[str], Path], None]:
    """What Demo does in processes of their own, done here; ``ran`` gets the name of each step."""

    def step(command: list[str], result: Path) -> None:
        ran.append(result.name)
        if command[2] == "fastalign":
            assert cli.main(command[3:]) == 0
        else:
            task, target = map(Path, command[3:])
            target.write_text(json.dumps(measure.main(json.loads(task.read_text()))))
        Path(f"{result}.seconds").write_text("1.5")

    return step


@pytest.fixture
def small_ablation(tiny_llama, tmp_path, monkeypatch, quiet_process):
    """The ablation on the tiny model and a few prompts, by the embedded engine; what it ran."""
    ran: list[str] = []
    monkeypatch.setattr(run, "ensure_smollm", lambda: tiny_llama)
    monkeypatch.setattr(run, "HELD_OUT", 4)
    monkeypatch.setattr(run, "run_step", in_this_process(ran))
    for module in (run, ablation):
        monkeypatch.setattr(module, "SFT_PROMPTS", 8)
    monkeypatch.setattr(ablation, "ANSWERS", 12)

    def criticise(prompt, answer):
        # A random model has no openings that the rule knows.
        return f"It has {len(answer)} letters." if len(answer) % 3 else None

    monkeypatch.setattr(ablation, "judge_habit", criticise)
    monkeypatch.setattr(measure, "MAX_NEW_TOKENS", 8)

    def embedded(model, lora_rank):
        return make_engine(ServedModel(model, torch.float32, 512), RolloutConfig(engine="hf"))

    monkeypatch.setattr(measure, "make_measuring_engine", embedded)
    command = ["--output-dir", str(tmp_path / "runs"), "--seeds", "0", "1"]
    result = tmp_path / "ablation.json"

    def start(*variants: str) -> dict[str, Any]:
        ran.clear()
        ablation.main([*command, "--result", str(result), "--variants", *variants])
        return json.loads(result.read_text())

    return start, ran


def test_the_ablation_trains_each_variant_on_the_same_and_goes_on(small_ablation, tmp_path):
    start, ran = small_ablation
    first = start("full")
    assert ran.count("ablation-full") == ran.count("ablation-full-after") == 2
    both = start("full", "without Misalign")
    # Only what was missing is run.
    assert ran == 2 * ["ablation-without-misalign", "ablation-without-misalign-after"]
    assert both["runs"]["full"] == first["runs"]["full"]
    assert both["variants"] == {"full": {}, "without Misalign": {"cut.misalign": False}}
    recipes = [
        yaml.safe_load((tmp_path / "runs" / "seed-1" / f"ablation-{name}.yaml").read_text())
        for name in ("full", "without-misalign")
    ]
    assert recipes[1]["cut"].pop("misalign") is False
    outputs = [recipe.pop("output_dir") for recipe in recipes]
    assert outputs[0] != outputs[1] and recipes[0] == recipes[1]
    seeds = [entry for variant in both["runs"].values() for entry in variant["seeds"]]
    assert [entry["seed"] for entry in seeds] == [0, 1, 0, 1]
    # As many updates: the same rows, of which the positives were chosen by the same seed.
    updates = [entry["budget"]["updates"] for entry in seeds]
    assert updates[0] == updates[2] >= 1 and updates[1] == updates[3] >= 1
    assert {entry["seconds"]["training"] for entry in seeds} == {1.5}
    mean, low, high = both["runs"]["full"]["changes"]["change in reference log-prob"]
    assert low <= mean <= high and mean != 0
    assert "flagged answers above the method's" in both["runs"]["without Misalign"]


def test_every_variant_of_the_ablation_is_a_recipe_of_its_own():
    tree = {"method": "cut", "model_name_or_path": "m", "output_dir": "o", "cut": {}}
    tree["datasets"] = [{"path": "d.jsonl"}]
    configs = []
    for variant in ablation.VARIANTS:
        recipe = copy.deepcopy(tree)
        for key, value in variant.changes.items():
            run.set_key(recipe, key, value)
        configs.append(parse_config(recipe))
    assert len({config.model_dump_json() for config in configs}) == len(configs) == 6
    assert configs[0] == parse_config(tree)


def test_every_variant_of_judging_is_a_recipe_of_its_own():
    tree = {"method": "dpo", "model_name_or_path": "m", "output_dir": "o", "use_peft": True}
    tree |= {"datasets": [{"path": "d.jsonl"}], "judge": {"type": "self", "model": "reference"}}
    tree["online"] = dict(judging.ON_POLICY)
    configs = {}
    for variant in judging.VARIANTS:
        recipe = copy.deepcopy(tree)
        for key, value in variant.changes.items():
            run.set_key(recipe, key, value)
        configs[variant.name] = parse_config(recipe)
        make_method(configs[variant.name])
    assert len({c.model_dump_json() for c in configs.values()}) == len(configs) == 8
    sizes = [c.online for c in configs.values() if c.online is not None]
    sampled = {(s.iterations or 1) * s.prompts_per_iteration * s.num_generations for s in sizes}
    # Every run samples as many answers.
    assert sampled == {320}


def test_tournaments_are_measured_on_the_first_n(tokenizer, monkeypatch):
    """A judge that is right leaves the habit only where every entrant has it."""
    renderer = Renderer(tokenizer)
    right = RulePairwiseJudge(lambda _, a, b: bool(opening_spans(b)) - bool(opening_spans(a)))
    habit, clean = "Great question! It is.", "It is."
    drawn = [[habit, clean, habit, habit], [habit, habit, habit, clean], [habit] * 4]
    found = measure.tournaments(right, "habit", ["p", "q", "r"], drawn, (1, 2, 4), renderer, 0)
    assert found["1"]["flagged"] == found["1"]["all_flagged"] == [1.0, 1.0, 1.0]
    assert found["2"]["flagged"] == found["2"]["all_flagged"] == [0.0, 1.0, 1.0]
    assert found["4"]["flagged"] == found["4"]["all_flagged"] == [0.0, 0.0, 1.0]
    assert [found[n]["matches"] for n in "124"] == [0, 3, 9]
    # The pair of the second prompt and all three matches of the third one.
    assert found["2"]["ties"] == 2 and found["4"]["ties"] >= 3
    seeds = [{"tournaments": found}] * 2
    monkeypatch.setattr(judging, "ENTRANTS", (1, 2, 4))
    table = judging.self_rejection([0, 1], seeds)
    assert table["2"]["flagged"][0] == pytest.approx(2 / 3)
    assert table["2"]["seeds"][1] == {"seed": 1, "flagged": pytest.approx(2 / 3), "ties": 2}


def test_ties_are_counted_from_episode_logs(tmp_path):
    """Four answers, the first two with the habit: of six pairs four differ to the rule."""
    texts = ["Great question! It is.", "Great question! No.", "It is.", "No."]
    matches = [(0, 1), (2, 3), (0, 2), (1, 2), (3, 0), (3, 1)]
    margins = [0.02, -0.3, -0.9, 0.03, 0.4, 0.0005]
    episode = {
        "completions": texts,
        "matches": matches,
        "verdicts": [{"score_a": 0.5 + m / 2, "score_b": 0.5 - m / 2} for m in margins],
    }
    log = tmp_path / "0000.jsonl"
    log.write_text(json.dumps(episode) + "\n")
    found = judging.ties([log])
    assert (found["pairs alike"], found["pairs that differ"]) == (2, 4)
    rows = {tie: list(row.values()) for tie, row in found["thresholds"].items()}
    # (1, 2) is decided for the answer with the habit, by 0.03.
    assert rows["0.0"] == [1.0, 1.0, 0.75]
    assert rows["0.001"] == [1.0, 0.75, pytest.approx(2 / 3)]
    assert rows["0.05"] == [0.5, 0.5, 1.0]
    assert rows["0.5"] == [0.0, 0.25, 1.0]


def test_preferences_are_measured(tmp_path):
    rows = [{"prompt": f"p{i}", "chosen": "a" * (i + 2), "rejected": "a"} for i in range(6)]
    rows[0] |= {"chosen": "a", "rejected": "aaa"}
    path = write_rows(tmp_path / "p.jsonl", rows)
    longer = RulePairwiseJudge(lambda _, a, b: len(a) - len(b))
    found = measure.preferences(longer, str(path), 0.0)
    assert found["pairs"] == 6
    assert found["overall"]["accuracy"]["value"] == pytest.approx(5 / 6)
    assert found["overall"]["prefers_longer"]["value"] == 1.0


def test_preferences_follow_the_rule(tmp_path, monkeypatch):
    demo = run.Demo.__new__(run.Demo)
    demo.folder, demo.seed = tmp_path, 0
    demo.training = [f"p{i}" for i in range(run.SFT_PROMPTS)]
    answers = [[f"first {i}", f"second {i}"] for i in range(run.SFT_PROMPTS)]
    monkeypatch.setattr(demo, "base_answers", lambda: (answers, []), raising=False)
    lines = Path(demo.preference_rows()).read_text().splitlines()
    rows = [yaml.safe_load(line) for line in lines]
    right = [bool(opening_spans(r["rejected"])) > bool(opening_spans(r["chosen"])) for r in rows]
    assert len(rows) == run.SFT_PROMPTS
    assert all(right)
