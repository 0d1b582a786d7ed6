"""Compare counting and encoding, in C and in Python, with a plain loop."""

from __future__ import annotations

import ctypes
import itertools
import sys
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lapse_elmo import native
from lapse_elmo.corpus import words
from lapse_elmo.corpus.text import Block, TextChunk
from lapse_elmo.corpus.vocabulary import Vocabulary
from lapse_elmo.corpus.words import (
    NativeWordCounter,
    NativeWordEncoder,
    PythonWordCounter,
    PythonWordEncoder,
    WordCounter,
    WordCounts,
    WordEncoder,
)
from lapse_elmo.errors import CorpusError

BLANKS = [character for character in map(chr, range(sys.maxunicode + 1)) if character.isspace()]
OTHERS = ["\0", "a", "b", "\x7f", "é", "\x84", "\xa1", "\u1681", "\u200b", "\u2030", "\u205e", "\u3001", "\ufeff", "𝒳"]
LINES = st.lists(st.sampled_from([*BLANKS, *OTHERS, "a" * 15, "b" * 16, "a" * 17, "b" * 70, "\r\n", "\n"]), max_size=90)


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    found = native.load(words.SOURCE)
    if found is None:
        pytest.skip(native.problem(words.SOURCE))
    return words.declare_functions(found)


def block_of(data: bytes, num_lines: int = 0) -> Block:
    return Block(data, len(data), TextChunk("some.txt", 0, len(data), len(data)), num_lines)


def plain_loop(text: str) -> tuple[dict[str, int], list[list[str]]]:
    """Return the counts and the sentences of ``text``, computed by a plain loop."""
    counts: dict[str, int] = {}
    sentences = []
    for line in text.split("\n"):
        row = line.split()
        for word in row:
            counts[word] = counts.get(word, 0) + 1
        if row:
            sentences.append(row)
    return counts, sentences


def listed(counts: WordCounter, min_count: int = 1) -> dict[str, int]:
    frequent = counts.frequent(min_count)
    return dict(zip([word.decode() for word in frequent.words()], frequent.counts.tolist(), strict=True))


def check(library: ctypes.CDLL, text: str) -> None:
    """Check that counting and encoding of ``text``, in both versions, agree with the plain loop."""
    expected, sentences = plain_loop(text)
    block = block_of(text.encode())
    for counts in (NativeWordCounter(library), PythonWordCounter()):
        assert counts.count(block) == sum(expected.values())
        assert listed(counts) == expected
        assert counts.totals() == (len(expected), sum(expected.values()))
    vocabulary = Vocabulary.from_words([*list(expected)[::2], "never"])
    for ids in (NativeWordEncoder(library, vocabulary), PythonWordEncoder(vocabulary)):
        tokens, lengths = ids.encode(block)
        assert tokens.dtype == lengths.dtype == np.int32
        assert tokens.tolist() == vocabulary.encode(itertools.chain.from_iterable(sentences))
        assert lengths.tolist() == [len(sentence) for sentence in sentences]


@given(LINES, st.integers(0, 70))
@settings(max_examples=300)
def test_any_text(library: ctypes.CDLL, pieces: list[str], shift: int) -> None:
    check(library, "x" * shift + "".join(pieces))


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=300))
def test_any_characters(library: ctypes.CDLL, text: str) -> None:
    check(library, text)


def test_every_character_of_unicode_is_white_space_or_not_as_in_python(library: ctypes.CDLL) -> None:
    characters = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code <= 0xDFFF and code != 10]
    vocabulary = Vocabulary.from_words(["b"])
    block = block_of("".join(f"a{character}b\n" for character in characters).encode())
    _, lengths = NativeWordEncoder(library, vocabulary).encode(block)
    found = {character for character, length in zip(characters, lengths.tolist(), strict=True) if length == 2}
    assert found == set(BLANKS) - {"\n"}


