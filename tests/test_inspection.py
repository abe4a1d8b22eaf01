"""``fastalign inspect``: its figures are those of training, and its page is inert and readable."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from pages import CHROMIUM, HOSTILE, Page, check_inert, colours, drawn_by_chromium, luminance, ratio
from support import recipe, rows, start, write_rows

import fastalign.train as loop
from fastalign.cli import main
from fastalign.config import Config, ConfigError
from fastalign.data import load_records
from fastalign.inspection import PAGE, RECORDS, embedded_json, inspect, make_page, write


@pytest.fixture(scope="module")
def adapter(sharp_llama, tmp_path_factory) -> Path:
    """An adapter that changes the model: both its matrices are random."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("adapter")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(sharp_llama)
        adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", lora_dropout=0.1))
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
    adapted.save_pretrained(folder)
    return folder


def contrasting(model: Path, folder: Path, **keys: Any) -> Config:
    cut = {"lambda": 1.3, "min_judged_prob": 1e-6}
    return recipe("cut", model, folder, **{"cut": cut, "global_batch_size": 12} | keys)


# ---------------------------------------------------------------------------------- the figures


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_shown_is_what_is_trained(dtype, sharp_llama, adapter, tmp_path, quiet_process):
    """Every token's figures and flag are those of a training step on the same records."""
    keys = {"use_peft": True, "adapter_name_or_path": str(adapter), "lora_dropout": 0.0}
    config = contrasting(sharp_llama, tmp_path, dtype=dtype, lora_r=8, lora_alpha=8, **keys)
    run, examples = start(config)
    seen: dict[str, tuple[list[float], list[float] | None, list[bool]]] = {}
    original = run.method.contrast

    def contrast(logprob, log1m_prob, batch, **settings):
        result, negative = original(logprob, log1m_prob, batch, **settings)
        bounds = batch.cu_rows.tolist()
        at = 0
        for s, role in enumerate(batch.roles):
            values = logprob[bounds[s] : bounds[s + 1]].tolist()
            source = batch.sources[int(batch.records[s])]
            if role == "plain":
                flags = result.flagged[at : at + len(values)].tolist()
                at += len(values)
                seen[source] = (values, None, flags)
            else:
                seen[source] = (seen[source][0], values, seen[source][2])
        return result, negative

    run.method.contrast = contrast
    metrics = loop.update(run, examples, 0.0, 1)
    assert len(seen) == 12

    shown = inspect(config, count=12).records
    assert {record.source for record in shown} == set(seen)
    for record in shown:
        log_q, log_c, flagged = seen[record.source]
        # fp32 numbers come back whole from their shortest decimals.
        assert [np.float32(t.log_q) for t in record.tokens] == pytest.approx(log_q, abs=1e-6)
        assert [t.flagged for t in record.tokens] == flagged
        if log_c is None:
            assert record.judgment is None and {t.log_c for t in record.tokens} == {None}
        else:
            assert [np.float32(t.log_c) for t in record.tokens] == pytest.approx(log_c, abs=1e-6)
    negative = [record for record in shown if record.judgment is not None]
    shares = [record.flagged / len(record.tokens) for record in negative]
    rises = [np.mean([t.log_c - t.log_q for t in record.tokens]) for record in negative]
    assert 0.05 < np.mean(shares) < 0.95
    assert metrics["cut/flagged"] == pytest.approx(np.mean(shares), rel=1e-6)
    assert metrics["cut/contrast"] == pytest.approx(np.mean(rises), rel=1e-5)
    # sigma decides some of them: with lambda alone more would be flagged.
    crossing = [t.log_c - t.log_q > math.log(1.3) for r in negative for t in r.tokens]
    assert sum(crossing) > sum(r.flagged for r in negative)


def test_the_adapter_is_looked_through(sharp_llama, adapter, tmp_path):
    keys = {"use_peft": True, "adapter_name_or_path": str(adapter)}
    with_adapter = inspect(contrasting(sharp_llama, tmp_path, **keys), count=2)
    without = inspect(contrasting(sharp_llama, tmp_path), count=2)
    assert [r.source for r in with_adapter.records] == [r.source for r in without.records]
    assert with_adapter.records[0].tokens[0].log_q != without.records[0].tokens[0].log_q


def test_negative_records_come_first_and_the_seed_draws_them(tiny_llama, tmp_path):
    config = contrasting(tiny_llama, tmp_path)
    records, _ = load_records(config.datasets, strict=True, seed=0, want="judged")
    negative = [r.source for r in records if r.is_negative]
    positive = [r.source for r in records if not r.is_negative]
    ten = [r.source for r in inspect(config, count=10).records]
    assert ten[:8] == negative and len(set(ten[8:])) == 2 and set(ten[8:]) <= set(positive)
    few = {tuple(r.source for r in inspect(config, count=3, seed=s).records) for s in range(3)}
    assert len(few) > 1 and all(set(sources) <= set(negative) for sources in few)
    assert tuple(r.source for r in inspect(config, count=3, seed=2).records) in few
    everything = inspect(config, count=99)
    assert len(everything.records) == 12
    assert "8 negative records, 4 positive" in everything.summary()


