"""Every C source can be compiled by Clang, which is stricter than gcc."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from lapse_elmo import native
from tests.mpi import ROOT


def test_prefetches_have_literal_arguments() -> None:
    """Clang refuses others, also a constant argument of an inlined function."""
    for path in (ROOT / "lapse_elmo").rglob("*.c"):
        for arguments in re.findall(r"__builtin_prefetch\((.*?)\);", path.read_text()):
            assert not re.search(r", [a-z_]+$", arguments), f"{path.name}: {arguments}"


def test_clang_compiles_every_source(tmp_path: Path) -> None:
    """It is the only compiler of some machines, and cc on others, such as Cray's."""
    if (clang := shutil.which("clang")) is None:
        pytest.skip("there is no Clang")
    for path in (ROOT / "lapse_elmo").rglob("*.c"):
        for target in ((), ("-march=native",)):
            command = [clang, *native._OPTIONS, "-O0", *target, "-c", str(path), "-o", str(tmp_path / "object.o")]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
            assert done.returncode == 0, done.stderr
