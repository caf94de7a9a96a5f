"""Train a convolutional VAE with decoupled sigma and beta; see its digits, its curves and its numbers.

    python examples/train_vae.py                                  # MNIST-5k, one to three minutes on two CPU cores
    python examples/train_vae.py --sigma 0.70711 --beta 1         # what "squared error + KL" means: sigma^2 = 1/2
    python examples/train_vae.py --data digits --beta 2 --epochs 100
    python examples/train_vae.py --sigma learned --beta 1         # the plain ELBO, sigma trained like a weight
    python examples/train_vae.py --data photos/ --image-size 64   # a folder of images
    torchrun --nproc-per-node 2 examples/train_vae.py --device cpu # the same batches, shared by two processes

Ctrl-C keeps the run; the same command with --resume continues it. In --out afterwards:

    images.png       test images over their reconstructions; below, samples from the prior
    curves.png       distortion, rate and sigma over the epochs
    metrics.json     the numbers on the test split, which training never saw
    settings.json    what this run was asked to do
    checkpoint.pt    weights, optimiser, history, random states
"""

from __future__ import annotations

import argparse
import math
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import cli, ranks, script
from common.checkpoint import check_same_settings, load_checkpoint
from common.data import Images, load
from common.files import write_json
from common.objective import ANALYTIC, VAEObjective, bits_per_dim, make_objective
from common.plots import plot_history, plot_images
from common.script import say
from common.training import EVAL_SEED, Trainer

import fused_elbo
from fused_elbo.backends import statuses

NOT_SETTINGS = ("out", "resume", "device", "compile")  # a run may be resumed elsewhere and still be the same run
CHECKPOINT = "checkpoint.pt"
COLUMNS, ROWS = 12, 4  # of the picture, samples; and originals with reconstructions


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=cli.SIGMA_HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cli.add_data_arguments(parser)
    loss = cli.add_sigma_arguments(parser)
    loss.add_argument(
        "--beta", type=cli.number(at_least=0), default=16.0, metavar="B",
        help="weight of the rate. 1: the ELBO, the sharpest reconstructions; larger: better samples, blurrier "
        "reconstructions. Distortion grows with the number of pixels, so smaller images want a smaller beta "
        "(default: %(default)s)",
    )  # fmt: skip
    model = parser.add_argument_group("model")
    model.add_argument("--latent-dim", type=cli.positive_int, default=16, metavar="K", help="(default: %(default)s)")
    model.add_argument(
        "--width", type=cli.positive_int, default=32, metavar="W",
        help="channels at half resolution, up to 4W below (default: %(default)s)",
    )  # fmt: skip
    cli.add_training_arguments(parser, epochs=25, batch_size=64, lr=2e-3, out=Path("runs/train_vae"))
    args = parser.parse_args(argv)
    if args.min_log_sigma is not None and args.sigma not in (*ANALYTIC, "per-pixel"):
        parser.error(f"--min-log-sigma has no effect with --sigma {args.sigma}")
    if args.sigma == "per-pixel" and args.min_log_sigma is not None and args.min_log_sigma >= 0:
        parser.error("--min-log-sigma must be below 0, the upper bound, with --sigma per-pixel")
    cli.check_ranks(parser, args)
    return args


def build_trainer(args: argparse.Namespace, images: Images) -> Trainer:
    settings = {key: value for key, value in vars(args).items() if key not in NOT_SETTINGS}
    settings["data_shape"] = [len(images.train), *images.shape]  # notices a folder whose content has changed
    torch.manual_seed(args.seed)
    objective = make_objective(
        images.shape, args.sigma, args.beta, latent_dim=args.latent_dim, width=args.width,
        min_log_sigma=args.min_log_sigma, init_log_sigma=images.log_std,
    )  # fmt: skip
    if ranks.count() > 1:
        settings["processes"] = ranks.count()
        ranks.seed_noise(args.seed)
    return Trainer(
        objective, images, epochs=args.epochs, batch_size=args.batch_size, lr=args.lr, seed=args.seed,
        device=args.device, checkpoint=args.out / CHECKPOINT, settings=settings, compile=args.compile,
    )  # fmt: skip


