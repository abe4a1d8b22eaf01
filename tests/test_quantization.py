"""A base in NF4: what its bits are, what is learnt on it, who else holds it, and what is refused.

What it is compared with is derived here: the table is the paper's, and a plain checkpoint of the
matrices that the bits stand for is trained by the ordinary path of adapters.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import plan as bench
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import TESTS, distance, outside_environment, recipe, run_ranks, start
from support import step_with_gradients as step
from test_train import LORA, RULE, interrupt, online, result, train_and
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fastalign import checkpoint, reference
from fastalign import quantization as nf4
from fastalign.cli import main
from fastalign.config import Config, ConfigError, ModelConfig, RolloutConfig
from fastalign.eval_tasks import Settings, model_arguments
from fastalign.local import open_model
from fastalign.model import POLICY, resolve_adapter, resolve_zero_stage
from fastalign.online import wake
from fastalign.plan import Planner, find_gpu
from fastalign.rollout import EngineError, ServedModel, choose_engine, hf
from fastalign.rollout.hf import HfEngine
from fastalign.run import Run
from fastalign.train import train

pytestmark = [
    pytest.mark.usefixtures("quiet_process"),
    pytest.mark.skipif(
        importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes"
    ),
]

CPU = torch.device("cpu")
QLORA = {**LORA, "load_in_4bit": True}
# Appendix E of arXiv 2305.14314.
TABLE = torch.tensor(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    dtype=torch.float64,
)  # fmt: skip


def derived(matrix: torch.Tensor, eight_bits: torch.Tensor) -> torch.Tensor:
    """What NF4 makes of a matrix: by the paper, in float64, with bitsandbytes' table of 8 bits."""
    blocks = matrix.double().reshape(-1, 64)
    scale = blocks.abs().amax(1)
    codes = (blocks / scale[:, None]).unsqueeze(-1).sub(TABLE).abs().argmin(-1)
    mean = scale.mean()
    groups = torch.nn.functional.pad(scale - mean, (0, -len(scale) % 256)).reshape(-1, 256)
    outer = groups.abs().amax(1, keepdim=True)
    inner = (groups / outer).unsqueeze(-1).sub(eight_bits.double()).abs().argmin(-1)
    rounded = (eight_bits.double()[inner] * outer).reshape(-1)[: len(scale)] + mean
    return (TABLE[codes] * rounded[:, None]).reshape(matrix.shape)


def load(model: Path, dtype: torch.dtype = torch.float32) -> Any:
    return nf4.load_nf4(str(model), dtype=dtype, device=CPU)


