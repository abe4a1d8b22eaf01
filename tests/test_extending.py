"""Methods and judges of a user's own: examples/simpo.py against the loss worked out from a model's
own logits, and mistakes in such a file, each in one line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support import (
    EXAMPLES,
    SIMPO,
    distance,
    recipe,
    rows,
    start,
    step_with_gradients,
    write_rows,
)
from test_judge import USER, episode
from transformers import AutoModelForCausalLM

from fastalign import cli, prepare
from fastalign.batch import make_batch
from fastalign.config import (
    Config,
    ConfigError,
    JudgeConfig,
    dump_config,
    load_config,
    parse_config,
)
from fastalign.data import Example
from fastalign.judge import Pair, compare, judge_written, make_rule_judge
from fastalign.methods import complete, make_method
from fastalign.model import load_tokenizer
from fastalign.train import train

pytestmark = pytest.mark.usefixtures("quiet_process")

# ------------------------------------------------------------------------------- the example


def simpo_by_hand(
    model: Any, examples: list[Example], beta: float, gamma: float
) -> tuple[torch.Tensor, dict[str, float]]:
    """Mean loss and rewards in float64, each answer alone through transformers."""

    def mean_logprob(stream: Any) -> torch.Tensor:
        ids = torch.from_numpy(stream.input_ids).long()
        first = int(stream.loss_mask.argmax())
        table = torch.log_softmax(model(ids[None]).logits[0, first - 1 : -1], -1)
        return sum(table[i, token] for i, token in enumerate(ids[first:])) / (len(ids) - first)

    losses, margins = [], []
    for example in examples:
        chosen, rejected = (beta * mean_logprob(s) for s in example.streams)
        losses.append(torch.log1p(torch.exp(gamma - (chosen - rejected))))
        margins.append(float((chosen - rejected).detach()))
    n = len(examples)
    right = sum(margin > 0 for margin in margins) / n
    return sum(losses) / n, {
        "rewards/margins": sum(margins) / n,
        "rewards/accuracies": right,
    }


@pytest.mark.parametrize(("beta", "gamma"), [(2.0, 1.0), (0.5, 0.0)])
def test_simpo_is_the_paper_s_loss_however_a_batch_is_packed(sharp_llama, tmp_path, beta, gamma):
    config = recipe(
        SIMPO, sharp_llama, tmp_path, method_config={"beta": beta, "gamma": gamma},
        learning_rate=1e-30, max_grad_norm=1e9,
    )  # fmt: skip
    run, examples = start(config)
    assert {len(e.streams) for e in examples} == {2} and run.model.reference_engine is None
    policy = AutoModelForCausalLM.from_pretrained(sharp_llama).double()
    loss, expected = simpo_by_hand(policy, examples, beta, gamma)
    loss.backward()
    true = {name: p.grad.float() for name, p in policy.named_parameters()}

    for tokens in (40, 300, 10**6):
        run.config = config.model_copy(update={"micro_batch_tokens": tokens})
        metrics, gradients = step_with_gradients(run, examples)
        assert metrics["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
        for name, value in expected.items():
            assert metrics[name] == pytest.approx(value, rel=1e-4)
        gradients = {name.removeprefix("model."): g for name, g in gradients.items()}
        named = {n: gradients[m] for n in true for m in gradients if m.endswith(n)}
        assert distance(named, true) < 1e-4
    # What is compared is no case in which answers weigh the same.
    assert 0 < expected["rewards/accuracies"] < 1


def write_recipe(folder: Path, model: Path, **keys: Any) -> Path:
    """examples/ in a folder of a user's, over data and a model of ours."""
    folder.mkdir(parents=True)
    for name in ("simpo.py", "simpo.yaml"):
        (folder / name).write_text((EXAMPLES / name).read_text())
    data = write_rows(folder / "pairs.jsonl", rows("preference", 12))
    tree = yaml.safe_load((folder / "simpo.yaml").read_text()) | {
        "model_name_or_path": str(model),
        "datasets": [{"path": str(data)}],
        "output_dir": str(folder / "out"),
        "dtype": "float32",
        "use_peft": False,
        "global_batch_size": 4,
        "max_length": 64,
        "max_steps": 2,
        "save_steps": 1,
        "report_to": [],
    }
    path = folder / "simpo.yaml"
    path.write_text(yaml.safe_dump(tree | keys))
    return path


