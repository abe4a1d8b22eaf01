"""Ops on the LM head that never hold the [tokens, vocabulary] logits."""

from fastalign_kernels.linear_logprob import TokenLogprobs, linear_logprob

__all__ = ["TokenLogprobs", "linear_logprob"]

__version__ = "0.1.0"  # of the distribution, the same as fastalign's
