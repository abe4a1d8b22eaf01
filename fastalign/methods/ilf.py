"""Imitation learning from language feedback: the model improves an answer by its judgment and
learns the result (baselines of arXiv 2312.14591; ILF is arXiv 2303.16755)."""

from __future__ import annotations

import numpy as np

from fastalign.data import Example, Kind, Record
from fastalign.episodes import Episode
from fastalign.methods.base import BaseMethod, Dropped, JudgeKind
from fastalign.methods.dpo import Dpo
from fastalign.methods.sft import Sft
from fastalign.templates import Renderer


class Refining(BaseMethod):
    """Rollouts of the current model refine the answers of judged records: y' ~ p(. | x, y, j),
    equation 2 of arXiv 2312.14591.  Nobody judges them.

    Equation 2 needs a judgment and the losses are about y' alone, so a record without one is left
    out, and so is a refinement that is empty or y itself.  The paper takes one refinement of each
    record; arXiv 2303.16755 samples several and chooses, which is not done here either.
    """

    wants: Kind | tuple[Kind, ...] = ()
    online_wants: Kind | None = "judged"
    judge_kind: JudgeKind | None = None

    def examples_per_prompt(self, samples: int) -> int:
        return samples

    def rollout_prompt(self, record: Record, renderer: Renderer) -> np.ndarray:
        assert record.completion is not None
        if record.judgment is None:
            raise Dropped("judgment: none to refine the answer by")
        return renderer.refine_prompt_ids(
            record.prompt, record.completion, record.judgment, tools=record.tools
        )


class IlfMle(Refining, Sft):
    """-mean log p(y' | x), equation 3 of arXiv 2312.14591: SFT on the refinements, after the plain
    prompt."""

    def from_episode(self, episode: Episode, renderer: Renderer) -> list[Example]:
        return self.sampled(episode, episode.refinements())


class IlfDpo(Refining, Dpo):
    """DPO(x, y' over y) of arXiv 2312.14591, section 3.2: the refinement is preferred to the
    answer that it refines, after the plain prompt."""

    def rollout_prompt(self, record: Record, renderer: Renderer) -> np.ndarray:
        assert record.completion is not None
        # An answer that cannot stand in a pair is refused here, before anything is sampled.
        renderer.completion(
            record.prompt, record.completion, tools=record.tools, source=record.source
        )
        return super().rollout_prompt(record, renderer)

    def from_episode(self, episode: Episode, renderer: Renderer) -> list[Example]:
        assert episode.completion is not None
        _, original_ids = renderer.completion(
            episode.prompt, episode.completion, tools=episode.tools, source=episode.source
        )
        examples = []
        for rollout in episode.refinements():
            try:
                examples.append(
                    self.pair(
                        episode.prompt_ids,
                        rollout.token_ids,
                        original_ids,
                        episode.weight,
                        episode.source,
                    )
                )
            except Dropped:
                # The same as far as they fit.
                continue
        return examples
