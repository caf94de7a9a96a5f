"""`gaussian_kl` of a hierarchy's levels: the sum over the levels, on every backend, in one call of the C++ kernels."""

from __future__ import annotations

import itertools
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from cases import REDUCTIONS, implied
from hierarchies import SHAPES, Hierarchy
from torch import Tensor

from fused_elbo import backends, dispatch, gaussian_kl
from fused_elbo.operators import levels

HALVES = (torch.bfloat16, torch.float16)


def reduced(rates: Tensor, reduction: str) -> Tensor:
    latents = sum(torch.Size(shape).numel() for shape in SHAPES)
    return {"none": rates, "sum": rates.sum(), "batchmean": rates.mean(), "mean": rates.mean() / latents}[reduction]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("free_bits", [0.0, 0.1])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_fp64_equals_torch_distributions(reduction: str, free_bits: float) -> None:
    case = Hierarchy(torch.float64)
    got, expected = case.rate(reduction=reduction, free_bits=free_bits), reduced(case.literal(free_bits), reduction)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    weights = torch.rand_like(got)
    gradients = (torch.autograd.grad(loss, case.leaves(), weights) for loss in (got, expected))
    for leaf, a, b in zip(case.leaves(), *gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, msg=lambda m, leaf=leaf: f"{tuple(leaf.shape)}: {m}")


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtypes", [(torch.float32,), *((h,) for h in HALVES), (torch.float32, *HALVES)], ids=str)
def test_every_level_in_its_own_dtype(dtypes: tuple[torch.dtype, ...]) -> None:
    how = backends.triton.runs_on_cpu()
    if how == "its interpreter" and torch.bfloat16 in dtypes:
        pytest.skip("Triton's interpreter truncates where it should round to bf16")
    few = how == "a driver for the CPU"  # which cannot do with more half latents beside a prior: see test_layout.py
    case = Hierarchy(*dtypes, shapes=((3,), (16, 1, 1), (2, 5, 5), (64,), (4, 4, 4)) if few else SHAPES)
    exact = case.double()
    got, truth = case.rate(), exact.literal().mean()
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), truth, rtol=2e-6, atol=0)
    pairs = zip(torch.autograd.grad(got, case.leaves()), torch.autograd.grad(truth, exact.leaves()), strict=True)
    for leaf, (g, true) in zip(case.leaves(), pairs, strict=True):
        assert g.dtype == leaf.dtype
        rounding = 0 if leaf.dtype == torch.float32 else torch.finfo(leaf.dtype).eps / 2
        torch.testing.assert_close(g.double(), true, rtol=0, atol=(rounding + 2e-6) * true.abs().max().item())


@pytest.mark.usefixtures("backend")
def test_one_double_level_makes_the_sum_double() -> None:
    case = Hierarchy(torch.float32, torch.float32, torch.float64)
    assert case.rate().dtype == case.rate(reduction="none").dtype == torch.float64
    assert [g.dtype for g in torch.autograd.grad(case.rate(), case.leaves())] == [t.dtype for t in case.leaves()]
    torch.testing.assert_close(case.rate(), case.double().literal().mean(), rtol=1e-6, atol=0)


@pytest.mark.usefixtures("backend")
def test_only_what_is_asked_for_gets_a_gradient() -> None:
    case = Hierarchy(torch.float32)
    asked = [case.mu[0], case.logvar[2], case.prior[3][1]]
    for t in case.leaves():
        t.requires_grad_(any(t is a for a in asked))
    got = torch.autograd.grad(case.rate(), asked)
    expected = torch.autograd.grad(case.literal().mean(), asked)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    case.rate(reduction="none").sum().backward()
    assert [t.grad is not None for t in case.leaves()] == [any(t is a for a in asked) for t in case.leaves()]


@pytest.mark.usefixtures("backend")
def test_latents_are_read_where_they_lie() -> None:
    """Halves of one packed tensor, channels_last, and a batch that is not outermost."""
    packed = torch.randn(3, 8, 5, 5)
    mu, logvar = packed.chunk(2, 1)
    last = torch.randn(3, 4, 5, 5).to(memory_format=torch.channels_last)
    turned = torch.randn(7, 3).t()
    case = [mu, last, turned], [logvar, last * 0.5, turned * 0.1]
    for leaf in itertools.chain(*case):
        leaf.requires_grad_()
    expected = sum(gaussian_kl(m.contiguous(), l.contiguous()) for m, l in zip(*case, strict=True))
    got = gaussian_kl(*case)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    for leaf, a, b in zip(
        itertools.chain(*case), *(torch.autograd.grad(x, [*case[0], *case[1]]) for x in (got, expected)), strict=True
    ):
        torch.testing.assert_close(a, b)
        assert a.stride() == torch.empty_like(leaf).stride()


