"""The operators as PyTorch sees them: schemas, fakes, opcheck, and the stages against each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Call, few_often, gpu_kernels_on_cpu, modes_for_operators
from torch import Tensor

from fused_elbo import autograd, decoupled_elbo, reference
from fused_elbo.call import Gradients, GradOutputs, Options, Tensors, mask_of
from fused_elbo.dispatch import operators
from fused_elbo.operators import registry

pytestmark = [pytest.mark.triton, pytest.mark.cuda]
STATS, FORWARD, GRADS, STEP = (registry.find(name) for name in ("stats", "forward", "grads", "step"))


def arguments(call: Call, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensors, Options]:
    """The call of the operators that `decoupled_elbo` makes, without gradients."""
    seen: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(autograd, "elbo", lambda *args: seen.append(args) or (None,) * 5)
        call(decoupled_elbo)
    tensors, options = seen[0]
    return Tensors._make(None if t is None else t.detach() for t in tensors), options


def grad_outputs_of(outputs: tuple[Tensor, ...]) -> GradOutputs:
    return GradOutputs._make(torch.ones_like(o) * w for o, w in zip(outputs[:3], (1.0, 0.5, -0.7), strict=True))


def full_mask(tensors: Tensors) -> int:
    """Of all that can have a gradient."""
    return mask_of(t is not None and t.is_floating_point() for t in tensors)


OPCHECKS: tuple[str, ...] = ("test_schema", "test_faketensor")
if not gpu_kernels_on_cpu():  # AOT autograd sees of an operator its schema and its fake, and not whose kernels it has
    OPCHECKS += ("test_aot_dispatch_dynamic",)


def of_call(mode: str, reduction: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensors, Options]:
    return arguments(Call(mode, reduction, batch=3, data=(2, 3, 4)), monkeypatch)


def opcheck_grads(tensors: Tensors, options: Options, mask: int, test_utils: tuple[str, ...] = OPCHECKS) -> None:
    outputs = FORWARD(*tensors, *options)
    args = (*tensors, *options, outputs[4], *grad_outputs_of(outputs), mask)
    torch.library.opcheck(GRADS, args, test_utils=test_utils)


@pytest.mark.parametrize("mode", few_often())
def test_opcheck(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, options = of_call(mode, "batchmean", monkeypatch)
    mask, scale = full_mask(tensors), torch.tensor(3.0)
    torch.library.opcheck(FORWARD, (*tensors, *options), test_utils=OPCHECKS)
    opcheck_grads(tensors, options, mask)
    torch.library.opcheck(STEP, (*tensors, *options, scale, 2.0, mask), test_utils=OPCHECKS)
    torch.library.opcheck(STATS, (*tensors, *options), test_utils=OPCHECKS)


@pytest.mark.parametrize("mode", ["optimal", "learned-pixel", "prior-shared"])
def test_opcheck_of_some_gradients(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not asked for is empty, whatever the mode."""
    tensors, options = of_call(mode, "batchmean", monkeypatch)
    for mask in (1, 4):
        opcheck_grads(tensors, options, mask)
        torch.library.opcheck(STEP, (*tensors, *options, None, 2.0, mask), test_utils=OPCHECKS)


