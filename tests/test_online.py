"""Online CUT with judges that write: servers, models, limits that pause it, and what it logs."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chat_server import ChatServer, serving
from safetensors.torch import load_file
from support import distance, outside_environment, recipe, rows, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastalign.train as loop
from fastalign import checkpoint, prepare
from fastalign.cli import main
from fastalign.config import Config, ConfigError, RolloutConfig, dump_config, parse_config
from fastalign.endpoint import JudgeError
from fastalign.episodes import Episode, journal_path, recall_verdicts
from fastalign.methods import make_method
from fastalign.model import load_tokenizer
from fastalign.plan import Planner
from fastalign.rollout import choose_judge_engine
from fastalign.rollout.hf import HfEngine
from fastalign.run import Run
from fastalign.templates import Renderer, WrittenTemplate
from fastalign.train import Paused, train

pytestmark = pytest.mark.usefixtures("quiet_process")

LORA = {"use_peft": True, "lora_r": 4, "lora_alpha": 16}
SIZES = {"iterations": 2, "prompts_per_iteration": 5, "num_generations": 2}

RULE = """
def written(prompt, text):
    return None if len(text) % 3 == 0 else f"Has {len(text)} letters."
"""


@pytest.fixture
def rule(tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "rule.py"
    path.write_text(RULE)
    return {"path": f"{path}:written"}


def response(question: str) -> str:
    return question.split("### Response\n")[1].rpartition("\n\nSay in one or two")[0]


def counts_letters(question: str) -> tuple[int, str]:
    """What the rule says, in a server's words."""
    letters = len(response(question))
    return 200, "The response is perfect." if letters % 3 == 0 else f"Has {letters} letters."


@pytest.fixture
def server():
    with serving() as running:
        running.answer = staticmethod(counts_letters)
        yield running


def by_server(server: type[ChatServer], **keys: Any) -> dict[str, Any]:
    place = {"base_url": server.url, "model": "m", "max_retries": 0, "max_concurrency": 2}
    return {"type": "endpoint", "endpoint": place | keys}


def online(model: Path, folder: Path, judge: dict[str, Any], **keys: Any) -> Config:
    keys = {"online": SIZES, "judge": judge, "learning_rate": 3e-3} | LORA | keys
    return recipe("cut", model, folder, **keys)


def rounds(config: Config) -> list[list[Episode]]:
    files = sorted(Path(config.output_dir, "episodes").glob("*.jsonl"))
    return [
        [Episode.from_json(line) for line in f.read_text(encoding="utf-8").split("\n")[:-1]]
        for f in files
    ]


def logged(config: Config, name: str) -> list[dict[str, Any]]:
    lines = Path(config.output_dir, "metrics.jsonl").read_text().splitlines()
    return [x for x in map(json.loads, lines) if name in x]


def result(config: Config, folder: str = "") -> dict[str, torch.Tensor]:
    return load_file(Path(config.output_dir, folder, "adapter_model.safetensors"))


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def changed(config: Config, **keys: Any) -> Config:
    tree = config.model_dump(mode="json", by_alias=True)
    return parse_config(tree | keys)


# ------------------------------------------------------------------------------------- servers


def test_a_server_teaches_what_a_rule_does_that_says_the_same(server, rule, sharp_llama, tmp_path):
    asked = online(sharp_llama, tmp_path / "server", by_server(server))
    ruled = online(sharp_llama, tmp_path / "rule", rule)
    metrics = train(asked)
    train(ruled)
    assert same(result(asked), result(ruled))
    for ours, theirs in zip(rounds(asked), rounds(ruled), strict=True):
        assert [e.judgments for e in ours] == [e.judgments for e in theirs]
        assert {j is None for e in ours for j in e.judgments} == {True, False}
    distinct = {json.dumps(r["messages"]) for r in server.asked}
    assert len(server.asked) == len(distinct) <= 2 * 5 * 2
    assert metrics["judge/requests"] == len(server.asked)
    assert metrics["judge/requests"] + metrics["judge/cached"] == 2 * 5 * 2
    assert metrics["judge/prompt_tokens"] == 100 * len(server.asked)
    assert metrics["judge/failed"] == 0 and "judge/cost" not in metrics
    first, second = logged(asked, "judge/requests")
    assert 0 < first["judge/requests"] < second["judge/requests"]


