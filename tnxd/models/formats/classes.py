"""Classes in the structures of an exported program that this process does not have.

The file names the class, and what torch needs to make one. Output classes of transformers, and dataclasses, put the
names of their fields there: that is all the daemon needs to know, since it calls a program with its tensors alone. So a
stand-in takes the place of such a class, and its library is not imported.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

from torch.utils import _pytree as pytree

_MISSING = re.compile(r"Deserializing (?P<name>[\w.]+) in pytree is not registered")


def stand_in(error: BaseException) -> bool:
    """Make one for the class that torch misses, so that it can try again. Returns whether it does miss one."""
    found = _MISSING.search(str(error))
    if found is None:
        return False
    name = found["name"]
    kind: type = type(name.rpartition(".")[2], (OrderedDict,), {})
    # Should the library be imported later, its own class takes this name over. What is loaded by then has the stand-in.
    pytree.register_pytree_node(
        kind,
        lambda value: (list(value.values()), list(value)),
        lambda values, context: _made(kind, name, values, context),
        serialized_type_name=name,
        to_dumpable_context=json.dumps,
        from_dumpable_context=_context,
    )
    return True


def _context(text: Any) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError):
        return None


def _made(kind: type, name: str, values: Iterable[Any], context: Any) -> Any:
    """Raises NotImplementedError: the context does not name the fields; in the words of torch."""
    parts = list(values)
    for names in (context, context[0] if isinstance(context, list) and context else None):  # the second of dataclasses
        if isinstance(names, list) and len(names) == len(parts) and all(isinstance(field, str) for field in names):
            return kind(zip(names, parts, strict=True))
    raise NotImplementedError(f"Deserializing {name} in pytree is not registered")
