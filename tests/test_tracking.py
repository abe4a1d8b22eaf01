"""What a run says while it goes on: a bar, lines, events, or nothing; and to whom else."""

from __future__ import annotations

import io
import itertools
import json
import logging
import math
import re
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import recipe, rows, write_rows

import fastalign.train  # noqa: F401  what its libraries say when they load is not looked at here
from fastalign import logs
from fastalign.cli import main
from fastalign.config import Config, ConfigError
from fastalign.tracking import Tracker

RULE = """
def written(prompt, text):
    return None if len(text) % 3 == 0 else "Bad."
"""
LORA = {"use_peft": True, "lora_r": 4}


@pytest.fixture(autouse=True)
def plain_afterwards():
    yield
    logs.configure("plain")


def tracked(folder: Path, **keys: Any) -> Config:
    return recipe("sft", Path("no-model"), folder, **keys)


def save(config: Config, folder: Path) -> str:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json", by_alias=True)))
    return str(path)


def events(stderr: str) -> list[dict[str, Any]]:
    """Every line is one event."""
    found = [json.loads(line) for line in stderr.splitlines()]
    for event in found:
        assert datetime.fromisoformat(event["time"]).tzinfo is not None
    return found


# ---------------------------------------------------------------------------------- on a terminal


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("columns", [80, 120])
def test_a_terminal_has_a_bar(tmp_path, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    tracker = Tracker(tracked(tmp_path), 0, 400)
    tracker.phase("model")
    tracker._bar.refresh()
    tracker.start(0)
    for step in (1, 2, 3):
        tracker.phase("rollout")
        figures = {"loss": 0.6931, "grad_norm": 1.0, "speed/tokens_per_second": 123456.0}
        tracker.log(step, figures | {"speed/mfu": 0.41})
    tracker._bar.refresh()
    tracker.close()
    written = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", sys.stderr.getvalue())
    last = re.split(r"[\r\n]+", written.rstrip())[-1]
    assert len(last) <= columns
    parts = ["rollout", "3/400", "loss 0.6931", "123,456 tokens/s", "0:00:00 left 0:00:"]
    parts += ["grad norm 1", "41% MFU"] if columns > 100 else []
    for part in parts:
        assert part in last, (part, last)
    assert "model" in written


def test_without_a_terminal_there_are_lines(tmp_path, capsys):
    tracker = Tracker(tracked(tmp_path), 0, 4)
    tracker.phase("model")
    tracker.start(0)
    tracker.phase("train")
    tracker.log(1, {"loss": 0.5, "grad_norm": 2.0, "speed/tokens_per_second": 1234.4})
    tracker.log(1, {"eval/loss": 0.4}, show=False)
    tracker.done({})
    tracker.close()
    line, done = capsys.readouterr().err.splitlines()
    assert line.startswith("step 1/4  loss 0.5  grad norm 2  1,234 tokens/s  left 0:")
    assert done == f"done: {tmp_path}/out"


def test_the_other_ranks_are_silent(tmp_path, capsys):
    for style in ("plain", "json"):
        logs.configure(style)
        tracker = Tracker(tracked(tmp_path, report_to=["tensorboard"]), 1, 4)
        tracker.say("hello")
        tracker.start(0)
        tracker.phase("train")
        tracker.log(1, {"loss": 0.5})
        tracker.done({})
        tracker.close()
    assert capsys.readouterr() == ("", "") and not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------- as a user


def test_json_logs_are_one_object_a_line(sharp_llama, tmp_path, capfd, quiet_process):
    """Online, so that all phases come."""
    (tmp_path / "rule.py").write_text(RULE)
    held = write_rows(tmp_path / "held.jsonl", rows("prompt", 2, seed=3))
    config = recipe(
        "cut", sharp_llama, tmp_path, **LORA,
        online={"iterations": 2, "prompts_per_iteration": 4},
        judge={"path": f"{tmp_path / 'rule.py'}:written"},
        eval_datasets=[{"path": str(held)}], eval_steps="round",
    )  # fmt: skip
    assert main(["train", save(config, tmp_path), "--json-logs"]) == 0
    lines = capfd.readouterr().err.splitlines()
    # DeepSpeed tries out libraries, of which a linker speaks for itself.
    ours = [line for line in lines if line.startswith("{")]
    others = [line for line in lines if line not in ours]
    assert not [line for line in others if line.startswith(("fastalign:", "step ", "round "))]
    said = events("\n".join(ours))
    kinds = [event["event"] for event in said]
    assert set(kinds) - {"warning"} == {
        "note", "chosen", "start", "phase", "metrics", "done"
    }  # fmt: skip
    assert (kinds.count("start"), kinds[-1]) == (1, "done")
    (start,) = [event for event in said if event["event"] == "start"]
    assert (start["step"], start["total_steps"]) == (0, 2)
    phases = [event["phase"] for event in said if event["event"] == "phase"]
    assert phases[:3] == ["engine", "model", "check"] and phases[-2:] == ["save", "done"]
    assert {"sync", "rollout", "judge", "train", "eval"} <= set(phases)
    assert all(a != b for a, b in itertools.pairwise(phases))
    # As in metrics.jsonl, in the same order.
    shown = [e for e in said if e["event"] == "metrics"]
    written = (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()
    assert [{"step": e["step"], **e["metrics"]} for e in shown] == list(map(json.loads, written))
    steps = [e for e in shown if "seconds_left" in e]
    assert [e["step"] for e in steps] == [1, 2] and all("loss" in e["metrics"] for e in steps)
    assert said[-1]["output_dir"] == config.output_dir and "loss" in said[-1]["metrics"]
    chosen = {e["name"]: e for e in said if e["event"] == "chosen"}
    assert {"dtype", "ZeRO stage", "threads", "attention", "kernels", "rollouts"} <= set(chosen)
    assert (chosen["dtype"]["value"], chosen["dtype"]["why"]) == ("float32", "as the recipe says")
    notes = " ".join(event["message"] for event in said if event["event"] == "note")
    assert "round 2 of 2: 4 examples" in notes


def test_quiet_runs_say_what_is_wrong(tiny_llama, tmp_path, capfd, quiet_process):
    path = save(recipe("sft", tiny_llama, tmp_path, max_steps=1), tmp_path)
    assert main(["train", path, "--quiet"]) == 0
    assert [line for line in capfd.readouterr().err.splitlines() if "WARNING" not in line] == []
    assert main(["train", path, "--quiet", "max_stepz=2"]) == 2
    assert "did you mean 'max_steps'?" in capfd.readouterr().err
    assert main(["train", path, "--json-logs", "max_stepz=2"]) == 2
    (event,) = events(capfd.readouterr().err)
    assert event["event"] == "error" and "did you mean 'max_steps'?" in event["message"]
    with pytest.raises(SystemExit):
        main(["train", path, "--json-logs", "--quiet"])


@pytest.mark.parametrize("flag", ["--quiet", "--json-logs"])
def test_every_process_is_told(tmp_path, monkeypatch, flag):
    import torch.distributed.run

    path = save(tracked(tmp_path), tmp_path)
    seen: list[Any] = []
    monkeypatch.setattr(torch.distributed.run, "run", seen.append)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert main(["train", path, flag, "nproc_per_node=2", "max_steps=1"]) == 0
    (options,) = seen
    assert options.training_script_args == [
        "train", path, "nproc_per_node=2", "max_steps=1", flag
    ]  # fmt: skip


# ----------------------------------------------------------------------------------------- events


def test_what_others_say_becomes_events(capsys):
    logs.configure("json")
    logging.getLogger("some.library").warning("beware of %s", "<this>\nand that")
    logging.getLogger("some.library").info("nothing")
    try:
        raise KeyError("gone")
    except KeyError as error:
        sys.excepthook(type(error), error, error.__traceback__)
    sys.stderr.write(logs.line("note", "stopping"))
    logs.emit("metrics", metrics=logs.finite({"loss": math.nan, "x": 1.0}))
    warning, crash, note, metrics = events(capsys.readouterr().err)
    assert (warning["event"], warning["logger"]) == ("warning", "some.library")
    assert warning["message"] == "beware of <this>\nand that"
    assert crash["event"] == "error" and crash["message"] == "KeyError: 'gone'"
    assert "Traceback" in crash["traceback"]
    assert (note["event"], note["message"]) == ("note", "stopping")
    assert metrics["metrics"] == {"loss": None, "x": 1.0}
    logs.configure("plain")
    assert sys.excepthook is sys.__excepthook__
    assert logs.line("note", "stopping") == "fastalign: stopping\n"


# --------------------------------------------------------------------------------------- services


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder / "tensorboard"))
    read.Reload()
    return {
        name: [(e.step, e.value) for e in read.Scalars(name)] for name in read.Tags()["scalars"]
    }


