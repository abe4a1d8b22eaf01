"""Malformed inputs of every kind that FastAlign reads, and what becomes of each.

    python tests/fuzz.py [--inputs 10000] [--seed 0] [--only KIND ...] [--output FILE]

An input is a file, or a folder, that begins as a right one and is then edited: values replaced by
others of another kind, keys gone or doubled, bytes flipped, cut or put in.  It is read by the code
that reads it in a run.  It has to be accepted (what comes of it then has to be sound: finite
weights, known tokens, targets), skipped and counted, or refused by a named error: one line that
names the file, and the line or field where there is one.  Another exception, a line that is none,
or 20 s without an answer is a defect, and the smallest input that hypothesis finds for it is shown.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import numpy as np
import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from support import recipe, rows, write_rows

from fastalign import checkpoint, episodes, people
from fastalign.config import (
    Config,
    ConfigError,
    DatasetConfig,
    EndpointConfig,
    dump_config,
    load_config,
    load_judge,
    parse_config,
)
from fastalign.data import Example, Record, RowError, Stream, load_records
from fastalign.data_check import Settings, check_file
from fastalign.endpoint import Endpoint
from fastalign.methods import make_method
from fastalign.model import adapter_config, init_distributed, trained_on_nf4
from fastalign.prepare import check_prompts, make_examples, token_lines
from fastalign.rollout import Rollout
from fastalign.templates import Renderer
from fastalign.train import train

ACCEPTED, SKIPPED, REFUSED = "accepted", "counted skip", "named error"
LIMIT_S = 20.0
"""Longer than any input of these sizes takes, on any machine."""


class Defect(AssertionError):
    """An input that was not taken as it should be."""


# ----------------------------------------------------------------------------------------- edits

TEXTS = [
    "", " ", "\x00", "\ud800", "\ufffd", "\u2028", "<|im_end|>", "<|im_start|>", "{",
    "{instruction}", "{0.__class__}", "{{ 7 * 7 }}", "{% raw %}", "[bold]", "[/x]", "\x1b[31m",
    "\n\nHuman: a\n\nAssistant:", "N/A", "nan", "1e999", "-1", "0", "null", "$ERROR$",
    "The response is perfect.", "A" * 3000, "../..", "~", "a" * 300, "chat", "user", "assistant",
    "tool",
]  # fmt: skip
NUMBERS = [
    0, 1, -1, 2, 7, 2**31, 2**63, -(2**63) - 1, 10**400, 0.5, -0.0, 1e-320, 1e308,
    math.inf, -math.inf, math.nan,
]  # fmt: skip
DEEP = "@deep:{}@"
"""Stands for so many nested lists, which no encoder would write."""
SCALARS = st.sampled_from([None, True, False, *NUMBERS, *TEXTS, *map(DEEP.format, (90, 450, 3000))])
VALUES = st.recursive(
    SCALARS | st.text(max_size=6) | st.integers(-9, 400) | st.floats(width=32),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(TEXTS) | st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=5,
)


def spots(tree: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything below."""
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
        yield tree, key
        if isinstance(tree[key], dict | list):
            yield from spots(tree[key])


@st.composite
def edited(draw: Any, seeds: Sequence[Any], values: st.SearchStrategy[Any] = VALUES) -> Any:
    """One of the trees, with up to three changes; sometimes none."""
    holder = [copy.deepcopy(draw(st.sampled_from(seeds)))]
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3, 0]))):
        container, key = draw(st.sampled_from(list(spots(holder))))
        action = draw(st.sampled_from(["replace", "replace", "replace", "delete", "add", "swap"]))
        inside = container is not holder
        if action == "replace":
            container[key] = draw(values)
        elif action == "delete" and inside:
            del container[key]
        elif action == "swap":
            # What stands somewhere else, as a whole.
            other, name = draw(st.sampled_from(list(spots(holder))))
            container[key] = copy.deepcopy(other[name])
        elif isinstance(container, dict):
            container[
                draw(st.sampled_from(TEXTS) | st.sampled_from(sorted(map(str, container))))
            ] = draw(values)
        elif inside:
            container.insert(key, draw(values))
    return holder[0]


PIECES = [
    b"\x00", b"\xff", b"\xfe\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\r\n", b"\n", b"\r", b" ",
    b"\t", b'"', b"\\", b"\\ud800", b"\\u0000", b"{", b"}", b"[", b"]", b",", b":", b"NaN",
    b"-Infinity", b"9" * 5000, b"1e999", b'"prompt": 1, ', b"[" * 2000, b"]" * 2000,
    b'{"a":' * 2000, b"/*", b"#", b"PAR1", b"null", b"\xf0\x9f\x90",
]  # fmt: skip


