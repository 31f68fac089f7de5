"""Descriptions of protobuf messages, read from the `.proto` files of this folder when they are first needed.

Code that protoc makes refuses every protobuf runtime that is older than protoc, and a pool holds a name once for the
whole process: whoever runs beside another program's messages of the same names has to give way. So the messages are
made here, of a pool of their own, by whatever runtime there is (4.22 or newer).

Read is the part of proto3 that these files have: messages, enums and services, with fields, `repeated`, `map` and
`oneof`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import resources
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.descriptor import FileDescriptor, ServiceDescriptor

_TOKEN = re.compile(r"""[A-Za-z_][\w.]*|\d+|"[^"]*"|[{}()<>=;,]""")
_COMMENT = re.compile(r"//.*")

_FIELD = descriptor_pb2.FieldDescriptorProto
_SCALARS = ("bool", "int32", "int64", "uint32", "uint64", "float", "double", "string", "bytes")


class Schema:
    """Messages and services of one `.proto` file of this folder.

    Args:
        name: of the file.

    Attributes:
        file: what protobuf knows of it.
    """

    def __init__(self, name: str) -> None:
        pool = descriptor_pool.DescriptorPool()
        text = resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
        pool.AddSerializedFile(parse(name, text).SerializeToString())
        self.file: FileDescriptor = pool.FindFileByName(name)

    def message(self, name: str) -> Any:
        """The class of a message, by its name in the package."""
        return message_factory.GetMessageClass(self.file.message_types_by_name[name])

    @property
    def services(self) -> tuple[ServiceDescriptor, ...]:
        """The services of the file."""
        return tuple(self.file.services_by_name.values())


def parse(name: str, text: str) -> Any:
    """The FileDescriptorProto of a `.proto` file. Raises ValueError: it is none, or has what is not read here."""
    try:
        return _Parser(name, text).file
    except StopIteration:
        raise ValueError(f"{name} ends in the middle of a declaration") from None


class _Parser:
    """Parser of a `.proto` file. Attributes: file: what it says."""

    def __init__(self, name: str, text: str) -> None:
        self.file = descriptor_pb2.FileDescriptorProto(name=name)
        self._tokens: Iterator[str] = iter(_TOKEN.findall(_COMMENT.sub("", text)))
        for word in self._tokens:
            match word:
                case "syntax":
                    self._expect("=")
                    self.file.syntax = next(self._tokens).strip('"')
                    self._expect(";")
                case "package":
                    self.file.package = next(self._tokens)
                    self._expect(";")
                case "message":
                    self._message(self.file.message_type.add(), f".{self.file.package}")
                case "enum":
                    self._enum(self.file.enum_type.add())
                case "service":
                    self._service(self.file.service.add())
                case _:
                    raise ValueError(f"{name}: {word!r} is not the beginning of a declaration")

    def _expect(self, *expected: str) -> None:
        for token in expected:
            found = next(self._tokens)
            if found != token:
                raise ValueError(f"{self.file.name}: expected {token!r}, found {found!r}")

    def _until_brace(self) -> Iterator[str]:
        """The first words of what a pair of braces holds."""
        self._expect("{")
        while (word := next(self._tokens, "")) != "}":
            if not word:
                raise ValueError(f"{self.file.name} ends in the middle of a declaration")
            yield word

    def _message(self, message: Any, scope: str) -> None:
        message.name = next(self._tokens)
        scope = f"{scope}.{message.name}"
        for word in self._until_brace():
            match word:
                case "message":
                    self._message(message.nested_type.add(), scope)
                case "enum":
                    self._enum(message.enum_type.add())
                case "oneof":
                    message.oneof_decl.add(name=next(self._tokens))
                    for kind in self._until_brace():
                        self._field(message, kind).oneof_index = len(message.oneof_decl) - 1
                case "map":
                    self._map(message, scope)
                case "repeated":
                    self._field(message, next(self._tokens), _FIELD.LABEL_REPEATED)
                case _:
                    self._field(message, word)

    def _field(self, message: Any, kind: str, label: int = _FIELD.LABEL_OPTIONAL) -> Any:
        field = message.field.add(label=label)
        _set_type(field, kind)
        self._name_and_number(field)
        return field

    def _map(self, message: Any, scope: str) -> None:
        """A map: on the wire a repeated message of two fields, whose name protobuf prescribes."""
        self._expect("<")
        key = next(self._tokens)
        self._expect(",")
        value = next(self._tokens)
        self._expect(">")
        field = message.field.add(label=_FIELD.LABEL_REPEATED)
        self._name_and_number(field)
        entry = message.nested_type.add(name="".join(map(str.capitalize, field.name.split("_"))) + "Entry")
        entry.options.map_entry = True
        for number, (name, kind) in enumerate((("key", key), ("value", value)), 1):
            _set_type(entry.field.add(name=name, number=number, label=_FIELD.LABEL_OPTIONAL), kind)
        _set_type(field, f"{scope}.{entry.name}")

    def _name_and_number(self, item: Any) -> None:
        item.name = next(self._tokens)
        self._expect("=")
        item.number = int(next(self._tokens))
        self._expect(";")

    def _enum(self, enum: Any) -> None:
        enum.name = next(self._tokens)
        for name in self._until_brace():
            self._expect("=")
            enum.value.add(name=name, number=int(next(self._tokens)))
            self._expect(";")

    def _service(self, service: Any) -> None:
        service.name = next(self._tokens)
        for word in self._until_brace():
            if word != "rpc":
                raise ValueError(f"{self.file.name}: expected 'rpc', found {word!r}")
            method = service.method.add(name=next(self._tokens))
            method.client_streaming, method.input_type = self._side()
            self._expect("returns")
            method.server_streaming, method.output_type = self._side()
            self._expect(";")

    def _side(self) -> tuple[bool, str]:
        """One side of an RPC: whether it is a stream, and its message."""
        self._expect("(")
        name = next(self._tokens)
        streams = name == "stream"
        if streams:
            name = next(self._tokens)
        self._expect(")")
        return streams, name


def _set_type(field: Any, kind: str) -> None:
    """Set the type of a field; the pool finds out whether a name is that of a message or of an enum."""
    if kind in _SCALARS:
        field.type = getattr(_FIELD, f"TYPE_{kind.upper()}")
    else:
        field.type_name = kind
