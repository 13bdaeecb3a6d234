"""Whether a mode's drift is that of rounding, and how many times it: measure by measure, beside the noise floor.

Two questions. Do the intervals of the medians overlap? Then the mode is called indistinguishable; but the fewer the
prompts, the wider both are, and a mode with half as much error again overlaps nearly always. So the ratio is taken pair
by pair as well (report_pairs.py), which few prompts do not hide: what cannot be told from noise has a ratio whose
interval holds 1 (or lies under 1), in every measure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from solostep.benchmarks.report_measures import DRIFT, number, times_span
from solostep.benchmarks.report_pairs import over, steps_above, times
from solostep.benchmarks.statistics import Interval, fewest, overlaps

if TYPE_CHECKING:
    from solostep.benchmarks.report_data import Row

JUDGED = ("teacher", "free", "psnr")
"""Each of these that was measured gets a verdict, the strictest first; where none was, the blocks do."""


@dataclass(frozen=True)
class Verdict:
    """What a mode's drift is beside the noise floor.

    kind: "floor", "above", "open" (too few prompts for an interval) or "unknown". ratio: times the floor, None of a
    floor of 0. times: the same pair by pair, with its interval. steps: how many lie above the floor, of how many.
    parts: the verdicts by measure, of which this is the worst; its numbers are those of the first.
    """

    kind: str
    text: str
    ratio: float | None = None
    times: Interval | None = None
    steps: tuple[int, int] | None = None
    parts: Mapping[str, Verdict] = field(default_factory=dict)

    @property
    def is_noise(self) -> bool:
        """Whether nothing here tells the mode from rounding: the intervals overlap and no ratio is above 1."""
        if self.parts:
            return all(part.is_noise for part in self.parts.values())
        return self.kind == "floor" and self.times is not None and self.times.low is not None and self.times.low <= 1


def yardstick(rows: Sequence[Row]) -> str | None:
    """The measure by which rows are judged first: the strictest that any floor among them has."""
    return next((m for m in ("teacher", "free", "blocks") if any(m in row.drift for row in rows if row.is_floor)), None)


def judge(row: Row, floors: Sequence[Row]) -> Verdict | None:
    """A mode beside the noise floor. None: nothing was measured."""
    if not row.drift:
        return None
    both = [m for m in DRIFT if m in row.drift and any(m in floor.drift for floor in floors)]
    measures = [m for m in JUDGED if m in both] or [m for m in ("blocks",) if m in both]
    if not measures:
        return Verdict("unknown", "no floor to judge by")
    parts = {measure: judge_by(measure, row, [f for f in floors if measure in f.drift]) for measure in measures}
    first, kinds = parts[measures[0]], [part.kind for part in parts.values()]
    kind = next(k for k in ("above", "open", "floor") if k in kinds)
    if kind == "floor":
        by = "" if measures[0] == "teacher" else f" (by {DRIFT[measures[0]].label})"
        return Verdict(kind, first.text + by + _but(parts), first.ratio, first.times, first.steps, parts)
    telling = next(m for m in measures if parts[m].kind == kind)
    text = ("" if telling == "teacher" else f"{DRIFT[telling].label}: ") + parts[telling].text
    return Verdict(kind, text, first.ratio, first.times, first.steps, parts)


def _but(parts: Mapping[str, Verdict]) -> str:
    """What the paired ratio tells apart although the intervals overlap."""
    told = [
        f"{DRIFT[measure].label} {number(part.ratio)} times it {times_span(part.times)}"
        for measure, part in parts.items()
        if part.times is not None and part.times.low is not None and part.times.low > 1
    ]
    return f"; {', '.join(told)}, intervals overlap" if told else ""


def judge_by(measure: str, row: Row, floors: Sequence[Row]) -> Verdict:
    """A mode beside the floor in one measure that all of them have."""
    lower = DRIFT[measure].better == "lower"
    own, limits = row.drift[measure], [floor.drift[measure] for floor in floors]
    largest = (max if lower else min)(floors, key=lambda floor: floor.drift[measure].median)
    base = largest.samples[measure]
    found = times(measure, row.samples[measure], base)
    ratio = found.median if found else over(measure, own.median, largest.drift[measure].median)
    steps = steps_above(row.samples[measure], base) if measure == "teacher" else None
    finite = None if ratio == float("inf") else ratio
    text = "a floor of 0" if finite is None else f"{number(finite)} times the floor"
    known = [overlaps(own, limit) for limit in limits]
    # On the better side of a floor is within it: floors are samples of what rounding does, and neither is its bound.
    if any(known) or any(_below(own, limit) if lower else _below(limit, own) for limit in limits):
        return Verdict("floor", "indistinguishable from the floor", finite, found, steps)
    if any(k is None for k in known):
        few = f"{text}; {own.n} prompt{'s' * (own.n != 1)}, {fewest()} make an interval"
        return Verdict("open", few, finite, found, steps)
    return Verdict("above", text, finite, found, steps)


def _below(a: Interval, b: Interval) -> bool:
    return a.high is not None and b.low is not None and a.high < b.low
