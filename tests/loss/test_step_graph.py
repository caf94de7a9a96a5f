"""decoupled_elbo_backward as a part of the graph: which gradients, hooks, memory, scaling, and what is refused."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from cases import Call
from stepwise import compare, same
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from fused_elbo import autograd, backends, decoupled_elbo, decoupled_elbo_backward
from fused_elbo.call import Tensors


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("wanted", [(0,), (1,), (2, 3), (0, 2, 3), (3,), (4,), (0, 4)], ids=str)
@pytest.mark.parametrize("mode", ["optimal", "learned-pixel", "beta-tensor", "capacity"])
def test_only_what_requires_a_gradient(mode: str, wanted: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """4 is the learned log σ, or β: what a mode has beside the four tensors."""

    def make() -> Call:
        call = Call(mode)
        for i, leaf in enumerate(call.leaves()):
            leaf.requires_grad_(i in wanted)
        return call

    if not make().leaves():  # nothing but the four, of which none is wanted
        return
    masks: list[int] = []
    implementation = autograd.nearest(backends.forced, Tensors(torch.empty(0)))
    step = implementation.step
    monkeypatch.setattr(implementation, "step", lambda *args: masks.append(args[-1]) or step(*args))
    compare(make)
    fifth = {"learned-pixel": 4, "beta-tensor": 7}.get(mode, 0)
    assert masks == [sum(1 << (fifth if i == 4 else i) for i in wanted if i != 4 or fifth)]


@pytest.mark.usefixtures("backend")
def test_a_prior_that_is_shared_and_narrow_gets_its_gradient_back() -> None:
    def make() -> Call:
        call = Call("prior-shared", dtype=torch.bfloat16)
        call.kw["prior"] = tuple(p.detach().bfloat16().requires_grad_() for p in call.kw["prior"])
        return call

    compare(make)


class Model(nn.Module):
    """recon, mu and logvar from one encoder; mu and logvar are views of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(12, 2 * 4), nn.Linear(4, 12)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mu, logvar = self.encoder(x).chunk(2, 1)
        return self.decoder(mu + (logvar / 2).exp()), mu, logvar


def two_models() -> tuple[Model, Model]:
    model = Model()
    return model, copy.deepcopy(model)


def same_gradients(a: nn.Module, b: nn.Module) -> None:
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        same(p.grad, q.grad)


@pytest.mark.usefixtures("backend")
def test_gradient_accumulation() -> None:
    one, two = two_models()
    for x in torch.rand(3, 8, 12):
        recon, mu, logvar = one(x)
        decoupled_elbo_backward(recon, x, mu, logvar, beta=4.0, grad_scale=1 / 3)
        recon, mu, logvar = two(x)
        decoupled_elbo(recon, x, mu, logvar, beta=4.0).loss.backward(torch.tensor(1 / 3))
    same_gradients(one, two)


@pytest.mark.usefixtures("backend")
def test_hooks_and_retained_gradients() -> None:
    seen: dict[str, list[Tensor]] = {"one": [], "two": []}
    kept = []
    for name, model in zip(seen, two_models(), strict=True):
        x = torch.full((8, 12), 0.3)
        tensors = model(x)
        for t in tensors:
            t.register_hook(seen[name].append)
            t.retain_grad()
        model.encoder.weight.register_post_accumulate_grad_hook(lambda p, n=name: seen[n].append(p.grad.clone()))
        recon, mu, logvar = tensors
        if name == "one":
            decoupled_elbo_backward(recon, x, mu, logvar)
        else:
            decoupled_elbo(recon, x, mu, logvar).loss.backward()
        kept.append([t.grad for t in tensors])
    assert len(seen["one"]) == len(seen["two"]) == 4
    for a, b in zip([*seen["one"], *kept[0]], [*seen["two"], *kept[1]], strict=True):
        same(a, b)


@pytest.mark.usefixtures("backend")
def test_another_loss_through_the_same_graph() -> None:
    one, two = two_models()
    x = torch.rand(8, 12)
    recon, mu, logvar = one(x)
    decoupled_elbo_backward(recon, x, mu, logvar, retain_graph=True)
    decoupled_elbo_backward(recon, x, mu, logvar, sigma=0.5, retain_graph=True)
    recon.abs().sum().backward()
    recon, mu, logvar = two(x)
    decoupled_elbo(recon, x, mu, logvar).loss.backward(retain_graph=True)
    decoupled_elbo(recon, x, mu, logvar, sigma=0.5).loss.backward(retain_graph=True)
    recon.abs().sum().backward()
    same_gradients(one, two)

    recon, mu, logvar = one(x)
    decoupled_elbo_backward(recon, x, mu, logvar)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        recon.sum().backward()


@pytest.mark.usefixtures("backend")
def test_one_tensor_in_several_places() -> None:
    leaves = [torch.linspace(-1, 1, 12).reshape(3, 4).requires_grad_() for _ in range(2)]
    x = torch.zeros(3, 4)
    decoupled_elbo_backward(leaves[0], x, leaves[0], leaves[0], prior=(leaves[0], x))
    decoupled_elbo(leaves[1], x, leaves[1], leaves[1], prior=(leaves[1], x)).loss.backward()
    same(leaves[0].grad, leaves[1].grad)