def bits(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Everything that the base in NF4 is made of, by names without PEFT's."""
    held = {n: p for n, p in model.named_parameters() if p.dtype == torch.uint8}
    held |= dict(nf4.scales_of(model))
    return {
        n.replace("base_model.model.", "").replace(".base_layer", ""): t.detach().clone()
        for n, t in held.items()
    }


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


@pytest.fixture(scope="session")
def plain(sharp_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ordinary checkpoint in float32 of the matrices that the sharp Llama's bits stand for."""
    folder = tmp_path_factory.mktemp("plain")
    shutil.copytree(sharp_llama, folder, dirs_exist_ok=True)
    weights, held = load_file(folder / "model.safetensors"), load(sharp_llama)
    tables = {n: t for n, t in nf4.scales_of(held) if n.endswith("nested_quant_map")}
    for name, table in tables.items():
        name = name.removesuffix(".nested_quant_map")
        weights[name] = derived(weights[name], table).float()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def adapter(sharp_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An adapter that changes what the model says, by PEFT alone."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(3)
    settings = LoraConfig(
        r=4, lora_alpha=16, target_modules="all-linear", init_lora_weights=False,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(sharp_llama), settings)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def rule(tmp_path: Path) -> Path:
    path = tmp_path / "rule.py"
    path.write_text(RULE)
    return path


@pytest.fixture(scope="module")
def trained(sharp_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A finished run, whose result other tests use."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in outside_environment().items():
            patch.setenv(name, value)
        config = recipe(
            "sft", sharp_llama, folder, learning_rate=1e-2, max_steps=2, save_steps=1, **QLORA
        )
        train(config)
    return config


# ---------------------------------------------------------------------------------------- bits


def test_the_base_is_what_the_paper_makes_of_the_checkpoint(sharp_llama, plain):
    held, expected = load(sharp_llama), load_file(plain / "model.safetensors")
    import bitsandbytes

    parameters = dict(held.named_parameters())
    assert parameters.keys() == expected.keys()
    quantised = {n for n, p in parameters.items() if p.dtype == torch.uint8}
    # Norms, embeddings and the LM head stay as they are.
    assert quantised == {n for n in expected if "_proj" in n} and len(quantised) == 14
    for name, parameter in parameters.items():
        found = parameter
        if name in quantised:
            found = bitsandbytes.functional.dequantize_4bit(parameter.data, parameter.quant_state)
            assert not torch.equal(found, load_file(sharp_llama / "model.safetensors")[name])
        torch.testing.assert_close(found.detach(), expected[name], rtol=1e-6, atol=1e-8)
    assert not any(p.requires_grad for p in parameters.values())


def test_the_bits_follow_from_the_checkpoint_alone(sharp_llama):
    """An engine in bfloat16 holds the base of a trainer in float32."""
    wide, narrow = load(sharp_llama), load(sharp_llama, torch.bfloat16)
    assert same(bits(wide), bits(narrow)) and len(bits(wide)) == 14 * 6
    assert {p.dtype for p in narrow.parameters()} == {torch.uint8, torch.bfloat16}
    assert {p.dtype for p in wide.parameters()} == {torch.uint8, torch.float32}


def test_a_pass_in_evaluation_leaves_the_base_as_it_was(sharp_llama):
    """bitsandbytes lays it out anew on a CPU with AVX512-BF16, for a product without a gradient."""
    model = load(sharp_llama)
    before, ids = bits(model), torch.arange(3, 20)[None]
    with torch.no_grad():
        evaluated = model.eval()(ids).logits
    embedded = model.get_input_embeddings()(ids).requires_grad_()
    logits = model.train()(inputs_embeds=embedded).logits
    assert torch.equal(evaluated, logits) and same(before, bits(model))
    logits.sum().backward()
    assert embedded.grad.abs().min() > 0


@pytest.mark.parametrize("hidden", [96, 128])
def test_matrices_that_are_read_wrongly_are_refused(tmp_path, hidden):
    """Whatever this processor makes of 96 columns: it is right, or one line says that it is not."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=hidden, intermediate_size=128, num_hidden_layers=1,
        num_attention_heads=2, head_dim=32,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    try:
        model = load(tmp_path)
    except ConfigError as error:
        assert hidden == 96 and "by other numbers than it holds on cpu" in str(error)
        return
    layer = model.model.layers[0].mlp.up_proj
    (table,) = (t for n, t in nf4.scales_of(layer) if n.endswith("nested_quant_map"))
    matrix = load_file(tmp_path / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    product = layer(torch.eye(hidden)).T
    torch.testing.assert_close(product, derived(matrix, table).float(), rtol=1e-5, atol=1e-7)


# ------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("method", ["dpo", "cut"])
def test_gradients_are_those_on_the_dequantised_base(sharp_llama, plain, adapter, tmp_path, method):
    keys = {"adapter_name_or_path": adapter, "learning_rate": 1e-30, **LORA}
    if method == "cut":
        keys["cut"] = {"lambda": 1.5, "gamma": 0.5}
    expected, gradients = step(*start(recipe(method, plain, tmp_path, **keys)))
    assert len(gradients) == 2 * 14 and expected["grad_norm"] > 1e-3
    cases: list[dict[str, Any]] = [{"zero_stage": stage} for stage in (0, 1, 2)]
    cases.append({"zero_stage": 2, "gradient_checkpointing": True})
    for case in cases:
        config = recipe(method, sharp_llama, tmp_path, **keys | case, load_in_4bit=True)
        run, examples = start(config)
        assert run.model.zero_stage == case["zero_stage"]
        assert run.model.policy.packed and run.model.shares_prefixes
        before = bits(run.model.policy.model)
        metrics, found = step(run, examples)
        assert metrics["loss"] == pytest.approx(expected["loss"], rel=1e-5), case
        assert distance(found, gradients) < 1e-4, case
        assert same(before, bits(run.model.policy.model))


def test_half_precision_trains_adapters_in_it(sharp_llama, plain, adapter, tmp_path):
    """Under ZeRO 0 to 2 adapters are in bfloat16 with masters in float32, as on any base."""
    keys = {"adapter_name_or_path": adapter, "learning_rate": 1e-30, **LORA}
    for stage in (0, 1, 2):
        keys |= {"dtype": "bfloat16", "zero_stage": stage}
        _, gradients = step(*start(recipe("dpo", plain, tmp_path, **keys)))
        run, examples = start(recipe("dpo", sharp_llama, tmp_path, **keys, load_in_4bit=True))
        dtypes = {p.dtype for p in run.model.policy.parameters()}
        assert dtypes == {torch.uint8, torch.bfloat16}
        _, found = step(run, examples)
        assert distance(found, gradients) < 1e-2, stage
        masters = {p.dtype for g in run.model.optimizer.param_groups for p in g["params"]}
        assert masters == {torch.float32}


def test_operations_are_counted_as_on_any_base(sharp_llama, plain, tmp_path):
    costs = [
        start(recipe("sft", model, tmp_path, **keys))[0].operations.cost(reference=True)
        for model, keys in ((sharp_llama, QLORA), (plain, LORA))
    ]
    assert costs[0] == costs[1]


@pytest.mark.parametrize("stage", [0, 2])
def test_self_judge_goes_as_on_the_dequantised_base(
    sharp_llama, plain, tmp_path, rule, monkeypatch, capfd, stage
):
    """Rollouts, the frozen judge and the updates: engine and trainer hold one base."""
    found: dict[bool, Config] = {}
    held: dict[str, Any] = {}

    def look(run: Run) -> None:
        held["trainer"] = bits(run.model.policy.model)
        held["engine"] = bits(run.engine._model)

    for in_4bit in (False, True):
        config = recipe(
            "dpo", sharp_llama if in_4bit else plain, tmp_path / str(in_4bit),
            **online("dpo", rule, learning_rate=3e-3, adam_epsilon=1e-2, zero_stage=stage),
            **LORA, load_in_4bit=in_4bit, rollout={"engine": "auto" if in_4bit else "hf"},
        )  # fmt: skip
        train_and(config, monkeypatch, look)
        found[in_4bit] = config
        if not in_4bit:
            capfd.readouterr()
    said = capfd.readouterr().err
    assert "float32 on a base in NF4 (" in said and "rollouts    by hf, " in said
    assert same(held["trainer"], held["engine"]) and len(held["engine"]) == 14 * 6
    texts = [
        [
            [json.loads(line)["completions"] for line in file.read_text().splitlines()]
            for file in sorted(Path(config.output_dir, "episodes").glob("*.jsonl"))
        ]
        for config in found.values()
    ]
    assert texts[0] == texts[1] and len(texts[0]) == 2
    assert distance(result(found[True]), result(found[False])) < 1e-3


@pytest.mark.parametrize("method", ["dpo", "self-judge"])
def test_a_resumed_run_ends_where_an_undisturbed_one_does(
    sharp_llama, tmp_path, rule, monkeypatch, method
):
    keys: dict[str, Any] = {"save_steps": 2, "lora_dropout": 0.2, "zero_stage": 2, **QLORA}
    if method == "self-judge":
        keys |= online("dpo", rule, global_batch_size=2)
    whole, broken = (recipe("dpo", sharp_llama, tmp_path / x, **keys) for x in ("a", "b"))
    train(whole)
    interrupt(broken, monkeypatch, before=3 if method == "dpo" else 4)
    train(broken.model_copy(update={"resume_from_checkpoint": True}))
    assert same(result(whole), result(broken))


def test_checkpoints_hold_adapters_alone(trained):
    (saved, *_) = checkpoint.checkpoints(Path(trained.output_dir))
    state = torch.load(saved / "state" / "mp_rank_00_model_states.pt", weights_only=False)
    assert len(state["module"]) == 2 * 14
    assert all("lora_" in name for name in state["module"])


def test_two_ranks_learn_what_one_does(sharp_llama, adapter, tmp_path):
    keys = {"adapter_name_or_path": adapter, "learning_rate": 1e-30, **QLORA}
    configs = {
        f"stage-{stage}": recipe("dpo", sharp_llama, tmp_path / "rows", zero_stage=stage, **keys)
        for stage in (1, 2)
    }
    specification = {}
    for name, config in configs.items():
        tree = config.model_dump(mode="json", by_alias=True)
        specification[name] = {"do": "gradients", "recipe": tree, "cases": {"dpo": tree}}
    path = tmp_path / "specification.json"
    path.write_text(json.dumps(specification))
    codes = run_ranks(TESTS / "distributed_worker.py", path, log=tmp_path / "log")
    assert codes == [0, 0], (tmp_path / "log").read_text()[-4000:]
    metrics, gradients = step(*start(configs["stage-2"]))
    for name in configs:
        theirs = json.loads((tmp_path / f"{name}.dpo.json").read_text())
        assert theirs["loss"] == pytest.approx(metrics["loss"], rel=1e-5)
        assert distance(load_file(tmp_path / f"{name}.dpo.safetensors"), gradients) < 1e-5


def test_other_scales_are_another_reference(sharp_llama, tmp_path, monkeypatch):
    """Twice the weights have the same bits but for their scales."""
    monkeypatch.setenv("FASTALIGN_CACHE", str(tmp_path / "cache"))
    run, examples = start(recipe("dpo", sharp_llama, tmp_path, **QLORA))
    reference.score_reference(run, examples)
    kept = list((tmp_path / "cache" / "reference").iterdir())
    for name, scale in nf4.scales_of(run.model.policy):
        if name.endswith(("nested_absmax", "nested_offset")):
            scale.mul_(2)
    reference.score_reference(run, examples)
    assert len(list((tmp_path / "cache" / "reference").iterdir())) == 2 * len(kept) == 2


# --------------------------------------------------------------------------- whose base it is


def test_a_result_says_what_it_belongs_on(trained, sharp_llama):
    out = Path(trained.output_dir)
    with safe_open(out / "adapter_model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "base_quantization": "nf4"}
    facts = json.loads((out / "run.json").read_text())
    assert facts["recipe"]["load_in_4bit"] and "bitsandbytes" in facts["libraries"]
    assert "trained on its base in NF4" in (out / "README.md").read_text()
    held = json.loads((out / "adapter_config.json").read_text())
    assert held["base_model_name_or_path"] == str(sharp_llama)


def test_what_was_learnt_in_nf4_is_measured_in_nf4(trained, sharp_llama, plain, tmp_path):
    """`generate` and `eval` load the base as the adapter knows it; a plain one is another model."""
    out, prompt = trained.output_dir, np.arange(3, 20, dtype=np.int32)
    said = {}
    for name, model in (("nf4", sharp_llama), ("plain", plain)):
        settings = ModelConfig(
            model_name_or_path=str(model),
            adapter_name_or_path=out if name == "nf4" else str(tmp_path / "unmarked"),
            dtype="float32",
        )
        if name == "plain":
            shutil.copytree(out, tmp_path / "unmarked")
            tensors = load_file(tmp_path / "unmarked" / "adapter_model.safetensors")
            save_file(tensors, tmp_path / "unmarked" / "adapter_model.safetensors")
        with open_model(settings, RolloutConfig(engine="hf")) as local:
            said[name] = local.engine.next_logprobs([prompt], range(40), local.adapter)
            assert local.config.load_in_4bit == (name == "nf4")
    assert np.abs(said["nf4"] - said["plain"]).max() < 1e-4
    # The harness of benchmarks gets the same.
    theirs = ModelConfig(
        model_name_or_path=str(sharp_llama), adapter_name_or_path=out, dtype="float32"
    )
    model = model_arguments(Settings(("x",), theirs))["pretrained"].eval()
    with torch.no_grad():
        logits = model(torch.from_numpy(prompt.astype(np.int64))[None]).logits[0, -1]
    assert np.abs(logits.log_softmax(-1)[:40].numpy() - said["nf4"][0]).max() < 1e-4
    wrong = theirs.model_copy(update={"load_in_4bit": False})
    with (
        pytest.raises(ConfigError, match="was trained on a base in NF4"),
        open_model(wrong, RolloutConfig(engine="hf")),
    ):
        pass


def test_an_adapter_brings_its_base_along(trained, sharp_llama, tmp_path):
    keys = {"use_peft": True, "adapter_name_or_path": trained.output_dir}
    assert resolve_adapter(recipe("sft", sharp_llama, tmp_path, **keys)).load_in_4bit
    with pytest.raises(ConfigError, match="load_in_4bit = False: the adapter"):
        resolve_adapter(recipe("sft", sharp_llama, tmp_path, **keys, load_in_4bit=False))
    with pytest.raises(ConfigError, match=r"adapter_name_or_path = .* with zero_stage 3"):
        resolve_adapter(recipe("sft", sharp_llama, tmp_path, **keys, zero_stage=3))


def test_generate_answers_on_the_adapters_base(trained, sharp_llama, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "the sum of one"}) + "\n")
    command = ["generate", "--model", str(sharp_llama), "--adapter", trained.output_dir]
    command += ["--max-tokens", "4", "--engine", "hf", str(prompts), str(tmp_path / "answers")]
    assert main(command) == 0, capsys.readouterr().err
    (answer,) = map(json.loads, (tmp_path / "answers").read_text().splitlines())
    assert answer["prompt"] and "completion" in answer


# --------------------------------------------------------------------------------------- plan


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_is_held_was_planned(sharp_llama, tmp_path, dtype, checkpointing):
    keys = {"dtype": dtype, "gradient_checkpointing": checkpointing, **QLORA}
    config = recipe("sft", sharp_llama, tmp_path, **keys)
    found, planned = bench.measure(config, 256), bench.predict(config, 256, 1)
    assert planned.pop("activations") == pytest.approx(found.pop("activations"), rel=0.05)
    assert planned == found
    bare = bench.predict(config.model_copy(update={"load_in_4bit": False}), 256, 1)
    assert planned["weights"] < bare["weights"]


@pytest.mark.parametrize("stage", [1, 2])
def test_what_is_held_under_zero_was_planned(sharp_llama, tmp_path, stage):
    config = recipe("sft", sharp_llama, tmp_path, dtype="bfloat16", zero_stage=stage, **QLORA)
    assert bench.predict(config, 64, 1) == bench.measure(config, 64)


def test_plans_never_propose_zero_3(tmp_path):
    LlamaConfig(
        architectures=["LlamaForCausalLM"], hidden_size=4096, intermediate_size=11008,
        num_hidden_layers=2, num_attention_heads=32, vocab_size=32000,
    ).save_pretrained(tmp_path)  # fmt: skip
    keys = {"model_name_or_path": str(tmp_path), "micro_batch_tokens": 4096, **QLORA}
    config = bench.recipe(keys)
    plan = Planner(config, find_gpu("h100", None)).plan(config, 8)
    weights = next(part.update for part in plan.parts if part.name == "weights")
    bare = config.model_copy(update={"load_in_4bit": False, "zero_stage": 2})
    whole = Planner(bare, find_gpu("h100", None)).plan(bare, 8)
    assert plan.stage == 2
    layers = 2 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    # Half a byte a weight, a byte for 64, and for each 256 of these a number of four bytes.
    saved = layers * (2 - 1 / 2 - 1 / 64 - 4 / 64 / 256) - 14 * 4 * (16 + 256 + 1)
    assert next(p.update for p in whole.parts if p.name == "weights") - weights == saved


# ------------------------------------------------------------------------------------ refusals

ONLINE = {
    "online": {"iterations": 1, "prompts_per_iteration": 2, "num_generations": 2},
    "judge": {"type": "self"},
}


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"use_peft": False}, "load_in_4bit is true but use_peft is false"),
        ({"torch_compile": True}, "load_in_4bit is true with torch_compile"),
        ({"zero_stage": 3}, "zero_stage 3, which cannot spread weights in 4 bits: set zero_stage"),
        (ONLINE | {"rollout": {"engine": "server"}}, "load_in_4bit is true with rollout.engine"),
        (
            ONLINE | {"rollout": {"engine": "vllm", "tensor_parallel_size": 2}},
            "load_in_4bit is true with rollout.tensor_parallel_size 2",
        ),
    ],
)
def test_what_nf4_cannot_do_is_one_line(tiny_llama, tmp_path, keys, says):
    with pytest.raises(ConfigError) as caught:
        recipe("dpo", tiny_llama, tmp_path, **QLORA | keys)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_ranks_choose_zero_2(tiny_llama, tmp_path):
    config = recipe("sft", tiny_llama, tmp_path, zero_stage="auto", **QLORA)
    assert [resolve_zero_stage(config, ranks) for ranks in (1, 2, 8)] == [0, 2, 2]


def test_without_bitsandbytes_one_line_names_it(tiny_llama, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        nf4.importlib.util, "find_spec", lambda n, *a: None if n == "bitsandbytes" else find(n, *a)
    )
    with pytest.raises(ConfigError, match=r"pip install 'fastalign\[qlora\]'"):
        start(recipe("sft", tiny_llama, tmp_path, **QLORA))


def test_a_model_that_is_quantised_already_is_refused(tiny_llama, tmp_path):
    from transformers import BitsAndBytesConfig

    made = AutoModelForCausalLM.from_pretrained(
        tiny_llama, quantization_config=BitsAndBytesConfig(load_in_4bit=True)
    )
    made.save_pretrained(tmp_path / "made")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "made")
    with pytest.raises(ConfigError, match="is quantised already"):
        start(recipe("sft", tmp_path / "made", tmp_path, **QLORA))


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM")
def test_the_engine_is_one_that_holds_nf4(tiny_llama, monkeypatch):
    monkeypatch.setattr("fastalign.rollout.vllm_holds_nf4", lambda: False)
    name, why = choose_engine(RolloutConfig(), load_in_4bit=True)
    assert name == "hf" and "vllm-bnb-plugin" in why
    assert choose_engine(RolloutConfig(engine="hf"), True) == ("hf", "as the recipe says")
    with pytest.raises(ConfigError, match="pip install --no-deps vllm-bnb-plugin, or set"):
        choose_engine(RolloutConfig(engine="vllm"), load_in_4bit=True)
    assert choose_engine(RolloutConfig())[0] == "vllm"
    monkeypatch.setattr("fastalign.rollout.vllm_holds_nf4", lambda: True)
    assert choose_engine(RolloutConfig(), load_in_4bit=True)[0] == "vllm"


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("vllm_bnb_plugin") is None, reason="needs vllm-bnb-plugin"
)
def test_vllm_holds_the_same_base(sharp_llama, tmp_path, rule, monkeypatch):
    """The base alone, which judges, and the policy's adapter on it, by both engines."""
    keys = online("dpo", rule, dtype="bfloat16", learning_rate=3e-2)
    config = recipe("dpo", sharp_llama, tmp_path, **keys, **QLORA, rollout={"engine": "vllm"})
    gaps: dict[bool, list[float]] = {}

    def look(run: Run) -> None:
        wake(run)
        prompts = [np.arange(3, n, dtype=np.int32) for n in (5, 9, 40, 80)]
        for in_4bit in (True, False):
            held = ServedModel(sharp_llama, torch.bfloat16, max_model_len=128, load_in_4bit=in_4bit)
            ours = HfEngine(held, RolloutConfig())
            model = run.model
            ours.load_adapter(POLICY, model.adapter_tensors(), model.adapter_config(), 1)
            gaps[in_4bit] = [
                np.abs(e[0] - e[1]).mean()
                for name in (None, POLICY)
                for e in [[x.next_logprobs(prompts, range(200), name) for x in (ours, run.engine)]]
            ]

    train_and(config, monkeypatch, look)
    # Rounding of bfloat16 on the one side, the error of 4 bits on the other.
    assert max(gaps[True]) < 0.1 < 0.2 < min(gaps[False])


def test_an_engine_that_holds_another_base_is_found_out(sharp_llama, tmp_path, rule, monkeypatch):
    """The start-up check: trainer on NF4, engine on the checkpoint as it is."""

    def unquantised(name: str, *, dtype: torch.dtype, device: torch.device, **_: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device)

    monkeypatch.setattr(hf, "load_nf4", unquantised)
    config = recipe("dpo", sharp_llama, tmp_path, **online("dpo", rule), **QLORA)
    with pytest.raises(EngineError, match="the two do not hold the same model"):
        train(config)
