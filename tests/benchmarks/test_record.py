"""The list of measurements: what runs, in which order, on which card, and what is done again."""

from __future__ import annotations

import itertools
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from solostep.benchmarks import record
from solostep.benchmarks.record import Job, Recording
from solostep.benchmarks.statistics import fewest
from solostep.engine.errors import UsageError


def job(name: str, code: str = "", seconds: float = 1.0, needs: tuple[str, ...] = ()) -> Job:
    told = f"import os, time; open(r'{{out}}/' + '{name}.ran', 'a').write(os.environ['CUDA_VISIBLE_DEVICES']); {code}"
    return Job(name, (sys.executable, "-S", "-c", told), seconds, needs)


def ran(out: Path) -> dict[str, str]:
    return {p.stem: p.read_text() for p in out.glob("*.ran")}


def test_what_is_there_is_passed_over_and_what_failed_is_tried_again(tmp_path: Path) -> None:
    jobs = [job("one"), job("two", "raise SystemExit(3)"), job("three")]
    assert not Recording(jobs, tmp_path, tmp_path / "model").run(["0"])
    assert ran(tmp_path) == {"one": "0", "two": "0", "three": "0"}
    jobs[1] = job("two")
    assert Recording(jobs, tmp_path, tmp_path / "model").run(["1"])
    assert ran(tmp_path) == {"one": "0", "two": "01", "three": "0"}
    assert "SystemExit" in (tmp_path / "logs" / "two.txt").read_text()


def test_a_model_is_there_or_not_whatever_a_mark_says(tmp_path: Path) -> None:
    jobs = [job("model"), job("speed", needs=("model",))]
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "model").touch()
    assert Recording(jobs, tmp_path, tmp_path / "model").run(["0"])
    assert sorted(ran(tmp_path)) == ["model", "speed"]
    (tmp_path / "model").mkdir()
    assert Recording(jobs, tmp_path, tmp_path / "model").run(["1"])
    assert ran(tmp_path)["model"] == "0"


def test_cards_share_the_list(tmp_path: Path) -> None:
    """The second card waits for what its measurement needs, and takes the last one meanwhile."""
    jobs = [job("model", "time.sleep(0.5)"), job("speed", needs=("model",)), job("other")]
    assert Recording(jobs, tmp_path, tmp_path / "model").run(["0", "7"])
    cards = ran(tmp_path)
    assert {cards["model"], cards["other"]} == {"0", "7"} and cards["speed"] in ("0", "7")


def test_what_needs_a_failed_one_does_not_begin(tmp_path: Path) -> None:
    jobs = [job("model", "raise SystemExit(1)"), job("speed", needs=("model",)), job("other")]
    assert not Recording(jobs, tmp_path, tmp_path / "model").run(["0", "1"])
    assert sorted(ran(tmp_path)) == ["model", "other"]


def test_nothing_begins_too_late(tmp_path: Path) -> None:
    jobs = [job("long", seconds=100), job("short", seconds=1)]
    assert not Recording(jobs, tmp_path, tmp_path / "model", seconds=50).run(["0"])
    assert sorted(ran(tmp_path)) == ["short"]


def test_a_limit_of_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Job, "limit", 1.0)
    start = time.monotonic()
    assert not Recording([job("hangs", "time.sleep(60)"), job("next")], tmp_path, tmp_path / "model").run(["0"])
    assert time.monotonic() - start < 30
    assert sorted(ran(tmp_path)) == ["hangs", "next"] and [p.name for p in (tmp_path / "done").iterdir()] == ["next"]


def test_what_goes_on_later_is_cut_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "LEAST", 1.0)
    long = job("long", "time.sleep(60)", seconds=1000)
    start = time.monotonic()
    assert not Recording([replace(long, resumes=True)], tmp_path, tmp_path / "model", seconds=2).run(["0"])
    assert 1 < time.monotonic() - start < 30
    assert sorted(ran(tmp_path)) == ["long"] and not list((tmp_path / "done").iterdir())


