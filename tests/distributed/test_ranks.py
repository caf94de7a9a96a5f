"""process_group=: R processes, each with a shard of the batch, are one process with the whole of it.

Each spawn costs seconds, so each makes all the checks of its number of ranks, and each rank writes down what failed.
"""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cases import Call
from ranks import ALL_MODES, BATCH, SCALAR, SHARDS, Rank, of_mode
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from fused_elbo import (
    DecoupledELBO,
    LearnedSigmaELBO,
    decoupled_elbo,
    gaussian_kl,
    gaussian_nll,
    kl_decomposition,
    log_aggregate_posterior,
)
from fused_elbo.sigma import Optimal

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")

IMAGE = (1, 3, 4)


# -------------------------------------------------------------------------------------------------- what a rank checks


def whole_against_shards(rank: Rank, call: Call, name: str) -> None:
    """Values, σ, and gradients for grad_outputs that weigh the three outputs differently."""
    whole = call(decoupled_elbo)
    tensors, kw = [rank.shard(t) for t in call.tensors], {k: rank.shard(v) for k, v in call.kw.items()}
    part = decoupled_elbo(*tensors, **kw, reduction=call.reduction, process_group=dist.group.WORLD)
    for field in ("loss", "distortion", "rate"):
        rank.close(f"{name}: {field}", rank.average(getattr(part, field)), getattr(whole, field))
    rank.close(f"{name}: sigma", part.sigma, rank.shard(whole.sigma))
    # The leaves hold the whole batch: their gradients are zero in the rows of other ranks.
    for leaf, got, expected in zip(call.leaves(), call.gradients(part), call.gradients(whole), strict=True):
        rank.close(f"{name}: gradient of {tuple(leaf.shape)}", rank.average(got), expected)


def every_mode(rank: Rank) -> None:
    for mode in ALL_MODES:
        for reduction in SCALAR:
            for dtype in (torch.float64, torch.float32) if reduction == "batchmean" else (torch.float64,):
                call = of_mode(mode, reduction, dtype)
                whole_against_shards(rank, call, f"{mode}, {reduction}, {dtype}")


def halves_of_the_loss(rank: Rank) -> None:
    call = Call(batch=BATCH, dtype=torch.float64)
    recon, target, mu, logvar = call.tensors
    for reduction in SCALAR:
        options = {"reduction": reduction, "process_group": dist.group.WORLD}
        nll = gaussian_nll(rank.shard(recon), rank.shard(target), **options)
        kl = gaussian_kl(rank.shard(mu), rank.shard(logvar), free_bits=0.2, **options)
        rank.close("nll", rank.average(nll), gaussian_nll(recon, target, reduction=reduction))
        rank.close("kl", rank.average(kl), gaussian_kl(mu, logvar, free_bits=0.2, reduction=reduction))
        shards = [rank.shard(mu), rank.shard(mu[:, :2])], [rank.shard(logvar), rank.shard(logvar[:, :2])]
        whole = gaussian_kl([mu, mu[:, :2]], [logvar, logvar[:, :2]], reduction=reduction)
        rank.close("kl of levels", rank.average(gaussian_kl(*shards, **options)), whole)


