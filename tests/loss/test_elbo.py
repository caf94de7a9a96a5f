"""Values and gradients of every mode against the literal formulas in fp64, on every backend, dtype and layout."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import (
    BASIC,
    FEW,
    INSIDE_A_SAMPLE,
    MODES,
    REDUCTIONS,
    Call,
    allowed,
    gpu_kernels_on_cpu,
    implied,
)
from literal import literal_elbo
from torch import Tensor

from fused_elbo import decoupled_elbo

pytestmark = pytest.mark.usefixtures("backend")

EPS = {torch.float64: 0.0, torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # of rounding once


def error(got: Tensor, truth: Tensor) -> float:
    """The largest difference, relative to the largest true value."""
    assert got.shape == truth.shape
    assert torch.isfinite(got).all()
    scale = truth.abs().max().clamp(min=1e-30)
    return ((got.double() - truth).abs().max() / scale).item()


def compare(call: Call, tolerance: float) -> None:
    """No worse than the literal formula in the same dtype, plus `tolerance`, plus one rounding of the gradients."""
    exact = call.double()
    truth = exact(literal_elbo)
    true_gradients = exact.gradients(truth)
    eager = call(literal_elbo)
    eager_gradients = call.gradients(eager)
    ours = call(decoupled_elbo)
    gradients = call.gradients(ours)
    for name, got, same_dtype, true in zip(("loss", "distortion", "rate"), ours, eager, truth, strict=False):
        assert got.dtype == (torch.float64 if call.tensors[0].dtype == torch.float64 else torch.float32)
        assert error(got, true) <= error(same_dtype, true) + tolerance, name
    for leaf, got, same_dtype, true in zip(call.leaves(), gradients, eager_gradients, true_gradients, strict=True):
        assert got.dtype == leaf.dtype
        rounding = EPS[leaf.dtype]
        assert error(got, true) <= min(error(same_dtype, true), 10 * rounding) + tolerance + rounding


# "sum" and "mean" only scale what "batchmean" is: on a GPU's kernels test_facts.py and test_step.py show that they do.
OF_FINALIZE = ("batchmean", "none") if gpu_kernels_on_cpu() else REDUCTIONS


# Weights of elements are part of what "mean" divides by.
RUNS = [(mode, r) for mode in MODES for r in (OF_FINALIZE if mode in BASIC else ("mean", "none"))]


@pytest.mark.parametrize(
    ("mode", "reduction"), [pytest.param(*run, marks=pytest.mark.ptx if run[1] == "none" else ()) for run in RUNS]
)
def test_fp64_equals_the_literal_formulas(mode: str, reduction: str) -> None:
    if allowed(mode, reduction):
        compare(Call(mode, reduction, dtype=torch.float64), tolerance=1e-12)


def runs_of(mode: str, dtype: torch.dtype) -> list[pytest.MarkDecorator]:
    """The marks that say in which runs it is."""
    if mode not in FEW:
        return [implied("every mode in fp64, and one for each way through the kernels in every dtype")]
    # Of bf16 the architectures convert differently; fp16 they all have.
    each = [] if dtype == torch.float16 else [pytest.mark.ptx_each]
    return [*each, pytest.mark.schedules]


@pytest.mark.ptx
@pytest.mark.parametrize(
    ("mode", "dtype"),
    [
        pytest.param(mode, dtype, marks=runs_of(mode, dtype))
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        for mode in (MODES if dtype == torch.bfloat16 else BASIC)  # fp32 in these: see test_step.py
    ],
    ids=str,
)
def test_no_worse_than_eager_in_its_own_dtype(mode: str, dtype: torch.dtype) -> None:
    compare(Call(mode, dtype=dtype), tolerance=2e-6)


@pytest.mark.ptx
@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)]
)
@pytest.mark.parametrize("mode", ["optimal", "learned-pixel", "learned-channel"])
def test_recon_and_target_of_two_dtypes(mode: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    compare(Call(mode, dtype=dtypes[0], target_dtype=dtypes[1]), tolerance=2e-6)


def test_fp64_anywhere_makes_fp64_results() -> None:
    call = Call(dtype=torch.float32, target_dtype=torch.float64)
    ours = call(decoupled_elbo)
    assert {t.dtype for t in ours} == {torch.float64}
    assert [g.dtype for g in call.gradients(ours)] == [t.dtype for t in call.leaves()]
    assert error(ours.loss, call.double()(literal_elbo)[0]) < 1e-12


# Sizes around a vector (16), a block (1024) and a chunk (16384), and shapes of every rank.
SIZES = [(), (1,), (15,), (17,), (784,), (1023,), (1025,), (16384,), (16385,), (3, 75, 150), (2, 3, 5, 4), (3, 9, 7)]
SMALL_SIZES = [(), (17,), (1025,), (2, 3, 5, 4)]


def runs_of_size(data: tuple[int, ...], batch: int) -> list[Any]:
    marks = [pytest.mark.ptx] if data in SMALL_SIZES else []
    if data == (16384,) or (batch == 1 and data != (17,)):
        marks.append(implied("other sizes in a batch of three, and one of these in a batch of one"))
    return marks


@pytest.mark.parametrize(
    ("data", "batch"),
    [pytest.param(s, batch, marks=runs_of_size(s, batch)) for batch in (1, 3) for s in SIZES],
    ids=str,
)
def test_sizes(data: tuple[int, ...], batch: int) -> None:
    inside = INSIDE_A_SAMPLE if data else []
    if gpu_kernels_on_cpu() and math.prod(data) > 2000:  # at a million elements a second
        inside = ["learned-channel", "learned-pixel"]
    for mode in ("optimal", "per-image", *inside):
        compare(Call(mode, data=data, latent=data[-1:], batch=batch, dtype=torch.float64), tolerance=1e-11)


LATENTS = [(), (1,), (3,), (130,), (4, 16, 16), (2, 3, 4, 5), (20000,)]
FEW_LATENTS = [(3,), (130,), (4, 16, 16)]
of_a_prior = "the same shapes of latents with a prior"


@pytest.mark.parametrize(
    ("mode", "latent"),
    [
        pytest.param(
            mode, s, marks=pytest.mark.ptx if s in FEW_LATENTS else implied(of_a_prior, unless=mode == "prior")
        )
        for mode in ("optimal", "free-bits", "prior", "prior-shared")
        for s in LATENTS
    ],
    ids=str,
)
def test_latent_shapes(mode: str, latent: tuple[int, ...]) -> None:
    compare(Call(mode, latent=latent, dtype=torch.float64), tolerance=1e-11)
    compare(Call(mode, latent=latent, dtype=torch.float32), tolerance=2e-6)


@pytest.mark.ptx
def test_rate_near_the_prior_does_not_cancel() -> None:
    """exp(l) − 1 − l is l²/2 there; the literal formula in fp32 loses everything, bf16 KL even turns negative."""
    for size in (1e-1, 1e-2, 1e-3, 1e-4):
        logvar = torch.linspace(-size, size, 8).reshape(2, 4)
        x = torch.zeros(2, 3)
        rate = decoupled_elbo(x, x, torch.zeros(2, 4), logvar, sigma=1.0, reduction="none").rate
        wide = logvar.double()
        # The literal formula in fp64 has cancelled too, to about 1e-16/size², so the truth is the series.
        series = sum(wide**n / torch.lgamma(torch.tensor(n + 1.0, dtype=torch.float64)).exp() for n in range(2, 12))
        assert error(rate, 0.5 * series.sum(1)) < 3e-7  # type: ignore[union-attr]


@pytest.mark.ptx
def test_logvar_far_out() -> None:
    """exp(l) at both ends: no overflow before fp32's own, and none from fp16 inputs (exp(12) > 65504)."""
    logvar = torch.tensor([[-100.0, -20.0, 12.0, 60.0]])
    x, mu = torch.zeros(1, 2), torch.zeros(1, 4)
    for dtype in (torch.float32, torch.float16):
        got = decoupled_elbo(x, x, mu.to(dtype), logvar.to(dtype), sigma=1.0).rate
        assert error(got, 0.5 * (logvar.double().exp() - 1 - logvar.double()).sum()) < 1e-6


@pytest.mark.ptx
def test_half_precision_sums_do_not_overflow() -> None:
    """Σe² over 3×256² is 2e5 and overflows fp16."""
    x = torch.zeros(1, 3, 256, 256, dtype=torch.float16)
    latents = torch.zeros(1, 4)
    elbo = decoupled_elbo(x + 1, x, latents, latents, sigma=1.0)
    assert error(elbo.distortion, torch.tensor(3 * 256**2 * (0.5 + 0.9189385332046727), dtype=torch.float64)) < 1e-6


@pytest.mark.ptx
@pytest.mark.parametrize("mode", ["optimal", "per-image", "softclip", "constant", "learned-pixel"])
def test_nan_passes(mode: str) -> None:
    """A floor or a clamp that turned NaN into a number would hide a diverged model."""
    call = Call(mode)
    with torch.no_grad():
        call.tensors[0].view(-1)[5] = float("nan")
        call.tensors[2].view(-1)[5] = float("nan")
    ours = call(decoupled_elbo)
    assert all(torch.isnan(v).all() for v in ours[:3])
    g_recon, _, g_mu, *_ = call.gradients(ours)
    assert torch.isnan(g_recon).any()
    assert torch.isnan(g_mu).any()
