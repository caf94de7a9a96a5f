"""What gamma = sigma² does to a VAE's objective: slices around an optimum, and the gradients that training sees.

    python examples/objective_slices.py --quick     # the slices are the same; training is shorter
    python examples/objective_slices.py

The data lie on a random low-dimensional subspace; encoder and decoder are one layer each. Then the best encoder for a
decoder is known in closed form, an optimal sparse representation too, and slices through the objective are exact. The
second half trains that VAE with gamma learned, and from the same weights with gamma fixed where the first run ended.

Ctrl-C keeps what is done; the same command with --resume continues it. In --out afterwards:

    objective_slices.png   the picture
    slices.csv             each curve's argmin, width and barrier
    gradients.csv          ‖dL/dz‖ and gamma over training
    results.csv            a row of numbers for each model trained, on the test split
    models/                one folder for each model trained
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from common import cli, script
from common.data import Splits
from common.files import write_csv
from common.latents import active, encode, latent_gradient
from common.mlp import MLPVAE
from common.objective import VAEObjective, make_criterion
from common.sweep import MODELS, Run, train_all
from common.training import Trainer
from torch import Tensor

GAMMAS = (1e-3, 1e-2, 1e-1, 1.0)
COLOURS = ("#332288", "#117733", "#DDAA33", "#CC3311")  # told apart by the colour-blind too (Paul Tol's)
DIMS, INTRINSIC, LATENTS = 20, 5, 10  # of the data's space, of the subspace, of the model
NOISE = 1e-3  # variance beside the subspace, in training: where a learned gamma comes to rest
DIRECTIONS = 32  # random ones, over which the slices' metrics are averaged
POSITIONS = torch.arange(-200, 201, dtype=torch.float64) / 200
HANDED_OVER = torch.arange(-100, 301, dtype=torch.float64) / 200  # of one latent's part, to a superfluous one
SIZES = {"samples": 4000, "batch_size": 100, "lr": 1e-2}


class Subspace:
    """x = W* z with z ~ N(0, I): data on a random subspace, and their optimal sparse decoder as gamma goes to 0.

    W* [DIMS, LATENTS] has INTRINSIC orthogonal columns, one for each direction of the data and as long as its standard
    deviation; the other columns are 0, and so the latents that belong to them cost nothing.
    """

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        directions = torch.randn(DIMS, INTRINSIC, generator=generator, dtype=torch.float64)
        self.basis = torch.linalg.qr(directions).Q
        self.deviations = torch.linspace(0.75, 1.25, INTRINSIC, dtype=torch.float64)
        self.decoder = torch.zeros(DIMS, LATENTS, dtype=torch.float64)
        self.decoder[:, :INTRINSIC] = self.basis * self.deviations
        self.covariance = self.decoder @ self.decoder.T

    def sample(self, count: int, *, noise: float, generator: torch.Generator) -> Tensor:
        z = torch.randn(count, LATENTS, generator=generator, dtype=torch.float64)
        return z @ self.decoder.T + math.sqrt(noise) * torch.randn(count, DIMS, generator=generator).double()

    def random_direction(self, seed: int) -> Tensor:
        """Draws V as long as W*, inside the subspace, so that every W* + tV reconstructs perfectly at gamma = 0."""
        generator = torch.Generator().manual_seed(seed)
        inside = self.basis @ torch.randn(INTRINSIC, LATENTS, generator=generator, dtype=torch.float64)
        return inside * self.decoder.norm() / inside.norm()

    def exchange(self) -> Tensor:
        """Hands the first latent's part to a superfluous one: t = 1 is as good as 0, and half-way both are at work."""
        direction = torch.zeros_like(self.decoder)
        direction[:, 0], direction[:, INTRINSIC] = -self.decoder[:, 0], self.decoder[:, 0]
        return direction


def energy(decoder: Tensor, covariance: Tensor, gamma: float) -> float:
    """The negative ELBO, in nats per sample, of data with that covariance, under the best encoder, which is affine."""
    return float(energies(decoder[None], covariance, gamma))


