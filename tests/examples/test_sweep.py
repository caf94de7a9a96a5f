"""Sweeps of many models: none is trained twice, none is lost, and an interruption leaves no trace in the numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from on_examples import one_thread  # noqa: F401

# isort: split
from common.checkpoint import CheckpointError
from common.data import Splits
from common.linear import LinearVAE
from common.objective import VAEObjective, make_criterion
from common.sweep import Run, train_all
from common.training import Trainer

STEPS = 8  # of each model: 2 epochs of 4


class Sweep:
    """Three models of a few steps each. Counts those built, and presses Ctrl-C in the middle of step number `stop`."""

    def __init__(self) -> None:
        self.built: list[float] = []
        self.steps, self.stop = 0, 0

    def runs(self, **settings: Any) -> list[Run]:
        return [
            Run(f"beta{beta:g}", {"beta": beta, "epochs": 2, **settings}, self.build, self.measure)
            for beta in (0.5, 1.0, 2.0)
        ]

    def build(self, checkpoint: Path, settings: dict[str, Any]) -> Trainer:
        self.built.append(settings["beta"])
        torch.manual_seed(0)
        x = torch.randn(48, 6, generator=torch.Generator().manual_seed(1))
        objective = VAEObjective(LinearVAE(6, 2, 1.0), make_criterion("optimal", settings["beta"], channels=1))
        trainer = Trainer(
            objective, Splits(*x.split([32, 8, 8])), epochs=settings["epochs"], batch_size=8, lr=0.01, seed=0,
            device=torch.device("cpu"), checkpoint=checkpoint, settings=settings,
        )  # fmt: skip
        trainer.train_step = self.counted(trainer.train_step)
        return trainer

    def counted(self, step: Callable[[torch.Tensor], Any]) -> Callable[[torch.Tensor], Any]:
        def train_step(index: torch.Tensor) -> Any:
            self.steps += 1
            if self.steps == self.stop:
                raise KeyboardInterrupt
            return step(index)

        return train_step

    @staticmethod
    def measure(trainer: Trainer) -> dict[str, Any]:
        return trainer.evaluate(trainer.images.test)


def numbers(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in result.items() if key != "seconds"} for result in results]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def sweep() -> Sweep:
    return Sweep()


@pytest.mark.parametrize("stop", [1, STEPS, STEPS + 1, STEPS + 6, 3 * STEPS])
def test_resumed_sweep_equals_uninterrupted_one(stop: int, sweep: Sweep, tmp_path: Path) -> None:
    whole = train_all(sweep.runs(), tmp_path / "whole", resume=False)
    assert [result["beta"] for result in whole] == sweep.built == [0.5, 1.0, 2.0]
    assert len({result["loss"] for result in whole}) == 3

    cut = Sweep()
    cut.stop = stop
    with pytest.raises(KeyboardInterrupt):
        train_all(cut.runs(), tmp_path / "cut", resume=False)
    torch.manual_seed(12345)  # the resumed process would not share this one's random state
    resumed = train_all(cut.runs(), tmp_path / "cut", resume=True)
    assert numbers(resumed) == numbers(whole)
    # An interruption inside a step falls back to the epoch's beginning; whole models are not trained again.
    lost = (stop - 1) % 4
    assert cut.steps == 3 * STEPS + 1 + lost


def test_finished_models_are_read_and_not_built(sweep: Sweep, tmp_path: Path) -> None:
    first = train_all(sweep.runs()[:2], tmp_path, resume=False)
    before = contents(tmp_path)
    assert train_all(sweep.runs()[:2], tmp_path, resume=True) == first
    assert sweep.built == [0.5, 1.0]
    assert contents(tmp_path) == before

    longer = train_all(sweep.runs(), tmp_path, resume=True)  # one more: only that one is trained
    assert longer[:2] == first
    assert sweep.built == [0.5, 1.0, 2.0]


def test_other_settings_are_refused_before_any_work(sweep: Sweep, tmp_path: Path) -> None:
    train_all(sweep.runs()[1:], tmp_path, resume=False)
    before, sweep.built = contents(tmp_path), []
    with pytest.raises(CheckpointError) as error:  # though the first of them is new, and comes before those
        train_all(sweep.runs(epochs=3, latent_dim=4), tmp_path, resume=True)
    assert "--epochs (was 2, now 3), --latent-dim (was None, now 4)" in str(error.value)
    assert "\n" not in str(error.value)
    assert sweep.built == []
    assert contents(tmp_path) == before


def test_an_interrupted_model_with_other_settings_is_refused(sweep: Sweep, tmp_path: Path) -> None:
    sweep.stop = 6
    with pytest.raises(KeyboardInterrupt):
        train_all(sweep.runs(), tmp_path, resume=False)
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=r"--epochs \(was 2, now 3\)"):
        train_all(sweep.runs(epochs=3), tmp_path, resume=True)
    assert contents(tmp_path) == before


def test_nothing_to_resume_is_told(sweep: Sweep, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no models in") as error:
        train_all(sweep.runs(), tmp_path / "typo", resume=True)
    assert str(tmp_path / "typo") in str(error.value)
    assert sweep.built == []


def test_starting_anew_moves_the_models_aside(sweep: Sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lying: list[dict[str, bytes]] = []
    for _ in range(3):
        train_all(sweep.runs()[:1], tmp_path, resume=False)
        lying.append(contents(tmp_path / "models"))
    assert sweep.built == [0.5] * 3
    assert contents(tmp_path / "models.previous1") == lying[0]
    assert contents(tmp_path / "models.previous2") == lying[1]
    told = capsys.readouterr().out.splitlines()
    assert [str(tmp_path / f"models.previous{i}") in line for i, line in enumerate(told, 1)] == [True, True]
