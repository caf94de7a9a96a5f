"""process_group=: R processes, each with a shard of the batch, are one process with the whole of it.

Each spawn costs seconds, so each makes all the checks of its number of ranks, and each rank writes down what failed.
"""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cases import MODES, REDUCTIONS, Call, modes_for_operators
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from fused_elbo import (
    DecoupledELBO,
    LearnedSigmaELBO,
    decoupled_elbo,
    decoupled_elbo_backward,
    gaussian_kl,
    gaussian_nll,
)
from fused_elbo.sigma import Optimal

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")

BATCH = 7
SHARDS = {2: (5, 2), 3: (4, 3, 0)}  # of the ranks
IMAGE = (1, 3, 4)
SCALAR = [r for r in REDUCTIONS if r != "none"]

# This C lies above one shard's mean KL and below the batch's, but above what that is before free_bits.
BETWEEN = {"capacity": 4.2, "free_bits": 0.3, "beta": 2.0}
ALL_MODES = [*MODES, "capacity-between"]


def of_mode(mode: str, reduction: str = "batchmean", dtype: torch.dtype = torch.float32) -> Call:
    if mode in MODES:
        return Call(mode, reduction, batch=BATCH, dtype=dtype)
    call = Call("capacity", reduction, batch=BATCH, dtype=dtype)
    call.kw = dict(BETWEEN)
    return call


# ------------------------------------------------------------------------------------------------- in each process


class Rank:
    """One of the processes: its part of a batch, averages over all, and the failures so far."""

    def __init__(self, rank: int, sizes: Sequence[int]) -> None:
        self.rank, self.ranks = rank, len(sizes)
        start = sum(sizes[:rank])
        self.rows = slice(start, start + sizes[rank])
        self.failures: list[str] = []
        self.checked = 0

    def shard(self, value: Any) -> Any:
        """Of whatever has a value for each sample; no other dimension of the tests is BATCH."""
        if isinstance(value, tuple):
            return tuple(map(self.shard, value))
        return value[self.rows] if isinstance(value, Tensor) and value.dim() and value.shape[0] == BATCH else value

    def average(self, value: Tensor) -> Tensor:
        value = value.detach().clone()
        dist.all_reduce(value)
        return value / self.ranks

    def close(self, what: str, got: Tensor | None, expected: Tensor | None) -> None:
        self.checked += 1
        try:
            if expected is None:
                assert got is None, "expected None"
                return
            wide = {"rtol": 1e-11, "atol": 1e-12} if expected.dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
            torch.testing.assert_close(got, expected.detach(), **wide)
        except AssertionError as error:
            self.failures.append(f"{what}: {' '.join(str(error).split())}")

    def refused(self, what: str, message: str, call: Callable[[], Any]) -> None:
        self.checked += 1
        try:
            call()
            self.failures.append(f"{what}: was not refused")
        except (ValueError, RuntimeError) as error:
            if message not in str(error):
                self.failures.append(f"{what}: {error}")


def whole_against_shards(rank: Rank, call: Call, name: str) -> None:
    """Values, σ, and gradients for grad_outputs that weigh the three outputs differently."""
    whole = call(decoupled_elbo)
    tensors, kw = [rank.shard(t) for t in call.tensors], {k: rank.shard(v) for k, v in call.kw.items()}
    part = decoupled_elbo(*tensors, **kw, reduction=call.reduction, process_group=dist.group.WORLD)
    for field in ("loss", "distortion", "rate"):
        rank.close(f"{name}: {field}", rank.average(getattr(part, field)), getattr(whole, field))
    rank.close(f"{name}: sigma", part.sigma, rank.shard(whole.sigma))
    # Of the leaves that hold the whole batch: zero in the rows of other ranks.
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
    """One in forward, none in backward."""
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


CHECKS = (every_mode, halves_of_the_loss, images_of_two_sizes, collectives, sub_group, under_ddp, at_once, under_fsdp)


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


# -------------------------------------------------------------------------------------------------------- the tests


@pytest.mark.parametrize(
    "ranks", [2, pytest.param(3, marks=pytest.mark.check("three processes, one of which has nothing"))]
)
def test_shards_are_the_whole_batch(ranks: int, tmp_path: Path) -> None:
    mp.spawn(work, args=(ranks, str(tmp_path)), nprocs=ranks)
    for rank in range(ranks):
        checked, failures = json.loads((tmp_path / f"{rank}.json").read_text())
        assert not failures, f"rank {rank}: {len(failures)} of {checked} failed:\n" + "\n".join(failures[:20])
        assert checked > 900


