"""A compiled library that registers operators: packaged or built here, loaded once, a failure remembered."""

from __future__ import annotations

import threading
from pathlib import Path

import torch

from fused_elbo import build as builder
from fused_elbo.backends.base import Status
from fused_elbo.errors import BackendUnavailable, sentence, unavailable

# Where a wheel made by `make wheel` has its libraries. A pure wheel, an sdist and a checkout have none.
PACKAGED = Path(__file__).resolve().parent.parent / "lib"


class Library:
    """What one backend's operators are loaded from. A backend says what is its own by overriding what is below `name`.

    `loaded` says where the operators come from, once they are there, and `failure` why they are not.
    """

    name: str  # the backend's
    stem: str  # the library's, as in its spec

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.loaded: str | None = None
        self.path: Path | None = None  # of what is loaded
        self.failure: BackendUnavailable | None = None

    def spec(self) -> builder.BuildSpec:
        """What is built where no packaged library can serve."""
        raise NotImplementedError

    def check(self) -> None:
        """Raise BackendUnavailable where no library can be of use; asked before anything is built."""

    def fits(self, label: str) -> bool:
        """Whether a packaged library can serve here, by the label of its spec."""
        return True

    def chosen(self, path: Path) -> str:
        """What a packaged library, now loaded, chose for this machine, or that it is packaged."""
        return "packaged"

    def probe(self) -> None:
        """Raise BackendUnavailable where the operators, now loaded, do not run."""

    def load(self) -> None:
        """Registers the operators with PyTorch's dispatcher, once; the first call ever may compile them.

        Raises BackendUnavailable where that cannot be done, and the same again on every later call, without a new
        attempt.
        """
        with self._lock:
            if self.loaded is None and self.failure is None:
                try:
                    loaded = self._load()
                    self.probe()
                    self.loaded = loaded
                except Exception as error:  # of any kind: the loss goes on without the library
                    self.failure = unavailable(error)
        if self.failure is not None:
            raise unavailable(self.failure)

    def status(self, build: bool = False) -> Status:
        """Whether the backend can serve, and if not, why. Compiles nothing unless told to."""
        try:
            if build or self.failure is not None:
                self.load()
            if self.loaded is not None:
                return Status(self.name, True, self.loaded)
            self.check()
            if packaged := self._packaged():
                return Status(self.name, True, f"{packaged} (packaged)")
            target = builder.resolve(self.spec())
        except Exception as error:
            found = unavailable(error)
            return Status(self.name, False, found.reason, found.remedy)
        if not target.is_built():
            return Status(self.name, False, "not built yet.", "It is built at first use, or now: python -m fused_elbo")
        return Status(self.name, True, _origin(target))

    def _load(self) -> str:
        self.check()
        packaged, refusal = self._packaged(), ""
        if packaged:
            try:
                torch.ops.load_library(packaged)
                self.path = packaged
                return f"{packaged} ({self.chosen(packaged)})"
            except OSError as error:  # an older glibc or torch than it was made for; one that is built here may do
                refusal = f"{packaged} does not load: {error.__cause__ or error}; and to build another, "
        try:
            target = builder.build(self.spec())
        except BackendUnavailable as error:
            if not refusal:
                raise
            raise BackendUnavailable(refusal + error.reason, error.remedy) from error
        try:
            torch.ops.load_library(target.library)
        except OSError as error:
            raise BackendUnavailable(
                f"{target.library} does not load: {sentence(error.__cause__ or error)}",
                "Delete its folder to have it built anew; where the disk is mounted noexec, set FUSED_ELBO_CACHE_DIR.",
            ) from error
        self.path = target.library
        return _origin(target)

    def _packaged(self) -> Path | None:
        path = PACKAGED / f"{self.stem}.so"
        label = path.with_suffix(".txt")  # beside it
        return path if path.exists() and self.fits(label.read_text(encoding="utf-8").strip()) else None


def _origin(target: builder.Target) -> str:
    return f"{target.library} ({target.spec.label}; {target.compiler or 'its compiler is gone'})"
