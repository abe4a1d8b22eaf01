"""The loop, from a recipe to a trained model, offline and online alike.

A run is a number of rounds.  Offline a round is an epoch of the dataset; online it is new prompts,
rollouts from the current model, and, where the method asks for that, what a judge says of them.
Either way a round ends in a list of examples, which is cut into global batches, and each of those
into packs.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
import transformers
from transformers import PreTrainedTokenizerBase

from fastalign import checkpoint, model_card, ranks
from fastalign.attention import choose_kernel
from fastalign.batch import Batch, make_batch, plan_batches
from fastalign.config import Config, ConfigError, JudgeConfig, dump_config
from fastalign.data import (
    DataReport,
    Drops,
    Example,
    Record,
    RowError,
    Stream,
    load_records,
    split_records,
)
from fastalign.endpoint import BudgetSpent, Endpoint, JudgeError
from fastalign.evaluate import Evaluator
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
from fastalign.methods import Method, Metrics, complete, make_method
from fastalign.methods.base import (
    Dropped,
    JudgeKind,
    as_sampled,
    plain_prompt,
    rejected_as_sampled,
)
from fastalign.model import (
    POLICY,
    TrainedModel,
    build_model,
    choose_dtype,
    choose_zero_stage,
    context_length,
    dropouts,
    init_distributed,
    load_tokenizer,
    resolve_adapter,
    resolve_dtype,
)
from fastalign.online import (
    collect,
    draw,
    finish_ahead,
    measure_judge,
    push_weights,
    sample_ahead,
    wake,
)
from fastalign.preemption import Interrupted, Stop
from fastalign.profiling import Profiler
from fastalign.reference import reference_logprobs, score_reference
from fastalign.rollout import (
    EngineError,
    EngineFault,
    RolloutEngine,
    choose_engine,
    choose_judge_engine,
    make_engine,
)
from fastalign.rollout.sync import LEAST_CHANGE, canary
from fastalign.run import Choice, Run, on_any_rank, reduce_metrics
from fastalign.templates import NO_ROOM, Renderer
from fastalign.timeline import Timeline, peak_memory, peak_operations
from fastalign.tracking import Tracker
from fastalign_kernels import default_implementation

CANARY_STRENGTHS = 4
# Records named in a message.
NAMED = 8
HALVES = ("bfloat16", "float16")
# Mean difference of log-probs between two implementations of one model, in nats; measured are
# 0.03 to 0.1 in bfloat16 and 1e-5 in float32.
MOST_ROUNDING_HALF, MOST_ROUNDING = 0.25, 1e-2


class Paused(Exception):
    """The run stopped where the recipe or a signal told it to, with a checkpoint to go on from."""


class NotFinite(FloatingPointError):
    """A loss or a gradient norm is no finite number, so that no step was made of it."""


def train(config: Config, stop: Stop | None = None) -> dict[str, float]:
    """Run a recipe; returns the last metrics.  ``stop`` hears the signals that end it early.

    Raises:
        ConfigError: recipe, data or model cannot be what is asked, in one line.
        EngineError: the rollout engine failed or does not hold what it was sent.
        JudgeError: the judge failed.
        Paused: a limit of what a judge may cost was reached, or a signal came.
        CheckpointError: a checkpoint could not be written; an earlier one is as it was.
        Interrupted: a signal came before there was anything to save.
    """
    stop = stop or Stop()
    device = init_distributed(timeout_s=7200.0)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    random.seed(config.seed)
    torch.manual_seed(config.seed)

    config = complete(resolve_adapter(config))
    found, skipped = checkpoint.find_checkpoint(config)
    config, dtype_why = _settle_dtype(config, device, found)
    transformers.utils.logging.disable_progress_bar()

    method = make_method(config)
    check_judges(config, method)
    tokenizer = load_tokenizer(config)
    renderers = make_renderers(config, tokenizer, config.judge, method.judge_kind)
    eval_renderers = make_renderers(config, tokenizer, config.eval_judge)
    judge_renderers = _model_judges(config, method)
    records, held_out, reports = load_data(config, method)
    judge_pairs, judge_reports = load_judge_pairs(config)
    reports |= judge_reports
    data_lines = report_lines(reports)
    if config.online is None:
        data_lines += token_lines([*records, *held_out], renderers)
    rounds = plan_rounds(config, method, records, renderers)
    if config.eval_steps and not held_out:
        raise ConfigError("eval_steps needs held-out data: set eval_datasets or eval_ratio")
    evaluation: list[Example] = []
    eval_drops = Drops()
    if config.online is not None and held_out:
        held_out, eval_drops = check_prompts(held_out, renderers, config, plain_prompt)
    elif held_out:
        evaluation, eval_drops = make_examples(method, held_out, renderers, config)
    data_lines += [f"eval: dropped {line}" for line in eval_drops.lines()]
    data_counts = count_data(reports, rounds, len(evaluation or held_out), eval_drops)
    identity = model_card.identify(config) if rank == 0 else {}

    tracker = Tracker(config, rank, rounds.total_steps)
    engine = None
    asked: dict[str, Endpoint | JudgeModel] = {}
    try:
        for line in skipped + data_lines + rounds.lines:
            tracker.say(line)
        asked |= make_endpoints(config, method)
        # Engines load before the model: loading must not see ZeRO-3's sharded construction.
        if config.online is not None:
            tracker.phase("engine")
            engine = _make_engine(config, device, method, renderers, eval_renderers)
            asked |= _make_judge_models(config, device, method, judge_renderers, tracker)
        needs_reference = wants_reference(config, method)
        if config.refreshes and not needs_reference:
            raise ConfigError(
                "online.rounds_per_reference is set, but nothing in this run has a reference: no "
                "self judge, no loss and no evaluation compares with one; leave it out"
            )
        tracker.phase("model")
        model = build_model(config, device=device, needs_reference=needs_reference)
        run = Run(
            config,
            method,
            tokenizer,
            model,
            engine,
            renderers,
            tracker,
            rank,
            world_size,
            asked,
            judge_pairs,
            stop,
            identity,
        )
        tracker.phase("check")
        check_start(run, dtype_why)
        if config.online is None and method.needs_reference:
            rounds = _score_reference(run, rounds)
            evaluation = score_reference(run, evaluation)
        pending = checkpoint.Pending()
        # What later evaluations are compared with.
        position = checkpoint.Position(evaluation_due=config.eval_steps is not None)
        if found is not None:
            position, pending = checkpoint.load_checkpoint(run, found)
            run.ahead = pending.ahead
            tracker.say(f"resumed from {found} at step {position.step}")
        elif config.resume_from_checkpoint:
            tracker.say(f"no checkpoint in {config.output_dir}: starting from the beginning")
        if found is None and config.online is not None and config.online.fresh_adapter:
            checkpoint.save_start(model, config.output_dir)
        facts: dict[str, Any] = {}
        if rank == 0:
            Path(config.output_dir, "recipe.yaml").write_text(dump_config(config), encoding="utf-8")
            facts = model_card.begin(config, identity, run.chosen, data_counts, rounds.total_steps)
        evaluate = Evaluator(run, evaluation, held_out, eval_renderers)
        stop.started()
        with Profiler(config, rank, tracker.say) as profiler, checkpoint.finishing(run):
            metrics = run_rounds(run, rounds, position, pending, evaluate, profiler)
        tracker.phase("save")
        checkpoint.save_result(model, tokenizer, Path(config.output_dir))
        if rank == 0:
            model_card.write(config, metrics, facts)
        tracker.done(metrics)
        return metrics
    finally:
        tracker.close()
        if engine is not None:
            engine.close()
        for other in asked.values():
            if isinstance(other, Endpoint):
                other.close()
            else:
                other.engine.close()


def _settle_dtype(config: Config, device: torch.device, found: Path | None) -> tuple[Config, str]:
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


# ---------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Rounds:
    """The plan of a run: how many rounds, how many steps, and what each trains on."""

    count: int
    steps_per_round: int
    total_steps: int
    examples: list[Example]
    prompts: list[Record]
    lines: list[str]
    counts: dict[str, Any]


def load_data(
    config: Config, method: Method
) -> tuple[list[Record], list[Record], dict[str, DataReport]]:
    """Training and held-out records, and what became of the rows, by what they are for."""
    wants = eval_wants = method.wants
    if config.online is not None:
        assert method.online_wants is not None
        # Held-out prompts are answered, whatever the method does with the others.
        wants, eval_wants = method.online_wants, "prompt"
    records, report = load_records(
        config.datasets, strict=config.strict, seed=config.seed, want=wants
    )
    reports = {"train": report}
    if config.eval_datasets:
        held_out, eval_report = load_records(
            config.eval_datasets, strict=config.strict, seed=config.seed, want=eval_wants
        )
        # Their renderers follow those of the training data.
        first = len(config.datasets)
        held_out = [replace(record, dataset=first + record.dataset) for record in held_out]
        reports["eval"] = eval_report
    else:
        records, held_out = split_records(records, config.eval_ratio, config.seed)
        if config.online is not None:
            held_out = [
                replace(record, kind="prompt", completion=None, judgment=None)
                for record in held_out
            ]
    return records, held_out, reports


def report_lines(reports: Mapping[str, DataReport]) -> list[str]:
    """What to tell of the rows of each part; those of training need no name."""
    return [
        line if part == "train" else f"{part}: {line}"
        for part, report in reports.items()
        for line in report.lines()
    ]


def count_data(
    reports: Mapping[str, DataReport], rounds: Rounds, held_out: int, eval_drops: Drops
) -> dict[str, Any]:
    """What became of rows and examples, for the files of the run."""
    sources = [
        {
            "part": part,
            **{key: getattr(source, key) for key in ("path", "kind", "rows", "usable", "records")},
            "negative": source.negative if source.kind == "judged" else None,
            "dropped": source.drops.counts,
        }
        for part, report in reports.items()
        for source in report.sources
    ]
    held = {"used": held_out, "dropped": eval_drops.counts}
    return {"sources": sources, "train": rounds.counts, "eval": held if held_out else None}


def make_renderers(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    judge: JudgeConfig | None,
    kind: JudgeKind | None = "pairwise",
) -> list[Renderer]:
    """One for each dataset, then each of evaluation and of the judge, for each may have its own
    template;
    ``judge`` is who reads what they render for it, ``kind`` what it is asked for."""
    return [
        make_renderer(
            config, tokenizer, judge, kind, dataset.template, dataset.chat_template_kwargs
        )
        for dataset in (*config.datasets, *config.eval_datasets, *config.judge_datasets)
    ]


def load_judge_pairs(config: Config) -> tuple[list[Record], dict[str, DataReport]]:
    """The pairs that the judge is measured on, and what became of the rows."""
    if not config.judge_datasets:
        return [], {}
    records, report = load_records(
        config.judge_datasets, strict=config.strict, seed=config.seed, want="preference"
    )
    first = len(config.datasets) + len(config.eval_datasets)
    records = [replace(record, dataset=first + record.dataset) for record in records]
    return records, {"judge": report}


def token_lines(records: Sequence[Record], renderers: Sequence[Renderer]) -> list[str]:
    """What to tell of answers whose tokens were recorded when they were sampled."""
    recorded = kept = 0
    for record in records:
        recorded += (record.sampled is not None) + (record.sampled_rejected is not None)
        renderer = renderers[record.dataset]
        # What cannot be rendered is dropped and counted with the other rows.
        with contextlib.suppress(RowError):
            kept += as_sampled(record, renderer) is not None
            kept += rejected_as_sampled(record, renderer) is not None
    if not recorded:
        return []
    line = f"{kept} answers are trained on as they were sampled"
    if kept < recorded:
        line += (
            f", {recorded - kept} are tokenised again: their template, tokenizer or text is "
            "not the recorded one"
        )
    return [line]


def make_examples(
    method: Method, records: Sequence[Record], renderers: Sequence[Renderer], config: Config
) -> tuple[list[Example], Drops]:
    """Tokenise records; those that cannot be trained on are counted by reason.

    Raises:
        ConfigError: under ``strict``, the first such record; always when none is left.
    """
    examples: list[Example] = []
    drops = Drops()
    for record in records:
        with dropping(config, record, drops):
            try:
                examples += method.from_record(record, renderers[record.dataset])
            except Dropped as dropped:
                examples += dropped.kept
                raise
    if records and not examples:
        raise ConfigError("no record can be trained on: " + "; ".join(drops.lines()))
    return examples, drops


def check_prompts(
    records: Sequence[Record],
    renderers: Sequence[Renderer],
    config: Config,
    prompt_of: Callable[[Record, Renderer], np.ndarray],
) -> tuple[list[Record], Drops]:
    """Prompts that render and leave room for an answer, before any of them is sampled from."""
    kept: list[Record] = []
    drops = Drops()
    for record in records:
        with dropping(config, record, drops):
            ids = prompt_of(record, renderers[record.dataset])
            if len(ids) >= config.max_length:
                raise Dropped(NO_ROOM)
            kept.append(record)
    if not kept:
        raise ConfigError("no prompt can be sampled from: " + "; ".join(drops.lines()))
    return kept, drops


@contextlib.contextmanager
def dropping(config: Config, record: Record, drops: Drops) -> Iterator[None]:
    """Count a record that turns out to be none to train on; under ``strict`` it is an error."""
    try:
        yield
    except RowError as error:
        if config.strict:
            named = str(error).startswith(record.source)
            raise error if named else RowError(f"{record.source}: {error}", error.reason) from None
        drops.add(error.reason, record.source)
    except Dropped as reason:
        if config.strict:
            raise ConfigError(f"{record.source}: {reason}") from None
        drops.add(str(reason), record.source)


def plan_rounds(
    config: Config, method: Method, records: Sequence[Record], renderers: Sequence[Renderer]
) -> Rounds:
    """Epochs of examples offline, iterations over prompts online."""
    if config.online is None:
        already = method.truncated
        examples, drops = make_examples(method, records, renderers, config)
        truncated = method.truncated - already
        before = len(examples)
        examples = method.select(examples, config.seed)
        if not examples:
            raise ConfigError(
                f"cut.positive_ratio = {config.cut.positive_ratio}: it counts positive records by "
                f"negative ones, and none of {before} has a judgment, so that nothing is left: "
                "set it to null"
            )
        per_round = math.ceil(len(examples) / config.global_batch_size)
        total = config.max_steps or math.ceil(per_round * config.num_train_epochs)
        tokens = sum(len(s.input_ids) for e in examples for s in e.streams)
        lines = [f"{len(examples)} examples, {tokens} tokens, {total} steps"]
        if total == 1 and not lr_factor(config.lr_scheduler_type, 0, 1, config.warmup_ratio):
            lines.append(
                "  the learning rate of the only step is 0, which teaches nothing: train for more "
                f"steps, or set warmup_ratio = {config.warmup_ratio:g} to 0"
            )
        lines += [f"  dropped {line}" for line in drops.lines()]
        if truncated:
            lines.append(f"  answers cut at max_length = {config.max_length}: {truncated}")
        counts = {
            "unit": "examples",
            "used": len(examples),
            "not_selected": before - len(examples),
            "tokens": tokens,
            "truncated": truncated,
            "dropped": drops.counts,
        }
        return Rounds(math.ceil(total / per_round), per_round, total, examples, [], lines, counts)
    online = config.online
    records, drops = check_prompts(records, renderers, config, method.rollout_prompt)
    available = math.floor(len(records) * config.num_train_epochs / online.prompts_per_iteration)
    count = online.iterations or available
    if count > available or count == 0:
        asked = f"online.prompts_per_iteration = {online.prompts_per_iteration}"
        if online.iterations is not None:
            asked = f"online.iterations = {online.iterations} x {asked}"
        raise ConfigError(
            f"{asked} needs more prompts than the {len(records)} there are in "
            f"{config.num_train_epochs:g} epochs"
        )
    order: list[Record] = []
    for epoch in range(math.ceil(config.num_train_epochs)):
        order += [records[i] for i in _order(config, len(records), epoch)]
    per_prompt = method.examples_per_prompt(online.num_generations)
    examples_per_round = online.prompts_per_iteration * per_prompt * online.num_train_epochs
    per_round = math.ceil(examples_per_round / config.global_batch_size)
    total = config.max_steps or count * per_round
    lines = [f"{len(records)} prompts, {count} rounds of {online.prompts_per_iteration}"]
    lines += [f"  dropped {line}" for line in drops.lines()]
    counts = {"unit": "prompts", "used": len(records), "dropped": drops.counts}
    return Rounds(count, per_round, total, [], order, lines, counts)


def _score_reference(run: Run, rounds: Rounds) -> Rounds:
    """With the reference's log-probs of all examples that so many steps train on."""
    examples = list(rounds.examples)
    # An epoch shows each of them.
    seen = rounds.total_steps * run.config.global_batch_size
    indices = sorted(_order(run.config, len(examples), 0)[:seen].tolist())
    scored = score_reference(run, [examples[i] for i in indices])
    for index, example in zip(indices, scored, strict=True):
        examples[index] = example
    return replace(rounds, examples=examples)


