"""The recipe: one typed, frozen configuration, read from YAML and dotted overrides.

Keys that mean the same as in transformers' ``TrainingArguments`` or TRL's configs carry their
names.  Two differ on purpose: ``global_batch_size`` counts records (pairs for preferences) per
optimizer step over all ranks, and ``micro_batch_tokens`` is the token budget of one packed
forward pass; neither depends on how many processes run.
"""

from __future__ import annotations

import difflib
import os
import re
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fastalign.errors import ConfigError as ConfigError
from fastalign.printing import short

# Of a YAML file.
MOST_VALUES = 100_000


class Strict(BaseModel):
    """A section of a recipe: its keys and no others."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )


PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class DatasetConfig(Strict):
    """One source of records; several are concatenated, each sampled by its weight."""

    path: str = Field(description="JSONL, JSON or Parquet file, or a name on the hub.")
    split: str = Field("train", description="Split of a hub dataset.")
    weight: PositiveFloat = Field(
        1.0,
        description="Multiplies the number of records: 0.5 takes a seeded half, 2 each twice.",
    )
    max_samples: PositiveInt | None = Field(None, description="Seeded subsample before weighting.")
    columns: dict[str, str] = Field(
        default_factory=dict, description="Renames: our column name -> the file's column name."
    )
    template: str | None = Field(
        None,
        description="'chat' (the default: the tokenizer's own), 'alpaca' or a template file.",
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Passed to the tokenizer's chat template."
    )


class CutConfig(Strict):
    """Contrastive unlikelihood training (arXiv 2312.14591)."""

    preset: Literal["paper", "reference"] = Field(
        "paper",
        description="'paper': record weight 1 and gamma below. 'reference': the published code at "
        "micro-batch 1 (gamma 0, negative records weigh one half).",
    )
    lambda_: PositiveFloat = Field(
        1.1, alias="lambda", description="Token t is inappropriate when c_t > lambda * q_t."
    )
    alpha: Annotated[float, Field(ge=0)] = Field(1.0, description="Weight of the penalty.")
    gamma: Annotated[float, Field(ge=0)] = Field(
        1.0, description="Exponent of the dynamic weight c_t^gamma (preset 'paper')."
    )
    min_judged_prob: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="Flag only where c_t exceeds it (DualCUT)."
    )
    positive_ratio: Annotated[float, Field(ge=0)] | None = Field(
        None, description="Keep at most this many positive records per negative one; null: all."
    )
    judged_warmup: Fraction = Field(
        0.0,
        description="Share of the steps, at the start, that leaves out the contrast: Align-P and "
        "Align-N alone.",
    )
    # Parts of the loss that the paper's ablation leaves out (table 4).
    align_p: bool = Field(
        True,
        description="Likelihood of positive records; without it they still count in the means.",
    )
    align_n: bool = Field(True, description="Likelihood of criticised answers after the judgment.")
    misalign: bool = Field(
        True, description="The contrast: what criticised answers are taught without the judgment."
    )
    detection: bool = Field(
        True, description="false: every token of a criticised answer counts as inappropriate."
    )

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        allow_inf_nan=False,
        validate_by_name=True,
        validate_by_alias=True,
        serialize_by_alias=True,
    )


class ProfileConfig(Strict):
    """torch's profiler over a few steps: a trace and a table in output_dir/profile."""

    steps: PositiveInt = Field(3, description="Steps that are profiled.")
    skip: Annotated[int, Field(ge=0)] = Field(
        1, description="Steps before them, in which kernels compile and memory is allocated."
    )


class OnlineConfig(Strict):
    """Rollouts from the current model, judged where the method asks for that, then trained on;
    absent: offline."""

    iterations: PositiveInt | None = Field(
        None, description="Rounds of rollout, judging and training; null: until the prompts end."
    )
    prompts_per_iteration: PositiveInt = Field(
        64, description="New prompts per round over all ranks."
    )
    num_generations: PositiveInt = Field(1, description="Samples per prompt.")
    pairs: Literal["best_worst", "all"] = Field(
        "best_worst",
        description="Of more than two samples DPO learns from the best against the worst by the "
        "judge, or from all pairs that it decides.",
    )
    num_train_epochs: PositiveInt = Field(1, description="Passes over each round's records.")
    rounds_per_reference: PositiveInt | None = Field(
        None,
        description="Iterated self-judgment: after so many iterations, again and again, the policy "
        "becomes the reference and with it the judge; null: the start of the run stays both.",
    )
    max_staleness: Literal[0, 1] = Field(
        0,
        description="How many rounds older than the policy the weights may be that sampled a "
        "round; 0: on-policy; 1: the engine, a server, samples a round while the one before it is "
        "trained on.",
    )
    fresh_adapter: bool = Field(
        False,
        description="Train each round's adapter anew from the start of the run, by a schedule of "
        "its own, on what the last round's adapter sampled; false: go on with the same adapter.",
    )


