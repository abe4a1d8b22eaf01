"""The native core (csrc/). What takes time releases the GIL while it works or waits."""

from collections.abc import Iterator, Sequence
from os import PathLike
from types import TracebackType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

class Ragged:
    """E examples of S token streams in all, borrowed and measured, to be packed.

    A pack is cut into segments: the tokens of a segment are the queries of one attention call, and
    its keys are all tokens of its stream so far. A stream is one segment. With ``share_prefixes``
    the prompt of an example, the longest common prefix of its streams, lies in the pack once, as a
    segment of its own before theirs. It ends before the first trained token of any of them and
    leaves each a token. Examples of the same prompt share it where they follow one another in a
    pack. Nothing behind the prompt is shared, also not where streams are the same.

    The arrays are borrowed, not copied. A buffer other than a numpy array serves as well.

    Args:
        input_ids: S contiguous int32 arrays, none empty; stream s has L_s tokens.
        loss_mask: S contiguous bool or uint8 arrays; entry t of array s says whether token t of
            stream s is trained on. Entry 0 is false: no token predicts the first one.
        counts: int64 [E]; how many of the streams each example takes, 1 or more, S in all.
        weights: float32 [E]; weight of each example.
        share_prefixes: whether streams share the prompts of their examples.

    Raises:
        TypeError: an item has no buffer (a list, a tensor).
        ValueError: an array has another dtype, shape, stride or length than it should, a sequence
            is empty, or its first token is trained on.
    """

    def __init__(
        self,
        input_ids: Sequence[Any],
        loss_mask: Sequence[Any],
        counts: NDArray[np.int64],
        weights: NDArray[np.float32],
        share_prefixes: bool = False,
    ) -> None: ...
    @property
    def tokens(self) -> NDArray[np.int64]:
        """[E] tokens of each example alone in a pack, shared ones counted once."""

    @property
    def rows(self) -> NDArray[np.int64]:
        """[E] trained tokens."""

    @property
    def pairs(self) -> NDArray[np.float64]:
        """[E] pairs of query and key that causal attention computes for each example alone."""

    def plan(
        self, budget: int, ranks: int, token: float, pair: float, row: float
    ) -> list[list[list[int]]]:
        """Group the examples into packs of at most ``budget`` tokens, as many on every rank.

        As :func:`plan` does it, with the examples of one prompt as one: whole, cut at the borders
        of examples where they hold more behind the prompt than a fair share of a pack, a half, a
        quarter or an eighth of it, or each by itself. Of these five plans it is the one with the
        fewest steps, and of those the one that costs least where ranks wait for one another after
        every pack. So sharing never takes a step more than planning each example by itself.

        Args:
            budget: most tokens in a pack. An example with more has a pack of its own.
            ranks: number of ranks.
            token, pair, row: what a token, a pair of query and key, and a row cost, in any unit.

        Returns:
            By rank, by pack, example indices, as :func:`plan` does; those of one prompt lie side by
            side, in ascending order.

        Raises:
            ValueError: a value out of range, or costs that are negative or not finite.
        """

    def layout(self, examples: NDArray[np.int64]) -> tuple[int, list[tuple[str, str, int, int]]]:
        """The bytes that a pack of these examples takes, and its arrays in them.

        Of R examples, S streams, G segments, T tokens, M rows and K keys. Arrays begin at multiples
        of 64 bytes. K = T means that nothing is shared; ``key_index`` and ``cu_seqlens_k`` are left
        out then.

        ================  ===========  =========================================================
        ``input_ids``     int64 [T]    the tokens
        ``positions``     int64 [T]    position of each in its stream, from 0
        ``rows``          int64 [M]    flat position whose next token in the stream is trained on
        ``targets``       int64 [M]    that next token
        ``streams``       int64 [M]    stream of each row, ascending
        ``key_index``     int64 [K]    flat positions of all keys, segment by segment
        ``records``       int64 [S]    which of the R examples each stream belongs to
        ``cu_seqlens_q``  int32 [G+1]  segment g is tokens cu_seqlens_q[g] : cu_seqlens_q[g + 1]
        ``cu_seqlens_k``  int32 [G+1]  the same of its keys in ``key_index``
        ``cu_rows``       int32 [S+1]  stream s has rows cu_rows[s] : cu_rows[s + 1]
        ``segments``      int32 [S]    the segment that each stream ends with
        ``weights``       float32 [R]  weight of each example
        ================  ===========  =========================================================

        Returns:
            (bytes, [(name, dtype, begin, end), ...]) with begin and end in bytes.

        Raises:
            ValueError: an index that is no example's, or more than 2^31 - 1 keys, which int32
                offsets cannot count.
        """

    def fill(self, examples: NDArray[np.int64], memory: NDArray[np.uint8]) -> None:
        """Write a pack of these examples, in this order, into memory as :meth:`layout` has it.

        Args:
            examples: int64 [R]; indices of examples.
            memory: writable uint8 array, aligned to 8 bytes, as long as the layout says. After an
                error its content means nothing.

        Raises:
            ValueError: a token id is negative, a mask is not the one that was measured, or memory
                of another size.
        """

