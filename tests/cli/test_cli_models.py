"""`tnxctl models` and `tnxctl reload`: what they ask for, what they show, how they end."""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import msgspec
import numpy as np
import pytest

import peers
from fake_daemon import DIGITS, MLP, RESNET, RESNETS, Change, FakeDaemon, Outputs
from tnxctl.cli import comparison, example, exits, inputs, modellist, models, modeltoml, text
from tnxctl.protocol import errors, wire
from tnxctl.protocol.datatypes import STORAGE
from tool import ask, ask_in_vain, fields, run

TOOL = [sys.executable, "-m", "tnxctl.cli"]
PATIENCE_S = 60.0  # for what must happen; never reached when all is well

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals or modes")

ENCODER = wire.ModelInfo(
    name="encoder",
    version="12",
    status="ready",
    inputs=(wire.TensorSpec("ids", "INT64", (-1, -1)), wire.TensorSpec("mask", "BOOL", (-1, -1))),
    outputs=(wire.TensorSpec("embedding", "FP32", (-1, 384)),),
    max_batch_size=32,
    devices=("cpu",),
    format="torchscript",
    traffic=1.0,
    memory_mb=2252.8,
    load_s=75.0,
    notes=("TorchScript is deprecated",),
)
BROKEN = wire.ModelInfo(name="resnet", version="3", status="failed", error="models/resnet/3/model.pt2 is truncated")
EVERY_KIND = (
    MLP,
    msgspec.structs.replace(RESNET, traffic=0.95),
    msgspec.structs.replace(RESNET, version="2", traffic=0.05, shadow=True, error="its newer files are truncated"),
    BROKEN,
    ENCODER,
)


@pytest.fixture
def fake() -> Iterator[FakeDaemon]:
    with FakeDaemon(models=(MLP, DIGITS, *RESNETS)) as running:
        yield running


def squeezed(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines()]


# --- the list ------------------------------------------------------------------------------------------------


def test_the_list_for_people() -> None:
    with FakeDaemon(models=EVERY_KIND) as fake:
        result = ask(fake, "models")
    assert (result.exit_code, result.stderr) == (0, "")
    assert squeezed(result.stdout) == [
        "NAME VERSION STATE DEVICES INPUTS OUTPUTS MEMORY TRAFFIC",
        "mlp (default) 1 ready cpu input FP32 [-1,256] output FP32 [-1,128] - -",
        "resnet 1 ready cpu,cuda:0 image FP32 [-1,3,224,224] scores FP32 [-1,1000] 97.5 MiB 95 %",
        "resnet 2 ready cpu,cuda:0 image FP32 [-1,3,224,224] scores FP32 [-1,1000] 97.5 MiB 5 % + shadow",
        "resnet 3 failed - - -",
        "encoder 12 ready cpu ids INT64 [-1,-1] embedding FP32 [-1,384] 2.2 GiB 100 %",
        "mask BOOL [-1,-1]",
        "resnet@2: its newer files are truncated",
        "resnet@3 failed: models/resnet/3/model.pt2 is truncated",
        "encoder@12: TorchScript is deprecated",
    ]


def test_the_list_has_a_name_of_its_own() -> None:
    with FakeDaemon(models=EVERY_KIND) as fake:
        for flags in ((), ("--json",)):
            assert ask(fake, "models", "ls", *flags).stdout == ask(fake, "models", *flags).stdout


def test_the_list_for_machines() -> None:
    with FakeDaemon(models=EVERY_KIND) as fake:
        document = fields(ask(fake, "models", "--json"))
        before_nothing = run("models", "--json", "--host", fake.endpoint)
    assert document["endpoint"] == fake.endpoint
    assert fields(before_nothing) == document
    assert [(model["name"], model["version"]) for model in document["models"]] == [
        (info.name, info.version) for info in EVERY_KIND
    ]
    encoder = document["models"][-1]
    assert encoder["inputs"][1] == {"name": "mask", "datatype": "BOOL", "shape": [-1, -1]}
    assert {key: encoder[key] for key in ("traffic", "shadow", "memory_mb", "load_s", "format", "notes")} == {
        "traffic": 1.0,
        "shadow": False,
        "memory_mb": 2252.8,
        "load_s": 75.0,
        "format": "torchscript",
        "notes": ["TorchScript is deprecated"],
    }


