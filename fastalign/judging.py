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
from fastalign.local import LocalModel, make_renderer, open_model
from fastalign.model import load_tokenizer
from fastalign.templates import JudgeWording, Renderer


@dataclass(frozen=True)
class Judging:
    """Who judges, and what it takes to ask.

    Attributes:
        rollout: the engine of a local model.
        dtype, trust_remote_code: of another local model, as in a recipe.
        max_length: most tokens of a question.
        template, chat_template_kwargs: how the model that answers is spoken to, as a dataset's in a
            recipe, also where it judges itself.  Another model that judges has its own.
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
            ConfigError: a rule, another model or a judge template that is not there, a rule with
                principles, a server without the client or with replies that are none.
        """
        if self.judge.type == "rule":
            load_rule(self.judge, "pairwise")
            if self.judge.principles:
                raise ConfigError("judge.principles: a rule is asked for one verdict overall")
        elif self.judge.type == "model":
            with _of_judge():
                tokenizer = load_tokenizer(self.other)
            make_renderer(self.other, tokenizer, self.judge)
        else:
            JudgeWording(self.judge.template)
        if self.judge.type == "endpoint":
            self._endpoint().close()

    @property
    def other(self) -> ModelConfig:
        """The model that judges where it is another one."""
        assert self.judge.model_name_or_path is not None
        return ModelConfig(
            model_name_or_path=self.judge.model_name_or_path,
            dtype=self.dtype,
            trust_remote_code=self.trust_remote_code,
        )

    def _endpoint(self) -> Endpoint:
        assert self.judge.endpoint is not None and self.replies is not None
        return Endpoint(self.judge.endpoint, "judge", self.replies)

    def renderer(self, model: LocalModel) -> Renderer:
        """How a model is spoken to that answers, or judges itself."""
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
        with contextlib.closing(judging._endpoint()) as endpoint:
            yield EndpointPairwiseJudge(who, JudgeWording(who.template), endpoint)
    elif who.type == "model":
        with contextlib.ExitStack() as stack:
            with _of_judge():
                model = stack.enter_context(
                    open_model(judging.other, judging.rollout, max_model_len=judging.max_length)
                )
            yield _local(judging, model, model.renderer(who))
    else:
        assert own is not None
        yield _local(judging, own, judging.renderer(own))


@contextlib.contextmanager
def _of_judge() -> Iterator[None]:
    """A mistake in a model's keys, named as the judge's."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"judge.{error}") from None


def _local(judging: Judging, model: LocalModel, renderer: Renderer) -> PairwiseJudge:
    return make_judge(judging.judge, "pairwise", renderer, model.judge(renderer))
