"""The directories of compiled code: which one is taken where one is missing, shared, full or read-only."""

from __future__ import annotations

import errno
import io
import os
import pwd
import tempfile
from pathlib import Path
from typing import Any

import pytest

from lapse_elmo import code_cache, native


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(code_cache.CACHE, str(tmp_path / "cache"))
    monkeypatch.delenv(native.SWITCH, raising=False)
    path = tmp_path / "some.c"
    path.write_text("int answer(void) { return 42; }\n")
    if native.find_compiler() is None:
        pytest.skip("there is no C compiler")
    return path


def test_a_process_tries_once_whether_it_may_write(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []
    make = tempfile.TemporaryFile

    def counted(dir: Path) -> Any:
        made.append(dir)
        return make(dir=dir)

    monkeypatch.setattr(tempfile, "TemporaryFile", counted)
    other = tmp_path / "other.c"
    other.write_text("int other(void) { return 7; }\n")
    for path in (source, other):
        native.load(path)
    assert code_cache.cache_folder() == tmp_path / "cache" and made == [tmp_path / "cache"]


def test_a_folder_that_others_may_write_to_is_not_trusted(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    folder.chmod(0o777)
    assert code_cache.cache_folder() != folder
    folder.chmod(0o700)
    assert code_cache.cache_folder() == folder


def test_make_native_does_not_build_where_no_other_machine_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A directory of a project is often writable by its group."""
    monkeypatch.setenv(code_cache.CACHE, str(tmp_path))
    tmp_path.chmod(0o775)
    assert native.main() == 1
    assert f"others may write to {tmp_path}" in capsys.readouterr().out


def test_without_a_home_the_folder_is_among_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container may run as a user of whom it knows nothing; "~" must not become a directory's name then."""
    def unknown(user: int) -> None:
        raise KeyError(user)

    for name in ("HOME", "XDG_CACHE_HOME", code_cache.CACHE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path)
    assert code_cache.cache_folder() == tmp_path / "temporary" / f"lapse-elmo-{os.getuid()}"
    assert [path.name for path in tmp_path.iterdir()] == ["temporary"]


def test_what_is_built_ahead_serves_a_node_that_may_not_write_there(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where home directories are read-only on compute nodes; the temporary folder that is taken instead is empty."""
    assert not native.build_ahead(source)["any"]
    cache, make = source.parent / "cache", tempfile.TemporaryFile

    def refuse(dir: Path) -> Any:
        if dir == cache:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(dir))
        return make(dir=dir)

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(tempfile, "tempdir", str(source.parent / "temporary"))
    monkeypatch.setattr(native, "find_compiler", lambda: None)
    code_cache._require_writable.cache_clear()
    native._load.cache_clear()
    found = native.load(source)
    assert found is not None and Path(found._name).parent == cache, native.problem(source)
    assert code_cache.cache_folder().parent == source.parent / "temporary"


def test_a_full_home_directory_does_not_cost_the_kernels(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, build = source.parent / "cache", native._build

    class Full(io.BytesIO):
        def write(self, _: object) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def build_elsewhere(source: Path, library: Path, *arguments: Any) -> None:
        if library.parent == cache:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        build(source, library, *arguments)

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(native, "_build", build_elsewhere)
    assert native.load(source) is None and "No space left on device" in native.problem(source)
    make = tempfile.TemporaryFile
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir: Full() if dir == cache else make(dir=dir))
    native._load.cache_clear()
    found = native.load(source)
    assert found is not None and Path(found._name).parent == code_cache.temporary_folder()
