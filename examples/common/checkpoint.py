"""Checkpoints that are either the old one or the new one, never half of one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch


class CheckpointError(RuntimeError):
    """The checkpoint cannot be used. The message is one line, meant for the user."""


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write beside `path`, then rename over it: a kill at any moment leaves a whole file."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Tensors come back on the CPU; `load_state_dict` moves them. Nothing but tensors and plain values is unpickled."""
    if not path.is_file():
        raise CheckpointError(f"--resume: there is no checkpoint at {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a torn file makes the unpickler raise nearly anything
        raise CheckpointError(f"{path}: not a readable checkpoint ({type(error).__name__})") from error


def check_same_settings(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Refuse to continue a run under settings that would make it another run."""
    differing = [key for key in sorted(saved.keys() | current.keys()) if saved.get(key) != current.get(key)]
    if differing:
        changes = ", ".join(f"{_flag(key)} (was {saved.get(key)}, now {current.get(key)})" for key in differing)
        raise CheckpointError(f"--resume: these settings differ from the run's own: {changes}")


def _flag(key: str) -> str:
    return "--" + key.replace("_", "-")
