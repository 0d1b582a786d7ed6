"""``python -m benchmarks`` runs every benchmark, or its documentation says why not."""

from __future__ import annotations

import benchmarks.__main__ as bench
from tests.mpi import ROOT


def test_every_module_is_run_or_named_with_a_reason() -> None:
    modules = {path.stem for path in (ROOT / "benchmarks").glob("[a-z]*.py")}
    run = {module.name for module in bench.MODULES}
    assert run < modules
    readme = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8").split("\n## ")[0]
    for left_out in modules - run:
        assert f"``{left_out}``" in str(bench.__doc__), left_out
        assert f"`{left_out}`" in readme, left_out