def test_tensorboard_forgets_what_comes_again(tmp_path):
    assert Config.model_fields["report_to"].default == ("tensorboard",)
    config = tracked(tmp_path, report_to=["tensorboard"])
    logged = {0: 0}
    for first, count in ((0, 4), (2, 1)):
        tracker = Tracker(config, 0, 4)
        tracker.start(first, logged[first])
        for step in range(first + 1, first + 1 + count):
            tracker.log(step, {"loss": 10.0 * first + step, "a/b": 1.0})
            logged[step] = tracker.logged
        tracker.close()
    found = scalars(tmp_path / "out")
    assert found["loss"] == [(1, 1.0), (2, 2.0), (3, 23.0)] and len(found["a/b"]) == 3
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == [1.0, 2.0, 23.0]


def log_a_little(config: Config) -> None:
    tracker = Tracker(config, 0, 2)
    tracker.start(0)
    for step in (1, 2):
        tracker.log(step, {"loss": 1.0 / step})
        tracker.log(step, {"eval/loss": 3.0}, show=False)
    tracker.close()


def test_wandb_works_offline(tmp_path, monkeypatch, capfd):
    pytest.importorskip("wandb", reason="pip install 'fastalign[trackers]'")
    logs.configure("quiet")
    monkeypatch.setenv("WANDB_MODE", "offline")
    log_a_little(tracked(tmp_path, report_to=["wandb"]))
    assert capfd.readouterr().err == ""
    (file,) = (tmp_path / "out" / "wandb").glob("offline-run-*/run-*.wandb")
    # A process of theirs writes it, which may still be at it.
    deadline = time.monotonic() + 60
    while b"eval/loss" not in file.read_bytes():
        assert time.monotonic() < deadline, file.read_bytes()
        time.sleep(0.1)


def test_trackio_works_offline(tmp_path, monkeypatch):
    trackio = pytest.importorskip("trackio", reason="pip install 'fastalign[trackers]'")
    monkeypatch.setattr(trackio.utils, "TRACKIO_DIR", tmp_path / "trackio")
    log_a_little(tracked(tmp_path, report_to=["trackio"]))


def test_a_service_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="'wandb', which is not installed: pip install wandb"):
        Tracker(tracked(tmp_path, report_to=["wandb"]), 0, 1)
