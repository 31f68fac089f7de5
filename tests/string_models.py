"""ONNX models with strings, small enough to read: they echo, change, look up and count words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

Tensor = tuple[str, str, list[str | int]]
"""Name, type as ONNX calls it, and shape."""


def save(
    root: Path,
    name: str,
    node: Any,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    toml: str = "",
    version: int = 1,
) -> None:
    """Save a version of a model of one node, or of several."""
    import onnx
    from onnx import TensorProto, helper

    def described(tensors: Sequence[Tensor]) -> list[Any]:
        return [helper.make_tensor_value_info(name, getattr(TensorProto, kind), shape) for name, kind, shape in tensors]

    nodes = node if isinstance(node, list) else [node]
    graph = helper.make_graph(nodes, name, described(inputs), described(outputs))
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    (root / name / str(version)).mkdir(parents=True, exist_ok=True)
    if toml:
        (root / name / "model.toml").write_text(toml)
    onnx.save(
        helper.make_model(graph, opset_imports=opsets, ir_version=9), str(root / name / str(version) / "model.onnx")
    )


def save_all(root: Path) -> None:
    """Save one of each kind."""
    from onnx import helper

    texts: list[Tensor] = [("texts", "STRING", ["n"])]
    save(root, "echo", helper.make_node("Identity", ["texts"], ["same"]), texts, [("same", "STRING", ["n"])])
    save(
        root,
        "table",
        helper.make_node("Identity", ["cells"], ["same"]),
        [("cells", "STRING", ["n", "columns"])],
        [("same", "STRING", ["n", "columns"])],
    )
    upper = helper.make_node("StringNormalizer", ["texts"], ["upper"], case_change_action="UPPER", locale="C")
    save(root, "upper", upper, texts, [("upper", "STRING", ["n"])], "max_batch_size = 8\n")
    animals = {"keys_strings": ["cat", "dog"], "values_int64s": [1, 2], "default_int64": 0}
    save(
        root,
        "animals",
        helper.make_node("LabelEncoder", ["names"], ["numbers"], domain="ai.onnx.ml", **animals),
        [("names", "STRING", ["n", 1])],
        [("numbers", "INT64", ["n", 1])],
    )
    names = {"keys_int64s": [1, 2], "values_strings": ["cat", "dög"], "default_string": "?"}
    save(
        root,
        "names",
        helper.make_node("LabelEncoder", ["numbers"], ["names"], domain="ai.onnx.ml", **names),
        [("numbers", "INT64", ["n", 1])],
        [("names", "STRING", ["n", 1])],
    )
    counts = {"max_gram_length": 1, "min_gram_length": 1, "max_skip_count": 0, "mode": "TF"}
    words = {"ngram_counts": [0], "ngram_indexes": [0, 1, 2], "pool_strings": ["a", "b", "c"]}
    save(
        root,
        "words",
        helper.make_node("TfIdfVectorizer", ["words"], ["counts"], **counts, **words),
        [("words", "STRING", ["n", "words"])],
        [("counts", "FLOAT", ["n", 3])],
    )
    save(
        root,
        "twice",
        helper.make_node("Concat", ["cells", "cells"], ["both"], axis=1),
        [("cells", "STRING", ["n", 1])],
        [("both", "STRING", ["n", 2])],
    )
    mixed = [
        helper.make_node("Identity", ["text"], ["same"]),
        helper.make_node("Add", ["number", "number"], ["double"]),
    ]
    save(
        root,
        "mixed",
        mixed,
        [("text", "STRING", ["n", 1]), ("number", "FLOAT", ["n", 1])],
        [("same", "STRING", ["n", 1]), ("double", "FLOAT", ["n", 1])],
        '[[inputs]]\nname = "text"\ndatatype = "BYTES"\nshape = [-1, 1]\ndefault = "nothing"\n'
        'values = [["one"], ["two"]]\n\n[[inputs]]\nname = "number"\ndatatype = "FP32"\nshape = [-1, 1]\n',
    )
