"""Plans of the Triton operators: what they keep, and for which calls. Launches do nothing here: no GPU is needed."""

from __future__ import annotations

import importlib.util
import os
import random
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fused_elbo
from fused_elbo import decoupled_elbo, decoupled_elbo_backward, gaussian_kl, log_aggregate_posterior

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed (it is for Linux)", allow_module_level=True)
if how := fused_elbo.backends.triton.runs_on_cpu():
    pytest.skip(f"Triton's kernels run here, by {how}", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import triton
from offline import Offline, active
from triton.runtime.jit import JITFunction

from fused_elbo.kernels import _grid, _plan, operators
from fused_elbo.kernels.structs import Partials


class Compiled:
    """Stands for a compiled kernel: its launches are counted."""

    function = packed_metadata = None

    def __init__(self, name: str, seen: Seen) -> None:
        self.name, self.seen = name, seen

    def launch_metadata(self, *arguments: Any) -> None:
        pass

    def run(self, *arguments: Any) -> None:
        self.seen.launched.append(self.name)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.run


class Seen:
    def __init__(self) -> None:
        self.compiled: set[tuple[str, str]] = set()
        self.searched: list[str] = []  # by Triton, among the kernels that it has compiled
        self.launched: list[str] = []


@pytest.fixture(autouse=True)
def no_gpu() -> Iterator[None]:
    _plan.forget()
    with active(Offline()), fused_elbo.backend("triton"):
        yield
    _plan.forget()


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    found, run = Seen(), JITFunction.run

    def compiles(kernel: Any, key: str, *arguments: Any, **kw: Any) -> Compiled:
        found.compiled.add((kernel.__name__, key))
        return Compiled(kernel.__name__, found)

    def searches(kernel: Any, *arguments: Any, **kw: Any) -> Any:
        found.searched.append(kernel.__name__)
        return run(kernel, *arguments, **kw)

    monkeypatch.setattr(JITFunction, "_do_compile", compiles)
    monkeypatch.setattr(JITFunction, "run", searches)
    return found


def tensors(batch: int = 4, dims: int = 64, latents: int = 8, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    shapes = (dims, dims, latents, latents)
    return [torch.zeros(batch, n, dtype=dtype, requires_grad=i != 1) for i, n in enumerate(shapes)]


def step(given: list[Tensor], **options: Any) -> None:
    decoupled_elbo(*given, **options).loss.backward()


STEP = ["elbo_stats_kernel", "elbo_grads_kernel"]


def test_triton_is_asked_once(seen: Seen) -> None:
    for _ in range(3):
        step(tensors())
    assert seen.searched == STEP
    assert seen.launched == 3 * STEP
    for _ in range(3):
        decoupled_elbo_backward(*tensors())
    assert seen.searched == [*STEP, "elbo_step_kernel"]


def test_numbers_that_change_need_no_other_plan(seen: Seen) -> None:
    for i in range(1, 5):
        step(tensors(), beta=float(i), min_log_sigma=-i, capacity=10.0 * i, free_bits=0.1 * i)
    for i in range(1, 5):
        decoupled_elbo_backward(*tensors(), beta=float(i), grad_scale=float(i))
    assert seen.searched == [*STEP, "elbo_step_kernel"]


def misaligned(t: Tensor) -> Tensor:
    return torch.zeros(t.numel() + 1)[1:].view(t.shape).requires_grad_(t.requires_grad)


def apart(t: Tensor) -> Tensor:
    return torch.zeros(t.shape[0], t.shape[1] + 4)[:, : t.shape[1]].requires_grad_()


@pytest.mark.parametrize(
    "other",
    [
        lambda: step([misaligned(t) for t in tensors()]),
        lambda: step([apart(t) for t in tensors()]),
        lambda: step(tensors(batch=5)),
        lambda: step(tensors(dtype=torch.bfloat16)),
        lambda: step(tensors(), beta=torch.ones(())),
        lambda: step(tensors(), sigma="optimal-per-image"),
        lambda: step(tensors(), free_bits=0.1),
        lambda: step(tensors(), capacity=1.0),
    ],
    ids=["alignment", "strides", "batch", "dtype", "beta", "sigma", "free_bits", "capacity"],
)
def test_what_launches_depend_on(other: Callable[[], None], seen: Seen) -> None:
    step(tensors())
    other()
    assert seen.searched == 2 * STEP


def test_gradients_that_are_wanted_and_given(seen: Seen) -> None:
    step(tensors())
    step([t.detach().requires_grad_(i == 0) for i, t in enumerate(tensors())])
    elbo = decoupled_elbo(*tensors())
    (elbo.loss + elbo.rate).backward()
    assert seen.searched == [*STEP, STEP[1], STEP[1]]


def test_tritons_settings(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    step(tensors())
    monkeypatch.setattr(triton.knobs.runtime, "debug", True)
    step(tensors())
    assert seen.searched == 2 * STEP
    assert len(seen.compiled) == 4


@pytest.mark.parametrize("one_pass", [False, True], ids=["two launches", "one launch"])
def test_varied_batches_need_few_kernels(one_pass: bool, seen: Seen) -> None:
    """400 batches of sequences, 80 numbers at each of 20 to 1000 places; each compilation takes a second or more."""
    varied = random.Random(0)
    for _ in range(400):
        batch, places = varied.randint(4, 64), varied.randint(20, 1000)
        shapes = (80 * places, 80 * places, 16, 16)
        given = [torch.empty(batch, n).requires_grad_(i != 1) for i, n in enumerate(shapes)]
        if one_pass:
            decoupled_elbo_backward(*given)
        else:
            step(given)
    assert 10 < len(seen.compiled) <= 45


def test_plans_are_few(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    for latents in range(1, _plan.MOST + 20):
        gaussian_kl(torch.zeros(1, latents), torch.zeros(1, latents))
    assert operators.Forward.cache_info().currsize == _plan.MOST


def test_several_threads(seen: Seen) -> None:
    together, failures = threading.Barrier(8), []

    def work() -> None:
        together.wait()
        try:
            for batch in range(1, 20):
                step(tensors(batch))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(seen.launched) == 8 * 19 * 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:This process")
def test_a_fork_starts_anew(seen: Seen) -> None:
    """The child has no right to what its parent has loaded onto a GPU."""
    step(tensors())
    child = os.fork()
    if not child:
        os._exit(operators.Forward.cache_info().currsize)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert operators.Forward.cache_info().currsize == 1


def test_memory_between_programs_is_kept_for_the_default_stream_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The streams are pretended. What is kept may not lie in the memory of a CUDA graph, and not be much."""
    stream, gpu = mock.Mock(cuda_stream=0), torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(_grid, "barrier_of", lambda device: torch.zeros(2))

    def of(numbers: int) -> _grid.Scratch:
        return _grid.Scratch(gpu, lambda: Partials(torch.empty(numbers), None, None, None), lambda: torch.empty(8))

    small, large = of(64), of(_grid.MOST_KEPT // 4)
    kept = small()
    assert small() is kept
    assert large() is not large()
    stream.cuda_stream = 1
    others = [small(), small()]
    assert len({id(each.partials.a) for each in (kept, *others)}) == 3
    stream.cuda_stream = 0
    assert small() is kept


VDVAE = [16, 256, 256, 1024, 1024, 4096, 4096, 4096, 16384, 16384, 16384] * 4  # latents of levels


def hierarchy(sizes: list[int], batch: int = 2) -> tuple[list[Tensor], list[Tensor], list[Any]]:
    mu, logvar, *prior = ([torch.zeros(batch, n, requires_grad=True) for n in sizes] for _ in range(4))
    return mu, logvar, list(zip(*prior, strict=True))


LEVELS, LEVELS_GRADS = ["elbo_levels_kernel"], ["elbo_levels_grads_kernel"]


@pytest.mark.parametrize("per_level", [False, True])
def test_43_levels_are_six_launches_of_two_kernels(per_level: bool, seen: Seen) -> None:
    mu, logvar, prior = hierarchy(VDVAE[:43])
    for _ in range(2):
        gaussian_kl(mu, logvar, prior=prior, per_level=per_level).sum().backward()
    assert seen.launched == 2 * (3 * LEVELS + 3 * LEVELS_GRADS)
    assert seen.searched == 3 * LEVELS + 3 * LEVELS_GRADS
    assert len(seen.compiled) == 2


def test_levels_that_are_not_alike_take_launches_of_their_own(seen: Seen) -> None:
    """A level without a prior, one of a length that 4 does not divide, and one of another dtype."""
    mu, logvar, prior = hierarchy([16, 16, 16, 15, 16])
    prior[1] = None
    mu[2], logvar[2], prior[2] = mu[2].bfloat16(), logvar[2].bfloat16(), tuple(p.bfloat16() for p in prior[2])
    gaussian_kl(mu, logvar, prior=prior).backward()
    assert seen.launched == 4 * LEVELS + 4 * LEVELS_GRADS


SUMS, TOTALS = ["aggregate_sums_kernel"], ["aggregate_totals_kernel"]
GRADS, GRADS_TOTALS = ["aggregate_shares_kernel", "aggregate_grads_kernel"], ["aggregate_grads_totals_kernel"]


@pytest.mark.parametrize("sizes", [(64, 10), (256, 32), (512, 64), (2048, 128), (4000, 16)], ids=str)
def test_launches_of_the_aggregate_posterior(sizes: tuple[int, int], seen: Seen) -> None:
    """At most two forward, and three backward, whatever the weights: programs that share a sum need one more."""
    given = [torch.zeros(sizes, requires_grad=True) for _ in range(3)]
    for size in (None, 5000, 6000):
        sums = log_aggregate_posterior(*given, dataset_size=size)
        torch.autograd.grad(sums, given, [torch.ones_like(t) for t in sums])
    each = seen.launched[: len(seen.launched) // 3]
    assert seen.launched == 3 * each
    assert each == (SUMS + GRADS if sizes[0] == 64 else SUMS + TOTALS + GRADS + GRADS_TOTALS)
    assert seen.searched == 2 * each  # a number that changes needs no other plan, but unequal weights do
    seen.launched.clear()
    joint, marginals = log_aggregate_posterior(*given)
    joint.sum().backward(retain_graph=True)
    marginals.sum().backward()
    assert seen.launched.count("aggregate_shares_kernel") == 1


def test_points_beyond_memory_for_their_shares(seen: Seen) -> None:
    """64 MiB of them at a time."""
    given = [torch.zeros(9000, 2, requires_grad=True) for _ in range(3)]
    log_aggregate_posterior(*given)[0].sum().backward()
    assert seen.launched == SUMS + TOTALS + 5 * GRADS + GRADS_TOTALS


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_levels_copy_nothing(seen: Seen) -> None:
    """A CUDA graph can have it all: no table of pointers is sent to the GPU."""
    mu, logvar, prior = hierarchy(VDVAE[:43])
    for operations in (Operations(), Operations()):
        with operations:
            rates = gaussian_kl(mu, logvar, prior=prior, per_level=True, reduction="none")
            torch.autograd.grad(rates, [*mu, *logvar], torch.ones_like(rates))
    assert operations.seen <= {"empty_strided", "empty_like", "ones_like", "detach"}


# ------------------------------------------------------------------------------------------ with kernels that compile


def rate() -> Tensor:
    return gaussian_kl(torch.zeros(2, 8), torch.zeros(2, 8), free_bits=0.1)


def test_hooks_see_every_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of profilers, which see a compiled kernel, and those of a kernel before it is looked for."""
    launched: list[str] = []
    monkeypatch.setattr(
        triton.knobs.runtime, "launch_enter_hook", lambda metadata: launched.append(metadata.get()["name"])
    )
    for _ in range(3):
        rate()
    assert launched == 3 * ["elbo_stats_kernel"]
    from fused_elbo.kernels import elbo_stats

    before: list[int] = []
    monkeypatch.setattr(elbo_stats.elbo_stats_kernel, "pre_run_hooks", [lambda *a, **kw: before.append(1)])
    for _ in range(2):
        rate()
    assert len(before) == 2


def test_a_constant_that_changes_is_tritons_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from fused_elbo.kernels import _factors, elbo_finalize

    rate()
    for module in (_factors, elbo_finalize):
        monkeypatch.setattr(module, "IMAGE", triton.language.constexpr(7))
    with pytest.raises(RuntimeError, match="Global variable IMAGE has changed"):
        rate()
