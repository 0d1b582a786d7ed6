"""Runs tests with the C sources compiled by ``CC`` for AddressSanitizer and UndefinedBehaviorSanitizer.

``python -m tests.sanitized_program TEST...``; their runtime libraries have to be preloaded. A fault ends the process.
Tests of the Triton kernels, in which no C runs, are left out, and those of profiles and of concurrent threads, which
call what others call as well.
"""

from __future__ import annotations

import sys

import pytest

from lapse_elmo import native

LEFT_OUT = ("triton", "machine_code", "profile", "other_threads")
OPTIONS = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")


def main(tests: list[str]) -> int:
    native._VARIANTS = (("-march=native", "-mprefer-vector-width=512", "-fopenmp", *OPTIONS),)  # type: ignore
    native._TARGETS = ()
    chosen = " and ".join(f"not {word}" for word in LEFT_OUT)
    return pytest.main(["-p", "no:cacheprovider", "-k", chosen, *tests])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
