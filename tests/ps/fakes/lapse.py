"""A stand-in for the package lapse that starts and ends like it but stores no rows.

``FAKE_LAPSE`` names the fault to simulate. It serves tests of how a job starts and ends, which put its folder on the
path of their processes.
"""

from __future__ import annotations

import os
import signal
import socket
import time

FAULT = os.environ.get("FAKE_LAPSE", "")
if FAULT == "absent":
    raise ModuleNotFoundError("No module named 'lapse'")
if FAULT == "of another torch":
    raise ImportError("undefined symbol: _ZN3c10")


def scheduler(num_keys: int, num_threads: int) -> None:
    """Run until every node has said that it ends."""
    if FAULT == "no scheduler":
        os._exit(3)
    ended = 0
    with socket.create_server(_address()) as server:
        while ended < int(os.environ["DMLC_NUM_SERVER"]):
            connection, _ = server.accept()
            with connection:
                word = connection.recv(3)
            if word == b"die":
                os._exit(3)
            ended += word == b"end"


def setup(num_keys: int, num_threads: int) -> None:
    if FAULT == "never up":
        time.sleep(600)
    if FAULT == "crashes" and os.environ["PMI_RANK"] == "1":
        os.kill(os.getpid(), signal.SIGSEGV)


class Server:
    def __init__(self, widths: object) -> None:
        pass

    def shutdown(self) -> None:
        say(b"end")


if FAULT != "another package":

    class Worker:
        def __init__(self, app: int, customer: int, server: Server) -> None:
            pass

        def pull(self, keys: object, rows: object, later: bool) -> int:
            if FAULT == "never answers":
                time.sleep(600)
            return -1


def say(word: bytes) -> None:
    """Send ``word`` to the scheduler."""
    with socket.create_connection(_address(), 10) as connection:
        connection.sendall(word)


def _address() -> tuple[str, int]:
    return os.environ["DMLC_PS_ROOT_URI"], int(os.environ["DMLC_PS_ROOT_PORT"])
