"""What the parts of one run share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from fastalign.config import Config
from fastalign.data import Record
from fastalign.endpoint import Endpoint
from fastalign.judge import JudgeModel
from fastalign.methods import Method, Metrics
from fastalign.model import TrainedModel
from fastalign.preemption import Stop
from fastalign.rollout import Rollout, RolloutEngine
from fastalign.rollout.engine import SyncReport
from fastalign.templates import Renderer
from fastalign.timeline import Operations
from fastalign.tracking import Tracker
from fastalign.writer import HostMemory, Writer


@dataclass(frozen=True)
class Sampled:
    """What a thread beside the training drew, and how long that took."""

    rollouts: list[Rollout]
    seconds: float


@dataclass(frozen=True)
class Ahead:
    """A round whose rollouts were asked for before its turn, as a checkpoint keeps it.

    Attributes:
        round: which.
        weights_round: the round at the start of which the policy had the weights that sample it.
        call: what decides what is sampled beside prompts and seeds: the key of the journal.
        sampling: in this process; None: it was before the run was resumed.
    """

    round: int
    weights_round: int
    call: Mapping[str, Any]
    sampling: Future[Sampled] | None = None


@dataclass(frozen=True)
class Choice:
    """What was chosen for the user, and why."""

    value: str
    why: str = ""


@dataclass
class Run:
    """What the steps of a run share.

    ``identity``: hashes of what goes into the run, on rank 0;
    ``version``: of the policy's weights: the updates that made them;
    ``asked``: the server or the model beside the policy that judges, by the recipe's section;
    ``judge_pairs``: what that judge is measured on, and ``judge_measured`` its version when it was;
    ``reference_pushed``: which version of the reference adapter the engine holds;
    ``synced``: of the policy's weights, or of its adapter, that it was given last, None where it
    holds others by now;
    ``ahead``: the round that was sampled last before its turn;
    ``writer``: of the checkpoint that is being written, and ``host_memory`` what it is copied to;
    ``chosen``: by name, what the recipe left open or only the start-up could tell.
    """

    config: Config
    method: Method
    tokenizer: PreTrainedTokenizerBase
    model: TrainedModel
    engine: RolloutEngine | None
    renderers: list[Renderer]
    tracker: Tracker
    rank: int
    world_size: int
    asked: Mapping[str, Endpoint | JudgeModel] = field(default_factory=dict)
    judge_pairs: Sequence[Record] = ()
    stop: Stop = field(default_factory=Stop)
    identity: Mapping[str, Any] = field(default_factory=dict)
    version: int = 0
    synced: SyncReport | None = None
    frozen_logprobs: dict[str | None, np.ndarray] = field(default_factory=dict)
    reference_pushed: int | None = None
    judge_measured: int | None = None
    ahead: Ahead | None = None
    writer: Writer | None = None
    host_memory: HostMemory = field(default_factory=HostMemory)
    chosen: dict[str, Choice] = field(default_factory=dict)

    def choose(self, name: str, choice: Choice) -> None:
        """Note and tell what was chosen."""
        self.chosen[name] = choice
        self.tracker.chosen(name, choice.value, choice.why)

    @cached_property
    def operations(self) -> Operations:
        return Operations(self.model.policy)


def on_any_rank(*flags: bool) -> list[bool]:
    """Which of the flags are up on some rank; collective."""
    table = torch.tensor(flags, dtype=torch.int32)
    if dist.get_world_size() > 1:
        dist.all_reduce(table, dist.ReduceOp.MAX)
    return [bool(flag) for flag in table]


def reduce_metrics(sums: Metrics) -> dict[str, float]:
    """Sum over ranks, then divide: exact means over the whole batch.  Empty ones are left out."""
    names = sorted(sums)
    table = torch.stack([sums[name].double() for name in names])
    if dist.get_world_size() > 1:
        dist.all_reduce(table)
    return {
        name: (value / count).item()
        for name, (value, count) in zip(names, table, strict=True)
        if count != 0
    }
