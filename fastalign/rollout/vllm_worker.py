"""What runs inside vLLM's worker: take weights and adapters in, and read back what it then holds.

vLLM builds its worker from this class by name (``worker_extension_cls``), and the engine calls the
methods by name through ``collective_rpc``.  Arguments and results stay in the process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.lora.utils import parse_fine_tuned_lora_name

from fastalign.rollout.sync import Fingerprint, fingerprint

# Input columns of each repacked matrix that one transfer reads back.
_PROBED_COLUMNS = 16


@dataclass
class Transfer:
    """What one transfer of base weights sent, and what the engine's model then holds.

    Attributes:
        sent: checksum of each tensor as the trainer handed it over, in the engine's dtype.
        held: checksum of the same content in the engine's parameters, where these can be read.
        columns_sent: checksum of some columns of each matrix, picked anew for each transfer.
        columns_held: checksum of the same columns as the engine's own matrix product gives them,
            for layers whose weights the engine keeps in a layout that cannot be read.
        unread: names with neither: they arrived at vLLM's loader, and the canary alone says that
            the engine computes with them.
        unsent: parameters of the engine that nothing was sent for.
        bytes: of all tensors, in the engine's dtype.
        error: what stopped vLLM's loader, if anything did.
    """

    sent: dict[str, Fingerprint] = field(default_factory=dict)
    held: dict[str, Fingerprint] = field(default_factory=dict)
    columns_sent: dict[str, Fingerprint] = field(default_factory=dict)
    columns_held: dict[str, Fingerprint] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)
    unsent: list[str] = field(default_factory=list)
    bytes: int = 0
    error: str | None = None


class WorkerExtension:
    """Mixed into vLLM's worker; the prefix keeps the names apart from vLLM's own."""

    # The worker's part, as used here.
    model_config: Any
    device: torch.device
    get_model: Callable[[], Any]
    reload_weights: Callable[..., None]
    add_lora: Callable[[Any], bool]

    def fastalign_load_weights(
        self, tensors: Iterable[tuple[str, torch.Tensor]], names: frozenset[str], version: int
    ) -> Transfer:
        """Reload the model from ``tensors``, which is consumed to its end unless it raises.

        Tensors outside ``names`` are recorded but kept from vLLM, whose loader would stop at them.
        """
        transfer = Transfer()
        shapes: dict[str, torch.Size] = {}
        dtype = self.model_config.dtype
        failures: list[Exception] = []

        def source() -> Iterator[tuple[str, torch.Tensor]]:
            try:
                yield from tensors
            except Exception as error:
                failures.append(error)
                raise

        stream = source()

        def arriving() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in stream:
                # vLLM keeps what it is given until a whole layer has come, while the sender may
                # reuse or free its buffer when it is asked for the next tensor: pass on a copy.
                tensor = tensor.detach().to(device=self.device, dtype=dtype, copy=True)
                transfer.sent[name] = fingerprint(tensor)
                transfer.bytes += tensor.numel() * tensor.element_size()
                shapes[name] = tensor.shape
                if tensor.ndim == 2:
                    picked = _columns(tensor.shape[1], version).to(tensor.device)
                    transfer.columns_sent[name] = _unsigned_zeros(tensor[:, picked])
                if name in names:
                    yield name, tensor

        try:
            self.reload_weights(weights_iterator=arriving())
        except Exception as error:
            if failures:
                raise failures[0] from None
            # Whatever vLLM's loader trips over (a shape, a name, memory) is the caller's to report,
            # and only after the sender's collective operations have run to their end.
            last = next(reversed(shapes), "the first tensor")
            transfer.error = f"vLLM's loader stopped at {last}: {type(error).__name__}: {error}"
            for _ in arriving():
                pass
            return transfer
        with torch.no_grad():
            _read_back(self.get_model(), transfer, shapes, dtype, version)
        return transfer

    def fastalign_load_adapter(
        self, request: Any, shapes: Mapping[str, torch.Size]
    ) -> dict[str, Fingerprint]:
        """Load an adapter and read it back from the slot that requests are answered from.

        Args:
            request: vLLM's ``LoRARequest``.
            shapes: shape of each tensor under its name in PEFT's file.

        Returns:
            Checksum of each tensor that has a place in the model, in the engine's dtype.
        """
        self.add_lora(request)
        model = self.get_model()
        manager = model.lora_manager
        slot = manager.lora_index_to_id.index(request.lora_int_id)
        mapper = getattr(model, "hf_to_vllm_mapper", None)
        if mapper is not None:
            mapper = mapper.get_rename_mapper()
        fused = {
            part: (whole, index)
            for whole, parts in manager.packed_modules.items()
            for index, part in enumerate(parts)
        }
        held: dict[str, Fingerprint] = {}
        for name, shape in shapes.items():
            module_name, is_a = parse_fine_tuned_lora_name(name, mapper)
            module_name, index = fused.get(module_name, (module_name, 0))
            module = manager.modules.get(module_name)
            if module is None:
                continue
            stack = module.lora_a_stacked if is_a else module.lora_b_stacked
            tensor = (stack[index] if isinstance(stack, tuple) else stack)[slot]
            tensor = tensor.reshape(tensor.shape[-2:])
            if "lora_embedding_A" in name:
                tensor = tensor.T
            # The slot has room for the largest rank: what lies outside is zero.
            held[name] = fingerprint(tensor[: shape[0], : shape[1]])
        return held


def _read_back(
    model: torch.nn.Module,
    transfer: Transfer,
    shapes: Mapping[str, torch.Size],
    dtype: torch.dtype,
    version: int,
) -> None:
    """Find each sent tensor in the model and take its checksum there; mend tied output layers."""
    packed = getattr(model, "packed_modules_mapping", None) or {}
    sources: dict[int, list[str]] = {}
    modules = [
        (path.removesuffix(".base_layer"), module)
        for path, module in model.named_modules()
        if "base_layer" not in module._modules  # a LoRA wrapper only points to what it wraps
    ]
    for path, module in modules:
        parent, _, leaf = path.rpartition(".")
        parts = [f"{parent}.{part}" if parent else part for part in packed.get(leaf, [leaf])]
        for kind, parameter in module._parameters.items():
            if parameter is None:
                continue
            names = [f"{part}.{kind}" if part else kind for part in parts]
            if all(name in shapes for name in names):
                sources[id(parameter)] = names
            elif id(parameter) in sources:
                # An output matrix tied to the input embedding, which is sent once, under the
                # embedding's name.  vLLM 0.32 repacks only the layer that a tensor was loaded into:
                # the output layer of the CPU backend would go on with the old matrix, in silence.
                names = sources[id(parameter)]
                if hasattr(module, "cpu_linear"):
                    module.quant_method.process_weights_after_loading(module)
            else:
                transfer.unsent.append(f"{path}.{kind}")
                continue
            if parameter.numel():
                _read_parameter(parameter, names, transfer, shapes, dtype)
            # The CPU backend multiplies by a packed copy, with or without keeping the matrix.
            if kind == "weight" and hasattr(module, "cpu_linear"):
                _probe(module, names, transfer, shapes, dtype, version)
    transfer.unread = sorted(shapes.keys() - transfer.held.keys() - transfer.columns_held.keys())


def _read_parameter(
    parameter: torch.Tensor,
    names: list[str],
    transfer: Transfer,
    shapes: Mapping[str, torch.Size],
    dtype: torch.dtype,
) -> None:
    """Checksums of the tensors that ``parameter`` is the concatenation of, along its rows."""
    if parameter.ndim == 0:
        transfer.held[names[0]] = fingerprint(parameter.to(dtype))
        return
    if any(len(shapes[name]) != parameter.ndim for name in names):
        return
    rows = sum(shapes[name][0] for name in names)
    # Embeddings carry empty rows at their end; anything else of another shape was laid out anew.
    padded = len(names) == 1 and parameter.ndim == 2 and len(parameter) > rows
    if any(shapes[name][1:] != parameter.shape[1:] for name in names):
        return
    if len(parameter) != rows and not padded:
        return
    start = 0
    for name in names:
        end = start + shapes[name][0]
        transfer.held[name] = fingerprint(parameter[start:end].to(dtype))
        start = end


def _probe(
    module: Any,
    names: list[str],
    transfer: Transfer,
    shapes: Mapping[str, torch.Size],
    dtype: torch.dtype,
    version: int,
) -> None:
    """Read columns of a matrix through the product that the engine itself computes with.

    A row with a single 1 times the transposed matrix is a column of it, exactly: the other products
    are zeros.
    """
    width = shapes[names[0]][1]
    picked = _columns(width, version)
    one_hot = torch.zeros(len(picked), width, dtype=dtype)
    one_hot[torch.arange(len(picked)), picked] = 1
    columns = module.quant_method.apply(module, one_hot).T
    start = 0
    for name in names:
        end = start + shapes[name][0]
        read = _unsigned_zeros(columns[start:end])
        # A tied matrix is read twice, by two layers: both have to hold what was sent.
        if transfer.columns_held.get(name) in (None, transfer.columns_sent[name]):
            transfer.columns_held[name] = read
        start = end


def _columns(width: int, version: int) -> torch.Tensor:
    """The columns that a transfer reads back: others for each version, the same on both sides."""
    generator = torch.Generator().manual_seed(version)
    return torch.randperm(width, generator=generator)[:_PROBED_COLUMNS]


def _unsigned_zeros(columns: torch.Tensor) -> Fingerprint:
    """Checksum with -0 counted as 0: a product does not keep the sign of a zero."""
    return fingerprint(columns + 0)
