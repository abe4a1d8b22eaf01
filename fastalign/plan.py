"""What a recipe takes of each GPU's memory, by part, and what to set where it does not fit.

Nothing is loaded but the model's configuration.  Weights, gradients and the optimizer are counted
as DeepSpeed shards them; what a pass holds is followed through the real model on torch's meta
device; what DeepSpeed and the kernels hold besides are bounds; and what nobody can count is a
margin, named as such.  Times come from a run on the device alone (:class:`Calibration`).
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fastalign.config import Config, ConfigError, override_config
from fastalign.footprint import Footprint, Parameter, weight_bytes
from fastalign.methods import make_method
from fastalign.model import resolve_adapter, resolve_zero_stage, zero_options
from fastalign.rollout import check_ranks
from fastalign.startup import wants_reference
from fastalign.timeline import Operations

GIB = 1 << 30
# GiB that the driver leaves of what the makers promise.
GPUS = {
    "a100-40": 39.4,
    "a100-80": 79.1,
    "h100": 79.1,
    "h200": 139.7,
    "b200": 178.3,
    "l40s": 44.4,
    "a10g": 22.0,
    "l4": 22.0,
    "4090": 23.5,
    "5090": 31.3,
    "mi300x": 191.5,
}
# Assumed, because no program can count them beforehand: the CUDA context with the libraries'
# handles and buffers, what vLLM keeps while it sleeps, what a pass of its own takes of its share,
# and what the allocator cannot use.
CONTEXT, ENGINE_ASLEEP, ENGINE_WORK, SLACK = 3 * GIB // 2, 1 * GIB, 2 * GIB, 0.05
# Padded tokens of the embedded engine's prompt pass (fastalign.rollout.hf).
PREFILL_TOKENS = 32768
ADAM_MOMENTS, FP32 = 2, 4
# Steps of a run that warm up, and the fewest behind them that say something.
COLD_STEPS, LEAST_STEPS = 2, 3
# Masters, moments and gradients in float32 on the host, beside a copy in the model's dtype.
OFFLOADED = (1 + ADAM_MOMENTS + 1) * FP32


@dataclass(frozen=True)
class Part:
    """Bytes on one GPU while a pack goes forward and backward, while the optimizer steps, and while
    the engine samples; ``how`` they are known: counted, traced, bound or assumed."""

    name: str
    how: str
    update: int = 0
    step: int = 0
    rollout: int = 0


@dataclass(frozen=True)
class Plan:
    """A recipe on so many GPUs.

    Attributes:
        gpu: its name, or its memory.
        memory: bytes of one GPU.
        stage: of ZeRO.
        parts: what takes memory, and when.
        host: bytes of host memory for each GPU.
        engine_fits: whether the engine's share holds the weights and the longest sequence.
        notes: what else has to be known.
    """

    gpus: int
    gpu: str
    memory: int
    stage: int
    micro_batch_tokens: int
    gradient_checkpointing: bool
    parts: tuple[Part, ...]
    host: int
    engine_fits: bool = True
    notes: tuple[str, ...] = ()

    def peak(self, phase: str) -> int:
        return sum(getattr(part, phase) for part in self.parts)

    @property
    def needed(self) -> int:
        return max(self.peak(phase) for phase in ("update", "step", "rollout"))

    @property
    def fits(self) -> bool:
        return self.engine_fits and self.needed <= self.memory


@dataclass(frozen=True)
class Change:
    """Settings in place of the recipe's, and what they lead to."""

    settings: tuple[str, ...]
    gpus: int
    needed: int
    host: int
    fits: bool


@dataclass(frozen=True)
class Advice:
    """``changes``: what each setting alone would do, and last the cheapest that fits, if any does;
    ``room``: what fits as well as the recipe."""

    plan: Plan
    changes: tuple[Change, ...] = ()
    room: tuple[Change, ...] = ()


