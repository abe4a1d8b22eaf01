"""Flat values cut into segments: segment s of values [M] is values[cu[s]:cu[s + 1]]."""

from __future__ import annotations

from itertools import pairwise

import torch


def segment_sum(values: torch.Tensor, cu: torch.Tensor) -> torch.Tensor:
    """Sums of segments, in the same order every time: [S] from values [M] and cu [S + 1].

    Differentiable.  An empty segment sums to 0.  ``cu`` may be on the CPU while the values are on a
    GPU.

    Raises:
        ValueError: cu is no integer [S + 1] that rises from 0 to M; its numbers are looked at on
            the CPU alone, since elsewhere that would wait for the device.
    """
    check_shapes("cu", cu, values)
    check_bounds("cu", cu, values.numel())
    return sum_of(values, lengths_of(cu, values))


def lengths_of(cu: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return cu.to(like.device).diff()


def sum_of(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """[S] or [S, K] from values [M] or [M, K] and lengths [S]."""
    # An index_add would sum in another order each time on a GPU.  unsafe skips a check of the
    # lengths, done already, that fails when there are none.
    return torch.segment_reduce(values, "sum", lengths=lengths, axis=0, initial=0, unsafe=True)


def check_shapes(name: str, cu: torch.Tensor, values: torch.Tensor) -> None:
    if cu.ndim != 1 or cu.numel() == 0 or cu.is_floating_point():
        raise ValueError(f"{name} is {list(cu.shape)} in {cu.dtype}: must be integers [S + 1]")
    if values.ndim != 1:
        raise ValueError(f"values that {name} cuts are {list(values.shape)}: must be [M]")


def check_bounds(name: str, cu: torch.Tensor, count: int) -> None:
    """Raise ValueError unless cu on the CPU rises from 0 to count."""
    if cu.device.type != "cpu":
        return
    bounds = cu.tolist()
    if bounds[0] != 0 or bounds[-1] != count:
        raise ValueError(
            f"{name} runs from {bounds[0]} to {bounds[-1]}: must run from 0 to {count}, the number "
            "of values"
        )
    for s, (start, stop) in enumerate(pairwise(bounds)):
        if stop < start:
            raise ValueError(f"{name}[{s + 1}] = {stop}: must not be below {name}[{s}] = {start}")
