"""Two sets of results, of two versions or two cards: cell by cell, what changed and what is outside of noise.

A time counts as changed where its median step differs by more than a margin (3 %); a drift where the intervals of its
medians do not overlap. Where there is no interval (under six prompts), nothing is flagged. Cost: reading the files and
their bootstraps. Error: none is added.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from solostep.benchmarks.report_data import Row, model_name, row_of, size_of
from solostep.benchmarks.report_measures import DRIFT, MISSING, amount, gigabytes, number, span
from solostep.benchmarks.report_tables import Cell, Table, flat, without_empty
from solostep.benchmarks.results import Result, read_results
from solostep.benchmarks.statistics import overlaps
from solostep.engine.errors import UsageError

MARGIN = 0.03
"""Of times and memory: a smaller difference is taken for noise of the measurement."""
SHOWN = ("teacher", "free", "psnr", "vmaf")


@dataclass(frozen=True)
class Change:
    """A cell in both sets."""

    label: str
    clip: str
    before: Row
    after: Row

    @property
    def speed(self) -> float | None:
        """How many times as fast the second is."""
        return self.before.step / self.after.step if self.before.step and self.after.step else None

    @property
    def memory(self) -> float | None:
        return self.after.gpu / self.before.gpu if self.before.gpu and self.after.gpu else None


@dataclass(frozen=True)
class Comparison:
    """What two sets have in common, what differs, and what only one of them has."""

    names: tuple[str, str]
    changes: list[Change]
    missing: list[str]
    new: list[str]
    environment: list[tuple[str, str, str]]

    @property
    def title(self) -> str:
        return f"{self.names[0]} and {self.names[1]}"


def compare(a: Path, b: Path) -> Comparison:
    """Matches the cells of two files or folders.

    Raises:
        UsageError: one of them holds no result, or they have no cell in common.
    """
    before, after = _by_cell(read_results([a])), _by_cell(read_results([b]))
    common = sorted((key for key in before if key in after), key=lambda key: _order(after[key]))
    if not common:
        raise UsageError(
            f"{a} and {b} have no cell in common: none of the same model, clip, settings and mode; their first are "
            f"{_named(next(iter(before.values())))!r} and {_named(next(iter(after.values())))!r}."
        )
    changes = [
        Change(
            before[key].label,
            f"{model_name(before[key].cell)}, {before[key].cell.clip}",
            row_of([before[key]]),
            row_of([after[key]]),
        )
        for key in common
    ]
    names = (str(a), str(b)) if a.name == b.name else (a.name or str(a), b.name or str(b))
    return Comparison(
        names,
        changes,
        [_named(before[k]) for k in before if k not in after],
        [_named(after[k]) for k in after if k not in before],
        _differing(list(before.values()), list(after.values())),
    )


def _order(result: Result) -> tuple[Any, ...]:
    """The largest clips first; in each the reference, floors and other seed before the modes, by name."""
    cell = result.cell
    return -math.prod(size_of(cell)), model_name(cell), cell.role == "mode", result.label, cell.num_inference_steps


def _by_cell(results: Sequence[Result]) -> dict[str, Result]:
    """Results by what they measured; of several of one cell, the newest."""
    found: dict[str, Result] = {}
    for result in sorted(results, key=lambda r: str(r.environment.get("date") or "")):
        cell = result.cell.as_dict() | {"model": model_name(result.cell)}
        del cell["levels"]
        found[json.dumps([cell, result.synthetic], sort_keys=True)] = result
    return found


def _named(result: Result) -> str:
    return f"{result.label} ({model_name(result.cell)}, {result.cell.clip})"


def _differing(a: Sequence[Result], b: Sequence[Result]) -> list[tuple[str, str, str]]:
    """Facts of the environments that are not the same in all results of both."""
    left, right = _facts(a), _facts(b)
    return [
        (name, left.get(name, MISSING), right.get(name, MISSING))
        for name in dict.fromkeys([*left, *right])
        if left.get(name) != right.get(name)
    ]


def _facts(results: Sequence[Result]) -> dict[str, str]:
    found: dict[str, list[str]] = {}
    for result in results:
        for name, text in flat({k: v for k, v in result.environment.items() if k not in ("date", "command")}):
            if not name.startswith("clocks ") or name.endswith("limit w"):  # clocks are never the same twice
                found.setdefault(name, []).append(text)
    return {name: " / ".join(dict.fromkeys(texts)) for name, texts in found.items()}


# --- as tables ----------------------------------------------------------------------------------------------------


def table(found: Comparison, margin: float = MARGIN) -> Table:
    """A row a cell that both sets have: before, after, and what is outside of noise."""
    measures = [m for m in SHOWN if any(m in c.before.drift and m in c.after.drift for c in found.changes)]
    heads = [("", "mode"), ("", "outside of noise"), ("", "clip")]
    heads += [("seconds a step", "before"), ("seconds a step", "after"), ("seconds a step", "faster")]
    heads += [(peak, side) for peak in ("GPU peak", "host peak") for side in ("before", "after")]
    for m in measures:
        heads += [(DRIFT[m].label, "before"), (DRIFT[m].label, "after")]
    rows = []
    for change in found.changes:
        a, b = change.before, change.after
        flags = outside(change, margin)
        row = [Cell(change.label), Cell("; ".join(flags) or "nothing", mark=_mark(flags)), Cell(change.clip)]
        row += [Cell(number(a.step)), Cell(number(b.step)), Cell(f"{change.speed:.2f}×" if change.speed else MISSING)]
        row += [Cell(gigabytes(v)) for v in (a.gpu, b.gpu, a.host, b.host)]
        for m in measures:
            for side in (a, b):
                interval = side.drift.get(m)
                row.append(Cell(amount(m, interval.median if interval else None), span(m, interval)))
        rows.append(row)
    notes = [
        f"Outside of noise: times and memory that differ by more than {margin * 100:g} %, drift whose intervals "
        f"(95 %) do "
        "not overlap. Without intervals (fewer than six prompts), drift is never flagged."
    ]
    return without_empty(
        Table("compare", f"Before: {found.names[0]}; after: {found.names[1]}", heads, rows, footnotes=notes)
    )


def _mark(flags: Sequence[str]) -> str:
    """What is better, worse, or both looks so."""
    worse = [flag for flag in flags if flag.endswith(("slower", "worse")) or " more " in flag]
    return "" if not flags else "floor" if not worse else "above" if len(worse) == len(flags) else "open"


def outside(change: Change, margin: float = MARGIN) -> list[str]:
    """What of a cell changed by more than noise, in words."""
    flags = []
    a, b = change.before, change.after
    if change.speed is not None and not 1 / (1 + margin) <= change.speed <= 1 + margin:
        word = "faster" if change.speed > 1 else "slower"
        times = change.speed if change.speed > 1 else 1 / change.speed
        flags.append(f"{times:.2f}× {word}")
    for name, x, y in (("GPU memory", a.gpu, b.gpu), ("host memory", a.host, b.host)):
        if x and y and abs(y / x - 1) > margin:
            flags.append(f"{abs(y / x - 1) * 100:.0f} % {'more' if y > x else 'less'} {name}")
    for name, measure in DRIFT.items():
        x, y = a.drift.get(name), b.drift.get(name)
        if x is None or y is None or overlaps(x, y) is not False:
            continue
        better = (y.median < x.median) == (measure.better == "lower")
        flags.append(f"{measure.label} {'better' if better else 'worse'}")
    for name in a.score.keys() & b.score.keys():
        if _apart(a.score[name], b.score[name]):
            better = b.score[name][0] / b.score[name][1] > a.score[name][0] / a.score[name][1]
            flags.append(f"prompt following ({name}) {'better' if better else 'worse'}")
    return flags


def _apart(a: tuple[int, int], b: tuple[int, int]) -> bool:
    """Whether the intervals (Wilson) of two shares do not overlap."""
    from solostep.engine.demo.rules import wilson

    (low_a, high_a), (low_b, high_b) = wilson(*a), wilson(*b)
    return high_a < low_b or high_b < low_a


def environment_table(found: Comparison) -> Table | None:
    """What differs between the two environments; None: nothing does."""
    if not found.environment:
        return None
    heads = [("", "environment"), ("", "before"), ("", "after")]
    rows = [[Cell(name), Cell(a), Cell(b)] for name, a, b in found.environment]
    return Table("environment", "The environments differ", heads, rows)


def only_in(found: Comparison) -> list[str]:
    """Lines about cells that one of the sets does not have."""
    lines = [f"Missing after: {name}" for name in found.missing]
    return lines + [f"New after: {name}" for name in found.new]


def as_text(found: Comparison) -> str:
    """All of it as Markdown, which a terminal shows as well."""
    from solostep.benchmarks.report_markdown import plain
    from solostep.benchmarks.report_markdown import table as lines_of

    lines = [f"# Results compared: {plain(found.title)}", ""]
    environment = environment_table(found)
    if environment is not None:
        lines += ["**The environments differ:**", "", *lines_of(environment, aligned=True), ""]
    lines += [*lines_of(table(found), aligned=True), ""]
    return "\n".join([*lines, *(f"- {plain(line)}" for line in only_in(found))]).rstrip() + "\n"


def as_page(found: Comparison) -> str:
    """All of it as a page of its own."""
    from html import escape

    from solostep.benchmarks import report_html as html

    environment = environment_table(found)
    flagged = sum(bool(outside(change)) for change in found.changes)
    about = f"Before: {escape(found.names[0])}; after: {escape(found.names[1])}"
    body = f'<header><h1>Results compared</h1><p class="env">{about}</p></header><main>'
    if environment is not None:
        body += (
            f'<p class="warn">The environments differ; what changed may come from that.</p>{html.table(environment)}'
        )
    body += f"<h2>{flagged} of {len(found.changes)} cells changed by more than noise</h2>"
    body += html.table(table(found), sortable=True)
    body += "".join(f'<p class="note">{escape(line)}</p>' for line in only_in(found)) + "</main>"
    return html.document(f"Results compared: {found.title}", body)
