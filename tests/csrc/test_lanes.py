"""The C++ backend's element loops on every instruction set and compiler here: right conversions, and the same bits.

lanes_check.cpp does the work. What this machine has not is left out: a compiler is looked for on the PATH, and
for aarch64 qemu-user beside it.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from instruction_sets import capabilities

from fused_elbo import csrc
from fused_elbo.build import spec as build_spec

SOURCE = Path(__file__).with_name("lanes_check.cpp")
INCLUDES = (f"-I{csrc.ROOT}", "-isystem", str(Path(torch.__file__).parent / "include"))
NAMES = dict(zip(("default", "avx2", "avx512"), build_spec.INSTRUCTION_SETS, strict=True))
CROSS, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


def output(folder: Path, compiler: str, *flags: str, run: tuple[str, ...] = ()) -> list[str]:
    program = folder / "lanes_check"
    command = [compiler, *build_spec.cpu_spec(("baseline",)).cflags, *flags, *INCLUDES, str(SOURCE), "-o", str(program)]
    subprocess.run(command, check=True)
    done = subprocess.run([*run, str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What the narrowest instruction set gives."""
    compiler = next((name for name in ("g++", "clang++") if shutil.which(name)), None)
    if compiler is None:
        pytest.skip("neither g++ nor clang++ is here")
    lines = output(tmp_path_factory.mktemp("narrowest"), compiler)
    assert len(lines) == 15  # of three dtypes: data of both likelihoods; latents, with a prior, and in a range
    assert len({word for line in lines for word in line.split()[-2:]}) == 30  # none of which is another's
    return lines


@pytest.mark.parametrize("compiler", ["g++", "clang++"])
@pytest.mark.parametrize("capability", NAMES)
def test_every_instruction_set_and_compiler(
    compiler: str, capability: str, expected: list[str], tmp_path: Path
) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"there is no {compiler}")
    if platform.machine() != "x86_64" and capability != "default":
        pytest.skip("an instruction set of x86")
    if capability not in capabilities():
        pytest.skip(f"this processor has no {capability}")
    assert output(tmp_path, compiler, *build_spec.INSTRUCTION_SETS[NAMES[capability]]) == expected


def test_an_emulated_arm_processor(expected: list[str], tmp_path: Path) -> None:
    if missing := [name for name in (CROSS, EMULATOR) if shutil.which(name) is None]:
        pytest.skip(f"there is no {' and no '.join(missing)}")
    assert output(tmp_path, CROSS, "-static", run=(EMULATOR,)) == expected