@st.composite
def damaged(draw: Any, seeds: Sequence[bytes], pieces: Sequence[bytes] = PIECES) -> bytes:
    """The bytes of one of the files, with up to three changes."""
    data = draw(st.sampled_from(seeds))
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(data)))
        end = min(start + draw(st.sampled_from([0, 1, 4, 64, 4096])), len(data))
        action = draw(st.sampled_from(["flip", "cut", "remove", "insert", "repeat", "ending"]))
        if action == "flip" and start < len(data):
            bit = 1 << draw(st.integers(0, 7))
            data = data[:start] + bytes([data[start] ^ bit]) + data[start + 1 :]
        elif action == "cut":
            data = data[:start]
        elif action == "remove":
            data = data[:start] + data[end:]
        elif action == "insert":
            data = data[:start] + draw(st.sampled_from(pieces)) + data[start:]
        elif action == "repeat":
            data = data[:end] + data[start:]
        elif action == "ending":
            data = data.replace(b"\n", draw(st.sampled_from([b"\r\n", b"\r", b"", b"\n\n"])))
    return data


def as_json(tree: Any, ascii_only: bool = True) -> str:
    try:
        text = json.dumps(tree, ensure_ascii=ascii_only)
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(tree)
    return re.sub(r'"@deep:(\d+)@"', lambda m: "[" * int(m[1]) + "]" * int(m[1]), text)


# -------------------------------------------------------------------------------------- outcomes


@dataclass(frozen=True)
class Case:
    """How inputs of a kind are made, and what says what became of one."""

    check: Callable[..., str]
    inputs: st.SearchStrategy[tuple[Any, ...]]


def taken(work: Callable[[], bool], *names: str) -> str:
    """What becomes of an input; ``work`` reads it and says whether anything was skipped.  A refusal
    has to have one of ``names``, that of a row its number behind it."""
    try:
        with limited():
            skipped = work()
    except ConfigError as error:
        check_line(str(error), names, row=isinstance(error, RowError))
        return REFUSED
    except Defect:
        raise
    except Exception as error:
        raise Defect(f"{type(error).__name__}: {error}") from error
    return SKIPPED if skipped else ACCEPTED


def check_line(line: str, names: Sequence[str], *, row: bool = False) -> None:
    steered = any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in line)
    if steered or len(line) > 10_000:
        raise Defect(f"not a line for people, of {len(line)} characters: {line[:300]!r}")
    number = r":(row )?\d+" if row else ""
    if not any(re.search(re.escape(name) + number, line) for name in names):
        raise Defect(f"names none of {names}: {line[:300]!r}")


@contextlib.contextmanager
def limited() -> Iterator[None]:
    def give_up(*_: Any) -> None:
        raise Defect(f"no answer after {LIMIT_S:g} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def check_examples(examples: Sequence[Example], vocabulary: int, max_length: int) -> None:
    for example in examples:
        if not math.isfinite(example.weight) or example.weight <= 0:
            raise Defect(f"{example.source}: weight {example.weight}")
        for stream in example.streams:
            ids = stream.input_ids
            if not len(ids) <= max_length or ids.min() < 0 or ids.max() >= vocabulary:
                raise Defect(f"{example.source}: {len(ids)} ids from {ids.min()} to {ids.max()}")
            if not stream.loss_mask.any() or stream.loss_mask[0]:
                raise Defect(f"{example.source}: no targets, or the first token is one")


# ------------------------------------------------------------------------------------------ rows


def tool_dialogue() -> list[dict[str, Any]]:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2]}}}
    return [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "1 + 2?"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "3", "name": "add"},
        {"role": "assistant", "content": "It is 3.", "loss": True},
    ]


def row_seeds() -> list[dict[str, Any]]:
    """A row of every form."""
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    human = "\n\nHuman: the sum of one and two?\n\nAssistant:"
    verdict = {"score_a": 0.9, "score_b": 0.1, "preferred": "a"}
    episode = {
        "index": 0, "prompt": [{"role": "user", "content": "one"}], "completions": ["two", "three"],
        "prompt_ids": [1, 5, 6], "token_ids": [[40, 41, 2], [50, 2]], "weight_version": 1,
        "logprobs": [[-1.0, -2.0, -0.5], [-1.0, -0.1]], "finish_reasons": ["stop", "stop"],
    }  # fmt: skip

    def rated(text: str, rating: str) -> dict[str, Any]:
        said = {"Rating": rating, "Rationale": f"It is {rating}."}
        return {
            "model": "m",
            "response": text,
            "annotations": {"honesty": said, "helpfulness": said},
        }

    return [
        *rows("judged", 2), *rows("preference", 1), *rows("completion", 1), *rows("prompt", 1),
        {"prompt": "q", "completion": "a", "judgment": "Bad.", "score": 3, "weight": 2.0},
        {"prompt": "q", "chosen": "a", "rejected": "b", "system": "Be brief.", "comparisons": [
            {"principle": "honesty", "preferred": "rejected", "rationale_chosen": "x",
             "rationale_rejected": "y"},
            {"preferred": "chosen"}]},
        {"instruction": "q", "completions": [rated("a", "5"), rated("b", "2"), rated("c", "N/A")]},
        {"chosen": f"{human} 3", "rejected": f"{human} 4"},
        {"prompt": human, "completion": " three", "judgment": None},
        {"instruction": "Add", "input": "1 2", "output": "3"},
        {"messages": tool_dialogue(), "tools": tools},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"prompt": tool_dialogue()[:-1], "completion": "It is 3.", "tools": json.dumps(tools)},
        {"prompt": tool_dialogue()[:2], "chosen": tool_dialogue()[-1:], "rejected": "4"},
        episode | {"judgments": ["Bad.", None], "noise": [None, None]},
        episode | {"matches": [[0, 1]], "verdicts": [verdict], "pairs": [[0, 1]],
                   "winner": None, "kept": [0]},
        episode | {"completion": "one", "judgment": "Bad."},
    ]  # fmt: skip


