"""What share of a training step the loss is, in two networks: the convolutional VAE of examples/train_vae.py on
MNIST-5k, and the two linear layers that the README begins with, on images of the same size.

    python bench/train_step.py [--rounds 50]

A step is taken apart where the loss begins and ends: the network forward; the loss, to the gradients of recon, mu and
logvar; the network backward from there; the optimiser. The loss's share is its time over the sum. The losses take
turns, in random order, on the same network and batches.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import losses
import torch
from timing import WARM_UP, Spread
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
import train_vae
from common.data import load

LOSSES: dict[str, Callable[..., Tensor]] = {
    "fused": partial(losses.fused, "batch"),
    "one_liner": losses.one_liner,
    "stock": losses.stock,
}


@dataclass(frozen=True)
class Network:
    describes: str
    reconstruct: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]  # recon, mu, logvar
    optimizer: torch.optim.Optimizer
    batches: list[Tensor]

    @property
    def parameters(self) -> int:
        return sum(p.numel() for group in self.optimizer.param_groups for p in group["params"])


def convolutional() -> Network:
    with tempfile.TemporaryDirectory() as folder:
        args = train_vae.parse_args(["--out", folder, "--device", "cpu"])
        images = load(args.data, image_size=args.image_size, grey=args.grey)
        trainer = train_vae.build_trainer(args, images)
    model = trainer.objective.model.train()

    def reconstruct(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out = model(x)
        return out.recon, out.mu, out.logvar

    batches = [trainer.batch(images.train[index]) for index in trainer.epoch_order()]
    return Network("examples/train_vae.py on MNIST-5k", reconstruct, trainer.optimizer, batches)


def linear(batches: list[Tensor]) -> Network:
    encoder, decoder = nn.Linear(784, 2 * 16), nn.Linear(16, 784)

    def reconstruct(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mu, logvar = encoder(x).chunk(2, dim=1)
        return decoder(mu + torch.randn_like(mu) * (logvar / 2).exp()), mu, logvar

    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=1e-3)
    return Network("the README's two linear layers", reconstruct, optimizer, [x.flatten(1) for x in batches])


def step(network: Network, x: Tensor, loss: Callable[..., Tensor]) -> tuple[float, float]:
    """Seconds of the loss, and of the whole step."""
    started = time.perf_counter()
    network.optimizer.zero_grad()
    outputs = network.reconstruct(x)
    recon, mu, logvar = ends = [t.detach().requires_grad_() for t in outputs]  # mu is behind recon: the loss ends here
    before = time.perf_counter()
    gradients = torch.autograd.grad(loss(recon, x, mu, logvar), ends)
    after = time.perf_counter()
    torch.autograd.backward(outputs, gradients)
    network.optimizer.step()
    return after - before, time.perf_counter() - started


def shares(network: Network, rounds: int) -> dict[str, Any]:
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in LOSSES}
    order, shuffled = list(LOSSES), random.Random(0)
    for round_ in range(rounds + WARM_UP):
        shuffled.shuffle(order)
        for name in order:
            own = step(network, network.batches[round_ % len(network.batches)], LOSSES[name])
            if round_ >= WARM_UP:
                times[name].append(own)
    return {
        "network": network.describes,
        "batch": list(network.batches[0].shape),
        "parameters": network.parameters,
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "losses": {
            name: {
                "loss_s": asdict(Spread.of([loss for loss, _ in own])),
                "step_s": asdict(Spread.of([whole for _, whole in own])),
                "share": asdict(Spread.of([loss / whole for loss, whole in own])),
            }
            for name, own in times.items()
        },
    }


def measure(rounds: int) -> list[dict[str, Any]]:
    """Measures both networks, for results.json."""
    large = convolutional()
    return [shares(network, rounds) for network in (large, linear(large.batches))]


def console(found: list[dict[str, Any]]) -> list[str]:
    lines = []
    for of in found:
        lines.append(
            f"A training step of {of['network']}: batch {of['batch'][0]}, {of['parameters'] / 1e6:.2f} M parameters, "
            f"{of['threads']} threads"
        )
        lines += [
            f"  {name:10} loss {1e3 * t['loss_s']['median']:.2f} ms of {1e3 * t['step_s']['median']:.2f} ms: "
            f"{t['share']['median']:.1%} (quartiles {t['share']['q1']:.1%} to {t['share']['q3']:.1%})"
            for name, t in of["losses"].items()
        ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50, help="timed steps with each loss (default: %(default)s)")
    print("\n".join(console(measure(parser.parse_args().rounds))))


if __name__ == "__main__":
    main()
