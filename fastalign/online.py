"""The online hop: prompts -> rollouts -> judgments -> examples."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch

from fastalign import judge, ranks, tournament
from fastalign.batch import make_batch
from fastalign.config import ConfigError, JudgeConfig
from fastalign.data import Example, Record, Stream
from fastalign.endpoint import Endpoint, JudgeError
from fastalign.episodes import (
    LOG,
    Episode,
    Verdict,
    drift,
    journal_path,
    keep_verdicts,
    recall,
    recall_verdicts,
    rollout_metrics,
    sample_once,
    sampling_seed,
    verdicts_key,
    verdicts_path,
)
from fastalign.judge_quality import Quality, compare_blind, plain, quality
from fastalign.methods.base import plain_prompt
from fastalign.model import POLICY, REFERENCE, TrainedModel
from fastalign.rollout import (
    EngineError,
    EngineFault,
    Rollout,
    RolloutEngine,
    SamplingSettings,
)
from fastalign.run import Ahead, Run, Sampled
from fastalign.templates import Renderer

T = TypeVar("T")
SHOWN_OF_JUDGE = ("accuracy", "abstained", "flipped", "first_slot", "mass")
FROZEN_PROBE = (np.arange(1, 9, dtype=np.int32), tuple(range(16)))


def ask(run: Run, work: Callable[[], T]) -> T:
    """What ``work``, which asks engines, returns; collective.

    Where an engine fails on any rank and can be started anew, all ranks do that, send it the
    current weights, and work once more: a rank whose calls are in journals has their answers.

    Behind its first call of an engine ``work`` must not wait for other ranks, but inside of engines
    and in what fails on all of them alike: one that failed would not come.

    Raises:
        EngineFault: on all ranks, an engine of any cannot be started anew, or has failed again.
    """
    try:
        return _together(work)
    except EngineFault as fault:
        assert run.engine is not None
        if not run.engine.lost():
            raise
        first = fault
    run.tracker.say(f"{first}; it is started anew")
    run.engine.restart()
    run.synced = run.reference_pushed = None

    def once_more() -> T:
        wake(run)
        return work()

    try:
        return _together(once_more)
    except EngineFault as fault:
        raise EngineFault(f"{fault}; before it was started anew: {first}") from None


def _together(work: Callable[[], T]) -> T:
    """What ``work`` returns; an :class:`EngineFault` of any rank is raised on all of them."""
    fault: EngineFault | None = None
    try:
        result = work()
    except EngineFault as error:
        fault = error
    found = next((f for part in ranks.gather([fault]) for f in part if f is not None), None)
    if found is not None:
        raise found from (None if found is fault else fault)
    return result


def wake(run: Run) -> None:
    """Wake the engine and give it the current weights, and the reference's where they are new;
    what it still samples with the last ones is waited for.  Collective, as :func:`ask` wants it.

    Under LoRA only the policy's adapter travels, so the base and the reference's adapter have to
    outlive every sleep: their log-probs on a fixed prompt are what they were when they came.

    Raises:
        EngineError: they are not.
    """
    assert run.engine is not None
    finish_ahead(run)
    # Between these, ranks gather weights.
    _together(run.engine.wake)
    _together(partial(push_weights, run))
    if run.model.uses_adapter:
        _together(partial(_push_reference, run))
        _check_frozen(run)


def _check_frozen(run: Run) -> None:
    """See :func:`wake`."""
    assert run.engine is not None
    prompt, tokens = FROZEN_PROBE
    # The base alone, and the adapter on it that stays.
    for name in (None, REFERENCE) if run.model.has_reference_adapter else (None,):
        now = run.engine.next_logprobs([prompt], tokens, name)
        before = run.frozen_logprobs.setdefault(name, now)
        # The same call on the same weights: what may differ is the order of a few additions.
        change = float(np.abs(now - before).mean())
        if not change <= 0.02:
            what = "base weights" if name is None else "reference adapter"
            raise EngineError(
                f"the {what} did not survive the engine's sleep: log-probs on a fixed prompt "
                f"moved by {change:.3g} on average"
            )


def _push_reference(run: Run) -> None:
    model = run.model
    if not model.has_reference_adapter or run.reference_pushed == model.reference_version:
        return
    assert run.engine is not None
    run.engine.load_adapter(
        REFERENCE,
        model.adapter_tensors(REFERENCE),
        model.adapter_config(REFERENCE),
        model.reference_version,
    )
    run.reference_pushed = model.reference_version
    run.frozen_logprobs.pop(REFERENCE, None)


def push_weights(run: Run) -> None:
    """Give the engine the current weights: the adapter alone under LoRA, everything otherwise."""
    assert run.engine is not None
    if run.model.uses_adapter:
        tensors = run.model.adapter_tensors()
        # An adapter that lacks a module is one that loads without complaint.
        unlike = sorted(run.model.adapter_names() ^ tensors.keys())
        if unlike:
            raise EngineError(
                f"weight transfer: {len(unlike)} tensors of the adapter are missing or extra: "
                + ", ".join(unlike[:4])
            )
        report = run.engine.load_adapter(POLICY, tensors, run.model.adapter_config(), run.version)
    else:
        names = frozenset(run.model.named_weights())
        with contextlib.closing(run.model.iter_weights(run.model.dtype)) as weights:
            report = run.engine.load_weights(weights, names, run.version)
    run.synced = report
    run.tracker.phase("sync", f"{report.seconds:.1f} s")


def draw(
    run: Run, prompts: Sequence[Record], round_index: int
) -> tuple[list[Episode], dict[str, float]]:
    """This rank's share of a round: new prompts and what the current model answers to them, or
    has answered already to a run that ended later in this round; under ``online.max_staleness``
    what was sampled ahead.  The engine holds the current weights then."""
    assert run.engine is not None and run.config.online is not None
    timings: dict[str, float] = {}
    order = _order_of_round(run, prompts, round_index)
    waiting: dict[str, float] = {}
    with _timed(waiting, "time/waiting_for_rollout"):
        run.tracker.phase("rollout")
        ahead, again = _take_ahead(run, order)
    with _timed(timings, "time/sync"):
        run.tracker.phase("sync")
        ask(run, partial(wake, run))
    if run.synced is not None:
        # Without waking, and without the reference, which travels when it is new.
        timings["sync/seconds"] = run.synced.seconds
        timings["sync/mib"] = run.synced.bytes / 2**20
    with (
        _timed(timings, "time/rollout"),
        _prefix_cached(timings, "rollout/prefix_cached", run.engine),
    ):
        run.tracker.phase("rollout")
        # Also a rank whose share was sampled ahead, for others may not have theirs.
        rollouts = ask(run, lambda: _sample_order(run, order) if ahead is None else ahead.rollouts)
    if run.config.online.max_staleness:
        timings |= waiting
        # Shares of ranks.
        timings["rollout/resampled"] = float(sum(sum(part) for part in ranks.gather([again])))
        timings["time/rollout_ahead"] = 0.0 if ahead is None else ahead.seconds
    staleness = 0 if ahead is None else ahead.staleness
    episodes = _episodes(run, order, rollouts)
    return [replace(episode, staleness=staleness) for episode in episodes], timings


@dataclass(frozen=True)
class _Taken:
    """What was sampled ahead, in how many seconds, with weights how many rounds old."""

    rollouts: list[Rollout]
    seconds: float
    staleness: int


def _take_ahead(run: Run, order: _Order) -> tuple[_Taken | None, bool]:
    """What was sampled of this round before its turn, where anything was, and whether it has to be
    sampled again: it is older than ``online.max_staleness``, or the journal of a run that was
    resumed, whose weights of then are gone, lacks it."""
    ahead, online = run.ahead, run.config.online
    assert online is not None
    if ahead is None or ahead.round != order.round:
        return None, False
    finish_ahead(run)
    ahead = run.ahead
    assert ahead is not None
    staleness = order.round - ahead.weights_round
    if staleness > online.max_staleness:
        why = (
            f"the weights that sampled it are {staleness} rounds old, "
            f"online.max_staleness is {online.max_staleness}"
        )
    else:
        if ahead.sampling is not None:
            sampled = ahead.sampling.result()
            return _Taken(sampled.rollouts, sampled.seconds, staleness), False
        assert order.journal is not None
        found = recall(order.journal, ahead.call, order.asked, order.seeds, run.tracker.say)
        if found is not None:
            return _Taken(found, 0.0, staleness), False
        why = "what was sampled ahead is gone, and so are the weights"
    run.ahead = None
    run.tracker.say(f"round {order.round + 1} is sampled again: {why}")
    return None, True


@dataclass(frozen=True)
class _Order:
    """What a rank asks of the engine: ``n`` samples to each of its prompts."""

    round: int
    prompts: Sequence[tuple[int, Record]]
    tokenised: list[np.ndarray]
    seeds: list[int]
    settings: SamplingSettings
    n: int
    journal: Path | None

    @property
    def asked(self) -> list[np.ndarray]:
        return [ids for ids in self.tokenised for _ in range(self.n)]


def _order_of_round(run: Run, prompts: Sequence[Record], round_index: int) -> _Order:
    online = run.config.online
    assert online is not None
    size = online.prompts_per_iteration
    first = round_index * size
    indices = range(first + run.rank, first + size, run.world_size)
    mine = [(index, prompts[index]) for index in indices]
    journal = journal_path(run.config.output_dir, round_index, run.rank)
    return _order(
        run, mine, round_index, online.num_generations, run.method.rollout_prompt, journal
    )


def sample_ahead(run: Run, prompts: Sequence[Record], round_index: int) -> None:
    """Let the engine sample this rank's share of a round while the one before it is trained on,
    with the weights of now; :func:`finish_ahead` waits for it."""
    if run.synced is None:
        # Somebody else has judged with the engine.
        ask(run, partial(wake, run))
    order = _order_of_round(run, prompts, round_index)
    call = _call(run, order.settings)
    pool = ThreadPoolExecutor(1)
    sampling = pool.submit(_timed_sampling, run, order, call)
    # Its thread ends with its work.
    pool.shutdown(wait=False)
    run.ahead = Ahead(round_index, round_index - 1, call, sampling)


def finish_ahead(run: Run) -> None:
    """Wait until the engine has sampled what it was asked for ahead, and the journal holds it; or
    has failed, which whoever asks it next finds out, and the round is sampled in its turn."""
    ahead = run.ahead
    if ahead is None or ahead.sampling is None:
        return
    try:
        ahead.sampling.result()
    except EngineFault as fault:
        run.tracker.say(f"round {ahead.round + 1}, ahead of its turn: {fault}")
        run.ahead = replace(ahead, sampling=None)


def collect(
    run: Run, episodes: list[Episode], round_index: int
) -> tuple[list[Example], dict[str, float]]:
    """What a round drew -> judgments, where the method asks for any -> examples; all of it is
    written to the episode log.

    Raises:
        BudgetSpent: on all ranks, when the judge may not be asked any more.
        JudgeError: the judge said nothing about any answer.
    """
    config, engine = run.config, run.engine
    assert engine is not None
    timings: dict[str, float] = {}
    if config.judge is not None:
        with _timed(timings, "time/judge"):
            run.tracker.phase("judge")
            asked = run.asked.get("judge")
            judging = asked.engine if isinstance(asked, judge.JudgeModel) else engine
            with _prefix_cached(timings, "judge/prefix_cached", judging):
                judged = judge_once(run, episodes, round_index)
                episodes = [run.method.choose(e) for e in judged]
    ask(run, engine.sleep)
    gap_mean, gap_p99 = sampler_gap(run, episodes)
    episodes = sorted((e for part in ranks.gather(episodes) for e in part), key=lambda e: e.index)
    if run.rank == 0:
        folder = Path(config.output_dir, LOG)
        folder.mkdir(parents=True, exist_ok=True)
        text = "".join(e.to_json() + "\n" for e in episodes)
        (folder / f"{round_index:04d}.jsonl").write_text(text, encoding="utf-8")
    figures = {k: s / n for k, (s, n) in judge.judge_metrics(episodes).items()}
    if config.judge is not None:
        check_decision_mass(config.judge, "judge", figures.get("judge/mass", 1.0))
    asked = run.asked.get("judge")
    if isinstance(asked, Endpoint):
        figures |= {f"judge/{name}": value for name, value in asked.figures().items()}
    examples = [x for e in episodes for x in run.method.from_episode(e, run.renderers[e.dataset])]
    examples = run.method.select(examples, config.seed + round_index)
    return examples, timings | figures | rollout_metrics(episodes, config.max_length) | {
        "rollout/examples": float(len(examples)),
        "rollout/logprob_gap_mean": gap_mean,
        "rollout/logprob_gap_p99": gap_p99,
    }


def sample(
    run: Run,
    prompts: Sequence[tuple[int, Record]],
    round_index: int,
    num_generations: int,
    prompt_of: Callable[[Record, Renderer], np.ndarray] = plain_prompt,
    journal: Path | None = None,
) -> list[Episode]:
    """Draw ``num_generations`` completions for each prompt, worded by ``prompt_of``, from the
    policy; with a ``journal`` once, however often the run is killed."""
    order = _order(run, prompts, round_index, num_generations, prompt_of, journal)
    return _episodes(run, order, _sample_order(run, order))


def _order(
    run: Run,
    prompts: Sequence[tuple[int, Record]],
    round_index: int,
    n: int,
    prompt_of: Callable[[Record, Renderer], np.ndarray],
    journal: Path | None,
) -> _Order:
    seed = run.config.seed
    return _Order(
        round_index,
        prompts,
        [prompt_of(record, run.renderers[record.dataset]) for _, record in prompts],
        [sampling_seed(seed, round_index, i, k) for i, _ in prompts for k in range(n)],
        sampling_settings(run),
        n,
        journal,
    )


def _call(run: Run, settings: SamplingSettings) -> dict[str, Any]:
    """With prompts and seeds what decides what is sampled.  Under LoRA the weights that were pushed
    are the adapter's; the base is known by what it answers to a fixed prompt."""
    assert run.engine is not None
    base = run.frozen_logprobs.get(None)
    return {
        "model": run.config.model_name_or_path,
        "revision": run.config.model_revision,
        "base": None if base is None else hashlib.sha256(base.tobytes()).hexdigest(),
        "engine": run.engine.name,
        "weights": run.synced.digest if run.synced is not None else None,
        "lora_alpha": run.config.lora_alpha,
        "settings": asdict(settings),
    }


