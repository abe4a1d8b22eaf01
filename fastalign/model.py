"""The trained model: loading, adapters, DeepSpeed, and its weights for the rollout engine."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.integrations import HfDeepSpeedConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from fastalign.attention import leave_uncompiled
from fastalign.config import Config, ConfigError, ModelConfig, check_4bit
from fastalign.gated import keep_less
from fastalign.logprobs import Policy
from fastalign.lora import add_in_one_pass
from fastalign.printing import reason
from fastalign.quantization import load_nf4, scales_of

if not torch.cuda.is_available():
    # Read when DeepSpeed is imported, which otherwise warns about the accelerator it lacks.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
import deepspeed
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus, is_zero_param

logger = logging.getLogger(__name__)

POLICY, REFERENCE = "default", "reference"
# DeepSpeed's operations compile in about twenty seconds on two cores.
LOCK_PATIENCE_S = 60.0
# What an adapter's file says of the base that it was trained on (metadata of safetensors).
BASE_KEY, NF4 = "base_quantization", "nf4"
AnyConfig = TypeVar("AnyConfig", bound=ModelConfig)
Tensors = Generator[tuple[str, torch.Tensor], None, None]
# Bytes gathered at once when weights leave ZeRO-3 for the engine; twice, with those on their way.
GATHER_BUCKET_BYTES = 256 << 20
AS_SAID = "as the recipe says"
# Of float32's on a CPU; below that bfloat16 costs more than its half of the memory is worth.
BFLOAT16_LEAST_SPEED = 0.8


def resolve_dtype(config: ModelConfig, device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it fast, float32 elsewhere."""
    return choose_dtype(config, device)[0]


def choose_dtype(config: ModelConfig, device: torch.device) -> tuple[torch.dtype, str]:
    """(dtype of parameters and arithmetic, why it is that one).

    On a CPU two processes may find otherwise: where several work together, one has to choose.
    """
    if config.dtype != "auto":
        return getattr(torch, config.dtype), AS_SAID
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        what = "GPU"
    else:
        fast = torch.cpu._is_avx512_bf16_supported()
        what = "CPU"
    if not fast:
        return torch.float32, f"the {what} has no instructions for bfloat16"
    if device.type == "cuda":
        return torch.bfloat16, "the GPU has instructions for it"
    speed = _bfloat16_speed()
    said = f"a product takes {1 / speed:.1f} times as long in bfloat16"
    # Equally fast it is still half the memory.
    return (torch.float32 if speed < BFLOAT16_LEAST_SPEED else torch.bfloat16), said


@functools.cache
def _bfloat16_speed() -> float:
    """How often as fast as in float32 this process multiplies matrices in bfloat16, on the CPU.

    That a CPU has instructions for it says little: with tiles (AMX) they are several times as fast
    as float32's, without them half as fast on some.
    """
    inputs, weight = torch.ones(512, 1024), torch.ones(1024, 1024)
    operands = [(inputs.to(t), weight.to(t)) for t in (torch.bfloat16, torch.float32)]
    best = [math.inf, math.inf]
    # In turns, and the best of each, for other processes may be at work.
    for _ in range(6):
        for i, (x, w) in enumerate(operands):
            start = time.perf_counter()
            torch.nn.functional.linear(x, w)
            best[i] = min(best[i], time.perf_counter() - start)
    return best[1] / best[0]


def resolve_zero_stage(config: Config, world_size: int) -> int:
    return choose_zero_stage(config, world_size)[0]


def choose_zero_stage(config: Config, world_size: int) -> tuple[int, str]:
    """(ZeRO stage, why it is that one)."""
    if config.zero_stage != "auto":
        return config.zero_stage, AS_SAID
    if world_size == 1:
        return 0, "one process"
    if config.load_in_4bit:
        return 2, "ZeRO-3 cannot spread weights in 4 bits"
    return 3, "spreads weights, gradients and optimizer over the processes"


