"""A recipe's model without its memory: on torch's meta device, where tensors have shapes and no
content, the real model and adapters are built, and a pass through them tells what it would hold."""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AttentionInterface, AutoModelForCausalLM

from fastalign.attention import CPU_ROWS
from fastalign.config import Config, ConfigError, ModelConfig
from fastalign.logprobs import Policy, probe_batch
from fastalign.lora import add_in_one_pass
from fastalign.model import REFERENCE, adapt, load_model_config
from fastalign.quantization import BLOCK, lay_out_nf4, scales_of
from fastalign_kernels.reference import (
    CHUNK_BYTES,
    CHUNK_COLUMNS,
    MAX_TILE_COLUMNS,
    MIN_TILE_COLUMNS,
    TILE_BYTES,
)

# By whether what it returns is a copy.
TRACED_ATTENTION = {False: "fastalign_traced", True: "fastalign_traced_copies"}
META = torch.device("meta")
HEAD = {
    torch.ops.fastalign_kernels.linear_log_odds.default,
    torch.ops.fastalign_kernels.linear_log_odds_backward.default,
}
NF4_PRODUCT = "bitsandbytes::gemm_4bit"


@dataclass(frozen=True)
class Parameter:
    """What memory knows of a parameter; ``bytes`` are those of one of its numbers."""

    numel: int
    bytes: int
    trained: bool
    # A group of the optimizer has weight decay, the other one has none.
    decayed: bool


