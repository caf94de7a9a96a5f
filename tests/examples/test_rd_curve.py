"""rd_curve.py: the readings of one model, and what the curves claim. test_linear.py has the oracle's own tests."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from on_examples import ROOT, one_thread, read_csv  # noqa: F401

# isort: split
import rd_curve
from common import ranks, rd_plots, readings
from common.data import load
from common.objective import make_criterion, make_objective
from common.training import EVAL_SEED, Trainer
from torch.distributions import Normal, kl_divergence

TINY = ["--data", "digits", "--points", "2", "--repeats", "1", "--epochs", "2", "--width", "8", "--latent-dim", "4"]
TINY_LINEAR = ["--linear", "--points", "2", "--repeats", "1", "--epochs", "2"]
Row = dict[str, Any]


def sweep(out: Path, *options: str, code: int = 0) -> list[Row]:
    assert rd_curve.main([*options, "--out", str(out)]) == code
    return read_csv(out / "rd_curve.csv") if code == 0 else []


# The readings of one model.


def test_the_squared_error_family_minimises_sse_plus_beta_rate() -> None:
    generator = torch.Generator().manual_seed(0)
    x, recon = torch.rand(5, 20, generator=generator), torch.rand(5, 20, generator=generator).requires_grad_()
    mu, logvar = (torch.randn(5, 3, generator=generator).requires_grad_() for _ in range(2))
    beta = 0.37
    elbo = make_criterion(rd_curve.SIGMA["squared error"], beta, channels=1)(recon, x, mu, logvar)
    kl = kl_divergence(Normal(mu, (logvar / 2).exp()), Normal(0.0, 1.0)).sum() / 5
    expected = (recon - x).square().sum() / 5 + beta * kl
    assert elbo.loss.item() == pytest.approx(expected.item() + 10 * math.log(math.pi), rel=1e-5)
    for ours, theirs in zip(*(torch.autograd.grad(v, (recon, mu, logvar)) for v in (elbo.loss, expected)), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("family", rd_curve.SIGMA)
def test_readings_are_normal_log_likelihoods(family: str, tmp_path: Path) -> None:
    images, beta = load("digits"), 0.2
    torch.manual_seed(0)
    objective = make_objective(images.shape, rd_curve.SIGMA[family], beta, latent_dim=4, width=8)
    trainer = Trainer(
        objective, images, epochs=2, batch_size=1000, lr=0.01, seed=0, device=torch.device("cpu"),
        checkpoint=tmp_path / "x.pt", settings={},
    )  # fmt: skip
    trainer.fit()
    measured = readings.measure(trainer, images.test, draws=2)
    squared_error = family == "squared error"
    rows = {row["reading"]: row for row in readings.readings(measured, 64, beta, squared_error=squared_error)}

    x = torch.cat([images.test] * 2)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(EVAL_SEED)
        out = objective.eval().model(x)
    kl = kl_divergence(Normal(out.mu, (out.logvar / 2).exp()), Normal(0.0, 1.0)).sum(1).mean()
    assert measured["rate"] == pytest.approx(kl.item(), rel=1e-5)
    mse = (out.recon - x).square().flatten(1).mean(1)
    sigmas = {"half": math.sqrt(0.5), "beta": math.sqrt(beta / 2), "optimal": mse.mean().sqrt(), "image": mse.sqrt()}
    if not squared_error:
        sigmas["trained"] = objective.criterion.running_var.sqrt()
    assert rows.keys() == sigmas.keys() - (set() if squared_error else {"half", "beta"})
    for reading, row in rows.items():
        sigma = torch.as_tensor(sigmas[reading]).view(-1, 1, 1, 1)
        nll = -Normal(out.recon, sigma).log_prob(x).flatten(1).sum(1).mean()
        assert row["distortion"] == pytest.approx(nll.item(), rel=1e-4, abs=1e-3), reading
        assert row["sigma"] == pytest.approx(sigma.log().mean().exp().item(), rel=1e-4)
        assert row["bound"] == ("no: sigma sees x" if reading == "image" else "yes")
    assert objective.criterion.training is False  # its own again, not that of a reading
    assert objective.criterion is trainer.objective.criterion


# The experiment.


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    out = tmp_path_factory.mktemp("quick")
    rows = sweep(out, "--quick")
    assert sorted(p.name for p in out.iterdir()) == ["models", "rd_curve.csv", "rd_curve.png"]
    assert (out / "rd_curve.png").stat().st_size > 10_000
    return rows


def curve(rows: list[Row], family: str, reading: str) -> dict[str, np.ndarray]:
    return rd_plots.points(rows, rd_plots.Curve(family, reading, "", {}))


FAMILIES = tuple(rd_curve.SIGMA)


def test_each_family_has_its_betas_and_readings(quick: list[Row]) -> None:
    for family in FAMILIES:
        expected = (
            {"optimal", "half", "beta", "image"} if family == "squared error" else {"optimal", "trained", "image"}
        )
        assert {row["reading"] for row in quick if row["family"] == family} == expected
        betas = curve(quick, family, "optimal")["beta"]
        np.testing.assert_allclose(np.diff(np.log(betas)), np.log(betas[1] / betas[0]), rtol=0.02)  # 3 digits each
        assert len(betas) == rd_curve.QUICK["points"]
    assert 1.0 in curve(quick, "decoupled", "optimal")["beta"]  # the ELBO is one of them


def test_no_sigma_is_better_than_the_optimal_one(quick: list[Row]) -> None:
    """A theorem, of each model: SSE/(2σ²) + D/2·log σ² is least at σ² = SSE/D. By Jensen's, one σ an image is lower."""
    for row in quick:
        (optimal,) = (
            other["distortion"] for other in quick
            if other["reading"] == "optimal" and all(other[key] == row[key] for key in ("family", "beta", "seed"))
        )  # fmt: skip
        assert row["distortion"] <= optimal + 1e-4 if row["reading"] == "image" else row["distortion"] >= optimal - 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_optimal_reading_is_a_proper_curve(family: str, quick: list[Row]) -> None:
    found = curve(quick, family, "optimal")
    assert (np.diff(found["rate"]) < -1).all()  # nats
    assert (np.diff(found["distortion"]) > 0).all()
    slopes = np.diff(found["distortion"]) / np.diff(found["rate"])
    assert slopes[-1] < 2 * slopes[0] < 0  # a nat of rate buys most where there are few


