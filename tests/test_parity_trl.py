"""A few steps of DPO and SFT beside TRL's trainers; bench/parity_trl.py holds the long run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support import outside_environment

pytest.importorskip("trl")

SCRIPT = Path(__file__).parents[1] / "bench" / "parity_trl.py"


def test_steps_match_trl(sharp_llama: Path, tmp_path: Path) -> None:
    output = tmp_path / "parity.json"
    # One thread: two processes of a busy machine would wait for each other's.
    process = subprocess.run(
        [sys.executable, SCRIPT, "--model", sharp_llama, "--steps", "3", "--output", output],
        env=outside_environment(),
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-4000:]
    report = json.loads(output.read_text(encoding="utf-8"))
    assert output.with_suffix(".png").stat().st_size > 0

    assert set(report["runs"]) == {"dpo", "sft"}
    for run in report["runs"].values():
        assert all(row["within"] for row in run["deviations"].values()), run["deviations"]
        # What is claimed to be compared has happened.
        ours = run["curves"]["fastalign"]
        assert ours["learning_rate"][0] == 0 < ours["learning_rate"][2] < ours["learning_rate"][1]
        assert run["clipped_steps"] > 0
        assert run["fastalign"]["packs_of_a_step"][0] > 1
        assert run["fastalign"]["sequences_of_a_pack"][1] > 1
        shortest, longest = run["tokens"]["tokens_of_a_sequence"]
        assert shortest < longest
    # The third step is the first with other weights than the reference's.
    assert abs(report["runs"]["dpo"]["curves"]["fastalign"]["rewards/margins"][2]) > 100 * 1e-4
