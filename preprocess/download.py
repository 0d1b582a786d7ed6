"""``download``: download the 1 Billion Word Benchmark and the vocabulary of ELMo.

An interrupted download is resumed, also by a later run: the bytes so far are stored in ``NAME.part`` and the server's
validator (ETag or Last-Modified) in ``NAME.part.etag``; the rest is requested with Range and If-Range. If the server
answers with the whole file, because it has changed or because the server does not support ranges, the download starts
again.

The sites publish no checksums of these files, so none is built in. The SHA-256 of the downloaded file is written to
``NAME.sha256`` and checked by the next run; ``--sha256`` sets the expected one.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tarfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import requests
from tqdm import tqdm

from lapse_elmo.config.preprocessing import DownloadOptions
from lapse_elmo.corpus.files import atomic_write, flush_file, flush_path, write_failed
from lapse_elmo.errors import CorpusError, OutputError
from lapse_elmo.mpi.world import World

URLS = {
    "benchmark": "http://www.statmt.org/lm-benchmark/1-billion-word-language-modeling-benchmark-r13output.tar.gz",
    "vocab": "https://s3-us-west-2.amazonaws.com/allennlp/models/elmo/vocab-2016-09-10.txt",
}

_TIMEOUT_S = (15, 60)  # for connecting, and between two packets
_MAX_BACKOFF_S = 60.0
_READ_BYTES = 1 << 18


class _ConnectionLost(Exception):
    """The connection failed in a way that another attempt may overcome."""


#: Errors after which a download is tried again.
_TRANSIENT_ERRORS = (
    _ConnectionLost, requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError
)


def download(options: DownloadOptions, world: World, sleep: Callable[[float], object] = time.sleep) -> None:
    """Run the command.

    Args:
        options: The options of the command.
        world: The ranks; only rank 0 calls this.
        sleep: Called between retries with the seconds to wait; tests replace it.

    Raises:
        CorpusError: A file cannot be downloaded, or has another checksum than expected.
        OutputError: A file cannot be written.
    """
    output = Path(options.output)
    for what in ("benchmark", "vocab") if options.what == "all" else (options.what,):
        url = options.url or URLS[what]
        path = output / (url.split("?")[0].rstrip("/").rsplit("/", 1)[-1] or what)
        try:
            output.mkdir(parents=True, exist_ok=True)
            _get(url, path, options, sleep)
            if what == "benchmark":
                _extract(path, output)
        except OSError as error:
            raise write_failed(path, error) from None


def _get(url: str, path: Path, options: DownloadOptions, sleep: Callable[[float], object]) -> None:
    """Download ``path`` unless it exists, verify its checksum, and record it."""
    recorded = path.with_name(path.name + ".sha256")
    if path.exists():
        digest = _sha256(path)
        expected = options.sha256.lower() if options.sha256 else _recorded(recorded)
        if expected not in (None, digest):
            raise CorpusError(
                f"{path} has SHA-256 {digest[:16]}..., expected {expected[:16] if expected else ''}...; remove it and "
                "run the command again"
            )
        print(f"{path}: already downloaded, SHA-256 {digest}", flush=True)
    else:
        part = _fetch_with_retries(url, path, options.retries, sleep)
        digest = _sha256(part)
        if options.sha256 and digest != options.sha256.lower():
            part.unlink()
            _validator(part).unlink(missing_ok=True)
            raise CorpusError(
                f"the file from {url} has SHA-256 {digest}, expected {options.sha256.lower()}; it was removed: check "
                "--sha256 and --url"
            )
        # A file under the final name is complete: _store has synced its content.
        os.replace(part, path)
        flush_path(path.parent)
        _validator(part).unlink(missing_ok=True)
        print(f"{path}: {path.stat().st_size:,} bytes, SHA-256 {digest}", flush=True)
    if _recorded(recorded) != digest:
        atomic_write(recorded, f"{digest}  {path.name}\n".encode(), overwrite=True)


def _fetch_with_retries(url: str, path: Path, retries: int, sleep: Callable[[float], object]) -> Path:
    """Download to ``path``.part and return it.

    ``retries`` limits consecutive attempts without progress: an attempt that received data starts the count again.
    """
    part = path.with_name(path.name + ".part")
    failures = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            _fetch(url, part)
            return part
        except _TRANSIENT_ERRORS as error:
            after = part.stat().st_size if part.exists() else 0
            failures = 1 if after > before else failures + 1
            if failures > retries:
                kept = f"; {after:,} bytes are stored in {part}, run the command again to resume" if after else ""
                raise CorpusError(f"cannot download {url}: {_reason(error)}, after {failures} attempts{kept}") from None
            sleep(min(2.0 ** (failures - 1), _MAX_BACKOFF_S))
        except requests.RequestException as error:
            raise CorpusError(
                f"cannot download {url}: {_reason(error)}; check the URL, or give a mirror with --url"
            ) from None


def _fetch(url: str, part: Path) -> None:
    """Make one request that resumes at the end of ``part``.

    Raises:
        _ConnectionLost: The response ended early, or does not fit ``part``.
    """
    offset = part.stat().st_size if part.exists() else 0
    validator = _validator(part)
    # Uncompressed: offsets and lengths must be those of the file.
    headers = {"Accept-Encoding": "identity"}
    known = validator.read_text(encoding="latin-1") if offset and validator.exists() else ""
    if offset and known:
        headers |= {"Range": f"bytes={offset}-", "If-Range": known}
    with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT_S) as answer:
        # Nothing is left to request: an earlier run was stopped after the last byte.
        if answer.status_code == 416 and _total(answer) == offset:
            return
        if answer.status_code == 416:
            part.unlink()
            raise _ConnectionLost("the file on the server has changed since the download began")
        if answer.status_code in (408, 425, 429, 500, 502, 503, 504):
            raise _ConnectionLost(f"the server answers {answer.status_code} {answer.reason}")
        if not answer.ok:
            raise CorpusError(
                f"cannot download {url}: the server answers {answer.status_code} {answer.reason}; give a mirror with "
                "--url"
            )
        resumed = answer.status_code == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {offset}-")
        if answer.status_code == 206 and not resumed:
            part.unlink()
            raise _ConnectionLost("the server sent a different range from the one requested")
        if not resumed:
            offset = 0
            part.unlink(missing_ok=True)  # before its validator changes: a later run would resume it with the new one
            tag = answer.headers.get("ETag", "")  # a weak ETag must not be used with If-Range
            stamp = tag if tag and not tag.startswith("W/") else answer.headers.get("Last-Modified", "")
            validator.write_text(stamp, encoding="latin-1")
        length = answer.headers.get("Content-Length")
        total = offset + int(length) if length and length.isdigit() else None
        _store(answer, part, offset, total)


def _store(answer: requests.Response, part: Path, offset: int, total: int | None) -> None:
    """Write a response to ``part`` from byte ``offset`` on, with a progress bar."""
    with (
        open(part, "r+b" if offset else "wb") as file,
        tqdm(
            total=total, initial=offset, unit="B", unit_scale=True, desc=part.stem,
            disable=not sys.stderr.isatty(), file=sys.stderr, leave=False,
        ) as progress,
    ):
        file.seek(offset)
        # urllib3 would check the length itself, but discard the data of its last read; the check below keeps it.
        answer.raw.enforce_content_length = False
        for data in answer.iter_content(_READ_BYTES):
            file.write(data)
            progress.update(len(data))
        flush_file(file)
        size = file.tell()
    if total is not None and size < total:
        raise _ConnectionLost(f"the connection ended after {size:,} of {total:,} bytes")
    if not size:
        raise _ConnectionLost("the server sent nothing")


def _extract(archive: Path, output: Path) -> None:
    """Unpack a tar file into ``output``, each of its top-level directories atomically.

    Raises:
        CorpusError: The archive is damaged, or has names that lead outside ``output``.
        OutputError: One of the directories exists, or the disk is full.
    """
    done = archive.with_name(archive.name + ".extracted")
    digest = _recorded(archive.with_name(archive.name + ".sha256"))
    if done.exists() and done.read_text(encoding="utf-8").strip() == digest:
        print(f"{archive}: already unpacked", flush=True)
        return
    temporary = output / f".{archive.name}.unpacking"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        try:
            with tarfile.open(archive, "r:*") as tar:
                # The filter refuses names outside of the directory, links that lead out of it, and devices.
                tar.extractall(temporary, filter="data")
        except (tarfile.TarError, EOFError, zlib.error) as error:
            raise CorpusError(f"archive {archive} is damaged or unsafe ({error}); remove it and retry") from None
        names = sorted(os.listdir(temporary))
        # All are checked before the first is moved: half an archive must not mix with what is there.
        for name in names:
            if os.path.lexists(output / name):
                raise OutputError(f"{output / name} already exists; move it away, or give another --output")
        for folder, _, files in os.walk(temporary):  # what has its name counts as whole, also after a crash
            for path in (*(os.path.join(folder, name) for name in files), folder):
                if not os.path.islink(path):
                    flush_path(path)
        for name in names:
            os.rename(temporary / name, output / name)
    except OSError as error:
        raise write_failed(output, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    atomic_write(done, f"{digest}\n".encode(), overwrite=True)
    print(f"{output}: unpacked {', '.join(names)}", flush=True)


def _validator(part: Path) -> Path:
    return part.with_name(part.name + ".etag")


def _recorded(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").split()[0]
    except (OSError, IndexError, UnicodeDecodeError):
        return None


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while data := file.read(1 << 20):
            digest.update(data)
    return digest.hexdigest()


def _total(answer: requests.Response) -> int | None:
    """Return the length N of the file from ``Content-Range: bytes */N``, or None."""
    text = answer.headers.get("Content-Range", "").rpartition("/")[2]
    return int(text) if text.isdigit() else None


def _reason(error: Exception) -> str:
    """Return the innermost cause in one line."""
    text = str(error).strip().splitlines()
    cause: BaseException = error
    while cause.args and isinstance(cause.args[0], BaseException):
        cause = cause.args[0]
    reason = getattr(cause, "reason", None)
    return (str(reason) if reason else (text[0] if text else type(error).__name__))[:200]
