"""Many models for one picture: each trained once, kept, and found again by --resume.

OUT/models/NAME/checkpoint.pt   while and after it trains
OUT/models/NAME/result.json     once it is trained and measured: settings and numbers
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import ranks
from .checkpoint import CheckpointError, check_same_settings, load_checkpoint
from .files import read_json, write_json
from .training import Trainer

MODELS = "models"  # below --out
RESULT = "result.json"


@dataclass(frozen=True)
class Run:
    """One model of a sweep. `settings` (plain JSON values) decide its numbers, all of them, and name it in errors."""

    name: str
    settings: dict[str, Any]
    build: Callable[[Path, dict[str, Any]], Trainer]  # (checkpoint, settings)
    measure: Callable[[Trainer], dict[str, Any]]  # after training


def train_all(runs: Sequence[Run], out: Path, *, resume: bool) -> list[dict[str, Any]]:
    """What each run measured, in order, with its settings and the seconds that it took.

    Without `resume` the models that lie in `out` already are moved aside. With it, those that are finished are read,
    all of them before any is trained, and one that was interrupted goes on to the numbers that it would have had.
    """
    models = out / MODELS
    check_begun(out, resume=resume)
    if not resume:
        _set_aside(models)
    finished = {run.name: _read(models / run.name / RESULT, run) for run in runs}
    results = []
    for i, run in enumerate(runs):
        found = finished[run.name]
        if found is None:
            found = _train(run, models / run.name, f"{i + 1}/{len(runs)} {run.name}", resume=resume)
            if ranks.is_first():
                write_json(models / run.name / RESULT, found)
        results.append({**found["settings"], **found["metrics"], "seconds": found["seconds"]})
    return results


def check_begun(out: Path, *, resume: bool) -> None:
    """For scripts that have something to do before `train_all`."""
    if resume and not (out / MODELS).exists():
        raise CheckpointError(f"--resume: there are no models in {out}; start without --resume, or name another --out")


def _read(result: Path, run: Run) -> dict[str, Any] | None:
    if not result.exists():
        return None
    found = read_json(result)
    check_same_settings(found["settings"], run.settings)
    return found


def _train(run: Run, folder: Path, title: str, *, resume: bool) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    trainer = run.build(folder / "checkpoint.pt", run.settings)
    if resume and trainer.checkpoint.exists():
        checkpoint = load_checkpoint(trainer.checkpoint)
        check_same_settings(checkpoint["settings"], trainer.settings)
        trainer.load_state_dict(checkpoint["trainer"])
    trainer.fit(title)
    metrics = run.measure(trainer)
    return {"settings": run.settings, "metrics": metrics, "seconds": round(trainer.seconds, 1)}


def _set_aside(models: Path) -> None:
    if ranks.is_first() and models.exists():
        names = (models.with_name(f"{models.name}.previous{i}") for i in itertools.count(1))
        previous = next(name for name in names if not name.exists())  # what took long to train is never deleted
        os.replace(models, previous)
        print(f"starting anew; the models of the run before are kept in {previous}")
    ranks.agree(False)  # nobody writes before that


def load_finished(run: Run, out: Path) -> Trainer:
    """The trainer of a run that `train_all` has trained, for pictures of its model."""
    trainer = run.build(out / MODELS / run.name / "checkpoint.pt", run.settings)
    trainer.load_state_dict(load_checkpoint(trainer.checkpoint)["trainer"])
    return trainer
