"""accelerate around train_vae's model: what `prepare` makes of it, accumulation, and memory that runs out."""

from __future__ import annotations

import gc
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from on_hosts import assert_close, assert_falls, blobs, by_hand, gradients
from torch import Tensor
from torch.utils.data import DataLoader

pytest.importorskip("accelerate", reason="needs accelerate: pip install fused-elbo[hosts]")

# isort: split
import accelerate
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import find_executable_batch_size
from common.models import VAEOutput
from common.objective import VAEObjective, make_objective

import fused_elbo
from fused_elbo import ELBO, decoupled_elbo
from fused_elbo.backends import cpp

SHAPE, BETA, MIB = (1, 16, 16), 2.0, 1 << 20
STATM = Path("/proc/self/statm")
limits_memory = pytest.mark.skipif(not STATM.exists(), reason="needs Linux's /proc and its limit of a process's memory")


@pytest.fixture(autouse=True)
def one_state() -> Iterator[None]:
    """An Accelerator takes up what the one before it in the process was made with."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def objective(sigma: str) -> VAEObjective:
    torch.manual_seed(0)
    return make_objective(SHAPE, sigma, BETA, latent_dim=16, width=8)


def prepared(sigma: str, images: Tensor, batch: int, lr: float, **options: Any) -> Any:
    """Accelerator, model, optimiser, loader"""
    accelerator = accelerate.Accelerator(cpu=True, **options)
    model = objective(sigma)
    optimiser = torch.optim.Adam(model.parameters(), lr=lr)
    return accelerator, *accelerator.prepare(model, optimiser, DataLoader(images, batch))


def epoch(accelerator: Any, model: Any, optimiser: Any, loader: Any) -> tuple[list[ELBO], dict[str, Tensor]]:
    """One epoch's ELBOs, and the gradients of its last step."""
    torch.manual_seed(1)  # z's noise is then the same for one batch as for its micro-batches one after another
    elbos, grads = [], {}
    for x in loader:
        with accelerator.accumulate(model):
            elbo = model(x)
            accelerator.backward(elbo.loss)
            grads = gradients(model)
            optimiser.step()
            optimiser.zero_grad()
        elbos.append(elbo)
    return elbos, grads


@pytest.mark.parametrize("sigma", ["0.3", "learned"])
@pytest.mark.parametrize(("precision", "tolerance"), [("no", 1e-5), ("bf16", 2e-2)])
def test_accumulation_is_the_large_batch(sigma: str, precision: str, tolerance: float) -> None:
    images = blobs(32, *SHAPE[::2])
    _, whole = epoch(*prepared(sigma, images, 32, 1e-3, mixed_precision=precision))
    parts = prepared(sigma, images, 8, 1e-3, mixed_precision=precision, gradient_accumulation_steps=4)
    elbos, accumulated = epoch(*parts)
    assert len(elbos) == 4
    assert ("criterion.log_sigma" in accumulated) == (sigma == "learned")
    assert_close(accumulated, whole, tolerance)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_prepared_model(precision: str) -> None:
    """`prepare` runs forward in autocast and makes what it returns fp32: an ELBO stays one, and is what it was."""
    accelerator, model, optimiser, loader = prepared(
        "optimal", blobs(32, *SHAPE[::2]), 32, 3e-3, mixed_precision=precision
    )
    outputs: list[Any] = []
    accelerator.unwrap_model(model).model.register_forward_hook(lambda _, args, out: outputs.append((args[0], out)))
    losses = []
    for _ in range(15):
        (elbo,), _ = epoch(accelerator, model, optimiser, loader)
        assert isinstance(elbo, ELBO)
        assert {t.dtype for t in elbo} == {torch.float32}
        losses.append(elbo.loss.item())
        x, out = outputs.pop()
        assert {t.dtype for t in out[:3]} == {torch.bfloat16 if precision == "bf16" else torch.float32}
        wide = [t.detach().double() for t in (out.recon, x, out.mu, out.logvar)]
        log_sigma = (wide[0] - wide[1]).square().mean().log() / 2
        assert losses[-1] == pytest.approx(by_hand(*wide, log_sigma, BETA).item(), rel=1e-5)
    assert_falls(losses)


def address_space() -> int:
    return int(STATM.read_text().split()[0]) * resource.getpagesize()


@contextmanager
def memory_left(count: int) -> Iterator[None]:
    """The system gives this process no more than `count` bytes, as where others have the rest."""
    gc.collect()
    fused_elbo.empty_cache()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (address_space() + count, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def halved(tried: list[int]) -> Any:
    """accelerate takes a tenth away each time, unless it is told otherwise."""
    return lambda: tried[-1] // 2


@limits_memory
def test_memory_that_the_loss_lacks_halves_the_batch(backend: str) -> None:
    """All that grows with the batch here is the gradient of recon, 1 MiB a sample, since what is expanded has no
    memory of its own. (The reference has some tensors of this size.)"""
    one = torch.rand(1, MIB // 4)
    recon, latents = (one / 2).requires_grad_(), torch.rand(1, 4)
    tried: list[int] = []

    def step(batch: int) -> tuple[Tensor, Tensor]:
        tried.append(batch)
        mu, x = latents.expand(batch, -1), one.expand(batch, -1)
        loss = decoupled_elbo(recon.expand(batch, -1), x, mu, mu).loss
        return loss.detach(), torch.autograd.grad(loss, recon)[0]

    step(16)
    tried.clear()
    before = address_space()
    with memory_left(160 * MIB):
        loss, grad = find_executable_batch_size(step, starting_batch_size=512, reduce_batch_size_fn=halved(tried))()
    assert tried == [512 >> k for k in range(len(tried))]
    assert tried == [512, 256, 128] if backend == "cpp" else len(tried) > 1

    # What is left behind is the pool, within its limit, and a call gives it back. The same batch has the same bits.
    assert cpp.pooled_bytes() <= cpp.POOL_MIB * MIB
    fused_elbo.empty_cache()
    assert cpp.pooled_bytes() == 0
    assert address_space() - before < 16 * MIB
    again, grad_again = step(tried[-1])
    assert torch.equal(loss, again)
    assert torch.equal(grad, grad_again)


def no_memory(*_: Any) -> None:
    torch.empty(1 << 50)


def fails_in_backward(_: Any, args: Any, out: VAEOutput) -> None:
    out.recon.register_hook(no_memory)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_training_goes_on_with_a_smaller_batch(where: str) -> None:
    """train_vae's model, with PyTorch's own error just after the loss's forward or backward pass. Afterwards it trains
    as if nothing had happened. (Under a limit oneDNN's convolutions fail, then and later, in words of their own.)"""
    images = blobs(64, *SHAPE[::2])
    tried: list[int] = []

    def train(batch: int) -> tuple[list[ELBO], dict[str, Tensor]]:
        tried.append(batch)
        setting = prepared("optimal", images, batch, 1e-3)
        vae = setting[0].unwrap_model(setting[1])
        if batch > 16 and where == "forward":
            vae.criterion.register_forward_hook(no_memory)
        elif batch > 16:
            vae.model.register_forward_hook(fails_in_backward)
        return epoch(*setting)

    elbos, grads = find_executable_batch_size(train, starting_batch_size=64, reduce_batch_size_fn=halved(tried))()
    assert tried == [64, 32, 16]
    again, grads_again = train(16)
    assert len(elbos) == 4
    assert torch.equal(torch.stack([e.loss for e in elbos]), torch.stack([e.loss for e in again]))
    assert_close(grads, grads_again, 0.0)
