"""Examples -> packs: what lands where, and that cutting a batch loses and doubles nothing."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastalign.batch import Batch, Cost, make_batch, plan_batches
from fastalign.checkpoint import Position
from fastalign.config import parse_config
from fastalign.data import Example, Stream
from fastalign.train import batches


def stream(role: str, prompt: list[int], completion: list[int]) -> Stream:
    return Stream.of(role, np.array(prompt, np.int32), np.array(completion, np.int32))


NEGATIVE = Example(
    (stream("plain", [1, 2], [3, 4]), stream("judged", [5], [3, 4])), weight=0.5, source="f:1"
)
POSITIVE = Example((stream("plain", [6, 7, 8], [9]),), weight=2.0, source="f:2")
PAIR = Example((stream("chosen", [1, 2], [3, 4]), stream("rejected", [1, 2], [5])), 1.0, "f:3")


def test_streams_lie_end_to_end_and_rows_predict_the_answer():
    batch = make_batch([NEGATIVE, POSITIVE])
    assert batch.input_ids.tolist() == [1, 2, 3, 4, 5, 3, 4, 6, 7, 8, 9]
    assert batch.positions.tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3]
    assert batch.cu_seqlens_q.tolist() == [0, 4, 7, 11]
    # Row t predicts token t + 1; the last token of a sequence predicts nothing.
    assert batch.rows.tolist() == [1, 2, 4, 5, 9]
    assert batch.targets.tolist() == [3, 4, 3, 4, 9]
    assert batch.cu_rows.tolist() == [0, 2, 4, 5]
    assert batch.streams.tolist() == [0, 0, 1, 1, 2]
    assert batch.roles == ("plain", "judged", "plain")
    assert batch.records.tolist() == [0, 0, 1]
    assert batch.weights.tolist() == [0.5, 2.0]
    assert batch.sources == ("f:1", "f:2")
    assert batch.num_tokens == 11


def test_a_mask_with_holes_keeps_the_rows_of_every_trained_turn():
    ids = np.arange(10, 17, dtype=np.int32)
    mask = np.array([0, 0, 1, 1, 0, 0, 1], np.bool_)
    batch = make_batch([Example((Stream("plain", ids, mask),), 1.0, "")])
    assert batch.rows.tolist() == [1, 2, 5]
    assert batch.targets.tolist() == [12, 13, 16]


def test_select_gives_one_roles_rows_with_their_records():
    batch = make_batch([POSITIVE, NEGATIVE, POSITIVE])
    index, cu, records = batch.select("plain")
    assert batch.targets[index].tolist() == [9, 3, 4, 9]
    assert cu.tolist() == [0, 1, 3, 4]
    assert records.tolist() == [0, 1, 2]
    index, cu, records = batch.select("judged")
    assert batch.targets[index].tolist() == [3, 4]
    assert (cu.tolist(), records.tolist()) == ([0, 2], [1])
    index, cu, records = batch.select("chosen")
    assert (index.tolist(), cu.tolist(), records.tolist()) == ([], [0], [])


def test_nothing_is_shared_unless_asked_for():
    batch = make_batch([PAIR])
    assert batch.key_index is None and batch.cu_seqlens_k is batch.cu_seqlens_q
    assert batch.num_tokens == 7 and batch.bounds == batch.key_bounds == (0, 4, 7)
    assert batch.num_pairs == 10 + 6


def test_a_shared_prompt_is_there_once():
    batch = make_batch([PAIR, POSITIVE], share_prefixes=True)
    assert batch.input_ids.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert batch.bounds == (0, 2, 4, 5, 9) and batch.key_bounds == (0, 2, 6, 9, 13)
    assert batch.key_index is not None
    assert batch.input_ids[batch.key_index[6:9]].tolist() == [1, 2, 5]
    assert batch.segments.tolist() == [1, 2, 3] and batch.records.tolist() == [0, 0, 1]
    assert batch.num_pairs == 3 + (3 + 4) + 3 + 10
    # Rows and what selects them are as without sharing.
    plain = make_batch([PAIR, POSITIVE])
    assert batch.targets.tolist() == plain.targets.tolist()
    for role in ("chosen", "rejected", "plain"):
        for ours, theirs in zip(batch.select(role), plain.select(role), strict=True):
            assert ours.tolist() == theirs.tolist()


def tensors(batch: Batch) -> dict[str, torch.Tensor]:
    return {name: x for name, x in vars(batch).items() if isinstance(x, torch.Tensor)}


@pytest.mark.parametrize("share", [False, True])
def test_a_pack_is_one_block_of_memory_that_moves_at_once(share):
    batch = make_batch([NEGATIVE, PAIR], share_prefixes=share)
    place = batch.memory.untyped_storage().data_ptr()
    assert all(x.untyped_storage().data_ptr() == place for x in tensors(batch).values())
    moved = batch.to(torch.device("meta"))
    for name, x in tensors(moved).items():
        there = tensors(batch)[name]
        assert x.device.type == "meta"
        assert (x.shape, x.dtype) == (there.shape, there.dtype)
        assert x.storage_offset() == there.storage_offset()
    assert tensors(moved).keys() == tensors(batch).keys()
    assert moved.roles == batch.roles and moved.bounds == batch.bounds
    same = batch.to(torch.device("cpu"))
    assert all(torch.equal(x, tensors(batch)[name]) for name, x in tensors(same).items())


@pytest.mark.gpu
def test_a_pack_on_a_gpu_holds_the_same():
    batch = make_batch([NEGATIVE, PAIR], share_prefixes=True)
    assert batch.memory.is_pinned()
    moved = batch.to(torch.device("cuda"))
    assert all(torch.equal(x.cpu(), tensors(batch)[name]) for name, x in tensors(moved).items())


def test_a_pack_with_another_tensor_does_not_move():
    batch = replace(make_batch([NEGATIVE]), rows=torch.zeros(4, dtype=torch.int64))
    with pytest.raises(AssertionError):
        batch.to(torch.device("meta"))


def ragged(lengths: list[int]) -> list[Example]:
    """Example i has ``lengths[i]`` tokens, all of which are i + 1."""
    return [
        Example((stream("plain", [i + 1], [i + 1] * (length - 1)),), float(i + 1), f"f:{i + 1}")
        for i, length in enumerate(lengths)
    ]


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=20),
    budget=st.integers(1, 120),
    world_size=st.integers(1, 5),
)
def test_every_example_counts_once_however_a_batch_is_cut(lengths, budget, world_size):
    examples = ragged(lengths)
    ranks = [plan_batches(examples, budget, rank, world_size) for rank in range(world_size)]
    # Every pack of a rank meets one of every other rank: collectives pair up.
    assert len({len(packs) for packs in ranks}) == 1
    seen: Counter[str] = Counter()
    for batch in (batch for packs in ranks for batch in packs):
        sequences = batch.cu_seqlens_q.diff().tolist()
        assert batch.num_tokens <= budget or len(sequences) == 1
        for s, (source, weight) in enumerate(zip(batch.sources, batch.weights, strict=True)):
            example = examples[int(source[2:]) - 1]
            tokens = batch.input_ids[batch.cu_seqlens_q[s] : batch.cu_seqlens_q[s + 1]]
            assert tokens.tolist() == example.streams[0].input_ids.tolist()
            if weight:
                assert weight == example.weight
                seen[source] += 1
    assert seen == {example.source: 1 for example in examples}


@settings(deadline=None, max_examples=40)
@given(
    negative=st.lists(st.booleans(), min_size=1, max_size=12),
    budget=st.integers(1, 40),
    world_size=st.integers(1, 3),
)
def test_a_records_streams_stay_in_one_pack(negative, budget, world_size):
    """However small the budget: the contrast needs both at once.  A positive costs one stream."""
    examples = [NEGATIVE if bad else POSITIVE for bad in negative]
    packs = [
        b for rank in range(world_size) for b in plan_batches(examples, budget, rank, world_size)
    ]
    live = [b for b in packs if b.weights.any()]
    for batch in live:
        for record, source in enumerate(batch.sources):
            mine = batch.records == record
            roles = [role for role, own in zip(batch.roles, mine.tolist(), strict=True) if own]
            assert roles == (["plain", "judged"] if source == "f:1" else ["plain"])
    assert sum(b.num_tokens for b in live) == sum(7 if bad else 4 for bad in negative)


@pytest.mark.parametrize("world_size", [2, 3])
def test_idle_ranks_repeat_the_shortest_example_at_weight_zero(world_size):
    examples = ragged([30, 5])
    ranks = [plan_batches(examples, 1000, rank, world_size) for rank in range(world_size)]
    idle = [b for packs in ranks for b in packs if not b.weights.any()]
    assert len(idle) == world_size - 2 and all(b.sources == ("f:2",) for b in idle)
    idle = plan_batches(examples[:1], 1000, 1, 2)
    assert [b.weights.tolist() for b in idle] == [[0.0]]
    assert idle[0].input_ids.tolist() == [1] * 30


def test_the_quadratic_cost_decides_who_gets_what():
    """One of 80 tokens takes as much attention as four of 40, though only half of their tokens."""
    examples = ragged([80, 40, 40, 40, 40])
    by_rank = [
        [b.sources for b in plan_batches(examples, 1000, rank, 2, Cost(token=0, pair=1))]
        for rank in (0, 1)
    ]
    # 80 x 81 / 2 = 3240 pairs, against 4 x 820.
    assert by_rank == [[("f:2", "f:3", "f:4", "f:5")], [("f:1",)]]
    by_tokens = [plan_batches(examples, 1000, rank, 2)[0].num_tokens for rank in (0, 1)]
    assert by_tokens == [120, 120]


def test_rows_of_the_head_count_as_well():
    short, long = stream("plain", [1] * 9, [2]), stream("plain", [1], [2] * 9)
    examples = [Example((s,), 1.0, "") for s in (long, short, short, long)]
    ranks = [plan_batches(examples, 100, rank, 2, Cost(row=1)) for rank in (0, 1)]
    assert [sum(b.rows.numel() for b in packs) for packs in ranks] == [10, 10]


def test_a_shared_prompt_counts_once_in_the_plan():
    examples = [
        Example(tuple(stream("plain", [7 + e] * 50, [i]) for i in range(4)), 1.0, "")
        for e in range(4)
    ]
    assert len(plan_batches(examples, 216, 0, 1)) == 4
    assert [b.num_tokens for b in plan_batches(examples, 216, 0, 1, share_prefixes=True)] == [216]


def test_examples_of_one_prompt_share_it_wherever_they_are_in_a_batch():
    """Answers to four prompts in turns; losses see records, streams and weights as ever."""
    examples = [
        Example((stream("plain", [p] * 50, [10 + turn]),), turn + p / 8, f"{p} {turn}")
        for turn in range(3)
        for p in range(4)
    ]
    (apart,) = plan_batches(examples, 1000, 0, 1)
    (shared,) = plan_batches(examples, 1000, 0, 1, share_prefixes=True)
    assert apart.num_tokens == 12 * 51 and shared.num_tokens == 4 * 50 + 12
    assert shared.sources == tuple(f"{p} {turn}" for p in range(4) for turn in range(3))
    assert shared.records.tolist() == list(range(12)) and shared.streams.tolist() == list(range(12))
    assert shared.weights.tolist() == [turn + p / 8 for p in range(4) for turn in range(3)]
    assert shared.targets.tolist() == [10, 11, 12] * 4
    packs = [plan_batches(examples, 120, rank, 2, share_prefixes=True) for rank in (0, 1)]
    assert [[b.num_tokens for b in mine] for mine in packs] == [[106], [106]]


def test_a_resumed_run_cuts_the_same_packs(tmp_path):
    """Examples come in an order of seed, round and position, and packs from examples alone."""
    config = parse_config(
        {"method": "sft", "model_name_or_path": "model", "datasets": [{"path": "a.jsonl"}]}
        | {"output_dir": str(tmp_path), "global_batch_size": 8}
    )
    examples = ragged(np.random.default_rng(0).integers(2, 40, 50).tolist())

    def packs(position: Position) -> dict[int, list[list[int]]]:
        return {
            index: [b.input_ids.tolist() for b in plan_batches(part, 100, 1, 2)]
            for index, part in batches(config, examples, position)
        }

    whole = packs(Position(round=3))
    assert list(whole) == list(range(7)) and whole != packs(Position(round=4))
    for batch in range(7):
        assert packs(Position(round=3, batch=batch)) == {
            index: part for index, part in whole.items() if index >= batch
        }
