"""The gradient of a log σ that neighbours share, in the CUDA kernels: warps add it up, and PyTorch what they found."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch

import fused_elbo
from fused_elbo import decoupled_elbo

if "cuda_plugin" not in sys.modules:
    pytest.skip("minutes of compiling, which `make test-cuda` takes", allow_module_level=True)
pytestmark = pytest.mark.cuda


def summed(profile: torch.profiler.profile) -> list[int]:
    """How many elements the tensors have that PyTorch adds up."""
    return [math.prod(e.input_shapes[0]) for e in profile.events() if e.name == "aten::sum"]


def gradients(backend: str, dtype: torch.dtype, tensors: list[torch.Tensor], **kw: Any) -> list[torch.Tensor]:
    """Of log σ, the last tensor, and of recon."""
    recon, target, log_sigma = (t.to(dtype) for t in tensors)
    given = [recon.requires_grad_(), log_sigma.detach().requires_grad_()]
    latents = torch.zeros(len(recon), 4, dtype=dtype), torch.zeros(len(recon), 4, dtype=dtype)
    with fused_elbo.backend(backend):
        loss = decoupled_elbo(given[0], target, *latents, log_sigma=given[1], **kw).loss
    return list(torch.autograd.grad(loss, given[::-1]))


def data(shape: tuple[int, ...], log_sigma: tuple[int, ...], memory_format: Any = torch.contiguous_format) -> list[Any]:
    torch.manual_seed(0)
    recon, target = (torch.randn(shape).contiguous(memory_format=memory_format) for _ in range(2))
    return [recon, target, torch.randn(log_sigma) * 0.3]


SHAPES = {  # of data, of log σ: elements of a sum; 1: each element has a gradient, as they lie
    "channel": ((2, 3, 40, 40), (3, 1, 1), 400),
    "channel of each image": ((2, 3, 28, 28), (2, 3, 1, 1), 392),
    "one for each channel of each image": ((2, 3, 16, 16), (2, 3, 1, 1), 256),
    "channel, many chunks": ((70, 3, 64, 64), (1, 3, 1, 1), 512),
    "frames": ((2, 2, 3, 16, 16), (1, 1, 3, 1, 1), 256),
    "channel and frame": ((2, 2, 3, 16, 32), (1, 2, 3, 1, 1), 512),
    "rows": ((2, 3, 4, 512), (1, 1, 4, 1), 512),
    "too few neighbours": ((2, 3, 40, 40), (40, 1), 1),
    "off 128 bits": ((2, 3, 19, 19), (3, 1, 1), 1),
    "innermost": ((2, 3, 40, 40), (1, 40), 1),
}


def check(tensors: list[Any], segment: int, dtype: torch.dtype = torch.float32, **kw: Any) -> None:
    expected = gradients("reference", torch.float64, [t.to(dtype) for t in tensors], **kw)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        found = gradients("cuda", dtype, tensors, **kw)
    rtol = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    for value, true in zip(found, expected, strict=True):
        torch.testing.assert_close(value.double(), true, rtol=rtol, atol=rtol * true.abs().max().item())
    sums = tensors[0].numel() // segment
    assert summed(profile) == ([sums] if sums > tensors[2].numel() else [])


@pytest.mark.parametrize("name", SHAPES)
def test_a_segment_has_one_sum(name: str) -> None:
    """And what is made for it is as many times smaller than the data."""
    shape, log_sigma, segment = SHAPES[name]
    log_sigma = (*[1] * (len(shape) - len(log_sigma)), *log_sigma)
    check(data(shape, log_sigma), segment)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    check(data((2, 3, 40, 40), (1, 3, 1, 1)), 400, dtype)


def test_orders_of_the_dimensions() -> None:
    check(data((2, 3, 40, 40), (1, 3, 1, 1), torch.channels_last), 1)
    check([t.transpose(2, 3) for t in data((2, 3, 32, 8, 16), (1, 3, 1, 8, 1))], 1)
    check([t.transpose(1, 2) for t in data((2, 8, 3, 20, 20), (1, 8, 1, 1, 1))], 400)


@pytest.mark.parametrize("kw", [{"likelihood": "laplace"}, {"activation": "tanh"}], ids=str)
def test_elements_of_more_than_two_numbers(kw: dict[str, Any]) -> None:
    weight = torch.rand(2, 3, 40, 40).relu()
    for more in ({}, {"weight": weight}):
        check(data((2, 3, 40, 40), (1, 3, 1, 1)), 400, **kw, **more)


def test_samples_off_128_bits() -> None:
    """Each chunk then has elements before its first vector."""
    recon, target, log_sigma = data((2, 3, 40, 40), (1, 3, 1, 1))
    memory = torch.zeros(2, 3 * 1600 + 1).float()
    apart = memory[:, 1:].unflatten(1, (3, 40, 40)).copy_(target)
    check([recon, apart, log_sigma], 400)
    assert math.prod(apart.shape[1:]) != apart.stride(0)


def test_the_same_bits_again() -> None:
    tensors = data((70, 3, 64, 64), (1, 3, 1, 1))
    first, again = (gradients("cuda", torch.float32, tensors) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