def test_what_a_server_does_not_judge_is_left_out_and_logged(server, sharp_llama, tmp_path):
    def answer(question):
        kind = len(response(question)) % 4
        return [(500, "too hot"), (200, ""), (200, "$ERROR$"), (200, "It is wrong.")][kind]

    server.answer = staticmethod(answer)
    judge = by_server(server, input_cost_per_million=1e4)
    config = online(sharp_llama, tmp_path, judge, learning_rate=1e-5)
    metrics = train(config)
    reasons = {0: "no judgment: Error code: 500 - .*hot.*", 1: "no judgment: the reply is empty"}
    reasons |= {2: "judgment: error sentinel instead of a judgment", 3: "None"}
    for episodes in rounds(config):
        for text, judgment, noise in said_of(episodes):
            assert judgment == {2: "$ERROR$", 3: "It is wrong."}.get(len(text) % 4)
            assert re.fullmatch(reasons[len(text) % 4], str(noise))
    last = [(text, noise) for text, _, noise in said_of(rounds(config)[-1])]
    failed = sum(len(text) % 4 < 2 for text, _ in last)
    assert 0 < failed < len(last)
    assert metrics["judge/failed"] == pytest.approx(failed / len(last))
    assert metrics["rollout/examples"] == sum(noise is None for _, noise in last)
    paid = [x for x in server.asked if len(response(x["messages"][-1]["content"])) % 4]
    assert metrics["judge/cost"] == pytest.approx(len(paid) * 100 * 1e4 / 1e6)


def said_of(episodes: list[Episode]) -> list[tuple[str, str | None, str | None]]:
    """(answer, judgment, noise) of each."""
    return [
        said
        for episode in episodes
        for said in zip(episode.texts, episode.judgments or (), episode.noise, strict=True)
    ]


@pytest.mark.parametrize(
    ("status", "kind", "message"),
    [
        (401, ConfigError, "judge.endpoint: .* model 'm' refuses: .*whoever"),
        (500, JudgeError, "judge.endpoint: .*: no reply to any of .* questions: .*whoever"),
    ],
)
def test_a_server_that_judges_nothing_stops_the_run(
    server, sharp_llama, tmp_path, status, kind, message
):
    server.answer = staticmethod(lambda question: (status, "whoever"))
    with pytest.raises(kind, match=message):
        train(online(sharp_llama, tmp_path, by_server(server)))


def test_a_judge_that_goes_down_stops_the_run_and_loses_nothing(
    server, sharp_llama, tmp_path, capfd
):
    """In the second round it answers three questions, and no more until the run goes on."""
    whole = online(sharp_llama, tmp_path / "whole", by_server(server))
    train(whole)
    questions = len(server.asked)
    config = online(sharp_llama, tmp_path / "down", by_server(server))
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_config(config))
    server.asked.clear()
    up = questions // 2 + 3

    def goes_down(question: str) -> tuple[int, str]:
        return counts_letters(question) if len(server.asked) <= up else (503, "later")

    server.answer = staticmethod(goes_down)
    # Three of ten were answered: seven are set aside and counted.
    assert main(["train", str(path), "output_dir=" + str(tmp_path / "few")]) == 0
    rows = [json.loads(x) for x in (tmp_path / "few/metrics.jsonl").read_text().splitlines()]
    failed = [x["judge/failed"] for x in rows if "judge/failed" in x]
    assert failed[0] == 0 and 0.5 < failed[1] < 1
    server.asked.clear()
    up = questions // 2
    capfd.readouterr()
    assert main(["train", str(path)]) == 1
    (saved,) = checkpoint.checkpoints(Path(config.output_dir))
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith("fastalign: judge: nothing was said of any of 5 prompts: no judgment: ")
    assert line.endswith(f"later; {saved} is saved: continue with --resume"), line
    server.answer = staticmethod(counts_letters)
    before = len(server.asked)
    assert main(["train", str(path), "--resume"]) == 0
    assert len(server.asked) - before == questions - up
    assert "10 rollouts were sampled before, and are used" in capfd.readouterr().err
    assert same(result(config), result(whole))


# -------------------------------------------------------------------------------------- pauses


def test_a_run_that_is_paused_ends_where_an_undisturbed_one_does(
    server, sharp_llama, tmp_path, capfd
):
    """Paused in its first round and in its second, and nothing is asked or sampled again."""
    keys = {"save_steps": 2, "lora_dropout": 0.2}
    whole = online(sharp_llama, tmp_path / "whole", by_server(server), **keys)
    train(whole)
    questions = len(server.asked)
    server.asked.clear()
    config = online(sharp_llama, tmp_path / "paused", by_server(server, max_requests=3), **keys)
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_config(config))
    assert main(["train", str(path)]) == 75
    line = capfd.readouterr().err.splitlines()[-1]
    assert line == (
        "fastalign: paused: judge.endpoint.max_requests = 3 is reached: 3 requests, 300 prompt "
        f"tokens, 30 completion tokens; {config.output_dir}/checkpoint-0 is saved: raise it and "
        "continue with --resume"
    )
    assert len(server.asked) == 3 and not rounds(config)
    # The same limit stops it again, and no rollout is needed to find out.
    assert main(["train", str(path), "--resume"]) == 75
    assert len(server.asked) == 3
    second = questions - 2
    assert main(["train", str(path), "--resume", f"judge.endpoint.max_requests={second}"]) == 75
    assert len(server.asked) == second
    assert [len(r) for r in rounds(config)] == [5]
    # How a server is asked and paid may change too.
    limits = ["judge.endpoint.max_requests=null", "judge.endpoint.max_concurrency=1"]
    assert main(["train", str(path), "--resume", *limits]) == 0
    assert len(server.asked) == questions
    assert len({json.dumps(r["messages"]) for r in server.asked}) == questions
    assert same(result(config), result(whole))
    assert [x["loss"] for x in logged(config, "loss")] == [x["loss"] for x in logged(whole, "loss")]
    for ours, theirs in zip(rounds(config), rounds(whole), strict=True):
        assert [e.judgments for e in ours] == [e.judgments for e in theirs]
        for a, b in zip(ours, theirs, strict=True):
            for x, y in zip(a.rollouts, b.rollouts, strict=True):
                assert np.array_equal(x.token_ids, y.token_ids)


