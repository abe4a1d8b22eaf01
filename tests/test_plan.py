"""The plan of memory, against bytes that training really holds, and what the command says of it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import plan as bench
import pytest
import torch
import yaml
from support import recipe, run_ranks
from transformers import LlamaConfig

from fastalign.batch import make_batch
from fastalign.cli import main
from fastalign.config import Config, ConfigError, override_config
from fastalign.data import Example, Stream
from fastalign.footprint import Footprint, Parameter
from fastalign.model import zero_options
from fastalign.plan import GIB, GPUS, Planner, advise, find_gpu, shard
from fastalign.timeline import Operations

# Of a pass as a CPU makes it, whose products take room of their own in half precision.
MOST_ERROR = 0.05
TOKENS = 256


@pytest.fixture(scope="session")
def shape(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the configuration of three layers of a 13 billion model, and nothing else."""
    folder = tmp_path_factory.mktemp("shape")
    LlamaConfig(
        architectures=["LlamaForCausalLM"], hidden_size=5120, intermediate_size=13824,
        num_hidden_layers=3, num_attention_heads=40, vocab_size=32000,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def make(model: Path, **keys: Any) -> Config:
    return bench.recipe({"model_name_or_path": str(model), "max_length": 2048} | keys)


# ------------------------------------------------------------------------- against what was held


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("keys", [{}, {"use_peft": True}, {"gradient_checkpointing": True}])
def test_one_rank_holds_what_was_planned(tiny_llama, tmp_path, dtype, keys):
    config = recipe("sft", tiny_llama, tmp_path, dtype=dtype, **keys)
    found, planned = bench.measure(config, TOKENS), bench.predict(config, TOKENS, 1)
    of_a_pass = found.pop("activations")
    assert planned.pop("activations") == pytest.approx(of_a_pass, rel=MOST_ERROR)
    assert planned == found


@pytest.mark.slow
def test_two_ranks_hold_what_was_planned(tiny_llama, tmp_path):
    """ZeRO 1 to 3, whatever is trained: to the byte, on the rank that holds most."""
    cases = [c for c in bench.cases(str(tiny_llama), {"bfloat16": 64}) if c["ranks"] == 2]
    path = tmp_path / "cases.json"
    path.write_text(json.dumps(cases))
    codes = run_ranks(bench.__file__, "--worker", path, log=tmp_path / "log")
    assert codes == [0, 0], (tmp_path / "log").read_text()[-2000:]
    for case, found in zip(cases, json.loads(path.with_suffix(".out").read_text()), strict=True):
        assert bench.predict(bench.recipe(case["keys"]), 64, 2) == found, case


def test_parameters_are_the_models_own(smollm):
    """Tied embeddings once, adapters on every linear layer but the head."""
    config = make(smollm, use_peft=True, lora_r=8)
    model = Footprint(config, torch.bfloat16)
    trained = [p for p in model.parameters if p.trained]
    assert sum(p.numel for p in model.parameters if not p.trained) == 134_515_008
    widths = 2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536)
    assert sum(p.numel for p in trained) == 30 * 8 * widths
    assert len(trained) == 30 * 7 * 2


def test_activations_grow_with_the_tokens_and_shrink_with_checkpointing(shape):
    plain = Footprint(make(shape), torch.bfloat16)
    less = Footprint(make(shape, gradient_checkpointing=True), torch.bfloat16)
    one, two, three = (plain.activations(n) for n in (2048, 4096, 6144))
    assert three - two == pytest.approx(two - one, rel=0.01)
    assert less.activations(4096) < plain.activations(4096) / 2
    assert plain.activations(4096, training=False) < less.activations(4096)


# ------------------------------------------------------------------------------------- sharding


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2, 8, 512])
def test_ranks_share_the_optimizer_evenly(stage, ranks):
    """Seven odd parameters; padding is at most two numbers a group and rank, or one a parameter."""
    sizes = (1003, 7, 64_001, 13, 200_003, 1, 500)
    parameters = [Parameter(n, 2, True, decayed=n > 100) for n in sizes]
    config = bench.recipe({"model_name_or_path": "none", "zero_stage": stage})
    zero = zero_options(config, stage, torch.bfloat16, sum(sizes))
    held = shard(parameters, stage, ranks, zero, torch.bfloat16)
    assert held.moments == 2 * held.masters
    assert 0 <= ranks * held.masters - 4 * sum(sizes) <= 4 * 7 * ranks
    # Each keeps whole what is small; no rank's gradients are more than all of them.
    assert held.weights >= 2 * sum(sizes) / ranks
    assert 2 * sum(sizes) / ranks <= held.gradients + 2 * 7 <= 2 * (sum(sizes) + 14)