def _sample_order(run: Run, order: _Order, call: Mapping[str, Any] | None = None) -> list[Rollout]:
    assert run.engine is not None
    generate = partial(
        run.engine.generate,
        order.asked,
        order.settings,
        order.seeds,
        POLICY if run.model.uses_adapter else None,
    )
    if order.journal is None:
        return generate()
    call = _call(run, order.settings) if call is None else call
    return sample_once(
        order.journal,
        call,
        order.asked,
        order.seeds,
        generate,
        run.tracker.say,
        run.engine.all_agree,
    )


def _timed_sampling(run: Run, order: _Order, call: Mapping[str, Any]) -> Sampled:
    started = time.monotonic()
    rollouts = _sample_order(run, order, call)
    return Sampled(rollouts, time.monotonic() - started)


def _episodes(run: Run, order: _Order, rollouts: Sequence[Rollout]) -> list[Episode]:
    n = order.n
    return [
        make_episode(run, index, record, ids, tuple(rollouts[k * n : (k + 1) * n]))
        for k, ((index, record), ids) in enumerate(zip(order.prompts, order.tokenised, strict=True))
    ]


def make_episode(
    run: Run, index: int, record: Record, sampler_ids: np.ndarray, rollouts: tuple[Any, ...]
) -> Episode:
    renderer = run.renderers[record.dataset]
    return Episode(
        index=index,
        source=record.source,
        dataset=record.dataset,
        prompt=record.prompt,
        tools=record.tools,
        prompt_ids=plain_prompt(record, renderer),
        sampler_ids=sampler_ids,
        rollouts=rollouts,
        texts=tuple(renderer.decode(r.token_ids) for r in rollouts),
        weight=record.weight,
        completion=record.completion,
        judgment=record.judgment,
    )


