"""The estimates of a step's time on a GPU, on numbers that can be worked out by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the model has Triton's tiles")
PROOF = Path(__file__).parents[2] / "bench" / "proof"
sys.path.insert(0, str(PROOF))
import estimates  # noqa: E402
from estimates import BARRIER, FILL, FINALIZE, GAP, LATENCY, MEMORY, PARTIAL, RAMP, START  # noqa: E402
from l2 import LINE, Cuda, Triton, from_memory  # noqa: E402


def test_a_kernel_takes_as_long_as_what_is_slowest() -> None:
    assert estimates.kernel(6e6, 6e6, 1) == RAMP + 2  # memory
    assert estimates.kernel(0, 11e6, 1) == RAMP + 2  # L2
    assert estimates.kernel(6e6, 6e6, 100) == RAMP + 100 * LATENCY


def test_programs_that_wait_for_their_turn_wait_for_memory_after_the_others() -> None:
    one, many, looping = (Triton(batch, 12288, "fp32") for batch in (4, 512, 12288))
    assert estimates.waits(one) == [1, 1]
    assert estimates.waits(many) == [-(-1536 // most) for most in many.at_once]
    assert looping.tiles.per_chunk > 1
    for waits, launched, most in zip(estimates.waits(looping), looping.launched, looping.at_once, strict=True):
        assert waits * most >= launched * looping.tiles.per_chunk > 0
    warps = Cuda(128, 12288, "fp32")  # 2048 chunks of 768 elements, for as many warps: three turns
    assert (warps.size, warps.launched) == (768, [256, 256])
    assert estimates.waits(warps) == [3, 3]


@pytest.mark.parametrize("kind", [Triton, Cuda])
def test_the_passes_move_5n_and_6l(kind: type[Triton | Cuda], monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[tuple[float, float]] = []
    monkeypatch.setattr(estimates, "kernel", lambda *bytes_and_waits: moved.append(bytes_and_waits[:2]) or 0.0)
    estimates.passes(kind(5, 12288, "fp32"), 100)
    n, latent = 4 * 5 * 12288, 4 * 5 * 100
    in_grads = (n + 4 * latent, 3 * n + 4 * latent)  # which find the data in L2
    assert moved == [(2 * n + 2 * latent, 2 * n + 2 * latent), in_grads]


def test_a_step_is_the_sum_of_its_launches() -> None:
    triton, cuda = (kind(5, 12288, "fp32") for kind in (Triton, Cuda))
    assert estimates.in_two_passes(triton, (1, 2, 3)) == pytest.approx(START + 6 + FILL + 2 * GAP)
    assert estimates.in_two_passes(cuda, (1, 2, 3)) == pytest.approx(START + 6 + FILL + 3 * GAP)
    at_once = START + RAMP + LATENCY + BARRIER + FINALIZE + 5 * PARTIAL
    assert estimates.in_one_pass(cuda, 100) == pytest.approx(at_once)
    assert estimates.in_one_pass(triton, 100) == pytest.approx(at_once + FILL + GAP)
    large = Cuda(352, 12288, "fp32")
    assert estimates.in_one_pass(large, 0) > 3 * 4 * 352 * 12288 / MEMORY


@pytest.mark.parametrize(("kind", "most"), [(Triton, 352), (Cuda, 917)])
def test_what_fits_into_one_pass(kind: type[Triton | Cuda], most: int) -> None:
    """README.md beside the page has this number for Triton; 131 · 512 · 168 elements are CUDA's."""
    assert estimates.fits(kind(most, 12288, "fp32"), 1)
    assert not estimates.fits(kind(most + 1, 12288, "fp32"), 1)


def test_the_model_of_the_cache_tells_the_passes_apart() -> None:
    kernels = Triton(4, 12288, "fp32")
    lines = 4 * 12288 * 4 // LINE
    assert from_memory(kernels, backward=True) == (2 * lines * LINE, lines * LINE)


@pytest.mark.check("the whole page: millions of accesses")
def test_the_page_is_rendered() -> None:
    assert (PROOF / "estimates.md").read_text(encoding="utf-8") == estimates.page()
