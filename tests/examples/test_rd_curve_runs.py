"""rd_curve.py: how a sweep is interrupted, resumed, extended, shared out, and what is refused."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from on_examples import ROOT, one_thread, read_csv  # noqa: F401
from rd_sweeps import TINY, TINY_LINEAR, curve, sweep

# isort: split
import rd_curve
from common import ranks
from common.training import Trainer


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
    """They do what one does, but for the latents' noise; an interrupted sweep goes on to a whole one's numbers."""
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