def test_what_was_sampled_is_not_sampled_again(server, sharp_llama, tmp_path, monkeypatch):
    """A sampler that would answer otherwise next time (a GPU's) is not asked again."""
    judged: list[list[Episode]] = []
    collect = loop.collect

    def watch(run: Run, episodes: list[Episode], index: int) -> Any:
        judged.append(episodes)
        return collect(run, episodes, index)

    monkeypatch.setattr(loop, "collect", watch)
    config = online(sharp_llama, tmp_path, by_server(server, max_requests=2))
    with pytest.raises(Paused):
        train(config)

    def sampled_again(*_: Any) -> None:
        raise AssertionError("sampled again")

    with monkeypatch.context() as patched:
        patched.setattr(HfEngine, "generate", sampled_again)
        with pytest.raises(Paused):
            train(changed(config, resume_from_checkpoint=True))
    first, again = ([e.to_json() for e in episodes] for episodes in judged)
    assert first == again and len(first) == 5
    server.answer = staticmethod(lambda question: (200, "It is wrong."))
    train(changed(config, resume_from_checkpoint=True, judge=by_server(server)))
    drawn = sorted(judged[0], key=lambda e: e.index)
    assert [e.texts for e in rounds(config)[0]] == [e.texts for e in drawn]


DEADLY_RULE = """
import os, signal
from pathlib import Path

fatal = [Path(__file__).with_name(name) for name in ("first", "second")]

def written(prompt, text):
    global asked
    asked += 1
    # In the middle of judging, in each round once.
    for number, path in enumerate(fatal):
        if asked == 10 * number + 6 and not path.exists():
            path.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    return None if len(text) % 3 == 0 else f"Has {len(text)} letters."

asked = 0
"""


@pytest.mark.slow
def test_a_run_that_is_killed_uses_what_it_sampled(rule, sharp_llama, tmp_path):
    """SIGKILL while the first round is judged, and, after a checkpoint, while the second is."""
    whole = online(sharp_llama, tmp_path / "whole", rule, save_steps=1)
    train(whole)
    deadly = tmp_path / "deadly.py"
    deadly.write_text(DEADLY_RULE)
    config = online(sharp_llama, tmp_path / "killed", {"path": f"{deadly}:written"}, save_steps=1)
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_config(config))
    command = [sys.executable, "-m", "fastalign", "train", str(path), "--resume"]
    runs = [
        subprocess.run(
            command, env=outside_environment(), capture_output=True, text=True, timeout=300
        )
        for _ in range(3)
    ]
    assert [run.returncode for run in runs] == [-signal.SIGKILL, -signal.SIGKILL, 0], runs
    used = [re.findall(r"(\d+)-0.journal: 10 rollouts were sampled before", r.stderr) for r in runs]
    assert used == [[], ["0000"], ["0001"]]
    # The checkpoints that are left go on in the second round.
    assert [path.name for path in Path(config.output_dir, "episodes").glob("*.journal")] == [
        "0001-0.journal"
    ]
    assert same(result(config), result(whole))
    for ours, theirs in zip(rounds(config), rounds(whole), strict=True):
        assert [(e.texts, e.judgments) for e in ours] == [(e.texts, e.judgments) for e in theirs]


FATAL_ONCE = """
from pathlib import Path

def written(prompt, text):
    asked = Path(__file__).with_name("asked")
    asked.write_text(asked.read_text() + "." if asked.exists() else ".")
    return None if len(text) % 3 == 0 else f"Has {len(text)} letters."
"""


