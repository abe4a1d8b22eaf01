"""LoRA adapters as vLLM reads them: two files, with the scale multiplied in."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fastalign.rollout.engine import EngineError

# vLLM accepts these maximal ranks alone.
_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_ADAPTER_TENSOR = re.compile(
    r"^(?:base_model\.model\.)?(?P<module>.+)\."
    r"(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B)(?:\.weight)?$"
)


def allowed_rank(rank: int) -> int:
    """The smallest maximal rank that vLLM takes, at least ``rank``."""
    for allowed in _LORA_RANKS:
        if rank <= allowed:
            return allowed
    raise EngineError(f"LoRA rank {rank}: vLLM takes at most {_LORA_RANKS[-1]}")


def fold(
    name: str,
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    """The adapter's tensors in the engine's dtype, on the CPU, with the scale inside B.

    Raises:
        EngineError: a tensor or an option that is no plain LoRA's.
    """
    if config.get("peft_type") != "LORA":
        raise EngineError(f"adapter {name!r} is of type {config.get('peft_type')}: LoRA is taken")
    for option in ("layer_replication", "alora_invocation_tokens", "use_bdlora", "use_qalora"):
        if config.get(option):
            raise EngineError(f"adapter {name!r} uses {option}: vLLM does not compute it")
    folded: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        match = _ADAPTER_TENSOR.match(key)
        if match is None:
            raise EngineError(
                f"adapter {name!r} holds {key}: vLLM computes A and B matrices alone, no DoRA, "
                "biases or trained modules"
            )
        tensor = tensor.detach()
        if match["part"] in ("lora_B", "lora_embedding_B"):
            tensor = tensor.float() * _scale(config, match["module"], tensor.shape[1])
        folded[key] = tensor.to(device="cpu", dtype=dtype, copy=True).contiguous()
    return folded


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA, as PEFT picks them for a module."""
    from peft.utils.other import get_pattern_key

    pattern = config.get("alpha_pattern") or {}
    alpha = pattern.get(get_pattern_key(pattern.keys(), module), config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def write_adapter(folder: Path, folded: Mapping[str, torch.Tensor]) -> None:
    """Write PEFT's two files, with a scale of 1 for every module."""
    ranks: dict[str, int] = {}
    for key, tensor in folded.items():
        match = _ADAPTER_TENSOR.match(key)
        assert match is not None
        if match["part"] in ("lora_A", "lora_embedding_A"):
            ranks[match["module"]] = tensor.shape[0]
    largest = max(ranks.values())
    other = {re.escape(module): rank for module, rank in ranks.items() if rank != largest}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": other,
        "alpha_pattern": other,
        "target_modules": sorted({module.rpartition(".")[2] for module in ranks}),
        "bias": "none",
    }
    folder.mkdir()
    save_file(dict(folded), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
