"""Derivatives: gradcheck and gradgradcheck, repeated and separate backwards, odd grad_outputs, functorch."""

from __future__ import annotations

import pytest
import torch
from cases import FEW, INSIDE_A_SAMPLE, Call, modes_for_operators
from literal import literal_elbo
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fused_elbo import autograd, backends, decoupled_elbo, gaussian_kl, gaussian_nll
from fused_elbo import backend as backend_

pytestmark = pytest.mark.usefixtures("backend")


def small(mode: str, reduction: str = "batchmean") -> Call:
    return Call(mode, reduction, batch=3, data=(2, 2, 3), latent=(2,), dtype=torch.float64)


def differentiate(mode: str, reduction: str) -> None:
    fast = backends.forced == "triton"  # a step takes a twentieth of a second: in one random direction
    call = small(mode, reduction)
    function = call.with_leaves(lambda *a, **kw: decoupled_elbo(*a, **kw)[:3])
    assert torch.autograd.gradcheck(function, call.leaves(), fast_mode=fast)
    assert torch.autograd.gradgradcheck(function, call.leaves(), fast_mode=fast)


@pytest.mark.parametrize("mode", modes_for_operators())
def test_gradcheck(mode: str) -> None:
    differentiate(mode, "batchmean")


@pytest.mark.check("second derivatives of each sample's loss")
@pytest.mark.parametrize("mode", FEW)
def test_gradcheck_of_each_sample(mode: str) -> None:
    """("sum" and "mean" only scale what "batchmean" is: test_elbo.py has their gradients.)"""
    differentiate(mode, "none")


def test_second_derivative_where_the_error_is_zero() -> None:
    x = torch.zeros(2, 3, dtype=torch.float64)
    for mode in ({}, {"sigma": "optimal-per-image"}):
        recon = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(gaussian_nll(recon, x, **mode), recon, create_graph=True)
        (h,) = torch.autograd.grad(g.sum(), recon)
        assert torch.isfinite(h).all()


def test_separate_and_repeated_backwards() -> None:
    """Trainers ask for the gradient of one term at the last layer before they call loss.backward()."""
    for mode in ("optimal", "per-image-softclip", "learned-pixel", "free-bits", "prior"):
        call, exact = Call(mode), Call(mode).double()
        elbo, truth = call(decoupled_elbo), exact(literal_elbo)
        for _ in range(2):
            for got, true in zip(elbo[:3], truth, strict=True):
                gradients = torch.autograd.grad(got, call.leaves(), retain_graph=True, allow_unused=True)
                expected = torch.autograd.grad(true, exact.leaves(), retain_graph=True, allow_unused=True)
                for g, e in zip(gradients, expected, strict=True):
                    if g is None or e is None:  # no path: autograd may say so by None or by zeros
                        assert all(v is None or not v.any() for v in (g, e))
                    else:
                        torch.testing.assert_close(g.double(), e, rtol=1e-5, atol=1e-6)
        elbo.loss.backward()
        assert call.tensors[0].grad is not None


@pytest.mark.ptx
@pytest.mark.parametrize("mode", ["optimal", "per-image", "learned-image", "beta-sample", "learned-channel"])
@pytest.mark.parametrize("kind", ["per-sample", "stride-0", "loss-scale"])
def test_grad_outputs(mode: str, kind: str) -> None:
    reduction = "batchmean" if kind == "loss-scale" else "none"
    call = Call(mode, reduction)
    exact = call.double()
    loss, true = call(decoupled_elbo).loss, exact(literal_elbo)[0]
    weight = {
        "per-sample": torch.tensor([1.0, -2.0, 0.0, 0.5]),
        "stride-0": torch.tensor(3.0).expand(4),
        "loss-scale": torch.tensor(65536.0),
    }[kind]
    gradients = torch.autograd.grad(loss, call.leaves(), weight, allow_unused=True)
    expected = torch.autograd.grad(true, exact.leaves(), weight.double(), allow_unused=True)
    for g, e in zip(gradients, expected, strict=True):
        if e is not None:
            torch.testing.assert_close(g.double(), e, rtol=2e-5, atol=2e-5 * e.abs().max().item())


@pytest.mark.ptx
def test_loss_scale_reaches_fp16_gradients_before_they_are_rounded() -> None:
    """A mean-reduced fp16 gradient of 1e-9 is 0 in fp16; multiplied by GradScaler's 65536 first, it is not."""
    recon, target = torch.full((1, 40000), 1e-3), torch.zeros(1, 40000)
    recon = recon.half().requires_grad_()
    latents = torch.zeros(1, 2)
    loss = decoupled_elbo(recon, target.half(), latents, latents, sigma=1.0, reduction="mean").loss
    (g,) = torch.autograd.grad(loss, recon, torch.tensor(65536.0))
    torch.testing.assert_close(g.float(), torch.full_like(recon, 65536 * 1e-3 / 40000).float(), rtol=2e-3, atol=0)


def test_only_what_is_asked_for() -> None:
    call = Call("optimal")
    recon, target, mu, logvar = (t.detach() for t in call.tensors)
    mu.requires_grad_()
    loss = decoupled_elbo(recon, target, mu, logvar).loss
    torch.testing.assert_close(torch.autograd.grad(loss, mu)[0], mu.detach() / 4)
    assert not decoupled_elbo(recon, target, mu.detach(), logvar).loss.requires_grad


