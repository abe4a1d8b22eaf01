"""Gated MLPs (SwiGLU and its kind, arXiv 2002.05202) that keep less for the backward pass.

``act(gate) * up`` keeps ``gate`` for the activation and both factors for their product, each as
wide as the MLP is inside.  Here the activation, a few operations a number, is computed again.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.activations import ACT2FN

# They give the same for the same values, in memory of its own and in the type of what they are
# given, and have nothing to train.
ACTIVATIONS = {type(ACT2FN[name]) for name in ("silu", "swish", "gelu", "gelu_pytorch_tanh")}


class GatedProduct(torch.autograd.Function):
    """``act(gate) * up`` of tensors of one shape and type, of which it keeps these two alone; one
    of `ACTIVATIONS`.  Values and gradients are those of torch's operations to the bit."""

    @staticmethod
    def forward(ctx: Any, act: nn.Module, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.act = act
        ctx.save_for_backward(gate, up)
        return act(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            gate = gate.detach().requires_grad_()
            # Without the module's hooks, which know of no graph within the backward pass.
            activated = ctx.act.forward(gate)
        (of_gate,) = torch.autograd.grad(activated, gate, gradient * up)
        return None, of_gate, activated.detach().mul_(gradient)


def _product(act: nn.Module, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    # An adapter of one of them alone may give it another type.
    if gate.dtype != up.dtype:
        return act(gate) * up
    product: torch.Tensor = GatedProduct.apply(act, gate, up)
    return product


def _llamas(self: Any, x: torch.Tensor) -> torch.Tensor:
    # As transformers has it, to compare with: what this module is right for.
    down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return down_proj


def _is_gated(layer: Any) -> bool:
    """Whether its forward is `_llamas`, instruction by instruction: most of transformers' models
    have a class of their own for the same MLP."""
    ours = _llamas.__code__
    theirs = getattr(getattr(layer, "forward", None), "__code__", None)
    return theirs is not None and (theirs.co_code, theirs.co_names, theirs.co_argcount) == (
        ours.co_code,
        ours.co_names,
        ours.co_argcount,
    )


@functools.cache
def _keeping_less(layer: Any) -> Any:
    class GatedMLP(layer):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """x [..., D]: [..., D]."""
            output: torch.Tensor = self.down_proj(
                _product(self.act_fn, self.gate_proj(x), self.up_proj(x))
            )
            return output

    # DeepSpeed is told of modules by such names.
    for name in ("__name__", "__qualname__", "__module__"):
        setattr(GatedMLP, name, getattr(layer, name))
    return GatedMLP


def keep_less(model: nn.Module) -> int:
    """Have the gated MLPs in ``model`` work this way: how many they are.  Those with another
    forward than Llama's or another activation than `ACTIVATIONS` stay as they are."""
    changed = 0
    for module in model.modules():
        layer: Any = type(module)
        if not _is_gated(layer):
            continue
        act: Any = module.act_fn
        if type(act) in ACTIVATIONS and not getattr(act, "inplace", False):
            module.__class__ = _keeping_less(layer)
            changed += 1
    return changed
