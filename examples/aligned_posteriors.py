"""Does each latent of one VAE for every beta keep its meaning as beta changes? Beside VAEs of one beta.

    python examples/aligned_posteriors.py --quick                          # scikit-learn's 8x8 digits
    python examples/aligned_posteriors.py                                  # MNIST-5k
    python examples/aligned_posteriors.py --out runs/beta_input --resume   # the models that beta_input.py has trained

The models are beta_input.py's, one that is told beta and one for each beta. Latents are compared between two beta by
the correlation of their posterior means over the training images: by number for the one model; for separate models
after the permutation that suits them best. What a decoder at one beta makes of the latents of another is measured too.

Ctrl-C keeps what is trained; the same command with --resume goes on. In --out afterwards:

    aligned_posteriors.png   the picture
    alignment.csv            every pair of betas: how well latents agree, what decoding at the other beta costs
    channels.csv             every latent of every model at every beta: rate, mean and spread of q(z_k)
    models/                  each model's checkpoint and result
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from beta_input import FULL, QUICK
from common import alignment, beta_runs, cli, latents, script
from common.aggregates import Posterior, channel_rows
from common.alignment_plots import draw
from common.at_beta import at
from common.beta_models import CONDITIONING
from common.data import Images, load, to_unit
from common.files import write_csv
from common.grids import grids
from common.ruler import Ruler
from common.sweep import MODELS, check_begun, load_finished, train_all
from torch import Tensor, nn

OUT = Path("runs/aligned_posteriors")
COUNTS = {
    "points": "betas a family", "repeats": "seeds --seed, --seed + 1, ...; the first one's are drawn",
    "epochs": "of each model", "latent_dim": "size of z", "width": "channels at half resolution",
}  # fmt: skip


class Reading(NamedTuple):
    """One model at one β."""

    kind: str
    family: str
    seed: int
    beta: float
    model: nn.Module
    mu: Tensor  # of the training images, [N, K]
    logvar: Tensor
    z: Tensor  # one of q(z|x) for each test image
    error: float  # squared error of an image that is decoded from its z

    @property
    def used(self) -> Tensor:
        return latents.active(self.logvar)


def read(runs: Sequence[beta_runs.Run], images: Images, out: Path, results: Sequence[dict[str, Any]]) -> list[Reading]:
    found = []
    for run, result in zip(runs, results, strict=True):
        objective = load_finished(run, out).objective
        for point in result["points"]:
            model = at(objective, point["beta"], point["sigma"])
            z = latents.draw(*latents.encode(model, images.test))
            found.append(Reading(
                result["kind"], result["family"], result["seed"], point["beta"], model,
                *latents.encode(model, images.train), z, squared_error(model, z, images.test),
            ))  # fmt: skip
    return found


def match_of(a: Reading, c: Tensor) -> alignment.Match:
    return alignment.by_number(c) if a.kind == "beta-input" else alignment.best(c)


def compare(a: Reading, b: Reading, images: Tensor) -> dict[str, Any]:
    """a's latents at b's β. The latents of which the larger β still makes use are compared."""
    c = alignment.correlation(a.mu, b.mu)
    match = match_of(a, c)
    used = a.used if a.beta > b.beta else b.used[match.order]
    error = squared_error(b.model, alignment.renumbered(a.z, match), images)
    return {
        "kind": a.kind, "family": a.family, "seed": a.seed, "beta": a.beta, "beta_of_decoder": b.beta,
        "latents": int(used.sum()), "agreement": alignment.agreement(c, match, used) if used.any() else None,
        "best_agreement": alignment.agreement(c, alignment.best(c), used) if used.any() else None,
        "error": error / a.error,
    }  # fmt: skip


def squared_error(model: nn.Module, z: Tensor, images: Tensor) -> float:
    """Of an image, decoded from its z."""
    return float((latents.decode(model, z) - to_unit(images)).square().flatten(1).sum(1).mean())


def pairs(readings: Sequence[Reading], images: Tensor) -> list[dict[str, Any]]:
    """All ordered pairs of one family, kind and seed."""
    return [
        compare(a, b, images)
        for a, b in itertools.permutations(readings, 2)
        if (a.kind, a.family, a.seed) == (b.kind, b.family, b.seed)
    ]


def shown(readings: Sequence[Reading], seed: int) -> list[Posterior]:
    """The decoupled models of one seed, as numbered at the largest β whose latents are used, most rate first."""
    found = []
    for kind, label in (("beta-input", "one VAE"), ("separate", "one VAE a β")):
        own = [r for r in readings if (r.kind, r.family, r.seed) == (kind, "decoupled", seed)]
        first = max(own, key=lambda r: (r.used.any(), r.beta))
        order = latents.rates(first.mu, first.logvar).argsort(descending=True)
        for reading in own:
            match = match_of(first, alignment.correlation(first.mu, reading.mu))
            mu, logvar = alignment.as_first(reading.mu, match), reading.logvar[:, match.order]
            found.append(Posterior(label, reading.beta, mu[:, order], logvar[:, order]))
    return found


def report(rows: Sequence[dict[str, Any]]) -> None:
    for kind, family in itertools.product(("beta-input", "separate"), beta_runs.FAMILIES):
        own = [r for r in rows if (r["kind"], r["family"]) == (kind, family) and r["latents"] > 0]
        if not own:
            print(f"{kind}, {family}: no latent is used at two β")
            continue
        found = {key: statistics.fmean(r[key] for r in own) for key in ("agreement", "best_agreement", "error")}
        print(
            f"{kind}, {family}: latents agree by {found['agreement']:.3f} (best permutation "
            f"{found['best_agreement']:.3f}); the other β's decoder has {found['error']:.2f} times the error"
        )


def run(args: argparse.Namespace) -> None:
    images = load(args.data, image_size=args.image_size, grey=args.grey)
    betas = grids(images, args.latent_dim, args.points)
    check_begun(args.out, resume=args.resume)
    args.out.mkdir(parents=True, exist_ok=True)
    ruler = Ruler(args.data, images, cache=args.out / "classifier.pt", resume=args.resume)
    runs = list(beta_runs.sweep(args, images, betas, ruler))
    results = train_all(runs, args.out, resume=args.resume)
    readings = read(runs, images, args.out, results)
    rows = pairs(readings, images.test)
    write_csv(args.out / "alignment.csv", rows)
    write_csv(args.out / "channels.csv", [
        {"kind": r.kind, "seed": r.seed, "family": r.family, "beta": r.beta, **channel}
        for r in readings for channel in channel_rows(Posterior(r.family, r.beta, r.mu, r.logvar))
    ])  # fmt: skip
    draw(args.out / "aligned_posteriors.png", shown(readings, args.seed), rows, title=f"{args.data}, decoupled")
    report(rows)
    print(f"picture and numbers are in {args.out}")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_data_arguments(parser, quick=QUICK["data"])
    group = parser.add_argument_group("models, as beta_input.py has them")
    group.add_argument("--conditioning", choices=CONDITIONING, help=f"(default: {FULL['conditioning']})")
    cli.add_counts(group, COUNTS, full=FULL, quick=QUICK)
    cli.add_sweep_arguments(parser, out=OUT, minutes="beta_input.py's 48 models")
    args = parser.parse_args(argv)
    args.sigma = None  # beta_input.py's
    cli.settle(args, full=FULL, quick=QUICK)
    if args.points < 2:
        parser.error(f"--points: at least 2 betas, to compare latents between them, got {args.points}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    return script.main(run, parse_args(argv), argv, MODELS)


if __name__ == "__main__":
    sys.exit(main())
