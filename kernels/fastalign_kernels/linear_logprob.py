"""Per-token log p and log(1 - p) of a linear head, for losses with any upstream gradient.

Both come from the log-odds m_t = z_t - logsumexp_{j != t} z_j: log p = logsigmoid(m) and
log(1 - p) = logsigmoid(-m) keep their relative accuracy from 1 - p = 0.5 down to 1e-7, where
log(1 - p) derived from a 32-bit log p is -inf.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import logsigmoid

# Modules that offer linear_logprob_forward and linear_logprob_backward with reference's signatures.
_IMPLEMENTATIONS = {"torch": "reference", "triton": "triton_head"}

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True)
class TokenLogprobs:
    """What a head says about the target of each row, in nats; fp64 for fp64 inputs, else fp32.

    Attributes:
        logprob: [N] log p(target), never above 0; differentiable.
        log1m_prob: [N] log(1 - p(target)), never above 0; differentiable.
        entropy: [N] of the distribution over the vocabulary, without a gradient; None unless
            asked for.

    Ignored rows hold exactly 0 everywhere.
    """

    logprob: torch.Tensor
    log1m_prob: torch.Tensor
    entropy: torch.Tensor | None


def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    impl: str | None = None,
    return_entropy: bool = False,
) -> TokenLogprobs:
    """Log-probs of targets under softmax(z), z = cap(hidden weight^T + bias) / temperature.

    cap(x) = softcap * tanh(x / softcap), or x without a softcap.  With the log-odds
    m_t = z_t - logsumexp_{j != t} z_j and q the softmax over the tokens other than t::

        log p = -softplus(-m)         log(1 - p) = -softplus(m)
        g_m = g_logp (1 - p) - g_log1mp p
        dz_t = g_m                    dz_j = -g_m q_j

    The [N, V] logits are never held.  One pass is a product of 2 N D V operations: without a
    gradient the op takes 1.  When neither weight nor bias want a gradient it takes 2: the forward
    keeps dm/dhidden [N, D], which no upstream gradient can change, and the backward scales its
    rows without touching the weight.  A trained weight takes 4, since the backward computes the
    logits again.

    Ignored rows never reach the products.  Autocast has no say: the inputs' dtype decides.

    Args:
        hidden: [N, D] last hidden states; bf16, fp16, fp32 or fp64.
        weight: [V, D] LM head, V >= 2, dtype and device of ``hidden``.
        target: [N] int64 token ids in [0, V), or ``ignore_index``.
        bias: [V] of the head.
        softcap: cap on the raw logits, in logits, > 0 (Gemma).
        temperature: divides the capped logits, > 0.
        ignore_index: target of rows that give 0 and take no gradient.
        impl: "torch", also what None takes, or "triton" (on a GPU; no fp64).
        return_entropy: also compute the entropy, at the cost of one more pass over the logits,
            none over the head.

    Raises:
        ValueError: an argument has a shape, dtype, device or value other than the above.  Targets
            out of range raise on the CPU alone: elsewhere the check would wait for the device.
    """
    _check_tensors(hidden, weight, target, bias)
    implementation = _implementation(impl, hidden)
    _check_numbers(softcap, temperature)
    _check_targets(target, weight.shape[0], ignore_index)
    logprob, log1m_prob, entropy = _LinearLogprob.apply(
        hidden,
        weight,
        bias,
        target,
        _Call(
            implementation=implementation,
            # Autograd functions run with gradients off: what is wanted has to be read out here.
            hidden_grad=_wants_grad(hidden),
            head_grad=_wants_grad(weight) or _wants_grad(bias),
            entropy=return_entropy,
            logits={
                "softcap": softcap,
                "temperature": temperature,
                "ignore_index": ignore_index,
            },
        ),
    )
    return TokenLogprobs(logprob, log1m_prob, entropy)


@dataclass(frozen=True)
class _Call:
    """All that crosses the autograd boundary besides tensors."""

    implementation: ModuleType
    hidden_grad: bool
    head_grad: bool
    entropy: bool
    logits: dict[str, Any]


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        target: torch.Tensor,
        call: _Call,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        ctx.call = call
        with torch.autocast(hidden.device.type, enabled=False):
            log_odds, log_rest, unit_grad, entropy = call.implementation.linear_logprob_forward(
                hidden,
                weight,
                target,
                bias,
                unit_grad=call.hidden_grad and not call.head_grad,
                entropy=call.entropy,
                **call.logits,
            )
        if call.head_grad:
            ctx.save_for_backward(target, log_odds, log_rest, hidden, weight, bias)
        elif call.hidden_grad:
            # Nothing of the head: under ZeRO-3 its weight is scattered again by now.
            ctx.save_for_backward(target, log_odds, unit_grad)
            ctx.hidden_dtype = hidden.dtype
        if entropy is not None:
            ctx.mark_non_differentiable(entropy)
        ignored = target == call.logits["ignore_index"]
        return (
            logsigmoid(log_odds).masked_fill_(ignored, 0.0),
            logsigmoid(-log_odds).masked_fill_(ignored, 0.0),
            entropy,
        )

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logprob: torch.Tensor, grad_log1m_prob: torch.Tensor, _: Any
    ) -> tuple[torch.Tensor | None, ...]:
        call = ctx.call
        target, log_odds, *saved = ctx.saved_tensors
        grad_log_odds = grad_logprob * torch.sigmoid(-log_odds)
        grad_log_odds -= grad_log1m_prob * torch.sigmoid(log_odds)
        # Not a product with 0: the upstream gradient of a row that does not count may be NaN.
        grad_log_odds.masked_fill_(target == call.logits["ignore_index"], 0.0)
        if not call.head_grad:
            (unit_grad,) = saved
            return (grad_log_odds[:, None] * unit_grad).to(ctx.hidden_dtype), *[None] * 4
        log_rest, hidden, weight, bias = saved
        with torch.autocast(hidden.device.type, enabled=False):
            grads = call.implementation.linear_logprob_backward(
                grad_log_odds,
                log_rest,
                hidden,
                weight,
                target,
                bias,
                wanted=ctx.needs_input_grad[:3],
                **call.logits,
            )
        return *grads, None, None


def _wants_grad(tensor: torch.Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad and torch.is_grad_enabled()


def _implementation(impl: str | None, hidden: torch.Tensor) -> ModuleType:
    name = "torch" if impl is None else impl
    if name not in _IMPLEMENTATIONS:
        raise ValueError(f"impl = {impl!r}: available are {', '.join(_IMPLEMENTATIONS)}")
    if name == "triton" and hidden.dtype == torch.float64:
        raise ValueError(f"impl = 'triton': hidden is {_describe(hidden)}, and fp64 needs 'torch'")
    # Triton reads when it is imported whether it is to interpret, and not everybody has it.
    module = importlib.import_module(f"fastalign_kernels.{_IMPLEMENTATIONS[name]}")
    if name == "triton" and not (hidden.is_cuda or module.INTERPRETED):
        raise ValueError("impl = 'triton': hidden is on the CPU, which needs 'torch'")
    return module


def _check_tensors(
    hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, bias: torch.Tensor | None
) -> None:
    if hidden.ndim != 2 or hidden.dtype not in _DTYPES:
        raise ValueError(
            f"hidden is {_describe(hidden)}: must be [N, D] in bf16, fp16, fp32 or fp64"
        )
    if weight.ndim != 2 and weight.numel() == 0:
        raise ValueError(
            f"weight is {_describe(weight)}: a parameter that ZeRO-3 has scattered; call this "
            "inside the forward of the module that DeepSpeed wraps"
        )
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[1] or weight.shape[0] < 2:
        raise ValueError(
            f"weight is {_describe(weight)}: must be [V, {hidden.shape[1]}] with V >= 2 for "
            f"hidden {_describe(hidden)}"
        )
    if target.shape != hidden.shape[:1] or target.dtype != torch.int64:
        raise ValueError(f"target is {_describe(target)}: must be [{hidden.shape[0]}] in int64")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias is {_describe(bias)}: must be [{weight.shape[0]}]")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise ValueError(f"{name} is in {tensor.dtype}: must be in hidden's {hidden.dtype}")
    for name, tensor in (("weight", weight), ("target", target), ("bias", bias)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device}: must be on hidden's {hidden.device}")


def _check_numbers(softcap: float | None, temperature: float) -> None:
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap = {softcap!r}: must be a finite number > 0, or None")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature = {temperature!r}: must be a finite number > 0")


def _check_targets(target: torch.Tensor, vocab: int, ignore_index: int) -> None:
    if target.device.type != "cpu":
        return
    wrong = ((target < 0) | (target >= vocab)) & (target != ignore_index)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"target[{row}] = {int(target[row])}: must be in [0, {vocab}) or "
            f"ignore_index = {ignore_index}"
        )


def _describe(tensor: torch.Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
