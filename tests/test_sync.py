"""Checksums of tensors, the comparison of transfers, and the canary."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastalign.rollout import sync
from fastalign.rollout.engine import EngineError
from fastalign.rollout.sync import canary, fingerprint, verify

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.float8_e4m3fn,
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.int64,
    torch.float64,
    torch.complex64,
]


def _random(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=generator) * 4
    return values.to(torch.float32 if dtype.is_complex else dtype).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (5, 3, 11), (130, 17)], ids=str)
def test_fingerprint_depends_on_content_alone(dtype, shape):
    tensor = _random(dtype, *shape)
    first = fingerprint(tensor)
    assert all(isinstance(x, int) and -(2**63) <= x < 2**63 for x in first)
    assert fingerprint(tensor.clone()) == first
    assert fingerprint(tensor.reshape(-1)) == first
    if tensor.ndim == 2:
        assert fingerprint(tensor.T.contiguous().T) == first, "another memory layout"


def test_fingerprint_of_a_part_at_any_offset():
    # A part of a fused parameter starts anywhere, also in the middle of a 64-bit lane.
    whole = _random(torch.bfloat16, 1001)
    for start in range(6):
        assert fingerprint(whole[start:]) == fingerprint(whole[start:].clone())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_fingerprint_sees_every_single_change(dtype):
    tensor = _random(dtype, 9, 13)
    seen = {fingerprint(tensor)}
    for index in range(tensor.numel()):
        changed = tensor.clone().view(-1)
        bits = changed.view(torch.int16 if dtype == torch.bfloat16 else torch.int32)
        bits[index] ^= 1  # the smallest change that the dtype can hold
        seen.add(fingerprint(changed))
    assert len(seen) == tensor.numel() + 1


def test_fingerprint_sees_positions():
    tensor = torch.arange(64, dtype=torch.float32).reshape(8, 8)
    seen = {fingerprint(tensor), fingerprint(tensor.T), fingerprint(tensor.flip(0))}
    for i, j in [(0, 1), (0, 2), (0, 63), (17, 40)]:
        swapped = tensor.clone().view(-1)
        swapped[[i, j]] = swapped[[j, i]]
        seen.add(fingerprint(swapped))
    # Zeros have no bits of their own: their number has to count.
    seen |= {fingerprint(torch.zeros(n)) for n in range(5)}
    seen |= {fingerprint(torch.zeros(n, dtype=torch.uint8)) for n in range(1, 4)}
    # 0, 1, 2 and 4 floats are 0, 4, 8 and 16 bytes, and 1 to 3 bytes fill one lane alike.
    assert len(seen) == 7 + 5 + 3
    assert fingerprint(torch.tensor([0.0])) != fingerprint(torch.tensor([-0.0]))


def test_fingerprint_is_the_same_for_every_chunk_size(monkeypatch):
    tensor = _random(torch.bfloat16, 257, 33)
    expected = fingerprint(tensor)
    for lanes in (1, 3, 64, 1 << 20):
        monkeypatch.setattr(sync, "_CHUNK_LANES_CPU", lanes)
        assert fingerprint(tensor) == expected


def test_verify_accepts_a_whole_transfer():
    sums = {"a": (1, 2), "b": (3, 4)}
    verify(sums, dict(sums), frozenset(sums))


@pytest.mark.parametrize(
    ("sent", "held", "message"),
    [
        ({"a": (1, 2)}, {"a": (1, 2)}, "1 never sent: b"),
        ({"a": (1, 2), "b": (3, 4), "c": (5, 6)}, {"a": (1, 2), "b": (3, 4)}, "unknown: c"),
        ({"a": (1, 2), "b": (3, 4)}, {"a": (1, 2)}, "not held by the engine: b"),
        ({"a": (1, 2), "b": (3, 4)}, {"a": (1, 2), "b": (3, 4), "d": (0, 0)}, "unknown: d"),
        ({"a": (1, 2), "b": (3, 4)}, {"a": (1, 2), "b": (3, 5)}, "other content than was sent: b"),
    ],
)
def test_verify_names_what_is_wrong(sent, held, message):
    with pytest.raises(EngineError, match=message):
        verify(sent, held, frozenset("ab"))


def test_verify_shows_a_few_names_of_many():
    names = [f"layer.{i:02}" for i in range(40)]
    with pytest.raises(EngineError, match=r"40 never sent: layer.00, .*layer.03 and 36 more"):
        verify({}, {}, frozenset(names))


class _Pair:
    """A trainer and an engine whose log-probs are their weights."""

    def __init__(self, rounding: float = 0.01) -> None:
        self.trainer = np.linspace(-5, 0, 50)
        self.rounding = rounding * np.random.default_rng(0).standard_normal(50)
        self.pushes = 0
        self.push()

    def perturb(self) -> None:
        self.kept = self.trainer
        self.trainer = self.trainer * 1.5 - 1

    def restore(self) -> None:
        self.trainer = self.kept

    def push(self) -> None:
        self.pushes += 1
        self.engine = self.trainer + self.rounding

    def run(self, **replaced):
        parts = {
            "perturb": self.perturb,
            "restore": self.restore,
            "push": self.push,
            "engine_logprobs": lambda: self.engine,
            "trainer_logprobs": lambda: self.trainer,
        }
        return canary(**(parts | replaced))


def test_canary_passes_on_a_live_engine():
    pair = _Pair()
    start = pair.trainer
    report = pair.run()
    assert report.change == pytest.approx(np.abs(start * 0.5 - 1).mean())
    assert 0 < report.gap < 0.02
    assert report.residue == 0
    assert pair.trainer is start


def test_canary_catches_a_push_that_does_nothing():
    pair = _Pair()
    start = pair.trainer
    with pytest.raises(EngineError, match=r"did not follow.*moved by 2.25.*by 2.25"):
        pair.run(push=lambda: None)
    assert pair.trainer is start


def test_canary_catches_an_engine_that_keeps_the_perturbation():
    pair = _Pair()

    def push_once() -> None:
        if pair.pushes == 1:
            pair.push()

    with pytest.raises(EngineError, match="did not return"):
        pair.run(push=push_once)


def test_canary_catches_half_a_transfer():
    pair = _Pair()

    def push_half() -> None:
        pair.engine = np.where(np.arange(50) < 25, pair.trainer, pair.engine)

    with pytest.raises(EngineError, match="did not follow"):
        pair.run(push=push_half)


def test_canary_wants_a_visible_change():
    pair = _Pair()
    with pytest.raises(EngineError, match=r"perturbation is below 0.2"):
        pair.run(perturb=lambda: setattr(pair, "kept", pair.trainer))


def test_canary_fails_on_nan():
    pair = _Pair()
    with pytest.raises(EngineError, match="nan"):
        pair.run(engine_logprobs=lambda: np.full(50, np.nan))


def test_canary_restores_the_trainer_when_something_breaks():
    pair = _Pair()
    start = pair.trainer

    def broken() -> None:
        raise RuntimeError("connection lost")

    with pytest.raises(RuntimeError, match="connection lost"):
        pair.run(push=broken)
    assert pair.trainer is start


def test_canary_refuses_scores_of_different_tokens():
    pair = _Pair()
    with pytest.raises(EngineError, match="same tokens"):
        pair.run(trainer_logprobs=lambda: np.zeros(3), engine_logprobs=lambda: np.zeros(2))
