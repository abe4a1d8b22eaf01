"""deploy/slurm.sbatch with commands that stand in for Slurm's, over a real run: what it does with
the signal and the exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import rows, write_rows

SCRIPT = Path(__file__).resolve().parents[1] / "deploy" / "slurm.sbatch"
STAND_INS = {
    # One node: the command itself, to which a signal to srun is passed on.
    "srun": 'shift; exec "$@"',
    "scontrol": 'case $1 in show) echo 127.0.0.1;; *) echo "$@" >> scontrol.log;; esac',
    "fastalign": f'exec {sys.executable} -m fastalign "$@"',
}


@pytest.fixture
def job(tmp_path: Path) -> dict[str, str]:
    """The environment of a job on one node."""
    for name, body in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"JOB_ID": "7", "NNODES": "1", "NODEID": "0", "GPUS_ON_NODE": "1"}
    return (
        os.environ
        | {f"SLURM_{name}": value for name, value in slurm.items()}
        | {"SLURM_JOB_NODELIST": "here", "RECIPE": "recipe.yaml", "OMP_NUM_THREADS": "1"}
        | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    )


def test_a_job_that_is_stopped_goes_back_into_the_queue(tiny_llama, tmp_path, job):
    data = write_rows(tmp_path / "rows.jsonl", rows("completion", 8))
    (tmp_path / "recipe.yaml").write_text(
        f"{{method: sft, model_name_or_path: '{tiny_llama}', datasets: [{{path: '{data}'}}], "
        "output_dir: out, dtype: float32, num_train_epochs: 1000000, report_to: [], zero_stage: 0}"
    )
    run = subprocess.Popen(
        ["bash", SCRIPT], cwd=tmp_path, env=job, stderr=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "out" / "metrics.jsonl"
    try:
        wait_for(lambda: metrics.exists() and metrics.read_text(), run)
        os.kill(run.pid, signal.SIGTERM)  # to the script alone, as --signal=B: has it
        said = run.communicate(timeout=120)[1]
    finally:
        run.kill()
    assert run.returncode == 75, said
    assert (tmp_path / "scontrol.log").read_text() == "requeue 7\n"
    assert list((tmp_path / "out").glob("checkpoint-*"))


def test_a_job_with_a_mistake_does_not_go_back(tmp_path, job):
    done = subprocess.run(["bash", SCRIPT], cwd=tmp_path, env=job, capture_output=True, text=True)
    assert done.returncode == 2
    assert "recipe.yaml: no such recipe" in done.stderr
    assert not (tmp_path / "scontrol.log").exists()


def wait_for(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.communicate()[1]
        time.sleep(0.1)
