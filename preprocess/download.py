"""``download``: the 1 Billion Word Benchmark and the vocabulary that ELMo was trained with.

A broken download goes on where it stopped, also in a later run: the bytes so far are kept as ``NAME.part``, with the
server's validator (ETag or Last-Modified) beside it, and asked for with Range and If-Range. Where the server answers
with the whole file, because it changed or because it knows no ranges, the download starts again.

No checksum of either file is published where they are, so none is built in: the SHA-256 of what came is written to
``NAME.sha256`` and checked by the next run; ``--sha256`` demands one.
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
from lapse_elmo.corpus.files import sync_directory, write_failed, write_whole
from lapse_elmo.errors import CorpusError, OutputError
from lapse_elmo.mpi.world import World

URLS = {
    "benchmark": "http://www.statmt.org/lm-benchmark/1-billion-word-language-modeling-benchmark-r13output.tar.gz",
    "vocab": "https://s3-us-west-2.amazonaws.com/allennlp/models/elmo/vocab-2016-09-10.txt",
}

_TIMEOUT_S = (15, 60)  # to connect, and between two packets
_LONGEST_PAUSE_S = 60.0
_READ_BYTES = 1 << 18


class _Broken(Exception):
    """The connection failed in a way that another try may mend."""


def download(options: DownloadOptions, world: World, sleep: Callable[[float], object] = time.sleep) -> None:
    """Run the command. :raises CorpusError: if a file cannot be fetched or is not what it should be.

    :raises OutputError: if it cannot be written.
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
    """Make sure that ``path`` is there and whole, fetching what is missing."""
    recorded = path.with_name(path.name + ".sha256")
    if path.exists():
        digest = _sha256(path)
        expected = options.sha256.lower() if options.sha256 else _recorded(recorded)
        if expected not in (None, digest):
            raise CorpusError(
                f"{path} has SHA-256 {digest[:16]}..., expected {expected[:16] if expected else ''}...; remove it and "
                "run this again"
            )
        print(f"{path}: there already, SHA-256 {digest}", flush=True)
    else:
        part = _fetch_with_retries(url, path, options.retries, sleep)
        digest = _sha256(part)
        if options.sha256 and digest != options.sha256.lower():
            part.unlink()
            _validator(part).unlink(missing_ok=True)
            raise CorpusError(
                f"what {url} sent has SHA-256 {digest}, expected {options.sha256.lower()}; it was removed: check "
                "--sha256 and the URL"
            )
        os.replace(part, path)
        sync_directory(path.parent)
        _validator(part).unlink(missing_ok=True)
        print(f"{path}: {path.stat().st_size:,} bytes, SHA-256 {digest}", flush=True)
    if _recorded(recorded) != digest:
        write_whole(recorded, f"{digest}  {path.name}\n".encode(), overwrite=True)


def _fetch_with_retries(url: str, path: Path, retries: int, sleep: Callable[[float], object]) -> Path:
    """Fetch to ``path``.part; tries that got something are not counted against ``retries``."""
    part = path.with_name(path.name + ".part")
    failures = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            _fetch(url, part)
            return part
        except (_Broken, requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
            after = part.stat().st_size if part.exists() else 0
            failures = 1 if after > before else failures + 1
            if failures > retries:
                kept = f"; {after:,} bytes are kept in {part}, run this again to go on" if after else ""
                raise CorpusError(f"cannot fetch {url}: {_reason(error)}, after {failures} tries{kept}") from None
            sleep(min(2.0 ** (failures - 1), _LONGEST_PAUSE_S))
        except requests.RequestException as error:
            raise CorpusError(f"cannot fetch {url}: {_reason(error)}; check it or give a mirror with --url") from None


def _fetch(url: str, part: Path) -> None:
    """One request that goes on where ``part`` ends. :raises _Broken: if it ended early."""
    have = part.stat().st_size if part.exists() else 0
    validator = _validator(part)
    headers = {"Accept-Encoding": "identity"}
    known = validator.read_text(encoding="latin-1") if have and validator.exists() else ""
    if have and known:
        headers |= {"Range": f"bytes={have}-", "If-Range": known}
    with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT_S) as answer:
        if answer.status_code == 416 and _total(answer) == have:
            return
        if answer.status_code == 416:
            part.unlink()
            raise _Broken("the server has another file than the one begun")
        if answer.status_code in (408, 425, 429, 500, 502, 503, 504):
            raise _Broken(f"the server answers {answer.status_code} {answer.reason}")
        if not answer.ok:
            raise CorpusError(
                f"cannot fetch {url}: the server answers {answer.status_code} {answer.reason}; give a mirror with --url"
            )
        resumed = answer.status_code == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        if answer.status_code == 206 and not resumed:
            part.unlink()
            raise _Broken("the server sent another range than the one asked for")
        if not resumed:
            have = 0
            tag = answer.headers.get("ETag", "")  # a weak ETag must not be used with If-Range
            stamp = tag if tag and not tag.startswith("W/") else answer.headers.get("Last-Modified", "")
            validator.write_text(stamp, encoding="latin-1")
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length and length.isdigit() else None
        _store(answer, part, have, total)


def _store(answer: requests.Response, part: Path, have: int, total: int | None) -> None:
    with (
        open(part, "r+b" if have else "wb") as file,
        tqdm(
            total=total, initial=have, unit="B", unit_scale=True, desc=part.stem,
            disable=not sys.stderr.isatty(), file=sys.stderr, leave=False,
        ) as progress,
    ):
        file.seek(have)
        # urllib3's own length check would throw away what came before the end; ours below keeps it.
        answer.raw.enforce_content_length = False
        for data in answer.iter_content(_READ_BYTES):
            file.write(data)
            progress.update(len(data))
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    if total is not None and size < total:
        raise _Broken(f"the connection ended after {size:,} of {total:,} bytes")
    if not size:
        raise _Broken("the server sent nothing")


def _extract(archive: Path, output: Path) -> None:
    """Unpack a tar file beside itself, each of its top directories whole or not at all.

    :raises CorpusError: if the archive is damaged or holds names that lead outside.
    :raises OutputError: if one of the directories exists, or the disk is full.
    """
    done = archive.with_name(archive.name + ".extracted")
    digest = _recorded(archive.with_name(archive.name + ".sha256"))
    if done.exists() and done.read_text(encoding="utf-8").strip() == digest:
        print(f"{archive}: unpacked already", flush=True)
        return
    temporary = output / f".{archive.name}.unpacking"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        try:
            with tarfile.open(archive, "r:*") as tar:
                tar.extractall(temporary, filter="data")
        except (tarfile.TarError, EOFError, zlib.error) as error:
            raise CorpusError(f"archive {archive} is damaged or unsafe ({error}); remove and fetch it again") from None
        names = sorted(os.listdir(temporary))
        for name in names:
            if os.path.lexists(output / name):
                raise OutputError(f"{output / name} exists already; move it away or give another --output")
        for name in names:
            os.rename(temporary / name, output / name)
    except OSError as error:
        raise write_failed(output, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    write_whole(done, f"{digest}\n".encode(), overwrite=True)
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
    """The length of the file in ``Content-Range: bytes */N``."""
    text = answer.headers.get("Content-Range", "").rpartition("/")[2]
    return int(text) if text.isdigit() else None


def _reason(error: Exception) -> str:
    """The innermost cause in one line."""
    text = str(error).strip().splitlines()
    cause: BaseException = error
    while cause.args and isinstance(cause.args[0], BaseException):
        cause = cause.args[0]
    reason = getattr(cause, "reason", None)
    return (str(reason) if reason else (text[0] if text else type(error).__name__))[:200]
