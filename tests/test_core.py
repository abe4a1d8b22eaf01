"""The C++ tests of the native core, built from the sources that are checked out."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_core_passes_its_own_tests(tmp_path):
    # Beside this interpreter, for an environment that is used without being activated.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    cmake, ctest = shutil.which("cmake", path=path), shutil.which("ctest", path=path)
    assert cmake is not None and ctest is not None, "cmake is a build requirement"
    build = str(tmp_path)
    options = ["-DFASTALIGN_EXTENSION=OFF", "-DFASTALIGN_TESTS=ON", "-DCMAKE_BUILD_TYPE=Debug"]
    for command in (
        [cmake, "-S", str(ROOT), "-B", build, *options],
        [cmake, "--build", build, "--parallel", "2"],
        [ctest, "--test-dir", build, "--output-on-failure"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "100% tests passed" in done.stdout