def resolve_adapter(config: Config) -> Config:
    """The recipe with its LoRA keys as the adapter has them that it starts from.

    Raises:
        ConfigError: there is no such LoRA adapter, or the recipe says otherwise than it.
    """
    path = config.adapter_name_or_path
    if path is None:
        return config
    held = adapter_config(path)
    found = {
        "lora_r": held.r,
        "lora_alpha": held.lora_alpha,
        "lora_target_modules": (
            held.target_modules
            if isinstance(held.target_modules, str)
            else tuple(sorted(held.target_modules or ()))
        ),
    }
    for key, value in found.items():
        asked = getattr(config, key)
        if isinstance(asked, tuple):
            asked = tuple(sorted(asked))
        # "all-linear" names the same modules in other words.
        words = key == "lora_target_modules" and isinstance(asked, str)
        if key in config.model_fields_set and asked != value and not words:
            raise ConfigError(
                f"{key} = {asked!r}: the adapter {path} that training goes on from has {value!r}; "
                "leave the key out"
            )
    if "lora_dropout" not in config.model_fields_set:
        found["lora_dropout"] = held.lora_dropout
    config = with_adapters_base(config.model_copy(update=found))
    try:
        check_4bit(config)
    except ValueError as error:
        raise ConfigError(f"adapter_name_or_path = {path!r}: {error}") from None
    return config


def with_adapters_base(config: AnyConfig) -> AnyConfig:
    """The configuration with its base as the adapter was trained on it: in NF4, where the adapter's
    folder says so.

    Raises:
        ConfigError: the recipe says that the base is not in NF4.
    """
    path = config.adapter_name_or_path
    if path is None or config.load_in_4bit or not trained_on_nf4(path):
        return config
    if "load_in_4bit" in config.model_fields_set:
        raise ConfigError(
            f"load_in_4bit = False: the adapter {path} was trained on a base in NF4, which another "
            "one is no substitute for; leave the key out"
        )
    return config.model_copy(update={"load_in_4bit": True})


def trained_on_nf4(adapter: str) -> bool:
    """Whether the folder of an adapter says so; other trainers, and the hub's, say nothing.

    Raises:
        ConfigError: its weights cannot be read.
    """
    file = Path(adapter, "adapter_model.safetensors")
    if not file.is_file():
        return False
    try:
        with safe_open(file, framework="pt") as tensors:
            return (tensors.metadata() or {}).get(BASE_KEY) == NF4
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"adapter_name_or_path = {adapter!r}: {file}: {reason(error)}") from None


def adapter_config(path: str) -> LoraConfig:
    """
    Raises:
        ConfigError: there is no adapter, or it is no LoRA adapter.
    """
    try:
        held = PeftConfig.from_pretrained(path)
    except Exception as error:  # PEFT looks into whatever the file holds
        raise ConfigError(f"adapter_name_or_path = {path!r}: {reason(error)}") from None
    if not isinstance(held, LoraConfig):
        raise ConfigError(f"adapter_name_or_path = {path!r}: {held.peft_type}, LoRA is supported")
    return held


def dropouts(model: nn.Module) -> dict[str, float]:
    """The rates above 0 at which a model drops values while it is trained, by their names."""
    found: dict[str, float] = {}
    for path, module in model.named_modules():
        rates = {"attention_dropout": getattr(module, "attention_dropout", 0.0)}
        if isinstance(module, nn.Dropout):
            # An adapter's is ...lora_dropout.NAME.
            rates[next((part for part in path.split(".")[::-1] if "drop" in part), path)] = module.p
        for name, rate in rates.items():
            if isinstance(rate, float) and rate > 0:
                found[name] = max(rate, found.get(name, 0.0))
    return found


def load_model_config(config: ModelConfig) -> PretrainedConfig:
    """The model's own configuration.

    Raises:
        ConfigError: there is none.
    """
    try:
        return AutoConfig.from_pretrained(
            config.model_name_or_path,
            revision=config.model_revision,
            trust_remote_code=config.trust_remote_code,
        )
    except Exception as error:  # transformers looks into whatever the file holds
        raise ConfigError(
            f"model_name_or_path = {config.model_name_or_path!r}: {_refusal(error)}"
        ) from None


def _refusal(error: Exception) -> str:
    """Why a model could not be read."""
    if "trust_remote_code" in str(error):
        return "brings code of its own, which runs with trust_remote_code: true alone"
    return reason(error)


