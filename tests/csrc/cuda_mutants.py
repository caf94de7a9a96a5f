"""The faults that are put into the CUDA kernels, one at a time: test_cuda_shim.py says who must notice them."""

from __future__ import annotations

from mutants import Mutant

DEVICE, ELEMENTS = "cuda/device.cuh", "cuda/elements.cuh"
STATS, FINALIZE, GRADS, STEP, EACH, LEVELS = (
    f"cuda/elbo_{stem}.cuh" for stem in ("stats", "finalize", "grads", "step", "step_each", "levels")
)
MIXED, READ, LAUNCH = "cuda/mixed.cuh", "cuda/mixed_elements.cuh", "cuda/launch.h"
AGGREGATE, MIXTURE_GRADS, TILES = (f"cuda/aggregate{stem}.cuh" for stem in ("", "_grads", "_tiles"))
INPUTS, TERMS, MATH, SPAN = "inputs.h", "elbo.h", "elbo_math.h", "span.h"

# Few elements then make many chunks, several for a warp, and chunks of several times the least size.
SMALL = (
    Mutant("cuda/schedule.h", "", "constexpr int64_t kLeast = $N;", "constexpr int64_t kLeast = 256;"),
    Mutant("cuda/schedule.h", "", "constexpr int64_t kMost = $N;", "constexpr int64_t kMost = 512;"),
    Mutant("cuda/schedule.h", "", "constexpr int64_t kMany = $N;", "constexpr int64_t kMany = 16;"),
    Mutant(
        "cuda/aggregate_cut.h",
        "",
        "constexpr int64_t kAggregateBlocks = $N;",
        "constexpr int64_t kAggregateBlocks = 2;",
    ),
)

