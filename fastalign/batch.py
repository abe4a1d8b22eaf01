"""Examples -> packed batches: flat token arrays without padding, cut by a token budget.

Planning and packing are functions of their arguments: a run that is resumed cuts the same batches
into the same packs, because the order of its examples is one of seed, epoch and position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from fastalign import _bridge
from fastalign.data import Example


@dataclass(frozen=True)
class Cost:
    """What an example costs the rank that has it, in any unit: the linear part in its tokens and
    in the rows that go through the LM head, the quadratic one in pairs of query and key."""

    token: float = 1.0
    pair: float = 0.0
    row: float = 0.0


BY_TOKENS = Cost()


@dataclass(frozen=True)
class Batch:
    """One pack: R examples of S streams, T tokens in G segments, of which M rows go through the LM
    head.

    The tokens of a segment are the queries of one attention call; its keys are all tokens of its
    stream so far.  A stream is one segment, unless the streams of an example, or of several of one
    prompt, share their prefix: that is then a segment of its own in front of theirs, whose keys
    begin with it.

    Attributes:
        input_ids: int64 [T].
        positions: int64 [T]; those of a token in its stream.
        cu_seqlens_q: int32 [G + 1]; segment g has the tokens cu_seqlens_q[g] : cu_seqlens_q[g + 1].
        cu_seqlens_k: int32 [G + 1]; and as many keys as this says.  The same tensor where nothing
            is shared.
        key_index: int64 [cu_seqlens_k[-1]]; the flat positions of all keys.  None where nothing is
            shared: keys are the tokens then.
        bounds: cu_seqlens_q on the host, where reading it off a device would wait for it.
        key_bounds: the same of cu_seqlens_k.
        rows: int64 [M]; flat positions whose hidden state predicts a target.  The last token of a
            shared prefix predicts the first of every stream behind it.
        targets: int64 [M]; the token each row predicts.
        streams: int64 [M]; the stream of each row.
        cu_rows: int32 [S + 1]; rows by stream.
        row_bounds: the same on the host.
        roles: role of each stream.
        segments: int32 [S]; the segment that each stream ends with.
        records: int64 [S]; which of the pack's R examples each stream belongs to.
        weights: float32 [R]; weight of each example.
        sources: where each example came from, for messages.
        reference: float32 [M]; the reference's log-probs of the targets, where all examples bring
            them.
        memory: uint8; what all these tensors but ``reference`` are views of.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    key_index: torch.Tensor | None
    bounds: tuple[int, ...]
    key_bounds: tuple[int, ...]
    rows: torch.Tensor
    targets: torch.Tensor
    streams: torch.Tensor
    cu_rows: torch.Tensor
    row_bounds: tuple[int, ...]
    roles: tuple[str, ...]
    segments: torch.Tensor
    records: torch.Tensor
    weights: torch.Tensor
    sources: tuple[str, ...]
    memory: torch.Tensor
    reference: torch.Tensor | None

    @property
    def num_tokens(self) -> int:
        return self.input_ids.numel()

    @property
    def num_pairs(self) -> int:
        """Pairs of query and key that causal attention is computed for."""
        segments = zip(pairwise(self.bounds), pairwise(self.key_bounds), strict=True)
        lengths = ((b - a, d - c) for (a, b), (c, d) in segments)
        return sum(queries * keys - queries * (queries - 1) // 2 for queries, keys in lengths)

    def to(self, device: torch.device) -> Batch:
        """The pack on another device, moved in one copy.  A pack whose tensors were replaced by
        others has to be moved before."""
        memory = self.memory.to(device, non_blocking=True)
        moved: dict[str, Any] = {
            name: _same_view(value, self.memory, memory)
            for name, value in vars(self).items()
            if isinstance(value, torch.Tensor) and name != "reference"
        }
        if self.reference is not None:
            moved["reference"] = self.reference.to(device, non_blocking=True)
        return replace(self, **moved | {"memory": memory})

    def sequences(self, role: str) -> list[int]:
        """Indices of the streams with this role, in record order."""
        return [index for index, name in enumerate(self.roles) if name == role]

    def select(self, role: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows of one role: (row index [m], cu [s + 1] into it, record [s])."""
        sequences = self.sequences(role)
        bounds = self.row_bounds
        spans = [torch.arange(bounds[s], bounds[s + 1]) for s in sequences]
        index = torch.cat(spans) if spans else torch.zeros(0, dtype=torch.int64)
        lengths = torch.tensor([0] + [len(span) for span in spans])
        device = self.rows.device
        return (
            index.to(device),
            lengths.cumsum(0).to(device),
            self.records[torch.tensor(sequences, dtype=torch.int64, device=device)],
        )


def _same_view(view: torch.Tensor, memory: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """What ``view`` is of ``memory``, of ``other``."""
    assert view.untyped_storage().data_ptr() == memory.untyped_storage().data_ptr()
    start = view.storage_offset() * view.itemsize
    return other[start : start + view.nbytes].view(view.dtype)


class Packer:
    """Examples measured at once, to plan and to pack.

    Args:
        examples: E examples; their streams stay together and in order.
        share_prefixes: let the streams of an example share their prompt, which the pack then holds
            once: their longest common prefix, which ends before the first target of any of them.
            Examples of the same prompt are planned together and share it too.
    """

    def __init__(self, examples: Sequence[Example], share_prefixes: bool = False) -> None:
        self.examples = examples
        streams = [stream for example in examples for stream in example.streams]
        self._ragged = _bridge.Ragged(
            [stream.input_ids for stream in streams],
            [stream.loss_mask for stream in streams],
            np.array([len(example.streams) for example in examples], np.int64),
            np.array([example.weight for example in examples], np.float32),
            share_prefixes,
        )

    @property
    def shortest(self) -> int:
        """Index of the example with the fewest tokens."""
        return int(self._ragged.tokens.argmin())

    def plan(
        self, micro_batch_tokens: int, world_size: int, cost: Cost = BY_TOKENS
    ) -> list[list[list[int]]]:
        """Example indices by rank, by pack; see :meth:`_bridge.Ragged.plan`."""
        return self._ragged.plan(micro_batch_tokens, world_size, cost.token, cost.pair, cost.row)

    def pack(self, indices: Sequence[int]) -> Batch:
        """The examples with these indices, in this order, as one pack."""
        chosen = np.array(indices, np.int64)
        size, fields = self._ragged.layout(chosen)
        memory = _allocate(size)
        self._ragged.fill(chosen, memory.numpy())
        views = {
            name: memory[start:stop].view(getattr(torch, dtype))
            for name, dtype, start, stop in fields
        }
        views.setdefault("cu_seqlens_k", views["cu_seqlens_q"])
        bounds = tuple(views["cu_seqlens_q"].tolist())
        key_index = views.pop("key_index", None)
        key_bounds = bounds if key_index is None else tuple(views["cu_seqlens_k"].tolist())
        examples = [self.examples[index] for index in indices]
        return Batch(
            key_index=key_index,
            bounds=bounds,
            key_bounds=key_bounds,
            row_bounds=tuple(views["cu_rows"].tolist()),
            roles=tuple(stream.role for example in examples for stream in example.streams),
            sources=tuple(example.source for example in examples),
            memory=memory,
            reference=_reference(examples),
            **views,
        )


def _reference(examples: Sequence[Example]) -> torch.Tensor | None:
    found = [e.reference_logprobs for e in examples if e.reference_logprobs is not None]
    return torch.from_numpy(np.concatenate(found)) if len(found) == len(examples) else None


def _allocate(size: int) -> torch.Tensor:
    """Memory of a pack, uint8 [size], from which a device can copy by itself where there is one."""
    if torch.cuda.is_available():
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    # numpy asks the system for huge pages, torch does not: the first write to a large pack would
    # take several times as long.
    return torch.from_numpy(np.empty(size, np.uint8))


def make_batch(examples: Sequence[Example], share_prefixes: bool = False) -> Batch:
    """Pack examples in order; the streams of one example stay next to each other."""
    return Packer(examples, share_prefixes).pack(range(len(examples)))


def plan_batches(
    examples: Sequence[Example],
    micro_batch_tokens: int,
    rank: int,
    world_size: int,
    cost: Cost = BY_TOKENS,
    share_prefixes: bool = False,
) -> list[Batch]:
    """This rank's packs of one global batch.

    Every rank gets the same number of packs (collectives in the forward pass need that) and about
    the same ``cost``.  Where there are fewer packs than ranks, a rank repeats the shortest example
    at weight 0.
    """
    packer = Packer(examples, share_prefixes)
    packs = packer.plan(micro_batch_tokens, world_size, cost)[rank]
    batches = [packer.pack(pack or [packer.shortest]) for pack in packs]
    for pack, batch in zip(packs, batches, strict=True):
        if not pack:
            batch.weights.zero_()
    return batches
