"""Measuring, packing and planning in the native core, against the same thing in plain Python."""

from __future__ import annotations

import gc
import itertools
import json
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastalign import _bridge

# How long an example takes says nothing on a machine that does other things as well.
calm = settings(deadline=None)

DATA = Path(__file__).parents[2] / "shared/data"
# Of the logarithm of a dialogue's tokens by SmolLM2's tokenizer: fitted to the 3000 of HH-RLHF's
# harmless-base test split and the 1000 of Shepherd, together.
LOG_MEAN, LOG_DEVIATION = 4.87, 0.78


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, dtype=np.int32)


def mask(*flags: int) -> np.ndarray:
    return np.array(flags, dtype=bool)


def int64(values: list[int]) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def ragged(input_ids, loss_mask, counts=None, weights=None, share_prefixes=False):
    counts = [1] * len(input_ids) if counts is None else counts
    weights = np.ones(len(counts), np.float32) if weights is None else weights
    return _bridge.Ragged(input_ids, loss_mask, int64(counts), weights, share_prefixes)


def pack(packer: _bridge.Ragged, examples: list[int]) -> dict[str, np.ndarray]:
    size, fields = packer.layout(int64(examples))
    memory = np.zeros(size, np.uint8)
    packer.fill(int64(examples), memory)
    return {name: memory[begin:end].view(dtype) for name, dtype, begin, end in fields}


# ---------------------------------------------------------------------------------- packing

# An example is a list of streams, a stream a list of (token, whether it is trained on).
Examples = list[list[list[tuple[int, bool]]]]

tokens = st.integers(min_value=0, max_value=2**31 - 1)
streams = st.builds(
    lambda first, rest: [(first, False), *rest],
    tokens,
    st.lists(st.tuples(tokens, st.booleans()), max_size=20),
)
# Few different tokens, rarely trained on, so that prefixes meet.
alike = st.lists(
    st.tuples(st.integers(0, 1), st.integers(0, 6).map(lambda x: x == 0)), min_size=1, max_size=12
).map(lambda rest: [(rest[0][0], False), *rest[1:]])
grouped = st.lists(st.lists(st.one_of(streams, alike), min_size=1, max_size=4), max_size=5)


def prompt_of(example) -> list[int]:
    """What the streams begin with alike, none of it trained on, and not all of any stream."""
    shared = 0
    while all(len(s) > shared + 1 for s in example):
        if len({s[shared][0] for s in example}) > 1 or any(s[shared][1] for s in example):
            break
        shared += 1
    return [token for token, _ in example[0][:shared]]


def model_of_pack(examples: Examples, share: bool) -> dict[str, list[int]]:
    # Runs of examples that begin with the same prompt share it.
    runs = [list(run) for _, run in itertools.groupby(examples, prompt_of)]
    runs = [part for run in runs for part in ([run] if prompt_of(run[0]) else [[e] for e in run])]
    anything = False
    packed: dict[str, list[int]] = {"cu_seqlens_q": [0], "cu_seqlens_k": [0], "cu_rows": [0]}
    packed |= {name: [] for name in ("input_ids", "positions", "rows", "targets", "streams")}
    packed |= {name: [] for name in ("key_index", "records", "segments")}

    def segment(stream, begin, end, prefix_at):
        start = len(packed["input_ids"])
        packed["input_ids"] += [token for token, _ in stream[begin:end]]
        packed["positions"] += range(begin, end)
        keys = [*range(prefix_at, prefix_at + begin), *range(start, start + end - begin)]
        packed["key_index"] += keys
        packed["cu_seqlens_q"].append(len(packed["input_ids"]))
        packed["cu_seqlens_k"].append(len(packed["key_index"]))
        return keys

    record = 0
    for run in runs:
        several = sum(map(len, run)) > 1
        shared = len(prompt_of(run[0])) if share and several else 0
        anything |= shared > 0
        prefix_at = len(packed["input_ids"])
        if shared:
            segment(run[0][0], 0, shared, prefix_at)
        for example in run:
            for stream in example:
                keys = segment(stream, shared, len(stream), prefix_at)
                for t in range(1, len(stream)):
                    if stream[t][1]:
                        packed["rows"].append(keys[t - 1])
                        packed["targets"].append(stream[t][0])
                        packed["streams"].append(len(packed["records"]))
                packed["records"].append(record)
                packed["segments"].append(len(packed["cu_seqlens_q"]) - 2)
                packed["cu_rows"].append(len(packed["rows"]))
            record += 1
    if not anything:
        del packed["key_index"], packed["cu_seqlens_k"]
    return packed


def of(examples: Examples, share: bool, mask_dtype=np.bool_) -> _bridge.Ragged:
    flat = [stream for example in examples for stream in example]
    return ragged(
        [np.array([token for token, _ in s], dtype=np.int32) for s in flat],
        [np.array([trained for _, trained in s], dtype=mask_dtype) for s in flat],
        [len(example) for example in examples],
        np.arange(len(examples), dtype=np.float32),
        share,
    )


