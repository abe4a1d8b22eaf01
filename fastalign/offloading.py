"""Activations in the host's memory from forward to backward."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks


class HostActivations(saved_tensors_hooks):
    """While it is entered, what autograd keeps of intermediate results goes to the host, and comes
    back when the backward asks for it.

    Under gradient checkpointing that is one hidden state [T, D] for each layer.  Weights stay where
    they are, and so does what depends on none that is trained.  Copies go to page-locked memory in
    the order of the device's own stream, so nothing is waited for, and nothing overlaps either.
    """

    def __init__(self) -> None:
        super().__init__(_to_host, _to_device)


def _to_host(tensor: torch.Tensor) -> torch.Tensor | tuple[torch.device, torch.Tensor]:
    if tensor.grad_fn is None:
        return tensor
    pinned = tensor.device.type == "cuda"
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
    return tensor.device, host.copy_(tensor, non_blocking=pinned)


def _to_device(kept: Any) -> torch.Tensor:
    if isinstance(kept, torch.Tensor):
        return kept
    device, host = kept
    there: torch.Tensor = host.to(device, non_blocking=True)
    return there
