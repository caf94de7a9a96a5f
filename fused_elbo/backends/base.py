"""What every backend tells about itself."""

from __future__ import annotations

from dataclasses import dataclass

# Which backend's kernels the dispatcher has, or will have, for a type of device; `cuda.load` may change it.
dispatched = {"cpu": "cpp", "cuda": "triton"}


@dataclass(frozen=True)
class Status:
    """One row of the doctor's table."""

    name: str
    ready: bool
    detail: str  # where it comes from when ready, why not otherwise
    remedy: str = ""  # how to mend it
