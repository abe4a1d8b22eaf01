"""The episode store against plain Python models, and against what kills and tears its journal."""

from __future__ import annotations

import gc
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from fastalign._bridge import CorruptJournal, EpisodeStore, NotAJournal, StoredRollout
from fastalign.config import ConfigError
from fastalign.episodes import forget_journals, journal_path, sample_once
from fastalign.rollout.engine import Rollout

HOW = {"finish_reason": "stop", "seed": 0, "weight_version": 0}
WINDOW = 1 << 22  # bytes, in csrc/store.h


def prepared(path: Path | bytes | None = None, **options: Any) -> EpisodeStore:
    """A store with a prompt and settings, both number 0."""
    store = EpisodeStore(path, **options)
    store.append_prompt([1, 2, 3])
    store.append_settings(b"{}")
    return store


def plain(rollout: StoredRollout) -> tuple[Any, ...]:
    """Everything in it, log-probs by their bits."""
    arrays = (rollout.token_ids.tobytes(), rollout.logprobs.tobytes())
    names = ("index", "prompt", "settings", "seed", "weight_version", "finish_reason")
    return tuple(getattr(rollout, name) for name in names) + arrays


# -------------------------------------------------------------------------------- what goes in


@pytest.mark.parametrize(
    ("kind", "token_dtype", "logprob_dtype"),
    [(list, None, None), (tuple, None, None), (np.array, "i4", "f4"), (np.array, "i8", "f8")],
)
def test_takes_lists_and_arrays_bit_for_bit(kind, token_dtype, logprob_dtype):
    ids = [0, 2**31 - 1, 7, 8, 9]
    logprobs = [0.0, -0.1, float("-inf"), -1e-42, float("nan")]
    store = prepared()
    store.append(
        0,
        0,
        kind(ids) if token_dtype is None else kind(ids, dtype=token_dtype),
        kind(logprobs) if logprob_dtype is None else kind(logprobs, dtype=logprob_dtype),
        finish_reason="length",
        seed=2**64 - 1,
        weight_version=2**63 - 1,
    )
    (found,) = store
    assert found.token_ids.dtype == np.int32 and found.logprobs.dtype == np.float32
    expected = np.array(ids, np.int32).tobytes(), np.array(logprobs, np.float32).tobytes()
    assert plain(found) == (0, 0, 0, 2**64 - 1, 2**63 - 1, "length", *expected)


class ShrinksItsList:
    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __index__(self) -> int:
        self.items.clear()
        return 1