def test_a_run_knows_the_file_and_goes_on_with_no_other(sharp_llama, tmp_path, capfd, monkeypatch):
    """As a user does it: trained, looked at, resumed; with the folder moved, the file changed, a
    setting changed."""
    write_recipe(tmp_path / "first", sharp_llama)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "first/simpo.yaml", "method_config.gamma=0.25"]) == 0
    out = tmp_path / "first" / "out"
    facts = json.loads((out / "run.json").read_text())
    assert facts["recipe"]["method_config"] == {"beta": 2.0, "gamma": 0.25}
    assert len(facts["method_hash"]) == 64
    card = (out / "README.md").read_text()
    assert "- SimPO\n" in card and "the method `simpo.py:SimPO`" in card
    # What was written is a recipe of the same run, from any folder.
    again = load_config(out / "recipe.yaml")
    assert again.method == f"{tmp_path}/first/simpo.py:SimPO"

    moved = tmp_path / "second"
    (tmp_path / "first").rename(moved)
    common = ["train", "second/simpo.yaml", f"output_dir={moved}/out", "--resume",
              f"datasets.0.path={tmp_path}/first/pairs.jsonl"]  # fmt: skip
    # The data keep their name, which the recipe gives; the code its content.
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "pairs.jsonl").write_bytes((moved / "pairs.jsonl").read_bytes())
    capfd.readouterr()
    assert cli.main([*common, "method_config.gamma=0.25"]) == 0
    assert "resumed from" in capfd.readouterr().err
    assert cli.main([*common, "method_config.gamma=0.5"]) == 2
    assert "was made with method_config.gamma = 0.25, the recipe says 0.5" in capfd.readouterr().err
    code = (moved / "simpo.py").read_text()
    # A method is read once by a process: the new content is found by its hash.
    (moved / "simpo.py").write_text(code.replace("logsigmoid(chosen", "logsigmoid(2 * chosen"))
    assert cli.main([*common, "method_config.gamma=0.25"]) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert "was made with other contents of method: SHA-256" in error


def test_a_dry_run_has_every_setting_and_the_files_where_they_are(tmp_path, capsys, monkeypatch):
    path = write_recipe(tmp_path / "a", tmp_path, method_config={})
    monkeypatch.chdir(tmp_path / "a")
    assert cli.main(["train", "simpo.yaml", "method_config.beta=3", "--dry-run"]) == 0
    shown = parse_config(yaml.safe_load(capsys.readouterr().out))
    assert shown.method == f"{tmp_path}/a/simpo.py:SimPO"
    assert shown.method_config == {"beta": 3.0, "gamma": 1.0}
    assert complete(shown) == shown == parse_config(yaml.safe_load(dump_config(shown)))
    # From another folder: the recipe's files lie beside it, the command line's where it is given.
    monkeypatch.chdir(tmp_path)
    assert load_config(path).method == f"{tmp_path}/a/simpo.py:SimPO"
    given = load_config(path, ["method=mine.py:M", "judge=mine.py:j", "eval_judge.path=x.py:e"])
    assert given.method == f"{tmp_path}/mine.py:M"
    assert given.judge == JudgeConfig(path=f"{tmp_path}/mine.py:j")
    assert given.eval_judge.path == f"{tmp_path}/x.py:e"
    path.write_text(path.read_text() + "judge: rules.py:j\neval_judge: {path: pack.rules:e}\n")
    given = load_config(path)
    assert given.judge == JudgeConfig(path=f"{tmp_path}/a/rules.py:j")
    assert given.eval_judge.path == "pack.rules:e"


def test_data_check_reads_rows_as_the_method_does(tiny_llama, tmp_path, capsys):
    path = write_recipe(tmp_path / "a", tiny_llama)
    assert cli.main(["data", "check", "--recipe", str(path), "--json"]) == 0
    (report,) = json.loads(capsys.readouterr().out)
    assert (report["kind"], report["usable"], report["max_length"]) == ("preference", 12, 64)
    assert {shown["stream"] for shown in report["rendered"]} == {"chosen", "rejected"}
    (path.parent / "own.py").write_text(
        "from fastalign.methods import Dropped, Preferences\n"
        "class Own(Preferences):\n"
        "    def from_record(self, record, renderer):\n"
        "        if len(record.chosen) < 20:\n"
        "            raise Dropped('chosen: too short')\n"
        "        return super().from_record(record, renderer)\n"
        "    def loss(self, logprob, *_, **__):\n"
        "        return logprob.sum(), {}\n"
    )
    tree = yaml.safe_load(path.read_text()) | {"method": "own.py:Own", "method_config": {}}
    path.write_text(yaml.safe_dump(tree))
    assert cli.main(["data", "check", "--recipe", str(path), "--json"]) == 0
    (report,) = json.loads(capsys.readouterr().out)
    short = sum(len(row["chosen"]) < 20 for row in rows("preference", 12))
    assert report["dropped"]["chosen: too short"]["count"] == short > 0
    assert report["usable"] == 12 - short
    for wrong in (["x.jsonl"], ["--as", "judged"], ["--template", "alpaca"]):
        assert cli.main(["data", "check", "--recipe", str(path), *wrong]) == 2
        assert "beside --recipe" in capsys.readouterr().err
    assert cli.main(["data", "check"]) == 2
    assert "FILE is missing" in capsys.readouterr().err


