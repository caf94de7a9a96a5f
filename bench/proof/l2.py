"""What part of the bytes that the two passes move comes from memory, and what part from L2: a model, no measurement.

    python bench/proof/l2.py --out bench/proof

Writes l2.md. L2 is taken for an LRU cache as large as an H100's, empty at first. It is fed with what the kernels touch
in the order in which they do so: elbo_stats, then elbo_grads; of each as many programs at once as its registers, which
are read from the tables of machine code, leave room for on an SM; in the order of their launch, each by one step after
the other. A step is what a program asks for at once: a tile of Triton's, two turns of a warp of CUDA's.

The columns, for N bytes of recon:

- stats, grads: programs of the launch (Triton's, and CUDA's blocks), of those that an H100 runs at once.
- 5N: what the two launches read and write, in MB: recon and target twice, and recon's gradient.
- forward, backward: what comes from memory or goes there, if the second pass walked the data in the order of the first,
  and as it does, from the end. A gradient that is written is counted, whenever that reaches memory. Latents and sums
  are not counted.

What the model leaves out makes real caches worse (sets, two halves of L2 that keep copies for one another), or better
(what the decoder has just written is there before the first pass).
"""

from __future__ import annotations

import argparse
import csv
import itertools
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from machine_code import threads_per_sm

from fused_elbo.kernels._layout import WARPS, Tiles

HERE = Path(__file__).parent
LINE = 1024  # bytes that are held or not: two accesses of a warp, and no kernel asks for less of a large tensor at once
L2 = 50 << 20  # bytes; H100
SMS = 132
SHAPES = ((128, (3, 64, 64)), (512, (3, 64, 64)), (64, (3, 256, 256)))
ITEMSIZE = {"fp32": 4, "bf16": 2}
RECON, TARGET, GRADIENT = range(3)


# --------------------------------------------------------------------------------------------------------- the cache


class Lru:
    """A cache of so many lines, which forgets the one that was not touched for the longest time."""

    def __init__(self, lines: int) -> None:
        self._lines, self._held = lines, OrderedDict[tuple[int, int], None]()

    def touch(self, line: tuple[int, int]) -> bool:
        """Whether it was there; now it is."""
        held = line in self._held
        self._held[line] = None
        self._held.move_to_end(line)
        if len(self._held) > self._lines:
            self._held.popitem(last=False)
        return held


class Step(NamedTuple):
    """Lines (a tensor, its n-th) that a program touches at once."""

    reads: Sequence[tuple[int, int]]
    writes: Sequence[tuple[int, int]] = ()


def missed(cache: Lru, programs: Iterable[Iterator[Step]], resident: int) -> int:
    """Counts the lines that are read and were not there. `resident` programs take turns; where one ends the next one
    of those that wait begins."""
    waiting = iter(programs)
    active, misses = deque(itertools.islice(waiting, resident)), 0
    while active:
        step = next(active[0], None)
        if step is None:
            active.popleft()
            active.extend(itertools.islice(waiting, 1))
            continue
        misses += sum(not cache.touch(line) for line in step.reads)
        for line in step.writes:
            cache.touch(line)
        active.rotate(-1)
    return misses


# --------------------------------------------------------------------------------------------------------- the walks


