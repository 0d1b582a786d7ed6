"""Runs tests with the C sources compiled by ``CC`` for AddressSanitizer and UndefinedBehaviorSanitizer.

``python -m tests.sanitized_program TEST...``; their runtime libraries have to be preloaded. A fault ends the process.
Tests of the Triton kernels, in which no C runs, are left out.
"""

from __future__ import annotations

import sys

import pytest

from lapse_elmo import native

OPTIONS = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")


def main(tests: list[str]) -> int:
    native._VARIANTS = (("-march=native", "-mprefer-vector-width=512", "-fopenmp", *OPTIONS),)  # type: ignore
    native._TARGETS = ()
    return pytest.main(["-p", "no:cacheprovider", "-k", "not triton and not machine_code", *tests])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
