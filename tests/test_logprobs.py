"""Model + batch -> log-probs: the packed forward against sequences alone, and the start-up checks
on the kinds of models that users bring."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from support import distance, recipe, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedModel

from fastalign.attention import PACKED_ATTENTION
from fastalign.batch import Batch, make_batch, plan_batches
from fastalign.config import ConfigError, parse_config
from fastalign.data import Example, Stream
from fastalign.logprobs import (
    Policy,
    check_logprobs,
    check_packing,
    check_sharing,
    probe_batch,
    probe_streams,
)
from fastalign.methods.dpo import Dpo
from fastalign.train import train

pytestmark = pytest.mark.usefixtures("quiet_process")

CPU = torch.device("cpu")
VOCABULARY = 97
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}


def tiny(family: str, **keys) -> PreTrainedModel:
    """A random model with a loud head, so that what happens to logits shows in log-probs."""
    middle = "Text" if family in ("Gemma3", "Qwen3_5") else ""
    config = getattr(transformers, f"{family}{middle}Config")(**SIZES | keys)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(10)
    return model


def tiny_qwen3_5(**keys) -> PreTrainedModel:
    """Gated delta rule in its first layer, attention in its second."""
    return tiny(
        "Qwen3_5",
        head_dim=8,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"],
        **keys,
    )


def alone(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """float64 log-probs of the batch's targets, each sequence through transformers by itself."""
    parts = []
    for a, b in pairwise(batch.cu_seqlens_q.tolist()):
        ids = batch.input_ids[a:b]
        logp = model(ids[None], use_cache=False).logits[0].double().log_softmax(-1)
        rows = batch.rows[(batch.rows >= a) & (batch.rows < b)] - a
        parts.append(logp[rows, ids[rows + 1]])
    return torch.cat(parts)


# --------------------------------------------------------------------------------- packing

PACKS: list[tuple[str, dict]] = [
    ("Llama", {}),
    ("GPT2", {}),
    # The window is shorter than both sequences.
    ("Mistral", {"sliding_window": 8, "head_dim": 8}),
    ("Gemma3", {"sliding_window": 8, "head_dim": 8}),
]


