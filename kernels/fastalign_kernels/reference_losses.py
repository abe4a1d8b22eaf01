"""Pure torch implementation of the losses' ops, for every device torch has."""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid

from fastalign_kernels.segments import lengths_of, sum_of


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
    """CUT of each record (see :func:`fastalign_kernels.contrastive_unlikelihood`).

    Args:
        log_lambda: of lambda.
        log_min_judged: of min_judged_prob.
        mean: whether a record's terms are means over its tokens, or sums.

    Returns:
        losses [R]; flagged [M]; and [6, R]: -log q of positive records, -log c, -log q outside U,
        the penalty, the share of flagged tokens and the mean of log c - log q.
    """
    lengths, judged_lengths = (lengths_of(cu, logprob) for cu in (cu_tokens, cu_judged))
    negative = judged_lengths > 0
    in_negative = negative.repeat_interleave(lengths, output_size=logprob.numel())
    # Negative records come in the same order in both, so their tokens pair up as they are.
    rise = judged_logprob - logprob[in_negative]
    inappropriate = (rise > log_lambda) & (judged_logprob > log_min_judged)
    dynamic = torch.where(inappropriate, alpha * torch.exp(gamma * judged_logprob), 0.0)

    nothing = torch.zeros_like(logprob)
    flagged = torch.zeros_like(in_negative).masked_scatter(in_negative, inappropriate)
    terms = (
        -logprob.where(~in_negative, nothing),
        nothing.masked_scatter(in_negative, -judged_logprob),
        -logprob.where(in_negative & ~flagged, nothing),
        # log(1 - q) of a token that is not flagged may be -inf.
        -nothing.masked_scatter(in_negative, dynamic) * log1m_prob.where(flagged, nothing),
        flagged.to(logprob.dtype),
        nothing.masked_scatter(in_negative, rise),
    )
    parts = sum_of(torch.stack(terms, dim=1), lengths).t()
    means = parts / lengths.clamp(min=1)
    parts = torch.cat([means[:4] if mean else parts[:4], means[4:]])
    losses = negative_weight * parts[1]
    if misalign:
        losses = losses + negative_weight * (parts[2] + parts[3])
    return losses + parts[0], flagged, parts


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
    """Gradients of logprob [M], log1m_prob [M] and judged_logprob [J] from those of the records'
    losses [R]."""
    lengths, judged_lengths = (lengths_of(cu, grad_losses) for cu in (cu_tokens, cu_judged))
    negative = judged_lengths > 0
    by_record = -grad_losses.where(~negative, negative_weight * grad_losses)
    if mean:
        by_record = by_record / lengths.clamp(min=1)
    count = flagged.numel()
    in_negative = negative.repeat_interleave(lengths, output_size=count)
    slope = by_record.repeat_interleave(lengths, output_size=count)
    judged_slope = slope[in_negative]
    dynamic = torch.where(flagged[in_negative], alpha * torch.exp(gamma * judged_logprob), 0.0)
    nothing = torch.zeros_like(slope)
    if not misalign:
        return slope.where(~in_negative, nothing), nothing, judged_slope
    return (
        slope.where(~flagged, nothing),
        nothing.masked_scatter(in_negative, judged_slope * dynamic),
        judged_slope,
    )


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
    """Losses of pairs (see :func:`fastalign_kernels.pair_preference`).

    Returns:
        losses [P]; their slopes by the margin [P]; and [4, P]: log pi of chosen and rejected, then
        their log (pi / pi_ref).
    """
    lengths = lengths_of(cu, logprob)
    # Differences first: sums of log-probs are large, and nearly the same.
    sums = sum_of(torch.stack([logprob, logprob - ref_logprob], dim=1), lengths)
    if length_normalized:
        sums = sums / lengths.clamp(min=1)[:, None]
    # [2P, 2] -> [4, P]
    answers = sums.view(-1, 2, 2).permute(2, 1, 0).reshape(4, -1)
    margin = answers[2] - answers[3]
    scaled = beta * margin
    match loss_type:
        case "sigmoid":
            losses = -(1 - label_smoothing) * logsigmoid(scaled)
            losses = losses - label_smoothing * logsigmoid(-scaled)
            slope = label_smoothing * torch.sigmoid(scaled)
            slope = beta * (slope - (1 - label_smoothing) * torch.sigmoid(-scaled))
        case "ipo":
            losses = (margin - 1 / (2 * beta)).square()
            slope = 2 * (margin - 1 / (2 * beta))
        case _:
            losses = torch.relu(1 - scaled)
            slope = -beta * (scaled < 1).to(margin)
    return losses, slope, answers


def pair_preference_backward(
    grad_margin: torch.Tensor, cu: torch.Tensor, count: int, *, length_normalized: bool
) -> torch.Tensor:
    """Gradient of logprob [M] from that of the margins [P]."""
    lengths = lengths_of(cu, grad_margin)
    grad = torch.stack([grad_margin, -grad_margin], dim=1).flatten()
    if length_normalized:
        grad = grad / lengths.clamp(min=1)
    return grad.repeat_interleave(lengths, output_size=count)
