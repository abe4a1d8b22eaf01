"""The native batching core (csrc/). It releases the GIL while it works."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

class Ragged:
    """E examples of S token streams in all, borrowed and measured, to be packed.

    A pack is cut into segments: the tokens of a segment are the queries of one attention call, and
    its keys are all tokens of its stream so far. A stream is one segment. With ``share_prefixes``
    the longest common prefix of an example's streams lies in the pack once, as a segment of its own
    before theirs. It ends before the first trained token of any of them and leaves each a token.

    The arrays are borrowed, not copied. A buffer other than a numpy array serves as well.

    Args:
        input_ids: S contiguous int32 arrays, none empty; stream s has L_s tokens.
        loss_mask: S contiguous bool or uint8 arrays; entry t of array s says whether token t of
            stream s is trained on. Entry 0 is false: no token predicts the first one.
        counts: int64 [E]; how many of the streams each example takes, 1 or more, S in all.
        weights: float32 [E]; weight of each example.
        share_prefixes: whether examples of several streams share prefixes.

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
        """[E] tokens of each example in a pack, shared ones counted once."""

    @property
    def rows(self) -> NDArray[np.int64]:
        """[E] trained tokens."""

    @property
    def pairs(self) -> NDArray[np.float64]:
        """[E] pairs of query and key that causal attention computes."""

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
    dealt out to the ranks in rounds, so that the costs of two ranks never differ by more than two
    packs of the same round do: by one pack at most, and by one example where packs are even by
    cost. The result depends on the arguments alone, so ranks agree without a message.

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
