"""``benchmarks.downstream`` on a made-up task: the tag of a word is whether its number is even."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import downstream
from lapse_elmo.errors import CorpusError
from tests.training.corpora import Prepared, random_sentences, train_alone

EVEN, ODD = "EVEN", "ODD"


def conllu(sentences: list[list[tuple[str, str]]]) -> str:
    """Sentences of (word, tag) as CoNLL-U, with a comment, a multi-word token and an empty node, which do not count."""
    lines = []
    for words in sentences:
        lines += ["# text = made up", "1-2\tof the" + "\t_" * 8]
        lines += [f"{number}\t{word}\t_\t{tag}" + "\t_" * 6 for number, (word, tag) in enumerate(words, 1)]
        lines += ["2.1\tnode\t_\tODD" + "\t_" * 6, ""]
    return "\n".join(lines)


def test_the_command_line(
    small: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train_alone(small, tmp_path / "run", "--max-steps", "3")
    lines = [line.split() for line in random_sentences(5, 60, 8, (2, 8))]
    tagged = [[(word, ODD if int(word[1:]) % 2 else EVEN) for word in line] for line in lines]
    (tmp_path / "train").write_text(conllu(tagged))
    test = [[("w00", EVEN), ("w01", ODD), ("w02", EVEN)], [("unheard", ODD), ("w03", ODD)]]
    (tmp_path / "test").write_text(conllu(test))
    files = ["--train", str(tmp_path / "train"), "--test", str(tmp_path / "test")]
    options = ["--seeds", "1", "2", "--learning-rate", "0.1", "--output", str(tmp_path / "table.json")]
    monkeypatch.setattr(sys, "argv", ["downstream", str(run), *files, *options])
    capsys.readouterr()
    downstream.main()
    table = json.loads((tmp_path / "table.json").read_text())
    # All words, those that the model knows, other ones, and those not in training: most are even, so unheard is wrong.
    assert table.pop("most frequent tag") == [[pytest.approx(4 / 5), 1.0, 0.0, 0.0]]
    assert len(table) == 5
    for kind, (first, second) in table.items():
        assert first[1] == second[1] == 1.0, kind  # each is enough to tell four words apart
        assert first[0] in (pytest.approx(4 / 5), 1.0) and first[2] == first[3] in (0.0, 1.0)
    head, _, *rows = capsys.readouterr().out.splitlines()[1:]
    assert head.count("|") == 6 and len(rows) == 6 and "| 100.00%" in rows[0]


def test_files_of_other_columns_and_bad_files(tmp_path: Path) -> None:
    path = tmp_path / "chunks"
    path.write_text("-DOCSTART- -X- O\n\nHe PRP B-NP\nreckons VBZ B-VP\n\n\nA DT B-NP\n")  # CoNLL-2000, and no end
    found = downstream.read(str(path), (0, 2))
    assert found.words == [["He", "reckons"], ["A"]] and found.tags == [["B-NP", "B-VP"], ["B-NP"]]
    with pytest.raises(CorpusError, match="chunks:3: 3 columns, --columns asks for 3"):
        downstream.read(str(path), (0, 3))
    path.write_text("\n# nothing\n")
    with pytest.raises(CorpusError, match="has no sentences"):
        downstream.read(str(path), (0, 2))
    with pytest.raises(CorpusError, match="cannot read"):
        downstream.read(str(tmp_path / "gone"), (0, 2))
