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
    """Statistical rejection sampling optimisation (arXiv 2309.06657): of n samples those are
    accepted that look as if the optimal policy had drawn them, accepted ones are paired at random,
    and the pair's verdict labels it.

    The reward of a sample is the mean log-odds of the judge that it beats another one (the paper's
    section 3.3 has one opponent, here all n - 1), and it is accepted with probability
    exp((r - max r) / beta) (algorithm 1), so that the best one always is.
    """

    wants: Kind | tuple[Kind, ...] = ()

    def choose(self, episode: Episode) -> Episode:
        rng = np.random.default_rng((self.config.seed, episode.index))
        rewards = log_odds(episode)
        chance = np.exp((rewards - rewards.max()) / self.config.rso.beta)
        accepted = np.flatnonzero(rng.random(len(rewards)) < chance)
        order = rng.permutation(accepted).tolist()
        drawn = {frozenset(pair) for pair in zip(order[::2], order[1::2], strict=False)}
        pairs = tuple(p for p in episode.preferences() if frozenset(p) in drawn)
        return replace(episode, kept=tuple(accepted.tolist()), pairs=pairs)

    def examples_per_prompt(self, samples: int) -> int:
        return samples // 2


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
    """Mean over the others of log s / (1 - s), s being the judge's share for a sample, [R]."""
    rewards = np.zeros(len(episode.rollouts))
    for (a, b), seen in zip(episode.matches, episode.verdicts, strict=True):
        both = seen.score_a + seen.score_b
        share = float(np.clip(seen.score_a / both, LEAST_SHARE, 1 - LEAST_SHARE)) if both else 0.5
        rewards[a] += np.log(share / (1 - share))
        rewards[b] -= np.log(share / (1 - share))
    return rewards / (len(rewards) - 1)
