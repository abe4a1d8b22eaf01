"""``fastalign eval --against``: how often one model's answers win against another's."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from fastalign import __version__
from fastalign.config import ConfigError, DatasetConfig, ModelConfig
from fastalign.data import Drops, Record, load_records
from fastalign.episodes import Verdict, sampling_seed
from fastalign.eval_pairs import (
    ask,
    asked,
    estimates_table,
    prompt_key,
    too_little_mass,
    write_texts,
)
from fastalign.judge import Pair
from fastalign.judge_quality import plain
from fastalign.judging import Judging, named, open_judge
from fastalign.local import LocalModel, open_model
from fastalign.rollout import SamplingSettings
from fastalign.win_rate import RIDGE, WinRate, win_rate

REPORT, PAIRS = "wins-report.json", "wins.jsonl"

ROWS = {
    "win_rate": "win rate, abstentions counting half",
    "length_controlled": "win rate at equal length",
    "wins": "wins",
    "losses": "losses",
    "abstained": "judge abstains",
    "mass": "P(A) + P(B) at the decision",
    "flipped": "flips with the order",
    "first_slot": "prefers the first slot",
    "length_a": "mean length in characters",
    "length_b": "  of the other's answers",
}


@dataclass(frozen=True)
class Settings:
    """What the command line asks for.

    Attributes:
        model: answers the prompts, unless ``answers`` has its answers already; judges where
            ``judging.judge.type`` is "self".
        against: the other model, or None where ``against_answers`` names a file.
        prompts: data with prompts; None: those of a file of answers.
        sampling: how both models answer.
    """

    judging: Judging
    sampling: SamplingSettings
    model: ModelConfig | None = None
    answers: str | None = None
    against: ModelConfig | None = None
    against_answers: str | None = None
    prompts: str | None = None
    max_samples: int | None = None
    seed: int = 0

    def check(self) -> None:
        """
        Raises:
            ConfigError: somebody or something that is needed is missing.
        """
        self.judging.check()
        if self.model is None and self.answers is None:
            raise ConfigError("--model or --answers is missing: who is compared with --against")
        if self.model is None and self.judging.judge.type == "self":
            raise ConfigError(
                "--model is missing: the judge is the model itself unless --judge says"
            )
        if self.prompts is None and self.answers is None and self.against_answers is None:
            raise ConfigError("--prompts is missing: two models need something to answer")

    def contestants(self) -> tuple[str, str]:
        """Both in words."""
        first = self.answers or named(_given(self.model))
        return first, self.against_answers or named(_given(self.against))

    def judges_itself(self) -> bool:
        """Whether the judge is one of the contestants."""
        who = self.judging.judge
        playing = [
            model
            for model, file in ((self.model, self.answers), (self.against, self.against_answers))
            if model is not None and file is None
        ]
        if who.type == "self":
            return self.model in playing
        bare = [m.model_name_or_path for m in playing if m.adapter_name_or_path is None]
        return who.type == "model" and who.model_name_or_path in bare


@dataclass(frozen=True)
class Answers:
    """A contestant's answer to each prompt, None where it has none, and how many were cut at the
    most tokens of an answer; None where that is not known, because they were stored."""

    texts: tuple[str | None, ...]
    cut: int | None = None


@dataclass(frozen=True)
class Played:
    """Both answers to each prompt, the verdicts (a is the first contestant), and what follows.

    ``cut``: how many answers of each contestant were cut, see :class:`Answers`.
    """

    settings: Settings
    pairs: tuple[Pair, ...]
    sources: tuple[str, ...]
    verdicts: tuple[Verdict, ...]
    result: WinRate
    cut: tuple[int | None, int | None]
    drops: Drops

    def report(self) -> dict[str, Any]:
        """All figures and what they were measured with, for JSON."""
        settings = self.settings
        first, second = settings.contestants()
        return {
            "fastalign": __version__,
            "contestant": first,
            "against": second,
            "judge": settings.judging.judge.model_dump(mode="json"),
            "judged_by": settings.judging.describe(settings.model),
            "judge_is_a_contestant": settings.judges_itself(),
            "prompts": settings.prompts,
            "left_out": self.drops.counts,
            "sampling": plain(settings.sampling),
            "cut_at_max_tokens": dict(zip(("contestant", "against"), self.cut, strict=True)),
            "max_samples": settings.max_samples,
            "seed": settings.seed,
            "ridge": RIDGE,
            "figures": plain(self.result.figures()),
            "result": plain(self.result),
        }


def play(settings: Settings) -> Played:
    """Have the models answer where they have not yet, and the judge compare.

    One engine is open at a time: the other model's, this one's, and the judge's.

    Raises:
        ConfigError: the data, the judge or a model cannot be used.
        EngineError, JudgeError, BudgetSpent: from whoever answers and judges.
    """
    settings.check()
    drops = Drops()
    prompts = _prompts(settings, drops)
    second = _stored(settings.against_answers, prompts, drops)
    if second is None:
        with _opened(settings, _given(settings.against)) as other:
            second = _sampled(settings, other, prompts, drops)
    first = _stored(settings.answers, prompts, drops)
    with contextlib.ExitStack() as stack:
        own: LocalModel | None = None
        if first is None or settings.judging.judge.type == "self":
            own = stack.enter_context(_opened(settings, _given(settings.model)))
        if first is None:
            assert own is not None
            first = _sampled(settings, own, prompts, drops)
        if own is not None and settings.judging.judge.type != "self":
            stack.close()
            own = None
        judge = stack.enter_context(open_judge(settings.judging, own))
        texts = list(zip(first.texts, second.texts, strict=True))
        both = [i for i, (a, b) in enumerate(texts) if a is not None and b is not None]
        if not both:
            raise ConfigError(f"no prompt has two answers: {'; '.join(drops.lines())}")
        pairs = [
            Pair(prompts[i].prompt, texts[i][0] or "", texts[i][1] or "", prompts[i].tools)
            for i in both
        ]
        verdicts = ask(judge, pairs, settings.seed)
    result = win_rate(
        verdicts,
        [(len(pair.a), len(pair.b)) for pair in pairs],
        groups=[prompt_key(prompts[i]) for i in both],
        seed=settings.seed,
    )
    sources = tuple(prompts[i].source for i in both)
    cut = (first.cut, second.cut)
    return Played(settings, tuple(pairs), sources, tuple(verdicts), result, cut, drops)


def _given(model: ModelConfig | None) -> ModelConfig:
    assert model is not None
    return model


def _opened(
    settings: Settings, model: ModelConfig
) -> contextlib.AbstractContextManager[LocalModel]:
    judging = settings.judging
    return open_model(model, judging.rollout, max_model_len=judging.max_length, seed=settings.seed)


def _prompts(settings: Settings, drops: Drops) -> list[Record]:
    path = settings.prompts or settings.answers or settings.against_answers
    assert path is not None
    dataset = DatasetConfig(path=path, max_samples=settings.max_samples)
    records, report = load_records([dataset], strict=False, seed=settings.seed, want="prompt")
    _join(drops, report.sources[0].drops)
    return records


def _join(drops: Drops, others: Drops) -> None:
    for reason, count in others.counts.items():
        drops.counts[reason] = drops.counts.get(reason, 0) + count
        drops.first.setdefault(reason, others.first[reason])


def _stored(path: str | None, prompts: Sequence[Record], drops: Drops) -> Answers | None:
    """The file's answer to each prompt; the k-th answer to a prompt that the data has more than
    once goes to the k-th time.  None without a file."""
    if path is None:
        return None
    # Who says nothing loses, as a model that is asked here.
    records, report = load_records(
        [DatasetConfig(path=path)], strict=False, seed=0, want="completion", empty_answers=True
    )
    _join(drops, report.sources[0].drops)
    waiting: dict[str, list[str]] = {}
    for record in reversed(records):
        waiting.setdefault(prompt_key(record), []).append(record.completion or "")
    found: list[str | None] = []
    for prompt in prompts:
        answers = waiting.get(prompt_key(prompt))
        found.append(answers.pop() if answers else None)
        if found[-1] is None:
            drops.add(f"no answer in {path}", prompt.source)
    return Answers(tuple(found))


def _sampled(
    settings: Settings, model: LocalModel, prompts: Sequence[Record], drops: Drops
) -> Answers:
    """The model's answers; none where the prompt leaves no room for one."""
    renderer = settings.judging.renderer(model)
    most = settings.sampling.max_new_tokens
    room = model.context - most
    if room < 1:
        raise ConfigError(
            f"--max-tokens = {most}: {named(model.config)} has room for {model.context} tokens of "
            "prompt and answer together: ask for fewer"
        )
    sampling = replace(settings.sampling, stop_token_ids=tuple(sorted(renderer.eos_ids)))
    ids = [renderer.prompt_ids(record.prompt, record.tools) for record in prompts]
    fits = [i for i, prompt in enumerate(ids) if len(prompt) <= room]
    for i in sorted(set(range(len(ids))) - set(fits)):
        drops.add(f"prompt: longer than {room} tokens", prompts[i].source)
    rollouts = model.engine.generate(
        [ids[i] for i in fits],
        sampling,
        [sampling_seed(settings.seed, 0, i, 0) for i in fits],
        model.adapter,
    )
    texts: list[str | None] = [None] * len(prompts)
    for i, rollout in zip(fits, rollouts, strict=True):
        texts[i] = renderer.decode(rollout.token_ids)
    return Answers(tuple(texts), sum(rollout.finish_reason == "length" for rollout in rollouts))


