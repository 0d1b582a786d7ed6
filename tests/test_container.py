"""The Apptainer definition file, checked without Apptainer: its form, its shell code, what it names."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mpi import ROOT

DEFINITION = ROOT / "container" / "lapse-elmo.def"
SHELL = ("post", "environment", "runscript", "test")


def parts() -> tuple[dict[str, str], dict[str, str]]:
    """Return the header's values and the sections' texts, by name."""
    lines = [line for line in DEFINITION.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    header, sections, name = {}, {}, ""
    for line in lines:
        if line.startswith("%"):
            name = line[1:]
            assert name not in sections, f"two sections %{name}"
            sections[name] = ""
        elif name:
            sections[name] += line.removeprefix("    ") + "\n"
        elif line:
            key, _, value = line.partition(": ")
            header[key] = value
    return header, sections


def test_header_and_sections() -> None:
    header, sections = parts()
    assert header == {"Bootstrap": "docker", "From": "debian:12"}
    assert set(sections) == {"files", *SHELL}


@pytest.mark.parametrize("name", SHELL)
def test_shell_code(name: str) -> None:
    """shellcheck accepts the sections as code for sh, with which Apptainer runs them."""
    linter = shutil.which("shellcheck", path=str(Path(sys.prefix) / "bin"))
    assert linter, "make dev installs it"
    command = [linter, "-s", "sh", "-"]
    done = subprocess.run(command, input=parts()[1][name], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_it_installs_and_runs_the_tests() -> None:
    _, sections = parts()
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    called = [words.split() for words in re.findall(r"^make (.+)$", sections["post"] + sections["test"], re.MULTILINE)]
    assert [next(word for word in words if not word.startswith("-")) for words in called] == ["dev", "quick"]
    assert {"dev", "quick"} <= {*targets}
    for program in re.findall(r"(?<![\w.$/])bin/(\w+)", sections["test"]):
        assert (ROOT / "bin" / program).exists(), program
