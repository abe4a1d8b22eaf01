"""What a run starts, and what it proves before its first step.

Engines, judges and the choice of a dtype; then that packing, sharing, log-probs and the weight sync
do with this very model what they are meant to.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from fastalign import checkpoint, ranks
from fastalign.attention import choose_kernel
from fastalign.batch import make_batch
from fastalign.config import Config, ConfigError, JudgeConfig
from fastalign.data import Example, Stream
from fastalign.endpoint import Endpoint
from fastalign.judge import JudgeModel, load_rule
from fastalign.local import make_renderer
from fastalign.logprobs import (
    Policy,
    check_logprobs,
    check_packing,
    check_sharing,
    probe_batch,
    probe_streams,
)
from fastalign.methods import Method
from fastalign.methods.base import JudgeKind
from fastalign.model import (
    POLICY,
    TrainedModel,
    choose_dtype,
    choose_zero_stage,
    context_length,
    dropouts,
    load_tokenizer,
    resolve_dtype,
)
from fastalign.online import push_weights, wake
from fastalign.rollout import (
    EngineError,
    RolloutEngine,
    ServedModel,
    choose_engine,
    choose_judge_engine,
    make_engine,
)
from fastalign.rollout.sync import LEAST_CHANGE, canary
from fastalign.run import Choice, Run
from fastalign.templates import Renderer
from fastalign.tracking import Tracker
from fastalign_kernels import default_implementation

CANARY_STRENGTHS = 4
HALVES = ("bfloat16", "float16")
# Mean difference of log-probs between two implementations of one model, in nats; measured are
# 0.03 to 0.1 in bfloat16 and 1e-5 in float32.
MOST_ROUNDING_HALF, MOST_ROUNDING = 0.25, 1e-2


def settle_dtype(config: Config, device: torch.device, found: Path | None) -> tuple[Config, str]:
    """The recipe with one dtype for all ranks, and why it is that one; collective.

    What is fast is measured, and the machine that a run goes on with may be another: a run keeps
    the dtype of its checkpoint ``found``.
    """
    if config.dtype == "auto" and found is not None:
        held = checkpoint.read_recipe(found).dtype
        return config.model_copy(update={"dtype": held}), "that of the checkpoint"
    chosen, why = choose_dtype(config, device)
    dtype, why = ranks.from_first((str(chosen).removeprefix("torch."), why))
    return config.model_copy(update={"dtype": dtype}), why


def check_judges(config: Config, method: Method) -> None:
    """Refuse a rule that is not there before a model is loaded, not when it is first asked."""
    for key, who, kind in judges(config, method):
        if who.type == "rule":
            load_rule(who, kind, key)


def judges(config: Config, method: Method) -> list[tuple[str, JudgeConfig, JudgeKind]]:
    """The recipe's sections that judge rollouts, and what each is asked for."""
    if config.online is None:
        return []
    found: list[tuple[str, JudgeConfig, JudgeKind]] = []
    if config.judge is not None and method.judge_kind is not None:
        found.append(("judge", config.judge, method.judge_kind))
    if config.eval_judge is not None:
        found.append(("eval_judge", config.eval_judge, "pairwise"))
    return found


def make_endpoints(config: Config, method: Method) -> dict[str, Endpoint]:
    """The servers that judge; what they reply is kept in output_dir."""
    return {
        key: Endpoint(who.endpoint, key, Path(config.output_dir, f"{key}-replies.jsonl"))
        for key, who, _ in judges(config, method)
        if who.type == "endpoint" and who.endpoint is not None
    }


def wants_reference(config: Config, method: Method) -> bool:
    """Whether anything behind the first step compares with the frozen start, which is then kept.

    Raises:
        ConfigError: the reference is to move, but there is none.
    """
    asked = (config.judge, config.eval_judge) if config.online else ()
    # Online evaluation reports how far the policy has moved from the reference.
    measured = config.online is not None and config.eval_steps is not None
    wanted = (
        # Data that does not change is compared with the start before there is anything else.
        (config.online is not None and method.needs_reference)
        or measured
        or any(
            judge is not None and judge.type == "self" and judge.model == "reference"
            for judge in asked
        )
    )
    if config.refreshes and not wanted:
        raise ConfigError(
            "online.rounds_per_reference is set, but nothing in this run has a reference: no "
            "self judge, no loss and no evaluation compares with one; leave it out"
        )
    return wanted


