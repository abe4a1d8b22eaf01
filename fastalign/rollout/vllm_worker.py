"""What runs inside vLLM's worker: take weights and adapters in, and read back what it then holds.

vLLM builds its worker from this class by name (``worker_extension_cls``), and the engine calls the
methods by name through ``collective_rpc``.  Arguments and results stay in the process.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch

from fastalign.rollout.sync import Fingerprint, fingerprint

_log = logging.getLogger(__name__)

# Rows and columns of a tensor, as it is indexed with them.
Cut = tuple[slice | torch.Tensor, ...]

# Input columns of each repacked matrix that one transfer reads back.
_PROBED_COLUMNS = 16


@dataclass
class Transfer:
    """What one transfer of base weights sent, and what the engine's model then holds.

    Where several ranks share the engine, all of this is of the rows and columns that this rank has
    to hold; together the ranks hold every row and column.

    Attributes:
        sent: checksum of each tensor as the trainer handed it over, in the engine's dtype.
        held: checksum of the same content in the engine's parameters, where these can be read.
        columns_sent: checksum of some columns of each matrix, picked anew for each transfer.
        columns_held: checksum of the same columns as the engine's own matrix product gives them,
            for layers whose weights the engine keeps in a layout that cannot be read.
        unread: names with neither: they arrived at vLLM's loader, and the canary alone says that
            the engine computes with them.
        unsent: parameters of the engine that nothing was sent for.
        bytes: of all tensors as they were sent, in the engine's dtype.
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

    def record(self, name: str, tensor: torch.Tensor, version: int, cut: Cut = ()) -> torch.Size:
        """Take down what is sent: ``tensor`` in the engine's dtype, of which this rank has to hold
        ``cut``; the shape of that."""
        part = tensor[cut]
        self.sent[name] = fingerprint(part)
        self.bytes += tensor.numel() * tensor.element_size()
        if part.ndim == 2:
            picked = _columns(part.shape[1], version).to(part.device)
            self.columns_sent[name] = _unsigned_zeros(part[:, picked])
        return part.shape


class WorkerExtension:
    """Mixed into vLLM's worker; the prefix keeps the names apart from vLLM's own."""

    # The worker's part, as used here.
    model_config: Any
    model_runner: Any
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
        # Of this rank's part of each tensor.
        shapes: dict[str, torch.Size] = {}
        places = _places(self.get_model())
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
                cut = _cut(*places[name], tensor.shape) if name in places else ()
                shapes[name] = transfer.record(name, tensor, version, cut)
                if name in names:
                    yield name, tensor

        try:
            with _without_adapters(self.get_model()):
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
            read_back(self.get_model(), transfer, shapes, dtype, version)
        return transfer

    def fastalign_own_sampler(self) -> None:
        """Draw tokens by our own sampler, on a CPU."""
        _replace("tokens are drawn", "vllm_sampler", self.model_runner)

    def fastalign_adapter_cuts(self, shapes: Mapping[str, torch.Size]) -> dict[str, Cut]:
        """Which rows and columns of an adapter's matrices this rank has to hold.

        Args:
            shapes: shape of each tensor under its name in PEFT's file.
        """
        cuts: dict[str, Cut] = dict.fromkeys(shapes, ())
        for name, module, is_a, index, parts in self._adapter_places(shapes):
            layer = getattr(module, "base_layer", None)
            if is_a:
                # Its columns are the layer's inputs.
                cuts[name] = (slice(None), _inputs(layer, shapes[name][1]))
            else:
                cuts[name] = (_outputs(layer, index, parts, shapes[name][0]),)
        return cuts

    def fastalign_load_adapter(
        self, request: Any, shapes: Mapping[str, torch.Size]
    ) -> dict[str, Fingerprint]:
        """Load an adapter and read it back from the slot that requests are answered from.

        Args:
            request: vLLM's ``LoRARequest``.
            shapes: shape of this rank's part of each tensor under its name in PEFT's file.

        Returns:
            Checksum of each tensor that has a place in the model, in the engine's dtype.
        """
        manager = self.get_model().lora_manager
        if self.device.type == "cpu":
            _replace("adapters are computed", "vllm_lora", manager)
        self.add_lora(request)
        slot = manager.lora_index_to_id.index(request.lora_int_id)
        held: dict[str, Fingerprint] = {}
        for name, module, is_a, index, _ in self._adapter_places(shapes):
            shape = shapes[name]
            stack = module.lora_a_stacked if is_a else module.lora_b_stacked
            tensor = (stack[index] if isinstance(stack, tuple) else stack)[slot]
            tensor = tensor.reshape(tensor.shape[-2:])
            if "lora_embedding_A" in name:
                tensor = tensor.T
            # The slot has room for the largest rank: what lies outside is zero.
            held[name] = fingerprint(tensor[: shape[0], : shape[1]])
        return held

    def _adapter_places(self, names: Iterable[str]) -> Iterator[tuple[str, Any, bool, int, int]]:
        """(name, layer with adapters, whether it is an A matrix, which of the layer's parts it is
        for, how many these are) for each name of a tensor that has a place in the model."""
        from vllm.lora.utils import parse_fine_tuned_lora_name

        model = self.get_model()
        manager = model.lora_manager
        mapper = getattr(model, "hf_to_vllm_mapper", None)
        if mapper is not None:
            mapper = mapper.get_rename_mapper()
        fused = {
            part: (whole, index, len(parts))
            for whole, parts in manager.packed_modules.items()
            for index, part in enumerate(parts)
        }
        for name in names:
            module_name, is_a = parse_fine_tuned_lora_name(name, mapper)
            module_name, index, parts = fused.get(module_name, (module_name, 0, 1))
            module = manager.modules.get(module_name)
            if module is not None:
                yield name, module, is_a, index, parts