def test_what_is_wrong_is_said_once() -> None:
    nothing = wire.ModelInfo(name="m/two", version="", status="failed", error="m/two: 'two' is no version")
    with FakeDaemon(models=(nothing,), reloaded={"failed": {"m/two": "m/two: 'two' is no version"}}) as fake:
        assert ask(fake, "models").stdout.splitlines()[-1] == "m/two failed: 'two' is no version"
        assert ask(fake, "reload").stdout == "failed:   m/two: 'two' is no version\n"


def test_no_models_at_all() -> None:
    with FakeDaemon(models=()) as fake:
        assert ask(fake, "models").stdout == "There are no models.\n"
        assert fields(ask(fake, "models", "--json"))["models"] == []


@pytest.mark.parametrize("width", [200, 120, 100, 80, 60])
def test_the_list_fits_the_terminal(width: int) -> None:
    lines = [click.unstyle(line) for line in modellist.table(EVERY_KIND, width)]
    assert all(len(line) <= width for line in lines), lines
    assert all(word in " ".join(lines[:2]) for word in ("VERSION", "STATE", "INPUTS", "OUTPUTS", "MEMORY", "TRAFFIC"))
    if width >= 80:
        assert sum("image FP32 [-1,3,224,224]" in line for line in lines) == 2, "signatures are whole"
        assert sum("encoder " in line for line in lines) == 1


def test_a_narrow_list_has_signatures_on_lines_of_their_own() -> None:
    lines = [click.unstyle(line) for line in modellist.table((RESNET, BROKEN, ENCODER), 70)]
    assert squeezed("\n".join(lines)) == [
        "NAME VERSION STATE DEVICES MEMORY TRAFFIC",
        "INPUTS -> OUTPUTS",
        "resnet 1 ready cpu,cuda:0 97.5 MiB 100 %",
        "image FP32 [-1,3,224,224] -> scores FP32 [-1,1000]",
        "resnet 3 failed - - -",
        "encoder 12 ready cpu 2.2 GiB 100 %",
        "ids INT64 [-1,-1], mask BOOL [-1,-1] -> embedding FP32 [-1,384]",
    ]


@pytest.mark.parametrize(
    ("mebibytes", "shown"),
    [(0.0, "-"), (1e-6, "<0.1 MiB"), (0.05, "0.1 MiB"), (97.54, "97.5 MiB"), (1024.0, "1.0 GiB"), (81920, "80.0 GiB")],
)
def test_amounts_of_memory(mebibytes: float, shown: str) -> None:
    assert text.memory(mebibytes) == shown


@pytest.mark.parametrize(
    ("traffic", "shadow", "shown"),
    [
        (1.0, False, "100 %"),
        (1 / 3, False, "33.3 %"),
        (0.95, False, "95 %"),
        (1e-5, False, "0.001 %"),
        (0.0, False, "-"),
        (0.0, True, "shadow"),
        (0.5, True, "50 % + shadow"),
    ],
)
def test_parts_of_the_traffic(traffic: float, shadow: bool, shown: str) -> None:
    assert text.traffic(msgspec.structs.replace(RESNET, traffic=traffic, shadow=shadow)) == shown


def test_health_tells_versions_apart() -> None:
    loaded = (MLP, *EVERY_KIND[1:])
    with FakeDaemon(models=(*loaded, msgspec.structs.replace(RESNETS[1], version="4"))) as fake:
        lines = squeezed(ask(fake, "health").stdout)
    assert "MODEL VERSION STATUS BATCH INPUTS OUTPUTS TRAFFIC" in lines
    assert "resnet 1 ready 64 image FP32 [-1,3,224,224] scores FP32 [-1,1000] 95 %" in lines
    assert "resnet 2 ready 64 image FP32 [-1,3,224,224] scores FP32 [-1,1000] 5 % + shadow" in lines
    assert "resnet@3 failed: models/resnet/3/model.pt2 is truncated" in lines
    assert "Not loaded: resnet@4" in lines
    assert not any("deprecated" in line for line in lines), "for models show"


