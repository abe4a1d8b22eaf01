"""The methods: which streams a record makes, and which loss joins them.

A method is one object with a handful of functions (:class:`Method`); the trainer knows nothing
else about it.  ``file.py:Class`` in a recipe names one from outside the package.
"""

from __future__ import annotations

from collections.abc import Callable

from fastalign.config import Config, ConfigError
from fastalign.methods.base import Method, Metrics
from fastalign.methods.cut import Cut
from fastalign.methods.dpo import Dpo
from fastalign.methods.forward_prediction import ForwardPrediction
from fastalign.methods.hindsight import Hindsight
from fastalign.methods.ilf import IlfDpo, IlfMle
from fastalign.methods.jsft import Jsft
from fastalign.methods.self_training import Raft, Rest, Rso
from fastalign.methods.sft import Sft, Unlikelihood
from fastalign.plugins import load_object

__all__ = ["METHODS", "Method", "Metrics", "make_method"]

METHODS: dict[str, Callable[[Config], Method]] = {
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
    if ":" in config.method:
        return load_object(config.method, "method")(config)
    if config.method not in METHODS:
        raise ConfigError(
            f"method = {config.method!r}: known are {', '.join(METHODS)}, or file.py:Class"
        )
    return METHODS[config.method](config)
