"""linear_logprob against autograd over materialised logits, in fp64 and in the same dtype.

``make test`` runs this file as it stands and in Triton's interpreter, ``make gpu`` on a GPU; see
kernel_support.py.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from functools import partial

import pytest
import torch
from kernel_support import (
    DEVICE,
    IMPL,
    INTERPRETED,
    generator,
    has_tma,
    on_device,
    on_gpu,
    relative_error,
    skip_inexact,
    skip_unseen,
    torch_only,
    triton_only,
)
from torch._dynamo.backends.debugging import aot_eager
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fastalign_kernels
from fastalign_kernels import TokenLogprobs, _dispatch, reference

pytestmark = pytest.mark.usefixtures("on_device_under_test")
linear_logprob = partial(fastalign_kernels.linear_logprob, impl=IMPL)

VOCAB = 1003  # a multiple of no tile
HIDDEN = 48
IGNORED = -100
WANTS = {"h": "frozen", "hwb": "trainable", "hwb kept": "kept"}
OPTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "temperature": {"temperature": 0.7},
    "softcap": {"softcap": 5.0},
    "all": {"bias": True, "temperature": 1.3, "softcap": 5.0},
}


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> int:
    """Cut even the small problems of these tests into many tiles; the logits in one tile."""
    if IMPL == "triton":
        from fastalign_kernels import triton_head

        small = triton_head.Tiling(32, 64, 32, 2, 4, 1, tma=has_tma())
        monkeypatch.setattr(triton_head, "tiling_for", lambda *_: small)
        monkeypatch.setattr(triton_head, "CHUNK_COLUMNS", 200)
        monkeypatch.setattr(triton_head, "REFERENCE_COLUMNS", 48)
    monkeypatch.setitem(reference.TILE_BYTES, DEVICE, 4 * 8192)
    monkeypatch.setattr(reference, "MIN_TILE_COLUMNS", 128)
    return 8192


def problem(n: int, dtype: torch.dtype, seed: int = 0, bias: bool = False, ignore: bool = True):
    """hidden, weight, bias, target with logits of about +-4 and every fifth row ignored."""
    skip_inexact(dtype)
    rng = generator(seed)
    hidden = torch.randn(n, HIDDEN, generator=rng).to(dtype)
    weight = (torch.randn(VOCAB, HIDDEN, generator=rng) * 0.5).to(dtype)
    target = torch.randint(VOCAB, (n,), generator=rng)
    # Half the rows confident: random targets alone would leave 1 - p at 1.
    hidden[::2] += weight[target[::2]] * 1.5
    if ignore:
        target[4::5] = IGNORED
    return hidden, weight, torch.randn(VOCAB, generator=rng).to(dtype) if bias else None, target


def naive(hidden, weight, target, *, bias=None, softcap=None, temperature=1.0) -> TokenLogprobs:
    """The same through materialised logits in the inputs' dtype, softmax in fp32 or fp64."""
    z = torch.nn.functional.linear(hidden, weight, bias)
    z = z.double() if z.dtype == torch.float64 else z.float()
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z / temperature
    kept = target != IGNORED
    y = target.where(kept, 0)[:, None]
    everything = z.logsumexp(-1)
    rest = z.scatter(1, y, -torch.inf).logsumexp(-1)
    p = z.softmax(-1)
    return TokenLogprobs(
        logprob=(z.gather(1, y)[:, 0] - everything).where(kept, 0.0),
        log1m_prob=(rest - everything).where(kept, 0.0),
        entropy=torch.special.entr(p).sum(-1).where(kept, 0.0),
    )


def outputs_and_grads(function, hidden, weight, bias, target, wants="hwb", **options):
    """Values, and gradients under random upstream gradients, by name.

    ``wants``: letters of what wants a gradient, "kept" for a head whose exponentials are kept."""
    if "kept" in wants and function is not naive:
        options["memory_budget"] = 1 << 30
    leaves = {"hidden": hidden, "weight": weight, "bias": bias}
    leaves = {
        k: v.detach().clone(memory_format=torch.preserve_format).requires_grad_(k[0] in wants)
        for k, v in leaves.items()
        if v is not None
    }
    result = function(target=target, **leaves, **options)
    rng = generator(7)
    up = torch.randn(2, len(target), generator=rng, dtype=torch.float64).to(result.logprob)
    if wants:
        (up[0] * result.logprob + up[1] * result.log1m_prob).sum().backward()
    grads = {f"grad_{k}": v.grad for k, v in leaves.items() if v.requires_grad}
    return {
        "logprob": result.logprob.detach(),
        "log1m_prob": result.log1m_prob.detach(),
        **grads,
    }


def as_double(*tensors):
    return [t.double() if t is not None and t.is_floating_point() else t for t in tensors]


