"""Pure torch implementation of the ops, for every device torch has.

The logits are worked through in tiles of rows x vocabulary, so that no more than TILE_BYTES of
them exist at a time, whatever N and V.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

# Logits of one tile in the accumulation dtype.  On a CPU a tile and its 16-bit copy should stay
# in the last-level cache, where a pass over the tile costs a tenth of one through memory; a GPU
# wants products large enough to fill it.
TILE_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}
# A tile reads and writes [rows, D] accumulators: narrower ones would spend their time on that.
MIN_TILE_COLUMNS = 2048
# On a CPU, where products of a few rows add up one number after another.
MAX_TILE_COLUMNS = 4096

# Of the Triton implementation; here, where a plan of memory finds them without triton.  Columns of
# the vocabulary that go through both products at a time: an fp32 accumulator of N x D is read and
# written once for each, which at 16384 costs 6 % of a pass.
CHUNK_COLUMNS = 16384
CHUNK_BYTES = 256 << 20
# A sum of exponentials beyond this, or below its inverse, is taken again relative to the true
# maximum, long before anything overflows.
LARGEST_SUM = 1e30
# Kept exponentials have rows of a multiple of this, as Triton's tensor descriptors need them.
EXPONENTIALS_STEP = 8
BACKWARD_COLUMNS = 16384


@dataclass(frozen=True)
class HeadForward:
    """What a head, or one rank's slice of it, has to say about rows.

    All in fp32, or fp64 for fp64 inputs.  q is the softmax over the tokens other than the target.

    Attributes:
        target_logit: [N] z_t; 0 where the target is not in this slice.
        target_slope: [N] cap'_t; likewise.
        log_rest: [N] logsumexp_{j != t} z_j.
        unit_grad: [N, D] or None: (cap'_t W_t - sum_{j != t} q_j cap'_j W_j) / T.
        rest_entropy: [N] or None: entropy of q in nats.
        kept: None, or exponentials for the backward.
    """

    target_logit: torch.Tensor
    target_slope: torch.Tensor
    log_rest: torch.Tensor
    unit_grad: torch.Tensor | None = None
    rest_entropy: torch.Tensor | None = None
    kept: Exponentials | None = None


@dataclass(frozen=True)
class Exponentials:
    """``values`` [N, V rounded up to EXPONENTIALS_STEP], in the inputs' dtype: exp(z - reference)
    cap' of the tokens other than the target, 0 at the target; ``reference`` [N]."""

    values: torch.Tensor
    reference: torch.Tensor


def linear_logprob_forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    softcap: float | None,
    temperature: float,
    unit_grad: bool,
    entropy: bool,
) -> HeadForward:
    """Logits of the targets against the rest: 1 pass, or 2 with the gradient of their difference.

    A tile's exponentials are relative to the running maximum of their row over the tokens other
    than the target, and what was summed before is scaled when that maximum rises.

    Args:
        hidden: [N, D].
        weight: [V, D].
        target: [N] ids from 0; one of V or more is not in this slice of the head.
        bias: [V] or None.
        softcap: of :func:`fastalign_kernels.linear_logprob`.
        temperature: likewise.
        unit_grad: whether the gradient is wanted.
        entropy: whether the entropy is wanted.
    """
    n, d = hidden.shape
    head = _Head(weight, bias, softcap, temperature)
    target_logit, target_slope, log_rest = hidden.new_empty(3, n, dtype=head.wide)
    out_unit = hidden.new_empty(n, d, dtype=head.wide) if unit_grad else None
    out_entropy = hidden.new_empty(n, dtype=head.wide) if entropy else None
    blocks, stretches = _tiles(n, head)
    for rows in blocks:
        block = head.block(hidden[rows], target[rows])
        # Finite, so that a tile of -inf (a bias that bans tokens) adds zeros instead of NaN.
        peak = torch.full_like(block.target_logit, torch.finfo(head.wide).min)
        total = torch.zeros_like(peak)
        surprise = torch.zeros_like(peak)
        pull = torch.zeros_like(block.target_weight) if unit_grad else None
        for start, stop in stretches:
            w, z, slope = head.tile(block, start, stop)
            _set_target(z, block.y - start, -torch.inf)
            new_peak = torch.maximum(peak, z.amax(dim=1, keepdim=True))
            shrink = torch.exp(peak - new_peak)
            p = z.sub_(new_peak).exp_()
            if entropy:
                # -sum p log p relative to the new peak; entr(0) is 0 where 0 * -inf is NaN.
                surprise.sub_(total * (peak - new_peak)).mul_(shrink)
                surprise.add_(torch.special.entr(p).sum(dim=1, keepdim=True))
            total.mul_(shrink).add_(p.sum(dim=1, keepdim=True))
            if pull is not None:
                if slope is not None:
                    p.mul_(slope)
                add_product(pull.mul_(shrink), p.to(w.dtype), w)
            peak = new_peak
        total.clamp_min_(torch.finfo(head.wide).tiny)
        target_logit[rows] = block.target_logit[:, 0]
        target_slope[rows] = block.target_slope[:, 0]
        log_rest[rows] = (peak + total.log())[:, 0]
        if out_unit is not None and pull is not None:
            unit = block.target_slope * block.target_weight - pull / total
            out_unit[rows] = unit.div_(temperature)
        if out_entropy is not None:
            out_entropy[rows] = (total.log() + surprise / total)[:, 0]
    return HeadForward(target_logit, target_slope, log_rest, out_unit, out_entropy)


