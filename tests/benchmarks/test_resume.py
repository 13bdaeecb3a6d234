"""A cell that is stopped, at a step, in the decoding or between two pairs, goes on there: nothing is measured twice,
the numbers are those of a run that was left alone, and the time is told as what it is."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from solostep.benchmarks import cell as cell_module
from solostep.benchmarks import cell_speed, cell_state
from solostep.benchmarks import reference as reference_module
from solostep.benchmarks.cell import main, measure
from solostep.benchmarks.cell_speed import Kept, Part, Timed
from solostep.benchmarks.reference import CODE, FOLDER, PART, Recorder, held, kept_latents, record_run, run_once
from solostep.benchmarks.reference_code import APART, ROOT, official_code, official_files
from solostep.engine.errors import SolostepError, UsageError
from solostep.engine.pipeline import StepVideoPipeline

TINY = Path(__file__).parents[1] / "golden" / "tiny-stepvideo-t2v"
STEPS = 3
CELL: dict[str, Any] = {
    "model": str(TINY), "prompts": ["a red panda"], "seeds": [1], "device": "cpu", "num_frames": 1, "height": 32,
    "width": 32, "num_inference_steps": STEPS, "role": "mode", "precision": "int8",
}  # fmt: skip

pytestmark = pytest.mark.usefixtures("fast")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOLOSTEP_CACHE", str(folder / "cache"))
        yield folder


def stopping(*places: tuple[str, int]) -> Callable[[str, int, int], None]:
    """Progress that is interrupted at the first of these, each time it is called with it."""

    def say(what: str, done: int, total: int) -> None:
        said.append((what, done))
        if (what, done) in places:
            raise KeyboardInterrupt

    said: list[tuple[str, int]] = []
    say.said = said  # type: ignore[attr-defined]
    return say


def measured(work: Path, levels: list[str], say: Any = None, **changes: Any) -> dict[str, Any]:
    return measure({"cell": CELL | {"levels": levels} | changes, "write": "count"}, work, say or stopping())


def states(work: Path) -> list[Path]:
    return [p for p in (work / cell_state.CELLS).glob("*") if p.is_dir()]


# --- the timed run ------------------------------------------------------------------------------------------------


def test_a_timed_run_goes_on_at_its_step_and_in_its_decoding(work: Path) -> None:
    for where in (("speed: denoise", 1), ("speed: decode", 0)):
        with pytest.raises(KeyboardInterrupt):
            measured(work, ["speed", "free"], stopping(where), precision="bf16")
        assert len(states(work)) == 1
    say = stopping()
    result = measured(work, ["speed", "free"], say, precision="bf16")
    assert not states(work)  # the result is whole
    assert not any(what.startswith(("speed: denoise", "speed: load", "free run")) for what, _ in say.said)
    speed = result["speed"]
    assert speed["resumed"] == [1, 2, 0] and len(speed["resumed_first_step_seconds"]) == 1
    assert len(speed["step_seconds"]) == 1 and speed["end_to_end"]["50"]["extrapolated"]
    steps = speed["first_step_seconds"] + sum(speed["step_seconds"]) + sum(speed["resumed_first_step_seconds"])
    assert speed["stages"]["denoise"] == pytest.approx(steps)
    assert set(speed["stages"]) >= {"text", "load transformer", "denoise", "load vae", "decode and write"}
    assert sum(speed["stages"].values()) <= speed["video_seconds"] + 1e-2
    assert "1 + 2 + 0 steps in 3 processes" in result["events"][0] and "was not kept" in result["events"][1]
    assert [part["steps"] for part in speed["processes"]] == [1, 2, 0]  # and each says when and on what it ran
    assert all(set(cell_speed.WHERE) < set(part) and part["date"] and part["cpu"] for part in speed["processes"])
    assert result["memory"]["host_peak_bytes"] >= max(p["host_peak_bytes"] or 0 for p in speed["processes"])
    assert result["drift"]["free"]["error"] == [[0.0] * STEPS]  # the reference, left alone, makes the same latents


def test_times_and_latents_are_of_the_same_steps(work: Path, tmp_path: Path) -> None:
    """A process that ends between the pipeline's file and its own makes that step again."""
    pipe = StepVideoPipeline.from_pretrained(TINY, "bf16", "cpu", cache=False)
    request = pipe.request("a red panda", seed=1, num_frames=1, height=32, width=32, num_inference_steps=STEPS)
    run = tmp_path / "run.latents.safetensors"
    kept = Kept(tmp_path, run)

    def stop_at(last: int, keep: bool) -> None:
        def callback(pipe: Any, step: int, sigma: float, state: dict[str, Any]) -> None:
            if keep or step + 1 < last:
                kept.step(Part(steps=[float(n) for n in range(step + 1)]))
            if step + 1 == last:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run_once(pipe, request, run, callback, resume=True)

    stop_at(2, keep=False)
    assert kept_latents(run).step == 2  # type: ignore[union-attr]
    there = Kept(tmp_path, run)
    assert there.done == 1 and kept_latents(run).step == 1  # type: ignore[union-attr]
    kept.step(Part(steps=[0.0, 1.0]))  # times of a step whose latents could not be written
    assert Kept(tmp_path, run).done == 1
    run.unlink()
    again = Kept(tmp_path, run)
    assert again.done == 0 and not list(tmp_path.iterdir())


