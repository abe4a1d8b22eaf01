"""Triton implementation of the head's ops, with the signatures of :mod:`.reference`.

A Triton product makes one stretch of logits in fp32 and never writes them: its epilogue reduces
them, or writes their exponentials in the inputs' dtype for the second product, which cuBLAS (or
hipBLAS) does with fp32 accumulation.

Exponentials are relative to a number for each row that is fixed before they are written: the
largest logit among the first REFERENCE_COLUMNS other tokens.  bf16 and fp32 hold exp(88), so that
no chunk has to be scaled again; rows whose largest logit lies further above are worked through a
second time relative to their true maximum.  fp16 does not, and takes a pass for that maximum first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from fastalign_kernels.reference import (
    CHUNK_BYTES,
    CHUNK_COLUMNS,
    LARGEST_SUM,
    Exponentials,
    HeadForward,
    add_product,
)

REFERENCE_COLUMNS = 1024


@dataclass(frozen=True)
class Tiling:
    """Shape of a program's tile of logits and how the compiler lays it out.

    ``tma``: operands come by tensor descriptors, which need sm_90's copy engine to be loaded ahead.
    """

    rows: int
    columns: int
    depth: int
    group: int
    num_warps: int
    num_stages: int
    tma: bool


HALF = (torch.bfloat16, torch.float16)
# By what a card has: shared memory of 227 KiB with tensor memory access (sm_90, sm_100), 99 KiB
# with it (sm_120), and neither (sm_80, sm_86, sm_89, and 64 KiB on AMD's).
TILINGS = {
    "sm_90": Tiling(128, 256, 64, 8, 8, 3, tma=True),
    # A cap, a bias or an entropy in the epilogue would spill registers at 256 columns.
    "sm_90 extras": Tiling(128, 128, 64, 8, 8, 3, tma=True),
    "sm_100": Tiling(128, 256, 64, 8, 8, 3, tma=True),
    "sm_100 extras": Tiling(128, 64, 64, 8, 8, 3, tma=True),  # at 128 columns triton 3.6 spills
    "sm_120": Tiling(128, 128, 64, 8, 8, 3, tma=True),
    "sm_80": Tiling(128, 128, 32, 8, 8, 4, tma=False),
    "gfx942": Tiling(128, 128, 32, 8, 8, 2, tma=False),
    "fp32": Tiling(64, 64, 32, 8, 4, 3, tma=False),
}


def tiling_for(dtype: torch.dtype, family: str, extras: bool) -> Tiling:
    """``family``: a key of TILINGS for 16-bit operands; ``extras``: a cap, a bias or an entropy."""
    if dtype not in HALF:
        return TILINGS["fp32"]
    return TILINGS.get(f"{family} extras" if extras else family, TILINGS[family])


@cache
def family_of(device: torch.device) -> str:
    """Which tilings a device takes."""
    if device.type != "cuda":
        return "sm_90"  # the interpreter, which has no limits
    if torch.version.hip is not None:
        return "gfx942"
    major = torch.cuda.get_device_capability(device)[0]
    return {9: "sm_90", 10: "sm_100", 12: "sm_120"}.get(major, "sm_80")


@triton.jit
def _tile_of(pid, row_tiles, column_tiles, GROUP: tl.constexpr):
    """Programs that run together share rows and columns: GROUP rows of tiles at a time."""
    per_group = GROUP * column_tiles
    first = (pid // per_group) * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    return first + (pid % per_group) % height, (pid % per_group) // height


@triton.jit
def _load(x, stride, row, rows, column, columns, TMA: tl.constexpr, BR: tl.constexpr,
          BC: tl.constexpr):  # fmt: skip
    """Block [BR, BC] of the matrix x [rows, columns]; 0 outside it.

    ``x`` is a tensor descriptor with TMA and a pointer without: the compiler turns descriptors into
    pointers for cards that lack the copy engine, but then loads nothing ahead.
    """
    if TMA:
        block = x.load([row, column])
    else:
        r = row + tl.arange(0, BR)
        c = column + tl.arange(0, BC)
        inside = (r < rows)[:, None] & (c < columns)[None, :]
        block = tl.load(x + r.to(tl.int64)[:, None] * stride + c[None, :], mask=inside, other=0.0)
    return block


@triton.jit
def _store(x, value, stride, row, rows, column, columns, TMA: tl.constexpr, BR: tl.constexpr,
           BC: tl.constexpr):  # fmt: skip
    """Write a block as :func:`_load` reads it."""
    if TMA:
        x.store([row, column], value.to(x.dtype))
    else:
        r = row + tl.arange(0, BR)
        c = column + tl.arange(0, BC)
        inside = (r < rows)[:, None] & (c < columns)[None, :]
        place = x + r.to(tl.int64)[:, None] * stride + c[None, :]
        tl.store(place, value.to(x.dtype.element_ty), mask=inside)


@triton.jit
def _raw_logits(h, w, h_stride, w_stride, row, rows, column, columns, depth, TMA: tl.constexpr,
                BN: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """h W^T of one tile, [BN, BV] in fp32; what lies outside either operand counts as 0."""
    total = tl.zeros((BN, BV), dtype=tl.float32)
    for k in range(0, depth, BK):
        a = _load(h, h_stride, row, rows, k, depth, TMA, BN, BK)
        b = _load(w, w_stride, column, columns, k, depth, TMA, BV, BK)
        # ieee: the default for fp32 operands would round them to tf32.
        total = tl.dot(a, b.T, total, input_precision="ieee")
    return total


@triton.jit
def _capped(raw, softcap, temperature, HAS_CAP: tl.constexpr):
    """cap(raw) / temperature, and cap' = 1 - tanh^2."""
    if HAS_CAP:
        # tanh(x) by the exponential of -2|x|, which cannot overflow.
        x = raw / softcap
        e = tl.exp(-2.0 * tl.abs(x))
        t = (1.0 - e) / (1.0 + e)
        t = tl.where(x < 0, -t, t)
        return t * (softcap / temperature), 1.0 - t * t
    return raw / temperature, tl.full(raw.shape, 1.0, tl.float32)


