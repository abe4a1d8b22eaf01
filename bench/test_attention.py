"""Attention over a pack, forward and backward: FastAlign's beside the same without its blocks of
queries, and beside a padded batch, as a model computes it without packs.

    pytest bench/test_attention.py

A pack of four prompts with two answers each, of half the longest length to all of it.  Its floor
are the pairs of tokens that see one another, P in all: forward two products, backward five, and 7 x
2 P operations for each head and channel.  torch's kernel for CPUs computes hidden pairs, too: n x n
of n (n + 1) / 2 for a whole segment of n tokens, and n x (n + 192) / 2 in blocks of 192 queries.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from racing import DEVICE, SMOKE, Contestants
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from fastalign import attention
from fastalign.attention import Segments, packed_attention
from fastalign.batch import make_batch
from fastalign.data import Example, Stream

HEADS, KEY_HEADS, WIDTH = (32, 8, 128) if DEVICE.type == "cuda" else (9, 3, 64)
PROMPT = 24
LONGEST = [64] if SMOKE else [512, 1024, 2048]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
WHOLE = 1 << 30


@functools.cache
def pack(longest: int) -> tuple[Segments, list[int]]:
    """(segments, tokens of each stream with its prompt)."""
    rng = np.random.default_rng(0)
    examples, lengths = [], []
    for group in range(4):
        prompt = np.full(PROMPT, group, dtype=np.int32)
        answers = rng.integers(longest // 2, longest, 2, endpoint=True) - PROMPT
        # They differ from their first token on.
        ends = [np.full(n, 100 + i, dtype=np.int32) for i, n in enumerate(answers)]
        examples.append(Example(tuple(Stream.of("x", prompt, end) for end in ends), 1.0, ""))
        lengths += [PROMPT + int(n) for n in answers]
    return Segments.of(make_batch(examples, share_prefixes=True).to(DEVICE)), lengths


def operations(longest: int) -> int:
    segments, _ = pack(longest)
    pairs = sum(
        n * (keys - n) + n * (n + 1) // 2
        for n, keys in zip(segments.lengths, segments.keys, strict=True)
    )
    return 7 * 2 * pairs * HEADS * WIDTH


def contestants(dtype: torch.dtype, longest: int) -> Contestants:
    torch.manual_seed(0)
    segments, lengths = pack(longest)

    def leaves(rows: int, tokens: int) -> list[torch.Tensor]:
        # As projections leave them: the heads of a token beside one another.
        return [
            torch.randn(rows, tokens, heads, WIDTH, device=DEVICE, dtype=dtype)
            .transpose(1, 2)
            .requires_grad_()
            for heads in (HEADS, KEY_HEADS, KEY_HEADS)
        ]

    packed = leaves(1, sum(segments.lengths))
    padded = leaves(len(lengths), max(lengths))
    real = torch.arange(max(lengths))[None, :] < torch.tensor(lengths)[:, None]
    causal = torch.ones(max(lengths), max(lengths), dtype=torch.bool).tril()
    mask = (real[:, None, None, :] & causal).to(DEVICE)

    def ours(rows: int) -> None:
        before, attention.CPU_ROWS = attention.CPU_ROWS, rows
        try:
            out, _ = packed_attention(nn.Module(), *packed, None, segments=segments)
        finally:
            attention.CPU_ROWS = before
        torch.autograd.grad(out, packed, torch.ones_like(out))

    def theirs() -> None:
        out = scaled_dot_product_attention(*padded, attn_mask=mask, enable_gqa=True)
        torch.autograd.grad(out, padded, torch.ones_like(out))

    made: Contestants = {"fastalign": lambda: ours(attention.CPU_ROWS), "padded": theirs}
    return made if DEVICE.type == "cuda" else made | {"whole segments": lambda: ours(WHOLE)}


@pytest.mark.parametrize("who", ["fastalign", "whole segments", "padded"])
@pytest.mark.parametrize("longest", LONGEST)
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_attention(race, dtype, longest, who):
    race(
        f"attention {dtype} {longest}",
        lambda: contestants(DTYPES[dtype], longest),
        who,
        peaks=False,
        operations=operations(longest),
    )
