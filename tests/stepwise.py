"""decoupled_elbo_backward beside the two calls that it replaces."""

from __future__ import annotations

from collections.abc import Callable

import torch
from cases import Call
from torch import Tensor

from fused_elbo import backends, decoupled_elbo, decoupled_elbo_backward

# These do in one operator what the others do in two, sums in the same order: the same bits.
EXACT = ("cpp", "reference")


def same(got: Tensor, expected: Tensor) -> None:
    """Equal bits; on other backends a sum may be taken in another order, which costs some ulps of what is computed
    in, and may then round the other way, which costs one of the gradient's own dtype."""
    assert (got.dtype, got.shape, got.stride()) == (expected.dtype, expected.shape, expected.stride())
    if backends.forced in EXACT:
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
        return
    computed = torch.float64 if expected.dtype == torch.float64 else torch.float32
    bound = torch.finfo(expected.dtype).eps + 16 * torch.finfo(computed).eps
    largest = max((v for v in expected.double().abs().flatten().tolist() if v < float("inf")), default=0.0)
    torch.testing.assert_close(got, expected, rtol=0, atol=bound * largest, equal_nan=True)


def compare(make: Callable[[], Call], grad_scale: float | Tensor | None = None) -> None:
    """`make` is called twice, for leaves without a .grad."""
    two, one = make(), make()
    expected = two(decoupled_elbo)
    scale = torch.ones_like(expected.loss) if grad_scale is None else torch.as_tensor(grad_scale)
    expected.loss.backward(scale.to(expected.loss).reshape(()))
    got = one(lambda *t, **kw: decoupled_elbo_backward(*t, **kw, grad_scale=grad_scale))
    assert (got.sigma is None) == (expected.sigma is None)
    for a, b in zip(got, expected, strict=True):
        if a is not None:
            assert not a.requires_grad
            same(a, b.detach())
    for a, b in zip(one.leaves(), two.leaves(), strict=True):
        assert a.grad is not None
        same(a.grad, b.grad)
