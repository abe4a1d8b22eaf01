"""profile: a trace and a table of the steps that were asked for."""

from __future__ import annotations

import gzip
import json

import pytest
from support import recipe

from fastalign.train import train


@pytest.mark.parametrize(("steps", "covered"), [(2, 2), (50, 3)])
def test_the_steps_behind_the_first_are_traced(tiny_llama, tmp_path, capfd, steps, covered):
    config = recipe("sft", tiny_llama, tmp_path, max_steps=4, profile={"steps": steps})
    train(config)
    folder = tmp_path / config.output_dir / "profile"
    assert f"profile of {covered} steps: {folder}/trace-0.json.gz" in capfd.readouterr().err
    with gzip.open(folder / "trace-0.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    updates = [e for e in events if str(e.get("name", "")).startswith("Optimizer.step#")]
    # torch marks a subclass's step and the one within it, once its base class was ever used alone.
    ended, counted = 0.0, 0
    for update in sorted(updates, key=lambda e: e["ts"]):
        counted += update["ts"] >= ended
        ended = max(ended, update["ts"] + update["dur"])
    assert counted == covered
    assert "aten::mm" in (folder / "table-0.txt").read_text()


def test_a_run_that_ends_before_writes_nothing(tiny_llama, tmp_path):
    config = recipe("sft", tiny_llama, tmp_path, max_steps=1, profile={"skip": 1})
    train(config)
    assert not (tmp_path / config.output_dir / "profile").exists()
