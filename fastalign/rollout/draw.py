"""Tokens drawn from logits, alike by every engine whose logits reach the host."""

from __future__ import annotations

import numpy as np
import torch

from fastalign import _bridge
from fastalign.rollout.engine import EngineFault


def draw(
    logits: torch.Tensor,
    seeds: np.ndarray,
    positions: np.ndarray,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Token int32 [R] and its raw log-prob float32 [R]; see :func:`fastalign._bridge.sample`.

    Args:
        logits: [R, V], in the model's own dtype.
        seeds: uint64 [R], of the requests.
        positions: uint64 [R], of the tokens in their completions.

    Raises:
        EngineFault: the logits are none to sample from (NaN, infinity).
    """
    try:
        tokens, logprobs, _ = _bridge.sample(
            _on_host(logits),
            seeds,
            positions,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            # As many as torch has, whose own are idle meanwhile.
            threads=torch.get_num_threads(),
        )
    except ValueError as error:
        raise EngineFault(f"the model's logits cannot be sampled from: {error}") from None
    return tokens, logprobs


def _on_host(logits: torch.Tensor) -> np.ndarray:
    """float32, or the bits of bfloat16 as uint16, without a copy where they lie there."""
    if logits.dtype == torch.float16:
        logits = logits.float()
    if logits.device.type == "cuda":
        pinned = torch.empty_like(logits, device="cpu", pin_memory=True)
        logits = pinned.copy_(logits)
    else:
        logits = logits.cpu()
    bits = logits.view(torch.uint16) if logits.dtype == torch.bfloat16 else logits
    return bits.numpy()
