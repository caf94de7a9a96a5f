"""What the CUDA kernels must satisfy, for a library that tests/cuda_shim compiled: run by test_cuda_shim.py.

    PYTHONPATH=tests python tests/csrc/cuda_check.py LIBRARY [SCHEDULE ...]

answers each line [mutant, first] of JSON with a line [fault, end]: what the cases notice of that mutant (0: of the
library as it is) under every schedule (default: all), and how the process that ran them ended if it told nothing; or
null. `first`, a schedule and a case, or null, is tried first. The cases of kernel_check.py are for stages, the ones
here for the step and the aggregate posterior.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from cases import Call
from cuda_shim import Shim
from kernel_check import Case, arguments, cases, compare, double, guarded

from fused_elbo import reference
from fused_elbo.call import Gradients, GradLogSums, GradOutputs, LogSums, Mixture, Tensors, compute_dtype
from fused_elbo.operators import aggregate, elbo, levels

SCHEDULES = ("ascending", "descending", "random:1", "random:2")
GRAD_SCALE = 3.0
LONGEST = 600  # seconds of CPU for a mutant: one that loops for ever is ended
TOLD = "told: "


class StepCase:
    """A call of `step` on tensors inside NaN, contiguous or with samples `apart`; what the reference makes of it."""

    def __init__(self, call: Call, launches: int, without: str = "", apart: bool = False) -> None:
        tensors, self.options = arguments(call)
        self.tensors = Tensors._make(None if t is None else guarded(t.contiguous(), apart) for t in tensors)
        self.launches, wide = launches, double(self.tensors)
        *self.outputs, stats = reference.forward(wide, self.options)
        scale = torch.tensor(GRAD_SCALE, dtype=torch.float64)
        self.gradients = reference.gradients(wide, self.options, stats, GradOutputs(scale))
        names = Gradients._fields
        self.wanted = [i for i, g in enumerate(self.gradients) if g is not None and names[i] not in without.split()]

    def check(self, operators: Any) -> None:
        """Raises AssertionError at the first fault."""
        for scale, number in ((torch.tensor(GRAD_SCALE), 0.0), (None, GRAD_SCALE)):
            before = operators.shim.launches()
            mask = sum(1 << i for i in self.wanted)
            got = operators.step(self.tensors, self.options, scale, number, mask)
            assert operators.shim.launches() - before == self.launches, "launches"
            for name, value, true in zip(("loss", "distortion", "rate", "sigma"), got, self.outputs, strict=False):
                compare(name, value, true)
            for i, (name, value) in enumerate(zip(self.gradients._fields, got[4:], strict=True)):
                if i in self.wanted:
                    compare(f"gradient of {name}", value, self.gradients[i])
                else:
                    assert value.shape == (0,), f"{name} was not asked for"


class AggregateCase:
    """Inputs inside NaN, with what the reference makes of them in fp64; every gradient alone, and all of them."""

    def __init__(
        self, sizes: tuple[int, int, int], dtype: torch.dtype, own: int = -1, size: int | None = None, spread: float = 1
    ) -> None:
        batch, components, latents = sizes
        mu, logvar = spread * torch.randn(components, latents), torch.randn(components, latents) - 1
        z = mu[torch.arange(batch) % components] + torch.randn(batch, latents)
        turned = z.t().contiguous().t()
        inputs = [guarded(t.to(dtype)) for t in (turned, mu, logvar)]
        self.mixture, self.wide = (Mixture(*t, own, size) for t in (inputs, [t.double() for t in inputs]))
        self.sums = reference.aggregate.aggregate(self.wide)
        self.grads = [guarded(torch.randn_like(t).to(compute_dtype(*inputs))) for t in self.sums]

    def check(self, operators: Any) -> None:
        """Raises AssertionError at the first fault."""
        launches = operators.shim.launches
        before = launches()
        sums = operators.aggregate(self.mixture)
        assert launches() - before == 2, "launches"
        for name, value, true in zip(("joint", "marginals"), sums, self.sums, strict=True):
            compare(name, value, true)
        given = LogSums(*[guarded(t, apart=False) for t in sums])
        g, h = self.grads
        for grads, mask in (((g, h), 7), ((g, None), 7), ((None, h), 7), ((g, h), 1), ((g, h), 4)):
            before = launches()
            got = operators.aggregate_grads(self.mixture, given, GradLogSums(*grads), mask)
            assert launches() - before == (3 if mask == 7 else 2), "launches"
            exact = GradLogSums(*[None if t is None else t.double() for t in grads])
            true = reference.aggregate.aggregate_grads(self.wide, self.sums, exact, mask)
            for name, value, wanted in zip(("z", "mu", "logvar"), got, true, strict=True):
                if wanted is None:
                    assert value.shape == (0,), f"{name} was not asked for"
                else:
                    compare(f"gradient of {name}", value, wanted)


def aggregate_cases() -> dict[str, AggregateCase]:
    """Sizes that no tile divides, with warps that share the latents and without, and more latents than a block has
    room for."""
    f32, f64 = torch.float32, torch.float64
    return {
        "aggregate": AggregateCase((35, 43, 3), f64),
        "aggregate, own": AggregateCase((37, 70, 10), f32, own=2, size=200),
        "aggregate, own, fp64": AggregateCase((33, 34, 8), f64, own=0, size=60),
        "aggregate, far apart": AggregateCase((5, 100, 2), f32, spread=40),
        "aggregate, fp16": AggregateCase((3, 17, 21), torch.float16, own=0, size=50),
        "aggregate, many latents": AggregateCase((3, 20, 700), f32),
        "aggregate, one": AggregateCase((1, 1, 1), f32, own=0, size=9),
        "aggregate, many segments": AggregateCase((2, 3000, 1), f64),
    }


def step_cases() -> dict[str, Callable[[], StepCase]]:
    """On three multiprocessors, two of which have data: 57344 differences in registers, 172032 with shared memory. No
    number of elements is a multiple of a warp's row. With how many launches; two passes take three."""
    modes = {
        "optimal": 1, "floor": 1, "softclip": 1, "beta-sample": 1, "beta-tensor": 1, "free-bits": 1,
        "capacity-above": 1, "prior-shared": 1, "constant": 2, "learned": 3, "learned-image": 3, "per-image": 2,
        "per-image-floor": 2, "per-image-softclip": 2, "learned-channel": 3,
        "laplace": 1, "laplace-image": 3, "laplace-learned": 3, "extra": 1, "extra-shared": 3, "mask": 3,
        "mask-image": 3, "weight-channel": 3, "tanh": 2, "tanh-mask": 3, "bytes": 1, "bytes-sigmoid": 1,
        "logvar-range": 1, "free-nats": 3, "free-nats-batch": 1, "capacity-sample": 3,
    }  # fmt: skip
    small: dict[str, Any] = {"batch": 3, "data": (3, 4, 8)}
    calls = {mode: (Call(mode, **small), launches) for mode, launches in modes.items()}
    large, too_large, half = (3, 112, 113), (3, 144, 143), {"dtype": torch.float16}
    calls |= {
        "mean": (Call(reduction="mean", **small), 1),
        "in shared memory": (Call(batch=3, data=large), 1),
        "in shared memory, fp16": (Call(batch=3, data=large, **half), 1),
        "two dtypes": (Call(**small, **half, target_dtype=torch.float32), 1),
        "latents like data": (Call(batch=3, data=(80,), latent=(80,)), 1),
        "latents in words, fp16": (Call(latent=(6,), **small, **half), 1),
        "latents in 64 bits, fp16": (Call(latent=(12,), **small, **half), 1),
        "latents in 128 bits, fp16": (Call(batch=3, data=(3, 8, 24), latent=(264,), **half), 1),
        "latents of two dtypes": (Call("prior", latent=(12,), **small, **half), 1),
        "no whole number of vectors": (Call(batch=3, data=(75,)), 3),
        "too large": (Call(batch=3, data=too_large), 3),
        "fp64": (Call(**small, dtype=torch.float64), 3),
        "per image, of 75 kB": (Call("per-image", batch=2, data=(75, 250), **half), 2),
        "per image, too large": (Call("per-image", batch=2, data=too_large), 3),
        "per image, two dtypes": (Call("per-image", **small, **half, target_dtype=torch.float32), 2),
        "per image, several for a block": (Call("per-image", batch=9, data=(1027,)), 2),
        "per image, too few": (Call("per-image", batch=1, data=(75,)), 3),
        "given, several chunks": (Call("learned-image", batch=3, data=(9001,), latent=(4100,)), 3),
        "given, mean": (Call("beta-sample", "mean", **small), 1),
        "sigmoid, of the target too": (Call("sigmoid", **small), 3),
        "weights, mean": (Call("weight-channel", "mean", **small), 3),
        "bytes, in many rows, fp16": (Call("bytes", batch=3, data=(3, 64, 65), **half), 1),
        "bytes, in no whole number of vectors": (Call("bytes-sigmoid", batch=3, data=(75,)), 3),
        "tanh, two dtypes": (Call("tanh", batch=3, data=(9001,), **half, target_dtype=torch.float32), 2),
        "laplace, several for a block": (Call("laplace-image", batch=9, data=(1027,), **half), 3),
    }
    cases: dict[str, Callable[[], StepCase]] = {
        f"step, {name}": lambda call=call, launches=launches: StepCase(call, launches)
        for name, (call, launches) in calls.items()
    }
    behind_sigmoid = Call("sigmoid", **small)
    cases["step, sigmoid"] = lambda: StepCase(behind_sigmoid, 1, without="target")
    call = Call(**small)
    cases["step, of the target"] = lambda: StepCase(call, 1, without="recon mu")
    cases["step, samples apart"] = lambda: StepCase(call, 3, apart=True)
    cases["step, of the latents"] = lambda: StepCase(call, 3, without="recon target")
    return cases