def sampling_settings(run: Run) -> SamplingSettings:
    return SamplingSettings(
        max_new_tokens=run.config.max_completion_length,
        temperature=run.config.temperature,
        top_p=run.config.top_p,
        stop_token_ids=tuple(sorted(set().union(*(r.eos_ids for r in run.renderers)))),
        top_k=run.config.top_k,
        min_p=run.config.min_p,
        stop=run.config.stop,
    )


def judge_once(run: Run, episodes: list[Episode], round_index: int) -> list[Episode]:
    """This rank's share of a round with what the judge says of it, or said of it to a run that
    ended later in this round; collective.

    Raises:
        JudgeError: on all ranks, nothing was said of any answer.
    """
    assert run.config.judge is not None
    path = verdicts_path(run.config.output_dir, round_index, run.rank)
    # Who judges in a round of a run follows from its recipe; what it is asked, from the weights.
    judge_of_run = run.config.judge.model_dump(mode="json", exclude={"endpoint"})
    key = verdicts_key(judge_of_run, episodes)
    found = recall_verdicts(path, key, episodes)
    # Ranks judge together or not at all: their passes through a sharded reference are collective.
    if all(part == [True] for part in ranks.gather([found is not None])):
        assert found is not None
        run.tracker.say(f"{path}: {len(found)} prompts were judged before, and are not asked again")
        return found
    judged = ask(run, partial(judge_episodes, run, episodes))
    everyone = [e for part in ranks.gather(judged) for e in part]
    failed, asked = judge.judge_metrics(everyone).get("judge/failed", (0.0, 0.0))
    if asked and failed == asked:
        # Which is not kept: a run that goes on asks again.
        why = next((reason for e in everyone for reason in e.noise if reason), "no verdict")
        raise JudgeError(f"judge: nothing was said of any of {len(everyone)} prompts: {why}")
    keep_verdicts(path, key, judged)
    return judged


