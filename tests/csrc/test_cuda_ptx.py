"""The CUDA kernels as nvcc compiles them: their PTX is executed on the CPU, checked, and its traffic counted.

N are the bytes of recon and of target, each; L those of mu and of logvar, each. Forward and backward read 2N + 2L and
write N + 2L; two passes read all again. What is O(batch) comes on top and must fit in the 2%. The grid barrier's word
is counted apart: a thread of each block asks for it until the others are there, as often as the executor makes it.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import cuda_shim
import pytest
import torch
from cuda_shim import CSRC
from mutants import Mutant, copy

from fused_elbo import reference
from fused_elbo.call import GradOutputs, Options, Tensors
from fused_elbo.likelihood import Activation
from fused_elbo.rate import Kind as Limit
from fused_elbo.sigma import Kind

if "cuda_plugin" not in sys.modules:
    pytest.skip("minutes of compiling, which `make test-cuda` takes", allow_module_level=True)
from cuda_plugin import kept_folder

ptxemu = pytest.importorskip("ptxemu", reason="there is no executor of PTX on the path (ptxemu)")
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(NVCC is None, reason="no nvcc on this machine (PATH, /usr/local/cuda)"),
]
SOURCE, SOURCE_MIXED = (Path(__file__).with_name(f"{stem}.cu") for stem in ("cuda_ptx", "cuda_ptx_mixed"))

THREADS, STEP_THREADS, FINALIZE_THREADS = 256, 512, 1024  # as in csrc/cuda
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BETA, GRAD_SCALE, FLOOR = 1.5, 3.0, -7.0
SECTOR = 32  # bytes
WIDEST = 32 * 16  # bytes: 128 bits of every lane


def compiled(config: pytest.Config, arch: int, csrc: Path = CSRC, source: Path = SOURCE) -> dict[str, Any]:
    """The kernels of a file beside this one by name. Their PTX is kept, see cuda_plugin.kept_folder."""
    flags = ["-std=c++17", "-O3", "-fmad=false", f"-arch=compute_{arch}", "-ptx"]
    version = subprocess.run([str(NVCC), "--version"], check=True, capture_output=True).stdout
    header = source.with_name("cuda_ptx.h").read_bytes()
    made_from = (version, flags, torch.__version__, source.read_bytes(), header, cuda_shim.code(csrc))

    def compile_(ptx: Path) -> None:
        includes = [f"-I{csrc}", f"-I{Path(torch.__file__).parent / 'include'}"]
        command = [str(NVCC), *flags, *includes, str(source), "-o", str(ptx)]
        subprocess.run(command, check=True, capture_output=True)

    ptx = cuda_shim.made_once(kept_folder(config) / f"kernels-{cuda_shim.digest(*made_from)}.ptx", compile_)
    return ptxemu.Module(ptx.read_text()).kernels


seldom = pytest.mark.release("nvcc's PTX for every architecture")
ARCHITECTURES = [pytest.param(arch, marks=() if arch == 90 else seldom, id=f"sm_{arch}") for arch in (80, 90, 100)]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def kernels(request: pytest.FixtureRequest) -> dict[str, Any]:
    return compiled(request.config, request.param)


def bits(t: torch.Tensor) -> Any:
    """An array of the same bits: numpy has no bfloat16."""
    return (t.view(torch.int16) if t.dtype == torch.bfloat16 else t).numpy().copy()


@contextmanager
def barrier_apart() -> Iterator[list[int]]:
    """[bytes of the grid barrier's word]."""
    access, counted = ptxemu.Exec.mem, [0]

    def mem(execution: Any, space: str, address: Any, size: int, lanes: Any, write: bool) -> Any:
        word = execution.k.ws
        if word and space in ("global", "generic") and word <= address[0] < word + 256:
            counted[0] += size * len(lanes)
        return access(execution, space, address, size, lanes, write)

    with mock.patch.object(ptxemu.Exec, "mem", mem):
        yield counted


@dataclass
class Step:
    """The tensors of a training step, and what came of the kernels that have run."""

    name: str
    batch: int
    dims: int
    latents: int
    seed: int | None = None
    step_threads: int = STEP_THREADS
    moved: dict[str, int] = field(default_factory=dict)
    used: dict[str, float] = field(default_factory=dict)  # of each sector
    width: dict[str, float] = field(default_factory=dict)  # bytes of a warp's access

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        dtype = DTYPES[self.name]
        target = torch.randn(self.batch, self.dims)
        recon = target + 0.3 * torch.randn(self.batch, self.dims)
        latents = [torch.randn(self.batch, self.latents) for _ in range(2)]
        self.inputs = [t.to(dtype) for t in (recon, target, *latents)]
        self.given = [bits(t) for t in self.inputs]
        self.out = torch.full((4,), float("nan")).numpy()
        self.gradients = [bits(torch.full_like(self.inputs[i], float("nan"))) for i in (0, 2, 3)]
        self.chunks = [-(-n // 4096) for n in (self.dims, self.latents)]

    @property
    def tensors(self) -> list[Any]:
        return [*self.given, self.batch, self.dims, 4096, self.latents, 4096]

    def launch(self, kernel: Any, blocks: int, threads: int, *args: Any, **options: Any) -> None:
        with barrier_apart() as barrier:
            done = ptxemu.launch(kernel, (blocks,), (threads,), list(args), seed=self.seed, **options)
        name = kernel.name.partition("_")[0]
        self.moved[name] = done["read_bytes"] + done["written_bytes"] - barrier[0]
        self.used[name] = self.moved[name] / (SECTOR * (done["sectors"] - barrier[0] // 4))
        self.width[name] = self.moved[name] / (done["requests"] - barrier[0] // 4)

    def in_two_passes(self, kernels: dict[str, Any]) -> None:
        s, kl = (torch.full((self.batch * n,), float("nan")).numpy() for n in self.chunks)
        stats = torch.full((3, self.batch + 1), float("nan")).numpy()
        blocks = -(-self.batch * sum(self.chunks) // (THREADS // 32))
        self.launch(kernels[f"stats_{self.name}"], blocks, THREADS, *self.tensors, s, kl)
        sizes = (self.batch, self.dims, *self.chunks)
        self.launch(kernels["finalize"], 1, FINALIZE_THREADS, *sizes, BETA, s, kl, self.out, stats)
        factors = (stats, BETA, GRAD_SCALE)
        self.launch(kernels[f"grads_{self.name}"], blocks, THREADS, *self.tensors, *factors, *self.gradients)

    def in_one_pass(self, kernels: dict[str, Any], data_blocks: int) -> None:
        vector = 16 // self.inputs[0].element_size()
        rows = -(-self.batch * self.dims // (data_blocks * self.step_threads * vector))
        shared = max(0, rows - 56 // vector) * vector * self.step_threads * 4
        kl = torch.full((self.batch * self.chunks[1],), float("nan")).numpy()
        workspace = torch.full((data_blocks + 2,), float("nan"), dtype=torch.float64).numpy()
        plan = (BETA, GRAD_SCALE, data_blocks, 1, rows)
        self.launch(
            kernels[f"step_{self.name}"], data_blocks + 1, self.step_threads,
            *self.tensors, *plan, kl, workspace, self.out, *self.gradients, shmem=shared, cooperative=True,
        )  # fmt: skip

    def of_each(self, kernels: dict[str, Any], kind: str, data_blocks: int = 0) -> None:
        """One pass where samples have nothing to agree on; blocks for the data of `image`, then some for the rest."""
        s, kl = (torch.full((self.batch * n,), float("nan")).numpy() for n in self.chunks)
        shared = self.dims * 4 if kind == "image" else 0
        args = (BETA, GRAD_SCALE, data_blocks, s, kl, *self.gradients)
        self.launch(kernels[f"{kind}_{self.name}"], data_blocks + 1, STEP_THREADS, *self.tensors, *args, shmem=shared)
        self.sums = [s[: self.batch] if kind == "image" else s.reshape(self.batch, -1).sum(1), kl]

    def as_reference(self, inputs: list[torch.Tensor]) -> Tensors:
        return Tensors(*inputs)

    def options(self, kind: Kind) -> Options:
        return Options(sigma_mode=int(kind), min_log_sigma=FLOOR, beta_value=BETA)

    def check(self, kind: Kind = Kind.BATCH) -> None:
        """Against the reference in fp64."""
        inputs = [t.double() for t in self.inputs]
        tensors, options = self.as_reference(inputs), self.options(kind)
        *outputs, stats = reference.forward(tensors, options)
        if kind == Kind.BATCH:
            for got, true in zip(self.out, outputs, strict=True):
                assert got == pytest.approx(true.item(), rel=2e-6)
        else:
            for got, true in zip(self.sums, stats, strict=False):
                assert got.tolist() == pytest.approx(true[:-1].tolist(), rel=2e-6)
        scale = torch.tensor(GRAD_SCALE, dtype=torch.float64)
        true = reference.gradients(tensors, options, stats, GradOutputs(scale))
        for got, wanted in zip(self.gradients, (true.recon, true.mu, true.logvar), strict=True):
            dtype = DTYPES[self.name]
            tensor = torch.from_numpy(got)
            tensor = tensor.view(dtype) if dtype == torch.bfloat16 else tensor
            tolerance = 2e-6 if dtype == torch.float32 else 2.0**-8
            assert wanted is not None
            torch.testing.assert_close(tensor.double(), wanted, rtol=tolerance, atol=tolerance * 1e-3)

    def size(self, data: int, latents: int) -> int:
        recon, mu = self.inputs[0], self.inputs[2]
        return data * recon.numel() * recon.element_size() + latents * mu.numel() * mu.element_size()


class MixedStep(Step):
    """What cuda_ptx_mixed.cu has: options there, and here as the reference takes them."""

    EXTRA, CAPACITY, LEAST, MOST = 7.0, 1000.0, -0.5, 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.bytes = torch.randint(0, 256, (self.batch, self.dims), dtype=torch.uint8)
        self.mask = torch.rand(self.batch, self.dims) > 0.3
        self.masked = False
        self.activation = int(Activation.SIGMOID if self.name == "fp32" else Activation.TANH)

    @property
    def tensors(self) -> list[Any]:
        given = [self.bytes.numpy(), self.mask.numpy().view("uint8"), 0, self.activation, BETA, GRAD_SCALE]
        return [*super().tensors, *given]

    def in_two_passes(self, kernels: dict[str, Any]) -> None:
        self.masked = True
        s, kl, n = (torch.full((self.batch * c,), float("nan")).numpy() for c in (*self.chunks, self.chunks[0]))
        stats = torch.full((4, self.batch + 1), float("nan")).numpy()
        blocks = -(-self.batch * sum(self.chunks) // (THREADS // 32))
        self.launch(kernels[f"stats_{self.name}"], blocks, THREADS, *self.tensors, s, kl, n, *self.gradients)
        sizes = (self.batch, self.dims, *self.chunks)
        self.launch(kernels["finalize"], 1, FINALIZE_THREADS, *sizes, BETA, s, kl, n, self.out, stats)
        self.launch(kernels[f"grads_{self.name}"], blocks, THREADS, *self.tensors, stats, *self.gradients)

    def in_one_pass(self, kernels: dict[str, Any], data_blocks: int) -> None:
        self.masked = False
        vector = 16 // self.inputs[0].element_size()
        rows = -(-self.batch * self.dims // (data_blocks * self.step_threads * vector))
        shared = rows * vector * self.step_threads * 4
        kl = torch.full((self.batch * self.chunks[1],), float("nan")).numpy()
        workspace = torch.full((data_blocks + 2,), float("nan"), dtype=torch.float64).numpy()
        args = (*self.tensors, data_blocks, rows, kl, workspace, self.out, *self.gradients)
        kernel = kernels[f"step_{self.name}"]
        self.launch(kernel, data_blocks + 1, self.step_threads, *args, shmem=shared, cooperative=True)

    def of_each(self, kernels: dict[str, Any], kind: str, data_blocks: int = 0) -> None:
        self.masked = kind == "given"
        s, kl, n = (torch.full((self.batch * c,), float("nan")).numpy() for c in (*self.chunks, self.chunks[0]))
        args = (s, kl, n) if self.masked else (data_blocks, s, kl)
        shared = 0 if self.masked else self.dims * 4
        kernel = kernels[f"{kind}_{self.name}"]
        self.launch(kernel, data_blocks + 1, STEP_THREADS, *self.tensors, *args, *self.gradients, shmem=shared)
        self.sums = [(s.reshape(self.batch, -1).sum(1) if self.masked else s[: self.batch]) + self.EXTRA, kl]

    def as_reference(self, inputs: list[torch.Tensor]) -> Tensors:
        extra = torch.tensor(self.EXTRA, dtype=torch.float64)
        tensors = Tensors(*inputs)._replace(target=self.bytes, extra_error=extra)
        return tensors._replace(weight=self.mask) if self.masked else tensors

    def options(self, kind: Kind) -> Options:
        limit = Limit.BATCH_CAPACITY if kind == Kind.BATCH else Limit.NONE
        return super().options(kind)._replace(
            exponent=1, activation=self.activation, target_low=-1.0, target_high=1.0, logvar_min=self.LEAST,
            logvar_max=self.MOST, limit_mode=int(limit), limit_value=self.CAPACITY,
        )  # fmt: skip


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", DTYPES)
def test_elements_of_more_than_two_numbers(name: str, arch: int, pytestconfig: pytest.Config) -> None:
    kernels = compiled(pytestconfig, arch, source=SOURCE_MIXED)
    step = MixedStep(name, batch=3, dims=2056, latents=64, seed=1)
    step.in_two_passes(kernels)
    step.check()
    # recon twice, its gradient once; bytes and mask twice
    expected = step.size(3, 6) + 4 * step.bytes.numel()
    ratio = sum(step.moved.values()) / expected
    print(f"{step.moved}, {ratio:.4f} of what must be moved; sectors used {step.used}; bytes of an access {step.width}")
    assert 1.0 <= ratio <= 1.05
    step.of_each(kernels, "given")
    step.check(Kind.GIVEN)
    step.of_each(kernels, "image", 2)
    step.check(Kind.IMAGE)
    step.in_one_pass(kernels, data_blocks=2)
    step.check()
    assert step.moved["step"] <= 1.05 * (step.size(2, 6) + step.bytes.numel())
    # Bytes of an element, and accesses that they come in. If each element had its own, the width would be a quarter;
    # sums and factors, which are narrow, are many beside so few elements. Without `image`, of which nvcc
    # makes narrow stores here, and in the library's kernel wide ones.
    item, four = step.inputs[0].element_size(), 4 * 32
    of_element = {"stats": (item + 2, 3), "given": (2 * item + 2, 4), "step": (2 * item + 1, 3)}
    of_element["grads"] = of_element["given"]
    for kernel, (size, accesses) in of_element.items():
        assert step.width[kernel] >= 0.7 * four * size / accesses


@pytest.mark.parametrize("name", DTYPES)
def test_two_passes_move_five_times_their_data(name: str, kernels: dict[str, Any]) -> None:
    step = Step(name, batch=5, dims=6144, latents=64)
    step.in_two_passes(kernels)
    step.check()
    ratio = sum(step.moved.values()) / step.size(5, 6)
    print(
        f"{step.moved}, {ratio:.4f} of 5N + 6L; sectors used {step.used}; bytes of an access {step.width}"
    )  # with pytest -s
    assert 1.0 <= ratio <= 1.02
    assert min(step.used["stats"], step.used["grads"]) >= 0.95
    assert min(step.width["stats"], step.width["grads"]) >= 0.9 * WIDEST


@pytest.mark.parametrize("name", DTYPES)
def test_one_pass_moves_three_times_its_data(name: str, kernels: dict[str, Any]) -> None:
    """The data are in registers and in shared memory; the last row is not full."""
    step = Step(name, batch=3, dims=30008, latents=64)
    step.in_one_pass(kernels, data_blocks=2)
    step.check()
    ratio = sum(step.moved.values()) / step.size(3, 6)
    print(f"{step.moved}, {ratio:.4f} of 3N + 6L; sectors used {step.used}; bytes of an access {step.width}")
    assert 1.0 <= ratio <= 1.02
    assert step.used["step"] >= 0.95
    assert step.width["step"] >= 0.9 * WIDEST


@pytest.mark.parametrize("name", DTYPES)
def test_latents_are_moved_128_bits_at_a_time(name: str, kernels: dict[str, Any]) -> None:
    """With few data beside them. A half dtype 64 bits at a time would come to half of the width."""
    step = Step(name, batch=4, dims=64, latents=4096)
    step.in_two_passes(kernels)
    step.check()
    step.in_one_pass(kernels, data_blocks=1)
    step.check()
    for kind, kernel in ((Kind.GIVEN, ("given",)), (Kind.IMAGE, ("image", 1))):
        step.of_each(kernels, *kernel)
        step.check(kind)
    print(f"bytes of an access {step.width}")
    assert min(step.width[kernel] for kernel in ("stats", "grads", "step", "given", "image")) >= 0.9 * WIDEST


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_one_pass_in_any_order(arch: int, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """With two warps in a block: with sixteen, of which most wait in turns, the executor is at it for minutes."""
    few = 64
    threads = Mutant("cuda/step_plan.h", "", "constexpr int kStepThreads = $N;", f"constexpr int kStepThreads = {few};")
    kernels = compiled(pytestconfig, arch, copy(CSRC, tmp_path / "csrc", threads))
    for name in DTYPES:
        for seed in (1, 2):
            step = Step(name, batch=3, dims=3080, latents=64, seed=seed, step_threads=few)
            step.in_one_pass(kernels, data_blocks=2)
            step.check()


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("kind", [Kind.GIVEN, Kind.IMAGE])
def test_one_pass_where_no_sample_needs_another(kind: Kind, name: str, kernels: dict[str, Any]) -> None:
    step = Step(name, batch=5, dims=6144, latents=64, seed=1)
    step.of_each(kernels, *(("given",) if kind == Kind.GIVEN else ("image", 2)))
    step.check(kind)
    (moved,), (used,), (width,) = (d.values() for d in (step.moved, step.used, step.width))
    print(f"{moved / step.size(3, 6):.4f} of 3N + 6L; sectors used {used}; bytes of an access {width}")
    assert 1.0 <= moved / step.size(3, 6) <= 1.02
    assert used >= 0.95
    assert width >= 0.9 * WIDEST


def test_a_missing_barrier_of_the_grid_is_noticed(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    # The others meet twice, and those with data once: they read what the last block has not told yet.
    second = [
        Mutant("cuda/elbo_step.cuh", role, "$GRID.sync();", "", place=(1, 2)) for role in ("data_role", "latent_role")
    ]
    csrc = copy(CSRC, tmp_path / "csrc", *second)
    step = Step("fp32", batch=3, dims=1024, latents=64, seed=1)
    step.in_one_pass(compiled(pytestconfig, 90, csrc), data_blocks=2)
    with pytest.raises(AssertionError):
        step.check()
