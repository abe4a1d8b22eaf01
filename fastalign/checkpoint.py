"""Checkpoints of a run (atomic, resumable) and its result (what Hugging Face tools load)."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from fastalign.config import Config, ConfigError, dump_config, parse_config
from fastalign.data import Example, Stream
from fastalign.episodes import forget_journals
from fastalign.model import POLICY, TrainedModel

PREFIX = "checkpoint-"
START = "start"
REFERENCE_FILE = "reference.safetensors"


@dataclass(frozen=True)
class Position:
    """Where a run stands: ``step`` updates done; next is batch ``batch`` of round ``round``, after
    an evaluation where one is due.  The policy has become the reference ``references`` times."""

    step: int = 0
    round: int = 0
    batch: int = 0
    best_metric: float | None = None
    evals_without_gain: int = 0
    evaluation_due: bool = False
    references: int = 0


@dataclass(frozen=True)
class Pending:
    """What an online round has when it is interrupted, beside what it sampled, which is kept in
    the journal of the round.

    Attributes:
        examples: the round's, all of them, once it is judged.
    """

    examples: Sequence[Example] = ()


def save_checkpoint(
    model: TrainedModel, config: Config, position: Position, pending: Pending
) -> Path:
    """Write parameters, optimizer, random states and position; collective.

    The folder appears under its name only when everything in it is written.
    """
    final = Path(config.output_dir) / f"{PREFIX}{position.step}"
    aside = final.with_name(f".{final.name}.partial")
    rank = dist.get_rank()
    if rank == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    dist.barrier()
    _save_state(model, aside)
    if position.references:
        _save_reference(model, aside / REFERENCE_FILE)
    torch.save(_random_state(), aside / f"random-{rank}.pt")
    if rank == 0:
        if pending.examples:
            save_examples(aside / "pending.npz", pending.examples)
        (aside / "recipe.yaml").write_text(dump_config(config), encoding="utf-8")
        layout = {"processes": dist.get_world_size(), "zero_stage": model.zero_stage}
        (aside / "layout.json").write_text(json.dumps(layout), encoding="utf-8")
        (aside / "position.json").write_text(json.dumps(asdict(position)), encoding="utf-8")
    dist.barrier()
    if rank == 0:
        for file in aside.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        forget_old(config)
    dist.barrier()
    return final


def find_checkpoint(config: Config) -> Path | None:
    """The checkpoint that ``resume_from_checkpoint`` means, or None to start afresh.

    Raises:
        ConfigError: a named folder is no checkpoint, or a fresh run would mix with an old one.
    """
    wanted = config.resume_from_checkpoint
    found = checkpoints(Path(config.output_dir))
    if wanted is False:
        if found:
            raise ConfigError(
                f"output_dir = {config.output_dir!r} holds {found[-1].name} of an earlier run: "
                "continue it with --resume, or choose another folder"
            )
        return None
    if isinstance(wanted, str):
        path = Path(wanted)
        if not (path / "position.json").is_file():
            raise ConfigError(f"resume_from_checkpoint = {wanted!r}: no checkpoint there")
        return path
    return found[-1] if found else None


def checkpoints(output_dir: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    found = [p for p in output_dir.glob(f"{PREFIX}*") if (p / "position.json").is_file()]
    return sorted(found, key=lambda p: int(p.name.removeprefix(PREFIX)))


def load_checkpoint(model: TrainedModel, config: Config, path: Path) -> tuple[Position, Pending]:
    """Put a run back where :func:`save_checkpoint` left it; collective."""
    import yaml

    saved = parse_config(yaml.safe_load((path / "recipe.yaml").read_text(encoding="utf-8")))
    _check_same_run(saved, config, path)
    layout = json.loads((path / "layout.json").read_text(encoding="utf-8"))
    here = {"processes": dist.get_world_size(), "zero_stage": model.zero_stage}
    if layout != here:
        raise ConfigError(
            f"resume_from_checkpoint: {path} was written by {layout['processes']} process(es) at "
            f"ZeRO stage {layout['zero_stage']}, these are {here['processes']} at stage "
            f"{here['zero_stage']}: set nproc_per_node and zero_stage as they were"
        )
    _load_state(model, path)
    # Written by us, by this program, in this run's own folder: tensors and plain values only.
    _restore_random_state(torch.load(path / f"random-{dist.get_rank()}.pt", weights_only=True))
    position = _position(path)
    if position.references:
        model.load_reference(load_file(path / REFERENCE_FILE))
    return position, _load_pending(path)


def _load_pending(path: Path) -> Pending:
    examples = path / "pending.npz"
    return Pending(load_examples(examples) if examples.is_file() else ())


def save_start(model: TrainedModel, output_dir: str) -> None:
    """Keep what was trained of the start of the run, and its optimizer; collective."""
    _save_state(model, Path(output_dir, START))
    dist.barrier()


def load_start(model: TrainedModel, output_dir: str) -> None:
    """Put what is trained, and its optimizer, back to the start of the run; collective.

    Raises:
        ConfigError: the folder is gone.
    """
    path = Path(output_dir, START)
    if not path.is_dir():
        raise ConfigError(f"online.fresh_adapter: {path} with the start of the run is missing")
    _load_state(model, path)


def _save_state(model: TrainedModel, folder: Path) -> None:
    model.engine.save_checkpoint(
        str(folder), tag="state", exclude_frozen_parameters=model.uses_adapter
    )


def _save_reference(model: TrainedModel, path: Path) -> None:
    tensors = {}
    for name, tensor in model.iter_reference():
        if dist.get_rank() == 0:
            tensors[name] = tensor.cpu().clone()
    if dist.get_rank() == 0:
        save_file(tensors, path)


def _load_state(model: TrainedModel, folder: Path) -> None:
    loaded, _ = model.engine.load_checkpoint(
        str(folder), tag="state", load_module_strict=not model.uses_adapter
    )
    if loaded is None:
        raise ConfigError(f"{folder}: DeepSpeed could not load its part of the checkpoint")


# What may differ between a run and its continuation without changing what is computed.
_FREE = {
    "output_dir", "resume_from_checkpoint", "logging_steps", "save_steps", "save_total_limit",
    "eval_steps", "report_to", "early_stopping_patience", "eval_judge", "declared_licenses",
    "nproc_per_node", "judge_datasets", "profile",
}  # fmt: skip
# Of a judge's endpoint: how it is asked and paid, not what it says.
_FREE_ENDPOINT = {
    "api_key_env", "max_concurrency", "max_retries", "timeout_s", "input_cost_per_million",
    "output_cost_per_million", "max_cost", "max_requests",
}  # fmt: skip


def _check_same_run(saved: Config, config: Config, path: Path) -> None:
    paid = {"judge": {"endpoint": _FREE_ENDPOINT}}
    before, now = (c.model_dump(mode="json", by_alias=True, exclude=paid) for c in (saved, config))
    for key in (key for key in now if key not in _FREE):
        name, old, new = _difference(key, before.get(key), now[key])
        if old != new:
            raise ConfigError(
                f"resume_from_checkpoint: {path} was made with {name} = {old!r}, the recipe "
                f"says {new!r}; put it back or start afresh in another output_dir"
            )


def _difference(name: str, old: Any, new: Any) -> tuple[str, Any, Any]:
    """The first key at which two values differ, below ``name`` where both are sections."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                return _difference(f"{name}.{key}", old.get(key), new.get(key))
    return name, old, new


