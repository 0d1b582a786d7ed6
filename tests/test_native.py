"""Compiled sources: built once for many processes, with floats as written, and never a reason to fail."""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from lapse_elmo import code_cache, native
from tests import fork_server
from tests.mpi import ROOT

SOURCE = """
#include <omp.h>
float larger(float a, float b) { return a > b ? a : b; }
float half_of_smallest(float x) { return x * 0.5f; }
int threads(void) {
  int count = 1;
#ifdef _OPENMP
  #pragma omp parallel
  {
    #pragma omp single
    count = omp_get_num_threads();
  }
#endif
  return count;
}
"""
LOADED = "from lapse_elmo import native; from pathlib import Path; import sys; "
# Prints the library of each source, after the reason if there is none; a hanging compiler is waited for 2 s.
NAMED = f"""{LOADED}
native._COMPILER_TIME_S = 2
for source in map(Path, sys.argv[1:]):
    library = native.load(source)
    print(library._name if library else native.problem(source))
"""
# A compiler that says which version it has, counts what it compiles, and hangs with a child if it is told to.
COMPILER = """#!/bin/sh
if [ "$1" = --version ]; then echo "some version $VERSION"; exit; fi
echo compiles >> "$0.log"
[ -z "$HANGS" ] || { sleep 300 & echo $! > "$0.child"; wait; }
exec cc "$@"
"""


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(code_cache.CACHE, str(tmp_path / "cache"))
    monkeypatch.delenv(native.SWITCH, raising=False)
    path = tmp_path / "some.c"
    path.write_text(SOURCE)
    return path


@pytest.fixture
def library(source: Path) -> ctypes.CDLL:
    found = native.load(source)
    if found is None:
        pytest.skip(native.problem(source))
    found.larger.restype = found.half_of_smallest.restype = ctypes.c_float
    found.larger.argtypes, found.half_of_smallest.argtypes = [ctypes.c_float] * 2, [ctypes.c_float]
    return found


def test_floats_are_as_written(library: ctypes.CDLL) -> None:
    assert library.larger(float("nan"), 1.0) == 1.0 and library.larger(1.0, float("nan")) != 1.0
    assert library.half_of_smallest(2.0**-148) == 2.0**-149
    assert float(torch.tensor(2.0**-148) * 0.5) == 2.0**-149, "torch's own arithmetic was changed"


def test_shares_torchs_threads(library: ctypes.CDLL) -> None:
    if library.threads() == 1 and torch.get_num_threads() > 1:
        pytest.skip("torch uses no OpenMP that the compiler knows")
    before = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert library.threads() == count
    finally:
        torch.set_num_threads(before)


def test_many_processes_build_at_once(source: Path, library: ctypes.CDLL, tmp_path: Path) -> None:
    environment = {**os.environ, code_cache.CACHE: str(tmp_path / "another")}
    command = fork_server.command("-c", f"{LOADED} sys.exit(native.load(Path(sys.argv[1])) is None)", str(source))
    jobs = [subprocess.Popen(command, env=environment, cwd=ROOT) for _ in range(4)]
    assert [job.wait(timeout=60) for job in jobs] == [0] * 4
    assert len(list((tmp_path / "another").glob("*.so"))) == 1
    assert {path.suffix for path in (tmp_path / "another").iterdir()} <= {".so", ".lock"}


@pytest.mark.parametrize("change", [{native.SWITCH: "0"}, {"PATH": "", "CC": "no-such-compiler"}])
def test_without_a_compiler_there_is_none_and_a_reason(source: Path, change: dict[str, str]) -> None:
    code = f"{LOADED} path = Path(sys.argv[1]); sys.exit(native.load(path) is not None or not native.problem(path))"
    command = fork_server.command("-c", code, str(source))
    assert subprocess.run(command, env={**os.environ, **change}, cwd=ROOT, timeout=60).returncode == 0
    assert not list(source.parent.glob("cache/*.so"))


def test_a_source_that_does_not_compile_gives_a_reason(source: Path) -> None:
    source.write_text("int f(void) { return }")
    assert native.load(source) is None
    assert len(native.problem(source).splitlines()) == 1 and "error: expected expression" in native.problem(source)


