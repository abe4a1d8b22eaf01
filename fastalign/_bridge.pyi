"""The native core (csrc/). Its functions release the GIL while they work."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

class PackedArrays:
    """S sequences laid end to end: T tokens, of which M positions predict a target.

    The arrays are views of memory that this object owns and that lives as long as any of them.
    """

    @property
    def input_ids(self) -> NDArray[np.int64]:
        """[T] the tokens of all sequences."""

    @property
    def positions(self) -> NDArray[np.int64]:
        """[T] position of each token in its own sequence, from 0."""

    @property
    def cu_seqlens(self) -> NDArray[np.int32]:
        """[S + 1] sequence s is tokens cu_seqlens[s] : cu_seqlens[s + 1]."""

    @property
    def rows(self) -> NDArray[np.int64]:
        """[M] flat positions, ascending, whose next token in the sequence is trained on."""

    @property
    def targets(self) -> NDArray[np.int64]:
        """[M] that next token."""

    @property
    def cu_rows(self) -> NDArray[np.int32]:
        """[S + 1] sequence s has rows cu_rows[s] : cu_rows[s + 1]."""

def pack(
    input_ids: Sequence[NDArray[np.int32]],
    loss_mask: Sequence[NDArray[np.bool_] | NDArray[np.uint8]],
) -> PackedArrays:
    """Lay S token sequences end to end and find the positions that predict a target.

    Args:
        input_ids: S contiguous int32 arrays, none empty; sequence s has L_s tokens.
        loss_mask: S contiguous bool or uint8 arrays; entry t of array s says whether token t of
            sequence s is trained on. Entry 0 is false: no token predicts the first one.

    Raises:
        TypeError: an item has no buffer (a list, a tensor).
        ValueError: the two differ in length, a sequence is empty, its first token is trained on,
            a token id is negative, an array has another dtype, shape or stride, or there are more
            than 2^31 - 1 tokens, which int32 cu_seqlens cannot count.
    """

def plan(lengths: NDArray[np.int64], budget: int, ranks: int) -> list[list[list[int]]]:
    """Group E examples into packs of at most ``budget`` tokens, as many on every rank.

    First-fit decreasing finds how many packs there must be; the examples are then spread evenly,
    longest first, over that number rounded up to a multiple of ``ranks``, and the packs over the
    ranks. The result depends on the arguments alone, so ranks agree without a message.

    Args:
        lengths: int64 [E]; tokens of each example, from 1 to 2^31 - 1.
        budget: most tokens in a pack. An example with more has a pack of its own.
        ranks: number of ranks.

    Returns:
        By rank, by pack, example indices in ascending order. The packs of a rank come with the
        most tokens first, so that packs that run at the same time are alike and a batch that does
        not fit in memory fails at once. With fewer packs than there is room for, a rank's last
        ones are empty. No examples means no packs.

    Raises:
        TypeError: ``lengths`` has no buffer.
        ValueError: a value out of range, or an array of another dtype, shape or stride.
    """

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
