"""Indices in exported programs: what looks up tensors by values that come with a request, kept within bounds.

torch raises where an index is out of range. What is compiled of a program does otherwise: code of inductor ends the
process, and onnxruntime counts from the end for a number below 0. So each index is held against its bounds within the
program, replaced by one within them, and the program returns as its last output whether all were in range.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind, OutputSpec, TensorArgument
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree

from tnxctl.protocol.errors import FailedPrecondition

_aten = torch.ops.aten

_ALONG = {  # name -> positions of the tensor that is looked up or written, of its axis and of the index
    "embedding": (0, None, 1),
    "index_select": (0, 1, 2),
    "gather": (0, 1, 2),
    "scatter": (0, 1, 2),
    "scatter_add": (0, 1, 2),
    "scatter_reduce": (0, 1, 2),
    "index_add": (0, 1, 2),
    "index_copy": (0, 1, 2),
    "index_fill": (0, 1, 2),
}
"""Operators with one index, by its own place along an axis (axis 0, if None), and never below 0."""

_BY_AXES = frozenset({"index", "index_put"})
"""Operators with an index or none for each axis, which may count from the end."""

_CLASSES = "one_hot"

_REFUSED = frozenset(
    {
        "take",
        "put",
        "take_along_dim",
        "embedding_bag",
        "_embedding_bag",
        "_embedding_bag_forward_only",
        "index_reduce",
        "max_unpool2d",
        "max_unpool3d",
        "nll_loss",
        "nll_loss_nd",
        "cross_entropy_loss",
        "bincount",
        "multinomial",
        "repeat_interleave",
        "segment_reduce",
    }
)
"""Operators that raise for some values of their indices, and whose bounds are not known here."""

_PLAIN = frozenset({"self_int"})
"""Overloads of these that take a number in place of a tensor of indices, as `repeat_interleave` of one."""

_DIVISIONS = frozenset({"div", "floor_divide", "remainder", "fmod"})
"""Operators that divide, and raise for integers and 0, unless `div` is to return fractions."""

_BY_NUMBER = frozenset({"select", "select_scatter", "as_strided"})
"""Operators that torch.export lets take any number that is found in a tensor; others have their bounds noted by it."""

_MASKS = frozenset({torch.bool, torch.uint8})


class _Bound(NamedTuple):
    """Bounds of an index. Attributes: node: it. length: of the axis. from_end: whether it may be below 0."""

    node: Node
    length: Any
    from_end: bool


def keep_within(program: ExportedProgram) -> bool:
    """Keep all indices of a program within their bounds, in place.

    Returns:
        Whether the program has one output more now: a BOOL without axes, whether all indices were in range. There is
        none where no request could put an index out of range.

    Raises:
        FailedPrecondition: it has an operator whose bounds are not known, or another for which torch raises and what
            is compiled of it ends the process.
    """
    graph = program.graph_module
    _check_known(graph)
    fixed = _fixed(program)
    held = [
        _hold(graph, node, bound)
        for node in list(graph.graph.nodes)
        for bound in _bounds(node)
        if bound.node not in fixed
    ]
    if not held:
        return False
    (output,) = graph.graph.find_nodes(op="output")
    with graph.graph.inserting_before(output):
        whole = held[0]
        for other in held[1:]:
            whole = _call(graph, _aten.logical_and.default, whole, other)
    output.args = ((*output.args[0], whole),)
    graph.recompile()
    signature = program.graph_signature
    signature.output_specs.append(OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(whole.name), None))
    _, spec = _pytree.tree_flatten(tuple(range(program.call_spec.out_spec.num_leaves + 1)))
    for entry in program.module_call_graph:
        if entry.fqn == "" and entry.signature is not None:
            entry.signature.out_spec = spec
            entry.signature.outputs.append(TensorArgument(whole.name))
    return True


def _name(node: Node) -> str:
    """Name of an operator of torch, without the mark of those that write in place; "" for others."""
    packet = getattr(node.target, "overloadpacket", None)
    return packet.__name__.removesuffix("_") if node.op == "call_function" and packet is not None else ""


def _check_known(graph: GraphModule) -> None:
    for node in graph.graph.nodes:
        if _name(node) in _REFUSED and node.target._overloadname not in _PLAIN:
            raise FailedPrecondition(f"it uses {_name(node)}, and nobody would notice an index out of range")
    for part in graph.modules():
        if isinstance(part, GraphModule) and any(map(_divides_integers, part.graph.nodes)):
            raise FailedPrecondition("it divides integers by others, and nobody would notice a division by 0")
        if isinstance(part, GraphModule) and any(map(_takes_any_number, part.graph.nodes)):
            raise FailedPrecondition("it looks up by a number in a tensor, and nobody would notice one out of range")
        if part is not graph and isinstance(part, GraphModule):  # of a branch, or of a loop
            for node in part.graph.nodes:
                if _name(node) in (*_ALONG, *_BY_AXES, _CLASSES, *_REFUSED):
                    raise FailedPrecondition(
                        f"it uses {_name(node)} in a branch, and nobody would notice an index out of range"
                    )


def _divides_integers(node: Node) -> bool:
    """Whether an operator divides integers by what may be 0: a tensor, or a number that is no length of an input.

    Compiled code goes on with infinity, for such a number, and ends the process for a tensor: by SIGFPE where it rounds
    towards 0. Elsewhere it notes the 0 in a variable that all compiled code of the process has in common, and every
    other thread that runs some puts it back meanwhile.
    """
    if node.target in (operator.floordiv, operator.mod):
        return isinstance(node.args[1], Node) and _name(node.args[1]) != "sym_size"
    name = _name(node)
    if name not in _DIVISIONS or (name == "div" and node.kwargs.get("rounding_mode") is None):
        return False
    return isinstance(node.args[1], Node) and not _tensor(node).is_floating_point()


def _takes_any_number(node: Node) -> bool:
    """Whether an operator reads or writes where a tensor's value says, without a check."""
    numbers = [each.meta.get("val") for each in node.all_input_nodes] if _name(node) in _BY_NUMBER else []
    return any(isinstance(number, torch.SymInt) and free_unbacked_symbols(number) for number in numbers)


