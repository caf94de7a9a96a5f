"""Runs the tests on another device: `PYTHONPATH=tests pytest -p device_plugin --device cuda tests/loss/test_elbo.py …`

Tests say nothing of a device, so their tensors are made on the default one, which is all that has to be set. What is
promised of the C++ backend is promised of CPU tensors, and deselected.
"""

from __future__ import annotations

import os

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where the tests make their tensors (default cpu)")


def pytest_configure(config: pytest.Config) -> None:
    # The tests ask PyTorch for deterministic algorithms, and cuBLAS has them only with a workspace of fixed size.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_default_device(config.getoption("--device"))


def pytest_unconfigure(config: pytest.Config) -> None:
    torch.set_default_device(None)


def serves_cpu_only(item: pytest.Item) -> bool:
    parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    return parameters.get("backend") == "cpp" or "cpp" in getattr(item, "fixturenames", ())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.device(config.getoption("--device")).type == "cpu":
        return
    dropped = [item for item in items if serves_cpu_only(item)]
    config.hook.pytest_deselected(items=dropped)
    items[:] = [item for item in items if item not in dropped]
