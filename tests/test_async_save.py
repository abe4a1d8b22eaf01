"""Checkpoints that are written behind the training: what they hold, and what a run does that ends,
is killed or goes on meanwhile."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import TESTS, late_writes, outside_environment, recipe, run_ranks
from test_train import LORA, logged, result

import fastalign.train as loop
from fastalign import checkpoint
from fastalign.cli import main
from fastalign.config import Config, ConfigError, dump_config, parse_config
from fastalign.model import init_distributed
from fastalign.writer import HostMemory, Writer

# Behind fastalign.model, which prepares the environment that DeepSpeed reads when imported.
from deepspeed.runtime.zero.partition_parameters import Init  # isort: skip

pytestmark = pytest.mark.usefixtures("quiet_process")

KINDS = {
    "full-0": {"zero_stage": 0},
    "full-1": {"zero_stage": 1, "dtype": "bfloat16"},
    "full-3": {"zero_stage": 3},
    "lora-0": {"zero_stage": 0, **LORA},
    "lora-2": {"zero_stage": 2, "dtype": "bfloat16", "lora_dropout": 0.2, **LORA},
    "lora-3": {"zero_stage": 3, "dtype": "bfloat16", **LORA},
}


def pair(model: Path, folder: Path, **keys: Any) -> tuple[Config, Config]:
    """Five steps with checkpoints at 2 and 4, written at once and behind the training."""
    keys = {"save_steps": 2, "max_steps": 5, "num_train_epochs": 2.0} | keys
    at_once = recipe("sft", model, folder, output_dir=str(folder / "at-once"), **keys)
    return at_once, at_once.model_copy(
        update={"output_dir": str(folder / "behind"), "async_save": True}
    )


def hashes(config: Config, step: int) -> dict[str, str]:
    """Of a checkpoint's files, without those that tell of the run itself or of seconds."""
    path = Path(config.output_dir, f"checkpoint-{step}", "manifest.json")
    files: dict[str, str] = json.loads(path.read_text())["files"]
    assert all(f"manifest-{rank}.json" not in files for rank in range(2))
    return {k: v for k, v in files.items() if k not in ("recipe.yaml", "position.json")}


def where(config: Config, step: int) -> dict[str, Any]:
    path = Path(config.output_dir, f"checkpoint-{step}", "position.json")
    return {k: v for k, v in json.loads(path.read_text()).items() if k != "logged"}


def same(left: Config, right: Config) -> bool:
    expected, found = result(left), result(right)
    return all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_late_is_what_there_was_at_the_step(
    tiny_llama, tmp_path, monkeypatch, kind
):
    """Byte for byte, though the next step was made before a single file was begun."""
    at_once, behind = pair(tiny_llama, tmp_path, **KINDS[kind])
    # DeepSpeed counts the parameters of a process, and keeps their numbers.
    monkeypatch.setattr(Init, "param_id", 0)
    loop.train(at_once)
    monkeypatch.setattr(Init, "param_id", 0)
    with late_writes() as written:
        loop.train(behind)
    assert [name for name, _ in written] == [".checkpoint-2.partial", ".checkpoint-4.partial"]
    for step, (_, made) in zip((2, 4), written, strict=True):
        assert made > step
        assert hashes(behind, step) == hashes(at_once, step) and hashes(behind, step)
        assert where(behind, step) == where(at_once, step)
    assert same(at_once, behind)


@pytest.mark.slow
def test_two_ranks_write_behind_the_training(tiny_llama, tmp_path):
    """Of which one has a slow disk: the other one waits with the name."""
    specs, pairs = {}, {}
    for kind in ("lora-2", "full-3"):
        pairs[kind] = pair(tiny_llama, tmp_path / kind, **KINDS[kind])
        for name, config in zip(("at-once", "behind"), pairs[kind], strict=True):
            tree = config.model_dump(mode="json", by_alias=True)
            specs[f"{kind}-{name}"] = {"do": "late", "recipe": tree}
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(specs))
    log = tmp_path / "log"
    assert run_ranks(TESTS / "distributed_worker.py", path, log=log) == [0, 0], log.read_text()
    for kind, (at_once, behind) in pairs.items():
        written = json.loads((tmp_path / f"{kind}-behind-1").read_text())
        for step, (name, made) in zip((2, 4), written, strict=True):
            assert name == f".checkpoint-{step}.partial" and made > step
            assert hashes(behind, step) == hashes(at_once, step)
            assert where(behind, step) == where(at_once, step)
        assert same(at_once, behind)


