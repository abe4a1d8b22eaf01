"""Packing 8192 sequences, and planning: FastAlign beside vectorised numpy and TRL's collators.

    pytest bench/test_packing.py

Lengths are drawn from a log-normal distribution fitted to real dialogues (171 tokens in the mean).
What has to be moved: 4 + 1 bytes a token in, 8 + 8 out, and 8 + 8 + 8 more for each trained one.
The floor is one copy of the bytes that come out, into memory that is new, as a pack's is; beside it
is a copy into memory that was written before, which no packer of new packs can reach.

Who does what: "fastalign" makes a Batch of Examples, as the trainer does; "fastalign, arrays" and
"numpy" make the same arrays of lists of arrays, numpy without the checks.  TRL's padding-free
collator for demonstrations lays lists of ids end to end with labels for every token; its collator
for preferences pads each side of 4096 pairs to the longest.  Its `pack_dataset` plans and copies in
one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch
from racing import RACES, SMOKE, Contestants

from fastalign import _bridge
from fastalign.batch import BY_TOKENS, Packer, make_batch, plan_batches
from fastalign.data import Example, Stream

SEQUENCES = 64 if SMOKE else 8192
TURNS, FEW_TURNS = (2, 2) if SMOKE else (31, 3)
BUDGET = 8192
LOG_MEAN, LOG_DEVIATION = 4.87, 0.78  # see tests/test_packer.py
VOCABULARY = 49152


@cache
def sequences() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Token ids and masks; a prompt of about half, then the answer."""
    rng = np.random.default_rng(0)
    lengths = np.clip(np.exp(rng.normal(LOG_MEAN, LOG_DEVIATION, SEQUENCES)), 4, BUDGET).astype(int)
    prompts = np.maximum(lengths * rng.uniform(0.3, 0.7, SEQUENCES), 1).astype(int)
    input_ids = [rng.integers(VOCABULARY, size=n, dtype=np.int32) for n in lengths]
    masks = [np.arange(n) >= p for n, p in zip(lengths, prompts, strict=True)]
    return input_ids, masks


@cache
def examples() -> list[Example]:
    return [
        Example((Stream("demonstration", ids, mask),), 1.0, f"data.jsonl:{i}")
        for i, (ids, mask) in enumerate(zip(*sequences(), strict=True))
    ]


def core_arrays() -> torch.Tensor:
    input_ids, masks = sequences()
    count = len(input_ids)
    ragged = _bridge.Ragged(input_ids, masks, np.ones(count, np.int64), np.ones(count, np.float32))
    chosen = np.arange(count)
    size, _ = ragged.layout(chosen)
    memory = np.empty(size, np.uint8)
    ragged.fill(chosen, memory)
    return torch.from_numpy(memory)


def numpy_arrays() -> dict[str, torch.Tensor]:
    """The same arrays, from the fewest passes over tokens that numpy does it in."""
    input_ids, masks = sequences()
    count = len(input_ids)
    lengths = np.fromiter(map(len, input_ids), np.int64, count)
    cu = np.zeros(count + 1, np.int64)
    np.cumsum(lengths, out=cu[1:])
    flat = np.concatenate(input_ids, dtype=np.int64)
    positions = np.arange(cu[-1])
    positions -= np.repeat(cu[:-1], lengths)
    trained = np.flatnonzero(np.concatenate(masks))
    cu_rows = np.searchsorted(trained, cu)
    targets = flat[trained]
    trained -= 1
    arrays = {
        "input_ids": flat,
        "positions": positions,
        "rows": trained,
        "targets": targets,
        "streams": np.repeat(np.arange(count), np.diff(cu_rows)),
        "records": np.arange(count),
        "cu_seqlens_q": cu.astype(np.int32),
        "cu_rows": cu_rows.astype(np.int32),
        "segments": np.arange(count, dtype=np.int32),
        "weights": np.ones(count, np.float32),
    }
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def check_numpy() -> None:
    batch = make_batch(examples())
    for name, array in numpy_arrays().items():
        assert torch.equal(getattr(batch, name), array), name


def pack_contestants() -> Contestants:
    check_numpy()
    packed = core_arrays().numpy()
    used = packed.copy()
    return {
        "fastalign": lambda: make_batch(examples()),
        "fastalign, arrays": core_arrays,
        "numpy": numpy_arrays,
        "copy": packed.copy,
        "copy, memory in use": lambda: np.copyto(used, packed),
    }


