"""The decoders' table: it is whole, its numbers say what the paper's do, and it resumes and refuses as it should."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from on_examples import one_thread  # noqa: F401

# isort: split
import calibrated_decoders
from common.data import load
from common.files import read_json
from common.sweep import MODELS
from common.training import Trainer
from PIL import Image

Row = dict[str, str]
DENSITIES = ("sigma-1", "per-pixel", "student-t", "shared", "optimal")
MASSES = ("categorical", "bitwise-categorical", "logistic-mixture")
BLANK = ("bernoulli", "optimal-per-image")
NAMES = [*DENSITIES, *MASSES, *BLANK]
DIMS = 14 * 14


def read(out: Path) -> dict[str, Row]:
    with (out / "metrics.csv").open(encoding="utf-8") as file:
        return {row["decoder"]: row for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The script as a user would try it, once for all claims below."""
    out = tmp_path_factory.mktemp("quick")
    assert calibrated_decoders.main(["--quick", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def rows(quick: Path) -> dict[str, Row]:
    return read(quick)


def value(rows: dict[str, Row], name: str, key: str) -> float:
    return float(rows[name][key])


def test_every_row_is_there(quick: Path, rows: dict[str, Row]) -> None:
    sweep = [f"beta-{beta:g}" for beta in calibrated_decoders.QUICK["betas"]]
    assert sorted(rows) == sorted([*NAMES, *sweep, "training-images"])
    for name in (*NAMES, *sweep):
        assert all(math.isfinite(value(rows, name, key)) for key in ("rate", "rmse", "frechet"))
        assert value(rows, name, "rate") >= 0
    table = (quick / "table.md").read_text(encoding="utf-8")
    assert sum(line.startswith("| ") for line in table.splitlines()) == 2 + len(NAMES) + 1 + 1
    assert "not FID: never to be compared with papers' FID" in table
    with Image.open(quick / "calibrated_decoders.png") as picture:
        assert picture.width > 1000


def test_bounds_are_on_one_scale(rows: dict[str, Row]) -> None:
    for name in DENSITIES:
        nats = value(rows, name, "density_nats")
        assert nats == pytest.approx(value(rows, name, "distortion") + value(rows, name, "rate"), rel=1e-6)
        assert value(rows, name, "mass_nats") == pytest.approx(nats + DIMS * math.log(255), rel=1e-6)
    for name in MASSES:
        assert rows[name]["density_nats"] == ""
        nats = value(rows, name, "distortion") + value(rows, name, "rate")
        assert value(rows, name, "mass_nats") == pytest.approx(nats, rel=1e-6)
    for name in (*DENSITIES, *MASSES):
        assert (
            0 < value(rows, name, "mass_nats") == pytest.approx(value(rows, name, "bits_per_dim") * DIMS * math.log(2))
        )


def test_what_is_no_bound_is_blank(rows: dict[str, Row]) -> None:
    for name in BLANK:
        assert [rows[name][key] for key in ("density_nats", "mass_nats", "bits_per_dim")] == [""] * 3
    assert value(rows, "bernoulli", "distortion") > 0  # its cross-entropy
    assert rows["optimal-per-image"]["distortion"] == ""


def test_sigma_of_one_is_worse_than_knowing_nothing(rows: dict[str, Row]) -> None:
    """8 bits are what uniform masses cost. A calibrated sigma takes two bits off sigma = 1."""
    assert value(rows, "sigma-1", "bits_per_dim") > 8
    for name in ("shared", "optimal"):
        assert value(rows, name, "bits_per_dim") < value(rows, "sigma-1", "bits_per_dim") - 1.5
        assert value(rows, name, "rmse") < 0.7 * value(rows, "sigma-1", "rmse")
        assert value(rows, name, "frechet") < 0.5 * value(rows, "sigma-1", "frechet")
        assert value(rows, name, "rate") > value(rows, "sigma-1", "rate") + 10


def test_a_trained_sigma_finds_what_the_closed_form_is(rows: dict[str, Row]) -> None:
    assert value(rows, "shared", "bits_per_dim") == pytest.approx(value(rows, "optimal", "bits_per_dim"), rel=0.05)
    assert value(rows, "shared", "sigma") == pytest.approx(value(rows, "optimal", "sigma"), rel=0.25)


def test_no_beta_of_the_sweep_beats_the_optimal_sigma(rows: dict[str, Row]) -> None:
    """The bound, and the betas at both ends do far worse: what the search is for."""
    bounds = {name: value(rows, name, "bits_per_dim") for name in rows if name.startswith("beta-")}
    assert len(bounds) == 3
    assert min(bounds.values()) > value(rows, "optimal", "bits_per_dim")
    assert max(bounds.values()) > value(rows, "optimal", "bits_per_dim") + 2
    assert min(bounds, key=lambda name: bounds[name]) == "beta-0.03"
    for name in bounds:
        assert value(rows, name, "sigma") == pytest.approx(math.sqrt(float(rows[name]["beta"]) / 2), rel=1e-5)


def test_a_sigma_that_falls_with_the_error_reaches_a_smaller_one(rows: dict[str, Row]) -> None:
    """Than any that is constant from the start, those of about its own final size included."""
    constant = [value(rows, name, "rmse") for name in rows if name.startswith("beta-") or name == "sigma-1"]
    assert value(rows, "optimal", "rmse") < 0.96 * min(constant)


def test_freer_densities_bound_better_and_sample_worse(rows: dict[str, Row]) -> None:
    """The paper's table says so of per-pixel sigma and Student-t, against one sigma for all."""
    for name in ("per-pixel", "student-t"):
        assert value(rows, name, "bits_per_dim") < value(rows, "optimal", "bits_per_dim") - 0.2
        assert value(rows, name, "frechet") > 1.5 * value(rows, "optimal", "frechet")


def test_masses_collect_what_densities_cannot(rows: dict[str, Row]) -> None:
    """Most pixels are exactly black."""
    for name in MASSES:
        assert value(rows, name, "bits_per_dim") < 0.6 * min(value(rows, d, "bits_per_dim") for d in DENSITIES)


def test_training_images_are_nearest_to_the_test_images(rows: dict[str, Row]) -> None:
    floor = value(rows, "training-images", "frechet")
    assert 0 < floor < 0.3 * min(value(rows, name, "frechet") for name in NAMES)


TINY = ["--quick", "--epochs", "2", "--width", "4", "--latent-dim", "2", "--betas", "0.1"]


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    """Sixty 8-bit colour images of odd size, without labels."""
    array = np.random.default_rng(0).integers(0, 256, (60, 9, 7, 3), np.uint8)
    np.savez(tmp_path / "x.npz", array)
    return tmp_path / "x.npz"


def test_resumed_sweep_equals_the_uninterrupted_one(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cut inside the third of eleven models; the two before it are not trained again. No labels, no distance."""
    options = [*TINY, "--data", str(colours)]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert calibrated_decoders.main([*options, "--out", str(whole)]) == 0
    assert "no Fréchet distance" in capsys.readouterr().out

    original, steps = Trainer.train_step, []

    def train_step(self: Trainer, index: torch.Tensor) -> object:
        steps.append(self.settings["decoder"])
        if len(steps) == 6:
            raise KeyboardInterrupt
        return original(self, index)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    assert calibrated_decoders.main([*options, "--out", str(cut)]) == 130
    assert "--resume" in capsys.readouterr().err
    assert sorted(p.parent.name for p in (cut / MODELS).glob("*/result.json")) == ["bernoulli", "categorical"]
    assert calibrated_decoders.main([*options, "--out", str(cut), "--resume"]) == 0
    assert steps[6] == "bitwise-categorical"
    a, b = read(whole), read(cut)
    assert len(a) == len(NAMES) + 2
    for row in (*a.values(), *b.values()):
        del row["seconds"]
    assert a == b
    assert all(row["frechet"] == "" for row in a.values())

    assert calibrated_decoders.main([*options, "--out", str(cut), "--resume", "--seed", "3"]) == 2
    assert "--seed (was 0, now 3)" in capsys.readouterr().err


def test_quick_halves_the_images_and_keeps_them_8bit() -> None:
    full, half = (
        calibrated_decoders.load_8bit(calibrated_decoders.parse_args(options)) for options in ([], ["--quick"])
    )
    assert full.shape == (1, 28, 28)
    assert half.shape == (1, 14, 14)
    assert half.is_8bit
    assert torch.equal(full.test, load("mnist").test)
    expected = full.test[7, 0, 4:6, 10:12].float().mean().round()
    assert half.test[7, 0, 2, 5] == expected


def test_a_row_is_what_it_says(colours: Path, tmp_path: Path) -> None:
    """SSE + beta KL is beta times the ELBO at sigma² = beta/2, but for a constant: its gradients say so."""
    row = next(d for d in calibrated_decoders.decoders([0.1]) if d.beta == 0.1)
    args = calibrated_decoders.parse_args([*TINY, "--data", str(colours)])
    images = calibrated_decoders.load_8bit(args)
    trainer = calibrated_decoders.build(tmp_path / "x.pt", {"kind": row.kind}, args=args, images=images)
    torch.manual_seed(0)
    out = trainer.objective.model(x := trainer.batch(images.train[:8]))
    kl = 0.5 * (out.mu.square() + out.logvar.exp() - 1 - out.logvar).sum(1).mean()
    loss = (out.recon - x).square().sum((1, 2, 3)).mean() + 0.1 * kl
    expected = torch.autograd.grad(loss, list(trainer.objective.parameters()))
    torch.manual_seed(0)
    found = torch.autograd.grad(0.1 * trainer.objective(x).loss, list(trainer.objective.parameters()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "digits"], "--data digits: these images are not 8-bit"),
        (["--inception", "nowhere.pt"], "--inception nowhere.pt: not a usable TorchScript network"),
        (["--data", "nowhere"], "nowhere: no such file"),
    ],
)
def test_what_cannot_be_used_is_one_line_before_any_work(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert calibrated_decoders.main([*options, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--betas", "0"], "greater than 0"),
        (["--betas", "0.1", "0.10"], "--betas must differ, got 0.1 0.1"),
        (["--epochs", "0"], "at least 1"),
        (["--width", "-3"], "at least 1"),
    ],
)
def test_bad_options_are_refused(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrated_decoders, "run", lambda args: pytest.fail("the option was accepted"))
    with pytest.raises(SystemExit, match="2"):
        calibrated_decoders.main(options)
    assert message in capsys.readouterr().err


def test_several_processes_are_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_torchelastic_launched", lambda: True)
    with pytest.raises(SystemExit, match="2"):
        calibrated_decoders.main([])
    assert "without torchrun" in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        calibrated_decoders.main(["--help"])
    shown = capsys.readouterr().out
    assert all(option in shown for option in ("--data", "--betas", "--inception", "--quick", "--resume"))


def test_settings_of_the_run_are_kept(quick: Path) -> None:
    found = read_json(quick / MODELS / "optimal" / "result.json")["settings"]
    assert found["quick"] is True
    assert found["data_shape"] == [4000, 1, 14, 14]