def test_what_is_built_ahead_serves_a_node_without_a_compiler(source: Path, library: ctypes.CDLL) -> None:
    """The node never gets a library with instructions that its processor lacks."""
    reasons = native.build_ahead(source)
    assert not reasons["any"]
    (source.parent / "cache" / "x").touch()  # an unrelated file is ignored
    code = f"{LOADED} found = native.load(Path(sys.argv[1])); print(found._name if found else None)"
    command = fork_server.command("-c", code, str(source))
    bare = {**os.environ, "PATH": "", "CC": "no-such-compiler"}
    found = subprocess.run(command, env=bare, cwd=ROOT, timeout=60, check=True, capture_output=True, text=True).stdout
    features = native.processor_features()
    runs_here = [name for name, _, needed in native._TARGETS if needed <= features and not reasons[name]]
    assert [Path(found.strip())] == native._paths_ahead(source.parent / "cache", source, runs_here[0])
    source.write_text(f"{SOURCE}\n")  # another source: what was built of the old one is not taken
    assert subprocess.run(command, env=bare, cwd=ROOT, timeout=60, capture_output=True, text=True).stdout == "None\n"


def test_a_library_is_loaded_again_without_a_look_at_the_disk(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = native.load(source)
    monkeypatch.setattr(os, "lstat", lambda *_, **__: pytest.fail("a training step loads some 70 times"))
    assert native.load(source) is library


def test_what_is_built_ahead_loads_with_the_openmp_that_is_there(
    source: Path, library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clang's code with threads calls an OpenMP library that no process has, as this source does with any compiler."""
    source.write_text("""
#ifdef _OPENMP
void not_here(void);
void (*called)(void) = not_here;
#endif
""")
    assert not native.build_ahead(source)["any"]
    monkeypatch.setattr(native, "find_compiler", lambda: None)
    native._load.cache_clear()
    assert native.load(source) is not None
    (source.parent / "cache").chmod(0o777)
    native._load.cache_clear()
    assert native.load(source) is None, "others may write there"


def test_what_loads_with_no_openmp_is_built_for_no_processor(source: Path, library: ctypes.CDLL) -> None:
    source.write_text("void not_here(void);\nvoid (*called)(void) = not_here;\n")
    reasons = native.build_ahead(source)
    assert all("not_here" in reason for reason in reasons.values()), reasons


def test_make_native_builds_every_source(tmp_path: Path) -> None:
    """For every target that the compiler knows; with little optimisation, which takes most of the time."""
    if native.find_compiler() is None:
        pytest.skip("there is no C compiler")
    compiler, folder = tmp_path / "cc", tmp_path / "cache"
    compiler.write_text(f'#!/bin/sh\nexec {native.find_compiler()} "$@" -O1\n')
    compiler.chmod(0o755)
    environment = {**os.environ, code_cache.CACHE: str(folder), "CC": str(compiler)}
    command = fork_server.command("-m", "lapse_elmo.native")
    done = subprocess.run(command, env=environment, cwd=ROOT, timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for path in (ROOT / "lapse_elmo").rglob("*.c"):
        assert native._paths_ahead(folder, path, "any")


@pytest.fixture
def compiler(library: ctypes.CDLL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler of the test, named by CC."""
    path = tmp_path / "some-cc"
    path.write_text(COMPILER)
    path.chmod(0o755)
    monkeypatch.setenv("CC", str(path))
    return path


def plain(folder: Path, name: str) -> Path:
    """Write a source without OpenMP, for which torch need not be imported."""
    path = folder / name
    path.write_text(f"int answer(void) {{ return {len(name)}; }}\n")
    return path


def start(*sources: Path, **change: str) -> subprocess.Popen[str]:
    command = fork_server.command("-c", NAMED, *map(str, sources))
    return subprocess.Popen(command, env={**os.environ, **change}, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def named(*sources: Path, **change: str) -> list[str]:
    """Load in a process of its own: a process loads a path only once."""
    with start(*sources, **change) as job:
        output, _ = job.communicate(timeout=60)
    assert job.returncode == 0
    return output.splitlines()


def test_a_compiler_that_hangs_is_waited_for_once(compiler: Path, tmp_path: Path) -> None:
    """By two processes with two sources; some minutes later it is tried again."""
    sources, log = [plain(tmp_path, "a.c"), plain(tmp_path, "bc.c")], Path(f"{compiler}.log")
    jobs = [start(*sources, HANGS="1") for _ in range(2)]
    outputs = [job.communicate(timeout=60)[0].splitlines() for job in jobs]
    said = [line for lines in outputs for line in lines]
    assert len(said) == 4 and log.read_text() == "compiles\n", said
    assert sum("has not finished within 2 s" in line for line in said) == 1, said
    assert sum("hung a short time ago" in line for line in said) == 3, said
    child = Path("/proc", Path(f"{compiler}.child").read_text().strip())
    assert not child.exists() or ") Z " in (child / "stat").read_text(), "the compiler's child goes on"
    assert "hung a short time ago" in named(sources[0])[0]
    (mark,) = (tmp_path / "cache").glob("*.hung")
    old = time.time() - native._HANGS_FOR_S - 1
    os.utime(mark, (old, old))
    assert all(name.endswith(".so") for name in named(*sources))


def test_a_compiler_that_hangs_without_work_is_waited_for_once(
    compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler.write_text('#!/bin/sh\necho asked >> "$0.log"\nsleep 300\n')
    monkeypatch.setattr(native, "_SHOWS_VERSION_S", 1)
    assert native.load(plain(tmp_path, "a.c")) is None
    assert native.load(plain(tmp_path, "bc.c")) is None
    assert Path(f"{compiler}.log").read_text() == "asked\n"
    compiler.write_text(COMPILER)  # another program: the mark is not of this one
    assert native.load(plain(tmp_path, "def.c")) is not None


def test_a_compiler_that_cannot_be_killed_is_left_alone(
    compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a file server that is gone holds it in the kernel."""
    compiler.write_text('#!/bin/sh\necho $$ > "$0.pid"\nexec sleep 10\n')
    monkeypatch.setattr(native, "_SHOWS_VERSION_S", 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "killpg", lambda *_: None)
        assert native.load(plain(tmp_path, "a.c")) is None
    os.kill(int(Path(f"{compiler}.pid").read_text()), signal.SIGKILL)  # fails if it has been waited for


def test_another_compiler_or_c_library_means_another_library(
    compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, folder = plain(tmp_path, "a.c"), tmp_path / "cache"
    first, again, newer = named(source), named(source), named(source, VERSION="2")
    assert first == again != newer
    options = native._OPTIONS
    key = native._key(source, str(compiler), options)
    built = native.build_ahead(source)
    old = native._path_ahead(folder, source, "any", str(compiler))
    assert not built["any"] and old.exists()
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "9.99"))
    assert native._key(source, str(compiler), options) != key
    assert native._paths_ahead(folder, source, "any") == [old], "one of another C library is better than none"
    native.build_ahead(source)
    new = native._path_ahead(folder, source, "any", str(compiler))
    os.utime(new, (0, 0))
    assert native._paths_ahead(folder, source, "any") == [new, old]
    native._version.cache_clear()
    monkeypatch.setenv("VERSION", "3")
    native.build_ahead(source)
    assert len(native._paths_ahead(folder, source, "any")) == 3
    native._version.cache_clear()


def test_a_library_of_a_faster_process_is_not_replaced(compiler: Path, tmp_path: Path) -> None:
    """Without locks, machines that share a folder build at the same time: what one has loaded keeps its file."""
    source = plain(tmp_path, "a.c")
    (name,) = named(source)
    library, built = Path(name), tmp_path / "built"
    whole, loaded = library.read_bytes(), library.stat().st_ino
    built.write_bytes(whole)
    native._give_name(built, library)
    assert library.stat().st_ino == loaded
    library.write_bytes(whole[:-1])
    native._give_name(built, library)
    assert library.stat().st_ino != loaded and library.read_bytes() == whole


def test_a_damaged_library_is_built_again(compiler: Path, tmp_path: Path) -> None:
    source = plain(tmp_path, "a.c")
    (name,) = named(source)
    whole = Path(name).read_bytes()
    for damaged in (whole[:4096], b"", whole[:-40] + bytes(40), whole[:200] + bytes([whole[200] ^ 1]) + whole[201:]):
        Path(name).write_bytes(damaged)
        assert named(source) == [name]
        assert native._is_whole(Path(name))
    assert not native.build_ahead(source)["any"]
    bare = {"PATH": "", "CC": "no-such-compiler"}
    for path in native._TARGETS:
        for library in native._paths_ahead(tmp_path / "cache", source, path[0]):
            library.write_bytes(whole[:4096])
    assert "there is no C compiler" in named(source, **bare)[0]
    native.build_ahead(source)
    assert named(source, **bare)[0].endswith(".so")
