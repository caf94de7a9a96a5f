"""One VAE for every beta: a network that is told beta, and what becomes of sigma in it.

    python examples/beta_input.py                    # MNIST-5k: one VAE for every beta, beside one for each
    python examples/beta_input.py --quick            # scikit-learn's 8x8 digits
    python examples/beta_input.py --data photos/     # a folder of images
    python examples/beta_input.py --linear           # linear VAEs on Gaussian data; see --help for how long

A model that is told beta has a beta of its own for each sample of its training, log-uniform, and is trained for as many
epochs as each model of one beta. With --linear the data are Gaussian and the networks linear, so the optimum at each
beta is known in closed form; the rows differ in the layers that tell the network beta (common/conditioning.py) and in
where sigma comes from (common/beta_input.py).

Ctrl-C keeps what is trained; the same command with --resume goes on. In --out afterwards:

    beta_input.png   the figure
    beta_input.csv   every model at every beta
    models/          each model's checkpoint and result
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from common import beta_runs, cli, linear, linear_beta, script
from common.beta_input import SIGMA, BetaInputObjective, measure
from common.beta_models import CONDITIONING
from common.beta_plots import plot_images, plot_linear
from common.conditioning import BetaRange
from common.data import Splits, load
from common.files import write_csv
from common.grids import grids
from common.ruler import Ruler
from common.sweep import MODELS, Run, check_begun, train_all
from common.training import Trainer

TOLD = {"conditioning": "modulation", "sigma": "network"}
FULL = {"data": "mnist", "points": 7, "repeats": 3, "epochs": 16, "latent_dim": 16, "width": 8, **TOLD}
QUICK = {"data": "digits", "points": 5, "repeats": 1, "epochs": 15, "latent_dim": 8, "width": 16, **TOLD}
LINEAR = {"repeats": 3, "epochs": 400}
QUICK_LINEAR = {"repeats": 1, "epochs": 200}
EIGENVALUES = 80 * 0.5 ** torch.arange(12, dtype=torch.float64)  # of the Gaussian data
LATENTS, COUNT, BATCH, LR = 5, 8192, 1024, 5e-2
BETAS = BetaRange(0.1, 3.0)  # the most important dimension would switch off at 6
POINTS, DRAWS = 5, 4  # β at which a model is read, latents for each sample there
OUT = Path("runs/beta_input")


class Row(NamedTuple):
    layers: str  # of linear_beta.LAYERS
    condition: str
    sigma: str


ROWS = {
    "level": Row("gates", "level", "network"),
    "log-beta": Row("gates", "log-beta", "network"),
    "multi-rate": Row("multi-rate", "log-beta", "network"),
    "root-sigmoid": Row("root-sigmoid", "log-beta", "network"),
    "film": Row("film", "log-beta", "network"),
    "sigma-batch": Row("gates", "log-beta", "batch"),
    "sigma-image": Row("film", "log-beta", "image"),
    "sigma-one-beta": Row("film", "log-beta", "one-beta"),
}


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_data_arguments(parser, quick=QUICK["data"])
    group = parser.add_argument_group("models")
    group.add_argument("--linear", action="store_true", help="linear VAEs on Gaussian data, beside the closed form")
    group.add_argument(
        "--rows", nargs="+", choices=ROWS, metavar="ROW",
        help=f"--linear: which of the rows to train: {', '.join(ROWS)} (default: all)",
    )  # fmt: skip
    group.add_argument("--conditioning", choices=CONDITIONING, help=f"(default: {FULL['conditioning']})")
    group.add_argument(
        "--sigma", choices=[name for name in SIGMA if name != "half"],
        help=f"of the decoupled model that is told beta (default: {FULL['sigma']})",
    )  # fmt: skip
    for name, text in (
        ("points", "betas a family"), ("repeats", "seeds --seed, --seed + 1, ..."), ("epochs", "of each model"),
        ("latent_dim", "size of z"), ("width", "channels at half resolution, up to 4W below"),
    ):  # fmt: skip
        linear_too = f"; --linear: {LINEAR[name]}, quick {QUICK_LINEAR[name]}" if name in LINEAR else ""
        group.add_argument(
            f"--{name.replace('_', '-')}", type=cli.positive_int, metavar="N",
            help=f"{text} (default: {FULL[name]}; --quick: {QUICK[name]}{linear_too})",
        )  # fmt: skip
    group.add_argument(
        "--betas", type=cli.number(above=0), nargs="+", metavar="B",
        help="of both families, in place of --points each that follow from the data",
    )  # fmt: skip
    cli.add_sweep_arguments(parser, out=OUT, minutes="48 models of about a minute; --linear: 9 minutes")
    args = parser.parse_args(argv)
    if args.linear:
        for name in ("data", "points", "betas", "latent_dim", "width", *TOLD, "image_size", "grey"):
            if getattr(args, name) not in (None, False):
                parser.error(f"--{name.replace('_', '-')} has no effect with --linear, got {getattr(args, name)}")
        args.rows = args.rows or list(ROWS)
        cli.settle(args, full=LINEAR, quick=QUICK_LINEAR)
        args.out = args.out if args.out != OUT else OUT.with_name("beta_input_linear")
    else:
        if args.rows is not None:
            parser.error(f"--rows has no effect without --linear, got {' '.join(args.rows)}")
        if args.betas is not None:
            if args.points is not None:
                parser.error("--points has no effect beside --betas")
            args.betas, given = sorted(set(args.betas)), args.betas
            if len(args.betas) < max(2, len(given)):
                parser.error(f"--betas: at least 2 and all different, got {' '.join(f'{b:g}' for b in given)}")
        cli.settle(args, full=FULL, quick=QUICK)
        if args.points < 2:
            parser.error(f"--points: one VAE for every beta needs at least 2 of them, got {args.points}")
    return args


def sweep(args: argparse.Namespace, data: Splits, betas: Sequence[float]) -> Iterator[Run]:
    """All rows of one seed before the next one's."""
    for seed in range(args.seed, args.seed + args.repeats):
        for name in args.rows:
            yield Run(
                name=f"{name}-seed{seed}",
                settings={"row": name, "seed": seed, "epochs": args.epochs, **ROWS[name]._asdict()},
                build=functools.partial(build, args, data),
                measure=functools.partial(read, x=data.train, betas=betas),
            )


