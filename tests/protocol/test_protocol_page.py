"""docs/protocol.md against the implementation: its tables, its examples, and a client written from it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, get_args

import msgspec
import numpy as np
import pytest

import zmtp
from conftest import Daemon
from dealer import Dealer
from tnxctl import connection, resending, session
from tnxctl.protocol import errors, histograms, wire
from tnxctl.protocol.datatypes import STORAGE
from tnxctl.protocol.frames import view_tensors
from tnxctl.protocol.strings import LENGTH_BYTES, encode
from tnxctl.protocol.wire import Limits
from tnxd.deployment import version
from tnxd.serving import slowest, version_traffic

PAGE = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text(encoding="utf-8")
CLIENT = Path(__file__).parents[1] / "clients" / "minimal.mjs"

Reader = type[wire.Request] | type[wire.Reply]


def section(title: str) -> str:
    """The text below a heading, up to the next one."""
    found = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#+ |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert found is not None, f"the page has no section {title!r}"
    return found[1]


def tables(text: str) -> list[list[list[str]]]:
    """Its tables, as rows of cells without the heading."""
    found = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    return [[[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines()[2:]] for table in found]


def blocks(text: str, language: str) -> list[str]:
    """The contents of its fenced blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def unhex(block: str) -> bytes:
    """The bytes of an annotated dump: what stands before the # of each line."""
    return b"".join(bytes.fromhex(line.partition("#")[0]) for line in block.splitlines())


def bare(cell: str) -> str:
    return cell.strip("`")


# --- tables ----------------------------------------------------------------------------------------------------


def page_type(kind: msgspec.inspect.Type) -> str:
    """The page's name of a type."""
    match kind:
        case msgspec.inspect.IntType() | msgspec.inspect.LiteralType():
            return "int"
        case msgspec.inspect.FloatType():
            return "float"
        case msgspec.inspect.StrType():
            return "str"
        case msgspec.inspect.BoolType():
            return "bool"
        case msgspec.inspect.NoneType():
            return "nil"
        case msgspec.inspect.UnionType(types):
            return " or ".join(page_type(member) for member in types)
        case msgspec.inspect.DictType(key, value):
            return f"map of {page_type(key)} to {page_type(value)}"
        case msgspec.inspect.VarTupleType(item):
            return f"array of {page_type(item)}"
        case msgspec.inspect.StructType(wire.TensorSpec):
            return "tensor"
        case msgspec.inspect.StructType(wire.Span):
            return "span"
        case msgspec.inspect.StructType(histograms.Histogram):
            return "histogram"
        case msgspec.inspect.StructType():
            return "map"
    raise AssertionError(f"{kind} has no name on the page")


def page_default(field: msgspec.inspect.Field) -> str:
    """The page's notation for what a field is when it is left out."""
    if field.required:
        return "required"
    default = field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
    if default is msgspec.NODEFAULT:  # of a field that may be UNSET
        return "absent"
    return "nil" if default is None else json.dumps(msgspec.to_builtins(default))


@pytest.mark.parametrize(
    ("title", "headers"),
    [
        ("predict", [wire.Predict]),
        ("predict_shared", [wire.PredictShared]),
        ("share", [wire.Share]),
        ("shared", [wire.Shared]),
        ("cancel", [wire.Cancel]),
        ("result", [wire.Result, wire.Timing, wire.StepTiming]),
        ("error", [wire.ErrorReply]),
        ("health, the request", [wire.Health]),
        (
            "health, the report",
            [wire.HealthReport, wire.DeviceInfo, wire.ModelInfo, wire.PipelineInfo, wire.PipelineStep],
        ),
        ("metadata, the request", [wire.Metadata]),
        ("metadata, the report", [wire.MetadataReport]),
        ("models, the request", [wire.Models]),
        ("models, the report", [wire.ModelsReport]),
        ("load", [wire.Load]),
        ("unload", [wire.Unload]),
        ("route", [wire.Route]),
        ("reload, the request", [wire.Reload]),
        ("reload, the report", [wire.ReloadReport]),
        ("record", [wire.Record]),
        ("stop_recording", [wire.StopRecording]),
        ("recording, the request", [wire.Recording]),
        ("recording, the report", [wire.RecordingReport]),
        ("compare, the request", [wire.Compare]),
        ("compare, the report", [wire.Comparison, wire.OutputDifference, wire.Percentiles]),
        ("whoami, the request", [wire.WhoAmI]),
        ("whoami, the report", [wire.Identity]),
        ("clients, the request", [wire.Clients]),
        ("clients, the report", [wire.ClientsReport, wire.ClientInfo]),
        ("kick, the request", [wire.Kick]),
        ("kick, the report", [wire.KickReport]),
        ("keys, the request", [wire.Keys]),
        ("keys, the report", [wire.KeysReport, wire.KeyInfo]),
        ("stats, the request", [wire.Stats]),
        ("stats, the report", [wire.StatsReport, wire.VersionStats, wire.DeviceStats, wire.ClientStats]),
        ("explain, the request", [wire.Explain]),
        ("explain, the report", [wire.Explanation, wire.SlowRequest]),
    ],
)
def test_fields(title: str, headers: list[type[msgspec.Struct]]) -> None:
    """Every field is on the page, with its type and its default."""
    found = tables(section(title))
    assert len(found) == len(headers)
    for table, header in zip(found, headers, strict=True):
        info = msgspec.inspect.type_info(header)
        assert isinstance(info, msgspec.inspect.StructType)
        known = wire.Predict.__struct_fields__ if header is wire.PredictShared else ()
        fields = [field for field in info.fields if field.name not in known]
        expected = {field.name: (page_type(field.type), page_default(field)) for field in fields}
        if info.tag_field is not None:
            expected[info.tag_field] = ("str", "required")
        on_page = {bare(name): (kind, bare(default)) for name, kind, default, _ in table}
        assert on_page == expected
        if info.tag is not None:
            assert f'`"{info.tag}"`' in [meaning for name, _, _, meaning in table if bare(name) == "type"]


