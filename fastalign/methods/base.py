"""What a method is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from pydantic import BaseModel, ValidationError

from fastalign.batch import Batch
from fastalign.config import Config, ConfigError, Strict, explain
from fastalign.data import Example, Kind, Record, Sampled, Stream
from fastalign.episodes import Episode
from fastalign.plugins import base_name
from fastalign.templates import Renderer, fit, fit_stream

JudgeKind = Literal["written", "pairwise"]

# Name -> [sum, count], summed over packs and ranks before it is divided: every rank returns the
# same names, and no metric depends on how a batch was cut.
Metrics = dict[str, torch.Tensor]


class Dropped(Exception):
    """A record that cannot be trained on, or not on all of it; the message is the reason that is
    counted, ``kept`` what remains."""

    def __init__(self, reason: str, kept: Sequence[Example] = ()) -> None:
        super().__init__(reason)
        self.kept = kept


class Method(Protocol):
    """One training method.

    Attributes:
        wants: kinds of record it reads offline, the best first; empty when it has no offline form.
        online_wants: kind of record whose prompts it samples from, or None when it has no online
            form.
        judge_kind: who judges its rollouts, or None when nobody does.
        compares: which of its rollouts a pairwise judge compares: all with each other, or those
            that meet in a knockout tournament.
        needs_reference: whether the loss compares with the frozen start of the run.
        truncated: how many answers it has cut at ``max_length``.
    """

    @property
    def wants(self) -> Kind | tuple[Kind, ...]: ...

    @property
    def online_wants(self) -> Kind | None: ...

    @property
    def judge_kind(self) -> JudgeKind | None: ...

    @property
    def compares(self) -> Literal["all", "tournament"]: ...

    @property
    def needs_reference(self) -> bool: ...

    @property
    def truncated(self) -> int: ...

    def from_record(self, record: Record, renderer: Renderer) -> list[Example]:
        """Streams of one row of a dataset; raises :class:`Dropped`."""

    def rollout_prompt(self, record: Record, renderer: Renderer) -> np.ndarray:
        """What its rollouts continue, int32 [P]; raises :class:`Dropped`."""

    def choose(self, episode: Episode) -> Episode:
        """The episode with its ``pairs`` or ``kept`` set, from what the judge said of it."""

    def examples_per_prompt(self, samples: int) -> int:
        """The most examples that so many samples of one prompt make."""

    def from_episode(self, episode: Episode, renderer: Renderer) -> list[Example]:
        """Streams of the rollouts of one record, with their tokens as they were sampled."""

    def select(self, examples: list[Example], seed: int) -> list[Example]:
        """What is trained on of a collected set (downsampling); default: everything."""

    def denominator(self, examples: Sequence[Example]) -> float:
        """What the summed loss of a global batch is divided by."""

    def loss(
        self,
        logprob: torch.Tensor,
        log1m_prob: torch.Tensor,
        batch: Batch,
        *,
        reference: torch.Tensor | None,
        progress: float,
    ) -> tuple[torch.Tensor, Metrics]:
        """Loss summed over the pack's records, and metrics as sums and counts.

        logprob, log1m_prob: [M], rows of the pack; reference: [M] or None; progress: share of
        the run that is done.
        """


def plain_prompt(record: Record, renderer: Renderer) -> np.ndarray:
    """The prompt of a record as it is answered, int32 [P]."""
    return renderer.prompt_ids(record.prompt, tools=record.tools)


class MethodSettings(Strict):
    """What a method of one's own reads from ``method_config``; no other keys than its fields."""