def forget_old(config: Config) -> None:
    """Keep the last checkpoints, and the rollouts of the rounds that go on from one of them."""
    found = checkpoints(Path(config.output_dir))
    for old in found[: -config.save_total_limit]:
        shutil.rmtree(old)
    forget_journals(config.output_dir, _position(found[-config.save_total_limit :][0]).round)


def _position(path: Path) -> Position:
    return Position(**json.loads((path / "position.json").read_text(encoding="utf-8")))


def _random_state() -> dict[str, Any]:
    version, internal, gauss = random.getstate()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": [version, list(internal), gauss],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def save_examples(path: Path, examples: Sequence[Example]) -> None:
    """Examples as flat arrays, no pickle."""
    streams = [s for e in examples for s in e.streams]
    np.savez(
        path,
        input_ids=np.concatenate([s.input_ids for s in streams]),
        loss_mask=np.concatenate([s.loss_mask for s in streams]),
        lengths=np.array([len(s.input_ids) for s in streams]),
        roles=np.array([s.role for s in streams]),
        streams=np.array([len(e.streams) for e in examples]),
        weights=np.array([e.weight for e in examples]),
        sources=np.array([e.source for e in examples]),
    )


def load_examples(path: Path) -> list[Example]:
    with np.load(path, allow_pickle=False) as data:
        cuts = np.cumsum(data["lengths"])[:-1]
        streams = iter(
            Stream(role=str(role), input_ids=ids, loss_mask=mask)
            for role, ids, mask in zip(
                data["roles"],
                np.split(data["input_ids"], cuts),
                np.split(data["loss_mask"], cuts),
                strict=True,
            )
        )
        return [
            Example(tuple(next(streams) for _ in range(n)), float(weight), str(source))
            for n, weight, source in zip(
                data["streams"], data["weights"], data["sources"], strict=True
            )
        ]


def save_result(model: TrainedModel, tokenizer: Any, folder: Path) -> None:
    """The trained model as transformers or PEFT load it; collective under ZeRO-3."""
    if model.uses_adapter:
        tensors = {k: v.cpu().contiguous() for k, v in model.adapter_tensors(POLICY).items()}
        if dist.get_rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
            peft_config = model.policy.model.peft_config[POLICY]
            before, peft_config.inference_mode = peft_config.inference_mode, True
            peft_config.save_pretrained(str(folder))
            peft_config.inference_mode = before
            tokenizer.save_pretrained(folder)
    else:
        tensors = {}
        for name, tensor in model.iter_weights(model.dtype):
            if dist.get_rank() == 0:
                tensors[name] = tensor.cpu().clone()
        if dist.get_rank() == 0:
            model.policy.causal_lm.save_pretrained(folder, state_dict=tensors)
            tokenizer.save_pretrained(folder)
    dist.barrier()
