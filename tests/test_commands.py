"""What all commands share: help with examples and exit codes, and completion in real shells."""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from fastalign.cli import main, make_parser
from fastalign.commands.data import KINDS
from fastalign.config import RolloutConfig
from fastalign.data import Kind

DOCS = Path(__file__).parents[1] / "docs" / "commands.md"


def commands(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                yield name, below
                for inner, parser_of_it in commands(below):
                    yield f"{name} {inner}", parser_of_it


PARSERS = dict(commands(make_parser()))


@pytest.mark.parametrize("name", PARSERS)
def test_help_has_examples_and_exit_codes(name, capsys):
    with pytest.raises(SystemExit) as end:
        main([*name.split(), "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    _, _, rest = text.partition("\nexamples:\n")
    examples, _, codes = rest.partition("\nexit codes:\n")
    assert f"  fastalign {name.split()[0]}" in examples
    assert codes.startswith("  0 ")


@pytest.mark.parametrize("name", [name for name in PARSERS if " " not in name])
def test_examples_are_commands(name):
    """Every example parses."""
    epilog = PARSERS[name].epilog or ""
    lines = epilog.partition("exit codes:")[0].replace("\\\n", " ").splitlines()
    examples = [line.partition("|")[0].partition(" > ")[0] for line in lines]
    examples = [line.partition("  #")[0] for line in examples if line.startswith("  fastalign ")]
    assert examples
    for example in examples:
        make_parser().parse_known_args(shlex.split(example)[1:])


def test_the_page_has_every_command_as_its_help_does():
    page = DOCS.read_text(encoding="utf-8")
    for name, parser in PARSERS.items():
        if " " in name:
            continue
        assert f"\n## fastalign {name}\n" in page
        section = page.partition(f"\n## fastalign {name}\n")[2].partition("\n## ")[0]
        examples, _, codes = (parser.epilog or "").partition("\n\nexit codes:\n")
        lines = [line.strip() for line in examples.splitlines()[1:] if line.startswith("  ")]
        for text in (*lines, f"Exit codes: {' '.join(codes.split())}."):
            assert text in (section if text in lines else " ".join(section.split())), name


def test_choices_are_those_of_the_recipe():
    """Written out in the commands, which must not import what defines them."""
    assert set(KINDS) == set(get_args(Kind))
    engines = get_args(RolloutConfig.model_fields["engine"].annotation)
    for name in ("generate", "eval"):
        (action,) = [a for a in PARSERS[name]._actions if a.dest == "engine"]
        assert set(action.choices or ()) < set(engines)


def test_help_waits_for_nothing_heavy():
    code = (
        "import sys, fastalign.cli; fastalign.cli.make_parser(); "
        "print([m for m in ('torch', 'numpy', 'pydantic', 'yaml', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --------------------------------------------------------------------------------- completion


@pytest.fixture(scope="module")
def scripts(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("completion")
    found = {}
    for shell in ("bash", "zsh", "fish"):
        done = subprocess.run(
            [sys.executable, "-m", "fastalign", "completion", shell],
            capture_output=True,
            text=True,
            check=True,
        )
        found[shell] = folder / shell
        found[shell].write_text(done.stdout)
    (folder / "recipes").mkdir()
    (folder / "recipes" / "mine.yaml").touch()
    return found


def complete(scripts: dict[str, Path], *words: str) -> list[str]:
    """What bash offers for the last word, with the function that the script registers."""
    program = """
source "$1"; shift
function=$(complete -p fastalign); function=${function##*-F }; function=${function%% *}
COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 ))
$function
printf '%s\\n' "${COMPREPLY[@]}"
"""
    done = subprocess.run(
        ["bash", "--norc", "-c", program, "bash", str(scripts["bash"]), *words],
        capture_output=True,
        text=True,
        check=True,
        cwd=scripts["bash"].parent,
    )
    assert not done.stderr
    return done.stdout.split()


COMPLETED = [
    (["fastalign", "tra"], ["train"]),
    (["fastalign", "data", ""], ["check"]),
    (["fastalign", "judge", "ex"], ["export"]),
    (["fastalign", "train", "--dry"], ["--dry-run"]),
    (["fastalign", "train", "recipes/m"], ["recipes/mine.yaml"]),
    (["fastalign", "train", "recipes/mine.yaml", "learn"], ["learning_rate="]),
    (["fastalign", "train", "r.yaml", "a=1", "judge.endpoint.mo"], ["judge.endpoint.model="]),
    (["fastalign", "data", "check", "--as", "j"], ["judged"]),
    (["fastalign", "eval", "--engine", ""], ["auto", "vllm", "hf"]),
]


@pytest.mark.parametrize(("words", "offered"), COMPLETED)
def test_bash_completes(scripts, words, offered):
    assert complete(scripts, *words) == offered


@pytest.mark.skipif(shutil.which("fish") is None, reason="needs fish")
@pytest.mark.parametrize(("words", "offered"), COMPLETED)
def test_fish_completes(scripts, words, offered):
    done = subprocess.run(
        ["fish", "-c", f"source {scripts['fish']}; complete -C '{' '.join(words)}'"],
        capture_output=True,
        text=True,
        check=True,
        cwd=scripts["fish"].parent,
    )
    assert [line.split("\t")[0] for line in done.stdout.splitlines()] == offered


# An interactive zsh in a terminal of its own: a tab behind the words, then what the line is now.
ZSH = """
zmodload zsh/zpty
zpty shell zsh -f -i
zpty -w shell 'fpath=($PWD $fpath); autoload -Uz compinit; compinit -D -u
told() { print -r -- "$BUFFER" > told; exit }
zle -N told; bindkey "^I" complete-word "^X" told'
zpty -n -w shell "$1"$'\\t\\x18'
while zpty -t shell; do zpty -r shell line; done
"""


@pytest.mark.skipif(shutil.which("zsh") is None, reason="needs zsh")
@pytest.mark.parametrize(("words", "offered"), [COMPLETED[0], *COMPLETED[4:7]])
def test_zsh_completes(scripts, tmp_path, words, offered):
    shutil.copy(scripts["zsh"], tmp_path / "_fastalign")
    shutil.copytree(scripts["zsh"].parent / "recipes", tmp_path / "recipes")
    subprocess.run(
        ["zsh", "-f", "-c", ZSH, "zsh", " ".join(words)],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
    )
    # A space behind what is whole, none behind a key.
    wanted = " ".join([*words[:-1], *offered])
    line = (tmp_path / "told").read_text().rstrip("\n")
    assert line == wanted if wanted.endswith("=") else line == f"{wanted} "


@pytest.mark.skipif(shutil.which("zsh") is None, reason="needs zsh")
def test_zsh_takes_it_from_a_shell_s_start(scripts):
    program = 'autoload -Uz compinit && compinit -D -u; eval "$(<$1)"; print ${_comps[fastalign]}'
    done = subprocess.run(
        ["zsh", "-f", "-c", program, "zsh", str(scripts["zsh"])],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "_shtab_fastalign\n" and not done.stderr
