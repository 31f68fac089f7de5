"""Property tests of the decoder: what was encoded comes back, and no bytes whatever do harm."""

from __future__ import annotations

import itertools
import math
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headers import pack, predict_header, route_header
from tnxctl.protocol import wire
from tnxctl.protocol.datatypes import STORAGE
from tnxctl.protocol.errors import InvalidArgument, TensorNextError, Unimplemented
from tnxctl.protocol.frames import view_tensors
from tnxctl.protocol.strings import encode
from tnxctl.protocol.wire import BYTES, Limits, TensorSpec

LIMITS = Limits()
NUMBERS = sorted(STORAGE.keys() - {BYTES})
WIDE = Limits(header_bytes=8 * 2**20)  # so that a long header is decoded instead of measured

# No deadline: a busy machine is no defect.
thorough = settings(max_examples=200)


def refusal(frame: bytes, limits: Limits = LIMITS) -> TensorNextError:
    with pytest.raises((InvalidArgument, Unimplemented)) as caught:
        wire.decode_request(frame, limits)
    return caught.value


def tensor_refusal(specs: list[TensorSpec], frames: list[bytes], limits: Limits = LIMITS) -> str:
    with pytest.raises(InvalidArgument) as caught:
        view_tensors(specs, frames, limits)
    return caught.value.message


def content(array: np.ndarray) -> bytes:
    """The frame of an array."""
    return (encode(array) if array.dtype.hasobject else array).tobytes()


def check_sentence(error: TensorNextError) -> None:
    """It can go into a log line and an error reply as it is: short, on one line, no control codes."""
    assert 0 < len(error.message) < 1000
    assert error.message.isprintable(), error.message


# --- what hypothesis draws from --------------------------------------------------------------------------------

ids = st.integers(0, wire.MAX_ID)
names = st.text(max_size=20)
counts = st.integers(0, 2**63 - 1)
numbers = st.floats(allow_nan=False)
specs = st.builds(
    TensorSpec,
    name=names,
    datatype=st.sampled_from(sorted(STORAGE)),
    shape=st.lists(counts, max_size=5).map(tuple),
)
spec_tuples = st.lists(specs, max_size=3).map(tuple)
name_tuples = st.lists(names, max_size=3).map(tuple)
weights = st.floats(0, wire.MAX_WEIGHT)
one = st.just(1)

requests = st.one_of(
    st.builds(
        wire.Predict,
        v=one,
        id=ids,
        inputs=spec_tuples,
        model=names,
        prefer_gpu=st.booleans(),
        min_gpu_memory_mb=st.floats(min_value=0),
        priority=st.none() | st.integers(0, wire.LOWEST_PRIORITY),
        route_key=names,
    ),
    st.builds(wire.Health, v=one, id=ids),
    st.builds(wire.Metadata, v=one, id=ids, model=names),
    st.builds(wire.Models, v=one, id=ids),
    st.builds(wire.Load, v=one, id=ids, model=names),
    st.builds(wire.Unload, v=one, id=ids, model=names),
    st.builds(
        wire.Route, v=one, id=ids, model=names, weights=st.dictionaries(names, weights, max_size=3), shadow=names
    ),
    st.builds(wire.Reload, v=one, id=ids),
    st.builds(wire.Compare, v=one, id=ids, model=names, baseline=names, candidate=names),
)

