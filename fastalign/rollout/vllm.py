"""vLLM in the trainer's process: the one module that calls vLLM.

Its interface moves from release to release.  Used here are ``LLM.generate``, ``SamplingParams``,
``sleep``, ``wake_up``, ``reset_prefix_cache`` and ``collective_rpc`` with methods called by name:
vLLM's ``add_lora``, ``remove_lora`` and ``reload_weights``, and those of
:class:`fastalign.rollout.vllm_worker.WorkerExtension`.
"""

from __future__ import annotations

import gc
import json
import logging
import math
import os
import random
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from fastalign.config import RolloutConfig
from fastalign.rollout.engine import (
    EngineError,
    PromptTokens,
    Rollout,
    SamplingSettings,
    SyncReport,
    check_prompts,
    check_stop,
)
from fastalign.rollout.sync import Fingerprint, digest, fingerprint, verify

# vLLM accepts these maximal ranks alone.
_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# One step on a CPU has to hold a whole prompt (see _engine_arguments), and is slow below this.
_MIN_BATCHED_TOKENS = 4096
_ADAPTER_TENSOR = re.compile(
    r"^(?:base_model\.model\.)?(?P<module>.+)\."
    r"(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B)(?:\.weight)?$"
)


_log = logging.getLogger(__name__)

_CLOSED = "it was closed"

# Every engine that vLLM started.  One that Python collects takes the default process group with it,
# which is the trainer's, and the groups of every other engine.  So their shells stay until the
# process ends; close() empties them.
_started: list[Any] = []


@dataclass(frozen=True)
class _Adapter:
    """A loaded adapter: its request, version, and what its content has to be."""

    request: Any
    version: int
    sent: Mapping[str, Fingerprint]
    shapes: Mapping[str, torch.Size]


