"""The tables of README.md, docs/kernels.md and docs/bridge.md, made from bench/results alone.

python bench/readme.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
REGION = re.compile(r"(<!-- performance -->\n).*?(<!-- /performance -->)", re.S)
WHAT = {"frozen": "frozen head", "trained": "trained head", "values": "values alone"}
# What their names begin with: results that docs/bridge.md shows, and all that are not kernels'.
BRIDGE = ("packing", "sampling", "store")
OTHERS = (*BRIDGE, "dpo-step", "attention")
# In whose ways the same numbers are computed, as bench/test_linear_logprob.py calls them.
PEERS = {
    "naive": "plain torch",
    "compiled": "torch.compile",
    "torch": "F.linear_cross_entropy",
    "trl": "TRL",
    "cce": "Apple CCE",
    "liger": "Liger",
    "quack": "quack",
}


def load(folder: Path = RESULTS) -> list[dict[str, Any]]:
    files = sorted(folder.glob("*.json"))
    found = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    return [result | {"file": path.name} for result, path in zip(found, files, strict=True)]


def heads(results: list[dict[str, Any]]) -> list[str]:
    """One line for each measured head: FastAlign, plain torch and the fastest other."""
    lines = [
        "| device | what | bare product, ms | FastAlign, in products (passes) | plain torch "
        "| fastest peer | peak MiB, FastAlign / plain torch |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for result in results:
        groups: dict[str, dict[str, Any]] = {}
        for row in result.get("rows", ()):
            if str(row.get("group", "")).split(" ")[0] in WHAT:
                groups.setdefault(row["group"], {})[row["who"]] = row
        for group, rows in groups.items():
            if not {"product", "fastalign", "naive"} <= rows.keys():
                continue  # a run that was interrupted
            what, dtype, size = group.split(" ")
            ours = [rows[name] for name in ("fastalign", "fastalign, budget") if name in rows]
            others = [row for name, row in rows.items() if name in PEERS and name != "naive"]
            best = min(others, key=lambda row: row["median"], default=None)
            cells = [
                result["device"],
                f"{WHAT[what]}, {dtype}, {size}",
                _ms(rows["product"]),
                ", ".join(f"**{row['products']:.2f}** ({row['passes']})" for row in ours),
                f"{rows['naive']['products']:.2f}",
                f"{PEERS[best['who']]} {best['products']:.2f}" if best else "-",
                " / ".join(f"{row['peak_mib']:.0f}" for row in (*ours, rows["naive"])),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _ms(row: dict[str, Any]) -> str:
    ms = 1e3 * row["median"]
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.3g}"


def in_full(folder: Path = RESULTS) -> str:
    """Everyone who was measured, for docs/kernels.md."""
    lines = [
        "| device | what | who | ms | products | passes | x floor | of plain torch | peak MiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for result in load(folder):
        if result["file"].startswith(OTHERS):
            continue
        rows = [row for row in result.get("rows", ()) if "who" in row and "median" in row]
        plain = {row["group"]: row["median"] for row in rows if row["who"] == "naive"}
        for row in rows:
            what, _, rest = row["group"].partition(" ")
            cells = [
                result["device"],
                f"{WHAT[what]}, {rest.replace(' ', ', ')}" if what in WHAT else row["group"],
                PEERS.get(row["who"], row["who"].replace("fastalign", "FastAlign")),
                _ms(row),
                f"{row['products']:.2f}" if "products" in row else "-",
                str(row.get("passes") or "-"),
                f"{row['floors']:.2f}" if "floors" in row else "-",
                f"{row['median'] / plain[row['group']]:.2f}" if row["group"] in plain else "-",
                f"{row['peak_mib']:.0f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def bridge(folder: Path = RESULTS) -> str:
    """What runs in csrc/ beside whoever else does it, for docs/bridge.md."""
    results = [r for r in load(folder) if r["file"].startswith(BRIDGE)]
    lines = ["| device | what | FastAlign, ms | others, ms |", "| --- | --- | --- | --- |"]
    for result in results:
        groups: dict[str, dict[str, Any]] = {}
        for row in result["rows"]:
            groups.setdefault(row["group"], {})[row["who"]] = row
        for group, rows in groups.items():
            ours = {name: row for name, row in rows.items() if name.startswith("fastalign")}
            shown = [
                "; ".join(f"{_variant(name)}{_ms(row)}" for name, row in who.items())
                for who in (ours, {n: row for n, row in rows.items() if n not in ours})
            ]
            what = f"drawing, {group}" if result["file"].startswith("sampling") else group
            lines.append(f"| {result['device']} | {what} | {shown[0]} | {shown[1]} |")
    files = ", ".join(f"[{r['file']}](../bench/results/{r['file']})" for r in results)
    return "\n".join([*lines, "", f"From {files}."])


def _variant(name: str) -> str:
    what = name.removeprefix("fastalign").removeprefix(", ")
    return f"{what}: " if what else ""


def steps(results: list[dict[str, Any]]) -> list[str]:
    rows = [(r, row) for r in results for row in r.get("rows", ()) if "parameters" in row]
    if not rows:
        return ["Steps of whole training runs have been measured on no GPU yet."]
    lines = [
        "| device | step | parameters | rollouts by | tokens/s | MFU | peak GiB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for result, row in rows:
        mfu = row.get("speed/mfu")
        cells = [
            result["device"],
            row["method"],
            f"{row['parameters'] / 1e9:.1f} billion",
            row["engine"] or "-",
            f"{row['speed/tokens_per_second']:,.0f}",
            "-" if mfu is None else f"{mfu:.0%}",
            f"{row['speed/peak_memory_gib']:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def performance(folder: Path = RESULTS) -> str:
    results = load(folder)
    measured = [r for r in results if any("products" in row for row in r.get("rows", ()))]
    lines = heads(measured)
    if all(result["device"].startswith("CPU") for result in measured):
        lines += ["", "On a GPU: not measured."]
    lines += ["", *steps(results)]
    files = ", ".join(f"[{r['file']}](bench/results/{r['file']})" for r in measured)
    lines += ["", f"From {files}; each file names its command, versions and commit."]
    return "\n".join(lines)


def pages() -> dict[Path, str]:
    """Text of each page with its tables as the results have them."""
    made = {
        ROOT / "README.md": performance(),
        ROOT / "docs" / "kernels.md": in_full(),
        ROOT / "docs" / "bridge.md": bridge(),
    }
    return {
        path: REGION.sub(lambda m, text=text: f"{m[1]}{text}\n{m[2]}", path.read_text("utf-8"))
        for path, text in made.items()
    }


def main() -> None:
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