@calm
@given(grouped, st.booleans(), st.sampled_from([np.bool_, np.uint8]), st.data())
def test_pack_matches_the_model(examples, share, mask_dtype, data):
    """Of some of the examples in any order, one maybe twice."""
    chosen = data.draw(st.lists(st.sampled_from(range(len(examples))))) if examples else []
    packed = pack(of(examples, share, mask_dtype), chosen)
    expected = model_of_pack([examples[i] for i in chosen], share) | {"weights": chosen}
    assert packed.keys() == expected.keys()
    for name, values in expected.items():
        assert packed[name].tolist() == values, name


@calm
@given(grouped, st.booleans())
def test_examples_are_measured_as_they_are_packed(examples, share):
    packer = of(examples, share)
    for e, example in enumerate(examples):
        one = model_of_pack([example], share)
        assert packer.tokens[e] == len(one["input_ids"])
        assert packer.rows[e] == len(one["rows"])
        queries = one["cu_seqlens_q"]
        ends = one.get("cu_seqlens_k", queries)
        # Query i of q, behind k - q keys that are not queries, sees k - q + i + 1.
        assert packer.pairs[e] == sum(
            k - q + i + 1
            for q, k in zip(np.diff(queries).tolist(), np.diff(ends).tolist(), strict=True)
            for i in range(q)
        )


class Unpacked(NamedTuple):
    input_ids: list[int]
    positions: list[int]
    targets: dict[int, int]


def unpack(packed: dict[str, np.ndarray], stream: int) -> Unpacked:
    """A stream as its attention call sees it: tokens and positions of its keys, and by the position
    that predicts it each target."""
    segment = packed["segments"][stream]
    ends = packed.get("cu_seqlens_k", packed["cu_seqlens_q"])
    keys = np.arange(ends[segment], ends[segment + 1])
    keys = packed["key_index"][keys] if "key_index" in packed else keys
    queries = np.arange(*packed["cu_seqlens_q"][segment : segment + 2])
    # Attention over queries and keys of different number lines up their ends.
    assert keys[len(keys) - len(queries) :].tolist() == queries.tolist()
    rows = slice(*packed["cu_rows"][stream : stream + 2])
    assert set(packed["streams"][rows].tolist()) <= {stream}
    assert set(packed["rows"][rows].tolist()) <= set(keys.tolist())
    positions = packed["positions"][packed["rows"][rows]].tolist()
    return Unpacked(
        packed["input_ids"][keys].tolist(),
        packed["positions"][keys].tolist(),
        dict(zip(positions, packed["targets"][rows].tolist(), strict=True)),
    )


@calm
@given(grouped, st.booleans())
def test_a_pack_holds_every_stream_exactly(examples, share):
    packed = pack(of(examples, share), list(range(len(examples))))
    flat = [(r, stream) for r, example in enumerate(examples) for stream in example]
    assert packed["records"].tolist() == [record for record, _ in flat]
    for s, (_, stream) in enumerate(flat):
        assert unpack(packed, s) == Unpacked(
            [token for token, _ in stream],
            list(range(len(stream))),
            {t - 1: token for t, (token, trained) in enumerate(stream) if trained},
        )


def test_pack_by_hand():
    packed = pack(
        ragged(
            [ids(11, 12, 13, 14), ids(21), ids(31, 32)],
            [mask(0, 0, 1, 1), mask(0), mask(0, 1)],
            [1, 2],
            np.array([0.5, 2.0], np.float32),
        ),
        [1, 0],
    )
    assert {name: values.tolist() for name, values in packed.items()} == {
        "input_ids": [21, 31, 32, 11, 12, 13, 14],
        "positions": [0, 0, 1, 0, 1, 2, 3],
        "rows": [1, 4, 5],
        "targets": [32, 13, 14],
        "streams": [1, 2, 2],
        "records": [0, 0, 1],
        "cu_seqlens_q": [0, 1, 3, 7],
        "cu_rows": [0, 0, 1, 3],
        "segments": [0, 1, 2],
        "weights": [2.0, 0.5],
    }


def test_shared_prefix_by_hand():
    """A prompt with two answers, and an example of one stream, which shares nothing."""
    packed = pack(
        ragged(
            [ids(1, 2, 3, 4), ids(1, 2, 5), ids(1, 2)],
            [mask(0, 0, 1, 1), mask(0, 0, 1), mask(0, 1)],
            [2, 1],
            share_prefixes=True,
        ),
        [0, 1],
    )
    assert {name: values.tolist() for name, values in packed.items()} == {
        "input_ids": [1, 2, 3, 4, 5, 1, 2],
        "positions": [0, 1, 2, 3, 2, 0, 1],
        # Token 1, the prompt's last, predicts the first token of both answers.
        "rows": [1, 2, 1, 5],
        "targets": [3, 4, 5, 2],
        "streams": [0, 0, 1, 2],
        "key_index": [0, 1, 0, 1, 2, 3, 0, 1, 4, 5, 6],
        "records": [0, 0, 1],
        "cu_seqlens_q": [0, 2, 4, 5, 7],
        "cu_seqlens_k": [0, 2, 6, 9, 11],
        "cu_rows": [0, 2, 3, 4],
        "segments": [1, 2, 3],
        "weights": [1.0, 1.0],
    }


