"""Compile small C sources at first use, and load them with ctypes. Everything also works without them, more slowly.

A source is one C file without includes of its own. The system's ``cc`` compiles it for the processor at hand into a
cache folder (``$LAPSE_ELMO_CACHE``, else ``$XDG_CACHE_HOME/lapse-elmo``, else ``~/.cache/lapse-elmo``). The name of the
library contains a hash of the source, the compiler and its version, its options, the C library and the processor's
features, so machines of different kinds may share the folder. A library ends with a digest of itself, so a damaged one
is recognised and built again. ``LAPSE_ELMO_NATIVE=0`` turns native code off.

For nodes without a compiler, ``python -m lapse_elmo.native`` (``make native``) compiles every source ahead, for this
machine and for common instruction sets; such a node loads the best library that it can run, and of several the one
that was built with its own C library.

A compiler that hangs is waited for once in a job: the process that found out leaves a file in the cache folder, and
for some minutes no process that shares the folder tries that compiler again.

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
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from lapse_elmo.code_cache import CACHE, cache_folder, is_full, own_folder, readable_folders, temporary_folder
from lapse_elmo.subprocesses import error_line, output_of

SWITCH = "LAPSE_ELMO_NATIVE"
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
_THREADS = ("-fopenmp", "-fopenmp-simd")  # of these libraries, best first
_COMPILER_TIME_S = 60  # each source takes a second
_SHOWS_VERSION_S = 20
_HANGS_FOR_S = 600  # how long a compiler that hung is not tried again: longer than a job takes to start
_DIGEST_BYTES = 32


def load(source: Path) -> ctypes.CDLL | None:
    """Return the library compiled from ``source``, or None if native code is switched off or not available here.

    The caller then uses its fallback in torch, and logs :func:`problem`. Any number of processes and threads may call
    this at the same time. ctypes does not check the pointers that are passed to the library: callers must.
    """
    return _load(_resolved(source))[0] if enabled() else None


def address(function: Callable[..., None]) -> int:
    """Return the address of a function of a loaded library, for C code that calls it."""
    found = ctypes.cast(function, ctypes.c_void_p).value  # type: ignore[arg-type]
    assert found is not None
    return found


def problem(source: Path) -> str:
    """Return in one line why :func:`load` returned None; empty if it returned a library."""
    return _load(_resolved(source))[1] if enabled() else f"switched off by {SWITCH}={os.environ[SWITCH]}"


def enabled() -> bool:
    """Return whether native code is enabled: the environment may switch it off."""
    return switched_on(SWITCH)


def switched_on(variable: str) -> bool:
    """Return whether what an environment variable switches is on, as it is by default."""
    return os.environ.get(variable, "1").lower() not in ("0", "no", "off", "false")


@functools.cache
def _resolved(source: Path) -> Path:
    """Return the path without links; cached, since each of its directories is looked up, some 70 times a step."""
    return Path(source).resolve()


@functools.cache
def _load(source: Path) -> tuple[ctypes.CDLL | None, str]:
    _prepare(source)
    reason = "there is no C compiler (cc, gcc or clang), and no library compiled ahead (make native) runs here"
    if (compiler := find_compiler()) is not None:
        try:
            folder = cache_folder()
        except OSError as error:
            library, reason = None, f"no directory for compiled code: {error}"
        else:
            library, reason = _load_compiled(source, folder, compiler)
            if library is None and is_full(folder):
                with contextlib.suppress(OSError):
                    library, _ = _load_compiled(source, own_folder(temporary_folder()), compiler)
        if library is not None:
            return library, ""
    for name, _, needed in _TARGETS:
        for folder in readable_folders() if needed <= processor_features() else ():
            for path in _paths_ahead(folder, source, name):
                with contextlib.suppress(OSError):
                    return ctypes.CDLL(str(path)), ""
    return None, reason


def _load_compiled(source: Path, folder: Path, compiler: str) -> tuple[ctypes.CDLL | None, str]:
    """Load the first variant that compiles and loads, compiling missing ones; else return why the first one failed."""
    reason = ""
    for variant in _VARIANTS:
        options, built = (*_OPTIONS, *variant), False
        try:
            path = folder / f"{source.stem}-{_key(source, compiler, options)}.so"
            if not _is_whole(path):
                _build(source, path, compiler, options)
            built = True
            return ctypes.CDLL(str(path)), ""
        except (subprocess.SubprocessError, OSError) as error:
            problem = f"the library of {source.name} does not load" if built else f"{source.name} is not compiled"
            reason = reason or f"{problem}: {error_line(error)}"
            if isinstance(error, TimeoutError):
                break  # it would hang with other options, too
    return None, reason


def find_compiler() -> str | None:
    """Return the path of ``$CC``, cc, gcc or clang; None if there is none."""
    return shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")


def build_ahead(source: Path) -> dict[str, str]:
    """Compile ``source`` for all targets.

    Returns:
        For each target an empty string, or the reason why it was not compiled.

    Raises:
        OSError: If there is no compiler or no cache directory.
    """
    compiler = find_compiler()
    if compiler is None:
        raise OSError("there is no C compiler (cc, gcc or clang)")
    _prepare(source)
    folder, kinds = cache_folder(), list(_THREADS)
    reasons: dict[str, str] = {}
    for name, target, _ in reversed(_TARGETS):  # the one for any processor, which loads here if any does, is the first
        reason = "" if kinds else reasons[_TARGETS[-1][0]]  # what does not load for any processor is built for none
        for threads in tuple(kinds):
            path = _path_ahead(folder, source, name, compiler, threads)
            try:
                if not _is_whole(path):
                    _build(source, path, compiler, (*_OPTIONS, *target, threads))
                if not target:
                    ctypes.CDLL(str(path))
                reason = ""
                break
            except (subprocess.SubprocessError, OSError) as error:
                reason = reason or error_line(error)
                if not target:  # Clang's OpenMP is another one than torch's
                    kinds.remove(threads)
        reasons[name] = reason
    return {name: reasons[name] for name, *_ in _TARGETS}


def _prepare(source: Path) -> None:
    """Make torch's OpenMP library visible to the library of ``source`` if that uses threads."""
    if "omp parallel" in source.read_text(encoding="utf-8"):
        share_openmp()


