"""Values and gradients of every mode on the GPU, small shapes, against the reference in fp64 on the CPU.

Each case is a first launch: its kernels are compiled, which is what takes the time, so that many processes share them.
"""

from __future__ import annotations

import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import gpu_cases
import gpu_pool
import torch
from gpu_section import Failed, Part, Record
from torch import Tensor
from workloads import DTYPES

import fused_elbo
from fused_elbo import (
    BackendUnavailable,
    backends,
    decoupled_elbo,
    decoupled_elbo_backward,
    gaussian_kl,
    log_aggregate_posterior,
)
from fused_elbo import __main__ as doctor

LEVELS = "levels"  # gaussian_kl of a list
AGGREGATE = "aggregate"  # log_aggregate_posterior
# Of points, components and latents, in the place of gpu_cases.SHAPES.
AGGREGATES = ((64, 64, 10), (250, 300, 67), (256, 1024, 64), (1, 1, 1))
DOCTOR = "doctor"
BACKENDS = ("triton", "cuda")
# Of the largest element of a gradient: the rounding of fp32 sums, then that of its own dtype. Losses are fp32.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
MARGIN = 3.0  # seconds to say what was found
MOST = 100  # wrong ones that are told one by one


def cases(backend: str) -> list[str]:
    """What is worth most comes first: all modes of the common shape."""
    small, *others = range(len(gpu_cases.SHAPES))
    ways = [
        (small, "fp32"),
        (small, "bf16"),
        *((i, dtype) for i in others for dtype in ("fp32", "bf16")),
        (small, "fp16"),
    ]
    return [f"{backend}|{mode}|{i}|{dtype}" for i, dtype in ways for mode in (*gpu_cases.NAMES, LEVELS, AGGREGATE)]


