"""linear_logprob over two ranks: a vocabulary in two slices, and a head that ZeRO-3 scatters."""

from __future__ import annotations

import os

import pytest
import torch
from support import TESTS, run_ranks

from fastalign_kernels import linear_logprob

IMPL = os.environ.get("FASTALIGN_IMPL", "torch")


@pytest.mark.parametrize("scenario", ["sliced", "zero3"])
def test_two_ranks_give_what_one_gives(scenario, tmp_path):
    log = tmp_path / "log"
    codes = run_ranks(TESTS / "parallel_head_worker.py", scenario, IMPL, log=log)
    assert codes == [0, 0], log.read_text()[-4000:]


def test_a_start_belongs_to_a_group():
    with pytest.raises(ValueError, match="vocab_start = 3: only a head shared by a group"):
        linear_logprob(
            torch.zeros(1, 4), torch.zeros(7, 4), torch.zeros(1, dtype=torch.int64), vocab_start=3
        )
