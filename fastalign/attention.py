"""Attention over packs: causal within each sequence, without padding, with prompts that are
computed once and attended to by all that continue them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

if TYPE_CHECKING:
    from fastalign.batch import Batch

PACKED_ATTENTION = "fastalign_packed"
# Queries in one call of torch's CPU kernel, which computes what the mask hides as well: the fewer,
# the less of that.  From 192 on the kernel takes them in blocks of 64, below in blocks of 32.
CPU_ROWS = 192


@dataclass(frozen=True)
class Segments:
    """What attends to what in a pack of T tokens, in segments laid end to end.

    A token attends to those before it in its segment and, where the segment continues another one,
    to all tokens of that.

    Attributes:
        lengths: tokens of each of the S segments.
        parents: the segment that each continues, which comes before it and continues none itself;
            -1 where it starts a sequence.
        cu_queries: int32 [S + 1]; segment s is tokens cu_queries[s] : cu_queries[s + 1].
        cu_keys: int32 [S + 1]; the same for what it attends to.
        key_index: int64 [cu_keys[S]]; the tokens that each segment attends to, in their order; None
            where no segment continues another one.
    """

    lengths: tuple[int, ...]
    parents: tuple[int, ...]
    cu_queries: torch.Tensor
    cu_keys: torch.Tensor
    key_index: torch.Tensor | None = None

    @property
    def keys(self) -> tuple[int, ...]:
        """How many tokens each segment attends to."""
        return tuple(
            n + (self.lengths[p] if p >= 0 else 0)
            for n, p in zip(self.lengths, self.parents, strict=True)
        )

    @classmethod
    def whole(cls, tokens: int, device: torch.device) -> Segments:
        """One sequence."""
        cu = torch.tensor([0, tokens], dtype=torch.int32, device=device)
        return cls((tokens,), (-1,), cu, cu)

    @classmethod
    def of(cls, batch: Batch) -> Segments:
        """Those of a pack."""
        lengths = tuple(b - a for a, b in pairwise(batch.bounds))
        parents = []
        last = -1
        for s, (n, (a, b)) in enumerate(zip(lengths, pairwise(batch.key_bounds), strict=True)):
            if b - a == n:
                last = s
            # A shared prefix comes just before the segments that continue it.
            parents.append(-1 if b - a == n else last)
        return cls(lengths, tuple(parents), batch.cu_seqlens_q, batch.cu_seqlens_k, batch.key_index)

    @functools.cached_property
    def key_places(self) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        """Where tokens stand in ``key_index``: int64 [T], each for its own segment; and the other
        places with the tokens there, (int64 [n], int64 [n]) for the first segments that continue
        their parents, for the second ones, and so on, so that none of these names a token twice.
        """
        device = self.cu_keys.device
        starts = [0, *accumulate(self.lengths)]
        before = [k - n for k, n in zip(self.keys, self.lengths, strict=True)]
        shift = torch.tensor([0, *before]).cumsum(0)[1:]
        own = torch.arange(starts[-1]) + shift.repeat_interleave(torch.tensor(self.lengths))
        turns: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        turn: dict[int, int] = {}
        at = 0
        for n, parent in zip(self.keys, self.parents, strict=True):
            if parent >= 0:
                tokens = torch.arange(starts[parent], starts[parent + 1])
                turn[parent] = turn.get(parent, -1) + 1
                places = torch.arange(at, at + len(tokens))
                turns.setdefault(turn[parent], []).append((places, tokens))
            at += n
        others = [
            (torch.cat([p for p, _ in part]).to(device), torch.cat([t for _, t in part]).to(device))
            for part in turns.values()
        ]
        return own.to(device), others

    @functools.cached_property
    def masks(self) -> dict[tuple[int, int | None, torch.dtype], torch.Tensor]:
        """What `_stairs` made for this pack, for all layers."""
        return {}


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    segments: Segments | None = None,
    sliding_window: int | None = None,
    **unsupported: Any,
) -> tuple[torch.Tensor, None]:
    """Attention within the segments of a pack; None: all tokens are one sequence.

    query [1, H, T, d], key and value [1, Hkv, T, d] -> [1, T, H, d].  A kernel for variable
    lengths (FlashAttention's where it is installed, or else torch's) on a GPU in half precision,
    otherwise one exact SDPA call for each segment: nothing is padded in either.

    Raises:
        NotImplementedError: the model asks for what no such kernel does.
    """
    if unsupported.get("softcap") is not None or unsupported.get("s_aux") is not None:
        raise NotImplementedError("attention with a soft cap or sinks is not packed")
    if sliding_window is None and _masks_a_window(module):
        raise NotImplementedError("its attention has a window that its mask alone knows of")
    if segments is None:
        segments = Segments.whole(query.shape[2], query.device)
    if sliding_window and segments.key_index is not None:
        raise NotImplementedError("a sliding window is not shared")
    kernel = _varlen_kernel() if _suits_kernel(query, value, dropout) else None
    if kernel is not None:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        k, v = _gathered(k, segments), _gathered(v, segments)
        return kernel(q, k, v, segments, scaling, dropout, sliding_window)[None], None
    # Split, not sliced: the gradient of a slice is as large as the whole.
    queries, keys, values = (x.split(segments.lengths, dim=2) for x in (query, key, value))
    attend = functools.partial(
        nn.functional.scaled_dot_product_attention,
        dropout_p=dropout,
        scale=scaling,
        enable_gqa=key.shape[1] != query.shape[1],
    )
    rows = max(segments.lengths)
    if query.device.type == "cpu":
        rows = min(rows, CPU_ROWS)
    parts: list[torch.Tensor] = []
    for q, k, v, parent in zip(queries, keys, values, segments.parents, strict=True):
        before = 0
        if parent >= 0:
            before = segments.lengths[parent]
            k = torch.cat([keys[parent], k], dim=2)
            v = torch.cat([values[parent], v], dim=2)
        blocks = _blocks(q.shape[2], before, sliding_window, rows)
        spans = tuple((block.first_key, before + block.end) for block in blocks)
        operands = q.split(rows, dim=2), _slices(k, spans), _slices(v, spans)
        for block, q, k, v in zip(blocks, *operands, strict=True):
            mask = None
            if before or block.start or (sliding_window and block.end > sliding_window):
                # Of the keys that the block sees, those before its first token.
                earlier = before + block.start - block.first_key
                mask = _mask(segments, rows, earlier, sliding_window, q)
            parts.append(attend(q, k, v, attn_mask=mask, is_causal=mask is None))
    return torch.cat(parts, dim=2).transpose(1, 2), None


def _masks_a_window(module: nn.Module) -> bool:
    """Whether the layer sees a part of the sequence by its configuration.  A model that says so to
    no attention but by the mask, which packs have none of, would be trained on other values, and
    no sequence that is quick to try is longer than its window."""
    config = getattr(module, "config", None)
    if not (
        getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
    ):
        return False
    types, layer = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    return types is None or layer is None or types[layer] != "full_attention"


class _Block(NamedTuple):
    """Queries start..end of a segment, and the first of its keys that any of them attends to."""

    start: int
    end: int
    first_key: int


def _blocks(length: int, before: int, window: int | None, rows: int) -> list[_Block]:
    """The queries of a segment that follows ``before`` tokens, ``rows`` at a time."""
    return [
        _Block(
            start, min(start + rows, length), max(0, before + start + 1 - window) if window else 0
        )
        for start in range(0, length, rows)
    ]


def _seen(rows: int, earlier: int, window: int | None, device: torch.device) -> torch.Tensor:
    """bool [rows, earlier + rows]: token t of ``rows`` sees the ``earlier`` ones and 0..t, or the
    last ``window`` of these."""
    keys = torch.arange(-earlier, rows, device=device)
    distance = keys[earlier:, None] - keys
    return (distance >= 0) & (distance < window) if window else distance >= 0


def _mask(
    segments: Segments, rows: int, earlier: int, window: int | None, query: torch.Tensor
) -> torch.Tensor:
    """Of a block's queries, at most ``rows``, to the ``earlier`` tokens and themselves."""
    n = query.shape[2]
    if query.device.type != "cpu":
        return _seen(n, earlier, window, query.device)
    stairs = _stairs(segments, rows, window, query)
    last = stairs.shape[1] - rows
    return stairs[:n, last - earlier : last + n]