def energies(decoders: Tensor, covariance: Tensor, gamma: float) -> Tensor:
    """[N], of as many decoders [N, DIMS, LATENTS].

        ½ [ Σ_k log(1 + ‖w_k‖²/γ) + tr(C (WWᵀ + γI)⁻¹) + D log 2πγ ]

    The first sum is the price of the latents. The slope of a term in ‖w_k‖ reaches 1/√γ, at √γ: without bound as γ
    goes to 0, where the term becomes the cusp that keeps a superfluous latent at 0.
    """
    dims = decoders.shape[1]
    marginals = decoders @ decoders.mT + gamma * torch.eye(dims, dtype=decoders.dtype)
    price = torch.log1p(decoders.square().sum(1) / gamma).sum(1)
    fit = torch.linalg.solve(marginals, covariance.expand_as(marginals)).diagonal(dim1=1, dim2=2).sum(1)
    return (price + fit + dims * math.log(2 * math.pi * gamma)) / 2


def along(data: Subspace, direction: Tensor, positions: Tensor, gamma: float) -> Tensor:
    """The energy of W* + tV at these t, shifted and scaled to [0, 1]."""
    curve = energies(data.decoder + positions[:, None, None] * direction, data.covariance, gamma)
    return (curve - curve.min()) / (curve.max() - curve.min())


def lowest(curves: Tensor) -> Tensor:
    """Index of the minimum, and of the first one where rounding alone tells several apart."""
    return (curves < 1e-9).int().argmax(-1)


def slice_curves(data: Subspace, seed: int) -> tuple[list[dict[str, Any]], dict[str, list[Tensor]]]:
    """A row of metrics for each gamma, and the curves that are drawn: of the random directions, the one whose argmin
    is farthest from 0 at the largest gamma.

    displacement   of the argmin from the optimum at 0, root mean square over random directions
    width          of the part of [−1, 1] where the energy is below half of its height: how wide the valley is
    barrier        height of the exchange's curve half-way between its two optima, above the lower of them
    """
    rows, drawn = [], {"random": [], "exchange": []}
    directions = [data.random_direction(1000 * seed + i) for i in range(DIRECTIONS)]
    middle = len(HANDED_OVER) // 2
    for gamma in GAMMAS:
        curves = torch.stack([along(data, direction, POSITIONS, gamma) for direction in directions])
        exchange = along(data, data.exchange(), HANDED_OVER, gamma)
        ends = exchange[[middle // 2, middle + middle // 2]]
        rows.append(
            {
                "gamma": gamma,
                "displacement": float(POSITIONS[lowest(curves)].square().mean().sqrt()),
                "width": float(2 * (curves < 0.5).double().mean()),
                "exchange_argmin": float(HANDED_OVER[lowest(exchange)]),
                "barrier": float(exchange[middle] - ends.min()),
            }
        )
        drawn["random"].append(curves)
        drawn["exchange"].append(exchange)
    moved = POSITIONS[lowest(drawn["random"][-1])].abs().argmax()
    drawn["random"] = [curves[moved] for curves in drawn["random"]]
    return rows, drawn


def make_run(seed: int, epochs: int, gamma: float | None, device: torch.device) -> Run:
    """gamma: None to learn it from 1, as sigma's usual start; a number to keep it there."""
    kind = "learned" if gamma is None else "fixed"
    settings = {"kind": kind, "seed": seed, "epochs": epochs, "gamma": gamma, **SIZES}

    def make_objective() -> VAEObjective:
        torch.manual_seed(seed)
        criterion = make_criterion("learned" if gamma is None else str(math.sqrt(gamma)), 1.0, channels=1)
        return VAEObjective(MLPVAE(DIMS, LATENTS), criterion)

    def build(checkpoint: Path, settings: dict[str, Any]) -> Trainer:
        data = splits(seed)
        return Trainer(
            make_objective(), data, epochs=epochs, batch_size=SIZES["batch_size"], lr=SIZES["lr"], seed=seed,
            device=device, checkpoint=checkpoint, settings=settings, probe=lambda o: probe(o, data.val),
        )  # fmt: skip

    def probe(objective: torch.nn.Module, x: Tensor) -> dict[str, float]:
        return {"gradient": latent_gradient(objective, x)}

    def measure(trainer: Trainer) -> dict[str, Any]:
        x = trainer.images.val
        start = {"epoch": 0, "gamma": gamma or 1.0, **probe(make_objective().to(device), x)}
        curve = [{"epoch": e["epoch"], "gamma": e["val"]["sigma"] ** 2, **e["probe"]} for e in trainer.history]
        test = trainer.evaluate(trainer.images.test)
        _, logvar = encode(trainer.objective.model, trainer.images.test)
        return {
            "final_gamma": test["sigma"] ** 2,
            "loss": test["loss"],
            "active": int(active(logvar).sum()),
            "curve": [start, *curve],
        }

    return Run(f"{kind}-{seed}", settings, build, measure)


def splits(seed: int) -> Splits:
    generator = torch.Generator().manual_seed(seed + 1)
    samples = Subspace(seed).sample(SIZES["samples"] + 1000, noise=NOISE, generator=generator).float()
    return Splits(*samples.split([SIZES["samples"], 500, 500]))


def draw(path: Path, curves: dict[str, list[Tensor]], trained: Sequence[dict[str, Any]]) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.9), layout="constrained")
    for gamma, colour, random, exchange in zip(GAMMAS, COLOURS, curves["random"], curves["exchange"], strict=True):
        for axis, positions, curve in ((axes[0], POSITIONS, random), (axes[1], HANDED_OVER, exchange)):
            axis.plot(positions, curve, color=colour, label=f"γ = {gamma:g}")
            axis.axvline(positions[lowest(curve)], color=colour, linestyle="--", linewidth=1)
    axes[0].set(title="along a random direction V", xlabel="t: the decoder is W* + tV, W* optimal and sparse")
    axes[1].set(title="one latent handed over to a superfluous one", xlabel="share handed over: 0 and 1 are optimal")
    axes[0].set_xticks([-1, -0.5, 0, 0.5, 1])
    axes[1].set_xticks([-0.5, 0, 0.5, 1, 1.5])
    axes[0].set_ylabel("negative ELBO, scaled to [0, 1]")
    axes[0].legend(loc="lower right", fontsize=9)
    draw_gradients(axes[2], trained)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_gradients(axis: Any, trained: Sequence[dict[str, Any]]) -> None:
    for kind, colour, label in (
        ("learned", COLOURS[0], "γ learned"),
        ("fixed", COLOURS[3], "γ fixed where that ended"),
    ):
        for i, row in enumerate(row for row in trained if row["kind"] == kind):
            epochs = [point["epoch"] for point in row["curve"]]
            gradients = [point["gradient"] for point in row["curve"]]
            axis.plot(epochs, gradients, color=colour, linewidth=1.2, label=label if i == 0 else None)
    axis.set(title="gradient at the latents", xlabel="epoch", ylabel="‖∂L/∂z‖, nats (validation mean)", yscale="log")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(fontsize=9)
    axis.grid(alpha=0.3)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("experiment")
    group.add_argument("--epochs", type=cli.positive_int, metavar="N", help="(default: 60; with --quick 20)")
    group.add_argument(
        "--repeats", type=cli.positive_int, metavar="N",
        help="of the training, with the seeds --seed, --seed + 1, … (default: 5; with --quick 2)",
    )  # fmt: skip
    cli.add_sweep_arguments(parser, out=Path("runs/objective_slices"), minutes="one minute")
    args = parser.parse_args(argv)
    cli.settle(args, full={"epochs": 60, "repeats": 5}, quick={"epochs": 20, "repeats": 2})
    return args