def test_tokens_joined_are_the_response(tiny_llama, tmp_path):
    texts = ["is one", "naïve 🐍 ok", "two\n\nlines", "\ufffd and more"]
    content = [{"prompt": "the sum", "completion": t, "judgment": "No."} for t in texts]
    data = [{"path": str(write_rows(tmp_path / "d.jsonl", content))}]
    shown = inspect(contrasting(tiny_llama, tmp_path, datasets=data))
    for text, record in zip(texts, shown.records, strict=True):
        assert "".join(token.text for token in record.tokens) == text + "<|im_end|>"
        assert record.tokens[-1].text.endswith("<|im_end|>")
    # The snake is four tokens, of which the last one is the character.
    snake = [token.text for token in shown.records[1].tokens]
    at = next(i for i, text in enumerate(snake) if "🐍" in text)
    assert snake[at - 3 : at] == ["", "", ""]


def test_what_does_not_fit_is_left_out_and_told(tiny_llama, tmp_path):
    content = rows("judged", 6)
    content[1]["judgment"] = "Bad. " * 300
    data = [{"path": str(write_rows(tmp_path / "d.jsonl", content))}]
    shown = inspect(contrasting(tiny_llama, tmp_path, datasets=data))
    assert len(shown.records) == 5
    assert any("1 x max_length: the prompt leaves no room" in line for line in shown.lines)


# ------------------------------------------------------------------------------------ the command


def save(config: Config, folder: Path) -> str:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json", by_alias=True)))
    return str(path)


def test_the_command_writes_both_files(tiny_llama, tmp_path, capsys):
    path = save(contrasting(tiny_llama, tmp_path), tmp_path)
    assert main(["inspect", path, "--records", "3", "cut.lambda=1.01", "--seed", "1"]) == 0
    out = capsys.readouterr().out
    folder = tmp_path / "out" / "inspect"
    assert "3 negative records, 0 positive" in out and f"wrote {folder / PAGE}" in out
    written = [json.loads(line) for line in (folder / RECORDS).read_text().splitlines()]
    page = Page.of((folder / PAGE).read_text(encoding="utf-8"))
    assert page.data["records"] == written and len(written) == 3
    assert page.data["settings"]["lambda"] == 1.01
    assert set(written[0]) == {"source", "prompt", "judgment", "tokens"}
    assert set(written[0]["tokens"][0]) == {"id", "text", "log_q", "log_c", "flagged"}


def test_an_online_recipe_shows_judged_rows(tiny_llama, tmp_path):
    """What it says of rollouts is left out; its prompts alone cannot be shown."""
    judged = contrasting(tiny_llama, tmp_path).datasets
    online = {"online": {"prompts_per_iteration": 2}, "judge": {"path": "a:b"}}
    config = contrasting(tiny_llama, tmp_path, **online, datasets=[vars(judged[0])])
    assert len(inspect(config, count=2).records) == 2
    prompts = [{"path": str(write_rows(tmp_path / "p.jsonl", rows("prompt", 3)))}]
    with pytest.raises(ConfigError, match=r"has columns prompt: .* needs prompt \+ completion"):
        inspect(contrasting(tiny_llama, tmp_path, **online, datasets=prompts))


def test_mistakes_are_one_line(tiny_llama, tmp_path, capsys):
    fine = [row | {"judgment": None} for row in rows("judged", 3)]
    path = save(contrasting(tiny_llama, tmp_path), tmp_path)
    blocked = tmp_path / "a-file"
    blocked.write_text("here")
    for arguments, complaint in (
        (["method=sft"], "method = 'sft': inspect shows the contrast of CUT"),
        (["max_length=8"], "no judged record can be trained on: 12 x max_length"),
        ([f"datasets.0.path={write_rows(tmp_path / 'fine.jsonl', fine)}"], "no record has a judg"),
        (["--out", str(blocked)], f"--out = '{blocked}'"),
    ):
        assert main(["inspect", path, *arguments]) == 2
        error = capsys.readouterr().err
        assert complaint in error and "Traceback" not in error
    for arguments in (["--records", "0"], ["--seed", "x"], ["--nope"]):
        with pytest.raises(SystemExit) as stopped:
            main(["inspect", path, *arguments])
        assert stopped.value.code == 2


# --------------------------------------------------------------------------------------- the page


