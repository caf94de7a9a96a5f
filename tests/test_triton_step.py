"""Triton's kernel of the whole step: what fits on a GPU, its grid barrier, and faults of it that must be noticed.

Its numbers are tested by test_step.py, at the sizes of a GPU, where a few programs hold all that a test can afford.
Here programs are small, and so many that they wait for one another.
"""

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
from stepwise import compare

import fused_elbo
from fused_elbo import autograd, backends, decoupled_elbo, decoupled_elbo_backward, ops

pytest.importorskip("triton", reason="Triton is not installed (it is for Linux)")

from fused_elbo.kernels import _layout, elbo_step
from fused_elbo.kernels._layout import Inputs
from fused_elbo.kernels.elbo_finalize import Knobs
from fused_elbo.kernels.elbo_step import Plan
from fused_elbo.sigma import Kind

SMS = {"A100": 108, "H100": 132, "B200": 148}
ON_CHIP = 2**15  # elements of a program at most
compiled = pytest.mark.skipif(
    backends.triton.runs_on_cpu() != "a driver for the CPU",
    reason="programs that wait for one another need a driver that runs compiled kernels on the CPU",
)


# ----------------------------------------------------------------------------------------------------- what fits


def plan(
    batch: int, dims: int, mode: Kind = Kind.BATCH, resident: int = 132, latents: int = 128,
    dtype: torch.dtype = torch.float32, capacity: float | None = None,
) -> Plan | None:  # fmt: skip
    data, latent = (torch.empty(batch, n, device="meta", dtype=dtype) for n in (dims, latents))
    log_sigma = data if mode == Kind.ELEMENT else None
    knobs = Knobs(None, None, None, int(mode), False, 0.0, -7.0, 0.0, 1.0, capacity, 0)
    return Plan.of(Inputs(data, data, latent, latent, log_sigma, None, None), knobs, resident)


