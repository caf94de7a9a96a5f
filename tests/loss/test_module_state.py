"""The modules' state: in half precision, from checkpoints, from the meta device; and what `channels` means."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from cases import Call, implied
from torch import nn

from fused_elbo import DecoupledELBO, LearnedSigmaELBO, decoupled_elbo

pytestmark = pytest.mark.usefixtures("backend")

HALF = [torch.float16, torch.bfloat16]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Sets it as a trainer does while it builds a model."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def built_under(dtype: torch.dtype) -> DecoupledELBO:
    with default_dtype(dtype):
        return DecoupledELBO(momentum=0.01)


def cast_beneath(dtype: torch.dtype) -> DecoupledELBO:
    """Casts the buffers as FullyShardedDataParallel's buffer_dtype does."""
    module = DecoupledELBO(momentum=0.01)
    for buffer in module.buffers():
        buffer.data = buffer.to(dtype) if buffer.is_floating_point() else buffer
    return module


def loaded(dtype: torch.dtype, assign: bool) -> DecoupledELBO:
    module = DecoupledELBO(momentum=0.01)
    state = {name: value.to(dtype) for name, value in module.state_dict().items()}
    module.load_state_dict(state, assign=assign)
    return module


WAYS: dict[str, Callable[[torch.dtype], DecoupledELBO]] = {
    "to": lambda dtype: DecoupledELBO(momentum=0.01).to(dtype),
    "half": lambda dtype: DecoupledELBO(momentum=0.01).half(),
    "type": lambda dtype: DecoupledELBO(momentum=0.01).type(dtype),
    "inside a model": lambda dtype: nn.Sequential(DecoupledELBO(momentum=0.01)).to(dtype)[0],  # type: ignore[return-value]
    "argument": lambda dtype: DecoupledELBO(momentum=0.01, dtype=dtype),
    "default dtype": built_under,
    "checkpoint": lambda dtype: loaded(dtype, assign=False),
    "checkpoint, assigned": lambda dtype: loaded(dtype, assign=True),
    "cast beneath": cast_beneath,
    "copy": lambda dtype: copy.deepcopy(DecoupledELBO(momentum=0.01).to(dtype)),
}


of_buffers = "one way to half precision: the others are of the module's buffers alone"


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("way", [pytest.param(w, marks=implied(of_buffers, unless=w == "to")) for w in WAYS])
def test_the_running_sigma_of_a_half_precision_module_moves(way: str, dtype: torch.dtype) -> None:
    """It moves by less than half an ulp at each step: in bf16 it would stay at 0.09."""
    module, wide = WAYS[way](dtype), DecoupledELBO(momentum=0.01)
    x, z = torch.rand(4, 37), torch.zeros(4, 6)
    for error in (0.30, *[0.31] * 20):
        for each in (module, wide):
            each(x + error, x, z, z)
    assert abs(wide.running_var.item() - 0.09) > 1e-3
    assert torch.equal(module.running_var, wide.running_var)
    assert torch.equal(module.batches_seen, torch.tensor(21))
    assert torch.equal(module.eval()(x, x, z, z).loss, wide.eval()(x, x, z, z).loss)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_it_is_not_rounded_by_the_way_to_half_precision(dtype: torch.dtype) -> None:
    module = DecoupledELBO(momentum=0.1)
    module(*Call().tensors)
    before = module.running_var.clone()
    assert torch.equal(module.to(dtype).running_var, before)
    assert module.state_dict()["running_var"].dtype == torch.float32


@pytest.mark.parametrize("error", [1000.0, 1e-4])
def test_it_goes_where_half_precision_ends(error: float) -> None:
    """σ² = 10⁶ is infinite in fp16, and 10⁻⁸ is 0."""
    module = DecoupledELBO(momentum=0.1, min_log_sigma=-12.0).half()
    x, z = torch.zeros(4, 37), torch.zeros(4, 6)
    module(x + error, x, z, z)
    assert module.batches_seen == 1
    nats = module.eval()(x + error, x, z, z).distortion.item()
    assert nats == pytest.approx(37 * (0.5 + 0.5 * math.log(2 * math.pi * error**2)), rel=1e-5)


def test_what_a_subclass_has_besides_follows_the_module() -> None:
    class Scheduled(DecoupledELBO):
        def __init__(self) -> None:
            super().__init__(momentum=0.1)
            self.register_buffer("weights", torch.ones(3))
            self.register_buffer("steps", torch.zeros((), dtype=torch.int32))

    module = Scheduled().half()
    module(*Call().tensors)
    dtypes = {name: t.dtype for name, t in module.named_buffers()}
    assert (dtypes["weights"], dtypes["steps"]) == (torch.float16, torch.int32)
    assert (dtypes["running_var"], dtypes["batches_seen"]) == (torch.float32, torch.long)


