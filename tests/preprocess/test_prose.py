"""Which parts of documentation count as English, and how they are tokenised."""

from __future__ import annotations

from pathlib import Path

import pytest

from lapse_elmo.config.preprocessing import DemoTextOptions
from lapse_elmo.mpi.world import solo
from preprocess import demo_text
from preprocess.demo_text import documents, make_demo_text, split
from preprocess.prose import deduplication_key, sentences, tokenise
from tests.preprocess.texts import tree

DOCSTRING = '''Return the length of the longest path in the graph.

    The path doesn't need to be simple, e.g. it may use
    an edge of the graph twice.  See `the user guide <http://x.org>`_ for more.

    Parameters
    ----------
    graph : Graph, optional
        The graph that should be searched for the path.

    self.x = foo(bar)

    >>> longest(graph)
    This is the output of the example and it is not prose.

    Use it as in this example of a block::

        This is the inside of the block, which is code.

    The function uses foo_bar(x) for the search in the graph.
    '''


def test_prose_is_kept_and_structure_left_out() -> None:
    assert list(sentences(DOCSTRING)) == [
        "Return the length of the longest path in the graph .",
        "The path does n't need to be simple , e.g. it may use an edge of the graph twice .",
        "See the user guide for more .",
        "The graph that should be searched for the path .",
    ]


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("It isn't (always) 3.5, is it?", "It is n't ( always ) 3.5 , is it ?"),
        ('"The cat\'s well-known," he said.', '" The cat \'s well-known , " he said .'),
        ("We use 2-tuples in IPv4 etc. here.", "We use 2-tuples in IPv4 etc. here ."),
    ],
)
def test_tokens(text: str, tokens: str) -> None:
    assert tokenise(text) == tokens.split()


def test_near_duplicates_have_one_key() -> None:
    assert deduplication_key("The size of Foo is 3 .") == deduplication_key("The size of Bar is 12 .")
    assert deduplication_key("The size of Foo is small .") != deduplication_key("The size of Foo is large .")


def test_a_made_up_installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "library"
    library.mkdir()
    nouns = ["ship", "gull", "deck", "mast", "rope", "sail", "wave", "storm", "coast", "harbour"]
    body = "".join(
        f'def f{n}():\n    """The {a} is near the {b} in the morning."""\n'
        for n, (a, b) in enumerate((a, b) for a in nouns for b in nouns)
    )
    (library / "a.py").write_text(body)
    (library / "bad.py").write_bytes(b'"""\xff"""')
    assert len(list(documents(library / "a.py"))) == 100
    assert list(documents(library / "bad.py")) == []
    monkeypatch.setattr(demo_text.sysconfig, "get_path", lambda _: str(library))
    for name in ("one", "two"):
        make_demo_text(DemoTextOptions(str(tmp_path / name), num_files=3), solo())
    made = tree(tmp_path / "one")
    assert made == tree(tmp_path / "two")
    assert [sum(made[name].count(b"\n") for name in made if kind in name) for kind in ("train", "heldout")] == [98, 2]


def test_split_by_tokens() -> None:
    train, heldout = split(["a b c ."] * 100, 200)
    assert (len(train), len(heldout)) == (49, 1)
