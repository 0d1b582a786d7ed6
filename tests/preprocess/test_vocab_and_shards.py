"""``vocab`` and ``shards``: the same bytes for any number of ranks, and one line for each error."""

from __future__ import annotations

import errno
import pickle
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from lapse_elmo.corpus import shard_file, text
from lapse_elmo.corpus.shards import ShardSet
from lapse_elmo.corpus.vocabulary import Vocabulary
from lapse_elmo.corpus.words import new_word_encoder
from lapse_elmo.errors import ConfigError, CorpusError, OutputError, UserError
from preprocess import encoded_chunks
from preprocess import shards as command
from preprocess import vocab as vocab_command
from tests.mpi import ROOT, Job
from tests.preprocess.texts import sentences, shards, tree, vocab, write

PROGRAM = str(ROOT / "bin" / "preprocess")
REAL = ROOT.parent / "shared" / "corpus" / "one-billion-word-sample"


@pytest.fixture
def corpus(tmp_path: Path) -> tuple[list[Path], Path]:
    """Three training files (one gzip, one with blank lines) and a held-out file."""
    train = [
        write(tmp_path / "a.txt", sentences(50)),
        write(tmp_path / "b.gz", sentences(31, 50)),
        write(tmp_path / "c.txt", ["", *sentences(20, 81), "   ", "a last one"]),
    ]
    return train, write(tmp_path / "heldout.txt", sentences(9, 200))


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, PROGRAM, *map(str, arguments)], capture_output=True, text=True, timeout=60
    )


def test_vocabulary_order_threshold_and_size(tmp_path: Path) -> None:
    train = write(tmp_path / "t", ["b b b a a a", "é é z z <UNK> <S> <S> <S>", "once"])
    assert list(Vocabulary.load(vocab([train], tmp_path / "v1", 2)).words) == ["a", "b", "z", "é"]
    assert list(Vocabulary.load(vocab([train], tmp_path / "v2", 1, max_size=3)).words) == ["a", "b", "z"]
    with pytest.raises(CorpusError, match=r"no word occurs 9 times; the most frequent one occurs 3 times"):
        vocab([train], tmp_path / "v3", 9)
    assert not (tmp_path / "v3").exists()


def test_a_vocabulary_that_no_command_would_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = write(tmp_path / "t", sentences(50))
    size = len(vocab([train], tmp_path / "v").read_bytes())
    for limit in (size, size - 1):
        monkeypatch.setattr(vocab_command, "MOST_VOCABULARY_BYTES", limit)
        if limit == size:
            vocab([train], tmp_path / "v2")
            continue
        with pytest.raises(CorpusError, match="raise --threshold or give --max-size"):
            vocab([train], tmp_path / "v3")
    assert not (tmp_path / "v3").exists()


def test_vocabulary_of_any_order_and_compression(corpus: tuple[list[Path], Path], tmp_path: Path) -> None:
    train, _ = corpus
    plain = write(tmp_path / "b.txt", sentences(31, 50))
    first = vocab(train, tmp_path / "v1").read_bytes()
    assert vocab([train[2], plain, train[0]], tmp_path / "v2").read_bytes() == first