def step(begin: int, end: int, itemsize: int, writes: bool) -> Step:
    """Of the elements from `begin` to `end`."""
    lines = range(begin * itemsize // LINE, -(-end * itemsize // LINE))
    reads = [(tensor, line) for tensor in (RECON, TARGET) for line in lines]
    return Step(reads, [(GRADIENT, line) for line in lines] if writes else [])


class Triton:
    """kernels/elbo_stats.py and elbo_grads.py: a program walks the tiles of its chunk."""

    name = "Triton"

    def __init__(self, batch: int, dims: int, dtype: str) -> None:
        self.batch, self.dims, self.itemsize = batch, dims, ITEMSIZE[dtype]
        self.tiles = Tiles.of(dims, batch, 16 // self.itemsize)
        case = "[large]" if self.tiles.per_chunk > 1 else ""
        rows = column("registers", "compiled.csv", dtype)
        self.at_once = [programs_at_once(rows[f"{kernel}{case}"], WARPS) for kernel in ("elbo_stats", "elbo_grads")]
        self.launched, self.resident = [self.tiles.programs(batch)] * 2, self.at_once

    def programs(self, writes: bool, backward: bool) -> Iterator[Iterator[Step]]:
        count = self.tiles.programs(self.batch)
        return (self.program(count - 1 - p if backward else p, writes) for p in range(count))

    def program(self, pid: int, writes: bool) -> Iterator[Step]:
        tiles = self.tiles
        first_row, chunk = pid // tiles.chunks * tiles.rows, pid % tiles.chunks
        rows = range(first_row, min(first_row + tiles.rows, self.batch))
        for tile in range(chunk * tiles.per_chunk, (chunk + 1) * tiles.per_chunk):
            begin, end = (min(n * tiles.cols, self.dims) for n in (tile, tile + 1))
            parts = [step(row * self.dims + begin, row * self.dims + end, self.itemsize, writes) for row in rows]
            yield Step(*(list(itertools.chain(*lines)) for lines in zip(*parts, strict=True)))


def up(n: int, by: int) -> int:
    return -(-n // by)


class Cuda:
    """csrc/cuda: a warp walks one chunk after the other. tests/csrc/test_cuda_schedule.py compares the arithmetic with
    csrc/cuda/schedule.h."""

    name = "CUDA"
    warps_of_block, row, least, most, enough, many = 8, 256, 512, 4096, 2048, 8192

    def __init__(self, batch: int, dims: int, dtype: str) -> None:
        self.batch, self.dims, self.itemsize = batch, dims, ITEMSIZE[dtype]
        self.size, self.per_sample = self.chunks_of(dims, batch)
        rows = column("registers", "compiled_cuda.csv", dtype)
        self.at_once = [programs_at_once(rows[k], self.warps_of_block) for k in ("elbo_stats", "elbo_grads")]
        self.launched = [self.blocks_for(self.per_sample * batch, blocks) for blocks in self.at_once]
        self.resident = [blocks * self.warps_of_block for blocks in self.launched]  # warps take turns

    @classmethod
    def chunks_of(cls, dims: int, batch: int) -> tuple[int, int]:
        """(elements of a chunk, chunks of a sample)."""
        elements = dims * batch
        longest = max(min(max(elements // cls.enough, cls.least), cls.most), elements // cls.many)
        size = cls.row * up(up(dims, up(dims, longest)), cls.row)
        return size, up(dims, size)

    @classmethod
    def blocks_for(cls, chunks: int, resident: int) -> int:
        rounds = up(chunks, resident * cls.warps_of_block)
        return up(chunks, rounds * cls.warps_of_block)

    def programs(self, writes: bool, backward: bool) -> Iterator[Iterator[Step]]:
        warps = self.resident[writes]
        return (self.warp(index, warps, writes, backward) for index in range(warps))

    def warp(self, index: int, warps: int, writes: bool, backward: bool) -> Iterator[Step]:
        turns, chunks = LINE // self.itemsize, self.per_sample * self.batch
        for i in range(index, chunks, warps):
            sample, own = divmod(chunks - 1 - i if backward else i, self.per_sample)
            first, last = (sample * self.dims + min(n * self.size, self.dims) for n in (own, own + 1))
            begins = range(first, last, turns)
            for begin in reversed(begins) if backward else begins:
                yield step(begin, min(begin + turns, last), self.itemsize, writes)


def column(name: str, table: str, dtype: str) -> dict[str, int]:
    """{kernel: its number} on an H100, from a table of machine code."""
    with (HERE / table).open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if (row["target"], row["dtype"]) == ("sm_90", dtype)]
    return {row["kernel"]: int(row[name]) for row in rows if row[name]}


def programs_at_once(registers: int, warps: int) -> int:
    return threads_per_sm(registers, warps) // (32 * warps) * SMS


# ---------------------------------------------------------------------------------------------------------- the table


def from_memory(kernels: Triton | Cuda, backward: bool) -> tuple[int, int]:
    """Bytes of the first pass, and of the second, that come from memory or go there."""
    cache = Lru(L2 // LINE)
    first = missed(cache, kernels.programs(False, False), kernels.resident[0])
    second = missed(cache, kernels.programs(True, backward), kernels.resident[1])
    return first * LINE, second * LINE + kernels.batch * kernels.dims * kernels.itemsize


def page() -> str:
    names = ("shape", "dtype", "kernels", "stats", "grads", "5N", "forward", "backward")
    lines = [f"| {' | '.join(names)} |", "|---|---|---|--:|--:|--:|--:|--:|"]
    for batch, image in SHAPES:
        dims = image[0] * image[1] * image[2]
        for dtype, itemsize in ITEMSIZE.items():
            moved = 5 * batch * dims * itemsize
            for kind in (Triton, Cuda):
                kernels = kind(batch, dims, dtype)
                parts = [sum(from_memory(kernels, backward)) / moved for backward in (False, True)]
                shape = "×".join(map(str, (batch, *image)))
                programs = [f"{n} of {most}" for n, most in zip(kernels.launched, kernels.at_once, strict=True)]
                traffic = (f"{moved / 1e6:.0f} MB", *(f"{part:.0%}" for part in parts))
                cells = (shape, dtype, kind.name, *programs, *traffic)
                lines.append(f"| {' | '.join(cells)} |")
    head = "Written by `python bench/proof/l2.py`, which says what is modelled: the part of 5N bytes that memory moves."
    return "\n".join([head, "", *lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for l2.md (default .)")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    (out / "l2.md").write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
