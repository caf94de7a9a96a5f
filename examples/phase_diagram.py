"""The plane of rate and distortion, with the line that no model crosses: R + D = H, the entropy of the data.

    python examples/phase_diagram.py --quick     # one seed and fewer betas
    python examples/phase_diagram.py

Figure 1 of Alemi et al., "Fixing a Broken ELBO" (ICML 2018, arXiv:1711.00464), with real models and data of which H is
known: linear VAEs on two Gaussians, where all else is known too, and affine and nonlinear VAEs on 64 distinct images
under noise. From each model two legs lead to the line: what its prior and what its decoder costs.

Ctrl-C keeps what is trained; the same command with --resume continues. In --out afterwards:

    phase_diagram.png   the picture
    phase_diagram.csv   every model: rate, distortion, the gap to the line, and the bounds of both legs
    models/             each model's checkpoint and result
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import cli, script
from common.files import write_csv
from common.linear import gap
from common.phase import (
    HIDDEN,
    LATENTS,
    PIXELS,
    SPECTRA,
    distinct_images,
    images_entropy,
    images_run,
    images_spectrum,
    linear_run,
)
from common.phase_plots import Panel, draw
from common.sweep import MODELS, Run, train_all
from torch import Tensor

FULL = {"repeats": 2, "linear_epochs": 90, "image_epochs": 160}
QUICK = {"repeats": 1, "linear_epochs": 90, "image_epochs": 60}
BETAS, QUICK_BETAS = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0), (0.25, 1.0, 2.0)  # of the linear VAEs
IMAGE_BETAS, QUICK_IMAGE_BETAS = (0.25, 0.5, 1.0, 2.0, 3.0, 4.0), (0.5, 1.0, 3.0)
TITLES = {
    "geometric": "Gaussian, λ = 80·½ⁱ in 12 dimensions; 5 latents",
    "low rank": "Gaussian, 5 directions + noise in 20; 5 latents",
}


def all_runs(args: argparse.Namespace, images: Tensor) -> list[Run]:
    """Each seed's before the next one's."""
    betas, image_betas = (QUICK_BETAS, QUICK_IMAGE_BETAS) if args.quick else (BETAS, IMAGE_BETAS)
    runs = []
    for seed in range(args.seed, args.seed + args.repeats):
        runs += [linear_run(args, name, beta=beta, seed=seed) for name in SPECTRA for beta in betas]
        runs += [images_run(args, images, name, beta=beta, seed=seed) for name in HIDDEN for beta in image_betas]
    return runs


def panels(results: Sequence[dict[str, Any]], images: Tensor) -> list[Panel]:
    parts = {part: [row for row in results if row["part"] == part] for part in (*SPECTRA, "images")}
    shown = [
        Panel(TITLES[name], parts[name][0]["entropy"], parts[name], eigenvalues, LATENTS, None)
        for name, eigenvalues in SPECTRA.items()
    ]
    title = f"{len(images)} images of 8×8 + noise; {PIXELS['latent_dim']} latents"
    spectrum, whole = images_spectrum(images), math.log(len(images))
    return [*shown, Panel(title, images_entropy(images), parts["images"], spectrum, PIXELS["latent_dim"], whole)]


def report(results: Sequence[dict[str, Any]]) -> None:
    for row in results:
        legs = (f"{row[f'{leg}_low']:.2f}–{row[f'{leg}_high']:.2f}" for leg in ("prior", "decoder"))
        exact = f", closed form {row['exact_gap']:.2f}" if "exact_gap" in row else ""
        print(
            f"{row['part']}, {row['model']}, beta {row['beta']:g}: R {row['rate']:.2f}, D {row['distortion']:.2f}, "
            f"R + D − H {row['gap']:.3f} ± {row['gap_error']:.3f}{exact}; prior {next(legs)}, decoder {next(legs)}"
        )
    lowest = min(row["gap"] / row["gap_error"] for row in results)
    print(f"nearest to the line, or farthest below it: {lowest:+.1f} standard errors")


def run(args: argparse.Namespace) -> None:
    images = distinct_images()
    args.out.mkdir(parents=True, exist_ok=True)
    results = train_all(all_runs(args, images), args.out, resume=args.resume)
    for row in results:
        if row["part"] in SPECTRA:
            row["exact_gap"] = gap(SPECTRA[row["part"]], LATENTS, row["beta"])
    write_csv(args.out / "phase_diagram.csv", results)
    draw(args.out / "phase_diagram.png", panels(results, images))
    report(results)
    print(f"picture and numbers are in {args.out}")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("experiment")
    for name, what in (
        ("repeats", "models a beta, of seeds --seed, --seed + 1, ..."),
        ("linear_epochs", "of the linear VAEs"),
        ("image_epochs", "of the VAEs of images"),
    ):
        group.add_argument(f"--{name.replace('_', '-')}", type=cli.positive_int, metavar="N",
                           help=f"{what} (default: {FULL[name]}; --quick: {QUICK[name]})")  # fmt: skip
    cli.add_sweep_arguments(parser, out=Path("runs/phase_diagram"), minutes="about nine minutes on one")
    args = parser.parse_args(argv)
    cli.settle(args, full=FULL, quick=QUICK)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    return script.main(run, parse_args(argv), argv, MODELS)


if __name__ == "__main__":
    raise SystemExit(main())
