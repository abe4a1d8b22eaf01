"""Objects that the ranks of a run tell each other.

A single process tells itself nothing: a collective of one would still be run by a thread of gloo's,
and where that thread computes in parallel, OpenMP counts more threads than there are processors
from then on and lets all of them sleep between any two operations.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def rank() -> int:
    """The number of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def alone() -> bool:
    """Whether this process has no others to work with."""
    return not dist.is_initialized() or dist.get_world_size() == 1


def gather(mine: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """What each rank, or each of ``group``, has, in their order; collective over these."""
    if alone():
        return [mine]
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    return everyone


def from_first(mine: T) -> T:
    """What rank 0 has; collective."""
    if alone():
        return mine
    box = [mine]
    dist.broadcast_object_list(box, src=0)
    return box[0]
