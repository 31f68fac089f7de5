"""Plain Python beside the weights: the function that makes a network.

A module is compiled from the source that was checked, under a private name: two models, or two versions of one, may
have modules of the same name. Nothing is added to sys.path, and no bytecode is written into the repository or read
from it. A module imports its siblings relatively: `from .layers import Block` or `from . import layers`.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import itertools
import sys
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import torch

from tnxctl.protocol.errors import FailedPrecondition, TensorNextError
from tnxd.error_text import sentence
from tnxd.files import MOST_CODE, read_open
from tnxd.models.process_state import monkey_patches
from tnxd.models.trust import TrustedFiles

_ROOT = "tnxd_repository"
_numbers = itertools.count(1)


class Factory:
    """Caller of the "module:function" of one version. The module is executed once, at the first call.

    Args:
        name: of the model and version, for tracebacks.
    """

    def __init__(self, files: TrustedFiles, reference: str, name: str) -> None:
        self._files = files
        self._module_name, _, self._function_name = reference.partition(":")
        self._package = f"{_ROOT}.{name.replace('.', '-')}#{next(_numbers)}"
        self._function: Callable[[], Any] | None = None
        self.label = files.guard.label(self._path())

    def __call__(self) -> torch.nn.Module:
        """The network, as the function makes it.

        Raises:
            FailedPrecondition: it raises, does not return a module, or has put something in the place of a function of
                torch; the sentence names the file.
        """
        if self._function is None:
            self._function = self._import()
        network = self._run(f"{self._function_name}()", self._function)
        if not isinstance(network, torch.nn.Module):
            raise FailedPrecondition(
                f"{self.label}: {self._function_name}() returned {type(network).__name__}, not a torch.nn.Module"
            )
        return network

    def _path(self) -> Path:
        found = [
            path
            for directory in self._files.code
            for path in (directory / f"{self._module_name}.py", directory / self._module_name / "__init__.py")
            if path in self._files.identities
        ]
        if not found:
            places = " or ".join(self._files.guard.label(directory) for directory in self._files.code)
            raise FailedPrecondition(f"factory: there is no {self._module_name}.py in {places}")
        return found[0]

    def _import(self) -> Callable[[], Any]:
        _finder.packages[self._package] = self._files
        weakref.finalize(self, _forget, self._package).atexit = False
        module: ModuleType = self._run(
            "importing it", lambda: importlib.import_module(f"{self._package}.{self._module_name}")
        )
        function = getattr(module, self._function_name, None)
        if not callable(function):
            what = "is not callable" if hasattr(module, self._function_name) else "is not in it"
            raise FailedPrecondition(f"{self.label}: the factory {self._function_name!r} {what}")
        return function  # type: ignore[no-any-return]

    def _run(self, what: str, call: Callable[[], Any]) -> Any:
        try:
            result = call()
        except TensorNextError:
            raise
        except (Exception, SystemExit) as error:
            raise FailedPrecondition(f"{self.label}: {what} raised {sentence(error)}") from error
        replaced = monkey_patches.undo()
        if replaced:
            raise FailedPrecondition(f"{self.label}: {monkey_patches.sentence(what, replaced)}")
        return result


def is_private(module: str) -> bool:
    """Whether a module of that name is one that stands beside weights in a repository."""
    return module.startswith(f"{_ROOT}.")


class _Loader(importlib.machinery.SourceFileLoader):
    """Loader that compiles the source that was checked, and keeps no bytecode."""

    def __init__(self, fullname: str, path: str, files: TrustedFiles) -> None:
        super().__init__(fullname, path)
        self._files = files

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        with self._files.open(Path(path)) as file:
            source = read_open(file, self._files.guard.label(Path(path)), MOST_CODE)
            code: CodeType = self.source_to_code(source, path)
        return code


class _Finder(importlib.abc.MetaPathFinder):
    """Finder of modules below the private packages alone. Attributes: packages: private name -> its files."""

    def __init__(self) -> None:
        self.packages: dict[str, TrustedFiles] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _ROOT and not fullname.startswith(f"{_ROOT}."):
            return None
        package, _, module = fullname.removeprefix(f"{_ROOT}.").partition(".")
        files = self.packages.get(f"{_ROOT}.{package}")
        if fullname == _ROOT or (files is not None and not module):
            return importlib.machinery.ModuleSpec(fullname, None, is_package=True)
        if files is None:
            return None
        for directory in files.code:
            place = directory.joinpath(*module.split("."))
            for candidate, is_package in ((place / "__init__.py", True), (place.with_suffix(".py"), False)):
                if candidate in files.identities:
                    loader = _Loader(fullname, str(candidate), files)
                    spec = importlib.machinery.ModuleSpec(
                        fullname, loader, origin=str(candidate), is_package=is_package
                    )
                    # A package has no path of its own: Python's finder, which is asked first, would take modules from
                    # there, and bytecode, that nobody has checked.
                    spec.has_location = True
                    return spec
        return None


_finder = _Finder()
sys.meta_path.append(_finder)


def _forget(package: str) -> None:
    """Drop the modules of a model that is gone; what still runs keeps its own."""
    del _finder.packages[package]
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        del sys.modules[name]
    with contextlib.suppress(KeyError, AttributeError):
        delattr(sys.modules[_ROOT], package.removeprefix(f"{_ROOT}."))
