"""The CUDA kernels of the aggregate posterior as nvcc compiles them: their PTX is executed on the CPU, checked, and its
exponentials and its traffic are counted."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from test_cuda_ptx import ARCHITECTURES, DTYPES, SOURCE, THREADS, bits, compiled, ptxemu
from test_cuda_ptx import pytestmark as pytestmark
from torch import Tensor

from fused_elbo.call import GradLogSums, Mixture
from fused_elbo.reference import aggregate as reference
from fused_elbo.reference.math import mixture_log_weights

TILE, PITCH = 16, 33  # as in csrc/cuda
FIELDS = {"sums": 3, "points": 4, "components": 5}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def kernels(request: pytest.FixtureRequest) -> dict[str, Any]:
    return compiled(request.config, request.param, source=SOURCE.with_name("cuda_ptx_aggregate.cu"))


@contextmanager
def exponentials() -> Iterator[list[int]]:
    """[how many lanes have taken 2^x]."""
    exp2, counted = ptxemu.np.exp2, [0]

    def counting(x: Any) -> Any:
        counted[0] += len(x)
        return exp2(x)

    with mock.patch.object(ptxemu.np, "exp2", counting):
        yield counted


class Run:
    """A call of the operators, kernel by kernel."""

    def __init__(self, kernels: dict[str, Any], name: str, sizes: tuple[int, int, int], own: int, size: int) -> None:
        torch.manual_seed(0)
        self.kernels, self.name, (self.batch, self.components, self.latents) = kernels, name, sizes
        mu, logvar = torch.randn(self.components, self.latents), torch.randn(self.components, self.latents) - 1
        z = mu[torch.arange(self.batch) % self.components] + torch.randn(self.batch, self.latents)
        self.inputs = [t.to(DTYPES[name]) for t in (z, mu, logvar)]
        self.weights, (of_own, self.others) = (own, size), mixture_log_weights(self.components, own >= 0, size)
        self.mixture = [*(bits(t) for t in self.inputs), *sizes, own, of_own, self.others]
        self.exponentials: dict[str, int] = {}
        self.moved: dict[str, int] = {}

    def launch(self, kernel: str, blocks: int, threads: int, *args: Any, shared: int = 0) -> None:
        with exponentials() as counted:
            done = ptxemu.launch(self.kernels[kernel], (blocks,), (threads,), list(args), shmem=shared, seed=1)
        stem = kernel.partition("_")[0]
        self.exponentials[stem] = counted[0]
        self.moved[stem] = done["read_bytes"] + done["written_bytes"]

    def tiles(self, stem: str, lanes: int, others: int, sums: int, *given: Any) -> tuple[Any, int]:
        """Partial sums, for two segments of the tiles, and how many numbers a segment has."""
        tiles, warps = -(-others // TILE), 4
        cut = [-(-lanes // 32), -(-tiles // 2), 2, -(-self.latents // warps), warps, 1]
        partials = torch.full((2, lanes * sums), math.nan).numpy()
        shared = FIELDS[stem] * self.latents * PITCH * 4
        name = f"{stem}_{self.name}"
        self.launch(name, cut[0] * 2, warps * 32, *self.mixture, *cut, *given, partials, shared=shared)
        return partials

    def forward(self) -> list[Any]:
        partials = self.tiles("sums", self.batch, self.components, 2 * (self.latents + 1))
        joint, marginals = (torch.full(s, math.nan).numpy() for s in ((self.batch,), (self.batch, self.latents)))
        sizes = (self.batch, self.latents)
        self.launch("log_sums", 2, THREADS, partials, 2, 2, self.others, *sizes, joint, marginals)
        return [joint, marginals]

    def total(self, partials: Any, factor: float, like: Tensor) -> Tensor:
        to = bits(torch.full_like(like, math.nan))
        self.launch(f"total_{self.name}", 2, THREADS, partials, 2, 1, factor, *like.shape, to)
        return torch.from_numpy(to).view(like.dtype)

    def backward(self, sums: list[Any], grads: list[Tensor]) -> list[Tensor]:
        given = [*sums, *(g.numpy() for g in grads)]
        of_z = self.tiles("points", self.batch, self.components, self.latents, *given)
        of_both = self.tiles("components", self.components, self.batch, 2 * self.latents, *given)
        # [segments, 2 · …] was [2, segments, …]: mu's partial sums come first
        of_mu, of_logvar = of_both.reshape(2, 2, -1)
        pairs = ((of_z, -2.0), (of_mu.copy(), 2.0), (of_logvar.copy(), 1.0))
        return [self.total(partials, f, like) for (partials, f), like in zip(pairs, self.inputs, strict=True)]


@pytest.mark.parametrize("name", DTYPES)
def test_the_aggregate_posterior(name: str, kernels: dict[str, Any]) -> None:
    run = Run(kernels, name, (35, 41, 10), own=3, size=90)
    sums = run.forward()
    wide = Mixture(*[t.double() for t in run.inputs], *run.weights)
    true = reference.aggregate(wide)
    for got, wanted in zip(sums, true, strict=True):
        torch.testing.assert_close(torch.from_numpy(got).double(), wanted, rtol=2e-6, atol=3e-6)
    grads = [torch.randn(t.shape) for t in true]
    found = run.backward(sums, grads)
    wanted = reference.aggregate_grads(wide, true, GradLogSums(*[g.double() for g in grads]), 7)
    tolerance = 2e-6 if name == "fp32" else 2.0**-8
    for got, exact in zip(found, wanted, strict=True):
        largest = exact.abs().max().item()
        torch.testing.assert_close(got.double(), exact, rtol=tolerance, atol=(4e-6 + 1e-3 * tolerance) * largest)


def test_one_exponential_for_each_element(kernels: dict[str, Any]) -> None:
    """And few besides: of the sum over latents, to a new maximum of a tile, and for what a tile is read."""
    run = Run(kernels, "fp32", (64, 64, 24), own=-1, size=64)
    sums = run.forward()
    run.backward(sums, [torch.randn(t.shape) for t in sums])
    elements = 64 * 64 * 24
    ratios = {stem: run.exponentials[stem] / elements for stem in ("sums", "points", "components")}
    print(f"exponentials of an element: {ratios}; bytes of an element: {run.moved}")  # with pytest -s
    assert all(1 <= ratio <= 1.2 for ratio in ratios.values())
