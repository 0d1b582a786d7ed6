"""docs/protocol.md lists every kind of message with its arrays."""

from __future__ import annotations

import dataclasses
import re

from lapse_elmo.ps.messages import KINDS
from tests.mpi import ROOT


def test_the_table_of_messages_is_that_of_the_code() -> None:
    text = (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8")
    table = dict(re.findall(r"^\| `(\w+)` \|[^|]*\|[^|]*\| ([^|]*) \|", text, re.MULTILINE))
    assert set(table) == {kind.__name__ for kind in KINDS}
    for kind in KINDS:
        arrays = [field.name for field in dataclasses.fields(kind) if field.type in ("Ints", "Values")]
        assert table[kind.__name__] == (", ".join(arrays) or "-")


def test_kinds_have_numbers_of_their_own() -> None:
    assert len({kind.KIND for kind in KINDS}) == len(KINDS)
