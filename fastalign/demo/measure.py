"""What the demo measures before and after: answers to held-out prompts, token by token.

Run as ``python -m fastalign.demo.measure TASK.json OUT.json``, in a process of its own, so that
the engine's memory is back before training starts.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastalign.batch import make_batch
from fastalign.config import DatasetConfig, JudgeConfig, ModelConfig, RolloutConfig
from fastalign.data import Example, Stream, load_records
from fastalign.demo.rules import SPANS, WRITTEN
from fastalign.episodes import sampling_seed
from fastalign.judge import JudgeModel, Pair, PairwiseJudge, SelfPairwiseJudge
from fastalign.judge_quality import compare_blind, plain, quality
from fastalign.logprobs import Policy, check_packing, probe_batch
from fastalign.model import resolve_dtype
from fastalign.rollout import RolloutEngine, SamplingSettings, ServedModel, make_engine
from fastalign.templates import Renderer
from fastalign.tournament import Contest, play, tally

MAX_NEW_TOKENS = 96
MAX_LENGTH = 1024


def make_measuring_engine(model: str, lora_rank: int | None) -> RolloutEngine:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return make_engine(
        ServedModel(
            model,
            dtype=resolve_dtype(ModelConfig(model_name_or_path=model), device),
            device=device,
            max_model_len=MAX_LENGTH,
            lora_rank=lora_rank,
        ),
        RolloutConfig(max_num_seqs=128),
    )


def load_adapter(engine: RolloutEngine, name: str, folder: str) -> None:
    config = json.loads(Path(folder, "adapter_config.json").read_text(encoding="utf-8"))
    engine.load_adapter(name, load_file(Path(folder, "adapter_model.safetensors")), config, 1)


def answers(
    engine: RolloutEngine,
    renderer: Renderer,
    prompts: Sequence[str],
    adapter: str | None,
    seed: int,
    samples: int = 1,
) -> list[list[str]]:
    """``samples`` answers to each prompt at temperature 0.7, whatever the rollouts had."""
    ids = [renderer.prompt_ids(_messages(p)) for p in prompts]
    rollouts = engine.generate(
        [x for x in ids for _ in range(samples)],
        SamplingSettings(
            max_new_tokens=MAX_NEW_TOKENS,
            temperature=0.7,
            stop_token_ids=tuple(sorted(renderer.eos_ids)),
        ),
        [sampling_seed(seed, 0, i, k) for i in range(len(ids)) for k in range(samples)],
        adapter,
    )
    texts = [renderer.decode(r.token_ids) for r in rollouts]
    return [texts[i * samples : (i + 1) * samples] for i in range(len(prompts))]


def answer_metrics(kind: str, texts: Sequence[str], renderer: Renderer) -> dict[str, Any]:
    """Per-prompt values, so that pairs of runs can be compared prompt by prompt; lengths in
    tokens, with and without the rule's spans."""

    def tokens(text: str) -> int:
        return len(renderer.tokenizer(text, add_special_tokens=False).input_ids)

    def without_spans(text: str) -> str:
        for start, end in reversed(SPANS[kind](text)):
            text = text[:start] + text[end:]
        return text

    return {
        "flagged": [float(bool(SPANS[kind](t))) for t in texts],
        "length": [tokens(t) for t in texts],
        "length_without_spans": [tokens(without_spans(t)) for t in texts],
        "empty": [float(not t.strip()) for t in texts],
    }