def linear_logprob_exponentials(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    softcap: float | None,
    temperature: float,
    entropy: bool,
    out: torch.Tensor,
) -> HeadForward:
    """:func:`linear_logprob_forward` that keeps the exponentials for the backward: 1 pass.

    They are relative to one number for each row, the largest of its first logits.  Rows that lie
    too far from it are worked through again relative to their true maximum.

    Args:
        out: [N, padded_vocab(V)] in hidden's dtype: where to keep them.
    """
    n, vocab = len(hidden), len(weight)
    head = _Head(weight, bias, softcap, temperature)
    target_logit, target_slope, log_rest, reference = hidden.new_empty(4, n, dtype=head.wide)
    out_entropy = hidden.new_empty(n, dtype=head.wide) if entropy else None
    blocks, stretches = _tiles(n, head)
    far = []
    for rows in blocks:
        block = head.block(hidden[rows], target[rows])
        base = head.peak(block, [(0, min(MIN_TILE_COLUMNS, vocab))])
        total, surprise = head.keep(block, base, stretches, out[rows], entropy)
        lost = ~((total < LARGEST_SUM) & (total > 1 / LARGEST_SUM))[:, 0]
        if lost.any():
            far.append(rows.start + lost.nonzero()[:, 0])
        target_logit[rows] = block.target_logit[:, 0]
        target_slope[rows] = block.target_slope[:, 0]
        reference[rows] = base[:, 0]
        total.clamp_min_(torch.finfo(head.wide).tiny)
        log_rest[rows] = (base + total.log())[:, 0]
        if out_entropy is not None:
            out_entropy[rows] = (total.log() + surprise / total)[:, 0]
    for index in far:
        block = head.block(hidden[index], target[index])
        base = head.peak(block, stretches)
        some = out.new_empty(len(index), vocab)
        total, surprise = head.keep(block, base, stretches, some, entropy)
        out[index, :vocab], reference[index] = some, base[:, 0]
        total.clamp_min_(torch.finfo(head.wide).tiny)
        log_rest[index] = (base + total.log())[:, 0]
        if out_entropy is not None:
            out_entropy[index] = (total.log() + surprise / total)[:, 0]
    return HeadForward(
        target_logit,
        target_slope,
        log_rest,
        rest_entropy=out_entropy,
        kept=Exponentials(out, reference),
    )


