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
    grid = np.geomspace(min(row["beta"] for row in rows) / 1.3, linear.switches_off(eigenvalues, 0), 400)
    exact = [linear.optimum(eigenvalues, latents, float(beta)) for beta in grid]
    curve, betas = Curve("", "", "trained linear VAEs", {"color": GREEN, "marker": "s", "ls": ""}), {}
    for row in rows:
        betas.setdefault(row["beta"], []).append(row)

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    left.plot([o.rate for o in exact], [o.distortion for o in exact], color="black", lw=1.2, label="closed form")
    trained = points([{**row, "family": "", "reading": "", "sigma": math.nan} for row in rows], curve)
    _errorbars(left, trained, curve)
    for beta, x, y in zip(trained["beta"], trained["rate"], trained["distortion"], strict=True):
        left.annotate(f"β = {beta:g}", (x, y), (7, 5), textcoords="offset points", fontsize=8)
    left.set(xlabel="rate (nats per sample)", ylabel="distortion −log p(x|z) at optimal σ² (nats per sample)")

    levels = np.array([o.level for o in exact])
    right.plot(grid, levels, color="black", lw=1.2, label="βσ², closed form")
    measured = [[row["beta"] * row["sse"] / len(eigenvalues) for row in repeats] for repeats in betas.values()]
    right.plot(list(betas), [np.mean(repeats) for repeats in measured], ls="", marker="s", color=GREEN, ms=5,
               label="βσ², trained")  # fmt: skip
    for i, value in enumerate(eigenvalues.tolist()):
        carried = i < latents
        if value < levels[0]:
            break
        right.axhline(value, color=BLUE if carried else GREY, ls="-" if carried else ":", lw=0.9, zorder=0)
        right.text(grid[0], value, f" $\\lambda_{{{i + 1}}}$", fontsize=9, va="bottom", color=BLUE if carried else GREY)
        if carried:
            off = linear.switches_off(eigenvalues, i)
            right.plot(
                off, value, marker="o", color=ORANGE, ms=7, ls="", label="dimension switches off" if i == 0 else None
            )
            left_at = linear.optimum(eigenvalues, latents, off)
            left.plot(left_at.rate, left_at.distortion, marker="o", mfc="none", mec=ORANGE, ms=9, ls="",
                      label="a dimension switches off: βσ² = λ" if i == 0 else None)  # fmt: skip
    right.set(xscale="log", yscale="log", xlabel="β", ylabel="variance")
    left.set_title(f"linear VAE, {latents} latents, Gaussian data in {len(eigenvalues)} dimensions", fontsize=11)
    right.set_title("reverse water-filling: active while λ > βσ²", fontsize=11)
    left.legend(fontsize=9)
    right.legend(fontsize=9, loc="lower right")
    right.set_xticks(list(betas), [f"{beta:g}" for beta in betas], minor=False)
    right.set_xticks([], minor=True)
    left.grid(alpha=0.2)
    figure.savefig(path, dpi=110)
    plt.close(figure)
