"""vLLM in the trainer's process: the one module that calls vLLM.

Its interface moves from release to release.  Used here are ``LLM.generate``, ``SamplingParams``,
``sleep``, ``wake_up``, ``reset_prefix_cache`` and ``collective_rpc`` with methods called by name:
vLLM's ``add_lora``, ``remove_lora`` and ``reload_weights``, and those of
:class:`fastalign.rollout.vllm_worker.WorkerExtension`.
"""

from __future__ import annotations

import gc
import glob
import hashlib
import io
import logging
import os
import random
import shutil
import tempfile
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from fastalign import ranks
from fastalign.config import ConfigError, RolloutConfig
from fastalign.rollout.adapters import allowed_rank, fold, write_adapter
from fastalign.rollout.engine import (
    CLOSED,
    Adapter,
    EngineError,
    EngineFault,
    Rollout,
    RolloutEngine,
    SamplingSettings,
    ServedModel,
    SyncReport,
)
from fastalign.rollout.sync import Fingerprint, digest, fingerprint, verify
from fastalign.rollout.vllm_worker import Transfer
from fastalign.rollout.watchdog import Watchdog

# One step on a CPU has to hold a whole prompt (see engine_arguments), and is slow below this.
_MIN_BATCHED_TOKENS = 4096

# oneDNN keeps the code that it made for each shape of a product, the last 1024 by default, and
# prompts of ever other lengths bring new ones: 100 MiB over some hundred steps.  vLLM itself keeps
# those of 32 numbers of rows for each matrix; beyond that it is enough that layers share them.
ONEDNN_CACHE = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}

# Names that can have an adapter at once: the policy, and a judge or an earlier policy.
MAX_ADAPTERS = 2

# A rank of an engine waits for the others, which may be judging.
_PATIENCE = timedelta(hours=2)

_log = logging.getLogger(__name__)

# Every engine that vLLM started.  One that Python collects takes the default process group with it,
# which is the trainer's, and the groups of every other engine.  So their shells stay until the
# process ends; close() empties them.
_started: list[Any] = []


@dataclass(frozen=True)
class _Adapter(Adapter):
    """A loaded adapter: its request, and what its content has to be on this rank."""

    request: Any
    sent: Mapping[str, Fingerprint]
    shapes: Mapping[str, torch.Size]


class _Ranks:
    """The ranks that run one engine together: ``size`` neighbours, as vLLM groups them."""

    def __init__(self, size: int) -> None:
        """Collective over all ranks of the run."""
        self._group: dist.ProcessGroup | None = None
        if size > 1:
            self._group, _ = dist.new_subgroups(size, backend="gloo", timeout=_PATIENCE)
        self.index = 0 if self._group is None else dist.get_rank(self._group)

    @property
    def shared(self) -> bool:
        return self._group is not None

    def shared_memory(self) -> list[Path]:
        """What vLLM's CPU backend joins them through.  Under torchrun it is named after the ranks'
        numbers alone, alike in every run of a machine, and stays when a run is killed."""
        if self._group is None:
            return []
        ranks = "-".join(map(str, dist.get_process_group_ranks(self._group)))
        return sorted(Path("/dev/shm").glob("*tp:*" + glob.escape(f"-[{ranks}]-cpushm_") + "*"))

    def gather(self, mine: Any) -> list[Any]:
        """What each of them has."""
        return [mine] if self._group is None else ranks.gather(mine, self._group)


