"""The runner and its command, with a stand-in for the process that measures: what is kept, passed over, tried again,
and what a stop leaves behind."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from solostep.benchmarks import bench, report_html, runner
from solostep.benchmarks import cell as cell_module
from solostep.benchmarks.matrix import Matrix, Options, build, weights_identity
from solostep.benchmarks.readme_tables import FULL, RESULTS, ROOT, results_in
from solostep.benchmarks.results import FAILED, read_result, read_results
from solostep.benchmarks.runner import Outcome, Runner, spec_of
from solostep.engine.errors import UsageError
from solostep.engine.progress import duration

pytestmark = pytest.mark.usefixtures("fast")

CELL = """
import json, os, pathlib, sys, time
out, work = pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[4])
spec = json.loads(pathlib.Path(sys.argv[1]).read_text())
assert sys.argv[3] == "--work"
cell, behave = spec["cell"], json.loads(pathlib.Path(os.environ["BEHAVE"]).read_text())
work.mkdir(exist_ok=True)
with (work / "runs").open("a") as stream:
    stream.write(cell["role"] + " " + cell["precision"] + " " + cell["device"] + "\\n")
with (work / "threads").open("a") as stream:
    stream.write(os.environ.get("OMP_NUM_THREADS", "all") + "\\n")
print("stage 1/2", file=sys.stderr, flush=True)
how = behave.get(cell["precision"] if cell["role"] == "mode" else cell["role"])
if how == "fail":
    print("the kernel is wrong on this card", file=sys.stderr)
    sys.exit(3)
if how == "die":
    os.kill(os.getpid(), 9)
if how == "wait":
    time.sleep(60)
if how == "meet":  # goes on once the other mode has begun, too
    late = time.monotonic() + 30
    while (work / "runs").read_text().count("mode") < 2:
        assert time.monotonic() < late
        time.sleep(0.01)