@implied("the first derivatives of levels, and the second ones of the loss")
@pytest.mark.usefixtures("backend")
def test_first_and_second_derivatives() -> None:
    case = Hierarchy(torch.float64, batch=2, shapes=((2,), (1, 2), (3,)))

    def rate(*leaves: Tensor) -> Tensor:
        mu, logvar, (a, b, c, d) = list(leaves[:3]), list(leaves[3:6]), leaves[6:]
        return gaussian_kl(mu, logvar, prior=[None, (a, b), (c, d)], reduction="none")

    fast = backends.forced == "triton"  # a step takes a twentieth of a second: in one random direction
    assert torch.autograd.gradcheck(rate, case.leaves(), fast_mode=fast)
    assert torch.autograd.gradgradcheck(rate, case.leaves(), fast_mode=fast)


def test_bitwise_equal_for_any_number_of_threads(cpp: None) -> None:
    case, threads, found = Hierarchy(torch.float32, torch.bfloat16, batch=9), torch.get_num_threads(), []
    try:
        for n in (1, 2, 3, 7):
            torch.set_num_threads(n)
            rates = case.rate(reduction="none")
            found.append([rates, *torch.autograd.grad(rates.sum(), case.leaves())])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_one_operator_for_all_levels(cpp: None) -> None:
    """Each way, whatever their number."""
    case = Hierarchy(torch.float32)
    with torch.profiler.profile() as profile:
        case.rate(reduction="sum").backward()
    called = [e.name for e in profile.events() if e.name.startswith("fused_elbo::")]
    assert called == ["fused_elbo::levels", "fused_elbo::levels_grads"]


@pytest.mark.parametrize("free_bits", [0.0, 0.2])
def test_operators(cpp: None, free_bits: float) -> None:
    tensors = Hierarchy(torch.float32, torch.bfloat16).flat()
    grad, wanted, operators = torch.rand(3), [0, 5, 6, 7, 16], levels.Operators()
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    for per_level in (False, True):
        torch.library.opcheck(operators.levels, (tensors, free_bits, per_level), test_utils=checks)
        weights = grad[:, None] * torch.ones(5) if per_level else grad
        torch.library.opcheck(operators.levels_grads, (tensors, free_bits, weights, wanted), test_utils=checks)

    one_by_one = dispatch.OneByOne(dispatch.operators)
    for per_level in (False, True):
        expected = one_by_one.levels(tensors, free_bits, per_level)
        torch.testing.assert_close(operators.levels(tensors, free_bits, per_level), expected, rtol=1e-6, atol=0)
    pairs = zip(
        operators.levels_grads(tensors, free_bits, grad, wanted),
        one_by_one.levels_grads(tensors, free_bits, grad, wanted), strict=True,
    )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in pairs)


def test_gradients_larger_than_any_cache(cpp: None) -> None:
    """They are written past the caches; a sample's may begin anywhere."""
    shapes = ((2, 1 << 21), (2, (1 << 21) + 3))
    tensors = [0.5 * torch.randn(shape) for shape in shapes for _ in range(4)]
    grad, wanted = torch.rand(2), list(range(8))
    expected = dispatch.OneByOne(dispatch.operators).levels_grads(tensors, 0.0, grad, wanted)
    got = levels.Operators().levels_grads(tensors, 0.0, grad, wanted)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


FIRST_CALLS = """
import torch
from fused_elbo import backends, gaussian_kl
mu, logvar = ([torch.randn(3, n) for n in (5, 9000)] for _ in range(2))
assert backends.cpp.library.loaded is None
first, second = (gaussian_kl(mu, logvar, reduction="none") for _ in range(2))
assert backends.cpp.library.loaded is not None
assert torch.equal(first, second)
"""


def test_the_first_call_is_the_kernels_too(cpp: None) -> None:
    """It gets the library loaded, in a process that has called nothing yet."""
    subprocess.run([sys.executable, "-c", FIRST_CALLS], check=True, timeout=300)


def test_torch_compile_has_no_break() -> None:
    case = Hierarchy(torch.float32)

    def rate(mu: list[Tensor], logvar: list[Tensor], prior: list[Any]) -> Tensor:
        return 0.5 * gaussian_kl(mu, logvar, prior=prior, free_bits=0.05)

    compiled = torch.compile(rate, fullgraph=True, backend="aot_eager")(case.mu, case.logvar, case.prior)
    eager = rate(case.mu, case.logvar, case.prior)
    torch.testing.assert_close(compiled, eager)
    gradients = (torch.autograd.grad(loss, case.leaves()) for loss in (compiled, eager))
    torch.testing.assert_close(*gradients)


def test_transforms() -> None:
    case = Hierarchy(torch.float64, shapes=((2,), (3,)))
    mu, logvar, prior = case.mu, case.logvar, case.prior

    def rate(first: Tensor) -> Tensor:
        return gaussian_kl([first, mu[1]], logvar, prior=prior)

    torch.testing.assert_close(torch.func.grad(rate)(mu[0]), torch.autograd.grad(rate(mu[0]), mu[0])[0])
    mapped = torch.vmap(rate)(torch.stack([mu[0], 2 * mu[0]]))
    torch.testing.assert_close(mapped, torch.stack([rate(mu[0]), rate(2 * mu[0])]))


