"""What the benchmarks' report keeps of pytest-benchmark's file."""

from __future__ import annotations

import report


def test_report_keeps_what_was_measured_and_nothing_of_the_machine():
    stats = {"median": 2.0, "q1": 1.5, "q3": 2.5, "rounds": 5, "stddev": 0.1, "data": [2.0]}
    facts = {"device": "CPU", "torch": "2", "triton": "3", "commit": "c", "peak_mib": 12.25}
    made = {
        "machine_info": {"node": "a-host"},
        "benchmarks": [
            {
                "group": "frozen",
                "params": {"who": who},
                "stats": stats,
                "extra_info": facts | extra,
            }
            for who, extra in (("product", {"products": 1.0, "passes": 1}), ("trl", {}))
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
    }
    first, second = report.table(result).splitlines()[2:]
    assert first == "| frozen | product | 2 (1.5 to 2.5) | 1.00 | 1 | 12 |"
    assert second == "| frozen | trl | 2 (1.5 to 2.5) | - | - | 12 |"
