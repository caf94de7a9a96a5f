"""How long a training step of the loss takes, beside the code it replaces.

    python bench/run.py [--rounds 30] [--threads 2] [--compiled]

A step is forward and backward of the loss alone, to the gradients of recon, mu and logvar. All providers take turns in
every round, on the same tensors in one process, so that a noisy machine slows all alike; reported are medians, and the
median over the rounds of each provider's time divided by fused_elbo's. Every provider's gradients are compared with
fp64 before it is timed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import baselines
import torch
from torch import Tensor

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor | None]  # None: backward has been called already
CASES = [(1, 1), (64, 1, 28, 28), (128, 3, 64, 64), (16, 3, 256, 256)]
LATENTS = 128
OURS = (baselines.fused, baselines.single_pass, baselines.reference)


def make(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(shape, generator=generator)
    recon = target + 0.1 * torch.randn(shape, generator=generator)
    latents = torch.randn(2, shape[0], LATENTS, generator=generator)
    tensors = [recon, target, *latents.unbind(0)]
    return [t.to(dtype).requires_grad_(i != 1) for i, t in enumerate(tensors)]


def step(loss: Loss, tensors: list[Tensor]) -> list[Tensor]:
    recon, _, mu, logvar = tensors
    wanted, total = [recon, mu, logvar], loss(*tensors)
    if total is not None:
        return list(torch.autograd.grad(total, wanted))
    gradients = [t.grad for t in wanted]
    for t in wanted:
        t.grad = None
    return gradients


def check(name: str, loss: Loss, shape: tuple[int, ...]) -> None:
    """Against fp64: ours against the one-liner, which is the same loss; a baseline against itself."""
    exact = baselines.one_liner if loss in OURS else loss
    truth = step(exact, make(shape, torch.float64))
    for got, true in zip(step(loss, make(shape)), truth, strict=True):
        worst = ((got.double() - true).abs().max() / true.abs().max()).item()
        if not worst < 1e-4:
            raise SystemExit(f"{name} at {shape}: gradients differ from fp64 by {worst:.1e}, so its time means nothing")


def measure(providers: dict[str, Loss], shape: tuple[int, ...], rounds: int) -> dict[str, list[float]]:
    tensors = make(shape)
    times: dict[str, list[float]] = {name: [] for name in providers}
    for round_ in range(rounds + 3):  # the first three warm up
        for name, loss in providers.items():
            start = time.perf_counter()
            step(loss, tensors)
            if round_ >= 3:
                times[name].append(time.perf_counter() - start)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30, help="timed rounds (default 30)")
    parser.add_argument("--threads", type=int, help="threads for PyTorch (default: its own)")
    parser.add_argument("--compiled", action="store_true", help="time the baselines under torch.compile too")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)

    providers: dict[str, Loss] = {
        "fused": baselines.fused,
        "single_pass": baselines.single_pass,
        "one_liner": baselines.one_liner,
        "elementwise": baselines.elementwise,
        "reference": baselines.reference,
    }
    if args.compiled:
        providers |= {f"{n}_compiled": torch.compile(providers[n]) for n in ("one_liner", "elementwise")}
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, fp32, {args.rounds} rounds")
    for shape in CASES:
        for name, loss in providers.items():
            check(name, loss, shape)
        times = measure(providers, shape, args.rounds)
        print(f"\n{'x'.join(map(str, shape))}, {LATENTS} latents")
        for name, own in times.items():
            ratio = statistics.median(a / b for a, b in zip(own, times["fused"], strict=True))
            spread = statistics.quantiles(own, n=4)
            print(
                f"  {name:22} {statistics.median(own) * 1e3:9.3f} ms   "
                f"quartiles {spread[0] * 1e3:.3f} to {spread[2] * 1e3:.3f}   {ratio:6.2f} x fused"
            )


if __name__ == "__main__":
    main()
