"""The embedded engine: a replica of the model inside the trainer's process, decoded in batches.

It needs nothing but transformers, runs wherever the trainer runs, and is the reference that other
engines are compared with.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    DynamicCache,
)
from transformers.cache_utils import DynamicLayer
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from fastalign import _bridge
from fastalign.config import ConfigError, RolloutConfig
from fastalign.lora import add_in_one_pass
from fastalign.printing import reason
from fastalign.quantization import load_nf4
from fastalign.rollout.draw import draw
from fastalign.rollout.engine import (
    CLOSED,
    Adapter,
    EngineError,
    Rollout,
    RolloutEngine,
    SamplingSettings,
    ServedModel,
    SyncReport,
)
from fastalign.rollout.sync import Fingerprint, digest, fingerprint, verify
from fastalign.rollout.token_bytes import token_bytes
from fastalign.rollout.watchdog import Watchdog

# Padded tokens of one prompt pass: bounds its activations, whatever max_num_seqs is.
_PREFILL_TOKENS = 32768
# The same where nothing is sampled afterwards.  A CPU keeps activations of this size in its caches:
# 1.4 times the tokens per second of one large pass, 1.7 times with an adapter.
_CPU_SCORING_TOKENS = 1024
_GROUPED_ATTENTION = "fastalign_grouped"
# Tokens by which a cache layer grows: each growth copies the layer once.
_ROOM = 64


class HfEngine(RolloutEngine):
    """Samples from a replica of the model with a key-value cache; see :class:`RolloutEngine`.

    Requests are sorted by prompt length and run ``max_num_seqs`` at a time.  Prompts are padded on
    the left, equal prompts are computed once, and rows that finished leave the batch at once.
    Tokens are drawn on the CPU, from the logits in the model's own dtype; the number that draws a
    token is decided by the request's seed and the token's place alone.  So what a request samples
    depends on the others only through the rounding of batched matrix products.

    Weights are proven by content: after a transfer the replica's own parameters are read back.
    """

    name = "hf"
    _called = "the embedded engine"

    def __init__(self, model: ServedModel, config: RolloutConfig) -> None:
        """Load the replica.

        Raises:
            ConfigError: the text of the tokenizer's tokens cannot be told, or there is no NF4 here.
            EngineError: the model does not load, or DeepSpeed ZeRO-3 is set up already and would
                shard the replica.
        """
        if is_deepspeed_zero3_enabled():
            raise EngineError(
                "the embedded engine must be made before HfDeepSpeedConfig: transformers would "
                "shard its replica over the ranks"
            )
        tokenizer = model.tokenizer
        super().__init__(model.max_model_len, tokenizer is not None)
        self._tokens = _bridge.TokenBytes(token_bytes(tokenizer)) if tokenizer is not None else None
        self._device = torch.device(model.device)
        self._config = config
        options = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
        try:
            if model.load_in_4bit:
                loaded = load_nf4(
                    str(model.path), dtype=model.dtype, device=self._device, **options
                )
            else:
                loaded = AutoModelForCausalLM.from_pretrained(
                    model.path, dtype=model.dtype, **options
                )
        except ConfigError:
            raise
        except Exception as error:  # of all kinds where its files are damaged
            raise EngineError(f"{model.path} cannot be loaded: {reason(error)}") from None
        if loaded.config._attn_implementation == "sdpa":
            loaded.set_attn_implementation(_GROUPED_ATTENTION)
        self._model = loaded.to(self._device).eval().requires_grad_(False)
        self._vocab_size = loaded.config.get_text_config().vocab_size
        # Taken before any adapter renames them: PEFT keeps the same parameter objects.
        self._parameters = dict(self._model.named_parameters())
        self._peft: Any = None
        self._adapters: dict[str, Adapter] = {}
        self._watchdog = Watchdog(self._called, config.timeout_s)

    def _generate(
        self,
        prompts: Sequence[np.ndarray],
        settings: SamplingSettings,
        seeds: Sequence[int],
        adapter: str | None,
    ) -> list[Rollout]:
        version = self._version_of(adapter)
        results: list[Rollout | None] = [None] * len(prompts)
        with torch.inference_mode(), self._using(adapter), self._calling():
            for rows in self._batches(prompts, _PREFILL_TOKENS):
                seeds_B = np.array([seeds[i] for i in rows], dtype=np.uint64)
                batch = self._sample([prompts[i] for i in rows], seeds_B, settings, version)
                for row, rollout in zip(rows, batch, strict=True):
                    results[row] = rollout
        return [rollout for rollout in results if rollout is not None]

    def _next_logprobs(
        self, prompts: Sequence[np.ndarray], token_ids: list[int], adapter: str | None
    ) -> np.ndarray:
        result = np.empty((len(prompts), len(token_ids)), dtype=np.float32)
        wanted = torch.tensor(token_ids, dtype=torch.int64, device=self._device)
        max_tokens = _CPU_SCORING_TOKENS if self._device.type == "cpu" else _PREFILL_TOKENS
        with torch.inference_mode(), self._using(adapter), self._calling():
            for rows in self._batches(prompts, max_tokens):
                unique, source_B = self._distinct([prompts[i] for i in rows])
                ids_UP, mask_UP = self._pad(unique)
                logits_UV = self._forward(ids_UP, mask_UP, _positions(mask_UP), cache=None)
                logp_UK = logits_UV.float().log_softmax(dim=-1)[:, wanted].cpu().numpy()
                result[rows] = logp_UK[source_B]
        return result

    def load_weights(
        self, tensors: Iterable[tuple[str, torch.Tensor]], names: frozenset[str], version: int
    ) -> SyncReport:
        """Copy the trainer's weights into the replica and read the replica back.

        A failed transfer leaves the replica unusable until a whole one succeeds.  ``tensors`` is
        consumed to its end even after a bad one, because other ranks may take part in it.

        Raises:
            EngineError: see :class:`RolloutEngine`.
        """
        self._check_awake()
        start = time.perf_counter()
        self._stale = f"the transfer of version {version} did not finish"
        sent: dict[str, Fingerprint] = {}
        misshapen: list[str] = []
        size = 0
        with torch.no_grad():
            for name, tensor in tensors:
                parameter = self._parameters.get(name)
                if parameter is None:
                    sent[name] = fingerprint(tensor)
                elif parameter.shape != tensor.shape:
                    sent[name] = fingerprint(tensor)
                    misshapen.append(f"{name} {tuple(tensor.shape)} for {tuple(parameter.shape)}")
                else:
                    tensor = tensor.to(device=parameter.device, dtype=parameter.dtype)
                    sent[name] = fingerprint(tensor)
                    _place(parameter, tensor)
                    size += tensor.numel() * tensor.element_size()
        if misshapen:
            raise EngineError(
                f"{len(misshapen)} tensors of another shape than the model's, the first: "
                f"{misshapen[0]}"
            )
        received = {name: fingerprint(p) for name, p in self._parameters.items() if name in sent}
        verify(sent, received, names)
        verify(sent, received, frozenset(self._parameters))
        self._stale = None
        self._version = version
        return SyncReport(version, len(sent), size, time.perf_counter() - start, digest(sent))

    def load_adapter(
        self,
        name: str,
        tensors: Mapping[str, torch.Tensor],
        config: Mapping[str, Any],
        version: int,
    ) -> SyncReport:
        """Put a LoRA adapter beside the base, unmerged and in float32.

        Raises:
            EngineError: the configuration is no LoRA's, or the adapter that the model then holds
                differs from what was sent.
        """
        self._check_awake()
        start = time.perf_counter()
        self._adapters.pop(name, None)
        self._install(name, config)
        add_in_one_pass(self._peft)
        # New adapter layers start in training mode, and would sample with dropout.
        self._peft.eval()
        held = _adapter_tensors(self._peft, name)
        sent: dict[str, Fingerprint] = {}
        size = 0
        with torch.no_grad():
            for key, tensor in tensors.items():
                place = held.get(key)
                if place is not None and place.shape != tensor.shape:
                    raise EngineError(
                        f"adapter {name!r}: {key} has shape {tuple(tensor.shape)}, its "
                        f"configuration makes it {tuple(place.shape)}"
                    )
                if place is not None:
                    tensor = tensor.to(device=place.device, dtype=place.dtype)
                    _place(place, tensor)
                sent[key] = fingerprint(tensor)
                size += tensor.numel() * tensor.element_size()
        received = {key: fingerprint(x) for key, x in _adapter_tensors(self._peft, name).items()}
        verify(sent, received, frozenset(tensors))
        self._adapters[name] = Adapter(version)
        return SyncReport(version, len(sent), size, time.perf_counter() - start, digest(sent))

    def sleep(self) -> None:
        """Move the replica to host memory.  On a CPU there is nothing to give up."""
        self._asleep = True
        if self._device.type != "cpu":
            self._model.to("cpu")
            torch.accelerator.empty_cache()

    def wake(self) -> None:
        """Move the replica back to its device."""
        self._asleep = False
        self._model.to(self._device)

    def close(self) -> None:
        """Let go of the replica; every later call raises :class:`EngineError`."""
        self._dead = CLOSED
        self._model = self._peft = None
        self._parameters = {}
        self._adapters = {}
        if self._device.type != "cpu":
            torch.accelerator.empty_cache()

    @contextmanager
    def _calling(self) -> Iterator[None]:
        """What goes wrong in torch inside the block is the engine's, what hangs the process's."""
        try:
            with self._watchdog.watching():
                yield
        except EngineError:
            raise
        except RuntimeError as error:
            what = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise self._failed(what) from error

    @contextmanager
    def _using(self, adapter: str | None) -> Iterator[None]:
        """Answer as ``adapter``, or as the base alone."""
        if adapter is not None:
            self._peft.set_adapter(adapter)
            yield
        else:
            with self._peft.disable_adapter() if self._peft is not None else nullcontext():
                yield

    def _install(self, name: str, config: Mapping[str, Any]) -> None:
        """Make room for adapter ``name``; the same configuration again keeps the modules."""
        from peft import LoraConfig, PeftConfig, PeftModel

        parsed = PeftConfig.from_peft_type(**config)
        if not isinstance(parsed, LoraConfig):
            raise EngineError(f"adapter {name!r} is of type {parsed.peft_type}: LoRA is supported")
        parsed.inference_mode = True
        if self._peft is None:
            self._peft = PeftModel(self._model, parsed, name)
            return
        held = self._peft.peft_config.get(name)
        if held is None:
            self._peft.add_adapter(name, parsed)
        elif held.to_dict() != parsed.to_dict():
            self._peft.delete_adapter(name)
            self._peft.add_adapter(name, parsed)

    def _batches(self, prompts: Sequence[np.ndarray], max_tokens: int) -> Iterator[list[int]]:
        """Indices of requests that run together: equal prompts side by side, similar lengths."""
        order = sorted(range(len(prompts)), key=lambda i: (prompts[i].size, prompts[i].tobytes()))
        rows: list[int] = []
        distinct = 0
        for index in order:
            prompt = prompts[index]
            new = not rows or not np.array_equal(prompts[rows[-1]], prompt)
            # The prompt at hand is the longest so far: all are padded to it.
            full = (distinct + new) * prompt.size > max_tokens
            if rows and (len(rows) == self._config.max_num_seqs or full):
                yield rows
                rows, distinct, new = [], 0, True
            rows.append(index)
            distinct += new
        if rows:
            yield rows

    def _distinct(self, prompts: Sequence[np.ndarray]) -> tuple[list[np.ndarray], np.ndarray]:
        """The different prompts (equal ones stand side by side) and, for each request, which is
        its."""
        unique: list[np.ndarray] = []
        source_B = np.empty(len(prompts), dtype=np.int64)
        for row, prompt in enumerate(prompts):
            self.prompt_tokens.total += prompt.size
            if not unique or not np.array_equal(unique[-1], prompt):
                unique.append(prompt)
            else:
                self.prompt_tokens.cached += prompt.size
            source_B[row] = len(unique) - 1
        return unique, source_B

    def _pad(self, prompts: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompts as int64 [U, P] with padding on the left, and the mask of what is real."""
        length = max(prompt.size for prompt in prompts)
        ids_UP = np.zeros((len(prompts), length), dtype=np.int64)
        mask_UP = np.zeros_like(ids_UP)
        for row, prompt in enumerate(prompts):
            ids_UP[row, length - prompt.size :] = prompt
            mask_UP[row, length - prompt.size :] = 1
        return (
            torch.from_numpy(ids_UP).to(self._device),
            torch.from_numpy(mask_UP).to(self._device),
        )

    def _forward(
        self,
        ids_BN: torch.Tensor,
        mask_BL: torch.Tensor,
        positions_BN: torch.Tensor,
        cache: DynamicCache | None,
    ) -> torch.Tensor:
        """Logits [B, V] after the last token, in the model's dtype."""
        self._watchdog.beat()
        # As an index, not as a number: a number makes a strided slice of the hidden states, and
        # torch then multiplies by the whole output matrix copied once per row.
        last = torch.full((1,), ids_BN.shape[1] - 1, device=ids_BN.device)
        output = self._model(
            input_ids=ids_BN,
            attention_mask=mask_BL,
            position_ids=positions_BN,
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=last,
        )
        return output.logits[:, -1]

    def _sample(
        self,
        prompts: Sequence[np.ndarray],
        seeds_B: np.ndarray,
        settings: SamplingSettings,
        version: int,
    ) -> list[Rollout]:
        """Completions of one batch, in its order."""
        unique, source_B = self._distinct(prompts)
        ids_UP, mask_UP = self._pad(unique)
        cache = _new_cache(self._model.config)
        logits_UV = self._forward(ids_UP, mask_UP, _positions(mask_UP), cache)

        rows_B = torch.from_numpy(source_B).to(self._device)
        logits_RV, mask_RL = logits_UV[rows_B], mask_UP[rows_B]
        if len(unique) < len(prompts):
            cache.batch_select_indices(rows_B)
        position_R = mask_RL.sum(dim=-1)
        count, limit = len(prompts), settings.max_new_tokens
        tokens_BT = np.zeros((count, limit), dtype=np.int32)
        logprobs_BT = np.zeros((count, limit), dtype=np.float32)
        length_B = np.full(count, limit)
        stopped_B = np.zeros(count, dtype=np.bool_)
        matcher = self._stop_matcher(settings.stop, count)
        # Rows still running, by their index in the batch; what ends in R holds these rows alone.
        alive_R = np.arange(count)
        for step in range(limit):
            token_R, logprob_R = draw(
                logits_RV,
                seeds_B[alive_R],
                np.full(len(alive_R), step, dtype=np.uint64),
                temperature=settings.temperature,
                top_k=settings.top_k,
                top_p=settings.top_p,
                min_p=settings.min_p,
            )
            tokens_BT[alive_R, step] = token_R
            logprobs_BT[alive_R, step] = logprob_R
            done_R = np.isin(token_R, settings.stop_token_ids)
            if matcher is not None:
                done_R |= matcher.push(alive_R, token_R)
            length_B[alive_R[done_R]] = step + 1
            stopped_B[alive_R[done_R]] = True
            if step + 1 == limit:
                break
            if done_R.any():
                keep_R = _close_gaps(~done_R)
                if keep_R.size == 0:
                    break
                alive_R, token_R = alive_R[keep_R], token_R[keep_R]
                keep = torch.from_numpy(keep_R).to(self._device)
                cache.batch_select_indices(keep)
                mask_RL, position_R = mask_RL[keep], position_R[keep]
            mask_RL = torch.cat([mask_RL, mask_RL.new_ones(len(mask_RL), 1)], dim=-1)
            ids_R1 = torch.from_numpy(token_R.astype(np.int64)[:, None]).to(self._device)
            logits_RV = self._forward(ids_R1, mask_RL, position_R[:, None], cache)
            position_R = position_R + 1

        return [
            Rollout(
                token_ids=tokens_BT[row, :length].copy(),
                logprobs=logprobs_BT[row, :length].copy(),
                finish_reason="stop" if stopped_B[row] else "length",
                weight_version=version,
            )
            for row, length in enumerate(length_B)
        ]

    def _stop_matcher(self, stop: Sequence[str], rows: int) -> _bridge.StopMatcher | None:
        if not stop:
            return None
        assert self._tokens is not None
        return _bridge.StopMatcher(self._tokens, [text.encode() for text in stop], rows)


