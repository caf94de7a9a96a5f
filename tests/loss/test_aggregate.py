"""`log_aggregate_posterior` and `kl_decomposition`: against the formula written out, on every backend."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import implied, to
from mixtures import F64, grads_of, inputs, literal
from torch import Tensor
from torch.distributions import Normal

import fused_elbo
from fused_elbo import backends, decoupled_elbo, dispatch, kl_decomposition, log_aggregate_posterior
from fused_elbo.call import GradLogSums, LogSums, Mixture
from fused_elbo.reference import aggregate as reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# (B, M, K): one of each; less than a vector; odd; many of each in turn, which no tile divides.
SIZES = [(1, 1, 1), (1, 9, 3), (5, 5, 10), (3, 130, 2), (70, 75, 5), (33, 40, 67)]
FEW = [(1, 1, 1), (5, 19, 10), (33, 40, 20)]
WEIGHTS = [{}, {"dataset_size": 1000}, {"own": False}]


@pytest.mark.ptx
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("weights", WEIGHTS, ids=["all", "batch", "others"])
@pytest.mark.parametrize(
    "sizes", [pytest.param(s, marks=() if s in SIZES[2:5] else implied("the others")) for s in SIZES]
)
def test_fp64_equals_torch_distributions(sizes: tuple[int, int, int], weights: dict[str, Any]) -> None:
    leaves = inputs(*sizes)
    got = log_aggregate_posterior(*leaves, **weights)
    expected = literal(*leaves, weights.get("dataset_size"), weights.get("own", True))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    for name, a, b in zip("zml", grads_of(got, leaves), grads_of(expected, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.ptx
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", DTYPES[:1] + DTYPES[2:], ids=str)
@pytest.mark.parametrize("sizes", [(5, 19, 10), (33, 40, 20)])
def test_every_dtype(dtype: torch.dtype, sizes: tuple[int, int, int]) -> None:
    """Sums in fp32, rounded once: an error is at most a few times what fp32 in plain PyTorch makes."""
    if backends.triton.runs_on_cpu() == "its interpreter" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter truncates where it should round to bf16")
    leaves = inputs(*sizes, dtype)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    got, truth = log_aggregate_posterior(*leaves, dataset_size=60), literal(*exact, 60)
    for a, b in zip(got, truth, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=3e-6)
    torch.manual_seed(1)
    weights = [torch.randn(t.shape) for t in got]
    pairs = zip(
        torch.autograd.grad(got, leaves, weights),
        torch.autograd.grad(truth, exact, [w.double() for w in weights]),
        strict=True,
    )
    for a, b in pairs:
        assert a.dtype == dtype
        rounding = 0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
        torch.testing.assert_close(a.double(), b, rtol=rounding, atol=(rounding + 4e-6) * b.abs().max().item())


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("narrow", range(3))
def test_mixed_dtypes_take_the_widest(narrow: int) -> None:
    leaves = inputs(5, 5, 4, torch.float32)
    leaves[narrow] = half = to(leaves[narrow], torch.bfloat16)
    joint, _ = log_aggregate_posterior(*leaves)
    torch.testing.assert_close(joint, log_aggregate_posterior(*(t.float() for t in leaves))[0], rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(joint.sum(), half)
    assert gradient.dtype == torch.bfloat16


@pytest.mark.ptx
@pytest.mark.usefixtures("backend")
def test_narrow_posteriors_do_not_cancel() -> None:
    """σ² = 1e-4 and means far from 0: multiplied out, the squares would be off by 1e2 nats."""
    leaves = inputs(20, 24, 6, torch.float32)
    with torch.no_grad():
        leaves[2].fill_(math.log(1e-4))
        leaves[1] += 30
        leaves[0].copy_(leaves[1][:20] + 0.01 * torch.randn(20, 6))
    exact = [t.detach().double() for t in leaves]
    for a, b in zip(log_aggregate_posterior(*leaves), literal(*exact), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=1e-5)


@pytest.mark.usefixtures("backend")
def test_far_from_every_component() -> None:
    """Where every density underflows, the logarithm does not."""
    leaves = inputs(3, 8, 4, torch.float32)
    with torch.no_grad():
        leaves[0].fill_(500.0)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    got, truth = log_aggregate_posterior(*leaves), literal(*exact)
    for a, b in zip(got, truth, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=0)
    pairs = zip(grads_of(got, leaves), grads_of(truth, exact), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("backend")
def test_nan_and_infinity() -> None:
    """A NaN in z spoils its own sample, one in mu every sample; what is infinitely wide has density 0."""
    z, mu, logvar = (t.detach() for t in inputs(5, 9, 4, torch.float32))
    joint, marginals = log_aggregate_posterior(
        z.index_put((torch.tensor(2), torch.tensor(1)), torch.tensor(math.nan)), mu, logvar
    )
    assert joint.isnan().tolist() == [i == 2 for i in range(5)]
    assert marginals.isnan().sum() == 1
    assert marginals[2, 1].isnan()
    spoilt = log_aggregate_posterior(
        z, mu.index_put((torch.tensor(7), torch.tensor(3)), torch.tensor(math.nan)), logvar
    )
    assert spoilt[0].isnan().all()
    assert spoilt[1].isnan().sum(0).tolist() == [0, 0, 0, 5]
    infinite = log_aggregate_posterior(z.index_fill(0, torch.tensor(1), math.inf), mu, logvar)
    assert infinite[0].isneginf().tolist() == [i == 1 for i in range(5)]
    wide = logvar.index_put((torch.tensor(8), torch.tensor(0)), torch.tensor(math.inf))
    got, without = log_aggregate_posterior(z, mu, wide), log_aggregate_posterior(z, mu[:8], logvar[:8])
    torch.testing.assert_close(got[0], without[0] + math.log(8 / 9))
    torch.testing.assert_close(got[1][:, 0], without[1][:, 0] + math.log(8 / 9))


@pytest.mark.usefixtures("backend")
def test_any_shape_and_strides() -> None:
    z, mu, logvar = inputs(6, 8, 12)
    z_, mu_, logvar_ = (t.detach().reshape(-1, 3, 2, 2) for t in (z, mu, logvar))
    strided = [t.to(memory_format=torch.channels_last).requires_grad_() for t in (z_, mu_)]
    leaves = [*strided, logvar_.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()]
    got = log_aggregate_posterior(*leaves)
    flat = log_aggregate_posterior(z, mu, logvar)
    assert got[1].shape == (6, 3, 2, 2)
    torch.testing.assert_close((got[0], got[1].flatten(1)), flat)
    for a, b, leaf in zip(grads_of(got, leaves), grads_of(flat, [z, mu, logvar]), leaves, strict=True):
        torch.testing.assert_close(a.flatten(1), b)
        assert a.shape == leaf.shape


@pytest.mark.ptx
@pytest.mark.usefixtures("backend")
def test_the_operators_of_a_backend() -> None:
    """Against the reference: each output's gradient alone, each input's alone, strides of all kinds."""
    z, mu, logvar = (t.detach() for t in inputs(18, 21, 11, torch.float32))
    z, logvar = z.t().contiguous().t(), torch.randn(21, 22)[:, ::2] - 1
    by, mixture = dispatch.aggregate_implementation(backends.forced, z), Mixture(z, mu, logvar, 2, 70)
    sums = LogSums(*by.aggregate(mixture))
    assert all(t.is_contiguous() for t in sums)
    torch.testing.assert_close(tuple(sums), tuple(reference.aggregate(mixture)), rtol=2e-6, atol=2e-6)
    g, h = torch.randn(18), torch.randn(11, 18).t()
    for given in ((g, h), (g, None), (None, h), (torch.ones(1).expand(18), torch.ones(1, 1).expand(18, 11))):
        for mask in (7, 1, 2, 4) if given[1] is h else (7,):
            call = (mixture, sums, GradLogSums(*given), mask)
            for i, (a, b) in enumerate(zip(by.aggregate_grads(*call), reference.aggregate_grads(*call), strict=True)):
                if mask >> i & 1:
                    torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)
                    assert a.stride() == torch.empty_like(mixture[i]).stride()
                else:
                    assert a is None or a.shape == (0,)


@pytest.mark.usefixtures("backend")
def test_the_same_bits_every_time() -> None:
    found = []
    for _ in range(3):
        torch.manual_seed(0)
        leaves = inputs(37, 50, 9, torch.float32)
        outputs = log_aggregate_posterior(*leaves)
        found.append([*outputs, *grads_of(outputs, leaves)])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@implied("the first derivatives, and the reference's second ones")
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("weights", WEIGHTS, ids=["all", "batch", "others"])
def test_first_and_second_derivatives(weights: dict[str, Any]) -> None:
    leaves = inputs(3, 4, 2)
    fast = backends.forced == "triton"

    def densities(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        return log_aggregate_posterior(*leaves, **weights)

    assert torch.autograd.gradcheck(densities, leaves, fast_mode=fast)
    assert torch.autograd.gradgradcheck(densities, leaves, fast_mode=fast)


@pytest.mark.parametrize("at_once", [1, 100, 230])
def test_the_reference_takes_points_in_chunks(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One point at a time, or two, or five, the last chunk being smaller."""
    monkeypatch.setattr(reference, "_AT_ONCE", at_once)
    leaves = inputs(7, 9, 5)
    chunks = reference._chunks(Mixture(*leaves, 0, 40))
    assert next(chunks)[1].shape[0] == {1: 1, 100: 2, 230: 5}[at_once]
    with fused_elbo.backend("reference"):
        got = log_aggregate_posterior(*leaves, dataset_size=40)
        gradients = grads_of(got, leaves)
    expected = literal(*leaves, 40)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients, grads_of(expected, leaves), rtol=1e-10, atol=1e-11)