@pytest.mark.parametrize("wants", WANTS, ids=WANTS.values())
@pytest.mark.parametrize(
    ("n", "options"), [(127, name) for name in OPTIONS] + [(1, "all"), (3, "plain")]
)
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str
)
def test_error_within_twice_that_of_torch(dtype, n, options, wants, small_tiles):
    options = dict(OPTIONS[options])
    *leaves, target = problem(127, dtype, bias=options.pop("bias", False))

    def rows(n):
        return leaves[0][:n], *leaves[1:], target[:n]

    def errors(function, n):
        true = outputs_and_grads(naive, *as_double(*rows(n)), wants, **options)
        values = outputs_and_grads(function, *rows(n), wants, **options)
        return {name: relative_error(values[name], true[name]) for name in true}

    # A row or three can round luckily: torch gets its error on many as well.
    theirs, theirs_on_many = errors(naive, n), errors(naive, 127)
    # In fp64 theirs is the truth itself, exact but for the difference of z_t and logsumexp.
    slack = 1e-10 if dtype == torch.float64 else 1e-6
    if "kept" in wants and dtype == torch.bfloat16:
        # Exponentials are rounded once more than what naive torch sums over a single row.
        slack = 2**-9
    for name, error in errors(linear_logprob, n).items():
        assert error <= 2 * max(theirs[name], theirs_on_many[name]) + slack, name


@torch_only
@pytest.mark.parametrize("wants", ["h", "w", "b", "hw", "hb", "wb", "hwb", "hwb kept"])
def test_gradcheck(wants, monkeypatch):
    monkeypatch.setitem(reference.TILE_BYTES, DEVICE, 8 * 8)
    monkeypatch.setattr(reference, "MIN_TILE_COLUMNS", 4)
    rng = generator(1)
    leaves = [
        torch.randn(shape, generator=rng, dtype=torch.float64).requires_grad_(k in wants)
        for k, shape in (("h", (5, 4)), ("w", (11, 4)), ("b", (11,)))
    ]
    target = torch.tensor([3, 0, IGNORED, 10, 7])

    def function(hidden, weight, bias):
        result = linear_logprob(
            hidden,
            weight,
            target,
            bias=bias,
            softcap=3.0,
            temperature=0.8,
            memory_budget=1 << 20 if "kept" in wants else 0,
        )
        return result.logprob, result.log1m_prob

    assert torch.autograd.gradcheck(function, leaves)


def test_every_subset_of_gradients(small_tiles):
    inputs = problem(23, torch.float32, bias=True)
    full = outputs_and_grads(linear_logprob, *inputs, "hwb", softcap=9.0)
    for size in range(3):
        for wants in itertools.combinations("hwb", size):
            some = outputs_and_grads(linear_logprob, *inputs, wants, softcap=9.0)
            assert len(some) == 2 + size
            for name, value in some.items():
                assert relative_error(value, full[name]) < 1e-6


def test_no_graph_without_need():
    hidden, weight, _, target = problem(3, torch.float32)
    assert not linear_logprob(hidden, weight, target).logprob.requires_grad
    hidden.requires_grad_()
    with torch.no_grad():
        assert not linear_logprob(hidden, weight, target).logprob.requires_grad


def test_frozen_head_is_not_read_in_backward():
    # Under ZeRO-3 it is scattered by then.
    hidden, weight, _, target = problem(9, torch.float32)
    expected = outputs_and_grads(linear_logprob, hidden, weight, None, target, "h")["grad_hidden"]
    hidden = hidden.requires_grad_()
    result = linear_logprob(hidden, weight, target)
    weight.fill_(torch.nan)
    rng = generator(7)
    up = torch.randn(2, 9, generator=rng, dtype=torch.float64).float()
    (up[0] * result.logprob + up[1] * result.log1m_prob).sum().backward()
    assert torch.equal(hidden.grad, expected)


@torch_only
def test_bf16_beats_rounded_logits():
    # Logits of about 60, where bf16 has steps of 0.25, and a target close to the top.
    rng = generator(3)
    hidden = torch.randn(64, HIDDEN, generator=rng).bfloat16()
    weight = (torch.randn(VOCAB, HIDDEN, generator=rng) * 3).bfloat16()
    target = (hidden.double() @ weight.double().t()).topk(2).indices[:, 1].contiguous()
    true = naive(*as_double(hidden, weight, target))
    ours, theirs = linear_logprob(hidden, weight, target), naive(hidden, weight, target)
    assert (ours.logprob - true.logprob).norm() < 0.1 * (theirs.logprob - true.logprob).norm()


@torch_only
def test_16_bit_without_cpu_instructions(monkeypatch):
    monkeypatch.setattr(
        reference, "_multiplies", lambda dtype: dtype in (torch.float32, torch.float64)
    )
    inputs = problem(12, torch.bfloat16, bias=True)
    true = outputs_and_grads(naive, *as_double(*inputs))
    ours = outputs_and_grads(linear_logprob, *inputs)
    for name, expected in true.items():
        # Values to fp32 accuracy; the gradients are rounded to bf16 when they leave.
        assert relative_error(ours[name], expected) < (3e-3 if "grad" in name else 1e-6), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("one_minus_p", [0.5, 0.1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7])
