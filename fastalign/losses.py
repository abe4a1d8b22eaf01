"""The losses, as functions of per-token log-probs.

Log-probs are flat: the tokens of all records after each other, with ``cu`` [R + 1] where record r
has tokens cu[r] to cu[r + 1], cu[0] = 0.  Every loss is a sum over records.  Divide it by the
count of the whole global batch, and it comes out the same however that batch was cut into micro
batches, packs and ranks.  A record without tokens adds 0.

``cu`` may live on the CPU while the log-probs are on a GPU, which saves waiting for the device.

The losses of CUT and of preference pairs are ops of :mod:`fastalign_kernels`, in Triton on a GPU
and in torch elsewhere.
"""

from __future__ import annotations

from typing import Literal

import torch

from fastalign_kernels import CutLoss, PreferenceLoss, segment_sum
from fastalign_kernels import contrastive_unlikelihood as cut_loss
from fastalign_kernels import pair_preference as dpo_loss

__all__ = [
    "CutLoss",
    "Normalization",
    "PreferenceLoss",
    "cut_loss",
    "cut_preset",
    "dpo_loss",
    "nll_loss",
    "segment_sum",
    "unlikelihood_loss",
]

Normalization = Literal["record", "token"]


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
    return _weighted_sum(_per_record(-logprob, cu_tokens, normalization), weight)


def unlikelihood_loss(
    log1m_prob: torch.Tensor,
    cu_tokens: torch.Tensor,
    weight: torch.Tensor | None = None,
    *,
    normalization: Normalization = "record",
) -> torch.Tensor:
    """Unlikelihood of every token: :func:`nll_loss` with -log(1 - p) [M] (arXiv 1908.04319; the
    baseline of CUT, arXiv 2312.14591)."""
    return _weighted_sum(_per_record(-log1m_prob, cu_tokens, normalization), weight)


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


def _per_record(
    values: torch.Tensor, cu_tokens: torch.Tensor, normalization: Normalization
) -> torch.Tensor:
    """[R] means ("record") or sums ("token") of values [M]; 0 for a record without tokens."""
    sums = segment_sum(values, cu_tokens)
    match normalization:
        case "record":
            return sums / cu_tokens.diff().clamp(min=1).to(sums)
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
