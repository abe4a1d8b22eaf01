"""A few of the kills that `make faults` makes many of."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from support import TESTS, outside_environment

KILLS = 3


@pytest.mark.slow
def test_runs_that_are_killed_end_as_those_that_are_not(sharp_llama, tmp_path):
    """CUT under ZeRO-3 on two ranks, SELF-JUDGE on one: bitwise, wherever SIGKILL falls."""
    names = ["cut-online-hf-2", "self-judge-hf-1"]
    path = tmp_path / "faults.json"
    command = [sys.executable, TESTS / "faults.py", "--kills", KILLS, "--only", *names]
    command += ["--model", sharp_llama, "--folder", tmp_path / "runs", "--output", path]
    done = subprocess.run(
        list(map(str, command)), env=outside_environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(path.read_text())["combinations"]
    assert [(name, found[name]["kills"], found[name]["failures"]) for name in names] == [
        (name, KILLS, []) for name in names
    ]
