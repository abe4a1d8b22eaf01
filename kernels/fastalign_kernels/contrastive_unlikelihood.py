"""The loss of CUT over flat tokens: flags, weights, means by record and gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import torch

from fastalign_kernels import _dispatch
from fastalign_kernels.segments import check_bounds, check_shapes

Normalization = Literal["record", "token"]


@dataclass(frozen=True)
class CutLoss:
    """Loss of CUT and what it is made of.

    All but ``loss`` is detached, unweighted and, under the normalization "record", a mean over the
    tokens of the record.

    Attributes:
        loss: scalar, sum over the records.
        flagged: [M] bool, the tokens judged inappropriate (the set U).
        flagged_share: [R] share of a record's tokens in U.
        align_p: [R] -log q of positive records, 0 for the others.
        align_n: [R] -log c of negative records, 0 for the others.
        likelihood: [R] -log q over the tokens outside U of negative records, 0 for the others.
        penalty: [R] -alpha c^gamma log(1 - q) over U, 0 for the others.
        contrast: [R] mean of log c - log q in nats whatever the normalization, 0 for positive
            records.
    """

    loss: torch.Tensor
    flagged: torch.Tensor
    flagged_share: torch.Tensor
    align_p: torch.Tensor
    align_n: torch.Tensor
    likelihood: torch.Tensor
    penalty: torch.Tensor
    contrast: torch.Tensor


def contrastive_unlikelihood(
    logprob: torch.Tensor,
    log1m_prob: torch.Tensor,
    judged_logprob: torch.Tensor,
    cu_tokens: torch.Tensor,
    cu_judged: torch.Tensor,
    weight: torch.Tensor | None = None,
    *,
    lambda_: float,
    alpha: float,
    gamma: float,
    negative_weight: float = 1.0,
    min_judged_prob: float = 0.0,
    normalization: Normalization = "record",
    misalign: bool = True,
    impl: str | None = None,
) -> CutLoss:
    """Contrastive unlikelihood training (CUT, arXiv 2312.14591).

    A record is negative when it has judged tokens.  With q the probability of a response token
    after the plain prompt, c after the one that shows the judgment, and N the record's tokens::

        Align-P   (positive)  -(1/N) sum log q
        Align-N   (negative)  -(1/N) sum log c
        Misalign  (negative)  -(1/N) sum_{t not in U} log q
                              -(1/N) sum_{t in U} alpha c^gamma log(1 - q)

        U = {t : c_t > lambda q_t and c_t > min_judged_prob}

    U and the dynamic weight c^gamma come from detached values.  For lambda > 1 the penalty's slope
    q / (1 - q) stays below 1 / (lambda - 1); for lambda <= 1 it is unbounded in log q, while the
    gradient on the logits stays below alpha q in either case.

    The second condition of U is DualCUT's (arXiv 2412.20297); 0 leaves it out.

    One kernel forward and one backward, and a sum over the records.  The sum divided by the count
    of a global batch is the same however that batch was cut.  A record without tokens adds 0.

    Args:
        logprob: [M] log q of all records, fp32 or fp64.
        log1m_prob: [M] log(1 - q).
        judged_logprob: [J] log c of the negative records.
        cu_tokens: [R + 1] bounds of the records in ``logprob``: record r has the tokens
            cu_tokens[r] to cu_tokens[r + 1].
        cu_judged: [R + 1] bounds in ``judged_logprob``; a positive record has no tokens there, a
            negative one as many as in ``logprob``.
        weight: [R] of the records, default 1.
        lambda_: how much likelier the judgment must make a token, > 0.
        alpha: weight of the penalty, >= 0.
        gamma: exponent of the dynamic weight, >= 0.
        negative_weight: factor of negative records, >= 0.
        min_judged_prob: smallest c of a flagged token, in [0, 1).
        normalization: "record" for means over each record's tokens, "token" to leave out every 1/N.
        misalign: False leaves out Misalign (the paper's ablation, and a warm-up on judged
            streams); U is reported all the same.
        impl: "torch", "triton" (on a GPU; no fp64), or None for what the device takes.

    Raises:
        ValueError: a setting out of range, shapes or dtypes that do not fit, or a record with
            another number of judged tokens than of tokens; bounds on a GPU are taken as they are.
    """
    _check_settings(lambda_, alpha, gamma, negative_weight, min_judged_prob, normalization)
    _dispatch.check_impl(impl)
    if logprob.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"logprob is in {logprob.dtype}: must be in fp32 or fp64")
    for name, tensor in (("log1m_prob", log1m_prob), ("judged_logprob", judged_logprob)):
        if tensor.dtype != logprob.dtype:
            raise ValueError(f"{name} is in {tensor.dtype}: must be in logprob's {logprob.dtype}")
    if log1m_prob.shape != logprob.shape:
        raise ValueError(
            f"log1m_prob is {list(log1m_prob.shape)}: must be {list(logprob.shape)}, as logprob"
        )
    check_shapes("cu_tokens", cu_tokens, logprob)
    check_shapes("cu_judged", cu_judged, judged_logprob)
    if cu_judged.shape != cu_tokens.shape:
        raise ValueError(
            f"cu_judged has {cu_judged.numel()} entries: must have {cu_tokens.numel()}, as "
            "cu_tokens"
        )
    losses, flagged, parts = _contrastive_unlikelihood(
        logprob,
        log1m_prob,
        judged_logprob,
        cu_tokens,
        cu_judged,
        math.log(lambda_),
        math.log(min_judged_prob) if min_judged_prob > 0 else -math.inf,
        alpha,
        gamma,
        negative_weight,
        normalization == "record",
        misalign,
        impl,
    )
    if weight is not None:
        if weight.shape != losses.shape:
            raise ValueError(f"weight is {list(weight.shape)}: must be {list(losses.shape)}")
        losses = weight.to(losses) * losses
    align_p, align_n, likelihood, penalty, flagged_share, contrast = parts.detach()
    return CutLoss(
        loss=losses.sum(),
        flagged=flagged,
        flagged_share=flagged_share,
        align_p=align_p,
        align_n=align_n,
        likelihood=likelihood,
        penalty=penalty,
        contrast=contrast,
    )


@torch.library.custom_op("fastalign_kernels::contrastive_unlikelihood", mutates_args=())
def _contrastive_unlikelihood(
    logprob: torch.Tensor,
    log1m_prob: torch.Tensor,
    judged_logprob: torch.Tensor,
    cu_tokens: torch.Tensor,
    cu_judged: torch.Tensor,
    log_lambda: float,
    log_min_judged: float,
    alpha: float,
    gamma: float,
    negative_weight: float,
    mean: bool,
    misalign: bool,
    impl: str | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(losses [R], flagged [M], parts [6, R])."""
    _check_judged(cu_tokens, cu_judged, logprob.numel(), judged_logprob.numel())
    with _dispatch.alone_on_device_of(logprob):
        return _module(impl, logprob).contrastive_unlikelihood_forward(
            logprob,
            log1m_prob,
            judged_logprob,
            cu_tokens,
            cu_judged,
            log_lambda=log_lambda,
            log_min_judged=log_min_judged,
            alpha=alpha,
            gamma=gamma,
            negative_weight=negative_weight,
            mean=mean,
            misalign=misalign,
        )


