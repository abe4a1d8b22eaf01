"""SimPO (arXiv 2405.14734), a method of one's own: preference pairs without a reference.

fastalign train examples/simpo.yaml model_name_or_path=./my-model datasets.0.path=pairs.jsonl
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch.nn.functional import logsigmoid

from fastalign.batch import Batch
from fastalign.losses import segment_sum
from fastalign.methods import MethodSettings, Metrics, Preferences, total


class SimPO(Preferences):
    """-log sigmoid(beta (mean log p(chosen) - mean log p(rejected)) - gamma), equation 6 of the
    paper; the means are over the tokens of the answer."""

    class Settings(MethodSettings):
        beta: float = Field(2.0, gt=0, description="Of the difference in mean log-probs.")
        gamma: float = Field(1.0, ge=0, description="The margin that it is to exceed.")

    def loss(
        self,
        logprob: torch.Tensor,
        log1m_prob: torch.Tensor,
        batch: Batch,
        *,
        reference: torch.Tensor | None,
        progress: float,
    ) -> tuple[torch.Tensor, Metrics]:
        means = segment_sum(logprob, batch.cu_rows) / batch.cu_rows.diff()
        chosen, rejected = (self.settings.beta * means).view(-1, 2).unbind(dim=1)
        losses = -logsigmoid(chosen - rejected - self.settings.gamma)

        counts = batch.weights > 0
        metrics = {
            "rewards/chosen": total(chosen[counts]),
            "rewards/rejected": total(rejected[counts]),
            "rewards/margins": total((chosen - rejected)[counts]),
            "rewards/accuracies": total((chosen > rejected)[counts]),
        }
        return (losses * batch.weights).sum(), metrics
