"""Small calls in every mode, for what compares values and for what watches memory accesses."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fused_elbo import decoupled_elbo, decoupled_elbo_backward

# Of recon, and how many latents a sample has: sizes beside every boundary of a tile, the common one first.
SHAPES = (((3, 3, 9, 11), 5), ((5, 1, 64, 64), 16), ((2, 3, 75, 150), 4097), ((1, 1, 1, 1), 1))


def modes(leaf: Callable[..., Tensor], shape: tuple[int, ...], latents: int) -> dict[str, dict[str, Any]]:
    """Those that differ in code. A leaf wants a gradient."""
    batch, channels = shape[:2]
    return {
        "optimal": {},
        "per image": {"sigma": "optimal-per-image", "free_bits": 0.2},
        "learned": {"log_sigma": leaf((1, 1, 1)), "beta": leaf(())},
        "learned per image": {"log_sigma": leaf((batch,)), "beta": leaf((batch,))},
        "per channel": {"log_sigma": leaf((channels, 1, 1), dtype=torch.float32)},
        "per pixel": {"log_sigma": leaf(shape)},
        "prior": {"prior": (leaf((batch, latents)), leaf((batch, latents))), "beta": leaf(())},
        "constant": {"sigma": 0.3, "capacity": 5.0, "beta": leaf(())},
    }


NAMES = tuple(modes(torch.empty, SHAPES[0][0], SHAPES[0][1]))


def reductions(kw: dict[str, Any]) -> tuple[str, ...]:
    return ("batchmean",) if "capacity" in kw else ("batchmean", "none")


def inputs(leaf: Callable[..., Tensor], shape: tuple[int, ...], latents: int) -> list[Tensor]:
    """(recon, target, mu, logvar)"""
    return [leaf(size) for size in (shape, shape, (shape[0], latents), (shape[0], latents))]


def leaves(tensors: list[Tensor], kw: dict[str, Any]) -> list[Tensor]:
    given = [t for v in kw.values() for t in (v if isinstance(v, tuple) else (v,))]
    return [*tensors, *(t for t in given if isinstance(t, Tensor))]


def step(leaf: Callable[..., Tensor], shape: tuple[int, ...], latents: int, mode: str) -> None:
    """Forward and backward by two calls and, where it can, by one."""
    kw, tensors = modes(leaf, shape, latents)[mode], inputs(leaf, shape, latents)
    for reduction in reductions(kw):
        loss = decoupled_elbo(*tensors, **kw, reduction=reduction).loss
        torch.autograd.grad(loss, leaves(tensors, kw), torch.rand_like(loss))
    decoupled_elbo_backward(*tensors, **kw)


def steps(device: str) -> None:
    for shape, latents in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            leaf = partial(torch.rand, device=device, dtype=dtype, requires_grad=True)
            for mode in NAMES:
                step(leaf, shape, latents, mode)
