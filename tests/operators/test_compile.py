"""torch.compile: fullgraph on every mode, dynamic batches, schedules without recompiling, and the backend switch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch._inductor.config
from cases import Call, few_often, gpu_kernels_on_cpu

import fused_elbo
from fused_elbo import DecoupledELBO, LearnedSigmaELBO, backends, decoupled_elbo, decoupled_elbo_backward

pytestmark = [pytest.mark.triton, pytest.mark.cuda]
around_the_kernels = pytest.mark.skipif(
    gpu_kernels_on_cpu(), reason="what is compiled around an operator is the same for any kernel"
)
SCHEDULE = [0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(
    function: Callable[..., Any],
) -> tuple[Callable[..., Any], torch._dynamo.testing.CompileCounterWithBackend]:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    return torch.compile(function, fullgraph=True, backend=counter), counter


# One for each kind of tensor among the options. (That every mode's operators trace, test_ops.py shows in `make check`.)
OFTEN = ("learned", "learned-image", "learned-pixel", "beta-sample", "capacity-above", "prior-shared")


# One of FEW where a GPU's kernels run on the CPU: what is compiled around an operator is the same for any kernel.
@pytest.mark.parametrize("mode", ["optimal"] if gpu_kernels_on_cpu() else few_often(often=OFTEN))
def test_fullgraph_and_dynamic_batch(mode: str) -> None:
    """One graph serves every batch size from the second on; values and gradients equal the eager ones."""
    fast, counter = compiled(decoupled_elbo)
    frames = []
    for batch in (4, 5, 6, 9):
        call = Call(mode, batch=batch, dtype=torch.float64)
        got, expected = call(fast), call(decoupled_elbo)
        for a, b in zip([*got[:3], *call.gradients(got)], [*expected[:3], *call.gradients(expected)], strict=True):
            torch.testing.assert_close(a, b)
        frames.append(counter.frame_count)
    assert frames[1] == frames[-1]


@around_the_kernels
@pytest.mark.parametrize("mode", ["optimal", "learned-pixel", "prior-shared", "capacity"])
def test_the_reference_compiles_too(mode: str) -> None:
    call = Call(mode, dtype=torch.float64)
    with fused_elbo.backend("reference"):
        got, expected = call(compiled(decoupled_elbo)[0]), call(decoupled_elbo)
        for a, b in zip([*got[:3], *call.gradients(got)], [*expected[:3], *call.gradients(expected)], strict=True):
            torch.testing.assert_close(a, b)


@around_the_kernels
@pytest.mark.parametrize("mode", ["optimal", "learned-channel", "prior-shared"])
def test_backward_inside_breaks_the_graph(mode: str) -> None:
    """So does loss.backward(). What lies before and after is compiled, once for a schedule of grad_scale."""

    def function(*tensors: torch.Tensor, scale: float, **kw: Any) -> torch.Tensor:
        return decoupled_elbo_backward(2 * tensors[0], *tensors[1:], **kw, grad_scale=scale).loss + 1

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    fast, frames = torch.compile(function, backend=counter), []
    for scale in SCHEDULE:
        got, expected = Call(mode, dtype=torch.float64), Call(mode, dtype=torch.float64)
        got.kw["scale"] = expected.kw["scale"] = scale
        torch.testing.assert_close(got(fast), expected(function))
        for a, b in zip(got.leaves(), expected.leaves(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)
        frames.append(counter.frame_count)
    assert 0 < frames[2] == frames[-1]
    with pytest.raises(torch._dynamo.exc.Unsupported, match="backward"):
        expected(compiled(function)[0])


def test_a_schedule_of_beta_as_an_argument(backend: str) -> None:
    fast, counter = compiled(lambda call, beta: decoupled_elbo(*call, beta=beta))
    call = Call("optimal")
    for beta in SCHEDULE:
        elbo = fast(call.tensors, beta)
        torch.testing.assert_close(elbo.loss, elbo.distortion + beta * elbo.rate)
    assert counter.frame_count <= 2


@around_the_kernels
def test_a_schedule_of_beta_and_capacity_as_attributes(backend: str) -> None:
    for module in (DecoupledELBO(momentum=0.1), LearnedSigmaELBO(3)):
        torch._dynamo.reset()
        fast, counter = compiled(module)
        call = Call("optimal")
        module.capacity = 0.0
        for value in SCHEDULE:
            module.beta = value + 1.0
            module.capacity = value
            elbo = fast(*call.tensors)
            torch.testing.assert_close(elbo.loss, elbo.distortion + (value + 1) * (elbo.rate - value).abs())
        assert counter.frame_count <= 2


def test_a_schedule_of_a_constant_sigma(backend: str) -> None:
    fast, counter = compiled(lambda call, sigma: decoupled_elbo(*call, sigma=sigma))
    call = Call("optimal")
    for sigma in SCHEDULE[1:]:
        torch.testing.assert_close(fast(call.tensors, sigma).loss, decoupled_elbo(*call.tensors, sigma=sigma).loss)
    assert counter.frame_count <= 2


@around_the_kernels
def test_running_sigma_is_updated_in_compiled_code() -> None:
    eager, module = DecoupledELBO(momentum=0.5), DecoupledELBO(momentum=0.5)
    fast, _ = compiled(module)
    for seed in range(3):
        call = Call("optimal", seed=seed)
        fast(*call.tensors)
        eager(*call.tensors)
    torch.testing.assert_close(module.running_var, eager.running_var)
    assert module.batches_seen == 3


@around_the_kernels
def test_inductor_whole_step() -> None:
    """The default backend, on a small autoencoder: the gradients of the weights equal the eager ones."""
    encoder, decoder = torch.nn.Linear(12, 8), torch.nn.Linear(4, 12)
    x, noise = torch.rand(16, 12), torch.randn(16, 4)

    def step(x: torch.Tensor) -> torch.Tensor:
        mu, logvar = encoder(x).chunk(2, 1)
        return decoupled_elbo(decoder(mu + noise * (logvar / 2).exp()), x, mu, logvar, beta=2.0).loss

    parameters = [*encoder.parameters(), *decoder.parameters()]
    expected = torch.autograd.grad(step(x), parameters)
    # Inductor's cache on disk knows an operator by its name, so code of an older fake would be found there.
    with torch._inductor.config.patch(force_disable_caches=True):
        got = torch.autograd.grad(torch.compile(step, fullgraph=True)(x), parameters)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_backend_is_chosen_inside_and_outside_compiled_code(monkeypatch: pytest.MonkeyPatch, cpp: None) -> None:
    call = Call("optimal")
    graphs: list[str] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph.print_readable(print_output=False))
        return graph.forward

    def inside(*tensors: torch.Tensor) -> Any:
        with fused_elbo.backend("reference"):
            return decoupled_elbo(*tensors).loss

    torch.compile(inside, fullgraph=True, backend=keep)(*call.tensors)
    assert "torch.ops.fused_elbo" not in graphs[-1]
    assert backends.forced == "cpp"  # the fixture's choice is back

    outside = torch.compile(decoupled_elbo, fullgraph=True, backend=keep)
    outside(*call.tensors)
    assert "torch.ops.fused_elbo" in graphs[-1]
    with fused_elbo.backend("reference"):
        outside(*call.tensors)
    assert "torch.ops.fused_elbo" not in graphs[-1]


def test_bad_input_is_refused_in_compiled_code_too() -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(Exception, match="recon and target must have the same shape"):
        torch.compile(decoupled_elbo, backend="eager")(x, x[:1], x, x)