def test_confident_targets(one_minus_p, dtype):
    skip_inexact(dtype)
    # With the identity as head the hidden states are the logits, exactly.
    vocab = 64
    hidden = torch.zeros(1, vocab, dtype=dtype)
    hidden[0, 17] = math.log((1 - one_minus_p) / one_minus_p * (vocab - 1))
    target = torch.tensor([17])
    weight = torch.eye(vocab, dtype=dtype)
    m = hidden[0, 17].double() - math.log(vocab - 1)
    result = linear_logprob(hidden.requires_grad_(), weight, target)
    tolerance = {"rtol": 5e-6, "atol": 0.0, "check_dtype": False}
    torch.testing.assert_close(
        result.logprob[0].detach(), torch.nn.functional.logsigmoid(m), **tolerance
    )
    torch.testing.assert_close(
        result.log1m_prob[0].detach(), torch.nn.functional.logsigmoid(-m), **tolerance
    )
    assert result.logprob <= 0
    # Unlikelihood pushes with p on the target and -p spread over the others: never 0, never inf.
    (-result.log1m_prob).sum().backward()
    assert abs(hidden.grad[0, 17].item() / torch.sigmoid(m).item() - 1) < 1e-2
    assert abs(hidden.grad.double().sum().item()) < 1e-2


@pytest.mark.parametrize("wants", ["h", "hw", "hw kept"], ids=["frozen", "trainable", "kept"])
@pytest.mark.parametrize("gap", [-120.0, -88.0, 0.0, 88.0, 120.0])
def test_gaps(gap, wants, monkeypatch):
    monkeypatch.setitem(reference.TILE_BYTES, DEVICE, 4 * 512)
    monkeypatch.setattr(reference, "MIN_TILE_COLUMNS", 128)
    rng = generator(5)
    vocab, n = 300, 4
    hidden = torch.randn(n, vocab, generator=rng)
    target = torch.tensor([0, 128, 299, 77])  # ends and edges of tiles
    rows = torch.arange(n)
    top = hidden.max(dim=1).values
    hidden[rows, target] = top + gap
    inputs = (hidden, torch.eye(vocab), None, target)
    true = outputs_and_grads(naive, *as_double(*inputs), wants)
    ours = outputs_and_grads(linear_logprob, *inputs, wants)
    assert (ours["logprob"] <= 0).all() and (ours["log1m_prob"] <= 0).all()
    for name, expected in true.items():
        assert torch.isfinite(ours[name]).all(), name
        if (name == "log1m_prob" and gap < 0) or (name == "logprob" and gap > 80):
            # exp(-88) and below: the naive difference rounds it away even in fp64.
            assert ours[name].abs().max() < 1e-30
        else:
            torch.testing.assert_close(
                ours[name].double(), expected, rtol=2e-5, atol=1e-6, msg=name
            )


def test_flat_rows():
    hidden = torch.zeros(3, HIDDEN, dtype=torch.bfloat16)
    _, weight, _, target = problem(3, torch.bfloat16)
    result = linear_logprob(hidden, weight, target, return_entropy=True)
    expected = torch.full((3,), math.log(VOCAB))
    torch.testing.assert_close(-result.logprob, expected)
    torch.testing.assert_close(result.entropy, expected)


@pytest.mark.parametrize("wants", WANTS, ids=WANTS.values())
def test_ignored_rows(wants):
    inputs = problem(20, torch.float32, bias=True)
    hidden, weight, bias = (
        x.requires_grad_(k in wants) for x, k in zip(inputs, "hwb", strict=False)
    )
    target = inputs[3]
    ignored = target == IGNORED
    result = linear_logprob(hidden, weight, target, bias=bias, return_entropy=True)
    for value in (result.logprob, result.log1m_prob, result.entropy):
        assert (value[ignored] == 0).all() and (value[~ignored] != 0).all()
    up = torch.where(ignored, torch.nan, 1.0)
    torch.autograd.backward([result.logprob, result.log1m_prob], [up, up])
    assert (hidden.grad[ignored] == 0).all()
    assert (hidden.grad[~ignored] != 0).any(dim=1).all()
    if "w" in wants:
        assert torch.isfinite(weight.grad).all() and torch.isfinite(bias.grad).all()


@pytest.mark.parametrize("wants", ["", "h", "hwb", "hwb kept"])
@pytest.mark.parametrize("n", [0, 5])
def test_no_rows(n, wants):
    hidden, weight, bias, _ = problem(n, torch.bfloat16, bias=True)
    target = torch.full((n,), IGNORED)
    ours = outputs_and_grads(linear_logprob, hidden, weight, bias, target, wants)
    assert len(ours) == 2 + len(wants.split()[0] if wants else "")
    assert all((value == 0).all() for value in ours.values())


