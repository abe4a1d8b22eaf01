"""What `fastalign train --dry-run --gpus N` says of memory, against bytes that a CPU really held.

    python bench/plan.py [--model PATH] [--output FILE]     measures, and writes the tables
    python bench/plan.py --plans                            writes the plans that docs/plan.md shows
    python bench/plan.py --recipes                          writes those of recipes/paper and models

Counted on both sides, in bytes: weights, float32 masters, moments and gradients of one rank, after
some steps on two ranks at ZeRO 0 to 3; and on one rank the most that a forward and backward pass
had allocated at once beyond weights and their gradients.  The passes' figures are the allocator's,
as torch's profiler records them.  On a CPU the LM head's work space and the attention's copy are
other ones than on a GPU, so that the prediction is made for a CPU; no GPU was measured.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "bench" / "results" / "plan.json"
DOCUMENT = ROOT / "docs" / "plan.md"
HELD = ("weights", "masters", "moments", "gradients")
GPU_COUNTS = (1, 8, 64, 512)


# --------------------------------------------------------------------------------------- measured


def measure(config: Any, tokens: int) -> dict[str, int]:
    """Bytes of this rank, of a model that is trained for three steps on packs of ``tokens``."""
    from fastalign import startup
    from fastalign.logprobs import probe_batch
    from fastalign.model import build_model, init_distributed

    device = init_distributed(timeout_s=300.0)
    model = build_model(config, device=device, needs_reference=False)
    model.engine.eval()
    assert startup._pack(config, model.policy, model.engine, device) is None
    model.engine.train()
    batch = probe_batch(model.policy.causal_lm.config.vocab_size, (tokens,), device)
    for last in (False, False, True):
        loss = model.engine(batch, loss=lambda logprob, *_: -logprob.mean())
        model.engine.backward(loss)
        if last:
            found = held(model)
        model.engine.step()
    if model.zero_stage == 0:
        found["activations"] = most_of_a_pass(model.policy, batch)
    return found


def held(model: Any) -> dict[str, int]:
    """Bytes of each part, a storage counted once, between backward and the optimizer."""
    from fastalign.quantization import scales_of

    parameters = list(model.policy.parameters())
    sharding, optimizer = model.engine.optimizer, model.optimizer
    scales = [scale for _, scale in scales_of(model.policy)]
    shards = [getattr(p, "ds_tensor", None) for p in parameters]
    weights = storages([*parameters, *scales, *shards])
    masters = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = [p.grad for p in parameters]
    if model.zero_stage == 2:
        gradients = [g for group in sharding.all_grad_tensors.values() for g in group]
    if model.zero_stage == 3:
        masters = sharding.fp32_partitioned_groups_flat
        gradients = [sharding.grad_partitions_flat_buffer]
    moments = [m for state in optimizer.state.values() for m in state.values() if m.numel() > 1]
    return {
        "weights": sum(weights.values()),
        "masters": sum(n for at, n in storages(masters).items() if at not in weights),
        "moments": sum(storages(moments).values()),
        "gradients": sum(storages(gradients).values()),
    }


def storages(tensors: Iterable[torch.Tensor | None]) -> dict[int, int]:
    some = (t.untyped_storage() for t in tensors if t is not None and t.numel())
    return {storage.data_ptr(): storage.nbytes() for storage in some}


def most_of_a_pass(policy: Any, batch: Any) -> int:
    """Most bytes allocated at once by forward and backward, each gradient of a weight freed when it
    is complete."""
    from torch.profiler import ProfilerActivity, profile

    def drop(parameter: torch.Tensor) -> None:
        parameter.grad = None

    trained = [p for p in policy.parameters() if p.requires_grad]
    hooks = [p.register_post_accumulate_grad_hook(drop) for p in trained]
    for parameter in trained:
        parameter.grad = None
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        logprob, _ = policy(batch)
        logprob.sum().backward()
    for hook in hooks:
        hook.remove()
    return most_at_once(recorded)


def most_at_once(recorded: Any) -> int:
    from torch._C._profiler import _EventType

    events = list(recorded.profiler.kineto_results.experimental_event_tree())
    changes = []
    while events:
        event = events.pop()
        events += event.children
        if event.tag == _EventType.Allocation:
            changes.append((event.start_time_ns, event.extra_fields.alloc_size))
    now = most = 0
    for _, size in sorted(changes):
        now += size
        most = max(most, now)
    return most


# -------------------------------------------------------------------------------------- predicted


def predict(config: Any, tokens: int, ranks: int) -> dict[str, int]:
    """The same by fastalign.plan, for a CPU."""
    from fastalign.footprint import Footprint
    from fastalign.model import resolve_zero_stage, zero_options
    from fastalign.plan import shard

    stage = resolve_zero_stage(config, ranks)
    dtype = getattr(torch, config.dtype)
    model = Footprint(config, dtype, on_cpu=True)
    zero = zero_options(config, stage, dtype, sum(p.numel for p in model.parameters if p.trained))
    split = shard(model.parameters, stage, ranks, zero, dtype, model.largest_module)
    found = {name: getattr(split, name) for name in HELD}
    if stage == 0:
        found["activations"] = model.activations(tokens)
    return found


# ------------------------------------------------------------------------------------------- runs


def cases(model: str, dtypes: dict[str, int]) -> list[dict[str, Any]]:
    """Recipes by ranks; ``dtypes``: of which, and with how many tokens."""
    made = []
    for dtype, tokens in dtypes.items():
        for lora in (False, True):
            base = {"dtype": dtype, "use_peft": lora}
            for checkpointing in (False, True):
                more = {"zero_stage": 0, "gradient_checkpointing": checkpointing}
                made.append({"ranks": 1, "tokens": tokens, "keys": base | more})
            for stage in (1, 2, 3):
                made.append({"ranks": 2, "tokens": 64, "keys": base | {"zero_stage": stage}})
    for case in made:
        case["keys"]["model_name_or_path"] = model
    return made


def recipe(keys: dict[str, Any]) -> Any:
    from fastalign.config import parse_config

    fixed = {"method": "sft", "datasets": [{"path": "none"}], "output_dir": "none"}
    return parse_config(fixed | keys)


def work(specification: str) -> None:
    """One rank: the cases of a file, in turn; the first rank writes what it held."""
    from fastalign.model import init_distributed

    path = Path(specification)
    rows = []
    for case in json.loads(path.read_text()):
        config = recipe(case["keys"])
        rows.append(measure(config, case["tokens"]))
        gc.collect()
    init_distributed(timeout_s=300.0)
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, rows)
    if torch.distributed.get_rank() == 0:
        # Ranks hold parts of about the same size; a plan is for the one that holds most.
        most = [
            {k: max(rank[i][k] for rank in gathered) for k in rows[i]} for i in range(len(rows))
        ]
        path.with_suffix(".out").write_text(json.dumps(most))


def run(made: list[dict[str, Any]], ranks: int) -> list[dict[str, int]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "cases.json")
        path.write_text(json.dumps([case for case in made if case["ranks"] == ranks]))
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | os.environ
        command = [sys.executable, *launch, __file__, "--worker", str(path)]
        subprocess.run(command, check=True, env=environment)
        return json.loads(path.with_suffix(".out").read_text())


def rows_of(made: list[dict[str, Any]], measured: list[dict[str, int]]) -> list[dict[str, Any]]:
    rows = []
    for case, found in zip(made, measured, strict=True):
        keys = case["keys"] | {"model_name_or_path": Path(case["keys"]["model_name_or_path"]).name}
        planned = predict(recipe(case["keys"]), case["tokens"], case["ranks"])
        rows.append(case | {"keys": keys, "measured": found, "planned": planned})
    return rows


# ------------------------------------------------------------------------------------------ tables


def table(rows: list[dict[str, Any]]) -> str:
    """MiB measured, and how far the plan is from it."""
    lines = [
        "| model, dtype | trained | ranks, ZeRO | part | measured, MiB | planned, MiB | error |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        keys = row["keys"]
        what = "LoRA" if keys["use_peft"] else "all"
        if keys.get("gradient_checkpointing"):
            what += ", checkpointing"
        for name, size in row["measured"].items():
            planned = row["planned"][name]
            error = f"{(planned - size) / size:+.1%}" if size != planned else "0"
            part = f"a pass over {row['tokens']} tokens" if name == "activations" else name
            cells = [
                f"{keys['model_name_or_path']}, {keys['dtype']}",
                what,
                f"{row['ranks']}, {keys['zero_stage']}",
                part,
                f"{size / 2**20:,.2f}",
                f"{planned / 2**20:,.2f}",
                error,
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write_region(name: str, text: str) -> None:
    region = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
    document = DOCUMENT.read_text(encoding="utf-8")
    replaced, count = region.subn(lambda found: found[1] + text + found[2], document)
    assert count == 1, name
    DOCUMENT.write_text(replaced, encoding="utf-8")


SHAPES = {
    "llama-2-13b-like": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
    },
    "llama-2-70b-like": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}


def plans(gpu: str = "h100") -> str:
    """What the command prints for all weights of two large shapes on 1 to 512 GPUs."""
    from rich.console import Console
    from transformers import LlamaConfig

    from fastalign import plan

    text = []
    for name, shape in SHAPES.items():
        with tempfile.TemporaryDirectory() as folder:
            shape = {"vocab_size": 32000, "max_position_embeddings": 4096} | shape
            LlamaConfig(architectures=["LlamaForCausalLM"], **shape).save_pretrained(folder)
            keys = {"model_name_or_path": folder, "dtype": "bfloat16"}
            keys |= {"gradient_checkpointing": True}
            planner = plan.Planner(recipe(keys), plan.find_gpu(gpu, None))
            for gpus in GPU_COUNTS:
                file = io.StringIO()
                plan.show(plan.advise(planner, gpus), Console(file=file, width=100))
                printed = "\n".join(line.rstrip() for line in file.getvalue().splitlines())
                command = f"$ fastalign train {name}.yaml --dry-run --gpus {gpus} --gpu {gpu}"
                text.append(f"```\n{command}\n{printed}\n```\n")
    return "\n".join(text)


def _llama(**shape: int) -> dict[str, Any]:
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama"} | shape


def _shape(hidden: int, inner: int, layers: int, heads: int, kv: int, words: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": 128,
        "vocab_size": words,
        "max_position_embeddings": 4096,
    }


QWEN3_8B = _shape(4096, 12288, 36, 32, 8, 151936) | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
}
# As the models' own config.json have them; what a model is trained into has the shape of its start.
MODELS: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-2-7b-hf": _llama(**_shape(4096, 11008, 32, 32, 32, 32000)),
    "meta-llama/Llama-2-13b-chat-hf": _llama(**_shape(5120, 13824, 40, 40, 40, 32000)),
    "meta-llama/Llama-3.1-8B-Instruct": _llama(**_shape(4096, 14336, 32, 32, 8, 128256)),
    "meta-llama/Llama-3.3-70B-Instruct": _llama(**_shape(8192, 28672, 80, 64, 8, 128256)),
    "Qwen/Qwen3-8B": QWEN3_8B,
    "Qwen/Qwen3-8B-Base": QWEN3_8B,
}
PLANNED = re.compile(r"^# Planned.*?\n(?!#)", re.S | re.M)


def planned_recipes() -> list[Path]:
    """The recipes of full size, none of which was run."""
    return sorted(
        p for part in ("paper", "models") for p in (ROOT / "recipes" / part).glob("*.yaml")
    )


def plan_of_recipe(path: Path, gpu: str = "h100") -> str:
    """The comment in a recipe that says what it takes of a GPU's memory."""
    from fastalign import plan
    from fastalign.config import load_config, override_config

    config = load_config(path)
    name = config.model_name_or_path
    if name.startswith("runs/"):
        before = path.with_name(name.removeprefix("runs/") + ".yaml")
        name = load_config(before).model_name_or_path
    lines = [
        "# Planned for H100s of 80 GB, GiB of each, as `fastalign train RECIPE --dry-run --gpus N",
        "# --gpu h100` does from the model's config.json, by `python bench/plan.py --recipes`",
        "# (docs/plan.md):",
    ]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(MODELS[name]))
        local = override_config(config, [f"model_name_or_path={folder}"])
        planner = plan.Planner(local, plan.find_gpu(gpu, None))
        for gpus in (1, 8, 64):
            found = planner.plan(planner.config, gpus)
            who = f"{gpus} GPU{'s' if gpus > 1 else ''}"
            text = f"{who:>7}: {_gib(found.needed)}, {_outcome(planner, found)}"
            lines += textwrap.wrap(
                text, 100, initial_indent="#   ", subsequent_indent="#" + 12 * " ",
                break_long_words=False, break_on_hyphens=False,
            )  # fmt: skip
    return "\n".join(lines) + "\n"


