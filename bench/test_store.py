"""The episode store beside Python lists, pickle and JSON lines.

    pytest bench/test_store.py

A round's rollouts are appended one by one, as lists (what vLLM returns) or as arrays, and read back
into one flat buffer, as a packer does.  Floors, in the same race: one copy of the same bytes in
memory, one write of them to a file, the same with a sync, and a write for each rollout.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from racing import SMOKE, Contestants

from fastalign._bridge import EpisodeStore

ROLLOUTS = 16 if SMOKE else 4096
TOKENS = 512  # on average
HOW: dict[str, Any] = {"finish_reason": "stop", "seed": 0, "weight_version": 0}
Pair = tuple[Sequence[Any] | np.ndarray, Sequence[Any] | np.ndarray]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="fastalign-"))
    yield made
    shutil.rmtree(made)


def arrays() -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    lengths = rng.integers(TOKENS // 8, TOKENS * 15 // 8, ROLLOUTS)
    return [
        (rng.integers(0, 150_000, n, dtype=np.int32), -rng.random(n, dtype=np.float32))
        for n in lengths
    ]


def lists() -> list[tuple[list[int], list[float]]]:
    return [(ids.tolist(), logprobs.tolist()) for ids, logprobs in arrays()]


def flat(pairs: Sequence[Pair]) -> np.ndarray:
    return np.concatenate([np.asarray(x).view(np.uint8) for pair in pairs for x in pair])


def prepared(path: Path) -> EpisodeStore:
    path.unlink(missing_ok=True)
    store = EpisodeStore(path)
    store.append_prompt([1])
    store.append_settings(b"")
    store.commit()
    return store


def append(store: EpisodeStore, pairs: Sequence[Pair]) -> EpisodeStore:
    for ids, logprobs in pairs:
        store.append(0, 0, ids, logprobs, **HOW)
    return store


def anew(path: Path, function: Callable[[Path], object]) -> Callable[[], None]:
    """``function(path)`` where no file is."""

    def run() -> None:
        path.unlink(missing_ok=True)
        function(path)

    return run


def append_contestants(folder: Path, pairs: Sequence[Pair]) -> Contestants:
    parts = arrays()
    data = flat(parts)
    target = np.empty_like(data)
    # Made before: the first commit syncs the folder too, and a run makes one file.
    appended, committed = prepared(folder / "appended"), prepared(folder / "committed")

    def written(path: Path) -> None:
        with path.open("wb", buffering=0) as file:
            for ids, logprobs in parts:
                os.writev(file.fileno(), (ids, logprobs))

    def pickled(path: Path) -> None:
        with path.open("wb") as file:
            for pair in pairs:
                pickle.dump(pair, file, protocol=pickle.HIGHEST_PROTOCOL)

    def json_lines(path: Path) -> None:
        with path.open("w") as file:
            for pair in pairs:
                file.write(json.dumps([np.asarray(x).tolist() for x in pair]) + "\n")

    def synced(path: Path) -> None:
        data.tofile(path)
        with path.open("rb") as file:
            os.fdatasync(file.fileno())

    def to_arrays() -> list[Any]:
        return [(np.array(i, dtype=np.int32), np.array(p, dtype=np.float32)) for i, p in pairs]

    return {
        "floor: one copy": lambda: np.copyto(target, data),
        "floor: one write": anew(folder / "w", data.tofile),
        "floor: a write for each": anew(folder / "e", written),
        "floor: one write, synced": anew(folder / "s", synced),
        "fastalign": lambda: append(appended, pairs),
        "fastalign, committed": lambda: append(committed, pairs).commit(),
        "a list of arrays, not kept": to_arrays,
        "pickle": anew(folder / "p", pickled),
        "JSON lines": anew(folder / "j", json_lines),
    }


def read_contestants(folder: Path) -> Contestants:
    pairs = arrays()
    data = flat(pairs)
    target = np.empty_like(data)
    ids = np.empty(data.nbytes // 8, np.int32)
    logprobs = np.empty(data.nbytes // 8, np.float32)
    store = append(prepared(folder / "read"), pairs)
    append(prepared(folder / "closed"), pairs).close()
    pickles = [pickle.dumps(pair, protocol=pickle.HIGHEST_PROTOCOL) for pair in lists()]

    def gather(found: Iterator[Pair]) -> None:
        at = 0
        for new_ids, new_logprobs in found:
            end = at + len(new_ids)
            ids[at:end], logprobs[at:end] = new_ids, new_logprobs
            at = end

    def views(store: EpisodeStore) -> Iterator[Pair]:
        return ((rollout.token_ids, rollout.logprobs) for rollout in store)

    return {
        "floor: one copy": lambda: np.copyto(target, data),
        "fastalign": lambda: gather(views(store)),
        "fastalign, opened anew": lambda: gather(views(EpisodeStore(folder / "closed"))),
        "a list of arrays": lambda: gather(iter(pairs)),
        "pickle": lambda: gather(pickle.loads(row) for row in pickles),
    }


APPEND = [
    "floor: one copy",
    "floor: one write",
    "floor: a write for each",
    "floor: one write, synced",
    "fastalign",
    "fastalign, committed",
    "a list of arrays, not kept",
    "pickle",
    "JSON lines",
]
READ = ["floor: one copy", "fastalign", "fastalign, opened anew", "a list of arrays", "pickle"]


@pytest.mark.parametrize("who", APPEND)
def test_append_lists(race, folder, who):
    race("append lists", lambda: append_contestants(folder, lists()), who)


@pytest.mark.parametrize("who", APPEND)
def test_append_arrays(race, folder, who):
    race("append arrays", lambda: append_contestants(folder, arrays()), who)


@pytest.mark.parametrize("who", READ)
def test_read(race, folder, who):
    race("read", lambda: read_contestants(folder), who)
