"""A method of the user's own: loaded by its name, and held to what the trainer relies on.

Mistakes in it are told as mistakes in a recipe are: in one line, with the line of the user's file
where one raised something.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import torch
from pydantic import BaseModel

from fastalign import ranks
from fastalign.batch import Batch, make_batch
from fastalign.config import Config, ConfigError
from fastalign.data import Example, Kind
from fastalign.episodes import Episode
from fastalign.methods.base import BaseMethod, JudgeKind, Method
from fastalign.plugins import explained, load_object

# Examples that the start-up check of a loss takes together and apart.
PROBED = 4
# Of its size, what the order of a float32 sum may change a loss.
ROUNDING = 1e-4


def load_method(path: str) -> type[BaseMethod]:
    """The class that ``path`` names.

    Raises:
        ConfigError: there is none, or it is no method.
    """
    found = load_object(path, "method")
    if not isinstance(found, type) or not issubclass(found, BaseMethod):
        raise ConfigError(
            f"method = {path!r}: it is {_kind(found)}: a method is a class that extends BaseMethod "
            "of fastalign.methods, or one that does so (Preferences, Judgments, Demonstrations)"
        )
    for problem in _class_problems(found):
        raise ConfigError(f"method = {path!r}: {problem}")
    return found


def _class_problems(method: type[BaseMethod]) -> list[str]:
    wants = (method.wants,) if isinstance(method.wants, str) else method.wants
    kinds = get_args(Kind)
    allowed: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "online_wants": (method.online_wants, (*kinds, None)),
        "judge_kind": (method.judge_kind, (*get_args(JudgeKind), None)),
        "compares": (method.compares, ("all", "tournament")),
        "needs_reference": (method.needs_reference, (True, False)),
    }
    found = [
        f"{name} = {value!r}: must be one of {', '.join(map(repr, known))}"
        for name, (value, known) in allowed.items()
        if value not in known
    ]
    if not isinstance(wants, tuple) or not set(wants) <= set(kinds):
        names = ", ".join(map(repr, kinds))
        found.append(f"wants = {method.wants!r}: must be one or a tuple of {names}")
    needed = ["loss"]
    if wants:
        needed.append("from_record")
    if method.online_wants is not None:
        needed.append("from_episode")
    found += [
        f"it has no {name}()"
        for name in needed
        if getattr(method, name, None) is getattr(BaseMethod, name, None)
    ]
    callables = ("__init__", "loss", *HELD)
    found += filter(None, (_other_arguments(method, name) for name in callables))
    settings: Any = method.Settings
    if not isinstance(settings, type) or not issubclass(settings, BaseModel):
        found.append("Settings is no class that extends MethodSettings of fastalign.methods")
    return found


def _other_arguments(method: type[BaseMethod], name: str) -> str | None:
    """Why a function cannot be called as the trainer does."""
    function = getattr(method, name, None)
    if not callable(function):
        return None
    known = inspect.signature(getattr(BaseMethod if name == "__init__" else Method, name))
    named = [p.name for p in known.parameters.values() if p.kind == p.KEYWORD_ONLY]
    plain = [p for p in known.parameters if p not in named]
    try:
        inspect.signature(function).bind(*plain, **dict.fromkeys(named))
    except TypeError as error:
        wanted = ", ".join([*plain, *(["*", *named] if named else [])])
        return f"{name}() must take ({wanted}): {error}"
    return None


def make_own(method: type[BaseMethod], config: Config) -> BaseMethod:
    """The method, whose functions raise :class:`ConfigError` where they raise something or return
    what cannot be used."""
    path = config.method
    with explained(path, "method"):
        made = method(config)
    if not hasattr(made, "settings"):
        raise ConfigError(f"method = {path!r}: its __init__ does not call super().__init__(config)")
    loss = _Loss(made, path)
    held = {name: _held(getattr(made, name), path, wrong) for name, wrong in HELD.items()}
    # Each global batch is counted before it is cut into packs.
    held["denominator"] = loss.before(held["denominator"])
    vars(made).update(held, loss=loss)
    return made


def _held(
    function: Callable[..., Any], path: str, problem: Callable[[Any], str | None]
) -> Callable[..., Any]:
    @functools.wraps(function)
    def held(*arguments: Any, **keywords: Any) -> Any:
        with explained(path, "method"):
            given = function(*arguments, **keywords)
        wrong = problem(given)
        if wrong is not None:
            raise ConfigError(f"method = {path!r}: {function.__name__}() returned {wrong}")
        return given

    return held


def _not_examples(given: Any) -> str | None:
    if not isinstance(given, list):
        return f"{_kind(given)}: must be a list of Examples"
    wrong = next((x for x in given if not isinstance(x, Example)), None)
    if wrong is not None:
        return f"a list with {_kind(wrong)}: must be a list of Examples"
    if any(not example.streams for example in given):
        return "an Example without streams"
    return None


def _no_tokens(given: Any) -> str | None:
    if not isinstance(given, np.ndarray) or given.dtype != np.int32 or given.ndim != 1:
        return f"{_kind(given)}: must be token ids, an int32 array [P]"
    return None if len(given) else "no tokens: there is nothing to continue"


def _no_episode(given: Any) -> str | None:
    return None if isinstance(given, Episode) else f"{_kind(given)}: must be an Episode"


def _no_count(given: Any) -> str | None:
    whole = isinstance(given, int) and given > 0
    return None if whole else f"{given!r}: must be a whole number from 1 on"


def _no_denominator(given: Any) -> str | None:
    positive = isinstance(given, int | float) and given > 0 and math.isfinite(given)
    return None if positive else f"{given!r}: must be a number above 0"


HELD: dict[str, Callable[[Any], str | None]] = {
    "from_record": _not_examples,
    "from_episode": _not_examples,
    "select": _not_examples,
    "rollout_prompt": _no_tokens,
    "choose": _no_episode,
    "examples_per_prompt": _no_count,
    "denominator": _no_denominator,
}
"""What is wrong with a result of a method's function, by its name."""


