"""``fastalign init``: a recipe for a model, data and machine, made of the published one.

The recipes that come with the package have each method's published settings and say why.  What
depends on the user's own model, data and memory is put into their text, which keeps its comments.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from fastalign.config import Config, ConfigError, DatasetConfig, parse_config
from fastalign.data import Drops, Record, RowError, SourceReport, load_records
from fastalign.data_check import Tokens
from fastalign.doctor import GIB, memory
from fastalign.footprint import load_model_config, weight_bytes
from fastalign.methods import make_method
from fastalign.methods.base import Dropped
from fastalign.model import choose_dtype, context_length, load_tokenizer
from fastalign.plan import Planner, advise

FORMS: dict[str, tuple[str | None, str | None]] = {
    "sft": ("sft", None),
    "cut": ("cut-offline", "cut-online"),
    "jsft": ("jsft", None),
    "dpo": ("dpo", "self-judge"),
    "self-judge": (None, "self-judge"),
    "unlikelihood": ("unlikelihood", None),
    "hindsight": ("hindsight", None),
    "forward-prediction": ("forward-prediction", None),
    "ilf-mle": (None, "ilf-mle"),
    "ilf-dpo": (None, "ilf-dpo"),
    "rso": (None, "rso"),
    "rest": (None, "rest"),
    "raft": (None, "raft"),
}
"""Method -> the recipes of its offline and its online form."""
# Rows that are tokenised to see how long they are, evenly spread over the file.
MEASURED_ROWS = 4096
LENGTH_STEP = 64
LORA = {"use_peft": True, "lora_r": 16, "lora_alpha": 32}
# Of the best learning rates with LoRA and without it.
LORA_FASTER = 10


@dataclass(frozen=True)
class Request:
    """What the command line says; ``online``: train on the model's own answers."""

    method: str
    model: str | None = None
    data: str | None = None
    online: bool = False


@dataclass(frozen=True)
class Draft:
    """The recipe's text, and what was found out for it, and of the data that is left out."""

    text: str
    notes: tuple[str, ...]


class _Text:
    """A recipe as text, whose values are exchanged and whose comments stay."""

    def __init__(self, name: str) -> None:
        self.lines = recipe_text(name).splitlines()

    def __str__(self) -> str:
        return "\n".join(self.lines) + "\n"

    @property
    def config(self) -> Config:
        return parse_config(yaml.safe_load(str(self)), "recipe")

    def set(self, key: str, value: Any, comment: str | None = None) -> None:
        """Give a key of the first level, or ``section.key``, another value; a key that is not there
        comes behind the others."""
        section, _, name = key.rpartition(".")
        indent = "  " if section else ""
        start = self.lines.index(f"{section}:") + 1 if section else 0
        line = f"{indent}{name}: {_yaml(value)}"
        above = [f"{indent}# {comment}"] if comment else []
        for number in range(start, len(self.lines)):
            if self.lines[number].startswith(f"{indent}{name}:"):
                self.lines[number : number + 1] = [*above, line]
                return
            if section and self.lines[number][:1] not in (" ", "#"):
                self.lines[number:number] = [*above, line]
                return
        self.lines += ["", *above, line] if comment else [line]

    def set_data(self, path: str, comments: Sequence[str], **keys: Any) -> None:
        start = self.lines.index("datasets:")
        end = start + 1
        while self.lines[end].startswith("  "):
            end += 1
        block = [f"  - path: {_yaml(path)}", *(f"    {k}: {_yaml(v)}" for k, v in keys.items())]
        self.lines[start + 1 : end] = [*(f"  # {line}" for line in comments), *block]

    def open_with(self, lines: Sequence[str]) -> None:
        """Put comments behind those that the recipe begins with."""
        end = next(i for i, line in enumerate(self.lines) if not line.startswith("#"))
        self.lines[end:end] = ["#", *(f"# {line}" for line in lines)]


def recipe_text(name: str) -> str:
    """A published recipe, from the installed package or from the checkout."""
    here = Path(__file__).parent
    for folder in (here / "recipes", here.parent / "recipes"):
        path = folder / f"{name}.yaml"
        if path.is_file():
            return path.read_text(encoding="utf-8")
    raise AssertionError(f"no recipe {name}.yaml")


