"""Objects named in a recipe: ``package.module:name`` or ``file.py:name``."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

from fastalign.config import ConfigError


def load_object(path: str, key: str) -> Any:
    """Import what ``path`` names; ``key`` is the recipe's key, for the error.

    Raises:
        ConfigError: the file, module or name does not exist, or importing it failed.
    """
    where, separator, name = path.rpartition(":")
    if not separator or not where or not name:
        raise ConfigError(f"{key} = {path!r}: write package.module:name or file.py:name")
    try:
        module = _load_file(where) if where.endswith(".py") else importlib.import_module(where)
    except FileNotFoundError:
        raise ConfigError(f"{key} = {path!r}: no such file {where}") from None
    except ModuleNotFoundError as error:
        raise ConfigError(f"{key} = {path!r}: {error}") from None
    except Exception as error:  # the user's own code may raise anything while it is imported
        raise ConfigError(
            f"{key} = {path!r}: importing {where} raised {type(error).__name__}: {error}"
        ) from error
    try:
        return getattr(module, name)
    except AttributeError:
        raise ConfigError(f"{key} = {path!r}: {where} has no {name!r}") from None


def _load_file(file: str) -> Any:
    path = Path(file).resolve()
    if not os.path.isfile(path):
        raise FileNotFoundError(file)
    # Files of one name in several folders are several modules; each is run once, as importing
    # does, so that a judge keeps its state and does not change under a run.
    name = f"fastalign_plugin_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Registered first, as importing does: dataclasses and pickling look their module up.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:  # whatever stopped it: half a module must not be found again
        del sys.modules[name]
        raise
    return module
