"""Contrastive unlikelihood training (CUT, arXiv 2312.14591), offline and online."""

from __future__ import annotations

import numpy as np
import torch

from fastalign import losses
from fastalign.batch import Batch
from fastalign.config import Config
from fastalign.data import Example, Kind, Record, Stream
from fastalign.episodes import Episode
from fastalign.methods.base import BaseMethod, Dropped, JudgeKind, Metrics, as_sampled, total
from fastalign.templates import Renderer

# A ratio of probabilities that every pair of log-probs of a model exceeds.
EVERY_TOKEN = 1e-300


class Judgments(BaseMethod):
    """A negative record makes two streams with the same answer, ``plain``, which hides the
    judgment, and ``judged``, which shows it; a positive record makes the first alone.  A method on
    it says what is lost on them."""

    wants: Kind | tuple[Kind, ...] = "judged"
    online_wants: Kind | None = "prompt"
    judge_kind: JudgeKind | None = "written"

    def from_record(self, record: Record, renderer: Renderer) -> list[Example]:
        judged_prompt_ids = None
        sampled = as_sampled(record, renderer)
        if record.judgment is None:
            prompt_ids, completion_ids = sampled or self.answer(record, renderer)
        elif sampled is not None:
            prompt_ids, completion_ids = sampled
            judged_prompt_ids = renderer.judged_prompt_ids(
                record.prompt, record.judgment, tools=record.tools
            )
        else:
            assert record.completion is not None
            prompt_ids, judged_prompt_ids, completion_ids = renderer.judged_completion(
                record.prompt, record.completion, record.judgment, record.tools, record.source
            )
        return [
            self._example(
                prompt_ids, judged_prompt_ids, completion_ids, record.weight, record.source
            )
        ]

    def from_episode(self, episode: Episode, renderer: Renderer) -> list[Example]:
        examples = []
        for rollout, judgment in episode.judged():
            judged = None
            if judgment is not None:
                judged = renderer.judged_prompt_ids(episode.prompt, judgment, tools=episode.tools)
            try:
                examples.append(
                    self._example(
                        episode.prompt_ids,
                        judged,
                        rollout.token_ids,
                        episode.weight,
                        episode.source,
                    )
                )
            except Dropped:
                # An empty answer teaches nothing; the judge's count of it stays in the log.
                continue
        return examples

    def _example(
        self,
        prompt_ids: np.ndarray,
        judged_prompt_ids: np.ndarray | None,
        completion_ids: np.ndarray,
        weight: float,
        source: str,
    ) -> Example:
        # Both streams carry the same answer, so the longer prompt decides how much of it fits.
        longer = prompt_ids
        if judged_prompt_ids is not None and len(judged_prompt_ids) > len(prompt_ids):
            longer = judged_prompt_ids
        completion_ids = self.fit(longer, completion_ids)
        streams = [Stream.of("plain", prompt_ids, completion_ids)]
        if judged_prompt_ids is not None:
            streams.append(Stream.of("judged", judged_prompt_ids, completion_ids))
        return Example(streams=tuple(streams), weight=weight, source=source)


class Cut(Judgments):
    """What a judgment makes less probable is pushed down without it."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.gamma, self.negative_weight = losses.cut_preset(config.cut.preset, config.cut.gamma)

    def select(self, examples: list[Example], seed: int) -> list[Example]:
        """Downsample the positives to ``positive_ratio`` times the negatives."""
        ratio = self.config.cut.positive_ratio
        if ratio is None:
            return examples
        positive = [i for i, e in enumerate(examples) if len(e.streams) == 1]
        keep = round(ratio * (len(examples) - len(positive)))
        if keep >= len(positive):
            return examples
        kept = set(np.random.default_rng(seed).choice(positive, size=keep, replace=False).tolist())
        dropped = set(positive) - kept
        return [e for i, e in enumerate(examples) if i not in dropped]

    def contrast(
        self,
        logprob: torch.Tensor,
        log1m_prob: torch.Tensor,
        batch: Batch,
        *,
        misalign: bool = True,
    ) -> tuple[losses.CutLoss, torch.Tensor]:
        """The loss of a pack with what it is made of, and which of its R records are negative,
        bool [R].  Its ``flagged`` are the tokens of the plain streams, in the pack's order."""
        cut = self.config.cut
        plain, cu_plain, _ = batch.select("plain")
        judged, cu_judged, judged_records = batch.select("judged")
        lengths = torch.zeros(len(batch.weights), dtype=torch.int64, device=logprob.device)
        lengths[judged_records] = cu_judged.diff()
        # A record at weight 0 adds nothing, and is still one of the batch.
        weights = batch.weights if cut.align_p else batch.weights * (lengths > 0)
        judged_logprob = logprob[judged] if cut.align_n else logprob[judged].detach()
        result = losses.cut_loss(
            logprob[plain],
            log1m_prob[plain],
            judged_logprob,
            cu_plain,
            torch.nn.functional.pad(lengths.cumsum(0), (1, 0)),
            weights,
            lambda_=cut.lambda_ if cut.detection else EVERY_TOKEN,
            alpha=cut.alpha,
            gamma=self.gamma,
            negative_weight=self.negative_weight,
            min_judged_prob=cut.min_judged_prob if cut.detection else 0.0,
            normalization=self.config.normalization,
            misalign=misalign,
        )
        return result, lengths > 0

    def loss(
        self,
        logprob: torch.Tensor,
        log1m_prob: torch.Tensor,
        batch: Batch,
        *,
        reference: torch.Tensor | None,
        progress: float,
    ) -> tuple[torch.Tensor, Metrics]:
        cut = self.config.cut
        misalign = cut.misalign and progress >= cut.judged_warmup
        result, is_negative = self.contrast(logprob, log1m_prob, batch, misalign=misalign)
        loss = result.loss
        if not cut.align_n:
            # Its gradient is gone already; this is its value.
            loss = loss - (batch.weights * self.negative_weight * result.align_n).sum()
        live = batch.weights > 0
        negative, positive = is_negative & live, ~is_negative & live
        # A warm-up has no contrast to report; the name stays, because ranks add theirs up.
        contrasted = negative if misalign else torch.zeros_like(negative)
        metrics = {
            "cut/align_p": total(result.align_p[positive]),
            "cut/align_n": total(result.align_n[negative]),
            "cut/misalign_likelihood": total(result.likelihood[contrasted]),
            "cut/misalign_penalty": total(result.penalty[contrasted]),
            "cut/flagged": total(result.flagged_share[negative]),
            "cut/contrast": total(result.contrast[negative]),
            "cut/positives": total(positive.double(), live.sum()),
        }
        return loss, metrics
