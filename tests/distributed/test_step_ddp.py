"""decoupled_elbo_backward under DistributedDataParallel: its hooks see the gradients, as after loss.backward()."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fused_elbo import decoupled_elbo, decoupled_elbo_backward

RANKS = 2
pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.decoder = nn.Linear(12, 2 * 4), nn.Linear(4, 12)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mu, logvar = self.encoder(x).chunk(2, 1)
        return self.decoder(mu + (logvar / 2).exp()), mu, logvar


def train(rank: int, folder: str, at_once: bool) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous_{at_once}", rank=rank, world_size=RANKS)
    torch.set_num_threads(1)
    model = DistributedDataParallel(Model())
    x = torch.rand(3, 8, 12, generator=torch.Generator().manual_seed(rank))
    for step, batch in enumerate(x):  # the first two are accumulated
        model.require_backward_grad_sync = step != 0
        recon, mu, logvar = model(batch)
        if at_once:
            decoupled_elbo_backward(recon, batch, mu, logvar, beta=2.0)
        else:
            decoupled_elbo(recon, batch, mu, logvar, beta=2.0).loss.backward()
    torch.save([p.grad for p in model.parameters()], f"{folder}/{at_once}_{rank}.pt")
    dist.destroy_process_group()
    # Without the interpreter's shutdown, which gloo's threads outlive: one that lets go of a tensor then may abort the
    # process (pytorch/pytorch#179291).
    os._exit(0)


@pytest.mark.check("decoupled_elbo_backward under DistributedDataParallel")
def test_gradients_are_averaged_as_after_loss_backward(tmp_path: Path) -> None:
    for at_once in (True, False):
        mp.spawn(train, args=(str(tmp_path), at_once), nprocs=RANKS)
    one, other, two = (torch.load(tmp_path / f"{name}.pt") for name in ("True_0", "True_1", "False_0"))
    for got, on_other, expected in zip(one, other, two, strict=True):
        assert torch.equal(got, expected)
        assert torch.equal(got, on_other)
