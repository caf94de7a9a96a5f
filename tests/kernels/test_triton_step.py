"""Triton's kernel of the whole step: what fits on a GPU, and its grid barrier.

Its numbers are tested by test_step.py, at the sizes of a GPU, where a few programs hold all that a test can afford.
Here programs are small, and so many that they wait for one another.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from cases import Call
from stepwise import compare

import fused_elbo
from fused_elbo import backends, call, decoupled_elbo_backward, rate

pytest.importorskip("triton", reason="Triton is not installed (it is for Linux)")

from fused_elbo.kernels import _grid, _layout, _plan, elbo_step, operators
from fused_elbo.kernels._layout import Inputs
from fused_elbo.kernels.elbo_step import Cut
from fused_elbo.kernels.structs import Options
from fused_elbo.sigma import Kind

pytestmark = [pytest.mark.triton, pytest.mark.ptx]
SMS = {"A100": 108, "H100": 132, "B200": 148}
ON_CHIP = 2**15  # elements of a program at most
compiled = pytest.mark.skipif(
    backends.triton.runs_on_cpu() != "a driver for the CPU",
    reason="programs that wait for one another need a driver that runs compiled kernels on the CPU",
)


# ----------------------------------------------------------------------------------------------------- what fits


def cut(
    batch: int, dims: int, mode: Kind = Kind.BATCH, resident: int = 132, latents: int = 128,
    dtype: torch.dtype = torch.float32, capacity: float | None = None,
) -> Cut | None:  # fmt: skip
    data, latent = (torch.empty(batch, n, device="meta", dtype=dtype) for n in (dims, latents))
    log_sigma = data if mode == Kind.ELEMENT else None
    tensors = call.Tensors(data, data, latent, latent, log_sigma, None, None, None, None)
    limit = {} if capacity is None else {"limit_mode": int(rate.Kind.BATCH_CAPACITY), "limit_value": capacity}
    options = call.Options(sigma_mode=int(mode), min_log_sigma=-7.0, **limit)  # type: ignore[arg-type]
    inputs = Inputs(tensors, options)
    return Cut.of(inputs, Options.of(tensors, options), resident)


@pytest.mark.parametrize("resident", SMS.values(), ids=SMS)
@pytest.mark.parametrize("dims", [16, 4096, 12288, ON_CHIP])
def test_the_largest_batch_that_fits(resident: int, dims: int) -> None:
    """Where rows fill their tiles, nothing is lost: 32768 elements for each SM."""
    assert ON_CHIP == 2 * elbo_step.THREADS * elbo_step.HELD
    most = resident * ON_CHIP // dims // 8 * 8  # 8 rows of 4096 in a program
    fits = cut(most, dims, resident=resident)
    assert fits is not None
    assert fits.waits
    assert fits.programs == resident
    assert cut(most + ON_CHIP // dims + 8, dims, resident=resident) is None


@pytest.mark.parametrize("resident", [1, 5, 132])
@pytest.mark.parametrize("dims", [1, 17, 784, 4097, 12288, 67500, 196608])
def test_programs_that_wait_are_all_resident(dims: int, resident: int) -> None:
    """An SM holds 1024 threads with 64 registers each, and never less than a program has."""
    tried = [cut(batch, dims, resident=resident, latents=latents) for batch in (1, 7, 64) for latents in (1, 9999)]
    for p in filter(None, tried):
        assert p.programs <= resident
        assert p.threads <= 1024
        assert p.threads * 64 <= 65536
        assert p.data.rows * p.data.cols <= 16 * p.threads
        held = p.tiles * p.programs * p.data.rows * p.data.cols
        assert held >= dims
    smallest = tried[0]
    assert (smallest is not None) == (dims <= resident * ON_CHIP)


def test_small_batches_spread_over_the_gpu() -> None:
    for batch in (64, 128, 256):
        p = cut(batch, 12288)
        assert p is not None
        assert 120 <= p.programs <= 132


@pytest.mark.parametrize("dims", [1, 784, 12288, 2**14])
def test_a_sigma_that_a_program_knows_waits_for_none(dims: int) -> None:
    for mode in (Kind.GIVEN, Kind.IMAGE):
        p = cut(2**12, dims, mode)  # more than fits
        assert p is not None
        assert not p.waits
        assert mode != Kind.IMAGE or p.data.chunks == 1


def test_what_goes_the_long_way() -> None:
    assert cut(8, 2**14 + 1, Kind.IMAGE).waits  # type: ignore[union-attr]
    assert cut(2**12, 2**14 + 1, Kind.IMAGE) is None
    assert cut(8, 784, Kind.GIVEN, capacity=1.0).waits  # type: ignore[union-attr]
    assert cut(2**13, 12288, Kind.GIVEN, capacity=1.0) is None
    assert cut(8, 784, Kind.ELEMENT) is None
    assert cut(8, 784, dtype=torch.float64) is None


# ------------------------------------------------------------------------------------------- programs that wait


def small_programs(
    patch: Callable[[Any, str, Any], Any], operators: Any = operators, step: Any = elbo_step, layout: Any = _layout
) -> None:
    """Five programs of 128 threads, which hold up to 4096 elements each."""
    patch(step, "THREADS", 128)
    patch(step, "SMALLEST", 256)
    patch(layout, "CHUNK", 256)
    patch(operators, "resident_programs", lambda device: 5)


def let_threads_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that hold one value may all store it to one place in shared memory. Interleaved at random they do so one
    after another, which the executor takes for a race; in order, it sees that the values are equal."""
    executor = sys.modules.get("triton_emu")
    if executor is not None and executor.CFG["seed"] is not None:
        monkeypatch.setitem(executor.CFG, "races", False)