@pytest.mark.usefixtures("backend")
def test_views_of_one_tensor() -> None:
    packed = [torch.linspace(-1, 1, 48).reshape(4, 12).requires_grad_() for _ in range(2)]
    for function, leaf in zip((decoupled_elbo_backward, decoupled_elbo), packed, strict=True):
        recon, mu, logvar = leaf.split([6, 3, 3], 1)
        elbo = function(recon, torch.zeros(4, 6), mu, logvar)
        if function is decoupled_elbo:
            elbo.loss.backward()
    same(packed[0].grad, packed[1].grad)


@pytest.mark.usefixtures("backend")
def test_gradients_are_freed_once_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in loss.backward(), recon's is gone when the encoder's backward runs, and a leaf's .grad is no copy."""
    made: list[StorageWeakRef] = []
    implementation = autograd.nearest(backends.forced, Tensors(torch.empty(0)))
    step = implementation.step

    def spy(*args: Any) -> tuple[Tensor, ...]:
        outputs = step(*args)
        made.append(StorageWeakRef(outputs[4].untyped_storage()))
        return outputs

    monkeypatch.setattr(implementation, "step", spy)
    code, x = torch.ones(2, 6, requires_grad=True), torch.rand(2, 6)
    inner = code * 2
    expired: list[bool] = []

    def look(_: Tensor) -> None:
        if backends.forced == "triton":
            gc.collect()  # Triton's interpreter holds the arguments of a launch in a cycle
        expired.append(made[0].expired())

    inner.register_hook(look)
    decoupled_elbo_backward((inner * 3).exp(), x, inner, inner)
    assert expired == [True]

    leaf = x.clone().requires_grad_()
    decoupled_elbo_backward(leaf, x + 1, torch.zeros(2, 1), torch.zeros(2, 1))
    assert StorageWeakRef(leaf.grad.untyped_storage()).cdata == made[1].cdata


@pytest.mark.usefixtures("backend")
def test_autocast_leaves_it_alone() -> None:
    with torch.autocast(X.device.type, dtype=torch.bfloat16):
        compare(lambda: Call("optimal"))
        one, two = two_models()
        x = torch.rand(8, 12)
        recon, mu, logvar = one(x)
        decoupled_elbo_backward(recon, x, mu, logvar)
        recon, mu, logvar = two(x)
        decoupled_elbo(recon, x, mu, logvar).loss.backward()
    same_gradients(one, two)


@pytest.mark.usefixtures("backend")
def test_grad_scaler() -> None:
    """fp16 gradients that underflow unscaled: they must be multiplied before they are rounded."""
    scaler = torch.amp.GradScaler(X.device.type, init_scale=65536.0)
    x = torch.zeros(1, 40000)
    leaves = [torch.full((1, 40000), 1e-3).half().requires_grad_() for _ in range(2)]
    latents = torch.zeros(1, 2)
    options = {"sigma": 1.0, "reduction": "mean"}
    scale = scaler.scale(torch.ones((), device=x.device))
    decoupled_elbo_backward(leaves[0], x, latents, latents, **options, grad_scale=scale)
    scaler.scale(decoupled_elbo(leaves[1], x, latents, latents, **options).loss).backward()
    same(leaves[0].grad, leaves[1].grad)
    torch.testing.assert_close(leaves[0].grad.float(), torch.full((1, 40000), 65536 * 1e-3 / 40000), rtol=2e-3, atol=0)


# ----------------------------------------------------------------------------------------------------------- refused

X, Z = torch.zeros(4, 3, requires_grad=True), torch.zeros(4, 2)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"reduction": "none"}, ValueError, 'reduction: "none" gives a loss for each sample'),
    ({"reduction": "average"}, ValueError, "reduction: expected one of"),
    ({"grad_scale": torch.amp.GradScaler("cpu")}, TypeError, r"grad_scale: got a GradScaler; pass scaler\.scale"),
    ({"grad_scale": torch.ones(4)}, ValueError, r"grad_scale: expected a number or a tensor of one element.*\(4,\)"),
    ({"grad_scale": torch.ones(0)}, ValueError, r"grad_scale: .*got shape \(0,\)"),
    ({"grad_scale": torch.tensor(2)}, TypeError, r"grad_scale: expected float32.*got torch.int64"),
    (
        {"grad_scale": torch.ones((), device="meta")},
        ValueError,
        f"grad_scale: on meta, but recon is on {X.device}",
    ),
    ({"grad_scale": torch.ones((), requires_grad=True)}, ValueError, "grad_scale: has no gradient here"),
    ({"grad_scale": float("nan")}, ValueError, "grad_scale: expected a finite number, got nan"),
    ({"grad_scale": float("inf")}, ValueError, "grad_scale: expected a finite number, got inf"),
    ({"grad_scale": "2"}, TypeError, "grad_scale: expected a number, got '2'"),
    ({"grad_scale": True}, TypeError, "grad_scale: expected a number, got True"),
    ({"recon": X.detach()}, RuntimeError, "none of the tensors requires a gradient"),
    ({"beta": -1.0}, ValueError, "beta: expected a finite number of at least 0"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        decoupled_elbo_backward(**{"recon": X, "target": X.detach(), "mu": Z, "logvar": Z} | change)
    assert X.grad is None


def test_refused_where_there_is_no_graph() -> None:
    for off in (torch.no_grad, torch.inference_mode):
        with off(), pytest.raises(RuntimeError, match="gradients are off here"):
            decoupled_elbo_backward(X, X.detach(), Z, Z)
    for transform in (torch.vmap, torch.func.grad):
        with pytest.raises(RuntimeError, match=r"torch\.func forbids: use decoupled_elbo there"):
            transform(lambda x: decoupled_elbo_backward(x, x.detach(), Z, Z).loss)(torch.zeros(4, 4, 3))
