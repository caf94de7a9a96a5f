"""Where z comes from: the prior, or what fits the posteriors of a trained VAE better, at several beta.

    python examples/samplers.py                  # MNIST-5k
    python examples/samplers.py --quick          # scikit-learn's 8x8 digits
    python examples/samplers.py --data sprites   # no labels, so no features for a Fréchet distance: MMD of z only

One VAE that is told beta, and one for each of its betas, sigma decoupled in all; then the samplers of
common/samplers.py on top of them. A sampler is compared with validation and test images by the Fréchet distance of its
samples, in the features of a small classifier, and by the MMD of its z from their posteriors.

Ctrl-C keeps what is trained; the same command with --resume goes on. In --out afterwards:

    samples.png      samples of every row at three betas
    samplers.png     the distances over beta
    samplers.csv     every sampler of every model at every beta
    models/          each model's checkpoint and result, the second stages among them
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import beta_runs, cli, latents, sampler_plots, samplers, script, second_stage
from common.beta_models import CONDITIONING
from common.data import Images, load, load_labels
from common.files import write_csv
from common.grids import grids
from common.metrics import small_classifier
from common.samplers import HeldOut
from common.second_stage import SecondStage
from common.sweep import MODELS, Run, load_finished, train_all
from common.training import Trainer
from torch import Tensor, nn

FULL = {"data": "mnist", "points": 6, "repeats": 3, "epochs": 16, "latent_dim": 16, "width": 8, "stage_epochs": 100}
QUICK = {"data": "digits", "points": 4, "repeats": 1, "epochs": 15, "latent_dim": 8, "width": 16, "stage_epochs": 60}
CLASSIFIER_EPOCHS = 12
TOLD = 16  # β at which a second stage that is told β sees z
SHOWN = 8  # samples of a row at each of three β


class Experiment:
    """All runs of one command: first stages, then second stages, which measure every sampler at their β."""

    def __init__(self, args: argparse.Namespace, images: Images, held_out: HeldOut) -> None:
        self.args, self.images, self.held_out = args, images, held_out
        self.betas = grids(images, args.latent_dim, args.points)["decoupled"]
        self.span = beta_runs.span(self.betas)
        self.runs: list[Run] = []
        self.trained: dict[str, nn.Module] = {}
        names = ("data", "image_size", "grey", "epochs", "latent_dim", "width")
        common = {name: getattr(args, name) for name in names}
        common |= {"family": "decoupled", "data_shape": list(images.train.shape)}
        for seed in range(args.seed, args.seed + args.repeats):
            self._add_seed(common | {"seed": seed})

    def _add_seed(self, common: dict[str, Any]) -> None:
        seed, stage = common["seed"], {name: getattr(self.args, name) for name in ("stage_epochs", "warmup")}
        told = common | {"conditioning": self.args.conditioning, "sigma": self.args.sigma}
        first = {None: Run(
            f"beta-input-seed{seed}", told | {"kind": "beta-input", "stage": 1, "betas": self.betas},
            functools.partial(beta_runs.build_beta_input, self.args, self.images),
            functools.partial(beta_runs.read_beta_input, images=self.images, betas=self.betas),
        )} | {beta: Run(
            f"separate-beta{beta:g}-seed{seed}", common | {"kind": "separate", "stage": 1, "betas": [beta]},
            functools.partial(beta_runs.build_separate, self.args, self.images),
            functools.partial(beta_runs.read_separate, images=self.images, beta=beta),
        ) for beta in self.betas}  # fmt: skip
        self.runs += first.values()
        steps = {"steps": self.args.steps, "top": self.betas[-1]}
        for beta in self.betas:
            self._add_second(first[beta], common | stage | {"kind": "separate", "betas": [beta]})
            self._add_second(first[None], told | stage | steps | {"kind": "beta-input", "betas": [beta]})
        self._add_second(first[None], told | stage | {"kind": "beta-input", "betas": self.betas, "told": TOLD})

    def _add_second(self, first: Run, settings: dict[str, Any]) -> None:
        which = "conditioned" if "told" in settings else f"beta{settings['betas'][0]:g}"
        self.runs.append(Run(
            f"second-{settings['kind']}-{which}-seed{settings['seed']}", settings | {"stage": 2},
            functools.partial(self.build_second, first), functools.partial(self.measure, first),
        ))  # fmt: skip

    def first_stage(self, run: Run) -> nn.Module:
        if run.name not in self.trained:
            self.trained[run.name] = load_finished(run, self.args.out).objective
        return self.trained[run.name]

    def build_second(self, first: Run, checkpoint: Path, settings: dict[str, Any]) -> Trainer:
        betas = self.span.grid(settings["told"]).tolist() if "told" in settings else settings["betas"]
        models = [samplers.at(self.first_stage(first), beta) for beta in betas]
        return second_stage.build(
            models, betas, self.span, self.images, epochs=self.args.stage_epochs, warmup=self.args.warmup,
            device=self.args.device, checkpoint=checkpoint, settings=settings,
        )  # fmt: skip

    def measure(self, first: Run, trainer: Trainer) -> dict[str, Any]:
        rows = []
        for beta in trainer.settings["betas"]:
            model = samplers.at(self.first_stage(first), beta)
            z = latents.draw(*latents.encode(model, self.images.train), seed=trainer.seed)
            found = self.held_out.measure(model, self.draw(first, trainer, beta, self.held_out.count, z), trainer.seed)
            assert isinstance(trainer.objective, SecondStage)
            usage = trainer.objective.usage(beta, z)
            rows += [{"beta": beta, **row, **(usage if row["row"] in STAGES else {})} for row in found]
        return {"rows": rows}

    def draw(self, first: Run, trainer: Trainer, beta: float, count: int, z: Tensor) -> dict[str, Tensor]:
        """z of every row that belongs to this second stage. `z`: one for each training image."""
        stage, seed = trainer.objective, trainer.seed
        assert isinstance(stage, SecondStage)
        own = stage.sample(beta, count, seed)
        if "told" in trainer.settings:
            return {"conditioned": own}
        rows = {
            "prior": latents.prior(count, z.shape[1], seed), "mixture": samplers.mixture(z, count, seed),
            "second-stage": own,
        }  # fmt: skip
        if beta < trainer.settings.get("top", beta):
            model_at = functools.partial(samplers.at, self.first_stage(first))
            for steps in trainer.settings["steps"]:
                rows[f"recursion-{steps}"] = samplers.recursion(
                    model_at, trainer.settings["top"], beta, steps, count, z.shape[1], seed
                )
        return rows | {"posteriors": z[:count]}

    def shown(self, run: Run) -> list[dict[str, Any]]:
        """A few samples of the rows of this second stage."""
        trainer, (first, *_) = load_finished(run, self.args.out), run.build.args
        found = []
        for beta in sampler_plots.three(self.betas):
            if beta in run.settings["betas"]:
                model = samplers.at(self.first_stage(first), beta)
                z = latents.draw(*latents.encode(model, self.images.train), seed=trainer.seed)
                rows = self.draw(first, trainer, beta, SHOWN, z)
                found += [{"kind": run.settings["kind"], "beta": beta, "row": row, "samples": samplers.decode(model, z)}
                          for row, z in rows.items()]  # fmt: skip
        return found


STAGES = ("second-stage", "conditioned")


def rows_of(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each sampler, model and β, with the rate of the first stage there."""
    rates = {
        (m["kind"], m["seed"], p["beta"]): {key: p[key] for key in ("rate", "sse", "sigma")}
        for m in results if m["stage"] == 1 for p in m["points"]
    }  # fmt: skip
    return [
        {"kind": m["kind"], "seed": m["seed"], **row, **rates[m["kind"], m["seed"], row["beta"]]}
        for m in results if m["stage"] == 2 for row in m["rows"]
    ]  # fmt: skip