def judge_episodes(run: Run, episodes: list[Episode]) -> list[Episode]:
    assert run.config.judge is not None
    judged: list[Episode] = []
    with awake_judge(run, "judge") as asked:
        for dataset, renderer in enumerate(run.renderers):
            part = [e for e in episodes if e.dataset == dataset]
            # Also for a part without any: a judge may be collective.
            if run.method.judge_kind == "written":
                writer = judge.make_judge(run.config.judge, "written", renderer, asked)
                judged += judge.judge_written(writer, part)
            else:
                comparer = judge.make_judge(run.config.judge, "pairwise", renderer, asked)
                judged += compare(run, comparer, part)
    return judged


def measure_judge(run: Run) -> dict[str, float]:
    """How good the judge is on the recipe's ``judge_datasets``, unless it is the one that was
    measured last; collective.  The engine has to be synced before it is used again.

    Raises:
        ConfigError: none of the pairs could be judged, or the model does not answer as a judge.
        BudgetSpent: on all ranks, when the judge may not be asked any more.
    """
    who = run.config.judge
    if who is None or not run.judge_pairs:
        return {}
    version = 0
    if who.type == "self":
        version = run.version if who.model == "policy" else run.model.reference_version
    if run.judge_measured == version:
        return {}
    run.tracker.phase("judge")
    if who.type == "self":
        ask(run, partial(wake, run))
    run.judge_measured = version
    seen = ask(run, partial(_compare_known, run, who))
    everything = [x for part in ranks.gather(seen) for x in part]
    found = quality(
        [verdict for verdict, _ in everything],
        [lengths for _, lengths in everything],
        tie=who.tie_threshold,
        # Intervals are not shown here.
        draws=1,
    )
    if not found.pairs:
        raise ConfigError(
            f"judge_datasets: none of {len(everything)} pairs could be judged: {found.too_long} "
            f"too long for the judge, {found.failed} without an answer"
        )
    figures = found.figures()
    check_decision_mass(who, "judge", figures.get("mass", 1.0))
    shown = "  ".join(f"{k} {figures[k]:.3f}" for k in SHOWN_OF_JUDGE if k in figures)
    run.tracker.say(f"judge on {found.pairs} of {len(everything)} pairs: {shown}")
    if run.rank == 0:
        _keep_quality(run, version, found)
    return {f"judge_quality/{name}": value for name, value in figures.items()}


