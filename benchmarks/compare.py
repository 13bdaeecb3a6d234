"""Two sets of results, of two versions or two cards: cell by cell, what changed and what is outside of noise.

A drift counts as changed where the interval of its change, taken pair by pair (the same prompt and noise before and
after), leaves out no change; prompt following, where a sign test over the prompts that changed says so. A time counts
as changed where both have six steps at least, and the median step differs by more than three times what single steps of
both runs do. What too few prompts or steps were measured for is said to be that, and so is what only one of the two has
measured. Cost: reading the files and their bootstraps. Error: none is added.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from solostep.benchmarks.report_data import Row, card_of, model_name, row_of, size_of
from solostep.benchmarks.report_measures import DRIFT, MISSING, amount, gigabytes, number, span
from solostep.benchmarks.report_pairs import more, over, paired
from solostep.benchmarks.report_tables import Cell, Table, flat, without_empty
from solostep.benchmarks.results import Result, read_results
from solostep.benchmarks.statistics import fewest, overlaps, sign_test, spread
from solostep.engine.errors import UsageError

MARGIN = 0.03
"""Of memory: a smaller difference is taken for noise of the measurement."""
PROGRAM = 100e6
"""Bytes of host memory by which two runs of one program differ anyway: up to 48e6 in three pairs of the demo's."""
LEAST = 0.01
"""Of times: two runs differ by as much although the steps of each are alike."""
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
    repeated: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        return f"{self.names[0]} and {self.names[1]}"


def compare(a: Path, b: Path) -> Comparison:
    """Matches the cells of two files or folders.

    Raises:
        UsageError: one of them holds no result, or they have no cell in common.
    """
    left, right = _by_cell(read_results([a])), _by_cell(read_results([b]))
    before, after = ({key: own[0] for key, own in side.items()} for side in (left, right))
    common = sorted((key for key in before if key in after), key=lambda key: _order(after[key]))
    if not common:
        raise UsageError(
            f"{a} and {b} have no cell in common: none of the same model, clip, settings and mode; "
            + _nearest(list(before.values()), list(after.values()))
        )
    changes = [
        Change(
            before[key].label,
            f"{model_name(before[key])}, {before[key].cell.clip}",
            row_of(left[key]),
            row_of(right[key]),
        )
        for key in common
    ]
    names = (str(a), str(b)) if a.name == b.name else (a.name or str(a), b.name or str(b))
    return Comparison(
        names,
        changes,
        [_named(before[k]) for k in before if k not in after],
        [_named(after[k]) for k in after if k not in before],
        _differing(*([r for own in side.values() for r in own] for side in (left, right))),
        [
            f"{_named(own[0])}: {len(own)} results {when}; what the newest, {own[0].id}, has not measured comes from "
            "the others"
            for side, when in ((left, "before"), (right, "after"))
            for key, own in side.items()
            if len(own) > 1 and key in common
        ],
    )


def _order(result: Result) -> tuple[Any, ...]:
    """The largest clips first; in each the reference, floors and other seed before the modes, by name."""
    cell = result.cell
    return -math.prod(size_of(cell)), model_name(result), cell.role == "mode", result.label, cell.num_inference_steps


