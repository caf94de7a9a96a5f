"""Strides: what is walked in place, what is copied, and that both give the same numbers and the right gradients."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Call, implied
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fused_elbo import ELBO, decoupled_elbo, decoupled_elbo_backward

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "reversed": lambda t: t.permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1),
    "batch_sliced": lambda t: t.repeat_interleave(2, 0)[::2],
    "batch_sliced_channels_last": lambda t: LAYOUTS["channels_last"](t.repeat_interleave(2, 0))[::2],
    "batch_innermost": lambda t: t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "cropped": lambda t: torch.nn.functional.pad(t, (1, 1, 1, 1))[:, :, 1:-1, 1:-1],
    "every_other": lambda t: t.repeat_interleave(2, 3)[..., ::2],
}
TARGET_LAYOUTS = ["contiguous", "channels_last", "cropped"]
MODES = ["optimal", "per-image", "learned-channel", "learned-channel-image", "learned-map", "learned-pixel"]
# Every pair of a layout, a target's layout and a mode, in a third of the combinations.
PAIRS = [
    (layout, TARGET_LAYOUTS[(i + j) % 3], mode) for i, layout in enumerate(LAYOUTS) for j, mode in enumerate(MODES)
]
# Of these, two for each layout: with two modes, and two layouts of the target.
SOME_PAIRS = [PAIRS[len(MODES) * i + (i + k) % len(MODES)] for i in range(len(LAYOUTS)) for k in (0, 2)]


def lay(t: Tensor, layout: str) -> Tensor:
    """The same values in another layout, as a leaf."""
    return LAYOUTS[layout](t.detach()).requires_grad_()


@pytest.mark.ptx
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    ("layout", "target_layout", "mode"),
    [pytest.param(*p, marks=implied("every layout in a third of its pairs", unless=p in SOME_PAIRS)) for p in PAIRS],
)
def test_every_layout_gives_the_same(layout: str, target_layout: str, mode: str) -> None:
    call = Call(mode, data=(3, 6, 10), latent=(4, 3, 5), dtype=torch.float64)
    expected = call(decoupled_elbo)
    expected_gradients = call.gradients(expected)
    recon, target, mu, logvar = call.tensors
    call.tensors = [lay(recon, layout), lay(target, target_layout), lay(mu, layout), lay(logvar, target_layout)]
    if mode == "learned-pixel":
        call.kw["log_sigma"] = lay(call.kw["log_sigma"], target_layout)
    got = call(decoupled_elbo)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    for leaf, a, b in zip(call.leaves(), call.gradients(got), expected_gradients, strict=True):
        torch.testing.assert_close(a, b)
        assert a.stride() == torch.empty_like(leaf).stride()


def test_every_pair_is_there() -> None:
    for places in ((0, 1), (0, 2), (1, 2)):
        sizes = [len(set(values)) for values in zip(*PAIRS, strict=True)]
        assert len({(p[places[0]], p[places[1]]) for p in PAIRS}) == sizes[places[0]] * sizes[places[1]]


@pytest.mark.ptx
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_video(layout: torch.memory_format) -> None:
    call = Call("optimal", data=(3, 5, 8, 8), dtype=torch.float64)
    expected = call.gradients(call(decoupled_elbo))
    call.tensors[:2] = [t.detach().contiguous(memory_format=layout).requires_grad_() for t in call.tensors[:2]]
    for a, b in zip(call.gradients(call(decoupled_elbo)), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.ptx
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("latent", [(8,), (4, 6, 6)], ids=str)
def test_chunks_of_a_packed_tensor(latent: tuple[int, ...]) -> None:
    call = Call("optimal", latent=latent, dtype=torch.float64)
    expected = call.gradients(call(decoupled_elbo))
    recon, target, mu, logvar = call.tensors
    packed = torch.cat([mu, logvar], 1).detach().requires_grad_()
    mu, logvar = packed.chunk(2, dim=1)
    elbo = decoupled_elbo(recon, target, mu, logvar)
    weights = [w * (1 + torch.zeros(())) for w in (1.0, 0.5, -0.7)]
    g_recon, g_packed = torch.autograd.grad(elbo[:3], [recon, packed], [w.double() for w in weights])
    torch.testing.assert_close(g_recon, expected[0])
    torch.testing.assert_close(g_packed, torch.cat(expected[2:4], 1))


# Each vector's width once: none, 2, 4 and 8.
WIDTHS = [(5, 1), (6, 0), (12, 4), (72, 0)]


def runs_of(latent: int, offset: int, dtype: torch.dtype) -> Any:
    """The marks that say in which runs it is."""
    if (latent, offset) not in WIDTHS:
        return implied("each vector's width once")
    return pytest.mark.ptx_each if dtype == torch.bfloat16 else ()


@pytest.mark.ptx
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    ("latent", "offset", "dtype"),
    [
        pytest.param(*case, marks=runs_of(*case))
        for case in itertools.product((5, 6, 12, 72), (0, 1, 4), (torch.float16, torch.bfloat16))
    ],
    ids=str,
)
def test_half_latents_at_any_address(latent: int, offset: int, dtype: torch.dtype) -> None:
    """They are chunks of one tensor, at which vectors of 8, 4, 2 elements or none begin; not all divide the size."""
    batch, chunks = 3, 4
    memory = torch.randn(offset + batch * chunks * latent).mul(0.5).to(dtype)
    latents = memory[offset:].view(batch, chunks * latent).chunk(chunks, 1)
    recon, target, *_ = Call(batch=batch, dtype=dtype).tensors

    def leaves(wide: bool) -> list[Tensor]:
        return [(t.double() if wide else t).detach().requires_grad_() for t in (recon, target, *latents)]

    def gradients(function: Callable[..., ELBO], wide: bool = False) -> list[Tensor | None]:
        r, t, mu, logvar, *prior = every = leaves(wide)
        loss = function(r, t, mu, logvar, prior=tuple(prior)).loss
        losses.append(loss.item())
        if loss.requires_grad:
            loss.backward()
        return [leaf.grad for leaf in every]

    losses: list[float] = []
    expected = gradients(decoupled_elbo, wide=True)
    rounding = torch.finfo(dtype).eps
    for function in (decoupled_elbo, decoupled_elbo_backward):
        for got, true in zip(gradients(function), expected, strict=True):
            assert got is not None
            torch.testing.assert_close(got.double(), true, rtol=rounding, atol=1e-6)
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def copies(call: Call) -> int:
    """How many aten copies a forward and backward make below the operators, as the profiler saw them."""
    outputs = call(decoupled_elbo)  # anything that happens only once, such as loading the library, is over
    call.gradients(outputs)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        call.gradients(call(decoupled_elbo))
    assert any(event.name == "fused_elbo::grads" for event in seen.events())
    return sum(event.name in ("aten::copy_", "aten::clone", "aten::contiguous") for event in seen.events())


def packed(t: Tensor) -> Tensor:
    """The same values, as a chunk of a tensor twice as wide."""
    return torch.cat([t, t], 1).chunk(2, dim=1)[0].detach().requires_grad_()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "reversed", "batch_sliced"])
def test_dense_samples_are_walked_without_a_copy(layout: str, cpp: None) -> None:
    call = Call("optimal", data=(3, 6, 10), latent=(4, 3, 5))
    baseline = copies(call)  # of the weights that the test itself makes
    recon, target, mu, logvar = call.tensors
    call.tensors = [lay(recon, layout), lay(target, layout), packed(mu), packed(logvar)]
    assert copies(call) == baseline


def test_only_the_target_is_copied_where_layouts_differ(cpp: None) -> None:
    call = Call("optimal", data=(3, 6, 10))
    baseline = copies(call)
    call.tensors[0] = lay(call.tensors[0], "channels_last")
    call.tensors[1].requires_grad_(False)
    assert copies(call) == baseline + 2  # the target, in forward and in grads


@pytest.mark.usefixtures("backend")
def test_a_sigma_that_is_repeated_along_more_dimensions_than_a_kernel_walks() -> None:
    """Every other one of eleven: the same as a log σ that has recon's shape."""
    shape, repeated = (2,) * 11, (1, 2) * 5
    recon, target = (torch.randn(shape, dtype=torch.float64).requires_grad_() for _ in range(2))
    mu, logvar = (torch.randn(2, 3, dtype=torch.float64) for _ in range(2))
    log_sigma = torch.randn(repeated, dtype=torch.float64).requires_grad_()
    leaves = (recon, target, log_sigma)
    got = decoupled_elbo(recon, target, mu, logvar, log_sigma=log_sigma).loss
    expected = decoupled_elbo(recon, target, mu, logvar, log_sigma=log_sigma.expand(shape)).loss
    torch.testing.assert_close(got, expected)
    for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(a, b)
