"""The registry of providers: who computes a loss, from which σ, and in which units; and the check that each passes
before it is timed."""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import limit
import losses
import torch
from torch import Tensor
from workloads import LEVELS, NO_DATA, OF_POSTERIORS, SIGMAS, Case, leaves

import fused_elbo
from fused_elbo import backends

DATA = tuple(sigma for sigma in SIGMAS if sigma not in NO_DATA)
MOST_BROADCAST = 1 << 28  # elements, 1 GiB in fp32, of which eager code makes several tensors
LOSS_TOLERANCE = 1e-4  # of the loss, whose sums are fp32 at least
TOLERANCES = {  # of the largest element of a gradient: its sum's rounding, then that of its own dtype
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 2e-3,
    torch.bfloat16: 1e-2,
}


class Disagrees(Exception):
    """A provider's loss or gradients are not those of the formula, so its time means nothing."""


@dataclass(frozen=True)
class Provider:
    """`loss` maps a case's tensors to scale · (the formula's sum − what is left out)."""

    name: str
    sigmas: tuple[str, ...]  # that it serves
    kind: str  # "ours", "baseline", "reference" or "limit"
    loss: Callable[..., Tensor] | None = None  # takes σ's mode first if `by_sigma`; None: the limit
    by_sigma: bool = False
    compiled: bool = False
    backend: str | None = None  # of fused_elbo
    calls_backward: bool = False  # the gradients are in .grad afterwards
    needs: str | None = None  # a package that is no requirement of the benchmark
    softclip: bool = False  # bends log σ near −6
    scale: Callable[[Case], float] = lambda case: 1.0
    left_out: Callable[[Case], float] = lambda case: 0.0  # nats

    def serves(self, case: Case) -> bool:
        if self.kind == "limit":
            return case.limit and case.device == "cpu" and limit.available()
        if self.needs and importlib.util.find_spec(self.needs) is None:
            return False
        if case.sigma in OF_POSTERIORS and self.kind != "ours" and case.elements > MOST_BROADCAST:
            return False
        return case.sigma in self.sigmas and (self.backend is None or self.backend in available(case.device))


@functools.cache
def available(device: str) -> tuple[str, ...]:
    """The backends that can serve tensors of this device here; the reference always."""
    if device == "cpu":
        return tuple(s.name for s in (backends.cpp.status(build=True),) if s.ready) + ("reference",)
    found = [backends.triton.status(), backends.cuda.status(build=True)] if torch.cuda.is_available() else []
    return tuple(s.name for s in found if s.ready) + ("reference",)


# -------------------------------------------------------------------------------------------------------- the registry


def half_log_2pi(case: Case) -> float:
    return case.elements * 0.5 * losses.LOG_2PI


def optimal(case: Case) -> float:
    """At σ² = MSE, Σ e²/(2σ²) is N/2."""
    return half_log_2pi(case) + case.elements / 2


def optimal_laplace(case: Case) -> float:
    """At s = the mean, Σ |e|/s is N."""
    return case.elements * (1 + math.log(2))


def optimal_masked(case: Case) -> float:
    """Of the elements that the mask selects."""
    return case.tensors()[4].sum().item() * case.shape[1] * 0.5 * (1 + losses.LOG_2PI)


def eager(name: str, loss: Callable[..., Tensor], sigmas: tuple[str, ...], **kw: Any) -> list[Provider]:
    """A baseline, and the same under torch.compile."""
    return [
        Provider(name, sigmas, "baseline", loss, **kw),
        Provider(f"{name}_compiled", sigmas, "baseline", loss, compiled=True, **kw),
    ]


def fused(name: str, kind: str = "ours") -> Provider:
    return Provider(name, tuple(SIGMAS), kind, losses.fused, by_sigma=True, backend=name)


