"""Where options meet, numbers end and dtypes mix: each catches a mutant of the code that other tests let pass."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from cases import Call
from literal import literal_elbo
from stepwise import compare
from torch import Tensor

import fused_elbo
from fused_elbo import backends, decoupled_elbo, decoupled_elbo_backward, gaussian_kl, gaussian_nll
from fused_elbo.call import Options, Tensors
from fused_elbo.operators import registry
from fused_elbo.reference.math import optimal_log_sigma
from fused_elbo.sigma import Kind, Optimal

pytestmark = pytest.mark.ptx
F64 = torch.float64


def assert_exact(call: Call) -> None:
    """An fp64 call against the literal formulas, gradients too."""
    got, true = call(decoupled_elbo), call(literal_elbo)
    for a, b in zip([*got[:3], *call.gradients(got)], [*true, *call.gradients(true)], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def leaf(*values: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor([values], dtype=dtype, requires_grad=True)


@pytest.mark.usefixtures("backend")
class TestOptionsTogether:
    @pytest.mark.parametrize("capacity", [None, 1.0, 1000.0])
    @pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean"])
    def test_free_bits_with_a_learned_beta_and_capacity(self, reduction: str, capacity: float | None) -> None:
        call = Call("free-bits", reduction, dtype=F64)
        call.kw["beta"] = torch.tensor(2.0, dtype=F64, requires_grad=True)
        call.kw["capacity"] = capacity
        assert_exact(call)

    @pytest.mark.parametrize("mode", ["capacity-above", "learned"])
    @pytest.mark.parametrize("batch", [3, 5])
    def test_one_value_for_a_batch_that_fills_no_block(self, batch: int, mode: str) -> None:
        """A block of the step's samples is as large as a power of two: those that are not there add nothing."""
        compare(lambda: Call(mode, batch=batch), 2.5)

    def test_capacity_that_is_met_exactly_pulls_nowhere(self) -> None:
        mu, zero = torch.ones(2, 4, dtype=F64, requires_grad=True), torch.zeros(2, 4, dtype=F64)
        loss = decoupled_elbo(zero, zero + 1, mu, zero, capacity=2.0).loss
        assert not torch.autograd.grad(loss, mu)[0].any()

    def test_an_element_at_its_free_bits_still_has_a_gradient(self) -> None:
        mu, zero = torch.ones(2, 4, dtype=F64, requires_grad=True), torch.zeros(2, 4, dtype=F64)
        (g,) = torch.autograd.grad(gaussian_kl(mu, zero, free_bits=0.5), mu)
        torch.testing.assert_close(g, mu.detach() / 2)

    @pytest.mark.parametrize(("reduction", "n"), [("batchmean", 3), ("sum", 1), ("mean", 12)])
    def test_gradient_of_the_rate_alone(self, reduction: str, n: int) -> None:
        mu, logvar = (torch.randn(3, 4, dtype=F64, requires_grad=True) for _ in range(2))
        g = torch.autograd.grad(gaussian_kl(mu, logvar, reduction=reduction), (mu, logvar))
        torch.testing.assert_close(g, (mu.detach() / n, logvar.detach().expm1() / 2 / n))


