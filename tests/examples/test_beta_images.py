"""beta_input.py on images: one VAE for every β beside those of one β."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from on_examples import interrupt_in_step, one_thread, read_csv  # noqa: F401

# isort: split
import aligned_posteriors
import beta_input
from common import beta_models
from common.models import ResBlock

IMAGES = ["--data", "digits", "--points", "2", "--epochs", "2", "--repeats", "1", "--width", "8", "--latent-dim", "4"]


def images(out: Path, *options: str, code: int = 0) -> list[dict[str, Any]]:
    assert beta_input.main(["--device", "cpu", "--out", str(out), *options]) == code
    return read_csv(out / "beta_input.csv") if code == 0 else []


def test_images_resumed_equal_uninterrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = images(tmp_path / "whole", *IMAGES)
    assert len(whole) == 2 * 2 * 2  # one VAE for all or one a β, families, β
    assert all(row["excess"] == 0 for row in whole if row["kind"] == "separate")
    with monkeypatch.context() as patch:
        interrupt_in_step(patch, 2 * 22 - 5)  # in the last epoch of the first model, that of both β
        images(tmp_path / "cut", *IMAGES, code=130)
    torch.manual_seed(12345)
    assert images(tmp_path / "cut", *IMAGES, "--resume") == whole
    images(tmp_path / "cut", *IMAGES, "--conditioning", "film-level", "--resume", code=2)


@pytest.mark.parametrize("name", beta_models.CONDITIONING)
def test_every_conditioning_tells_every_place(name: str) -> None:
    torch.manual_seed(0)
    model = beta_models.ConditionedConvVAE((1, 9, 7), 3, 8, name)
    places = sum(isinstance(module, ResBlock) for module in model.modules())
    if model.place == beta_models.NORMS:
        places += 2  # each network's last normalisation
        assert model.on_posterior is not None
    with torch.no_grad():
        for parameter in model.parameters():  # some start at 0, and nothing before them has a gradient then
            parameter += 0.01 * torch.randn_like(parameter)
    out = model(torch.rand(4, 1, 9, 7), torch.linspace(-1, 1, 4))
    assert out.recon.shape == (4, 1, 9, 7)
    out.recon.square().sum().backward()
    layers = [*model.encoding, *model.decoding]
    assert len(layers) == places
    layers += [] if model.on_posterior is None else [model.on_posterior]
    assert all(any(p.grad is not None and p.grad.any() for p in layer.parameters()) for layer in layers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--linear", "--data", "digits"], "--data has no effect with --linear"),
        (["--linear", "--width", "3"], "--width has no effect with --linear"),
        (["--linear", "--sigma", "batch"], "--sigma has no effect with --linear, got batch"),
        (["--linear", "--grey"], "--grey has no effect with --linear"),
        (["--rows", "film"], "--rows has no effect without --linear, got film"),
        (["--points", "1"], "at least 2"),
        (["--betas", "1"], "--betas: at least 2 and all different, got 1"),
        (["--betas", "1", "3", "1"], "at least 2 and all different, got 1 3 1"),
        (["--betas", "1", "3", "--points", "2"], "--points has no effect beside --betas"),
    ],
)
def test_bad_options_are_refused(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        beta_input.main(options)
    assert message in capsys.readouterr().err


@pytest.mark.release("a dozen models of the digits")
def test_one_vae_for_every_beta_is_near_those_of_one(tmp_path: Path) -> None:
    """In its own β-loss, on the digits: 4 nats of 64 dimensions at most. Its latents keep their meaning over β, which
    those of separate VAEs do not, and its samples are as good at every β."""
    rows = images(tmp_path, "--quick")
    for family in ("decoupled", "squared error"):
        excess = [row["excess"] for row in rows if (row["kind"], row["family"]) == ("beta-input", family)]
        assert max(excess) < 6
    own = [row for row in rows if row["kind"] == "beta-input" and row["family"] == "decoupled"]
    assert max(abs(row["sigma_network"] / row["error_network"] - 1) for row in own) < 0.05

    assert aligned_posteriors.main(["--quick", "--device", "cpu", "--out", str(tmp_path), "--resume"]) == 0
    pairs = [row for row in read_csv(tmp_path / "alignment.csv") if row["latents"] > 0]
    for family in ("decoupled", "squared error"):
        one, separate = ([r for r in pairs if (r["kind"], r["family"]) == (kind, family)] for kind in
                         ("beta-input", "separate"))  # fmt: skip
        assert min(row["agreement"] for row in one) > 0.97
        assert statistics.fmean(row["agreement"] for row in separate) < 0.93
        assert max(row["error"] for row in one) < 1.15
        assert max(row["error"] for row in separate) > 1.5
