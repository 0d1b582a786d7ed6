"""Small C sources, compiled at first use where they run and called by ctypes; everything works without them.

A source is one C file without includes of its own. It is compiled by the system's ``cc`` for the processor at hand into
a cache folder (``$LAPSE_ELMO_CACHE``, else ``$XDG_CACHE_HOME/lapse-elmo``, else ``~/.cache/lapse-elmo``) under a name
that is a hash of the source, the compiler and its version, its options, the C library and the processor's features, so
that machines of different kinds may share the folder. ``LAPSE_ELMO_NATIVE=0`` turns all of it off.

For nodes without a compiler ``python -m lapse_elmo.native`` (``make native``) builds every source ahead, for this
machine and for common instruction sets; such a node takes the best that it has the instructions for.

The compiler's options keep NaN, infinity and the order of operations as written, but for sums and maxima marked by
``#pragma omp simd reduction``. ``-ffast-math`` would set flush-to-zero for the whole process where it is linked, and
turn a NaN into whatever a comparison makes of it. ``#pragma omp parallel for`` runs on the threads that torch has
already (its OpenMP library is found in the process, for two of them fight over the cores), or on one.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

SWITCH = "LAPSE_ELMO_NATIVE"
CACHE = "LAPSE_ELMO_CACHE"
_OPTIONS = ("-std=gnu11", "-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math")
# What a compiler may refuse, and what needs symbols that the process may lack: the first that loads is taken.
_VARIANTS = (
    ("-march=native", "-mprefer-vector-width=512", "-fopenmp"),
    ("-march=native", "-fopenmp"),
    ("-march=native", "-fopenmp-simd"),
    ("-fopenmp-simd",),
)
# What is built ahead, best first: a name, the compiler's options and the processor's features that it needs.
_V3 = frozenset({"avx2", "fma", "bmi1", "bmi2", "f16c", "movbe", "abm"})
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_WIDE = ("-march=x86-64-v4", "-mprefer-vector-width=512")
_TARGETS: tuple[tuple[str, tuple[str, ...], frozenset[str]], ...] = (
    ("amx", (*_WIDE, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"), _V4 | {"avx512_bf16", "amx_tile", "amx_bf16"}),
    ("avx512bf16", (*_WIDE, "-mavx512bf16"), _V4 | {"avx512_bf16"}),
    ("avx512", _WIDE, _V4),
    ("avx2", ("-march=x86-64-v3",), _V3),
    ("any", (), frozenset()),
)
_COMPILER_TIME_S = 60
_SHOWS_VERSION_S = 10


def load(source: Path) -> ctypes.CDLL | None:
    """The library compiled from ``source``, or None where native code is switched off or cannot be had here.

    The caller falls back to its twin in torch and says :func:`problem` in the log. Any number of processes and threads
    may call this at once. Pointers handed to the library's functions are not checked: wrap them in checks of one's own.
    """
    return _load(Path(source).resolve())[0] if enabled() else None


def problem(source: Path) -> str:
    """Why :func:`load` gave None, as one line; empty where it gave a library."""
    return _load(Path(source).resolve())[1] if enabled() else f"switched off by {SWITCH}={os.environ[SWITCH]}"


def enabled() -> bool:
    """False where the environment switches native code off."""
    return os.environ.get(SWITCH, "1").lower() not in ("0", "no", "off", "false")


@functools.cache
def _load(source: Path) -> tuple[ctypes.CDLL | None, str]:
    if "omp parallel" in source.read_text(encoding="utf-8"):
        share_openmp()
    try:
        folder = cache_folder()
    except OSError as error:
        return None, f"no folder for compiled code: {error}"
    compiler = find_compiler()
    reason = "there is no C compiler (cc, gcc or clang) and nothing built ahead that runs here (make native)"
    if compiler is not None:
        candidates = [
            (folder / f"{source.stem}-{_key(source, compiler, options)}.so", options)
            for options in ((*_OPTIONS, *variant) for variant in _VARIANTS)
        ]
        library, reason = _first_that_loads(source, candidates, compiler)
        if library is not None:
            return library, ""
    features = processor_features()
    ahead = [_path_ahead(folder, source, name) for name, _, needed in _TARGETS if needed <= features]
    library, _ = _first_that_loads(source, [(path, ()) for path in ahead if path.exists()], None)
    return library, "" if library is not None else reason


def _first_that_loads(
    source: Path, candidates: Sequence[tuple[Path, tuple[str, ...]]], compiler: str | None
) -> tuple[ctypes.CDLL | None, str]:
    """Load the first of (library, options) that can be, built where it is missing; and why the first could not."""
    reason = ""
    for path, options in candidates:
        try:
            if not path.exists() and compiler is not None:
                _build(source, path, compiler, options)
        except (subprocess.SubprocessError, OSError) as error:
            reason = reason or f"{compiler} cannot build {source.name}: {_first_line(error)}"
            if isinstance(error, subprocess.TimeoutExpired):
                break  # it would hang with other options, too
            continue
        try:
            return ctypes.CDLL(str(path)), ""
        except OSError as error:
            reason = reason or f"the library of {source.name} does not load: {error}"
    return None, reason


def _first_line(error: subprocess.SubprocessError | OSError) -> str:
    """What a compiler said first of why it failed; if it said nothing, how it ended."""
    status = getattr(error, "returncode", None)
    output = getattr(error, "stderr", None) or (str(error) if status is None else f"exit status {status}")
    return (output.strip().splitlines() or [str(error)])[0]


def find_compiler() -> str | None:
    """The path of ``$CC``, cc, gcc or clang; None where there is none."""
    return shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")


def build_ahead(source: Path) -> dict[str, str]:
    """Compile for all targets; by target an empty text, or the compiler's reason why not.

    :raises OSError: if there is no compiler or no folder.
    """
    compiler = find_compiler()
    if compiler is None:
        raise OSError("there is no C compiler (cc, gcc or clang)")
    folder, reasons = cache_folder(), {}
    for name, target, _ in _TARGETS:
        path = _path_ahead(folder, source, name)
        reasons[name] = ""
        for threads in ("-fopenmp", "-fopenmp-simd"):
            try:
                if not path.exists():
                    _build(source, path, compiler, (*_OPTIONS, *target, threads))
                break
            except (subprocess.SubprocessError, OSError) as error:
                reasons[name] = reasons[name] or _first_line(error)
        if path.exists():
            reasons[name] = ""
    return reasons


def cache_folder() -> Path:
    """A folder of this user's for compiled code, made where it is missing.

    :raises OSError: if it cannot be made, or others may write to it: what lies there is executed.
    """
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    wanted = [Path(os.environ.get(CACHE) or Path(base) / "lapse-elmo")]
    wanted.append(Path(tempfile.gettempdir()) / f"lapse-elmo-{os.getuid()}")
    failure = OSError("none was tried")
    for folder in wanted:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            state = folder.stat()
            if state.st_uid != os.getuid() or state.st_mode & 0o022:
                raise PermissionError(f"others may write to {folder}")
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError as error:
            failure = error
    raise failure


def share_openmp() -> None:
    """Make the OpenMP library that torch brought along visible to libraries loaded later."""
    import torch  # noqa: F401 (loads it; here, because programs without a model start faster without torch)

    with contextlib.suppress(OSError), open("/proc/self/maps", encoding="utf-8") as maps:
        for path in {line.split(maxsplit=5)[5].strip() for line in maps if "libgomp" in line}:
            ctypes.CDLL(path, ctypes.RTLD_GLOBAL)


def _key(source: Path, compiler: str, options: tuple[str, ...]) -> str:
    text = source.read_text(encoding="utf-8")
    parts = (text, compiler, _version(compiler), *options, platform.machine(), _processor(), *platform.libc_ver())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _path_ahead(folder: Path, source: Path, target: str) -> Path:
    """Of a library that any machine with the target's instructions may load: its name says nothing of the builder."""
    parts = (source.read_text(encoding="utf-8"), *_OPTIONS, target, platform.machine())
    return folder / f"{source.stem}-{target}-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}.so"


