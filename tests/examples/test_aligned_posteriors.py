"""aligned_posteriors.py: latents that are matched, renumbered and decoded elsewhere, and what the script finds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from on_examples import interrupt_in_step, one_thread, read_csv  # noqa: F401

# isort: split
import aligned_posteriors
import beta_input
from common import alignment

SMALL = ["--data", "digits", "--points", "2", "--epochs", "2", "--repeats", "1", "--width", "8", "--latent-dim", "4"]


def run(out: Path, *options: str, code: int = 0) -> list[dict[str, Any]]:
    assert aligned_posteriors.main(["--device", "cpu", "--out", str(out), *options]) == code
    return read_csv(out / "alignment.csv") if code == 0 else []


def latents(count: int = 500, k: int = 5) -> torch.Tensor:
    return torch.randn(count, k, generator=torch.Generator().manual_seed(0))


def test_renumbered_latents_are_found_again() -> None:
    """b's latents are a's in another order, some with the sign turned."""
    a, order = latents(), torch.tensor([3, 0, 4, 1, 2])
    b = a[:, order] * torch.tensor([1.0, -1, 1, -1, 1])
    c = alignment.correlation(a, b)
    match, used = alignment.best(c), torch.ones(5, dtype=torch.bool)
    assert alignment.agreement(c, match, used) == pytest.approx(1)
    assert alignment.agreement(c, alignment.by_number(c), used) < 0.15
    torch.testing.assert_close(alignment.as_first(b, match), a)
    torch.testing.assert_close(alignment.renumbered(a, match), b)


def test_correlations() -> None:
    a = latents()
    noise = torch.randn(500, 5, generator=torch.Generator().manual_seed(1))
    c = alignment.correlation(3 * a + 1, 0.6 * a + 0.8 * noise)
    expected = torch.corrcoef(torch.cat([a, 0.6 * a + 0.8 * noise], 1).T.double())[:5, 5:]
    torch.testing.assert_close(c, expected)


def test_a_constant_latent_agrees_with_none() -> None:
    a = latents()
    b = a.clone()
    b[:, 2] = 7.0
    c = alignment.correlation(a, b)
    assert torch.equal(c[:, 2], torch.zeros(5).double())
    used = torch.tensor([True, True, False, True, True])
    assert alignment.agreement(c, alignment.by_number(c), used) == pytest.approx(1)
    assert math.isnan(alignment.agreement(c, alignment.by_number(c), torch.zeros(5, dtype=torch.bool)))


def test_rounding_is_no_correlation() -> None:
    """What an unused latent's mean does over the images is the same for both encoders, and tiny."""
    a = latents()
    a[:, 2] *= 1e-7
    c = alignment.correlation(a, a)
    assert torch.equal(c[2], torch.zeros(5).double())
    torch.testing.assert_close(c.diagonal()[[0, 1, 3, 4]], torch.ones(4).double())


def test_resumed_equals_uninterrupted_and_takes_the_models_of_beta_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(tmp_path / "whole", *SMALL)
    assert len(whole) == 2 * 2 * 2  # kinds, families, ordered pairs of β
    with monkeypatch.context() as patch:
        interrupt_in_step(patch, 2 * 22 - 5)
        assert beta_input.main(["--device", "cpu", "--out", str(tmp_path / "cut"), *SMALL]) == 130
    assert beta_input.main(["--device", "cpu", "--out", str(tmp_path / "cut"), *SMALL, "--resume"]) == 0
    before = (tmp_path / "cut/models/beta-input-decoupled-seed0/checkpoint.pt").stat().st_mtime_ns
    assert run(tmp_path / "cut", *SMALL, "--resume") == whole
    assert (tmp_path / "cut/models/beta-input-decoupled-seed0/checkpoint.pt").stat().st_mtime_ns == before
    run(tmp_path / "cut", *SMALL, "--resume", "--epochs", "3", code=2)


def test_bad_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        aligned_posteriors.main(["--points", "1"])
    assert "at least 2 betas" in capsys.readouterr().err
