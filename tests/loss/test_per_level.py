"""`gaussian_kl([…], per_level=True)`: the rate of each level, on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import REDUCTIONS, implied
from hierarchies import SHAPES, Hierarchy
from torch import Tensor

from fused_elbo import backends, dispatch, gaussian_kl

LATENTS = sum(torch.Size(shape).numel() for shape in SHAPES)


def reduced(rates: Tensor, reduction: str) -> Tensor:
    whole = {"sum": 1, "batchmean": rates.shape[0], "mean": rates.shape[0] * LATENTS}
    return rates if reduction == "none" else rates.sum(0) / whole[reduction]


@pytest.mark.ptx
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("free_bits", [0.0, 0.1])
@pytest.mark.parametrize(
    "reduction", [pytest.param(r, marks=() if r == "none" else implied("none")) for r in REDUCTIONS]
)
def test_fp64_equals_torch_distributions(reduction: str, free_bits: float) -> None:
    """With a weight for each level, and for each sample of each."""
    case = Hierarchy(torch.float64)
    got = case.rate(reduction=reduction, free_bits=free_bits, per_level=True)
    expected = reduced(case.literal(free_bits, per_level=True), reduction)
    assert got.shape == ((3, len(SHAPES)) if reduction == "none" else (len(SHAPES),))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(got)
    gradients = (torch.autograd.grad(rates, case.leaves(), weights) for rates in (got, expected))
    for leaf, a, b in zip(case.leaves(), *gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, msg=lambda m, leaf=leaf: f"{tuple(leaf.shape)}: {m}")


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    "reduction", [pytest.param(r, marks=() if r == "none" else implied("none")) for r in REDUCTIONS]
)
def test_their_sum_is_the_rate_of_all(reduction: str) -> None:
    case = Hierarchy(torch.float32)
    each = case.rate(reduction=reduction, per_level=True)
    torch.testing.assert_close(each.sum(-1), case.rate(reduction=reduction), rtol=1e-6, atol=0)


@pytest.mark.usefixtures("backend")
def test_only_what_is_asked_for_gets_a_gradient() -> None:
    """Of one level nothing, of another one tensor; and the weights lie in memory as they come."""
    case = Hierarchy(torch.float32)
    asked = [case.mu[0], case.logvar[2], *case.prior[3]]
    for t in case.leaves():
        t.requires_grad_(any(t is a for a in asked))
    weights = torch.randn(len(SHAPES), 3).t()
    got = torch.autograd.grad(case.rate(reduction="none", per_level=True), asked, weights)
    expected = torch.autograd.grad(case.literal(per_level=True), asked, weights)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("backend")
def test_a_level_that_is_nan_is_so_alone() -> None:
    case = Hierarchy(torch.float32)
    with torch.no_grad():
        case.mu[3][1, 7] = float("nan")
    rates = case.rate(reduction="none", free_bits=0.1, per_level=True)
    is_nan = rates.isnan()
    assert is_nan[1, 3]
    assert is_nan.sum() == 1
    (gradient,) = torch.autograd.grad(rates.sum(), [case.mu[3]])
    assert gradient[1, 7].isnan()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("levels", [1, 2, 53])
def test_any_number_of_levels(levels: int) -> None:
    """More than a launch takes."""
    case = Hierarchy(torch.float32, batch=2, shapes=tuple((1 + 8 * (i % 3),) for i in range(levels)))
    got, expected = case.rate(reduction="none", per_level=True), case.literal(per_level=True)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    weights = torch.randn_like(got)
    pairs = zip(*(torch.autograd.grad(r, case.leaves(), weights) for r in (got, expected)), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(case.rate(reduction="none"), case.literal(), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("backend")
def test_the_same_bits_every_time() -> None:
    found = []
    for _ in range(3):
        torch.manual_seed(0)
        case = Hierarchy(torch.float32, batch=5)
        rates = case.rate(reduction="none", per_level=True)
        total = case.rate(reduction="none")
        found.append([rates, total, *torch.autograd.grad(rates.sum() + total.sum(), case.leaves())])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@implied("the first derivatives of levels, and the second ones of the loss")
@pytest.mark.usefixtures("backend")
def test_first_and_second_derivatives() -> None:
    case = Hierarchy(torch.float64, batch=2, shapes=((2,), (3,)))

    def rate(*leaves: Tensor) -> Tensor:
        (a, b), (c, d), (e, f) = leaves[:2], leaves[2:4], leaves[4:]
        return gaussian_kl([a, b], [c, d], prior=[None, (e, f)], reduction="none", per_level=True)

    fast = backends.forced == "triton"
    assert torch.autograd.gradcheck(rate, case.leaves(), fast_mode=fast)
    assert torch.autograd.gradgradcheck(rate, case.leaves(), fast_mode=fast)


@pytest.mark.ptx
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("free_bits", [0.0, 0.2])
def test_the_operators_of_a_backend(free_bits: float) -> None:
    """Against the reference, with gradients of some tensors in any order, and weights of all kinds of strides."""
    tensors, wanted = Hierarchy(torch.float32).flat(), [17, 0, 6, 5, 7, 16]
    by = dispatch.levels_implementation(backends.forced, tensors[0])
    reference = dispatch.levels_implementation("reference", tensors[0])
    for per_level in (False, True):
        got, expected = (i.levels(tensors, free_bits, per_level) for i in (by, reference))
        assert got.is_contiguous()
        torch.testing.assert_close(got, expected, rtol=2e-6, atol=0)
    for grad in (torch.rand(3), torch.rand(1).expand(3), torch.rand(5, 3).t(), torch.rand(3, 1).expand(3, 5)):
        pairs = zip(*(i.levels_grads(tensors, free_bits, grad, wanted) for i in (by, reference)), strict=True)
        for i, (a, b) in zip(wanted, pairs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
            assert a.stride() == torch.empty_like(tensors[i]).stride()


def test_torch_compile_has_no_break() -> None:
    case = Hierarchy(torch.float32)
    coefficients = torch.rand(len(SHAPES))

    def rate(mu: list[Tensor], logvar: list[Tensor], prior: list[Any]) -> Tensor:
        return (coefficients * gaussian_kl(mu, logvar, prior=prior, free_bits=0.05, per_level=True)).sum()

    compiled = torch.compile(rate, fullgraph=True, backend="aot_eager")(case.mu, case.logvar, case.prior)
    eager = rate(case.mu, case.logvar, case.prior)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(*(torch.autograd.grad(loss, case.leaves()) for loss in (compiled, eager)))


def test_transforms() -> None:
    case = Hierarchy(torch.float64, shapes=((2,), (3,)))
    mu, logvar, prior = case.mu, case.logvar, case.prior

    def rate(first: Tensor) -> Tensor:
        return gaussian_kl([first, mu[1]], logvar, prior=prior, per_level=True)

    vector = torch.tensor([0.3, -2.0], dtype=torch.float64)
    _, pulled = torch.func.vjp(rate, mu[0])
    torch.testing.assert_close(pulled(vector)[0], torch.autograd.grad(rate(mu[0]), mu[0], vector)[0])
    mapped = torch.vmap(rate)(torch.stack([mu[0], 2 * mu[0]]))
    torch.testing.assert_close(mapped, torch.stack([rate(mu[0]), rate(2 * mu[0])]))


@pytest.mark.usefixtures("backend")
def test_vmap_of_a_backward() -> None:
    case = Hierarchy(torch.float64, batch=2, shapes=((2,), (3,)))
    rates, literal = case.rate(per_level=True), case.literal(per_level=True).mean(0)
    wanted, eye = [case.mu[1], case.prior[1][1]], torch.eye(2, dtype=torch.float64)
    expected = [torch.autograd.grad(literal, wanted, row, retain_graph=True) for row in eye]
    batched = torch.autograd.grad(rates, wanted, eye, is_grads_batched=True, retain_graph=True)
    torch.testing.assert_close(list(batched), [torch.stack(each) for each in zip(*expected, strict=True)])


def test_what_is_refused() -> None:
    t = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="per_level: it is for lists of levels"):
        gaussian_kl(t, t, per_level=True)
    with pytest.raises(TypeError, match="per_level: expected True or False, got 1"):
        gaussian_kl([t], [t], per_level=1)  # type: ignore[arg-type]
