"""The native batching core (csrc/). Both functions release the GIL while they work."""

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
