"""``fastalign eval --tasks``: lm-evaluation-harness on a task of one's own, without a hub."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support import write_rows
from test_cli import one_line
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastalign.cli import main
from fastalign.config import ModelConfig
from fastalign.eval_tasks import Settings, figures, model_arguments, plain_results

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="needs lm-evaluation-harness: pip install 'fastalign[eval]'",
)
TASK = """
task: fastalign_sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
DOCUMENTS = [
    {"question": f"The sum of {a} and {b} is", "choices": ["one", "two", "seven"], "answer": a % 3}
    for a in range(4)
    for b in range(3)
]


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = write_rows(tmp_path / "sums.jsonl", DOCUMENTS)
    (folder / "sums.yaml").write_text(TASK.format(data=data))
    return folder


@pytest.fixture
def adapter(sharp_llama: Path, tmp_path: Path) -> str:
    torch.manual_seed(3)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(sharp_llama), config)
    model.save_pretrained(tmp_path / "adapter")
    return str(tmp_path / "adapter")


def test_without_the_harness_one_line_names_the_extra(sharp_llama, monkeypatch, capsys):
    # What Python itself takes for a module that is not there.
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["eval", "--tasks", "arc_easy", "--model", str(sharp_llama)]) == 2
    assert one_line(capsys.readouterr().err) == (
        "fastalign: --tasks needs the package lm-eval: pip install 'fastalign[eval]'"
    )


def test_tasks_need_a_model(capsys):
    assert main(["eval", "--tasks", "arc_easy"]) == 2
    assert "--model is missing" in one_line(capsys.readouterr().err)


def test_options_of_judges_are_none_of_tasks(sharp_llama, capsys):
    assert main(["eval", "--tasks", "x", "--model", str(sharp_llama), "--judge", "y"]) == 2
    assert "--judge goes with --pairs and --against, not with --tasks" in one_line(
        capsys.readouterr().err
    )


def test_the_harness_gets_model_and_adapter_as_its_own_arguments(sharp_llama, adapter):
    model = ModelConfig(
        model_name_or_path=str(sharp_llama), adapter_name_or_path=adapter, dtype="float32"
    )
    arguments = model_arguments(Settings(("x",), model, max_length=4096))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert arguments == {
        "pretrained": str(sharp_llama),
        "peft": adapter,
        "revision": "main",
        "dtype": "float32",
        "device": device,
        "trust_remote_code": False,
        # The model's own limit is the lower one.
        "max_length": 1024,
    }
    bare = ModelConfig(model_name_or_path=str(sharp_llama), dtype="float32")
    assert "peft" not in model_arguments(Settings(("x",), bare))


def test_figures_are_read_from_the_harness_s_own_shape():
    results = {
        "results": {
            "sums": {"alias": "sums", "acc,none": 0.25, "acc_stderr,none": 0.125},
            "words": {"alias": "words", "f1,strict": 0.5, "f1_stderr,strict": "N/A"},
        },
        "n-samples": {"sums": {"original": 12, "effective": 8}},
        "samples": {"sums": [1]},
        "odd": float("nan"),
    }
    assert figures(results) == [
        ("sums", "acc", 0.25, 0.125, 8),
        ("words", "f1 (strict)", 0.5, None, None),
    ]
    assert plain_results(results)["odd"] is None and "samples" not in plain_results(results)


@needs_harness
@pytest.mark.parametrize("with_adapter", [False, True])
def test_a_task_of_ones_own_is_scored_by_the_models_likelihoods(
    sharp_llama, adapter, tasks, tmp_path, capsys, with_adapter
):
    out = tmp_path / "out"
    command = ["eval", "--tasks", "fastalign_sums", "--include-path", str(tasks)]
    command += ["--model", str(sharp_llama), "--dtype", "float32", "--out", str(out)]
    assert main([*command, *(["--adapter", adapter] if with_adapter else [])]) == 0
    shown = capsys.readouterr().out
    assert "fastalign_sums" in shown and "acc" in shown

    model = AutoModelForCausalLM.from_pretrained(sharp_llama)
    if with_adapter:
        model = PeftModel.from_pretrained(model, adapter)
    tokenizer = AutoTokenizer.from_pretrained(sharp_llama)
    right = []
    for document in DOCUMENTS:
        scores = []
        for choice in document["choices"]:
            asked = tokenizer(document["question"], add_special_tokens=False).input_ids
            whole = tokenizer(
                f"{document['question']} {choice}", add_special_tokens=False
            ).input_ids
            with torch.no_grad():
                logp = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
            scores.append(sum(float(logp[i - 1, whole[i]]) for i in range(len(asked), len(whole))))
        right.append(int(np.argmax(scores)) == document["answer"])
    results = json.loads((out / "results.json").read_text())
    assert results["results"]["fastalign_sums"]["acc,none"] == pytest.approx(np.mean(right))
    assert len((out / "samples-fastalign_sums.jsonl").read_text().splitlines()) == len(DOCUMENTS)


@needs_harness
def test_wrong_names_and_tasks_without_data_are_one_line(sharp_llama, tasks, tmp_path, capsys):
    command = ["eval", "--model", str(sharp_llama), "--include-path", str(tasks), "--tasks"]
    assert main([*command, "fastalign_sum"]) == 2
    assert "did you mean 'fastalign_sums'?" in one_line(capsys.readouterr().err)
    (tmp_path / "sums.jsonl").unlink()
    assert main([*command, "fastalign_sums"]) == 2
    assert "--tasks = 'fastalign_sums': cannot be loaded" in one_line(capsys.readouterr().err)
    assert (
        main(["eval", "--model", str(sharp_llama), "--include-path", "none", "--tasks", "x"]) == 2
    )
    assert "--include-path = 'none': no such folder" in one_line(capsys.readouterr().err)
