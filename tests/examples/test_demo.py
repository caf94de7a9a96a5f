"""examples/train_vae.py from end to end, as `make demo` runs it, but in seconds. test_examples.py has the rest."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mlxtend", reason="the examples need the extra: pip install fused-elbo[examples]")
SCRIPT = Path(__file__).parents[2] / "examples" / "train_vae.py"


def test_it_trains_and_shows_what_it_learnt(tmp_path: Path) -> None:
    options = ["--data", "digits", "--epochs", "3", "--beta", "2", "--width", "8", "--latent-dim", "4", "--lr", "0.005"]
    done = subprocess.run(
        [sys.executable, SCRIPT, *options, "--out", tmp_path], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "test: loss" in done.stdout
    found = {path.name for path in tmp_path.iterdir() if path.stat().st_size}
    assert found == {"checkpoint.pt", "curves.png", "images.png", "metrics.json", "settings.json"}
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert all(math.isfinite(metrics[key]) for key in ("loss", "distortion", "rate", "sigma", "bits_per_dim"))
    first, *_, last = metrics["history"]
    assert last["val"]["loss"] < first["val"]["loss"] - 1  # nats
