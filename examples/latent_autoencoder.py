"""An autoencoder for latent diffusion, trained with this library's loss and with the one of public trainers.

    python examples/latent_autoencoder.py --quick          # drawn sprites of 32x32
    python examples/latent_autoencoder.py                  # the same for longer, and the learned scale beside them
    python examples/latent_autoencoder.py --precision bf16 --device cuda --data photos/ --image-size 256

Spatial latents (4 channels at a quarter of the resolution), Laplace likelihood, a perceptual term, and a discriminator
of patches under the adaptive weight. --loss names the losses that are trained from the same weights:

    ours      one call: the scale in closed form, the perceptual term inside it
    theirs    the same function in plain PyTorch, line by line as public trainers write their losses
    learned   theirs with a scale that is trained, as Stability-AI/generative-models has it

Ctrl-C keeps what is done; the same command with --resume continues it. In --out afterwards:

    latent_autoencoder.png   test images, their reconstructions and latents; curves; what the loss costs
    results.csv              a row of numbers for each loss, on the test split, and what its loss part costs
    curves.csv               the same after each epoch, on the validation split
    models/                  one folder for each model trained
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from common import cli, ranks, script
from common.adversarial import AdversarialTrainer, LatentObjective, centred
from common.data import Images, load
from common.files import write_csv
from common.latent_models import LatentAutoencoder
from common.loss_cost import loss_costs
from common.plots import tile
from common.sweep import MODELS, Run, load_finished, train_all
from torch import Tensor, nn

from fused_elbo import ELBO, DecoupledELBO

LOGVAR_RANGE = (-30.0, 20.0)
MOMENTUM = 0.1  # of the running scale that stands in for the closed form in evaluation
FULL = {"epochs": 12, "loss": ["ours", "theirs", "learned"]}
QUICK = {"epochs": 3, "loss": ["ours", "theirs"]}
SHOWN = 12  # images in the picture
STYLES = {  # label, colour, line
    "ours": ("ours", "#DDAA33", {"lw": 5}),
    "theirs": ("theirs", "#004488", {"lw": 1.5}),
    "learned": ("theirs, scale learned", "#BB5566", {"lw": 1.5, "ls": "--"}),
}
COLUMNS = {  # of the table: key, heading, format
    "loss": ("−ELBO, nats", ".1f"),
    "rate": ("rate, nats", ".1f"),
    "sigma": ("scale b", ".5f"),
    "mae": ("mean abs. error", ".5f"),
    "psnr": ("PSNR, dB", ".2f"),
    "features": ("feature distance", ".4f"),
    "latent_std": ("latents' std", ".3f"),
    "loss_ms": ("loss part, ms", ".1f"),
    "loss_mib": ("kept for backward, MiB", ".1f"),
}


class Ours(nn.Module):
    """A_i = Σ|e| + D·w·p_i, and everything else is an option."""

    reads_bytes = True

    def __init__(self, perceptual: float, beta: float) -> None:
        super().__init__()
        self.perceptual = perceptual
        self.criterion = DecoupledELBO(
            beta, likelihood="laplace", logvar_range=LOGVAR_RANGE, target_range=(-1, 1), momentum=MOMENTUM
        )

    def forward(self, recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor, p: Tensor) -> ELBO:
        return self.criterion(recon, x, mu, logvar, extra_error=recon[0].numel() * self.perceptual * p)


class Theirs(nn.Module):
    """Each pixel's error and its image's perceptual term, over the scale, plus the scale's logarithm; then the sums.

    The scale is the closed form, in training of the batch and in evaluation of a running average: `Ours` in full. With
    `learned` it is a parameter.
    """

    reads_bytes = False

    def __init__(self, perceptual: float, beta: float, *, learned: bool) -> None:
        super().__init__()
        self.perceptual, self.beta, self.learned = perceptual, beta, learned
        if learned:
            self.log_sigma = nn.Parameter(torch.zeros(()))
        else:
            self.register_buffer("running_square", torch.tensor(math.nan))

    def scale(self, error: Tensor) -> Tensor:
        if self.learned:
            return self.log_sigma
        if not self.training:
            return 0.5 * self.running_square.log()
        log_scale = error.detach().mean().log().clamp(min=-7)
        square = (2 * log_scale).exp()
        first = self.running_square.isnan()
        self.running_square.copy_(torch.where(first, square, self.running_square.lerp(square, MOMENTUM)))
        return log_scale

    def forward(self, recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor, p: Tensor) -> ELBO:
        error = torch.abs(x - recon) + self.perceptual * p.view(-1, 1, 1, 1)
        log_scale = self.scale(error)
        nll = error / torch.exp(log_scale) + log_scale + math.log(2)
        distortion = torch.sum(nll) / nll.shape[0]
        logvar = torch.clamp(logvar, *LOGVAR_RANGE)
        rate = 0.5 * torch.sum(torch.pow(mu, 2) + torch.exp(logvar) - 1.0 - logvar, dim=[1, 2, 3])
        rate = torch.sum(rate) / rate.shape[0]
        return ELBO(distortion + self.beta * rate, distortion, rate, log_scale.detach().exp())


def make_loss(kind: str, perceptual: float, beta: float) -> nn.Module:
    return Ours(perceptual, beta) if kind == "ours" else Theirs(perceptual, beta, learned=kind == "learned")


def gan_start(epochs: int) -> int:
    """After how many epochs the discriminator begins."""
    return max(1, epochs // 3)


def make_run(args: argparse.Namespace, images: Images, kind: str) -> Run:
    settings = {
        "kind": kind, "seed": args.seed, "data": args.data, "epochs": args.epochs, "width": args.width,
        "latent_channels": args.latent_channels, "batch_size": args.batch_size, "lr": args.lr, "beta": args.beta,
        "perceptual": args.perceptual, "gan": args.gan, "ema": args.ema, "precision": args.precision,
        "data_shape": [len(images.train), *images.shape],
    }  # fmt: skip

    def build(checkpoint: Path, settings: dict[str, Any]) -> AdversarialTrainer:
        torch.manual_seed(args.seed)
        model = LatentAutoencoder(images.shape, args.latent_channels, args.width)
        loss = make_loss(kind, args.perceptual, args.beta)
        objective = LatentObjective(model, loss, bf16=args.precision == "bf16")
        return AdversarialTrainer(
            objective, images, epochs=args.epochs, batch_size=args.batch_size, lr=args.lr, seed=args.seed,
            device=args.device, checkpoint=checkpoint, settings=settings,
            gan=args.gan, gan_start=gan_start(args.epochs), ema=args.ema,
        )  # fmt: skip

    return Run(f"{kind}-{args.seed}", settings, build, measure)


@torch.no_grad()
def measure(trainer: AdversarialTrainer) -> dict[str, Any]:
    test = trainer.evaluate(trainer.images.test)
    mu, _ = trainer.model.encode(centred(trainer.batch(trainer.images.test)))
    return {
        **test,
        "psnr": psnr(test["mse"]),
        "latent_std": mu.std().item(),
        "curve": [{"epoch": e["epoch"], "train_sigma": e["train"]["sigma"], **e["val"]} for e in trainer.history],
    }


def psnr(mse: float) -> float:
    """Of images in [-1, 1], in decibels."""
    return 10 * math.log10(4 / mse)


def table(results: Sequence[dict[str, Any]]) -> str:
    lines = ["| | " + " | ".join(heading for heading, _ in COLUMNS.values()) + " |", "|---" * (1 + len(COLUMNS)) + "|"]
    for row in results:
        cells = (f"{row[key]:{form}}" for key, (_, form) in COLUMNS.items())
        lines.append(f"| {STYLES[row['kind']][0]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


@torch.no_grad()
def pictures(trainers: dict[str, AdversarialTrainer], images: Images) -> dict[str, Tensor]:
    """A row each, in [0, 1]: test images, reconstructions of each model, and the first model's latents as colours."""
    first = next(iter(trainers.values()))
    x = first.batch(images.test[:SHOWN])
    rows = {"test images": centred(x)}
    rows |= {f"{STYLES[kind][0]}: reconstructions": trainer.reconstruct(x) for kind, trainer in trainers.items()}
    mu = first.model.encode(centred(x))[0].float()[:, :3]
    mu = mu / (2 * mu.std((0, 2, 3), keepdim=True))
    mu = F.interpolate(mu if mu.shape[1] == 3 else mu[:, :1], size=images.shape[1:], mode="nearest")
    rows["latents, the first three channels as red, green and blue"] = mu
    return {label: (row / 2 + 0.5).clamp(0, 1).cpu() for label, row in rows.items()}


