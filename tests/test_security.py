"""Strangers' models, data and servers: what they bring is not executed, and learns no secrets."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from chat_server import serving
from rich.console import Console
from support import recipe, write_rows

from fastalign.cli import main
from fastalign.config import Config, ConfigError, ModelConfig, dump_config
from fastalign.eval_pairs import _principles_table
from fastalign.intervals import Estimate
from fastalign.local import open_model
from fastalign.model import load_tokenizer
from fastalign.templates import Renderer
from fastalign.tracking import Tracker

pytestmark = pytest.mark.usefixtures("quiet_process")


def run(config: Config, folder: Path) -> int:
    path = folder / "recipe.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    return main(["train", str(path)])


# ------------------------------------------------------------------------------ code of strangers

CODE = "import pathlib\npathlib.Path({marker!r}).touch()\nraise SystemExit('executed')\n"


def with_code(model: Path, folder: Path, marker: Path, **config: Any) -> Path:
    """A copy of the model with code of its own for every class."""
    shutil.copytree(model, folder)
    (folder / "its_own.py").write_text(CODE.format(marker=str(marker)))
    names = {"AutoConfig": "Own", "AutoModelForCausalLM": "OwnModel"}
    own = {name: f"its_own.{target}" for name, target in names.items()}
    tree = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(tree | {"auto_map": own} | config))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    own = {"AutoTokenizer": ["its_own.OwnTokenizer", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"auto_map": own}))
    return folder


@pytest.mark.parametrize("method", ["sft", "cut"])
def test_a_models_own_code_is_not_executed(tiny_llama, tmp_path, capfd, method):
    """Offline, and online, where the engine comes first."""
    marker = tmp_path / "executed"
    model = with_code(tiny_llama, tmp_path / "model", marker, model_type="its-own")
    judge = tmp_path / "judge.py"
    judge.write_text("def written(prompt, text):\n    return None\n")
    online = {"iterations": 1, "prompts_per_iteration": 2}
    keys = {"online": online, "judge": {"type": "rule", "path": f"{judge}:written"}}
    config = recipe(method, model, tmp_path, **(keys if method == "cut" else {}))
    assert run(config, tmp_path) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith(f"fastalign: model_name_or_path = '{model}': ")
    assert line.endswith("brings code of its own, which runs with trust_remote_code: true alone")
    assert not marker.exists()


def test_a_model_that_the_library_knows_is_read_by_the_library(tiny_llama, tmp_path):
    marker = tmp_path / "executed"
    model = with_code(tiny_llama, tmp_path / "model", marker)
    assert run(recipe("sft", model, tmp_path, max_steps=1), tmp_path) == 0
    assert not marker.exists()


def test_code_runs_where_it_is_asked_for(tiny_llama, tmp_path):
    """Or the tests above would show nothing."""
    marker = tmp_path / "executed"
    model = with_code(tiny_llama, tmp_path / "model", marker, model_type="its-own")
    config = ModelConfig(model_name_or_path=str(model), trust_remote_code=True)
    with pytest.raises(SystemExit, match="executed"):
        load_tokenizer(config)
    assert marker.exists()


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("executed",)


def test_pickled_weights_are_not_executed(tiny_llama, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    (model / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Evil()}, model / "pytorch_model.bin")
    assert run(recipe("sft", model, tmp_path), tmp_path) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith(f"fastalign: model_name_or_path = '{model}': ")

    adapter = tmp_path / "adapter"
    adapter.mkdir()
    lora = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (adapter / "adapter_config.json").write_text(json.dumps(lora))
    torch.save({"x": Evil()}, adapter / "adapter_model.bin")
    keys = {"use_peft": True, "adapter_name_or_path": str(adapter), "output_dir": "out-2"}
    keys |= {"lora_r": 2, "lora_alpha": 8, "lora_dropout": 0, "lora_target_modules": ["q_proj"]}
    assert run(recipe("sft", tiny_llama, tmp_path, **keys), tmp_path) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith(f"fastalign: adapter_name_or_path = '{adapter}': ")

    config = ModelConfig(
        model_name_or_path=str(tiny_llama), adapter_name_or_path=str(adapter), dtype="float32"
    )
    rollout = recipe("sft", tiny_llama, tmp_path).rollout
    with pytest.raises(ConfigError, match="adapter_name_or_path"), open_model(config, rollout):
        pass
    assert not Path("executed").exists()


# ------------------------------------------------------------------------------ text of strangers

TEXTS = (
    "{instruction} {judgment} {0.__class__.__mro__} {",
    "{{ 7 * 7 }} {% for x in messages %}{% endfor %} {# gone #}",
    "[bold]red[/bold] [/x] [link=file:///etc/passwd]here[/link]",
    "${HOME} $(id) `id` %s %(x)s !!python/object/apply:os.getcwd []",
)


@pytest.mark.parametrize("template", ["chat", "alpaca"])
@pytest.mark.parametrize("text", TEXTS)
def test_text_is_text_in_every_template(tiny_llama, text, template):
    """Wherever it stands: prompt, answer, judgment, principle, rationale."""
    renderer = Renderer(load_tokenizer(ModelConfig(model_name_or_path=str(tiny_llama))), template)
    asked = [{"role": "user", "content": f"one {text}"}]
    a, b, why = f"two {text}", f"three {text}", f"four {text}"
    prompt, judged, answer = renderer.judged_completion(asked, a, why)
    shown = {
        "prompt": (prompt, [asked[0]["content"]]),
        "judged": (judged, [asked[0]["content"], why]),
        "answer": (answer, [a]),
        "refine": (renderer.refine_prompt_ids(asked, a, why), [asked[0]["content"], a, why]),
        "feedback": (renderer.feedback(asked, a, why)[0], [asked[0]["content"], a]),
        "judge": (renderer.judge_prompt_ids(asked, a, b, why), [asked[0]["content"], a, b, why]),
        "written": (renderer.written_prompt_ids(asked, a), [asked[0]["content"], a]),
        "rationales": (renderer.judgment(asked, a, b, 0, None, (a, why))[1], [a, why]),
    }
    for name, (ids, texts) in shown.items():
        written = renderer.decode(ids)
        assert all(part in written for part in texts), name


def test_text_is_text_on_the_console(tiny_llama, tmp_path, capfd):
    tracker = Tracker(recipe("sft", tiny_llama, tmp_path), 0, 1)
    for text in TEXTS:
        tracker.say(text)
    tracker.say("\x1b[31mred \u202e")
    said = capfd.readouterr().err.splitlines()
    assert said == [*TEXTS, r"\x1b[31mred \u202e"]
    # Principles are texts of a judge's file.
    one = Estimate(1.0, 0.5, 1.0, 9)
    names = ("accuracy", "abstained", "flipped", "mass")
    found = SimpleNamespace(principles={TEXTS[2]: dict.fromkeys(names, one)})
    console = Console(file=io.StringIO(), width=200)
    console.print(_principles_table(found))  # type: ignore[arg-type]
    assert TEXTS[2] in console.file.getvalue()


def test_prompts_of_markup_train_and_are_shown(tiny_llama, tmp_path, capfd):
    content = [{"prompt": f"one {x}", "completion": f"two {x}"} for x in TEXTS]
    data = write_rows(tmp_path / "[bold]d[blue].jsonl", content)
    config = recipe(
        "sft", tiny_llama, tmp_path, datasets=[{"path": str(data)}], max_steps=1,
        output_dir=str(tmp_path / "[red]out[bold]"),
    )  # fmt: skip
    assert run(config, tmp_path) == 0
    said = capfd.readouterr().err
    assert f"{data}: 4 rows, 4 usable" in said and f"done: {config.output_dir}" in said
    assert main(["data", "check", str(data)]) == 0
    assert f"{data}: 4 rows" in capfd.readouterr().out


# ---------------------------------------------------------------------------------------- secrets

SECRETS = {
    "OPENAI_API_KEY": "sk-test-0123456789abcdef0123456789",
    "HF_TOKEN": "hf_test0123456789abcdef0123456789",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
}


def holding(folder: Path, secrets: dict[str, str]) -> list[str]:
    """Files that have one of the secrets anywhere in their bytes."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return [
        f"{name} in {path}"
        for path in files
        for name, secret in secrets.items()
        if secret.encode() in path.read_bytes()
    ]


