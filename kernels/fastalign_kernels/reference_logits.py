"""Pure torch implementation of :func:`fastalign_kernels.logits_logprob`, for every device.

The logits are worked through a few rows at a time, so that no more than CHUNK_BYTES of them (or one
row) exist in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

# On a CPU the six passes over a chunk should find it in a core's own cache; a GPU wants launches
# that are worth their while.
CHUNK_BYTES = {"cpu": 1 << 20, "cuda": 256 << 20}


def log_odds(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-odds of the targets of logits [N, V], whatever their strides.

    Arguments are those of :func:`fastalign_kernels.logits_logprob`, already validated.

    Returns:
        log_odds [N]: m = z_t - logsumexp_{j != t} z_j.
        log_rest [N]: logsumexp_{j != t} z_j, for the backward.
        entropy [N]: over all tokens, in nats; [0] unless wanted.

        All are in fp32, or fp64 for fp64 logits, and 0 in ignored rows.
    """
    n, vocab = logits.shape
    wide = _wide(logits)
    out_odds, out_rest = (logits.new_zeros(n, dtype=wide) for _ in range(2))
    out_entropy = logits.new_zeros(n if entropy else 0, dtype=wide)
    for rows in _chunks(target, vocab, ignore_index, wide):
        z, _ = _capped(logits[rows], softcap, temperature)
        y = target[rows, None]
        target_logit = z.gather(1, y)
        z.scatter_(1, y, -torch.inf)
        # Finite, so that a row whose other tokens are all banned adds zeros instead of NaN.
        peak = z.amax(dim=1, keepdim=True).clamp_min_(torch.finfo(wide).min)
        p = _exp(z.sub_(peak))
        total = p.sum(dim=1, keepdim=True).clamp_min_(torch.finfo(wide).tiny)
        log_total = total.log()
        # Not z_t - log_rest, which has been rounded.
        odds = target_logit - peak - log_total
        out_odds[rows], out_rest[rows] = odds[:, 0], (peak + log_total)[:, 0]
        if entropy:
            # H = H(p, 1 - p) + (1 - p) H(q), where entr(0) is 0 as 0 * -inf is not.
            p_target, other = torch.sigmoid(odds), torch.sigmoid(-odds)
            surprise = torch.special.entr(p).sum(dim=1, keepdim=True)
            found = torch.special.entr(p_target) + torch.special.entr(other)
            out_entropy[rows] = (found + other * (log_total + surprise / total))[:, 0]
    return out_odds, out_rest, out_entropy


def log_odds_backward(
    grad_log_odds: torch.Tensor,
    log_rest: torch.Tensor,
    logits: torch.Tensor,
    target: torch.Tensor,
    out: torch.Tensor,
    *,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
) -> None:
    """Write the gradient of the logits into ``out`` [N, V], which may be the logits themselves.

    dz_t = g_m and dz_j = -g_m exp(z_j - log_rest) for the others, 0 in ignored rows.

    Args:
        grad_log_odds: [N] g_m, in the dtype of ``log_rest``.
        log_rest: [N] from the forward.
    """
    for rows in _chunks(target, logits.shape[1], ignore_index, _wide(logits)):
        z, slope = _capped(logits[rows], softcap, temperature)
        grad = grad_log_odds[rows, None] / temperature
        dz = _exp(z.sub_(log_rest[rows, None])).mul_(-grad)
        # Not before: exp overflows at a target far above the rest.
        dz.scatter_(1, target[rows, None], grad)
        out[rows] = (dz if slope is None else dz.mul_(slope)).to(out.dtype)
    out[target == ignore_index] = 0.0


def _wide(logits: torch.Tensor) -> torch.dtype:
    """Dtype of sums and results."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _chunks(
    target: torch.Tensor, vocab: int, ignore_index: int, wide: torch.dtype
) -> Iterator[torch.Tensor | slice]:
    """The rows that count, as many at a time as CHUNK_BYTES hold; a slice where none lies between
    them that does not count, which is much cheaper to read and write than indices are."""
    kept = (target != ignore_index).nonzero()[:, 0]
    if not len(kept):
        return
    budget = CHUNK_BYTES.get(kept.device.type, CHUNK_BYTES["cuda"])
    for rows in kept.split(max(1, budget // (vocab * wide.itemsize))):
        first, end = int(rows[0]), int(rows[-1]) + 1
        yield slice(first, end) if end - first == len(rows) else rows


def _capped(
    rows: torch.Tensor, softcap: float | None, temperature: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """z of a copy of some rows, worked on in place, and cap' = 1 - tanh^2 or None where it is 1."""
    raw = rows.to(_wide(rows), copy=True)
    if softcap is None:
        return (raw if temperature == 1.0 else raw.div_(temperature)), None
    bent = raw.div_(softcap).tanh_()
    slope = 1.0 - bent.square()
    return bent.mul_(softcap / temperature), slope


def _exp(x: torch.Tensor) -> torch.Tensor:
    """exp in place, through exp2: torch's loop for that is four times as fast on a CPU."""
    return x.mul_(math.log2(math.e)).exp2_()