def collator_contestants() -> Contestants:
    made: Contestants = {"fastalign": lambda: make_batch(examples())}
    try:
        from trl.trainer.dpo_trainer import DataCollatorForPreference
        from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
    except ImportError:
        return made
    # As lists of ids, which is how TRL has them from its data sets.
    demonstrations, pairs = [], []
    for ids, mask in zip(*sequences(), strict=True):
        labels = np.where(mask, ids, -100)
        demonstrations.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    for first, second in zip(demonstrations[::2], demonstrations[1::2], strict=True):
        prompt = first["labels"].count(-100)
        chosen, rejected = first["input_ids"][prompt:], second["input_ids"][prompt:]
        prompt_ids = first["input_ids"][:prompt]
        pairs.append({"prompt_ids": prompt_ids, "chosen_ids": chosen, "rejected_ids": rejected})
    flat = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    padded = DataCollatorForPreference(pad_token_id=0)
    return made | {
        "trl, padding-free": lambda: flat(demonstrations),
        "trl, preference": lambda: padded(pairs),
    }


def plan_contestants() -> Contestants:
    packer = Packer(examples())
    made: Contestants = {
        "fastalign": lambda: packer.plan(BUDGET, 8, BY_TOKENS),
        # All of it from Examples: measured, planned, packed, on one of one rank.
        "fastalign, with packs": lambda: plan_batches(examples(), BUDGET, 0, 1),
    }
    try:
        import datasets
        from trl import pack_dataset
    except ImportError:
        return made
    datasets.disable_caching()
    datasets.disable_progress_bars()
    data = datasets.Dataset.from_dict({"input_ids": [ids.tolist() for ids in sequences()[0]]})
    return made | {"trl, pack_dataset": lambda: pack_dataset(data, BUDGET)}


def step_contestants() -> Contestants:
    """Forward and backward of a model of SmolLM2-135M's shape, all of it trained, in bf16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from fastalign.logprobs import Policy, check_packing, probe_batch

    layers, vocabulary = (1, 64) if SMOKE else (30, VOCABULARY)
    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=vocabulary, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    policy = Policy(LlamaForCausalLM(config).bfloat16())
    assert (
        check_packing(policy, policy, probe_batch(vocabulary, (5, 8), torch.device("cpu"))) is None
    )
    some = [
        Example((Stream(s.role, s.input_ids % vocabulary, s.loss_mask),), 1.0, e.source)
        for e in examples()[: 2 if SMOKE else 4]
        for s in e.streams
    ]

    def step() -> None:
        for pack in plan_batches(some, 512, 0, 1):
            logprob, _ = policy(pack)
            (-logprob.mean()).backward()
        policy.zero_grad()

    return {"step": step, "packing of the step": lambda: plan_batches(some, 512, 0, 1)}


def run(
    race: Any, group: str, make: Callable[[], Contestants], who: str, turns: int
) -> dict[str, float]:
    """Median seconds of everyone in the group."""
    # What numpy allocates would not be seen.
    race(group, make, who, turns=turns, peaks=False)
    return {name: median(measured.seconds) for name, measured in RACES[group].items()}


PACKERS = ("fastalign", "fastalign, arrays", "numpy", "copy", "copy, memory in use")


@pytest.mark.parametrize("who", PACKERS)
def test_packing(race, benchmark, who):
    seconds = run(race, f"packing {SEQUENCES} sequences", pack_contestants, who, TURNS)
    benchmark.extra_info["floors"] = seconds[who] / seconds["copy"]
    benchmark.extra_info["mib"] = len(core_arrays()) / 2**20


@pytest.mark.parametrize("who", ["fastalign", "trl, padding-free", "trl, preference"])
def test_collators(race, benchmark, who):
    run(race, f"collating {SEQUENCES} sequences", collator_contestants, who, FEW_TURNS)


@pytest.mark.parametrize("who", ["fastalign", "fastalign, with packs", "trl, pack_dataset"])
def test_planning(race, benchmark, who):
    run(race, f"planning {SEQUENCES} examples", plan_contestants, who, FEW_TURNS)


@pytest.mark.parametrize("who", ["step", "packing of the step"])
def test_share_of_a_step(race, benchmark, who):
    seconds = run(race, "step of 135M parameters", step_contestants, who, FEW_TURNS)
    benchmark.extra_info["share"] = seconds[who] / seconds["step"]
