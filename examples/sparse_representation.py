"""A VAE keeps the latents that it needs and no more: when, why, and what that is good for.

    python examples/sparse_representation.py --quick     # digits of 8x8
    python examples/sparse_representation.py             # MNIST-5k

Five experiments in one picture: (a) how many latents stay active, against beta with the optimal sigma and against a
constant sigma at beta = 1; (b) twice the rate is about −r log gamma on a manifold of r dimensions; (c) pruning latents
that are not active changes nothing; (d) autoencoders with penalties of bounded gradient, which are accurate or sparse;
(e) points beside a curve in the plane, and how far a VAE and PCA with one dimension each put outliers from it.

Ctrl-C keeps what is done; the same command with --resume continues it. In --out afterwards:

    sparse_representation.png   the picture
    results.csv                 a row for each model trained
    pruning.csv                 reconstruction and generation after each pruned latent
    outliers.csv                AUROC of the reconstruction error, VAE and PCA
    models/                     one folder for each model trained
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from common import cli, script
from common.data import Images, load
from common.files import write_csv
from common.latents import decode, encode
from common.mmd import check_enough
from common.sparse_runs import SUBSPACE, image_run, parabola_run, penalty_run, pruning_curve, rate_run
from common.sweep import MODELS, Run, load_finished, train_all
from matplotlib.axes import Axes
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score
from torch import Tensor

BLUE, GREEN, YELLOW, RED = "#332288", "#117733", "#DDAA33", "#CC3311"
FULL = {"data": "mnist", "latent_dim": 32, "length": 1.0}
QUICK = {"data": "digits", "latent_dim": 16, "length": 0.5}
BETAS, QUICK_BETAS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0), (0.25, 1.0, 4.0, 16.0)
SIGMAS, QUICK_SIGMAS = ("0.05", "0.1", "0.15", "0.2", "0.3", "0.5", "0.7", "1.0"), ("0.05", "0.15", "0.3", "1.0")
INTRINSIC, QUICK_INTRINSIC = (2, 4), (3,)
NOISES, QUICK_NOISES = (0.03, 0.01, 0.003, 0.001, 0.0003), (0.03, 0.01, 0.003)
WIDTHS = {None: ("|z|", RED), 1.0: ("z² / (1 + z²)", YELLOW), 0.1: ("z² / (0.1² + z²)", GREEN)}
WEIGHTS, QUICK_WEIGHTS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0), (0.003, 0.03, 0.3)
SPAN, OUTLIERS = ((-2.0, 2.0), (-1.3, 2.1)), 500  # of the plane, and how many points all over it


def all_runs(args: argparse.Namespace, images: Images) -> list[Run]:
    quick = args.quick
    runs = [image_run(args, images, beta=beta, sigma="optimal") for beta in (QUICK_BETAS if quick else BETAS)]
    runs += [image_run(args, images, beta=1.0, sigma=sigma) for sigma in (QUICK_SIGMAS if quick else SIGMAS)]
    for intrinsic in QUICK_INTRINSIC if quick else INTRINSIC:
        runs += [rate_run(args, intrinsic=intrinsic, noise=noise) for noise in (QUICK_NOISES if quick else NOISES)]
    runs.append(penalty_run(args, kind="vae", weight=1.0, width=None))
    for width in WIDTHS:
        weights = QUICK_WEIGHTS if quick else WEIGHTS
        runs += [penalty_run(args, kind="penalty", weight=weight, width=width) for weight in weights]
    return [*runs, parabola_run(args)]


def to_prune(results: Sequence[dict[str, Any]]) -> int:
    """Index of the model with the optimal sigma of whose latents nearest to half are active."""
    optimal = [i for i, row in enumerate(results) if row.get("sigma_mode") == "optimal"]
    return min(optimal, key=lambda i: abs(results[i]["active"] - results[i]["latent_dim"] / 2))


def slope(rows: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """(slope, intercept) of the line through twice the rate against −log gamma, by least squares."""
    gradient, intercept = np.polyfit([-np.log(row["gamma"]) for row in rows], [2 * row["rate"] for row in rows], 1)
    return float(gradient), float(intercept)


def sparsest(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that keep the fewest latents: the relation has their number, r̂, and a spare latent adds its own rate."""
    fewest = min(row["active"] for row in rows)
    return [row for row in rows if row["active"] == fewest]