def start_engine(
    config: Config,
    device: torch.device,
    method: Method,
    renderers: Sequence[Renderer],
    eval_renderers: Sequence[Renderer],
) -> RolloutEngine:
    """An engine with room for the longest rollout, and for what it is asked where it judges."""
    words = {"judge": renderers, "eval_judge": eval_renderers}
    rooms = [
        _judging_room(config, who, kind, words[key])
        for key, who, kind in judges(config, method)
        if who.type == "self"
    ]
    length = config.max_length + config.max_completion_length + max(rooms, default=0)
    return make_engine(
        ServedModel(
            config.model_name_or_path,
            revision=config.model_revision,
            dtype=resolve_dtype(config, device),
            device=device,
            max_model_len=min(length, context_length(config)),
            tokenizer=renderers[0].tokenizer if config.stop else None,
            lora_rank=config.lora_r if config.use_peft else None,
            seed=config.seed,
            trust_remote_code=config.trust_remote_code,
            load_in_4bit=config.load_in_4bit,
        ),
        config.rollout,
        world_size=dist.get_world_size(),
    )


def _judging_room(
    config: Config, who: JudgeConfig, kind: JudgeKind, renderers: Sequence[Renderer]
) -> int:
    """Tokens that a judge needs beyond the longest rollout."""
    empty = [{"role": "user", "content": ""}]
    if kind == "written":
        return who.max_tokens + max(len(r.written_prompt_ids(empty, "")) for r in renderers)
    # The second answer.
    around = max(
        len(r.judge_prompt_ids(empty, "", "", principle))
        for r in renderers
        for principle in who.principles or (None,)
    )
    return config.max_completion_length + around


def _in_place(config: Config, who: JudgeConfig) -> Config:
    """The recipe with the judging model in place of the trained one."""
    return config.model_copy(
        update={"model_name_or_path": who.model_name_or_path, "model_revision": None}
    )


def model_judges(config: Config, method: Method) -> dict[str, Renderer]:
    """How other models that judge are asked, by the recipe's section: in their own tokens."""
    made = {}
    for key, who, kind in judges(config, method):
        if who.type == "model":
            theirs = _in_place(config, who)
            try:
                made[key] = make_renderer(theirs, load_tokenizer(theirs), who, kind)
            except ConfigError as error:
                raise ConfigError(f"{key}.{error}") from None
    return made


def start_judge_models(
    config: Config,
    device: torch.device,
    method: Method,
    renderers: Mapping[str, Renderer],
    tracker: Tracker,
) -> dict[str, JudgeModel]:
    """Other models that judge, each asleep in an engine of its own."""
    made: dict[str, JudgeModel] = {}
    for key, who, kind in judges(config, method):
        if who.type != "model":
            continue
        theirs = _in_place(config, who)
        length = config.max_length + config.max_completion_length
        length += _judging_room(config, who, kind, [renderers[key]])
        settings, why = choose_judge_engine(config.rollout, device)
        engine = make_engine(
            ServedModel(
                theirs.model_name_or_path,
                dtype=resolve_dtype(config, device),
                device=device,
                # Another tokenizer may need more tokens for the same text.
                max_model_len=min(2 * length, context_length(theirs)),
                seed=config.seed,
                trust_remote_code=config.trust_remote_code,
            ),
            settings,
            world_size=dist.get_world_size(),
        )
        engine.sleep()
        made[key] = JudgeModel(engine, renderers[key])
        tracker.say(
            f"{key}: {who.model_name_or_path} in an engine of its own, {engine.name} ({why})"
        )
    return made


