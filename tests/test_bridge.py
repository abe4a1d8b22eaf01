"""The native batching core against the same thing in plain Python."""

from __future__ import annotations

import gc
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastalign import _bridge

FIELDS = ("input_ids", "positions", "cu_seqlens", "rows", "targets", "cu_rows")
DTYPES = dict.fromkeys(FIELDS, np.int64) | {"cu_seqlens": np.int32, "cu_rows": np.int32}


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, dtype=np.int32)


def mask(*flags: int) -> np.ndarray:
    return np.array(flags, dtype=bool)


def model_of_pack(sequences: list[list[tuple[int, bool]]]) -> dict[str, list[int]]:
    packed = {name: [] for name in FIELDS} | {"cu_seqlens": [0], "cu_rows": [0]}
    for sequence in sequences:
        start = len(packed["input_ids"])
        for t, (token, _) in enumerate(sequence):
            packed["input_ids"].append(token)
            packed["positions"].append(t)
            if t + 1 < len(sequence) and sequence[t + 1][1]:
                packed["rows"].append(start + t)
                packed["targets"].append(sequence[t + 1][0])
        packed["cu_seqlens"].append(len(packed["input_ids"]))
        packed["cu_rows"].append(len(packed["rows"]))
    return packed


tokens = st.integers(min_value=0, max_value=2**31 - 1)
sequences = st.lists(
    st.builds(
        lambda first, rest: [(first, False), *rest],
        tokens,
        st.lists(st.tuples(tokens, st.booleans()), max_size=20),
    ),
    max_size=8,
)


@given(sequences, st.sampled_from([np.bool_, np.uint8]))
def test_pack_matches_the_model(ragged, mask_dtype):
    packed = _bridge.pack(
        [np.array([token for token, _ in s], dtype=np.int32) for s in ragged],
        [np.array([trained for _, trained in s], dtype=mask_dtype) for s in ragged],
    )
    for name, expected in model_of_pack(ragged).items():
        actual = getattr(packed, name)
        assert actual.dtype == DTYPES[name]
        assert actual.tolist() == expected, name


def test_pack_by_hand():
    packed = _bridge.pack(
        [ids(11, 12, 13, 14), ids(21), ids(31, 32)],
        [mask(0, 0, 1, 1), mask(0), mask(0, 1)],
    )
    assert packed.input_ids.tolist() == [11, 12, 13, 14, 21, 31, 32]
    assert packed.positions.tolist() == [0, 1, 2, 3, 0, 0, 1]
    assert packed.cu_seqlens.tolist() == [0, 4, 5, 7]
    assert packed.rows.tolist() == [1, 2, 5]
    assert packed.targets.tolist() == [13, 14, 32]
    assert packed.cu_rows.tolist() == [0, 2, 2, 3]


def test_pack_never_predicts_across_a_boundary():
    """The last token of a sequence has no row, whatever the next sequence holds."""
    packed = _bridge.pack([ids(1, 2)] * 3, [mask(0, 1)] * 3)
    assert packed.rows.tolist() == [0, 2, 4]
    assert packed.targets.tolist() == [2, 2, 2]


def test_any_mask_byte_but_zero_is_true():
    packed = _bridge.pack([ids(1, 2, 3)], [np.array([0, 255, 2], dtype=np.uint8)])
    assert packed.targets.tolist() == [2, 3]


def test_pack_of_nothing():
    packed = _bridge.pack([], [])
    assert packed.cu_seqlens.tolist() == packed.cu_rows.tolist() == [0]
    assert packed.input_ids.size == packed.rows.size == 0


def test_arrays_are_writable_views_that_outlive_the_batch():
    packed = _bridge.pack([ids(*range(1000))], [mask(*[0] + [1] * 999)])
    arrays = {name: getattr(packed, name) for name in FIELDS}
    # The same memory each time: an attribute is a view, not a copy.
    arrays["targets"][0] = 7
    assert packed.targets[0] == 7
    assert not any(array.flags.owndata for array in arrays.values())
    del packed
    gc.collect()
    # Whatever takes freed memory next would overwrite the arrays.
    churn = [np.full(1000, -1, dtype=np.int64) for _ in range(100)]
    assert arrays["input_ids"].tolist() == list(range(1000))
    assert arrays["rows"].tolist() == list(range(999))
    del churn


def test_pack_reads_borrowed_read_only_slices():
    flat = np.arange(10, dtype=np.int32)
    flat.flags.writeable = False
    packed = _bridge.pack([flat[2:5], flat[7:9]], [mask(0, 1, 0), mask(0, 1)])
    assert packed.input_ids.tolist() == [2, 3, 4, 7, 8]
    assert packed.targets.tolist() == [3, 8]


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
        (np.zeros((1, 2), np.int32), mask(0, 1), r"input_ids\[1\] must have 1 dimension, got 2"),
        (np.zeros(4, np.int32)[::2], mask(0, 1), r"input_ids\[1\] must be contiguous, .* 8 bytes"),
        (ids(1, 2), mask(0, 1, 0, 1)[::-2], r"loss_mask\[1\] must be contiguous, .* -2 bytes"),
    ],
)
def test_pack_names_what_is_wrong(bad_ids, bad_mask, message):
    with pytest.raises(ValueError, match=f"^{message}$") as caught:
        _bridge.pack([GOOD[0], bad_ids], [GOOD[1], bad_mask])
    assert "\n" not in str(caught.value)