class VllmEngine:
    """Samples with vLLM, one engine per rank, inside the rank's own process.

    What a transfer proves.  Every tensor is checked by content against the engine's own parameters,
    also where vLLM has fused several into one.  On the CPU backend matrices are repacked and cannot
    be read: there 16 columns of each, others at each transfer, are read through the very product
    that the engine computes with.  What vLLM renames or regroups (expert layers, some multimodal
    models) is known to have reached its loader, and a log line counts it; that the engine computes
    with those is what :func:`fastalign.rollout.sync.canary` shows.  Adapters are read back from the
    slots that requests are answered from.

    After a failed transfer the engine refuses to sample until a whole one succeeds.  A tensor that
    vLLM's own loader stops at (of another shape, or for a layer that vLLM does not know) ends the
    engine, as does a failed call: its state is unknown then.
    """

    name = "vllm"

    def __init__(
        self,
        model_path: str | Path,
        config: RolloutConfig,
        *,
        dtype: torch.dtype,
        max_model_len: int,
        lora_rank: int | None = None,
        max_adapters: int = 2,
        seed: int = 0,
        world_size: int = 1,
        revision: str | None = None,
        trust_remote_code: bool = False,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        """Start vLLM on this rank's device.

        With several ranks this is collective, and needs torchrun's environment (RANK, LOCAL_RANK,
        WORLD_SIZE, MASTER_ADDR, MASTER_PORT) and the default process group.  With one rank vLLM
        makes a default process group if there is none, which the trainer then shares.

        The process is left as it was found: environment (but for ``VLLM_*``), global random states
        and ``torch.set_num_threads``, all of which vLLM changes.

        Args:
            model_path: model folder or hub name; its tokenizer is not needed.
            dtype: of parameters and arithmetic.
            max_model_len: most tokens of prompt and completion together.
            lora_rank: largest rank of an adapter; None: the engine takes full weights alone.
            max_adapters: most adapters at once.
            seed: of vLLM's own random state; requests bring theirs.
            world_size: ranks of the run.
            tokenizer: the model's; vLLM loads the same for stop strings.  None: it takes none.

        Raises:
            EngineError: several ranks without a process group, or vLLM does not start.
        """
        if world_size > 1 and not torch.distributed.is_initialized():
            raise EngineError(
                f"{world_size} ranks have no process group: call deepspeed.init_distributed() or "
                "torch.distributed.init_process_group() before the engine is made"
            )
        _set_environment()
        try:
            with _process_state_kept():
                from vllm import LLM
                from vllm.lora.request import LoRARequest
                from vllm.platforms import current_platform

                self._on_cpu = current_platform.is_cpu()
                arguments = _engine_arguments(config, max_model_len, self._on_cpu)
                if world_size > 1:
                    arguments["distributed_executor_backend"] = "external_launcher"
                if tokenizer is not None:
                    arguments |= {
                        "skip_tokenizer_init": False,
                        "tokenizer": tokenizer.name_or_path,
                        "tokenizer_revision": revision,
                    }
                if lora_rank is not None:
                    arguments |= {
                        "enable_lora": True,
                        "max_loras": max_adapters,
                        "max_lora_rank": _allowed_rank(lora_rank),
                    }
                self._llm = LLM(
                    str(model_path),
                    dtype=str(dtype).removeprefix("torch."),
                    seed=seed,
                    revision=revision,
                    trust_remote_code=trust_remote_code,
                    **arguments,
                )
        except Exception as error:
            raise EngineError(f"vLLM did not start: {type(error).__name__}: {error}") from error
        _started.append(self._llm)
        self._request_type = LoRARequest
        self._dtype = dtype
        self._has_tokenizer = tokenizer is not None
        self.max_model_len = max_model_len
        self.prompt_tokens = PromptTokens()
        self._max_adapters = max_adapters if lora_rank is not None else 0
        self._vocab_size = self._llm.model_config.get_vocab_size()
        self._folder = tempfile.TemporaryDirectory(prefix="fastalign-adapters-")
        self._adapters: dict[str, _Adapter] = {}
        self._last_id = 0
        self._version = 0
        # Why nothing can be sampled: for good, and until the next transfer.
        self._dead: str | None = None
        self._stale: str | None = None
        self._asleep = False
        self._kv_cache_asleep = False

    def generate(
        self,
        prompts: Sequence[np.ndarray],
        settings: SamplingSettings,
        seeds: Sequence[int],
        adapter: str | None = None,
    ) -> list[Rollout]:
        """Sample one completion for each prompt; see :class:`RolloutEngine`.

        vLLM repeats a whole call bitwise for the same prompts, seeds and weights.  Half of a call
        may give other tokens, because the rounding of batched products depends on the batch.

        It keeps all tokens whose logits equal the last one of top-k, where the embedded engine goes
        by the token id, and reads stop strings from whole characters: a token that completes one
        and begins another character ends the completion when that character is whole.
        """
        from vllm import SamplingParams

        self._check_usable(adapter)
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts have {len(seeds)} seeds: each wants one")
        check_prompts(prompts, settings.max_new_tokens, self.max_model_len, self._vocab_size)
        check_stop(settings, self._has_tokenizer)
        params = [
            SamplingParams(
                max_tokens=settings.max_new_tokens,
                temperature=settings.temperature,
                top_p=settings.top_p,
                top_k=settings.top_k,
                min_p=settings.min_p,
                seed=seed,
                stop=list(settings.stop),
                stop_token_ids=list(settings.stop_token_ids),
                # The model's own end tokens are not ours to add: the settings name all.
                ignore_eos=True,
                logprobs=0,
                flat_logprobs=True,
                # Stop strings are found in the text.
                detokenize=bool(settings.stop),
            )
            for seed in seeds
        ]
        version = self._version if adapter is None else self._adapters[adapter].version
        return [_rollout(output, version) for output in self._run(prompts, params, adapter)]

    def next_logprobs(
        self,
        prompts: Sequence[np.ndarray],
        token_ids: Sequence[int],
        adapter: str | None = None,
    ) -> np.ndarray:
        """float32 [len(prompts), len(token_ids)]; see :class:`RolloutEngine`."""
        from vllm import SamplingParams

        self._check_usable(adapter)
        # One token is sampled beside the scores.
        check_prompts(prompts, 1, self.max_model_len, self._vocab_size)
        wanted = [int(token) for token in token_ids]
        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            ignore_eos=True,
            logprob_token_ids=wanted,
            flat_logprobs=True,
            detokenize=False,
        )
        result = np.empty((len(prompts), len(wanted)), dtype=np.float32)
        if not wanted:
            return result
        for row, output in enumerate(self._run(prompts, params, adapter)):
            scores = output.logprobs
            # The sampled token comes first, then those asked for in their order.
            if list(scores.token_ids[1:]) != wanted:
                raise EngineError(
                    f"vLLM scored the tokens {list(scores.token_ids[1:])} where {wanted} were asked"
                )
            result[row] = scores.logprobs[1:]
        return result

    def load_weights(
        self, tensors: Iterable[tuple[str, torch.Tensor]], names: frozenset[str], version: int
    ) -> SyncReport:
        """Replace the base weights; adapters are loaded and verified again on top of them.

        An engine that sleeps has to be woken first.

        ``tensors`` is consumed to its end even after a bad one, because other ranks may take part
        in it; a tensor may be changed or freed once the next one is asked for.

        Raises:
            EngineError: see :class:`RolloutEngine`.
        """
        self._check_awake()
        start = time.perf_counter()
        self._stale = f"the transfer of version {version} did not finish"
        # Should the transfer stop halfway, layers are left without parameters, and vLLM cannot
        # begin anew from there.
        self._dead = self._stale
        (transfer,) = self._llm.collective_rpc(
            "fastalign_load_weights", args=(tensors, names, version)
        )
        if transfer.error is not None:
            self._dead = transfer.error
            raise EngineError(transfer.error)
        self._dead = None
        # Content where it can be read; where not, that the tensor came at all.
        verify(transfer.sent, transfer.sent | transfer.held, names)
        verify(
            transfer.columns_sent,
            transfer.columns_sent | transfer.columns_held,
            frozenset(transfer.columns_sent),
        )
        if transfer.unsent and not transfer.unread:
            raise EngineError(
                f"{len(transfer.unsent)} parameters of the engine got no tensor, the first: "
                f"{transfer.unsent[0]}"
            )
        if transfer.unread:
            _log.info(
                "%d of %d tensors reached vLLM's loader but cannot be read back, %s first",
                len(transfer.unread),
                len(transfer.sent),
                transfer.unread[0],
            )
        for adapter in self._adapters.values():
            self._send_adapter(adapter)
        if self._kv_cache_asleep:
            self._llm.wake_up(["kv_cache"])
            self._kv_cache_asleep = False
        self._reset_prefix_cache()
        self._stale = None
        self._version = version
        return SyncReport(
            version,
            len(transfer.sent),
            transfer.bytes,
            time.perf_counter() - start,
            digest(transfer.sent),
        )

    def load_adapter(
        self,
        name: str,
        tensors: Mapping[str, torch.Tensor],
        config: Mapping[str, Any],
        version: int,
    ) -> SyncReport:
        """Replace the LoRA adapter ``name``; requests running under its old version are over.

        Each version has a number and a name of its own, because vLLM's prefix cache is keyed by
        them.  The scale alpha / r is multiplied into the B matrices in float32 before they are
        rounded to the engine's dtype, so the file holds the very bits that the engine has to.

        Raises:
            EngineError: the adapter is none that vLLM computes exactly (DoRA, trained modules,
                ...), too many are loaded, or the engine holds something else than was sent.
        """
        self._check_awake()
        start = time.perf_counter()
        if name not in self._adapters and len(self._adapters) == self._max_adapters:
            raise EngineError(
                f"adapter {name!r} has no room beside {sorted(self._adapters)}: the engine was "
                f"made for {self._max_adapters}"
            )
        folded = _folded(name, tensors, config, self._dtype)
        self._last_id += 1
        folder = Path(self._folder.name) / str(self._last_id)
        _write_adapter(folder, folded)
        old = self._adapters.pop(name, None)
        if old is not None:
            self._remove_adapter(old)
        adapter = _Adapter(
            request=self._request_type(f"{name}-{self._last_id}", self._last_id, str(folder)),
            version=version,
            sent={key: fingerprint(tensor) for key, tensor in folded.items()},
            shapes={key: tensor.shape for key, tensor in folded.items()},
        )
        try:
            self._send_adapter(adapter)
        except EngineError:
            # It would take the place of a good one.
            self._remove_adapter(adapter)
            raise
        self._adapters[name] = adapter
        size = sum(tensor.numel() * tensor.element_size() for tensor in folded.values())
        seconds = time.perf_counter() - start
        return SyncReport(version, len(folded), size, seconds, digest(adapter.sent))

    def sleep(self) -> None:
        """Give up device memory; on a CPU drop the prefix cache, all else being shared anyway.

        An engine made for adapters keeps its base in host memory (vLLM's level 1).  One made for
        full weights drops everything (level 2), because the next transfer replaces it:
        after :meth:`wake` it refuses to sample until :meth:`load_weights`.
        """
        self._check_alive()
        if self._asleep:
            return
        self._asleep = True
        self._reset_prefix_cache()
        if self._on_cpu:
            return
        if self._max_adapters:
            self._llm.sleep(level=1)
        else:
            self._llm.sleep(level=2)
            self._kv_cache_asleep = True
            self._stale = "sleep dropped them"

    def wake(self) -> None:
        """Take the memory back.

        After a level 2 sleep only the weights' memory comes back; the key-value cache follows when
        :meth:`load_weights` has filled them, so a gathered model and the cache never meet.
        """
        self._check_alive()
        if not self._asleep:
            return
        self._asleep = False
        if self._on_cpu:
            return
        if self._max_adapters:
            self._llm.wake_up()
            self._reset_prefix_cache()
        else:
            self._llm.wake_up(["weights"])

    def close(self) -> None:
        """Drop the model and the cache; the process group stays."""
        if self._dead != _CLOSED:
            self._dead = _CLOSED
            self._llm.collective_rpc("shutdown")
            self._llm = None
            self._adapters = {}
            self._folder.cleanup()
            gc.collect()

    def _check_alive(self) -> None:
        if self._dead is not None:
            raise EngineError(f"the vLLM engine cannot be used any more: {self._dead}")

    def _check_awake(self) -> None:
        self._check_alive()
        if self._asleep:
            raise EngineError("the vLLM engine sleeps: wake it first")

    def _check_usable(self, adapter: str | None) -> None:
        self._check_awake()
        if self._stale is not None:
            raise EngineError(f"the vLLM engine holds no known weights: {self._stale}")
        if adapter is not None and adapter not in self._adapters:
            raise EngineError(f"no adapter {adapter!r} is loaded: {sorted(self._adapters)} are")

    def _run(self, prompts: Sequence[np.ndarray], params: Any, adapter: str | None) -> list[Any]:
        """One completion output per prompt."""
        try:
            outputs = self._llm.generate(
                [{"prompt_token_ids": prompt.tolist()} for prompt in prompts],
                params,
                use_tqdm=False,
                lora_request=None if adapter is None else self._adapters[adapter].request,
            )
        except Exception as error:
            # What was queued may still be, and would be mixed into the next call's answers.
            self._dead = f"a call failed with {type(error).__name__}"
            raise EngineError(f"vLLM failed: {type(error).__name__}: {error}") from error
        for prompt, output in zip(prompts, outputs, strict=True):
            self.prompt_tokens.total += prompt.size
            self.prompt_tokens.cached += output.num_cached_tokens or 0
        return [output.outputs[0] for output in outputs]

    def _send_adapter(self, adapter: _Adapter) -> None:
        try:
            (held,) = self._llm.collective_rpc(
                "fastalign_load_adapter", args=(adapter.request, adapter.shapes)
            )
        except Exception as error:
            raise EngineError(
                f"vLLM did not load the adapter {adapter.request.lora_name}: "
                f"{type(error).__name__}: {error}"
            ) from error
        verify(adapter.sent, held, frozenset(adapter.sent))

    def _remove_adapter(self, adapter: _Adapter) -> None:
        self._llm.collective_rpc("remove_lora", args=(adapter.request.lora_int_id,))
        shutil.rmtree(adapter.request.lora_path)

    def _reset_prefix_cache(self) -> None:
        if not self._llm.reset_prefix_cache():
            raise EngineError("vLLM did not reset its prefix cache: requests are still running")


