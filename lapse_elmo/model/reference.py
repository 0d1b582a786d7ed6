"""AllenNLP's own modules, imported leanly: the one place of lapse-elmo that imports allennlp.

``import allennlp.modules`` runs all of AllenNLP, spaCy, transformers and torchvision, and fails beside a CPU build of
torch where torchvision is the CUDA build of PyPI (``operator torchvision::nms does not exist``). A training rank that
wants ElmoLstm needs none of them. So :func:`modules` imports the few real files of the installed package that define
the modules asked for, while light package objects stand in for ``allennlp``, ``allennlp.modules``, ``allennlp.nn`` and
``allennlp.common``, and puts ``sys.modules`` back afterwards: a real ``import allennlp.modules`` later on finds
nothing of it (call :func:`declare_torchvision_operators` first beside a CPU torch).

Two submodules with heavy dependencies of their own, ``allennlp.common.util`` (spaCy) and ``allennlp.common.file_utils``
(cached_path, lmdb), are stood in for as well: their functions are imported for real when one is first called, which in
the modules served here happens only in ``ElmoLstm.load_weights``.

Measured on two cores of a 2022 server (torch 2.13.0, allennlp 2.10.1, torch imported before): the lean import takes
0.06 to 0.08 s, 42 modules and 11 MB; ``import allennlp.modules`` 6 to 7 s, 2,971 modules and 205 MB.
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

import torch

from lapse_elmo.errors import ConfigError

_PACKAGE = "allennlp"
# Names that AllenNLP's files take from a package rather than from the file that defines them.
_PACKAGE_NAMES = {
    "FromParams": "allennlp.common.from_params",
    "Registrable": "allennlp.common.registrable",
    "Params": "allennlp.common.params",
}
_DEFERRED = ("allennlp.common.util", "allennlp.common.file_utils")


def elmo_lstm() -> Any:
    """AllenNLP's ElmoLstm class. Its state passes from batch to batch until ``reset_states()``."""
    return modules("elmo_lstm").ElmoLstm


def scalar_mix() -> Any:
    """AllenNLP's ScalarMix class."""
    return modules("scalar_mix").ScalarMix


def sampled_softmax_loss() -> Any:
    """AllenNLP's SampledSoftmaxLoss class; it draws from the global NumPy generator unless given another choice."""
    return modules("sampled_softmax_loss").SampledSoftmaxLoss


@functools.cache
def modules(name: str) -> ModuleType:
    """Return the installed file ``allennlp/modules/<name>.py`` as a module, imported leanly and once.

    Where ``allennlp.modules`` has been imported for real already, that one's submodule.

    Raises:
        ConfigError: Where allennlp is not installed, or one of its imports is missing.
    """
    full_name = f"{_PACKAGE}.modules.{name}"
    try:
        if f"{_PACKAGE}.modules" in sys.modules:
            return importlib.import_module(full_name)
        with _stand_ins(), _quiet():
            return importlib.import_module(full_name)
    except ImportError as error:
        raise ConfigError(
            f"AllenNLP's {name} cannot be imported ({error}): install the package of requirements-nodeps.txt with "
            "pip's --no-deps, or choose lstm = fused, which needs no allennlp"
        ) from error


@functools.cache
def declare_torchvision_operators() -> torch.library.Library | None:
    """Declare the operators that a CUDA build of torchvision misses beside a CPU torch, so that it can be imported.

    Returns:
        The library that holds the declarations (they live as long as it does, hence the cache), or None where the
        operators are there.
    """
    if importlib.util.find_spec("torchvision") is None:
        return None
    with _quiet():
        try:
            importlib.import_module("torchvision")
            return None
        except (RuntimeError, ImportError, OSError):
            for half_imported in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
                del sys.modules[half_imported]
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


@contextmanager
def _stand_ins() -> Iterator[None]:
    """Stand-in packages in ``sys.modules``; on the way out they and everything imported through them leave again."""
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
    """A package whose ``__init__`` is not run; the names it would offer come from the files that define them."""

    def __getattr__(self, name: str) -> Any:
        if name in _PACKAGE_NAMES:
            return getattr(importlib.import_module(_PACKAGE_NAMES[name]), name)
        raise AttributeError(name)


class _Deferred(ModuleType):
    """A module whose functions import the real one when they are called."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        module_name = self.__name__

        def call(*args: Any, **kwargs: Any) -> Any:
            declare_torchvision_operators()
            with _quiet():
                real = importlib.import_module(module_name)
            return getattr(real, name)(*args, **kwargs)

        return call


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what these libraries warn of on import: deprecated interfaces that only their authors can change."""
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning, PendingDeprecationWarning):
            warnings.simplefilter("ignore", category)
        warnings.filterwarnings("ignore", message="Failed to load image Python extension")
        yield
