"""The CUDA kernels as CPU code, thread for thread: under several schedules, under AddressSanitizer, and with faults.

The faults (cuda_mutants.py) are compiled into one library, in which a number says which one runs, and
cuda_check.py must notice each. Not here, because the shim cannot tell: a missing __threadfence, and accesses out of
bounds that change no value (AddressSanitizer sees them).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import cuda_shim
import pytest
from cuda_mutants import MUTANTS, OUT_OF_BOUNDS, SMALL
from mutants import Mutant, copy, switch_in

if "cuda_plugin" not in sys.modules:
    pytest.skip("minutes of compiling, which `make test-cuda` takes", allow_module_level=True)
from cuda_plugin import kept_folder

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(cuda_shim.compiler() is None, reason="there is no C++ compiler"),
]
PROGRAM = Path(__file__).with_name("cuda_check.py")

Check = Callable[..., "str | None"]  # of a mutant's name, if any, and what is known to notice it: the fault


@contextmanager
def checked(library: Path, numbers: Mapping[str, int], *schedules: str, **environment: str) -> Iterator[Check]:
    """A process that has the library and the cases."""
    command = [sys.executable, str(PROGRAM), str(library), *schedules]
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    path = os.pathsep.join(filter(None, [str(PROGRAM.parents[1]), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path} | environment
    with subprocess.Popen(command, env=environment, text=True, **streams) as process:

        def check(mutant: str | None = None, first: tuple[str, str] | None = None) -> str | None:
            print(json.dumps([numbers[mutant] if mutant else 0, first]), file=process.stdin, flush=True)
            answer = process.stdout.readline()
            assert answer, f"{' '.join(command)} has ended"
            fault, end = json.loads(answer)
            assert end is None, end
            return fault

        yield check


def with_mutants(
    mutants: Mapping[str, Mutant], config: pytest.Config, folder: Path, *flags: str
) -> tuple[Path, dict[str, int]]:
    """The library with all of them, in few and small chunks, and their numbers."""
    csrc = copy(cuda_shim.CSRC, folder / "csrc", *SMALL)
    numbers = switch_in(csrc, mutants, "shim::mutant")
    return cuda_shim.build(kept_folder(config), csrc, ("-include", "cuda_runtime.h", *flags)), numbers


@pytest.fixture(scope="module")
def check(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Check]:
    with checked(*with_mutants(MUTANTS, pytestconfig, tmp_path_factory.mktemp("cuda"))) as check:
        yield check


def test_the_kernels_as_they_are_pass(pytestconfig: pytest.Config) -> None:
    with checked(cuda_shim.build(kept_folder(pytestconfig)), {}) as check:
        assert check() is None


def test_many_chunks(check: Check) -> None:
    assert check() is None


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_noticed(name: str, check: Check) -> None:
    fault = check(name, MUTANTS[name].killer)
    assert fault is not None, "nothing was noticed"
    # A library that does not even run would pass for a noticed fault; a launch that fails says why.
    assert (
        "AssertionError" in fault
        or "threads wait at a barrier" in fault
        or "more shared memory" in fault
        or "not aligned" in fault
    )


@pytest.fixture(scope="module")
def sanitized(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Check]:
    """This runs under AddressSanitizer, with one schedule: a thread's addresses do not depend on who is next."""
    asked = [cuda_shim.compiler() or "", "-print-file-name=libasan.so"]
    runtime = Path(subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip())
    if not runtime.is_absolute():
        pytest.skip("the compiler has no AddressSanitizer")
    environment = {"LD_PRELOAD": str(runtime), "ASAN_OPTIONS": "detect_leaks=0"}
    built = with_mutants(OUT_OF_BOUNDS, pytestconfig, tmp_path_factory.mktemp("asan"), "-fsanitize=address")
    with checked(*built, "ascending", **environment) as check:
        yield check


@pytest.mark.xdist_group("sanitized")
def test_no_access_out_of_bounds(sanitized: Check) -> None:
    assert sanitized() is None


@pytest.mark.xdist_group("sanitized")
@pytest.mark.parametrize("name", OUT_OF_BOUNDS)
def test_an_access_out_of_bounds_is_seen(name: str, sanitized: Check) -> None:
    with pytest.raises(AssertionError, match="heap-buffer-overflow"):
        sanitized(name, OUT_OF_BOUNDS[name].killer)
