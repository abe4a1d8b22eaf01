"""What one rank does in tests/test_distributed.py: every scenario of a specification in turn.

    RANK=0 WORLD_SIZE=2 ... python tests/distributed_worker.py SPECIFICATION.json

Rank 0 writes what a scenario gave to ``<name>.json`` and ``<name>.safetensors`` beside the
specification; the tests look at those.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import support
import torch
import torch.distributed as dist
from safetensors.torch import save_file

import fastalign.model
import fastalign.train as loop
from fastalign import startup
from fastalign.checkpoint import CheckpointError
from fastalign.config import Config, parse_config
from fastalign.model import POLICY, TrainedModel, init_distributed
from fastalign.online import ReferenceScorer, wake
from fastalign.rollout import EngineError, adapters
from fastalign.rollout.server import ServerEngine
from fastalign.rollout.sync import fingerprint

# Behind fastalign.model, which prepares the environment that DeepSpeed reads when imported.
from deepspeed.runtime.zero.partition_parameters import Init, ZeroParamStatus  # isort: skip


# Of the small models' weights, which would be one bucket.
fastalign.model.GATHER_BUCKET_BYTES = 1 << 14


def keep(path: Path, facts: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    if dist.get_rank() == 0:
        held = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        save_file(held, path.with_name(f"{path.name}.safetensors"))
        path.with_name(f"{path.name}.json").write_text(json.dumps(facts))


def gradients(folder: Path, name: str, config: Config, spec: dict[str, Any]) -> None:
    """One model; loss and full gradients of a global batch under each of several recipes."""
    reference = spec.get("reference")
    run, _ = support.start(config, reference=Path(reference) if reference else None)
    assert run.model.shares_prefixes != name.startswith("unpacked")
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


def moved(folder: Path, name: str, config: Config, spec: dict[str, Any]) -> None:
    """A whole run; where it is resumed, what it has loaded is saved again at once."""
    with support.saved_again(Path(config.output_dir, "again")):
        loop.train(config)


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


def _agreement(run: Any) -> dict[str, np.ndarray]:
    """The same next-token log-probs by the engine and by the trainer (collective)."""
    words = np.array(run.tokenizer("The capital of France is Paris.").input_ids, dtype=np.int32)
    tokens = sorted(set(words.tolist()))
    adapter = POLICY if run.model.uses_adapter else None
    prompts = [words[:n] for n in range(1, len(words))]
    run.model.engine.eval()
    trainer = startup._trainer_next_logprobs(run.model, words, tokens)
    run.model.engine.train()
    return {"trainer": trainer, "engine": run.engine.next_logprobs(prompts, tokens, adapter)}


def _part(run: Any, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """What the engine has to hold of a tensor on this rank, where the ranks share it: the first
    layers of each block are cut by outputs, the second by inputs, so is what LoRA puts on them."""
    ranks = run.config.rollout.tensor_parallel_size
    last = any(layer in name for layer in ("o_proj", "down_proj"))
    whole = {"lora_A": not last, "lora_B": last}
    if any(cut for kind, cut in whole.items() if kind in name) or "norm" in name:
        return tensor
    return tensor.chunk(ranks, dim=1 if last else 0)[dist.get_rank() % ranks]


def _content(run: Any) -> dict[str, Any]:
    """Names whose content was found in the engine, against checksums taken here (collective).

    The engine's side is read back from vLLM's own parameters; the trainer's side is computed anew
    from gathered weights, not from what a transfer says that it sent.
    """
    model, engine = run.model, run.engine
    if not model.uses_adapter:
        names = frozenset(model.named_weights())
        own = {n: fingerprint(_part(run, n, t)) for n, t in model.iter_weights(engine._dtype)}
        (transfer,) = engine._llm.collective_rpc(
            "fastalign_load_weights", args=(model.iter_weights(engine._dtype), names, run.version)
        )
        held = transfer.held
        columns = [n for n, x in transfer.columns_held.items() if x == transfer.columns_sent[n]]
    else:
        folded = adapters.fold(
            POLICY, model.adapter_tensors(), model.adapter_config(), engine._dtype
        )
        own = {n: fingerprint(_part(run, n, t)) for n, t in folded.items()}
        adapter = engine._adapters[POLICY]
        (held,) = engine._llm.collective_rpc(
            "fastalign_load_adapter", args=(adapter.request, adapter.shapes)
        )
        columns = []
    equal = {n for n in own if held.get(n) == own[n]}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (equal, set(columns), held.keys() - equal))
    return {
        "names": sorted(own),
        "equal": sorted(set.intersection(*(each for each, _, _ in everyone))),
        "columns": sorted(set.intersection(*(each for _, each, _ in everyone))),
        "different": sorted(set.union(*(each for _, _, each in everyone))),
    }


def _interrupted(run: Any) -> dict[str, int]:
    """Buckets of a transfer that ends in its second one, whole parameters in it and behind it, and
    differences of the transfer after that from the one before (collective)."""

    def whole() -> int:
        states = [getattr(p, "ds_status", None) for p in run.model.policy.parameters()]
        return sum(state != ZeroParamStatus.NOT_AVAILABLE for state in states)

    buckets = fastalign.model._buckets(run.model.named_weights())
    before = {name: tensor.clone() for name, tensor in run.model.iter_weights(torch.float32)}
    resting = whole()
    with contextlib.closing(run.model.iter_weights(torch.float32)) as weights:
        for _ in range(len(buckets[0]) + 1):
            next(weights)
        under_way = whole()
    behind = whole()
    after = dict.fromkeys(before, 1) | {
        name: int(not torch.equal(before[name], tensor))
        for name, tensor in run.model.iter_weights(torch.float32)
    }
    return {
        "buckets": len(buckets),
        "under_way": under_way - resting,
        "left": behind - resting,
        "different": sum(after.values()),
    }


def rollouts(folder: Path, name: str, config: Config, spec: dict[str, Any]) -> None:
    """A run whose engine is compared with its trainer before the first step and after the last."""
    original = loop.run_rounds
    facts: dict[str, Any] = {}

    def run_rounds(run: Any, *arguments: Any) -> dict[str, float]:
        facts["interrupted"] = {} if run.model.uses_adapter else _interrupted(run)
        wake(run)
        first = _agreement(run)
        metrics = original(run, *arguments)
        wake(run)
        last = _agreement(run)
        facts.update(
            engine=run.engine.name,
            gap_before=float(np.abs(first["engine"] - first["trainer"]).max()),
            gap_after=float(np.abs(last["engine"] - last["trainer"]).max()),
            moved=float(np.abs(last["trainer"] - first["trainer"]).max()),
            followed=float(np.abs(last["engine"] - first["engine"]).max()),
            content=_content(run),
        )
        return metrics

    loop.run_rounds = run_rounds
    try:
        facts["metrics"] = loop.train(config)
    finally:
        loop.run_rounds = original
    keep(folder / name, facts, {})


def withheld(folder: Path, name: str, config: Config, spec: dict[str, Any]) -> None:
    """A run whose transfers lose one tensor from a given push on."""
    pushes = 0
    whole = TrainedModel.iter_weights, TrainedModel.adapter_tensors

    def iter_weights(model: Any, dtype: torch.dtype) -> Any:
        nonlocal pushes
        pushes += 1
        for item in whole[0](model, dtype):
            if pushes < spec["push"] or spec["tensor"] not in item[0]:
                yield item

    def adapter_tensors(model: Any, adapter: str = POLICY) -> dict[str, torch.Tensor]:
        nonlocal pushes
        pushes += 1
        tensors = whole[1](model, adapter)
        if pushes < spec["push"]:
            return tensors
        # Both matrices of one module: what is left is an adapter that loads without complaint.
        return {n: t for n, t in tensors.items() if spec["tensor"] not in n}

    TrainedModel.iter_weights, TrainedModel.adapter_tensors = iter_weights, adapter_tensors
    said = ""
    try:
        loop.train(config)
    except EngineError as error:
        said = str(error)
    finally:
        TrainedModel.iter_weights, TrainedModel.adapter_tensors = whole
    keep(folder / name, {"error": said, "pushes": pushes}, {})


def server_dies(folder: Path, name: str, config: Config, spec: dict[str, Any]) -> None:
    """A run whose vLLM server is killed under the second call that it samples ahead."""
    generate, calls = ServerEngine.generate, 0

    def killed(engine: ServerEngine, *arguments: Any) -> Any:
        nonlocal calls
        calls += threading.current_thread() is not threading.main_thread()
        if calls == 2 and engine._process is not None:
            calls += 1
            os.killpg(engine._process.pid, signal.SIGKILL)
        return generate(engine, *arguments)

    ServerEngine.generate = killed
    try:
        metrics = loop.train(config)
    finally:
        ServerEngine.generate = generate
    keep(folder / name, metrics, {})


def skipped_step(folder: Path, name: str, config: Config, spec: dict[str, Any]) -> None:
    """Two steps, and the same with one between them that has to be none."""
    ended, said, moved = [], [], False
    for batches in ([slice(4, 8), slice(8, 12)], [slice(4, 8), slice(0, 4), slice(8, 12)]):
        run, examples = support.start(config)
        before = support.trained_tensors(run)
        for batch in batches:
            try:
                loop.update(run, examples[batch], 0.0, 10)
            except loop.NotFinite as reason:
                said.append(str(reason))
        ended.append(support.trained_tensors(run))
        moved = any(not torch.equal(before[n], ended[-1][n]) for n in before)
    same = all(torch.equal(ended[0][n], ended[1][n]) for n in ended[0])
    path = folder / f"{name}-{dist.get_rank()}.json"
    path.write_text(json.dumps({"same": same, "moved": moved, "said": said}))


def refused(folder: Path, name: str, config: Config, spec: dict[str, Any]) -> None:
    """A run whose second checkpoint the system does not let one rank write."""
    original, steps = loop.update, 0

    def update(run: Any, *arguments: Any) -> dict[str, float]:
        nonlocal steps
        steps += 1
        if steps == 2 and dist.get_rank() == 1:
            if run.writer is not None:
                # Of the first one, behind the training.
                run.writer.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        return original(run, *arguments)

    loop.update = update
    try:
        loop.train(config)
    except CheckpointError as error:
        (folder / f"{name}-{dist.get_rank()}").write_text(str(error))
    finally:
        loop.update = original
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def late(folder: Path, name: str, config: Config, spec: dict[str, Any]) -> None:
    """A run whose rank 1 brings nothing to the disk before the next step."""
    # DeepSpeed counts the parameters of a process, and keeps their numbers.
    Init.param_id = 0
    with support.late_writes() if dist.get_rank() == 1 else contextlib.nullcontext([]) as written:
        loop.train(config)
    (folder / f"{name}-{dist.get_rank()}").write_text(json.dumps(written))


SCENARIOS = {
    "gradients": gradients,
    "training": training,
    "moved": moved,
    "interruption": interruption,
    "rollouts": rollouts,
    "withheld": withheld,
    "server_dies": server_dies,
    "skipped_step": skipped_step,
    "refused": refused,
    "late": late,
}


def main(path: Path) -> None:
    torch.set_num_threads(1)
    init_distributed(timeout_s=300.0)
    # Ranks that find otherwise what is fast: the first one decides for all.
    torch.cpu._is_avx512_bf16_supported = lambda: True
    fastalign.model._bfloat16_speed = lambda: 2.0 if dist.get_rank() else 0.5
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
