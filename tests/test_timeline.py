"""What a step tells of its speed."""

from __future__ import annotations

import time

import pytest
import torch
from support import recipe, start
from torch.utils.flop_counter import FlopCounterMode

import fastalign.train as loop
from fastalign.batch import BY_TOKENS, plan_batches
from fastalign.timeline import Operations, Timeline, peak_memory, peak_operations

CPU = torch.device("cpu")


def test_parts_are_consecutive_and_add_up():
    began = time.perf_counter()
    timeline = Timeline(CPU)
    for part, pause in (("a", 0.02), ("b", 0.01), ("a", 0.02)):
        time.sleep(pause)
        timeline.lap(part)
    whole = time.perf_counter() - began
    seconds = timeline.seconds()
    assert list(seconds) == ["a", "b"]
    assert seconds["a"] >= 0.04 and seconds["b"] >= 0.01 and sum(seconds.values()) <= whole


def test_operations_are_those_that_torch_counts(tiny_llama, tmp_path, quiet_process):
    """The body's matrix products, forward and backward; the head is one operator to the counter."""
    run, examples = start(recipe("sft", tiny_llama, tmp_path))
    packs = plan_batches(examples, 10**6, 0, 1)
    with FlopCounterMode(display=False) as counter:
        for pack in packs:
            loss, _ = run.model.policy(pack, loss=run.method.loss, reference=None, progress=0.0)
            loss.backward()
    counted = sum(
        count
        for operator, count in counter.get_flop_counts()["Global"].items()
        if "mm" in str(operator)
    )
    operations = Operations(run.model.policy)
    tokens, rows = packs[0].num_tokens, packs[0].rows.numel()
    pairs = sum(n * (n + 1) // 2 for n in packs[0].cu_seqlens_q.diff().tolist())
    attention = 12 * pairs * operations.attention
    head = 6 * rows * operations.head
    assert len(packs) == 1 and operations.known and operations.head_trained
    assert operations.of(packs, reference=False) - attention - head == counted
    # 2 layers of 4 heads 32 wide.
    assert operations.attention == 2 * 4 * 32
    more = operations.of(packs, reference=True) - operations.of(packs, reference=False)
    assert more == counted / 3 + attention / 3 + head / 3 and tokens > 0


def test_what_packs_are_planned_by_is_what_a_step_takes(tiny_llama, tmp_path, quiet_process):
    run, examples = start(recipe("sft", tiny_llama, tmp_path))
    cost = run.operations.cost(reference=True)
    packs = plan_batches(examples, 10**6, 0, 1, cost)
    tokens = [s.input_ids.size for e in examples for s in e.streams]
    rows = sum(int(s.loss_mask.sum()) for e in examples for s in e.streams)
    pairs = sum(n * (n + 1) // 2 for n in tokens)
    whole = cost.token * sum(tokens) + cost.pair * pairs + cost.row * rows
    assert run.operations.of(packs, reference=True) == whole
    # Two operations a weight and token against two products of 2 operations a pair and width.
    body = sum(
        p.numel() for n, p in run.model.policy.named_parameters() if p.ndim == 2 and "layers" in n
    )
    assert cost.pair / cost.token == pytest.approx(2 * run.operations.attention / body)
    run.operations.known = False
    assert run.operations.cost(reference=True) == BY_TOKENS


def test_a_frozen_body_needs_no_gradients_of_weights(tiny_llama, tmp_path, quiet_process):
    full, examples = start(recipe("sft", tiny_llama, tmp_path))
    packs = plan_batches(examples, 10**6, 0, 1)
    lora, _ = start(recipe("sft", tiny_llama, tmp_path, use_peft=True, lora_r=1))
    assert lora.operations.frozen == full.operations.trained
    assert not lora.operations.head_trained and lora.operations.trained > 0
    share = lora.operations.of(packs, False) / full.operations.of(packs, False)
    assert 2 / 3 < share < 0.75


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_a_step_says_where_its_time_went(method, tiny_llama, tmp_path, quiet_process):
    run, examples = start(recipe(method, tiny_llama, tmp_path))
    began = time.perf_counter()
    metrics = loop.update(run, examples, 0.0, 1)
    whole = time.perf_counter() - began
    parts = {k.removeprefix("time/"): v for k, v in metrics.items() if k.startswith("time/")}
    step = parts.pop("step")
    expected = {"pack", "forward", "backward", "wait", "optimizer"}
    assert parts.keys() == expected | ({"reference"} if method == "dpo" else set())
    assert sum(parts.values()) == pytest.approx(step) and 0.9 * whole < step <= whole
    tokens = sum(len(s.input_ids) for e in examples for s in e.streams)
    assert metrics["speed/tokens_per_second"] == pytest.approx(tokens / step)
    assert metrics["speed/tflops"] > 0 and "speed/mfu" not in metrics
    assert 0.05 < metrics["speed/peak_memory_gib"] < 100


def test_peaks_of_known_devices(monkeypatch):
    assert peak_operations(CPU, torch.bfloat16) is None and peak_memory(CPU) > 0
    gpu = torch.device("cuda", 0)
    for name, peak in (("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert peak_operations(gpu, torch.bfloat16) == peak
        assert peak_operations(gpu, torch.float32) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a card of tomorrow")
    assert peak_operations(gpu, torch.bfloat16) is None
