"""``download`` from a server on this machine that can be told to misbehave."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from lapse_elmo.config.preprocessing import DownloadOptions
from lapse_elmo.errors import ConfigError, CorpusError, OutputError
from lapse_elmo.mpi.world import solo
from preprocess import download as command
from preprocess.download import download


class Site(ThreadingHTTPServer):
    """Serves ``content``; each of the next responses is cut off after the number of bytes in ``break_after``."""

    content = bytes(range(256)) * 40
    tag = '"one"'
    ranges = True
    status = 200
    break_after: list[int]
    seen: list[str | None]


class Handler(BaseHTTPRequestHandler):
    server: Site

    def do_GET(self) -> None:
        site, start = self.server, 0
        wanted = self.headers.get("Range")
        site.seen.append(wanted)
        if site.status != 200:
            self.send_error(site.status)
            return
        if wanted and site.ranges and self.headers.get("If-Range") == site.tag:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(site.content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(site.content)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(site.content) - 1}/{len(site.content)}")
        else:
            self.send_response(200)
        self.send_header("ETag", site.tag)
        self.send_header("Content-Length", str(len(site.content) - start))
        self.end_headers()
        body = site.content[start:]
        self.wfile.write(body[: site.break_after.pop(0)] if site.break_after else body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def site() -> Iterator[Site]:
    with Site(("127.0.0.1", 0), Handler) as server:
        server.break_after, server.seen = [], []
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def fetch(site: Site, output: Path, what: str = "vocab", retries: int = 2, sha256: str | None = None) -> list[float]:
    """Download from ``site``; returns the pauses between retries in seconds."""
    pauses: list[float] = []
    url = f"http://127.0.0.1:{site.server_port}/file.bin"
    download(DownloadOptions(what, str(output), url, sha256, retries), solo(), pauses.append)
    return pauses


def test_whole_file_then_nothing_to_do(site: Site, tmp_path: Path) -> None:
    fetch(site, tmp_path)
    fetch(site, tmp_path)
    assert (tmp_path / "file.bin").read_bytes() == site.content
    assert (tmp_path / "file.bin.sha256").read_text().split()[0] == hashlib.sha256(site.content).hexdigest()
    assert site.seen == [None]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.bin", "file.bin.sha256"]
    (tmp_path / "file.bin").write_bytes(b"damaged")
    with pytest.raises(CorpusError, match="remove it"):
        fetch(site, tmp_path)


def test_goes_on_where_it_broke(site: Site, tmp_path: Path) -> None:
    site.break_after = [1000, 500]
    assert len(fetch(site, tmp_path)) == 2
    assert site.seen == [None, "bytes=1000-", "bytes=1500-"]
    assert (tmp_path / "file.bin").read_bytes() == site.content


def test_goes_on_in_a_later_run(site: Site, tmp_path: Path) -> None:
    site.break_after = [1000, 0, 0]
    with pytest.raises(CorpusError, match="1,000 bytes are stored"):
        fetch(site, tmp_path, retries=1)
    fetch(site, tmp_path)
    assert site.seen[-1] == "bytes=1000-"
    assert (tmp_path / "file.bin").read_bytes() == site.content


def test_starts_again_without_ranges_or_with_a_changed_file(site: Site, tmp_path: Path) -> None:
    site.break_after, site.ranges = [1000], False
    fetch(site, tmp_path / "a")
    assert (tmp_path / "a" / "file.bin").read_bytes() == site.content
    site.break_after, site.ranges = [1000, 0, 0, 0], True
    with pytest.raises(CorpusError):
        fetch(site, tmp_path / "b")
    site.break_after, site.content, site.tag = [], b"new" * 700, '"two"'
    fetch(site, tmp_path / "b")
    assert (tmp_path / "b" / "file.bin").read_bytes() == site.content


def test_a_part_that_was_whole_already(site: Site, tmp_path: Path) -> None:
    (tmp_path / "file.bin.part").write_bytes(site.content)
    (tmp_path / "file.bin.part.etag").write_text(site.tag)
    fetch(site, tmp_path)
    assert (tmp_path / "file.bin").read_bytes() == site.content


def test_a_changed_file_is_not_appended_to_the_old_one(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is killed when it has noted that the file is another one, before it has stored any of it."""
    site.break_after = [1000, 0]
    with pytest.raises(CorpusError):
        fetch(site, tmp_path, retries=0)
    site.break_after, site.content, site.tag = [], b"new" * 700, '"two"'

    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(command, "_store", kill)
        fetch(site, tmp_path)
    fetch(site, tmp_path)
    assert (tmp_path / "file.bin").read_bytes() == site.content


def test_refusals(site: Site, tmp_path: Path) -> None:
    site.status = 404
    with pytest.raises(CorpusError, match="404 Not Found"):
        fetch(site, tmp_path)
    assert len(site.seen) == 1
    site.status = 503
    with pytest.raises(CorpusError, match=r"503.*after 3 attempts"):
        fetch(site, tmp_path)
    site.status = 200
    with pytest.raises(CorpusError, match="expected 0000"):
        fetch(site, tmp_path, sha256="0" * 64)
    assert not (tmp_path / "file.bin").exists()
    fetch(site, tmp_path, sha256=hashlib.sha256(site.content).hexdigest().upper())
    with pytest.raises(CorpusError, match="cannot download"):
        download(DownloadOptions("vocab", str(tmp_path / "x"), "http://127.0.0.1:9/f", None, 0), solo())
    with pytest.raises(ConfigError, match="for one file"):
        DownloadOptions("all", url="http://127.0.0.1/")


def archive(names: list[str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"a b"))
    return buffer.getvalue()


def test_what_was_unpacked_is_on_the_disk_before_it_gets_its_name(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, rename = os.fsync, os.rename

    def flushed(file: int) -> None:
        done.append(os.readlink(f"/proc/self/fd/{file}"))
        fsync(file)

    def renamed(old: Path, new: Path) -> None:
        done.append("rename")
        rename(old, new)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "rename", renamed)
    site.content = archive(["top/train/one", "top/heldout/two"])
    fetch(site, tmp_path, "benchmark")
    hidden = str(tmp_path / ".file.bin.unpacking")
    before = {path.removeprefix(hidden) for path in done[: done.index("rename")]}
    assert {"/top/train/one", "/top/heldout/two", "/top/train", "/top/heldout", "/top"} <= before


def test_the_archive_is_unpacked_once_and_safely(site: Site, tmp_path: Path) -> None:
    site.content = archive(["top/train/one", "top/heldout/two"])
    fetch(site, tmp_path / "a", "benchmark")
    assert (tmp_path / "a" / "top" / "train" / "one").read_text() == "a b"
    fetch(site, tmp_path / "a", "benchmark")
    site.content = archive(["../outside"])
    with pytest.raises(CorpusError, match="damaged or unsafe"):
        fetch(site, tmp_path / "b" / "c", "benchmark")
    assert not (tmp_path / "b" / "outside").exists()
    site.content = archive(["top/one"])[:-30]
    with pytest.raises(CorpusError, match="damaged or unsafe"):
        fetch(site, tmp_path / "d", "benchmark")
    assert not (tmp_path / "d" / "top").exists()
    site.content = archive(["top/one"])
    (tmp_path / "e" / "top").mkdir(parents=True)
    with pytest.raises(OutputError, match="already exists"):
        fetch(site, tmp_path / "e", "benchmark")