# ------------------------------------------------------------------------------------------------------- the KL's parts


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("reduction", ["none", "batchmean", "sum", "mean"])
def test_the_parts_telescope(reduction: str) -> None:
    z, mu, logvar = inputs(12, 12, 6)
    terms = kl_decomposition(z, mu, logvar, dataset_size=100, reduction=reduction)
    each = (Normal(mu, (0.5 * logvar).exp()).log_prob(z) - Normal(0, 1).log_prob(z)).sum(1)
    joint, marginals = literal(z, mu, logvar, 100)
    correlation = joint - marginals.sum(1)
    for got, expected in ((sum(terms), each), (terms.total_correlation, correlation)):
        reduced = {"none": expected, "batchmean": expected.mean(), "sum": expected.sum(), "mean": expected.mean() / 6}
        torch.testing.assert_close(got, reduced[reduction], rtol=1e-11, atol=1e-11)


@pytest.mark.usefixtures("backend")
def test_a_collapsed_posterior_has_no_parts() -> None:
    """B = 64 of N = 2000 with 10 latents: all three are 0, where minibatch-weighted sampling reads 7.6, 68 and −76."""
    mu = torch.zeros(64, 10)
    for term in kl_decomposition(torch.randn(64, 10), mu, mu, dataset_size=2000):
        assert abs(term.item()) < 1e-5


