"""The protocol between the trainer and whatever samples for it.

An engine holds one set of base weights and any number of named adapters, each at a version.  It
takes and returns token ids: text never crosses this seam, so what was sampled is what is trained.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

# vLLM raises smaller temperatures to this one, which would be another policy than asked for.
MIN_TEMPERATURE = 0.01


_REASONS = frozenset[str]({"stop", "length"})
# Of a log-prob, which is at most 0.
_ROUNDING = 1e-3

CLOSED = "it was closed"


class EngineError(RuntimeError):
    """The engine failed, hung or holds other weights than it was sent."""


class EngineFault(EngineError):
    """The engine died, hung or answered what no model says: started anew it may be sound.

    Whoever raises it leaves no other rank waiting inside the engine.
    """


@dataclass(frozen=True)
class ServedModel:
    """What an engine is to hold.

    Attributes:
        path: model folder or hub name.
        dtype: of parameters and arithmetic.
        max_model_len: most tokens of prompt and completion together.
        device: the trainer's.  The embedded engine is on it too; vLLM takes the rank's own, and a
            server of vLLM on GPUs those of its settings.
        lora_rank: largest rank of the adapters to come; None: full weights are sent.  The embedded
            engine takes both.
        seed: of vLLM's own random state; requests bring theirs.
        revision: of a hub model.
        trust_remote_code: run code that comes with the model.
        tokenizer: the model's, for an engine that is asked for stop strings; None: it takes none.
        load_in_4bit: the base in NF4, as :func:`fastalign.quantization.load_nf4` has it, for
            adapters alone.
    """

    path: str | Path
    dtype: torch.dtype
    max_model_len: int
    device: torch.device | str = "cpu"
    lora_rank: int | None = None
    seed: int = 0
    revision: str | None = None
    trust_remote_code: bool = False
    tokenizer: PreTrainedTokenizerBase | None = None
    load_in_4bit: bool = False


@dataclass(frozen=True)
class SamplingSettings:
    """How completions are drawn; temperature, min-p, top-k and top-p define the behaviour policy.

    They apply in this order.

    Attributes:
        max_new_tokens: at most so many tokens are sampled.
        temperature: divides the logits; 0 takes the most probable token.
        top_p: only the fewest most probable tokens whose probabilities, after all else, sum to at
            least this are sampled.
        stop_token_ids: sampling one of these ends the completion.  Beside ``stop`` nothing else
            does: the engine adds no end token of its own.
        top_k: only so many of the most probable tokens are sampled; 0: all.
        min_p: tokens less probable than this share of the most probable one are not sampled.
        stop: strings; the completion ends with the token that completes one of them in its text,
            special tokens left out.  What they end is kept: all that was sampled.  The engine has
            to be made with a tokenizer.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    top_k: int = 0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}: it must be at least 1")
        if self.temperature != 0 and not MIN_TEMPERATURE <= self.temperature < float("inf"):
            raise ValueError(
                f"temperature is {self.temperature}: it must be 0 (greedy) or at least "
                f"{MIN_TEMPERATURE}"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: it must be above 0 and at most 1")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}: it must be 0 (all tokens) or above")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}: it must be from 0 to 1")
        if "" in self.stop:
            raise ValueError("stop holds an empty string, which would end every completion")
        for text in self.stop:
            if "\ufffd" in text:
                raise ValueError(
                    f"stop holds {text!r}, with U+FFFD: it stands for bytes that are no text"
                )


@dataclass(frozen=True)
class Rollout:
    """One sampled completion.

    Attributes:
        token_ids: int32 [L]; ends with a stop token only if the model produced one.
        logprobs: float32 [L]; log p of each token under the untempered, untruncated softmax.
        finish_reason: "stop" (a stop token was sampled, or a stop string completed) or "length".
        weight_version: version of the weights or adapter that sampled it.
    """

    token_ids: np.ndarray
    logprobs: np.ndarray
    finish_reason: Literal["stop", "length"]
    weight_version: int


@dataclass
class PromptTokens:
    """Tokens of the prompts that an engine was given, and those of them that were not computed
    because an earlier prompt had begun alike."""

    total: int = 0
    cached: int = 0


@dataclass(frozen=True)
class Adapter:
    """An adapter that an engine holds."""

    version: int


@dataclass(frozen=True)
class SyncReport:
    """One weight transfer, proven by content; ``digest`` is of all tensors as the engine holds
    them on this rank, the same for the same bits."""

    version: int
    tensors: int
    bytes: int
    seconds: float
    digest: str


