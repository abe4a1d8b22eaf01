"""Compiles the Triton kernels for cards that are not here, and reads what the compiler says."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

# Read when triton is imported: what it did when the kernels were written, and will cease to do.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastalign_kernels import triton_head
from fastalign_kernels.triton_head import Tiling, tiling_for

# Target, tilings it takes, and the most shared memory of a program in bytes.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), "sm_80", 163 << 10),
    "sm_86": (GPUTarget("cuda", 86, 32), "sm_80", 99 << 10),
    "sm_89": (GPUTarget("cuda", 89, 32), "sm_80", 99 << 10),
    "sm_90": (GPUTarget("cuda", 90, 32), "sm_90", 227 << 10),
    "sm_100": (GPUTarget("cuda", 100, 32), "sm_90", 227 << 10),
    "sm_120": (GPUTarget("cuda", 120, 32), "sm_120", 99 << 10),
    "gfx942": (GPUTarget("hip", "gfx942", 64), "gfx942", 64 << 10),
}
KERNELS = ("reduce_kernel", "exp_kernel", "grad_kernel", "target_kernel")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
VARIANTS = {
    "plain": {"HAS_BIAS": False, "HAS_CAP": False, "ENTROPY": False, "BIAS_GRAD": False},
    "all": {"HAS_BIAS": True, "HAS_CAP": True, "ENTROPY": True, "BIAS_GRAD": True},
}


@dataclass(frozen=True)
class Compiled:
    """What one kernel takes on one card; None where the compiler does not say."""

    registers: int | None
    spills: int | None
    shared_memory: int
    matrix_instructions: dict[str, int]
    bulk_copies: int
    ttgir: str


def compile_kernel(kernel: str, target_name: str, dtype: str, variant: str) -> Compiled:
    target, family, _ = TARGETS[target_name]
    tiling = tiling_for(DTYPES[dtype], family, variant == "all")
    function = getattr(triton_head, kernel)
    source = ASTSource(function, **_signature(function, tiling, dtype, VARIANTS[variant]))
    options = {"num_warps": tiling.num_warps, "num_stages": tiling.num_stages}
    if kernel == "target_kernel":
        options = {}
    compiled = triton.compile(source, target=target, options=options)
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        spills = [int(x) for x in re.findall(r"\.(?:vgpr|sgpr)_spill_count:\s+(\d+)", text)]
        registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])
        instructions = {"mfma": len(re.findall(r"v_mfma", text))}
        copies = 0
    else:
        text = compiled.asm["ptx"]
        registers, spills = _assembled(text)
        instructions = {
            name: text.count(name) for name in ("wgmma.mma_async", "tcgen05.mma", "mma.sync")
        }
        copies = text.count("cp.async")
    return Compiled(
        registers=registers,
        spills=sum(spills),
        shared_memory=compiled.metadata.shared,
        matrix_instructions={k: v for k, v in instructions.items() if v},
        bulk_copies=copies,
        ttgir=compiled.asm["ttgir"],
    )


def _signature(function: triton.JITFunction, tiling: Tiling, dtype: str, flags: dict) -> dict:
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
        **flags,
        "TMA": tiling.tma,
        "BN": 32 if plain else tiling.rows,
        "BV": tiling.columns,
        "BK": 64 if plain else tiling.depth,
        "GROUP": tiling.group,
    }
    if not flags["HAS_BIAS"]:
        constants["bias"] = None
    names = function.arg_names
    # What a launch finds out about its arguments: multiples of 16, as real sizes and buffers are.
    divisible = [
        n for n in names if n not in constants and n not in ("n", "softcap", "temperature")
    ]
    return {
        "signature": {n: "constexpr" if n in constants else types.get(n, "*fp32") for n in names},
        "constexprs": {(i,): constants[n] for i, n in enumerate(names) if n in constants},
        "attrs": {
            (names.index(n),): [["tt.divisibility", 16]]
            for n in divisible
            if not types.get(n, "*").startswith("tensordesc")
        },
    }


def _assembled(ptx: str) -> tuple[int, list[int]]:
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
    return int(re.search(r"Used (\d+) registers", report)[1]), [int(x) for x in spills]
