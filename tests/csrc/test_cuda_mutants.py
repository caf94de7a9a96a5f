"""The places of the CUDA kernels that cuda_mutants.py changes are there: read, not compiled, as `make check` does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import cuda_shim
import pytest
from cuda_mutants import MUTANTS, OUT_OF_BOUNDS, SMALL
from mutants import Mutant, copy, switch_in


@pytest.mark.parametrize("mutants", [MUTANTS, OUT_OF_BOUNDS], ids=["values", "bounds"])
def test_the_places_of_mutants_are_there(mutants: Mapping[str, Mutant], tmp_path: Path) -> None:
    csrc = copy(cuda_shim.CSRC, tmp_path / "csrc", *SMALL)
    files = [path for path in csrc.rglob("*.*") if path.is_file()]
    before = {path: path.read_text(encoding="utf-8") for path in files}
    numbers = switch_in(csrc, mutants, "mutant")
    changed = {path.relative_to(csrc).as_posix() for path in files if path.read_text(encoding="utf-8") != before[path]}
    assert len(numbers) == len(mutants)
    assert changed == {mutant.file for mutant in mutants.values()}