def share_openmp() -> None:
    """Make torch's own OpenMP library visible to libraries that are loaded later."""
    import torch  # noqa: F401 (loads its library; not at the top, since programs without a model start faster without it)

    with contextlib.suppress(OSError), open("/proc/self/maps", encoding="utf-8") as maps:
        for path in {line.split(maxsplit=5)[5].strip() for line in maps if "libgomp" in line}:
            ctypes.CDLL(path, ctypes.RTLD_GLOBAL)


def _key(source: Path, compiler: str, options: tuple[str, ...]) -> str:
    text = source.read_text(encoding="utf-8")
    return _hash(text, compiler, _version(compiler), *options, platform.machine(), _processor(), *platform.libc_ver())


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _stem_ahead(source: Path, target: str) -> str:
    """Return how the name of each library begins that any machine with the target's instructions may load."""
    key = _hash(source.read_text(encoding="utf-8"), *_OPTIONS, target, platform.machine())
    return f"{source.stem}-{target}-{key}-"


def _path_ahead(folder: Path, source: Path, target: str, compiler: str, threads: str = _THREADS[0]) -> Path:
    """Return where ``compiler`` puts its library for ``target``: another compiler or C library builds another one."""
    return folder / f"{_stem_ahead(source, target)}{_libc()}-{_hash(compiler, _version(compiler), threads)}.so"


def _paths_ahead(folder: Path, source: Path, target: str) -> list[Path]:
    """Return the whole libraries for ``target``: first those built with this machine's C library, then the newest."""
    stem = _stem_ahead(source, target)
    found = [path for path in folder.glob(f"{stem}*.so") if _is_whole(path)]
    own = f"{stem}{_libc()}-"
    return sorted(found, key=lambda path: (path.name.startswith(own), path.stat().st_mtime), reverse=True)


def _libc() -> str:
    return "".join(platform.libc_ver()) or "libc"


@functools.cache
def _version(compiler: str) -> str:
    """Return the compiler's version; empty if it does not print one.

    Raises:
        TimeoutError: It hangs.
    """
    try:
        return _run([compiler, "--version"], _SHOWS_VERSION_S)
    except subprocess.SubprocessError:
        return ""


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

    Raises:
        subprocess.CalledProcessError: The compiler fails.
        TimeoutError: It hangs, or did so in another process a short time ago.
    """
    with _only_one(library.with_suffix(".lock")):
        if _is_whole(library):
            return
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            built, linked = Path(scratch, "object.o"), Path(scratch, "library.so")
            for command in ([*options, "-c", str(source), "-o", str(built)], ["-shared", built, "-o", linked, "-lm"]):
                _run([compiler, *map(str, command)], _COMPILER_TIME_S)
            digest = hashlib.sha256(linked.read_bytes()).digest()
            with open(linked, "ab") as file:  # the loader ignores what follows the sections
                file.write(digest)
            _give_name(linked, library)


def _give_name(built: Path, library: Path) -> None:
    """Give a new library its name, unless another process was faster, which locks do not prevent on every file system.

    To replace a library removes the one before, which processes of other machines may have loaded: NFS then fails to
    read the parts of it that have left their memory, and they are killed, perhaps days later.
    """
    try:
        os.link(built, library)
    except OSError:
        if not _is_whole(library):  # a damaged one, or a file system without hard links
            os.replace(built, library)


def _is_whole(library: Path) -> bool:
    """Return whether a library exists and is as it was written: to load a damaged one may crash the process."""
    try:
        content = library.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-_DIGEST_BYTES]).digest() == content[-_DIGEST_BYTES:]


def _run(command: Sequence[str], seconds: float) -> str:
    """Run a compiler and return what it prints; end it with all its children if it takes longer than ``seconds``.

    Raises:
        subprocess.CalledProcessError: It fails.
        TimeoutError: It takes too long, or did so a short time ago, in any process that shares the cache folder.
    """
    mark = _mark_of_hanging(command[0], command[1])
    with contextlib.suppress(FileNotFoundError):
        if abs(time.time() - mark.stat().st_mtime) < _HANGS_FOR_S:
            raise TimeoutError(f"{command[0]} hung a short time ago (to try it again now, remove {mark})")
    try:
        return output_of(command, seconds)
    except TimeoutError:
        with contextlib.suppress(OSError):
            mark.touch()
        raise


def _mark_of_hanging(compiler: str, purpose: str) -> Path:
    """Return the file whose date says when a compiler hung: another one for another version of its program."""
    state = os.stat(compiler)
    kind = "version" if purpose == "--version" else "build"
    key = _hash(os.path.realpath(compiler), str(state.st_size), str(state.st_mtime_ns))
    return cache_folder() / f"{kind}-{key}.hung"


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
    if named := os.environ.get(CACHE):  # another directory would not do: other machines look into this one
        try:
            own_folder(Path(named))
        except OSError as error:
            print(f"{CACHE} is {named}, which cannot be used: {error}")
            return 1
    print(f"compiled code goes to {cache_folder()}")
    for mark in cache_folder().glob("*.hung"):
        mark.unlink(missing_ok=True)
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
