"""What the tests of HTML pages share: a parser's and a browser's view of them, and text that would
do something in a page that takes it for markup."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
# Each would do something where it is taken for markup, script or a placeholder of the page's.
HOSTILE = (
    "</script><script>document.title='taken'</script>",
    "<!--<script>",
    "]]><img src=x onerror=\"document.title='taken'\">",
    "&lt;b&gt; & <b>",
    "line\u2028and\u2029paragraph, \u202e reversed, \x00\x1b[31m",
    "`${document.title='taken'}` \\u003c \\ \" '",
    "INSPECTED_RECORDS CONTENT_SECURITY_POLICY",
)


class Page(HTMLParser):
    """What a browser would find in a page: its elements, and what is in script and style."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.contents: list[tuple[str, dict[str, str | None], str]] = []

    @classmethod
    def of(cls, text: str) -> Page:
        page = cls()
        page.feed(text)
        page.close()
        return page

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.contents.append((tag, dict(attrs), ""))

    def handle_data(self, data):
        # In these two the parser, like a browser, sees no tag but their own end.
        if self.cdata_elem:
            tag, attrs, text = self.contents[-1]
            self.contents[-1] = (tag, attrs, text + data)

    @property
    def data(self) -> Any:
        (text,) = [text for _, attrs, text in self.contents if attrs.get("id") == "data"]
        return json.loads(text)


def check_inert(page: Page) -> None:
    """It fetches nothing, and its policy lets nothing run but its own script."""
    (policy,) = [
        str(attrs["content"])
        for tag, attrs in page.elements
        if tag == "meta" and attrs.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy.startswith("default-src 'none';") and "unsafe" not in policy
    for tag in ("script", "style"):
        (content,) = [c for name, attrs, c in page.contents if name == tag and not attrs]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    for tag, attrs in page.elements:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "form")
        assert not [name for name in attrs if name == "src" or name.startswith("on")]
        assert attrs.get("href", "#").startswith("#")


def colours(page: str, dark: bool) -> dict[str, tuple[float, float, float]]:
    light_part, dark_part = re.findall(r":root \{(.*?)\}", page, re.DOTALL)
    found = re.findall(r"--([a-z0-9]+): #([0-9a-f]{6})", light_part + (dark_part if dark else ""))
    return {name: tuple(int(v[i : i + 2], 16) / 255 for i in (0, 2, 4)) for name, v in found}


def luminance(colour: tuple[float, float, float]) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def ratio(one: tuple[float, float, float], other: tuple[float, float, float]) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def drawn_by_chromium(page: Path, folder: Path) -> str:
    """The page's elements after its script has run."""
    options = [
        "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", "--disable-quic",
        f"--user-data-dir={folder / 'profile'}", "--dump-dom",
    ]  # fmt: skip
    done = subprocess.run(
        [str(CHROMIUM), *options, page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return done.stdout
