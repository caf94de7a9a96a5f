"""What kernels must satisfy, whichever copy of them it is: test_mutants.py has those of Triton, in its interpreter, and
cuda_check.py those of CUDA.

The interpreter does not see an access out of bounds by itself. So every input lies inside NaN, with NaN between its
samples, and every tensor that the kernels allocate lies inside a sentinel: what is read outside shows in the values,
what is written outside in the sentinel, and what is not written at all is NaN.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any, Protocol
from unittest import mock

import torch
from cases import Call
from hierarchies import Hierarchy
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fused_elbo import autograd, decoupled_elbo, gaussian_kl, reference
from fused_elbo.call import LATENTS, NONE, GradOutputs, Options, Outputs, Tensors, compute_dtype, mask_of
from fused_elbo.dispatch import OneByOne
from fused_elbo.operators.elbo import Implementation

GUARD = 1 << 12  # elements on each side: a tile
GAP = 16  # elements between two samples: 16 divides it, so the loads stay as wide as without it
SENTINEL = 12345.0
TOLERANCE = {torch.float64: 1e-11, torch.float32: 5e-6, torch.float16: 2e-3}
IN_SMALL_TILES = ("softclip, none", "free-bits, none", "weight, none", "levels, free bits")

Arguments = tuple[Tensors, Options]  # of a call of the operators


def extent(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Elements from the first to the last."""
    return 0 if 0 in shape else 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))


def guarded(t: Tensor, apart: bool = True) -> Tensor:
    """A copy with the same strides inside NaN; `apart`: dense samples GAP elements apart, with NaN there too."""
    shape, strides = t.shape, list(t.stride())
    if apart and t.dim() and strides[0] == t.numel() // t.shape[0]:
        strides[0] += GAP
    outside = float("nan") if t.is_floating_point() else 255 if t.dtype == torch.uint8 else True
    memory = torch.full((extent(t.shape, strides) + 2 * GUARD,), outside, dtype=t.dtype)
    for dim, stride in enumerate(t.stride()):
        t = t.narrow(dim, 0, 1) if stride == 0 else t  # copy_ refuses an expanded tensor
    return memory.as_strided(t.shape, strides, GUARD).copy_(t).expand(shape)


