"""Where z comes from: the prior, or what fits the posteriors of a trained VAE better, at several beta.

    python examples/samplers.py                  # MNIST-5k
    python examples/samplers.py --quick          # scikit-learn's 8x8 digits
    python examples/samplers.py --data sprites   # without labels there is no Fréchet distance: MMD of z only
    python examples/samplers.py --out runs/beta_input --resume   # the models that beta_input.py has trained

The models are the decoupled ones of beta_input.py, one that is told beta and one for each beta; the samplers of
common/samplers.py stand on top of them. A sampler is compared with images that no model was trained on, by the Fréchet
distance of its samples, and by the MMD of its z from the posteriors of those images.

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

import beta_input
from common import beta_runs, cli, latents, sampler_plots, samplers, script, second_stage
from common.at_beta import at
from common.beta_models import CONDITIONING
from common.data import Images, load
from common.files import write_csv
from common.grids import grids
from common.mmd import check_enough
from common.ruler import Ruler
from common.second_stage import SecondStage
from common.sweep import MODELS, Run, check_begun, load_finished, train_all
from common.training import EVAL_SEED, Trainer
from torch import Tensor, nn

FULL: dict[str, Any] = beta_input.FULL | {"stage_epochs": 60}
QUICK: dict[str, Any] = beta_input.QUICK | {"stage_epochs": 60}
COUNTS = {
    "points": "betas, and so separate VAEs", "repeats": "seeds --seed, --seed + 1, ...", "epochs": "of each VAE",
    "latent_dim": "size of z", "width": "channels at half resolution", "stage_epochs": "of each second stage",
}  # fmt: skip
TOLD = 16  # β at which a second stage that is told β sees z
SHOWN = 8  # samples of a row at each of three β
STAGES = ("second-stage", "conditioned")  # the rows that a second stage draws


class Experiment:
    """All runs of one command: first stages, then second stages, which measure every sampler at their β."""

    def __init__(self, args: argparse.Namespace, images: Images, ruler: Ruler) -> None:
        self.args, self.images, self.ruler = args, images, ruler
        grid = grids(images, args.latent_dim, args.points)
        self.betas = grid["decoupled"]
        self.span = beta_runs.span(self.betas)
        self.firsts = [
            run for run in beta_runs.sweep(args, images, grid, ruler) if run.settings["family"] == "decoupled"
        ]
        self.seconds = [second for first in self.firsts for second in self._seconds(first)]
        self.trained: dict[str, nn.Module] = {}

    def _seconds(self, first: Run) -> list[Run]:
        """One for each β of the model; and of a model that is told β, one for all of them."""
        own = first.settings | {name: getattr(self.args, name) for name in ("stage_epochs", "warmup")}
        each = {f"beta{beta:g}": own | {"betas": [beta]} for beta in first.settings["betas"]}
        if first.settings["kind"] == "beta-input":
            recursion = {"steps": self.args.steps, "top": self.args.top or self.betas[-1]}
            each = {name: settings | recursion for name, settings in each.items()} | {"told": own | {"told": TOLD}}
        return [
            Run(
                f"second-{name}-of-{first.name}", settings, functools.partial(self.build_second, first),
                functools.partial(self.measure, first),
            )
            for name, settings in each.items()
        ]  # fmt: skip

    def first_stage(self, run: Run) -> nn.Module:
        if run.name not in self.trained:
            self.trained[run.name] = load_finished(run, self.args.out).objective
        return self.trained[run.name]

    def build_second(self, first: Run, checkpoint: Path, settings: dict[str, Any]) -> Trainer:
        betas = self.span.grid(settings["told"]).tolist() if "told" in settings else settings["betas"]
        models = [at(self.first_stage(first), beta) for beta in betas]
        return second_stage.build(
            models, betas, self.span, self.images, epochs=self.args.stage_epochs, warmup=self.args.warmup,
            device=self.args.device, checkpoint=checkpoint, settings=settings,
        )  # fmt: skip

    def measure(self, first: Run, trainer: Trainer) -> dict[str, Any]:
        """Every row that belongs to this second stage, at each of its β."""
        rows, stage = [], trainer.objective
        assert isinstance(stage, SecondStage)
        for beta in trainer.settings["betas"]:
            model, z, drawn = self.draw(first, trainer, beta, self.ruler.count)
            usage = stage.usage(beta, z)
            for row in samplers.measure(model, drawn, self.images, self.ruler):
                rows.append({"beta": beta, **row, **(usage if row["row"] in STAGES else {})})
        return {"rows": rows}

    def draw(
        self, first: Run, trainer: Trainer, beta: float, count: int
    ) -> tuple[nn.Module, Tensor, dict[str, Tensor]]:
        """The first stage at β, one z for each training image, and the z of each row."""
        settings, stage, seed = trainer.settings, trainer.objective, trainer.seed
        assert isinstance(stage, SecondStage)
        model = at(self.first_stage(first), beta)
        z = latents.draw(*latents.encode(model, self.images.train), seed)
        own = stage.sample(beta, count, seed)
        if "told" in settings:
            return model, z, {"conditioned": own}
        rows = {
            "prior": latents.prior(count, z.shape[1], EVAL_SEED), "mixture": samplers.mixture(z, count, seed),
            "second-stage": own,
        }  # fmt: skip
        if beta < settings.get("top", beta):
            model_at = functools.partial(at, self.first_stage(first))
            for steps in settings["steps"]:
                rows[f"recursion-{steps}"] = samplers.recursion(
                    model_at, settings["top"], beta, steps, count, z.shape[1], seed
                )
        return model, z, rows | {"posteriors": z[:count]}

    def shown(self, first: Run, second: Run) -> list[dict[str, Any]]:
        """A few samples of the rows of this second stage."""
        trainer, kind, found = load_finished(second, self.args.out), second.settings["kind"], []
        for beta in sampler_plots.three(self.betas):
            if beta in second.settings["betas"]:
                model, _, rows = self.draw(first, trainer, beta, SHOWN)
                for row, z in rows.items():
                    found.append({"kind": kind, "beta": beta, "row": row, "samples": latents.images_of(model, z)})
        return found


def rows_of(firsts: Sequence[dict[str, Any]], seconds: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each sampler, model and β, with the rate, the error and σ of the first stage there."""
    points = {
        (m["kind"], m["seed"], p["beta"]): {key: p[key] for key in ("rate", "sse", "sigma")}
        for m in firsts for p in m["points"]
    }  # fmt: skip
    return [
        {"kind": m["kind"], "seed": m["seed"], **row, **points[m["kind"], m["seed"], row["beta"]]}
        for m in seconds for row in m["rows"]
    ]  # fmt: skip