model_infos = st.builds(
    wire.ModelInfo,
    name=names,
    version=names,
    status=names,
    default=st.booleans(),
    inputs=spec_tuples,
    outputs=spec_tuples,
    max_batch_size=counts,
    devices=name_tuples,
    error=names,
    format=names,
    traffic=st.floats(0, 1),
    shadow=st.booleans(),
    memory_mb=numbers,
    requests=counts,
    load_s=numbers,
    notes=name_tuples,
)
differences = st.builds(
    wire.OutputDifference,
    name=names,
    elements=counts,
    max_abs=numbers,
    mean_abs=numbers,
    argmax_agreement=st.none() | st.floats(0, 1),
    misfits=counts,
)
percentiles = st.builds(wire.Percentiles, count=counts, p50_us=numbers, p90_us=numbers, p99_us=numbers)
device_infos = st.builds(wire.DeviceInfo, name=names, status=names, lanes=counts, memory_free_mb=numbers, error=names)
replies = st.one_of(
    st.builds(
        wire.Result,
        v=one,
        id=ids,
        model=names,
        version=names,
        outputs=spec_tuples,
        device=names,
        reason=names,
        batch_size=counts,
        latency_ms=numbers,
        gpu_memory_mb=numbers,
        timing=st.builds(wire.Timing, *[numbers] * 8),
    ),
    st.builds(
        wire.HealthReport,
        v=one,
        id=ids,
        status=names,
        cuda_available=st.booleans(),
        current_device=names,
        gpu_memory_free_mb=numbers,
        version=names,
        uptime_s=numbers,
        devices=st.lists(device_infos, max_size=2).map(tuple),
        models=st.lists(model_infos, max_size=2).map(tuple),
        queued=counts,
        running=counts,
        requests=counts,
        replies=counts,
        errors=st.dictionaries(names, counts, max_size=3),
        undeliverable=counts,
    ),
    st.builds(wire.MetadataReport, v=one, id=ids, model=model_infos),
    st.builds(wire.ModelsReport, v=one, id=ids, models=st.lists(model_infos, max_size=2).map(tuple)),
    st.builds(
        wire.ReloadReport,
        v=one,
        id=ids,
        loaded=name_tuples,
        unloaded=name_tuples,
        failed=st.dictionaries(names, names, max_size=3),
    ),
    st.builds(
        wire.Comparison,
        v=one,
        id=ids,
        model=names,
        baseline=names,
        candidate=names,
        requests=counts,
        errors=counts,
        skipped=counts,
        outputs=st.lists(differences, max_size=2).map(tuple),
        baseline_us=percentiles,
        candidate_us=percentiles,
        last_error=names,
    ),
    st.builds(wire.ErrorReply, v=one, id=st.none() | ids, code=names, message=names),
)

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)


@st.composite
def tensors(draw: st.DrawFn) -> tuple[TensorSpec, bytes]:
    """A spec and the bytes that fit it: any datatype, any rank up to the limit, zero-length axes included."""
    datatype = draw(st.sampled_from(sorted(STORAGE)))
    long_axes = draw(st.lists(st.integers(0, 4), max_size=3))
    shape = draw(st.permutations(long_axes + [1] * draw(st.integers(0, LIMITS.rank - len(long_axes)))))
    size = math.prod(shape) * STORAGE[datatype].itemsize
    if datatype == BYTES:
        elements = draw(st.lists(st.binary(max_size=9), min_size=math.prod(shape), max_size=math.prod(shape)))
        data = b"".join(len(element).to_bytes(4, "little") + element for element in elements)
    else:
        data = draw(st.binary(min_size=size, max_size=size))
    if datatype == "BOOL":
        data = bytes(byte & 1 for byte in data)
    return TensorSpec(draw(names), datatype, tuple(shape)), data


@st.composite
def damaged_headers(draw: st.DrawFn) -> bytes:
    """A good header after a few cuts, overwrites and insertions."""
    data = bytearray(wire.encode(draw(requests | replies)))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        end = draw(st.integers(start, min(len(data), start + 4)))
        data[start:end] = draw(st.binary(max_size=4))
    return bytes(data)


# --- what was encoded comes back -------------------------------------------------------------------------------


@thorough
@given(requests)
def test_requests_round_trip(request: wire.Request) -> None:
    assert wire.decode_request(wire.encode(request), LIMITS) == request


@thorough
@given(replies)
def test_replies_round_trip(reply: wire.Reply) -> None:
    assert wire.decode_reply(wire.encode(reply), LIMITS) == reply


@thorough
@given(st.lists(tensors(), max_size=4), st.integers(0, 15))
def test_tensors_round_trip_at_any_alignment(drawn: list[tuple[TensorSpec, bytes]], offset: int) -> None:
    frames = [memoryview(bytes(offset) + data)[offset:] for _, data in drawn]
    arrays = view_tensors([spec for spec, _ in drawn], frames, LIMITS)
    assert len(arrays) == len(drawn)
    for array, (spec, data) in zip(arrays, drawn, strict=True):
        assert array.dtype == STORAGE[spec.datatype]
        assert array.shape == spec.shape
        assert content(array) == data