def _keep_quality(run: Run, version: int, found: Quality) -> None:
    """What the figures of a judge leave out, for those who read of the run."""
    folder = Path(run.config.output_dir, "judge-quality")
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"version": version, "figures": found.figures(), "calibration": found.calibration}
    (folder / f"{version}.json").write_text(json.dumps(plain(facts)), encoding="utf-8")


def _compare_known(run: Run, who: JudgeConfig) -> list[tuple[Verdict, tuple[int, int]]]:
    """This rank's share of the ``judge_datasets``: the judge's verdict of each pair, and the
    lengths of its answers."""
    mine = run.judge_pairs[run.rank :: run.world_size]
    seen: list[tuple[Verdict, tuple[int, int]]] = []
    with awake_judge(run, "judge") as asked:
        for dataset, renderer in enumerate(run.renderers):
            pairs = [
                judge.Pair(r.prompt, r.chosen or "", r.rejected or "", r.tools)
                for r in mine
                if r.dataset == dataset
            ]
            comparer = judge.make_judge(who, "pairwise", renderer, asked)
            verdicts = compare_blind(comparer, pairs, run.config.seed)
            lengths = [(len(pair.a), len(pair.b)) for pair in pairs]
            seen += zip(verdicts, lengths, strict=True)
    return seen