def test_what_was_judged_is_not_asked_again(sharp_llama, tmp_path, monkeypatch, capfd):
    """A run that ends between its first judgments and its first checkpoint."""
    rule = tmp_path / "rule.py"
    rule.write_text(FATAL_ONCE)
    one_round = {"online": SIZES | {"iterations": 1}, "judge": {"path": f"{rule}:written"}}
    whole = online(sharp_llama, tmp_path / "whole", **one_round)
    train(whole)
    asked = rule.with_name("asked")
    assert asked.read_text() == "." * 10
    config = online(sharp_llama, tmp_path / "ended", **one_round)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    train(changed(config, resume_from_checkpoint=True))
    assert "5 prompts were judged before, and are not asked again" in capfd.readouterr().err
    assert asked.read_text() == "." * 20
    assert same(result(config), result(whole))
    ours, theirs = (Path(c.output_dir, "episodes/0000.jsonl").read_text() for c in (config, whole))
    assert ours.replace("ended", "whole") == theirs
    # What was said of other answers, or is damaged, is no answer.
    path = Path(config.output_dir, "episodes/0000-0.verdicts")
    episodes = rounds(config)[0]
    key = json.loads(path.read_text().split("\n")[0])["key"]
    assert recall_verdicts(path, "another", episodes) is None
    text = path.read_text()
    path.write_text(text.replace("Has ", "Had ", 1))
    assert recall_verdicts(path, key, episodes) is None
    path.write_text(text)
    assert [e.judgments for e in recall_verdicts(path, key, episodes) or ()] == [
        e.judgments for e in episodes
    ]


def interrupted(*arguments: Any) -> None:
    raise KeyboardInterrupt


def test_journals_are_kept_for_the_checkpoints_that_go_on_from_them(tmp_path):
    config = parse_config(
        {"method": "cut", "model_name_or_path": "m", "output_dir": str(tmp_path)}
        | {"datasets": [{"path": "x.jsonl"}], "save_total_limit": 2}
    )
    for i in range(4):
        journal_path(config.output_dir, i, 0).parent.mkdir(exist_ok=True)
        journal_path(config.output_dir, i, 0).touch()

    def left_after(step: int, round_index: int) -> list[str]:
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        position = vars(checkpoint.Position(step=step, round=round_index))
        (folder / "position.json").write_text(json.dumps(position))
        (folder / "manifest.json").touch()
        checkpoint.forget_old(config)
        return sorted(path.name[:4] for path in (tmp_path / "episodes").iterdir())

    assert left_after(9, 1) == ["0001", "0002", "0003"]
    assert left_after(10, 3) == ["0001", "0002", "0003"]
    assert left_after(11, 3) == ["0003"]
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == [
        "checkpoint-10",
        "checkpoint-11",
    ]


def test_what_another_base_sampled_is_not_used(rule, sharp_llama, other_llama, tmp_path, capfd):
    """The path and the fresh adapter are the same; only the base is not."""
    model = tmp_path / "model"
    shutil.copytree(sharp_llama, model)
    texts = []
    for base in (sharp_llama, other_llama):
        shutil.copy(base / "model.safetensors", model)
        config = online(model, tmp_path / "run", rule)
        train(config)
        texts.append([e.texts for e in rounds(config)[0]])
    assert "they are sampled anew" in capfd.readouterr().err
    assert texts[0] != texts[1]


def prefers_longer(question: str) -> tuple[int, str]:
    a, b = question.split("### Response A\n")[1].split("### Response B\n")
    b = b.rpartition("\n\nWhich response")[0]
    return 200, "A" if len(a.strip()) >= len(b.strip()) else "B"


@pytest.mark.parametrize("eval_steps", [2, 4, "round"])
def test_evaluation_pauses_too_and_is_made_up_for(server, rule, sharp_llama, tmp_path, eval_steps):
    server.answer = staticmethod(prefers_longer)
    held_out = write_rows(tmp_path / "held-out.jsonl", rows("prompt", 2, seed=3))
    keys = {"eval_datasets": [{"path": str(held_out)}], "eval_steps": eval_steps}
    keys |= {"metric_for_best_model": "win_rate", "greater_is_better": True}
    whole = online(sharp_llama, tmp_path / "whole", rule, eval_judge=by_server(server), **keys)
    train(whole)
    questions = len(server.asked)
    server.asked.clear()
    config = online(
        sharp_llama,
        tmp_path / "paused",
        rule,
        eval_judge=by_server(server, max_requests=1),
        **keys,
    )
    steps = []
    for limit in range(1, questions + 3, 3):
        judge = by_server(server, max_requests=limit)
        try:
            train(changed(config, eval_judge=judge, resume_from_checkpoint=limit > 1))
        except Paused as reason:
            assert f"eval_judge.endpoint.max_requests = {limit} is reached" in str(reason)
            steps.append(int(re.findall(r"checkpoint-(\d+)", str(reason))[0]))
    # At the start, between steps and at the end.
    assert steps[0] == 0 and steps[-1] == 6 and len(set(steps)) >= 3
    assert len(server.asked) == questions
    assert same(result(config), result(whole))
    shown = ("step", "eval/win_rate", "eval/mean_length", "eval/kl_to_reference")
    ours, theirs = (
        [[x[k] for k in shown] for x in logged(c, "eval/win_rate")] for c in (config, whole)
    )
    assert ours == theirs and len(ours) >= 3
    best = [
        load_file(Path(c.output_dir, "best/adapter_model.safetensors")) for c in (config, whole)
    ]
    assert same(*best)


