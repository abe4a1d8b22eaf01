"""The losses, as pure functions of per-token log-probs.

Log-probs are flat: the tokens of all records after each other, with ``cu`` [R + 1] where record r
has tokens cu[r] to cu[r + 1], cu[0] = 0.  Every loss is a sum over records.  Divide it by the
count of the whole global batch, and it comes out the same however that batch was cut into micro
batches, packs and ranks.  A record without tokens adds 0.

``cu`` may live on the CPU while the log-probs are on a GPU, which saves waiting for the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch.nn.functional import logsigmoid

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


@dataclass(frozen=True)
class PreferenceLoss:
    """Losses of pairs, [P] each; the rewards beta (log pi - log pi_ref) are detached."""

    losses: torch.Tensor
    rewards_chosen: torch.Tensor
    rewards_rejected: torch.Tensor


def segment_sum(values: torch.Tensor, cu: torch.Tensor) -> torch.Tensor:
    """Sums of stretches, in the same order every time: [S] from values [M] and cu [S + 1].

    Differentiable.  An empty stretch sums to 0.

    Raises:
        ValueError: cu is no integer [S + 1] that rises from 0 to M.
    """
    _bounds("cu", cu, values)
    return _sum(values, cu.diff())


def nll_loss(
    logprob: torch.Tensor,
    cu_tokens: torch.Tensor,
    weight: torch.Tensor | None = None,
    *,
    normalization: Normalization = "record",
) -> torch.Tensor:
    """Negative log-likelihood, summed over the records: a scalar.

    "record": sum_r w_r mean_t -log p, for a mean over the global batch's records.
    "token": sum_r w_r sum_t -log p, for a mean over its tokens.

    Args:
        logprob: [M] log p.
        cu_tokens: [R + 1] bounds of the records.
        weight: [R] of the records, default 1.
        normalization: what the caller's mean is over.

    Raises:
        ValueError: shapes that do not fit, or an unknown normalization.
    """
    lengths = _lengths("cu_tokens", cu_tokens, logprob)
    return _weighted_sum(_per_record(-logprob, lengths, normalization), weight)


def unlikelihood_loss(
    log1m_prob: torch.Tensor,
    cu_tokens: torch.Tensor,
    weight: torch.Tensor | None = None,
    *,
    normalization: Normalization = "record",
) -> torch.Tensor:
    """Unlikelihood of every token: :func:`nll_loss` with -log(1 - p) [M] (arXiv 1908.04319; the
    baseline of CUT, arXiv 2312.14591)."""
    lengths = _lengths("cu_tokens", cu_tokens, log1m_prob)
    return _weighted_sum(_per_record(-log1m_prob, lengths, normalization), weight)


def cut_preset(name: Literal["paper", "reference"], gamma: float) -> tuple[float, float]:
    """(gamma, negative_weight) of :func:`cut_loss` under a preset.

    "paper": the given gamma, and every record weighs 1 (arXiv 2312.14591).
    "reference": what the authors' code does at micro-batch 1: no dynamic weight (gamma 0), and a
    negative record's loss is halved.
    """
    presets = {"paper": (gamma, 1.0), "reference": (0.0, 0.5)}
    if name not in presets:
        raise ValueError(f"preset = {name!r}: must be one of {', '.join(presets)}")
    return presets[name]


def cut_loss(
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
    align_positive: bool = True,
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

    Args:
        logprob: [M] log q of all records.
        log1m_prob: [M] log(1 - q).
        judged_logprob: [J] log c of the negative records.
        cu_tokens: [R + 1] bounds of the records in ``logprob``.
        cu_judged: [R + 1] bounds in ``judged_logprob``; a positive record has no tokens there, a
            negative one as many as in ``logprob``.
        weight: [R] of the records, default 1.
        lambda_: how much likelier the judgment must make a token, > 0.
        alpha: weight of the penalty, >= 0.
        gamma: exponent of the dynamic weight, >= 0.
        negative_weight: factor of negative records, >= 0 (see :func:`cut_preset`).
        min_judged_prob: smallest c of a flagged token, in [0, 1).
        normalization: see :func:`nll_loss`; "token" leaves out every 1/N.
        misalign: False leaves out Misalign (the paper's ablation, and a warm-up on judged
            streams); U is reported all the same.
        align_positive: False leaves out Align-P.

    Raises:
        ValueError: a setting out of range, shapes that do not fit, or a record with another number
            of judged tokens than of tokens.
    """
    _check_cut_settings(lambda_, alpha, gamma, negative_weight, min_judged_prob)
    if log1m_prob.shape != logprob.shape:
        raise ValueError(
            f"log1m_prob is {list(log1m_prob.shape)}: must be {list(logprob.shape)}, as logprob"
        )
    _check_judged(
        _bounds("cu_tokens", cu_tokens, logprob), _bounds("cu_judged", cu_judged, judged_logprob)
    )
    lengths, judged_lengths = (cu.to(logprob.device).diff() for cu in (cu_tokens, cu_judged))
    negative = judged_lengths > 0
    in_negative = negative.repeat_interleave(lengths, output_size=logprob.numel())

    # Negative records come in the same order in both, so their tokens pair up as they are.
    log_q, log_c = logprob.detach(), judged_logprob.detach().to(logprob.dtype)
    rise = log_c - log_q[in_negative]
    inappropriate = (rise > math.log(lambda_)) & (
        log_c > (math.log(min_judged_prob) if min_judged_prob > 0 else -math.inf)
    )
    dynamic = torch.where(inappropriate, alpha * torch.exp(gamma * log_c), 0.0)
    contrast = torch.zeros_like(log_q).masked_scatter(in_negative, rise)
    flagged = torch.zeros_like(in_negative).masked_scatter(in_negative, inappropriate)
    penalty_weight = torch.zeros_like(log_q).masked_scatter(in_negative, dynamic)

    nothing = torch.zeros_like(logprob)
    align_p = _per_record(-logprob.where(~in_negative, nothing), lengths, normalization)
    align_n = _per_record(-judged_logprob, judged_lengths, normalization)
    likelihood = _per_record(
        -logprob.where(in_negative & ~flagged, nothing), lengths, normalization
    )
    penalty = _per_record(
        -penalty_weight * log1m_prob.where(flagged, nothing), lengths, normalization
    )

    record_loss = negative_weight * align_n
    if misalign:
        record_loss = record_loss + negative_weight * (likelihood + penalty)
    if align_positive:
        record_loss = record_loss + align_p
    return CutLoss(
        loss=_weighted_sum(record_loss, weight),
        flagged=flagged,
        flagged_share=_per_record(flagged.to(logprob.dtype), lengths, "record"),
        align_p=align_p.detach(),
        align_n=align_n.detach(),
        likelihood=likelihood.detach(),
        penalty=penalty.detach(),
        contrast=_per_record(contrast, lengths, "record"),
    )


