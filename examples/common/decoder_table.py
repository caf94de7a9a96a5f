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
β-VAE: SSE + β KL, that is σ² = β/2, with the best β of the sweep on the validation split.
Blank: Bernoulli on grey levels is no likelihood of 8-bit data; an optimal per-image σ has seen the image it describes.
Densities cannot gather all mass on one level, as black pixels ask for: σ of per-pixel σ and Student-t is at least e⁻³.
Reconstructions and samples are E[x|z], clipped to [0, 1], for every decoder."""


def number(value: float | None, digits: int, sign: str = "") -> str:
    return BLANK if value is None else f"{sign}{value:.{digits}f}".replace("-", "−")


def table(results: Sequence[dict[str, Any]], distance: str, note: str) -> str:
    """Markdown, its columns aligned so that it can be read on a console, too."""
    head = ["decoder", "−log p, density", "−log P, 8-bit mass", "bits/dim", "rate", "σ", "recon. RMSE", distance]
    rows = [head]
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
    return "\n".join(f"| {line} |" for line in lines) + f"\n\n{NOTES}\n{distance}: {note}.\n"


def draw(
    path: Path, rows: Sequence[dict[str, Any]], results: Sequence[dict[str, Any]], distance: str, note: str
) -> None:
    """A line of reconstructions and samples for each row, its numbers beside it; below, the sweep over beta."""
    heights = [0.4 * len(rows) + 0.3, 3.0]
    figure = plt.figure(figsize=(11, sum(heights)), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=heights)
    above.get_layout_engine().set(h_pad=0.01, hspace=0)
    axes = above.subplots(len(rows), 4, width_ratios=[1.6, 4, 4, 2.3])
    for line, row in zip(axes, rows, strict=True):
        _line(line, row, distance)
    axes[0, 1].set_title("test images; their reconstructions", fontsize=9)
    axes[0, 2].set_title("training images; samples from the prior", fontsize=9)
    for place, _, _, _, title in _numbers(distance):
        _write(axes[0, 3], place, 1.0, title, va="bottom")
    _sweep(below, results, distance)
    below.supxlabel("\n".join(textwrap.wrap(f"{distance}: {note}.", 165)), fontsize=7.5, color="0.35")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _numbers(distance: str) -> list[tuple[float, str, int, str, str]]:
    """Where each is written, its key, digits and sign, and its title."""
    return [
        (0.36, "bits_per_dim", 3, "< ", "bits/dim"),
        (0.68, "rmse", 3, "", "RMSE"),
        (1.0, "frechet", 1, "", distance),
    ]


def _write(axis: Axes, x: float, y: float, text: str, *, va: str = "center") -> None:
    axis.text(x, y, text, va=va, ha="right", fontsize=9, transform=axis.transAxes)


def _line(axes: Sequence[Axes], row: dict[str, Any], distance: str) -> None:
    for axis in axes:
        axis.axis("off")
    axes[0].text(0, 0.5, row.get("title", row["label"]), va="center", fontsize=9)
    for axis, key in zip(axes[1:3], ("recons", "samples"), strict=True):
        axis.imshow(tile(row[key], len(row[key])), interpolation="nearest")
    for place, key, digits, sign, _ in _numbers(distance):
        _write(axes[3], place, 0.5, number(row.get(key), digits, sign))


def _sweep(figure: Any, results: Sequence[dict[str, Any]], distance: str) -> None:
    """The trained and the closed-form sigma stand at the beta that they mean, 2 sigma²."""
    sweep = sorted((r for r in results if r["beta"] is not None), key=lambda r: r["beta"])
    found = {r["decoder"]: r for r in results}
    keys = [
        ("bits_per_dim", "bound (bits/dim)"),
        ("rmse", "RMSE of reconstructions"),
        ("frechet", f"{distance} of samples"),
    ]
    axes = figure.subplots(1, 3)
    for axis, (key, label) in zip(axes, keys, strict=True):
        axis.set(xscale="log", xlabel="β of SSE + β KL, or 2σ²", ylabel=label)
        axis.grid(alpha=0.3)
        if sweep[0][key] is None:
            continue
        axis.plot([r["beta"] for r in sweep], [r[key] for r in sweep], "o-", color="#0072B2", label="β-VAEs")
        for name, color, marker in (
            ("sigma-1", "#000000", "X"),
            ("shared", "#D55E00", "s"),
            ("optimal", "#009E73", "D"),
        ):
            row = found[name]
            axis.plot(2 * row["sigma"] ** 2, row[key], marker, color=color, label=row["label"], markersize=7)
    axes[0].legend(fontsize=8)
