"""What can be read from the machine code of a kernel: NVIDIA's SASS, and AMD's assembly."""

from __future__ import annotations

import re
from dataclasses import dataclass

SM_REGISTERS, SM_THREADS = 65536, 2048  # of sm_80, sm_90 and sm_100 alike
WIDE = 16  # bytes


@dataclass(frozen=True)
class Code:
    """What can be read from a kernel's assembly."""

    registers: int
    spill_bytes: int
    instructions: int
    widths: list[int]  # of every global access, in bytes
    in_flight: int | None  # bytes of a thread

    @property
    def wide(self) -> list[int]:
        return [w for w in self.widths if w >= WIDE]


def sass_width(opcode: str) -> int:
    """LDG.E.128 -> 16, LDG.E.U16 -> 2, LDG.E -> 4."""
    bits = [int(m) for m in re.findall(r"\.[US]?(8|16|64|128|256)\b", opcode)]
    return bits[-1] // 8 if bits else 4


def read_sass(sass: str, log: str) -> Code:
    lines = [line.partition("\t")[2] for line in sass.splitlines()]
    instructions = [line for line in lines if line and not line.startswith("NOP")]
    widths, pending, asked, most = [], set(), 0, 0
    for instruction in instructions:
        access = re.search(r"\b(LDG|STG)[.\w]* ", instruction)
        loads = re.search(r"\bLDG[.\w]* R(\d+)", instruction)
        used = {int(r) for r in re.findall(r"\bR(\d+)", instruction)}
        if access:
            widths.append(sass_width(access[0].strip()))
        if not loads and used & pending:
            pending, asked = set(), 0
        if loads:
            first, width = int(loads[1]), widths[-1]
            pending |= set(range(first, first + max(1, width // 4)))
            asked += width
            most = max(most, asked)
    registers = int(re.findall(r"Used (\d+) registers", log)[0])
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", log))
    return Code(registers, spills, len(instructions), widths, most)


def read_amdgcn(assembly: str) -> Code:
    instructions = re.findall(r"^\t([a-z]\w+)\b(?!:)", assembly, re.MULTILINE)
    widths = []
    for name in instructions:
        if access := re.match(r"(?:global|buffer|flat)_(?:load|store)_[us]?(byte|short|dword)(?:x(\d))?", name):
            widths.append({"byte": 1, "short": 2, "dword": 4}[access[1]] * int(access[2] or 1))

    def entry(name: str) -> int:
        return int(re.findall(rf"^ *\.{name}: *(\d+)", assembly, re.MULTILINE)[0])

    return Code(entry("vgpr_count"), entry("private_segment_fixed_size"), len(instructions), widths, None)


def threads_per_sm(registers: int, num_warps: int) -> int:
    """Registers are given to warps in units of 8 a thread; no kernel here has the shared memory to be limited by it."""
    threads = 32 * num_warps
    return threads * min(SM_REGISTERS // (threads * -(-registers // 8) * 8), SM_THREADS // threads)
