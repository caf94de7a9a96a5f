"""Imported first by the tests of the examples: their packages, the way to their folder, and their threads."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

for package in ("matplotlib", "mlxtend", "sklearn", "tqdm", "PIL"):
    pytest.importorskip(package, reason="the examples need the extra: pip install fused-elbo[examples]")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))  # as Python does for a script: they import their neighbour `common`


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These tensors are too small to share out; and where tests run side by side, waiting threads cost most."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
