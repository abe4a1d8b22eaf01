"""Losses of preference pairs over flat tokens: sums by answer, margins, losses and gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal, get_args

import torch

from fastalign_kernels import _dispatch
from fastalign_kernels.segments import check_bounds, check_shapes

LossType = Literal["sigmoid", "ipo", "hinge"]


@dataclass(frozen=True)
class PreferenceLoss:
    """Losses of P pairs, and what they are made of; all but ``losses`` is detached.

    Attributes:
        losses: [P].
        rewards_chosen: [P] beta (log pi - log pi_ref) of the chosen answers.
        rewards_rejected: [P] the same of the rejected ones.
        logps_chosen: [P] log pi of the chosen answers, in nats; over their tokens' number when
            length_normalized.
        logps_rejected: [P] the same of the rejected ones.
    """

    losses: torch.Tensor
    rewards_chosen: torch.Tensor
    rewards_rejected: torch.Tensor
    logps_chosen: torch.Tensor
    logps_rejected: torch.Tensor


def pair_preference(
    logprob: torch.Tensor,
    ref_logprob: torch.Tensor,
    cu: torch.Tensor,
    *,
    beta: float = 0.1,
    loss_type: LossType = "sigmoid",
    label_smoothing: float = 0.0,
    length_normalized: bool = False,
    impl: str | None = None,
) -> PreferenceLoss:
    """Losses of preference pairs, from log-probs of their answers' tokens.

    With h = log(pi / pi_ref)(chosen) - log(pi / pi_ref)(rejected) and e the label smoothing::

        sigmoid  -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)
        ipo      (h - 1 / (2 beta))^2
        hinge    max(0, 1 - beta h)

    "sigmoid" is DPO (arXiv 2305.18290, eq. 7; with smoothing, conservative DPO), on-policy the
    loss of SELF-JUDGE (arXiv 2402.11253).  "hinge" is SLiC's loss on DPO's margin (as in RSO,
    arXiv 2309.06657).  "ipo" is arXiv 2310.12036, eq. 17, with beta as its tau.  The equation has
    log-probs of sequences; its published results, and TRL after them, use means over the tokens of
    an answer (``length_normalized``), so that the target margin does not depend on length.

    One kernel each way.  Log-probs of whole answers are segments of one token.

    Args:
        logprob: [M] policy's log-probs, fp32 or fp64: the tokens of the first pair's chosen
            answer, of its rejected one, of the second pair's chosen answer, and so on.
        ref_logprob: [M] the same from the reference; takes no gradient.
        cu: [2P + 1] bounds of the answers, from 0 to M: pair p's chosen answer is
            cu[2p] : cu[2p + 1], its rejected one cu[2p + 1] : cu[2p + 2].
        beta: strength of the pull towards the reference, > 0.
        loss_type: which of the above.
        label_smoothing: share of pairs taken to be labelled the wrong way round, in [0, 0.5);
            "sigmoid" alone has it.
        length_normalized: divide the log-prob of an answer by its number of tokens.
        impl: "torch", "triton" (on a GPU; no fp64), or None for what the device takes.

    Raises:
        ValueError: shapes or dtypes that do not fit, an unknown loss_type, or a setting out of
            range; bounds on a GPU are taken as they are.
    """
    _dispatch.check_impl(impl)
    if logprob.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"logprob is in {logprob.dtype}: must be in fp32 or fp64")
    if ref_logprob.shape != logprob.shape or ref_logprob.dtype != logprob.dtype:
        raise ValueError(
            f"ref_logprob is {list(ref_logprob.shape)} in {ref_logprob.dtype}: must be "
            f"{list(logprob.shape)} in {logprob.dtype}, as logprob"
        )
    check_shapes("cu", cu, logprob)
    if cu.numel() % 2 == 0:
        raise ValueError(
            f"cu has {cu.numel()} entries: must have 2 P + 1, for two answers of each of P pairs"
        )
    if not 0 < beta < math.inf:
        raise ValueError(f"beta = {beta!r}: must be a finite number > 0")
    if loss_type not in get_args(LossType):
        raise ValueError(
            f"loss_type = {loss_type!r}: must be one of {', '.join(get_args(LossType))}"
        )
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing = {label_smoothing!r}: must be in [0, 0.5)")
    if label_smoothing and loss_type != "sigmoid":
        raise ValueError(
            f"label_smoothing = {label_smoothing!r}: only loss_type 'sigmoid' has it, "
            f"not {loss_type!r}"
        )
    losses, _, answers = _pair_preference(
        logprob,
        ref_logprob.detach(),
        cu,
        beta,
        loss_type,
        label_smoothing,
        length_normalized,
        impl,
    )
    chosen, rejected, chosen_ratio, rejected_ratio = answers.detach()
    return PreferenceLoss(
        losses=losses,
        rewards_chosen=beta * chosen_ratio,
        rewards_rejected=beta * rejected_ratio,
        logps_chosen=chosen,
        logps_rejected=rejected,
    )


@torch.library.custom_op("fastalign_kernels::pair_preference", mutates_args=())
def _pair_preference(
    logprob: torch.Tensor,
    ref_logprob: torch.Tensor,
    cu: torch.Tensor,
    beta: float,
    loss_type: str,
    label_smoothing: float,
    length_normalized: bool,
    impl: str | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(losses [P], their slopes by the margin [P], log pi and log (pi / pi_ref) [4, P])."""
    check_bounds("cu", cu, logprob.numel())
    with _dispatch.alone_on_device_of(logprob):
        return _module(impl, logprob).pair_preference_forward(
            logprob,
            ref_logprob,
            cu,
            beta=beta,
            loss_type=loss_type,
            label_smoothing=label_smoothing,
            length_normalized=length_normalized,
        )


@_pair_preference.register_fake
def _(
    logprob: torch.Tensor, ref_logprob: torch.Tensor, cu: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    pairs = (cu.shape[0] - 1) // 2
    return logprob.new_empty(pairs), logprob.new_empty(pairs), logprob.new_empty(4, pairs)


@torch.library.custom_op("fastalign_kernels::pair_preference_backward", mutates_args=())
def _pair_preference_backward(
    grad_margin: torch.Tensor,
    cu: torch.Tensor,
    count: int,
    length_normalized: bool,
    impl: str | None,
) -> torch.Tensor:
    """Gradient of logprob [count]."""
    with _dispatch.alone_on_device_of(grad_margin):
        return _module(impl, grad_margin).pair_preference_backward(
            grad_margin, cu, count, length_normalized=length_normalized
        )


@_pair_preference_backward.register_fake
def _(grad_margin: torch.Tensor, cu: torch.Tensor, count: int, *_: Any) -> torch.Tensor:
    return grad_margin.new_empty(count)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    logprob, _, cu, _, _, _, ctx.length_normalized, ctx.impl = inputs
    ctx.set_materialize_grads(False)
    ctx.count = logprob.shape[0]
    ctx.save_for_backward(output[1], cu)


def _backward(ctx: Any, grad_losses: torch.Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad_losses is None:
        return (None,) * 8
    slopes, cu = ctx.saved_tensors
    grad = _pair_preference_backward(
        grad_losses * slopes, cu, ctx.count, ctx.length_normalized, ctx.impl
    )
    return grad, *(None,) * 7


_pair_preference.register_autograd(_backward, setup_context=_setup_context)


def _module(impl: str | None, values: torch.Tensor) -> ModuleType:
    return _dispatch.losses_module("pair_preference", impl, values)
