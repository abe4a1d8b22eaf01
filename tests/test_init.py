"""``fastalign init``: recipes that validate, with values from model, data and memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonschema import Draft202012Validator
from support import rows, write_rows
from test_cli import one_line
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fastalign import new_recipe, plan
from fastalign.cli import main
from fastalign.commands.init import METHODS
from fastalign.config import Config, load_config
from fastalign.data import load_records
from fastalign.data_check import Tokens
from fastalign.methods import METHODS as KNOWN
from fastalign.new_recipe import FORMS, Machine, recipe_text
from fastalign.schema import recipe_schema

pytestmark = pytest.mark.usefixtures("quiet_process")

DATA = {
    "sft": "completion", "cut": "judged", "jsft": "preference", "dpo": "preference",
    "self-judge": "prompt", "unlikelihood": "judged", "hindsight": "judged",
    "forward-prediction": "judged", "ilf-mle": "judged", "ilf-dpo": "judged", "rso": "prompt",
    "rest": "prompt", "raft": "prompt",
}  # fmt: skip


@pytest.fixture
def desk(tmp_path, monkeypatch, capsys) -> Path:
    monkeypatch.chdir(tmp_path)
    for kind in ("completion", "judged", "preference", "prompt"):
        write_rows(tmp_path / f"{kind}.jsonl", rows(kind, 40))
    return tmp_path


def has(monkeypatch: pytest.MonkeyPatch, free: float, gpus: int = 1) -> None:
    here = Machine("this", int(free), gpus, torch.device("cpu"))
    monkeypatch.setattr(new_recipe, "machine", lambda: here)


def init(*arguments: str | Path) -> Config:
    """The recipe that the command writes, after its own dry run."""
    Path("recipe.yaml").unlink(missing_ok=True)
    assert main(["init", *map(str, arguments)]) == 0
    assert main(["train", "recipe.yaml", "--dry-run"]) == 0
    return load_config("recipe.yaml")


def test_every_method_has_its_recipe():
    assert tuple(FORMS) == METHODS
    assert set(METHODS) == {*KNOWN, "self-judge"}
    for names in FORMS.values():
        for name in filter(None, names):
            published = Path(__file__).parents[1] / "recipes" / f"{name}.yaml"
            assert recipe_text(name) == published.read_text(encoding="utf-8")


@pytest.mark.parametrize("method", METHODS)
def test_recipes_are_for_model_and_data(desk, tiny_llama, monkeypatch, method):
    has(monkeypatch, 16 << 30)
    data = f"{DATA[method]}.jsonl"
    config = init(method, "--model", tiny_llama, "--data", data)
    assert config.method == {"self-judge": "dpo"}.get(method, method)
    assert config.model_name_or_path == str(tiny_llama) and config.datasets[0].path == data
    text = Path("recipe.yaml").read_text()
    tree = yaml.safe_load(text)
    assert not [*Draft202012Validator(recipe_schema()).iter_errors(json.loads(json.dumps(tree)))]
    # The published settings and their reasons are kept.
    name = next(filter(None, FORMS[method]))
    published = yaml.safe_load(recipe_text(name))
    kept = ("learning_rate", "global_batch_size", "use_peft", "warmup_ratio", "cut", "beta")
    assert {k: tree.get(k) for k in kept} == {k: published.get(k) for k in kept}
    assert recipe_text(name).partition("\n")[0] in text
    # The longest row, of what the method makes of it, has room.
    tokens = Tokens(config)
    wants = tokens.whole.wants if config.online is None else tokens.whole.online_wants
    records, _ = load_records(config.datasets, strict=True, seed=0, want=wants)
    longest = max(
        len(tokens.whole.rollout_prompt(record, tokens.renderer)) + config.max_completion_length
        if config.online
        else max(len(ids) for _, ids, _ in tokens.streams(record, tokens.whole))
        for record in records
        if record.is_negative or not (method.startswith("ilf") or method == "unlikelihood")
    )
    assert config.max_length == min(-(-longest // 64) * 64, 1024)
    if config.online is not None:
        prompts = sum(r.is_negative for r in records) if method.startswith("ilf") else 40
        assert config.online.prompts_per_iteration <= prompts


def test_prompts_alone_are_answered_online(desk):
    config = init("cut", "--data", "prompt.jsonl")
    assert config.online is not None and config.judge is not None
    assert (config.online.iterations, config.online.prompts_per_iteration) == (5, 8)
    assert init("cut", "--data", "judged.jsonl").online is None
    assert init("cut", "--online", "--data", "judged.jsonl").online is not None
    assert init("dpo", "--data", "prompt.jsonl").judge is not None


def test_without_model_and_data_it_is_the_published_recipe(desk, capsys):
    config = init("jsft")
    assert config == load_config(Path(__file__).parents[1] / "recipes" / "jsft.yaml")
    told = capsys.readouterr().out
    assert "wrote recipe.yaml; next: fastalign train recipe.yaml --dry-run" in told
    assert "# yaml-language-server: $schema=recipe.schema.json" in told


def test_what_does_not_fit_as_it_is_gets_what_does(desk, tiny_llama, monkeypatch, capsys):
    """Less and less memory: the recipe, its optimizer's buckets, adapters, and at last a word."""
    monkeypatch.setattr("fastalign.model._bfloat16_speed", lambda: 2.0)
    command = ("sft", "--model", tiny_llama, "--data", "completion.jsonl")
    has(monkeypatch, 64 << 30)
    assert not init(*command).use_peft
    config = load_config("recipe.yaml")
    dtype = "bfloat16" if torch.cpu._is_avx512_bf16_supported() else "float32"
    planned = config.model_copy(update={"dtype": dtype})
    needed = plan.Planner(planned, ("this", 64 << 30)).plan(planned, 1).needed
    has(monkeypatch, needed + 1)
    assert init(*command) == config
    has(monkeypatch, needed - 1)
    smaller = init(*command)
    assert smaller != config and smaller.learning_rate == config.learning_rate
    assert "So that it fits the memory that is free." in Path("recipe.yaml").read_text()
    planned = smaller.model_copy(update={"dtype": dtype})
    assert plan.Planner(planned, ("this", needed - 1)).plan(planned, 1).fits
    has(monkeypatch, 1 << 20)
    capsys.readouterr()
    smallest = init(*command)
    assert smallest.use_peft and smallest.learning_rate == pytest.approx(2e-4)
    assert "memory: does not fit here, whatever is set" in capsys.readouterr().out


