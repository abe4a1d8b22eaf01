"""What the benchmarks' report keeps of pytest-benchmark's file, the run on Shepherd, and the
benches of whole steps on a tiny model."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cut_step
import dpo_step
import pytest
import readme
import report
import scaling
import self_judge_step
import shepherd
import steps
import torch
import vllm_cpu
from support import rows, write_rows

import fastalign.train as loop


def test_report_keeps_what_was_measured_and_nothing_of_the_machine():
    stats = {"median": 2.0, "q1": 1.5, "q3": 2.5, "rounds": 5, "stddev": 0.1, "data": [2.0]}
    facts = {"device": "CPU", "torch": "2", "triton": "3", "commit": "c", "peak_mib": 12.25}
    measured = {"products": 1.0, "passes": 1, "floors": 1.0}
    made = {
        "machine_info": {"node": "a-host"},
        "benchmarks": [
            {
                "group": "frozen",
                "params": {"who": who},
                "stats": stats,
                "extra_info": facts | extra,
            }
            for who, extra in (("product", measured), ("trl", {}))
        ],
    }
    result = report.reduce(made)
    assert "a-host" not in str(result)
    assert result["device"] == "CPU" and result["rows"][0] == {
        "group": "frozen",
        "who": "product",
        "median": 2.0,
        "q1": 1.5,
        "q3": 2.5,
        "rounds": 5,
        "peak_mib": 12.25,
        "products": 1.0,
        "passes": 1,
        "floors": 1.0,
    }
    first, second = report.table(result).splitlines()[2:]
    assert first == "| frozen | product | 2 (1.5 to 2.5) | 1.00 | 1 | 1.00 | 12 |"
    assert second == "| frozen | trl | 2 (1.5 to 2.5) | - | - | - | 12 |"


def test_the_pages_say_what_was_measured():
    for path, text in readme.pages().items():
        assert readme.REGION.search(text), path
        assert path.read_text(encoding="utf-8") == text, f"{path}: run python bench/readme.py"


def test_a_result_of_a_gpu_comes_into_the_readme(tmp_path):
    rows = [
        {"who": who, "group": "trained bf16 8x4x16", "products": products, "passes": passes}
        | {"median": products / 100, "peak_mib": 10.0 * products}
        for who, products, passes in (
            ("product", 1.0, 1),
            ("fastalign", 4.2, 4),
            ("fastalign, budget", 3.3, 3),
            ("naive", 9.0, 3),
            ("liger", 5.0, 3),
            ("compiled", 7.0, 3),
        )
    ]
    kernels = {"device": "NVIDIA H100", "rows": rows}
    step = {"method": "cut", "parameters": 2.0e9, "engine": None, "speed/mfu": 0.41}
    step |= {"speed/tokens_per_second": 51234.0, "speed/peak_memory_gib": 33.33}
    for name, result in (("h100-bench", kernels), ("h100-train", kernels | {"rows": [step]})):
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    made = readme.performance(tmp_path)
    assert (
        "| NVIDIA H100 | trained head, bf16, 8x4x16 | 10 | **4.20** (4), **3.30** (3) | 9.00 | "
        "Liger 5.00 | 42 / 33 / 90 |"
    ) in made
    assert "| NVIDIA H100 | cut | 2.0 billion | - | 51,234 | 41% | 33.3 |" in made
    assert "not measured" not in made
    line = "| trained head, bf16, 8x4x16 | FastAlign, budget | 33 | 3.30 | 3 | - | 0.37 | 33 |"
    assert line in readme.in_full(tmp_path)


def test_the_run_on_shepherd_goes_on_where_it_stopped(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quiet_process: None
) -> None:
    pytest.importorskip("matplotlib")
    noise = {"prompt": "p", "completion": "c", "judgment": "$ERROR$"}
    data = write_rows(tmp_path / "judged.jsonl", [noise, *rows("judged", 18)])
    result = tmp_path / "results" / "shepherd.json"
    command = [str(data), "--model", str(tiny_llama), "--output-dir", str(tmp_path / "run")]
    command += ["--result", str(result), "global_batch_size=4", "report_to=[]", "seed=1"]
    monkeypatch.setattr(shepherd, "CHECKPOINT_STEPS", 2)
    original, updates = loop.update, []

    def update(*arguments: Any) -> dict[str, float]:
        if len(updates) == 3:
            updates.append(None)
            raise KeyboardInterrupt
        updates.append(None)
        return original(*arguments)

    monkeypatch.setattr(loop, "update", update)
    assert shepherd.main(command) == 1 and not result.exists()
    # 12 negative and 3 positive records: four steps, of which the first two are kept.
    assert shepherd.main(command) == 0 and len(updates) == 6
    made = json.loads(result.read_text())
    assert made["steps"] == 4 and made["seconds"] > 0
    assert {k: made["data"][k] for k in ("file", "rows", "negative", "positive", "dropped")} == {
        "file": "judged.jsonl", "rows": 19, "negative": 12, "positive": 6,
        "dropped": {"judgment: error sentinel instead of a judgment": 1},
    }  # fmt: skip
    assert all(len(values) == 4 for values in made["curves"].values())
    # The published settings: 1e-4 x 4 at the end of the warm-up, which is 0.6 of the run.
    assert made["curves"]["learning_rate"] == pytest.approx([0, 4e-4 / 3, 8e-4 / 3, 4e-4])
    assert str(tmp_path) not in json.dumps(made | {"command": ""})
    assert result.with_suffix(".png").stat().st_size > 0
    # Finished: read, not run.
    before = result.read_text()
    assert shepherd.main(command) == 0 and len(updates) == 6 and result.read_text() == before


@pytest.fixture
def bench(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sharp_llama: Path, quiet_process: None
) -> Callable[..., list[dict[str, Any]]]:
    """Runs a bench of whole steps on the tiny model and returns its rows.  Its sides run in this
    process: starting one of their own takes longer than they do."""
    number = itertools.count()

    def here(file: str, side: str, task: dict[str, Any]) -> dict[str, Any]:
        run = sys.modules[Path(file).stem].SIDES[side]
        found = run({**task, "output_dir": str(tmp_path / f"run-{next(number)}")})
        return json.loads(json.dumps(found)) | {"peak_bytes": 0, "peak_gib": 1.0}

    def start(module: Any, data: Path, *options: str) -> list[dict[str, Any]]:
        output = tmp_path / "result.json"
        always = ["--model", str(sharp_llama), "--output", str(output)]
        monkeypatch.setattr(sys, "argv", [module.__name__, str(data), *always, *options])
        module.main()
        found = json.loads(output.read_text())
        assert found["command"].startswith(f"python bench/{module.__name__}.py ")
        assert found["device"] and found["torch"] and found["commit"]
        return found["rows"]

    monkeypatch.setattr(steps, "alone", here)
    return start


def test_the_bench_of_cut_compares_equal_losses(
    bench: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_rows(tmp_path / "judged.jsonl", rows("judged", 240))
    options = ["--steps", "3", "--dtypes", "float32", "--longest"]
    made = bench(cut_step, data, *options, "400")
    check, ours, plain = made
    assert check["agree"] and check["tokens"] > 50 and 0 < check["flagged"] < check["tokens"]
    assert (ours["side"], plain["side"]) == ("fastalign", "plain")
    # Adapters start as nothing: the first losses are the model's own.
    assert ours["losses"][0] == pytest.approx(plain["losses"][0], rel=1e-4)
    assert ours["tokens"] == plain["tokens"] and len(ours["seconds"]) == len(plain["seconds"]) == 3
    assert len(ours["body_seconds"]) == 3 and ours["body"] > 0
    # What is there is not measured again; longer ones are, joined of several records.
    longer = bench(cut_step, data, *options, "400", "600")
    assert longer[:3] == made and [row["longest"] for row in longer[3:]] == [600] * 3
    assert longer[4]["losses"][0] == pytest.approx(longer[5]["losses"][0], rel=1e-4)
    assert sum(longer[4]["tokens"]) > 1.5 * sum(ours["tokens"])
    assert longer[5]["plain_records"] == 1

    profiled = bench(cut_step, data, *options, "400", "--sides", "profiled")[-1]
    assert profiled["side"] == "profiled" and "body" not in profiled
    assert 0 < profiled["operations"]["aten::mm"] < profiled["seconds"][-1]

    original = cut_step.plain_loss
    monkeypatch.setattr(cut_step, "plain_loss", lambda *a: (2 * original(*a)[0], original(*a)[1]))
    with pytest.raises(SystemExit, match="other losses"):
        bench(cut_step, data, *options, "400", "--again")


def test_the_bench_of_dpo_gives_both_sides_the_same_pairs(
    bench: Callable[..., Any], tmp_path: Path
) -> None:
    pytest.importorskip("trl")
    data = write_rows(tmp_path / "pairs.jsonl", rows("preference", 12))
    ours, theirs = bench(dpo_step, data, "--steps", "3", "--dtypes", "float32")
    assert (ours["side"], theirs["side"]) == ("fastalign", "trl")
    assert ours["tokens"] == theirs["tokens"]
    for row in (ours, theirs):
        assert len(row["seconds"]) == 3
        # From the reference itself.
        assert row["losses"][0] == pytest.approx(0.6931, abs=1e-3)


def test_the_bench_of_self_judge_times_its_parts(bench: Callable[..., Any], tmp_path: Path) -> None:
    data = write_rows(tmp_path / "prompts.jsonl", rows("prompt", 8))
    options = ["--steps", "3", "--new", "6", "--prompts-per-step", "2", "--dtype", "float32"]
    made = bench(self_judge_step, data, *options, "--sides", "embedded", "plain", "alone")
    embedded, plain, alone = made
    parts = {"rollout", "judge", "reference", "policy"}
    assert plain["median_parts_s"].keys() == parts
    assert embedded["median_parts_s"].keys() == parts | {"sync"}
    for row in (embedded, plain):
        assert len(row["seconds"]) == len(row["parts"]) == 3
        assert all(sum(p.values()) <= s for p, s in zip(row["parts"], row["seconds"], strict=True))
        # DPO from the reference itself.
        assert row["losses"][0] == pytest.approx(0.6931, abs=1e-3)
    assert alone["x_generate"] > 0 and len(alone["generate_seconds"]) == 3


def test_the_bench_of_vllm_gives_all_variants_the_same_work(
    bench: Callable[..., Any], tmp_path: Path
) -> None:
    pytest.importorskip("vllm")
    if torch.cuda.is_available():
        pytest.skip("of vLLM's CPU backend")
    data = write_rows(tmp_path / "prompts.jsonl", rows("prompt", 4))
    options = ["--turns", "2", "--new", "6", "--prompts-per-step", "2", "--dtypes", "float32"]
    (row,) = bench(vllm_cpu, data, *options)
    assert row["seconds"].keys() == vllm_cpu.VARIANTS.keys()
    assert all(len(seconds) == 2 for seconds in row["seconds"].values())
    assert vllm_cpu.table(row, 24).count("\n") == 1 + len(vllm_cpu.VARIANTS)


def test_the_bench_of_growth_knows_the_work(bench: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    data = write_rows(tmp_path / "pairs.jsonl", rows("preference", 8))
    options = ["--turns", "2", "--dtype", "float32", "--lengths", "96", "192", "--groups", "2", "8"]
    made = bench(scaling, data, *options, "--ranks", "1")
    assert (tmp_path / "result.png").stat().st_size > 0
    lengths, groups, ranks = (row["points"] for row in made)
    assert [p["point"] for p in (*lengths, *groups, *ranks)] == [96, 192, 2, 8, 1]
    assert all(len(p["seconds"]) == len(p["operations"]) == 1 for p in (*lengths, *groups, *ranks))
    for point in lengths:
        assert point["tokens"][0] == pytest.approx(point["point"], abs=8)
        assert point["operations"] == pytest.approx(point["operations_done"])
    # The streams of a pair share their prompt, as the least work has it; four pairs do not.
    assert groups[0]["operations"] == pytest.approx(groups[0]["operations_done"])
    assert groups[1]["operations"][0] < groups[0]["operations"][0]
    curve = scaling.growth([{"axis": "length", **p} for p in lengths])
    assert curve[0]["growth"] == 1 and curve[1]["line"] > 1.5 * curve[0]["seconds"]