class Outliers:
    """Squared distances of points from their reconstructions, by a VAE of a curve and by PCA with one axis."""

    def __init__(self, model: torch.nn.Module, train: Tensor, inliers: Tensor, seed: int) -> None:
        self.model, self.inliers = model, inliers
        self.pca = PCA(1).fit(train.numpy())
        low, high = torch.tensor(SPAN).T
        generator = torch.Generator().manual_seed(seed)
        self.outliers = low + (high - low) * torch.rand(OUTLIERS, 2, generator=generator)

    def scores(self, points: Tensor) -> dict[str, np.ndarray]:
        vae = decode(self.model, encode(self.model, points)[0])
        pca = self.pca.inverse_transform(self.pca.transform(points.numpy()))
        return {
            "vae": (vae - points).square().sum(1).numpy(),
            "pca": np.square(pca - points.numpy()).sum(1),
        }

    def aurocs(self) -> dict[str, float]:
        truth = [0] * len(self.inliers) + [1] * OUTLIERS
        scores = self.scores(torch.cat([self.inliers, self.outliers]))
        return {name: float(roc_auc_score(truth, score)) for name, score in scores.items()}


def draw_active(axis: Axes, rows: Sequence[dict[str, Any]]) -> None:
    optimal = [row for row in rows if row["sigma_mode"] == "optimal"]
    constant = [row for row in rows if row["sigma_mode"] != "optimal"]
    axis.plot([r["beta"] for r in optimal], [r["active"] for r in optimal], "o-", color=BLUE)
    axis.set(xscale="log", ylabel=f"active latents of {rows[0]['latent_dim']}", ylim=(-0.5, rows[0]["latent_dim"] + 1))
    axis.set_xlabel("β, with the optimal σ", color=BLUE)
    above = axis.twiny()
    above.plot([float(r["sigma_mode"]) for r in constant], [r["active"] for r in constant], "s--", color=RED)
    above.set_xscale("log")
    above.set_xlabel("constant σ, with β = 1", color=RED)
    axis.set_title("(a) latents that stay active", pad=38)


def draw_rates(axis: Axes, rows: Sequence[dict[str, Any]]) -> None:
    for intrinsic, colour in zip(sorted({row["intrinsic"] for row in rows}), (BLUE, GREEN), strict=False):
        points = [row for row in rows if row["intrinsic"] == intrinsic]
        gradient, intercept = slope(sparsest(points))
        x = np.array([-np.log(row["gamma"]) for row in points])
        axis.plot(x, gradient * x + intercept, color=colour, label=f"r = {intrinsic}: slope {gradient:.2f}")
        for row, position in zip(points, x, strict=True):
            filled = colour if row in sparsest(points) else "white"
            axis.plot(position, 2 * row["rate"], "o", color=colour, markerfacecolor=filled)
            if filled == "white":
                axis.annotate(f"{row['active']} active", (position, 2 * row["rate"]), (-8, 0), ha="right", va="center",
                              textcoords="offset points", fontsize=9)  # fmt: skip
    axis.set(title="(b) 2 × rate ≈ −r log γ", xlabel="−log γ, γ learned", ylabel="2 × rate, nats")
    axis.legend()


def draw_pruning(axis: Axes, curve: Sequence[dict[str, float]], row: dict[str, Any]) -> None:
    for key, label, style, colour in (
        ("mse", "reconstruction error", "o-", BLUE),
        ("mmd", "MMD of samples from images", "s--", RED),
    ):
        values = [point[key] / curve[0][key] for point in curve]
        axis.plot([point["pruned"] for point in curve], values, style, color=colour, markersize=4, label=label)
    axis.axvline(curve[-1]["pruned"] - row["active"], color="grey", linewidth=1)
    axis.set(ylabel="ratio to nothing pruned", title=f"(c) pruning at β = {row['beta']:g}")
    axis.set_yscale("log", base=2)
    axis.yaxis.set_major_formatter("{x:g}")
    axis.set_xlabel(f"latents pruned (the last {row['active']} are active)")
    axis.legend()


def draw_penalties(axis: Axes, rows: Sequence[dict[str, Any]]) -> None:
    for width, (label, colour) in WIDTHS.items():
        points = [row for row in rows if row["kind"] == "penalty" and row["width"] == width]
        axis.plot([r["error"] for r in points], [r["used"] for r in points], "o-", color=colour, label=label, alpha=0.8)
    vae = next(row for row in rows if row["kind"] == "vae")
    axis.plot(vae["error"], vae["used"], "*", color=BLUE, markersize=16, label="VAE, γ learned")
    axis.axhline(SUBSPACE, color="grey", linewidth=1)
    axis.set(xscale="log", xlabel="reconstruction error, as a part of the variance", ylabel="latents in use",
             title=f"(d) bounded penalties on {SUBSPACE}-dimensional data")  # fmt: skip
    axis.legend(fontsize=8)


