"""Per-token log p and log(1 - p) of a linear head, for losses with any upstream gradient.

Both come from the log-odds m_t = z_t - logsumexp_{j != t} z_j: log p = logsigmoid(m) and
log(1 - p) = logsigmoid(-m) keep their relative accuracy from 1 - p = 0.5 down to 1e-7, where
log(1 - p) derived from a 32-bit log p is -inf.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch.nn.functional import logsigmoid

from fastalign_kernels import _dispatch, reference
from fastalign_kernels._checks import DTYPES, check_numbers, check_targets, describe
from fastalign_kernels.reference import Exponentials, HeadForward

# Modules with reference's functions of the head.
_IMPLEMENTATIONS = {"torch": "reference", "triton": "triton_head"}


@dataclass(frozen=True)
class TokenLogprobs:
    """What a head says about the target of each row, in nats; fp64 for fp64 inputs, else fp32.

    Attributes:
        logprob: [N] log p(target), never above 0; differentiable.
        log1m_prob: [N] log(1 - p(target)), never above 0; differentiable.
        entropy: [N] of the distribution over the vocabulary, without a gradient; None unless
            asked for.

    Ignored rows hold exactly 0 everywhere.
    """

    logprob: torch.Tensor
    log1m_prob: torch.Tensor
    entropy: torch.Tensor | None


def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    impl: str | None = None,
    return_entropy: bool = False,
    grad_rows: int | None = None,
    memory_budget: int = 0,
    group: dist.ProcessGroup | None = None,
    vocab_start: int = 0,
) -> TokenLogprobs:
    """Log-probs of targets under softmax(z), z = cap(hidden weight^T + bias) / temperature.

    cap(x) = softcap * tanh(x / softcap), or x without a softcap.  With the log-odds
    m_t = z_t - logsumexp_{j != t} z_j and q the softmax over the tokens other than t::

        log p = -softplus(-m)         log(1 - p) = -softplus(m)
        g_m = g_logp (1 - p) - g_log1mp p
        dz_t = g_m                    dz_j = -g_m q_j

    The [N, V] logits are never held.  One pass is a product of 2 N D V operations:

    - rows without a gradient take 1;
    - when neither weight nor bias want a gradient, rows take 2: the forward keeps dm/dhidden
      [N, D], which no upstream gradient can change, and the backward scales its rows without
      touching the weight;
    - a trained weight takes 4, since the backward computes the logits again, or 3 when their
      exponentials fit in ``memory_budget``.

    Ignored rows never reach the products.  Autocast has no say: the inputs' dtype decides.  A
    second derivative raises.

    With ``group`` each rank has all rows and a slice of the vocabulary, and gets the whole
    gradient of ``hidden`` and that of its slice.  All ranks have to make the same calls.

    Args:
        hidden: [N, D] last hidden states; bf16, fp16, fp32 or fp64.
        weight: [V, D] LM head, V >= 2, dtype and device of ``hidden``.
        target: [N] int64 token ids in [0, V), or ``ignore_index``; with ``group`` ids of the whole
            vocabulary.
        bias: [V] of the head.
        softcap: cap on the raw logits, in logits, > 0 (Gemma).
        temperature: divides the capped logits, > 0.
        ignore_index: target of rows that give 0 and take no gradient.
        impl: "torch" or "triton" (on a GPU; no fp64).  None is Triton on a GPU where it can be,
            torch elsewhere; what was chosen is logged once.
        return_entropy: also compute the entropy, at the cost of one more pass over the logits,
            none over the head.
        grad_rows: the first so many rows take gradients, the others (of a reference model that
            shares the head) give values alone.  Default: all.
        memory_budget: bytes that a trained head may keep from forward to backward; takes effect
            from N x V x (bytes of the dtype) on, and not in fp16, whose range is too small.
        group: ranks that share the vocabulary.
        vocab_start: token id of the first row of ``weight``, with ``group``.

    Raises:
        ValueError: an argument has a shape, dtype, device or value other than the above.  Targets
            out of range raise on the CPU alone: elsewhere the check would wait for the device.
    """
    _check_tensors(hidden, weight, target, bias)
    check_numbers(softcap, temperature)
    if memory_budget < 0:
        raise ValueError(f"memory_budget = {memory_budget!r}: must be a number of bytes >= 0")
    _dispatch.check_impl(impl)
    n = hidden.shape[0]
    if grad_rows is not None and not 0 <= grad_rows <= n:
        raise ValueError(f"grad_rows = {grad_rows}: must be in [0, {n}], the rows of hidden")
    if vocab_start and group is None:
        raise ValueError(f"vocab_start = {vocab_start}: only a head shared by a group has one")
    rows = n if grad_rows is None else grad_rows
    # What is wanted is read here: inside the op there is no gradient.
    keep = _what_to_keep(hidden, weight, bias, rows, memory_budget)
    log_odds, _, _, _, _, entropy = _log_odds(
        hidden,
        weight,
        target,
        bias,
        softcap,
        temperature,
        ignore_index,
        impl,
        rows,
        keep,
        return_entropy,
        None if group is None else group.group_name,
        vocab_start,
    )
    ignored = target == ignore_index
    # Masked before and after: neither the value of an ignored row nor the gradient that comes down
    # to it, which may be NaN, counts.
    return TokenLogprobs(
        logsigmoid(log_odds).masked_fill(ignored, 0.0),
        logsigmoid(-log_odds).masked_fill(ignored, 0.0),
        entropy.detach() if return_entropy else None,
    )


# What the forward keeps for the backward.
NOTHING, UNIT_GRAD, EXPONENTIALS, INPUTS = "nothing", "unit_grad", "exponentials", "inputs"


def _what_to_keep(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    rows: int,
    memory_budget: int,
) -> str:
    if not (_wants_grad(weight) or _wants_grad(bias)):
        return UNIT_GRAD if _wants_grad(hidden) else NOTHING
    bytes_kept = rows * reference.padded_vocab(weight.shape[0]) * hidden.element_size()
    if bytes_kept <= memory_budget and hidden.dtype != torch.float16:
        return EXPONENTIALS
    return INPUTS


def _wants_grad(tensor: torch.Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad and torch.is_grad_enabled()


@torch.library.custom_op("fastalign_kernels::linear_log_odds", mutates_args=())
def _log_odds(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    impl: str | None,
    grad_rows: int,
    keep: str,
    entropy: bool,
    group: str | None,
    vocab_start: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(log-odds [N], log_rest [G], unit gradient [G, D], exponentials [G, V] and their reference
    [G], entropy [N]) with G the rows that take gradients.

    What is not wanted is empty, and ignored rows hold 0; exponentials are those of the rows that
    count, behind each other.
    """
    # The unit gradient, as large as hidden in fp32, comes with memory of its own.
    rest = NOTHING if keep == UNIT_GRAD else keep
    outputs = _new_outputs(hidden, weight, grad_rows, rest, entropy)
    unit_grad = outputs.unit_grad
    if keep == UNIT_GRAD:
        unit_grad = unit_grad.new_zeros(1, 1).expand(grad_rows, hidden.shape[1])
    if keep == EXPONENTIALS:
        counted = int((target[:grad_rows] != ignore_index).sum())
        outputs.exponentials[counted:] = 0
        outputs.exponentials[:, weight.shape[0] :] = 0
    ranks = _ranks(group)
    check_targets(target, _whole_vocab(weight, ranks), ignore_index)
    module = _module(impl, hidden)
    for rows, kept in ((slice(0, grad_rows), keep), (slice(grad_rows, None), NOTHING)):
        index = _counted(target[rows], ignore_index)
        x, y = _taken(hidden[rows], index), _taken(target[rows], index) - vocab_start
        if not len(y):
            continue
        # Another rank's targets; negative ids would count from the end.
        y.masked_fill_((y < 0) | (y >= weight.shape[0]), weight.shape[0])
        options = {"softcap": softcap, "temperature": temperature, "entropy": entropy}
        with _dispatch.alone_on_device_of(hidden):
            if kept == EXPONENTIALS:
                found = module.linear_logprob_exponentials(
                    x, weight, y, bias, out=outputs.exponentials[: len(y)], **options
                )
            else:
                found = module.linear_logprob_forward(
                    x, weight, y, bias, unit_grad=kept == UNIT_GRAD, **options
                )
        if ranks is not None:
            found = _joined(found, ranks, weight, y, temperature)
        log_odds = found.target_logit - found.log_rest
        if ranks is None:
            # Looked at on the CPU alone; elsewhere a wrong target has to show.
            log_odds.masked_fill_(y == weight.shape[0], torch.nan)
        _put(outputs.log_odds[rows], index, log_odds)
        if found.rest_entropy is not None:
            # H = H(p, 1 - p) + (1 - p) H(q)
            p, other = torch.sigmoid(log_odds), torch.sigmoid(-log_odds)
            both = torch.special.entr(p) + torch.special.entr(other) + other * found.rest_entropy
            _put(outputs.entropy[rows], index, both)
        if kept in (EXPONENTIALS, INPUTS):
            _put(outputs.log_rest, index, found.log_rest)
        if found.unit_grad is not None:
            unit_grad = found.unit_grad
            if index is not None:
                unit_grad = unit_grad.new_zeros(grad_rows, unit_grad.shape[1])
                unit_grad[index] = found.unit_grad
        if found.kept is not None:
            _put_target(found, y, weight.shape[0])
            outputs.reference[: len(y)] = found.kept.reference
    return outputs._replace(unit_grad=unit_grad.contiguous())