def dpo_loss(
    chosen_logps: torch.Tensor,
    rejected_logps: torch.Tensor,
    ref_chosen_logps: torch.Tensor,
    ref_rejected_logps: torch.Tensor,
    *,
    beta: float = 0.1,
    loss_type: Literal["sigmoid", "ipo", "hinge"] = "sigmoid",
    label_smoothing: float = 0.0,
) -> PreferenceLoss:
    """Losses of preference pairs, from log-probs of whole answers.

    With h = log(pi / pi_ref)(chosen) - log(pi / pi_ref)(rejected) and e the label smoothing::

        sigmoid  -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)
        ipo      (h - 1 / (2 beta))^2
        hinge    max(0, 1 - beta h)

    "sigmoid" is DPO (arXiv 2305.18290, eq. 7; with smoothing, conservative DPO), on-policy the
    loss of SELF-JUDGE (arXiv 2402.11253).  "hinge" is SLiC's loss on DPO's margin (as in RSO,
    arXiv 2309.06657).  "ipo" is arXiv 2310.12036, eq. 17, with beta as its tau.  The equation has
    log-probs of sequences; its published results, and TRL after them, use means over the tokens of
    an answer, so that the target margin does not depend on length.  Pass sums for the former and
    means for the latter; the other two take sums.

    Args:
        chosen_logps: [P] policy's log-probs of the chosen answers.
        rejected_logps: [P] policy's log-probs of the rejected answers.
        ref_chosen_logps: [P] the same from the reference.
        ref_rejected_logps: [P] the same from the reference.
        beta: strength of the pull towards the reference, > 0.
        loss_type: which of the above.
        label_smoothing: share of pairs taken to be labelled the wrong way round, in [0, 0.5);
            "sigmoid" alone has it.

    Raises:
        ValueError: shapes that differ, an unknown loss_type, or a setting out of range.
    """
    for name, tensor in (
        ("rejected_logps", rejected_logps),
        ("ref_chosen_logps", ref_chosen_logps),
        ("ref_rejected_logps", ref_rejected_logps),
    ):
        if tensor.shape != chosen_logps.shape:
            raise ValueError(
                f"{name} is {list(tensor.shape)}: must be {list(chosen_logps.shape)}, "
                "as chosen_logps"
            )
    if not 0 < beta < math.inf:
        raise ValueError(f"beta = {beta!r}: must be a finite number > 0")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing = {label_smoothing!r}: must be in [0, 0.5)")
    if label_smoothing and loss_type != "sigmoid":
        raise ValueError(
            f"label_smoothing = {label_smoothing!r}: only loss_type 'sigmoid' has it, "
            f"not {loss_type!r}"
        )
    chosen = chosen_logps - ref_chosen_logps
    rejected = rejected_logps - ref_rejected_logps
    margin = chosen - rejected
    match loss_type:
        case "sigmoid":
            losses = -(1 - label_smoothing) * logsigmoid(beta * margin)
            losses = losses - label_smoothing * logsigmoid(-beta * margin)
        case "ipo":
            losses = (margin - 1 / (2 * beta)).square()
        case "hinge":
            losses = torch.relu(1 - beta * margin)
        case _:
            raise ValueError(f"loss_type = {loss_type!r}: must be one of sigmoid, ipo, hinge")
    return PreferenceLoss(losses, beta * chosen.detach(), beta * rejected.detach())


