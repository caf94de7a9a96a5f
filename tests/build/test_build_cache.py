"""The cache of built libraries: private, whole whatever is killed, and of use when its compiler has gone."""

from __future__ import annotations

import ctypes
import os
import signal
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import filelock
import pytest
from workshop import REAL, Workshop, build_script, needs_compiler, python, wait_for

from fused_elbo import build as builder
from fused_elbo.build import cache
from fused_elbo.errors import BackendUnavailable


@needs_compiler
@pytest.mark.parametrize("step", ["compile", "link"])
def test_a_killed_builder_leaves_nothing_to_load(shop: Workshop, step: str) -> None:
    hold, release = shop.folder / "hold", shop.folder / "release"
    hold.touch()
    shop.compiler(  # where it is held, half an output is there
        before=f"[ $STEP = {step} ] && [ -e '{hold}' ] && {{ head -c 100 '{REAL}' > \"$OUT\"; touch '{hold}.reached'; "
        f"while [ ! -e '{release}' ]; do sleep 0.02; done; }}"
    )
    process = python(build_script(shop), MAX_JOBS="1")
    wait_for(Path(f"{hold}.reached").exists)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    target = builder.resolve(shop.spec)
    assert shop.leftovers()  # it was in the middle of the work
    assert not target.library.exists()

    hold.unlink()
    assert builder.build(shop.spec) == target  # takes over the dead one's lock
    assert ctypes.CDLL(str(target.library)).two() == 2
    assert not shop.leftovers()

    # The dead builder's compiler is still there. Now it goes on, and must not reach the library.
    whole = target.library.read_bytes()
    assert len(shop.calls("end")) < len(shop.calls("compile", "link"))
    release.touch()
    wait_for(lambda: len(shop.calls("end")) == len(shop.calls("compile", "link")))
    assert target.library.read_bytes() == whole


@needs_compiler
def test_the_library_appears_whole(shop: Workshop) -> None:
    size = 64 << 20  # takes some 50 ms to write: long enough to be seen half written
    shop.compiler(after=f'[ $STEP = link ] && head -c {size} /dev/zero >> "$OUT"')
    library = builder.resolve(shop.spec).library
    with ThreadPoolExecutor(1) as pool:
        built = pool.submit(builder.build, shop.spec)
        wait_for(lambda: library.exists() or built.done())
        seen = library.stat().st_size if library.exists() else None
        built.result()
    assert seen == library.stat().st_size > size


def test_cache_is_private(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.cache = shop.folder / "new/cache"
    monkeypatch.setenv("FUSED_ELBO_CACHE_DIR", str(shop.cache))
    umask = os.umask(0)
    try:
        builder.resolve(shop.spec)
    finally:
        os.umask(umask)
    assert stat.S_IMODE(shop.cache.stat().st_mode) == 0o755  # others may read it: the image's user what root built


@needs_compiler
@pytest.mark.parametrize("mode", [0o770, 0o702], ids=oct)
def test_a_cache_that_others_can_write_is_refused(shop: Workshop, mode: int) -> None:
    builder.build(shop.spec)  # a library that is there is refused, too: it may have been planted
    shop.cache.chmod(mode)
    with pytest.raises(BackendUnavailable, match="writable by others") as caught:
        builder.build(shop.spec)
    assert "chmod go-w" in caught.value.remedy
    shop.cache.chmod(0o755)
    builder.build(shop.spec)


def owned_by(monkeypatch: pytest.MonkeyPatch, folder: Path, owner: int) -> None:
    """Makes the file system say so, whoever runs the tests."""
    real = Path.stat

    def found(path: Path, **kwargs: bool) -> os.stat_result:
        values = list(real(path, **kwargs))
        if path == folder:
            values[stat.ST_UID] = owner
        return os.stat_result(values)

    monkeypatch.setattr(Path, "stat", found)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)


