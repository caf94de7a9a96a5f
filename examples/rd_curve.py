"""Rate–distortion curves: one set of beta-VAEs read at three sigmas, and the models whose sigma is decoupled from beta.

    python examples/rd_curve.py                    # MNIST-5k; see --help for how long
    python examples/rd_curve.py --quick            # scikit-learn's 8x8 digits
    python examples/rd_curve.py --data photos/     # a folder of images
    python examples/rd_curve.py --linear           # a linear VAE on Gaussian data, on the exact curve
    torchrun --nproc-per-node 2 examples/rd_curve.py --device cpu

Ctrl-C keeps what is trained; the same command with --resume goes on, and so it does with more --points or --repeats
than the sweep had. In --out afterwards:

    rd_curve.png     the figure
    rd_curve.csv     every model under every reading of its sigma, in nats
    models/          each model's checkpoint and result
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import cli, linear, ranks, script
from common.data import Splits, load
from common.files import write_csv
from common.grids import grids
from common.objective import VAEObjective, make_criterion, make_objective
from common.rd_plots import plot_curves, plot_linear
from common.readings import HALF, measure, readings
from common.script import say
from common.sweep import MODELS, Run, train_all
from common.training import Trainer

OUT = Path("runs/rd_curve")
SIGMA = {"squared error": repr(HALF), "decoupled": "optimal", "per image": "optimal-per-image"}  # of each family
FULL = {"data": "mnist", "points": 7, "repeats": 3, "epochs": 16, "latent_dim": 16, "width": 8}
QUICK = {"data": "digits", "points": 5, "repeats": 1, "epochs": 15, "latent_dim": 8, "width": 16}
BATCH_SIZE, LR = 64, 3e-3
DRAWS = 4  # latents for each test image

LINEAR = {"points": 8, "repeats": 3, "epochs": 300}
QUICK_LINEAR = {"points": 5, "repeats": 1, "epochs": 200}
EIGENVALUES = 80 * 0.5 ** torch.arange(12, dtype=torch.float64)  # of the Gaussian data
LINEAR_LATENTS, LINEAR_COUNT, LINEAR_BATCH, LINEAR_LR, LINEAR_DRAWS = 5, 8192, 1024, 5e-2, 16


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_data_arguments(parser, quick=QUICK["data"])
    model = parser.add_argument_group("models")
    model.add_argument(
        "--linear", action="store_true",
        help="train linear VAEs on Gaussian data instead, of which the curve is known in closed form",
    )  # fmt: skip
    model.add_argument("--points", type=cli.positive_int, metavar="N", help="betas a family" + _defaults("points"))
    model.add_argument(
        "--repeats", type=cli.positive_int, metavar="N",
        help="models a beta, of seeds --seed, --seed + 1, ...; error bars show their spread" + _defaults("repeats"),
    )  # fmt: skip
    model.add_argument("--epochs", type=cli.positive_int, metavar="N", help="of each" + _defaults("epochs"))
    model.add_argument("--latent-dim", type=cli.positive_int, metavar="K", help="size of z" + _defaults("latent_dim"))
    model.add_argument(
        "--width", type=cli.positive_int, metavar="W",
        help="channels at half resolution, up to 4W below" + _defaults("width"),
    )  # fmt: skip
    cli.add_sweep_arguments(parser, out=OUT, minutes="about 20 minutes; --linear: 2")
    args = parser.parse_args(argv)
    if args.linear:
        for name in ("data", "latent_dim", "width"):
            if getattr(args, name) is not None:
                parser.error(f"--{name.replace('_', '-')} has no effect with --linear")
        cli.settle(args, full=LINEAR, quick=QUICK_LINEAR)
        args.out = args.out if args.out != OUT else OUT.with_name("rd_curve_linear")
    else:
        cli.settle(args, full=FULL, quick=QUICK)
    cli.check_ranks(parser, args)
    return args


def _defaults(name: str) -> str:
    linear_too = f"; --linear: {LINEAR[name]}, quick {QUICK_LINEAR[name]}" if name in LINEAR else ""
    return f" (default: {FULL[name]}; --quick: {QUICK[name]}{linear_too})"


def sweep(args: argparse.Namespace, data: Splits, betas: dict[str, list[float]], names: Sequence[str]) -> Iterator[Run]:
    """All families' models, each seed's before the next one's: a sweep that is cut short has the whole curve."""
    settings = {name: getattr(args, name) for name in names}
    settings["data_shape"] = [len(data.train), *data.train.shape[1:]]  # notices a folder whose content has changed
    if ranks.count() > 1:
        settings["processes"] = ranks.count()
    build, test, draws = (build_linear, data.train, LINEAR_DRAWS) if args.linear else (build_conv, data.test, DRAWS)
    for seed in range(args.seed, args.seed + args.repeats):
        for family in betas:
            for beta in betas[family]:
                yield Run(
                    name=f"{family.replace(' ', '-')}-beta{beta:g}-seed{seed}",
                    settings=settings | {"family": family, "beta": beta, "seed": seed},
                    build=functools.partial(build, args, data),
                    measure=functools.partial(measure, images=test, draws=draws),
                )


