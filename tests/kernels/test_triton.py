"""The Triton backend where there is no GPU: what it says of itself, and the launches that a step makes.

Its numbers are tested by the other files: with TRITON_INTERPRET=1 in the environment, or under a driver that runs
compiled kernels on the CPU, they run on Triton alone.
"""

from __future__ import annotations

import importlib.resources
import math
from typing import Any

import pytest
import torch
from cases import Call

import fused_elbo
from fused_elbo import BackendUnavailable, backends, decoupled_elbo
from fused_elbo.operators import elbo

pytest.importorskip("triton", reason="Triton is not installed (it is for Linux)")
pytestmark = [pytest.mark.triton, pytest.mark.ptx]
on_cpu = pytest.mark.skipif(
    not backends.triton.runs_on_cpu(), reason="Triton runs on no CPU here: needs TRITON_INTERPRET=1 or such a driver"
)


@pytest.mark.skipif(
    bool(backends.triton.runs_on_cpu()) or torch.cuda.is_available(),
    reason="Triton can run here, which is not the case",
)
def test_it_says_why_it_cannot_serve() -> None:
    with pytest.raises(BackendUnavailable, match="no GPU is"), fused_elbo.backend("triton"):
        pass
    row = backends.statuses()[0]
    assert (row.name, row.ready) == ("triton", False)
    assert "no GPU is" in row.detail
    assert "TRITON_INTERPRET=1" in row.remedy


class NoCompiler:
    """Triton's driver where there is nothing to compile it with."""

    @property
    def active(self) -> object:
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable")


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes PyTorch see a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(backends.triton, "load", backends.triton.load.__wrapped__)  # which remembers nothing