def test_offloading_leaves_the_optimizer_to_the_host(shape):
    offload = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    offload["zero_force_ds_cpu_optimizer"] = False
    here, there = (
        Planner(make(shape, deepspeed=options, micro_batch_tokens=2048), ("h100", 80 * GIB))
        for options in ({}, offload)
    )
    here, there = (planner.plan(planner.config, 8) for planner in (here, there))
    moments = "optimizer moments"
    assert moments in names(here) and moments not in names(there)
    assert here.host == 0
    # Per weight: two moments, master and gradient in float32, and a gradient in bfloat16.
    assert there.host == pytest.approx(18 * 1_279_262_720 / 8, rel=0.001)
    assert there.needed < here.needed


def test_a_copy_that_is_written_behind_the_training_is_the_hosts(shape):
    """Per weight in bfloat16: itself, its master and two moments, or under ZeRO-3 its part of
    these without itself."""
    weights = 1_279_262_720
    for stage, gpus, bytes_of_each in ((0, 1, 14.0), (2, 8, 2 + 12 / 8), (3, 8, 12 / 8)):
        planner = Planner(
            make(shape, zero_stage=stage, async_save=True, save_steps=100), ("h100", 80 * GIB)
        )
        plan = planner.plan(planner.config, gpus)
        assert plan.host == pytest.approx(bytes_of_each * weights, rel=0.001)


def names(plan: Any) -> set[str]:
    return {part.name for part in plan.parts}


# --------------------------------------------------------------------------------------- advice


def test_what_is_proposed_fits_when_it_is_set(shape):
    planner = Planner(make(shape), find_gpu(None, 9))
    advice = advise(planner, 8)
    assert not advice.plan.fits and not advice.room
    best = advice.changes[-1]
    assert best.fits
    again = planner.plan(override_config(planner.config, best.settings), best.gpus)
    assert again.fits and again.needed <= best.needed
    # Each setting alone is shown with what it leads to.
    alone = {c.settings[0].partition("=")[0] for c in advice.changes if len(c.settings) == 1}
    assert {"micro_batch_tokens", "gradient_checkpointing"} <= alone


def test_more_gpus_are_the_last_resort(shape):
    eight = advise(Planner(make(shape), find_gpu(None, 9)), 8)
    assert eight.changes[-1].fits and eight.changes[-1].gpus == 8
    offload = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    alone = make(shape, zero_stage=3, deepspeed=offload, max_length=8192)
    one = advise(Planner(alone, find_gpu(None, 7)), 1)
    assert one.changes[-1].fits and one.changes[-1].gpus > 1
    hopeless = advise(Planner(alone, find_gpu(None, 1)), 1)
    assert not any(change.fits for change in hopeless.changes)


def test_room_to_spare_is_offered_and_fits(shape):
    planner = Planner(
        make(shape, use_peft=True, gradient_checkpointing=True), find_gpu("h200", None)
    )
    advice = advise(planner, 8)
    assert advice.plan.fits and not advice.changes
    offered = {change.settings[0].partition("=")[0]: change for change in advice.room}
    assert "micro_batch_tokens" in offered
    tokens = int(offered["micro_batch_tokens"].settings[0].partition("=")[2])
    assert tokens > planner.config.micro_batch_tokens
    more = override_config(planner.config, [f"micro_batch_tokens={2 * tokens}"])
    assert offered["micro_batch_tokens"].fits
    assert tokens == 1 << 17 or not planner.plan(more, 8).fits


