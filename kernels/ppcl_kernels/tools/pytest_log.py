"""A pytest plugin that writes outcomes of tests to a file while tests run; ``PPCL_TESTS_JSON`` names the file.

PPCL_TESTS_JSON=tests.json python -m pytest -p ppcl_kernels.tools.pytest_log
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

from ppcl_kernels.tools.machine import write_json

_rows: dict[str, dict[str, Any]] = {}


def pytest_runtest_logreport(report: Any) -> None:
    """Write the outcome of a test; with pytest-xdist only the main process, which receives all reports, writes."""
    path = os.environ.get("PPCL_TESTS_JSON")
    if not path or os.environ.get("PYTEST_XDIST_WORKER"):
        return
    row = _rows.setdefault(report.nodeid, {"name": report.nodeid, "outcome": "passed", "seconds": 0.0})
    row["seconds"] = round(row["seconds"] + report.duration, 3)
    if report.outcome != "passed":
        said = report.longrepr
        why = said[2] if isinstance(said, tuple) else getattr(getattr(said, "reprcrash", None), "message", said)
        row |= {"outcome": report.outcome, "why": str(why)[:300]}
    if report.when == "teardown":
        counts = Counter(row["outcome"] for row in _rows.values())
        write_json(Path(path), {"part": "tests", "counts": dict(counts), "results": list(_rows.values())})
