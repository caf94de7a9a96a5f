"""The CUDA kernels as CPU code, thread for thread: under several schedules, under AddressSanitizer, and with faults.

A mutant is a copy of csrc with one replacement; tests/cuda_check.py must notice every one. Not here, because the shim
cannot tell: a missing __threadfence, and accesses out of bounds that change no value (AddressSanitizer sees them).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cuda_shim
import pytest

if "cuda_plugin" not in sys.modules:
    pytest.skip("minutes of compiling, which `make test-cuda` takes", allow_module_level=True)
pytestmark = pytest.mark.skipif(cuda_shim.compiler() is None, reason="there is no C++ compiler")
HERE = Path(__file__).parent

# Few elements then make many pieces, several for a warp, and pieces of several times the least size.
SMALL = (
    ("cuda/elbo_stats.cu", "kPiece = 4096", "kPiece = 512"),
    ("cuda/elbo_stats.cu", "kMany = 8192", "kMany = 16"),
    ("cuda/launch.h", "kBlocksPerSm = 2048 / kThreads", "kBlocksPerSm = 1"),
)

DEVICE, ELEMENTS = "cuda/device.cuh", "cuda/elements.cuh"
STATS, FINALIZE, GRADS, STEP, EACH = (
    f"cuda/elbo_{stem}.cuh" for stem in ("stats", "finalize", "grads", "step", "step_each")
)
INPUTS, BINDINGS, MATH, SPAN = "cuda/inputs.h", "cuda/bindings.cpp", "elbo_math.h", "span.h"

# name -> file, what is replaced (it occurs exactly once), by what
MUTANTS: dict[str, tuple[str, str, str]] = {
    # barriers and shuffles
    "no_barrier_before_the_block_sums_up": (DEVICE, "] = x;\n  __syncthreads();", "] = x;"),
    "no_barrier_before_the_next_block_sum": (DEVICE, "  __syncthreads();  // or the next", "  // or the next"),
    "no_barrier_before_the_total": (FINALIZE, "  __syncthreads();\n  double own", "  double own"),
    "half_a_warp_is_summed": (DEVICE, "step > 0; step /= 2", "step > 1; step /= 2"),
    "a_barrier_in_a_branch": (DEVICE, "] = x;\n  __syncthreads();", "] = x;\n  if (warp() == 0) __syncthreads();"),
    # tails
    "no_elements_after_the_last_vector": (DEVICE, "walk_groups<Turns>(n - between,", "walk_groups<Turns>(head,"),
    "an_element_too_many": (DEVICE, "walk_groups<Turns>(n - between,", "walk_groups<Turns>(n - between + 1,"),
    "the_head_is_taken_for_the_tail": (DEVICE, "return g < head ? g : g + between;", "return g + between;"),
    "a_vector_too_few": (DEVICE, "; first < groups; first +=", "; first < groups - 1; first +="),
    "vectors_off_their_place": (DEVICE, "return head + g * N;", "return g * N;"),
    "one_turn_of_two": (DEVICE, "first += Turns * kWarpSize", "first += 2 * Turns * kWarpSize"),
    # latents
    "vectors_of_latents_at_any_address": (ELEMENTS, "(reinterpret_cast<uintptr_t>(at)) | 16", "(0) | 16"),
    "vectors_of_gradients_at_any_address": (GRADS, "min(mu.vector(), logvar.vector())", "16"),
    "no_latents_after_the_last_vector": (ELEMENTS, "i = groups * vector + lane(); i < n", "i = lane(); i < 0"),
    "the_first_turn_again": (DEVICE, "words.value[k - n] = words.value[k]", "words.value[k] = words.value[k]"),
    "the_halves_of_64_bits_swapped": (DEVICE, "{words.value[2], words.value[3]}", "{words.value[3], words.value[2]}"),
    "one_of_the_vectors_alone": (ELEMENTS, "g < groups; g += kWarpSize", "g < groups; g += groups"),
    # pieces and partial sums
    "a_dropped_partial": (FINALIZE, "p < pieces; p += width", "p < pieces - 1; p += width"),
    "one_round_of_the_grid": (DEVICE, "i < all; i += warps", "i < all; i += all"),
    "samples_beyond_the_block": (FINALIZE, "begin < batch; begin += together", "begin < 1; begin += together"),
    "a_piece_too_long": (DEVICE, "min(dims - first, pieces.size)", "min(dims - first + 1, pieces.size)"),
    "32_bits_for_an_offset": (SPAN, "(sample * batch_stride", "(static_cast<int32_t>(sample * batch_stride)"),
    # factors
    "no_scale_by_the_reduction": (GRADS, "return {args.scale * at(g.loss, i)", "return {at(g.loss, i)"),
    "no_scale_by_grad_distortion": (GRADS, "args.scale * at(g.distortion, i)", "args.scale"),
    "no_scale_by_grad_rate": (GRADS, "args.scale * at(g.rate, i)", "args.scale"),
    "one_grad_loss_for_all": (GRADS, "at(g.loss, i)", "at(g.loss, 0)"),
    "no_scale_by_beta": (MATH, "weight.loss * beta,", "weight.loss,"),
    "no_coupling_by_a_shared_sigma": (GRADS, "f.error += shared.through;", ""),
    "weights_are_taken_for_equal": (BINDINGS, "!unequal(grad_loss) && !un", "unequal(grad_loss) || !un"),
    "no_coupling_by_the_sigma_of_an_image": (MATH, "f.error += sigma.slope * f.log_sigma / s", "f.error += 0"),
    "sign_of_g_target": (GRADS, "return -g[j].recon;", "return g[j].recon;"),
    "sign_of_the_capacity_gap": (MATH, "(gap > 0) - (gap < 0)", "(gap > 0)"),
    "free_bits_mask_inverted": (GRADS, ">= free_bits ? through_loss", "< free_bits ? through_loss"),
    "free_bits_hide_nan": (STATS, "nats < free_bits ? free_bits : nats", "nats >= free_bits ? nats : free_bits"),
    # σ inside a sample, and layouts
    "log_sigma_does_not_wrap": (ELEMENTS, "element / level.divisor % level.size", "element / level.divisor"),
    "one_level_of_log_sigma_only": (ELEMENTS, "l < inside.levels; ++l", "l < 1; ++l"),
    "the_samples_log_sigma_is_the_first_ones": (INPUTS, "span_of(log_sigma, stride_of(0))", "span_of(log_sigma, 0)"),
    "log_sigma_is_rounded_to_the_targets_dtype": (INPUTS, "alike &= element_log", "alike |= element_log"),
    "orders_are_taken_for_equal": ("layout.h", "if (same_order(t, lead) && t", "if (t"),
    # the step
    "the_leader_does_not_wait": (STEP, "  grid.sync();\n  if (blockIdx.x ==", "  if (blockIdx.x =="),
    "data_do_not_wait_for_the_leader": (STEP, "  grid.sync();  // and has told what follows\n", ""),
    "nobody_waits_for_the_leader": (STEP, "lead(args);\n  grid.sync();", "lead(args);"),
    "a_row_too_few_in_registers": (STEP, "k < rows; ++k) sum += square", "k < rows - 1; ++k) sum += square"),
    "one_place_in_shared_memory_for_all": (STEP, "(k * vector + j) * kStepThreads + threadIdx.x", "k * vector + j"),
    "a_dropped_block": (STEP, "b < args.plan.data_blocks; b", "b < args.plan.data_blocks - 1; b"),
    "no_grad_scale": (STEP, "w = scale * at(args.grads.grad_outputs.loss, 0)", "w = scale"),
    "what_does_not_fit_is_tried": ("cuda/step_plan.h", "plan.shared_bytes <= shared_limit", "true"),
    "no_barrier_before_the_next_sample": (EACH, "  __syncthreads();  // in the next sample, v", "  // v"),
    "one_sample_of_a_block": (EACH, "sample += data_blocks", "sample += batch.size"),
    "all_warps_keep_at_one_place": (EACH, "kept = on_chip + first", "kept = on_chip"),
    "no_grad_scale_for_each": (EACH, "{args.scale * at(args.grad_outputs.loss, i)", "{args.scale"),
    "too_large_a_sample_is_tried": ("cuda/elbo_step_each.cu", "* 4 <= shared_for_differences()", "* 4 > 0"),
    "batches_are_taken_for_dense": ("cuda/elbo_step.cu", "span.batch_stride == data.dims", "true"),
}  # fmt: skip


def copy(folder: Path, *replacements: tuple[str, str, str]) -> Path:
    shutil.copytree(cuda_shim.CSRC, folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name, old, new in replacements:
        text = (folder / name).read_text(encoding="utf-8")
        assert text.count(old) == 1, f"{old!r} occurs {text.count(old)} times in {name}; the code has changed"
        (folder / name).write_text(text.replace(old, new), encoding="utf-8")
    return folder


def check(library: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(HERE / "cuda_check.py"), str(library)]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)


def fault_of(library: Path, **environment: str) -> str | None:
    done = check(library, **environment)
    fault = json.loads(done.stdout.splitlines()[-1]) if done.stdout else None
    # What was written out of bounds may end the process after the fault was told.
    assert fault is not None or done.returncode == 0, f"{done.args}:\n{done.stdout}\n{done.stderr}"
    return fault


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cuda")


def test_the_kernels_as_they_are_pass(workshop: Path) -> None:
    assert fault_of(cuda_shim.build(workshop / "as_they_are")) is None


def test_many_pieces(workshop: Path) -> None:
    assert fault_of(cuda_shim.build(workshop / "small", copy(workshop / "csrc", *SMALL))) is None


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_noticed(name: str, workshop: Path) -> None:
    folder = workshop / name
    fault = fault_of(cuda_shim.build(folder, copy(folder / "csrc", *SMALL, MUTANTS[name])))
    assert fault is not None, "nothing was noticed"
    # A copy that does not even run would pass for a noticed one; a launch that fails says why.
    assert (
        "AssertionError" in fault
        or "threads wait at a barrier" in fault
        or "more shared memory" in fault
        or "not aligned" in fault
    )


@pytest.fixture
def sanitizer() -> dict[str, str]:
    """The environment in which AddressSanitizer watches a library."""
    asked = [cuda_shim.compiler() or "", "-print-file-name=libasan.so"]
    runtime = Path(subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip())
    if not runtime.is_absolute():
        pytest.skip("the compiler has no AddressSanitizer")
    return {"LD_PRELOAD": str(runtime), "ASAN_OPTIONS": "detect_leaks=0"}


ASAN = ("-fsanitize=address",)


def test_no_access_out_of_bounds(workshop: Path, sanitizer: dict[str, str]) -> None:
    library = cuda_shim.build(workshop / "asan", copy(workshop / "asan_csrc", *SMALL), ASAN)
    assert fault_of(library, **sanitizer) is None


OUT_OF_BOUNDS = {
    "an_element_too_many_of_the_data": (GRADS, "p.n, head, [&](int i", "p.n + 1, head, [&](int i"),
    "a_row_beyond_the_end": (STEP, " && first < args.elements", ""),
}


@pytest.mark.parametrize("name", OUT_OF_BOUNDS)
def test_an_access_out_of_bounds_is_seen(name: str, workshop: Path, sanitizer: dict[str, str]) -> None:
    folder = workshop / f"{name}_asan"
    library = cuda_shim.build(folder, copy(folder / "csrc", *SMALL, OUT_OF_BOUNDS[name]), ASAN)
    done = check(library, **sanitizer)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