def held_out(args: argparse.Namespace, images: Images) -> tuple[HeldOut, str]:
    """And a line that says by which features."""
    labels = load_labels(args.data)
    if labels is None:
        return HeldOut(images, None), f"{args.data}: no labels to train features on, so no Fréchet distance"
    network, accuracy = small_classifier(
        images, labels, epochs=CLASSIFIER_EPOCHS, cache=args.out / "classifier.pt", resume=args.resume
    )
    found = HeldOut(images, network.features)
    return found, (
        f"Fréchet: {found.count} samples and {len(found.images)} validation and test images, in features of a small "
        f"classifier (test accuracy {accuracy:.3f}); no FID"
    )


def run(args: argparse.Namespace) -> None:
    images = load(args.data, image_size=args.image_size, grey=args.grey)
    args.out.mkdir(parents=True, exist_ok=True)
    reference, note = held_out(args, images)
    experiment = Experiment(args, images, reference)
    rows = rows_of(train_all(experiment.runs, args.out, resume=args.resume))
    real = {"kind": "images", "row": "training-images", "frechet": reference.frechet(images.train[: reference.count])}
    write_csv(args.out / "samplers.csv", [*rows, real])
    print(note)
    sampler_plots.report(rows, real["frechet"])
    sampler_plots.plot(args.out / "samplers.png", rows, real["frechet"], title=f"{args.data}: samplers over β")
    shown = [run for run in experiment.runs if run.settings["stage"] == 2 and run.settings["seed"] == args.seed]
    pictures = [picture for run in shown for picture in experiment.shown(run)]
    sampler_plots.plot_samples(args.out / "samples.png", pictures, title=f"{args.data}: decoder means at z of each row")
    print(f"pictures and numbers are in {args.out}")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_data_arguments(parser, quick=QUICK["data"])
    group = parser.add_argument_group("models")
    group.add_argument("--conditioning", choices=CONDITIONING, default="film", help="(default: %(default)s)")
    for name, text in (
        ("points", "betas, and so separate VAEs"), ("repeats", "seeds --seed, --seed + 1, ..."),
        ("epochs", "of each VAE"), ("latent_dim", "size of z"), ("width", "channels at half resolution, up to 4W below"),
        ("stage_epochs", "of each second stage"),
    ):  # fmt: skip
        group.add_argument(
            f"--{name.replace('_', '-')}", type=cli.positive_int, metavar="N",
            help=f"{text} (default: {FULL[name]}; --quick: {QUICK[name]})",
        )  # fmt: skip
    group.add_argument("--warmup", type=cli.number(at_least=0), default=0.2, metavar="SHARE",
                       help="of a second stage's training, until beta of its rate is 1 (default: %(default)s)")  # fmt: skip
    group.add_argument("--steps", type=cli.positive_int, nargs="+", default=[1, 4, 16], metavar="T",
                       help="of the recursions from the largest beta (default: 1 4 16)")  # fmt: skip
    cli.add_sweep_arguments(parser, out=Path("runs/samplers"), minutes="about 45 minutes of a core")
    args = parser.parse_args(argv)
    cli.settle(args, full=FULL, quick=QUICK)
    args.sigma = "network"
    if args.points < 3:
        parser.error(f"--points: the pictures have three betas, got {args.points}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    return script.main(run, parse_args(argv), argv, MODELS)


if __name__ == "__main__":
    sys.exit(main())