def test_every_sentence_once_in_its_shard(
    corpus: tuple[list[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, heldout = corpus
    monkeypatch.setattr(text, "BLOCK_BYTES", 100)
    monkeypatch.setattr(text, "CHUNK_BYTES", 333)
    monkeypatch.setattr(shard_file, "CHUNK", 64)
    vocabulary = Vocabulary.load(vocab(train, tmp_path / "v", 3))
    directory = shards(train, [heldout], tmp_path / "v", tmp_path / "out", num_shards=7)
    lines = [*sentences(101), "a last one"]
    expected = [vocabulary.encode(line.split()) for shard in range(7) for line in lines[shard::7]]
    with ShardSet.open(directory, vocabulary=vocabulary) as read:
        tokens, offsets = read.read(np.arange(read.num_sentences))
        assert [part.tolist() for part in np.split(tokens, offsets[1:-1])] == expected
        assert read.num_unknown == sum(sentence.count(3) for sentence in expected) > 0
    with ShardSet.open(directory, "heldout", vocabulary) as read:
        assert read.num_sentences == 9


def test_thousands_of_small_texts_are_few_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard opens the files of every part: 20,000 texts took fifty times as long as one text of that size."""
    lines = sentences(200)
    train = [write(tmp_path / f"{number:03}", ["", *lines[number : number + 1]]) for number in range(200)]
    heldout, encoded = write(tmp_path / "heldout", sentences(9, 200)), []
    v = vocab(train, tmp_path / "v")
    encode = command.encode_part

    def counted(*arguments: object) -> object:
        encoded.append(arguments[0])
        return encode(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(command, "encode_part", counted)
    alone = tree(shards(train, [heldout], v, tmp_path / "alone", num_shards=3))
    assert len(encoded) == len(train) + 1
    encoded.clear()
    monkeypatch.setattr(text, "NUM_PARTS", 10)
    assert tree(shards(train, [heldout], v, tmp_path / "joined", num_shards=3)) == alone
    assert len(encoded) <= 10 + 2
    train[50].write_text("\n \n")
    with pytest.raises(CorpusError, match="050 has no words"):
        shards(train, [heldout], v, tmp_path / "blank", num_shards=3)


def test_what_every_rank_knows_of_a_chunk_does_not_grow_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All ranks get this of all chunks."""
    path = write(tmp_path / "t", sentences(200))
    vocabulary = Vocabulary.load(vocab([path], tmp_path / "v"))
    sizes = []
    for block in (1 << 20, 50):
        monkeypatch.setattr(text, "BLOCK_BYTES", block)
        (chunk,) = text.split_into_chunks([str(path)])
        paths = encoded_chunks.part_paths(tmp_path, [chunk], text.text_states([str(path)]), vocabulary.sha256, 5)
        (work := tmp_path / f"{block}").mkdir()
        encoded = encoded_chunks.encode_part([chunk], new_word_encoder(vocabulary), 5, paths, work, lambda _: None)
        loaded = encoded_chunks.load_part(paths, 1, 5, lambda: None)
        sizes += [len(pickle.dumps(encoded)), len(pickle.dumps(loaded))]
    assert encoded.num_blocks > 50 and len(set(sizes)) == 1


def test_a_chunk_of_many_blocks_and_shards_takes_little_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compressed file of 20 GB is one chunk, of which 2,048 shards have 42 million groups."""
    path = write(tmp_path / "t", sentences(400))
    vocabulary = Vocabulary.load(vocab([path], tmp_path / "v"))
    monkeypatch.setattr(text, "BLOCK_BYTES", 50)
    (chunk,) = text.split_into_chunks([str(path)])
    states, num_shards = text.text_states([str(path)]), 2048
    paths = encoded_chunks.part_paths(tmp_path, [chunk], states, vocabulary.sha256, num_shards)
    encoder, peaks = new_word_encoder(vocabulary), []
    for code in (
        lambda: encoded_chunks.encode_part([chunk], encoder, num_shards, paths, tmp_path, lambda _: None),
        lambda: encoded_chunks.load_part(paths, 1, num_shards, lambda: None),
    ):
        tracemalloc.start()
        encoded = code()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert encoded is not None and encoded.num_sentences == 400 < 4 * encoded.num_blocks
    assert max(peaks) < 40 * encoded.num_blocks * num_shards, peaks  # bytes; a group's place takes 32


@pytest.mark.parametrize("size", [1, 2, 3])
def test_same_bytes_on_any_number_of_ranks(
    corpus: tuple[list[Path], Path], tmp_path: Path, mpirun: Callable[..., Job], size: int
) -> None:
    train, heldout = corpus
    vocab(train, tmp_path / "v", 2)
    shards(train, [heldout], tmp_path / "v", tmp_path / "out", num_shards=4)
    job = mpirun(size, [PROGRAM, "vocab", *train, "--threshold", "2", "--output", tmp_path / "v2"])
    assert job.returncode == 0, job.output
    job = mpirun(size, [PROGRAM, "shards", *train, "--heldout", heldout, "--vocab", tmp_path / "v2",
                        "--num-shards", "4", "--output", tmp_path / "out2"])
    assert job.returncode == 0, job.output
    assert (tmp_path / "v2").read_bytes() == (tmp_path / "v").read_bytes()
    assert tree(tmp_path / "out2") == tree(tmp_path / "out")
    assert not list(tmp_path.glob(".*"))


def test_an_error_on_one_rank_ends_all_and_leaves_nothing(
    corpus: tuple[list[Path], Path], tmp_path: Path, mpirun: Callable[..., Job]
) -> None:
    train, heldout = corpus
    vocab(train, tmp_path / "v")
    (tmp_path / "bad.txt").write_bytes(b"good\nb\xe9d\n")
    job = mpirun(3, [PROGRAM, "shards", *train, tmp_path / "bad.txt", "--heldout", heldout, "--vocab", tmp_path / "v",
                     "--num-shards", "2", "--output", tmp_path / "out"])
    assert job.returncode == 2, job.output
    assert job.stderr.count("bad.txt, line 2: byte 0xe9") == 1
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))


def test_mistakes_are_one_line(corpus: tuple[list[Path], Path], tmp_path: Path) -> None:
    (train, *_), heldout = corpus
    v, out = vocab([train], tmp_path / "v"), tmp_path / "out"
    blank = write(tmp_path / "blank", ["", " "])
    for texts, held, vocabulary, options, error, message in (
        ([train], [train], v, {}, ConfigError, "both training and held-out"),
        ([train], [heldout], v, {"num_shards": 51}, ConfigError, "50 sentences of train text cannot fill 51"),
        ([train], [heldout], v, {"num_heldout_shards": 10}, ConfigError, "--num-heldout-shards 9"),
        ([train], [heldout], tmp_path / "none", {}, CorpusError, "cannot read vocabulary"),
        ([train, blank], [heldout], v, {}, CorpusError, "blank has no words"),
        ([train], [tmp_path / "x*"], v, {}, CorpusError, "no file matches"),
    ):
        with pytest.raises(error, match=message) as caught:
            shards(texts, held, vocabulary, out, **{"num_shards": 2, **options})
        assert "\n" not in str(caught.value)
    with pytest.raises(CorpusError, match="blank has no words"):
        vocab([train, blank], tmp_path / "v2")
    assert not out.exists()
    assert not list(tmp_path.glob(".*"))


def test_a_vocabulary_is_no_text(tmp_path: Path) -> None:
    """As in ``vocab data/*.txt``, with the default output ``data/vocab.txt``, and then ``shards data/*.txt``."""
    train = write(tmp_path / "train.txt", sentences(50))
    heldout = write(tmp_path / "heldout", sentences(9, 200))
    before = train.read_bytes()
    pattern, link = tmp_path / "*.txt", tmp_path / "link"
    link.symlink_to(train)
    v = vocab([pattern], tmp_path / "v.txt")
    with pytest.raises(ConfigError, match=r"v\.txt is the vocabulary and one of the texts"):
        shards([pattern], [heldout], v, tmp_path / "out", num_shards=2)
    for texts, output in (([pattern], v), ([train], link), ([train], train)):
        with pytest.raises(ConfigError, match="is the output and one of the texts"):
            vocab(texts, output, overwrite=True)
    assert train.read_bytes() == before
    assert not list(tmp_path.glob(".*"))


def test_a_text_that_grows_while_it_is_read(
    corpus: tuple[list[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that a tokeniser is still writing; only what it had at the start would be used."""
    (train, *_), heldout = corpus
    v = vocab([train], tmp_path / "v")

    def grow(chunk: text.TextChunk) -> Iterator[text.Block]:
        yield from text.read_blocks(chunk)
        with train.open("a") as file:
            file.write("more text\n")

    monkeypatch.setattr(vocab_command, "read_blocks", grow)
    monkeypatch.setattr(encoded_chunks, "read_blocks", grow)
    with pytest.raises(CorpusError, match=f"text {train} has changed while it was read"):
        vocab([train], tmp_path / "v2")
    with pytest.raises(CorpusError, match=f"text {train} has changed while it was read"):
        shards([train], [heldout], v, tmp_path / "out", num_shards=2)
    assert not (tmp_path / "v2").exists()
    assert not (tmp_path / "out").exists()


def test_outputs_are_replaced_only_when_asked(corpus: tuple[list[Path], Path], tmp_path: Path) -> None:
    (train, *_), heldout = corpus
    v, out = vocab([train], tmp_path / "v"), tmp_path / "out"
    out.mkdir()
    shards([train], [heldout], v, out, num_shards=2)
    before = tree(out)
    with pytest.raises(OutputError, match="out already exists"):
        shards([train], [heldout], v, out, num_shards=3)
    with pytest.raises(OutputError, match="v already exists"):
        vocab([train], v)
    with pytest.raises(UserError):
        shards([train], [train], v, out, num_shards=3, overwrite=True)
    assert tree(out) == before
    shards([train], [heldout], v, out, num_shards=3, overwrite=True)
    assert len(tree(out)) == 4
    (out / "mine.txt").write_text("precious")
    with pytest.raises(OutputError, match=r"does not make.*mine\.txt"):
        shards([train], [heldout], v, out, num_shards=2, overwrite=True)
    assert len(tree(out)) == 5
    assert not list(tmp_path.glob(".*"))


def test_a_full_disk(corpus: tuple[list[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (train, *_), heldout = corpus
    v, out = vocab([train], tmp_path / "v"), tmp_path / "out"

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for place, name in ((encoded_chunks.zlib, "crc32"), (shard_file.ShardWriter, "append")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, full)
            with pytest.raises(OutputError, match=r"cannot write .*out: No space left on device; free some space"):
                shards([train], [heldout], v, out, num_shards=2)
        assert not out.exists()
        assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("limit", [1000, 30_000, 100_000])
def test_a_file_size_limit(tmp_path: Path, limit: int) -> None:
    """The system refuses a write: of an encoded chunk (limit of 1,000 bytes) or of a shard (the larger limits)."""
    train, heldout = write(tmp_path / "t", sentences(2000)), write(tmp_path / "h", sentences(5))
    v, out = vocab([train], tmp_path / "v"), tmp_path / "out"

    script = (  # alone, since MPI needs larger files itself
        "import resource, signal, sys; sys.path.insert(0, sys.argv[1]); limit = int(sys.argv[2]); "
        "from lapse_elmo.mpi.launch import launch; from lapse_elmo.mpi.world import solo; "
        "from preprocess.cli import main; "
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)); "
        "launch(lambda argv, _: main(argv, solo), sys.argv[3:], 'bin/preprocess')"
    )
    arguments = ["shards", train, "--heldout", heldout, "--vocab", v, "--output", out, "--num-shards", 2]
    ended = subprocess.run(
        [sys.executable, "-c", script, *map(str, [ROOT, limit, *arguments])], capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 2, ended.stderr
    assert "File too large; free some space" in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert not out.exists()
    assert not list(tmp_path.glob(".*"))


def test_command_line(corpus: tuple[list[Path], Path], tmp_path: Path) -> None:
    (train, *_), heldout = corpus
    assert run("--help").returncode == 0
    assert run("shards", "--help").returncode == 0
    for arguments, message in (
        (["vocabs"], "did you mean 'vocab'"), (["vocab", train, "--treshold", 3], "did you mean '--threshold'"),
        (["vocab", train, "--threshold", 0], "--threshold is 0, expected at least 1"), (["vocab"], "required"),
    ):
        ended = run(*arguments)
        assert ended.returncode == 2
        assert message in ended.stderr
        assert ended.stderr.count("\n") == 1
    ended = run("vocab", tmp_path / "*.txt", "--output", tmp_path / "deep" / "v")
    assert ended.returncode == 0
    assert ended.stdout.count("\n") == 1
    ended = run("shards", train, "--heldout", heldout, "--vocab", tmp_path / "deep" / "v", "--output", tmp_path / "s",
                "--num-shards", 3)
    assert ended.returncode == 0
    shown = run("inspect", tmp_path / "s", "--vocab", tmp_path / "deep" / "v", "--sentences", 2)
    assert shown.returncode == 0
    assert shown.stdout.count("verified") == 4
    assert sentences(1)[0] in shown.stdout
    path = next((tmp_path / "s").glob("train-00001*"))
    data = bytearray(path.read_bytes())
    data[data.index(np.array([4], np.int32).tobytes() * 1, 4000)] ^= 0xFF
    path.write_bytes(data)
    ended = run("inspect", path)
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1


@pytest.mark.skipif(not REAL.exists(), reason="the sample of the benchmark is not here")
def test_the_benchmark_sample(tmp_path: Path) -> None:
    train = REAL / "training-monolingual.tokenized.shuffled"
    heldout = REAL / "heldout-monolingual.tokenized.shuffled"
    vocabulary = Vocabulary.load(vocab([train], tmp_path / "v", 3))
    assert vocabulary.size == 9358
    directory = shards([train], [heldout], tmp_path / "v", tmp_path / "out", num_shards=5)
    counts: Counter[str] = Counter(word for path in train.iterdir() for word in path.read_text().split())
    with ShardSet.open(directory, vocabulary=vocabulary) as read:
        assert (read.num_sentences, read.num_tokens) == (11_716, counts.total())
        assert read.num_unknown == sum(count for count in counts.values() if count < 3)
    assert ShardSet.open(directory, "heldout").num_tokens == 12_240
