"""Attention over packs: causal within each sequence, without padding, with prompts that are computed
once and attended to by all that continue them."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

PACKED_ATTENTION = "fastalign_packed"


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
        own_keys: int64 [T]; where in ``key_index`` each token stands for its own segment.
        shared_keys: the other places of ``key_index`` and the tokens there, (int64 [n], int64 [n])
            for the first segment that continues each parent, for the second, and so on: in one such
            pair no token is twice.
    """

    lengths: tuple[int, ...]
    parents: tuple[int, ...]
    cu_queries: torch.Tensor
    cu_keys: torch.Tensor
    key_index: torch.Tensor | None = None
    own_keys: torch.Tensor | None = None
    shared_keys: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()

    @property
    def keys(self) -> tuple[int, ...]:
        """How many tokens each segment attends to."""
        return tuple(
            n + (self.lengths[p] if p >= 0 else 0)
            for n, p in zip(self.lengths, self.parents, strict=True)
        )

    @classmethod
    def of(cls, lengths: Sequence[int], parents: Sequence[int] | None = None) -> Segments:
        """From lengths and parents, on the CPU; without parents no segment continues another."""
        lengths = tuple(lengths)
        parents = (-1,) * len(lengths) if parents is None else tuple(parents)
        starts = [0, *itertools.accumulate(lengths)]
        cu_queries = torch.tensor(starts, dtype=torch.int32)
        if max(parents, default=-1) < 0:
            return cls(lengths, parents, cu_queries, cu_queries)
        keys: list[torch.Tensor] = []
        own: list[torch.Tensor] = []
        rounds: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
        children: dict[int, int] = {}
        cu_keys = [0]
        for s, (n, parent) in enumerate(zip(lengths, parents, strict=True)):
            at = cu_keys[-1]
            if parent >= 0:
                before = torch.arange(starts[parent], starts[parent + 1])
                turn = children[parent] = children.get(parent, -1) + 1
                if turn == len(rounds):
                    rounds.append([])
                rounds[turn].append((torch.arange(at, at + len(before)), before))
                keys.append(before)
                at += len(before)
            keys.append(torch.arange(starts[s], starts[s + 1]))
            own.append(torch.arange(at, at + n))
            cu_keys.append(at + n)
        return cls(
            lengths,
            parents,
            cu_queries,
            torch.tensor(cu_keys, dtype=torch.int32),
            torch.cat(keys),
            torch.cat(own),
            tuple(
                (torch.cat([places for places, _ in turn]), torch.cat([to for _, to in turn]))
                for turn in rounds
            ),
        )

    def to(self, device: torch.device) -> Segments:
        def move(x: torch.Tensor) -> torch.Tensor:
            return x.to(device, non_blocking=True)

        if self.key_index is None or self.own_keys is None:
            cu = move(self.cu_queries)
            return replace(self, cu_queries=cu, cu_keys=cu)
        return replace(
            self,
            cu_queries=move(self.cu_queries),
            cu_keys=move(self.cu_keys),
            key_index=move(self.key_index),
            own_keys=move(self.own_keys),
            shared_keys=tuple((move(places), move(to)) for places, to in self.shared_keys),
        )


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
    if segments is None:
        segments = Segments.of([query.shape[2]]).to(query.device)
    if sliding_window and segments.key_index is not None:
        raise NotImplementedError("a sliding window is not shared")
    kernel = _varlen_kernel() if query.is_cuda and query.dtype != torch.float32 else None
    if kernel is not None:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        return kernel(q, k, v, segments, scaling, dropout, sliding_window)[None], None
    # Split, not sliced: the gradient of a slice is as large as the whole.
    queries, keys, values = (x.split(segments.lengths, dim=2) for x in (query, key, value))
    parts = []
    for s, (n, parent) in enumerate(zip(segments.lengths, segments.parents, strict=True)):
        k, v, mask = keys[s], values[s], None
        if parent >= 0:
            k = torch.cat([keys[parent], k], dim=2)
            v = torch.cat([values[parent], v], dim=2)
            mask = _continues(n, segments.lengths[parent], query.device)
        elif sliding_window and n > sliding_window:
            mask = _window(n, sliding_window, query.device)
        parts.append(
            nn.functional.scaled_dot_product_attention(
                queries[s],
                k,
                v,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None,
                scale=scaling,
                enable_gqa=key.shape[1] != query.shape[1],
            )
        )
    return torch.cat(parts, dim=2).transpose(1, 2), None


def _continues(length: int, before: int, device: torch.device) -> torch.Tensor:
    """bool [length, before + length]: token t sees all before the segment and 0..t of its own."""
    return torch.ones(length, before + length, dtype=torch.bool, device=device).tril(before)


def _window(length: int, window: int, device: torch.device) -> torch.Tensor:
    t = torch.arange(length, device=device)
    distance = t[:, None] - t[None, :]
    return (distance >= 0) & (distance < window)


# --------------------------------------------------------------------------- on a GPU


@functools.cache
def _varlen_kernel() -> Callable[..., torch.Tensor] | None:
    """(query [T, H, d], key and value [T, Hkv, d], segments, scaling, dropout, window) ->
    [T, H, d], causal from the last token of each segment's keys."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
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
        k, v = _gathered(k, segments), _gathered(v, segments)
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
        if dropout:
            raise NotImplementedError("torch's attention over variable lengths has no dropout")
        k, v = _gathered(k, segments), _gathered(v, segments)
        more: dict[str, Any] = {}
        if groups_heads:
            more["enable_gqa"] = k.shape[1] != q.shape[1]
        elif k.shape[1] != q.shape[1]:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        return varlen_attn(
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
        segments: Segments = ctx.segments
        # Not in half precision: many responses add to one prompt.
        total = gradient[segments.own_keys].to(torch.promote_types(gradient.dtype, torch.float32))
        for places, tokens in segments.shared_keys:
            total.index_add_(0, tokens, gradient[places].to(total.dtype))
        return total.to(gradient.dtype), None


# Attention is causal within segments by construction, so the model need not build any mask.
AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, lambda *args, **kwargs: None)
