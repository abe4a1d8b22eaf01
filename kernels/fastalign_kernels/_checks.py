"""What the public functions ask of their arguments; every ValueError is one line."""

from __future__ import annotations

import math

import torch

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def describe(tensor: torch.Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def check_numbers(softcap: float | None, temperature: float) -> None:
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap = {softcap!r}: must be a finite number > 0, or None")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature = {temperature!r}: must be a finite number > 0")


def check_targets(target: torch.Tensor, vocab: int, ignore_index: int) -> None:
    """Look at targets on the CPU; elsewhere that would wait for the device."""
    if target.device.type != "cpu":
        return
    wrong = ((target < 0) | (target >= vocab)) & (target != ignore_index)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"target[{row}] = {int(target[row])}: must be in [0, {vocab}) or "
            f"ignore_index = {ignore_index}"
        )