class BaseMethod:
    """Shared parts; not a framework, only what every method would repeat.

    Attributes:
        Settings: what ``method_config`` may have; without fields, nothing.
        settings: it, as the recipe has it.
    """

    Settings: ClassVar[type[BaseModel]] = MethodSettings
    wants: Kind | tuple[Kind, ...] = "completion"
    online_wants: Kind | None = None
    judge_kind: JudgeKind | None = None
    compares: Literal["all", "tournament"] = "all"
    needs_reference = False

    def __init__(self, config: Config) -> None:
        self.config = config
        self.settings: Any = read_settings(type(self), config)
        self.truncated = 0
        name = f"method = {config.method!r}"
        if config.online is None:
            if not self.wants:
                raise ConfigError(f"{name} learns from its own rollouts alone: add 'online'")
        elif self.online_wants is None:
            raise ConfigError(f"{name} has no online form: remove 'online'")
        elif self.judge_kind is None and config.judge is not None:
            raise ConfigError(f"{name} asks nobody to judge its rollouts: remove 'judge'")
        elif self.judge_kind is not None and config.judge is None:
            raise ConfigError(
                f"judge is missing: online training with {name} needs someone who judges"
            )
        elif self.judge_kind == "pairwise" and config.online.num_generations < 2:
            raise ConfigError(
                f"online.num_generations is {config.online.num_generations}: {name} compares "
                "answers and needs at least 2 samples per prompt"
            )
        if config.judge_datasets and (config.online is None or self.judge_kind != "pairwise"):
            raise ConfigError(
                f"judge_datasets is set, but {name} has no judge that compares answers here: "
                "remove it"
            )

    def rollout_prompt(self, record: Record, renderer: Renderer) -> np.ndarray:
        return plain_prompt(record, renderer)

    def choose(self, episode: Episode) -> Episode:
        return episode

    def examples_per_prompt(self, samples: int) -> int:
        return samples

    def from_episode(self, episode: Episode, renderer: Renderer) -> list[Example]:
        raise AssertionError(f"{type(self).__name__} has no online form")

    def select(self, examples: list[Example], seed: int) -> list[Example]:
        return examples

    def denominator(self, examples: Sequence[Example]) -> float:
        if self.config.normalization == "record":
            return float(len(examples))
        return float(sum(int(e.streams[0].loss_mask.sum()) for e in examples))

    def answer(self, record: Record, renderer: Renderer) -> tuple[np.ndarray, np.ndarray]:
        """(prompt ids, completion ids): as sampled where the record says so and it still holds,
        else tokenised."""
        assert record.completion is not None
        ids = as_sampled(record, renderer)
        if ids is not None:
            return ids
        return renderer.completion(
            record.prompt, record.completion, tools=record.tools, source=record.source
        )

    def conversation(self, record: Record, renderer: Renderer) -> Stream:
        """A dialogue, every assistant turn of which is a target unless it says otherwise."""
        stream = renderer.conversation(record.messages, tools=record.tools, source=record.source)
        fitted = fit_stream(stream, self.config.max_length)
        if isinstance(fitted, str):
            raise Dropped(fitted)
        self.truncated += len(fitted) < len(stream)
        return fitted

    def fit(self, prompt_ids: np.ndarray, completion_ids: np.ndarray) -> np.ndarray:
        """Cut the completion to ``max_length``; a prompt that leaves no room drops the record."""
        fitted = fit(prompt_ids, completion_ids, self.config.max_length)
        if isinstance(fitted, str):
            raise Dropped(fitted)
        self.truncated += len(fitted) < len(completion_ids)
        return fitted


def read_settings(method: type[BaseMethod], config: Config) -> BaseModel:
    """``method_config`` as the method's ``Settings``.

    Raises:
        ConfigError: a key that these do not have, or a value that they do not take.
    """
    try:
        return method.Settings.model_validate(config.method_config)
    except ValidationError as error:
        what = base_name(config.method)
        raise ConfigError(
            explain(error.errors(), method.Settings, below="method_config", what=what)
        ) from None


def role_mean(values: torch.Tensor, batch: Batch, *roles: str) -> torch.Tensor:
    """[sum, count] of values [M] over the tokens of sequences with one of ``roles`` (default: any)
    in records that count."""
    chosen = [not roles or role in roles for role in batch.roles]
    sequences = torch.tensor(chosen, device=values.device) & (batch.weights > 0)[batch.records]
    return total(values[sequences[batch.streams]])


def as_sampled(record: Record, renderer: Renderer) -> tuple[np.ndarray, np.ndarray] | None:
    """(prompt ids, completion ids) as recorded, int32 [P] and [C], of a pair those of its chosen
    answer; or None where nothing is or where they are not the record's any more: another template
    or tokenizer, a corrected text.

    Raises:
        RowError: the template cannot show the prompt.
    """
    text = record.chosen if record.kind == "preference" else record.completion
    return _as_recorded(record.sampled, text, record, renderer)


def rejected_as_sampled(record: Record, renderer: Renderer) -> np.ndarray | None:
    """The ids of a pair's rejected answer, int32 [C]; see :func:`as_sampled`."""
    found = _as_recorded(record.sampled_rejected, record.rejected, record, renderer)
    return None if found is None else found[1]


def _as_recorded(
    sampled: Sampled | None, text: str | None, record: Record, renderer: Renderer
) -> tuple[np.ndarray, np.ndarray] | None:
    if sampled is None:
        return None
    prompt_ids = renderer.prompt_ids(record.prompt, tools=record.tools)
    ids = np.asarray(sampled.token_ids, np.int32)
    if not np.array_equal(prompt_ids, sampled.prompt_ids) or not len(ids):
        return None
    known = ids.max() < len(renderer.tokenizer)
    return (prompt_ids, ids) if known and renderer.decode(ids) == text else None


def total(values: torch.Tensor, count: torch.Tensor | float | None = None) -> torch.Tensor:
    """[sum, count] of a metric; the count defaults to the number of values."""
    values = values.detach().double()
    if count is None:
        count = float(values.numel())
    return torch.stack(
        [values.sum(), torch.as_tensor(count, dtype=values.dtype, device=values.device)]
    )
