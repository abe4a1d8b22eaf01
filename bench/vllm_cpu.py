"""vLLM's CPU backend with our adapters and our sampler in the place of its own.

    python bench/vllm_cpu.py PROMPTS [--dtype float32] [--output FILE]

One engine in one process samples the answers of a SELF-JUDGE step (bench/self_judge_step.py): two
of 128 tokens to each of 8 prompts, temperature 1, top-p 0.9, a LoRA adapter of rank 8 on all linear
layers.  It does so as vLLM has it, with adapters by `rollout/vllm_lora.py`, with tokens by
`rollout/vllm_sampler.py` beside, and so without an adapter, one after another in each turn; turns
have other prompts.  Reported are the median seconds and tokens/s of each; the first turn is not
counted.

The floor of a token of 16 rows, with N parameters of the body, V x D of the head and R the rank:
2 (N + V D) operations a row, and the weights read once; the adapter's 2 R (inputs + outputs) of
each layer, 2 % of that; the sampler reads 16 V logits twice.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import self_judge_step as step
import steps
import torch
from steps import Row, say

RESULT = "vllm-cpu.json"
# Adapters, tokens: whose.
VARIANTS = {
    "vllm": ("vllm", "vllm"),
    "adapters": ("fastalign", "vllm"),
    "adapters and sampler": ("fastalign", "fastalign"),
    "sampler, no adapter": (None, "fastalign"),
}


def sample(task: dict[str, Any]) -> Row:
    """Seconds of each variant, in turns."""
    import peft
    import vllm
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
    from vllm.v1.sample.sampler import Sampler

    from fastalign.config import RolloutConfig
    from fastalign.rollout import SamplingSettings, ServedModel
    from fastalign.rollout.vllm import VllmEngine
    from fastalign.rollout.vllm_lora import DenseLora
    from fastalign.rollout.vllm_sampler import CpuSampler

    torch.manual_seed(0)
    words = step.make_renderer(task)
    trained = steps.plain_model(task, step.RANK, "all-linear")
    engine = VllmEngine(
        ServedModel(
            task["model"],
            dtype=getattr(torch, task["dtype"]),
            max_model_len=step.LONGEST_PROMPT + task["new"],
            lora_rank=step.RANK,
        ),
        RolloutConfig(engine="vllm"),
    )
    adapter = {**trained.peft_config["default"].to_dict(), "inference_mode": True}
    engine.load_adapter("policy", peft.get_peft_model_state_dict(trained), adapter, 1)
    del trained
    worker = engine._llm.llm_engine.model_executor.driver_worker.worker
    manager = worker.get_model().lora_manager
    (wrapper,) = manager.punica_wrapper_mapping.values()
    sampler = worker.model_runner.sampler
    assert (type(wrapper), type(sampler)) == (DenseLora, CpuSampler)

    settings = SamplingSettings(task["new"], temperature=step.TEMPERATURE, top_p=step.TOP_P)
    rows = [
        json.loads(line)["prompt"] for line in Path(task["data"]).read_text("utf-8").splitlines()
    ]
    found: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for first in range(0, len(rows), task["prompts"]):
        batch = [words.prompt_ids(m) for m in rows[first : first + task["prompts"]]]
        asked = [np.asarray(p) for p in batch for _ in range(step.SAMPLES)]
        for name, (adapters, drawing) in VARIANTS.items():
            wrapper.__class__ = PunicaWrapperCPU if adapters == "vllm" else DenseLora
            sampler.__class__ = Sampler if drawing == "vllm" else CpuSampler
            # The mapping of rows to adapters is taken down anew.
            manager._last_mapping = None
            # Nor does one variant find what another has computed of the prompts.
            engine._reset_prefix_cache()
            start = time.perf_counter()
            answers = engine.generate(
                asked, settings, list(range(len(asked))), adapters and "policy"
            )
            found[name].append(time.perf_counter() - start)
            tokens = sum(len(answer.token_ids) for answer in answers)
            assert tokens == len(asked) * task["new"], f"{name}: {tokens} tokens"
        say(", ".join(f"{name} {of[-1]:.1f} s" for name, of in found.items()))
    engine.close()
    return {"seconds": found, "version": vllm.__version__}


SIDES = {"sample": sample}


def table(row: Row, tokens: int) -> str:
    lines = ["| | s | tokens/s | x vLLM |", "| --- | --- | --- | --- |"]
    typical = {name: median(of[1:]) for name, of in row["seconds"].items()}
    for name, seconds in typical.items():
        times = typical["vllm"] / seconds
        lines.append(f"| {name} | {seconds:.1f} | {tokens / seconds:.0f} | {times:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = steps.parser(__doc__ or "", RESULT)
    parser.add_argument("prompts", help="prompts or dialogues, as hh-rlhf's harmless-base")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--prompts-per-step", type=int, default=8)
    parser.add_argument("--new", type=int, default=128, help="tokens of each answer")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    arguments = parser.parse_args()
    if arguments.turns < 2:
        parser.error(f"--turns {arguments.turns}: the first is not counted")
    settings = {
        "prompts": arguments.prompts_per_step,
        "new": arguments.new,
        "turns": arguments.turns,
    }
    report = steps.Report("vllm_cpu", arguments.output, settings, arguments.again)
    model = steps.model_folder(arguments.model)
    with tempfile.TemporaryDirectory(prefix="fastalign-") as folder:
        count = arguments.turns * arguments.prompts_per_step
        data = step.prepare(arguments.prompts, Path(folder), model, count)
        for dtype in arguments.dtypes:
            if report.lacks(dtype=dtype):
                task = {**data, **settings, "model": model, "dtype": dtype}
                report.add({"dtype": dtype, **steps.alone(__file__, "sample", task)})
            (row,) = (row for row in report.rows if row["dtype"] == dtype)
            print(
                f"\n{dtype}\n{table(row, count * step.SAMPLES * arguments.new // arguments.turns)}"
            )


if __name__ == "__main__":
    if torch.cuda.is_available():
        sys.exit("bench/vllm_cpu.py: measures vLLM's CPU backend, and this is a GPU machine")
    steps.start(SIDES, main)