def test_examples_of_one_prompt_share_it_where_they_follow_one_another():
    """Two answers, another prompt, a pair; two streams that are the same stay two."""
    answers = [ids(1, 2, 3), ids(1, 2, 4), ids(8, 9), ids(1, 2, 3), ids(1, 2, 5)]
    masks = [mask(0, 0, 1), mask(0, 0, 1), mask(0, 1), mask(0, 0, 1), mask(0, 0, 1)]
    packer = ragged(answers, masks, [1, 1, 1, 2], share_prefixes=True)
    assert packer.tokens.tolist() == [3, 3, 2, 4]
    together = pack(packer, [0, 1, 3, 2])
    assert together["input_ids"].tolist() == [1, 2, 3, 4, 3, 5, 8, 9]
    assert together["cu_seqlens_q"].tolist() == [0, 2, 3, 4, 5, 6, 8]
    assert together["rows"].tolist() == [1, 1, 1, 1, 6]
    assert together["records"].tolist() == [0, 1, 2, 2, 3]
    assert together["targets"].tolist() == [3, 4, 3, 5, 9]
    apart = pack(packer, [0, 2, 1])
    assert apart["input_ids"].tolist() == [1, 2, 3, 8, 9, 1, 2, 4] and "key_index" not in apart


def test_a_shared_prefix_holds_no_target_and_no_whole_stream():
    same = ids(1, 2, 3, 4)
    for masks, shared in (
        ([mask(0, 0, 0, 1), mask(0, 0, 0, 1)], 3),
        ([mask(0, 0, 0, 1), mask(0, 1, 0, 1)], 1),
        ([mask(0, 0, 0, 0), mask(0, 0, 0, 0)], 3),
    ):
        packed = pack(ragged([same, same], masks, [2], share_prefixes=True), [0])
        assert packed["cu_seqlens_q"].tolist() == [0, shared, 4, 8 - shared]


def test_without_anything_shared_keys_are_the_tokens():
    different = ragged([ids(1, 2), ids(3, 4)], [mask(0, 1)] * 2, [2], share_prefixes=True)
    assert not {"key_index", "cu_seqlens_k"} & pack(different, [0]).keys()
    alike = ragged([ids(1, 2), ids(1, 4)], [mask(0, 1)] * 2, [2])
    assert not {"key_index", "cu_seqlens_k"} & pack(alike, [0]).keys()


def test_pack_never_predicts_across_a_boundary():
    """The last token of a sequence has no row, whatever the next sequence holds."""
    packed = pack(ragged([ids(1, 2)] * 3, [mask(0, 1)] * 3), [0, 1, 2])
    assert packed["rows"].tolist() == [0, 2, 4]
    assert packed["targets"].tolist() == [2, 2, 2]


def test_any_mask_byte_but_zero_is_true():
    packed = pack(ragged([ids(1, 2, 3)], [np.array([0, 255, 2], dtype=np.uint8)]), [0])
    assert packed["targets"].tolist() == [2, 3]


@calm
@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.booleans())
def test_long_runs_of_a_mask_begin_and_end_anywhere(runs, trained):
    """Masks are searched eight bytes at a time."""
    flags = [False]
    for length in runs:
        flags += [trained] * length
        trained = not trained
    n = len(flags)
    packed = pack(ragged([np.arange(n, dtype=np.int32)], [np.array(flags)]), [0])
    assert packed["targets"].tolist() == [t for t in range(n) if flags[t]]
    assert packed["rows"].tolist() == [t - 1 for t in range(n) if flags[t]]


def test_pack_of_nothing():
    packed = pack(ragged([], []), [])
    assert packed["cu_seqlens_q"].tolist() == packed["cu_rows"].tolist() == [0]
    assert packed["input_ids"].size == packed["rows"].size == packed["weights"].size == 0
    assert pack(ragged([ids(1)], [mask(0)]), [])["input_ids"].size == 0


def test_arrays_begin_where_kernels_like_them():
    size, fields = ragged([ids(1, 2, 3)], [mask(0, 0, 1)]).layout(int64([0]))
    ends = [0, *(end for *_, end in fields), size]
    for (_, _, begin, end), before in zip(fields, ends, strict=False):
        assert begin % 64 == 0 and before <= begin <= end <= size


def test_pack_reads_borrowed_read_only_slices_and_other_buffers():
    flat = np.arange(10, dtype=np.int32)
    flat.flags.writeable = False
    bytes_ = memoryview(bytes([0, 1]))
    other = memoryview(flat)[7:9]
    packed = pack(ragged([flat[2:5], other], [mask(0, 1, 0), bytes_]), [0, 1])
    assert packed["input_ids"].tolist() == [2, 3, 4, 7, 8]
    assert packed["targets"].tolist() == [3, 8]


def test_borrowed_arrays_outlive_the_lists_that_named_them():
    input_ids = [np.arange(1000, dtype=np.int32) for _ in range(50)]
    masks = [np.arange(1000) > 0 for _ in range(50)]
    packer = ragged(input_ids, masks)
    input_ids.clear()
    masks.clear()
    gc.collect()
    # Whatever takes freed memory next would overwrite the arrays.
    churn = [np.full(1000, -1, dtype=np.int32) for _ in range(200)]
    packed = pack(packer, list(range(50)))
    assert packed["input_ids"].reshape(50, 1000).tolist() == [list(range(1000))] * 50
    del churn


