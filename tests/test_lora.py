"""Adapters that are added in one pass, against PEFT's own layers."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from fastalign.lora import AddedLinear, add_in_one_pass

ROWS = (2, 7)


def adapted(dtype: torch.dtype = torch.float64, **keys: object) -> PeftModel:
    """Two adapted layers of odd shapes, one with a bias, whose adapters add something."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(11, 5), nn.Tanh(), nn.Linear(5, 3, bias=False)).to(dtype)
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["0", "2"], **keys)
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    return model


def pair(*steps: Callable[[PeftModel], object], **keys: object) -> tuple[PeftModel, PeftModel]:
    """PEFT's, and the same in one pass; each behind ``steps``."""
    theirs = adapted(**keys)
    ours = copy.deepcopy(theirs)
    add_in_one_pass(ours)
    for step in steps:
        for model in (theirs, ours):
            torch.manual_seed(1)
            step(model)
    return theirs, ours


def everything(model: PeftModel, rows: tuple[int, ...] = ROWS) -> list[torch.Tensor]:
    """What it gives for some rows, and all gradients."""
    torch.manual_seed(2)
    dtype = next(model.parameters()).dtype
    x = torch.randn(*rows, 11, dtype=dtype, requires_grad=True)
    y = model(x)
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    return [y, *torch.autograd.grad(y.square().sum(), wanted, allow_unused=True)]


def same(theirs: PeftModel, ours: PeftModel, rows: tuple[int, ...] = ROWS) -> None:
    found, expected = everything(ours, rows), everything(theirs, rows)
    for x, y in zip(found, expected, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            assert x.dtype == y.dtype and x.shape == y.shape
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [(), (1,), (7,), ROWS, (2, 3, 4), (0,)])
def test_values_and_gradients_are_pefts(rows):
    same(*pair(), rows)


@pytest.mark.parametrize(
    "keys", [{"lora_dropout": 0.5}, {"lora_bias": True}, {"use_dora": True}, {"use_rslora": True}]
)
def test_other_kinds_of_adapters_are_pefts(keys):
    same(*pair(**keys))


def test_disabled_several_and_merged_adapters_are_pefts():
    def another(model: PeftModel) -> None:
        model.add_adapter("other", LoraConfig(r=3, target_modules=["0"]))
        for name, parameter in model.named_parameters():
            if "other" in name:
                nn.init.normal_(parameter)

    theirs, ours = pair(another)
    for model in (theirs, ours):
        model.base_model.set_adapter(["default", "other"])
    same(theirs, ours)
    for model in (theirs, ours):
        model.set_adapter("other")
    same(theirs, ours)
    add_in_one_pass(ours)
    kinds = {type(m) for n, m in ours.named_modules() if n.endswith("lora_B.other")}
    assert kinds == {AddedLinear}
    same(theirs, ours)
    with theirs.disable_adapter(), ours.disable_adapter():
        torch.testing.assert_close(everything(ours)[0], everything(theirs)[0], rtol=0, atol=0)
    merged = ours.merge_and_unload()
    torch.testing.assert_close(merged(torch.ones(11).double()), theirs(torch.ones(11).double()))


def test_adapters_in_float32_beside_a_base_in_bfloat16_are_pefts():
    """As the embedded engine holds them; the layer's dtype is the base's."""

    def higher(model: PeftModel) -> None:
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()

    theirs, ours = pair(higher, dtype=torch.bfloat16)
    x = torch.randn(*ROWS, 11, dtype=torch.bfloat16)
    assert ours(x).dtype == torch.bfloat16
    assert torch.equal(ours(x), theirs(x))


def test_a_sum_in_bfloat16_is_rounded_once():
    """PEFT rounds the product, its multiple and the sum."""
    theirs, ours = pair(dtype=torch.bfloat16)
    true = copy.deepcopy(theirs).double()
    x = torch.randn(500, 11, dtype=torch.bfloat16)
    expected = true(x.double())
    errors = [(model(x).double() - expected).square().mean() for model in (ours, theirs)]
    assert errors[0] < errors[1]
