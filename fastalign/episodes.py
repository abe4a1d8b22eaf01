"""Rollouts and what was said of them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastalign._bridge import EpisodeStore, NotAJournal
from fastalign.config import ConfigError
from fastalign.rollout.engine import Rollout

LOG = "episodes"
"""Folder in output_dir: what each round sampled, for people, and the journals of its calls."""
FAULTS = ("empty", "unchanged")
NO_JUDGMENT = "no judgment"
"""Begins the ``noise`` of an answer that its judge said nothing about."""


@dataclass(frozen=True)
class Verdict:
    """What a judge said of two answers a and b to one prompt.

    Attributes:
        score_a, score_b: mean over both orders (and principles), in [0, 1].
        preferred: "a", "b", or None when the judge abstains.
        flipped: the two orders named different winners.
        too_long: a prompt for the judge did not fit, so that it was not asked.
        failed: the judge was asked and did not answer.
        first_slot: how often the first slot won, in [0, 1].
        mass: mean P(A) + P(B) at the decision position (1 for rules).
        probabilities: for each principle and order (a first, b first) P(A) and P(B), where the
            judge was asked in both orders; everything above but the failures follows from them.
    """

    score_a: float
    score_b: float
    preferred: str | None
    flipped: bool = False
    first_slot: float = 0.5
    mass: float = 1.0
    too_long: bool = False
    failed: bool = False
    probabilities: tuple[tuple[tuple[float, float], tuple[float, float]], ...] = ()

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Verdict:
        """The verdict that ``vars`` wrote, as JSON gives it back."""
        read = [tuple(tuple(order) for order in orders) for orders in row.get("probabilities", ())]
        return cls(**{**row, "probabilities": tuple(read)})


@dataclass(frozen=True)
class Episode:
    """One prompt, the completions sampled for it, and their judgments.

    Attributes:
        prompt: messages that end before the answer.
        prompt_ids: int32 [P], what the rollouts are trained on after.
        sampler_ids: int32 [S], what the sampler was given; None: ``prompt_ids``.
        completion, judgment: the row's answer and what is wrong with it, where the rollouts refine
            it (ILF).
        judgments: one for each rollout, None meaning fine (written judges).
        noise: for each rollout why its judgment is none to train on, or None (written judges).
        matches: which two rollouts each of ``verdicts`` compares, a and b (pairwise judges).
        pairs: rollouts that the method trains on as (chosen, rejected).
        winner: of a tournament between the rollouts.
        kept: rollouts that the method imitates (ReST, RAFT).
        staleness: how many rounds older than the policy's the weights were that sampled it, when
            it was judged; 0: on-policy.
    """

    index: int
    source: str
    dataset: int
    prompt: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] | None
    prompt_ids: np.ndarray
    rollouts: tuple[Rollout, ...]
    texts: tuple[str, ...]
    weight: float = 1.0
    judgments: tuple[str | None, ...] | None = None
    noise: tuple[str | None, ...] = ()
    matches: tuple[tuple[int, int], ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    pairs: tuple[tuple[int, int], ...] = ()
    winner: int | None = None
    kept: tuple[int, ...] = ()
    sampler_ids: np.ndarray | None = None
    completion: str | None = None
    judgment: str | None = None
    staleness: int = 0

    @property
    def asked_ids(self) -> np.ndarray:
        """What the sampler was given, int32."""
        return self.prompt_ids if self.sampler_ids is None else self.sampler_ids

    def preferences(self) -> list[tuple[int, int]]:
        """(preferred, other) of each match that the judge did not abstain from."""
        return [
            (a, b) if seen.preferred == "a" else (b, a)
            for (a, b), seen in zip(self.matches, self.verdicts, strict=True)
            if seen.preferred is not None
        ]

    def wins(self) -> np.ndarray:
        """How many of its matches each rollout won, [R]."""
        return np.bincount([w for w, _ in self.preferences()], minlength=len(self.rollouts))

    def points(self) -> np.ndarray:
        """Wins minus losses of each rollout, [R]."""
        losses = np.bincount([x for _, x in self.preferences()], minlength=len(self.rollouts))
        return self.wins() - losses

    def refinement_faults(self) -> list[str | None]:
        """Why each rollout is no refinement of ``completion``: "empty", "unchanged", or None."""
        assert self.completion is not None
        original = self.completion.strip()
        return [
            "empty" if not text.strip() else "unchanged" if text.strip() == original else None
            for text in self.texts
        ]

    def refinements(self) -> list[Rollout]:
        faults = self.refinement_faults()
        return [r for r, fault in zip(self.rollouts, faults, strict=True) if fault is None]

    def judged(self) -> list[tuple[Rollout, str | None]]:
        """Rollouts with written judgments that can be trained on."""
        assert self.judgments is not None
        noise = self.noise or (None,) * len(self.rollouts)
        return [
            (rollout, judgment)
            for rollout, judgment, reason in zip(self.rollouts, self.judgments, noise, strict=True)
            if reason is None
        ]

    def to_json(self) -> str:
        """One line for the episode log: readable, and complete enough to train on again."""
        row: dict[str, Any] = {
            "index": self.index,
            "source": self.source,
            "dataset": self.dataset,
            "weight": self.weight,
            "prompt": list(self.prompt),
            "completions": list(self.texts),
        }
        if self.tools is not None:
            row["tools"] = list(self.tools)
        if self.completion is not None:
            row["completion"], row["judgment"] = self.completion, self.judgment
        if self.judgments is not None:
            row["judgments"] = list(self.judgments)
        if any(self.noise):
            row["noise"] = list(self.noise)
        if self.verdicts:
            row["matches"] = [list(match) for match in self.matches]
            row["verdicts"] = [vars(verdict) for verdict in self.verdicts]
            row["pairs"] = [list(pair) for pair in self.pairs]
            row["winner"], row["kept"] = self.winner, list(self.kept)
        row |= {
            "finish_reasons": [rollout.finish_reason for rollout in self.rollouts],
            "weight_version": self.rollouts[0].weight_version if self.rollouts else None,
            "staleness": self.staleness,
            "prompt_ids": self.prompt_ids.tolist(),
            "token_ids": [rollout.token_ids.tolist() for rollout in self.rollouts],
            **({} if self.sampler_ids is None else {"sampler_ids": self.sampler_ids.tolist()}),
            # The shortest numbers that are these in float32.
            "logprobs": [[float(str(p)) for p in r.logprobs] for r in self.rollouts],
        }
        return json.dumps(row, ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> Episode:
        """The episode of a line that :meth:`to_json` wrote."""
        row = json.loads(line)
        rollouts = tuple(
            Rollout(
                np.array(ids, dtype=np.int32),
                np.array(logprobs, dtype=np.float32),
                reason,
                row["weight_version"],
            )
            for ids, logprobs, reason in zip(
                row["token_ids"], row["logprobs"], row["finish_reasons"], strict=True
            )
        )
        judgments, noise = row.get("judgments"), row.get("noise")
        if judgments is not None and noise is None:
            noise = [None] * len(judgments)
        return cls(
            index=row["index"],
            source=row["source"],
            dataset=row["dataset"],
            prompt=tuple(row["prompt"]),
            tools=tuple(row["tools"]) if "tools" in row else None,
            prompt_ids=np.array(row["prompt_ids"], dtype=np.int32),
            rollouts=rollouts,
            texts=tuple(row["completions"]),
            weight=row["weight"],
            judgments=tuple(judgments) if judgments is not None else None,
            noise=tuple(noise or ()),
            matches=tuple((a, b) for a, b in row.get("matches", ())),
            verdicts=tuple(map(Verdict.from_row, row.get("verdicts", ()))),
            pairs=tuple((chosen, rejected) for chosen, rejected in row.get("pairs", ())),
            winner=row.get("winner"),
            kept=tuple(row.get("kept", ())),
            sampler_ids=(
                np.array(row["sampler_ids"], dtype=np.int32) if "sampler_ids" in row else None
            ),
            completion=row.get("completion"),
            judgment=row.get("judgment"),
            staleness=row.get("staleness", 0),
        )


def sampling_seed(seed: int, round_index: int, prompt: int, sample: int) -> int:
    """The seed of one draw: a function of what is drawn, not of who draws it or when."""
    state = np.random.SeedSequence((seed, round_index, prompt, sample)).generate_state(1)
    return int(state[0] >> 1)


def journal_path(output_dir: str, round_index: int, rank: int) -> Path:
    """The journal of the engine call that a rank makes in a round."""
    return Path(output_dir, LOG, f"{round_index:04d}-{rank}.journal")


def verdicts_path(output_dir: str, round_index: int, rank: int) -> Path:
    """What the judge said of a rank's share of a round, beside its journal."""
    return journal_path(output_dir, round_index, rank).with_suffix(".verdicts")


