"""A SELF-JUDGE step of `fastalign train` against one with generate() and padded forward passes.

    python bench/self_judge_step.py PROMPTS [--sides embedded vllm plain alone] [--output FILE]

A step samples two answers to each of 8 prompts (temperature 1, top-p 0.9), has the start of the run
judge each pair in both orders, and updates the policy by DPO, with the start as reference: LoRA of
rank 8 on all linear layers, bf16.  Every answer has 128 tokens, whatever ends a turn, so that all
sides do the same work; every pair is decided.  `embedded` and `vllm` are `fastalign train` with
either engine.  `plain` is transformers and PEFT: generate(), one forward pass over the padded
questions (logits of their last tokens), and logits of all positions of the padded pairs in fp32,
for the reference and for the policy.  `alone` has generate() and the embedded engine sample the
same answers in turns, in one process.

Prompts are the first of at most 256 tokens (hh-rlhf's harmless-base), others in each step
and the same on all sides; the answers, and so the questions to the judge, are each side's own.
Every other side has a process of its own.  Reported are the median step and its parts, and the peak
of resident memory (on a GPU: of what torch allocated).

The floor, with N parameters of the body and V x D of the head, for prompts of P tokens and 16
answers of 128: sampling makes 128 passes that read the weights, 2 (N + V D) bytes each in bf16, for
16 rows, 2 (N + V D) operations each; judging 16 questions, 2 N a token, the prompt and one order's
first answer shared at best; reference and policy, 2 N and 4 N a token and 2 V D and 4 V D a row,
prompts once for both answers: 8 (P + 256) tokens and 2048 rows.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import steps
import torch
from racing import DEVICE, synchronise
from steps import WARMUP_STEPS, Row, say
from torch.nn import functional as F

RESULT = "self-judge-step.json"
SAMPLES, RANK, LONGEST_PROMPT = 2, 8, 256
TEMPERATURE, TOP_P, BETA = 1.0, 0.9, 0.1
LEARNING_RATE = 1e-5
PARTS = ("rollout", "judge", "sync", "reference", "policy")
VERDICTS = (" A", " B")


def prepare(source: str, folder: Path, model: str, count: int) -> dict[str, Any]:
    """The first prompts that are short enough; what a task says of them."""
    import transformers

    from fastalign.config import DatasetConfig
    from fastalign.data import load_records
    from fastalign.templates import Renderer

    renderer = Renderer(transformers.AutoTokenizer.from_pretrained(model))
    records, _ = load_records([DatasetConfig(path=source)], strict=False, seed=0, want="prompt")
    messages = [[{k: m[k] for k in ("role", "content")} for m in r.prompt] for r in records]
    prompts = [m for m in messages if len(renderer.prompt_ids(m)) <= LONGEST_PROMPT][:count]
    if len(prompts) < count:
        sys.exit(f"{source}: {len(prompts)} prompts of at most {LONGEST_PROMPT} tokens of {count}")
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts), encoding="utf-8")
    return {"data": str(path)}


# ------------------------------------------------------------------------------------- fastalign


def embedded_steps(task: dict[str, Any]) -> Row:
    return fastalign_steps(task, "hf")


def vllm_steps(task: dict[str, Any]) -> Row:
    return fastalign_steps(task, "vllm")


def fastalign_steps(task: dict[str, Any], engine: str) -> Row:
    from dataclasses import replace

    from fastalign import online

    settings = online.sampling_settings
    recipe = {
        "method": "dpo",
        "model_name_or_path": task["model"],
        "datasets": [{"path": task["data"]}],
        "output_dir": task["output_dir"],
        "shuffle": False,
        "online": {"prompts_per_iteration": task["prompts"], "num_generations": SAMPLES},
        # A model that was never taught to judge has no opinion; the work is that of one that was.
        "judge": {"type": "self", "tie_threshold": 0.0, "min_decision_mass": 0.0},
        "rollout": {"engine": engine},
        "temperature": TEMPERATURE,
        "top_p": TOP_P,
        "beta": BETA,
        "max_completion_length": task["new"],
        "max_length": LONGEST_PROMPT + task["new"],
        "use_peft": True,
        "lora_r": RANK,
        "lora_alpha": 2 * RANK,
        "dtype": task["dtype"],
        "global_batch_size": task["prompts"],
        "micro_batch_tokens": 4096,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "report_to": [],
    }

    # Nothing ends an answer but its length.
    def forced(run: Any) -> Any:
        return replace(settings(run), stop_token_ids=())

    with patch.object(online, "sampling_settings", forced):
        found = steps.train_steps(recipe)
    parts = []
    for row in found["logged"]:
        assert row["rollout/mean_length"] == task["new"], f"{row['rollout/mean_length']} tokens"
        assert row["rollout/examples"] == task["prompts"], f"{row['rollout/examples']} pairs"
        part = {name: row[f"time/{name}"] for name in ("rollout", "judge", "sync", "reference")}
        parts.append(part | {"policy": row["time/step"] - row["time/reference"]})
    return {
        "seconds": found["seconds"],
        "parts": parts,
        "losses": [row["loss"] for row in found["logged"]],
        "version": importlib.metadata.version("fastalign"),
    }


# ----------------------------------------------------------------------------------------- plain


def plain_steps(task: dict[str, Any]) -> Row:
    torch.manual_seed(0)
    words = make_renderer(task)
    model = steps.plain_model(task, RANK, "all-linear")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    rows = [
        json.loads(line)["prompt"] for line in Path(task["data"]).read_text("utf-8").splitlines()
    ]
    found: Row = {"seconds": [], "parts": [], "losses": []}
    for first in range(0, len(rows), task["prompts"]):
        messages = rows[first : first + task["prompts"]]
        clock = Clock()
        answers = generate(model, [words.prompt_ids(m).tolist() for m in messages], task["new"])
        clock.lap("rollout")
        preferred = judge(model, words, messages, answers)
        clock.lap("judge")
        pairs = [answers[2 * i + best] for i, best in enumerate(preferred)]
        pairs += [answers[2 * i + 1 - best] for i, best in enumerate(preferred)]
        prompts = [words.prompt_ids(m).tolist() for m in messages] * 2
        with torch.no_grad(), model.disable_adapter():
            reference = sequence_logprobs(model, prompts, pairs)
        clock.lap("reference")
        policy = sequence_logprobs(model, prompts, pairs)
        chosen, rejected = (policy - reference).chunk(2)
        loss = -F.logsigmoid(BETA * (chosen - rejected)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.lap("policy")
        found["seconds"].append(sum(clock.parts.values()))
        found["parts"].append(clock.parts)
        found["losses"].append(loss.item())
        say(f"plain: step {len(found['seconds'])}, {found['seconds'][-1]:.1f} s")
    return found | {"version": importlib.metadata.version("transformers")}


class Clock:
    """Seconds of consecutive parts."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        self._mark = time.perf_counter()

    def lap(self, part: str) -> None:
        synchronise()
        now = time.perf_counter()
        self.parts[part], self._mark = now - self._mark, now