def _stairs(segments: Segments, rows: int, window: int | None, like: torch.Tensor) -> torch.Tensor:
    """[rows, C + rows], added to scores: 0 where `_seen` behind the most keys C, -inf elsewhere.

    The masks of all blocks are parts of it.  From a bool one torch's kernel for CPUs would make
    such a one for each block and layer, and keep it for the backward pass.
    """
    made = segments.masks.get((rows, window, like.dtype))
    if made is None:
        most = min(max(segments.keys), window or max(segments.keys))
        seen = _seen(rows, most, window, like.device)
        made = like.new_zeros(seen.shape).masked_fill_(~seen, -torch.inf)
        segments.masks[rows, window, like.dtype] = made
    return made


def _slices(x: torch.Tensor, spans: Sequence[tuple[int, int]]) -> tuple[torch.Tensor, ...]:
    return (x,) if len(spans) == 1 else _Slices.apply(x, spans)


class _Slices(torch.autograd.Function):
    """x [1, H, K, d] -> x[:, :, a:b] of each span; gradients are added up in fp32, span by span."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, spans: tuple[tuple[int, int], ...]
    ) -> tuple[torch.Tensor, ...]:
        ctx.spans, ctx.keys = spans, x.shape[2]
        return tuple(x[:, :, a:b] for a, b in spans)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        one = gradients[0]
        total = one.new_zeros(
            (*one.shape[:2], ctx.keys, one.shape[3]),
            dtype=torch.promote_types(one.dtype, torch.float32),
        )
        for gradient, (a, b) in zip(gradients, ctx.spans, strict=True):
            total[:, :, a:b] += gradient
        return total.to(one.dtype), None


# --------------------------------------------------------------------------- on a GPU


def _suits_kernel(query: torch.Tensor, value: torch.Tensor, dropout: float) -> bool:
    """Whether a kernel for variable lengths takes these; torch's knows no dropout."""
    width = query.shape[-1]
    return (
        _has_kernels(query.device, query.dtype)
        and width == value.shape[-1] <= 256
        and width % 8 == 0
        and (not dropout or _has_flash_attn())
    )


