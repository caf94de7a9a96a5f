"""aggregated_posterior.py: what is measured of a latent, and how q(z_k) leaves the prior as beta falls."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from on_examples import interrupt_in_step, one_thread, read_csv  # noqa: F401

# isort: split
import aggregated_posterior
from common.aggregates import Posterior, channel_rows, draw


def run(out: Path, *options: str, code: int = 0) -> list[dict[str, Any]]:
    assert aggregated_posterior.main(["--quick", *options, "--out", str(out), "--device", "cpu"]) == code
    return read_csv(out / "channels.csv") if code == 0 else []


def test_rows_of_posteriors_that_are_known() -> None:
    generator = torch.Generator().manual_seed(0)
    free = torch.randn(400, generator=generator)
    mu = torch.stack([torch.zeros(400), torch.full((400,), 1.5), 3 * free], 1)
    logvar = torch.tensor([0.0, -2.0, -3.0]).expand(400, 3)
    collapsed, shifted, wide = channel_rows(Posterior("any", 1.0, mu, logvar))
    assert [row["channel"] for row in (collapsed, shifted, wide)] == [0, 1, 2]
    assert [collapsed[key] for key in ("channel_rate", "mean", "spread", "kl")] == pytest.approx([0, 0, 1, 0], abs=1e-9)
    assert shifted["mean"] == pytest.approx(1.5)
    assert shifted["spread"] == pytest.approx(math.exp(-1))
    expected = 0.5 * (1.5**2 + math.exp(-2) - 1 + 2)
    assert [shifted["channel_rate"], shifted["kl"]] == pytest.approx(
        [expected, expected], abs=1e-6
    )  # nothing of x in it
    assert wide["spread"] == pytest.approx(math.sqrt(9 * float(free.var(correction=0)) + math.exp(-3)))
    assert 0.5 < wide["kl"] < wide["channel_rate"] - 0.5  # the rest of the rate tells of x


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("aggregated")
    run(out, "--points", "3", "--steps", "400")
    return out


def means(rows: list[dict[str, Any]], family: str, key: str) -> np.ndarray:
    """Over the latents, one for each β in ascending order."""
    betas = sorted({row["beta"] for row in rows if row["family"] == family})
    return np.array([np.mean([r[key] for r in rows if (r["family"], r["beta"]) == (family, b)]) for b in betas])


@pytest.mark.parametrize("family", aggregated_posterior.SIGMA)
def test_each_latent_leaves_the_prior_as_beta_falls(family: str, quick: Path) -> None:
    rows = read_csv(quick / "channels.csv")
    assert len(rows) == 2 * 3 * aggregated_posterior.LATENTS
    kl, rate = means(rows, family, "kl"), means(rows, family, "channel_rate")
    assert (kl[:-1] > 2 * kl[1:]).all()
    assert (rate[:-1] > rate[1:] + 0.2).all()
    assert all(row["kl"] <= row["channel_rate"] + 1e-6 for row in rows)  # KL is convex
    assert all(row["kl"] >= -1e-9 for row in rows)


def test_at_one_rate_both_families_are_as_far_from_the_prior(quick: Path) -> None:
    """log KL over the rate by least squares, and what the family adds. Seen: a factor of 0.7 to 0.8 on the digits."""
    rows = [row for row in read_csv(quick / "channels.csv") if row["channel_rate"] > 0.5]
    rate = np.array([row["channel_rate"] for row in rows])
    decoupled = np.array([row["family"] == "decoupled" for row in rows], float)
    log_kl = np.log([row["kl"] for row in rows])
    assert np.corrcoef(rate, log_kl)[0, 1] > 0.5
    _, _, factor = np.linalg.lstsq(np.stack([np.ones_like(rate), rate, decoupled], 1), log_kl)[0]
    assert 0.4 < math.exp(factor) < 1.6


def test_what_a_run_leaves(quick: Path) -> None:
    assert sorted(path.name for path in quick.iterdir()) == ["aggregated_posterior.png", "channels.csv", "models"]
    assert (quick / "aggregated_posterior.png").stat().st_size > 10_000


def test_families_that_need_no_model_are_drawn_too(tmp_path: Path) -> None:
    """As many families as there are, whatever each β's posteriors come from; fewer latents than have a place."""
    generator = torch.Generator().manual_seed(0)
    shown = [
        Posterior(family, beta, beta * torch.randn(50, 2, generator=generator), torch.full((50, 2), -beta))
        for family in ("one", "two", "three")
        for beta in (0.5, 1.0)
    ]
    rows = [{"family": p.family, "beta": p.beta, **row} for p in shown for row in channel_rows(p)]
    draw(tmp_path / "x.png", shown, rows, title="any")
    assert (tmp_path / "x.png").stat().st_size > 10_000


def test_resumed_run_equals_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--points", "2", "--steps", "44"]  # two epochs
    whole = run(tmp_path / "whole", *options)
    with monkeypatch.context() as patch:
        interrupt_in_step(patch, 44 + 30)
        run(tmp_path / "cut", *options, code=130)
    cut = run(tmp_path / "cut", *options, "--resume")
    assert len(whole) == 4 * aggregated_posterior.LATENTS
    assert [{**row, "seconds": 0} for row in cut] == [{**row, "seconds": 0} for row in whole]


def test_bad_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        aggregated_posterior.main(["--points", "0"])
    assert "--points: must be at least 1, got 0" in capsys.readouterr().err
