"""The CUDA library's build: what it is compiled for, where nvcc is found, a library for a GPU that is not here."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from workshop import Workshop

from fused_elbo import build as builder
from fused_elbo.backends import cuda
from fused_elbo.build import spec as build_spec
from fused_elbo.build import tools as build_tools
from fused_elbo.errors import BackendUnavailable

NVCC = next((path for place in (None, "/usr/local/cuda/bin") if (path := shutil.which("nvcc", path=place))), None)
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc on this machine (PATH, /usr/local/cuda)")


def architectures(monkeypatch: pytest.MonkeyPatch, listed: str) -> tuple[str, ...]:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    return build_spec.architectures()


@pytest.mark.parametrize(
    ("listed", "found"),
    [
        ("9.0", ("9.0",)),
        ("8.0;9.0+PTX", ("8.0", "9.0+PTX")),
        ("8.0 9.0a  10.0f;", ("8.0", "9.0a", "10.0f")),
        ("Ampere;8.0", ("8.0", "8.6+PTX")),
    ],
)
def test_architectures_as_pytorch_writes_them(
    monkeypatch: pytest.MonkeyPatch, listed: str, found: tuple[str, ...]
) -> None:
    assert architectures(monkeypatch, listed) == found


@pytest.mark.parametrize("listed", ["Amper", "90", "sm_90", "9.0-PTX", "9.0,8.0"])
def test_what_is_no_architecture_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, listed: str) -> None:
    with pytest.raises(BackendUnavailable, match=rf"TORCH_CUDA_ARCH_LIST: '{listed}' is no architecture") as caught:
        architectures(monkeypatch, f"8.0 {listed}")
    assert "10.0+PTX" in caught.value.remedy


def test_architectures_of_the_gpus_here(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [(9, 0), (8, 6), (9, 0)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_capability", gpus.__getitem__)
    assert architectures(monkeypatch, "") == ("8.6", "9.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendUnavailable, match="no GPU is visible and TORCH_CUDA_ARCH_LIST is not set"):
        architectures(monkeypatch, " ")


def test_the_spec(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;10.0a+PTX")
    spec = builder.cuda_spec()
    assert [flag for flag in spec.cflags if flag.startswith("-gencode")] == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_100a,code=sm_100a",
        "-gencode=arch=compute_100a,code=compute_100a",
    ]
    assert spec.label == "sm_80+sm_100a+compute_100a"
    assert {"-DUSE_CUDA", "-fmad=false", "-std=c++17"} <= set(spec.cflags)
    assert "-cudart=static" in spec.ldflags


def test_where_nvcc_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shop: Workshop) -> None:
    def install(folder: str) -> Path:
        program = tmp_path / folder / "bin" / "nvcc"
        program.parent.mkdir(parents=True)
        program.write_text("#!/bin/sh\necho Cuda compilation tools, release 99.1, V99.1.2\n")
        program.chmod(0o755)
        return program

    def found() -> Path:
        return Path(build_tools.find_compiler("CUDA", build_tools.Settings.read()).command[0])

    monkeypatch.setenv("PATH", str(tmp_path / "on_path" / "bin"))
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.setattr(build_tools, "_USUAL_CUDA", str(tmp_path / "usual"))
    with pytest.raises(BackendUnavailable, match="nvcc was not found") as caught:
        found()
    assert "CUDA_HOME" in caught.value.remedy
    for folder in ("usual", "on_path", "cuda_path", "cuda_home"):  # each comes before those before it
        program = install(folder)
        assert found() == program
    monkeypatch.setenv("CXX", f"/usr/bin/env {shop.cxx} -O1")
    compiler = build_tools.find_compiler("CUDA", build_tools.Settings.read())
    assert compiler.command[1:] == ("-ccbin", str(shop.cxx))
    assert str(compiler) == "nvcc, release 99.1, V99.1.2"


KERNEL = """
    #include <torch/csrc/inductor/aoti_torch/c/shim.h>
    #include <torch/csrc/stable/library.h>
    #include <torch/csrc/stable/ops.h>
    #include <torch/csrc/stable/tensor.h>

    __global__ void fill(float* p) { p[threadIdx.x] = 1.0f; }

    torch::stable::Tensor ones(torch::stable::Tensor x) {
      void* stream;
      aoti_torch_get_current_cuda_stream(-1, &stream);
      auto y = torch::stable::empty_like(x);
      fill<<<1, 32, 0, static_cast<cudaStream_t>(stream)>>>(static_cast<float*>(y.data_ptr()));
      return y;
    }
    STABLE_TORCH_LIBRARY_FRAGMENT(fused_elbo_test_cuda, m) { m.def("ones(Tensor x) -> Tensor"); }
    STABLE_TORCH_LIBRARY_IMPL(fused_elbo_test_cuda, CUDA, m) { m.impl("ones", TORCH_BOX(&ones)); }
"""


@needs_nvcc
@pytest.mark.check("the CUDA library, compiled by nvcc")
def test_nvcc_builds_it_without_a_gpu_and_a_cpu_torch_is_told_why_it_does_not_load(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch, unloaded: None
) -> None:
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    shop.write("op.cu", KERNEL)
    spec = replace(builder.cuda_spec(), parts=(build_spec.Part("cuda", ("op.cu",)),), root=shop.root)
    target = builder.build(spec)
    assert b"sm_90" in target.library.read_bytes()
    assert "nvcc, release" in str(target.compiler)
    if torch.version.cuda is None:
        monkeypatch.setattr(cuda.library, "spec", lambda: spec)
        monkeypatch.setattr(cuda.library, "check", lambda: None)
        with pytest.raises(BackendUnavailable, match=r"fused_elbo_cuda\.so does not load: .*cuda_stream"):
            cuda.require()


@needs_nvcc
def test_nvcc_s_errors_are_shown(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    shop.write("op.cu", "__global__ void f() { this_is_why(); }\n")
    spec = replace(builder.cuda_spec(), parts=(build_spec.Part("cuda", ("op.cu",)),), root=shop.root)
    with pytest.raises(builder.BuildFailed, match="this_is_why") as caught:
        builder.build(spec)
    assert "CUDA_HOME" in caught.value.remedy
