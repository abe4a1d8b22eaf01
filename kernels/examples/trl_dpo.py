"""linear_logprob under TRL 1.16's own DPOTrainer: the same training with another LM head.

TRL's trainers hand the LM head to one autograd function: hidden states, weight and targets in,
log-probs out.  ``LinearLogprobHead`` takes its place while a loss is computed; masks, autocast,
adapters, losses and metrics stay TRL's.

    pip install 'trl==1.16.*'
    python kernels/examples/trl_dpo.py

trains a small random Llama with a large vocabulary with each head, in fp32, and prints what both
logged and the peak of the memory that training took.  TRL does not hold [tokens, vocabulary]
logits either, but tiles of up to 4096 x 32768 of them, and the weight's gradient in fp32.  On a CPU
it goes through those tiles in plain torch, with copies that its Triton kernels on a GPU do not
need: what is printed on a CPU is not the difference on a GPU.
"""

from __future__ import annotations

import gc
import json
import random
import tempfile
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from fastalign_kernels import linear_logprob

VOCAB, STEPS = 49152, 3
QUANTITIES = ("loss", "grad_norm", "rewards/chosen", "rewards/rejected", "logits/chosen", "entropy")


class LinearLogprobHead:
    """Takes the arguments of TRL's autograd function and returns its values."""

    @staticmethod
    def apply(hidden, weight, bias, target, temperature, _, softcap, scale, outputs):
        if softcap is not None or scale != 1.0 or "log_sum_sq_probs" in outputs:
            raise NotImplementedError("a head that caps or scales its logits, or use_weighting")
        if weight.requires_grad and hasattr(weight, "ds_id"):  # TRL gathers it for this call alone
            raise NotImplementedError("a trained head under DeepSpeed ZeRO-3")
        device = hidden.device.type
        if torch.is_autocast_enabled(device):  # the op goes by its inputs' dtype alone
            dtype = torch.get_autocast_dtype(device)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        entropy = "entropy" in outputs
        result = linear_logprob(
            hidden, weight, target, bias=bias, temperature=temperature, return_entropy=entropy
        )
        with torch.no_grad():  # the mean of a token's logits is its logit for the mean row
            mean = hidden.float() @ weight.mean(dim=0, dtype=torch.float32)
            mean = (mean if bias is None else mean + bias.float().mean()) / temperature
        is_top1 = torch.zeros_like(target, dtype=torch.bool)  # unknown: see log() below
        return result.logprob, result.entropy, None, mean, is_top1


with_linear_logprob = patch("trl.trainer.utils._ChunkedLogProbFunction", LinearLogprobHead)


class LinearLogprobDPOTrainer(DPOTrainer):
    """TRL's trainer with the other head, for the policy and for the reference."""

    compute_loss = with_linear_logprob(DPOTrainer.compute_loss)
    compute_ref_log_probs = with_linear_logprob(DPOTrainer.compute_ref_log_probs)

    def log(self, *args: Any, **kwargs: Any) -> None:
        # The op knows the odds of a target, not whether another token has better ones.
        for metrics in self._metrics.values():
            metrics.pop("mean_token_accuracy", None)
        super().log(*args, **kwargs)


def make_trainer(trainer_class: type[DPOTrainer], folder: str) -> DPOTrainer:
    vocabulary = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, VOCAB)}
    words = Tokenizer(models.WordLevel(vocabulary))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>"
    )
    rng = random.Random(0)

    def text(low: int, high: int) -> str:
        return " ".join(f"w{rng.randrange(2, VOCAB)}" for _ in range(rng.randint(low, high))) + " "

    pairs = [
        {"prompt": text(5, 20), "chosen": text(20, 60), "rejected": text(20, 60)}
        for _ in range(4 * STEPS)
    ]
    size = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=VOCAB, num_hidden_layers=2, **size)
    arguments = DPOConfig(
        output_dir=folder,
        max_steps=STEPS,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    torch.manual_seed(0)
    return trainer_class(
        model=LlamaForCausalLM(config),
        ref_model=LlamaForCausalLM(config),  # another one, so that rewards do not begin at 0
        args=arguments,
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
    )


def peak_memory(function: Callable[[], Any], folder: str) -> int:
    """Most bytes that tensors took at a time in a call, beyond those there before it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    trace = Path(folder, "trace.json")
    profiler.export_chrome_trace(str(trace))
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e["name"] == "[memory]"]
    events.sort(key=lambda event: event["ts"])
    return max(accumulate(event["args"]["Bytes"] for event in events))


def main() -> None:
    logs, peaks = [], []
    for trainer_class in (DPOTrainer, LinearLogprobDPOTrainer):
        with tempfile.TemporaryDirectory() as folder:
            trainer = make_trainer(trainer_class, folder)
            peaks.append(peak_memory(trainer.train, folder) / 2**20)
        logs.append(trainer.state.log_history[:STEPS])
        del trainer
    print(f"{'step':4} {'quantity':20} {'TRL':>16} {'linear_logprob':>16}")
    for step, (theirs, ours) in enumerate(zip(*logs, strict=True)):
        for name in QUANTITIES:
            print(f"{step:4} {name:20} {theirs[name]:16.8f} {ours[name]:16.8f}")
    print(f"{'all':4} {'peak_memory_mib':20} {peaks[0]:16.1f} {peaks[1]:16.1f}")


if __name__ == "__main__":
    main()