def test_survives_a_list_that_shrinks_while_it_is_read():
    items: list[Any] = []
    items += [ShrinksItsList(items), *range(1000)]
    with pytest.raises(ValueError, match=r"^token_ids changed while read$"):
        EpisodeStore().append_prompt(items)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1, -2], [0, 0]), ValueError, r"token_ids\[1\] is -2; token ids are .* 0 to 2147483647"),
        (([2**31], [0]), ValueError, r"token_ids\[0\] is 2147483648; token ids are .*"),
        (([2**70], [0]), ValueError, r"token_ids\[0\] is 1180591620717411303424; token ids .*"),
        ((np.array([1, -2]), [0, 0]), ValueError, r"token_ids\[1\] is -2; token ids are .*"),
        ((np.array([-2], "i4"), [0]), ValueError, r"token_ids\[0\] is -2; .* not negative"),
        (([1, 2.0], [0, 0]), TypeError, r"token_ids\[1\] must be an int, got a float"),
        (([1], ["x"]), TypeError, r"logprobs\[0\] must be a float, got a str"),
        (([1], [0, 0]), ValueError, "logprobs has 2 entries but token_ids has 1 tokens"),
        ((iter([1]), [0]), TypeError, "token_ids must be an array of int32 or int64, got a .*"),
        ((np.zeros(1), [0]), ValueError, "token_ids must be .* int32 or int64, got float64"),
        (([1], np.zeros(1, "f2")), ValueError, "logprobs must be .*float64, got float16"),
        ((np.zeros(4, "i4")[::2], [0, 0]), ValueError, "token_ids must be contiguous, .* 8 bytes"),
    ],
)  # fmt: skip
def test_names_what_is_wrong(arguments, error, message):
    store = prepared()
    with pytest.raises(error, match=f"^{message}$"):
        store.append(0, 0, *arguments, **HOW)
    assert len(store) == 0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s: s.append(1, 0, [], [], **HOW), ValueError, "prompt 1 is not .* which has 1"),
        (lambda s: s.append(0, -1, [], [], **HOW), ValueError, "settings -1 is not .* has 1"),
        (lambda s: s.append(0, 0, [], [], **HOW | {"finish_reason": "abort"}), ValueError,
         "finish_reason must be 'stop' or 'length', got 'abort'"),
        (lambda s: s.append(0, 0, [], [], **HOW | {"seed": 2**64}), ValueError,
         "seed is 18446744073709551616; it must be from 0 to 18446744073709551615"),
        (lambda s: s.append(0, 0, [], [], **HOW | {"seed": -1}), ValueError, "seed is -1; .*"),
        (lambda s: s.append(0, 0, [], [], **HOW | {"seed": 0.5}), TypeError,
         "seed must be an int, got a float"),
        (lambda s: s.append(0, 0, [], [], **HOW | {"weight_version": 2**63}), ValueError,
         "weight_version is 9223372036854775808; it must be from -9223372036854775808 to 9.*7"),
        (lambda s: s.append(2**63, 0, [], [], **HOW), ValueError, "prompt is 92.*08; it must .*"),
        (lambda s: s.append(0, 0, [], [], timeout=-1.0, **HOW), ValueError, "timeout must be .*"),
        (lambda s: s.annotate(0, b""), ValueError, "rollout 0 is not in the store, which has 0"),
        (lambda s: s[0], IndexError, "rollout 0 is not in the store, which has 0"),
        (lambda s: s[-1], IndexError, "rollout -1 is not in the store, which has 0"),
        (lambda s: s.prompt(1), IndexError, "prompt 1 is not in the store, which has 1"),
        (lambda s: s.settings(1), IndexError, "settings 1 is not in the store, which has 1"),
        (lambda s: s.notes(0), IndexError, "rollout 0 is not in the store, which has 0"),
        (lambda s: s.take(0), ValueError, "n must be at least 1, got 0"),
        (lambda s: s.take(5), ValueError, r"n is 5: no more than 4 rollouts .* \(capacity\)"),
        (lambda s: s.take(1, float("nan")), ValueError, "timeout must be .*, got nan"),
        (lambda s: EpisodeStore(max_bytes=-1), ValueError, "max_bytes must be at least 0, got -1"),
        (lambda s: EpisodeStore(capacity=0), ValueError, "capacity must be .* at least 1, got 0"),
        (lambda s: EpisodeStore(""), ValueError, "path is empty"),
        (lambda s: EpisodeStore("a\0b"), ValueError, "embedded null byte"),
        (lambda s: EpisodeStore(3), TypeError, "expected str, bytes or .*, not int"),
        (lambda s: EpisodeStore("/nowhere/x"), FileNotFoundError, ".*/nowhere/x cannot be .*"),
        (lambda s: EpisodeStore("/tmp"), IsADirectoryError, ".*/tmp cannot be opened: Is a .*"),
    ],
)  # fmt: skip
def test_refuses(call, error, message):
    with pytest.raises(error, match=f"^{message}$"):
        call(prepared(capacity=4))


# ----------------------------------------------------------------------------- what comes out


def test_views_are_read_only_and_share_the_file():
    store = prepared()
    store.append(0, 0, [4, 5], [-1.0, -2.0], **HOW)
    ids = store[0].token_ids
    assert np.shares_memory(ids, store[0].token_ids) and not ids.flags.owndata
    for array in (ids, store[0].logprobs, store.prompt(0)):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
        with pytest.raises(ValueError, match="WRITEABLE"):
            array.flags.writeable = True


