"""The embedded engine against transformers: what it samples, scores, and holds after a transfer."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import fastalign.rollout as rollout
from fastalign.config import ConfigError, RolloutConfig
from fastalign.rollout import (
    EngineError,
    Rollout,
    SamplingSettings,
    ServedModel,
    choose_engine,
    hf,
    make_engine,
)
from fastalign.rollout.hf import HfEngine
from fastalign.rollout.sync import canary

# fp32 on both sides: what batching and padding change in the last bits of 2-layer logits.
TOLERANCE = 2e-5
CONFIG = RolloutConfig(engine="hf", max_num_seqs=5)
LENGTHS = (1, 2, 9, 9, 17, 30, 5, 1, 12)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    # On matrices of this size threads mostly wait for one another.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _engine(path: Path) -> HfEngine:
    return HfEngine(ServedModel(path, dtype=torch.float32, max_model_len=256), CONFIG)


@pytest.fixture
def engine(tiny_llama) -> Iterator[HfEngine]:
    made = _engine(tiny_llama)
    yield made
    made.close()


@pytest.fixture
def model(tiny_llama):
    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()


def _prompts(vocab_size: int, lengths=LENGTHS, seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(3, vocab_size, n).astype(np.int32) for n in lengths]


def _vocab_size(model) -> int:
    return model.config.vocab_size


def _logps(model, prompt: np.ndarray, completion: np.ndarray) -> torch.Tensor:
    """Teacher-forced log-probs [L, V] of the positions that predict the completion."""
    ids = torch.from_numpy(np.concatenate([prompt, completion]).astype(np.int64))[None]
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0].float()
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


def _assert_scored(model, prompts, rollouts: list[Rollout], tolerance=TOLERANCE) -> None:
    for prompt, sample in zip(prompts, rollouts, strict=True):
        assert sample.token_ids.dtype == np.int32
        assert sample.logprobs.dtype == np.float32
        logps = _logps(model, prompt, sample.token_ids)
        expected = logps[torch.arange(len(sample.token_ids)), sample.token_ids.astype(np.int64)]
        np.testing.assert_allclose(sample.logprobs, expected.numpy(), atol=tolerance)


def _same(left: list[Rollout], right: list[Rollout]) -> bool:
    return all(
        np.array_equal(a.token_ids, b.token_ids) and a.finish_reason == b.finish_reason
        for a, b in zip(left, right, strict=True)
    )


# ------------------------------------------------------------------------------------- sampling


def test_greedy_equals_transformers(engine, model):
    vocab = _vocab_size(model)
    prompts = _prompts(vocab)
    # Half of the vocabulary stops, so that rows leave the batch at different steps.
    stops = tuple(range(0, vocab, 2))
    settings = SamplingSettings(70, temperature=0, stop_token_ids=stops)
    rollouts = engine.generate(prompts, settings, seeds=range(len(prompts)))
    for prompt, sample in zip(prompts, rollouts, strict=True):
        ids = torch.from_numpy(prompt.astype(np.int64))[None]
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=70,
            do_sample=False,
            eos_token_id=list(stops),
            pad_token_id=0,
        )[0, len(prompt) :]
        assert sample.token_ids.tolist() == out.tolist()
        stopped = sample.token_ids[-1] in stops
        assert sample.finish_reason == ("stop" if stopped else "length")
        assert stopped or len(sample.token_ids) == 70
    _assert_scored(model, prompts, rollouts)


def test_greedy_equals_transformers_on_smollm(smollm):
    model = AutoModelForCausalLM.from_pretrained(smollm, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(smollm)
    texts = ["The capital of France is", "Once"]
    prompts = [np.array(tokenizer.encode(text), dtype=np.int32) for text in texts]
    engine = _engine(smollm)
    rollouts = engine.generate(prompts, SamplingSettings(6, temperature=0), seeds=[0, 1])
    for prompt, sample in zip(prompts, rollouts, strict=True):
        ids = torch.from_numpy(prompt.astype(np.int64))[None]
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=None,
        )
        assert sample.token_ids.tolist() == out[0, len(prompt) :].tolist()
    # 30 layers in fp32, cached against uncached.
    _assert_scored(model, prompts, rollouts, tolerance=1e-3)
    engine.close()


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9), (1.5, 0.5)])
def test_logprobs_are_the_raw_models(engine, model, temperature, top_p):
    prompts = _prompts(_vocab_size(model))
    settings = SamplingSettings(75, temperature, top_p, stop_token_ids=(3, 4, 5))
    rollouts = engine.generate(prompts, settings, seeds=range(len(prompts)))
    assert {sample.finish_reason for sample in rollouts} == {"stop", "length"}
    _assert_scored(model, prompts, rollouts)
    for sample in rollouts:
        inner = sample.token_ids[:-1] if sample.finish_reason == "stop" else sample.token_ids
        assert not np.isin(inner, settings.stop_token_ids).any()
        assert sample.weight_version == 0


def test_a_seed_decides_its_request_alone(engine, model):
    prompts = _prompts(_vocab_size(model))
    settings = SamplingSettings(20, top_p=0.95, stop_token_ids=tuple(range(20)))
    seeds = [2**40 + i for i in range(len(prompts))]
    whole = engine.generate(prompts, settings, seeds)
    assert _same(whole, engine.generate(prompts, settings, seeds))
    backwards = engine.generate(prompts[::-1], settings, seeds[::-1])
    assert _same(whole, backwards[::-1])
    for index in range(len(prompts)):
        alone = engine.generate([prompts[index]], settings, [seeds[index]])
        assert _same([whole[index]], alone)
    others = engine.generate(prompts, settings, [seed + 100 for seed in seeds])
    assert not _same(whole, others)


def test_samples_of_one_prompt_share_it_and_differ(engine, model, monkeypatch):
    first, second = _prompts(_vocab_size(model), lengths=(20, 12))
    prompts = [first, second, first, first]
    settings = SamplingSettings(15)
    together = engine.generate(prompts, settings, seeds=[1, 2, 3, 4])
    apart = [
        engine.generate([p], settings, [s])[0] for p, s in zip(prompts, [1, 2, 3, 4], strict=True)
    ]
    assert _same(together, apart)
    assert not _same([together[0]], [together[2]])
    # The prompts went through the model once each: two rows of 20 positions.
    shapes = []
    forward = engine._forward
    monkeypatch.setattr(
        engine, "_forward", lambda ids, *rest: shapes.append(ids.shape) or forward(ids, *rest)
    )
    engine.generate(prompts, settings, seeds=[1, 2, 3, 4])
    assert shapes[0] == (2, 20)
    assert set(shapes[1:]) == {(4, 1)}


def test_prompts_beyond_the_token_budget_run_in_several_batches(engine, model, monkeypatch):
    prompts = _prompts(_vocab_size(model))
    settings = SamplingSettings(8)
    expected = engine.generate(prompts, settings, seeds=range(9))
    monkeypatch.setattr(hf, "_PREFILL_TOKENS", 30)
    batches = list(engine._batches(prompts, 30))
    assert sorted(i for rows in batches for i in rows) == list(range(9))
    for rows in batches:
        longest = max(prompts[i].size for i in rows)
        assert len(rows) == 1 or len(rows) * longest <= 30
    assert _same(expected, engine.generate(prompts, settings, seeds=range(9)))


def test_top_p_never_leaves_the_nucleus(engine, model):
    prompts = _prompts(_vocab_size(model))
    temperature, top_p = 1.3, 0.4
    rollouts = engine.generate(
        prompts, SamplingSettings(25, temperature, top_p), seeds=range(len(prompts))
    )
    for prompt, sample in zip(prompts, rollouts, strict=True):
        p = (_logps(model, prompt, sample.token_ids) / temperature).softmax(-1).double()
        chosen = p.gather(-1, torch.from_numpy(sample.token_ids.astype(np.int64))[:, None])
        more_probable = (p * (p > chosen)).sum(-1)
        assert (more_probable < top_p + 1e-5).all()


def test_min_p_and_top_k_bound_what_is_drawn(engine, model):
    prompts = _prompts(_vocab_size(model))
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
            if settings.top_k:
                ranks = (logits > chosen + 1e-5).sum(-1)
                assert (ranks < settings.top_k).all()
                drawn |= set(ranks.tolist())
            else:
                assert (chosen[:, 0] >= logits.amax(-1) + np.log(0.6) - 1e-5).all()
                drawn |= set((logits > chosen).sum(-1).tolist())
        assert len(drawn) >= 3, "not only the most probable token"


def test_bf16_logits_are_drawn_from_as_they_are(sharp_llama, monkeypatch):
    engine = HfEngine(ServedModel(sharp_llama, dtype=torch.bfloat16, max_model_len=64), CONFIG)
    prompts = _prompts(320, lengths=(4, 9))
    kept = []
    forward = engine._forward
    monkeypatch.setattr(
        engine, "_forward", lambda *args: kept.append(forward(*args).clone()) or kept[-1]
    )
    rollouts = engine.generate(prompts, SamplingSettings(6), seeds=[1, 2])
    assert {logits.dtype for logits in kept} == {torch.bfloat16}
    for row, sample in enumerate(rollouts):
        logps = torch.stack([logits[row].double().log_softmax(-1) for logits in kept])
        expected = logps[torch.arange(6), sample.token_ids.astype(np.int64)].numpy()
        np.testing.assert_allclose(sample.logprobs, expected, atol=2e-6)
    engine.close()


def test_half_precision_logits_are_drawn_from(sharp_llama):
    engine = HfEngine(ServedModel(sharp_llama, dtype=torch.float16, max_model_len=64), CONFIG)
    (sample,) = engine.generate(_prompts(320, lengths=(4,)), SamplingSettings(6), seeds=[1])
    assert sample.token_ids.size == 6 and (sample.logprobs < 0).all()
    engine.close()


def test_logits_that_are_no_numbers_end_the_call(engine, model):
    weights = {name: torch.full_like(p, torch.nan) for name, p in _weights(model).items()}
    engine.load_weights(weights.items(), frozenset(weights), version=1)
    with pytest.raises(EngineError, match=r"cannot be sampled from: logits\[0\]\[0\] is NaN"):
        engine.generate(_prompts(_vocab_size(model)), SamplingSettings(2), range(9))


def test_gaps_close_with_few_moves():
    keep = np.array([True, False, True, True, False])
    assert hf._close_gaps(keep).tolist() == [0, 3, 2]
    assert hf._close_gaps(~keep).tolist() == [4, 1]
    assert hf._close_gaps(np.zeros(3, dtype=np.bool_)).tolist() == []


# --------------------------------------------------------------------------------- stop strings


def test_stop_strings_end_a_completion_with_the_token_that_completes_them(tiny_llama):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    engine = HfEngine(
        ServedModel(tiny_llama, dtype=torch.float32, max_model_len=256, tokenizer=tokenizer), CONFIG
    )
    prompts = _prompts(320)
    free = engine.generate(prompts, SamplingSettings(60), seeds=range(9))
    texts = [tokenizer.decode(sample.token_ids, skip_special_tokens=True) for sample in free]
    # Of whole characters: a random model writes bytes that are none.
    pairs = [re.search(r"[ -~]{4}", text[4:]) for text in texts[:3]]
    stop = (*(pair[0] for pair in pairs if pair), "nowhere")
    assert len(stop) > 2
    stopped = engine.generate(prompts, SamplingSettings(60, stop=stop), seeds=range(9))
    reasons = set()
    for whole, cut in zip(free, stopped, strict=True):
        n = len(cut.token_ids)
        np.testing.assert_array_equal(cut.token_ids, whole.token_ids[:n])
        np.testing.assert_allclose(cut.logprobs, whole.logprobs[:n], atol=TOLERANCE)
        found = [
            any(s in tokenizer.decode(whole.token_ids[:k], skip_special_tokens=True) for s in stop)
            for k in range(1, 61)
        ]
        ended = any(found)
        assert cut.finish_reason == ("stop" if ended else "length")
        assert n == (found.index(True) + 1 if ended else 60)
        reasons.add(cut.finish_reason)
    assert reasons == {"stop", "length"}
    engine.close()


def test_stop_strings_need_a_tokenizer(engine):
    with pytest.raises(
        ValueError, match=r"stop is \('x',\), but the engine was made without a tok"
    ):
        engine.generate([np.array([5])], SamplingSettings(4, stop=("x",)), [0])


def test_an_empty_call(engine):
    assert engine.generate([], SamplingSettings(4), []) == []
    assert engine.next_logprobs([], [1, 2]).shape == (0, 2)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (np.array([], dtype=np.int32), "prompt 0 is empty"),
        (np.array([1.0]), "must be a vector of token ids"),
        (np.array([[1]]), "must be a vector of token ids"),
        (np.array([10**6]), "outside 0"),
        (np.ones(250, dtype=np.int32), "250 tokens and 10 more are asked for"),
    ],
)
def test_bad_prompts_are_refused(engine, prompt, message):
    with pytest.raises(ValueError, match=message):
        engine.generate([prompt], SamplingSettings(10), [0])


def test_bad_settings_are_refused(engine):
    with pytest.raises(ValueError, match=r"temperature is 0.001"):
        SamplingSettings(4, temperature=0.001)
    with pytest.raises(ValueError, match="top_p is 0"):
        SamplingSettings(4, top_p=0)
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        SamplingSettings(0)
    with pytest.raises(ValueError, match="top_k is -1: it must be 0"):
        SamplingSettings(4, top_k=-1)
    with pytest.raises(ValueError, match=r"min_p is 1.5: it must be from 0 to 1"):
        SamplingSettings(4, min_p=1.5)
    with pytest.raises(ValueError, match="stop holds an empty string"):
        SamplingSettings(4, stop=("a", ""))
    with pytest.raises(ValueError, match=r"stop holds 'a.', with U\+FFFD"):
        SamplingSettings(4, stop=("a\ufffd",))
    with pytest.raises(ValueError, match="seed 0 is -1: it must be from 0 to"):
        engine.generate([np.array([5])], SamplingSettings(4), [-1])
    with pytest.raises(ValueError, match="1 prompts have 2 seeds"):
        engine.generate([np.array([5])], SamplingSettings(4), [0, 1])


def test_next_logprobs_equal_the_models(engine, model):
    prompts = _prompts(_vocab_size(model))
    prompts.append(prompts[2])
    tokens = [7, 0, _vocab_size(model) - 1, 7]
    scores = engine.next_logprobs(prompts, tokens)
    assert scores.dtype == np.float32
    expected = [_logps(model, p, np.array([0]))[0, tokens].numpy() for p in prompts]
    np.testing.assert_allclose(scores, np.stack(expected), atol=TOLERANCE)


# -------------------------------------------------------------------------------------- weights


def _weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def _moved(model, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * 0.2 * (parameter.std() + 0.02))


def test_loaded_weights_are_sampled_from(engine, model):
    prompts = _prompts(_vocab_size(model))
    before = engine.next_logprobs(prompts, [5, 6])
    _moved(model)
    weights = _weights(model)
    report = engine.load_weights(iter(weights.items()), frozenset(weights), version=3)
    assert (report.version, report.tensors) == (3, len(weights))
    assert report.bytes == sum(4 * w.numel() for w in weights.values())
    after = engine.next_logprobs(prompts, [5, 6])
    assert np.abs(after - before).mean() > 0.05
    rollouts = engine.generate(prompts, SamplingSettings(10), seeds=range(len(prompts)))
    assert {sample.weight_version for sample in rollouts} == {3}
    _assert_scored(model, prompts, rollouts)


def test_tied_weights_are_sent_once(tiny_llama, tmp_path):
    settings = LlamaConfig.from_pretrained(tiny_llama, tie_word_embeddings=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(settings).eval()
    model.save_pretrained(tmp_path)
    engine = _engine(tmp_path)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(2)
    weights = _weights(model)
    assert "lm_head.weight" not in weights
    engine.load_weights(weights.items(), frozenset(weights), version=1)
    prompts = _prompts(settings.vocab_size)
    expected = [_logps(model, p, np.array([0]))[0, [8, 9]].numpy() for p in prompts]
    np.testing.assert_allclose(engine.next_logprobs(prompts, [8, 9]), expected, atol=TOLERANCE)
    engine.close()


def test_weights_of_another_dtype_are_rounded_to_the_engines(tiny_llama, model):
    engine = HfEngine(ServedModel(tiny_llama, dtype=torch.bfloat16, max_model_len=64), CONFIG)
    _moved(model)
    weights = _weights(model)
    engine.load_weights(weights.items(), frozenset(weights), version=1)
    held = engine._parameters["lm_head.weight"]
    assert torch.equal(held, weights["lm_head.weight"].bfloat16())
    engine.close()


NAME = "model.layers.1.mlp.up_proj.weight"


def _without(weights):
    return [(name, w) for name, w in weights.items() if name != NAME]


def _reshaped(weights):
    return [(name, w[:-1] if name == NAME else w) for name, w in weights.items()]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without, f"1 never sent: {NAME}"),
        (lambda w: [*w.items(), ("model.extra.weight", w[NAME])], "unknown: model.extra.weight"),
        (_reshaped, rf"another shape than the model's, the first: {NAME} \(127, 64\) for"),
    ],
)
def test_a_bad_transfer_is_refused_until_a_whole_one(engine, model, change, message):
    weights = _weights(model)
    consumed = []

    def tensors():
        yield from change(weights)
        consumed.append(True)

    with pytest.raises(EngineError, match=message):
        engine.load_weights(tensors(), frozenset(weights), version=1)
    assert consumed, "other ranks may be waiting inside the iterator"
    with pytest.raises(EngineError, match="version 1 did not finish"):
        engine.generate([np.array([5])], SamplingSettings(2), [0])
    with pytest.raises(EngineError, match="version 1 did not finish"):
        engine.next_logprobs([np.array([5])], [0])
    engine.load_weights(weights.items(), frozenset(weights), version=2)
    assert engine.generate([np.array([5])], SamplingSettings(2), [0])[0].weight_version == 2


def test_a_trainer_that_forgets_a_tensor_of_the_model_is_refused(engine, model):
    weights = _weights(model)
    del weights[NAME]
    with pytest.raises(EngineError, match=f"never sent: {NAME}"):
        engine.load_weights(weights.items(), frozenset(weights), version=1)


@pytest.mark.parametrize("fault", ["corrupted", "dropped"])
def test_content_is_compared_not_arrival(engine, model, monkeypatch, fault):
    _moved(model)
    weights = _weights(model)
    place = hf._place

    def faulty(parameter, tensor):
        if torch.equal(tensor, weights[NAME]):
            if fault == "dropped":
                return
            tensor = tensor.clone()
            tensor.view(-1)[17] *= 1 + 2**-20
        place(parameter, tensor)

    monkeypatch.setattr(hf, "_place", faulty)
    with pytest.raises(EngineError, match=f"1 of other content than was sent: {NAME}"):
        engine.load_weights(weights.items(), frozenset(weights), version=1)


def test_a_senders_failure_leaves_the_engine_refusing(engine, model):
    weights = _weights(model)

    def tensors():
        yield from list(weights.items())[:3]
        raise RuntimeError("a rank is gone")

    with pytest.raises(RuntimeError, match="a rank is gone"):
        engine.load_weights(tensors(), frozenset(weights), version=1)
    with pytest.raises(EngineError, match="did not finish"):
        engine.next_logprobs([np.array([5])], [0])


def test_canary_from_end_to_end(engine, model):
    prompts = _prompts(_vocab_size(model))
    tokens = list(range(20))
    kept = {name: p.clone() for name, p in _weights(model).items()}
    version = iter(range(1, 9))

    def restore() -> None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(kept[name])

    def push() -> None:
        weights = _weights(model)
        engine.load_weights(weights.items(), frozenset(weights), next(version))

    def trainer() -> np.ndarray:
        return np.stack([_logps(model, p, np.array([0]))[0, tokens].numpy() for p in prompts])

    parts = {
        "perturb": lambda: _moved(model),
        "restore": restore,
        "push": push,
        "engine_logprobs": lambda: engine.next_logprobs(prompts, tokens),
        "trainer_logprobs": trainer,
        "floor": 0.01,
    }
    report = canary(**parts)
    assert report.change > 0.04 and report.gap < 1e-4 and report.residue < 1e-6
    with pytest.raises(EngineError, match="did not follow"):
        canary(**(parts | {"push": lambda: None}))


# ------------------------------------------------------------------------------------- adapters


def _adapter(path: Path, seed: int, **options):
    """A PeftModel with a random adapter, its tensors and its configuration."""
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **options
    )
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model = PeftModel(base, config, "policy").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    tensors = get_peft_model_state_dict(model, adapter_name="policy")
    return model, tensors, config.to_dict()


def _scores(model, prompts) -> np.ndarray:
    return np.stack([_logps(model, p, np.array([0]))[0, [5, 6]].numpy() for p in prompts])


def test_adapters_answer_beside_the_base(engine, model, tiny_llama):
    prompts = _prompts(_vocab_size(model))
    base = engine.next_logprobs(prompts, [5, 6])
    adapted = {}
    for name, seed in (("policy", 1), ("judge", 2)):
        peft_model, tensors, config = _adapter(tiny_llama, seed)
        report = engine.load_adapter(name, tensors, config, version=10 + seed)
        assert (report.version, report.tensors) == (10 + seed, len(tensors))
        adapted[name] = peft_model
    for name, peft_model in adapted.items():
        scores = engine.next_logprobs(prompts, [5, 6], adapter=name)
        np.testing.assert_allclose(scores, _scores(peft_model, prompts), atol=TOLERANCE)
        assert np.abs(scores - base).mean() > 0.05
        rollouts = engine.generate(prompts, SamplingSettings(6), range(9), adapter=name)
        _assert_scored(peft_model, prompts, rollouts)
        assert rollouts[0].weight_version == {"policy": 11, "judge": 12}[name]
    np.testing.assert_array_equal(engine.next_logprobs(prompts, [5, 6]), base)
    assert engine.generate(prompts[:1], SamplingSettings(2), [0])[0].weight_version == 0


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}}])
def test_a_new_version_replaces_the_old(engine, model, tiny_llama, options):
    prompts = _prompts(_vocab_size(model))
    base = engine.next_logprobs(prompts, [5, 6])
    _, tensors, config = _adapter(tiny_llama, 1)
    engine.load_adapter("policy", tensors, config, version=1)
    peft_model, tensors, config = _adapter(tiny_llama, 5, **options)
    engine.load_adapter("policy", tensors, config, version=2)
    scores = engine.next_logprobs(prompts, [5, 6], adapter="policy")
    np.testing.assert_allclose(scores, _scores(peft_model, prompts), atol=TOLERANCE)
    np.testing.assert_array_equal(engine.next_logprobs(prompts, [5, 6]), base)


def test_base_weights_change_under_an_adapter(engine, model, tiny_llama):
    prompts = _prompts(_vocab_size(model))
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


def test_bad_adapters_are_refused(engine, tiny_llama, monkeypatch):
    _, tensors, config = _adapter(tiny_llama, 1)
    name = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
    assert name in tensors
    fewer = {key: value for key, value in tensors.items() if key != name}
    with pytest.raises(EngineError, match=f"unknown: {name}"):
        engine.load_adapter("policy", fewer, config, version=1)
    with pytest.raises(EngineError, match="not held by the engine: other"):
        engine.load_adapter("policy", tensors | {"other": tensors[name]}, config, version=1)
    with pytest.raises(EngineError, match=r"down_proj.lora_A.weight has shape \(4, 127\)"):
        engine.load_adapter("policy", tensors | {name: tensors[name][:, 1:]}, config, version=1)
    with pytest.raises(EngineError, match=r"type .*IA3: LoRA is supported"):
        engine.load_adapter("policy", tensors, {"peft_type": "IA3"}, version=1)
    with pytest.raises(EngineError, match="no adapter 'policy' is loaded"):
        engine.next_logprobs([np.array([5])], [0], adapter="policy")

    monkeypatch.setattr(hf, "_place", lambda parameter, tensor: None)
    _, tensors, config = _adapter(tiny_llama, 2)
    with pytest.raises(EngineError, match=f"{len(tensors)} of other content"):
        engine.load_adapter("policy", tensors, config, version=1)


# ---------------------------------------------------------------------------------- life and choice


def test_a_sleeping_or_closed_engine_does_not_answer(tiny_llama):
    engine = _engine(tiny_llama)
    engine.wake()
    engine.sleep()
    engine.sleep()
    with pytest.raises(EngineError, match="wake it first"):
        engine.next_logprobs([np.array([5])], [0])
    engine.wake()
    engine.next_logprobs([np.array([5])], [0])
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.next_logprobs([np.array([5])], [0])


def test_zero_3_must_come_later(tiny_llama, monkeypatch):
    monkeypatch.setattr(hf, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(EngineError, match="before HfDeepSpeedConfig"):
        _engine(tiny_llama)


def test_without_vllm_the_embedded_engine_is_taken(tiny_llama, monkeypatch):
    found = importlib.util.find_spec

    def without_vllm(name, *rest):
        return None if name == "vllm" else found(name, *rest)

    monkeypatch.setattr(rollout.importlib.util, "find_spec", without_vllm)
    engine = make_engine(
        ServedModel(tiny_llama, dtype=torch.float32, max_model_len=64),
        RolloutConfig(dtype="bfloat16"),
    )
    assert engine.name == "hf"
    assert choose_engine(RolloutConfig()) == ("hf", "vLLM is not installed")
    assert choose_engine(RolloutConfig(engine="hf")) == ("hf", "as the recipe says")
    assert {p.dtype for p in engine._parameters.values()} == {torch.bfloat16}
    engine.close()
    with pytest.raises(ConfigError, match=r"rollout.engine is 'vllm'.*pip install 'fastalign\[vll"):
        make_engine(
            ServedModel(tiny_llama, dtype=torch.float32, max_model_len=64),
            RolloutConfig(engine="vllm"),
        )
    shared = RolloutConfig(tensor_parallel_size=2)
    with pytest.raises(
        ConfigError, match=r"^rollout\.tensor_parallel_size is 2, but vLLM is not in"
    ):
        make_engine(
            ServedModel(tiny_llama, dtype=torch.float32, max_model_len=64), shared, world_size=2
        )
    with pytest.raises(ConfigError, match=r"is 2, which does not divide the 3 process\(es\)"):
        make_engine(
            ServedModel(tiny_llama, dtype=torch.float32, max_model_len=64), shared, world_size=3
        )