def context_length(config: ModelConfig) -> int:
    """Most tokens that the model was made for."""
    model = load_model_config(config)
    return getattr(model.get_text_config(), "max_position_embeddings", None) or 2**31


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    name = config.model_name_or_path
    about = [os.path.isfile(Path(name, f"{what}.json")) for what in ("adapter_config", "config")]
    if about == [True, False]:
        base = adapter_config(name).base_model_name_or_path
        raise ConfigError(
            f"model_name_or_path = {name!r}: an adapter; set adapter_name_or_path to it and "
            f"model_name_or_path to its base, {base}"
        )
    # A hub name is ``name`` or ``owner/name``; everything else was meant as a folder.
    if not os.path.exists(name) and (name[:1] in ("/", ".", "~") or name.count("/") > 1):
        raise ConfigError(f"model_name_or_path = {name!r}: no such folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            config.model_name_or_path,
            revision=config.model_revision,
            trust_remote_code=config.trust_remote_code,
        )
        # Some of its settings are looked at when it is used.
        tokenizer("a")
        return tokenizer
    except Exception as error:  # so do the libraries of tokenizers
        raise ConfigError(
            f"model_name_or_path = {config.model_name_or_path!r}: no tokenizer could be loaded: "
            f"{_refusal(error)}"
        ) from None