@pytest.mark.slow
def test_two_ranks_ask_as_one_and_pause_as_one(server, sharp_llama, tmp_path):
    """One limit, one file and one exit code for all; under ZeRO-3, with fresh adapters."""
    keys = {
        "online": SIZES | {"prompts_per_iteration": 6, "fresh_adapter": True},
        # Adam divides by the gradient's size: an epsilon far above its rounding keeps that out.
        "adam_epsilon": 1e-2,
        "learning_rate": 1e-2,
    }
    alone = online(sharp_llama, tmp_path / "alone", by_server(server), **keys)
    train(alone)
    questions = len(server.asked)
    server.asked.clear()
    judge = by_server(server, max_requests=questions - 3)
    keys |= {"zero_stage": 3, "nproc_per_node": 2}
    config = online(sharp_llama, tmp_path / "together", judge, **keys)
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_config(config))
    command = [sys.executable, "-m", "fastalign", "train", str(path)]
    paused = subprocess.run(
        command, env=outside_environment(), capture_output=True, text=True, timeout=300
    )
    assert paused.returncode == 75, paused.stderr
    said = [line for line in paused.stderr.splitlines() if line.startswith("fastalign: ")]
    assert len(said) == 1 and f"max_requests = {questions - 3} is reached" in said[0]
    assert "Traceback" not in paused.stderr and len(server.asked) == questions - 3
    command += ["--resume", "judge.endpoint.max_requests=null"]
    resumed = subprocess.run(
        command, env=outside_environment(), capture_output=True, text=True, timeout=300
    )
    assert resumed.returncode == 0, resumed.stderr
    assert len(server.asked) == len({json.dumps(r["messages"]) for r in server.asked}) == questions
    for ours, theirs in zip(rounds(config), rounds(alone), strict=True):
        assert [e.texts for e in ours] == [e.texts for e in theirs]
        assert [e.judgments for e in ours] == [e.judgments for e in theirs]
    assert distance(result(config), result(alone)) < 1e-4


def test_a_pause_leaves_a_whole_checkpoint(server, sharp_llama, tmp_path):
    config = online(sharp_llama, tmp_path, by_server(server, max_requests=12), save_steps=1)
    with pytest.raises(Paused, match=r"checkpoint-\d+ is saved"):
        train(config)
    last = checkpoint.checkpoints(Path(config.output_dir))[-1]
    position = json.loads((last / "position.json").read_text())
    assert (position["round"], position["batch"]) == (1, 0)
    assert not (last / "pending.npz").exists()
    assert Path(config.output_dir, "episodes/0001-0.journal").is_file()
    # What decides the judgments may not change in between.
    with pytest.raises(ConfigError, match=r"judge\.endpoint\.temperature = 0\.0, the recipe says"):
        judge = by_server(server, temperature=1.0)
        train(changed(config, judge=judge, resume_from_checkpoint=True))


# -------------------------------------------------------------------------------------- models