pairs = [{"prompt": p, "seed": s} for p in cell["prompts"] for s in cell["seeds"]]
row = [0.5] * cell["num_inference_steps"]
(out.parent / (spec["id"] + ".frames.npz")).write_bytes(b"frames of " + cell["precision"].encode())
out.write_text(json.dumps({
    "speed": {"step_seconds": [float("nan") if how == "nan" else 1.0], "first_step_seconds": 2.0, "stages": {},
              "video_seconds": 9.0, "frames_written": 17, "end_to_end": {}},
    "memory": {"gpu_peak_bytes": None, "host_peak_bytes": 10**9, "stages": []}, "plan": None, "events": [],
    "pairs": pairs, "score": None, "frames": {"file": spec["id"] + ".frames.npz", "index": [0]},
    "drift": None if cell["role"] == "reference" else {
        "teacher": {"sigmas": row, "error": [row] * len(pairs)}, "free": None, "blocks": None, "operators": None,
        "video": {"psnr": [None] * len(pairs)}},
}))
"""


class Said:
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def status(self, text: str) -> None:
        self.lines.append(text)


class Bed:
    """A folder, a matrix and a stand-in that behaves as told."""

    def __init__(self, place: Path, matrix: Matrix) -> None:
        self.folder, self.matrix, self.said = place / "results", matrix, Said()
        self.script, self.behaviour = place / "cell.py", place / "behave.json"
        self.script.write_text(CELL)
        self.behave()

    def behave(self, **how: str) -> None:
        self.behaviour.write_text(json.dumps(how))

    @property
    def command(self) -> tuple[str, ...]:
        return (sys.executable, "-S", str(self.script))

    def run(self, overwrite: bool = False) -> list[Outcome]:
        self.said = Said()
        return list(Runner(self.matrix, self.folder, self.said, overwrite, self.command, "solostep bench").run())

    def runs(self) -> list[str]:
        return (self.folder / "cache" / "runs").read_text().splitlines()

    def names(self) -> list[str]:
        return sorted(p.name for p in self.folder.iterdir() if not p.name.startswith(".") and p.name != "cache")


@pytest.fixture(scope="module")
def matrix(fast: None) -> Matrix:
    return build(Options(device="cpu", precision=("int8", "fp8"), n=1, steps=(2,), roles=("reference", "mode")))


@pytest.fixture
def bed(tmp_path: Path, matrix: Matrix, monkeypatch: pytest.MonkeyPatch) -> Bed:
    made = Bed(tmp_path, matrix)
    monkeypatch.setenv("BEHAVE", str(made.behaviour))
    return made


def status(outcomes: list[Outcome]) -> list[str]:
    return [o.status for o in outcomes]


def test_every_cell_gets_its_file(bed: Bed):
    outcomes = bed.run()
    assert status(outcomes) == ["done"] * 3
    assert bed.runs() == ["reference bf16 cpu", "mode int8 cpu", "mode fp8 cpu"]
    for outcome in outcomes:
        found = read_result(outcome.path)
        assert found.id == outcome.planned.id and found.cell == outcome.planned.cell
        assert found.label == outcome.planned.label and found.seconds > 0
        assert found.environment["command"] == "solostep bench" and found.environment["commit"]
        assert found.weights == weights_identity(bed.matrix.folder)
        assert found.frames is not None
        assert (bed.folder / found.frames["file"]).read_bytes() == b"frames of " + found.cell.precision.encode()
    assert len(bed.names()) == 6 and len(read_results([bed.folder])) == 3
    assert not list(bed.folder.glob(".running*"))
    assert any("2 videos" in note or "4 videos" in note for note in bed.said.notes)
    assert any("left in all" in note for note in bed.said.notes)  # from the second cell on
    assert any(line.endswith("stage 1/2") for line in bed.said.lines)


def test_jobs_run_beside_each_other_behind_the_reference(bed: Bed, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(runner.os, "cpu_count", lambda: 7)
    with pytest.raises(UsageError, match="leave speed out of --levels"):
        Runner(bed.matrix, bed.folder, Said(), jobs=2)
    bed.matrix = build(
        Options(
            device="cpu", precision=("int8", "fp8"), n=1, steps=(2,), roles=("reference", "mode"), levels=("teacher",)
        )
    )
    bed.behave(int8="meet", fp8="meet")
    run = Runner(bed.matrix, bed.folder, Said(), command=bed.command, jobs=2)
    outcomes = list(run.run())
    assert run.spent == pytest.approx(sum(outcome.seconds for outcome in outcomes))
    assert run.worked == sum(planned.work for planned in bed.matrix.planned)
    run.spent, run.worked = 30.0, 3.0  # ten seconds for each part of the work, and at most two cells at a time
    assert [run._left(12.0, cells) for cells in (1, 2, 3)] == [duration(120), duration(60), duration(60)]
    assert status(outcomes) == ["done"] * 3 and outcomes[0].planned.cell.role == "reference"
    assert bed.runs()[0] == "reference bf16 cpu" and len(read_results([bed.folder])) == 3
    assert (bed.folder / "cache" / "threads").read_text().split() == ["3"] * 3  # of 7 cores, two at a time


def test_a_recipe_takes_the_place_of_a_precision(tmp_path: Path, bed: Bed):
    planned = build(Options(device="cpu", recipe=("auto:0.02",), n=1, roles=("mode",))).planned
    assert [p.label for p in planned] == ["recipe auto:0.02"]
    told = spec_of(planned[0], "cpu")
    assert told["cell"]["recipe"] == "auto:0.02" and told["cell"]["precision"] is None and told["id"] == planned[0].id
    told = spec_of(bed.matrix.planned[1], "cuda:1")
    assert told["cell"]["precision"] == "int8" and told["cell"]["device"] == "cuda:1"


def test_a_card_s_rates_are_measured_unless_that_is_left_out(bed: Bed, monkeypatch: pytest.MonkeyPatch):
    """So that plans in results hold seconds; on a CPU plans have none."""
    on_card = replace(bed.matrix, device=torch.device("cuda"))
    assert not Runner(bed.matrix, bed.folder, Said()).rates
    assert Runner(on_card, bed.folder, Said()).rates and not Runner(on_card, bed.folder, Said(), rates=False).rates
    seen: list[bool] = []

    def timed_run(*arguments: Any) -> Any:
        seen.append(arguments[-1])
        raise UsageError("seen")

    monkeypatch.setattr(cell_module, "timed_run", timed_run)
    told = spec_of(bed.matrix.planned[1], "cpu") | {
        "cell": bed.matrix.planned[1].cell.as_dict() | {"levels": ["speed"]}
    }
    for more in ({}, {"rates": True}, {"rates": False}):
        spec = {k: v for k, v in told.items() if k != "rates"} | more
        with pytest.raises(UsageError, match="seen"):
            cell_module.measure(spec, bed.folder, lambda *_: None)
    assert seen == [True, True, False]


def test_what_is_finished_is_passed_over(bed: Bed, monkeypatch: pytest.MonkeyPatch):
    bed.run()
    before = {p: p.stat().st_mtime_ns for p in bed.folder.glob("*.json")}
    assert status(bed.run()) == ["skipped"] * 3 and len(bed.runs()) == 3
    assert sum("there already" in note for note in bed.said.notes) == 3
    victim = next(p for p in before if p.name.startswith("fp8"))
    victim.write_text(victim.read_text()[:-100])  # cut off by a full disk
    assert status(bed.run()) == ["skipped", "skipped", "done"]
    assert read_result(bed.run()[2].path).cell.precision == "fp8"

    other = runner.environment
    monkeypatch.setattr(runner, "environment", lambda *given: other(*given) | {"commit": "b", "host_memory_bytes": 1})
    assert status(bed.run()) == ["skipped"] * 3  # a commit is no other code, and some machines grow

    def elsewhere(*given: Any) -> dict[str, Any]:
        return other(*given) | {"torch": "another"}

    monkeypatch.setattr(runner, "environment", elsewhere)
    outcomes = bed.run()
    assert status(outcomes) == ["done"] * 3  # beside the others, which stay as they were
    assert all(p.exists() for p in before) and not {o.path for o in outcomes} & set(before)
    frames = [read_result(o.path).frames or {} for o in outcomes]
    assert all((bed.folder / f["file"]).exists() for f in frames)
    assert status(bed.run()) == ["skipped"] * 3


def test_what_is_unfinished_is_told_before_it_is_lost(bed: Bed, monkeypatch: pytest.MonkeyPatch):
    cells = bed.folder / "cache" / "cells"
    own = runner.code_identity()
    for name, code in ((bed.matrix.planned[1].id, own), ("0" * 16, "of before"), ("1" * 16, own)):
        (cells / name).mkdir(parents=True)
        (cells / name / "code.txt").write_text(code)
    assert bed.run()[1].status == "done"
    assert "begun by other code, torch or triton: 1." in bed.said.notes[0]
    assert "of other options or weights: 1. They stay" in bed.said.notes[1]
    assert [n for n in bed.said.notes if "goes on where it was" in n] == [n for n in bed.said.notes if "[2/3]" in n]
    shutil.rmtree(cells)
    bed.run(overwrite=True)
    assert not any("begun" in note or "Unfinished" in note for note in bed.said.notes)


def test_overwrite_measures_anew(bed: Bed):
    first = bed.run()
    again = bed.run(overwrite=True)
    assert status(again) == ["done"] * 3 and [o.path for o in again] == [o.path for o in first]
    assert len(bed.runs()) == 6 and len(bed.names()) == 6


@pytest.mark.parametrize(
    ("how", "words"),
    [("fail", "the kernel is wrong on this card"), ("die", "stage 1/2"), ("nan", "NaN is no number")],
)
def test_a_failed_cell_leaves_the_others(bed: Bed, how: str, words: str):
    bed.behave(int8=how)
    outcomes = bed.run()
    assert status(outcomes) == ["done", "failed", "done"] and words in outcomes[1].error
    kept = json.loads(outcomes[1].path.read_text())
    assert kept["cell"]["precision"] == "int8" and words in kept["error"] and "stage 1/2" in kept["output"][0]
    assert kept["environment"]["cpu"] and kept["exit_code"] == {"fail": 3, "die": -9, "nan": 0}[how]
    assert len(read_results([bed.folder])) == 2
    bed.behave()
    outcomes = bed.run()
    assert status(outcomes) == ["skipped", "done", "skipped"]
    assert not list(bed.folder.glob(f"*{FAILED}"))


def test_one_run_at_a_time(bed: Bed):
    first = Runner(bed.matrix, bed.folder, bed.said, command=bed.command).run()
    next(first)
    with pytest.raises(UsageError, match="running in"):
        bed.run()
    first.close()
    assert status(bed.run()) == ["skipped", "done", "done"]


def test_a_place_that_is_none(bed: Bed):
    bed.folder.write_text("")
    with pytest.raises(UsageError, match="is a file"):
        bed.run()


def test_disk_is_counted_before(bed: Bed, monkeypatch: pytest.MonkeyPatch):
    made = Runner(bed.matrix, bed.folder / "deep" / "er", bed.said)
    made.check_disk()
    monkeypatch.setattr(runner.shutil, "disk_usage", lambda place: SimpleNamespace(free=1000))
    with pytest.raises(UsageError, match=r"take [1-9][0-9.]+ [kM]B more .* and 1\.0 kB are free"):
        made.check_disk()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_keeps_what_is_done(bed: Bed, number: signal.Signals, monkeypatch: pytest.MonkeyPatch):
    bed.behave(int8="wait")

    sent: list[str] = []

    class Stopping(Said):
        def status(self, text: str) -> None:
            if "int8" in text and not sent:  # once: the cell's last words are lines as well
                sent.append(text)
                os.kill(os.getpid(), number)  # to the runner alone, as a batch system does

    started: list[subprocess.Popen[str]] = []
    popen = subprocess.Popen
    monkeypatch.setattr(runner.subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        list(Runner(bed.matrix, bed.folder, Stopping(), command=bed.command).run())
    assert len(started) >= 2 and all(p.returncode is not None for p in started)  # nobody measures on
    assert signal.getsignal(signal.SIGTERM) == before
    assert [r.role for r in read_results([bed.folder])] == ["reference"]
    assert not list(bed.folder.glob(".running*"))
    bed.behave()
    assert status(bed.run()) == ["skipped", "done", "done"]


RUN = """
import sys
from pathlib import Path
from solostep.benchmarks import runner
from solostep.benchmarks.bench import Shown
from solostep.benchmarks.matrix import Options, build
matrix = build(Options(
    device="cpu", model=sys.argv[3], precision=("int8", "fp8"), n=1, steps=(2,), roles=("mode",), levels=("teacher",)
))
list(runner.Runner(matrix, Path(sys.argv[1]), Shown(), command=(sys.executable, sys.argv[2]), jobs=2).run())
"""
SILENT = """
import os, time
from pathlib import Path
from solostep.benchmarks import cell

