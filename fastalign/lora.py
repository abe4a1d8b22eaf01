"""LoRA (arXiv 2106.09685) in fewer passes over what a layer gives.

PEFT adds an adapter by three tensors of the size of the layer's output: the product, its multiple,
and the sum.  Here one operation makes the sum, and the gradient is not multiplied either.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners import lora
from torch import nn


class AddedLinear(nn.Linear):
    """An adapter's second matrix."""

    def forward(
        self, low: torch.Tensor, base: torch.Tensor | None = None, scaling: float = 1.0
    ) -> torch.Tensor:
        """``base + scaling low B^T`` for low [..., R] and base [..., D_out]; ``low B^T`` alone
        without a base."""
        if base is None:
            return super().forward(low)
        bias: torch.Tensor | None = self.bias
        if low.dtype != base.dtype or bias is not None:
            return (base + super().forward(low) * scaling).to(base.dtype)
        rows = base.reshape(-1, base.shape[-1])
        low = low.reshape(-1, low.shape[-1])
        return torch.addmm(rows, low, self.weight.t(), alpha=scaling).view(base.shape)


def _in_one_pass(layer: Any) -> Any:
    """``layer`` of PEFT's, where one plain adapter is active and nothing else is different."""

    class LoraLinear(layer):
        def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            """Base layer and adapter of x [..., D_in]: [..., D_out]."""
            names = [name for name in self.active_adapters if name in self.lora_A]
            if args or kwargs or self.disable_adapters or self.merged or len(names) != 1:
                return super().forward(x, *args, **kwargs)
            (name,) = names
            # Another kind of adapter, or one that came later.
            if name in self.lora_variant or not isinstance(self.lora_B[name], AddedLinear):
                return super().forward(x)
            base = self.base_layer(x)
            x = self._cast_input_dtype(x, self.lora_A[name].weight.dtype)
            low = self.lora_A[name](self.lora_dropout[name](x))
            # A call of the module, whose weight ZeRO-3 gathers then.
            return self.lora_B[name](low, base, self.scaling[name])

    return LoraLinear


# Those of NF4 are there with bitsandbytes.
_LAYERS = {
    layer: _in_one_pass(layer)
    for layer in (lora.Linear, getattr(lora, "Linear4bit", None))
    if layer is not None
}


def add_in_one_pass(model: nn.Module) -> None:
    """Have all of PEFT's adapted linear layers in ``model`` work this way."""
    for module in model.modules():
        layer = _LAYERS.get(type(module))
        if layer is not None:
            module.__class__ = layer
        if type(module) in _LAYERS.values():
            seconds: Any = module.lora_B
            for second in seconds.values():
                # PEFT's own, of adapters that came since.
                if type(second) is nn.Linear:
                    second.__class__ = AddedLinear
