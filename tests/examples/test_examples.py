"""The examples: they run, learn, resume exactly, and fail in one clear line."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from on_examples import ROOT, TINY, one_thread, train  # noqa: F401

# isort: split
import train_vae
from common import data
from common.checkpoint import load_checkpoint
from common.objective import SIGMA_MODES
from common.training import Trainer

OUTPUTS = ("checkpoint.pt", "curves.png", "images.png", "metrics.json", "settings.json")


def interrupt(monkeypatch: pytest.MonkeyPatch, after: int, how: str) -> None:
    """Ctrl-C during step number `after`: as a signal, which waits for the step's end, or raised in its middle."""
    original, calls = Trainer.train_step, iter(range(1, 10**9))

    def train_step(self: Trainer, index: torch.Tensor) -> object:
        if next(calls) == after:
            if how == "raise":
                raise KeyboardInterrupt
            signal.raise_signal(signal.SIGINT)
        return original(self, index)

    monkeypatch.setattr(Trainer, "train_step", train_step)


@pytest.mark.parametrize("sigma", [*SIGMA_MODES, "0.25"])
def test_every_sigma_mode_learns_and_reports(sigma: str, tmp_path: Path) -> None:
    metrics = train(tmp_path, "--sigma", sigma, "--epochs", "2")

    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(OUTPUTS)
    assert all((tmp_path / name).stat().st_size > 0 for name in OUTPUTS)
    numbers = [metrics[key] for key in ("loss", "distortion", "rate", "sigma", "bits_per_dim", "seconds")]
    assert all(math.isfinite(number) for number in numbers)
    assert metrics["loss"] == pytest.approx(metrics["distortion"] + 2 * metrics["rate"], rel=1e-4, abs=1e-3)
    assert metrics["bits_per_dim"] == pytest.approx((metrics["distortion"] + metrics["rate"]) / (64 * math.log(2)))
    assert metrics["bits_per_dim_8bit"] is None  # these digits have 17 grey levels, not 256
    assert metrics["settings"]["sigma"] == json.loads((tmp_path / "settings.json").read_text())["sigma"] == sigma
    assert metrics["versions"]["torch"] == torch.__version__
    assert ("sees x" in metrics["note"]) == (sigma == "optimal-per-image")
    if sigma == "0.25":
        assert metrics["sigma"] == pytest.approx(0.25)

    first, last = metrics["history"][0], metrics["history"][-1]
    assert last["train"]["distortion"] < first["train"]["distortion"] - 1
    assert last["val"]["loss"] < first["val"]["loss"]


def test_it_learns_more_than_the_mean_image(tmp_path: Path) -> None:
    metrics = train(tmp_path, "--beta", "1", "--epochs", "8", "--width", "16", "--latent-dim", "8")
    blind = math.exp(data.load("digits").log_std)  # the sigma of a decoder that ignores z
    assert metrics["sigma"] < 0.8 * blind
    assert metrics["rate"] > 3


def test_test_metrics_do_not_use_the_test_images_own_sigma(tmp_path: Path) -> None:
    metrics = train(tmp_path, "--epochs", "1")
    running = load_checkpoint(tmp_path / "checkpoint.pt")["trainer"]["objective"]["criterion.running_var"]
    assert metrics["sigma"] == pytest.approx(running.sqrt().item(), rel=1e-5)


