"""Model + Batch -> per-token log-probs: the one place that calls the head kernel."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from fastalign.attention import PACKED_ATTENTION, Segments
from fastalign.batch import Batch, make_batch
from fastalign.config import ConfigError
from fastalign.data import Example, Stream
from fastalign.offloading import HostActivations
from fastalign_kernels import TokenLogprobs, linear_logprob

IDLE_TOKENS = 8


@dataclass(frozen=True)
class HeadSpec:
    """What the model does to its logits besides the product: z = scale * softcap(h W^T + b)."""

    softcap: float | None = None
    scale: float = 1.0


class Policy(nn.Module):
    """A causal LM whose forward gives log-probs of targets, or the loss made of them.

    DeepSpeed wraps this module, so that body, head and loss all run inside its forward and
    ZeRO-3 gathers the head's weight like any other.
    """

    model: Any  # a transformers model, or PEFT's wrapper around one

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.head_spec = head_spec(self.causal_lm)
        self.packed = False
        # Whether the streams of an example may share their prefix.
        self.shares = False
        # Whether ZeRO-3 spreads the weights over ranks.
        self.sharded = False
        # Whether activations wait for the backward in the host's memory.
        self.offloads = False

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The transformers model, inside its PEFT wrapper when there is one."""
        get_base = getattr(self.model, "get_base_model", None)
        return get_base() if get_base is not None else self.model

    def forward(
        self,
        batch: Batch,
        loss: Callable[..., Any] | None = None,
        probe: Literal["hidden", "logits"] | None = None,
        **loss_inputs: Any,
    ) -> Any:
        """Log-probs of the batch's targets, or the loss made of them.

        Returns (logprob [M], log1m_prob [M]); with ``loss``, what
        ``loss(logprob, log1m_prob, batch, **loss_inputs)`` returns; with ``probe``, the hidden
        states [M, D] of the rows or the model's own logits [T, V] for the start-up checks.
        """
        if probe == "logits":
            return self.causal_lm(input_ids=batch.input_ids[None], use_cache=False).logits[0]
        hidden = self._hidden(batch)
        if probe == "hidden":
            return hidden
        head = self.causal_lm.get_output_embeddings()
        result: TokenLogprobs = linear_logprob(
            hidden,
            head.weight,
            batch.targets,
            bias=getattr(head, "bias", None),
            softcap=self.head_spec.softcap,
            temperature=1.0 / self.head_spec.scale,
        )
        if loss is None:
            return result.logprob, result.log1m_prob
        return loss(result.logprob, result.log1m_prob, batch, **loss_inputs)

    def _hidden(self, batch: Batch) -> torch.Tensor:
        """Last hidden states of the rows that carry a loss, [M, D]."""
        if self.packed:
            packing = {"segments": Segments.of(batch)}
            return self._body(batch.input_ids, batch.positions, packing)[batch.rows]
        assert batch.key_index is None, "prefixes are shared in packed attention alone"
        spans = list(itertools.pairwise(batch.bounds))
        if self.sharded:
            # Ranks have different numbers of sequences, but every pass through a sharded body is
            # collective: those with fewer repeat a few tokens, whose rows nothing reads.
            most = torch.tensor(len(spans), device=batch.rows.device)
            dist.all_reduce(most, op=dist.ReduceOp.MAX)
            spans += [(0, min(spans[0][1], IDLE_TOKENS))] * (int(most) - len(spans))
        alone = [self._body(batch.input_ids[a:b], batch.positions[a:b], {}) for a, b in spans]
        return torch.cat(alone)[batch.rows]

    def _body(
        self, input_ids: torch.Tensor, positions: torch.Tensor, packing: dict[str, Any]
    ) -> torch.Tensor:
        with HostActivations() if self.offloads else contextlib.nullcontext():
            return self.causal_lm.base_model(
                input_ids=input_ids[None],
                position_ids=positions[None],
                use_cache=False,
                **packing,
            ).last_hidden_state[0]


def head_spec(model: PreTrainedModel) -> HeadSpec:
    """Read from the config how the model scales or caps its logits (checked by
    :func:`check_logprobs`)."""
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0
    return HeadSpec(softcap=getattr(config, "final_logit_softcapping", None), scale=scale / divisor)


