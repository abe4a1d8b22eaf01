"""``fastalign generate``: answers to prompts, each the best of several by the model's own judgment.

Self-rejection of SELF-JUDGE (arXiv 2402.11253): sample N answers to a prompt and let the model that
wrote them choose one by a knockout tournament (:mod:`fastalign.tournament`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import transformers

from fastalign.config import (
    ConfigError,
    DatasetConfig,
    EndpointConfig,
    JudgeConfig,
    ModelConfig,
    RolloutConfig,
)
from fastalign.data import Message, Record, RowError, load_records
from fastalign.episodes import sampling_seed
from fastalign.judging import Judging, open_judge
from fastalign.local import LocalModel, make_renderer, open_model
from fastalign.methods.base import plain_prompt
from fastalign.model import context_length, load_tokenizer, with_adapters_base
from fastalign.online import check_decision_mass
from fastalign.rollout import Rollout, SamplingSettings, choose_engine, choose_judge_engine
from fastalign.templates import Renderer
from fastalign.tournament import Bracket, Contest, Tally, play, tally
from fastalign.tracking import Counter

# Of a judge: whether it is asked, and not what it says.
DECIDES = {"base_url", "model", "max_tokens", "temperature", "extra_body"}
UNDECISIVE: dict[str, Any] = {
    "min_decision_mass": True,
    "endpoint": set(EndpointConfig.model_fields) - DECIDES,
}
LARGE = 1 << 20
ITSELF = JudgeConfig(type="self")
# Nothing shares a GPU with it but another model that judges.
ALONE = RolloutConfig(gpu_memory_utilization=0.9)


@dataclass(frozen=True)
class Settings:
    """What answers, how, and who chooses.

    Attributes:
        best_of: samples of each prompt; 1: nobody is asked which is best.
        judge: who compares them; of type "self" the model that answers, with its adapter.
        temperature, top_p: the paper's, whatever ``best_of`` is; temperature 0 is greedy.
        max_tokens: most tokens of an answer.
        seed: decides with a prompt's place and a sample's number what is drawn, and the shuffle
            of a tournament.  vLLM draws the same again only for the same batches.
        template, chat_template_kwargs: as a dataset's in a recipe.
        rollout: the engine.  Beside another model that judges, on one GPU, it wants less memory.
        batch_size: prompts that are answered together and written together; None: as many as have
            the samples that the engine decodes at once, four times as many in vLLM, where they
            flow.

    Raises:
        ConfigError: a value that cannot be.
    """

    model: ModelConfig
    best_of: int = 1
    judge: JudgeConfig = ITSELF
    temperature: float = 1.0
    top_p: float = 0.9
    max_tokens: int = 768
    seed: int = 0
    template: str | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    rollout: RolloutConfig = ALONE
    batch_size: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("best_of", 1), ("batch_size", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} is {value}: it must be at least {least}")
        try:
            SamplingSettings(self.max_tokens, self.temperature, self.top_p)
        except ValueError as error:
            problem = str(error).replace("max_new_tokens", "max_tokens")
            raise ConfigError(problem) from None
        if self.best_of > 1 and self.temperature == 0:
            raise ConfigError(
                f"temperature is 0 with best_of {self.best_of}: all samples would be the same; "
                "raise it, or take one"
            )

    @property
    def prompts_at_once(self) -> int:
        if self.batch_size is not None:
            return self.batch_size
        in_4bit = with_adapters_base(self.model).load_in_4bit
        flows = choose_engine(self.rollout, in_4bit)[0] == "vllm"
        return max(1, self.rollout.max_num_seqs * (4 if flows else 1) // self.best_of)

    def of_answers(self) -> dict[str, Any]:
        """What decides the answers but for the engine, as JSON."""
        kept: dict[str, Any] = {
            "best_of": self.best_of,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_tokens": self.max_tokens,
            "seed": self.seed,
        }
        if self.best_of > 1:
            kept["judge"] = self.judge.model_dump(
                mode="json", exclude_defaults=True, exclude=UNDECISIVE
            )
        if self.template is not None:
            kept["template"] = self.template
        if self.chat_template_kwargs:
            kept["chat_template_kwargs"] = dict(self.chat_template_kwargs)
        kept["files"] = self.files()
        return self.model.model_dump(mode="json", exclude_defaults=True) | kept

    def files(self) -> str:
        """A hash of what lies behind the paths of the settings: a model that was trained again
        under its old name is another one.  Of large files size and age stand for the content."""
        named = [self.model.model_name_or_path, self.model.adapter_name_or_path, self.template]
        if self.best_of > 1:
            rule = (self.judge.path or "").rpartition(":")[0]
            named += [self.judge.model_name_or_path, self.judge.template, rule]
        digest = hashlib.sha256()
        for path in (Path(name) for name in named if name):
            files = [path] if path.is_file() else sorted(path.glob("*")) if path.is_dir() else []
            for file in (file for file in files if file.is_file()):
                about = file.stat()
                digest.update(f"{file.name} {about.st_size} ".encode())
                large = about.st_size > LARGE
                digest.update(str(about.st_mtime_ns).encode() if large else file.read_bytes())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Generated:
    """One prompt and what became of it.

    Attributes:
        candidates: the texts that were sampled.
        finish_reasons: of each, "stop" or "length" (cut at ``max_tokens``).
        winner: index of the answer in ``candidates``.
        bracket: how it was chosen, with the scores of each match; None for one candidate.
    """

    prompt: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] | None
    source: str
    candidates: tuple[str, ...]
    finish_reasons: tuple[str, ...]
    winner: int
    bracket: Bracket | None

    @property
    def completion(self) -> str:
        return self.candidates[self.winner]

    @property
    def finish_reason(self) -> str:
        return self.finish_reasons[self.winner]


@dataclass(frozen=True)
class Report:
    """What a call of :func:`answer_file` did: rows that were there, rows that it wrote, how many of
    them were cut at ``max_tokens``, and their matches."""

    before: int
    written: int
    cut: int
    matches: Tally

    def lines(self) -> list[str]:
        """The report for people."""
        if not self.written:
            return [f"nothing to do: all {self.before} prompts have answers"]
        lines = [f"{self.written} answers, {self.cut} of them cut at max_tokens"]
        if self.before:
            lines[0] += f"; {self.before} were there"
        if (seen := self.matches).matches:
            lines.append(
                f"{seen.matches} matches: {seen.ties} ties, {seen.flipped} flipped by the order, "
                f"{seen.too_long} too long to judge, {seen.failed} unanswered; first slot wins "
                f"{seen.first_slot:.2f}, P(A) + P(B) = {seen.mass:.2f}"
            )
        return lines


def generate(
    prompts: Sequence[str | Sequence[Message]],
    settings: Settings,
    *,
    replies: Path | None = None,
) -> list[Generated]:
    """Answer prompts, each a user's text or messages that end before the answer.

    >>> settings = Settings(ModelConfig(model_name_or_path="./model"), best_of=8)
    >>> [x.completion for x in generate(["Why is the sky blue?"], settings)]

    Args:
        replies: file that keeps what a judge behind a server replies, and is asked first; None:
            they are not kept.

    Raises:
        ConfigError: model, judge or a prompt is not what it has to be, or a model judges that does
            not put ``judge.min_decision_mass`` on its decision tokens.
        EngineError, JudgeError, BudgetSpent: of the engine and of a judge behind a server.
    """
    records = [_record(prompt, number) for number, prompt in enumerate(prompts, 1)]
    if not records:
        return []
    with contextlib.closing(_answers(records, 0, settings, replies)) as batches:
        return [answer for batch in batches for answer in batch]


def _record(prompt: str | Sequence[Message], number: int) -> Record:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return Record("prompt", prompt=tuple(messages), source=f"prompt {number}")


def answer_file(source: str, out: Path, settings: Settings) -> Report:
    """Answer every prompt of a file, or go on where ``out`` stops: a JSON line for each, in order.

    Rows are read as training reads prompts (:mod:`fastalign.data`), and the first that cannot be
    is an error.  What a judge behind a server replies is kept beside ``out``.

    Raises:
        ConfigError: as :func:`generate`, or ``out`` has something else than answers to the first
            prompts under the same settings.
        EngineError, JudgeError, BudgetSpent: as :func:`generate`; what is in ``out`` stays.
    """
    if out.resolve() == Path(source).resolve():
        raise ConfigError(f"{out}: holds the prompts: choose another name for the answers")
    records, _ = load_records([DatasetConfig(path=source)], strict=True, seed=0, want="prompt")
    made_with = settings.of_answers()
    before = _resume(out, source, records, made_with)
    written, cut, matches = 0, 0, Tally()
    if before < len(records):
        replies = out.with_name(f"{out.name}.replies.jsonl")
        with (
            Counter("answers", before, len(records)) as progress,
            _appending(out) as file,
            contextlib.closing(_answers(records, before, settings, replies, progress)) as batches,
        ):
            for batch in batches:
                file.write("".join(_line(answer, made_with) for answer in batch).encode())
                # A process that is killed loses what it was at, and nothing before.
                file.flush()
                written += len(batch)
                cut += sum(answer.finish_reason == "length" for answer in batch)
                matches += tally(answer.bracket for answer in batch if answer.bracket is not None)
                progress.advance(len(batch))
    return Report(before, written, cut, matches)


# ------------------------------------------------------------------------------------- answering


def _answers(
    records: Sequence[Record],
    first: int,
    settings: Settings,
    replies: Path | None,
    progress: Counter | None = None,
) -> Generator[list[Generated]]:
    """Batches of answers to the records from ``first`` on, in their order."""
    transformers.utils.logging.disable_progress_bar()
    tokenizer = load_tokenizer(settings.model)
    renderer = make_renderer(
        settings.model,
        tokenizer,
        settings.judge,
        template=settings.template,
        chat_template_kwargs=settings.chat_template_kwargs,
    )
    prompts = _tokenised(records, renderer, settings)
    length = _length(records, prompts, renderer, settings)
    phase = progress.phase if progress is not None else lambda name: None
    matches = Tally()
    with contextlib.ExitStack() as stack:
        if replies is None:
            replies = Path(stack.enter_context(tempfile.TemporaryDirectory()), "replies.jsonl")
        judging = _judging(settings, length, replies)
        if settings.best_of > 1:
            # A mistake shows before a model is loaded.
            judging.check()
        model = stack.enter_context(
            open_model(settings.model, settings.rollout, max_model_len=length, seed=settings.seed)
        )
        judge = None
        if settings.best_of > 1:
            judge = stack.enter_context(open_judge(judging, model))
        for start in range(first, len(records), settings.prompts_at_once):
            batch = range(start, min(start + settings.prompts_at_once, len(records)))
            phase("sample")
            rollouts = _sample(model, renderer, {i: prompts[i] for i in batch}, settings)
            texts = {i: tuple(renderer.decode(r.token_ids) for r in rollouts[i]) for i in batch}
            played: list[Bracket | None] = [None] * len(batch)
            if judge is not None:
                phase("judge")
                contests = [
                    Contest(records[i].prompt, texts[i], records[i].tools, i) for i in batch
                ]
                brackets = play(judge, contests, settings.seed)
                matches += tally(brackets)
                check_decision_mass(settings.judge, "judge", matches.mass)
                played = [*brackets]
            yield [
                Generated(
                    prompt=records[i].prompt,
                    tools=records[i].tools,
                    source=records[i].source,
                    candidates=texts[i],
                    finish_reasons=tuple(r.finish_reason for r in rollouts[i]),
                    winner=bracket.winner if bracket is not None else 0,
                    bracket=bracket,
                )
                for i, bracket in zip(batch, played, strict=True)
            ]


def _sample(
    model: LocalModel, renderer: Renderer, prompts: Mapping[int, np.ndarray], settings: Settings
) -> dict[int, list[Rollout]]:
    """``best_of`` completions of each prompt, by its place among all."""
    n = settings.best_of
    drawn = model.engine.generate(
        [ids for ids in prompts.values() for _ in range(n)],
        SamplingSettings(
            max_new_tokens=settings.max_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            stop_token_ids=tuple(sorted(renderer.eos_ids)),
        ),
        [sampling_seed(settings.seed, 0, i, k) for i in prompts for k in range(n)],
        adapter=model.adapter,
    )
    return {i: drawn[k * n : (k + 1) * n] for k, i in enumerate(prompts)}


def _tokenised(
    records: Sequence[Record], renderer: Renderer, settings: Settings
) -> list[np.ndarray]:
    """The prompts, each of which leaves room for an answer."""
    room = context_length(settings.model) - settings.max_tokens
    prompts = []
    for record in records:
        try:
            prompts.append(plain_prompt(record, renderer))
        except RowError as error:
            raise ConfigError(f"{record.source}: {error}") from None
        if len(prompts[-1]) > room:
            raise ConfigError(
                f"{record.source}: the prompt has {len(prompts[-1])} tokens, of which {room} have "
                f"room beside an answer of max_tokens = {settings.max_tokens}: shorten either"
            )
    return prompts


def _length(
    records: Sequence[Record],
    prompts: Sequence[np.ndarray],
    renderer: Renderer,
    settings: Settings,
) -> int:
    """Tokens that the engine needs room for: a prompt and its answer, or what the judge reads."""
    longest = max(map(len, prompts), default=0) + settings.max_tokens
    if settings.best_of == 1 or settings.judge.type not in ("self", "model"):
        return longest
    empty = [{"role": "user", "content": ""}]
    longest_principle = max(
        settings.judge.principles or (None,),
        key=lambda principle: len(renderer.judge_prompt_ids(empty, "", "", principle)),
    )
    around = max(
        len(renderer.judge_prompt_ids(record.prompt, "", "", longest_principle, record.tools))
        for record in records
    )
    # A text may have some tokens more than it was sampled as.
    return max(longest, around + 2 * (settings.max_tokens + settings.max_tokens // 4 + 16))


# --------------------------------------------------------------------------------------- judging


def _judging(settings: Settings, length: int, replies: Path) -> Judging:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    engine, _ = choose_judge_engine(settings.rollout, device)
    return Judging(
        settings.judge,
        engine,
        # Another tokenizer may need more tokens for the same text.
        max_length=2 * length,
        dtype=settings.model.dtype,
        trust_remote_code=settings.model.trust_remote_code,
        template=settings.template,
        chat_template_kwargs=settings.chat_template_kwargs,
        replies=replies,
    )


# ----------------------------------------------------------------------------------------- files


def _head(record: Record | Generated) -> dict[str, Any]:
    """What a row begins with: the prompt that it answers."""
    tools = {} if record.tools is None else {"tools": list(record.tools)}
    # A round trip, because messages keep what their file said of them, which in Parquet may be a
    # date.
    return json.loads(json.dumps({"prompt": list(record.prompt), **tools}, default=str))


def _line(answer: Generated, made_with: Mapping[str, Any]) -> str:
    row = {
        **_head(answer),
        "completion": answer.completion,
        "finish_reason": answer.finish_reason,
        "source": answer.source,
    }
    if answer.bracket is not None:
        row |= {
            "winner": answer.winner,
            "candidates": answer.candidates,
            "finish_reasons": answer.finish_reasons,
            "bracket": asdict(answer.bracket),
        }
    return json.dumps(row | {"settings": made_with}, ensure_ascii=False) + "\n"


@contextlib.contextmanager
def _appending(out: Path) -> Iterator[IO[bytes]]:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        file = out.open("ab")
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written: {error.strerror}") from None
    with file:
        yield file


def _resume(out: Path, source: str, records: Sequence[Record], made_with: Mapping[str, Any]) -> int:
    """How many of the records ``out`` answers; a last line that was cut short is taken away.

    Raises:
        ConfigError: it holds anything else, and is left as it is.
    """
    if not out.is_file():
        return 0
    whole = count = 0
    with out.open("rb") as file:
        for count, line in enumerate(file, 1):
            where = f"{out}:{count}"
            if count > len(records):
                raise ConfigError(
                    f"{where}: {source} has {len(records)} prompts: choose another name for the "
                    "answers"
                )
            if not line.endswith(b"\n"):
                _check_begun(where, line, records[count - 1], made_with)
                count -= 1
                break
            _check_row(where, line, records[count - 1], made_with)
            whole += len(line)
    os.truncate(out, whole)
    return count


_NOT_OURS = "is no answer to these prompts: choose another name for the answers"


def _check_begun(where: str, line: bytes, record: Record, made_with: Mapping[str, Any]) -> None:
    """What is cut off has to be a row of ours, or the beginning of the one that comes next."""
    start = json.dumps(_head(record), ensure_ascii=False)[:-1].encode()
    if not (line.startswith(start) or start.startswith(line)):
        raise ConfigError(f"{where}: {_NOT_OURS}")
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return
    _check_row(where, line, record, made_with)


def _check_row(where: str, line: bytes, record: Record, made_with: Mapping[str, Any]) -> None:
    try:
        row = json.loads(line)
        _, then = row["completion"], dict(row["settings"])
    except (ValueError, RecursionError, TypeError, KeyError):
        raise ConfigError(f"{where}: {_NOT_OURS}") from None
    if any(row.get(name) != value for name, value in _head(record).items()):
        raise ConfigError(
            f"{where}: answers another prompt than {record.source}: take the prompts that it was "
            "made from, or another name for the answers"
        )
    now = json.loads(json.dumps(made_with))
    for name in [*now, *then]:
        if name == "files" and then.get(name) != now.get(name):
            raise ConfigError(
                f"{where}: model, adapter, template or judge had other files behind the same "
                "names when it was made: take another name for the answers"
            )
        if then.get(name) != now.get(name):
            raise ConfigError(
                f"{where}: was made with {name} = {then.get(name)!r}, now it is "
                f"{now.get(name)!r}: take the same to go on, or another name for the answers"
            )
