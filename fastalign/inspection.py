"""``fastalign inspect``: which tokens CUT calls inappropriate, and why.

Records go the trainer's way: its loader, templates, method, packs, forward pass and loss op, so
that what is shown is what is trained on.  Only dropout is off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from fastalign.batch import Batch, plan_batches
from fastalign.config import Config, ConfigError
from fastalign.data import Drops, Example, Message, Record
from fastalign.logprobs import Policy
from fastalign.methods import make_method
from fastalign.methods.cut import Cut
from fastalign.model import load_policy, load_tokenizer, resolve_adapter, resolve_dtype
from fastalign.page import embedded_json, read_template, to_json
from fastalign.prepare import dropping, load_data, make_renderers, report_lines
from fastalign.startup import check_forward, probe_words, share
from fastalign.templates import Renderer
from fastalign.timeline import Operations

RECORDS, PAGE = "inspect.jsonl", "inspect.html"


@dataclass(frozen=True)
class Token:
    """One token of a response.

    ``log_q`` is its log-prob behind the plain prompt, ``log_c`` behind the one that shows the
    judgment (None where there is none), in nats.
    """

    id: int
    text: str
    log_q: float
    log_c: float | None
    flagged: bool


@dataclass(frozen=True)
class Inspected:
    """One record and what CUT makes of each token of its response."""

    source: str
    prompt: tuple[Message, ...]
    judgment: str | None
    tokens: tuple[Token, ...]

    @property
    def flagged(self) -> int:
        return sum(token.flagged for token in self.tokens)


@dataclass(frozen=True)
class Inspection:
    """The records that were looked at, negative ones first, and what to tell of it."""

    config: Config
    records: tuple[Inspected, ...]
    lines: tuple[str, ...]

    def summary(self) -> str:
        negative = [record for record in self.records if record.judgment is not None]
        tokens = [token for record in negative for token in record.tokens]
        share = np.mean([record.flagged / len(record.tokens) for record in negative])
        contrast = np.mean([t.log_c - t.log_q for t in tokens if t.log_c is not None])
        plural = "" if len(negative) == 1 else "s"
        return (
            f"{len(negative)} negative record{plural}, "
            f"{len(self.records) - len(negative)} positive: "
            f"{sum(t.flagged for t in tokens)} of {len(tokens)} tokens flagged, "
            f"{share:.1%} of a record's on average; mean log c - log q {contrast:+.3f}"
        )


def inspect(config: Config, *, count: int = 32, seed: int | None = None) -> Inspection:
    """Run the recipe's model over ``count`` records of its data set.

    Args:
        config: A recipe with ``method: cut``; what it says of online training is left out, for the
            data set has to hold judgments.
        count: Records looked at, negative ones first, each kind drawn by ``seed``.
        seed: Default: the recipe's.

    Raises:
        ConfigError: another method, data without judgments, or whatever training would refuse.
        FloatingPointError: the model gives log-probs that are not finite.
    """
    transformers.utils.logging.disable_progress_bar()
    # Held-out prompts of an online recipe have no judgments either.
    config = resolve_adapter(config.model_copy(update={"online": None, "eval_datasets": ()}))
    method = make_method(config)
    if not isinstance(method, Cut):
        raise ConfigError(
            f"method = {config.method!r}: inspect shows the contrast of CUT: set method to cut"
        )
    tokenizer = load_tokenizer(config)
    renderers = make_renderers(config, tokenizer, None)
    records, _, reports = load_data(config, method)
    lines = report_lines(reports)
    if not any(record.is_negative for record in records):
        paths = ", ".join(dataset.path for dataset in config.datasets)
        raise ConfigError(
            f"{paths}: no record has a judgment, so that there is nothing to contrast"
        )
    seed = config.seed if seed is None else seed
    chosen, drops = _choose(config, method, records, renderers, count, seed)
    lines += [f"dropped {line}" for line in drops.lines()]

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = resolve_dtype(config, device)
    policy = load_policy(config, dtype, device).eval()
    # Adapters are loaded in fp32.  DeepSpeed trains every parameter in the model's dtype, and
    # leaves buffers as they are.
    for parameter in policy.parameters():
        parameter.data = parameter.data.to(dtype)
    unpacked, _ = check_forward(config, policy, policy, probe_words(tokenizer), device)
    if unpacked is None:
        share(policy, policy)
    scores = score(method, policy, [example for _, example in chosen], device)
    inspected = [
        _inspected(record, example, renderers[record.dataset], *values)
        for (record, example), values in zip(chosen, scores, strict=True)
    ]
    return Inspection(config, tuple(inspected), tuple(lines))


def _choose(
    config: Config,
    method: Cut,
    records: Sequence[Record],
    renderers: Sequence[Renderer],
    count: int,
    seed: int,
) -> tuple[list[tuple[Record, Example]], Drops]:
    """``count`` records that can be trained on, drawn by ``seed``; negative ones first, and each
    kind in the order of the files."""
    drawn = np.random.default_rng(seed).permutation(len(records)).tolist()
    drawn.sort(key=lambda i: not records[i].is_negative)
    drops = Drops()
    chosen: dict[int, Example] = {}
    for i in drawn:
        if len(chosen) == count:
            break
        with dropping(config, records[i], drops):
            (chosen[i],) = method.from_record(records[i], renderers[records[i].dataset])
    if not any(records[i].is_negative for i in chosen):
        raise ConfigError("no judged record can be trained on: " + "; ".join(drops.lines()))
    order = sorted(chosen, key=lambda i: (not records[i].is_negative, i))
    return [(records[i], chosen[i]) for i in order], drops


Scores = tuple[np.ndarray, np.ndarray | None, np.ndarray]


@torch.no_grad()
def score(
    method: Cut, policy: Policy, examples: Sequence[Example], device: torch.device
) -> list[Scores]:
    """(log q [N], log c [N] or None, flagged [N]) of each example's response tokens, by the packs,
    the forward pass and the loss of training.

    Raises:
        FloatingPointError: a log-prob that is not finite, with its record.
    """

    def values(
        logprob: torch.Tensor, log1m_prob: torch.Tensor, batch: Batch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return logprob, method.contrast(logprob, log1m_prob, batch)[0].flagged

    # Packs are cut as training cuts them, which orders examples anew: numbers lead back.
    numbered = [
        Example(example.streams, example.weight, str(i)) for i, example in enumerate(examples)
    ]
    found: dict[int, Scores] = {}
    cost = Operations(policy).cost(method.needs_reference)
    for batch in plan_batches(
        numbered, method.config.micro_batch_tokens, 0, 1, cost, share_prefixes=policy.shares
    ):
        batch = batch.to(device)
        logprob, flagged = policy(batch, loss=values)
        log_q = _by_record(logprob, batch, "plain")
        log_c = _by_record(logprob, batch, "judged")
        _, cu, records = batch.select("plain")
        flags = np.split(flagged.cpu().numpy(), cu[1:-1].tolist())
        for record, flag in zip(records.tolist(), flags, strict=True):
            number = int(batch.sources[record])
            found[number] = (log_q[record], log_c.get(record), flag)
            if not all(np.isfinite(x).all() for x in found[number][:2] if x is not None):
                raise FloatingPointError(
                    f"log-probs are not finite on record {examples[number].source}"
                )
    return [found[i] for i in range(len(examples))]


def _by_record(values: torch.Tensor, batch: Batch, role: str) -> dict[int, np.ndarray]:
    index, cu, records = batch.select(role)
    parts = np.split(values[index].float().cpu().numpy(), cu[1:-1].tolist())
    return dict(zip(records.tolist(), parts, strict=True)) if len(records) else {}


def _inspected(
    record: Record,
    example: Example,
    renderer: Renderer,
    log_q: np.ndarray,
    log_c: np.ndarray | None,
    flagged: np.ndarray,
) -> Inspected:
    plain = example.streams[0]
    texts = np.array(renderer.token_texts(plain.input_ids), dtype=object)[plain.loss_mask]
    ids = plain.input_ids[plain.loss_mask]
    tokens = [
        Token(
            id=int(ids[t]),
            text=texts[t],
            log_q=_shortest(log_q[t]),
            log_c=None if log_c is None else _shortest(log_c[t]),
            flagged=bool(flagged[t]),
        )
        for t in range(len(ids))
    ]
    return Inspected(record.source, record.prompt, record.judgment, tuple(tokens))


def _shortest(value: np.float32) -> float:
    """The decimal number with the fewest digits that is this one in fp32."""
    return float(str(value))


# ------------------------------------------------------------------------------------------ files


def write(inspection: Inspection, folder: Path) -> tuple[Path, Path]:
    """Write the records as JSON lines and as a page; returns both paths.

    Raises:
        ConfigError: the folder cannot be made or written to.
    """
    rows = [asdict(record) for record in inspection.records]
    records, page = folder / RECORDS, folder / PAGE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Messages keep what their file said of them, which in Parquet may be a date.
        text = "".join(to_json(row) + "\n" for row in rows)
        records.write_text(text, encoding="utf-8")
        page.write_text(make_page(_settings(inspection.config), rows), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--out = {str(folder)!r}: {error.strerror or error}") from None
    return records, page


def _settings(config: Config) -> dict[str, Any]:
    return {
        "model": config.model_name_or_path,
        "adapter": config.adapter_name_or_path,
        "data": [dataset.path for dataset in config.datasets],
        "lambda": config.cut.lambda_,
        "sigma": config.cut.min_judged_prob,
    }


def make_page(settings: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """The page with its data: one HTML file that loads nothing and runs no script but its own.

    Prompts, responses and judgments are strangers' text.  They enter as JSON in which no character
    means anything to HTML, and the page's script writes them as text alone; the policy in the
    page's head names its one script and style by hash.
    """
    before, marker, after = read_template("inspection.html").partition("INSPECTED_RECORDS")
    assert marker
    return before + embedded_json({"settings": settings, "records": list(rows)}) + after