def test_a_cache_of_another_user_is_refused(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    builder.resolve(shop.spec)
    owned_by(monkeypatch, shop.cache, 1001)
    with pytest.raises(BackendUnavailable, match="belongs to another user"):
        builder.resolve(shop.spec)


@needs_compiler
def test_what_root_has_built_serves_all(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """This happens in an image: it is built by RUN and used by USER, when there is no compiler any more."""
    library = builder.build(shop.spec).library
    owned_by(monkeypatch, shop.cache, 0)
    assert builder.build(shop.spec).library == library
    monkeypatch.setenv("CXX", "no-such-g++")
    assert builder.build(shop.spec).library == library
    monkeypatch.setenv("CXX", f"{shop.cxx} -O1")  # another compiler is no better there: nothing can be added
    monkeypatch.setattr(os, "access", lambda path, mode: path != shop.cache)
    assert builder.build(shop.spec).library == library
    for path in (shop.cache, library.parent):
        assert stat.S_IMODE(path.stat().st_mode) & 0o555 == 0o555 & ~umask()


def umask() -> int:
    os.umask(now := os.umask(0))
    return now


@needs_compiler
@pytest.mark.parametrize("left", [0, 100, 4096, -1], ids=str)
def test_a_library_that_was_cut_short_is_not_loaded(shop: Workshop, monkeypatch: pytest.MonkeyPatch, left: int) -> None:
    """A copy, or a full disk, cuts it short; dlopen would then kill the process."""
    library = builder.build(shop.spec).library
    whole = library.read_bytes()
    library.write_bytes(whole[:left])
    assert not builder.resolve(shop.spec).is_built()
    assert ctypes.CDLL(str(builder.build(shop.spec).library)).one() == 1  # built anew

    library.write_bytes(whole[:left])
    monkeypatch.setenv("CXX", "no-such-g++")
    with pytest.raises(BackendUnavailable, match="no C"):
        builder.build(shop.spec)


@needs_compiler
@pytest.mark.parametrize("left", [None, b"", b"\xff", b"0123456789abcdef"], ids=str)
def test_a_library_of_which_the_digest_is_lost_is_built_anew(shop: Workshop, left: bytes | None) -> None:
    target = builder.build(shop.spec)
    if left is None:
        target.digest.unlink()
    else:
        target.digest.write_bytes(left)
    before = len(shop.calls("link"))
    builder.build(shop.spec)
    assert len(shop.calls("link")) == before + 1
    builder.build(shop.spec)
    assert len(shop.calls("link")) == before + 1


@pytest.mark.parametrize("where", ["cache", "folder"])
def test_a_cache_that_cannot_be_written(shop: Workshop, where: str) -> None:
    obstacle = shop.cache if where == "cache" else builder.resolve(shop.spec).folder
    obstacle.touch()  # unlike permissions, a file in the folder's place stops root, too
    with pytest.raises(BackendUnavailable) as caught:
        builder.build(shop.spec)
    assert str(obstacle) in caught.value.reason
    assert "FUSED_ELBO_CACHE_DIR" in caught.value.remedy


def test_a_lock_that_is_never_released(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_LOCK_TIMEOUT", 0.1)
    folder = builder.resolve(shop.spec).folder
    folder.mkdir()
    with cache.FileLock(folder / "lock"), pytest.raises(BackendUnavailable, match="another process has held"):
        builder.build(shop.spec)


def test_a_lock_that_is_a_file_says_whose_it_is(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the file system has no locks: a builder that was killed on another machine leaves one for ever."""
    monkeypatch.setattr(cache, "_LOCK_TIMEOUT", 0.1)
    monkeypatch.setattr(cache, "FileLock", filelock.SoftFileLock)
    lock = builder.resolve(shop.spec).folder / "lock"
    lock.parent.mkdir()
    lock.write_text("4321\nnode7\n")
    with pytest.raises(BackendUnavailable, match=r"another process has held .*: process 4321 on node7\.") as caught:
        builder.build(shop.spec)
    assert f"delete {lock}" in caught.value.remedy


@needs_compiler
def test_the_advice_about_such_a_lock_helps(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "FileLock", filelock.SoftFileLock)
    lock = builder.resolve(shop.spec).folder / "lock"
    lock.parent.mkdir()
    lock.write_text("4321\nnode7\n")
    lock.unlink()
    assert builder.build(shop.spec).is_built()


@needs_compiler
def test_a_library_that_is_there_needs_no_lock(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_LOCK_TIMEOUT", 5.0)
    target = builder.build(shop.spec)
    with cache.FileLock(target.folder / "lock"):
        assert builder.build(shop.spec) == target


@needs_compiler
@pytest.mark.parametrize("how", ["gone", "broken", "named wrongly"])
def test_a_library_outlives_its_compiler(shop: Workshop, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    library = builder.build(shop.spec).library
    if how == "gone":
        monkeypatch.delenv("CXX")
        monkeypatch.setenv("PATH", str(shop.root))
    elif how == "broken":
        shop.cxx.write_text("#!/bin/sh\nexit 69\n")
    else:
        monkeypatch.setenv("CXX", "no-such-g++")
    target = builder.build(shop.spec)
    assert (target.library, target.compiler) == (library, None)
    shop.write("two.h", "#define TWO 22\n")  # but never one of other sources
    with pytest.raises(BackendUnavailable):
        builder.build(shop.spec)


@needs_compiler
def test_of_two_compilers_libraries_the_latest_serves(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    libraries = []
    for age, version in ((100, "1.0"), (0, "2.0"), (50, "3.0")):
        shop.compiler(version=version)
        libraries.append(builder.build(shop.spec).library)
        then = time.time() - age
        os.utime(libraries[-1], (then, then))
    assert len(set(libraries)) == 3
    monkeypatch.setenv("CXX", "no-such-g++")
    assert builder.build(shop.spec).library == libraries[1]