@pytest.mark.parametrize("wants", WANTS, ids=WANTS.values())
def test_banned_tokens(wants, small_tiles):
    # A bias of -inf over whole tiles.
    hidden, weight, bias, target = problem(60, torch.float32, bias=True)
    bias[:700] = -torch.inf
    target = torch.where(target == IGNORED, target, 700 + target % 300)
    inputs = hidden, weight, bias, target
    true = outputs_and_grads(naive, *as_double(*inputs), wants)
    ours = outputs_and_grads(linear_logprob, *inputs, wants)
    for name, expected in true.items():
        torch.testing.assert_close(ours[name].double(), expected, rtol=1e-4, atol=1e-5, msg=name)


def test_sole_token_left():
    hidden, weight, bias, _ = problem(2, torch.float32, bias=True)
    bias.fill_(-torch.inf)
    bias[5] = 0.0
    result = linear_logprob(
        hidden.requires_grad_(), weight, torch.tensor([5, 5]), bias=bias, return_entropy=True
    )
    assert (result.logprob == 0).all() and (result.entropy == 0).all()
    result.logprob.sum().backward()
    assert (hidden.grad == 0).all()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_entropy(options, small_tiles):
    options = dict(options)
    hidden, weight, bias, target = problem(31, torch.float32, bias=options.pop("bias", False))
    result = linear_logprob(
        hidden.requires_grad_(), weight, target, bias=bias, return_entropy=True, **options
    )
    expected = naive(*as_double(hidden, weight, target), bias=as_double(bias)[0], **options)
    torch.testing.assert_close(
        result.entropy, expected.entropy.detach().float(), rtol=1e-5, atol=1e-5
    )
    assert not result.entropy.requires_grad
    assert linear_logprob(hidden, weight, target).entropy is None


def test_non_contiguous_inputs(small_tiles):
    inputs = problem(21, torch.float32, bias=True)
    hidden, weight, bias, target = inputs
    strided = (
        hidden.repeat_interleave(2, dim=1)[:, ::2],
        weight.t().contiguous().t(),
        bias.repeat_interleave(3)[::3],
        target.repeat_interleave(2)[::2],
    )
    assert not any(x.is_contiguous() for x in strided)
    expected = outputs_and_grads(linear_logprob, *inputs)
    ours = outputs_and_grads(linear_logprob, *strided)
    for name, value in expected.items():
        assert relative_error(ours[name], value) < 1e-6


# Where neither N, D nor V is a multiple of a tile's, and vocabularies that are shipped.
# On a CPU fewer rows of the largest, which takes half a minute in fp64 otherwise.
SHAPES = [
    (1, 576, 49152),
    (3, 960, 50257),
    (31 if DEVICE == "cpu" else 127, 2304, 151936),
    (1000, 576, 1003),
]


