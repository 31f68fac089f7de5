"""Plain Python in a version: its modules, imported under private names. No torch.

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
from collections.abc import Sequence
from pathlib import Path
from types import CodeType, ModuleType

from tnxctl.files.reading import MOST_CODE, read_open
from tnxd.models.trust import TrustedFiles

_ROOT = "tnxd_repository"
_numbers = itertools.count(1)


class Modules:
    """The modules of one version, each executed once. They are forgotten with this object.

    Args:
        name: of the model and version, for tracebacks.
    """

    def __init__(self, files: TrustedFiles, name: str) -> None:
        self._package = f"{_ROOT}.{name.replace('.', '-')}#{next(_numbers)}"
        _finder.packages[self._package] = files
        weakref.finalize(self, _forget, self._package).atexit = False

    def load(self, module: str) -> ModuleType:
        """Import a module of that name. Raises whatever its code raises."""
        return importlib.import_module(f"{self._package}.{module}")


def is_private(module: str) -> bool:
    """Whether a module of that name is one that stands beside weights in a repository."""
    return module.startswith(f"{_ROOT}.")


class _Loader(importlib.machinery.SourceFileLoader):
    """Compiles what was checked, and keeps no bytecode."""

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
    """Finds modules below the private packages, and no others. Attributes: packages: private name -> its files."""

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