def test_one_is_written_at_a_time_and_replaces_none_before(tiny_llama, tmp_path, monkeypatch):
    """The disk is so slow that each next checkpoint, and the end, has to wait."""
    config = recipe("sft", tiny_llama, tmp_path, save_steps=1, save_total_limit=1, async_save=True)
    out = Path(config.output_dir)
    there: list[tuple[str, list[str]]] = []

    def watch(name: str) -> None:
        original = getattr(checkpoint, name)

        def watched(*arguments: Any) -> Any:
            there.append((name, [p.name for p in checkpoint.checkpoints(out)]))
            return original(*arguments)

        monkeypatch.setattr(checkpoint, name, watched)

    for name in ("_make_room", "_publish", "forget_old"):
        watch(name)
    # Done before somebody waits is nothing.
    monkeypatch.setattr(Writer, "done", False)
    loop.train(config)
    one, two, three = ([f"checkpoint-{step}"] for step in (1, 2, 3))
    assert there == [
        ("_make_room", []), ("_publish", []), ("forget_old", one),
        ("_make_room", one), ("_publish", one), ("forget_old", one + two),
        ("_make_room", two), ("_publish", two), ("forget_old", two + three),
    ]  # fmt: skip
    assert [p.name for p in checkpoint.checkpoints(out)] == three
    assert not list(out.glob(".checkpoint-*"))


def test_a_signal_while_one_is_written_leaves_both(tiny_llama, tmp_path, monkeypatch, capfd):
    whole, config = pair(tiny_llama, tmp_path)
    loop.train(whole)
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_config(config))
    with monkeypatch.context() as patch, late_writes() as written:
        update, steps = loop.update, 0

        def signalled(*arguments: Any) -> dict[str, float]:
            nonlocal steps
            steps += 1
            if steps == 3:
                assert not checkpoint.checkpoints(Path(config.output_dir))
                os.kill(os.getpid(), signal.SIGTERM)
            return update(*arguments)

        patch.setattr(loop, "update", signalled)
        assert main(["train", str(path)]) == 75
    assert [name for name, _ in written] == [".checkpoint-2.partial"]
    out = Path(config.output_dir)
    assert f"paused: SIGTERM; {out}/checkpoint-3 is saved" in capfd.readouterr().err
    assert checkpoint.checkpoints(out) == [out / "checkpoint-2", out / "checkpoint-3"]
    assert hashes(config, 2) == hashes(whole, 2)
    assert main(["train", str(path), "--resume"]) == 0
    assert same(whole, config)


# What is killed in the third update, while the second checkpoint waits for its end.
KILLED = """
import os, signal, sys
import torch
import fastalign.train as loop
from fastalign.cli import main
from support import late_writes

torch.set_num_threads(1)
with late_writes():
    update, steps = loop.update, 0

    def deadly(*arguments):
        global steps
        steps += 1
        if steps == 3:
            assert os.path.isdir(f"{sys.argv[2]}/.checkpoint-2.partial/state")
            os.kill(os.getpid(), signal.SIGKILL)
        return update(*arguments)

    loop.update = deadly
    main(["train", sys.argv[1]])
"""


