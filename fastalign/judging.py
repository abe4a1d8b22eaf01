"""Pairwise judges outside a training run: opened by their configuration, and closed again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fastalign.config import ConfigError, JudgeConfig, ModelConfig, RolloutConfig
from fastalign.endpoint import Endpoint
from fastalign.judge import (
    EndpointPairwiseJudge,
    PairwiseJudge,
    load_rule,
    make_judge,
    make_rule_judge,
)
from fastalign.local import LocalModel, open_model
from fastalign.model import load_tokenizer
from fastalign.templates import JudgeWording, Renderer


@dataclass(frozen=True)
class Judging:
    """Who judges, and what it takes to ask.

    Attributes:
        rollout: the engine of a local model.
        dtype, trust_remote_code: of another local model, as in a recipe.
        max_length: most tokens of a question.
        template, chat_template_kwargs: how local models are spoken to, as a dataset's in a recipe.
        replies: file that keeps the replies of a server.
    """

    judge: JudgeConfig
    rollout: RolloutConfig
    max_length: int
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    trust_remote_code: bool = False
    template: str | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    replies: Path | None = None

    def check(self) -> None:
        """Refuse what would fail after the models are loaded.

        Raises:
            ConfigError: a rule or another model that is not there, a rule with principles.
        """
        if self.judge.type == "rule":
            load_rule(self.judge, "pairwise")
            if self.judge.principles:
                raise ConfigError("judge.principles: a rule is asked for one verdict overall")
        if self.judge.type == "model":
            with _of_judge():
                load_tokenizer(self.other)

    @property
    def other(self) -> ModelConfig:
        """The model that judges where it is another one."""
        assert self.judge.model_name_or_path is not None
        return ModelConfig(
            model_name_or_path=self.judge.model_name_or_path,
            dtype=self.dtype,
            trust_remote_code=self.trust_remote_code,
        )

    def renderer(self, model: LocalModel) -> Renderer:
        """How a local model is spoken to, as contestant and as judge."""
        return model.renderer(
            self.judge, template=self.template, chat_template_kwargs=self.chat_template_kwargs
        )

    def describe(self, model: ModelConfig | None) -> str:
        """In words; ``model`` is the one that judges itself."""
        who = self.judge
        if who.type == "rule":
            return f"rule {who.path}"
        if who.type == "endpoint":
            assert who.endpoint is not None
            return f"{who.endpoint.model} at {who.endpoint.base_url}"
        if who.type == "model":
            return f"model {who.model_name_or_path}"
        assert model is not None
        return f"self, {named(model)}"


def named(model: ModelConfig) -> str:
    """A model and its adapter in words."""
    adapter = model.adapter_name_or_path
    return model.model_name_or_path + (f" with {adapter}" if adapter is not None else "")


@contextlib.contextmanager
def open_judge(judging: Judging, own: LocalModel | None) -> Iterator[PairwiseJudge]:
    """The judge, asked in both orders whoever it is; only an object with a ``compare`` of its own
    is taken as it is.

    Args:
        own: the model that judges where ``judge.type`` is "self".

    Raises:
        ConfigError: the judge cannot be loaded.
        EngineError: its engine does not start.
    """
    who = judging.judge
    if who.type == "rule":
        yield make_rule_judge(who, "pairwise")
    elif who.type == "endpoint":
        assert who.endpoint is not None and judging.replies is not None
        endpoint = Endpoint(who.endpoint, "judge", judging.replies)
        with contextlib.closing(endpoint):
            yield EndpointPairwiseJudge(who, JudgeWording(who.template), endpoint)
    elif who.type == "model":
        with contextlib.ExitStack() as stack:
            with _of_judge():
                model = stack.enter_context(
                    open_model(judging.other, judging.rollout, max_model_len=judging.max_length)
                )
            yield _local(judging, model)
    else:
        assert own is not None
        yield _local(judging, own)


@contextlib.contextmanager
def _of_judge() -> Iterator[None]:
    """A mistake in a model's keys, named as the judge's."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"judge.{error}") from None


def _local(judging: Judging, model: LocalModel) -> PairwiseJudge:
    renderer = judging.renderer(model)
    return make_judge(judging.judge, "pairwise", renderer, model.judge(renderer))
