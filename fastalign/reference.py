"""Log-probs of the frozen start of a run: on data that does not change once, and kept on disk."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fastalign import __version__, ranks
from fastalign.batch import Batch, Packer
from fastalign.data import Example
from fastalign.model import REFERENCE, TrainedModel
from fastalign.rollout.sync import digest, fingerprint
from fastalign.run import Run
from fastalign_kernels import default_implementation

CHUNK = 1024
"""Examples that are scored, and kept, together: what a run that is killed loses at most."""


def cache_folder() -> Path:
    """Where results outlive their run: $FASTALIGN_CACHE, or fastalign in the user's cache."""
    own = os.environ.get("FASTALIGN_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "fastalign")


def reference_logprobs(run: Run, pack: Batch) -> torch.Tensor | None:
    """What the loss compares a pack with, float32 [M]: as :func:`score_reference` found it, or by
    a forward pass now.  None where the method compares with nothing."""
    if not run.method.needs_reference:
        return None
    if pack.reference is not None:
        return pack.reference
    with run.model.reference() as forward:
        logprob, _ = forward(pack)
    return logprob


def score_reference(run: Run, examples: Sequence[Example]) -> list[Example]:
    """The examples with the reference's log-probs of their targets; collective.

    To be called before anything is trained or loaded from a checkpoint: what the policy is then
    is the reference, so that no second set of weights has to be held.  Results are kept in
    :func:`cache_folder` under a hash of all that they follow from, by chunks of ``CHUNK``.
    """
    if not examples:
        return []
    base = _base_key(run)
    scored: list[Example] = []
    computed, started = 0, time.monotonic()
    for first in range(0, len(examples), CHUNK):
        run.tracker.phase("reference", f"{first}/{len(examples)}")
        chunk = examples[first : first + CHUNK]
        path = cache_folder() / "reference" / f"{_key(base, chunk)}.safetensors"
        values = ranks.from_first(_read(path, chunk, run.tracker.say) if run.rank == 0 else None)
        if values is None:
            values = _compute(run, chunk)
            computed += len(chunk)
            if run.rank == 0:
                _write(path, values, run.tracker.say)
        rows = [sum(int(s.loss_mask.sum()) for s in example.streams) for example in chunk]
        parts = np.split(values, np.cumsum(rows)[:-1])
        scored += [
            replace(example, reference_logprobs=part)
            for example, part in zip(chunk, parts, strict=True)
        ]
    run.tracker.say(
        f"reference log-probs of {len(examples)} examples: {computed} computed in "
        f"{time.monotonic() - started:.1f} s, the others were in {cache_folder()}"
    )
    return scored


def _compute(run: Run, chunk: Sequence[Example]) -> np.ndarray:
    """float32, targets of the first example, then of the second."""
    model = run.model
    packer = Packer(chunk, model.shares_prefixes)
    plan = packer.plan(
        run.config.micro_batch_tokens, run.world_size, run.operations.cost(reference=False)
    )
    mine: dict[int, np.ndarray] = {}
    with _untrained(model) as forward:
        for indices in plan[run.rank]:
            # Under ZeRO-3 a rank without a pack takes part in the others' passes.
            logprob, _ = forward(packer.pack(indices or [packer.shortest]).to(model.device))
            rows = [sum(int(s.loss_mask.sum()) for s in chunk[i].streams) for i in indices]
            values = np.split(logprob.float().cpu().numpy(), np.cumsum(rows))
            mine |= dict(zip(indices, values, strict=False))
    found = {index: values for part in ranks.gather(mine) for index, values in part.items()}
    return np.concatenate([found[index] for index in range(len(chunk))])


@contextlib.contextmanager
def _untrained(model: TrainedModel) -> Iterator[Callable[..., Any]]:
    """Forward of the frozen start: under LoRA of base or adapter, else of the policy, which has
    not been trained yet."""
    if model.uses_adapter or model.reference_engine is not None:
        with model.reference() as forward:
            yield forward
        return
    model.engine.eval()
    with torch.no_grad():
        yield model.engine
    model.engine.train()


# ---------------------------------------------------------------------------------------- on disk


def _base_key(run: Run) -> bytes:
    """Everything but the data that values follow from, to the last bit; collective."""
    model = run.model
    weights = {name: fingerprint(tensor) for name, tensor in model.iter_start()}
    scaling = {
        layer.scaling[REFERENCE]
        for layer in model.policy.modules()
        if isinstance(layer, BaseTunerLayer) and REFERENCE in getattr(layer, "scaling", {})
    }
    device = model.device
    facts = {
        "fastalign": __version__,
        "weights": digest(weights),
        "config": model.policy.causal_lm.config.to_json_string(),
        "scaling": sorted(scaling),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "implementation": default_implementation(device, model.dtype),
        "packed": model.policy.packed,
        "shares_prefixes": model.shares_prefixes,
        "micro_batch_tokens": run.config.micro_batch_tokens,
        "processes": run.world_size,
    }
    return json.dumps(facts, sort_keys=True).encode()


def _key(base: bytes, chunk: Sequence[Example]) -> str:
    found = hashlib.sha256(base)
    for example in chunk:
        found.update(len(example.streams).to_bytes(8, "little"))
        for stream in example.streams:
            found.update(len(stream).to_bytes(8, "little"))
            found.update(stream.input_ids.tobytes())
            found.update(stream.loss_mask.tobytes())
    return found.hexdigest()


def _read(path: Path, chunk: Sequence[Example], say: Callable[[str], None]) -> np.ndarray | None:
    if not path.is_file():
        return None
    count = sum(int(s.loss_mask.sum()) for example in chunk for s in example.streams)
    try:
        with safe_open(path, framework="np") as file:
            values = file.get_tensor("logprobs")
            whole = (file.metadata() or {}).get("sha256") == _sha256(values)
    except (OSError, SafetensorError) as error:
        say(f"{path}: cannot be read ({error}); its log-probs are computed anew")
        return None
    if not whole or values.dtype != np.float32 or values.shape != (count,):
        say(f"{path}: is not as it was written; its log-probs are computed anew")
        return None
    return values


def _write(path: Path, values: np.ndarray, say: Callable[[str], None]) -> None:
    """Whole or not at all; a disk that takes nothing costs the next run, not this one."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"logprobs": values}, aside, metadata={"sha256": _sha256(values)})
        aside.rename(path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        say(f"{path}: not written ({error}); another run computes these log-probs again")


def _sha256(values: np.ndarray) -> str:
    return hashlib.sha256(values.tobytes()).hexdigest()
