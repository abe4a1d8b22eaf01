"""A pytest-benchmark JSON file, reduced to what was measured.

    pytest bench -k frozen --benchmark-json all.json
    python bench/report.py all.json bench/results/kernels-cpu.json -k frozen

Prints the same as a Markdown table.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def reduce(report: dict[str, Any], options: Sequence[str] = ()) -> dict[str, Any]:
    """What all rows share, and for each its median and quartiles in seconds.

    ``options``: what else pytest was given.
    """
    shared = ("device", "torch", "triton", "commit")
    rows = []
    for benchmark in report["benchmarks"]:
        facts = benchmark["extra_info"]
        rows.append(
            {
                "group": benchmark["group"],
                "who": benchmark["params"]["who"],
                **{key: benchmark["stats"][key] for key in ("median", "q1", "q3", "rounds")},
                **{key: value for key, value in facts.items() if key not in shared},
            }
        )
    first = report["benchmarks"][0]["extra_info"]
    return {
        "command": shlex.join(["pytest", "bench", *options, "--benchmark-json", "all.json"]),
        **{key: first[key] for key in shared},
        "rows": rows,
    }


def table(result: dict[str, Any]) -> str:
    lines = [
        "| what | who | seconds, median (quartiles) | products | passes | x floor | peak MiB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        products = f"{row['products']:.2f}" if "products" in row else "-"
        floors = f"{row['floors']:.2f}" if "floors" in row else "-"
        passes, peak = row.get("passes"), row["peak_mib"]
        lines.append(
            f"| {row['group']} | {row['who']} | {row['median']:.4g} "
            f"({row['q1']:.4g} to {row['q3']:.4g}) | {products} | "
            f"{'-' if passes is None else passes} | {floors} | "
            f"{'-' if peak is None else f'{peak:.0f}'} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    source, target, *options = sys.argv[1:]
    result = reduce(json.loads(Path(source).read_text(encoding="utf-8")), options)
    Path(target).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result))
