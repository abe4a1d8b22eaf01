"""Checkpoints of a run (atomic, resumable) and its result (what Hugging Face tools load)."""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import io
import json
import random
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from fastalign import ranks
from fastalign.config import Config, ConfigError, dump_config, parse_config, read_yaml
from fastalign.data import Example, Stream
from fastalign.episodes import forget_journals
from fastalign.model import BASE_KEY, NF4, POLICY, TrainedModel, full_shape
from fastalign.plugins import base_name
from fastalign.run import Ahead, Run
from fastalign.writer import Writer, hash_file, reason, sync

# Behind fastalign.model, which prepares the environment that DeepSpeed reads when imported.
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine  # isort: skip
from deepspeed.runtime.fp16.loss_scaler import LossScaler  # isort: skip
from deepspeed.runtime.zero.config import ZeroStageEnum  # isort: skip
from deepspeed.utils.tensor_fragment import fragment_address  # isort: skip

PREFIX, PARTIAL, OLD = "checkpoint-", ".partial", ".old"
RECIPE = "recipe.yaml"
MANIFEST = "manifest.json"
START = "start"
REFERENCE_FILE = "reference.safetensors"
# What is read when it is there: by us, and by DeepSpeed in its folder.
_IF_THERE = re.compile(r"pending\.npz|ahead\.json|reference\.safetensors|random-.*|state/[^.].*")


@dataclass(frozen=True)
class Position:
    """Where a run stands: ``step`` updates done; next is batch ``batch`` of round ``round``, after
    an evaluation where one is due.  The policy has become the reference ``references`` times; of
    ``skipped_steps`` batches no step was made, the last ``skipped_in_a_row`` among them.  At its
    last checkpoint ``metrics.jsonl`` had ``logged`` bytes."""

    step: int = 0
    round: int = 0
    batch: int = 0
    best_metric: float | None = None
    evals_without_gain: int = 0
    evaluation_due: bool = False
    references: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    logged: int = 0


@dataclass(frozen=True)
class Pending:
    """What an online round has when it is interrupted, beside what it sampled, which is kept in
    the journal of the round.

    Attributes:
        examples: the round's, all of them, once it is judged.
        ahead: the round that was sampled last before its turn, whose journal has it.
    """

    examples: Sequence[Example] = ()
    ahead: Ahead | None = None


class CheckpointError(Exception):
    """A checkpoint could not be written; one line, which says what is left."""


class _WriteError(Exception):
    """What kept some rank from writing; raised on all."""


def save_checkpoint(
    run: Run, position: Position, pending: Pending, *, behind: bool = False
) -> Path:
    """Write parameters, optimizer, random states and position; collective.

    The folder appears under its name when everything in it is on the disk, with a manifest that
    was written last; until then an earlier one is as it was.

    Args:
        behind: return when what training goes on to change is copied; the next checkpoint, or
            :func:`finish_checkpoint`, waits for the rest.

    Raises:
        CheckpointError: on all ranks, when one of them cannot write this one, or the one before.
    """
    finish_checkpoint(run)
    final = Path(run.config.output_dir) / f"{PREFIX}{position.step}"
    aside = final.with_name(f".{final.name}{PARTIAL}")
    with _removing_on_error(aside, final):
        _together(lambda: _make_room(run, aside))
    run.writer = writer = Writer(aside, run.host_memory if behind else None)
    _save_state(run.model, writer)
    tensors = _reference_tensors(run.model) if position.references else {}
    _save_rest(run, writer, position, pending, tensors)
    if not behind:
        finish_checkpoint(run)
    return final


def finish_checkpoint(run: Run) -> None:
    """Wait for a checkpoint that is being written, and give it its name; collective.

    Raises:
        CheckpointError: on all ranks, when one of them could not write.
    """
    if run.writer is None:
        return
    writer, run.writer = run.writer, None
    final = _named(writer.folder)
    with _removing_on_error(writer.folder, final):
        writer.wait()
        _agree(writer.problem)
        _together(lambda: _publish(writer.folder, final, run.world_size))
    if dist.get_rank() == 0:
        forget_old(run.config)
    dist.barrier()


@contextlib.contextmanager
def finishing(run: Run) -> Iterator[None]:
    """Leave no checkpoint half-written behind the block.  Behind an error, which the other ranks
    may know nothing of, its files are brought to the disk: whoever resumes gives it its name."""
    try:
        yield
    except BaseException:
        if run.writer is not None:
            run.writer.wait()
        raise
    finish_checkpoint(run)


