"""The docs: commands and programs in them run, keys and recipes are as the types have them, and the
site holds together and loads nothing from elsewhere."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

import fastalign.config
from fastalign.cli import main
from fastalign.config import Config, load_config, parse_config

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
# What makes a command of the docs fit the tests' model, behind what the page says.
SMALLER = {
    "train": "dtype=float32 rollout.engine=hf max_completion_length=8 max_length=512"
    " report_to=[] global_batch_size=4 save_steps=null",
    "inspect": "dtype=float32 max_length=512",
    "generate": "--engine hf --max-tokens 8 --dtype float32",
    "eval": "--engine hf --dtype float32",
    "data": "",
    "judge": "",
}


RUN = ("bash", "python", "yaml")


@dataclass(frozen=True)
class Fence:
    """A block of a page: its language, title="file", not-run="reason", and where it begins."""

    language: str
    title: str | None
    reason: str | None
    text: str
    line: int


FENCE = re.compile(r"^(`{3,})(\w*)([^\n]*)\n(.*?)^\1$", re.M | re.S)
ATTRIBUTES = re.compile(r'([\w-]+)="([^"]*)"')


def fences(page: Path) -> Iterator[Fence]:
    text = page.read_text("utf-8")
    for found in FENCE.finditer(text):
        attributes = dict(ATTRIBUTES.findall(found[3]))
        assert not ATTRIBUTES.sub("", found[3]).strip(), f"{page.name}: {found[3]!r}"
        assert attributes.keys() <= {"title", "not-run"}, f"{page.name}: {found[3]!r}"
        line = text.count("\n", 0, found.start()) + 1
        title, reason = attributes.get("title"), attributes.get("not-run")
        yield Fence(found[2], title, reason, found[4], line)


def commands(text: str) -> Iterator[list[str]]:
    """The commands of a block, without comments, lines that end in a backslash joined."""
    for line in text.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def running(page: Path) -> bool:
    return any(f.language in RUN and f.reason is None and f.title is None for f in fences(page))


@pytest.mark.parametrize(
    "page", [p for p in PAGES if running(p)], ids=lambda p: str(p.relative_to(ROOT))
)
def test_what_a_page_says_runs(page, tiny_llama, tmp_path, monkeypatch, capsys, quiet_process):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-model").symlink_to(tiny_llama)
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    blocks = list(fences(page))
    for block in blocks:
        if block.title is not None:
            assert Path(block.title).name == block.title
            (tmp_path / block.title).write_text(block.text, encoding="utf-8")
    program = {"__name__": "__main__"}  # a page's python blocks follow each other
    for block in blocks:
        where = f"{page.name}:{block.line}"
        if block.reason is not None or block.title is not None:
            continue
        if block.language == "bash":
            for words in commands(block.text):
                assert words[0] == "fastalign", f"{where}: {words[0]} is not run: say not-run="
                code = main([*words[1:], *SMALLER[words[1]].split()])
                assert code == 0, f"{where}: {shlex.join(words)}: {capsys.readouterr().err}"
        elif block.language == "python":
            exec(compile(block.text, where, "exec"), program)
        elif block.language == "yaml":
            parts_of_a_recipe(block.text)


def parts_of_a_recipe(text: str) -> Config:
    whole = {
        "method": "dpo",
        "model_name_or_path": "m",
        "datasets": [{"path": "d.jsonl"}],
        "output_dir": "o",
    }
    return parse_config(whole | yaml.safe_load(text))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_block_that_is_not_run_says_why(page):
    for block in fences(page):
        where = f"{page.name}:{block.line}"
        assert block.reason is None or (len(block.reason) > 8 and block.language in RUN), where
        # A fence without a language is no way around: what looks like a command has to be bash.
        hidden = block.language == "" and "\nfastalign " in f"\n{block.text}"
        assert not hidden, f"{where}: say bash"


# ------------------------------------------------------------------------------ keys and recipes


def sections() -> list[type[BaseModel]]:
    found = vars(fastalign.config).values()
    return [c for c in found if isinstance(c, type) and issubclass(c, BaseModel)]


def test_every_key_has_a_description():
    missing = [
        f"{model.__name__}.{name}"
        for model in sections()
        for name, field in model.model_fields.items()
        if not field.description
    ]
    assert not missing


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: str(p.relative_to(ROOT / "recipes")))
def test_a_recipe_is_one(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_config(path)
    text = path.read_text("utf-8")
    if path.parent.name in ("paper", "models"):
        assert "# Not run by us." in text
        assert all(re.search(rf"^# +{n} GPUs?: [\d,.]+, \w", text, re.M) for n in (1, 8, 64))
        assert config.output_dir == f"runs/{path.stem}"
    if config.model_name_or_path.startswith("runs/"):
        names = {load_config(other).output_dir for other in path.parent.glob("*.yaml")}
        assert config.model_name_or_path in names, "what it starts from is no recipe's result"


# -------------------------------------------------------------------------------------- the site

# What a browser fetches when it shows a page, as opposed to what a reader may click on.
FETCHED = {
    "script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src",
    "audio": "src", "embed": "src", "object": "data", "use": "href",
}  # fmt: skip


class Page(HTMLParser):
    """What a page loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if tag == "link" and values.get("rel") not in ("canonical", "prev", "next", "license"):
            self.loads.append(values.get("href", ""))
        if tag in FETCHED:
            self.loads.append(values.get(FETCHED[tag], ""))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` builds it: a broken link or anchor fails here."""
    pytest.importorskip("mkdocs", reason="needs the extra [docs]")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config as load

    folder = tmp_path_factory.mktemp("site")
    build(load(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True))
    return folder


def test_the_site_loads_nothing_from_elsewhere(site):
    for path in site.rglob("*.html"):
        for address in Page(path.read_text("utf-8")).loads:
            assert "//" not in address, f"{path.relative_to(site)} loads {address}"
    for path in site.rglob("*.css"):
        for address in re.findall(r"url\(\s*['\"]?([^)'\"]+)|@import\s+([^;]+)", path.read_text()):
            loaded = "".join(address)
            assert loaded.startswith("data:") or "//" not in loaded, f"{path.name}: {loaded[:80]}"


def test_the_site_has_every_key_and_recipe(site):
    keys = (site / "configuration.html").read_text("utf-8")
    for key in ("learning_rate", "cut.lambda", "judge.endpoint.base_url", "datasets.0.path"):
        assert f"<code>{key}</code>" in keys
    for name, field in Config.model_fields.items():
        assert f"<code>{field.alias or name}</code>" in keys, name
    for recipe in RECIPES:
        shown = (site / recipe.relative_to(ROOT)).with_name(f"{recipe.name}.html")
        assert "method" in shown.read_text("utf-8"), recipe