@pytest.mark.parametrize("sigma", ["optimal", "learned"])
@pytest.mark.parametrize("how", ["signal", "raise"])
def test_resumed_run_equals_uninterrupted_one(
    how: str, sigma: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--epochs", "2", "--sigma", sigma)
    whole = train(tmp_path / "whole", *options)

    with monkeypatch.context() as patch:
        interrupt(patch, after=30, how=how)  # of 2 x 22: in the middle of the second epoch
        train(tmp_path / "cut", *options, code=130)
    assert "--resume" in capsys.readouterr().err
    saved = load_checkpoint(tmp_path / "cut" / "checkpoint.pt")["trainer"]
    # A signal lets the step finish and keeps it; an exception inside a step falls back to the last whole epoch.
    assert (saved["epoch"], saved["step"]) == ((1, 8) if how == "signal" else (1, 0))

    torch.manual_seed(12345)  # the resumed process would not share this one's random state
    resumed = train(tmp_path / "cut", *options, "--resume")
    for key in ("history", "loss", "distortion", "rate", "sigma", "bits_per_dim", "settings"):
        assert resumed[key] == whole[key], key
    a, b = (load_checkpoint(tmp_path / run / "checkpoint.pt")["trainer"]["objective"] for run in ("whole", "cut"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_interrupted_in_the_first_step_leaves_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(monkeypatch, after=1, how="raise")
    train(tmp_path, "--epochs", "1", code=130)
    saved = load_checkpoint(tmp_path / "checkpoint.pt")["trainer"]
    assert (saved["epoch"], saved["step"]) == (0, 0)


def test_resume_refuses_what_is_not_this_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path, "--epochs", "1", "--resume", code=2)
    assert "no checkpoint" in capsys.readouterr().err

    train(tmp_path, "--epochs", "1")
    train(tmp_path, "--epochs", "1", "--beta", "3", "--seed", "7", "--resume", code=2)
    error = capsys.readouterr().err
    assert "--beta (was 2.0, now 3.0)" in error
    assert "--seed (was 0, now 7)" in error
    assert "--width" not in error

    (tmp_path / "checkpoint.pt").write_bytes(b"torn")
    train(tmp_path, "--epochs", "1", "--resume", code=2)
    assert "not a readable checkpoint" in capsys.readouterr().err


@pytest.mark.release("training by two processes")
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
def test_two_processes_by_torchrun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They do what one process does, but for the latents' noise; a resumed run finds each process's random state."""
    two, options = tmp_path / "two", [*TINY, "--device", "cpu", "--epochs", "2"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    found = []
    for resume in ([], ["--resume"]):  # the second has nothing left to train
        command = [*torchrun, str(ROOT / "examples" / "train_vae.py"), *options, "--out", str(two), *resume]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
        assert run.returncode == 0, run.stderr
        assert run.stdout.count("test: loss") == 1
        found.append(json.loads((two / "metrics.json").read_text()))
    assert sorted(p.name for p in two.iterdir()) == sorted(OUTPUTS)
    one = train(tmp_path / "one", "--device", "cpu", "--epochs", "2")
    for name, tolerance in (("sigma", 0.02), ("distortion", 0.05), ("rate", 0.1)):
        assert found[0][name] == found[1][name] == pytest.approx(one[name], rel=tolerance)
    for a, b in zip(found[0]["history"], one["history"], strict=True):
        assert a["train"]["sigma"] == pytest.approx(b["train"]["sigma"], rel=0.02)
        assert a["train"]["distortion"] == pytest.approx(b["train"]["distortion"], rel=0.1)

    train(two, "--epochs", "2", "--resume", code=2)
    assert "--processes (was 2, now None)" in capsys.readouterr().err


def test_starting_anew_keeps_the_previous_checkpoint(tmp_path: Path) -> None:
    train(tmp_path, "--epochs", "1")
    train(tmp_path, "--epochs", "1")
    assert (tmp_path / "checkpoint.previous.pt").exists()


def test_divergence_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = Trainer.batch
    monkeypatch.setattr(Trainer, "batch", lambda self, images: original(self, images) * math.nan)
    train(tmp_path, "--epochs", "1", code=2)
    assert "diverged in epoch 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sigma", "best"], "neither a number"),
        (["--sigma", "-1"], "greater than 0"),
        (["--sigma", "nan"], "must be finite"),
        (["--beta", "-1"], "at least 0"),
        (["--epochs", "0"], "at least 1"),
        (["--lr", "0"], "greater than 0"),
        (["--device", "toaster"], "toaster"),
        (["--sigma", "learned", "--min-log-sigma", "-5"], "no effect"),
        (["--sigma", "per-pixel", "--min-log-sigma", "0"], "below 0"),
    ],
)
def test_bad_options_are_refused(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_vae, "run", lambda args: pytest.fail("the option was accepted"))
    with pytest.raises(SystemExit, match="2"):
        train_vae.main(options)
    assert message in capsys.readouterr().err


def test_help_runs_as_a_script() -> None:
    result = subprocess.run(
        [sys.executable, "examples/train_vae.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert all(option in result.stdout for option in ("--data", "--sigma", "--beta", "--resume", *SIGMA_MODES))
