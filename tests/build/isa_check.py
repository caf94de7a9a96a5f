"""Reads a library's machine code: can what is compiled for one instruction set reach instructions of a wider one, and
does an element loop go lane by lane?

For the first, what is followed are calls, jumps and addresses taken, from every function of the instruction set's
namespace and every address that the loader puts into tables (initialisers, virtual functions), but not into a wider
set's namespace: that is where the choice at load time leads. What is exported, as std:: always is, is called by way of
a slot that the loader fills.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

TOOLS = ("objdump", "readelf", "nm")
needs_binutils = pytest.mark.skipif(
    not all(map(shutil.which, TOOLS)), reason=f"needs binutils ({', '.join(TOOLS)}) to read machine code"
)

# What the machine may lack: VEX and EVEX code begins with v or names a mask; AVX-512 alone has zmm, ymm16 and masks.
WIDER = {
    "baseline": re.compile(r"^v(?!err|erw)|%[yz]mm|%k[0-7]"),
    "avx2": re.compile(r"%zmm|%[xy]mm(1[6-9]|2\d|3[01])|%k[0-7]"),
}
_TARGET = re.compile(r"(?:call|j[a-z]+)\s+([0-9a-f]+)|# ([0-9a-f]+)")


def trespassers(library: Path, level: str) -> list[str]:
    """Functions that are reached from a level ("baseline", "avx2") and have an instruction it lacks."""
    functions = _functions(library)
    wider = [f"elbo_{name}" for name in ("avx2", "avx512")[list(WIDER).index(level) :]]
    own = {address for address, (name, _) in functions.items() if f"elbo_{level}" in name}
    assert own, f"{library} has nothing of {level}"
    tables, slots = _relocations(library)
    todo, reached = [*own, *tables], set()
    while todo:
        address = todo.pop()
        address = slots.get(address, address)
        name, instructions = functions.get(address, ("", []))
        if address in reached or any(other in name for other in wider):
            continue
        reached.add(address)
        for instruction in instructions:
            todo += [int(a or b, 16) for a, b in _TARGET.findall(instruction)]
    found = [functions[a] for a in reached if a in functions]
    return [name for name, instructions in found if any(map(WIDER[level].search, instructions))]


# Arithmetic of O(batch), and checks of arguments: all else that is compiled for an instruction set is element loops.
NO_LOOPS = re.compile(r"own_recon_scale|elbo_factors|elbo_finalize|Sigmas|Inputs|LogSum|Aggregate")
_ONE_LANE = re.compile(r"^v?u?comis[sd]")


def lane_by_lane(library: Path, level: str) -> list[str]:
    """Functions with element loops that compare single numbers, as compilers do with vectors that are wider than the
    instruction set's: each lane is moved out, compared and jumped on."""
    own = [(name, code) for name, code in _functions(library).values() if f"elbo_{level}" in name]
    loops = [(name, code) for name, code in own if not NO_LOOPS.search(name)]
    for expected in ("rates", "latent_gradient", "chunk_gradient", "in_parallel"):
        assert any(expected in name for name, _ in loops), f"{library} has no {expected} for {level}"
    return [name for name, code in loops if any(map(_ONE_LANE.search, code))]


def _functions(library: Path) -> dict[int, tuple[str, list[str]]]:
    """Address -> mangled name, instructions without the names that objdump adds."""
    functions: dict[int, tuple[str, list[str]]] = {}
    instructions: list[str] = []
    for line in _run("objdump", "-d", "-w", "--no-show-raw-insn", str(library)):
        if start := re.match(r"([0-9a-f]{16}) <(.*)>:$", line):
            instructions = []
            functions[int(start[1], 16)] = (start[2], instructions)
        elif ":\t" in line:
            instructions.append(re.sub("<.*>", "", line.split(":\t", 1)[1]))
    return functions


def _relocations(library: Path) -> tuple[list[int], dict[int, int]]:
    """Functions whose addresses lie in tables, and slot -> function for those that are called by way of one."""
    tables, slots = [], {}
    for line in _run("readelf", "-rW", str(library)):
        fields = line.split()  # offset, info, type, the symbol's value (0: another library's), its name
        if "_RELATIVE" in line:
            tables.append(int(fields[-1], 16))
        elif "_JUMP_SLO" in line or "_GLOB_DAT" in line:
            slots[int(fields[0], 16)] = int(fields[3], 16)
        elif "R_X86_64_64" in line:
            tables.append(int(fields[3], 16))
    return tables, slots


def _run(*command: str) -> list[str]:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