def check_prompts(
    prompts: Sequence[np.ndarray], new_tokens: int, max_model_len: int, vocab_size: int
) -> None:
    """Refuse prompts that an engine would cut short, answer wrongly or die on.

    Raises:
        ValueError: a prompt is no vector of integers, is empty, holds an id outside the vocabulary,
            or leaves no room for ``new_tokens``.
    """
    for index, prompt in enumerate(prompts):
        if prompt.ndim != 1 or prompt.dtype.kind not in "iu":
            raise ValueError(
                f"prompt {index} has shape {prompt.shape} and dtype {prompt.dtype}: "
                "it must be a vector of token ids"
            )
        if prompt.size == 0:
            raise ValueError(f"prompt {index} is empty: it must hold at least one token")
        if prompt.size + new_tokens > max_model_len:
            raise ValueError(
                f"prompt {index} has {prompt.size} tokens and {new_tokens} more are asked for: "
                f"the engine was made for {max_model_len} (max_model_len)"
            )
        if prompt.min() < 0 or prompt.max() >= vocab_size:
            raise ValueError(f"prompt {index} holds a token id outside 0..{vocab_size - 1}")


def nonsense(
    rollouts: Sequence[Rollout], settings: SamplingSettings, vocab_size: int
) -> str | None:
    """What no model can have sampled under these settings, in words; None: all of it may be."""
    for index, rollout in enumerate(rollouts):
        wrong = _nonsense(rollout, settings, vocab_size)
        if wrong is not None:
            return f"completion {index} of {len(rollouts)} {wrong}"
    return None


def _nonsense(rollout: Rollout, settings: SamplingSettings, vocab_size: int) -> str | None:
    tokens, logprobs, most = rollout.token_ids, rollout.logprobs, settings.max_new_tokens
    if not 1 <= tokens.size <= most:
        return f"has {tokens.size} tokens, where 1 to {most} were asked for"
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        return f"holds a token id outside 0..{vocab_size - 1}"
    if logprobs.shape != tokens.shape:
        return f"has {logprobs.size} log-probs for {tokens.size} tokens"
    # Written so that a NaN fails.
    if not (np.isfinite(logprobs).all() and logprobs.max() <= _ROUNDING):
        return "has log-probs that are none: NaN, infinite or above 0"
    if rollout.finish_reason not in _REASONS:
        return f"ended with {rollout.finish_reason!r}"
    if rollout.finish_reason == "length":
        return None if tokens.size == most else f"ended at {tokens.size} of {most} tokens"
    if not settings.stop and tokens[-1] not in settings.stop_token_ids:
        return f"ended with token {tokens[-1]}, which is no stop token"
    return None


def nonsense_scores(logprobs: np.ndarray) -> str | None:
    """What is wrong with next-token log-probs, in words; None: they may be a model's."""
    # Log-probs of tokens that are out of the question are minus infinity.
    wrong = ~(logprobs <= _ROUNDING)
    if not wrong.any():
        return None
    return f"{int(wrong.sum())} of {logprobs.size} log-probs are none: NaN or above 0"


