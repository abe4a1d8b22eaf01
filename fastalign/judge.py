"""Who judges: rules, the model itself, other local models, and models behind a server.

Written judges say in words what is wrong with an answer (CUT); pairwise judges say which of two
answers is better (SELF-JUDGE).  Both take batches, because a model judges them in one engine call.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Literal, Protocol, overload

import numpy as np

from fastalign.config import ConfigError, JudgeConfig
from fastalign.data import noise_reason
from fastalign.endpoint import Endpoint, Reply
from fastalign.episodes import NO_JUDGMENT, Episode, Verdict
from fastalign.plugins import explained, load_object
from fastalign.rollout import Rollout, RolloutEngine, SamplingSettings
from fastalign.templates import JudgeWording, Renderer

Messages = Sequence[Mapping[str, Any]]
# Tokens of a reply where the recipe does not say: a letter with a few words, a sentence or two.
PAIR_TOKENS, WRITTEN_TOKENS = 16, 256


@dataclass(frozen=True)
class Answer:
    """One answer to judge."""

    prompt: Messages
    text: str
    tools: Sequence[Mapping[str, Any]] | None = None


@dataclass(frozen=True)
class Failed:
    """No judgment was had of an answer; the reason says why."""

    reason: str


@dataclass(frozen=True)
class Pair:
    """Two answers to compare."""

    prompt: Messages
    a: str
    b: str
    tools: Sequence[Mapping[str, Any]] | None = None


class WrittenJudge(Protocol):
    def judge(self, answers: Sequence[Answer]) -> Sequence[str | Failed | None]:
        """A judgment for each answer; None where it is fine."""


class PairwiseJudge(Protocol):
    def compare(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """A verdict for each pair."""


class RuleWrittenJudge:
    """``rule(prompt_messages, answer) -> str | None``."""

    def __init__(self, rule: Callable[[Messages, str], str | None]) -> None:
        self.rule = rule

    def judge(self, answers: Sequence[Answer]) -> list[str | None]:
        return [self.rule(answer.prompt, answer.text) for answer in answers]


class RulePairwiseJudge:
    """``rule(prompt_messages, a, b) -> float``: above 0 prefers a, below 0 b, 0 neither.

    It is asked in both orders, as models are: what it says of one counts as P(A), P(B) = 1, 0 or
    0, 1, or 1/2 each, so that a rule that prefers a slot decides nothing.  NaN in either order
    decides nothing too.
    """

    def __init__(self, rule: Callable[[Messages, str, str], float], tie: float = 0.0) -> None:
        self.rule = rule
        self.tie = tie

    def compare(self, pairs: Sequence[Pair]) -> list[Verdict]:
        return [self._verdict(pair) for pair in pairs]

    def _verdict(self, pair: Pair) -> Verdict:
        orders = ((pair.a, pair.b), (pair.b, pair.a))
        lead = np.array([self._lead(pair.prompt, *order) for order in orders])
        if np.isnan(lead).any():
            return Verdict(0.5, 0.5, None)
        first = (np.sign(lead) + 1) / 2
        return verdict(np.stack([first, 1 - first], axis=-1)[None], self.tie)

    def _lead(self, prompt: Messages, a: str, b: str) -> float:
        given = self.rule(prompt, a, b)
        try:
            return float(given)
        except (TypeError, ValueError):
            raise ConfigError(
                f"judge.path: {_name(self)} gave {given!r} for a pair: must be a number, above 0 "
                "where the first answer is better"
            ) from None


class OwnJudge:
    """A judge of the user's own, what it raises being told in one line."""

    def __init__(self, judge: Any, path: str) -> None:
        self.rule = getattr(judge, "rule", judge)
        self.asked = judge
        self.path = path

    def judge(self, answers: Sequence[Answer]) -> Sequence[str | Failed | None]:
        with explained(self.path, "judge.path"):
            return self.asked.judge(answers)

    def compare(self, pairs: Sequence[Pair]) -> list[Verdict]:
        with explained(self.path, "judge.path"):
            return self.asked.compare(pairs)


NextLogprobs = Callable[[Sequence[np.ndarray], Sequence[int]], np.ndarray]


