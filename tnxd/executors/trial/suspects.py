"""Suspects: attributes that the Python code of a network may write in a forward, though no trial has seen it do so.

A forward that writes only sometimes, for a certain input or at every tenth call, looks pure as long as it does not. Its
source tells: here `forward` and the methods that it calls are read, in the classes that stand beside the weights. The
common ways to write to `self` are known. Libraries are trusted not to write; if one does, the audit sees it.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import sys
import textwrap
import types
from typing import Any

import torch

from tnxd.executors.trial.held import is_state
from tnxd.models.formats.modules import is_private

_GLOBAL = "::"
"""Before the name of a global, so that it is no attribute of `self`."""

_WRITERS = {"append", "extend", "insert", "pop", "popitem", "clear", "update", "setdefault", "remove", "add", "discard"}
_WRITERS |= {"appendleft", "extendleft", "popleft", "rotate", "sort", "reverse", "put"}
"""Methods of containers and of numpy arrays that write."""

_VIEWS = {"view", "reshape", "numpy", "detach", "transpose", "permute", "squeeze", "unsqueeze", "narrow", "expand"}
"""Methods of tensors whose results share their memory."""


def suspects(module: torch.nn.Module) -> list[tuple[str, str]]:
    """Attributes that forwards may write, as (path of the module within the network, attribute)."""
    known: dict[type, list[str]] = {}
    found = []
    for path, child in module.named_modules():
        kind = type(child)
        if not is_private(kind.__module__):
            continue
        if kind not in known:
            known[kind] = sorted(name for name in _written(kind) if not name.startswith(_GLOBAL))
        found += [(path, name) for name in known[kind]]
    return found


def suspects_beside(module: torch.nn.Module) -> list[tuple[Any, str]]:
    """Class attributes and globals beside the weights that a forward may write, as (holder, name)."""
    found: dict[tuple[int, str], tuple[Any, str]] = {}
    for kind in {type(child) for child in module.modules()}:
        if is_private(kind.__module__):
            for name in sorted(_written(kind)):
                place = _place(sys.modules.get(kind.__module__), name) if name.startswith(_GLOBAL) else None
                if place is not None:
                    found[id(place[0]), place[1]] = place
    return list(found.values())


def _place(code: types.ModuleType | None, name: str) -> tuple[Any, str] | None:
    """The holder and the attribute that a name in a module stands for: `::NAME`, or `::NAME.attribute`."""
    if code is None:
        return None
    variable, _, attribute = name.removeprefix(_GLOBAL).partition(".")
    value = vars(code).get(variable)
    if isinstance(value, type):
        return (value, attribute) if attribute and is_private(value.__module__) else None
    if isinstance(value, types.ModuleType):
        return (value, attribute) if attribute and is_private(value.__name__) else None
    return (code, variable) if is_state(variable, value) else None


def _written(kind: type) -> set[str]:
    """Attributes of `self` that `forward` of a class may write, directly or through methods, and globals (`::NAME`)."""
    written: set[str] = set()
    waiting, seen = ["forward"], {"forward"}
    namespace = vars(sys.modules[kind.__module__]) if kind.__module__ in sys.modules else {}
    while waiting:
        name = waiting.pop()
        bases = [
            (vars(base).get(name), True) for base in kind.__mro__
        ]  # of its bases, too, which it may call by super()
        for member, is_method in (
            [(namespace.get(name.removeprefix(_GLOBAL)), False)] if name.startswith(_GLOBAL) else bases
        ):
            function = _function(member)
            if function is None or (is_method and not function.args.args):
                continue
            reader = _Reader(function, is_method=is_method)
            for statement in function.body:
                reader.visit(statement)
            written |= reader.written
            waiting += reader.used - seen
            seen |= reader.used
    return written


def _function(member: Any) -> ast.FunctionDef | None:
    """The source of a method; None for one of a library, or where there is no source."""
    function: Any = member.fget if isinstance(member, property) else member
    if callable(function):
        function = inspect.unwrap(function)
    if not inspect.isfunction(function) or not is_private(function.__module__):
        return None
    with contextlib.suppress(OSError, SyntaxError, TypeError):
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
            if isinstance(node, ast.FunctionDef):
                return node
    return None


class _Reader(ast.NodeVisitor):
    """Reader of one function. Attributes: written, used: attributes of `self`, and globals (`::NAME`)."""

    def __init__(self, function: ast.FunctionDef, *, is_method: bool) -> None:
        self.written: set[str] = set()
        self.used: set[str] = set()
        self._aliases: dict[str, str] = {}  # local variable -> attribute that it is, or a part of
        arguments = function.args
        names = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
        self._self = arguments.args[0].arg if is_method else ""
        self._globals = {name for node in ast.walk(function) if isinstance(node, ast.Global) for name in node.names}
        self._locals = {argument.arg for argument in names if argument is not None}
        self._locals |= {
            node.id for node in ast.walk(function) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        }
        self._locals -= self._globals

    def _root(self, node: ast.AST) -> str | None:
        """The attribute of `self`, or the global, that an expression is or is a view of; None: neither."""
        attribute = ""
        while True:
            if isinstance(node, ast.Attribute):
                if isinstance(node.value, ast.Name) and node.value.id == self._self:
                    return node.attr
                attribute = f".{node.attr}"
                node = node.value
            elif isinstance(node, (ast.Subscript, ast.Starred)):
                node = node.value
            elif isinstance(node, ast.Call):
                if not (isinstance(node.func, ast.Attribute) and node.func.attr in _VIEWS):
                    return None  # the result is a new object
                node = node.func.value
            elif isinstance(node, ast.Name):
                if node.id in self._aliases or node.id in self._locals or node.id == self._self:
                    return self._aliases.get(node.id)
                return f"{_GLOBAL}{node.id}{attribute}"
            else:
                return None

    def _write(self, node: ast.AST) -> None:
        if isinstance(node, (ast.Tuple, ast.List)):
            for element in node.elts:
                self._write(element)
        elif not isinstance(node, ast.Name) or node.id in self._globals:  # a local variable is bound anew
            root = self._root(node)
            if root is not None:
                self.written.add(root)

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            self._write(target)
            self._alias(target, node.value)
        self.generic_visit(node)

    def visit_For(self, node: ast.For) -> None:
        source: ast.AST = node.iter
        if isinstance(source, ast.Call) and source.args:  # enumerate(self.caches), zip(...), reversed(...)
            source = source.args[0]
        if isinstance(source, ast.Call) and isinstance(source.func, ast.Attribute):  # self.caches.values()
            source = source.func.value
        root = self._root(source)
        for target in ast.walk(node.target):
            if isinstance(target, ast.Name) and root is not None:
                self._aliases[target.id] = root
        self.generic_visit(node)

    def _alias(self, target: ast.AST, value: ast.AST) -> None:
        if isinstance(target, ast.Name):
            self._name(target.id, value)
        elif isinstance(target, (ast.Tuple, ast.List)) and isinstance(value, (ast.Tuple, ast.List)):
            for one, other in zip(target.elts, value.elts, strict=False):
                self._alias(one, other)

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self._name(node.target.id, node.value)
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self._write(node.target)
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        root = self._root(node.target)  # in place, where it is a tensor: of a local variable, too
        if root is not None:
            self.written.add(root)
        self.generic_visit(node)

    def visit_Delete(self, node: ast.Delete) -> None:
        for target in node.targets:
            self._write(target)
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.value, ast.Name) and node.value.id == self._self:
            self.used.add(node.attr)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        function = node.func
        if isinstance(function, ast.Name) and function.id not in self._locals:
            self.used.add(_GLOBAL + function.id)
        if isinstance(function, ast.Attribute) and _writes(function.attr):
            root = self._root(function.value)
            if root is not None:
                self.written.add(root)
        for keyword in node.keywords:
            if keyword.arg == "out":
                self._write_argument(keyword.value)
        if isinstance(function, ast.Name) and function.id in ("setattr", "delattr") and len(node.args) > 1:
            name = node.args[1]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                self.written.add(name.value)
        if isinstance(function, (ast.Attribute, ast.Name)):
            called = function.attr if isinstance(function, ast.Attribute) else function.id
            if called in ("copyto", "setattr_") or (called.endswith("_") and not called.startswith("_")):
                for argument in node.args[:1]:  # torch.relu_(self.x), numpy.copyto(self.x, ...)
                    self._write_argument(argument)
        self.generic_visit(node)

    def _write_argument(self, node: ast.AST) -> None:
        root = self._root(node)
        if root is not None:
            self.written.add(root)

    def _name(self, name: str, value: ast.AST) -> None:
        root = self._root(value)
        if root is not None and not _computes(value):
            self._aliases[name] = root
        else:
            self._aliases.pop(name, None)


def _computes(node: ast.AST) -> bool:
    """Whether an expression is the result of a call, and not a view of what it is called on."""
    return isinstance(node, ast.Call) and not (isinstance(node.func, ast.Attribute) and node.func.attr in _VIEWS)


def _writes(method: str) -> bool:
    return method in _WRITERS or (method.endswith("_") and not method.endswith("__"))