@pytest.mark.parametrize("resident", SMS.values(), ids=SMS)
@pytest.mark.parametrize("dims", [16, 4096, 12288, ON_CHIP])
def test_the_largest_batch_that_fits(resident: int, dims: int) -> None:
    """Where rows fill their tiles, nothing is lost: 32768 elements for each SM."""
    assert ON_CHIP == 2 * elbo_step.THREADS * elbo_step.HELD
    most = resident * ON_CHIP // dims // 8 * 8  # 8 rows of 4096 in a program
    fits = plan(most, dims, resident=resident)
    assert fits is not None
    assert fits.waits
    assert fits.programs == resident
    assert plan(most + ON_CHIP // dims + 8, dims, resident=resident) is None


@pytest.mark.parametrize("resident", [1, 5, 132])
@pytest.mark.parametrize("dims", [1, 17, 784, 4097, 12288, 67500, 196608])
def test_programs_that_wait_are_all_resident(dims: int, resident: int) -> None:
    """An SM holds 1024 threads with 64 registers each, and never less than a program has."""
    tried = [plan(batch, dims, resident=resident, latents=latents) for batch in (1, 7, 64) for latents in (1, 9999)]
    for p in filter(None, tried):
        assert p.programs <= resident
        assert p.threads <= 1024
        assert p.threads * 64 <= 65536
        assert p.data.rows * p.data.cols <= 16 * p.threads
        held = 2 * p.programs * p.data.rows * p.data.cols
        assert held >= dims
    smallest = tried[0]
    assert (smallest is not None) == (dims <= resident * ON_CHIP)


def test_small_batches_spread_over_the_gpu() -> None:
    for batch in (64, 128, 256):
        p = plan(batch, 12288)
        assert p is not None
        assert 96 <= p.programs <= 132


@pytest.mark.parametrize("dims", [1, 784, 12288, 2**14])
def test_a_sigma_that_a_program_knows_waits_for_none(dims: int) -> None:
    for mode in (Kind.GIVEN, Kind.IMAGE):
        p = plan(2**12, dims, mode)  # more than fits
        assert p is not None
        assert not p.waits
        assert mode != Kind.IMAGE or p.data.chunks == 1


def test_what_goes_the_long_way() -> None:
    assert plan(8, 2**14 + 1, Kind.IMAGE).waits  # type: ignore[union-attr]
    assert plan(2**12, 2**14 + 1, Kind.IMAGE) is None
    assert plan(8, 784, Kind.GIVEN, capacity=1.0).waits  # type: ignore[union-attr]
    assert plan(2**13, 12288, Kind.GIVEN, capacity=1.0) is None
    assert plan(8, 784, Kind.ELEMENT) is None
    assert plan(8, 784, dtype=torch.float64) is None


# ------------------------------------------------------------------------------------------- programs that wait


def small_programs(patch: Callable[[Any, str, Any], Any], step: Any = elbo_step, layout: Any = _layout) -> None:
    """Five programs of 128 threads, which hold up to 4096 elements each."""
    patch(step, "THREADS", 128)
    patch(layout, "TILE", 512)
    patch(layout, "PIECE", 256)
    patch(step, "resident_programs", lambda device: 5)


class Launches:
    """In the kernel's place: runs it, and takes down its programs and its code."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.programs, self.ptx = kernel, [], ""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            self.programs.append((grid[0], kwargs["launch_cooperative_grid"]))
            self.ptx = self.kernel[grid](*args, **kwargs).asm["ptx"]

        return launch


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    from fused_elbo.kernels import operators

    small_programs(monkeypatch.setattr)
    monkeypatch.setattr(operators, "resident_programs", elbo_step.resident_programs)
    spy = Launches(elbo_step.elbo_step_kernel)
    monkeypatch.setattr(elbo_step, "elbo_step_kernel", spy)
    with fused_elbo.backend("triton"):
        yield spy


@compiled
@pytest.mark.schedules
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("mode", "batch", "data", "latent"),
    [
        ("optimal", 3, (17, 201), (5,)),  # 3417: 14 pieces of 256 a sample, of which the last is short
        ("optimal", 50, (3, 8, 8), (40,)),  # 192: less than a piece; latents in more tiles than there are programs
        ("per-image", 3, (2500,), (3,)),  # more than one program holds
        ("capacity", 7, (3, 20, 20), (300,)),
        ("free-bits", 2, (5000,), (7,)),
        ("prior", 5, (700,), (65,)),
    ],
)
def test_five_programs_that_wait(
    mode: str, batch: int, data: tuple[int, ...], latent: tuple[int, ...], dtype: torch.dtype, launches: Launches
) -> None:
    compare(lambda: Call(mode, batch=batch, data=data, latent=latent, dtype=dtype), 2.5)
    ((programs, cooperative),) = launches.programs
    assert (programs, cooperative) == (5, True)
    # A load through the cache that is not coherent might see what was there before the barrier.
    assert "ld.global" in launches.ptx
    assert ".nc" not in launches.ptx


@compiled
@pytest.mark.schedules
@pytest.mark.parametrize("mode", ["per-image", "learned-image", "beta-sample"])
def test_programs_that_do_not_wait(mode: str, launches: Launches) -> None:
    extra = {"sigma": 0.3} if mode == "beta-sample" else {}

    def make() -> Call:
        call = Call(mode, batch=11, data=(3, 20, 20), latent=(300,))
        call.kw |= extra
        return call

    compare(make, 2.5)
    ((programs, cooperative),) = launches.programs
    assert programs > 5
    assert not cooperative


@compiled
def test_a_batch_that_does_not_fit_takes_three_launches(launches: Launches) -> None:
    compare(lambda: Call("optimal", batch=5, data=(4096,)))
    assert launches.programs == [(5, True)]
    compare(lambda: Call("optimal", batch=6, data=(4096,)))
    assert len(launches.programs) == 1


@compiled
@pytest.mark.schedules
def test_the_barrier_is_ready_for_the_next_launch(launches: Launches) -> None:
    barrier = elbo_step.barrier_of(torch.device("cpu"))
    for mode, waits in (("optimal", 1), ("optimal", 1), ("constant", 0), ("capacity", 1)):
        before = barrier.clone()
        Call(mode, data=(3, 20, 20))(decoupled_elbo_backward)
        assert barrier.tolist() == [0, before[1] + waits]
    assert len(launches.programs) == 4


def test_each_stream_and_each_graph_has_a_barrier_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """On pretended streams of a GPU: two launches that share a barrier would let each other through too early."""
    made = []

    def zeros(*size: int, **kw: Any) -> torch.Tensor:
        made.append(kw["device"])
        return torch.empty(*size)

    capturing, stream = [False], mock.Mock(cuda_stream=1)
    monkeypatch.setattr(elbo_step, "_barriers", {})
    monkeypatch.setattr(torch, "zeros", zeros)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    first = elbo_step.barrier_of(torch.device("cuda:0"))
    assert elbo_step.barrier_of(torch.device("cuda:0")) is first
    assert elbo_step.barrier_of(torch.device("cuda:1")) is not first
    stream.cuda_stream = 2
    second = elbo_step.barrier_of(torch.device("cuda:0"))
    assert second is not first
    capturing[0] = True
    captured = [elbo_step.barrier_of(torch.device("cuda:0")) for _ in range(2)]
    assert len({id(b) for b in (first, second, *captured)}) == 4
    assert len(made) == 5


# ------------------------------------------------------------------------------------------------------- mutants

# name -> what is replaced in elbo_step.py (it occurs once), by what, and the mode in which it shows
MUTANTS = {
    "nobody_waits": ("while now == before:", "while now != now:", "optimal"),
    "arrives_before_its_sums_are_written": ("    tl.debug_barrier()  # one thread", "    # one thread", "per-image"),
    "the_last_one_is_one_too_early": ("== programs - 1\n    if is_last", "== programs - 2\n    if is_last", "optimal"),
    "the_count_is_not_reset": ("tl.atomic_xchg(barrier, 0,", "tl.atomic_xchg(barrier, 1,", "optimal"),
    "a_program_is_left_out_of_the_sum": ("total = sum_of(totals, programs,", "total = sum_of(totals, programs - 1,", "optimal"),
    "the_second_tile_is_left_out_of_the_sum": ("tl.sum(s, 0) + tl.sum(s1, 0)", "tl.sum(s, 0)", "optimal"),
    "the_tail_is_a_column_short": ("(cols < dims)", "(cols < dims - 1)", "optimal"),
    "the_tail_is_a_column_long": ("(cols < dims)", "(cols <= dims)", "optimal"),
    "a_row_too_many": ("(rows < batch)[:, None]", "(rows <= batch)[:, None]", "optimal"),
    "latents_of_the_first_round_only": (
        "latent_programs, programs):\n        clamped_total", "programs, programs):\n        clamped_total", "optimal",
    ),
    "gradients_are_not_scaled": ("HAS_GRAD_SCALE=grad_scale is not None", "HAS_GRAD_SCALE=False", "optimal"),
    "stats_are_read_before_they_are_written": ("            tl.debug_barrier()  # other", "            # other", "learned-image"),
}  # fmt: skip


def fault_of(step: Any, mode: str) -> str | None:
    """What is wrong with `step`, the operator of some kernels; None: nothing."""
    for _ in range(2):  # the second launch finds the barrier as the first one leaves it
        call = Call(mode, batch=3, data=(3, 700), latent=(401,))
        with mock.patch.object(autograd, "elbo", return_value=(None,) * 5) as operator:
            call(decoupled_elbo)
        args = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in operator.call_args.args)
        mask = sum(1 << i for i in range(8) if args[i] is not None)
        args = (*args[:9], torch.tensor(2.5), *args[9:], 1.0, mask)
        try:
            for got, expected in zip(step(*args), ops.ByReference.step(*args), strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return None


@compiled
@pytest.mark.one_target
@pytest.mark.parametrize("name", [None, *MUTANTS])
def test_a_mutant_is_noticed(name: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the threads interleaved at random, by one of a few seeds."""
    package = f"kernels_{name}"
    folder = tmp_path / package
    shutil.copytree(Path(elbo_step.__file__).parent, folder, ignore=shutil.ignore_patterns("__pycache__"))
    mode = "optimal"
    if name is not None:
        old, new, mode = MUTANTS[name]
        text = (folder / "elbo_step.py").read_text(encoding="utf-8")
        assert text.count(old) == 1, f"{old!r} occurs {text.count(old)} times; the kernel has changed"
        (folder / "elbo_step.py").write_text(text.replace(old, new), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    operators, step, layout = (importlib.import_module(f"{package}.{m}") for m in ("operators", "elbo_step", "_layout"))
    small_programs(monkeypatch.setattr, step, layout)
    monkeypatch.setattr(operators, "resident_programs", step.resident_programs)
    faults = []
    for seed in (None, 1, 2, 3):
        monkeypatch.setitem(sys.modules["triton_emu"].CFG, "seed", seed)
        faults.append(fault_of(operators.step, mode))
    assert any(faults) == (name is not None), faults
