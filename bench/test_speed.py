"""The same cases and providers for pytest-benchmark, for those who keep runs and compare them:

    pytest bench --benchmark-group-by=param:case --benchmark-autosave
    pytest bench -k '128x3x64x64 and not compiled' --benchmark-compare

One benchmark is a step, forward and backward, checked against fp64 before. pytest-benchmark times providers one after
the other, not in turns as bench/run.py does, so ratios between them are worth less on a noisy machine.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

import measure
import providers
import torch
import workloads

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed: pip install 'fused-elbo[bench]'")

STEPS = [
    pytest.param(case, provider, id=f"{case.name}-{provider.name}")
    for device in (["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
    for case in workloads.registry(device).values()
    for provider in providers.chosen(None, case)
]


@pytest.mark.parametrize(("case", "provider"), STEPS)
def test_step(case: workloads.Case, provider: providers.Provider, benchmark: object) -> None:
    torch._dynamo.reset()  # else the cases before count towards the limit of recompilations
    with measure.threads(case.threads):
        step = providers.Step(provider, case, case.tensors())
        step()  # compiles
        providers.check(step, case)

        def timed() -> None:
            step()
            measure.synchronise(case)

        benchmark(timed)  # type: ignore[operator]
