"""Log-probs of targets and their gradients: FastAlign beside a plain softmax over all logits.

    pytest bench --benchmark-group-by=group

The floor of a row is its passes over the head, 2 N D V operations each, at the rate of one bare
product of the same operands, which is timed in the same run as ``product``.  Frozen, forward and
backward: 2 passes; trainable: 4 by recompute, 3 for the naive one, which holds the [N, V] logits.
``FASTALIGN_BENCH=smoke`` takes a tiny size, which proves no more than that the benchmarks run.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from fastalign_kernels import linear_logprob

SMOKE = os.environ.get("FASTALIGN_BENCH") == "smoke"
N, D, V = (64, 32, 1009) if SMOKE else (4096, 576, 49152)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PASSES = {
    ("product", "frozen"): 1,
    ("fastalign", "frozen"): 2,
    ("naive", "frozen"): 2,
    ("product", "trainable"): 1,
    ("fastalign", "trainable"): 4,
    ("naive", "trainable"): 3,
}


@dataclass
class Inputs:
    hidden: torch.Tensor
    weight: torch.Tensor
    target: torch.Tensor
    grad_logprob: torch.Tensor
    grad_log1m_prob: torch.Tensor


def make_inputs(dtype: torch.dtype, trainable: bool) -> Inputs:
    torch.manual_seed(0)
    hidden = torch.randn(N, D, device=DEVICE).to(dtype).requires_grad_()
    weight = (torch.randn(V, D, device=DEVICE) / D**0.5).to(dtype).requires_grad_(trainable)
    target = torch.randint(V, (N,), device=DEVICE)
    return Inputs(hidden, weight, target, *torch.randn(2, N, device=DEVICE))


def product(x: Inputs) -> None:
    with torch.no_grad():
        torch.mm(x.hidden, x.weight.t())


def fastalign(x: Inputs) -> None:
    found = linear_logprob(x.hidden, x.weight, x.target)
    backward(x, found.logprob, found.log1m_prob)


def naive(x: Inputs) -> None:
    logprob = (x.hidden @ x.weight.t()).float().log_softmax(-1).gather(-1, x.target[:, None])[:, 0]
    backward(x, logprob, torch.log1p(-logprob.exp()))


def backward(x: Inputs, logprob: torch.Tensor, log1m_prob: torch.Tensor) -> None:
    torch.autograd.backward([logprob, log1m_prob], [x.grad_logprob, x.grad_log1m_prob])
    x.hidden.grad = x.weight.grad = None


def synchronised(function: Callable[[Inputs], None], x: Inputs) -> None:
    function(x)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


@pytest.mark.parametrize("head", ["frozen", "trainable"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("who", [product, fastalign, naive])
def test_forward_and_backward(benchmark, who, dtype, head):
    inputs = make_inputs(dtype, head == "trainable")
    benchmark.group = f"{head} {dtype} {N}x{D}x{V}"
    passes = PASSES[who.__name__, head]
    benchmark.extra_info |= {
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "passes": passes,
        "operations": passes * 2 * N * D * V,
    }
    benchmark.pedantic(synchronised, (who, inputs), rounds=2 if SMOKE else 5, warmup_rounds=1)
