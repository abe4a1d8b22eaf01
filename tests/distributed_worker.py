"""What one rank does in tests/test_distributed.py: every scenario of a specification in turn.

    RANK=0 WORLD_SIZE=2 ... python tests/distributed_worker.py SPECIFICATION.json

Rank 0 writes what a scenario gave to ``<name>.json`` and ``<name>.safetensors`` beside the
specification; the tests look at those.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import support
import torch
import torch.distributed as dist
from safetensors.torch import save_file

import fastalign.train as loop
from fastalign.config import Config, parse_config
from fastalign.model import init_distributed
from fastalign.online import ReferenceScorer


def keep(path: Path, facts: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    if dist.get_rank() == 0:
        held = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        save_file(held, path.with_name(f"{path.name}.safetensors"))
        path.with_name(f"{path.name}.json").write_text(json.dumps(facts))


def gradients(folder: Path, name: str, config: Config, spec: dict[str, Any]) -> None:
    """One model; loss and full gradients of a global batch under each of several recipes."""
    reference = spec.get("reference")
    run, _ = support.start(config, reference=Path(reference) if reference else None)
    for case, tree in spec["cases"].items():
        examples = support.as_method(run, parse_config(tree))
        metrics, full = support.step_with_gradients(run, examples)
        keep(folder / f"{name}.{case}", metrics, full)


def training(folder: Path, name: str, config: Config, spec: dict[str, Any]) -> None:
    """A whole run; what the frozen reference says at its end."""
    original = loop.run_rounds
    scores: list[np.ndarray] = []

    def run_rounds(run: Any, *arguments: Any) -> dict[str, float]:
        metrics = original(run, *arguments)
        if run.model.reference_engine is not None:
            # Ranks ask different numbers of questions; one of them asks none.
            lengths = spec.get("ask", [[5, 9], []])[dist.get_rank()]
            prompts = [np.arange(3, n, dtype=np.int32) for n in lengths]
            scores.append(ReferenceScorer(run.model)(prompts, [4, 7, 200]))
        return metrics

    loop.run_rounds = run_rounds
    try:
        metrics = loop.train(config)
    finally:
        loop.run_rounds = original
    keep(folder / name, metrics, {"scores": torch.from_numpy(scores[0])} if scores else {})


def interruption(folder: Path, name: str, config: Config, spec: dict[str, Any]) -> None:
    """A run that dies just before an update, and its continuation."""
    original, left = loop.update, spec["before"]

    def update(*arguments: Any) -> dict[str, float]:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        return original(*arguments)

    loop.update = update
    try:
        loop.train(config)
    except KeyboardInterrupt:
        pass
    finally:
        loop.update = original
    metrics = loop.train(config.model_copy(update={"resume_from_checkpoint": True}))
    keep(folder / name, metrics, {})


SCENARIOS = {"gradients": gradients, "training": training, "interruption": interruption}


def main(path: Path) -> None:
    torch.set_num_threads(1)
    init_distributed(timeout_s=300.0)
    for name, spec in json.loads(path.read_text()).items():
        started = time.monotonic()
        try:
            SCENARIOS[spec["do"]](path.parent, name, parse_config(spec["recipe"]), spec)
        except Exception:
            # The ranks may not stand at the same collective any more.
            traceback.print_exc()
            print(f"scenario {name} failed on rank {dist.get_rank()}", flush=True)
            os._exit(1)
        print(f"scenario {name}: {time.monotonic() - started:.1f} s", flush=True)
    dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