def measure(spec, work, *_, **more):
    mark = Path(work) / str(os.getpid())
    work.mkdir(exist_ok=True)
    mark.touch()
    try:
        time.sleep(600)
    except KeyboardInterrupt:
        mark.write_text("stopped")
        raise

cell.measure = measure
cell.main()
"""
TINY = Path(__file__).resolve().parents[1] / "golden" / "tiny-stepvideo-t2v"


def runs_on(pid: int) -> bool:
    """Whether a process is there, and is not only what is left of one that nobody waited for."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def until(true: Callable[[], bool], seconds: float = 120) -> bool:
    late = time.monotonic() + seconds
    while not (found := true()) and time.monotonic() < late:
        time.sleep(0.05)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="a signal of Linux")
def test_cells_end_with_a_runner_that_is_killed(tmp_path: Path):
    """They say nothing, so no broken pipe ends them; and they end as by Ctrl-C, which keeps what they have."""
    script, work = tmp_path / "silent.py", tmp_path / "results" / "cache"
    script.write_text(SILENT)
    call = [sys.executable, "-c", RUN, str(tmp_path / "results"), str(script), str(TINY)]
    pids: list[int] = []
    with subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            assert until(lambda: process.poll() is not None or len(list(work.glob("[0-9]*"))) == 2)
            pids = [int(mark.name) for mark in work.glob("[0-9]*")]
            assert len(pids) == 2 and all(map(runs_on, pids))
            process.kill()
            assert until(lambda: not any(map(runs_on, pids)), 30)
            assert [mark.read_text() for mark in work.glob("[0-9]*")] == ["stopped"] * 2
        finally:
            process.kill()
            for pid in filter(runs_on, pids):
                os.kill(pid, signal.SIGKILL)


