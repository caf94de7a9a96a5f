"""The figures of rd_curve.py: distortion against rate, both in nats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from torch import Tensor

from . import linear
from .plots import plt  # pyplot, once it draws to files

# Okabe and Ito's colours, which the colour-blind tell apart.
GREY, ORANGE, BLUE, GREEN, PURPLE = "#777777", "#D55E00", "#0072B2", "#009E73", "#CC79A7"


class Curve(NamedTuple):
    family: str
    reading: str
    label: str
    style: dict[str, Any]


CURVES = (
    Curve("squared error", "half", "SSE + β·rate at σ² = ½", {"color": GREY, "marker": "v", "ls": ":"}),
    Curve("squared error", "beta", "SSE + β·rate at σ² = β/2", {"color": ORANGE, "marker": "^", "ls": ":"}),
    Curve("squared error", "optimal", "SSE + β·rate at its optimal σ²", {"color": BLUE, "marker": "o", "ls": "-"}),
    Curve("decoupled", "optimal", "decoupled, σ² optimal", {"color": GREEN, "marker": "s", "ls": "-"}),
    Curve("per image", "image", "decoupled, σ² per image (no bound: σ sees x)",
          {"color": PURPLE, "marker": "D", "mfc": "white", "ls": "--"}),
)  # fmt: skip
PROPER = CURVES[2:4]
OFF = {"marker": "o", "mfc": "none", "mec": ORANGE, "ms": 9, "ls": ""}


def points(rows: Sequence[dict[str, Any]], curve: Curve) -> dict[str, np.ndarray]:
    """Mean and standard deviation over the seeds, one entry for each β in ascending order."""
    chosen = [row for row in rows if (row["family"], row["reading"]) == (curve.family, curve.reading)]
    betas = sorted({row["beta"] for row in chosen})
    found = {"beta": np.array(betas)}
    for key in ("rate", "distortion", "sigma"):
        values = [[row[key] for row in chosen if row["beta"] == beta] for beta in betas]
        found[key] = np.array([np.mean(repeats) for repeats in values])
        found[key + "_std"] = np.array([np.std(repeats) for repeats in values])
    return found


def plot_curves(path: Path, rows: Sequence[dict[str, Any]], *, title: str) -> None:
    """Left every reading; right the two that are proper curves, with their β."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5.6), layout="constrained")
    for axis, curves in ((left, CURVES), (right, PROPER)):
        for curve in curves:
            _errorbars(axis, points(rows, curve), curve)
        axis.set(xlabel="rate (nats per image)", ylabel="distortion −log p(x|z) (nats per image)")
    elbo = points(rows, PROPER[1])
    at = elbo["beta"] == 1
    right.plot(
        elbo["rate"][at], elbo["distortion"][at], ls="", marker="*", ms=17, mfc="none", mec="black",
        label="β = 1: trained on the ELBO", zorder=5,
    )  # fmt: skip
    for curve, offset in zip(PROPER, ((6, 6), (-6, -12)), strict=True):
        found = points(rows, curve)
        for beta, x, y in zip(found["beta"], found["rate"], found["distortion"], strict=True):
            right.annotate(
                f"{beta:g}", (x, y), offset, textcoords="offset points", fontsize=8, color=curve.style["color"],
                ha="left" if offset[0] > 0 else "right",
            )  # fmt: skip
    right.margins(0.09)
    for axis, name in ((left, "one model, several σ²"), (right, "the two proper curves, with their β")):
        _constant_elbo(axis, "equal distortion + rate" if axis is right else None)
        axis.set_title(name, fontsize=11)
    entries = {
        name: handle for axis in (left, right) for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    figure.suptitle(title, fontsize=12)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _errorbars(axis: Axes, found: dict[str, np.ndarray], curve: Curve) -> None:
    repeated = bool(np.any(found["rate_std"] > 0))
    axis.errorbar(
        found["rate"], found["distortion"],
        xerr=found["rate_std"] if repeated else None, yerr=found["distortion_std"] if repeated else None,
        label=curve.label, ms=5, lw=1.5, elinewidth=1, capsize=2, **curve.style,
    )  # fmt: skip


def _constant_elbo(axis: Axes, label: str | None) -> None:
    """Lines of equal distortion + rate, the negative ELBO: the nearer to the lower left corner the better."""
    (x0, x1), (y0, y1) = axis.get_xlim(), axis.get_ylim()
    for total in np.linspace(x0 + y0, x1 + y1, 14):
        axis.plot([x0, x1], [total - x0, total - x1], color="0.88", lw=0.8, zorder=0)
    axis.plot([], [], color="0.8", lw=0.8, label=label)
    axis.set(xlim=(x0, x1), ylim=(y0, y1))


def plot_linear(path: Path, rows: Sequence[dict[str, Any]], eigenvalues: Tensor, latents: int) -> None:
    """Left the trained models on the exact curve; right what β does: the water level, and who is below it."""
    dims = len(eigenvalues)
    curve = Curve("", "", "trained linear VAEs", {"color": GREEN, "marker": "s", "ls": ""})
    family = {"family": curve.family, "reading": curve.reading}
    trained = points([{**row, **family, "sigma": math.sqrt(row["sse"] / dims)} for row in rows], curve)
    grid = np.geomspace(trained["beta"][0] / 1.3, linear.switches_off(eigenvalues, 0), 400)
    exact = [linear.optimum(eigenvalues, latents, float(beta)) for beta in grid]
    off = np.array([linear.switches_off(eigenvalues, i) for i in range(latents)])
    at_off = [linear.optimum(eigenvalues, latents, float(beta)) for beta in off]

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    left.plot([o.rate for o in exact], [o.distortion for o in exact], color="black", lw=1.2, label="closed form")
    _errorbars(left, trained, curve)
    left.plot(
        [o.rate for o in at_off], [o.distortion for o in at_off], label="a dimension switches off: βσ² = λ", **OFF
    )
    for beta, x, y in zip(trained["beta"], trained["rate"], trained["distortion"], strict=True):
        left.annotate(f"β = {beta:g}", (x, y), (7, 5), textcoords="offset points", fontsize=8)
    left.set(xlabel="rate (nats per sample)", ylabel="distortion −log p(x|z) at optimal σ² (nats per sample)")
    left.set_title(f"linear VAE, {latents} latents, Gaussian data in {dims} dimensions", fontsize=11)
    left.margins(x=0.09)
    left.grid(alpha=0.2)

    right.plot(grid, [o.level for o in exact], color="black", lw=1.2, label="βσ², closed form")
    right.plot(trained["beta"], trained["beta"] * trained["sigma"] ** 2, label="βσ², trained", ms=5, **curve.style)
    right.plot(off, eigenvalues[:latents], label="a dimension switches off", **OFF)
    for i, value in enumerate(eigenvalues[eigenvalues > exact[0].level].tolist()):
        colour = BLUE if i < latents else GREY
        right.axhline(value, color=colour, ls="-" if i < latents else ":", lw=0.9, zorder=0)
        right.text(grid[0], value, f" $\\lambda_{{{i + 1}}}$", fontsize=9, va="bottom", color=colour)
    right.set(xscale="log", yscale="log", xlabel="β", ylabel="variance")
    right.set_xticks(trained["beta"], [f"{beta:g}" for beta in trained["beta"]])
    right.set_xticks([], minor=True)
    right.set_title("reverse water-filling: active while λ > βσ²", fontsize=11)
    for axis, corner in ((left, "upper right"), (right, "lower right")):
        axis.legend(fontsize=9, loc=corner)
    figure.savefig(path, dpi=110)
    plt.close(figure)