@_contrastive_unlikelihood.register_fake
def _(
    logprob: torch.Tensor,
    log1m_prob: torch.Tensor,
    judged_logprob: torch.Tensor,
    cu_tokens: torch.Tensor,
    *_: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    records = cu_tokens.shape[0] - 1
    return (
        logprob.new_empty(records),
        torch.empty_like(logprob, dtype=torch.bool),
        logprob.new_empty(6, records),
    )


@torch.library.custom_op("fastalign_kernels::contrastive_unlikelihood_backward", mutates_args=())
def _contrastive_unlikelihood_backward(
    grad_losses: torch.Tensor,
    judged_logprob: torch.Tensor,
    flagged: torch.Tensor,
    cu_tokens: torch.Tensor,
    cu_judged: torch.Tensor,
    alpha: float,
    gamma: float,
    negative_weight: float,
    mean: bool,
    misalign: bool,
    impl: str | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of logprob [M], log1m_prob [M] and judged_logprob [J]."""
    with _dispatch.alone_on_device_of(grad_losses):
        return _module(impl, grad_losses).contrastive_unlikelihood_backward(
            grad_losses,
            judged_logprob,
            flagged,
            cu_tokens,
            cu_judged,
            alpha=alpha,
            gamma=gamma,
            negative_weight=negative_weight,
            mean=mean,
            misalign=misalign,
        )


@_contrastive_unlikelihood_backward.register_fake
def _(
    grad_losses: torch.Tensor, judged_logprob: torch.Tensor, flagged: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        torch.empty_like(flagged, dtype=grad_losses.dtype),
        torch.empty_like(flagged, dtype=grad_losses.dtype),
        torch.empty_like(judged_logprob),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    _, _, judged_logprob, cu_tokens, cu_judged, _, _, *ctx.settings = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(judged_logprob, output[1], cu_tokens, cu_judged)


def _backward(ctx: Any, grad_losses: torch.Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad_losses is None:
        return (None,) * 13
    grads = _contrastive_unlikelihood_backward(grad_losses, *ctx.saved_tensors, *ctx.settings)
    return *grads, *(None,) * 10


_contrastive_unlikelihood.register_autograd(_backward, setup_context=_setup_context)


def _module(impl: str | None, values: torch.Tensor) -> ModuleType:
    return _dispatch.losses_module("contrastive_unlikelihood", impl, values)


def _check_settings(
    lambda_: float,
    alpha: float,
    gamma: float,
    negative_weight: float,
    min_judged_prob: float,
    normalization: str,
) -> None:
    if not 0 < lambda_ < math.inf:
        raise ValueError(f"lambda_ = {lambda_!r}: must be a finite number > 0")
    for name, value in (("alpha", alpha), ("gamma", gamma), ("negative_weight", negative_weight)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} = {value!r}: must be a finite number >= 0")
    if not 0 <= min_judged_prob < 1:
        raise ValueError(f"min_judged_prob = {min_judged_prob!r}: must be in [0, 1)")
    if normalization not in ("record", "token"):
        raise ValueError(f"normalization = {normalization!r}: must be 'record' or 'token'")


def _check_judged(
    cu_tokens: torch.Tensor, cu_judged: torch.Tensor, tokens: int, judged: int
) -> None:
    check_bounds("cu_tokens", cu_tokens, tokens)
    check_bounds("cu_judged", cu_judged, judged)
    if cu_tokens.device.type != "cpu" or cu_judged.device.type != "cpu":
        return
    pairs = zip(cu_tokens.diff().tolist(), cu_judged.diff().tolist(), strict=True)
    for record, (n, m) in enumerate(pairs):
        if m not in (0, n):
            raise ValueError(
                f"record {record} has {m} judged tokens: must have 0 or its {n} tokens"
            )
