"""A test of the tests of the aggregate posterior's Triton kernels: kernels with one fault each, in the interpreter, as
test_mutants.py has those of the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from mutants import Mutant, imported

from fused_elbo import backends

if backends.triton.runs_on_cpu() != "its interpreter":
    pytest.skip(
        "the kernels are not in Triton's interpreter: TRITON_INTERPRET=1 (make test-triton)", allow_module_level=True
    )

from kernel_check import fault_of
from test_triton_aggregate import AggregateCase, aggregate_cases

pytestmark = pytest.mark.triton
KERNELS = Path(__file__).parents[2] / "kernels"
MATH, MIXTURE, SUMS, GRADS = "_math.py", "_mixture.py", "aggregate_sums.py", "aggregate_grads.py"

MUTANTS = {
    # the formulas
    "no_rescale_on_a_new_largest": Mutant(MATH, "add_exp", "tl.where($G, $S, 1.0)", "1.0 + 0.0 * $S", "whole"),
    "the_largest_of_nothing_is_infinite": Mutant(
        MATH, "no_exp", "-1.7e308 if $X else $Y", 'float("-inf")', "whole",
    ),
    "threads_are_added_up_unscaled": Mutant(MATH, "merged_exp", "$S * exp_of($$$X)", "$S", "whole"),
    "the_sign_of_the_rate_of_l": Mutant(MATH, "log_normal_slopes", "$S * $D + 0.5", "$S * $D - 0.5", "whole"),
    "l_without_its_one": Mutant(MATH, "log_normal_slopes", "$S * $D + 0.5", "$S * $D", "whole"),
    "the_sign_of_g_z": Mutant(GRADS, "point_gradients", "2.0 * $F", "-2.0 * $F", "whole"),
    "the_sign_of_g_mu": Mutant(GRADS, "component_gradients", "-2.0 * $F", "2.0 * $F", "whole"),
    # weights
    "the_own_weight_is_left_out": Mutant(
        MIXTURE, "with_own_weight", "tl.where($A == $B, own, 0.0)", "tl.where($A == $B, 0.0, 0.0)", "whole",
    ),
    "the_own_component_is_one_off": Mutant(
        MIXTURE, "with_own_weight", "tl.where($A == $B, own, 0.0)", "tl.where($A == $B + 1, own, 0.0)", "whole",
    ),
    "own_components_are_looked_for_too_late": Mutant(
        MIXTURE, "with_own_weight", "$C < $F + ROWS", "$C + 1 < $F + ROWS", "in parts",
    ),
    "own_components_are_looked_for_too_early": Mutant(
        MIXTURE, "with_own_weight", "$F < $C + COMPONENTS", "$F + 1 < $C + COMPONENTS", "fp32, in parts",
    ),
    "the_others_weight_is_left_out": Mutant(MIXTURE, "with_weights", "$C + others", "$C + 0.0 * others", "alike"),
    # tails
    "components_that_are_not_there": Mutant(
        MIXTURE, "with_weights", 'tl.where($M, $X, float("-inf"))', "$X", "whole",
    ),
    "latents_that_are_not_there": Mutant(
        MIXTURE, "joint_densities", "tl.where(inside, $C, 0.0)", "$C", "whole",
    ),
    "a_latent_too_many_of_a_marginal": Mutant(
        SUMS, "marginal_sums", "$P[:, None] & ($C < $N)[None, :]", "$P[:, None] & ($C <= $N)[None, :]", "whole",
    ),
    "a_point_too_many_of_the_joint": Mutant(SUMS, "joint_sums", "rows < $N", "rows <= $N", "whole"),
    "a_row_too_many_of_a_gradient": Mutant(
        GRADS, "component_gradients", "(components < $N)[:, None]", "(components <= $N)[:, None]", "whole",
        place=(1, 2),
    ),
    "points_of_the_next_chunk_pull_too": Mutant(
        GRADS, "component_gradients", "rows < whole(chunk.last)", "rows <= whole(chunk.last)", "in parts",
    ),
    # parts
    "a_step_too_few": Mutant(MIXTURE, "steps_of", "($S + 1) * $N", "($S + 1) * $N - 1", "whole"),
    "a_split_is_left_out": Mutant(SUMS, "total_of", "range(0, parts)", "range(0, parts - 1)", "in parts"),
    "a_part_of_a_gradient_is_left_out": Mutant(
        GRADS, "total_of", "range(0, whole($P))", "range(0, whole($P) - 1)", "in parts",
    ),
    "the_gradients_of_the_last_chunk_alone": Mutant(
        GRADS, "write_owned", "found += $X.to($T)", "found += 0.0", "in parts",
    ),
    "shares_of_another_point": Mutant(
        GRADS, "share_rows", "$R % TOGETHER", "($R + 1) % TOGETHER", "whole",
    ),
    "the_joint_has_no_gradient": Mutant(
        GRADS, "factors", "tl.fma(tl.broadcast_to($$$G), $R, $S)", "tl.broadcast_to($$$G) * $R", "whole",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def every() -> dict[str, AggregateCase]:
    return aggregate_cases()


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., ModuleType]]:
    """The operators of a copy of the kernels with some mutants."""
    yield from imported(KERNELS, "aggregate", tmp_path, monkeypatch)


def test_the_kernels_as_they_are_pass(every: dict[str, AggregateCase], kernels: Callable[..., ModuleType]) -> None:
    assert fault_of(kernels(), every) is None


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_noticed(name: str, every: dict[str, AggregateCase], kernels: Callable[..., ModuleType]) -> None:
    mutant = MUTANTS[name]
    fault = fault_of(kernels(mutant), every, first=mutant.killer)
    assert fault is not None, "nothing was noticed"
    # A copy that does not even run would pass for a noticed one.
    assert "AssertionError" in fault