def compare(run: Run, judging: judge.PairwiseJudge, episodes: list[Episode]) -> list[Episode]:
    """Episodes with the verdicts of the matches that the method asks for."""
    if run.method.compares == "all":
        return judge.judge_pairs(judging, episodes)
    assert run.config.online is not None
    contests = [tournament.Contest(e.prompt, e.texts, e.tools, e.index) for e in episodes]
    brackets = tournament.play(
        judging, contests, run.config.seed, max_entrants=run.config.online.num_generations
    )
    return [
        replace(
            episode,
            matches=tuple((m.a, m.b) for part in bracket.rounds for m in part),
            verdicts=tuple(m.verdict for part in bracket.rounds for m in part),
            winner=bracket.winner,
        )
        for episode, bracket in zip(episodes, brackets, strict=True)
    ]


@contextlib.contextmanager
def awake_judge(
    run: Run, key: Literal["judge", "eval_judge"]
) -> Iterator[Endpoint | judge.JudgeModel | None]:
    """Whom the judge of a section asks, ready to answer; the policy's engine has to be synced
    before it is used again."""
    who = getattr(run.config, key)
    asked = run.asked.get(key)
    if who.type == "self":
        kind = run.method.judge_kind if key == "judge" else "pairwise"
        yield _trained_model(run, who, writes=kind == "written")
    elif isinstance(asked, judge.JudgeModel):
        assert run.engine is not None
        run.engine.sleep()
        asked.engine.wake()
        yield asked
        asked.engine.sleep()
    else:
        yield asked


def _trained_model(run: Run, who: JudgeConfig, writes: bool) -> judge.JudgeModel:
    """The current policy or the frozen start of the run as judge: through the rollout engine where
    that holds its weights.  Under full fine-tuning only the trainer has those of the start, which
    it reads log-probs from itself; to write, the engine takes them until the next sync."""
    model, engine = run.model, run.engine
    assert engine is not None
    if who.model == "policy":
        return judge.JudgeModel(engine, adapter=POLICY if model.uses_adapter else None)
    if model.reference_engine is None:
        return judge.JudgeModel(engine, adapter=model.reference_adapter_name)
    if not writes:
        return judge.JudgeModel(engine, scorer=ReferenceScorer(model))
    run.synced = None
    names = frozenset(model.named_weights())
    with contextlib.closing(model.iter_reference_weights(model.dtype)) as weights:
        engine.load_weights(weights, names, run.version)
    return judge.JudgeModel(engine)