def test_curves_span_the_same_rates(quick: list[Row]) -> None:
    ends = np.array([curve(quick, family, "optimal")["rate"][[0, -1]] for family in FAMILIES])
    low, high = ends.min(0), ends.max(0)
    assert (high / low < 1.4).all()


def test_squared_error_readings_are_no_proper_curves(quick: list[Row]) -> None:
    half, beta, optimal = (
        curve(quick, "squared error", reading)["distortion"] for reading in ("half", "beta", "optimal")
    )
    # σ² = ½: far above, and blind to what it is that the rate buys.
    assert (half - optimal > 40).all()
    assert np.ptp(half) < 0.1 * np.ptp(optimal)
    # σ² = β/2: more rate, more distortion, at the small β; near the optimal one only where β/2 is near the MSE.
    assert beta[0] > beta[1] + 10
    assert (beta - optimal).max() > 15


def test_sigma_of_training_is_nearly_the_optimal_one(quick: list[Row]) -> None:
    """No hindsight needed: it costs less than a nat that the running average has not seen the test split."""
    for family in ("decoupled", "per image"):
        trained, optimal = (curve(quick, family, reading)["distortion"] for reading in ("trained", "optimal"))
        assert (trained - optimal < 0.75).all()


def test_decoupled_beta_is_a_squared_errors_two_beta_variance(quick: list[Row]) -> None:
    """At its optimal σ² the decoupled loss has the gradient of SSE + 2βσ²·rate over 2σ²: the same rate at that β."""
    squared_error = curve(quick, "squared error", "optimal")
    sigmas = curve(quick, "decoupled", "trained")["sigma"]
    decoupled = curve(quick, "decoupled", "optimal")
    effective = 2 * decoupled["beta"] * sigmas**2
    within = (effective >= squared_error["beta"][0]) & (effective <= squared_error["beta"][-1])
    assert within.sum() >= 3
    rates = np.interp(np.log(effective), np.log(squared_error["beta"]), squared_error["rate"])
    np.testing.assert_allclose(decoupled["rate"][within], rates[within], rtol=0.15)


def test_decoupled_curve_is_not_above_the_squared_errors(quick: list[Row]) -> None:
    """In as many epochs, at the same rate; both read at their optimal σ². In the limit the curves are one."""
    squared_error, decoupled = (curve(quick, family, "optimal") for family in ("squared error", "decoupled"))
    within = (decoupled["rate"] >= squared_error["rate"][-1]) & (decoupled["rate"] <= squared_error["rate"][0])
    assert within.sum() >= 3
    other = np.interp(decoupled["rate"], squared_error["rate"][::-1], squared_error["distortion"][::-1])
    assert (decoupled["distortion"] < other + 0.5)[within].all()
    assert (decoupled["distortion"] < other - 2)[within & (decoupled["beta"] <= 1)].all()


@pytest.mark.release("two dozen linear VAEs")
def test_linear_vaes_lie_on_the_closed_form(tmp_path: Path) -> None:
    rows = sweep(tmp_path, "--linear", "--quick")
    assert len(rows) == rd_curve.QUICK_LINEAR["points"]
    for row in rows:
        for key in ("rate", "distortion", "sse"):
            assert row[key] == pytest.approx(row[f"exact_{key}"], rel=0.02), (row["beta"], key)
    assert min(row["exact_active"] for row in rows) < max(row["exact_active"] for row in rows)
    assert (tmp_path / "rd_curve.png").stat().st_size > 10_000


# Interrupted, resumed, extended; and refused.