def draw_plane(axis: Axes, outliers: Outliers, method: str, title: str) -> Any:
    (left, right), (low, high) = SPAN
    x, y = np.meshgrid(np.linspace(left, right, 161), np.linspace(low, high, 137))
    grid = torch.from_numpy(np.stack([x.ravel(), y.ravel()], 1)).float()
    distance = np.sqrt(outliers.scores(grid)[method]).reshape(x.shape)
    shown = axis.contourf(x, y, distance, levels=np.linspace(0, 1.2, 13), cmap="viridis_r", extend="max")
    axis.plot(*outliers.inliers[:300].T, ".", color="black", markersize=2, label="inliers")
    axis.plot(*outliers.outliers[:150].T, "x", color=RED, markersize=3, label="outliers")
    axis.set(title=title, xlim=SPAN[0], ylim=SPAN[1], xlabel="x₁", ylabel="x₂")
    return shown


def draw(
    path: Path,
    results: Sequence[dict[str, Any]],
    pruning: tuple[Sequence[dict[str, float]], dict[str, Any]],
    outliers: Outliers,
    aurocs: dict[str, float],
) -> None:
    parts = {part: [row for row in results if row["part"] == part] for part in ("images", "rate", "penalty")}
    figure, axes = plt.subplots(2, 3, figsize=(14, 8), layout="constrained")
    draw_active(axes[0, 0], parts["images"])
    draw_rates(axes[0, 1], parts["rate"])
    draw_pruning(axes[0, 2], *pruning)
    draw_penalties(axes[1, 0], parts["penalty"])
    draw_plane(axes[1, 1], outliers, "pca", f"(e) PCA, one axis: AUROC {aurocs['pca']:.2f}")
    active = results[-1]["active"]
    shown = draw_plane(axes[1, 2], outliers, "vae", f"VAE, {active} of 2 latents active: AUROC {aurocs['vae']:.2f}")
    axes[1, 1].legend(fontsize=8, loc="upper center")
    figure.colorbar(shown, ax=axes[1, 2], label="distance from the reconstruction")
    figure.savefig(path, dpi=90)
    plt.close(figure)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_data_arguments(parser, quick="digits")
    group = parser.add_argument_group("experiment")
    group.add_argument("--latent-dim", type=cli.positive_int, metavar="K", help="of (a) and (c) (default: 32; with "
                       "--quick 16)")  # fmt: skip
    group.add_argument("--length", type=cli.number(above=0), metavar="F", help="of every training, beside the full "
                       "one (default: 1; with --quick 0.5)")  # fmt: skip
    cli.add_sweep_arguments(parser, out=Path("runs/sparse_representation"), minutes="three minutes")
    args = parser.parse_args(argv)
    cli.settle(args, full=FULL, quick=QUICK)
    return args


def run(args: argparse.Namespace) -> None:
    images = load(args.data, image_size=args.image_size, grey=args.grey)
    check_enough(images, args.data)
    runs = all_runs(args, images)
    results = train_all(runs, args.out, resume=args.resume)
    on_plane = load_finished(runs[-1], args.out)
    outliers = Outliers(on_plane.objective.model, on_plane.images.train, on_plane.images.test, args.seed)
    aurocs = outliers.aurocs()

    write_csv(args.out / "results.csv", results)
    half = to_prune(results)
    curve = pruning_curve(load_finished(runs[half], args.out))
    write_csv(args.out / "pruning.csv", curve)
    write_csv(args.out / "outliers.csv", [{"method": name, "auroc": value} for name, value in aurocs.items()])
    draw(args.out / "sparse_representation.png", results, (curve, results[half]), outliers, aurocs)
    report(results, aurocs)
    print(f"picture and numbers are in {args.out}")


def report(results: Sequence[dict[str, Any]], aurocs: dict[str, float]) -> None:
    for row in results:
        if row["part"] == "images":
            print(
                f"sigma {row['sigma_mode']}, beta {row['beta']:g}: {row['active']} active, rate {row['rate']:.1f} nats"
            )
        if row["part"] == "penalty":
            name = "VAE" if row["kind"] == "vae" else f"{WIDTHS[row['width']][0]} x {row['weight']:g}"
            print(f"{name}: error {row['error']:.2g} of the variance, {row['used']} latents in use")
    for intrinsic in sorted({row["intrinsic"] for row in results if row["part"] == "rate"}):
        gradient, _ = slope(sparsest([row for row in results if row.get("intrinsic") == intrinsic]))
        print(f"2 x rate against -log gamma: slope {gradient:.2f} on data of {intrinsic} dimensions")
    kept = results[-1]["active"]
    print(f"outliers: AUROC {aurocs['vae']:.3f} (VAE, {kept} of 2 latents active), {aurocs['pca']:.3f} (PCA, one axis)")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    return script.main(run, args, argv, MODELS)


if __name__ == "__main__":
    raise SystemExit(main())
