"""CUT (arXiv 2312.14591) by TRL's SFTTrainer, whose loss is replaced by one over logits.

    pip install 'trl==1.16.*'
    python examples/trl_cut.py MODEL judged.jsonl

TRL keeps model loading, adapters, distribution, schedules and logs.  Its wrapped model is called
for logits, as any trainer's is: under FSDP and ZeRO-3 its forward gathers the weights.  How
``DPOTrainer`` does without the logits is in kernels/examples/trl_dpo.py.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from itertools import accumulate
from typing import Any

import torch
from datasets import Dataset
from plain_transformers import Record, arguments, read
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from fastalign.losses import cut_loss
from fastalign_kernels import logits_logprob

IGNORED = -100


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """The answers behind their prompts, then those that were criticised behind the prompts that
    show the judgment: ids and targets [B, T], and bounds of both parts' tokens by record."""
    records = [Record(**row) for row in rows]
    criticised = [r for r in records if r.judged_prompt is not None]
    sequences = [(r.prompt, r.completion) for r in records]
    sequences += [(r.judged_prompt, r.completion) for r in criticised]
    ids = [torch.tensor(prompt + completion) for prompt, completion in sequences]
    targets = [torch.tensor([IGNORED] * len(p) + c) for p, c in sequences]
    tokens = [len(r.completion) for r in records]
    judged = [len(r.completion) if r.judged_prompt is not None else 0 for r in records]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(x) for x in ids], batch_first=True),
        # Not "labels": their tokens are what Trainer divides a loss by.
        "targets": pad_sequence(targets, batch_first=True, padding_value=IGNORED),
        "cu_tokens": torch.tensor([0, *accumulate(tokens)]),
        "cu_judged": torch.tensor([0, *accumulate(judged)]),
    }


class CUTTrainer(SFTTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        targets = inputs["targets"][:, 1:]
        carries = targets != IGNORED
        result = logits_logprob(outputs.logits[:, :-1][carries], targets[carries])
        plain = int(inputs["cu_tokens"][-1])
        loss = cut_loss(
            result.logprob[:plain],
            result.log1m_prob[:plain],
            result.logprob[plain:],
            inputs["cu_tokens"],
            inputs["cu_judged"],
            lambda_=1.1,
            alpha=1.0,
            gamma=1.0,
        )
        # A mean over records; Trainer takes the mean over accumulated batches and ranks.
        mean = loss.loss / (len(inputs["cu_tokens"]) - 1)
        return (mean, outputs) if return_outputs else mean


class Print(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **_) -> None:
        if "loss" in logs:
            print(f"step {state.global_step} loss {float(logs['loss']):.8f}", flush=True)


def main() -> None:
    given = arguments().parse_args()
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    records = read(given.data, tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            output_dir=folder,
            max_steps=given.steps,
            per_device_train_batch_size=given.batch_size,
            learning_rate=given.learning_rate,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            bf16=False,
            use_cpu=not torch.cuda.is_available(),
            model_init_kwargs={"dtype": "float32"},
            gradient_checkpointing=False,
            dataset_kwargs={"skip_prepare_dataset": True},
            remove_unused_columns=False,
            train_sampling_strategy="sequential",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = CUTTrainer(
            model=given.model,
            args=settings,
            data_collator=collate,
            train_dataset=Dataset.from_list([asdict(record) for record in records]),
            processing_class=tokenizer,
            callbacks=[Print()],
        )
        trainer.train()


if __name__ == "__main__":
    main()
