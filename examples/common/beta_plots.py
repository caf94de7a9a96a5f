"""The figures of beta_input.py."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from . import linear, linear_beta
from .conditioning import BetaRange
from .plots import plt  # pyplot, once it draws to files

STYLES = {  # Okabe and Ito's colours, which the colour-blind tell apart
    "level": ("gates in ℓ = log βσ²", {"color": "#009E73", "marker": "s"}),
    "log-beta": ("the same gates in log β", {"color": "#D55E00", "marker": "o"}),
    "multi-rate": ("Multi-Rate VAE's gates in log β", {"color": "#CC79A7", "marker": "v"}),
    "root-sigmoid": ("its decoder's with √sigmoid", {"color": "#56B4E9", "marker": "^"}),
    "film": ("FiLM of log β", {"color": "#0072B2", "marker": "D"}),
    "sigma-batch": ("gates in log β, σ optimal over the batch", {"color": "#E69F00", "marker": "o"}),
    "sigma-image": ("FiLM, σ optimal per sample (no bound)", {"color": "#777777", "marker": "x"}),
    "sigma-one-beta": ("FiLM, one β and optimal σ a batch", {"color": "#000000", "marker": "+", "ms": 8}),
}
CONDITIONED = ("level", "log-beta", "multi-rate", "root-sigmoid", "film")
BY_SIGMA = ("level", "sigma-batch", "sigma-image", "sigma-one-beta")


def plot_linear(
    path: Path, rows: Sequence[dict[str, Any]], eigenvalues: Tensor, latents: int, betas: BetaRange,
    grid: Sequence[float], best: linear_beta.Best,
) -> None:  # fmt: skip
    """Left the level; middle what σ does to the rate; right how far each conditioning is from the optimum."""
    dims = len(eigenvalues)
    exact = [linear.optimum(eigenvalues, latents, beta) for beta in grid]
    shared = linear_beta.shared_variance(eigenvalues, latents, betas.grid(500).tolist())
    coupled = [linear_beta.at_level(eigenvalues, latents, beta * shared) for beta in grid]
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 5.2), layout="constrained")

    left.plot(grid, [point.level for point in exact], color="black", lw=1.2, label="βσ²(β), decoupled optimum")
    left.plot(grid, [beta * shared for beta in grid], color="black", lw=1.2, ls="--", label="βσ̄², one σ̄ for all β")
    levels = [{**row, "level": row["beta"] * row["sigma_network"] ** 2} for row in rows if row["row"] == "level"]
    _points(left, levels, "level", "level", label="its network's, where the gates are told ℓ")
    for i, value in enumerate(eigenvalues[:latents].tolist()):
        left.axhline(value, color="0.75", lw=0.8, zorder=0)
        left.text(grid[-1], value, f"$\\lambda_{{{i + 1}}}$", fontsize=9, va="bottom", ha="right", color="0.5")
    left.set_ylim(0.03, 2e3)
    left.set(xscale="log", yscale="log", xlabel="β", ylabel="water level βσ²", title="the level is not affine in log β")

    middle.plot(grid, [point.rate for point in exact], color="black", lw=1.2, label="decoupled optimum")
    middle.plot(grid, [point.rate for point in coupled], color="black", lw=1.2, ls="--", label="optimum at βσ̄²")
    for name in BY_SIGMA:
        _points(middle, rows, name, "rate")
    middle.set(xscale="log", xlabel="β", ylabel="rate (nats per sample)", title="what σ does")

    exact_rates = np.array([point.rate for point in exact])
    right.plot(grid, np.abs(best.rate.numpy() / exact_rates - 1), color="black", ls=":", lw=1.2,
               label="the best of all gates affine in log β")  # fmt: skip
    off = [{**row, "off": abs(row["rate"] / row["exact_rate"] - 1)} for row in rows]
    for name in CONDITIONED:
        _points(right, off, name, "off", ls="-")
    right.axhline(0.02, color="0.6", lw=0.8)
    right.set(xscale="log", yscale="log", xlabel="β", ylabel="|rate / optimum − 1|", title="what the network is told")
    right.set_ylim(2e-4, 100)
    for axis, corner in ((left, "upper left"), (middle, "lower left"), (right, "upper left")):
        axis.legend(fontsize=8, loc=corner)
        axis.grid(alpha=0.2)
    figure.suptitle(f"one linear VAE for every β: {latents} latents, Gaussian data in {dims} dimensions", fontsize=12)
    figure.savefig(path, dpi=100)
    plt.close(figure)


KINDS = {
    ("separate", "squared error"): ("one VAE a β, SSE + β·rate", {"color": "#0072B2", "marker": "o", "ls": "-"}),
    ("beta-input", "squared error"): ("one VAE for all, SSE + β·rate", {"color": "#56B4E9", "marker": "o", "ls": "--"}),
    ("separate", "decoupled"): ("one VAE a β, decoupled", {"color": "#009E73", "marker": "s", "ls": "-"}),
    ("beta-input", "decoupled"): ("one VAE for all, decoupled", {"color": "#D55E00", "marker": "s", "ls": "--"}),
}


def plot_images(path: Path, rows: Sequence[dict[str, Any]], *, title: str, note: str) -> None:
    """Left rate–distortion curves, at the σ of training; middle what one model for all costs at each β, in its β-loss,
    over the rate of the separate one, which both families have as an axis; right the Fréchet distance of samples from
    the prior, where there are features for it. Thin lines are the seeds."""
    measured = rows[0]["frechet"] is not None
    figure, axes = plt.subplots(1, 3 if measured else 2, figsize=(17 if measured else 12, 5), layout="constrained")
    left, middle = axes[:2]
    for (kind, family), (label, style) in KINDS.items():
        own = [row for row in rows if (row["kind"], row["family"]) == (kind, family)]
        betas = sorted({row["beta"] for row in own})

        def mean(key: str, own: Any = own, betas: Any = betas) -> np.ndarray:
            return np.array([np.mean([row[key] for row in own if row["beta"] == beta]) for beta in betas])

        left.plot(mean("rate"), mean("distortion"), ms=5, label=label, **style)
        if kind == "beta-input":
            middle.plot(mean("separate_rate"), mean("excess"), ms=5, label=label, **style)
            _seeds(middle, own, mean("separate_rate"), "excess", style["color"])
        if measured:
            axes[2].plot(betas, mean("frechet"), ms=5, label=label, **style)
            _seeds(axes[2], own, betas, "frechet", style["color"])
    left.set(xlabel="rate (nats per image)", ylabel="distortion −log p(x|z) (nats per image)")
    middle.set(xlabel="rate of the VAE of one β (nats per image)", ylabel="excess β-loss over it (nats per image)")
    middle.axhline(0, color="0.6", lw=0.8)
    if measured:
        axes[2].set(xscale="log", yscale="log", xlabel="β", ylabel="Fréchet distance of samples from the prior")
        axes[2].set_title(textwrap.fill(note, 70), fontsize=8)
    for axis in axes:
        axis.grid(alpha=0.2)
        axis.legend(fontsize=9)
    figure.suptitle(title, fontsize=12)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _seeds(axis: Any, rows: Sequence[dict[str, Any]], at: Sequence[float], key: str, color: str) -> None:
    for seed in sorted({row["seed"] for row in rows}):
        each = sorted((row["beta"], row[key]) for row in rows if row["seed"] == seed)
        axis.plot(at, [value for _, value in each], color=color, lw=0.5)


def _points(axis: Any, rows: Sequence[dict[str, Any]], name: str, key: str, ls: str = "", label: str = "") -> None:
    """Mean over the seeds at each β, with the range of the seeds."""
    own = [row for row in rows if row["row"] == name]
    if not own:
        return
    betas = sorted({row["beta"] for row in own})
    values = [[row[key] for row in own if row["beta"] == beta] for beta in betas]
    mean = np.array([np.mean(v) for v in values])
    spread = np.array([[m - min(v), max(v) - m] for m, v in zip(mean, values, strict=True)]).T
    usual, style = STYLES[name]
    axis.errorbar(betas, mean, yerr=spread if np.any(spread > 0) else None, ls=ls, lw=1.2,
                  elinewidth=1, capsize=2, label=label or usual, **{"ms": 5, **style})  # fmt: skip
