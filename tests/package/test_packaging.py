"""What sdist, wheel and editable install carry is what is on disk, with symlinks or without.

git writes fused_elbo/kernels and fused_elbo/csrc as small text files where symlinks are off (Windows,
core.symlinks=false), so everything here is built from two copies of the tree: one with symlinks, one with text files.
"""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
LINKS = {"fused_elbo/kernels": "../kernels", "fused_elbo/csrc": "../csrc"}
FOLDERS = ("fused_elbo", "kernels", "csrc")
TOP_LEVEL = {
    *FOLDERS,
    *(".ci", ".clang-format", ".gitignore", ".pre-commit-config.yaml", "bench", "constraints.txt", "CONTRIBUTING.md"),
    *("examples", "LICENSE", "Makefile", "pyproject.toml", "README.md", "tests"),
}

Files = dict[str, bytes]  # path in the installed package -> content


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def git(*arguments: str) -> str:
    """Output of git in the checkout; skips where this is none (an unpacked sdist, say)."""
    if not shutil.which("git"):
        pytest.skip("needs git, which is not installed")
    done = subprocess.run(["git", *arguments], cwd=REPO, capture_output=True, text=True)
    if done.returncode or not done.stdout:
        pytest.skip(f"needs a git checkout with a commit: {done.stderr.strip() or 'git lists no file here'}")
    return done.stdout


def installed_path(path: str) -> str:
    """Where a file of the repository lies once installed: kernels/ and csrc/ go inside the package."""
    return path if path.startswith("fused_elbo/") else f"fused_elbo/{path}"


def on_disk(tree: Path) -> Files:
    """Every file of the three folders, of any kind, so that one that no pattern in pyproject.toml covers is missed."""

    def walk(folder: Path) -> Iterator[Path]:
        for path in sorted(folder.iterdir()):
            if path.relative_to(tree).as_posix() in LINKS or path.name == "__pycache__":
                continue
            yield from walk(path) if path.is_dir() else [path]

    paths = [path for folder in FOLDERS for path in walk(tree / folder)]
    return {installed_path(path.relative_to(tree).as_posix()): path.read_bytes() for path in paths}


def in_sdist(sdist: Path) -> Files:
    carried: Files = {}
    with tarfile.open(sdist) as archive:
        for member in archive.getmembers():
            assert not member.issym(), f"{member.name}: a symlink in an sdist is lost where symlinks are off"
            path = member.name.partition("/")[2]
            if member.isfile() and path.startswith(tuple(f"{folder}/" for folder in FOLDERS)):
                content = archive.extractfile(member)
                assert content is not None
                assert installed_path(path) not in carried, f"{path} is carried twice"
                carried[installed_path(path)] = content.read()
    return carried


def in_wheel(wheel: Path) -> Files:
    with zipfile.ZipFile(wheel) as archive:
        assert len(archive.namelist()) == len(set(archive.namelist()))
        return {name: archive.read(name) for name in archive.namelist()}


def assert_same(carried: Files, expected: Files) -> None:
    assert sorted(carried) == sorted(expected)
    assert [path for path in expected if carried[path] != expected[path]] == []


@pytest.fixture(scope="module", params=["symlinks", "text files"])
def tree(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what packages are built from. A copy: builds write into the tree, and old ones would leak into new."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPO / name, tree)
    for folder in FOLDERS:
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPO / folder, tree / folder, symlinks=True, ignore=ignore)
    for link, target in LINKS.items():
        (tree / link).unlink(missing_ok=True)  # an unpacked sdist has none
        if request.param == "text files":
            (tree / link).write_text(target)  # as git does: the target, without a newline
            continue
        try:
            (tree / link).symlink_to(target, target_is_directory=True)
        except OSError as error:
            pytest.skip(f"needs symlinks, which this file system or user may not make: {error}")
    return tree


@pytest.fixture(scope="module")
def built(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sdist, the wheel built from it, and the wheel built from the tree."""
    builder = (sys.executable, "-m", "build", "--no-isolation")
    from_sdist, from_tree = tmp_path_factory.mktemp("from_sdist"), tmp_path_factory.mktemp("from_tree")
    run(*builder, "--outdir", from_sdist, tree, cwd=tree)
    run(*builder, "--wheel", "--outdir", from_tree, tree, cwd=tree)
    (sdist,), (wheel,), (tree_wheel,) = (
        from_sdist.glob("*.tar.gz"),
        from_sdist.glob("*.whl"),
        from_tree.glob("*.whl"),
    )
    return {"sdist": sdist, "wheel from sdist": wheel, "wheel from tree": tree_wheel}


def test_sdist_carries_what_is_on_disk(tree: Path, built: dict[str, Path]) -> None:
    assert_same(in_sdist(built["sdist"]), on_disk(tree))


def test_wheel_carries_what_is_on_disk(tree: Path, built: dict[str, Path]) -> None:
    carried = in_wheel(built["wheel from tree"])
    package = {path: content for path, content in carried.items() if ".dist-info/" not in path}
    assert_same(package, on_disk(tree))


def test_wheels_from_sdist_and_from_tree_are_equal(built: dict[str, Path]) -> None:
    assert_same(in_wheel(built["wheel from sdist"]), in_wheel(built["wheel from tree"]))


# -I and -S keep this environment's own fused_elbo out; its other packages are appended without their .pth files.
IMPORT_FROM = """
import site, sys
site.addsitedir(sys.argv[1])
sys.path += sys.argv[2:]
import fused_elbo.csrc, fused_elbo.kernels
for path in fused_elbo.kernels.__file__, fused_elbo.csrc.__file__, fused_elbo.csrc.ROOT:
    print(path)
"""


def assert_imported(site_dir: Path, kernels: Path, csrc: Path) -> None:
    """An interpreter whose only fused_elbo is the one in site_dir finds kernels, csrc and csrc.ROOT there."""
    libraries = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    output = run(sys.executable, "-I", "-S", "-c", IMPORT_FROM, site_dir, *libraries, cwd=site_dir)
    found = [Path(line).resolve() for line in output.splitlines()]
    assert found == [path.resolve() for path in (kernels / "__init__.py", csrc / "__init__.py", csrc)]


def test_wheel_is_importable(built: dict[str, Path], tmp_path: Path) -> None:
    with zipfile.ZipFile(built["wheel from tree"]) as archive:
        archive.extractall(tmp_path)
    assert_imported(tmp_path, tmp_path / "fused_elbo/kernels", tmp_path / "fused_elbo/csrc")


def test_editable_install_is_importable(tree: Path, tmp_path: Path) -> None:
    """What `pip install -e .` puts into site-packages, put into a folder of our own."""
    build_editable = "import sys, setuptools.build_meta as backend; backend.build_editable(sys.argv[1])"
    run(sys.executable, "-c", build_editable, tmp_path, cwd=tree)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    assert_imported(tmp_path, tree / "kernels", tree / "csrc")


def test_symlinks_are_committed_as_symlinks() -> None:
    """A commit from a clone without symlinks could turn them into text files for everyone."""
    modes = {line.split()[3]: line.split()[0] for line in git("ls-files", "--stage", *LINKS).splitlines()}
    assert modes == dict.fromkeys(LINKS, "120000")


def test_top_level_entries() -> None:
    assert {path.partition("/")[0] for path in git("ls-files").splitlines()} <= TOP_LEVEL
