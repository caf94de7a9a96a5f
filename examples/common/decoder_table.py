"""calibrated_decoders.py's table and picture."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from .plots import tile

BLANK = "·"
NOTES = """\
−log p: test distortion + rate, an upper bound, in nats per image; as a density of x in [0, 1], and as the mass of the
8-bit levels, −log P = −log p + D log 255, which is the scale on which densities and masses compare.
Blank: Bernoulli on grey levels is no likelihood of 8-bit data; an optimal per-image σ has seen the image it describes.
Densities cannot gather all mass on one level, as black pixels ask for: σ of per-pixel σ and Student-t is at least e⁻³.
Reconstructions and samples are E[x|z], clipped to [0, 1], for every decoder."""


def number(value: float | None, digits: int, sign: str = "") -> str:
    return BLANK if value is None else f"{sign}{value:.{digits}f}".replace("-", "−")


def table(results: Sequence[dict[str, Any]], distance: str, note: str) -> str:
    """Markdown, its columns aligned so that it can be read on a console, too."""
    head = ["decoder", "−log p, density", "−log P, 8-bit mass", "bits/dim", "rate", "σ", "recon. RMSE"]
    rows = [[*head, distance or "Fréchet"]]
    for r in results:
        bounds = [
            number(r.get(key), digits, "< ")
            for key, digits in (("density_nats", 0), ("mass_nats", 0), ("bits_per_dim", 3))
        ]
        rest = [number(r.get(key), digits) for key, digits in (("rate", 1), ("sigma", 3), ("rmse", 4), ("frechet", 2))]
        rows.append([r["label"], *bounds, *rest])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    lines = [
        " | ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return "\n".join(f"| {line} |" for line in lines) + f"\n\n{NOTES}\n{distance or 'Fréchet'}: {note}.\n"


def draw(
    path: Path, rows: Sequence[dict[str, Any]], results: Sequence[dict[str, Any]], distance: str, note: str
) -> None:
    """A line of reconstructions and samples for each row, its numbers beside it; below, the sweep over beta."""
    figure = plt.figure(figsize=(11, 0.42 * len(rows) + 3.6), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[0.42 * len(rows) + 0.5, 3.1])
    axes = above.subplots(len(rows), 4, width_ratios=[1.75, 4, 4, 2.6])
    for line, row in zip(axes, rows, strict=True):
        _line(line, row)
    titles = [
        "",
        "test images and reconstructions",
        "training images and samples",
        f"   bits/dim       RMSE     {distance}",
    ]
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=9, loc="left")
    _sweep(below, results, distance)
    below.supxlabel("\n".join(textwrap.wrap(f"{distance}: {note}.", 150)), fontsize=7.5, color="0.35")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _line(axes: Sequence[Axes], row: dict[str, Any]) -> None:
    for axis in axes:
        axis.axis("off")
    axes[0].text(0, 0.5, row["label"], va="center", fontsize=9)
    for axis, key in zip(axes[1:3], ("recons", "samples"), strict=True):
        axis.imshow(tile(row[key], len(row[key])), interpolation="nearest")
    for place, key, digits, sign in ((0.3, "bits_per_dim", 3, "< "), (0.65, "rmse", 3, ""), (1.0, "frechet", 1, "")):
        text = number(row.get(key), digits, sign)
        axes[3].text(place, 0.5, text, va="center", ha="right", fontsize=9, transform=axes[3].transAxes)


def _sweep(figure: Any, results: Sequence[dict[str, Any]], distance: str) -> None:
    sweep = sorted((r for r in results if r["beta"] is not None), key=lambda r: r["beta"])
    names = {r["decoder"]: r for r in results}
    keys = [
        ("bits_per_dim", "bound (bits/dim)"),
        ("rmse", "reconstruction RMSE"),
        ("frechet", f"{distance} of samples"),
    ]
    axes = figure.subplots(1, 3)
    for axis, (key, label) in zip(axes, keys, strict=True):
        axis.set(xscale="log", xlabel="β of SSE + β KL  (σ² = β/2)", ylabel=label)
        axis.grid(alpha=0.3)
        if sweep[0][key] is None:
            continue
        axis.plot([r["beta"] for r in sweep], [r[key] for r in sweep], "o-", color="#0072B2", label="β-VAE")
        for name, color, style in (("shared", "#D55E00", "--"), ("optimal", "#009E73", "-.")):
            axis.axhline(names[name][key], color=color, linestyle=style, label=names[name]["label"])
    axes[0].legend(fontsize=8)