def _fixed(program: ExportedProgram) -> set[Node]:
    """Nodes whose values do not come from a request, nor from its lengths."""
    signature = program.graph_signature
    own = {spec.arg.name for spec in signature.input_specs if spec.kind is not InputKind.USER_INPUT}
    written = {spec.target for spec in signature.output_specs if spec.kind is OutputKind.BUFFER_MUTATION}
    own -= {spec.arg.name for spec in signature.input_specs if spec.target in written}
    found: set[Node] = set()
    for node in program.graph_module.graph.nodes:
        known = node.name in own if node.op == "placeholder" else all(each in found for each in node.all_input_nodes)
        if known and node.op != "output":
            found.add(node)
    return found


def _bounds(node: Node) -> Iterator[_Bound]:
    name = _name(node)
    if name in _ALONG:
        looked_up, axis, index = _ALONG[name]
        value = _tensor(node.args[looked_up])
        along = 0 if axis is None else node.args[axis]
        assert isinstance(along, int)
        if value.dim():
            yield _Bound(node.args[index], value.shape[along], False)  # type: ignore[arg-type]
    elif name == _CLASSES:
        yield _Bound(node.args[0], node.args[1], False)  # type: ignore[arg-type]
    elif name in _BY_AXES:
        value, axis = _tensor(node.args[0]), 0
        for each in node.args[1]:  # type: ignore[union-attr]
            if each is not None and _tensor(each).dtype in _MASKS:
                axis += max(_tensor(each).dim(), 1)
                continue
            if each is not None:
                yield _Bound(each, value.shape[axis], True)  # type: ignore[arg-type]
            axis += 1


def _tensor(node: Any) -> torch.Tensor:
    found: torch.Tensor = node.meta["val"]
    return found


def _hold(graph: GraphModule, node: Node, bound: _Bound) -> Node:
    """Have an operator take an index within its bounds. Returns whether all of the index was."""
    with graph.graph.inserting_before(node):
        length = _length(graph, node, bound.length)
        most = _less(graph, length, 1)
        least = _less(graph, 0, length) if bound.from_end else 0
        inside = _call(graph, _aten.clamp.default, bound.node, least, most)
        whole = _call(graph, _aten.all.default, _call(graph, _aten.eq.Tensor, inside, bound.node))
    node.replace_input_with(bound.node, inside)
    return whole


def _length(graph: GraphModule, node: Node, length: Any) -> Any:
    """The length of an axis: a number, or a node for one that varies."""
    if isinstance(length, (int, Node)):
        return length
    for argument in node.all_input_nodes:
        value = argument.meta["val"]
        if isinstance(value, torch.Tensor):
            for axis, other in enumerate(value.shape):
                if not isinstance(other, int) and str(other) == str(length):
                    return _call(graph, _aten.sym_size.int, argument, axis)
    raise FailedPrecondition("it looks up a tensor whose length nobody can tell")


def _less(graph: GraphModule, one: Any, other: Any) -> Any:
    if isinstance(one, int) and isinstance(other, int):
        return one - other
    return _call(graph, operator.sub, one, other)


def _call(graph: GraphModule, target: Any, *args: Any) -> Node:
    """A call of an operator, where the graph is being written, with the value that torch.export would note."""
    made = graph.graph.call_function(target, args)
    values = [each.meta["val"] if isinstance(each, Node) else each for each in args]
    modes = [each.fake_mode for each in values if hasattr(each, "fake_mode")]
    if modes:
        with modes[0]:
            made.meta["val"] = target(*values)
    else:
        made.meta["val"] = target(*values)
    return made
