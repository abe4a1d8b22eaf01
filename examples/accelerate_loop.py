"""DPO (arXiv 2305.18290) in a loop of one's own under Accelerate, on one process or several.

    accelerate launch examples/accelerate_loop.py MODEL pairs.jsonl

takes rows with ``prompt``, ``chosen`` and ``rejected``.  Body and LM head are called in the forward
of the one module that Accelerate wraps: DDP reduces the gradients, and FSDP and DeepSpeed gather
the weights, of what happens there.  The model is its own reference: what it says before the first
step is computed once, and no second model is held.
"""

from __future__ import annotations

import argparse
import json
from itertools import accumulate
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from plain_transformers import answer_logprobs, arguments
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from fastalign.losses import dpo_loss

Pair = tuple[list[int], list[int], list[int]]  # token ids: prompt, chosen, rejected


class Answers(nn.Module):
    """log p of the tokens of both answers of each pair, chosen first, flat [M]."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pairs: list[Pair]) -> Tensor:
        sequences = [(prompt, answer) for prompt, *both in pairs for answer in both]
        return answer_logprobs(self.model, sequences).logprob


def read(path: Path, tokenizer) -> list[Pair]:
    pairs = []
    for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        turn = [{"role": "user", "content": row["prompt"]}]
        shown = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        texts = [shown, *(row[name] + tokenizer.eos_token for name in ("chosen", "rejected"))]
        pairs.append(tuple(tokenizer(texts, add_special_tokens=False)["input_ids"]))
    return pairs


def train(given: argparse.Namespace) -> Accelerator:
    # A batch of the loader is the batch of one step; each process has its share of it.
    accelerator = Accelerator(
        dataloader_config=DataLoaderConfiguration(split_batches=True),
        cpu=not torch.cuda.is_available(),
    )
    pairs = read(given.data, AutoTokenizer.from_pretrained(given.model))
    model = Answers(AutoModelForCausalLM.from_pretrained(given.model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=given.learning_rate, weight_decay=0.0)
    loader = DataLoader(pairs, given.batch_size, collate_fn=list, drop_last=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    with torch.no_grad():
        references = [model(batch) for batch in loader]
    for step, (batch, reference) in enumerate(zip(loader, references, strict=True)):
        if step == given.steps:
            break
        lengths = [len(answer) for _, *both in batch for answer in both]
        result = dpo_loss(
            model(batch), reference, torch.tensor([0, *accumulate(lengths)]), beta=0.1
        )
        # A share of the mean over the whole batch; the mean over processes is what DDP takes.
        loss = result.losses.sum() / given.batch_size
        accelerator.backward(loss * accelerator.num_processes)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        total = accelerator.reduce(loss.detach(), "sum").item()
        accelerator.print(f"step {step + 1} loss {total:.8f}", flush=True)
    return accelerator


def main() -> None:
    accelerator = train(arguments().parse_args())
    # DDP's buckets hold the process group: it ends while both processes are there, or waits.
    accelerator.free_memory()
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main()