def run(part: Part) -> str:
    part.found |= {"backends": {}, "wrong": []}
    cores = gpu_pool.processes()
    share = {"triton": max(1, cores * 2 // 3), "cuda": max(1, cores // 3)}  # Triton compiles more
    lanes = [[DOCTOR], *(lane for name in BACKENDS for lane in gpu_pool.dealt(cases(name), share[name]))]
    for item in (item for lane in lanes[1:] for item in lane):
        tally(part, item)["cases"] += 1
    with tempfile.TemporaryDirectory() as folder:
        done = gpu_pool.spread("values", lanes, Path(folder), part.left() - MARGIN, partial(take, part))
    part.save()
    if part.found["wrong"]:
        raise Failed(f"{len(part.found['wrong'])} cases are wrong; the first: {part.found['wrong'][0]}")
    if reason := tally(part, "triton").get("unavailable"):
        raise Failed(f"the Triton backend cannot serve: {reason}")
    if not done:
        raise Failed("out of time before every case was tried")
    return "ok"


def tally(part: Part, item: str) -> Record:
    empty = {"cases": 0, "right": 0, "wrong": 0, "first_s": None, "worst": {}}
    return part.found["backends"].setdefault(item.partition("|")[0], empty)


def take(part: Part, item: str, found: Record) -> None:
    """Adds a case's result. `worst` is the largest error, as a multiple of what is tolerated."""
    if item == DOCTOR:
        return
    own, dtype = tally(part, item), item.split("|")[-1]
    if "unavailable" in found:
        own["unavailable"] = found["unavailable"]
    elif faults := [found["error"]] if "error" in found else found["wrong"]:
        own["wrong"] += 1
        part.found["wrong"] += [f"{item}: {fault}" for fault in faults][: MOST - len(part.found["wrong"])]
    else:
        own["right"] += 1
        own["worst"][dtype] = max(own["worst"].get(dtype, 0.0), found["worst"])
        own["first_s"] = own["first_s"] or found["seconds"]
    part.save()


def prepare(items: list[str]) -> None:
    """Builds what is not built yet: the doctor does, and who needs nvcc's library waits for it."""
    if DOCTOR in items:
        doctor.main()  # its words are in the log
    elif items[0].startswith("cuda"):
        backends.cuda.status(build=True)


# ---------------------------------------------------------------------------------------------------------- one case


def one(item: str, device: str = "cuda") -> Record:
    """A case's largest error, as a multiple of what is tolerated, and what is wrong, in words."""
    if item == DOCTOR:
        return {}
    backend, mode, number, dtype = item.split("|")
    started = time.monotonic()
    try:
        if mode == LEVELS:
            errors = of_levels(backend, DTYPES[dtype], device)
        elif mode == AGGREGATE:
            errors = of_aggregate(backend, AGGREGATES[int(number)], DTYPES[dtype], device)
        else:
            errors = of_mode(backend, mode, *gpu_cases.SHAPES[int(number)], DTYPES[dtype], device)
    except BackendUnavailable as reason:
        return {"unavailable": str(reason)}
    wrong = [f"{what}: {error:.3g} of the tolerance" for what, error in errors.items() if not error <= 1]
    return {"worst": max(errors.values()), "wrong": wrong, "seconds": time.monotonic() - started}


def of_mode(backend: str, mode: str, shape: tuple[int, ...], latents: int, dtype: torch.dtype, device: str) -> Record:
    torch.manual_seed(1)
    leaf = partial(torch.rand, dtype=dtype, requires_grad=True)
    kw, tensors = gpu_cases.modes(leaf, shape, latents)[mode], gpu_cases.inputs(leaf, shape, latents)
    if dtype == torch.float16:
        tensors[:2] = [t.to(memory_format=torch.channels_last).detach().requires_grad_() for t in tensors[:2]]
    true, true_kw = moved(tensors, "cpu", torch.float64), moved(kw, "cpu", torch.float64)
    own, own_kw = moved(tensors, device, None), moved(kw, device, None)
    own_leaves, true_leaves = gpu_cases.leaves(own, own_kw), gpu_cases.leaves(true, true_kw)
    errors: Record = {}
    for reduction in gpu_cases.reductions(kw):
        with fused_elbo.backend("reference"):
            expected = decoupled_elbo(*true, **true_kw, reduction=reduction).loss
            weight = torch.linspace(0.5, 1.5, max(1, expected.numel()), dtype=torch.float64).reshape(expected.shape)
            gradients = torch.autograd.grad(expected, true_leaves, weight)
        with fused_elbo.backend(backend):
            loss = decoupled_elbo(*own, **own_kw, reduction=reduction).loss
            got = torch.autograd.grad(loss, own_leaves, weight.to(loss))
        errors |= compared(reduction, loss, expected, got, gradients)
        if reduction == "batchmean":
            with fused_elbo.backend(backend):
                loss = decoupled_elbo_backward(*own, **own_kw, grad_scale=float(weight)).loss
            errors |= compared("in one call", loss, expected, [t.grad for t in own_leaves], gradients)
    return errors


def of_levels(backend: str, dtype: torch.dtype, device: str) -> Record:
    torch.manual_seed(1)
    mus = [torch.randn(3, 16, size, size).to(dtype).requires_grad_() for size in (1, 4, 8, 8)]
    logvars = [(0.3 * t).detach().requires_grad_() for t in mus]
    true = [moved(levels, "cpu", torch.float64) for levels in (mus, logvars)]
    own = [moved(levels, device, None) for levels in (mus, logvars)]
    with fused_elbo.backend("reference"):
        expected = gaussian_kl(*true)
        gradients = torch.autograd.grad(expected, [t for levels in true for t in levels])
    with fused_elbo.backend(backend):
        loss = gaussian_kl(*own)
        got = torch.autograd.grad(loss, [t for levels in own for t in levels])
    return compared(LEVELS, loss, expected, got, gradients)


def of_aggregate(backend: str, sizes: tuple[int, int, int], dtype: torch.dtype, device: str) -> Record:
    """Both log-densities at once, weighted differently."""
    torch.manual_seed(1)
    points, components, latents = sizes
    tensors = [torch.randn(n, latents).to(dtype) for n in (points, components, components)]
    true, own = moved(tensors, "cpu", torch.float64), moved(tensors, device, None)
    weights = torch.linspace(0.5, 1.5, points, dtype=torch.float64)

    def loss(leaves: Any) -> Tensor:
        joint, marginals = log_aggregate_posterior(*leaves, dataset_size=5000)
        return (joint * weights.to(joint)).sum() - marginals.sum()

    with fused_elbo.backend("reference"):
        expected = loss(true)
        gradients = torch.autograd.grad(expected, true)
    with fused_elbo.backend(backend):
        found = loss(own)
        got = torch.autograd.grad(found, own)
    return compared(AGGREGATE, found, expected, got, gradients)


def compared(what: str, loss: Tensor, expected: Tensor, got: Any, gradients: Any) -> Record:
    """name -> error as a multiple of what is tolerated."""
    exact = expected.detach()
    far = (loss.detach().cpu().double() - exact).abs().max()
    found = {f"{what}, loss": float(far / (TOLERANCES[loss.dtype] * exact.abs().max().clamp_min(1.0)))}
    for i, (own, true) in enumerate(zip(got, gradients, strict=True)):
        far = (own.cpu().double() - true).abs().max()
        found[f"{what}, gradient {i}"] = float(far / (TOLERANCES[own.dtype] * true.abs().max().clamp_min(1e-6)))
    return found


def moved(value: Any, device: str, dtype: torch.dtype | None) -> Any:
    """Fresh leaves, also inside lists, tuples and dicts; everything else as it is."""
    if isinstance(value, Tensor):
        return value.detach().to(device=device, dtype=dtype, copy=True).requires_grad_()
    if isinstance(value, dict):
        return {name: moved(v, device, dtype) for name, v in value.items()}
    return type(value)(moved(v, device, dtype) for v in value) if isinstance(value, (list, tuple)) else value