def make_renderer(task: dict[str, Any]) -> Any:
    import transformers

    from fastalign.templates import Renderer

    return Renderer(transformers.AutoTokenizer.from_pretrained(task["model"]))


def generate(model: Any, prompts: list[list[int]], new: int) -> list[list[int]]:
    """Two answers to each prompt, side by side, of ``new`` tokens each."""
    ids, mask = steps.padded([p for p in prompts for _ in range(SAMPLES)], left=True)
    model.eval()
    with torch.no_grad():
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            temperature=TEMPERATURE,
            top_p=TOP_P,
            top_k=0,
            min_new_tokens=new,
            max_new_tokens=new,
            pad_token_id=0,
        )
    model.train()
    return out[:, ids.shape[1] :].tolist()


def judge(model: Any, words: Any, messages: list[Any], answers: list[list[int]]) -> list[int]:
    """Which answer of each pair, 0 or 1, the start of the run prefers, asked in both orders."""
    texts = [words.decode(answer) for answer in answers]
    asked = [
        words.judge_prompt_ids(m, texts[2 * i + k], texts[2 * i + 1 - k]).tolist()
        for i, m in enumerate(messages)
        for k in (0, 1)
    ]
    ids, mask = steps.padded(asked, left=True)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    model.eval()
    with torch.no_grad(), model.disable_adapter():
        logits = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=False,
            logits_to_keep=1,
        ).logits[:, -1]
    model.train()
    verdicts = logits.float().softmax(-1)[:, list(words.decision_ids(VERDICTS))]
    orders = verdicts.reshape(-1, 2, 2)
    score_a, score_b = (orders[:, 0, s] + orders[:, 1, 1 - s] for s in (0, 1))
    return (score_b > score_a).long().tolist()


def sequence_logprobs(
    model: Any, prompts: list[list[int]], answers: list[list[int]]
) -> torch.Tensor:
    """[B]: sums of the log-probs of the answers' tokens."""
    ids, mask = steps.padded([p + a for p, a in zip(prompts, answers, strict=True)])
    targets = mask[:, 1:].clone()
    for row, prompt in enumerate(prompts):
        targets[row, : len(prompt) - 1] = 0
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
    logprob = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return (logprob * targets).sum(-1)


# ----------------------------------------------------------------------------------------- alone