def test_an_engine_takes_turns_with_training(shape):
    online = {"online": {"iterations": 1}, "judge": {"type": "rule", "path": "judge.py:judge"}}
    keys = {"method": "cut", "use_peft": True, "gradient_checkpointing": True, **online}
    gpu = find_gpu("h100", None)
    vllm, embedded = (
        Planner(make(shape, rollout={"engine": engine}, **keys), gpu) for engine in ("vllm", "hf")
    )
    plan = vllm.plan(vllm.config, 8)
    share = next(part for part in plan.parts if part.name.startswith("vLLM"))
    assert (share.update, share.rollout) == (0, int(0.4 * gpu[1]))
    assert plan.fits
    # 2.4 GiB of weights in a fortieth of the GPU.
    small = override_config(vllm.config, ["rollout.gpu_memory_utilization=0.025"])
    assert not vllm.plan(small, 8).fits
    fits = advise(Planner(small, gpu), 8).changes[-1]
    assert fits.fits and fits.settings[-1].startswith("rollout.gpu_memory_utilization=")
    replica = next(
        part for part in embedded.plan(embedded.config, 8).parts if "embedded" in part.name
    )
    assert replica.rollout > 2 * GIB and replica.update == 0
    offline = make(shape, method="sft")
    assert not Planner(offline, gpu).plan(offline, 8).peak("rollout")


def test_gpus_that_share_an_engine_hold_parts_of_it(shape):
    keys = {
        "method": "cut", "use_peft": True, "gradient_checkpointing": True,
        "online": {"iterations": 1}, "judge": {"type": "rule", "path": "judge.py:judge"},
        # 2.4 GiB of weights, and work space of 2, in 3.2.
        "rollout": {"engine": "vllm", "gpu_memory_utilization": 0.08},
    }  # fmt: skip
    planner = Planner(make(shape, **keys), find_gpu(None, 40))
    alone = planner.plan(planner.config, 8)
    assert not alone.fits and "the whole model on each GPU, 2.4 GiB" in alone.notes[0]
    shared = planner.plan(override_config(planner.config, ["rollout.tensor_parallel_size=4"]), 8)
    assert shared.fits and "1/4 of the model on each GPU, 0.6 GiB" in shared.notes[0]
    assert any(
        change.fits and change.settings[0].startswith("rollout.tensor_parallel_size=")
        for change in advise(planner, 8).changes
    )
    three = override_config(planner.config, ["rollout.tensor_parallel_size=3"])
    with pytest.raises(ConfigError, match=r"tensor_parallel_size is 3, .* divide the 8 process"):
        planner.plan(three, 8)


JUDGED = {"online": {"num_generations": 2}, "judge": {"type": "self"}}


@pytest.mark.parametrize(
    ("keys", "copies"), [(JUDGED, 1), ({"use_peft": True, **JUDGED}, 0), ({}, 0)]
)
def test_only_full_fine_tuning_online_has_a_reference_of_its_own(shape, keys, copies):
    """Static data is compared with the start before the first step."""
    config = make(shape, method="dpo", **keys)
    plan = Planner(config, find_gpu("h100", None)).plan(config, 8)
    reference = [part for part in plan.parts if part.name == "reference weights"]
    assert len(reference) == copies
    for part in reference:
        assert part.update == next(p.update for p in plan.parts if p.name == "weights")


# -------------------------------------------------------------------------------------- command


