"""Triton implementation of logits_logprob, with the signatures of :mod:`.reference_logits`.

One program works through one row, in blocks of DEPTH x LANES tokens.  Each lane sums its tokens
relative to a maximum of its own: a lane lies within one thread, so that nothing in the loop waits
for other threads, and the exponential that scales what was summed before is paid once for DEPTH
tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

DEPTH = 4
# 256 threads, each with the 8 neighbouring lanes that one load of 16 bytes fills in 16 bits.  With
# fewer lanes the compiler would share them out among threads.
LANES = 2048
NUM_WARPS = 8 if torch.version.hip is None else 4

# The lowest number of fp32.  Unlike -inf it can be subtracted from -inf without giving NaN.
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit
def _capped(raw, softcap, temperature, HAS_CAP: tl.constexpr):
    """cap(raw) / temperature, and cap' = 1 - tanh^2."""
    if HAS_CAP:
        # tanh(x) by the exponential of -2|x|, which cannot overflow.
        x = raw / softcap
        e = tl.exp(-2.0 * tl.abs(x))
        t = (1.0 - e) / (1.0 + e)
        z = tl.where(x < 0, -t, t) * (softcap / temperature)
        slope = 4.0 * e / ((1.0 + e) * (1.0 + e))
    else:
        z = raw / temperature
        slope = 1.0
    return z, slope


@triton.jit
def log_odds_kernel(logits, target, row_stride, vocab, softcap, temperature, ignore_index,
                    odds, rests, entropies, HAS_CAP: tl.constexpr, ENTROPY: tl.constexpr,
                    DEPTH: tl.constexpr, LANES: tl.constexpr):  # fmt: skip
    """Log-odds, log_rest and entropy of one row; 0 in ignored rows, NaN for a target that is no
    token."""
    row = tl.program_id(0)
    x = logits + row.to(tl.int64) * row_stride
    y = tl.load(target + row)
    kept = y != ignore_index
    peak = tl.full((LANES,), LOWEST, tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    surprise = tl.zeros((LANES,), tl.float32)
    tokens = tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    for start in range(0, tl.where(kept, vocab, 0), DEPTH * LANES):
        j = start + tokens
        raw = tl.load(x + j, mask=j < vocab, other=-float("inf")).to(tl.float32)
        z, _ = _capped(raw, softcap, temperature, HAS_CAP)
        # Again: a cap makes -inf finite.
        z = tl.where((j < vocab) & (j != y), z, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(z, axis=0))
        shrink = tl.exp(peak - new_peak)
        p = tl.exp(z - new_peak[None, :])
        if ENTROPY:
            # -sum p log p relative to the new peak.
            surprise = (surprise + total * (new_peak - peak)) * shrink
            surprise += tl.sum(p * (new_peak[None, :] - tl.maximum(z, LOWEST)), axis=0)
        total = total * shrink + tl.sum(p, axis=0)
        peak = new_peak

    top = tl.max(peak, axis=0)
    shrink = tl.exp(peak - top)
    whole = tl.maximum(tl.sum(total * shrink, axis=0), TINY)
    log_whole = tl.log(whole)
    at = tl.load(x + y, mask=(y >= 0) & (y < vocab), other=float("nan")).to(tl.float32)
    z_target, _ = _capped(at, softcap, temperature, HAS_CAP)
    # Not z_t - log_rest, which has been rounded.
    m = z_target - top - log_whole
    tl.store(odds + row, tl.where(kept, m, 0.0))
    tl.store(rests + row, tl.where(kept, top + log_whole, 0.0))
    if ENTROPY:
        surprise = tl.sum((surprise + total * (top - peak)) * shrink, axis=0) / whole
        # H = H(p, 1 - p) + (1 - p) H(q); H(p, 1 - p) in terms of |m|, infinite for a banned target.
        other = 1.0 / (1.0 + tl.exp(m))
        away = tl.minimum(tl.abs(m), 1e4)
        e = tl.exp(-away)
        found = tl.log(1.0 + e) + away * e / (1.0 + e) + other * (log_whole + surprise)
        tl.store(entropies + row, tl.where(kept, found, 0.0))


@triton.jit
def log_odds_backward_kernel(grads, rests, logits, target, out, row_stride, out_stride, vocab,
                             softcap, temperature, ignore_index, HAS_CAP: tl.constexpr,
                             DEPTH: tl.constexpr, LANES: tl.constexpr):  # fmt: skip
    """Gradient of one row of logits; ignored rows are zeroed without being read.

    ``out`` may be ``logits``: what a thread writes it has read before.
    """
    row = tl.program_id(0)
    x = logits + row.to(tl.int64) * row_stride
    dx = out + row.to(tl.int64) * out_stride
    y = tl.load(target + row)
    kept = y != ignore_index
    count = tl.where(kept, vocab, 0)
    rest = tl.load(rests + row)
    # Not a product with 0: the gradient of an ignored row may be NaN.
    grad = tl.where(kept, tl.load(grads + row), 0.0) / temperature
    tokens = tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    for start in range(0, vocab, DEPTH * LANES):
        j = start + tokens
        raw = tl.load(x + j, mask=j < count, other=-float("inf")).to(tl.float32)
        z, slope = _capped(raw, softcap, temperature, HAS_CAP)
        # The target's own exponential may overflow.
        dz = tl.where(j == y, grad, -grad * tl.exp(z - rest)) * slope
        tl.store(dx + j, dz.to(out.dtype.element_ty), mask=j < vocab)


def log_odds(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See :func:`fastalign_kernels.reference_logits.log_odds`; rows that are not contiguous are
    copied."""
    n, vocab = logits.shape
    odds, rests = (logits.new_empty(n, dtype=torch.float32) for _ in range(2))
    entropies = logits.new_empty(n if entropy else 0, dtype=torch.float32)
    if n:
        logits = _with_contiguous_rows(logits)
        with torch.cuda.device_of(logits):
            log_odds_kernel[(n,)](
                logits,
                target.contiguous(),
                logits.stride(0),
                vocab,
                softcap or 0.0,
                temperature,
                ignore_index,
                odds,
                rests,
                entropies,
                HAS_CAP=softcap is not None,
                ENTROPY=entropy,
                DEPTH=DEPTH,
                LANES=LANES,
                num_warps=NUM_WARPS,
                enable_fp_fusion=True,
            )
    return odds, rests, entropies


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
    """See :func:`fastalign_kernels.reference_logits.log_odds_backward`; the rows of ``out`` are
    contiguous."""
    n, vocab = logits.shape
    if not n:
        return
    logits = _with_contiguous_rows(logits)
    with torch.cuda.device_of(logits):
        log_odds_backward_kernel[(n,)](
            grad_log_odds.contiguous(),
            log_rest,
            logits,
            target.contiguous(),
            out,
            logits.stride(0),
            out.stride(0),
            vocab,
            softcap or 0.0,
            temperature,
            ignore_index,
            HAS_CAP=softcap is not None,
            DEPTH=DEPTH,
            LANES=LANES,
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )


def _with_contiguous_rows(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()