@pytest.mark.usefixtures("backend")
class TestNumbers:
    def test_rate_from_underflow_to_overflow(self) -> None:
        ends = [-math.inf, -1e10, -1000.0, -150.0, -104.5, 80.0, 85.0, 88.0, 89.5, 100.0, 1000.0, 1e10]
        logvar = torch.tensor(ends)[:, None]
        rate = gaussian_kl(torch.zeros_like(logvar), logvar, reduction="none").double()
        true = 0.5 * (logvar.double().exp() - 1 - logvar.double()).squeeze()
        fits = true < torch.finfo(torch.float32).max / 2  # above, exp(l) itself is past fp32
        torch.testing.assert_close(rate[fits], true[fits], rtol=2e-6, atol=0)
        assert torch.isinf(rate[~fits]).all()

    def test_gradient_of_logvar_from_underflow_to_overflow(self) -> None:
        logvar = leaf(-math.inf, -1e10, -104.5, 89.5, 1e10)
        (g,) = torch.autograd.grad(gaussian_kl(torch.zeros(1, 5), logvar), logvar)
        assert g.tolist() == [[-0.5, -0.5, -0.5, math.inf, math.inf]]

    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 7e-7), (F64, 2e-15)])
    def test_rate_where_the_series_ends(self, dtype: torch.dtype, tolerance: float) -> None:
        logvar = torch.linspace(-0.6, 0.6, 400, dtype=dtype)[:, None]
        rate, wide = gaussian_kl(torch.zeros_like(logvar), logvar, reduction="none"), logvar.double()
        true = 0.5 * sum(wide**n / math.gamma(n + 1) for n in range(25, 1, -1)).squeeze()  # type: ignore[union-attr]
        # Just past ½ exp(l) − 1 − l cancels most, where an ulp of exp(l), by which a GPU may be wrong, is 8e-7.
        if (backends.forced == "triton" or rate.is_cuda) and dtype == torch.float32:
            tolerance = 1e-6  # 9.4e-7 by the hardware's exp2
        assert ((rate.double() - true).abs() / true).max() < tolerance

    @pytest.mark.parametrize("with_prior", [False, True])
    def test_gradient_of_logvar_near_zero(self, with_prior: bool) -> None:
        logvar, zero = leaf(1e-4, 1e-6, -1e-7, 0.3), torch.zeros(1, 4)
        loss = gaussian_kl(zero, logvar, prior=(zero, zero) if with_prior else None)
        (g,) = torch.autograd.grad(loss, logvar)
        torch.testing.assert_close(g.double(), torch.expm1(logvar.detach().double()) / 2, rtol=3e-7, atol=0)

    def test_a_large_sigma_for_a_large_error(self) -> None:
        error, log_sigma = leaf(1e18, 1e18), torch.tensor([[43.0, 43.1]])
        (g,) = torch.autograd.grad(gaussian_nll(error, torch.zeros(1, 2), log_sigma=log_sigma), error)
        true = error.detach().double() * torch.exp(-2 * log_sigma.double())
        torch.testing.assert_close(g.double(), true, rtol=1e-5, atol=0)

    @pytest.mark.parametrize("which", [2, 3])
    def test_nan_in_the_latents_passes_free_bits(self, which: int) -> None:
        call = Call("free-bits")
        with torch.no_grad():
            call.tensors[which].view(-1)[5] = math.nan
        elbo = call(decoupled_elbo)
        assert elbo.loss.isnan()
        assert elbo.rate.isnan()

    def test_nan_logvar_has_a_nan_gradient(self) -> None:
        logvar = leaf(math.nan)
        assert torch.autograd.grad(gaussian_kl(torch.zeros(1, 1), logvar), logvar)[0].isnan().all()

    @pytest.mark.parametrize("sigma", ["optimal", "optimal-per-image"])
    def test_zero_error_at_the_lowest_floor(self, sigma: str) -> None:
        recon, target = torch.zeros(2, 3, requires_grad=True), torch.zeros(2, 3)
        nll = gaussian_nll(recon, target, sigma=sigma, min_log_sigma=-40.0)
        assert torch.isfinite(nll)
        assert not torch.autograd.grad(nll, recon)[0].any()

    @pytest.mark.parametrize("softclip", [False, True])
    def test_zero_error_with_unequal_weights(self, softclip: bool) -> None:
        """A shared σ then has a gradient of its own, which is divided by S."""
        recon, target = torch.zeros(3, 4, requires_grad=True), torch.zeros(3, 4)
        nll = gaussian_nll(recon, target, sigma=Optimal(softclip=softclip), reduction="none")
        (g,) = torch.autograd.grad(nll, recon, torch.tensor([1.0, 2.0, 0.5]))
        assert g.tolist() == torch.zeros(3, 4).tolist()

    def test_numpy_numbers(self) -> None:
        call = Call("optimal")
        got = decoupled_elbo(*call.tensors, beta=np.float32(2), sigma=np.float32(0.5), free_bits=np.int64(0))
        assert torch.equal(got.loss, decoupled_elbo(*call.tensors, beta=2.0, sigma=0.5).loss)


