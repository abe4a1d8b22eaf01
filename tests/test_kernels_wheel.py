"""The kernels as a distribution of their own: what is in it, what it needs, that it works alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import fastalign
import fastalign_kernels

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "kernels" / "fastalign_kernels"


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    """Standard output of a command that succeeds; its whole output in the failure otherwise."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=os.environ | env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pip(*arguments: str | Path, cwd: Path) -> None:
    """pip as it is without a network and without what the distribution requires."""
    run(sys.executable, "-m", "pip", *arguments, "--no-index", "--no-deps", cwd=cwd)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, from a copy: building in place would leave and reuse build/."""
    work = tmp_path_factory.mktemp("kernels-wheel")
    skipped = shutil.ignore_patterns("build", "*.egg-info", "__pycache__")
    # Links as links, with what the licence's leads to.
    shutil.copytree(ROOT / "kernels", work / "kernels", ignore=skipped, symlinks=True)
    shutil.copy(ROOT / "LICENSE", work)
    pip("wheel", "--no-build-isolation", "-w", work, work / "kernels", cwd=work)
    (built,) = work.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def test_wheel_holds_the_package_the_marker_of_its_types_and_the_licence(wheel):
    version = fastalign_kernels.__version__
    assert wheel.name == f"fastalign_kernels-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        licence = archive.read(f"fastalign_kernels-{version}.dist-info/licenses/LICENSE")
    assert licence == (ROOT / "LICENSE").read_bytes()
    modules = {f"{PACKAGE.name}/{path.relative_to(PACKAGE)}" for path in PACKAGE.rglob("*.py")}
    package = {name for name in names if ".dist-info/" not in name}
    assert package == modules | {"fastalign_kernels/py.typed"}


def test_version_is_that_of_fastalign(metadata):
    assert metadata["Name"] == "fastalign-kernels"
    assert metadata["Version"] == fastalign_kernels.__version__ == fastalign.__version__


def test_wheel_requires_what_fastalign_does_of_torch_and_triton_and_nothing_else(metadata):
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    required = {Requirement(line) for line in metadata.get_all("Requires-Dist")}
    everything = {Requirement(line) for line in project["dependencies"]}
    assert required == {line for line in everything if line.name in ("torch", "triton")}
    assert {line.name for line in required} == {"torch", "triton"}
    assert metadata["Requires-Python"] == project["requires-python"]
    assert metadata["License-Expression"] == project["license"]


ALONE = """
import sys
import torch
import fastalign_kernels

print(fastalign_kernels.__file__)
others = ("fastalign", "transformers", "deepspeed", "vllm", "trl", "pydantic")
print([name for name in others if name in sys.modules])

torch.manual_seed(0)
hidden = torch.randn(6, 16, requires_grad=True)
weight = torch.randn(101, 16, requires_grad=True)
target = torch.randint(101, (6,))
result = fastalign_kernels.linear_logprob(hidden, weight, target)
given = torch.autograd.grad((2 * result.logprob - result.log1m_prob).sum(), (hidden, weight))
logprob = torch.log_softmax(hidden @ weight.T, dim=1)[torch.arange(6), target]
log1m_prob = torch.log1p(-logprob.exp())
wanted = torch.autograd.grad((2 * logprob - log1m_prob).sum(), (hidden, weight))
torch.testing.assert_close(result.logprob, logprob)
torch.testing.assert_close(result.log1m_prob, log1m_prob)
torch.testing.assert_close(given, wanted)
print([name for name in others if name in sys.modules])
"""


def test_wheel_works_without_the_trainer(wheel, tmp_path):
    site = tmp_path / "site"
    pip("install", "--target", site, wheel, cwd=tmp_path)
    output = run(sys.executable, "-c", ALONE, cwd=tmp_path, PYTHONPATH=str(site))
    file, imported, used = output.splitlines()
    assert Path(file).is_relative_to(site)
    assert imported == used == "[]"
