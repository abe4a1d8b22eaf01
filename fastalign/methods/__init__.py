"""The methods: which streams a record makes, and which loss joins them.

A method is one object with a handful of functions (:class:`Method`); the trainer knows nothing
else about it.  ``file.py:Class`` in a recipe names one from outside the package, which extends one
of the classes exported here (docs/extending.md).
"""

from __future__ import annotations

from typing import cast

from fastalign.config import Config, ConfigError
from fastalign.methods.base import (
    BaseMethod,
    Dropped,
    Method,
    MethodSettings,
    Metrics,
    read_settings,
    role_mean,
    total,
)
from fastalign.methods.cut import Cut, Judgments
from fastalign.methods.dpo import Dpo, Preferences
from fastalign.methods.forward_prediction import ForwardPrediction
from fastalign.methods.hindsight import Hindsight
from fastalign.methods.ilf import IlfDpo, IlfMle
from fastalign.methods.jsft import Jsft
from fastalign.methods.own import load_method, make_own
from fastalign.methods.self_training import Raft, Rest, Rso
from fastalign.methods.sft import Demonstrations, Sft, Unlikelihood

__all__ = [
    "METHODS",
    "BaseMethod",
    "Demonstrations",
    "Dropped",
    "Judgments",
    "Method",
    "MethodSettings",
    "Metrics",
    "Preferences",
    "complete",
    "make_method",
    "role_mean",
    "total",
]

METHODS: dict[str, type[BaseMethod]] = {
    "sft": Sft,
    "unlikelihood": Unlikelihood,
    "cut": Cut,
    "jsft": Jsft,
    "dpo": Dpo,
    "hindsight": Hindsight,
    "forward-prediction": ForwardPrediction,
    "ilf-mle": IlfMle,
    "ilf-dpo": IlfDpo,
    "rso": Rso,
    "rest": Rest,
    "raft": Raft,
}


def make_method(config: Config) -> Method:
    """The method of a recipe.

    Raises:
        ConfigError: there is no such method, or the recipe does not fit it.
    """
    method = _class_of(config)
    made = make_own(method, config) if ":" in config.method else method(config)
    return cast(Method, made)


def complete(config: Config) -> Config:
    """The recipe with every setting of its method in ``method_config``.

    Raises:
        ConfigError: there is no such method, or it has no such settings.
    """
    settings = read_settings(_class_of(config), config)
    return config.model_copy(
        update={"method_config": settings.model_dump(mode="json", by_alias=True)}
    )


def _class_of(config: Config) -> type[BaseMethod]:
    if ":" in config.method:
        return load_method(config.method)
    if config.method not in METHODS:
        raise ConfigError(
            f"method = {config.method!r}: known are {', '.join(METHODS)}, or file.py:Class"
        )
    return METHODS[config.method]
