"""Compiles the Triton kernels for cards that are not here, and reads what the compiler says.

python tests/kernel_compiler.py > docs/kernel-resources.md
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastalign_kernels import triton_head, triton_logits, triton_losses

# Target, tilings it takes, the most shared memory of a program in bytes, and what multiplies
# matrices.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), "sm_80", 163 << 10, "mma.sync"),
    "sm_86": (GPUTarget("cuda", 86, 32), "sm_80", 99 << 10, "mma.sync"),
    "sm_89": (GPUTarget("cuda", 89, 32), "sm_80", 99 << 10, "mma.sync"),
    "sm_90": (GPUTarget("cuda", 90, 32), "sm_90", 227 << 10, "wgmma.mma_async"),
    "sm_100": (GPUTarget("cuda", 100, 32), "sm_100", 227 << 10, "tcgen05.mma"),
    "sm_120": (GPUTarget("cuda", 120, 32), "sm_120", 99 << 10, "mma.sync"),
    "gfx942": (GPUTarget("hip", "gfx942", 64), "gfx942", 64 << 10, "v_mfma"),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# With a cap, a bias, an entropy and a bias's gradient, or none of them.
EXTRAS = ("HAS_BIAS", "HAS_CAP", "ENTROPY", "BIAS_GRAD")


@dataclass(frozen=True)
class Kernel:
    """A kernel as it is launched.

    Attributes:
        types: of arguments that are no pointers to fp32.
        constants: values of its constexprs.
        divisible: arguments found to be multiples of 16 at the launch, besides pointers.
        options: of the compiler.
    """

    function: Any
    types: dict[str, str]
    constants: dict[str, Any]
    divisible: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Compiled:
    """What a kernel takes on a card; spills in bytes (on gfx942 in registers)."""

    registers: int
    spills: int
    shared_memory: int
    matrix_instructions: dict[str, int]
    text: str
    ttir: str
    ttgir: str


def kernels() -> Iterator[tuple[str, str, str]]:
    """(kernel, dtype, variant) of all that are shipped."""
    for name in ("reduce_kernel", "exp_kernel", "grad_kernel", "target_kernel"):
        for dtype, variant in (
            ("bf16", "plain"),
            ("bf16", "extras"),
            ("fp16", "plain"),
            ("fp32", "extras"),
        ):
            yield name, dtype, variant
    for name in ("log_odds_kernel", "log_odds_backward_kernel"):
        for dtype, variant in (
            ("bf16", "plain"),
            ("bf16", "odd"),
            ("bf16", "extras"),
            ("bf16", "extras odd"),
            ("fp16", "plain"),
            ("fp32", "extras"),
            ("fp32", "extras odd"),
        ):
            yield name, dtype, variant
    for name in ("cut_kernel", "cut_grad_kernel", "pair_kernel", "pair_grad_kernel"):
        yield name, "fp32", "plain"


def describe(name: str, target: str, dtype: str, variant: str) -> Kernel:
    if hasattr(triton_head, name):
        return _head_kernel(getattr(triton_head, name), TARGETS[target][1], dtype, variant)
    if hasattr(triton_logits, name):
        return _logits_kernel(getattr(triton_logits, name), target, dtype, variant)
    return _loss_kernel(getattr(triton_losses, name))


def _head_kernel(function: Any, family: str, dtype: str, variant: str) -> Kernel:
    extras = variant == "extras"
    tiling = triton_head.tiling_for(DTYPES[dtype], family, extras)
    blocks = {
        "h": (tiling.rows, tiling.depth),
        "w": (tiling.columns, tiling.depth),
        "out": (tiling.rows, tiling.columns),
    }
    plain = function.__name__ == "target_kernel"
    types = dict.fromkeys(blocks, f"*{dtype}")
    if tiling.tma and not plain:
        types = {name: f"tensordesc<{dtype}[{r},{c}]>" for name, (r, c) in blocks.items()}
    types |= {"bias": f"*{dtype}", "target": "*i64", "softcap": "fp32", "temperature": "fp32"}
    types |= dict.fromkeys(("n", "start", "end", "vocab", "depth"), "i32")
    types |= dict.fromkeys(("h_stride", "w_stride", "out_stride"), "i32")
    constants = {
        **dict.fromkeys(EXTRAS, extras),
        "TMA": tiling.tma,
        "BN": 32 if plain else tiling.rows,
        "BV": tiling.columns,
        "BK": 64 if plain else tiling.depth,
        "GROUP": tiling.group,
    }
    if not extras:
        constants["bias"] = None
    options = {"num_warps": tiling.num_warps, "num_stages": tiling.num_stages}
    # As real sizes and strides are.
    divisible = ("start", "end", "vocab", "depth", "h_stride", "w_stride", "out_stride")
    return Kernel(function, types, constants, divisible, {} if plain else options)


def _logits_kernel(function: Any, target: str, dtype: str, variant: str) -> Kernel:
    """ "odd": V and the distance of rows are multiples of nothing."""
    types = dict.fromkeys(("logits", "out"), f"*{dtype}") | {"target": "*i64"}
    types |= dict.fromkeys(("row_stride", "out_stride", "vocab", "ignore_index"), "i32")
    types |= dict.fromkeys(("softcap", "temperature"), "fp32")
    constants = {
        **dict.fromkeys(EXTRAS, "extras" in variant),
        "DEPTH": triton_logits.DEPTH,
        "LANES": triton_logits.LANES,
    }
    divisible = () if "odd" in variant else ("row_stride", "out_stride", "vocab")
    # 256 threads either way.
    options = {"num_warps": 256 // TARGETS[target][0].warp_size}
    return Kernel(function, types, constants, divisible, options)


def _loss_kernel(function: Any) -> Kernel:
    types = dict.fromkeys(("cu", "cu_tokens", "cu_judged"), "*i64") | {"flagged": "*i1"}
    types |= dict.fromkeys(("records", "pairs"), "i32")
    numbers = ("log_lambda", "log_min_judged", "alpha", "gamma", "negative_weight")
    types |= dict.fromkeys((*numbers, "beta", "smoothing"), "fp32")
    constants = {
        "MEAN": True,
        "MISALIGN": True,
        "LOSS": 0,
        "NORMALIZED": True,
        "BLOCK": triton_losses.BLOCK,
    }
    return Kernel(function, types, constants, (), {"num_warps": triton_losses.WARPS})


@cache
def compile_kernel(name: str, target_name: str, dtype: str, variant: str) -> Compiled:
    kernel = describe(name, target_name, dtype, variant)
    names = kernel.function.arg_names
    constants = {k: v for k, v in kernel.constants.items() if k in names}
    types = {n: kernel.types.get(n, "*fp32") for n in names}
    pointers = [n for n in names if n not in constants and types[n].startswith("*")]
    divisible = [n for n in (*pointers, *kernel.divisible) if n in names and n not in constants]
    source = ASTSource(
        kernel.function,
        signature={n: "constexpr" if n in constants else types[n] for n in names},
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in divisible},
    )
    target = TARGETS[target_name][0]
    options = {**kernel.options, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=target, options=options)
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        # Scalar registers that do not fit are kept in lanes of vector ones, which costs no memory.
        spills = sum(map(int, re.findall(r"\.vgpr_spill_count:\s+(\d+)", text)))
        registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])
    else:
        text = compiled.asm["ptx"]
        registers, spills = _assembled(text)
    matrix = {m: text.count(m) for *_, m in TARGETS.values()}
    return Compiled(
        registers=registers,
        spills=spills,
        shared_memory=compiled.metadata.shared,
        matrix_instructions={name: count for name, count in matrix.items() if count},
        text=text,
        ttir=compiled.asm["ttir"],
        ttgir=compiled.asm["ttgir"],
    )


def _assembled(ptx: str) -> tuple[int, int]:
    """Registers and spilled bytes, from the assembler that comes with triton."""
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    architecture = re.search(r"\.target (\w+)", ptx)[1]
    newest = folder / "ptxas-blackwell"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        report = subprocess.run(
            [
                newest if newest.exists() else folder / "ptxas",
                "-v",
                f"-arch={architecture}",
                file.name,
                "-o",
                os.devnull,
            ],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", report)
    return int(re.search(r"Used (\d+) registers", report)[1]), sum(map(int, spills))


# ------------------------------------------------------------------------------------- the table

HEADER = f"""# What each kernel takes

Registers of a thread / spilled bytes / KiB of shared memory / matrix instructions, as the compiler
of triton {triton.__version__} has them at the configuration that is shipped. Written by
`python tests/kernel_compiler.py > docs/kernel-resources.md`; `make test` compiles them all again
and holds them to this table where the version of triton is the same. "extras" are a cap, a bias, an
entropy and the gradient of a bias, "odd" a vocabulary that is a multiple of nothing.

"""


def cell(compiled: Compiled) -> str:
    matrix = " ".join(f"{n} {name}" for name, n in compiled.matrix_instructions.items()) or "none"
    shared = f"{compiled.shared_memory / 1024:.3g}"
    return f"{compiled.registers} / {compiled.spills} / {shared} / {matrix}"


def row(name: str, dtype: str, variant: str) -> str:
    cells = (cell(compile_kernel(name, target, dtype, variant)) for target in TARGETS)
    return f"| {name}, {dtype}, {variant} | {' | '.join(cells)} |"


def table() -> str:
    columns = " | ".join(TARGETS)
    rows = [row(*kernel) for kernel in kernels()]
    return f"{HEADER}| kernel | {columns} |\n{'| --- ' * (len(TARGETS) + 1)}|\n" + "\n".join(rows)


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")
