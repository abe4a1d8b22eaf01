"""A model outside a training run: the engine answers as the model with its adapter does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fastalign.config import ConfigError, ModelConfig, RolloutConfig
from fastalign.local import open_model

HF = RolloutConfig(engine="hf")


@pytest.fixture(scope="module")
def adapter(sharp_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that changes what the model says."""
    folder = tmp_path_factory.mktemp("adapter")
    base = AutoModelForCausalLM.from_pretrained(sharp_llama)
    torch.manual_seed(3)
    model = get_peft_model(
        base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    )
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("with_adapter", [False, True])
def test_the_engine_answers_as_the_model_does(
    sharp_llama: Path, adapter: Path, with_adapter: bool
) -> None:
    path = str(adapter) if with_adapter else None
    config = ModelConfig(
        model_name_or_path=str(sharp_llama), adapter_name_or_path=path, dtype="float32"
    )
    prompt = np.arange(3, 20, dtype=np.int32)
    with open_model(config, HF) as model:
        found = model.engine.next_logprobs([prompt], [5, 6, 7], model.adapter)[0]
        # The judge asks the same one.
        judge = model.judge(model.renderer())
        assert np.array_equal(judge.next_logprobs([prompt], [5, 6, 7])[0], found)
    reference = AutoModelForCausalLM.from_pretrained(sharp_llama)
    if with_adapter:
        from peft import PeftModel

        reference = PeftModel.from_pretrained(reference, path).merge_and_unload()
    with torch.no_grad():
        logits = reference(torch.from_numpy(prompt.astype(np.int64))[None]).logits[0, -1]
    expected = logits.double().log_softmax(-1)[[5, 6, 7]].numpy()
    assert np.abs(found - expected).max() < 1e-4


def test_a_model_that_is_not_there_is_named(sharp_llama: Path, tmp_path: Path) -> None:
    missing = ModelConfig(model_name_or_path=str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="no such folder"), open_model(missing, HF):
        pass
    no_adapter = ModelConfig(
        model_name_or_path=str(sharp_llama), adapter_name_or_path=str(tmp_path)
    )
    with pytest.raises(ConfigError, match="adapter_name_or_path"), open_model(no_adapter, HF):
        pass


def test_an_adapter_of_another_model_is_named(
    sharp_llama: Path, adapter: Path, tmp_path: Path
) -> None:
    config = AutoConfig.from_pretrained(sharp_llama)
    config.hidden_size, config.intermediate_size = 2 * config.hidden_size, 96
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(sharp_llama).save_pretrained(tmp_path)
    wrong = ModelConfig(model_name_or_path=str(tmp_path), adapter_name_or_path=str(adapter))
    with (
        pytest.raises(
            ConfigError, match=rf"= '{adapter}': cannot be used with {tmp_path}: .* has shape"
        ),
        open_model(wrong, HF),
    ):
        pass
