"""The model of L2, on sequences whose misses can be counted by hand."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the model has Triton's tiles")
PROOF = Path(__file__).parents[2] / "bench" / "proof"
sys.path.insert(0, str(PROOF))
from l2 import GRADIENT, LINE, RECON, TARGET, Cuda, Lru, Step, Triton, missed, page, step  # noqa: E402


def program(*lines: int) -> Iterator[Step]:
    return iter([Step([(RECON, line)]) for line in lines])


def hits(lines: int, *touched: int) -> list[bool]:
    cache = Lru(lines)
    return [cache.touch((RECON, line)) for line in touched]


def test_the_line_that_was_not_touched_for_the_longest_time_goes() -> None:
    assert hits(2, 1, 2, 1, 3, 1, 2) == [False, False, True, False, True, False]
    assert hits(3, 1, 2, 3, 1, 2, 3) == [False] * 3 + [True] * 3
    assert hits(2, 1, 2, 3, 1, 2, 3) == [False] * 6  # a walk in the same order finds nothing
    assert hits(2, 1, 2, 3, 3, 2, 1) == [False, False, False, True, True, False]  # from the end, what fits


def test_tensors_do_not_share_lines() -> None:
    cache = Lru(2)
    assert [cache.touch((tensor, 7)) for tensor in (RECON, TARGET, RECON)] == [False, False, True]


def test_what_is_written_takes_room_and_is_no_miss() -> None:
    steps = [Step([(RECON, 0)], [(GRADIENT, 0)]), Step([(RECON, 1)], [(GRADIENT, 1)]), Step([(RECON, 0)])]
    assert missed(Lru(2), [iter(steps)], 1) == 3
    assert missed(Lru(4), [iter(steps)], 1) == 2


def test_resident_programs_take_turns_and_the_next_one_waits() -> None:
    """Alone each finds its own line again; of two at once, neither does in a cache of one line."""
    assert missed(Lru(1), [program(1, 1), program(2, 2)], 1) == 2
    assert missed(Lru(1), [program(1, 1), program(2, 2)], 2) == 4
    assert missed(Lru(1), [program(1, 1), program(2), program(1)], 2) == 3  # 1, 2, 1, and then the third's
    assert missed(Lru(1), [program(1), program(2, 2), program(2)], 2) == 2


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("kind", [Triton, Cuda])
@pytest.mark.parametrize(("batch", "dims"), [(5, 12288), (3, 1024), (70, 512), (2, 2**21)])
def test_a_pass_touches_every_element_once(
    kind: type[Triton | Cuda], batch: int, dims: int, backward: bool, dtype: str
) -> None:
    kernels = kind(batch, dims, dtype)
    steps = [s for p in kernels.programs(True, backward) for s in p]
    all_of_it = step(0, batch * dims, kernels.itemsize, True)
    assert sorted(line for s in steps for line in s.reads) == sorted(all_of_it.reads)
    assert sorted(line for s in steps for line in s.writes) == sorted(all_of_it.writes)
    assert len(all_of_it.writes) == batch * dims * kernels.itemsize / LINE


def test_a_warp_from_the_end_reads_in_the_exact_reverse() -> None:
    kernels = Cuda(1, 4096, "fp32")
    forward, backward = ([list(p) for p in kernels.programs(False, way)] for way in (False, True))
    assert [p[::-1] for p in backward] == forward[::-1]


@pytest.mark.check("the whole page: millions of accesses")
def test_the_page_is_rendered() -> None:
    assert (PROOF / "l2.md").read_text(encoding="utf-8") == page()
