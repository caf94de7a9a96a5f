"""torch.compile, torch.export, make_fx of torch.func's transforms of the loss: the right value or one clear error.

A new transform or tracer is a line in a table. All of it depends on PyTorch's release: `torch_versions`.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.config
from literal import literal_elbo
from torch import Tensor, nn
from torch.distributions import Normal
from torch.fx.experimental.proxy_tensor import make_fx

import fused_elbo
from fused_elbo import decoupled_elbo, gaussian_kl, gaussian_nll, kl_decomposition
from fused_elbo.sigma import Optimal

pytestmark = pytest.mark.torch_versions
SELDOM = pytest.mark.release("the rarer pairs of a tracer and a transform")
TORCH = tuple(map(int, torch.__version__.split(".")[:2]))


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


Function = Callable[[Tensor], Tensor]


def data(a: Tensor) -> tuple[Tensor, ...]:
    """recon, target, mu, logvar, each a function of one leaf."""
    return torch.cat([a, a.cos()], -1), torch.cat([a.sin(), a * a], -1), a, 0.5 * a


def both_levels(a: Tensor) -> Tensor:
    return gaussian_kl([a, 2 * a], [0.5 * a, a.sin()], prior=[None, (a.cos(), 0.1 * a)])


def literal_levels(a: Tensor) -> Tensor:
    first = literal_elbo(a, a + 1, a, 0.5 * a)[2]
    return first + literal_elbo(a, a + 1, 2 * a, a.sin(), prior=(a.cos(), 0.1 * a))[2]


def total_correlation(a: Tensor) -> Tensor:
    return kl_decomposition(a.sin(), a, 0.5 * a, dataset_size=50).total_correlation


def literal_total_correlation(a: Tensor) -> Tensor:
    others = math.log(49 / 50 / (a.shape[0] - 1))
    weights = torch.where(torch.eye(a.shape[0], dtype=torch.bool), -math.log(50), others)
    log_density = Normal(a, (0.25 * a).exp(), validate_args=False).log_prob(a.sin()[:, None])
    joint = torch.logsumexp(log_density.sum(2) + weights, 1)
    return (joint - torch.logsumexp(log_density + weights[:, :, None], 1).sum(1)).mean()


# What is called, and the same by torch.distributions.
FUNCTIONS: dict[str, tuple[Function, Function]] = {
    "tensor": (lambda a: gaussian_kl(a, 0.5 * a), lambda a: literal_elbo(a, a + 1, a, 0.5 * a)[2]),
    "list": (both_levels, literal_levels),
    "mixture": (total_correlation, literal_total_correlation),
    "elbo": (lambda a: decoupled_elbo(*data(a), beta=2.0).loss, lambda a: literal_elbo(*data(a), beta=2.0)[0]),
}
TRANSFORMS: dict[str, Callable[[Function], Function]] = {
    "none": lambda f: f,
    "vmap": torch.vmap,
    "grad": torch.func.grad,
    "vjp": lambda f: lambda a: torch.func.vjp(f, a)[1](a.new_ones(()))[0],
    "jacrev": torch.func.jacrev,
    "hessian": lambda f: torch.func.jacrev(torch.func.jacrev(f)),
    "vmap of grad": lambda f: torch.vmap(torch.func.grad(f)),
    "grad of vmap": lambda f: torch.func.grad(lambda a: torch.vmap(f)(a).sum()),
}


def compiled(backend: str) -> Callable[[Function, Tensor], Function]:
    return lambda f, _: torch.compile(f, backend=backend, fullgraph=True)


class Module(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, a: Tensor) -> Tensor:
        return self.function(a)


def exported(strict: bool) -> Callable[..., Function]:
    def export(f: Function, a: Tensor, **options: Any) -> Function:
        return torch.export.export(Module(f), (a,), strict=strict, **options).module()

    return export


TRACERS: dict[str, Callable[[Function, Tensor], Function]] = {
    "compile, eager": compiled("eager"),
    "compile, aot_eager": compiled("aot_eager"),
    "export": exported(strict=False),
    "export, strict": exported(strict=True),
    "make_fx": lambda f, a: make_fx(f)(a),
    "make_fx, symbolic": lambda f, a: make_fx(f, tracing_mode="symbolic")(a),
}


def refused(tracer: str, transform: str) -> str | None:
    """The words of the error, where there is no right value."""
    if tracer.startswith("export") and transform not in ("none", "vmap"):
        return "torch.export makes no graph of torch.func.grad"
    if tracer == "make_fx, symbolic" and "vmap" in transform:
        return "make_fx: inside torch.vmap sizes are numbers"
    return None


def of_any_size(tracer: str, transform: str) -> bool:
    """Whether what is traced serves batches of other sizes. PyTorch cannot trace a Hessian in which an open size is
    divided by: make_fx does not, and torch.compile, before 2.13, ends in an error."""
    if transform == "hessian":
        return tracer.startswith("compile") and TORCH >= (2, 13)
    return tracer.startswith("compile") or tracer == "make_fx, symbolic"


def argument(transform: str, batch: int = 4) -> Tensor:
    mapped = (3,) if "vmap" in transform else ()
    return torch.randn(*mapped, batch, 2)


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)


def is_often(tracer: str, transform: str, function: str) -> bool:
    """By torch.compile what differs most, for every tracer the simplest; all else before a release. A tensor's rate has
    the operator of the loss, and the public function of a list's."""
    if (tracer, transform, function) == ("make_fx, symbolic", "vjp", "list"):
        return True  # checks of shapes are seen by this tracer, which may take a size for its only one
    if tracer != "compile, eager" and transform not in ("none", "vmap", "grad"):
        return False
    if function == "mixture" and transform not in ("none", "vmap of grad"):
        return False
    return function != "tensor" or transform == "none"


