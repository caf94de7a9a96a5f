"""Reads a library's machine code: can what is compiled for one instruction set reach instructions of a wider one?

Followed are calls, jumps and addresses taken, from every function of the instruction set's namespace and every address
that the loader puts into tables (initialisers, virtual functions), but not into a wider set's namespace: that is where
the choice at load time leads.
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
    todo, reached = [*own, *_tables(library)], set()
    while todo:
        address = todo.pop()
        name, instructions = functions.get(address, ("", []))
        if address in reached or any(other in name for other in wider):
            continue
        reached.add(address)
        for instruction in instructions:
            todo += [int(a or b, 16) for a, b in _TARGET.findall(instruction)]
    found = [functions[a] for a in reached if a in functions]
    return [name for name, instructions in found if any(map(WIDER[level].search, instructions))]


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


def _tables(library: Path) -> list[int]:
    lines = _run("readelf", "-rW", str(library))
    return [int(line.split()[-1], 16) for line in lines if "_RELATIVE" in line]


def _run(*command: str) -> list[str]:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