def run(args: argparse.Namespace) -> None:
    images = load(args.data, image_size=args.image_size, grey=args.grey)
    check_enough(images, args.data)
    check_begun(args.out, resume=args.resume)
    args.out.mkdir(parents=True, exist_ok=True)
    ruler = Ruler(args.data, images, cache=args.out / "classifier.pt", resume=args.resume)
    experiment = Experiment(args, images, ruler)
    results = train_all([*experiment.firsts, *experiment.seconds], args.out, resume=args.resume)
    count = len(experiment.firsts)
    rows = rows_of(results[:count], results[count:])
    real = ruler(images.train)
    write_csv(args.out / "samplers.csv", [*rows, {"kind": "images", "row": "training images", "frechet": real}])
    sampler_plots.report(rows, real)
    print(f"\n{ruler.label}: {ruler.note}")
    sampler_plots.plot(args.out / "samplers.png", rows, real, title=f"{args.data}, decoupled")
    shown = [
        picture for first in experiment.firsts if first.settings["seed"] == args.seed
        for second in experiment.seconds if second.name.endswith(f"-of-{first.name}")
        for picture in experiment.shown(first, second)
    ]  # fmt: skip
    sampler_plots.plot_samples(args.out / "samples.png", shown, title=f"{args.data}: decoder means at z of each row")
    print(f"pictures and numbers are in {args.out}")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_data_arguments(parser, quick=QUICK["data"])
    group = parser.add_argument_group("models, the first stages as beta_input.py has them")
    group.add_argument("--conditioning", choices=CONDITIONING, help=f"(default: {FULL['conditioning']})")
    cli.add_counts(group, COUNTS, full=FULL, quick=QUICK)
    group.add_argument(
        "--warmup", type=cli.number(at_least=0), default=0.0, metavar="SHARE",
        help="of a second stage's training, until beta of its rate is 1 (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--steps", type=cli.positive_int, nargs="+", default=[1, 4, 16], metavar="T",
        help="of the recursions (default: 1 4 16)",
    )  # fmt: skip
    group.add_argument(
        "--top", type=cli.number(above=0), metavar="B", help="where the recursions start (default: the largest beta)"
    )
    cli.add_sweep_arguments(parser, out=Path("runs/samplers"), minutes="about 35 minutes of one")
    args = parser.parse_args(argv)
    args.sigma = None  # beta_input.py's
    cli.settle(args, full=FULL, quick=QUICK)
    if args.points < 3:
        parser.error(f"--points: at least 3, for the betas of the pictures, got {args.points}")
    if args.warmup > 1:
        parser.error(f"--warmup: a share of the training, from 0 to 1, got {args.warmup:g}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    return script.main(run, parse_args(argv), argv, MODELS)


if __name__ == "__main__":
    sys.exit(main())
