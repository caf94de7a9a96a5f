"""How csrc/cuda cuts a batch for its two passes, and the aggregate posterior for its warps: csrc/cuda/schedule.h and
aggregate_cut.h, for GPUs that need not be here."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import cuda_shim
import pytest

pytestmark = pytest.mark.skipif(cuda_shim.compiler() is None, reason="there is no C++ compiler")

PROGRAM = """
#include <cstdio>
#include "cuda/schedule.h"

int main() {
  long long dims, batch, resident;
  while (scanf("%lld %lld %lld", &dims, &batch, &resident) == 3) {
    const auto c = elbo::chunks_of(dims, batch);
    const long long size = c.size, per_sample = c.per_sample, blocks = elbo::blocks_for(c.count, resident);
    printf("%lld %lld %lld\\n", size, per_sample, blocks);
  }
}
"""
MIXTURES = """
#include <cstdio>
#include "cuda/aggregate_cut.h"

int main() {
  long long lanes, others, latents;
  while (scanf("%lld %lld %lld", &lanes, &others, &latents) == 3) {
    const auto c = elbo::aggregate_cut(lanes, others, latents, elbo::kAggregateTile<float>);
    const long long all[] = {c.lane_blocks, c.tiles, c.segments, c.latents, c.warps, c.groups, c.blocks()};
    for (long long n : all) printf("%lld ", n);
    printf("\\n");
  }
}
"""
ROW = 256  # elements: 128 bits of a half dtype for every lane
WARPS = 8  # of a block
RESIDENT = 3 * 132  # blocks of elbo_grads on an H100
SIZES = [
    (dims, batch)
    for dims in (1, 64, 784, 1025, 12288, 196608, 3 * 17 * 256 * 256)
    for batch in (1, 3, 16, 64, 128, 512, 4096)
]


def compiled(folder: Path, text: str) -> Path:
    (folder / "schedule.cpp").write_text(text)
    command = [*shlex.split(cuda_shim.compiler() or ""), "-std=c++17", f"-I{cuda_shim.CSRC}"]
    subprocess.run([*command, "schedule.cpp", "-o", "schedule"], cwd=folder, check=True)
    return folder / "schedule"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("schedule"), PROGRAM)


def schedules(program: Path, sizes: list[tuple[int, int]], resident: int = RESIDENT) -> list[tuple[int, int, int]]:
    """(elements of a chunk, chunks of a sample, blocks) of each."""
    text = "\n".join(f"{dims} {batch} {resident}" for dims, batch in sizes)
    said = subprocess.run([str(program)], input=text, capture_output=True, text=True, check=True).stdout
    return [tuple(map(int, line.split())) for line in said.splitlines()]  # type: ignore[misc]


def test_chunks_hold_a_sample_and_are_of_one_length(program: Path) -> None:
    for (dims, _), (size, per_sample, _) in zip(SIZES, schedules(program, SIZES), strict=True):
        assert size % ROW == 0
        assert (per_sample - 1) * size < dims <= per_sample * size
        assert per_sample * size - dims < per_sample * ROW  # what the last one lacks, all could have in less than a row


def test_small_batches_have_warps_for_a_gpu_and_large_ones_few_sums(program: Path) -> None:
    for (dims, batch), (size, per_sample, _) in zip(SIZES, schedules(program, SIZES), strict=True):
        chunks = batch * per_sample
        assert chunks <= 8192 + batch  # a sample has at least one
        if 2**20 <= dims * batch <= 2**23 and dims >= 4096:
            assert chunks >= 1500
        assert size <= max(4096, dims * batch / 8192) + ROW


def test_blocks_are_resident_and_have_as_much_work_as_one_another(program: Path) -> None:
    for resident in (1, 2 * 108, RESIDENT, 8 * 148):
        for (_, batch), (_, per_sample, blocks) in zip(SIZES, schedules(program, SIZES, resident), strict=True):
            chunks = batch * per_sample
            rounds = -(-chunks // (blocks * WARPS))
            assert 1 <= blocks <= resident
            assert rounds == -(-chunks // (resident * WARPS))  # fewer blocks take no longer
            assert (blocks - 1) * WARPS * rounds < chunks  # and one block less would


def test_no_chunks_have_no_blocks(program: Path) -> None:
    assert schedules(program, [(0, 64)]) == [(0, 0, 0)]


def test_the_model_of_the_cache_has_the_same(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="bench/proof/l2.py also has Triton's tiles")
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "bench" / "proof")
    from l2 import Cuda

    for (dims, batch), (size, per_sample, blocks) in zip(SIZES, schedules(program, SIZES), strict=True):
        assert Cuda.chunks_of(dims, batch) == (size, per_sample)
        assert Cuda.blocks_for(per_sample * batch, RESIDENT) == blocks


def test_the_aggregate_posterior_has_blocks_for_a_gpu_and_few_sums(tmp_path: Path) -> None:
    """256 blocks are two for each SM of an H100; what has fewer tiles has a block for each."""
    sizes = [
        (lanes, others, latents)
        for lanes in (1, 5, 64, 256, 512, 2048, 4000, 100000)
        for others in (1, 5, 64, 256, 512, 2048, 4000, 100000)
        for latents in (1, 2, 3, 10, 16, 32, 64, 100, 128, 700)
    ]
    text = "\n".join(" ".join(map(str, size)) for size in sizes)
    said = subprocess.run([str(compiled(tmp_path, MIXTURES))], input=text, capture_output=True, text=True, check=True)
    for (lanes, others, latents), line in zip(sizes, said.stdout.splitlines(), strict=True):
        lane_blocks, tiles, segments, of_warp, warps, groups, blocks = map(int, line.split())
        all_tiles = -(-others // 16)
        assert lane_blocks == -(-lanes // 32)
        assert (segments - 1) * tiles < all_tiles <= segments * tiles
        assert latents <= of_warp * warps
        assert warps * groups in (1, 2, 4, 8)
        assert blocks >= min(256, lane_blocks * all_tiles) * 0.9
        if lane_blocks * all_tiles >= 256:
            assert of_warp * warps <= 1.25 * latents
            assert warps * groups == 8 or lane_blocks * all_tiles < 8 * 256
        if lanes == others == 2048 and latents <= 128:
            partials = [segments * lanes * (latents + 1) * 2 * 4, segments * (lanes + 2 * others) * latents * 4]
            assert max(partials) <= 32 << 20
