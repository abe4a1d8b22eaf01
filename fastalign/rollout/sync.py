"""Proof that a weight transfer happened: checksums of content, and a canary at start-up.

A checksum says that the engine's tensor holds the very bits that the trainer sent.  The canary says
that those bits are also what the engine computes with: the trainer changes its weights visibly, and
the engine's log-probabilities have to follow and to come back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from fastalign.rollout.engine import EngineError

Fingerprint = tuple[int, int]

# Odd 64-bit constants (splitmix64's increment and its two multipliers) as signed integers.
_STEP = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64

_LANE_BYTES = 8
# Lanes per chunk: on a CPU the temporaries stay in the cache and below the size at which torch
# starts threads (they slowed the sums down fourfold on a shared machine), on an accelerator they
# hide the launches and are small enough (five of 16 MiB) to fit beside a model.
_CHUNK_LANES_CPU = 1 << 15
_CHUNK_LANES_DEVICE = 1 << 21
_SHOWN = 4


def fingerprint(tensor: torch.Tensor) -> Fingerprint:
    """Checksum of a tensor's bits, computed where the tensor lives.

    The tensor is read as 64-bit lanes x_i (the last one filled up with zero bytes).  The first
    number is sum_i x_i * w_i with odd weights w_i, the second sum_i mix(x_i ^ w_i) with the
    finaliser of splitmix64 plus the number of bytes, both modulo 2**64.  Integer sums do not depend
    on the order of addition, so every device and chunk size gives the same numbers.

    Args:
        tensor: any dtype and shape, contiguous or not.  The shape is not part of the checksum, so a
            part of a fused parameter compares with the tensor it was made from.

    Returns:
        Two signed 64-bit integers.
    """
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    raw = tensor.resolve_neg().contiguous().reshape(-1).view(torch.uint8)
    whole = raw.numel() // _LANE_BYTES * _LANE_BYTES
    limit = _CHUNK_LANES_CPU if raw.device.type == "cpu" else _CHUNK_LANES_DEVICE
    lanes = min(limit, max(1, whole // _LANE_BYTES))
    weights_L = torch.arange(lanes, device=raw.device).mul_(_STEP)
    total = torch.zeros(2, dtype=torch.int64, device=raw.device)
    for start in range(0, whole, lanes * _LANE_BYTES):
        piece = raw[start : min(start + lanes * _LANE_BYTES, whole)]
        _add(total, piece, weights_L, start // _LANE_BYTES)
    if whole < raw.numel():
        tail = raw.new_zeros(_LANE_BYTES)
        tail[: raw.numel() - whole] = raw[whole:]
        _add(total, tail, weights_L, whole // _LANE_BYTES)
    first, second = total.tolist()
    return first, _wrap(second + raw.numel())


def _add(total: torch.Tensor, piece: torch.Tensor, weights_L: torch.Tensor, first: int) -> None:
    """Add the sums over ``piece``, the bytes of lanes ``first`` and on, to ``total`` [2]."""
    if piece.storage_offset() % _LANE_BYTES:
        piece = piece.clone()  # a view as int64 wants its storage offset in whole lanes
    x = piece.view(torch.int64)
    weight = weights_L[: x.numel()].add(_wrap(first * _STEP)).bitwise_or_(1)
    mixed = x.bitwise_xor(weight)
    total[0] += weight.mul_(x).sum()
    mixed.mul_(_MIX_1)
    mixed.bitwise_xor_(mixed >> 27)
    mixed.mul_(_MIX_2)
    mixed.bitwise_xor_(mixed >> 31)
    total[1] += mixed.sum()


def _wrap(value: int) -> int:
    """``value`` modulo 2**64 as a signed integer, the way int64 tensors count."""
    return (value + 2**63) % 2**64 - 2**63


def digest(sent: Mapping[str, Fingerprint]) -> str:
    """One name for the content of many tensors."""
    return hashlib.sha256(repr(sorted(sent.items())).encode()).hexdigest()


def verify(
    sent: Mapping[str, Fingerprint],
    received: Mapping[str, Fingerprint],
    expected: frozenset[str],
) -> None:
    """Compare what was sent with what the engine holds.

    Args:
        sent: checksum of each tensor that the trainer handed over, in the engine's dtype.
        received: checksum of each tensor as the engine holds it.
        expected: the names that a complete transfer consists of.

    Raises:
        EngineError: names are missing or extra on either side, or contents differ; the message
            holds counts and the first few names.
    """
    problems = [
        _listed("never sent", expected - sent.keys()),
        _listed("sent but unknown", sent.keys() - expected),
        _listed("sent but not held by the engine", (expected & sent.keys()) - received.keys()),
        _listed("held by the engine but unknown", received.keys() - expected),
        _listed(
            "of other content than was sent",
            {
                name
                for name in expected
                if name in sent and received.get(name, sent[name]) != sent[name]
            },
        ),
    ]
    found = [problem for problem in problems if problem]
    if found:
        raise EngineError(f"weight transfer of {len(expected)} tensors failed: " + "; ".join(found))


def _listed(what: str, names: set[str] | frozenset[str]) -> str:
    if not names:
        return ""
    shown = sorted(names)[:_SHOWN]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return f"{len(names)} {what}: {', '.join(shown)}{more}"


@dataclass(frozen=True)
class CanaryReport:
    """Mean absolute differences of log-probabilities, in nats.

    Attributes:
        change: how far the perturbation moved the trainer's log-probs.
        gap: engine against trainer, both perturbed.
        residue: engine after the restore against engine before the perturbation.
    """

    change: float
    gap: float
    residue: float


# A canary's change of the log-probs, as a multiple of what rounding makes of them.
LEAST_CHANGE = 4


def canary(
    *,
    perturb: Callable[[], None],
    restore: Callable[[], None],
    push: Callable[[], object],
    engine_logprobs: Callable[[], np.ndarray],
    trainer_logprobs: Callable[[], np.ndarray],
    share: float = 0.25,
    floor: float = 0.05,
) -> CanaryReport:
    """Prove before training that the engine computes with the weights it is sent.

    With t the trainer's and e the engine's log-probs of the same tokens, before and after a visible
    change of the trainer's weights, and e'' the engine's after these were restored and sent again:

        change  = mean |t' - t|    >= LEAST_CHANGE * floor  (the change can be told from noise)
        gap     = mean |e' - t'|   <= share * change + floor
        residue = mean |e'' - e|   <= floor

    An engine that kept its old weights has gap = change and fails by at least twice the limit.
    ``floor`` stands for the rounding between the two implementations: a bfloat16 engine and a
    float32 trainer differ by about 0.03 on average.

    Args:
        perturb: changes the trainer's weights in place.
        restore: puts back exactly what they were; called whatever happens after ``perturb``.
        push: sends the trainer's weights to the engine.
        engine_logprobs, trainer_logprobs: log-probs of the same tokens in the same order, any
            shape; the engine holds the trainer's weights when this function is entered.

    Raises:
        EngineError: a rule is broken; the message holds the figures.
    """
    engine_before = _flat(engine_logprobs())
    trainer_before = _flat(trainer_logprobs())
    try:
        perturb()
        push()
        engine_changed = _flat(engine_logprobs())
        trainer_changed = _flat(trainer_logprobs())
    finally:
        restore()
    push()
    engine_after = _flat(engine_logprobs())
    report = CanaryReport(
        change=_distance(trainer_changed, trainer_before),
        gap=_distance(engine_changed, trainer_changed),
        residue=_distance(engine_after, engine_before),
    )
    figures = (
        f"the trainer's log-probs moved by {report.change:.4g}, the engine's then differ from them "
        f"by {report.gap:.4g}, and after the restore from their start by {report.residue:.4g} "
        "(means, in nats)"
    )
    # Written so that a NaN fails.
    if not report.change >= LEAST_CHANGE * floor:
        raise EngineError(
            f"canary: the perturbation is below {LEAST_CHANGE * floor:.4g}: {figures}"
        )
    if not report.gap <= share * report.change + floor:
        raise EngineError(f"canary: the engine did not follow the trainer's weights: {figures}")
    if not report.residue <= floor:
        raise EngineError(f"canary: the engine did not return to the restored weights: {figures}")
    return report


def _flat(values: np.ndarray) -> np.ndarray:
    return np.asarray(values, dtype=np.float64).reshape(-1)


def _distance(left: np.ndarray, right: np.ndarray) -> float:
    if left.shape != right.shape or left.size == 0:
        raise EngineError(
            f"canary: {left.size} and {right.size} log-probs cannot be compared: engine and "
            "trainer must score the same tokens"
        )
    return float(np.abs(left - right).mean())