class _Gathering:
    """Parameters that are on their way to this rank from those that hold their shards under ZeRO-3;
    collective, but for waiting.  What is whole already stays so."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        sharded: list[Any] = [p for p in parameters.values() if is_zero_param(p)]
        self._taken = [p for p in sharded if p.ds_status == ZeroParamStatus.NOT_AVAILABLE]
        self._handle = self._taken[0].all_gather_coalesced(self._taken) if self._taken else None

    def wait(self) -> None:
        if self._handle is not None:
            self._handle.wait()

    def release(self) -> None:
        self.wait()
        if self._taken:
            self._taken[0].partition(self._taken)


def _buckets(weights: Mapping[str, nn.Parameter]) -> list[dict[str, nn.Parameter]]:
    """In their order, each as long as it takes to reach GATHER_BUCKET_BYTES."""
    buckets: list[dict[str, nn.Parameter]] = []
    size = GATHER_BUCKET_BYTES
    for name, parameter in weights.items():
        if size >= GATHER_BUCKET_BYTES:
            buckets.append({})
            size = 0
        buckets[-1][name] = parameter
        size += _numel(parameter) * parameter.element_size()
    return buckets


@dataclass
class TrainedModel:
    """The policy under DeepSpeed, with its frozen reference over the same weights or beside them.

    Attributes:
        engine: the DeepSpeed engine around ``policy``.
        reference_engine: second set of weights (full fine-tuning with a reference), else None.
        uses_adapter: LoRA training: the base is frozen and shared.
        has_reference_adapter: the reference is a second adapter rather than the bare base.
        reference_version: counts how often the reference was replaced.
    """

    config: Config
    policy: Policy
    engine: Any
    reference_engine: Any | None
    uses_adapter: bool
    has_reference_adapter: bool
    zero_stage: int
    dtype: torch.dtype
    device: torch.device
    optimizer: torch.optim.Optimizer
    reference_version: int = 0

    def step(self) -> float | None:
        """One step of the optimizer with the gradients of all ranks, or none where their norm is
        no finite number: everything is then as it was, on every rank.  Collective.

        Returns:
            The norm before clipping, or None where no step was made.
        """
        self.engine.step()
        # The same norm everywhere, or the flag that DeepSpeed's optimizers reduce over ranks.
        return float(self.engine.get_global_grad_norm()) if self.engine.was_step_applied() else None

    @property
    def reference_policy(self) -> Policy:
        """The second set of weights, out of its DeepSpeed engine."""
        policy: Any = getattr(self.reference_engine, "module", self.reference_engine)
        return policy

    @property
    def shares_prefixes(self) -> bool:
        """Whether streams that begin alike may share what is computed for that."""
        second = self.reference_engine is not None
        return self.policy.shares and (not second or self.reference_policy.shares)

    @property
    def reference_adapter_name(self) -> str | None:
        """What the rollout engine calls the frozen start: an adapter, or None for the base."""
        return REFERENCE if self.has_reference_adapter else None

    @contextlib.contextmanager
    def reference(self) -> Iterator[Callable[..., Any]]:
        """Forward of the frozen reference; gradients off, dropout off."""
        with torch.no_grad():
            if self.reference_engine is not None:
                yield self.reference_engine
                return
            assert self.uses_adapter, "full fine-tuning was started without a reference"
            # The engine's own flag says nothing: DeepSpeed switches the module it wraps alone.
            training = self.policy.training
            self.engine.eval()
            try:
                with active_adapter(self.policy, self.reference_adapter_name):
                    yield self.engine
            finally:
                self.engine.train(training)

    def adopt_reference(self) -> None:
        """Make the policy of now the frozen reference; collective."""
        policy, held = self._policy_tensors(), self._reference_tensors()
        for name, parameter in held.items():
            with self._gather([parameter, policy[name]], write=True):
                parameter.data.copy_(policy[name].data)
        self.reference_version += 1

    def iter_reference(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Full tensors of the reference, by the name of the policy's; collective under ZeRO-3."""
        return self._iter(self._reference_tensors(), None)

    def load_reference(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Replace the reference by what :meth:`iter_reference` gave; collective."""
        for name, parameter in self._reference_tensors().items():
            with self._gather([parameter], write=True):
                parameter.data.copy_(tensors[name])
        self.reference_version += 1

    def _policy_tensors(self) -> dict[str, nn.Parameter]:
        if not self.uses_adapter:
            return self.named_weights()
        return {n: p for n, p in self.policy.named_parameters() if f".{POLICY}." in n}

    def _reference_tensors(self) -> dict[str, nn.Parameter]:
        """What the reference holds of its own, by the policy's names."""
        if not self.uses_adapter:
            return dict(self.reference_policy.causal_lm.named_parameters())
        return {
            name.replace(f".{REFERENCE}.", f".{POLICY}."): parameter
            for name, parameter in self.policy.named_parameters()
            if f".{REFERENCE}." in name
        }

    def named_weights(self) -> dict[str, nn.Parameter]:
        """Base parameters under their checkpoint names (full fine-tuning)."""
        return dict(self.policy.causal_lm.named_parameters())

    def iter_weights(self, dtype: torch.dtype) -> Tensors:
        """Full tensors by name; collective under ZeRO-3, where one bucket is gathered while the one
        before it is read.  Close it where it is not read to its end."""
        return self._iter(self.named_weights(), dtype)

    def iter_reference_weights(self, dtype: torch.dtype) -> Tensors:
        """The same of the second set of weights."""
        return self._iter(self._reference_tensors(), dtype)

    def _iter(self, weights: Mapping[str, nn.Parameter], dtype: torch.dtype | None) -> Tensors:
        """The next bucket is on its way while one is read: two are whole at once."""
        buckets = _buckets(weights)
        ahead: list[_Gathering] = []
        try:
            for i, bucket in enumerate(buckets):
                ahead += [_Gathering(b) for b in buckets[i + len(ahead) : i + 2]]
                ahead[0].wait()
                for name, parameter in bucket.items():
                    yield name, parameter.detach().to(dtype or parameter.dtype)
                ahead.pop(0).release()
        finally:
            for gathering in ahead:
                gathering.release()

    def iter_start(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Full tensors of what the reference computes with, before anything is trained: all but
        the adapter that will be; collective under ZeRO-3."""
        named = dict(self.policy.named_parameters())
        if self.uses_adapter:
            named = {name: p for name, p in named.items() if f".{POLICY}." not in name}
        yield from self._iter(named, None)
        yield from scales_of(self.policy)

    def adapter_tensors(self, adapter: str = POLICY) -> dict[str, torch.Tensor]:
        """The adapter's tensors under PEFT's names, full on every rank (collective)."""
        with self._gather([p for n, p in self.policy.named_parameters() if f".{adapter}." in n]):
            state = get_peft_model_state_dict(
                self.policy.model, adapter_name=adapter, save_embedding_layers=False
            )
            return {name: tensor.detach().clone() for name, tensor in state.items()}

    def adapter_names(self, adapter: str = POLICY) -> frozenset[str]:
        """The names :meth:`adapter_tensors` has to have, from the model's own parameters."""
        return frozenset(
            name.replace(f".{adapter}.", ".")
            for name, _ in self.policy.model.named_parameters()
            if f".{adapter}." in name
        )

    def adapter_config(self, adapter: str = POLICY) -> dict[str, Any]:
        config = self.policy.model.peft_config[adapter]
        return {
            **config.to_dict(),
            "inference_mode": True,
            "base_model_name_or_path": self.config.model_name_or_path,
        }

    @contextlib.contextmanager
    def _gather(self, parameters: list[nn.Parameter], write: bool = False) -> Iterator[None]:
        """Whole parameters, also of a ZeRO-3 shard; what is written to them stays only if said."""
        if self.zero_stage == 3:
            with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if write else None):
                yield
        else:
            yield

    @contextlib.contextmanager
    def disturbed(self, strength: int) -> Iterator[None]:
        """Change the trained weights visibly and put them back bit for bit.

        Adapters: every ``lora_B`` becomes noise of 0.02 x 4^strength, so each adapted kind of
        module speaks.  Full weights: the matrices of every second layer are multiplied by
        2^(strength + 1) and divided again, which is exact in binary floating point.
        """
        changed = self._canary_parameters()
        generator = torch.Generator(device=self.device).manual_seed(0)
        factor = 2.0 ** (strength + 1)
        kept = []
        for parameter in changed:
            with self._gather([parameter], write=True):
                data = parameter.data
                if self.uses_adapter:
                    kept.append(data.clone())
                    noise = torch.randn(data.shape, generator=generator, device=data.device)
                    data.copy_(noise.mul_(0.02 * 4**strength))
                else:
                    data.mul_(factor)
        try:
            yield
        finally:
            for index, parameter in enumerate(changed):
                with self._gather([parameter], write=True):
                    if self.uses_adapter:
                        parameter.data.copy_(kept[index])
                    else:
                        parameter.data.mul_(1 / factor)

    def _canary_parameters(self) -> list[nn.Parameter]:
        names = {
            name: parameter
            for name, parameter in self.policy.named_parameters()
            if parameter.requires_grad
        }
        if self.uses_adapter:
            return [p for n, p in names.items() if "lora_B" in n]
        return [
            p
            for n, p in names.items()
            if len(full_shape(p)) == 2
            and any(part.isdigit() and int(part) % 2 == 0 for part in n.split("."))
        ]


@contextlib.contextmanager
def active_adapter(policy: Policy, adapter: str | None) -> Iterator[None]:
    """Run with another adapter, or with none, on shared weights.

    PEFT's own switches also flip ``requires_grad``, which an optimizer under DeepSpeed does not
    expect in the middle of a run; this one changes only what the forward pass reads.
    """
    layers = [m for m in policy.modules() if isinstance(m, BaseTunerLayer)]
    before = [(layer._disable_adapters, layer._active_adapter) for layer in layers]
    for layer in layers:
        layer._disable_adapters = adapter is None
        if adapter is not None:
            layer._active_adapter = [adapter]
    try:
        yield
    finally:
        for layer, (disabled, active) in zip(layers, before, strict=True):
            layer._disable_adapters, layer._active_adapter = disabled, active


def build_model(config: Config, *, device: torch.device, needs_reference: bool) -> TrainedModel:
    """Load, adapt and wrap the model.  Call after the rollout engine exists: its own loading must
    not see the sharded-construction context that ZeRO-3 sets here."""
    world_size = dist.get_world_size()
    stage = resolve_zero_stage(config, world_size)
    dtype = resolve_dtype(config, device)
    settings = deepspeed_settings(config, stage, dtype)

    policy = load_policy(config, dtype, device, settings if stage == 3 else None)
    if config.torch_compile:
        _compile_layers(policy, stage)
    trainable = [p for p in policy.parameters() if p.requires_grad]
    settings = _fit_bucket(settings, sum(getattr(p, "ds_numel", p.numel()) for p in trainable))
    # fp32 at stage 0 leaves clipping to us, for DeepSpeed would discard the norm it computes.
    clips_itself = stage == 0 and dtype == torch.float32
    # Every step sets its own learning rate.  Until then it is 0, because DeepSpeed's bf16 optimizer
    # takes a step on zeros to make the state, which would decay the weights.
    optimizer = (_ClippingAdamW if clips_itself else torch.optim.AdamW)(
        _parameter_groups(policy, config.weight_decay),
        lr=0.0,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
    )
    if isinstance(optimizer, _ClippingAdamW):
        optimizer.clip(trainable, config.max_grad_norm)
    engine, *_ = deepspeed.initialize(
        model=policy,
        optimizer=optimizer,
        config={**settings, "gradient_clipping": 0.0} if clips_itself else settings,
    )
    for state in optimizer.state.values():
        # Nor may that step count for the bias correction.
        state["step"].zero_()
    if stage == 3:
        _mark_sharded(policy)
    reference_engine = None
    if needs_reference and not config.use_peft:
        reference_engine = _reference_engine(config, dtype, device, stage, settings)
    return TrainedModel(
        config=config,
        policy=policy,
        engine=engine,
        reference_engine=reference_engine,
        uses_adapter=config.use_peft,
        has_reference_adapter=config.use_peft
        and (config.adapter_name_or_path is not None or config.refreshes),
        zero_stage=stage,
        dtype=dtype,
        device=device,
        optimizer=optimizer,
    )


class _ClippingAdamW(torch.optim.AdamW):
    """AdamW that clips by the norm of all gradients, and makes no step where that is no finite
    number.  ``overflow`` and ``_global_grad_norm`` are what DeepSpeed reads of its own optimizers.
    """

    overflow = False
    _global_grad_norm = 0.0

    def clip(self, parameters: list[nn.Parameter], max_norm: float) -> None:
        """Say what is clipped, to which norm; before the first step."""
        self._clipped, self._max_norm = parameters, max_norm

    def step(self, closure: Any = None) -> Any:
        norm = nn.utils.clip_grad_norm_(self._clipped, self._max_norm)
        self._global_grad_norm = float(norm)
        self.overflow = not math.isfinite(self._global_grad_norm)
        return None if self.overflow else super().step(closure)


def load_policy(
    config: Config,
    dtype: torch.dtype,
    device: torch.device,
    sharded: dict[str, Any] | None = None,
) -> Policy:
    """The model with its adapters, without what only training needs.

    ``sharded``: the DeepSpeed configuration under which ZeRO-3 spreads it while it loads.
    """
    return adapt(_load_causal_lm(config, dtype, device, sharded), config)


def adapt(model: Any, config: Config) -> Policy:
    """The transformers model with gradient checkpointing and adapters as the recipe has them."""
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if not config.torch_compile:
        # A compiled layer chooses what it keeps.
        keep_less(model)
    if config.use_peft:
        model = _add_adapters(model, config)
    policy = Policy(model)
    policy.offloads = config.activation_offloading
    return policy


def deepspeed_settings(config: Config, stage: int, dtype: torch.dtype) -> dict[str, Any]:
    """DeepSpeed's configuration: the recipe's own options under ours.

    The trainer owns accumulation: the loss it passes is already the share of the global batch, so
    micro-batches may differ in size.
    """
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_optimization": {"stage": stage, "overlap_comm": False},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": config.max_grad_norm,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }
    merged = dict(config.deepspeed)
    for key, value in ours.items():
        theirs = merged.get(key)
        if isinstance(value, Mapping) and isinstance(theirs, Mapping):
            clash = {k for k in value if k in theirs and theirs[k] != value[k]}
            if clash:
                name = sorted(clash)[0]
                raise ConfigError(
                    f"deepspeed.{key}.{name} = {theirs[name]!r} contradicts the recipe, "
                    f"which asks for {value[name]!r}"
                )
            merged[key] = {**theirs, **value}
        elif theirs is not None and theirs != value:
            raise ConfigError(
                f"deepspeed.{key} = {theirs!r} contradicts the recipe, which asks for {value!r}"
            )
        else:
            merged[key] = value
    return merged