def row(tokens: list[tuple[str, float, float | None]], judgment: str | None = "No.", **keys: Any):
    """A written record, flagged at lambda 1.3."""
    return {
        "source": "d.jsonl:1",
        "prompt": [{"role": "user", "content": "the sum"}],
        "judgment": judgment,
        "tokens": [
            {
                "id": i,
                "text": text,
                "log_q": q,
                "log_c": c,
                "flagged": c is not None and c - q > math.log(1.3),
            }
            for i, (text, q, c) in enumerate(tokens)
        ],
    } | keys


SETTINGS = {"model": "m", "adapter": None, "data": ["d.jsonl"], "lambda": 1.3, "sigma": 0.0}


def hostile_page() -> tuple[str, list[dict[str, Any]]]:
    written = [
        row(
            [(part, -1.0, -0.5) for part in (text[:9], text[9:])],
            judgment=text,
            source=text,
            prompt=[{"role": text, "content": text}, {"role": "user", "content": text}],
        )
        for text in HOSTILE
    ]
    settings = SETTINGS | {"model": HOSTILE[0], "adapter": HOSTILE[2], "data": list(HOSTILE)}
    return make_page(settings, written), written


def test_strangers_text_stays_data(tmp_path):
    text, written = hostile_page()
    page, plain = Page.of(text), Page.of(make_page(SETTINGS, []))
    # The same elements as without any record, and the same script: nothing has become markup.
    assert page.elements[1:] == plain.elements[1:]
    scripts = [content for tag, attrs, content in page.contents if tag == "script" and not attrs]
    assert scripts == [c for tag, attrs, c in plain.contents if tag == "script" and not attrs]
    assert page.data["records"] == written and page.data["settings"]["data"] == list(HOSTILE)
    embedded = embedded_json(list(HOSTILE))
    assert not set(embedded) & set("<>&\u2028\u2029") and json.loads(embedded) == list(HOSTILE)


def test_the_page_loads_nothing_and_runs_its_own_script_alone():
    text, _ = hostile_page()
    page = Page.of(text)
    check_inert(page)
    template = re.sub(r'"INSPECTED_RECORDS.*', "", text)
    assert "@import" not in template and "url(" not in template


def test_numbers_that_are_none_never_reach_the_page():
    with pytest.raises(ValueError, match="Out of range"):
        make_page(SETTINGS, [row([("x", math.nan, -1.0)])])


@pytest.mark.parametrize("dark", [False, True])
def test_colours_have_the_contrast_of_wcag_aa(dark):
    named = colours(make_page(SETTINGS, []), dark)
    steps = [f"{way}{i}" for way in ("up", "down") for i in range(1, 5)]
    for background in ("paper", "panel", *steps):
        assert ratio(named["ink"], named[background]) >= 4.5, background
        assert ratio(named["flag"], named[background]) >= 3, background
    for background in ("paper", "panel", "up1", "up2", "down1", "down2"):
        assert ratio(named["soft"], named[background]) >= 4.5, background
    for background in ("paper", "panel"):
        assert ratio(named["accent"], named[background]) >= 3
    # Each way the steps grow in strength, so that greyscale orders them too.
    for way in ("up", "down"):
        levels = [luminance(named[name]) for name in ("paper", *(f"{way}{i}" for i in range(1, 5)))]
        assert levels == sorted(levels, reverse=not dark)


# ------------------------------------------------------------------------------------- its script


@pytest.fixture(scope="module")
def script():
    """The page's own script in V8, where there is no document for it to draw in."""
    mini_racer = pytest.importorskip("py_mini_racer", reason="pip install mini-racer")
    page = Page.of(make_page(SETTINGS, []))
    (text,) = [c for tag, attrs, c in page.contents if tag == "script" and not attrs]
    context = mini_racer.MiniRacer()
    context.eval(text)

    def call(expression: str, *values: Any) -> Any:
        arguments = ", ".join(embedded_json(value) for value in values)
        return json.loads(context.eval(f"JSON.stringify(({expression})({arguments}))"))

    return call


FLAGS = "(records, l, s) => records.map(r => r.tokens.map(t => isFlagged(t, l, s)))"


def test_the_page_flags_what_the_loss_flags(script, sharp_llama, tmp_path):
    config = contrasting(sharp_llama, tmp_path)
    for lambda_, sigma in ((1.3, 0.003), (0.8, 0.0), (3.0, 0.0), (1.0, 0.5)):
        cut = config.cut.model_copy(update={"lambda_": lambda_, "min_judged_prob": sigma})
        shown = inspect(config.model_copy(update={"cut": cut}), count=12)
        records, _ = write(shown, tmp_path / "out")
        written = [json.loads(line) for line in records.read_text().splitlines()]
        flags = [[token["flagged"] for token in r["tokens"]] for r in written]
        assert script(FLAGS, written, lambda_, sigma) == flags
        tally = script("tally", written, lambda_, sigma)
        negative = [f for r, f in zip(written, flags, strict=True) if r["judgment"] is not None]
        assert tally["flagged"] == sum(map(sum, negative)) and tally["records"] == 8
        assert tally["tokens"] == sum(map(len, negative))
        assert tally["touched"] == sum(map(any, negative))
        assert tally["share"] == pytest.approx(np.mean([np.mean(f) for f in negative]))


