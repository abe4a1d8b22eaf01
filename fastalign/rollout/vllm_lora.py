"""LoRA on vLLM's CPU backend as dense products, a few for each adapter that a step uses.

vLLM 0.32 copies both matrices of an adapter anew for every row of a batch, which takes longer than
the model's own layers.  Where some rows of a batch have an adapter and others none, it also gives
the others what is in its last slot.  Here all rows of an adapter are multiplied at once, and rows
without one stay as they are.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

# A slot and its rows: a slice where they follow each other, else their numbers, int64 [n].
_Group = tuple[int, slice | torch.Tensor]


class DenseLora(PunicaWrapperCPU):
    """What vLLM's adapted layers call, with arithmetic of our own: of linear layers the two halves,
    which vLLM 0.24 calls one by one for fused layers, 0.32 in ``add_lora_linear`` for all.

    ``a`` [slots, 1, R, D_in] and ``b`` [slots, 1, D_out, R] hold the matrices of all adapters, with
    zeros beyond the rank of each; a fused layer has one pair for each of its parts.  Products and
    what is between them are float32, rounded once, when they are added to the layer's output.
    """

    # By row of the model's input and by row of the logits; before the first batch there are none.
    _tokens: Sequence[_Group] = ()
    _sampled: Sequence[_Group] = ()

    def update_metadata(
        self,
        mapping: Any,
        lora_index_to_id: list[int | None],
        max_loras: int,
        vocab_size: int,
        **kwargs: Any,
    ) -> None:
        """Take down the adapters of the next batch."""
        super().update_metadata(mapping, lora_index_to_id, max_loras, vocab_size, **kwargs)
        self._tokens = _groups(self.token_lora_indices)
        self._sampled = _groups(self.sampler_indices)

    def add_shrink(
        self,
        y: tuple[torch.Tensor, ...] | torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        scale: float,
        **kwargs: Any,
    ) -> None:
        """Write ``scale * x a^T`` of x [N, D_in] to y [N, R] of each part, float32; rows without an
        adapter stay as they are."""
        for slot, rows in self._tokens:
            inputs = x[rows].float()
            for reduced, a in zip(y, lora_a_stacked, strict=True):
                reduced[rows] = inputs @ a[slot, 0].float().T * scale

    def add_expand(
        self,
        y: torch.Tensor,
        x: tuple[torch.Tensor, ...] | torch.Tensor,
        lora_b_stacked: tuple[torch.Tensor, ...],
        output_slices: tuple[int, ...],
        offset_start: int = 0,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """Add ``x b^T`` of x [N, R] of each part to its columns of y, which begin at
        ``offset_start`` and are zeroed first without ``add_inputs``."""
        if not add_inputs:
            y[:, offset_start : offset_start + sum(output_slices)] = 0
        for slot, rows in self._tokens:
            outputs = y[rows]
            first = offset_start
            for reduced, b, size in zip(x, lora_b_stacked, output_slices, strict=True):
                _add_product(outputs[:, first : first + size], reduced[rows], b[slot, 0], 1.0)
                first += size
            _put(y, rows, outputs)

    def add_lora_embedding(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """Add ``x b^T`` to y [N, D_out]; x [N, R] are the rows of A that the tokens picked."""
        for slot, rows in self._tokens:
            outputs = y[rows]
            _add_product(outputs, x[rows].float(), lora_b_stacked[slot, 0], 1.0)
            _put(y, rows, outputs)

    def add_lora_logits(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale: float,
        *,
        buffer: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        """Add ``scale * x a^T b^T`` of x [N, D_in] to the logits y [N, V]."""
        # One of them may have empty columns at its end.
        size = min(y.shape[-1], lora_b_stacked.shape[-2])
        for slot, rows in self._sampled:
            reduced = x[rows].float() @ lora_a_stacked[slot, 0].float().T
            outputs = y[rows]
            _add_product(outputs[:, :size], reduced, lora_b_stacked[slot, 0, :size], scale)
            _put(y, rows, outputs)


def _groups(slots: torch.Tensor) -> list[_Group]:
    """The rows of each adapter, from each row's slot [N], which is -1 where there is none."""
    found: list[_Group] = []
    for slot in slots.unique().tolist():
        if slot < 0:
            continue
        rows = (slots == slot).nonzero()[:, 0]
        first, end = int(rows[0]), int(rows[-1]) + 1
        found.append((slot, slice(first, end) if end - first == len(rows) else rows))
    return found


def _add_product(y: torch.Tensor, reduced: torch.Tensor, b: torch.Tensor, scale: float) -> None:
    y.add_(reduced @ b.float().T, alpha=scale)


def _put(y: torch.Tensor, rows: slice | torch.Tensor, outputs: torch.Tensor) -> None:
    """Rows that were picked by number are a copy, those of a slice are y itself."""
    if isinstance(rows, torch.Tensor):
        y[rows] = outputs


def install(manager: Any) -> None:
    """Have the adapted layers of vLLM's ``LoRAModelManager`` call :class:`DenseLora`.

    Raises:
        ImportError: the parts of this vLLM are not as they are known here; nothing is changed.
    """
    wrappers = list(getattr(manager, "punica_wrapper_mapping", {}).values())
    if not wrappers:
        raise ImportError("vLLM's LoRAModelManager holds no punica wrapper")
    for wrapper in wrappers:
        if type(wrapper) not in (PunicaWrapperCPU, DenseLora):
            raise ImportError(f"vLLM's adapters are computed by {type(wrapper).__name__}")
    for name, ours in vars(DenseLora).items():
        if inspect.isfunction(ours) and _parameters(ours) != _parameters(
            getattr(PunicaWrapperCPU, name, None)
        ):
            raise ImportError(f"vLLM's PunicaWrapperCPU.{name} takes other parameters")
    for wrapper in wrappers:
        # The manager and all layers hold this very object, and what it holds stays.
        wrapper.__class__ = DenseLora


def _parameters(function: Any) -> list[str] | None:
    return None if function is None else list(inspect.signature(function).parameters)