@pytest.mark.skipif(sys.platform != "linux", reason="a signal of Linux")
def test_a_cell_whose_runner_is_gone_does_not_begin(tmp_path: Path):
    call = [sys.executable, "-m", "solostep.benchmarks.cell", "none.json", str(tmp_path / "a.json"), "--parent", "1"]
    done = subprocess.run(call, capture_output=True, text=True)
    assert done.returncode == 130 and "none.json" not in done.stderr


# --- the command --------------------------------------------------------------------------------------------------


@pytest.fixture
def call(bed: Bed, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runner, "CELL", bed.command)
    monkeypatch.setattr(bench, "write_report", lambda results, page, overwrite: page)
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/solostep", "bench", "--precision", "int8"])
    app = typer.Typer(pretty_exceptions_enable=False)
    bench.register(app)
    common = ["--device", "cpu", "-n", "1", "--steps", "2", "-o", str(bed.folder)]
    return lambda *arguments: CliRunner().invoke(app, [*common, *arguments], terminal_width=200)


def test_the_command(bed: Bed, call: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "200")
    result = call("--precision", "int8,fp8", "--precision", "int8", "--seeds", "1", "--dry-run")
    assert result.exit_code == 0 and "6 cells on cpu, 0 there already" in result.stdout and not bed.folder.exists()
    bed.behave(fp8="fail")
    result = call("--precision", "int8,fp8", "--seeds", "1")
    assert result.exit_code == 1 and "5 of 6 cells" in result.stdout and str(bed.folder) in result.stdout
    assert "fp8 · official failed: the kernel is wrong on this card" in result.stderr.replace("\n", " ")
    assert "report.html" in result.stdout and "equal" in result.stdout and " 50 " in result.stdout
    bed.behave()
    result = call("--precision", "int8,fp8", "--seeds", "1", "--json")
    rows = json.loads(result.stdout)
    assert result.exit_code == 0 and [row["status"] for row in rows] == ["skipped"] * 5 + ["done"]
    found = read_result(rows[-1]["file"])
    assert found.environment["command"] == "solostep bench --precision int8"  # without the place of the program
    assert found.cell.seeds == (1,)
    assert "6 there already" in call("--precision", "int8,fp8", "--seeds", "1", "--dry-run").stdout