def continuations(
    folder: Path, prompts: list[np.ndarray], adapter: Path | None = None
) -> list[str]:
    """What transformers' generate() adds, greedily."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        model.load_adapter(str(adapter))
    said = []
    for prompt in prompts:
        ids = torch.from_numpy(prompt.astype(np.int64))[None]
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        said.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    return said


def asked_of(model: Path, folder: Path, episodes: list[Episode]) -> list[np.ndarray]:
    renderer = Renderer(load_tokenizer(recipe("cut", model, folder)))
    return [renderer.written_prompt_ids(e.prompt, t) for e in episodes for t in e.texts]


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_the_frozen_start_writes_judgments(sharp_llama, tmp_path, lora):
    """Also in the second round, when the policy has moved; the engine holds the policy again for
    the rollouts of that round."""
    judge = {"type": "self", "max_tokens": 6}
    config = online(
        sharp_llama, tmp_path, judge, use_peft=lora, learning_rate=1e-2 if lora else 1e-3
    )
    metrics = train(config)
    first, second = rounds(config)
    for episodes in (first, second):
        said = continuations(sharp_llama, asked_of(sharp_llama, tmp_path, episodes))
        judgments = [j for e in episodes for j in e.judgments]
        assert judgments == [WrittenTemplate().judgment(x) if x.strip() else None for x in said]
        assert sum(j is not None for j in judgments) >= 5
    assert metrics["rollout/logprob_gap_mean"] < 1e-3
    assert logged(config, "grad_norm")[-1]["grad_norm"] > 0


def test_the_current_policy_writes_judgments(sharp_llama, tmp_path, monkeypatch):
    judge = {"type": "self", "model": "policy", "max_tokens": 6}
    config = online(sharp_llama, tmp_path, judge, learning_rate=1e-2)
    kept: list[Path] = []
    collect = loop.collect

    def watch(run: Run, episodes: list[Episode], index: int) -> Any:
        folder = tmp_path / f"policy-{index}"
        checkpoint.save_result(run.model, run.tokenizer, folder)
        kept.append(folder)
        return collect(run, episodes, index)

    monkeypatch.setattr(loop, "collect", watch)
    train(config)
    said = []
    for folder, episodes in zip(kept, rounds(config), strict=True):
        prompts = asked_of(sharp_llama, tmp_path, episodes)
        said.append(continuations(sharp_llama, prompts, folder))
        judgments = [j for e in episodes for j in e.judgments]
        assert judgments == [WrittenTemplate().judgment(x) if x.strip() else None for x in said[-1]]
    start = continuations(sharp_llama, asked_of(sharp_llama, tmp_path, rounds(config)[1]))
    assert said[1] != start


def test_another_model_writes_judgments(sharp_llama, other_llama, tmp_path, capfd):
    judge = {"type": "model", "model_name_or_path": str(other_llama), "max_tokens": 6}
    config = online(sharp_llama, tmp_path, judge)
    train(config)
    assert f"judge: {other_llama} in an engine of its own, hf" in capfd.readouterr().err
    ours, theirs = [], []
    for episodes in rounds(config):
        prompts = asked_of(sharp_llama, tmp_path, episodes)
        ours += [j for e in episodes for j in e.judgments]
        theirs += continuations(other_llama, prompts)
    assert ours == [WrittenTemplate().judgment(x) if x.strip() else None for x in theirs]
    facts = json.loads(Path(config.output_dir, "run.json").read_text())
    assert facts["judge_hash"] and facts["judge_hash"] != facts["model_hash"]


def test_another_model_compares(sharp_llama, other_llama, tmp_path, rule):
    """As training judge for pairs and as judge of evaluation, by its own log-probs."""
    model = {"type": "model", "model_name_or_path": str(other_llama), "min_decision_mass": 0.0}
    held_out = write_rows(tmp_path / "held-out.jsonl", rows("prompt", 2, seed=3))
    config = recipe(
        "dpo",
        sharp_llama,
        tmp_path,
        online=SIZES,
        judge=model | {"tie_threshold": 0.0},
        eval_judge=model,
        eval_datasets=[{"path": str(held_out)}],
        eval_steps=1,
        **LORA,
    )
    train(config)
    renderer = Renderer(load_tokenizer(config))
    other = AutoModelForCausalLM.from_pretrained(other_llama, dtype=torch.float32)
    a, b = renderer.decision_ids()
    (episode, *_), *_ = rounds(config)
    scores = []
    for first, second in (episode.texts, episode.texts[::-1]):
        ids = renderer.judge_prompt_ids(episode.prompt, first, second)
        with torch.no_grad():
            logits = other(torch.from_numpy(ids.astype(np.int64))[None]).logits[0, -1]
        p = logits.softmax(-1)
        scores.append((float(p[a]), float(p[b])))
    (verdict,) = episode.verdicts
    assert verdict.score_a == pytest.approx((scores[0][0] + scores[1][1]) / 2, rel=1e-3)
    assert verdict.score_b == pytest.approx((scores[0][1] + scores[1][0]) / 2, rel=1e-3)
    assert logged(config, "eval/win_rate")


@pytest.mark.parametrize(("device", "name"), [("cpu", "vllm"), ("cuda", "hf")])
def test_the_engine_of_another_model_is_chosen_by_the_device(device, name):
    """vLLM's allocator, which puts an engine to sleep on a GPU, is there once in a process."""
    pytest.importorskip("vllm")
    config = RolloutConfig(engine="vllm", max_num_seqs=3, tensor_parallel_size=2)
    settings, why = choose_judge_engine(config, device)
    assert (settings.engine, settings.max_num_seqs) == (name, 3)
    # What is embedded cannot be shared.
    assert settings.tensor_parallel_size == {"vllm": 2, "hf": 1}[name]
    assert ("one engine" in why) == (device == "cuda")


def test_a_question_without_room_is_set_aside(sharp_llama, tmp_path):
    """The model's context is the limit; what was answered to others still counts."""
    long = {"prompt": "word " * 215}
    data = write_rows(tmp_path / "mixed.jsonl", [long, *rows("prompt", 4)])
    keys = {"datasets": [{"path": str(data)}], "max_length": 900, "micro_batch_tokens": 2000}
    judge = {"type": "self", "max_tokens": 6}
    size = {"iterations": 1, "prompts_per_iteration": 5}
    config = online(sharp_llama, tmp_path, judge, online=size, **keys)
    metrics = train(config)
    (episodes,) = rounds(config)
    (noise,) = [x for e in episodes for x in e.noise if x and "tokens" in x]
    assert noise.startswith("no judgment: the question has ") and "have room" in noise
    assert 0 < metrics["judge/failed"] < 1