def test_datatypes() -> None:
    _, datatypes = tables(section("Tensors"))
    assert {bare(name): size for name, size, _ in datatypes} == {
        name: f"{LENGTH_BYTES} and more" if name == wire.BYTES else str(dtype.itemsize)
        for name, dtype in STORAGE.items()
    }


def test_the_example_of_strings() -> None:
    (block,) = blocks(section("Strings"), "hex")
    frame = unhex(block)
    (array,) = view_tensors([wire.TensorSpec("t", wire.BYTES, (2,))], [frame], Limits())
    assert array.tolist() == [b"hi", b""]
    assert encode(array).tobytes() == frame


def test_error_codes() -> None:
    (codes,) = tables(section("Errors"))
    names = [bare(code) for code, *_ in codes]
    known = [kind.code for kind in vars(errors).values() if isinstance(kind, type) and hasattr(kind, "code")]
    assert sorted(names) == sorted(set(known))


def test_roles() -> None:
    (roles,) = tables(section("Roles"))
    on_page = {verb: bare(role) for role, verbs in roles for verb in re.findall(r"`(\w+)`", verbs)}
    tags = {kind: msgspec.inspect.type_info(kind).tag for kind in get_args(wire.Request)}  # type: ignore[attr-defined]
    assert on_page == {tags[kind]: role.title for kind, role in wire.LEAST_ROLES.items()}


def test_limits() -> None:
    (limits,) = tables(section("Limits"))
    assert {bare(name): int(default) for name, default, _ in limits} == msgspec.structs.asdict(Limits())


def test_default_endpoint_and_version() -> None:
    assert f"tcp://127.0.0.1:{wire.DEFAULT_PORT}`" in section("Connection")
    assert f"`v` is {wire.VERSION}." in section("Versions and growth")