def test_a_double_module_keeps_it_in_double() -> None:
    module = DecoupledELBO(momentum=0.1).double()
    call = Call(dtype=torch.float64)
    recon, target, *_ = call.tensors
    module(*call.tensors)
    expected = (recon - target).detach().square().mean()
    torch.testing.assert_close(module.running_var, expected, rtol=1e-14, atol=0)
    assert DecoupledELBO(momentum=0.1, dtype=torch.float64).running_var.dtype == torch.float64
    assert module.float().running_var.dtype == torch.float32


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("channels", [None, 1, 3])
def test_a_learned_sigma_of_half_precision(channels: int | None, dtype: torch.dtype) -> None:
    """It is a weight: rounded as one, with a gradient of its dtype, beside data of any."""
    module, wide = LearnedSigmaELBO(channels, init=-0.7).to(dtype), LearnedSigmaELBO(channels)
    wide.load_state_dict(module.state_dict())
    assert module.log_sigma.dtype == dtype
    for data in (torch.float32, dtype):
        module.zero_grad()
        wide.zero_grad()
        tensors = [t.detach().to(data) for t in Call().tensors]
        got, expected = module(*tensors), wide(*tensors)
        torch.testing.assert_close(got.loss, expected.loss)
        got.loss.backward()
        expected.loss.backward()
        assert module.log_sigma.grad is not None
        assert wide.log_sigma.grad is not None
        torch.testing.assert_close(module.log_sigma.grad, wide.log_sigma.grad.to(dtype))


# ------------------------------------------------------------------------------------------------------ initialisation


def model() -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "running": DecoupledELBO(momentum=0.1),
            "plain": DecoupledELBO(),
            "learned": LearnedSigmaELBO(init=0.5),
            "channels": LearnedSigmaELBO(channels=3, init=-1.0),
        }
    )


def test_state_after_the_meta_device() -> None:
    """Like torch's modules, it is built without memory, given some, and set by reset_parameters."""
    with torch.device("meta"):
        made = model()
    assert all(t.is_meta for t in made.state_dict().values())
    made.to_empty(device="cpu")
    for value in made.state_dict().values():
        value.fill_(7)  # what memory may hold
    for module in made.children():
        module.reset_parameters()  # type: ignore[operator]
    for (name, got), (_, expected) in zip(made.state_dict().items(), model().state_dict().items(), strict=True):
        assert torch.equal(got, expected), name
        assert got.dtype == expected.dtype, name


def test_a_checkpoint_fills_what_the_meta_device_left_empty() -> None:
    with torch.device("meta"):
        made = model()
    made.load_state_dict(model().state_dict(), assign=True)
    assert made["learned"](*Call().tensors).sigma.item() == pytest.approx(math.exp(0.5))
    made["running"](*Call().tensors)
    assert made["running"].batches_seen == 1


def test_reset_running_stats() -> None:
    module = DecoupledELBO(momentum=0.1)
    first, second = Call(seed=1), Call(seed=2)
    module(*first.tensors)
    module.reset_running_stats()
    assert (module.running_var, module.batches_seen) == (1, 0)
    module(*second.tensors)
    again = DecoupledELBO(momentum=0.1)
    again(*second.tensors)
    assert torch.equal(module.running_var, again.running_var)


def test_device_and_dtype_of_the_constructors() -> None:
    """What is created says where it is; a half-precision dtype is that of weights alone."""
    running = DecoupledELBO(momentum=0.1, device="meta", dtype=torch.bfloat16)
    assert {name: (t.device.type, t.dtype) for name, t in running.named_buffers()} == {
        "running_var": ("meta", torch.float32),
        "batches_seen": ("meta", torch.long),
    }
    learned = LearnedSigmaELBO(channels=2, device="meta", dtype=torch.bfloat16).log_sigma
    assert (learned.device.type, learned.dtype) == ("meta", torch.bfloat16)
    with default_dtype(torch.bfloat16):
        assert LearnedSigmaELBO().log_sigma.dtype == torch.bfloat16  # as any weight
    for build in (lambda: DecoupledELBO(dtype=torch.long), lambda: LearnedSigmaELBO(dtype=torch.long)):
        with pytest.raises(TypeError, match=r"dtype: expected float32.*got torch.int64"):
            build()


# ------------------------------------------------------------------------------------------------------------ channels