def _by_cell(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Results by what they measured; of several of one cell, the newest first, and none of another card than its."""
    found: dict[str, list[Result]] = {}
    for result in sorted(results, key=lambda r: str(r.environment.get("date") or ""), reverse=True):
        cell = result.cell.as_dict() | {"model": model_name(result)}
        del cell["levels"]
        found.setdefault(json.dumps([cell, result.synthetic], sort_keys=True), []).append(result)
    return {k: [r for r in own if card_of(r.environment) == card_of(own[0].environment)] for k, own in found.items()}


def _nearest(before: Sequence[Result], after: Sequence[Result]) -> str:
    """Why none of them is the same cell: what two of one name differ in, or else the first names."""
    for one, other in itertools.product(before, after):
        if _named(one) == _named(other):
            a, b = ({**r.cell.as_dict(), "drawn weights": r.synthetic, "levels": None} for r in (one, other))
            names = [key.replace("_", " ") for key in a if a[key] != b[key]]
            return f"{_named(one)!r} is in both, but with other {' and '.join(names)}."
    return f"their first are {_named(before[0])!r} and {_named(after[0])!r}."


def _named(result: Result) -> str:
    return f"{result.label} ({model_name(result)}, {result.cell.clip})"


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
        if result.weights and not result.synthetic:
            found.setdefault(f"weights of {model_name(result)}", []).append(result.weights)
    return {name: " / ".join(dict.fromkeys(texts)) for name, texts in found.items()}


# --- as tables ----------------------------------------------------------------------------------------------------


def table(found: Comparison) -> Table:
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
        flags, few = outside(change), untold(change)
        lacking = one_sided(change)
        told = "; ".join(flags) or ("too few to tell" if few else "not all measured" if lacking else "nothing")
        row = [Cell(change.label), Cell(told, "; ".join([*few, *lacking]), _mark(flags)), Cell(change.clip)]
        row += [Cell(number(a.step)), Cell(number(b.step)), Cell(f"{change.speed:.2f}×" if change.speed else MISSING)]
        row += [Cell(gigabytes(v)) for v in (a.gpu, b.gpu, a.host, b.host)]
        for m in measures:
            for side in (a, b):
                interval = side.drift.get(m)
                row.append(Cell(amount(m, interval.median if interval else None), span(m, interval)))
        rows.append(row)
    notes = [
        "Outside of noise: drift whose change, pair by pair, has an interval (95 %) without 0, or as a ratio without "
        "1; prompt following, where the prompts that changed went one way (sign test, 5 %); seconds a step of "
        f"{fewest()} steps and more that differ by more than three times the spread of single steps, and "
        f"{LEAST * 100:g} % at least; memory by more than {MARGIN * 100:g} %, the host's by "
        f"{gigabytes(PROGRAM)} at least."
    ]
    tested = sum(len(differing(change)) for change in found.changes)
    if tested > 1:
        notes.append(
            f"{tested} drifts are not the same before and after, and each is held against noise by itself: one in "
            "twenty comes out as a change by chance alone."
        )
    return without_empty(
        Table("compare", f"Before: {found.names[0]}; after: {found.names[1]}", heads, rows, footnotes=notes)
    )


def _mark(flags: Sequence[str]) -> str:
    """What is better, worse, or both looks so."""
    worse = [flag for flag in flags if any(word in flag for word in ("slower", " worse", " more "))]
    return "" if not flags else "floor" if not worse else "above" if len(worse) == len(flags) else "open"


def outside(change: Change) -> list[str]:
    """What of a cell changed by more than noise, in words."""
    flags = []
    a, b = change.before, change.after
    margin = speed_margin(a, b)
    if change.speed is not None and margin is not None and not 1 / (1 + margin) <= change.speed <= 1 + margin:
        word = "faster" if change.speed > 1 else "slower"
        times = change.speed if change.speed > 1 else 1 / change.speed
        flags.append(f"{times:.2f}× {word}")
    for name, x, y, least in (("GPU memory", a.gpu, b.gpu, 0.0), ("host memory", a.host, b.host, PROGRAM)):
        if x and y and abs(y / x - 1) > MARGIN and abs(y - x) > least:
            flags.append(f"{abs(y / x - 1) * 100:.0f} % {'more' if y > x else 'less'} {name}")
    flags += filter(None, (_drifted(name, a, b) for name in DRIFT))
    return flags + [
        f"prompt following ({name}) {'better' if b.score[name].part > a.score[name].part else 'worse'}"
        for name in a.score
        if name in b.score and _follows_otherwise(name, a, b)
    ]


def untold(change: Change) -> list[str]:
    """What of a cell was measured on too few prompts or steps to tell noise from a change."""
    a, b = change.before, change.after
    measured = [(a.drift[name].n, b.drift[name].n) for name in differing(change)]
    measured += [
        (a.score[name].prompts, b.score[name].prompts)
        for name in a.score
        if name in b.score and not (a.followed and a.followed == b.followed)
    ]
    prompts = min((min(pair) for pair in measured), default=fewest())
    found = []
    if prompts < fewest():
        found.append(f"drift: {prompts} prompt{'s' * (prompts != 1)}, {fewest()} make an interval")
    if change.speed is not None and speed_margin(a, b) is None and a.step_times != b.step_times:
        steps = min(len(a.step_times), len(b.step_times))
        found.append(f"seconds a step: {steps} timed, too few steps to tell; {fewest()} show their spread")
    return found


def differing(change: Change) -> list[str]:
    """The drifts that both have and that are not the same: equal numbers are no matter of prompts, or of chance."""
    a, b = change.before, change.after
    return [name for name in DRIFT if name in a.drift and name in b.drift and a.samples[name] != b.samples[name]]


def one_sided(change: Change) -> list[str]:
    """What only one of the two has measured, and so is not compared."""
    found = []
    for here, there, when in ((change.before, change.after, "before"), (change.after, change.before, "after")):
        names = [DRIFT[name].label for name in DRIFT if name in here.drift and name not in there.drift]
        names += ["prompt following"] if here.score and not there.score else []
        names += ["seconds a step"] if here.step and not there.step else []
        found += [f"measured {when} only: {', '.join(names)}"] if names else []
    return found


def speed_margin(a: Row, b: Row) -> float | None:
    """How far apart median steps may be, relative: by the spread of the single steps of both runs. None: too few of
    them tell a spread."""
    if min(len(a.step_times), len(b.step_times)) < fewest() or not a.step or not b.step:
        return None
    return max(LEAST, 3 * math.hypot(spread(a.step_times) / a.step, spread(b.step_times) / b.step))


def _drifted(name: str, a: Row, b: Row) -> str | None:
    """What a drift did, if that is outside of noise: pair by pair, or where there are no pairs, by both intervals."""
    if name not in a.drift or name not in b.drift:
        return None
    measure = DRIFT[name]
    as_ratio = measure.unit in ("%", "dB")
    found = paired(b.samples[name], a.samples[name], (lambda x, y: over(name, x, y)) if as_ratio else more)
    if found is None:
        if overlaps(a.drift[name], b.drift[name]) is not False:
            return None
        better = (b.drift[name].median < a.drift[name].median) == (measure.better == "lower")
        return f"{measure.label} {'better' if better else 'worse'}"
    same = 1.0 if as_ratio else 0.0
    if found.low is None or found.high is None or found.low <= same <= found.high:
        return None
    # A ratio is of errors, also of decibels: more is worse.
    better = (found.high < same) == (as_ratio or measure.better == "lower")
    size = _size(found.median) if as_ratio else f"by {amount(name, abs(found.median))}"
    of = " of the difference" if measure.unit == "dB" else ""
    return f"{measure.label} {'better' if better else 'worse'} ({size}{of})"


def _size(ratio: float) -> str:
    return f"{(ratio - 1) * 100:+.2g} %" if 0.5 < ratio < 2 else f"{number(ratio)}×"


def _follows_otherwise(name: str, a: Row, b: Row) -> bool:
    """Whether an aspect is followed more or less often: by the prompts that changed, or where results do not keep
    them, by intervals (Wilson) that do not overlap."""
    changes: dict[str, int] = {}
    for pair, before in a.followed.items():
        if pair in b.followed and name in before and name in b.followed[pair]:
            changes[pair[0]] = changes.get(pair[0], 0) + b.followed[pair][name] - before[name]
    if changes:
        up, down = sum(v > 0 for v in changes.values()), sum(v < 0 for v in changes.values())
        return sign_test(up, down) <= 0.05
    (low_a, high_a), (low_b, high_b) = a.score[name].interval, b.score[name].interval
    return high_a < low_b or high_b < low_a


def environment_table(found: Comparison) -> Table | None:
    """What differs between the two environments; None: nothing does."""
    if not found.environment:
        return None
    heads = [("", "environment"), ("", "before"), ("", "after")]
    rows = [[Cell(name), Cell(a), Cell(b)] for name, a, b in found.environment]
    return Table("environment", "The environments differ", heads, rows)


def only_in(found: Comparison) -> list[str]:
    """Lines about cells that one of the sets does not have, or has several times."""
    lines = [f"Missing after: {name}" for name in found.missing]
    return lines + [f"New after: {name}" for name in found.new] + found.repeated


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
    few = sum(bool(untold(change)) for change in found.changes)
    body += f"<h2>{flagged} of {len(found.changes)} cells changed by more than noise</h2>"
    if few:
        body += f'<p class="note">{few} have too few prompts or steps to tell all of it; the table says which.</p>'
    apart = sum(bool(one_sided(change)) for change in found.changes)
    if apart:
        body += f'<p class="note">{apart} have something that was measured on one side only; the table says what.</p>'
    body += html.table(table(found), sortable=True)
    body += "".join(f'<p class="note">{escape(line)}</p>' for line in only_in(found)) + "</main>"
    return html.document(f"Results compared: {found.title}", body)