@pytest.mark.usefixtures("backend")
class TestDtypesAndShapes:
    @pytest.mark.parametrize("dtypes", [(torch.float32, F64), (F64, torch.float32), (F64, F64)])
    def test_latents_wider_than_the_data(self, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
        tensors = [t.detach() for t in Call("optimal").tensors]
        tensors[2:] = [t.to(d) for t, d in zip(tensors[2:], dtypes, strict=True)]
        for got, true in zip(decoupled_elbo(*tensors), literal_elbo(*(t.double() for t in tensors)), strict=False):
            assert got.dtype == F64
            torch.testing.assert_close(got, true, rtol=1e-12, atol=0)

    @pytest.mark.parametrize("shape", [(), (4,), (3, 1, 1), (4, 3, 1, 1), (4, 3, 8, 8)], ids=str)
    @pytest.mark.parametrize(("dtype", "rounding"), [(F64, 0.0), (torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)])
    def test_log_sigma_of_another_dtype(self, shape: tuple[int, ...], dtype: torch.dtype, rounding: float) -> None:
        if dtype == torch.bfloat16 and backends.triton.runs_on_cpu() == "its interpreter":
            pytest.skip("Triton's interpreter truncates where it should round to bf16")
        call = Call("optimal")
        log_sigma = (torch.randn(shape) * 0.3).to(dtype).requires_grad_()
        exact = log_sigma.detach().double().requires_grad_()
        got = decoupled_elbo(*call.tensors, log_sigma=log_sigma).loss
        true = literal_elbo(*(t.double() for t in call.tensors), log_sigma=exact)[0]
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), true, rtol=2e-6, atol=0)
        (g,), (h,) = torch.autograd.grad(got, log_sigma), torch.autograd.grad(true, exact)
        assert g.dtype == dtype
        assert (g.double() - h).abs().max() <= (rounding + 1e-5) * h.abs().max()

    def test_a_shared_priors_gradient_is_rounded_once(self) -> None:
        """Summed over the batch in bf16 it was 5% wrong."""
        torch.manual_seed(11)
        mu, logvar = torch.randn(7, 1).bfloat16(), torch.zeros(7, 1).bfloat16()
        prior = torch.zeros(1).bfloat16().requires_grad_()
        (g,) = torch.autograd.grad(gaussian_kl(mu, logvar, prior=(prior, torch.zeros(1).bfloat16())), prior)
        assert g.dtype == torch.bfloat16
        torch.testing.assert_close(g.double(), -mu.double().mean(0), rtol=2.0**-8, atol=0)

    def test_what_an_expanded_leader_leaves_behind(self) -> None:
        """recon repeats one image, target is channels_last: the copy of target must have a batch stride of its own."""
        base = torch.randn(1, 3, 4, 5, dtype=F64)
        target = torch.randn(4, 3, 4, 5, dtype=F64).contiguous(memory_format=torch.channels_last).requires_grad_()
        loss = gaussian_nll(base.expand(4, 3, 4, 5), target, sigma=1.0, reduction="sum")
        torch.testing.assert_close(torch.autograd.grad(loss, target)[0], target.detach() - base)

    def test_a_permuted_log_sigma_gets_its_own_strides(self) -> None:
        log_sigma = torch.zeros(1, 8, 3, dtype=F64).transpose(1, 2).requires_grad_()
        x = torch.randn(4, 3, 8, dtype=F64)
        (g,) = torch.autograd.grad(gaussian_nll(x, x + 1, log_sigma=log_sigma), log_sigma)
        assert g.stride()[1:] == torch.empty_like(log_sigma).stride()[1:]

    @pytest.mark.parametrize(("shape", "sigma"), [((1, 1), ()), ((1, 1, 1, 1), ()), ((4, 1, 1, 1), (4,))], ids=str)
    def test_what_sigma_a_shape_means(self, shape: tuple[int, ...], sigma: tuple[int, ...]) -> None:
        assert decoupled_elbo(*Call("optimal").tensors, log_sigma=torch.zeros(shape)).sigma.shape == sigma

    @pytest.mark.parametrize("batch", [4, 1])
    @pytest.mark.parametrize("shape", [(), (1, 1, 1)], ids=str)
    def test_one_sigma_per_image_is_so_for_a_single_image_too(self, batch: int, shape: tuple[int, ...]) -> None:
        """A log_sigma that has the batch in it gives (B,), as sigma="optimal-per-image" does, for one image or more."""
        call = Call("optimal", batch=batch)
        each = torch.linspace(-1, 0, batch).reshape(batch, *shape).requires_grad_()
        elbo = decoupled_elbo(*call.tensors, log_sigma=each)
        assert elbo.sigma.shape == decoupled_elbo(*call.tensors, sigma="optimal-per-image").sigma.shape == (batch,)
        torch.testing.assert_close(elbo.sigma, each.detach().reshape(batch).exp())
        shared = decoupled_elbo(*call.tensors, log_sigma=torch.tensor(-1.0, requires_grad=True))
        assert shared.sigma.shape == ()
        elbo.loss.backward()
        assert each.grad.shape == each.shape
        step = Call("optimal", batch=batch)
        alike = each.detach().clone().requires_grad_()
        one = decoupled_elbo_backward(*step.tensors, log_sigma=alike)
        assert one.sigma.shape == (batch,)
        torch.testing.assert_close(alike.grad, each.grad)

    def test_vmap_over_another_dimension(self) -> None:
        recon, target = torch.randn(4, 3, 3, dtype=F64), torch.randn(4, 3, dtype=F64)
        got = torch.vmap(lambda r: gaussian_nll(r, target), in_dims=2)(recon)
        torch.testing.assert_close(got, torch.stack([gaussian_nll(recon[..., i], target) for i in range(3)]))

    def test_curvature_at_the_prior(self) -> None:
        mu = torch.zeros(1, 1, dtype=F64, requires_grad=True)
        (g,) = torch.autograd.grad(gaussian_kl(mu, torch.zeros(1, 1, dtype=F64)), mu, create_graph=True)
        assert torch.autograd.grad(g, mu)[0].item() == 1


