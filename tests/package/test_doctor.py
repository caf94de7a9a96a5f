"""`python -m fused_elbo`, run as a user does."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fused_elbo
from fused_elbo.__main__ import served_by, table
from fused_elbo.backends.base import Status


def doctor(**environ: str) -> str:
    path = os.pathsep.join([str(Path(fused_elbo.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-m", "fused_elbo"],
        env={**os.environ, "PYTHONPATH": path, **environ},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    return run.stdout


def row(report: str, name: str) -> str:
    found = re.findall(rf"^{re.escape(name)} +(.*)$", report, re.MULTILINE)
    assert len(found) == 1, report
    return found[0]


def test_without_a_compiler_it_says_so_and_what_to_do(tmp_path: Path) -> None:
    report = doctor(PATH=str(tmp_path), CXX="", FUSED_ELBO_CACHE_DIR=str(tmp_path / "cache"))
    assert row(report, "fused_elbo") == fused_elbo.__version__
    assert row(report, "torch") == torch.__version__
    assert row(report, "python") == platform.python_version()
    assert torch.backends.cpu.get_cpu_capability() in row(report, "processor")
    assert row(report, "cache") == str(tmp_path / "cache")
    assert row(report, "cpp") == "unavailable  no C++ compiler was found (tried g++, clang++, c++)."
    assert "Install g++" in report
    assert row(report, "reference").startswith("ready")
    assert report.endswith("CPU tensors are served by: reference\n")


def test_a_refused_cache_is_a_row_and_no_crash(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    cache.chmod(0o777)
    report = doctor(FUSED_ELBO_CACHE_DIR=str(cache))
    assert "writable by others" in row(report, "cpp")
    assert "chmod go-w" in report
    assert report.endswith("CPU tensors are served by: reference\n")


def test_a_terminal_that_lacks_a_letter_of_the_cache_s_path(tmp_path: Path) -> None:
    report = doctor(FUSED_ELBO_CACHE_DIR=str(tmp_path / "é"), PATH=str(tmp_path), CXX="", PYTHONIOENCODING="ascii")
    assert row(report, "cache") == str(tmp_path / r"\xe9")


@pytest.mark.check("every way in which a build, or what it looks for, can fail")
@pytest.mark.parametrize("package", ["ninja", "triton"])
@pytest.mark.parametrize("content", ["", "raise ValueError('settings')"])
def test_other_packages_of_a_tool_s_name(tmp_path: Path, package: str, content: str) -> None:
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text(content)
    path = os.pathsep.join([str(tmp_path), str(Path(fused_elbo.__file__).parents[1])])
    report = doctor(PYTHONPATH=path, PATH=str(tmp_path), CXX="", FUSED_ELBO_CACHE_DIR=str(tmp_path / "cache"))
    assert re.search(r"^triton +unavailable +Triton ", report, re.MULTILINE)
    assert report.endswith("CPU tensors are served by: reference\n")


@pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="no C++ compiler (g++, clang++, c++) on this machine"
)
def test_it_builds_what_it_can() -> None:
    """The cache is that of the other tests, so that the kernels are compiled once."""
    report = doctor()
    state, library, *_ = row(report, "cpp").split()
    assert state == "ready", report
    assert Path(library).is_relative_to(row(report, "cache"))
    assert Path(library).exists()
    assert report.endswith("CPU tensors are served by: cpp\n")


def test_table_is_aligned_and_the_first_ready_backend_serves() -> None:
    rows = [Status("cpp", False, "broken.", "Mend it."), Status("reference", True, "plain PyTorch")]
    first, remedy, second = table(rows)
    assert first.index("broken.") == remedy.index("Mend it.") == second.index("plain PyTorch")
    assert served_by(rows, ("cpp", "reference")) == "reference"
    assert served_by([Status("cpp", True, "x"), *rows[1:]], ("cpp", "reference")) == "cpp"
    assert served_by(rows[:1], ("cpp", "reference")) == "none"