METHODS = (
    "cut", "sft", "dpo", "jsft", "unlikelihood", "hindsight", "forward-prediction",
    "cut-online", "dpo-online", "ilf-mle-online",
)  # fmt: skip


def method_config(name: str, model: Path, **keys: Any) -> Config:
    method = name.removesuffix("-online")
    tree: dict[str, Any] = {
        "method": method, "model_name_or_path": str(model), "datasets": [{"path": "x.jsonl"}],
        "output_dir": "out", "max_length": 400,
    }  # fmt: skip
    if name.endswith("-online"):
        tree["online"] = {"num_generations": 2}
        if not method.startswith("ilf"):
            tree["judge"] = {"type": "self"}
    return parse_config(tree | keys)


def finish(model: Path, folder: Path) -> Config:
    """A short online run with its checkpoints, episodes and adapter."""
    judge = folder / "judge.py"
    judge.write_text("def written(prompt, text):\n    return 'Bad.' if len(text) % 2 else None\n")
    config = recipe(
        "cut", model, folder / "run", use_peft=True, lora_r=2, save_steps=1, save_total_limit=9,
        max_completion_length=4, judge={"type": "rule", "path": f"{judge}:written"},
        online={"iterations": 2, "prompts_per_iteration": 2, "num_generations": 2},
    )  # fmt: skip
    train(config)
    return config


class Reading:
    """The way of a file through reader, renderer and method, as in a run."""

    def __init__(self, model: Path, folder: Path) -> None:
        from transformers import AutoTokenizer

        self.model, self.folder = model, folder
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.renderers = {name: Renderer(self.tokenizer, name) for name in ("chat", "alpaca")}
        self.finished = finish(model, folder)
        self.methods = {
            (name, strict): make_method(method_config(name, model, strict=strict))
            for name in METHODS
            for strict in (True, False)
        }

    def train(self, path: Path, method_name: str, template: str, strict: bool) -> bool:
        """Up to the examples, or to the prompts that are sampled from."""
        method = self.methods[method_name, strict]
        config, renderer = method.config, self.renderers[template]
        online = config.online is not None
        records, report = load_records(
            [DatasetConfig(path=str(path))],
            strict=strict,
            seed=0,
            want=method.online_wants if online else method.wants,
        )
        skipped = sum(report.dropped.values())
        for line in report.lines():
            check_line(line.lstrip(), [str(path), "dropped "])
        if online:
            kept, drops = check_prompts(records, [renderer], config, method.rollout_prompt)
            self.judge(kept, renderer)
        else:
            token_lines(records, [renderer])
            examples, drops = make_examples(method, records, [renderer], config)
            check_examples(examples, len(self.tokenizer), config.max_length)
        return bool(skipped + drops.total)

    def judge(self, records: Sequence[Record], renderer: Renderer) -> None:
        """What judges are asked of these prompts."""
        for record in records:
            renderer.judge_prompt_ids(record.prompt, "a", "b", tools=record.tools)
            renderer.written_prompt_ids(record.prompt, "a", tools=record.tools)
            json.dumps(renderer.judge_messages(record.prompt, "a", "b"))

    def look(self, path: Path) -> bool:
        """As ``fastalign data check`` and ``fastalign judge export`` do."""
        report = check_file(str(path), Settings())
        out = self.folder / "to-judge.jsonl"
        out.unlink(missing_ok=True)
        people.export(str(path), out, everything=True)
        return bool(report.dropped)

    def outcome(self, path: Path, way: tuple[str, str, bool]) -> str:
        method, template, strict = way
        if method == "look":
            return taken(lambda: self.look(path), str(path))
        return taken(lambda: self.train(path, method, template, strict), str(path))


WAYS = st.tuples(
    st.sampled_from([*METHODS, "look"]), st.sampled_from(["chat", "alpaca"]), st.booleans()
)


@st.composite
def jsonl(draw: Any) -> bytes:
    made = draw(st.lists(edited(row_seeds()), min_size=1, max_size=3))
    lines = [as_json(row, draw(st.booleans())) for row in made]
    if draw(st.booleans()):
        lines.append(json.dumps(draw(st.sampled_from(row_seeds()))))
    return "\n".join(lines).encode()


def fuzz_rows(reading: Reading) -> Case:
    path = reading.folder / "rows.jsonl"

    def check(content: bytes, way: tuple[str, str, bool]) -> str:
        path.write_bytes(content)
        return reading.outcome(path, way)

    return Case(check, st.tuples(jsonl(), WAYS))


