"""A CUT step of `fastalign train` against one in plain torch and transformers, and its own body.

    python bench/cut_step.py JUDGED [--longest 512 2048] [--dtypes ...] [--sides ...] [--output F]

Batches of 4 criticised records (Shepherd's) whose longer stream has at most 512
tokens; for 2048, more than any record has, consecutive records are joined while they fit.  LoRA of
rank 16 on the MLP's projections, published offline settings (lambda 1.2, alpha 0.5, no dynamic
weight, mean over tokens).  The plain side does what the published code does: both streams padded in
one batch, logits of all positions in fp32, a softmax of them and its logarithm, and unlikelihood
where the softmaxes' ratio exceeds lambda; in batches of --plain-records, whose gradients add up.

Before anything is measured both sides give their loss on the same records in fp32 from the same
weights, which must agree, as must the tokens that they flag.

`recomputed` is our side with gradient_checkpointing, less memory for a third more work; `compiled`
is it with torch_compile, which compiles in the first steps; `profiled` is it in torch's profiler,
which tells the seconds of the operations that take longest in the last step.  After each step but
profiled ones our side runs the same packs through the body alone, forward and backward to the
adapter, without head, loss and optimizer: `body` is its share of the step's time.  Tokens are those
that enter the step, a prompt counting once for each stream, however often it is computed.  Each
side has a process of its own; reported are tokens/s over the steps behind the first two, the median
step, and the peak of resident memory (on a GPU: of what torch allocated).

The floor of a step, with N parameters of the body and V x D of the head, for T tokens of which M
carry a loss: forward, and backward to the inputs, 2 x 2 N T for frozen weights, and the same
2 x 2 V D M in the head; prompts that both streams begin with make T smaller.  Bytes: the weights
twice for each pack, 2 x 2 (N + V D) in bf16, a hundredth of the operations' time.  The plain side
multiplies 8 L rows by both, L the longest stream of a batch, and keeps several 8 L V tensors.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import steps
import torch
from racing import DEVICE, synchronise
from steps import WARMUP_STEPS, Row, say
from torch.nn import functional as F

RESULT = "cut-step.json"
RECORDS, RANK = 4, 16
LONGEST_ALONE = 512
MODULES = ["gate_proj", "up_proj", "down_proj"]
LAMBDA, ALPHA = 1.2, 0.5
LEARNING_RATE = 1e-5
# Of losses in fp32, whose terms are added in other orders; and how close to lambda a token's ratio
# is where the sides may flag it otherwise.
AGREE, BORDER = 1e-4, 1e-3


# -------------------------------------------------------------------------------------- the data


def prepare(source: str, folder: Path, model: str, longest: int, count: int) -> dict[str, Any]:
    """The first criticised records that fit, as rows and as tokens (plain prompt, judged prompt,
    answer); what a task says of them."""
    import transformers

    from fastalign.config import DatasetConfig
    from fastalign.data import load_records
    from fastalign.templates import Renderer

    renderer = Renderer(transformers.AutoTokenizer.from_pretrained(model))
    records, _ = load_records([DatasetConfig(path=source)], strict=False, seed=0, want="judged")

    def tokens(row: Row) -> list[list[int]]:
        parts = renderer.judged_completion(row["prompt"], row["completion"], row["judgment"])
        return [part.tolist() for part in parts]

    def fits(row: Row) -> bool:
        plain, judged, answer = map(len, tokens(row))
        return max(plain, judged) + answer <= longest

    negative = [
        {
            "prompt": [{k: m[k] for k in ("role", "content")} for m in record.prompt],
            "completion": record.completion,
            "judgment": record.judgment,
        }
        for record in records
        if record.judgment is not None
    ]
    rows: list[Row] = []
    open_row = None
    for row in filter(fits, negative):
        if longest <= LONGEST_ALONE:
            rows.append(row)
        elif open_row is not None and fits(joined := _joined(open_row, row)):
            open_row = joined
        else:
            rows += [open_row] if open_row is not None else []
            open_row = row
        if len(rows) == count:
            break
    if len(rows) < count:
        sys.exit(f"{source}: {len(rows)} records of at most {longest} tokens, {count} are needed")
    found = [tokens(row) for row in rows]
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "records.jsonl").write_text(text, encoding="utf-8")
    (folder / "tokens.json").write_text(json.dumps(found), encoding="utf-8")
    entering = [len(p) + len(j) + 2 * len(a) for p, j, a in found]
    return {
        "records": str(folder / "records.jsonl"),
        "tokens": str(folder / "tokens.json"),
        "entering": [sum(entering[i : i + RECORDS]) for i in range(0, count, RECORDS)],
    }


def _joined(a: Row, b: Row) -> Row:
    """Two records as one: one turn that asks for both."""
    *before, last = a["prompt"]
    content = last["content"] + "\n\n" + b["prompt"][-1]["content"]
    return {
        "prompt": [*before, {**last, "content": content}],
        **{key: f"{a[key]}\n\n{b[key]}" for key in ("completion", "judgment")},
    }


# ----------------------------------------------------------------------------------------- sides


def recipe(task: dict[str, Any]) -> dict[str, Any]:
    return {
        "method": "cut",
        "model_name_or_path": task["model"],
        "datasets": [{"path": task["records"]}],
        "output_dir": task["output_dir"],
        "shuffle": False,
        "cut": {"preset": "reference", "lambda": LAMBDA, "alpha": ALPHA},
        "normalization": "token",
        "use_peft": True,
        "lora_r": RANK,
        "lora_target_modules": MODULES,
        "dtype": task["dtype"],
        "global_batch_size": RECORDS,
        "micro_batch_tokens": task["micro_batch_tokens"],
        "max_length": task["longest"],
        "max_steps": task["steps"],
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "report_to": [],
    }


def recomputed_steps(task: dict[str, Any]) -> Row:
    return fastalign_steps(task, gradient_checkpointing=True)


def compiled_steps(task: dict[str, Any]) -> Row:
    return fastalign_steps(task, torch_compile=True)


def fastalign_steps(task: dict[str, Any], **keys: Any) -> Row:
    found = steps.train_steps(recipe(task) | keys, beside=body_seconds)
    return {
        "seconds": found["seconds"],
        "body_seconds": found["beside"],
        "losses": [row["loss"] for row in found["logged"]],
        "version": importlib.metadata.version("fastalign"),
    }


def profiled_steps(task: dict[str, Any]) -> Row:
    profile = {"profile": {"steps": 1, "skip": task["steps"] - 1}}
    found = steps.train_steps(recipe(task) | profile)
    table = Path(task["output_dir"], "profile", "table-0.txt").read_text(encoding="utf-8")
    operations = {}
    for line in table.splitlines():
        # Name, share of the time in the operation itself, that time, ...
        name, *cells = re.split(r"  +", line.strip())
        if len(cells) > 2 and (told := re.fullmatch(r"([\d.]+)(s|ms|us)", cells[1])):
            operations[name] = float(told[1]) * {"s": 1.0, "ms": 1e-3, "us": 1e-6}[told[2]]
    return {
        "seconds": found["seconds"],
        "operations": dict(list(operations.items())[:12]),
        "version": importlib.metadata.version("fastalign"),
    }


def body_seconds(run: Any, examples: Any) -> float:
    """The packs of a step through the body: forward, and backward to the adapter's weights."""
    from fastalign.batch import plan_batches

    trained = [p for p in run.model.policy.parameters() if p.requires_grad]
    start = time.perf_counter()
    cost = run.operations.cost(run.method.needs_reference)
    budget, shares = run.config.micro_batch_tokens, run.model.shares_prefixes
    for pack in plan_batches(examples, budget, 0, 1, cost, share_prefixes=shares):
        hidden = run.model.policy(pack.to(run.model.device), probe="hidden")
        torch.autograd.grad(hidden, trained, torch.ones_like(hidden))
    synchronise()
    return time.perf_counter() - start