def _messages(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


class Scorer:
    """Teacher-forced log-probs of a model with or without an adapter."""

    def __init__(self, model: str, adapter: str | None) -> None:
        config = ModelConfig(model_name_or_path=model)
        dtype = resolve_dtype(config, torch.device("cpu"))
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
        if adapter is not None:
            loaded = PeftModel.from_pretrained(loaded, adapter)
        self.policy = Policy(loaded).eval()
        probe = probe_batch(loaded.config.vocab_size, (37, 52), torch.device("cpu"))
        check_packing(self.policy, self.policy, probe)

    @torch.no_grad()
    def __call__(self, streams: Sequence[Stream]) -> list[np.ndarray]:
        """log p of each stream's targets, float32 [targets]."""
        out: list[np.ndarray] = []
        for start in range(0, len(streams), 16):
            batch = make_batch([Example((s,), 1.0, "measure") for s in streams[start : start + 16]])
            logprob, _ = self.policy(batch)
            bounds = batch.cu_rows.tolist()
            values = logprob.float().numpy()
            out += [values[a:b] for a, b in itertools.pairwise(bounds)]
        return out


def reference_logprob(
    scorer: Scorer, renderer: Renderer, prompts: Sequence[str], texts: Sequence[str]
) -> list[float]:
    """Mean log-prob per token of untouched answers, one value for each prompt."""
    streams = [
        Stream.of("reference", *renderer.completion(_messages(p), t))
        for p, t in zip(prompts, texts, strict=True)
    ]
    return [float(v.mean()) for v in scorer(streams)]


def detection(
    scorer: Scorer,
    renderer: Renderer,
    kind: str,
    judge: Any,
    prompts: Sequence[str],
    texts: Sequence[str],
    lambda_: float,
) -> dict[str, float]:
    """How the tokens that CUT flags relate to the rule's spans, on answers that have any.

    onset_recall: share of spans whose first token is flagged; precision: share of flagged tokens
    inside spans, the end of the turn counted among those outside; base_rate: share of the text's
    tokens inside spans.
    """
    plain, judged, spans = [], [], []
    for prompt, text in zip(prompts, texts, strict=True):
        found = SPANS[kind](text)
        if not found:
            continue
        messages = _messages(prompt)
        prompt_ids, ids = renderer.completion(messages, text)
        judgment = judge(messages, text)
        plain.append(Stream.of("plain", prompt_ids, ids))
        judged.append(Stream.of("judged", renderer.judged_prompt_ids(messages, judgment), ids))
        offsets = renderer.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True
        ).offset_mapping
        spans.append((found, offsets))
    onsets, hits, flagged, flagged_inside, inside_total, total = 0, 0, 0, 0, 0, 0
    for q, c, (found, offsets) in zip(scorer(plain), scorer(judged), spans, strict=True):
        flags = c - q > np.log(lambda_)
        flagged += int(flags.sum())
        flags = flags[: len(offsets)]  # without the end of the turn, which lies in no span
        inside = np.array([any(a < end and start < b for a, b in found) for start, end in offsets])
        for a, _ in found:
            first = next(i for i, (_, end) in enumerate(offsets) if end > a)
            onsets += 1
            hits += bool(first < len(flags) and flags[first])
        inside = inside[: len(flags)]
        flagged_inside += int((flags & inside).sum())
        inside_total += int(inside.sum())
        total += len(flags)
    return {
        "spans": onsets,
        "onset_recall": hits / max(onsets, 1),
        "precision": flagged_inside / max(flagged, 1),
        "base_rate": inside_total / max(total, 1),
    }


