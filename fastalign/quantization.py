"""A base in NF4 (QLoRA, arXiv 2305.14314), held by bitsandbytes: 4 bits a weight, one scale for 64
of them, the scales in 8 bits.  Trainer and embedded engine load it here; vLLM does the same by
itself.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer

from fastalign.config import ConfigError

# Weights that share a scale, and scales that share one of their own.
BLOCK, SCALES = 64, 256
# Rows of a matrix of each shape that are compared with what their bits say.
_PROBED_ROWS = 64


def load_nf4(
    name: str, *, dtype: torch.dtype, device: torch.device, **options: Any
) -> PreTrainedModel:
    """A frozen model whose linear layers but for the LM head are in NF4.

    The bits follow from the numbers of the checkpoint alone, not from ``dtype``.

    Args:
        name: model folder or hub name.
        dtype: of the arithmetic, and of what is not quantised.
        options: of transformers' ``from_pretrained``.

    Raises:
        ConfigError: bitsandbytes is missing, computes wrongly here, or has nothing to quantise.
        OSError, ValueError, ImportError: as ``from_pretrained``.
    """
    _bitsandbytes()
    model = AutoModelForCausalLM.from_pretrained(
        name,
        dtype="auto",
        quantization_config=_settings(dtype),
        device_map={"": device},
        **options,
    ).requires_grad_(False)
    if model.hf_quantizer.pre_quantized:
        raise ConfigError(
            f"model_name_or_path = {name!r}: is quantised already; load_in_4bit takes the model "
            "that it was made from"
        )
    layers = _layers(model)
    if not layers:
        raise ConfigError(f"load_in_4bit: {name} has no linear layer that could be quantised")
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    for layer in layers:
        # The backward pass multiplies by the very matrix that the forward pass did.
        layer.weight.quant_state.dtype = dtype
        # On a CPU with AVX512-BF16 a pass in evaluation mode would lay the weights out anew, for
        # good: with scales in bfloat16, and for a product that has no gradient.
        layer.support_avx512bf16_for_cpu = False
        layer.register_state_dict_post_hook(_without_scales)
    for layer in {tuple(layer.weight.quant_state.shape): layer for layer in layers}.values():
        _check_product(layer, dtype)
    return model


def _bitsandbytes() -> Any:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "load_in_4bit needs bitsandbytes, which is not installed: "
            "pip install 'fastalign[qlora]', or set load_in_4bit to false"
        )
    return importlib.import_module("bitsandbytes")


def lay_out_nf4(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Make a model on torch's meta device what :func:`load_nf4` would make of it.

    Raises:
        ConfigError: bitsandbytes is missing.
    """
    bitsandbytes = _bitsandbytes()
    quantizer = AutoHfQuantizer.from_config(_settings(dtype), pre_quantized=False)
    quantizer.preprocess_model(model=model, device_map=None)
    quantizer.postprocess_model(model)
    model.requires_grad_(False)
    for layer in _layers(model):
        shape = layer.weight.shape
        blocks = math.ceil(shape.numel() / BLOCK)
        state = bitsandbytes.functional.QuantState(
            absmax=torch.empty(blocks, dtype=torch.uint8, device="meta"),
            shape=shape,
            code=torch.empty(16, device="meta"),
            blocksize=BLOCK,
            quant_type="nf4",
            dtype=dtype,
            offset=torch.empty((), device="meta"),
            state2=bitsandbytes.functional.QuantState(
                absmax=torch.empty(math.ceil(blocks / SCALES), device="meta"),
                code=torch.empty(SCALES, device="meta"),
                blocksize=SCALES,
                dtype=torch.float32,
            ),
        )
        packed = torch.empty(math.ceil(shape.numel() / 2), 1, dtype=torch.uint8, device="meta")
        layer.weight = bitsandbytes.nn.Params4bit(
            packed, quant_state=state, quant_type="nf4", module=layer, bnb_quantized=True
        )
        layer.quant_state = state


def scales_of(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """What NF4 weights are made of beside their parameters, by name: scales and tables."""
    for name, parameter in module.named_parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            yield f"{name}.absmax", state.absmax
            yield f"{name}.quant_map", state.code
            yield f"{name}.nested_offset", state.offset
            yield f"{name}.nested_absmax", state.state2.absmax
            yield f"{name}.nested_quant_map", state.state2.code


def _settings(dtype: torch.dtype) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        # As vLLM quantises a model while it loads, so that both hold the same base; it saves 0.37
        # bits a weight.
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _layers(model: nn.Module) -> list[Any]:
    linear = _bitsandbytes().nn.Linear4bit
    return [module for module in model.modules() if isinstance(module, linear)]


def _without_scales(layer: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """They come again with the base; checkpoints hold what is trained."""
    for key in [key for key in state if key.startswith(f"{prefix}weight.")]:
        del state[key]


def _check_product(layer: Any, dtype: torch.dtype) -> None:
    """Compare what a layer multiplies by with what its bits and scales say.

    bitsandbytes 0.50 reads the scales of other blocks on a CPU with AVX512, where the columns are
    a multiple of 16 and none of 64.
    """
    functional = _bitsandbytes().functional
    weight = layer.weight
    state = weight.quant_state
    rows = min(_PROBED_ROWS, state.shape[0])
    count = rows * state.shape[1]
    blocks = math.ceil(count / BLOCK)
    outer = state.state2.absmax.repeat_interleave(SCALES)[:blocks]
    scale = state.state2.code[state.absmax[:blocks].long()] * outer + state.offset
    packed = weight.data.view(torch.uint8).reshape(-1)[: math.ceil(count / 2)]
    nibbles = torch.stack([packed >> 4, packed & 15], dim=1).reshape(-1)[:count]
    told = state.code[nibbles.long()] * scale.repeat_interleave(BLOCK)[:count]
    used = functional.dequantize_4bit(weight.data, state)[:rows].reshape(-1).float()
    if not (used - told).norm() <= 1e-2 * told.norm():
        raise ConfigError(
            f"load_in_4bit: bitsandbytes multiplies a matrix of {tuple(state.shape)} by other "
            f"numbers than it holds on {weight.device.type} ({dtype}); such a model cannot be "
            "trained in 4 bits here"
        )