def build(args: argparse.Namespace, data: Splits, checkpoint: Path, settings: dict[str, Any]) -> Trainer:
    torch.manual_seed(settings["seed"])
    scale = float(EIGENVALUES.mean().sqrt())
    row = ROWS[settings["row"]]
    objective = BetaInputObjective(
        linear_beta.ConditionedLinearVAE(data.dims, LATENTS, scale, row.layers),
        BETAS, sigma=row.sigma, condition=row.condition, log_std=math.log(scale),
    )  # fmt: skip
    return Trainer(
        objective, data, epochs=args.epochs, batch_size=BATCH, lr=LR, seed=settings["seed"],
        device=args.device, checkpoint=checkpoint, settings=settings, weight_decay=0.0,
    )  # fmt: skip


def read(trainer: Trainer, x: torch.Tensor, betas: Sequence[float]) -> dict[str, Any]:
    assert isinstance(trainer.objective, BetaInputObjective)
    return {"points": measure(trainer.objective, x, betas, draws=DRAWS, batch_size=BATCH)}


def beside_closed_form(rows: list[dict[str, Any]], eigenvalues: torch.Tensor) -> list[dict[str, Any]]:
    """What the closed form has at each row's beta: decoupled, and as one variance for all beta couples it."""
    shared = linear_beta.shared_variance(eigenvalues, LATENTS, BETAS.grid(500).tolist())
    dims, found = len(eigenvalues), []
    for row in rows:
        beta = row["beta"]
        exact = linear.optimum(eigenvalues, LATENTS, beta)
        found.append({
            **row, "exact_rate": exact.rate, "exact_sse": exact.sse, "exact_sigma": math.sqrt(exact.sse / dims),
            "coupled_rate": linear_beta.at_level(eigenvalues, LATENTS, beta * shared).rate,
            "excess": dims / 2 * math.log(row["sse"] / exact.sse) + beta * (row["rate"] - exact.rate),
        })  # fmt: skip
    return found


def run(args: argparse.Namespace) -> None:
    (run_linear if args.linear else run_images)(args)


def run_images(args: argparse.Namespace) -> None:
    images = load(args.data, image_size=args.image_size, grey=args.grey)
    if args.betas is None:
        betas = grids(images, args.latent_dim, args.points)
    else:
        betas = dict.fromkeys(beta_runs.FAMILIES, args.betas)
    check_begun(args.out, resume=args.resume)
    args.out.mkdir(parents=True, exist_ok=True)
    ruler = Ruler(args.data, images, cache=args.out / "classifier.pt", resume=args.resume)
    models = train_all(list(beta_runs.sweep(args, images, betas, ruler)), args.out, resume=args.resume)
    rows = beta_runs.rows_of(models, images.dims)
    write_csv(args.out / "beta_input.csv", rows)
    title = f"{args.data}, test split, D = {images.dims}"
    plot_images(args.out / "beta_input.png", rows, title=title, note=ruler.note)
    for (kind, family), spread in beta_runs.spreads(rows).items():
        print(f"{kind}, {family}: the largest Fréchet distance is {spread:.2f} times the smallest")
    print(f"figure and numbers are in {args.out}")


def run_linear(args: argparse.Namespace) -> None:
    data = linear.gaussian_data(EIGENVALUES, COUNT)
    eigenvalues = linear.spectrum(data.train)  # what the models can learn: they are read on what they were trained on
    betas = [float(f"{beta:.4g}") for beta in BETAS.grid(POINTS).tolist()]
    args.out.mkdir(parents=True, exist_ok=True)
    models = train_all(list(sweep(args, data, betas)), args.out, resume=args.resume)
    names = ("row", "layers", "condition", "sigma", "seed")
    rows = [{**{key: model[key] for key in names}, **point} for model in models for point in model["points"]]
    rows = beside_closed_form(rows, eigenvalues)
    write_csv(args.out / "beta_input.csv", rows)
    grid = np.geomspace(BETAS.low, BETAS.high, 60).tolist()
    best = linear_beta.best_affine_gates(eigenvalues, LATENTS, grid, np.log(grid).tolist())
    plot_linear(args.out / "beta_input.png", rows, eigenvalues, LATENTS, BETAS, grid, best)
    for name in args.rows:
        own = [row for row in rows if row["row"] == name]
        target = "coupled_rate" if ROWS[name].sigma == "batch" else "exact_rate"
        worst = max(abs(row["rate"] / row[target] - 1) for row in own)
        print(f"{name:15} rate off the {target.partition('_')[0]:7} optimum by at most {worst:7.2%}")
    print(f"figure and numbers are in {args.out}")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    return script.main(run, args, argv, MODELS)


if __name__ == "__main__":
    sys.exit(main())
