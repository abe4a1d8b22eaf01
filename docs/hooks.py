"""What the site has beside docs/*.md: README.md as its first page, the keys of a recipe as
fastalign/config.py has them, the recipes, and every file of the repository that a page links to.
"""

from __future__ import annotations

import ast
import inspect
import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from fastalign import config as recipes

ROOT = Path(__file__).resolve().parents[1]
DOCS = "docs/"
FENCE = re.compile(r"^```.*?^```\s*?$", re.S | re.M)
LINK = re.compile(r"(\]\()([^)\s#:]+)(?=[)#])")
# What tests/test_docs.py reads of a fence: more than the site's highlighter understands.
NOT_RUN = re.compile(r'^(```\w+) not-run=".*"$', re.M)
SHOWN = {".yaml": "yaml", ".py": "python", ".txt": "text", ".cff": "yaml", ".sbatch": "bash"}


# ------------------------------------------------------------------------------------ the hooks


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what is generated, then whatever pages link to, and what these link to."""
    made = {"index.md": None, "configuration.md": configuration(), "recipes.md": recipe_table()}
    for uri, text in made.items():
        source = ROOT / "README.md" if text is None else None
        files.append(_file(config, uri, text, source))
    waiting = [file for file in files if file.src_uri.endswith(".md")]
    while waiting:
        page = waiting.pop()
        for target in links(page.content_string, source_of(page.src_uri)):
            uri = uri_of(target)
            if uri in files.src_uris or not (ROOT / target).is_file():
                continue  # what is not there is reported by mkdocs
            file = _file(config, uri, _shown(target), ROOT / target)
            files.append(file)
            if target.endswith(".md"):
                waiting.append(file)
    return files


def on_page_markdown(markdown: str, page: Any, config: MkDocsConfig, files: Files) -> str:
    source = source_of(page.file.src_uri)

    def relink(found: re.Match[str]) -> str:
        target = _target(found[2], source)
        return found[1] + posixpath.relpath(uri_of(target), posixpath.dirname(page.file.src_uri))

    markdown = NOT_RUN.sub(r"\1", markdown)
    return _outside_fences(markdown, lambda text: LINK.sub(relink, text))


# ---------------------------------------------------------------- files here and pages there


def source_of(uri: str) -> str:
    """Where in the repository a page of the site comes from."""
    if uri == "index.md":
        return "README.md"
    return uri if (ROOT / uri).is_file() else DOCS + uri


def uri_of(target: str) -> str:
    """Where in the site a file of the repository is."""
    if target.startswith(DOCS):
        return target.removeprefix(DOCS)
    special = {"README.md": "index.md", "recipes": "recipes.md"}
    if target in special:
        return special[target]
    return f"{target}.md" if Path(target).suffix in SHOWN or _is_plain(target) else target


def links(text: str, source: str) -> Iterator[str]:
    """What a page links to, as paths in the repository."""
    for part in FENCE.split(text):
        for found in LINK.finditer(part):
            yield _target(found[2], source)


def _target(link: str, source: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))


def _is_plain(target: str) -> bool:
    return Path(target).name in ("Dockerfile", "Makefile")


def _shown(target: str) -> str | None:
    """A page that shows a file; None where the file itself is the page, or is only downloaded."""
    if uri_of(target) == target:
        return None
    language = SHOWN.get(Path(target).suffix, Path(target).name.lower())
    return f"# {target}\n\n````{language}\n{(ROOT / target).read_text('utf-8')}\n````\n"


def _file(config: MkDocsConfig, uri: str, text: str | None, source: Path | None) -> File:
    if text is not None:
        return File.generated(config, uri, content=text)
    return File.generated(config, uri, abs_src_path=str(source))


def _outside_fences(text: str, change: Any) -> str:
    done, end = [], 0
    for fence in FENCE.finditer(text):
        done += [change(text[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*done, change(text[end:])])


# ------------------------------------------------------------------------------- what is generated


def configuration() -> str:
    """Every key of a recipe: its type, default and description, by section."""
    lines = [
        "# Keys of a recipe",
        "",
        "A recipe is one YAML file of these keys; any of them can be given on the command line:",
        "`key=value`, `section.key=value`, `datasets.0.path=value`. Unknown keys are errors. This",
        "page is made from the types that check a recipe.",
        "",
    ]
    done: set[type[BaseModel]] = set()
    waiting = [("", recipes.Config)]
    while waiting:
        path, model = waiting.pop(0)
        if model in done:
            continue
        done.add(model)
        if path:
            lines += [f"## {path}", "", *inspect.cleandoc(model.__doc__ or "").splitlines(), ""]
        own = _sections(model)
        for title, names in own.items():
            if title:
                lines += [f"## {title}" if not path else f"### {title}", ""]
            lines += ["| key | type | default | |", "| --- | --- | --- | --- |"]
            for name in names:
                field = model.model_fields[name]
                key = field.alias or name
                lines.append(_row(f"{path}.{key}" if path else key, field))
                inner = recipes._section(field.annotation)
                if inner is not None:
                    many = ".0" if "tuple" in str(field.annotation) else ""
                    waiting.append((f"{path}.{key}{many}" if path else f"{key}{many}", inner))
            lines.append("")
    return "\n".join(lines)


def _sections(model: type[BaseModel]) -> dict[str, list[str]]:
    """Names of the fields by the comment that stands above them, inherited ones first."""
    found: dict[str, list[str]] = {}
    for owner in reversed(model.__mro__):
        if not (isinstance(owner, type) and issubclass(owner, BaseModel)) or owner is BaseModel:
            continue
        source = inspect.getsource(owner)
        body = ast.parse(source).body[0]
        assert isinstance(body, ast.ClassDef)
        starts = {
            node.lineno: node.target.id
            for node in body.body
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        }
        title = "The model" if owner is recipes.ModelConfig else ""
        for number, line in enumerate(source.splitlines(), 1):
            if heading := re.fullmatch(r"    # ([A-Z][\w ]+)", line):
                title = heading[1]
            if (name := starts.get(number)) in model.model_fields:
                found.setdefault(title if model is recipes.Config else "", []).append(name)
    return found


def _row(key: str, field: FieldInfo) -> str:
    cells = [f"`{key}`", f"`{type_name(field)}`", _default(field), field.description or ""]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def type_name(field: FieldInfo) -> str:
    """A type as a user of YAML reads it, with its bounds."""
    bounds = {"Gt": ">", "Ge": ">=", "Lt": "<", "Le": "<="}
    limits = [
        f"{bounds[kind]} {getattr(limit, kind.lower())}"
        for limit in field.metadata
        if (kind := type(limit).__name__) in bounds
    ]
    return " ".join([_plain_type(field.annotation), *limits])


def _plain_type(annotation: Any) -> str:
    arguments = getattr(annotation, "__args__", ())
    origin = str(getattr(annotation, "__origin__", "")) + type(annotation).__name__
    if annotation is type(None):
        return "null"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    if "Literal" in origin:
        return " or ".join(str(argument) for argument in arguments)
    if "Union" in origin:
        return " or ".join(_plain_type(argument) for argument in arguments)
    if "Annotated" in origin:
        return _plain_type(arguments[0])
    if "tuple" in origin:
        return f"list of {_plain_type(arguments[0])}"
    if "dict" in origin:
        return "mapping"
    names = {str: "text", int: "integer", float: "number", bool: "true or false"}
    return names.get(annotation, "any")


def _default(field: FieldInfo) -> str:
    value = field.default
    if field.default_factory is not None:
        value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, BaseModel):
        return ""
    if isinstance(value, bool) or value is None:
        return {True: "`true`", False: "`false`", None: "`null`"}[value]
    if isinstance(value, tuple):
        return f"`[{', '.join(repr(item) for item in value)}]`"
    return f"`{value}`"


def recipe_table() -> str:
    """The recipes, each with the first sentence of its comment."""
    lines = ["# Recipes", "", "Keys are explained [by section](configuration.md).", ""]
    folders = {
        "": "Of each method",
        "paper": "Of the papers, at full size; not run by us",
        "models": "For models of today; not run by us",
    }
    for folder, title in folders.items():
        lines += [f"## {title}", "", "| recipe | |", "| --- | --- |"]
        for path in sorted((ROOT / "recipes" / folder).glob("*.yaml")):
            name = os.fspath(path.relative_to(ROOT))
            lines.append(f"| [{path.stem}](../{name}) | {_first_sentence(path)} |")
        lines.append("")
    return "\n".join(lines)


def _first_sentence(path: Path) -> str:
    comment = []
    for line in path.read_text("utf-8").splitlines():
        if not line.startswith("#"):
            break
        comment.append(line.removeprefix("#").strip())
    text = " ".join(comment)
    return re.split(r"(?<=[a-z)])[.:](?= |$)", text)[0].replace("|", "\\|")
