"""Compiled sources: built once for many processes, with floats as written, and never a reason to fail."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lapse_elmo import native
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


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(native.CACHE, str(tmp_path / "cache"))
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
    environment = {**os.environ, native.CACHE: str(tmp_path / "another")}
    command = [sys.executable, "-c", f"{LOADED} sys.exit(native.load(Path(sys.argv[1])) is None)", str(source)]
    jobs = [subprocess.Popen(command, env=environment, cwd=ROOT) for _ in range(4)]
    assert [job.wait(timeout=60) for job in jobs] == [0] * 4
    assert len(list((tmp_path / "another").glob("*.so"))) == 1
    assert {path.suffix for path in (tmp_path / "another").iterdir()} <= {".so", ".lock"}


@pytest.mark.parametrize("change", [{native.SWITCH: "0"}, {"PATH": "", "CC": "no-such-compiler"}])
def test_without_a_compiler_there_is_none_and_a_reason(source: Path, change: dict[str, str]) -> None:
    code = f"{LOADED} path = Path(sys.argv[1]); sys.exit(native.load(path) is not None or not native.problem(path))"
    done = subprocess.run([sys.executable, "-c", code, str(source)], env={**os.environ, **change}, cwd=ROOT, timeout=60)
    assert done.returncode == 0
    assert not list(source.parent.glob("cache/*.so"))


def test_a_source_that_does_not_compile_gives_a_reason(source: Path) -> None:
    source.write_text("int f(void) { return }")
    assert native.load(source) is None
    assert len(native.problem(source).splitlines()) == 1 and native.problem(source)


def test_a_folder_that_others_may_write_to_is_not_trusted(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    folder.chmod(0o777)
    assert native.cache_folder() != folder
    folder.chmod(0o700)
    assert native.cache_folder() == folder


def test_what_is_built_ahead_serves_a_node_without_a_compiler(source: Path, library: ctypes.CDLL) -> None:
    """And never a library whose instructions the processor lacks."""
    reasons = native.build_ahead(source)
    assert not reasons["any"]
    (source.parent / "cache" / "x").touch()  # whatever else lies there
    code = f"{LOADED} found = native.load(Path(sys.argv[1])); print(found._name if found else None)"
    command = [sys.executable, "-c", code, str(source)]
    bare = {**os.environ, "PATH": "", "CC": "no-such-compiler"}
    found = subprocess.run(command, env=bare, cwd=ROOT, timeout=60, check=True, capture_output=True, text=True).stdout
    features = native.processor_features()
    runs_here = [name for name, _, needed in native._TARGETS if needed <= features and not reasons[name]]
    assert Path(found.strip()) == native._path_ahead(source.parent / "cache", source, runs_here[0])
    source.write_text(f"{SOURCE}\n")  # another source: what was built of the old one is not taken
    assert subprocess.run(command, env=bare, cwd=ROOT, timeout=60, capture_output=True, text=True).stdout == "None\n"


def test_make_native_builds_every_source(tmp_path: Path) -> None:
    if native.find_compiler() is None:
        pytest.skip("there is no C compiler")
    environment = {**os.environ, native.CACHE: str(tmp_path)}
    command = [sys.executable, "-m", "lapse_elmo.native"]
    done = subprocess.run(command, env=environment, cwd=ROOT, timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for path in (ROOT / "lapse_elmo").rglob("*.c"):
        assert native._path_ahead(tmp_path, path, "any").exists()