def test_a_kill_while_one_is_written_leaves_the_one_before(tiny_llama, tmp_path, capfd):
    whole, config = pair(tiny_llama, tmp_path, save_steps=1, save_total_limit=1)
    loop.train(whole)
    path, out = tmp_path / "recipe.yaml", Path(config.output_dir)
    path.write_text(dump_config(config))
    done = subprocess.run(
        [sys.executable, "-c", KILLED, path, out],
        env=outside_environment(PYTHONPATH=f"{TESTS}:{os.environ.get('PYTHONPATH', '')}"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (out / ".checkpoint-2.partial").is_dir()
    assert main(["train", str(path), "--resume"]) == 0
    assert f"resumed from {out}/checkpoint-1 at step 1" in capfd.readouterr().err
    assert same(whole, config)
    assert [x["loss"] for x in logged(config, "loss")] == [x["loss"] for x in logged(whole, "loss")]
    assert hashes(config, 5) == hashes(whole, 5)
    assert [p.name for p in out.glob("*checkpoint-*")] == ["checkpoint-5"]


def test_whoever_resumes_gives_it_the_name_that_an_error_left_it_without(
    tiny_llama, tmp_path, monkeypatch, capfd
):
    """The run ends in the next update: where several ranks train, the others know nothing of it."""
    whole, config = pair(tiny_llama, tmp_path)
    loop.train(whole)
    with monkeypatch.context() as patch:
        update, steps = loop.update, 0

        def failing(*arguments: Any) -> dict[str, float]:
            nonlocal steps
            steps += 1
            if steps == 3:
                raise MemoryError
            return update(*arguments)

        patch.setattr(loop, "update", failing)
        with pytest.raises(MemoryError):
            loop.train(config)
    out = Path(config.output_dir)
    assert [p.name for p in out.glob("*checkpoint-*")] == [".checkpoint-2.partial"]
    with pytest.raises(ConfigError, match=r"holds \.checkpoint-2\.partial of an earlier run"):
        loop.train(config)
    # Without the hashes of all ranks it is nothing.
    shutil.copytree(out, tmp_path / "less")
    (tmp_path / "less/.checkpoint-2.partial/manifest-0.json").unlink()
    less = config.model_copy(
        update={"output_dir": str(tmp_path / "less"), "resume_from_checkpoint": True}
    )
    init_distributed(timeout_s=300.0)
    assert checkpoint.find_checkpoint(less) == (None, [])
    assert not list((tmp_path / "less").glob(".checkpoint-*"))
    loop.train(config.model_copy(update={"resume_from_checkpoint": True}))
    assert f"resumed from {out}/checkpoint-2 at step 2" in capfd.readouterr().err
    assert hashes(config, 2) == hashes(whole, 2)
    assert same(whole, config)


def test_copies_share_what_is_shared_and_use_memory_again():
    memory = HostMemory()
    base = torch.arange(6.0)
    state = {
        "whole": base,
        "part": base.view(2, 3)[:, 1],
        "again": [base],
        "step": 1,
        "half": torch.ones(3, dtype=torch.bfloat16),
    }
    memory.reuse()
    first = memory.copy(state)
    base += 1
    state["step"] = 2
    assert first["whole"].tolist() == [0, 1, 2, 3, 4, 5] and first["step"] == 1
    assert first["again"][0] is first["whole"]
    assert first["part"].tolist() == [1, 4] and first["part"].stride() == (3,)
    shared = {first[name].untyped_storage().data_ptr() for name in ("whole", "part")}
    assert len(shared) == 1 and first["half"].dtype == torch.bfloat16
    memory.reuse()
    second = memory.copy(state)
    assert second["whole"].data_ptr() == first["whole"].data_ptr()
    assert second["whole"].tolist() == [1, 2, 3, 4, 5, 6]


def test_the_copy_is_as_large_as_is_said(tiny_llama, tmp_path, monkeypatch, capfd):
    runs, original = [], checkpoint.finish_checkpoint

    def finish(run: Any) -> None:
        runs.append(run)
        original(run)

    monkeypatch.setattr(checkpoint, "finish_checkpoint", finish)
    for keys in ({}, {"zero_stage": 2, "dtype": "bfloat16"}, {"zero_stage": 3}, LORA):
        folder = tmp_path / str(len(runs))
        loop.train(
            recipe("sft", tiny_llama, folder, async_save=True, save_steps=1, max_steps=1, **keys)
        )
        held = sum(buffer.nbytes() for buffer in runs[-1].host_memory._buffers)
        said = checkpoint.bytes_to_come(runs[-1].model)
        assert held == pytest.approx(said, rel=0.1), keys
        line = f"saving      behind the training (from a copy of {said / 2**20:,.0f} MiB in the"
        assert line in capfd.readouterr().err


def test_the_key_needs_checkpoints(tiny_llama, tmp_path):
    tree = recipe("sft", tiny_llama, tmp_path).model_dump(mode="json", by_alias=True)
    with pytest.raises(ConfigError, match="async_save needs save_steps"):
        parse_config(tree | {"async_save": True})