def _order(config: Config, n: int, round_index: int) -> np.ndarray:
    """A permutation that depends on seed and round alone, so a resumed run sees the same."""
    if not config.shuffle:
        return np.arange(n)
    return np.random.default_rng((config.seed, round_index)).permutation(n)


# -------------------------------------------------------------------------------------- start-up


def wants_reference(config: Config, method: Method) -> bool:
    """Whether anything behind the first step compares with the frozen start, which is then kept."""
    judges = (config.judge, config.eval_judge) if config.online else ()
    # Online evaluation reports how far the policy has moved from the reference.
    measured = config.online is not None and config.eval_steps is not None
    return (
        # Data that does not change is compared with the start before there is anything else.
        (config.online is not None and method.needs_reference)
        or measured
        or any(
            judge is not None and judge.type == "self" and judge.model == "reference"
            for judge in judges
        )
    )


def _make_engine(
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
        config.rollout,
        model_path=config.model_name_or_path,
        revision=config.model_revision,
        dtype=resolve_dtype(config, device),
        device=device,
        max_model_len=min(length, context_length(config)),
        tokenizer=renderers[0].tokenizer if config.stop else None,
        lora_rank=config.lora_r if config.use_peft else None,
        seed=config.seed,
        world_size=dist.get_world_size(),
        trust_remote_code=config.trust_remote_code,
        load_in_4bit=config.load_in_4bit,
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


def _model_judges(config: Config, method: Method) -> dict[str, Renderer]:
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


def _make_judge_models(
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
            settings,
            model_path=theirs.model_name_or_path,
            dtype=resolve_dtype(config, device),
            device=device,
            # Another tokenizer may need more tokens for the same text.
            max_model_len=min(2 * length, context_length(theirs)),
            seed=config.seed,
            world_size=dist.get_world_size(),
            trust_remote_code=config.trust_remote_code,
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


# ---------------------------------------------------------------------------------------- rounds


def run_rounds(
    run: Run,
    rounds: Rounds,
    position: checkpoint.Position,
    pending: checkpoint.Pending,
    evaluate: Evaluator,
    profiler: Profiler,
) -> dict[str, float]:
    """Everything between start and result."""
    config, tracker = run.config, run.tracker
    tracker.start(position.step, position.logged)
    run.version = position.step
    metrics: dict[str, float] = {}
    every = config.eval_steps if config.eval_steps != "round" else None
    resumed_at = position.step if position.evaluation_due else None
    if position.evaluation_due:
        position, stop = assess(run, position, pending, evaluate, metrics)
        if stop:
            return metrics
    while position.round < rounds.count and position.step < rounds.total_steps:
        if config.online is None:
            examples: Sequence[Example] = rounds.examples
        elif pending.examples:
            examples = pending.examples
        else:
            position = _move_reference(run, position)
            examples, collected = new_round(run, rounds, position)
            metrics |= collected
        pending = checkpoint.Pending(examples if config.online else ())
        _meet(run, position, pending)
        for batch_index, batch in batches(config, examples, position):
            if position.step >= rounds.total_steps:
                break
            scheduled, total = _schedule(config, rounds, position, batch_index, len(examples))
            try:
                done = update(run, batch, scheduled, total)
            except NotFinite as reason:
                position = replace(position, batch=batch_index + 1)
                position = skip(run, position, pending, reason)
                continue
            profiler.step()
            metrics |= done
            position = replace(
                position, step=position.step + 1, batch=batch_index + 1, skipped_in_a_row=0
            )
            run.version = position.step
            if position.step % config.logging_steps == 0:
                # This step's figures alone: rounds and evaluations have lines of their own.
                tracker.log(position.step, done)
            evaluation_due = bool(every and position.step % every == 0)
            if position.step < rounds.total_steps:
                _meet(run, replace(position, evaluation_due=evaluation_due), pending)
            if evaluation_due:
                position, stop = assess(run, position, pending, evaluate, metrics)
                if stop:
                    return metrics
            if config.save_steps and position.step % config.save_steps == 0:
                save(run, position, pending, behind=config.async_save)
        position = replace(position, round=position.round + 1, batch=0)
        pending = checkpoint.Pending()
        # Where there was nothing to train on there is nothing new to evaluate.
        if config.eval_steps == "round" and examples:
            position, stop = assess(run, position, pending, evaluate, metrics)
            if stop:
                return metrics
    if every and position.step % every and position.step != resumed_at:
        assess(run, position, pending, evaluate, metrics)
    return metrics


def save(
    run: Run,
    position: checkpoint.Position,
    pending: checkpoint.Pending,
    behind: bool = False,
) -> Path:
    """Leave a checkpoint, or have it written ``behind`` the training.  It does not hold the weights
    that sample ahead, so the journal has to be whole before it is."""
    finish_ahead(run)
    pending = replace(pending, ahead=run.ahead)
    return checkpoint.save_checkpoint(run, position, pending, behind=behind)


def _move_reference(run: Run, position: checkpoint.Position) -> checkpoint.Position:
    """Iterated self-judgment: where its turn has come, the policy becomes reference and judge."""
    online = run.config.online
    if online is None or online.rounds_per_reference is None:
        return position
    due = position.round // online.rounds_per_reference
    if due > position.references:
        run.model.adopt_reference()
        run.tracker.say(f"round {position.round + 1}: the policy is the reference from here on")
    return replace(position, references=due)


def new_round(
    run: Run, rounds: Rounds, position: checkpoint.Position
) -> tuple[list[Example], dict[str, float]]:
    """Examples of the current model's answers to new prompts."""
    with _pausing(run, position, checkpoint.Pending()):
        measured = measure_judge(run)
        episodes, timings = draw(run, rounds.prompts, position.round)
        _meet(run, position, checkpoint.Pending())
        examples, collected = collect(run, episodes, position.round)
    if _samples_ahead(run.config, rounds, position, len(examples)):
        with _saving(run, position, checkpoint.Pending(examples)):
            sample_ahead(run, rounds.prompts, position.round + 1)
    collected |= measured | timings
    run.tracker.log(position.step, collected, show=False)
    run.tracker.say(f"round {position.round + 1} of {rounds.count}: {_round_figures(collected)}")
    if not examples:
        run.tracker.say(f"round {position.round + 1} of {rounds.count}: nothing to train on")
    elif run.config.online is not None and run.config.online.fresh_adapter and position.round:
        checkpoint.load_start(run.model, run.config.output_dir)
    return examples, collected


def _round_figures(collected: Mapping[str, float]) -> str:
    """What a round drew, for people: shares, and where the time went."""
    parts = [
        f"{collected['rollout/examples']:.0f} examples",
        f"mean length {collected['rollout/mean_length']:.0f}",
    ]
    shares = {
        "rollout/truncated": "at the length limit",
        "judge/negatives": "criticised",
        "judge/abstained": "abstained",
        "judge/flipped": "flipped",
        "judge/failed": "not judged",
    }
    parts += [f"{collected[k]:.0%} {name}" for k, name in shares.items() if collected.get(k)]
    times = {"time/sync": "sync", "time/rollout": "rollout", "time/judge": "judge"}
    parts += [f"{name} {collected[k]:.1f} s" for k, name in times.items() if k in collected]
    return ", ".join(parts)


def _samples_ahead(
    config: Config, rounds: Rounds, position: checkpoint.Position, examples: int
) -> bool:
    """Whether the next round is sampled with the weights that this one starts from: where there is
    a next one."""
    return (
        config.online is not None
        and config.online.max_staleness > 0
        and position.round + 1 < rounds.count
        and position.step + _batches_in(config, examples) < rounds.total_steps
    )


def _schedule(
    config: Config,
    rounds: Rounds,
    position: checkpoint.Position,
    batch_index: int,
    examples: int,
) -> tuple[float, int]:
    """Where the next step stands in its schedule, and how long that is."""
    if config.online is None:
        return float(position.step), rounds.total_steps
    # Rounds may hold fewer examples than planned; the schedule follows the rounds.
    share = batch_index / _batches_in(config, examples)
    if config.online.fresh_adapter:
        return share * rounds.steps_per_round, rounds.steps_per_round
    if config.max_steps is not None:
        return float(position.step), rounds.total_steps
    return (position.round + share) * rounds.steps_per_round, rounds.total_steps


@contextlib.contextmanager
def _pausing(
    run: Run, position: checkpoint.Position, pending: checkpoint.Pending
) -> Iterator[None]:
    """Where a judge has spent what it may, a signal comes, or judge or engine fails, leave a
    checkpoint of this position and stop; inside, what is trained does not change."""
    try:
        # Of several ranks one may be in the middle of something that another waits for.
        with _saving(run, position, pending), run.stop.at_once(run.world_size == 1):
            yield
    except BudgetSpent as spent:
        path = save(run, position, pending)
        raise Paused(f"{spent}; {path} is saved: raise it and continue with --resume") from None
    except Interrupted:
        _pause(run, position, pending)


@contextlib.contextmanager
def _saving(run: Run, position: checkpoint.Position, pending: checkpoint.Pending) -> Iterator[None]:
    """Where judge or engine fails, on all ranks, leave a checkpoint before the error goes on."""
    try:
        yield
    except (EngineFault, JudgeError) as error:
        path = save(run, position, pending)
        raise type(error)(f"{error}; {path} is saved: continue with --resume") from error


def _meet(run: Run, position: checkpoint.Position, pending: checkpoint.Pending) -> None:
    """Where a signal came to any rank, leave a checkpoint of this position and stop; where all have
    written theirs of the one before, finish it.  Collective."""
    writing = run.writer is not None and not run.writer.done
    asked, busy = on_any_rank(run.stop.heard is not None, writing)
    if asked:
        _pause(run, position, pending)
    if not busy:
        checkpoint.finish_checkpoint(run)


def _pause(run: Run, position: checkpoint.Position, pending: checkpoint.Pending) -> NoReturn:
    path = save(run, position, pending)
    raise Paused(f"{run.stop.reason}; {path} is saved: continue with --resume") from None


def assess(
    run: Run,
    position: checkpoint.Position,
    pending: checkpoint.Pending,
    evaluate: Evaluator,
    metrics: dict[str, float],
) -> tuple[checkpoint.Position, bool]:
    """Evaluate, add to ``metrics``, and say whether patience has run out."""
    with _pausing(run, replace(position, evaluation_due=True), pending):
        scores = evaluate(position.step)
    metrics |= scores
    position = replace(position, evaluation_due=False)
    if position.step == 0:
        return position, False
    position, stop = weigh(run, position, scores)
    if stop:
        run.tracker.say(f"stopped early at step {position.step}")
    return position, stop


def weigh(
    run: Run, position: checkpoint.Position, scores: dict[str, float]
) -> tuple[checkpoint.Position, bool]:
    """Keep the best result so far in ``output_dir/best``; say whether patience has run out."""
    config = run.config
    if config.metric_for_best_model is None:
        return position, False
    name = config.metric_for_best_model
    value = scores.get(name, scores.get(f"eval/{name}"))
    if value is None:
        raise ConfigError(
            f"metric_for_best_model = {name!r}: evaluation gives {', '.join(sorted(scores))}"
        )
    greater = config.greater_is_better
    sign = 1 if (not name.endswith("loss") if greater is None else greater) else -1
    if position.best_metric is None or sign * value > sign * position.best_metric:
        checkpoint.save_best(run.model, run.tokenizer, config.output_dir)
        return replace(position, best_metric=value, evals_without_gain=0), False
    position = replace(position, evals_without_gain=position.evals_without_gain + 1)
    patience = config.early_stopping_patience
    return position, patience is not None and position.evals_without_gain >= patience


def batches(
    config: Config, examples: Sequence[Example], position: checkpoint.Position
) -> Iterator[tuple[int, list[Example]]]:
    """Global batches of a round from ``position.batch`` on, in an order fixed by the seed."""
    epochs = config.online.num_train_epochs if config.online else 1
    order = np.concatenate(
        [_order(config, len(examples), position.round * epochs + e) for e in range(epochs)]
    )
    size = config.global_batch_size
    for index in range(position.batch, _batches_in(config, len(examples))):
        yield index, [examples[i] for i in order[index * size : (index + 1) * size]]


def _batches_in(config: Config, examples: int) -> int:
    epochs = config.online.num_train_epochs if config.online else 1
    return math.ceil(examples * epochs / config.global_batch_size)


def skip(
    run: Run, position: checkpoint.Position, pending: checkpoint.Pending, reason: NotFinite
) -> checkpoint.Position:
    """Count a batch that gave no step, behind which the run stands at ``position``.

    Raises:
        FloatingPointError: it is one too many in a row; a checkpoint is there.
    """
    config, in_a_row = run.config, position.skipped_in_a_row + 1
    position = replace(
        position, skipped_in_a_row=in_a_row, skipped_steps=position.skipped_steps + 1
    )
    run.tracker.log(position.step, {"skipped_steps": float(position.skipped_steps)}, show=False)
    if in_a_row < config.max_skipped_steps:
        run.tracker.say(f"no step after step {position.step}: {reason}")
        return position
    message = f"{reason}; {in_a_row} in a row (max_skipped_steps = {config.max_skipped_steps})"
    # Before the first step there is nothing to keep.
    if position.step:
        path = save(run, position, pending)
        message += f"; {path} is saved, with the weights of step {position.step}"
    raise FloatingPointError(message)


def update(run: Run, examples: list[Example], scheduled: float, total: int) -> dict[str, float]:
    """One optimizer step on a global batch; the same however it is cut and over however many
    ranks: each pack's summed loss is divided by the count of the whole batch.

    Raises:
        NotFinite: on all ranks, loss or gradient norm is no finite number on some rank; weights
            and optimizer are as they were.
    """
    config, model = run.config, run.model
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
    timeline = Timeline(model.device)
    factor = lr_factor(config.lr_scheduler_type, scheduled, total, config.warmup_ratio)
    for group in model.optimizer.param_groups:
        group["lr"] = config.learning_rate * factor
    denominator = run.method.denominator(examples)
    cost = run.operations.cost(_asks_reference(run, examples))
    packs = plan_batches(
        examples,
        config.micro_batch_tokens,
        run.rank,
        run.world_size,
        cost,
        share_prefixes=model.shares_prefixes,
    )
    sums: Metrics = {}
    losses: list[torch.Tensor] = []
    run.tracker.phase("train")
    timeline.lap("pack")
    for pack in packs:
        pack = pack.to(model.device)
        reference = reference_logprobs(run, pack)
        if reference is not None:
            timeline.lap("reference")
        loss, parts = model.engine(
            pack, loss=run.method.loss, reference=reference, progress=scheduled / total
        )
        timeline.lap("forward")
        # DeepSpeed averages gradients over ranks; ours are shares of one sum.  Its optimizers skip
        # a step whose gradients are no numbers, and those of a loss that is none may well be: the
        # last factor is 1, or NaN for such a loss.
        share = loss * (run.world_size / denominator) * (loss.detach() - loss.detach() + 1)
        model.engine.backward(share)
        losses.append(loss.detach().double())
        for name, part in parts.items():
            sums[name] = sums.get(name, 0) + part
        timeline.lap("backward")
    loss_sum = sum(losses, torch.zeros((), dtype=torch.float64, device=model.device))
    sums["loss"] = torch.stack([loss_sum, loss_sum.new_tensor(denominator / run.world_size)])
    metrics = reduce_metrics(sums)
    timeline.lap("wait")  # for the slowest rank
    norm = model.step()
    if not math.isfinite(metrics["loss"]):
        wrong = [pack for pack, x in zip(packs, losses, strict=True) if not x.isfinite()]
        mine = [source for pack in wrong for source in pack.sources]
        sources = [source for part in ranks.gather(mine) for source in part]
        raise NotFinite(f"the loss is {metrics['loss']} on {_named(sources)}")
    if norm is None:
        sources = [e.source for e in examples]
        raise NotFinite(f"the gradient norm is no finite number on {_named(sources)}")
    timeline.lap("optimizer")
    return (
        metrics
        | {"grad_norm": norm, "learning_rate": config.learning_rate * factor}
        | speed(run, examples, packs, timeline.seconds())
    )


def speed(
    run: Run, examples: Sequence[Example], packs: Sequence[Batch], parts: dict[str, float]
) -> dict[str, float]:
    """Figures of a step's speed: tokens of all ranks, operations and memory of this one."""
    seconds = sum(parts.values())
    tokens = sum(len(s.input_ids) for e in examples for s in e.streams)
    figures = {f"time/{part}": value for part, value in parts.items()}
    figures |= {"time/step": seconds, "speed/tokens_per_second": tokens / seconds}
    figures["speed/peak_memory_gib"] = peak_memory(run.model.device)
    peak = peak_operations(run.model.device, run.model.dtype)
    if run.operations.known:
        rate = run.operations.of(packs, _asks_reference(run, examples)) / seconds
        figures["speed/tflops"] = rate / 1e12
        if peak is not None:
            figures["speed/mfu"] = rate / peak
    return figures


def _asks_reference(run: Run, examples: Sequence[Example]) -> bool:
    """Whether a step has a forward pass of the reference of its own."""
    return run.method.needs_reference and examples[0].reference_logprobs is None


def _named(sources: Sequence[str]) -> str:
    """Records in a message: the first of many."""
    found = sorted(set(sources))
    more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
    return f"records {', '.join(found[:NAMED])}{more}"


def lr_factor(name: str, step: float, total: int, warmup_ratio: float) -> float:
    """Share of the learning rate at ``step`` of ``total``, as transformers' schedules define it;
    ``step`` may be fractional, because online rounds vary in size."""
    warmup = math.ceil(total * warmup_ratio) if name != "constant" else 0
    if step < warmup:
        return step / max(1, warmup)
    if name in ("constant", "constant_with_warmup"):
        return 1.0
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    if name == "linear":
        return max(0.0, 1.0 - progress)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
