"""``fastalign export``, and results as they are, in other programs: the adapter's own logits."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support import recipe
from test_cli import one_line
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fastalign.cli import main
from fastalign.rollout import ServedModel
from fastalign.train import train

pytestmark = pytest.mark.usefixtures("quiet_process")

IDS = torch.arange(3, 43).reshape(2, 20)


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(ids).logits.float()


def read(path: Path, adapter: Path | None = None, dtype: Any = torch.float32) -> Any:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    return model if adapter is None else PeftModel.from_pretrained(model, str(adapter))


def make_adapter(base: Path, folder: Path, size: float, **options: Any) -> Path:
    """A LoRA adapter by PEFT alone, whose matrices are random."""
    torch.manual_seed(3)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model = get_peft_model(read(base), LoraConfig(**(settings | options)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=size)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def half(sharp_llama, tmp_path_factory) -> Path:
    """The sharp Llama as most models are stored: in bfloat16."""
    folder = tmp_path_factory.mktemp("half")
    read(sharp_llama, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(sharp_llama).save_pretrained(folder)
    return folder


def refused(capsys: Any, *arguments: str | Path) -> str:
    capsys.readouterr()
    assert main(["export", *map(str, arguments)]) == 2
    assert not Path(arguments[1]).exists() or not (Path(arguments[1]) / "config.json").exists()
    return one_line(capsys.readouterr().err)


# ------------------------------------------------------------------------------------- merging


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}},
        {"use_dora": True},
        {"target_modules": ["up_proj", "embed_tokens"]},
    ],
    ids=["plain", "rslora", "dora", "embeddings"],
)
def test_the_merged_model_is_the_adapters(sharp_llama, tmp_path, capsys, options):
    adapter = make_adapter(sharp_llama, tmp_path / "adapter", 0.2, **options)
    out = tmp_path / "new" / "out"
    assert main(["export", str(adapter), str(out)]) == 0
    assert "merged into" in capsys.readouterr().out
    wanted = logits(read(sharp_llama, adapter))
    assert (wanted - logits(read(sharp_llama))).abs().max() > 1
    torch.testing.assert_close(logits(read(out, dtype="auto")), wanted, rtol=1e-4, atol=1e-3)
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(sharp_llama).chat_template


def test_a_merge_that_would_lose_the_update_is_refused_with_the_figure(half, tmp_path, capsys):
    adapter, out = make_adapter(half, tmp_path / "a", 0.001), tmp_path / "out"
    told = refused(capsys, adapter, out)
    base, merged = read(half), read(half, adapter).merge_and_unload()
    before, after = base.state_dict(), merged.state_dict()
    along = squared = 0.0
    for name in before:
        update = (after[name] - before[name]).double()
        arrived = after[name].bfloat16().double() - before[name].double()
        along, squared = along + (arrived * update).sum(), squared + update.square().sum()
    lost = float(1 - along / squared)
    assert 0.5 < lost < 1
    assert f"--dtype bfloat16 loses {lost:.1%} of what {adapter} has learnt" in told
    assert "more than --max-loss 0.05" in told and "write --dtype float32" in told
    assert not list(tmp_path.glob(".out*"))

    assert main(["export", str(adapter), str(out), "--dtype", "float32"]) == 0
    assert "float32 loses 0.0" in capsys.readouterr().out
    exported = read(out, dtype="auto")
    assert exported.dtype == torch.float32
    torch.testing.assert_close(logits(exported), logits(merged), rtol=1e-5, atol=1e-5)
    assert main(["export", str(adapter), str(tmp_path / "lossy"), "--max-loss", "1"]) == 0
    assert f"bfloat16 loses {lost:.2%} of the update" in capsys.readouterr().out


def test_a_merge_that_bfloat16_can_hold_is_written_in_it(half, tmp_path, capsys):
    adapter, out = make_adapter(half, tmp_path / "a", 0.2), tmp_path / "out"
    out.mkdir()
    assert main(["export", str(adapter), str(out)]) == 0
    exported = read(out, dtype="auto")
    assert exported.dtype == torch.bfloat16
    wanted, base = logits(read(half, adapter)), logits(read(half))
    found = logits(read(out))
    assert (found - wanted).norm() < 0.02 * (wanted - base).norm()
    told = capsys.readouterr().out.splitlines()[0]
    assert told in (out / "README.md").read_text()


def test_whole_weights_are_rounded_by_the_same_rule(half, tmp_path, capsys):
    """A model that was trained a little, and one that was trained more."""
    base = read(half)
    for name, size in (("little", 1e-5), ("more", 1e-1)):
        torch.manual_seed(4)
        model, along, squared, changed = read(half), 0.0, 0.0, 0
        with torch.no_grad():
            for before, after in zip(base.parameters(), model.parameters(), strict=True):
                after.add_(size * torch.randn_like(after))
                update = (after - before).double()
                arrived = after.bfloat16().double() - before.double()
                along, squared = along + (arrived * update).sum(), squared + update.square().sum()
                changed += int((after.bfloat16().float() != after).sum())
        lost, share = float(1 - along / squared), changed / model.num_parameters()
        model.save_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(half).save_pretrained(tmp_path / name)
        cast = [tmp_path / name, tmp_path / f"{name}-out", "--dtype", "bfloat16"]
        # Without a run's own word nobody knows what it was trained from.
        assert f"rounds {share:.1%} of the numbers" in (told := refused(capsys, *cast))
        assert "name it with --base, write --dtype float32" in told
        run = {"recipe": {"model_name_or_path": str(half), "model_revision": None}}
        (tmp_path / name / "run.json").write_text(json.dumps(run))
        if name == "little":
            assert lost > 0.1
            told = refused(capsys, *cast)
            assert f"--dtype bfloat16 loses {lost:.1%} of what {tmp_path / name} has learnt" in told
            assert told.endswith("write --dtype float32")
            told = refused(capsys, *cast, "--base", tmp_path / "nowhere")
            assert "nowhere" in told
            (tmp_path / name / "run.json").unlink()
            cast += ["--max-loss", "1"]
            says = "what that loses of the training was not measured"
        else:
            assert lost < 0.05
            says = f"and loses {lost:.2%} of the update of {half}"
        assert main(["export", *map(str, cast)]) == 0
        told = capsys.readouterr().out.splitlines()[0]
        assert told.startswith(f"whole weights in bfloat16, which rounds {share:.1%} of the")
        assert says in told and told in (cast[1] / "README.md").read_text()
        wanted = model.to(torch.bfloat16).state_dict()
        found = read(cast[1], dtype="auto").state_dict()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_whole_weights_in_their_own_dtype_stay_as_they_are(half, tmp_path, capsys):
    assert main(["export", str(half), str(tmp_path / "out")]) == 0
    assert "whole weights in bfloat16, every number as it was" in capsys.readouterr().out


def test_numbers_beyond_a_dtype_are_named(sharp_llama, tmp_path, capsys):
    adapter = make_adapter(sharp_llama, tmp_path / "a", 400.0)
    told = refused(capsys, adapter, tmp_path / "out", "--dtype", "float16")
    assert "has numbers that it cannot hold" in told or "loses" in told


def test_an_adapter_that_changes_nothing_says_so(sharp_llama, tmp_path, capsys):
    adapter = make_adapter(sharp_llama, tmp_path / "a", 0.0)
    assert main(["export", str(adapter), str(tmp_path / "out")]) == 0
    assert "the adapter changes nothing" in capsys.readouterr().out


def test_an_adapter_of_nf4_is_merged_into_full_weights_with_a_word(sharp_llama, tmp_path, capsys):
    adapter, out = make_adapter(sharp_llama, tmp_path / "a", 0.2), tmp_path / "out"
    tensors = load_file(adapter / "adapter_model.safetensors")
    metadata = {"format": "pt", "base_quantization": "nf4"}
    save_file(tensors, adapter / "adapter_model.safetensors", metadata=metadata)
    assert main(["export", str(adapter), str(out)]) == 0
    assert "was trained on" in (told := capsys.readouterr().out) and "in NF4 (QLoRA)" in told
    assert "in NF4 (QLoRA)" in (out / "README.md").read_text()
    torch.testing.assert_close(
        logits(read(out)), logits(read(sharp_llama, adapter)), rtol=1e-4, atol=1e-3
    )


# ------------------------------------------------------------------------------------ mistakes


def test_mistakes_are_one_line(sharp_llama, tiny_llama, tmp_path, capsys):
    adapter, out = make_adapter(sharp_llama, tmp_path / "a", 0.2), tmp_path / "out"
    assert "no such folder" in refused(capsys, tmp_path / "nowhere", out)
    (tmp_path / "run").mkdir()
    assert "a run has them when it is done" in refused(capsys, tmp_path / "run", out)
    assert "is there already" in refused(capsys, adapter, tmp_path / "a")
    (tmp_path / "file").touch()
    assert "cannot be written" in refused(capsys, adapter, tmp_path / "file" / "out")
    told = refused(capsys, adapter, out, "--base", tmp_path / "nowhere")
    assert "model_name_or_path" in told and "nowhere" in told
    assert "holds whole weights" in refused(capsys, sharp_llama, out, "--base", tiny_llama)
    assert "want a share from 0 to 1" in refused(capsys, adapter, out, "--max-loss", "5")
    assert "--private goes with" in refused(capsys, adapter, out, "--private")
    told = refused(capsys, adapter, out, "--push-to-hub", "a/b/c")
    assert "--push-to-hub a/b/c: Repo id" in told


def test_bases_that_do_not_fit_are_named(sharp_llama, tmp_path, capsys):
    adapter, out = make_adapter(sharp_llama, tmp_path / "a", 0.2), tmp_path / "out"
    settings = AutoConfig.from_pretrained(sharp_llama)
    for name, change in (
        ("narrow", {"intermediate_size": 96}),
        ("shallow", {"num_hidden_layers": 1}),
    ):
        other = AutoConfig.from_pretrained(sharp_llama, **change)
        AutoModelForCausalLM.from_config(other).save_pretrained(tmp_path / name)
        assert "does not fit" in refused(capsys, adapter, out, "--base", tmp_path / name)
    settings.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    settings.save_pretrained(tmp_path / "quantised")
    told = refused(capsys, adapter, out, "--base", tmp_path / "quantised")
    assert "is quantised" in told and "--base" in told


def test_tied_embeddings_that_are_adapted_are_refused(sharp_llama, tmp_path, capsys):
    settings = AutoConfig.from_pretrained(sharp_llama, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(settings).save_pretrained(tmp_path / "tied")
    adapter = make_adapter(
        tmp_path / "tied", tmp_path / "a", 0.2, target_modules=["up_proj", "embed_tokens"]
    )
    assert "embeddings and LM head at once" in refused(capsys, adapter, tmp_path / "out")


@pytest.mark.parametrize(
    ("token", "says"), [("", "Token is required"), ("hf_of_nobody", "offline mode is enabled")]
)
def test_a_hub_that_is_not_reached_is_one_line(
    sharp_llama, tmp_path, capsys, monkeypatch, token, says
):
    """By the library's own checks, in its offline mode, before anything is merged."""
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "none"))
    adapter, out = make_adapter(sharp_llama, tmp_path / "a", 0.2), tmp_path / "out"
    capsys.readouterr()
    assert main(["export", str(adapter), str(out), "--push-to-hub", "me/model"]) == 1
    told = one_line(capsys.readouterr().err)
    assert told.startswith("fastalign: --push-to-hub me/model: ") and says in told
    assert not out.exists()


