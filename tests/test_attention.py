"""Attention over packs against plain attention over each sequence on its own."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastalign import attention
from fastalign.attention import Segments, _gathered, _slices, packed_attention
from fastalign.batch import make_batch
from fastalign.data import Example, Stream

# (tokens of the prompt, tokens of each response); with one response there is nothing to share.
Groups = list[tuple[int, list[int]]]
GROUPS: list[Groups] = [
    [(4, [1])],
    [(1, [1, 1])],
    [(7, [3, 5]), (3, [1]), (1, [2]), (16, [1, 9, 4])],
    [(2, [1]), (1, [1]), (5, [4])],
]


def layout(groups: Groups) -> tuple[list[int], list[int]]:
    lengths: list[int] = []
    parents: list[int] = []
    for prompt, responses in groups:
        if len(responses) == 1:
            lengths.append(prompt + responses[0])
            parents.append(-1)
            continue
        parent = len(lengths)
        lengths += [prompt, *responses]
        parents += [-1, *[parent] * len(responses)]
    return lengths, parents


def segments_of(groups: Groups) -> Segments:
    """Of a pack in which the first two of a group are an example, and the others one each."""
    examples = []
    for g, (prompt, responses) in enumerate(groups):
        begin = np.full(prompt, 2 * g, dtype=np.int32)
        # The streams differ from their first token on.
        ends = [np.full(n, 100 + i, dtype=np.int32) for i, n in enumerate(responses)]
        streams = tuple(Stream.of("x", begin, end) for end in ends)
        parts = [streams[:2], *((stream,) for stream in streams[2:])]
        examples += [Example(part, 1.0, "") for part in parts]
    return Segments.of(make_batch(examples, share_prefixes=True))


def tensors(lengths: list[int], heads: tuple[int, int], dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(len(lengths))
    many, few = heads
    return [
        torch.randn(1, h, sum(lengths), 8, dtype=dtype, requires_grad=True)
        for h in (many, few, few)
    ]


def plainly(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: list[list[int]]
) -> torch.Tensor:
    """Softmax over the tokens that each token sees, in words of mathematics: [1, T, H, d]."""
    shared = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
    rows = []
    for t, tokens in enumerate(seen):
        scores = torch.einsum("hd,hkd->hk", q[0, :, t], k[0][:, tokens]) / q.shape[-1] ** 0.5
        rows.append(torch.einsum("hk,hkd->hd", scores.softmax(-1), v[0][:, tokens]))
    return torch.stack(rows)[None]


def seen_by(lengths: list[int], parents: list[int]) -> list[list[int]]:
    starts = [0, *itertools.accumulate(lengths)]
    seen = []
    for s, (n, parent) in enumerate(zip(lengths, parents, strict=True)):
        before = list(range(starts[parent], starts[parent + 1])) if parent >= 0 else []
        seen += [before + list(range(starts[s], starts[s] + t + 1)) for t in range(n)]
    return seen


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("heads", [(2, 2), (6, 2)])
@pytest.mark.parametrize("rows", [2, 3, attention.CPU_ROWS])
def test_values_and_gradients_are_those_of_plain_attention(groups, heads, rows, monkeypatch):
    monkeypatch.setattr(attention, "CPU_ROWS", rows)
    lengths, parents = layout(groups)
    q, k, v = tensors(lengths, heads, torch.float64)
    out, _ = packed_attention(nn.Module(), q, k, v, None, segments=segments_of(groups))
    expected = plainly(q, k, v, seen_by(lengths, parents))
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(out)
    found = torch.autograd.grad((out * weights).sum(), (q, k, v))
    wanted = torch.autograd.grad((expected * weights).sum(), (q, k, v))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_without_segments_all_is_one_sequence():
    q, k, v = tensors([6], (2, 2), torch.float64)
    out, _ = packed_attention(nn.Module(), q, k, v, None)
    torch.testing.assert_close(out, plainly(q, k, v, seen_by([6], [-1])))


@pytest.mark.parametrize("rows", [1, 3, 4, 5, attention.CPU_ROWS])
def test_a_window_ends_what_a_token_sees(rows, monkeypatch):
    monkeypatch.setattr(attention, "CPU_ROWS", rows)
    lengths = [9, 3]
    q, k, v = tensors(lengths, (2, 2), torch.float64)
    segments = segments_of([(8, [1]), (1, [2])])
    out, _ = packed_attention(nn.Module(), q, k, v, None, segments=segments, sliding_window=4)
    seen = [tokens[-4:] for tokens in seen_by(lengths, [-1, -1])]
    expected = plainly(q, k, v, seen)
    torch.testing.assert_close(out, expected)
    weights = torch.randn_like(out)
    found = torch.autograd.grad((out * weights).sum(), (q, k, v))
    wanted = torch.autograd.grad((expected * weights).sum(), (q, k, v))
    torch.testing.assert_close(found, wanted)
    shared = segments_of([(4, [5, 3])])
    with pytest.raises(NotImplementedError, match="a sliding window is not shared"):
        packed_attention(nn.Module(), q, k, v, None, segments=shared, sliding_window=4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("window", [None, 3])
def test_blocks_in_the_types_of_models(dtype, window, monkeypatch):
    """Layers of either kind over one pack, each behind the other."""
    monkeypatch.setattr(attention, "CPU_ROWS", 2)
    segments = segments_of([(5, [4]), (1, [1]), (3, [4])])
    lengths = list(segments.lengths)
    seen = seen_by(lengths, [-1] * len(lengths))
    for layer in (None, window, None, window):
        q, k, v = tensors(lengths, (6, 2), dtype)
        out, _ = packed_attention(
            nn.Module(), q, k, v, None, segments=segments, sliding_window=layer
        )
        q, k, v = (x.detach().double() for x in (q, k, v))
        expected = plainly(q, k, v, [tokens[-layer:] for tokens in seen] if layer else seen)
        bound = 1e-2 if dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(out.double(), expected, rtol=bound, atol=bound)
    assert out.dtype == dtype


def test_a_pack_has_one_mask_for_all_layers(monkeypatch):
    """Kept for the backward pass are views of it, and no masks of their own."""
    monkeypatch.setattr(attention, "CPU_ROWS", 3)
    groups: Groups = [(4, [9, 2]), (7, [1])]
    segments = segments_of(groups)
    assert not segments.masks
    kept = set()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.add((x.shape, x.untyped_storage().data_ptr())) or x, lambda x: x
    ):
        for _ in range(2):
            q, k, v = tensors(list(segments.lengths), (2, 2), torch.float32)
            packed_attention(nn.Module(), q, k, v, None, segments=segments)
    (mask,) = segments.masks.values()
    masks = [place for shape, place in kept if len(shape) == 2]
    assert masks and set(masks) == {mask.untyped_storage().data_ptr()}


def test_what_a_block_sees_beside_its_part_of_the_mask():
    """As on a GPU, where each block has its own."""
    segments = segments_of([(6, [5]), (2, [1, 3])])
    query = torch.zeros(1, 1, 4, 8)
    for window in (None, 1, 2, 5, 20):
        whole = attention._stairs(segments, 4, window, query)
        last = whole.shape[1] - 4
        for earlier in range(min(11, window or 11)):
            for rows in range(1, 5):
                part = whole[:rows, last - earlier : last + rows]
                seen = attention._seen(rows, earlier, window, query.device)
                assert torch.equal(part == 0, seen) and torch.equal(part < 0, ~seen)
                for t in range(rows):
                    tokens = list(range(earlier + t + 1))[-(window or 99) :]
                    assert seen[t].nonzero().flatten().tolist() == tokens


def test_gradients_of_keys_are_not_added_up_in_half_precision():
    """300 blocks of queries that see the same key: a sum in bf16 would stop at 256."""
    x = torch.randn(1, 2, 4, 8, dtype=torch.bfloat16, requires_grad=True)
    parts = _slices(x, [(0, 3)] * 300)
    torch.stack(parts).sum().backward()
    wanted = torch.zeros(1, 2, 4, 8, dtype=torch.bfloat16)
    wanted[:, :, :3] = 300
    torch.testing.assert_close(x.grad, wanted, rtol=0, atol=0)


groups_lists = st.lists(
    st.tuples(st.integers(1, 6), st.lists(st.integers(1, 4), min_size=1, max_size=4)),
    min_size=1,
    max_size=5,
)


@given(groups_lists)
@settings(max_examples=50)
def test_keys_are_gathered_for_a_kernel_of_variable_lengths(groups):
    """What a GPU's kernel is given: query s is the end of its keys, and gradients add up."""
    lengths, parents = layout(groups)
    segments = segments_of(groups)
    assert segments.lengths == tuple(lengths) and segments.parents == tuple(parents)
    x = torch.randn(sum(lengths), 2, 3, dtype=torch.float64, requires_grad=True)
    gathered = _gathered(x, segments)
    starts = [0, *itertools.accumulate(lengths)]
    wanted = []
    for s, parent in enumerate(parents):
        if parent >= 0:
            wanted.append(x[starts[parent] : starts[parent + 1]])
        wanted.append(x[starts[s] : starts[s + 1]])
        assert segments.cu_keys[s + 1] - segments.cu_keys[s] == segments.keys[s]
    assert torch.equal(gathered, torch.cat(wanted))
    weights = torch.randn_like(gathered)
    (found,) = torch.autograd.grad((gathered * weights).sum(), x)
    (expected,) = torch.autograd.grad((torch.cat(wanted) * weights).sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)
    for _, tokens in segments.key_places[1]:
        assert len(tokens.unique()) == len(tokens)
