"""Two sets of results compared: cells are matched, what is outside of noise is flagged, and nothing else is."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from solostep.benchmarks import report as command
from solostep.benchmarks.compare import as_page, compare, one_sided, outside, speed_margin, table, untold
from solostep.engine.errors import UsageError

_spec = importlib.util.spec_from_file_location("report_fixtures", Path(__file__).with_name("report_fixtures.py"))
assert _spec is not None and _spec.loader is not None
made: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(made)

MODE = "int8 · int8 attention"


def run(*arguments: str) -> Any:
    app = typer.Typer()
    command.register(app)
    return CliRunner().invoke(app, list(arguments))


def two(tmp_path: Path, before: list[dict[str, Any]], after: list[dict[str, Any]]) -> tuple[Path, Path]:
    made.write_results(tmp_path / "before", before)
    made.write_results(tmp_path / "after", after)
    return tmp_path / "before", tmp_path / "after"


def test_the_same_results_differ_in_nothing(tmp_path: Path):
    results = [made.make_result(name) for name in ("reference", MODE, "floor-order")]
    found = compare(*two(tmp_path, results, results))
    assert len(found.changes) == 3 and not found.missing and not found.new and not found.environment
    assert all(outside(change) == [] and change.speed in (1, None) for change in found.changes)


def test_what_changed_is_flagged(tmp_path: Path):
    before, after = made.make_result(MODE), made.make_result(MODE, step=1.6, memory=90e9)
    for pair in after["drift"]["teacher"]["error"]:
        pair[:] = [3 * e for e in pair]
    after["score"] = made.score(8, lost=(0, 1, 2, 3, 5, 6))
    found = compare(*two(tmp_path, [before], [after]))
    flags = outside(found.changes[0])
    assert flags == [
        "1.25× faster", "50 % more GPU memory", "12 % less host memory", "teacher-forced error worse (3.00×)",
        "prompt following (motion) worse", "prompt following (all) worse",
    ]  # fmt: skip
    assert untold(found.changes[0]) == []
    slower = outside(compare(tmp_path / "after", tmp_path / "before").changes[0])
    assert "1.25× slower" in slower and "teacher-forced error better (0.333×)" in slower


def test_changes_that_go_both_ways_are_noise(tmp_path: Path):
    """Roundings drawn anew move each error by 2 %, half of them up; a prompt or two is followed otherwise."""
    before, after = made.make_result(MODE, lost=(1,)), made.make_result(MODE, lost=(2, 3))
    for i, pair in enumerate(after["drift"]["teacher"]["error"]):
        pair[:] = [(1.02 if i % 2 else 0.98) * e for e in pair]
    found = compare(*two(tmp_path, [before], [after]))
    assert outside(found.changes[0]) == []


def test_a_small_change_of_every_pair_is_found(tmp_path: Path):
    """Five per cent, where prompts differ by a factor of three: the intervals of both overlap all but wholly."""
    before, after = made.make_result(MODE, hard=1.0), made.make_result(MODE, hard=1.0)
    for level in ("teacher", "free"):
        for pair in after["drift"][level]["error"]:
            pair[:] = [1.05 * e for e in pair]
    after["drift"]["video"]["psnr"] = [p - 0.5 for p in after["drift"]["video"]["psnr"]]
    after["drift"]["video"]["ssim"] = [s + 0.001 for s in after["drift"]["video"]["ssim"]]
    found = compare(*two(tmp_path, [before], [after]))
    assert outside(found.changes[0]) == [
        "teacher-forced error worse (+5 %)", "latents at the end worse (+5 %)", "PSNR worse (+5.9 % of the difference)",
        "SSIM better (by 0.0010)",
    ]  # fmt: skip


def test_flicker_is_ranked_by_its_size(tmp_path: Path):
    before, after = made.make_result(MODE), made.make_result(MODE)
    before["drift"]["video"]["flicker"], after["drift"]["video"]["flicker"] = [-0.001] * 8, [-0.5] * 8
    assert outside(compare(*two(tmp_path, [before], [after])).changes[0]) == ["flicker worse (by 0.4990)"]


def test_times_are_held_against_the_spread_of_steps(tmp_path: Path):
    def timed(steps: list[float]) -> dict[str, Any]:
        result = made.make_result(MODE, levels=("speed",))
        result["speed"]["step_seconds"] = steps
        return result

    unsteady = [2.0, 2.1, 1.9, 2.05, 1.95, 2.2, 1.8, 2.0]
    slower = [1.06 * s for s in unsteady]
    (change,) = compare(*two(tmp_path / "a", [timed(unsteady)], [timed(slower)])).changes
    assert outside(change) == [] and speed_margin(change.before, change.after) > 0.06 and untold(change) == []
    steady = [2.0 + 0.002 * (i % 3) for i in range(8)]
    (change,) = compare(*two(tmp_path / "b", [timed(steady)], [timed([1.02 * s for s in steady])])).changes
    assert outside(change) == ["1.02× slower"]
    found = compare(*two(tmp_path / "c", [timed(steady[:2])], [timed([1.2 * s for s in steady])]))
    (change,) = found.changes
    assert outside(change) == [] and speed_margin(change.before, change.after) is None
    (said,) = untold(change)
    assert said == "seconds a step: 2 timed, too few steps to tell; 6 show their spread"
    assert table(found).rows[0][1].text == "too few to tell"
    enough = compare(*two(tmp_path / "d", [timed(steady[:6])], [timed([1.2 * s for s in steady[:6]])])).changes
    assert outside(enough[0]) == ["1.20× slower"] and untold(enough[0]) == []


def test_too_few_prompts_are_said(tmp_path: Path):
    before, after = made.make_result(MODE, pairs=3), made.make_result(MODE, pairs=3)
    for pair in after["drift"]["teacher"]["error"]:
        pair[:] = [10 * e for e in pair]
    found = compare(*two(tmp_path, [before], [after]))
    assert outside(found.changes[0]) == []
    assert untold(found.changes[0]) == ["drift: 3 prompts, 6 make an interval"]
    (row,) = table(found).rows
    assert row[1].text == "too few to tell" and row[1].more == "drift: 3 prompts, 6 make an interval"
    assert "1 have too few prompts or steps" in as_page(found)


def test_what_one_side_lacks_is_no_agreement(tmp_path: Path):
    """A drift that is gone is said, and not that nothing changed; and equal numbers do not need six prompts."""
    before, after = made.make_result(MODE, pairs=3), made.make_result(MODE, pairs=3) | {"drift": None}
    found = compare(*two(tmp_path / "a", [before], [after]))
    (row,) = table(found).rows
    assert row[1].text == "not all measured" and "measured before only: teacher-forced error, latents" in row[1].more
    assert "seconds a step" not in row[1].more and "one side only" in as_page(found)
    same = compare(*two(tmp_path / "b", [before], [before]))
    assert one_sided(same.changes[0]) == [] and table(same).rows[0][1].text == "nothing"


def test_all_results_of_a_cell_count(tmp_path: Path):
    """A newer result with times alone does not hide the drift of an older one; and it is said."""
    before = made.make_result(MODE)
    timed = made.make_result(MODE, levels=("speed",), env=made.environment(date="2026-02-02"), step=3.0) | {
        "id": "f" * 16
    }
    before["weights"], after = "a" * 12, before | {"weights": "b" * 12}
    found = compare(*two(tmp_path, [before, timed], [after]))
    (change,) = found.changes
    assert "teacher" in change.before.drift and outside(change) == ["1.50× faster"]
    assert [line for line in found.repeated if "2 results before" in line and "f" * 16 in line]
    assert ("weights of demo", "a" * 12, "b" * 12) in found.environment
    timed["environment"] = made.environment("Another card", date="2026-02-02")
    (change,) = compare(*two(tmp_path / "cards", [before, timed], [after])).changes
    assert change.before.step == pytest.approx(1.8, rel=0.05) and not change.before.drift  # not one of two cards


def test_cells_and_environments_that_differ_are_said(tmp_path: Path):
    """Through the command: the model's folder may lie elsewhere, levels may differ, other settings are other cells."""
    other = made.environment("Testcard 1", torch="2.14.0", date="2027-01-01")
    a, b = two(
        tmp_path,
        [made.make_result(MODE, model="x/m"), made.make_result("nf4 · bf16 attention", model="x/m")],
        [made.make_result(MODE, model="y/z/m", levels=("speed", "teacher"), env=other),
         made.make_result(MODE, model="y/z/m", vram="8GB", env=other)],
    )  # fmt: skip
    output = tmp_path / "c.html"
    done = run("--compare", str(a), str(b), "-o", str(output), "--markdown", str(tmp_path / "c.md"))
    assert done.exit_code == 0, done.output
    assert done.stdout == (tmp_path / "c.md").read_text(encoding="utf-8")
    words = " ".join(done.stdout.split())
    assert "| card | Testcard 9000 | Testcard 1 |" in words and "| torch | 2.13.0 | 2.14.0 |" in words
    assert words.index("environments differ") < words.index("| mode |")
    assert "| teacher-forced error: before | teacher-forced error: after |" in words
    assert len({len(line) for line in done.stdout.splitlines() if line.startswith("| mode") or "int8" in line[:9]}) == 1
    assert "Missing after: nf4" in done.stdout and "New after: int8 · int8 attention · 8GB" in done.stdout
    assert "2026" not in done.stdout  # dates always differ
    page = output.read_text(encoding="utf-8")
    assert "The environments differ" in page and "Testcard 1" in page and "http" not in page
    again = run("--compare", str(a), str(b), "-o", str(output))
    assert again.exit_code == 2 and "--overwrite" in again.output


