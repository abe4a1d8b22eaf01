"""Baselines of arXiv 2402.11253 that learn from samples of their own which a judge ranks: RSO, ReST
and RAFT.  All three take a pairwise judge, so that the judge of SELF-JUDGE serves them as it is."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fastalign.config import Config
from fastalign.data import Example, Kind
from fastalign.episodes import Episode
from fastalign.methods.base import JudgeKind
from fastalign.methods.dpo import Dpo
from fastalign.methods.sft import Sft
from fastalign.templates import Renderer

# A judge that is certain makes a reward of log(1 / this), not of infinity.
LEAST_SHARE = 1e-4


class Rso(Dpo):
    """Statistical rejection sampling optimisation (arXiv 2309.06657): some of n samples are
    accepted as if the optimal policy had drawn them, accepted ones are paired at random, and the
    pair's verdict labels it.

    The reward of a sample is the judge's log-odds for it, less their mean over the samples (the
    paper's section 3.3 has one opponent, here all n).
    """

    wants: Kind | tuple[Kind, ...] = ()

    def choose(self, episode: Episode) -> Episode:
        rng = np.random.default_rng((self.config.seed, episode.index))
        order = self.accept(log_odds(episode), rng)
        order = [order[i] for i in rng.permutation(len(order))]
        drawn = {frozenset(pair) for pair in zip(order[::2], order[1::2], strict=False)}
        pairs = tuple(p for p in episode.preferences() if frozenset(p) in drawn)
        return replace(episode, pairs=pairs)

    def accept(self, rewards: np.ndarray, rng: np.random.Generator) -> list[int]:
        """Algorithm 1 of the paper: pass after pass over the samples that are left, each accepted
        with probability exp((r - max r) / beta), until there are enough."""
        left, accepted = list(range(len(rewards))), list[int]()
        while len(accepted) < self.accepted_of(len(rewards)):
            best = rewards[left].max()
            for i in list(left):
                if rng.random() < np.exp((rewards[i] - best) / self.config.rso.beta):
                    left.remove(i)
                    accepted.append(i)
                    if len(accepted) == self.accepted_of(len(rewards)):
                        break
        return accepted

    def accepted_of(self, samples: int) -> int:
        """How many of so many samples are accepted."""
        return min(samples, self.config.rso.num_samples or max(2, samples // 2))

    def examples_per_prompt(self, samples: int) -> int:
        return self.accepted_of(samples) // 2


class Rest(Sft):
    """Reinforced self-training (ReST, arXiv 2308.08998): SFT on the samples that the judge places
    above a quantile of those for the same prompt.

    A sample's place is the share of its comparisons that it wins; an abstention is no win, so that
    nothing is kept of answers that the judge cannot tell apart.
    """

    wants: Kind | tuple[Kind, ...] = ()
    judge_kind: JudgeKind | None = "pairwise"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.quantile = config.rest.quantile

    def choose(self, episode: Episode) -> Episode:
        wins = episode.wins()
        kept = np.flatnonzero(wins / (len(wins) - 1) > self.quantile)
        return replace(episode, kept=tuple(kept.tolist()))

    def from_episode(self, episode: Episode, renderer: Renderer) -> list[Example]:
        return self.sampled(episode, [episode.rollouts[i] for i in episode.kept])


class Raft(Rest):
    """Reward-ranked fine-tuning (RAFT, arXiv 2304.06767): SFT on the judge's best sample of each
    prompt, which is found by a knockout tournament as in self-rejection (arXiv 2402.11253,
    section 3.3).

    A winner that only the draw made one, no match of which was decided, is left out.
    """

    compares = "tournament"

    def choose(self, episode: Episode) -> Episode:
        assert episode.winner is not None
        won = episode.wins()[episode.winner] > 0
        return replace(episode, kept=(episode.winner,) if won else ())

    def examples_per_prompt(self, samples: int) -> int:
        return 1


def log_odds(episode: Episode) -> np.ndarray:
    """Mean of log s / (1 - s) over all samples, s being the judge's share for one against another
    and 1/2 against itself, [R]: where s is a logistic function of the difference of two rewards,
    these are the rewards less their mean."""
    rewards = np.zeros(len(episode.rollouts))
    for (a, b), seen in zip(episode.matches, episode.verdicts, strict=True):
        both = seen.score_a + seen.score_b
        share = float(np.clip(seen.score_a / both, LEAST_SHARE, 1 - LEAST_SHARE)) if both else 0.5
        rewards[a] += np.log(share / (1 - share))
        rewards[b] -= np.log(share / (1 - share))
    return rewards / len(rewards)