def draft(request: Request) -> Draft:
    """A recipe that validates.

    Raises:
        ConfigError: the data is not for the method (the message names those it is for), or model or
            data cannot be read.
    """
    notes: list[str] = []
    dropped: list[str] = []
    records: list[Record] = []
    if request.data is None:
        name = _form(request)
    else:
        name, records, source = _fitting(request, request.data)
        # What was dropped quotes the data, which has no place in a recipe.
        first, *dropped = source.lines()
        notes.append(f"data: {first}")
    text = _Text(name)
    online = text.config.online is not None
    if request.model is not None:
        text.set("model_name_or_path", request.model)
    if request.data is not None:
        template = {}
        if request.model is not None and not load_tokenizer(text.config).chat_template:
            template = {"template": "alpaca"}
        told = ["The tokenizer has no chat template."] if template else []
        text.set_data(request.data, told, **template)
    if records:
        if online:
            _fit_rounds(text, records)
        if request.model is not None:
            notes += _fit_lengths(text, records)
        steps = _steps(text.config, len(records))
        notes += [f"steps: {steps}"] if steps else []
    if request.model is not None:
        notes += _fit_memory(text)
    command = ["fastalign", "init", request.method, *(["--online"] if request.online else [])]
    for option, value in (("--model", request.model), ("--data", request.data)):
        command += [option, value] if value is not None else []
    text.open_with([f"Written by `{shlex.join(command)}`:", *(f"  {note}" for note in notes)])
    make_method(text.config)
    return Draft(str(text), (*notes, *dropped))


# ------------------------------------------------------------------------------------------ data


def _form(request: Request) -> str:
    offline, online = FORMS[request.method]
    if request.online and online is None:
        have = ", ".join(method for method, forms in FORMS.items() if forms[1])
        raise ConfigError(f"--online: {request.method} has no recipe of that form; {have} have")
    name = online if request.online or offline is None else offline
    assert name is not None
    return name


def _fitting(request: Request, path: str) -> tuple[str, list[Record], SourceReport]:
    """(the recipe that these rows are for, the rows, what became of them)."""
    _, report = load_records([DatasetConfig(path=path)], strict=False, seed=0)
    kind = report.sources[0].kind
    offline, online = FORMS[request.method]
    if not request.online and offline is not None:
        found = _read(offline, path)
        if found is not None:
            return offline, *found
    # Every row has a prompt: where it has more, that is not passed over unasked.
    if online is not None and (request.online or kind in ("prompt", _wanted(online))):
        found = _read(online, path)
        if found is not None:
            return online, *found
    elif request.online:
        _form(request)
    fits = [
        method
        for method, (plain, sampled) in FORMS.items()
        if (plain is not None and _read(plain, path) is not None)
        or (sampled is not None and kind == _wanted(sampled))
    ]
    needs = " or ".join(_needed(name) for name in (offline, online) if name is not None)
    raise ConfigError(
        f"{path}: its rows ({kind}) are not for {request.method}, which learns from {needs}; "
        f"with these rows: {', '.join(fits) or 'no method'}"
        + (f"; {request.method} --online samples answers to their prompts" if online else "")
    )


def _wanted(name: str) -> str | None:
    method = make_method(_Text(name).config)
    return method.online_wants


def _needed(name: str) -> str:
    config = _Text(name).config
    method = make_method(config)
    wants = method.wants if config.online is None else method.online_wants
    return wants if isinstance(wants, str) else " or ".join(wants or ())


def _read(name: str, path: str) -> tuple[list[Record], SourceReport] | None:
    """The rows as a recipe's method takes them, or None where they are not for it."""
    config = _Text(name).config
    method = make_method(config)
    wants = method.wants if config.online is None else method.online_wants
    try:
        records, report = load_records(
            [DatasetConfig(path=path)], strict=False, seed=config.seed, want=wants
        )
    except ConfigError:
        return None
    return records, report.sources[0]


