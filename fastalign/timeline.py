"""Where a step's time goes, and how much of what the device could do was used."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from fastalign.batch import BY_TOKENS, Batch, Cost
from fastalign.model import full_shape

if TYPE_CHECKING:
    from fastalign.logprobs import Policy

# Dense bf16 operations a second, from the makers' data sheets, by what torch calls the device.
PEAK_OPERATIONS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "MI300X": 1307e12,
}


class Timeline:
    """Seconds of consecutive parts, on the device's own clock.

    On a GPU a part ends when the device reaches its end, so that work which runs ahead on the host
    counts nothing and nobody waits to measure; elsewhere the host's clock tells.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[str, Any]] = [("", self._mark())]

    def lap(self, part: str) -> None:
        """Whatever happened since the last call was ``part``."""
        self._marks.append((part, self._mark()))

    def seconds(self) -> dict[str, float]:
        """Sums by part; on a GPU waits for the last one."""
        if self._device.type == "cuda":
            self._marks[-1][1].synchronize()
        sums: dict[str, float] = {}
        for (_, start), (part, end) in zip(self._marks, self._marks[1:], strict=False):
            elapsed = start.elapsed_time(end) / 1e3 if hasattr(end, "elapsed_time") else end - start
            sums[part] = sums.get(part, 0.0) + elapsed
        return sums

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def peak_memory(device: torch.device) -> float:
    """Most GiB so far: of the device's tensors, or of the process where that is the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def peak_operations(device: torch.device, dtype: torch.dtype) -> float | None:
    """bf16 operations a second that the maker promises; None where that is not known."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_OPERATIONS.items() if part in name), None)


class Operations:
    """Floating-point operations that a step cannot do without; recomputation does not count.

    A product with P weights takes 2 P operations a token forward, as many for the gradient of what
    went in, and as many for that of the weights where they are trained.  Attention is causal.  The
    LM head sees only the rows that carry a loss.  None is known of sparse (mixture) models.
    """

    def __init__(self, policy: Policy) -> None:
        model = policy.causal_lm
        config = model.config.get_text_config()
        head = model.get_output_embeddings()
        outside = {id(head.weight), id(model.get_input_embeddings().weight)}
        self.frozen = self.trained = 0
        for parameter in model.parameters():
            if len(full_shape(parameter)) != 2 or id(parameter) in outside:
                continue
            count = full_shape(parameter).numel()
            if parameter.requires_grad:
                self.trained += count
            else:
                self.frozen += count
        self.head = full_shape(head.weight).numel()
        self.head_trained = head.weight.requires_grad
        width = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        self.attention = config.num_hidden_layers * config.num_attention_heads * width
        self.known = not any("expert" in key for key in config.to_dict())

    def cost(self, reference: bool) -> Cost:
        """Of one step; ``reference``: with a forward pass of the frozen start.  By tokens alone
        where the operations are not known."""
        if not self.known:
            return BY_TOKENS
        # Attention has two products, and both sides of each want a gradient.
        token = 2 * (self.frozen + self.trained)
        pair = 4 * self.attention
        row = 2 * self.head
        return Cost(
            token=(2 + reference) * token + 2 * self.trained,
            pair=(3 + reference) * pair,
            row=(2 + self.head_trained + reference) * row,
        )

    def of(self, packs: Sequence[Batch], reference: bool) -> float:
        """One step over ``packs``; ``reference``: with a forward pass of the frozen start."""
        cost = self.cost(reference)
        return float(
            cost.token * sum(pack.num_tokens for pack in packs)
            + cost.pair * sum(pack.num_pairs for pack in packs)
            + cost.row * sum(pack.rows.numel() for pack in packs)
        )
