"""Plain Python beside the weights: the function that makes a network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tnxctl.protocol.errors import FailedPrecondition, TensorNextError
from tnxd.error_text import sentence
from tnxd.models.formats.modules import Modules
from tnxd.models.process_state import monkey_patches
from tnxd.models.trust import TrustedFiles


class Factory:
    """Caller of the "module:function" of one version. The module is executed once, at the first call.

    Args:
        name: of the model and version, for tracebacks.
    """

    def __init__(self, files: TrustedFiles, reference: str, name: str) -> None:
        self._files = files
        self._module_name, _, self._function_name = reference.partition(":")
        self._name = name
        self._modules: Modules | None = None
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
        self._modules = modules = Modules(self._files, self._name)
        module = self._run("importing it", lambda: modules.load(self._module_name))
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
