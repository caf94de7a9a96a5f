"""Sweeps of rd_curve.py for its tests, small ones among them, and a curve of their rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from on_examples import read_csv

# isort: split
import rd_curve
from common import rd_plots

TINY = ["--data", "digits", "--points", "2", "--repeats", "1", "--epochs", "2", "--width", "8", "--latent-dim", "4"]
TINY_LINEAR = ["--linear", "--points", "2", "--repeats", "1", "--epochs", "2"]
Row = dict[str, Any]


def sweep(out: Path, *options: str, code: int = 0) -> list[Row]:
    assert rd_curve.main([*options, "--out", str(out)]) == code
    return read_csv(out / "rd_curve.csv") if code == 0 else []


def curve(rows: list[Row], family: str, reading: str) -> dict[str, np.ndarray]:
    return rd_plots.points(rows, rd_plots.Curve(family, reading, "", {}))


FAMILIES = tuple(rd_curve.SIGMA)
