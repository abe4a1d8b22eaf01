"""The recipe as a JSON Schema, for editors: keys, types, values and what they mean."""

from __future__ import annotations

from typing import Any

from fastalign.config import Config

DIALECT = "https://json-schema.org/draft/2020-12/schema"
MODELINE = "# yaml-language-server: $schema="
"""Before the path or address of a schema: what editors with YAML's language server look for."""


def recipe_schema() -> dict[str, Any]:
    """Of one recipe.  What holds between several keys is not in it: ``--dry-run`` checks that."""
    from fastalign.methods import METHODS

    schema = Config.model_json_schema(by_alias=True)
    method = schema["properties"]["method"]
    # Names that an editor can offer, or a class of the user's own.
    method |= {"anyOf": [{"enum": list(METHODS)}, {"pattern": ":"}]}
    for name in ("judge", "eval_judge"):
        # A text alone is the path of a rule.
        schema["properties"][name]["anyOf"].append({"type": "string"})
    return {"$schema": DIALECT} | schema | {"title": "FastAlign recipe"}


def keys(schema: dict[str, Any] | None = None) -> list[str]:
    """The dotted keys that an override can name; of lists those of the first item."""
    schema = schema or Config.model_json_schema(by_alias=True)
    found: list[str] = []
    for name, value in schema["properties"].items():
        sections = [value, *value.get("anyOf", ())]
        items = [part["items"] for part in sections if "$ref" in part.get("items", {})]
        references = [part["$ref"] for part in (*sections, *items) if "$ref" in part]
        for reference in references:
            section = schema["$defs"][reference.rpartition("/")[2]]
            prefix = f"{name}.0" if items else name
            found += [f"{prefix}.{key}" for key in keys(section | {"$defs": schema["$defs"]})]
        if not references:
            found.append(name)
    return found