class ServerConfig(Strict):
    """vLLM as a server of its own, which the trainer starts and ends."""

    devices: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (), description="Its GPUs, behind those of the trainer; with several, tensor parallel."
    )
    port: PositiveInt | None = Field(None, description="On this machine; null: a free one.")
    start_timeout_s: PositiveFloat = Field(600.0, description="Until it answers.")


class RolloutConfig(Strict):
    """The rollout engine."""

    engine: Literal["auto", "vllm", "hf", "server"] = Field(
        "auto",
        description="'auto' takes vLLM when it is installed, the embedded engine otherwise; "
        "'server': vLLM (0.32) in a process of its own, for online.max_staleness or GPUs of its "
        "own.",
    )
    server: ServerConfig = Field(ServerConfig(), description="The server of engine 'server'.")
    timeout_s: PositiveFloat = Field(
        3600.0,
        description="So long may an engine inside the trainer's process start or finish nothing, "
        "and a server leave a call (a process's share of a round) unanswered.",
    )
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = Field(
        0.4, description="Share of each GPU's memory that vLLM takes."
    )
    kv_cache_gib: PositiveFloat = Field(1.0, description="Key-value cache of vLLM on a CPU.")
    max_num_seqs: PositiveInt = Field(64, description="Sequences decoded at once.")
    enforce_eager: bool = Field(
        True, description="vLLM without CUDA graphs: starts sooner and decodes slower."
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="Arithmetic of the engine; 'auto': that of the trainer."
    )
    tensor_parallel_size: PositiveInt = Field(
        1,
        description="So many neighbouring processes share one vLLM engine, each with its part of "
        "every layer; has to divide the number of processes. For models too large for one GPU.",
    )

    @model_validator(mode="after")
    def _check(self) -> RolloutConfig:
        if self.engine in ("hf", "server") and self.tensor_parallel_size > 1:
            why = {
                "hf": "holds the whole model in each process",
                "server": "is no engine of the run's processes",
            }[self.engine]
            raise ValueError(
                f"rollout.tensor_parallel_size is {self.tensor_parallel_size} with rollout.engine "
                f"{self.engine!r}, which {why}: leave one of them out"
            )
        return self


class EndpointConfig(Strict):
    """An OpenAI-compatible server that judges."""

    base_url: str = Field(description="As 'http://localhost:8000/v1'.")
    model: str = Field(description="Name of the model there.")
    api_key_env: str = Field(
        "OPENAI_API_KEY", description="Environment variable with the key; unset: none is sent."
    )
    max_concurrency: PositiveInt = Field(8, description="Requests under way at once, of all ranks.")
    max_retries: Annotated[int, Field(ge=0)] = Field(
        5, description="Of a request that is refused for now, with growing pauses."
    )
    timeout_s: PositiveFloat = Field(60.0, description="Of one request.")
    max_tokens: PositiveInt | None = Field(
        None, description="Of a reply; null: 16 for a comparison, 256 for a judgment in words."
    )
    temperature: Annotated[float, Field(ge=0)] = Field(0.0, description="Of the server's replies.")
    extra_body: dict[str, Any] = Field(
        default_factory=dict,
        description="Further fields of each request, as the server knows them; null takes out one "
        "of ours: {max_tokens: null, max_completion_tokens: 512, reasoning_effort: low}.",
    )
    input_cost_per_million: Annotated[float, Field(ge=0)] | None = Field(
        None, description="Price of a million prompt tokens, in any currency."
    )
    output_cost_per_million: Annotated[float, Field(ge=0)] | None = Field(
        None, description="Price of a million completion tokens, in the same currency."
    )
    max_cost: PositiveFloat | None = Field(
        None, description="Of the whole run: the run pauses before it asks for more."
    )
    max_requests: PositiveInt | None = Field(
        None, description="Of the whole run: the run pauses before it asks once more."
    )

    @property
    def priced(self) -> bool:
        """Whether anything is known of what tokens cost."""
        return self.input_cost_per_million is not None or self.output_cost_per_million is not None