def start(trainer: Trainer, *, resume: bool) -> None:
    """Load the checkpoint, or make room for a new one."""
    if resume:
        checkpoint = load_checkpoint(trainer.checkpoint)
        check_same_settings(checkpoint["settings"], trainer.settings)
        trainer.load_state_dict(checkpoint["trainer"])
        say(f"resuming in epoch {trainer.epoch + 1} of {trainer.epochs}, step {trainer.step + 1}")
    elif ranks.is_first() and trainer.checkpoint.exists():
        previous = trainer.checkpoint.with_name("checkpoint.previous.pt")
        os.replace(trainer.checkpoint, previous)
        say(f"starting anew; the checkpoint of the run before is kept as {previous}")
    if ranks.is_first():
        write_json(trainer.checkpoint.with_name("settings.json"), trainer.settings)


def test_metrics(trainer: Trainer) -> dict[str, Any]:
    """What the run is judged by, on the test split.

    -log p(x) <= distortion + rate, in nats for x in [0, 1] as a continuous density. One 8-bit grey level is 1/255 wide
    there, so P(level) is about p(x) / 255 and the same bound for 8-bit images is log2(255) bits per dimension higher.
    """
    images = trainer.images
    test = trainer.evaluate(images.test)
    bound = bits_per_dim(test["distortion"] + test["rate"], images.dims)
    sigma_mode = trainer.settings["sigma"]
    note = "sigma is fixed before the test images are seen: distortion + rate bounds -log p(x)"
    if sigma_mode in ANALYTIC:
        note = "sigma is the running average over training, not the test images' own: " + note.split(": ")[1]
    if sigma_mode == "optimal-per-image":
        note += "; the per-image distortions in `history` are no bound, since there sigma sees x"
    return {
        **test,
        "bits_per_dim": bound,
        "bits_per_dim_8bit": bound + math.log2(255) if images.is_8bit else None,
        "dims": images.dims,
        "note": note,
        "seconds": trainer.seconds,
        "settings": trainer.settings,
        "history": trainer.history,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "fused_elbo": fused_elbo.__version__,
        },
        "backends_ready": [status.name for status in statuses() if status.ready],
        "device": str(trainer.device),
    }


@torch.no_grad()
def draw(trainer: Trainer, folder: Path, metrics: dict[str, Any]) -> None:
    objective = trainer.objective
    assert isinstance(objective, VAEObjective)
    model = objective.model.eval()
    originals = trainer.batch(trainer.images.test[: COLUMNS * ROWS // 2])
    z = torch.randn(COLUMNS * ROWS, model.latent_dim, generator=torch.Generator().manual_seed(EVAL_SEED))
    recons, _ = model.decode(model.encode(originals)[0])
    samples, _ = model.decode(z.to(trainer.device))
    settings = trainer.settings
    title = f"{settings['data']}, sigma = {settings['sigma']}, β = {settings['beta']:g}"
    numbers = f"test distortion {metrics['distortion']:.1f}, rate {metrics['rate']:.1f}, sigma {metrics['sigma']:.3f}"
    plot_images(folder / "images.png", originals, recons, samples, columns=COLUMNS, title=f"{title}: {numbers}")
    plot_history(folder / "curves.png", trainer.history, title=title)


def run(args: argparse.Namespace) -> None:
    images = load(args.data, image_size=args.image_size, grey=args.grey)
    args.out.mkdir(parents=True, exist_ok=True)
    trainer = build_trainer(args, images)
    start(trainer, resume=args.resume)
    trainer.fit()
    metrics = test_metrics(trainer)
    if not ranks.is_first():
        return
    write_json(args.out / "metrics.json", metrics)
    draw(trainer, args.out, metrics)
    print(
        f"test: loss {metrics['loss']:.2f} = distortion {metrics['distortion']:.2f} + {args.beta:g} x rate "
        f"{metrics['rate']:.2f} nats per image; sigma {metrics['sigma']:.4f}; {metrics['bits_per_dim']:.3f} bits per "
        f"dimension on [0, 1]; {trainer.seconds:.0f} s\nimages, curves and metrics are in {args.out}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    return script.main(run, args, argv, CHECKPOINT)


if __name__ == "__main__":
    ranks.join()
    ranks.leave(main())