def _outcome(planner: Any, found: Any) -> str:
    from fastalign.plan import _words, advise

    if found.fits:
        return "fits"
    changes = advise(planner, found.gpus).changes
    if not (changes and changes[-1].fits):
        return "does not fit"
    return f"does not fit; {_gib(changes[-1].needed)} with {_words(changes[-1], found)}"


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="folder; default: SmolLM2-135M")
    parser.add_argument("--output", default=str(RESULT))
    parser.add_argument("--plans", action="store_true")
    parser.add_argument("--recipes", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker)
        return
    if arguments.plans:
        write_region("plans", plans())
        return
    if arguments.recipes:
        for path in planned_recipes():
            text = path.read_text(encoding="utf-8")
            path.write_text(PLANNED.sub(plan_of_recipe(path), text, count=1), encoding="utf-8")
        return
    from racing import machine

    from fastalign.demo.model import ensure_smollm

    made = cases(arguments.model or str(ensure_smollm()), {"bfloat16": 512})
    rows = []
    for ranks in (1, 2):
        some = [case for case in made if case["ranks"] == ranks]
        rows += rows_of(some, run(made, ranks))
    result = machine() | {"command": "python bench/plan.py", "plan": rows}
    Path(arguments.output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if arguments.output == str(RESULT):
        write_region("measured", table(rows))


if __name__ == "__main__":
    main()
