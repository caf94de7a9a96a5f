"""The registry of cases: what is measured, as data. A case is a shape, a dtype, where σ comes from, and a device.

Names read `128x3x64x64`, then what differs from fp32 and a σ of the batch: `128x3x64x64-bf16`, `16x3x256x256-pixel`.
"""

from __future__ import annotations

import fnmatch
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SIGMAS = {
    "batch": "σ² = MSE of the batch",
    "image": "σ² = MSE of each image",
    "learned": "log σ is one parameter",
    "pixel": "log σ for every element",
    "levels": "no data: the KL of a hierarchy of latents, each with its prior",
    "aggregate": "no data: the total correlation of posteriors, by log_aggregate_posterior; [B, K] of z, mu and logvar",
    "evaluation": "no data: the total correlation of posteriors, without gradients; [B, K] of z, mu and logvar",
    "laplace": "Laplace, its scale the mean absolute error of the batch",
    "laplace-learned": "Laplace, log of its scale one parameter",
    "mask": "σ² = MSE of the batch's pixels that a mask selects, for all channels",
    "decoder": "σ² = MSE of the batch; recon is what a sigmoid follows, the target is of bytes",
}
OF_POSTERIORS = ("aggregate", "evaluation")
NO_DATA = ("levels", *OF_POSTERIORS)
OF_TRAINERS = ("laplace", "laplace-learned", "mask", "decoder")
# The 43 stochastic layers of VDVAE's decoder for CIFAR-10 (Child, arXiv 2011.10650): how many at which resolution.
LEVELS = {1: 1, 4: 3, 8: 6, 16: 11, 32: 22}
LEVEL_CHANNELS = 16
DATASET_SIZE = 50_000  # that the posteriors stand for
NOISE = 0.1  # of recon about target
LOG_SIGMA = math.log(0.15)  # learned; at log NOISE the gradient of log σ would be a difference of equal numbers


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]  # [B, *data]; with "levels" [B], of posteriors [B, K]
    latent: tuple[int, ...] = (128,)
    dtype: str = "fp32"
    sigma: str = "batch"
    device: str = "cpu"
    threads: int | None = None  # None: as many as the run has
    limit: bool = True  # False where all is overhead, of which a loop in C++ has none

    @property
    def name(self) -> str:
        shape = f"{self.shape[0]}x{sum(LEVELS.values())}" if self.sigma == "levels" else "x".join(map(str, self.shape))
        words = [shape]
        words += [self.dtype] if self.dtype != "fp32" else []
        words += [self.sigma] if self.sigma != "batch" else []
        words += [f"{self.threads}threads"] if self.threads else []
        return "-".join(words)

    def __str__(self) -> str:
        return self.name

    @property
    def batch(self) -> int:
        return self.shape[0]

    @property
    def elements(self) -> int:
        """The number of elements of recon, or of all latents where there are no data; of posteriors of what eager code
        broadcasts to."""
        if self.sigma in OF_POSTERIORS:
            return self.batch * math.prod(self.shape)
        if self.sigma == "levels":
            return self.batch * sum(math.prod(level) for level in levels())
        return math.prod(self.shape)

    def tensors(self) -> list[Tensor]:
        """(recon, target, mu, logvar), then log σ if it is learned, or the mask; of "levels" (mu, logvar, prior_mu,
        prior_logvar) of each; of posteriors (z, mu, logvar). All but target and mask require gradients, of "evaluation"
        none."""
        generator = torch.Generator().manual_seed(0)
        made: list[Tensor] = []
        if self.sigma == "levels":
            for level in levels():
                made += torch.randn(4, self.batch, *level, generator=generator).mul_(0.5).unbind(0)
        elif self.sigma in OF_POSTERIORS:
            mu, logvar, noise = torch.randn(3, *self.shape, generator=generator).unbind(0)
            made += [mu + (0.5 * logvar - 1).exp() * noise, mu, logvar - 2]
        else:
            target = torch.rand(self.shape, generator=generator)
            made += [target + NOISE * torch.randn(self.shape, generator=generator), target]
            made += torch.randn(2, self.batch, *self.latent, generator=generator).unbind(0)
        if self.sigma in ("learned", "laplace-learned"):
            made.append(torch.tensor(LOG_SIGMA))
        if self.sigma == "mask":
            made.append(torch.rand(self.batch, 1, *self.shape[2:], generator=generator) > 0.3)
        if self.sigma == "decoder":
            made[0], made[1] = torch.logit(made[0].clamp(0.02, 0.98)), (255 * made[1]).byte()
        if self.sigma == "pixel":
            made.append(LOG_SIGMA + 0.1 * torch.randn(self.shape, generator=generator))
        fixed = None if self.sigma in NO_DATA else 1
        return [self._leaf(t, i != fixed and self.sigma != "evaluation") for i, t in enumerate(made)]

    def _leaf(self, t: Tensor, requires_grad: bool) -> Tensor:
        if not t.is_floating_point():
            return t.to(self.device)
        return t.to(self.device, DTYPES[self.dtype]).clone().requires_grad_(requires_grad)


