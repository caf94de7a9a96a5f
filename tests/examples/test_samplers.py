"""samplers.py: what each row draws, that runs resume and stand on beta_input.py's models, and what came out."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from on_examples import interrupt_in_step, one_thread, read_csv  # noqa: F401
from torch import Tensor, nn

# isort: split
import beta_input
import samplers
from common import latents
from common import samplers as rows
from common.conditioning import BetaRange
from common.mmd import mmd
from common.sampler_plots import best_prior, three
from common.second_stage import SecondStage

SPAN = BetaRange(0.5, 8.0)
TINY = ["--points", "3", "--epochs", "1", "--repeats", "1", "--width", "8", "--latent-dim", "4"]
SECOND = ["--stage-epochs", "1", "--steps", "1", "2"]


def run(out: Path, *options: str, code: int = 0) -> list[dict[str, Any]]:
    assert samplers.main(["--device", "cpu", "--out", str(out), *options]) == code
    return read_csv(out / "samplers.csv") if code == 0 else []


def test_a_mixture_has_what_one_gaussian_has_not() -> None:
    torch.manual_seed(0)
    centres = 4 * torch.randn(5, 3)
    z = centres[torch.randint(5, (1500,))] + 0.3 * torch.randn(1500, 3)
    other = centres[torch.randint(5, (1500,))] + 0.3 * torch.randn(1500, 3)
    found = rows.mixture(z, 1500)
    assert found.dtype == z.dtype
    gaussian = z.mean(0) + torch.randn(1500, 3) @ torch.linalg.cholesky(z.T.cov()).T
    assert mmd(found, other) < 0.1 * mmd(gaussian, other)
    assert torch.equal(found, rows.mixture(z, 1500))
    assert not torch.equal(found, rows.mixture(z, 1500, seed=1))
    assert rows.mixture(z[:4], 3).shape == (3, 3)  # fewer points than components


class Scaled(nn.Module):
    """A VAE of 1×1 images: x = z·β, so that what was done to z can be read off."""

    def __init__(self, beta: float) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.tensor(beta))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.flatten(1) / self.beta, torch.full((len(x), 1), -60.0)

    def decode(self, z: Tensor) -> tuple[Tensor, None]:
        return (z * self.beta)[..., None, None], None


def test_recursion_goes_down_in_even_steps() -> None:
    asked: list[float] = []

    def at(beta: float) -> nn.Module:
        asked.append(beta)
        return Scaled(beta)

    z = rows.recursion(at, 8.0, 1.0, 3, 50, 1)
    assert asked == pytest.approx([8, 4, 4, 2, 2, 1])  # decoded at the one, encoded at the next
    images = (8 * latents.prior(50, 1)).clamp(0, 1)  # as each decoder's are; nothing else is lost here
    torch.testing.assert_close(z, images)


def test_second_stage_trains_on_one_beta_a_sample() -> None:
    """Evaluation takes β in turn: image 0 at the first, image 1 at the second; training draws them."""
    betas = [1.0, 2.0, 4.0]
    stage = SecondStage(2, betas, SPAN, warmup=0)
    seen: list[tuple[Tensor, Tensor]] = []
    encode = stage.model.encode

    def recorded(z: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
        seen.append((z, n))
        return encode(z, n)

    stage.model.encode = recorded  # type: ignore[method-assign]
    means = torch.tensor([[10.0 * i + j for j in range(3)] for i in range(600)])[..., None].expand(600, 3, 2)
    data = torch.cat([means, torch.full((600, 3, 2), -60.0)], 2)
    stage.eval()(data)
    stage.train()(data)
    told = SPAN.standardise(torch.tensor(betas).log())
    for (z, n), choice in zip(seen, (torch.arange(600) % 3, None), strict=True):
        picked = (z[:, 0] - 10 * torch.arange(600)).round().long()
        if choice is not None:
            assert torch.equal(picked, choice)
        else:
            assert (picked.bincount(minlength=3) - 200).abs().max() < 60  # five standard deviations
        torch.testing.assert_close(n, told[picked])


def test_second_stage_has_a_sigma_for_each_beta_unless_it_has_one_beta() -> None:
    torch.manual_seed(0)
    one, many = (SecondStage(2, betas, SPAN, warmup=10) for betas in ([1.0], [1.0, 4.0]))
    for stage in (one, many):
        elbo = stage(torch.randn(8, len(stage.told), 4))
        assert elbo.loss.ndim == elbo.sigma.ndim == 0
        assert int(stage.steps) == 1
    assert one.criterion is not None
    assert one.criterion.beta == 0.1  # of a warm-up of ten steps, the first
    one.eval()(torch.randn(8, 1, 4))
    assert one.criterion.beta == 1
    assert one.sigma(1.0) == pytest.approx(math.sqrt(float(one.criterion.running_var)))
    nn.init.normal_(many.log_sigma_of.net[-1].weight)  # type: ignore[union-attr]
    assert many.sigma(1.0) != many.sigma(4.0)


def test_second_stage_samples_have_its_noise() -> None:
    torch.manual_seed(0)
    stage = SecondStage(2, [1.0], SPAN, warmup=0)
    nn.init.zeros_(stage.model.decoder[-1].weight)
    nn.init.constant_(stage.model.decoder[-1].bias, 3.0)
    assert stage.criterion is not None
    stage.criterion.running_var.fill_(0.25)
    z = stage.sample(1.0, 4000)
    torch.testing.assert_close(z.mean(0), torch.tensor([3.0, 3.0]), atol=0.04, rtol=0)
    torch.testing.assert_close(z.std(0), torch.tensor([0.5, 0.5]), atol=0.02, rtol=0)


def test_second_stages_resume_on_the_models_of_beta_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, options = tmp_path / "cut", ["--quick", *TINY]
    assert beta_input.main([*options, "--device", "cpu", "--out", str(out)]) == 0
    shutil.copytree(out, tmp_path / "whole")
    whole = run(tmp_path / "whole", *options, *SECOND, "--resume")
    with monkeypatch.context() as patch:
        interrupt_in_step(patch, 11 + 5)  # of 11 a second stage, the first stages being there: in the second one
        run(out, *options, *SECOND, "--resume", code=130)
    torch.manual_seed(12345)
    assert run(out, *options, *SECOND, "--resume") == whole
    run(out, *options, *SECOND[:2], "--steps", "4", "--resume", code=2)
    assert "--steps (was [1, 2], now [4])" in capsys.readouterr().err
    both = ("prior", "mixture", "second-stage", "posteriors")
    assert {(row["kind"], row["row"]) for row in whole} == {
        *((kind, row) for kind in ("beta-input", "separate") for row in both),
        *(("beta-input", row) for row in ("conditioned", "recursion-1", "recursion-2")),
        ("images", "training images"),
    }  # fmt: skip
    measured = read_csv(out / "beta_input.csv")
    for row in whole:  # the plain prior's distance is the one that beta_input.py finds
        if row["row"] == "prior":
            (same,) = (
                r for r in measured if r["family"] == "decoupled" and all(r[k] == row[k] for k in ("kind", "beta"))
            )
            assert same["frechet"] == pytest.approx(row["frechet"], rel=1e-9)


def test_without_labels_there_are_latents_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    array = np.random.default_rng(0).integers(0, 256, (60, 9, 7, 3), np.uint8)
    np.savez(tmp_path / "x.npz", array)
    found = run(tmp_path / "out", *TINY, *SECOND, "--data", str(tmp_path / "x.npz"))
    assert all(row["frechet"] is None for row in found)
    assert all(math.isfinite(row["mmd"]) for row in found[:-1])
    assert "no Fréchet" not in capsys.readouterr().err
    for name in ("samplers.png", "samples.png"):
        assert (tmp_path / "out" / name).stat().st_size > 10_000


def test_bad_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    refused = {
        "--points: at least 3": ["--points", "2"],
        "at least 1": ["--steps", "0"],
        "--warmup: a share of the training, from 0 to 1, got 2": ["--warmup", "2"],
    }
    for message, options in refused.items():
        with pytest.raises(SystemExit, match="2"):
            samplers.main(options)
        assert message in capsys.readouterr().err
    assert three([1, 2, 4, 8]) == [1, 2, 8]


def test_nothing_to_resume_is_told_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "typo"
    assert samplers.main(["--quick", "--resume", "--device", "cpu", "--out", str(out)]) == 2
    assert f"there are no models in {out}" in capsys.readouterr().err
    assert not out.exists()


def claims(found: list[dict[str, Any]]) -> None:
    """Of the digits at β = 1, 2 and 4; margins are wider than what three seeds need."""
    for kind in ("beta-input", "separate"):
        own = {(row["row"], row["beta"]): row for row in found if row["kind"] == kind}
        frechet, distance = ({at: row[key] for at, row in own.items()} for key in ("frechet", "mmd"))
        # At β = 1 both ways to fit q(z) sample better than N(0, I), the mixture also than N(0, I) at any β.
        assert frechet["mixture", 1] < 0.55 * frechet["prior", 1]
        assert frechet["second-stage", 1] < 0.85 * frechet["prior", 1]
        best = best_prior(found, "separate")
        assert best is not None
        assert frechet["mixture", 1] < 0.55 * best[0]
        # The mixture's z are nearer to q(z), and the training posteriors are the ceiling.
        assert distance["mixture", 1] < 0.5 * distance["prior", 1]
        for (name, beta), value in frechet.items():
            assert frechet["posteriors", beta] < 1.05 * value, (name, beta)
        assert all(abs(distance["posteriors", beta]) < 5e-3 for beta in (1, 2, 4))
        if kind == "beta-input":
            assert frechet["conditioned", 1] < 0.9 * frechet["prior", 1]
            # Many steps take z away from q(z).
            assert distance["recursion-16", 1] > 2 * distance["prior", 1]
    (real,) = (row["frechet"] for row in found if row["kind"] == "images")
    assert real < min(row["frechet"] for row in found if row["row"] == "posteriors")


def test_what_fits_the_posteriors_samples_better(tmp_path: Path) -> None:
    claims(run(tmp_path, "--quick", "--points", "3", "--stage-epochs", "40", "--steps", "16"))


@pytest.mark.release("another seed of the claims")
def test_claims_with_another_seed(tmp_path: Path) -> None:
    claims(run(tmp_path, "--quick", "--points", "3", "--stage-epochs", "40", "--steps", "16", "--seed", "1"))
