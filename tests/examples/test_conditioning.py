"""The layers that tell a network which β it works at: formulas, shapes, gradients, and what starts closed for good."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from on_examples import one_thread  # noqa: F401
from torch import Tensor, nn

# isort: split
from common import conditioning
from common.conditioning import BetaRange, FiLM, Modulation, RootGate, RootSigmoid, SigmoidGate

RANGE = BetaRange(0.01, 10.0)


def trained(layer: Modulation) -> Modulation:
    """Its last layer starts at 0, which would say nothing."""
    with torch.no_grad():
        for parameter in layer.net[-1].parameters():
            parameter.normal_(std=0.3)
    return layer


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "FiLM": lambda: FiLM(3),
    "Modulation": lambda: trained(Modulation(3)),
    "SigmoidGate": lambda: SigmoidGate(3),
    "RootGate": lambda: RootGate(3, open=True),
    "RootSigmoid": lambda: RootSigmoid(3),
}
FORMULAS = {
    "SigmoidGate": lambda a: 2 / (1 + math.exp(-a)),
    "RootGate": lambda a: math.sqrt(max(0.0, 1 - math.exp(a))),
    "RootSigmoid": lambda a: 1 / math.sqrt(1 + math.exp(-a)),
}


def test_betas_are_log_uniform_and_standardised() -> None:
    torch.manual_seed(0)
    beta = RANGE.draw(20000)
    assert 0.01 <= beta.min() < 0.0101
    assert 9.9 < beta.max() <= 10
    n = RANGE.standardise(beta.log())
    assert n.mean().abs() < 0.02
    assert n.std() == pytest.approx(1, abs=0.02)
    for share in (0.1, 0.5, 0.9):  # the quantiles of a uniform n
        assert n.quantile(share) == pytest.approx(math.sqrt(3) * (2 * share - 1), abs=0.04)
    ends = RANGE.standardise(torch.tensor([0.01, 10.0]).log())
    torch.testing.assert_close(ends, math.sqrt(3) * torch.tensor([-1.0, 1.0]))


def test_the_set_for_evaluation_is_fixed() -> None:
    grid = RANGE.grid(6)
    torch.manual_seed(1)
    assert torch.equal(grid, RANGE.grid(6))
    n = RANGE.standardise(grid.log())
    torch.testing.assert_close(n.diff(), torch.full((5,), 2 * math.sqrt(3) / 6))
    assert n.sum().abs() < 1e-5


def test_the_level_is_told_without_a_gradient() -> None:
    beta, log_sigma = torch.tensor([0.1, 1.0]), torch.tensor([-1.0, -2.0], requires_grad=True)
    n = RANGE.standardise_level(beta, log_sigma, -1.0)
    assert not n.requires_grad
    torch.testing.assert_close(n[0], RANGE.standardise(beta.log())[0])  # where σ is the data's
    expected = RANGE.standardise(beta.log() + 2 * (log_sigma.detach() + 1.0))
    torch.testing.assert_close(n, expected)


@pytest.mark.parametrize("ends", [(0.0, 1.0), (1.0, 1.0), (2.0, 1.0), (1.0, math.inf)])
def test_a_range_has_two_ends(ends: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="0 < low < high"):
        BetaRange(*ends)


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5, 2)])
@pytest.mark.parametrize("name", LAYERS)
def test_each_sample_has_its_own_beta(name: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer, h, n = LAYERS[name](), torch.randn(shape), torch.randn(4)
    out = layer(h, n)
    assert out.shape == shape
    for i in range(4):
        torch.testing.assert_close(out[i : i + 1], layer(h[i : i + 1], n[i : i + 1]))
    assert not torch.allclose(layer(h, n.flip(0)), out)


@pytest.mark.parametrize("name", FORMULAS)
def test_gates_are_the_published_formulas(name: str) -> None:
    torch.manual_seed(0)
    layer, h, n = LAYERS[name]().double(), torch.randn(6, 3, 2).double(), 2 * torch.randn(6).double()
    w, b = layer.affine.weight[:, 0].tolist(), layer.affine.bias.tolist()
    gates = torch.tensor([[FORMULAS[name](w[c] * float(n[i]) + b[c]) for c in range(3)] for i in range(6)])
    torch.testing.assert_close(layer(h, n), gates.double()[..., None] * h, rtol=1e-6, atol=1e-7)


def test_film_is_the_published_formula() -> None:
    torch.manual_seed(0)
    layer, h, n = FiLM(3, hidden=5, strength=0.3), torch.randn(4, 3, 2, 2), torch.randn(4)

    def net(part: nn.Sequential) -> Tensor:
        first, _, last = part
        assert isinstance(first, nn.Linear)
        assert isinstance(last, nn.Linear)
        hidden = n[:, None] * first.weight[:, 0] + first.bias
        return (torch.where(hidden > 0, hidden, 0.2 * hidden) @ last.weight.T + last.bias)[..., None, None]

    torch.testing.assert_close(layer(h, n), (1 + 0.3 * net(layer.scale)) * h + 0.3 * net(layer.shift))
    assert not {id(p) for p in layer.scale.parameters()} & {id(p) for p in layer.shift.parameters()}


def test_modulation_is_its_formula_and_starts_as_the_identity() -> None:
    torch.manual_seed(0)
    layer, h, n = Modulation(3, hidden=5), torch.randn(4, 3, 2, 2), torch.randn(4)
    assert torch.equal(layer(h, n), h)
    scale, shift = trained(layer).net(n[:, None])[..., None, None].split(3, dim=1)
    torch.testing.assert_close(layer(h, n), h + scale * h + shift)


def test_film_starts_near_the_identity() -> None:
    h = torch.randn(4, 3)
    torch.testing.assert_close(FiLM(3)(h, torch.randn(4)), h, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("name", LAYERS)
def test_gradients(name: str) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name]().double()
    h, n = torch.randn(2, 3, dtype=torch.float64, requires_grad=True), torch.tensor([-1.0, 0.5]).double()
    parameters = dict(layer.named_parameters())

    def call(h: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(parameters, values, strict=True)), (h, n))

    few = {name: p for name, p in parameters.items() if p.numel() < 10}
    assert torch.autograd.gradcheck(
        lambda h, *some: call(h, *(dict(parameters) | dict(zip(few, some, strict=True))).values()), (h, *few.values())
    )


def closed_for_every_beta(gate: conditioning.Gate, channels: int) -> Tensor:
    """By gradients, at many β of the range: nothing would ever open these."""
    n = torch.linspace(-math.sqrt(3), math.sqrt(3), 101)
    gate(torch.ones(101, channels), n).sum().backward()
    assert gate.affine.bias.grad is not None
    return gate.affine.bias.grad == 0


def test_one_root_gate_in_seven_starts_closed_for_good() -> None:
    """b > √3·|w| for w and b uniform in [−1, 1]: a probability of 1/(4√3) = 14.4%."""
    torch.manual_seed(0)
    channels = 20000
    gate = RootGate(channels)
    closed = gate.closed()
    assert torch.equal(closed, closed_for_every_beta(gate, channels))
    assert float(closed.float().mean()) == pytest.approx(1 / (4 * math.sqrt(3)), abs=0.01)  # 4 standard errors


@pytest.mark.parametrize("make", [RootSigmoid, SigmoidGate, lambda c: RootGate(c, open=True)])
def test_no_other_gate_starts_closed(make: Callable[[int], conditioning.Gate]) -> None:
    torch.manual_seed(0)
    assert not closed_for_every_beta(make(2000), 2000).any()


def test_an_open_root_gate_is_open_from_end_to_end() -> None:
    ends = RootGate(5, open=True)(torch.ones(2, 5), torch.tensor([-math.sqrt(3), math.sqrt(3)]))
    assert (ends > 0.4).all()


def test_a_gate_at_its_edge_has_no_nan() -> None:
    gate = RootGate(3)
    with torch.no_grad():
        gate.affine.weight.fill_(0.0)
        gate.affine.bias.copy_(torch.tensor([0.0, 1.0, 100.0]))
    h = torch.ones(2, 3, requires_grad=True)
    out = gate(h, torch.zeros(2))
    out.sum().backward()
    assert (out == 0).all()
    for gradient in (h.grad, gate.affine.weight.grad, gate.affine.bias.grad):
        assert gradient is not None
        assert (gradient == 0).all()