def alone_steps(task: dict[str, Any]) -> Row:
    """The embedded engine and generate(), in turns, over the prompts of each step."""
    import numpy as np
    import peft

    from fastalign.config import RolloutConfig
    from fastalign.rollout import SamplingSettings, ServedModel
    from fastalign.rollout.hf import HfEngine

    torch.manual_seed(0)
    words = make_renderer(task)
    model = steps.plain_model(task, RANK, "all-linear")
    engine = HfEngine(
        ServedModel(
            task["model"],
            dtype=getattr(torch, task["dtype"]),
            max_model_len=LONGEST_PROMPT + task["new"],
            device=DEVICE,
        ),
        RolloutConfig(engine="hf"),
    )
    adapter = {**model.peft_config["default"].to_dict(), "inference_mode": True}
    engine.load_adapter("policy", peft.get_peft_model_state_dict(model), adapter, 1)
    settings = SamplingSettings(task["new"], temperature=TEMPERATURE, top_p=TOP_P)
    rows = [
        json.loads(line)["prompt"] for line in Path(task["data"]).read_text("utf-8").splitlines()
    ]
    prompts = [words.prompt_ids(m) for m in rows]

    def ours(batch: list[Any]) -> int:
        asked = [np.asarray(p) for p in batch for _ in range(SAMPLES)]
        rollouts = engine.generate(asked, settings, list(range(len(asked))), "policy")
        return sum(len(r.token_ids) for r in rollouts)

    def theirs(batch: list[Any]) -> int:
        return sum(map(len, generate(model, [p.tolist() for p in batch], task["new"])))

    contestants: dict[str, Callable[[list[Any]], int]] = {"embedded": ours, "generate": theirs}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for first in range(0, len(prompts), task["prompts"]):
        batch = prompts[first : first + task["prompts"]]
        for name, sample in contestants.items():
            clock = Clock()
            tokens = sample(batch)
            clock.lap(name)
            assert tokens == len(batch) * SAMPLES * task["new"], f"{name}: {tokens} tokens"
            seconds[name] += clock.parts.values()
        say("alone: " + ", ".join(f"{name} {of[-1]:.1f} s" for name, of in seconds.items()))
    typical = {name: median(of[WARMUP_STEPS:]) for name, of in seconds.items()}
    tokens = task["prompts"] * SAMPLES * task["new"]
    return {
        "seconds": seconds["embedded"],
        "generate_seconds": seconds["generate"],
        "tokens_per_second": tokens / typical["embedded"],
        "generate_tokens_per_second": tokens / typical["generate"],
        "x_generate": typical["generate"] / typical["embedded"],
        "version": importlib.metadata.version("fastalign"),
    }


SIDES = {
    "embedded": embedded_steps,
    "vllm": vllm_steps,
    "plain": plain_steps,
    "alone": alone_steps,
}


# ----------------------------------------------------------------------------------- measurement


def measure(side: str, task: dict[str, Any]) -> Row:
    found = steps.alone(__file__, side, task)
    assert len(found["seconds"]) == task["steps"], f"{side}: {len(found['seconds'])} steps"
    row = {"side": side, **found, "median_step_s": median(found["seconds"][WARMUP_STEPS:])}
    parts = found.get("parts", [])[WARMUP_STEPS:]
    typical = {name: median(p[name] for p in parts) for name in PARTS if parts and name in parts[0]}
    return row | {"median_parts_s": typical}


def table(rows: list[Row]) -> str:
    lines = [
        f"| side | step, s | x plain | {', s | '.join(PARTS)}, s | peak GiB |",
        "| --- " * (len(PARTS) + 4) + "|",
    ]
    whole = {row["side"]: row for row in rows if row["side"] != "alone"}
    plain = whole.get("plain")
    for side, row in whole.items():
        step = row["median_step_s"]
        cells = [
            f"{side} ({row['version']})",
            f"{step:.1f}",
            f"{plain['median_step_s'] / step:.2f}" if plain and side != "plain" else "",
            *(
                f"{row['median_parts_s'][p]:.1f}" if p in row["median_parts_s"] else ""
                for p in PARTS
            ),
            f"{row['peak_gib']:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    for row in rows:
        if row["side"] == "alone":
            lines += [
                "",
                f"sampling alone: {row['tokens_per_second']:.0f} tokens/s, generate() "
                f"{row['generate_tokens_per_second']:.0f}: {row['x_generate']:.2f} times",
            ]
    return "\n".join(lines)


def main() -> None:
    parser = steps.parser(__doc__ or "", RESULT)
    parser.add_argument("prompts", help="prompts or dialogues, as hh-rlhf's harmless-base")
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--prompts-per-step", type=int, default=8)
    parser.add_argument("--new", type=int, default=128, help="tokens of each answer")
    parser.add_argument("--dtype", default="bfloat16")
    arguments = parser.parse_args()
    if arguments.steps < steps.LEAST_STEPS:
        parser.error(f"--steps {arguments.steps}: the first {WARMUP_STEPS} are not counted")
    settings = {
        "prompts": arguments.prompts_per_step,
        "new": arguments.new,
        "steps": arguments.steps,
        "dtype": arguments.dtype,
    }
    report = steps.Report("self_judge_step", arguments.output, settings, arguments.again)
    model = steps.model_folder(arguments.model)
    with tempfile.TemporaryDirectory(prefix="fastalign-") as folder:
        count = arguments.steps * arguments.prompts_per_step
        data = prepare(arguments.prompts, Path(folder), model, count)
        for side in arguments.sides:
            if report.lacks(side=side):
                report.add(measure(side, {**data, **settings, "model": model}))
            print(table(report.rows), flush=True)


if __name__ == "__main__":
    steps.start(SIDES, main)