def _fit_bucket(settings: dict[str, Any], trained: int) -> dict[str, Any]:
    """With a bucket for gradients that holds no more than there are: DeepSpeed allocates all of its
    ``reduce_bucket_size``, 0.93 GiB in bf16, also where a LoRA adapter of 10 MiB is trained."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    zero = settings["zero_optimization"]
    most = int(DeepSpeedZeroConfig.model_fields["reduce_bucket_size"].default)
    fitting = {"reduce_bucket_size": min(most, trained)}
    return {**settings, "zero_optimization": {**fitting, **zero}}


def zero_options(config: Config, stage: int, dtype: torch.dtype, trained: int) -> Any:
    """DeepSpeed's ZeRO options as they will be where so many numbers are trained, its defaults
    included."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    settings = _fit_bucket(deepspeed_settings(config, stage, dtype), trained)
    return DeepSpeedZeroConfig(**settings["zero_optimization"])


def _load_causal_lm(
    config: Config, dtype: torch.dtype, device: torch.device, sharded: dict[str, Any] | None
) -> nn.Module:
    # Held while loading: transformers then partitions each parameter as it is read.
    context = HfDeepSpeedConfig(sharded) if sharded is not None else None
    options: dict[str, Any] = {
        "revision": config.model_revision,
        "trust_remote_code": config.trust_remote_code,
    }
    if config.attn_implementation:
        options["attn_implementation"] = config.attn_implementation
    name = config.model_name_or_path
    try:
        if config.load_in_4bit:
            return load_nf4(name, dtype=dtype, device=device, **options)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **options)
    except ConfigError:
        raise
    except Exception as error:  # see load_model_config
        # What lacks a package is the attention that was asked for, if one was.
        lacks = isinstance(error, ImportError) and config.attn_implementation
        key = "attn_implementation" if lacks else "model_name_or_path"
        raise ConfigError(f"{key} = {getattr(config, key)!r}: {_refusal(error)}") from None
    finally:
        if context is not None:
            del context
            unset_hf_deepspeed_config()
    return model if sharded is not None else model.to(device)


