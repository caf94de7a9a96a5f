"""`log_aggregate_posterior` and `kl_decomposition`: which backend serves them, what traces them, what they refuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from mixtures import inputs
from torch import Tensor

import fused_elbo
from fused_elbo import aggregate, kl_decomposition, log_aggregate_posterior


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """The names of the backends that calls go to, as they come."""
    names, real = [], aggregate.aggregate_implementation

    def implementation(backend: str | None, z: Tensor) -> Any:
        names.append(backend)
        return real(backend, z)

    monkeypatch.setattr(aggregate, "aggregate_implementation", implementation)
    return names


def test_the_backend_that_was_asked_for_serves(asked: list[str | None]) -> None:
    """Backward too, which may run when it is no longer asked for."""
    with fused_elbo.backend("reference"):
        joint, _ = log_aggregate_posterior(*inputs(4, 6, 3))
    joint.sum().backward()
    assert asked == ["reference", "reference"]


@pytest.mark.usefixtures("cpp")
def test_it_serves_compiled_code_too(asked: list[str | None]) -> None:
    torch._dynamo.reset()
    joint, _ = torch.compile(log_aggregate_posterior, fullgraph=True, backend="eager")(*inputs(4, 6, 3))
    joint.sum().backward()
    assert len(asked) > 1
    assert set(asked) == {"cpp"}


# ------------------------------------------------------------------------------------------------------------ compilers


@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_compile_has_no_break(dynamic: bool) -> None:
    leaves = inputs(7, 7, 3, torch.float32)

    def loss(*leaves: Tensor) -> Tensor:
        terms = kl_decomposition(*leaves, dataset_size=100)
        return terms.mutual_information + 3 * terms.total_correlation + terms.dimension_wise

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for given in (leaves, inputs(9, 9, 3, torch.float32)):
        torch.testing.assert_close(compiled(*given), loss(*given))
        pairs = (torch.autograd.grad(f(*given), given) for f in (compiled, loss))
        torch.testing.assert_close(*pairs)


def test_transforms() -> None:
    z, mu, logvar = inputs(4, 6, 3)

    def total(z: Tensor) -> Tensor:
        joint, marginals = log_aggregate_posterior(z, mu, logvar, dataset_size=30)
        return joint.sum() + marginals.square().sum()

    expected = torch.autograd.grad(total(z), z)[0]
    torch.testing.assert_close(torch.func.grad(total)(z), expected)
    mapped = torch.vmap(torch.func.grad(total))(torch.stack([z, 2 * z]))
    torch.testing.assert_close(mapped[0], expected)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(z.detach(), z.detach())
        with pytest.raises(NotImplementedError, match="forward-mode"):
            log_aggregate_posterior(dual, mu, logvar)


def test_opcheck() -> None:
    z, mu, logvar = (t.detach() for t in inputs(4, 6, 3, torch.float32))
    call = (z, mu, logvar, 1, 30)
    sums = torch.ops.fused_elbo.aggregate(*call)
    torch.library.opcheck(torch.ops.fused_elbo.aggregate.default, call)
    for mask in (7, 2):
        torch.library.opcheck(torch.ops.fused_elbo.aggregate_grads.default, (*call, *sums, *sums, mask))
    leaves = (t.requires_grad_() for t in (z, mu, logvar))
    torch.library.opcheck(torch.ops.fused_elbo.log_aggregate.default, (*leaves, 1, 30, None))


def test_autocast_changes_nothing() -> None:
    leaves = inputs(5, 5, 4, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = log_aggregate_posterior(*leaves)
    torch.testing.assert_close(inside, log_aggregate_posterior(*leaves), rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        ({"z": [1.0]}, {}, TypeError, "z: expected a tensor, got list"),
        ({"z": torch.zeros(4, 3).int()}, {}, TypeError, "z: expected float32"),
        ({"z": torch.zeros(4, 2)}, {}, ValueError, r"z and mu must have the same shape after .*\(4, 2\) and \(6, 3\)"),
        (
            {"z": torch.zeros(7, 3)},
            {},
            ValueError,
            "own: each z has a component of its own, but there are 7 of z and 6",
        ),
        ({"z": torch.zeros(0, 3)}, {}, ValueError, "z: an empty batch"),
        ({"logvar": torch.zeros(5, 3)}, {}, ValueError, r"mu and logvar must have the same shape, got \(6, 3\) and"),
        ({"z": torch.zeros(4), "mu": torch.zeros(6), "logvar": torch.zeros(6)}, {}, ValueError, r"use mu\[:, None\]"),
        ({}, {"dataset_size": 5}, ValueError, "dataset_size: expected at least as many as the 6 components, got 5"),
        ({}, {"dataset_size": 9.5}, TypeError, "dataset_size: expected None or a whole number, got 9.5"),
        ({}, {"dataset_size": 9, "own": False}, ValueError, "dataset_size: own=False weighs all components alike"),
        ({}, {"own": 1}, TypeError, "own: expected True or False, got 1"),
        ({}, {"process_group": 3}, TypeError, "process_group: expected a ProcessGroup"),
    ],
)
def test_what_is_refused(change: dict[str, Any], options: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"z": torch.zeros(4, 3), "mu": torch.zeros(6, 3), "logvar": torch.zeros(6, 3)} | change
    with pytest.raises(error, match=message):
        log_aggregate_posterior(**given, **options)


def test_kl_decomposition_needs_a_sample_of_each() -> None:
    with pytest.raises(ValueError, match=r"z and mu must have the same batch size, got \(4, 3\) and \(6, 3\)"):
        kl_decomposition(torch.zeros(4, 3), torch.zeros(6, 3), torch.zeros(6, 3))
    with pytest.raises(ValueError, match="reduction: expected one of"):
        kl_decomposition(torch.zeros(6, 3), torch.zeros(6, 3), torch.zeros(6, 3), reduction="avg")


def test_a_device_is_refused_by_the_name_of_its_argument() -> None:
    mu = torch.zeros(6, 3)
    with pytest.raises(ValueError, match="mu: on cpu, but z is on meta"):
        log_aggregate_posterior(torch.zeros(4, 3, device="meta"), mu, mu)


def test_the_size_of_the_data_set() -> None:
    """N = M is no size at all, and any whole number but a bool will do; both functions refuse a smaller one."""
    leaves = [t.detach() for t in inputs(5, 5, 3)]
    for function in (log_aggregate_posterior, kl_decomposition):
        for size in (5, np.int64(5)):
            torch.testing.assert_close(function(*leaves, dataset_size=size), function(*leaves))
        with pytest.raises(ValueError, match="dataset_size: expected at least as many as the 5 components, got 4"):
            function(*leaves, dataset_size=4)
        with pytest.raises(TypeError, match="dataset_size: expected None or a whole number, got True"):
            function(*(t[:1] for t in leaves), dataset_size=True)