def test_secrets_stay_in_the_environment(tiny_llama, tmp_path, monkeypatch, capfd):
    """In a run that ends, in one that pauses, and in one whose server repeats the key."""
    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)
    key = SECRETS["OPENAI_API_KEY"]
    answers = {
        "done": (0, lambda _: (200, "Too short.")),
        "paused": (75, lambda _: (200, "Too short.")),
        "refused": (2, lambda _: (401, f"Incorrect API key provided: {key}.")),
        "failed": (1, lambda _: (500, f"upstream said: Authorization: Bearer {key}")),
    }
    with serving() as server:
        for name, (code, answer) in answers.items():
            server.answer = staticmethod(answer)
            place = {"base_url": server.url, "model": "m", "max_retries": 0}
            limit = {"max_requests": 3} if name == "paused" else {}
            config = recipe(
                "cut", tiny_llama, tmp_path / name, use_peft=True, lora_r=2, save_steps=1,
                online={"iterations": 2, "prompts_per_iteration": 2},
                judge={"type": "endpoint", "endpoint": place | limit},
                report_to=["tensorboard"], max_completion_length=4,
            )  # fmt: skip
            assert run(config, tmp_path / name) == code, name
            out, err = capfd.readouterr()
            assert not [secret for secret in SECRETS.values() if secret in out + err], name
            if code in (1, 2):
                assert "***" in err.splitlines()[-1]
        # It did reach the server, or nothing of this would be shown.
        assert {asked["key"] for asked in server.asked} == {f"Bearer {key}"}
    assert {path.name for path in (tmp_path / "done/out").iterdir()} >= {
        "README.md", "run.json", "recipe.yaml", "metrics.jsonl", "judge-replies.jsonl", "episodes",
        "checkpoint-2", "tensorboard", "adapter_model.safetensors",
    }  # fmt: skip
    assert holding(tmp_path, SECRETS) == []


@pytest.mark.parametrize(
    "place, says",
    [
        ({"api_key_env": SECRETS["OPENAI_API_KEY"]}, "judge.endpoint.api_key_env is no name of an"),
        ({"base_url": "https://me:pass-0123@host/v1"}, "judge.endpoint.base_url holds a user or"),
    ],
)
def test_secrets_do_not_belong_into_recipes(tiny_llama, tmp_path, place, says):
    endpoint = {"base_url": "http://localhost/v1", "model": "m"} | place
    judge = {"type": "endpoint", "endpoint": endpoint}
    with pytest.raises(ConfigError, match=says) as caught:
        recipe("cut", tiny_llama, tmp_path, online={}, judge=judge)
    assert not any(secret in str(caught.value) for secret in ("pass-0123", *SECRETS.values()))