def levels() -> list[tuple[int, ...]]:
    """The shapes of the hierarchy's latents, without the batch."""
    return [(LEVEL_CHANNELS, size, size) for size, count in LEVELS.items() for _ in range(count)]


def leaves(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Those whose gradients a step has to give."""
    return [t for t in tensors if t.requires_grad]


def size(tensors: Iterable[Tensor]) -> int:
    """In bytes."""
    return sum(t.numel() * t.element_size() for t in tensors)


def forward_bytes(tensors: list[Tensor]) -> int:
    """What the loss has to read at least: every input once."""
    return size(tensors)


def backward_bytes(tensors: list[Tensor]) -> int:
    """What its gradients have to move at least: every input once more, and every gradient, if there are any."""
    gradients = size(leaves(tensors))
    return size(tensors) + gradients if gradients else 0


def step_bytes(tensors: list[Tensor]) -> int:
    """5N + 6L for N bytes of recon and L of mu, where no log σ is as large as they are."""
    return forward_bytes(tensors) + backward_bytes(tensors)


# --------------------------------------------------------------------------------------------------------- the registry

AGGREGATE = tuple(
    Case(shape, (), sigma="aggregate", limit=False) for shape in ((64, 10), (256, 32), (512, 64), (2048, 128))
)
EVALUATION = Case((4000, 16), (), sigma="evaluation", limit=False)
TINY = Case((1, 1), (1,), limit=False)
SHAPES = (
    Case((64, 1, 28, 28)),
    Case((128, 3, 64, 64)),
    Case((512, 3, 64, 64)),
    Case((16, 3, 256, 256), (4, 32, 32)),
    Case((64, 3, 256, 256), (16, 32, 32)),
    Case((2, 3, 17, 256, 256), (16, 32, 32)),
)
SWEEP = tuple(Case((batch, 3, 64, 64)) for batch in (2, 8, 32, 128, 512, 2048))  # over N
THREADED = Case((512, 3, 64, 64))
OTHER_SIGMAS = ("image", "learned", "pixel")
QUICK = ("1x1", "64x1x28x28", "64x1x28x28-learned")
PEAKS = (
    "64x3x256x256",
    "16x3x256x256-learned",
    "16x3x256x256-pixel",
    "8x43-levels",
    "2048x128-aggregate",
    "4000x16-evaluation",
)  # whose peak memory is measured


def threads_here() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def thread_sweep() -> tuple[Case, ...]:
    """1, 2, 4, … and all cores of this machine."""
    most = threads_here()
    counts = sorted({2**k for k in range(most.bit_length()) if 2**k <= most} | {most})
    return tuple(replace(THREADED, threads=count) for count in counts)


def registry(device: str = "cpu") -> dict[str, Case]:
    """name -> case, in the order in which they are measured."""
    found = [
        TINY,
        *SHAPES,
        *(replace(case, dtype="bf16") for case in SHAPES),
        replace(SHAPES[1], dtype="fp16"),
        *(replace(case, sigma=sigma) for sigma in OTHER_SIGMAS for case in (SHAPES[0], SHAPES[1], SHAPES[3])),
        Case((8,), (), sigma="levels"),
        *AGGREGATE,
        EVALUATION,
        *(replace(case, sigma=sigma) for sigma in ("laplace", "laplace-learned") for case in (SHAPES[1], SHAPES[4])),
        # Their tensors are of several dtypes, which the limit's loops do not read side by side.
        *(replace(case, sigma=sigma, limit=False) for sigma in ("mask", "decoder") for case in (SHAPES[1], SHAPES[4])),
        *SWEEP,
        *(thread_sweep() if device == "cpu" else ()),
    ]
    return {case.name: replace(case, device=device) for case in found}


def chosen(patterns: Iterable[str], device: str = "cpu") -> list[Case]:
    """Cases by name or glob. Raises ValueError for a pattern that names none."""
    known = registry(device)
    names: dict[str, Case] = {}
    for pattern in patterns:
        matching = fnmatch.filter(known, pattern)
        if not matching:
            raise ValueError(f"no case is named {pattern!r}; the cases are {', '.join(known)}")
        names |= {name: known[name] for name in matching}
    return list(names.values())