def probe_batch(
    vocab_size: int, lengths: tuple[int, ...], device: torch.device, seed: int = 0
) -> Batch:
    """Random sequences of these lengths in one pack, every token but the first a target."""
    generator = np.random.default_rng(seed)
    streams = tuple(
        Stream(
            role="probe",
            input_ids=generator.integers(vocab_size, size=n, dtype=np.int32),
            loss_mask=np.arange(n) > 0,
        )
        for n in lengths
    )
    return make_batch([Example(streams=streams, weight=1.0, source="start-up check")]).to(device)


def probe_streams(vocab_size: int, prefix: int, rest: tuple[int, ...], seed: int = 0) -> Example:
    """Random sequences that begin with the same ``prefix`` tokens; what follows is targets."""
    generator = np.random.default_rng(seed)
    begin, *ends = (generator.integers(vocab_size, size=n, dtype=np.int32) for n in (prefix, *rest))
    streams = tuple(Stream.of("probe", begin, end) for end in ends)
    return Example(streams=streams, weight=1.0, source="start-up check")


@torch.no_grad()
def check_packing(policy: Policy, forward: Callable[..., torch.Tensor], batch: Batch) -> str | None:
    """Run the sequences of ``batch`` packed and alone through the actual model.

    ``forward`` is the policy, or the DeepSpeed engine around it.  Leaves packed attention on when
    both agree; otherwise puts the model's own attention back and returns the reason, for the
    start-up report.
    """
    model = policy.causal_lm
    original = model.config._attn_implementation
    alone = forward(batch, probe="hidden").float()
    try:
        model.set_attn_implementation(PACKED_ATTENTION)
        policy.packed = True
        packed = forward(batch, probe="hidden").float()
    except (NotImplementedError, ValueError, TypeError) as error:
        reason = f"{type(model).__name__} cannot run packed attention: {error}"
    else:
        difference = _difference(packed, alone)
        if difference <= _tolerance(model):
            return None
        reason = (
            f"{type(model).__name__} gives other results packed than alone "
            f"(relative difference {difference:.1e})"
        )
    policy.packed = policy.shares = False
    model.set_attn_implementation(original)
    return reason


@torch.no_grad()
def check_sharing(
    policy: Policy, forward: Callable[..., torch.Tensor], streams: Example
) -> str | None:
    """Run streams that begin alike with their prefix computed once, and each with its own.

    For a policy that :func:`check_packing` has packed.  Allows sharing when both agree; otherwise
    returns the reason, for the start-up report.
    """
    model = policy.causal_lm
    device = next(model.parameters()).device
    apart, shared = (make_batch([streams], share).to(device) for share in (False, True))
    assert shared.num_tokens < apart.num_tokens
    expected = forward(apart, probe="hidden").float()
    try:
        found = forward(shared, probe="hidden").float()
    except NotImplementedError as error:
        return f"{type(model).__name__}: {error}"
    difference = _difference(found, expected)
    if not difference <= _tolerance(model):
        return (
            f"{type(model).__name__} gives other results with a shared prefix "
            f"(relative difference {difference:.1e})"
        )
    policy.shares = True
    return None


@torch.no_grad()
def check_logprobs(policy: Policy, forward: Callable[..., Any], batch: Batch) -> float:
    """Compare our log-probs of one sequence with those from ``model(...).logits``.

    Returns the mean absolute difference.

    Raises:
        ConfigError: the model does something to its logits that the head kernel cannot express.
    """
    ours, _ = forward(batch)
    logits = forward(batch, probe="logits")[batch.rows]
    theirs = logits.float().log_softmax(-1).gather(-1, batch.targets[:, None])[:, 0]
    difference = (ours.float() - theirs).abs().mean().item()
    if not difference <= (5e-2 if _is_half(policy.causal_lm) else 1e-3):
        raise ConfigError(
            f"model_name_or_path: {type(policy.causal_lm).__name__} changes its logits outside "
            f"the LM head in a way that FastAlign does not express (log-probs differ by "
            f"{difference:.3g} on average), so it cannot be trained"
        )
    return difference


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative, the largest of all ranks: what follows from it has to be the same on each."""
    worst = ((found - expected).norm() / expected.norm()).nan_to_num(nan=torch.inf)
    if dist.is_initialized():
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return worst.item()


def _tolerance(model: PreTrainedModel) -> float:
    """Of the same arithmetic in another order: rounding of the dtype through all layers."""
    return 2e-2 if _is_half(model) else 1e-4


def _is_half(model: PreTrainedModel) -> bool:
    return next(model.parameters()).dtype in (torch.bfloat16, torch.float16)