@pytest.mark.parametrize("tensor_of", [torch.from_dlpack, torch.from_numpy])
@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_torch_shares_the_views_and_writes_to_no_file(tmp_path, tensor_of):
    store = prepared(tmp_path / "j")
    store.append(0, 0, [4, 5], [-1.0, -2.0], **HOW)
    before = (tmp_path / "j").read_bytes()
    rollout = store[0]
    ids, logprobs = tensor_of(rollout.token_ids), tensor_of(rollout.logprobs)
    assert ids.data_ptr() == rollout.token_ids.ctypes.data and ids.dtype == torch.int32
    assert logprobs.data_ptr() == rollout.logprobs.ctypes.data
    ids += 1
    logprobs.zero_()
    assert ids.tolist() == [5, 6] and (tmp_path / "j").read_bytes() == before
    # Beside it, on the same page.
    store.append(0, 0, [8, 9], [-3.0, -4.0], **HOW)
    assert store[1].token_ids.tolist() == [8, 9] and store[1].logprobs.tolist() == [-3, -4]
    store.close()
    assert EpisodeStore(tmp_path / "j")[0].token_ids.tolist() == [4, 5]


def test_views_outlive_the_store():
    store = prepared()
    store.append(0, 0, np.arange(1000), np.arange(1000.0), **HOW)
    ids, logprobs = store[0].token_ids, store[0].logprobs
    store.close()
    del store
    gc.collect()
    assert ids.tolist() == logprobs.tolist() == list(range(1000))


def mapped(path: Path) -> int:
    """Bytes of a file that this process maps."""
    total = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(path)):
            first, last = line.split()[0].split("-")
            total += int(last, 16) - int(first, 16)
    return total


def test_memory_is_bounded_whatever_the_file_holds(tmp_path):
    store = prepared(tmp_path / "j", max_bytes=4 * WINDOW)
    length = 1 << 17
    for i in range(64):
        store.append(0, 0, np.full(length, i), np.full(length, -i, np.float32), **HOW)
    assert os.path.getsize(tmp_path / "j") > 16 * WINDOW
    held = store[5].token_ids
    for i in range(64):
        assert (store[i].token_ids == i).all() and (store[i].logprobs == -i).all()
        # Each mapping is two windows long; one is held.
        assert mapped(tmp_path / "j") <= 4 * WINDOW + 2 * WINDOW
    assert (held == 5).all()
    everything = [store[i].token_ids for i in range(64)]
    assert mapped(tmp_path / "j") > 16 * WINDOW
    assert all((ids == i).all() for i, ids in enumerate(everything))
    del everything, held
    assert 0 < mapped(tmp_path / "j") <= 4 * WINDOW


def test_nothing_stays_mapped_where_nothing_may(tmp_path):
    store = prepared(tmp_path / "j", max_bytes=2 * WINDOW - 1)
    store.append(0, 0, [4, 5], [-1.0, -2.0], **HOW)
    held, also = store[0], store.prompt(0)
    ids = held.token_ids
    assert mapped(tmp_path / "j") == 2 * WINDOW
    del held, also
    assert mapped(tmp_path / "j") == 2 * WINDOW and ids.tolist() == [4, 5]
    del ids
    assert mapped(tmp_path / "j") == 0


# -------------------------------------------------------------------------- the same as a model


@dataclass
class Model:
    """A store in plain Python; ``ends`` are the file's size after each operation."""

    operations: list[tuple[Any, ...]] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)

    def of(self, kind: str) -> list[tuple[Any, ...]]:
        return [operation[1:] for operation in self.operations if operation[0] == kind]

    def cut(self, size: int) -> None:
        kept = sum(end <= size for end in self.ends)
        del self.operations[kept:], self.ends[kept:]


token_ids = st.lists(st.integers(0, 2**31 - 1), max_size=40)
int64s = st.integers(-(2**63), 2**63 - 1)
seeds = st.integers(0, 2**64 - 1)