class JudgeConfig(Strict):
    """Who judges the rollouts: written judgments for CUT, pairs for DPO."""

    type: Literal["rule", "self", "model", "endpoint"] = Field(
        "rule",
        description="A Python callable, the model that is trained, another local model, or a "
        "server.",
    )
    path: str | None = Field(
        None,
        description="Rule: 'package.module:name' or 'file.py:name' of a callable; a file is looked "
        "for beside the recipe.",
    )
    endpoint: EndpointConfig | None = Field(
        None, description="Endpoint judge: which server, and what it may cost."
    )
    model: Literal["reference", "policy"] = Field(
        "reference", description="Self judge: the frozen start of the run, or the current policy."
    )
    model_name_or_path: str | None = Field(None, description="Model judge: which model.")
    template: str | None = Field(
        None,
        description="File with the wording, of comparisons or of written judgments as the method "
        "needs them; default: built in.",
    )
    max_tokens: PositiveInt = Field(
        256, description="Of a judgment in words by a local model (self, model)."
    )
    temperature: Annotated[float, Field(ge=0)] = Field(
        0.0, description="Of judgments in words by a local model; 0: the most probable tokens."
    )
    principles: tuple[str, ...] = Field(
        (),
        description="One judgment per principle (SELF-JUDGE, PR), each a name that the template "
        "knows (helpfulness, honesty, instruction following, truthfulness) or a text of its own; "
        "empty: one overall.",
    )
    decision_tokens: tuple[str, str] = Field(
        (" A", " B"),
        description="Names of the two answers where the judge decides; one token each.",
    )
    tie_threshold: Annotated[float, Field(ge=0)] = Field(
        1e-3, description="Scores closer than this tie; a tied pair abstains."
    )
    min_decision_mass: Fraction = Field(
        0.5, description="Stop when the mean P(A) + P(B) at the decision position is lower."
    )

    @model_validator(mode="before")
    @classmethod
    def _rule(cls, given: Any) -> Any:
        """A text alone is the path of a rule."""
        return {"path": given} if isinstance(given, str) else given


class JsftConfig(Strict):
    """Judge-augmented supervised fine-tuning (arXiv 2402.11253)."""

    judge_weight: Annotated[float, Field(ge=0)] = Field(
        1.0, description="Weight of a judgment row against a demonstration."
    )
    demonstrations: bool = Field(True, description="Also train on the chosen answer.")
    comparisons: Literal["rationale", "principle", "ignore"] = Field(
        "rationale",
        description="What is learnt from the comparisons that rows bring: decision and rationales, "
        "the decision alone, or nothing, as if they brought none.",
    )


class RsoConfig(Strict):
    """Statistical rejection sampling (RSO, arXiv 2309.06657)."""

    beta: PositiveFloat = Field(
        0.5, description="Temperature of acceptance: a lower one takes the best samples."
    )
    num_samples: Annotated[int, Field(ge=2)] | None = Field(
        None, description="Accepted of each prompt's samples, then paired; null: half, at least 2."
    )


class RestConfig(Strict):
    """Reinforced self-training (ReST, arXiv 2308.08998)."""

    quantile: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.5, description="A sample is kept when it wins more than this share of its comparisons."
    )


class ModelConfig(Strict):
    """A model, with or without a LoRA adapter on it."""

    model_name_or_path: str = Field(description="Folder, or a name on the hub.")
    model_revision: str | None = Field(
        None, description="Branch, tag or commit of a model on the hub."
    )
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model.")
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto", description="Parameters and arithmetic; 'auto': bfloat16 where it is fast."
    )
    adapter_name_or_path: str | None = Field(
        None,
        description="Adapter on it. One that training starts from is also the frozen reference "
        "and judge.",
    )
    load_in_4bit: bool = Field(
        False,
        description="QLoRA: linear layers but for the LM head in NF4 (bitsandbytes, double "
        "quantisation). Training wants use_peft and ZeRO 0 to 2. An adapter that was trained on "
        "such a base brings it along.",
    )