def test_several_gpus_share_what_one_cannot_hold(desk, tmp_path, monkeypatch, capsys):
    """A model of a real width, of which only the shape is there."""
    settings = AutoConfig.for_model(
        "llama", hidden_size=4096, intermediate_size=11008, num_hidden_layers=4,
        num_attention_heads=32, vocab_size=32000,
    )  # fmt: skip
    settings.save_pretrained(tmp_path / "shape")
    text = new_recipe._Text("sft")
    text.set("model_name_or_path", str(tmp_path / "shape"))
    assert text.config.zero_stage == "auto"
    for gpus, memory, adapters in ((8, 20 << 30, False), (1, 10 << 30, True)):
        has(monkeypatch, memory, gpus)
        lines = [*new_recipe._fit_memory(text)]
        config = text.config
        assert config.use_peft == adapters
        assert f"machine: {gpus} x this" in lines[1] and "memory: about" in lines[-1]
        planned = config.model_copy(update={"dtype": "bfloat16"})
        assert plan.Planner(planned, ("this", memory)).plan(planned, gpus).fits


def test_rows_for_other_methods_are_refused_with_their_names(desk, capsys):
    assert main(["init", "dpo", "--data", "judged.jsonl"]) == 2
    told = one_line(capsys.readouterr().err)
    assert "its rows (judged) are not for dpo, which learns from preference or prompt" in told
    fits = told.partition("with these rows: ")[2].partition(";")[0].split(", ")
    assert {"cut", "hindsight", "forward-prediction", "unlikelihood", "ilf-mle"} <= set(fits)
    assert not {"dpo", "self-judge", "rso"} & set(fits)
    assert "dpo --online samples answers to their prompts" in told
    assert main(["init", "cut", "--data", "preference.jsonl"]) == 2
    assert "dpo" in one_line(capsys.readouterr().err)
    assert not Path("recipe.yaml").exists()


def test_nothing_is_overwritten(desk, capsys):
    Path("recipe.yaml").write_text("mine")
    assert main(["init", "sft"]) == 2
    assert "recipe.yaml: is there already" in one_line(capsys.readouterr().err)
    assert Path("recipe.yaml").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["sft", "--data", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["sft", "--model", "./nowhere"], "nowhere"),
        (["sft", "--online"], "--online: sft has no recipe of that form; cut, dpo"),
        (["sft", "--output", "no/folder/r.yaml"], "r.yaml: cannot be written: No such file"),
        (["sft", "--data", "empty.jsonl"], "empty.jsonl: holds no rows"),
    ],
)
def test_mistakes_are_one_line(desk, capsys, arguments, says):
    (desk / "empty.jsonl").touch()
    capsys.readouterr()
    assert main(["init", *arguments]) == 2
    assert says in one_line(capsys.readouterr().err)


def test_other_models_get_other_layers_and_templates(desk, tiny_llama, monkeypatch):
    """Layers that are not named as a Llama's, and a tokenizer without a chat template."""
    has(monkeypatch, 16 << 30)
    folder = desk / "gpt"
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    settings = AutoConfig.for_model(
        "gpt2", n_embd=32, n_layer=1, n_head=2, n_positions=256, vocab_size=len(tokenizer)
    )
    AutoModelForCausalLM.from_config(settings).save_pretrained(folder)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    config = init("cut", "--model", folder, "--data", "judged.jsonl")
    assert config.lora_target_modules == "all-linear"
    assert config.datasets[0].template == "alpaca"
    assert config.max_length <= 256
    text = Path("recipe.yaml").read_text()
    assert "# This model has no gate_proj, up_proj, down_proj." in text
    assert "  # The tokenizer has no chat template." in text


def test_rows_that_the_context_cannot_hold_are_counted(desk, tiny_llama, monkeypatch, capsys):
    has(monkeypatch, 16 << 30)
    content: list[dict[str, Any]] = rows("completion", 6)
    content += [{"prompt": "x " * 400, "completion": "y " * 400}] * 2
    content.append({"prompt": "private", "completion": 7})
    write_rows(desk / "long.jsonl", content)
    config = init("sft", "--model", tiny_llama, "--data", "long.jsonl")
    assert config.max_length == 1024
    text = Path("recipe.yaml").read_text()
    assert "2 are longer than the model's context allows" in text
    assert "dropped 1 x completion: wrong type" in capsys.readouterr().out
    assert "9 rows, 8 usable" in text and "dropped" not in text