@pytest.mark.usefixtures("backend")
def test_vmap_of_a_backward() -> None:
    """is_grads_batched, which jacobian(vectorize=True) takes too, and torch.vmap of autograd.grad."""
    case = Hierarchy(torch.float64, batch=4, shapes=((2,), (3,)))
    rates, literal = case.rate(reduction="none"), case.literal()
    wanted, eye = [case.mu[1], case.prior[1][1]], torch.eye(4, dtype=torch.float64)
    expected = [torch.autograd.grad(literal, wanted, row, retain_graph=True) for row in eye]
    batched = torch.autograd.grad(rates, wanted, eye, is_grads_batched=True, retain_graph=True)
    mapped = torch.vmap(lambda row: torch.autograd.grad(rates, wanted, row, retain_graph=True))(eye)
    for got in (batched, mapped):
        torch.testing.assert_close(list(got), [torch.stack(each) for each in zip(*expected, strict=True)])


T = torch.zeros(2, 3)
with warnings.catch_warnings():  # nested tensors of this layout are a prototype
    warnings.simplefilter("ignore")
    NESTED = torch.nested.nested_tensor([T[0], T[1]])


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (([], []), ValueError, "mu: no levels"),
        (([T], T), TypeError, "logvar: expected a list, as mu is, with one tensor for each level, got Tensor"),
        ((T, [T]), TypeError, "mu: expected a list, as logvar is, with one tensor for each level, got Tensor"),
        (([T, T], [T]), ValueError, "as many levels, got 2 and 1"),
        (([T, T], [T, T[:, :2]]), ValueError, r"mu\[1\] and logvar\[1\] must have the same shape, got \(2, 3\)"),
        (([T, T[:1]], [T, T[:1]]), ValueError, r"mu\[0\] and mu\[1\] must have the same batch size"),
        (([T, T.to("meta")], [T, T.to("meta")]), ValueError, rf"mu\[1\]: on meta, but mu\[0\] is on {T.device}"),
        (([T, 1.0], [T, T]), TypeError, r"mu\[1\]: expected a tensor, got float"),
        (([T, T.int()], [T, T]), TypeError, r"mu\[1\]: expected float32"),
        (([T[:0]], [T[:0]]), ValueError, r"mu\[0\]: an empty batch"),
        (([T, T.int()], [T, T.int()]), TypeError, r"mu\[1\]: expected float32"),
        (([T, T], [T, T.to_sparse()]), TypeError, r"logvar\[1\]: expected a dense tensor, got layout torch.sparse_coo"),
        (([T, NESTED], [T, NESTED]), TypeError, r"mu\[1\]: expected a dense tensor, got a nested one"),
        (([T, T], [T, NESTED]), TypeError, r"logvar\[1\]: expected a dense tensor, got a nested one"),
        (([NESTED, T], [NESTED, T]), TypeError, r"mu\[0\]: expected a dense tensor, got a nested one"),
        (([T, T], [T, T.to("meta")]), ValueError, r"logvar\[1\]: on meta"),
        (([T, T[:, :0]], [T, T[:, :0]]), ValueError, r"mu\[1\]: no elements in a sample"),
        (([T.sum(), T], [T.sum(), T]), ValueError, r"mu\[0\]: expected a batch dimension"),
        (([T, T.sum()], [T, T.sum()]), ValueError, r"mu\[1\]: expected a batch dimension"),
    ],
)
def test_what_is_refused(arguments: tuple[Any, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        gaussian_kl(*arguments)


@pytest.mark.parametrize(
    ("prior", "error", "words"),
    [
        (T, TypeError, r"prior: expected a list with \(mu_p, logvar_p\) or None for each level, got Tensor"),
        ([None], ValueError, r"prior: expected \(mu_p, logvar_p\) or None for each of 2 levels, got 1"),
        ([None, T], TypeError, r"prior\[1\]: expected a pair"),
        ([None, (T, T, T)], TypeError, r"prior\[1\]: expected a pair \(mu_p, logvar_p\) of tensors, got tuple of 3"),
        ([None, (T,)], TypeError, r"prior\[1\]: expected a pair \(mu_p, logvar_p\) of tensors, got tuple of 1"),
        ([None, (T, T.to_sparse())], TypeError, r"prior\[1\]\[1\], logvar_p: expected a dense tensor"),
        ([None, (T, T.int())], TypeError, r"prior\[1\]\[1\], logvar_p: expected float32"),
        ([None, (T[:, :2], T)], ValueError, r"prior\[1\]\[0\], mu_p: shape \(2, 2\) does not broadcast to mu\[1\]'s"),
    ],
)
def test_what_is_refused_of_a_prior(prior: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        gaussian_kl([T, T], [T, T], prior=prior)


def test_what_is_refused_of_the_options() -> None:
    with pytest.raises(ValueError, match="reduction: expected one of"):
        gaussian_kl([T], [T], reduction="total")
    with pytest.raises(ValueError, match="free_bits: expected a finite number of at least 0, got -1"):
        gaussian_kl([T], [T], free_bits=-1)
