"""The native sampler against the same thing in float64, its distribution, and stop strings."""

from __future__ import annotations

import json
import math
import os
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fastalign import _bridge
from fastalign.config import ConfigError
from fastalign.rollout.token_bytes import token_bytes

ISAS = _bridge.sampler_isas()
DTYPES = ["fp32", "bf16"]


def arrays(values: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Logits as the sampler takes them, and in float64 as they then are."""
    if dtype == "fp32":
        values = values.astype(np.float32)
        return values, values.astype(np.float64)
    rounded = torch.from_numpy(values.astype(np.float32)).bfloat16()
    return rounded.view(torch.uint16).numpy(), rounded.double().numpy()


def sample(logits: np.ndarray, seeds: Any = None, positions: Any = None, **rule: Any):
    rows = len(logits)
    return _bridge.sample(
        logits,
        np.arange(rows, dtype=np.uint64) if seeds is None else np.asarray(seeds, dtype=np.uint64),
        np.zeros(rows, np.uint64) if positions is None else np.asarray(positions, dtype=np.uint64),
        **rule,
    )


def log_sum_exp(x: np.ndarray) -> float:
    return float(torch.from_numpy(x).logsumexp(-1))


def truncated(
    logits: np.ndarray,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    slack: float = 0.0,
) -> np.ndarray:
    """The token ids that the truncations keep, in their order; ``slack`` moves min-p's border down
    and top-p's up."""
    x = (logits - logits.max()) / temperature
    order = np.argsort(-logits, kind="stable")
    order = order[x[order] > -np.inf]
    if min_p > 0:
        order = order[x[order] >= math.log(min_p) - slack]
    if 0 < top_k < len(logits):
        order = order[:top_k]
    if top_p < 1:
        p = np.exp(x[order] - log_sum_exp(x[order]))
        before = np.cumsum(p) - p
        order = order[: max(1, int((before < top_p + slack).sum()))]
    return order


def check_row(logits: np.ndarray, drawn: tuple[int, float, float], rule: dict[str, Any]) -> None:
    """One draw against float64: a token that is kept, and both of its log-probs."""
    token, logprob, sampling_logprob = drawn
    below = logits - logits.max()
    raw = below[token] - log_sum_exp(below)
    # Half a unit in the last place of a float, and that of sums in float.
    assert logprob == pytest.approx(raw, abs=6e-7 + 1e-7 * abs(raw))
    if rule.get("temperature") == 0:
        assert token == np.argmax(logits) and sampling_logprob == 0
        return
    x = below / rule.get("temperature", 1.0)
    shortest, longest = (len(truncated(logits, **rule, slack=s)) for s in (-2e-6, 2e-6))
    order = truncated(logits, **rule, slack=2e-6)
    (rank,) = np.nonzero(order == token)[0]
    # One of the borders that are equal but for rounding.
    expected = [x[token] - log_sum_exp(x[order[:n]]) for n in range(max(shortest, 1), longest + 1)]
    close = [abs(sampling_logprob - e) <= 6e-7 + 1e-7 * abs(e) for e in expected]
    lengths = range(max(shortest, 1), longest + 1)
    assert any(c and rank < n for c, n in zip(close, lengths, strict=True)), (drawn, expected)


values = st.one_of(
    st.floats(-30, 30, width=32),
    st.sampled_from([0.0, -0.0, 1.0, 2.5, -math.inf, 1e-40, -1e-40, 3e38, -3e38, 88.0, -88.0]),
)
logit_rows = st.one_of(
    st.lists(values, min_size=1, max_size=70),
    # Few values: ties at every border.
    st.lists(st.sampled_from([0.0, 0.5, 1.0, 4.0, -math.inf]), min_size=1, max_size=70),
    st.builds(
        lambda seed, size, spread: (
            np.random.default_rng(seed).normal(0, spread, size).astype(np.float32).tolist()
        ),
        st.integers(0, 1000),
        st.sampled_from([1023, 1025, 2100]),
        st.sampled_from([0.01, 1.0, 5.0]),
    ),
).filter(lambda row: max(row) > -math.inf)
rules = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 0.05, 0.7, 1.0, 1.5, 20.0]),
        "top_k": st.integers(-1, 80),
        "top_p": st.sampled_from([1e-6, 0.1, 0.5, 0.9, 0.999, 1.0]),
        "min_p": st.sampled_from([0.0, 1e-9, 0.05, 0.5, 1.0]),
    },
)