@contextmanager
def _without_adapters(model: torch.nn.Module) -> Iterator[None]:
    """Put the model's own layers where vLLM has put those that add an adapter to them.

    The models' loaders look parameters up by name, and those of vLLM 0.24 do not know the names
    that layers with adapters have.
    """
    wrapped = [
        (parent, name, module)
        for parent in model.modules()
        for name, module in parent._modules.items()
        if module is not None and "base_layer" in module._modules
    ]
    for parent, name, module in wrapped:
        setattr(parent, name, module.base_layer)
    try:
        yield
    finally:
        for parent, name, module in wrapped:
            setattr(parent, name, module)


def _replace(what: str, module: str, target: Any) -> None:
    """Have ``target`` of vLLM's CPU backend do ``what`` our way, if it is the one that is known.

    Layers are not compiled where vLLM takes adapters on a CPU, and its sampler never is, so what
    they call may change.
    """
    try:
        import_module(f"fastalign.rollout.{module}").install(target)
    except ImportError as error:
        _tell(f"{what} by vLLM's own operations, which are slow on a CPU: {error}")


@functools.cache
def _tell(line: str) -> None:
    _log.warning(line)


# ------------------------------------------------------------------ parts of one rank among several


def _place() -> tuple[int, int]:
    """This rank's place among those of its engine, and how many these are."""
    from vllm.distributed import (
        get_tensor_model_parallel_rank,
        get_tensor_model_parallel_world_size,
    )

    return get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()


def _places(model: torch.nn.Module) -> dict[str, tuple[Any, int, int]]:
    """(layer, which of its parts, how many these are) by the name of a sent tensor."""
    return {
        name: (module, index, len(names))
        for _, module, _, names in _parameters(model)
        for index, name in enumerate(names)
    }


def _parameters(
    model: torch.nn.Module,
) -> Iterator[tuple[str, Any, str, list[str]]]:
    """(path of a layer, layer, kind of parameter, names of the tensors that it is made from)."""
    packed = getattr(model, "packed_modules_mapping", None) or {}
    for path, module in model.named_modules():
        if "base_layer" in module._modules:
            continue  # a LoRA wrapper only points to what it wraps
        path = path.removesuffix(".base_layer")
        parent, _, leaf = path.rpartition(".")
        parts = [f"{parent}.{part}" if parent else part for part in packed.get(leaf, [leaf])]
        for kind, parameter in module._parameters.items():
            if parameter is not None:
                yield path, module, kind, [f"{part}.{kind}" if part else kind for part in parts]


def _cut(layer: Any, index: int, parts: int, shape: torch.Size) -> Cut:
    """Which rows and columns this rank has to hold of a tensor of a layer's parameter."""
    if _place()[1] == 1 or not shape:
        return ()
    vocabulary = getattr(layer, "shard_indices", None)
    if vocabulary is not None:
        return (slice(vocabulary.org_vocab_start_index, vocabulary.org_vocab_end_index),)
    rows = _outputs(layer, index, parts, shape[0])
    return (rows, _inputs(layer, shape[1])) if len(shape) == 2 else (rows,)


def _outputs(layer: Any, index: int, parts: int, rows: int) -> slice | torch.Tensor:
    """This rank's share of a linear layer's outputs, or of those of one of its parts.

    Each part is cut into as many shares as there are ranks, or into fewer that several ranks hold
    alike (the few key and value heads of attention).
    """
    sizes = getattr(layer, "output_partition_sizes", None)
    if sizes is None:
        return slice(None)
    held = sizes[index : index + 1] if parts == len(sizes) else sizes
    if sum(held) == rows:
        return slice(None)
    rank, ranks = _place()
    found, start = [], 0
    for i, size in enumerate(held, start=index):
        alike = getattr(layer, "num_kv_head_replicas", 1) if i else 1
        first = start + rank // alike * size
        found.append(torch.arange(first, first + size))
        start += ranks // alike * size
    # What is cut in another way cannot be read back.
    return torch.cat(found) if start == rows else slice(None)


def _inputs(layer: Any, columns: int) -> slice:
    """This rank's share of a linear layer's inputs."""
    size = getattr(layer, "input_size_per_partition", columns)
    first = _place()[0] * size if size < columns else 0
    return slice(first, first + size)


# --------------------------------------------------------------------------------------- reading


def read_back(
    model: torch.nn.Module,
    transfer: Transfer,
    shapes: Mapping[str, torch.Size],
    dtype: torch.dtype,
    version: int,
) -> None:
    """Find each sent tensor in the model and take its checksum there; mend tied output layers."""
    sources: dict[int, list[str]] = {}
    for path, module, kind, names in _parameters(model):
        parameter = module._parameters[kind]
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
    if len(columns) < sum(shapes[name][0] for name in names):
        return  # cut among ranks in a way that is not known here
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
