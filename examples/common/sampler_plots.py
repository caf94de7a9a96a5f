"""The pictures of samplers.py, and what it prints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .plots import plt, tile  # pyplot, once it draws to files
from .samplers import in_order, name_of

KINDS = {"beta-input": "one VAE for every β", "separate": "one VAE for each β"}
STYLES = {  # Okabe and Ito's colours, which the colour-blind tell apart
    "prior": {"color": "#000000", "marker": "o"},
    "mixture": {"color": "#0072B2", "marker": "s"},
    "second-stage": {"color": "#D55E00", "marker": "D"},
    "conditioned": {"color": "#E69F00", "marker": "v"},
    "posteriors": {"color": "#777777", "marker": "x", "ls": "--"},
}
RECURSIONS = ("#56B4E9", "#009E73", "#CC79A7")


def three(betas: Sequence[float]) -> list[float]:
    """The smallest, the middle and the largest."""
    return [betas[0], betas[(len(betas) - 1) // 2], betas[-1]]


def mean(rows: Sequence[dict[str, Any]], kind: str, row: str, key: str) -> dict[float, float]:
    """Over the seeds, at each β."""
    own = [r for r in rows if (r["kind"], r["row"]) == (kind, row) and r[key] is not None]
    return {
        beta: float(np.mean([r[key] for r in own if r["beta"] == beta])) for beta in sorted({r["beta"] for r in own})
    }


def best_prior(rows: Sequence[dict[str, Any]], kind: str) -> tuple[float, float] | None:
    """(Fréchet distance, β) of N(0, I) where that is smallest."""
    found = mean(rows, kind, "prior", "frechet")
    return min((value, beta) for beta, value in found.items()) if found else None


def report(rows: Sequence[dict[str, Any]], real: float | None) -> None:
    """A table for each kind of model: Fréchet distance and 1000 MMD² at each β."""
    betas = sorted({row["beta"] for row in rows})
    for kind, title in KINDS.items():
        print(f"\n{title}: Fréchet distance, and 1000 MMD² of z, at β =\n{'':36}" + "".join(f"{b:>16g}" for b in betas))
        for row in in_order(r["row"] for r in rows if r["kind"] == kind):
            frechet, distance = (mean(rows, kind, row, key) for key in ("frechet", "mmd"))
            cells = [
                (f"{frechet[b]:7.1f}" if b in frechet else f"{'':7}") + f"{1000 * distance[b]:9.1f}"
                if b in distance else "" for b in betas
            ]  # fmt: skip
            print(f"{name_of(row):36}" + "".join(f"{cell:>16}" for cell in cells))
        if (best := best_prior(rows, kind)) is not None:
            print(f"the best β's plain prior: {best[0]:.1f} at β = {best[1]:g}")
    if real is not None:
        print(f"training images beside the same: {real:.1f}")


def plot(path: Path, rows: Sequence[dict[str, Any]], real: float | None, *, title: str) -> None:
    """Above the Fréchet distance, below MMD²; left the VAE that is told β, right those of one β. Dots are seeds."""
    keys = [("frechet", "Fréchet distance"), ("mmd", "MMD² of z from q(z)")]
    keys = keys if real is not None else keys[1:]
    betas = sorted({row["beta"] for row in rows})
    figure, axes = plt.subplots(
        len(keys), 2, figsize=(14, 4 * len(keys) + 0.5), layout="constrained", squeeze=False, sharey="row"
    )
    for line, (key, label) in zip(axes, keys, strict=True):
        for axis, (kind, name) in zip(line, KINDS.items(), strict=True):
            for row in in_order(r["row"] for r in rows if r["kind"] == kind):
                _line(axis, rows, kind, row, key)
            axis.set(xscale="log", xlabel="β", title=name)
            axis.set_xticks(betas, [f"{beta:g}" for beta in betas])
            axis.minorticks_off()
            axis.grid(alpha=0.2)
            if key == "frechet":
                assert real is not None
                axis.set_yscale("log")
                axis.axhline(real, color="0.6", lw=0.8, ls=":", label="training images")
                best = best_prior(rows, "separate")
                assert best is not None
                axis.axhline(best[0], color="black", lw=0.8, ls="-.", label=f"best VAE's N(0, I), β = {best[1]:g}")
            else:
                axis.set_yscale("symlog", linthresh=1e-2)
        line[0].set_ylabel(label)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", fontsize=9)
    figure.suptitle(title, fontsize=12)
    figure.savefig(path, dpi=85)
    plt.close(figure)


def _line(axis: Any, rows: Sequence[dict[str, Any]], kind: str, row: str, key: str) -> None:
    recursions = in_order(r["row"] for r in rows if r["row"].startswith("recursion"))
    style = STYLES.get(row) or {"color": RECURSIONS[recursions.index(row) % 3], "marker": "^", "ls": ":"}
    values = mean(rows, kind, row, key)
    axis.plot(list(values), list(values.values()), ms=5, lw=1.3, label=name_of(row), **style)
    own = [r for r in rows if (r["kind"], r["row"]) == (kind, row)]
    axis.plot([r["beta"] for r in own], [r[key] for r in own], ".", color=style["color"], ms=3, alpha=0.5)


def plot_samples(path: Path, pictures: Sequence[dict[str, Any]], *, title: str) -> None:
    """A line for each kind of model and row, a column for each β; blank where a row has nothing at that β."""
    lines = [(kind, row) for kind in KINDS for row in in_order(p["row"] for p in pictures if p["kind"] == kind)]
    betas = sorted({picture["beta"] for picture in pictures})
    found = {(p["kind"], p["row"], p["beta"]): p["samples"] for p in pictures}
    figure, axes = plt.subplots(
        len(lines), 1 + len(betas), figsize=(4.4 + 3.6 * len(betas), 0.5 * len(lines) + 0.8), layout="constrained",
        gridspec_kw={"width_ratios": [0.95, *[1] * len(betas)]},
    )  # fmt: skip
    for line, (kind, row) in zip(axes, lines, strict=True):
        for axis in line:
            axis.axis("off")
        line[0].text(0, 0.5, f"{KINDS[kind]}: {name_of(row)}", va="center", fontsize=9)
        for axis, beta in zip(line[1:], betas, strict=True):
            if (kind, row, beta) in found:
                samples = found[kind, row, beta]
                axis.imshow(tile(samples, len(samples)), interpolation="nearest")
    for axis, beta in zip(axes[0, 1:], betas, strict=True):
        axis.set_title(f"β = {beta:g}", fontsize=10)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=90)
    plt.close(figure)