def plan(
    lengths: NDArray[np.int64], costs: NDArray[np.float64], budget: int, ranks: int
) -> list[list[list[int]]]:
    """Group E examples into packs of at most ``budget`` tokens, as many on every rank.

    First-fit decreasing finds how many packs there must be. The examples are then spread, longest
    first, over that number rounded up to a multiple of ``ranks``: evenly by cost, where that would
    break the budget evenly by tokens, and where that would too as first-fit has them. The packs are
    dealt out to the ranks in rounds, costliest first. In each round single examples are moved from
    its costliest pack to its cheapest, or swapped between these two, while their costs get closer:
    until they differ by a thousandth at most, the budget allows no such exchange, or there were as
    many as the round has examples.

    The costs of two ranks never differ by more than two packs of the same round do. That is less
    than the costliest example where the budget lets any example go to the cheaper pack. It is not
    guaranteed where packs are full to the brim, and no plan could be where they hold one example
    each. The result depends on the arguments alone, so ranks agree without a message.

    Args:
        lengths: int64 [E]; tokens of each example, from 1 to 2^31 - 1.
        costs: float64 [E]; what each example costs, in any unit; finite and not negative.
        budget: most tokens in a pack. An example with more has a pack of its own.
        ranks: number of ranks.

    Returns:
        By rank, by pack, example indices in ascending order. The packs of a rank come costliest
        first, so that packs that run at the same time are alike and a batch that does not fit in
        memory fails early. With fewer packs than there is room for, a rank's last ones are empty.
        No examples means no packs.

    Raises:
        TypeError: ``lengths`` or ``costs`` has no buffer.
        ValueError: a value out of range, or an array of another dtype, shape or stride.
    """

class CorruptJournal(ValueError):
    """A file that cannot be the journal of an :class:`EpisodeStore`: something else, another
    version, or damaged before its last commit. The message names file and offset."""

class NotAJournal(CorruptJournal):
    """A file of something else: it does not even begin as a journal."""

class Recovery:
    """What opening a journal found.

    Attributes:
        end: bytes of the file that are whole; what is appended goes on here.
        dropped: bytes behind them that were cut off, never committed.
        reason: why, with the offset; None where nothing was dropped.
    """

    @property
    def end(self) -> int: ...
    @property
    def dropped(self) -> int: ...
    @property
    def reason(self) -> str | None: ...