@contextlib.contextmanager
def _removing_on_error(aside: Path, final: Path) -> Iterator[None]:
    """What some rank cannot write is removed, and raised on all; collective."""
    try:
        yield
    except _WriteError as error:
        if dist.get_rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)
        dist.barrier()
        left = checkpoints(final.parent)
        state = f"{left[-1]} is whole" if left else "there is no earlier one"
        raise CheckpointError(f"{final} could not be written: {error}; {state}") from None


def _together(work: Callable[[], None]) -> None:
    """Do ``work`` on each rank; what the disk refuses to one is raised on all.  Collective."""
    problem = None
    try:
        work()
    except (OSError, SafetensorError) as error:
        problem = reason(error)
    _agree(problem)


def _agree(problem: str | None) -> None:
    found = next((x for x in ranks.gather(problem) if x is not None), None)
    if found is not None:
        raise _WriteError(found)


def _make_room(run: Run, aside: Path) -> None:
    if dist.get_rank() != 0:
        return
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    earlier = checkpoints(aside.parent)
    needed = _bytes_of(earlier[-1]) if earlier else bytes_to_come(run.model)
    free = shutil.disk_usage(aside).free
    if free < needed:
        raise OSError(
            errno.ENOSPC, f"it takes {needed / 2**20:.0f} MiB and {free / 2**20:.0f} MiB are free"
        )


