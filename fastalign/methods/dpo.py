"""Direct preference optimisation and its kin, offline and on-policy (SELF-JUDGE, arXiv
2402.11253, section 3.2, when the judge is the model itself)."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from fastalign import losses
from fastalign.batch import Batch
from fastalign.data import Example, Kind, Record, Stream
from fastalign.episodes import Episode
from fastalign.methods.base import (
    BaseMethod,
    Dropped,
    JudgeKind,
    Metrics,
    as_sampled,
    rejected_as_sampled,
    total,
)
from fastalign.templates import Renderer


class Preferences(BaseMethod):
    """A pair makes two streams over one prompt, ``chosen`` then ``rejected``: in a pack of R pairs
    the streams 2 r and 2 r + 1.  A method on it says what is lost on them.

    Online a judge compares the samples of a prompt.
    """

    wants: Kind | tuple[Kind, ...] = "preference"
    online_wants: Kind | None = "prompt"
    judge_kind: JudgeKind | None = "pairwise"

    def from_record(self, record: Record, renderer: Renderer) -> list[Example]:
        assert record.chosen is not None and record.rejected is not None
        sampled, rejected_ids = as_sampled(record, renderer), rejected_as_sampled(record, renderer)
        prompt_ids, chosen_ids = sampled or renderer.completion(
            record.prompt, record.chosen, tools=record.tools, source=record.source
        )
        if rejected_ids is None:
            _, rejected_ids = renderer.completion(
                record.prompt, record.rejected, tools=record.tools, source=record.source
            )
        return [self.pair(prompt_ids, chosen_ids, rejected_ids, record.weight, record.source)]

    def choose(self, episode: Episode) -> Episode:
        """Best against worst by wins, or every decided pair (``online.pairs``); none where the
        judge abstained between those two or preferred the other way round."""
        assert self.config.online is not None
        if self.config.online.pairs == "all":
            return replace(episode, pairs=tuple(episode.preferences()))
        points = episode.points()
        pair = int(points.argmax()), int(points.argmin())
        return replace(episode, pairs=(pair,) if pair in episode.preferences() else ())

    def examples_per_prompt(self, samples: int) -> int:
        assert self.config.online is not None
        return samples * (samples - 1) // 2 if self.config.online.pairs == "all" else 1

    def from_episode(self, episode: Episode, renderer: Renderer) -> list[Example]:
        examples = []
        for pair in episode.pairs:
            chosen, rejected = (episode.rollouts[i].token_ids for i in pair)
            # An empty answer, or two that are the same as far as they fit.
            with contextlib.suppress(Dropped):
                examples.append(
                    self.pair(episode.prompt_ids, chosen, rejected, episode.weight, episode.source)
                )
        return examples

    def pair(
        self,
        prompt_ids: np.ndarray,
        chosen_ids: np.ndarray,
        rejected_ids: np.ndarray,
        weight: float,
        source: str,
    ) -> Example:
        """Both answers behind the prompt, int32 [P], [C], [C']; raises :class:`Dropped`."""
        chosen = self.fit(prompt_ids, chosen_ids)
        rejected = self.fit(prompt_ids, rejected_ids)
        if np.array_equal(chosen, rejected):
            raise Dropped("chosen and rejected are the same within max_length")
        return Example(
            streams=(
                Stream.of("chosen", prompt_ids, chosen),
                Stream.of("rejected", prompt_ids, rejected),
            ),
            weight=weight,
            source=source,
        )

    def denominator(self, examples: Sequence[Example]) -> float:
        # The loss of a pair is a number of its own, whatever its length.
        return float(len(examples))


class Dpo(Preferences):
    """The margin between the answers of a pair is compared with the reference's."""

    needs_reference = True

    def loss(
        self,
        logprob: torch.Tensor,
        log1m_prob: torch.Tensor,
        batch: Batch,
        *,
        reference: torch.Tensor | None,
        progress: float,
    ) -> tuple[torch.Tensor, Metrics]:
        assert reference is not None
        # A pack's sequences are the answers in the order of the op: each pair's chosen one first.
        result = losses.dpo_loss(
            logprob,
            reference,
            batch.cu_rows,
            beta=self.config.beta,
            loss_type=self.config.loss_type,
            label_smoothing=self.config.label_smoothing,
            length_normalized=self.config.loss_type == "ipo",
        )
        live = batch.weights > 0
        margins = (result.rewards_chosen - result.rewards_rejected)[live]
        metrics = {
            "rewards/chosen": total(result.rewards_chosen[live]),
            "rewards/rejected": total(result.rewards_rejected[live]),
            "rewards/margins": total(margins),
            "rewards/accuracies": total((margins > 0).double()),
            "logps/chosen": total(result.logps_chosen[live]),
            "logps/rejected": total(result.logps_rejected[live]),
        }
        return (result.losses * batch.weights).sum(), metrics