class Config(ModelConfig):
    """Everything that a run is made of."""

    # What to train
    method: str = Field(
        description="'sft', 'cut', 'jsft', 'dpo', 'unlikelihood', 'hindsight', "
        "'forward-prediction', 'ilf-mle', 'ilf-dpo', 'rso', 'rest', 'raft', or your own: "
        "'file.py:Class', the file being looked for beside the recipe, or 'package.module:Class'."
    )
    method_config: dict[str, Any] = Field(
        default_factory=dict,
        description="Settings of a method of your own, as its class declares them.",
    )
    attn_implementation: str | None = Field(
        None, description="null: packed, with flash-attn when it is installed."
    )
    gradient_checkpointing: bool = Field(
        False,
        description="Keep each layer's input alone; the backward pass computes the rest again.",
    )
    activation_offloading: bool = Field(
        False, description="What gradient checkpointing keeps waits in the host's memory."
    )
    torch_compile: bool = Field(
        False, description="Layers are compiled, each pass but its attention and head."
    )
    use_peft: bool = Field(False, description="Train a LoRA adapter; false: all weights.")
    lora_r: PositiveInt = Field(16, description="Rank of the adapter.")
    lora_alpha: PositiveInt = Field(
        32, description="The adapter's part is multiplied by lora_alpha / lora_r."
    )
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="Share of the adapter's inputs that is dropped in training."
    )
    lora_target_modules: str | tuple[str, ...] = Field(
        "all-linear",
        description="Names of the layers with an adapter; 'all-linear': all but the LM head.",
    )

    # Data
    datasets: Annotated[tuple[DatasetConfig, ...], Field(min_length=1)] = Field(
        description="What is trained on; a list."
    )
    eval_datasets: tuple[DatasetConfig, ...] = Field(
        (), description="Held-out data; with eval_steps."
    )
    eval_ratio: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="Held-out share of `datasets` when `eval_datasets` is empty."
    )
    judge_datasets: tuple[DatasetConfig, ...] = Field(
        (),
        description="Preference pairs that a pairwise judge of rollouts is measured on, at the "
        "start and whenever it is another one.",
    )
    max_length: PositiveInt = Field(2048, description="Tokens of prompt and completion.")
    strict: bool = Field(False, description="A bad row stops the run instead of being dropped.")
    shuffle: bool = Field(
        True, description="Another order in each epoch; false: that of the files."
    )
    seed: Annotated[int, Field(ge=0)] = Field(
        42, description="Of order, samples, dropout and new adapters."
    )

    # Optimisation
    learning_rate: PositiveFloat = Field(1e-5, description="Highest of the schedule.")
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = Field(
        "cosine", description="'cosine' and 'linear' fall to 0."
    )
    warmup_ratio: Fraction = Field(
        0.0, description="Share of the steps in which the learning rate rises from 0."
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        0.0, description="AdamW's; not of biases and norms."
    )
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.9, description="AdamW's decay of the mean of gradients."
    )
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.999, description="AdamW's decay of the mean of their squares."
    )
    adam_epsilon: PositiveFloat = Field(1e-8, description="AdamW's epsilon.")
    max_grad_norm: PositiveFloat = Field(1.0, description="Gradients are scaled down to this norm.")
    num_train_epochs: PositiveFloat = Field(
        1.0, description="Passes over the data; online: over the prompts."
    )
    max_steps: PositiveInt | None = Field(
        None, description="Optimizer steps at most; null: as num_train_epochs says."
    )
    max_skipped_steps: PositiveInt = Field(
        3,
        description="A step whose loss or gradient norm is no finite number is not made; the run "
        "stops at so many in a row.",
    )
    global_batch_size: PositiveInt = Field(
        8, description="Records (pairs for preferences) of an optimizer step, over all processes."
    )
    micro_batch_tokens: PositiveInt = Field(
        8192, description="Tokens of one packed forward pass of one process."
    )
    normalization: Literal["record", "token"] = Field(
        "record",
        description="Mean over tokens then records, or mean over the tokens of the global batch.",
    )

    # Losses
    cut: CutConfig = Field(CutConfig(), description="Of method 'cut'.")
    jsft: JsftConfig = Field(JsftConfig(), description="Of method 'jsft'.")
    rso: RsoConfig = Field(RsoConfig(), description="Of method 'rso'.")
    rest: RestConfig = Field(RestConfig(), description="Of method 'rest'.")
    beta: PositiveFloat = Field(
        0.1, description="Of pairs: a larger one keeps the policy closer to the reference."
    )
    loss_type: Literal["sigmoid", "ipo", "hinge"] = Field(
        "sigmoid", description="Loss of pairs: 'sigmoid' is DPO's."
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.0, description="Assumed share of wrong labels among pairs."
    )

    # Rollouts
    online: OnlineConfig | None = Field(
        None, description="Train on what the model samples; null: offline, on the data alone."
    )
    rollout: RolloutConfig = Field(RolloutConfig(), description="The engine that samples.")
    judge: JudgeConfig | None = Field(
        None, description="Of the rollouts; null for the methods that ask nobody (ILF)."
    )
    eval_judge: JudgeConfig | None = Field(
        None, description="Judge of the win rate against the start; never the training judge."
    )
    max_completion_length: PositiveInt = Field(
        256, description="Tokens of a sampled answer at most."
    )
    # vLLM samples from no sharper policy.
    temperature: Annotated[float, Field(ge=0.01)] = Field(1.0, description="Of sampled answers.")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="Sample from the most probable tokens that together have this probability."
    )
    top_k: Annotated[int, Field(ge=0)] = Field(
        0, description="Sample from so many of the most probable tokens; 0: from all."
    )
    min_p: Fraction = Field(
        0.0, description="Never sample tokens less probable than this share of the most probable."
    )
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        (), description="Strings that end a completion with the token that completes one of them."
    )

    # Running
    output_dir: str = Field(description="Folder of checkpoints, logs and result.")
    nproc_per_node: PositiveInt | Literal["auto"] = Field(
        "auto", description="Processes on this node; 'auto': one per GPU, one on a CPU."
    )
    zero_stage: Literal["auto", 0, 1, 2, 3] = Field(
        "auto",
        description="DeepSpeed's ZeRO stage; 'auto': 0 on one process, 3 on several (2 with "
        "load_in_4bit).",
    )
    deepspeed: dict[str, Any] = Field(
        default_factory=dict, description="DeepSpeed options merged under ours."
    )
    resume_from_checkpoint: str | bool = Field(
        False, description="true: the newest whole checkpoint of output_dir; or a folder."
    )
    logging_steps: PositiveInt = Field(1, description="Metrics are written every so many steps.")
    save_steps: PositiveInt | None = Field(
        None, description="A checkpoint every so many steps; null: none but when the run is paused."
    )
    async_save: bool = Field(
        False,
        description="Write these checkpoints behind the training, from a copy in the host's "
        "memory.",
    )
    save_total_limit: PositiveInt = Field(2, description="Checkpoints that are kept.")
    eval_steps: PositiveInt | Literal["round"] | None = Field(
        None,
        description="Evaluate at the start, after so many steps each, and at the end; 'round': "
        "after each epoch, online after each iteration.",
    )
    metric_for_best_model: str | None = Field(
        None,
        description="A metric of evaluations; the best model by it is kept in output_dir/best.",
    )
    greater_is_better: bool | None = Field(
        None, description="null: unless the metric's name ends in 'loss'."
    )
    early_stopping_patience: PositiveInt | None = Field(
        None, description="Stop after so many evaluations without a better one."
    )
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = Field(
        ("tensorboard",), description="Where metrics go beside output_dir/metrics.jsonl."
    )
    profile: ProfileConfig | None = Field(None, description="Trace some steps; null: none.")
    declared_licenses: dict[str, str] = Field(
        default_factory=dict, description="Licences of model and data, written to run.json."
    )

    @property
    def refreshes(self) -> bool:
        """Whether the reference moves on with the policy."""
        return self.online is not None and self.online.rounds_per_reference is not None

    @model_validator(mode="after")
    def _check(self) -> Config:
        if not (self.cut.align_p or self.cut.align_n or self.cut.misalign):
            raise ValueError("cut.align_p, align_n and misalign are all false: nothing is trained")
        if self.activation_offloading and not self.gradient_checkpointing:
            raise ValueError(
                "activation_offloading keeps on the host what gradient checkpointing saves: set "
                "gradient_checkpointing: true with it"
            )
        if self.online is not None and self.online.fresh_adapter and not self.use_peft:
            raise ValueError("online.fresh_adapter is true but use_peft is false: set it to true")
        if self.online is not None:
            _check_online(self.method, self.online, self.eval_judge)
        if (
            self.online is not None
            and self.online.max_staleness
            and self.rollout.engine != "server"
        ):
            raise ValueError(
                f"online.max_staleness is {self.online.max_staleness} with rollout.engine "
                f"{self.rollout.engine!r}: only an engine of its own samples while the model is "
                "trained; set rollout.engine to 'server', or max_staleness to 0"
            )
        if self.online is not None and self.online.fresh_adapter and self.refreshes:
            raise ValueError(
                f"online.rounds_per_reference is {self.online.rounds_per_reference} and "
                "online.fresh_adapter is true: a reference that moves on needs a policy that does; "
                "leave one of them out"
            )
        for text in self.stop:
            if "\ufffd" in text:
                raise ValueError(f"stop holds {text!r}: U+FFFD stands for bytes that are no text")
        for key, who in (("judge", self.judge), ("eval_judge", self.eval_judge)):
            if who is not None:
                _check_judge(key, who)
        if self.adapter_name_or_path is not None and not self.use_peft:
            raise ValueError("adapter_name_or_path is set but use_peft is false: set it to true")
        check_4bit(self)
        if self.label_smoothing and self.loss_type != "sigmoid":
            raise ValueError(
                f"label_smoothing is {self.label_smoothing} with loss_type {self.loss_type!r}: "
                "it is defined for 'sigmoid' alone"
            )
        if self.metric_for_best_model is None and self.early_stopping_patience is not None:
            raise ValueError("early_stopping_patience needs metric_for_best_model")
        if self.async_save and self.save_steps is None:
            raise ValueError("async_save needs save_steps: a run that pauses waits for its own")
        if self.metric_for_best_model is not None and self.eval_steps is None:
            raise ValueError(
                f"metric_for_best_model is {self.metric_for_best_model!r}: it needs eval_steps"
            )
        if self.eval_judge is not None and self.eval_judge == self.judge:
            raise ValueError("eval_judge is the training judge: another one has to measure it")
        return self


