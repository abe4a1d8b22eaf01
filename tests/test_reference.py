"""The reference's log-probs of static data: as a second model gives them, once, kept on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import recipe, rows, start, write_rows
from test_train import LORA, logged

import fastalign.train as loop
from fastalign import reference
from fastalign.batch import plan_batches
from fastalign.train import train


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("FASTALIGN_CACHE", str(folder))
    return folder


def kept(cache: Path) -> list[Path]:
    return sorted((cache / "reference").glob("*"))


@pytest.mark.parametrize("keys", [{}, LORA, LORA | {"lora_dropout": 0.5}])
def test_they_are_those_of_the_start(sharp_llama, tmp_path, monkeypatch, keys):
    monkeypatch.setattr(reference, "CHUNK", 3)
    run, examples = start(recipe("dpo", sharp_llama, tmp_path, micro_batch_tokens=90, **keys))
    scored = reference.score_reference(run, examples)
    assert run.model.policy.training
    run.model.engine.eval()
    for one, example in zip(scored, examples, strict=True):
        (pack,) = plan_batches([one], 10_000, 0, 1)
        (bare,) = plan_batches([example], 10_000, 0, 1)
        assert bare.reference is None and pack.reference is not None
        with torch.no_grad():
            alone, _ = run.model.engine(bare)
        assert pack.reference.numpy() == pytest.approx(alone.numpy(), rel=1e-6, abs=1e-6)
        assert one.reference_logprobs.shape == (bare.rows.numel(),)


def test_a_full_run_holds_no_second_model_and_a_next_one_computes_nothing(
    sharp_llama, tmp_path, cache, monkeypatch, capfd
):
    computed = []
    original = reference._compute
    monkeypatch.setattr(
        reference,
        "_compute",
        lambda run, chunk: computed.append(len(chunk)) or original(run, chunk),
    )
    models = []
    build = loop.build_model

    def built(*arguments, **keys):
        models.append(build(*arguments, **keys))
        return models[-1]

    monkeypatch.setattr(loop, "build_model", built)
    keys = {"max_steps": 3, "learning_rate": 1e-2}
    first = recipe("dpo", sharp_llama, tmp_path / "a", **keys)
    train(first)
    assert models[0].reference_engine is None
    assert computed == [len(examples_of(first))]
    train(recipe("dpo", sharp_llama, tmp_path / "b", beta=0.5, **keys))
    assert len(computed) == 1 and len(kept(cache)) == 1
    assert "0 computed" in capfd.readouterr().err
    # Rewards begin at 0 and move: the policy is compared with the start, not with itself.
    rewards = [row["rewards/margins"] for row in logged(first, "rewards/margins")]
    assert abs(rewards[0]) < 1e-5 < abs(rewards[2])


def examples_of(config):
    return start(config)[1]


def test_steps_that_see_part_of_the_data_score_part_of_it(sharp_llama, tmp_path, capfd):
    data = str(write_rows(tmp_path / "rows.jsonl", rows("preference", 9)))
    config = recipe(
        "dpo", sharp_llama, tmp_path, datasets=[{"path": data}], max_steps=2, global_batch_size=2
    )
    train(config)
    assert "reference log-probs of 4 examples: 4 computed" in capfd.readouterr().err


def test_other_weights_or_data_are_other_results(sharp_llama, tmp_path, cache):
    run, examples = start(recipe("dpo", sharp_llama, tmp_path))
    reference.score_reference(run, examples)
    reference.score_reference(run, examples[:-1])
    assert len(kept(cache)) == 2
    with torch.no_grad():
        next(run.model.policy.parameters()).view(-1)[0] += 1
    reference.score_reference(run, examples)
    assert len(kept(cache)) == 3


@pytest.mark.parametrize("damage", ["truncated", "flipped", "another shape"])
def test_what_was_damaged_is_computed_anew(sharp_llama, tmp_path, cache, damage, capfd):
    run, examples = start(recipe("dpo", sharp_llama, tmp_path))
    before = reference.score_reference(run, examples)
    (path,) = kept(cache)
    content = bytearray(path.read_bytes())
    if damage == "another shape":
        save_file({"logprobs": load_file(path)["logprobs"][:-1]}, path)
    else:
        content[-1] ^= 1
        path.write_bytes(content[:-20] if damage == "truncated" else content)
    again = reference.score_reference(run, examples)
    assert "computed anew" in capfd.readouterr().err
    for one, other in zip(before, again, strict=True):
        assert np.array_equal(one.reference_logprobs, other.reference_logprobs)
    assert np.array_equal(
        load_file(path)["logprobs"], np.concatenate([e.reference_logprobs for e in before])
    )


def test_a_disk_that_takes_nothing_is_no_reason_to_stop(sharp_llama, tmp_path, cache, capfd):
    cache.write_text("in the way")
    run, examples = start(recipe("dpo", sharp_llama, tmp_path))
    assert len(reference.score_reference(run, examples)) == len(examples)
    assert "not written" in capfd.readouterr().err


def test_nothing_is_scored_of_nothing(sharp_llama, tmp_path):
    run, _ = start(recipe("dpo", sharp_llama, tmp_path))
    assert reference.score_reference(run, []) == []
