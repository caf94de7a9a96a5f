"""A test of the tests: kernels with one fault each, every one of which tests/kernel_check.py must notice.

A mutant is a copy of the kernels folder with one replacement (tests/mutants.py). All run in Triton's interpreter, so no
GPU is needed. Not here, because the interpreter cannot tell: faults of a load's mask where the store's mask hides what
was read (compute-sanitizer sees them: `make gpu-check`), races, and offsets inside one sample beyond 2³¹ elements,
which would take hours to walk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from fused_elbo import backends

if backends.triton.runs_on_cpu() != "its interpreter":
    pytest.skip(
        "the kernels are not in Triton's interpreter: TRITON_INTERPRET=1 (make test-triton)", allow_module_level=True
    )

from kernel_check import Case, cases, fault_of
from mutants import Mutant, imported

pytestmark = pytest.mark.triton
KERNELS = Path(__file__).parents[2] / "kernels"

STATS, FINALIZE, GRADS, STEP, LEVELS = (f"elbo_{stem}.py" for stem in ("stats", "finalize", "grads", "step", "levels"))
LAYOUT, ELEMENTS, MATH, FACTORS, GRID = (f"_{name}.py" for name in ("layout", "elements", "math", "factors", "grid"))
STRUCTS, OPERATORS = "structs.py", "operators.py"

MASK = "$ROWS & ($C < $N)"

MUTANTS = {
    # masks
    "stats_reads_a_column_too_many": Mutant(
        STATS, "data_sums", MASK, "$ROWS & ($C <= $N)", "learned-image, none",
    ),
    "stats_reads_a_column_too_few": Mutant(
        STATS, "data_sums", MASK, "$ROWS & ($C < $N - 1)", "learned-image, none",
    ),
    "stats_reads_a_latent_too_many": Mutant(STATS, "chunk_rates", MASK, "$ROWS & ($C <= $N)", "far apart"),
    "stats_writes_a_row_too_many": Mutant(
        STATS, "data_sums", "tl.store($P, $X, $R < $B)", "tl.store($P, $X, $R <= $B)", "learned-image, none",
        place=(0, 2),
    ),
    "grads_writes_a_column_too_many": Mutant(
        GRADS, "tile_of_data", MASK, "$ROWS & ($C <= $N)", "learned-image, none",
    ),
    "grads_writes_a_column_too_few": Mutant(
        GRADS, "data_gradients", "tl.store($P, $G.to($T), $M)", "tl.store($P, $G.to($T), $M & ($C > 0))",
        "learned-image, none", place=(1, 3), beside=MASK,
    ),
    "grads_reads_a_column_too_few": Mutant(
        GRADS, "data_gradients", "errors_at($CALL, $R, $C, $M)", "errors_at($CALL, $R, $C, $M & ($C > 0))",
        "learned-image, none", place=(0, 3),
    ),
    "grads_writes_a_latent_too_many": Mutant(
        GRADS, "latent_gradients", "tl.store($P, $G.to($T), $M)", "tl.store($P, $G.to($T), $ROWS & ($C <= $N))",
        "far apart", place=(0, 4), beside=MASK,
    ),
    "padding_is_clamped_to_free_bits": Mutant(
        STATS, "chunk_rates", "tl.where($M, at_least($$$X), 0.0)", "tl.where($C >= 0, at_least($$$X), 0.0)",
        "free-bits, none", beside=MASK,
    ),
    "empty_rows_are_counted": Mutant(
        FINALIZE, "finalize", "$SUM += tl.where($M, $X, 0.0)", "$SUM += $X", "step, one sigma",
        place=(0, 2),
    ),
    # partial sums
    "the_last_partial_is_dropped": Mutant(
        FINALIZE, "row_sums", "($C < $N)[None, :]", "($C < $N - 1)[None, :]", "far apart",
    ),
    "only_the_first_block_of_partials": Mutant(
        FINALIZE, "row_sums", "range(0, $N, $S)", "range(0, $S, $S)", "free-bits, none",
    ),
    "the_last_tile_of_a_chunk_is_dropped": Mutant(
        STATS, "data_sums", "range($A, $B)", "range($A, $B - 1)", "learned-image, none",
    ),
    "one_block_of_rows_only": Mutant(
        FINALIZE, "finalize", "range(0, $N, $S)", "range(0, $S, $S)", "free-bits, none", place=(1, 2),
    ),
    # signs
    "e_is_a_sum": Mutant(ELEMENTS, "errors_at", "$X - $T", "$X + $T", "learned-image, none"),
    "sign_of_g_target": Mutant(GRADS, "data_gradients", "(-$G).to($T)", "$G.to($T)", "learned-image, none"),
    "sign_of_g_prior_mu": Mutant(MATH, "kl_grad", "-($A * $B)", "$A * $B", "prior-shared"),
    "sign_of_g_prior_logvar": Mutant(MATH, "kl_grad", "-0.5 * $B * $X", "0.5 * $B * $X", "prior-shared"),
    "sign_of_the_gap_to_a_capacity": Mutant(
        MATH, "limited_slope", "tl.where($R > $L, 1.0, 0.0) - tl.where($R < $L, 1.0, 0.0)",
        "tl.where($R > $L, 1.0, 0.0)", "capacity-above",
    ),
    # factors
    "no_scale_by_grad_loss": Mutant(
        FACTORS, "factors", "$R * values_of($$$X)", "$R + 0.0 * values_of($$$X)", "far apart", place=(0, 3),
    ),
    "no_scale_by_grad_distortion": Mutant(FACTORS, "factors", "$G + $R * $X", "$G", "learned-image, none"),
    "no_scale_by_grad_rate": Mutant(
        FACTORS, "factors", "$R * values_of($$$X)", "0.0 * values_of($$$X)", "far apart", place=(2, 3),
    ),
    "one_grad_loss_for_all": Mutant(
        FACTORS, "factors", "values_of($P, $V, $S, $ROWS, $C)", "values_of($P, $V, $S, $ROWS * 0, $C)",
        "far apart", place=(0, 3),
    ),
    "no_scale_by_beta": Mutant(
        FACTORS, "factors", "$G * betas($$$X)", "$G", "beta-sample, none",
    ),
    "the_mean_is_a_batchmean": Mutant(STRUCTS, "of", "1 / ($B * $D)", "1 / $B", "mean"),
    "g_logvar_without_its_half": Mutant(MATH, "kl_grad", "$B * 0.5 * $X", "$B * $X", "far apart"),
    "2_log_sigma_is_left_out": Mutant(MATH, "scaled_error", "$E + $L * (1.0 * $Q)", "$E", "learned-channel-image"),
    "exp_does_not_overflow": Mutant(
        MATH, "exp_reduced", "tl.where($X > 89.0, $Y, $E)", "$E", "variances of 0 and infinity",
    ),
    "exp_does_not_underflow": Mutant(
        MATH, "exp_reduced", "tl.where($X < -104.0, 0.0, $E)", "$E", "variances of 0 and infinity",
    ),
    "a_series_too_short": Mutant(MATH, "expm1mx_series", "$N if $X else $M", "8 if $X else $M", "two tiles"),
    # the step
    "the_steps_last_column_is_left_out": Mutant(STEP, "tile_of", MASK, "$ROWS & ($C < $N - 1)", "step, one log sigma"),
    "the_step_is_not_scaled": Mutant(
        OPERATORS, "__call__", "structs.GradOutputs(grad_scale)", "structs.GradOutputs(None)", "step, one log sigma",
    ),
    "the_sums_are_finished_before_the_last_program": Mutant(
        STATS, "elbo_stats_kernel", "arrive($C, $N)", "arrive($C, $N - 1)", "mean",
    ),
    "a_batchs_distortion_of_one_sample": Mutant(
        FACTORS, "elements_of", "number($$$N) * number($$$D)", "number($$$D)", "mean",
    ),
    "the_step_finishes_before_the_last_program": Mutant(
        STEP, "elbo_step_kernel", "arrive($B, $N)", "arrive($B, $N - 1)", "step, one sigma",
    ),
    "the_steps_counter_is_not_reset": Mutant(
        GRID, "arrive", "tl.atomic_xchg($B, 0, $$$X)", "tl.atomic_xchg($B, 1, $$$X)", "step, per image",
    ),
    "the_sum_of_the_latents_of_one_tile": Mutant(
        STEP, "elbo_step_kernel", "$SUM += latent_sums($$$X)", "$SUM = latent_sums($$$X)", "step, waits",
    ),
    "a_sigma_for_the_wrong_image": Mutant(
        STEP, "elbo_step_kernel", "held_gradients($P * $T, $U, $S, $$$X)",
        "held_gradients($P * $T, $U, Sums($S.a + $S.a, $S.total, $S.clamped, $S.clamped_total, $S.dims, $S.elements), "
        "$$$X)",
        "step, per image",
    ),
    "samples_that_are_not_there_pull_on_beta": Mutant(
        GRADS, "scalar_gradients", "tl.where($R < $B, $X, 0.0)", "$X", "step, one beta", place=(1, 3),
    ),
    "samples_that_are_not_there_pull_on_log_sigma": Mutant(
        GRADS, "scalar_gradients", "tl.where($R < $B, $X, 0.0)", "$X", "step, one log sigma", place=(0, 3),
    ),
    "samples_that_are_not_there_pull_on_extra_error": Mutant(
        GRADS, "scalar_gradients", "tl.where($R < $B, $X, 0.0)", "$X", "step, extra error", place=(2, 3),
    ),
    # σ inside a sample
    "one_run_of_log_sigma_only": Mutant(ELEMENTS, "offsets_of", "$X.outer is not None", "False", "learned-rows"),
    "log_sigma_does_not_wrap": Mutant(
        ELEMENTS, "run_offsets", "$C // $D % $N * $S", "$C // $D * $S", "learned-rows",
    ),
    "one_gradient_of_a_segment": Mutant(
        GRADS, "write_by_segments", "tl.sum($S, 2)", "tl.max($S, 2)", "64 elements of a log sigma",
    ),
    "one_log_sigma_for_a_run": Mutant(
        ELEMENTS, "run_offsets", "$C // $D % $N * $S", "$C * 0 % $N * $S", "learned-channel",
    ),
    "the_samples_log_sigma_is_the_first_ones": Mutant(
        ELEMENTS, "offsets_of", "row_offsets($R, $S, $W) + $X", "row_offsets($R, 0, $W) + $X",
        "learned-channel-image", place=(1, 2),
    ),
    # σ and the rate
    "no_coupling_by_sigma_for_unequal_weights": Mutant(
        FACTORS, "factors", "$E += tl.load($P)", "$E += 0.0", "optimal, none",
    ),
    "no_error_at_all_is_divided_by": Mutant(
        MATH, "sigma_term", "$X / tl.where($S == 0.0, 1.0, $S)", "$X / $S", "no error",
    ),
    "no_coupling_by_sigma_for_equal_weights": Mutant(
        FACTORS, "factors", "$E += sigma_term($S, $$$X)", "$E += 0.0 * sigma_term($S, $$$X)", "softclip",
        place=(1, 2),
    ),
    "no_coupling_by_the_sigma_of_an_image": Mutant(
        FACTORS, "factors", "$E += sigma_term($S, $$$X)", "$E += 0.0 * sigma_term($S, $$$X)",
        "per-image-softclip, none", place=(0, 2),
    ),
    "the_floor_passes_a_gradient": Mutant(
        MATH, "optimal_sigma", "tl.where($X > $F, 1.0, 0.0)", "tl.where($X > $F, 1.0, 1.0)", "floor",
    ),
    "free_bits_mask_inverted": Mutant(GRADS, "latent_gradients", "$X >= $F", "$X < $F", "free-bits, none"),
    "free_bits_mask_the_rate_too": Mutant(
        GRADS, "latent_gradients", "tl.where($X, $L, 0.0) + $R", "tl.where($X, $L + $R, 0.0)", "free-bits, none",
    ),
    "a_floor_hides_nan": Mutant(
        MATH, "at_least", "tl.where($X < $F, $F, $X)", "tl.maximum($X, $F)", "NaN in the latents",
    ),
    # Laplace, weights, what is added to A, what stands before the loss, limits of the rate
    "no_error_has_a_sign": Mutant(
        MATH, "slope", "tl.where($E < 0.0, -1.0, $E)", "tl.where($E <= 0.0, -1.0, $E)", "no error, laplace",
    ),
    "nan_has_no_sign": Mutant(
        MATH, "slope", "tl.where($E < 0.0, -1.0, $E)", "tl.where($E < 0.0, -1.0, 0.0)", "NaN in the data, laplace",
    ),
    "a_laplace_scale_is_a_variance": Mutant(
        MATH, "optimal_sigma", "tl.log($X) * (1.0 / $$$Q)", "tl.log($X) * 0.5", "laplace", place=(1, 2),
    ),
    "a_mask_multiplies": Mutant(MATH, "weighted", "tl.where($M == 0.0, 0.0, $X)", "$X", "NaN under a mask"),
    "weights_are_counted_as_one": Mutant(
        STATS, "data_sums", "counted += $M", "counted += tl.where($M > 0.0, 1.0, 0.0)", "weight, none",
    ),
    "a_mean_of_what_has_no_weight_too": Mutant(
        FACTORS, "reduction_weight", "1.0 / $X", "1.0 / elements_of(call)", "mean of weights",
    ),
    "nothing_is_divided_by": Mutant(
        MATH, "optimal_sigma", "$T / tl.where($N == 0.0, 1.0, $N)", "$T / $N", "mask-image, none",
    ),
    "extra_error_in_every_chunk": Mutant(
        STATS, "first_with_extra_error", "tl.where($C == 0, $E, 0.0)", "$E", "weight, none",
    ),
    "extra_error_has_the_scale_of_a_square": Mutant(
        GRADS, "scalar_gradients", "$A * (1.0 / $Q)", "$A", "weight, none",
    ),
    "no_slope_of_the_activation": Mutant(GRADS, "data_gradients", "$G * dx_dy", "$G", "tanh-mask"),
    "the_slope_of_a_sigmoid": Mutant(MATH, "activated", "$Z * $S * $S", "$Z * $S", "bytes-sigmoid", place=(0, 2)),
    "the_slope_of_a_tanh": Mutant(MATH, "activated", "4.0 * $W * $S * $S", "4.0 * $S * $S", "tanh-mask"),
    "the_sign_of_a_sigmoid": Mutant(
        MATH, "activated", "tl.where($Y < 0.0, $Z * $S, $S)", "$S", "bytes-sigmoid", place=(0, 1),
    ),
    "bytes_from_0_on": Mutant(ELEMENTS, "errors_at", "$T * $S + $L", "$T * $S", "bytes-pixel"),
    "errors_of_what_is_no_element": Mutant(
        ELEMENTS, "errors_at", "tl.where(inside, $E, 0.0)", "$E", "bytes-sigmoid",
    ),
    "a_clamped_logvar_has_a_gradient": Mutant(
        MATH, "clamped_grad", "tl.where($X, 0.0, $G)", "$G", "logvar-range-prior",
    ),
    "a_clamp_hides_nan": Mutant(
        MATH, "clamped", "tl.where($L < $M, $M, $L)", "tl.maximum($L, $M)", "NaN in logvar, clamped",
    ),
    "free_nats_pass_a_gradient": Mutant(
        MATH, "limited_slope", "tl.where($R >= $L, 1.0, 0.0)", "tl.where($R >= $L, 1.0, 1.0)", "free-nats, none",
    ),
    "the_batchs_rate_for_a_samples_limit": Mutant(
        FACTORS, "factors", "call.options.LIMIT == $X or call.options.LIMIT == $Y", "True", "free-nats, none",
    ),
    "the_step_holds_slopes_without_weights": Mutant(
        STEP, "sums_of_rows", "weighted($M, $U)", "$U", "step, weights", place=(1, 2),
    ),
    "the_step_adds_no_weights_up": Mutant(
        STEP, "elbo_step_kernel", "elements = sum_of($$$X)", "elements = elements_of(call)", "step, weights",
    ),
    # levels
    "a_level_begins_a_program_late": Mutant(LEVELS, "level_of", "$P < $F", "$P <= $F", "levels"),
    "a_levels_programs_are_counted_from_0": Mutant(LEVELS, "on_level", "$P - whole(cut.first)", "$P", "levels"),
    "a_level_is_finished_before_its_last_program": Mutant(
        LEVELS, "elbo_levels_kernel", "arrive($C, whole(level.cut.programs))", "arrive($C, 1)", "levels, free bits",
    ),
    "the_sum_is_of_the_levels_of_one_launch": Mutant(
        LEVELS, "elbo_levels_kernel", "arrive($C, whole(call.batch.levels))", "arrive($C, MOST)",
        "more levels than a launch",
    ),
    "levels_share_their_partial_sums": Mutant(
        LEVELS, "level_sums", "partials + whole(level.cut.partials)", "partials", "levels",
    ),
    "the_rates_of_one_level_for_all": Mutant(
        LEVELS, "level_sums", "$R + whole(level.cut.index)", "$R", "levels",
    ),
    "one_block_of_samples_of_a_level": Mutant(
        LEVELS, "level_sums", "range(0, $N, $S)", "range(0, $N, 2 * $S)", "more samples than a block",
    ),
    "one_weight_for_all_levels": Mutant(
        LEVELS, "on_chunk", "whole(level.cut.index) * $S", "0 * $S", "levels",
    ),
    "levels_with_and_without_a_prior_together": Mutant(
        "levels.py", "launches", "(*[$T.dtype for $T in $X], $$$Y)", "(1, $$$Y)", "levels",
    ),
    "the_tiles_of_a_levels_chunk": Mutant(
        LEVELS, "on_level", "cut.per_chunk - 4", "cut.per_chunk - 6", "levels, free bits",
    ),
    # memory
    "strides_of_32_bits": Mutant(ELEMENTS, "from_units", "tl.full((), $N, tl.int64) * $V", "$N * $V", "farther apart"),
    "64_bits_never_asked_for": Mutant(LAYOUT, "__init__", "$N >= 2**31", "$N >= 2**62", "far apart"),
    "samples_are_taken_for_packed": Mutant(
        LAYOUT, "batch_stride", "0 if $X else $T.stride(0)", "0 if $X else sample_size($T)", "far apart",
    ),
    "orders_are_taken_for_equal": Mutant(LAYOUT, "in_order_of", "$T if $X else $Y", "$T if True else $Y", "two orders"),
    "rows_are_taken_for_multiples_of_4": Mutant(
        LAYOUT, "unit", "all($N % $V == 0 for $N in $X)", "$V == 4 or all($N % $V == 0 for $N in $X)",
        "step, per image",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def every() -> Iterator[dict[str, Case]]:
    with cases() as made:
        yield made


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., ModuleType]]:
    """The operators of a copy of the kernels with some mutants."""
    yield from imported(KERNELS, "operators", tmp_path, monkeypatch)


def test_the_kernels_as_they_are_pass(every: dict[str, Case], kernels: Callable[..., ModuleType]) -> None:
    assert fault_of(kernels(), every) is None


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_noticed(name: str, every: dict[str, Case], kernels: Callable[..., ModuleType]) -> None:
    mutant = MUTANTS[name]
    fault = fault_of(kernels(mutant), every, first=mutant.killer)
    assert fault is not None, "nothing was noticed"
    # A copy that does not even run would pass for a noticed one.
    assert "AssertionError" in fault
