"""Every kernel at its shipping configuration compiles for every card, without spills."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import triton
from kernel_compiler import TARGETS, cell, compile_kernel, kernels

TABLE = Path(__file__).parents[1] / "docs" / "kernel-resources.md"
PRODUCTS = ("reduce_kernel", "exp_kernel", "grad_kernel")


@pytest.mark.parametrize(("kernel", "dtype", "variant"), list(kernels()))
@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile(target, kernel, dtype, variant):
    compiled = compile_kernel(kernel, target, dtype, variant)
    _, _, most_shared, matrix = TARGETS[target]
    assert compiled.spills == 0
    # Compiling does not check what a card can launch.
    assert compiled.shared_memory <= most_shared
    # fp32 operands are multiplied in fp32; the interpreter would hide that they are not.
    assert "tf32" not in compiled.ttgir.replace("round_f32_to_tf32 = false", "")
    if kernel in PRODUCTS and dtype != "fp32":
        assert compiled.matrix_instructions.get(matrix, 0) > 0
        # Operands are loaded ahead of their product.
        assert "cp.async" in compiled.text or target == "gfx942"
    if "log_odds" in kernel:
        # A row may start beyond 2^31.
        assert re.search(r"%\w+ = arith\.muli .* : i64", compiled.ttir)
        if target != "gfx942":
            # Threads meet once, behind the loop, and move 16 bytes at a time where rows allow it.
            assert not re.search(r"shfl|bar\.sync", inside_loops(compiled.text))
            wide = [bool(re.search(rf"{x}\.global\S*\.v4", compiled.text)) for x in ("ld", "st")]
            assert wide[0] == ("odd" not in variant)
            assert wide[1] == (wide[0] and kernel == "log_odds_backward_kernel")


def inside_loops(ptx: str) -> str:
    """What lies before the last jump backwards."""
    labels = {m[1]: m.start() for m in re.finditer(r"^(\$\w+):", ptx, re.M)}
    jumps = re.finditer(r"\bbra(?:\.uni)?\s+(\$\w+);", ptx)
    return ptx[: max(jump.start() for jump in jumps if labels[jump[1]] < jump.start())]


@pytest.mark.parametrize(("kernel", "dtype", "variant"), list(kernels()))
def test_the_table_of_resources_is_true(kernel, dtype, variant):
    text = TABLE.read_text(encoding="utf-8")
    (found,) = re.findall(rf"^\| {kernel}, {dtype}, {variant} \| (.*) \|$", text, re.M)
    if f"triton {triton.__version__} has" not in text:
        pytest.skip("the table is about another version of triton")
    cells = [cell(compile_kernel(kernel, target, dtype, variant)) for target in TARGETS]
    assert found.split(" | ") == cells
