"""`make gpu` where there is no GPU, and what of its parts runs on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import gpu
import pytest

ROOT = Path(__file__).parents[1]


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "bench")))
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
    )


def runner(limit: float, monkeypatch: pytest.MonkeyPatch) -> gpu.Runner:
    monkeypatch.setitem(gpu.LIMITS, "kernels", limit)
    return gpu.Runner("kernels", dict(os.environ))


def test_an_unknown_part_is_named():
    done = run("bench/gpu.py", "kernel")
    assert done.returncode == 2
    assert "PART=kernel: known are kernels, bench, train, sanitize" in done.stderr


def test_without_a_gpu_the_kernels_are_compiled(monkeypatch, capsys):
    commands = []

    def pretend(command, **_):
        commands.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(gpu.subprocess, "run", pretend)
    assert gpu.without_a_gpu() == 0
    assert "no GPU" in capsys.readouterr().out
    assert commands[0][-1] == "tests/test_kernel_compile.py"
    assert (ROOT / commands[0][-1]).is_file()


def test_a_command_out_of_time_keeps_what_it_has(tmp_path, monkeypatch):
    """pytest, interrupted, still writes its report."""
    tests = tmp_path / "test_slow.py"
    tests.write_text("import time\ndef test_a(): pass\ndef test_b(): time.sleep(60)\n")
    run = runner(8, monkeypatch)
    report = tmp_path / "report.xml"
    pytest_command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    status, _ = run(*pytest_command, f"--junitxml={report}", f"--rootdir={tmp_path}", tests)
    assert status is None
    assert gpu.counted(report, whole=False)["passed"] == 1
    assert len(run.skipped) == 1 and "left after 8 s" in run.skipped[0]
    assert run(sys.executable, "-c", "print('never')") == (None, "")
    assert "8 s were over" in run.skipped[1] and run.outcome == "incomplete"


@pytest.mark.parametrize(
    ("statuses", "outcome"),
    [([0, 0], "passed"), ([0, 1, None], "failed"), ([0, None, 0], "incomplete"), ([5], "failed")],
)
def test_what_becomes_of_a_part(statuses, outcome, monkeypatch):
    run = runner(9, monkeypatch)
    run.statuses = statuses
    monkeypatch.setitem(gpu.NEEDS, "kernels", ())
    monkeypatch.setitem(gpu.PARTS, "kernels", lambda run, folder: {"seed": 1})
    result = gpu.run_part("kernels", {"device": "a card"}, run, Path())
    assert result["outcome"] == outcome and result["seed"] == 1


def test_an_error_of_one_part_is_kept_from_the_others(monkeypatch):
    monkeypatch.setitem(gpu.NEEDS, "kernels", ())
    monkeypatch.setitem(gpu.PARTS, "kernels", lambda run, folder: json.loads("{"))
    result = gpu.run_part("kernels", {}, runner(9, monkeypatch), Path())
    assert result["outcome"] == "failed" and "JSONDecodeError" in result["skipped"][0]


def test_a_machine_without_git_or_nvidia_smi(monkeypatch):
    import racing

    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("FASTALIGN_COMMIT", raising=False)
    assert racing.told("git", "status") == "" and racing.commit() == "unknown"
    monkeypatch.setenv("FASTALIGN_COMMIT", "abc")
    assert racing.commit() == "abc"


def test_what_pytest_reports_is_counted(tmp_path):
    tests = tmp_path / "test_three.py"
    tests.write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert False\n"
        "def test_left_out(): pytest.skip('no such card')\n"
    )
    report = tmp_path / "report.xml"
    run("-m", "pytest", "-q", f"--junitxml={report}", f"--rootdir={tmp_path}", str(tests))
    found = gpu.counted(report)
    assert found["passed"] == 1 and found["skipped"] == {"no such card": 1}
    ((name, message),) = found["failed"].items()
    assert name.endswith("::test_bad") and message == "assert False"
    assert gpu.counted(tmp_path / "none.xml")["passed"] == 0


def test_commands_name_no_folder_of_the_machine(tmp_path):
    words = [sys.executable, "bench/gpu.py", str(ROOT / "x"), f"--junitxml={ROOT}/y"]
    assert gpu.relative(words) == ["python", "bench/gpu.py", "x", "--junitxml=y"]


@pytest.mark.parametrize("part", gpu.PARTS)
def test_a_part_that_lacks_something_says_so(part, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(gpu.shutil, "which", lambda *_, **__: None)
    result = gpu.run_part(part, {"device": "a card"}, gpu.Runner(part, {}), tmp_path)
    assert result["outcome"] == "skipped" and "not installed" in result["skipped"][0]
    assert result["device"] == "a card" and result["part"] == part


def test_wheels_beside_the_project(tmp_path):
    with pytest.raises(SystemExit, match="no wheel lies there"):
        gpu.install(tmp_path, tmp_path / "site")


def test_the_smallest_cases_run_every_kernel():
    script = """
import fastalign_kernels.triton_head as head
import fastalign_kernels.triton_logits as logits
import fastalign_kernels.triton_losses as losses
import smallest

launched, known = set(), set()

class Watched:
    def __init__(self, name, kernel):
        self.name, self.kernel = name, kernel

    def __getitem__(self, grid):
        launched.add(self.name)
        return self.kernel[grid]

for module in (head, logits, losses):
    for name in dir(module):
        if name.endswith("_kernel"):
            known.add(name)
            setattr(module, name, Watched(name, getattr(module, name)))
smallest.main()
assert len(known) == 10 and launched == known, known - launched
"""
    done = run("-c", script, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr


def test_training_steps_are_measured(tmp_path):
    """At a tiny size; on a GPU at a real one."""
    import train_step

    path = tmp_path / "train.json"
    done = run("bench/train_step.py", str(path))
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    cut, self_judge = result["rows"]
    assert cut["method"] == "cut" and cut["engine"] is None
    assert self_judge["engine"] == "vllm" and self_judge["time/rollout"] > 0
    for row in result["rows"]:
        parts = [v for k, v in row.items() if k in ("time/forward", "time/backward")]
        assert 0 < sum(parts) <= 1.5 * row["time/step"]
        assert row["speed/tflops"] > 0 and row["speed/peak_memory_gib"] > 0
    assert "time/reference" in self_judge and "time/reference" not in cut
    assert "self-judge" in train_step.table(result)
