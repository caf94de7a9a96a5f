"""process_group= in one process: what equals no group, what is refused, and shards one after another on any backend.

test_ranks.py has the real processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import FEW, Call, implied, modes_for_operators
from ranks import ALL_MODES, SCALAR, SHARDS, Rank, of_mode
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

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


@pytest.fixture
def group() -> Iterator[dist.ProcessGroup]:
    """A group of this process alone. The fake backend, whose all-reduce leaves everything as it is, has no threads."""
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


OF_SHARDS = [*FEW, "beta-sample", "capacity-between", "weight"]
by_few = "two shards in one mode for each way through the kernels"


@pytest.mark.parametrize("mode", [pytest.param(m, marks=implied(by_few, unless=m in OF_SHARDS)) for m in ALL_MODES])
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
