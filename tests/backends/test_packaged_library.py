"""The libraries of a wheel, in place of those that are built: preferred where they load, no hindrance where not."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from workshop import Workshop, needs_compiler

from fused_elbo import build as builder
from fused_elbo.backends import cpp, library
from fused_elbo.errors import BackendUnavailable


@pytest.fixture
def packaged(shop: Workshop, monkeypatch: pytest.MonkeyPatch, unloaded: None) -> Path:
    """What stands where the wheel's library would: a tiny one, beside the tiny one that would be built."""
    folder = shop.folder / "lib"
    folder.mkdir()
    monkeypatch.setattr(library, "PACKAGED", folder)
    monkeypatch.setattr(builder, "cpu_spec", lambda: shop.spec)
    monkeypatch.setattr(cpp.library, "chosen", lambda path: "told")
    monkeypatch.setattr(cpp.library, "probe", lambda: None)  # the tiny ones have no pool
    (folder / "fused_elbo_cpu.txt").write_text("baseline\n")
    return folder / "fused_elbo_cpu.so"


def build_into(path: Path, shop: Workshop) -> None:
    path.write_bytes(builder.build(replace(shop.spec, name="packaged")).library.read_bytes())
    shop.log.unlink()


@needs_compiler
def test_it_is_preferred(shop: Workshop, packaged: Path) -> None:
    build_into(packaged, shop)
    assert cpp.status().detail == f"{packaged} (packaged)"
    cpp.load()
    assert str(packaged) in torch.ops.loaded_libraries
    assert cpp.status().detail == f"{packaged} (told)"
    assert not shop.calls()


@needs_compiler
def test_one_for_other_machines_is_left_alone(shop: Workshop, packaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packaged.write_text("no library: nobody may try to load it")
    monkeypatch.setattr(cpp.library, "fits", lambda label: label != "baseline")
    cpp.load()
    assert str(builder.build(shop.spec).library) in cpp.status().detail


@needs_compiler
def test_one_that_does_not_load_is_replaced_by_one_that_is_built(shop: Workshop, packaged: Path) -> None:
    packaged.write_text("no library")
    cpp.load()
    assert str(builder.build(shop.spec).library) in cpp.status().detail


def test_where_none_can_be_built_either_both_reasons_are_told(
    shop: Workshop, packaged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packaged.write_text("no library")
    monkeypatch.setenv("CXX", "no-such-g++")
    with pytest.raises(BackendUnavailable) as caught:
        cpp.load()
    assert re.search(r"fused_elbo_cpu\.so does not load: .*(header|short)", caught.value.reason)
    assert "no C++ compiler was found (CXX is no-such-g++)" in caught.value.reason
    assert "Install g++" in caught.value.remedy