@_log_odds.register_fake
def _(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    impl: str | None,
    grad_rows: int,
    keep: str,
    entropy: bool,
    group: str | None,
    vocab_start: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return _new_outputs(hidden, weight, grad_rows, keep, entropy)


class _Outputs(NamedTuple):
    log_odds: torch.Tensor
    log_rest: torch.Tensor
    unit_grad: torch.Tensor
    exponentials: torch.Tensor
    reference: torch.Tensor
    entropy: torch.Tensor


def _new_outputs(
    hidden: torch.Tensor, weight: torch.Tensor, rows: int, keep: str, entropy: bool
) -> _Outputs:
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    n, d = hidden.shape
    exponentials = (rows, reference.padded_vocab(weight.shape[0]))
    return _Outputs(
        log_odds=hidden.new_zeros(n, dtype=wide),
        log_rest=hidden.new_zeros(rows if keep in (EXPONENTIALS, INPUTS) else 0, dtype=wide),
        unit_grad=hidden.new_zeros((rows, d) if keep == UNIT_GRAD else 0, dtype=wide),
        exponentials=hidden.new_empty(exponentials if keep == EXPONENTIALS else 0),
        reference=hidden.new_zeros(rows if keep == EXPONENTIALS else 0, dtype=wide),
        entropy=hidden.new_zeros(n if entropy else 0, dtype=wide),
    )


@torch.library.custom_op("fastalign_kernels::linear_log_odds_backward", mutates_args=())
def _log_odds_backward(
    grad_log_odds: torch.Tensor,
    log_rest: torch.Tensor,
    exponentials: torch.Tensor,
    reference_logit: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    impl: str | None,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
    group: str | None,
    vocab_start: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the first G rows of hidden [N, D], of weight and of bias, with G the length of
    ``log_rest``; empty where none is wanted."""
    rows = len(log_rest)
    index = _counted(target[:rows], ignore_index)
    x, y = _taken(hidden[:rows], index), _taken(target[:rows], index) - vocab_start
    y.masked_fill_((y < 0) | (y >= weight.shape[0]), weight.shape[0])
    grad, rest = _taken(grad_log_odds[:rows], index), _taken(log_rest, index)
    wanted = (want_hidden, want_weight, want_bias)
    with _dispatch.alone_on_device_of(hidden):
        if exponentials.numel():
            scale = torch.exp(reference_logit[: len(y)] - rest).mul_(grad).div_(-temperature)
            grads = _backward_from(exponentials[: len(y)], scale, x, weight, bias, wanted)
        else:
            grads = _module(impl, hidden).linear_logprob_backward(
                grad,
                rest,
                x,
                weight,
                y,
                bias,
                softcap=softcap,
                temperature=temperature,
                wanted=wanted,
            )
    grad_hidden = torch.zeros_like(hidden) if want_hidden else hidden.new_empty(0)
    if grads[0] is not None:
        if group is not None:
            dist.all_reduce(grads[0], group=_ranks(group))
        _put(grad_hidden[:rows], index, grads[0].to(hidden.dtype))
    return (
        grad_hidden,
        hidden.new_empty(0) if grads[1] is None else grads[1],
        hidden.new_empty(0) if grads[2] is None else grads[2],
    )


@_log_odds_backward.register_fake
def _(
    grad_log_odds: torch.Tensor,
    log_rest: torch.Tensor,
    exponentials: torch.Tensor,
    reference_logit: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    impl: str | None,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
    group: str | None,
    vocab_start: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        torch.empty_like(hidden) if want_hidden else hidden.new_empty(0),
        torch.empty_like(weight) if want_weight else hidden.new_empty(0),
        torch.empty_like(bias) if want_bias and bias is not None else hidden.new_empty(0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    (hidden, weight, target, bias, *ctx.numbers, ctx.keep, _, ctx.group, ctx.vocab_start) = inputs
    _, log_rest, unit_grad, exponentials, reference_logit, _ = output
    # Only the log-odds have a gradient; zeros for the others would be as large as they are.
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.hidden_dtype = hidden.dtype
    if ctx.keep == UNIT_GRAD:
        # Nothing of the head: under ZeRO-3 its weight is scattered again by the backward.
        ctx.save_for_backward(unit_grad)
    elif ctx.keep != NOTHING:
        ctx.save_for_backward(log_rest, exponentials, reference_logit, hidden, weight, target, bias)


def _backward(ctx: Any, grad_log_odds: torch.Tensor | None, *_: Any) -> tuple[Any, ...]:
    nothing = (None,) * 13
    if torch.is_grad_enabled():
        # The product below would have one, without the part that goes through the unit gradient.
        raise RuntimeError("create_graph = True: linear_logprob has no second derivative")
    if grad_log_odds is None:
        return nothing
    if ctx.keep == UNIT_GRAD:
        (unit_grad,) = ctx.saved_tensors
        rows = unit_grad.shape[0]  # len() would pin a size that torch.compile keeps open
        grad_hidden = (grad_log_odds[:rows, None] * unit_grad).to(ctx.hidden_dtype)
        below = grad_log_odds.shape[0] - rows
        if below:
            grad_hidden = torch.nn.functional.pad(grad_hidden, (0, 0, 0, below))
        return grad_hidden, *nothing[1:]
    softcap, temperature, ignore_index, impl, _rows = ctx.numbers
    want_hidden, want_weight, _, want_bias = ctx.needs_input_grad[:4]
    grads = _log_odds_backward(
        grad_log_odds,
        *ctx.saved_tensors,
        softcap,
        temperature,
        ignore_index,
        impl,
        want_hidden,
        want_weight,
        want_bias,
        ctx.group,
        ctx.vocab_start,
    )
    return (
        grads[0] if want_hidden else None,
        grads[1] if want_weight else None,
        None,
        grads[2] if want_bias else None,
        *nothing[4:],
    )


_log_odds.register_autograd(_backward, setup_context=_setup_context)


def _module(impl: str | None, hidden: torch.Tensor) -> ModuleType:
    name = _dispatch.choose("linear_logprob", impl, hidden.device, hidden.dtype)
    # Triton is imported where it runs: it reads then whether it is to interpret, and not everybody
    # has it.
    return importlib.import_module(f"fastalign_kernels.{_IMPLEMENTATIONS[name]}")


def _counted(target: torch.Tensor, ignore_index: int) -> torch.Tensor | None:
    """Indices of the rows that count, or None when all do."""
    index = (target != ignore_index).nonzero()[:, 0]
    return None if len(index) == len(target) else index


def _taken(x: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
    return x if index is None else x[index]


def _put(out: torch.Tensor, index: torch.Tensor | None, value: torch.Tensor) -> None:
    if index is None:
        out.copy_(value)
    else:
        out[index] = value


# ------------------------------------------------------------------- a head shared by a group


def _ranks(name: str | None) -> dist.ProcessGroup | None:
    """A group by its name: operators take no groups."""
    if name is None:
        return None
    from torch.distributed.distributed_c10d import _resolve_process_group

    return _resolve_process_group(cast(Any, name))


def _whole_vocab(weight: torch.Tensor, ranks: dist.ProcessGroup | None) -> int:
    vocab = weight.shape[0]
    if ranks is None or weight.device.type != "cpu":
        return vocab
    whole = torch.tensor(vocab)
    dist.all_reduce(whole, group=ranks)
    return int(whole)


def _joined(
    found: HeadForward,
    ranks: dist.ProcessGroup,
    weight: torch.Tensor,
    y: torch.Tensor,
    temperature: float,
) -> HeadForward:
    """What the whole head says, from what each rank's slice does."""
    peak = found.log_rest.clone()
    dist.all_reduce(peak, dist.ReduceOp.MAX, group=ranks)
    share = torch.exp(found.log_rest - peak)
    owners = (y < len(weight)).to(share)
    sums = [share, found.target_logit, found.target_slope, owners]
    if found.rest_entropy is not None:
        # H(q) = log total + sum_r share_r (H(q_r) + peak - log_rest_r) / total
        sums.append(share * (found.rest_entropy + (peak - found.log_rest)))
    reduced = torch.stack(sums)
    dist.all_reduce(reduced, group=ranks)
    total = reduced[0]
    lost = reduced[3] != 1
    if lost.device.type == "cpu" and lost.any():
        raise ValueError(
            f"vocab_start: a target is in the slices of {int(reduced[3][lost][0])} ranks, and must "
            "be in one: each slice starts where the one before it ends"
        )
    unit_grad, kept = found.unit_grad, found.kept
    if unit_grad is not None:
        share = share / total
        # A rank that has the target holds all of its term, and a share of the others'.
        own = (1 - share) * found.target_slope / temperature
        unit_grad *= share[:, None]
        unit_grad.addcmul_(own[:, None], weight[y.clamp_max(len(weight) - 1)])
        dist.all_reduce(unit_grad, group=ranks)
    if kept is not None:
        highest = kept.reference.clone()
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=ranks)
        kept.values.mul_(torch.exp(kept.reference - highest)[:, None].to(kept.values.dtype))
        kept = Exponentials(kept.values, highest)
    return HeadForward(
        target_logit=reduced[1].masked_fill(lost, torch.nan),
        target_slope=reduced[2],
        log_rest=peak + total.log(),
        unit_grad=unit_grad,
        rest_entropy=None if found.rest_entropy is None else total.log() + reduced[4] / total,
        kept=kept,
    )


# ------------------------------------------------------------------------ kept exponentials


def _put_target(found: HeadForward, y: torch.Tensor, vocab: int) -> None:
    """Complete kept exponentials, so that a row of dz is one number times the row:
    dz_j = -g_m exp(reference - log_rest) values_j, at the target as well."""
    assert found.kept is not None
    values = found.kept.values
    at_target = torch.exp(found.log_rest - found.kept.reference).mul_(-found.target_slope)
    here = (y < vocab)[:, None]
    column = y.clamp_max(vocab - 1)[:, None]
    values.scatter_(
        1, column, torch.where(here, at_target[:, None].to(values.dtype), values.gather(1, column))
    )


def _backward_from(
    exponentials: torch.Tensor,
    scale: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    wanted: tuple[bool, bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of hidden, weight and bias from dz = scale[:, None] * exponentials: 1 pass for
    each of hidden and weight.  Rows are scaled where they are narrow: exponentials are only read.
    """
    want_hidden, want_weight, want_bias = wanted
    grad_hidden = scale.new_zeros(hidden.shape) if want_hidden else None
    grad_weight = torch.empty_like(weight) if want_weight else None
    grad_bias = torch.empty_like(bias) if want_bias and bias is not None else None
    scaled = (scale[:, None] * hidden).to(hidden.dtype) if want_weight else None
    for start in range(0, len(weight), reference.BACKWARD_COLUMNS):
        stop = min(start + reference.BACKWARD_COLUMNS, len(weight))
        e = reference.operand(exponentials[:, start:stop])
        if grad_hidden is not None:
            reference.add_product(grad_hidden, e, reference.operand(weight[start:stop]))
        if grad_weight is not None and scaled is not None:
            reference.write_product(grad_weight[start:stop], e.t(), reference.operand(scaled))
        if grad_bias is not None:
            for a in range(start, stop, reference.MIN_TILE_COLUMNS):
                b = min(a + reference.MIN_TILE_COLUMNS, stop)
                grad_bias[a:b] = scale @ exponentials[:, a:b].to(scale.dtype)
    if grad_hidden is not None:
        grad_hidden *= scale[:, None]
    return grad_hidden, grad_weight, grad_bias


def _check_tensors(
    hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, bias: torch.Tensor | None
) -> None:
    if hidden.ndim != 2 or hidden.dtype not in DTYPES:
        raise ValueError(
            f"hidden is {describe(hidden)}: must be [N, D] in bf16, fp16, fp32 or fp64"
        )
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if type(tensor).__name__ == "DTensor":  # not imported for this: that takes a second
            raise ValueError(
                f"{name} is a DTensor: must be whole; call this inside the forward of the module "
                "that fully_shard was given, or pass a slice of the vocabulary with its group"
            )
    if hidden.shape[1] == 0:
        raise ValueError(f"hidden is {describe(hidden)}: must be [N, D] with D >= 1")
    if weight.ndim != 2 and weight.numel() == 0:
        raise ValueError(
            f"weight is {describe(weight)}: a parameter that ZeRO-3 has scattered; call this "
            "inside the forward of the module that DeepSpeed wraps"
        )
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[1] or weight.shape[0] < 2:
        raise ValueError(
            f"weight is {describe(weight)}: must be [V, {hidden.shape[1]}] with V >= 2 for "
            f"hidden {describe(hidden)}"
        )
    if target.shape != hidden.shape[:1] or target.dtype != torch.int64:
        raise ValueError(f"target is {describe(target)}: must be [{hidden.shape[0]}] in int64")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias is {describe(bias)}: must be [{weight.shape[0]}]")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise ValueError(f"{name} is in {tensor.dtype}: must be in hidden's {hidden.dtype}")
    for name, tensor in (("weight", weight), ("target", target), ("bias", bias)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device}: must be on hidden's {hidden.device}")
