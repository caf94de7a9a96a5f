"""What the documentation shows is run: README's code blocks in order, and the examples in docstrings."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest
import torch

import fused_elbo

README = Path(__file__).parent.parent / "README.md"
MODULES = ["fused_elbo", "fused_elbo.functional", "fused_elbo.modules", "fused_elbo.sigma", "fused_elbo.backends"]


def test_readme_code_runs() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), flags=re.S | re.M)
    assert len(blocks) >= 3
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), namespace)


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name: str) -> None:
    found = doctest.testmod(importlib.import_module(name), extraglobs={"torch": torch, "fused_elbo": fused_elbo})
    assert found.attempted > 0
    assert found.failed == 0
