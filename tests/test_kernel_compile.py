"""Every kernel at its shipping configuration compiles for every card, without spills."""

from __future__ import annotations

import pytest
from kernel_compiler import KERNELS, TARGETS, compile_kernel

MATRIX = {
    "sm_80": "mma.sync",
    "sm_86": "mma.sync",
    "sm_89": "mma.sync",
    "sm_90": "wgmma.mma_async",
    "sm_100": "tcgen05.mma",
    "sm_120": "mma.sync",
    "gfx942": "mfma",
}


@pytest.mark.parametrize(
    ("dtype", "variant"), [("bf16", "plain"), ("bf16", "all"), ("fp16", "plain"), ("fp32", "all")]
)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile(target, kernel, dtype, variant):
    compiled = compile_kernel(kernel, target, dtype, variant)
    assert compiled.spills == 0
    # Compiling does not check what a card can launch.
    assert compiled.shared_memory <= TARGETS[target][2]
    # fp32 operands are multiplied in fp32; the interpreter would hide that they are not.
    assert "tf32" not in compiled.ttgir.replace("round_f32_to_tf32 = false", "")
    if kernel == "target_kernel":
        return
    if dtype != "fp32":
        assert compiled.matrix_instructions.get(MATRIX[target], 0) > 0
        # Operands are loaded ahead of their product.
        assert compiled.bulk_copies > 0 or target == "gfx942"
