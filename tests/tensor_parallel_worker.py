"""One of several ranks whose engines are shared by two each; what it saw goes into a file."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from fastalign.config import ConfigError, RolloutConfig
from fastalign.model import init_distributed
from fastalign.rollout import EngineError, SamplingSettings, ServedModel, make_engine, vllm_worker

CONFIG = RolloutConfig(engine="vllm", max_num_seqs=16, kv_cache_gib=0.05, tensor_parallel_size=2)
SETTINGS = SamplingSettings(8)
TOKENS = (5, 6, 316)
# Prompts of each rank, by their lengths: one of them has none.
LENGTHS = ((9, 1, 17), (), (30,), (4, 12))


def prompts_of(rank: int) -> list[np.ndarray]:
    generator = np.random.default_rng(rank)
    return [generator.integers(3, 317, n).astype(np.int32) for n in LENGTHS[rank]]


def seeds_of(rank: int) -> list[int]:
    return [100 * rank + k for k in range(len(LENGTHS[rank]))]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return {name: p.detach() for name, p in model.named_parameters()}


def ask(engine: Any, rank: int) -> dict[str, Any]:
    """Rollouts of this rank's prompts, and scores of the tokens that follow them."""
    prompts = prompts_of(rank)
    rollouts = engine.generate(prompts, SETTINGS, seeds_of(rank))
    return {
        "token_ids": [r.token_ids.tolist() for r in rollouts],
        "logprobs": [r.logprobs.tolist() for r in rollouts],
        "versions": [r.weight_version for r in rollouts],
        "scores": engine.next_logprobs(prompts, TOKENS).tolist(),
        "prompt_tokens": engine.prompt_tokens.total,
    }


def transfer(engine: Any, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Load full weights twice: as the trainer does, and for what is proven of each tensor."""
    names = frozenset(tensors)
    report = engine.load_weights(iter(tensors.items()), names, version=3)
    (seen,) = engine._llm.collective_rpc(
        "fastalign_load_weights", args=(iter(tensors.items()), names, 3)
    )
    return {
        "names": sorted(names),
        "proven": sorted(seen.held.keys() | seen.columns_held.keys()),
        "bytes": report.bytes,
        "digest": report.digest,
    }


def said(call: Any, *arguments: Any) -> str:
    try:
        call(*arguments)
    except (EngineError, ConfigError) as error:
        return str(error)
    return ""


def faults(engine: Any, tensors: dict[str, torch.Tensor], rank: int) -> dict[str, str]:
    """What is said where the first two ranks do not do the same, or hold each other's parts."""
    found = {}
    engine._version += rank == 1
    found["version"] = said(engine.generate, prompts_of(rank), SETTINGS, seeds_of(rank))
    engine._version -= rank == 1
    # In the first engine both take themselves for its first rank.
    original = vllm_worker._place
    if rank == 1:
        vllm_worker._place = lambda: (0, 2)
    found["part"] = said(engine.load_weights, iter(tensors.items()), frozenset(tensors), 4)
    vllm_worker._place = original
    engine.load_weights(iter(tensors.items()), frozenset(tensors), 5)
    generate = engine._llm.generate
    if rank == 1:

        def otherwise(prompts: Any, params: Any, **keys: Any) -> Any:
            for param in params:
                param.seed += 1
            return generate(prompts, params, **keys)

        engine._llm.generate = otherwise
    found["draw"] = said(engine.generate, prompts_of(rank), SETTINGS, seeds_of(rank))
    found["afterwards"] = said(engine.all_agree, True) or said(engine.sleep)
    return found


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    init_distributed(timeout_s=300.0)
    rank = dist.get_rank()
    started = time.monotonic()
    keys: dict[str, Any] = {"dtype": torch.float32, "max_model_len": 128, "seed": 1}

    def make(config: RolloutConfig = CONFIG) -> Any:
        return make_engine(
            ServedModel(folder / "start", **keys), config, world_size=dist.get_world_size()
        )

    facts: dict[str, Any] = {}
    first = rank // 2 * 2
    left = Path(f"/dev/shm/-tp:9-[{first}-{first + 1}]-cpushm_0")
    left.touch()
    dist.barrier()
    facts["left"] = said(make)
    dist.barrier()
    left.unlink(missing_ok=True)
    facts["refused"] = said(make, CONFIG.model_copy(update={"tensor_parallel_size": 3}))
    engine = make()
    dist.barrier()
    maps = Path("/proc/self/maps").read_text().splitlines()
    facts["shared_memory"] = [line.split(maxsplit=5)[5] for line in maps if "cpushm" in line]
    facts["start"] = ask(engine, rank)
    moved = weights(folder / "moved")
    facts["transfer"] = transfer(engine, moved)
    facts["moved"] = ask(engine, rank)
    facts["agreed"] = engine.all_agree(rank != 2)
    facts["faults"] = faults(engine, moved, rank)
    engine.close()
    print(f"{time.monotonic() - started:.1f} s", flush=True)
    (folder / f"rank-{rank}.json").write_text(json.dumps(facts))
    dist.barrier()


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except BaseException:
        import traceback

        traceback.print_exc()
        # Other ranks wait for this one, and it for them when Python ends.
        os._exit(1)