def plain_steps(task: dict[str, Any]) -> Row:
    torch.manual_seed(0)
    model = steps.plain_model(task, RANK, MODULES)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    records = json.loads(Path(task["tokens"]).read_text(encoding="utf-8"))
    seconds, losses = [], []
    for first in range(0, len(records), RECORDS):
        start = time.perf_counter()
        batch = records[first : first + RECORDS]
        targets = sum(len(answer) for _, _, answer in batch)
        total = 0.0
        for i in range(0, RECORDS, task["plain_records"]):
            summed, _ = plain_loss(model, batch[i : i + task["plain_records"]])
            (summed / targets).backward()
            total += summed.item() / targets
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        synchronise()
        seconds.append(time.perf_counter() - start)
        losses.append(total)
        say(f"plain: step {len(seconds)}/{task['steps']}, {seconds[-1]:.1f} s")
    version = importlib.metadata.version("transformers")
    return {"seconds": seconds, "losses": losses, "version": version}


def plain_loss(
    model: Any, records: list[list[list[int]]], flagged: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss summed over the tokens of the answers; c / q of each of these tokens).

    CUT (arXiv 2312.14591) as the authors' code has it: half of Align-N and of Misalign, without
    c^gamma.  ``flagged``: the inappropriate tokens, where another has chosen them.
    """
    streams = [judged + answer for _, judged, answer in records]
    streams += [plain + answer for plain, _, answer in records]
    ids, mask = steps.padded(streams)
    labels = torch.full_like(ids, -100)
    for row, stream in enumerate(streams):
        answer = len(records[row % len(records)][2])
        labels[row, len(stream) - answer : len(stream)] = ids[
            row, len(stream) - answer : len(stream)
        ]
    labels = labels[:, 1:]
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
    judged, plain = logits[:, :-1].softmax(-1).chunk(2)
    judged_labels, plain_labels = labels.chunk(2)
    align = F.nll_loss(
        judged.log().flatten(0, 1), judged_labels.flatten(), ignore_index=-100, reduction="sum"
    )
    c = judged.gather(-1, judged_labels.clamp(min=0)[..., None])[judged_labels != -100][:, 0]
    q = plain.gather(-1, plain_labels.clamp(min=0)[..., None])[plain_labels != -100][:, 0]
    ratio = (c / q).detach()
    if flagged is None:
        flagged = ratio > LAMBDA
    likely = torch.where(flagged, 1 - q, q)
    likely = torch.where(likely == 0, 1e-5, likely).log()
    misalign = -torch.where(flagged, ALPHA * likely, likely).sum()
    return (align + misalign) / 2, ratio


def both_losses(task: dict[str, Any]) -> Row:
    """The loss of the first batch by both sides, from the weights as they are."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fastalign.batch import make_batch
    from fastalign.config import parse_config
    from fastalign.data import load_records
    from fastalign.logprobs import Policy, check_packing, check_sharing, probe_batch, probe_streams
    from fastalign.methods.cut import Cut
    from fastalign.templates import Renderer

    model = AutoModelForCausalLM.from_pretrained(task["model"], dtype=torch.float32).to(DEVICE)
    texts = json.loads(Path(task["tokens"]).read_text(encoding="utf-8"))[:RECORDS]
    targets = sum(len(answer) for _, _, answer in texts)
    with torch.no_grad():
        ratios = [plain_loss(model, [record])[1] for record in texts]
    attention = model.config._attn_implementation
    config = parse_config(recipe(task))
    method = Cut(config)
    renderer = Renderer(AutoTokenizer.from_pretrained(task["model"]))
    records, _ = load_records(list(config.datasets), strict=True, seed=0, want="judged")
    examples = [e for r in records[:RECORDS] for e in method.from_record(r, renderer)]
    policy, size = Policy(model), model.config.vocab_size
    for refused in (
        check_packing(policy, policy, probe_batch(size, (7, 12), DEVICE)),
        check_sharing(policy, policy, probe_streams(size, 9, (5, 8))),
    ):
        assert refused is None, refused
    with torch.no_grad():
        packs = [make_batch([example], share_prefixes=True).to(DEVICE) for example in examples]
        results = []
        for pack in packs:
            logprob, log1m_prob = policy(pack)
            results.append(method.contrast(logprob, log1m_prob, pack)[0])
    chosen = [result.flagged.bool() for result in results]
    model.set_attn_implementation(attention)
    with torch.no_grad():
        given = [plain_loss(model, [r], own)[0] for r, own in zip(texts, chosen, strict=True)]
    ours = sum(result.loss.item() for result in results) / targets
    plain = sum(loss.item() for loss in given) / targets
    ratio, flagged = torch.cat(ratios), torch.cat(chosen)
    differ = flagged != (ratio > LAMBDA)
    border = (ratio / LAMBDA - 1).abs() < BORDER
    return {
        "fastalign_loss": ours,
        "plain_loss": plain,
        "tokens": targets,
        "flagged": int(flagged.sum()),
        "flagged_otherwise": int(differ.sum()),
        "agree": abs(ours / plain - 1) <= AGREE and not bool((differ & ~border).any()),
    }


