"""A learned gamma against one that is fixed where it ended: the reconstructions are near, the latents are not."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from on_examples import interrupt_in_step, one_thread, read_csv  # noqa: F401

# isort: split
import learned_vs_fixed_sigma
from common.data import load
from common.latents import draw, prior
from common.mmd import mmd
from common.sweep import load_finished

FILES = ["curves.csv", "learned_vs_fixed_sigma.png", "models", "results.csv"]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(1, id="one seed"),
        pytest.param(2, id="two seeds", marks=pytest.mark.release("a second seed of an example's claims")),
    ],
)
def seeds(request: pytest.FixtureRequest) -> range:
    return range(request.param)


def quick_options(out: Path, seeds: range) -> list[str]:
    return ["--quick", "--repeats", str(len(seeds)), "--out", str(out), "--device", "cpu"]


@pytest.fixture(scope="module")
def quick(seeds: range, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("learned")
    assert learned_vs_fixed_sigma.main(quick_options(out, seeds)) == 0
    return out


def row(out: Path, kind: str, seed: int) -> dict[str, Any]:
    return next(r for r in read_csv(out / "results.csv") if (r["kind"], r["seed"]) == (kind, seed))


def test_what_a_quick_run_leaves(quick: Path, seeds: range) -> None:
    assert sorted(path.name for path in quick.iterdir()) == FILES
    rows = read_csv(quick / "results.csv")
    first = [(kind, seed) for seed in seeds for kind in ("learned", "optimal")]
    assert [(r["kind"], r["seed"]) for r in rows] == [*first, *(("fixed", seed) for seed in seeds)]
    assert len(read_csv(quick / "curves.csv")) == len(rows) * 20
    for r in rows:
        assert r["loss"] == pytest.approx(r["distortion"] + r["rate"], rel=1e-4, abs=1e-3)
        # −log p at σ² = γ, from the squared error of one sample; another draw than the evaluation's.
        expected = r["sse_sampled"] / (2 * r["gamma"]) + 32 * math.log(2 * math.pi * r["gamma"])
        assert r["distortion"] == pytest.approx(expected, abs=3)


def test_fixing_gamma_from_the_start_traps_training(quick: Path, seeds: range) -> None:
    for seed in seeds:
        learned, fixed = row(quick, "learned", seed), row(quick, "fixed", seed)
        assert fixed["gamma"] == pytest.approx(learned["gamma"], rel=1e-5)
        # Reconstruction differs by part of itself (and not in favour of the fixed gamma), the latents by a multiple.
        assert learned["sse"] < fixed["sse"] < 1.6 * learned["sse"]
        assert fixed["mmd"] > 4 * learned["mmd"]
        assert fixed["loss"] > learned["loss"] + 2


def test_the_closed_form_is_not_trapped(quick: Path, seeds: range) -> None:
    for seed in seeds:
        optimal, fixed = row(quick, "optimal", seed), row(quick, "fixed", seed)
        assert optimal["mmd"] < fixed["mmd"] / 2.5
        assert optimal["loss"] < fixed["loss"] - 2


def test_gamma_falls_while_it_is_learned(quick: Path, seeds: range) -> None:
    def gammas(kind: str, seed: int) -> list[float]:
        return [p["gamma"] for p in read_csv(quick / "curves.csv") if (p["kind"], p["seed"]) == (kind, seed)]

    for seed in seeds:
        learned = gammas("learned", seed)
        assert learned[0] > 0.5
        assert learned[-1] < 0.1 * learned[0]
        assert learned[-1] == pytest.approx(row(quick, "learned", seed)["gamma"], rel=1e-5)
        assert gammas("fixed", seed) == pytest.approx([learned[-1]] * len(learned), rel=1e-5)


def test_the_numbers_are_those_of_the_kept_model(quick: Path, seeds: range) -> None:
    args = learned_vs_fixed_sigma.parse_args(quick_options(quick, seeds))
    images = load("digits")
    trainer = load_finished(learned_vs_fixed_sigma.make_run(args, images, "learned", 0), quick)
    model, found = trainer.objective.model.eval(), row(quick, "learned", 0)
    with torch.no_grad():
        mu, logvar = model.encode(images.test)
        error = (model.decode(mu)[0] - images.test).square().sum((1, 2, 3)).mean().item()
    assert found["sse"] == pytest.approx(error, rel=1e-4)
    assert found["mmd"] == pytest.approx(1000 * mmd(draw(mu, logvar), prior(2000, 16, seed=1)), rel=1e-3)


def test_table_is_mean_and_spread() -> None:
    keys = learned_vs_fixed_sigma.COLUMNS
    results = [{"kind": kind, **dict.fromkeys(keys, v)} for kind in learned_vs_fixed_sigma.KINDS for v in (1.0, 3.0)]
    lines = learned_vs_fixed_sigma.table(results).splitlines()
    assert len(lines) == 2 + len(learned_vs_fixed_sigma.KINDS)
    assert all(line.count("|") == len(keys) + 2 for line in lines)
    assert lines[2].startswith("| γ learned | 2.00000 ± 1.41421 | 2.000 ± 1.414 |")
    assert "±" not in learned_vs_fixed_sigma.table(results[::2])


def test_resumed_run_equals_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--data", "digits", "--epochs", "1", "--repeats", "1", "--width", "4", "--latent-dim", "4"]
    options += ["--device", "cpu"]
    assert learned_vs_fixed_sigma.main([*options, "--out", str(tmp_path / "whole")]) == 0
    for i, step in enumerate((30, 25)):  # of 3 models with 22 each: in the second one, then in the third
        with monkeypatch.context() as patch:
            interrupt_in_step(patch, step)
            resume = ["--resume"] * (i > 0)
            assert learned_vs_fixed_sigma.main([*options, "--out", str(tmp_path / "cut"), *resume]) == 130
    assert learned_vs_fixed_sigma.main([*options, "--out", str(tmp_path / "cut"), "--resume"]) == 0
    whole, cut = ([{**r, "seconds": 0} for r in read_csv(tmp_path / run / "results.csv")] for run in ("whole", "cut"))
    assert whole == cut
    curves = [(tmp_path / run / "curves.csv").read_text() for run in ("whole", "cut")]
    assert curves[0] == curves[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epochs", "0"], "--epochs: must be at least 1, got 0"),
        (["--repeats", "-1"], "--repeats: must be at least 1, got -1"),
        (["--lr", "0"], "--lr: must be greater than 0, got 0"),
        (["--width", "0"], "--width: must be at least 1, got 0"),
    ],
)
def test_bad_options_are_refused(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        learned_vs_fixed_sigma.main(options)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("count", [0, 15])  # no file; and a tenth of 15 is one image, which has no MMD
def test_missing_or_too_few_data_are_one_line(count: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if count:
        np.savez(tmp_path / "x.npz", np.zeros((count, 8, 8), np.uint8))
    assert learned_vs_fixed_sigma.main(["--data", str(tmp_path / "x.npz"), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"learned_vs_fixed_sigma.py: error: {tmp_path / 'x.npz'}: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