class GuardedAllocations(TorchDispatchMode):
    """While it is active, what torch.empty and its kin return is NaN, between sentinels."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[Tensor, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        allocates = func.__name__.removeprefix("new_").startswith("empty")
        if not allocates or made.is_meta or not made.is_floating_point():  # bytes are the interpreter's own
            return made
        end = GUARD + extent(made.shape, made.stride())
        memory = torch.full((end + GUARD,), SENTINEL, dtype=made.dtype)
        memory[GUARD:end] = float("nan")
        self.made.append((memory, end))
        return memory.as_strided(made.shape, made.stride(), GUARD)

    def verify(self) -> None:
        for memory, end in self.made:
            assert (memory[:GUARD] == SENTINEL).all(), "written before the start of an output"
            assert (memory[end:] == SENTINEL).all(), "written past the end of an output"


def arguments(call: Call) -> Arguments:
    """The call of the operators that `decoupled_elbo` makes, guarded."""
    with mock.patch.object(autograd, "elbo", return_value=(None,) * 5) as operator:
        call(decoupled_elbo)
    tensors, options = operator.call_args.args
    return Tensors._make(None if t is None else guarded(t.detach()) for t in tensors), options


def with_nan(call: Call, *which: int) -> Call:
    with torch.no_grad():
        for i in which:
            call.tensors[i].view(-1)[7] = float("nan")
    return call


def with_nan_under_the_mask(call: Call) -> Call:
    hidden = ~call.kw["weight"].expand(call.tensors[0].shape)
    with torch.no_grad():
        for t in call.tensors[:2]:
            t[hidden] = float("nan")
    return call


def without_error(call: Call) -> Call:
    call.tensors[0] = call.tensors[1].detach().clone().requires_grad_()
    return call


def beyond_exp(call: Call) -> Call:
    """With variances that are 0 and infinite in the compute type, and logarithms at which exp's reduced argument has
    lost all its digits."""
    with torch.no_grad():
        call.tensors[3][:, 0] = torch.tensor([float("-inf"), -1e10, 1e10])
    return call


def in_two_orders(call: Call) -> Call:
    recon = call.tensors[0].detach().contiguous(memory_format=torch.channels_last)
    call.tensors[0] = recon.requires_grad_()
    return call


def just_below(call: Call) -> Call:
    """With a capacity that most of the latents together do not reach."""
    call.kw["capacity"] = 0.9 * gaussian_kl(*call.tensors[2:4]).item()
    return call


def calls() -> dict[str, Call]:
    """Few, but each line of the kernels decides a value in one of them. Batches of 3 leave a row of a tile empty."""
    small: dict[str, Any] = {"batch": 3, "data": (3, 5, 5), "dtype": torch.float64}
    per_sample = (
        "softclip", "free-bits", "per-image-softclip", "learned", "learned-image", "beta-sample", "optimal",
        "mask-image", "weight", "free-nats",
    )  # fmt: skip
    reduced = (
        "learned-pixel", "prior-shared", "softclip", "floor", "capacity-above", "capacity", "learned-channel",
        "learned-rows", "learned-channel-image", "beta-tensor", "laplace", "extra-shared", "weight-pixel", "tanh-mask",
        "bytes-pixel", "logvar-range-prior", "free-nats-batch",
    )  # fmt: skip
    return {
        **{f"{mode}, none": Call(mode, "none", **small) for mode in per_sample},
        **{mode: Call(mode, **small) for mode in reduced},
        "mean": Call("optimal", "mean", **small),
        "mean of weights": Call("weight", "mean", **small),
        "two orders": in_two_orders(Call("optimal", **small)),
        "fp32": Call("learned-pixel", **small | {"dtype": torch.float32}),
        # What has a kernel of the whole step, in programs that do not wait, or one that waits for itself.
        "step, per image": Call("per-image", batch=5, data=(3, 39, 39), latent=(4099,)),
        "step, one sigma": Call("learned-image", batch=3, data=(5003,), latent=(21,)),
        "step, one beta": Call("capacity-above", batch=3),
        "step, one log sigma": Call("learned", batch=3),
        "step, waits": just_below(Call("capacity", batch=2, data=(1501,), latent=(3000,))),
        "step, extra error": Call("extra-shared", batch=3),
        "step, weights": Call("weight", "mean", batch=3, data=(1501,)),
        "bytes-sigmoid": Call("bytes-sigmoid", batch=3),
        "laplace-image": Call("laplace-image", batch=3),
        "wide rows": Call("prior", batch=3, data=(64,), latent=(32,)),
        "two tiles": Call("free-bits", batch=2, data=(5000,), latent=(4100,), dtype=torch.float64),
        "64 elements of a log sigma": Call("learned-channel", batch=2, data=(3, 40, 40), dtype=torch.float64),
        "no error": without_error(Call("optimal", "none", **small)),
        "variances of 0 and infinity": beyond_exp(Call("optimal", "none", batch=3)),
        "NaN in the latents": with_nan(Call("free-bits", **small), 2),
        "NaN in the data": with_nan(Call("softclip", **small), 0),
        "NaN in the data, laplace": with_nan(Call("laplace-learned", **small), 0),
        "NaN in logvar, clamped": with_nan(Call("logvar-range", **small), 3),
        "NaN under a mask": with_nan_under_the_mask(Call("mask", **small)),
        "no error, laplace": without_error(Call("laplace", "none", **small)),
    }


@contextmanager
def far_apart(step: int) -> Iterator[Arguments]:
    """Samples 2³⁰ elements apart: the third lies at 2³¹, which 32 bits hold as −2³¹. Or 2³¹ apart, which 32 bits hold
    in units of 8 elements only. Where the third one would be if they were enough there is a sample, too: the wrong one.
    Nearly all of the 8 or 16 GB are a hole in a sparse file, and the rest is never touched."""
    latents = 8
    with tempfile.NamedTemporaryFile() as file:
        memory = torch.from_file(file.name, shared=True, size=2 * step * 2 + latents, dtype=torch.float16)
        mu = memory.as_strided((3, latents), (step, 1), 2 * step).copy_(torch.randn(3, latents))
        memory[:latents] = 3.0
        yield Tensors(mu=mu, logvar=guarded(torch.randn(3, latents).half())), Options(reduction=NONE)


def double(tensors: Tensors) -> Tensors:
    return Tensors._make(t.double() if t is not None and t.is_floating_point() else t for t in tensors)


def compare(stage: str, got: Tensor, true: Tensor) -> None:
    tolerance = TOLERANCE[got.dtype]
    largest = true.abs().nan_to_num(posinf=0.0).max().item() if true.numel() else 0.0
    torch.testing.assert_close(
        got.double(), true, rtol=tolerance, atol=tolerance * largest, equal_nan=True, msg=lambda m: f"{stage}: {m}"
    )


class Case:
    """Guarded arguments with what the reference makes of them in fp64, for grad_outputs that differ by sample."""

    def __init__(self, args: Arguments) -> None:
        self.tensors, self.options = args
        wide, options = double(self.tensors), self.options
        self.outputs = reference.forward(wide, options)
        is_double = any(t is not None and t.dtype == torch.float64 for t in self.tensors)
        dtype = torch.float64 if is_double else torch.float32
        self.weights = GradOutputs._make(guarded(torch.randn_like(o, dtype=dtype)) for o in self.outputs[:3])
        weights = GradOutputs._make(w.double() for w in self.weights if w is not None)
        self.gradients = reference.gradients(wide, options, self.outputs.stats, weights)
        self.mask = mask_of(t is not None and t.is_floating_point() for t in self.tensors)
        scales = ((guarded(torch.tensor(-2.5), apart=False), 1.0), (None, -2.5))  # a tensor, and a number
        self.scales = scales if options.reduction != NONE else ()
        self.stepped = reference.step(wide, options, None, -2.5, self.mask) if self.scales else ()

    def check(self, operators: Implementation) -> None:
        """Raises AssertionError at the first fault."""
        with GuardedAllocations() as allocations:
            outputs = Outputs._make(operators.forward(self.tensors, self.options))
        allocations.verify()
        for name, value, true in zip(Outputs._fields, outputs, self.outputs, strict=True):
            compare(name, value, true)
        stats = guarded(outputs.stats, apart=False)
        with GuardedAllocations() as allocations:
            gradients = operators.grads(self.tensors, self.options, stats, self.weights, self.mask)
        allocations.verify()
        for name, value, true in zip(self.gradients._fields, gradients, self.gradients, strict=True):
            if true is not None:
                compare(f"gradient of {name}", value, true)
        for scale in self.scales:
            with GuardedAllocations() as allocations:
                stepped = operators.step(self.tensors, self.options, *scale, self.mask)
            allocations.verify()
            for i, (value, true) in enumerate(zip(stepped, self.stepped, strict=True)):
                if true.numel():  # what is not asked for has no dtype to compare
                    compare(f"output {i} of the step", value, true)


class LevelsCase:
    """Guarded latents of a hierarchy with what the reference makes of them in fp64, and weights for each level."""

    def __init__(self, tensors: Sequence[Tensor | None], free_bits: float) -> None:
        self.tensors, self.free_bits = [None if t is None else guarded(t) for t in tensors], free_bits
        wide, by = [None if t is None else t.double() for t in self.tensors], OneByOne(reference)
        self.rates = by.levels(wide, free_bits, True)
        self.weights = guarded(torch.randn_like(self.rates).to(compute_dtype(*tensors)))
        self.wanted = [i for i, t in enumerate(tensors) if t is not None]
        self.gradients = by.levels_grads(wide, free_bits, self.weights.double(), self.wanted)

    def check(self, operators: Any) -> None:
        by = of_levels(operators)
        for per_level, true in ((True, self.rates), (False, self.rates.sum(1)), (True, self.rates)):
            with GuardedAllocations() as allocations:
                rates = by.levels(self.tensors, self.free_bits, per_level)
            allocations.verify()
            compare(f"rates, per_level={per_level}", rates, true)
        with GuardedAllocations() as allocations:
            gradients = by.levels_grads(self.tensors, self.free_bits, self.weights, self.wanted)
        allocations.verify()
        for i, value, true in zip(self.wanted, gradients, self.gradients, strict=True):
            compare(f"gradient of {LATENTS[i % 4]} of level {i // 4}", value, true)


def of_levels(operators: Any) -> Any:
    """The operators of levels that belong to those of the loss."""
    if hasattr(operators, "levels"):
        return operators
    return importlib.import_module(f"{operators.__package__}.levels")


def levels_cases() -> dict[str, LevelsCase]:
    """The first level has no prior; in fp64, so that no sum of other numbers is near enough."""
    kind: dict[str, Any] = {"batch": 5, "shapes": ((4,), (8,), (3,), (40,), (12, 2, 2), (16,))}
    return {
        "levels": LevelsCase(Hierarchy(torch.float64, **kind).flat(), 0.0),
        "levels, free bits": LevelsCase(Hierarchy(torch.float64, **kind).flat(), 0.2),
        "more levels than a launch": LevelsCase(Hierarchy(torch.float64, batch=2, shapes=((8,),) * 35).flat(), 0.0),
        "more samples than a block": LevelsCase(Hierarchy(torch.float64, batch=300, shapes=((1,), (2,))).flat(), 0.0),
        "levels, fp32": LevelsCase(Hierarchy(torch.float32, batch=3, shapes=((8,), (4200,))).flat(), 0.1),
    }


@contextmanager
def small_tiles(operators: ModuleType) -> Iterator[None]:
    """Many tiles and many partial sums from few elements."""
    kernels = operators.__package__
    plan = importlib.import_module(f"{kernels}._plan")
    plan.forget()
    with (
        mock.patch(f"{kernels}._layout.TILE", 32),
        mock.patch(f"{kernels}._layout.MANY", 8),
        mock.patch(f"{kernels}.elbo_finalize.BLOCK", 1),
        mock.patch(f"{kernels}.elbo_grads.BLOCK", 1),
    ):
        yield
    plan.forget()


@contextmanager
def cases() -> Iterator[dict[str, Case | LevelsCase]]:
    torch.manual_seed(0)
    with far_apart(1 << 30) as far, far_apart(1 << 31) as farther:
        near = {name: Case(arguments(call)) for name, call in calls().items()}
        yield {**near, **levels_cases(), "far apart": Case(far), "farther apart": Case(farther)}


class Checked(Protocol):
    def check(self, operators: Any) -> None: ...


def fault_of(operators: Any, every: Mapping[str, Checked], first: str | None = None) -> str | None:
    """What is said by the first case that notices something: `first`, then the others."""
    assert first is None or first in every, f"there is no case {first!r}"
    for name in sorted(every, key=lambda name: name != first):
        try:
            with small_tiles(operators) if name in IN_SMALL_TILES else nullcontext():
                every[name].check(operators)
        except Exception as error:
            return f"{name}: {type(error).__name__}: {error}"
    return None