# ------------------------------------------------------------------------------ results of runs


@pytest.fixture(scope="module")
def runs(sharp_llama, tmp_path_factory) -> dict[str, Path]:
    """Finished runs: of an adapter, and of all weights."""
    folder = tmp_path_factory.mktemp("runs")
    found = {}
    for name, keys in (
        ("lora", {"use_peft": True, "lora_r": 4, "lora_alpha": 16, "learning_rate": 3e-2}),
        ("full", {"learning_rate": 1e-3}),
    ):
        config = recipe("sft", sharp_llama, folder / name, max_steps=2, **keys)
        train(config)
        found[name] = Path(config.output_dir)
    return found


def test_runs_are_exported(runs, sharp_llama, tmp_path, capsys):
    for name, adapter in (("lora", runs["lora"]), ("full", None)):
        out = tmp_path / name
        assert main(["export", str(runs[name]), str(out)]) == 0
        wanted = logits(read(sharp_llama if adapter else runs["full"], adapter))
        torch.testing.assert_close(logits(read(out)), wanted, rtol=1e-4, atol=1e-3)
        assert (wanted - logits(read(sharp_llama))).abs().max() > 1e-2
        # What the run said of itself goes along.
        facts = json.loads((out / "run.json").read_text())
        assert facts["recipe"]["method"] == "sft"
        card = (out / "README.md").read_text()
        header, _, rest = card.removeprefix("---\n").partition("---\n")
        assert "library_name: transformers" in header and "peft" not in header
        assert "- fastalign" in header and "## Recipe" in rest
        assert "Exported by FastAlign" in rest


