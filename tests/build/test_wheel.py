"""`make wheel`: one CPU library for three instruction sets, safe on the narrowest, and at work without a compiler."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import textwrap
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from instruction_sets import capabilities, of_each_instruction_set
from isa_check import WIDER, lane_by_lane, needs_binutils, trespassers
from workshop import USE, Workshop, needs_compiler

from fused_elbo import BackendUnavailable
from fused_elbo import build as builder
from fused_elbo.build import spec as build_spec

REPO = Path(__file__).parents[2]
sys.path.insert(0, str(REPO / ".ci"))

import make_wheel  # noqa: E402

LINUX = sys.platform == "linux"
needs_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="the instruction sets are x86's")
pytestmark = needs_compiler


@pytest.fixture(scope="module")
def library() -> Path:
    """The library that the wheel has, in the cache that the other tests use, so that it is compiled once."""
    return builder.build(builder.cpu_spec(build_spec.ISAS)).library


@pytest.fixture(scope="module")
def wheel(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, REPO / ".ci/make_wheel.py", "--cpu-only", "--out", out], check=True)
    (wheel,) = out.iterdir()
    return wheel


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the wheel in it, by pip, and with this one's torch behind it."""
    environment = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    program = environment / "bin/python"
    pip = [sys.executable, "-m", "pip", "--python", program, "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run(pip, check=True)
    (site,) = environment.glob("lib/*/site-packages")
    others = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (site / "others.pth").write_text("\n".join(others) + "\n")  # what they name in .pth files, this checkout, stays out
    return program


def run(program: Path, *arguments: str, **environ: str) -> str:
    """Where nothing but Python is on the PATH, and no cache has a library."""
    nowhere = program.parent.parent / "nowhere"
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "CXX", "CUDA_HOME")}
    environ = {**clean, "PATH": str(nowhere), "FUSED_ELBO_CACHE_DIR": str(nowhere / "cache"), **environ}
    done = subprocess.run([program, *arguments], env=environ, cwd=program.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert not nowhere.exists(), "something was built"
    return done.stdout


# -------------------------------------------------------------------------------------------------------- the library


@needs_x86
@needs_binutils
@pytest.mark.parametrize("level", WIDER)
def test_no_instruction_set_reaches_a_wider_one(library: Path, level: str) -> None:
    assert trespassers(library, level) == []


@needs_x86
@needs_binutils
@pytest.mark.parametrize("level", [level.lower() for level in build_spec.INSTRUCTION_SETS])
def test_no_element_loop_goes_lane_by_lane(library: Path, level: str) -> None:
    assert lane_by_lane(library, level) == []


@needs_x86
@needs_binutils
def test_the_order_of_linking_is_what_keeps_it_so(shop: Workshop) -> None:
    """An inline function that two instruction sets compile is one in the library: the first that the linker meets."""
    shop.write(
        "kernel.cpp",
        """
        #include <vector>
        namespace shared {
        template <class T> __attribute__((noinline)) void add(T* p, const T* q, int n) { while (n--) p[n] += q[n]; }
        }
        namespace elbo {
        void run(float* p, const float* q, int n) { shared::add(p, q, n); }
        void grow(std::vector<double>& v, double x) { v.push_back(x), v.push_back(x); }
        }
        """,
    )
    parts = [
        build_spec.Part(name.lower(), ("kernel.cpp",), (f"-Delbo=elbo_{name.lower()}", "-O3", *flags))
        for name, flags in build_spec.INSTRUCTION_SETS.items()
    ]
    spec = replace(shop.spec, cflags=("-fPIC", "-fvisibility=hidden"))
    right = builder.build(replace(spec, name="right", parts=tuple(parts))).library
    wrong = builder.build(replace(spec, name="wrong", parts=tuple(reversed(parts)))).library
    assert [trespassers(right, level) for level in WIDER] == [[], []]
    for level in WIDER:
        assert "shared3add" in " ".join(trespassers(wrong, level))
    assert "St6vectorId" in " ".join(trespassers(wrong, "baseline"))  # which is exported


@needs_binutils
def test_it_needs_the_stable_abi_and_nothing_of_python(library: Path) -> None:
    listed = subprocess.run(["nm", "-D", "--undefined-only", library], check=True, capture_output=True, text=True)
    names = [line.split()[-1] for line in listed.stdout.splitlines()]
    system = re.compile(r"@|^(__gmon_start__|_ITM_\w+|__cxa_finalize)$")  # versioned: libc, libm, libstdc++, libgcc
    ours = [name for name in names if not system.search(name)]
    assert len(ours) > 20
    assert [name for name in ours if not re.match(r"(aoti_)?torch_", name)] == []
    exported = subprocess.run(["nm", "-D", "--defined-only", library], check=True, capture_output=True, text=True)
    assert "fused_elbo_cpu_isa" in exported.stdout
    assert not re.search(r" T .*elbo_(stats|grads)", exported.stdout)


@needs_x86
def test_it_chooses_as_pytorch_does(library: Path) -> None:
    """Each runs in a process of its own, because a library chooses once, when it is loaded."""
    script = f"""
import ctypes, torch
level = ctypes.CDLL({str(library)!r}).fused_elbo_cpu_isa
level.restype = ctypes.c_char_p
from fused_elbo.build import spec as build_spec
print(level().decode(), build_spec.instruction_set().lower())
"""
    for capability in (*capabilities(), "nonsense"):
        environ = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
        done = subprocess.run([sys.executable, "-c", script], env=environ, capture_output=True, text=True, check=True)
        ours, pytorchs = done.stdout.split()
        assert ours == pytorchs, capability


# ---------------------------------------------------------------------------------------------------------- the wheel


def test_the_wheel_s_tag_and_contents(wheel: Path) -> None:
    assert re.fullmatch(r"fused_elbo-[\d.]+-py3-none-\w+\.whl", wheel.name)
    assert not wheel.name.endswith("-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (archive.read(name).decode() for name in names if name.endswith("/WHEEL"))
        assert archive.read("fused_elbo/lib/fused_elbo_cpu.txt").decode() == "+".join(build_spec.ISAS).lower() + "\n"
    assert "fused_elbo/lib/fused_elbo_cpu.so" in names
    assert "fused_elbo/csrc/elbo_math.h" in names  # what a machine with a compiler builds from
    assert "Root-Is-Purelib: false" in metadata
    assert f"Tag: {wheel.stem.split('-', 2)[2]}" in metadata


@pytest.mark.skipif(not LINUX, reason="the glibc that a wheel needs is Linux's")
@needs_binutils
def test_the_tag_names_a_glibc_that_has_every_symbol(wheel: Path, library: Path) -> None:
    listed = subprocess.run(["objdump", "-T", library], check=True, capture_output=True, text=True).stdout
    needed = max(tuple(map(int, version.split("."))) for version in re.findall(r"GLIBC_(2\.\d+)", listed))
    tags = re.findall(r"manylinux_(\d+)_(\d+)_", wheel.name)
    assert tags, f"{wheel.name}: no glibc in the tag"
    assert min((int(a), int(b)) for a, b in tags) >= needed


def test_without_a_compiler_the_packaged_kernels_serve(installed: Path) -> None:
    report = run(installed, "-m", "fused_elbo")
    (row,) = re.findall(r"^cpp +(.*)$", report, re.MULTILINE)
    level = build_spec.instruction_set().lower()
    assert re.fullmatch(rf"ready +\S+/fused_elbo/lib/fused_elbo_cpu\.so \(packaged; {level}\)", row)
    assert str(installed.parent.parent) in row
    assert report.endswith("CPU tensors are served by: cpp\n")
    assert run(installed, "-c", textwrap.dedent(USE)) == "right\n"


@needs_x86
def test_the_packaged_kernels_give_the_same_bits_on_every_instruction_set(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    monkeypatch.setenv("FUSED_ELBO_CACHE_DIR", str(tmp_path / "cache"))
    results = of_each_instruction_set(tmp_path, str(installed))
    assert not (tmp_path / "cache").exists()
    for capability, values in results.items():
        for got, true in zip(values, results["default"], strict=True):
            assert torch.equal(got, true), capability


def test_the_cuda_library_comes_along_where_nvcc_is(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def build(spec: build_spec.BuildSpec) -> builder.Target:
        if spec.language == "CUDA" and failure:
            raise failure[0]
        return builder.Target(spec, None, shop.folder)

    failure: list[BackendUnavailable] = []
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(builder, "build", build)
    both = make_wheel.libraries(cpu_only=False)
    assert [target.spec.name for target in both] == ["fused_elbo_cpu", "fused_elbo_cuda"]
    assert both[1].spec.label == "sm_75+sm_80+sm_90+sm_100+sm_120+compute_120"
    assert len(make_wheel.libraries(cpu_only=True)) == 1
    failure.append(BackendUnavailable("nvcc was not found."))
    assert len(make_wheel.libraries(cpu_only=False)) == 1
    assert capsys.readouterr().out == "The CUDA library is left out: nvcc was not found.\n"
    failure[0] = builder.BuildFailed("it does not compile.")
    with pytest.raises(builder.BuildFailed):  # no wheel is better than one that lacks what was meant to be in it
        make_wheel.libraries(cpu_only=False)