def check_decision_mass(who: JudgeConfig, key: str, mass: float) -> None:
    """Refuse a model as judge that does not answer with its decision tokens."""
    if who.type != "rule" and mass < who.min_decision_mass:
        raise ConfigError(
            f"the {key} puts P(A) + P(B) = {mass:.2f} on its decision tokens, less than "
            f"{key}.min_decision_mass = {who.min_decision_mass}: train it with method: jsft first"
        )


def sampler_gap(run: Run, episodes: Sequence[Episode]) -> tuple[float, float]:
    """Drift between the sampler's log-probs and the trainer's on a few fresh rollouts.

    A figure to watch, no proof of a sync: a few missed small steps do not move it.
    """
    rollouts = [(e, r) for e in episodes for r in e.rollouts if len(r.token_ids)][:4]
    examples = [
        Example((Stream.of("gap", e.asked_ids, r.token_ids),), 1.0, e.source) for e, r in rollouts
    ]
    if not examples:
        # Every rank takes part in the forward pass, also one that sampled nothing but silence.
        ids = np.array([0, 1], dtype=np.int32)
        examples = [Example((Stream.of("gap", ids[:1], ids[1:]),), 0.0, "")]
    batch = make_batch(examples).to(run.model.device)
    run.model.engine.eval()
    with torch.no_grad():
        logprob, _ = run.model.engine(batch)
    run.model.engine.train()
    if not rollouts:
        return 0.0, 0.0
    return drift([r.logprobs for _, r in rollouts], logprob.float().cpu().numpy())


@contextlib.contextmanager
def _prefix_cached(figures: dict[str, float], name: str, engine: RolloutEngine) -> Iterator[None]:
    """The share of the prompt tokens of all ranks that engines did not compute anew; collective."""
    before = replace(engine.prompt_tokens)
    yield
    now = engine.prompt_tokens
    mine = (now.total - before.total, now.cached - before.cached)
    total, cached = np.sum(ranks.gather([mine]), axis=(0, 1))
    if total:
        figures[name] = cached / total


@contextlib.contextmanager
def _timed(timings: dict[str, float], name: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    timings[name] = time.monotonic() - started


class ReferenceScorer:
    """Next-token log-probs by the trainer's frozen second set of weights (full fine-tuning).

    Called with (prompts, token_ids) -> float32 [len(prompts), len(token_ids)]; collective, for
    under ZeRO-3 every rank takes part in every forward pass.
    """

    # Prompts in one forward pass: a count, not a token budget, so that ranks agree on it.
    PROMPTS = 16

    def __init__(self, model: TrainedModel) -> None:
        self.model = model

    def __call__(self, prompts: Sequence[np.ndarray], token_ids: Sequence[int]) -> np.ndarray:
        counts = ranks.gather(len(prompts))
        filler = np.zeros(1, dtype=np.int32)
        padded = [*prompts, *([filler] * (max(counts) - len(prompts)))]
        chunks = [
            self._score(padded[i : i + self.PROMPTS], token_ids)
            for i in range(0, len(padded), self.PROMPTS)
        ]
        empty = np.zeros((0, len(token_ids)), dtype=np.float32)
        return np.concatenate([empty, *chunks])[: len(prompts)]

    def _score(self, prompts: Sequence[np.ndarray], token_ids: Sequence[int]) -> np.ndarray:
        """One row of hidden states for each prompt, scored against every candidate."""
        first = np.array(token_ids[:1], dtype=np.int32)
        batch = make_batch(
            [Example((Stream.of("judge", p, first),), 1.0, "judge") for p in prompts]
        ).to(self.model.device)
        batch = replace(
            batch,
            rows=batch.rows.repeat_interleave(len(token_ids)),
            targets=batch.targets.new_tensor(token_ids).repeat(len(prompts)),
        )
        with self.model.reference() as forward:
            logprob, _ = forward(batch)
        return logprob.float().cpu().numpy().reshape(len(prompts), len(token_ids))