def test_metadata_of_one_version(fake: FakeDaemon) -> None:
    two = ask(fake, "metadata", "resnet@2")
    assert squeezed(two.stdout)[0] == "resnet version 2: unloaded"
    assert fields(ask(fake, "metadata", "resnet@1", "--json"))["version"] == "1"
    assert ask(fake, "metadata", "resnet@9").exit_code == exits.Exit.REFUSED
    with FakeDaemon(models=(BROKEN,)) as broken:
        lines = ask(broken, "metadata", "resnet@3").stdout.splitlines()
    assert lines == [
        "resnet version 3: failed",
        "resnet@3 failed: models/resnet/3/model.pt2 is truncated",
        "",
        "Its inputs and outputs are not known before it is loaded.",
    ]


# --- one of them ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("known", "shapes"),
    [
        ((), [(1, 1), (1, 1)]),
        (((1, 16), (1, 16)), [(1, 16), (1, 16)]),
        (((1, 16),), [(1, 16), (1, 1)]),
        (((1, 16, 2), (1, -5)), [(1, 1), (1, 1)]),
        (3 * ((1, 16),), [(1, 16), (1, 16)]),
    ],
)
def test_shapes_that_the_daemon_knows_to_work_are_used(known: Any, shapes: list[tuple[int, ...]]) -> None:
    info = msgspec.structs.replace(ENCODER, example_shapes=known)
    assert inputs.example_shapes(info) == shapes
    drawn = inputs.random_inputs(info, batch_size=3, input_dim=None, seed=0)
    assert [array.shape for array in drawn.values()] == [(3, shape[1]) for shape in shapes]


def test_one_for_people() -> None:
    with FakeDaemon(models=EVERY_KIND) as fake:
        lines = squeezed(ask(fake, "models", "show", "resnet@2").stdout)
    assert lines[0] == "resnet version 2: ready on cpu, cuda:0"
    for line in (
        "resnet@2: its newer files are truncated",
        "format pt2",
        "traffic 5 % + shadow",
        "memory 97.5 MiB on each device",
        "requests 120",
        "loading took 3.2 s",
        "versions resnet@1 ready, resnet@3 failed",
        "input image FP32 [-1,3,224,224]",
        "output scores FP32 [-1,1000]",
        f"tnxctl predict --host {fake.endpoint} --model resnet@2",
        'result = tnx.predict(inputs, model="resnet@2")',
    ):
        assert line in lines


def test_one_for_machines() -> None:
    with FakeDaemon(models=EVERY_KIND) as fake:
        document = fields(ask(fake, "models", "show", "encoder", "--json"))
        broken = fields(ask(fake, "models", "show", "resnet@3", "--json"))
    assert (document["name"], document["version"], document["load_s"]) == ("encoder", "12", 75.0)
    assert document["example"]["shell"] == f"tnxctl predict --host {fake.endpoint} --model encoder"
    assert "np.zeros((1, 1), np.int64)" in document["example"]["python"]
    assert broken["example"] is None


def test_one_that_is_not_there(fake: FakeDaemon) -> None:
    result = ask(fake, "models", "show", "nope", "--json")
    assert result.exit_code == exits.Exit.REFUSED
    assert fields(result)["error"]["code"] == "NOT_FOUND"


ODD = (
    ENCODER,
    RESNET,
    wire.ModelInfo(
        name="scalar",
        version="1",
        status="ready",
        inputs=(wire.TensorSpec("a", "FP64", ()), wire.TensorSpec('it\'s \\ "b"\n', "UINT8", (3, -1))),
        outputs=(wire.TensorSpec("y", "FP32", ()),),
    ),
    *(
        wire.ModelInfo(
            name=f"of-{datatype}",
            version="1",
            status="ready",
            inputs=(wire.TensorSpec("x", datatype, (-1, 2)),),
            max_batch_size=4,
        )
        for datatype in STORAGE
    ),
)


@pytest.mark.parametrize("info", ODD, ids=lambda info: info.name)
def test_the_examples_work_as_they_stand(info: wire.ModelInfo) -> None:
    def whatever(request: wire.Predict, _: Outputs) -> Outputs:
        return {"y": np.zeros(1, np.float32)}

    title = f"{info.name}@{info.version}"
    with FakeDaemon(models=(info,), compute=whatever) as fake:
        calls = example.calls(info, title, fake.endpoint)
        assert calls is not None
        exec(compile(calls.python, "example", "exec"), {})
        shell = subprocess.run(
            [*TOOL, *calls.shell.split()[1:]], capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )
    assert shell.returncode == 0, shell.stderr
    for request in fake.predicts:
        assert request.model == title
        names = [(spec.name, spec.datatype) for spec in request.inputs]
        assert names == [(spec.name, spec.datatype) for spec in info.inputs]
        assert [spec.shape for spec in request.inputs] == inputs.example_shapes(info)
    assert len(fake.predicts) == 2


