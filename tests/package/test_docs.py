"""What the documentation shows is run: README's code blocks in order, and the examples in docstrings."""

from __future__ import annotations

import doctest
import importlib
import os
import re
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import fused_elbo

README = Path(__file__).parents[2] / "README.md"
MODULES = ["fused_elbo", "fused_elbo.functional", "fused_elbo.modules", "fused_elbo.sigma", "fused_elbo.backends"]


def run_readme(_: int, folder: str) -> None:
    """As if torchrun had started this process alone."""
    options = {"init_method": f"file://{folder}/rendezvous", "rank": 0, "world_size": 1}
    dist.init_process_group = partial(dist.init_process_group, "gloo", **options)
    namespace: dict[str, object] = {}
    for block in blocks():
        exec(compile(block, str(README), "exec"), namespace)
    os._exit(0)  # as in test_distributed.py


def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), flags=re.S | re.M)


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
def test_readme_code_runs(tmp_path: Path) -> None:
    assert len(blocks()) >= 3
    mp.spawn(run_readme, args=(str(tmp_path),), nprocs=1)


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name: str) -> None:
    found = doctest.testmod(importlib.import_module(name), extraglobs={"torch": torch, "fused_elbo": fused_elbo})
    assert found.attempted > 0
    assert found.failed == 0
