"""Prove on a GPU what a CPU cannot: `make gpu`, or `make gpu PART=kernels` for one part.

    kernels   their tests on the GPU, in bf16, fp16 and fp32, on inputs of a fresh seed and in
              memory that holds NaN, against fp64; errors as bench/accuracy.py has them
    bench     the benchmarks, beside every peer that is installed
    train     steps of CUT and SELF-JUDGE on a model of a real width (bench/train_step.py)
    sanitize  compute-sanitizer over the smallest case of each kernel

A part leaves bench/results/<GPU>-<part>.json (another folder: OUT=...), which says device, driver,
torch, triton and commit, what was run and what was skipped, and why, and beside it all that it
printed (.log).  It runs on what is installed and needs no network; wheels that are missing can be
put beside it (WHEELS=folder).  Each part has a time limit, nine minutes in all; what a part has by
then is kept, and the part counts as incomplete.

Without a GPU the kernels are compiled for all cards instead.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Seconds, 490 in all: ending what has not ended takes some more.
LIMITS = {"kernels": 140, "bench": 130, "train": 150, "sanitize": 70}
# What a part does not start without, besides torch and triton.
NEEDS = {
    "kernels": ("pytest",),
    "bench": ("pytest", "pytest_benchmark"),
    "train": ("deepspeed", "transformers", "peft", "datasets", "pydantic", "pybind11"),
    "sanitize": (),
}
TESTS = ("test_linear_logprob.py", "test_logits_logprob.py", "test_loss_ops.py")
PEERS = ("liger_kernel", "cut_cross_entropy", "quack", "trl", "vllm", "flash_attn")


class Skipped(Exception):
    """A part cannot run here; the message is why."""


class Runner:
    """Runs commands of one part within its time."""

    def __init__(self, part: str, environment: dict[str, str]) -> None:
        self.environment = environment
        self.limit = LIMITS[part]
        self.ends = time.monotonic() + self.limit
        self.skipped: list[str] = []
        self.commands: list[str] = []
        self.statuses: list[int | None] = []
        self.log: list[str] = []

    def __call__(self, *command: str | Path, **environment: str) -> tuple[int | None, str]:
        """Exit status (None: out of time) and output, which is also shown."""
        words = [str(word) for word in command]
        settings = [f"{k}={v}" for k, v in environment.items()]
        self.commands.append(shlex.join([*settings, *relative(words)]))
        print(f"$ {self.commands[-1]}", flush=True)
        left = self.ends - time.monotonic()
        if left <= 0:
            self.statuses.append(None)
            self.skipped.append(f"{self.commands[-1]}: {self.limit} s were over")
            return None, ""
        process = subprocess.Popen(
            words,
            cwd=ROOT,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            # A job in the background ignores it, and so would what it starts: see _stop.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        try:
            output, _ = process.communicate(timeout=left)
            status: int | None = process.returncode
        except subprocess.TimeoutExpired:
            status, output = None, self._stop(process)
            self.skipped.append(f"what was left after {self.limit} s: {self.commands[-1]}")
        self.statuses.append(status)
        self.log += [f"$ {self.commands[-1]}", output, f"exit status {status}", ""]
        print("\n".join(output.splitlines()[-60:]), flush=True)
        return status, output

    @property
    def outcome(self) -> str:
        """ "passed", "failed" or "incomplete"."""
        if any(self.statuses):
            return "failed"
        return "incomplete" if None in self.statuses else "passed"

    @staticmethod
    def _stop(process: subprocess.Popen[str]) -> str:
        """End a command so that it can still write what it has."""
        for number in (signal.SIGINT, signal.SIGKILL):
            os.killpg(process.pid, number)
            try:
                return process.communicate(timeout=8)[0]
            except subprocess.TimeoutExpired:
                continue
        return ""


def relative(words: Iterable[str]) -> list[str]:
    """A command without this machine's folders."""
    names = {sys.executable: "python", str(ROOT) + "/": "", tempfile.gettempdir() + "/": ""}
    return [
        next((word.replace(k, v) for k, v in names.items() if k in word), word) for word in words
    ]


# ------------------------------------------------------------------------------------- the parts