def test_an_example_of_the_daemon_where_clients_look_for_it_says_no_place() -> None:
    calls = example.calls(RESNET, "resnet", "tcp://127.0.0.1:5555")
    assert calls is not None
    assert calls.shell == "tnxctl predict --model resnet"
    assert "with Client() as tnx:" in calls.python


@pytest.mark.parametrize("datatype", ["FP8", "", "os.system"])
def test_no_example_for_what_cannot_be_sent(datatype: str) -> None:
    strange = msgspec.structs.replace(RESNET, inputs=(wire.TensorSpec("x", datatype, (1,)),))
    assert example.calls(strange, "resnet", "tcp://127.0.0.1:5555") is None
    with FakeDaemon(models=(strange,)) as fake:
        result = ask(fake, "models", "show", "resnet")
    assert result.exit_code == 0
    assert "In Python" not in result.stdout


# --- changes -------------------------------------------------------------------------------------------------


def test_load_and_unload(fake: FakeDaemon) -> None:
    loaded = ask(fake, "models", "load", "resnet@2")
    unloaded = fields(ask(fake, "models", "unload", "resnet@1", "--json"))
    assert [msgspec.structs.replace(change, id=0) for change in fake.changes] == [
        wire.Load(v=1, id=0, model="resnet@2"),
        wire.Unload(v=1, id=0, model="resnet@1"),
    ]
    assert loaded.exit_code == 0
    lines = squeezed(loaded.stdout)
    assert "resnet 2 ready cpu image FP32 [-1,3,224,224] scores FP32 [-1,1000] 97.5 MiB -" in lines
    assert "mlp" not in loaded.stdout, "only the versions of that name"
    assert lines[-1] == "resnet@2: its loading and warm-up took 3.2 s"
    assert [(model["version"], model["status"]) for model in unloaded["models"]] == [("1", "unloaded"), ("2", "ready")]


def test_load_by_name_speaks_of_all_versions(fake: FakeDaemon) -> None:
    assert ask(fake, "models", "load", "resnet").stdout.count("loading and warm-up took") == 2
    assert "took" not in ask(fake, "models", "load", "resnet", "--json").stdout


@pytest.mark.parametrize(
    ("arguments", "weights", "shadow"),
    [
        (("1=95", "2=5"), {"1": 95.0, "2": 5.0}, ""),
        (("1=0.5",), {"1": 0.5}, ""),
        (("1=1", "2=0"), {"1": 1.0, "2": 0.0}, ""),
        (("1=1e3", "--shadow", "2"), {"1": 1000.0}, "2"),
        (("latest",), {}, ""),
        (("latest", "--shadow", "2"), {}, "2"),
    ],
)
def test_route(fake: FakeDaemon, arguments: tuple[str, ...], weights: dict[str, float], shadow: str) -> None:
    result = ask(fake, "models", "route", "resnet", *arguments)
    (change,) = fake.changes
    assert msgspec.structs.replace(change, id=0) == wire.Route(
        v=1, id=0, model="resnet", weights=weights, shadow=shadow
    )
    assert result.exit_code == 0
    assert squeezed(result.stdout)[0].startswith("NAME VERSION")


