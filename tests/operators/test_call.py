"""The one definition of a call and the options of the public functions: what is derived from them holds together."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from fused_elbo import (
    DecoupledELBO,
    LearnedSigmaELBO,
    arguments,
    call,
    decoupled_elbo,
    decoupled_elbo_backward,
    gaussian_kl,
    options,
)
from fused_elbo.call import (
    Gradients,
    GradLogSums,
    GradOutputs,
    LogSums,
    Mixture,
    MixtureGradients,
    Options,
    Outputs,
    Tensors,
)
from fused_elbo.operators import elbo, registry


@pytest.mark.parametrize("name", elbo.NAMES)
def test_every_operator_begins_with_the_tensors_and_the_options(name: str) -> None:
    arguments = [argument.name for argument in registry.find(name)._schema.arguments]
    assert arguments[: len(Tensors._fields) + len(Options._fields)] == [*Tensors._fields, *Options._fields]


def test_gradients_are_of_the_first_tensors_in_their_order() -> None:
    assert Tensors._fields[: len(Gradients._fields)] == Gradients._fields
    assert Outputs._fields[: len(GradOutputs._fields)] == GradOutputs._fields
    for i in range(len(Gradients._fields)):
        assert call.mask_of(k == i for k in range(len(Tensors._fields))) == (1 << i) % (1 << len(Gradients._fields))


def test_the_aggregates_operators_take_its_structures() -> None:
    taken = {
        name: [argument.name for argument in registry.find(name)._schema.arguments]
        for name in ("aggregate", "aggregate_grads", "log_aggregate")
    }
    grads = [f"grad_{name}" for name in GradLogSums._fields]
    assert taken["aggregate"] == [*Mixture._fields]
    assert taken["aggregate_grads"] == [*Mixture._fields, *LogSums._fields, *grads, "mask"]
    assert taken["log_aggregate"] == [*Mixture._fields, "backend"]
    assert LogSums._fields == GradLogSums._fields
    assert Mixture._fields[: len(MixtureGradients._fields)] == MixtureGradients._fields


def test_a_schema_has_each_fields_type() -> None:
    assert call.schema(GradOutputs, "grad_") == "Tensor? grad_loss, Tensor? grad_distortion, Tensor? grad_rate"
    assert call.schema(Options).startswith("int exponent, int activation, bool constant, float target_low")
    assert "float? logvar_min" in call.schema(Options)
    assert call.schema(Mixture) == "Tensor z, Tensor mu, Tensor logvar, int own, int? dataset_size"


def test_the_options_that_are_numbers_are_fields_of_a_call() -> None:
    """In one run and one order: arguments.py puts them there by place."""
    first = Options._fields.index(next(iter(options.NUMBERS)))
    assert Options._fields[first : first + len(options.NUMBERS)] == tuple(options.NUMBERS)
    assert set(options.NUMBERS) <= set(options.DEFAULTS)


def of(function: Any) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind == p.KEYWORD_ONLY}


def test_signatures_show_every_option_with_its_default() -> None:
    assert of(decoupled_elbo) == options.DEFAULTS
    assert of(decoupled_elbo_backward) == {**options.DEFAULTS, "grad_scale": None, "retain_graph": False}
    assert of(gaussian_kl) == {
        "prior": None, "per_level": False, "logvar_range": None, "free_bits": 0.0, "limit": None,
        "reduction": "batchmean", "process_group": None,
    }  # fmt: skip
    assert inspect.signature(DecoupledELBO).parameters["min_log_sigma"].default == -7.0
    assert "min_log_sigma" not in inspect.signature(LearnedSigmaELBO).parameters


def test_every_option_has_a_type_and_a_default() -> None:
    assert options.ElboOptions.__optional_keys__ == set(options.DEFAULTS)


@pytest.mark.parametrize(
    "function", [lambda **kw: decoupled_elbo(*[torch.zeros(2, 3)] * 4, **kw), DecoupledELBO, LearnedSigmaELBO]
)
def test_an_option_that_there_is_not(function: Any) -> None:
    with pytest.raises(TypeError, match=r"got an unexpected keyword argument 'betta'; it takes .*free_bits"):
        function(betta=1.0)


def test_options_that_are_plain_values_are_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(arguments, "_of_plain", {})
    monkeypatch.setattr(arguments, "resolve_sigma", lambda *args: seen.append(args[1]) or arguments.Sigma())
    x, z, prior = torch.zeros(2, 3), torch.zeros(2, 2), (torch.zeros(2), torch.zeros(2))
    for kw in ({}, {"beta": 2}, {"beta": 2.0}, {"beta": torch.tensor(2.0)}, {"prior": prior}):
        for _ in range(3):
            decoupled_elbo(x, x, z, z, **kw)
    assert [(given["beta"], given["prior"]) for given in seen[:3]] == [(1.0, None), (2, None), (2.0, None)]
    assert len(seen) == 3 + 3 + 3  # what belongs to one call alone is looked at every time
    for step in range(2 * arguments.MOST):
        decoupled_elbo(x, x, z, z, beta=step / 7)
    assert len(arguments._of_plain) <= arguments.MOST


def test_a_value_that_only_equals_a_good_one_is_refused() -> None:
    x, z = torch.zeros(2, 3), torch.zeros(2, 2)
    decoupled_elbo(x, x, z, z, beta=1, free_bits=0)
    for name, value in (("beta", True), ("free_bits", False)):
        with pytest.raises(TypeError, match=f"{name}: expected a number, got {value}"):
            decoupled_elbo(x, x, z, z, **{name: value})