@pytest.fixture
def train(shape, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    keys = {"method": "sft", "model_name_or_path": str(shape), "output_dir": "out"}
    path.write_text(yaml.safe_dump(keys | {"datasets": [{"path": "no-data.jsonl"}]}))

    def run(*options: str) -> SimpleNamespace:
        code = main(["train", str(path), *options])
        printed = capsys.readouterr()
        return SimpleNamespace(code=code, out=printed.out, err=printed.err)

    return run


def test_the_command_prints_parts_and_what_to_set(train):
    shown = train("--dry-run", "--gpus", "8", "--gpu", "H100", "micro_batch_tokens=131072")
    assert shown.code == 0
    first, *lines = shown.out.splitlines()
    assert first.startswith("8 x h100 (79.10 GiB), ZeRO 3, packs of 131,072 tokens, without")
    for name in ("weights", "gradients", "optimizer moments", "activations of a pack", "together"):
        assert sum(line.startswith(name + " ") for line in lines) == 1, name
    assert any(line.split()[1:] == ["fits", "gradient_checkpointing=true"] for line in lines)
    assert lines[-1] == "no times: --calibration RUN takes them from a run on this device"


def test_the_command_prints_json(train):
    shown = train("--dry-run", "--gpus", "8", "--gpu-memory", "24", "--json", "use_peft=true")
    plan = json.loads(shown.out)
    assert plan["memory"] == 24 * GIB and plan["times"] is None
    assert plan["peak"]["update"] == sum(part["update"] for part in plan["parts"])
    assert plan["fits"] == (plan["needed"] <= plan["memory"])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--dry-run", "--gpus", "2", "--gpu", "h1000"], ["--gpu h1000", *GPUS, "--gpu-memory"]),
        (["--dry-run", "--gpus", "2"], ["--gpu NAME", "--gpu-memory GIB"]),
        (["--dry-run", "--gpus", "2", "--gpu", "h100", "--gpu-memory", "80"], ["one of them"]),
        (["--dry-run", "--gpus", "2", "--gpu-memory", "-1"], ["--gpu-memory -1"]),
        (["--dry-run", "--gpu", "h100"], ["--gpu goes with --dry-run and --gpus N"]),
        (["--gpus", "2", "--gpu", "h100"], ["--gpus goes with --dry-run"]),
        (
            ["--dry-run", "--gpus", "2", "--gpu", "h100", "model_name_or_path=/no/model"],
            ["model_name_or_path = '/no/model'"],
        ),
        (
            [
                "--dry-run", "--gpus", "2", "--gpu", "h100", "use_peft=true",
                "lora_target_modules=[nothing]",
            ],
            ["lora_target_modules = ('nothing',)"],
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(train, options, says):
    shown = train(*options)
    assert shown.code == 2 and not shown.out
    assert shown.err.startswith("fastalign: ") and shown.err.count("\n") == 1
    for words in says:
        assert words in shown.err, shown.err


def test_times_are_those_of_a_run_for_the_operations_of_another(train, tiny_llama, tmp_path):
    """As many operations a second as the run's steps, but for the first two."""
    run = tmp_path / "run"
    run.mkdir()
    rates = [0.001, 0.002, 0.5, 0.4, 7.0]
    rows = [{"step": i, "speed/tflops": rate} for i, rate in enumerate(rates)]
    rows.insert(2, {"step": 1, "rollout/examples": 3})
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = [f"model_name_or_path={tiny_llama}", "max_length=64", "micro_batch_tokens=256"]
    options = ["--dry-run", "--gpus", "4", "--gpu", "h100", "--calibration", str(run), *keys]
    times = json.loads(train(*options, "--json").out)["times"]
    assert times["calibration"] == {"run": str(run), "steps": 3, "operations": 0.5e12}
    policy = Planner(make(tiny_llama), find_gpu("h100", None))._footprint(make(tiny_llama)).policy
    example = Example((Stream.of("x", np.zeros(1, np.int32), np.zeros(63, np.int32)),), 1.0, "")
    four = make_batch([example] * 4)
    # Counted from a batch, in which the first token of a sequence is no target.
    expected = Operations(policy).of([four], reference=False) / 0.5e12
    assert times["seconds_per_pack"] == pytest.approx(expected, rel=0.01)
    assert times["tokens_per_second"] == pytest.approx(4 * 256 / times["seconds_per_pack"])
    last = train(*options).out.splitlines()[-1]
    assert "at the 0.5 TFLOP/s" in last and "4 x h100" in last


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "no run wrote"),
        ("{}\n{", "metrics.jsonl:2"),
        ('{"speed/tflops": 1}\n', "train for 5"),
    ],
)
def test_a_run_that_says_nothing_of_speed_is_no_calibration(train, tmp_path, text, says):
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    shown = train("--dry-run", "--gpus", "2", "--gpu", "h100", "--calibration", str(tmp_path))
    assert shown.code == 2 and says in shown.err and shown.err.count("\n") == 1


def test_no_gpu_is_known_by_half_its_name():
    with pytest.raises(ConfigError, match="known are a100-40"):
        find_gpu("a100", None)


def test_a_recipe_of_full_size_says_what_is_planned_for_it():
    (path,) = (p for p in bench.planned_recipes() if p.stem == "self-judge-hh-llama-2-7b")
    assert bench.plan_of_recipe(path) in path.read_text("utf-8")
