"""Checkpoints that a disk damages, fills up or refuses, and what a resumed run makes of them."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import TESTS, distance, recipe, rows, run_ranks, saved_again, write_rows
from test_train import LORA, logged, result

from fastalign import checkpoint
from fastalign.cli import main
from fastalign.config import Config, ConfigError, dump_config
from fastalign.model import init_distributed
from fastalign.train import train

pytestmark = pytest.mark.usefixtures("quiet_process")

RESUME = {"resume_from_checkpoint": True}


@pytest.fixture(scope="module")
def finished(tiny_llama, tmp_path_factory) -> Config:
    """A finished run with checkpoints at 1 to 3, all kept."""
    before, threads = dict(os.environ), torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("finished")
    config = recipe("sft", tiny_llama, folder, save_steps=1, save_total_limit=3)
    train(config)
    os.environ.clear()
    os.environ.update(before)
    torch.set_num_threads(threads)
    return config


def copy_of(config: Config, folder: Path) -> Config:
    """The same run in another folder, to resume."""
    shutil.copytree(config.output_dir, folder)
    return config.model_copy(update={"output_dir": str(folder)} | RESUME)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_in_any_file_is_found_and_named(finished, tmp_path):
    init_distributed(timeout_s=300.0)
    config = copy_of(finished, tmp_path / "out")
    last = Path(config.output_dir, "checkpoint-3")
    names = sorted(p.relative_to(last).as_posix() for p in last.rglob("*") if p.is_file())
    assert {
        "identity.json", "layout.json", "manifest.json", "position.json",
        "random-0.safetensors", "recipe.yaml", "state/mp_rank_00_model_states.pt",
    } <= set(names)  # fmt: skip
    assert checkpoint.find_checkpoint(config) == (last, [])
    for name in names:
        before = (last / name).read_bytes()
        flip(last / name)
        path, (line,) = checkpoint.find_checkpoint(config)
        assert path == last.with_name("checkpoint-2")
        assert line == f"skipped {last}: damaged: {name} is not as it was written"
        (last / name).write_bytes(before)
    (last / "layout.json").unlink()
    assert "damaged: layout.json is missing" in checkpoint.find_checkpoint(config)[1][0]


def test_a_run_goes_on_from_the_newest_whole_checkpoint(finished, tmp_path, capfd):
    config = copy_of(finished, tmp_path / "out")
    out = Path(config.output_dir)
    flip(out / "checkpoint-3/state/mp_rank_00_model_states.pt")
    train(config)
    said = capfd.readouterr().err
    assert f"skipped {out}/checkpoint-3: damaged: state/mp_rank_00_model_states.pt" in said
    assert f"resumed from {out}/checkpoint-2 at step 2" in said
    expected, resumed = result(finished), result(config)
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    # It was written again.
    assert checkpoint.find_checkpoint(config) == (out / "checkpoint-3", [])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage_goes_on_bitwise(tiny_llama, tmp_path, stage, dtype):
    """Full weights in fp32, an adapter in bf16."""
    keys = {"zero_stage": stage, "dtype": dtype, "save_steps": 2}
    whole = recipe("sft", tiny_llama, tmp_path, **(keys | LORA if dtype == "bfloat16" else keys))
    train(whole)
    # The checkpoint at 2 of 3 steps, without what was written after it.
    config = whole.model_copy(update={"output_dir": str(tmp_path / "resumed")} | RESUME)
    shutil.copytree(Path(whole.output_dir, "checkpoint-2"), tmp_path / "resumed/checkpoint-2")
    train(config)
    expected, resumed = result(whole), result(config)
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)


def test_damage_that_leaves_nothing_is_an_error(finished, tmp_path):
    config = copy_of(finished, tmp_path / "out")
    for path in checkpoint.checkpoints(Path(config.output_dir)):
        flip(path / "position.json")
    # Not from the beginning, as if there had been nothing.
    with pytest.raises(ConfigError, match=r"no checkpoint is whole: (.*position.json.*){3}$"):
        train(config)
    named = {"resume_from_checkpoint": f"{config.output_dir}/checkpoint-2"}
    with pytest.raises(ConfigError, match=r"damaged: position\.json is not as it was written"):
        train(config.model_copy(update=named))


def test_a_checkpoint_that_was_being_replaced_comes_back(finished, tmp_path):
    init_distributed(timeout_s=300.0)
    config = copy_of(finished, tmp_path / "out")
    out = Path(config.output_dir)
    (out / "checkpoint-3").rename(out / ".checkpoint-3.old")
    fresh = config.model_copy(update={"resume_from_checkpoint": False})
    with pytest.raises(ConfigError, match="of an earlier run"):
        checkpoint.find_checkpoint(fresh)
    shutil.copytree(out / "checkpoint-2", out / ".checkpoint-2.old")
    shutil.copytree(out / "checkpoint-2", out / ".checkpoint-9.partial")
    assert checkpoint.find_checkpoint(config) == (out / "checkpoint-3", [])
    assert not list(out.glob(".checkpoint-*"))


def test_other_contents_under_the_same_name_are_refused(tiny_llama, tmp_path):
    config = recipe("sft", tiny_llama, tmp_path, save_steps=1, max_steps=2)
    train(config)
    data = Path(config.datasets[0].path)
    write_rows(data, rows("completion", 12, seed=1))
    with pytest.raises(ConfigError, match=rf"other contents of data\.{re.escape(str(data))}: SHA"):
        train(config.model_copy(update=RESUME))


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_nothing_that_is_read_is_executed(tmp_path, monkeypatch):
    """Also of a file whose hash somebody made fit."""
    monkeypatch.chdir(tmp_path)
    torch.save({"module": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(pickle.UnpicklingError):
        checkpoint._Files().load(str(tmp_path / "evil.pt"))
    assert not Path("executed").exists()


# ------------------------------------------------------------------- another number of ranks


MOVES = [
    # Full weights have a group with weight decay and one without.
    ("full", 0, "float32"),
    ("full", 1, "float32"),
    ("full", 3, "float32"),
    ("lora", 2, "float32"),
    ("lora", 3, "float32"),
    ("full", 1, "bfloat16"),
    ("full", 2, "bfloat16"),
    ("full", 3, "bfloat16"),
]
# How far losses and weights may be from those of the run that nobody moved: other ranks pack, and
# add up, in another order, and a weight in bfloat16 is off by half a unit of its 8 bits at most.
ROUNDING = {"float32": (1e-5, 1e-5), "bfloat16": (3e-4, 2e-3)}


def state_of(checkpoint_folder: Path, aside: Path) -> dict[str, torch.Tensor]:
    """Master weights and what the optimizer keeps of each, whole, of whatever ranks wrote it."""
    checkpoint._convert(checkpoint_folder / "state", aside / "state")
    found = {}
    for file in (aside / "state" / "zero").glob("*/*.pt"):
        held = torch.load(file, weights_only=True)
        found[f"{file.parent.name}.{file.stem}"] = held["param"] if isinstance(held, dict) else held
    return found


@pytest.mark.slow
def test_another_number_of_ranks_goes_on_as_the_same_would_have(tiny_llama, tmp_path):
    """From two to one and from one to two, in the middle of an epoch: master weights and moments
    are the same bits, the batches the same, and losses within rounding."""
    recipes = {}
    for kind, stage, dtype in MOVES:
        name = f"{kind}-{stage}-{dtype}"
        keys = {"zero_stage": stage, "save_steps": 4, "num_train_epochs": 3.0, "dtype": dtype}
        keys |= {"weight_decay": 0.1} | (LORA if kind == "lora" else {})
        recipes[name] = recipe("sft", tiny_llama, tmp_path / name, **keys)

    def moved(config: Config, where: str) -> Config:
        """The run again, from its checkpoint at 4 of 9 steps."""
        out = Path(config.output_dir).with_name(where)
        shutil.copytree(Path(config.output_dir, "checkpoint-4"), out / "checkpoint-4")
        return config.model_copy(update={"output_dir": str(out)} | RESUME)

    def together(configs: dict[str, Config]) -> None:
        path = tmp_path / "spec.json"
        trees = {k: c.model_dump(mode="json", by_alias=True) for k, c in configs.items()}
        specs = {k: {"do": "moved", "recipe": tree} for k, tree in trees.items()}
        path.write_text(json.dumps(specs))
        log = tmp_path / "log"
        assert run_ranks(TESTS / "distributed_worker.py", path, log=log) == [0, 0], log.read_text()

    for config in recipes.values():
        train(config)
    split = {f"{name}-split": moved(config, "split") for name, config in recipes.items()}
    pairs = {
        f"{name}-pair": config.model_copy(update={"output_dir": f"{config.output_dir}-pair"})
        for name, config in recipes.items()
    }
    together(split | pairs)
    for name, alone in recipes.items():
        pair, joined = pairs[f"{name}-pair"], moved(pairs[f"{name}-pair"], "joined")
        with saved_again(Path(joined.output_dir, "again")):
            train(joined)
        of_losses, of_weights = ROUNDING[alone.dtype]
        expected = [x["loss"] for x in logged(alone, "loss")]
        for config, origin in ((split[f"{name}-split"], alone), (joined, pair)):
            found = [(x["step"], x["loss"]) for x in logged(config, "loss")]
            assert [step for step, _ in found] == [5, 6, 7, 8, 9]
            assert [loss for _, loss in found] == pytest.approx(expected[4:], rel=of_losses), name
            assert not list(Path(config.output_dir).glob(".*"))
            difference = distance(result(config), result(alone))
            assert difference < of_weights, (name, difference)
            if alone.zero_stage == 0:
                continue
            before = state_of(Path(origin.output_dir, "checkpoint-4"), tmp_path / "before")
            after = state_of(Path(config.output_dir, "again"), tmp_path / "after")
            assert {file.rpartition(".")[2] for file in before} >= {"fp32", "exp_avg", "exp_avg_sq"}
            assert before.keys() == after.keys()
            changed = [key for key in before if not torch.equal(before[key], after[key])]
            assert not changed, (name, changed)


# ----------------------------------------------------------------------------------- the disk


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder], capture_output=True, text=True
    )
    if made.returncode:
        pytest.skip(f"may not mount a tmpfs: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def remount(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", disk], check=True)


def on(disk: Path, model: Path, folder: Path, **keys: Any) -> tuple[Config, Path]:
    """A run on that disk, with its recipe elsewhere."""
    config = recipe("sft", model, folder, save_steps=1, output_dir=str(disk / "out"), **keys)
    path = folder / "recipe.yaml"
    path.write_text(dump_config(config))
    return config, path


@pytest.mark.parametrize("when", ["before", "while", "behind"])
def test_a_full_disk_ends_in_one_line_with_a_whole_checkpoint(
    finished, tiny_llama, tmp_path, disk, monkeypatch, capfd, when
):
    size = checkpoint._bytes_of(Path(finished.output_dir, "checkpoint-1"))
    config, path = on(disk, tiny_llama, tmp_path, async_save=when == "behind")
    # Room for one and a half.
    remount(disk, f"size={size * 3 // 2 // 1024}k")
    with monkeypatch.context() as patch:
        if when != "before":
            # Somebody else takes what was free a moment ago.
            patch.setattr(checkpoint, "_bytes_of", lambda path: 0)
        assert main(["train", str(path)]) == 1
    line = capfd.readouterr().err.splitlines()[-1]
    out = Path(config.output_dir)
    reasons = {
        "before": r"it takes \d+ MiB and \d+ MiB are free",
        "while": "No space left on device",
        "behind": "No space left on device",
    }
    assert re.fullmatch(
        rf"fastalign: {out}/checkpoint-2 could not be written: {reasons[when]}; "
        rf"{out}/checkpoint-1 is whole",
        line,
    ), line
    assert not list(out.glob(".checkpoint-*"))
    remount(disk, "size=64m")
    assert main(["train", str(path), "--resume"]) == 0
    assert f"resumed from {out}/checkpoint-1 at step 1" in capfd.readouterr().err
    expected, resumed = result(finished), result(config)
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)


def test_a_disk_that_refuses_one_rank_stops_both(tiny_llama, tmp_path):
    """Rank 1 may write no long files any more, while rank 0 waits for it."""
    specs = {}
    for name, behind in (("at-once", False), ("behind", True)):
        keys = {"zero_stage": 2, "save_steps": 1, "async_save": behind}
        config = recipe("sft", tiny_llama, tmp_path / name, **keys)
        tree = config.model_dump(mode="json", by_alias=True)
        specs[name] = {"do": "refused", "recipe": tree}
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(specs))
    log = tmp_path / "log"
    assert run_ranks(TESTS / "distributed_worker.py", path, log=log) == [0, 0], log.read_text()
    for name in specs:
        out = tmp_path / name / "out"
        for rank in range(2):
            assert (tmp_path / f"{name}-{rank}").read_text() == (
                f"{out}/checkpoint-2 could not be written: File too large; "
                f"{out}/checkpoint-1 is whole"
            )
        assert not list(out.glob(".checkpoint-*"))


def test_a_read_only_folder_is_one_line(finished, tiny_llama, tmp_path, disk, capfd):
    config, path = on(disk, tiny_llama, tmp_path)
    shutil.copytree(finished.output_dir, config.output_dir)
    remount(disk, "ro")
    assert main(["train", str(path), "--resume"]) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert line == f"fastalign: output_dir = {config.output_dir!r}: Read-only file system"
    found = checkpoint.find_checkpoint(config.model_copy(update=RESUME))
    assert found == (Path(config.output_dir, "checkpoint-3"), [])