class StoreMachine(RuleBasedStateMachine):
    """Appends, reads and reopens, with the file cut anywhere before it is opened again."""

    @initialize()
    def begin(self):
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name, "journal")
        self.store = EpisodeStore(self.path, max_bytes=0)
        self.model = Model()
        self.waiting: list[int] = []

    def wrote(self, *operation: Any) -> None:
        self.model.operations.append(operation)
        self.model.ends.append(os.path.getsize(self.path))

    @rule(ids=token_ids)
    def append_prompt(self, ids):
        assert self.store.append_prompt(ids) == len(self.model.of("prompt"))
        self.wrote("prompt", ids)

    @rule(value=st.binary(max_size=40))
    def append_settings(self, value):
        assert self.store.append_settings(value) == len(self.model.of("settings"))
        self.wrote("settings", value)

    @precondition(lambda self: self.model.of("prompt") and self.model.of("settings"))
    @rule(data=st.data(), ids=token_ids, seed=seeds, version=int64s, reason=st.booleans())
    def append(self, data, ids, seed, version, reason):
        prompt = data.draw(st.integers(0, len(self.model.of("prompt")) - 1))
        how = data.draw(st.integers(0, len(self.model.of("settings")) - 1))
        floats = st.floats(width=32)
        logprobs = data.draw(st.lists(floats, min_size=len(ids), max_size=len(ids)))
        name = "stop" if reason else "length"
        index = self.store.append(
            prompt, how, ids, logprobs, finish_reason=name, seed=seed, weight_version=version
        )
        arrays = np.array(ids, np.int32).tobytes(), np.array(logprobs, np.float32).tobytes()
        assert index == len(self.model.of("rollout"))
        self.wrote("rollout", index, prompt, how, seed, version, name, *arrays)
        self.waiting.append(index)

    @precondition(lambda self: self.model.of("rollout"))
    @rule(data=st.data(), note=st.binary(max_size=20))
    def annotate(self, data, note):
        index = data.draw(st.integers(0, len(self.model.of("rollout")) - 1))
        self.store.annotate(index, note)
        self.wrote("note", index, note)

    @rule()
    def commit(self):
        self.store.commit()

    @rule(n=st.integers(1, 5))
    def take(self, n):
        assert [r.index for r in self.store.take(n, timeout=0)] == self.waiting[:n]
        del self.waiting[:n]

    @rule(data=st.data(), closed=st.booleans(), cut=st.booleans())
    def reopen(self, data, closed, cut):
        if closed:
            self.store.close()
        del self.store
        size = os.path.getsize(self.path)
        if cut:
            size = data.draw(st.integers(0, size))
            os.truncate(self.path, size)
            self.model.cut(size)
        self.store = EpisodeStore(self.path, max_bytes=0)
        self.waiting = list(range(len(self.model.of("rollout"))))
        self.compare()
        found = self.store.recovery
        assert found.end + found.dropped == size
        assert (found.reason is None) == (found.dropped == 0)
        assert found.end >= max(self.model.ends, default=0)

    def compare(self):
        rollouts = self.model.of("rollout")
        assert [plain(r) for r in self.store] == rollouts
        for number, (ids,) in enumerate(self.model.of("prompt")):
            assert self.store.prompt(number).tolist() == ids
        for number, (value,) in enumerate(self.model.of("settings")):
            assert self.store.settings(number) == value
        for number in range(len(rollouts)):
            notes = [note for index, note in self.model.of("note") if index == number]
            assert self.store.notes(number) == notes

    def teardown(self):
        if hasattr(self, "store"):
            self.compare()
            self.folder.cleanup()


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


# ------------------------------------------------------------------------- killed and torn


def content(index: int) -> tuple[np.ndarray, np.ndarray, bytes]:
    """Of the rollout with this number."""
    rng = np.random.default_rng(index)
    length = int(rng.integers(0, 300))
    ids = rng.integers(0, 2**31, length, dtype=np.int32)
    return ids, rng.standard_normal(length, dtype=np.float32), b"note" * int(rng.integers(0, 9))


def write_for_ever(path: Path, acknowledge: int) -> None:
    """Append to a journal and say over a pipe how many rollouts a commit has covered."""
    store = prepared(path)
    for index in range(1 << 20):
        ids, logprobs, note = content(index)
        store.append(0, 0, ids, logprobs, **HOW | {"seed": index})
        store.annotate(index, note)
        if index % 6 == 5:
            store.commit()
            os.write(acknowledge, (index + 1).to_bytes(4, "little"))