def _add_adapters(model: nn.Module, config: Config) -> PeftModel:
    # In the base's dtype, as DeepSpeed would cast them anyway, but for ZeRO-3: there PEFT's own
    # float32 would stay, and double what each adapted product keeps for its backward.
    as_base = {"autocast_adapter_dtype": False}
    if config.adapter_name_or_path is not None:
        path = config.adapter_name_or_path
        try:
            held = adapter_config(path)
            held.lora_dropout = config.lora_dropout
            adapted = PeftModel.from_pretrained(
                model, path, adapter_name=POLICY, is_trainable=True, config=held, **as_base
            )
            adapted.load_adapter(path, adapter_name=REFERENCE, is_trainable=False, **as_base)
        except ConfigError:
            raise
        except Exception as error:  # weights that are damaged or do not fit, files of all kinds
            raise ConfigError(f"adapter_name_or_path = {path!r}: {reason(error)}") from None
        adapted.set_adapter(POLICY)
    else:
        targets = config.lora_target_modules
        lora = LoraConfig(
            r=config.lora_r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=targets if isinstance(targets, str) else list(targets),
            task_type="CAUSAL_LM",
        )
        try:
            adapted = get_peft_model(model, lora, **as_base)
        except ValueError as error:
            raise ConfigError(f"lora_target_modules = {targets!r}: {reason(error)}") from None
        if config.refreshes:
            # A new adapter adds nothing to the base, so that this one is the start of the run too.
            adapted.add_adapter(REFERENCE, replace(lora, inference_mode=True), **as_base)
            adapted.set_adapter(POLICY)
    head = adapted.get_base_model().get_output_embeddings()
    if isinstance(head, BaseTunerLayer):
        raise ConfigError(
            "lora_target_modules includes the LM head, whose product FastAlign fuses with the "
            "loss: leave it out (all-linear does)"
        )
    add_in_one_pass(adapted)
    return adapted


