"""The architecture, enforced by reading the source: what import-linter cannot check, and how long things may be.

The floors of modules are contracts in pyproject.toml, which `make lint` checks. They cannot say which modules may
import parts of a third-party package, that two packages meet in few modules only, or what a program without a suffix
imports.
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mpi import ROOT

# Third-party packages that only these may import.
OWNERS = {
    "mpi4py": {"mpi", "ps.mpi_transport"},
    "allennlp": {"model", "allennlp_plugin"},
    "triton": {"model.pointwise_triton"},
    "h5py": {"corpus", "checkpoint", "trained", "initial"},
    "transformers": {"export.modeling_lapse_elmo"},
    "safetensors": {"trained.huggingface_files"},
    "argparse": {"config"},
    "tensorboard": {"metrics"},
    "matplotlib": {"report"},
    "jinja2": {"report"},
    "lapse": {"ps.lapse_package"},
    "adapm": {"ps.adapm_package"},
}
BRIDGES = {"tables", "parameters"}  # the only ones that know both the server and the model
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60
GLOBAL_RANDOM = {"np.random.seed", "numpy.random.seed", "torch.manual_seed", "random.seed", "torch.cuda.manual_seed"}
# Calls at import that only make constants and types.
PURE_CALLS = {
    "TypeVar", "Path", "resolve", "compile", "Struct", "dataclass", "option", "field", "fields", "lru_cache", "cast",
    "frozenset", "set", "dict", "tuple", "range", "slice", "dtype", "split", "no_grad", "register", "Command",
}

PACKAGE = sorted((ROOT / "lapse_elmo").rglob("*.py"))
SOURCES = [*PACKAGE, *sorted((ROOT / "preprocess").rglob("*.py"))]
EVERYTHING = [*SOURCES, *sorted((ROOT / "tests").rglob("*.py"))]


def module_of(path: Path) -> str:
    """Return the name of a module within lapse_elmo: ``ps.rows`` for lapse_elmo/ps/rows.py."""
    parts = path.relative_to(ROOT / "lapse_elmo").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported(path: Path, *, types_too: bool = True) -> set[str]:
    """Return the modules that ``path`` imports anywhere; without ``types_too``, not those under TYPE_CHECKING."""
    tree = tree_of(path)
    if not types_too:
        tree.body = [
            node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
        ]
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # preprocess/ has two names: its own in the repository, lapse_elmo.preprocess once installed.
            assert node.level == 0 or path.parent == ROOT / "preprocess", f"{path}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own(path: Path, *, types_too: bool = True) -> set[str]:
    """Return the modules of lapse_elmo that ``path`` imports, without the prefix ``lapse_elmo``."""
    modules = {module_of(other) for other in PACKAGE}
    found = set()
    for name in imported(path, types_too=types_too):
        if name.startswith("lapse_elmo."):
            inner = name.removeprefix("lapse_elmo.")
            found.add(inner if inner in modules else inner.rpartition(".")[0] or "__init__")
    return found


def within(module: str, names: set[str]) -> bool:
    return module in names or module.split(".")[0] in names


def dotted(node: ast.expr) -> str:
    """Return an expression such as ``np.random.seed`` as text; in a chain of calls, the names after the last one."""
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return f"{before}.{node.attr}" if before else node.attr
    return node.id if isinstance(node, ast.Name) else ""


def label(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SOURCES, ids=label)
def test_third_party_packages_have_owners(path: Path) -> None:
    inside = path.is_relative_to(ROOT / "lapse_elmo")
    for name in imported(path, types_too=False):
        top = name.split(".")[0]
        if "tensorboard" in name:
            top = "tensorboard"
        if top in OWNERS:
            assert inside, f"{label(path)} imports {top}"
            assert within(module_of(path), OWNERS[top]), f"{label(path)} imports {top}"


@pytest.mark.parametrize("path", PACKAGE, ids=label)
def test_only_bridges_know_both_server_and_model(path: Path) -> None:
    module = module_of(path)
    others = {other.split(".")[0] for other in own(path, types_too=False)}
    if module not in BRIDGES and module.split(".")[0] not in ("model", "ps"):
        assert not {"ps", "model"} <= others, f"{module} knows both server and model; only {sorted(BRIDGES)} may"


@pytest.mark.parametrize("path", EVERYTHING, ids=label)
def test_length(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < MAX_FILE_LINES
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length < MAX_FUNCTION_LINES, f"{label(path)}: {node.name} has {length} lines"


@pytest.mark.parametrize("path", SOURCES, ids=label)
def test_no_global_random_generator(path: Path) -> None:
    tree = tree_of(path)
    lent = {  # to a library that knows no other, for one call
        inner for node in ast.walk(tree) if isinstance(node, ast.With) and "fork_rng" in ast.dump(node.items[0])
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node not in lent:
            name = dotted(node.func)
            assert name not in GLOBAL_RANDOM, f"{label(path)}:{node.lineno}"
            if name.startswith(("np.random.", "numpy.random.", "random.")):
                last = name.split(".")[-1]
                assert last[0].isupper() or last == "default_rng", f"{label(path)}:{node.lineno} draws by {name}"


@pytest.mark.parametrize("path", SOURCES, ids=label)
def test_no_work_at_import(path: Path) -> None:
    """Importing a module runs only definitions, and calls that need no file, no process and no time."""
    for node in at_import(tree_of(path).body):
        for call in ast.walk(node):
            if isinstance(call, ast.Call):
                name = dotted(call.func)
                assert name.split(".")[-1] in PURE_CALLS, f"{label(path)}:{call.lineno} calls {name} at import"


def at_import(body: list[ast.stmt]) -> Iterator[ast.AST]:
    """Yield what an import runs: module and class bodies, but neither functions nor the ``__main__`` part."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from itertools.chain(node.decorator_list, node.args.defaults)
        elif isinstance(node, ast.ClassDef):
            yield from node.decorator_list
            yield from at_import(node.body)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'":
            continue
        elif isinstance(node, ast.If | ast.Try):
            yield from at_import(node.body)
            yield from at_import(node.orelse)
        else:
            yield node


def test_no_global_state() -> None:
    for path in SOURCES:
        for node in ast.walk(tree_of(path)):
            assert not isinstance(node, ast.Global), f"{label(path)}:{node.lineno} declares a global"


@pytest.mark.parametrize("path", sorted(p for p in (ROOT / "bin").iterdir() if p.is_file()), ids=label)
def test_programs_are_short(path: Path) -> None:
    """A program finds the environment and calls one entry point; everything else belongs to the package."""
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 30
    if path.suffix != ".py":
        entries = {"lapse_elmo.commands.run", "lapse_elmo.mpi.family.main"}
        assert {"_venv", "sys"} < imported(path) <= {"_venv", "sys", *entries}
    else:  # may run in an environment that lacks what the package imports
        assert not own(path)