class Footprint:
    """The model of a recipe, and what passes through it hold.

    Args:
        config: the recipe, with the LoRA keys of the adapter that it starts from.
        dtype: of base and adapters.
        on_cpu: passes as they are there, where segments of attention are joined in a copy and the
            LM head works in smaller tiles; else as on a GPU, with FlashAttention and Triton.

    Raises:
        ConfigError: there is no such model, or no such module to adapt.
    """

    def __init__(self, config: Config, dtype: torch.dtype, *, on_cpu: bool = False) -> None:
        # PEFT makes adapters in float32 and casts them with their values, which are not there.
        policy = _meta_policy(config, dtype)
        # Weights in 4 bits stay what they are.
        self.policy = policy.float() if dtype == torch.float32 else policy.bfloat16()
        self.dtype = dtype
        model = self.policy.causal_lm
        self.parameters = tuple(
            Parameter(p.numel(), p.element_size(), p.requires_grad, p.ndim >= 2)
            for p in (*self.policy.parameters(), *_scales(self.policy))
        )
        head = model.get_output_embeddings().weight
        self.vocab_size, self.hidden_size = head.shape
        self.head_trained = head.requires_grad
        # Read by DeepSpeed's gathering: what one module needs at once.
        self.largest_module = max(
            sum(p.numel() for p in module.parameters(recurse=False))
            for module in self.policy.modules()
        )
        self._on_cpu = on_cpu
        self._traced: dict[tuple[int, bool], int] = {}
        self.cache_bytes = _cache_bytes(model.config.get_text_config(), dtype)
        self.kv_heads = _kv_heads(model.config.get_text_config())

    def activations(self, tokens: int, *, training: bool = True) -> int:
        """Most bytes at once, beyond weights and their gradients, of a pass over a pack.

        Every token but the first is a target.  Counted is what torch's operations return, and the
        work space of the LM head's; not that of others, nor a GPU's rounding up.

        Args:
            tokens: of the pack.
            training: forward and backward; else forward alone, without gradients.

        Raises:
            ConfigError: what the model computes depends on values, which are not there.
        """
        key = tokens, training
        if key not in self._traced:
            self._traced[key] = self._trace(*key)
        return self._traced[key]

    def _trace(self, tokens: int, training: bool) -> int:
        work = (_head_on_a_cpu if self._on_cpu else _head_on_a_gpu)(self, max(tokens - 1, 1))
        live = _Live(self.policy, work)
        self.policy.causal_lm.set_attn_implementation(TRACED_ATTENTION[self._on_cpu])
        self.policy.packed = True
        self.policy.train(training)
        try:
            with torch.set_grad_enabled(training), live:
                # Values stay unread: one sequence of so many tokens, on no device.
                logprob, _ = self.policy(_on_meta(probe_batch(4, (tokens,), torch.device("cpu"))))
                if training:
                    logprob.sum().backward()
        except (RuntimeError, NotImplementedError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(
                f"{type(self.policy.causal_lm).__name__} cannot be followed without its values, "
                f"so that there is no plan for it: {reason}"
            ) from None
        return live.most + (_mask_on_a_cpu(tokens, self.dtype) if self._on_cpu else 0)


def weight_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Of the model alone, as an engine holds it."""
    model = _meta_model(config, dtype)
    return sum(p.numel() * p.element_size() for p in (*model.parameters(), *_scales(model)))


def _meta_model(config: ModelConfig, dtype: torch.dtype) -> Any:
    with META:
        model = AutoModelForCausalLM.from_config(
            load_model_config(config), dtype=dtype, trust_remote_code=config.trust_remote_code
        )
    if config.load_in_4bit:
        lay_out_nf4(model, dtype)
    return model


def _scales(module: nn.Module) -> list[torch.Tensor]:
    """What NF4 weights hold beside their parameters, each tensor once."""
    return list({id(tensor): tensor for _, tensor in scales_of(module)}.values())


def _meta_policy(config: Config, dtype: torch.dtype) -> Policy:
    # An adapter to start from comes twice, as policy and as reference; its shape is the recipe's.
    held = config.adapter_name_or_path is not None and not config.refreshes
    model = _meta_model(config, dtype)
    with META:
        policy = adapt(model, config.model_copy(update={"adapter_name_or_path": None}))
        if held:
            lora = policy.model.peft_config["default"]
            policy.model.add_adapter(REFERENCE, replace(lora, inference_mode=True))
            policy.model.set_adapter("default")
            add_in_one_pass(policy.model)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_drop_gradient)
    return policy


def _drop_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None


def _cache_bytes(config: Any, dtype: torch.dtype) -> int:
    """Of the keys and values of one token."""
    heads = _kv_heads(config)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * int(config.num_hidden_layers * heads * width) * dtype.itemsize


def _kv_heads(config: Any) -> int:
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def _on_meta(batch: Any) -> Any:
    moved = {k: v.to(META) for k, v in vars(batch).items() if isinstance(v, torch.Tensor)}
    return replace(batch, **moved)


class _Live(TorchDispatchMode):
    """Bytes of tensors that are alive, beyond those of ``module``; ``work``: what the operations of
    the LM head need besides what they return."""

    def __init__(self, module: nn.Module, work: int) -> None:
        super().__init__()
        self._work = work
        self.now = self.most = 0
        # The storages of views are the same Python object as long as one of them lives.
        self._known = {_storage(p)._cdata: 0 for p in (*module.parameters(), *module.buffers())}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_iter(result):
            if isinstance(leaf, torch.Tensor):
                self._add(_storage(leaf))
        if func in HEAD:
            self.most = max(self.most, self.now + self._work)
        elif func.name() == NF4_PRODUCT:
            # The matrix as it is multiplied by, at most, and its scales.
            hidden, _, shape, *_ = args
            numel = math.prod(shape)
            work = numel * hidden.element_size() + 2 * 4 * math.ceil(numel / BLOCK)
            self.most = max(self.most, self.now + work)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.now -= self._known.pop(key)


def _storage(tensor: torch.Tensor) -> Any:
    return tensor.untyped_storage()


def _head_on_a_gpu(model: Footprint, rows: int) -> int:
    """Of the Triton kernels, at most: a chunk of exponentials, [rows, hidden size] once more, and
    three numbers for each row and tile of the vocabulary."""
    size = model.dtype.itemsize
    width = max(256, min(CHUNK_COLUMNS, CHUNK_BYTES // (rows * size), model.vocab_size))
    wide = 4 if model.head_trained else size
    return rows * (width * size + model.hidden_size * wide + 3 * 4 * -(-model.vocab_size // 128))


def _head_on_a_cpu(model: Footprint, rows: int) -> int:
    """Of the torch implementation: a tile of logits in float32, in half precision two and one as
    the product rounds it, beside the tile before it; and in float32 twice the hidden size of a
    block's rows, or of all where the head is trained.  A frozen one's gradient ends with five of
    these beside a tile."""
    budget = TILE_BYTES["cpu"] // 4
    columns = min(max(MIN_TILE_COLUMNS, budget // rows), MAX_TILE_COLUMNS, model.vocab_size)
    height = min(rows, budget // columns)
    last = 4 * (columns < model.vocab_size)
    tiles = height * columns * (last + (4 if model.dtype.itemsize == 4 else 10))
    if model.head_trained:
        return tiles + 4 * model.hidden_size * (2 * rows + columns)
    of_a_block = 4 * height * model.hidden_size
    return max(tiles + 2 * of_a_block, 4 * height * columns + 5 * of_a_block)


def _mask_on_a_cpu(tokens: int, dtype: torch.dtype) -> int:
    """Of packed attention, one for all layers, where a sequence takes several blocks of queries."""
    return CPU_ROWS * (tokens + CPU_ROWS) * dtype.itemsize if tokens > CPU_ROWS else 0


# ------------------------------------------------------------------------------------ attention


class _Attention(torch.autograd.Function):
    """What a FlashAttention kernel keeps and writes: its inputs, its result, and one fp32 number
    for each token and head; in the backward sums of the queries' gradients in fp32."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, copies: bool
    ) -> torch.Tensor:
        ctx.copies = copies
        _, heads, tokens, _ = query.shape
        out = query.new_empty(1, tokens, heads, value.shape[3])
        ctx.save_for_backward(
            query, key, value, out, query.new_empty(heads, tokens, dtype=torch.float32)
        )
        return out.clone() if copies else out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, *_ = ctx.saved_tensors
        # Held until the end, hence the name.
        sums = None if ctx.copies else query.new_empty(query.shape, dtype=torch.float32)
        results = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None
        del sums
        return results


def _traced_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *_: Any,
    copies: bool,
    **__: Any,
) -> tuple[torch.Tensor, None]:
    out: Any = _Attention.apply(query, key, value, copies)
    return out, None


# Without a mask of its own: transformers would read the positions' values to make one.
for copies, name in TRACED_ATTENTION.items():
    AttentionInterface.register(name, functools.partial(_traced_attention, copies=copies))