@pytest.mark.parametrize("wants", ["h", "hw", "hw kept"], ids=["frozen", "trainable", "kept"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_real_shapes(shape, dtype, wants):
    skip_inexact(dtype)
    n, d, vocab = shape
    if INTERPRETED and (vocab > 2000 or wants != "h"):
        pytest.skip("minutes in Triton's interpreter")
    if DEVICE == "cpu" and n * d * vocab > 10**10 and wants != "h":
        pytest.skip("a minute each; the other shapes are as odd")
    rng = generator(0)
    hidden = torch.randn(n, d, generator=rng).to(dtype)
    weight = (torch.randn(vocab, d, generator=rng) * (3 / d**0.5)).to(dtype)
    target = torch.randint(vocab, (n,), generator=rng)
    target[0] = vocab - 1
    theirs, ours, true = (
        outputs_and_grads(function, *tensors, None, target, wants)
        for function, *tensors in (
            (naive, hidden, weight),
            (linear_logprob, hidden, weight),
            (naive, hidden.double(), weight.double()),
        )
    )
    for name, value in true.items():
        error = relative_error(ours[name], value)
        # Exponentials that are kept are rounded once more.
        slack = 2**-9 if "kept" in wants and dtype == torch.bfloat16 else 1e-6
        assert error <= 2 * relative_error(theirs[name], value) + slack, name


@on_gpu
@pytest.mark.parametrize("wants", ["hw", "hw kept"], ids=["trainable", "kept"])
def test_more_than_2_to_the_31_logits(wants):
    n, d, vocab = 16_500, 64, 151_936
    rng = generator(0)
    hidden = torch.randn(n, d, generator=rng).bfloat16()
    weight = (torch.randn(vocab, d, generator=rng) * (3 / d**0.5)).bfloat16()
    target = torch.randint(vocab, (n,), generator=rng)
    up = torch.randn(2, n, generator=rng)
    ours = [x.clone().requires_grad_() for x in (hidden, weight)]
    found = linear_logprob(*ours, target, memory_budget=(1 << 40) * ("kept" in wants))
    torch.autograd.backward([found.logprob, found.log1m_prob], list(up))
    true = [x.double().requires_grad_() for x in (hidden, weight)]
    for rows in torch.arange(n).split(500):
        expected = naive(true[0][rows], true[1], target[rows])
        torch.autograd.backward([expected.logprob, expected.log1m_prob], list(up[:, rows].double()))
        torch.testing.assert_close(
            found.logprob[rows].double(), expected.logprob, rtol=1e-5, atol=1e-4
        )
    for x, y in zip(ours, true, strict=True):
        assert relative_error(x.grad, y.grad) < 2e-2


@pytest.mark.parametrize("wants", ["", *WANTS])
def test_every_number_is_written(wants, small_tiles):
    """torch fills what is not with NaN."""
    inputs = problem(31, torch.float32, bias=True)
    expected = outputs_and_grads(linear_logprob, *inputs, wants, softcap=5.0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3).isnan().all()
        ours = outputs_and_grads(linear_logprob, *inputs, wants, softcap=5.0)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(ours[name], value) for name, value in expected.items())


def in_a_wider_store(x: torch.Tensor) -> torch.Tensor:
    """x whose rows lie apart, 16 bytes aligned, with NaN between them."""
    store = torch.full((x.shape[0], 64), torch.nan, dtype=x.dtype)
    store[:, : x.shape[1]] = x
    return store[:, : x.shape[1]]


@pytest.mark.parametrize("wants", ["", *WANTS])
@pytest.mark.parametrize("padded", ["hidden", "weight", "both", "neither"])
def test_rows_apart_in_memory(padded, wants):
    """50 numbers a row: no multiple of 16 bytes, so that what lies close has to be copied."""
    hidden, weight, _, target = problem(11, torch.float32)
    hidden, weight = (torch.cat([x, x[:, :2]], dim=1) for x in (hidden, weight))
    expected = outputs_and_grads(naive, hidden, weight, None, target, wants)
    if padded in ("hidden", "both"):
        hidden = in_a_wider_store(hidden)
    if padded in ("weight", "both"):
        weight = in_a_wider_store(weight)
    ours = outputs_and_grads(linear_logprob, hidden, weight, None, target, wants)
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("wants", WANTS, ids=WANTS.values())
def test_no_second_derivative(wants):
    hidden, weight, _, target = problem(5, torch.float32)
    hidden.requires_grad_("h" in wants)
    weight.requires_grad_("w" in wants)
    budget = 1 << 30 if "kept" in wants else 0
    result = linear_logprob(hidden, weight, target, memory_budget=budget)
    with pytest.raises(RuntimeError, match="create_graph = True: linear_logprob has no second"):
        torch.autograd.grad(result.logprob.sum(), hidden, create_graph=True)


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_sole_token_left_at_a_low_temperature(temperature):
    hidden, weight, bias, _ = problem(2, torch.float32, bias=True)
    bias.fill_(-torch.inf)
    bias[5] = 0.0
    hidden.requires_grad_()
    target = torch.tensor([5, 5])
    linear_logprob(
        hidden, weight, target, bias=bias, temperature=temperature
    ).logprob.sum().backward()
    assert (hidden.grad == 0).all()


@pytest.mark.parametrize("wants", ["h", "hw"], ids=["frozen", "trainable"])
def test_a_lost_row_takes_no_other_with_it(wants):
    """In fp16 gradients are scaled by the largest one."""
    hidden, weight, _, target = problem(6, torch.float16, ignore=False)
    hidden.requires_grad_()
    weight.requires_grad_("w" in wants)
    up = torch.ones(6)
    up[2] = torch.inf
    linear_logprob(hidden, weight, target).logprob.backward(up)
    finite = hidden.grad.isfinite().all(dim=1)
    assert finite.tolist() == [True, True, False, True, True, True]


def test_a_large_sum_of_small_gradients_in_fp16():
    """The weight's gradient is 100, of terms that are 1e-3 each, before the mean's scale is in."""
    rng = generator(0)
    hidden = (torch.randn(1024, 16, generator=rng) + 100).half()
    weight = (torch.randn(33, 16, generator=rng) * 0.02).half().requires_grad_()
    target = torch.full((1024,), 5)
    linear_logprob(hidden, weight, target).logprob.mean().backward()
    true = weight.detach().double().requires_grad_()
    naive(hidden.double(), true, target).logprob.mean().backward()
    assert relative_error(weight.grad, true.grad) < 1e-3


class Live(TorchDispatchMode):
    """Most bytes of storages that operators made and that were there at a time, beside those of
    ``known`` tensors (which the interpreter makes tensors of as well)."""

    def __init__(self, *known: torch.Tensor | None) -> None:
        super().__init__()
        self.known = {x.untyped_storage().data_ptr() for x in known if x is not None}
        self.storages: dict[int, tuple] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.storages = {k: v for k, v in self.storages.items() if not v[0].expired()}
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                if storage.data_ptr() not in self.known:
                    self.storages[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self.storages.values()))
        return result


