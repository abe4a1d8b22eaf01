"""Which implementation an op runs: the one that the caller names, or the device's."""

from __future__ import annotations

import logging
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch

LOGGER = logging.getLogger("fastalign_kernels")
IMPLEMENTATIONS = ("torch", "triton")


def check_impl(impl: str | None) -> None:
    """Raise ValueError unless ``impl`` is None or names an implementation."""
    if impl is not None and impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl = {impl!r}: available are {', '.join(IMPLEMENTATIONS)}")


def choose(op: str, impl: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """ "torch" or "triton".

    None is Triton on a GPU and torch elsewhere and in fp64, which Triton's kernels do not have; the
    choice is logged once for each op.

    Raises:
        ValueError: Triton is named for tensors that it cannot take.
    """
    if impl is None:
        return _by_device(op, device.type, dtype == torch.float64)
    if impl == "triton":
        if dtype == torch.float64:
            raise ValueError("impl = 'triton': the inputs are in fp64, which needs 'torch'")
        if device.type != "cuda" and not interpreted():
            raise ValueError(f"impl = 'triton': the inputs are on {device}, which needs 'torch'")
    return impl


def losses_module(op: str, impl: str | None, values: torch.Tensor) -> ModuleType:
    """The module with the implementation of a loss for these values."""
    name = choose(op, impl, values.device, values.dtype)
    module = {"torch": "reference_losses", "triton": "triton_losses"}[name]
    return import_module(f"fastalign_kernels.{module}")


def interpreted() -> bool:
    """Whether Triton runs kernels in Python, on the CPU's tensors (TRITON_INTERPRET=1)."""
    if find_spec("triton") is None:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


@cache
def _by_device(op: str, device_type: str, is_fp64: bool) -> str:
    if device_type != "cuda":
        name, reason = "torch", f"the tensors are on {device_type}"
    elif is_fp64:
        name, reason = "torch", "fp64"
    elif find_spec("triton") is None:
        name, reason = "torch", "triton is not installed"
    else:
        name, reason = "triton", "the tensors are on a GPU"
    LOGGER.info("%s runs in %s: %s", op, name, reason)
    return name
