"""Files on their way to the disk: written at once, or behind the training from copies of what it
goes on to change."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.utils._pytree import tree_leaves


class HostMemory:
    """Copies of tensors in the host's memory, which the copies of the next time use again.

    A storage is copied once and whole, so that a file of copies is the file of the tensors, to the
    last byte where those are on the host too.
    """

    def __init__(self) -> None:
        self._buffers: list[torch.UntypedStorage] = []
        self._used = 0

    def reuse(self) -> None:
        """Give what was copied before up to what is copied next."""
        self._used = 0

    def copy(self, state: Any) -> Any:
        """A deep copy of dicts, lists and tuples of tensors and whatever else."""
        storages: dict[int, torch.UntypedStorage] = {}
        copies: dict[int, Any] = {}
        for leaf in tree_leaves(state):
            if not isinstance(leaf, torch.Tensor):
                continue
            source = leaf.untyped_storage()
            if source._cdata not in storages:
                storages[source._cdata] = self._copy(source)
            made = torch.empty(0, dtype=leaf.dtype).set_(
                storages[source._cdata], leaf.storage_offset(), leaf.size(), leaf.stride()
            )
            # DeepSpeed gives some of its tensors names.
            vars(made).update(copy.deepcopy(vars(leaf)))
            copies[id(leaf)] = made.requires_grad_(leaf.requires_grad)
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        # It takes what it finds there for copies that it has made.
        return copy.deepcopy(state, copies)

    def _copy(self, source: torch.UntypedStorage) -> torch.UntypedStorage:
        size, index = source.nbytes(), self._used
        self._used += 1
        if index == len(self._buffers) or self._buffers[index].nbytes() != size:
            pinned = source.device.type == "cuda"
            made = torch.empty(size, dtype=torch.uint8, pin_memory=pinned).untyped_storage()
            self._buffers[index : index + 1] = [made]
        return self._buffers[index].copy_(source, non_blocking=True)


class Writer:
    """Writes this rank's files of a folder, brings them to the disk, and keeps their hashes.

    Args:
        folder: of all ranks' files.
        memory: write behind the training, in a thread, from copies that are kept there; None: at
            once.
    """

    def __init__(self, folder: Path, memory: HostMemory | None = None) -> None:
        self.folder = folder
        self.problem: str | None = None
        self._memory = memory
        self._hashes: dict[str, str] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._work: list[Future[None]] = []
        if memory is not None:
            memory.reuse()
            self._pool = ThreadPoolExecutor(1, "checkpoint")

    def write(self, path: Path, save: Callable[[Path], object]) -> None:
        """Have ``save`` write a file; what the disk refuses becomes ``problem``, behind which
        nothing is written any more.  What training goes on to change is not for ``save`` to read.
        """
        if self._pool is None:
            self._write(path, save)
        else:
            self._work.append(self._pool.submit(self._write, path, save))

    def write_state(self, path: Path, state: Any) -> None:
        """Have torch write a state as it is now."""
        if self._memory is not None:
            state = self._memory.copy(state)

        def save(path: Path) -> None:
            # Not to a path, for then torch hides what the disk says.
            with path.open("wb") as file:
                torch.save(state, file)

        self.write(path, save)

    def end(self, hashes: Path) -> None:
        """No more files but the one with the hashes of all before, which is the last."""
        self.write(hashes, lambda path: path.write_text(json.dumps(self._hashes)))
        if self._pool is not None:
            self._pool.shutdown(wait=False)

    @property
    def done(self) -> bool:
        return all(work.done() for work in self._work)

    def wait(self) -> None:
        """Until all is written, or ``problem`` says what is not."""
        for work in self._work:
            work.result()

    def _write(self, path: Path, save: Callable[[Path], object]) -> None:
        if self.problem is not None:
            return
        with self.noting():
            save(path)
            sync(path)
            self._hashes[path.relative_to(self.folder).as_posix()] = hash_file(path)

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """What the disk refuses inside the block becomes ``problem``: other ranks may wait for this
        one until they can be told."""
        try:
            yield
        except (OSError, SafetensorError, RuntimeError) as error:
            # Behind an error of the disk torch raises one of its own.
            if isinstance(error, RuntimeError) and not isinstance(error.__context__, OSError):
                raise
            self.problem = reason(error)


def reason(error: BaseException) -> str:
    """The system's own words, from wherever they are hidden."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return str(error).splitlines()[0]


def sync(path: Path) -> None:
    """Bring a file or a folder's names to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def hash_file(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
