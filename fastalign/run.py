"""What the parts of one run share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

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
from fastalign.rollout import RolloutEngine
from fastalign.rollout.engine import SyncReport
from fastalign.templates import Renderer
from fastalign.timeline import Operations
from fastalign.tracking import Tracker


@dataclass
class Run:
    """What the steps of a run share.

    ``asked``: the server or the model beside the policy that judges, by the recipe's section;
    ``judge_pairs``: what that judge is measured on, and ``judge_measured`` its version when it was;
    ``reference_pushed``: which version of the reference adapter the engine holds;
    ``synced``: of the policy's weights, or of its adapter, that it was given last.
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
    version: int = 0
    synced: SyncReport | None = None
    frozen_logprobs: dict[str | None, np.ndarray] = field(default_factory=dict)
    reference_pushed: int | None = None
    judge_measured: int | None = None

    @cached_property
    def operations(self) -> Operations:
        return Operations(self.model.policy)


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