def test_how_many_were_tested_is_said(tmp_path: Path):
    """Each at 95 %, so some are flagged by chance; of equal results none is tested."""
    before, after = ([made.make_result(MODE, seed=seed, levels=("teacher", "free"))] for seed in (0, 1))
    notes = " ".join(table(compare(*two(tmp_path, before, after))).footnotes)
    assert "2 drifts are not the same before and after" in notes and "one in twenty" in notes
    assert "twenty" not in " ".join(table(compare(*two(tmp_path / "equal", before, before))).footnotes)


@pytest.mark.parametrize(("before", "after", "flags"), [
    (732e6, 684e6, []), (684e6, 800e6, ["17 % more host memory"]), (22.0e9, 22.2e9, []),
])  # fmt: skip
def test_host_memory_is_never_the_same_twice(tmp_path: Path, before: float, after: float, flags: list[str]):
    sets = []
    for peak in (before, after):
        result = made.make_result(MODE, levels=("speed",))
        result["memory"]["host_peak_bytes"] = int(peak)
        sets.append([result])
    (change,) = compare(*two(tmp_path, *sets)).changes
    assert outside(change) == flags


def test_a_title_is_of_a_report(tmp_path: Path):
    made.write_results(tmp_path / "a", [made.make_result("reference")])
    done = run("--compare", str(tmp_path / "a"), str(tmp_path / "a"), "--title", "mine")
    assert done.exit_code == 2 and "--title is of a report" in done.output


def test_nothing_in_common(tmp_path: Path):
    a, b = two(tmp_path, [made.make_result(MODE)], [made.make_result(MODE, height=64)])
    with pytest.raises(UsageError, match="no cell in common.*their first are"):
        compare(a, b)
    few, many = two(tmp_path / "prompts", [made.make_result(MODE, pairs=4)], [made.make_result(MODE, time_shift=5.0)])
    with pytest.raises(UsageError, match="is in both, but with other time shift and prompts"):
        compare(few, many)
    assert run("--compare", str(a), str(b)).exit_code == 2
    assert run("--compare", str(a)).exit_code == 2
    extra = run(str(a), "--compare", str(a), str(b))
    assert extra.exit_code == 2 and "two places" in extra.output
