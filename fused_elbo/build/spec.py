"""What the compiled libraries are made of, as data: sources, flags, and what tells one cached library from another.

    cpu_spec()     the CPU library for this machine's instruction set; cpu_spec(ISAS) for one that chooses when loaded
    cuda_spec()    the CUDA library for the GPUs that are visible, or for TORCH_CUDA_ARCH_LIST

Both are written against LibTorch's stable ABI (torch 2.11 and newer) and hold no symbol of Python's: one binary serves
every Python and every torch from there on. Nothing here runs a compiler; `build.build(spec)` does.
"""

from __future__ import annotations

import platform
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import csrc
from ..errors import BackendUnavailable
from .tools import Settings

_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512")

# By PyTorch's names for them, from the narrowest to the widest: `_isas` counts on the order.
INSTRUCTION_SETS = {"baseline": (), "AVX2": _AVX2, "AVX512": _AVX2 + _AVX512}
ISAS = tuple(INSTRUCTION_SETS) if platform.machine() in ("x86_64", "AMD64") else ("baseline",)

_STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # the headers then offer what torch 2.11 has, and no more
_CXX17 = "-std=c++17"  # all that the stable headers need, and what the oldest compilers offer


@dataclass(frozen=True)
class Part:
    """Sources compiled with flags of their own; one source may be in several parts."""

    name: str  # of the folder that its objects lie in
    sources: tuple[str, ...]  # relative to the spec's root
    cflags: tuple[str, ...] = ()


@dataclass(frozen=True)
class BuildSpec:
    """What a library is made of, and with which flags: nothing of the machine that builds it, but its `root`."""

    name: str
    parts: tuple[Part, ...]  # linked in this order
    cflags: tuple[str, ...] = ()
    ldflags: tuple[str, ...] = ()
    label: str = "baseline"  # which processors it is for, in a word that can be part of a folder's name
    language: str = "C++"  # or "CUDA"
    root: Path = csrc.ROOT


# ---------------------------------------------------------------------------------------------------------------- CPU


def instruction_set() -> str:
    """The widest one that PyTorch itself uses on this CPU."""
    capability = torch.backends.cpu.get_cpu_capability()
    return capability if capability in INSTRUCTION_SETS else "baseline"


def cpu_spec(isas: tuple[str, ...] = ()) -> BuildSpec:
    """The CPU library, for this machine's instruction set, or for several of INSTRUCTION_SETS.

    With several, csrc/cpu/library.cpp chooses when it is loaded. At first use the machine is known, and one instruction
    set is compiled: all three take three times as long.
    """
    isas = isas or (instruction_set(),)
    return BuildSpec(
        name="fused_elbo_cpu",
        parts=_isas(isas),
        cflags=(
            "-O3",
            _CXX17,
            "-fPIC",
            "-fvisibility=hidden",
            "-ffp-contract=off",  # a fused multiply-add rounds once: instruction sets would differ in the last bit
            _STABLE_ABI,
        ),
        # libtorch_cpu brings its own OpenMP runtime; a second one in the process would fight it for the cores.
        ldflags=("-undefined", "dynamic_lookup") if sys.platform == "darwin" else ("-ltorch_cpu",),
        label="+".join(isas).lower(),
    )


def _isas(isas: tuple[str, ...]) -> tuple[Part, ...]:
    """The sources once for each instruction set, in a namespace of its own, and once what serves them all.

    The sources say `namespace elbo`, which the preprocessor renames: else the linker would take elbo::f<float> of one
    instruction set for all of them. What they use of std:: and torch:: keeps its name, and of several copies of an
    inline function the linker keeps the first: therefore from the narrowest instruction set to the widest. What an
    object uses is then its own copy or that of a narrower one.
    """
    names = [isa.lower() for isa in isas]
    once = ("cpu/library.cpp", "cpu/memory.cpp")
    sources = tuple(source for source in _sources("cpu/*.cpp") if source not in once)
    table = f"-DELBO_ISAS={' '.join(f'ISA({name})' for name in names)}"
    return (
        Part("any", once, (table,)),
        *(
            Part(name, sources, (f"-Delbo=elbo_{name}", *INSTRUCTION_SETS[isa]))
            for name, isa in zip(names, isas, strict=True)
        ),
    )


def _sources(pattern: str) -> tuple[str, ...]:
    return tuple(sorted(path.relative_to(csrc.ROOT).as_posix() for path in csrc.ROOT.glob(pattern)))


# --------------------------------------------------------------------------------------------------------------- CUDA

# As in torch.utils.cpp_extension, which would cost an import of setuptools; those that some nvcc still compiles for.
_NAMED = {
    "Volta": "7.0+PTX",
    "Turing": "7.5+PTX",
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0;12.0+PTX",
}


def architectures(default: tuple[str, ...] = ()) -> tuple[str, ...]:
    """What to compile for, as in TORCH_CUDA_ARCH_LIST ("8.0", "9.0a", "10.0+PTX"): what that says, else the default,
    else the GPUs here.

    Raises BackendUnavailable where none of them says anything, or the variable cannot be read.
    """
    listed = Settings.read().cuda_arch_list
    if not listed and default:
        return default
    if not listed:
        if not torch.cuda.is_available():
            raise BackendUnavailable(
                "no GPU is visible and TORCH_CUDA_ARCH_LIST is not set, so nothing says what to compile for.",
                "Set it, for instance to 9.0 (Hopper) or 8.0+PTX (Ampere and all that is newer).",
            )
        capabilities = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        return tuple(f"{major}.{minor}" for major, minor in sorted(capabilities))
    found: list[str] = []
    for item in re.split(r"[;\s]+", listed):
        for one in _NAMED.get(item, item).split(";"):
            if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", one):
                raise BackendUnavailable(
                    f"TORCH_CUDA_ARCH_LIST: {item!r} is no architecture, in {listed!r}.",
                    f'Write "8.0", "9.0a", "10.0+PTX" or {", ".join(_NAMED)}, with spaces or semicolons between them.',
                )
            found.append(one)
    return tuple(dict.fromkeys(found))


def cuda_spec(default: tuple[str, ...] = ()) -> BuildSpec:
    """The CUDA library, for `architectures(default)`. It builds where torch has no CUDA, and cannot be loaded there."""
    sources = _sources("cuda/*.cu") + _sources("cuda/*.cpp")
    archs = architectures(default)
    numbers = [arch.removesuffix("+PTX").replace(".", "") for arch in archs]
    ptx = [number for arch, number in zip(archs, numbers, strict=True) if arch.endswith("+PTX")]
    return BuildSpec(
        name="fused_elbo_cuda",
        parts=(Part("cuda", sources),),
        cflags=(
            "-O3",
            _CXX17,
            "-fmad=false",  # as -ffp-contract=off above
            "--compiler-options=-fPIC,-fvisibility=hidden,-ffp-contract=off",
            "-DUSE_CUDA",  # the stable headers then declare what concerns streams
            _STABLE_ABI,
            *(f"-gencode=arch=compute_{n},code=sm_{n}" for n in numbers),
            *(f"-gencode=arch=compute_{n},code=compute_{n}" for n in ptx),
        ),
        # The streams are libtorch_cuda's, which a torch without CUDA lacks, and libtorch.so brings where it is there.
        ldflags=("-cudart=static", "-Xlinker=--no-as-needed", "-ltorch", "-ltorch_cpu"),
        label="+".join([*(f"sm_{n}" for n in numbers), *(f"compute_{n}" for n in ptx)]),
        language="CUDA",
    )