def test_pack_wants_a_mask_for_every_sequence():
    with pytest.raises(ValueError, match=r"^loss_mask has 1 sequences but input_ids has 2$"):
        _bridge.pack([GOOD[0], GOOD[0]], [GOOD[1]])


def test_pack_does_not_take_lists():
    with pytest.raises(TypeError, match=r"^input_ids\[0\] must be an array of int32, got a list$"):
        _bridge.pack([[1, 2]], [GOOD[1]])


def test_pack_refuses_what_int32_offsets_cannot_count():
    """2^31 tokens by naming one array many times: the lengths are added up before any is read."""
    million = np.zeros(2**20, dtype=np.int32)
    no_loss = np.zeros(2**20, dtype=bool)
    with pytest.raises(ValueError, match=r"^the batch has 2147483648 tokens .*int32 cu_seqlens$"):
        _bridge.pack([million] * 2**11, [no_loss] * 2**11)


def lengths_of(values: list[int]) -> np.ndarray:
    return np.array(values, dtype=np.int64)


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


@given(
    lengths_lists, st.integers(min_value=1, max_value=200), st.integers(min_value=1, max_value=9)
)
def test_plan_keeps_its_promises(lengths, budget, ranks):
    plan = _bridge.plan(lengths_of(lengths), budget, ranks)

    assert len(plan) == ranks
    assert len({len(packs) for packs in plan}) == 1, "every rank takes the same number of steps"
    every_pack = list(itertools.chain.from_iterable(plan))
    assert sorted(itertools.chain.from_iterable(every_pack)) == list(range(len(lengths)))
    for pack in every_pack:
        assert pack == sorted(pack)
        assert sum(lengths[i] for i in pack) <= budget or len(pack) == 1
    for packs in plan:
        sizes = [sum(lengths[i] for i in pack) for pack in packs]
        assert sizes == sorted(sizes, reverse=True)

    # No more steps than first-fit decreasing's packs need.
    assert len(plan[0]) == -(-first_fit_decreasing(lengths, budget) // ranks)
    assert plan == _bridge.plan(lengths_of(lengths), budget, ranks)


@given(lengths_lists.filter(bool), st.integers(min_value=1, max_value=9))
def test_plan_leaves_no_rank_idle_while_another_has_two_examples(lengths, ranks):
    plan = _bridge.plan(lengths_of(lengths), sum(lengths), ranks)
    sizes = sorted(len(packs[0]) for packs in plan)
    assert sizes[0] > 0 or sizes[-1] == 1


@given(lengths_lists.filter(bool), st.integers(min_value=1, max_value=9))
def test_plan_balances_within_one_example(lengths, ranks):
    """With one step each, longest-first ends within the longest example of even."""
    plan = _bridge.plan(lengths_of(lengths), sum(lengths), ranks)
    loads = [sum(lengths[i] for i in packs[0]) for packs in plan]
    assert max(loads) - min(loads) <= max(lengths)


def test_plan_by_hand():
    # 12 has a pack of its own; the six others fill three packs of 10: 7 3 | 6 4 | 5 5.
    plan = _bridge.plan(lengths_of([5, 4, 12, 6, 3, 7, 5]), 10, 2)
    assert plan == [[[2], [0, 6]], [[4, 5], [1, 3]]]


def test_plan_spreads_what_first_fit_would_heap_up():
    """All of it fits into one pack, which would leave three ranks without work."""
    plan = _bridge.plan(lengths_of([4, 1, 3, 2, 2]), 100, 4)
    assert plan == [[[0]], [[2]], [[1, 3]], [[4]]]


def test_plan_falls_back_to_tight_packs():
    """Spread evenly, 3 2 | 3 2 leaves no room for the last 2; first-fit finds 3 3 | 2 2 2."""
    plan = _bridge.plan(lengths_of([3, 3, 2, 2, 2]), 6, 2)
    assert plan == [[[0, 1]], [[2, 3, 4]]]


def test_plan_does_not_depend_on_equal_lengths_order():
    plan = _bridge.plan(lengths_of([4] * 8), 8, 2)
    assert plan == [[[0, 4], [2, 6]], [[1, 5], [3, 7]]]


def test_plan_gives_ranks_without_examples_an_empty_pack():
    assert _bridge.plan(lengths_of([3]), 10, 3) == [[[0]], [[]], [[]]]
    assert _bridge.plan(lengths_of([]), 10, 3) == [[], [], []]


def test_plan_is_fast_enough_to_run_every_step():
    """Quadratic first-fit takes minutes here."""
    lengths = np.random.default_rng(0).integers(1, 8192, size=200_000)
    plan = _bridge.plan(lengths, 8192, 64)
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
        _bridge.plan(lengths_of(lengths), budget, ranks)


def test_plan_wants_int64():
    with pytest.raises(ValueError, match=r"^lengths must be an array of int64, got int32$"):
        _bridge.plan(ids(1, 2), 8, 1)
    with pytest.raises(TypeError, match=r"^lengths must be an array of int64, got a list$"):
        _bridge.plan([1, 2], 8, 1)
