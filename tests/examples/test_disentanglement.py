"""How far VAEs keep the factors of the shapes apart, and pictures along their latents."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from on_examples import interrupt_in_step, one_thread, read_csv  # noqa: F401

# isort: split
import disentanglement
from common import factor_metrics
from common.latents import encode, rates
from common.mlp import MLPVAE
from common.tc_runs import FAMILIES

FILES = ["disentanglement.png", "models", "results.csv", "traversals.png"]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("disentanglement")
    assert disentanglement.main(["--quick", "--out", str(out), "--device", "cpu"]) == 0
    return out


def test_what_a_quick_run_leaves(quick: Path) -> None:
    assert sorted(path.name for path in quick.iterdir()) == FILES
    rows = read_csv(quick / "results.csv")
    families = ["coupled", "decoupled", "decoupled", "tc", disentanglement.TOLD, disentanglement.TOLD]
    assert [row["family"] for row in rows] == families
    assert [row["beta"] for row in rows] == [0.3, 2, 8, 16, 2, 8]
    for row in rows:
        assert all(0 <= row[metric] <= 1 for metric in disentanglement.METRICS)


def test_the_codes_know_the_factors_and_do_not_keep_them_apart(quick: Path) -> None:
    """Informativeness by guessing is 0.19. After so little training no family comes near a code of one latent each."""
    for row in read_csv(quick / "results.csv"):
        assert row["informativeness"] > 0.45
        assert row["mig"] < 0.35
        assert row["disentanglement"] < 0.4


def test_one_code_for_every_beta_keeps_its_mig(quick: Path) -> None:
    """Separate models of these β have others."""
    migs = [row["mig"] for row in read_csv(quick / "results.csv") if row["family"] == disentanglement.TOLD]
    assert abs(migs[0] - migs[1]) < 0.03


def test_a_traversal_moves_one_latent_in_each_row() -> None:
    """From the largest rate to the smallest; what the decoder ignores stays as it is."""
    torch.manual_seed(0)
    model, x = MLPVAE(64, 3), torch.rand(50, 64)
    with torch.no_grad():
        model.decoder[0].weight[:, 1] = 0
        model.encoder[0].weight[1] *= 10  # the largest rate, for nothing
    picture, nats = disentanglement.traversal(model, x)
    assert nats == sorted(nats, reverse=True) == rates(*encode(model, x)).sort(descending=True).values.tolist()
    assert picture.shape == (3 * 9 - 1, disentanglement.STEPS * 9 - 1, 3)  # tiles of 8×8 with a gap
    rows = [picture[9 * i : 9 * i + 8, :, 0] for i in range(3)]
    moved = [abs(row[:, :8] - row[:, -8:]).max() > 0.01 for row in rows]
    assert moved == [False, True, True]


def test_resumed_run_equals_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disentanglement, "QUICK_BETAS", dict.fromkeys(FAMILIES, (4,)))
    monkeypatch.setattr(disentanglement, "QUICK_POINTS", {"train": 100, "test": 50, "votes": 100})
    monkeypatch.setattr(factor_metrics, "TREES", 1)
    monkeypatch.setattr(disentanglement, "plot", lambda *_: None)
    options = ["--quick", "--epochs", "1", "--device", "cpu"]
    assert disentanglement.main([*options, "--out", str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patch:
        interrupt_in_step(patch, 30)  # of 24 a model
        assert disentanglement.main([*options, "--out", str(tmp_path / "cut")]) == 130
    assert disentanglement.main([*options, "--out", str(tmp_path / "cut"), "--resume"]) == 0
    whole, cut = ([{**r, "seconds": 0} for r in read_csv(tmp_path / run / "results.csv")] for run in ("whole", "cut"))
    assert len(whole) == 4
    assert whole == cut
    assert (tmp_path / "cut" / "traversals.png").read_bytes() == (tmp_path / "whole" / "traversals.png").read_bytes()