def fuzz_files(reading: Reading) -> Case:
    """Whole files: JSON lines, arrays and Parquet, by their bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def lines(*picked: dict[str, Any]) -> bytes:
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in picked).encode()

    def parquet(name: str, picked: Sequence[dict[str, Any]], **options: Any) -> bytes:
        target = reading.folder / name
        pq.write_table(pa.Table.from_pylist(list(picked)), target, **options)
        return target.read_bytes()

    seeds = row_seeds()
    texts = [
        lines(*rows("judged", 3)),
        lines(*rows("preference", 2)),
        lines(seeds[-2]),
        lines(seeds[11]),
    ]
    arrays = [
        json.dumps(rows("judged", 2)).encode(),
        json.dumps(rows("completion", 2), indent=1).encode(),
    ]
    tables = [
        parquet("a.parquet", rows("judged", 4)),
        parquet("b.parquet", rows("preference", 4), compression="none", use_dictionary=False),
        parquet("c.parquet", [seeds[12]], compression="gzip"),
    ]
    inputs = st.one_of(
        st.tuples(st.just("jsonl"), damaged(texts)),
        st.tuples(st.sampled_from(["json", "jsonl"]), damaged(arrays)),
        st.tuples(st.sampled_from(["parquet", "jsonl"]), damaged(tables)),
        st.tuples(st.sampled_from(["json", "jsonl", "parquet"]), st.binary(max_size=40)),
    )

    def check(given: tuple[str, bytes], way: tuple[str, str, bool]) -> str:
        suffix, content = given
        path = reading.folder / f"file.{suffix}"
        path.write_bytes(content)
        return reading.outcome(path, way)

    return Case(check, st.tuples(inputs, WAYS))


# ------------------------------------------------------------------------------------- templates

WORDINGS = [
    {"format": "chat", "system": "Be brief.", "prompt": "{instruction}!",
     "judged_prompt": "{instruction} {judgment}"},
    {"format": "text", "prompt": "Q: {instruction}\n", "response": "A: ", "separator": "\n",
     "judged_system": "x", "judged_prompt": "{instruction}\n{judgment}\n",
     "feedback_prompt": "{instruction} {completion}",
     "refine_prompt": "{instruction} {completion} {judgment}"},
    {"system": "Judge.", "prompt": "{dialogue} {a} {b}", "decision": "Better:",
     "rationale": "{a} {b}", "principle_prompt": "{dialogue} {a} {b} {principle}",
     "principles": {"honesty": "It is honest."}},
    {"system": "Judge.", "prompt": "{dialogue} {answer}", "fine": ["Perfect"]},
]  # fmt: skip
JINJA = [
    "{{ messages }}", "{{ 1 / 0 }}", "{{ messages[9].content }}", "{{ raise_exception('no') }}",
    "{% if true %}", "{% endif %}", "{% for x in messages %}", "{% endfor %}", "{{ bos_token }}",
    "{{ eos_token }}", "{{", "}}", "{%", "{{ undefined.x }}", "{{ 'a' * 1000 }}",
    "{{ 10 ** 5000 }}", "{{ range(10 ** 9) | list }}", "{{ -1 | int('x') }}",
    "{{ ''.__class__.__mro__ }}", "{{ cycler.__init__.__globals__ }}",
    "{% set x = namespace(y=0) %}", "{{ x.y.z }}", "{{ messages | tojson }}",
    "{{ message['content'] | trim }}", "\x00", "{% include 'x' %}", "{% macro f() %}",
    "{{ strftime_now('%Y') }}", "{{ 'x' | nofilter }}", "{{ loop.index }}", "{% generation %}",
    "{{ tools[0] }}", "{% break %}", "{{ messages | map(attribute='z') | join }}", "{{ self }}",
    "{{ message.content.split('a')[4] }}", "{{ [1, 'a'] | sort }}", "{{ none + 1 }}",
    "{{ 'é' | string }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
]  # fmt: skip


def fuzz_templates(reading: Reading) -> Case:
    """Wordings as YAML, by their values and bytes, and chat templates by pieces of Jinja."""
    from conftest import CHAT_TEMPLATE

    path = reading.folder / "template.yaml"
    kinds = ("template", "judge_template", "written_template")
    words = st.one_of(
        edited(WORDINGS).map(
            lambda tree: yaml.safe_dump(tree, allow_unicode=True).encode("utf-8", "replace")
        ),
        damaged([yaml.safe_dump(tree).encode() for tree in WORDINGS], [*PIECES, *YAML_PIECES]),
    )
    marked = [m.start() for m in re.finditer(r"\{[%{]", CHAT_TEMPLATE)] + [len(CHAT_TEMPLATE)]

    @st.composite
    def chat(draw: Any) -> str:
        text = CHAT_TEMPLATE
        for _ in range(draw(st.integers(1, 2))):
            at = draw(st.sampled_from(marked) | st.integers(0, len(text)))
            text = (
                text[:at]
                + draw(st.sampled_from(JINJA))
                + text[at + draw(st.sampled_from([0, 0, 1, 30])) :]
            )
        return text

    data = write_rows(reading.folder / "plain.jsonl", rows("judged", 3)[1:])
    records, _ = load_records([DatasetConfig(path=str(data))], strict=True, seed=0, want="judged")
    bare = copy.deepcopy(reading.tokenizer)
    use = {
        name: reading.methods[name, False] for name in ("cut", "hindsight", "forward-prediction")
    }

    def render(renderer: Renderer) -> bool:
        dropped = 0
        for method in use.values():
            examples, drops = make_examples(method, records, [renderer], method.config)
            check_examples(examples, len(reading.tokenizer), method.config.max_length)
            dropped += drops.total
        _, drops = check_prompts(
            records,
            [renderer],
            use["cut"].config,
            reading.methods["ilf-mle-online", False].rollout_prompt,
        )
        with contextlib.suppress(RowError):
            reading.judge(records, renderer)
        with contextlib.suppress(RowError):
            renderer.judge_prompt_ids(records[0].prompt, "a", "b", "honesty")
        with contextlib.suppress(RowError):
            renderer.decision_ids()
        return bool(dropped + drops.total)

    def check(words: bytes | str, kind: str) -> str:
        if isinstance(words, str):
            bare.chat_template = words
            return taken(lambda: render(Renderer(bare)), "tokenizer ", str(data))
        path.write_bytes(words)
        # One that is read may be at fault with a row.
        names = (str(path), str(data), "judge.template", "judge.decision_tokens", "tokenizer ")
        return taken(lambda: render(Renderer(reading.tokenizer, **{kind: str(path)})), *names)

    return Case(check, st.tuples(words | chat(), st.sampled_from(kinds)))


# --------------------------------------------------------------------------------------- recipes

YAML_PIECES = [
    b'!!int ""', b'!!float ""', b"!!bool x", b"!!timestamp x", b"!!binary x", b"!!set {a}",
    b"!!omap [a]", b"!!python/object/apply:os.getcwd []", b"&a [*a]", b"&a {b: *a}", b"*b",
    b"<<: 3", b"? ", b"- ", b"|", b">", b"%",
    b"[&a [1,1,1,1,1,1,1,1], &b [*a,*a,*a,*a,*a,*a], &c [*b,*b,*b,*b,*b,*b], &d [*c,*c,*c,*c,*c]]",
    b"2024-13-45", b"9999-12-31T23:59:59-23:59", b"0x", b"1:99:99", b".inf", b".nan", b"~",
    b"---\n", b"...", b"@", b"`", b"&a [x,x,x,x,x,x,x,x]", b"!!null x", b"0o9", b"1_000", b"=",
]  # fmt: skip


def fuzz_recipes(reading: Reading) -> Case:
    path = reading.folder / "recipe.yaml"
    root = Path(__file__).parents[1]
    trees = [yaml.safe_load(file.read_text()) for file in sorted(root.glob("recipes/*.yaml"))]
    for name in ("cut-online", "dpo-online"):
        # Every key that there is.
        endpoint = {"base_url": "http://localhost/v1", "model": "m"}
        whole = method_config(name, Path("m"), judge={"type": "endpoint", "endpoint": endpoint})
        trees.append(whole.model_dump(mode="json", by_alias=True))
    keys = sorted({".".join(map(str, at)) for tree in trees for at in paths(tree)})
    # What YAML has beside JSON.
    values = VALUES | st.dates() | st.datetimes() | st.binary(max_size=3)
    key = st.sampled_from(keys)
    endings = st.sampled_from(["", ".", ".0", ".x", ".99999", "." + "9" * 5000])
    override = st.one_of(
        st.tuples(key, values).map(lambda x: f"{x[0]}={x[1]}"),
        st.tuples(key, st.sampled_from(YAML_PIECES)).map(lambda x: f"{x[0]}={x[1].decode()}"),
        st.tuples(key, endings, st.text(max_size=5)).map(lambda x: f"{x[0]}{x[1]}={x[2]}"),
        st.text(max_size=8),
    )

    def as_yaml(tree: Any) -> bytes:
        try:
            text = yaml.safe_dump(tree, allow_unicode=True, sort_keys=False)
        except yaml.YAMLError:
            text = "x"
        deep = re.sub(r"'?@deep:(\d+)@'?", lambda m: "[" * int(m[1]) + "]" * int(m[1]), text)
        return deep.encode("utf-8", "replace")

    content = st.one_of(
        edited(trees, values).map(as_yaml),
        damaged([yaml.safe_dump(tree).encode() for tree in trees], [*PIECES, *YAML_PIECES]),
        edited(trees[:1], values).map(as_yaml),
    )

    def check(content: bytes, overrides: list[str]) -> str:
        path.write_bytes(content)

        def read() -> bool:
            config = load_config(path, overrides)
            # A judge's own file is read by the same rules.
            with contextlib.suppress(ConfigError):
                load_judge(path)
            if parse_config(yaml.safe_load(dump_config(config))) != config:
                raise Defect("the recipe that is printed is another one")
            json.dumps(config.model_dump(mode="json"), allow_nan=False)
            if ":" not in config.method:
                try:
                    make_method(config)
                except ConfigError as error:
                    # The command puts the recipe's name before it.
                    raise ConfigError(f"{path}: {error}") from None
            return False

        return taken(read, str(path), *map(repr, overrides))

    return Case(check, st.tuples(content, st.lists(override, max_size=2) | st.just([])))


def paths(tree: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield (*above, key)
        if isinstance(value, dict | list):
            yield from paths(value, (*above, key))


# ----------------------------------------------------------------------------------- checkpoints


def changed_file(files: dict[str, bytes]) -> st.SearchStrategy[tuple[str, bytes | None]]:
    """(name, content) of one of the files, or of another one; None: it is gone."""
    names = st.sampled_from(sorted(files))
    others = ["x", "state/x.pt", "reference.safetensors", "pending.npz", "ahead.json", ".hidden"]
    return st.one_of(
        names.flatmap(lambda name: st.tuples(st.just(name), damaged([files[name]]))),
        st.tuples(names, st.none()),
        st.tuples(st.sampled_from(others), st.just(b"x")),
        # One file in another's place.
        st.tuples(names, names.map(files.__getitem__)),
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


@contextlib.contextmanager
def with_file(folder: Path, name: str, content: bytes | None) -> Iterator[None]:
    """Another file in the folder, as long as it is looked at."""
    path = folder / name
    before = path.read_bytes() if path.is_file() else None
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    if content is not None:
        path.write_bytes(content)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        if before is not None:
            path.write_bytes(before)


def fuzz_checkpoints(reading: Reading) -> Case:
    """The newest checkpoint of a run with two, as its disk or somebody else left it."""
    init_distributed(timeout_s=300.0)
    config = reading.finished.model_copy(update={"resume_from_checkpoint": True})
    last = checkpoint.checkpoints(Path(config.output_dir))[-1]
    files = contents(last)

    def as_before(name: str, content: bytes | None) -> bool:
        """Whether it is the manifest with the same hashes, in other white space or with more."""
        with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
            now, before = json.loads(content), json.loads(files[name])
            same = all(now[key] == before[key] for key in ("files", "sha256"))
            return name == checkpoint.MANIFEST and same
        return False

    def check(name: str, content: bytes | None, alone: bool) -> str:
        asked = config.model_copy(update={"resume_from_checkpoint": str(last)}) if alone else config
        same = content == files.get(name) or name in ("x", ".hidden") or as_before(name, content)

        def find() -> bool:
            found, skipped = checkpoint.find_checkpoint(asked)
            if (found == last) != same:
                raise Defect(f"{name} is another one, and {found} is taken")
            for line in skipped:
                check_line(line, [f"{last}: damaged: "])
            return bool(skipped)

        with with_file(last, name, content):
            return taken(find, str(last))

    inputs = st.tuples(changed_file(files), st.booleans())
    return Case(lambda change, alone: check(*change, alone), inputs)


def fuzz_forged(reading: Reading) -> Case:
    """Files of a checkpoint whose hashes fit, as another version of the program may write them."""
    init_distributed(timeout_s=300.0)
    folder = reading.folder / "checkpoint-7"
    if not folder.exists():
        shutil.copytree(checkpoint.checkpoints(Path(reading.finished.output_dir))[-1], folder)
        example = Example((Stream.of("plain", np.array([1, 2]), np.array([3])),), 1.0, "x:1")
        checkpoint.save_examples(folder / "pending.npz", [example, example])
        ahead = {"round": 1, "weights_round": 0, "call": {"a": 1}, "sampling": None}
        (folder / "ahead.json").write_text(json.dumps(ahead))
    names = ("layout.json", "identity.json", "position.json", "ahead.json")
    files = {name: (folder / name).read_bytes() for name in (*names, "recipe.yaml", "pending.npz")}
    inputs = st.one_of(
        st.sampled_from(names).flatmap(
            lambda name: st.tuples(
                st.just(name), edited([json.loads(files[name])]).map(lambda x: as_json(x).encode())
            )
        ),
        st.sampled_from(sorted(files)).flatmap(
            lambda name: st.tuples(st.just(name), damaged([files[name]]))
        ),
    )

    def check(name: str, content: bytes) -> str:
        def read() -> bool:
            saved = checkpoint.read_saved(folder)
            check_examples(saved.pending.examples, 2**31, 2**31)
            json.dumps([vars(saved.position), saved.layout])
            return False

        with with_file(folder, name, content):
            return taken(read, f"resume_from_checkpoint: {folder / name}")

    return Case(check, inputs)


# -------------------------------------------------------------------------------------- journals


def fuzz_journals(reading: Reading) -> Case:
    """What a run keeps beside its checkpoints: rollouts, verdicts, replies, metrics, answers of the
    start, log-probs of the reference."""
    from fastalign.evaluate import Evaluator
    from fastalign.plan import calibrate
    from fastalign.reference import _read, _write

    folder = reading.folder / "kept"
    folder.mkdir(exist_ok=True)
    said: list[str] = []
    prompts = [np.array([1, 5, 6], np.int32)] * 2
    rollouts = [
        Rollout(np.array([7, 8, 2], np.int32), np.array([-1.0, -2.0, -0.5], np.float32), "stop", 1)
    ] * 2
    example = Example((Stream.of("plain", np.array([1, 2]), np.array([3, 4])),), 1.0, "x:1")
    log = next(Path(reading.finished.output_dir, "episodes").glob("*.jsonl"))
    logged = [episodes.Episode.from_json(x) for x in log.read_text("utf-8").split("\n")[:-1]]
    place = EndpointConfig(base_url="http://localhost:1/v1", model="m")

    def journal(path: Path) -> bool:
        found = episodes.recall(path, {"a": 1}, prompts, [3, 4], said.append)
        if found is not None:
            same = [
                np.array_equal(a.token_ids, b.token_ids)
                for a, b in zip(found, rollouts, strict=True)
            ]
            finite = all(np.isfinite(rollout.logprobs).all() for rollout in found)
            if not all(same) or not finite:
                raise Defect("other rollouts than were kept")
        return found is None

    def verdicts(path: Path) -> bool:
        found = episodes.recall_verdicts(path, "key", logged)
        if found is not None and [e.to_json() for e in found] != [e.to_json() for e in logged]:
            raise Defect("other verdicts than were kept")
        return found is None

    def replies(path: Path) -> bool:
        with contextlib.closing(Endpoint(place, "judge", path)) as endpoint:
            json.dumps(endpoint.figures(), allow_nan=False)
        return False

    def metrics(path: Path) -> bool:
        found = calibrate(str(path.parent))
        if not math.isfinite(found.operations):
            raise Defect(f"a rate of {found.operations}")
        return False

    def logprobs(path: Path) -> bool:
        found = _read(path, [example], said.append)
        if found is not None and not np.array_equal(found, [-1.0, -2.0]):
            raise Defect("other log-probs than were kept")
        return found is None

    def start(path: Path) -> bool:
        run = argparse.Namespace(rank=0, world_size=1)
        evaluator = argparse.Namespace(folder=folder, run=run)
        found = Evaluator._start_texts(evaluator, 1, logged)  # type: ignore[arg-type]
        "".join(found[episode.index] for episode in logged)
        return False

    first = folder / "a.journal"
    first.unlink(missing_ok=True)
    episodes.sample_once(first, {"a": 1}, prompts, [3, 4], lambda: rollouts, said.append)
    episodes.keep_verdicts(folder / "a.verdicts", "key", logged)
    reply = {"hash": "x", "text": "A", "prompt_tokens": 3, "completion_tokens": 1, "cost": 0.5}
    steps = [{"step": i, "loss": 1.0, "speed/tflops": 0.1} for i in range(1, 20)]
    write_rows(folder / "replies.jsonl", [reply, reply])
    write_rows(folder / "metrics.jsonl", steps)
    _write(folder / "a.safetensors", np.array([-1.0, -2.0], np.float32), said.append)
    (folder / "start-0of1.json").write_text(json.dumps({e.index: e.texts[0] for e in logged}))
    readers: dict[str, Callable[[Path], bool]] = {
        "a.journal": journal, "a.verdicts": verdicts, "replies.jsonl": replies,
        "metrics.jsonl": metrics, "a.safetensors": logprobs, "start-0of1.json": start,
    }  # fmt: skip
    files = {name: (folder / name).read_bytes() for name in readers}
    trees = {
        "replies.jsonl": [reply], "metrics.jsonl": steps[:2],
        "start-0of1.json": [json.loads(files["start-0of1.json"])],
    }  # fmt: skip
    inputs = st.one_of(
        st.sampled_from(sorted(files)).flatmap(
            lambda name: st.tuples(st.just(name), damaged([files[name]]))
        ),
        st.sampled_from(sorted(trees)).flatmap(
            lambda name: st.tuples(
                st.just(name), edited(trees[name]).map(lambda tree: f"{as_json(tree)}\n".encode())
            )
        ),
    )

    def check(name: str, content: bytes) -> str:
        (folder / name).write_bytes(content)
        names = (str(folder / name), f"--calibration {folder}: ")
        return taken(lambda: readers[name](folder / name), *names)

    return Case(check, inputs)


# -------------------------------------------------------------------------------------- judgments


def fuzz_judgments(reading: Reading) -> Case:
    """Files that people filled in."""
    source = write_rows(reading.folder / "answers.jsonl", rows("completion", 3))
    exported, filled = reading.folder / "exported.jsonl", reading.folder / "filled.jsonl"
    result = reading.folder / "judged.jsonl"
    exported.unlink(missing_ok=True)
    people.export(str(source), exported)
    lines = [json.loads(line) for line in exported.read_text("utf-8").splitlines()]
    for line in lines[1:]:
        line["judgment"] = "Bad."
    whole = "".join(json.dumps(line) + "\n" for line in lines).encode()
    inputs = st.one_of(
        damaged([whole]),
        edited(lines).map(lambda tree: b"\n".join([as_json(tree).encode(), whole])),
        edited([lines]).map(
            lambda trees: "\n".join(
                map(as_json, trees if isinstance(trees, list) else [trees])
            ).encode()
        ),
    )

    def check(content: bytes) -> str:
        filled.write_bytes(content)

        def read() -> bool:
            found = people.import_judgments(filled, result)
            load_records([DatasetConfig(path=str(result))], strict=True, seed=0, want="judged")
            return bool(found.left_open)

        # A row may be wrong in what nobody hashes: its weight.
        return taken(read, str(filled), f"{result}:")

    return Case(check, st.tuples(inputs))


# ------------------------------------------------------------------------------ models and adapters


def fuzz_models(reading: Reading) -> Case:
    """Files of a model's and of an adapter's folder, up to where weights are loaded into it."""
    from transformers.utils import logging

    from fastalign.config import ModelConfig
    from fastalign.model import load_generation_config, load_model_config, load_tokenizer

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model, adapter = reading.folder / "a-model", reading.folder / "an-adapter"
    for folder, source in ((model, reading.model), (adapter, Path(reading.finished.output_dir))):
        if not folder.exists():
            folder.mkdir()
            for path in source.iterdir():
                small = path.suffix in (".json", ".jinja") or path.name.startswith("adapter")
                if path.is_file() and small and path.name != "run.json":
                    shutil.copy(path, folder)
    found = {folder: contents(folder) for folder in (model, adapter)}
    config = ModelConfig(model_name_or_path=str(model))

    def read_model() -> bool:
        tokenizer = load_tokenizer(config)
        load_model_config(config)
        load_generation_config(config)
        Renderer(tokenizer).completion([{"role": "user", "content": "one"}], "two", source="x:1")
        return False

    def read_adapter() -> bool:
        adapter_config(str(adapter))
        trained_on_nf4(str(adapter))
        return False

    def check(folder: Path, change: tuple[str, bytes | None]) -> str:
        with with_file(folder, *change):
            if folder == model:
                return taken(read_model, str(model), "tokenizer ", "x")
            return taken(read_adapter, str(adapter))

    def of(folder: Path) -> st.SearchStrategy[Any]:
        trees = [n for n in found[folder] if n.endswith(".json") and n != "tokenizer.json"]
        trees_edited = st.sampled_from(sorted(trees)).flatmap(
            lambda name: st.tuples(
                st.just(name),
                edited([json.loads(found[folder][name])]).map(lambda x: as_json(x).encode()),
            )
        )
        return st.tuples(st.just(folder), trees_edited | changed_file(found[folder]))

    return Case(check, of(model) | of(adapter))


# ------------------------------------------------------------------------------------------- runs


FUZZERS: dict[str, Callable[[Reading], Case]] = {
    "rows": fuzz_rows,
    "files": fuzz_files,
    "templates": fuzz_templates,
    "recipes": fuzz_recipes,
    "checkpoints": fuzz_checkpoints,
    "forged": fuzz_forged,
    "journals": fuzz_journals,
    "judgments": fuzz_judgments,
    "models": fuzz_models,
}


def fuzz(kind: str, reading: Reading, inputs: int, random_seed: int) -> Counter[str]:
    """How many inputs of a kind had each outcome.

    Raises:
        Exception: that of the first defect, with the smallest input for it in its notes.
    """
    case = FUZZERS[kind](reading)
    counts: Counter[str] = Counter()

    @seed(random_seed)
    @settings(
        max_examples=inputs,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(case.inputs)
    def is_taken_well(picked: tuple[Any, ...]) -> None:
        counts[case.check(*picked)] += 1

    is_taken_well()
    return counts


def commit() -> str:
    """Of the checkout, "-dirty" behind it when it has changes."""
    git = ["git", "-C", str(Path(__file__).parent)]
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True).stdout
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    return head.strip() + ("-dirty" if changed else "")


def main() -> int:
    from conftest import make_tiny_llama

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--inputs", type=int, default=10_000, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=FUZZERS, default=list(FUZZERS))
    parser.add_argument("--output", type=Path, help="JSON; what it has of other kinds is kept")
    asked = parser.parse_args()
    version = commit()
    kept = asked.output is not None and asked.output.is_file()
    results = json.loads(asked.output.read_text("utf-8"))["kinds"] if kept else {}
    defects = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        reading = Reading(make_tiny_llama(folder / "model"), folder)
        for kind in asked.only:
            began, defect = time.monotonic(), None
            try:
                counts = fuzz(kind, reading, asked.inputs, asked.seed)
            except Exception as error:
                defects, counts, defect = defects + 1, Counter(), str(error)
                traceback.print_exc()
            results[kind] = {
                "inputs": counts.total(),
                **{outcome: counts[outcome] for outcome in (ACCEPTED, SKIPPED, REFUSED)},
                "defect": defect,
                "seconds": round(time.monotonic() - began, 1),
                "seed": asked.seed,
                "commit": version,
            }
            print(f"{kind}: {dict(counts)}", flush=True)
    if asked.output is not None:
        command = f"python tests/fuzz.py --inputs {asked.inputs} --seed {asked.seed}"
        ordered = {kind: results[kind] for kind in FUZZERS if kind in results}
        text = json.dumps({"command": command, "kinds": ordered}, indent=1)
        asked.output.write_text(text + "\n", encoding="utf-8")
    return 1 if defects else 0


if __name__ == "__main__":
    sys.exit(main())
