"""How long a step should take on an H100: an estimate from counts, no measurement.

    python bench/proof/estimates.py --out bench/proof

Writes estimates.md. Launches, waves of programs and bytes of memory (by l2.py's model) are counted; the constants below
are assumed. An earlier desk check, of commit ec5b536, stands in brackets: it had the same START, GAP and MEMORY, and a
model of its own, so that small differences say nothing. The columns, in µs, for a σ of the batch:

- ideal: 5N + 6L bytes, N of recon and L of mu, at memory's speed.
- stats, finalize, grads: of Triton's two passes, where finalize is the end of stats' launch; CUDA launches it.
- T2, C2: forward and backward of Triton, of CUDA, as a CUDA graph with cold caches, and with PyTorch's launch that
  makes backward's first gradient.
- T1, C1: the same in one pass. Triton's barrier is filled in a launch of its own, as in every CUDA graph. "=": the
  batch is too large for that, and takes the two passes.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from l2 import ITEMSIZE, LINE, SMS, Cuda, Triton, from_memory, up

from fused_elbo import call, sigma
from fused_elbo.kernels import structs
from fused_elbo.kernels._layout import Inputs
from fused_elbo.kernels.elbo_step import Cut

MEMORY, CACHE = 3.0e6, 5.5e6  # bytes in a µs: what copies reach of an H100's 3.35 TB/s, and of its L2
START, GAP = 2.0, 0.9  # µs: before a graph's first kernel, between one and the next
RAMP = 1.0  # µs: from a kernel's start to its first load, and from its last store to its end
LATENCY = 0.7  # µs: until what a program has asked memory for is there, while others ask too
FILL = 1.8  # µs: PyTorch's launch that fills a few numbers
FINALIZE, PARTIAL = 4.5, 0.0007  # µs: what finalize takes at least, and for each partial sum of the data
BARRIER = 2 * LATENCY  # to arrive at a counter, and to see that all have
ON_CHIP = 512 * (56 + 112)  # floats of CUDA's block, in its threads' registers and its shared memory


# Batch, data and latents of a sample; the desk check's T2, T1, C2 and C1, of fp32 and of bf16.
DESK_CHECK = (
    (64, (1, 28, 28), 128, "15 15 20 14", "15 15 18 14"),
    (128, (3, 64, 64), 128, "24 21 39 19", "20 18 25 16"),
    (512, (3, 64, 64), 128, "62 = 62 42", "34 = 37 26"),
    (16, (3, 256, 256), 4096, "33 29 41 26", "24 21 26 18"),
    (64, (3, 256, 256), 4096, "109 = 130 =", "65 = 78 ="),
    (256, (3, 256, 256), 4096, "390 = 400 =", "213 = 220 ="),
    (2, (3, 17, 256, 256), 81920, "66 = 70 44", "36 = 39 27"),
    (4, (1, 8, 8), 128, "15 14 16 14", "15 14 16 14"),
)


def kernel(from_memory: float, moved: float, waits: int) -> float:
    """Takes the bytes that memory moves and those that L2 does, and how often programs wait for memory one after the
    other: in their loops, and in one's place after another's."""
    return RAMP + max(from_memory / MEMORY, moved / CACHE, waits * LATENCY)


def finalize(sums: int) -> float:
    return FINALIZE + PARTIAL * sums


def waits(kernels: Triton | Cuda) -> list[int]:
    """Of both passes."""
    if isinstance(kernels, Triton):
        pairs = zip(kernels.launched, kernels.at_once, strict=True)
        return [up(launched, at_once) * kernels.tiles.per_chunk for launched, at_once in pairs]
    chunks, of_chunk = kernels.per_sample * kernels.batch, up(kernels.size, LINE // kernels.itemsize)
    return [up(chunks, warps) * of_chunk for warps in kernels.resident]


def passes(kernels: Triton | Cuda, latents: int) -> tuple[float, float, float]:
    """stats, finalize, grads, which wait for the sums before they ask for data."""
    n, latent = (kernels.itemsize * kernels.batch * size for size in (kernels.dims, latents))
    stats, grads = from_memory(kernels, backward=True)
    in_stats, in_grads = waits(kernels)
    sums = kernels.batch * (kernels.tiles.chunks if isinstance(kernels, Triton) else kernels.per_sample)
    return (
        kernel(stats + 2 * latent, 2 * n + 2 * latent, in_stats),
        finalize(sums),
        kernel(grads + 4 * latent, 3 * n + 4 * latent, 1 + in_grads),
    )


def in_two_passes(kernels: Triton | Cuda, parts: tuple[float, float, float]) -> float:
    launches = 3 if isinstance(kernels, Triton) else 4
    return START + sum(parts) + FILL + (launches - 1) * GAP


def in_one_pass(kernels: Triton | Cuda, latents: int) -> float:
    """A program asks for all of its data at once; finalize, with a sum for each sample, comes after the gradients."""
    moved = kernels.itemsize * kernels.batch * (3 * kernels.dims + 6 * latents)
    before = FILL + GAP if isinstance(kernels, Triton) else 0
    return START + before + kernel(moved, moved, 1) + BARRIER + finalize(kernels.batch)


def fits(kernels: Triton | Cuda, latents: int) -> bool:
    """Whether one pass can hold the batch. tests/csrc/test_cuda_step.py compares this with csrc/cuda/step_plan.h."""
    if isinstance(kernels, Cuda):
        of_latents = max(up(latents * SMS, kernels.dims + latents), 1)
        return kernels.batch * kernels.dims <= (SMS - of_latents) * ON_CHIP
    dtype = torch.float32 if kernels.itemsize == 4 else torch.bfloat16
    data, mu = (torch.empty(kernels.batch, n, device="meta", dtype=dtype) for n in (kernels.dims, latents))
    tensors, options = call.Tensors(data, data, mu, mu), call.Options(sigma_mode=int(sigma.Kind.BATCH))
    return Cut.of(Inputs(tensors, options), structs.Options.of(tensors, options), SMS) is not None


def rows() -> Iterator[tuple[str, ...]]:
    for batch, data, latents, *checked in DESK_CHECK:
        dims, shape = math.prod(data), "×".join(map(str, (batch, *data)))
        for (dtype, itemsize), before in zip(ITEMSIZE.items(), checked, strict=True):
            parts, steps = [itemsize * batch * (5 * dims + 6 * latents) / MEMORY], []
            for kind in (Triton, Cuda):
                kernels = kind(batch, dims, dtype)
                of_passes = passes(kernels, latents)
                parts += of_passes if kind is Triton else ()
                steps.append(f"{in_two_passes(kernels, of_passes):.0f}")
                steps.append(f"{in_one_pass(kernels, latents):.0f}" if fits(kernels, latents) else "=")
            pairs = (f"{now} ({then})" for now, then in zip(steps, before.split(), strict=True))
            yield (shape, dtype, *(f"{us:.1f}" for us in parts), *pairs)


def page() -> str:
    head = (
        "Written by `python bench/proof/estimates.py`, which says what is counted and what is assumed. **Nothing here "
        "was measured on a GPU.** µs of a step on an H100; in brackets, an earlier desk check's."
    )
    tail = (
        "As eager code launches it, a step takes the longer of this and of Python's part, which "
        "[RESULTS.md](../RESULTS.md#the-hosts-side-of-a-step-on-a-gpu) has."
    )
    names = ("shape", "dtype", "ideal", "stats", "finalize", "grads", "T2", "T1", "C2", "C1")
    lines = [names, ["---"] * 2 + ["--:"] * (len(names) - 2), *rows()]
    return "\n".join([head, "", *(f"| {' | '.join(line)} |" for line in lines), "", tail, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for estimates.md (default .)")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    (out / "estimates.md").write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