def _grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' SDPA, but for one new token: query [B, H, 1, D], keys and values [B, K, L, D].

    The H / K heads that share a key are then given as so many queries of one head.  transformers
    copies keys and values for each of them instead, the whole cache for every token, which takes
    three times as long as the attention itself.
    """
    rows, heads, length, width = query.shape
    shared = key.shape[1]
    by_head = attention_mask is not None and attention_mask.shape[1] > 1
    if length > 1 or heads == shared or by_head or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    grouped = query.reshape(rows, shared, heads // shared, width)
    output = scaled_dot_product_attention(
        grouped, key, value, attn_mask=attention_mask, scale=scaling
    )
    return output.reshape(rows, 1, heads, value.shape[-1]), None


AttentionInterface.register(_GROUPED_ATTENTION, _grouped_attention)
AttentionMaskInterface.register(_GROUPED_ATTENTION, sdpa_mask)


class _RoomyLayer(DynamicLayer):
    """A cache layer with spare room: a step writes one token instead of copying the whole layer.

    ``keys`` and ``values`` stay views of what is filled, so everything that reads them holds.
    """

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._buffers = (_roomy(key_states), _roomy(value_states))
            self._show(len(key_states), key_states.shape[-2])
            return self.keys, self.values
        filled = self.keys.shape[-2]
        end = filled + key_states.shape[-2]
        if end > self._buffers[0].shape[-2]:
            self._buffers = (_roomy(self.keys), _roomy(self.values))
        rows = len(key_states)
        self._buffers[0][:rows, :, filled:end] = key_states
        self._buffers[1][:rows, :, filled:end] = value_states
        self._show(rows, end)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if not self.is_initialized:
            return  # a layer that uses another one's keys
        rows, filled = len(indices), self.keys.shape[-2]
        if rows > len(self.keys):
            self._buffers = (_roomy(self.keys[indices]), _roomy(self.values[indices]))
        else:
            # See _close_gaps: only rows that fill a gap move.
            moved = (indices != torch.arange(rows, device=indices.device)).nonzero()[:, 0]
            if moved.numel():
                for buffer in self._buffers:
                    buffer[moved, :, :filled] = buffer[indices[moved], :, :filled]
        self._show(rows, filled)

    def _show(self, rows: int, filled: int) -> None:
        self.keys = self._buffers[0][:rows, :, :filled]
        self.values = self._buffers[1][:rows, :, :filled]


def _roomy(states: torch.Tensor) -> torch.Tensor:
    """``states`` [B, H, L, D] at the start of a buffer with room for more tokens."""
    rows, heads, length, width = states.shape
    buffer = states.new_empty(rows, heads, length + _ROOM, width)
    buffer[:, :, :length] = states
    return buffer


def _new_cache(config: Any) -> DynamicCache:
    cache = DynamicCache(config=config)
    # Sliding windows and recurrent states keep transformers' own layers.
    cache.layers = [_RoomyLayer() if type(x) is DynamicLayer else x for x in cache.layers]
    return cache


def _close_gaps(keep_R: np.ndarray) -> np.ndarray:
    """Indices of the kept rows, arranged so that as few as possible change their place.

    Kept rows among the first n = keep.sum() stay where they are, and each gap there takes one of
    the kept rows behind: [1, 0, 1, 1, 0] gives [0, 3, 2].
    """
    rows = np.arange(len(keep_R))
    count = int(keep_R.sum())
    arranged = rows[:count].copy()
    arranged[~keep_R[:count]] = rows[count:][keep_R[count:]]
    return arranged


def _place(parameter: torch.Tensor, tensor: torch.Tensor) -> None:
    parameter.copy_(tensor)


def _adapter_tensors(peft_model: Any, name: str) -> dict[str, torch.Tensor]:
    """The model's own tensors of adapter ``name``, under the names that PEFT saves."""
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(peft_model, adapter_name=name, save_embedding_layers=False)


def _positions(mask_UP: torch.Tensor) -> torch.Tensor:
    """Position of each token in its own prompt; padding gets 0, which nothing attends to."""
    return (mask_UP.cumsum(dim=-1) - 1).clamp_(min=0)
