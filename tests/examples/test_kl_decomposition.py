"""What a rate pays for, over β: where it saturates, and what a weight on its total correlation alone does."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from on_examples import interrupt_in_step, one_thread, read_csv  # noqa: F401

# isort: split
import kl_decomposition

FILES = ["channels.csv", "kl_decomposition.png", "models", "results.csv", "terms.csv"]
COUNTS = {"shapes": 6144, "digits": 1439}  # images in the training split


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("kl")
    assert kl_decomposition.main(["--quick", "--out", str(out), "--device", "cpu"]) == 0
    return out


def model(out: Path, data: str, family: str, beta: float) -> dict[str, Any]:
    rows = read_csv(out / "results.csv")
    return next(row for row in rows if (row["data"], row["family"], row["beta"]) == (data, family, beta))


def test_what_a_quick_run_leaves(quick: Path) -> None:
    assert sorted(path.name for path in quick.iterdir()) == FILES


def test_parts_are_what_they_can_be(quick: Path) -> None:
    rows, channels = read_csv(quick / "results.csv"), read_csv(quick / "channels.csv")
    for row in rows:
        assert row["mi"] + row["tc"] + row["dim_wise"] == pytest.approx(row["rate"], abs=1e-6)
        assert row["mi"] <= math.log(COUNTS[row["data"]]) + 1e-4
        assert row["tc"] > -3 * row["mi_se"]
        assert row["mi_upper"] > row["mi"] - 3 * row["mi_se"]
        own = [c["kl"] for c in channels if all(c[k] == row[k] for k in ("data", "family", "beta", "seed"))]
        assert min(own) > -1e-9
        assert sum(own) == pytest.approx(row["dim_wise"])


def test_at_a_small_beta_the_information_is_all_there_is_and_the_rest_of_the_rate_is_tc(quick: Path) -> None:
    for data, beta in (("shapes", 0.5), ("digits", 0.25)):
        row = model(quick, data, "decoupled", beta)
        assert row["mi"] > math.log(COUNTS[data]) - 0.4
        assert row["tc"] > 1.5 * row["mi"]


def test_the_bracket_closes_where_the_rate_is_far_below_log_n(quick: Path) -> None:
    closed, open_ = (model(quick, "digits", "decoupled", beta) for beta in (4, 0.25))
    assert closed["mi_upper"] - closed["mi"] < 0.2
    assert open_["mi_upper"] > 5 * open_["mi"]


def test_a_weight_on_tc_alone_has_a_smaller_tc_at_a_larger_rate(quick: Path) -> None:
    """And leaves what a weight on all of the rate takes away: how far the marginals are from the prior."""
    on_all, on_tc = model(quick, "shapes", "decoupled", 8), model(quick, "shapes", "tc", 16)
    assert on_tc["rate"] > 1.2 * on_all["rate"]
    assert on_tc["tc"] < on_all["tc"]
    assert on_tc["distortion"] < on_all["distortion"]
    assert on_tc["dim_wise"] > 3 * on_all["dim_wise"]


def test_a_batch_overestimates_information_and_underestimates_tc(quick: Path) -> None:
    row = model(quick, "shapes", "tc", 16)
    assert row["batch_mi"] > row["mi"] + 0.3
    assert row["batch_tc"] < row["tc"] - 0.3


def test_four_terms_and_their_bounds(quick: Path) -> None:
    terms = read_csv(quick / "terms.csv")
    exact = [row for row in terms if row["model"] == "linear"]
    at_one = min(exact, key=lambda row: abs(row["beta"] - 1))
    assert at_one["likelihood"] == pytest.approx(at_one["information"])
    assert max(row["likelihood"] - row["information"] for row in exact) < 1e-9
    assert all(row["prior"] == 0 for row in exact)
    few, many = ([row for row in terms if row["samples"] == n] for n in kl_decomposition.EVIDENCE_SAMPLES)
    assert len(few) == len(many) == 4
    for less, more in zip(few, many, strict=True):
        assert more["likelihood"] < less["likelihood"] < less["information"] + less["prior"]
        assert more["data_plus_entropy"] < less["data_plus_entropy"]


def test_resumed_run_equals_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    betas = {"coupled": (), "decoupled": (), "tc": (4,)}
    monkeypatch.setattr(kl_decomposition, "QUICK_BETAS", {"shapes": betas, "other": betas})
    monkeypatch.setattr(kl_decomposition, "QUICK_EPOCHS", {"shapes": 1, "other": 2})
    monkeypatch.setattr(kl_decomposition, "plot", lambda *_: None)  # it needs all families
    options = ["--quick", "--device", "cpu"]
    assert kl_decomposition.main([*options, "--out", str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patch:
        interrupt_in_step(patch, 28)  # in the second model, after an epoch's end
        assert kl_decomposition.main([*options, "--out", str(tmp_path / "cut")]) == 130
    assert kl_decomposition.main([*options, "--out", str(tmp_path / "cut"), "--resume"]) == 0
    whole, cut = ([{**r, "seconds": 0} for r in read_csv(tmp_path / run / "results.csv")] for run in ("whole", "cut"))
    assert len(whole) == 2
    assert whole == cut
    for name in ("channels.csv", "terms.csv"):
        assert (tmp_path / "cut" / name).read_text() == (tmp_path / "whole" / name).read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "shapes"], "--data is the second data set"),
        (["--latent-dim", "0"], "--latent-dim: must be at least 1, got 0"),
    ],
)
def test_bad_options_are_refused(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        kl_decomposition.main(options)
    assert message in capsys.readouterr().err
