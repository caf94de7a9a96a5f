"""A test of the tests: kernels with one fault each, every one of which tests/kernel_check.py must notice.

A mutant is a copy of the kernels folder with one replacement. All run in one process of Triton's interpreter, so no GPU
is needed. Not here, because the interpreter cannot tell: faults of a load's mask where the store's mask hides
what was read (compute-sanitizer sees them: `make gpu-check`), races, and offsets inside one sample beyond 2³¹ elements,
which would take hours to walk.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed (it is for Linux)")
HERE = Path(__file__).parent
KERNELS = HERE.parent / "kernels"

STATS, FINALIZE, GRADS, LAYOUT, MATH = "elbo_stats", "elbo_finalize", "elbo_grads", "_layout", "_math"
FACTORS, GRID, STEP = "_factors", "_grid", "elbo_step"

# name -> file, what is replaced (it occurs exactly once), by what
MUTANTS: dict[str, tuple[str, str, str]] = {
    # masks
    "stats_reads_a_column_too_many": (STATS, "(cols < length)", "(cols <= length)"),
    "stats_reads_a_column_too_few": (STATS, "(cols < length)", "(cols < length - 1)"),
    "stats_reads_a_latent_too_many": (STATS, "(lcols < llength)", "(lcols <= llength)"),
    "stats_writes_a_row_too_many": (STATS, "tl.sum(total, 1), rows < batch)", "tl.sum(total, 1), rows <= batch)"),
    "grads_writes_a_column_too_many": (
        GRADS, "g.to(g_recon.dtype.element_ty), inside)",
        "g.to(g_recon.dtype.element_ty), cols <= length)",
    ),
    "grads_writes_a_column_too_few": (
        GRADS, "g.to(g_recon.dtype.element_ty), inside)", "g.to(g_recon.dtype.element_ty), inside & (cols > 0))",
    ),
    "grads_reads_a_column_too_few": (
        GRADS, "tl.load(recon + r_at + cols, inside, 0.0)",
        "tl.load(recon + r_at + cols, inside & (cols < length - 1), 0.0)",
    ),
    "grads_writes_a_latent_too_many": (
        GRADS, "(b * pull).to(g_mu.dtype.element_ty), linside)",
        "(b * pull).to(g_mu.dtype.element_ty), (lrows < batch)[:, None] & (lcols <= llength))",
    ),
    "padding_is_clamped_to_free_bits": (
        STATS, "tl.where(linside, at_least(", "tl.where(lcols >= 0, at_least(",
    ),
    "empty_rows_are_counted": (FINALIZE, "distortions += tl.where(inside, nats, 0.0)", "distortions += nats"),
    # partial sums
    "the_last_partial_is_dropped": (FINALIZE, "(cols < chunks)", "(cols < chunks - 1)"),
    "only_the_first_block_of_partials": (FINALIZE, "range(0, chunks, COLS)", "range(0, COLS, COLS)"),
    "the_last_tile_of_a_chunk_is_dropped": (
        STATS, "range(chunk * data_tiles, (chunk + 1) * data_tiles)",
        "range(chunk * data_tiles, (chunk + 1) * data_tiles - 1)",
    ),
    "one_block_of_rows_only": (FINALIZE, "for first2 in range(0, batch, ROWS)", "for first2 in range(0, ROWS, ROWS)"),
    # signs
    "e_is_a_sum_in_stats": (STATS, ".to(ACC) - tl.load(target", ".to(ACC) + tl.load(target"),
    "e_is_a_sum_in_grads": (GRADS, ".to(ACC) - tl.load(target", ".to(ACC) + tl.load(target"),
    "sign_of_g_target": (GRADS, "(-g).to(", "g.to("),
    "sign_of_g_prior_mu": (GRADS, "(-(b * pull)).to(", "(b * pull).to("),
    "sign_of_g_prior_logvar": (GRADS, "-0.5 * b * (stretch + pull * d)", "0.5 * b * (stretch + pull * d)"),
    "sign_of_the_capacity_gap": (FACTORS, " - tl.where(gap < 0, 1.0, 0.0))", ")"),
    # factors
    "no_scale_by_grad_loss": (
        FACTORS, "g = r * value_at(grad_loss,", "g = r + 0.0 * value_at(grad_loss,",
    ),
    "no_scale_by_grad_distortion": (FACTORS, "w = g + r * of_distortion", "w = g"),
    "no_scale_by_grad_rate": (FACTORS, "through_rate = r * value_at(", "through_rate = 0.0 * value_at("),
    "one_grad_loss_for_all": (
        FACTORS, "g = r * value_at(grad_loss, rows, grad_loss_stride,", "g = r * value_at(grad_loss, rows, 0,",
    ),
    "no_scale_by_beta": (FACTORS, "through_loss = g * b", "through_loss = g"),
    "the_mean_is_a_batchmean": (FINALIZE, "1 / (batch * dims)", "1 / batch"),
    "g_logvar_without_its_half": (GRADS, "(b * 0.5 * stretch)", "(b * stretch)"),
    "2_log_sigma_is_left_out": (STATS, "exp(-2.0 * ls) + 2.0 * ls", "exp(-2.0 * ls)"),
    "exp_does_not_overflow": (MATH, 'return tl.where(x > 89.0, float("inf"), scaled)', "return scaled"),
    "exp_does_not_underflow": (MATH, "scaled = tl.where(x < -104.0, 0.0, scaled)", "scaled += 0.0"),
    "a_series_too_short": (MATH, "18 if t.dtype", "8 if t.dtype"),
    # the step
    "the_steps_last_column_is_left_out": (STEP, "(cols < dims)", "(cols < dims - 1)"),
    "the_step_is_not_scaled": (STEP, "HAS_GRAD_SCALE=grad_scale is not None", "HAS_GRAD_SCALE=False"),
    "the_step_finishes_before_the_last_program": (
        STEP, "finishes = arrive(barrier, programs)", "finishes = arrive(barrier, programs - 1)",
    ),
    "the_steps_counter_is_not_reset": (GRID, "tl.atomic_xchg(barrier, 0,", "tl.atomic_xchg(barrier, 1,"),
    "the_sum_of_the_latents_of_one_tile": (STEP, "clamped_total += latent_sums(", "clamped_total = latent_sums("),
    "a_sigma_for_the_wrong_image": (STEP, "pid * TILES, e, s, total", "pid * TILES, e, s + s, total"),
    "samples_that_are_not_there_pull_on_beta": (GRADS, "tl.where(srows < batch, of_beta, 0.0)", "of_beta"),
    "samples_that_are_not_there_pull_on_log_sigma": (
        GRADS, "tl.where(srows < batch, of_log_sigma, 0.0)", "of_log_sigma",
    ),
    # σ inside a sample
    "one_level_of_log_sigma_only": (STATS, "if LEVELS == 2:", "if LEVELS == 3:"),
    "log_sigma_does_not_wrap": (STATS, "cols // divisor0 % size0 * stride0", "cols // divisor0 * stride0"),
    "one_log_sigma_for_a_run": (STATS, "cols // divisor0 % size0", "cols * 0 % size0"),
    "the_samples_log_sigma_is_the_first_ones": (
        STATS, "row_offsets(rows, stride, WIDE) + inside", "row_offsets(rows, 0, WIDE) + inside",
    ),
    # σ and the rate
    "no_coupling_by_sigma_for_unequal_weights": (FACTORS, "error += tl.load(through)", "error += 0.0"),
    "no_error_at_all_is_divided_by": (
        FINALIZE, "tl.sum(flows, 0) / tl.where(total == 0.0, 1.0, total)", "tl.sum(flows, 0) / total",
    ),
    "no_coupling_by_sigma_for_equal_weights": (
        FACTORS, "error += slope * (w * (n * d", "error += 0.0 * (w * (n * d",
    ),
    "no_coupling_by_the_sigma_of_an_image": (FACTORS, "error += slope * of_log_sigma", "error += 0.0 * of_log_sigma"),
    "the_floor_passes_a_gradient": (MATH, "tl.where(mse > floor, 1.0, 0.0)", "tl.where(mse > floor, 1.0, 1.0)"),
    "free_bits_mask_inverted": (GRADS, ">= number(free_bits, ACC)", "< number(free_bits, ACC)"),
    "free_bits_mask_the_rate_too": (GRADS, "through_loss, 0.0) + through_rate", "through_loss + through_rate, 0.0)"),
    "a_floor_hides_nan": (MATH, "tl.where(x < floor, floor, x)", "tl.maximum(x, floor)"),
    # memory
    "strides_of_32_bits": (STATS, "tl.full((), units, tl.int64) * VEC", "units * VEC"),
    "64_bits_never_asked_for": (LAYOUT, ">= 2**31", ">= 2**62"),
    "samples_are_taken_for_packed": (LAYOUT, "else t.stride(0)", "else sample_size(t)"),
    "orders_are_taken_for_equal": (LAYOUT, "t if inner_strides(t) == inner_strides(lead) else", "t if True else"),
    "rows_are_taken_for_multiples_of_16": (LAYOUT, "if all(n % v == 0 for", "if v == 16 or all(n % v == 0 for"),
}  # fmt: skip


def mutate(folder: Path, name: str) -> None:
    stem, old, new = MUTANTS[name]
    source = folder / f"{stem}.py"
    text = source.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{name}: {old!r} occurs {text.count(old)} times in {stem}.py; the kernel has changed"
    source.write_text(text.replace(old, new), encoding="utf-8")


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    """What the check says of each mutant, and of the kernels as they are; None: nothing."""
    copies = tmp_path_factory.mktemp("kernels")
    for name in ("unchanged", *MUTANTS):
        shutil.copytree(KERNELS, copies / f"kernels_{name}", ignore=shutil.ignore_patterns("__pycache__"))
        if name in MUTANTS:
            mutate(copies / f"kernels_{name}", name)
    command = [sys.executable, str(HERE / "kernel_check.py"), str(copies)]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}:\n{done.stdout}\n{done.stderr}"
    return json.loads(done.stdout)


def test_the_kernels_as_they_are_pass(faults: dict[str, str | None]) -> None:
    assert faults["kernels_unchanged"] is None


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_noticed(name: str, faults: dict[str, str | None]) -> None:
    fault = faults[f"kernels_{name}"]
    assert fault is not None, "nothing was noticed"
    # A copy that does not even run would pass for a noticed one.
    assert "AssertionError" in fault