@pytest.mark.parametrize("datatype", NUMBERS)
def test_values_are_little_endian_and_in_c_order(datatype: str) -> None:
    dtype = STORAGE[datatype]
    expected = np.array([[0, 1, 1], [1, 0, 1]], dtype)
    data = b"".join(
        int.from_bytes(value.tobytes(), "little").to_bytes(dtype.itemsize, "little") for value in expected.flat
    )
    (array,) = view_tensors([TensorSpec("t", datatype, (2, 3))], [data], LIMITS)
    np.testing.assert_array_equal(array, expected)
    assert dtype.newbyteorder("<") == dtype


@pytest.mark.parametrize("datatype", NUMBERS)
def test_arrays_share_memory_with_their_frames(datatype: str) -> None:
    frame = bytearray(24)
    (array,) = view_tensors([TensorSpec("t", datatype, (24 // STORAGE[datatype].itemsize,))], [frame], LIMITS)
    assert array.view(np.uint8).sum() == 0
    frame[:] = b"\1" * 24
    assert array.view(np.uint8).sum() == 24


def test_arrays_of_received_bytes_cannot_be_written() -> None:
    (array,) = view_tensors([TensorSpec("t", "FP32", (2,))], [bytes(8)], LIMITS)
    assert not array.flags.writeable


def test_nan_and_infinity_pass() -> None:
    values = np.array([np.nan, np.inf, -np.inf], "<f4")
    (array,) = view_tensors([TensorSpec("t", "FP32", (3,))], [values.tobytes()], LIMITS)
    np.testing.assert_array_equal(array, values)


def test_fields_with_default_values_are_left_out_of_a_request() -> None:
    assert msgspec.msgpack.decode(wire.encode(wire.Predict(v=1, id=7, inputs=()))) == {
        "type": "predict",
        "v": 1,
        "id": 7,
        "inputs": [],
    }


# --- room to grow ----------------------------------------------------------------------------------------------


@thorough
@given(st.dictionaries(st.text(min_size=1, max_size=12).map("x_".__add__), values, max_size=3))
def test_unknown_keys_are_ignored(extra: dict[str, Any]) -> None:
    assert wire.decode_request(pack(predict_header() | extra), LIMITS) == wire.decode_request(
        pack(predict_header()), LIMITS
    )


@thorough
@given(st.lists(values, max_size=3))
def test_items_beyond_the_known_ones_of_a_tensor_are_ignored(extra: list[Any]) -> None:
    request = wire.decode_request(pack(predict_header(inputs=[["input", "FP32", [1, 256], *extra]])), LIMITS)
    assert isinstance(request, wire.Predict)
    assert request.inputs == (TensorSpec("input", "FP32", (1, 256)),)


@thorough
@given(st.permutations(sorted(predict_header())))
def test_keys_come_in_any_order(keys: list[str]) -> None:
    header = {key: predict_header()[key] for key in keys}
    assert wire.decode_request(pack(header), LIMITS) == wire.decode_request(pack(predict_header()), LIMITS)


def test_any_msgpack_encoding_of_a_value_is_read() -> None:
    long_id = b"\xd3" + (7).to_bytes(8, "big")
    long_str = b"\xdb" + (5).to_bytes(4, "big") + b"model" + b"\xd9\x03mlp"
    single_float = pack("min_gpu_memory_mb") + b"\xca\x3f\x80\x00\x00"
    fields = [pack("v") + b"\xcc\x01", pack("type") + pack("predict"), pack("id") + long_id]
    fields += [long_str, single_float, pack("inputs") + b"\xdc\x00\x00"]
    frame = b"\xde\x00\x06" + b"".join(fields)
    expected = wire.Predict(v=1, id=7, model="mlp", inputs=(), min_gpu_memory_mb=1.0)
    assert wire.decode_request(frame, LIMITS) == expected


# --- hostile headers -------------------------------------------------------------------------------------------


def decode_all_ways(frame: bytes) -> None:
    """Every way to read a header either works or refuses in the two known ways, with a sentence fit for a log."""
    for decode in (wire.decode_request, wire.decode_reply):
        try:
            decode(frame, WIDE)
        except (InvalidArgument, Unimplemented) as error:
            check_sentence(error)
    found = wire.request_id(frame, WIDE)
    assert found is None or 0 <= found <= wire.MAX_ID


@thorough
@given(st.binary(max_size=200))
def test_arbitrary_bytes_do_no_harm(frame: bytes) -> None:
    decode_all_ways(frame)


@settings(thorough, max_examples=500)
@given(damaged_headers())
def test_damaged_headers_do_no_harm(frame: bytes) -> None:
    decode_all_ways(frame)


@thorough
@given(st.sampled_from(sorted(predict_header())), values)
def test_fields_of_any_type_do_no_harm(key: str, value: Any) -> None:
    decode_all_ways(pack(predict_header(**{key: value})))


@thorough
@given(st.lists(st.lists(values, max_size=4), max_size=3))
def test_tensor_entries_of_any_type_do_no_harm(inputs: list[Any]) -> None:
    decode_all_ways(pack(predict_header(inputs=inputs)))


@pytest.mark.parametrize("opening", [b"\x91", b"\x81\xa1a", b"\x81\x91", b"\xdd\x00\x00\x00\x01"])
@pytest.mark.parametrize("key", [b"", pack("unknown"), pack("v"), pack("type"), pack("id"), pack("inputs")])
def test_deep_nesting_is_refused(opening: bytes, key: bytes) -> None:
    """200,000 levels, from the root, in an unknown field and in each known one."""
    good = pack(predict_header())
    prefix = bytes([good[0] + 1]) + good[1:] + key if key else b""
    frame = prefix + opening * 200_000 + b"\xc0"
    decode_all_ways(frame)
    assert isinstance(refusal(frame, WIDE), InvalidArgument)


def test_deep_nesting_is_called_that() -> None:
    frame = b"\x81" + pack("unknown") + b"\x91" * 200_000 + b"\xc0"
    assert "nested too deep" in refusal(frame, WIDE).message
    assert "200010 bytes" in refusal(frame, WIDE).message


@pytest.mark.timeout(20)
def test_keys_with_equal_hashes_cost_no_more_than_others() -> None:
    """-1 and -2 hash alike in CPython, and so do arrays of them as keys of a map. A refusal that built the map of
    these 32,768 keys would take some ten seconds each time; one that builds none takes milliseconds."""
    keys = [b"\x9f" + bytes(key) for key in itertools.product((0xFF, 0xFE), repeat=15)]
    table = b"\xdf" + len(keys).to_bytes(4, "big") + b"\xc0".join(keys) + b"\xc0"
    decode_all_ways(table)
    decode_all_ways(b"\x81" + pack("v") + table)
    decode_all_ways(b"\x83" + pack("v") + b"\1" + pack("type") + pack("predict") + pack("id") + table)


@pytest.mark.parametrize("lead", [b"\xdf", b"\xdd", b"\xdb", b"\xc6", b"\xc9"])
def test_lengths_of_four_billion_allocate_nothing(lead: bytes) -> None:
    for frame in (lead + b"\xff" * 4, b"\x81" + pack("inputs") + lead + b"\xff" * 4):
        assert isinstance(refusal(frame), InvalidArgument)


def test_map_keys_other_than_strings_are_refused() -> None:
    assert "`int`" in refusal(pack({5: 1} | predict_header())).message


@pytest.mark.parametrize("size", [0, 1, 10, -1])
def test_truncated_headers_are_refused(size: int) -> None:
    assert isinstance(refusal(pack(predict_header())[:size]), InvalidArgument)


def test_every_truncation_is_refused() -> None:
    frame = pack(predict_header())
    for size in range(len(frame)):
        assert isinstance(refusal(frame[:size]), InvalidArgument)


def test_trailing_bytes_are_refused() -> None:
    assert "trailing" in refusal(pack(predict_header()) + b"\xc0").message


@pytest.mark.parametrize(
    ("changes", "kind", "named"),
    [
        ({"v": 2}, Unimplemented, "2"),
        ({"v": 2**64 - 1}, Unimplemented, "18446744073709551615"),
        ({"v": 2, "id": -1}, Unimplemented, "2"),
        ({"v": "one"}, InvalidArgument, "'one'"),
        ({"v": True}, InvalidArgument, "True"),
        ({"v": ...}, InvalidArgument, "`v`"),
        ({"type": "divine"}, Unimplemented, "'divine'"),
        ({"type": "result"}, Unimplemented, "'result'"),
        ({"type": "Predict"}, Unimplemented, "'Predict'"),
        ({"type": 5}, InvalidArgument, "5"),
        ({"type": ...}, InvalidArgument, "`type`"),
        ({"id": -1}, InvalidArgument, "-1"),
        ({"id": 2**63}, InvalidArgument, "9223372036854775808"),
        ({"id": "seven"}, InvalidArgument, "'seven'"),
        ({"id": 7.5}, InvalidArgument, "7.5"),
        ({"id": None}, InvalidArgument, "None"),
        ({"id": ...}, InvalidArgument, "`id`"),
        ({"inputs": ...}, InvalidArgument, "`inputs`"),
        ({"inputs": 12}, InvalidArgument, "12"),
        ({"inputs": [["lonely"]]}, InvalidArgument, "'lonely'"),
        ({"inputs": [["input", "FP32", [1, "wide"]]]}, InvalidArgument, "'wide'"),
        ({"inputs": [["input", "FP32", [1.5]]]}, InvalidArgument, "1.5"),
        ({"inputs": [["input", 32, [1]]]}, InvalidArgument, "32"),
        ({"inputs": [[b"input", "FP32", [1]]]}, InvalidArgument, "b'input'"),
        ({"model": 99}, InvalidArgument, "99"),
        ({"prefer_gpu": "yes"}, InvalidArgument, "'yes'"),
        ({"prefer_gpu": 1}, InvalidArgument, "got `int` - at `$.prefer_gpu`: 1"),
        ({"min_gpu_memory_mb": "lots"}, InvalidArgument, "'lots'"),
        ({"min_gpu_memory_mb": -0.5}, InvalidArgument, "-0.5"),
        ({"min_gpu_memory_mb": math.nan}, InvalidArgument, "nan"),
        ({"min_gpu_memory_mb": -math.inf}, InvalidArgument, "-inf"),
    ],
)
def test_a_refusal_names_the_value(changes: dict[str, Any], kind: type[TensorNextError], named: str) -> None:
    error = refusal(pack(predict_header(**changes)))
    assert type(error) is kind
    assert named in error.message


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"weights": {"1": -5}}, ">= 0.0 - at `$.weights[...]`: {'1': -5}"),
        ({"weights": {"1": math.nan}}, ">= 0.0 - at `$.weights[...]`: {'1': nan}"),
        ({"weights": {"1": math.inf}}, "<= 1000000000.0 - at `$.weights[...]`: {'1': inf}"),
        ({"weights": {"1": "95"}}, "{'1': '95'}"),
        ({"weights": {"1": None}}, "{'1': None}"),
        ({"weights": {1: 95}}, "{1: 95}"),
        ({"weights": [95, 5]}, "[95, 5]"),
        ({"shadow": 3}, "3"),
        ({"model": None}, "None"),
    ],
)
def test_a_refused_route_names_the_value(changes: dict[str, Any], named: str) -> None:
    assert wire.decode_request(pack(route_header()), LIMITS) == wire.Route(
        v=1, id=7, model="resnet", weights={"1": 95.0, "2": 5.0}, shadow="3"
    )
    error = refusal(pack(route_header(**changes)))
    assert type(error) is InvalidArgument
    assert named in error.message