def check_forward(
    config: Config,
    policy: Policy,
    forward: Callable[..., Any],
    words: np.ndarray,
    device: torch.device,
) -> tuple[str | None, float]:
    """Pack where the model can, and compare log-probs of ``words`` [n] with its own logits.

    ``forward`` is the policy, or the DeepSpeed engine around it.  Returns why sequences run alone,
    None where they are packed, and the mean difference of the log-probs.
    """
    unpacked = _pack(config, policy, forward, device)
    sample = Example((Stream.of("probe", words[:1], words[1:]),), 1.0, "start-up check")
    return unpacked, check_logprobs(policy, forward, make_batch([sample]).to(device))


def _pack(
    config: Config, policy: Policy, forward: Callable[..., Any], device: torch.device
) -> str | None:
    if config.attn_implementation is not None:
        return f"attn_implementation = {config.attn_implementation!r} is set"
    vocabulary = policy.causal_lm.config.get_text_config().vocab_size
    return check_packing(policy, forward, probe_batch(vocabulary, (37, 52), device))


def share(policy: Policy, forward: Callable[..., Any]) -> str | None:
    """Let streams share their prefix where the model can; otherwise why they do not."""
    vocabulary = policy.causal_lm.config.get_text_config().vocab_size
    return check_sharing(policy, forward, probe_streams(vocabulary, 24, (13, 28, 1)))


