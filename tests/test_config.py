"""Recipes: what is read, what is refused, and in which words."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fastalign.config import Config, ConfigError, dump_config, load_config, parse_config, read_yaml
from fastalign.methods import make_method

BASE = {
    "method": "cut",
    "model_name_or_path": "model",
    "output_dir": "out",
    "datasets": [{"path": "a.jsonl"}],
}


def recipe(tmp_path: Path, text: str = "", **keys) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(BASE | keys) + text, encoding="utf-8")
    return path


def error_of(keys: dict) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(BASE | keys, "R")
    return str(caught.value)


def override_error(tmp_path: Path, override: str) -> str:
    path = recipe(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load_config(path, [override])
    return str(caught.value).replace(str(path), "R")


def test_defaults_and_types():
    config = parse_config(BASE | {"cut": {"lambda": 1.2}, "learning_rate": "5e-6"})
    assert (config.cut.lambda_, config.learning_rate, config.max_length) == (1.2, 5e-6, 2048)
    assert config.datasets[0].path == "a.jsonl" and config.online is None
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 1


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"learning_rat": 1},
         "R: learning_rat is no key of a recipe: did you mean 'learning_rate'?"),
        ({"cut": {"lamda": 1}}, "R: cut.lamda is no key of a recipe: did you mean 'lambda'?"),
        ({"qqq": 1}, "R: qqq is no key of a recipe"),
        (
            {"datasets": [{"pth": "a"}]},
            "R: datasets.0.path is missing; "
            "datasets.0.pth is no key of a recipe: did you mean 'path'?",
        ),
        ({"online": {"iter": 1}, "judge": {"path": "a:b"}},
         "R: online.iter is no key of a recipe: did you mean 'iterations'?"),
        ({"method": None}, "R: method = None: input should be a valid string"),
        ({"datasets": []}, "R: datasets = []: tuple should have at least 1 item after validation, "
         "not 0"),
        ({"datasets": [{"path": "a", "weight": 0}]},
         "R: datasets.0.weight = 0: input should be greater than 0"),
        ({"datasets": [{"path": "a", "columns": {"prompt": 1}}]},
         "R: datasets.0.columns.prompt = 1: input should be a valid string"),
        ({"learning_rate": "fast", "warmup_ratio": 1.5},
         "R: learning_rate = 'fast': input should be a valid number, unable to parse string as a "
         "number; warmup_ratio = 1.5: input should be less than or equal to 1"),
        ({"learning_rate": float("inf")},
         "R: learning_rate = inf: input should be a finite number"),
        ({"cut": {"lambda": float("nan")}}, "R: cut.lambda = nan: input should be a finite number"),
        ({"cut": {"lambda": -1}}, "R: cut.lambda = -1: input should be greater than 0"),
        ({"max_steps": 2.5},
         "R: max_steps = 2.5: input should be a valid integer, got a number with a fractional "
         "part"),
        # The alternatives of a union are one problem of one key.
        ({"nproc_per_node": -1},
         "R: nproc_per_node = -1: input should be greater than 0 or input should be 'auto'"),
        ({"lora_target_modules": ["q", 1]},
         "R: lora_target_modules = ['q', 1]: input should be a valid string; "
         "lora_target_modules.1 = 1: input should be a valid string"),
        ({"zero_stage": 5}, "R: zero_stage = 5: input should be 'auto', 0, 1, 2 or 3"),
        ({"report_to": ["x"]},
         "R: report_to.0 = 'x': input should be 'tensorboard', 'wandb' or 'trackio'"),
        ({"method": ["x" * 100]}, "R: method = ['" + "x" * 78 + "...: input should be a valid"),
        ({1: 2}, "R: 1 = 1: keys should be strings"),
        ({"cut": {"align_p": False, "align_n": False, "misalign": False}},
         "R: cut.align_p, align_n and misalign are all false: nothing is trained"),
        ({"judge": {"type": "rule"}}, "R: judge.path is missing: a rule judge names its callable"),
        ({"judge": {"type": "model"}}, "R: judge.model_name_or_path is missing: a model judge names"
         " its model"),
        ({"eval_judge": {"type": "endpoint"}}, "R: eval_judge.endpoint is missing: it names "
         "base_url and model"),
        ({"judge": {"type": "self", "temperature": 0.001}}, "R: judge.temperature = 0.001: a local "
         "model samples at 0 or at least 0.01"),
        ({"judge": {"type": "endpoint",
                    "endpoint": {"base_url": "u", "model": "m", "max_cost": 1}}},
         "R: judge.endpoint.max_cost = 1.0: it needs input_cost_per_million or "
         "output_cost_per_million"),
        ({"rollout": {"engine": "hf", "tensor_parallel_size": 2}},
         "R: rollout.tensor_parallel_size is 2 with rollout.engine 'hf', which holds the whole "
         "model in each process: leave one of them out"),
        ({"rollout": {"tensor_parallel_size": 0}},
         "R: rollout.tensor_parallel_size = 0: input should be greater than 0"),
        ({"online": {"fresh_adapter": True}, "judge": {"type": "self"}},
         "R: online.fresh_adapter is true but use_peft is false: set it to true"),
        ({"adapter_name_or_path": "x"},
         "R: adapter_name_or_path is set but use_peft is false: set it to true"),
        ({"online": {"pairs": "all"}},
         "R: online.pairs is 'all' with method 'cut': it is a setting of 'dpo'"),
        ({"online": {"iterations": 2, "rounds_per_reference": 2}},
         "R: online.rounds_per_reference is 2 in 2 iterations: the reference would never move; "
         "take fewer, or leave it out"),
        ({"online": {"rounds_per_reference": 1}, "eval_judge": {"type": "self"}},
         "R: eval_judge is the reference, which online.rounds_per_reference moves: win rates would "
         "be measured by another judge each time; name a judge that stays"),
        ({"online": {"rounds_per_reference": 1, "fresh_adapter": True}, "use_peft": True},
         "R: online.rounds_per_reference is 1 and online.fresh_adapter is true: a reference that "
         "moves on needs a policy that does; leave one of them out"),
        ({"label_smoothing": 0.1, "loss_type": "ipo"},
         "R: label_smoothing is 0.1 with loss_type 'ipo': it is defined for 'sigmoid' alone"),
        ({"early_stopping_patience": 2}, "R: early_stopping_patience needs metric_for_best_model"),
        ({"judge": {"type": "self", "decision_tokens": [" A"]}},
         "R: judge.decision_tokens.1 is missing"),
    ],
)  # fmt: skip
def test_errors_name_key_value_and_remedy(keys, message):
    found = error_of(keys)
    assert found == message or ("..." in message and found.startswith(message))


def test_missing_keys():
    with pytest.raises(ConfigError) as caught:
        parse_config({"method": "sft"})
    assert str(caught.value) == (
        "config: model_name_or_path is missing; datasets is missing; output_dir is missing"
    )


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("learning_rate=5e-6", "learning_rate", 5e-6),
        ("learning_rate=.5E-6", "learning_rate", 5e-7),
        ("cut.lambda=1.5", "cut.lambda_", 1.5),
        ("cut={alpha: 0.5}", "cut.alpha", 0.5),
        ("datasets.0.path=b=c.jsonl", "datasets.0.path", "b=c.jsonl"),
        ("datasets.0.columns.prompt=question", "datasets.0.columns", {"prompt": "question"}),
        ("deepspeed.a.b=1e-3", "deepspeed", {"a": {"b": 1e-3}}),
        ("report_to=[wandb]", "report_to", ("wandb",)),
        ("max_steps=null", "max_steps", None),
        ("use_peft=true", "use_peft", True),
        ("output_dir=nan", "output_dir", "nan"),
        ("output_dir='1e5'", "output_dir", "1e5"),
    ],
)
def test_overrides(tmp_path, override, key, value):
    config = load_config(recipe(tmp_path, max_steps=3), [override])
    for part in key.split("."):
        config = config[int(part)] if part.isdecimal() else getattr(config, part)
    assert config == value


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "'seed': an override is written key.sub=value"),
        ("=1", "'=1': an override is written key.sub=value"),
        ("seed=[", "'seed=[': the value is not YAML"),
        ("seed=2024-13-45", "'seed=2024-13-45': the value is not YAML"),
        ("seed.x=1", "R: seed = {'x': 1}: input should be a valid integer"),
        ("output_dir.x=1", "'output_dir.x=1': output_dir is a value, not a section"),
        ("output_dir.x.y=1", "'output_dir.x.y=1': 'x' is below a value, not a section"),
        ("datasets.1.path=b", "'datasets.1.path=b': '1' is no index into a list of 1"),
        ("datasets.²=1", "'datasets.²=1': '²' is no index into a list of 1"),
        ("datasets.0=1", "R: datasets.0 = 1: input should be a valid dictionary or instance of "
         "DatasetConfig"),
        ("sed=1", "R: sed is no key of a recipe: did you mean 'seed'?"),
    ],
)  # fmt: skip
def test_override_errors(tmp_path, override, message):
    assert override_error(tmp_path, override) == message


def test_override_does_not_need_the_section(tmp_path):
    config = load_config(recipe(tmp_path), ["judge.type=self", "online.iterations=2"])
    assert (config.judge.type, config.online.iterations) == ("self", 2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "R: a recipe is a mapping of keys to values"),
        (b"- a", "R: a recipe is a mapping of keys to values"),
        (b"a: b\nc: d: e\n", "R:2: mapping values are not allowed here"),
        (b"? [a]\n: b\n", "R:1: found unhashable key"),
        (b"a: 2024-13-45\n", "R: not YAML: month must be in 1..12"),
        (b"a: \xff\n", "R: cannot be read: 'utf-8' codec can't decode byte 0xff in position 3"),
        (b"[" * 5_000, "R: not YAML: maximum recursion depth exceeded"),
        (b"!!python/object/apply:os.getcwd []", "R:1: could not determine a constructor for the t"),
    ],
)
def test_unreadable_recipes(tmp_path, content, message):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value).replace(str(path), "R").startswith(message)


def test_missing_recipe(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: no such recipe"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match=r"none\.yaml: no such template"):
        read_yaml(tmp_path / "none.yaml", "template")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)


def test_dump_reads_back_equal(tmp_path):
    config = parse_config(
        BASE
        | {
            "learning_rate": 1e-7,
            "cut": {"lambda": 1.3},
            "online": {"iterations": 2},
            "judge": {"type": "self", "principles": ["héllo"]},
            "datasets": [{"path": "é.jsonl", "columns": {"prompt": "q"}}],
            "deepspeed": {"a": {"b": [1, 2.5, None]}},
        }
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config
    assert "lambda: 1.3" in path.read_text(encoding="utf-8")


TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(key=st.sampled_from(sorted(Config.model_fields)) | st.text(max_size=8), value=TREES)
def test_no_value_breaks_the_parser(key, value):
    """Any value is accepted or refused by one line that begins with its place."""
    try:
        config = parse_config(BASE | {key: value}, "R")
    except ConfigError as error:
        assert str(error).startswith("R: ")
        return
    assert key in Config.model_fields
    assert parse_config(yaml.safe_load(dump_config(config))) == config


@settings(max_examples=200, deadline=None)
@given(override=st.text(max_size=20) | st.tuples(
    st.sampled_from(["datasets.0.", "cut.", "output_dir.", "online.", "", "deepspeed."]),
    st.text(max_size=6), st.text(max_size=8)).map(lambda t: f"{t[0]}{t[1]}={t[2]}"))  # fmt: skip
def test_no_override_breaks_the_parser(tmp_path_factory, override):
    path = tmp_path_factory.getbasetemp() / "override.yaml"
    if not path.exists():
        path.write_text(yaml.safe_dump(BASE), encoding="utf-8")
    try:
        load_config(path, [override])
    except ConfigError as error:
        assert str(error)


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[1].glob("recipes/*.yaml")), ids=str)
def test_recipes_are_recipes(path):
    config = load_config(path)
    assert parse_config(yaml.safe_load(dump_config(config))) == config
    judged = make_method(config).judge_kind is not None and config.online is not None
    assert judged == (config.judge is not None)


def test_there_are_recipes_for_every_method():
    names = {path.stem for path in Path(__file__).parents[1].glob("recipes/*.yaml")}
    assert names == {
        "cut-offline", "cut-online", "jsft", "self-judge", "dpo", "sft", "hindsight",
        "unlikelihood",
        "forward-prediction", "ilf-mle", "ilf-dpo", "rso", "rest", "raft",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"seed": -1}, "seed"),
        ({"adam_beta1": 1.0}, "adam_beta1"),
        ({"temperature": 0.005}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"stop": ["a", ""]}, "stop.1"),
        ({"stop": ["\ufffd"]}, "stop holds '\ufffd': U+FFFD"),
        ({"cut": {"min_judged_prob": 1.0}}, "cut.min_judged_prob"),
        ({"metric_for_best_model": "loss"}, "metric_for_best_model is 'loss': it needs eval_steps"),
        (
            {"judge": {"path": "a:b"}, "eval_judge": {"path": "a:b"}, "online": {}},
            "eval_judge is the training judge: another one has to measure it",
        ),
    ],
)
def test_values_that_would_fail_later_fail_here(keys, message):
    assert message in error_of(keys)
