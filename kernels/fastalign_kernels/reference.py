"""Pure torch implementation of the ops, for every device torch has.

The logits are worked through in tiles of rows x vocabulary, so that no more than TILE_BYTES of
them exist at a time, whatever N and V.
"""

from __future__ import annotations

from functools import cache

import torch

# Logits of one tile in the accumulation dtype.  On a CPU a tile and its 16-bit copy should stay
# in the last-level cache, where a pass over the tile costs a tenth of one through memory; a GPU
# wants products large enough to fill it.
TILE_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}
# A tile reads and writes [rows, D] accumulators: narrower ones would spend their time on that.
MIN_TILE_COLUMNS = 2048


def linear_logprob_forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    unit_grad: bool,
    entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Log-odds of the targets: 1 pass, or 2 with their gradient.

    Arguments are those of :func:`fastalign_kernels.linear_logprob`, already validated.  A tile's
    exponentials are relative to the running maximum of their row over the tokens other than the
    target, and what was summed before is scaled when that maximum rises.

    Returns:
        log_odds [N]: m = z_t - logsumexp_{j != t} z_j.
        log_rest [N]: logsumexp_{j != t} z_j, for the backward.
        unit_grad [N, D] or None: dm/dhidden = (cap'_t W_t - sum_{j != t} q_j cap'_j W_j) / T, with
            q the softmax over the tokens other than t.
        entropy [N] or None: over all tokens, in nats.

        All are in fp32, or fp64 for fp64 inputs, and 0 in ignored rows.
    """
    n, d = hidden.shape
    vocab = weight.shape[0]
    wide = _wide(hidden.dtype)
    log_odds, log_rest = (hidden.new_zeros(n, dtype=wide) for _ in range(2))
    out_unit = hidden.new_zeros(n, d, dtype=wide) if unit_grad else None
    out_entropy = hidden.new_zeros(n, dtype=wide) if entropy else None
    kept = (target != ignore_index).nonzero()[:, 0]
    rows, columns = _tile_shape(len(kept), vocab, log_odds)
    for block in kept.split(rows) if len(kept) else ():
        y = target[block]
        target_weight = weight[y].to(wide)
        h = hidden[block]
        raw = torch.einsum("nd,nd->n", h.to(wide), target_weight)
        target_logit, target_slope = _cap(
            (raw if bias is None else raw + bias[y])[:, None], softcap, temperature, unit_grad
        )
        h = _operand(h)
        # Finite, so that a tile of -inf (a bias that bans tokens) adds zeros instead of NaN.
        peak = torch.full_like(target_logit, torch.finfo(wide).min)
        total = torch.zeros_like(peak)
        mean = torch.zeros_like(peak)
        pull = hidden.new_zeros(len(block), d, dtype=wide) if unit_grad else None
        for start in range(0, vocab, columns):
            w = _operand(weight[start : start + columns])
            b = None if bias is None else bias[start : start + columns]
            z, slope = _cap(_logits(h, w, b, raw), softcap, temperature, unit_grad)
            _set_target(z, y - start, -torch.inf)
            new_peak = torch.maximum(peak, z.amax(dim=1, keepdim=True))
            shrink = torch.exp(peak - new_peak)
            p = z.sub_(new_peak).exp_()
            if entropy:
                # sum of p log p, relative to the new peak; entr(0) is 0 where 0 * -inf is NaN.
                mean.add_(total * (peak - new_peak)).mul_(shrink)
                mean.sub_(torch.special.entr(p).sum(dim=1, keepdim=True))
            total.mul_(shrink).add_(p.sum(dim=1, keepdim=True))
            if pull is not None:
                if slope is not None:
                    p.mul_(slope)
                _add_product(pull.mul_(shrink), p.to(w.dtype), w)
            peak = new_peak
        total.clamp_min_(torch.finfo(wide).tiny)
        rest = peak + total.log()
        odds = target_logit - rest
        log_odds[block], log_rest[block] = odds[:, 0], rest[:, 0]
        if out_unit is not None and pull is not None:
            if target_slope is not None:
                target_weight.mul_(target_slope)
            out_unit[block] = target_weight.sub_(pull.div_(total)).div_(temperature)
        if out_entropy is not None:
            # H = H(p, 1 - p) + (1 - p) H(q)
            p, other = torch.sigmoid(odds), torch.sigmoid(-odds)
            within = other * (total.log() - mean / total)
            out_entropy[block] = (torch.special.entr(p) + torch.special.entr(other) + within)[:, 0]
    return log_odds, log_rest, out_unit, out_entropy


def linear_logprob_backward(
    grad_log_odds: torch.Tensor,
    log_rest: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    wanted: tuple[bool, bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of hidden, weight and bias from the logits computed again: 1 pass, and 1 more for
    each of hidden and weight.

    dz_t = g_m and dz_j = -g_m exp(z_j - log_rest) for the others.  Tiles of one stretch of the
    vocabulary follow each other, so that its slice of the weight's gradient is summed in fp32 and
    written once, and no [V, D] accumulator exists.

    Args:
        grad_log_odds: [N] g_m, in the dtype of ``log_rest``; 0 in ignored rows.
        log_rest: [N] from the forward.
        wanted: whether hidden, weight and bias want a gradient.

    Returns:
        Gradients of hidden [N, D], weight [V, D] and bias [V] in their dtypes, None if unwanted.
    """
    n, d = hidden.shape
    vocab = weight.shape[0]
    want_hidden, want_weight, want_bias = wanted
    grad_weight = torch.empty_like(weight) if want_weight else None
    grad_bias = torch.empty_like(bias) if want_bias and bias is not None else None
    kept = (target != ignore_index).nonzero()[:, 0]
    rows, columns = _tile_shape(len(kept), vocab, log_rest)
    blocks = kept.split(rows) if len(kept) else ()
    h_blocks = [_operand(hidden[block]) for block in blocks]
    # Rounding of the logits grows with their distance from this: it need not be exact.
    near = log_rest * temperature
    if softcap is not None:
        near.clamp_(-softcap, softcap)
    scale = grad_log_odds[:, None] / temperature
    pulls = [log_rest.new_zeros(len(block), d) for block in blocks] if want_hidden else None
    for start in range(0, vocab, columns):
        stop = min(start + columns, vocab)
        w = _operand(weight[start:stop])
        b = None if bias is None else bias[start:stop]
        sum_weight = log_rest.new_zeros(stop - start, d) if want_weight else None
        sum_bias = log_rest.new_zeros(stop - start) if want_bias else None
        for i, (block, h) in enumerate(zip(blocks, h_blocks, strict=True)):
            z, slope = _cap(_logits(h, w, b, near[block]), softcap, temperature, True)
            dz = z.sub_(log_rest[block, None]).exp_().mul_(-scale[block])
            # Last, because exp overflows at a target far above the rest.
            _set_target(dz, target[block] - start, scale[block])
            if slope is not None:
                dz.mul_(slope)
            if sum_bias is not None:
                sum_bias += dz.sum(dim=0)
            dz = dz.to(w.dtype)
            if pulls is not None:
                _add_product(pulls[i], dz, w)
            if sum_weight is not None:
                _add_product(sum_weight, dz.t(), h)
        if grad_weight is not None:
            grad_weight[start:stop] = sum_weight
        if grad_bias is not None:
            grad_bias[start:stop] = sum_bias
    grad_hidden = None
    if pulls is not None:
        grad_hidden = hidden.new_zeros(n, d)
        for block, pull in zip(blocks, pulls, strict=True):
            grad_hidden[block] = pull.to(hidden.dtype)
    return grad_hidden, grad_weight, grad_bias


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Dtype in which sums are kept."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _tile_shape(n: int, vocab: int, like: torch.Tensor) -> tuple[int, int]:
    """Rows and columns of a tile with at most TILE_BYTES in the dtype and on the device of like."""
    budget = TILE_BYTES.get(like.device.type, TILE_BYTES["cuda"]) // like.element_size()
    columns = min(vocab, max(MIN_TILE_COLUMNS, budget // max(n, 1)))
    return max(1, budget // columns), columns


def _operand(x: torch.Tensor) -> torch.Tensor:
    """x as it enters a product: as it is, or in fp32 on a CPU without instructions for its dtype.

    There torch's own 16-bit products run at a few GFLOP/s.
    """
    return x if x.device.type != "cpu" or _multiplies(x.dtype) else x.float()


@cache
def _multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has fast products of the dtype."""
    if dtype in (torch.float32, torch.float64):
        return True
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.ops.mkldnn._is_mkldnn_fp16_supported()


def _logits(
    h: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, near: torch.Tensor
) -> torch.Tensor:
    """h w^T + bias [rows, columns] in fp32 (fp64).

    Where torch cannot give the fp32 sums of a 16-bit product, each row is shifted by ``near``
    [rows] inside the product, while it is still in fp32.  What is rounded to 16 bits is then the
    distance from ``near``, so that the logits which decide a softmax lose next to nothing: with
    logits around 60 in bf16 the largest error near the reference falls from 0.25 to 0.0005.
    """
    if h.dtype == _wide(h.dtype):
        z = torch.mm(h, w.t())
    elif h.is_cuda:
        z = torch.mm(h, w.t(), out_dtype=torch.float32)
    else:
        shift = near.clamp(-1e4, 1e4).to(h.dtype)[:, None]
        z = torch.addmm(shift, h, w.t(), beta=-1) + shift.float()
    return z if bias is None else z.add_(bias)


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a b, summed in fp32 (fp64)."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        total.add_(torch.mm(a, b, out_dtype=torch.float32))
    else:
        total.add_(torch.mm(a, b))


def _cap(
    raw: torch.Tensor, softcap: float | None, temperature: float, want_slope: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Logits from raw ones, in place, and dcap/draw = 1 - tanh^2 or None where it is 1."""
    if softcap is None:
        return (raw if temperature == 1.0 else raw.div_(temperature)), None
    bent = raw.div_(softcap).tanh_()
    slope = 1.0 - bent.square() if want_slope else None
    return bent.mul_(softcap / temperature), slope


def _set_target(z: torch.Tensor, column: torch.Tensor, value: torch.Tensor | float) -> None:
    """z[i, column[i]] = value[i] in the rows whose column lies in this tile."""
    inside = ((column >= 0) & (column < z.shape[1]))[:, None]
    column = column.clamp(0, z.shape[1] - 1)[:, None]
    value = torch.where(inside, value, z.gather(1, column))
    z.scatter_(1, column, value)