def _rollout(output: Any, version: int) -> Rollout:
    if output.finish_reason not in ("stop", "length"):
        raise EngineError(f"vLLM ended a completion with {output.finish_reason!r}")
    tokens = np.asarray(output.token_ids, dtype=np.int32)
    if list(output.logprobs.token_ids) != list(output.token_ids):
        raise EngineError("vLLM's log-probs belong to other tokens than it sampled")
    return Rollout(
        token_ids=tokens,
        logprobs=np.asarray(output.logprobs.logprobs, dtype=np.float32),
        finish_reason=output.finish_reason,
        weight_version=version,
    )


def _engine_arguments(config: RolloutConfig, max_model_len: int, on_cpu: bool) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "tensor_parallel_size": 1,
        "enforce_eager": config.enforce_eager,
        "max_model_len": max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "enable_prefix_caching": True,
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "use_tqdm_on_load": False,
        "worker_extension_cls": "fastalign.rollout.vllm_worker.WorkerExtension",
    }
    if on_cpu:
        return arguments | {
            "kv_cache_memory_bytes": int(config.kv_cache_gib * 2**30),
            # A seeded request whose prompt is computed in chunks dies on the CPU backend: "CPU
            # Generator does not use offset".  Whole prompts need steps at least as long.
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(max_model_len, _MIN_BATCHED_TOKENS),
        }
    return arguments | {
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "enable_sleep_mode": True,
    }