@functools.cache
def _version(compiler: str) -> str:
    """What the compiler says of itself; empty if it says nothing."""
    try:
        run = subprocess.run(
            [compiler, "--version"], capture_output=True, text=True, errors="replace", timeout=_SHOWS_VERSION_S,
            check=False, stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return run.stdout


@functools.cache
def processor_features() -> frozenset[str]:
    """The processor's features as Linux names them."""
    for line in _processor().splitlines():
        if line.startswith(("flags", "Features")):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


def _processor() -> str:
    """Model and features, on which ``-march=native`` depends."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as info:
        kinds = ("flags", "Features", "model", "cpu family", "CPU ")
        return "\n".join(line for line in info.read().split("\n\n")[0].splitlines() if line.startswith(kinds))
    return platform.processor()


def _build(source: Path, library: Path, compiler: str, options: tuple[str, ...]) -> None:
    """Compile and link; the library appears whole or not at all, and of many callers one does the work.

    Linking is a step of its own, without ``-fopenmp``: it would bring in the system's OpenMP library beside torch's.
    """
    with _only_one(library.with_suffix(".lock")):
        if library.exists():
            return
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            thing, linked = f"{scratch}/object.o", f"{scratch}/library.so"
            for command in ([*options, "-c", str(source), "-o", thing], ["-shared", thing, "-o", linked, "-lm"]):
                subprocess.run(
                    [compiler, *command], check=True, capture_output=True, text=True, errors="replace",
                    timeout=_COMPILER_TIME_S, stdin=subprocess.DEVNULL,
                )
            os.replace(linked, library)


@contextlib.contextmanager
def _only_one(path: Path) -> Iterator[None]:
    """Hold a lock between processes; where the file system has none, several do the same work."""
    with open(path, "w") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main() -> int:
    """``make native``: build every C source of the package; 1 if one could not be built for this machine."""
    status = 0
    print(f"compiled code goes to {cache_folder()}")
    for source in sorted(Path(__file__).parent.rglob("*.c")):
        if load(source) is None:
            status, why = 1, problem(source)
            print(f"{source.name}: not for this machine: {why}")
            continue
        reasons = build_ahead(source)
        print(f"{source.name}: for this machine, {', '.join(name for name, why in reasons.items() if not why)}")
        for name, why in reasons.items():
            if why:
                print(f"{source.name}: not for {name}: {why}")
    return status


if __name__ == "__main__":
    sys.exit(main())
