"""Raw contents beside protobuf: taken out and put in as protobuf itself would, whatever comes."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

pytest.importorskip("google.protobuf")
pytest.importorskip("grpc")

from google.protobuf.message import DecodeError

from tnxctl.bridge.grpc import framing
from tnxctl.bridge.grpc.messages import ModelInferRequest
from tnxctl.protocol.errors import InvalidArgument

RAW = ModelInferRequest.DESCRIPTOR.fields_by_name["raw_input_contents"].number

names = st.text(max_size=20)
blobs = st.lists(st.sampled_from([b"", b"a", b"\x3a" * 127, b"b" * 128, b"c" * 20_000]), max_size=5)


@given(name=names, tensors=st.lists(names, max_size=5), raw=blobs)
def test_a_message_in_two_parts_is_that_message(name: str, tensors: list[str], raw: list[bytes]) -> None:
    message = ModelInferRequest(model_name=name, raw_input_contents=raw)
    for tensor in tensors:
        message.inputs.add(name=tensor, shape=[1, 2**62]).parameters["a"].int64_param = -1
    rest, values = framing.split(message.SerializeToString(), RAW)
    assert [bytes(value) for value in values] == raw
    plain = ModelInferRequest.FromString(rest)
    assert not plain.raw_input_contents
    plain.raw_input_contents.extend(raw)
    assert plain == message
    assert ModelInferRequest.FromString(framing.joined(rest, RAW, values)) == message


@given(st.binary(max_size=100) | st.lists(st.sampled_from([b"\x3a", b"\x0a", b"\x03", b"\x80", b"a"])).map(b"".join))
@example(b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\x7f")
@example(b"\x3a\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01")
@example(b"\x39" + bytes(8) + b"\x3d" + bytes(4))
def test_what_protobuf_refuses_is_refused(data: bytes) -> None:
    try:
        expected = ModelInferRequest.FromString(data)
    except DecodeError:
        expected = None
    try:
        rest, values = framing.split(data, RAW)
        got = ModelInferRequest.FromString(rest)
    except (InvalidArgument, DecodeError):
        # Groups, which proto3 does not have, are the one thing that protobuf takes and skips.
        assert expected is None or any(byte & 7 == 3 for byte in data)
        return
    assert expected is not None
    assert [bytes(value) for value in values] == [*expected.raw_input_contents]
    del expected.raw_input_contents[:]
    assert got == expected


def test_values_are_views() -> None:
    data = ModelInferRequest(raw_input_contents=[b"abc"]).SerializeToString()
    (value,) = framing.split(data, RAW)[1]
    assert value.obj is data


def test_many_fields() -> None:
    assert framing.split(b"\x3a\x00" * framing.MOST_FIELDS, RAW)[0] == b""
    with pytest.raises(InvalidArgument, match="more than 8192 fields"):
        framing.split(b"\x3a\x00" * (framing.MOST_FIELDS + 1), RAW)