@pytest.mark.skipif(not INTERPRETED, reason="patches what the interpreter runs in fp32")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("wants", ["h", "hw"], ids=["frozen", "trainable"])
def test_transient_memory(wants, bias, monkeypatch):
    """At most a chunk and 6 N D bytes, beside the results."""
    from fastalign_kernels import triton_head

    n, d, vocab = 256, 512, 2048
    chunk = n * 512 * 2
    monkeypatch.setattr(triton_head, "CHUNK_BYTES", chunk)
    # The interpreter's products are in fp32, which a GPU's are not.
    monkeypatch.setattr(triton_head, "add_product", None)
    monkeypatch.setattr(triton_head, "_add_product", lambda total, a, b: None)
    monkeypatch.setattr(triton_head, "_write_product", lambda out, a, b, scale: None)
    rng = generator(0)
    hidden = torch.randn(n, d, generator=rng).half()
    weight = (torch.randn(vocab, d, generator=rng) / 30).half()
    target = torch.randint(vocab, (n,), generator=rng)
    head_bias = torch.zeros(vocab).half() if bias else None
    keep = {"h": "unit_grad", "hw": "inputs"}[wants]
    ops = torch.ops.fastalign_kernels
    small = 64 * n * 4 + 16 * vocab  # numbers a row, and a column
    settings = (None, 1.0, IGNORED, "triton")
    function = ops.linear_log_odds.default
    inputs = hidden, weight, target, head_bias
    live = Live(*inputs)
    with inside(live, monkeypatch):
        outputs = function(*inputs, *settings, n, keep, False, None, 0)
    results = 0 if wants == "hw" else 4 * n * d
    assert results < live.peak <= max(chunk + 6 * n * d, results) + small
    if wants == "hw":
        grad = torch.randn(n)
        live = Live(*inputs, *outputs, grad)
        with inside(live, monkeypatch):
            ops.linear_log_odds_backward.default(
                grad, outputs[1], *outputs[3:5], *inputs, *settings, True, True, bias, None, 0
            )
        results = 2 * n * d + 2 * vocab * d
        assert results < live.peak <= chunk + 6 * n * d + results + small


@contextlib.contextmanager
def inside(mode, monkeypatch):
    """A dispatch mode within the ops, which from outside are one operator each."""
    original = _dispatch.alone_on_device_of

    @contextlib.contextmanager
    def watched(x):
        with original(x), mode:
            yield

    with monkeypatch.context() as patch:
        patch.setattr(_dispatch, "alone_on_device_of", watched)
        yield


@torch_only
@pytest.mark.parametrize("wants", WANTS, ids=WANTS.values())
def test_compiled_once_for_many_sizes(wants):
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    @torch.compile(fullgraph=True, dynamic=True, backend=backend)
    def compiled(hidden, weight, target, **options):
        return linear_logprob(hidden, weight, target, **options).logprob

    for n in range(2, 14):
        inputs = problem(n, torch.float32)

        def run(hidden, weight, target, **options):
            value = compiled(hidden, weight, target, **options)
            return TokenLogprobs(value, 0 * value, None)

        ours = outputs_and_grads(run, *inputs, wants)
        assert ours["grad_hidden"].isfinite().all()
    assert len(graphs) <= 2


@torch_only
@pytest.mark.parametrize("wants", WANTS, ids=WANTS.values())
def test_independent_of_tile_size(wants, monkeypatch):
    inputs = problem(50, torch.float32, bias=True)
    results = []
    # One tile for all; rows of one tile of columns; tiles of a single row; narrow and tall tiles.
    for tile, columns in ((1 << 20, 2048), (4096, 1003), (64, 512), (1024, 16)):
        monkeypatch.setitem(reference.TILE_BYTES, DEVICE, 4 * tile)
        monkeypatch.setattr(reference, "MIN_TILE_COLUMNS", columns)
        results.append(outputs_and_grads(linear_logprob, *inputs, wants, softcap=6.0))
    for name, value in results[0].items():
        for other in results[1:]:
            assert relative_error(other[name], value) < 1e-6


