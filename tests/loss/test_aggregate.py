"""`log_aggregate_posterior` and `kl_decomposition`: against the formula written out, on every backend."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from cases import implied, to
from torch import Tensor
from torch.distributions import Normal

import fused_elbo
from fused_elbo import aggregate, backends, decoupled_elbo, dispatch, kl_decomposition, log_aggregate_posterior
from fused_elbo.call import GradLogSums, LogSums, Mixture
from fused_elbo.reference import aggregate as reference

F64 = torch.float64
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# (B, M, K): one of each; less than a vector; odd; many of each in turn, which no tile divides.
SIZES = [(1, 1, 1), (1, 9, 3), (5, 5, 10), (3, 130, 2), (70, 75, 5), (33, 40, 67)]
FEW = [(1, 1, 1), (5, 19, 10), (33, 40, 20)]


def inputs(batch: int, components: int, latents: int, dtype: torch.dtype = F64) -> list[Tensor]:
    mu, logvar = torch.randn(components, latents, dtype=F64), torch.randn(components, latents, dtype=F64) - 1
    drawn = mu[:batch] + (0.5 * logvar[:batch]).exp() * torch.randn(batch, latents, dtype=F64)
    return [t.to(dtype).requires_grad_() for t in (drawn, mu, logvar)]


def literal(z: Tensor, mu: Tensor, logvar: Tensor, size: int | None = None, own: bool = True) -> tuple[Tensor, Tensor]:
    """The B×M×K tensor as a whole, by torch.distributions."""
    batch, components = z.shape[0], mu.shape[0]
    weights = torch.full((batch, components), 1 / components, dtype=z.dtype)
    if own and size is not None:
        weights.fill_((size - 1) / (size * max(components - 1, 1)))
        weights[range(batch), range(batch)] = 1 / size
    log_density = Normal(mu, (0.5 * logvar).exp()).log_prob(z[:, None])
    joint = torch.logsumexp(log_density.flatten(2).sum(2) + weights.log(), 1)
    return joint, torch.logsumexp(log_density + weights.log().reshape(*weights.shape, *[1] * (z.dim() - 1)), 1)


def grads_of(outputs: tuple[Tensor, ...], leaves: list[Tensor]) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    weights = [torch.randn(t.shape, dtype=F64).to(t.dtype) for t in outputs]
    return torch.autograd.grad(outputs, leaves, weights)


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


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("narrow", range(3))
def test_mixed_dtypes_take_the_widest(narrow: int) -> None:
    leaves = inputs(5, 5, 4, torch.float32)
    leaves[narrow] = half = to(leaves[narrow], torch.bfloat16)
    joint, _ = log_aggregate_posterior(*leaves)
    torch.testing.assert_close(joint, log_aggregate_posterior(*(t.float() for t in leaves))[0], rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(joint.sum(), half)
    assert gradient.dtype == torch.bfloat16