@pytest.mark.parametrize(
    ("title", "parts"), [("resnet", ("resnet", "")), ("resnet@2", ("resnet", "2")), ("r.s_n-t@18", ("r.s_n-t", "18"))]
)
def test_titles_are_split(title: str, parts: tuple[str, str]) -> None:
    assert wire.split_title(title) == parts


@pytest.mark.parametrize(
    "title",
    [
        *("", "@", "@1", "resnet@", "a@b@c", "resnet@1@", "resnet@@1", "\x1b[2J@" * 50),
        *("lin@", "a b@x", "a b", "../etc", "-a", "a/b", "x" * 65, "a@x", "a@01", "a@0", "a@-1", "a@1.0", "é", "a\n"),
    ],
)
def test_bad_titles_are_named(title: str) -> None:
    with pytest.raises(InvalidArgument, match="is not a model: NAME or NAME@VERSION") as caught:
        wire.split_title(title)
    assert wire.excerpt(title) in caught.value.message
    check_sentence(caught.value)


def test_a_refused_extension_value_is_shown_as_code_and_bytes() -> None:
    header = b"\x83" + pack("v") + b"\1" + pack("type") + pack("health") + pack("id") + b"\xd4\x05a"
    assert "(5, b'a')" in refusal(header).message


def test_a_long_value_is_shown_in_part() -> None:
    error = refusal(pack(predict_header(id="x" * 5000)))
    assert "xxxxxxxx" in error.message
    check_sentence(error)


