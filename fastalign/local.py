"""A model on this machine outside a training run: what holds it, and how it is spoken to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import load_peft_weights
from transformers import PreTrainedTokenizerBase

from fastalign.config import ConfigError, JudgeConfig, ModelConfig, RolloutConfig
from fastalign.judge import JudgeModel
from fastalign.methods.base import JudgeKind
from fastalign.model import (
    POLICY,
    adapter_config,
    context_length,
    load_generation_config,
    load_tokenizer,
    resolve_dtype,
    with_adapters_base,
)
from fastalign.printing import reason
from fastalign.rollout import EngineError, RolloutEngine, ServedModel, make_engine
from fastalign.templates import Renderer


@dataclass(frozen=True)
class LocalModel:
    """A model in an engine of its own.

    Attributes:
        adapter: what answers in the engine; None: the model as it is.
        context: most tokens of prompt and answer together.
    """

    config: ModelConfig
    tokenizer: PreTrainedTokenizerBase
    engine: RolloutEngine
    adapter: str | None
    context: int

    def renderer(
        self,
        judge: JudgeConfig | None = None,
        kind: JudgeKind | None = "pairwise",
        template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Renderer:
        """See :func:`make_renderer`."""
        return make_renderer(
            self.config, self.tokenizer, judge, kind, template, chat_template_kwargs
        )

    def judge(self, renderer: Renderer) -> JudgeModel:
        """It as a judge, asked in the words of ``renderer``."""
        return JudgeModel(self.engine, renderer, self.adapter)


@contextlib.contextmanager
def open_model(
    config: ModelConfig,
    rollout: RolloutConfig,
    *,
    max_model_len: int | None = None,
    seed: int = 0,
) -> Iterator[LocalModel]:
    """Load a model, with its adapter where it has one, into the engine that ``rollout`` asks for;
    an adapter that was trained on a base in NF4 gets such a base.

    Args:
        max_model_len: most tokens of prompt and answer together; None: what it was made for.
        seed: of the engine's own random state; requests bring theirs.

    Raises:
        ConfigError: there is no such model or adapter, or the one is not of the other.
        EngineError: the engine does not start.
    """
    config = with_adapters_base(config)
    tokenizer = load_tokenizer(config)
    path = config.adapter_name_or_path
    held = adapter_config(path) if path is not None else None
    context = min(max_model_len or 2**31, context_length(config))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    engine = make_engine(
        ServedModel(
            config.model_name_or_path,
            dtype=resolve_dtype(config, device),
            max_model_len=context,
            device=device,
            lora_rank=held.r if held is not None else None,
            seed=seed,
            revision=config.model_revision,
            trust_remote_code=config.trust_remote_code,
            load_in_4bit=config.load_in_4bit,
        ),
        rollout,
    )
    try:
        if held is not None:
            try:
                tensors = load_peft_weights(path, device="cpu")
            except Exception as error:  # of all kinds where its files are damaged
                raise ConfigError(f"adapter_name_or_path = {path!r}: {reason(error)}") from None
            try:
                engine.load_adapter(POLICY, tensors, held.to_dict(), 0)
            except EngineError as error:
                raise ConfigError(
                    f"adapter_name_or_path = {path!r}: cannot be used with "
                    f"{config.model_name_or_path}: {error}"
                ) from None
        yield LocalModel(config, tokenizer, engine, POLICY if held else None, context)
    finally:
        engine.close()


def make_renderer(
    config: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    judge: JudgeConfig | None = None,
    kind: JudgeKind | None = "pairwise",
    template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Renderer:
    """How a model is spoken to: by a dataset's template, and in the words of ``judge``, which is
    asked for judgments of ``kind``."""
    end = load_generation_config(config).eos_token_id
    wording = judge.template if judge is not None else None
    return Renderer(
        tokenizer,
        template,
        chat_template_kwargs,
        judge_template=wording if kind != "written" else None,
        written_template=wording if kind == "written" else None,
        eos_ids=end if isinstance(end, list) else [] if end is None else [end],
    )
