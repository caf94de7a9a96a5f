"""What the loss of an autoencoder costs, apart from the networks around it: time, and memory until backward."""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from .adversarial import centred

BATCH = (4, 3, 256, 256)  # of 8-bit images, as latent diffusion's autoencoders have them
ROUNDS, CALLS = 8, 5  # calls in a row, so that threads and allocators have settled by the last


class LossPart:
    """`loss(recon, x, mu, logvar, p)`, forward and backward, on random tensors of BATCH's size."""

    def __init__(self, loss: nn.Module, latent_channels: int, device: torch.device, *, bf16: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        batch, _, height, width = BATCH
        target = torch.randint(256, BATCH, generator=generator).to(torch.uint8)
        recon = centred(target) + 0.1 * torch.randn(BATCH, generator=generator)
        latents = 0.5 * torch.randn(2, batch, latent_channels, height // 4, width // 4, generator=generator)
        # The networks' outputs; the encoder has read floats, so the target is there as floats and as bytes.
        outputs = (t.to(device, torch.bfloat16 if bf16 else torch.float32).requires_grad_() for t in (recon, *latents))
        recon, mu, logvar = outputs
        x = (target if loss.reads_bytes else centred(target)).to(device)
        p = torch.full((batch,), 0.1, device=device, requires_grad=True)
        self.inputs = (recon, x, mu, logvar, p)
        self.loss, self.device, self.bf16 = loss.to(device), device, bf16

    def forward(self) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return self.loss(*self.inputs).loss

    def seconds(self) -> float:
        for t in self.inputs:
            t.grad = None
        self._wait()
        started = time.perf_counter()
        self.forward().backward()
        self._wait()
        return time.perf_counter() - started

    def bytes_kept(self) -> int:
        """What the graph holds from forward to backward, beside the inputs, which are there anyway."""
        kept: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with saved_tensors_hooks(pack, lambda t: t):
            graph = self.forward()  # as long as it lives, no address is taken twice
        for t in self.inputs:
            kept.pop(t.untyped_storage().data_ptr(), None)
        del graph
        return sum(kept.values())

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def loss_costs(
    losses: dict[str, nn.Module], latent_channels: int, device: torch.device, *, bf16: bool
) -> dict[str, dict[str, float]]:
    """Milliseconds, the least of interleaved rounds, so that what else the machine does falls on all alike; and MiB."""
    parts = {kind: LossPart(loss, latent_channels, device, bf16=bf16) for kind, loss in losses.items()}
    times: dict[str, list[float]] = {kind: [] for kind in parts}
    for _ in range(ROUNDS):
        for kind, part in parts.items():
            times[kind] += [part.seconds() for _ in range(CALLS)]
    return {
        kind: {"loss_ms": 1e3 * min(times[kind]), "loss_mib": part.bytes_kept() / 2**20} for kind, part in parts.items()
    }
