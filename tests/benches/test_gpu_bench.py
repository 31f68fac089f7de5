"""The benchmark of a GPU, on a pretended one: so that its first run on a real one does not fail of a slip."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest
import torch
from click.testing import CliRunner, Result

import benchmarks
from pretended import pretended

# isort: split
import gpu
import gpu_checks
import gpu_report
from gpu_inprocess import Asked, Bench
from gpu_networks import BALLAST, HUNGRY, LOOKUP, MLP, PICTURES, SMALL, TEXTS, sized
from gpu_report import LINES, NOT_RUN, Cell, Check, GpuReport, Overhead, Part, Speed
from gpu_run import Budget, Lengths, Run
from processes import BenchError
from report import Ratio

ROOT = Path(__file__).parents[2]

TRIAL = ("--pretended", "--small", "--quick", "--budget", "240")

CAN_PRETEND = pytest.mark.skipif(torch.backends.cuda.is_built(), reason="this torch has kernels of CUDA's own")


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(gpu.main, arguments)


def read(folder: Path) -> GpuReport:
    return msgspec.json.decode((folder / "gpu.json").read_bytes(), type=GpuReport)


# --- time and parts ----------------------------------------------------------------------------------------------


def test_time_that_a_part_does_not_need_is_for_those_after_it() -> None:
    now = [100.0]
    budget = Budget(60.0, {"a": 1, "b": 1, "c": 4}, lambda: now[0])
    budget.begin("a")
    assert budget.left() == 10.0
    now[0] += 2.0
    budget.begin("b")
    assert budget.left() == pytest.approx(58.0 / 5)
    now[0] += 50.0  # far more than it had
    assert budget.left() == 0.0
    budget.begin("c")
    assert budget.left() == pytest.approx(8.0)


def test_a_part_that_fails_does_not_keep_those_after_it_from_their_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []

    def breaks(run: Run) -> None:
        raise BenchError("no figures | today")

    def slips(run: Run) -> None:
        written.append(len(read(tmp_path).parts))  # what was found so far is written, should nothing follow
        raise KeyError("a slip")

    def works(run: Run) -> None:
        assert not run.fits(1e6, "a long one")
        run.report.checks["tests"] = Check("3 passed", True)

    for name, do in (("assert", breaks), ("memory", slips), ("tests", works)):
        monkeypatch.setitem(gpu.PARTS, name, gpu.PARTS[name]._replace(do=do))
    done = invoke("--out", str(tmp_path), "--parts", "assert,memory,tests", "--pretended", "--small")
    assert done.exit_code == 1
    found = read(tmp_path)
    assert [part.failure for part in found.parts] == ["no figures | today", "KeyError: 'a slip'", ""]
    assert found.parts[2].left_out == ["a long one"]
    assert written == [1]
    text = (tmp_path / "gpu.md").read_text()
    assert "failed: no figures / today" in text
    assert "seen: 3 passed" in text
    assert 'raise KeyError("a slip")' in (tmp_path / "gpu.log").read_text()


def test_tests_that_had_their_turn_count_though_one_ends_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = str(tmp_path / "test_first.py"), str(tmp_path / "test_second.py")
    Path(first).write_text(
        "import os, signal, pytest\ndef test_a(): pass\n@pytest.mark.parametrize('x', [1, 2])\n"
        "def test_b(x): assert x == 1\ndef test_c(): pytest.skip('no')\n"
        "def test_d(): os.kill(os.getpid(), signal.SIGKILL)\ndef test_e(): pass\n"
    )
    Path(second).write_text("def test_a(): pass\n")
    seen = {}
    for paths in ((first, second), (second,)):
        monkeypatch.setattr(gpu_checks, "CUDA_TESTS", paths)
        report = GpuReport(True, SMALL, 150.0)
        with Run(report, tmp_path, Budget(150.0, {"tests": 1}), Lengths(1, 0.05), ()) as run:
            run.budget.begin("tests")
            gpu_checks.tests(run)
        seen[paths] = report.checks["tests"]
    assert seen[first, second] == Check(f"3 passed, 1 failed, 1 skipped, {first} ended with -9", False)
    assert seen[second,] == Check("1 passed", True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = invoke("--out", str(tmp_path / "out"))
    assert done.exit_code == 1
    assert "finds no GPU here" in done.output
    assert not (tmp_path / "out").exists()


# --- what is told ------------------------------------------------------------------------------------------------


def test_docs_have_a_line_for_all_that_is_to_be_found_on_a_device() -> None:
    document = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    section = document[document.index(gpu_report.BEGIN) : document.index(gpu_report.END)]
    for line in LINES:
        assert f"| {line.what} | {line.goal} | " in section
    plan = gpu_report.markdown(None)
    assert plan.count(NOT_RUN) == len(LINES)
    assert gpu_report.put_into(document, plan).count(NOT_RUN) >= len(LINES)


def test_figures_become_a_table_and_are_held_against_their_goals(tmp_path: Path) -> None:
    ratio = Ratio(0.98, 0.97, 0.99)
    cell = Cell(64, 8, 64, 9.5, 300.0, 7000.0, 12.0, 8000.0, 8200.0, ratio, 7500.0, 7000.0, 0.875, 0.93)
    found = GpuReport(
        False,
        "full",
        450.0,
        device={"device": "NVIDIA H200", "memory_mib": 143_771.0, "torch": "2.11.0+cu130", "cuda": "13.0"},
        parts=[Part("tests", 60.0, "it ended"), Part("mlp", 1.0, left_out=["512 rows", "4096 rows"])],
        checks={"memory": Check("smaller batches", False)},
        speeds={"resnet50-64": Speed("ResNet-50", 1e-3, [cell]), "mlp": Speed("MLP", 0.0)},
        overheads={"mlp": Overhead("MLP", 180.0, 30.0, 80.0, 70.0)},
    )
    results = dict(re.findall(r"^\| (.+?) \| .*? \| (.+) \|$", gpu_report.markdown(found), re.MULTILINE))
    by_key = {line.key: results[line.what] for line in LINES}
    assert by_key["share"] == "0.98 (0.97-0.99), met"
    assert by_key["busy"] == "88%, 93% as the driver samples it"
    assert by_key["tests"] == "failed: it ended"
    assert by_key["memory"] == "**missed**: smaller batches"
    assert results["MLP, one row outstanding: latency beyond the GPU's time and an echo"] == "70 µs, **missed**"
    assert results["MLP, 1 to 4096 rows"] == "left out: 512 rows, 4096 rows"
    assert by_key["minilm"] == NOT_RUN
    assert "NVIDIA H200, 143,771 MiB" in gpu_report.markdown(found)

    path, document = tmp_path / "gpu.json", tmp_path / "performance.md"
    document.write_text(f"before\n{gpu_report.BEGIN}\nold\n{gpu_report.END}\nafter\n")
    path.write_bytes(msgspec.json.encode(found))
    assert CliRunner().invoke(gpu_report.main, [str(path), "--into", str(document)]).exit_code == 0
    assert document.read_text() == f"before\n{gpu_report.markdown(found)}\nafter\n"
    recorded = document.read_bytes()
    for trial in (msgspec.structs.replace(found, pretended=True), msgspec.structs.replace(found, size=SMALL)):
        assert "PRETENDED" in gpu_report.markdown(trial) or "'small'" in gpu_report.markdown(trial)
        path.write_bytes(msgspec.json.encode(trial))
        refused = CliRunner().invoke(gpu_report.main, [str(path), "--into", str(document)])
        assert refused.exit_code == 1
        assert "no figures of a GPU" in refused.output
    assert document.read_bytes() == recorded


# --- on a pretended device ---------------------------------------------------------------------------------------


@CAN_PRETEND
def test_plain_torch_gives_its_answer_however_late_the_device_works() -> None:
    network = sized(SMALL)[MLP]
    rows = network.rows[-1]
    (array,) = network.example(rows).values()
    expected = network.build()(torch.from_numpy(array)).flatten().tolist()
    with pretended(), torch.inference_mode():
        bench = Bench(SMALL)
        for graph in (False, True):
            found = bench.measure(Asked(MLP, rows, "answer", graph, 0.0))
            assert not found.error
            assert found.output == pytest.approx(expected, rel=1e-4, abs=1e-5)
            for how in ("forward", "pipeline"):
                measured = bench.measure(Asked(MLP, rows, how, graph, 0.01))
                assert not measured.error
                assert measured.rows_per_s > 0 or min(measured.h2d_us, measured.forward_us, measured.d2h_us) > 0
        assert bench.measure(Asked("none", 1, "forward", False, 0.0)).error  # which is told, and no more
        assert not bench.measure(Asked(MLP, 1, "forward", False, 0.0)).error


def test_small_networks_are_of_the_kind_of_those_that_are_measured() -> None:
    for name in (MLP, PICTURES, TEXTS, LOOKUP, HUNGRY, BALLAST):
        network = sized(SMALL)[name]
        rows = network.rows[-1]
        net = network.build().to(getattr(torch, network.dtype))
        with torch.inference_mode():
            output = net(*[torch.from_numpy(array) for array in network.example(rows).values()])
        assert output.shape == ((rows, *network.output) if network.batches else (1,))


def test_pictures_are_the_answers_of_resnet50() -> None:
    import resnet50
    from gpu_networks import Pictures

    stages = ((8, 1, 1), (8, 1, 2))
    torch.manual_seed(0)
    plain = resnet50.ResNet50(stages).eval()
    torch.manual_seed(0)
    pictures = Pictures(stages).eval()
    image = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.inference_mode():
        scaled = (image - pictures.mean) / pictures.deviation
        torch.testing.assert_close(pictures(image), plain(scaled))


@CAN_PRETEND
def test_memory_that_is_taken_away_on_a_pretended_device(tmp_path: Path) -> None:
    benchmarks.run("gpu.py", *TRIAL, "--parts", "memory", "--out", str(tmp_path))
    assert {name: check.ok for name, check in read(tmp_path).checks.items()} == {"memory": True, "memory back": True}


@CAN_PRETEND
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_everything_on_a_pretended_device(tmp_path: Path) -> None:
    others = ("tests", "memory", "resnet50")  # the first two have tests of their own, the last is as resnet50-64
    parts = [part for part in gpu.PARTS if part not in others]
    benchmarks.run("gpu.py", *TRIAL, "--parts", ",".join(parts), "--out", str(tmp_path), seconds=290)
    found = read(tmp_path)
    assert [(part.name, part.failure, part.left_out, part.notes) for part in found.parts] == [
        (part, "", [], []) for part in parts
    ]
    assert all(check.ok for check in found.checks.values())
    assert {name: [cell.rows for cell in speed.cells] for name, speed in found.speeds.items()} == {
        "resnet50-64": [2],
        "mlp": [1, 8],
        "minilm": [1, 2],
    }
    assert max(speed.difference for speed in found.speeds.values()) < 0.05
    assert len(found.switches) == 4
    text = (tmp_path / "gpu.md").read_text()
    unseen = [line.what for line in LINES if f"| {line.what} | {line.goal} | {NOT_RUN}" in text]
    assert len(unseen) == sum(line.part not in parts for line in LINES)
    assert "**PRETENDED" in text
