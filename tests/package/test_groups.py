"""Tests that share something expensive run in one process: what the Makefile and tests/tiers.py ask of pytest-xdist."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SHARED = """
import os
import pathlib

import pytest


@pytest.mark.xdist_group("shared")
@pytest.mark.parametrize("number", range(8))
def test_shared(number):
    with pathlib.Path("processes").open("a") as file:
        file.write(os.environ["PYTEST_XDIST_WORKER"] + "\\n")
"""


def test_a_group_runs_in_one_process(tmp_path: Path) -> None:
    """A pytest that is too new for its pytest-xdist loses the groups in silence, and takes minutes longer."""
    (tmp_path / "test_shared.py").write_text(SHARED)
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "loadgroup", "test_shared.py"]
    outside = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=tmp_path, env=outside, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    processes = (tmp_path / "processes").read_text().split()
    assert len(processes) == 8
    assert len(set(processes)) == 1