def acknowledged_by_a_child_that_dies(path: Path, at_byte: int) -> int:
    """How many rollouts a child acknowledged before the kernel killed it in the middle of a write,
    with ``at_byte`` bytes of the file written."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (at_byte, at_byte))
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            write_for_ever(path, write)
        finally:
            os._exit(1)
    os.close(write)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXFSZ, status
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read()
    return int.from_bytes(said[-4:], "little")


def check_content(store: EpisodeStore) -> None:
    """All but the last rollout have the note that was written right after them."""
    for index in range(len(store)):
        ids, logprobs, note = content(index)
        found = store[index]
        assert found.seed == index
        assert found.token_ids.tobytes() == ids.tobytes()
        assert found.logprobs.tobytes() == logprobs.tobytes()
        assert store.notes(index) == [note] or (index == len(store) - 1 and not store.notes(index))


def test_nothing_acknowledged_is_lost_when_the_writer_dies_at_any_byte(tmp_path):
    rng = random.Random(1)
    acknowledged = 0
    for trial in range(200):
        path = tmp_path / str(trial)
        at_byte = rng.randrange(24_000)
        said = acknowledged_by_a_child_that_dies(path, at_byte)
        acknowledged += said
        assert path.stat().st_size == at_byte
        store = EpisodeStore(path)
        assert len(store) >= said
        check_content(store)
        found = store.recovery
        assert found.end + found.dropped == at_byte
        where = f"{'entry' if found.end else 'header'} at byte {found.end}: cut short"
        assert found.reason is None or found.reason.startswith(where)
    assert acknowledged > 200


def test_damage_before_a_commit_is_found_and_left_alone(tmp_path):
    path = tmp_path / "j"
    store = prepared(path)
    for index in range(5):
        store.append(0, 0, *content(index)[:2], **HOW)
    store.close()
    data = bytearray(path.read_bytes())
    data[200] ^= 4
    path.write_bytes(data)
    with pytest.raises(
        CorruptJournal, match=rf"^{path} is damaged: entry at byte \d+, .*"
    ) as caught:
        EpisodeStore(path)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == data


def test_a_file_of_something_else_is_left_alone(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("dear diary")
    with pytest.raises(NotAJournal, match=rf"^{path} is no journal: it does not begin as one$"):
        EpisodeStore(path)
    assert path.read_text() == "dear diary"


@pytest.mark.parametrize("name", [b"caf\xe9", "über 🙂".encode(), b"\xff\xfe"])
def test_paths_are_whatever_the_file_system_takes(tmp_path, name):
    path = os.fsencode(tmp_path) + b"/" + name
    with prepared(path) as store:
        with pytest.raises(BlockingIOError, match="is open already") as caught:
            EpisodeStore(os.fsdecode(path))
        assert os.fsencode(str(caught.value.strerror)).startswith(path + b" is open")
        assert store.prompt(0).tolist() == [1, 2, 3]
    for same in (path, os.fsdecode(path), Path(os.fsdecode(path))):
        assert EpisodeStore(same).prompt(0).tolist() == [1, 2, 3]
    Path(os.fsdecode(path)).write_text("dear diary")
    with pytest.raises(CorruptJournal, match="is no journal") as found:
        EpisodeStore(path)
    assert os.fsencode(str(found.value)).startswith(path + b" is no")


def test_an_open_journal_is_opened_by_nobody_else(tmp_path):
    store = EpisodeStore(tmp_path / "j")
    with pytest.raises(BlockingIOError, match="is open already"):
        EpisodeStore(tmp_path / "j")
    store.close()
    EpisodeStore(tmp_path / "j").close()


def test_a_full_disk_loses_nothing_before_it(tmp_path):
    path = tmp_path / "j"
    store = prepared(path)
    store.append(0, 0, [1], [0.0], **HOW)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 1000, before[1]))
    try:
        with pytest.raises(OSError, match="cannot be written: File too large"):
            store.append(0, 0, np.zeros(5000, "i4"), np.zeros(5000, "f4"), **HOW)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    store.append(0, 0, [2], [0.0], **HOW)
    assert [r.token_ids.tolist() for r in store] == [[1], [2]]
    store.close()
    assert EpisodeStore(path).recovery.reason is None


def test_close_lets_go_of_the_file_when_it_cannot_be_marked(tmp_path):
    path = tmp_path / "j"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OSError, match="cannot be written: File too large"), prepared(path) as s:
            resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size, before[1]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    with EpisodeStore(path) as again:
        assert again.prompt(0).tolist() == s.prompt(0).tolist() == [1, 2, 3]
    s.close()


def test_judgments_and_scores_come_when_they_come(tmp_path):
    """While others append and take, and they are the rollout's for good."""
    store = prepared(tmp_path / "j")
    for _ in range(3):
        store.append(0, 0, [1], [0.0], **HOW)
    (first, second) = store.take(2)
    store.annotate(second.index, json.dumps({"score": 0.75}).encode())
    store.append(0, 0, [2], [0.0], **HOW)
    store.annotate(first.index, b"Zu kurz.")
    store.annotate(second.index, b"\0")
    expected = [[b"Zu kurz."], [b'{"score": 0.75}', b"\0"], [], []]
    assert [store.notes(rollout.index) for rollout in store] == expected
    store.close()
    again = EpisodeStore(tmp_path / "j")
    assert [again.notes(rollout.index) for rollout in again] == expected


