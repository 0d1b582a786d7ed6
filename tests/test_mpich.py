"""Which of MPICH's networks is chosen."""

from __future__ import annotations

import os

import pytest

from lapse_elmo.mpi.start import choose_mpich_network

NETWORK = "MPIR_CVAR_CH4_NETMOD"


@pytest.mark.parametrize(
    ("version", "chosen"),
    [
        ("MPICH Version:      5.0.2\nMPICH Device:       ch4:ucx ofi\nMPICH CC:   cc\n", "ofi"),
        ("MPICH Version:      4.2.0\nMPICH Device:       ch4:ofi,ucx\n", "ofi"),
        ("MPICH Version:      4.2.0\nMPICH Device:       ch4:ucx\nMPICH configure:    --with-ofi\n", None),
        ("MPICH Version:      3.4\nMPICH Device:       ch3:nemesis\n", None),
        ("Open MPI v4.1.4, package: ofi and ucx", None),
    ],
)
def test_libfabric_where_there_is_a_choice(monkeypatch: pytest.MonkeyPatch, version: str, chosen: str | None) -> None:
    monkeypatch.setattr(os, "environ", {})
    choose_mpich_network(version)
    assert os.environ.get(NETWORK) == chosen


def test_what_the_user_chose_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {NETWORK: "ucx"})
    choose_mpich_network("MPICH Device:       ch4:ucx ofi\n")
    assert os.environ[NETWORK] == "ucx"