@pytest.mark.parametrize("options", [TINY, TINY_LINEAR], ids=["conv", "linear"])
def test_resumed_sweep_equals_uninterrupted_one(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = sweep(tmp_path / "whole", *options)
    with monkeypatch.context() as patch:
        original, calls = Trainer.train_step, iter(range(1, 10**9))

        def train_step(self: Trainer, index: torch.Tensor) -> object:
            if next(calls) == self.steps_per_epoch * 3 + 2:  # in the second model
                raise KeyboardInterrupt
            return original(self, index)

        patch.setattr(Trainer, "train_step", train_step)
        sweep(tmp_path / "cut", *options, code=130)
    assert "--resume" in capsys.readouterr().err
    assert not (tmp_path / "cut" / "rd_curve.csv").exists()
    torch.manual_seed(12345)
    assert sweep(tmp_path / "cut", *options, "--resume") == whole


def test_a_finished_sweep_is_extended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = sweep(tmp_path, *TINY)
    steps, original = [], Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step", lambda self, index: steps.append(index) or original(self, index))
    assert sweep(tmp_path, *TINY, "--resume") == first
    assert steps == []
    both = sweep(tmp_path, *TINY, "--repeats", "2", "--resume")
    assert len(steps) == 3 * 2 * 2 * 22  # families, betas, epochs, steps: one seed's
    assert [row for row in both if row["seed"] == 0] == first
    assert [row["distortion"] for row in both if row["seed"] == 1] != [row["distortion"] for row in first]
    spread = curve(both, "decoupled", "optimal")
    assert (spread["rate_std"] > 0).all()


def test_resume_refuses_other_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep(tmp_path, *TINY)
    sweep(tmp_path, *TINY, "--epochs", "3", "--resume", code=2)
    error = capsys.readouterr().err
    assert "--epochs (was 2, now 3)" in error
    assert error.count("\n") == 1 or error.splitlines()[-1].startswith("rd_curve.py: error: ")
    sweep(tmp_path / "typo", *TINY, "--resume", code=2)
    assert "no models in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--points", "0"], "at least 1"),
        (["--repeats", "-1"], "at least 1"),
        (["--linear", "--data", "digits"], "--data has no effect with --linear"),
        (["--linear", "--latent-dim", "3"], "--latent-dim has no effect with --linear"),
        (["--linear", "--width", "3"], "--width has no effect with --linear"),
    ],
)
def test_bad_options_are_refused(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        rd_curve.main(options)
    assert message in capsys.readouterr().err


def test_torchrun_is_for_cpus(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(ranks, "count", lambda: 2)
    with pytest.raises(SystemExit, match="2"):
        rd_curve.main(["--device", "meta"])
    assert "add --device cpu" in capsys.readouterr().err


def test_images_without_variance_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "grey.npz", images=np.full((20, 8, 8), 128, np.uint8))
    sweep(tmp_path / "out", "--quick", "--data", str(tmp_path / "grey.npz"), code=2)
    assert "all alike" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_colour_images_from_a_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=np.random.default_rng(0).integers(0, 256, (40, 9, 7, 3), np.uint8))
    rows = sweep(tmp_path / "out", *TINY, "--data", str(tmp_path / "x.npz"))
    assert all(math.isfinite(row["distortion"]) and row["rate"] >= 0 for row in rows)


INTERRUPTED = """
import signal
import rd_curve
from common import ranks
from common.training import Trainer

original, calls = Trainer.train_step, iter(range(1, 10**9))

def train_step(self, index):
    if next(calls) == 75:  # of 44 a model: in the second one's second epoch
        signal.raise_signal(signal.SIGINT)
    return original(self, index)

Trainer.train_step = train_step
ranks.join()
ranks.leave(rd_curve.main())
"""


@pytest.mark.release("training by two processes")
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
def test_two_processes_by_torchrun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As one process, but for the latents' noise; and an interrupted sweep goes on to the numbers of a whole one."""
    options = [*TINY, "--points", "1", "--device", "cpu"]
    script, interrupted = ROOT / "examples" / "rd_curve.py", tmp_path / "interrupted.py"
    interrupted.write_text(INTERRUPTED)

    def torchrun(program: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
        return subprocess.run(
            [*command, *options, "--out", str(out), *more], capture_output=True, text=True,
            timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parent)},
        )  # fmt: skip

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run = torchrun(script, whole)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("curves and numbers are in") == 1
    one = sweep(tmp_path / "one", *options)
    for ours, single in zip(read_csv(whole / "rd_curve.csv"), one, strict=True):
        assert (ours["family"], ours["beta"], ours["reading"]) == (single["family"], single["beta"], single["reading"])
        assert ours["sse"] == pytest.approx(single["sse"], rel=0.05)
        assert ours["sse"] != single["sse"]  # the noise is not the same

    run = torchrun(interrupted, cut)
    assert run.returncode != 0
    assert run.stderr.count("continue it with") == 1
    assert "torchrun --nproc-per-node 2" in run.stderr
    assert sorted(p.name for p in cut.iterdir()) == ["models"]
    assert torchrun(script, cut, "--resume").returncode == 0
    assert (cut / "rd_curve.csv").read_bytes() == (whole / "rd_curve.csv").read_bytes()

    sweep(cut, *options, "--resume", code=2)
    assert "--processes (was 2, now None)" in capsys.readouterr().err