MUTANTS = {
    # barriers and shuffles
    "no_barrier_before_the_block_sums_up": Mutant(
        DEVICE, "block_sum", "__syncthreads();", "", ("descending", "optimal, none"), place=(0, 2),
    ),
    "no_barrier_before_the_next_block_sum": Mutant(
        DEVICE, "block_sum", "__syncthreads();", "", ("descending", "optimal, none"), place=(1, 2),
    ),
    "no_barrier_before_the_total": Mutant(
        FINALIZE, "sum_chunks", "__syncthreads();", "", ("ascending", "step, given, several chunks"), place=(1, 2),
    ),
    "half_a_warp_is_summed": Mutant(DEVICE, "warp_sum", "$STEP > 0", "$STEP > 1", ("random:1", "far apart")),
    "a_barrier_in_a_branch": Mutant(
        DEVICE, "block_sum", "__syncthreads();", "if (warp() == 0) __syncthreads();", ("random:1", "far apart"),
        place=(0, 2),
    ),
    # tails
    "no_elements_after_the_last_vector": Mutant(
        DEVICE, "walk", "$N - $X", "$HEAD", ("descending", "per-image-softclip, none"), place=(1, 2),
        beside="($ALL - $HEAD) / $V",
    ),
    "an_element_too_many": Mutant(
        DEVICE, "walk", "$N - $X", "$N - $X + 1", ("descending", "per-image-softclip, none"), place=(1, 2),
    ),
    "the_head_is_taken_for_the_tail": Mutant(
        DEVICE, "walk", "$G < $HEAD ? $G : $G + $X", "$G + $X", ("descending", "per-image-softclip, none"),
    ),
    "a_vector_too_few": Mutant(
        DEVICE, "walk_groups", "$G < $N", "$G < $N - 1", ("descending", "per-image-softclip, none"), place=(3, 4),
    ),
    "vectors_off_their_place": Mutant(
        DEVICE, "walk", "$HEAD + $G * $N", "$G * $N", ("descending", "per-image-softclip, none"),
    ),
    "one_half_twice_from_the_end": Mutant(
        DEVICE, "nth", "$N - 1 - $I", "$N - 1 - $I / 2", ("descending", "per-image-softclip, none"),
    ),
    "one_turn_of_two": Mutant(
        DEVICE, "walk_groups", "$G += $T * $W", "$G += 2 * $T * $W", ("ascending", "step, per image, of 75 kB"),
    ),
    # latents
    "vectors_of_latents_at_any_address": Mutant(
        ELEMENTS, "vector", "$ADDRESS | 16", "0u | 16", ("descending", "per-image-softclip, none"),
    ),
    "vectors_of_gradients_at_any_address": Mutant(
        GRADS, "latent_gradient", "min($A.vector(), $B.vector())", "16",
        ("descending", "latents of one sample for all"), place=(0, 2),
    ),
    "no_latents_after_the_last_vector": Mutant(
        ELEMENTS, "walk", "$I < $N", "$I < 0", ("descending", "per-image-softclip, none"), place=(2, 3),
    ),
    "the_first_turn_again": Mutant(
        DEVICE, "take", "$W[$K - $N] = $W[$K]", "$W[$K] = $W[$K]", ("random:1", "far apart"),
    ),
    "the_halves_of_64_bits_swapped": Mutant(
        DEVICE, "write", "Few<uint32_t, 2>{$A, $B}", "Few<uint32_t, 2>{$B, $A}",
        ("descending", "variances of 0 and infinity"),
    ),
    "one_of_the_vectors_alone": Mutant(
        ELEMENTS, "walk", "$G += kWarpSize", "$G += 1 << 20", ("ascending", "step, given, several chunks"),
        place=(0, 2),
    ),
    # chunks and partial sums
    "a_dropped_partial": Mutant(
        FINALIZE, "sum_chunks", "for (int64_t $P = threadIdx.x % $W; $P < $N; $P += $W) $BODY",
        "for (int64_t $P = threadIdx.x % $W; $P < $N - 1; $P += $W) $BODY", ("random:1", "far apart"),
    ),
    "one_round_of_the_grid": Mutant(
        DEVICE, "for_chunks", "$I += $WARPS", "$I += int64_t{1} << 40", ("ascending", "step, waits"),
    ),
    "samples_beyond_the_block": Mutant(
        FINALIZE, "sum_chunks", "for (int64_t $I = 0; $I < $N; $I += $TOGETHER) $BODY",
        "for (int64_t $I = 0; $I < 1; $I += $TOGETHER) $BODY", ("ascending", "more samples than finalize has threads"),
    ),
    "a_chunk_too_long": Mutant(
        DEVICE, "for_chunks", "min($N - $I, $SIZE)", "min($N - $I + 1, $SIZE)", ("random:1", "far apart"),
    ),
    "32_bits_for_an_offset": Mutant(
        SPAN, "at", "$I * $S + $E", "static_cast<int32_t>($I * $S) + $E", ("random:1", "far apart"),
    ),
    # factors
    "no_scale_by_the_reduction": Mutant(
        TERMS, "weight_of", "$S * at($G, $I)", "at($G, $I)", ("ascending", "step, learned-channel"), place=(0, 3),
    ),
    "no_scale_by_grad_distortion": Mutant(
        TERMS, "weight_of", "$S * at($G, $I)", "$S", ("descending", "per-image-softclip, none"), place=(1, 3),
    ),
    "no_scale_by_grad_rate": Mutant(
        TERMS, "weight_of", "$S * at($G, $I)", "$S", ("random:1", "far apart"), place=(2, 3),
    ),
    "one_grad_loss_for_all": Mutant(
        TERMS, "weight_of", "$S * at($G, $I)", "$S * at($G, 0)", ("random:1", "far apart"), place=(0, 3),
    ),
    "no_scale_by_beta": Mutant(
        MATH, "factors", "$LOSS * $BETA", "$LOSS", ("descending", "beta-sample, none"), place=(0, 5),
    ),
    "no_coupling_by_a_shared_sigma": Mutant(GRADS, "factors_of", "$E += $X;", "", ("descending", "optimal, none")),
    "weights_are_taken_for_equal": Mutant(
        TERMS, "weighs_alike", "$A == 0 && $B == 0", "$A != 0 || $B == 0",
        ("descending", "optimal, none"),
    ),
    "no_coupling_by_the_sigma_of_an_image": Mutant(
        MATH, "factors", "$E += $S * $X / $Y", "$E += 0", ("descending", "per-image-softclip, none"),
    ),
    "sign_of_g_target": Mutant(
        GRADS, "data_gradient", "return -$G;", "return $G;", ("descending", "per-image-softclip, none"),
    ),
    "sign_of_the_capacity_gap": Mutant(
        MATH, "limited_slope", "($R > $C) - ($R < $C)", "($R > $C)", ("ascending", "capacity-above"),
    ),
    "free_nats_have_a_gradient_below": Mutant(
        MATH, "limited_slope", "$R >= $C", "true", ("ascending", "free-nats-below, sum"),
    ),
    "a_sample_is_limited_by_the_batch": Mutant(
        TERMS, "factors_of", "limits_batch($M) ? $A : $B", "$A", ("ascending", "free-nats, none"),
    ),
    "free_bits_mask_inverted": Mutant(
        GRADS, "latent_gradient", "$X >= $F", "$X < $F", ("descending", "free-bits, none"),
    ),
    "free_bits_hide_nan": Mutant(
        STATS, "rates", "$X < $F ? $F : $X", "$X >= $F ? $X : $F", ("ascending", "NaN in the latents"),
    ),
    "a_gradient_above_the_range_of_logvar": Mutant(
        MATH, "clamped_grad", "($X < $A) | ($X > $B)", "($X < $A)", ("ascending", "logvar-range, none"),
    ),
    # the gradient of a log σ that neighbours share
    "one_lane_of_a_segment": Mutant(GRADS, "put_segment", "warp_sum($X)", "$X", ("ascending", "segments")),
    "one_element_of_a_lane": Mutant(
        GRADS, "data_gradient", "$SUM += $G.log_sigma;", "$SUM = $G.log_sigma;", ("ascending", "segments"),
    ),
    "one_element_of_a_mixed_lane": Mutant(
        GRADS, "mixed_gradient", "$SUM += $G.log_sigma.value[j];", "$SUM = $G.log_sigma.value[j];",
        ("ascending", "segments, laplace"),
    ),
    "a_segment_of_two_log_sigmas": Mutant(
        "cuda/schedule.h", "segment_of", "$RUN % ($PARTS * $V) == 0", "true", ("ascending", "segments"),
    ),
    # the order of the second pass
    "chunks_forward_again": Mutant(DEVICE, "for_chunks", "nth<Way>($I, $N)", "$I", ("ascending", "order")),
    "vectors_forward_again": Mutant(DEVICE, "walk", "nth<Way>($G, $N)", "$G", ("ascending", "order")),
    "mixed_vectors_forward_again": Mutant(
        MIXED, "mixed_sums", "nth<Way>($G, $N)", "$G", ("ascending", "order, laplace"),
    ),
    # what is added to a sample's error
    "no_extra_error": Mutant(FINALIZE, "sum_chunks", "$S + at($E, $I)", "$S", ("ascending", "extra, none")),
    "no_extra_error_before_the_sigma_of_an_image": Mutant(
        EACH, "own_sample", "$S + at($E, $I)", "$S", ("ascending", "step, laplace-image"),
    ),
    "no_extra_error_in_one_pass": Mutant(
        STEP, "last_block", "$A += at($E, $I)", "$A += 0", ("ascending", "step, extra"),
    ),
    "the_gradient_of_q_extra_errors": Mutant(GRADS, "put_extra_error", "$F / $Q", "$F", ("ascending", "extra, none")),
    "the_gradient_of_q_extra_errors_in_one_pass": Mutant(
        STEP, "put_extra_error", "$F / $Q", "$F", ("ascending", "step, extra"),
    ),
    # elements of more than two numbers
    "the_sign_of_0_is_1": Mutant(
        MATH, "slope", "select($E > A(0), $ONE, $X)", "select($E < A(0), $X, $ONE)",
        ("ascending", "laplace, partly without error"),
    ),
    "every_likelihood_is_gaussian": Mutant(
        MIXED, "with_likelihood", "$DATA.exponent == 2", "true", ("ascending", "laplace, none"),
    ),
    "nan_passes_the_mask": Mutant(
        MATH, "weighted", "select($M == $ZERO, V{}, $M * $F)", "$M * $F", ("ascending", "NaN behind the mask"),
    ),
    "the_first_samples_weights_for_all": Mutant(
        GRADS, "elements_of", "3 * ($N + 1) + $I", "3 * ($N + 1)", ("ascending", "tanh-mask, none"),
    ),
    "the_mean_is_not_of_the_weights": Mutant(
        FINALIZE, "finish", "$N == 0 ? $A : $B", "$A", ("ascending", "weight, mean"),
    ),
    "the_mean_in_one_pass_before_the_weights_are_known": Mutant(
        "cuda/elbo_step_each.cu", "elbo_step_each_fits", "!$W || $R != $MEAN", "true",
        ("ascending", "step, weights, mean"),
    ),
    "no_slope_of_the_activation": Mutant(
        MIXED, "mixed_sums", "-$G * $S", "-$G", ("ascending", "sigmoid-pixel, batchmean"),
    ),
    "bytes_begin_at_0": Mutant(
        MATH, "scaled_byte", "$B * $S + $L", "$B * $S", ("ascending", "bytes-pixel, batchmean"),
    ),
    "vectors_off_their_place_with_an_activation": Mutant(
        MIXED, "mixed_sums", "$HEAD + nth<$WAY>($G, $N) * $V", "nth<$WAY>($G, $N) * $V",
        ("ascending", "sigmoid-pixel, batchmean"),
    ),
    "no_weight_of_the_gradient": Mutant(
        MIXED, "mixed_sums", "weighted($M, $G)", "$G", ("ascending", "weight, mean"), place=(1, 4),
    ),
    "the_same_group_again": Mutant(
        MIXED, "walk_ahead", "$NEXT = load($$$X)", "$NEXT = $NEXT", ("ascending", "step, tanh, two dtypes"),
        place=(1, 2),
    ),
    "one_look_up_for_a_vector": Mutant(
        READ, "take", "$F + $I + $J", "$F + $I", ("ascending", "bytes-pixel, batchmean"),
    ),
    "sign_of_g_target_kept": Mutant(
        MIXED, "write", "-$G", "$G", ("ascending", "step, laplace-image"),
    ),
    "the_targets_gradient_behind_an_activation": Mutant(
        LAUNCH, "keeps_slopes", "!($A && $B)", "true", ("ascending", "step, sigmoid, of the target too"),
    ),
    # σ inside a sample, and layouts
    "log_sigma_does_not_wrap": Mutant(TERMS, "offset_of", "$I / $D % $N", "$I / $D", ("ascending", "learned-rows")),
    "one_dimension_of_log_sigma_only": Mutant(TERMS, "offset_of", "$K < $N", "$K < 1", ("ascending", "learned-rows")),
    "the_samples_log_sigma_is_the_first_ones": Mutant(
        INPUTS, "set_broadcast", "span_of($T, $S)", "span_of($T, 0)", ("ascending", "learned-channel-image"),
    ),
    "log_sigma_is_rounded_to_the_targets_dtype": Mutant(
        INPUTS, "set_data", "$A &= $B", "$A |= $B", ("descending", "a log σ of another dtype"),
    ),
    "orders_are_taken_for_equal": Mutant(
        "layout.h", "in_order_of", "same_order($A, $B) && $X", "$X", ("ascending", "two orders"),
    ),
    # the step
    "the_last_block_does_not_wait": Mutant(
        STEP, "latent_role", "$GRID.sync();", "", ("ascending", "step, beta-tensor"), place=(0, 2),
    ),
    "data_do_not_wait_for_the_leader": Mutant(
        STEP, "data_role", "$GRID.sync();", "", ("ascending", "step, beta-tensor"), place=(1, 2),
    ),
    "nobody_waits_for_the_leader": Mutant(
        STEP, "latent_role", "$GRID.sync();", "", ("ascending", "step, beta-tensor"), place=(1, 2),
    ),
    "a_row_too_few_in_registers": Mutant(
        STEP, "read", "for (int $K = 0; $K < $N; ++$K) $SUM += square($E);",
        "for (int $K = 0; $K < $N - 1; ++$K) $SUM += square($E);", ("random:1", "step, in shared memory, fp16"),
    ),
    "one_place_in_shared_memory_for_all": Mutant(
        STEP, "beyond", "($K * $V + $J) * $N + $X", "$K * $V + $J", ("random:1", "step, in shared memory, fp16"),
    ),
    "a_dropped_block": Mutant(
        STEP, "last_block", "for (int $B = threadIdx.x; $B < $N; $B += $D) $BODY",
        "for (int $B = threadIdx.x; $B < $N - 1; $B += $D) $BODY", ("ascending", "step, beta-tensor"),
    ),
    "no_grad_scale": Mutant(
        STEP, "last_block", "loss_weight($A, 0)", "Weight{$A.scale, 0, 0}", ("ascending", "step, beta-tensor"),
    ),
    "what_does_not_fit_is_tried": Mutant(
        "cuda/step_plan.h", "step_plan", "$N <= $LIMIT", "true", ("random:1", "step, too large"),
    ),
    "no_barrier_before_the_next_sample": Mutant(
        EACH, "own_sample", "__syncthreads();", "", ("ascending", "step, per image, several for a block"),
    ),
    "one_sample_of_a_block": Mutant(
        EACH, "run_step_each", "$I += $N", "$I += int64_t{1} << 40",
        ("ascending", "step, per image, several for a block"),
    ),
    "all_warps_keep_at_one_place": Mutant(
        EACH, "own_sample", "on_chip + $I", "on_chip", ("ascending", "step, per image, of 75 kB"),
    ),
    "no_grad_scale_for_each": Mutant(
        EACH, "own_factors", "loss_weight($A, $I)", "Weight{$A.scale, 0, 0}", ("ascending", "step, constant"),
    ),
    "too_large_a_sample_is_tried": Mutant(
        "cuda/elbo_step_each.cu", "elbo_step_each_fits", "$N * 4 <= $M", "$N * 4 > 0",
        ("descending", "step, per image, too large"),
    ),
    "batches_are_taken_for_dense": Mutant(
        "cuda/elbo_step.cu", "one_block_of_memory", "$B == 1 || $S == $N", "true",
        ("descending", "step, samples apart"),
    ),
    # levels
    "the_first_chunk_of_a_level_again": Mutant(
        LEVELS, "for_level_chunks", "$I % level.chunks_per_sample * $S", "0 * $S", ("ascending", "levels, fp32"),
    ),
    "levels_share_their_partial_sums": Mutant(
        LEVELS, "run_levels", "$S + level.first_partial + $C", "$S + $C", ("ascending", "levels"),
    ),
    "a_dropped_partial_of_a_level": Mutant(
        LEVELS, "run_level_sums", "$P < $B[level + 1]", "$P < $B[level + 1] - 1", ("ascending", "levels"),
    ),
    "one_level_for_a_warp": Mutant(
        LEVELS, "run_level_sums", "$L += static_cast<int>($D) / $W", "$L += 1 << 20",
        ("ascending", "more levels than a launch"),
    ),
    "no_barrier_before_the_levels_are_added_up": Mutant(
        LEVELS, "run_level_sums", "__syncthreads();", "", ("ascending", "more levels than a launch"), place=(0, 2),
    ),
    "no_barrier_before_the_next_samples_levels": Mutant(
        LEVELS, "run_level_sums", "__syncthreads();", "", ("descending", "more samples than a block"), place=(1, 2),
    ),
    "one_weight_for_all_levels": Mutant(
        LEVELS, "run_levels_grads", "const_cast<char*>(level.grad)", "args.grad.tensor.base", ("ascending", "levels"),
    ),
    # the aggregate posterior
    "no_rescale_to_a_new_maximum": Mutant(
        AGGREGATE, "rise", "$S *= exp_of_negative($A - $B);", "", ("ascending", "aggregate"),
    ),
    "one_maximum_for_all_segments": Mutant(
        AGGREGATE, "add", "$O.sum * exp_of_negative($A - $B)", "$O.sum", ("ascending", "aggregate"),
    ),
    "no_density_is_not_infinitely_far": Mutant(
        AGGREGATE, "rise", "$M == $INFINITY ? $ZERO : $X", "$X", ("ascending", "aggregate, fp16"),
    ),
    "the_own_component_weighs_like_the_others": Mutant(
        TILES, "of", "$A == $B ? $E : $Z", "$Z", ("ascending", "aggregate, own"),
    ),
    "the_own_weight_for_the_joint_alone": Mutant(
        TILES, "meets", "$E != $Z && $X", "false", ("ascending", "aggregate, own"),
    ),
    "sign_of_g_z": Mutant(
        "cuda/aggregate.cu", "aggregate_grads", "sums.each[0] = {$P, $S, -2, $G};", "sums.each[0] = {$P, $S, 2, $G};",
        ("ascending", "aggregate"),
    ),
    "no_minus_one_of_g_logvar": Mutant(
        "aggregate_math.h", "log_normal_grad", "$S - Scalar<V>(0.5)", "$S", ("ascending", "aggregate"),
    ),
    "the_last_element_again": Mutant(
        TILES, "for_latents", "$X < $N ? $R : $NONE", "$R", ("ascending", "aggregate"),
    ),
    "the_first_latents_again": Mutant(
        TILES, "for_latents", "fetch(k + kStaged);", "", ("ascending", "aggregate, many latents"),
    ),
    "no_latents_after_the_staged": Mutant(
        TILES, "for_latents", "min(place.end - k, kStaged)", "min(place.end - k - 1, kStaged)",
        ("ascending", "aggregate"),
    ),
    "latents_before_they_are_staged": Mutant(
        TILES, "for_latents", "__syncwarp();", "", ("descending", "aggregate"), place=(0, 2),
    ),
    "latents_staged_over_the_last_ones": Mutant(
        TILES, "for_latents", "__syncwarp();", "", ("ascending", "aggregate, many latents"), place=(1, 2),
    ),
    "sums_before_all_warps_are_there": Mutant(
        TILES, "over_warps", "__syncthreads();", "", ("ascending", "aggregate, own"),
    ),
    "one_warp_of_those_that_share_the_latents": Mutant(
        TILES, "over_warps", "$W < place.warps", "$W < 1", ("ascending", "aggregate, own"),
    ),
    "sums_of_a_tile_over_the_last_ones": Mutant(
        AGGREGATE, "run_aggregate", "__syncthreads();", "", ("ascending", "aggregate, own"), place=(1, 3),
    ),
    "factors_before_all_warps_are_there": Mutant(
        MIXTURE_GRADS, "run_aggregate_grads", "__syncthreads();", "", ("ascending", "aggregate, own"), place=(1, 3),
    ),
    "sums_of_a_tile_over_the_factors": Mutant(
        MIXTURE_GRADS, "run_aggregate_grads", "__syncthreads();", "", ("ascending", "aggregate, own"), place=(2, 3),
    ),
    "the_joint_sum_of_one_warp": Mutant(
        AGGREGATE, "run_aggregate", "$W < place.warps", "$W < 1", ("ascending", "aggregate, own"),
    ),
    "groups_have_one_segment": Mutant(
        TILES, "Place", "$B * cut.groups + group", "$B * cut.groups", ("ascending", "aggregate"),
    ),
    "a_dropped_segment": Mutant(
        AGGREGATE, "run_log_sums", "$S < args.segments", "$S < args.segments - 1", ("ascending", "aggregate"),
    ),
    "a_dropped_segment_of_the_gradients": Mutant(
        MIXTURE_GRADS, "run_grad_sums", "$S < $ONE.segments", "$S < $ONE.segments - 1", ("ascending", "aggregate"),
    ),
    "half_of_the_lanes_of_a_log_sum": Mutant(
        AGGREGATE, "run_log_sums", "$STEP > 0", "$STEP > 1", ("ascending", "aggregate, many segments"),
    ),
    "one_place_for_the_fields_of_all_groups": Mutant(
        TILES, "Fields", "place.group * $N", "0", ("ascending", "aggregate"),
    ),
}  # fmt: skip

# Which AddressSanitizer alone can see: they change no value.
OUT_OF_BOUNDS = {
    "an_element_too_many_of_the_data": Mutant(
        GRADS,
        "data_gradient",
        "walk<$A, $B, $C>($N, $$$X)",
        "walk<$A, $B, $C>($N + 1, $$$X)",
        ("ascending", "softclip, none"),
    ),
    "a_row_beyond_the_end": Mutant(STEP, "Row", "$K < $N && $I < $M", "$K < $N", ("ascending", "step, optimal")),
}