@pytest.mark.parametrize(("family", "keys"), PACKS, ids=[family for family, _ in PACKS])
def test_packed_is_what_each_sequence_gives_alone(family, keys):
    model = tiny(family, **keys)
    batch = probe_batch(VOCABULARY, (37, 52, 3), CPU)
    expected = alone(model, batch)
    policy = Policy(model)
    assert check_packing(policy, policy, batch) is None
    assert policy.packed and model.config._attn_implementation == PACKED_ATTENTION
    with torch.no_grad():
        logprob, log1m = policy(batch)
    torch.testing.assert_close(logprob.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(log1m.double(), torch.log1p(-expected.exp()), rtol=1e-4, atol=1e-5)


def test_the_window_is_seen():
    """The window test would pass for nothing if this model did not look past eight tokens."""
    narrow = tiny("Mistral", sliding_window=8, head_dim=8)
    wide = tiny("Mistral", sliding_window=None, head_dim=8)
    batch = probe_batch(VOCABULARY, (37,), CPU)
    assert (alone(narrow, batch) - alone(wide, batch)).abs().max() > 1e-2


def test_targets_with_holes_in_the_mask():
    ids = np.arange(20, 40, dtype=np.int32)
    mask = np.isin(np.arange(20), (3, 4, 11, 19))
    batch = make_batch([Example((Stream("plain", ids, mask),), 1.0, "")] * 2)
    policy = Policy(tiny("Llama"))
    expected = alone(policy.causal_lm, batch)
    check_packing(policy, policy, probe_batch(VOCABULARY, (37, 52), CPU))
    with torch.no_grad():
        logprob, _ = policy(batch)
    assert len(logprob) == 8
    torch.testing.assert_close(logprob.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("family", "keys"), PACKS[::2], ids=["Llama", "Mistral"])
def test_the_gradient_of_a_pack_is_that_of_its_sequences(family, keys, checkpointing):
    model = tiny(family, **keys)
    batch = probe_batch(VOCABULARY, (37, 52, 20), CPU)
    weights = torch.linspace(-1, 2, len(batch.targets))
    (alone(model, batch) * weights).sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    policy = Policy(model)
    assert check_packing(policy, policy, batch) is None
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    logprob, _ = policy(batch)
    (logprob * weights).sum().backward()
    got = {n: p.grad for n, p in model.named_parameters()}
    assert distance(got, expected) < 2e-6


def refuses_packs(*args, **kwargs):
    raise NotImplementedError("not today")


def leaks(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Attention that ignores where sequences begin, as one that does not know cu_seqlens does."""
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, enable_gqa=True
    )
    return out.transpose(1, 2), None


@pytest.mark.parametrize(
    ("attention", "reason"),
    [
        (leaks, "LlamaForCausalLM gives other results packed than alone (relative difference "),
        (refuses_packs, "LlamaForCausalLM cannot run packed attention: not today"),
    ],
)
def test_a_model_that_mixes_its_sequences_is_run_one_by_one(monkeypatch, attention, reason):
    model = tiny("Llama")
    before = model.config._attn_implementation
    monkeypatch.setitem(
        transformers.AttentionInterface._global_mapping, PACKED_ATTENTION, attention
    )
    batch = probe_batch(VOCABULARY, (37, 52), CPU)
    policy = Policy(model)
    said = check_packing(policy, policy, batch)
    assert said is not None and said.startswith(reason)
    assert not policy.packed and model.config._attn_implementation == before
    with torch.no_grad():
        logprob, _ = policy(batch)
    torch.testing.assert_close(logprob.double(), alone(model, batch), rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------- sharing


def begin_alike() -> list[Example]:
    """Two pairs and four answers to one prompt, a sequence that shares nothing, and a pair and two
    answers to one prompt in examples of their own."""
    parts = [(11, (5, 9)), (3, (1, 8)), (17, (6, 1, 12, 4)), (9, (7, 2, 10, 1))]
    *examples, group = (probe_streams(VOCABULARY, n, rest, seed=n) for n, rest in parts)
    whole = probe_streams(VOCABULARY, 6, (7,), seed=1)
    members = [Example(group.streams[a:b], a + 1.0, "") for a, b in ((0, 2), (2, 3), (3, 4))]
    return [examples[0], whole, *examples[1:], *members]


NO_DROPOUT = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}


@pytest.mark.parametrize("kind", ["full", "checkpointed", "lora"])
@pytest.mark.parametrize("family", ["Llama", "GPT2", "Qwen3"])
def test_a_shared_prompt_changes_no_value_and_no_gradient(family, kind):
    model: Any = tiny(family, **NO_DROPOUT if family == "GPT2" else {}).double()
    # The norms of the other two compute in float32, whatever the model's dtype is.
    close = {"rtol": 1e-9, "atol": 1e-10} if family == "GPT2" else {"rtol": 1e-3, "atol": 1e-4}
    if kind == "lora":
        torch.manual_seed(5)
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(model, config).double()
    policy = Policy(model)
    assert check_packing(policy, policy, probe_batch(VOCABULARY, (37, 52), CPU)) is None
    assert check_sharing(policy, policy, probe_streams(VOCABULARY, 24, (13, 28, 1))) is None
    assert policy.shares
    if kind == "checkpointed":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    apart, shared = (make_batch(begin_alike(), share) for share in (False, True))
    assert shared.num_tokens == apart.num_tokens - 11 - 3 - 3 * 17 - 3 * 9
    weights = torch.linspace(-1, 2, len(apart.targets), dtype=torch.float64)
    values, gradients = [], []
    for batch in (apart, shared):
        model.zero_grad()
        logprob, log1m = policy(batch)
        (logprob * weights).sum().backward()
        values.append(torch.stack([logprob, log1m]))
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    torch.testing.assert_close(values[1], values[0], **close)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, **close)


@pytest.mark.parametrize(("budget", "world_size"), [(10_000, 1), (90, 1), (60, 2), (1, 3)])
def test_the_loss_of_pairs_of_one_prompt_does_not_depend_on_the_cut(tmp_path, budget, world_size):
    """Every pair of four answers to each of three prompts, out of order."""
    keys = {"method": "dpo", "model_name_or_path": "model", "datasets": [{"path": "a.jsonl"}]}
    method = Dpo(parse_config(keys | {"output_dir": str(tmp_path)}))
    prompts = [probe_streams(VOCABULARY, n, (6, 1, 12, 4), seed=n).streams for n in (20, 7, 11)]
    examples = [
        Example((replace(p[a], role="chosen"), replace(p[b], role="rejected")), a + 0.5, "")
        for a, b in combinations(range(4), 2)
        for p in prompts
    ]
    policy = Policy(tiny("GPT2", **NO_DROPOUT).double())
    assert check_packing(policy, policy, probe_batch(VOCABULARY, (37, 52), CPU)) is None

    def step(packs: list[Batch]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        policy.zero_grad()
        losses = []
        for batch in packs:
            reference = -(batch.targets % 7).double()
            loss, _ = policy(batch, loss=method.loss, reference=reference, progress=1.0)
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum(), {n: p.grad for n, p in policy.named_parameters()}

    plain, gradient = step([make_batch([example]) for example in examples])
    gradient = {name: x.clone() for name, x in gradient.items()}
    packs = [
        pack
        for rank in range(world_size)
        for pack in plan_batches(examples, budget, rank, world_size, share_prefixes=True)
    ]
    alone = sum(make_batch([example], True).num_tokens for example in examples)
    tokens = sum(pack.num_tokens for pack in packs)
    assert tokens < 0.7 * alone if budget > 1 else tokens == alone
    shared, found = step(packs)
    torch.testing.assert_close(shared, plain, rtol=1e-10, atol=1e-10)
    for name, x in gradient.items():
        torch.testing.assert_close(found[name], x, rtol=1e-8, atol=1e-9)


def test_a_window_is_not_shared():
    policy = Policy(tiny("Mistral", sliding_window=8, head_dim=8))
    assert check_packing(policy, policy, probe_batch(VOCABULARY, (37, 52), CPU)) is None
    reason = check_sharing(policy, policy, probe_streams(VOCABULARY, 24, (13, 28)))
    assert reason == "MistralForCausalLM: a sliding window is not shared"
    assert policy.packed and not policy.shares


def test_a_model_that_answers_otherwise_behind_a_shared_prompt_is_found_out(monkeypatch):
    """As one whose attention takes the place in the pack for the place in the sequence would."""
    policy = Policy(tiny("Llama"))
    assert check_packing(policy, policy, probe_batch(VOCABULARY, (37, 52), CPU)) is None
    body = policy._body

    def moved(ids, positions, packing):
        return body(ids, torch.arange(len(ids)), packing)

    monkeypatch.setattr(policy, "_body", moved)
    reason = check_sharing(policy, policy, probe_streams(VOCABULARY, 24, (13, 28)))
    assert reason is not None
    assert reason.startswith("LlamaForCausalLM gives other results with a shared prefix")
    assert not policy.shares


@pytest.mark.parametrize(
    "make",
    [
        tiny_qwen3_5,
        lambda: tiny("Gemma2", head_dim=8, attn_logit_softcapping=20.0),
        lambda: tiny("GptOss", head_dim=8, num_local_experts=4, num_experts_per_tok=2),
        # The window is longer than what is tried, and in the mask alone.
        lambda: tiny("Phimoe", sliding_window=60, num_local_experts=4, num_experts_per_tok=2),
    ],
    ids=["linear attention", "capped attention", "attention sinks", "masked window"],
)
def test_models_that_cannot_be_packed_are_found_out(make: Callable[[], PreTrainedModel]):
    model = make()
    policy = Policy(model)
    batch = probe_batch(VOCABULARY, (37, 52), CPU)
    reason = check_packing(policy, policy, batch)
    assert reason is not None and type(model).__name__ in reason
    with torch.no_grad():
        logprob, _ = policy(batch)
    torch.testing.assert_close(logprob.double(), alone(model, batch), rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def qwen3_5(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-qwen3_5")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.save_pretrained(folder)
    keys = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    tiny_qwen3_5(**keys).save_pretrained(folder)
    return folder


def test_qwen3_5_trains_unpacked_and_says_so(qwen3_5, tmp_path, capfd):
    row = {"prompt": "the sum", "completion": "is one"}
    data = write_rows(tmp_path / "data.jsonl", [row] * 8)
    keys = {
        "datasets": [{"path": str(data)}],
        "max_steps": 6,
        "num_train_epochs": 3,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
    }
    metrics = train(recipe("sft", qwen3_5, tmp_path, **keys))
    said = capfd.readouterr().err
    assert "unpacked: Qwen3_5ForCausalLM" in said and "packed, no padding" not in said
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "the sum"}], add_generation_prompt=True, tokenize=False
    )
    ids, answer = (
        tokenizer(text, return_tensors="pt").input_ids for text in (prompt, "is one<|im_end|>")
    )
    whole = torch.cat([ids, answer], dim=1)
    with torch.no_grad():
        logp = model(whole).logits[0].log_softmax(-1)
    loss = -logp[ids.shape[1] - 1 : -1].gather(-1, answer[0][:, None]).mean()
    # Better than what the last step started from, on the row that it was trained on.
    assert loss < metrics["loss"] < 4


# ----------------------------------------------------------------------------------- logits

HEADS: list[tuple[str, dict]] = [
    ("Gemma2", {"final_logit_softcapping": 2.0, "head_dim": 8}),
    ("Gemma3", {"final_logit_softcapping": 2.0, "head_dim": 8}),
    ("Granite", {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5}),
    ("Cohere", {"logit_scale": 0.25}),
]


@pytest.mark.parametrize(("family", "keys"), HEADS, ids=[family for family, _ in HEADS])
def test_caps_and_scales_of_logits_are_part_of_the_log_probs(family, keys):
    model = tiny(family, **keys)
    policy = Policy(model)
    batch = probe_batch(VOCABULARY, (40,), CPU)
    check_packing(policy, policy, probe_batch(VOCABULARY, (37, 52), CPU))
    assert check_logprobs(policy, policy, batch) < 1e-5
    with torch.no_grad():
        logprob, log1m = policy(batch)
    expected = alone(model, batch)
    torch.testing.assert_close(logprob.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(log1m.double(), torch.log1p(-expected.exp()), rtol=1e-4, atol=1e-5)
    # The cap or scale matters here: without it the check fails.
    policy.head_spec = type(policy.head_spec)()
    with pytest.raises(ConfigError, match=f"{family}ForCausalLM changes its logits outside"):
        check_logprobs(policy, policy, batch)


class Muffled(LlamaForCausalLM):
    """Scales what goes into the head, as MiniCPM does, by a key that nobody knows."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits / 3.0
        return output


class Biased(LlamaForCausalLM):
    """Adds to its logits what no parameter of the head holds."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + torch.arange(VOCABULARY) / 50
        return output


@pytest.mark.parametrize("kind", [Muffled, Biased])
def test_models_that_change_their_logits_otherwise_are_refused(kind):
    torch.manual_seed(0)
    # Not even a loud head: random small models have nearly even log-probs.
    policy = Policy(kind(transformers.LlamaConfig(**SIZES)).eval())
    with pytest.raises(ConfigError) as caught:
        check_logprobs(policy, policy, probe_batch(VOCABULARY, (40,), CPU))
    message = str(caught.value)
    assert message.startswith(f"model_name_or_path: {kind.__name__} changes its logits outside")
    assert "\n" not in message


def test_a_bias_of_the_head_counts():
    model = tiny("Phi")
    assert model.lm_head.bias is not None
    with torch.no_grad():
        model.lm_head.bias.copy_(torch.linspace(-3, 3, VOCABULARY))
    policy = Policy(model)
    assert check_logprobs(policy, policy, probe_batch(VOCABULARY, (40,), CPU)) < 1e-5


def test_a_model_whose_logits_are_nan_is_refused():
    model = tiny("Llama")
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    policy = Policy(model)
    with pytest.raises(ConfigError, match="log-probs differ by nan"):
        check_logprobs(policy, policy, probe_batch(VOCABULARY, (40,), CPU))