def run(args: argparse.Namespace) -> None:
    rows, curves = slice_curves(Subspace(args.seed), args.seed)
    seeds = range(args.seed, args.seed + args.repeats)
    learned = train_all([make_run(s, args.epochs, None, args.device) for s in seeds], args.out, resume=args.resume)
    fixed = [make_run(row["seed"], args.epochs, row["final_gamma"], args.device) for row in learned]
    trained = learned + train_all(fixed, args.out, resume=True)  # beside the models of the line above

    write_csv(args.out / "slices.csv", rows)
    points = [{"kind": row["kind"], "seed": row["seed"], **point} for row in trained for point in row["curve"]]
    write_csv(args.out / "gradients.csv", points)
    write_csv(args.out / "results.csv", [{k: v for k, v in row.items() if k != "curve"} for row in trained])
    draw(args.out / "objective_slices.png", curves, trained)
    for row in rows:
        print(
            f"gamma {row['gamma']:<6g} argmin off by {row['displacement']:.4f}, valley {row['width']:.3f} wide, "
            f"barrier between two optima {row['barrier']:.3f}"
        )
    for row in trained:
        first, last = row["curve"][0], row["curve"][-1]
        print(
            f"{row['kind']}, seed {row['seed']}: ‖dL/dz‖ {first['gradient']:.1f} -> {last['gradient']:.1f}, gamma "
            f"{first['gamma']:.2g} -> {last['gamma']:.2g}, {row['active']} active latents, test loss {row['loss']:.2f}"
        )
    print(f"picture and numbers are in {args.out}")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    return script.main(run, args, argv, MODELS)


if __name__ == "__main__":
    raise SystemExit(main())