def test_the_seconds_of_an_interrupted_run() -> None:
    """Two processes of 50 steps: 40 s of loading and 30 steps of 2 s, the first 7; then 50 s of loading, 20 steps of
    2 s, the first 6, 9 s of decoding, of which recording takes 1 of the steps and 2 of the frames."""
    peaks = {"gpu_peak_bytes": 5, "host_peak_bytes": 9, "driver_peak_bytes": 7}
    first = Part(40.0, [7.0] + [2.0] * 29, samples=[(1200.0, 600.0, 50.0)], **peaks)
    second = Part(50.0, [6.0] + [2.0] * 19, samples=[(1400.0, 650.0, 60.0), (1500.0, None, 61.0)])
    stages = [
        {"stage": name, "seconds": seconds, "gpu_peak_bytes": 4, "host_peak_bytes": 3}
        for name, seconds in (("load transformer", 50.0), ("denoise", 45.0), ("decode and write", 9.0))
    ]
    told: dict[str, Any] = {"plan": {"a": 1}, "events": ["x"]}
    made = Timed(104.0, [first, second], stages, (1.0, 2.0), 17, True, told, driver=6).result()
    speed = made["speed"]
    assert speed["video_seconds"] == 104 - 3 + 65 and speed["resumed_load_seconds"] == 40
    assert speed["end_to_end"]["50"] == {"seconds": 166.0, "extrapolated": False}
    assert speed["end_to_end"]["15"] == {"seconds": 166 - 109 + 7 + 14 * 2.0, "extrapolated": True}
    assert speed["stages"] == {"load transformer": 50.0, "denoise": 44.0 + 65, "decode and write": 7.0}
    assert speed["resumed"] == [30, 20] and speed["resumed_first_step_seconds"] == [6.0]
    assert speed["step_seconds"] == [2.0] * 48 and speed["first_step_seconds"] == 7
    assert speed["clocks"] == {
        "sm_mhz": 1400, "sm_mhz_least": 1200, "power_w": 625, "temperature_c": 61, "samples": 3
    }  # fmt: skip
    memory = made["memory"]
    assert (memory["gpu_peak_bytes"], memory["host_peak_bytes"], memory["driver_peak_bytes"]) == (5, 9, 7)
    assert made["plan"] == {"a": 1} and made["events"][-1] == "x" and "40.0 s of loading" in made["events"][0]
    # A third process finds all steps done: it decodes, and has loaded nothing for them.
    decoded = Timed(12.0, [first, second, Part()], stages[2:], (0.0, 0.0), 17, True, told, driver=6).result()
    assert decoded["speed"]["video_seconds"] == 12 + 50 + 65 + 44
    assert decoded["speed"]["stages"] == {
        cell_speed.BEFORE: 50.0, "denoise": 109.0, "decode and write": 9.0
    }  # fmt: skip
    assert decoded["memory"]["driver_peak_bytes"] is None  # the second process has not told it