def padded_vocab(vocab: int) -> int:
    """Columns of kept exponentials: rows start at multiples of 16 bytes."""
    return -(-vocab // EXPONENTIALS_STEP) * EXPONENTIALS_STEP


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
    wanted: tuple[bool, bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of hidden, weight and bias from the logits computed again: 1 pass, and 1 more for
    each of hidden and weight.

    dz_t = g_m and dz_j = -g_m exp(z_j - log_rest) for the others.  All rows go through one stretch
    of the vocabulary before the next, so that its slice of the weight's gradient is summed in fp32
    and written once, and no [V, D] accumulator exists.

    Args:
        grad_log_odds: [N] g_m, in the dtype of ``log_rest``.
        log_rest: [N] from the forward; over all slices when the head is sliced.
        wanted: whether hidden, weight and bias want a gradient.

    Returns:
        Gradients of hidden [N, D] in the dtype of ``log_rest``, and of weight [V, D] and bias [V]
        in theirs; None if unwanted.
    """
    want_hidden, want_weight, want_bias = wanted
    head = _Head(weight, bias, softcap, temperature)
    grad_weight = torch.zeros_like(weight) if want_weight else None
    grad_bias = torch.zeros_like(bias) if want_bias and bias is not None else None
    blocks, stretches = _tiles(len(hidden), head)
    work = []
    for rows in blocks:
        block = head.block(hidden[rows], target[rows])
        scale = grad_log_odds[rows, None] / temperature
        target_scale = scale * block.target_slope
        # The target's term is added apart: it would swamp a product that is rounded.
        pull = target_scale * block.target_weight if want_hidden else None
        work.append((block, log_rest[rows, None], scale, target_scale, pull))
    for start, stop in stretches:
        sum_weight = log_rest.new_zeros(stop - start, weight.shape[1]) if want_weight else None
        sum_bias = log_rest.new_zeros(stop - start) if want_bias else None
        for block, rest, scale, target_scale, pull in work:
            w, z, slope = head.tile(block, start, stop)
            dz = z.sub_(rest).exp_().mul_(-scale)
            if slope is not None:
                dz.mul_(slope)
            # Not before: exp overflows at a target far above the rest.
            _set_target(dz, block.y - start, target_scale)
            if sum_bias is not None:
                sum_bias += dz.sum(dim=0)
            dz = dz.to(w.dtype)
            if sum_weight is not None:
                add_product(sum_weight, dz.t(), block.h)
            if pull is not None:
                add_product(pull, _set_target(dz, block.y - start, 0.0), w)
        if grad_weight is not None and sum_weight is not None:
            grad_weight[start:stop] = sum_weight
        if grad_bias is not None and sum_bias is not None:
            grad_bias[start:stop] = sum_bias
    pulls = [pull for *_, pull in work if pull is not None]
    grad_hidden = log_rest.new_zeros(hidden.shape) if want_hidden else None
    if grad_hidden is not None and pulls:
        torch.cat(pulls, out=grad_hidden)
    return grad_hidden, grad_weight, grad_bias


@dataclass(frozen=True)
class _Block:
    """Rows that are worked through together; all but h and y in fp32 (fp64)."""

    h: torch.Tensor  # [rows, D] as it enters products
    y: torch.Tensor  # [rows] targets
    near: torch.Tensor  # [rows, 1] raw logits around which products may be rounded
    target_weight: torch.Tensor  # [rows, D] W_t
    target_logit: torch.Tensor  # [rows, 1] z_t
    target_slope: torch.Tensor  # [rows, 1] cap'_t, 0 where the target is not in this slice


@dataclass(frozen=True)
class _Head:
    """z = cap(h W^T + b) / T."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    softcap: float | None
    temperature: float

    @property
    def wide(self) -> torch.dtype:
        """Dtype of logits and sums."""
        return torch.float64 if self.weight.dtype == torch.float64 else torch.float32

    def block(self, hidden: torch.Tensor, y: torch.Tensor) -> _Block:
        """What concerns the targets y [rows], in full precision whatever the products have."""
        here = (y < len(self.weight))[:, None]
        index = y.clamp_max(len(self.weight) - 1)
        target_weight = self.weight[index].to(self.wide).masked_fill_(~here, 0.0)
        # One number a row, on which every digit of a confident row's 1 - p depends.
        exact = self.wide if hidden.device.type == "mps" else torch.float64
        raw = torch.linalg.vecdot(hidden.to(exact), target_weight.to(exact))
        raw = raw.to(self.wide)[:, None]
        biased = raw.clone() if self.bias is None else raw + self.bias[index, None] * here
        logit, slope = self._cap(biased)
        h = operand(hidden)
        return _Block(
            h=h,
            y=y,
            near=self._near(h, y, raw) if _rounds(h) else raw,
            target_weight=target_weight,
            target_logit=logit,
            target_slope=here.to(self.wide) if slope is None else slope * here,
        )

    def tile(
        self, block: _Block, start: int, stop: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Weights [columns, D] as they enter products, logits [rows, columns] and their slope."""
        w = operand(self.weight[start:stop])
        raw = _product_around(block.near, block.h, w)
        if self.bias is not None:
            raw += self.bias[start:stop]
        return w, *self._cap(raw)

    def peak(self, block: _Block, stretches: list[tuple[int, int]]) -> torch.Tensor:
        """Largest logit [rows, 1] of the tokens other than the target, or the least number that is
        finite where a bias bans them all."""
        peak = torch.full_like(block.target_logit, torch.finfo(self.wide).min)
        for start, stop in stretches:
            _, z, _ = self.tile(block, start, stop)
            _set_target(z, block.y - start, -torch.inf)
            peak = torch.maximum(peak, z.amax(dim=1, keepdim=True))
        return peak

    def keep(
        self,
        block: _Block,
        reference: torch.Tensor,
        stretches: list[tuple[int, int]],
        out: torch.Tensor,
        entropy: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """exp(z - reference) cap' into ``out``; their sums [rows, 1], and of their surprise."""
        total, surprise = torch.zeros_like(reference), torch.zeros_like(reference)
        for start, stop in stretches:
            _, z, slope = self.tile(block, start, stop)
            _set_target(z, block.y - start, -torch.inf)
            z.sub_(reference)
            p = z.exp() if entropy else z.exp_()
            total += p.sum(dim=1, keepdim=True)
            if entropy:
                surprise -= torch.where(p > 0, p * z, 0.0).sum(dim=1, keepdim=True)
            out[:, start:stop] = p if slope is None else p.mul_(slope)
        return total, surprise

    def _cap(self, raw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits in place of raw ones, and cap' = 1 - tanh^2 or None where it is 1."""
        if self.softcap is None:
            return (raw if self.temperature == 1.0 else raw.div_(self.temperature)), None
        bent = raw.div_(self.softcap).tanh_()
        slope = 1.0 - bent.square()
        return bent.mul_(self.softcap / self.temperature), slope

    def _near(self, h: torch.Tensor, y: torch.Tensor, raw: torch.Tensor) -> torch.Tensor:
        """Raw logits [rows, 1] about as large as those that weigh most beside the target.

        The target's own, ``raw``, can be far off, 0 further.  The largest among the first few
        tokens serves: in bf16, on text that SmolLM2-135M reads, log-probs then have a quarter of
        the error they have around the target's logit, and a fiftieth of naive torch's.
        """
        few = _product_around(raw, h, self.weight[:MIN_TILE_COLUMNS])
        return _set_target(few, y, -torch.inf).amax(dim=1, keepdim=True)


def _tiles(n: int, head: _Head) -> tuple[list[slice], list[tuple[int, int]]]:
    """The rows in blocks, and the vocabulary in stretches (start, stop).

    One block times one stretch has no more than TILE_BYTES of logits; a few such tiles exist at a
    time, copies in 16 bits and slopes included.
    """
    vocab = head.weight.shape[0]
    budget = TILE_BYTES.get(head.weight.device.type, TILE_BYTES["cuda"]) // head.wide.itemsize
    columns = max(MIN_TILE_COLUMNS, budget // max(n, 1))
    if head.weight.device.type == "cpu":
        columns = min(columns, max(MIN_TILE_COLUMNS, MAX_TILE_COLUMNS))
    columns = min(columns, vocab)
    height = max(1, budget // columns)
    blocks = [slice(a, min(a + height, n)) for a in range(0, n, height)]
    return blocks, [(a, min(a + columns, vocab)) for a in range(0, vocab, columns)]


def operand(x: torch.Tensor) -> torch.Tensor:
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


def _rounds(x: torch.Tensor) -> bool:
    """Whether torch gives products of this operand only in its 16 bits, not in fp32."""
    return x.dtype in (torch.bfloat16, torch.float16) and not x.is_cuda


def _product_around(near: torch.Tensor, h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """h w^T [rows, columns] in fp32 (fp64).

    Where torch rounds the product to 16 bits, each row is shifted by ``near`` [rows, 1] inside it,
    while it is still in fp32.  What is rounded is then the distance from ``near``: with the
    row's largest logits there, those which decide a softmax lose next to nothing (at logits around
    90 in bf16 the largest error falls from 0.25 to 0.0005).
    """
    if _rounds(h):
        shift = near.clamp(-1e4, 1e4).to(h.dtype)
        return torch.addmm(shift, h, w.t(), beta=-1) + shift.float()
    return _product(h, w.t())


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a b, summed in fp32 (fp64); on a GPU without a second accumulator."""
    if a.dtype == total.dtype:
        # Products of a few rows add one number after another: better not to what is there already.
        if len(a) < 16:
            total += torch.mm(a, b)
        else:
            total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, total.dtype, out=total)
    else:
        total += torch.mm(a, b)


def write_product(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """out = a b."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(torch.mm(a, b))


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a b, in fp32 where torch gives that for 16-bit operands."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b)


def _set_target(z: torch.Tensor, column: torch.Tensor, value: torch.Tensor | float) -> torch.Tensor:
    """z[i, column[i]] = value[i], in place, in the rows whose column lies in this tile."""
    inside = ((column >= 0) & (column < z.shape[1]))[:, None]
    column = column.clamp(0, z.shape[1] - 1)[:, None]
    return z.scatter_(1, column, torch.where(inside, value, z.gather(1, column)))
