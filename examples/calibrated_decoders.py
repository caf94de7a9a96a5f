"""One VAE, eleven decoders: what p(x|z) is decides how good the bound, the reconstructions and the samples are.

    python examples/calibrated_decoders.py --quick     # every row at 14x14, about 40 seconds on two CPU cores
    python examples/calibrated_decoders.py             # MNIST-5k at 28x28, ten to fifteen minutes
    python examples/calibrated_decoders.py --inception inception-2015-12-05.pt   # FID, if you have that file

The table of Rybkin, Daniilidis, Levine (ICML 2021, arXiv:2006.13202): decoders that differ in their last layer's
channels and in the loss only. Ctrl-C keeps the models; the same command with --resume continues. In --out afterwards:

    table.md                  the table that is printed
    metrics.csv               every model's numbers, those of the whole beta sweep included
    calibrated_decoders.png   reconstructions and samples of every row, its numbers beside it
    models/, classifier.pt    what was trained
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import cli, script
from common.data import DataError, Images, halve, load, to_unit
from common.decoder_table import draw, table
from common.files import write_csv, write_text
from common.latents import prior
from common.likelihoods import DENSITY, LIKELIHOODS, MASS, LikelihoodObjective, mass_nats
from common.metrics import load_inception
from common.objective import VAEObjective, bits_per_dim, make_objective
from common.ruler import Ruler
from common.script import say
from common.sweep import MODELS, Run, check_begun, load_finished, train_all
from common.training import EVAL_SEED, Trainer
from torch import Tensor

FULL = {"epochs": 12, "width": 16, "betas": [0.3, 0.1, 0.03, 0.01, 0.003]}
QUICK = {"epochs": 4, "width": 16, "betas": [0.3, 0.03, 0.003]}
LR, BATCH_SIZE = 2e-3, 64
SHOWN = 10  # reconstructions, and samples, in a row of the picture


@dataclass(frozen=True)
class Decoder:
    """A row. `kind` is one of LIKELIHOODS, or the sigma of a Gaussian: one of SIGMA_MODES or a number."""

    name: str
    label: str
    kind: str
    bound: bool = True  # False: sigma has seen x
    beta: float | None = None  # of the sweep: SSE + beta KL

    @property
    def gives(self) -> str:
        return LIKELIHOODS[self.kind].gives if self.kind in LIKELIHOODS else DENSITY


def decoders(betas: Sequence[float]) -> list[Decoder]:
    """In the paper's order. SSE + beta KL is beta times the ELBO at sigma² = beta/2, which AdamW cannot tell apart."""
    sweep = [Decoder(f"beta-{beta:g}", f"β-VAE, β = {beta:g}", repr(math.sqrt(beta / 2)), beta=beta) for beta in betas]
    return [
        Decoder("bernoulli", "Bernoulli", "bernoulli"),
        Decoder("categorical", "Categorical", "categorical"),
        Decoder("bitwise-categorical", "Bitwise-categorical", "bitwise-categorical"),
        Decoder("logistic-mixture", "Logistic mixture", "logistic-mixture"),
        Decoder("sigma-1", "Gaussian, σ = 1", "1.0"),
        Decoder("per-pixel", "Per-pixel σ", "per-pixel"),
        Decoder("student-t", "Student-t", "student-t"),
        *sweep,
        Decoder("shared", "Shared σ", "learned"),
        Decoder("optimal", "Optimal σ", "optimal"),
        Decoder("optimal-per-image", "Optimal per-image σ", "optimal-per-image", bound=False),
    ]


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_data_arguments(parser)
    model = parser.add_argument_group("models")
    model.add_argument("--epochs", type=cli.positive_int, metavar="N", help=_default("epochs"))
    model.add_argument("--width", type=cli.positive_int, metavar="W", help=_default("width"))
    model.add_argument("--latent-dim", type=cli.positive_int, default=16, metavar="K", help="(default: %(default)s)")
    model.add_argument(
        "--betas", type=cli.number(above=0), nargs="+", metavar="B",
        help=f"of the beta-VAEs, SSE + beta KL; the best of them makes a row {_default('betas')}",
    )  # fmt: skip
    model.add_argument(
        "--inception", type=Path, metavar="PATH",
        help="TorchScript file of the FID network (inception-2015-12-05.pt of StyleGAN2-ADA), for FID instead of the "
        "Fréchet distance in a small classifier's features",
    )  # fmt: skip
    cli.add_sweep_arguments(parser, out=Path("runs/calibrated_decoders"), minutes="ten to fifteen minutes")
    args = parser.parse_args(argv)
    cli.settle(args, full=FULL, quick=QUICK)
    if dist.is_available() and dist.is_torchelastic_launched():
        parser.error("this script runs in one process: start it without torchrun")
    if len(set(args.betas)) < len(args.betas):
        parser.error(f"--betas must differ, got {' '.join(f'{beta:g}' for beta in args.betas)}")
    return args


def _default(name: str) -> str:
    full, quick = (" ".join(map(str, v)) if isinstance(v, list) else str(v) for v in (FULL[name], QUICK[name]))
    return f"(default: {full}; with --quick {quick})"


def load_8bit(args: argparse.Namespace) -> Images:
    images = load(args.data, image_size=args.image_size, grey=args.grey)
    if not images.is_8bit:
        raise DataError(
            f"--data {args.data}: these images are not 8-bit, and the categorical decoders are of the 256 levels"
        )
    return Images(*map(halve, (images.train, images.val, images.test))) if args.quick else images