def _bytes_of(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def bytes_to_come(model: TrainedModel) -> int:
    """The first checkpoint's size: weights, and what AdamW keeps of those that are trained."""
    size = 0
    for parameter in model.policy.parameters():
        own = parameter.element_size()
        if parameter.requires_grad:
            masters = 4 if parameter.dtype != torch.float32 or model.zero_stage else 0
            # ZeRO-3 makes the weights of the masters.
            weights = 0 if model.zero_stage == 3 else own
            size += full_shape(parameter).numel() * (weights + masters + 8)
        elif not model.uses_adapter:
            size += full_shape(parameter).numel() * own
    return size


def _save_rest(
    run: Run,
    writer: Writer,
    position: Position,
    pending: Pending,
    reference: dict[str, torch.Tensor],
) -> None:
    """What DeepSpeed does not know of."""
    folder = writer.folder
    state, gauss = _random_state()
    writer.write(
        folder / f"random-{run.rank}.safetensors",
        lambda path: save_file(state, path, metadata={"gauss": gauss}),
    )
    if run.rank == 0:
        with writer.noting():
            position = replace(position, logged=run.tracker.logged)
        if reference:
            writer.write(folder / REFERENCE_FILE, lambda path: save_file(reference, path))
        if pending.examples:
            writer.write(folder / "pending.npz", lambda path: save_examples(path, pending.examples))
        texts = {
            RECIPE: dump_config(run.config),
            "layout.json": json.dumps(
                {"processes": run.world_size, "zero_stage": run.model.zero_stage}
            ),
            "identity.json": json.dumps(run.identity),
            "position.json": json.dumps(asdict(position)),
        }
        if pending.ahead is not None:
            texts["ahead.json"] = json.dumps(asdict(replace(pending.ahead, sampling=None)))
        for name, text in texts.items():
            writer.write(folder / name, partial(Path.write_text, data=text, encoding="utf-8"))
    writer.end(_part(folder, run.rank))


def _part(folder: Path, rank: int) -> Path:
    """The hashes of what a rank has written, all of which is on the disk."""
    return folder / f"manifest-{rank}.json"


def _seal(folder: Path, ranks: int) -> None:
    """Join the hashes of all ranks' files, and add those of files that DeepSpeed copied there."""
    parts = [_part(folder, rank) for rank in range(ranks)]
    hashes = {name: found for part in parts for name, found in _read_json(part).items()}
    for part in parts:
        part.unlink()
    for name in _files(folder):
        if name not in hashes:
            sync(folder / name)
            hashes[name] = hash_file(folder / name)
    files = dict(sorted(hashes.items()))
    text = json.dumps({"files": files, "sha256": _hash_of(files)}, indent=1)
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    sync(folder / MANIFEST)
    for path in (folder, *(p for p in folder.rglob("*") if p.is_dir())):
        sync(path)


def _files(folder: Path) -> list[str]:
    """Names of all files below, the manifest's own left out."""
    names = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return sorted(name for name in names if name != MANIFEST)


def _hash_of(files: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _publish(aside: Path, final: Path, ranks: int | None = None) -> None:
    """Give a whole folder its name, in place of another that may have it; with a manifest, where
    so many ranks have left their hashes."""
    if dist.get_rank() != 0:
        return
    if ranks is not None:
        _seal(aside, ranks)
    old = final.with_name(f".{final.name}{OLD}")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    aside.rename(final)
    sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _named(aside: Path) -> Path:
    """The name for which a folder was written or put aside."""
    return aside.with_name(aside.stem.removeprefix("."))


def save_best(model: TrainedModel, tokenizer: Any, output_dir: str) -> None:
    """The result of now as ``output_dir/best``, which is always a whole one; collective."""
    final = Path(output_dir, "best")
    aside = final.with_name(f".{final.name}{PARTIAL}")
    if dist.get_rank() == 0:
        shutil.rmtree(aside, ignore_errors=True)
    save_result(model, tokenizer, aside)
    try:
        _together(lambda: _publish(aside, final))
    except _WriteError as error:
        raise CheckpointError(f"{final} could not be written: {error}") from None


def find_checkpoint(config: Config) -> tuple[Path | None, list[str]]:
    """The checkpoint that ``resume_from_checkpoint`` means, or None to start afresh; and what to
    tell of newer ones that are damaged.  Collective.

    Raises:
        ConfigError: a named folder is no whole checkpoint, none of several is whole, or a fresh
            run would mix with an old one.
    """
    wanted = config.resume_from_checkpoint
    output_dir = Path(config.output_dir)
    if wanted is False:
        found = [
            *output_dir.glob(f".{PREFIX}*{OLD}"),
            *(p for p in output_dir.glob(f".{PREFIX}*{PARTIAL}") if _ranks_of(p)),
            *checkpoints(output_dir),
        ]
        if found:
            raise ConfigError(
                f"output_dir = {config.output_dir!r} holds {found[-1].name} of an earlier run: "
                "continue it with --resume, or choose another folder"
            )
        return None, []
    if isinstance(wanted, str):
        path = Path(wanted)
        if not (path / MANIFEST).is_file():
            raise ConfigError(f"resume_from_checkpoint = {wanted!r}: no checkpoint there")
        broken = damage(path)
        if broken:
            raise ConfigError(f"resume_from_checkpoint = {wanted!r}: damaged: {broken}")
        return path, []
    if dist.get_rank() == 0:
        _tidy(output_dir)
    dist.barrier()
    skipped: list[str] = []
    for path in reversed(checkpoints(output_dir)):
        broken = damage(path)
        if not broken:
            return path, [f"skipped {line}" for line in skipped]
        skipped.append(f"{path}: damaged: {broken}")
    if skipped:
        raise ConfigError("resume_from_checkpoint: no checkpoint is whole: " + "; ".join(skipped))
    return None, []


def damage(path: Path) -> str:
    """What of a checkpoint is not as it was written, "" where all is; collective."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        files = dict(manifest["files"])
        if manifest["sha256"] != _hash_of(files):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return f"{MANIFEST} is not as it was written"
    foreign = (name for name in _files(path) if name not in files and _IF_THERE.fullmatch(name))
    broken = [f"{name} was not written with it" for name in foreign if dist.get_rank() == 0]
    for name in sorted(files)[dist.get_rank() :: dist.get_world_size()]:
        try:
            if hash_file(path / name) != files[name]:
                broken.append(f"{name} is not as it was written")
        except FileNotFoundError:
            broken.append(f"{name} is missing")
        except (OSError, ValueError) as error:
            broken.append(f"{name}: {getattr(error, 'strerror', None) or error}")
    return ", ".join(sorted(line for part in ranks.gather(broken) for line in part))


def _tidy(output_dir: Path) -> None:
    """Put back a checkpoint that a killed run was about to replace, give one its name that all
    ranks had written, and remove what is none."""
    for old in output_dir.glob(f".{PREFIX}*{OLD}"):
        if _named(old).exists():
            shutil.rmtree(old)
        else:
            old.rename(_named(old))
    for aside in output_dir.glob(f".*{PARTIAL}"):
        ranks = _ranks_of(aside)
        if ranks:
            _publish(aside, _named(aside), ranks)
        else:
            shutil.rmtree(aside)


def _ranks_of(aside: Path) -> int:
    """How many ranks have written a checkpoint that has no name yet; 0: not all of them."""
    try:
        ranks = int(_read_json(aside / "layout.json")["processes"])
    except (OSError, ValueError):
        return 0
    return ranks if all(_part(aside, rank).is_file() for rank in range(ranks)) else 0


def checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoints that were written to their end, oldest first."""
    found = [p for p in output_dir.glob(f"{PREFIX}*") if (p / MANIFEST).is_file()]
    numbered = [p for p in found if re.fullmatch(r"[0-9]{1,18}", p.name.removeprefix(PREFIX))]
    return sorted(numbered, key=lambda p: int(p.name.removeprefix(PREFIX)))


@dataclass(frozen=True)
class Saved:
    """What a checkpoint holds beside tensors."""

    recipe: Config
    layout: dict[str, int]
    identity: dict[str, Any]
    position: Position
    pending: Pending


def read_recipe(path: Path) -> Config:
    """The recipe of a whole checkpoint.

    Raises:
        ConfigError: it is not as this version writes it.
    """
    try:
        recipe = parse_config(read_yaml(path / RECIPE, "recipe"), str(path / RECIPE))
    except ConfigError as error:
        raise ConfigError(f"resume_from_checkpoint: {error}") from None
    if recipe.dtype == "auto":
        raise ConfigError(
            f"resume_from_checkpoint: {path / RECIPE} is not as this version of FastAlign writes "
            "it: dtype = 'auto', where the one that was trained in is wanted (start.json of the "
            "run has it)"
        )
    return recipe


def read_saved(path: Path) -> Saved:
    """What a whole checkpoint holds beside tensors.

    Raises:
        ConfigError: a file is not as this version writes it.
    """
    recipe = read_recipe(path)
    try:
        name = "layout.json"
        layout = {key: int(_read_json(path / name)[key]) for key in ("processes", "zero_stage")}
        name = "identity.json"
        identity = dict(_read_json(path / name))
        name = "position.json"
        position = _position(path)
        name = "pending.npz"
        examples = load_examples(path / name) if (path / name).is_file() else ()
        name = "ahead.json"
        ahead = _ahead(_read_json(path / name)) if (path / name).is_file() else None
    except Exception as error:
        # It is as it was written, so that another version has written it.
        raise ConfigError(
            f"resume_from_checkpoint: {path / name} is not as this version of FastAlign writes it: "
            f"{type(error).__name__}: {error}"
        ) from None
    return Saved(recipe, layout, identity, position, Pending(examples, ahead))


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _ahead(tree: dict[str, Any]) -> Ahead:
    ahead = Ahead(**tree)
    if not all(type(n) is int for n in (ahead.round, ahead.weights_round)) or not isinstance(
        ahead.call, dict
    ):
        raise TypeError("want numbers of rounds and a call")
    return ahead


def load_checkpoint(run: Run, path: Path) -> tuple[Position, Pending]:
    """Put a run back where :func:`save_checkpoint` left it; collective."""
    model = run.model
    saved = read_saved(path)
    _check_same_run(saved.recipe, run.config, path)
    layout = saved.layout
    here = {"processes": dist.get_world_size(), "zero_stage": model.zero_stage}
    if layout["zero_stage"] != model.zero_stage:
        raise ConfigError(
            f"resume_from_checkpoint: {path} was written by {layout['processes']} process(es) at "
            f"ZeRO stage {layout['zero_stage']}, these are {here['processes']} at stage "
            f"{here['zero_stage']}: set zero_stage = {layout['zero_stage']}"
        )
    online = run.config.online
    if layout != here and online is not None and online.fresh_adapter:
        raise ConfigError(
            f"resume_from_checkpoint: {path} was written by {layout['processes']} process(es), "
            f"these are {here['processes']}: online.fresh_adapter needs as many; set "
            f"nproc_per_node = {layout['processes']}"
        )
    # Rank 0 hashed them.
    _check_same_content(saved.identity, ranks.from_first(run.identity), path)
    if layout == here or model.zero_stage == 0:
        _load_state(model, path)
    else:
        run.tracker.say(
            f"{path} was written by {layout['processes']} process(es): it is converted for "
            f"{here['processes']}"
        )
        _load_regrouped(model, path)
    random_state = path / f"random-{run.rank}.safetensors"
    # A rank that there was not has the random numbers of a fresh run.
    if random_state.is_file():
        _restore_random_state(random_state)
    if saved.position.references:
        model.load_reference(load_file(path / REFERENCE_FILE))
    return saved.position, saved.pending


def _check_same_content(saved: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    """Refuse other contents under the names that the recipe has."""
    for key in ("model_hash", "adapter_hash", "data", "method_hash", "judge_hash"):
        name, old, new = _difference(key.removesuffix("_hash"), saved.get(key), now.get(key))
        if old != new:
            raise ConfigError(
                f"resume_from_checkpoint: {path} was made with other contents of {name}: SHA-256 "
                f"{str(old)[:12]} then, {str(new)[:12]} now; put them back or start afresh in "
                "another output_dir"
            )


def save_start(model: TrainedModel, output_dir: str) -> None:
    """Keep what was trained of the start of the run, and its optimizer; collective.

    Raises:
        CheckpointError: on all ranks, when one of them cannot write.
    """
    final = Path(output_dir, START)
    aside = final.with_name(f".{START}{PARTIAL}")
    if dist.get_rank() == 0:
        shutil.rmtree(aside, ignore_errors=True)
    dist.barrier()
    try:
        _together(lambda: aside.mkdir(parents=True, exist_ok=True))
        writer = Writer(aside)
        _save_state(model, writer)
        writer.end(_part(aside, dist.get_rank()))
        _agree(writer.problem)
        _together(lambda: _publish(aside, final, dist.get_world_size()))
    except _WriteError as error:
        raise CheckpointError(f"{final} could not be written: {error}") from None


def load_start(model: TrainedModel, output_dir: str) -> None:
    """Put what is trained, and its optimizer, back to the start of the run; collective.

    Raises:
        ConfigError: the folder is gone, or is not as it was written.
    """
    path = Path(output_dir, START)
    if not path.is_dir():
        raise ConfigError(f"online.fresh_adapter: {path} with the start of the run is missing")
    broken = damage(path)
    if broken:
        raise ConfigError(f"online.fresh_adapter: {path} is damaged: {broken}")
    _load_state(model, path)


class _Files(TorchCheckpointEngine):
    """How DeepSpeed reads and writes a file: by a writer, for what the disk refuses is kept until
    all ranks can be told, who wait for each other; of what is read nothing is executed."""

    def __init__(self, writer: Writer | None = None) -> None:
        super().__init__()
        self._writer = writer

    def save(self, state_dict: Any, path: str) -> None:
        assert self._writer is not None
        self._writer.write_state(Path(path), state_dict)

    def load(self, path: str, map_location: Any = None) -> Any:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
            return torch.load(path, map_location=map_location, weights_only=True)


@contextlib.contextmanager
def _our_files(model: TrainedModel, writer: Writer | None = None) -> Iterator[None]:
    theirs = model.engine.checkpoint_engine
    model.engine.checkpoint_engine = _Files(writer)
    try:
        yield
    finally:
        model.engine.checkpoint_engine = theirs


def _save_state(model: TrainedModel, writer: Writer) -> None:
    with _our_files(model, writer):
        try:
            model.engine.save_checkpoint(
                str(writer.folder),
                tag="state",
                save_latest=False,
                exclude_frozen_parameters=model.uses_adapter,
            )
        except OSError as error:
            # Rank 0, about a script that DeepSpeed puts beside its files while others wait.
            writer.problem = reason(error)
            dist.barrier()


def _reference_tensors(model: TrainedModel) -> dict[str, torch.Tensor]:
    """Of rank 0; collective."""
    tensors = {}
    for name, tensor in model.iter_reference():
        if dist.get_rank() == 0:
            tensors[name] = tensor.cpu().clone()
    return tensors


def _load_state(model: TrainedModel, folder: Path) -> None:
    with _our_files(model):
        loaded, _ = model.engine.load_checkpoint(
            str(folder), tag="state", load_module_strict=not model.uses_adapter
        )
    if loaded is None:
        raise ConfigError(f"{folder}: DeepSpeed could not load its part of the checkpoint")


def _load_regrouped(model: TrainedModel, path: Path) -> None:
    """Load what another number of ranks has written, through DeepSpeed's universal checkpoint,
    which is made beside it for the time of loading; collective.

    DeepSpeed's converter unpickles its own files, whose hashes have been compared before.
    """
    folder = path.with_name(f".{path.name}.universal{PARTIAL}")
    try:
        _together(lambda: _convert(path / "state", folder / "state"))
    except _WriteError as error:
        raise CheckpointError(f"{path} could not be converted: {error}") from None
    groups = [{k: v for k, v in g.items() if k != "params"} for g in model.optimizer.param_groups]
    settings = model.engine._config
    settings.load_universal_checkpoint = True
    try:
        _load_state(model, folder)
    finally:
        settings.load_universal_checkpoint = False
    # DeepSpeed 0.19 gives all groups the settings of the first and, at stage 3, one step counter.
    for group, before in zip(model.optimizer.param_groups, groups, strict=True):
        group.update(before)
    for state in model.optimizer.state.values():
        state["step"] = torch.as_tensor(state["step"], dtype=torch.float32).clone()
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder)


def _convert(source: Path, target: Path) -> None:
    if dist.get_rank() != 0:
        return
    from deepspeed.checkpoint import ds_to_universal

    shutil.rmtree(target.parent, ignore_errors=True)
    target.mkdir(parents=True)
    options = argparse.Namespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    # Its progress is nobody's standard output.
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        ds_to_universal.main(options)


# What may differ between a run and its continuation without changing what is computed.
_FREE = {
    "output_dir", "resume_from_checkpoint", "logging_steps", "save_steps", "save_total_limit",
    "eval_steps", "report_to", "early_stopping_patience", "eval_judge", "declared_licenses",
    "max_skipped_steps",
    "async_save", "nproc_per_node", "judge_datasets", "profile",
}  # fmt: skip
# Of a judge's endpoint: how it is asked and paid, not what it says.
_FREE_ENDPOINT = {
    "api_key_env", "max_concurrency", "max_retries", "timeout_s", "input_cost_per_million",
    "output_cost_per_million", "max_cost", "max_requests",
}  # fmt: skip
# Of an engine: how it is reached, and how long it is waited for.
_FREE_ROLLOUT = {"timeout_s": True, "server": {"port", "start_timeout_s"}}


def _check_same_run(saved: Config, config: Config, path: Path) -> None:
    free: Any = {"judge": {"endpoint": _FREE_ENDPOINT}, "rollout": _FREE_ROLLOUT}
    before, now = (c.model_dump(mode="json", by_alias=True, exclude=free) for c in (saved, config))
    for tree in (before, now):
        # Wherever a file of code lies, its content is compared.
        tree["method"] = base_name(tree["method"])
        if tree["judge"] and tree["judge"]["path"]:
            tree["judge"]["path"] = base_name(tree["judge"]["path"])
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
    try:
        first = _position(found[-config.save_total_limit :][0]).round
    except (OSError, ValueError, TypeError):
        # Damaged: where it would go on is not known.
        return
    forget_journals(config.output_dir, first)


def _position(path: Path) -> Position:
    """
    Raises:
        OSError, ValueError, TypeError: it is not as it was written.
    """
    position = Position(**_read_json(path / "position.json"))
    for name, value in vars(position).items():
        usual = getattr(Position(), name)
        if usual is None:
            right = value is None or type(value) is float
        else:
            right = type(value) is type(usual) and value >= 0
        if not right:
            raise ValueError(f"{name} = {value!r}")
    return position


def _random_state() -> tuple[dict[str, torch.Tensor], str]:
    """Of the generators, and what of one is no tensor."""
    version, internal, gauss = random.getstate()
    tensors = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *internal], dtype=torch.int64),
    }
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    return tensors, json.dumps(gauss)


def _restore_random_state(path: Path) -> None:
    with safe_open(path, "pt") as file:
        gauss = json.loads(file.metadata()["gauss"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    torch.set_rng_state(tensors["torch"])
    version, *internal = tensors["python"].tolist()
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"])


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
            metadata = {"format": "pt"}
            if model.config.load_in_4bit:
                metadata[BASE_KEY] = NF4
            save_file(tensors, folder / "adapter_model.safetensors", metadata=metadata)
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
