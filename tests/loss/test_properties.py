"""hypothesis over shapes, strides, dtypes and modes: the backends agree with the literal formulas in fp64."""

from __future__ import annotations

import pytest
import torch
from cases import MODES, REDUCTIONS, Call, allowed, gpu_kernels_on_cpu
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from literal import literal_elbo
from torch import Tensor

from fused_elbo import decoupled_elbo

EXAMPLES = 10 if gpu_kernels_on_cpu() else 60  # there a step takes a twentieth of a second
data_shapes = st.lists(st.integers(1, 7), min_size=0, max_size=4).map(tuple)
latent_shapes = st.lists(st.integers(1, 6), min_size=0, max_size=3).map(tuple)


@st.composite
def layouts(draw: st.DrawFn, t: Tensor) -> Tensor:
    """The same values, with the sample's dimensions in some order in memory, or only every other element used."""
    order = draw(st.permutations(range(t.dim())))
    inverse = [order.index(k) for k in range(t.dim())]
    t = t.detach().permute(order).contiguous().permute(inverse)
    if draw(st.booleans()):
        k = draw(st.integers(0, t.dim() - 1))
        doubled = t.repeat_interleave(2, k)
        t = doubled.movedim(k, 0)[::2].movedim(0, k)
    return t.requires_grad_(t.is_floating_point())


def needs_dimensions(mode: str) -> bool:
    """Whether its arguments are of some dimension of a sample."""
    return mode.startswith("learned-") or mode == "weight-channel"


@pytest.mark.usefixtures("backend")
@settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_any_shape_layout_and_mode(source: st.DataObject) -> None:
    mode, reduction = source.draw(st.sampled_from(list(MODES))), source.draw(st.sampled_from(REDUCTIONS))
    data, latent, batch = source.draw(data_shapes), source.draw(latent_shapes), source.draw(st.integers(1, 5))
    assume(allowed(mode, reduction) and (data or not needs_dimensions(mode)))
    call = Call(mode, reduction, batch, data, latent, dtype=torch.float64)
    expected = call(literal_elbo)
    expected_gradients = call.gradients(expected)
    call.tensors = [source.draw(layouts(t)) for t in call.tensors]
    got = call(decoupled_elbo)
    for a, b in zip(got[:3], expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    for leaf, a, b in zip(call.leaves(), call.gradients(got), expected_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)
        assert a.stride() == torch.empty_like(leaf).stride()