def test_what_came_of_a_route(fake: FakeDaemon) -> None:
    document = fields(ask(fake, "models", "route", "resnet", "1=95", "2=5", "--json"))
    assert [model["traffic"] for model in document["models"]] == [0.95, 0.05]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("1=nan",), "'1=nan'"),
        (("1=inf",), "weight inf of version 1: expected a number from 0 to 1e+09"),
        (("1=-5",), "weight -5.0 of version 1"),
        (("1=1e10",), "from 0 to 1e+09"),
        (("1=",), "'1='"),
        (("=5",), "'=5'"),
        (("1",), "'1'"),
        (("1:5",), "'1:5'"),
        (("1=5=6",), "'1=5=6'"),
        (("1=a lot",), "'1=a lot'"),
        (("1=1", "latest"), "'latest'"),
        (("latest", "latest"), "'latest'"),
        (("1=1", "2=2", "1=3"), "version 1 has two weights"),
        (("1=0", "2=0.0"), "none is above 0"),
        ((), "Missing argument"),
        (("--shadow", "2"), "Missing argument"),
    ],
    ids=" ".join,
)
def test_routes_that_are_none(fake: FakeDaemon, arguments: tuple[str, ...], named: str) -> None:
    result = ask(fake, "models", "route", "resnet", *arguments)
    assert result.exit_code == exits.Exit.USAGE
    assert named in result.stderr
    assert fake.changes == []


@pytest.mark.parametrize("title", ["@", "@1", "resnet@", "a@b@c"])
@pytest.mark.parametrize("verb", [("load",), ("unload",), ("route", "1=1"), ("compare", "1", "2"), ("show",)])
def test_what_is_no_model(fake: FakeDaemon, verb: tuple[str, ...], title: str) -> None:
    result = ask(fake, "models", verb[0], title, *verb[1:])
    assert result.exit_code == exits.Exit.REFUSED
    assert result.stderr.startswith(f"Error: {title!r} is not a model: NAME or NAME@VERSION, a name of up to 64 ")
    assert fake.changes == []


@pytest.mark.parametrize("verb", [("route", "resnet@1", "1=1"), ("compare", "resnet@1", "1", "2")])
def test_a_version_where_there_must_be_none(fake: FakeDaemon, verb: tuple[str, ...]) -> None:
    result = ask(fake, "models", *verb)
    assert result.exit_code == exits.Exit.REFUSED
    assert "expected the name alone" in result.stderr


def refuse(request: Change, _: tuple[wire.ModelInfo, ...]) -> tuple[wire.ModelInfo, ...]:
    raise errors.FailedPrecondition("resnet@2: models/resnet/2/model.pt2 is truncated, 1000 of 2000 bytes")


@pytest.mark.parametrize("verb", [("load", "resnet@2"), ("unload", "resnet@1"), ("route", "resnet", "1=1")])
def test_a_change_that_fails_says_why(verb: tuple[str, ...]) -> None:
    with FakeDaemon(models=RESNETS, change=refuse) as fake:
        people, machines = ask(fake, "models", *verb), ask(fake, "models", *verb, "--json")
    assert people.exit_code == machines.exit_code == exits.Exit.NOT_READY
    assert people.stdout == ""
    assert people.stderr == "Error: resnet@2: models/resnet/2/model.pt2 is truncated, 1000 of 2000 bytes\n"
    assert fields(machines)["error"]["code"] == "FAILED_PRECONDITION"


def test_a_load_takes_its_time() -> None:
    """Longer than --timeout of other commands; the answer still comes, and not before its time."""
    with FakeDaemon(models=RESNETS, looks=1) as fake:  # nobody looks, so it never ends
        early = ask_in_vain(fake, "models", "load", "resnet@2", "--timeout", "0.1")
    with FakeDaemon(models=RESNETS, load_delay_s=0.5) as fake:
        result = ask(fake, "models", "load", "resnet@2")
    assert early.exit_code == exits.Exit.TIMEOUT
    assert "did not answer load within 100 ms; it may still be at work on it" in early.stderr
    assert result.exit_code == 0


def test_nobody_there_is_noticed_soon_however_long_a_load_may_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "DEFAULT_TIMEOUT_S", 0.2)
    result = run("models", "load", "resnet", "--host", f"ipc://{tmp_path}/nobody")
    assert result.exit_code == exits.Exit.UNREACHABLE
    assert "no connection within 200 ms" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [("models", "load", "resnet@2"), ("models", "unload", "resnet"), ("models", "route", "m", "1=1"), ("reload",)],
)
def test_a_daemon_that_dies_of_a_change_is_not_killed_again(arguments: tuple[str, ...]) -> None:
    with peers.FakeDaemon(peers.die) as daemon:
        came_back = threading.Thread(target=lambda: daemon.gone.wait(PATIENCE_S) and daemon.start())
        came_back.start()
        result = run(*arguments, "--host", daemon.endpoint)
        came_back.join()
        assert result.exit_code == exits.Exit.UNREACHABLE
        assert "the connection broke while" in result.stderr
        assert "whether it has changed anything is not known" in result.stderr
        assert daemon.received.qsize() == 1