@pytest.fixture
def engines() -> Iterator[list[Any]]:
    made: list[Any] = []
    yield made
    for engine in made:
        engine.close()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM")
def test_vllm_takes_results_as_they_are(runs, sharp_llama, tmp_path, engines):
    """The folder of a run that trained all weights, an adapter's on it; and an export."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    from fastalign.config import RolloutConfig
    from fastalign.rollout.vllm import VllmEngine

    settings = RolloutConfig(engine="vllm", max_num_seqs=4, kv_cache_gib=0.05)
    prompts = [IDS[0].int().numpy(), IDS[1, :7].int().numpy()]

    def expected(model: Any) -> np.ndarray:
        last = [logits(model, torch.tensor(p)[None].long())[0, -1].log_softmax(-1) for p in prompts]
        return np.array([[float(row[5]), float(row[6])] for row in last])

    assert main(["export", str(runs["lora"]), str(tmp_path / "out")]) == 0
    for folder in (runs["full"], tmp_path / "out"):
        engines.append(
            VllmEngine(
                ServedModel(folder, dtype=torch.float32, max_model_len=64, lora_rank=4), settings
            )
        )
        found = engines[-1].next_logprobs(prompts, [5, 6])
        np.testing.assert_allclose(found, expected(read(folder)), atol=1e-3)
    outputs = engines[0]._llm.generate(
        [{"prompt_token_ids": prompt.tolist()} for prompt in prompts],
        SamplingParams(max_tokens=1, logprob_token_ids=[5, 6]),
        lora_request=LoRARequest("as-it-is", 7, str(runs["lora"])),
        use_tqdm=False,
    )
    first = [output.outputs[0].logprobs[0] for output in outputs]
    adapted = np.array([[row[5].logprob, row[6].logprob] for row in first])
    wanted = expected(read(runs["full"], runs["lora"]))
    np.testing.assert_allclose(adapted, wanted, atol=1e-3)
    assert np.abs(wanted - expected(read(runs["full"]))).max() > 1e-2
