"""What a run trains on and is measured by, from its recipe's data to examples in rounds.

Nothing here needs the model: what is wrong with the data is said before any weights are loaded.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from fastalign.config import Config, ConfigError, JudgeConfig
from fastalign.data import DataReport, Drops, Example, Record, RowError, load_records, split_records
from fastalign.local import make_renderer
from fastalign.methods import Method
from fastalign.methods.base import Dropped, JudgeKind, as_sampled, plain_prompt, rejected_as_sampled
from fastalign.templates import NO_ROOM, Renderer


@dataclass(frozen=True)
class Prepared:
    """Everything that a run reads from its recipe's data.

    Attributes:
        rounds: what is trained on.
        evaluation: held-out examples of an offline run.
        held_out: records held out; those of an online run are prompts.
        judge_pairs: what the judge is measured on.
        renderers: of each dataset, for ``judge``.
        eval_renderers: of each dataset, for ``eval_judge``.
        lines: what to tell of it.
        counts: what became of rows and examples, for the files of the run.
    """

    rounds: Rounds
    evaluation: list[Example]
    held_out: list[Record]
    judge_pairs: list[Record]
    renderers: list[Renderer]
    eval_renderers: list[Renderer]
    lines: list[str]
    counts: dict[str, Any]


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


def prepare(config: Config, method: Method, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """Read, check, tokenise and count all data of a recipe.

    Raises:
        ConfigError: data cannot be what is asked, in one line.
    """
    renderers = make_renderers(config, tokenizer, config.judge, method.judge_kind)
    eval_renderers = make_renderers(config, tokenizer, config.eval_judge)
    records, held_out, reports = load_data(config, method)
    judge_pairs, judge_reports = load_judge_pairs(config)
    reports |= judge_reports
    lines = report_lines(reports)
    if config.online is None:
        lines += token_lines([*records, *held_out], renderers)
    rounds = plan_rounds(config, method, records, renderers)
    if config.eval_steps and not held_out:
        raise ConfigError("eval_steps needs held-out data: set eval_datasets or eval_ratio")
    evaluation: list[Example] = []
    eval_drops = Drops()
    if config.online is not None and held_out:
        held_out, eval_drops = check_prompts(held_out, renderers, config, plain_prompt)
    elif held_out:
        evaluation, eval_drops = make_examples(method, held_out, renderers, config)
    lines += [f"eval: dropped {line}" for line in eval_drops.lines()]
    return Prepared(
        rounds=rounds,
        evaluation=evaluation,
        held_out=held_out,
        judge_pairs=judge_pairs,
        renderers=renderers,
        eval_renderers=eval_renderers,
        lines=lines + rounds.lines,
        counts=count_data(reports, rounds, len(evaluation or held_out), eval_drops),
    )


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
    template; ``judge`` is who reads what they render for it, ``kind`` what it is asked for."""
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
    prompts: list[Record] = []
    for epoch in range(math.ceil(config.num_train_epochs)):
        prompts += [records[i] for i in order(config, len(records), epoch)]
    per_prompt = method.examples_per_prompt(online.num_generations)
    examples_per_round = online.prompts_per_iteration * per_prompt * online.num_train_epochs
    per_round = math.ceil(examples_per_round / config.global_batch_size)
    total = config.max_steps or count * per_round
    lines = [f"{len(records)} prompts, {count} rounds of {online.prompts_per_iteration}"]
    lines += [f"  dropped {line}" for line in drops.lines()]
    counts = {"unit": "prompts", "used": len(records), "dropped": drops.counts}
    return Rounds(count, per_round, total, [], prompts, lines, counts)


def order(config: Config, n: int, round_index: int) -> np.ndarray:
    """A permutation that depends on seed and round alone, so a resumed run sees the same."""
    if not config.shuffle:
        return np.arange(n)
    return np.random.default_rng((config.seed, round_index)).permutation(n)


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