def the_kl_in_parts(rank: Rank) -> None:
    """The mixture is that of all ranks, each of which has its own components in it."""
    mu, logvar, noise = (torch.randn(BATCH, 2, 3, dtype=torch.float64, requires_grad=i < 2) for i in range(3))
    z = mu + (0.5 * logvar).exp() * noise
    for reduction in SCALAR:
        options = {"dataset_size": 50, "reduction": reduction}
        whole = kl_decomposition(z, mu, logvar, **options)
        of_shard = (rank.shard(t) for t in (z, mu, logvar))
        part = kl_decomposition(*of_shard, **options, process_group=dist.group.WORLD)
        for field, a, b in zip(whole._fields, part, whole, strict=True):
            rank.close(f"{reduction}: {field}", rank.average(a), b)
        losses = (terms.total_correlation + 2 * terms.mutual_information for terms in (part, whole))
        for got, expected in zip(
            *(torch.autograd.grad(t, (mu, logvar), retain_graph=True) for t in losses), strict=True
        ):
            rank.close(f"{reduction}: gradient", rank.average(got), expected)
    for own in (True, False):
        whole, part = (
            log_aggregate_posterior(*tensors, own=own, **options)
            for tensors, options in (
                ((z, mu, logvar), {}),
                ([rank.shard(t) for t in (z, mu, logvar)], {"process_group": dist.group.WORLD}),
            )
        )
        for a, b in zip(part, whole, strict=True):
            rank.close(f"own={own}", a, rank.shard(b))
    try:
        log_aggregate_posterior(
            *(rank.shard(t) for t in (z, mu, logvar)), dataset_size=5, process_group=dist.group.WORLD
        )
        rank.failures.append("a data set that is smaller than the batch of all ranks was not refused")
    except ValueError as error:
        assert "the 7 components of all ranks, got 5" in str(error)  # noqa: PT017


def the_kl_in_parts_of_half_precision(rank: Rank) -> None:
    """Gradients are added up over the ranks before they are rounded, once."""
    narrow = [torch.randn(BATCH, 6).bfloat16().requires_grad_() for _ in range(3)]
    exact = [t.detach().double().requires_grad_() for t in narrow]
    part = kl_decomposition(*map(rank.shard, narrow), process_group=dist.group.WORLD).total_correlation
    whole = kl_decomposition(*exact).total_correlation
    for got, expected in zip(torch.autograd.grad(part, narrow), torch.autograd.grad(whole, exact), strict=True):
        error, rounding = (rank.average(got.double()) - expected).abs(), torch.finfo(torch.bfloat16).eps / 2
        most = rounding * expected.abs() + 1e-5 * expected.abs().max()
        rank.close("half precision: rounded once", (error > most).any(), torch.tensor(False))


