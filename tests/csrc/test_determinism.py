"""The same bits: from run to run, for any number of threads, and on every instruction set."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cases import SOME, Call
from instruction_sets import of_each_instruction_set

from fused_elbo import decoupled_elbo, decoupled_elbo_backward


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def large(mode: str) -> list[torch.Tensor]:
    """Outputs and gradients of a batch that is cut into many tasks. In fp64: the partial sums are doubles, whose order
    a result rounded to fp32 would hide."""
    call = Call(mode, batch=5, data=(3, 75, 150), latent=(4, 80, 80), dtype=torch.float64)
    outputs = call(decoupled_elbo)
    at_once = call(decoupled_elbo_backward)
    gradients = [leaf.grad for leaf in call.leaves()]
    return [*[o for o in (*outputs, *at_once) if o is not None], *call.gradients(outputs), *gradients]


@pytest.mark.parametrize("mode", SOME)
def test_any_number_of_threads(mode: str, cpp: None, threads: None) -> None:
    torch.set_num_threads(1)
    expected = large(mode)
    for count in (1, 2, 3, 4, 7):
        torch.set_num_threads(count)
        for got, true in zip(large(mode), expected, strict=True):
            assert torch.equal(got, true)


@pytest.mark.release("the same bits on every instruction set, of libraries for one (make check: of a wheel's)")
def test_any_instruction_set(cpp: None, tmp_path: Path) -> None:
    """PyTorch's own switch chooses what the kernels are built for; -ffp-contract=off keeps their sums alike."""
    results = of_each_instruction_set(tmp_path)
    for capability, values in results.items():
        for got, true in zip(values, results["default"], strict=True):
            assert torch.equal(got, true), capability
