"""Files of recordings: what is written can be read, here and by the package `mcap`, and no damage does any harm."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tnxctl.protocol import mcap, recordings, wire
from tnxctl.protocol.errors import InvalidArgument
from tnxctl.protocol.recordings import RecordedRequest, RecordingReader

SPECS = (wire.TensorSpec("x", "UINT8", (4,)), wire.TensorSpec("y", "UINT8", (0,)))
T0 = 1_795_963_669_000_000_000


def header(id_: int = 1, **fields: object) -> bytes:
    return wire.encode(wire.Predict(v=1, id=id_, inputs=SPECS, **fields))  # type: ignore[arg-type]


def request(id_: int, time_ns: int, client: int = 1, channel: int = 1) -> bytes:
    return b"".join(map(bytes, recordings.message(channel, id_, time_ns, client, header(id_), [b"abcd", b""])))


BEGINNING = mcap.beginning(recordings.PROFILE, "tnxd") + mcap.metadata(recordings.ABOUT, {"program": "tnxd"})
CHANNEL = mcap.channel(1, "m@1", recordings.ENCODING, {"max_batch_size": "8"})
CLIENT = mcap.metadata(recordings.CLIENT, {"number": "1", "name": "älice"})
REQUESTS = [request(number, T0 + number * 1000) for number in range(3)]
ENDING = mcap.metadata(recordings.END, {"requests": "3"}) + mcap.end()
WHOLE = BEGINNING + CHANNEL + CLIENT + b"".join(REQUESTS) + ENDING


def read(data: bytes) -> tuple[list[RecordedRequest], RecordingReader]:
    reader = RecordingReader(io.BytesIO(data))
    return list(reader), reader


def test_a_recording_is_read_as_it_was_written() -> None:
    found, reader = read(WHOLE)
    assert [(one.offset_ns, one.title, one.client, one.request.id) for one in found] == [
        (number * 1000, "m@1", "älice", number) for number in range(3)
    ]
    assert [bytes(frame) for frame in found[0].frames] == [b"abcd", b""]
    assert found[0].nbytes == 4
    assert (reader.about, reader.ending) == ({"program": "tnxd"}, {"requests": "3"})
    assert reader.channels == {"m@1": {"max_batch_size": "8"}}
    assert (reader.skipped, reader.damage) == (0, "")


def test_the_package_mcap_reads_it() -> None:
    pytest.importorskip("mcap", reason="needs the package mcap")
    from mcap.reader import make_reader
    from mcap.stream_reader import StreamReader

    records = list(StreamReader(io.BytesIO(WHOLE), validate_crcs=True).records)
    assert [type(record).__name__ for record in records] == [
        "Header", "Metadata", "Channel", "Metadata", *["Message"] * 3, "Metadata", "DataEnd", "Footer",
    ]  # fmt: skip
    messages = list(make_reader(io.BytesIO(WHOLE)).iter_messages())
    assert [(channel.topic, message.log_time, message.sequence) for _, channel, message in messages] == [
        ("m@1", T0 + number * 1000, number) for number in range(3)
    ]


@pytest.mark.parametrize("compression", ["NONE", "LZ4"])
def test_what_the_package_mcap_puts_into_chunks(compression: str) -> None:
    pytest.importorskip("mcap", reason="needs the package mcap")
    from mcap.writer import CompressionType, Writer

    file = io.BytesIO()
    writer = Writer(file, compression=CompressionType[compression])
    writer.start()
    channel = writer.register_channel("m@1", recordings.ENCODING, 0)
    for one in REQUESTS:
        fields = struct.calcsize("<BQHIQQ")
        writer.add_message(channel, log_time=T0, publish_time=T0, data=one[fields:])
    writer.finish()
    if compression == "NONE":
        found, reader = read(file.getvalue())
        assert ([one.request.id for one in found], reader.damage) == ([0, 1, 2], "")
    else:
        with pytest.raises(InvalidArgument, match=r"a chunk is compressed \('lz4'\): mcap decompress"):
            read(file.getvalue())


def test_a_file_that_was_cut_off_anywhere_is_read_as_far_as_it_goes() -> None:
    before = len(BEGINNING + CHANNEL + CLIENT)
    ends = [before + sum(map(len, REQUESTS[: count + 1])) for count in range(3)]
    for length in range(len(mcap.MAGIC), len(WHOLE)):
        found, reader = read(WHOLE[:length])
        assert len(found) == sum(end <= length for end in ends)
        assert "cut off" in reader.damage or length >= len(WHOLE) - 8 - 20  # of the footer, its beginning will do


@settings(max_examples=300)
@given(st.data())
def test_no_damage_is_more_than_a_sentence(data: st.DataObject) -> None:
    damaged = bytearray(WHOLE)
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(damaged)))
        end = data.draw(st.integers(start, min(len(damaged), start + 8)))
        damaged[start:end] = data.draw(st.binary(max_size=8))
    try:
        found, _ = read(bytes(damaged))
    except InvalidArgument:
        return
    assert len(found) <= 3


def payload(make: Callable[[bytes], bytes]) -> bytes:
    """A recording whose second request has other data."""
    head = mcap.HEAD_BYTES
    data = make(REQUESTS[1][head:])
    return BEGINNING + CHANNEL + REQUESTS[0] + mcap.message_head(1, 1, T0, len(data)) + data + REQUESTS[2] + ENDING


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda data: b"", "a message of 0 bytes is no request"),
        (lambda data: data[:4] + b"\xff\xff\xff\xff" + data[8:], "claims a header of 4294967295"),
        (lambda data: data[:8] + b"\xc1" + data[9:], "header"),
        (lambda data: data[:-3], "ends within the length of tensor 1"),
        (lambda data: data[:-8] + b"\xff" * 8, "tensor 1 of a message claims 18446744073709551615 bytes, 0 follow"),
        (lambda data: data + bytes(8) * 2000, "more than 1024 tensors"),
        (
            lambda data: data[:4] + struct.pack("<I", len(HEALTH)) + HEALTH,
            "holds a health request, not one to predict",
        ),
    ],
)
def test_a_message_that_is_no_request_is_passed_over(make: Callable[[bytes], bytes], why: str) -> None:
    found, reader = read(payload(make))
    assert [one.request.id for one in found] == [0, 2]
    assert reader.skipped == 1
    assert why in reader.last_skipped


HEALTH = wire.encode(wire.Health(v=1, id=1))


def test_times_that_make_no_sense_are_passed_over() -> None:
    found, reader = read(BEGINNING + CHANNEL + REQUESTS[0] + request(1, 2**63) + request(2, 0) + request(3, T0 - 5))
    assert [(one.request.id, one.offset_ns) for one in found] == [(0, 0), (3, 0)]  # a little before: at once
    assert "after the first one" in reader.last_skipped


def test_channels_of_other_things_are_passed_over() -> None:
    others = mcap.channel(2, "m@1", "ros1", {}) + mcap.channel(3, "no\x1btitle", recordings.ENCODING, {})
    found, reader = read(BEGINNING + CHANNEL + others + b"".join(request(n, T0, channel=n) for n in range(5)))
    assert [one.request.id for one in found] == [1]
    assert (reader.skipped, [*reader.channels]) == (4, ["m@1"])


@pytest.mark.parametrize("kind", [0x01, 0x04, 0x05, 0x06, 0x0C, 0x55])
@pytest.mark.parametrize("length", [1 << 33, 1 << 63, (1 << 64) - 1])
def test_a_length_that_lies_allocates_nothing(kind: int, length: int) -> None:
    found, reader = read(BEGINNING + CHANNEL + REQUESTS[0] + struct.pack("<BQ", kind, length) + REQUESTS[1])
    assert len(found) == 1
    assert "cut off" in reader.damage


def test_a_large_description_is_refused() -> None:
    _, reader = read(BEGINNING + CHANNEL + REQUESTS[0] + struct.pack("<BQ", 0x0C, 2 << 20) + bytes(3 << 20))
    assert "claims 2097152 bytes, more than the limit of 1048576" in reader.damage


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04" + bytes(100), b"{}", b"\x89MCAP1\r\n" + bytes(30)])
def test_other_files_are_no_recordings(data: bytes) -> None:
    with pytest.raises(InvalidArgument, match="no recording"):
        read(data)