def check_4bit(config: Config) -> None:
    """Refuse what a base in NF4 cannot do.

    Raises:
        ValueError: the base is to be trained itself, spread over ranks, compiled, or served.
    """
    if not config.load_in_4bit:
        return
    if not config.use_peft:
        raise ValueError(
            "load_in_4bit is true but use_peft is false: weights in 4 bits cannot be trained "
            "themselves; set use_peft to true, or load_in_4bit to false"
        )
    if config.zero_stage == 3:
        raise ValueError(
            "load_in_4bit is true with zero_stage 3, which cannot spread weights in 4 bits: set "
            "zero_stage to 2 ('auto' does), or load_in_4bit to false"
        )
    if config.online is not None and config.rollout.engine == "server":
        raise ValueError(
            "load_in_4bit is true with rollout.engine 'server', which has not been tried with a "
            "base in 4 bits: set rollout.engine to 'vllm' or 'hf'"
        )
    if config.online is not None and config.rollout.tensor_parallel_size > 1:
        raise ValueError(
            f"load_in_4bit is true with rollout.tensor_parallel_size "
            f"{config.rollout.tensor_parallel_size}: an engine that ranks share has not been tried "
            "with a base in 4 bits; leave it at 1"
        )
    if config.torch_compile:
        raise ValueError(
            "load_in_4bit is true with torch_compile, which nobody has proven for products with "
            "weights in 4 bits: leave one of them out"
        )