def test_the_reference_clamps_the_sum_not_its_logarithm() -> None:
    s = torch.zeros((), dtype=F64, requires_grad=True)
    log_sigma = optimal_log_sigma(s, 10, Options(min_log_sigma=-7.0))
    assert torch.autograd.grad(log_sigma, s)[0] == 0


@pytest.mark.parametrize("name", ["beta", "capacity", "sigma"])
def test_compiled_numbers_keep_their_precision(name: str) -> None:
    """A number that becomes a tensor in compiled code has the compute type, not the inputs'."""
    half = [torch.randn(4, 6).bfloat16() for _ in range(4)]
    mixed = [half[0].float(), half[1].float(), half[2].double(), half[3].double()]
    for tensors, tolerance in ((half, 1e-6), (mixed, 1e-13)):
        torch._dynamo.reset()
        got = torch.compile(decoupled_elbo, backend="aot_eager", fullgraph=True)(*tensors, **{name: 0.3}).loss
        torch.testing.assert_close(got, decoupled_elbo(*tensors, **{name: 0.3}).loss, rtol=tolerance, atol=0)


def test_fakes_of_mixed_dtypes() -> None:
    x = torch.randn(2, 3)
    args = (*Tensors(x, x.double(), x, x), *Options(sigma_mode=int(Kind.BATCH), min_log_sigma=-7.0))
    for name in ("forward", "stats"):
        torch.library.opcheck(registry.find(name), args, test_utils=("test_faketensor",))


def test_a_backend_can_be_entered_again() -> None:
    choice = fused_elbo.backend("reference")
    with choice, choice:
        pass
    assert backends.forced is None


def test_an_empty_vmap_is_refused() -> None:
    with pytest.raises(ValueError, match="mapped dimension has size 0"):
        torch.vmap(lambda m: gaussian_kl(m, m))(torch.zeros(0, 2, 3))
