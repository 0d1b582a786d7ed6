"""Find text files, split them into chunks and read them."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import sys
from pathlib import Path

import backports
import pytest
from backports import zstd
from hypothesis import given
from hypothesis import strategies as st

from lapse_elmo.corpus import compressed, text
from lapse_elmo.corpus.text import assign, find_texts, read_blocks, split_into_chunks
from lapse_elmo.errors import CorpusError

CHECKSUMS = {int(zstd.CompressionParameter.checksum_flag): 1}  # as the program zstd
COMPRESS = {"gzip": gzip.compress, "zstd": lambda data: zstd.compress(data, options=CHECKSUMS),
            "xz": lzma.compress, "bzip2": bz2.compress}


def lines_of(path: Path) -> list[str]:
    blocks = [block.decode() for chunk in split_into_chunks([str(path)]) for block in read_blocks(chunk)]
    return "".join(blocks).split("\n")


@given(st.lists(st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs"]), max_size=12), max_size=30),
       st.integers(1, 40), st.integers(1, 60), st.booleans())
def test_every_line_once_however_it_is_cut(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], block: int, chunk: int, zipped: bool
) -> None:
    path = tmp_path_factory.mktemp("text") / "t"
    data = "\n".join(["first", *lines]).encode()
    path.write_bytes(gzip.compress(data) if zipped else data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "BLOCK_BYTES", block)
        patch.setattr(text, "CHUNK_BYTES", chunk)
        assert lines_of(path) == data.decode().split("\n")


def test_arguments_are_files_patterns_and_directories(tmp_path: Path) -> None:
    for name in ("b", "a", ".hidden"):
        (tmp_path / name).write_text("x\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c").write_text("x\n")
    a, b, c = (str(tmp_path / name) for name in ("a", "b", "sub/c"))
    assert find_texts([str(tmp_path)]) == [a, b]
    assert find_texts([f"{tmp_path}/[ab]", a]) == [a, b]
    assert find_texts([b, f"{tmp_path}/*"]) == [b, a, c]
    (tmp_path / "odd[1]").write_text("x\n")
    assert find_texts([str(tmp_path / "odd[1]")]) == [str(tmp_path / "odd[1]")]


def test_what_cannot_be_read_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "none").mkdir()
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    for name, message in {
        "missing": "does not exist", "*.txt": "no file matches", "empty": "is empty", "none": "has no files",
        "broken": "cannot read text", "pipe": "not a regular file",
    }.items():
        with pytest.raises(CorpusError, match=message) as caught:
            find_texts([str(tmp_path / name)])
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x\n")
    (tmp_path / "secret").chmod(0)
    with pytest.raises(CorpusError, match="Permission denied"):
        find_texts([str(tmp_path / "secret")])


@pytest.mark.parametrize("zipped", [False, True])
def test_bad_utf8_names_file_and_line(tmp_path: Path, zipped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t"
    for bad in range(1, 40):
        data = b"".join(b"line \xff\n" if n == bad else b"line\n" for n in range(1, 41))
        path.write_bytes(gzip.compress(data) if zipped else data)
        monkeypatch.setattr(text, "BLOCK_BYTES", 16)
        monkeypatch.setattr(text, "CHUNK_BYTES", 33)
        with pytest.raises(CorpusError, match=rf"t, line {bad}: byte 0xff"):
            lines_of(path)


def test_a_text_that_is_written_again_has_changed(tmp_path: Path) -> None:
    """Also to the same size; and the work of a compressed one is more than its size."""
    path, zipped = tmp_path / "t", tmp_path / "z.gz"
    path.write_bytes(b"a b\n")
    zipped.write_bytes(gzip.compress(b"a b\n"))
    plain, packed = split_into_chunks([str(path), str(zipped)])
    assert plain.work == 4 and packed.work == 3 * zipped.stat().st_size
    before = text.text_states([str(path)])
    text.require_unchanged(before)
    os.utime(path, ns=(0, before[str(path)][1] + 1))
    with pytest.raises(CorpusError, match="has changed while it was read"):
        text.require_unchanged(before)


def test_lines_before_a_far_chunk_are_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t"
    path.write_bytes(b"abc def\n" * 5 + b"caf\xe9\n")
    monkeypatch.setattr(text, "CHUNK_BYTES", 30)
    for limit, where in ((30, "line 6"), (29, "line 2 of those that begin at byte 30 or later")):
        monkeypatch.setattr(text, "_MOST_COUNTED_BYTES", limit)
        with pytest.raises(CorpusError, match=f"t, {where}: byte 0xe9"):
            lines_of(path)


def test_damaged_gzip_and_endless_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = gzip.compress(os.urandom(5000).hex().encode() + b"\n")
    for damaged in (data[:-100], data[:100] + b"\0\0\0\0" + data[104:], data[:12]):
        (tmp_path / "t.gz").write_bytes(damaged)
        with pytest.raises(CorpusError, match=r"t\.gz is damaged"):
            lines_of(tmp_path / "t.gz")
    monkeypatch.setattr(text, "MAX_LINE_BYTES", 100)
    monkeypatch.setattr(text, "BLOCK_BYTES", 10)
    for chunk in (1000, 30):
        monkeypatch.setattr(text, "CHUNK_BYTES", chunk)
        (tmp_path / "long").write_bytes(b"a" * 500)
        with pytest.raises(CorpusError, match="has a line of more than"):
            lines_of(tmp_path / "long")


def test_a_byte_order_mark_is_no_word(tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(b"\xef\xbb\xbfa b\n")
    assert lines_of(tmp_path / "t") == ["a b", ""]


def test_every_part_has_one_rank(tmp_path: Path) -> None:
    for n in range(7):
        (tmp_path / f"t{n}").write_bytes(b"x\n" * (n + 1))
    chunks = split_into_chunks(find_texts([str(tmp_path)]))
    for size in (1, 2, 3, 20):
        assert sorted(n for mine in assign([chunk.work for chunk in chunks], size) for n in mine) == list(range(7))


@pytest.mark.parametrize("kind", ["gzip", "zstd", "xz", "bzip2"])
def test_compressed_text(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compress = COMPRESS[kind]
    monkeypatch.setattr(text, "BLOCK_BYTES", 1000)
    first, second = (os.urandom(30_000).hex().encode().replace(b"0", b"\n") for _ in range(2))
    path = tmp_path / "t"
    path.write_bytes(compress(first) + compress(b"") + compress(second))
    assert lines_of(path) == (first + second).decode().split("\n")
    assert [(chunk.kind, chunk.end) for chunk in split_into_chunks([str(path)])] == [(kind, None)]
    whole = compress(first)
    middle = len(whole) // 2
    flipped = bytes([whole[middle] ^ 255])
    for damaged in (whole[:-9], whole[:middle], whole[:middle] + flipped + whole[middle + 1 :], whole + b"more text\n"):
        path.write_bytes(damaged)
        with pytest.raises(CorpusError, match=rf"^{kind} text .*t is damaged or truncated"):
            lines_of(path)
    path.write_bytes(compress(b"a\n" * 3000 + b"b \xff\n"))
    with pytest.raises(CorpusError, match="t, line 3001: byte 0xff"):
        lines_of(path)


@pytest.mark.parametrize("kind", ["zstd", "xz", "bzip2"])
def test_a_bomb_is_no_text(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compressed, "UNCHECKED_BYTES", 1 << 20)
    (tmp_path / "t").write_bytes(COMPRESS[kind](b"a a\n" * (1 << 20)))
    with pytest.raises(CorpusError, match=r"bytes decompress to more than .*, which is not text"):
        lines_of(tmp_path / "t")


def test_frames_of_xz_may_be_padded(tmp_path: Path) -> None:
    (tmp_path / "t.xz").write_bytes(lzma.compress(b"a\n") + bytes(8) + lzma.compress(b"b\n") + bytes(4))
    assert lines_of(tmp_path / "t.xz") == ["a", "b", ""]


def test_zstd_with_skippable_frames(tmp_path: Path) -> None:
    """As of pzstd, which writes one before each frame, and of the seekable format, which ends with one."""
    skippable = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + bytes(4)
    (tmp_path / "t").write_bytes((skippable + zstd.compress(b"a\n")) * 2 + skippable)
    assert lines_of(tmp_path / "t") == ["a", "a", ""]


def test_zstd_with_a_large_window(tmp_path: Path) -> None:
    """As of zstd --long=28; a frame whose size is not known at first takes the whole window."""
    compressor = zstd.ZstdCompressor(options={int(zstd.CompressionParameter.window_log): 28})
    (tmp_path / "t").write_bytes(compressor.compress(b"a\n") + compressor.flush())
    assert lines_of(tmp_path / "t") == ["a", ""]


def test_text_that_begins_like_bzip2_is_text(tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(b"BZh9 is no word\n")
    assert lines_of(tmp_path / "t") == ["BZh9 is no word", ""]


def test_zstd_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t").write_bytes(zstd.compress(b"a\n"))
    monkeypatch.setitem(sys.modules, "backports.zstd", None)
    monkeypatch.delattr(backports, "zstd", raising=False)
    with pytest.raises(CorpusError, match=r"pip install backports\.zstd"):
        lines_of(tmp_path / "t")