def test_the_costs_are_those_that_were_recorded():
    """Seconds a step in the help, beside the results that are kept."""
    found = {}
    for result in results_in(ROOT / RESULTS / FULL):
        if result.speed and result.cell.num_frames == 204 and result.cell.vram is None:
            found[result.label] = statistics.median(result.speed["step_seconds"])
    if not found:
        pytest.skip("no results beside this code")
    told = [float(number) for number in re.findall(r"([0-9.]+) s\b", bench.COSTS)]
    weights = statistics.mean(s for label, s in found.items() if re.match("[a-z0-9]+-weight|nf4", label))
    assert told == pytest.approx([found["reference"], found["fp8 · int8 attention"], weights], rel=0.03)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--size", "96"], "--size 96 is no size"),
        (["--frames", "many"], "--frames has to be whole numbers"),
        (["--seeds", "0"], "--seeds has to be at least 1"),
        (["--seeds", "20260101"], "for the seed itself write 20260101, with a comma"),
        (["--precision", ""], "--precision is empty"),
        (["--host-ram", ","], "--host-ram is empty"),
        (["--precision", "int9"], "int9 is unknown"),
        (["--prompts", "none.txt"], "leave it out where --prompts gives others"),  # of -n, which stands before
        (["--quick", "--model", "t2v"], "--quick is of the demo model"),
        (["--rates"], "--rates measures a CUDA card"),
        (["--cell-timeout", "soon"], "--cell-timeout soon is no time"),
        (["--attention-backend", "nonsense"], "--attention-backend nonsense is unknown"),
    ],
)
def test_wrong_use_starts_nothing(bed: Bed, call: Any, arguments: list[str], words: str):
    result = call(*arguments)
    assert result.exit_code == 2 and words in result.stderr.replace("\n", " ") and not bed.folder.exists()


