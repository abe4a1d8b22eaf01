"""Ops for alignment losses: per-token log-probs of an LM head that never hold the [tokens,
vocabulary] logits, and the losses made of them."""

from fastalign_kernels._dispatch import default_implementation
from fastalign_kernels.contrastive_unlikelihood import CutLoss, contrastive_unlikelihood
from fastalign_kernels.linear_logprob import TokenLogprobs, linear_logprob
from fastalign_kernels.logits_logprob import logits_logprob
from fastalign_kernels.pair_preference import PreferenceLoss, pair_preference
from fastalign_kernels.segments import segment_sum

__all__ = [
    "CutLoss",
    "PreferenceLoss",
    "TokenLogprobs",
    "contrastive_unlikelihood",
    "default_implementation",
    "linear_logprob",
    "logits_logprob",
    "pair_preference",
    "segment_sum",
]

__version__ = "0.1.0"  # of the distribution, the same as fastalign's
