"""Per-token log p and log(1 - p) from logits that the caller already holds.

The gradient is as large as the logits; it can be written over them.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch.nn.functional import logsigmoid

from fastalign_kernels import _dispatch
from fastalign_kernels._checks import DTYPES, check_numbers, check_targets, describe
from fastalign_kernels.linear_logprob import TokenLogprobs

# Modules that offer log_odds and log_odds_backward with reference_logits' signatures.
_IMPLEMENTATIONS = {"torch": "reference_logits", "triton": "triton_logits"}


def logits_logprob(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    impl: str | None = None,
    inplace_backward: bool = False,
    return_entropy: bool = False,
) -> TokenLogprobs:
    """Log-probs of targets under softmax(z), z = cap(logits) / temperature.

    cap(x) = softcap * tanh(x / softcap), or x without a softcap.  With the log-odds
    m_t = z_t - logsumexp_{j != t} z_j and q the softmax over the tokens other than t::

        log p = -softplus(-m)         log(1 - p) = -softplus(m)
        g_m = g_logp (1 - p) - g_log1mp p
        dz_t = g_m                    dz_j = -g_m q_j

    The forward reads the logits once, the backward reads them once more and writes their gradient;
    neither makes a copy in fp32.  A logit of -inf bans its token (a cap makes it -softcap, which
    does not).  The logits of ignored rows are not read.

    With ``inplace_backward`` the gradient takes the logits' memory: the logits are gone once it is
    there, for every tensor that shares their memory.  Autograd sees that as any other write: what
    else saved the logits for its own backward (a tanh that made them, a second loss on them)
    raises a RuntimeError when its turn comes later, and so does a second backward through this op.

    Args:
        logits: [N, V], V >= 2; bf16, fp16, fp32 or fp64.  Rows may lie apart in memory.
        target: [N] int64 token ids in [0, V), or ``ignore_index``.
        softcap: cap on the raw logits, in logits, > 0 (Gemma).
        temperature: divides the capped logits, > 0.
        ignore_index: target of rows that give 0 and take a gradient of 0.
        impl: "torch" or "triton" (on a GPU; no fp64).  None is Triton on a GPU where it can be,
            torch elsewhere; what was chosen is logged once.
        inplace_backward: write the gradient over the logits.  They must be computed, not a leaf
            that requires a gradient, and rows that are contiguous each and share no memory.
        return_entropy: also compute the entropy, from the same read.

    Raises:
        ValueError: an argument has a shape, dtype, device or value other than the above.  Targets
            out of range raise on the CPU alone: elsewhere the check would wait for the device.
        RuntimeError: in a backward that needs logits which an earlier one has overwritten, and in
            one with create_graph that would overwrite them.  There are no second derivatives.
    """
    _check_tensors(logits, target)
    check_numbers(softcap, temperature)
    _dispatch.check_impl(impl)
    if inplace_backward:
        _check_overwritable(logits)
    log_odds, _, entropy = _log_odds(
        logits,
        target,
        softcap,
        temperature,
        ignore_index,
        impl,
        return_entropy,
        inplace_backward,
    )
    # Filled, not multiplied: the upstream gradient of a row that does not count may be NaN.
    ignored = target == ignore_index
    return TokenLogprobs(
        logprob=logsigmoid(log_odds).masked_fill(ignored, 0.0),
        log1m_prob=logsigmoid(-log_odds).masked_fill(ignored, 0.0),
        entropy=entropy.detach() if return_entropy else None,
    )


@torch.library.custom_op("fastalign_kernels::logits_log_odds", mutates_args=())
def _log_odds(
    logits: torch.Tensor,
    target: torch.Tensor,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    impl: str | None,
    entropy: bool,
    inplace_backward: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """log_odds [N], log_rest [N] and entropy [N] ([0] unless wanted) of reference_logits."""
    if inplace_backward:
        # Again: a compiled graph may be reused for logits that are a leaf.
        _check_overwritable(logits)
    check_targets(target, logits.shape[1], ignore_index)
    return _module(impl, logits).log_odds(
        logits,
        target,
        softcap=softcap,
        temperature=temperature,
        ignore_index=ignore_index,
        entropy=entropy,
    )


@_log_odds.register_fake
def _(
    logits: torch.Tensor,
    target: torch.Tensor,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    impl: str | None,
    entropy: bool,
    inplace_backward: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    n = logits.shape[0]
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    log_odds, log_rest = (logits.new_empty(n, dtype=wide) for _ in range(2))
    return log_odds, log_rest, logits.new_empty(n if entropy else 0, dtype=wide)


@torch.library.custom_op("fastalign_kernels::logits_log_odds_backward", mutates_args=())
def _log_odds_backward(
    grad_log_odds: torch.Tensor,
    log_rest: torch.Tensor,
    logits: torch.Tensor,
    target: torch.Tensor,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    impl: str | None,
) -> torch.Tensor:
    """Gradient [N, V] of the logits, in memory of its own."""
    out = logits.new_empty(logits.shape)
    _module(impl, logits).log_odds_backward(
        grad_log_odds,
        log_rest,
        logits,
        target,
        out,
        softcap=softcap,
        temperature=temperature,
        ignore_index=ignore_index,
    )
    return out


@_log_odds_backward.register_fake
def _(
    grad_log_odds: torch.Tensor,
    log_rest: torch.Tensor,
    logits: torch.Tensor,
    target: torch.Tensor,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    impl: str | None,
) -> torch.Tensor:
    return logits.new_empty(logits.shape)


@torch.library.custom_op("fastalign_kernels::logits_log_odds_backward_", mutates_args=("logits",))
def _log_odds_backward_(
    grad_log_odds: torch.Tensor,
    log_rest: torch.Tensor,
    logits: torch.Tensor,
    target: torch.Tensor,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    impl: str | None,
) -> None:
    """The same gradient in place of the logits."""
    _module(impl, logits).log_odds_backward(
        grad_log_odds,
        log_rest,
        logits,
        target,
        logits,
        softcap=softcap,
        temperature=temperature,
        ignore_index=ignore_index,
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    logits, target, *ctx.options, _, ctx.inplace = inputs
    ctx.save_for_backward(output[1], logits, target)
    ctx.spent = False


def _backward(
    ctx: Any, grad_log_odds: torch.Tensor, *_: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    if ctx.spent:
        raise RuntimeError(
            "logits_logprob(inplace_backward=True) has been through a backward: the logits now "
            "hold their gradient, and a second backward needs inplace_backward=False"
        )
    log_rest, logits, target = ctx.saved_tensors
    if ctx.inplace:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph = True: the gradient of logits_logprob(inplace_backward=True) has no "
                "graph, for the logits that it would depend on are gone"
            )
        ctx.spent = True
        # Without its history, but with its version counter, which is what makes autograd refuse
        # the logits to whoever saved them.
        grad = logits.detach()
        _log_odds_backward_(grad_log_odds, log_rest, grad, target, *ctx.options)
    else:
        grad = _log_odds_backward(grad_log_odds, log_rest, logits, target, *ctx.options)
    return grad, *[None] * 7


_log_odds.register_autograd(_backward, setup_context=_setup_context)


def _module(impl: str | None, logits: torch.Tensor) -> ModuleType:
    name = _dispatch.choose("logits_logprob", impl, logits.device, logits.dtype)
    # Triton is imported where it runs: it reads then whether it is to interpret, and not everybody
    # has it.
    return importlib.import_module(f"fastalign_kernels.{_IMPLEMENTATIONS[name]}")


def _check_tensors(logits: torch.Tensor, target: torch.Tensor) -> None:
    if logits.ndim != 2 or logits.dtype not in DTYPES or logits.shape[1] < 2:
        raise ValueError(
            f"logits is {describe(logits)}: must be [N, V] with V >= 2 in bf16, fp16, fp32 or fp64"
        )
    if target.shape != logits.shape[:1] or target.dtype != torch.int64:
        raise ValueError(f"target is {describe(target)}: must be [{logits.shape[0]}] in int64")
    if target.device != logits.device:
        raise ValueError(f"target is on {target.device}: must be on logits' {logits.device}")


def _check_overwritable(logits: torch.Tensor) -> None:
    n, vocab = logits.shape
    if logits.stride(1) != 1 or (n > 1 and logits.stride(0) < vocab):
        raise ValueError(
            f"inplace_backward = True: logits has strides {list(logits.stride())}, and must have "
            f"rows of {vocab} contiguous numbers that share no memory"
        )
    owner = logits if logits._base is None else logits._base
    if owner.is_leaf and owner.requires_grad:
        raise ValueError(
            "inplace_backward = True: logits is a leaf that requires a gradient, or a view of one, "
            "and would lose its values to it"
        )