def build_conv(args: argparse.Namespace, data: Any, checkpoint: Path, settings: dict[str, Any]) -> Trainer:
    torch.manual_seed(settings["seed"])
    objective = make_objective(
        data.shape, SIGMA[settings["family"]], settings["beta"], latent_dim=args.latent_dim, width=args.width
    )
    ranks.seed_noise(settings["seed"])
    return Trainer(
        objective, data, epochs=args.epochs, batch_size=BATCH_SIZE, lr=LR, seed=settings["seed"],
        device=args.device, checkpoint=checkpoint, settings=settings,
    )  # fmt: skip


def build_linear(args: argparse.Namespace, data: Splits, checkpoint: Path, settings: dict[str, Any]) -> Trainer:
    torch.manual_seed(settings["seed"])
    scale = float(EIGENVALUES.mean().sqrt())
    model = linear.LinearVAE(data.dims, LINEAR_LATENTS, scale)
    objective = VAEObjective(model, make_criterion("optimal", settings["beta"], channels=1))
    ranks.seed_noise(settings["seed"])
    return Trainer(
        objective, data, epochs=args.epochs, batch_size=LINEAR_BATCH, lr=LINEAR_LR, seed=settings["seed"],
        device=args.device, checkpoint=checkpoint, settings=settings, weight_decay=0.0,
    )  # fmt: skip


def run(args: argparse.Namespace) -> None:
    (run_linear if args.linear else run_conv)(args)


def run_conv(args: argparse.Namespace) -> None:
    images = load(args.data, image_size=args.image_size, grey=args.grey)
    betas = grids(images, args.latent_dim, args.points)
    args.out.mkdir(parents=True, exist_ok=True)
    names = ("data", "image_size", "grey", "epochs", "latent_dim", "width")
    models = train_all(list(sweep(args, images, betas, names)), args.out, resume=args.resume)
    rows = [
        {"family": model["family"], "beta": model["beta"], "seed": model["seed"], "rate": model["rate"], **reading,
         "sse": model["sse"]}
        for model in models
        for reading in readings(model, images.dims, model["beta"], squared_error=model["family"] == "squared error")
    ]  # fmt: skip
    if ranks.is_first():
        write_csv(args.out / "rd_curve.csv", rows)
        plot_curves(args.out / "rd_curve.png", rows, title=f"{args.data}, test split, D = {images.dims}")
    say(f"curves and numbers are in {args.out}")


def run_linear(args: argparse.Namespace) -> None:
    data = linear.gaussian_data(EIGENVALUES, LINEAR_COUNT)
    eigenvalues = linear.spectrum(data.train)
    highest = linear.switches_off(eigenvalues, 0) / 2  # beyond it the rate is so small that 2% of it drown in noise
    betas = [float(f"{beta:.3g}") for beta in np.geomspace(highest / 12, highest, args.points)]
    args.out.mkdir(parents=True, exist_ok=True)
    models = train_all(list(sweep(args, data, {"linear": betas}, ("epochs",))), args.out, resume=args.resume)
    rows = []
    for model in models:
        exact = linear.optimum(eigenvalues, LINEAR_LATENTS, model["beta"])
        found = readings(model, data.dims, model["beta"], squared_error=False)[0]
        rows.append({
            "beta": model["beta"], "seed": model["seed"], "rate": model["rate"], "exact_rate": exact.rate,
            "distortion": found["distortion"], "exact_distortion": exact.distortion,
            "sse": model["sse"], "exact_sse": exact.sse, "exact_active": exact.active,
        })  # fmt: skip
    worst = {key: max(abs(row[key] / row[f"exact_{key}"] - 1) for row in rows) for key in ("rate", "distortion", "sse")}
    if ranks.is_first():
        write_csv(args.out / "rd_curve.csv", rows)
        plot_linear(args.out / "rd_curve.png", rows, eigenvalues, LINEAR_LATENTS)
    say("farthest from the closed form: " + ", ".join(f"{key} {error:.2%}" for key, error in worst.items()))
    say(f"curve and numbers are in {args.out}")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    return script.main(run, args, argv, MODELS)


if __name__ == "__main__":
    ranks.join()
    ranks.leave(main())