def _fit_rounds(text: _Text, records: Sequence[Record]) -> None:
    """No more prompts a round than there are."""
    online = text.config.online
    assert online is not None
    # Refinements are made of what has a judgment.
    refines = records[0].kind == "judged"
    count = sum(record.is_negative for record in records) if refines else len(records)
    most = max(1, count // (online.iterations or 1))
    if refines or most < online.prompts_per_iteration:
        what = "rows with a judgment" if refines else "prompts"
        text.set(
            "online.prompts_per_iteration",
            min(most, online.prompts_per_iteration) if not refines else most,
            f"Of {count:,} {what}, in {online.iterations or 'as many as it takes'} iteration(s).",
        )


def _fit_lengths(text: _Text, records: Sequence[Record]) -> Iterator[str]:
    """As long as the longest row: nothing is padded, so that room for it costs nothing."""
    config = text.config
    lengths, drops = _lengths(config, records)
    if not lengths:
        reasons = "; ".join(drops.lines())
        raise ConfigError(f"{config.datasets[0].path}: no row can be trained on: {reasons}")
    longest = max(lengths)
    context = context_length(config)
    most = min(context, config.micro_batch_tokens)
    chosen = min(-(-longest // LENGTH_STEP) * LENGTH_STEP, most)
    over = sum(length > chosen for length in lengths)
    rows = f"{len(lengths):,} rows" + (" measured" if len(records) > len(lengths) else "")
    told = f"Longest of {rows}: {longest:,} tokens"
    if config.online is not None:
        told += f", {config.max_completion_length} of them for the answer"
    if over:
        limit = "the model's context" if most == context else "micro_batch_tokens"
        told += f"; {over:,} are longer than {limit} allows"
    text.set("max_length", chosen, f"{told}.")
    middle = sorted(lengths)[len(lengths) // 2]
    yield f"lengths: median {middle:,}, longest {longest:,} tokens; max_length {chosen:,}"
    for reason, count in drops.counts.items():
        yield f"not trained on: {count:,} x {reason}"


def _lengths(config: Config, records: Sequence[Record]) -> tuple[list[int], Drops]:
    """Tokens of each row's longest stream, or of its prompt and an answer of full length."""
    tokens = Tokens(config)
    drops = Drops()
    lengths = []
    for record in records[:: max(1, len(records) // MEASURED_ROWS)]:
        try:
            if config.online is not None:
                prompt = tokens.whole.rollout_prompt(record, tokens.renderer)
                lengths.append(len(prompt) + config.max_completion_length)
            else:
                streams = tokens.streams(record, tokens.whole)
                lengths.append(max(len(ids) for _, ids, _ in streams))
        except RowError as error:
            drops.add(error.reason, str(error))
        except Dropped as reason:
            drops.add(str(reason), record.source)
    return lengths, drops


def _steps(config: Config, records: int) -> str | None:
    if config.online is not None:
        return None
    steps = -(-records * config.num_train_epochs // config.global_batch_size)
    return f"{steps:,.0f}, of {config.global_batch_size} records each"


# ---------------------------------------------------------------------------------------- memory


@dataclass(frozen=True)
class Machine:
    """Where the recipe will run: ``free`` bytes of each of ``gpus`` cards, or of the host."""

    name: str
    free: int
    gpus: int
    device: torch.device


def machine() -> Machine:
    if not torch.cuda.is_available():
        free, _ = memory()
        return Machine("CPU", free, 1, torch.device("cpu"))
    free = min(torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count()))
    name = torch.cuda.get_device_name()
    return Machine(name, free, torch.cuda.device_count(), torch.device("cuda"))


def _fit_memory(text: _Text) -> Iterator[str]:
    """Set what makes the recipe fit: first by itself, then with LoRA, then on a base in 4 bits."""
    here = machine()
    config = text.config
    dtype, why = choose_dtype(config, here.device)
    load_model_config(config)
    size = weight_bytes(config, dtype)
    said = str(dtype).removeprefix("torch.")
    text.set("dtype", "auto", f"On this machine {said}: {why}.")
    yield (
        f"model: {size / dtype.itemsize / 1e6:,.1f} million parameters, {size / GIB:.2f} GiB in "
        f"{said}"
    )
    yield f"machine: {here.gpus} x {here.name}, {here.free / GIB:.1f} GiB free"
    _check_targets(text)
    tried = [*_attempts(text.config)]
    for keys, comment in tried:
        changes = _settings_that_fit(text.config, keys, here, dtype)
        if changes is None:
            continue
        needed, overrides = changes
        for key, value in keys.items():
            text.set(key, value, comment if key == next(iter(keys)) else None)
        for override in overrides:
            key, _, value = override.partition("=")
            _override(text, key, yaml.safe_load(value), "So that it fits the memory that is free.")
        stage = text.config.zero_stage
        yield (
            f"memory: about {needed / GIB:.1f} GiB on each device"
            + (f", ZeRO {stage}" if stage != "auto" else "")
            + (f" ({'; '.join(overrides)})" if overrides else "")
        )
        return
    keys, comment = tried[-1]
    for key, value in keys.items():
        text.set(key, value, comment if key == next(iter(keys)) else None)
    yield (
        "memory: does not fit here, whatever is set; fastalign train RECIPE --dry-run --gpus N "
        "--gpu NAME says what would"
    )


def _check_targets(text: _Text) -> None:
    """The published layers are those of a Llama; another model may name its own otherwise."""
    config = text.config
    if not config.use_peft or isinstance(config.lora_target_modules, str):
        return
    from fastalign.footprint import Footprint

    try:
        Footprint(config, torch.bfloat16)
    except ConfigError as error:
        if "lora_target_modules" not in str(error):
            raise
        named = ", ".join(config.lora_target_modules)
        text.set("lora_target_modules", "all-linear", f"This model has no {named}.")


def _attempts(config: Config) -> Iterator[tuple[dict[str, Any], str]]:
    """Settings, the recipe's own first, and what to say of them."""
    yield {}, ""
    lora: dict[str, Any] = {}
    if not config.use_peft:
        rate = float(f"{config.learning_rate * LORA_FASTER:.3g}")
        lora = LORA | {"learning_rate": rate}
        yield lora, "All weights do not fit the memory; LoRA wants about ten times their rate."
    embedded = config.online is None or config.rollout.engine != "server"
    if importlib.util.find_spec("bitsandbytes") is not None and embedded:
        yield lora | {"load_in_4bit": True}, "QLoRA: the weights do not fit in 16 bits."


def _settings_that_fit(
    config: Config, keys: dict[str, Any], here: Machine, dtype: torch.dtype
) -> tuple[int, tuple[str, ...]] | None:
    """(bytes on each device, overrides that lead to them), or None where nothing fits."""
    planned = config.model_dump(mode="json", by_alias=True, exclude_unset=True) | keys
    planned["dtype"] = str(dtype).removeprefix("torch.")
    if config.online is not None and here.device.type == "cpu":
        # There vLLM takes what it needs and no share of the memory.
        planned["rollout"] = {"engine": "hf"}
    planner = Planner(parse_config(planned, "recipe"), (here.name, here.free))
    advice = advise(planner, here.gpus)
    if advice.plan.fits:
        return advice.plan.needed, ()
    for change in advice.changes[-1:]:
        # The host is what there is on a CPU.
        elsewhere = change.host and here.device.type == "cpu"
        if change.fits and change.gpus == here.gpus and not elsewhere:
            return change.needed, change.settings
    return None


def _override(text: _Text, key: str, value: Any, comment: str) -> None:
    section, _, name = key.partition(".")
    if not name:
        text.set(section, value, comment)
        return
    # Sections that the published recipes leave out come whole.
    tree = value
    for part in reversed(name.split(".")):
        tree = {part: tree}
    present = yaml.safe_load(str(text)).get(section)
    if present is not None:
        tree = _joined(present, tree)
        text.lines = re.sub(rf"(?m)^{section}:.*\n(?:  .*\n)*", "", str(text)).splitlines()
    block = yaml.safe_dump({section: tree}, sort_keys=False).splitlines()
    text.lines += ["", f"# {comment}", *block]


def _joined(left: Any, right: Any) -> Any:
    if not (isinstance(left, dict) and isinstance(right, dict)):
        return right
    return left | {key: _joined(left.get(key), value) for key, value in right.items()}


def _yaml(value: Any) -> str:
    """A value on one line; numbers as YAML reads them back (1.0e-05)."""
    dumped: str = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6)
    return dumped.removesuffix("\n").removesuffix("\n...")
