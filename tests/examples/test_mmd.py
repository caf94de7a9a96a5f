"""MMD against a double loop, and what a latent dimension is worth against closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from on_examples import one_thread  # noqa: F401

# isort: split
from common import latents, mmd
from common.data import DataError, Splits
from common.mlp import MLPVAE
from common.objective import VAEObjective, make_criterion
from common.training import Trainer
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence


def literally(x: Tensor, y: Tensor, scale: float) -> float:
    """MMD² as its definition has it, one pair at a time."""

    def k(a: Tensor, b: Tensor) -> float:
        squared = sum(((a - b) ** 2).tolist())
        return sum(2 * scale * s / (2 * scale * s + squared) for s in (0.1, 0.2, 0.5, 1, 2, 5, 10))

    n, m = len(x), len(y)
    xx = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return xx + yy - 2 * sum(k(x[i], y[j]) for i in range(n) for j in range(m)) / (n * m)


@pytest.mark.parametrize("scale", [None, 0.7])
def test_mmd_is_the_double_loop(scale: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(13, 5), 1.5 * torch.randn(17, 5) + 0.3
    expected = literally(x.double(), y.double(), 5 if scale is None else scale)
    assert mmd.mmd(x, y, scale) == pytest.approx(expected, rel=1e-9)
    monkeypatch.setattr(mmd, "CHUNK", 4)  # rows do not come out even
    assert mmd.mmd(x, y, scale) == pytest.approx(expected, rel=1e-9)
    assert mmd.mmd(y, x, scale) == pytest.approx(expected, rel=1e-9)


def test_mmd_is_unbiased() -> None:
    """Zero on average where both samples are of one distribution, and so sometimes below it; positive where not."""
    torch.manual_seed(0)
    same = torch.tensor([mmd.mmd(torch.randn(40, 3), torch.randn(60, 3)) for _ in range(200)])
    error = same.std() / math.sqrt(len(same))
    assert same.mean().abs() < 3 * error
    assert (same < 0).any()
    shifted = torch.tensor([mmd.mmd(torch.randn(40, 3) + 0.5, torch.randn(60, 3)) for _ in range(50)])
    narrow = torch.tensor([mmd.mmd(0.5 * torch.randn(40, 3), torch.randn(60, 3)) for _ in range(50)])
    assert shifted.mean() > 10 * error
    assert narrow.mean() > 10 * error


@pytest.mark.parametrize(("x", "y"), [((5, 3), (5, 4)), ((5,), (5,)), ((1, 3), (5, 3)), ((5, 3), (0, 3))])
def test_mmd_refuses_what_it_cannot_compare(x: tuple[int, ...], y: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="x, y: expected"):
        mmd.mmd(torch.zeros(x), torch.zeros(y))


def test_too_few_to_compare_is_told() -> None:
    part = torch.zeros(16, 2)
    mmd.check_enough(Splits(part, part[:2], part[:2]), "x.npz")
    with pytest.raises(DataError, match=r"x\.npz: too few images .* 20 are needed"):
        mmd.check_enough(Splits(part, part[:1], part[:1]), "x.npz")


def test_a_probe_is_in_the_history_and_changes_nothing_else(tmp_path: Path) -> None:
    data = Splits(*torch.rand(60, 4, generator=torch.Generator().manual_seed(0)).split(20))

    def train(probe: Callable[[nn.Module], dict[str, float]] | None) -> list[dict[str, Any]]:
        torch.manual_seed(0)
        objective = VAEObjective(MLPVAE(4, 2), make_criterion("learned", 1.0, channels=1))
        trainer = Trainer(
            objective, data, epochs=2, batch_size=5, lr=0.01, seed=0, device=torch.device("cpu"),
            checkpoint=tmp_path / "checkpoint.pt", settings={}, probe=probe,
        )  # fmt: skip
        trainer.fit()
        return trainer.history

    probed = train(lambda objective: {"gradient": latents.latent_gradient(objective, data.val)})
    assert all(entry.pop("probe")["gradient"] > 0 for entry in probed)
    assert probed == train(None)


def test_rates_are_the_kl_of_each_dimension() -> None:
    torch.manual_seed(0)
    mu, logvar = torch.randn(11, 4), torch.randn(11, 4)
    expected = kl_divergence(Normal(mu, (0.5 * logvar).exp()), Normal(0.0, 1.0)).mean(0)
    torch.testing.assert_close(latents.rates(mu, logvar), expected)


def test_active_dimensions_are_those_of_small_posterior_variance() -> None:
    variances = torch.tensor([[0.01, 0.9, 0.2, 1.0], [0.03, 1.1, 0.7, 1.0]])
    assert latents.active(variances.log()).tolist() == [True, False, True, False]


def test_encode_and_decode_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = MLPVAE(6, 3, (5,)), torch.rand(10, 6)
    monkeypatch.setattr(latents, "CHUNK", 4)
    mu, logvar = latents.encode(model, x)
    torch.testing.assert_close((mu, logvar), tuple(part.detach() for part in model.encode(x)))
    torch.testing.assert_close(latents.decode(model, mu), model.decode(mu)[0].detach())


def test_draws_are_of_the_posterior() -> None:
    mu, logvar = torch.tensor([[1.0, -2.0]]).expand(20000, 2), torch.tensor([[0.0, -4.0]]).expand(20000, 2)
    z = latents.draw(mu, logvar, seed=3)
    torch.testing.assert_close(z.mean(0), mu[0], atol=0.03, rtol=0)
    torch.testing.assert_close(z.std(0), (0.5 * logvar[0]).exp(), atol=0, rtol=0.03)
    assert torch.equal(z, latents.draw(mu, logvar, seed=3))
    assert not torch.equal(z, latents.draw(mu, logvar, seed=4))


def test_latent_gradient_of_an_affine_decoder() -> None:
    """∂/∂z ‖x − Wz − b‖²/(2σ²) = −Wᵀ(x − Wz − b)/σ²."""
    torch.manual_seed(0)
    model, x = MLPVAE(6, 3), torch.rand(50, 6)
    objective = VAEObjective(model, make_criterion("0.2", 1.0, channels=1))
    layer = model.decoder[0]
    mu, logvar = latents.encode(model, x)
    residual = x - latents.decode(model, latents.draw(mu, logvar))
    expected = (residual @ layer.weight / 0.2**2).norm(dim=1).mean().item()
    assert latents.latent_gradient(objective, x) == pytest.approx(expected, rel=1e-4)