def test_processes_that_were_not_alike_are_told() -> None:
    """Other commits of the same code, and other kernels, which are chosen anew on each machine."""
    where = {"date": "2026-01-01", "commit": "a", "driver": "580", "attention_backend": "hopper"}
    parts = [Part(1.0, [1.0], where=where), Part(1.0, [1.0]), Part(1.0, [1.0], where=where | {"date": "2026-01-02"})]
    stages = [{"stage": "denoise", "seconds": 1.0, "gpu_peak_bytes": None, "host_peak_bytes": None}]

    def events(*parts: Part) -> list[str]:
        return Timed(3.0, list(parts), stages, (0.0, 0.0), 17, True, {"plan": None, "events": []}).result()["events"]

    assert len(events(*parts)) == 2  # that it was interrupted, and what was not kept; dates are never the same
    parts[2].where |= {"commit": "b", "attention_backend": "triton"}
    assert events(*parts)[2:] == [
        "Its processes differ in commit: a, then b, with the same computing code.",
        "Its processes differ in attention backend: hopper, then triton.",
    ]


# --- references and drift -----------------------------------------------------------------------------------------


def test_a_reference_goes_on_after_its_last_step(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"role": "reference", "precision": "bf16", "prompts": ["a green fish"]}
    before = set((work / FOLDER).glob("*"))
    steps: list[int] = []
    step = Recorder.step

    def recorded(self: Any, number: int, latents: torch.Tensor) -> None:
        if number == 2 and 2 not in steps:
            steps.append(number)
            raise KeyboardInterrupt  # the pipeline has put it on disk, and the recording has not
        steps.append(number)
        step(self, number, latents)

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "step", recorded)
        with pytest.raises(KeyboardInterrupt):
            measured(work, ["free"], **changes)
        assert not [p for p in set((work / FOLDER).glob("*")) - before if not p.name.startswith(".")]
        steps.append(-1)
        measured(work, ["free"], **changes)
    assert steps == [0, 1, 2, -1, 2, 0, 3]
    (made,) = (p for p in set((work / FOLDER).glob("*")) - before if not p.name.startswith("."))
    assert sorted(p.name for p in made.iterdir()) == ["identity.json", "latents"]
    drift = measured(work, ["free"], precision="bf16", prompts=["a green fish"])["drift"]
    assert drift["free"]["error"] == [[0.0] * STEPS]  # as one that was left alone
    (made / "latents" / "00001.safetensors").unlink()
    measured(work, ["free"], **changes)  # a part is missing: made again
    assert (made / "latents" / "00001.safetensors").exists()


def test_what_nobody_can_go_on_with_is_removed(work: Path) -> None:
    for root, pattern in ((work / FOLDER, f".x{PART}"), (work / cell_state.CELLS, "x")):
        dead, alive, own = (root / pattern.replace("x", name) for name in ("dead", "alive", "own"))
        for folder, code in ((dead, "of before"), (alive, "of before"), (own, "of now")):
            folder.mkdir(parents=True)
            (folder / CODE).write_text(code)
        with held(alive):
            reference_module.sweep(root, pattern.replace("x", "*"), "of now")
        assert not dead.exists() and alive.exists() and own.exists()


def test_a_teacher_forced_run_goes_on_and_a_finished_pair_is_not_repeated(work: Path) -> None:
    two = {"seeds": [1, 2], "precision": "fp8"}
    with pytest.raises(KeyboardInterrupt):
        measured(work, ["teacher"], stopping(("teacher-forced run 2 of 2: denoise", 2)), **two)
    say = stopping()
    result = measured(work, ["teacher"], say, **two)
    done = [(what, n) for what, n in say.said if what.endswith(": denoise")]
    assert done == [("teacher-forced run 2 of 2: denoise", n) for n in (2, 3)]
    assert result["drift"] == measured(work, ["teacher"], **two)["drift"]
    assert all(e > 0 for row in result["drift"]["teacher"]["error"] for e in row)


def test_another_cell_or_code_begins_anew(tmp_path: Path) -> None:
    one = {"code": "a", "cell": {"seeds": [1]}}
    made: list[int] = []

    def anew() -> list[str]:
        return cell_state.State(tmp_path / "cells" / "mine").began_anew

    def begun(identity: dict[str, Any]) -> list[int]:
        with cell_state.opened(tmp_path, "mine", identity) as state:
            with pytest.raises(UsageError, match="Another process is measuring this cell"):
                cell_state.opened(tmp_path, "mine", identity).__enter__()
            (state.place("free-0") / "latents").write_text("large")
            made.append(len(made))
            return state.once("free-0", lambda: {"error": [made[-1]]})["error"]

    assert begun(one) == begun(one) == [0] and not (tmp_path / "cells" / "mine" / "free-0").exists()
    assert anew() == [] and cell_state.unfinished(tmp_path, "a") == (["mine"], [])
    assert begun(one | {"cell": {"seeds": [2]}}) == [2]
    assert anew() == ["cell"]
    (tmp_path / "cells" / "mine" / "free-0.json").write_text('{"error": [')  # cut off by a full disk
    assert begun(one | {"cell": {"seeds": [2]}}) == [3]
    assert anew() == ["cell"]  # until its result is there, however many processes that takes
    assert cell_state.unfinished(tmp_path, "b") == ([], ["mine"])
    assert begun(one | {"code": "b"}) == [4] and cell_state.unfinished(tmp_path, "b") == (["mine"], [])
    with pytest.raises(SolostepError, match=r"blocks\.error\[0\] is nan"):
        with cell_state.opened(tmp_path, "mine", one) as state:
            state.once("blocks", lambda: {"error": [float("nan")]})


