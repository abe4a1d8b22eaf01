"""Two ranks against one: the same loss and gradients at every ZeRO stage, the same rollouts and
verdicts, the same continuation after an interruption."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import (
    SIMPO,
    TESTS,
    as_method,
    distance,
    outside_environment,
    recipe,
    run_ranks,
    start,
    step_with_gradients,
)
from test_logprobs import tiny_qwen3_5
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastalign.config import Config, parse_config
from fastalign.train import train

pytestmark = pytest.mark.usefixtures("quiet_process")

LORA = {"use_peft": True, "lora_r": 4, "lora_alpha": 16}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sft": ("sft", {}),
    "cut": ("cut", {"cut": {"lambda": 1.5, "gamma": 0.5}}),
    "jsft": ("jsft", {"jsft": {"judge_weight": 3.0}}),
    "dpo": ("dpo", {}),
    "own": (SIMPO, {"method_config": {"gamma": 0.5}}),
    # Fewer records than would fill a pack on each rank: one of them idles.
    "idle": ("cut", {"micro_batch_tokens": 10**6}),
    "norm": ("sft", {"max_grad_norm": 1e-3}),
}
LORA_CASES = {name: CASES[name] for name in ("dpo", "cut")}
UNPACKED_CASES = {name: CASES[name] for name in ("cut", "dpo")}
JUDGE = {"type": "self", "tie_threshold": 0.0, "min_decision_mass": 0.0}
# Three prompts over two ranks, then one over two: the second rank has nothing to do.  In the second
# round the policy judges that the first one made.
SIZES = {"iterations": 2, "prompts_per_iteration": 3, "num_generations": 2}
ONLINE = {"online": {**SIZES, "rounds_per_reference": 1}}
RESUMABLE = {"save_steps": 2, "lora_dropout": 0.2, "global_batch_size": 2, **LORA, **ONLINE}
ONE = {"online": {"iterations": 1, "prompts_per_iteration": 1, "num_generations": 2}}


def variants(
    cases: dict[str, tuple[str, dict]], model: Path, folder: Path, **keys: Any
) -> dict[str, Config]:
    """Each case under both normalisations, with steps that leave the weights alone."""
    return {
        f"{name}-{normalization}": recipe(
            method,
            model,
            folder,
            **{"normalization": normalization, "learning_rate": 1e-30} | case | keys,
        )
        for name, (method, case) in cases.items()
        for normalization in ("record", "token")
    }


class Suite:
    """Both sides of the comparison; the two-rank side runs once for all tests."""

    def __init__(self, folder: Path, models: dict[str, Path]) -> None:
        self.folder, self.models = folder, models
        self.specs: dict[str, dict[str, Any]] = {}
        self.log = ""
        full, other = models["sharp"], str(models["other"])
        for stage in (0, 2, 3):
            cases = variants(CASES, full, folder / "rows", zero_stage=stage)
            if stage == 2:
                cases = {k: v for k, v in cases.items() if k in ("cut-record", "norm-token")}
            self.gradients(f"full-{stage}", cases, reference=other)
        for stage in (0, 3):
            keys = {"zero_stage": stage, "adapter_name_or_path": str(models["adapter"])}
            cases = variants(LORA_CASES, full, folder / "rows", **LORA, **keys)
            self.gradients(f"lora-{stage}", cases)
        keys = {"zero_stage": 3, "gradient_checkpointing": True}
        cases = variants(LORA_CASES, full, folder / "rows", **keys)
        self.gradients("full-checkpointed-3", cases, reference=other)
        keys |= LORA | {"adapter_name_or_path": str(models["adapter"])}
        self.gradients("lora-checkpointed-3", variants(LORA_CASES, full, folder / "rows", **keys))
        cases = variants(UNPACKED_CASES, models["qwen"], folder / "rows", zero_stage=3)
        self.gradients("unpacked-3", cases, reference=str(models["other-qwen"]))

        self.run("self-judge", "training", **ONLINE)
        self.run("one-prompt", "training", dtype="auto", **ONE)
        self.run("undisturbed", "training", **RESUMABLE)
        self.run("interrupted", "interruption", before=4, **RESUMABLE)

    def gradients(self, name: str, cases: dict[str, Config], **spec: Any) -> None:
        trees = {k: c.model_dump(mode="json", by_alias=True) for k, c in cases.items()}
        first = next(iter(trees.values()))
        self.specs[name] = {"do": "gradients", "recipe": first, "cases": trees, **spec}

    def run(self, name: str, do: str, before: int = 0, **keys: Any) -> None:
        config = self.training_recipe(name, zero_stage=3, **keys)
        tree = config.model_dump(mode="json", by_alias=True)
        self.specs[name] = {"do": do, "recipe": tree, "before": before}

    def training_recipe(self, name: str, **keys: Any) -> Config:
        # An epsilon far above the gradients' rounding: Adam's first steps would blow up its sign.
        defaults = {"judge": JUDGE, "learning_rate": 1e-2, "adam_epsilon": 1e-2}
        return recipe("dpo", self.models["sharp"], self.folder / name, **defaults | keys)

    def start(self) -> None:
        path = self.folder / "specification.json"
        path.write_text(json.dumps(self.specs))
        codes = run_ranks(TESTS / "distributed_worker.py", path, log=self.folder / "log")
        self.log = f"exit codes {codes}\n{(self.folder / 'log').read_text()}"

    def result(self, name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        path = self.folder / f"{name}.json"
        assert path.exists(), f"{name} did not come to its end on two ranks:\n{self.log[-6000:]}"
        return json.loads(path.read_text()), load_file(self.folder / f"{name}.safetensors")


@pytest.fixture(scope="module")
def suite(sharp_llama, other_llama, tmp_path_factory) -> Suite:
    folder = tmp_path_factory.mktemp("distributed")
    models = {"sharp": sharp_llama, "other": other_llama}
    tokenizer = AutoTokenizer.from_pretrained(sharp_llama)
    for name, seed in (("qwen", 0), ("other-qwen", 1)):
        model = tiny_qwen3_5(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        models[name] = folder / name
        model.save_pretrained(models[name])
        tokenizer.save_pretrained(models[name])
    made = recipe("sft", sharp_llama, folder / "adapter", learning_rate=1e-2, **LORA)
    train(made)
    models["adapter"] = Path(made.output_dir)
    suite = Suite(folder, models)
    suite.start()
    return suite


@pytest.fixture(scope="module")
def alone():
    """Started one-rank runs by (model, adapter): they are the same at every stage."""
    return {}


def one_rank(suite: Suite, alone: dict, name: str, case: str):
    spec = suite.specs[name]
    plain = {"zero_stage": 0, "gradient_checkpointing": False}
    config = parse_config(spec["cases"][case] | plain)
    key = (config.model_name_or_path, config.adapter_name_or_path)
    if key not in alone:
        reference = spec.get("reference")
        first = parse_config(spec["recipe"] | plain)
        alone[key] = start(first, reference=Path(reference) if reference else None)[0]
    return step_with_gradients(alone[key], as_method(alone[key], config))


def every_case() -> list[tuple[str, str]]:
    both = [(c, n) for c in CASES for n in ("record", "token")]
    names = [(f"full-{s}", f"{c}-{n}") for s in (0, 3) for c, n in both]
    names += [("full-2", "cut-record"), ("full-2", "norm-token")]
    names += [(f"lora-{s}", f"{c}-{n}") for s in (0, 3) for c, n in both if c in LORA_CASES]
    for name in ("full-checkpointed-3", "lora-checkpointed-3"):
        names += [(name, f"{c}-{n}") for c, n in both if c in LORA_CASES]
    return names + [("unpacked-3", f"{c}-{n}") for c, n in both if c in UNPACKED_CASES]


@pytest.mark.parametrize(("name", "case"), every_case())
def test_two_ranks_have_the_loss_and_gradients_of_one(suite, alone, name, case):
    metrics, gradients = suite.result(f"{name}.{case}")
    expected, expected_gradients = one_rank(suite, alone, name, case)
    assert metrics["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert distance(gradients, expected_gradients) < 1e-6
    for key in (k for k in expected if not k.startswith(("time/", "speed/"))):
        assert metrics[key] == pytest.approx(expected[key], rel=1e-5, abs=1e-8), key
    assert metrics.keys() == expected.keys()


def rounds(config: Config) -> list[list[dict[str, Any]]]:
    files = sorted(Path(config.output_dir, "episodes").glob("*.jsonl"))
    return [[json.loads(line) for line in f.read_text().splitlines()] for f in files]


def steps(config: Config) -> list[dict[str, Any]]:
    lines = Path(config.output_dir, "metrics.jsonl").read_text().splitlines()
    return [x for x in map(json.loads, lines) if "loss" in x]


def test_two_ranks_sample_judge_and_learn_what_one_does(suite):
    """Full fine-tuning with the frozen start, then its successor, as judge, sharded over the
    ranks."""
    _, kept = suite.result("self-judge")
    together = suite.training_recipe("self-judge", zero_stage=3, **ONLINE)
    alone = suite.training_recipe("self-judge-alone", **ONLINE)
    train(alone)
    # Seeds belong to prompts, not to ranks: the same answers in the same order.
    for ours, theirs in zip(rounds(together), rounds(alone), strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert a["source"].rpartition(":")[2] == b["source"].rpartition(":")[2]
            assert a["completions"] == b["completions"]
            assert a["pairs"] == b["pairs"]
            for v, w in zip(a["verdicts"], b["verdicts"], strict=True):
                assert v["score_a"] == pytest.approx(w["score_a"], rel=1e-4)
    for ours, theirs in zip(steps(together), steps(alone), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    ours, theirs = (load_file(Path(c.output_dir, "model.safetensors")) for c in (together, alone))
    start_weights = load_file(suite.models["sharp"] / "model.safetensors")
    moved = distance(theirs, start_weights)
    assert distance(ours, theirs) < 1e-3 * moved

    # The judge of the second round is what the first one made, and did not move any further; also
    # where one rank asked and the other did not.
    first = suite.training_recipe("self-judge-first", online=SIZES | {"iterations": 1})
    train(first)
    model = AutoModelForCausalLM.from_pretrained(first.output_dir, dtype=torch.float32)
    expected = []
    for n in (5, 9):
        with torch.no_grad():
            logits = model(torch.arange(3, n)[None]).logits[0, -1]
        expected.append(logits.log_softmax(-1)[[4, 7, 200]])
    torch.testing.assert_close(kept["scores"], torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_a_rank_without_prompts_waits_for_the_other(suite):
    suite.result("one-prompt")
    config = suite.training_recipe("one-prompt", **ONE)
    (only,) = rounds(config)
    assert len(only) == 1 and len(steps(config)) == 1


def test_a_resumed_run_on_two_ranks_ends_bitwise_where_an_undisturbed_one_does(suite):
    results = []
    for name in ("undisturbed", "interrupted"):
        suite.result(name)
        config = suite.training_recipe(name, **RESUMABLE)
        tensors = load_file(Path(config.output_dir, "adapter_model.safetensors"))
        results.append((tensors, [(x["step"], x["loss"]) for x in steps(config)]))
    (expected, losses), (resumed, losses_again) = results
    assert len(losses) >= 3 and losses_again == losses
    assert all(torch.equal(expected[n], resumed[n]) for n in expected)
    assert np.unique([float(t.abs().sum()) for t in expected.values()]).size > 4


WAITS = """
import fastalign.model
fastalign.model.LOCK_PATIENCE_S = 0.5
fastalign.model.init_distributed(timeout_s=60.0)
"""


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="DeepSpeed compiles nothing at its start")
def test_a_lock_that_a_killed_run_left_is_named(tmp_path):
    """torch waits for it without a word, and for ever."""
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    waiting = subprocess.Popen(
        [sys.executable, "-c", WAITS],
        env=outside_environment(TORCH_EXTENSIONS_DIR=str(tmp_path)),
        stderr=subprocess.PIPE,
        text=True,
    )
    assert waiting.stderr is not None
    try:
        line = next(line for line in waiting.stderr if line.startswith("fastalign: "))
    finally:
        waiting.kill()
        waiting.wait()
    assert f"waiting for {lock}: " in line and "delete the file" in line