class VllmAnswers(RolloutEngine):
    """What engines ask of vLLM, in whatever process, and how they read its answers.

    A whole call repeats bitwise for the same prompts, seeds and weights.  Half of a call may give
    other tokens, because the rounding of batched products depends on the batch; so may a call on
    another number of ranks.

    On a CPU, inside the trainer's process, tokens are drawn as the embedded engine draws them.
    Elsewhere vLLM draws with numbers of its own, and keeps all tokens whose logits equal the last
    one of top-k.  It reads stop strings from whole characters: a token that completes one and
    begins another character ends the completion when that character is whole.
    """

    # Beside the scores.
    _scoring_tokens = 1
    _max_adapters: int

    def _generate(
        self,
        prompts: Sequence[np.ndarray],
        settings: SamplingSettings,
        seeds: Sequence[int],
        adapter: str | None,
    ) -> list[Rollout]:
        version = self._version_of(adapter)
        answers = self._ask(prompts, sampling_arguments(settings), list(seeds), adapter)
        with self._reading():
            return [_rollout(answer, version) for answer in answers]

    def _next_logprobs(
        self, prompts: Sequence[np.ndarray], token_ids: list[int], adapter: str | None
    ) -> np.ndarray:
        settings, seeds = scoring_arguments(token_ids), [None] * len(prompts)
        answers = self._ask(prompts, settings, seeds, adapter)
        result = np.empty((len(prompts), len(token_ids)), dtype=np.float32)
        with self._reading():
            for row, answer in enumerate(answers):
                # The sampled token comes first, then those asked for in their order.
                if answer["scored_ids"][1:] != token_ids:
                    raise ValueError(f"it scored {answer['scored_ids'][1:]}, not {token_ids}")
                result[row] = answer["logprobs"][1:]
        return result

    @abstractmethod
    def _ask(
        self,
        prompts: Sequence[np.ndarray],
        settings: Mapping[str, Any],
        seeds: Sequence[int | None],
        adapter: str | None,
    ) -> list[dict[str, Any]]:
        """What :func:`plain_answer` makes of vLLM's for each prompt; see :meth:`_counted`."""

    def _counted(
        self, prompts: Sequence[np.ndarray], answers: list[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """The answers, once the tokens of their prompts are counted."""
        with self._reading():
            self.prompt_tokens.cached += sum(answer["cached"] for answer in answers)
        self.prompt_tokens.total += sum(prompt.size for prompt in prompts)
        return answers

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Inside the block, an answer that is not what an answer looks like is a failure."""
        try:
            yield
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            why = f"an answer that is none: {type(error).__name__}: {_line(error)}"
            raise self._failed(why) from None

    def _check_room(self, name: str) -> None:
        if name not in self._adapters and len(self._adapters) == self._max_adapters:
            raise EngineError(
                f"adapter {name!r} has no room beside {sorted(self._adapters)}: the engine was "
                f"made for {self._max_adapters}"
            )


class VllmEngine(VllmAnswers):
    """Samples with vLLM, inside the process of each rank that it runs on.

    With ``rollout.tensor_parallel_size`` T one engine runs on T neighbouring ranks, each with its
    part of every layer.  vLLM does the same work in each of them, and expects the same calls with
    the same prompts there: so the prompts of all T ranks are put together into one call, in the
    order of the ranks, its answers are compared between them, and each rank takes its own.

    What a transfer proves.  Every tensor is checked by content against the engine's own parameters,
    also where vLLM has fused several into one.  On the CPU backend matrices are repacked and cannot
    be read: there 16 columns of each, others at each transfer, are read through the very product
    that the engine computes with.  What vLLM renames or regroups (expert layers, some multimodal
    models) is known to have reached its loader, and a log line counts it; that the engine computes
    with those is what :func:`fastalign.rollout.sync.canary` shows.  Adapters are read back from the
    slots that requests are answered from.

    After a failed transfer the engine refuses to sample until a whole one succeeds.  A tensor that
    vLLM's own loader stops at (of another shape, or for a layer that vLLM does not know) ends the
    engine, as does a failed call: its state is unknown then.  It is not started anew: that would be
    another try in the same process, with the same memory, device context and process groups.  One
    that hangs ends the process, see :class:`fastalign.rollout.watchdog.Watchdog`.
    """

    name = "vllm"
    _called = "the vLLM engine"

    def __init__(self, model: ServedModel, config: RolloutConfig, world_size: int = 1) -> None:
        """Start vLLM on this rank's device.

        With several ranks this is collective over all of them, and needs torchrun's environment
        (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) and the default process group.
        With one rank vLLM makes a default process group if there is none, which the trainer then
        shares.

        The process is left as it was found: environment (but for ``VLLM_*``), global random states
        and ``torch.set_num_threads``, all of which vLLM changes.

        Args:
            model: what it holds; a tokenizer is loaded anew, by its name.
            world_size: ranks of the run, a multiple of ``config.tensor_parallel_size``.

        Raises:
            ConfigError: NF4 in float32, which vLLM does not have.
            EngineError: several ranks without a process group, or vLLM does not start.
        """
        super().__init__(model.max_model_len, model.tokenizer is not None)
        if model.load_in_4bit and model.dtype == torch.float32:
            raise ConfigError(
                "rollout.dtype: vLLM computes with NF4 in half precision alone; set it to "
                "bfloat16, or rollout.engine to 'hf'"
            )
        if world_size > 1 and not torch.distributed.is_initialized():
            raise EngineError(
                f"{world_size} ranks have no process group: call deepspeed.init_distributed() or "
                "torch.distributed.init_process_group() before the engine is made"
            )
        self._ranks = _Ranks(config.tensor_parallel_size)
        if left := [
            path for part in self._ranks.gather(self._ranks.shared_memory()) for path in part
        ]:
            raise EngineError(
                f"{left[0]} is in the way of an engine on several ranks: a run that was killed "
                "while it started left it (remove it), or one starts now (wait for it)"
            )
        _set_environment()
        try:
            with process_state_kept():
                # Read once, when vLLM's oneDNN makes its first product.
                for name, value in ONEDNN_CACHE.items():
                    os.environ.setdefault(name, value)
                from vllm import LLM
                from vllm.lora.request import LoRARequest
                from vllm.platforms import current_platform

                self._on_cpu = current_platform.is_cpu()
                arguments = engine_arguments(model, config, self._on_cpu)
                if world_size > 1:
                    arguments["distributed_executor_backend"] = "external_launcher"
                if model.load_in_4bit:
                    # Quantised while it is loaded, from the numbers of the checkpoint and with
                    # double quantisation, as load_nf4 does.
                    arguments["quantization"] = "bitsandbytes"
                self._llm = LLM(**arguments)
        except Exception as error:
            raise EngineError(f"vLLM did not start: {type(error).__name__}: {error}") from error
        # All ranks have it now: without a name it goes when they go, whatever ends them.
        for path in self._ranks.shared_memory():
            path.unlink(missing_ok=True)
        _started.append(self._llm)
        if self._on_cpu:
            self._llm.collective_rpc("fastalign_own_sampler")
        self._request_type = LoRARequest
        self._dtype = model.dtype
        self._max_adapters = MAX_ADAPTERS if model.lora_rank is not None else 0
        self._vocab_size = self._llm.model_config.get_vocab_size()
        self._folder = tempfile.TemporaryDirectory(prefix="fastalign-adapters-")
        self._adapters: dict[str, _Adapter] = {}
        self._last_id = 0
        self._kv_cache_asleep = False
        self._watchdog = Watchdog("vLLM", config.timeout_s)

    def all_agree(self, here: bool) -> bool:
        """See :class:`RolloutEngine`."""
        return all(self._ranks.gather(here))

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
        with self._watchdog.watching():
            (transfer,) = self._llm.collective_rpc(
                "fastalign_load_weights", args=(self._watchdog.beats(tensors), names, version)
            )
        if transfer.error is not None:
            self._dead = transfer.error
            raise EngineError(transfer.error)
        self._dead = None
        check_transfer(transfer, names)
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
        self._check_room(name)
        folded = fold(name, tensors, config, self._dtype)
        self._last_id += 1
        folder = Path(self._folder.name) / str(self._last_id)
        write_adapter(folder, folded)
        old = self._adapters.pop(name, None)
        if old is not None:
            self._remove_adapter(old)
        shapes = {key: tensor.shape for key, tensor in folded.items()}
        (cuts,) = self._llm.collective_rpc("fastalign_adapter_cuts", args=(shapes,))
        held = {key: tensor[cuts[key]] for key, tensor in folded.items()}
        adapter = _Adapter(
            request=self._request_type(f"{name}-{self._last_id}", self._last_id, str(folder)),
            version=version,
            sent={key: fingerprint(tensor) for key, tensor in held.items()},
            shapes={key: tensor.shape for key, tensor in held.items()},
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
        with self._calling():
            self._llm.sleep(level=1 if self._max_adapters else 2)
        if not self._max_adapters:
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
        with self._calling():
            self._llm.wake_up(None if self._max_adapters else ["weights"])
        if self._max_adapters:
            self._reset_prefix_cache()

    def close(self) -> None:
        """Drop the model and the cache; the process group stays."""
        if self._dead != CLOSED:
            self._dead = CLOSED
            self._llm.collective_rpc("shutdown")
            self._llm = None
            self._adapters = {}
            self._folder.cleanup()
            gc.collect()

    def _failed(self, why: str) -> EngineError:
        self._dead, text = why, f"vLLM failed: {why}"
        # Others that share the engine may be stuck in it.
        return EngineError(text) if self._ranks.shared else EngineFault(text)

    @contextmanager
    def _calling(self) -> Iterator[None]:
        """What goes wrong in vLLM inside the block ends the engine; what hangs, the process."""
        try:
            with self._watchdog.watching():
                yield
        except EngineFault as error:
            # Raised inside vLLM by our own parts.
            raise self._failed(_line(error)) from error
        except EngineError:
            raise
        except Exception as error:
            # What was queued may still be, and would be mixed into the next call's answers.
            raise self._failed(f"{type(error).__name__}: {_line(error)}") from error

    def _ask(
        self,
        prompts: Sequence[np.ndarray],
        settings: Mapping[str, Any],
        seeds: Sequence[int | None],
        adapter: str | None,
    ) -> list[dict[str, Any]]:
        """By one call with the prompts of all ranks that the engine runs on."""
        from vllm import SamplingParams

        calls = self._ranks.gather(
            (list(prompts), settings, seeds, (adapter, self._version_of(adapter)))
        )
        who = {asked for *_, asked in calls}
        if len(who) > 1:
            raise EngineError(
                "the ranks that share the vLLM engine ask different weights (adapter, version): "
                f"{sorted(who, key=str)}"
            )
        params = [SamplingParams(**common, seed=x) for _, common, part, _ in calls for x in part]
        with self._calling():
            outputs = self._llm.generate(
                [{"prompt_token_ids": x.tolist()} for part, *_ in calls for x in part],
                params,
                use_tqdm=partial(_Progress, self._watchdog.beat),
                lora_request=None if adapter is None else self._adapters[adapter].request,
            )
            answers = [plain_answer(output) for output in outputs]
            if len(calls) > 1:
                self._check_same(answers)
        first = sum(len(part) for part, *_ in calls[: self._ranks.index])
        return self._counted(prompts, answers[first : first + len(prompts)])

    def _check_same(self, answers: Sequence[Mapping[str, Any]]) -> None:
        """The ranks of the engine compute one answer to each prompt, to the bit."""
        found = self._ranks.gather([_answer_hash(answer) for answer in answers])
        for row, hashes in enumerate(zip(*found, strict=True)):
            if len(set(hashes)) > 1:
                self._dead = "its ranks do not compute the same"
                raise EngineError(
                    f"the {len(hashes)} ranks that share the vLLM engine got different answers to "
                    f"prompt {row} of {len(answers)}: they do not hold the same weights, or do not "
                    "run the same kernels"
                )

    def _send_adapter(self, adapter: _Adapter) -> None:
        try:
            with self._watchdog.watching():
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


class _Progress(tqdm):
    """vLLM's progress bar, which shows nothing and tells of each completion that is finished."""

    monitor_interval = 0

    def __init__(self, beat: Callable[[], None], *arguments: Any, **options: Any) -> None:
        self._beat = beat
        super().__init__(*arguments, **options, file=io.StringIO())

    def update(self, n: float | None = 1) -> bool | None:
        self._beat()
        return super().update(n)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _answer_hash(answer: Mapping[str, Any]) -> bytes:
    """Of tokens, log-probs and reason."""
    found = hashlib.blake2b(str(answer["finish_reason"]).encode(), digest_size=8)
    found.update(np.asarray(answer["token_ids"], dtype=np.int32).tobytes())
    found.update(np.asarray(answer["logprobs"], dtype=np.float32).tobytes())
    return found.digest()


def check_transfer(transfer: Transfer, names: frozenset[str]) -> None:
    """Compare what was sent with what the engine then holds.

    Raises:
        EngineError: a tensor is missing, extra or of other content.
    """
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


def sampling_arguments(settings: SamplingSettings) -> dict[str, Any]:
    """What ``SamplingParams`` takes to draw a completion, but for the seed."""
    return {
        "max_tokens": settings.max_new_tokens,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "top_k": settings.top_k,
        "min_p": settings.min_p,
        "stop": list(settings.stop),
        "stop_token_ids": list(settings.stop_token_ids),
        # The model's own end tokens are not ours to add: the settings name all.
        "ignore_eos": True,
        "logprobs": 0,
        "flat_logprobs": True,
        # Stop strings are found in the text.
        "detokenize": bool(settings.stop),
    }


def scoring_arguments(token_ids: Sequence[int]) -> dict[str, Any]:
    """What ``SamplingParams`` takes to score these tokens as the next one."""
    return {
        "max_tokens": 1,
        "temperature": 0.0,
        "ignore_eos": True,
        "logprob_token_ids": list(token_ids),
        "flat_logprobs": True,
        "detokenize": False,
    }


def plain_answer(result: Any) -> dict[str, Any]:
    """What an engine reads of vLLM's output for one prompt, as JSON has it."""
    (output,) = result.outputs
    return {
        "token_ids": list(output.token_ids),
        "scored_ids": list(output.logprobs.token_ids),
        "logprobs": list(output.logprobs.logprobs),
        "finish_reason": output.finish_reason,
        "cached": result.num_cached_tokens or 0,
    }


def _rollout(answer: Mapping[str, Any], version: int) -> Rollout:
    if answer["scored_ids"] != answer["token_ids"]:
        raise ValueError("its log-probs belong to other tokens than it sampled")
    return Rollout(
        token_ids=np.asarray(answer["token_ids"], dtype=np.int32),
        logprobs=np.asarray(answer["logprobs"], dtype=np.float32),
        finish_reason=answer["finish_reason"],
        weight_version=version,
    )


def engine_arguments(model: ServedModel, config: RolloutConfig, on_cpu: bool) -> dict[str, Any]:
    """What vLLM is started with, wherever it runs."""
    arguments: dict[str, Any] = {
        "model": str(model.path),
        "dtype": str(model.dtype).removeprefix("torch."),
        "seed": model.seed,
        "trust_remote_code": model.trust_remote_code,
        "tensor_parallel_size": config.tensor_parallel_size,
        "enforce_eager": config.enforce_eager,
        "max_model_len": model.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "enable_prefix_caching": True,
        "skip_tokenizer_init": model.tokenizer is None,
        "generation_config": "vllm",
        "use_tqdm_on_load": False,
        "worker_extension_cls": "fastalign.rollout.vllm_worker.WorkerExtension",
    }
    if model.revision is not None:
        arguments["revision"] = model.revision
    if model.tokenizer is not None:
        arguments["tokenizer"] = model.tokenizer.name_or_path
        if model.revision is not None:
            arguments["tokenizer_revision"] = model.revision
    if model.lora_rank is not None:
        arguments |= {
            "enable_lora": True,
            "max_loras": MAX_ADAPTERS,
            "max_lora_rank": allowed_rank(model.lora_rank),
        }
    if on_cpu:
        return arguments | {
            "kv_cache_memory_bytes": int(config.kv_cache_gib * 2**30),
            # A seeded request whose prompt is computed in chunks dies on the CPU backend: "CPU
            # Generator does not use offset".  Whole prompts need steps at least as long.
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(model.max_model_len, _MIN_BATCHED_TOKENS),
        }
    return arguments | {
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "enable_sleep_mode": True,
    }


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
def process_state_kept() -> Iterator[None]:
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
