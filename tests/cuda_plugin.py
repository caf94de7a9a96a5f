"""Runs the tests on the CUDA kernels, as CPU code: `PYTHONPATH=tests pytest -p cuda_plugin [--cuda-schedule random:3]`

The kernels stand behind the operators in place of the C++ ones, so that vmap, torch.compile and the tests of the
operators run on them too. Only what runs on a backend is kept, and what is about the CUDA code: the minutes that it
takes are spent in this run alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import cuda_shim
import pytest

from fused_elbo import BackendUnavailable, backends
from fused_elbo.operators import registry


def pytest_addoption(parser: pytest.Parser) -> None:
    names = "|".join(cuda_shim.SCHEDULES)
    parser.addoption("--cuda-schedule", default="ascending", help=f"{names}, or random:SEED (default ascending)")


def kept_folder(config: pytest.Config) -> Path:
    """Where what is compiled stays for the next run, and for all processes of this one. Not where pytest's own cache
    would put it, which each of the processes clears for --cache-clear."""
    return config.rootpath / ".pytest_cache" / "cuda_shim"


def pytest_configure(config: pytest.Config) -> None:
    shim = cuda_shim.Shim(cuda_shim.build(kept_folder(config)))
    schedule = config.getoption("--cuda-schedule")
    shim.schedule(schedule)
    cuda = backends.cuda
    cuda.library.loaded, cuda.device = f"the shim in {cuda_shim.HERE.name}, {schedule}", "cpu"
    cuda.require()
    backends.cpp.library.failure = BackendUnavailable("The CUDA kernels have the place of the C++ ones in this run.")
    for operator in cuda.OPERATORS:
        registry.implement(operator.name, registry.find(operator.name, cuda.NAMESPACE), "CPU")
    backends.dispatched["cpu"] = "cuda"


@pytest.hookimpl(wrapper=True)  # before all others: tiers.py then counts what it leaves out of this run
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Iterator[None]:
    def kept(item: pytest.Item) -> bool:
        parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        return parameters.get("backend") == "cuda" or item.get_closest_marker("cuda") is not None

    config.hook.pytest_deselected(items=[i for i in items if not kept(i)])
    items[:] = [i for i in items if kept(i)]
    return (yield)