class Launches:
    """Stands in the kernel's place: runs it, and takes down its programs and its code."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.programs, self.ptx = kernel, [], ""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            self.programs.append((grid[0], kwargs["launch_cooperative_grid"]))
            self.ptx = self.kernel[grid](*args, **kwargs).asm["ptx"]

        return launch


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    let_threads_agree(monkeypatch)
    small_programs(monkeypatch.setattr)
    spy = Launches(elbo_step.elbo_step_kernel)
    monkeypatch.setattr(elbo_step, "elbo_step_kernel", spy)
    _plan.forget()
    with fused_elbo.backend("triton"):
        yield spy
    _plan.forget()


@compiled
@pytest.mark.schedules
@pytest.mark.parametrize(
    "dtype",
    [pytest.param(torch.float32, marks=pytest.mark.ptx_each, id="fp32"), pytest.param(torch.bfloat16, id="bf16")],
)
@pytest.mark.parametrize(
    ("mode", "batch", "data", "latent"),
    [
        ("optimal", 3, (17, 201), (5,)),  # 3417: 14 chunks of 256 a sample, of which the last is short
        ("optimal", 50, (3, 8, 8), (40,)),  # 192: less than a chunk; latents in more tiles than there are programs
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
    assert 4 <= programs <= 5
    assert cooperative
    # A load through the cache that is not coherent might see what was there before the barrier.
    assert "ld.global" in launches.ptx
    assert ".nc" not in launches.ptx


@compiled
@pytest.mark.ptx_each
@pytest.mark.schedules
@pytest.mark.parametrize("mode", ["per-image", "learned-image", "beta-sample"])
def test_programs_that_do_not_wait(mode: str, launches: Launches) -> None:
    extra = {"sigma": 0.3} if mode == "beta-sample" else {}

    def make() -> Call:
        made = Call(mode, batch=11, data=(3, 20, 20), latent=(300,))
        made.kw |= extra
        return made

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
    barrier = _grid.barrier_of(torch.device("cpu"))
    for mode, waits in (("optimal", 1), ("optimal", 1), ("constant", 0), ("capacity", 1)):
        before = barrier.clone()
        Call(mode, data=(3, 20, 20))(decoupled_elbo_backward)
        assert barrier.tolist() == [0, before[1].item() + waits, *before[2:].tolist()]
    assert len(launches.programs) == 4


def test_the_default_streams_barrier_is_kept_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """The streams are pretended. Two launches that share a barrier would let each other through too early; one that is
    kept may lie in the memory of a CUDA graph."""
    made = []

    def zeros(*size: int, **kw: Any) -> torch.Tensor:
        made.append(kw["device"])
        return torch.empty(*size)

    stream = mock.Mock(cuda_stream=0)
    monkeypatch.setattr(_grid, "_barriers", {})
    monkeypatch.setattr(torch, "zeros", zeros)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    first = _grid.barrier_of(torch.device("cuda:0"))
    assert _grid.barrier_of(torch.device("cuda:0")) is first
    assert _grid.barrier_of(torch.device("cuda:1")) is not first
    assert len(made) == 2
    stream.cuda_stream = 1
    others = [_grid.barrier_of(torch.device("cuda:0")) for _ in range(2)]
    assert len({id(b) for b in (first, *others)}) == 3
    assert len(_grid._barriers) == 2


@compiled
def test_a_refused_launch_takes_the_long_way(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one warning for each GPU, and the same numbers."""

    class Refusing(Launches):
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def launch(*args: Any, **kwargs: Any) -> None:
                self.programs.append((grid[0], kwargs["launch_cooperative_grid"]))
                raise RuntimeError("Triton Error [CUDA]: too many blocks in cooperative launch")

            return launch

    spy = Refusing(launches.kernel)
    monkeypatch.setattr(elbo_step, "elbo_step_kernel", spy)
    monkeypatch.setattr(operators, "_refusing", set())
    with pytest.warns(RuntimeWarning, match="cpu refused a cooperative launch.*: Triton Error .CUDA.: too many"):
        compare(lambda: Call("optimal", batch=5, data=(700,)), 2.5)
    compare(lambda: Call("optimal", batch=5, data=(700,)), 2.5)  # without one: warnings are errors here
    assert spy.programs == [(5, True)]
    with pytest.raises(RuntimeError, match="too many blocks"):  # not of this kind: nothing waits
        Call("constant", data=(3, 20, 20))(decoupled_elbo_backward)