# ------------------------------------------------------------------------------------- forked


def in_a_child(work: Callable[[], None]) -> None:
    """Run in a forked process; what it raises fails here, and so does one that hangs."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert status == 0
            return
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    pytest.fail("the child hangs")


def test_a_forked_child_reads_and_never_writes(tmp_path):
    path = tmp_path / "j"
    store = prepared(path)
    store.append(0, 0, [1, 2], [0.0, -1.0], **HOW)
    held = store[0].token_ids

    def child() -> None:
        for write in (
            lambda: store.append_prompt([1]),
            lambda: store.append_settings(b""),
            lambda: store.append(0, 0, [1], [0.0], **HOW),
            lambda: store.annotate(0, b"note"),
            lambda: store.take(1),
            lambda: store.commit(),
        ):
            with pytest.raises(ValueError, match=f"^the store is open in process {os.getppid()}, "):
                write()
        store.close()
        assert held.tolist() == store[0].token_ids.tolist() == [1, 2]
        assert store.prompt(0).tolist() == [1, 2, 3] and store.settings(0) == b"{}"

    before = path.read_bytes()
    in_a_child(child)
    assert path.read_bytes() == before
    # The lock is there yet.
    with pytest.raises(BlockingIOError, match="is open already"):
        EpisodeStore(path)
    store.append(0, 0, [3], [-2.0], **HOW)
    store.close()
    assert [r.token_ids.tolist() for r in EpisodeStore(path)] == [[1, 2], [3]]


# -------------------------------------------------------------------------- waiting and taking


def test_take_waits_until_there_are_enough():
    store = prepared()
    found: list[list[int]] = []
    consumer = threading.Thread(target=lambda: found.append([r.index for r in store.take(3)]))
    consumer.start()
    for _ in range(3):
        assert not found
        store.append(0, 0, [], [], **HOW)
    consumer.join(10)
    assert found == [[0, 1, 2]]


def test_append_waits_while_enough_are_there_to_be_taken():
    store = prepared(capacity=2)
    for _ in range(2):
        store.append(0, 0, [], [], **HOW)
    with pytest.raises(TimeoutError, match=r"^append: 2 rollouts wait to be taken$"):
        store.append(0, 0, [], [], timeout=0.01, **HOW)
    done = threading.Event()

    def produce() -> None:
        store.append(0, 0, [], [], **HOW)
        done.set()

    producer = threading.Thread(target=produce)
    producer.start()
    # What is no rollout need not wait behind one.
    store.annotate(0, b"x")
    assert not done.wait(0.1)
    assert len(store.take(1)) == 1
    producer.join(10)
    assert done.is_set() and len(store) == 3


def test_close_ends_all_waits():
    store = prepared(capacity=1)
    store.append(0, 0, [], [], **HOW)
    errors: list[str] = []

    def produce() -> None:
        with pytest.raises(ValueError) as caught:
            store.append(0, 0, [], [], **HOW)
        errors.append(str(caught.value))

    producer = threading.Thread(target=produce)
    producer.start()
    time.sleep(0.05)
    store.close()
    producer.join(10)
    assert errors == ["the store is closed"]
    assert len(store.take(1)) == 1 and store.take(1) == []


@contextmanager
def interrupt_after(seconds: float) -> Iterator[None]:
    """Ctrl-C, as the main thread sees it."""
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_ctrl_c_ends_a_wait():
    store = prepared(capacity=1)
    with interrupt_after(0.1), pytest.raises(KeyboardInterrupt):
        store.take(1, timeout=30)
    store.append(0, 0, [], [], **HOW)
    with interrupt_after(0.1), pytest.raises(KeyboardInterrupt):
        store.append(0, 0, [], [], timeout=30, **HOW)
    assert len(store) == 1 and len(store.take(1)) == 1


def test_many_producers_and_consumers(tmp_path):
    store = prepared(tmp_path / "j", capacity=8)
    taken: list[int] = []

    def produce(first: int) -> None:
        for seed in range(first, first + 100):
            store.append(0, 0, [seed] * (seed % 50), [-1.0] * (seed % 50), **HOW | {"seed": seed})
            store.commit()

    def consume() -> None:
        while got := store.take(4):
            for rollout in got:
                assert rollout.token_ids.tolist() == [rollout.seed] * (rollout.seed % 50)
                taken.append(rollout.seed)

    consumers = [threading.Thread(target=consume) for _ in range(3)]
    producers = [threading.Thread(target=produce, args=(100 * p,)) for p in range(4)]
    for thread in consumers + producers:
        thread.start()
    for thread in producers:
        thread.join(30)
    store.close()
    for thread in consumers:
        thread.join(30)
    assert sorted(taken) == list(range(400))


# ------------------------------------------------------------------ engine calls, made once

PROMPTS = [np.array(ids, np.int32) for ids in ([1, 2], [1, 2], [3])]
SEEDS = [10, 11, 12]


def answers() -> list[Rollout]:
    return [
        Rollout(np.arange(n, dtype=np.int32), np.full(n, -n, np.float32), reason, 4)
        for n, reason in ((3, "stop"), (0, "stop"), (5, "length"))
    ]


def bits(rollouts: list[Rollout]) -> list[tuple[Any, ...]]:
    return [
        (r.token_ids.tobytes(), r.logprobs.tobytes(), r.finish_reason, r.weight_version)
        for r in rollouts
    ]


def sampled_again() -> list[Rollout]:
    raise AssertionError("sampled again")


def test_an_engine_call_is_made_once(tmp_path):
    path, said = tmp_path / "episodes" / "j", []
    call = {"weights": "abc", "temperature": 0.7}
    first = sample_once(path, call, PROMPTS, SEEDS, answers, said.append)
    assert bits(first) == bits(answers()) and said == []
    again = sample_once(path, call, PROMPTS, SEEDS, sampled_again, said.append)
    assert bits(again) == bits(answers())
    assert said == [f"{path}: 3 rollouts were sampled before, and are used"]
    # An equal prompt is stored once.
    with EpisodeStore(path) as store:
        assert [rollout.prompt for rollout in store] == [0, 0, 1]


@pytest.mark.parametrize(
    ("call", "prompts", "seeds", "why"),
    [
        ({"w": 2}, PROMPTS, SEEDS, "its rollouts are another call's"),
        ({"w": 1}, [*PROMPTS[:2], PROMPTS[0]], SEEDS, "its rollouts are another call's"),
        ({"w": 1}, PROMPTS, [10, 11, 13], "its rollouts are another call's"),
        ({"w": 1}, PROMPTS[:2], SEEDS[:2], "it holds 3 of 2 rollouts"),
    ],
)
def test_another_call_is_sampled_anew(tmp_path, call, prompts, seeds, why):
    path, said = tmp_path / "j", []
    sample_once(path, {"w": 1}, PROMPTS, SEEDS, answers, said.append)
    new = sample_once(path, call, prompts, seeds, lambda: answers()[-len(seeds) :], said.append)
    assert bits(new) == bits(answers()[-len(seeds) :])
    assert said == [f"{path}: {why}; they are sampled anew"]
    sample_once(path, call, prompts, seeds, sampled_again, said.append)


def test_a_call_that_was_cut_short_or_damaged_is_sampled_anew(tmp_path):
    path, said = tmp_path / "j", []
    sample_once(path, {}, PROMPTS, SEEDS, answers, said.append)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    sample_once(path, {}, PROMPTS, SEEDS, answers, said.append)
    assert re.search(r"it holds \d of 3 rollouts; they are sampled anew$", said[-1])
    path.write_bytes(whole[:100] + b"?" + whole[101:])
    sample_once(path, {}, PROMPTS, SEEDS, answers, said.append)
    assert re.search(r"is damaged: entry at byte \d+, .*; they are sampled anew$", said[-1])
    sample_once(path, {}, PROMPTS, SEEDS, sampled_again, said.append)


def test_ranks_that_share_an_engine_use_all_their_journals_or_none(tmp_path):
    """Half of an engine call is another call, which may sample other tokens."""
    path, said, asked = tmp_path / "j", [], []

    def but_the_other(here: bool) -> bool:
        asked.append(here)
        return False

    def call(generate, all_agree=bool):
        return sample_once(path, {}, PROMPTS, SEEDS, generate, said.append, all_agree)

    first = call(answers, but_the_other)
    assert bits(first) == bits(answers()) and said == []
    again = call(lambda: answers()[::-1], but_the_other)
    assert bits(again) == bits(answers()[::-1])
    assert said == [
        f"{path}: a rank that shares the engine lost its rollouts; all are sampled anew"
    ]
    assert asked == [False, True]
    assert bits(call(sampled_again)) == bits(answers()[::-1])


def test_a_file_of_something_else_is_not_sampled_over(tmp_path):
    path = tmp_path / "0000-0.journal"
    path.write_text("dear diary")
    with pytest.raises(ConfigError, match=rf"^{path} is no journal: .*: move it away$"):
        sample_once(path, {}, PROMPTS, SEEDS, sampled_again, print)
    assert path.read_text() == "dear diary"


def test_journals_of_another_version_are_sampled_anew(tmp_path):
    path, said = tmp_path / "j", []
    sample_once(path, {}, PROMPTS, SEEDS, answers, said.append)
    data = bytearray(path.read_bytes())
    data[8] += 1
    path.write_bytes(data)
    assert bits(sample_once(path, {}, PROMPTS, SEEDS, answers, said.append)) == bits(answers())
    assert re.search(r"is a journal of version 2; .*; they are sampled anew$", said[-1])


def test_journals_of_earlier_rounds_are_forgotten(tmp_path):
    paths = [journal_path(str(tmp_path), i, rank) for i in (0, 3, 12, 10_000) for rank in (0, 11)]
    others = [paths[0].with_name(name) for name in ("0000.jsonl", "judge-replies.jsonl")]
    paths[0].parent.mkdir()
    for path in paths + others:
        path.touch()
    forget_journals(str(tmp_path), 12)
    assert sorted(paths[0].parent.iterdir()) == sorted(paths[4:] + others)
    forget_journals(str(tmp_path / "nowhere"), 12)


def test_a_thread_that_waits_does_not_spoil_the_end_of_the_process():
    program = """
import threading, time
from fastalign._bridge import EpisodeStore
store = EpisodeStore()
threading.Thread(target=lambda: store.take(1), daemon=True).start()
time.sleep(0.2)
"""
    for _ in range(4):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