# ------------------------------------------------------------------------------------ for people


def show(played: Played, console: Console) -> None:
    """The report as a table."""
    settings, found = played.settings, played.result

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    first, second = settings.contestants()
    say(f"{first} against {second}")
    judge = f"judge: {settings.judging.describe(settings.model)}"
    say(judge + (" (one of the two contestants)" if settings.judges_itself() else ""))
    say(asked(found.pairs, found.too_long, found.failed))
    for line in played.drops.lines():
        say(f"  left out {line}")
    most = settings.sampling.max_new_tokens
    for name, cut in zip((first, second), played.cut, strict=True):
        if cut:
            say(f"  {cut} answers of {name} cut at {most} tokens")
    say("")
    console.print(estimates_table(found.overall, ROWS))
    say(
        "equal length: logistic regression on tanh of the difference in length (arXiv 2404.04475), "
        f"ridge {RIDGE}, one standard deviation {found.length_slope:+.2f}"
    )
    for line in too_little_mass(settings.judging.judge, found.overall["mass"]):
        say(line)


# ------------------------------------------------------------------------------------------ files


def write(played: Played, folder: Path) -> list[Path]:
    """Write the report and every pair with its verdict.

    Raises:
        ConfigError: the folder cannot be written to.
    """
    rows = zip(played.pairs, played.sources, played.verdicts, strict=True)
    lines = [
        json.dumps(
            {
                "source": source,
                "prompt": list(pair.prompt),
                "a": pair.a,
                "b": pair.b,
                "verdict": plain(seen),
            },
            ensure_ascii=False,
            default=str,
        )
        for pair, source, seen in rows
    ]
    report = json.dumps(played.report(), indent=1, ensure_ascii=False) + "\n"
    return write_texts(folder, {REPORT: report, PAIRS: "".join(f"{line}\n" for line in lines)})
