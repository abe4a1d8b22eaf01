"""Who judges: rules, the model itself, and models behind a server.

Written judges say in words what is wrong with an answer (CUT); pairwise judges say which of two
answers is better (SELF-JUDGE).  Both take batches, because a model judges them in one engine call.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Literal, Protocol, overload

import numpy as np

from fastalign.config import ConfigError, JudgeConfig
from fastalign.data import noise_reason
from fastalign.episodes import Episode, Verdict
from fastalign.plugins import load_object
from fastalign.templates import Renderer

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Answer:
    """One answer to judge."""

    prompt: Messages
    text: str


@dataclass(frozen=True)
class Pair:
    """Two answers to compare."""

    prompt: Messages
    a: str
    b: str
    tools: Sequence[Mapping[str, Any]] | None = None


class WrittenJudge(Protocol):
    def judge(self, answers: Sequence[Answer]) -> list[str | None]:
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
    """``rule(prompt_messages, a, b) -> float``: above 0 prefers a, below 0 b, 0 or NaN neither."""

    def __init__(self, rule: Callable[[Messages, str, str], float]) -> None:
        self.rule = rule

    def compare(self, pairs: Sequence[Pair]) -> list[Verdict]:
        return [self._verdict(float(self.rule(pair.prompt, pair.a, pair.b))) for pair in pairs]

    @staticmethod
    def _verdict(score: float) -> Verdict:
        if math.isnan(score) or score == 0:
            return Verdict(0.5, 0.5, None)
        return Verdict(1.0, 0.0, "a") if score > 0 else Verdict(0.0, 1.0, "b")


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
            self._verdict(pair, next(scores)) if fit else Verdict(0.5, 0.5, None, too_long=True)
            for pair, fit in zip(pairs, fits, strict=True)
        ]

    def _prompts(self, pair: Pair) -> list[np.ndarray]:
        """Both orders under each principle."""
        return [
            self.renderer.judge_prompt_ids(pair.prompt, first, second, principle, tools=pair.tools)
            for principle in self.principles
            for first, second in ((pair.a, pair.b), (pair.b, pair.a))
        ]

    def _verdict(self, pair: Pair, probabilities: np.ndarray) -> Verdict:
        seen = verdict(probabilities, self.tie)
        return Verdict(0.5, 0.5, None, mass=seen.mass) if pair.a == pair.b else seen


class JudgeError(RuntimeError):
    """A judge that is not ours failed: it cannot be reached, or answers with errors."""


class EndpointPairwiseJudge:
    """A model behind an OpenAI-compatible server compares two answers, as
    :class:`SelfPairwiseJudge` does, but is read by the letter that it answers with.

    An answer without a letter counts for neither and lowers the decision mass.
    """

    def __init__(self, config: JudgeConfig, renderer: Renderer) -> None:
        """
        Raises:
            ConfigError: the client is not installed.
        """
        assert config.endpoint is not None
        try:
            import openai
        except ImportError:
            raise ConfigError(
                "judge.type = 'endpoint' needs the package openai: pip install "
                "'fastalign[endpoint]'"
            ) from None
        self.errors = openai
        self.endpoint = config.endpoint
        self.renderer = renderer
        self.principles = config.principles or (None,)
        self.letters = tuple(token.strip() for token in config.decision_tokens)
        self.tie = config.tie_threshold
        self.client = openai.OpenAI(
            base_url=self.endpoint.base_url,
            # Servers of one's own take any key, and the client insists on one.
            api_key=os.environ.get(self.endpoint.api_key_env) or "none",
            max_retries=self.endpoint.max_retries,
            timeout=self.endpoint.timeout_s,
        )

    def compare(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """
        Raises:
            ConfigError: the server refuses the request: its address, model or key is wrong.
            JudgeError: the server does not answer, after all retries.
        """
        asked = [
            self.renderer.judge_messages(pair.prompt, first, second, principle)
            for pair in pairs
            for principle in self.principles
            for first, second in ((pair.a, pair.b), (pair.b, pair.a))
        ]
        with ThreadPoolExecutor(self.endpoint.max_concurrency) as pool:
            said = list(pool.map(self._ask, asked))
        table = np.array(said).reshape(-1, len(self.principles), 2, 2)
        verdicts = [verdict(scores, self.tie) for scores in table]
        return [
            Verdict(0.5, 0.5, None, mass=seen.mass) if pair.a == pair.b else seen
            for pair, seen in zip(pairs, verdicts, strict=True)
        ]

    def _ask(self, messages: list[Any]) -> tuple[float, float]:
        """(1, 0) for the first answer, (0, 1) for the second, (0, 0) for no letter."""
        where = f"{self.endpoint.base_url}, model {self.endpoint.model!r}"
        try:
            reply = self.client.chat.completions.create(
                model=self.endpoint.model,
                messages=messages,
                temperature=0.0,
                max_tokens=self.endpoint.max_tokens,
            )
        except (
            self.errors.BadRequestError,
            self.errors.AuthenticationError,
            self.errors.PermissionDeniedError,
            self.errors.NotFoundError,
        ) as error:
            raise ConfigError(f"judge.endpoint: {where} refuses: {error}") from None
        except self.errors.OpenAIError as error:
            raise JudgeError(f"judge.endpoint: {where}: {error}") from error
        text = (reply.choices[0].message.content or "") if reply.choices else ""
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
    )


@overload
def make_judge(
    config: JudgeConfig,
    kind: Literal["written"],
    renderer: Renderer,
    next_logprobs: NextLogprobs | None,
    max_tokens: int,
) -> WrittenJudge: ...


@overload
def make_judge(
    config: JudgeConfig,
    kind: Literal["pairwise"],
    renderer: Renderer,
    next_logprobs: NextLogprobs | None,
    max_tokens: int,
) -> PairwiseJudge: ...


def make_judge(
    config: JudgeConfig,
    kind: str,
    renderer: Renderer,
    next_logprobs: NextLogprobs | None,
    max_tokens: int,
) -> WrittenJudge | PairwiseJudge:
    """The judge that a recipe names, in the form that the method needs.

    A rule is a function, judged item by item, or an object that has ``judge`` or ``compare``
    itself and sees whole batches.
    """
    rule = load_rule(config, kind)
    if config.type == "endpoint":
        return EndpointPairwiseJudge(config, renderer)
    if rule is None:
        assert next_logprobs is not None
        return SelfPairwiseJudge(config, renderer, next_logprobs, max_tokens)
    if hasattr(rule, _METHODS[kind]):
        return rule() if isinstance(rule, type) else rule
    return RuleWrittenJudge(rule) if kind == "written" else RulePairwiseJudge(rule)


_METHODS = {"written": "judge", "pairwise": "compare"}


def load_rule(config: JudgeConfig, kind: str, key: str = "judge") -> Any:
    """The object that a rule judge names, None for another judge; ``key`` is the recipe's section.

    Raises:
        ConfigError: there is no such object, or the judge cannot give verdicts of this kind.
    """
    if config.type != "rule":
        if kind != "pairwise":
            raise ConfigError(
                f"{key}.type = {config.type!r}: written judgments need {key}.type: rule"
            )
        return None
    if config.path is None:
        raise ConfigError(f"{key}.path is missing: a rule judge names its callable")
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
    answers = [Answer(e.prompt, text) for e in episodes for text in e.texts]
    judgments = list(judge.judge(answers))
    _check_count(judge, judgments, len(answers))
    wrong = next((j for j in judgments if j is not None and not isinstance(j, str)), None)
    if wrong is not None:
        raise ConfigError(
            f"judge.path: {_name(judge)} gave {wrong!r} for an answer: a written judgment is a "
            "text, or None for an answer that is fine"
        )
    cleaned = iter([j.strip() or None if j is not None else None for j in judgments])
    judged = []
    for episode in episodes:
        said = tuple(next(cleaned) for _ in episode.texts)
        noise = tuple(noise_reason(j) if j is not None else None for j in said)
        judged.append(replace(episode, judgments=said, noise=noise))
    return judged


def _check_count(judge: object, given: Sequence[object], asked: int) -> None:
    if len(given) != asked:
        raise ConfigError(
            f"judge.path: {_name(judge)} gave {len(given)} judgments for {asked}: it must give one "
            "for each, in their order"
        )


def _name(judge: object) -> str:
    rule = getattr(judge, "rule", judge)
    return getattr(rule, "__name__", type(rule).__name__)


def judge_pairs(judge: PairwiseJudge, episodes: Sequence[Episode]) -> list[Episode]:
    """Episodes with the best and the worst of their rollouts, by wins over all pairs.

    Where the judge abstains on every pair, or best and worst tie, there is no pair to train on.
    """
    index = [(e, i, j) for e in episodes for i, j in combinations(range(len(e.texts)), 2)]
    given = judge.compare([Pair(e.prompt, e.texts[i], e.texts[j], e.tools) for e, i, j in index])
    _check_count(judge, given, len(index))
    verdicts = iter(given)
    judged = []
    for episode in episodes:
        points = np.zeros(len(episode.texts))
        seen = []
        for i, j in combinations(range(len(episode.texts)), 2):
            outcome = next(verdicts)
            seen.append(outcome)
            if outcome.preferred is not None:
                winner, loser = (i, j) if outcome.preferred == "a" else (j, i)
                points[winner] += 1
                points[loser] -= 1
        best, worst = int(points.argmax()), int(points.argmin())
        decided = points[best] > points[worst]
        judged.append(
            replace(
                episode,
                verdicts=tuple(seen),
                chosen=best if decided else None,
                rejected=worst if decided else None,
            )
        )
    return judged


def judge_metrics(episodes: Sequence[Episode]) -> dict[str, tuple[float, float]]:
    """Sums and counts over these episodes: abstention, flips, first slot, decision mass."""
    everything = [v for e in episodes for v in e.verdicts]
    verdicts = [v for v in everything if not v.too_long]
    n = float(len(verdicts))
    metrics = {
        "judge/abstained": (float(sum(v.preferred is None for v in verdicts)), n),
        "judge/flipped": (float(sum(v.flipped for v in verdicts)), n),
        "judge/first_slot": (float(sum(v.first_slot for v in verdicts)), n),
        "judge/mass": (float(sum(v.mass for v in verdicts)), n),
    }
    metrics["judge/too_long"] = (float(len(everything) - len(verdicts)), float(len(everything)))
    judgments = [j for e in episodes for j in e.judgments or ()]
    noise = [reason for e in episodes for reason in e.noise]
    metrics["judge/noise"] = (float(sum(r is not None for r in noise)), float(len(judgments)))
    metrics["judge/negatives"] = (
        float(sum(j is not None for j in judgments)),
        float(len(judgments)),
    )
    return {name: value for name, value in metrics.items() if value[1]}
