"""The benchmark of the host's side of a step on a GPU: bench/host.py."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.mark.check("the benchmark of the host's side, in a process of its own")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed (it is for Linux)")
def test_all_providers_are_timed(tmp_path: Path) -> None:
    """In a process of its own, since Triton's kernels serve CPU tensors from then on."""
    command = [sys.executable, str(BENCH / "host.py"), "--rounds", "2", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads((tmp_path / "host.json").read_text(encoding="utf-8"))
    names = [own["provider"] for own in found["results"]]
    assert names == [
        "triton", "single_pass", "cuda", "cuda_single_pass",
        "one_liner", "one_liner_compiled", "stock", "stock_compiled",
    ]  # fmt: skip
    assert [line.split()[0] for line in done.stdout.splitlines()] == names
    assert all(own["step_s"]["median"] > 0 for own in found["results"])
