"""What several test files share: small data sets, recipes over a tiny model, a started run."""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import random
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

import fastalign.train as loop
from fastalign import checkpoint, prepare, startup
from fastalign.config import Config, parse_config
from fastalign.data import Example, Record
from fastalign.methods import make_method
from fastalign.model import (
    _reference_engine,
    build_model,
    deepspeed_settings,
    init_distributed,
    load_tokenizer,
)
from fastalign.online import make_episode
from fastalign.rollout import Rollout
from fastalign.run import Run
from fastalign.tracking import Tracker
from fastalign.writer import Writer

TESTS = Path(__file__).parent
EXAMPLES = TESTS.parent / "examples"
SIMPO = f"{EXAMPLES / 'simpo.py'}:SimPO"
WORDS = tuple("the sum capital answer of one two better Paris is in seven".split())  # noqa: SIM905


def sentence(rng: random.Random, low: int, high: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))


def rows(kind: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Ragged rows: the longest is several times the shortest."""
    rng = random.Random(seed)
    made = []
    for index in range(count):
        row: dict[str, Any] = {"prompt": f"{index}: {sentence(rng, 1, 8)}?"}
        if kind in ("completion", "judged"):
            row["completion"] = sentence(rng, 1, 14)
        if kind == "judged":
            row["judgment"] = None if index % 3 == 0 else f"Bad: {sentence(rng, 1, 6)}."
        if kind == "preference":
            row |= {"chosen": sentence(rng, 1, 12), "rejected": sentence(rng, 1, 12) + "!"}
        made.append(row)
    return made


def write_rows(path: Path, content: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return path


KINDS = {
    "sft": "completion", "unlikelihood": "judged", "cut": "judged",
    "jsft": "preference", "dpo": "preference", "hindsight": "judged",
    "forward-prediction": "judged", "ilf-mle": "judged", "ilf-dpo": "judged",
    "rso": "prompt", "rest": "prompt", "raft": "prompt",
}  # fmt: skip
REFINING = ("ilf-mle", "ilf-dpo")


def recipe(method: str, model: Path, folder: Path, **keys: Any) -> Config:
    """A recipe over 12 rows of the method's own kind (prompts when online, unless their answers are
    refined; pairs for a method that is not the package's), in fp32 on a CPU."""
    kind = KINDS.get(method, "preference")
    if keys.get("online") and method not in REFINING:
        kind = "prompt"
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / f"{kind}.jsonl"
    if not data.exists():
        write_rows(data, rows(kind, 12))
    defaults: dict[str, Any] = {
        "method": method,
        "model_name_or_path": str(model),
        "datasets": [{"path": str(data)}],
        "output_dir": str(folder / "out"),
        "dtype": "float32",
        "max_length": 512,
        "global_batch_size": 4,
        "micro_batch_tokens": 300,
        "learning_rate": 1e-3,
        "report_to": [],
        "rollout": {"engine": "hf"},
        "max_completion_length": 12,
        "zero_stage": 0,
    }
    return parse_config(defaults | keys)


def start(config: Config, *, reference: Path | None = None) -> tuple[Run, list[Example]]:
    """An offline run up to its first step, and its examples.

    ``reference``: another model as the frozen reference, so that rewards are not 0 at the start
    (full fine-tuning).
    """
    device = init_distributed(timeout_s=300.0)
    method = make_method(config)
    tokenizer = load_tokenizer(config)
    renderers = prepare.make_renderers(config, tokenizer, config.judge)
    records, _, _ = prepare.load_data(config, method)
    examples, _ = prepare.make_examples(method, records, renderers, config)
    model = build_model(
        config, device=device, needs_reference=method.needs_reference and reference is None
    )
    if reference is not None:
        other = config.model_copy(update={"model_name_or_path": str(reference)})
        settings = deepspeed_settings(config, model.zero_stage, model.dtype)
        model.reference_engine = _reference_engine(
            other, model.dtype, device, model.zero_stage, settings
        )
    rank, world_size = dist.get_rank(), dist.get_world_size()
    tracker = Tracker(config, rank, 1)
    run = Run(config, method, tokenizer, model, None, renderers, tracker, rank, world_size)
    startup.check_start(run, "of the test")
    return run, examples


def as_method(run: Run, config: Config) -> list[Example]:
    """Turn a started run over to another recipe on the same model; returns its examples."""
    run.config, run.method = config, make_method(config)
    run.renderers = prepare.make_renderers(config, run.tokenizer, config.judge)
    records, _, _ = prepare.load_data(config, run.method)
    if config.method in REFINING:
        return _refined(run, records)
    return prepare.make_examples(run.method, records, run.renderers, config)[0]


def _refined(run: Run, records: list[Record]) -> list[Example]:
    """Examples in which the answers of other rows are the refinements."""
    (renderer,) = run.renderers
    kept, _ = prepare.check_prompts(records, run.renderers, run.config, run.method.rollout_prompt)
    examples = []
    for index, (record, other) in enumerate(zip(kept, reversed(kept), strict=True)):
        assert other.completion is not None
        _, ids = renderer.completion(other.prompt, other.completion)
        rollout = Rollout(ids, np.zeros(len(ids), np.float32), "stop", 1)
        episode = make_episode(
            run, index, record, run.method.rollout_prompt(record, renderer), (rollout,)
        )
        examples += run.method.from_episode(episode, renderer)
    return examples


def step_with_gradients(
    run: Run, examples: list[Example]
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """One update, and the full gradients of the trained parameters just before the optimizer."""
    from deepspeed.utils import safe_get_full_grad

    engine = run.model.engine
    # DeepSpeed reduces gradients over ranks inside step(), before this.
    original, gradients = engine._take_model_step, {}

    def take_step(*arguments: Any) -> None:
        for name, parameter in run.model.policy.named_parameters():
            if parameter.requires_grad:
                gradient = safe_get_full_grad(parameter)
                assert gradient is not None, name
                gradients[name] = gradient.detach().float().clone()
        original(*arguments)

    engine._take_model_step = take_step
    try:
        metrics = loop.update(run, examples, 0.0, 1)
    finally:
        del engine._take_model_step
    return metrics, gradients


def trained_tensors(run: Run) -> dict[str, torch.Tensor]:
    """Full tensors of what is trained (collective), and their masters where DeepSpeed keeps any."""
    from deepspeed.utils import safe_get_full_fp32_param

    tensors = {n: t.clone() for n, t in run.model.iter_weights(torch.float32)}
    for name, parameter in run.model.policy.named_parameters():
        master = safe_get_full_fp32_param(parameter) if run.model.zero_stage else None
        if master is not None:
            tensors[f"{name}.master"] = master.clone()
    return tensors


def distance(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """|left - right| / |right| over all tensors together."""
    assert left.keys() == right.keys() and left
    difference = sum((left[n].double() - right[n].double()).square().sum() for n in left)
    return float((difference / sum(t.double().square().sum() for t in right.values())).sqrt())


@contextlib.contextmanager
def saved_again(folder: Path) -> Iterator[None]:
    """A run that is resumed writes what it has loaded into ``folder``, before it makes a step."""
    original = checkpoint.load_checkpoint

    def load(run: Run, path: Path) -> Any:
        loaded = original(run, path)
        checkpoint._save_state(run.model, Writer(folder))
        return loaded

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "load_checkpoint", load)
        yield


@contextlib.contextmanager
def late_writes() -> Iterator[list[tuple[str, int]]]:
    """A slow disk: what is written behind the training waits for the step behind the checkpoint's,
    or for a trainer that waits for it.  Yields the folders that were written, and how many steps
    there were by then."""
    update, write, wait = loop.update, Writer._write, Writer.wait
    steps, waited, written = 0, threading.Event(), []

    def counted(*arguments: Any) -> dict[str, float]:
        nonlocal steps
        done = update(*arguments)
        steps += 1
        return done

    def late(writer: Writer, path: Path, save: Callable[[Path], object]) -> None:
        if threading.current_thread() is not threading.main_thread():
            while steps <= int(writer.folder.stem.rpartition("-")[2]) and not waited.is_set():
                time.sleep(0.002)
            if path.name.startswith("manifest"):
                written.append((writer.folder.name, steps))
        write(writer, path, save)

    def waiting(writer: Writer) -> None:
        waited.set()
        wait(writer)
        waited.clear()

    loop.update, Writer._write, Writer.wait = counted, late, waiting  # type: ignore[method-assign]
    try:
        yield written
    finally:
        loop.update, Writer._write, Writer.wait = update, write, wait  # type: ignore[method-assign]


def outside_environment(**extra: str) -> dict[str, str]:
    """The environment of a user's shell: without what torchrun or a run in this process sets."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {k: v for k, v in os.environ.items() if k not in names}
    return kept | {"OMP_NUM_THREADS": "1"} | extra


class RankServer:
    """tests/rank_server.py, which runs one process after the other."""

    def __init__(self) -> None:
        self._pid, self._code = 0, None
        self._server = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("rank_server.py")],
            # Looking for a GPU by CUDA itself would keep forks from using one.
            env=outside_environment(PYTORCH_NVML_BASED_CUDA_CHECK="1"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,  # what poll has to see is not in a buffer here
        )
        self._answers = select.poll()
        self._answers.register(self._server.stdout, select.POLLIN | select.POLLHUP)
        # It ends when its standard input does, also when this process is killed.
        atexit.register(self._server.communicate)

    def start(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        request = {"command": command, "environment": environment, "log": str(log.resolve())}
        line = json.dumps(request | {"folder": os.getcwd()})
        self._server.stdin.write(line.encode() + b"\n")
        self._code = None
        self._pid = self._answer("pid")

    def poll(self) -> int | None:
        """The exit code, once there is one."""
        if self._pid and self._answers.poll(0):
            self._pid, self._code = 0, self._answer("exit")
        return self._code

    def kill(self) -> None:
        if self._pid:
            # It is the server's child: it may end, and be gone, at any time.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
            self._pid, self._code = 0, self._answer("exit")

    def _answer(self, what: str) -> int:
        line = self._server.stdout.readline()
        assert line, f"{self._server.args} ended"
        return json.loads(line)[what]


@functools.cache
def rank_server(rank: int) -> RankServer:
    return RankServer()


def run_ranks(*command: Any, log: Path, ranks: int = 2, timeout: float = 400) -> list[int | None]:
    """Exit codes of one process for each rank; None for those that had to be stopped.

    Started without torchrun, whose own failures would hide a rank's.  A hang is what ranks do that
    disagree about a collective, hence the limit.
    """
    # The ranks meet at a store of this process, as under torchrun's agent: a port that was found
    # free and is bound later by rank 0 may be taken in between.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    group = {
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    log.write_text("")
    processes = [rank_server(rank) for rank in range(ranks)]
    try:
        for rank, process in enumerate(processes):
            environment = outside_environment(RANK=str(rank), LOCAL_RANK=str(rank), **group)
            process.start([str(part) for part in command], environment, log)
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            codes = [process.poll() for process in processes]
            if all(code is not None for code in codes) or any(codes):
                break
            time.sleep(0.1)
        return [process.poll() for process in processes]
    finally:
        for process in processes:
            process.kill()
