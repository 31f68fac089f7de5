"""Writes of a graph: to tensors that its module holds, and to its inputs.

An operator's schema says which of its arguments it writes to, and which of its results are views of an argument. So a
walk in the order of execution knows of every value where its memory may come from. It is a bound from above: a branch
that is not taken counts, too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import GraphModule, Node

# Operators that write to their running statistics where a flag says so, and not by their schema: name -> (arguments
# that are written to, the flag).
_STATISTICS = {
    name: (("running_mean", "running_var"), flag)
    for name, flag in (
        ("aten::batch_norm", "training"),
        ("aten::native_batch_norm", "training"),
        ("aten::cudnn_batch_norm", "training"),
        ("aten::miopen_batch_norm", "training"),
        ("aten::_batch_norm_impl_index", "training"),
        ("aten::instance_norm", "use_input_stats"),
    )
}

STORING = [
    getattr(OutputKind, name)
    for name in ("BUFFER_MUTATION", "PARAMETER_MUTATION")
    if hasattr(OutputKind, name)  # the second is not in every torch
]
"""Kinds of results that are new values of what a program holds."""

Origins = frozenset[str]
"""Whose memory a value may be: names of what is held, or of inputs."""

_NONE: Origins = frozenset()


def written(program: ExportedProgram) -> tuple[str, ...]:
    """Names of the parameters, buffers and constants that an exported program may write to, sorted.

    Both ways of writing count: operators in its graph that work in place, and results that the caller of the graph has
    to put into a buffer, which is what decompositions make of them.
    """
    signature = program.graph_signature
    inputs = {_name(spec.arg) for spec in signature.input_specs if spec.kind is InputKind.USER_INPUT}
    names = {_name(spec.arg): spec.target for spec in signature.input_specs if spec.target is not None}
    found = {names.get(name, name) for name in _placeholders_written(program) - inputs}
    found |= {spec.target for spec in signature.output_specs if spec.kind in STORING and spec.target is not None}
    return tuple(sorted(found))


def written_inputs(program: ExportedProgram) -> tuple[int, ...]:
    """Positions of the arguments that an exported program may write to, counted over all arguments of the user."""
    kinds = [spec for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT]
    found = _placeholders_written(program)
    return tuple(position for position, spec in enumerate(kinds) if _name(spec.arg) in found)


def _name(argument: Any) -> str:
    return str(getattr(argument, "name", ""))


def _placeholders_written(program: ExportedProgram) -> set[str]:
    module = program.graph_module
    found: set[str] = set()
    origins = [frozenset({node.name}) for node in module.graph.nodes if node.op == "placeholder"]
    _walk(module, origins, found)
    return found


def _walk(module: GraphModule, given: Iterable[Origins], found: set[str]) -> Origins:
    """Note what a graph writes to, whose arguments are of those origins; return the origins of its results."""
    arguments = iter(given)
    origins: dict[Node, Origins] = {}
    results = _NONE
    for node in module.graph.nodes:
        mine = _NONE
        if node.op == "placeholder":
            mine = next(arguments, _NONE)
        elif node.op == "get_attr" and not isinstance(_attribute(module, node), GraphModule):
            mine = frozenset({str(node.target)})
        elif node.op == "output":
            results = _of(node.args, origins)
        elif node.op == "call_function":
            if isinstance(node.target, torch._ops.OpOverload):
                mine = _operator(node, node.target._schema, origins, found)
            elif isinstance(node.target, torch._ops.HigherOrderOperator):
                mine = _higher_order(module, node, origins, found)
            else:  # getitem, and arithmetic on lengths
                mine = _of(node.args, origins)
        origins[node] = mine
    return results


def _operator(node: Node, schema: torch.FunctionSchema, origins: Mapping[Node, Origins], found: set[str]) -> Origins:
    values = {argument.name: value for argument, value in zip(schema.arguments, node.args, strict=False)}
    values.update(node.kwargs)
    found |= _written_by(schema, {name: _of(value, origins) for name, value in values.items()}, values.get)
    return _viewed_by(schema, {name: _of(value, origins) for name, value in values.items()})


def _written_by(schema: torch.FunctionSchema, origins: Mapping[str, Origins], value: Any) -> set[str]:
    """The origins of the arguments that an operator writes to. Args: value: argument -> its value, if that is known."""
    found: set[str] = set()
    for argument in schema.arguments:
        if argument.alias_info is not None and argument.alias_info.is_write:
            found |= origins.get(argument.name, _NONE)
    statistics, flag = _STATISTICS.get(schema.name, ((), ""))
    if statistics and value(flag) is not False:
        for name in statistics:
            found |= origins.get(name, _NONE)
    return found


def _viewed_by(schema: torch.FunctionSchema, origins: Mapping[str, Origins]) -> Origins:
    """The tensors whose memory the results of an operator may be."""
    if all(result.alias_info is None for result in schema.returns):
        # By its schema a new tensor; in eval mode, it is the input itself.
        return origins.get("input", _NONE) if schema.name.endswith("dropout") else _NONE
    viewed = [argument.name for argument in schema.arguments if argument.alias_info is not None]
    return frozenset().union(*(origins.get(name, _NONE) for name in viewed))


def _higher_order(module: GraphModule, node: Node, origins: Mapping[Node, Origins], found: set[str]) -> Origins:
    """An operator that runs graphs, such as the branches of `torch.cond`."""
    graphs: list[GraphModule] = []
    operands: list[Origins] = []
    for value in _flat((node.args, node.kwargs)):
        if isinstance(value, Node):
            attribute = _attribute(module, value) if value.op == "get_attr" else None
            if isinstance(attribute, GraphModule):
                graphs.append(attribute)
                operands.clear()  # what stands before a graph is none of its arguments
            else:
                operands.append(origins[value])
    union = frozenset().union(*(origins[value] for value in node.all_input_nodes))
    results = _NONE
    for graph in graphs:
        wanted = sum(inner.op == "placeholder" for inner in graph.graph.nodes)
        results |= _walk(graph, operands if len(operands) == wanted else [union] * wanted, found)
    return results if graphs else union


def _attribute(module: GraphModule, node: Node) -> Any:
    value: Any = module
    for step in str(node.target).split("."):
        value = getattr(value, step, None)
    return value


def _flat(value: Any) -> Iterable[Any]:
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from _flat(part)
    elif isinstance(value, Mapping):
        yield from _flat(list(value.values()))
    else:
        yield value


def _of(value: Any, origins: Mapping[Node, Origins]) -> Origins:
    return frozenset().union(*(origins[part] for part in _flat(value) if isinstance(part, Node)))


# --- TorchScript ---------------------------------------------------------------------------------------------


def written_by_script(module: torch.jit.ScriptModule) -> tuple[str, ...]:
    """Names of the attributes that a TorchScript module in eval mode may write to, sorted.

    Those are set anew, and those whose tensors, or lists of them, something works on in place. A branch that only
    training takes does not count.
    """
    graph = module.inlined_graph  # which its nodes do not keep alive
    walk = _Script()
    walk.block(graph)
    return tuple(sorted(walk.found))


class _Script:
    """A walk through the blocks of a TorchScript graph. Attributes: found: attributes that are written to."""

    def __init__(self) -> None:
        self.found: set[str] = set()
        self._paths: dict[str, str] = {}
        """Of values that are modules: where they are, as "layers.0."."""
        self._origins: defaultdict[str, Origins] = defaultdict(frozenset)
        self._known: dict[str, bool] = {}
        """Conditions that are the same in every forward."""

    def block(self, block: Any) -> None:
        """Note what it writes to; the origins of its arguments are known."""
        for node in block.nodes():
            self._node(node)

    def _node(self, node: Any) -> None:
        kind = node.kind()
        inputs = [value.debugName() for value in node.inputs()]
        outputs = [value.debugName() for value in node.outputs()]
        if kind == "prim::GetAttr":
            name = self._paths.get(inputs[0], "") + node.s("name")
            self._paths[outputs[0]] = f"{name}."
            self._origins[outputs[0]] = frozenset({name})
            if node.s("name") == "training":
                self._known[outputs[0]] = False
        elif kind == "prim::SetAttr":
            self.found.add(self._paths.get(inputs[0], "") + node.s("name"))
        elif kind == "prim::Constant":
            value = node.output().toIValue()
            if isinstance(value, bool):
                self._known[outputs[0]] = value
        elif kind == "prim::If":
            self._branches(node, inputs[0], outputs)
        elif kind == "prim::Loop":
            self._loop(node, inputs[2:], outputs)
        else:
            if kind in ("prim::CallMethod", "prim::CallFunction"):  # of an interface: nobody knows what it does
                self.found |= self._union(inputs)
            schema = node.schema()
            if schema == "(no schema)":  # lists, tuples, and what takes them apart
                for name in outputs:
                    self._origins[name] = self._union(inputs)
            else:
                self._operator(torch._C.parse_schema(schema), inputs, outputs)

    def _operator(self, schema: torch.FunctionSchema, inputs: list[str], outputs: list[str]) -> None:
        names = {argument.name: value for argument, value in zip(schema.arguments, inputs, strict=False)}
        origins = {name: self._origins[value] for name, value in names.items()}
        self.found |= _written_by(schema, origins, lambda name: self._known.get(names.get(name, "")))
        for name in outputs:
            self._origins[name] = _viewed_by(schema, origins)
        if schema.name == "aten::__not__" and inputs[0] in self._known:
            self._known[outputs[0]] = not self._known[inputs[0]]

    def _branches(self, node: Any, condition: str, outputs: list[str]) -> None:
        blocks = list(node.blocks())
        if condition in self._known:
            blocks = blocks[:1] if self._known[condition] else blocks[1:]
        for block in blocks:
            self.block(block)
        for index, name in enumerate(outputs):
            returned = [list(block.outputs())[index].debugName() for block in blocks]
            self._origins[name] = self._union(returned)
            values = {self._known.get(value) for value in returned}
            known = values.pop() if len(values) == 1 else None
            if known is not None:
                self._known[name] = known

    def _loop(self, node: Any, carried: list[str], outputs: list[str]) -> None:
        body = next(iter(node.blocks()))
        arguments = [value.debugName() for value in body.inputs()][1:]
        results = [value.debugName() for value in body.outputs()][1:]
        for _ in range(len(carried) + 1):  # until what one round passes to the next has been through all of them
            for argument, first, later in zip(arguments, carried, results, strict=True):
                self._origins[argument] = self._origins[first] | self._origins[later]
            self.block(body)
        for name, first, later in zip(outputs, carried, results, strict=True):
            self._origins[name] = self._origins[first] | self._origins[later]

    def _union(self, names: Iterable[str]) -> Origins:
        return frozenset().union(*(self._origins[name] for name in names))
