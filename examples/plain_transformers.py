"""CUT (arXiv 2312.14591) in a bare torch loop over a transformers model.

    python examples/plain_transformers.py MODEL judged.jsonl

takes rows with ``prompt``, ``completion`` and ``judgment``, which is null where the answer is fine.
Log-probs come from the hidden states and the LM head's weight, without the logits of a whole batch;
the loss takes them flat, the tokens of all answers after each other.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from fastalign.losses import cut_loss
from fastalign_kernels import TokenLogprobs, linear_logprob


@dataclass(frozen=True)
class Record:
    """Token ids of an answer, of its prompt, and of the prompt that shows the judgment as well,
    where there is one."""

    prompt: list[int]
    judged_prompt: list[int] | None
    completion: list[int]


def read(path: Path, tokenizer) -> list[Record]:
    def prompt_ids(text: str) -> list[int]:
        turn = [{"role": "user", "content": text}]
        shown = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        return tokenizer(shown, add_special_tokens=False)["input_ids"]

    records = []
    for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        completion = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
        judged = None
        if row["judgment"] is not None:
            judged = f"{row['prompt']}\n\nGive an answer of which this is said: {row['judgment']}"
        records.append(
            Record(
                prompt_ids(row["prompt"]),
                None if judged is None else prompt_ids(judged),
                [*completion, tokenizer.eos_token_id],
            )
        )
    return records


def answer_logprobs(
    model: PreTrainedModel, sequences: list[tuple[list[int], list[int]]]
) -> TokenLogprobs:
    """log p and log(1 - p) of the tokens behind each prompt, flat, of (prompt, completion)."""
    ids = [prompt + completion for prompt, completion in sequences]
    width = max(map(len, ids))
    padded = torch.tensor([row + [0] * (width - len(row)) for row in ids], device=model.device)
    lengths = torch.tensor([len(row) for row in ids], device=model.device)
    places = torch.arange(width, device=model.device)
    begins = torch.tensor([len(prompt) for prompt, _ in sequences], device=model.device)
    is_target = (places >= begins[:, None]) & (places < lengths[:, None])

    mask = (places < lengths[:, None]).long()
    hidden = model.base_model(input_ids=padded, attention_mask=mask).last_hidden_state
    # What stands before a token predicts it.
    rows = hidden[:, :-1][is_target[:, 1:]]
    return linear_logprob(rows, model.get_output_embeddings().weight, padded[is_target])


def loss_of(model: PreTrainedModel, batch: list[Record]) -> Tensor:
    """The loss of CUT, a mean over the records."""
    plain = answer_logprobs(model, [(r.prompt, r.completion) for r in batch])
    criticised = [(r.judged_prompt, r.completion) for r in batch if r.judged_prompt is not None]
    judged = answer_logprobs(model, criticised).logprob if criticised else plain.logprob[:0]
    tokens = [len(r.completion) for r in batch]
    judged_tokens = [len(r.completion) if r.judged_prompt is not None else 0 for r in batch]
    result = cut_loss(
        plain.logprob,
        plain.log1m_prob,
        judged,
        torch.tensor([0, *accumulate(tokens)]),
        torch.tensor([0, *accumulate(judged_tokens)]),
        lambda_=1.1,
        alpha=1.0,
        gamma=1.0,
    )
    return result.loss / len(batch)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    return parser


def main() -> None:
    given = arguments().parse_args()
    model = AutoModelForCausalLM.from_pretrained(given.model)
    records = read(given.data, AutoTokenizer.from_pretrained(given.model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=given.learning_rate, weight_decay=0.0)
    for step in range(given.steps):
        first = step * given.batch_size % len(records)
        loss = loss_of(model, records[first : first + given.batch_size])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1} loss {loss.item():.8f}", flush=True)


if __name__ == "__main__":
    main()
