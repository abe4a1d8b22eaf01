"""Drawing one token a row: the native sampler beside torch and transformers' warpers.

    pytest bench/test_sampling.py

Bound by memory where vectors are wide: the floor is one read of the logits at the rate of a large
copy.  The sampler also gives both log-probs of each token, which the others do not compute.  Logits
are normal: with a deviation of 4 a nucleus of 0.9 has some hundred tokens, with 1 most of them.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from racing import DEVICE, SMOKE, Contestants
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fastalign import _bridge

pytestmark = pytest.mark.skipif(
    DEVICE.type == "cuda", reason="the sampler runs on the CPU, whose copy rate is its floor"
)

SIZES = [1009] if SMOKE else [49152, 151936]
ROWS = [2] if SMOKE else [1, 16, 64]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RULES = {
    "plain": (4.0, {}),
    "top-k, top-p": (4.0, {"temperature": 0.7, "top_k": 50, "top_p": 0.9}),
    "top-p": (4.0, {"top_p": 0.9}),
    "top-p, flat": (1.0, {"top_p": 0.9}),
}


def contestants(name: str, rows: int, size: int, dtype: torch.dtype) -> Contestants:
    deviation, rule = RULES[name]
    torch.manual_seed(0)
    logits = (deviation * torch.randn(rows, size)).to(dtype)
    array = logits.view(torch.uint16).numpy() if dtype is torch.bfloat16 else logits.numpy()
    seeds, positions = np.arange(rows, dtype=np.uint64), np.zeros(rows, dtype=np.uint64)
    # In the order that transformers' generate() has them.
    warpers = LogitsProcessorList()
    if "temperature" in rule:
        warpers.append(TemperatureLogitsWarper(rule["temperature"]))
    if "top_k" in rule:
        warpers.append(TopKLogitsWarper(rule["top_k"]))
    if "top_p" in rule:
        warpers.append(TopPLogitsWarper(rule["top_p"]))

    def torchs() -> None:
        # generate() copies them to fp32, and the warpers do not change what they are given.
        scores = warpers(None, logits.to(copy=True, dtype=torch.float32))
        torch.multinomial(scores.softmax(-1), 1)

    return {
        "fastalign": lambda: _bridge.sample(
            array, seeds, positions, threads=torch.get_num_threads(), **rule
        ),
        "torch": torchs,
    }


@pytest.mark.parametrize("who", ["fastalign", "torch"])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", RULES)
def test_sampling(race, name, dtype, size, rows, who):
    made = DTYPES[dtype]
    race(
        f"{name} {dtype} {rows}x{size}",
        lambda: contestants(name, rows, size, made),
        who,
        floor_bytes=rows * size * made.itemsize,
    )