@pytest.fixture
def group() -> Iterator[dist.ProcessGroup]:
    """Of this process alone. The fake backend, whose all-reduce leaves everything as it is, has no threads."""
    dist.init_process_group("fake", rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("mode", modes_for_operators())
def test_group_of_one_is_no_group(mode: str, group: dist.ProcessGroup, backend: str) -> None:
    for reduction in SCALAR:
        call = Call(mode, reduction)
        got, expected = call(partial(decoupled_elbo, process_group=group)), call(decoupled_elbo)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)
        for a, b in zip(call.gradients(got), call.gradients(expected), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("mode", ALL_MODES)
def test_two_shards_in_one_process(mode: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On backends that the spawned processes do not have: what either shard sends is recorded, then added to the
    other's in place of the all-reduce."""
    dist.init_process_group("fake", rank=0, world_size=2)
    call, shards, sent = of_mode(mode), [Rank(rank, SHARDS[2]) for rank in (0, 1)], []

    def outputs(shard: Rank) -> Any:
        tensors, kw = map(shard.shard, call.tensors), {k: shard.shard(v) for k, v in call.kw.items()}
        return decoupled_elbo(*tensors, **kw, process_group=dist.group.WORLD)

    monkeypatch.setattr(dist, "all_reduce", lambda sums, group: sent.append(sums.clone()))
    for shard in shards:
        outputs(shard)
    got = []
    for shard, other in zip(shards, reversed(sent[:]), strict=True):
        monkeypatch.setattr(dist, "all_reduce", lambda sums, group, other=other: sums.add_(other))
        got.append(outputs(shard))
    dist.destroy_process_group()
    whole = call(decoupled_elbo)
    for a, b, expected in zip(got[0][:3], got[1][:3], whole[:3], strict=True):
        torch.testing.assert_close((a + b) / 2, expected)
    gradients = zip(call.gradients(got[0]), call.gradients(got[1]), call.gradients(whole), strict=True)
    for a, b, expected in gradients:
        torch.testing.assert_close((a + b) / 2, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype, group: dist.ProcessGroup, backend: str) -> None:
    """The weight meets the gradient in fp32, before the one rounding."""
    call = Call(dtype=dtype, data=(3, 32, 32))
    scale = torch.tensor(2.0**10)
    for a, b in zip(
        torch.autograd.grad(call(partial(decoupled_elbo, process_group=group)).loss, call.leaves(), scale),
        torch.autograd.grad(call(decoupled_elbo).loss, call.leaves(), scale),
        strict=True,
    ):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b)


def test_perfect_reconstruction(group: dist.ProcessGroup, backend: str) -> None:
    x, z = torch.rand(4, 8, requires_grad=True), torch.zeros(4, 2)
    for sigma in ("optimal", Optimal(softclip=True)):
        elbo = decoupled_elbo(x, x.detach(), z, z, sigma=sigma, process_group=group)
        assert torch.isfinite(elbo.loss)
        assert not torch.autograd.grad(elbo.loss, x)[0].any()


def test_nothing_on_any_rank_is_nan(group: dist.ProcessGroup) -> None:
    x, z = torch.rand(0, 8, requires_grad=True), torch.zeros(0, 2)
    elbo = decoupled_elbo(x, x, z, z, process_group=group)
    assert elbo.loss.isnan()
    assert elbo.sigma is not None
    assert elbo.sigma.isnan()
    elbo.loss.backward()
    assert x.grad is not None
    assert x.grad.shape == (0, 8)


def test_compiled_code_breaks_its_graph(group: dist.ProcessGroup) -> None:
    call = Call("beta")

    def loss(*tensors: Tensor) -> Tensor:
        return 2.0 * decoupled_elbo(*tensors, beta=3.0, process_group=group).loss

    torch._dynamo.reset()
    expected = loss(*call.tensors)
    torch.testing.assert_close(torch.compile(loss, backend="eager")(*call.tensors), expected)
    torch._dynamo.reset()  # or the code that was compiled in parts is found again
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(loss, backend="eager", fullgraph=True)(*call.tensors)


def test_what_cannot_be(group: dist.ProcessGroup) -> None:
    call = Call()
    loss = call(partial(decoupled_elbo, process_group=group)).loss
    with pytest.raises(RuntimeError, match="process_group: no second derivatives"):
        torch.autograd.grad(loss, call.leaves(), create_graph=True)
    with pytest.raises(RuntimeError, match=r"process_group: not inside torch.func's transforms"):
        torch.func.grad(lambda recon: decoupled_elbo(recon, *call.tensors[1:], process_group=group).loss)(
            call.tensors[0]
        )
    with pytest.raises(ValueError, match='process_group: excludes reduction="none"'):
        Call(reduction="none")(partial(decoupled_elbo, process_group=group))
    with pytest.raises(ValueError, match='process_group: excludes reduction="none"'):
        DecoupledELBO(reduction="none", process_group=group)
    with pytest.raises(ValueError, match=r"recon: no elements in a sample, shape \(0, 0\)"):
        gaussian_nll(torch.zeros(0, 0), torch.zeros(0, 0), process_group=group)
    with pytest.raises(ValueError, match=r"recon: an empty batch"):
        gaussian_nll(torch.zeros(0, 3), torch.zeros(0, 3))


def test_what_the_refusal_of_a_mesh_advises(group: dist.ProcessGroup) -> None:
    meshes = [init_device_mesh("cpu", (1,)), init_device_mesh("cpu", (1, 1), mesh_dim_names=("data", "tensor"))]
    for found in (meshes[0].get_group(), meshes[1].get_group("data")):
        DecoupledELBO(process_group=found)


@pytest.mark.parametrize("shape", [(4, 8), (4, 3, 5), (4, 3, 8, 8)], ids=str)
def test_fsdp2_takes_a_sigma_of_one_channel(group: dist.ProcessGroup, shape: tuple[int, ...]) -> None:
    """What the documentation advises in place of a scalar parameter, for flat data and for any other."""
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    with pytest.raises(ValueError, match="scalar parameters"):
        fully_shard(LearnedSigmaELBO(), mesh=mesh)
    sharded, whole, z = LearnedSigmaELBO(channels=1), LearnedSigmaELBO(), torch.zeros(4, 2)
    fully_shard(sharded, mesh=mesh)
    recon, target = torch.rand(shape), torch.rand(shape)
    for module in (sharded, whole):
        module(recon, target, z, z).loss.backward()
    gradient = sharded.log_sigma.grad.full_tensor()  # type: ignore[union-attr]
    torch.testing.assert_close(gradient.view(()), whole.log_sigma.grad)


def test_bad_groups(group: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(2, 3)
    calls = [
        lambda g: decoupled_elbo(x, x, x, x, process_group=g),
        lambda g: gaussian_nll(x, x, process_group=g),
        lambda g: gaussian_kl(x, x, process_group=g),
        lambda g: gaussian_kl([x], [x], process_group=g),
        lambda g: DecoupledELBO(process_group=g),
        lambda g: LearnedSigmaELBO(process_group=g),
        lambda g: decoupled_elbo_backward(x.requires_grad_(), x, x, x, process_group=g),
    ]

    mesh = init_device_mesh("cpu", (1,))
    several = init_device_mesh("cpu", (1, 1), mesh_dim_names=("data", "tensor"))
    sub_group = dist.new_group([0])
    dist.destroy_process_group(sub_group)
    for call in calls:
        with pytest.raises(TypeError, match=r"process_group: expected a ProcessGroup, as dist.group.WORLD, got int"):
            call(2)
        with pytest.raises(TypeError, match=r"got DeviceMesh: pass mesh.get_group\(\)"):
            call(mesh)
        with pytest.raises(TypeError, match=r"got DeviceMesh: pass mesh.get_group\(…\) of the dimension along which"):
            call(several)
        with pytest.raises(ValueError, match="process_group: this process is not a member"):
            call(dist.GroupMember.NON_GROUP_MEMBER)
        with pytest.raises(ValueError, match="process_group: this process has no such group"):
            call(sub_group)
    dist.destroy_process_group()
    for call in calls:
        with pytest.raises(RuntimeError, match=r"process_group: torch.distributed is not initialised"):
            call(group)
    monkeypatch.setattr(dist, "is_available", lambda: False)
    for call in calls:
        with pytest.raises(RuntimeError, match=r"process_group: this PyTorch is built without torch.distributed"):
            call(group)