SIDES = {
    "check": both_losses,
    "fastalign": fastalign_steps,
    "recomputed": recomputed_steps,
    "compiled": compiled_steps,
    "profiled": profiled_steps,
    "plain": plain_steps,
}


# ----------------------------------------------------------------------------------- measurement


def measure(side: str, task: dict[str, Any]) -> Row:
    found = steps.alone(__file__, side, task)
    seconds, entering = found["seconds"][WARMUP_STEPS:], task["entering"]
    assert len(found["seconds"]) == len(entering), f"{side}: {len(found['seconds'])} steps"
    row = {
        "side": side,
        "dtype": task["dtype"],
        "longest": task["longest"],
        "plain_records": task["plain_records"],
        **found,
        "tokens": entering,
        "tokens_per_second": sum(entering[WARMUP_STEPS:]) / sum(seconds),
        "median_step_s": median(seconds),
    }
    if "body_seconds" in found:
        body = found["body_seconds"][WARMUP_STEPS:]
        row["body"] = median(b / s for b, s in zip(body, seconds, strict=True))
    return row


def table(rows: list[Row]) -> str:
    lines = [
        "| longest | dtype | side | tokens/s | x plain | step, s | body | peak GiB | of plain |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    rows = [row for row in rows if "seconds" in row]
    plain = {(r["longest"], r["dtype"]): r for r in rows if r["side"] == "plain"}
    for row in rows:
        other = plain.get((row["longest"], row["dtype"])) if row["side"] != "plain" else None
        cells = [
            row["longest"],
            row["dtype"],
            f"{row['side']} {row['version']}",
            f"{row['tokens_per_second']:.0f}",
            f"{row['tokens_per_second'] / other['tokens_per_second']:.2f}" if other else "",
            f"{row['median_step_s']:.2f}",
            f"{row['body']:.2f}" if "body" in row else "",
            f"{row['peak_gib']:.1f}",
            f"{row['peak_gib'] / other['peak_gib']:.2f}" if other else "",
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    parser = steps.parser(__doc__ or "", RESULT)
    parser.add_argument("judged", help="written judgments: as Shepherd's")
    parser.add_argument("--longest", type=int, nargs="+", default=[LONGEST_ALONE])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    sides = ("fastalign", "recomputed", "compiled", "profiled", "plain")
    parser.add_argument("--sides", nargs="+", choices=sides, default=["fastalign", "plain"])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--micro-batch-tokens", type=int, default=1024)
    parser.add_argument(
        "--plain-records", type=int, help="records in a batch of the plain side; 4, above 512 one"
    )
    arguments = parser.parse_args()
    if arguments.steps < steps.LEAST_STEPS:
        parser.error(f"--steps {arguments.steps}: the first {WARMUP_STEPS} are not counted")
    model = steps.model_folder(arguments.model)
    settings = {
        "records": RECORDS,
        "steps": arguments.steps,
        "micro_batch_tokens": arguments.micro_batch_tokens,
    }
    report = steps.Report("cut_step", arguments.output, settings, arguments.again)
    with tempfile.TemporaryDirectory(prefix="fastalign-") as folder:
        for longest in arguments.longest:
            data = prepare(
                arguments.judged,
                Path(folder, str(longest)),
                model,
                longest,
                arguments.steps * RECORDS,
            )
            alone = RECORDS if longest <= LONGEST_ALONE else 1
            task = {
                **data,
                "model": model,
                "longest": longest,
                "steps": arguments.steps,
                "micro_batch_tokens": arguments.micro_batch_tokens,
                "plain_records": arguments.plain_records or alone,
                "dtype": "float32",
            }
            if report.lacks(side="check", longest=longest):
                found = steps.alone(__file__, "check", task)
                if not found["agree"]:
                    sys.exit(f"the two sides compute other losses: {json.dumps(found)}")
                report.add({"side": "check", "longest": longest, **found})
            for dtype in arguments.dtypes:
                for side in arguments.sides:
                    if report.lacks(side=side, dtype=dtype, longest=longest):
                        report.add(measure(side, task | {"dtype": dtype}))
                    print(table(report.rows), flush=True)


if __name__ == "__main__":
    steps.start(SIDES, main)