def judge_quality(
    judge: PairwiseJudge, kind: str, prompts: Sequence[str], pairs: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Accuracy against the rule on pairs that it can tell apart; flips and abstentions on all."""
    verdicts = judge.compare(
        [Pair(_messages(p), a, b) for p, (a, b) in zip(prompts, pairs, strict=True)]
    )
    clean = [[not SPANS[kind](t) for t in pair] for pair in pairs]
    decided = [
        (v.preferred == ("a" if ca else "b"))
        for v, (ca, cb) in zip(verdicts, clean, strict=True)
        if ca != cb
    ]
    return {
        "decided_pairs": len(decided),
        "accuracy": float(np.mean(decided)) if decided else float("nan"),
        "flipped": float(np.mean([v.flipped for v in verdicts])),
        "abstained": float(np.mean([v.preferred is None for v in verdicts])),
        "mass": float(np.mean([v.mass for v in verdicts])),
    }


def tournaments(
    judge: PairwiseJudge,
    kind: str,
    prompts: Sequence[str],
    drawn: Sequence[Sequence[str]],
    sizes: Sequence[int],
    renderer: Renderer,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """For each number of entrants N, of the winners among the first N answers to each prompt: what
    :func:`answer_metrics` says, whether all entrants are flagged, and how many matches tied."""
    results = {}
    for size in sizes:
        contests = [
            Contest(_messages(prompt), answers[:size], index=i)
            for i, (prompt, answers) in enumerate(zip(prompts, drawn, strict=True))
        ]
        brackets = play(judge, contests, seed)
        winners = [c.texts[b.winner] for c, b in zip(contests, brackets, strict=True)]
        results[str(size)] = {
            **answer_metrics(kind, winners, renderer),
            "all_flagged": [float(all(SPANS[kind](t) for t in c.texts)) for c in contests],
            "ties": tally(brackets).ties,
            "matches": tally(brackets).matches,
        }
    return results


def preferences(judge: PairwiseJudge, path: str, tie_threshold: float) -> dict[str, float]:
    """How good the judge is on the preference pairs of a file."""
    records, _ = load_records([DatasetConfig(path=path)], strict=True, seed=0, want="preference")
    pairs = [Pair(r.prompt, r.chosen or "", r.rejected or "") for r in records]
    verdicts = compare_blind(judge, pairs, seed=0)
    lengths = [(len(pair.a), len(pair.b)) for pair in pairs]
    return plain(quality(verdicts, lengths, tie=tie_threshold))


def main(task: dict[str, Any]) -> dict[str, Any]:
    """Measure one model, or an adapter on it.

    Keys of a task: model, adapter (optional), kind, prompts, seed; samples (default 1); references
    (untouched answers to score); detect_on (answers to look for spans in, or "own") with lambda;
    judge_pairs (answers to compare), tournaments (numbers of entrants) and preferences (a file of
    pairs), each with tie_threshold.
    """
    model, adapter = task["model"], task.get("adapter")
    kind, prompts = task["kind"], task["prompts"]
    renderer = Renderer(AutoTokenizer.from_pretrained(model))
    rank = json.loads(Path(adapter, "adapter_config.json").read_text())["r"] if adapter else None
    name = "measured" if adapter else None
    with _engine(model, rank) as engine:
        if adapter:
            load_adapter(engine, "measured", adapter)
        drawn = answers(engine, renderer, prompts, name, task["seed"], task.get("samples", 1))
        texts = [first for first, *_ in drawn]
        result: dict[str, Any] = {"texts": drawn, **answer_metrics(kind, texts, renderer)}
        if "tie_threshold" in task:
            judge = SelfPairwiseJudge(
                JudgeConfig(type="self", tie_threshold=task["tie_threshold"]),
                renderer,
                JudgeModel(engine, adapter=name).next_logprobs,
                engine.max_model_len - 1,
            )
        if "judge_pairs" in task:
            result["judge"] = judge_quality(judge, kind, prompts, task["judge_pairs"])
        if "tournaments" in task:
            result["tournaments"] = tournaments(
                judge, kind, prompts, drawn, task["tournaments"], renderer, task["seed"]
            )
        if "preferences" in task:
            result["preferences"] = preferences(judge, task["preferences"], task["tie_threshold"])
    if "references" in task:
        scorer = Scorer(model, adapter)
        result["reference_logprob"] = reference_logprob(
            scorer, renderer, prompts, task["references"]
        )
        if "detect_on" in task:
            answered = texts if task["detect_on"] == "own" else task["detect_on"]
            result["detection"] = detection(
                scorer, renderer, kind, WRITTEN[kind], prompts, answered, task["lambda"]
            )
    return result


@contextmanager
def _engine(model: str, lora_rank: int | None) -> Iterator[RolloutEngine]:
    engine = make_measuring_engine(model, lora_rank)
    try:
        yield engine
    finally:
        engine.close()


if __name__ == "__main__":
    source, target = sys.argv[1:3]
    outcome = main(json.loads(Path(source).read_text(encoding="utf-8")))
    Path(target).write_text(json.dumps(outcome), encoding="utf-8")