class RolloutEngine(ABC):
    """What the trainer asks of a sampler, and what every sampler checks before and behind a call.

    Each rank brings its own prompts and gets its own answers.  Ranks may share an engine: every
    call is then collective among them, also of a rank that has nothing to ask.  With an engine of
    its own each rank calls as it likes.
    """

    name: str
    # What messages call it.
    _called: str
    # Tokens that scoring samples behind a prompt.
    _scoring_tokens = 0
    # What is raised of one that can never be used again.
    _gone: type[EngineError] = EngineError
    _adapters: Mapping[str, Adapter]
    _vocab_size: int

    def __init__(self, max_model_len: int, has_tokenizer: bool) -> None:
        self.max_model_len = max_model_len
        self.prompt_tokens = PromptTokens()
        self._has_tokenizer = has_tokenizer
        self._version = 0
        self._asleep = False
        # Why nothing can be sampled: for good, and until the next transfer.
        self._dead: str | None = None
        self._stale: str | None = None

    def generate(
        self,
        prompts: Sequence[np.ndarray],
        settings: SamplingSettings,
        seeds: Sequence[int],
        adapter: str | None = None,
    ) -> list[Rollout]:
        """Sample one completion for each prompt (int32 [P_i]); seeds[i] decides the draw.

        Several samples of one prompt are several entries with their own seeds; the engine's
        prefix cache shares the prompt.

        Raises:
            ValueError: of a request that no engine can answer.
            EngineError: it sleeps, or does not hold the weights or the adapter.
            EngineFault: it failed, or answered what no model says.
        """
        self._check_usable(adapter)
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts have {len(seeds)} seeds: each wants one")
        for index, seed in enumerate(seeds):
            if not 0 <= seed < 2**64:
                raise ValueError(f"seed {index} is {seed}: it must be from 0 to 2^64 - 1")
        check_prompts(prompts, settings.max_new_tokens, self.max_model_len, self._vocab_size)
        if settings.stop and not self._has_tokenizer:
            raise ValueError(
                f"stop is {settings.stop!r}, but the engine was made without a tokenizer: it "
                "samples token ids alone"
            )
        rollouts = self._generate(prompts, settings, seeds, adapter)
        wrong = nonsense(rollouts, settings, self._vocab_size)
        if wrong is not None:
            raise self._failed(wrong)
        return rollouts

    def next_logprobs(
        self,
        prompts: Sequence[np.ndarray],
        token_ids: Sequence[int],
        adapter: str | None = None,
    ) -> np.ndarray:
        """float32 [len(prompts), len(token_ids)]: log p(token | prompt), full raw softmax.

        Raises:
            ValueError, EngineError, EngineFault: see :meth:`generate`.
        """
        self._check_usable(adapter)
        check_prompts(prompts, self._scoring_tokens, self.max_model_len, self._vocab_size)
        wanted = [int(token) for token in token_ids]
        if not wanted:
            return np.empty((len(prompts), 0), dtype=np.float32)
        scores = self._next_logprobs(prompts, wanted, adapter)
        wrong = nonsense_scores(scores)
        if wrong is not None:
            raise self._failed(wrong)
        return scores

    def all_agree(self, here: bool) -> bool:
        """Whether ``here`` holds on every rank that shares the engine; collective among them."""
        return here

    @abstractmethod
    def load_weights(
        self, tensors: Iterable[tuple[str, torch.Tensor]], names: frozenset[str], version: int
    ) -> SyncReport:
        """Replace the base weights; ``names`` are the trainer's own, ``tensors`` is consumed once.

        Raises:
            EngineError: a tensor is missing, extra, of another shape, or not held as it was sent;
                the engine then refuses to sample until a whole transfer succeeds.
        """

    @abstractmethod
    def load_adapter(
        self,
        name: str,
        tensors: Mapping[str, torch.Tensor],
        config: Mapping[str, Any],
        version: int,
    ) -> SyncReport:
        """Replace the adapter ``name`` (tensors and config as PEFT saves them)."""

    @abstractmethod
    def sleep(self) -> None:
        """Give up device memory until :meth:`wake`; nothing happens to an engine that sleeps."""

    @abstractmethod
    def wake(self) -> None:
        """Take the memory back; prefix caches start empty.

        An engine for full weights may have dropped them: load them again before sampling.  Nothing
        happens to an engine that is awake.
        """

    def lost(self) -> bool:
        """Whether it has failed on any rank, and :meth:`restart` can help: it is no part of this
        process; collective over the run's ranks."""
        return False

    def restart(self) -> None:
        """Start anew, without the weights and adapters that it was sent; collective over the run's
        ranks.

        Raises:
            EngineFault: it does not start.
        """
        raise NotImplementedError

    @abstractmethod
    def close(self) -> None:
        """Release everything."""

    @abstractmethod
    def _generate(
        self,
        prompts: Sequence[np.ndarray],
        settings: SamplingSettings,
        seeds: Sequence[int],
        adapter: str | None,
    ) -> list[Rollout]:
        """:meth:`generate` for what was checked."""

    @abstractmethod
    def _next_logprobs(
        self, prompts: Sequence[np.ndarray], token_ids: list[int], adapter: str | None
    ) -> np.ndarray:
        """:meth:`next_logprobs` for what was checked, and at least one token."""

    def _version_of(self, adapter: str | None) -> int:
        return self._version if adapter is None else self._adapters[adapter].version

    def _failed(self, why: str) -> EngineError:
        """What to raise of a failed call."""
        return EngineFault(f"{self._called} failed: {why}")

    def _check_alive(self) -> None:
        if self._dead is not None:
            raise self._gone(f"{self._called} cannot be used any more: {self._dead}")

    def _check_awake(self) -> None:
        self._check_alive()
        if self._asleep:
            raise EngineError(f"{self._called} sleeps: wake it first")

    def _check_usable(self, adapter: str | None) -> None:
        self._check_awake()
        if self._stale is not None:
            raise EngineError(f"{self._called} holds no known weights: {self._stale}")
        if adapter is not None and adapter not in self._adapters:
            raise EngineError(f"no adapter {adapter!r} is loaded: {sorted(self._adapters)} are")
