"""What the rate of a VAE pays for: mutual information, total correlation and the marginals' distance from the prior.

    python examples/kl_decomposition.py --quick     # shapes of 16x16, and digits of 8x8
    python examples/kl_decomposition.py             # the same shapes, and MNIST-5k
    python examples/kl_decomposition.py --data photos/ --image-size 32 --grey

Three families over beta, on two data sets: squared error + beta * rate (a constant sigma), the batch's optimal sigma
with beta on the rate, and the same with beta on the total correlation alone (beta-TCVAE). The first data set is the
6144 pictures of common/shapes.py, halved, of which no code can know more than log 6144 = 8.72 nats.

Ctrl-C keeps what is done; the same command with --resume continues it. In --out afterwards:

    kl_decomposition.png   the picture
    results.csv            a row for each model: the parts of its rate, what a batch estimates, and its distortion
    channels.csv           KL(q(z_k) || N(0, 1)) of each latent, by quadrature
    terms.csv              the four terms of Esmaeili et al. 2019, of linear VAEs exactly and of the shapes' in bounds
    models/                one folder for each model trained
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import cli, readings, script, shapes
from common.data import Images, load
from common.files import write_csv
from common.kl_parts import decompose, importance_terms, linear_terms
from common.kl_plots import plot
from common.latents import encode
from common.sweep import MODELS, train_all
from common.tc_runs import FAMILIES, QUICK_SHAPES_EPOCHS, SHAPES_BETAS, SHAPES_EPOCHS, make_run
from common.training import Trainer

SHAPES = "shapes"
FULL = {"data": "mnist", "latent_dim": 10, "repeats": 1}
QUICK = {"data": "digits", "latent_dim": 10, "repeats": 1}
EPOCHS, QUICK_EPOCHS = {SHAPES: SHAPES_EPOCHS, "other": 40}, {SHAPES: QUICK_SHAPES_EPOCHS, "other": 45}
BETAS = {
    SHAPES: SHAPES_BETAS,
    "other": {"coupled": (0.03, 0.2, 1, 4), "decoupled": (0.5, 2, 8, 32), "tc": (2, 4, 8, 32)},
}
QUICK_BETAS = {
    SHAPES: {"coupled": (0.3,), "decoupled": (0.5, 8), "tc": (16,)},
    "other": {"coupled": (0.3,), "decoupled": (0.25, 4), "tc": (4,)},
}
ROWS = 1024  # images whose MI is estimated
EVIDENCE_IMAGES, EVIDENCE_SAMPLES = 100, (16, 256)
EIGENVALUES, LINEAR_LATENTS = 80 * 0.5 ** torch.arange(12, dtype=torch.float64), 5  # those of rd_curve.py --linear


def measure(trainer: Trainer) -> dict[str, Any]:
    """On the training split, of which q(z) is the aggregate posterior."""
    images, model = trainer.images.train, trainer.objective.model
    measured = readings.measure(trainer, images, draws=1)
    variance = measured["sse"] / trainer.images.dims
    mu, logvar = encode(model, images)
    found = {
        "sse": measured["sse"],
        "sigma": math.sqrt(variance),
        "distortion": readings.distortion(measured["sse"], trainer.images.dims, variance),
        **decompose(mu, logvar, ROWS),
    }
    if trainer.settings["data"] == SHAPES:
        some = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:EVIDENCE_IMAGES]
        found["importance"] = [
            {"samples": n, **importance_terms(model, images[some], mu[some], logvar[some], found["sigma"], n)}
            for n in EVIDENCE_SAMPLES
        ]
    return found


def four_terms(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows: of the linear VAE all four, of the shapes' models ②, ④, and bounds of ① and H + ③."""
    rows: list[dict[str, Any]] = []
    for beta in np.geomspace(0.25, 4, 65).tolist():
        rows.append({"model": "linear", "beta": beta, **linear_terms(EIGENVALUES, LINEAR_LATENTS, beta)._asdict()})
    for row in results:
        for found in row.get("importance", ()):
            rows.append({
                "model": row["family"], "beta": row["beta"], "seed": row["seed"], "samples": found["samples"],
                "likelihood": found["likelihood"], "information": row["mi"], "data_plus_entropy": found["data"],
                "prior": row["tc"] + row["dim_wise"],
            })  # fmt: skip
    return rows


def table(results: Sequence[dict[str, Any]]) -> str:
    lines = ["| data | β on | β | rate | MI | TC | dim-wise | distortion | MI, own one left out |", "|---" * 9 + "|"]
    for row in results:
        numbers = (f"{row[key]:.2f}" for key in ("rate", "mi", "tc", "dim_wise", "distortion", "mi_upper"))
        lines.append("| " + " | ".join((row["data"], FAMILIES[row["family"]], f"{row['beta']:g}", *numbers)) + " |")
    return "\n".join(lines)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_data_arguments(parser, quick="digits")
    group = parser.add_argument_group("experiment")
    group.add_argument("--latent-dim", type=cli.positive_int, metavar="K", help="(default: 10)")
    group.add_argument(
        "--repeats", type=cli.positive_int, metavar="N",
        help="of everything, with the seeds --seed, --seed + 1, … (default: 1)",
    )  # fmt: skip
    cli.add_sweep_arguments(parser, out=Path("runs/kl_decomposition"), minutes="about six minutes")
    args = parser.parse_args(argv)
    cli.settle(args, full=FULL, quick=QUICK)
    if args.data == SHAPES:
        parser.error("--data is the second data set: the shapes are always there")
    return args


def run(args: argparse.Namespace) -> None:
    data: dict[str, Images] = {
        SHAPES: shapes.population(),
        args.data: load(args.data, image_size=args.image_size, grey=args.grey),
    }
    betas, epochs = (QUICK_BETAS, QUICK_EPOCHS) if args.quick else (BETAS, EPOCHS)
    runs = [
        make_run(args, name, images, family, beta, seed, epochs[SHAPES if name == SHAPES else "other"], measure)
        for seed in range(args.seed, args.seed + args.repeats)
        for name, images in data.items()
        for family in FAMILIES
        for beta in betas[SHAPES if name == SHAPES else "other"][family]
    ]
    results = train_all(runs, args.out, resume=args.resume)
    plain = [{k: v for k, v in row.items() if k not in ("channels", "importance")} for row in results]
    write_csv(args.out / "results.csv", plain)
    keys = ("data", "family", "beta", "seed")
    write_csv(
        args.out / "channels.csv",
        [{**{k: row[k] for k in keys}, "channel": i + 1, "kl": kl} for row in results
         for i, kl in enumerate(row["channels"])],
    )  # fmt: skip
    terms = four_terms(results)
    write_csv(args.out / "terms.csv", terms)
    plot(args.out / "kl_decomposition.png", results, terms)
    print(f"{table(results)}\n\npicture and numbers are in {args.out}")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    return script.main(run, args, argv, MODELS)


if __name__ == "__main__":
    raise SystemExit(main())
