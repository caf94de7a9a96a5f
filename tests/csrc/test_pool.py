"""The CPU backend's pool of memory for large gradients: reused, never shared, bounded, given back; and what goes past
the caches."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fused_elbo
from fused_elbo import decoupled_elbo
from fused_elbo.backends import cpp as backend

MIB = 1 << 20
STATUS = Path("/proc/self/status")


@pytest.fixture(autouse=True)
def fresh_pool(cpp: None) -> Iterator[None]:
    backend.load()
    fused_elbo.empty_cache()
    yield
    backend.library.call("pool_limit", backend.POOL_MIB * MIB)
    fused_elbo.empty_cache()


def gradient(mib: float, seed: int = 0) -> Tensor:
    """Makes a gradient of recon, which is recon − target exactly: all its values are `seed`."""
    recon = torch.full((4, int(mib * MIB) // 16), float(seed), requires_grad=True)
    latents = torch.zeros(4, 2)
    loss = decoupled_elbo(recon, torch.zeros_like(recon), latents, latents, sigma=1.0, reduction="sum").loss
    return torch.autograd.grad(loss, recon)[0]


def test_the_next_gradient_has_the_memory_of_the_last() -> None:
    first = gradient(3, seed=1)
    address = first.data_ptr()
    assert backend.pooled_bytes() == 0
    del first
    assert backend.pooled_bytes() == 4 * MIB  # whole pages of 2 MiB
    second = gradient(3, seed=2)
    assert second.data_ptr() == address
    assert backend.pooled_bytes() == 0
    assert (second == 2).all()


def test_a_gradient_in_use_is_nobody_elses() -> None:
    kept = [gradient(2, seed) for seed in range(1, 4)]
    view = kept[0][1:, ::2]
    del kept[0]  # the view holds on to the memory
    kept += [gradient(2, seed) for seed in range(4, 7)]
    fused_elbo.empty_cache()
    assert (view == 1).all()
    assert [g.unique().tolist() for g in kept] == [[2], [3], [4], [5], [6]]
    assert len({g.data_ptr() for g in kept} | {view.untyped_storage().data_ptr()}) == 6


def test_a_gradient_that_becomes_a_parameters_keeps_its_memory() -> None:
    recon = torch.zeros(4, MIB // 4, requires_grad=True)
    latents = torch.zeros(4, 2)
    for _ in range(3):
        decoupled_elbo(recon, recon.detach() - 1, latents, latents, sigma=1.0, reduction="sum").loss.backward()
    assert recon.grad is not None
    assert (recon.grad == 3).all()


def test_other_sizes_are_not_served_from_it() -> None:
    del_me = gradient(6)
    del del_me
    gradient(2)
    assert backend.pooled_bytes() == 8 * MIB


def test_sizes_of_blocks() -> None:
    gradient(0.12)  # malloc's
    assert backend.pooled_bytes() == 0
    gradient(0.3)
    assert backend.pooled_bytes() == 5 * MIB // 16  # in steps of 64 KiB
    gradient(0.26)
    assert backend.pooled_bytes() == 5 * MIB // 16
    gradient(2.1)
    assert backend.pooled_bytes() == 5 * MIB // 16 + 4 * MIB


def test_bounded_and_the_longest_unused_goes_first() -> None:
    backend.library.call("pool_limit", 8 * MIB)
    two, four, six = gradient(2), gradient(4), gradient(6)
    addresses = {mib: g.data_ptr() for mib, g in ((2, two), (4, four), (6, six))}
    del two
    del four
    assert backend.pooled_bytes() == 6 * MIB
    del six  # 12 would be too many: the first two go
    assert backend.pooled_bytes() == 6 * MIB
    assert gradient(6).data_ptr() == addresses[6]
    gradient(10)  # larger than the pool
    assert backend.pooled_bytes() == 6 * MIB


def test_off() -> None:
    backend.library.call("pool_limit", 0)
    g = gradient(2, seed=3)
    assert (g == 3).all()
    g.resize_(8, MIB // 4)  # PyTorch's own memory
    del g
    assert backend.pooled_bytes() == 0


def test_pooled_memory_refuses_to_grow_and_may_shrink() -> None:
    g = gradient(2, seed=3)
    g.resize_(2, 4)
    assert (g == 3).all()
    assert g.clone().resize_(8, MIB).shape == (8, MIB)
    with pytest.raises(RuntimeError, match="not resizable"):
        g.resize_(8, MIB)
    with pytest.raises(RuntimeError, match="not resizable"):
        g.untyped_storage().resize_(0)


@pytest.mark.skipif(not STATUS.exists(), reason="needs Linux's /proc")
def test_empty_cache_gives_the_memory_back_to_the_system() -> None:
    def resident() -> int:
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmRSS"))
        return int(line.split()[1]) << 10

    g = gradient(128)
    assert (g == 0).all()
    del g
    before = resident()
    assert backend.pooled_bytes() == 128 * MIB
    fused_elbo.empty_cache()
    assert backend.pooled_bytes() == 0
    assert before - resident() > 120 * MIB


def test_threads() -> None:
    """Gradients taken, checked and freed by eight threads at once, beside one that empties the pool."""

    def work(seed: int) -> bool:
        right = True
        for k in range(25):
            g = gradient(1 + seed % 3, seed + k)
            right &= bool((g == seed + k).all())
            if seed == 0:
                fused_elbo.empty_cache()
        return right

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(work, range(8)))
    assert backend.pooled_bytes() <= backend.POOL_MIB * MIB


def run(limit: str) -> str:
    code = (
        "import torch, fused_elbo\n"
        "from fused_elbo.backends import cpp\n"
        "recon = torch.zeros(4, 1 << 20, requires_grad=True)\n"
        "latents = torch.zeros(4, 2)\n"
        "fused_elbo.decoupled_elbo(recon, recon.detach() + 1, latents, latents).loss.backward()\n"
        "recon.grad = None\n"
        "print(cpp.pooled_bytes() >> 20)\n"
    )
    environ = {**os.environ, "FUSED_ELBO_POOL_MIB": limit}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    return done.stdout.strip() + done.stderr


@pytest.mark.parametrize(("limit", "held"), [("", "16"), ("20", "16"), ("15", "0"), ("0", "0")])
def test_the_environment_bounds_it(limit: str, held: str) -> None:
    assert run(limit) == held


@pytest.mark.parametrize(
    "limit", ["lots", *(pytest.param(l, marks=pytest.mark.check("the pool's limit in words")) for l in ("-1", "1.5"))]
)
def test_a_limit_that_is_no_number_is_told(limit: str) -> None:
    assert f"FUSED_ELBO_POOL_MIB: expected a whole number of MiB, got '{limit}'" in run(limit)


@pytest.mark.parametrize("offset", [0, 1])
def test_gradients_too_large_for_the_caches(offset: int) -> None:
    """They are stored past the caches, in vectors: samples of every alignment, with a rest at both ends."""
    dims = 3001
    batch = -(-backend.library.call("last_level_cache") // 2 // (4 * dims))
    if batch * dims > 1 << 28:
        pytest.skip("the last-level cache is too large to be exceeded in a test")
    data = torch.rand(2, batch * dims + offset)[:, offset:].unflatten(1, (batch, dims))
    recon, target = data[0].requires_grad_(), data[1].requires_grad_()
    latents = torch.zeros(batch, 2)
    loss = decoupled_elbo(recon, target, latents, latents, sigma=1.0, reduction="sum").loss
    of_recon, of_target = torch.autograd.grad(loss, [recon, target])
    assert torch.equal(of_recon, recon.detach() - target.detach())
    assert torch.equal(of_target, target.detach() - recon.detach())