def test_backward_runs_on_the_backend_of_its_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []
    original = autograd.nearest
    monkeypatch.setattr(autograd, "nearest", lambda *asked: used.append(asked[0]) or original(*asked))
    chosen, call = backends.forced, Call("optimal")
    elbo = call(decoupled_elbo)
    with backend_("reference"):
        call.gradients(elbo)
    assert used == [chosen, chosen]


def test_activation_checkpointing() -> None:
    call = Call("learned-pixel")
    expected = call.gradients(call(decoupled_elbo))
    kw = {**call.kw, "reduction": call.reduction}
    again = checkpoint(lambda *t: decoupled_elbo(*t, **kw)[:3], *call.tensors, use_reentrant=False)
    for a, b in zip(call.gradients(again), expected, strict=True):
        assert torch.equal(a, b)


def test_an_input_changed_before_the_backward_is_noticed() -> None:
    call = Call("optimal")
    recon = call.tensors[0].clone()
    loss = decoupled_elbo(recon, *call.tensors[1:]).loss
    with torch.no_grad():
        recon.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inference_mode_and_meta_tensors() -> None:
    call = Call("optimal")
    with torch.inference_mode():
        assert torch.equal(call(decoupled_elbo).loss, call(decoupled_elbo).loss)
    if backends.forced == "reference":  # "cpp" refuses them, being for CPU tensors
        elbo = decoupled_elbo(*(t.detach().to("meta") for t in call.tensors))
        assert elbo.loss.shape == elbo.sigma.shape == ()


def test_sigma_is_detached() -> None:
    elbo = Call("learned-image")(decoupled_elbo)
    assert elbo.sigma.shape == (4,)
    assert not elbo.sigma.requires_grad


@pytest.mark.parametrize("mode", ["optimal", "per-image", "learned", "beta-sample", *INSIDE_A_SAMPLE[:2]])
def test_vmap(mode: str) -> None:
    """Over an ensemble: each member is a batch with a σ of its own."""
    members = [Call(mode, dtype=torch.float64, seed=s) for s in range(3)]
    kw = {k: v.detach() if isinstance(v, Tensor) else v for k, v in members[0].kw.items()}
    stacked = [torch.stack([m.tensors[i].detach() for m in members]) for i in range(4)]

    def loss(*tensors: Tensor) -> Tensor:
        return decoupled_elbo(*tensors, **kw).loss

    got = torch.vmap(loss)(*stacked)
    gradients = torch.vmap(torch.func.grad(loss, argnums=(0, 2)))(*stacked)
    for i, member in enumerate(members):
        tensors = [t.detach().requires_grad_() for t in member.tensors]
        expected = loss(*tensors)
        torch.testing.assert_close(got[i], expected)
        for g, e in zip(gradients, torch.autograd.grad(expected, [tensors[0], tensors[2]]), strict=True):
            torch.testing.assert_close(g[i], e)


def test_vmap_of_a_backward() -> None:
    """is_grads_batched runs the backward under vmap."""
    call = Call("optimal", "none", dtype=torch.float64)
    loss = call(decoupled_elbo).loss
    (rows,) = torch.autograd.grad(
        loss, call.tensors[0], torch.eye(4, dtype=torch.float64), is_grads_batched=True, retain_graph=True
    )
    for i in range(4):
        one = torch.nn.functional.one_hot(torch.tensor(i), 4).double()
        torch.testing.assert_close(rows[i], torch.autograd.grad(loss, call.tensors[0], one, retain_graph=True)[0])


def test_functorch_hessian() -> None:
    mu, logvar = torch.randn(1, 3, dtype=torch.float64), torch.randn(1, 3, dtype=torch.float64)
    hessian = torch.func.jacrev(torch.func.jacrev(lambda l: gaussian_kl(mu, l)))(logvar)
    torch.testing.assert_close(hessian.reshape(3, 3), torch.diag(0.5 * logvar[0].exp()))


def test_forward_mode_says_that_it_is_absent() -> None:
    import torch.autograd.forward_ad as fwAD

    call = Call("optimal")
    with fwAD.dual_level():
        recon, *others = (t.detach() for t in call.tensors)
        dual = fwAD.make_dual(recon, torch.ones_like(recon))
        for loss in (lambda: decoupled_elbo(dual, *others), lambda: gaussian_kl([dual], [others[0]])):
            with pytest.raises(NotImplementedError, match=r"no forward-mode derivative .* use torch\.func\.jacrev"):
                loss()


def test_forward_mode_of_transforms_is_the_references_alone() -> None:
    """What the error advises."""
    mu, logvar = torch.randn(1, 3, dtype=torch.float64), torch.randn(1, 3, dtype=torch.float64)

    def hessian() -> Tensor:
        return torch.func.hessian(lambda l: gaussian_kl(mu, l))(logvar).reshape(3, 3)

    if backends.forced == "reference":
        torch.testing.assert_close(hessian(), torch.diag(0.5 * logvar[0].exp()))
    else:
        with pytest.raises(NotImplementedError, match=r"for a Hessian jacrev\(jacrev\(f\)\)"):
            hessian()


def test_capacity_takes_no_gradient_inside_transforms_either() -> None:
    call, capacities = Call(), torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match="capacity: has no gradient here"):
        torch.vmap(lambda c: decoupled_elbo(*call.tensors, capacity=c).loss)(capacities)


def test_autocast_leaves_the_loss_alone() -> None:
    call = Call("optimal")
    plain = call(decoupled_elbo)
    expected = call.gradients(plain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = call(decoupled_elbo)
        gradients = call.gradients(got)
    for a, b in zip([*got, *gradients], [*plain, *expected], strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