@posix
@pytest.mark.parametrize("arguments", [["models", "load", "resnet@2"], ["models", "unload", "resnet"], ["reload"]])
def test_ctrl_c_ends_the_waiting_alone(arguments: list[str]) -> None:
    with FakeDaemon(models=RESNETS, load_delay_s=2 * PATIENCE_S) as fake:
        process = subprocess.Popen(
            [*TOOL, *arguments, "--host", fake.endpoint], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            assert fake.wait_for_requests(1, PATIENCE_S)
            process.send_signal(signal.SIGINT)
            stdout, stderr = process.communicate(timeout=PATIENCE_S)
        finally:
            process.kill()
            process.wait()
        assert process.returncode == exits.Exit.INTERRUPTED
        assert stdout == ""
        assert (
            stderr.strip()
            == "Error: interrupted; the daemon finishes what it has begun: tnxctl models shows how far it is"
        )
        assert fake.cancelled == []


# --- reload --------------------------------------------------------------------------------------------------


def test_a_reload_with_failures() -> None:
    came = {"loaded": ("resnet@2", "digits@4"), "unloaded": ("resnet@1",), "failed": {"resnet@3": "it is truncated"}}
    with FakeDaemon(reloaded=came) as fake:
        people, machines = ask(fake, "reload"), ask(fake, "reload", "--json")
    assert people.exit_code == machines.exit_code == exits.Exit.FAILED
    assert people.stdout.splitlines() == [
        "loaded:   resnet@2, digits@4",
        "unloaded: resnet@1",
        "failed:   resnet@3: it is truncated",
    ]
    assert people.stderr == "Error: 1 could not be loaded: resnet@3\n"
    assert fields(machines) == {
        "endpoint": fake.endpoint,
        "loaded": ["resnet@2", "digits@4"],
        "unloaded": ["resnet@1"],
        "failed": {"resnet@3": "it is truncated"},
    }


def test_a_reload_that_changes_nothing(fake: FakeDaemon) -> None:
    result = ask(fake, "reload")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "Nothing has changed.\n", "")


def test_a_reload_that_is_refused() -> None:
    with FakeDaemon(change=refuse) as fake:
        assert ask(fake, "reload").exit_code == exits.Exit.NOT_READY


# --- compare -------------------------------------------------------------------------------------------------


def test_a_comparison_for_people(fake: FakeDaemon) -> None:
    result = ask(fake, "models", "compare", "resnet", "1", "2")
    assert result.exit_code == 0
    assert squeezed(result.stdout) == [
        "resnet version 2 against 1: 200 requests compared",
        "1 failed in version 2, 7 skipped because there was no free capacity",
        "last failure: it met a NaN",
        "",
        "OUTPUT ELEMENTS MAX ABS DIFF MEAN ABS DIFF ARG-MAX AGREES MISFITS",
        "scores 200000 1.5e-05 2e-07 99.5 % 0",
        "mask 200 0 0 - 3",
        "",
        "VERSION BATCHES P50 ms P90 ms P99 ms",
        "1 150 8.000 9.000 12.000",
        "2 150 4.000 5.000 6.500",
    ]
    assert all(len(line) <= 80 for line in result.stdout.splitlines())


def test_a_comparison_for_machines(fake: FakeDaemon) -> None:
    document = fields(ask(fake, "models", "compare", "resnet", "1", "2", "--json"))
    assert document.keys().isdisjoint({"v", "id", "type"})
    assert (document["model"], document["baseline"], document["candidate"]) == ("resnet", "1", "2")
    assert [output["argmax_agreement"] for output in document["outputs"]] == [0.995, None]
    assert document["candidate_us"] == {"count": 150, "p50_us": 4000.0, "p90_us": 5000.0, "p99_us": 6500.0}


def test_a_comparison_of_nothing() -> None:
    none = wire.Percentiles(count=0, p50_us=0.0, p90_us=0.0, p99_us=0.0)
    empty = wire.Comparison(
        v=1,
        id=1,
        model="resnet",
        baseline="1",
        candidate="2",
        requests=0,
        errors=0,
        skipped=0,
        outputs=(),
        baseline_us=none,
        candidate_us=none,
    )
    assert list(comparison.lines(empty, 80))[-1] == "There is nothing to compare yet."


