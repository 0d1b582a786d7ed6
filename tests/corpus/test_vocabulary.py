"""Vocabulary files and ids."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lapse_elmo.corpus.vocabulary import BEGIN, END, PADDING, SPECIAL, UNKNOWN, Vocabulary
from lapse_elmo.errors import CorpusError, OutputError

words = st.lists(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
    .filter(lambda word: word.split() == [word] and word not in SPECIAL and not word.startswith("\ufeff")),
    min_size=1, unique=True,
)


@given(words)
def test_ids_follow_file_order(some: list[str]) -> None:
    vocabulary = Vocabulary.from_words(some)
    assert vocabulary.size == 3 + len(some)
    assert vocabulary.encode(some) == list(range(4, 4 + len(some)))
    assert vocabulary.decode(range(4, 4 + len(some))) == some
    assert list(vocabulary.words) == some


def test_special_ids_and_tokens() -> None:
    vocabulary = Vocabulary.from_words(["a", "b"])
    assert (PADDING, BEGIN, END, UNKNOWN) == (0, 1, 2, 3)
    assert [vocabulary.word(number) for number in (BEGIN, END, UNKNOWN, 4)] == ["<S>", "</S>", "<UNK>", "a"]
    assert vocabulary.encode(["b", "<UNK>", "<S>", "</S>", "nowhere"]) == [5, UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN]
    for number in (-1, 6):
        with pytest.raises(CorpusError, match="0 to 5"):
            vocabulary.word(number)


@pytest.mark.parametrize(
    "data", [b"a\nb\n", b"<S>\n</S>\n<UNK>\na\nb", b"a\r\n<UNK>\r\nb\r\n\r\n", b"\xef\xbb\xbfa\nb\n"]
)
def test_special_tokens_may_stand_anywhere_or_lack(data: bytes) -> None:
    vocabulary = Vocabulary(data)
    assert vocabulary.encode(["a", "b"]) == [4, 5]
    assert vocabulary.size == 5


@given(words)
def test_saved_bytes_are_the_loaded_ones(tmp_path_factory: pytest.TempPathFactory, some: list[str]) -> None:
    directory = tmp_path_factory.mktemp("vocabulary")
    data = "\n".join(some).encode()
    (directory / "a").write_bytes(data)
    vocabulary = Vocabulary.load(directory / "a")
    vocabulary.save(directory / "b")
    assert (directory / "b").read_bytes() == data
    assert vocabulary.sha256 == hashlib.sha256(data).hexdigest() == Vocabulary.load(directory / "b").sha256


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (b"<S>\n</S>\n", "has no words"),
        (b"a\n\nb\n", "line 2: empty line"),
        (b"\na\n", "line 1: empty line"),
        (b"a\n  \nb\n\nb\n", "line 2: empty line"),
        (b"a\nb\na\n", "line 3: 'a' is already on line 1"),
        (b"<S>\nb\n<S>\n", "line 3: '<S>' is already on line 1"),
        (b"a\nb\n\xff\xfe\n", "line 3: byte 0xff is not valid UTF-8"),
        (b"<UNK>\nthe 12\nof 9\n", "has a blank within every line, such as 'the 12'"),
        (b"the\rof\ra\r", "has a blank within every line, such as 'the\\rof\\ra'"),
    ],
)
def test_malformed_files_are_refused_with_their_line(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "vocab.txt"
    path.write_bytes(data)
    with pytest.raises(CorpusError, match=re.escape(message)) as caught:
        Vocabulary.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_an_existing_output(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="No such file"):
        Vocabulary.load(tmp_path / "none")
    vocabulary = Vocabulary.from_words(["a"])
    vocabulary.save(tmp_path / "v")
    with pytest.raises(OutputError, match="already exists"):
        vocabulary.save(tmp_path / "v")
    vocabulary.save(tmp_path / "v", overwrite=True)
    with pytest.raises(OutputError, match="cannot write"):
        vocabulary.save(tmp_path / "v" / "w")
    assert [path.name for path in tmp_path.iterdir()] == ["v"]


def test_unicode_space_in_a_line_is_part_of_the_word() -> None:
    assert list(Vocabulary("a\u2028b\n\x85\n\u00a0\n".encode()).words) == ["a\u2028b", "\x85", "\u00a0"]