def test_measures_outlive_what_was_measured_and_are_read_only():
    measured = ragged([ids(1, 2, 3)], [mask(0, 1, 1)])
    lengths = measured.tokens
    del measured
    gc.collect()
    churn = [np.full(1, -1, dtype=np.int64) for _ in range(100)]
    assert lengths.tolist() == [3] and not lengths.flags.writeable
    del churn


def guarded(packer: _bridge.Ragged, examples: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Memory for a pack, and the whole array of which it is the middle."""
    size, _ = packer.layout(int64(examples))
    whole = np.full(size + 256, 171, np.uint8)
    return whole[128 : 128 + size], whole


@pytest.mark.parametrize("after", [mask(0, 1, 1, 1, 1), mask(0, 0, 0, 0, 0), mask(1, 0, 0, 0, 0)])
def test_a_mask_that_changes_after_it_was_measured_writes_nothing_beside_the_pack(after):
    changing = mask(0, 0, 1, 0, 1)
    packer = ragged([ids(1, 2, 3, 4, 5)] * 2, [changing, mask(0, 0, 0, 0, 1)])
    memory, whole = guarded(packer, [1, 0])
    changing[:] = after
    with pytest.raises(ValueError, match=r"^loss_mask\[0\] was changed while it was packed$"):
        packer.fill(int64([1, 0]), memory)
    assert set(whole[:128].tolist()) == set(whole[-128:].tolist()) == {171}


def test_another_thread_may_scribble_over_the_arrays_while_they_are_packed():
    """Whatever comes out: nothing beside the pack is written, and no id in it is negative."""
    rng = np.random.default_rng(0)
    input_ids = rng.integers(0, 9, (64, 4096)).astype(np.int32)
    masks = rng.random((64, 4096)) < 0.5
    masks[:, 0] = False
    packer = ragged(list(input_ids), list(masks), [2] * 32, share_prefixes=True)
    memory, whole = guarded(packer, list(range(32)))
    _, fields = packer.layout(int64(range(32)))
    places = {name: memory[begin:end].view(dtype) for name, dtype, begin, end in fields}
    done = threading.Event()

    def scribble() -> None:
        while not done.is_set():
            masks[rng.integers(64), 1:] ^= True
            input_ids[rng.integers(64)] *= -1

    thread = threading.Thread(target=scribble)
    thread.start()
    outcomes = set()
    try:
        for _ in range(200):
            try:
                packer.fill(int64(range(32)), memory)
                outcomes.add("packed")
                assert places["input_ids"].min() >= 0 and places["targets"].min() >= 0
            except ValueError as error:
                outcomes.add(str(error).split()[-1])
    finally:
        done.set()
        thread.join()
    assert outcomes & {"packed", "negative"}
    assert set(whole[:128].tolist()) == set(whole[-128:].tolist()) == {171}


GOOD = (ids(1, 2), mask(0, 1))


@pytest.mark.parametrize(
    ("bad_ids", "bad_mask", "message"),
    [
        (ids(1, 2, 3), mask(0, 1), r"loss_mask\[1\] has 2 entries but input_ids\[1\] has 3 tokens"),
        (ids(), mask(), r"input_ids\[1\] is empty; every sequence needs a token"),
        (ids(5, 6), mask(1, 1), r"loss_mask\[1\]\[0\] is true, .* \(input_ids 5\)"),
        (ids(5, -100), mask(0, 1), r"input_ids\[1\]\[1\] is -100; token ids are not negative"),
        (ids(1, 2).astype(np.int64), mask(0, 1), r"input_ids\[1\] .* int32, got int64"),
        (ids(1, 2).astype(">i4"), mask(0, 1), r"input_ids\[1\] .* int32, got >i4"),
        (ids(1, 2).astype(np.uint32), mask(0, 1), r"input_ids\[1\] .* int32, got uint32"),
        (ids(1, 2), np.zeros(2, np.float32), r"loss_mask\[1\] .* bool or uint8, got float32"),
        (ids(1, 2), np.zeros(2, np.int8), r"loss_mask\[1\] .* bool or uint8, got int8"),
        (
            np.ndarray(2, np.int32, bytes(9), 1),
            mask(0, 1),
            r"input_ids\[1\] must be aligned .* 4 .*",
        ),
        (np.zeros((1, 2), np.int32), mask(0, 1), r"input_ids\[1\] must have 1 dimension, got 2"),
        (np.zeros(4, np.int32)[::2], mask(0, 1), r"input_ids\[1\] must be contiguous, .* 8 bytes"),
        (ids(1, 2), mask(0, 1, 0, 1)[::-2], r"loss_mask\[1\] must be contiguous, .* -2 bytes"),
    ],
)
def test_pack_names_what_is_wrong(bad_ids, bad_mask, message):
    with pytest.raises(ValueError, match=f"^{message}$") as caught:
        pack(ragged([GOOD[0], bad_ids], [GOOD[1], bad_mask]), [0, 1])
    assert "\n" not in str(caught.value)


def test_a_negative_id_behind_a_shared_prefix_is_named_by_its_place_in_the_stream():
    packer = ragged([ids(1, 2, 3), ids(1, 2, -4)], [mask(0, 0, 1)] * 2, [2], share_prefixes=True)
    with pytest.raises(ValueError, match=r"^input_ids\[1\]\[2\] is -4; "):
        pack(packer, [0])


@pytest.mark.parametrize(
    ("counts", "weights", "message"),
    [
        ([0, 2], [1, 1], r"counts\[0\] is 0 streams, of 2 that are left; .*"),
        ([1, 2], [1, 1], r"counts\[1\] is 2 streams, of 1 that are left; .*"),
        ([-1, 3], [1, 1], r"counts\[0\] is -1 streams, of 2 that are left; .*"),
        ([1], [1], "counts add up to 1 streams but input_ids has 2"),
        ([1, 1], [1], "weights has 1 entries but counts has 2"),
    ],
)
def test_every_stream_belongs_to_an_example(counts, weights, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        ragged([GOOD[0]] * 2, [GOOD[1]] * 2, counts, np.array(weights, np.float32))


def test_pack_wants_a_mask_for_every_sequence():
    with pytest.raises(ValueError, match=r"^loss_mask has 1 sequences but input_ids has 2$"):
        ragged([GOOD[0], GOOD[0]], [GOOD[1]])


def test_pack_does_not_take_lists():
    with pytest.raises(TypeError, match=r"^input_ids\[0\] must be an array of int32, got a list$"):
        ragged([[1, 2]], [GOOD[1]])


@pytest.mark.parametrize("example", [-1, 1, 2**40])
def test_pack_names_an_example_that_is_not_there(example):
    packer = ragged([GOOD[0]], [GOOD[1]])
    with pytest.raises(ValueError, match=rf"^examples\[1\] is {example}, of 1 examples$"):
        packer.layout(int64([0, example]))
    with pytest.raises(ValueError, match=rf"^examples\[1\] is {example}, of 1 examples$"):
        packer.fill(int64([0, example]), np.zeros(8, np.uint8))


def test_pack_writes_into_memory_of_its_size_alone():
    packer = ragged([GOOD[0]], [GOOD[1]])
    size, _ = packer.layout(int64([0]))
    for other in (0, size - 1, size + 1):
        with pytest.raises(ValueError, match=f"^memory has {other} bytes but .* takes {size}$"):
            packer.fill(int64([0]), np.zeros(other, np.uint8))
    with pytest.raises(ValueError, match=r"^memory must be aligned to 8 bytes$"):
        packer.fill(int64([0]), np.zeros(size + 16, np.uint8)[1 : size + 1])
    with pytest.raises(ValueError, match=r"^memory must be writable$"):
        packer.fill(int64([0]), np.frombuffer(bytes(size), np.uint8))


def test_pack_refuses_what_int32_offsets_cannot_count():
    """2^31 tokens by naming one example often. All of them measured are no pack yet."""
    packer = ragged([np.zeros(2**20, dtype=np.int32)], [np.zeros(2**20, dtype=bool)])
    with pytest.raises(ValueError, match=r"^the pack has 2147483648 tokens .*int32 cu_seqlens$"):
        packer.layout(int64([0] * 2**11))
    assert packer.layout(int64([0] * (2**11 - 1)))[0] > 2**31


# --------------------------------------------------------------------------------- planning


def plan_of(lengths, budget: int, ranks: int, costs=None) -> list[list[list[int]]]:
    lengths = np.array(lengths, dtype=np.int64)
    costs = lengths.astype(np.float64) if costs is None else np.array(costs, dtype=np.float64)
    return _bridge.plan(lengths, costs, budget, ranks)


def first_fit_decreasing(lengths: list[int], budget: int) -> int:
    bins: list[int] = []
    for length in sorted(lengths, reverse=True):
        fits = [i for i, used in enumerate(bins) if used + length <= budget]
        if fits:
            bins[fits[0]] += length
        else:
            bins.append(length)
    return len(bins)


lengths_lists = st.lists(st.integers(min_value=1, max_value=120), max_size=60)
# Whole numbers, so that sums are exact.
priced = st.lists(st.tuples(st.integers(1, 120), st.integers(0, 10_000)), max_size=60)
budgets, rank_counts = st.integers(1, 200), st.integers(1, 9)


def quadratic(lengths: list[int]) -> list[int]:
    return [100 * n + n * n for n in lengths]


@calm
@given(priced, budgets, rank_counts)
def test_plan_keeps_its_promises(examples, budget, ranks):
    lengths, costs = [n for n, _ in examples], [cost for _, cost in examples]
    plan = plan_of(lengths, budget, ranks, costs)

    assert len(plan) == ranks
    assert len({len(packs) for packs in plan}) == 1, "every rank takes the same number of steps"
    every_pack = list(itertools.chain.from_iterable(plan))
    assert sorted(itertools.chain.from_iterable(every_pack)) == list(range(len(lengths)))
    for pack in every_pack:
        assert pack == sorted(pack)
        assert sum(lengths[i] for i in pack) <= budget or len(pack) == 1
    for packs in plan:
        prices = [sum(costs[i] for i in pack) for pack in packs]
        assert prices == sorted(prices, reverse=True)

    # No more steps than first-fit decreasing's packs need.
    assert len(plan[0]) == -(-first_fit_decreasing(lengths, budget) // ranks)
    assert plan == plan_of(lengths, budget, ranks, costs)


@calm
@given(priced.filter(bool), budgets, rank_counts)
def test_ranks_differ_by_no_more_than_one_pack(examples, budget, ranks):
    """By no more than two packs of one step do, and so by one pack at most: the rank with the most
    to do is within one pack of the mean, which no plan can go below."""
    lengths, costs = [n for n, _ in examples], [cost for _, cost in examples]
    plan = plan_of(lengths, budget, ranks, costs)
    prices = [[sum(costs[i] for i in pack) for pack in packs] for packs in plan]
    loads = [sum(packs) for packs in prices]
    steps = list(zip(*prices, strict=True))
    assert max(loads) - min(loads) <= max(max(step) - min(step) for step in steps)
    assert max(loads) <= sum(costs) / ranks + max(map(max, prices))


def nearest_exchange(costly, cheap, lengths, costs, budget):
    """How close the costs of two packs get by one example for another or for none."""
    left = sum(costs[i] for i in costly) - sum(costs[i] for i in cheap)
    room = budget - sum(lengths[i] for i in cheap)
    spare = budget - sum(lengths[i] for i in costly)
    found = [left]
    for one in costly:
        for taken in (None, *cheap):
            moved = lengths[one] - (0 if taken is None else lengths[taken])
            if -spare <= moved <= room:
                cost = costs[one] - (0 if taken is None else costs[taken])
                found.append(abs(left - 2 * cost))
    return min(found)


@calm
@given(priced, budgets, rank_counts)
def test_no_exchange_brings_the_packs_of_a_step_closer(examples, budget, ranks):
    lengths, costs = [n for n, _ in examples], [cost for _, cost in examples]
    plan = plan_of(lengths, budget, ranks, costs)
    for step in zip(*plan, strict=True):
        prices = [sum(costs[i] for i in pack) for pack in step]
        most, least = max(prices), min(prices)
        if most - least <= most / 1000:
            continue
        # Of several that cost the same, the two that were looked at last.
        assert any(
            nearest_exchange(costly, cheap, lengths, costs, budget) == most - least
            for costly, cheap in itertools.product(step, step)
            if (sum(costs[i] for i in costly), sum(costs[i] for i in cheap)) == (most, least)
        )


def least_load(lengths: list[int], costs: list[int], budget: int, ranks: int, steps: int) -> int:
    """Of the rank with the most to do, of all plans."""
    best = sum(costs)
    for packs in itertools.product(range(ranks * steps), repeat=len(lengths)):
        tokens, loads = [0] * (ranks * steps), [0] * ranks
        for length, cost, pack in zip(lengths, costs, packs, strict=True):
            tokens[pack] += length
            loads[pack % ranks] += cost
        if max(tokens) <= budget:
            best = min(best, max(loads))
    return best


@pytest.mark.parametrize("seed", range(60))
def test_small_batches_are_within_one_example_of_the_best_plan(seed):
    rng = np.random.default_rng(seed)
    budget, ranks = int(rng.integers(5, 30)), int(rng.integers(2, 4))
    lengths = rng.integers(1, budget + 1, rng.integers(2, 7)).tolist()
    costs = [n * n + n * int(rng.integers(5, 20)) for n in lengths]
    plan = plan_of(lengths, budget, ranks, costs)
    if (ranks * len(plan[0])) ** len(lengths) > 5000:
        lengths, costs = lengths[:4], costs[:4]
        plan = plan_of(lengths, budget, ranks, costs)
    loads = [sum(costs[i] for pack in packs for i in pack) for packs in plan]
    best = least_load(lengths, costs, budget, ranks, len(plan[0]))
    assert best <= max(loads) <= best + max(costs)
    assert max(loads) - min(loads) <= max(costs)


@pytest.mark.parametrize("budget", [2048, 4096])
@pytest.mark.parametrize("ranks", [2, 8])
def test_full_packs_leave_ranks_within_one_example(budget, ranks):
    """Packs of 98 % and more, most of them first-fit's: even ones do not fit."""
    for seed in range(8):
        lengths = log_normal(ranks * 150, budget, seed)
        for costs, examples in ((lengths, 0.2), (quadratic(lengths), 1)):
            plan = plan_of(lengths, budget, ranks, costs)
            loads = [sum(costs[i] for pack in packs for i in pack) for packs in plan]
            assert max(loads) - min(loads) <= examples * max(costs)


def longest_first(costs: list[int], count: int) -> list[list[int]]:
    """Each example to the cheapest of ``count`` packs."""
    packs: list[list[int]] = [[] for _ in range(count)]
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        min(packs, key=lambda pack: sum(costs[j] for j in pack)).append(i)
    return packs


@calm
@given(lengths_lists.filter(bool), st.integers(1, 6), rank_counts)
def test_ranks_differ_by_no_more_than_one_example_where_even_packs_fit(lengths, steps, ranks):
    costs = quadratic(lengths)
    even = longest_first(costs, steps * ranks)
    budget = max(sum(lengths[i] for i in pack) for pack in even)
    plan = plan_of(lengths, budget, ranks, costs)
    loads = [sum(costs[i] for packs in rank for i in packs) for rank in plan]
    # First-fit may do with fewer steps, and then has to.
    if len(plan[0]) == steps:
        assert max(loads) - min(loads) <= max(costs)
        assert max(loads) <= sum(costs) / ranks + max(costs)


@calm
@given(lengths_lists.filter(bool), rank_counts)
def test_plan_leaves_no_rank_idle_while_another_has_two_examples(lengths, ranks):
    plan = plan_of(lengths, sum(lengths), ranks)
    sizes = sorted(len(packs[0]) for packs in plan)
    assert sizes[0] > 0 or sizes[-1] == 1


@calm
@given(lengths_lists.filter(bool), rank_counts)
def test_one_step_is_balanced_within_one_example(lengths, ranks):
    costs = quadratic(lengths)
    plan = plan_of(lengths, sum(lengths), ranks, costs)
    loads = [sum(costs[i] for i in packs[0]) for packs in plan]
    assert max(loads) - min(loads) <= max(costs)


def test_the_quadratic_part_counts():
    """By tokens 8 + 4 = 4 + 4 + 4; by n^2 one of 8 weighs as much as four of 4."""
    lengths = [8, 4, 4, 4, 4]
    assert plan_of(lengths, 100, 2) == [[[0, 3]], [[1, 2, 4]]]
    assert plan_of(lengths, 100, 2, [n * n for n in lengths]) == [[[0]], [[1, 2, 3, 4]]]


def test_plan_by_hand():
    # 12 has a pack of its own; the six others fill three packs of 10: 7 3 | 6 4 | 5 5.
    plan = plan_of([5, 4, 12, 6, 3, 7, 5], 10, 2)
    assert plan == [[[2], [0, 6]], [[4, 5], [1, 3]]]


def test_plan_spreads_what_first_fit_would_heap_up():
    """All of it fits into one pack, which would leave three ranks without work."""
    assert plan_of([4, 1, 3, 2, 2], 100, 4) == [[[0]], [[2]], [[1, 3]], [[4]]]


def test_plan_falls_back_to_even_tokens_and_to_tight_packs():
    # Even in cost, all but the first would lie together, 8 tokens of them. Even in tokens they are
    # 0 2 4 | 1 3 5, of costs 8 and 3; moving one makes them 7 and 4, and there is no room for more.
    assert plan_of([4, 4, 1, 1, 1, 1], 7, 2, [6, 1, 1, 1, 1, 1]) == [[[0, 4]], [[1, 2, 3, 5]]]
    # Spread evenly, 3 2 | 3 2 leaves no room for the last 2; first-fit finds 3 3 | 2 2 2.
    assert plan_of([3, 3, 2, 2, 2], 6, 2) == [[[0, 1]], [[2, 3, 4]]]


def test_plan_does_not_depend_on_equal_lengths_order():
    assert plan_of([4] * 8, 8, 2) == [[[0, 4], [2, 6]], [[1, 5], [3, 7]]]


def test_plan_gives_ranks_without_examples_an_empty_pack():
    assert plan_of([3], 10, 3) == [[[0]], [[]], [[]]]
    assert plan_of([], 10, 3) == [[], [], []]


def of_prompts(counts: list[int], prompt: int, answer: int) -> _bridge.Ragged:
    """``counts[p]`` answers to each of several prompts, dealt out in turns: p 0, p 1, ..., p 0."""
    order = [p for turn in range(max(counts)) for p, n in enumerate(counts) if turn < n]
    sequences = [[p] * prompt + [99] * answer for p in order]
    masks = [[0] * prompt + [1] * answer for _ in order]
    return ragged([ids(*s) for s in sequences], [mask(*m) for m in masks], share_prefixes=True)


def test_examples_of_one_prompt_are_planned_together():
    packer = of_prompts([3, 3, 1], prompt=10, answer=2)
    # Two prompts of three answers take 16 tokens each, and one of one 12.
    assert packer.plan(16, 1, 1, 0, 0) == [[[0, 3, 5], [1, 4, 6], [2]]]
    # Cut at a border of examples where the budget ends: 14 and 12.
    assert packer.plan(14, 1, 1, 0, 0) == [[[0, 3], [1, 4], [5], [6], [2]]]
    # Never by more ranks than there is work for: one prompt is shared out.
    assert of_prompts([4], 10, 10).plan(100, 2, 1, 0, 0) == [[[0, 1]], [[2, 3]]]
    assert of_prompts([4], 10, 10).plan(100, 4, 1, 0, 0) == [[[0]], [[1]], [[2]], [[3]]]


@calm
@given(grouped, st.integers(1, 60), rank_counts)
def test_a_plan_of_prompts_keeps_the_promises_of_plans(examples, budget, ranks):
    packer = of(examples, share=True)
    plan = packer.plan(budget, ranks, 1, 0.5, 2)
    assert plan == packer.plan(budget, ranks, 1, 0.5, 2)
    assert len(plan) == ranks and len({len(packs) for packs in plan}) == 1
    # Sharing takes no step more.
    assert len(plan[0]) <= len(plan_of(packer.tokens, budget, ranks)[0])
    every_pack = [pack for packs in plan for pack in packs]
    assert sorted(itertools.chain.from_iterable(every_pack)) == list(range(len(examples)))
    for chosen in every_pack:
        tokens = len(model_of_pack([examples[i] for i in chosen], True)["input_ids"])
        assert tokens <= budget or len(chosen) == 1
        # Examples of one prompt lie side by side.
        prompts = [tuple(prompt_of(examples[i])) for i in chosen]
        runs = [prompt for prompt, _ in itertools.groupby(prompts) if prompt]
        assert len(runs) == len(set(runs))


@calm
@given(priced.filter(bool), budgets, rank_counts)
def test_examples_that_share_nothing_are_planned_by_themselves(examples, budget, ranks):
    streams = [ids(*([i] * n)) for i, (n, _) in enumerate(examples)]
    packer = ragged(streams, [np.zeros(len(s), bool) for s in streams], share_prefixes=True)
    costs = packer.tokens * 3.0 + packer.pairs * 0.5
    expected = _bridge.plan(packer.tokens, costs, budget, ranks)
    assert packer.plan(budget, ranks, 3, 0.5, 7) == expected


@pytest.mark.parametrize(("prompts", "answers", "ranks"), [(4, 8, 8), (3, 8, 2), (16, 4, 4)])
@pytest.mark.parametrize("budget", [200, 512])
def test_prompts_once_takes_less_of_the_rank_that_is_waited_for(prompts, answers, ranks, budget):
    """Also where there are fewer prompts than ranks."""
    rng = np.random.default_rng(0)
    examples: Examples = []
    for p in range(prompts):
        begin = [(p, False)] * int(rng.integers(5, 60))
        examples += [[begin + [(77, True)] * int(rng.integers(1, 60))] for _ in range(answers)]

    def steps(share: bool) -> list[int]:
        plan = of(examples, share).plan(budget, ranks, 1, 0, 0)
        return [
            max(len(model_of_pack([examples[i] for i in p], share)["input_ids"]) for p in step)
            for step in zip(*plan, strict=True)
        ]

    assert len(steps(True)) <= len(steps(False))
    assert sum(steps(True)) < 0.85 * sum(steps(False))


def log_normal(count: int, budget: int, seed: int = 0) -> list[int]:
    drawn = np.exp(np.random.default_rng(seed).normal(LOG_MEAN, LOG_DEVIATION, count))
    return np.clip(drawn, 2, budget).astype(int).tolist()


def fill_of(lengths: list[int], budget: int, ranks: int) -> float:
    plan = plan_of(lengths, budget, ranks, quadratic(lengths))
    return sum(lengths) / (ranks * len(plan[0]) * budget)


@pytest.mark.parametrize("budget", [1024, 2048, 8192])
@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_packs_are_full_where_the_batch_is_large_enough(budget, ranks):
    """A batch of 40 steps; rounding the steps up alone can take 1 / 41."""
    count = round(40 * ranks * budget / np.exp(LOG_MEAN + LOG_DEVIATION**2 / 2))
    assert fill_of(log_normal(count, budget), budget, ranks) >= 0.97


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the data sets beside the project")
def test_packs_of_real_dialogues_are_full(smollm):
    """Pairs of whole dialogues, whose two streams stay together."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm)
    text = (DATA / "hh_harmless.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    sides = [[row[side] for row in rows] for side in ("chosen", "rejected")]
    chosen, rejected = ([len(x) for x in tokenizer(side).input_ids] for side in sides)
    pairs = [a + b for a, b in zip(chosen, rejected, strict=True)]
    assert min(fill_of(pairs, 4096, ranks) for ranks in (1, 2)) >= 0.97
    every = np.log(chosen + rejected)
    assert abs(every.mean() - LOG_MEAN) < 0.05 and abs(every.std() - LOG_DEVIATION) < 0.05


def test_plan_is_fast_enough_to_run_every_step():
    """Quadratic first-fit takes minutes here."""
    lengths = np.random.default_rng(0).integers(1, 8192, size=200_000)
    plan = plan_of(lengths, 8192, 64)
    loads = [sum(int(lengths[i]) for pack in packs for i in pack) for packs in plan]
    assert max(loads) - min(loads) <= 8192
    assert sum(loads) == lengths.sum()


@pytest.mark.parametrize(
    ("lengths", "budget", "ranks", "message"),
    [
        ([4, 0], 8, 1, r"lengths\[1\] must be from 1 to 2147483647 tokens, got 0"),
        ([4, 2**31], 8, 1, r"lengths\[1\] must be from 1 to 2147483647 tokens, got 2147483648"),
        ([4], 0, 1, "budget must be from 1 to 2147483647 tokens, got 0"),
        ([4], 2**31, 1, "budget must be from 1 to 2147483647 tokens, got 2147483648"),
        ([4], 8, 0, "ranks must be at least 1, got 0"),
    ],
)
def test_plan_names_what_is_wrong(lengths, budget, ranks, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        plan_of(lengths, budget, ranks)


@pytest.mark.parametrize(("cost", "shown"), [(-1.0, "-1.0+"), (np.nan, "nan"), (np.inf, "inf")])
def test_plan_wants_costs_that_add_up(cost, shown):
    message = rf"^costs\[1\] must be finite and not negative, got {shown}$"
    with pytest.raises(ValueError, match=message):
        plan_of([4, 4], 8, 1, [1.0, cost])
    with pytest.raises(ValueError, match=r"^costs has 1 entries but lengths has 2$"):
        plan_of([4, 4], 8, 1, [1.0])


def test_plan_wants_int64():
    with pytest.raises(ValueError, match=r"^lengths must be an array of int64, got int32$"):
        _bridge.plan(ids(1, 2), np.ones(2), 8, 1)
    with pytest.raises(TypeError, match=r"^lengths must be an array of int64, got a list$"):
        _bridge.plan([1, 2], np.ones(2), 8, 1)
