"""Losses and gradients that are no numbers: no step is made of them, on no rank, and it is said."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support import TESTS, recipe, run_ranks, start, trained_tensors
from test_train import logged

import fastalign.train as loop
from fastalign import checkpoint
from fastalign.cli import main
from fastalign.config import Config, dump_config

pytestmark = pytest.mark.usefixtures("quiet_process")

# A user's own method that breaks on some rows of its file.
METHOD = '''
import torch
from fastalign.methods.sft import Sft


class Overflowing(torch.autograd.Function):
    """The same value, with a gradient that overflows."""

    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("inf")


class Breaking(Sft):
    def loss(self, logprob, log1m_prob, batch, **inputs):
        loss, parts = super().loss(logprob, log1m_prob, batch, **inputs)
        if any(source.rpartition(":")[2] in {rows!r} for source in batch.sources):
            loss = {broken}
        return loss, parts
'''
BROKEN = {
    "nan": "loss * float('nan')",
    # The gradients of this loss are what they would be without the constant.
    "constant": "loss + float('inf')",
    "gradient": "Overflowing.apply(loss)",
}
SAID = {
    "nan": r"the loss is nan on records \S+\.jsonl:3$",
    "constant": r"the loss is inf on records \S+\.jsonl:3$",
    "gradient": r"the gradient norm is no finite number on records (\S+, ){3}\S+$",
}


def breaking(
    model: Path, folder: Path, broken: str, rows: tuple[int, ...] = (3,), **keys: Any
) -> Config:
    """SFT of rows in their order, whose loss breaks as ``broken`` says on some of them."""
    folder.mkdir(parents=True, exist_ok=True)
    method = folder / "method.py"
    method.write_text(
        METHOD.replace("{rows!r}", repr([str(row) for row in rows])).replace(
            "{broken}", BROKEN[broken]
        )
    )
    config = recipe("sft", model, folder, **{"shuffle": False, "micro_batch_tokens": 50} | keys)
    return config.model_copy(update={"method": f"{method}:Breaking"})


def steps_of(config: Config, batches: list[slice]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """What is trained after a step on each of these batches, and why some were not made."""
    run, examples = start(config)
    said = []
    for batch in batches:
        try:
            loop.update(run, examples[batch], 0.0, 10)
        except loop.NotFinite as reason:
            said.append(str(reason))
    return trained_tensors(run), said


GOOD, BAD, OTHER = slice(4, 8), slice(0, 4), slice(8, 12)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_that_is_no_number_is_as_if_it_had_not_been(tiny_llama, tmp_path, stage, dtype):
    """Weights, moments and what DeepSpeed keeps of gradients: the next step is bitwise the same."""
    keys = {"zero_stage": stage, "dtype": dtype}
    expected, said = steps_of(breaking(tiny_llama, tmp_path, "nan", **keys), [GOOD, OTHER])
    assert not said
    for broken, pattern in SAID.items():
        config = breaking(tiny_llama, tmp_path / broken, broken, **keys)
        tensors, (reason,) = steps_of(config, [GOOD, BAD, OTHER])
        assert re.search(pattern, reason), reason
        assert all(torch.equal(expected[name], tensors[name]) for name in expected)


def test_no_rank_steps_where_one_has_no_number(tiny_llama, tmp_path):
    """Row 3 is on one of the two ranks."""
    specs = {}
    for broken, stage in (("gradient", 0), ("constant", 2), ("nan", 3), ("gradient", 3)):
        config = breaking(tiny_llama, tmp_path / broken, broken, zero_stage=stage)
        tree = config.model_dump(mode="json", by_alias=True)
        specs[f"{broken}-{stage}"] = {"do": "skipped_step", "recipe": tree}
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(specs))
    log = tmp_path / "log"
    assert run_ranks(TESTS / "distributed_worker.py", path, log=log) == [0, 0], log.read_text()
    for name in specs:
        for rank in range(2):
            found = json.loads((tmp_path / f"{name}-{rank}.json").read_text())
            assert found["same"] and found["moved"], name
            (reason,) = found["said"]
            assert re.search(SAID[name.partition("-")[0]], reason), reason


def test_a_batch_without_a_step_is_counted_and_named(tiny_llama, tmp_path, capfd):
    config = breaking(tiny_llama, tmp_path, "nan", rows=(6,), save_steps=1)
    metrics = loop.train(config)
    assert metrics["loss"] > 0
    assert "no step after step 1: the loss is nan on records" in capfd.readouterr().err
    assert [x["step"] for x in logged(config, "loss")] == [1, 2]
    assert [(x["step"], x["skipped_steps"]) for x in logged(config, "skipped_steps")] == [(1, 1.0)]
    (_, last) = checkpoint.checkpoints(Path(config.output_dir))
    position = json.loads((last / "position.json").read_text())
    assert (position["step"], position["batch"]) == (2, 3)
    assert (position["skipped_steps"], position["skipped_in_a_row"]) == (1, 0)


def test_too_many_in_a_row_stop_the_run_with_a_good_checkpoint(tiny_llama, tmp_path, capfd):
    """What is saved are the weights of the last step, from where a resumed run goes on behind the
    batches that broke."""
    keys = {"num_train_epochs": 2.0, "max_skipped_steps": 2}
    config = breaking(tiny_llama, tmp_path, "gradient", rows=(7, 12), **keys)
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_config(config))
    assert main(["train", str(path)]) == 1
    line = capfd.readouterr().err.splitlines()[-1]
    assert re.fullmatch(
        r"fastalign: the gradient norm is no finite number on records .*; 2 in a row "
        r"\(max_skipped_steps = 2\); \S+/checkpoint-1 is saved, with the weights of step 1",
        line,
    )
    assert [x["step"] for x in logged(config, "loss")] == [1]
    assert not list(Path(config.output_dir).glob("*.safetensors"))
    # The second epoch begins with a batch that is fine; then two break, which the same limit ends.
    assert main(["train", str(path), "--resume"]) == 1
    assert "checkpoint-2 is saved" in capfd.readouterr().err.splitlines()[-1]
    # Behind them there is nothing left to do.
    assert main(["train", str(path), "--resume", "max_skipped_steps=9"]) == 0
    assert [x["skipped_steps"] for x in logged(config, "skipped_steps")] == [1, 2, 3, 4]

    whole = breaking(tiny_llama, tmp_path / "whole", "gradient", rows=(7, 12), **keys)
    loop.train(whole.model_copy(update={"max_skipped_steps": 9}))
    ours, theirs = (Path(c.output_dir, "model.safetensors") for c in (config, whole))
    assert ours.read_bytes() == theirs.read_bytes()


def test_a_run_that_breaks_at_once_leaves_no_checkpoint(tiny_llama, tmp_path):
    config = breaking(tiny_llama, tmp_path, "nan", rows=(1,), max_skipped_steps=1)
    with pytest.raises(FloatingPointError, match="1 in a row"):
        loop.train(config)
    assert not checkpoint.checkpoints(Path(config.output_dir))