@triton.jit
def _other_logits(h, w, bias, target, n, end, depth, h_stride, w_stride, softcap, temperature, row,
                  column, TMA: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr,
                  BN: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """Logits of one tile with -inf at the targets and from column ``end`` on, and their slope."""
    raw = _raw_logits(h, w, h_stride, w_stride, row, n, column, end, depth, TMA, BN, BV, BK)
    rows = row + tl.arange(0, BN)
    columns = column + tl.arange(0, BV)
    if HAS_BIAS:
        raw += tl.load(bias + columns, mask=columns < end, other=0.0).to(tl.float32)[None, :]
    y = tl.load(target + rows, mask=rows < n, other=0)
    z, slope = _capped(raw, softcap, temperature, HAS_CAP)
    counts = (columns[None, :] != y[:, None]) & (columns < end)[None, :]
    return tl.where(counts, z, -float("inf")), slope


@triton.jit
def reduce_kernel(h, w, bias, target, n, start, end, depth, h_stride, w_stride, softcap,
                  temperature, peaks, sums, surprises,
                  TMA: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr,
                  ENTROPY: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr,
                  GROUP: tl.constexpr):  # fmt: skip
    """Per row of each tile of columns start to end: maximum, sum of exp(z - maximum), and of
    exp(z - maximum) (maximum - z)."""
    row_tile, column_tile = _tile_of(
        tl.program_id(0), tl.cdiv(n, BN), tl.cdiv(end - start, BV), GROUP
    )
    row, column = row_tile * BN, start + column_tile * BV
    z, _ = _other_logits(h, w, bias, target, n, end, depth, h_stride, w_stride, softcap,
                         temperature, row, column, TMA, HAS_BIAS, HAS_CAP, BN, BV, BK)  # fmt: skip
    peak = tl.max(z, axis=1)
    # A tile without any finite logit (the target alone, or a bias that bans all) sums to 0.
    base = tl.where(peak == -float("inf"), 0.0, peak)
    p = tl.exp(z - base[:, None])
    rows = row + tl.arange(0, BN)
    out = column_tile.to(tl.int64) * n + rows
    tl.store(peaks + out, peak, mask=rows < n)
    tl.store(sums + out, tl.sum(p, axis=1), mask=rows < n)
    if ENTROPY:
        surprise = tl.where(p > 0, p * (base[:, None] - z), 0.0)
        tl.store(surprises + out, tl.sum(surprise, axis=1), mask=rows < n)


@triton.jit
def exp_kernel(h, w, bias, target, n, start, end, depth, h_stride, w_stride, softcap, temperature,
               reference, out, out_stride, sums, surprises,
               TMA: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr,
               ENTROPY: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr,
               GROUP: tl.constexpr):  # fmt: skip
    """exp(z - reference) cap' of columns start to end into ``out``, 0 at the targets, and the row
    sums of exp(z - reference) of each tile, taken before anything is rounded."""
    row_tile, column_tile = _tile_of(
        tl.program_id(0), tl.cdiv(n, BN), tl.cdiv(end - start, BV), GROUP
    )
    row, column = row_tile * BN, start + column_tile * BV
    z, slope = _other_logits(h, w, bias, target, n, end, depth, h_stride, w_stride, softcap,
                             temperature, row, column, TMA, HAS_BIAS, HAS_CAP, BN, BV,
                             BK)  # fmt: skip
    rows = row + tl.arange(0, BN)
    base = tl.load(reference + rows, mask=rows < n, other=0.0)
    p = tl.exp(z - base[:, None])
    place = column_tile.to(tl.int64) * n + rows
    tl.store(sums + place, tl.sum(p, axis=1), mask=rows < n)
    if ENTROPY:
        surprise = tl.where(p > 0, p * (base[:, None] - z), 0.0)
        tl.store(surprises + place, tl.sum(surprise, axis=1), mask=rows < n)
    _store(out, p * slope, out_stride, row, n, column - start, end - start, TMA, BN, BV)


@triton.jit
def grad_kernel(h, w, bias, target, n, start, end, depth, h_stride, w_stride, softcap, temperature,
                log_rest, grad, target_grad, out, out_stride, bias_sums,
                TMA: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr,
                BIAS_GRAD: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr,
                GROUP: tl.constexpr):  # fmt: skip
    """dL/d(raw logits) of columns start to end: -grad exp(z - log_rest) cap', target_grad at the
    targets, and its column sums over each tile's rows for the bias."""
    row_tile, column_tile = _tile_of(
        tl.program_id(0), tl.cdiv(n, BN), tl.cdiv(end - start, BV), GROUP
    )
    row, column = row_tile * BN, start + column_tile * BV
    z, slope = _other_logits(h, w, bias, target, n, end, depth, h_stride, w_stride, softcap,
                             temperature, row, column, TMA, HAS_BIAS, HAS_CAP, BN, BV,
                             BK)  # fmt: skip
    rows = row + tl.arange(0, BN)
    columns = column + tl.arange(0, BV)
    live = rows < n
    rest = tl.load(log_rest + rows, mask=live, other=0.0)
    g = tl.load(grad + rows, mask=live, other=0.0)
    y = tl.load(target + rows, mask=live, other=-1)
    dz = -g[:, None] * tl.exp(z - rest[:, None]) * slope
    at_target = tl.load(target_grad + rows, mask=live, other=0.0)
    dz = tl.where(columns[None, :] == y[:, None], at_target[:, None], dz)
    if BIAS_GRAD:
        place = row_tile.to(tl.int64) * (end - start) + (columns - start)
        tl.store(bias_sums + place, tl.sum(dz, axis=0), mask=columns < end)
    _store(out, dz, out_stride, row, n, column - start, end - start, TMA, BN, BV)


@triton.jit
def target_kernel(h, w, bias, target, n, vocab, depth, h_stride, w_stride, softcap, temperature,
                  logits, slopes, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, BN: tl.constexpr,
                  BK: tl.constexpr):  # fmt: skip
    """Logit of each row's target and its slope; 0 for a target of ``vocab``.

    Summed in fp64: it is one number a row, on which every digit of a confident row's 1 - p depends.
    """
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    live = rows < n
    y = tl.load(target + rows, mask=live, other=0).to(tl.int64)
    here = live & (y < vocab)
    total = tl.zeros((BN,), dtype=tl.float64)
    for k in range(0, depth, BK):
        ks = k + tl.arange(0, BK)
        inside = here[:, None] & (ks < depth)[None, :]
        a = tl.load(h + rows.to(tl.int64)[:, None] * h_stride + ks[None, :], mask=inside, other=0.0)
        b = tl.load(w + y[:, None] * w_stride + ks[None, :], mask=inside, other=0.0)
        total += tl.sum(a.to(tl.float64) * b.to(tl.float64), axis=1)
    if HAS_BIAS:
        total += tl.load(bias + y, mask=here, other=0.0).to(tl.float64)
    raw = total.to(tl.float32)
    z, slope = _capped(raw, softcap, temperature, HAS_CAP)
    if HAS_CAP:
        # 1 - tanh^2 again, with its digits where tanh is nearly 1.  In a tile, where a lost slope
        # drowns among others, that would spill registers.
        e = tl.exp(-2.0 * tl.abs(raw / softcap))
        slope = 4.0 * e / ((1.0 + e) * (1.0 + e))
    tl.store(logits + rows, z, mask=live)
    tl.store(slopes + rows, tl.where(here, slope, 0.0), mask=live)


class _Head:
    """The operands of one call, in the shape that the kernels want them."""

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        target: torch.Tensor,
        bias: torch.Tensor | None,
        softcap: float | None,
        temperature: float,
        entropy: bool = False,
    ) -> None:
        self.entropy = entropy
        extras = softcap is not None or bias is not None or entropy
        self.tiling = tiling_for(hidden.dtype, family_of(hidden.device), extras)
        self.hidden, self.weight = (_aligned(x, self.tiling.tma) for x in (hidden, weight))
        self.target = target.contiguous()
        self.bias = None if bias is None else bias.contiguous()
        self.n, self.depth = self.hidden.shape
        self.vocab = weight.shape[0]
        self.cap = 0.0 if softcap is None else softcap
        self.flags = {"HAS_BIAS": bias is not None, "HAS_CAP": softcap is not None}
        self.temperature = temperature

    def _launch(
        self,
        kernel: triton.JITFunction,
        start: int,
        end: int,
        *arguments: object,
        **flags: bool,
    ) -> None:
        """Run a kernel over the columns start to end of the vocabulary."""
        t = self.tiling
        grid = (triton.cdiv(self.n, t.rows) * triton.cdiv(end - start, t.columns),)
        kernel[grid](
            self._operand(self.hidden, t.rows, t.depth),
            self._operand(self.weight, t.columns, t.depth),
            self.bias,
            self.target,
            self.n,
            start,
            end,
            self.depth,
            self.hidden.stride(0),
            self.weight.stride(0),
            self.cap,
            self.temperature,
            *arguments,
            TMA=t.tma,
            **self.flags,
            **flags,
            BN=t.rows,
            BV=t.columns,
            BK=t.depth,
            GROUP=t.group,
            num_warps=t.num_warps,
            enable_fp_fusion=True,
            num_stages=t.num_stages,
        )

    def _operand(self, x: torch.Tensor, rows: int, columns: int) -> object:
        return TensorDescriptor.from_tensor(x, [rows, columns]) if self.tiling.tma else x

    def chunks(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        """(start, end, buffer [n, end - start] for what the kernels write) over the vocabulary."""
        fits = CHUNK_BYTES // (self.n * self.hidden.element_size())
        # Whole tiles, and starts that descriptors can have.
        fits = max(fits // self.tiling.columns, 1) * self.tiling.columns
        width = min(CHUNK_COLUMNS, fits, self.vocab)
        buffer = self.hidden.new_empty(self.n, _round_up(width, 16))
        for start in range(0, self.vocab, width):
            end = min(start + width, self.vocab)
            yield start, end, buffer[:, : end - start]

    def _partial(self, columns: int) -> torch.Tensor:
        """[tiles, n] for what each tile of columns has to say about each row."""
        return self.hidden.new_empty(
            triton.cdiv(columns, self.tiling.columns), self.n, dtype=torch.float32
        )

    def targets(self) -> tuple[torch.Tensor, torch.Tensor]:
        """z_t and cap'_t, [n] each; 0 for a target that is not in this slice."""
        logits, slopes = self.hidden.new_empty(2, self.n, dtype=torch.float32)
        rows, depth = 32, 64
        target_kernel[(triton.cdiv(self.n, rows),)](
            self.hidden,
            self.weight,
            self.bias,
            self.target,
            self.n,
            self.vocab,
            self.depth,
            self.hidden.stride(0),
            self.weight.stride(0),
            self.cap,
            self.temperature,
            logits,
            slopes,
            **self.flags,
            BN=rows,
            BK=depth,
            enable_fp_fusion=True,
        )
        return logits, slopes

    def peak(self, columns: int) -> torch.Tensor:
        """Largest logit [n] among the first columns, the target's apart; -inf without any."""
        peaks, sums = self._partial(columns), self._partial(columns)
        self._launch(reduce_kernel, 0, columns, peaks, sums, sums, ENTROPY=False)
        return peaks.amax(dim=0)

    def reduce(self, entropy: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """(peak, total, surprise) [n] over the whole vocabulary, the target apart."""
        peaks, sums = self._partial(self.vocab), self._partial(self.vocab)
        surprises = self._partial(self.vocab) if entropy else sums
        self._launch(reduce_kernel, 0, self.vocab, peaks, sums, surprises, ENTROPY=entropy)
        peak = peaks.amax(dim=0)
        peak = peak.masked_fill_(peak == -torch.inf, torch.finfo(torch.float32).min)
        below = (peak - peaks).masked_fill_(peaks == -torch.inf, torch.inf)
        shrink = below.neg().exp_()
        total = (sums * shrink).sum(dim=0)
        if not entropy:
            return peak, total, None
        below.masked_fill_(sums == 0, 0.0)
        return peak, total, surprises.addcmul_(sums, below).mul_(shrink).sum(dim=0)

    def pull(
        self, reference: torch.Tensor, entropy: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """(sum p cap' W [n, D], sum p, surprise [n]) with p = exp(z - reference), the target
        apart."""
        pull = self.hidden.new_zeros(self.n, self.depth, dtype=torch.float32)
        total = torch.zeros_like(reference)
        surprise = torch.zeros_like(reference) if entropy else None
        for start, end, p in self.chunks():
            self._exponentials(reference, start, end, p, total, surprise)
            _add_product(pull, p, self.weight[start:end])
        return pull, total, surprise

    def keep(
        self, reference: torch.Tensor, entropy: bool, out: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """p cap' into ``out`` [n, padded vocabulary]; (sum p, surprise [n])."""
        total = torch.zeros_like(reference)
        surprise = torch.zeros_like(reference) if entropy else None
        self._exponentials(reference, 0, self.vocab, out[:, : self.vocab], total, surprise)
        return total, surprise

    def _exponentials(
        self,
        reference: torch.Tensor,
        start: int,
        end: int,
        out: torch.Tensor,
        total: torch.Tensor,
        surprise: torch.Tensor | None,
    ) -> None:
        sums = self._partial(end - start)
        surprises = self._partial(end - start) if surprise is not None else sums
        self._launch(
            exp_kernel,
            start,
            end,
            reference,
            self._operand(out, self.tiling.rows, self.tiling.columns),
            out.stride(0),
            sums,
            surprises,
            ENTROPY=surprise is not None,
        )
        total += sums.sum(dim=0)
        if surprise is not None:
            surprise += surprises.sum(dim=0)

    def reference(self) -> torch.Tensor:
        """What each row's exponentials are to be relative to [n]."""
        if self.hidden.dtype == torch.float16:
            return self.true_peak()
        peak = self.peak(min(REFERENCE_COLUMNS, self.vocab))
        # -inf where the bias bans them all, or the only other token is the target: any number
        # serves.
        return peak.masked_fill_(peak == -torch.inf, 0.0)

    def true_peak(self) -> torch.Tensor:
        """Largest logit [n] of the tokens other than the target; finite."""
        peak = self.peak(self.vocab)
        return peak.masked_fill_(peak == -torch.inf, torch.finfo(torch.float32).min)

    def rows(self, index: torch.Tensor) -> _Head:
        """The same head for some of the rows."""
        cap = self.cap if self.flags["HAS_CAP"] else None
        return _Head(
            self.hidden[index],
            self.weight,
            self.target[index],
            self.bias,
            cap,
            self.temperature,
            self.entropy,
        )


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
    """See :func:`fastalign_kernels.reference.linear_logprob_forward`: 1 pass, 2 with the gradient
    (3 in fp16)."""
    head = _Head(hidden, weight, target, bias, softcap, temperature, entropy)
    logits, slopes = head.targets()
    if not unit_grad:
        peak, total, surprise = head.reduce(entropy)
        return _found(logits, slopes, peak, total, surprise)
    reference = head.reference()
    pull, total, surprise = head.pull(reference, entropy)
    index = _far(total) if hidden.dtype != torch.float16 else None
    if index is not None:
        some = head.rows(index)
        reference[index] = some.true_peak()
        again = some.pull(reference[index], entropy)
        pull[index], total[index] = again[0], again[1]
        if surprise is not None and again[2] is not None:
            surprise[index] = again[2]
    # In place: N D numbers in fp32 are what this op may hold besides a chunk.
    tiny = torch.finfo(torch.float32).tiny
    pull /= total.mul(-temperature).clamp_max_(-tiny)[:, None]
    pull.addcmul_((slopes / temperature)[:, None], _rows_of(head.weight, head.target))
    return _found(logits, slopes, reference, total, surprise, unit_grad=pull)


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
    """See :func:`fastalign_kernels.reference.linear_logprob_exponentials`: 1 pass."""
    head = _Head(hidden, weight, target, bias, softcap, temperature, entropy)
    logits, slopes = head.targets()
    reference = head.reference()
    total, surprise = head.keep(reference, entropy, out)
    index = _far(total)
    if index is not None:
        some = head.rows(index)
        reference[index] = some.true_peak()
        rows = out.new_empty(len(index), out.shape[1])
        total[index], again = some.keep(reference[index], entropy, rows)
        out[index, : head.vocab] = rows[:, : head.vocab]
        if surprise is not None and again is not None:
            surprise[index] = again
    return _found(logits, slopes, reference, total, surprise, kept=Exponentials(out, reference))


def _found(
    logits: torch.Tensor,
    slopes: torch.Tensor,
    peak: torch.Tensor,
    total: torch.Tensor,
    surprise: torch.Tensor | None,
    **others: Any,
) -> HeadForward:
    total = total.clamp_min(torch.finfo(torch.float32).tiny)
    return HeadForward(
        target_logit=logits,
        target_slope=slopes,
        log_rest=peak + total.log(),
        rest_entropy=None if surprise is None else total.log() + surprise / total,
        **others,
    )


def _far(total: torch.Tensor) -> torch.Tensor | None:
    """Indices of rows whose reference was too far from their maximum, None without any."""
    index = (~((total < LARGEST_SUM) & (total > 1 / LARGEST_SUM))).nonzero()[:, 0]
    return index if len(index) else None


def _rows_of(weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """W_t [n, D]; any row for a target that is not in this slice."""
    return weight[target.clamp_max(len(weight) - 1)]


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
    """See :func:`fastalign_kernels.reference.linear_logprob_backward`: 1 pass, and 1 more for each
    of hidden and weight.

    In fp16 a row's gradient may lie below what the dtype holds: all are scaled by the largest.
    """
    want_hidden, want_weight, want_bias = wanted
    if not len(target):
        return (
            log_rest.new_zeros(hidden.shape) if want_hidden else None,
            torch.zeros_like(weight) if want_weight else None,
            torch.zeros_like(bias) if want_bias and bias is not None else None,
        )
    grad_weight = torch.empty_like(weight) if want_weight else None
    grad_bias = torch.empty_like(bias) if want_bias and bias is not None else None
    head = _Head(hidden, weight, target, bias, softcap, temperature)
    _, slopes = head.targets()
    scale = torch.ones((), device=hidden.device)
    if hidden.dtype == torch.float16:
        # Of the finite ones: a row that is lost must not take the others with it.
        largest = torch.nan_to_num(grad_log_odds, 0.0, 0.0, 0.0).abs().amax()
        scale = largest.clamp_min(torch.finfo(torch.float32).tiny)
    grad = grad_log_odds / (temperature * scale)
    target_grad = grad * slopes
    log_rest = log_rest.contiguous()
    pull = head.hidden.new_zeros(head.n, head.depth, dtype=torch.float32) if want_hidden else None
    row_tiles = triton.cdiv(head.n, head.tiling.rows)
    for start, end, dz in head.chunks():
        bias_sums = log_rest.new_empty((row_tiles, end - start) if grad_bias is not None else 1)
        out = head._operand(dz, head.tiling.rows, head.tiling.columns)
        head._launch(
            grad_kernel,
            start,
            end,
            log_rest,
            grad,
            target_grad,
            out,
            dz.stride(0),
            bias_sums,
            BIAS_GRAD=grad_bias is not None,
        )
        if pull is not None:
            _add_product(pull, dz, head.weight[start:end])
        if grad_weight is not None:
            _write_product(grad_weight[start:end], dz.t(), head.hidden, scale)
        if grad_bias is not None:
            grad_bias[start:end] = bias_sums.sum(dim=0) * scale
    if pull is not None and hidden.dtype == torch.float16:
        pull *= scale
    return pull, grad_weight, grad_bias


def _aligned(x: torch.Tensor, tma: bool) -> torch.Tensor:
    """x [rows, columns] as kernels need it: columns behind each other, and with descriptors rows
    that start at multiples of 16 bytes."""
    step = 16 // x.element_size() if tma else 1
    apart = x.stride(0) >= x.shape[1] and x.stride(0) % step == 0
    if x.stride(1) == 1 and apart and (not tma or x.data_ptr() % 16 == 0):
        return x
    padded = x.new_zeros(x.shape[0], _round_up(x.shape[1], step))[:, : x.shape[1]]
    return padded.copy_(x)


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a b, summed in fp32."""
    if a.is_cuda:
        add_product(total, a, b)
    else:  # the interpreter's tensors
        total.addmm_(a.float(), b.float())


def _write_product(
    out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: torch.Tensor
) -> None:
    """out = scale a b, rounded once; in bf16 and fp32, where scale is 1, without a copy in fp32."""
    if a.dtype != torch.float16:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        out.copy_(torch.mm(a, b, out_dtype=torch.float32).mul_(scale))
    else:  # the interpreter's tensors
        out.copy_(torch.mm(a.float(), b.float()).mul_(scale))