class SelfPairwiseJudge:
    """The model compares two answers in both orders and, if asked, under several principles.

    SELF-JUDGE (arXiv 2402.11253), section 3.2: s_a = (P(A | a, b) + P(B | b, a)) / 2 and s_b
    likewise, probabilities from the full softmax of the raw logits at the decision position.
    """

    def __init__(
        self,
        config: JudgeConfig,
        renderer: Renderer,
        next_logprobs: NextLogprobs,
        max_tokens: int,
    ) -> None:
        """``max_tokens``: the longest prompt that the judge can be asked; it abstains from pairs
        that need a longer one."""
        self.renderer = renderer
        self.next_logprobs = next_logprobs
        self.principles = config.principles or (None,)
        self.tokens = renderer.decision_ids(config.decision_tokens)
        self.tie = config.tie_threshold
        self.max_tokens = max_tokens

    def compare(self, pairs: Sequence[Pair]) -> list[Verdict]:
        asked = [self._prompts(pair) for pair in pairs]
        fits = [max(map(len, prompts)) <= self.max_tokens for prompts in asked]
        prompts = [ids for fit, of_pair in zip(fits, asked, strict=True) if fit for ids in of_pair]
        # Also without any: on several ranks this may be collective, and others may have some.
        logprobs = self.next_logprobs(prompts, self.tokens)
        table = np.exp(logprobs.astype(np.float64)).reshape(-1, len(self.principles), 2, 2)
        scores = iter(table)
        return [
            verdict(next(scores), self.tie) if fit else Verdict(0.5, 0.5, None, too_long=True)
            for fit in fits
        ]

    def _prompts(self, pair: Pair) -> list[np.ndarray]:
        """Both orders under each principle."""
        return [
            self.renderer.judge_prompt_ids(pair.prompt, first, second, principle, tools=pair.tools)
            for principle in self.principles
            for first, second in ((pair.a, pair.b), (pair.b, pair.a))
        ]


@dataclass(frozen=True)
class JudgeModel:
    """A local model that judges.

    Attributes:
        engine: what holds it.
        renderer: its own tokenizer and templates; None: it is the model that is trained, which is
            asked in the words of each dataset.
        adapter: what answers in the engine; None: the base alone.
        scorer: reads next-token log-probs in the engine's place, for weights it does not hold.
    """

    engine: RolloutEngine
    renderer: Renderer | None = None
    adapter: str | None = None
    scorer: NextLogprobs | None = None

    def next_logprobs(self, prompts: Sequence[np.ndarray], token_ids: Sequence[int]) -> np.ndarray:
        """float32 [len(prompts), len(token_ids)]; collective where scorer or engine is, so that
        they are asked even for nothing."""
        if self.scorer is not None:
            return self.scorer(prompts, token_ids)
        # Side by side what begins alike: both orders, all pairs and principles of one prompt, of
        # which the engine's prefix cache then computes the beginning once.
        order = sorted(range(len(prompts)), key=lambda i: prompts[i].astype(">u4").tobytes())
        found = self.engine.next_logprobs([prompts[i] for i in order], token_ids, self.adapter)
        return found[np.argsort(order)]

    def generate(
        self, prompts: Sequence[np.ndarray], settings: SamplingSettings, seeds: Sequence[int]
    ) -> list[Rollout]:
        """See :meth:`RolloutEngine.generate`."""
        return self.engine.generate(prompts, settings, seeds, self.adapter)


class ModelWrittenJudge:
    """A local model writes what is wrong with an answer."""

    def __init__(self, config: JudgeConfig, renderer: Renderer, model: JudgeModel) -> None:
        self.renderer = renderer
        self.model = model
        self.settings = SamplingSettings(
            max_new_tokens=config.max_tokens,
            temperature=config.temperature,
            stop_token_ids=tuple(sorted(renderer.eos_ids)),
        )

    def judge(self, answers: Sequence[Answer]) -> list[str | Failed | None]:
        asked = [
            self.renderer.written_prompt_ids(answer.prompt, answer.text, answer.tools)
            for answer in answers
        ]
        room = self.model.engine.max_model_len - self.settings.max_new_tokens
        fits = [len(ids) <= room for ids in asked]
        prompts = [ids for ids, fit in zip(asked, fits, strict=True) if fit]
        written = iter(self.model.generate(prompts, self.settings, [_seed(ids) for ids in prompts]))
        return [
            self._read(next(written))
            if fit
            else Failed(f"the question has {len(ids)} tokens, {room} have room")
            for ids, fit in zip(asked, fits, strict=True)
        ]

    def _read(self, rollout: Rollout) -> str | Failed | None:
        text = self.renderer.decode(rollout.token_ids)
        return self.renderer.written.judgment(text) if text.strip() else Failed("nothing written")


