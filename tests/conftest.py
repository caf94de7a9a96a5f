"""Every numerical test runs on every backend that is present, and on memory poisoned with NaN."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import ptx_structs
import pytest
import tiers
import torch
from tiers import (  # noqa: F401  pytest finds its hooks by their names
    pytest_addoption,
    pytest_configure,
    pytest_ignore_collect,
    pytest_sessionfinish,
    pytest_terminal_summary,
    pytest_testnodedown,
)
from workshop import Workshop

import fused_elbo
from fused_elbo import BackendUnavailable, backends
from fused_elbo.operators import aggregate, elbo, levels


def pytest_collection(session: pytest.Session) -> None:
    """Where Triton runs on CPU tensors, its kernels stand behind the operators in place of the C++ ones, so that vmap,
    torch.compile and the tests of the operators run on them too."""
    if (executor := sys.modules.get("triton_emu")) is not None:
        ptx_structs.accept_structs(executor)
    if backends.triton.runs_on_cpu():
        backends.cpp.library.failure = BackendUnavailable(
            "Triton's kernels have the place of the C++ ones in this run."
        )
        elbo.register(backends.triton.operators(), "CPU")
        levels.register(backends.triton.levels_operators(), "CPU")
        aggregate.register(backends.triton.aggregate_operators(), "CPU")
        backends.dispatched["cpu"] = "triton"


def present() -> list[str]:
    """The backends for tensors of the default device. Asked for when tests are collected, since a plugin may bring
    Triton a driver for the CPU. Where Triton runs on CPU tensors, slowly, the run is about Triton."""
    if backends.triton.runs_on_cpu():
        return ["triton"]
    device = torch.get_default_device().type
    serves = {"triton": "cuda", "cuda": backends.cuda.device, "cpp": "cpu", "reference": device}
    return [status.name for status in backends.statuses() if status.ready and serves[status.name] == device]


def pytest_report_collectionfinish() -> list[str]:
    return [f"backend {s.name}: {'ready, ' if s.ready else 'not here: '}{s.detail}" for s in backends.statuses()]


@pytest.hookimpl(tryfirst=True)  # pytest-xdist's own, in a worker, then finds the groups that tiers.py makes
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where Triton runs on CPU tensors, only what runs on a backend, or is about Triton, is worth its time."""
    if backends.triton.runs_on_cpu():
        keep = [i for i in items if i.get_closest_marker("triton") or "backend" in getattr(i, "fixturenames", ())]
        config.hook.pytest_deselected(items=[i for i in items if i not in keep])
        items[:] = keep
    tiers.select(config, items)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", present(), indirect=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with fused_elbo.backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """torch.empty returns NaN in deterministic mode, so an element that a kernel forgets to write is seen."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    return Workshop(tmp_path, monkeypatch)


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The C++ and CUDA backends as in a process that has not asked for them yet."""
    for library in (backends.cpp.library, backends.cuda.library):
        monkeypatch.setattr(library, "loaded", None)
        monkeypatch.setattr(library, "path", None)
        monkeypatch.setattr(library, "failure", None)


@pytest.fixture
def cpp() -> Iterator[None]:
    """Forces the C++ backend, for what is promised of it alone."""
    if "cpp" not in present():
        pytest.skip("the C++ backend is not tested here; the report's header says why")
    with fused_elbo.backend("cpp"):
        yield
