"""Two sets of results compared: cells are matched, what is outside of noise is flagged, and nothing else is."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from solostep.benchmarks import report as command
from solostep.benchmarks.compare import compare, outside
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
    after["score"]["motion"] = [120, 192]
    found = compare(*two(tmp_path, [before], [after]))
    flags = outside(found.changes[0])
    assert flags == ["1.25× faster", "50 % more GPU memory", "12 % less host memory",
                     "teacher-forced error worse", "prompt following (motion) worse"]  # fmt: skip
    slower = outside(compare(tmp_path / "after", tmp_path / "before").changes[0])
    assert "1.25× slower" in slower and "teacher-forced error better" in slower


def test_small_changes_are_noise(tmp_path: Path):
    before, after = made.make_result(MODE), made.make_result(MODE, step=2.0 * 1.02, seed=0)
    for pair in after["drift"]["teacher"]["error"]:
        pair[:] = [1.01 * e for e in pair]
    found = compare(*two(tmp_path, [before], [after]))
    assert outside(found.changes[0]) == []
    assert outside(found.changes[0], margin=0.01) == ["1.02× slower"]


def test_few_prompts_are_never_flagged(tmp_path: Path):
    before, after = made.make_result(MODE, pairs=3), made.make_result(MODE, pairs=3)
    for pair in after["drift"]["teacher"]["error"]:
        pair[:] = [10 * e for e in pair]
    assert outside(compare(*two(tmp_path, [before], [after])).changes[0]) == []


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


def test_nothing_in_common(tmp_path: Path):
    a, b = two(tmp_path, [made.make_result(MODE)], [made.make_result(MODE, height=64)])
    with pytest.raises(UsageError, match="no cell in common"):
        compare(a, b)
    assert run("--compare", str(a), str(b)).exit_code == 2
    assert run("--compare", str(a)).exit_code == 2
    extra = run(str(a), "--compare", str(a), str(b))
    assert extra.exit_code == 2 and "two places" in extra.output
