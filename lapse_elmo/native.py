"""Small C sources, compiled at first use where they run and called by ctypes; everything works without them.

A source is one C file without includes of its own. It is compiled by the system's ``cc`` for the processor at hand into
a cache folder (``$LAPSE_ELMO_CACHE``, else ``$XDG_CACHE_HOME/lapse-elmo``, else ``~/.cache/lapse-elmo``) under a name
that is a hash of the source, the compiler's options and the processor's features, so that machines of different kinds
may share the folder. ``LAPSE_ELMO_NATIVE=0`` turns all of it off.

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
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch  # noqa: F401 (loads the OpenMP library that the compiled code shares)

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
_COMPILER_TIME_S = 60


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
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None, "there is no C compiler (cc, gcc or clang)"
    share_openmp()
    reason = ""
    try:
        folder = cache_folder()
        for variant in _VARIANTS:
            options = (*_OPTIONS, *variant)
            library = folder / f"{source.stem}-{_key(source, compiler, options)}.so"
            try:
                if not library.exists():
                    _build(source, library, compiler, options)
                return ctypes.CDLL(str(library)), ""
            except (subprocess.SubprocessError, OSError) as error:
                status = getattr(error, "returncode", None)
                output = getattr(error, "stderr", None) or (str(error) if status is None else f"exit status {status}")
                reason = reason or f"{compiler} cannot build {source.name}: {output.strip().splitlines()[0]}"
                if isinstance(error, subprocess.TimeoutExpired):
                    break  # it would hang with other options, too
    except OSError as error:
        return None, f"no folder for compiled code: {error}"
    return None, reason


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
    with contextlib.suppress(OSError), open("/proc/self/maps", encoding="utf-8") as maps:
        for path in {line.split(maxsplit=5)[5].strip() for line in maps if "libgomp" in line}:
            ctypes.CDLL(path, ctypes.RTLD_GLOBAL)


def _key(source: Path, compiler: str, options: tuple[str, ...]) -> str:
    parts = (source.read_text(encoding="utf-8"), compiler, *options, platform.machine(), _processor())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


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
