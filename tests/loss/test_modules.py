"""The nn.Module forms: configuration, running σ, learned σ."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from cases import Call, implied
from stepwise import same
from torch import Tensor

from fused_elbo import DecoupledELBO, LearnedSigmaELBO, decoupled_elbo

pytestmark = pytest.mark.usefixtures("backend")


def rmse(call: Call) -> Tensor:
    recon, target, *_ = call.tensors
    return (recon - target).detach().square().mean().sqrt()


def test_configuration_is_passed_on() -> None:
    call = Call("prior")
    module = DecoupledELBO(
        beta=2.0, sigma="optimal-per-image", min_log_sigma=-1.0, free_bits=0.1, capacity=1.5, reduction="sum"
    )
    got = module(*call.tensors, prior=call.kw["prior"])
    expected = decoupled_elbo(
        *call.tensors, beta=2.0, sigma="optimal-per-image", min_log_sigma=-1.0, free_bits=0.1, capacity=1.5,
        reduction="sum", prior=call.kw["prior"],
    )  # fmt: skip
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)
    for shown in ("beta=2.0", "sigma='optimal-per-image'", "capacity=1.5", "reduction='sum'"):
        assert shown in repr(module)


def test_attributes_follow_a_schedule() -> None:
    module, call = DecoupledELBO(), Call("optimal")
    for beta in (0.0, 1.0, 2.5):
        module.beta = beta
        elbo = module(*call.tensors)
        torch.testing.assert_close(elbo.loss, elbo.distortion + beta * elbo.rate)


@pytest.mark.parametrize("sigma", ["optimal", "optimal-per-image"])
def test_running_sigma(sigma: str) -> None:
    """The first batch sets it, later ones move it by the momentum; evaluation uses it and leaves it alone."""
    module = DecoupledELBO(sigma=sigma, momentum=0.25)
    assert module.running_var == 1
    first, second, test = Call(seed=1), Call(seed=2), Call(seed=3)
    module(*first.tensors)
    torch.testing.assert_close(module.running_var, rmse(first).square())
    module(*second.tensors)
    expected = 0.75 * rmse(first).square() + 0.25 * rmse(second).square()
    torch.testing.assert_close(module.running_var, expected)

    module.eval()
    elbo = module(*test.tensors)
    assert elbo.sigma.shape == ()
    torch.testing.assert_close(elbo.sigma, expected.sqrt())
    torch.testing.assert_close(elbo.loss, decoupled_elbo(*test.tensors, sigma=expected.sqrt().item()).loss)
    torch.testing.assert_close(module.running_var, expected)
    assert module.batches_seen == 2


@pytest.mark.parametrize("build", [lambda: DecoupledELBO(2.0, momentum=0.25), lambda: LearnedSigmaELBO(3, beta=2.0)])
def test_backward_in_one_go(build: Callable[[], DecoupledELBO | LearnedSigmaELBO]) -> None:
    """It does what criterion(…).loss.backward() does: configuration, running σ, a learned σ's gradient, both modes."""
    one, two = build(), build()
    for training in (True, False):
        a, b = Call("prior"), Call("prior")
        one.zero_grad()
        two.zero_grad()
        got = one.train(training).backward(*a.tensors, prior=a.kw["prior"], grad_scale=0.5)
        expected = two.train(training)(*b.tensors, prior=b.kw["prior"])
        expected.loss.backward(torch.tensor(0.5))
        same(got.loss, expected.loss.detach())
        for p, q in zip([*a.leaves(), *one.parameters()], [*b.leaves(), *two.parameters()], strict=True):
            same(p.grad, q.grad)
        for p, q in zip(one.buffers(), two.buffers(), strict=True):
            torch.testing.assert_close(p, q)


def test_running_sigma_travels_in_the_state_dict() -> None:
    module, other = DecoupledELBO(momentum=0.1), DecoupledELBO(momentum=0.1)
    module(*Call().tensors)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.eval()(*Call().tensors).loss, copy.deepcopy(module).eval()(*Call().tensors).loss)
    assert not DecoupledELBO().state_dict()


def test_a_batch_that_overflowed_does_not_stay_in_the_average() -> None:
    """GradScaler skips such a step; the average must live on as well."""
    module, call = DecoupledELBO(momentum=0.5), Call()
    module(*call.tensors)
    before = module.running_var.clone()
    for bad in (float("inf"), float("nan")):
        module(call.tensors[0] * bad, *call.tensors[1:])
    assert torch.equal(module.running_var, before)
    assert module.batches_seen == 1


def test_learned_sigma_passes_its_configuration_on() -> None:
    call = Call("prior")
    module = LearnedSigmaELBO(init=-0.5, beta=2.0, free_bits=0.3, capacity=1.5, reduction="sum")
    got = module(*call.tensors, prior=call.kw["prior"])
    kw = {"beta": 2.0, "free_bits": 0.3, "capacity": 1.5, "reduction": "sum", "prior": call.kw["prior"]}
    assert torch.equal(got.loss, decoupled_elbo(*call.tensors, log_sigma=torch.tensor(-0.5), **kw).loss)


def test_without_momentum_evaluation_is_like_training() -> None:
    module, call = DecoupledELBO(), Call()
    assert torch.equal(module(*call.tensors).sigma, module.eval()(*call.tensors).sigma)


@implied("the gradients of log sigma, of which it takes 60 steps")
@pytest.mark.parametrize("channels", [None, 3])
def test_learned_sigma_finds_the_optimum(channels: int | None) -> None:
    """Gradient descent on log σ ends at ½ log MSE, of all or of each channel."""
    call = Call(dtype=torch.float64)
    module = LearnedSigmaELBO(channels, reduction="mean").double()
    assert module.log_sigma.shape == (() if channels is None else (3, 1, 1))
    optimiser = torch.optim.SGD(module.parameters(), lr=0.4 * (channels or 1))
    for _ in range(60):
        optimiser.zero_grad()
        module(*[t.detach() for t in call.tensors]).loss.backward()
        optimiser.step()
    square = (call.tensors[0] - call.tensors[1]).detach().square()
    mse = square.mean() if channels is None else square.mean((0, 2, 3)).reshape(3, 1, 1)
    torch.testing.assert_close(module.log_sigma.detach(), mse.log() / 2, rtol=1e-4, atol=1e-4)


def test_a_frozen_sigma_is_warned_about_once() -> None:
    module, call = LearnedSigmaELBO(init=-1.0), Call()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module(*call.tensors)
    module.log_sigma.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module.eval()(*call.tensors)
    with pytest.warns(UserWarning, match="log_sigma is frozen"):
        module.train()(*call.tensors)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module(*call.tensors)


def test_a_sigma_that_trains_inside_a_transform_is_not_called_frozen() -> None:
    """vmap hides that the stacked parameters require a gradient."""
    module, call = LearnedSigmaELBO(), Call()
    stacked = torch.tensor([-1.0, 0.0], requires_grad=True)

    def loss(log_sigma: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, {"log_sigma": log_sigma}, tuple(call.tensors)).loss

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.vmap(loss)(stacked).sum().backward()
    for i, log_sigma in enumerate(stacked.detach()):
        torch.testing.assert_close(stacked.grad[i], torch.func.grad(loss)(log_sigma))
