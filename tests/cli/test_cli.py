"""The commands of the tool, called in this process against a fake daemon: what they print and how they end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click
import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

import tnxctl
from fake_daemon import CPU, DIGITS, MLP, FakeDaemon, row_sums
from patience import longer_each_time
from tnxctl.cli import _COMMANDS, exits, main
from tnxctl.cli.tally import KEPT
from tnxctl.protocol import errors, wire
from tool import ask, ask_in_vain, fields, run

ASKING = ["health", "top", "stats", "explain", "models", "metadata", "predict", "reload", "whoami", "clients"]


@pytest.fixture
def fake() -> Iterator[FakeDaemon]:
    with FakeDaemon() as running:
        yield running


def npy(path: Path, array: np.ndarray) -> Path:
    np.save(path, array)
    return path


# --- the tool itself -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_names_the_verbs_and_every_exit_code(flag: str) -> None:
    result = run(flag)
    assert result.exit_code == 0
    for word in (
        "health",
        "models",
        "metadata",
        "predict",
        "bench",
        "reload",
        "whoami",
        "clients",
        "keys",
        "completion",
        "Examples:",
    ):
        assert word in result.output
    for code, meaning in exits.MEANINGS.items():
        assert f"{code.value:>3}  {meaning}\n" in result.output
    assert set(exits.MEANINGS) == set(exits.Exit)
    assert all(len(line) <= 80 for line in result.output.splitlines())


@pytest.mark.parametrize("verb", _COMMANDS)
def test_each_verb_has_help(verb: str) -> None:
    result = run(verb, "-h")
    assert result.exit_code == 0
    assert f"Usage: main {verb}" in result.output
    assert f"tnxctl {verb}" in result.output, "an example"


def test_version() -> None:
    assert run("--version").output == f"tnxctl {tnxctl.__version__}\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script(shell: str) -> None:
    result = run("completion", shell)
    assert result.exit_code == 0
    assert "_TNXCTL_COMPLETE" in result.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("helth",),
        ("health", "--host", "127.0.0.1:port"),
        ("health", "--host", "udp://127.0.0.1"),
        ("health", "--timeout", "0"),
        ("health", "--timeout", "nan"),
        ("health", "--timeout", "inf"),
        ("predict", "--count", "0"),
        ("predict", "--concurrency", "0"),
        ("predict", "--min-gpu-memory", "-1"),
        ("predict", "--min-gpu-memory", "nan"),
        ("predict", "--deadline", "0"),
        ("predict", "--deadline", "-5ms"),
        ("predict", "--deadline", "25h"),
        ("predict", "--deadline", "nan"),
        ("predict", "--deadline", "1e9"),
        ("predict", "--deadline", "soon"),
        ("predict", "--priority", "4"),
        ("predict", "--priority", "-1"),
        ("predict", "--priority", "first"),
        ("predict", "--input", "x.npy", "--batch-size", "2"),
        ("predict", "--input", "x.npy", "--input-dim", "2"),
        ("predict", "--output", "x.csv"),
        ("predict", "--output", "x.npy", "--count", "2"),
        ("predict", "--output", "-", "--json"),
        ("predict", "--cast"),
        ("completion", "tcsh"),
    ],
    ids=" ".join,
)
def test_wrong_use(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.exit_code == exits.Exit.USAGE
    assert result.stdout == ""
    assert "Error: " in result.stderr


# --- where the daemon is -------------------------------------------------------------------------------------


def test_the_environment_says_where_the_daemon_is_and_the_flag_wins(fake: FakeDaemon) -> None:
    assert run("health", TNX_HOST=fake.endpoint).exit_code == 0
    assert run("health", TNX_HOST=fake.endpoint.removeprefix("tcp://")).exit_code == 0
    assert run("health", "--host", fake.endpoint, TNX_HOST="udp://nonsense").exit_code == 0
    assert run("health", TNX_HOST="udp://nonsense").exit_code == exits.Exit.USAGE


@pytest.mark.parametrize(
    "verb",
    ["health", "models", "models ls", "models show mlp", "metadata", "predict", "reload", "whoami", "clients"],
)
def test_the_daemon_may_be_named_before_the_verb_and_after_it_wins(fake: FakeDaemon, verb: str) -> None:
    assert run("--host", fake.endpoint, *verb.split(), TNX_HOST="ipc:///nobody").exit_code == 0
    assert run("--host", "ipc:///nobody", *verb.split(), "--host", fake.endpoint).exit_code == 0
    assert run("--host", "udp://nonsense", *verb.split()).exit_code == exits.Exit.USAGE


@pytest.mark.parametrize("timeout", ["200ms", "200000us", "0.2s", "0.2"])
def test_a_timeout_has_the_units_of_a_deadline(timeout: str) -> None:
    with FakeDaemon(mute=True) as mute:
        assert ask_in_vain(mute, "health", "--timeout", timeout).exit_code == exits.Exit.TIMEOUT


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("helth",), "No such command 'helth'. Did you mean 'health'?"),
        (("models", "lod"), "No such command 'lod'. Did you mean 'load' or 'unload'?"),
        (("models", "xyzzy"), "No such command 'xyzzy'."),
        (("health", "--hots"), "--host"),
    ],
)
def test_what_was_meant_is_asked(arguments: tuple[str, ...], hint: str) -> None:
    result = run(*arguments)
    assert result.exit_code == exits.Exit.USAGE
    assert hint in result.stderr


def test_over_ipc(tmp_path: Path) -> None:
    with FakeDaemon(f"ipc://{tmp_path}/tnx.sock") as fake:
        assert ask(fake, "health").exit_code == 0


@pytest.mark.parametrize("verb", ASKING)
def test_nobody_there(tmp_path: Path, verb: str) -> None:
    result = run(verb, "--host", f"ipc://{tmp_path}/nobody", "--timeout", "0.2")
    assert result.exit_code == exits.Exit.UNREACHABLE
    assert result.stdout == ""
    assert result.stderr.startswith(f"Error: ipc://{tmp_path}/nobody")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("verb", ASKING)
def test_no_answer(verb: str) -> None:
    with FakeDaemon(mute=True) as fake:
        result = ask_in_vain(fake, verb, "--timeout", "0.2")
    assert result.exit_code == exits.Exit.TIMEOUT
    assert result.stderr.startswith("Error: ")


# --- health --------------------------------------------------------------------------------------------------

BUSY = {
    "devices": (
        CPU,
        wire.DeviceInfo(name="cuda:0", status="ready", description="H100", lanes=2, busy_lanes=2, queued_rows=120),
        wire.DeviceInfo(name="cuda:1", status="failed", error="out of memory"),
    ),
    "errors": (("NOT_FOUND", 1), ("INVALID_ARGUMENT", 4)),
    "abandoned": 7,
    "resent": 3,
    "prediction_error_us": 41.4,
}


def test_health_for_people() -> None:
    with FakeDaemon(**BUSY) as fake:
        result = ask(fake, "health")
    assert result.exit_code == 0
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert lines[0].startswith(f"ready {fake.endpoint} tnxd 0.1.0, up 2 h 5 min, answered in ")
    assert f"cpu ready 1 of 2 0 0.9 of 15.6 GiB {CPU.description}" in lines
    assert "cuda:0 ready 2 of 2 120 0.0 of 0.0 GiB H100" in lines
    assert "cuda:1 failed: out of memory" in lines
    assert "mlp (default) 1 ready 64 input FP32 [-1,256] output FP32 [-1,128]" in lines
    assert "digits 3 ready 64 image FP32 [-1,64] scores FP32 [-1,10]" in lines
    assert "1205 requests, 1200 replies, 5 errors, 0 undeliverable, 7 abandoned, 3 sent again" in lines
    assert "1 waiting, 2 running; predicted times are off by 41 µs" in lines
    assert "errors: INVALID_ARGUMENT 4, NOT_FOUND 1" in lines


def test_a_model_with_several_inputs_takes_several_lines() -> None:
    two = wire.TensorSpec("ids", "INT64", (-1,)), wire.TensorSpec("mask", "BOOL", (-1,))
    pair = wire.ModelInfo(name="pair", version="1", status="ready", inputs=two)
    nothing = wire.ModelInfo(name="broken", version="1", status="failed", error="no weights")
    with FakeDaemon(models=(pair, nothing)) as fake:
        lines = [" ".join(line.split()) for line in ask(fake, "health").stdout.splitlines()]
    assert lines[lines.index("pair 1 ready none ids INT64 [-1]") + 1] == "mask BOOL [-1]"
    assert "broken@1 failed: no weights" in lines


def test_a_daemon_whose_models_failed_is_degraded() -> None:
    broken = wire.ModelInfo(name="broken", version="1", status="failed", error="no weights")
    nothing = wire.ModelInfo(name="odd", version="", status="failed", error="its model.toml is not TOML")
    with FakeDaemon(models=(MLP, broken, nothing)) as fake:
        people, machines = ask(fake, "health"), ask(fake, "health", "--json")
    assert people.exit_code == machines.exit_code == exits.Exit.DEGRADED
    lines = people.stdout.splitlines()
    assert lines[0].startswith(f"degraded  {fake.endpoint}  tnxd ")
    assert lines[1] == "Not served: broken@1, odd"
    assert {"broken@1 failed: no weights", "odd failed: its model.toml is not TOML"} <= set(lines)
    assert (fields(machines)["status"], fields(machines)["failed"]) == ("degraded", ["broken@1", "odd"])
    with FakeDaemon(models=(broken,), status="starting") as fake:
        assert ask(fake, "health").exit_code == exits.Exit.NOT_READY


def test_a_version_that_serves_although_newer_files_failed_degrades_nothing() -> None:
    with FakeDaemon(models=(msgspec.structs.replace(MLP, error="its newer files are truncated"),)) as fake:
        result = ask(fake, "health")
    assert result.exit_code == 0
    assert "mlp@1: its newer files are truncated" in result.stdout


def test_health_for_machines(fake: FakeDaemon) -> None:
    document = fields(ask(fake, "health", "--json"))
    assert document["endpoint"] == fake.endpoint
    assert document["status"] == "ready"
    assert document["round_trip_ms"] > 0
    assert document["devices"][0]["memory_free_mb"] == CPU.memory_free_mb
    assert document["models"][0]["inputs"] == [{"name": "input", "datatype": "FP32", "shape": [-1, 256]}]
    assert document.keys().isdisjoint({"v", "id", "type"})
    assert (document["abandoned"], document["prediction_error_us"]) == (0, 0.0)


@pytest.mark.parametrize("status", ["starting", "draining", "a status from the future"])
def test_not_ready(status: str) -> None:
    with FakeDaemon(status=status) as fake:
        people, machines = ask(fake, "health"), ask(fake, "health", "--json")
    assert people.exit_code == machines.exit_code == exits.Exit.NOT_READY
    assert people.stdout.startswith(status)
    assert fields(machines)["status"] == status


# --- metadata ------------------------------------------------------------------------------------------------


def test_metadata_for_people(fake: FakeDaemon) -> None:
    result = ask(fake, "metadata", "digits")
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert lines[0] == "digits version 3: ready on cpu"
    assert "input image FP32 [-1,64]" in lines
    assert "output scores FP32 [-1,10]" in lines
    assert result.exit_code == 0


def test_metadata_for_machines_of_the_default_model(fake: FakeDaemon) -> None:
    document = fields(ask(fake, "metadata", "--json"))
    assert document["name"] == "mlp"
    assert document["default"] is True
    assert document["outputs"] == [{"name": "output", "datatype": "FP32", "shape": [-1, 128]}]


def test_an_unknown_model_is_refused(fake: FakeDaemon) -> None:
    result = ask(fake, "metadata", "nope", "--json")
    assert result.exit_code == exits.Exit.REFUSED
    assert result.stderr == "Error: no model 'nope'\n"
    assert fields(result) == {"error": {"code": "NOT_FOUND", "message": "no model 'nope'", "exit_code": 5}}


# --- predict: what is sent -----------------------------------------------------------------------------------


def test_random_input_fits_the_default_model(fake: FakeDaemon) -> None:
    assert ask(fake, "predict").exit_code == 0
    (request,) = fake.predicts
    assert request.inputs == (wire.TensorSpec("input", "FP32", (1, 256)),)
    assert (request.model, request.prefer_gpu, request.min_gpu_memory_mb) == ("", True, 0.0)


def test_options_reach_the_daemon(fake: FakeDaemon) -> None:
    ask(fake, "predict", "--model", "digits", "--no-prefer-gpu", "--batch-size", 4, "--input-dim", 64)
    ask(fake, "predict", "--prefer-gpu", "--min-gpu-memory", "10000.0")
    first, second = fake.predicts
    assert (first.model, first.prefer_gpu, first.inputs[0].shape) == ("digits", False, (4, 64))
    assert (second.model, second.prefer_gpu, second.min_gpu_memory_mb) == ("", True, 10000.0)


def test_device_deadline_and_priority_reach_the_daemon(fake: FakeDaemon) -> None:
    ask(fake, "predict", "--device", "cuda:1", "--deadline", "2s", "--priority", 3)
    ask(fake, "predict", "--device", "auto", "--deadline", "2500ms", "--count", 2, "--concurrency", 2)
    ask(fake, "predict")
    asked = [(request.device, request.deadline_us, request.priority) for request in fake.predicts]
    assert asked == [("cuda:1", 2e6, 3), *2 * [("auto", 2.5e6, None)], ("", None, None)]


def test_version_and_route_key_reach_the_daemon(fake: FakeDaemon) -> None:
    ask(fake, "predict", "--model", "digits@3", "--route-key", "ann", "--count", 2, "--concurrency", 2)
    ask(fake, "predict", "--model", "digits")
    asked = [(request.model, request.route_key) for request in fake.predicts]
    assert asked == [*2 * [("digits@3", "ann")], ("digits", "")]
    unknown = ask(fake, "predict", "--model", "digits@4")
    assert unknown.exit_code == exits.Exit.REFUSED
    assert "digits@4" in unknown.stderr


def test_a_deadline_that_cannot_be_kept() -> None:
    with FakeDaemon(compute=Every(1, errors.DeadlineExceeded)) as fake:
        refused = ask(fake, "predict", "--deadline", "60s")
    with FakeDaemon(delay_s=2.0) as fake:
        late = ask(fake, "predict", "--deadline", "100ms", "--json")
    assert refused.exit_code == late.exit_code == exits.Exit.TIMEOUT
    assert refused.stderr == "Error: not this time\n"
    assert "within its deadline of 100 ms" in fields(late)["error"]["message"]


def test_the_seed_decides_the_input(fake: FakeDaemon) -> None:
    for seed in (1, 1, 2):
        ask(fake, "predict", "--seed", seed)
    first, same, other = (inputs["input"] for inputs in fake.inputs)
    np.testing.assert_array_equal(first, same)
    assert (first != other).any()


def test_a_misfit_is_the_daemons_to_judge(fake: FakeDaemon) -> None:
    result = ask(fake, "predict", "--input-dim", 7)
    assert result.exit_code == exits.Exit.REFUSED
    assert result.stderr == "Error: input 'input': shape [1, 7] does not fit mlp\n"
    assert result.stdout == ""


# --- predict: files ------------------------------------------------------------------------------------------

SCANS = np.arange(128, dtype=np.float32).reshape(2, 64)
SCORES = SCANS.sum(axis=1, keepdims=True) + np.arange(10, dtype=np.float32)


def test_from_file_to_file(fake: FakeDaemon, tmp_path: Path) -> None:
    scans = npy(tmp_path / "scans.npy", SCANS)
    result = ask(fake, "predict", "--model", "digits", "--input", scans, "--output", tmp_path / "scores.npy")
    assert result.exit_code == 0, result.stderr
    np.testing.assert_array_equal(np.load(tmp_path / "scores.npy"), SCORES)
    assert fake.predicts[0].inputs[0].name in ("", "image")


def test_from_standard_input_to_standard_output(fake: FakeDaemon, tmp_path: Path) -> None:
    scans = npy(tmp_path / "scans.npy", SCANS).read_bytes()
    result = ask(fake, "predict", "--model", "digits", "--input", "-", "--output", "-", stdin=scans)
    (tmp_path / "scores.npy").write_bytes(result.stdout_bytes)
    np.testing.assert_array_equal(np.load(tmp_path / "scores.npy"), SCORES)
    assert "device" in result.stderr, "what people read goes elsewhere"


def test_named_tensors(tmp_path: Path) -> None:
    def two_out(_: wire.Predict, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"file": inputs["a"] * 2, "sum": inputs["a"] + inputs["b"]}

    np.savez(tmp_path / "in.npz", a=SCANS, b=SCANS)
    with FakeDaemon(compute=two_out) as fake:
        result = ask(fake, "predict", "--input", tmp_path / "in.npz", "--output", tmp_path / "out.npz")
        assert result.exit_code == 0, result.stderr
        too_many = ask(fake, "predict", "--input", tmp_path / "in.npz", "--output", tmp_path / "out.npy")
        piped = ask(fake, "predict", "--input", tmp_path / "in.npz", "--output", "-")
    with np.load(tmp_path / "out.npz", allow_pickle=False) as out:
        assert sorted(out) == ["file", "sum"]
        np.testing.assert_array_equal(out["sum"], SCANS * 2)
    assert too_many.exit_code == exits.Exit.FILE
    assert piped.stdout_bytes.startswith(b"PK")


def test_cast_converts_to_the_models_datatype(fake: FakeDaemon, tmp_path: Path) -> None:
    scans = npy(tmp_path / "scans.npy", SCANS.astype(np.float64))
    ask(fake, "predict", "--model", "digits", "--input", scans)
    ask(fake, "predict", "--model", "digits", "--input", scans, "--cast")
    assert [request.inputs[0].datatype for request in fake.predicts] == ["FP64", "FP32"]


def test_a_bad_file_is_the_users_problem(tmp_path: Path) -> None:
    (tmp_path / "bad.npy").write_bytes(b"not a tensor")
    result = run("predict", "--input", tmp_path / "bad.npy", "--json")
    assert result.exit_code == exits.Exit.FILE
    assert result.stderr.startswith(f"Error: cannot read {tmp_path}/bad.npy")
    assert fields(result)["error"]["code"] == "FILE"


def test_an_output_that_cannot_be_written_is_known_before_anything_is_asked(fake: FakeDaemon, tmp_path: Path) -> None:
    result = ask(fake, "predict", "--output", tmp_path / "no such folder" / "x.npy", "--json")
    assert result.exit_code == exits.Exit.FILE
    assert fields(result)["error"]["exit_code"] == exits.Exit.FILE
    assert result.stderr == f"Error: cannot write {tmp_path}/no such folder/x.npy: No such file or directory\n"
    assert fake.requests == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_an_output_that_leads_to_a_full_device(fake: FakeDaemon, tmp_path: Path) -> None:
    (tmp_path / "x.npy").symlink_to("/dev/full")
    result = ask(fake, "predict", "--output", tmp_path / "x.npy")
    assert (result.exit_code, fake.requests) == (exits.Exit.FILE, 0)
    assert result.stderr == f"Error: cannot write {tmp_path}/x.npy: No space left on device\n"


def test_a_dtype_that_cannot_travel(fake: FakeDaemon, tmp_path: Path) -> None:
    days = npy(tmp_path / "days.npy", np.array(["2026-11-29"], "M8[D]"))
    for count in (1, 3, KEPT + 1):
        result = ask(fake, "predict", "--input", days, "--count", count, "--concurrency", count)
        assert result.exit_code == exits.Exit.REFUSED
        assert "datetime64[D]" in result.stderr


# --- predict: what is shown ----------------------------------------------------------------------------------


def test_five_answers_for_people(fake: FakeDaemon) -> None:
    result = ask(fake, "predict", "--count", 5)
    assert result.exit_code == 0
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert lines[0].split()[:3] == ["#", "DEVICE", "BATCH"]
    for index, line in enumerate(lines[1:6], start=1):
        number, device, batch, _, total, compute, shape, *values = line.split()
        assert (number, device, batch, total, compute, shape) == (str(index), "cpu", "1", "150", "100", "[1,128]")
        assert values[-1] == "…"
    rest = "\n".join(lines[6:])
    assert "5 of 5 requests answered by mlp version 1" in rest
    assert "cpu (5): no GPU here" in rest
    assert "p99" in rest
    assert all(len(line) <= 80 for line in lines)


def test_one_answer_says_where_it_ran_and_why() -> None:
    with FakeDaemon(reason="no GPU has 10000 MiB free") as fake:
        result = ask(fake, "predict", "--min-gpu-memory", "10000")
    assert "device      cpu: no GPU has 10000 MiB free\n" in result.stdout
    assert "p99" not in result.stdout


@pytest.mark.parametrize(
    ("predicted_us", "forecast"),
    [
        (110.0, "predicted 110 µs, took 125 µs, 15 µs more than predicted"),
        (125.2, "predicted 125 µs, took 125 µs, as predicted"),
        (200.0, "predicted 200 µs, took 125 µs, 75 µs less than predicted"),
        (0.0, "took 125 µs, nothing was predicted"),
    ],
)
def test_an_answer_explained(predicted_us: float, forecast: str) -> None:
    with FakeDaemon(predicted_us=predicted_us, reason="done first there: cpu 0.11 ms, cuda:0 0.3 ms") as fake:
        explained, plain = ask(fake, "predict", "--explain"), ask(fake, "predict")
    line = f"   {forecast}; cpu: done first there: cpu 0.11 ms, cuda:0 0.3 ms\n"
    assert line in explained.stdout
    assert "predicted" not in plain.stdout


@pytest.mark.parametrize(("count", "explained"), [(5, 5), (KEPT + 10, 0)])
def test_the_predictions_of_many_answers_in_numbers(fake: FakeDaemon, count: int, explained: int) -> None:
    arguments = ("predict", "--count", count, "--concurrency", 2, "--explain")
    people, machines = ask(fake, *arguments), fields(ask(fake, *arguments, "--json"))
    assert people.stdout.count("15 µs more than predicted; cpu: no GPU here\n") == explained
    assert "prediction  off by  p50 15   p90 15   p99 15   max 15   µs\n" in people.stdout
    assert "110 µs predicted and 125 µs taken on average\n" in people.stdout
    assert machines["prediction_error_us"] == {"p50": 15.0, "p90": 15.0, "p99": 15.0, "max": 15.0}
    for answer in machines["answers"]:
        assert (answer["predicted_us"], answer["actual_us"]) == (110.0, 125.0)


def test_many_answers_without_predictions() -> None:
    with FakeDaemon(predicted_us=0.0) as fake:
        people = ask(fake, "predict", "--count", 3, "--explain")
        machines = fields(ask(fake, "predict", "--count", 3, "--json"))
    assert "prediction  the daemon made none\n" in people.stdout
    assert machines["prediction_error_us"] == {}


def test_failures_among_explained_answers() -> None:
    with FakeDaemon(compute=Every(2, errors.DeadlineExceeded)) as fake:
        result = ask(fake, "predict", "--count", 4, "--explain")
        all_failed = ask(fake, "predict", "--count", 2, "--explain", "--device", "tpu", "--model", "nope")
    assert "DEADLINE_EXCEEDED: not this time" in result.stdout
    assert result.stdout.count("more than predicted") == 2
    assert all_failed.exit_code == exits.Exit.REFUSED


def test_one_answer_for_machines(fake: FakeDaemon) -> None:
    document = fields(ask(fake, "predict", "--model", "digits", "--json"))
    (answer,) = document["answers"]
    (output,) = answer["outputs"]
    assert (document["answered"], document["failed"], document["interrupted"]) == (1, 0, False)
    assert (document["model"], document["version"]) == ("digits", "3")
    assert (answer["device"], answer["reason"], answer["batch_size"]) == ("cpu", "no GPU here", 1)
    assert answer["timing"]["compute_us"] == 100.0
    assert answer["predicted_us"] == 110.0
    assert (output["name"], output["datatype"], output["shape"]) == ("scores", "FP32", [1, 10])
    np.testing.assert_allclose(output["data"], row_sums(fake.predicts[0], fake.inputs[0])["scores"])


def test_numbers_that_json_lacks_and_outputs_that_are_too_large() -> None:
    def compute(_: wire.Predict, __: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"odd": np.array([np.nan, np.inf, 1.0], np.float32), "large": np.zeros(5000, np.uint8)}

    with FakeDaemon(compute=compute) as fake:
        odd, large = fields(ask(fake, "predict", "--json"))["answers"][0]["outputs"]
    assert odd["data"] == [None, None, 1.0]
    assert large == {"name": "large", "datatype": "UINT8", "shape": [5000]}


@pytest.mark.parametrize("concurrency", [1, 8])
def test_many_requests_have_one_summary(fake: FakeDaemon, concurrency: int) -> None:
    arguments = ("predict", "--count", 100, "--concurrency", concurrency)
    people, machines = ask(fake, *arguments), fields(ask(fake, *arguments, "--json"))
    assert len(fake.predicts) == 200
    assert "100 of 100 requests answered by mlp version 1" in people.stdout
    assert "DEVICE" not in people.stdout
    assert people.stderr == "", "no progress bar where there is no terminal"
    assert machines["answered"] == 100
    assert machines["answers"] == []
    assert machines["stage_means_us"]["total"] == pytest.approx(150)
    assert list(machines["round_trip_ms"]) == ["p50", "p90", "p99", "max"]


class Every:
    """Fails the requests whose turn it is."""

    def __init__(self, turns: int, error: type[errors.TensorNextError]) -> None:
        self._turns, self._error, self._seen = turns, error, 0

    def __call__(self, request: wire.Predict, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        self._seen += 1
        if self._seen % self._turns == 0:
            raise self._error("not this time")
        return row_sums(request, inputs)


@pytest.mark.parametrize("count", [10, 100])
@pytest.mark.parametrize("concurrency", [1, 4])
def test_when_some_requests_fail(count: int, concurrency: int) -> None:
    with FakeDaemon(compute=Every(5, errors.ResourceExhausted)) as fake:
        result = ask(fake, "predict", "--count", count, "--concurrency", concurrency)
        document = fields(ask(fake, "predict", "--count", count, "--concurrency", concurrency, "--json"))
    failed = count // 5
    assert result.exit_code == exits.Exit.FAILED
    assert f"failed      {failed} RESOURCE_EXHAUSTED: not this time" in result.stdout
    assert result.stderr == f"Error: {failed} of {count} requests failed: {failed} RESOURCE_EXHAUSTED\n"
    assert (document["answered"], document["failed"]) == (count - failed, failed)
    assert document["errors"] == [{"code": "RESOURCE_EXHAUSTED", "count": failed, "message": "not this time"}]


@pytest.mark.parametrize("count", [1, 3, 30])
@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.InvalidArgument, 5),
        (errors.NotFound, 5),
        (errors.FailedPrecondition, 4),
        (errors.ResourceExhausted, 8),
        (errors.DeadlineExceeded, 6),
        (errors.Unavailable, 3),
        (errors.Internal, 1),
        (errors.Unknown, 1),
    ],
)
def test_when_all_requests_fail_in_the_same_way(error: type[errors.TensorNextError], code: int, count: int) -> None:
    with FakeDaemon(compute=Every(1, error)) as fake:
        assert ask(fake, "predict", "--count", count).exit_code == code


@pytest.mark.parametrize("concurrency", [1, 8])
def test_a_run_across_a_switch_counts_by_version(concurrency: int) -> None:
    arguments = ("predict", "--model", "digits", "--count", 40, "--concurrency", concurrency)
    with FakeDaemon(version_of=lambda number: "4" if number > 15 else "3") as fake:
        people = ask(fake, *arguments)
    with FakeDaemon(version_of=lambda number: "4" if number > 15 else "3") as fake:
        machines = fields(ask(fake, *arguments, "--json"))
    assert people.stdout.splitlines()[0].startswith("40 of 40 requests answered in ")
    assert "answered    25 by digits version 4\nanswered    15 by digits version 3\n" in people.stdout
    assert machines["versions"] == [
        {"model": "digits", "version": "4", "count": 25},
        {"model": "digits", "version": "3", "count": 15},
    ]
    assert (machines["model"], machines["version"]) == ("digits", "4")


@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_run_ends_when_the_daemon_is_gone(concurrency: int) -> None:
    with FakeDaemon(compute=Every(10, errors.Unavailable)) as fake:
        result = ask(fake, "predict", "--count", 1000, "--concurrency", concurrency, "--json")
        assert len(fake.predicts) < 20
        document = fields(result)
        assert document["sent"] == len(fake.predicts)
    assert result.exit_code == exits.Exit.FAILED
    assert result.stderr.startswith("Error: given up after ")
    assert (document["answered"] + document["failed"], document["unknown"]) == (document["sent"], 0)


@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_run_ends_when_nothing_comes_any_more(concurrency: int) -> None:
    """Else it would wait for the timeout of every request that is left."""
    for timeout in longer_each_time(0.2):
        with FakeDaemon(delay_s=60.0) as fake:
            arguments = ("predict", "--count", 1000, "--concurrency", concurrency, "--timeout", timeout)
            result = ask(fake, *arguments)
            sent = len(fake.predicts)
            machines = ask(fake, *arguments, "--json")
        if sent and len(fake.predicts) > sent:  # else the time was over before the daemon had told about the model
            break
    assert sent < 20
    document = fields(machines)
    assert result.exit_code == exits.Exit.TIMEOUT
    assert result.stderr.startswith("Error: given up after ")
    assert document["sent"] == document["failed"] + document["unknown"]
    assert document["unknown"] == concurrency - 1


@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_run_goes_on_when_the_daemon_refuses_what_would_be_late(concurrency: int) -> None:
    """The daemon answers at once, as it does where model.toml has a deadline."""
    with FakeDaemon(compute=Every(1, errors.DeadlineExceeded)) as fake:
        result = ask(fake, "predict", "--count", 20, "--concurrency", concurrency)
        assert len(fake.predicts) == 20
    assert result.exit_code == exits.Exit.TIMEOUT
    assert "given up" not in result.stderr


def test_what_a_daemon_says_cannot_steer_the_terminal() -> None:
    evil = "\x1b[2Jgone\r\n"
    model = msgspec.structs.replace(MLP, name=evil, version=evil)
    with FakeDaemon(models=(model, DIGITS), reason=evil, device=evil, compute=Every(2, errors.Internal)) as fake:
        for verb in (("health",), ("metadata",), ("predict", "--count", "2", "--explain"), ("predict",)):
            shown = ask(fake, *verb).output
            assert "gone" in shown or verb == ("predict",)
            assert "\x1b[2J" not in shown
            assert "\r" not in shown


def test_colours_only_when_asked(fake: FakeDaemon) -> None:
    coloured = CliRunner().invoke(main, ["health", "--host", fake.endpoint], color=True)
    plain = CliRunner(env={"NO_COLOR": "1"}).invoke(main, ["health", "--host", fake.endpoint], color=True)
    assert coloured.stdout != click.unstyle(coloured.stdout)
    assert "\x1b" not in plain.stdout
    assert "\x1b" not in ask(fake, "health").stdout