def _has_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    return (
        device.type == "cuda"
        and dtype in (torch.float16, torch.bfloat16)
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def choose_kernel(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """(what computes packed attention where the heads suit it, why it is that)."""
    if not _has_kernels(device, dtype):
        name = str(dtype).removeprefix("torch.")
        return "torch's SDPA, sequence by sequence", f"no kernel packs {name} on this {device.type}"
    if _has_flash_attn():
        return "flash-attn", "it is installed"
    if _varlen_kernel() is None:
        return "torch's SDPA, sequence by sequence", "flash-attn is not installed"
    return "torch's kernel for variable lengths", "flash-attn is not installed"


def _has_flash_attn() -> bool:
    return _flash_attn() is not None


@functools.cache
def _flash_attn() -> Callable[..., torch.Tensor] | None:
    """Its function for variable lengths, which version 2 has."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    return flash_attn_varlen_func


@functools.cache
def _varlen_kernel() -> Callable[..., torch.Tensor] | None:
    """(query [T, H, d], key and value [K, Hkv, d] of all keys, segments, scaling, dropout, window)
    -> [T, H, d], causal from the last token of each segment's keys."""
    flash_attn_varlen_func = _flash_attn()
    if flash_attn_varlen_func is None:
        return _torch_varlen()

    def flash(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        segments: Segments,
        scaling: float | None,
        dropout: float,
        window: int | None,
    ) -> torch.Tensor:
        return flash_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens_q=segments.cu_queries,
            cu_seqlens_k=segments.cu_keys,
            max_seqlen_q=max(segments.lengths),
            max_seqlen_k=max(segments.keys),
            dropout_p=dropout,
            softmax_scale=scaling,
            causal=True,
            window_size=(window - 1, 0) if window else (-1, -1),
        )

    return flash


def _torch_varlen() -> Callable[..., torch.Tensor] | None:
    if not torch.backends.cuda.is_flash_attention_available():
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    groups_heads = "enable_gqa" in inspect.signature(varlen_attn).parameters

    def varlen(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        segments: Segments,
        scaling: float | None,
        dropout: float,
        window: int | None,
    ) -> torch.Tensor:
        assert not dropout, "see _suits_kernel"
        more: dict[str, Any] = {}
        if groups_heads:
            more["enable_gqa"] = k.shape[1] != q.shape[1]
        elif k.shape[1] != q.shape[1]:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        out: Any = varlen_attn(
            q,
            k,
            v,
            segments.cu_queries,
            segments.cu_keys,
            max(segments.lengths),
            max(segments.keys),
            scale=scaling,
            window_size=(window - 1 if window else -1, 0),
            **more,
        )
        return out

    return varlen


def _gathered(x: torch.Tensor, segments: Segments) -> torch.Tensor:
    return x if segments.key_index is None else _Gather.apply(x, segments)


class _Gather(torch.autograd.Function):
    """x [T, ...] -> x[key_index]; the gradient of a shared token is the sum over those who share
    it, always added in the order of the pack: index_add would add in that of the threads."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, segments: Segments) -> torch.Tensor:
        ctx.segments = segments
        return x[segments.key_index]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        own, others = ctx.segments.key_places
        # Not in half precision: many responses add to one prompt.
        total = gradient[own].to(torch.promote_types(gradient.dtype, torch.float32))
        for places, tokens in others:
            total.index_add_(0, tokens, gradient[places].to(total.dtype))
        return total.to(gradient.dtype), None


# Attention is causal within segments by construction, so the model need not build any mask.
AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, lambda *args, **kwargs: None)


def leave_uncompiled() -> None:
    """Keep torch.compile out of packed attention, whose segments are others in each pack."""
    AttentionInterface.register(PACKED_ATTENTION, torch.compiler.disable(packed_attention))
