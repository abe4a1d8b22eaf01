"""A few of the inputs that `make fuzz-data` makes many of, and those that once broke something."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from fuzz import ACCEPTED, FUZZERS, REFUSED, Reading, fuzz
from support import rows, write_rows

from fastalign import checkpoint, episodes
from fastalign.cli import main
from fastalign.config import ConfigError, DatasetConfig, EndpointConfig, load_config
from fastalign.data import load_records
from fastalign.endpoint import Endpoint
from fastalign.methods import make_method
from fastalign.model import (
    adapter_config,
    init_distributed,
    load_generation_config,
    load_tokenizer,
    trained_on_nf4,
)
from fastalign.plan import calibrate
from fastalign.templates import Renderer, load_template
from fastalign.tracking import Tracker
from fastalign.train import make_examples

# Of each kind, in about two seconds.
INPUTS = {
    "rows": 300, "files": 250, "templates": 300, "recipes": 80, "checkpoints": 150, "forged": 150,
    "journals": 120, "judgments": 400, "models": 200,
}  # fmt: skip

pytestmark = pytest.mark.usefixtures("quiet_process")


@pytest.fixture(scope="module")
def reading(tiny_llama, tmp_path_factory):
    import os

    before = dict(os.environ)
    yield Reading(tiny_llama, tmp_path_factory.mktemp("fuzz"))
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize("kind", FUZZERS)
def test_malformed_inputs_are_named_counted_or_sound(kind, reading):
    counts = fuzz(kind, reading, INPUTS[kind], random_seed=0)
    assert counts.total() == INPUTS[kind]
    # Some are right, so that the others are refused for what is wrong with them.
    assert counts[REFUSED] > counts.total() // 10 and counts.total() > counts[REFUSED], counts
    assert counts[ACCEPTED] or kind == "judgments"