@pytest.mark.parametrize(
    ("share", "shown"),
    [(1.0, "100 %"), (0.99999, "<100 %"), (0.995, "99.5 %"), (1e-6, ">0 %"), (0.0, "0 %"), (1 / 3, "33.33 %")],
)
def test_an_agreement_of_100_percent_is_one(share: float, shown: str) -> None:
    times = wire.Percentiles(count=1, p50_us=1.0, p90_us=1.0, p99_us=1.0)
    output = wire.OutputDifference(name="y", elements=1, max_abs=0.0, mean_abs=0.0, argmax_agreement=share, misfits=0)
    found = wire.Comparison(
        v=1,
        id=1,
        model="resnet",
        baseline="1",
        candidate="2",
        requests=1,
        errors=0,
        skipped=0,
        outputs=(output,),
        baseline_us=times,
        candidate_us=times,
    )
    (line,) = [line for line in comparison.lines(found, None) if line.startswith("y ")]
    assert re.split("  +", line)[-2] == shown


# --- init ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "keys", "weights"),
    [
        ((), set(), "model.pt2"),
        (("--format", "pt2"), set(), "model.pt2"),
        (("--format", "onnx"), set(), "model.onnx"),
        (("--format", "safetensors"), {"factory", "inputs", "outputs"}, "model.safetensors"),
        (("--format", "torchscript"), {"inputs", "outputs"}, "model.pt"),
    ],
)
def test_a_file_for_each_format_has_what_it_needs(
    tmp_path: Path, arguments: tuple[str, ...], keys: set[str], weights: str
) -> None:
    result = run("models", "init", tmp_path / "models" / "resnet", *arguments)
    assert result.exit_code == 0, result.stderr
    path = tmp_path / "models" / "resnet" / "model.toml"
    assert f"wrote {path}\n" in result.stdout
    assert f"{tmp_path}/models/resnet/1/{weights}" in result.stdout
    assert tomllib.loads(path.read_text(encoding="utf-8")).keys() == keys


def test_init_for_machines(tmp_path: Path) -> None:
    document = fields(run("models", "init", tmp_path / "resnet", "--format", "onnx", "--json"))
    assert document == {
        "path": f"{tmp_path}/resnet/model.toml",
        "weights": f"{tmp_path}/resnet/1/model.onnx",
        "format": "onnx",
    }


def test_nothing_is_replaced_without_being_told(tmp_path: Path) -> None:
    path = tmp_path / "resnet" / "model.toml"
    path.parent.mkdir()
    path.write_text("priority = 2\n" * 1000)
    refused = run("models", "init", path.parent, "--json")
    assert refused.exit_code == exits.Exit.FILE
    assert refused.stderr == f"Error: {path} is there already: --force replaces it\n"
    assert fields(refused)["error"]["code"] == "FILE"
    assert path.read_text() == "priority = 2\n" * 1000
    assert run("models", "init", path.parent, "--force").exit_code == 0
    assert path.read_text(encoding="utf-8") == modeltoml.TEMPLATE


@posix
def test_what_is_made_is_writable_by_its_owner_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        run("models", "init", tmp_path / "models" / "resnet")
    finally:
        os.umask(before)
    for made in (tmp_path / "models", tmp_path / "models" / "resnet", tmp_path / "models" / "resnet" / "model.toml"):
        assert not made.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH), made


@pytest.mark.parametrize("name", [".hidden", "-x", "a b", "a@1", "ä", "x" * 65, "/"])
def test_a_name_that_the_daemon_would_not_take(tmp_path: Path, name: str) -> None:
    result = run("models", "init", "--", tmp_path / name)
    assert result.exit_code == exits.Exit.USAGE
    assert "is no name for a model" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "resnet").mkdir()
    monkeypatch.chdir(tmp_path / "resnet")
    assert run("models", "init", ".").exit_code == 0
    assert (tmp_path / "resnet" / "model.toml").exists()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = run("models", "init", tmp_path / "file" / "resnet")
    assert result.exit_code == exits.Exit.FILE
    assert result.stderr.startswith(f"Error: cannot write {tmp_path}/file/resnet/model.toml: ")


