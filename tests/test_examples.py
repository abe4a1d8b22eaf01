"""The losses in loops of one's own: examples/, run as a reader runs them, train as the trainer
does on the same tokens."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import EXAMPLES, outside_environment, recipe, rows, start, write_rows
from transformers import AutoTokenizer

import fastalign.train as loop
from fastalign.config import DatasetConfig
from fastalign.data import Example, Stream

pytestmark = pytest.mark.usefixtures("quiet_process")

RATE, BATCH, STEPS = 1e-3, 4, 3


def losses(*command: Any) -> list[float]:
    """What an example prints for each step, in a process of its own."""
    done = subprocess.run(
        [sys.executable, *map(str, command), "--learning-rate", str(RATE)],
        env=outside_environment(ACCELERATE_USE_CPU="true"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("step ")]
    assert [int(words[1]) for words in lines] == list(range(1, STEPS + 1))
    return [float(words[3]) for words in lines]


def trained(method: str, model: Path, folder: Path, examples: list[Example]) -> list[float]:
    """Losses of the trainer's own steps on these examples, in their order."""
    run, _ = start(
        recipe(method, model, folder, learning_rate=RATE, lr_scheduler_type="constant", cut={})
    )
    found = []
    for step in range(STEPS):
        batch = examples[step * BATCH : (step + 1) * BATCH]
        found.append(loop.update(run, batch, float(step), STEPS)["loss"])
    # The three are no three times the same.
    assert len({round(loss, 4) for loss in found}) == STEPS
    return found


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """examples/plain_transformers.py as a module, as the other examples import it."""
    monkeypatch.syspath_prepend(EXAMPLES)
    import plain_transformers

    yield plain_transformers
    del sys.modules["plain_transformers"]


def test_cut_in_a_bare_loop_and_under_trl_trains_as_the_trainer_does(plain, sharp_llama, tmp_path):
    data = write_rows(tmp_path / "judged.jsonl", rows("judged", BATCH * STEPS))
    examples = []
    for record in plain.read(data, AutoTokenizer.from_pretrained(sharp_llama)):
        prompts = {"plain": record.prompt, "judged": record.judged_prompt}
        streams = [
            Stream.of(role, torch.tensor(ids).numpy(), torch.tensor(record.completion).numpy())
            for role, ids in prompts.items()
            if ids is not None
        ]
        examples.append(Example(tuple(streams), 1.0, "example"))
    assert {len(example.streams) for example in examples} == {1, 2}
    expected = trained("cut", sharp_llama, tmp_path, examples)
    alone = losses(EXAMPLES / "plain_transformers.py", sharp_llama, data)
    assert alone == pytest.approx(expected, rel=1e-4)
    pytest.importorskip("trl")
    assert losses(EXAMPLES / "trl_cut.py", sharp_llama, data) == pytest.approx(alone, rel=1e-5)


def test_dpo_under_accelerate_trains_as_the_trainer_does(plain, sharp_llama, tmp_path):
    accelerate_loop = pytest.importorskip("accelerate") and __import__("accelerate_loop")
    data = write_rows(tmp_path / "pairs.jsonl", rows("preference", BATCH * STEPS))
    command = (EXAMPLES / "accelerate_loop.py", sharp_llama, data)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    two = losses(*torchrun, *command)

    examples = []
    for prompt, *both in accelerate_loop.read(data, AutoTokenizer.from_pretrained(sharp_llama)):
        streams = [
            Stream.of(role, torch.tensor(prompt).numpy(), torch.tensor(ids).numpy())
            for role, ids in zip(("chosen", "rejected"), both, strict=True)
        ]
        examples.append(Example(tuple(streams), 1.0, "example"))
    run, _ = start(recipe("dpo", sharp_llama, tmp_path / "scored"))
    scored = loop.score_reference(run, examples)
    assert two == pytest.approx(trained("dpo", sharp_llama, tmp_path, scored), rel=1e-4)


# --------------------------------------------------------------------------- code in the pages

DOCS = EXAMPLES.parent / "docs"


def blocks(page: str) -> list[tuple[str, str]]:
    """(title, code) of each block of Python."""
    fence = r'^```python(?: title="(.*?)")?\n(.*?)^```$'
    return re.findall(fence, (DOCS / page).read_text("utf-8"), re.M | re.S)


def test_what_the_page_on_losses_shows_is_what_it_says():
    nll, dpo, cut = ({} for _ in range(3))
    for (_, code), here in zip(blocks("losses.md"), (nll, dpo, cut), strict=True):
        exec(code, here)
    assert float(nll["loss"].detach()) == 3.0
    assert nll["logprob"].grad.tolist() == pytest.approx([-1 / 3] * 3 + [-1 / 2] * 2)
    margin = 0.1 * ((-6.0 + 7.0) - (-2.0 + 1.5))
    assert float(dpo["result"].losses.detach()) == pytest.approx(math.log1p(math.exp(-margin)))
    assert cut["result"].flagged.tolist() == [True, True, False, False, False]
    assert cut["plain"].grad.abs().min() > 0 and cut["judged"].grad.abs().min() > 0


def test_the_files_of_the_page_on_extending_are_methods_and_judges(tiny_llama, tmp_path):
    files = dict(blocks("extending.md"))
    assert set(files) == {"simpo.py", "whole.py", "best.py", "rules.py", "batched.py"}
    # As in examples/, but for the docstring that says how to run it.
    body = files.pop("simpo.py").partition("class SimPO")[2]
    assert (EXAMPLES / "simpo.py").read_text().endswith(body)
    for name, code in files.items():
        (tmp_path / name).write_text(code)

    whole = recipe(f"{tmp_path}/whole.py:Whole", tiny_llama, tmp_path)
    data = write_rows(tmp_path / "completion.jsonl", rows("completion", 8))
    whole = whole.model_copy(update={"datasets": (DatasetConfig(path=str(data)),), "max_steps": 2})
    before = loop.train(whole)
    assert before["nll"] == pytest.approx(before["loss"], rel=0.5) and before["loss"] > 0

    sizes = {"iterations": 1, "prompts_per_iteration": 4, "num_generations": 3}
    for judge in ("rules.py:shorter", "batched.py:Shorter"):
        best = recipe(
            f"{tmp_path}/best.py:Best", tiny_llama, tmp_path / judge.replace(":", "-"),
            online=sizes, judge=f"{tmp_path}/{judge}",
        )  # fmt: skip
        loop.train(best)
        (log,) = Path(best.output_dir, "episodes").glob("0000.jsonl")
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        assert any(line["kept"] for line in lines)
        for line in lines:
            texts = line["completions"]
            for kept in line["kept"]:
                assert len(texts[kept]) == min(map(len, texts))