# ----------------------------------------------------------------------------------- mistakes

LOSS = """
    def loss(self, logprob, log1m_prob, batch, *, reference, progress):
        losses = -segment_sum(logprob, batch.cu_rows).view(-1, 2)[:, 0]
        return (losses * batch.weights).sum(), {"logps": total(losses[batch.weights > 0])}
"""
HEAD = """
import torch
from pydantic import Field
from fastalign.losses import segment_sum
from fastalign.methods import BaseMethod, Demonstrations, Judgments, MethodSettings, Preferences
from fastalign.methods import total
"""


def own(folder: Path, body: str, model: Path = Path("m"), **keys: Any) -> Config:
    """A recipe with a method ``Own`` of this text behind the usual imports."""
    folder.mkdir(exist_ok=True)
    path = folder / "own.py"
    path.write_text(HEAD + body)
    return recipe(f"{path}:Own", model, folder, **keys)


def refused(action: Callable[[], Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


WELL = "class Own(Preferences):" + LOSS


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("1 / 0", "importing {file}:7 raised ZeroDivisionError: division by zero"),
        ("class Own(Preferences:\n    pass", "importing {file}:7 raised SyntaxError: invalid syn"),
        ("import no_such_thing", "No module named 'no_such_thing'"),
        ("from fastalign.losses import nothing", "raised ImportError: cannot import name"),
        ("class Owm(Preferences):" + LOSS, "has no 'Own': did you mean 'Owm'?"),
        ("def Own(config): pass", "it is a function: a method is a class that extends BaseMethod"),
        ("class Own(dict): pass", "it is a class that extends dict: a method is a class that"),
        ("class Own(Preferences): pass", "it has no loss()"),
        ("class Own(BaseMethod):" + LOSS, "it has no from_record()"),
        ("class Own(BaseMethod):\n    wants = 'pairs'" + LOSS,
         "wants = 'pairs': must be one or a tuple of 'prompt', 'completion', 'judged'"),
        ("class Own(BaseMethod):\n    wants = ()\n    online_wants = 'prompt'" + LOSS,
         "it has no from_episode()"),
        ("class Own(Preferences):\n    judge_kind = 'both'" + LOSS,
         "judge_kind = 'both': must be one of 'written', 'pairwise', None"),
        ("class Own(Preferences):\n    Settings = dict" + LOSS,
         "Settings is no class that extends MethodSettings"),
        ("class Own(Preferences):\n    def __init__(self, config):\n        pass" + LOSS,
         "its __init__ does not call super().__init__(config)"),
        ("class Own(Preferences):\n    def __init__(self):\n        pass" + LOSS,
         "__init__() must take (self, config): too many positional arguments"),
        ("class Own(Preferences):\n    def loss(self, logprob, batch):\n        pass",
         "loss() must take (self, logprob, log1m_prob, batch, *, reference, progress): "),
        ("class Own(Preferences):\n    def __init__(self, config):\n        {}['x']" + LOSS,
         "line 9 of {file} raised KeyError: 'x'"),
    ],
)  # fmt: skip
def test_a_class_that_is_no_method_is_one_line(tmp_path, body, message):
    config = own(tmp_path, body)
    line = refused(lambda: make_method(config))
    file = tmp_path / "own.py"
    assert line.startswith(f"method = '{file}:Own': ")
    assert message.format(file=file) in line