def find_gpu(name: str | None, gib: float | None) -> tuple[str, int]:
    """(name, bytes) of a GPU.

    Raises:
        ConfigError: neither is said, or both, or no such GPU is known.
    """
    if (name is None) == (gib is None):
        raise ConfigError("--dry-run with --gpus wants --gpu NAME or --gpu-memory GIB, one of them")
    if gib is not None:
        if not 0 < gib < math.inf:
            raise ConfigError(f"--gpu-memory {gib:g}: want a number of GiB above 0")
        return f"{gib:g} GiB", int(gib * GIB)
    assert name is not None
    if name.lower() not in GPUS:
        raise ConfigError(
            f"--gpu {name}: known are {', '.join(GPUS)}; for another one say --gpu-memory GIB"
        )
    return name.lower(), int(GPUS[name.lower()] * GIB)


@dataclass(frozen=True)
class Calibration:
    """What one GPU did in a run.

    Attributes:
        run: its output folder.
        steps: that were measured.
        operations: a second, as :class:`fastalign.timeline.Operations` counts them; the median.
    """

    run: str
    steps: int
    operations: float


@dataclass(frozen=True)
class Times:
    """Of updates at a calibration's rate; rollouts, judgments and syncs are not in them.

    Attributes:
        seconds_per_pack: of ``micro_batch_tokens`` tokens in sequences of ``max_length``.
        tokens_per_second: of all GPUs.
    """

    calibration: Calibration
    seconds_per_pack: float
    tokens_per_second: float


def calibrate(run: str) -> Calibration:
    """The rate that the steps of a run reached, of which the first warm up.

    Raises:
        ConfigError: there are no such steps.
    """
    path = Path(run, "metrics.jsonl")
    if not path.is_file():
        raise ConfigError(f"--calibration {run}: no run wrote metrics.jsonl there")
    rates = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            rates += [float(row[name]) for name in ("speed/tflops",) if name in row]
            if not all(map(math.isfinite, rates)):
                raise ValueError
        except (ValueError, TypeError, OverflowError, RecursionError):
            raise ConfigError(f"--calibration {run}: {path}:{number} holds no metrics") from None
    rates = rates[COLD_STEPS:]
    if len(rates) < LEAST_STEPS:
        raise ConfigError(
            f"--calibration {run}: {len(rates)} steps with a rate behind the first {COLD_STEPS}: "
            f"train for {COLD_STEPS + LEAST_STEPS} at least"
        )
    return Calibration(run, len(rates), statistics.median(rates) * 1e12)


# ------------------------------------------------------------------------------------- DeepSpeed


@dataclass(frozen=True)
class Shard:
    """Bytes that DeepSpeed holds on one rank.

    Attributes:
        weights: as the forward pass reads them, or this rank's part of them.
        masters: float32 copies of what is trained.
        moments: the optimizer's.
        gradients: when all packs are done.
        buckets: through which gradients are reduced; ``kept`` between updates as well.
        gathered: at most, of other ranks' weights (ZeRO-3).
        stepping: at most, while the optimizer steps.
        offloaded: on the host.
    """

    weights: int
    masters: int
    moments: int
    gradients: int
    buckets: int = 0
    kept: int = 0
    gathered: int = 0
    stepping: int = 0
    offloaded: int = 0


def shard(
    parameters: Sequence[Parameter],
    stage: int,
    world_size: int,
    zero: Any,
    dtype: torch.dtype,
    largest_module: int = 0,
) -> Shard:
    """What DeepSpeed holds of them with torch's AdamW, as fastalign.model sets it up."""
    split = {0: _replicated, 1: _flattened, 2: _flattened, 3: _partitioned}[stage]
    return split(parameters, stage, world_size, zero, dtype, largest_module)