def _check_online(method: str, online: OnlineConfig, eval_judge: JudgeConfig | None) -> None:
    if online.pairs == "all" and method != "dpo" and ":" not in method:
        raise ValueError(f"online.pairs is 'all' with method {method!r}: it is a setting of 'dpo'")
    moves = online.rounds_per_reference
    if moves is None:
        return
    if online.iterations is not None and moves >= online.iterations:
        raise ValueError(
            f"online.rounds_per_reference is {moves} in {online.iterations} iterations: the "
            "reference would never move; take fewer, or leave it out"
        )
    if eval_judge is not None and (eval_judge.type, eval_judge.model) == ("self", "reference"):
        raise ValueError(
            "eval_judge is the reference, which online.rounds_per_reference moves: win rates would "
            "be measured by another judge each time; name a judge that stays"
        )


def _check_judge(key: str, who: JudgeConfig) -> None:
    needed = {
        "rule": ("path", "a rule judge names its callable"),
        "endpoint": ("endpoint", "it names base_url and model"),
        "model": ("model_name_or_path", "a model judge names its model"),
    }
    if who.type in needed and getattr(who, needed[who.type][0]) is None:
        name, why = needed[who.type]
        raise ValueError(f"{key}.{name} is missing: {why}")
    if 0 < who.temperature < 0.01:
        raise ValueError(
            f"{key}.temperature = {who.temperature}: a local model samples at 0 or at least 0.01"
        )
    server = who.endpoint
    if server is not None:
        _check_no_secret(key, server)
    if server is not None and server.max_cost is not None and not server.priced:
        raise ValueError(
            f"{key}.endpoint.max_cost = {server.max_cost}: it needs input_cost_per_million or "
            "output_cost_per_million"
        )