class StoredRollout:
    """A rollout in an :class:`EpisodeStore`; its arrays are read-only views of the file, without a
    copy, and live on for as long as anyone holds them. ``torch.from_dlpack`` takes them as they
    lie; what is written to such a tensor stays in this process, where other views of the rollout
    may show it, and never reaches the file. A file that somebody else cuts short ends the process
    that reads a view of what was cut off (SIGBUS).

    Attributes:
        index: its number in the store, from 0.
        prompt, settings: their numbers in the store.
        token_ids: int32 [L].
        logprobs: float32 [L].
    """

    @property
    def index(self) -> int: ...
    @property
    def prompt(self) -> int: ...
    @property
    def settings(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def weight_version(self) -> int: ...
    @property
    def finish_reason(self) -> Literal["stop", "length"]: ...
    @property
    def token_ids(self) -> NDArray[np.int32]: ...
    @property
    def logprobs(self) -> NDArray[np.float32]: ...

class EpisodeStore:
    """Rollouts, appended by samplers and taken by trainers, in a journal that survives them.

    Any number of threads may use it at the same time. What a method appended survives the death of
    the process; after :meth:`commit` it survives that of the machine.

    A process that was forked from the one that opened it may hold and make views, unless a thread
    was using the store when it was forked. What writes, commits or takes is a ValueError there, and
    :meth:`close` does nothing.
    """

    def __init__(
        self,
        path: str | bytes | PathLike[str] | PathLike[bytes] | None = None,
        *,
        max_bytes: int = 2**28,
        capacity: int | None = None,
    ) -> None:
        """Open the journal, or begin one. All rollouts that it holds are to be taken (again).

        Args:
            path: of the file, as ``open`` takes it; None: a file without a name in TMPDIR, which
                goes with the store.
            max_bytes: most of the file that stays mapped into memory without anybody holding it,
                in pieces of 8 MiB; the rest is mapped again when it is asked for. Beside it the
                store keeps about 64 bytes for each rollout.
            capacity: rollouts that may wait to be taken before :meth:`append` waits; None: any
                number.

        Raises:
            CorruptJournal, NotAJournal: see there; the file is left as it is.
            OSError: the file cannot be opened, read or written, or another store has it open
                (BlockingIOError).
        """

    @property
    def recovery(self) -> Recovery:
        """What was found at ``path``."""

    def append_prompt(self, token_ids: Sequence[int] | NDArray[np.int32 | np.int64]) -> int:
        """Store a prompt; returns its number.

        Raises:
            ValueError: an id is outside 0 to 2^31 - 1, or the store is closed.
            TypeError: an item is no integer.
            OSError: the file cannot be written; nothing has changed.
        """

    def append_settings(self, settings: bytes) -> int:
        """Store what many rollouts have in common: how they were sampled; returns its number."""

    def append(
        self,
        prompt: int,
        settings: int,
        token_ids: Sequence[int] | NDArray[np.int32 | np.int64],
        logprobs: Sequence[float] | NDArray[np.float32 | np.float64],
        *,
        finish_reason: Literal["stop", "length"],
        seed: int,
        weight_version: int,
        timeout: float | None = None,
    ) -> int:
        """Store a rollout; returns its number.

        Args:
            prompt, settings: their numbers.
            token_ids, logprobs: [L], a list, a tuple or an array each.
            seed: from 0 to 2^64 - 1.
            timeout: seconds to wait where ``capacity`` rollouts are there to be taken; None: for
                ever. Ctrl-C ends a wait.

        Raises:
            ValueError: lengths differ, a value is out of range, the prompt or the settings are not
                in the store, or the store is closed, also while waiting.
            TypeError: an item is no number.
            TimeoutError: the time was up; nothing has changed.
            OSError: the file cannot be written; nothing has changed.
        """

    def annotate(self, rollout: int, note: bytes) -> None:
        """Add a judgment, a score or anything else to a rollout."""

    def take(self, n: int = 1, timeout: float | None = None) -> list[StoredRollout]:
        """The oldest ``n`` rollouts that nobody took since the store was opened.

        Waits until there are so many. Once ``timeout`` seconds are over or the store is closed, it
        returns those there are, maybe none. Ctrl-C ends a wait.

        Raises:
            ValueError: ``n`` is not from 1 to ``capacity``, or ``timeout`` is negative.
        """

    def __len__(self) -> int:
        """Number of rollouts, taken or not."""

    def __getitem__(self, rollout: int) -> StoredRollout:
        """A rollout by its number, from 0.

        Raises:
            IndexError: there is none.
        """

    def __iter__(self) -> Iterator[StoredRollout]:
        """All rollouts, also those appended meanwhile."""

    def prompt(self, prompt: int) -> NDArray[np.int32]:
        """[P] a prompt by its number, a view as those of :class:`StoredRollout`."""

    def settings(self, settings: int) -> bytes:
        """Settings by their number."""

    def notes(self, rollout: int) -> list[bytes]:
        """What was added to a rollout, oldest first."""

    def commit(self) -> None:
        """Return once everything appended is on the disk. Calls at the same time share a sync;
        where nothing is new, nothing is written.

        Raises:
            OSError: the disk failed, and the store takes nothing any more; or it is full, and the
                next commit finishes what this one began.
        """

    def close(self) -> None:
        """Commit, end all waits, and let others open the file, also where the commit fails.

        Nothing can be appended any more; what is there can still be taken and read. A second call
        does nothing.

        Raises:
            OSError: see :meth:`commit`.
        """

    def __enter__(self) -> EpisodeStore: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

def sample(
    logits: NDArray[np.float32] | NDArray[np.uint16],
    seeds: NDArray[np.uint64],
    positions: NDArray[np.uint64],
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    threads: int = 1,
    isa: str = "best",
) -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.float32]]:
    """Draw one token from each of B rows of logits.

    The temperature divides the logits; min-p then drops the tokens less probable than ``min_p``
    times the most probable one, top-k keeps the k most probable of the rest, and top-p the fewest
    most probable of those whose probabilities, after top-k, sum to at least ``top_p``. Among equal
    logits the lower token id ranks first. A token of -infinity is never drawn.

    Row b is drawn with the number that Philox4x32-10 gives for (seeds[b], positions[b]). Equal
    bits of a row, its seed, its position and the settings give the same bits of the results,
    whatever else is in the batch, whatever the threads, the instruction set and the machine.

    Args:
        logits: [B, V] float32, or uint16 that holds the bits of bfloat16. Each row is contiguous;
            rows may lie apart.
        seeds: uint64 [B]; of the requests.
        positions: uint64 [B]; of the tokens in their requests.
        temperature: 0 takes the largest logit (of equal ones the lowest id), or from 1e-6 to 1e6.
        top_k: off below 1 and from V.
        top_p: above 0 and at most 1, which is off.
        min_p: from 0, which is off, to 1.
        threads: the most to work on, the caller's included; few logits are left to fewer.
        isa: "best", or one of :func:`sampler_isas` (for tests: the results are the same).

    Returns:
        Token ids int32 [B]; their log-probs float32 [B] under the softmax of the logits as they
        are; their log-probs float32 [B] under the distribution that they were drawn from.

    Raises:
        TypeError: an argument has no buffer.
        ValueError: a setting out of range; an array of another dtype, shape or stride; a row that
            holds NaN, +infinity or nothing but -infinity (the first such row is named).
    """

def sampler_isas() -> list[str]:
    """Instruction sets that :func:`sample` runs on here, of "portable", "avx2", "avx512"."""

class TokenBytes:
    """The bytes that each token of a vocabulary decodes to."""

    def __init__(self, tokens: Sequence[bytes]) -> None:
        """``tokens[i]`` is the text of token id i."""

class StopMatcher:
    """Finds stop strings in the text of rows that grow by a token at a time.

    Bytes are matched, so a string may begin and end inside tokens.
    """

    def __init__(self, tokens: TokenBytes, stop: Sequence[bytes], rows: int) -> None:
        """``rows`` rows without text yet.

        Raises:
            ValueError: a stop string is empty.
        """

    def push(self, rows: NDArray[np.int64], token_ids: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Append token_ids[i] to row rows[i]; tells for each whether a stop string ends in it.

        Token ids beyond the table have no text.

        Raises:
            TypeError: an argument has no buffer.
            ValueError: there is no such row, an id is negative, or an array has another dtype,
                shape or stride.
        """
