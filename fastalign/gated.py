"""Gated MLPs (SwiGLU and its kind, arXiv 2002.05202) that keep less for the backward pass.

``act(gate) * up`` keeps ``gate`` for the activation and both factors for their product, each as
wide as the MLP is inside.  Here the activation, a few operations a number, is computed again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.models.llama.modeling_llama import LlamaMLP

Activation = Callable[[torch.Tensor], torch.Tensor]


class GatedProduct(torch.autograd.Function):
    """``act(gate) * up`` of tensors of one shape and type, of which it keeps these two alone.
    ``act`` gives the same for the same values and trains nothing.  Values and gradients are torch's
    to the bit."""

    @staticmethod
    def forward(ctx: Any, act: Activation, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.act = act
        ctx.save_for_backward(gate, up)
        return _times(act(gate), up, gate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            gate = gate.detach().requires_grad_()
            activated = ctx.act(gate)
        (of_gate,) = torch.autograd.grad(activated, gate, gradient * up)
        return None, of_gate, _times(activated, gradient, gate)


def _times(activated: torch.Tensor, factor: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """Their product, in the memory of the first unless that is what the activation was given."""
    activated, given = activated.detach(), activated is gate
    return activated * factor if given else activated.mul_(factor)


def _keeping_less(layer: Any) -> Any:
    class GatedMLP(layer):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """x [..., D]: [..., D]."""
            gate, up = self.gate_proj(x), self.up_proj(x)
            # Adapters of one of them alone may give it another type.
            if gate.dtype == up.dtype:
                product: Any = GatedProduct.apply(self.act_fn, gate, up)
            else:
                product = self.act_fn(gate) * up
            output: torch.Tensor = self.down_proj(product)
            return output

    return GatedMLP


def _is_gated(layer: type) -> bool:
    """Whether its forward is Llama's, instruction by instruction: most of transformers' models have
    a class of their own for the same MLP."""
    ours = LlamaMLP.forward.__code__
    theirs = getattr(getattr(layer, "forward", None), "__code__", None)
    return theirs is not None and (theirs.co_code, theirs.co_names, theirs.co_argcount) == (
        ours.co_code,
        ours.co_names,
        ours.co_argcount,
    )


def keep_less(model: nn.Module) -> int:
    """Have the gated MLPs in ``model`` work this way: how many they are.  Others stay as they are,
    as do those whose activation has weights or buffers of its own."""
    made: dict[type, type] = {}
    changed = 0
    for module in model.modules():
        layer = type(module)
        if not _is_gated(layer):
            continue
        act: Any = module.act_fn
        if isinstance(act, nn.Module) and any(True for _ in (*act.parameters(), *act.buffers())):
            continue
        module.__class__ = made.setdefault(layer, _keeping_less(layer))
        changed += 1
    return changed