def test_thresholds_are_exclusive_as_in_the_loss(script):
    half = float(np.float32(math.log(0.5)))
    token = {"log_q": half, "log_c": half, "text": "x"}
    assert script("isFlagged", token, 1.0, 0) is False
    assert script("isFlagged", token, 0.999, 0) is True
    assert script("isFlagged", token, 0.9, 0.5) is False
    assert script("isFlagged", token, 0.9, 0.499) is True
    assert script("isFlagged", token | {"log_c": None}, 0.9, 0) is False


def test_colour_steps_and_words(script):
    levels = {-5.0: -4, -2.0: -4, -0.7: -2, -0.099: 0, 0.0: 0, 0.1: 1, 0.99: 2, 1.0: 3, 2.0: 4}
    for contrast, level in levels.items():
        assert script("levelOf", contrast) == level
    token = {"log_q": math.log(0.1), "log_c": math.log(0.2), "text": "x"}
    assert script("why", token, 1.5, 0) == "Flagged: c is 2.00 times q, more than λ = 1.5."
    assert script("why", token, 2.5, 0) == "Not flagged: c is 2.00 times q, at most λ = 2.5."
    assert "2.00 times q, more than λ = 1.5, but c is at most" in script("why", token, 1.5, 0.3)
    assert "nothing is contrasted" in script("why", token | {"log_c": None}, 1.5, 0)
    texts = script("textOf", row([("Is", -1.0, -1.0), (" One", -1.0, -1.0)], judgment="Too SHORT"))
    assert all(part in texts for part in ("the sum", "is one", "too short", "d.jsonl:1"))


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_draws_it_and_takes_no_text_for_markup(tmp_path):
    text, written = hostile_page()
    written.append(row([("fine", -1.0, None)], judgment=None))
    settings = json.loads(re.findall(r'"settings": (\{.*?\}), "records"', text)[0])
    page = tmp_path / PAGE
    page.write_text(make_page(settings, written), encoding="utf-8")
    text = drawn_by_chromium(page, tmp_path)
    drawn = Page.of(text)
    tags = [tag for tag, _ in drawn.elements]
    assert "img" not in tags and tags.count("script") == 2 and "<title>What CUT flags<" in text
    tokens = [attrs for _, attrs in drawn.elements if attrs.get("role") == "option"]
    assert len(tokens) == 2 * len(HOSTILE) + 1
    flagged = [attrs for attrs in tokens if "flagged" in str(attrs["class"]).split()]
    assert len(flagged) == 2 * len(HOSTILE)
    # One stop of the Tab key a response; the arrow keys do the rest.
    assert [attrs["tabindex"] for attrs in tokens].count("0") == len(HOSTILE) + 1
    assert f"{2 * len(HOSTILE)} of {2 * len(HOSTILE)} tokens flagged, 100.0 %" in text


# ------------------------------------------------------------------------------------------ ends


def test_log_probs_that_are_not_finite_are_refused(tiny_llama, tmp_path, monkeypatch, capsys):
    from fastalign import inspection

    original = inspection.load_policy

    def broken(config, *arguments):
        policy = original(config, *arguments)
        with torch.no_grad():
            policy.causal_lm.lm_head.weight[:] = math.nan
        return policy

    monkeypatch.setattr(inspection, "load_policy", broken)
    monkeypatch.setattr(inspection, "check_forward", lambda *_: ("not checked", 0.0))
    path = save(contrasting(tiny_llama, tmp_path), tmp_path)
    assert main(["inspect", path]) == 1
    assert "log-probs are not finite on record" in capsys.readouterr().err


def test_the_order_of_packs_does_not_matter(sharp_llama, tmp_path):
    config = contrasting(sharp_llama, tmp_path, micro_batch_tokens=120)
    whole = inspect(replace_tokens(config, 10_000)).records
    cut = inspect(config).records
    assert [r.source for r in whole] == [r.source for r in cut]
    for one, other in zip(whole, cut, strict=True):
        left = [t.log_q for t in one.tokens]
        assert left == pytest.approx([t.log_q for t in other.tokens], abs=1e-5)
        assert replace(one, tokens=()) == replace(other, tokens=())


def replace_tokens(config: Config, budget: int) -> Config:
    return config.model_copy(update={"micro_batch_tokens": budget})