def test_files_that_are_not_there_and_settings_that_do_not_fit(tmp_path):
    def error_of(**keys: Any) -> str:
        return refused(lambda: make_method(recipe(keys.pop("method"), tmp_path, tmp_path, **keys)))

    gone = f"{tmp_path}/gone.py"
    assert error_of(method=f"{gone}:M") == f"method = '{gone}:M': no such file {gone}"
    assert "write package.module:name" in error_of(method="my:")
    typo = error_of(method=SIMPO, method_config={"bata": 1})
    assert typo == "method_config.bata is no key of simpo.py:SimPO: did you mean 'beta'?"
    both = error_of(method=SIMPO, method_config={"beta": 0, "gamma": "x"})
    assert "method_config.beta = 0: input should be greater than 0; method_config.gamma" in both
    assert "method_config.gamma is no key of dpo" in error_of(
        method="dpo", method_config={"gamma": 1}
    )
    needed = own(
        tmp_path,
        "class Own(Preferences):\n    class Settings(MethodSettings):\n        tau: float" + LOSS,
    )
    assert refused(lambda: make_method(needed)) == "method_config.tau is missing"
    made = make_method(needed.model_copy(update={"method_config": {"tau": 2}}))
    assert made.settings.tau == 2.0
    online = {"online": {}, "judge": {"path": "a:b"}}
    assert "compares answers" in error_of(method=SIMPO, **online)


def broken(function: str, body: str) -> str:
    return f"class Own(Preferences):\n    def {function}:\n        {body}\n" + LOSS


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (broken("from_record(self, record, renderer)", "return record.nothing"),
         "line 9 of {file} raised AttributeError: 'Record' object has no attribute 'nothing'"),
        (broken("from_record(self, record, renderer)", "pass"),
         "from_record() returned None: must be a list of Examples"),
        (broken("from_record(self, record, renderer)", "return [1]"),
         "from_record() returned a list with a int: must be a list of Examples"),
        (broken("select(self, examples, seed)", "return iter(examples)"),
         "select() returned a list_iterator: must be a list of Examples"),
        (broken("denominator(self, examples)", "return 0"),
         "denominator() returned 0: must be a number above 0"),
    ],
)  # fmt: skip
def test_what_its_functions_do_wrong_is_one_line(tiny_llama, tmp_path, body, message):
    config = own(tmp_path, body, tiny_llama)

    def read() -> None:
        method = make_method(config)
        renderers = prepare.make_renderers(config, load_tokenizer(config), None)
        records, _, _ = prepare.load_data(config, method)
        examples, _ = prepare.make_examples(method, records, renderers, config)
        method.denominator(method.select(examples, 0))

    line = refused(read)
    file = tmp_path / "own.py"
    assert line == f"method = '{file}:Own': {message.format(file=file)}"


def losing(body: str) -> str:
    return (
        "class Own(Preferences):\n"
        "    def loss(self, logprob, log1m_prob, batch, *, reference, progress):\n"
        "        losses = -segment_sum(logprob, batch.cu_rows).view(-1, 2)[:, 0]\n"
        "        weighed = (losses * batch.weights).sum()\n"
        f"        {body}\n"
    )


@pytest.fixture
def examples(tiny_llama, tmp_path) -> list[Example]:
    config = recipe("dpo", tiny_llama, tmp_path)
    method = make_method(config)
    renderers = prepare.make_renderers(config, load_tokenizer(config), None)
    records, _, _ = prepare.load_data(config, method)
    return prepare.make_examples(method, records, renderers, config)[0]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return weighed", "returned a Tensor of float32 []: must be (loss, metrics)"),
        ("return losses, {}", "returned a Tensor of float32 [4] as loss: must be a scalar tensor"),
        ("return float(weighed), {}", "returned a float as loss: must be a scalar tensor"),
        ("return weighed, [1]", "returned a list as metrics: must be a dict"),
        ("return weighed, {'a': losses.mean()}",
         "returned a Tensor of float32 [] as metric 'a': must be a tensor [sum, count]"),
        ("return logprob[:3] @ logprob, {}", "line 11 of {file} raised RuntimeError: "),
        ("return losses.mean(), {}",
         "it must be a sum over the records, which the trainer divides by denominator()"),
        ("return losses.sum(), {}", "it must count each record by batch.weights"),
        ("return weighed, {'a': total(losses)}",
         "the metric 'a' of loss() counts records of weight 0"),
    ],
)  # fmt: skip
def test_a_loss_is_tried_before_the_first_step(examples, tmp_path, body, message):
    """On log-probs that are made up, without a model."""
    config = own(tmp_path, losing(body))
    method = make_method(config)
    line = refused(lambda: method.denominator(examples))
    assert line.startswith(f"method = '{tmp_path}/own.py:Own': ")
    assert message.format(file=tmp_path / "own.py") in line


