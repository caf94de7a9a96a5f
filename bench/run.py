"""How long a training step of the loss takes, and what memory, beside the code that it replaces and beside the limit.

    python bench/run.py                                     # everything, into runs/bench
    python bench/run.py --cases '128x3x64x64*' 1x1 --providers cpp one_liner limit
    python bench/run.py --quick                             # three small cases, a minute
    python bench/run.py --list

A step is forward and backward of the loss alone, to the gradients of recon, mu and logvar. Every provider's loss and
gradients are compared with fp64 before it is timed; one that differs is not, and the exit status is 1. measure.py says
what the numbers mean, timing.py when a ratio is refused ("?"). Writes results.json, results.csv and the plots into
--out; bench/report.py makes pages of them.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import measure
import peak
import plots
import providers
import record
import timing
import torch
import workloads

ROUNDS, QUICK_ROUNDS = 30, 5
INDUCTOR_CACHE = "TORCHINDUCTOR_CACHE_DIR"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--cases", nargs="+", metavar="NAME", help="names or globs (default: all)")
    add("--providers", nargs="+", metavar="NAME", help="names (default: all that serve a case)")
    add("--out", type=Path, default=Path("runs/bench"), metavar="DIR", help="folder of the results (runs/bench)")
    add("--quick", action="store_true", help=f"{', '.join(workloads.QUICK)}; nothing compiled, {QUICK_ROUNDS} rounds")
    add("--threads", type=int, metavar="N", help="threads for PyTorch (default: its own choice)")
    add("--rounds", type=int, metavar="N", help=f"timed rounds (default: {ROUNDS})")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--train-step", action="store_true", help="also what share of a training step of examples/train_vae.py it is")
    add("--list", action="store_true", help="print the cases and providers, and stop")
    args = parser.parse_args(arguments)
    known = {provider.name for provider in providers.ALL}
    if unknown := set(args.providers or ()) - known:
        parser.error(f"--providers: {', '.join(sorted(unknown))}: unknown; there are {', '.join(sorted(known))}")
    for name in ("threads", "rounds"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name}: at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: PyTorch sees no GPU here")
    args.rounds = args.rounds or (QUICK_ROUNDS if args.quick else ROUNDS)
    args.cases = args.cases or (workloads.QUICK if args.quick else ("*",))
    try:
        args.cases = workloads.chosen(args.cases, args.device)
    except ValueError as error:
        parser.error(f"--cases: {error}")
    return args


def serving(case: workloads.Case, args: argparse.Namespace) -> list[providers.Provider]:
    found = providers.chosen(args.providers, case)
    return [p for p in found if not (args.quick and p.compiled)]


def listing(args: argparse.Namespace) -> list[str]:
    width = max(len(case.name) for case in args.cases)
    return [f"{case.name:{width}}  {' '.join(p.name for p in serving(case, args))}" for case in args.cases]


def add_peaks(case: workloads.Case, records: list[record.Record]) -> None:
    if case.device == "cpu" and not peak.available():
        return
    for own in records:
        if own["kind"] == "limit":  # whose gradients are there before
            continue
        own["peak_bytes"] = peak.in_a_process(case, own["provider"], torch.get_num_threads())


@contextlib.contextmanager
def cold_compiler() -> Iterator[None]:
    """torch.compile finds nothing from before, or a second run would not tell what a first call takes; unless the user
    has chosen the folder of its cache."""
    if INDUCTOR_CACHE in os.environ:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="fused_elbo_bench_", ignore_cleanup_errors=True) as folder:
        os.environ[INDUCTOR_CACHE] = folder
        try:
            yield
        finally:
            del os.environ[INDUCTOR_CACHE]


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    if args.list:
        print("\n".join(listing(args)))
        return 0
    if args.threads:
        torch.set_num_threads(args.threads)
    with cold_compiler():
        faults = measured(args)
    for fault in faults:
        print(f"NOT TIMED: {fault}", file=sys.stderr)
    return 1 if faults else 0


def measured(args: argparse.Namespace) -> list[str]:
    """Everything that was asked for, written to --out; what is returned are the faults of providers."""
    result: record.Record = {
        "format": record.FORMAT,
        "machine": record.machine(args.device),
        "versions": record.versions(),
        "flags": record.flags(),
        "settings": {"threads": torch.get_num_threads(), "rounds": args.rounds, "quick": args.quick},
        "cases": {},
        "results": [],
    }
    faults: list[str] = []
    for case in args.cases:
        patience = timing.PATIENCE / 10 if args.quick else timing.PATIENCE
        records, wrong = measure.measure(case, serving(case, args), args.rounds, patience)
        if case.name in workloads.PEAKS:
            add_peaks(case, records)
        faults += wrong
        result["cases"][case.name] = record.described(case)
        result["results"] += records
        print("\n".join(record.console(case.name, result["cases"][case.name], records)), flush=True)
        for fault in wrong:
            print(f"  NOT TIMED: {fault}", flush=True)
        print()
        write(result, args.out)  # after every case, so that an interrupted run leaves something
    if args.train_step:
        import train_step  # which the examples' requirements come with

        result["train_step"] = train_step.measure(args.rounds)
        print("\n".join(train_step.console(result["train_step"])))
        write(result, args.out)
    plots.draw(result, args.out)
    print(f"results.json, results.csv and plots are in {args.out}")
    return faults


def write(result: record.Record, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    record.write_json(result, out / "results.json")
    record.write_csv(result, out / "results.csv")


if __name__ == "__main__":
    sys.exit(main())
