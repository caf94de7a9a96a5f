"""Aggregate posteriors over β: what is measured of each latent, and the picture of aggregated_posterior.py.

Nothing here asks where a posterior comes from: each β has a model of its own there, and may have its own input to one
model elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from torch import Tensor

from . import latents
from .plots import plt  # pyplot, once it draws to files
from .quadrature import channel_density, channel_kl

SHOWN, RANGE, BINS = 4, 3.6, 60  # latents in the picture, the least |z| that is drawn, and the histograms' bins
RISE = 0.55  # from one β's base line to the next one's, as a density
STYLES = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"))  # of the families, in their order


class Posterior(NamedTuple):
    """q(z|x) of a whole data set under one model at one β."""

    family: str
    beta: float
    mu: Tensor  # [N, K]
    logvar: Tensor  # [N, K]


def channel_rows(posterior: Posterior) -> list[dict[str, float]]:
    """Of each latent: E KL(q(z_k|x) ‖ p), mean and standard deviation of q(z_k), and KL(q(z_k) ‖ p)."""
    mu, logvar = posterior.mu.double(), posterior.logvar.double()
    rates, kl = latents.rates(mu, logvar), channel_kl(mu, logvar)
    spread = (mu.var(0, correction=0) + logvar.exp().mean(0)).sqrt()
    columns = {"channel_rate": rates, "mean": mu.mean(0), "spread": spread, "kl": kl}
    return [{"channel": k, **{name: float(column[k]) for name, column in columns.items()}} for k in range(mu.shape[1])]


def draw(path: Path, shown: Sequence[Posterior], rows: Sequence[dict[str, Any]], *, title: str) -> None:
    """Left the first latents, by their own numbers, of each family in a line; right all of `rows`."""
    figure, grid, families = draw_latents(shown)
    by_beta, by_rate = (
        figure.add_subplot(part) for part in (grid[: (len(families) + 1) // 2, SHOWN:], grid[-1, SHOWN:])
    )
    draw_by_beta(by_beta, rows, families)
    draw_by_rate(by_rate, rows, families)
    figure.suptitle(title, fontsize=12)
    figure.savefig(path, dpi=85)
    plt.close(figure)


def draw_latents(shown: Sequence[Posterior], right: Sequence[float] = (0.9, 0.9)) -> tuple[Figure, GridSpec, list[str]]:
    """A figure with q(z_k) of the first latents over β, a line for each family; its last columns, of the widths `right`
    in units of the others', are free. And the families."""
    families = list(dict.fromkeys(posterior.family for posterior in shown))
    limit = _reach(shown)
    figure = plt.figure(figsize=(15, 3.9 * len(families)), layout="constrained")
    grid = figure.add_gridspec(len(families), SHOWN + len(right), width_ratios=[*[1] * SHOWN, *right])
    for i, family in enumerate(families):
        line = sorted((posterior for posterior in shown if posterior.family == family), key=lambda p: -p.beta)
        for k in range(min(SHOWN, line[0].mu.shape[1])):
            axis = figure.add_subplot(grid[i, k])
            _ridges(axis, line, k, limit)
            axis.set_title(f"$z_{{{k + 1}}}$" if k else f"{family}: $z_1$", fontsize=11)
            if k == 0:
                axis.set_ylabel("β")
    return figure, grid, families


def _reach(shown: Sequence[Posterior]) -> float:
    """The |z| that holds nearly all of what is drawn."""
    rows = [row for posterior in shown for row in channel_rows(posterior)[:SHOWN]]
    return max(RANGE, *(abs(row["mean"]) + 2 * row["spread"] for row in rows))


def _ridges(axis: Axes, line: Sequence[Posterior], k: int, reach: float) -> None:
    """The largest β on top. A histogram of one sample for each image, the exact q(z_k), and dotted the prior."""
    z = torch.linspace(-reach, reach, 901, dtype=torch.float64)
    prior = torch.exp(-0.5 * z.square()) / (2 * np.pi) ** 0.5
    edges = np.linspace(-reach, reach, BINS + 1)
    colours = plt.get_cmap("viridis")(np.linspace(0.1, 0.85, len(line)))
    bases = [RISE * (len(line) - 1 - i) for i in range(len(line))]
    for base, posterior, colour in zip(bases, line, colours, strict=True):
        samples = latents.draw(posterior.mu, posterior.logvar)[:, k].numpy()
        heights, _ = np.histogram(samples, edges)
        heights = heights / (len(samples) * (edges[1] - edges[0]))
        axis.stairs(base + heights, edges, baseline=base, fill=True, color=colour, alpha=0.55, lw=0)
        axis.plot(z, base + channel_density(z, posterior.mu[:, k], posterior.logvar[:, k]), color=colour, lw=1.2)
        axis.plot(z, base + prior, ":", color="black", lw=1.1)
    axis.set_yticks(bases, [f"{posterior.beta:.3g}" if k == 0 else "" for posterior in line])
    axis.set(xlim=(-reach, reach), ylim=(-0.03, bases[0] + 0.6))
    axis.grid(axis="y", alpha=0.3)


def draw_by_beta(axis: Axes, rows: Sequence[dict[str, Any]], families: Sequence[str]) -> None:
    for family, (colour, marker) in zip(families, STYLES, strict=False):
        chosen = [row for row in rows if row["family"] == family]
        betas = sorted({row["beta"] for row in chosen})
        axis.plot([r["beta"] for r in chosen], [r["kl"] for r in chosen], marker, color=colour, ms=3, alpha=0.35)
        middle = [np.mean([row["kl"] for row in chosen if row["beta"] == beta]) for beta in betas]
        axis.plot(betas, middle, marker + "-", color=colour, label=f"{family}: mean of all latents")
    axis.set(xscale="log", yscale="log", xlabel="β", ylabel="KL(q(z_k) ‖ N(0, 1)), nats")
    axis.legend(fontsize=9)
    axis.grid(alpha=0.2)


def draw_by_rate(axis: Axes, rows: Sequence[dict[str, Any]], families: Sequence[str]) -> None:
    """Each latent of each model: two families can be compared where their latents carry as much."""
    for family, (colour, marker) in zip(families, STYLES, strict=False):
        chosen = [row for row in rows if row["family"] == family]
        axis.plot([r["channel_rate"] for r in chosen], [r["kl"] for r in chosen], marker, color=colour, ms=4,
                  alpha=0.6, mew=0, label=family)  # fmt: skip
    axis.set(yscale="log", xlabel="rate of the latent, E KL(q(z_k|x) ‖ N(0, 1)), nats",
             ylabel="KL(q(z_k) ‖ N(0, 1)), nats")  # fmt: skip
    axis.legend(fontsize=9)
    axis.grid(alpha=0.2)
