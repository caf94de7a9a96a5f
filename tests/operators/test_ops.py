"""The operators as PyTorch sees them: schemas, fakes, opcheck, and the stages against each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Call, few_often, modes_for_operators
from torch import Tensor

from fused_elbo import autograd, decoupled_elbo, ops, reference

pytestmark = [pytest.mark.triton, pytest.mark.cuda]
ORDER = ("recon", "target", "mu", "logvar", "log_sigma", "prior_mu", "prior_logvar", "beta", "capacity")


def arguments(call: Call, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, ...]:
    """What `decoupled_elbo` hands to `ops.forward`, without gradients."""
    seen: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(autograd, "elbo", lambda *args: seen.append(args) or (None,) * 5)
        call(decoupled_elbo)
    *tensors, values = seen[0]
    return (*[None if t is None else t.detach() for t in tensors], *values)


def grads_arguments(args: tuple[Any, ...], outputs: tuple[Tensor, ...], mask: int) -> tuple[Any, ...]:
    grad_outputs = tuple(torch.ones_like(o) * w for o, w in zip(outputs[:3], (1.0, 0.5, -0.7), strict=True))
    return (*grad_outputs, *args[:9], outputs[4], *args[9:], mask)


def step_arguments(args: tuple[Any, ...], grad_scale: Tensor | None, value: float, mask: int) -> tuple[Any, ...]:
    return (*args[:9], grad_scale, *args[9:], value, mask)


def full_mask(args: tuple[Any, ...]) -> int:
    return sum(1 << i for i in range(8) if args[i] is not None)


OPCHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


def of_call(mode: str, reduction: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, ...]:
    return arguments(Call(mode, reduction, batch=3, data=(2, 3, 4)), monkeypatch)


@pytest.mark.parametrize("mode", few_often())
def test_opcheck(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args = of_call(mode, "batchmean", monkeypatch)
    mask, scale = full_mask(args), torch.tensor(3.0)
    torch.library.opcheck(ops.forward, args, test_utils=OPCHECKS)
    torch.library.opcheck(ops.grads, grads_arguments(args, ops.forward(*args), mask), test_utils=OPCHECKS)
    torch.library.opcheck(ops.step, step_arguments(args, scale, 2.0, mask), test_utils=OPCHECKS)
    element = args[4] if args[9] == ops.Kind.ELEMENT else None
    torch.library.opcheck(ops.stats, (*args[:4], element, *args[5:7], 0.0), test_utils=OPCHECKS)


@pytest.mark.parametrize("mode", ["optimal", "learned-pixel", "prior-shared"])
def test_opcheck_of_some_gradients(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not asked for is empty, whatever the mode."""
    args = of_call(mode, "batchmean", monkeypatch)
    for mask in (1, 4):
        torch.library.opcheck(ops.grads, grads_arguments(args, ops.forward(*args), mask), test_utils=OPCHECKS)
        torch.library.opcheck(ops.step, step_arguments(args, None, 2.0, mask), test_utils=OPCHECKS)


@pytest.mark.parametrize("mode", ["optimal", "per-image", "learned-channel", "beta-sample", "prior-shared"])
def test_opcheck_of_each_sample(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`step` has no such reduction."""
    args = of_call(mode, "none", monkeypatch)
    torch.library.opcheck(ops.forward, args, test_utils=OPCHECKS)
    outputs = ops.forward(*args)
    torch.library.opcheck(ops.grads, grads_arguments(args, outputs, full_mask(args)), test_utils=OPCHECKS)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_fakes_have_the_kernels_strides_and_dtypes(
    layout: torch.memory_format, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = list(arguments(Call("learned-pixel", dtype=dtype), monkeypatch))
    args[0] = args[0].contiguous(memory_format=layout)
    torch.library.opcheck(ops.forward, tuple(args), test_utils=("test_faketensor",))
    mask = full_mask(tuple(args))
    call = grads_arguments(tuple(args), ops.forward(*args), mask)
    torch.library.opcheck(ops.grads, call, test_utils=("test_faketensor",))
    torch.library.opcheck(ops.step, step_arguments(tuple(args), None, 1.0, mask), test_utils=("test_faketensor",))


@pytest.mark.parametrize("mode", modes_for_operators())
def test_operators_equal_the_reference(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the dispatcher, and each of them alone."""
    args = arguments(Call(mode, dtype=torch.float64), monkeypatch)
    outputs, expected = ops.forward(*args), reference.forward(*args)
    for got, true in zip(outputs, expected, strict=True):
        torch.testing.assert_close(got, true)
    element = args[4] if args[9] == ops.Kind.ELEMENT else None
    free_bits = args[13]
    torch.testing.assert_close(ops.stats(*args[:4], element, *args[5:7], free_bits), outputs[4])
    for mask in (full_mask(args), 0, 2, 8):
        call = grads_arguments(args, outputs, mask)
        for i, (got, true) in enumerate(zip(ops.grads(*call), reference.grads(*call[:-1]), strict=True)):
            if mask >> i & 1:
                torch.testing.assert_close(got, true)
            else:
                assert got.shape == (0,)
        scaled = (torch.tensor(-0.5, dtype=torch.float64), None, None, *call[3:-1])
        for step in (step_arguments(args, None, -0.5, mask), step_arguments(args, scaled[0], 7.0, mask)):
            for i, (got, true) in enumerate(
                zip(ops.step(*step), (*expected[:4], *reference.grads(*scaled)), strict=True)
            ):
                if i < 4 or mask >> (i - 4) & 1:
                    torch.testing.assert_close(got, true)
                else:
                    assert got.shape == (0,)


@pytest.mark.parametrize("mode", modes_for_operators())
def test_closed_form_gradients_equal_autograd_through_the_formulas(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """reference.grads against autograd through reference.forward: two ways to the same numbers."""
    args = list(arguments(Call(mode, dtype=torch.float64), monkeypatch))
    leaves = [i for i in range(8) if args[i] is not None]
    for i in leaves:
        args[i] = args[i].clone().requires_grad_()
    outputs = reference.forward(*args)
    call = grads_arguments(tuple(args), outputs, full_mask(tuple(args)))
    true = torch.autograd.grad(outputs[:3], [args[i] for i in leaves], call[:3], allow_unused=True)
    got = reference.grads(*call[:-1])
    for i, expected in zip(leaves, true, strict=True):
        torch.testing.assert_close(got[i], expected, msg=lambda m, i=i: f"{ORDER[i]}: {m}")


def test_returned_tensors_share_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator's outputs may not alias each other: functionalisation relies on it."""
    each, mean = (arguments(Call("learned-pixel", r), monkeypatch) for r in ("none", "batchmean"))
    step = step_arguments(mean, None, 1.0, full_mask(mean))
    for outputs in (ops.forward(*each), reference.forward(*each), ops.step(*step), ops.ByReference.step(*step)):
        filled = [o for o in outputs if o.numel()]
        assert len({o.untyped_storage().data_ptr() for o in filled}) == len(filled)


def test_vmap_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every slice is a batch with sums and gradients of its own; what is not mapped is shared."""
    args = [arguments(Call("learned-image", seed=s), monkeypatch) for s in range(3)]
    steps = [step_arguments(a, torch.tensor(2.0), 1.0, full_mask(a)) for a in args]
    recon = torch.stack([s[0] for s in steps])
    got = torch.vmap(lambda r: ops.step(r, *steps[0][1:]))(recon)
    for i in range(3):
        for a, b in zip(got, ops.step(recon[i], *steps[0][1:]), strict=True):
            assert torch.equal(a[i], b)