@settings(max_examples=300, deadline=None)
@given(logit_rows, rules, st.sampled_from(DTYPES), st.integers(0, 2**64 - 1))
@example([0.0, 0.0, 0.0, 0.0], {"top_p": 0.5}, "fp32", 1)
@example([3e38, -3e38, 3e38], {"temperature": 0.05, "min_p": 0.5}, "fp32", 1)
def test_draws_match_the_model(row, rule, dtype, seed):
    taken, exact = arrays(np.array([row] * 3), dtype)
    seeds, positions = [seed] * 3, [0, 1, 2**63]
    drawn = sample(taken, seeds, positions, **rule)
    for b in range(3):
        check_row(exact[b], tuple(x[b].item() for x in drawn), rule)
    for isa in ISAS:
        for ours, theirs in zip(
            drawn, sample(taken, seeds, positions, isa=isa, **rule), strict=True
        ):
            assert ours.tobytes() == theirs.tobytes(), isa


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "rule",
    [
        {},
        {"temperature": 0.0},
        {"temperature": 0.6},
        {"top_k": 40},
        {"top_k": 3000},
        {"top_p": 0.9},
        {"top_p": 0.9, "temperature": 0.3},
        {"min_p": 0.02},
        {"min_p": 1e-4, "top_p": 0.99},
        {"temperature": 1.2, "top_k": 100, "top_p": 0.9, "min_p": 0.001},
    ],
)
def test_draws_of_a_large_vocabulary_match_the_model(rule, dtype):
    """The paths by blocks, by candidates and by the histogram."""
    generator = np.random.default_rng(5)
    spread = np.array([0.1, 1, 2, 4, 8])[:, None]
    taken, exact = arrays(generator.normal(size=(5, 49152)) * spread, dtype)
    drawn = sample(taken, **rule)
    for b in range(5):
        check_row(exact[b], tuple(x[b].item() for x in drawn), rule)
    for isa in ISAS:
        for ours, theirs in zip(drawn, sample(taken, isa=isa, **rule), strict=True):
            assert ours.tobytes() == theirs.tobytes(), isa


# ----------------------------------------------------------------------------- the distribution


