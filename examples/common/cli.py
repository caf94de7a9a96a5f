"""Command-line pieces that every training script shares."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import ranks
from .objective import SIGMA_MODES

SIGMA_HELP = "values of --sigma:\n" + "\n".join(
    f"  {name:22}{meaning}" for name, meaning in (*SIGMA_MODES.items(), ("a number, e.g. 0.1", "constant"))
)


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def number(*, above: float | None = None, at_least: float | None = None) -> Callable[[str], float]:
    """An argparse type: a finite float within a limit."""

    def parse(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"must be finite, got {text}")
        if above is not None and value <= above:
            raise argparse.ArgumentTypeError(f"must be greater than {above:g}, got {text}")
        if at_least is not None and value < at_least:
            raise argparse.ArgumentTypeError(f"must be at least {at_least:g}, got {text}")
        return value

    parse.__name__ = "float"  # argparse names the type in its messages
    return parse


def sigma_mode(text: str) -> str:
    """One of SIGMA_MODES, or a positive number in canonical spelling (0.10 and .1 are one setting)."""
    if text in SIGMA_MODES:
        return text
    try:
        return repr(number(above=0)(text))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a number (constant sigma) nor one of {', '.join(SIGMA_MODES)}"
        ) from None


def device(text: str) -> torch.device:
    if text == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(text)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {str(error).splitlines()[0]}") from None
    return chosen


def add_data_arguments(parser: argparse.ArgumentParser, *, full: str = "mnist", quick: str | None = None) -> None:
    """`quick`: what --quick takes in place of `full`. Then --data is None where it was not given, for `settle`."""
    default = full if quick is None else None
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data", default=default, metavar="mnist|digits|sprites|PATH",
        help="mnist: 5000 digits of 28x28; digits: 1797 of 8x8; sprites: 4000 drawings of 32x32 in colour; PATH: a "
        "folder of images (searched recursively), or an .npz holding 'images' (else its first array), NxHxW[xC] or "
        "NxCxHxW, uint8 or floats in [0, 1] "
        f"(default: {full}{'' if quick is None else f'; with --quick {quick}'})",
    )  # fmt: skip
    group.add_argument(
        "--image-size", type=positive_int, metavar="N", help="folders: resize and crop to NxN (default: 64)"
    )
    group.add_argument("--grey", action="store_true", help="folders: load as greyscale instead of RGB")


def add_sigma_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """The group is returned because what a script does with beta is its own affair."""
    group = parser.add_argument_group("loss")
    group.add_argument(
        "--sigma", type=sigma_mode, default="optimal", metavar="MODE",
        help="the decoder's standard deviation: one of the modes below (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--min-log-sigma", type=number(), metavar="L",
        help="lower bound of log sigma in the optimal modes (default: -7) and with per-pixel (default: -3)",
    )  # fmt: skip
    return group


def add_sweep_arguments(parser: argparse.ArgumentParser, *, out: Path, minutes: str) -> None:
    """Adds the arguments of a script that trains many models for one picture. Its sizes come from `settle`."""
    group = parser.add_argument_group("run")
    group.add_argument(
        "--quick", action="store_true",
        help=f"a small version of the same experiment, done in two minutes on two CPU cores (the full one: {minutes})",
    )  # fmt: skip
    add_run_arguments(parser, group, out=out)


def add_counts(
    group: argparse._ArgumentGroup, texts: dict[str, str], *, full: dict[str, Any], quick: dict[str, Any]
) -> None:
    """Options that are positive integers, with what each counts; `settle` gives them their value where it is left."""
    for name, text in texts.items():
        group.add_argument(
            f"--{name.replace('_', '-')}", type=positive_int, metavar="N",
            help=f"{text} (default: {full[name]}; --quick: {quick[name]})",
        )  # fmt: skip


def settle(args: argparse.Namespace, *, full: dict[str, Any], quick: dict[str, Any]) -> None:
    """Give the options that were left at None what the full or the quick version of the experiment has."""
    for name, value in (quick if args.quick else full).items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def check_ranks(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Under torchrun the processes talk by gloo."""
    if ranks.count() > 1 and args.device.type != "cpu":
        parser.error(f"under torchrun this script is for CPUs, not {args.device}: add --device cpu")


def add_training_arguments(
    parser: argparse.ArgumentParser, *, epochs: int, batch_size: int, lr: float, out: Path
) -> None:
    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=positive_int, default=epochs, metavar="N", help="(default: %(default)s)")
    group.add_argument(
        "--batch-size", type=positive_int, default=batch_size, metavar="N", help="(default: %(default)s)"
    )
    group.add_argument(
        "--lr", type=number(above=0), default=lr, metavar="LR",
        help="peak learning rate of AdamW: 10%% warm-up, then cosine (default: %(default)s)",
    )  # fmt: skip
    group.add_argument("--compile", action="store_true", help="torch.compile the model and its loss together")
    add_run_arguments(parser, group, out=out)


def add_run_arguments(
    parser: argparse.ArgumentParser, group: argparse._ArgumentGroup | None = None, *, out: Path
) -> None:
    """What every script has. --out and --resume say where a run is kept, and so are no part of what it is."""
    group = group or parser.add_argument_group("run")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of weights, batches and noise; the data's "
                       "split does not depend on it (default: %(default)s)")  # fmt: skip
    group.add_argument("--device", type=device, default="auto", metavar="auto|cpu|cuda|...", help="(default: auto)")
    group.add_argument("--out", type=Path, default=out, metavar="DIR", help="folder of the run (default: %(default)s)")
    group.add_argument(
        "--resume", action="store_true",
        help="continue the run in --out to the result that it would have had without the interruption",
    )  # fmt: skip