def kernels(run: Runner, folder: Path) -> dict[str, Any]:
    seed = str(secrets.randbelow(10**6))
    # Without it cuBLAS may add in another order from call to call.
    common = {"FASTALIGN_SEED": seed, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    parallel = ["-n", "6"] if importlib.util.find_spec("xdist") else []
    pytest = [sys.executable, "-m", "pytest", "-q", "--tb=short", *parallel]
    tests = [f"tests/{name}" for name in TESTS]
    report = folder / "triton.xml"
    status, _ = run(*pytest, f"--junitxml={report}", *tests, FASTALIGN_IMPL="triton", **common)
    # One process reports the test that it was interrupted in; workers do not.
    whole = status is not None or bool(parallel)
    results = {"seed": int(seed), "triton": counted(report, whole)}
    # fp64 goes there, and whoever asks for it.
    report = folder / "torch.xml"
    chosen = "within_twice or against_fp64 or gradcheck or gaps or confident"
    environment = {"FASTALIGN_IMPL": "torch", "FASTALIGN_DEVICE": "cuda"}
    status, _ = run(*pytest, f"--junitxml={report}", "-k", chosen, *tests, **environment, **common)
    results["torch"] = counted(report, status is not None or bool(parallel))
    errors = folder / "errors.json"
    status, _ = run(sys.executable, "bench/accuracy.py", errors)
    results["errors"] = json.loads(errors.read_text()) if status == 0 else None
    return results


def counted(report: Path, whole: bool = True) -> dict[str, Any]:
    """Passed, skipped by reason, and why others failed, of a JUnit file; one that is not whole ends
    with a test that was interrupted."""
    found: dict[str, Any] = {"passed": 0, "skipped": {}, "failed": {}}
    if not report.is_file():
        return found
    cases = list(ElementTree.parse(report).iter("testcase"))
    for case in cases if whole else cases[:-1]:
        name = f"{case.get('classname')}::{case.get('name')}"
        problems = [*case.findall("failure"), *case.findall("error")]
        if problems:
            found["failed"][name] = (problems[0].get("message") or "").split("\n")[0][:300]
        elif (skip := case.find("skipped")) is not None:
            reason = skip.get("message") or ""
            found["skipped"][reason] = found["skipped"].get(reason, 0) + 1
        else:
            found["passed"] += 1
    return found


def bench(run: Runner, folder: Path) -> dict[str, Any]:
    import report

    path = folder / "all.json"
    pytest = [sys.executable, "-m", "pytest", "-q", "--tb=short"]
    files = ("bench/test_linear_logprob.py", "bench/test_losses.py")
    run(*pytest, *files, "--benchmark-json", path)
    if not path.is_file() or not path.stat().st_size:
        return {"rows": []}
    result = report.reduce(json.loads(path.read_text(encoding="utf-8")))
    print(report.table(result))
    return {"rows": result["rows"]}


def train(run: Runner, folder: Path) -> dict[str, Any]:
    # Of this Python; another's may lie beside it.
    if not (ROOT / "fastalign" / f"_bridge{EXTENSION_SUFFIXES[0]}").exists():
        status, _ = run(sys.executable, "setup.py", "build_ext", "--inplace")
        if status != 0:
            return {"rows": []}
    if "vllm" not in installed():
        run.skipped.append("rollouts by vLLM, which is not installed: the embedded engine samples")
    path = folder / "train.json"
    run(sys.executable, "bench/train_step.py", path)
    return {"rows": json.loads(path.read_text("utf-8"))["rows"] if path.is_file() else []}


def sanitize(run: Runner, folder: Path) -> dict[str, Any]:
    tool = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if tool is None:
        raise Skipped("compute-sanitizer is not installed")
    # Compiles the kernels, which would take its time beside the checks as well.
    run(sys.executable, "bench/smallest.py")
    found: dict[str, Any] = {}
    for checks in ("memcheck", "racecheck"):
        _, output = run(
            tool,
            "--tool",
            checks,
            "--error-exitcode=9",
            sys.executable,
            "bench/smallest.py",
            PYTORCH_NO_CUDA_MEMORY_CACHING="1",
        )
        summary = re.findall(r"=+ ((?:ERROR|RACECHECK) SUMMARY: .*)", output)
        found[checks] = summary[-1] if summary else "not finished"
    return found


PARTS: dict[str, Callable[[Runner, Path], dict[str, Any]]] = {
    "kernels": kernels,
    "bench": bench,
    "train": train,
    "sanitize": sanitize,
}


# --------------------------------------------------------------------------------------- the run


def installed() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("torch", "triton", "transformers", "deepspeed", *PEERS):
        try:
            found[name] = version(name.replace("_", "-"))
        except PackageNotFoundError:
            continue
    return found


def describe() -> dict[str, Any]:
    """Device, driver, versions, and which sources were run."""
    import torch
    from racing import commit, told

    query = ("--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
    sources = hashlib.sha256()
    for path in sorted(ROOT.glob("kernels/fastalign_kernels/*.py")):
        sources.update(path.read_bytes())
    return {
        "device": torch.cuda.get_device_name(),
        "driver": told("nvidia-smi", *query) or "unknown",
        "cuda": torch.version.cuda,
        "commit": commit(),
        "kernel_sources": sources.hexdigest()[:16],
        "versions": installed(),
    }


def install(wheels: Path, target: Path) -> None:
    """Unpack wheels that lie beside the project, without their requirements."""
    found = sorted(wheels.glob("*.whl"))
    if not found:
        sys.exit(f"WHEELS={wheels}: no wheel lies there")
    quiet = ("--quiet", "--no-index", "--no-deps", "--no-compile", "--upgrade")
    command = [sys.executable, "-m", "pip", "install", *quiet, "--target", target, *found]
    subprocess.run(list(map(str, command)), check=True)
    sys.path.insert(0, str(target))


def without_a_gpu() -> int:
    print("no GPU was found, so nothing runs on one: the kernels are compiled for all cards")
    command = [sys.executable, "-m", "pytest", "-q", "tests/test_kernel_compile.py"]
    return subprocess.run(command, cwd=ROOT, env=environment([])).returncode


def environment(folders: Iterable[Path]) -> dict[str, str]:
    path = [ROOT, ROOT / "kernels", *folders, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="part", help=", ".join(PARTS))
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to use besides")
    arguments = parser.parse_args()
    unknown = [part for part in arguments.parts if part not in PARTS]
    if unknown:
        parser.error(f"PART={unknown[0]}: known are {', '.join(PARTS)}")
    import torch

    if not torch.cuda.is_available():
        return without_a_gpu()
    wanting = False
    with tempfile.TemporaryDirectory(prefix="fastalign-") as name:
        folder = Path(name)
        site = folder / "site"
        if arguments.wheels is not None:
            install(arguments.wheels, site)
        about = describe()
        arguments.out.mkdir(parents=True, exist_ok=True)
        for part in arguments.parts or PARTS:
            run = Runner(part, environment([site]))
            result = run_part(part, about, run, folder)
            device = re.sub(r"[^a-z0-9]+", "-", about["device"].lower().removeprefix("nvidia "))
            path = arguments.out / f"{device}-{part}.json"
            text = json.dumps(result, indent=1, allow_nan=False)
            path.write_text(text + "\n", encoding="utf-8")
            path.with_suffix(".log").write_text("\n".join(run.log), encoding="utf-8")
            print(f"{part}: {result['outcome']} in {result['seconds']} s: {path}", flush=True)
            for line in result["skipped"]:
                print(f"  skipped: {line}", flush=True)
            wanting |= result["outcome"] not in ("passed", "skipped")
    return 1 if wanting else 0


def run_part(part: str, about: dict[str, Any], run: Runner, folder: Path) -> dict[str, Any]:
    print(f"\n=== {part}", flush=True)
    started = time.monotonic()
    found: dict[str, Any] = {}
    missing = [name for name in NEEDS[part] if importlib.util.find_spec(name) is None]
    try:
        if missing:
            raise Skipped(f"{', '.join(missing)} not installed")
        found = PARTS[part](run, folder)
        outcome = run.outcome
    except Skipped as reason:
        run.skipped.append(f"all of it: {reason}")
        outcome = "skipped"
    except Exception as error:
        # The parts to come do not depend on this one.
        run.skipped.append(f"what came after {type(error).__name__}: {error}")
        outcome = "failed"
    return {
        "part": part,
        "outcome": outcome,
        **about,
        "seconds": round(time.monotonic() - started),
        "commands": run.commands,
        "skipped": run.skipped,
        **found,
    }


if __name__ == "__main__":
    sys.exit(main())
