"""Judge-augmented supervised fine-tuning (JSFT, arXiv 2402.11253, section 3.1)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np
import torch

from fastalign.batch import Batch
from fastalign.config import JudgeConfig
from fastalign.data import Comparison, Example, Record, Stream
from fastalign.methods.base import Dropped, Metrics, as_sampled, role_mean, total
from fastalign.methods.sft import Likelihood
from fastalign.templates import Renderer


class Jsft(Likelihood):
    """One model learns to answer and to judge: a preference pair makes a demonstration of its
    chosen answer and two judgments, in which the answers change slots.

    A judgment's first target is the decision token.  A pair that brings comparisons makes two
    judgments of each, under its principle, with its rationales as further targets (PR); any other
    pair is judged under the recipe's principles or overall.  A dataset of prompts and completions,
    or of conversations, adds demonstrations alone.

    The paper's loss is the plain likelihood of all these tokens, and so is
    ``normalization: token``.  Under ``record`` rationales of a hundred tokens would leave a
    hundredth of their row to the decision, which alone is read later.  So decision and rationales
    are a mean each, and a decision counts the same with and without rationales.
    """

    wants = ("preference", "completion", "messages")
    logged: ClassVar = {"nll": ("demonstration", "plain")}

    def from_record(self, record: Record, renderer: Renderer) -> list[Example]:
        if record.kind == "messages":
            dialogue = self.conversation(record, renderer)
            return [Example((dialogue,), record.weight, record.source)]
        if record.completion is not None:
            return [self.demonstration(record, *self.answer(record, renderer))]
        assert record.chosen is not None and record.rejected is not None
        examples = []
        if self.config.jsft.demonstrations:
            shown = as_sampled(record, renderer) or renderer.completion(
                record.prompt, record.chosen, tools=record.tools, source=record.source
            )
            examples.append(self.demonstration(record, *shown))
        unfit = None
        for comparison in self.comparisons(record):
            try:
                examples += list(self.judgments(record, comparison, renderer))
            except Dropped as reason:
                unfit = str(reason)
        if unfit is not None:
            raise Dropped(unfit, examples)
        if not examples:
            raise Dropped("nothing is compared, and demonstrations are off")
        return examples

    def comparisons(self, record: Record) -> Sequence[Comparison]:
        """Those of the pair, as far as the recipe wants them; else its answer to the recipe's."""
        wanted = self.config.jsft.comparisons
        if record.comparisons is None or wanted == "ignore":
            principles = (self.config.judge.principles if self.config.judge else ()) or (None,)
            return [Comparison("chosen", principle) for principle in principles]
        if wanted == "principle":
            return [replace(comparison, rationales=None) for comparison in record.comparisons]
        return record.comparisons

    def judgments(
        self, record: Record, comparison: Comparison, renderer: Renderer
    ) -> Iterator[Example]:
        """The better answer in the first slot, then in the second."""
        assert record.chosen is not None and record.rejected is not None
        reasons = comparison.rationales or (None, None)
        better, worse = (record.chosen, reasons[0]), (record.rejected, reasons[1])
        if comparison.preferred == "rejected":
            better, worse = worse, better
        tokens = (self.config.judge or JudgeConfig()).decision_tokens
        for slot, ((a, why_a), (b, why_b)) in enumerate(((better, worse), (worse, better))):
            prompt_ids, judgment_ids = renderer.judgment(
                record.prompt,
                a,
                b,
                slot,
                comparison.principle,
                (why_a, why_b) if why_a and why_b else None,
                tools=record.tools,
                source=record.source,
                tokens=tokens,
            )
            if len(prompt_ids) >= self.config.max_length:
                raise Dropped("judgment does not fit in max_length")
            stream = Stream.of("judgment", prompt_ids, self.fit(prompt_ids, judgment_ids))
            weight = record.weight * self.config.jsft.judge_weight
            yield Example((stream,), weight, record.source)

    def demonstration(
        self, record: Record, prompt_ids: np.ndarray, completion_ids: np.ndarray
    ) -> Example:
        stream = Stream.of("demonstration", prompt_ids, self.fit(prompt_ids, completion_ids))
        return Example((stream,), record.weight, record.source)

    def parts(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """A judgment's rationales are a part of their own, behind the decision."""
        bounds, weights = super().parts(batch)
        judges = torch.tensor([role == "judgment" for role in batch.roles], device=bounds.device)
        reasoned = judges & (bounds.diff() > 1)
        bounds = torch.cat([bounds, bounds[:-1][reasoned] + 1]).sort().values
        return bounds, weights.repeat_interleave(1 + reasoned.long())

    def loss(
        self,
        logprob: torch.Tensor,
        log1m_prob: torch.Tensor,
        batch: Batch,
        *,
        reference: torch.Tensor | None,
        progress: float,
    ) -> tuple[torch.Tensor, Metrics]:
        loss, metrics = super().loss(
            logprob, log1m_prob, batch, reference=reference, progress=progress
        )
        decisions = logprob[self.decisions(batch)]
        nll = total(-decisions)
        return loss, metrics | {
            "judge/nll": nll,
            # Right for certain: above one half no other token can be more probable.
            "judge/sure": total((decisions > np.log(0.5)).double()),
            "judge/rationale_nll": role_mean(-logprob, batch, "judgment") - nll,
        }

    def decisions(self, batch: Batch) -> torch.Tensor:
        """Rows of the decision tokens in records that count, int64."""
        sequences = torch.tensor(batch.sequences("judgment"), dtype=torch.int64)
        sequences = sequences.to(batch.records.device)
        counts = batch.weights[batch.records[sequences]] > 0
        return batch.cu_rows.long()[sequences[counts]]
