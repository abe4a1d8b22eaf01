"""``fastalign export``: a result as a plain model, an adapter being merged into its base.

The sum is made in float32.  What counts is how much of it is left in the dtype that is written: a
bfloat16 has 8 bits for its digits, and an update smaller than half a unit of the last one is gone.
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
        base: model to merge into; None: the one that the adapter names.
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
        base: that an adapter was merged into; None: the run holds whole weights.
        lost: share of the update that the dtype loses; None without an update.
        worst: name of the matrix that loses most, and its share.
        quantised: the adapter was trained on its base in NF4.
    """

    dtype: str
    base: str | None = None
    lost: float | None = None
    worst: tuple[str, float] | None = None
    quantised: bool = False

    def lines(self) -> list[str]:
        if self.base is None:
            return [f"whole weights in {self.dtype}"]
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
    if settings.base is not None:
        raise ConfigError(f"--base {settings.base}: {source} holds whole weights, no adapter")
    model, dtype = _load(settings, str(source))
    return _cast(model, dtype), Exported(dtype), str(source)


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
    if lost is not None and lost > settings.max_loss:
        raise ConfigError(
            f"--dtype {dtype} loses {lost:.1%} of what {source} has learnt (of {worst[0]} "
            f"{worst[1]:.1%}), more than --max-loss {settings.max_loss:g}: its steps are finer "
            "than that dtype's; write --dtype float32, or use the adapter as it is"
        )
    # They are merged: what is left is to take the adapters out.
    plain: Any = adapted.unload()
    exported = Exported(dtype, base, lost, worst, trained_on_nf4(str(source)))
    has_tokenizer = (source / "tokenizer_config.json").is_file()
    return _cast(plain, dtype), exported, str(source) if has_tokenizer else base


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
    try:
        recipe = json.loads((source / "run.json").read_text(encoding="utf-8"))["recipe"]
        revision: str | None = recipe["model_revision"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return revision


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


@torch.no_grad()
def _merge(adapted: PeftModel, dtype: torch.dtype) -> tuple[float | None, Any]:
    """Merge layer by layer; (share of the update that the dtype loses, the worst matrix and its
    share), or None and None where nothing changes.

    With an update d of weights w and c(x) for x in the dtype, what arrives is c(w + d) - c(w), and
    what is lost is what is missing along d: 1 - <c(w + d) - c(w), d> / <d, d>.
    """
    kept = squared = 0.0
    worst: tuple[str, float] | None = None
    for name, layer in _layers(adapted):
        plain = layer.get_base_layer()
        before = {key: value.detach().clone() for key, value in plain.named_parameters()}
        try:
            layer.merge(safe_merge=True)
        except ValueError as error:
            raise ConfigError(f"{name}: {_line(error)}") from None
        for key, value in plain.named_parameters():
            update = (value - before[key]).double()
            arrived = value.to(dtype).double() - before[key].to(dtype).double()
            along, size = float((arrived * update).sum()), float(update.square().sum())
            if size == 0.0:
                continue
            kept, squared = kept + along, squared + size
            if worst is None or 1 - along / size > worst[1]:
                worst = f"{name}.{key}", 1 - along / size
    # Rounding may also add a little along it.
    return (max(0.0, 1 - kept / squared), worst) if squared else (None, None)


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
