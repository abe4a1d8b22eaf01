"""Code of the user's own, named in a recipe as ``package.module:name`` or ``file.py:name``."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterator
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
        line = line_in(error, path)
        at = f":{line}" if line else ""
        raise ConfigError(
            f"{key} = {path!r}: importing {where}{at} raised {_in_words(error)}"
        ) from error
    try:
        return getattr(module, name)
    except AttributeError:
        near = difflib.get_close_matches(name, vars(module), 1)
        hint = f": did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{key} = {path!r}: {where} has no {name!r}{hint}") from None


def source_file(path: str) -> Path | None:
    """The file behind ``package.module:name`` or ``file.py:name``; None where there is none."""
    where = path.rpartition(":")[0]
    if where.endswith(".py"):
        return Path(where).resolve()
    spec = importlib.util.find_spec(where)
    return Path(spec.origin) if spec is not None and spec.origin else None


def base_name(path: str) -> str:
    """The path of an object without the folders of its file."""
    where, separator, name = path.rpartition(":")
    return f"{Path(where).name}:{name}" if separator and where.endswith(".py") else path


@contextlib.contextmanager
def explained(path: str, key: str) -> Iterator[None]:
    """What the code behind ``path`` raises inside the block, as one line that says where.

    Left as they are: our own exceptions, which mean something to whoever catches them, and what
    was raised without that code.

    Raises:
        ConfigError: the code raised something.
    """
    try:
        yield
    except Exception as error:
        line = line_in(error, path)
        if line is None or type(error).__module__.partition(".")[0] == "fastalign":
            raise
        raise ConfigError(
            f"{key} = {path!r}: line {line} of {source_file(path)} raised {_in_words(error)}"
        ) from error


def line_in(error: BaseException, path: str) -> int | None:
    """The last line of the code behind ``path`` that an error came through."""
    file = str(source_file(path))
    if isinstance(error, SyntaxError) and error.filename == file:
        return error.lineno
    lines = [number for frame, number in traceback.walk_tb(error.__traceback__)
             if frame.f_code.co_filename == file]  # fmt: skip
    return lines[-1] if lines else None


def _in_words(error: BaseException) -> str:
    """An exception in one line, whatever it brought."""
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    words = " ".join(text.split())
    words = words if len(words) <= 300 else words[:300] + "..."
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


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
