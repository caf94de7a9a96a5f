"""The Triton kernels of the aggregate posterior, where Triton runs on a CPU: what depends on how they are launched.
Their numbers are tested in tests/loss, with every backend's."""

from __future__ import annotations

import importlib
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from kernel_check import GuardedAllocations, compare, guarded

from fused_elbo import backends
from fused_elbo.call import GradLogSums, LogSums, Mixture
from fused_elbo.reference import aggregate as reference

pytest.importorskip("triton", reason="Triton is not installed (it is for Linux)")

from test_triton_step import let_threads_agree

from fused_elbo.kernels import _plan
from fused_elbo.kernels import aggregate as kernels

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(
        not backends.triton.runs_on_cpu(),
        reason="Triton runs on no CPU here: needs TRITON_INTERPRET=1 or such a driver",
    ),
]
# Several programs for every walk, several blocks of components for a point, and the shares of 7 points at a time.
SMALL = {"STEPS": 1, "JOINT": (8, 32, 4), "SHARES": 7 * 41}


@contextmanager
def cut(module: ModuleType, **settings: Any) -> Iterator[None]:
    """The plans of a copy of the kernels, with other constants."""
    plan = importlib.import_module(f"{module.__package__}._plan")
    with ExitStack() as stack:
        for name, value in settings.items():
            stack.enter_context(mock.patch.object(module, name, value))
        plan.forget()
        yield
    plan.forget()


class AggregateCase:
    """Guarded arguments, with what the reference makes of them in fp64."""

    def __init__(
        self,
        sizes: tuple[int, int, int],
        dtype: torch.dtype = torch.float64,
        dataset_size: int | None = 70,
        own: int = 0,
        **settings: Any,
    ) -> None:
        points, components, latents = sizes
        mu, logvar = torch.randn(components, latents), torch.randn(components, latents) - 1
        logvar[0], mu[-1, 0] = math.inf, 30.0  # of density 0, before any other; and far from all
        z = mu[own : own + points] + 0.3 * torch.randn(points, latents)
        z, mu, logvar = (guarded(t.to(dtype)) for t in (z, mu, logvar))
        self.mixture, self.settings = Mixture(z, mu, logvar, own, dataset_size), settings
        wide = Mixture(z.double(), mu.double(), logvar.double(), own, dataset_size)
        self.sums = reference.aggregate(wide)
        kind = torch.float64 if dtype == torch.float64 else torch.float32
        self.weights = GradLogSums(*[guarded(torch.randn_like(t).to(kind)) for t in self.sums])
        exact = GradLogSums(*[t.double() for t in self.weights])
        self.gradients = reference.aggregate_grads(wide, self.sums, exact, 7)

    def check(self, operators: Any) -> None:
        """Raises AssertionError at the first fault."""
        with cut(operators, **self.settings):
            with GuardedAllocations() as allocations:
                sums = operators.aggregate(self.mixture)
            allocations.verify()
            for name, value, true in zip(("joint", "marginals"), sums, self.sums, strict=True):
                compare(name, value, true)
            own = LogSums(*[guarded(t) for t in sums])
            with GuardedAllocations() as allocations:
                gradients = operators.aggregate_grads(self.mixture, own, self.weights, 7)
            allocations.verify()
        for name, value, true in zip(("z", "mu", "logvar"), gradients, self.gradients, strict=True):
            if value.dtype in (torch.float64, torch.float32):
                compare(f"gradient of {name}", value, true)
            else:
                half = torch.finfo(value.dtype).eps / 2
                torch.testing.assert_close(value.double(), true, rtol=half, atol=2 * half * true.abs().max().item())


def aggregate_cases() -> dict[str, AggregateCase]:
    torch.manual_seed(0)
    return {
        "whole": AggregateCase((19, 21, 5)),
        "in parts": AggregateCase((19, 41, 5), own=1, **SMALL),
        "alike": AggregateCase((5, 9, 3), dataset_size=None),
        "many latents": AggregateCase((9, 11, 67), STEPS=1),
        "fp32, in parts": AggregateCase((19, 41, 5), torch.float32, **SMALL),
    }