def test_links_lead_somewhere() -> None:
    headings = re.findall(r"^#+ (.*)$", PAGE, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", PAGE)) <= anchors


# --- examples --------------------------------------------------------------------------------------------------

EXAMPLES: dict[str, Any] = {
    "predict request": wire.Predict,
    "predict_shared request": wire.PredictShared,
    "share": wire.Share,
    "shared": wire.Shared,
    "cancel": wire.Cancel,
    "result": wire.Result,
    "error": wire.ErrorReply,
    "health request": wire.Health,
    "health report": wire.HealthReport,
    "metadata request": wire.Metadata,
    "metadata report": wire.MetadataReport,
    "models request": wire.Models,
    "models report": wire.ModelsReport,
    "load": wire.Load,
    "unload": wire.Unload,
    "route": wire.Route,
    "reload request": wire.Reload,
    "reload report": wire.ReloadReport,
    "record request": wire.Record,
    "stop_recording request": wire.StopRecording,
    "recording request": wire.Recording,
    "recording report": wire.RecordingReport,
    "compare request": wire.Compare,
    "compare report": wire.Comparison,
    "whoami request": wire.WhoAmI,
    "whoami report": wire.Identity,
    "clients request": wire.Clients,
    "clients report": wire.ClientsReport,
    "kick request": wire.Kick,
    "kick report": wire.KickReport,
    "keys request": wire.Keys,
    "keys report": wire.KeysReport,
    "stats request": wire.Stats,
    "stats report": wire.StatsReport,
    "explain request": wire.Explain,
    "explain report": wire.Explanation,
}


def test_there_is_an_example_of_every_header() -> None:
    assert set(EXAMPLES.values()) == {*get_args(wire.Request), *get_args(wire.Reply)}
    assert re.findall(r"^### Example: (.*)$", PAGE, re.MULTILINE) == list(EXAMPLES)


@pytest.mark.parametrize("title", EXAMPLES)
def test_example(title: str) -> None:
    """The bytes on the page are exactly those that the implementation writes for the values, and the reverse."""
    kind = EXAMPLES[title]
    text = section(f"Example: {title}")
    header, *frames = [unhex(block) for block in blocks(text, "hex")]
    (values,) = [json.loads(block) for block in blocks(text, "json")]

    assert re.findall(r", (\d+) bytes:", text) == [str(len(frame)) for frame in (header, *frames)]
    assert msgspec.msgpack.decode(header) == values["header"]
    decode = wire.decode_request if kind in get_args(wire.Request) else wire.decode_reply
    decoded = decode(header, Limits())
    assert type(decoded) is kind
    assert decoded == msgspec.convert(values["header"], kind)
    assert wire.encode(decoded) == header

    specs: tuple[wire.TensorSpec, ...] = ()
    if isinstance(decoded, wire.Predict | wire.Result) and kind is not wire.PredictShared:
        specs = decoded.inputs if isinstance(decoded, wire.Predict) else decoded.outputs
    arrays = view_tensors(specs, frames, Limits())
    assert [array.tolist() for array in arrays] == values.get("tensors", [])
    for spec, frame, numbers in zip(specs, frames, values.get("tensors", []), strict=True):
        assert np.array(numbers, STORAGE[spec.datatype]).tobytes() == frame


def test_stages_of_the_example_sum_to_the_total() -> None:
    (values,) = blocks(section("Example: result"), "json")
    timing = json.loads(values)["header"]["timing"]
    total = timing.pop("total_us")
    assert sum(timing.values()) == total


def test_the_largest_deadline_and_the_levels() -> None:
    (fields,) = tables(section("predict"))
    meanings = {bare(name): meaning for name, _, _, meaning in fields}
    assert f"at most {wire.MAX_DEADLINE_US:.0f}, a day" in meanings["deadline_us"]
    assert meanings["priority"].startswith(f"0 to {wire.LOWEST_PRIORITY}.")


def test_the_buckets_of_histograms() -> None:
    text = " ".join(section("stats, the report").split())
    assert "bucket `8 e + s + 1`, with `s` from 0 to 7, what is from `2^e (1 + s / 8)`" in text
    for bucket in range(1, histograms.BUCKETS):
        octave, step = divmod(bucket - 1, 8)
        assert histograms.bounds(bucket)[0] == 2**octave * (1 + step / 8)
    assert f"The last one, {histograms.BUCKETS - 1}," in text


def test_the_numbers_that_are_kept() -> None:
    text = " ".join(section("stats, the report").split() + section("explain, the report").split())
    assert f"those of the last {version_traffic.MOST_GONE} are kept" in text
    assert (slowest.MOST, slowest.SLOT_S) == (8, 60 / 4)
    assert "of each quarter of a minute, the daemon keeps the slowest eight" in text


def test_the_budget_of_resends() -> None:
    text = " ".join(section("Resending").split())
    every = round(1 / resending.TOKENS_PER_SUCCESS)
    assert every == 10
    first, most = resending.FIRST_TOKENS, resending.MOST_TOKENS
    assert f"There are {first:.0f} at first and one more for every ten results, up to {most:.0f}." in text
    assert f"the next after {connection.FIRST_RETRY_S * 1e3:.0f} ms" in text
    assert session.MAX_LOSSES == 3
    assert "unless that was the third one that ended under it" in text


def test_the_largest_weight() -> None:
    (fields,) = tables(section("route"))
    meanings = {bare(name): meaning for name, _, _, meaning in fields}
    assert f"0 to {wire.MAX_WEIGHT:.0f}, and not all 0" in meanings["weights"]


def test_every_status_of_a_version() -> None:
    (statuses,) = tables(section("Status of a version"))
    names = [json.loads(bare(name)) for name, _ in statuses]
    assert sorted(names) == sorted(
        value for name, value in vars(version).items() if name.isupper() and isinstance(value, str)
    )


def test_zmtp_handshake() -> None:
    greeting, ready = [unhex(block) for block in blocks(section("Without a ZeroMQ library"), "hex")]
    assert greeting == zmtp.GREETING
    assert ready == zmtp.frame(b"\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER", command=True)


# --- a client written from the page ----------------------------------------------------------------------------


def test_a_client_in_another_language(daemon: Daemon) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs node, to run a client in another language")
    run = subprocess.run([node, str(CLIENT), daemon.endpoint], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    said = json.loads(run.stdout)

    assert said["health"]["status"] == "ready"
    assert said["metadata"]["model"]["inputs"] == [["input", "FP32", [-1, 256]]]
    assert said["result"]["outputs"] == [["output", "FP32", [3, 128]]]
    assert said["mistake"]["code"] == "NOT_FOUND"
    assert "'mpl'" in said["mistake"]["message"]

    inputs = (np.arange(3 * 256, dtype=np.float32) % 7 / 8).reshape(3, 256)
    with Dealer(daemon.endpoint) as dealer:
        dealer.predict(inputs, model="mlp")
        _, (expected,) = dealer.result()
    outputs = np.array(said["values"], np.float32).reshape(3, 128)
    assert np.isfinite(outputs).all()
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-6)