def _replicated(
    parameters: Sequence[Parameter],
    stage: int,
    world_size: int,
    zero: Any,
    dtype: torch.dtype,
    largest_module: int,
) -> Shard:
    trained = [p for p in parameters if p.trained]
    numel = sum(p.numel for p in trained)
    half = dtype != torch.float32
    gradients = sum(p.numel * p.bytes for p in trained)
    # Gradients are copied together to be reduced, and in float32 for the masters.
    copied = min(gradients, int(zero.reduce_bucket_size) * dtype.itemsize) * (world_size > 1)
    return Shard(
        weights=sum(p.numel * p.bytes for p in parameters),
        masters=FP32 * numel * half,
        moments=ADAM_MOMENTS * FP32 * numel,
        gradients=gradients,
        # torch's AdamW takes the root of a group's second moments at once.
        stepping=copied + FP32 * numel * half + FP32 * max(map(_numel, _groups(trained))),
    )


def _flattened(
    parameters: Sequence[Parameter],
    stage: int,
    world_size: int,
    zero: Any,
    dtype: torch.dtype,
    largest_module: int,
) -> Shard:
    """ZeRO-1 and 2: each group of the optimizer is one flat tensor, cut into equal parts."""
    groups = _groups(p for p in parameters if p.trained)
    # Parts start at multiples of two numbers.
    parts = [2 * math.ceil(_numel(group) / (2 * world_size)) for group in groups]
    size = dtype.itemsize
    numel = sum(_numel(group) for group in groups)
    bucket = int(zero.reduce_bucket_size)
    if stage == 1:
        gradients, copied = numel * size, 0
    else:
        gradients = size * _most_overlapping(groups, parts, world_size)
        # Those of a second pack lie beside the sum until they are added.
        copied = min(numel, bucket) * size + gradients
    offloaded = _offloads(zero.offload_optimizer)
    if offloaded:
        # On their way to the host.
        gradients = size * max(p.numel for group in groups for p in group)
    return Shard(
        weights=sum(p.numel * p.bytes for p in parameters if not p.trained)
        + world_size * sum(parts) * size,
        masters=FP32 * sum(parts),
        moments=ADAM_MOMENTS * FP32 * sum(parts),
        gradients=gradients,
        buckets=bucket * size * bool(zero.contiguous_gradients) + copied,
        stepping=3 * FP32 * max(parts) * (not offloaded),
        offloaded=(OFFLOADED + size) * sum(parts) * offloaded,
    )


