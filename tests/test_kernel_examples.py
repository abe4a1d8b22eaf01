"""The kernels in other trainers: kernels/examples/, run as a reader runs them."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support import outside_environment

EXAMPLES = Path(__file__).resolve().parent.parent / "kernels" / "examples"


def run(*command: Any) -> list[list[str]]:
    """Words of each line that an example prints; its whole output in the failure otherwise."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env=outside_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return [line.split() for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_trl_trains_the_same_in_less_memory():
    pytest.importorskip("trl")
    lines = run(EXAMPLES / "trl_dpo.py")
    start = next(i for i, words in enumerate(lines) if words[:2] == ["step", "quantity"])
    table = {(step, name): (float(a), float(b)) for step, name, a, b in lines[start + 1 :]}

    theirs, ours = table.pop(("all", "peak_memory_mib"))
    assert 0 < ours < 0.5 * theirs
    assert len(table) == 3 * 6
    for (step, name), (theirs, ours) in table.items():
        # Rewards are differences of log-probs of about -400, whose fp32 steps are 3e-5.
        near = {"abs": 1e-5} if "/" in name else {"rel": 1e-5}
        assert ours == pytest.approx(theirs, **near), (step, name)
    # What is compared has moved, and the reference is not the policy.
    assert len({theirs for (_, name), (theirs, _) in table.items() if name == "loss"}) == 3
    assert all(abs(theirs) > 1e-3 for (_, name), (theirs, _) in table.items() if "rewards" in name)


@pytest.fixture(scope="module")
def trl_example() -> ModuleType:
    pytest.importorskip("trl")
    spec = importlib.util.spec_from_file_location("trl_dpo", EXAMPLES / "trl_dpo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def head_inputs() -> dict[str, Any]:
    rng = torch.Generator().manual_seed(0)
    return {
        "hidden": torch.randn(9, 16, generator=rng).requires_grad_(),
        "weight": torch.randn(211, 16, generator=rng).requires_grad_(),
        "bias": torch.randn(211, generator=rng).requires_grad_(),
        "target": torch.randint(211, (9,), generator=rng),
        "temperature": 0.7,
        "columns": 64,
        "softcap": None,
        "scale": 1.0,
        "outputs": ("log_probs", "entropy", "mean_logits"),
    }


def test_head_gives_what_trl_s_function_does(trl_example):
    from trl.kernels import ChunkedLogProbFunction

    inputs = head_inputs()
    leaves = [inputs[name] for name in ("hidden", "weight", "bias")]
    upstream = torch.linspace(-1, 1, 9)
    values, gradients = [], []
    for head in (trl_example.LinearLogprobHead, ChunkedLogProbFunction):
        logprob, entropy, _, mean, _ = head.apply(*inputs.values())
        values.append((logprob, entropy.detach(), mean))
        gradients.append(torch.autograd.grad(logprob, leaves, upstream))
    torch.testing.assert_close(*values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


def test_head_goes_by_autocast(trl_example):
    inputs = head_inputs() | {"bias": None}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = trl_example.LinearLogprobHead.apply(*inputs.values())[0]
    halves = {name: inputs[name].detach().bfloat16() for name in ("hidden", "weight")}
    alone = trl_example.LinearLogprobHead.apply(*(inputs | halves).values())[0]
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, alone, rtol=0, atol=0)
    rounded.sum().backward()
    assert inputs["hidden"].grad.dtype == inputs["weight"].grad.dtype == torch.float32


@pytest.mark.parametrize(
    "wrong", [{"softcap": 30.0}, {"scale": 0.5}, {"outputs": ("log_probs", "log_sum_sq_probs")}]
)
def test_head_refuses_what_it_cannot_say(trl_example, wrong):
    with pytest.raises(NotImplementedError, match="caps or scales its logits, or use_weighting"):
        trl_example.LinearLogprobHead.apply(*(head_inputs() | wrong).values())


@pytest.mark.slow
def test_two_ranks_under_fsdp2_train_as_one_process_does():
    # --standalone: the ranks meet at a store that torchrun has bound to a free port.
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    header, *lines = run(*torchrun, EXAMPLES / "fsdp2.py")
    assert header == ["step", "one", "process", "reshard", "False", "reshard", "True"]
    steps, differences = lines[:5], lines[5:]

    losses = [[float(loss) for loss in words[1:]] for words in steps]
    for alone, *sharded in losses:
        assert sharded == pytest.approx([alone] * 2, rel=1e-5)
    assert losses[-1][0] < 0.7 * losses[0][0], "nothing was learned"
    for words in differences:  # "reshard False: weights differ by 2.0e-07 of their norm"
        assert float(words[5]) < 1e-5
    assert len(differences) == 2