@pytest.mark.parametrize(
    ("tracer", "transform", "function"),
    [
        pytest.param(*case, marks=() if is_often(*case) else SELDOM)
        for case in itertools.product(TRACERS, TRANSFORMS, FUNCTIONS)
    ],
)
def test_each_tracer_of_each_transform(tracer: str, transform: str, function: str) -> None:
    ours, literal = (TRANSFORMS[transform](f) for f in FUNCTIONS[function])
    a, words = argument(transform), refused(tracer, transform)
    if words:
        with pytest.raises(Exception, match=re.escape(words)):
            TRACERS[tracer](ours, a)
        return
    traced = TRACERS[tracer](ours, a)
    close(traced(a), literal(a.double()))
    if of_any_size(tracer, transform):
        other = argument(transform, batch=5)
        close(traced(other), literal(other.double()))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("tracer", ["export", "export, strict"])
def test_an_exported_batch_may_be_of_any_size(tracer: str, function: str) -> None:
    ours, literal = FUNCTIONS[function]
    export = exported("strict" in tracer)
    shapes = ({0: torch.export.Dim("B", min=2)},)
    traced, other = export(ours, argument("none"), dynamic_shapes=shapes), argument("none", batch=7)
    close(traced(other), literal(other.double()))
    sizes = ({0: torch.export.Dim("E", min=2)},)
    with pytest.raises(torch._dynamo.exc.UserError, match="Constraints violated"):
        export(torch.vmap(ours), argument("vmap"), dynamic_shapes=sizes)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_an_exported_loss_is_differentiable(function: str) -> None:
    ours, literal = FUNCTIONS[function]
    a = argument("none").requires_grad_()
    program, expected = exported(strict=False)(ours, a), torch.func.grad(literal)(a.detach().double())
    close(torch.autograd.grad(program(a), a)[0], expected)
    close(torch.func.grad(program)(a.detach()), expected)
    stacked = torch.stack([a.detach(), 2 * a.detach()])
    close(torch.vmap(program)(stacked), torch.vmap(literal)(stacked.double()))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_transforms_around_compiled_code(compiler: str, function: str) -> None:
    ours, literal = FUNCTIONS[function]
    fast = torch.compile(ours, backend=compiler)
    a, stacked = argument("none"), argument("vmap")
    close(fast(a), literal(a.double()))
    close(torch.vmap(fast)(stacked), torch.vmap(literal)(stacked.double()))
    close(torch.func.grad(fast)(a), torch.func.grad(literal)(a.double()))
    close(torch.autograd.functional.jacobian(fast, a, vectorize=True), torch.func.grad(literal)(a.double()))


@SELDOM
def test_inductor_compiles_transforms() -> None:
    ours, literal = FUNCTIONS["elbo"]
    a = argument("vmap")
    got = torch.compile(torch.vmap(torch.func.grad(ours)), fullgraph=True)(a)
    close(got, torch.vmap(torch.func.grad(literal))(a.double()))


def test_a_transform_of_a_perfect_reconstruction_compiles_to_no_nan() -> None:
    """The derivative of log 0 is not the loss's, which is flat there."""
    x = torch.zeros(2, 3)
    for sigma in ("optimal", Optimal(softclip=True), Optimal(per_image=True, softclip=True)):
        torch._dynamo.reset()
        gradient = torch.compile(torch.func.grad(lambda r, s=sigma: gaussian_nll(r, x, sigma=s)), backend="eager")
        assert not gradient(x).any()


def test_a_backend_that_was_asked_for_is_not_replaced_in_silence(cpp: None) -> None:
    a = argument("vmap")
    with pytest.raises(Exception, match="the loss is plain PyTorch"):
        torch.compile(torch.vmap(both_levels), backend="eager", fullgraph=True)(a)
    with fused_elbo.backend("reference"):
        close(torch.vmap(both_levels)(a), torch.vmap(literal_levels)(a.double()))
