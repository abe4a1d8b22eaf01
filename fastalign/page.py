"""HTML pages of one file, which load nothing and run no script but their own."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import json
import re
from typing import Any

POLICY_MARKER = "CONTENT_SECURITY_POLICY"


def read_template(name: str) -> str:
    """A page of this package, in whose head the policy stands."""
    text = importlib.resources.files("fastalign").joinpath(name).read_text("utf-8")
    return text.replace(POLICY_MARKER, content_policy(text))


def content_policy(page: str) -> str:
    """A content security policy that names the page's one script and style by hash: nothing else
    is run, drawn with or fetched."""
    return (
        f"default-src 'none'; script-src {_hash(page, 'script')}; "
        f"style-src {_hash(page, 'style')}; base-uri 'none'; form-action 'none'"
    )


def _hash(page: str, element: str) -> str:
    (content,) = re.findall(rf"<{element}>(.*?)</{element}>", page, re.DOTALL)
    digest = hashlib.sha256(content.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def to_json(value: Any) -> str:
    """JSON in which a number is one; whatever else JSON does not know becomes text."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, default=str)


def embedded_json(value: Any) -> str:
    """JSON that may stand inside an HTML script element, whatever strings it holds."""
    text = to_json(value)
    # All of them occur within strings alone, where JSON knows the escape.
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