def _check_no_secret(key: str, server: EndpointConfig) -> None:
    """What a recipe says is logged, kept and published."""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", server.api_key_env):
        raise ValueError(
            f"{key}.endpoint.api_key_env is no name of an environment variable: name the one that "
            "holds the key, not the key itself"
        )
    if "@" in server.base_url.partition("://")[2].partition("/")[0]:
        raise ValueError(
            f"{key}.endpoint.base_url holds a user or password, which would be in every log: put "
            "it into the environment variable that api_key_env names"
        )


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a recipe and apply ``a.b=value`` overrides (values are YAML).

    Raises:
        ConfigError: one line naming file, key, value and what would be right.
    """
    tree = read_yaml(path, "recipe")
    _place_code(tree, Path(path).parent)
    for override in overrides or []:
        _apply_override(tree, override)
    # What the command line names is looked for from where that is.
    _place_code(tree, Path())
    return parse_config(tree, str(path))


def _place_code(tree: dict[str, Any], folder: Path) -> None:
    """Make paths of files with code absolute: they are looked for in ``folder``."""
    for section, key in ((tree, "method"), (tree, "judge"), (tree, "eval_judge")):
        if isinstance(section.get(key), dict):
            section, key = section[key], "path"
        if isinstance(section.get(key), str):
            section[key] = _placed(section[key], folder)


def _placed(path: str, folder: Path) -> str:
    where, _, name = path.rpartition(":")
    return f"{os.path.abspath(folder / where)}:{name}" if where.endswith(".py") else path


def override_config(config: Config, overrides: Iterable[str]) -> Config:
    """The recipe with ``a.b=value`` overrides applied.

    Raises:
        ConfigError: one line naming key, value and what would be right.
    """
    tree = config.model_dump(mode="json", by_alias=True)
    for override in overrides:
        _apply_override(tree, override)
    return parse_config(tree)


def load_judge(path: str | Path) -> JudgeConfig:
    """A judge in a YAML file of its own, whose keys are those of a recipe's ``judge``.

    Raises:
        ConfigError: one line naming file, key, value and what would be right.
    """
    tree = read_yaml(path, "judge")
    if isinstance(tree.get("path"), str):
        tree["path"] = _placed(tree["path"], Path(path).parent)
    try:
        who = JudgeConfig.model_validate(tree)
        _check_judge("judge", who)
    except ValidationError as error:
        errors = [{**each, "loc": ("judge", *each["loc"])} for each in error.errors()]
        raise ConfigError(f"{path}: {explain(errors)}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    return who


def read_yaml(path: str | Path, what: str) -> dict[str, Any]:
    """A YAML file that is one mapping; ``what`` names its purpose in errors.

    Raises:
        ConfigError: one line naming file, line and problem.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such {what}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    try:
        tree = _load_yaml(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not YAML"
        raise ConfigError(f"{path}{where}: {problem}") from None
    except Exception as error:
        # 2024-13-45 is no date, brackets may be nested too deeply, and what a tag like !!int does
        # not fit raises errors of all kinds.
        raise ConfigError(f"{path}: not YAML: {error or type(error).__name__}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: a {what} is a mapping of keys to values")
    return tree


def _load_yaml(text: str) -> Any:
    """
    Raises:
        ValueError: it is larger than any recipe, once what its aliases repeat is written out, which
            may be without end; or a text of it is none.
        Exception: it is no YAML.
    """
    tree = yaml.safe_load(text)
    seen, waiting = 0, [tree]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict | list | tuple | set):
            seen += 1 + len(value)
            if seen > MOST_VALUES:
                raise ValueError(f"more than {MOST_VALUES} values, with what aliases repeat")
            waiting += [*value, *value.values()] if isinstance(value, dict) else value
        elif isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value):
            raise ValueError(f"{short(value)} holds half of a surrogate pair, which is no text")
    return tree


