"""The aggregate posterior of each latent over beta: does q(z_k) stay where the prior is, from which one samples?

    python examples/aggregated_posterior.py --quick     # digits of 8x8
    python examples/aggregated_posterior.py             # MNIST-5k

Separate VAEs for each beta, of two families: squared error + beta·rate, and sigma decoupled. Their betas follow from
the data and span the same rates. q(z_k), the mean of all training images' posteriors, is drawn over the prior, and its
divergence from it is integrated, not sampled.

Ctrl-C keeps what is trained; the same command with --resume continues. In --out afterwards:

    aggregated_posterior.png   the picture
    channels.csv               every latent of every model: rate, mean and spread of q(z_k), KL(q(z_k) ‖ N(0, 1))
    models/                    each model's checkpoint and result
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import cli, script
from common.aggregates import Posterior, channel_rows, draw
from common.data import Images, Splits, load, to_unit
from common.files import write_csv
from common.grids import grids
from common.latents import encode
from common.mlp import MLPVAE
from common.objective import VAEObjective, make_criterion
from common.readings import HALF
from common.sweep import MODELS, Run, load_finished, train_all
from common.training import Trainer

FULL = {"data": "mnist", "points": 5, "repeats": 2, "steps": 3000}
QUICK = {"data": "digits", "points": 4, "repeats": 1, "steps": 1500}
COUNTS = {
    "points": "betas a family",
    "repeats": "models a beta, of seeds --seed, --seed + 1, ...; the first one's are drawn",
    "steps": "of each training, rounded up to whole epochs",
}
SIGMA = {"squared error": repr(HALF), "decoupled": "optimal"}  # of each family
LATENTS, HIDDEN, BATCH_SIZE, LR = 8, (256,), 64, 3e-3


def all_runs(args: argparse.Namespace, images: Images) -> list[Run]:
    """Each seed's before the next one's. Of each family every second beta of a finer grid: fours, where it has twos."""
    splits = Splits(*(to_unit(part).flatten(1) for part in (images.train, images.val, images.test)))
    betas = grids(images, LATENTS, 2 * args.points - 1)
    common = {"data": args.data, "data_shape": [len(images.train), *images.shape], "steps": args.steps}
    return [
        Run(
            f"{family.replace(' ', '-')}-beta{beta:g}-seed{seed}",
            {"family": family, "beta": beta, "seed": seed, **common},
            partial(build, args, splits),
            measure,
        )
        for seed in range(args.seed, args.seed + args.repeats)
        for family in SIGMA
        for beta in betas[family][::2]
    ]


def build(args: argparse.Namespace, splits: Splits, checkpoint: Path, settings: dict[str, Any]) -> Trainer:
    torch.manual_seed(settings["seed"])
    criterion = make_criterion(SIGMA[settings["family"]], settings["beta"], channels=1)
    objective = VAEObjective(MLPVAE(splits.dims, LATENTS, HIDDEN), criterion)
    return Trainer(
        objective, splits, epochs=-(-args.steps // max(1, len(splits.train) // BATCH_SIZE)), batch_size=BATCH_SIZE,
        lr=LR, seed=settings["seed"], device=args.device, checkpoint=checkpoint, settings=settings,
    )  # fmt: skip


def posterior(trainer: Trainer) -> Posterior:
    """Of all training images: what the decoder was trained on."""
    mu, logvar = encode(trainer.objective.model, trainer.images.train)
    return Posterior(trainer.settings["family"], trainer.settings["beta"], mu, logvar)


def measure(trainer: Trainer) -> dict[str, Any]:
    test = trainer.evaluate(trainer.images.test)
    return {**{key: test[key] for key in ("rate", "distortion", "sigma")}, "channels": channel_rows(posterior(trainer))}


def flat(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each latent of each model."""
    rows = []
    for result in results:
        model = {key: value for key, value in result.items() if key != "channels"}
        rows += [{**model, **channel} for channel in result["channels"]]
    return rows


def report(rows: Sequence[dict[str, Any]]) -> None:
    for family in SIGMA:
        for beta in sorted({row["beta"] for row in rows if row["family"] == family}):
            chosen = [row for row in rows if (row["family"], row["beta"]) == (family, beta)]
            found = {
                key: sum(abs(row[key]) for row in chosen) / len(chosen)
                for key in ("channel_rate", "kl", "mean", "spread", "rate")
            }
            print(
                f"{family}, beta {beta:g}: rate {found['rate']:.1f} nats on test images; of a latent: rate "
                f"{found['channel_rate']:.2f}, KL(q(z_k) ‖ N(0, 1)) {found['kl']:.4f}, |mean| {found['mean']:.3f}, "
                f"spread {found['spread']:.3f}"
            )


def run(args: argparse.Namespace) -> None:
    images = load(args.data, image_size=args.image_size, grey=args.grey)
    args.out.mkdir(parents=True, exist_ok=True)
    runs = all_runs(args, images)
    rows = flat(train_all(runs, args.out, resume=args.resume))
    write_csv(args.out / "channels.csv", rows)
    shown = [posterior(load_finished(one, args.out)) for one in runs if one.settings["seed"] == args.seed]
    draw(args.out / "aggregated_posterior.png", shown, rows, title=f"{args.data}, {LATENTS} latents")
    report(rows)
    print(f"picture and numbers are in {args.out}")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_data_arguments(parser, quick=QUICK["data"])
    group = parser.add_argument_group("models")
    cli.add_counts(group, COUNTS, full=FULL, quick=QUICK)
    cli.add_sweep_arguments(parser, out=Path("runs/aggregated_posterior"), minutes="about six minutes on one")
    args = parser.parse_args(argv)
    cli.settle(args, full=FULL, quick=QUICK)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    return script.main(run, parse_args(argv), argv, MODELS)


if __name__ == "__main__":
    raise SystemExit(main())