def _parameter_groups(policy: Policy, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices only, as transformers does."""
    trainable = [(n, p) for n, p in policy.named_parameters() if p.requires_grad]
    decayed = [p for _, p in trainable if len(full_shape(p)) >= 2]
    plain = [p for _, p in trainable if len(full_shape(p)) < 2]
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _reference_engine(
    config: Config,
    dtype: torch.dtype,
    device: torch.device,
    stage: int,
    settings: dict[str, Any],
) -> Any:
    policy = Policy(_load_causal_lm(config, dtype, device, settings if stage == 3 else None))
    policy.requires_grad_(False).eval()
    if config.torch_compile:
        _compile_layers(policy, stage)
    if stage < 3:
        return policy
    engine, *_ = deepspeed.initialize(model=policy, config=settings)
    _mark_sharded(policy)
    engine.eval()
    return engine


def _compile_layers(policy: Policy, stage: int) -> None:
    """One graph for all layers of a kind, for packs of any length.

    Raises:
        ConfigError: the model does not say what its layers are, or ZeRO-3 gathers inside of them.
    """
    if stage == 3:
        raise ConfigError(
            "torch_compile with ZeRO-3: DeepSpeed gathers weights in hooks inside the layers, "
            "which would break up every graph; leave it out, or set zero_stage to 2"
        )
    kinds = set(getattr(policy.causal_lm, "_no_split_modules", None) or ())
    layers = [module for module in policy.modules() if type(module).__name__ in kinds]
    if not layers:
        raise ConfigError(
            f"torch_compile: {type(policy.causal_lm).__name__} does not name its layers "
            "(_no_split_modules): leave it out"
        )
    leave_uncompiled()
    for layer in layers:
        layer.compile(dynamic=True)


def _mark_sharded(policy: Policy) -> None:
    """Tell the policy of ZeRO-3, and ZeRO-3 that the policy's own forward reads the LM head.

    ZeRO-3 would find out by itself, but in the middle of a pass, and then trip over the order of
    parameters that it noted in an earlier one without the head.
    """
    policy.sharded = True
    for parameter in policy.causal_lm.get_output_embeddings().parameters():
        deepspeed.zero.register_external_parameter(policy, parameter)


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """Shape of the whole parameter, also of a ZeRO-3 shard or of one in NF4."""
    state = getattr(parameter, "quant_state", None)
    return getattr(parameter, "ds_shape", parameter.shape) if state is None else state.shape


def _numel(parameter: nn.Parameter) -> int:
    # numel() of a parameter that ZeRO-3 has sharded away is 0.
    return getattr(parameter, "ds_numel", parameter.numel())


def init_distributed(timeout_s: float) -> torch.device:
    """Join or make the process group; on one process it is a group of one.

    Rollouts and judging keep ranks apart for long, hence the explicit limit.
    """
    from datetime import timedelta

    cuda = torch.cuda.is_available()
    limit = timedelta(seconds=timeout_s)
    store = None
    for key, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        os.environ.setdefault(key, value)
    if os.environ["WORLD_SIZE"] == "1" and not dist.is_initialized():
        # Bound here: a port that was found free may be taken a moment later.  Named nowhere: a
        # command that this process starts must not take it for its own.
        store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True, timeout=limit)
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        dist.init_process_group(
            "cuda:nccl,cpu:gloo" if cuda else "gloo",
            timeout=limit,
            store=store,
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
        )
    # DeepSpeed prints that it built an operation; standard output is the user's.
    with _telling_of_locks(), contextlib.redirect_stdout(io.StringIO()) as printed:
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False, timeout=limit)
    logger.debug("%s", printed.getvalue().strip())
    return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")


@contextlib.contextmanager
def _telling_of_locks() -> Iterator[None]:
    """Say what is waited for when DeepSpeed compiles its operations for longer than that takes:
    torch waits without a word for a lock that a killed process has left."""
    done = threading.Event()

    def watch() -> None:
        # Who waits for a lock has loaded torch's side.  Not loaded here: with it comes setuptools,
        # which exchanges modules while the main thread imports others.
        waiting = not done.wait(LOCK_PATIENCE_S)
        extensions = sys.modules.get("torch.utils.cpp_extension")
        if not waiting or extensions is None:
            return
        root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or extensions.get_default_build_root())
        for lock in sorted(root.glob("**/lock")):
            print(
                f"fastalign: waiting for {lock}: a process that compiles DeepSpeed's operations "
                "holds it; if none does, one was killed and left it: delete the file",
                file=sys.stderr,
                flush=True,
            )

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def load_generation_config(config: ModelConfig) -> GenerationConfig:
    """The model's own, or an empty one when it has none.

    Raises:
        ConfigError: it has one that cannot be read.
    """
    name = config.model_name_or_path
    try:
        return GenerationConfig.from_pretrained(name, revision=config.model_revision)
    except Exception as error:  # see load_model_config
        if isinstance(error, OSError) and not os.path.exists(Path(name, "generation_config.json")):
            return GenerationConfig()
        raise ConfigError(
            f"model_name_or_path = {name!r}: generation_config.json: {reason(error)}"
        ) from None
