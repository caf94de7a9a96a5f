"""How a script ends: with its results, with one line that says what is wrong, or interrupted and ready to go on."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from . import ranks
from .checkpoint import CheckpointError
from .data import DataError
from .training import TrainingError


def main(
    run: Callable[[argparse.Namespace], None], args: argparse.Namespace, argv: Sequence[str] | None, begun: str
) -> int:
    """`run(args)`, and the exit code. The file or folder `begun`, in --out, is there once there is a run to resume."""
    script = Path(sys.modules[run.__module__].__file__ or "").name
    try:
        run(args)
    except (DataError, CheckpointError, TrainingError, OSError) as error:
        print(f"{script}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if ranks.is_first():
            print("\ninterrupted", file=sys.stderr)
            if (args.out / begun).exists():
                print(f"the run is kept in {args.out}; continue it with:\n    {_again(script, argv)}", file=sys.stderr)
        return 130
    return 0


def say(text: str) -> None:
    """Once, however many processes there are."""
    if ranks.is_first():
        print(text)


def _again(script: str, argv: Sequence[str] | None) -> str:
    words = [word for word in (sys.argv[1:] if argv is None else argv) if word != "--resume"]
    many = ["torchrun", "--nproc-per-node", str(ranks.count())]
    starter = [sys.executable] if ranks.count() == 1 else many
    return shlex.join([*starter, f"examples/{script}", *words, "--resume"])