def _kind(given: Any) -> str:
    """What a value is, in words."""
    if isinstance(given, torch.Tensor | np.ndarray):
        dtype = str(given.dtype).removeprefix("torch.")
        return f"a {type(given).__name__} of {dtype} {list(given.shape)}"
    if isinstance(given, type):
        return f"a class that extends {', '.join(base.__name__ for base in given.__bases__)}"
    return "None" if given is None else f"a {type(given).__name__}"


class _Loss:
    """The loss of a method, its result looked at, and before its first use also how it adds up."""

    def __init__(self, method: BaseMethod, path: str) -> None:
        self.method, self.path = method, path
        self.function: Callable[..., Any] = method.loss  # type: ignore[attr-defined]
        self.names: set[str] | None = None
        self.probed = False

    def __call__(self, logprob: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
        with explained(self.path, "method"):
            given = self.function(logprob, *arguments, **keywords)
        wrong = _no_loss(given, logprob.requires_grad and torch.is_grad_enabled())
        if wrong is None:
            wrong = self._other_names(given[1])
        if wrong is not None:
            raise self._error(f"loss() returned {wrong}")
        return given

    def before(self, denominator: Callable[..., float]) -> Callable[..., float]:
        """The denominator of a global batch, the first of which the loss is tried on."""

        @functools.wraps(denominator)
        def counted(examples: Sequence[Example]) -> float:
            if not self.probed and examples:
                self.probed = True
                self._probe(examples[:PROBED])
            return denominator(examples)

        return counted

    def _error(self, problem: str) -> ConfigError:
        return ConfigError(f"method = {self.path!r}: {problem}")

    def _other_names(self, metrics: Mapping[str, torch.Tensor]) -> str | None:
        """Ranks and packs add their metrics up by name."""
        names = set(metrics)
        if self.names is None:
            self.names = ranks.from_first(names)
        if names == self.names:
            return None
        other = ", ".join(sorted(names ^ self.names))
        return f"other metrics for another pack ({other}): the names must not depend on the data"

    def _probe(self, examples: Sequence[Example]) -> None:
        """Try the loss on log-probs that are made up: it has to be a sum over records that counts
        each by its weight, or it would depend on how a batch is cut into packs and ranks."""
        # A copy: what a loss keeps from pack to pack must not come from here.
        method = copy.copy(self.method)
        method.__dict__ = copy.deepcopy(
            {k: v for k, v in vars(method).items() if k not in (*HELD, "loss")}
        )
        rng = np.random.default_rng(0)
        rows = [sum(int(s.loss_mask.sum()) for s in example.streams) for example in examples]
        values = [torch.from_numpy(rng.uniform(-3, -0.1, (2, n)).astype(np.float32)) for n in rows]

        def loss_of(
            batch: Batch, logprob: torch.Tensor
        ) -> tuple[float, Mapping[str, torch.Tensor]]:
            policy, reference = logprob
            with torch.no_grad(), explained(self.path, "method"):
                given = type(method).loss(  # type: ignore[attr-defined]
                    method,
                    policy,
                    torch.log(-torch.expm1(policy)),
                    batch,
                    reference=reference if method.needs_reference else None,
                    progress=1.0,
                )
            wrong = _no_loss(given, needs_gradient=False)
            if wrong is not None:
                raise self._error(f"loss() returned {wrong}")
            return float(given[0]), given[1]

        batch = make_batch(examples)
        together, _ = loss_of(batch, torch.cat(values, dim=1))
        again, _ = loss_of(batch, torch.cat(values, dim=1))
        if together != again:
            # It draws or keeps something; nothing can be compared.
            return
        apart = [loss_of(make_batch([e]), v)[0] for e, v in zip(examples, values, strict=True)]
        if abs(together - sum(apart)) > ROUNDING * (1 + sum(map(abs, apart))):
            raise self._error(
                f"loss() of {len(examples)} records is {together:.6g} in one pack and "
                f"{sum(apart):.6g} in packs of their own: it must be a sum over the records, which "
                "the trainer divides by denominator()"
            )
        nothing = replace(batch, weights=torch.zeros_like(batch.weights))
        unweighted, metrics = loss_of(nothing, torch.cat(values, dim=1))
        if abs(unweighted) > ROUNDING:
            raise self._error(
                f"loss() of records of weight 0 is {unweighted:.6g}: it must count each record by "
                "batch.weights"
            )
        counted = [name for name, value in metrics.items() if float(value[1]) != 0]
        if counted:
            raise self._error(
                f"the metric {counted[0]!r} of loss() counts records of weight 0: it must be of "
                "those alone whose batch.weights is above 0"
            )


def _no_loss(given: Any, needs_gradient: bool) -> str | None:
    """What is wrong with a loss and its metrics."""
    if not isinstance(given, tuple) or len(given) != 2:
        return f"{_kind(given)}: must be (loss, metrics)"
    loss, metrics = given
    if not isinstance(loss, torch.Tensor) or loss.ndim or not loss.is_floating_point():
        return f"{_kind(loss)} as loss: must be a scalar tensor, summed over the pack's records"
    if needs_gradient and not loss.requires_grad:
        return "a loss without a gradient: it must be computed from the log-probs, undetached"
    if not isinstance(metrics, dict):
        return f"{_kind(metrics)} as metrics: must be a dict of name -> [sum, count]"
    for name, value in metrics.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor) or value.shape != (2,):
            return (
                f"{_kind(value)} as metric {name!r}: must be a tensor [sum, count], which "
                "fastalign.methods.total makes"
            )
    return None