# --- the command line ----------------------------------------------------------------------------------------

VERBS = ("ls", "show", "load", "unload", "route", "compare", "init")


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_has_help_with_an_example(verb: str) -> None:
    result = run("models", verb, "--help")
    assert result.exit_code == 0
    assert f"Usage: main models {verb}" in result.output
    assert f"tnxctl models {verb}" in result.output
    assert all(len(line) <= 80 for line in result.output.splitlines())


def test_the_verbs_are_listed_in_the_order_of_use() -> None:
    listed = run("models", "--help").output.partition("Commands:")[2]
    assert [line.split()[0] for line in listed.strip().splitlines()] == list(VERBS)


def test_reload_has_help_with_an_example() -> None:
    result = run("reload", "--help")
    assert "tnxctl reload" in result.output
    assert "exit code" in result.output


def test_options_may_come_before_the_verb(fake: FakeDaemon) -> None:
    result = run("models", "--host", fake.endpoint, "--json", "show", "resnet", TNX_HOST="ipc:///nowhere")
    assert fields(result)["name"] == "resnet"
    other = run("models", "--host", "ipc:///nowhere", "show", "--host", fake.endpoint, "resnet")
    assert other.exit_code == 0, "the nearer one wins"
    hasty = run("models", "--host", "ipc:///nowhere", "--timeout", "0.1", "load", "resnet")
    assert "no connection within 100 ms" in hasty.stderr
    assert run("models", "--host", "udp://x", "load", "resnet").exit_code == exits.Exit.USAGE


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("mo", {"models"}),
        ("re", {"record", "reload", "replay"}),
        ("models ", set(VERBS)),
        ("models lo", {"load"}),
        ("models init --fo", {"--format", "--force"}),
    ],
)
def test_names_of_verbs_are_completed(words: str, expected: set[str]) -> None:
    environment = {"_TNXCTL_COMPLETE": "bash_complete", "COMP_LINE": f"tnxctl {words}"}
    done = subprocess.run(
        [sys.executable, "-c", "from tnxctl.cli import main; main(prog_name='tnxctl')"],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=True,
    )
    assert {found.partition(",")[2] for found in done.stdout.split()} == expected


def test_what_a_daemon_says_cannot_steer_the_terminal() -> None:
    evil = "\x1b[2Jgone\r\n\u202e"
    model = msgspec.structs.replace(
        RESNET,
        name=evil,
        version=evil,
        status=evil,
        default=True,
        format=evil,
        error=evil,
        notes=(evil,),
        devices=(evil,),
        inputs=(wire.TensorSpec(evil, "FP32", (-1,)),),
        outputs=(wire.TensorSpec(evil, evil, (-1,)),),
    )
    other = msgspec.structs.replace(model, version="2", default=False)
    reloaded = {"loaded": (evil,), "unloaded": (evil,), "failed": {evil: evil}}
    with FakeDaemon(models=(model, other), reloaded=reloaded) as fake:
        verbs = (("models",), ("health",), ("metadata",), ("models", "show", ""), ("models", "load", evil), ("reload",))
        for verb in verbs:
            shown = ask(fake, *verb).output
            assert "gone" in shown, verb
            assert not {"\x1b", "\r", "\u202e"} & set(shown), verb
        narrow = "\n".join(modellist.table((model, other), 80))
    assert not {"\r", "\u202e"} & set(click.unstyle(narrow))


def test_a_comparison_cannot_steer_the_terminal() -> None:
    evil = "\x1b[2Jgone\r\n"
    difference = wire.OutputDifference(
        name=evil, elements=1, max_abs=0.0, mean_abs=0.0, argmax_agreement=None, misfits=0
    )
    times = wire.Percentiles(count=1, p50_us=1.0, p90_us=1.0, p99_us=1.0)
    found = wire.Comparison(
        v=1,
        id=1,
        model=evil,
        baseline=evil,
        candidate=evil,
        requests=1,
        errors=1,
        skipped=0,
        outputs=(difference,),
        baseline_us=times,
        candidate_us=times,
        last_error=evil,
    )
    shown = "".join(map(click.unstyle, comparison.lines(found, None)))
    assert "gone" in shown
    assert not {"\x1b", "\r", "\n"} & set(shown)