@thorough
@given(ids)
def test_the_id_of_a_refused_header_is_found(request_id: int) -> None:
    for changes in ({"v": 2}, {"type": "divine"}, {"inputs": 12}, {"model": 99}):
        frame = pack(predict_header(id=request_id, **changes))
        refusal(frame)
        assert wire.request_id(frame, LIMITS) == request_id


@pytest.mark.parametrize("bad", [-1, 2**63, None, "7", 7.0, True, [7], ...])
def test_bad_ids_are_not_found(bad: object) -> None:
    assert wire.request_id(pack(predict_header(id=bad)), LIMITS) is None


def test_text_that_is_not_utf8_is_refused_and_the_id_found() -> None:
    frame = pack(predict_header(model="m_p")).replace(b"m_p", b"m\xffp")
    assert "0xff" in refusal(frame).message
    assert wire.request_id(frame, LIMITS) == 7


# --- hostile tensors -------------------------------------------------------------------------------------------


@thorough
@given(
    st.lists(
        st.tuples(
            st.builds(
                TensorSpec,
                name=names,
                datatype=st.sampled_from([*sorted(STORAGE), "FP8", "fp32", "<f4", "O", ""]),
                shape=st.lists(st.integers(-2, 4) | st.integers(-(2**63), 2**64 - 1), max_size=18).map(tuple),
            ),
            st.binary(max_size=40),
        ),
        max_size=3,
    )
)
def test_arbitrary_tensors_do_no_harm(drawn: list[tuple[TensorSpec, bytes]]) -> None:
    try:
        arrays = view_tensors([spec for spec, _ in drawn], [frame for _, frame in drawn], LIMITS)
    except InvalidArgument as error:
        check_sentence(error)
    else:
        assert [content(array) for array in arrays] == [frame for _, frame in drawn]


