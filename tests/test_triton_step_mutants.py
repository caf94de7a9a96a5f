"""A test of the tests of Triton's step, as compiled code: kernels with one fault each, all of which must be noticed,
in order or with the threads interleaved at random. (test_mutants.py has those that show in the interpreter.)"""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from cases import Call

from fused_elbo import autograd, decoupled_elbo, ops

pytest.importorskip("triton", reason="Triton is not installed (it is for Linux)")

from test_triton_step import compiled, let_threads_agree, small_programs

from fused_elbo.kernels import elbo_step

# name -> what is replaced in _grid.py (it occurs once), and by what
BARRIER_MUTANTS = {
    "nobody_waits": ("while now == before:", "while now != now:"),
    "the_last_but_one_is_taken_for_the_last": ("== programs - 1\n    if is_last", "== programs - 2\n    if is_last"),
    "the_count_is_not_reset": ("tl.atomic_xchg(barrier, 0,", "tl.atomic_xchg(barrier, 1,"),
    "nobody_is_let_through": ("tl.atomic_add(barrier + 1, 1,", "tl.atomic_add(barrier + 1, 0,"),
}
MUTANTS = {  # in elbo_step.py
    "a_program_is_left_out_of_the_sum": ("sum_of(totals, programs,", "sum_of(totals, programs - 1,"),
    "the_second_tile_is_left_out_of_the_sum": ("tl.sum(s, 0) + tl.sum(s1, 0)", "tl.sum(s, 0)"),
    "the_tail_is_a_column_short": ("(cols < dims)", "(cols < dims - 1)"),
    "the_tail_is_a_column_long": ("(cols < dims)", "(cols <= dims)"),
    "a_row_too_many": ("(rows < batch)[:, None]", "(rows <= batch)[:, None]"),
    "latents_of_the_first_round_only": (
        "latent_programs, programs):\n        clamped_total", "programs, programs):\n        clamped_total",
    ),
    "gradients_are_not_scaled": ("HAS_GRAD_SCALE=grad_scale is not None", "HAS_GRAD_SCALE=False"),
}  # fmt: skip

# In a copy of the kernels: program 0 is late by `turns` of a loop, and all read what all have written.
LATE_PROGRAM = """
import triton
import triton.language as tl

from ._grid import meet, sum_of


@triton.jit
def late_kernel(written, read, barrier, turns, PROGRAMS: tl.constexpr):
    pid, x = tl.program_id(0), 0.0
    if pid == 0:
        for turn in range(turns):
            x += tl.load(read + turn % PROGRAMS, volatile=True) * 0.0
    tl.store(written + pid, x + 1.0)
    meet(barrier, PROGRAMS)
    tl.store(read + pid, sum_of(written, PROGRAMS, PROGRAMS))
"""


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Makes a copy of the kernels' package in which one thing is replaced."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(name: str, file: str, old: str, new: str) -> str:
        package = f"kernels_{name}"
        shutil.copytree(
            Path(elbo_step.__file__).parent, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__")
        )
        source = tmp_path / package / file
        text = source.read_text(encoding="utf-8")
        assert text.count(old) == 1, f"{old!r} occurs {text.count(old)} times; the kernel has changed"
        source.write_text(text.replace(old, new), encoding="utf-8")
        (tmp_path / package / "late.py").write_text(LATE_PROGRAM, encoding="utf-8")
        return package

    yield make
    for module in [m for m in sys.modules if m.startswith("kernels_")]:
        del sys.modules[module]


def fault_of(check: Callable[[], str | None], monkeypatch: pytest.MonkeyPatch) -> str | None:
    """The first fault that shows in order, or with the threads interleaved at random by one of a few seeds."""
    executor = sys.modules["triton_emu"].CFG
    monkeypatch.setitem(executor, "limit", 30_000)  # instructions: a program that waits for ever is a fault too
    for seed in (None, 1, 2, 3):
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
@pytest.mark.one_target
@pytest.mark.parametrize("name", ["unchanged", *BARRIER_MUTANTS])
def test_a_late_program_is_waited_for(name: str, copy: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    late = importlib.import_module(
        copy(name, "_grid.py", *BARRIER_MUTANTS.get(name, ("def meet", "def meet"))) + ".late"
    )

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

    fault = fault_of(check, monkeypatch)
    assert (fault is not None) == (name != "unchanged"), fault


@compiled
@pytest.mark.one_target
@pytest.mark.parametrize("name", ["unchanged", *MUTANTS])
def test_a_mutant_is_noticed(name: str, copy: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    package = copy(name, "elbo_step.py", *MUTANTS.get(name, ("class Plan", "class Plan")))
    operators, step, layout = (importlib.import_module(f"{package}.{m}") for m in ("operators", "elbo_step", "_layout"))
    small_programs(monkeypatch.setattr, operators, step, layout)
    call = Call("optimal", batch=6, data=(3300,), latent=(300,))  # five programs, nearly full
    with mock.patch.object(autograd, "elbo", return_value=(None,) * 5) as operator:
        call(decoupled_elbo)
    *tensors, values = operator.call_args.args
    args = (*[None if t is None else t.detach() for t in tensors], *values)
    mask = sum(1 << i for i in range(8) if args[i] is not None)
    args = (*args[:9], torch.tensor(2.5), *args[9:], 1.0, mask)
    expected = ops.ByReference.step(*args)

    def check() -> str | None:
        for got, true in zip(operators.step(*args), expected, strict=True):
            torch.testing.assert_close(got, true, rtol=1e-4, atol=1e-5)
        return None

    fault = fault_of(check, monkeypatch)
    assert (fault is not None) == (name != "unchanged"), fault