# The batch, the frames and the pixels of a row are as many as the channels, in turn and together.
SHAPES = [
    *((4, 3), (3, 3), (1, 3)),
    *((2, 3, 40), (3, 3, 40), (3, 3, 3), (1, 3, 5)),
    *((4, 3, 8, 8), (3, 3, 8, 8), (4, 3, 3, 3)),
    *((5, 3, 2, 4, 4), (5, 3, 3, 4, 4), (3, 3, 3, 3, 3)),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_channels_are_dimension_1(shape: tuple[int, ...]) -> None:
    module, z = LearnedSigmaELBO(channels=3), torch.zeros(shape[0], 2)
    with torch.no_grad():
        module.log_sigma.copy_(torch.tensor([-1.0, 0.0, 1.0]).view(3, 1, 1))
    recon, target = torch.rand(shape), torch.rand(shape)
    elbo = module(recon, target, z, z)
    elbo.loss.backward()
    assert elbo.sigma is None

    ls = module.log_sigma.detach().double().view(1, 3, *[1] * (len(shape) - 2)).requires_grad_()
    scaled = (recon.double() - target.double()) / ls.exp()
    expected = (0.5 * scaled.square() + ls + 0.5 * math.log(2 * math.pi)).sum() / shape[0]
    expected.backward()
    torch.testing.assert_close(elbo.distortion.double(), expected, rtol=1e-5, atol=1e-5)
    assert ls.grad is not None
    torch.testing.assert_close(module.log_sigma.grad, ls.grad.view(3, 1, 1).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(4,), (3,), (1, 40), (4, 8), (4, 3, 8, 8), (1, 3, 2, 4, 4)], ids=str)
def test_one_channel_is_one_sigma_for_any_shape(shape: tuple[int, ...]) -> None:
    """A parameter that is no scalar, as FSDP2 wants, for all data; what it reports is the shared σ's."""
    one, shared, z = LearnedSigmaELBO(channels=1, init=-0.5), LearnedSigmaELBO(init=-0.5), torch.zeros(shape[0], 2)
    assert one.log_sigma.dim() > 0
    recon, target = torch.rand(shape), torch.rand(shape)
    for a, b in zip(one(recon, target, z, z), shared(recon, target, z, z), strict=True):
        torch.testing.assert_close(a, b)
        assert a.shape == ()
    for module in (one, shared):
        module(recon, target, z, z).loss.backward()
    assert one.log_sigma.grad is not None
    torch.testing.assert_close(one.log_sigma.grad.view(()), shared.log_sigma.grad)


@pytest.mark.parametrize("shape", [(3,), (3, 4), (3, 1, 3), (4, 8, 8, 3)], ids=str)
def test_other_numbers_of_channels_are_refused(shape: tuple[int, ...]) -> None:
    z = torch.zeros(shape[0], 2)
    with pytest.raises(ValueError, match=rf"channels: 3 of them.*dimension 1 of recon, got shape \({shape[0]},"):
        LearnedSigmaELBO(channels=3)(torch.zeros(shape), torch.zeros(shape), z, z)
    with pytest.raises(TypeError, match="recon: expected a tensor, got list"):
        LearnedSigmaELBO(channels=3)([1.0], torch.zeros(shape), z, z)  # type: ignore[arg-type]


def test_channels_may_be_a_numpy_integer() -> None:
    module = LearnedSigmaELBO(channels=np.int64(3))  # type: ignore[arg-type]
    assert module.log_sigma.shape == (3, 1, 1)


# ---------------------------------------------------------------------------------------------------------- attributes


@pytest.mark.parametrize("build", [DecoupledELBO, LearnedSigmaELBO])
def test_a_beta_that_is_a_parameter_can_be_set(build: Callable[..., DecoupledELBO | LearnedSigmaELBO]) -> None:
    module, call = build(beta=nn.Parameter(torch.tensor(2.0))), Call()
    assert "beta" in dict(module.named_parameters())
    for value in (3.0, torch.tensor(4.0), nn.Parameter(torch.tensor(5.0)), 6.0):
        module.beta = value
        assert ("beta" in dict(module.named_parameters())) == isinstance(value, nn.Parameter)
        elbo = module(*call.tensors)
        torch.testing.assert_close(elbo.loss, elbo.distortion + value * elbo.rate)


def test_capacity_follows_a_schedule_too() -> None:
    module, call = DecoupledELBO(capacity=1.0), Call()
    for value in (2.0, torch.tensor(3.0), 4.0, None):
        module.capacity = value
        torch.testing.assert_close(module(*call.tensors).loss, decoupled_elbo(*call.tensors, capacity=value).loss)
