"""`make gpu-check` as far as it goes without a GPU: what it says there, its report, its exit codes, its pytest runs."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import MODES

REPO = Path(__file__).parent.parent
sys.path.insert(0, str(REPO / "bench"))

import gpu_check  # noqa: E402
import gpu_timing  # noqa: E402
import providers  # noqa: E402


def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path: Path) -> None:
    command = [sys.executable, str(REPO / "bench" / "gpu_check.py"), "--out", str(tmp_path / "out")]
    hidden = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=os.environ | hidden, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == gpu_check.NO_GPU, done.stderr
    assert "No GPU was found" in done.stdout
    for section in gpu_check.SECTIONS:
        assert section.title in done.stdout
    assert not (tmp_path / "out").exists()


def test_arguments() -> None:
    options = gpu_check.parse([])
    assert options.out == REPO / "runs" / "gpu"
    assert options.only == [section.name for section in gpu_check.SECTIONS]
    assert gpu_check.parse(["--only", "suite,graphs"]).only == ["suite", "graphs"]
    with pytest.raises(SystemExit):
        gpu_check.parse(["--only", "suite,grahps"])


def test_every_test_file_that_it_runs_is_there() -> None:
    assert [name for name in gpu_check.NUMERICAL if not (REPO / "tests" / f"test_{name}.py").exists()] == []


def well(options: argparse.Namespace) -> list[str]:
    return ["| a | table |"]


def absent(options: argparse.Namespace) -> list[str]:
    raise gpu_check.NotRun("a tool is missing")


def broken(options: argparse.Namespace) -> list[str]:
    raise ZeroDivisionError("of nothing")


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return monkeypatch


def test_the_report_and_the_exit_code(pretended: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sections = [gpu_check.Section(run.__name__, run.__name__.title(), run) for run in (broken, absent, well)]
    pretended.setattr(gpu_check, "SECTIONS", sections)
    assert gpu_check.main(["--out", str(tmp_path)]) == 1
    report = (tmp_path / "gpu_report.md").read_text(encoding="utf-8")
    assert report.startswith("# fused_elbo on a GPU: FAILED")
    assert "## Broken\n\n\n**FAILED: ZeroDivisionError: of nothing**" in report
    assert "**not run: a tool is missing**" in report
    assert "| a | table |\n\n**ok**" in report
    assert gpu_check.main(["--out", str(tmp_path), "--only", "absent,well"]) == 0
    assert (tmp_path / "gpu_report.md").read_text(encoding="utf-8").startswith("# fused_elbo on a GPU: ok")


def test_the_tests_run_on_another_device() -> None:
    """On "meta", which every machine has: shapes and devices are compared there, and a look at a value fails."""
    (summary,) = gpu_check.pytest("tests/test_ops.py", "-k", "test_operators_equal_the_reference", device="meta")
    assert f"{len(MODES)} passed" in summary
    with pytest.raises(gpu_check.Failed, match=r"FAILED tests/test_elbo\.py"):
        gpu_check.pytest("tests/test_elbo.py", "-k", "test_half_precision_sums", device="meta")


def test_the_steps_under_compute_sanitizer_are_steps() -> None:
    gpu_check.steps("cpu")


def test_the_benchmark_has_a_row_for_the_single_pass() -> None:
    names = {provider.name for provider in providers.ALL}
    assert set(gpu_timing.LAUNCHES) <= names
    cases = gpu_timing.cases()
    assert {case.device for case in cases} == {"cuda"}
    assert len({case.name for case in cases}) == len(cases)