def test_a_judge_that_says_nothing_stops_the_run(sharp_llama, tmp_path, monkeypatch):
    judge = {"type": "self", "max_tokens": 6}
    monkeypatch.setattr(Renderer, "decode", lambda self, ids: " ")
    with pytest.raises(JudgeError, match="nothing was said of any of 5 prompts: no judgment: noth"):
        train(online(sharp_llama, tmp_path, judge))


# -------------------------------------------------------------------------------- what is logged


def test_a_reference_that_nothing_asks_does_not_move(rule, sharp_llama, tmp_path):
    """Said before a model is loaded, by a plan as well."""
    config = online(sharp_llama, tmp_path, rule, online=SIZES | {"rounds_per_reference": 1})
    for start in (train, partial(Planner, gpu=("h100", 2**36))):
        with pytest.raises(ConfigError, match=r"^online.rounds_per_reference is set, but noth"):
            start(config)
    assert not Path(config.output_dir, "run.json").exists()


def test_prompts_do_not_come_back_within_an_epoch(rule, sharp_llama, tmp_path):
    config = online(
        sharp_llama, tmp_path, rule, online={"prompts_per_iteration": 4}, num_train_epochs=2.0
    )
    train(config)
    seen = [e.prompt[0]["content"] for episodes in rounds(config) for e in episodes]
    given = {row["prompt"] for row in rows("prompt", 12)}
    assert len(seen) == 24
    assert set(seen[:12]) == set(seen[12:]) == given
    assert seen[:12] != seen[12:]


def test_the_log_holds_all_of_a_round(rule, sharp_llama, tmp_path):
    config = online(sharp_llama, tmp_path, rule, num_train_epochs=1.0)
    train(config)
    renderer = Renderer(load_tokenizer(config))
    first, second = rounds(config)
    for path in Path(config.output_dir, "episodes").glob("*.jsonl"):
        for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
            assert Episode.from_json(line).to_json() == line
    for episode in (*first, *second):
        assert episode.prompt_ids.tolist() == renderer.prompt_ids(episode.prompt).tolist()
        for rollout, text in zip(episode.rollouts, episode.texts, strict=True):
            assert renderer.decode(rollout.token_ids) == text
            assert len(rollout.logprobs) == len(rollout.token_ids) and (rollout.logprobs <= 0).all()
    # The adapter of the second round is a later one.
    versions = [{x.weight_version for e in r for x in e.rollouts} for r in (first, second)]
    assert max(versions[0]) < min(versions[1])
    # Log-probs are the sampler's own, to the last bit of float32.
    base = AutoModelForCausalLM.from_pretrained(sharp_llama, dtype=torch.float32)
    episode = first[0]
    ids = np.concatenate([episode.prompt_ids, episode.rollouts[0].token_ids]).astype(np.int64)
    with torch.no_grad():
        logp = base(torch.from_numpy(ids)[None]).logits[0].log_softmax(-1)
    start = len(episode.prompt_ids)
    expected = logp[start - 1 : -1].gather(-1, torch.from_numpy(ids[start:])[:, None])[:, 0]
    assert episode.rollouts[0].logprobs == pytest.approx(expected.numpy(), abs=1e-4)


def examples_of(config: Config) -> tuple[list[Any], list[str]]:
    method = make_method(config)
    renderers = prepare.make_renderers(config, load_tokenizer(config), None)
    records, _, _ = prepare.load_data(config, method)
    lines = prepare.token_lines(records, renderers)
    return prepare.make_examples(method, records, renderers, config)[0], lines


def ids_of(examples: list[Any]) -> list[list[list[int]]]:
    return [[stream.input_ids.tolist() for stream in example.streams] for example in examples]


def test_a_log_is_training_data_token_for_token(rule, sharp_llama, tmp_path, capfd):
    source = online(sharp_llama, tmp_path / "online", rule)
    train(source)
    log = Path(source.output_dir, "episodes", "0000.jsonl")
    method, renderer = make_method(source), Renderer(load_tokenizer(source))
    (episodes, _) = rounds(source)
    expected = ids_of([x for e in episodes for x in method.from_episode(e, renderer)])
    data = [{"path": str(log)}]
    offline = recipe("cut", sharp_llama, tmp_path / "offline", datasets=data, **LORA)
    examples, lines = examples_of(offline)
    # An answer without a text is no row; one that was sampled as an end token alone is such.
    spoken = [bool(text.strip()) for e in episodes for text in e.texts]
    assert ids_of(examples) == [x for x, s in zip(expected, spoken, strict=True) if s]
    assert lines == [f"{len(examples)} answers are trained on as they were sampled"]
    train(offline)
    assert lines[0] in capfd.readouterr().err

    # A text that a person corrects is another answer, and its tokens are its own.
    read = [json.loads(line) for line in log.read_text(encoding="utf-8").split("\n")[:-1]]
    read[0]["completions"][0] = "the sum is two"
    corrected = write_rows(tmp_path / "corrected.jsonl", read)
    again, lines = examples_of(changed(offline, datasets=[{"path": str(corrected)}]))
    answer = renderer.completion(episodes[0].prompt, "the sum is two")[1].tolist()
    assert ids_of(again)[0][0][-len(answer) :] == answer
    assert ids_of(again)[1:] == ids_of(examples)[len(examples) - len(again) + 1 :]
    assert lines == [
        f"{len(again) - 1} answers are trained on as they were sampled, 1 are tokenised again: "
        "their template, tokenizer or text is not the recorded one"
    ]
    # Under another template no prompt is the one that was answered.
    other = [{"path": str(log), "template": "alpaca"}]
    _, lines = examples_of(changed(offline, datasets=other))
    assert lines[0].startswith(f"0 answers are trained on as they were sampled, {len(examples)} ")