def plot(path: Path, rows: dict[str, Tensor], results: Sequence[dict[str, Any]]) -> None:
    figure = plt.figure(figsize=(13, 1.35 * len(rows) + 3.6), layout="constrained")
    grid = figure.add_gridspec(len(rows) + 1, 4, height_ratios=[1.3] * len(rows) + [3.2], width_ratios=[4, 4, 2, 2])
    for i, (label, row) in enumerate(rows.items()):
        axis = figure.add_subplot(grid[i, :])
        axis.imshow(tile(row, SHOWN), interpolation="nearest")
        axis.set_title(label, loc="left", fontsize=10)
        axis.axis("off")
    curves, scales, times, sizes = (figure.add_subplot(grid[-1, i]) for i in range(4))
    for row in results:
        label, colour, line = STYLES[row["kind"]]
        epochs = [point["epoch"] for point in row["curve"]]
        curves.plot(epochs, [point["loss"] for point in row["curve"]], color=colour, label=label, **line)
        scales.plot(epochs, [point["train_sigma"] for point in row["curve"]], color=colour, **line)
        times.bar(label.replace(" ", "\n"), row["loss_ms"], color=colour)
        sizes.bar(label.replace(" ", "\n"), row["loss_mib"], color=colour)
    curves.set(title="−ELBO on validation images (nats)", xlabel="epoch")
    if any(row["gan"] for row in results):
        curves.axvline(gan_start(results[0]["epochs"]), color="grey", ls=":", label="the discriminator begins")
    curves.legend(frameon=False)
    scales.set(title="scale b in training", xlabel="epoch", ylim=(0, None))
    for axis in (curves, scales):
        axis.grid(alpha=0.3)
    for axis, key, title in ((times, "loss_ms", "loss part: ms"), (sizes, "loss_mib", "MiB until backward")):
        axis.set(title=title, ylim=(0, 1.1 * max(0.1, *(row[key] for row in results))))
        for i, row in enumerate(results):
            axis.text(i, row[key], f"{row[key]:.1f}", ha="center", va="bottom", fontsize=9)
        axis.tick_params(axis="x", labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_data_arguments(parser, full="sprites")
    loss = parser.add_argument_group("loss")
    loss.add_argument(
        "--loss", nargs="+", choices=list(STYLES), metavar="LOSS",
        help=f"any of {', '.join(STYLES)} (default: {' '.join(FULL['loss'])}; with --quick {' '.join(QUICK['loss'])})",
    )  # fmt: skip
    at_least_0 = cli.number(at_least=0)
    for name, default, meaning in (
        ("beta", 0.1, "weight of the rate"),
        ("perceptual", 0.2, "weight of the feature distance, beside a pixel's mean absolute error"),
        ("gan", 0.5, "weight of the discriminator, beside the adaptive one; it begins after a third of the epochs"),
    ):
        loss.add_argument(
            f"--{name}", type=at_least_0, default=default, metavar="W", help=f"{meaning} (default: %(default)s)"
        )
    group = parser.add_argument_group("models")
    group.add_argument("--epochs", type=cli.positive_int, metavar="N",
                       help=f"(default: {FULL['epochs']}; with --quick {QUICK['epochs']})")  # fmt: skip
    for name, default in (("latent-channels", 4), ("width", 64), ("batch-size", 16)):
        group.add_argument(f"--{name}", type=cli.positive_int, default=default, metavar="N",
                           help="(default: %(default)s)")  # fmt: skip
    group.add_argument("--lr", type=cli.number(above=0), default=4e-3, metavar="LR", help="(default: %(default)s)")
    group.add_argument(
        "--ema", type=at_least_0, default=0.0, metavar="D",
        help="evaluate an average of the weights with this decay, 0.999 say (default: none)",
    )  # fmt: skip
    group.add_argument(
        "--precision", choices=("fp32", "bf16"),
        help="bf16 is autocast, as public trainers run; many CPUs have no bf16 arithmetic, and take far longer for it "
        "(default: fp32 on CPUs, bf16 elsewhere)",
    )  # fmt: skip
    cli.add_sweep_arguments(parser, out=Path("runs/latent_autoencoder"), minutes="eight minutes")
    args = parser.parse_args(argv)
    cli.settle(args, full=FULL, quick=QUICK)
    if ranks.count() > 1:
        parser.error("this script runs in one process: start it without torchrun")
    if args.ema >= 1:
        parser.error(f"--ema must be below 1, got {args.ema:g}")
    if len(set(args.loss)) < len(args.loss):
        parser.error(f"--loss must differ, got {' '.join(args.loss)}")
    args.precision = args.precision or ("fp32" if args.device.type == "cpu" else "bf16")
    return args


def run(args: argparse.Namespace) -> None:
    images = load(args.data, image_size=args.image_size, grey=args.grey)
    runs = [make_run(args, images, kind) for kind in args.loss]
    results = train_all(runs, args.out, resume=args.resume)
    losses = {kind: make_loss(kind, args.perceptual, args.beta) for kind in args.loss}
    costs = loss_costs(losses, args.latent_channels, args.device, bf16=args.precision == "bf16")
    results = [row | costs[row["kind"]] for row in results]
    write_csv(args.out / "results.csv", [{k: v for k, v in row.items() if k != "curve"} for row in results])
    write_csv(args.out / "curves.csv", [{"kind": row["kind"], **point} for row in results for point in row["curve"]])
    trainers = {r.settings["kind"]: load_finished(r, args.out) for r in runs}
    plot(args.out / "latent_autoencoder.png", pictures(trainers, images), results)
    print(f"{table(results)}\n\npicture and numbers are in {args.out}")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    return script.main(run, args, argv, MODELS)


if __name__ == "__main__":
    raise SystemExit(main())
