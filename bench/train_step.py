"""What share of a training step the loss is, in the VAE of examples/train_vae.py on MNIST-5k.

    python bench/train_step.py [--rounds 50]

A step is taken apart where the loss begins and ends: the network forward; the loss, to the gradients of recon, mu and
logvar; the network backward from there; the optimiser. The loss's share is its time over the sum. The losses take
turns, in random order, on the same network and batch sizes.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import losses
import torch
from measure import Spread
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
import train_vae
from common.data import load
from common.training import Trainer

LOSSES: dict[str, Callable[..., Tensor]] = {
    "fused": partial(losses.fused, "batch"),
    "one_liner": losses.one_liner,
    "stock": losses.stock,
}
WARM_UP = 3


def step(trainer: Trainer, index: Tensor, loss: Callable[..., Tensor]) -> tuple[float, float]:
    """Seconds of the loss, and of the whole step."""
    started = time.perf_counter()
    trainer.optimizer.zero_grad()
    x = trainer.batch(trainer.images.train[index])
    out = trainer.objective.model(x)
    outputs = [out.recon, out.mu, out.logvar]
    recon, mu, logvar = ends = [t.detach().requires_grad_() for t in outputs]  # mu is behind recon: here the loss ends
    before = time.perf_counter()
    gradients = torch.autograd.grad(loss(recon, x, mu, logvar), ends)
    after = time.perf_counter()
    torch.autograd.backward(outputs, gradients)
    trainer.optimizer.step()
    return after - before, time.perf_counter() - started


def share(rounds: int) -> dict[str, Any]:
    """For results.json."""
    with tempfile.TemporaryDirectory() as folder:
        args = train_vae.parse_args(["--out", folder, "--device", "cpu"])
        trainer = train_vae.build_trainer(args, load(args.data, image_size=args.image_size, grey=args.grey))
    trainer.objective.train()
    batches = trainer.epoch_order()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in LOSSES}
    order, shuffled = list(LOSSES), random.Random(0)
    for round_ in range(rounds + WARM_UP):
        shuffled.shuffle(order)
        for name in order:
            own = step(trainer, batches[round_ % len(batches)], LOSSES[name])
            if round_ >= WARM_UP:
                times[name].append(own)
    return {
        "data": args.data,
        "batch": trainer.batch_size,
        "shape": list(trainer.images.shape),
        "parameters": sum(p.numel() for p in trainer.objective.parameters()),
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


def console(found: dict[str, Any]) -> list[str]:
    head = (
        f"Training step of examples/train_vae.py: {found['data']}, batch {found['batch']}, "
        f"{found['parameters'] / 1e6:.2f} M parameters, {found['threads']} threads"
    )
    rows = [
        f"  {name:10} loss {1e3 * of['loss_s']['median']:.2f} ms of {1e3 * of['step_s']['median']:.1f} ms: "
        f"{of['share']['median']:.1%} (quartiles {of['share']['q1']:.1%} to {of['share']['q3']:.1%})"
        for name, of in found["losses"].items()
    ]
    return [head, *rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50, help="timed steps with each loss (default: %(default)s)")
    print("\n".join(console(share(parser.parse_args().rounds))))


if __name__ == "__main__":
    main()
