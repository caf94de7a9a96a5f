"""Turns a build spec, which is data, into a shared library in a private cache: at first use, never at import.

    library = build(cpu_spec()).library

Layout of the cache, one folder for each key (PyTorch, machine, flags, sources and headers; then the compiler):

    <cache>/fused_elbo_cpu-torch2.13.0-avx512-0123456789abcdef-0123456789abcdef/
        fused_elbo_cpu.so     appears by one atomic rename, so that what has this name is whole
        fused_elbo_cpu.sha256 its digest: a copy that was cut short would kill the process that loads it
        scratch-*/            a build at work, or what a killed one left; the next builder removes it
        lock                  held by the one process that builds
        build.log             what the compiler said, after a failed build
    <cache>/compiler-*.txt    what `$CXX --version` answered, so that a warm start spawns no process

Environment variables, all read in `Settings.read`, when a library is asked for:

    FUSED_ELBO_CACHE_DIR   the cache; else $XDG_CACHE_HOME/fused_elbo, else fused_elbo in ~/.cache or ~/Library/Caches
    CXX                    the C++ compiler, as a shell reads it ("ccache g++"); else g++, clang++ or c++
    CUDA_HOME, CUDA_PATH   where bin/nvcc is looked for first; then on the PATH, then in /usr/local/cuda
    TORCH_CUDA_ARCH_LIST   what CUDA code is compiled for ("8.0;9.0+PTX"); else the GPUs that are visible
    MAX_JOBS               how many compilers run at once

PyTorch's own ATEN_CPU_CAPABILITY (default, avx2, avx512) chooses the instruction set. GCC and Clang only; the flags for
macOS are untested.
"""

from .cache import BuildFailed, Target, build, ninja_file, resolve
from .spec import BuildSpec, cpu_spec, cuda_spec
from .tools import Settings

__all__ = ["BuildFailed", "BuildSpec", "Settings", "Target", "build", "cpu_spec", "cuda_spec", "ninja_file", "resolve"]