def test_two_cards_work_at_what_goes_on_later_and_are_cut_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each waits for the other to have begun, which a single card would never see, and then for longer than there is;
    the same list goes on with both."""
    monkeypatch.setattr(record, "LEAST", 1.0)

    def meeting(name: str, other: str) -> Job:
        waits = (
            f"place = r'{tmp_path}/'; "
            f"[time.sleep(0.01) for _ in range(3000) if not os.path.exists(place + '{other}.ran')]; "
            f"open(place + '{name}.met', 'w').close(); time.sleep(600)"
        )
        return replace(job(name, waits, seconds=1000), resumes=True)

    jobs = [meeting("one", "two"), meeting("two", "one")]
    start = time.monotonic()
    recording = Recording([*jobs, job("late", seconds=1000)], tmp_path, tmp_path / "model", seconds=8)
    assert not recording.run(["0", "1"])
    assert 7 < time.monotonic() - start < 60
    assert sorted(p.stem for p in tmp_path.glob("*.met")) == ["one", "two"]
    assert sorted(ran(tmp_path).values()) == ["0", "1"] and not list((tmp_path / "done").iterdir())
    assert [left.name for left in recording.waiting] == ["late"] and not recording.running
    ended = [replace(job(name, seconds=1000), resumes=True) for name in ("one", "two")]
    assert Recording(ended, tmp_path, tmp_path / "model", seconds=100).run(["0", "1"])


def of_program(name: str) -> list[Job]:
    return [made for made in record.JOBS if made.command[2] == f"solostep.benchmarks.{name}"]


def test_all_precisions_are_recorded_at_all_lengths_and_budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what `bench` makes of the commands, which are right as options; each of a folder of its own."""
    import typer
    from typer.testing import CliRunner

    from solostep.benchmarks import bench, matrix

    asked: list[matrix.Options] = []

    def build(options: matrix.Options) -> None:
        matrix.check_options(options)
        asked.append(options)
        raise UsageError("seen")

    monkeypatch.setattr(matrix, "build", build)
    app = typer.Typer()
    bench.register(app)
    jobs = of_program("bench")
    for made in jobs:
        assert "seen" in CliRunner().invoke(app, list(made.command[3:])).output
    assert len(asked) == len(jobs)
    cells = {
        (frames, precision, vram)
        for options in asked
        for frames, precision, vram in itertools.product(options.frames, options.precision, options.vram)
        if options.model is not None and "mode" in options.roles
    }
    precisions = ("bf16", "fp8", "int8", "int8-weight", "fp8-weight", "nf4", "int4-weight")
    assert cells >= set(itertools.product((204, 136, 102, 51), precisions, (None,)))
    assert cells >= set(itertools.product((204,), precisions, ("48GB", "24GB", "16GB", "12GB")))
    assert cells >= set(itertools.product((136, 102, 51), ("int8",), (None, "48GB", "24GB", "16GB", "12GB")))
    places = [made.command[made.command.index("-o") + 1] for made in (*jobs, *of_program("full_size"))]
    assert [p for p, n in Counter(places).items() if n > 1] == ["{out}/demo"]  # modes of one reference


def test_drift_is_of_all_modes() -> None:
    """Commands that full_size reads; every precision, and texts enough for an interval."""
    from solostep.benchmarks import full_size
    from solostep.benchmarks.lockstep import Mode

    read = {made.name: full_size.parser().parse_args(made.command[3:]) for made in of_program("full_size")}
    assert set(read) == {"drift-204", "drift-51", "drift-texts"}
    for name, args in read.items():
        assert args.command == "drift" and args.mode is None and str(args.output) == f"{{out}}/h200/{name}"
    assert read["drift-texts"].texts >= fewest()
    assert {Mode.parse(mode).precision for mode in full_size.MODES} == {
        "bf16", "int8", "fp8", "int8-weight", "fp8-weight", "nf4", "int4-weight"
    }  # fmt: skip


def test_every_command_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules that exist, needs that are in the list, names of their own."""
    import importlib.util

    names = [made.name for made in record.JOBS]
    assert len(set(names)) == len(names)
    for made in record.JOBS:
        assert made.command[:2] == (sys.executable, "-m") and importlib.util.find_spec(made.command[2])
        assert set(made.needs) <= set(names) and made.limit > made.seconds > 0


def test_whole_runs_are_of_budgets_that_have_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command is read by the program that it calls, and what it asks for is not refused by the plan."""
    from solostep.benchmarks import whole_pipeline
    from solostep.engine.asked import ask
    from solostep.engine.units import parse_size

    asked: list[tuple[str, dict[str, Any], dict[str, Any]]] = []
    monkeypatch.setattr(whole_pipeline, "cards", lambda: [])
    monkeypatch.setattr(whole_pipeline, "pick_device", lambda _: None)
    monkeypatch.setattr(whole_pipeline, "record", lambda *_: None)
    monkeypatch.setattr(
        whole_pipeline,
        "run",
        lambda _, vram, cards, decode, settings, **options: asked.append((vram, settings, options)),
    )
    for made in record.JOBS:
        if made.command[2] == "solostep.benchmarks.whole_pipeline":
            monkeypatch.setattr(sys, "argv", list(made.command[2:]))
            whole_pipeline.main()
    at_once = Counter((s["num_frames"], s["height"]) for _, s, _ in asked)
    assert at_once == {(17, 544): 3, (51, 544): 4, (204, 544): 11, (17, 272): 2}
    modes = {(options["precision"], options["text_precision"]) for _, _, options in asked}
    assert modes == {("fp8", "int8"), (None, None)}  # the last: as the folder is stored
    found = ask("t2v", "fp8", "int8", like="h200", converted=True)
    for vram, settings, options in asked:
        host = options["host_ram"]
        of_clip = replace(found, settings=replace(found.settings, **settings))
        plan = of_clip.plan(parse_size(vram, ""), host and parse_size(host, ""))
        assert (plan.blocks.resident == 48) == (vram in ("80GB", "48GB")) and (plan.blocks.disk > 40) == bool(host)
    assert [options["host_ram"] for _, _, options in asked if options["host_ram"]] == ["4GB"]


def test_names_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert record.main([str(tmp_path), "--only", "fifty", "--list"]) == 0
    told = capsys.readouterr().out
    assert "--steps 50" in told and [line.split()[0] for line in told.splitlines()] == [
        "model", "tests-attention", "fifty",
    ]  # fmt: skip
    assert record.main([str(tmp_path), "--only", "sixty"]) == 2
    assert "there is no such measurement" in capsys.readouterr().err
    with pytest.raises(UsageError, match="no such measurement"):
        record.chosen(["sixty"])
