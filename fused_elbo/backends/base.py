"""What every backend tells about itself."""

from __future__ import annotations

from dataclasses import dataclass


class BackendUnavailable(RuntimeError):
    """A backend cannot serve here. `reason` says why, `remedy` what the user can do about it."""

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(f"{reason} {remedy}".strip())
        self.reason = reason
        self.remedy = remedy


@dataclass(frozen=True)
class Status:
    """One row of the doctor's table."""

    name: str
    ready: bool
    detail: str  # where it comes from when ready, why not otherwise
    remedy: str = ""  # how to mend it