@pytest.mark.ptx
@pytest.mark.ptx_each
@pytest.mark.schedules
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_values_in_parts(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    let_threads_agree(monkeypatch)
    if dtype == torch.bfloat16 and backends.triton.runs_on_cpu() == "its interpreter":
        pytest.skip("Triton's interpreter truncates where it should round to bf16")
    AggregateCase((19, 41, 5), dtype, **SMALL).check(kernels)


@pytest.mark.ptx
def test_many_latents() -> None:
    AggregateCase((9, 11, 67), torch.float32, STEPS=1).check(kernels)


def test_64_bit_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    from fused_elbo.kernels import _layout

    case = AggregateCase((19, 21, 5), torch.float32)
    expected = kernels.aggregate(case.mixture)
    gradients = kernels.aggregate_grads(case.mixture, expected, case.weights, 7)
    monkeypatch.setattr(_layout, "FORCE_WIDE", True)
    found = kernels.aggregate(case.mixture)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(kernels.aggregate_grads(case.mixture, found, case.weights, 7), gradients, strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(backends.triton.runs_on_cpu() != "its interpreter", reason="counts in Triton's interpreter")
def test_one_exponential_for_each_element(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of B·M·K forward; and two backward, one by who owns points, and one by who owns components. Beside them are those
    of B·M, and of the variances, which are formed anew for every 16 or 8 points. What programs add that share the
    components of a point is not counted: at most 3/8, where each has 8 of them."""
    from triton.runtime.interpreter import InterpreterBuilder

    counts: Counter[str] = Counter()
    for name in ("create_exp", "create_exp2"):
        original = getattr(InterpreterBuilder, name)

        def counting(self: Any, argument: Any, original: Any = original) -> Any:
            counts["exponentials"] += argument.data.size
            return original(self, argument)

        monkeypatch.setattr(InterpreterBuilder, name, counting)

    def counted(points: int, components: int, latents: int, given: tuple[bool, bool] = (True, True)) -> list[float]:
        """Forward and backward, for each of B·M·K."""
        z, mu = torch.randn(points, latents), torch.randn(components, latents)
        mixture, elements = Mixture(z, mu, mu - 1, 0, 1000), points * components * latents
        counts.clear()
        with cut(kernels, FILL=1):
            sums = kernels.aggregate(mixture)
            forward = counts.pop("exponentials") / elements
            ones = GradLogSums(*[torch.ones_like(t) if wanted else None for t, wanted in zip(sums, given, strict=True)])
            kernels.aggregate_grads(mixture, sums, ones, 7)
        return [forward, counts["exponentials"] / elements]

    forward, backward = counted(64, 128, 64)
    print(f"{forward:.3f} forward, {backward:.3f} backward")  # with pytest -s
    assert 1 <= forward < 1 + 1 / 16 + 1 / 8 + 3 / 64
    assert 2 <= backward < 2 + 2 / 8 + 1 / 8 + 3 / 64
    assert counted(64, 128, 64, (True, False))[1] < 3 / 8 + 3 / 64
    assert 2 <= counted(64, 128, 64, (False, True))[1] < 2 + 2 / 8


def test_the_same_bits_whatever_ran_before() -> None:
    case = AggregateCase((19, 41, 5), torch.float32, **SMALL)
    with cut(kernels, **SMALL):
        first = kernels.aggregate(case.mixture)
        gradients = kernels.aggregate_grads(case.mixture, first, case.weights, 7)
        _plan.forget()
        for a, b in zip(first, kernels.aggregate(case.mixture), strict=True):
            assert torch.equal(a, b)
        for a, b in zip(gradients, kernels.aggregate_grads(case.mixture, first, case.weights, 7), strict=True):
            assert torch.equal(a, b)