def test_each_part_is_that_of_its_name() -> None:
    z, mu, logvar = inputs(6, 6, 4)
    joint, marginals = literal(z, mu, logvar, 50)
    own = Normal(mu, (0.5 * logvar).exp()).log_prob(z).sum(1)
    expected = (own - joint, joint - marginals.sum(1), marginals.sum(1) - Normal(0, 1).log_prob(z).sum(1))
    leaves = [z, mu, logvar]
    for got, part in zip(kl_decomposition(z, mu, logvar, dataset_size=50, reduction="sum"), expected, strict=True):
        torch.testing.assert_close(got, part.sum(), rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(
            *(torch.autograd.grad(t, leaves, retain_graph=True) for t in (got, part.sum())), rtol=1e-10, atol=1e-11
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_parts_of_half_precision_are_in_fp32(dtype: torch.dtype) -> None:
    """Nothing is rounded but the inputs."""
    leaves = [t.detach() for t in inputs(12, 12, 6, dtype)]
    exact = kl_decomposition(*(t.double() for t in leaves), dataset_size=100, reduction="none")
    for got, expected in zip(kl_decomposition(*leaves, dataset_size=100, reduction="none"), exact, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), expected, rtol=2e-6, atol=2e-5)


def test_information_saturates_at_log_n() -> None:
    mu = 1e3 * torch.randn(50, 4, dtype=F64)
    terms = kl_decomposition(mu, mu, torch.zeros_like(mu), dataset_size=4000)
    assert terms.mutual_information.item() == pytest.approx(math.log(4000), abs=1e-9)


def test_beta_tcvae_in_one_line() -> None:
    """The docstring's: at β = 1 it is the ELBO."""
    mu, logvar = torch.randn(8, 4, requires_grad=True), torch.zeros(8, 4)
    z, x = mu + torch.randn(8, 4), torch.rand(8, 9)
    elbo = decoupled_elbo(x + 0.1, x, mu, logvar)
    loss = elbo.distortion + elbo.rate + (1.0 - 1) * kl_decomposition(z, mu, logvar, dataset_size=100)[1]
    torch.testing.assert_close(loss, elbo.loss)
    loss.backward()
