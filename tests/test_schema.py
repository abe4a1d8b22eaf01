"""The recipe's JSON Schema says what the recipe's own checks say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from fastalign.cli import main
from fastalign.config import Config, ConfigError, parse_config
from fastalign.schema import keys, recipe_schema

ROOT = Path(__file__).parents[1]
RECIPES = sorted([*ROOT.glob("recipes/**/*.yaml"), *ROOT.glob("examples/*.yaml")])
SCHEMA = recipe_schema()


def complaints(tree: Any) -> list[str]:
    errors = Draft202012Validator(SCHEMA).iter_errors(json.loads(json.dumps(tree)))
    return [f"{error.json_path}: {error.message}" for error in errors]


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load(ROOT.joinpath("recipes", name).read_text())


def test_it_is_a_schema():
    Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_fits(path):
    tree = yaml.safe_load(path.read_text())
    assert complaints(tree) == []
    # And so does all that it stands for.
    assert complaints(parse_config(tree).model_dump(mode="json", by_alias=True)) == []


@pytest.mark.parametrize(
    ("name", "path", "value", "says"),
    [
        ("sft.yaml", ("learning_rte",), 1e-5, "$: Additional properties are not allowed"),
        ("cut-offline.yaml", ("cut", "lamda"), 1.1, "$.cut: Additional properties"),
        ("sft.yaml", ("lr_scheduler_type",), "cosin", "$.lr_scheduler_type: 'cosin' is not one of"),
        ("sft.yaml", ("method",), "sfd", "$.method: 'sfd' is not valid under any"),
        ("sft.yaml", ("datasets",), [], "$.datasets: [] should be non-empty"),
        ("sft.yaml", ("datasets",), [{"file": "a"}], "$.datasets[0]: 'path' is a required"),
        ("sft.yaml", ("learning_rate",), 0, "$.learning_rate: 0 is less than or equal to"),
        ("sft.yaml", ("learning_rate",), "fast", "$.learning_rate: 'fast' is not of type 'number'"),
        ("self-judge.yaml", ("judge", "type"), "me", "$.judge"),
        ("cut-online.yaml", ("online", "iterations"), "all", "$.online"),
        ("sft.yaml", ("zero_stage",), 4, "$.zero_stage: 4 is not one of"),
    ],
)
def test_a_wrong_recipe_does_not_fit(name, path, value, says):
    tree = read(name)
    node = tree
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = value
    assert any(complaint.startswith(says) for complaint in complaints(tree)), complaints(tree)
    if path != ("method",):  # which the recipe's own check leaves to the methods
        with pytest.raises(ConfigError):
            parse_config(tree)


@pytest.mark.parametrize("key", ["method", "model_name_or_path", "datasets", "output_dir"])
def test_what_is_missing_is_named(key):
    tree = read("sft.yaml")
    del tree[key]
    assert complaints(tree) == [f"$: '{key}' is a required property"]


def test_code_of_ones_own_fits():
    assert complaints(read("sft.yaml") | {"method": "mine.py:Mine"}) == []
    tree = read("cut-online.yaml") | {"judge": "mine.py:judge"}
    assert complaints(tree) == [] and parse_config(tree).judge is not None


def test_every_key_says_what_it_is():
    sections = [SCHEMA, *SCHEMA["$defs"].values()]
    assert all(section["description"] for section in sections)
    for section in sections:
        for name, value in section["properties"].items():
            referred = [value, *value.get("anyOf", ())]
            assert "description" in value or any("$ref" in part for part in referred), name


def test_keys_are_what_overrides_can_name():
    found = keys()
    assert len(found) == len(set(found))
    assert {"learning_rate", "cut.lambda", "datasets.0.path", "judge.endpoint.model"} <= set(found)
    assert "rollout.server.port" in found and "online" not in found
    assert {name.partition(".")[0] for name in found} == set(Config.model_fields)


def test_the_command_writes_it(tmp_path, capsys):
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == SCHEMA
    assert main(["schema", str(tmp_path / "s.json")]) == 0
    assert json.loads((tmp_path / "s.json").read_text()) == SCHEMA
    assert main(["schema", str(tmp_path / "nowhere" / "s.json")]) == 2
    assert "s.json: cannot be written: No such file" in capsys.readouterr().err
