"""pytest with another build of the native core: python tests/sanitized.py EXTENSION ARGUMENTS..."""

from __future__ import annotations

import importlib.util
import sys

import pytest


def main(extension: str, *arguments: str) -> int:
    spec = importlib.util.spec_from_file_location("fastalign._bridge", extension)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # Whoever imports it from the package finds this one.
    sys.modules["fastalign._bridge"] = module
    code = pytest.main(list(arguments))
    from fastalign import _bridge

    assert _bridge.__file__ == extension, f"{_bridge.__file__} was tested"
    return int(code)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
