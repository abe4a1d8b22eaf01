"""``fastalign export``: a result as a plain model, an adapter being merged into its base.

The sum is made in float32.  What counts is how much of it is left in the dtype that is written: a
bfloat16 has 8 bits for its digits, and an update smaller than half a unit of the last one is gone.
Whole weights that are rounded are held to the same, against the model that they were trained from.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from fastalign import __version__
from fastalign.config import ConfigError, ModelConfig
from fastalign.footprint import load_model_config
from fastalign.model import adapter_config, trained_on_nf4

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_LOSS = 0.05
ADAPTER, WEIGHTS = "default", "adapter_model.safetensors"


class PushError(Exception):
    """The hub was not reached, or did not take it; one line."""


@dataclass(frozen=True)
class Settings:
    """What is exported, and how.

    Attributes:
        source: folder of a run, or of an adapter.
        out: folder that is made.
        base: model to merge into, or that whole weights were trained from; None: the one that the
            adapter or the run names.
        dtype: key of DTYPES, or "auto": as the base is stored.
        max_loss: most of the update that the dtype may lose.
    """

    source: str
    out: Path
    base: str | None = None
    dtype: str = "auto"
    max_loss: float = MAX_LOSS
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        base: that an adapter was merged into, or that rounded whole weights were compared with.
        lost: share of the update that the dtype loses; None without an update.
        worst: name of the matrix that loses most, and its share.
        quantised: the adapter was trained on its base in NF4.
        rounded: share of the numbers of whole weights that the dtype does not hold as they are;
            None: an adapter was merged.
    """

    dtype: str
    base: str | None = None
    lost: float | None = None
    worst: tuple[str, float] | None = None
    quantised: bool = False
    rounded: float | None = None

    def lines(self) -> list[str]:
        if self.rounded is not None:
            return [self._whole(self.rounded)]
        if self.lost is None or self.worst is None:
            return [f"the adapter changes nothing: this is {self.base} in {self.dtype}"]
        lines = [
            f"merged into {self.base} in float32; {self.dtype} loses {self.lost:.2%} of the "
            f"update, of {self.worst[0]} {self.worst[1]:.2%}"
        ]
        if self.quantised:
            lines.append(
                f"the adapter was trained on {self.base} in NF4 (QLoRA) and now lies on its full "
                "weights: the error of 4 bits that it has learnt to live with is gone, so that "
                "this is not quite the model that was trained"
            )
        return lines

    def _whole(self, rounded: float) -> str:
        line = f"whole weights in {self.dtype}"
        if rounded == 0.0:
            return f"{line}, every number as it was"
        line += f", which rounds {rounded:.1%} of the numbers"
        if self.base is None:
            return f"{line}; what that loses of the training was not measured"
        if self.lost is None or self.worst is None:
            return f"{line}; they are those of {self.base}"
        return (
            f"{line} and loses {self.lost:.2%} of the update of {self.base}, of {self.worst[0]} "
            f"{self.worst[1]:.2%}"
        )


def export(settings: Settings) -> Exported:
    """Write a model that transformers and vLLM load as it is; nothing is left where that fails.

    Raises:
        ConfigError: there is no such result, base or adapter, the folder is taken, or the dtype
            would lose more than it may.
    """
    source = Path(settings.source)
    if settings.out.exists() and (not settings.out.is_dir() or any(settings.out.iterdir())):
        raise ConfigError(f"{settings.out}: is there already; name another folder")
    if not source.is_dir():
        raise ConfigError(f"{source}: no such folder")
    with _aside(settings.out) as folder:
        if (source / "adapter_config.json").is_file():
            model, exported, tokens = _merged(settings, source)
        elif (source / "config.json").is_file():
            model, exported, tokens = _whole(settings, source)
        else:
            raise ConfigError(
                f"{source}: holds neither a model (config.json) nor an adapter "
                "(adapter_config.json); a run has them when it is done"
            )
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(tokens).save_pretrained(folder)
        (folder / "README.md").write_text(_card(settings, exported, source), encoding="utf-8")
        if (source / "run.json").is_file():
            shutil.copy(source / "run.json", folder)
    return exported