def _bounds(name: str, cu: torch.Tensor, values: torch.Tensor) -> list[int]:
    """cu as numbers, checked against the values [M] that it cuts."""
    if cu.ndim != 1 or cu.numel() == 0 or cu.is_floating_point():
        raise ValueError(f"{name} is {list(cu.shape)} in {cu.dtype}: must be integers [R + 1]")
    if values.ndim != 1:
        raise ValueError(f"values that {name} cuts are {list(values.shape)}: must be [M]")
    bounds = cu.tolist()
    if bounds[0] != 0 or bounds[-1] != values.numel():
        raise ValueError(
            f"{name} runs from {bounds[0]} to {bounds[-1]}: must run from 0 to "
            f"{values.numel()}, the number of values"
        )
    for r, (start, stop) in enumerate(pairwise(bounds)):
        if stop < start:
            raise ValueError(f"{name}[{r + 1}] = {stop}: must not be below {name}[{r}] = {start}")
    return bounds


def _lengths(name: str, cu: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    _bounds(name, cu, values)
    return cu.to(values.device).diff()


def _sum(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    # An index_add would sum in another order each time on a GPU.  unsafe skips a check of the
    # lengths, done already, that fails when there are none.
    return torch.segment_reduce(
        values, "sum", lengths=lengths.to(values.device), initial=0, unsafe=True
    )


def _per_record(
    values: torch.Tensor, lengths: torch.Tensor, normalization: Normalization
) -> torch.Tensor:
    """[R] means ("record") or sums ("token") of values [M]; 0 for a record without tokens."""
    sums = _sum(values, lengths)
    match normalization:
        case "record":
            return sums / lengths.clamp(min=1)
        case "token":
            return sums
        case _:
            raise ValueError(f"normalization = {normalization!r}: must be 'record' or 'token'")


def _weighted_sum(per_record: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    if weight is None:
        return per_record.sum()
    if weight.shape != per_record.shape:
        raise ValueError(f"weight is {list(weight.shape)}: must be {list(per_record.shape)}")
    return (weight.to(per_record) * per_record).sum()


def _check_cut_settings(
    lambda_: float, alpha: float, gamma: float, negative_weight: float, min_judged_prob: float
) -> None:
    if not 0 < lambda_ < math.inf:
        raise ValueError(f"lambda_ = {lambda_!r}: must be a finite number > 0")
    for name, value in (("alpha", alpha), ("gamma", gamma), ("negative_weight", negative_weight)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} = {value!r}: must be a finite number >= 0")
    if not 0 <= min_judged_prob < 1:
        raise ValueError(f"min_judged_prob = {min_judged_prob!r}: must be in [0, 1)")


def _check_judged(tokens: list[int], judged: list[int]) -> None:
    if len(tokens) != len(judged):
        raise ValueError(
            f"cu_judged has {len(judged)} entries: must have {len(tokens)}, as cu_tokens"
        )
    for r in range(len(tokens) - 1):
        n, m = tokens[r + 1] - tokens[r], judged[r + 1] - judged[r]
        if m not in (0, n):
            raise ValueError(f"record {r} has {m} judged tokens: must have 0 or its {n} tokens")