@pytest.mark.parametrize(
    ("spec", "frame", "named"),
    [
        (TensorSpec("t", "FP32", (-1,)), b"", "-1"),
        (TensorSpec("t", "FP32", (-1, -1)), bytes(4), "-1"),
        (TensorSpec("t", "FP32", (0, -1)), b"", "-1"),
        (TensorSpec("t", "FP32", (0,)), bytes(4), "[0]"),
        (TensorSpec("t", "FP32", (2**63,)), b"", "9223372036854775808"),
        (TensorSpec("t", "FP32", (0, 2**63)), b"", "9223372036854775808"),
        (TensorSpec("t", "FP32", (0, 2**63 - 1)), b"", "9223372036854775807"),
        (TensorSpec("t", "FP32", (2**32, 2**32)), b"", "[4294967296, 4294967296]"),
        (TensorSpec("t", "UINT8", (2**62, 4)), b"", "[4611686018427387904, 4]"),
        (TensorSpec("t", "FP64", (2**61,)), b"", "2305843009213693952"),
        (TensorSpec("t", "FP32", (2,)), bytes(7), "its frame has 7"),
        (TensorSpec("t", "FP32", (2,)), bytes(9), "its frame has 9"),
        (TensorSpec("t", "FP32", ()), b"", "its frame has 0"),
        (TensorSpec("t", "FP8", (2,)), bytes(2), "'FP8'"),
        (TensorSpec("t", "fp32", (2,)), bytes(8), "'fp32'"),
        (TensorSpec("t", ">f4", (2,)), bytes(8), "'>f4'"),
        (TensorSpec("t", "object", (1,)), bytes(8), "'object'"),
        (TensorSpec("t", "BOOL", (3,)), b"\0\1\2", "byte 2"),
        (TensorSpec("t", "BOOL", ()), b"\xff", "byte 255"),
        (TensorSpec("t", "FP32", (1,) * 17), bytes(4), "17"),
    ],
)
def test_a_refused_tensor_names_the_value(spec: TensorSpec, frame: bytes, named: str) -> None:
    message = tensor_refusal([spec], [frame])
    assert named in message
    assert "'t'" in message


def test_wrong_counts_are_refused() -> None:
    spec = TensorSpec("t", "FP32", (1,))
    assert "announces 1 tensors, 0" in tensor_refusal([spec], [])
    assert "announces 0 tensors, 1" in tensor_refusal([], [bytes(4)])
    assert "announces 1 tensors, 1000" in tensor_refusal([spec], [bytes(4)] * 1000)


@pytest.mark.timeout(20)
def test_the_rank_is_checked_before_the_product() -> None:
    """The product of 150,000 dimensions of 63 bits would take most of a minute."""
    spec = TensorSpec("t", "FP32", (wire.MAX_DIM,) * 150_000)
    assert "rank 150000" in tensor_refusal([spec], [b""])