def test_a_driver_that_cannot_start_is_no_backend(a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one serves, as on a machine without a compiler it does with a wheel's CUDA kernels."""
    import triton

    served: list[str] = []
    monkeypatch.setattr(triton.runtime, "driver", NoCompiler())
    monkeypatch.setattr(backends.cuda, "load", lambda: served.append("cuda"))
    assert backends.load_for("cuda")
    assert served == ["cuda"]
    row = backends.triton.status()
    assert not row.ready
    assert "driver cannot start: Failed to find C compiler" in row.detail
    assert "CC" in row.remedy
    with pytest.raises(BackendUnavailable, match="driver cannot start"), fused_elbo.backend("triton"):
        pass


def test_of_cpu_tensors_it_does_not_say_that_there_is_no_gpu(a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.triton, "runs_on_cpu", lambda: None)
    with pytest.raises(BackendUnavailable, match="is here, but these are CPU tensors"):
        backends.triton.require("cpu")


@on_cpu
def test_its_state_names_version_and_target() -> None:
    import triton

    row = backends.statuses()[0]
    assert (row.name, row.ready) == ("triton", True)
    assert triton.__version__ in row.detail
    if triton.knobs.runtime.interpret:
        assert "CPU tensors by its interpreter" in row.detail
    else:
        assert f"for sm_{triton.runtime.driver.active.get_current_target().arch}, " in row.detail


def test_gpu_tensors_go_to_triton() -> None:
    """The kernels are registered for the GPU's dispatch key when the first GPU tensor comes."""
    assert backends.load_for("cuda")
    for name in elbo.NAMES:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fused_elbo::{name}", "CUDA")


def test_beside_the_operators_it_is_not_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors have the C++ kernels behind the operators. Triton's are then called past them, which neither vmap nor
    torch.compile can see through."""
    monkeypatch.setattr(backends, "forced", "triton")
    monkeypatch.setitem(backends.dispatched, "cpu", "cpp")
    x = torch.zeros(2, 3, 4)
    for traced in (torch.vmap(decoupled_elbo), torch.compile(decoupled_elbo, backend="eager", fullgraph=True)):
        with pytest.raises(Exception, match=r"neither in torch\.compile nor in vmap"):
            traced(x, x, x, x)


def launches(monkeypatch: pytest.MonkeyPatch, call: Call) -> list[str]:
    """The names of the kernels that a training step launches."""
    from fused_elbo.kernels import _plan, elbo_finalize, elbo_grads, elbo_stats

    seen: list[str] = []

    class Spy:
        def __init__(self, kernel: object, name: str) -> None:
            self.kernel, self.name = kernel, name

        def __getitem__(self, grid: tuple[int, ...]) -> object:
            def launch(*args: object, **kwargs: object) -> None:
                seen.append(self.name)
                self.kernel[grid](*args, **kwargs)  # type: ignore[index]

            return launch

    for module, name in (
        (elbo_stats, "elbo_stats_kernel"),
        (elbo_finalize, "elbo_shared_sigma_term_kernel"),
        (elbo_grads, "elbo_grads_kernel"),
    ):
        monkeypatch.setattr(module, name, Spy(getattr(module, name), name))
    _plan.forget()
    loss = call(decoupled_elbo).loss
    weight = torch.linspace(0.5, 1.0, loss.numel()).reshape(loss.shape)
    torch.autograd.grad(loss, call.leaves(), weight, allow_unused=True)
    _plan.forget()
    return seen


@on_cpu
@pytest.mark.parametrize(
    "mode", ["optimal", "per-image", "learned", "learned-image", "beta-tensor", "beta-sample", "prior"]
)
def test_a_step_is_two_launches(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with fused_elbo.backend("triton"):
        expected = ["elbo_stats_kernel", "elbo_grads_kernel"]
        assert launches(monkeypatch, Call(mode)) == expected
        if mode in ("per-image", "learned", "learned-image"):
            assert launches(monkeypatch, Call(mode, "none")) == expected


@on_cpu
def test_unequal_weights_and_a_shared_sigma_take_a_third(monkeypatch: pytest.MonkeyPatch) -> None:
    with fused_elbo.backend("triton"):
        assert "elbo_shared_sigma_term_kernel" in launches(monkeypatch, Call("optimal", "none"))
        call = Call("optimal", "none")
        loss = call(decoupled_elbo).loss
        seen = launches(monkeypatch, Call("optimal", "none", batch=1))
        assert loss.shape == (4,)
        assert len(seen) == 3


def test_kernels_and_helpers_have_few_parameters() -> None:
    """What belongs together is passed in one structure."""
    found = {}
    for file in importlib.resources.files("fused_elbo.kernels").iterdir():
        if file.name.endswith(".py"):
            module = importlib.import_module(f"fused_elbo.kernels.{file.name.removesuffix('.py')}")
            found |= {n: len(f.arg_names) for n, f in vars(module).items() if hasattr(f, "arg_names")}
    assert len(found) > 30
    for name, parameters in found.items():
        assert parameters <= (20 if name.endswith("_kernel") else 8), name


@on_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_numbers_in_structures_lose_nothing(dtype: torch.dtype) -> None:
    """Triton passes a Python float in a structure as fp32."""
    import numbers_kernel

    values = [0.1, -7.0, 1.0, 0.0, 3e38, -1e-30, math.pi, math.inf, -math.inf, math.nan]
    if dtype == torch.float64:
        values = [1e300, -1e-300, 5e-324, -0.0, 1 / 3 + 1e-16, *values]
    given = torch.tensor(values, dtype=torch.float64)
    read = torch.stack([numbers_kernel.through_a_kernel(value, dtype) for value in values])
    same = torch.int64 if dtype == torch.float64 else torch.int32
    expected = given.to(dtype)
    assert torch.equal(read.isnan(), expected.isnan())
    assert torch.equal(read[:-1].view(same), expected[:-1].view(same))


@on_cpu
@pytest.mark.parametrize("beta", [3e38, 1e-300, 0.1])
def test_options_of_fp64_are_exact(beta: float) -> None:
    call = Call("softclip", dtype=torch.float64)
    call.kw |= {"beta": beta, "min_log_sigma": -0.1}
    results = []
    for backend in ("reference", "triton"):
        with fused_elbo.backend(backend):
            elbo = call(decoupled_elbo)
            results.append((elbo.loss, *call.gradients(elbo)))
    for got, true in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, true, rtol=1e-14, atol=0.0, equal_nan=True)


@on_cpu
@pytest.mark.parametrize("mode", ["optimal", "learned-pixel", "prior"])
def test_64_bit_offsets(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forced: no test has memory for a tensor that needs them."""
    from fused_elbo.kernels import _layout

    with fused_elbo.backend("triton"):
        narrow = Call(mode)
        expected = narrow.gradients(narrow(decoupled_elbo))
        monkeypatch.setattr(_layout, "FORCE_WIDE", True)
        wide = Call(mode)
        for a, b in zip(wide.gradients(wide(decoupled_elbo)), expected, strict=True):
            assert torch.equal(a, b)


@on_cpu
@pytest.mark.schedules
@pytest.mark.parametrize(("data", "latent"), [((8,), (3,)), ((5000,), (5000,)), ((3, 40, 40), (1,))], ids=str)
def test_short_rows_and_many_tiles(
    data: tuple[int, ...], latent: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """D = 8 and K = 3 raced with contracted multiply-adds; few programs make each walk several tiles."""
    from fused_elbo.kernels import _layout, _plan

    with fused_elbo.backend("triton"):
        plain = Call("free-bits", data=data, latent=latent)
        expected = plain.gradients(plain(decoupled_elbo))
        monkeypatch.setattr(_layout, "MANY", 2)
        _plan.forget()
        few = Call("free-bits", data=data, latent=latent)
        for a, b in zip(few.gradients(few(decoupled_elbo)), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    _plan.forget()


@on_cpu
@pytest.mark.parametrize(
    ("shape", "segment", "memory_format"),
    [
        ((3, 1, 1), 64, torch.contiguous_format),  # 1600 elements of a channel, over two tiles
        ((2, 3, 1, 1), 64, torch.contiguous_format),
        ((40, 1), 8, torch.contiguous_format),
        ((1, 40), 1, torch.contiguous_format),
        ((3, 1, 1), 1, torch.channels_last),
    ],
    ids=str,
)
@pytest.mark.parametrize("many", [8192, 2], ids=["", "many tiles"])
def test_one_log_sigma_of_neighbours_has_one_gradient(
    shape: tuple[int, ...], segment: int, memory_format: torch.memory_format, many: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What PyTorch then adds up is as many times smaller than the data."""
    from fused_elbo.kernels import _layout, _plan

    made = []

    def empty_in_order(lead: torch.Tensor, *how: Any) -> torch.Tensor:
        made.append(lead.numel())
        return empty(lead, *how)

    empty = _layout.empty_in_order
    monkeypatch.setattr(_layout, "empty_in_order", empty_in_order)
    monkeypatch.setattr(_layout, "MANY", many)
    _plan.forget()
    torch.manual_seed(0)
    recon, target = (torch.randn(2, 3, 40, 40).contiguous(memory_format=memory_format) for _ in range(2))
    given = torch.randn(shape) * 0.3
    gradients = {}
    for backend, dtype in (("reference", torch.float64), ("triton", torch.float32)):
        log_sigma = given.to(dtype).requires_grad_()
        latents = torch.zeros(2, 4, dtype=dtype), torch.zeros(2, 4, dtype=dtype)
        with fused_elbo.backend(backend):
            loss = decoupled_elbo(recon.to(dtype), target.to(dtype), *latents, log_sigma=log_sigma).loss
        (gradients[backend],) = torch.autograd.grad(loss, log_sigma)
    torch.testing.assert_close(gradients["triton"].double(), gradients["reference"], rtol=1e-5, atol=1e-3)
    assert made == [recon.numel() // segment]
    _plan.forget()
