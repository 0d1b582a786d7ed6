"""Import single modules of AllenNLP without the rest of it; nothing else in lapse-elmo imports allennlp.

``import allennlp.modules`` imports all of AllenNLP, spaCy, transformers and torchvision. A training rank that uses
ElmoLstm needs none of these packages. :func:`modules` therefore imports only the files of the installed package that
define the requested module. During the import, empty placeholder packages replace ``allennlp``, ``allennlp.modules``,
``allennlp.nn`` and ``allennlp.common`` in ``sys.modules``. Afterwards ``sys.modules`` is restored, so a later
``import allennlp.modules`` works as usual.

Two submodules with heavy dependencies, ``allennlp.common.util`` (spaCy) and ``allennlp.common.file_utils``
(cached_path, lmdb), get placeholders that import the real module when one of its functions is first called. Of the
modules imported here, only ``ElmoLstm.load_weights`` does so.

Measured on two cores of a 2022 server (torch 2.13.0, allennlp 2.10.1, torch already imported): this import takes
0.06 to 0.08 s, 42 modules and 11 MB; ``import allennlp.modules`` takes 6 to 7 s, 2,971 modules and 205 MB.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from lapse_elmo.errors import ConfigError

_PACKAGE = "allennlp"
# Names that AllenNLP's files import from a package rather than from the module that defines them.
_PACKAGE_NAMES = {
    "FromParams": "allennlp.common.from_params",
    "Registrable": "allennlp.common.registrable",
    "Params": "allennlp.common.params",
}
_DEFERRED = ("allennlp.common.util", "allennlp.common.file_utils")


def elmo_lstm() -> Any:
    """Return AllenNLP's ElmoLstm class, whose state carries over between batches until ``reset_states()``."""
    return modules("elmo_lstm").ElmoLstm


@functools.cache
def modules(name: str) -> ModuleType:
    """Return the module ``allennlp.modules.<name>``, imported without the rest of AllenNLP.

    If ``allennlp.modules`` has already been imported in full, returns its own submodule.

    Raises:
        ConfigError: If allennlp is not installed, or one of its imports is missing.
    """
    full_name = f"{_PACKAGE}.modules.{name}"
    try:
        if f"{_PACKAGE}.modules" in sys.modules:
            return importlib.import_module(full_name)
        with _placeholders(), _quiet():
            return importlib.import_module(full_name)
    except ImportError as error:
        raise ConfigError(
            f"AllenNLP's {name} cannot be imported ({error}): install the package of requirements-nodeps.txt with "
            "pip's --no-deps, or choose lstm = fused, which needs no allennlp"
        ) from error


@contextmanager
def _placeholders() -> Iterator[None]:
    """Put placeholder packages into ``sys.modules``; on exit, remove them and everything imported through them."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("allennlp is not installed")
    before = {name: module for name, module in sys.modules.items() if _is_allennlp(name)}
    for name in before:
        del sys.modules[name]
    root = spec.submodule_search_locations[0]
    try:
        for name in (_PACKAGE, f"{_PACKAGE}.modules", f"{_PACKAGE}.nn", f"{_PACKAGE}.common"):
            package = _Package(name)
            package.__path__ = [root + name.removeprefix(_PACKAGE).replace(".", "/")]
            sys.modules[name] = package
        for name in _DEFERRED:
            sys.modules[name] = _Deferred(name)
        yield
    finally:
        for name in [name for name in sys.modules if _is_allennlp(name)]:
            del sys.modules[name]
        sys.modules.update(before)


def _is_allennlp(name: str) -> bool:
    return name == _PACKAGE or name.startswith(f"{_PACKAGE}.")


class _Package(ModuleType):
    """A package without its ``__init__``; gets the names that it should have from the modules that define them."""

    def __getattr__(self, name: str) -> Any:
        if name in _PACKAGE_NAMES:
            return getattr(importlib.import_module(_PACKAGE_NAMES[name]), name)
        raise AttributeError(name)


class _Deferred(ModuleType):
    """A placeholder for a module; its functions import the real module when called."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        module_name = self.__name__

        def call(*args: Any, **kwargs: Any) -> Any:
            with _quiet():
                real = importlib.import_module(module_name)
            return getattr(real, name)(*args, **kwargs)

        return call


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence deprecation warnings that these libraries cause on import; only their authors can fix them."""
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning, PendingDeprecationWarning):
            warnings.simplefilter("ignore", category)
        warnings.filterwarnings("ignore", message="Failed to load image Python extension")
        yield
