"""A plugin of pytest that writes a line for each test as soon as it is done: what is left when a run is killed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest


class Lines:
    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.tell(report.nodeid, report.outcome, report.longrepr, report.duration)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.tell(report.nodeid, report.outcome, report.longrepr, 0.0)

    def tell(self, test: str, outcome: str, why: object, seconds: float) -> None:
        message = message_of(why) if outcome == "failed" else ""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"test": test, "outcome": outcome, "message": message, "seconds": seconds}) + "\n")


def message_of(why: object) -> str:
    """The exception on one line; where pytest has kept only text, that begins with an E."""
    crash = getattr(why, "reprcrash", None)
    lines = str(crash.message if crash else why).strip().splitlines() or [""]
    marked = [line[1:].strip() for line in lines if line.startswith("E  ")]
    return (marked or lines)[0][:300]


def pytest_configure(config: pytest.Config) -> None:
    path = os.environ.get("GPU_CHECK_LINES")
    if path and not hasattr(config, "workerinput"):  # pytest-xdist's first process hears of every test
        config.pluginmanager.register(Lines(Path(path)), "gpu_check_lines")