def probe_words(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Token ids of a plain text, int32 [n]."""
    text = "The quick brown fox jumps over the lazy dog. It was not amused."
    return np.array(tokenizer(text).input_ids, dtype=np.int32)


def check_start(run: Run, dtype_why: str) -> None:
    """Prove what the run relies on, and say what was chosen."""
    model, say = run.model, run.tracker.say
    words = probe_words(run.tokenizer)
    run.model.engine.eval()
    unpacked, gap = check_forward(run.config, model.policy, model.engine, words, model.device)
    if model.reference_engine is not None:
        _pack(run.config, model.reference_policy, model.reference_engine, model.device)
    unshared = None
    if unpacked is None:
        unshared = share(model.policy, model.engine)
        if unshared is None and model.reference_engine is not None:
            unshared = share(model.reference_policy, model.reference_engine)
    run.model.engine.train()
    for name, choice in _choices(run, dtype_why, unpacked, unshared, gap).items():
        run.choose(name, choice)
    cut = run.config.cut
    if run.config.method == "cut" and cut.misalign and (cut.lambda_ <= 1 or not cut.detection):
        why = f"cut.lambda = {cut.lambda_} is at most 1" if cut.detection else "no cut.detection"
        say(f"{why}: the penalty's slope is unbounded where the model is certain")
    if run.engine is not None:
        _check_sync(run, words)


def _choices(
    run: Run, dtype_why: str, unpacked: str | None, unshared: str | None, gap: float
) -> dict[str, Choice]:
    """What a step runs on, and why."""
    config, model = run.config, run.model
    trainable = sum(
        getattr(p, "ds_numel", p.numel()) for p in model.policy.parameters() if p.requires_grad
    )
    dtype = str(model.dtype).removeprefix("torch.")
    if config.load_in_4bit:
        dtype += " on a base in NF4"
    threads = "torch's default"
    if "OMP_NUM_THREADS" in os.environ:
        threads = f"OMP_NUM_THREADS = {os.environ['OMP_NUM_THREADS']}"
    kernel, why = choose_kernel(model.device, model.dtype)
    chosen = {
        "model": Choice(f"{config.model_name_or_path}, {trainable:,} trainable parameters"),
        "dtype": Choice(dtype, dtype_why),
        "processes": Choice(f"{run.world_size} on {model.device.type}"),
        "ZeRO stage": Choice(str(model.zero_stage), choose_zero_stage(config, run.world_size)[1]),
        "threads": Choice(f"{torch.get_num_threads()} a process", threads),
        "attention": (
            Choice(f"packed, no padding, by {kernel}", why)
            if unpacked is None
            else Choice("one sequence at a time", f"unpacked: {unpacked}")
        ),
    }
    if config.async_save:
        size = checkpoint.bytes_to_come(model) / 2**20
        copies = f"from a copy of {size:,.0f} MiB in the host's memory"
        if run.world_size > 1:
            copies += ", of all processes together"
        chosen["saving"] = Choice("behind the training", copies)
    if model.shares_prefixes:
        what = "what the streams of an example begin with is computed once"
        chosen["prefixes"] = Choice("shared", what + _same_dropout(model.policy))
    elif unshared is not None:
        chosen["prefixes"] = Choice("each stream is computed from its start", unshared)
    name, why = default_implementation(model.device, model.dtype), "on a GPU"
    if name == "torch":
        why = "no GPU" if model.device.type == "cpu" else "triton is not installed"
    agree = f"they agree with the model's own logits, mean difference {gap:.1e}"
    chosen["kernels"] = Choice(f"log-probs and losses in {name}", f"{why}; {agree}")
    return chosen


def _same_dropout(policy: torch.nn.Module) -> str:
    """What sharing changes where something is dropped, by the names of the rates."""
    found = dropouts(policy)
    if not found:
        return ""
    rates = ", ".join(f"{name} = {rate}" for name, rate in sorted(found.items()))
    return f": {rates} drops the same of it for all of them"


def _check_sync(run: Run, words: np.ndarray) -> None:
    """Push visibly changed weights, see the engine follow the trainer, and put them back."""
    engine, model = run.engine, run.model
    assert engine is not None
    wake(run)
    adapter = POLICY if model.uses_adapter else None
    prompts = [words[:n] for n in range(1, len(words))]
    tokens = sorted(set(words.tolist()))
    disturbance = contextlib.ExitStack()
    model.engine.eval()
    # What rounding alone makes of engine and trainer: the least that means something here.
    rounding = np.abs(
        engine.next_logprobs(prompts, tokens, adapter)
        - _trainer_next_logprobs(model, words, tokens)
    ).mean()
    half = torch.finfo(model.dtype).bits < 32 or run.config.rollout.dtype in HALVES
    if rounding > (MOST_ROUNDING_HALF if half else MOST_ROUNDING):
        raise EngineError(
            f"the log-probs of {engine.name} differ from the trainer's by {rounding:.3g} on "
            "average before any training: the two do not hold the same model"
        )
    floor = max(1.5 * float(rounding), 1e-3)
    strength = _visible_strength(model, words, tokens, at_least=max(0.5, LEAST_CHANGE * floor))
    canary(
        floor=floor,
        perturb=lambda: disturbance.enter_context(model.disturbed(strength)),
        restore=disturbance.close,
        push=lambda: push_weights(run),
        engine_logprobs=lambda: engine.next_logprobs(prompts, tokens, adapter),
        trainer_logprobs=lambda: _trainer_next_logprobs(model, words, tokens),
    )
    model.engine.train()
    # A run that is resumed within a round trains before it samples.
    engine.sleep()
    _, why = choose_engine(run.config.rollout, run.config.load_in_4bit)
    proven = "weight sync proven by content and by canary"
    run.choose("rollouts", Choice(f"by {engine.name}, {proven}", why))


def _visible_strength(
    model: TrainedModel, words: np.ndarray, tokens: Sequence[int], at_least: float
) -> int:
    """The mildest disturbance that moves the log-probs by ``at_least`` nats: far above rounding,
    and not so far that two implementations drift apart."""
    before = _trainer_next_logprobs(model, words, tokens)
    for strength in range(CANARY_STRENGTHS - 1):
        with model.disturbed(strength):
            change = np.abs(_trainer_next_logprobs(model, words, tokens) - before).mean()
        if change > at_least:
            return strength
    return CANARY_STRENGTHS - 1


def _trainer_next_logprobs(
    model: TrainedModel, words: np.ndarray, tokens: Sequence[int]
) -> np.ndarray:
    sample = Example((Stream.of("probe", words[:1], words[1:]),), 1.0, "sync check")
    batch = make_batch([sample]).to(model.device)
    with torch.no_grad():
        logits = model.engine(batch, probe="logits")[batch.rows].float()
    return logits.log_softmax(-1)[:, list(tokens)].cpu().numpy()