def a_group_of_each(rank: Rank) -> None:
    """The mixture is that of the group, not of all processes."""
    group = [dist.new_group([i]) for i in range(rank.ranks)][rank.rank]
    rows = 2 + rank.rank
    leaves = [torch.randn(rows, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    part, whole = (kl_decomposition(*leaves, dataset_size=50, process_group=g) for g in (group, None))
    for field, a, b in zip(whole._fields, part, whole, strict=True):
        rank.close(f"own group: {field}", a, b)
    gradients = (torch.autograd.grad(terms.total_correlation, leaves, retain_graph=True) for terms in (part, whole))
    for got, expected in zip(*gradients, strict=True):
        rank.close("own group: gradient", got, expected)
    rank.refused(
        "own group: second derivatives", "process_group: no second derivatives",
        lambda: torch.autograd.grad(part.total_correlation, leaves, create_graph=True),
    )  # fmt: skip
    for shape in ((0,), (0, 3)):  # of no points, densities are asked for where there are components
        none = log_aggregate_posterior(torch.zeros(0, 3), *leaves[1:], own=False, process_group=group)[len(shape) - 1]
        rank.close("own group: no points", torch.tensor(none.shape), torch.tensor(shape))


def images_of_two_sizes(rank: Rank) -> None:
    """σ² is the mean over elements, and "mean" is per element, whatever size each rank's images have."""
    size = 6 if rank.rank else 3
    torch.manual_seed(rank.rank)
    recon, z = torch.randn(2, 1, size, size, dtype=torch.float64, requires_grad=True), torch.zeros(2, 3)
    elbo = decoupled_elbo(recon, torch.zeros_like(recon), z, z, reduction="mean", process_group=dist.group.WORLD)
    mse = rank.average(recon.square().sum()) / rank.average(torch.tensor(float(recon.numel())))
    rank.close("two sizes: sigma", elbo.sigma, mse.sqrt())
    normal = torch.distributions.Normal(0.0, mse.sqrt())
    nats, elements = (-normal.log_prob(recon)).sum(), torch.tensor(float(recon.numel()))
    rank.close("two sizes: nats per element", rank.average(elbo.loss), rank.average(nats) / rank.average(elements))
    elbo.loss.backward()
    expected = recon / mse / rank.average(elements)
    rank.close("two sizes: gradient", recon.grad, expected)


def collectives(rank: Rank) -> None:
    """There is one in forward, and none in backward."""
    call, calls, real = Call(batch=BATCH), [], dist.all_reduce
    dist.all_reduce = lambda *args, **kw: (calls.append(args), real(*args, **kw))  # type: ignore[assignment]
    elbo = decoupled_elbo(*map(rank.shard, call.tensors), process_group=dist.group.WORLD)
    forward = len(calls)
    elbo.loss.backward()
    dist.all_reduce = real
    rank.close("all-reduces", torch.tensor([forward, len(calls)]), torch.tensor([1, 1]))


def sub_group(rank: Rank) -> None:
    group, members = dist.new_group([0, 1]), SHARDS[rank.ranks][:2]
    call = Call(batch=BATCH, dtype=torch.float64)
    shards = [rank.shard(t) for t in call.tensors]
    if rank.rank > 1:
        rank.refused("not a member", "not a member", lambda: decoupled_elbo(*shards, process_group=group))
        return
    rows = slice(0, sum(members))
    whole = decoupled_elbo(*(t[rows] for t in call.tensors))
    part = decoupled_elbo(*shards, process_group=group)
    total = part.loss.detach().clone()
    dist.all_reduce(total, group=group)
    rank.close("sub-group: sigma", part.sigma, whole.sigma)
    rank.close("sub-group: loss", total / 2, whole.loss)


class Objective(nn.Module):
    """A small VAE and its loss in one, so that a wrapper sees the parameters of both."""

    def __init__(self, criterion: Callable[[], DecoupledELBO | LearnedSigmaELBO]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.decoder = nn.Linear(12, 2 * 4), nn.Linear(4, 12)
        self.criterion = criterion()

    def forward(self, x: Tensor, at_once: bool = False) -> Any:
        mu, logvar = self.encoder(x.flatten(1)).chunk(2, 1)
        recon = self.decoder(mu + (logvar / 2).exp()).unflatten(1, IMAGE)
        return (recon, mu, logvar) if at_once else self.criterion(recon, x, mu, logvar)


CRITERIA: dict[str, Callable[..., DecoupledELBO | LearnedSigmaELBO]] = {
    "optimal": lambda **kw: DecoupledELBO(beta=2.0, momentum=0.5, **kw),
    "softclip": lambda **kw: DecoupledELBO(sigma=Optimal(softclip=True), min_log_sigma=-0.5, capacity=2.0, **kw),
    "per image": lambda **kw: DecoupledELBO(sigma="optimal-per-image", momentum=0.5, **kw),
    "learned": lambda **kw: LearnedSigmaELBO(init=-0.3, free_bits=0.1, **kw),
}


def under_ddp(rank: Rank) -> None:
    x = torch.rand(2, BATCH, *IMAGE)
    for name, criterion in CRITERIA.items():
        for reduction in SCALAR:
            one = Objective(partial(criterion, reduction=reduction))
            part_of = partial(criterion, reduction=reduction, process_group=dist.group.WORLD)
            ddp = DistributedDataParallel(Objective(part_of))
            for step, batch in enumerate(x):  # accumulated
                ddp.require_backward_grad_sync = step == 1
                whole, part = one(batch), ddp(rank.shard(batch))
                whole.loss.backward()
                part.loss.backward()
                rank.close(f"DDP, {name}, {reduction}: loss", rank.average(part.loss), whole.loss)
            for (p, got), expected in zip(ddp.module.named_parameters(), one.parameters(), strict=True):
                rank.close(f"DDP, {name}, {reduction}: gradient of {p}", got.grad, expected.grad)
            for (b, got), expected in zip(ddp.module.named_buffers(), one.buffers(), strict=True):
                rank.close(f"DDP, {name}, {reduction}: {b}", got, expected)


def at_once(rank: Rank) -> None:
    """decoupled_elbo_backward, under DDP, with a grad_scale."""
    x = torch.rand(BATCH, *IMAGE)
    one = Objective(lambda: DecoupledELBO(beta=2.0))
    ddp = DistributedDataParallel(Objective(lambda: DecoupledELBO(beta=2.0, process_group=dist.group.WORLD)))
    for scale in (3.0, torch.tensor(3.0)):
        one.zero_grad()
        ddp.zero_grad()
        whole = one(x)
        (3.0 * whole.loss).backward()
        shard = rank.shard(x)
        recon, mu, logvar = ddp(shard, at_once=True)
        part = ddp.module.criterion.backward(recon, shard, mu, logvar, grad_scale=scale)
        rank.close("at once: loss", rank.average(part.loss), whole.loss)
        rank.close("at once: detached", torch.tensor(part.loss.requires_grad), torch.tensor(False))
        for got, expected in zip(ddp.module.parameters(), one.parameters(), strict=True):
            rank.close("at once: gradient", got.grad, expected.grad)


def under_fsdp(rank: Rank) -> None:
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (rank.ranks,))
    x = torch.rand(BATCH, *IMAGE)
    # σ of the one channel, since FSDP2 refuses scalar parameters.
    for name, criterion in (("optimal", CRITERIA["optimal"]), ("learned", partial(LearnedSigmaELBO, 1))):
        one, sharded = Objective(criterion), Objective(partial(criterion, process_group=mesh.get_group()))
        for module in (sharded.encoder, sharded.decoder, sharded):
            fully_shard(module, mesh=mesh)
        whole, part = one(x), sharded(rank.shard(x))
        whole.loss.backward()
        part.loss.backward()
        rank.close(f"FSDP2, {name}: loss", rank.average(part.loss), whole.loss)
        for (p, got), expected in zip(sharded.named_parameters(), one.parameters(), strict=True):
            rank.close(f"FSDP2, {name}: gradient of {p}", got.grad.full_tensor(), expected.grad)  # type: ignore[union-attr]


CHECKS = (
    every_mode,
    halves_of_the_loss,
    the_kl_in_parts,
    the_kl_in_parts_of_half_precision,
    a_group_of_each,
    images_of_two_sizes,
    collectives,
    sub_group,
    under_ddp,
    at_once,
    under_fsdp,
)


def work(number: int, ranks: int, folder: str) -> None:
    rank = Rank(number, SHARDS[ranks])
    try:
        torch.set_num_threads(1)
        options = {"rank": number, "world_size": ranks, "timeout": timedelta(seconds=120)}
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", **options)
        for check in CHECKS:
            torch.manual_seed(0)
            check(rank)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        rank.failures.append(traceback.format_exc())
    Path(folder, f"{number}.json").write_text(json.dumps([rank.checked, rank.failures]))
    # Without the interpreter's shutdown, which gloo's threads outlive: one that lets go of a tensor then may abort the
    # process (pytorch/pytorch#179291).
    os._exit(0)


# ------------------------------------------------------------------------------------------------------------ the test


@pytest.mark.parametrize(
    "ranks", [2, pytest.param(3, marks=pytest.mark.check("three processes, one of which has nothing"))]
)
def test_shards_are_the_whole_batch(ranks: int, tmp_path: Path) -> None:
    mp.spawn(work, args=(ranks, str(tmp_path)), nprocs=ranks)
    for rank in range(ranks):
        checked, failures = json.loads((tmp_path / f"{rank}.json").read_text())
        assert not failures, f"rank {rank}: {len(failures)} of {checked} failed:\n" + "\n".join(failures[:20])
        assert checked > 900
