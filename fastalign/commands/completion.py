"""``fastalign completion``: what a shell needs to complete commands, options and keys."""

from __future__ import annotations

import argparse
from typing import Any

from fastalign.commands.common import OK, add_command

EXAMPLES = """\
  fastalign completion bash > ~/.local/share/bash-completion/completions/fastalign
  fastalign completion zsh > ~/.zfunc/_fastalign      # a folder in fpath, before compinit
  fastalign completion fish > ~/.config/fish/completions/fastalign.fish
  source <(fastalign completion bash)                 # in this shell alone
"""
CODES = "  0 done, 2 no such shell"
SHELLS = ("bash", "zsh", "fish")
# What arguments without choices name: a folder or hub name, or a file.
FOLDERS = {"model", "adapter", "against_adapter", "base", "source", "out", "output_dir", "runs"}
FILES = {
    "recipe", "prompts", "answers", "files", "filled", "result", "judge", "template", "pairs",
    "against", "calibration", "include_path", "data", "output",
}  # fmt: skip
KEYS = "_fastalign_keys"
PREAMBLE = {
    # Readline breaks words at "=", and no space may follow one.
    "bash": """\
{function}() {{
  compopt -o nospace 2>/dev/null
  compgen -W "{keys}" -- "$1"
}}
""",
    "zsh": """\
{function}() {{
  local -a keys=({keys})
  compadd -S '' -a keys
}}
""",
    "fish": """\
function {function}
  printf '%s\\n' {keys}
end
""",
}


def add(commands: Any) -> None:
    completion = add_command(
        commands,
        "completion",
        help="print the script with which a shell completes this command",
        examples=EXAMPLES,
        codes=CODES,
    )
    completion.add_argument("shell", choices=SHELLS)
    completion.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    import shtab

    from fastalign.schema import keys

    parser = arguments.parser
    for action in _actions(parser):
        if action.dest == "overrides":
            _complete(action, {"bash": KEYS, "zsh": KEYS, "fish": f"({KEYS})"})
        elif action.dest in FOLDERS:
            _complete(action, shtab.DIRECTORY)
        elif action.dest in FILES:
            _complete(action, shtab.FILE)
    words = " ".join(f"{key}=" for key in keys())
    preamble: Any = {s: text.format(function=KEYS, keys=words) for s, text in PREAMBLE.items()}
    script = shtab.complete(parser, arguments.shell, preamble=preamble)
    if arguments.shell == "zsh":
        # shtab 1.8 completes the first of several arguments alone: this is zsh's way to say "and
        # all that follow".
        script = script.replace('"(*)::', '"*:').replace('"(*):', '"*:')
    print(script, end="")
    return OK


def _complete(action: argparse.Action, how: Any) -> None:
    # Where shtab looks for it.
    action.complete = how  # type: ignore[attr-defined]


def _actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Of a parser and of all below it."""
    found = []
    for action in parser._actions:
        found.append(action)
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                found += _actions(below)
    return found