def forget_journals(output_dir: str, first: int) -> None:
    """Remove all ranks' journals and verdicts of the rounds before round ``first``."""
    for suffix in ("journal", "verdicts"):
        for path in Path(output_dir, LOG).glob(f"*-*.{suffix}"):
            number = path.name.partition("-")[0]
            if number.isdecimal() and int(number) < first:
                path.unlink()


def verdicts_key(judge: Mapping[str, Any], episodes: Sequence[Episode]) -> str:
    """A name for what a judge is asked: its settings, as JSON takes them, and the episodes' prompts
    and answers."""
    content = hashlib.sha256(json.dumps(judge, sort_keys=True).encode())
    for episode in episodes:
        content.update(json.dumps([episode.index, episode.prompt, episode.texts]).encode())
        for rollout in episode.rollouts:
            content.update(rollout.token_ids.tobytes())
    return content.hexdigest()


def keep_verdicts(path: Path, key: str, episodes: Sequence[Episode]) -> None:
    """Write what was said of episodes, for :func:`recall_verdicts`: whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(e.to_json() + "\n" for e in episodes).encode()
    head = json.dumps({"key": key, "sha256": hashlib.sha256(lines).hexdigest()}).encode()
    aside = path.with_suffix(".partial")
    with aside.open("wb") as file:
        file.write(head + b"\n" + lines)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def recall_verdicts(path: Path, key: str, episodes: Sequence[Episode]) -> list[Episode] | None:
    """The episodes, in the order in which they were judged, with what a judge said of them when it
    was asked the same before; else None."""
    if not path.is_file():
        return None
    head, _, lines = path.read_bytes().partition(b"\n")
    if head != json.dumps({"key": key, "sha256": hashlib.sha256(lines).hexdigest()}).encode():
        return None
    asked = {episode.index: episode for episode in episodes}
    said = [Episode.from_json(line) for line in lines.decode().split("\n")[:-1]]
    return [
        replace(
            asked[then.index],
            judgments=then.judgments,
            noise=then.noise,
            matches=then.matches,
            verdicts=then.verdicts,
            winner=then.winner,
        )
        for then in said
    ]


def sample_once(
    path: Path,
    call: Mapping[str, Any],
    prompts: Sequence[np.ndarray],
    seeds: Sequence[int],
    generate: Callable[[], list[Rollout]],
    say: Callable[[str], None],
    all_agree: Callable[[bool], bool] = bool,
) -> list[Rollout]:
    """What ``generate`` returns for these prompts and seeds, committed to the journal at ``path``;
    or, where that holds all of it for the same call, prompts and seeds, what it returned then.

    Args:
        call: what else decides what is sampled, as JSON takes it.
        prompts: int32 [P_i] each; equal ones follow each other.
        say: told what was found in a journal.
        all_agree: see :meth:`fastalign.rollout.RolloutEngine.all_agree`: ranks whose calls are one
            call of their engine use their journals together, or none does.

    Returns:
        Rollouts whose arrays are views of the journal.

    Raises:
        ConfigError: the file is none of ours.
    """
    stored = _stored(path, call, prompts, seeds, say)
    if all_agree(stored is not None) and stored is not None:
        return _told(stored, path, say)
    if stored is not None:
        say(f"{path}: a rank that shares the engine lost its rollouts; all are sampled anew")
        path.unlink()
    rollouts = generate()
    path.parent.mkdir(parents=True, exist_ok=True)
    with EpisodeStore(path) as store:
        number, prompt = store.append_settings(_settings(call)), -1
        for i, (ids, seed, rollout) in enumerate(zip(prompts, seeds, rollouts, strict=True)):
            if i == 0 or not np.array_equal(ids, prompts[i - 1]):
                prompt = store.append_prompt(ids)
            store.append(
                prompt,
                number,
                rollout.token_ids,
                rollout.logprobs,
                finish_reason=rollout.finish_reason,
                seed=seed,
                weight_version=rollout.weight_version,
            )
        return _rollouts(store)


def recall(
    path: Path,
    call: Mapping[str, Any],
    prompts: Sequence[np.ndarray],
    seeds: Sequence[int],
    say: Callable[[str], None],
) -> list[Rollout] | None:
    """What the journal at ``path`` holds of a call, see :func:`sample_once`; None, and no file any
    more, unless it is all of it.

    Raises:
        ConfigError: the file is none of ours.
    """
    stored = _stored(path, call, prompts, seeds, say)
    return None if stored is None else _told(stored, path, say)


def _told(stored: list[Rollout], path: Path, say: Callable[[str], None]) -> list[Rollout]:
    say(f"{path}: {len(stored)} rollouts were sampled before, and are used")
    return stored


def _stored(
    path: Path,
    call: Mapping[str, Any],
    prompts: Sequence[np.ndarray],
    seeds: Sequence[int],
    say: Callable[[str], None],
) -> list[Rollout] | None:
    """See :func:`recall`."""
    if not path.exists():
        return None
    try:
        with EpisodeStore(path) as store:
            _check_call(store, _settings(call), prompts, seeds)
            return _rollouts(store)
    except NotAJournal as error:
        raise ConfigError(f"{error}; rollouts are to be kept there: move it away") from None
    except ValueError as error:
        say(f"{path}: {error}; they are sampled anew")
        path.unlink()
        return None


def _settings(call: Mapping[str, Any]) -> bytes:
    return json.dumps(call, sort_keys=True).encode()


def _check_call(
    store: EpisodeStore, settings: bytes, prompts: Sequence[np.ndarray], seeds: Sequence[int]
) -> None:
    """Raises ValueError unless the store holds every rollout of this call and no other."""
    if len(store) != len(seeds):
        raise ValueError(f"it holds {len(store)} of {len(seeds)} rollouts")
    for stored, ids, seed in zip(store, prompts, seeds, strict=True):
        if (
            stored.seed != seed
            or store.settings(stored.settings) != settings
            or not np.array_equal(store.prompt(stored.prompt), ids)
        ):
            raise ValueError("its rollouts are another call's")


def _rollouts(store: EpisodeStore) -> list[Rollout]:
    return [
        Rollout(stored.token_ids, stored.logprobs, stored.finish_reason, stored.weight_version)
        for stored in store
    ]


def rollout_metrics(episodes: Sequence[Episode], max_length: int) -> dict[str, float]:
    """What was sampled: mean length in tokens, and shares of the rollouts that met a limit or are
    no refinement (ILF)."""
    rollouts = [(e, r) for e in episodes for r in e.rollouts]

    def mean(values: Iterable[float]) -> float:
        return float(np.mean(list(values)))

    metrics = {
        "rollout/staleness": mean(e.staleness for e in episodes),
        "rollout/mean_length": mean(len(r.token_ids) for _, r in rollouts),
        "rollout/truncated": mean(r.finish_reason == "length" for _, r in rollouts),
        # Behind a long prompt an answer may be cut before it is trained on.
        "rollout/cut": mean(len(e.prompt_ids) + len(r.token_ids) > max_length for e, r in rollouts),
    }
    faults = [f for e in episodes if e.completion is not None for f in e.refinement_faults()]
    if faults:
        metrics |= {f"rollout/{name}": mean(f == name for f in faults) for name in FAULTS}
    return metrics


def drift(sampler: Sequence[np.ndarray], trainer: np.ndarray) -> tuple[float, float]:
    """Mean and 99th percentile of |log p of the sampler - log p of the trainer|."""
    gap = np.abs(np.concatenate(list(sampler)) - trainer)
    return float(gap.mean()), float(np.quantile(gap, 0.99))
