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
        y, h = target[block], hidden[block]
        target_weight, raw, target_logit, target_slope = _targets(
            h, weight, bias, y, softcap, temperature
        )
        h = _operand(h)
        near = raw
        if _rounds(h):
            # The target is often far from the tokens that make up the rest: look at a few first.
            w = _operand(weight[:MIN_TILE_COLUMNS])
            few = _set_target(_logits(h, w, None, raw), y, -torch.inf)
            near = few.amax(dim=1)
        # Finite, so that a tile of -inf (a bias that bans tokens) adds zeros instead of NaN.
        peak = torch.full_like(target_logit, torch.finfo(wide).min)
        total = torch.zeros_like(peak)
        mean = torch.zeros_like(peak)
        pull = hidden.new_zeros(len(block), d, dtype=wide) if unit_grad else None
        for start in range(0, vocab, columns):
            w = _operand(weight[start : start + columns])
            b = None if bias is None else bias[start : start + columns]
            z, slope = _cap(_logits(h, w, b, near), softcap, temperature, unit_grad)
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
            near = _uncap(peak[:, 0], softcap, temperature)
        total.clamp_min_(torch.finfo(wide).tiny)
        rest = peak + total.log()
        odds = target_logit - rest
        log_odds[block], log_rest[block] = odds[:, 0], rest[:, 0]
        if out_unit is not None and pull is not None:
            unit = target_slope * target_weight - pull.div_(total)
            out_unit[block] = unit.div_(temperature)
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
    h_blocks = [hidden[block] for block in blocks]
    scale = grad_log_odds[:, None] / temperature
    target_scale = torch.zeros_like(scale)
    pulls = []
    for block, h in zip(blocks, h_blocks, strict=True):
        target_weight, _, _, slope = _targets(h, weight, bias, target[block], softcap, temperature)
        target_scale[block] = scale[block] * slope
        # The target's own term would swamp the product that it is part of, when that is rounded.
        pulls.append(target_scale[block] * target_weight if want_hidden else None)
    h_blocks = [_operand(h) for h in h_blocks]
    near = _uncap(log_rest, softcap, temperature)
    for start in range(0, vocab, columns):
        stop = min(start + columns, vocab)
        w = _operand(weight[start:stop])
        b = None if bias is None else bias[start:stop]
        sum_weight = log_rest.new_zeros(stop - start, d) if want_weight else None
        sum_bias = log_rest.new_zeros(stop - start) if want_bias else None
        for block, h, pull in zip(blocks, h_blocks, pulls, strict=True):
            z, slope = _cap(_logits(h, w, b, near[block]), softcap, temperature, True)
            y = target[block] - start
            dz = z.sub_(log_rest[block, None]).exp_().mul_(-scale[block])
            if slope is not None:
                dz.mul_(slope)
            # Last, because exp overflows at a target far above the rest.
            _set_target(dz, y, target_scale[block])
            if sum_bias is not None:
                sum_bias += dz.sum(dim=0)
            dz = dz.to(w.dtype)
            if sum_weight is not None:
                _add_product(sum_weight, dz.t(), h)
            if pull is not None:
                _add_product(pull, _set_target(dz, y, 0.0), w)
        if grad_weight is not None:
            grad_weight[start:stop] = sum_weight
        if grad_bias is not None:
            grad_bias[start:stop] = sum_bias
    grad_hidden = hidden.new_zeros(n, d) if want_hidden else None
    if grad_hidden is not None:
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


def _targets(
    h: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    softcap: float | None,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | float]:
    """Of the targets y [rows], in fp32 (fp64) whatever the products can do.

    Returns their weights [rows, D], raw logits without bias [rows], logits [rows, 1] and dcap/draw
    [rows, 1].
    """
    target_weight = weight[y].to(_wide(weight.dtype))
    raw = torch.einsum("nd,nd->n", h.to(target_weight.dtype), target_weight)
    biased = raw[:, None] if bias is None else (raw + bias[y])[:, None]
    logit, slope = _cap(biased.clone(), softcap, temperature, True)
    return target_weight, raw, logit, 1.0 if slope is None else slope


def _logits(
    h: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, near: torch.Tensor
) -> torch.Tensor:
    """h w^T + bias [rows, columns] in fp32 (fp64).

    Where torch cannot give the fp32 sums of a 16-bit product, each row is shifted by ``near``
    [rows] inside the product, while it is still in fp32.  What is rounded to 16 bits is then the
    distance from ``near``: with the row's largest logits there, those which decide a softmax lose
    next to nothing (at logits around 60 in bf16 the largest error falls from 0.25 to 0.0005).
    """
    if _rounds(h):
        shift = near.clamp(-1e4, 1e4).to(h.dtype)[:, None]
        z = torch.addmm(shift, h, w.t(), beta=-1) + shift.float()
    elif h.dtype == _wide(h.dtype):
        z = torch.mm(h, w.t())
    else:
        z = torch.mm(h, w.t(), out_dtype=torch.float32)
    return z if bias is None else z.add_(bias)


def _rounds(h: torch.Tensor) -> bool:
    """Whether products of these operands can only be had rounded to their 16 bits."""
    return h.dtype != _wide(h.dtype) and not h.is_cuda


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a b, summed in fp32 (fp64)."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif _rounds(a):
        total.add_(torch.mm(a, b))
    else:
        total.add_(torch.mm(a, b, out_dtype=torch.float32))


def _cap(
    raw: torch.Tensor, softcap: float | None, temperature: float, want_slope: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Logits from raw ones, in place, and dcap/draw = 1 - tanh^2 or None where it is 1."""
    if softcap is None:
        return (raw if temperature == 1.0 else raw.div_(temperature)), None
    bent = raw.div_(softcap).tanh_()
    slope = 1.0 - bent.square() if want_slope else None
    return bent.mul_(softcap / temperature), slope


def _uncap(logit: torch.Tensor, softcap: float | None, temperature: float) -> torch.Tensor:
    """Raw logits that give about these, wherever those lie."""
    raw = logit * temperature
    return raw if softcap is None else softcap * torch.atanh((raw / softcap).clamp(-0.99, 0.99))


def _set_target(z: torch.Tensor, column: torch.Tensor, value: torch.Tensor | float) -> torch.Tensor:
    """z[i, column[i]] = value[i], in place, in the rows whose column lies in this tile."""
    inside = ((column >= 0) & (column < z.shape[1]))[:, None]
    column = column.clamp(0, z.shape[1] - 1)[:, None]
    return z.scatter_(1, column, torch.where(inside, value, z.gather(1, column)))
