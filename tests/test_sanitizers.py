"""Every C source under AddressSanitizer and UndefinedBehaviorSanitizer, in tests that compare it with the fallback."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lapse_elmo import code_cache, native
from tests.mpi import ROOT
from tests.sanitized_program import OPTIONS

TESTS = {
    "prepacked.c": "tests/model/test_products.py",
    "dense.c": "tests/model/test_dense.py",
    "pointwise.c": "tests/model/test_pointwise.py",
    "lstm_steps.c": "tests/model/test_lstm_steps.py",
    "rows.c": "tests/ps/test_rows.py",
    "words.c": "tests/corpus/test_words.py",
}
WITHOUT_ACCESSES = {"ordering.c"}  # a fence
PAST_ITS_END = "void past_the_end(float *values, long number) { values[number] = 1.0f; }"
TIME_S = 500


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the environment that loads the sanitizers' libraries; skip the test if there are none."""
    compiler = native.find_compiler()
    if compiler is None:
        pytest.skip("there is no C compiler")
    libraries = []
    for name in ("libasan.so", "libubsan.so"):
        path = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout
        libraries.append(path.strip())
    if not all(Path(path).is_absolute() for path in libraries):
        pytest.skip("the compiler has no sanitizers as shared libraries")
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:exitcode=77",  # Python leaves memory to the end of the process
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1:exitcode=77",
        code_cache.CACHE: str(tmp_path_factory.mktemp("sanitized")),
    }


def test_a_write_past_the_end_is_found(environment: dict[str, str], tmp_path: Path) -> None:
    """A write past the end of a tensor is reported: the sanitizers are active and see torch's memory."""
    source = tmp_path / "wrong.c"
    source.write_text(PAST_ITS_END)
    code = (
        "import ctypes, sys, torch; from pathlib import Path; from lapse_elmo import native; "
        f"native._VARIANTS = (('-fopenmp-simd', *{OPTIONS!r}),); library = native.load(Path(sys.argv[1])); "
        "values = torch.zeros(1024); library.past_the_end(ctypes.c_void_p(values.data_ptr()), ctypes.c_long(1024))"
    )
    command = [sys.executable, "-c", code, str(source)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=TIME_S)
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr, done.stderr[-2000:]


def test_every_source_has_its_tests() -> None:
    assert set(TESTS) | WITHOUT_ACCESSES == {path.name for path in (ROOT / "lapse_elmo").rglob("*.c")}


def test_sources_run_clean(environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "tests.sanitized_program", *TESTS.values()]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=TIME_S)
    said = done.stdout + done.stderr
    # Sums that are not vectorised round otherwise, so comparisons may fail; that of the fast builds is another test's.
    assert done.returncode in (0, 1) and re.search(r"\d+ passed", done.stdout), said[-4000:]
    assert "AddressSanitizer" not in said and "runtime error:" not in said, said[-4000:]
    for source in TESTS:
        assert list(Path(environment[code_cache.CACHE]).glob(f"{Path(source).stem}-*.so")), f"{source} was not compiled"
