"""Compile small C sources at first use, and load them with ctypes. Everything also works without them, more slowly.

A source is one C file without includes of its own. The system's ``cc`` compiles it for the processor at hand into a
cache folder (``$LAPSE_ELMO_CACHE``, else ``$XDG_CACHE_HOME/lapse-elmo``, else ``~/.cache/lapse-elmo``). The name of the
library contains a hash of the source, the compiler and its version, its options, the C library and the processor's
features, so machines of different kinds may share the folder. ``LAPSE_ELMO_NATIVE=0`` turns native code off.

For nodes without a compiler, ``python -m lapse_elmo.native`` (``make native``) compiles every source ahead, for this
machine and for common instruction sets; such a node loads the best library that it can run.

The compiler options preserve NaN, infinity and the order of operations, except for sums and maxima marked by
``#pragma omp simd reduction``. ``-ffast-math`` is not used: when linked, it sets flush-to-zero for the whole process,
and comparisons with NaN become undefined. ``#pragma omp parallel for`` runs on the OpenMP threads that torch has
started already, because those of a second OpenMP library would compete for the cores; without torch's it
runs on one thread.
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
# Options from best to safest: a compiler may reject some, and the library may need symbols that the process lacks.
# The first variant that compiles and loads is used.
_VARIANTS = (
    ("-march=native", "-mprefer-vector-width=512", "-fopenmp"),
    ("-march=native", "-fopenmp"),
    ("-march=native", "-fopenmp-simd"),
    ("-fopenmp-simd",),
)
# Targets of compilation ahead of time, best first: name, compiler options, and the processor features that it needs.
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
    """Return the library compiled from ``source``, or None if native code is switched off or not available here.

    The caller then uses its fallback in torch, and logs :func:`problem`. Any number of processes and threads may call
    this at the same time. ctypes does not check the pointers that are passed to the library: callers must.
    """
    return _load(Path(source).resolve())[0] if enabled() else None


def problem(source: Path) -> str:
    """Return in one line why :func:`load` returned None; empty if it returned a library."""
    return _load(Path(source).resolve())[1] if enabled() else f"switched off by {SWITCH}={os.environ[SWITCH]}"


def enabled() -> bool:
    """Return whether native code is enabled: the environment may switch it off."""
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
    reason = "there is no C compiler (cc, gcc or clang), and no library compiled ahead (make native) runs here"
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
    """Load the first of (library, options) that loads, compiling missing ones; also return why the first one failed."""
    reason = ""
    for path, options in candidates:
        try:
            if not path.exists() and compiler is not None:
                _build(source, path, compiler, options)
        except (subprocess.SubprocessError, OSError) as error:
            reason = reason or f"{compiler} cannot build {source.name}: {_first_line(error)}"
            if isinstance(error, subprocess.TimeoutExpired):
                break  # it would probably hang with other options, too
            continue
        try:
            return ctypes.CDLL(str(path)), ""
        except OSError as error:
            reason = reason or f"the library of {source.name} does not load: {error}"
    return None, reason


def _first_line(error: subprocess.SubprocessError | OSError) -> str:
    """Return the first line of a compiler's error message, or its exit status if there is none."""
    status = getattr(error, "returncode", None)
    output = getattr(error, "stderr", None) or (str(error) if status is None else f"exit status {status}")
    return (output.strip().splitlines() or [str(error)])[0]


def find_compiler() -> str | None:
    """Return the path of ``$CC``, cc, gcc or clang; None if there is none."""
    return shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")


def build_ahead(source: Path) -> dict[str, str]:
    """Compile ``source`` for all targets.

    Returns:
        For each target an empty string, or the reason why it was not compiled.

    Raises:
        OSError: If there is no compiler or no cache folder.
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
    """Return this user's folder for compiled code, and create it if it is missing.

    Raises:
        OSError: If it cannot be created, or if others may write to it: its contents are executed.
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
    """Make torch's own OpenMP library visible to libraries that are loaded later."""
    import torch  # noqa: F401 (loads its library; not at the top, since programs without a model start faster without it)

    with contextlib.suppress(OSError), open("/proc/self/maps", encoding="utf-8") as maps:
        for path in {line.split(maxsplit=5)[5].strip() for line in maps if "libgomp" in line}:
            ctypes.CDLL(path, ctypes.RTLD_GLOBAL)


def _key(source: Path, compiler: str, options: tuple[str, ...]) -> str:
    text = source.read_text(encoding="utf-8")
    parts = (text, compiler, _version(compiler), *options, platform.machine(), _processor(), *platform.libc_ver())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _path_ahead(folder: Path, source: Path, target: str) -> Path:
    """Return the path of a library that any machine with the target's instructions may load."""
    parts = (source.read_text(encoding="utf-8"), *_OPTIONS, target, platform.machine())
    return folder / f"{source.stem}-{target}-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}.so"


@functools.cache
def _version(compiler: str) -> str:
    """Return the compiler's version; empty if it does not print one."""
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
    """Return the processor's features as Linux names them."""
    for line in _processor().splitlines():
        if line.startswith(("flags", "Features")):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


def _processor() -> str:
    """Return the processor's model and features, on which ``-march=native`` depends."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as info:
        kinds = ("flags", "Features", "model", "cpu family", "CPU ")
        return "\n".join(line for line in info.read().split("\n\n")[0].splitlines() if line.startswith(kinds))
    return platform.processor()


def _build(source: Path, library: Path, compiler: str, options: tuple[str, ...]) -> None:
    """Compile and link, atomically; of several processes that call this, one does the work.

    Linking is a separate step without ``-fopenmp``, which would load a second OpenMP library in addition to torch's.
    """
    with _only_one(library.with_suffix(".lock")):
        if library.exists():
            return
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            built, linked = f"{scratch}/object.o", f"{scratch}/library.so"
            for command in ([*options, "-c", str(source), "-o", built], ["-shared", built, "-o", linked, "-lm"]):
                subprocess.run(
                    [compiler, *command], check=True, capture_output=True, text=True, errors="replace",
                    timeout=_COMPILER_TIME_S, stdin=subprocess.DEVNULL,
                )
            os.replace(linked, library)


@contextlib.contextmanager
def _only_one(path: Path) -> Iterator[None]:
    """Hold a lock between processes; on a file system without locks several of them do the same work."""
    with open(path, "w") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main() -> int:
    """Compile every C source of the package (``make native``); return 1 if one fails for this machine, else 0."""
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
