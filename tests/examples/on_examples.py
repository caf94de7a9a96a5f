"""Imported first by the tests of the examples: their packages, the way to their folder, and their threads."""

from __future__ import annotations

import csv
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

for package in ("matplotlib", "mlxtend", "sklearn", "tqdm", "PIL"):
    pytest.importorskip(package, reason="the examples need the extra: pip install fused-elbo[examples]")

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))  # as Python does for a script: they import their neighbour `common`
TINY = ["--data", "digits", "--beta", "2", "--width", "8", "--latent-dim", "4", "--lr", "0.005"]


def read_csv(path: Path) -> list[dict[str, Any]]:
    """Rows with numbers as floats, and what is neither a number nor blank as text; a blank is None."""

    def value(text: str) -> float | str | None:
        try:
            return float(text) if text else None
        except ValueError:
            return text

    with path.open(encoding="utf-8", newline="") as file:
        return [{key: value(text) for key, text in row.items()} for row in csv.DictReader(file)]


def train(out: Path, *options: str, code: int = 0) -> dict[str, Any]:
    """Runs examples/train_vae.py on the digits, with a small model, and gives its metrics."""
    import train_vae

    assert train_vae.main([*TINY, "--out", str(out), *options]) == code
    return json.loads((out / "metrics.json").read_text()) if code == 0 else {}


def interrupt_in_step(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Ctrl-C in the middle of this training step, counted over all models."""
    from common.training import Trainer

    original, steps = Trainer.train_step, itertools.count(1)

    def train_step(self: Trainer, index: torch.Tensor) -> object:
        if next(steps) == number:
            raise KeyboardInterrupt
        return original(self, index)

    monkeypatch.setattr(Trainer, "train_step", train_step)


@pytest.fixture(autouse=True, scope="module")  # before what a module's own fixtures train
def one_thread() -> Iterator[None]:
    """These tensors are too small to share out; and where tests run side by side, waiting threads cost most."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
