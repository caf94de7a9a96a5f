"""The picture of phase_diagram.py: models in the plane of rate and distortion, and what each lacks to the line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from torch import Tensor

from . import linear
from .plots import plt  # pyplot, once it draws to files

PRIOR, DECODER, LINE = "#0072B2", "#D55E00", "#222222"  # Okabe and Ito's
MARKERS = {"linear": "o", "affine": "s", "MLP": "o"}
EDGE = 0.06  # of the panel's height, left free below the line


class Panel(NamedTuple):
    """One set of data. `eigenvalues` and `latents` are those of the closed form that is drawn beside the models."""

    title: str
    entropy: float
    rows: Sequence[dict[str, Any]]
    eigenvalues: Tensor
    latents: int
    autoencoding: float | None  # the rate at which nothing is left to tell, where there is one


def means(rows: Sequence[dict[str, Any]], model: str) -> list[dict[str, float]]:
    """One for each β in ascending order: the seeds' means of what is a number."""
    chosen = [row for row in rows if row["model"] == model]
    return [
        {
            key: float(np.mean([row[key] for row in chosen if row["beta"] == beta]))
            for key, value in chosen[0].items()
            if isinstance(value, int | float)
        }
        for beta in sorted({row["beta"] for row in chosen})
    ]


def models_of(rows: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["model"] for row in rows))


def draw(path: Path, panels: Sequence[Panel]) -> None:
    figure, axes = plt.subplots(2, len(panels), figsize=(5.2 * len(panels), 9), layout="constrained",
                                height_ratios=(1.25, 1))  # fmt: skip
    for column, panel in zip(axes.T, panels, strict=True):
        draw_plane(column[0], panel)
        draw_gaps(column[1], panel)
    axes[0, 0].set_ylabel("distortion D, nats")
    axes[1, 0].set_ylabel("R + D − H, nats")
    entries = {
        name: handle for axis in axes.flat for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=4, fontsize=10, frameon=False)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def draw_plane(axis: Axes, panel: Panel) -> None:
    """From each model its two legs, which end on the line: left by the prior's, down by the decoder's."""
    _closed_form(axis, panel)
    for model in models_of(panel.rows):
        for row in means(panel.rows, model):
            rate, distortion = row["rate"], row["distortion"]
            information = rate - (row["prior_low"] + row["prior_high"]) / 2
            axis.plot([rate, information], [distortion] * 2, color=PRIOR, lw=2.2, solid_capstyle="butt")
            axis.plot([information] * 2, [distortion, panel.entropy - information], color=DECODER, lw=2.2,
                      solid_capstyle="butt", zorder=1)  # fmt: skip
            axis.annotate(f"{row['beta']:g}", (rate, distortion), (6, 5), textcoords="offset points", fontsize=9)
        chosen = [row for row in panel.rows if row["model"] == model]
        axis.plot([row["rate"] for row in chosen], [row["distortion"] for row in chosen], ls="", ms=6, **_style(model),
                  label=f"{model} VAEs, with their β")  # fmt: skip
    right = max(row["rate"] for row in panel.rows) * 1.12
    top = max(max(row["distortion"] for row in panel.rows), panel.entropy)
    low = panel.entropy - right
    height = top - low
    axis.plot([0, right], [panel.entropy, low], color=LINE, lw=1.6, label="R + D = H")
    axis.fill_between([0, right], [panel.entropy, low], low - height, color="0.88", zorder=0)
    axis.text(0.03, 0.03, "R + D < H: no model\nof these data is here", transform=axis.transAxes, fontsize=9,
              color="0.35", va="bottom")  # fmt: skip
    axis.plot(0, panel.entropy, "*", color=LINE, ms=13, mfc="white", clip_on=False, label="autodecoding: R = 0, D = H")
    if panel.autoencoding is not None:
        axis.plot(panel.autoencoding, panel.entropy - panel.autoencoding, "P", color=LINE, ms=10, mfc="white",
                  label="autoencoding: R = log N")  # fmt: skip
    axis.set(xlim=(0, right), ylim=(low - EDGE * height, top + EDGE * height), title=panel.title,
             xlabel="rate R, nats")  # fmt: skip


def draw_gaps(axis: Axes, panel: Panel) -> None:
    """The legs on one another, and above them what was measured, which knows nothing of them."""
    models = models_of(panel.rows)
    betas = sorted({row["beta"] for row in panel.rows})
    width = 0.7 / len(models)
    for i, model in enumerate(models):
        found = means(panel.rows, model)
        x = np.array([betas.index(row["beta"]) for row in found]) + (i - (len(models) - 1) / 2) * width
        decoder, prior, gap, error = (
            np.array([row[key] for row in found]) for key in ("decoder_low", "prior_low", "gap", "gap_error")
        )
        between = np.array([row["prior_high"] - row["prior_low"] for row in found])
        axis.bar(x, decoder, width * 0.9, color=DECODER, label="decoder’s leg: KL(q(x|z) ‖ p(x|z))")
        if (between > 0).any():
            axis.bar(x, between, width * 0.9, bottom=decoder, color="0.8", hatch="///", edgecolor="0.55", lw=0,
                     label="of the one or of the other leg: I lies between bounds")  # fmt: skip
        axis.bar(x, prior, width * 0.9, bottom=decoder + between, color=PRIOR, label="prior’s leg: KL(q(z) ‖ p(z))")
        axis.errorbar(x, gap, 3 * error, ls="", ms=5, capsize=3, elinewidth=1, **_style(model),
                      label="R + D − H, measured ± 3 standard errors" if i == 0 else None)  # fmt: skip
    if models == ["linear"]:
        exact = [linear.gap(panel.eigenvalues, panel.latents, beta) for beta in betas]
        axis.plot(range(len(betas)), exact, "_", color=LINE, ms=34, mew=1.6, label="R + D − H, closed form")
    axis.set_xticks(range(len(betas)), [f"{beta:g}" for beta in betas])
    axis.set_xlabel("β")
    if len(models) > 1:
        axis.set_title(f"at each β: {', '.join(models)}", fontsize=10)
    axis.axhline(0, color=LINE, lw=1)
    axis.grid(axis="y", alpha=0.25)
    axis.set_axisbelow(True)


def _style(model: str) -> dict[str, Any]:
    return {"marker": MARKERS[model], "color": LINE, "mfc": "white" if model == "affine" else LINE}


def _closed_form(axis: Axes, panel: Panel) -> None:
    """The curve of all linear VAEs with the optimal σ, from the smallest β to the β of collapse."""
    smallest = min(row["beta"] for row in panel.rows)
    betas = np.geomspace(smallest, linear.switches_off(panel.eigenvalues, 0), 300)
    exact = [linear.optimum(panel.eigenvalues, panel.latents, float(beta)) for beta in betas]
    axis.plot([o.rate for o in exact], [o.distortion for o in exact], color="0.45", lw=1.2, zorder=0.5,
              label="best linear VAEs, closed form")  # fmt: skip
