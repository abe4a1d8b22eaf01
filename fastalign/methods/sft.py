"""Supervised fine-tuning, and unlikelihood on every token (baselines of METHODS of both papers)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch

from fastalign import losses
from fastalign.batch import Batch
from fastalign.data import Example, Kind, Record, Stream
from fastalign.episodes import Episode
from fastalign.methods.base import BaseMethod, Dropped, JudgeKind, Metrics, role_mean
from fastalign.rollout import Rollout
from fastalign.templates import Renderer


class Demonstrations(BaseMethod):
    """A row makes one stream, of its answer or of a dialogue's; a method on it says what is lost
    on that.  Online they are the rollouts that a judge finds fine."""

    wants: Kind | tuple[Kind, ...] = ("completion", "messages")
    online_wants: Kind | None = "prompt"
    judge_kind: JudgeKind | None = "written"

    def from_record(self, record: Record, renderer: Renderer) -> list[Example]:
        if record.kind == "messages":
            streams = (self.conversation(record, renderer),)
        else:
            prompt_ids, completion_ids = self.answer(record, renderer)
            completion_ids = self.fit(prompt_ids, completion_ids)
            streams = (Stream.of("demonstration", prompt_ids, completion_ids),)
        return [Example(streams=streams, weight=record.weight, source=record.source)]

    def from_episode(self, episode: Episode, renderer: Renderer) -> list[Example]:
        fine = [rollout for rollout, judgment in episode.judged() if judgment is None]
        return self.sampled(episode, fine)

    def sampled(self, episode: Episode, rollouts: Sequence[Rollout]) -> list[Example]:
        """Rollouts as demonstrations, with their tokens as they were sampled."""
        examples = []
        for rollout in rollouts:
            try:
                completion_ids = self.fit(episode.prompt_ids, rollout.token_ids)
            except Dropped:
                # Sampled empty, or behind a prompt that leaves no room.
                continue
            stream = Stream.of("demonstration", episode.prompt_ids, completion_ids)
            examples.append(Example((stream,), episode.weight, episode.source))
        return examples


class Likelihood(BaseMethod):
    """-mean log p of each stream's targets; its methods differ in the streams that they make.

    Attributes:
        logged: token means of -log p that are logged: name -> roles of the streams, none for all.
    """

    logged: ClassVar[Mapping[str, tuple[str, ...]]] = {"nll": ()}

    def parts(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Bounds [P + 1] and weights [P] of the rows that one mean is over: those of a stream."""
        return batch.cu_rows.long(), batch.weights[batch.records]

    def loss(
        self,
        logprob: torch.Tensor,
        log1m_prob: torch.Tensor,
        batch: Batch,
        *,
        reference: torch.Tensor | None,
        progress: float,
    ) -> tuple[torch.Tensor, Metrics]:
        bounds, weights = self.parts(batch)
        loss = losses.nll_loss(logprob, bounds, weights, normalization=self.config.normalization)
        metrics = {name: role_mean(-logprob, batch, *r) for name, r in self.logged.items()}
        return loss, metrics


class Sft(Demonstrations, Likelihood):
    """-mean log p of the answer.  Online it keeps the rollouts that a judge finds fine."""


class Unlikelihood(Sft):
    """-mean log(1 - p) on every token of the answer, the blunt form CUT is measured against.

    Of judged rows it takes those that a judgment criticises; rows without judgments are all meant.
    """

    wants = ("judged", "completion", "messages")
    online_wants = None
    judge_kind = None

    def from_record(self, record: Record, renderer: Renderer) -> list[Example]:
        if record.kind == "judged" and not record.is_negative:
            raise Dropped("the answer is fine")
        return super().from_record(record, renderer)

    def loss(
        self,
        logprob: torch.Tensor,
        log1m_prob: torch.Tensor,
        batch: Batch,
        *,
        reference: torch.Tensor | None,
        progress: float,
    ) -> tuple[torch.Tensor, Metrics]:
        loss = losses.unlikelihood_loss(
            log1m_prob,
            batch.cu_rows.long(),
            batch.weights,
            normalization=self.config.normalization,
        )
        return loss, {"nll": role_mean(-logprob, batch)}