def test_a_stopped_command_says_so_and_goes_on(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec, out = tmp_path / "spec.json", tmp_path / "out.json"
    spec.write_text(json.dumps({"cell": CELL | {"levels": ["speed"]}, "state": "mine", "write": "count"}))
    arguments = [str(spec), str(out), "--work", str(work)]
    before = signal.getsignal(signal.SIGTERM)

    class Terminating(cell_module.Lines):
        def __call__(self, what: str, done: int, total: int) -> None:
            if (what, done) == ("speed: denoise", 2):
                os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(cell_module, "Lines", Terminating)
        with pytest.raises(SystemExit, match="130"):
            main(arguments)
    assert "goes on with it" in capsys.readouterr().err and signal.getsignal(signal.SIGTERM) == before
    assert not out.exists()
    main(arguments)
    speed = json.loads(out.read_text())["speed"]
    assert speed["resumed"] == [2, 1] and speed["frames_written"] == 1
    assert [p.name for p in states(work)] == ["mine"]  # removed by who named it, once the result has its place
    cell_state.remove(work, "mine")


# --- the code of a reference --------------------------------------------------------------------------------------


def test_a_reference_runs_only_code_that_it_is_known_by(work: Path) -> None:
    pipe = StepVideoPipeline.from_pretrained(TINY, "bf16", "cpu", cache=False, vram="8GB")
    request = pipe.request("a red panda", seed=1, num_frames=1, height=32, width=32, num_inference_steps=1)
    recorder = Recorder(work / "profiled", request.settings)
    ran: set[str] = set()
    sys.setprofile(lambda frame, event, argument: ran.add(frame.f_code.co_filename))
    try:
        record_run(pipe, request, recorder)
    finally:
        sys.setprofile(None)
    recorder.finished()
    ours = {Path(name).resolve() for name in ran if name.endswith(".py")}
    folders = "engine", "kernels", "offload", "quant"  # an environment may lie in the checkout, too
    ours = {p for p in ours if p.is_relative_to(ROOT) and p.relative_to(ROOT).parts[0] in folders}
    known = set(official_files())
    assert ours <= known and {ROOT / "engine/runtime.py", ROOT / "engine/models/transformer.py"} <= ours
    names = {p.relative_to(ROOT).as_posix() for p in known}
    assert names >= {"kernels/attention_causal.py", "engine/models/fused.py", "engine/weights.py", "quant/formats.py"}
    assert all((ROOT / name).is_file() for name in APART) and not names & set(APART)


def test_imports_are_followed_wherever_they_stand(tmp_path: Path) -> None:
    files = {
        "engine/pipeline.py": "from . import stages as s\nfrom ..kernels.fast import f\nfrom .rates import rate\n",
        "engine/stages.py": "def run():\n    from solostep.quant import formats\n    import torch\n",
        "engine/rates.py": "from .apart import x\n", "engine/apart.py": "", "engine/other.py": "",
        "kernels/fast.py": "import solostep.kernels.inner\n", "kernels/inner.py": "a = 1\n", "quant/formats.py": "",
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    found = [p.relative_to(tmp_path).as_posix() for p in official_files(tmp_path)]
    assert found == [
        "engine/pipeline.py", "engine/stages.py", "kernels/fast.py", "kernels/inner.py", "quant/formats.py"
    ]  # fmt: skip
    code = official_code.__wrapped__
    before = code(tmp_path)
    (tmp_path / "engine" / "other.py").write_text("b = 1\n")
    assert code(tmp_path) == before
    (tmp_path / "kernels" / "inner.py").write_text("a = 2\n")
    assert code(tmp_path) != before
