"""What only a GPU can show: that a step never waits for it, that CUDA graphs capture it, and other devices' tensors.

The values are tested by the other files, which run on a GPU too: `make gpu-check` runs them all there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import torch
from cases import MODES, Call, allowed
from torch import Tensor

import fused_elbo
from fused_elbo import decoupled_elbo, decoupled_elbo_backward

if not torch.cuda.is_available():
    pytest.skip("needs a GPU; torch.cuda finds none", allow_module_level=True)


@pytest.fixture(autouse=True, params=["triton", "cuda"])
def on_the_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    with ExitStack() as stack:
        try:
            stack.enter_context(fused_elbo.backend(request.param))
        except fused_elbo.BackendUnavailable as error:
            pytest.skip(f"needs the {request.param} backend: {error}")
        stack.enter_context(torch.device("cuda"))
        yield


class Step:
    """Forward and backward of one call, on tensors that are all made beforehand."""

    def __init__(self, mode: str, reduction: str) -> None:
        self.call = Call(mode, reduction, data=(3, 20, 20), latent=(37,))
        self.weights = [torch.linspace(0.5, 1.5, o.numel()).reshape(o.shape) for o in self.call(decoupled_elbo)[:3]]

    def __call__(self) -> list[Tensor]:
        outputs = self.call(decoupled_elbo)[:3]
        return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, self.call.leaves(), self.weights)]

    def change(self, factor: float) -> None:
        """The inputs, and β where it is a tensor, in place."""
        with torch.no_grad():
            for t in {id(t): t for t in (*self.call.tensors, *self.call.leaves())}.values():
                t.mul_(factor)


class InOneLaunch(Step):
    """Both by decoupled_elbo_backward."""

    def __call__(self) -> list[Tensor]:
        leaves = self.call.leaves()
        for leaf in leaves:
            leaf.grad = None
        outputs = self.call(decoupled_elbo_backward)[:3]
        gradients = [leaf.grad for leaf in leaves]
        assert all(g is not None for g in gradients)
        return [*outputs, *gradients]  # type: ignore[list-item]


STEPS = [
    *((Step, mode, reduction) for mode in MODES for reduction in ("batchmean", "none") if allowed(mode, reduction)),
    *((InOneLaunch, mode, "batchmean") for mode in MODES),
]


@pytest.mark.parametrize(("kind", "mode", "reduction"), STEPS)
def test_a_step_never_waits_for_the_gpu(kind: type[Step], mode: str, reduction: str) -> None:
    step = kind(mode, reduction)
    expected = step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def capture(step: Step) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


@pytest.mark.parametrize(("kind", "mode", "reduction"), STEPS)
def test_a_graph_replays_what_eager_computes(kind: type[Step], mode: str, reduction: str) -> None:
    """Bit for bit, after the inputs have changed in place; a β (σ, prior) that is a tensor is among them."""
    step = kind(mode, reduction)
    graph, results = capture(step)
    for factor in (0.5, 1.25, 1.5):
        step.change(factor)
        graph.replay()
        for a, b in zip(results, step(), strict=True):
            assert torch.equal(a, b)


def test_beta_is_annealed_between_replays() -> None:
    step = Step("beta-tensor", "batchmean")
    graph, results = capture(step)
    for beta in (0.0, 0.1, 1.0, 4.0):
        with torch.no_grad():
            step.call.kw["beta"].fill_(beta)
        graph.replay()
        loss, distortion, rate = results[:3]
        torch.testing.assert_close(loss, distortion + beta * rate)


def test_on_a_stream_of_the_callers() -> None:
    step = Step("learned-pixel", "none")
    expected = step()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # what is launched on another stream would be done long before
        step.change(2.0)
        step.change(0.5)
        got = step()
    stream.synchronize()
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("mode", ["optimal", "capacity"])
def test_every_sm_holds_what_it_can(mode: str) -> None:
    """The largest batch whose programs wait for one another; with one image more it takes two launches."""
    sms = torch.cuda.get_device_properties().multi_processor_count
    for batch in (sms, sms + 1):
        two, one = Call(mode, batch=batch, data=(2**15,)), Call(mode, batch=batch, data=(2**15,))
        expected = two(decoupled_elbo)
        expected.loss.backward()
        got = one(decoupled_elbo_backward)
        torch.testing.assert_close(got.loss, expected.loss.detach())
        for a, b in zip(one.leaves(), two.leaves(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)


def test_steps_on_two_streams_and_in_a_graph_at_once() -> None:
    """Each has a grid barrier of its own; with a shared one they would let each other through too early, or hang."""
    steps = [InOneLaunch("optimal", "batchmean") for _ in range(3)]
    expected = [step() for step in steps]
    graph, replayed = capture(steps[2])
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    for _ in range(50):
        got = []
        for step, stream in zip(steps[:2], streams, strict=False):
            with torch.cuda.stream(stream):
                got.append(step())
        with torch.cuda.stream(streams[2]):
            graph.replay()
    torch.cuda.synchronize()
    for results, true in zip([*got, replayed], expected, strict=True):
        for a, b in zip(results, true, strict=True):
            assert torch.equal(a, b)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_of_a_gpu_that_is_not_the_current_one() -> None:
    expected = Step("optimal", "none")()
    with torch.device("cuda:1"):
        got = Step("optimal", "none")()
    for a, b in zip(got, expected, strict=True):
        assert a.device.index == 1
        torch.testing.assert_close(
            a.to("cuda:0"), b, rtol=1e-4, atol=1e-5
        )  # another generator's numbers would be far off
