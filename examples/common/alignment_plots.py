"""The picture of aligned_posteriors.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from .aggregates import SHOWN, Posterior, draw_latents
from .beta_plots import KINDS
from .plots import plt  # pyplot, once it draws to files


def draw(path: Path, shown: Sequence[Posterior], rows: Sequence[dict[str, Any]], *, title: str) -> None:
    """Left q(z_k) over the prior at each β, a line for each kind of model; right how well latents agree between two β,
    and what decoding at another β costs, over how far apart the two are."""
    figure, grid, _ = draw_latents(shown, right=(1.2, 0.9))
    above, below = (figure.add_subplot(part) for part in (grid[0, SHOWN:], grid[1, SHOWN:]))
    _over_ratio(above, rows, "agreement", directed=False)
    above.set(ylabel="|correlation| of matched latents", ylim=(0, 1.02), xlabel="larger β / smaller β")
    _over_ratio(below, rows, "error", directed=True)
    below.set(ylabel="squared error / its own decoder's", xlabel="β of the decoder / β of the encoder")
    above.legend(fontsize=9)
    figure.suptitle(title, fontsize=12)
    figure.savefig(path, dpi=85)
    plt.close(figure)


def _over_ratio(axis: Axes, rows: Sequence[dict[str, Any]], key: str, *, directed: bool) -> None:
    """Mean over pairs and seeds, by the number of steps between the two β of a family's grid."""
    for (kind, family), (label, style) in KINDS.items():
        found: dict[int, list[tuple[float, float]]] = {}
        betas = sorted({row["beta"] for row in rows if row["family"] == family})
        for row in rows:
            if (row["kind"], row["family"]) == (kind, family) and row["latents"] > 0:
                steps = betas.index(row["beta_of_decoder"]) - betas.index(row["beta"])
                ratio = row["beta_of_decoder"] / row["beta"]
                if not directed:
                    steps, ratio = abs(steps), math.exp(abs(math.log(ratio)))
                found.setdefault(steps, []).append((ratio, row[key]))
        if found:
            means = np.array([np.mean(found[steps], axis=0) for steps in sorted(found)])
            axis.plot(*means.T, ms=5, label=label, **style)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda ratio, _: f"{ratio:g}" if ratio >= 1 else f"1/{1 / ratio:g}")
    axis.grid(alpha=0.2)
