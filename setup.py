"""Builds the native extension with CMake; everything else is in pyproject.toml."""

import importlib
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import ExecError, PlatformError

ROOT = Path(__file__).resolve().parent
KERNELS = "kernels"


def find_tool(module: str, bin_dir: str, name: str) -> str | None:
    """The build tool of that Python package if it is installed, or else the one on PATH.

    The package comes first because it is the one that pyproject.toml asked for, and because it
    is found when a virtual environment is used without being activated.
    """
    try:
        folder = getattr(importlib.import_module(module), bin_dir)
    except (ImportError, AttributeError):
        return shutil.which(name)
    return shutil.which(name, path=str(folder)) or shutil.which(name)


def find_compiler() -> str | None:
    if command := shlex.split(os.environ.get("CXX", "")):
        return shutil.which(command[0])
    return next(filter(None, map(shutil.which, ("c++", "g++", "clang++", "cl"))), None)


class CMakeBuild(build_ext):
    """Runs CMake for the one extension and puts its module where setuptools wants it."""

    def build_extension(self, ext: Extension) -> None:
        if find_compiler() is None:
            raise PlatformError(
                "fastalign needs a C++17 compiler to build fastalign._bridge: install g++ or "
                f"clang++, or name one in CXX (CXX is {os.environ.get('CXX')!r})"
            )
        cmake = find_tool("cmake", "CMAKE_BIN_DIR", "cmake")
        if cmake is None:
            raise PlatformError("fastalign needs cmake to build: pip install cmake")
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "cmake"
        # From nothing each time: the cache of an isolated build names tools that are gone by the
        # next one, and CMake's errors about that lead nowhere.
        shutil.rmtree(build, ignore_errors=True)
        build.mkdir(parents=True)
        configure = [
            cmake,
            "-S",
            str(ROOT),
            "-B",
            str(build),
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
        ]
        if ninja := find_tool("ninja", "BIN_DIR", "ninja"):
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        for command in (configure, [cmake, "--build", str(build), "--parallel"]):
            try:
                subprocess.run(command, check=True)
            except subprocess.CalledProcessError as error:
                raise ExecError(f"building {ext.name} failed: {shlex.join(command)}") from error


setup(
    packages=[
        *find_packages(include=["fastalign", "fastalign.*"]),
        *find_packages(KERNELS),
        # Which `fastalign init` starts from.
        "fastalign.recipes",
    ],
    # kernels/ is a folder, not a package: with an __init__.py it would shadow the PyPI package of
    # that name, which transformers imports.
    package_dir={
        "fastalign_kernels": f"{KERNELS}/fastalign_kernels",
        "fastalign.recipes": "recipes",
    },
    ext_modules=[Extension("fastalign._bridge", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
