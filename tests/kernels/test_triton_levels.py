"""The Triton kernels of a hierarchy's levels, where Triton runs on a CPU: what depends on how they are launched. Their
numbers are tested in tests/loss, with every backend's."""

from __future__ import annotations

import pytest
import torch
from hierarchies import Hierarchy
from torch import Tensor

import fused_elbo
from fused_elbo import backends

pytest.importorskip("triton", reason="Triton is not installed (it is for Linux)")
pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(
        not backends.triton.runs_on_cpu(),
        reason="Triton runs on no CPU here: needs TRITON_INTERPRET=1 or such a driver",
    ),
]
SHAPES = ((8,), (3,), (5, 8), (264,), (2100,))


def found(case: Hierarchy, per_level: bool = True) -> list[Tensor]:
    with fused_elbo.backend("triton"):
        rates = case.rate(reduction="none", free_bits=0.1, per_level=per_level)
        weights = torch.linspace(-1.0, 2.0, rates.numel()).reshape(rates.shape)
        return [rates, *torch.autograd.grad(rates, case.leaves(), weights)]


@pytest.mark.ptx
@pytest.mark.ptx_each
@pytest.mark.schedules
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("per_level", [False, True])
def test_values(per_level: bool, dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and backends.triton.runs_on_cpu() == "its interpreter":
        pytest.skip("Triton's interpreter truncates where it should round to bf16")
    case = Hierarchy(dtype, batch=5, shapes=SHAPES)
    exact = case.double()
    rates, *gradients = found(case, per_level)
    true = exact.literal(0.1, per_level)
    torch.testing.assert_close(rates.double(), true, rtol=2e-6, atol=2e-6)
    weights = torch.linspace(-1.0, 2.0, rates.numel(), dtype=torch.float64).reshape(rates.shape)
    expected = torch.autograd.grad(true, exact.leaves(), weights)
    for leaf, g, t in zip(case.leaves(), gradients, expected, strict=True):
        rounding = 0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
        assert g.dtype == leaf.dtype
        torch.testing.assert_close(g.double(), t, rtol=0, atol=(rounding + 2e-6) * t.abs().max().item())


@pytest.mark.parametrize("setting", [("TILE", 64), ("MANY", 2)], ids=str)
def test_many_tiles(setting: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of small ones, or several for a program."""
    from fused_elbo.kernels import _layout, _plan

    torch.manual_seed(0)
    expected = found(Hierarchy(torch.float32, shapes=SHAPES))
    monkeypatch.setattr(_layout, *setting)
    _plan.forget()
    torch.manual_seed(0)
    got = found(Hierarchy(torch.float32, shapes=SHAPES))
    _plan.forget()
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_64_bit_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    from fused_elbo.kernels import _layout

    case = Hierarchy(torch.float32, shapes=SHAPES)
    expected = found(case)
    monkeypatch.setattr(_layout, "FORCE_WIDE", True)
    for a, b in zip(found(case), expected, strict=True):
        assert torch.equal(a, b)
