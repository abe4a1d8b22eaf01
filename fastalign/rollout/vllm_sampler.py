"""Tokens on vLLM's CPU backend drawn by our own sampler, which is the embedded engine's.

vLLM 0.32 sorts the vocabulary of every row for top-p, draws a number for each of its tokens, and
takes a softmax of the raw logits beside that and the rank of the token in it.  Here one pass over
the logits gives token and log-prob, and the same logits give the same token by either engine.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

from fastalign.rollout.draw import draw


class CpuSampler(Sampler):
    """Draws what :func:`fastalign.rollout.vllm.sampling_arguments` asks for; scores are vLLM's.

    Ranks of tokens, which nobody reads here, are given as 0.
    """

    _runner: Any

    def forward(
        self,
        logits: torch.Tensor,
        sampling_metadata: SamplingMetadata,
        predict_bonus_token: bool = False,
        logprobs_mode_override: Any = None,
    ) -> SamplerOutput:
        """One token for each row of logits [R, V]."""
        held = self._runner.requests
        requests = [held[name] for name in self._runner.input_batch.req_ids]
        if any(request.sampling_params.logprob_token_ids for request in requests):
            return super().forward(
                logits, sampling_metadata, predict_bonus_token, logprobs_mode_override
            )
        rows: dict[tuple[Any, ...], list[int]] = {}
        for row, request in enumerate(requests):
            asked = request.sampling_params
            settings = (asked.temperature, asked.top_k, asked.top_p, asked.min_p)
            rows.setdefault(settings, []).append(row)
        seeds = np.array([request.sampling_params.seed for request in requests], dtype=np.uint64)
        places = np.array([len(request.output_token_ids) for request in requests], dtype=np.uint64)
        tokens = np.empty(len(requests), dtype=np.int32)
        logprobs = np.empty(len(requests), dtype=np.float32)
        for (temperature, top_k, top_p, min_p), of in rows.items():
            tokens[of], logprobs[of] = draw(
                logits[of] if len(rows) > 1 else logits,
                seeds[of],
                places[of],
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
            )
        drawn = torch.from_numpy(tokens)[:, None]
        ranks = torch.zeros(len(requests), dtype=torch.int32)
        return SamplerOutput(
            drawn, LogprobsTensors(drawn, torch.from_numpy(logprobs)[:, None], ranks)
        )


def install(runner: Any) -> None:
    """Have vLLM's (V1) model runner sample by :class:`CpuSampler`.

    Raises:
        ImportError: the parts of this vLLM are not as they are known here; nothing is changed.
    """
    sampler: Any = getattr(runner, "sampler", None)
    if type(sampler) is not Sampler:
        kind = type(sampler)
        raise ImportError(f"vLLM's sampler is a {kind.__module__}.{kind.__qualname__}")
    for name in ("requests", "input_batch"):
        if not hasattr(runner, name):
            raise ImportError(f"vLLM's {type(runner).__name__} has no {name}")
    # The runner holds this very object.
    sampler.__class__ = CpuSampler
    sampler._runner = runner
