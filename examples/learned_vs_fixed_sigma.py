"""gamma = sigma² learned, against gamma fixed from the start at the value that learning ends with.

    python examples/learned_vs_fixed_sigma.py --quick     # digits of 8x8
    python examples/learned_vs_fixed_sigma.py             # MNIST-5k
    python examples/learned_vs_fixed_sigma.py --data photos/ --image-size 64 --latent-dim 64

At the end both minimise the same function. Each model is trained from the same weights: with gamma learned from 1 on,
with gamma in closed form (the MSE of each batch), and with gamma fixed at the learned one's final value. They are told
apart by reconstruction error and by MMD, the distance of the aggregate posterior q(z) from the prior N(0, I).

Ctrl-C keeps what is done; the same command with --resume continues it. In --out afterwards:

    learned_vs_fixed_sigma.png   samples from the prior, and gamma and MMD over training
    results.csv                  a row of numbers for each model, on the test split
    curves.csv                   gamma, MMD and loss after each epoch, on the validation split
    models/                      one folder for each model trained
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from common import cli, script
from common.data import Images, load, to_unit
from common.files import write_csv
from common.latents import active, decode, draw, encode, prior
from common.mmd import check_enough, mmd
from common.objective import VAEObjective, make_objective
from common.plots import tile
from common.sweep import MODELS, Run, load_finished, train_all
from common.training import Trainer
from torch import Tensor, nn

KINDS = {"learned": "γ learned", "optimal": "γ = MSE of the batch", "fixed": "γ fixed from the start"}
COLOURS = {"learned": "#332288", "optimal": "#DDAA33", "fixed": "#CC3311"}
COLUMNS = {  # of the table: key, heading, format
    "gamma": ("γ", ".5f"),
    "sse": ("SSE at the mean", ".3f"),
    "sse_sampled": ("SSE at a sample", ".3f"),
    "rate": ("rate, nats", ".2f"),
    "loss": ("−ELBO, nats", ".2f"),
    "mmd": ("MMD × 1000", ".1f"),
    "active": ("active latents", ".1f"),
}
PRIOR_DRAWS = 2000  # that q(z) is compared with
SAMPLES = (4, 10)  # rows and columns of samples in the picture
FULL = {"data": "mnist", "latent_dim": 32, "epochs": 20, "repeats": 3}
QUICK = {"data": "digits", "latent_dim": 16, "epochs": 20, "repeats": 2}


def distance_to_prior(model: nn.Module, images: Tensor) -> float:
    """MMD of the aggregate posterior, one z for each image, from the prior."""
    mu, logvar = encode(model, images)
    return mmd(draw(mu, logvar), prior(PRIOR_DRAWS, mu.shape[1], seed=1))


def measure(trainer: Trainer) -> dict[str, Any]:
    objective, test = trainer.objective, trainer.images.test
    assert isinstance(objective, VAEObjective)
    mu, logvar = encode(objective.model, test)
    numbers = trainer.evaluate(test)

    def sse(z: Tensor) -> float:
        return float((decode(objective.model, z) - to_unit(test)).square().flatten(1).sum(1).mean())

    return {
        "gamma": numbers["sigma"] ** 2,
        "sse": sse(mu),
        "sse_sampled": sse(draw(mu, logvar)),
        **{key: numbers[key] for key in ("loss", "distortion", "rate")},
        "mmd": 1000 * distance_to_prior(objective.model, test),
        "active": int(active(logvar).sum()),
        "curve": [
            {"epoch": e["epoch"], "gamma": e["val"]["sigma"] ** 2, "loss": e["val"]["loss"], "mmd": e["probe"]["mmd"]}
            for e in trainer.history
        ],
    }


def make_run(args: argparse.Namespace, images: Images, kind: str, seed: int, gamma: float | None = None) -> Run:
    """One model; `gamma` only where it is fixed."""
    settings = {
        "kind": kind, "seed": seed, "fixed_gamma": gamma, "data": args.data, "epochs": args.epochs,
        "latent_dim": args.latent_dim, "width": args.width, "batch_size": args.batch_size, "lr": args.lr,
        "data_shape": [len(images.train), *images.shape],
    }  # fmt: skip

    def probe(objective: nn.Module) -> dict[str, float]:
        assert isinstance(objective, VAEObjective)
        return {"mmd": 1000 * distance_to_prior(objective.model, images.val)}

    def build(checkpoint: Path, settings: dict[str, Any]) -> Trainer:
        torch.manual_seed(seed)
        mode = kind if gamma is None else str(math.sqrt(gamma))
        objective = make_objective(images.shape, mode, 1.0, latent_dim=args.latent_dim, width=args.width)
        return Trainer(
            objective, images, epochs=args.epochs, batch_size=args.batch_size, lr=args.lr, seed=seed,
            device=args.device, checkpoint=checkpoint, settings=settings, probe=probe,
        )  # fmt: skip

    return Run(f"{kind}-{seed}", settings, build, measure)


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: mean ± standard deviation over the seeds."""
    lines = ["| | " + " | ".join(heading for heading, _ in COLUMNS.values()) + " |", "|---" * (1 + len(COLUMNS)) + "|"]
    for kind, label in KINDS.items():
        cells = []
        for key, (_, form) in COLUMNS.items():
            values = [row[key] for row in results if row["kind"] == kind]
            spread = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):{form}}{spread}")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(path: Path, samples: dict[str, Tensor], results: Sequence[dict[str, Any]]) -> None:
    figure = plt.figure(figsize=(13, 6), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=[1.35, 1])
    for i, kind in enumerate(samples):
        mean = {key: statistics.mean(row[key] for row in results if row["kind"] == kind) for key in ("sse", "mmd")}
        axis = figure.add_subplot(grid[i, 0])
        axis.imshow(tile(samples[kind], SAMPLES[1]), interpolation="nearest")
        axis.set_title(
            f"{KINDS[kind]}: reconstruction error {mean['sse']:.2f}, MMD {mean['mmd']:.0f}; samples from the prior",
            loc="left", fontsize=10, color=COLOURS[kind],
        )  # fmt: skip
        axis.axis("off")
    for i, (key, label) in enumerate((("gamma", "γ = σ²"), ("mmd", "MMD × 1000 of q(z) from N(0, I)"))):
        axis = figure.add_subplot(grid[i, 1])
        for kind, text in KINDS.items():
            for n, row in enumerate(row for row in results if row["kind"] == kind):
                epochs, values = zip(*((point["epoch"], point[key]) for point in row["curve"]), strict=True)
                axis.plot(epochs, values, color=COLOURS[kind], linewidth=1.2, label=None if n else text)
        axis.set(ylabel=label, xlabel="epoch", yscale="log")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=9)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_data_arguments(parser, quick="digits")
    group = parser.add_argument_group("experiment")
    group.add_argument("--latent-dim", type=cli.positive_int, metavar="K", help="(default: 32; with --quick 16)")
    group.add_argument("--epochs", type=cli.positive_int, metavar="N", help="(default: 20)")
    group.add_argument(
        "--repeats", type=cli.positive_int, metavar="N",
        help="of everything, with the seeds --seed, --seed + 1, … (default: 3; with --quick 2)",
    )  # fmt: skip
    group.add_argument("--width", type=cli.positive_int, default=16, metavar="W", help="(default: %(default)s)")
    group.add_argument("--batch-size", type=cli.positive_int, default=64, metavar="N", help="(default: %(default)s)")
    group.add_argument("--lr", type=cli.number(above=0), default=2e-3, metavar="LR", help="(default: %(default)s)")
    cli.add_sweep_arguments(parser, out=Path("runs/learned_vs_fixed_sigma"), minutes="five minutes")
    args = parser.parse_args(argv)
    cli.settle(args, full=FULL, quick=QUICK)
    return args


