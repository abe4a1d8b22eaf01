"""Evaluation during a run: loss on held-out records offline, answers to held-out prompts online."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from fastalign import judge, ranks
from fastalign.batch import plan_batches
from fastalign.config import ConfigError
from fastalign.data import Example, Record, Stream
from fastalign.endpoint import Endpoint
from fastalign.episodes import Episode, Verdict
from fastalign.methods.base import Metrics, total
from fastalign.online import ask, awake_judge, check_decision_mass, sample, wake
from fastalign.reference import reference_logprobs
from fastalign.run import Run, reduce_metrics
from fastalign.templates import Renderer

# Full samples kept of each online evaluation.
KEPT_SAMPLES = 8
EVALUATION_ROUND = 2**31 - 1


class Evaluator:
    """Scores the current policy; the first online evaluation is the start that later ones are
    compared with, and is kept on disk for resumed runs."""

    def __init__(
        self,
        run: Run,
        examples: Sequence[Example],
        prompts: Sequence[Record],
        renderers: Sequence[Renderer],
    ) -> None:
        """``renderers`` render for the eval judge, ``run.renderers`` for the policy."""
        self.run = run
        self.renderers = renderers
        self.examples = list(examples)
        self.prompts = list(prompts)
        self.folder = Path(run.config.output_dir, "eval")

    def __call__(self, step: int) -> dict[str, float]:
        self.run.tracker.phase("eval")
        started = time.monotonic()
        self.run.model.engine.eval()
        online = self.run.config.online is not None
        scores = self._answers(step) if online else self._losses(step)
        self.run.model.engine.train()
        scores = {f"eval/{name}": value for name, value in scores.items()}
        took = {"time/evaluation": time.monotonic() - started}
        self.run.tracker.log(step, scores | took, show=False)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in scores.items())
        self.run.tracker.say(f"step {step}: {shown}")
        return scores

    def _losses(self, step: int) -> dict[str, float]:
        run = self.run
        denominator = run.method.denominator(self.examples)
        sums: Metrics = {}
        loss_sum = torch.zeros((), dtype=torch.float64, device=run.model.device)
        with torch.no_grad():
            for pack in plan_batches(
                self.examples,
                run.config.micro_batch_tokens,
                run.rank,
                run.world_size,
                run.operations.cost(reference=False),
                share_prefixes=run.model.shares_prefixes,
            ):
                pack = pack.to(run.model.device)
                reference = reference_logprobs(run, pack)
                # Progress 1: the whole loss, also while a warm-up leaves parts of it out.
                loss, parts = run.model.engine(
                    pack, loss=run.method.loss, reference=reference, progress=1.0
                )
                loss_sum += loss.double()
                for name, part in parts.items():
                    sums[name] = sums.get(name, 0) + part
        sums["loss"] = torch.stack([loss_sum, loss_sum.new_tensor(denominator / run.world_size)])
        return reduce_metrics(sums)

    def _answers(self, step: int) -> dict[str, float]:
        run = self.run
        assert run.engine is not None
        mine = list(enumerate(self.prompts))[run.rank :: run.world_size]
        ask(run, partial(wake, run))
        # The seeds of this round are no training round's, and the same at every evaluation.
        episodes = ask(run, lambda: sample(run, mine, EVALUATION_ROUND, num_generations=1))
        kl = self._kl_to_reference(episodes)
        start = self._start_texts(step, episodes)
        lengths = torch.tensor([float(len(e.rollouts[0].token_ids)) for e in episodes])
        sums = {
            "mean_length": total(lengths),
            "empty": total(torch.tensor([float(not e.texts[0].strip()) for e in episodes])),
            "kl_to_reference": kl,
        }
        if run.config.eval_judge is not None:
            sums |= self._win_rate(episodes, start)
        ask(run, run.engine.sleep)
        self._keep(step, episodes)
        scores = reduce_metrics({k: value.to(run.model.device) for k, value in sums.items()})
        if run.config.eval_judge is not None:
            check_decision_mass(run.config.eval_judge, "eval_judge", scores["judge_mass"])
        asked = run.asked.get("eval_judge")
        if isinstance(asked, Endpoint):
            scores |= {f"judge_{name}": value for name, value in asked.figures().items()}
        return scores

    def _kl_to_reference(self, episodes: Sequence[Episode]) -> torch.Tensor:
        """Mean over sampled tokens of log p(policy) - log p(reference): an estimate of the KL
        divergence for each token, unbiased where the recipe samples at temperature 1 and from all
        tokens.
        """
        run = self.run
        examples = [
            Example((Stream.of("kl", e.prompt_ids, e.rollouts[0].token_ids),), 1.0, e.source)
            for e in episodes
            if len(e.rollouts[0].token_ids)
        ]
        merged = [x for part in ranks.gather(examples) for x in part]
        result = torch.zeros(2, dtype=torch.float64, device=run.model.device)
        if not merged:
            return result
        with torch.no_grad():
            for pack in plan_batches(
                merged, run.config.micro_batch_tokens, run.rank, run.world_size
            ):
                pack = pack.to(run.model.device)
                policy, _ = run.model.engine(pack)
                with run.model.reference() as forward:
                    reference, _ = forward(pack)
                live = (pack.weights > 0)[pack.records][pack.streams]
                result += total((policy - reference)[live])
        return result

    def _start_texts(self, step: int, episodes: Sequence[Episode]) -> dict[int, str]:
        path = self.folder / f"start-{self.run.rank}of{self.run.world_size}.json"
        if step and not path.is_file():
            raise ConfigError(
                f"output_dir: {path} with the answers of the start is missing, so that nothing "
                "can be compared with them: evaluate from the first step, with as many processes"
            )
        if step == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({e.index: e.texts[0] for e in episodes}), encoding="utf-8")
        try:
            start = {int(k): v for k, v in json.loads(path.read_text(encoding="utf-8")).items()}
            if not all(isinstance(start[e.index], str) for e in episodes):
                raise TypeError
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise ConfigError(
                f"output_dir: {path} does not hold the answers of the start as they were written: "
                "evaluate from the first step, in another output_dir"
            ) from None
        return start

    def _win_rate(self, episodes: Sequence[Episode], start: dict[int, str]) -> Metrics:
        """Share of wins against the start's answers, a tie counting half."""
        verdicts = ask(self.run, lambda: self._compare(episodes, start))
        given = [v for v in verdicts if not v.failed]
        wins = [{"a": 1.0, "b": 0.0, None: 0.5}[verdict.preferred] for verdict in given]
        return {
            "win_rate": total(torch.tensor(wins)),
            "judge_mass": total(torch.tensor([v.mass for v in given if not v.too_long])),
            "judge_failed": total(torch.tensor([float(verdict.failed) for verdict in verdicts])),
        }

    def _compare(self, episodes: Sequence[Episode], start: dict[int, str]) -> list[Verdict]:
        run = self.run
        assert run.config.eval_judge is not None
        verdicts: list[Verdict] = []
        with awake_judge(run, "eval_judge") as asked:
            for dataset, renderer in enumerate(self.renderers):
                part = [e for e in episodes if e.dataset == dataset]
                who = judge.make_judge(run.config.eval_judge, "pairwise", renderer, asked)
                pairs = [judge.Pair(e.prompt, e.texts[0], start[e.index], e.tools) for e in part]
                verdicts += judge.compare(who, pairs)
        return verdicts

    def _keep(self, step: int, episodes: Sequence[Episode]) -> None:
        # Every rank may hold a few: enough for the first ones over all.
        kept = ranks.gather(list(episodes[:KEPT_SAMPLES]))
        first = sorted((e for part in kept for e in part), key=lambda e: e.index)[:KEPT_SAMPLES]
        if self.run.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            text = "".join(e.to_json() + "\n" for e in first)
            (self.folder / f"samples-{step}.jsonl").write_text(text, encoding="utf-8")
