"""Messages over gRPC: the same as those of a client that protoc made."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("google.protobuf")
pytest.importorskip("grpc")

from google.protobuf.json_format import ParseError

from tnxctl.bridge.grpc import schema
from tnxctl.bridge.grpc.messages import INFERENCE, ModelInferRequest, message_of

LEFT_OUT = {"inference.InferResponseStatistics", "inference.ModelStatistics.ResponseStatsEntry"}
"""Messages of tritonclient that are not here: answers of models with several of them."""

NEWER = {"inference.MemoryUsage"}
"""Messages that some versions of tritonclient lack."""


@pytest.fixture(scope="module")
def theirs() -> Any:
    """The file of tritonclient; the one that it imports is about the configuration of a model."""
    return pytest.importorskip("tritonclient.grpc.service_pb2").DESCRIPTOR


def all_of(messages: list[Any]) -> dict[str, Any]:
    found = {}
    for message in messages:
        found |= {message.full_name: message} | all_of([*message.nested_types])
    return found


def on_the_wire(field: Any) -> tuple[object, ...]:
    """Attributes of a field that matter there."""
    kind = field.message_type or field.enum_type
    oneof = field.containing_oneof
    names = (kind.full_name if kind else "", oneof.name if oneof else "")
    return (field.number, field.type, field.is_repeated, field.is_packed, *names)


def test_messages_are_those_of_tritonclient(theirs: Any) -> None:
    files = (theirs, *theirs.dependencies)
    known = all_of([message for file in files for message in file.message_types_by_name.values()])
    ours = all_of([*INFERENCE.file.message_types_by_name.values()])
    of_service = {name for name, message in known.items() if message.file is theirs}
    assert of_service - ours.keys() <= LEFT_OUT
    assert ours.keys() - known.keys() <= NEWER
    for name in ours.keys() & known.keys():
        fields = {field.name: on_the_wire(field) for field in known[name].fields}
        for field in ours[name].fields:
            if field.name in fields or field.message_type is None or field.message_type.full_name not in NEWER:
                assert on_the_wire(field) == fields[field.name], f"{name}.{field.name}"
        if name in of_service:
            assert fields.keys() - {field.name for field in ours[name].fields} <= {"response_stats"}, name


def test_numbers_of_enums_are_those_of_tritonclient(theirs: Any) -> None:
    (config,) = theirs.dependencies

    def numbers(file: Any) -> list[dict[str, int]]:
        kinds = file.enum_types_by_name["DataType"], file.message_types_by_name["ModelInstanceGroup"].enum_types[0]
        return [{value.name: value.number for value in kind.values} for kind in kinds]

    assert numbers(INFERENCE.file) == numbers(config)


def test_rpcs_are_those_of_tritonclient(theirs: Any) -> None:
    (ours,) = INFERENCE.services
    (known,) = theirs.services_by_name.values()
    assert ours.full_name == known.full_name

    def rpcs(service: Any) -> dict[str, tuple[object, ...]]:
        return {
            method.name: (
                method.input_type.full_name,
                method.output_type.full_name,
                method.client_streaming,
                method.server_streaming,
            )
            for method in service.methods
        }

    assert rpcs(ours) == rpcs(known)


def test_a_message_goes_to_tritonclient_and_back() -> None:
    service_pb2 = pytest.importorskip("tritonclient.grpc.service_pb2")
    request = ModelInferRequest(model_name="digits", raw_input_contents=[b"\0" * 8])
    request.inputs.add(name="x", datatype="FP32", shape=[1, 2]).parameters["a"].int64_param = -3
    request.parameters["priority"].uint64_param = 2**64 - 1
    theirs = service_pb2.ModelInferRequest.FromString(request.SerializeToString())
    assert theirs.inputs[0].parameters["a"].int64_param == -3
    assert theirs.parameters["priority"].uint64_param == 2**64 - 1
    assert ModelInferRequest.FromString(theirs.SerializeToString()) == request


def test_a_document_with_a_field_that_the_message_lacks_is_a_mistake() -> None:
    with pytest.raises(ParseError, match="readiness"):
        message_of("ServerReadyResponse", {"readiness": True})


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("extend", "'extend' is not the beginning"),
        ("message M { string name 1; }", "expected '=', found '1'"),
        ("message M { string name = 1;", "ends in the middle"),
        ("service S { option x = 1; }", "expected 'rpc', found 'option'"),
    ],
)
def test_what_is_not_read_is_an_error(text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        schema.parse("some.proto", text)