def _seed(prompt_ids: np.ndarray) -> int:
    """The same question is judged in the same way, whenever it is asked."""
    return int.from_bytes(hashlib.sha256(prompt_ids.tobytes()).digest()[:4], "little") >> 1


class EndpointWrittenJudge:
    """A model behind a server writes what is wrong with an answer."""

    def __init__(self, renderer: Renderer, endpoint: Endpoint) -> None:
        self.renderer = renderer
        self.endpoint = endpoint

    def judge(self, answers: Sequence[Answer]) -> list[str | Failed | None]:
        """
        Raises:
            ConfigError, JudgeError, BudgetSpent: see :meth:`fastalign.endpoint.Endpoint.ask`.
        """
        asked = [self.renderer.written_messages(a.prompt, a.text) for a in answers]
        replies = self.endpoint.ask(asked, self.endpoint.config.max_tokens or WRITTEN_TOKENS)
        return [
            Failed(reply.failure)
            if reply.text is None
            else self.renderer.written.judgment(reply.text)
            for reply in replies
        ]


class EndpointPairwiseJudge:
    """A model behind an OpenAI-compatible server compares two answers, as
    :class:`SelfPairwiseJudge` does, but is read by the letter that it answers with.

    An answer without a letter counts for neither and lowers the decision mass; a pair without an
    answer to every question is set aside.
    """

    def __init__(self, config: JudgeConfig, wording: JudgeWording, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.wording = wording
        self.principles = config.principles or (None,)
        self.letters = tuple(token.strip() for token in config.decision_tokens)
        self.tie = config.tie_threshold

    def compare(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """
        Raises:
            ConfigError, JudgeError, BudgetSpent: see :meth:`fastalign.endpoint.Endpoint.ask`.
        """
        asked = [
            self.wording.judge_messages(pair.prompt, first, second, principle)
            for pair in pairs
            for principle in self.principles
            for first, second in ((pair.a, pair.b), (pair.b, pair.a))
        ]
        replies = self.endpoint.ask(asked, self.endpoint.config.max_tokens or PAIR_TOKENS)
        each = 2 * len(self.principles)
        return [self._verdict(replies[i * each : (i + 1) * each]) for i in range(len(pairs))]

    def _verdict(self, replies: Sequence[Reply]) -> Verdict:
        if any(reply.text is None for reply in replies):
            return Verdict(0.5, 0.5, None, failed=True)
        table = np.array([self._read(reply.text or "") for reply in replies])
        return verdict(table.reshape(len(self.principles), 2, 2), self.tie)

    def _read(self, text: str) -> tuple[float, float]:
        """(1, 0) for the first answer, (0, 1) for the second, (0, 0) for no letter."""
        found = re.search(rf"\b({'|'.join(map(re.escape, self.letters))})\b", text)
        if found is None:
            return 0.0, 0.0
        return (1.0, 0.0) if found[1] == self.letters[0] else (0.0, 1.0)


def verdict(probabilities: np.ndarray, tie: float) -> Verdict:
    """Join both orders and K principles of one pair.

    Args:
        probabilities: [K, 2, 2]; principle, order (a first, b first), P(A) and P(B).
        tie: scores closer than this tie (|s_a - s_b| <= tie).

    A NaN anywhere makes the judge abstain.
    """
    if not np.isfinite(probabilities).all():
        # No mass either: a judge that always fails is not taken for a sure one.
        return Verdict(0.5, 0.5, None, mass=0.0)
    score_a = (probabilities[:, 0, 0] + probabilities[:, 1, 1]) / 2
    score_b = (probabilities[:, 0, 1] + probabilities[:, 1, 0]) / 2
    gap = score_a - score_b
    wins = np.where(np.abs(gap) <= tie, 0.5, gap > 0).mean()
    mean_a, mean_b = float(score_a.mean()), float(score_b.mean())
    if wins != 0.5:
        preferred = "a" if wins > 0.5 else "b"
    elif abs(mean_a - mean_b) <= tie:
        preferred = None
    else:
        preferred = "a" if mean_a > mean_b else "b"
    # Which slot wins, by principle and order: 1 the first, 0 the second, 1/2 neither.
    lead = probabilities[:, :, 0] - probabilities[:, :, 1]
    first = (np.sign(lead) + 1) / 2
    return Verdict(
        score_a=mean_a,
        score_b=mean_b,
        preferred=preferred,
        # One slot wins in both orders: they name different answers.
        flipped=bool((np.abs(np.sign(lead).sum(axis=1)) == 2).mean() > 0.5),
        first_slot=float(first.mean()),
        mass=float(probabilities.sum(-1).mean()),
        probabilities=tuple(((a, b), (c, d)) for (a, b), (c, d) in probabilities.tolist()),
    )


@overload
def make_judge(
    config: JudgeConfig,
    kind: Literal["written"],
    renderer: Renderer,
    asked: JudgeModel | Endpoint | None = None,
) -> WrittenJudge: ...


@overload
def make_judge(
    config: JudgeConfig,
    kind: Literal["pairwise"],
    renderer: Renderer,
    asked: JudgeModel | Endpoint | None = None,
) -> PairwiseJudge: ...


def make_judge(
    config: JudgeConfig,
    kind: str,
    renderer: Renderer,
    asked: JudgeModel | Endpoint | None = None,
) -> WrittenJudge | PairwiseJudge:
    """The judge that a recipe names, in the form that the method needs.

    A rule is a function, judged item by item, or an object that has ``judge`` or ``compare``
    itself and sees whole batches.  Everybody else asks ``asked``, in the words of ``renderer``
    where a model does not bring its own.
    """
    if config.type == "rule":
        return make_rule_judge(config, kind)
    if isinstance(asked, Endpoint):
        if kind == "written":
            return EndpointWrittenJudge(renderer, asked)
        return EndpointPairwiseJudge(config, renderer, asked)
    assert asked is not None
    renderer = asked.renderer or renderer
    if kind == "written":
        return ModelWrittenJudge(config, renderer, asked)
    # One token is the answer.
    longest = asked.engine.max_model_len - 1
    return SelfPairwiseJudge(config, renderer, asked.next_logprobs, longest)


def make_rule_judge(config: JudgeConfig, kind: str) -> OwnJudge:
    """See :func:`make_judge`."""
    rule = load_rule(config, kind)
    assert config.path is not None
    if hasattr(rule, _METHODS[kind]):
        with explained(config.path, "judge.path"):
            made = rule() if isinstance(rule, type) else rule
    elif kind == "written":
        made = RuleWrittenJudge(rule)
    else:
        made = RulePairwiseJudge(rule, config.tie_threshold)
    return OwnJudge(made, config.path)


_METHODS = {"written": "judge", "pairwise": "compare"}


def load_rule(config: JudgeConfig, kind: str, key: str = "judge") -> Any:
    """The object that a rule judge names; ``key`` is the recipe's section.

    Raises:
        ConfigError: there is no such object, or it cannot judge in this way.
    """
    assert config.path is not None
    rule = load_object(config.path, f"{key}.path")
    if not callable(rule) and not hasattr(rule, _METHODS[kind]):
        raise ConfigError(
            f"{key}.path = {config.path!r}: neither callable nor has {_METHODS[kind]!r}"
        )
    return rule


def judge_written(judge: WrittenJudge, episodes: Sequence[Episode]) -> list[Episode]:
    """Episodes with a judgment for each rollout, and why it is no use where it is noise: the
    failure of a judge, or praise where something to criticise was asked for.

    Raises:
        ConfigError: the judge did not answer with one text or None for each answer.
    """
    answers = [Answer(e.prompt, text, e.tools) for e in episodes for text in e.texts]
    judgments = judge.judge(answers)
    _check_count(judge, judgments, len(answers))
    wrong = next((j for j in judgments if not isinstance(j, str | Failed | None)), None)
    if wrong is not None:
        raise ConfigError(
            f"judge.path: {_name(judge)} gave {wrong!r} for an answer: a written judgment is a "
            "text, or None for an answer that is fine"
        )
    cleaned = iter([_with_noise(judgment) for judgment in judgments])
    judged = []
    for episode in episodes:
        said = [next(cleaned) for _ in episode.texts]
        texts, noise = (tuple(part) for part in zip(*said, strict=True)) if said else ((), ())
        judged.append(replace(episode, judgments=texts, noise=noise))
    return judged


def _with_noise(judgment: str | Failed | None) -> tuple[str | None, str | None]:
    """(judgment, why it is none to train on)."""
    if isinstance(judgment, Failed):
        return None, f"{NO_JUDGMENT}: {judgment.reason}"
    text = (judgment or "").strip() or None
    return text, noise_reason(text) if text is not None else None


def _check_count(judge: object, given: object, asked: int) -> None:
    if not isinstance(given, Sequence) or len(given) != asked:
        how = f"{len(given)} judgments" if isinstance(given, Sequence) else repr(given)
        raise ConfigError(
            f"judge.path: {_name(judge)} gave {how} for {asked}: it must give one for each, in "
            "their order"
        )


def _name(judge: object) -> str:
    rule = getattr(judge, "rule", judge)
    return getattr(rule, "__name__", type(rule).__name__)


def compare(judge: PairwiseJudge, pairs: Sequence[Pair]) -> list[Verdict]:
    """The verdict of each pair; a judge of the user's own that says what cannot be (scores that are
    no numbers, a preference among equal texts) abstains.

    Raises:
        ConfigError: the judge did not give one verdict for each pair.
    """
    given = judge.compare(pairs)
    _check_count(judge, given, len(pairs))
    wrong = next((seen for seen in given if not isinstance(seen, Verdict)), None)
    if wrong is not None:
        raise ConfigError(
            f"judge.path: {_name(judge)} gave {wrong!r} for a pair: must be a Verdict of "
            "fastalign.episodes"
        )
    return [_sound(pair, seen) for pair, seen in zip(pairs, given, strict=True)]


def _sound(pair: Pair, seen: Verdict) -> Verdict:
    numbers = (seen.score_a, seen.score_b, seen.mass, seen.first_slot)
    if not all(map(math.isfinite, numbers)):
        # No mass either, as in :func:`verdict`.
        return Verdict(0.5, 0.5, None, mass=0.0, too_long=seen.too_long, failed=seen.failed)
    if pair.a == pair.b:
        return replace(seen, score_a=0.5, score_b=0.5, preferred=None, probabilities=())
    return seen


def judge_pairs(judge: PairwiseJudge, episodes: Sequence[Episode]) -> list[Episode]:
    """Episodes in which each rollout is compared with each other one."""
    index = [(e, i, j) for e in episodes for i, j in combinations(range(len(e.texts)), 2)]
    pairs = [Pair(e.prompt, e.texts[i], e.texts[j], e.tools) for e, i, j in index]
    verdicts = iter(compare(judge, pairs))
    judged = []
    for episode in episodes:
        matches = tuple(combinations(range(len(episode.texts)), 2))
        seen = tuple(next(verdicts) for _ in matches)
        judged.append(replace(episode, matches=matches, verdicts=seen))
    return judged


def judge_metrics(episodes: Sequence[Episode]) -> dict[str, tuple[float, float]]:
    """Sums and counts over these episodes: abstention, flips, first slot, decision mass; criticised
    answers and noise; what could not be judged."""
    everything = [v for e in episodes for v in e.verdicts]
    verdicts = [v for v in everything if not v.too_long and not v.failed]
    n = float(len(verdicts))
    judgments = [j for e in episodes for j in e.judgments or ()]
    noise = [reason for e in episodes for reason in e.noise if reason is not None]
    unjudged = sum(reason.startswith(NO_JUDGMENT) for reason in noise)
    judged = float(len(judgments) - unjudged)
    failed = float(unjudged + sum(v.failed for v in everything))
    metrics = {
        "judge/abstained": (float(sum(v.preferred is None for v in verdicts)), n),
        "judge/flipped": (float(sum(v.flipped for v in verdicts)), n),
        "judge/first_slot": (float(sum(v.first_slot for v in verdicts)), n),
        "judge/mass": (float(sum(v.mass for v in verdicts)), n),
        "judge/too_long": (float(sum(v.too_long for v in everything)), float(len(everything))),
        "judge/noise": (float(len(noise) - unjudged), judged),
        "judge/negatives": (float(sum(j is not None for j in judgments)), judged),
        "judge/failed": (failed, float(len(judgments) + len(everything))),
    }
    return {name: value for name, value in metrics.items() if value[1]}