@pytest.mark.parametrize("wants", WANTS, ids=WANTS.values())
def test_deterministic(wants, small_tiles):
    inputs = problem(33, torch.bfloat16 if IMPL == "torch" else torch.float16, bias=True)
    first, second = (outputs_and_grads(linear_logprob, *inputs, wants) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest storage that any operator returns."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor):
                size = x.untyped_storage().nbytes() // x.element_size()
                self.numel = max(self.numel, size)
        return result


@torch_only
@pytest.mark.parametrize("wants", ["", "h", "w", "b", "hwb"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_logits_stay_within_a_tile(dtype, wants, small_tiles, monkeypatch):
    n, d = 64, 4
    rng = generator(0)
    inputs = (
        torch.randn(n, d, generator=rng).to(dtype),
        torch.randn(VOCAB, d, generator=rng).to(dtype),
        torch.randn(VOCAB, generator=rng).to(dtype),
        torch.randint(VOCAB, (n,), generator=rng),
    )
    largest = LargestTensor()
    calls = []

    def watched(function):
        # Inside the op, which a dispatch mode around it takes for one operator.
        def wrapper(*args, **kwargs):
            calls.append(function.__name__)
            with largest:
                return function(*args, **kwargs)

        return wrapper

    for name in ("linear_logprob_forward", "linear_logprob_backward"):
        monkeypatch.setattr(reference, name, watched(getattr(reference, name)))
    outputs_and_grads(linear_logprob, *inputs, wants, softcap=5.0)
    assert len(calls) == (2 if set(wants) & set("wb") else 1)
    assert 0 < largest.numel <= small_tiles < n * VOCAB


@pytest.mark.parametrize("wants", WANTS, ids=WANTS.values())
def test_budget_decides_what_is_kept(wants):
    """Exponentials of the rows that take gradients, in the inputs' dtype, and nothing above."""
    hidden, weight, _, target = problem(20, torch.float32)
    hidden.requires_grad_("h" in wants)
    weight.requires_grad_("w" in wants)
    budget = 12 * reference.padded_vocab(VOCAB) * 4
    kept = []
    for bytes_, rows in ((budget, 12), (budget - 1, 12), (budget, None)):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):  # noqa: B023
            linear_logprob(hidden, weight, target, memory_budget=bytes_, grad_rows=rows)
        kept.append(max(x.numel() for x in saved if x is not weight))
    largest = 12 * reference.padded_vocab(VOCAB)
    if wants == "h":
        assert kept[0] == kept[1] == 12 * HIDDEN
    else:
        assert kept[0] == largest and max(kept[1:]) < largest


@pytest.mark.parametrize("wants", WANTS, ids=WANTS.values())
@pytest.mark.parametrize("rows", [0, 13, 31])
def test_rows_without_gradients(rows, wants, small_tiles):
    """Values as ever; gradients as if the other rows were not there."""
    hidden, weight, bias, target = problem(31, torch.float32, bias=True)
    all_rows = outputs_and_grads(linear_logprob, hidden, weight, bias, target, "")
    some = outputs_and_grads(linear_logprob, hidden, weight, bias, target, wants, grad_rows=rows)

    def first(hidden, target, **others):
        result = linear_logprob(hidden, target=target, **others)
        up = torch.zeros(len(target)).index_fill_(0, torch.arange(rows), 1.0)
        return TokenLogprobs(result.logprob * up, result.log1m_prob * up, None)

    expected = outputs_and_grads(first, hidden, weight, bias, target, wants)
    for name, value in some.items():
        true = all_rows[name] if name in all_rows else expected[name]
        assert relative_error(value, true) < 1e-6


@pytest.mark.parametrize("wants", ["", *WANTS])
def test_operator_check(wants):
    """Schema, fakes and autograd registration, as torch's own checker sees them."""
    n = 6
    hidden, weight, bias, target = problem(n, torch.float32, bias=True)
    leaves = [
        x.requires_grad_(k in wants) for x, k in zip((hidden, weight, bias), "hwb", strict=True)
    ]
    keep = {"": "nothing", "h": "unit_grad", "hwb": "inputs", "hwb kept": "exponentials"}[wants]
    torch.library.opcheck(
        torch.ops.fastalign_kernels.linear_log_odds.default,
        (*leaves[:2], target, leaves[2], 5.0, 0.7, IGNORED, IMPL, n, keep, True, None, 0),
    )


@torch_only
@pytest.mark.parametrize("wants", WANTS, ids=WANTS.values())
def test_compiled_without_a_break(wants):
    inputs = problem(9, torch.float32, bias=True)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(hidden, weight, target, **options):
        result = linear_logprob(hidden, weight, target, **options)
        return TokenLogprobs(2 * result.logprob, result.log1m_prob, None)

    def eager(hidden, weight, target, **options):
        result = linear_logprob(hidden, weight, target, **options)
        return TokenLogprobs(2 * result.logprob, result.log1m_prob, None)

    expected = outputs_and_grads(eager, *inputs, wants, softcap=5.0)
    ours = outputs_and_grads(compiled, *inputs, wants, softcap=5.0)
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, msg=name)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("wants", WANTS, ids=WANTS.values())
def test_gradient_checkpointing(wants, reentrant):
    def recomputed(hidden, weight, target, bias, **options):
        def inner(hidden, weight, bias):
            result = linear_logprob(hidden, weight, target, bias=bias, **options)
            return result.logprob, result.log1m_prob

        return TokenLogprobs(
            *checkpoint(inner, hidden, weight, bias, use_reentrant=reentrant), entropy=None
        )

    inputs = problem(11, torch.float32, bias=True)
    expected = outputs_and_grads(linear_logprob, *inputs, wants)
    ours = outputs_and_grads(recomputed, *inputs, wants)
    for name, value in expected.items():
        # The reentrant one computes values without gradients, which is another program for Triton.
        rounding = 1e-6 if reentrant and IMPL == "triton" and not name.startswith("grad") else 0.0
        torch.testing.assert_close(ours[name], value, rtol=rounding, atol=rounding, msg=name)


def test_autocast_has_no_say():
    inputs = problem(11, torch.float32, bias=True)
    expected = outputs_and_grads(linear_logprob, *inputs)
    with torch.autocast(DEVICE, torch.bfloat16):
        ours = outputs_and_grads(linear_logprob, *inputs)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


H, W, Y = torch.zeros(3, 4), torch.zeros(7, 4), torch.tensor([0, 6, 1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(1, 3, 4)}, r"hidden is \[1, 3, 4\] float32: must be \[N, D\]"),
        ({"hidden": torch.zeros(3, 4, dtype=torch.int64)}, "hidden is .* int64"),
        ({"weight": torch.zeros(7, 5)}, r"weight is \[7, 5\] float32: must be \[V, 4\]"),
        ({"weight": torch.zeros(1, 4)}, "V >= 2"),
        ({"weight": torch.zeros(0)}, "ZeRO-3"),
        ({"weight": W.bfloat16()}, "weight is in torch.bfloat16: must be in hidden's"),
        ({"weight": W.to("meta")}, "weight is on meta: must be on hidden's c"),
        ({"target": torch.zeros(2, dtype=torch.int64)}, r"target is \[2\] int64: must be \[3\]"),
        ({"target": Y.int()}, "target is .* int32"),
        ({"target": torch.tensor([0, 7, 1])}, r"target\[1\] = 7: must be in \[0, 7\)"),
        ({"target": torch.tensor([0, 6, -1])}, r"target\[2\] = -1: .* ignore_index = -100"),
        ({"bias": torch.zeros(6)}, r"bias is \[6\] float32: must be \[7\]"),
        ({"bias": torch.zeros(7, dtype=torch.float64)}, "bias is in torch.float64"),
        ({"softcap": 0.0}, "softcap = 0.0"),
        ({"softcap": math.nan}, "softcap = nan"),
        ({"temperature": 0.0}, "temperature = 0.0"),
        ({"temperature": math.inf}, "temperature = inf"),
        ({"impl": "cuda"}, "impl = 'cuda': available are torch"),
    ],
)
def test_errors(change, message):
    skip_unseen(message)
    with pytest.raises(ValueError, match=message):
        linear_logprob(**on_device({"hidden": H, "weight": W, "target": Y} | change))