def _allowed_rank(rank: int) -> int:
    for allowed in _LORA_RANKS:
        if rank <= allowed:
            return allowed
    raise EngineError(f"LoRA rank {rank}: vLLM takes at most {_LORA_RANKS[-1]}")


def _set_environment() -> None:
    """What vLLM reads from the environment, before it is imported."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    # Binding threads to cores would bind the trainer's, which are the same.
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    # It would override the recipe's kv_cache_gib.
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
    # Below errors vLLM comments on every choice that is made here on purpose.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


@contextmanager
def _process_state_kept() -> Iterator[None]:
    """Undo what importing and starting vLLM does to the process.

    It seeds every global random state, on the CPU replaces torch.set_num_threads by a function that
    does nothing, sets LOCAL_WORLD_SIZE to 1 under torchrun, and puts libraries into LD_PRELOAD and
    LD_LIBRARY_PATH, which child processes would inherit.
    """
    environment = dict(os.environ)
    set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
    python_state, numpy_state = random.getstate(), np.random.get_state()
    torch_state = torch.get_rng_state()
    device_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        for key in os.environ.keys() | environment.keys():
            if key.startswith("VLLM_"):
                continue
            if key in environment:
                os.environ[key] = environment[key]
            else:
                del os.environ[key]
        torch.set_num_threads = set_num_threads
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        if device_states:
            torch.cuda.set_rng_state_all(device_states)


def _folded(
    name: str,
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    """The adapter's tensors in the engine's dtype, on the CPU, with the scale inside B.

    Raises:
        EngineError: a tensor or an option that is no plain LoRA's.
    """
    if config.get("peft_type") != "LORA":
        raise EngineError(f"adapter {name!r} is of type {config.get('peft_type')}: LoRA is taken")
    for option in ("layer_replication", "alora_invocation_tokens", "use_bdlora", "use_qalora"):
        if config.get(option):
            raise EngineError(f"adapter {name!r} uses {option}: vLLM does not compute it")
    folded: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        match = _ADAPTER_TENSOR.match(key)
        if match is None:
            raise EngineError(
                f"adapter {name!r} holds {key}: vLLM computes A and B matrices alone, no DoRA, "
                "biases or trained modules"
            )
        tensor = tensor.detach()
        if match["part"] in ("lora_B", "lora_embedding_B"):
            tensor = tensor.float() * _scale(config, match["module"], tensor.shape[1])
        folded[key] = tensor.to(device="cpu", dtype=dtype, copy=True).contiguous()
    return folded


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA, as PEFT picks them for a module."""
    from peft.utils.other import get_pattern_key

    pattern = config.get("alpha_pattern") or {}
    alpha = pattern.get(get_pattern_key(pattern.keys(), module), config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _write_adapter(folder: Path, folded: Mapping[str, torch.Tensor]) -> None:
    """Write PEFT's two files, with a scale of 1 for every module."""
    ranks: dict[str, int] = {}
    for key, tensor in folded.items():
        match = _ADAPTER_TENSOR.match(key)
        assert match is not None
        if match["part"] in ("lora_A", "lora_embedding_A"):
            ranks[match["module"]] = tensor.shape[0]
    largest = max(ranks.values())
    other = {re.escape(module): rank for module, rank in ranks.items() if rank != largest}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": other,
        "alpha_pattern": other,
        "target_modules": sorted({module.rpartition(".")[2] for module in ranks}),
        "bias": "none",
    }
    folder.mkdir()
    save_file(dict(folded), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