@pytest.mark.parametrize("blank", ["\n", " ", "\x85", "\u1680", "\u200a", "\u2029", "\u205f", "\u3000", "é", "€", "𝒳"])
def test_characters_across_the_borders_of_chunks(library: ctypes.CDLL, blank: str) -> None:
    for before in range(58, 68):
        check(library, "x" * before + blank)
        check(library, "x" * before + blank + "y z" * 50)
        check(library, "€" * (before // 3) + "x" * (before % 3) + blank * 40)


@pytest.mark.parametrize("text", ["", "\n", "\n\n \n", "a", "a\n", "a b\r\n\r\nc\r\n", "a\n\nb", " " * 999, "a " * 500])
def test_line_ends(library: ctypes.CDLL, text: str) -> None:
    check(library, text)


def test_words_of_every_length_and_long_lines(library: ctypes.CDLL) -> None:
    sizes = [*range(1, 70), 127, 128, 1000, 100_000]
    alike = [letter * size + end for size in sizes for letter in "aé" for end in ("", "b", "\0")]
    check(library, " ".join(alike))
    check(library, "x" * 3_000_000 + " " + "y z " * 300_000)


def test_a_table_that_grows(library: ctypes.CDLL) -> None:
    many = [f"word{number}" if number % 3 else f"a-rather-long-word-{number}" for number in range(60_000)]
    check(library, "\n".join(many + many[::7]))


@given(LINES, st.lists(st.tuples(st.integers(0, 300), st.binary(min_size=1, max_size=5)), min_size=1, max_size=3))
@settings(max_examples=300)
def test_what_is_not_utf8_is_refused_as_in_python(
    library: ctypes.CDLL, pieces: list[str], insertions: list[tuple[int, bytes]]
) -> None:
    data = "".join(pieces).encode()
    for at, some in insertions:
        data = data[:at] + some + data[at:]
    check_utf8(library, data)


def check_utf8(library: ctypes.CDLL, data: bytes) -> None:
    """Bytes that Python does not decode are refused with file and line; all others are accepted."""
    block = block_of(data, num_lines=6)
    try:
        check(library, data.decode())
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 7
        vocabulary = Vocabulary.from_words(["a"])
        for refuse in (
            NativeWordCounter(library).count, PythonWordCounter().count,
            NativeWordEncoder(library, vocabulary).encode, PythonWordEncoder(vocabulary).encode,
        ):
            with pytest.raises(CorpusError, match=rf"^some\.txt, line {line}: byte 0x{data[error.start]:02x} is not"):
                refuse(block)


def test_sequences_of_bytes_at_the_borders_of_utf8(library: ctypes.CDLL) -> None:
    leads = [0x7F, 0x80, 0xBF, 0xC0, 0xC1, 0xC2, 0xDF, 0xE0, 0xE1, 0xEC, 0xED, 0xEE, 0xEF, 0xF0, 0xF1, 0xF4, 0xF5, 0xFF]
    seconds = [0x20, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0]
    for lead, second in itertools.product(leads, seconds):
        for rest in (b"", b"\x80", b"\x80\x80", b"\x80 ", b"\xbf\xbf\xbf"):
            check_utf8(library, b"a\n" + bytes([lead, second]) + rest)


@given(LINES, LINES, st.integers(1, 3))
def test_counts_of_several_ranks_are_added(
    library: ctypes.CDLL, first: list[str], second: list[str], min_count: int
) -> None:
    texts = ["".join(first), "".join(second)]
    expected = Counter(" ".join(texts).split())
    versions: list[Callable[[], WordCounter]] = [lambda: NativeWordCounter(library), PythonWordCounter]
    for new_one, new_other in itertools.product(versions, versions):
        one, other = new_one(), new_other()
        one.count(block_of(texts[0].encode()))
        other.count(block_of(texts[1].encode()))
        one.add(other.frequent())
        assert listed(one, min_count) == {word: count for word, count in expected.items() if count >= min_count}
        one.add(WordCounts(b"", np.empty(0, np.int64)))
        assert one.totals() == (len(expected), expected.total())


@given(st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=9), max_size=40), st.integers(0, 50),
       st.integers(1, 12))
def test_groups(library: ctypes.CDLL, sentences: list[list[str]], first: int, num_groups: int) -> None:
    vocabulary = Vocabulary.from_words(["a", "b"])
    block = block_of("\n".join(" ".join(sentence) for sentence in sentences).encode())
    rows = [vocabulary.encode(sentence) for sentence in sentences]
    groups = [[row for i, row in enumerate(rows) if (first + i) % num_groups == group] for group in range(num_groups)]
    versions: list[WordEncoder] = [NativeWordEncoder(library, vocabulary), PythonWordEncoder(vocabulary)]
    for ids in versions:
        tokens, lengths, counts = ids.group(*ids.encode(block), first, num_groups)
        assert tokens.tolist() == [token for group in groups for row in group for token in row]
        assert lengths.tolist() == [len(row) for group in groups for row in group]
        assert counts.tolist() == [[len(group), sum(map(len, group)), sum(row.count(3) for row in group)]
                                   for group in groups]


@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs", "Z", "C"]), min_size=1, max_size=3),
                       st.integers(1, 4), max_size=20), st.integers(0, 9) | st.none())
def test_the_most_frequent(counts: dict[str, int], max_size: int | None) -> None:
    wanted = sorted((word for word in counts if word != "a"), key=lambda word: (-counts[word], word))[:max_size]
    data = "".join(f"{word}\n" for word in counts).encode()
    found, total = words.most_frequent(WordCounts(data, np.array(list(counts.values()), np.int64)), [b"a"], max_size)
    assert [word.decode() for word in found] == wanted
    assert total == sum(counts[word] for word in wanted)


def test_without_a_compiler_python_does_it_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "_library", lambda: None)
    monkeypatch.setenv(native.SWITCH, "0")
    assert isinstance(words.new_word_counter(), PythonWordCounter)
    assert isinstance(words.new_word_encoder(Vocabulary.from_words(["a"])), PythonWordEncoder)
    assert "slower than C" in words.fallback_reason() and "\n" not in words.fallback_reason()