def one_for_all(call: Call) -> Call:
    """With the latents of one sample, whose gradients then lie at other addresses than they do."""
    call.tensors[2:] = [t.detach()[:1].expand(t.shape) for t in call.tensors[2:]]
    return call


def partly_without_error(call: Call) -> Call:
    with torch.no_grad():
        call.tensors[0].view(-1)[::3] = call.tensors[1].view(-1)[::3]
    return call


class OrderCase:
    """The second pass over the data begins where the first one has ended, which L2 still holds, and goes backwards:
    what a warp has for several chunks, here of one sample and of another."""

    def __init__(self, call: Call) -> None:
        self.tensors, self.options = arguments(call)

    def check(self, operators: Any) -> None:
        recon = self.tensors.recon
        assert recon is not None
        with operators.shim.watching(recon) as first:
            *_, stats = operators.forward(self.tensors, self.options)
        with operators.shim.watching(recon) as second:
            operators.grads(self.tensors, self.options, stats, GradOutputs(torch.ones(())), 1)
        sample = recon.stride(0) * recon.element_size()
        assert len({at // sample for at in first}) == 2, "the first thread has no part of both samples"
        assert first == sorted(set(first)), "the first pass goes back"
        assert second == sorted(set(second), reverse=True), "the second pass goes forward"
        assert len(second) == len(first), "the passes have different parts"


def of_channels(call: Call, **kw: Any) -> Call:
    """With a σ for each channel of each sample."""
    shape = call.tensors[0].shape
    call.kw |= {"log_sigma": torch.linspace(-1, 0.5, shape[0] * shape[1]).reshape(*shape[:2], 1, 1), **kw}
    return call


def nan_behind_the_mask(call: Call) -> Call:
    with torch.no_grad():
        call.tensors[0][~call.kw["weight"]] = float("nan")
    return call


def stage_cases() -> dict[str, Case]:
    """Beside those of kernel_check.py."""
    small: dict[str, Any] = {"batch": 3, "data": (3, 5, 5)}
    modes = {
        "laplace": "none", "laplace-pixel": "none", "extra": "none", "extra-shared": "batchmean", "weight": "mean",
        "weight-pixel": "none", "weight-channel": "batchmean", "tanh-mask": "none", "sigmoid-pixel": "batchmean",
        "bytes-pixel": "batchmean", "bytes-sigmoid": "none", "logvar-range": "none", "logvar-range-prior": "batchmean",
        "free-nats": "none", "free-nats-batch": "batchmean", "free-nats-below": "sum", "capacity-sample": "none",
    }  # fmt: skip
    calls = {
        **{f"{mode}, {reduction}": Call(mode, reduction, **small) for mode, reduction in modes.items()},
        "laplace, partly without error": partly_without_error(Call("laplace-image", **small, dtype=torch.float64)),
        "NaN behind the mask": nan_behind_the_mask(Call("tanh-mask", "none", **small)),
        "bytes and weights, fp16": Call("bytes-pixel", batch=3, data=(3, 8, 8), dtype=torch.float16),
        "latents of one sample for all": one_for_all(Call(batch=3, latent=(12,), dtype=torch.float16)),
        "more samples than finalize has threads": Call(
            "softclip", "none", batch=1100, data=(2,), latent=(1,), dtype=torch.float64
        ),
        "segments": of_channels(Call(batch=2, data=(3, 40, 40))),
        "segments, laplace": of_channels(Call("weight-pixel", batch=2, data=(3, 40, 40)), likelihood="laplace"),
        "a log σ of another dtype": Call("learned-pixel", batch=3, data=(3, 5, 5), dtype=torch.float16),
    }
    return {name: Case(arguments(call)) for name, call in calls.items()}


class Every:
    """All cases under some schedules. A case draws the same schedule whatever ran before it."""

    def __init__(self, shim: Shim, stages: dict[str, Case], schedules: Sequence[str] = SCHEDULES) -> None:
        self.shim, self.schedules = shim, schedules
        by = elbo.Operators("fused_elbo_cuda")
        of = levels.Operators("fused_elbo_cuda")
        mixtures = aggregate.Operators("fused_elbo_cuda")
        self.operators = SimpleNamespace(
            forward=by.forward,
            grads=by.grads,
            step=by.step,
            aggregate=mixtures.aggregate,
            aggregate_grads=mixtures.aggregate_grads,
            **vars(of),
            shim=shim,
        )
        steps = {name: make() for name, make in step_cases().items()} | aggregate_cases()
        orders = {
            "order": OrderCase(Call(batch=2, data=(3, 64, 64))),
            "order, laplace": OrderCase(Call("laplace", batch=2, data=(3, 64, 64))),
        }
        self.cases: dict[str, tuple[int, Any]] = {
            **{name: (1, case) for name, case in stages.items()},
            **{name: (3, case) for name, case in steps.items()},
            **{name: (1, case) for name, case in orders.items()},
        }
        assert len(self.cases) == len(stages) + len(steps) + len(orders), "two cases have one name"

    def fault_of(self, mutant: int, order: list[tuple[str, str]]) -> str | None:
        """What is said by the first case that notices something; `order`: schedules and cases."""
        self.shim.mutant(mutant)
        for schedule, name in order:
            multiprocessors, case = self.cases[name]
            self.shim.schedule(schedule)
            self.shim.multiprocessors(multiprocessors)
            try:
                case.check(self.operators)
            except Exception as error:
                return f"{schedule}, {name}: {type(error).__name__}: {error}"
        return None

    def order(self, first: tuple[str, str] | None) -> list[tuple[str, str]]:
        every = [(schedule, name) for schedule in self.schedules for name in self.cases]
        assert first is None or first in every, f"there is no case {first}"
        return sorted(every, key=lambda case: case != first)


def in_a_child(function: Callable[[], str | None]) -> tuple[str | None, str | None]:
    """What it returns in a forked process; or, where that has ended before, how, and what it wrote to stderr."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(write, 2)
        resource.setrlimit(resource.RLIMIT_CPU, (LONGEST, LONGEST))
        try:
            os.write(write, (TOLD + json.dumps(function())).encode())
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    os.close(write)
    with os.fdopen(read, errors="replace") as pipe:
        said, _, told = pipe.read().partition(TOLD)
    _, status = os.waitpid(child, 0)
    if told:  # what was written out of bounds might have ended it later
        return json.loads(told), None
    return None, f"the process ended with {os.waitstatus_to_exitcode(status)}: {said}"


def main() -> None:
    torch.set_num_threads(1)  # a forked process has none of the threads
    shim = Shim(Path(sys.argv[1]))
    with cases() as stages:
        every = Every(shim, stages | stage_cases(), sys.argv[2:] or SCHEDULES)
        every.fault_of(0, every.order(None)[:1])  # loads what PyTorch loads at first use, once for all forked processes
        for line in sys.stdin:
            mutant, first = json.loads(line)
            order = every.order(tuple(first) if first else None)
            print(json.dumps(in_a_child(partial(every.fault_of, mutant, order))), flush=True)


if __name__ == "__main__":
    main()