@pytest.mark.parametrize("mode", ["optimal", "per-image", "learned-channel", "beta-sample", "prior-shared"])
def test_opcheck_of_each_sample(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`step` has no such reduction."""
    tensors, options = of_call(mode, "none", monkeypatch)
    torch.library.opcheck(FORWARD, (*tensors, *options), test_utils=OPCHECKS)
    opcheck_grads(tensors, options, full_mask(tensors))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_fakes_have_the_kernels_strides_and_dtypes(
    layout: torch.memory_format, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, options = arguments(Call("learned-pixel", dtype=dtype), monkeypatch)
    assert tensors.recon is not None
    tensors = tensors._replace(recon=tensors.recon.contiguous(memory_format=layout))
    mask, checks = full_mask(tensors), ("test_faketensor",)
    torch.library.opcheck(FORWARD, (*tensors, *options), test_utils=checks)
    opcheck_grads(tensors, options, mask, checks)
    torch.library.opcheck(STEP, (*tensors, *options, None, 1.0, mask), test_utils=checks)


@pytest.mark.parametrize("mode", modes_for_operators())
def test_operators_equal_the_reference(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the dispatcher, and each of them alone."""
    tensors, options = arguments(Call(mode, dtype=torch.float64), monkeypatch)
    outputs, expected = operators.forward(tensors, options), reference.forward(tensors, options)
    for got, true in zip(outputs, expected, strict=True):
        torch.testing.assert_close(got, true)
    torch.testing.assert_close(operators.stats(tensors, options), outputs[4])

    grad_outputs, scale = grad_outputs_of(outputs), torch.tensor(-0.5, dtype=torch.float64)
    gradients = reference.gradients(tensors, options, expected.stats, grad_outputs)
    scaled = reference.gradients(tensors, options, expected.stats, GradOutputs(scale))
    for mask in (full_mask(tensors), 0, 2 & full_mask(tensors), 8):
        compare(operators.grads(tensors, options, outputs[4], grad_outputs, mask), gradients, mask)
        for by in ((None, -0.5), (scale, 7.0)):
            stepped = operators.step(tensors, options, *by, mask)
            for got, true in zip(stepped[:4], expected, strict=False):
                torch.testing.assert_close(got, true)
            compare(stepped[4:], scaled, mask)


def compare(got: tuple[Tensor, ...], true: Gradients, mask: int) -> None:
    """The gradients that the mask asks for; the others are empty."""
    for i, (a, b) in enumerate(zip(got, true, strict=True)):
        if mask >> i & 1:
            torch.testing.assert_close(a, b)
        else:
            assert a.shape == (0,)


@pytest.mark.parametrize("mode", modes_for_operators())
def test_closed_form_gradients_equal_autograd_through_the_formulas(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """reference.gradients against autograd through reference.forward: two ways to the same numbers."""
    tensors, options = arguments(Call(mode, dtype=torch.float64), monkeypatch)
    given = {n: t for n, t in tensors._asdict().items() if t is not None and n not in ("limit", "weight")}
    leaves = {n: t.clone().requires_grad_() for n, t in given.items() if t.is_floating_point()}
    tensors = tensors._replace(**leaves)
    outputs = reference.forward(tensors, options)
    grad_outputs = grad_outputs_of(outputs)
    true = torch.autograd.grad(outputs[:3], list(leaves.values()), grad_outputs, allow_unused=True)  # type: ignore[arg-type]
    got = reference.gradients(tensors, options, outputs.stats, grad_outputs)
    for name, expected in zip(leaves, true, strict=True):
        torch.testing.assert_close(getattr(got, name), expected, msg=lambda m, name=name: f"{name}: {m}")


def test_returned_tensors_share_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator's outputs may not alias each other: functionalisation relies on it."""
    each, mean = (arguments(Call("learned-pixel", r), monkeypatch) for r in ("none", "batchmean"))
    step = (*mean, None, 1.0, full_mask(mean[0]))
    for by in (operators, reference):
        for outputs in (by.forward(*each), by.step(*step)):
            filled = [o for o in outputs if o.numel()]
            assert len({o.untyped_storage().data_ptr() for o in filled}) == len(filled)


def test_vmap_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every slice is a batch with sums and gradients of its own; what is not mapped is shared."""
    calls = [arguments(Call("learned-image", seed=s), monkeypatch) for s in range(3)]
    (tensors, options), mask = calls[0], full_mask(calls[0][0])
    recon = torch.stack([c[0].recon for c in calls if c[0].recon is not None])

    def step(r: Tensor) -> tuple[Tensor, ...]:
        return operators.step(tensors._replace(recon=r), options, torch.tensor(2.0), 1.0, mask)

    got = torch.vmap(step)(recon)
    for i in range(3):
        for a, b in zip(got, step(recon[i]), strict=True):
            assert torch.equal(a[i], b)