def _partitioned(
    parameters: Sequence[Parameter],
    stage: int,
    world_size: int,
    zero: Any,
    dtype: torch.dtype,
    largest_module: int,
) -> Shard:
    """ZeRO-3: each parameter is cut into equal parts; small ones stay whole besides."""
    whole = sum(
        p.numel * p.bytes for p in parameters if p.numel <= int(zero.param_persistence_threshold)
    )
    cut = sum(_cut(p, world_size) * p.bytes for p in parameters)
    part = sum(_cut(p, world_size) for p in parameters if p.trained)
    numel = sum(p.numel for p in parameters if p.trained)
    size, bucket = dtype.itemsize, int(zero.reduce_bucket_size)
    gradients = part * size
    offloaded = _offloads(zero.offload_optimizer)
    kept = bucket * size * bool(zero.contiguous_gradients)
    # What comes again within the reuse distance stays: near the turn from forward to backward that
    # is half of it.  Then comes what is fetched ahead, and the module that computes.
    stays = min(int(zero.max_live_parameters), int(zero.max_reuse_distance) // 2)
    gathered = min(
        sum(p.numel * p.bytes for p in parameters) - whole,
        (stays + int(zero.prefetch_bucket_size) + largest_module) * size,
    )
    weights_on_host = _offloads(zero.offload_param) * cut
    return Shard(
        weights=cut + whole,
        masters=FP32 * part,
        moments=ADAM_MOMENTS * FP32 * part,
        gradients=gradients,
        buckets=kept + min(numel, bucket) * size,
        kept=kept,
        gathered=gathered,
        stepping=3 * FP32 * min(part, int(zero.sub_group_size)) * (not offloaded),
        offloaded=(OFFLOADED + size) * part * offloaded + weights_on_host,
    )


def _groups(trained: Iterable[Parameter]) -> list[list[Parameter]]:
    """Those with weight decay and those without, as the optimizer has them."""
    trained = list(trained)
    groups = [[p for p in trained if p.decayed], [p for p in trained if not p.decayed]]
    return [group for group in groups if group]


def _numel(group: Iterable[Parameter]) -> int:
    return sum(p.numel for p in group)


def _cut(parameter: Parameter, world_size: int) -> int:
    return math.ceil(parameter.numel / world_size)


def _most_overlapping(
    groups: Sequence[Sequence[Parameter]], parts: Sequence[int], world_size: int
) -> int:
    """Numbers of the parameters that reach into a rank's parts, for the rank with most of them:
    ZeRO-2 makes room for their whole gradients."""
    held = [0] * world_size
    for group, part in zip(groups, parts, strict=True):
        bounds = accumulate((p.numel for p in group), initial=0)
        for start, stop in pairwise(bounds):
            for rank in range(start // part, (stop - 1) // part + 1):
                held[rank] += stop - start
    return max(held)


def _offloads(section: Any) -> bool:
    return section is not None and section.device != "none"


# ------------------------------------------------------------------------------------------ plan


class Planner:
    """Plans of one recipe and its variants; models are built once for each kind.

    Args:
        config: the recipe.
        gpu: name and bytes of one GPU.

    Raises:
        ConfigError: no such model or module, a reference that is to move and is not there, or
            settings of DeepSpeed's that contradict the recipe.
    """

    def __init__(self, config: Config, gpu: tuple[str, int]) -> None:
        self.config = resolve_adapter(config)
        self.gpu, self.memory = gpu
        self.method = make_method(config)
        self.wants_reference = wants_reference(self.config, self.method)
        # All GPUs with a name have fast products in bfloat16.
        self.dtype = torch.float32 if config.dtype == "float32" else torch.bfloat16
        self._footprints: dict[bool, Footprint] = {}
        self._whole: int | None = None

    def plan(self, config: Config, gpus: int) -> Plan:
        """The plan of a variant of the recipe.

        Raises:
            ConfigError: the GPUs cannot be put into groups of those that share an engine.
        """
        stage = resolve_zero_stage(config, gpus)
        model = self._footprint(config)
        trained = sum(p.numel for p in model.parameters if p.trained)
        zero = zero_options(config, stage, self.dtype, trained)
        held = shard(model.parameters, stage, gpus, zero, self.dtype, model.largest_module)
        activations = self._activations(model, config.micro_batch_tokens)
        parts = [*_training(activations, held, zero)]
        host = held.offloaded
        if config.async_save:
            # The copy that is written behind the training; ZeRO-3 makes weights of masters.
            weights = sum(p.numel * p.bytes for p in model.parameters if p.trained)
            host += weights * (stage < 3) + held.masters + held.moments
        notes: list[str] = []
        engine_fits = True
        if self.wants_reference and not config.use_peft:
            frozen = [Parameter(p.numel, p.bytes, False, p.decayed) for p in model.parameters]
            parts.append(_reference(frozen, stage, gpus, zero))
        if config.online is not None and config.rollout.engine == "server":
            notes.append("the vLLM server has GPUs of its own, which are not counted")
        elif config.online is not None:
            check_ranks(config.rollout, gpus)
            parts.append(self._engine(config, model))
            host += self._engine_weights(config)
            notes += self._engine_notes(config, model)
            if config.rollout.engine != "hf":
                longest = config.max_length + config.max_completion_length
                engine_fits = self._cache_tokens(config, model) >= longest
        else:
            parts = [replace(part, rollout=0) for part in parts]
        parts.append(_margin(parts, _samples_with_vllm(config)))
        if config.attn_implementation is not None:
            notes.append(
                f"attn_implementation = {config.attn_implementation}: the plan is for packed "
                "attention, which keeps no square of a sequence's length"
            )
        return Plan(
            gpus=gpus,
            gpu=self.gpu,
            memory=self.memory,
            stage=stage,
            micro_batch_tokens=config.micro_batch_tokens,
            gradient_checkpointing=config.gradient_checkpointing,
            parts=tuple(part for part in parts if part.update or part.step or part.rollout),
            host=host,
            engine_fits=engine_fits,
            notes=tuple(notes),
        )

    def times(self, plan: Plan, calibration: Calibration) -> Times:
        """How long a pack of the plan takes at the rate of a run.

        Raises:
            ConfigError: the operations of the model are not known.
        """
        config = self.config
        known = Operations(self._footprint(config).policy)
        if not known.known:
            raise ConfigError("--calibration: the operations of a mixture of experts are not known")
        # Of static data the reference is asked once, before the first step.
        asks = config.online is not None and self.method.needs_reference
        cost, tokens = known.cost(asks), plan.micro_batch_tokens
        pairs = (min(tokens, config.max_length) + 1) / 2
        seconds = tokens * (cost.token + cost.pair * pairs + cost.row) / calibration.operations
        return Times(calibration, seconds, plan.gpus * tokens / seconds)

    def _footprint(self, config: Config) -> Footprint:
        key = config.gradient_checkpointing
        if key not in self._footprints:
            self._footprints[key] = Footprint(config, self.dtype)
        return self._footprints[key]

    def _activations(self, model: Footprint, tokens: int) -> int:
        """At the recipe's size of pack they are traced.  So they are at its smallest, and between
        the two taken from the line that joins them, which is never too low: each moment's are
        linear in the tokens, and the most of such lines is convex."""
        low, high = self.config.max_length, self.config.micro_batch_tokens
        if not low < tokens < high:
            return model.activations(tokens)
        least, most = model.activations(low), model.activations(high)
        return least + math.ceil((most - least) * (tokens - low) / (high - low))

    def most_tokens(self, config: Config, plan: Plan) -> int:
        """The largest pack, in steps of 1024 tokens, for which the memory that is left suffices."""
        model, now = self._footprint(config), config.micro_batch_tokens
        each = (model.activations(2 * now) - model.activations(now)) / now
        free = (plan.memory - plan.peak("update")) / (1 + SLACK)
        found = min(MOST_TOKENS, now + int(free / each))
        return found // 1024 * 1024

    def _engine(self, config: Config, model: Footprint) -> Part:
        rollout = config.rollout
        if rollout.engine != "hf":
            share = int(rollout.gpu_memory_utilization * self.memory)
            return Part("vLLM: weights and key-value cache", "bound", rollout=share)
        tokens = config.max_length + config.max_completion_length
        prompts = min(PREFILL_TOKENS, rollout.max_num_seqs * config.max_length)
        size = self._size()
        size += rollout.max_num_seqs * tokens * model.cache_bytes
        size += model.activations(prompts, training=False)
        return Part("embedded engine: weights and key-value cache", "bound", rollout=size)

    def _engine_notes(self, config: Config, model: Footprint) -> list[str]:
        notes = []
        if config.rollout.engine != "hf":
            ranks = config.rollout.tensor_parallel_size
            part = "the whole model" if ranks == 1 else f"1/{ranks} of the model"
            notes.append(
                f"vLLM holds {part} on each GPU, {self._engine_weights(config) / GIB:.1f} GiB, and "
                f"of its share {self._cache_tokens(config, model):,} tokens of key-value cache are "
                "left"
            )
        if any(j is not None and j.type == "model" for j in (config.judge, config.eval_judge)):
            notes.append("the model that judges is not counted: it takes turns with the engine")
        return notes

    def _cache_tokens(self, config: Config, model: Footprint) -> int:
        """Of an engine; each of its GPUs keeps its own heads of every token, one at least."""
        share = int(config.rollout.gpu_memory_utilization * self.memory)
        token = model.cache_bytes // min(config.rollout.tensor_parallel_size, model.kv_heads)
        return max(0, share - self._engine_weights(config) - ENGINE_WORK) // token

    def _engine_weights(self, config: Config) -> int:
        """On each of the GPUs that share an engine: the embedded one is no GPU's but its own."""
        return math.ceil(self._size() / config.rollout.tensor_parallel_size)

    def _size(self) -> int:
        if self._whole is None:
            self._whole = weight_bytes(self.config, self.dtype)
        return self._whole


def _training(activations: int, held: Shard, zero: Any) -> Iterator[Part]:
    optimizer_away, weights_away = map(_offloads, (zero.offload_optimizer, zero.offload_param))
    weights = 0 if weights_away else held.weights
    yield Part("weights", "counted", weights, weights, weights)
    yield Part("gathered weights", "bound", held.gathered)
    gradients = 0 if optimizer_away and zero.stage == 3 else held.gradients
    # ZeRO-3 keeps room for them between updates too.
    kept = gradients if zero.stage == 3 else 0
    yield Part("gradients", "counted", gradients, gradients, kept)
    yield Part("gradient buckets", "bound", held.buckets, held.kept, held.kept)
    masters, moments = (0, 0) if optimizer_away else (held.masters, held.moments)
    yield Part("float32 master weights", "counted", masters, masters, masters)
    yield Part("optimizer moments", "counted", moments, moments, moments)
    yield Part("optimizer's step", "bound", 0, held.stepping, 0)
    yield Part("activations of a pack", "traced", activations)


def _reference(frozen: Sequence[Parameter], stage: int, gpus: int, zero: Any) -> Part:
    if stage < 3:
        size = sum(p.numel * p.bytes for p in frozen)
    else:
        small = int(zero.param_persistence_threshold)
        size = sum(_cut(p, gpus) * p.bytes + p.numel * p.bytes * (p.numel <= small) for p in frozen)
    return Part("reference weights", "counted", size, size, size)


def _margin(parts: Sequence[Part], vllm: bool) -> Part:
    def of(phase: str, context: int, planned: int = 0) -> int:
        tensors = sum(getattr(part, phase) for part in parts)
        return context + int(SLACK * (tensors - planned)) if tensors else 0

    training = CONTEXT + ENGINE_ASLEEP * vllm
    # vLLM keeps within its share by itself.
    share = parts[-1].rollout if vllm else 0
    return Part(
        "margin: CUDA context, allocator",
        "assumed",
        of("update", training),
        of("step", training),
        of("rollout", CONTEXT, share),
    )


# ---------------------------------------------------------------------------------------- advice


@dataclass(frozen=True)
class _Option:
    """Overrides of the recipe, or another number of GPUs, and how dear they are: of the changes
    that fit, the one with the smallest sum is proposed."""

    overrides: tuple[str, ...] = ()
    cost: int = 0
    gpus: int | None = None


AS_IT_IS = _Option()
SMALL_BUCKET = "deepspeed.zero_optimization.reduce_bucket_size=50000000"
# DeepSpeed's own optimizer is not the one that the trainer makes.
OFFLOAD = (
    "deepspeed.zero_optimization.offload_optimizer.device=cpu",
    "deepspeed.zero_force_ds_cpu_optimizer=false",
)
MOST_GPUS, MOST_TOKENS = 1024, 1 << 17
# GPUs that share an engine: those of one machine.
MOST_RANKS = 8


def advise(planner: Planner, gpus: int) -> Advice:
    """The recipe's plan; where it does not fit, what each setting alone would make of it, and last
    the cheapest change that fits, if any; where it does, what fits as well."""
    plan = planner.plan(planner.config, gpus)
    if plan.fits:
        return Advice(plan, room=tuple(_room(planner, plan)))
    axes = _axes(planner.config, plan)
    changes = []
    for axis in axes:
        alone = [_try(planner, [option], gpus) for option in axis[1:]]
        # The first that fits, or how far this setting goes.
        chosen = [change for change in alone if change.fits][:1] or alone[-1:]
        changes += [change for change in chosen if change.fits or change.needed < plan.needed]
    for options in sorted(itertools.product(*axes), key=lambda each: sum(o.cost for o in each)):
        change = _try(planner, options, gpus)
        if change.fits:
            return Advice(plan, (*(c for c in changes if c != change), change))
    return Advice(plan, tuple(changes))


def _axes(config: Config, plan: Plan) -> list[list[_Option]]:
    """The values of each setting, from the recipe's own on."""
    zero = config.deepspeed.get("zero_optimization", {})
    buckets, tokens, checkpointing, stages, offload, more, shared = ([AS_IT_IS] for _ in range(7))
    if "reduce_bucket_size" not in zero:
        buckets.append(_Option((SMALL_BUCKET,), cost=1))
    # A pack holds the longest example in any case.
    for halvings in range(1, 20):
        fewer = config.micro_batch_tokens >> halvings
        if fewer >= config.max_length:
            tokens.append(_Option((f"micro_batch_tokens={fewer}",), cost=2 * halvings))
    if not config.gradient_checkpointing:
        checkpointing.append(_Option(("gradient_checkpointing=true",), cost=5))
    most = 2 if config.load_in_4bit else 3
    for stage in range(plan.stage + 1, most + 1) if plan.gpus > 1 else ():
        stages.append(_Option((f"zero_stage={stage}",), cost=6 + stage))
    if "offload_optimizer" not in zero and (plan.stage or plan.gpus == 1):
        # Without ZeRO there is none; on one GPU its last stage shards nothing and offloads.
        first = () if plan.stage else (f"zero_stage={most}",)
        offload.append(_Option((*first, *OFFLOAD), cost=30))
    for doublings in range(1, 11):
        many = plan.gpus << doublings
        if many <= MOST_GPUS:
            more.append(_Option(cost=40 * doublings, gpus=many))
    ranks = 2 * config.rollout.tensor_parallel_size
    while not plan.engine_fits and ranks <= MOST_RANKS and plan.gpus % ranks == 0:
        shared.append(_Option((f"rollout.tensor_parallel_size={ranks}",), cost=3 * ranks))
        ranks *= 2
    return [buckets, tokens, checkpointing, stages, offload, shared, more]


def _try(planner: Planner, options: Iterable[_Option], gpus: int) -> Change:
    options = list(options)
    overrides = [override for option in options for override in option.overrides]
    gpus = next((option.gpus for option in options if option.gpus), gpus)
    config = override_config(planner.config, overrides)
    plan = planner.plan(config, gpus)
    if not plan.fits and _samples_with_vllm(config):
        share = _share_left(plan, config)
        wider = override_config(config, [share]) if share is not None else config
        # The engine takes what the trainer leaves.
        if share is not None and planner.plan(wider, gpus).fits:
            overrides, plan = [*overrides, share], planner.plan(wider, gpus)
    return Change(tuple(overrides), gpus, plan.needed, plan.host, plan.fits)


def _samples_with_vllm(config: Config) -> bool:
    return config.online is not None and config.rollout.engine in ("auto", "vllm")


def _share_left(plan: Plan, config: Config) -> str | None:
    """The largest share, in steps of 0.05, that vLLM can have beside what else there is."""
    others = plan.peak("rollout") - int(config.rollout.gpu_memory_utilization * plan.memory)
    twentieths = min(19, int(20 * (plan.memory - others) / plan.memory))
    return f"rollout.gpu_memory_utilization={twentieths / 20}" if twentieths > 0 else None


def _room(planner: Planner, plan: Plan) -> Iterator[Change]:
    """Single changes that spend free memory on speed, as far as they fit."""
    config = planner.config
    more = planner.most_tokens(config, plan)
    candidates = [[f"micro_batch_tokens={more}"]] if more > config.micro_batch_tokens else []
    if config.gradient_checkpointing:
        candidates.append(["gradient_checkpointing=false"])
    candidates += [[f"zero_stage={stage}"] for stage in range(plan.stage)]
    share = _share_left(plan, config) if _samples_with_vllm(config) else None
    if share is not None and float(share.partition("=")[2]) > config.rollout.gpu_memory_utilization:
        candidates.append([share])
    changes = [_try(planner, [_Option(tuple(each))], plan.gpus) for each in candidates]
    return (change for change in changes if change.fits)


# ---------------------------------------------------------------------------------------- output


PHASES = {"update": "pack", "step": "optimizer", "rollout": "rollout"}


def report(advice: Advice, times: Times | None = None) -> dict[str, Any]:
    """Everything as plain values; memory in bytes."""
    plan = advice.plan
    return asdict(plan) | {
        "peak": {phase: plan.peak(phase) for phase in PHASES},
        "needed": plan.needed,
        "fits": plan.fits,
        "times": asdict(times) if times is not None else None,
        "changes": [asdict(change) for change in advice.changes],
        "room": [asdict(change) for change in advice.room],
    }


def show(advice: Advice, console: Console, times: Times | None = None) -> None:
    """A table of parts, then what to set, then how long a pack takes."""
    plan = advice.plan
    phases = [phase for phase in PHASES if plan.peak(phase)]
    table = Table(box=None, pad_edge=False, padding=(0, 2))
    table.add_column("GiB on each GPU")
    for phase in phases:
        table.add_column(PHASES[phase], justify="right")
    table.add_column("known")
    for part in plan.parts:
        sizes = [getattr(part, phase) for phase in phases]
        table.add_row(part.name, *(_gib(n) if n else "-" for n in sizes), part.how)
    table.add_row("together", *(_gib(plan.peak(phase)) for phase in phases), "", style="bold")
    say = _plain(console)
    say(
        f"{plan.gpus} x {plan.gpu} ({_gib(plan.memory)} GiB), ZeRO {plan.stage}, packs of "
        f"{plan.micro_batch_tokens:,} tokens, "
        f"{'with' if plan.gradient_checkpointing else 'without'} gradient checkpointing"
    )
    console.print(table)
    if plan.host:
        say(f"and {_gib(plan.host)} GiB of host memory for each GPU")
    for note in plan.notes:
        say(note)
    say(_verdict(plan))
    if advice.changes:
        say(
            "what to set, the last line first:"
            if advice.changes[-1].fits
            else "none of these fits:"
        )
    elif advice.room:
        say("what fits as well:")
    for change in (*advice.changes, *advice.room):
        fits = "fits" if change.fits else "-"
        say(f"  {_gib(change.needed):>7}  {fits:4}  {_words(change, plan)}")
    say(_duration(plan, times))


def _duration(plan: Plan, times: Times | None) -> str:
    if times is None:
        return "no times: --calibration RUN takes them from a run on this device"
    rate = times.calibration.operations / 1e12
    return (
        f"updates alone, at the {rate:,.4g} TFLOP/s of {times.calibration.run}: "
        f"{times.seconds_per_pack:,.3g} s for a pack of {plan.micro_batch_tokens:,} tokens, "
        f"{times.tokens_per_second:,.0f} tokens/s on {plan.gpus} x {plan.gpu}"
    )


def _verdict(plan: Plan) -> str:
    if plan.fits:
        return f"fits, with {_gib(plan.memory - plan.needed)} GiB to spare"
    if plan.needed > plan.memory:
        return f"does not fit: {_gib(plan.needed - plan.memory)} GiB too much"
    return "does not fit: the engine's share is too small for the model and its longest sequence"


def _words(change: Change, plan: Plan) -> str:
    more = [f"{change.gpus} GPUs"] if change.gpus != plan.gpus else []
    host = [f"({_gib(change.host)} GiB on the host)"] if change.host != plan.host else []
    return " ".join((*change.settings, *more, *host))


def _plain(console: Console) -> Callable[[str], None]:
    return lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True)


def _gib(size: int) -> str:
    return f"{size / GIB:,.2f}"