def build(checkpoint: Path, settings: dict[str, Any], *, args: argparse.Namespace, images: Images) -> Trainer:
    torch.manual_seed(args.seed)
    kind, size = settings["kind"], {"latent_dim": args.latent_dim, "width": args.width}
    if kind in LIKELIHOODS:
        objective = LikelihoodObjective(images.shape, LIKELIHOODS[kind], **size)
    else:
        objective = make_objective(images.shape, kind, 1.0, init_log_sigma=images.log_std, **size)
    return Trainer(
        objective, images, epochs=args.epochs, batch_size=BATCH_SIZE, lr=LR, seed=args.seed, device=args.device,
        checkpoint=checkpoint, settings=settings,
    )  # fmt: skip


def measure(trainer: Trainer, *, decoder: Decoder, images: Images, ruler: Ruler) -> dict[str, Any]:
    """On the test split. −log p(x) <= distortion + rate, where that is a bound at all; blank elsewhere."""
    test = trainer.evaluate(images.test)
    bound = test["distortion"] + test["rate"] if decoder.bound else None
    density = bound if decoder.gives == DENSITY else None
    mass = bound if decoder.gives == MASS else None
    if density is not None:
        mass = mass_nats(density, images.dims)
    gaussian = decoder.kind not in LIKELIHOODS
    error = reconstruct(trainer, images.test) - to_unit(images.test)
    return {
        # In evaluation a running sigma replaces each image's own: the distortion would be another decoder's.
        "distortion": test["distortion"] if decoder.bound else None,
        "rate": test["rate"],
        "density_nats": density,
        "mass_nats": mass,
        "bits_per_dim": None if mass is None else bits_per_dim(mass, images.dims),
        "val_loss": trainer.history[-1]["val"]["loss"],
        "sigma": test["sigma"] if gaussian else None,
        "rmse": error.square().mean().sqrt().item(),
        "frechet": ruler(sample(trainer, ruler.count)),
    }


@torch.no_grad()
def reconstruct(trainer: Trainer, images: Tensor) -> Tensor:
    """E[x|z] at the posterior's mean, clipped, on the CPU."""
    objective = trainer.objective.eval()
    assert isinstance(objective, VAEObjective | LikelihoodObjective)
    chunks = images.split(BATCH_SIZE)
    return torch.cat([objective.mean(objective.model.encode(trainer.batch(x))[0]).clamp(0, 1).cpu() for x in chunks])


@torch.no_grad()
def sample(trainer: Trainer, count: int) -> Tensor:
    """E[x|z] at z ~ N(0, I), the same z for every decoder."""
    objective = trainer.objective.eval()
    assert isinstance(objective, VAEObjective | LikelihoodObjective)
    z = prior(count, objective.model.latent_dim, EVAL_SEED)
    return torch.cat([objective.mean(part.to(trainer.device)).clamp(0, 1).cpu() for part in z.split(BATCH_SIZE)])


def shown(result: dict[str, Any], trainer: Trainer, images: Images) -> dict[str, Any]:
    """A row of the picture."""
    return {**result, "recons": reconstruct(trainer, images.test[:SHOWN]), "samples": sample(trainer, SHOWN)}


def run(args: argparse.Namespace) -> None:
    images = load_8bit(args)
    inception = None if args.inception is None else load_inception(args.inception, images.shape)
    check_begun(args.out, resume=args.resume)
    args.out.mkdir(parents=True, exist_ok=True)
    ruler = Ruler(args.data, images, cache=args.out / "classifier.pt", resume=args.resume, inception=inception)
    if ruler.network is None:
        say(f"--data {args.data}: no labels to train features on, and no --inception: no Fréchet distance")
    common = {
        "data": args.data, "data_shape": [len(images.train), *images.shape], "quick": args.quick, "seed": args.seed,
        "epochs": args.epochs, "width": args.width, "latent_dim": args.latent_dim,
        "inception": None if args.inception is None else str(args.inception),
    }  # fmt: skip
    rows = decoders(args.betas)
    runs = [
        Run(
            row.name,
            {"decoder": row.name, "kind": row.kind, "beta": row.beta, **common},
            partial(build, args=args, images=images),
            partial(measure, decoder=row, images=images, ruler=ruler),
        )
        for row in rows
    ]
    results = train_all(runs, args.out, resume=args.resume)
    for row, result in zip(rows, results, strict=True):
        result |= {"label": row.label, "gives": row.gives}
    floor = {"decoder": "training-images", "label": "Training images", "frechet": ruler(images.train)}
    write_csv(args.out / "metrics.csv", [*results, floor])

    # The best beta is chosen on the validation split, as a reader would choose it.
    best = min((r for r in results if r["beta"] is not None), key=lambda r: r["val_loss"])
    kept = [(r, model) for r, model in zip(results, runs, strict=True) if r["beta"] is None or r is best]
    text = table([*(r for r, _ in kept), floor], ruler.label, ruler.note)
    write_text(args.out / "table.md", text)
    print(text)
    data = {**floor, "title": "Data", "recons": to_unit(images.test[:SHOWN]), "samples": to_unit(images.train[:SHOWN])}
    pictures = [data, *(shown(r, load_finished(model, args.out), images) for r, model in kept)]
    draw(args.out / "calibrated_decoders.png", pictures, results, ruler.label, ruler.note)
    print(f"the picture, the table and every model's numbers are in {args.out}")


def main(argv: Sequence[str] | None = None) -> int:
    return script.main(run, parse_args(argv), argv, MODELS)


if __name__ == "__main__":
    sys.exit(main())
