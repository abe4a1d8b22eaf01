"""The loop, from a recipe to a trained model, offline and online alike.

A run is a number of rounds.  Offline a round is an epoch of the dataset; online it is new prompts,
rollouts from the current model, and, where the method asks for that, what a judge says of them.
Either way a round ends in a list of examples, which is cut into global batches, and each of those
into packs.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
import transformers

from fastalign import checkpoint, model_card, ranks
from fastalign.batch import Batch, plan_batches
from fastalign.config import Config, ConfigError, dump_config
from fastalign.data import Example
from fastalign.endpoint import BudgetSpent, Endpoint, JudgeError
from fastalign.evaluate import Evaluator
from fastalign.judge import JudgeModel
from fastalign.methods import Metrics, complete, make_method
from fastalign.model import build_model, init_distributed, load_tokenizer, resolve_adapter
from fastalign.online import collect, draw, finish_ahead, measure_judge, sample_ahead
from fastalign.preemption import Interrupted, Stop
from fastalign.prepare import Rounds, lr_factor, order, prepare
from fastalign.profiling import Profiler
from fastalign.reference import reference_logprobs, score_reference
from fastalign.rollout import EngineFault
from fastalign.run import Run, on_any_rank, reduce_metrics
from fastalign.startup import (
    check_judges,
    check_start,
    make_endpoints,
    model_judges,
    settle_dtype,
    start_engine,
    start_judge_models,
    wants_reference,
)
from fastalign.timeline import Timeline, peak_memory, peak_operations
from fastalign.tracking import Tracker

# Records named in a message.
NAMED = 8


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
    config, dtype_why = settle_dtype(config, device, found)
    transformers.utils.logging.disable_progress_bar()

    method = make_method(config)
    check_judges(config, method)
    needs_reference = wants_reference(config, method)
    tokenizer = load_tokenizer(config)
    data = prepare(config, method, tokenizer)
    judge_renderers = model_judges(config, method)
    identity = model_card.identify(config) if rank == 0 else {}

    tracker = Tracker(config, rank, data.rounds.total_steps)
    engine = None
    asked: dict[str, Endpoint | JudgeModel] = {}
    try:
        for line in skipped + data.lines:
            tracker.say(line)
        asked |= make_endpoints(config, method)
        # Engines load before the model: loading must not see ZeRO-3's sharded construction.
        if config.online is not None:
            tracker.phase("engine")
            engine = start_engine(config, device, method, data.renderers, data.eval_renderers)
            asked |= start_judge_models(config, device, method, judge_renderers, tracker)
        tracker.phase("model")
        model = build_model(config, device=device, needs_reference=needs_reference)
        run = Run(
            config,
            method,
            tokenizer,
            model,
            engine,
            data.renderers,
            tracker,
            rank,
            world_size,
            asked,
            data.judge_pairs,
            stop,
            identity,
        )
        tracker.phase("check")
        check_start(run, dtype_why)
        rounds, evaluation = data.rounds, data.evaluation
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
            facts = model_card.begin(config, identity, run.chosen, data.counts, rounds.total_steps)
        evaluate = Evaluator(run, evaluation, data.held_out, data.eval_renderers)
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


def _score_reference(run: Run, rounds: Rounds) -> Rounds:
    """With the reference's log-probs of all examples that so many steps train on."""
    examples = list(rounds.examples)
    # An epoch shows each of them.
    seen = rounds.total_steps * run.config.global_batch_size
    indices = sorted(order(run.config, len(examples), 0)[:seen].tolist())
    scored = score_reference(run, [examples[i] for i in indices])
    for index, example in zip(indices, scored, strict=True):
        examples[index] = example
    return replace(rounds, examples=examples)


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
    indices = np.concatenate(
        [order(config, len(examples), position.round * epochs + e) for e in range(epochs)]
    )
    size = config.global_batch_size
    for index in range(position.batch, _batches_in(config, len(examples))):
        yield index, [examples[i] for i in indices[index * size : (index + 1) * size]]


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
