"""Does a VAE give each factor of the pictures a latent of its own? Four metrics, against beta and against the rate.

    python examples/disentanglement.py --quick     # five models
    python examples/disentanglement.py             # thirteen, of three seeds

The pictures are the 6144 of common/shapes.py, halved to 16x16: a shape, its scale, angle, and place. Three
families over beta: squared error + beta * rate (a constant sigma), the batch's optimal sigma with beta on the rate, and
the same with beta on the total correlation alone (beta-TCVAE). Beside them, one VAE that is told beta and serves all of
the second family's. common/factor_metrics.py says what the metrics are.

Ctrl-C keeps what is done; the same command with --resume continues it. In --out afterwards:

    disentanglement.png   the metrics over beta, and over the rate
    traversals.png        pictures along each latent, of each family's model with the largest MIG
    results.csv           a row for each model
    models/               one folder for each model trained
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import beta_input, cli, factor_metrics, readings, script, shapes
from common.at_beta import at
from common.beta_input import BetaInputObjective
from common.files import write_csv
from common.kl_plots import chosen, mean
from common.latents import decode, encode, rates
from common.plots import plt, tile
from common.sweep import MODELS, Run, load_finished, train_all
from common.tc_runs import (
    BATCH_SIZE,
    COLOURS,
    FAMILIES,
    QUICK_SHAPES_EPOCHS,
    SHAPES_BETAS,
    SHAPES_EPOCHS,
    make_run,
)
from common.training import Trainer
from torch import Tensor, nn

METRICS = {
    "mig": "MIG", "disentanglement": "DCI: disentanglement", "completeness": "DCI: completeness",
    "informativeness": "DCI: informativeness", "sap": "SAP", "factor_vae": "FactorVAE score",
}  # fmt: skip
TOLD = "beta-input"
LABELS = FAMILIES | {TOLD: "one VAE for every β on the rate"}
FAMILY_COLOURS = COLOURS | {TOLD: "#009E73"}
FULL = {"latent_dim": 10, "epochs": SHAPES_EPOCHS, "repeats": 3}
QUICK = {"latent_dim": 10, "epochs": QUICK_SHAPES_EPOCHS, "repeats": 1}
QUICK_BETAS = {"coupled": (0.3,), "decoupled": (2, 8), "tc": (16,)}
SIZES = list(shapes.FACTORS.values())
POINTS = {"train": 2000, "test": 1000, "votes": 4000}  # of the metrics that learn
QUICK_POINTS = {"train": 800, "test": 400, "votes": 1000}
STEPS, REACH = 9, 2.0  # of a traversal: from −REACH to REACH standard deviations of q(z_k)'s means
SHOWN = 6  # latents, those of the largest rates


def measure(trainer: Trainer, *, points: dict[str, int]) -> dict[str, Any]:
    """At each β of the model, one or several."""
    images, objective = trainer.images.test, trainer.objective
    if isinstance(objective, BetaInputObjective):
        found = beta_input.measure(objective, images, trainer.settings["beta"], draws=1, batch_size=BATCH_SIZE)
    else:
        found = [{"beta": trainer.settings["beta"], **readings.measure(trainer, images, draws=1)}]
    return {"points": [{"beta": row["beta"], **read(trainer, row, points)} for row in found]}


def read(trainer: Trainer, row: dict[str, Any], points: dict[str, int]) -> dict[str, Any]:
    dims = trainer.images.dims
    mu, _ = encode(at(trainer.objective, row["beta"]), trainer.images.test)
    return {
        "rate": row["rate"],
        "distortion": readings.distortion(row["sse"], dims, row["sse"] / dims),
        **factor_metrics.scores(mu.double().numpy(), shapes.factors().numpy(), SIZES, **points),
    }


def plot(path: Path, results: Sequence[dict[str, Any]]) -> None:
    """Above over β, below over the rate, which the families have in common. Means over the seeds, and each seed."""
    figure, axes = plt.subplots(2, len(METRICS), figsize=(19, 6.4), layout="constrained", sharey="col")
    for column, (key, label) in zip(axes.T, METRICS.items(), strict=True):
        for family, marker in zip(LABELS, "vsoD", strict=True):
            groups = chosen(results, family)
            seeds = [row for group in groups for row in group]
            style = {"color": FAMILY_COLOURS[family], "marker": marker, "ms": 4, "mfc": "none", "ls": ""}
            for axis, x in zip(column, ("beta", "rate"), strict=True):
                points = sorted((mean(group, x), mean(group, key)) for group in groups)
                axis.plot(*zip(*points, strict=True), color=FAMILY_COLOURS[family], label=LABELS[family])
                axis.plot([row[x] for row in seeds], [row[key] for row in seeds], **style)
        column[0].set(title=label, xlabel="β", xscale="log", ylim=(0, None))
        column[1].set(xlabel="rate, nats")
        for axis in column:
            axis.grid(alpha=0.25)
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=75)
    plt.close(figure)


def traversal(model: nn.Module, images: Tensor) -> tuple[np.ndarray, list[float]]:
    """A row of pictures for each of the latents with the largest rates, and these rates: one image's code with that
    latent moved."""
    mu, logvar = encode(model, images)
    rate = rates(mu, logvar)
    order = rate.argsort(descending=True)[:SHOWN]
    middle = int((mu - mu.mean(0)).square().sum(1).argmin())  # the image in the middle of the code
    z = mu[middle].repeat(len(order) * STEPS, 1)
    for i, k in enumerate(order.tolist()):
        z[i * STEPS : (i + 1) * STEPS, k] = mu[:, k].mean() + mu[:, k].std() * torch.linspace(-REACH, REACH, STEPS)
    side = round(images[0].numel() ** 0.5)
    return tile(decode(model, z).view(-1, 1, side, side), STEPS), rate[order].tolist()


def plot_traversals(path: Path, best: Sequence[tuple[dict[str, Any], Trainer]]) -> None:
    figure, axes = plt.subplots(1, len(best), figsize=(5.4 * len(best), 4.3), layout="constrained")
    for axis, (row, trainer) in zip(axes, best, strict=True):
        picture, nats = traversal(at(trainer.objective, row["beta"]), trainer.images.test)
        axis.imshow(picture, interpolation="nearest")
        height = picture.shape[0] / len(nats)
        axis.set_yticks([(i + 0.5) * height for i in range(len(nats))], [f"{value:.1f}" for value in nats])
        axis.set_xticks([])
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        axis.set_title(f"{LABELS[row['family']]}: β = {row['beta']:g}, MIG {row['mig']:.2f}", fontsize=11,
                       color=FAMILY_COLOURS[row["family"]])  # fmt: skip
    axes[0].set_ylabel("rate of the latent, nats")
    figure.savefig(path, dpi=75)
    plt.close(figure)


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: means over the seeds."""
    keys = {"rate": ".1f", "distortion": ".0f", **dict.fromkeys(METRICS, ".3f")}
    lines = ["| β | " + " | ".join(METRICS.get(key, key) for key in ("value", *keys)) + " |", "|---" * 10 + "|"]
    for family, label in LABELS.items():
        for group in chosen(results, family):
            cells = [f"{mean(group, key):{form}}" for key, form in keys.items()]
            lines.append(f"| {label} | {group[0]['beta']:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("experiment")
    group.add_argument("--latent-dim", type=cli.positive_int, metavar="K", help="(default: 10)")
    group.add_argument("--epochs", type=cli.positive_int, metavar="N", help="(default: 30; with --quick 10)")
    group.add_argument(
        "--repeats", type=cli.positive_int, metavar="N",
        help="of everything, with the seeds --seed, --seed + 1, … (default: 3; with --quick 1)",
    )  # fmt: skip
    cli.add_sweep_arguments(parser, out=Path("runs/disentanglement"), minutes="about nine minutes")
    args = parser.parse_args(argv)
    cli.settle(args, full=FULL, quick=QUICK)
    return args


def run(args: argparse.Namespace) -> None:
    images = shapes.population()
    measured = functools.partial(measure, points=QUICK_POINTS if args.quick else POINTS)
    betas = QUICK_BETAS if args.quick else SHAPES_BETAS
    models = [(family, beta) for family in FAMILIES for beta in betas[family]] + [(TOLD, betas["decoupled"])]
    runs = [
        make_run(args, "shapes", images, family, beta, seed, args.epochs, measured)
        for seed in range(args.seed, args.seed + args.repeats)
        for family, beta in models
    ]
    rows: list[dict[str, Any]] = []
    best: dict[str, tuple[dict[str, Any], Run]] = {}
    for model, found in zip(runs, train_all(runs, args.out, resume=args.resume), strict=True):
        points = found.pop("points")
        rows += [{**found, **point} for point in points]
        for row in rows[-len(points) :]:
            family = row["family"]
            if family not in best or row["mig"] > best[family][0]["mig"]:
                best[family] = row, model
    write_csv(args.out / "results.csv", rows)
    plot(args.out / "disentanglement.png", rows)
    plot_traversals(
        args.out / "traversals.png", [(row, load_finished(model, args.out)) for row, model in best.values()]
    )
    print(f"{table(rows)}\n\npictures and numbers are in {args.out}")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    return script.main(run, args, argv, MODELS)


if __name__ == "__main__":
    raise SystemExit(main())
