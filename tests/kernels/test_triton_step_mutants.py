"""A test of the tests of Triton's step, as compiled code: kernels with one fault each, all of which must be noticed,
in order or with the threads interleaved at random. (test_mutants.py has those that show in the interpreter.)"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from cases import Call
from mutants import Mutant, copy

from fused_elbo import autograd, decoupled_elbo, reference
from fused_elbo.call import Tensors, mask_of

pytest.importorskip("triton", reason="Triton is not installed (it is for Linux)")

from test_triton_step import compiled, let_threads_agree, small_programs

from fused_elbo.kernels import elbo_step

pytestmark = pytest.mark.triton

GRID, STEP = "_grid.py", "elbo_step.py"
IN_ORDER = None  # or the seed by which the threads are interleaved
SCHEDULES = (IN_ORDER, 1, 2, 3)
MASK = "($R < $B)[:, None] & ($C < $N)"

BARRIER_MUTANTS = {
    "nobody_waits": Mutant(GRID, "grid_barrier", "$A == $B", "$A != $A", 1),
    "the_last_but_one_is_taken_for_the_last": Mutant(GRID, "arrive", "$A == $N - 1", "$A == $N - 2", 1),
    "the_count_is_not_reset": Mutant(GRID, "arrive", "tl.atomic_xchg($B, 0, $$$X)", "tl.atomic_xchg($B, 1, $$$X)", 1),
    "nobody_is_let_through": Mutant(
        GRID, "grid_barrier", "tl.atomic_add($B + 1, 1, $$$X)", "tl.atomic_add($B + 1, 0, $$$X)", IN_ORDER
    ),
}
MUTANTS = {
    "a_program_is_left_out_of_the_sum": Mutant(
        STEP, "elbo_step_kernel", "sum_of($T, $N, $M)", "sum_of($T, $N - 1, $M)", IN_ORDER, place=(0, 3),
    ),
    "the_second_tile_is_left_out_of_the_sum": Mutant(
        STEP, "elbo_step_kernel", "tl.sum($A, 0) + tl.sum($B, 0)", "tl.sum($A, 0)", IN_ORDER,
        place=(0, 2),
    ),
    "the_third_tile_is_left_out_of_the_sum": Mutant(
        STEP, "elbo_step_kernel", "$T += tl.sum($A, 0)", "$T += 0.0", IN_ORDER, place=(0, 2),
    ),
    "the_tail_is_a_column_short": Mutant(STEP, "tile_of", MASK, "($R < $B)[:, None] & ($C < $N - 1)", IN_ORDER),
    "the_tail_is_a_column_long": Mutant(STEP, "tile_of", MASK, "($R < $B)[:, None] & ($C <= $N)", IN_ORDER),
    "a_row_too_many": Mutant(STEP, "tile_of", MASK, "($R <= $B)[:, None] & ($C < $N)", IN_ORDER),
    "latents_of_the_first_round_only": Mutant(
        STEP, "elbo_step_kernel", "range($I, $N, $P)", "range($I, $P, $P)", IN_ORDER, place=(0, 2),
    ),
    "gradients_are_not_scaled": Mutant(
        "operators.py", "__call__", "structs.GradOutputs(grad_scale)", "structs.GradOutputs(None)", IN_ORDER,
    ),
}  # fmt: skip

# In a copy of the kernels: program 0 is late by `turns` of a loop, and all read what all have written.
LATE_PROGRAM = """
import triton
import triton.language as tl

from ._grid import grid_barrier, sum_of


@triton.jit
def late_kernel(written, read, barrier, turns, PROGRAMS: tl.constexpr):
    pid, x = tl.program_id(0), 0.0
    if pid == 0:
        for turn in range(turns):
            x += tl.load(read + turn % PROGRAMS, volatile=True) * 0.0
    tl.store(written + pid, x + 1.0)
    grid_barrier(barrier, PROGRAMS)
    tl.store(read + pid, sum_of(written, PROGRAMS, PROGRAMS))
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """Makes a copy of the kernels' package with a mutant, or none."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(mutant: Mutant | None) -> str:
        folder = copy(Path(elbo_step.__file__).parent, tmp_path / "mutated_kernels", *filter(None, [mutant]))
        (folder / "late.py").write_text(LATE_PROGRAM, encoding="utf-8")
        return folder.name

    yield make
    for module in [m for m in sys.modules if m.partition(".")[0] == "mutated_kernels"]:
        del sys.modules[module]


def fault_of(check: Callable[[], str | None], first: int | None, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """The first fault that shows under a few schedules: `first`, then the others."""
    executor = sys.modules["triton_emu"].CFG
    monkeypatch.setitem(executor, "limit", 30_000)  # instructions: a program that waits for ever is a fault too
    for seed in sorted(SCHEDULES, key=lambda seed: seed != first):
        monkeypatch.setitem(executor, "seed", seed)
        let_threads_agree(monkeypatch)
        try:
            fault = check()
        except Exception as error:
            fault = f"{type(error).__name__}: {error}"
        if fault:
            return fault
    return None


@compiled
@pytest.mark.ptx
@pytest.mark.parametrize("name", ["unchanged", *BARRIER_MUTANTS])
def test_a_late_program_is_waited_for(name: str, package: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    mutant = BARRIER_MUTANTS.get(name)
    late = importlib.import_module(f"{package(mutant)}.late")

    def check() -> str | None:
        barrier = torch.zeros(2, dtype=torch.int32)
        for _ in range(3):  # each finds the barrier as the one before leaves it
            written, read = torch.zeros(4), torch.zeros(4)
            late.late_kernel[(4,)](
                written,
                read,
                barrier,
                300,
                PROGRAMS=4,
                num_warps=1,
                launch_cooperative_grid=True,
                enable_fp_fusion=False,
            )
            if read.tolist() != [4.0] * 4:
                return f"{read.tolist()} programs were there"
        return None

    fault = fault_of(check, mutant.killer if mutant else IN_ORDER, monkeypatch)
    assert (fault is not None) == (name != "unchanged"), fault


@compiled
@pytest.mark.ptx
@pytest.mark.parametrize("name", ["unchanged", *MUTANTS])
def test_a_mutant_is_noticed(name: str, package: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    mutant = MUTANTS.get(name)
    copied = package(mutant)
    operators, step, layout = (importlib.import_module(f"{copied}.{m}") for m in ("operators", "elbo_step", "_layout"))
    small_programs(monkeypatch.setattr, operators, step, layout)
    call = Call("optimal", batch=6, data=(2300,), latent=(300,))  # five programs of three tiles, nearly full
    with mock.patch.object(autograd, "elbo", return_value=(None,) * 5) as operator:
        call(decoupled_elbo)
    tensors, options = operator.call_args.args
    tensors = Tensors._make(None if t is None else t.detach() for t in tensors)
    mask = mask_of(t is not None for t in tensors)
    args = (tensors, options, torch.tensor(2.5), 1.0, mask)
    expected = reference.step(*args)

    def check() -> str | None:
        for got, true in zip(operators.step(*args), expected, strict=True):
            if true.numel():  # what is not asked for is None here, and empty there
                torch.testing.assert_close(got, true, rtol=1e-4, atol=1e-5)
        return None

    fault = fault_of(check, mutant.killer if mutant else IN_ORDER, monkeypatch)
    assert (fault is not None) == (name != "unchanged"), fault
