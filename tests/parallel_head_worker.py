"""What one rank does in tests/test_parallel_head.py.

    RANK=0 WORLD_SIZE=2 ... python tests/parallel_head_worker.py {sliced,zero3} IMPL

Each rank compares what it got with a whole head of its own, and fails when they differ.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn

from fastalign_kernels import TokenLogprobs, linear_logprob

N, D, SLICES = 23, 16, (130, 71)
VOCAB = sum(SLICES)
RANK = int(os.environ["RANK"])
START = sum(SLICES[:RANK])
OPTIONS = ({}, {"softcap": 4.0, "temperature": 0.6})
BUDGET = 1 << 30


def inputs(bias: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Targets in both slices, half of them likely, a fifth ignored; one row far from the others'
    scale, and one whose best token lies 100 above all of the other slice."""
    rng = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(N, D, generator=rng), torch.randn(VOCAB, D, generator=rng)
    target = torch.randint(VOCAB, (N,), generator=rng)
    target[0], target[1] = 5, VOCAB - 1
    hidden[::2] += weight[target[::2]]
    hidden[7] *= 30
    weight[140] = 100 * hidden[8] / hidden[8].square().sum()
    target[8], target[4::5] = 3, -100
    return hidden, weight, torch.randn(VOCAB, generator=rng) if bias else None, target


def results(found: TokenLogprobs, *leaves: torch.Tensor | None) -> Iterator[torch.Tensor | None]:
    rng = torch.Generator().manual_seed(4)
    up = torch.randn(2, N, generator=rng)
    if found.logprob.requires_grad:
        (up[0] * found.logprob + up[1] * found.log1m_prob).sum().backward()
    yield found.logprob.detach()
    yield found.log1m_prob.detach()
    yield found.entropy
    for leaf in leaves:
        yield None if leaf is None else leaf.grad


def sliced(impl: str) -> None:
    mine = slice(START, START + SLICES[RANK])
    cases = itertools.product(("", "h", "hwb", "wb", "hwb kept"), OPTIONS, (True, False))
    for wants, options, has_bias in cases:
        hidden, weight, bias, target = inputs(has_bias)
        budget = BUDGET if "kept" in wants else 0
        whole, part = (
            [
                None if x is None else x.clone().requires_grad_(letter in wants)
                for x, letter in zip(leaves, "hwb", strict=True)
            ]
            for leaves in (
                (hidden, weight, bias),
                (hidden, weight[mine], None if bias is None else bias[mine]),
            )
        )
        shared = {"impl": impl, "return_entropy": True, "grad_rows": 20, **options}
        expected = results(
            linear_logprob(whole[0], whole[1], target, bias=whole[2], **shared), *whole
        )
        found = results(
            linear_logprob(
                part[0],
                part[1],
                target,
                bias=part[2],
                memory_budget=budget,
                group=dist.group.WORLD,
                vocab_start=START,
                **shared,
            ),
            *part,
        )
        names = ("logprob", "log1m_prob", "entropy", "hidden", "weight", "bias")
        for name, ours, true in zip(names, found, expected, strict=True):
            assert (ours is None) == (true is None), (name, wants)
            if ours is not None and true is not None:
                true = true[mine] if name in ("weight", "bias") else true
                torch.testing.assert_close(
                    ours, true, rtol=2e-5, atol=2e-6, msg=lambda m, n=name, w=wants: f"{n} {w} {m}"
                )
    hidden, weight, _, target = inputs(False)
    target[2] = VOCAB
    try:
        linear_logprob(
            hidden, weight[mine], target, impl=impl, group=dist.group.WORLD, vocab_start=START
        )
    except ValueError as error:
        assert f"target[2] = {VOCAB}: must be in [0, {VOCAB})" in str(error)
    else:
        raise AssertionError("a target out of range went unnoticed")
    try:
        linear_logprob(hidden, weight[mine], inputs(False)[3], impl=impl, group=dist.group.WORLD)
    except ValueError as error:
        assert "vocab_start: a target is in the slices of" in str(error)
    else:
        raise AssertionError("a forgotten vocab_start went unnoticed")


class Toy(nn.Module):
    """Embedding, one layer and a head, whose loss is worked out inside forward, where DeepSpeed
    gathers the head's weight."""

    def __init__(self, tied: bool, frozen: bool, budget: int, impl: str) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embed = nn.Embedding(VOCAB, D)
        self.body = nn.Linear(D, D)
        self.lm_head = nn.Linear(D, VOCAB, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight
        self.lm_head.weight.requires_grad_(not frozen)
        self.options = {"memory_budget": budget, "impl": impl}

    def forward(self, ids: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        hidden = self.body(self.embed(ids)).tanh()
        found = linear_logprob(hidden, self.lm_head.weight, target, **self.options)
        return -(found.logprob + 0.5 * found.log1m_prob).sum() / len(target)


def zero3(impl: str) -> None:
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    rng = torch.Generator().manual_seed(6)
    ids, target = torch.randint(VOCAB, (2, 2, N), generator=rng)
    for tied, frozen, budget in itertools.product((True, False), (True, False), (0, BUDGET)):
        alone = Toy(tied, frozen, 0, impl)
        (sum(alone(i, t) for i, t in zip(ids, target, strict=True)) / 2).backward()
        model = Toy(tied, frozen, budget, impl)
        engine, *_ = deepspeed.initialize(
            model=model,
            config={
                "train_micro_batch_size_per_gpu": 1,
                "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
                "optimizer": {"type": "Adam", "params": {"torch_adam": True}},
            },
        )
        engine.backward(engine(ids[RANK], target[RANK]))
        for (name, parameter), true in zip(
            model.named_parameters(), alone.parameters(), strict=True
        ):
            if parameter.requires_grad:
                torch.testing.assert_close(
                    safe_get_full_grad(parameter),
                    true.grad,
                    rtol=1e-5,
                    atol=1e-7,
                    msg=lambda m, where=(name, tied, frozen, budget): f"{where} {m}",
                )


if __name__ == "__main__":
    scenario, implementation = sys.argv[1:]
    if scenario == "sliced":
        dist.init_process_group("gloo")
        sliced(implementation)
    else:
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed

        deepspeed.init_distributed("gloo")
        zero3(implementation)
    dist.destroy_process_group()
