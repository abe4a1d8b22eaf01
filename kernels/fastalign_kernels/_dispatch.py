"""Which implementation an op runs: the one that the caller names, or the device's."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
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
        name, reason = _by_device(device.type, dtype == torch.float64)
        _say_once(op, name, reason)
        return name
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


@contextmanager
def alone_on_device_of(x: torch.Tensor) -> Iterator[None]:
    """Launch on the device of x, which need not be the current one, whatever autocast says."""
    with torch.cuda.device_of(x), torch.autocast(x.device.type, enabled=False):
        yield


def interpreted() -> bool:
    """Whether Triton runs kernels in Python, on the CPU's tensors (TRITON_INTERPRET=1)."""
    if find_spec("triton") is None:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


def default_implementation(device: torch.device, dtype: torch.dtype) -> str:
    """What ops run in on this device when nothing is named: "triton" or "torch"."""
    return _by_device(device.type, dtype == torch.float64)[0]


def _by_device(device_type: str, is_fp64: bool) -> tuple[str, str]:
    if device_type != "cuda":
        return "torch", f"the tensors are on {device_type}"
    if is_fp64:
        return "torch", "fp64"
    if find_spec("triton") is None:
        return "torch", "triton is not installed"
    return "triton", "the tensors are on a GPU"


@cache
def _say_once(op: str, name: str, reason: str) -> None:
    LOGGER.info("%s runs in %s: %s", op, name, reason)
