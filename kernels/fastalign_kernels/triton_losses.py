"""Triton implementation of the losses' ops, with the signatures of :mod:`.reference_losses`.

A program works through one record, or one pair, in one launch each way.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 256
WARPS = 4
LOSS_TYPES = {"sigmoid": 0, "ipo": 1, "hinge": 2}


@triton.jit
def _log1p_exp_neg(x):
    """log(1 + exp(-x)) for x >= 0, exact for large x as well."""
    e = tl.exp(-x)
    # The series where 1 + e would lose digits of e: off by e^4 / 5 at most.
    return tl.where(e < 0.01, e * (1.0 - e * (0.5 - e * (0.33333334 - e * 0.25))), tl.log(1.0 + e))


@triton.jit
def _softplus(x):
    return tl.maximum(x, 0.0) + _log1p_exp_neg(tl.abs(x))


@triton.jit
def cut_kernel(logprob, log1m_prob, judged_logprob, cu_tokens, cu_judged, records, log_lambda,
               log_min_judged, alpha, gamma, negative_weight, losses, flagged, parts,
               MEAN: tl.constexpr, MISALIGN: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """One record: flags of its tokens, its loss and the six parts."""
    record = tl.program_id(0)
    start = tl.load(cu_tokens + record).to(tl.int64)
    end = tl.load(cu_tokens + record + 1).to(tl.int64)
    judged = tl.load(cu_judged + record).to(tl.int64)
    judged_length = tl.load(cu_judged + record + 1).to(tl.int64) - judged
    negative = judged_length > 0
    judged_sum = tl.zeros((BLOCK,), dtype=tl.float32)
    kept_sum = tl.zeros((BLOCK,), dtype=tl.float32)
    penalty_sum = tl.zeros((BLOCK,), dtype=tl.float32)
    flag_sum = tl.zeros((BLOCK,), dtype=tl.float32)
    rise_sum = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(start, end, BLOCK):
        t = first + tl.arange(0, BLOCK)
        live = t < end
        both = t - start < judged_length
        q = tl.load(logprob + t, mask=live, other=0.0).to(tl.float32)
        not_q = tl.load(log1m_prob + t, mask=live, other=0.0).to(tl.float32)
        c = tl.load(judged_logprob + judged + (t - start), mask=both, other=0.0)
        c = c.to(tl.float32)
        flag = both & (c - q > log_lambda) & (c > log_min_judged)
        tl.store(flagged + t, flag, mask=live)
        judged_sum -= c
        kept_sum -= tl.where(flag, 0.0, q)
        # log(1 - q) of a token that is not flagged may be -inf.
        penalty_sum -= tl.where(flag, alpha * tl.exp(gamma * c) * not_q, 0.0)
        flag_sum += tl.where(flag, 1.0, 0.0)
        rise_sum += tl.where(both, c - q, 0.0)
    length = tl.maximum(end - start, 1).to(tl.float32)
    scale = length if MEAN else 1.0
    # Of a positive record nothing is flagged.
    kept = tl.sum(kept_sum, axis=0) / scale
    align_p = tl.where(negative, 0.0, kept)
    align_n = tl.sum(judged_sum, axis=0) / scale
    likelihood = tl.where(negative, kept, 0.0)
    penalty = tl.sum(penalty_sum, axis=0) / scale
    loss = align_p + negative_weight * align_n
    if MISALIGN:
        loss += negative_weight * (likelihood + penalty)
    tl.store(losses + record, loss)
    tl.store(parts + record, align_p)
    tl.store(parts + records + record, align_n)
    tl.store(parts + 2 * records + record, likelihood)
    tl.store(parts + 3 * records + record, penalty)
    tl.store(parts + 4 * records + record, tl.sum(flag_sum, axis=0) / length)
    tl.store(parts + 5 * records + record, tl.sum(rise_sum, axis=0) / length)


@triton.jit
def cut_grad_kernel(grad_losses, judged_logprob, flagged, cu_tokens, cu_judged, alpha, gamma,
                    negative_weight, grad_logprob, grad_log1m_prob, grad_judged,
                    MEAN: tl.constexpr, MISALIGN: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """One record: gradients of its tokens in both streams."""
    record = tl.program_id(0)
    start = tl.load(cu_tokens + record).to(tl.int64)
    end = tl.load(cu_tokens + record + 1).to(tl.int64)
    judged = tl.load(cu_judged + record).to(tl.int64)
    judged_length = tl.load(cu_judged + record + 1).to(tl.int64) - judged
    negative = judged_length > 0
    slope = -tl.load(grad_losses + record)
    slope *= tl.where(negative, negative_weight, 1.0)
    if MEAN:
        slope /= tl.maximum(end - start, 1).to(tl.float32)
    for first in range(start, end, BLOCK):
        t = first + tl.arange(0, BLOCK)
        live = t < end
        both = t - start < judged_length
        j = judged + (t - start)
        flag = tl.load(flagged + t, mask=live, other=0) != 0
        c = tl.load(judged_logprob + j, mask=both, other=0.0).to(tl.float32)
        if MISALIGN:
            on_q = tl.where(flag, 0.0, slope)
            on_not_q = tl.where(flag, slope * alpha * tl.exp(gamma * c), 0.0)
        else:
            on_q = tl.where(negative, 0.0, slope) + tl.zeros((BLOCK,), dtype=tl.float32)
            on_not_q = tl.zeros((BLOCK,), dtype=tl.float32)
        tl.store(grad_logprob + t, on_q, mask=live)
        tl.store(grad_log1m_prob + t, on_not_q, mask=live)
        tl.store(grad_judged + j, slope + tl.zeros_like(c), mask=both)


@triton.jit
def _answer(logprob, ref_logprob, start, end, BLOCK: tl.constexpr):
    """Sums of log pi, and of log (pi / pi_ref)."""
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    ratio = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(start, end, BLOCK):
        t = first + tl.arange(0, BLOCK)
        ours = tl.load(logprob + t, mask=t < end, other=0.0).to(tl.float32)
        total += ours
        ratio += ours - tl.load(ref_logprob + t, mask=t < end, other=0.0).to(tl.float32)
    return tl.sum(total, axis=0), tl.sum(ratio, axis=0)


@triton.jit
def pair_kernel(logprob, ref_logprob, cu, pairs, beta, smoothing, losses, slopes, answers,
                LOSS: tl.constexpr, NORMALIZED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """One pair: its answers, its loss and the loss's slope by the margin."""
    pair = tl.program_id(0)
    start = tl.load(cu + 2 * pair).to(tl.int64)
    middle = tl.load(cu + 2 * pair + 1).to(tl.int64)
    end = tl.load(cu + 2 * pair + 2).to(tl.int64)
    chosen, chosen_ratio = _answer(logprob, ref_logprob, start, middle, BLOCK)
    rejected, rejected_ratio = _answer(logprob, ref_logprob, middle, end, BLOCK)
    if NORMALIZED:
        first = tl.maximum(middle - start, 1).to(tl.float32)
        second = tl.maximum(end - middle, 1).to(tl.float32)
        chosen /= first
        chosen_ratio /= first
        rejected /= second
        rejected_ratio /= second
    margin = chosen_ratio - rejected_ratio
    x = beta * margin
    if LOSS == 0:
        loss = (1.0 - smoothing) * _softplus(-x) + smoothing * _softplus(x)
        slope = beta * (smoothing * tl.sigmoid(x) - (1.0 - smoothing) * tl.sigmoid(-x))
    elif LOSS == 1:
        off = margin - 0.5 / beta
        loss = off * off
        slope = 2.0 * off
    else:
        loss = tl.maximum(1.0 - x, 0.0)
        slope = tl.where(x < 1.0, -beta, 0.0)
    tl.store(losses + pair, loss)
    tl.store(slopes + pair, slope)
    tl.store(answers + pair, chosen)
    tl.store(answers + pairs + pair, rejected)
    tl.store(answers + 2 * pairs + pair, chosen_ratio)
    tl.store(answers + 3 * pairs + pair, rejected_ratio)