def test_a_loss_is_looked_at_in_every_pack(examples, tmp_path):
    bodies = {
        "detached": "return weighed.detach(), {}",
        "by content": "return weighed, {str(len(losses)): total(losses[batch.weights > 0])}",
    }
    first, second = (make_batch(examples[:n]) for n in (4, 3))
    logprob = torch.zeros(len(first.rows)).requires_grad_()
    other = torch.zeros(len(second.rows)).requires_grad_()
    keys: dict[str, Any] = {"reference": None, "progress": 0.0}

    method = make_method(own(tmp_path / "a", losing(bodies["detached"])))
    assert "returned a loss without a gradient" in refused(
        lambda: method.loss(logprob, logprob, first, **keys)
    )
    with torch.no_grad():
        assert float(method.loss(logprob, logprob, first, **keys)[0]) == 0

    method = make_method(own(tmp_path / "b", losing(bodies["by content"])))
    method.loss(logprob, logprob, first, **keys)
    assert "other metrics for another pack (3, 4): the names must not" in refused(
        lambda: method.loss(other, other, second, **keys)
    )


def test_what_a_loss_keeps_is_not_touched_by_the_trial(examples, tmp_path):
    """A running mean moves in training alone; a loss that draws is not compared."""
    body = losing("self.seen += 1; return weighed * self.seen, {}").replace(
        "    def loss", "    def __init__(self, c):\n        super().__init__(c)\n"
        "        self.seen = 0\n\n    def loss", 1,
    )  # fmt: skip
    method = make_method(own(tmp_path, body))
    assert method.denominator(examples) == len(examples) and method.seen == 0


def test_a_run_with_a_mistake_in_the_loss_ends_in_one_line(tiny_llama, tmp_path, capfd):
    config = own(tmp_path, losing("return losses.mean(), {}"), tiny_llama)
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_config(config))
    assert cli.main(["train", str(path)]) == 2
    error = capfd.readouterr().err
    assert "Traceback" not in error
    last = error.splitlines()[-1]
    assert last.startswith(f"fastalign: method = '{tmp_path}/own.py:Own': loss() of 4 records is")


def test_simpo_learns_from_its_own_samples_and_a_judge_of_one_s_own(sharp_llama, tmp_path):
    path = write_recipe(
        tmp_path / "a", sharp_llama, max_steps=None, save_steps=None,
        online={"iterations": 1, "prompts_per_iteration": 4, "num_generations": 2},
        judge="judge.py:longer", max_completion_length=8, rollout={"engine": "hf"},
    )  # fmt: skip
    write_rows(tmp_path / "a" / "pairs.jsonl", rows("prompt", 8))
    (tmp_path / "a" / "judge.py").write_text(
        "def longer(prompt, a, b):\n    return len(a) - len(b)\n"
    )
    config = load_config(path)
    metrics = train(config)
    assert math.isfinite(metrics["loss"]) and metrics["rewards/margins"] != 0
    facts = json.loads((tmp_path / "a" / "out" / "run.json").read_text())
    assert len(facts["judge_hash"]) == len(facts["method_hash"]) == 64


# -------------------------------------------------------------------------------------- judges


@pytest.mark.parametrize(
    ("body", "kind", "message"),
    [
        ("def own(prompt, answer):\n    return answer['x']", "written",
         "judge.path = '{file}:own': line 2 of {file} raised TypeError: string indices must be"),
        ("def own(prompt, answer):\n    return 3", "written",
         "judge.path: own gave 3 for an answer: a written judgment is a text, or None"),
        ("class own:\n    def judge(self, answers):\n        return None", "written",
         "judge.path: own gave None for 1: it must give one for each, in their order"),
        ("class own:\n    def judge(self, a): pass\n    def __init__(self): 1 / 0", "written",
         "line 3 of {file} raised ZeroDivisionError"),
        ("def own(prompt, a, b):\n    return None", "pairwise",
         "judge.path: own gave None for a pair: must be a number, above 0 where the first"),
        ("def own(prompt, a, b):\n    raise ValueError('two\\nlines')", "pairwise",
         "line 2 of {file} raised ValueError: two lines"),
        ("class own:\n    def compare(self, pairs): return [1.0 for _ in pairs]", "pairwise",
         "judge.path: own gave 1.0 for a pair: must be a Verdict of fastalign.episodes"),
    ],
)  # fmt: skip
def test_what_a_judge_does_wrong_is_one_line(tmp_path, body, kind, message):
    file = tmp_path / "judge.py"
    file.write_text(body)

    def ask() -> None:
        judge = make_rule_judge(JudgeConfig(path=f"{file}:own"), kind)
        if kind == "written":
            judge_written(judge, [episode("a")])
        else:
            compare(judge, [Pair(USER, "a", "b")])

    assert message.format(file=file) in refused(ask)
