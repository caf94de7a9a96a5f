"""For the tests of the build: tiny sources, and a compiler that keeps a log of how it is called."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import fused_elbo
from fused_elbo import build as builder
from fused_elbo.build import spec as build_spec

REAL = shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
needs_compiler = pytest.mark.skipif(REAL is None, reason="no C++ compiler (g++, clang++, c++) on this machine")
FAST = ("-fPIC", "-O0")


def tiny(root: Path, *sources: str) -> build_spec.BuildSpec:
    return build_spec.BuildSpec("tiny", (build_spec.Part("all", sources or ("one.cpp", "two.cpp")),), FAST, root=root)


class Workshop:
    """Sources, a cache and a logging compiler in a folder of their own; the environment points to them."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.root, self.cache = folder, folder / "src", folder / "cache"
        self.log = folder / "logging-g++.calls"
        self.root.mkdir()
        self.cxx = folder / "logging-g++"
        self.write("one.cpp", 'extern "C" int one() { return 1; }\n')
        self.write("two.cpp", '#include "two.h"\nextern "C" int two() { return TWO; }\n')
        self.write("two.h", "#define TWO 2\n")
        self.spec = tiny(self.root)
        self.compiler()
        monkeypatch.setenv("FUSED_ELBO_CACHE_DIR", str(self.cache))
        monkeypatch.setenv("CXX", str(self.cxx))
        monkeypatch.delenv("MAX_JOBS", raising=False)

    def write(self, name: str, text: str) -> None:
        (self.root / name).write_text(textwrap.dedent(text))

    def compiler(self, before: str = "", after: str = "", version: str = "logging g++ 1.0") -> None:
        """The compiler, doing something before or after the real one; $STEP is compile or link, $OUT what it writes."""
        log = '"$0.calls"'
        script = f"""\
            #!/bin/sh
            if [ "$*" = --version ]; then
                echo version $$ >> {log}; printf '%b\\n' {shlex.quote(version)} "$LC_ALL"; exit
            fi
            case " $* " in *" -c "*) STEP=compile;; *) STEP=link;; esac
            for OUT in "$@"; do :; done
            echo $STEP $$ >> {log}; trap 'echo end >> {log}' EXIT
            {before}
            {shlex.quote(REAL or "false")} "$@" || exit 1
            {after}
            exit 0
            """
        part = self.folder / "part"
        part.write_text(textwrap.dedent(script))
        part.chmod(0o755)
        os.replace(part, self.cxx)  # "text file busy" otherwise, while it runs

    def calls(self, *kinds: str) -> list[str]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [line for line in lines if line.split()[0] in (kinds or ("version", "compile", "link"))]

    def key(self, spec: build_spec.BuildSpec | None = None) -> str:
        return builder.resolve(spec or self.spec).folder.name

    def leftovers(self) -> list[str]:
        return [path.name for path in self.cache.rglob("scratch-*")]


def python(script: str, **environ: str) -> subprocess.Popen[str]:
    """A process of its own that imports this very fused_elbo."""
    path = os.pathsep.join([str(Path(fused_elbo.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**os.environ, "PYTHONPATH": path, **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out, err


def wait_for(condition: Callable[[], object], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def build_script(shop: Workshop, gate: Path | None = None) -> str:
    wait = f"while not os.path.exists({str(gate)!r}): time.sleep(0.002)" if gate else ""
    return "\n".join(
        [
            "import ctypes, os, pathlib, sys, time",
            f"sys.path.insert(0, {str(Path(__file__).parent)!r})",
            "from fused_elbo.build import build",
            "from workshop import tiny",
            f"print('imported', flush=True)\n{wait}",
            f"library = ctypes.CDLL(str(build(tiny(pathlib.Path({str(shop.root)!r}))).library))",
            "print(library.one() + library.two())",
        ]
    )


# A step of the loss on whatever backend serves, against the formula; every warning is shown.
USE = """
    import warnings, torch
    warnings.simplefilter("always")
    from fused_elbo import decoupled_elbo
    torch.manual_seed(0)
    recon, x = torch.rand(4, 3, 5, requires_grad=True), torch.rand(4, 3, 5)
    mu, logvar = torch.randn(4, 2, requires_grad=True), torch.randn(4, 2, requires_grad=True)
    for _ in range(3):
        decoupled_elbo(recon, x, mu, logvar, beta=4.0).loss.backward()
    mse = torch.nn.functional.mse_loss(recon, x)
    kl = 0.5 * (mu**2 + logvar.exp() - 1 - logvar).sum() / 4
    expected = torch.autograd.grad(15 / 2 * mse.log() + 4 * kl, (recon, mu, logvar))
    for leaf, gradient in zip((recon, mu, logvar), expected):
        torch.testing.assert_close(leaf.grad, 3 * gradient)
    print("right")
"""