def chi_square_p(counts: np.ndarray, p: np.ndarray) -> float:
    """p-value of counts under probabilities, the rarest outcomes pooled to 5 expected each."""
    draws = counts.sum()
    order = np.argsort(p)
    expected, observed = p[order] * draws, counts[order]
    bins: list[tuple[float, float]] = []
    e = o = 0.0
    for want, have in zip(expected, observed, strict=True):
        e, o = e + want, o + have
        if e >= 5:
            bins.append((e, o))
            e = o = 0.0
    if bins:
        bins[-1] = (bins[-1][0] + e, bins[-1][1] + o)
    if len(bins) < 2:
        return 1.0
    statistic = sum((o - e) ** 2 / e for e, o in bins)
    half = torch.tensor([(len(bins) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def check_distribution(exact: np.ndarray, tokens: np.ndarray, rule: dict[str, Any]) -> None:
    kept = truncated(exact, **rule)
    p = np.zeros(len(exact))
    scaled = torch.from_numpy(exact[kept]) / rule.get("temperature", 1.0)
    p[kept] = scaled.softmax(-1).numpy()
    counts = np.bincount(tokens, minlength=len(exact))
    assert counts[p == 0].sum() == 0
    assert chi_square_p(counts, p) > 1e-4


SETTINGS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "top-k": {"top_k": 12},
    "top-p": {"top_p": 0.85},
    "min-p": {"min_p": 0.03},
    "all": {"temperature": 1.4, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SETTINGS)
def test_a_million_draws_follow_the_distribution(name, dtype):
    row, exact = arrays(np.random.default_rng(11).normal(0, 2, (1, 60)), dtype)
    draws = 1_000_000
    rows = np.broadcast_to(row, (draws, row.shape[1]))
    tokens, _, _ = sample(rows, **SETTINGS[name], threads=2)
    check_distribution(exact[0], tokens, SETTINGS[name])


def test_positions_of_one_seed_follow_the_distribution():
    row, exact = arrays(np.random.default_rng(12).normal(0, 2, (1, 60)), "fp32")
    rows = np.broadcast_to(row, (200_000, 60))
    tokens, _, _ = sample(rows, np.full(len(rows), 7), np.arange(len(rows)))
    check_distribution(exact[0], tokens, {})
    # Neighbours do not know of each other.
    pairs = tokens[:-1:2].astype(np.int64) * 60 + tokens[1::2]
    p = np.exp(exact[0] - log_sum_exp(exact[0]))
    counts = np.bincount(pairs, minlength=3600)
    assert chi_square_p(counts, np.outer(p, p).ravel()) > 1e-4


@pytest.mark.parametrize("name", SETTINGS)
def test_draws_of_a_large_vocabulary_follow_the_distribution(name):
    row, exact = arrays(np.random.default_rng(13).normal(0, 2.5, (1, 49152)), "bf16")
    # A million of each take four minutes.
    rows = np.broadcast_to(row, (int(os.environ.get("FASTALIGN_DRAWS", 4000)), 49152))
    tokens, _, _ = sample(rows, **SETTINGS[name], threads=2)
    check_distribution(exact[0], tokens, SETTINGS[name])


# -------------------------------------------------------------------------------------- the rest


def test_results_are_the_same_everywhere():
    """Bits that a processor, a compiler or a C library must not change."""
    steps = np.arange(50000)
    rows = np.stack([steps * 37 % 101 / 8, -steps / 512, steps * 7919 % 49999 / 512])
    tokens, logprobs, sampling = sample(
        rows.astype(np.float32), [1, 2**40, 2**64 - 1], [0, 3, 2**33], temperature=0.75, top_p=0.9
    )
    assert tokens.tolist() == TOKENS
    assert logprobs.view(np.uint32).tolist() == LOGPROBS
    assert sampling.view(np.uint32).tolist() == SAMPLING


TOKENS = [44418, 282, 19156]
LOGPROBS = [0xC10F889F, 0xC0D9485B, 0xC0ED385B]
SAMPLING = [0xC10CE753, 0xC0D29920, 0xC0ED2E76]


def test_a_row_does_not_depend_on_its_batch():
    logits, _ = arrays(np.random.default_rng(3).normal(0, 3, (40, 20000)), "fp32")
    seeds = np.random.default_rng(4).integers(0, 2**63, 40)
    positions = np.arange(40)
    rule = {"temperature": 0.8, "top_p": 0.95}
    together = sample(logits, seeds, positions, threads=3, **rule)
    order = np.random.default_rng(5).permutation(40)
    shuffled = sample(logits[order], seeds[order], positions[order], **rule)
    for ours, theirs in zip(together, shuffled, strict=True):
        assert ours[order].tobytes() == theirs.tobytes()
    for b in range(0, 40, 7):
        alone = sample(logits[b : b + 1], seeds[b : b + 1], positions[b : b + 1], **rule)
        assert [x[0] for x in alone] == [x[b] for x in together]
    others = sample(logits, seeds, positions + 1, **rule)
    assert (others[0] != together[0]).sum() > 10


def test_rows_may_lie_apart():
    logits, _ = arrays(np.random.default_rng(3).normal(0, 3, (6, 300)), "fp32")
    for view in (logits[::2], logits[::-1], logits[:, 17:250], logits[4:4]):
        ours, theirs = sample(view), sample(np.ascontiguousarray(view))
        assert [x.tolist() for x in ours] == [x.tolist() for x in theirs]


def test_minus_infinity_is_never_drawn_and_a_lone_token_always():
    logits = np.full((500, 3000), -np.inf, dtype=np.float32)
    logits[:, 2047] = -5.0
    tokens, logprobs, sampling = sample(logits, top_k=10, top_p=0.5)
    assert (tokens == 2047).all() and (logprobs == 0).all() and (sampling == 0).all()
    logits[:, ::2] = -np.inf
    logits[:, 1::2] = np.random.default_rng(0).normal(size=1500)
    assert (sample(logits)[0] % 2 == 1).all()


def test_top_k_off():
    logits, _ = arrays(np.random.default_rng(3).normal(0, 3, (100, 64)), "fp32")
    plain = sample(logits)
    for k in (0, -1, 64, 2**62):
        assert [x.tolist() for x in sample(logits, top_k=k)] == [x.tolist() for x in plain]


GOOD = np.zeros((2, 4), np.float32)
U64 = np.zeros(2, np.uint64)


@pytest.mark.parametrize(
    ("logits", "rest", "message"),
    [
        (GOOD.astype(np.float64), {}, "logits must be an array of float32, or .* got float64"),
        (GOOD[0], {}, "logits must have 2 dimensions, got 1"),
        (GOOD[:, ::2], {}, "logits must have contiguous rows, got a stride of 8 bytes .*"),
        (
            np.zeros(34, np.uint8)[1:33].view(np.float32).reshape(2, 4),
            {},
            "logits must be aligned to its items of 4 bytes",
        ),
        (
            np.lib.stride_tricks.as_strided(np.zeros(9, np.float32), (2, 4), (18, 4)),
            {},
            "logits must be aligned to its items of 4 bytes",
        ),
        (GOOD[:, :0], {}, "logits has 0 columns; a row has from 1 to 2147483647 tokens"),
        (GOOD[:1], {}, "seeds has 2 entries but logits has 1 rows"),
        (GOOD, {"seeds": U64.astype(np.int64)}, "seeds must be an array of uint64, got int64"),
        (GOOD, {"positions": U64[:1]}, "positions has 1 entries but logits has 2 rows"),
        (GOOD, {"temperature": math.nan}, "temperature is nan; it is 0 .* or from 1e-6 to 1e6"),
        (GOOD, {"temperature": 1e-7}, "temperature is 0.000000; it is 0 .* or from 1e-6 to 1e6"),
        (GOOD, {"top_p": 0.0}, "top_p is 0.000000; it is above 0 and at most 1"),
        (GOOD, {"min_p": -0.5}, "min_p is -0.500000; it is from 0 to 1"),
        (GOOD, {"threads": 0}, "threads must be at least 1, got 0"),
        (GOOD, {"isa": "mmx"}, "isa is 'mmx'; it is best, portable, avx2 or avx512"),
        (GOOD - np.inf, {}, r"logits\[0\] is -infinity everywhere; no token can be drawn"),
        (np.float32([[0], [np.inf]]), {}, r"logits\[1\]\[0\] is \+infinity; logits are .*"),
        (np.float32([[0], [np.nan]]), {}, r"logits\[1\]\[0\] is NaN; logits are .*"),
    ],
)
def test_sample_names_what_is_wrong(logits, rest, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        _bridge.sample(logits, **{"seeds": U64, "positions": U64, **rest})


def test_sample_does_not_take_lists():
    with pytest.raises(TypeError, match=r"logits must be an array of float32, or .* got a list"):
        _bridge.sample([[0.0]], U64, U64)


# ----------------------------------------------------------------------------------- stop strings

alphabet = st.lists(st.sampled_from([b"a", b"b", b"\xc3", b"\xa4"]), max_size=4).map(b"".join)


@given(
    st.lists(alphabet, min_size=1, max_size=6),
    st.lists(alphabet.filter(bool), min_size=1, max_size=3),
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 7)), max_size=40),
)
def test_stop_matcher_matches_the_model(tokens, stop, pushed):
    matcher = _bridge.StopMatcher(_bridge.TokenBytes(tokens), stop, 3)
    texts = [b""] * 3
    for row, token in pushed:
        (ended,) = matcher.push(np.array([row]), np.array([token], np.int32))
        before = texts[row]
        texts[row] += tokens[token] if token < len(tokens) else b""
        places = [
            texts[row].find(s, max(0, len(before) - len(s) + 1)) for s in stop
        ]  # only what ends behind the text before
        assert ended == any(place >= 0 for place in places)


WORDS = [
    "The better answer is A. Über den Wolken, 90 % of it: naïve café, 東京 🙂 done\n\n### End",
    "system user assistant  two  spaces\tand tabs, the better end",
]


def sentencepiece_tokenizer(decoder: decoders.Decoder) -> PreTrainedTokenizerFast:
    """As Llama 2 has it: metaspaces, and bytes for what has no token."""
    trained = Tokenizer(models.BPE())
    prepend = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    trained.normalizer = normalizers.Sequence(prepend)
    plain = "abcdefghijklmnopqrstuvwxyz ABT.,"
    text = ["".join(c for c in words if c in plain) for words in WORDS]
    trained.train_from_iterator(text, trainers.BpeTrainer(vocab_size=80, show_progress=False))
    learnt = json.loads(trained.to_str())["model"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *learnt["vocab"]]
    core = Tokenizer(
        models.BPE(
            {token: index for index, token in enumerate(tokens)},
            [tuple(merge) for merge in learnt["merges"]],
            byte_fallback=True,
            unk_token="<unk>",
        )
    )
    core.normalizer = trained.normalizer
    core.decoder = decoder
    core.add_tokens(["<think> \u00e4"])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@pytest.mark.parametrize("name", ["tiny", "smollm"])
def test_token_bytes_are_what_a_byte_level_tokenizer_decodes(name, tiny_llama, request):
    folder = tiny_llama if name == "tiny" else request.getfixturevalue("smollm")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    table = token_bytes(tokenizer)
    assert len(table) == len(tokenizer)
    generator = random.Random(0)
    drawn = [[generator.randrange(len(table)) for _ in range(50)] for _ in range(100)]
    for ids in drawn + [tokenizer.encode(text) for text in WORDS]:
        text = b"".join(table[i] for i in ids).decode(errors="replace")
        assert text == tokenizer.decode(ids, skip_special_tokens=True)
    for special in tokenizer.all_special_ids:
        assert table[special] == b""


LLAMA_DECODER = [
    decoders.Replace("\u2581", " "),
    decoders.ByteFallback(),
    decoders.Fuse(),
    decoders.Strip(content=" ", left=1),
]


def test_token_bytes_are_what_a_sentencepiece_tokenizer_decodes():
    tokenizer = sentencepiece_tokenizer(decoders.Sequence(LLAMA_DECODER))
    table = token_bytes(tokenizer)
    assert table[3 + 0x0A] == b"\n" and table[0] == table[1] == table[2] == b""
    # A space at the very start is dropped, and only there.
    start = tokenizer.encode("A", add_special_tokens=False)
    for words in WORDS:
        ids = tokenizer.encode(words, add_special_tokens=False)
        assert any(3 <= i < 259 for i in ids)
        behind = tokenizer.decode(start + ids)[len(tokenizer.decode(start)) :]
        assert b"".join(table[i] for i in ids).decode() == behind == " " + words
    for index in range(259, len(table)):
        behind = tokenizer.decode([*start, index])[len(tokenizer.decode(start)) :]
        assert table[index].decode() == behind


def test_token_bytes_of_metaspaces():
    tokenizer = sentencepiece_tokenizer(decoders.Metaspace())
    table = token_bytes(tokenizer)
    ids = tokenizer.encode("the better end", add_special_tokens=False)
    assert b"".join(table[i] for i in ids).decode() == " the better end"
    behind = tokenizer.decode(ids + ids)[len(tokenizer.decode(ids)) :]
    assert b"".join(table[i] for i in ids).decode() == behind


@pytest.mark.parametrize(
    ("decoder", "name"),
    [
        (decoders.WordPiece(), "WordPiece"),
        (decoders.BPEDecoder(), "BPEDecoder"),
        (decoders.Sequence([decoders.ByteLevel(), decoders.CTC()]), "ByteLevel, CTC"),
        (decoders.Sequence([decoders.Replace("x", " "), decoders.Fuse()]), "Replace, Fuse"),
    ],
)
def test_other_decoders_are_refused(decoder, name):
    with pytest.raises(ConfigError, match=f"^stop: the tokenizer decodes by {name}: .*leave stop"):
        token_bytes(sentencepiece_tokenizer(decoder))


def test_slow_tokenizers_are_refused(tiny_llama):
    class Slow:
        pass

    with pytest.raises(ConfigError, match=r"^stop: Slow is not a fast tokenizer"):
        token_bytes(Slow())
