"""What fits on chip for the step in one pass: csrc/cuda/step_plan.h, for GPUs that need not be here."""

from __future__ import annotations

import math
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

import cuda_shim
import pytest

pytestmark = pytest.mark.skipif(cuda_shim.compiler() is None, reason="there is no C++ compiler")

PROGRAM = """
#include <cstdio>
#include "cuda/step_plan.h"

int main() {
  long long elements, latents, shared;
  int vector, multiprocessors;
  while (scanf("%lld %lld %d %d %lld", &elements, &latents, &vector, &multiprocessors, &shared) == 5) {
    const auto p = elbo::step_plan(elements, latents, vector, multiprocessors, shared);
    printf("%d %d %d %d %lld\\n", p.fits, p.data_blocks, p.latent_blocks, p.rows, (long long)p.shared_bytes);
  }
}
"""
WARPS, LANES, HELD = 16, 32, 56  # of a block, of a warp, floats in a thread's registers
BESIDES = 1024  # bytes of shared memory that the kernel has anyway


@dataclass(frozen=True)
class Gpu:
    """Sizes from the CUDA programming guide's table of compute capabilities and the vendors' data sheets."""

    multiprocessors: int
    shared_kib: int  # that a block may ask for
    limit: int  # elements of recon that fit

    @property
    def shared(self) -> int:
        return self.shared_kib * 1024 - BESIDES


# (multiprocessors − 1) blocks of 512 threads with 56 floats in registers and 80 or 112 in shared memory.
GPUS = {
    "A100": Gpu(108, 163, 107 * 512 * 136),
    "H100": Gpu(132, 227, 131 * 512 * 168),
    "B200": Gpu(148, 227, 147 * 512 * 168),
}


@dataclass(frozen=True)
class Plan:
    fits: bool
    data_blocks: int
    latent_blocks: int
    rows: int
    shared_bytes: int


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    (folder / "plan.cpp").write_text(PROGRAM)
    command = [*shlex.split(cuda_shim.compiler() or ""), "-std=c++17", f"-I{cuda_shim.CSRC}", "plan.cpp", "-o", "plan"]
    subprocess.run(command, cwd=folder, check=True)
    return folder / "plan"


def plans(program: Path, asked: list[tuple[int, int, int, int, int]]) -> list[Plan]:
    text = "\n".join(" ".join(map(str, numbers)) for numbers in asked)
    said = subprocess.run([str(program)], input=text, capture_output=True, text=True, check=True).stdout
    lines = [list(map(int, line.split())) for line in said.splitlines()]
    return [Plan(bool(fits), *rest) for fits, *rest in lines]


@pytest.mark.parametrize("vector", [4, 8])
@pytest.mark.parametrize("name", GPUS)
def test_the_limit(name: str, vector: int, program: Path) -> None:
    gpu = GPUS[name]
    asked = [(gpu.limit + more, 64, vector, gpu.multiprocessors, gpu.shared) for more in (0, 1)]
    fits, too_large = plans(program, asked)
    assert fits.fits
    assert not too_large.fits


@pytest.mark.parametrize("vector", [4, 8])
@pytest.mark.parametrize("name", GPUS)
def test_every_element_has_its_place_and_every_block_its_multiprocessor(name: str, vector: int, program: Path) -> None:
    gpu = GPUS[name]
    sizes = [1, 31, 128, 5000, 57344, 57345, 786432, 3_000_001, gpu.limit // 2, gpu.limit]
    asked = [(n, k, vector, gpu.multiprocessors, gpu.shared) for n in sizes for k in (0, 1, n // 50, n // 3, n)]
    found = plans(program, asked)
    assert sum(plan.fits for plan in found) > len(sizes) * 3
    for (elements, latents, *_), plan in zip(asked, found, strict=True):
        if not plan.fits:
            assert elements > gpu.limit // 3  # or latents took too many blocks from the data
            continue
        assert plan.data_blocks >= 1
        assert plan.latent_blocks >= 1
        assert plan.data_blocks + plan.latent_blocks <= gpu.multiprocessors
        assert plan.data_blocks * WARPS * plan.rows * LANES * vector >= elements
        beyond = max(0, plan.rows - HELD // vector)
        assert plan.shared_bytes == beyond * vector * WARPS * LANES * 4 <= gpu.shared
        assert abs(plan.latent_blocks - gpu.multiprocessors * latents / (elements + latents)) <= 1


def test_a_device_of_one_multiprocessor_has_no_place_for_both(program: Path) -> None:
    assert not plans(program, [(100, 10, 4, 1, 1 << 17)])[0].fits


def test_the_estimates_have_the_same_limit(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="bench/proof/estimates.py also has Triton's tiles")
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "bench" / "proof")
    import estimates
    from l2 import Cuda

    for batch, data, latents, *_ in estimates.DESK_CHECK:
        dims = math.prod(data)
        numbers = (batch * dims, batch * latents, 4, estimates.SMS, GPUS["H100"].shared)
        assert plans(program, [numbers])[0].fits == estimates.fits(Cuda(batch, dims, "fp32"), latents)
