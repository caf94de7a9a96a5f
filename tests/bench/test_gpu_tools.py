"""compute-sanitizer and ncu: what their sections read in what they print, and what is left when their time is over."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).parents[2]
sys.path[:0] = [str(REPO / "bench" / "proof"), str(REPO / "bench")]

import gpu_tools  # noqa: E402
from gpu_section import Ended, Part  # noqa: E402

SANITIZER = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 4 bytes
=========     at elbo_stats_kernel+0x150 in kernel.py:48
=========     by thread (0,0,0) in block (0,0,0)
========= Error: Race reported between Read access at elbo_step_kernel+0x70
========= ERROR SUMMARY: 2 errors""".splitlines()
NCU = """==PROF== Connected to process 4711 (/usr/bin/python3)
==PROF== Profiling "elbo_stats_kernel" - 0: 0%....100% - 1 pass
"ID","Process ID","Kernel Name","Context","Metric Name","Metric Unit","Metric Value"
"0","4711","spin_kernel","1","dram__bytes_read.sum","byte","64"
"0","4711","spin_kernel","1","dram__bytes_write.sum","byte","0"
"1","4711","elbo_stats_kernel","1","dram__bytes_read.sum","byte","1,000"
"1","4711","elbo_stats_kernel","1","dram__bytes_write.sum","byte","10"
"2","4711","elbo_grads_kernel","1","dram__bytes_read.sum","byte","600"
"2","4711","elbo_grads_kernel","1","dram__bytes_write.sum","byte","400"
"3","4711","spin_kernel","1","dram__bytes_read.sum","byte","0"
"4","4711","void elbo::elbo_step_kernel<float, true>(elbo::StepArguments)","1","dram__bytes_read.sum","byte","700"
"4","4711","void elbo::elbo_step_kernel<float, true>(elbo::StepArguments)","1","dram__bytes_write.sum","byte","500"
==PROF== Disconnected""".splitlines()


def test_what_compute_sanitizer_says() -> None:
    found = gpu_tools.sanitized({"a": {}, "b": {"error": "RuntimeError: no"}}, ["a", "b", "c"], SANITIZER)
    assert found == {"steps": 2, "of": 3, "errors": 3, "first": "Invalid __global__ read of size 4 bytes"}
    clean = [line for line in SANITIZER if "SUMMARY" in line or "COMPUTE" in line]
    clean += [
        "========= Error: process didn't terminate successfully",
        "========= Target application returned an error",
    ]
    assert gpu_tools.sanitized({"a": {}}, ["a"], clean)["first"] is None


def test_what_ncu_counts() -> None:
    """A marker begins each step; what ncu did not see to its end has no row."""
    count = {"two_passes": 2000, "one_pass": 1200}
    done = {"128x3x64x64|triton": count, "128x3x64x64|bad": {"error": "no"}, "128x3x64x64|single_pass": count}
    two, one = gpu_tools.counted(NCU, done)
    assert (two["provider"], two["bytes"]) == ("triton", 2000)
    assert two["kernels"] == [
        {"kernel": "elbo_stats_kernel", "read": 1000.0, "written": 10.0},
        {"kernel": "elbo_grads_kernel", "read": 600.0, "written": 400.0},
    ]
    assert (one["provider"], one["bytes"], len(one["kernels"])) == ("single_pass", 1200, 1)
    assert gpu_tools.counted(["==ERROR== ERR_NVGPUCTRPERM"], done) == []


def test_without_the_tools_their_sections_are_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_tools.shutil, "which", lambda *args, **kw: None)
    for section, name in ((gpu_tools.sanitizer, "compute-sanitizer"), (gpu_tools.traffic, "ncu")):
        part = Part(tmp_path / "part.json", time.monotonic() + 60)
        part.run(section)
        assert part.verdict == f"not run: {name} is not on PATH; it comes with the CUDA toolkit"


@pytest.mark.parametrize("works", [True, False])
def test_a_section_under_a_tool(works: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker's answers say how far it came; a tool under which it comes to nothing is not a failure of ours."""

    def run(command: Any, seconds: float, log: Path, environ: Any) -> Ended:
        answers, items = Path(command[command.index("--answers") + 1]), command[command.index("--items") + 1 :]
        log.write_text("\n".join(SANITIZER[:1]) if works else "========= Error: Device not supported")
        answers.write_text("".join(json.dumps({"item": i, "found": {}}) + "\n" for i in items[:7]) if works else "")
        return Ended(-15, False, seconds)

    monkeypatch.setattr(gpu_tools, "tool", lambda name: name)
    monkeypatch.setattr(gpu_tools, "limited", run)
    part = Part(tmp_path / "part.json", time.monotonic() + 60)
    part.run(gpu_tools.sanitizer)
    if works:
        assert part.verdict is not None
        assert part.verdict.startswith("ok: memcheck of 7 of ")
        assert part.found["racecheck"]["in_time"] is False
    else:
        assert part.verdict == "not run: no step was watched: ========= Error: Device not supported"


def test_an_error_is_told_whatever_comes_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker does not survive it, and the other tool comes to nothing."""

    def run(command: Any, seconds: float, log: Path, environ: Any) -> Ended:
        log.write_text("\n".join(SANITIZER[:4]) if "memcheck" in command else "")
        return Ended(-9, True, 1.0)

    monkeypatch.setattr(gpu_tools, "tool", lambda name: name)
    monkeypatch.setattr(gpu_tools, "limited", run)
    part = Part(tmp_path / "part.json", time.monotonic() + 60)
    part.run(gpu_tools.sanitizer)
    assert part.verdict == "FAILED: memcheck: Invalid __global__ read of size 4 bytes"