# --- limits ----------------------------------------------------------------------------------------------------


def test_limit_on_the_header() -> None:
    frame = pack(predict_header(padding="x" * 500))
    assert wire.decode_request(frame, Limits(header_bytes=len(frame)))
    small = Limits(header_bytes=len(frame) - 1)
    message = refusal(frame, small).message
    assert str(len(frame)) in message
    assert str(len(frame) - 1) in message
    assert wire.request_id(frame, small) is None
    with pytest.raises(InvalidArgument, match=str(len(frame))):
        wire.decode_reply(frame, small)


def test_limit_on_tensors() -> None:
    spec, frame = TensorSpec("t", "UINT8", (1,)), b"\1"
    assert len(view_tensors([spec] * 3, [frame] * 3, Limits(tensors=3))) == 3
    message = tensor_refusal([spec] * 4, [frame] * 4, Limits(tensors=3))
    assert "4 tensors" in message
    assert "limit of 3" in message


def test_limit_on_rank() -> None:
    frame = bytes(4)
    assert view_tensors([TensorSpec("t", "FP32", (1,) * 3)], [frame], Limits(rank=3))
    message = tensor_refusal([TensorSpec("t", "FP32", (1,) * 4)], [frame], Limits(rank=3))
    assert "rank 4" in message
    assert "limit of 3" in message


def test_limit_on_bytes_holds_for_all_tensors_together() -> None:
    limits = Limits(message_bytes=1024)
    spec, frame = TensorSpec("t", "UINT8", (512,)), bytes(512)
    assert len(view_tensors([spec] * 2, [frame] * 2, limits)) == 2
    message = tensor_refusal([spec, spec, TensorSpec("last", "UINT8", (1,))], [frame, frame, b"\0"], limits)
    assert "'last'" in message
    assert "limit of 1024" in message
    assert "1025 bytes" in tensor_refusal([TensorSpec("t", "UINT8", (1025,))], [bytes(1025)], limits)


@pytest.mark.parametrize(
    "limit", [{"header_bytes": 10}, {"tensors": 0}, {"rank": 65}, {"message_bytes": 1}, {"parts": 5}]
)
def test_limits_that_make_no_sense_are_refused(limit: dict[str, int]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(limit, Limits)


# --- headers that random changes have damaged ------------------------------------------------------------------


@thorough
@given(st.binary(max_size=2000), st.integers(0, 2000), st.booleans())
def test_no_bytes_do_more_than_be_refused(noise: bytes, at: int, inside: bool) -> None:
    """Whatever comes is a request or an error of ours, and its id is one or None."""
    good = wire.encode(wire.Predict(v=1, id=7, inputs=(wire.TensorSpec("x", "FP32", (1, 2)),) * 60))
    frame = good[: at % len(good)] + noise + good[at % len(good) :] if inside else noise
    limits = wire.Limits()
    refused = False
    try:
        wire.decode_request(frame, limits)
    except TensorNextError:
        refused = True
    if refused:
        id_ = wire.request_id(frame, limits)
        assert id_ is None or 0 <= id_ <= wire.MAX_ID


@pytest.mark.parametrize("more", [{}, {"padding": "x" * 2000}])
def test_a_refused_cancel_has_no_id_of_its_own(more: dict[str, str]) -> None:
    for type_, expected in (("cancel", None), ("metadata", 7)):
        frame = pack({"type": type_, "id": 7, "v": 2, **more})
        refusal(frame)
        assert wire.request_id(frame, LIMITS) == expected


@pytest.mark.parametrize("id_", [0, 127, 128, 255, 65_535, 2**32 - 1, wire.MAX_ID])
def test_the_id_of_a_long_header_is_found_at_its_beginning(id_: int) -> None:
    header = {"type": "predict", "v": 1, "id": id_, "prefer_gpu": True, "inputs": [["x", "FP32", "y" * 2000]]}
    frame = msgspec.msgpack.encode(header)
    assert wire.request_id(frame, wire.Limits()) == id_
    behind = msgspec.msgpack.encode(dict(reversed(header.items())))
    assert wire.request_id(behind, wire.Limits()) is None
    with pytest.raises(InvalidArgument, match="str"):
        wire.decode_request(frame, wire.Limits())