@contextlib.contextmanager
def _aside(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` that takes its name when all is written."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written: {error.strerror}") from None
    try:
        yield aside
        aside.chmod(0o777 & ~_umask())
        if out.exists():
            out.rmdir()
        aside.rename(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _whole(settings: Settings, source: Path) -> tuple[PreTrainedModel, Exported, str]:
    model, dtype = _load(settings, str(source))
    rounded = _rounded(model, DTYPES[dtype])
    if rounded == 0.0:
        if settings.base is not None:
            raise ConfigError(
                f"--base {settings.base}: {source} holds whole weights, no adapter, and {dtype} "
                "holds all of their numbers: there is nothing to compare; leave it out"
            )
        return _cast(model, dtype), Exported(dtype, rounded=rounded), str(source)
    base, loss = _start(settings, source), _Loss(DTYPES[dtype])
    if base is not None:
        before = dict(base[1].named_parameters())
        for name, parameter in model.named_parameters():
            if name not in before or before[name].shape != parameter.shape:
                raise ConfigError(f"{source}: was not trained from {base[0]}: {name} differs")
            loss.add(name, before.pop(name), parameter)
    elif settings.max_loss < 1:
        raise ConfigError(
            f"--dtype {dtype} rounds {rounded:.1%} of the numbers of {source}, and the model that "
            "it was trained from is not there to tell what that loses: name it with --base, write "
            "--dtype float32, or accept any loss with --max-loss 1"
        )
    lost, worst = loss.result()
    _check_loss(settings, dtype, source, lost, worst)
    exported = Exported(dtype, base[0] if base else None, lost, worst, rounded=rounded)
    return _cast(model, dtype), exported, str(source)


def _start(settings: Settings, source: Path) -> tuple[str, PreTrainedModel] | None:
    """What whole weights were trained from: its name, and it in float32; None: nobody knows."""
    if settings.base is not None:
        return settings.base, _load(settings, settings.base)[0]
    name = _recipe(source).get("model_name_or_path")
    if name is None:
        return None
    try:
        return name, _load(settings, name, _revision(source))[0]
    except ConfigError:
        # It was moved, or the hub is not reached.
        return None


@torch.no_grad()
def _rounded(model: PreTrainedModel, dtype: torch.dtype) -> float:
    """Share of its numbers that the dtype does not hold."""
    changed = total = 0
    for parameter in model.parameters():
        changed += int((parameter.to(dtype).to(parameter.dtype) != parameter).sum())
        total += parameter.numel()
    return changed / total


def _merged(settings: Settings, source: Path) -> tuple[PreTrainedModel, Exported, str]:
    held = adapter_config(str(source))
    base = settings.base or held.base_model_name_or_path
    if not base:
        raise ConfigError(f"{source}: names no base; say which with --base")
    if not (source / WEIGHTS).is_file():
        raise ConfigError(f"{source}: has no {WEIGHTS}")
    model, dtype = _load(settings, base, _revision(source) if settings.base is None else None)
    adapted = _adapt(model, source, base)
    lost, worst = _merge(adapted, DTYPES[dtype])
    _check_loss(settings, dtype, source, lost, worst, ", or use the adapter as it is")
    # They are merged: what is left is to take the adapters out.
    plain: Any = adapted.unload()
    exported = Exported(dtype, base, lost, worst, trained_on_nf4(str(source)))
    has_tokenizer = (source / "tokenizer_config.json").is_file()
    return _cast(plain, dtype), exported, str(source) if has_tokenizer else base


def _check_loss(
    settings: Settings,
    dtype: str,
    source: Path,
    lost: float | None,
    worst: tuple[str, float] | None,
    otherwise: str = "",
) -> None:
    if lost is not None and worst is not None and lost > settings.max_loss:
        raise ConfigError(
            f"--dtype {dtype} loses {lost:.1%} of what {source} has learnt (of {worst[0]} "
            f"{worst[1]:.1%}), more than --max-loss {settings.max_loss:g}: its steps are finer "
            f"than that dtype's; write --dtype float32{otherwise}"
        )


def _load(
    settings: Settings, name: str, revision: str | None = None
) -> tuple[PreTrainedModel, str]:
    """(the model in float32, the dtype that is to be written)."""
    where = ModelConfig(
        model_name_or_path=name,
        model_revision=revision,
        trust_remote_code=settings.trust_remote_code,
    )
    config = load_model_config(where)
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(
            f"{name}: is quantised, and what is merged into it would be rounded to its few bits; "
            "name the model that it was made from with --base"
        )
    stored = str(getattr(config, "dtype", None) or torch.float32).removeprefix("torch.")
    dtype = stored if settings.dtype == "auto" else settings.dtype
    if dtype not in DTYPES:
        raise ConfigError(f"{name}: is stored in {dtype}; say --dtype {', '.join(DTYPES)}")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name,
            revision=revision,
            dtype=torch.float32,
            trust_remote_code=settings.trust_remote_code,
        )
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"{name}: {_line(error)}") from None
    return model.eval(), dtype


def _revision(source: Path) -> str | None:
    """Of the base, as the run had it."""
    revision: str | None = _recipe(source).get("model_revision")
    return revision


def _recipe(source: Path) -> dict[str, Any]:
    """Of the run; empty where the folder is no run's."""
    try:
        recipe = json.loads((source / "run.json").read_text(encoding="utf-8"))["recipe"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return recipe if isinstance(recipe, dict) else {}


def _adapt(model: PreTrainedModel, source: Path, base: str) -> PeftModel:
    try:
        adapted = PeftModel.from_pretrained(model, str(source), adapter_name=ADAPTER)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{source}: does not fit {base}: {_line(error)}") from None
    with safe_open(source / WEIGHTS, framework="pt") as tensors:
        stored = set(tensors.keys())
    loaded = set(get_peft_model_state_dict(adapted, adapter_name=ADAPTER))
    if stored != loaded:
        # PEFT only warns.
        name = sorted(stored ^ loaded)[0]
        raise ConfigError(f"{source}: does not fit {base}: {name} is in one of them alone")
    tied = {id(model.get_input_embeddings().weight)}
    if id(model.get_output_embeddings().weight) in tied:
        for name, layer in _layers(adapted):
            if id(getattr(layer.get_base_layer(), "weight", None)) in tied:
                raise ConfigError(
                    f"{source}: adapts {name}, whose weights are embeddings and LM head at once: "
                    "no plain model is the same; use the adapter as it is"
                )
    return adapted


def _layers(adapted: PeftModel) -> Iterator[tuple[str, Any]]:
    for name, module in adapted.get_base_model().named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module


class _Loss:
    """What a dtype loses of an update.

    With an update d of weights w and c(x) for x in the dtype, what arrives is c(w + d) - c(w), and
    what is lost is what is missing along d: 1 - <c(w + d) - c(w), d> / <d, d>.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._kept = self._squared = 0.0
        self._worst: tuple[str, float] | None = None

    @torch.no_grad()
    def add(self, name: str, before: torch.Tensor, after: torch.Tensor) -> None:
        update = (after - before).double()
        arrived = after.to(self._dtype).double() - before.to(self._dtype).double()
        along, size = float((arrived * update).sum()), float(update.square().sum())
        if size == 0.0:
            return
        self._kept, self._squared = self._kept + along, self._squared + size
        if self._worst is None or 1 - along / size > self._worst[1]:
            self._worst = name, 1 - along / size

    def result(self) -> tuple[float | None, tuple[str, float] | None]:
        """(share that is lost, the worst tensor and its share); None and None without an update."""
        if not self._squared:
            return None, None
        # Rounding may also add a little along it.
        return max(0.0, 1 - self._kept / self._squared), self._worst


@torch.no_grad()
def _merge(adapted: PeftModel, dtype: torch.dtype) -> tuple[float | None, tuple[str, float] | None]:
    """Merge layer by layer; what the dtype loses of it, as :meth:`_Loss.result` says it."""
    loss = _Loss(dtype)
    for name, layer in _layers(adapted):
        plain = layer.get_base_layer()
        before = {key: value.detach().clone() for key, value in plain.named_parameters()}
        try:
            layer.merge(safe_merge=True)
        except ValueError as error:
            raise ConfigError(f"{name}: {_line(error)}") from None
        for key, value in plain.named_parameters():
            loss.add(f"{name}.{key}", before[key], value)
    return loss.result()


def _cast(model: PreTrainedModel, dtype: str) -> PreTrainedModel:
    model.to(DTYPES[dtype])
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise ConfigError(f"--dtype {dtype}: {name} has numbers that it cannot hold")
    return model


def _card(settings: Settings, exported: Exported, source: Path) -> str:
    """The run's own card, with what became of it in front."""
    card = source / "README.md"
    lines = card.read_text(encoding="utf-8").splitlines() if card.is_file() else []
    header: list[str] = []
    if lines[:1] == ["---"] and "---" in lines[1:]:
        end = lines.index("---", 1)
        header, lines = lines[1:end], lines[end + 1 :]
    header = [line for line in header if not line.startswith(("library_name:", "base_model:"))]
    if exported.base is not None and not Path(exported.base).exists():
        header.append(f"base_model: {exported.base}")
    told = [f"Exported by FastAlign {__version__} from `{source.name}`: {exported.lines()[0]}."]
    told += [f"{line[0].upper()}{line[1:]}." for line in exported.lines()[1:]]
    title = [] if lines else ["", f"# {settings.out.name}"]
    return "\n".join(
        ["---", "library_name: transformers", *header, "---", *title, "", *told, *lines, ""]
    )


def check_push(repository: str) -> None:
    """Before anything is spent: whether the hub is there and knows the user.

    Raises:
        ConfigError: no such name can be.
        PushError: it is not.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ConfigError(f"--push-to-hub {repository}: {_line(error)}") from None
    with _pushing(repository):
        HfApi().whoami()


def push(folder: Path, repository: str, *, private: bool) -> str:
    """Upload a folder; its address.

    Raises:
        PushError: the hub is not reached, or refuses.
    """
    from huggingface_hub import HfApi

    with _pushing(repository):
        api = HfApi()
        made = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=made.repo_id, folder_path=folder)
    return str(made)


@contextlib.contextmanager
def _pushing(repository: str) -> Iterator[None]:
    try:
        yield
    # The library's errors and those of its HTTP client have nothing in common but this.
    except Exception as error:
        raise PushError(f"--push-to-hub {repository}: {_line(error)}") from None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
