"""A few of the inputs that `make fuzz-data` makes many of, and those that once broke something."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from fuzz import ACCEPTED, FUZZERS, REFUSED, Reading, fuzz
from support import recipe, rows, write_rows

from fastalign import checkpoint, episodes
from fastalign.cli import main
from fastalign.config import ConfigError, DatasetConfig, EndpointConfig, load_config
from fastalign.data import load_records
from fastalign.endpoint import Endpoint
from fastalign.model import (
    adapter_config,
    init_distributed,
    load_generation_config,
    load_tokenizer,
    trained_on_nf4,
)
from fastalign.plan import calibrate
from fastalign.templates import CUT_OFF, NO_ROOM, Renderer, load_template
from fastalign.tracking import Tracker
from fastalign.train import train

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


# -------------------------------------------------------------------------------- what once broke


def refused(work, *arguments, **keys) -> str:
    with pytest.raises(ConfigError) as caught:
        work(*arguments, **keys)
    line = str(caught.value)
    assert "\n" not in line and line.encode()
    return line


def load(path: Path, want: str = "judged", strict: bool = True):
    dataset = DatasetConfig(path=str(path))
    return load_records([dataset], strict=strict, seed=0, want=want)


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


JUDGED = '{"prompt": "q", "completion": "a", "judgment": null'


@pytest.mark.parametrize(
    "rest, says",
    [
        # Read, and then too deep for what walks through it.
        (f', "x": {nested(400)}}}', "want at most 64 objects and lists inside each other"),
        (f', "tools": "{nested(400)}"}}', "field tools: value '[[[["),
        # No terminal and no file takes these.
        (
            ', "tools": [{"name": "\\ud800"}]}',
            r"field tools: value [{'name': '\ud800'}]: holds half",
        ),
        (', "tools": 3}', "field tools: value 3: want a list of objects"),
    ],
)
def test_what_nobody_looks_into_is_looked_at(tmp_path, rest, says):
    path = tmp_path / "d.jsonl"
    path.write_text(f"{JUDGED}}}\n{JUDGED}{rest}\n")
    line = refused(load, path)
    assert line.startswith(f"{path}:2: ") and says in line
    _, report = load(path, strict=False)
    assert sum(report.dropped.values()) == 1


def test_a_log_that_says_anything_of_its_judgments_is_told_in_one_line(tmp_path):
    row = {"prompt": "q", "completions": ["a", "b"], "token_ids": [[1], [2]]}
    row |= {"judgments": [None, None], "noise": ["\x1b[31m\n" * 200, None]}
    _, report = load(write_rows(tmp_path / "d.jsonl", [row]), strict=False)
    (_, line) = report.lines()
    assert line.startswith(r"  dropped 1 x \x1b[31m\n\x1b") and len(line) < 1000
    assert "\n" not in line and "\x1b" not in line


def test_a_line_that_is_cut_off_is_named_where_it_ends(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"prompt": "q"\r\n')
    assert refused(load, path) == f"{path}:1: not JSON: Expecting ',' delimiter at column 15"


@pytest.mark.parametrize(
    "message, says",
    [
        ({"tool_calls": 5}, "prompt[0].tool_calls: value 5: want a list of objects"),
        ({"name": "\ud800"}, "field prompt[0]: value {'name': '\\ud800'}: holds half"),
    ],
)
def test_messages_are_whole(tmp_path, message, says):
    prompt = [{"role": "user", "content": "q"} | message]
    path = write_rows(tmp_path / "d.jsonl", [{"prompt": prompt}])
    assert says in refused(load, path, "prompt")


def test_a_date_in_a_parquet_message_is_text_wherever_it_goes(tmp_path):
    """Episode logs are JSON."""
    import datetime

    import pyarrow as pa
    import pyarrow.parquet as pq

    prompt = [{"role": "user", "content": "q", "sent": datetime.datetime(2024, 1, 2)}]
    pq.write_table(pa.Table.from_pylist([{"prompt": prompt}]), tmp_path / "d.parquet")
    (record,), _ = load(tmp_path / "d.parquet", "prompt")
    assert json.loads(json.dumps(record.prompt))[0]["sent"] == "2024-01-02 00:00:00"


def test_columns_of_any_name_are_told_in_one_line(tmp_path):
    path = write_rows(
        tmp_path / "d.jsonl", [{"a\nb\x1b": 1, "c" * 99: 2, **{f"{i}": i for i in range(99)}}]
    )
    line = refused(load, path)
    assert r"has columns a\nb\x1b, cccc" in line and "and 61 more" in line and len(line) < 500


def test_a_damaged_parquet_file_is_told_in_one_line(reading, tmp_path):
    path = reading.folder / "b.parquet"
    fuzz("files", reading, 1, random_seed=0)
    data = bytearray(path.read_bytes())
    for place in range(4, 80):
        data[place] = 255
    (tmp_path / "d.parquet").write_bytes(data)
    line = refused(load, tmp_path / "d.parquet", "preference")
    assert line.startswith(f"{tmp_path}/d.parquet: ")


LONG = "a" * 300


def test_names_that_no_file_can_have(tiny_llama, tmp_path):
    assert (
        refused(load, Path(f"/{LONG}.jsonl"))
        == f"/{LONG}.jsonl: cannot be read: File name too long"
    )
    assert "is neither a file nor" in refused(load_template, LONG)
    for name in (LONG, f"/{LONG}"):
        model = make_config(tiny_llama, model_name_or_path=name)
        assert f"model_name_or_path = '{name}'" in refused(load_tokenizer, model)


def make_config(model: Path, method: str = "sft", **keys):
    from fuzz import method_config

    config = method_config(method, model)
    return config.model_copy(update=keys)


LAUGHS = "a: &a [1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{x}: &{x} [{', '.join(f'*{y}' for _ in range(9))}]\n"
    for y, x in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text, says",
    [
        ('seed: !!int ""', "not YAML"),
        ("seed: !!bool x", "not YAML"),
        ("seed: !!timestamp x", "not YAML"),
        ('stop: ["\\ud800"]', r"'\ud800' holds half of a surrogate pair"),
        ("a: &a [*a]", "more than 100000 values, with what aliases repeat"),
        (LAUGHS, "more than 100000 values, with what aliases repeat"),
    ],
)
def test_yaml_that_its_library_trips_over(tmp_path, text, says):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    line = refused(load_config, path)
    assert line.startswith(f"{path}: ") and says in line
    path.write_text("method: sft")
    override = text.splitlines()[0].replace(": ", "=", 1)
    if "!!" in text or "*a" in override:
        assert "the value is not YAML" in refused(load_config, path, [override])


@pytest.mark.parametrize("wrong", ["{{ 1 / 0 }}", "{% break %}", "{{ range(10 ** 9) | list }}"])
def test_a_chat_template_may_fail_in_any_way(tiny_llama, wrong):
    tokenizer = load_tokenizer(make_config(tiny_llama))
    tokenizer.chat_template = wrong + tokenizer.chat_template
    assert "the chat template cannot show" in refused(Renderer, tokenizer)


def test_a_row_that_a_template_refuses_is_named_under_strict(reading, tmp_path):
    prompt = [{"role": "user", "content": "q"}, {"role": "tool", "content": "3"}]
    path = write_rows(tmp_path / "d.jsonl", [{"prompt": prompt}])
    for strict in (True, False):
        line = refused(reading.train, path, "cut-online", "alpaca", strict)
        assert f"{path}:1" in line and "text template" in line


def test_a_checkpoint_with_a_file_too_many_is_damaged(reading):
    """Some of its files are read because they are there."""
    init_distributed(timeout_s=300.0)
    last = checkpoint.checkpoints(Path(reading.finished.output_dir))[-1]
    for name in ("reference.safetensors", "state/mp_rank_01_model_states.pt"):
        (last / name).write_bytes(b"x")
        assert checkpoint.damage(last) == f"{name} was not written with it"
        (last / name).unlink()
    for name in ("notes.txt", ".nfs0001", "state/.nfs0001"):
        (last / name).write_bytes(b"x")
        assert checkpoint.damage(last) == ""
        (last / name).unlink()


def test_other_folders_and_files_between_ours_are_left_alone(tmp_path):
    for name in ("checkpoint-last", "checkpoint-", "checkpoint-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text("{}")
    assert checkpoint.checkpoints(tmp_path) == [tmp_path / "checkpoint-2"]
    (tmp_path / "episodes").mkdir()
    for name in ("my-notes.journal", "0001-0.journal"):
        (tmp_path / "episodes" / name).write_bytes(b"")
    episodes.forget_journals(str(tmp_path), 3)
    assert [p.name for p in (tmp_path / "episodes").iterdir()] == ["my-notes.journal"]


def test_a_checkpoint_of_another_version_is_named(reading, tmp_path):
    import shutil

    shutil.copytree(
        checkpoint.checkpoints(Path(reading.finished.output_dir))[-1], tmp_path / "checkpoint-2"
    )
    for name, text, says in (
        (
            "position.json",
            '{"steps": 2}',
            "is not as this version of FastAlign writes it: TypeError",
        ),
        ("layout.json", "[]", "is not as this version of FastAlign writes it: TypeError"),
        ("recipe.yaml", "methods: cut", "methods is no key of a recipe: did you mean 'method'?"),
    ):
        before = (tmp_path / "checkpoint-2" / name).read_text()
        (tmp_path / "checkpoint-2" / name).write_text(text)
        line = refused(checkpoint.read_saved, tmp_path / "checkpoint-2")
        assert f"{tmp_path}/checkpoint-2/{name}" in line and says in line
        (tmp_path / "checkpoint-2" / name).write_text(before)


def test_metrics_are_cut_where_the_checkpoint_was(reading, tmp_path):
    path = tmp_path / "metrics.jsonl"
    kept = b'{"step": 1}\n{"step": 2}\n'
    path.write_bytes(kept + b'{"step": 2}\n\xff\n{"step"')
    config = reading.finished.model_copy(update={"output_dir": str(tmp_path)})
    tracker = Tracker(config, 0, 9)
    tracker.start(2, len(kept))
    assert path.read_bytes() == kept
    tracker.log(3, {"loss": 1.0}, show=False)
    assert tracker.logged == len(kept) + len(b'{"step": 3, "loss": 1.0}\n')
    tracker.close()
    # One that is gone, or that somebody made shorter, grows from where it is.
    path.unlink()
    other = Tracker(config, 0, 9)
    other.start(2, len(kept))
    assert other.logged == 0
    other.close()


@pytest.mark.parametrize(
    "line", [b"\xff", b"3", b'{"speed/tflops": "x"}', b'{"speed/tflops": NaN}']
)
def test_a_calibration_of_no_metrics_is_named(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + line)
    assert refused(calibrate, str(tmp_path)).endswith("metrics.jsonl:2 holds no metrics")


@pytest.mark.parametrize("cost", ["NaN", "-5", "1e999", '"1"', "[" * 2000 + "]" * 2000])
def test_a_reply_whose_cost_is_none_would_lift_the_limit(tmp_path, cost):
    path = tmp_path / "replies.jsonl"
    numbers = '"prompt_tokens": 1, "completion_tokens": 1'
    path.write_text(f'{{"hash": "x", "text": "A", {numbers}, "cost": {cost}}}\n')
    place = EndpointConfig(base_url="http://localhost:1/v1", model="m")
    if cost == '"1"':
        # A text that is a number is taken for one by float, and by no sum.
        cost = '"x"'
    assert refused(Endpoint, place, "judge", path).startswith(f"{path}:1: not a reply")


def test_judgments_that_cannot_be_written(tmp_path, capsys):
    source = write_rows(tmp_path / "a.jsonl", rows("completion", 1))
    out, filled = str(tmp_path / "out.jsonl"), tmp_path / "filled.jsonl"
    assert main(["judge", "export", str(source), out]) == 0
    line = json.loads(Path(out).read_text())
    for change, says in (
        ({"judgment": "\ud800"}, r"field judgment: value '\ud800': holds half of a surrogate pair"),
        ({"id": "9" * 5000 + "-a-b"}, "no id of what was exported"),
    ):
        filled.write_text(json.dumps(line | change) + "\n")
        assert main(["judge", "import", str(filled), str(tmp_path / "judged.jsonl")]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"fastalign: {filled}:1: ") and says in said
    deep = json.dumps(line).replace('"prompt": [', '"prompt": [' + nested(900) + ", ", 1)
    filled.write_text(deep + "\n")
    assert main(["judge", "import", str(filled), str(tmp_path / "judged.jsonl")]) == 2


def damaged_copy(source: Path, folder: Path, name: str, content: bytes) -> Path:
    import shutil

    shutil.copytree(source, folder)
    (folder / name).write_bytes(content)
    return folder


def test_a_damaged_adapter_is_named(reading, tiny_llama, tmp_path):
    out = Path(reading.finished.output_dir)
    small = tmp_path / "whole"
    small.mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (small / name).write_bytes((out / name).read_bytes())
    weights = damaged_copy(small, tmp_path / "weights", "adapter_model.safetensors", b"\xff" * 40)
    assert re.search("weights'.*SafetensorError", refused(trained_on_nf4, str(weights)))
    for text in (b"[]", b'{"peft_type": []}', b"\xff"):
        folder = damaged_copy(
            small, tmp_path / f"config-{text[0]}-{len(text)}", "adapter_config.json", text
        )
        assert f"adapter_name_or_path = '{folder}'" in refused(adapter_config, str(folder))
    # It is of rank 2.
    text = (small / "adapter_config.json").read_bytes().replace(b'"r": 2', b'"r": 4')
    other = damaged_copy(small, tmp_path / "other", "adapter_config.json", text)
    keys = {"use_peft": True, "adapter_name_or_path": str(other)}
    line = refused(train, recipe("sft", tiny_llama, tmp_path / "run", **keys))
    assert line.startswith(f"adapter_name_or_path = '{other}': RuntimeError: ")


def test_a_damaged_model_folder_is_named(tiny_llama, tmp_path):
    for name, content, read in (
        ("tokenizer.json", b'{"model": {"type": "none"}}', load_tokenizer),
        ("tokenizer_config.json", b'{"model_max_length": []}', load_tokenizer),
        ("generation_config.json", b"[]", load_generation_config),
        ("generation_config.json", b"\xff", load_generation_config),
    ):
        folder = damaged_copy(tiny_llama, tmp_path / f"{name}-{len(content)}", name, content)
        line = refused(read, make_config(folder))
        assert line.startswith(f"model_name_or_path = '{folder}': ")


# ------------------------------------------------------------------- records at the edges, in runs


LONG_TEXT = "the sum of one and two " * 60
ONE_TOKEN = [{"role": "user", "content": "one"}]


def edges(kind: str, renderer: Renderer) -> list[dict]:
    """Rows to be trained on, the shortest there are among them, and then rows that cannot be."""
    prompt = renderer.prompt_ids(ONE_TOKEN).tolist()
    short = {"prompt": ONE_TOKEN, "prompt_ids": prompt}
    if kind == "judged":
        return [
            *rows("judged", 3),
            # One token of an answer, which was cut there; fine and criticised.
            short | {"completion": "x", "token_ids": token(renderer, "x"), "judgment": None},
            short | {"completion": "y", "token_ids": token(renderer, "y"), "judgment": "Bad."},
            {"prompt": LONG_TEXT, "completion": "two", "judgment": None},
            {"prompt": "one", "completion": "", "judgment": None},
            # The answer fits behind the prompt, and not behind the judgment.
            {"prompt": "one", "completion": "two", "judgment": LONG_TEXT},
        ]
    if kind == "preference":
        ids = {"chosen_ids": token(renderer, "x"), "rejected_ids": token(renderer, "y")}
        return [
            *rows("preference", 4),
            short | {"chosen": "x", "rejected": "y"} | ids,
            {"prompt": LONG_TEXT, "chosen": "two", "rejected": "three"},
            {"prompt": "one", "chosen": "", "rejected": "three"},
            {"prompt": "one", "chosen": "two", "rejected": "two"},
        ]
    answer = {"role": "assistant", "content": "the"}
    masked = answer | {"loss": False}
    asked = {"role": "user", "content": "one"}
    return [
        *({"messages": [asked, answer, asked, masked, asked, answer]} for _ in range(5)),
        {"messages": [asked, masked]},
        # What is trained on begins behind max_length.
        {"messages": [{"role": "user", "content": LONG_TEXT}, answer]},
        {"messages": [asked, answer | {"content": ""}]},
    ]


def token(renderer: Renderer, text: str) -> list[int]:
    (found,) = renderer.tokenizer(text, add_special_tokens=False)["input_ids"]
    return [found]


@pytest.mark.parametrize(
    "method, kind, reasons",
    [
        ("cut", "judged", ["completion: empty", NO_ROOM]),
        ("hindsight", "judged", ["completion: empty", NO_ROOM]),
        ("dpo", "preference", ["chosen: empty", "rejected: same as chosen", NO_ROOM]),
        ("sft", "messages", ["messages: no answer", "messages: empty", CUT_OFF]),
    ],
)
def test_records_at_the_edges_are_trained_on_or_counted(
    tiny_llama, tmp_path, capfd, method, kind, reasons
):
    """A batch of the shortest records alone is one of those."""
    renderer = Renderer(load_tokenizer(make_config(tiny_llama)))
    data = write_rows(tmp_path / "d.jsonl", edges(kind, renderer))
    config = recipe(
        method, tiny_llama, tmp_path, datasets=[{"path": str(data)}], global_batch_size=1,
        max_length=200,
    )  # fmt: skip
    metrics = train(config)
    assert metrics["loss"] == metrics["loss"] and abs(metrics["loss"]) < 100
    said = capfd.readouterr().err
    logged = [
        json.loads(x) for x in Path(config.output_dir, "metrics.jsonl").read_text().splitlines()
    ]
    assert [row["step"] for row in logged if "loss" in row] == [1, 2, 3, 4, 5]
    assert all(math.isfinite(value) for row in logged for value in row.values())
    for reason in reasons:
        assert re.search(rf"dropped \d x {re.escape(reason)}", said), (reason, said)
    assert "no step" not in said
    assert kind == "messages" or re.search("[12] answers are trained on as they were sampl", said)
