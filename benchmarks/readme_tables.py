"""Tables of README.md and benchmarks/README.md that are made from the results under benchmarks/results/, never typed.

    python -m solostep.benchmarks.readme_tables            # brings every region up to date
    python -m solostep.benchmarks.readme_tables --check    # exit code 1 where one is not, or the page of results is not

A region is what stands between `<!-- table: NAME -->` and `<!-- /table -->`; NAME is one of `choice` (the mode to take
first, in budgets), `modes` (the full size on one card), `budgets` (the same, in memory budgets), `texts` (its drift
over several texts), `drift` (the demo model), and those of readme_lines.py: `block`, `attention`, `decoding`, `memory`.
What was not measured is a dash.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from solostep.benchmarks.readme_lines import attention_table, block_table, decoding_table, memory_table
from solostep.benchmarks.report_data import Group, Row, make_groups, model_name, results_of, row_of
from solostep.benchmarks.report_markdown import plain, table
from solostep.benchmarks.report_measures import MISSING, cell_text, gigabytes, number
from solostep.benchmarks.report_origins import facts, mixed
from solostep.benchmarks.report_tables import (
    RESUMED,
    Cell,
    Table,
    budget_sizes,
    environment_lines,
    gigabytes_of,
    mode_text,
    run_title,
    summary,
    text_precisions,
    times_cell,
    whole_video,
)
from solostep.benchmarks.results import Result, read_results, results_below
from solostep.benchmarks.statistics import fewest
from solostep.engine.errors import SolostepError, UsageError, first_line
from solostep.engine.files import replacing

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path("benchmarks/results")
PAGE = RESULTS / "report.html"
PAGES = ("README.md", "benchmarks/README.md")
"""What holds the tables."""
FULL, DEMO = "h200", "demo"
FULL_FRAMES = 204
CHOICE = ("int8", "int8")
"""Precision and attention of the mode to take first."""
TIMES = ("†", "‡", "Step-LLM in ")
"""How the footnotes of times begin, which a table of drift has no use for."""
REGION = re.compile(r"(<!-- table: ([\w-]+) -->\n)(.*?)(<!-- /table -->)", re.DOTALL)
OPENING = re.compile(r"<!-- table: ([\w-]+) -->")


def results_in(folder: Path) -> list[Result]:
    """The results of a folder and those below it; none where it does not exist, or has none."""
    return read_results(results_below(folder))


# --- the tables ---------------------------------------------------------------------------------------------------


def modes_table(root: Path) -> list[str]:
    """Modes at the full size: seconds, whole videos, memory, teacher-forced error."""
    results = [r for r in results_in(root / RESULTS / FULL) if r.cell.num_frames == FULL_FRAMES]
    if not results:
        raise UsageError(f"{RESULTS / FULL} has no result of {FULL_FRAMES} frames, which the table modes is made from.")
    lines: list[str] = []
    for group in make_groups(results):
        rows = [
            [
                Cell(r.name),
                Cell(number(r.step)),
                whole_video(r, "50"),
                whole_video(r, "15"),
                Cell(gigabytes(r.gpu)),
                Cell(gigabytes(r.host)),
                Cell(cell_text("teacher", r.drift)),
            ]
            for r in group.rows
        ]
        heads = [
            "mode",
            "seconds a step",
            "50 steps",
            "15 steps (Turbo)",
            "GPU peak (torch)",
            "host peak",
            "teacher-forced error",
        ]
        lines += _titled(
            group, Table("modes", "", [("", h) for h in heads], rows, _marks(group), summary(group).footnotes)
        )
    return lines


def drift_table(root: Path) -> list[str]:
    """The demo model: drift of every mode beside the floor, and whether it follows its prompts."""
    results = results_in(root / RESULTS / DEMO)
    groups = [group for group in make_groups(results) if group.measured] if results else []
    if not groups:
        raise UsageError(f"{RESULTS / DEMO} has no result with a drift, which the table drift is made from.")
    lines: list[str] = []
    for group in groups:
        rows = [
            [
                Cell(r.name),
                Cell(cell_text("teacher", r.drift)),
                Cell(cell_text("free", r.drift)),
                Cell(cell_text("psnr", r.drift)),
                Cell(_followed(r)),
                Cell(_verdict(r)),
                times_cell(r.verdict),
            ]
            for r in group.rows
            if r.role != "reference" or r.score
        ]
        heads = [
            "mode",
            "teacher-forced error",
            "latents at the end",
            "PSNR of the video",
            "prompts followed",
            "verdict",
            "times the floor",
        ]
        marks = ["" if r.role == "mode" else "floor" for r in group.rows if r.role != "reference" or r.score]
        lines += _titled(
            group,
            Table(
                "drift",
                "",
                [("", h) for h in heads],
                rows,
                marks,
                [n for n in summary(group).footnotes if not n.startswith(TIMES)],
            ),
        )
    return lines


def texts_table(root: Path) -> list[str]:
    """The real shape over enough prompts for an interval: the error of one step, and times the floor."""
    groups = [g for g in make_groups(results_in(root / RESULTS / FULL)) if g.measured and g.prompts >= fewest()]
    if not groups:
        raise UsageError(f"{RESULTS / FULL} has no drift of {fewest()} prompts, which the table texts is made from.")
    lines: list[str] = []
    for group in groups:
        drifted = [row for row in group.rows if row.drift]
        order = sorted(drifted, key=lambda r: (r.role == "mode", (r.verdict and r.verdict.ratio) or 0.0, r.name))
        rows = [[Cell(r.name), Cell(cell_text("teacher", r.drift)), times_cell(r.verdict)] for r in order]
        marks = ["" if r.role == "mode" else "floor" for r in order]
        notes = [n for n in summary(group).footnotes if not n.startswith(TIMES)]
        heads = [("", head) for head in ("mode", "teacher-forced error", "times the floor")]
        lines += _titled(group, Table("texts", "", heads, rows, marks, notes))
    return lines


def budgets_table(root: Path) -> list[str]:
    """The full size in memory budgets and clip lengths: a row for each mode and length, a column for each budget."""
    results = [r for r in results_in(root / RESULTS / FULL) if r.speed and r.role == "mode"]
    if not any(r.cell.vram for r in results):
        raise UsageError(f"{RESULTS / FULL} has no result with a --vram budget, which the table budgets is made from.")
    results.sort(key=lambda r: str(r.environment.get("date")))  # of two measurements of one cell, the later
    columns = _from_large_to_small({_budget(r) for r in results})
    named: dict[tuple[str, int], dict[Budget, Result]] = {}
    for result in results:
        named.setdefault((mode_text(result), result.cell.num_frames), {})[_budget(result)] = result
    order = sorted(named, key=lambda name: (name[0], -name[1]))
    shown = [result for name in order for result in named[name].values()]
    rows = [
        [Cell(mode), Cell(str(frames)), *(_step_and_peaks(named[mode, frames].get(column)) for column in columns)]
        for mode, frames in order
    ]
    heads = ["mode", "frames", *(_budget_text(column, "`--vram {}`", "`--host-ram {}`") for column in columns)]
    told = [(run_title(result), row_of([result])) for result in shown]
    notes = [STEP_AND_PEAKS, *[RESUMED] * any(row.resumed for _, row in told), *text_precisions(told)]
    lines = [line for note in notes for line in ("", plain(note))]
    return [*_plain("budgets", heads, rows), *lines, "", f"{_about(shown)}.", *_apart(_by_origin(named, order))]


def plans_table(root: Path) -> list[str]:
    """Whole runs at the full size beside what their plans had said, those that took longest first."""
    found = []
    for result in results_in(root / RESULTS / FULL):
        planned = (result.plan or {}).get("seconds")
        took = (result.speed or {}).get("video_seconds")
        if planned and took and result.role == "mode":
            found.append((took / planned - 1, planned, took, result))
    if not found:
        raise UsageError(f"{RESULTS / FULL} has no run with a plan's seconds, which the table plans is made from.")
    rows = [
        [
            Cell(mode_text(result)),
            Cell(str(result.cell.num_frames)),
            Cell(_budget_text(_budget(result))),
            Cell(str(result.cell.num_inference_steps)),
            Cell(f"{planned:.1f} s"),
            Cell(f"{took:.1f} s"),
            Cell(f"{100 * off:+.1f} %"),
            Cell(str(result.environment.get("commit"))),
        ]
        for off, planned, took, result in sorted(found, key=lambda entry: (-entry[0], run_title(entry[3])))
    ]
    heads = ["mode", "frames", "`--vram`", "steps", "planned beforehand", "took, prompt to mp4", "off", "commit"]
    return _plain("plans", heads, rows)


STEP_AND_PEAKS = "Seconds a step, and the peaks of memory: the card's as torch counts + the host's."
Budget = tuple[str | None, str | None]
"""Of the card and of the host."""


def _budget(result: Result) -> Budget:
    return result.cell.vram, result.cell.host_ram


def _from_large_to_small(budgets: Iterable[Budget]) -> list[Budget]:
    return sorted(budgets, key=lambda budget: budget_sizes(*budget), reverse=True)


def _budget_text(budget: Budget, vram: str = "{}", host: str = "{} of the host") -> str:
    words = [form.format(size) for form, size in zip((vram, host), budget, strict=True) if size]
    return ", ".join(words) or "no budget"


def _step_and_peaks(result: Result | None) -> Cell:
    if result is None:
        return Cell(MISSING)
    row = row_of([result])
    if row.gpu is None or row.host is None:
        return Cell(f"{number(row.step)} s")
    return Cell(f"{number(row.step)} s, {gigabytes(row.gpu).removesuffix(' GB')} + {gigabytes(row.host)}")


def _by_origin(
    named: Mapping[tuple[str, int], Mapping[Budget, Result]], order: Sequence[tuple[str, int]]
) -> list[tuple[str, list[Result]]]:
    """Rows in words, each of the budgets that were measured alike."""
    told: list[tuple[str, list[Result]]] = []
    for mode, frames in order:
        alike: dict[str, list[Result]] = {}
        for budget in _from_large_to_small(named[mode, frames]):
            result = named[mode, frames][budget]
            alike.setdefault(repr(facts(result.environment)), []).append(result)
        for found in alike.values():
            budgets = "; ".join(_budget_text(_budget(result)) for result in found)
            told.append((f"{mode}, {frames} frames ({budgets})", found))
    return told


def choice_table(root: Path) -> list[str]:
    """What the mode that README names first takes in budgets of the card, at the full length."""
    chosen = [
        r for r in results_in(root / RESULTS / FULL)
        if r.speed and r.cell.vram and r.role == "mode" and r.cell.num_frames == FULL_FRAMES
        and (r.cell.precision, r.cell.attention) == CHOICE
    ]  # fmt: skip
    if not chosen:
        raise UsageError(f"{RESULTS / FULL} has no result of {' and '.join(CHOICE)} with a --vram budget.")
    chosen.sort(key=lambda r: -(gigabytes_of(r.cell.vram) or 0.0))
    rows = [
        [
            Cell(str(result.cell.vram)),
            Cell(f"{number(row.step)} s"),
            Cell(gigabytes(row.gpu)),
            Cell(gigabytes(row.host)),
        ]
        for result, row in ((r, row_of([r])) for r in chosen)
    ]
    heads = ["`--vram`", "a step", "of the card (torch)", "of host memory"]
    return _plain("choice", heads, rows)


TABLES: dict[str, Callable[[Path], list[str]]] = {
    "modes": modes_table, "drift": drift_table, "budgets": budgets_table, "texts": texts_table, "block": block_table,
    "plans": plans_table,
    "decoding": decoding_table, "attention": attention_table, "memory": memory_table,
    "choice": choice_table,
}  # fmt: skip


def _plain(name: str, heads: Sequence[str], rows: Sequence[list[Cell]]) -> list[str]:
    """A table whose heads are Markdown already."""
    made = table(Table(name, "", [("", head) for head in heads], list(rows)))
    return [made[0].replace("\\`", "`"), *made[1:]]


def _marks(group: Group) -> list[str]:
    return ["" if row.role == "mode" else "floor" for row in group.rows]


def _titled(group: Group, found: Table) -> list[str]:
    synthetic = ", synthetic weights" if group.synthetic else ""
    told = [(row.name, results_of(group, row)) for row in group.rows]
    where = " and ".join(environment_lines([result for _, own in told for result in own]))
    return [*table(found), f"{group.title}{synthetic}: {where}.", *_apart(told), ""]


def _apart(told: Sequence[tuple[str, Sequence[Result]]]) -> list[str]:
    note = mixed(told)
    return ["", note] if note else []


def _about(results: Sequence[Result]) -> str:
    models = "; ".join(dict.fromkeys(_model_text(result) for result in results))
    return f"{models}: {' and '.join(environment_lines(results))}"


def _model_text(result: Result) -> str:
    name = model_name(result)
    if not result.synthetic:
        return name
    return name.replace("synthetic", "synthetic weights", 1) if "synthetic" in name else f"{name} (synthetic weights)"


def _followed(row: Row) -> str:
    from solostep.benchmarks.report_tables import followed

    cell = followed(row)
    return f"{cell.text} {cell.more}".strip()


def _verdict(row: Row) -> str:
    return row.verdict.text if row.verdict and row.role == "mode" else MISSING


# --- the pages ----------------------------------------------------------------------------------------------------


def updated(readme: str, root: Path, page: str = "README.md") -> str:
    """A page with every region made anew.

    Raises:
        UsageError: a region is of no known table, not closed, or its results are missing.
    """
    found = REGION.findall(readme)
    if len(found) != len(OPENING.findall(readme)) or any(OPENING.search(inside) for _, _, inside, _ in found):
        raise UsageError(f"{page}: a `<!-- table: NAME -->` is not closed by a `<!-- /table -->` before the next one.")
    for _, name, _, _ in found:
        if name not in TABLES:
            raise UsageError(f"{page}: there is no table {name}; there are {', '.join(TABLES)}.")
    made = {name: "\n".join(TABLES[name](root)).strip() for name in dict.fromkeys(name for _, name, _, _ in found)}
    return REGION.sub(lambda m: f"{m[1]}\n{made[m[2]]}\n\n{m[4]}", readme)


def stale(readme: str, root: Path, page: str = "README.md") -> list[str]:
    """The names of the regions that are not what the results make."""
    fresh = updated(readme, root, page)
    before, after = REGION.findall(readme), REGION.findall(fresh)
    return [name for (_, name, old, _), (_, _, new, _) in zip(before, after, strict=True) if old != new]


def page_is_stale(root: Path) -> bool:
    """Whether the page beside the results, if there is one, is not of these very measurements."""
    if not (root / PAGE).exists():
        return False
    page = (root / PAGE).read_text(encoding="utf-8")
    results = [result for name in (DEMO, FULL) for result in results_in(root / RESULTS / name)]
    told = {result.id for result in results} | {str(result.environment.get("date")) for result in results}
    shown = set(re.findall("<td[^>]*>([0-9a-f]{16})</td>", page))
    return any(text not in page for text in told) or shown != {result.id for result in results}


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(prog="readme_tables", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 where a table is stale")
    args = parser.parse_args(arguments)
    try:
        there = [name for name in PAGES if name == PAGES[0] or (root / name).exists()]
        texts = {name: (root / name).read_text(encoding="utf-8") for name in there}
        old = {name: stale(text, root, name) for name, text in texts.items()}
        if args.check:
            for name, tables in old.items():
                for table in tables:
                    print(
                        f"{name}: the table {table} is stale; run python -m solostep.benchmarks.readme_tables.",
                        file=sys.stderr,
                    )
            if stale_page := page_is_stale(root):
                print(
                    f"{PAGE} is stale; run solostep report on the folders of results, with -o {PAGE} --overwrite.",
                    file=sys.stderr,
                )
            return int(any(old.values()) or stale_page)
        for name, tables in old.items():
            if tables:
                with replacing(root / name) as temporary:
                    temporary.write_text(updated(texts[name], root, name), encoding="utf-8")
                print(f"{name}: {', '.join(tables)} brought up to date.")
    except (SolostepError, OSError) as error:
        print(f"error: {first_line(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
