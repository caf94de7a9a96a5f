"""What the CUDA kernels must satisfy, for a library that tests/cuda_shim compiled: run by test_cuda_shim.py.

    python tests/cuda_check.py LIBRARY

prints, as JSON, what the checks say of it under every schedule: null, or the fault. Those of kernel_check.py are for
stages, the ones here for the step.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from cases import Call
from cuda_shim import Shim
from kernel_check import Case, arguments, cases, compare, double, guarded
from torch import Tensor

from fused_elbo import reference

SCHEDULES = (("ascending", 0), ("descending", 0), ("random", 1), ("random", 2))
GRAD_SCALE = 3.0


class StepCase:
    """A call of `step` on contiguous tensors inside NaN, with what the reference makes of it in fp64."""

    def __init__(self, call: Call, one_pass: bool, without: str = "") -> None:
        args = tuple(guarded(a.contiguous(), apart=False) if isinstance(a, Tensor) else a for a in arguments(call))
        self.args, self.one_pass = args, one_pass
        *self.outputs, stats = reference.forward(*double(args))
        scale = torch.tensor(GRAD_SCALE, dtype=torch.float64)
        self.gradients = reference.grads(scale, None, None, *double(args)[:9], stats, *args[9:])
        names = reference.Gradients._fields
        self.wanted = [i for i, g in enumerate(self.gradients) if g is not None and names[i] not in without.split()]

    def check(self, operators: SimpleNamespace) -> None:
        """Raises AssertionError at the first fault."""
        for scale, number in ((torch.tensor(GRAD_SCALE), 0.0), (None, GRAD_SCALE)):
            before = operators.shim.cooperative_launches()
            mask = sum(1 << i for i in self.wanted)
            got = operators.step(*self.args[:9], scale, *self.args[9:], number, mask)
            assert operators.shim.cooperative_launches() - before == self.one_pass, "passes"
            for name, value, true in zip(("loss", "distortion", "rate", "sigma"), got, self.outputs, strict=False):
                compare(name, value, true)
            for i, (name, value) in enumerate(zip(self.gradients._fields, got[4:], strict=True)):
                if i in self.wanted:
                    compare(f"gradient of {name}", value, self.gradients[i])
                else:
                    assert value.shape == (0,), f"{name} was not asked for"


def step_cases() -> dict[str, Callable[[], StepCase]]:
    """On three multiprocessors, two of which have data: 65536 differences in registers, 180224 with shared memory. No
    number of elements is a multiple of a warp's row."""
    modes = (
        "optimal",
        "floor",
        "softclip",
        "beta-sample",
        "beta-tensor",
        "free-bits",
        "capacity-above",
        "prior-shared",
    )
    cases: dict[str, Callable[[], StepCase]] = {
        f"step, {mode}": lambda mode=mode: StepCase(Call(mode, batch=3, data=(3, 5, 5)), True) for mode in modes
    }
    sizes: dict[str, tuple[dict[str, Any], bool]] = {
        "mean": ({"reduction": "mean", "batch": 3, "data": (75,)}, True),
        "in shared memory": ({"batch": 3, "data": (3, 113, 113)}, True),
        "in shared memory, fp16": ({"batch": 3, "data": (3, 113, 113), "dtype": torch.float16}, True),
        "of two dtypes": ({"data": (75,), "dtype": torch.float16, "target_dtype": torch.float32}, True),
        "too large": ({"batch": 3, "data": (3, 143, 143)}, False),
        "fp64": ({"batch": 3, "data": (75,), "dtype": torch.float64}, False),
        "latents like data": ({"batch": 3, "data": (75,), "latent": (75,)}, True),
    }
    for name, (options, one_pass) in sizes.items():
        cases[f"step, {name}"] = lambda options=options, one_pass=one_pass: StepCase(Call(**options), one_pass)
    for mode in ("per-image", "learned-image", "learned-channel"):
        cases[f"step, {mode}"] = lambda mode=mode: StepCase(Call(mode, batch=3, data=(3, 5, 5)), False)
    small = Call(batch=3, data=(75,))
    cases["step, of the target"] = lambda: StepCase(small, True, without="recon mu")
    cases["step, of the latents"] = lambda: StepCase(small, False, without="recon target")
    return cases


def many_samples() -> Case:
    """More than the block of finalize has threads."""
    return Case(arguments(Call("softclip", "none", batch=1100, data=(2,), latent=(1,), dtype=torch.float64)))


def fault_of(operators: SimpleNamespace, every: dict[str, Any]) -> str | None:
    for name, case in every.items():
        try:
            case.check(operators)
        except Exception as error:
            return f"{name}: {type(error).__name__}: {error}"
    return None


def main() -> None:
    shim = Shim(Path(sys.argv[1]))
    namespace = torch.ops.fused_elbo_cuda
    operators = SimpleNamespace(
        forward=namespace.forward.default, grads=namespace.grads.default, step=namespace.step.default, shim=shim
    )
    steps = {name: make() for name, make in step_cases().items()}
    with cases() as stages:
        stages["many samples"] = many_samples()
        for name, seed in SCHEDULES:
            shim.schedule(name, seed)
            for multiprocessors, every in ((1, stages), (3, steps)):
                shim.multiprocessors(multiprocessors)
                if fault := fault_of(operators, every):
                    print(json.dumps(f"{name} {seed}, {fault}"))
                    return
    print(json.dumps(None))


if __name__ == "__main__":
    main()