def test_options_as_they_are_given(tmp_path: Path):
    file = tmp_path / "prompts.txt"
    file.write_text("a red circle\n\n一个绿色的三角形\n")
    options = bench.read_options({
        "prompts": file, "seeds": "3", "vram": ["none,12GB", "24GB"], "size": ["96x64"], "frames": ["17,34"],
    })  # fmt: skip
    assert options.prompts == ("a red circle", "一个绿色的三角形") and options.seeds == (1, 2, 3)
    assert options.vram == (None, "12GB", "24GB") and options.size == ((96, 64),) and options.frames == (17, 34)
    assert bench.read_options({}).seeds == (1,) and bench.read_options({}).n == 8
    assert [bench._seconds("--t", text) for text in (None, "90", "1.5m", "2h")] == [None, 90, 90, 7200]
    assert bench.read_options({"seeds": "7,9"}).seeds == (7, 9) and bench.read_options({"seeds": "7,"}).seeds == (7,)
    with pytest.raises(UsageError, match=r"none\.txt cannot be read"):
        bench.read_options({"prompts": tmp_path / "none.txt"})
    file.write_text('{"prompt": "a", "seed": 3}\n')
    with pytest.raises(UsageError, match="line 1: only prompts"):
        bench.read_options({"prompts": file})


def test_a_cell_that_takes_too_long_is_stopped(bed: Bed):
    bed.behave(int8="wait")
    slow = Runner(bed.matrix, bed.folder, bed.said, command=bed.command, timeout=1.5)
    outcomes = list(slow.run())
    assert status(outcomes) == ["done", "failed", "done"]
    assert "longer than --cell-timeout (1.5 s)" in outcomes[1].error and "goes on with it" in outcomes[1].error
    state = bed.folder / "cache" / "cells" / outcomes[1].planned.id
    state.mkdir(parents=True)  # as a real cell leaves it
    bed.behave()
    assert status(bed.run()) == ["skipped", "done", "skipped"]
    assert not state.exists()  # the result has its place


def test_the_report_is_of_all_that_the_folder_holds(bed: Bed, capsys: Any):
    """Modes that an earlier run measured stay on the page; what cannot be read is named."""
    done = bed.run()
    page = bench.reported(bed.folder, done[-1:])
    assert page[0] == done[-1].path and sorted(page) == sorted(outcome.path for outcome in done)
    done[0].path.write_text('{"solostep_bench": 1, ')
    assert done[0].path not in bench.reported(bed.folder, done[-1:])
    assert f"Not in the report: {done[0].path}" in capsys.readouterr().err.replace("\n", " ")


def test_a_report_of_somebody_else_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    calls: list[Any] = []
    done = subprocess.CompletedProcess([], 0, "", "")
    monkeypatch.setattr(bench.subprocess, "run", lambda *a, **k: calls.append(a) or done)
    page = tmp_path / "report.html"
    page.write_text("<html>my notes</html>")
    assert bench.write_report([tmp_path / "a.json"], page) is None and not calls
    assert "stays as it is" in capsys.readouterr().err.replace("\n", " ")
    assert bench.write_report([tmp_path / "a.json"], page, overwrite=True) == page
    page.write_text(report_html.document("ours", ""))
    assert bench.write_report([tmp_path / "a.json"], page) == page and len(calls) == 2


def test_a_report_that_fails_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    assert bench.write_report([tmp_path / "a.json"], tmp_path / "report.html") is None
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: object())
    failed = subprocess.CompletedProcess([], 2, "", "warning\nno results there\n")
    monkeypatch.setattr(bench.subprocess, "run", lambda *a, **k: failed)
    assert bench.write_report([tmp_path / "a.json"], tmp_path / "report.html") is None
    assert "no results there" in capsys.readouterr().err.replace("\n", " ")
