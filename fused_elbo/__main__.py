"""The doctor, `python -m fused_elbo`: what is installed and the state of every backend, to paste in a bug report."""

from __future__ import annotations

import io
import platform
import sys
from importlib import metadata

import torch

import fused_elbo
from fused_elbo import build
from fused_elbo.backends import statuses
from fused_elbo.backends.base import Status
from fused_elbo.errors import BackendUnavailable

CPU_BACKENDS = ("cpp", "reference")  # in the order in which they are preferred
GPU_BACKENDS = ("triton", "cuda", "reference")


def main() -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path may have what the terminal's encoding lacks
    print("\n".join(f"{name:12}{value}" for name, value in facts().items()))
    rows = statuses()
    print("\n" + "\n".join(table(rows)) + "\n")
    if torch.cuda.is_available():
        print(f"GPU tensors are served by: {served_by(rows, GPU_BACKENDS)}")
    else:
        print("GPU tensors: PyTorch sees no GPU here")
    print(f"CPU tensors are served by: {served_by(rows, CPU_BACKENDS)}")


def facts() -> dict[str, str]:
    return {
        "fused_elbo": fused_elbo.__version__,
        "torch": torch.__version__,
        "triton": installed_version("triton"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        "cache": cache_dir(),
    }


def installed_version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def cache_dir() -> str:
    try:
        return str(build.Settings.read().cache_dir)
    except BackendUnavailable as error:
        return str(error)


def table(rows: list[Status]) -> list[str]:
    """backend, state, where it comes from or why not; and how to mend it on a line of its own."""
    lines = []
    for row in rows:
        lines.append(f"{row.name:12}{'ready' if row.ready else 'unavailable':13}{row.detail}")
        if row.remedy:
            lines.append(f"{'':25}{row.remedy}")
    return lines


def served_by(rows: list[Status], preferred: tuple[str, ...]) -> str:
    ready = {row.name for row in rows if row.ready}
    return next((name for name in preferred if name in ready), "none")


if __name__ == "__main__":
    main()