def run(args: argparse.Namespace) -> None:
    images = load(args.data, image_size=args.image_size, grey=args.grey)
    check_enough(images, args.data)
    seeds = range(args.seed, args.seed + args.repeats)
    runs = [make_run(args, images, kind, seed) for seed in seeds for kind in ("learned", "optimal")]
    results = train_all(runs, args.out, resume=args.resume)
    learned = {row["seed"]: row["gamma"] for row in results if row["kind"] == "learned"}
    fixed = [make_run(args, images, "fixed", seed, learned[seed]) for seed in seeds]
    results += train_all(fixed, args.out, resume=True)  # beside the models of the first call

    write_csv(args.out / "results.csv", [{k: v for k, v in row.items() if k != "curve"} for row in results])
    points = [{"kind": row["kind"], "seed": row["seed"], **point} for row in results for point in row["curve"]]
    write_csv(args.out / "curves.csv", points)
    z = prior(SAMPLES[0] * SAMPLES[1], args.latent_dim)
    samples = {r.settings["kind"]: decode(load_finished(r, args.out).objective.model, z) for r in (runs[0], fixed[0])}
    plot(args.out / "learned_vs_fixed_sigma.png", samples, results)
    print(f"{table(results)}\n\npicture and numbers are in {args.out}")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    return script.main(run, args, argv, MODELS)


if __name__ == "__main__":
    raise SystemExit(main())
