"""The figure of kl_decomposition.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from .plots import plt  # pyplot, once it draws to files
from .tc_runs import COLOURS, FAMILIES

Rows = Sequence[dict[str, Any]]
PARTS = {"mi": ("MI", "#0072B2"), "tc": ("TC", "#E69F00"), "dim_wise": ("dimension-wise KL", "#009E73")}
TERMS = {
    "likelihood": ("① E log p(x|z)/p(x)", "#D55E00"),
    "information": ("② MI", "#0072B2"),
    "data": ("③ KL(q(x) ‖ p(x))", "#999999"),
    "prior": ("④ KL(q(z) ‖ p(z))", "#009E73"),
}


def plot(path: Path, rows: Rows, terms: Rows) -> None:
    figure, axes = plt.subplots(3, 4, figsize=(17, 12), layout="constrained", width_ratios=[1, 1, 1, 1.25])
    names = list(dict.fromkeys(row["data"] for row in rows))
    for line, name in zip(axes, names, strict=False):
        here = [row for row in rows if row["data"] == name]
        top = 1.06 * max(row["rate"] for row in here)
        for axis, family in zip(line, FAMILIES, strict=False):
            stacked(axis, chosen(here, family), math.log(here[0]["data_shape"][0]), top)
            axis.set_title(f"{name}: {FAMILIES[family]}", fontsize=10.5)
        line[0].set_ylabel("rate, nats")
        costs(line[3], here)
        line[3].set_title(f"{name}: what a smaller TC costs", fontsize=10.5)
    bracket(axes[2, 0], rows)
    channels(axes[2, 1], rows)
    exact_terms(axes[2, 2], [row for row in terms if row["model"] == "linear"])
    read_terms(axes[2, 3], [row for row in terms if row["model"] == "decoupled"])
    figure.savefig(path, dpi=80)
    plt.close(figure)


def chosen(rows: Rows, family: str) -> list[list[dict[str, Any]]]:
    """One family's rows, a list of the seeds' for each β in ascending order."""
    betas = sorted({row["beta"] for row in rows if row["family"] == family})
    return [[row for row in rows if (row["family"], row["beta"]) == (family, beta)] for beta in betas]


def mean(rows: Rows, key: str) -> float:
    return float(np.mean([row[key] for row in rows]))


def stacked(axis: Axes, groups: Sequence[Rows], most: float, top: float) -> None:
    ticks = range(len(groups))
    base = np.zeros(len(groups))
    for key, (label, colour) in PARTS.items():
        heights = np.array([mean(rows, key) for rows in groups])
        axis.bar(ticks, heights, bottom=base, color=colour, width=0.75, label=label)
        base += heights
    axis.axhline(most, color="black", lw=1, ls="--", label=f"log N = {most:.2f}")
    axis.set_xticks(ticks, [f"{rows[0]['beta']:g}" for rows in groups])
    axis.set(xlabel="β", ylim=(0, top))
    axis.legend(fontsize=8)


def costs(axis: Axes, rows: Rows) -> None:
    for family, marker in zip(FAMILIES, "vso", strict=True):
        groups = chosen(rows, family)
        tc, distortion = ([mean(group, key) for group in groups] for key in ("tc", "distortion"))
        axis.plot(tc, distortion, marker=marker, color=COLOURS[family], label=FAMILIES[family], ms=5)
        for group, x, y in zip(groups, tc, distortion, strict=True):
            axis.annotate(f"{group[0]['beta']:g}", (x, y), (5, 4), textcoords="offset points", fontsize=8,
                          color=COLOURS[family])  # fmt: skip
    axis.set(xlabel="TC, nats", ylabel="distortion at the optimal σ, nats")
    axis.set_xscale("symlog", linthresh=0.1)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8)


def bracket(axis: Axes, rows: Rows) -> None:
    """MI with the own component and without it, against the rate; the family with β on the rate, σ optimal."""
    for name, colour in zip(dict.fromkeys(row["data"] for row in rows), ("#0072B2", "#CC79A7"), strict=False):
        groups = chosen([row for row in rows if row["data"] == name], "decoupled")
        rate, low, high = ([mean(group, key) for group in groups] for key in ("rate", "mi", "mi_upper"))
        axis.plot(rate, low, "o-", color=colour, label=f"{name}: own component in")
        axis.plot(rate, high, "o--", mfc="white", color=colour, label=f"{name}: own left out")
        axis.fill_between(rate, low, high, color=colour, alpha=0.12)
        axis.axhline(math.log(groups[0][0]["data_shape"][0]), color=colour, lw=0.8, ls=":")
    axis.set(xlabel="rate, nats", ylabel="MI, nats", yscale="log", title="MI from below and above; dotted: log N")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.legend(fontsize=8)


def channels(axis: Axes, rows: Rows) -> None:
    """Per latent, of the shapes."""
    name = rows[0]["data"]
    for family, marker, shift in (("decoupled", "s", 0.96), ("tc", "o", 1.04)):
        for group in chosen([row for row in rows if row["data"] == name], family):
            for row in group:
                x = [shift * row["beta"]] * len(row["channels"])
                axis.plot(x, np.maximum(row["channels"], 1e-6), marker, color=COLOURS[family], ms=3.5, mfc="none")
        axis.plot([], [], marker, color=COLOURS[family], mfc="none", label=FAMILIES[family])
    axis.set(xscale="log", yscale="log", xlabel="β", ylabel="nats", title=f"{name}: KL(q(z_k) ‖ N(0, 1)), each latent")
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.legend(fontsize=8)


def exact_terms(axis: Axes, terms: Rows) -> None:
    beta = [row["beta"] for row in terms]
    for key, (label, colour) in TERMS.items():
        axis.plot(beta, [row[key] for row in terms], color=colour, lw=2, label=label)
    axis.set(xlabel="β", ylabel="nats", title="the four terms, exactly: linear VAEs")
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.legend(fontsize=8)


def read_terms(axis: Axes, terms: Rows) -> None:
    """Of the shapes, σ optimal: ② and ④ as they are read, ① as two bounds. ③ needs H, which no density of 8-bit images
    has."""
    betas = sorted({row["beta"] for row in terms})
    samples = sorted({row["samples"] for row in terms})

    def curve(key: str, count: int) -> list[float]:
        return [mean([r for r in terms if (r["beta"], r["samples"]) == (beta, count)], key) for beta in betas]

    for key in ("information", "prior"):
        axis.plot(betas, curve(key, samples[0]), "o-", color=TERMS[key][1], label=TERMS[key][0])
    for count, style in zip(samples, (":", "--"), strict=True):
        axis.plot(betas, curve("likelihood", count), "v", ls=style, color=TERMS["likelihood"][1], mfc="none",
                  label=f"① at most, {count} samples")  # fmt: skip
    rate = np.add(curve("information", samples[0]), curve("prior", samples[0]))
    axis.plot(betas, rate, color="black", lw=1, label="② + ④ = rate, and ① at most")
    axis.set(xlabel="β", ylabel="nats", title="what can be read of them: shapes, σ optimal")
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.legend(fontsize=8)