def parse_config(tree: dict[str, Any], origin: str = "config") -> Config:
    """Validate a tree of plain values; ``origin`` names it in errors."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{origin}: {explain(error.errors())}") from None


_EXPONENT = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+")


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"{override!r}: an override is written key.sub=value")
    try:
        parsed = _load_yaml(value)
    except Exception:  # see read_yaml
        raise ConfigError(f"{override!r}: the value is not YAML") from None
    if isinstance(parsed, str) and _EXPONENT.fullmatch(value.strip()):
        # YAML reads 5e-6 as text (it wants 5.0e-6); a number is meant.
        parsed = float(parsed)
    node: Any = tree
    *parents, last = key.split(".")
    for part in parents:
        node = _child(node, part, override, create=True)
    if isinstance(node, list):
        node[_index(node, last, override)] = parsed
    elif isinstance(node, dict):
        node[last] = parsed
    else:
        raise ConfigError(f"{override!r}: {'.'.join(parents)} is a value, not a section")


def _child(node: Any, part: str, override: str, create: bool) -> Any:
    if isinstance(node, list):
        return node[_index(node, part, override)]
    if not isinstance(node, dict):
        raise ConfigError(f"{override!r}: {part!r} is below a value, not a section")
    if create and node.get(part) is None:
        node[part] = {}
    return node[part]


def _index(node: list[Any], part: str, override: str) -> int:
    if not part.isdecimal() or int(part) >= len(node):
        raise ConfigError(f"{override!r}: {part!r} is no index into a list of {len(node)}")
    return int(part)


def explain(
    errors: Iterable[Any], root: type[BaseModel] = Config, below: str = "", what: str = "a recipe"
) -> str:
    """All that pydantic finds wrong with ``root``, in one line.

    Args:
        below: the key that the model's own keys are below.
        what: the model in words.
    """
    errors = list(errors)
    problems: dict[str, list[str]] = {}
    for error in errors:
        location = error["loc"]
        # A list whose items are wrong is also reported as too short: they did not count.
        inside = (e["loc"] for e in errors if len(e["loc"]) > len(location))
        if error["type"] == "too_short" and any(i[: len(location)] == location for i in inside):
            continue
        subject, problem = _explain_one(error, root, below, what)
        problems.setdefault(subject, []).append(problem)
    # Every alternative of a union complains on its own.
    return "; ".join(subject + " or ".join(texts) for subject, texts in problems.items())


def _explain_one(error: Any, root: type[BaseModel], below: str, what: str) -> tuple[str, str]:
    """(what is wrong, what would be right) of one error of pydantic's."""
    location = _without_alternatives(error["loc"], root)
    name = ".".join([below, *location] if below else location) or "recipe"
    if error["type"] == "extra_forbidden":
        known = _known_keys(location[:-1], root)
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        return f"{name} is no key of {what}", f": did you mean {near[0]!r}?" if near else ""
    if error["type"] == "missing":
        return f"{name} is missing", ""
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return message, ""
    value = repr(error["input"])
    value = value if len(value) <= 80 else value[:80] + "..."
    return f"{name} = {value}: ", f"{message[0].lower()}{message[1:]}"


def _without_alternatives(location: Iterable[str | int], root: type[BaseModel]) -> list[str]:
    """The location without the names that pydantic gives to the members of a union."""
    model: Any = root
    names: list[str] = []
    union = False
    for part in location:
        if union and isinstance(part, str):
            continue
        names.append(str(part))
        if isinstance(part, str) and model is not None:
            annotation = _annotation(model, part)
            model = _section(annotation)
            union = model is None and get_origin(annotation) in (Union, types.UnionType)
    return names


def _known_keys(location: list[str], root: type[BaseModel]) -> list[str]:
    model: Any = root
    for part in location:
        if part.isdigit() or model is None:
            continue
        model = _section(_annotation(model, part))
    if model is None:
        return []
    return [field.alias or name for name, field in model.model_fields.items()]


def _annotation(model: type[BaseModel], name: str) -> Any:
    fields = model.model_fields.items()
    return next((f.annotation for n, f in fields if name in (n, f.alias)), None)


def _section(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _section(argument)
        if found is not None:
            return found
    return None


def dump_config(config: Config) -> str:
    """The resolved recipe as YAML; reading it back gives an equal config."""
    tree = config.model_dump(mode="json", by_alias=True)
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