ALL = [
    fused("cpp"),
    fused("triton"),
    fused("cuda"),
    Provider("single_pass", DATA, "ours", losses.single_pass, by_sigma=True, calls_backward=True),
    Provider("cuda_single_pass", DATA, "ours", losses.single_pass, by_sigma=True, calls_backward=True, backend="cuda"),
    *eager("one_liner", losses.one_liner, ("batch",), left_out=optimal),
    *eager("one_liner_per_image", losses.one_liner_per_image, ("image",), left_out=optimal),
    *eager("stock", losses.stock, ("batch",), softclip=True),
    *eager("gaussian_nll", losses.gaussian_nll, ("pixel",), left_out=half_log_2pi),
    *eager(
        "latent_diffusion", losses.latent_diffusion, ("learned",), scale=lambda c: 2 / c.batch, left_out=half_log_2pi
    ),
    *eager("eager_levels", losses.eager_levels, ("levels",)),
    *eager("eager_aggregate", losses.eager_aggregate, OF_POSTERIORS),
    Provider("eager_aggregate_in_parts", ("evaluation",), "baseline", losses.eager_aggregate_in_parts),
    Provider("keops", OF_POSTERIORS, "baseline", losses.keops_aggregate, needs="pykeops"),
    *eager("one_liner_laplace", losses.one_liner_laplace, ("laplace",), left_out=optimal_laplace),
    *eager(
        "latent_diffusion_l1",
        losses.latent_diffusion_l1,
        ("laplace-learned",),
        scale=lambda c: 1 / c.batch,
        left_out=lambda c: c.elements * math.log(2),
    ),
    *eager("masked_one_liner", losses.masked_one_liner, ("mask",), left_out=optimal_masked),
    *eager("decoders_one_liner", losses.decoders_one_liner, ("decoder",), left_out=optimal),
    fused("reference", "reference"),
    Provider("limit", tuple(SIGMAS), "limit"),
]
TITLES = {
    "cpp": "fused_elbo",
    "triton": "fused_elbo, Triton",
    "cuda": "fused_elbo, CUDA",
    "single_pass": "`decoupled_elbo_backward`",
    "cuda_single_pass": "`decoupled_elbo_backward`, CUDA",
    "one_liner": "`N/2·log(F.mse_loss)` + KL",
    "one_liner_per_image": "`D/2·Σ log MSE` of each image + KL",
    "stock": "stock σ-VAE code",
    "gaussian_nll": "`F.gaussian_nll_loss` + KL",
    "latent_diffusion": "latent-diffusion's learned logvar",
    "one_liner_laplace": "`N·log(F.l1_loss)` + KL",
    "latent_diffusion_l1": "latent-diffusion's own loss",
    "masked_one_liner": "masked `n/2·log MSE` + KL",
    "decoders_one_liner": "`N/2·log(F.mse_loss(y.sigmoid(), x.float() / 255))` + KL",
    "eager_levels": f"KL of {sum(LEVELS.values())} levels, eager",
    "keops": "total correlation by KeOps",
    "eager_aggregate": "total correlation by broadcasting",
    "eager_aggregate_in_parts": f"total correlation by broadcasting, {losses.AT_ONCE} points at a time",
    "reference": "fused_elbo's reference",
    "limit": "limit",
}


def title(name: str) -> str:
    """The name that tables show."""
    base = name.removesuffix("_compiled")
    return TITLES.get(base, base) + (", `torch.compile`" if base != name else "")


def chosen(names: Iterable[str] | None, case: Case, known: Iterable[Provider] = ()) -> list[Provider]:
    """Who serves a case, of all or of those named."""
    return [p for p in known or ALL if p.serves(case) and (names is None or p.name in names)]


# ------------------------------------------------------------------------------------------------------------ one step


class Step:
    """forward() gives what backward(…) takes, which gives the gradients; both are fit to be timed."""

    forward: Callable[[], Any]
    backward: Callable[[Any], list[Any]]

    def __init__(self, provider: Provider, case: Case, tensors: list[Tensor]) -> None:
        self.provider, self.tensors, self.leaves = provider, tensors, leaves(tensors)
        if provider.loss is None:
            moved = limit.Limit(tensors, case.sigma)
            self.forward, self.backward = moved.forward, moved.backward
            return
        loss = functools.partial(provider.loss, case.sigma) if provider.by_sigma else provider.loss
        if provider.compiled:
            loss = torch.compile(loss, dynamic=False)
        if provider.backend not in (None, backends.dispatched[case.device]):  # a dispatched one needs no context
            loss = forced(provider.backend, loss)
        self.forward = functools.partial(loss, *tensors)
        self.backward = self.take_gradients if provider.calls_backward else self.differentiate

    def differentiate(self, loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, self.leaves)) if self.leaves else []

    def take_gradients(self, loss: Tensor) -> list[Tensor | None]:
        gradients = [t.grad for t in self.leaves]
        for t in self.leaves:
            t.grad = None
        return gradients

    def __call__(self) -> list[Any]:
        return self.backward(self.forward())


def forced(name: str, loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(*tensors: Tensor) -> Tensor:
        with fused_elbo.backend(name):  # read in forward, and kept for its backward
            return loss(*tensors)

    return call


# ----------------------------------------------------------------------------------------------------------- the check


@functools.lru_cache(maxsize=2)  # softclip or not: a case's providers come one after the other
def truth(case: Case, softclip: bool) -> tuple[float, list[Tensor]]:
    """The formula's sum and gradients in fp64, at the case's rounded tensors."""
    tensors = [t.detach().double().requires_grad_(t.requires_grad) for t in case.tensors()]  # mask and bytes, too
    loss = losses.exact(case.sigma, softclip, *tensors)
    wanted = leaves(tensors)
    return loss.item(), list(torch.autograd.grad(loss, wanted)) if wanted else []


def check(step: Step, case: Case) -> None:
    """Raises Disagrees, naming the provider."""
    provider = step.provider
    if provider.kind == "limit":
        return
    exact, exact_gradients = truth(case, provider.softclip)
    scale = provider.scale(case)
    loss = step.forward()
    total = float(loss.detach().double()) / scale
    difference = abs(total + provider.left_out(case) - exact)
    where = f"{provider.name} at {case.name}"
    if not difference <= LOSS_TOLERANCE * max(abs(total), abs(exact), 1.0):
        raise Disagrees(f"{where}: the loss differs from fp64 by {difference:.3g}, at {exact:.6g}")
    for i, (got, true) in enumerate(zip(step.backward(loss), exact_gradients, strict=True)):
        worst = ((got.double() / scale - true).abs().max() / true.abs().max()).item()
        if not worst <= TOLERANCES[got.dtype]:
            raise Disagrees(f"{where}: gradient {i} differs from fp64 by {worst:.1e} of its largest element")