@pytest.mark.parametrize(
    ("method", "other"),
    [("dpo", "dpo"), ("rso", "dpo"), ("rest", "sft"), ("raft", "sft")],
)
def test_a_log_of_comparisons_is_training_data_too(sharp_llama, tmp_path, method, other):
    """What the online run trained on, an offline one does: by pairs or by what was kept."""
    source = recipe(
        method,
        sharp_llama,
        tmp_path / "online",
        online={"iterations": 1, "prompts_per_iteration": 8, "num_generations": 4},
        judge={"type": "self", "tie_threshold": 0.0, "min_decision_mass": 0.0},
        max_completion_length=6,
    )
    train(source)
    (episodes,) = rounds(source)
    subject, renderer = make_method(source), Renderer(load_tokenizer(source))
    expected = ids_of([x for e in episodes for x in subject.from_episode(e, renderer)])
    assert len(expected) > 4
    data = [{"path": str(Path(source.output_dir, "episodes", "0000.jsonl"))}]
    offline = recipe(other, sharp_llama, tmp_path / "offline", datasets=data)
    examples, lines = examples_of(offline)
    assert ids_of(examples) == expected
    answers = sum(len(e.streams) for e in examples)
    assert lines == [f"{answers} answers are trained on as they were sampled"]
    if method == "raft":
        # Four answers meet in three matches, and the winner lost none of them.
        assert all(len(e.matches) == 3 for e in episodes)
        assert all(e.winner not in [loser for _, loser in e.preferences()] for e in episodes)
        assert all(e.kept in ((), (e.winner,)) for e in episodes)


# ------------------------------------------------------------------------------- fresh adapters


@pytest.mark.parametrize("fresh", [True, False])
def test_an_adapter_starts_anew_or_goes_on(rule, sharp_llama, tmp_path, monkeypatch, fresh):
    config = online(
        sharp_llama,
        tmp_path,
        rule,
        online=SIZES | {"iterations": 3, "prompts_per_iteration": 4, "fresh_adapter": fresh},
        lr_scheduler_type="linear",
    )
    firsts: list[tuple[dict[str, torch.Tensor], list[float], int]] = []
    rates: list[float] = []
    update, collect = loop.update, loop.collect
    sampled: list[dict[str, torch.Tensor]] = []
    new = [False]

    def watch_collect(run: Run, episodes: list[Episode], index: int) -> Any:
        sampled.append(run.model.adapter_tensors())
        new[0] = True
        return collect(run, episodes, index)

    def watch(run: Run, *arguments: Any) -> dict[str, float]:
        if new[0]:
            moments = [
                float(state["exp_avg"].abs().sum())
                for state in run.model.optimizer.state.values()
                if "exp_avg" in state
            ]
            firsts.append((run.model.adapter_tensors(), moments, len(rates)))
            new[0] = False
        done = update(run, *arguments)
        rates.append(done["learning_rate"])
        return done

    monkeypatch.setattr(loop, "collect", watch_collect)
    monkeypatch.setattr(loop, "update", watch)
    train(config)
    (start, _, _), *later = firsts
    assert len(later) == 2
    # Rollouts come from the adapter that was trained last, either way.
    assert not same(sampled[0], sampled[1]) and not same(sampled[1], sampled[2])
    for (tensors, moments, step), rollouts in zip(later, sampled[1:], strict=True):
        assert same(tensors, start) == fresh
        assert same(tensors, rollouts) == (not fresh)
        assert (sum(moments) == 0) == fresh
        # The schedule is the adapter's.
        assert (rates[step] == rates[0]) == fresh
    assert min(rates) > 0


def test_a_fresh_adapter_survives_an_interruption(server, sharp_llama, tmp_path):
    keys = {"online": SIZES | {"fresh_adapter": True}, "lora_dropout": 0.2}
    whole = online(sharp_llama, tmp_path / "whole", by_server(server), **keys)
    train(whole)
    questions = len(server.asked)
    judge = by_server(server, max_requests=questions - 2)
    config = online(sharp_llama, tmp_path / "paused", judge, **keys)
    with pytest.raises(Paused):
        train(config)
    resumed = changed(config, judge=by_server(server), resume_from_checkpoint=True)
    train(resumed)
    assert same(result(resumed), result(whole))
