"""The library is found, or compiled once and kept; each fault of it is detected and printed in one line."""

import os
import platform
import shutil
import threading

import pytest

from refengine.backends.cpu import build, native
from refengine.spec.config import InputError

COMPILER = shutil.which("c++")
needs_compiler = pytest.mark.skipif(not COMPILER, reason="there is no compiler for the loops")


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Use one short source file instead of the loops, and a separate cache."""
    kernels, cache = tmp_path / "kernels", tmp_path / "cache"
    kernels.mkdir()
    (kernels / "one.cpp").write_text('extern "C" int one() { return 1; }\n')
    monkeypatch.setattr(build, "KERNELS", kernels)
    monkeypatch.setattr(native, "BUILT", tmp_path / "built")
    monkeypatch.setattr(native, "declared", lambda library: library)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    native.load.cache_clear()
    yield cache / "refengine"
    native.load.cache_clear()


@needs_compiler
def test_a_library_is_compiled_once_and_says_so(small, capfd):
    assert native.load().one() == 1
    assert capfd.readouterr().err.count("\n") == 1
    native.load.cache_clear()
    assert native.load().one() == 1 and capfd.readouterr().err == ""
    assert len(list(small.iterdir())) == 1


@needs_compiler
@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:1000],
        lambda data: b"",
        lambda data: data[:500] + bytes([data[500] ^ 1]) + data[501:],
        lambda data: data + b"x",
        lambda data: b"another program",
    ],
    ids=["short", "empty", "a byte", "longer", "another"],
)
def test_a_damaged_or_foreign_library_is_compiled_again(small, damage):
    path = native.library(COMPILER)
    good = path.read_bytes()
    path.write_bytes(damage(good))
    assert not native.whole(path)
    assert native.library(COMPILER) == path and native.whole(path)


@needs_compiler
def test_another_source_compiler_or_processor_is_another_library(small, monkeypatch):
    names = {native.name(COMPILER), native.name("/usr/bin/other")}
    monkeypatch.setattr(native, "processor", lambda: "flags: another")
    names.add(native.name(COMPILER))
    (build.KERNELS / "one.cpp").write_text('extern "C" int one() { return 2; }\n')
    assert len(names | {native.name(COMPILER)}) == 4


@needs_compiler
def test_a_cache_that_cannot_be_written_does_no_harm(small, tmp_path, monkeypatch, capfd):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert native.load().one() == 1
    first, _ = capfd.readouterr().err.splitlines()
    assert first.endswith("cannot be used (Not a directory), so what is compiled is not kept")


@needs_compiler
def test_a_disk_that_is_full_does_no_harm(small, tmp_path, monkeypatch, capfd):
    """The compiler fails in the full cache, and works in the temporary directory."""
    compiler = script(
        tmp_path, f'case "$*" in *{small}*) echo no room >&2; exit 1;; esac; exec {COMPILER} "$@"'
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(small.parent))
    monkeypatch.setenv("CXX", str(compiler))
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    assert native.load().one() == 1
    assert "cannot be used (No space left on device)" in capfd.readouterr().err
    assert not list(small.iterdir())


@needs_compiler
@pytest.mark.parametrize("locks", [True, False])
def test_several_may_compile_at_once(small, monkeypatch, capfd, locks):
    """One process compiles for all; without file locks, each process compiles."""
    if not locks:
        monkeypatch.setattr(native, "fcntl", None)
    found = []
    threads = [threading.Thread(target=lambda: found.append(native.library(COMPILER))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len(set(found)) == 1 and native.whole(found[0])
    assert not locks or capfd.readouterr().err.count("compiling") == 1
    assert list(small.iterdir()) == [found[0]]


def script(folder, commands: str):
    """Return the path of a compiler that runs these shell commands."""
    path = folder / "cc"
    path.write_text(f"#!/bin/sh\n{commands}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    "commands, said",
    [
        ("exit 3", "exit status 3"),
        ("echo 'one.cpp:1: a mistake' >&2; echo more >&2; exit 1", "one.cpp:1: a mistake"),
        ("sleep 60", "timed out"),
        ("exit 0", "No such file"),
        ('for name; do :; done; echo nonsense > "$name"', "invalid ELF header"),
    ],
)
def test_a_compiler_that_fails_or_hangs_is_one_line(small, tmp_path, monkeypatch, capfd, commands, said):
    monkeypatch.setenv("CXX", str(script(tmp_path, commands)))
    monkeypatch.setattr(build, "PATIENCE", 0.5 if said == "timed out" else 60)
    assert native.load() is None
    *_, last = capfd.readouterr().err.splitlines()
    assert "cannot be compiled" in last and said in last


def test_without_a_compiler_there_is_no_library(small, monkeypatch, capfd):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert native.load() is None and capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "flags, level",
    [
        ("sse2", "x86-64"),
        ("sse2 avx2 fma", "x86-64"),
        (" ".join(build.LEVELS["x86-64-v3"]), "x86-64-v3"),
        (" ".join(build.LEVELS["x86-64-v4"] + build.LEVELS["x86-64-v3"]), "x86-64-v4"),
    ],
)
def test_a_wheel_has_a_library_for_each_level_of_processors(tmp_path, monkeypatch, flags, level):
    monkeypatch.setattr(native, "BUILT", tmp_path)
    monkeypatch.setattr(native, "processor", lambda: f"flags : {flags}")
    assert native.carried() is None
    for name in build.LEVELS:
        (tmp_path / f"{name}.so").touch()
    assert native.carried() == tmp_path / f"{level}.so"
    monkeypatch.setenv(native.LEVEL, "x86-64")
    assert native.carried() == tmp_path / "x86-64.so"


@pytest.mark.parametrize(
    "level, said",
    [
        ("avx9", "REFENGINE_CPU_LEVEL = avx9 is not one of x86-64-v4, x86-64-v3, x86-64"),
        ("x86-64-v4", "REFENGINE_CPU_LEVEL = x86-64-v4, which this processor does not support"),
    ],
)
def test_a_level_that_there_is_not_is_one_sentence(small, monkeypatch, level, said):
    monkeypatch.setattr(native, "processor", lambda: "flags : sse2 avx2")
    monkeypatch.setenv(native.LEVEL, level)
    with pytest.raises(InputError, match=said):
        native.load()


@needs_compiler
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="levels are those of x86-64")
def test_a_level_is_compiled_for_where_no_wheel_has_it(small, monkeypatch):
    plain = native.library(COMPILER)
    monkeypatch.setenv(native.LEVEL, "x86-64")
    assert native.flags() == ("-march=x86-64",)
    assert native.load().one() == 1 and native.library(COMPILER) != plain


def test_a_library_of_another_user_is_not_loaded(small, tmp_path, monkeypatch):
    path = tmp_path / "library.so"
    path.write_bytes(b"x" * 99 + native.digest(b"x" * 99))
    assert native.whole(path)
    monkeypatch.setattr(os, "getuid", lambda: 12345, raising=False)
    assert native.whole(path) == (path.stat().st_uid == 0)
