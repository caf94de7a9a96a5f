"""torch.compile of calls that are unusual in their tensors: one in two places, sizes that only the run will know.

What PyTorch makes of them depends on its release: `torch_versions`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.config
from cases import Call
from literal import literal_elbo
from torch import Tensor

from fused_elbo import decoupled_elbo, gaussian_kl
from fused_elbo.call import Options, Tensors
from fused_elbo.operators import registry
from fused_elbo.sigma import Kind

pytestmark = pytest.mark.torch_versions


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------- one tensor in two places

NAMES = ("recon", "target", "mu", "logvar", "mu_p", "logvar_p", "log_sigma", "beta", "capacity")
PAIRS = [
    *itertools.combinations(NAMES[:7], 2),  # (B, D) all
    *itertools.product(("log_sigma",), NAMES[7:]),
    ("beta", "capacity"),
]


@pytest.mark.parametrize("pair", PAIRS, ids=" is ".join)
def test_one_tensor_as_two_arguments(pair: tuple[str, str]) -> None:
    full = set(pair) <= set(NAMES[:7])
    values = {name: torch.randn(3, 4, dtype=torch.float64) for name in NAMES[:6]}
    values["log_sigma"] = torch.randn((3, 4) if full else (), dtype=torch.float64)
    values |= {name: torch.rand((), dtype=torch.float64) for name in NAMES[7:]}
    held = "capacity" in pair  # which takes no gradient
    leaves = {name: t.requires_grad_(name != "capacity" and not (held and name in pair)) for name, t in values.items()}
    leaves[pair[1]] = leaves[pair[0]]

    def loss(v: dict[str, Tensor], function: Callable[..., Any] = decoupled_elbo) -> Tensor:
        options = {name: v[name] for name in NAMES[6:]}
        return function(*(v[name] for name in NAMES[:4]), prior=(v["mu_p"], v["logvar_p"]), **options)[0]

    wanted = [t for name, t in leaves.items() if name != pair[1] and t.requires_grad]
    got = torch.autograd.grad(torch.compile(loss, backend="eager", fullgraph=True)(leaves), wanted, allow_unused=True)
    expected = torch.autograd.grad(loss(leaves, literal_elbo), wanted, allow_unused=True)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(torch.zeros(()) if g is None else g, torch.zeros_like(g) if e is None else e)


# For two levels: mu, logvar, mu_p, logvar_p of the first, then of the second.
@pytest.mark.parametrize("pair", [*itertools.combinations(range(4), 2), *itertools.product(range(4), range(4, 8))])
def test_one_tensor_in_two_places_of_the_levels(pair: tuple[int, int]) -> None:
    leaves = list(torch.randn(8, 3, 4, dtype=torch.float64).unbind(0))
    leaves = [t.clone().requires_grad_() for t in leaves]
    leaves[pair[1]] = leaves[pair[0]]

    def rate(t: list[Tensor]) -> Tensor:
        return gaussian_kl([t[0], t[4]], [t[1], t[5]], prior=[(t[2], t[3]), (t[6], t[7])])

    def literal(t: list[Tensor]) -> Tensor:
        each = (literal_elbo(l[0], l[0] + 1, l[0], l[1], prior=(l[2], l[3]))[2] for l in (t[:4], t[4:]))
        return sum(each, torch.zeros(()))

    wanted = [t for i, t in enumerate(leaves) if i != pair[1]]
    got = torch.autograd.grad(torch.compile(rate, backend="eager", fullgraph=True)(leaves), wanted)
    torch.testing.assert_close(got, torch.autograd.grad(literal(leaves), wanted))


def test_one_prior_of_all_levels_through_aot_autograd() -> None:
    tensors = [torch.randn(4, 3, dtype=torch.float64) for _ in range(4)]

    def rate(prior: tuple[Tensor, Tensor]) -> Tensor:
        return gaussian_kl(tensors[:2], tensors[2:], prior=[prior, prior])

    prior = tuple(torch.zeros(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    got = torch.autograd.grad(torch.compile(rate, backend="aot_eager", fullgraph=True)(prior), prior)
    by_hand = [
        -(tensors[0] + tensors[1]) / 4,
        sum((1 - tensors[i + 2].exp() - tensors[i].square()) / 8 for i in (0, 1)),
    ]
    torch.testing.assert_close(list(got), by_hand)


# ------------------------------------------------------------------------------------ sizes that only the run will know


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_a_batch_that_a_mask_selects(compiler: str, reduction: str) -> None:
    """It is one graph for any number of samples, as with F.mse_loss."""

    def loss(keep: Tensor, *tensors: Tensor) -> Tensor:
        recon, target, mu, logvar = (t[keep] for t in tensors)
        elbo = decoupled_elbo(recon, target, mu, logvar, log_sigma=recon * 0.1, reduction=reduction)
        optimal = decoupled_elbo(recon, target, mu, logvar, beta=mu[:, 0], reduction=reduction)
        level = gaussian_kl([mu, logvar], [logvar, mu], prior=[(logvar, mu), None], reduction=reduction)
        return (elbo.loss + optimal.loss + level).sum()

    tensors = [t.detach().requires_grad_() for t in Call(data=(3,)).tensors]
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        fast = torch.compile(loss, backend=compiler, fullgraph=True)
        for keep in (torch.tensor([True, False, True, True]), torch.tensor([False, True, False, False])):
            got, expected = fast(keep, *tensors), loss(keep, *tensors)
            torch.testing.assert_close(got, expected)
            pairs = (torch.autograd.grad(value, tensors) for value in (got, expected))
            torch.testing.assert_close(*pairs)


# ---------------------------------------------------------------------------------------------------------- operators


def test_the_operators_that_tracers_see() -> None:
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    tensors = [t.detach().requires_grad_() for t in Call(data=(3,)).tensors]
    args = (*Tensors(*tensors), *Options(sigma_mode=int(Kind.BATCH), min_log_sigma=-7.0), None)
    torch.library.opcheck(registry.find("elbo"), args, test_utils=checks)
    torch.library.opcheck(
        registry.find("rates"), ([tensors[2], tensors[3], None, None], 0.0, False, None), test_utils=checks
    )