def test_ignore_index_may_be_a_token():
    hidden, weight, _, target = problem(6, torch.float32, ignore=False)
    target = target.clamp_min(1)
    target[2] = 0
    result = linear_logprob(hidden, weight, target, ignore_index=0)
    assert result.logprob[2] == 0 and (result.logprob[[0, 1, 3, 4, 5]] < 0).all()


@triton_only
class TestTriton:
    @pytest.mark.parametrize("tma", [True, False])
    @pytest.mark.parametrize("wants", ["", "h", "hwb", "hwb kept"])
    def test_independent_of_tiling(self, wants, tma, monkeypatch):
        from fastalign_kernels import triton_head

        if tma and not has_tma():
            pytest.skip("the GPU has no descriptors")
        inputs = problem(50, torch.float32, bias=True)
        expected = outputs_and_grads(linear_logprob, *inputs, wants, softcap=6.0)
        for rows, columns, depth, chunk, few in ((16, 32, 16, 100, 3), (64, 128, 64, 5000, 1003)):
            tiling = triton_head.Tiling(rows, columns, depth, 3, 4, 1, tma=tma)
            monkeypatch.setattr(triton_head, "tiling_for", lambda *_, tiling=tiling: tiling)
            monkeypatch.setattr(triton_head, "CHUNK_COLUMNS", chunk)
            monkeypatch.setattr(triton_head, "REFERENCE_COLUMNS", few)
            ours = outputs_and_grads(linear_logprob, *inputs, wants, softcap=6.0)
            for name, value in expected.items():
                assert relative_error(ours[name], value) < 1e-6

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_rows_far_above_their_reference_are_done_again(self, dtype, monkeypatch):
        """The first columns say nothing of the logits to come: 88 and more above them, where
        exponentials relative to them overflow."""
        from fastalign_kernels import triton_head

        monkeypatch.setattr(triton_head, "REFERENCE_COLUMNS", 16)
        hidden, weight, _, target = problem(20, dtype, ignore=False)
        weight[:16] = 0
        # Columns behind the first ones, along the hidden state of every second row.
        weight[500:510] = 0
        for i, row in enumerate(range(0, 20, 2)):
            weight[500 + i] = (150 * hidden[row] / hidden[row].float().square().sum()).to(dtype)
        target[:4] = torch.tensor([500, 3, 501, 700])
        true = outputs_and_grads(naive, *as_double(hidden, weight, None, target), "h")
        ours = outputs_and_grads(linear_logprob, hidden, weight, None, target, "h")
        for name, value in true.items():
            assert relative_error(ours[name], value) < (2e-3 if "grad" in name else 1e-5), name

    def test_where_it_cannot_run(self):
        with pytest.raises(ValueError, match="in fp64, which needs 'torch'"):
            linear_logprob(H.double(), W.double(), Y)