@triton.jit
def pair_grad_kernel(grad_margin, cu, grad_logprob, NORMALIZED: tl.constexpr,
                     BLOCK: tl.constexpr):  # fmt: skip
    """One pair: the gradient of each of its tokens."""
    pair = tl.program_id(0)
    start = tl.load(cu + 2 * pair).to(tl.int64)
    middle = tl.load(cu + 2 * pair + 1).to(tl.int64)
    end = tl.load(cu + 2 * pair + 2).to(tl.int64)
    grad = tl.load(grad_margin + pair)
    up = grad
    down = -grad
    if NORMALIZED:
        up /= tl.maximum(middle - start, 1).to(tl.float32)
        down /= tl.maximum(end - middle, 1).to(tl.float32)
    for first in range(start, end, BLOCK):
        t = first + tl.arange(0, BLOCK)
        tl.store(grad_logprob + t, tl.where(t < middle, up, down), mask=t < end)


def _bounds(cu: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return cu.to(like.device).contiguous()


def contrastive_unlikelihood_forward(
    logprob: torch.Tensor,
    log1m_prob: torch.Tensor,
    judged_logprob: torch.Tensor,
    cu_tokens: torch.Tensor,
    cu_judged: torch.Tensor,
    *,
    log_lambda: float,
    log_min_judged: float,
    alpha: float,
    gamma: float,
    negative_weight: float,
    mean: bool,
    misalign: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See :func:`fastalign_kernels.reference_losses.contrastive_unlikelihood_forward`."""
    records = cu_tokens.numel() - 1
    losses = logprob.new_empty(records)
    flagged = logprob.new_empty(logprob.shape, dtype=torch.bool)
    parts = logprob.new_empty(6, records)
    if records:
        cut_kernel[(records,)](
            logprob.contiguous(),
            log1m_prob.contiguous(),
            judged_logprob.contiguous(),
            _bounds(cu_tokens, logprob),
            _bounds(cu_judged, logprob),
            records,
            log_lambda,
            log_min_judged,
            alpha,
            gamma,
            negative_weight,
            losses,
            flagged,
            parts,
            MEAN=mean,
            MISALIGN=misalign,
            BLOCK=BLOCK,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
    return losses, flagged, parts


def contrastive_unlikelihood_backward(
    grad_losses: torch.Tensor,
    judged_logprob: torch.Tensor,
    flagged: torch.Tensor,
    cu_tokens: torch.Tensor,
    cu_judged: torch.Tensor,
    *,
    alpha: float,
    gamma: float,
    negative_weight: float,
    mean: bool,
    misalign: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See :func:`fastalign_kernels.reference_losses.contrastive_unlikelihood_backward`."""
    records = cu_tokens.numel() - 1
    grad_logprob, grad_log1m_prob = (grad_losses.new_empty(flagged.numel()) for _ in range(2))
    grad_judged = grad_losses.new_empty(judged_logprob.numel())
    if records:
        cut_grad_kernel[(records,)](
            grad_losses.contiguous(),
            judged_logprob.contiguous(),
            flagged,
            _bounds(cu_tokens, flagged),
            _bounds(cu_judged, flagged),
            alpha,
            gamma,
            negative_weight,
            grad_logprob,
            grad_log1m_prob,
            grad_judged,
            MEAN=mean,
            MISALIGN=misalign,
            BLOCK=BLOCK,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
    return grad_logprob, grad_log1m_prob, grad_judged


def pair_preference_forward(
    logprob: torch.Tensor,
    ref_logprob: torch.Tensor,
    cu: torch.Tensor,
    *,
    beta: float,
    loss_type: str,
    label_smoothing: float,
    length_normalized: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See :func:`fastalign_kernels.reference_losses.pair_preference_forward`."""
    pairs = cu.numel() // 2
    losses, slopes = (logprob.new_empty(pairs) for _ in range(2))
    answers = logprob.new_empty(4, pairs)
    if pairs:
        pair_kernel[(pairs,)](
            logprob.contiguous(),
            ref_logprob.contiguous(),
            _bounds(cu, logprob),
            pairs,
            beta,
            label_smoothing,
            losses,
            slopes,
            answers,
            LOSS=LOSS_TYPES[loss_type],
            NORMALIZED=length_normalized,
            BLOCK=BLOCK,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
    return losses, slopes, answers


def pair_preference_backward(
    grad_margin: torch.Tensor, cu: torch.Tensor, count: int, *, length_normalized: bool
) -> torch.Tensor:
    """See :func:`fastalign_kernels.reference_losses.pair_preference_backward`."""
    grad = grad_margin.new_empty(count)
    pairs = cu.numel() // 2
    if pairs:
        pair_grad_kernel[(pairs,)](
            grad_margin.contiguous(),
            _bounds(cu, grad),
            grad,
            NORMALIZED=length_normalized,
            BLOCK=BLOCK,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
    return grad
