"""Gated MLPs that compute their activation again, against transformers' own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support import recipe
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaMLP

from fastalign.gated import GatedProduct, keep_less
from fastalign.model import load_policy

WIDTH, INNER, TOKENS = 7, 13, 5
SIZES = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_attention_heads": 1, "head_dim": 8}
SMALL = {
    "vocab_size": 19,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
}


def mlps(act: str = "silu", dtype: torch.dtype = torch.float64) -> tuple[LlamaMLP, LlamaMLP]:
    """transformers' and ours, of the same weights."""
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, hidden_act=act, mlp_bias=True)
    theirs = LlamaMLP(config).to(dtype)
    ours = copy.deepcopy(theirs)
    assert keep_less(ours) == 1
    return theirs, ours


def everything(mlp: nn.Module, dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(1)
    x = torch.randn(2, TOKENS, WIDTH, dtype=dtype, requires_grad=True)
    y = mlp(x)
    wanted = [x, *(p for p in mlp.parameters() if p.requires_grad)]
    return [y, *torch.autograd.grad(y.square().sum(), wanted)]


def kept(mlp: nn.Module) -> int:
    """Numbers that a pass keeps for its backward pass, weights aside."""
    weights = {p.data_ptr() for p in mlp.parameters()}
    sizes = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.data_ptr() not in weights:
            sizes[x.data_ptr()] = x.numel()
        return x

    x = torch.randn(TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        y = mlp(x)
    assert y.requires_grad
    return sum(sizes.values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("act", ["silu", "swish", "gelu", "gelu_pytorch_tanh"])
def test_values_and_gradients_are_transformers_own_to_the_bit(act, dtype):
    theirs, ours = mlps(act, dtype)
    for found, expected in zip(everything(ours, dtype), everything(theirs, dtype), strict=True):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


def test_gradients_against_differences():
    torch.manual_seed(0)
    gate, up = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda g, u: GatedProduct.apply(nn.SiLU(), g, u), (gate, up))


def test_what_the_activation_gives_is_not_kept():
    theirs, ours = mlps()
    # Input, gate, what the activation gives, up and the product; and the same but one.
    assert kept(theirs) == TOKENS * (WIDTH + 4 * INNER)
    assert kept(ours) == TOKENS * (WIDTH + 3 * INNER)


def test_nothing_is_written_over():
    """A pass may be gone through twice, and what is read elsewhere stays true."""
    _, ours = mlps()
    x = torch.randn(TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
    gate, up = ours.gate_proj(x), ours.up_proj(x)
    before = gate.detach().clone(), up.detach().clone()
    y = GatedProduct.apply(ours.act_fn, gate, up)
    (first,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    (second,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(first, second)
    assert torch.equal(gate, before[0]) and torch.equal(up, before[1])


def test_factors_of_two_types():
    theirs, ours = mlps(dtype=torch.float32)
    for mlp in (theirs, ours):
        mlp.gate_proj.bfloat16()
        mlp.gate_proj.register_forward_pre_hook(lambda _, args: args[0].bfloat16())
    for found, expected in zip(
        everything(ours, torch.float32), everything(theirs, torch.float32), strict=True
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "olmo2"])
def test_models_whose_mlp_is_gated(kind):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SMALL)
    theirs = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    ours = copy.deepcopy(theirs)
    assert keep_less(ours) == 2
    # Once more changes nothing.
    assert keep_less(ours) == 0
    copied = copy.deepcopy(ours)
    ids = torch.arange(1, 12)[None]
    expected, *others = (
        _pass(model, ids, checkpointed)
        for model, checkpointed in ((theirs, False), (ours, False), (copied, False), (ours, True))
    )
    for found in others:
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def _pass(model: Any, ids: torch.Tensor, checkpointed: bool) -> list[torch.Tensor]:
    model.train()
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    logits = model(input_ids=ids, use_cache=False).logits
    trained = [p for p in model.parameters() if p.requires_grad]
    return [logits, *torch.autograd.grad(logits.square().sum(), trained)]


@pytest.mark.parametrize("kind", ["phi3", "gpt2"])
def test_other_mlps_stay_as_they_are(kind):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL))
    before = [type(module) for module in model.modules()]
    assert keep_less(model) == 0
    assert [type(module) for module in model.modules()] == before


class Halved(LlamaMLP):
    """With the same attributes, and another product; as a later LlamaMLP might be."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x) / 2)


def test_a_product_of_another_kind_stays(monkeypatch):
    config = LlamaConfig(**SIZES)
    assert keep_less(Halved(config)) == 0
    assert keep_less(LlamaMLP(config)) == 1
    monkeypatch.setattr(LlamaMLP, "forward", Halved.forward)
    assert keep_less(LlamaMLP(config)) == 0


@pytest.mark.parametrize("act", [nn.SiLU(inplace=True), nn.PReLU(), nn.RReLU(), nn.Identity()])
def test_an_activation_that_cannot_be_computed_again_stays(act):
    """It writes over what it is given, is trained, is random, or gives that back."""
    mlp = LlamaMLP(LlamaConfig(**SIZES))
    mlp.act_fn = act
    assert keep_less(mlp) == 0


def test_a_class_keeps_its_name():
    """DeepSpeed is told of leaves of ZeRO-3 by it."""
    theirs, ours = mlps()
    assert type(ours) is not type(theirs) and isinstance(ours, LlamaMLP)
    for name in ("__name__", "__qualname__", "__module__"):
        assert getattr(type(ours), name) == getattr(LlamaMLP, name)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_under_adapters_with_dropout(checkpointed):
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SMALL))
    ours = copy.deepcopy(theirs)
    assert keep_less(ours) == 2
    config = LoraConfig(
        r=2, lora_dropout=0.3, init_lora_weights=False, target_modules=r".*(gate|up|down)_proj"
    )
    found = []
    for model in (theirs, ours):
        torch.manual_seed(1)
        model = get_peft_model(model, config)
        torch.manual_seed(2)
        found.append(_pass(model, torch.arange(1, 12)[None], checkpointed))
    for x, y in zip(*found, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(("compiled", "swapped"), [(False, 2), (True, 0)])
def test_the_policy_has_them_unless_it_is_compiled(tiny_llama, tmp_path, compiled, swapped):
    config = recipe("sft", tiny_llama, tmp_path, use_peft=True, torch_compile=compiled)
    policy = load_policy(config, torch.float32, torch.device("cpu"))
    mlps = [module for module in policy.modules() if isinstance(module, LlamaMLP)]
    assert len(mlps) == 2 and sum(type(mlp) is not LlamaMLP for mlp in mlps) == swapped
