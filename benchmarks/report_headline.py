"""The headline of a report: which mode to use, and the numbers that it rests on.

A mode is recommended as rounding noise only where its ratio to the floor, pair by pair, says so in every measure; that
its intervals overlap the floor's is said, and is no recommendation by itself (report_verdicts.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from solostep.benchmarks.report_data import Group, Row
from solostep.benchmarks.report_measures import DRIFT, amount, end_to_end, gigabytes, number, span, times_span
from solostep.benchmarks.report_tables import lost_text, measured_steps
from solostep.benchmarks.report_verdicts import Verdict, yardstick
from solostep.benchmarks.statistics import fewest

NEAR = 1.1
"""Without intervals: a median of at most so many times the floor's counts as near it."""
FAR = 5.0
"""More than so many times the floor is said to be far above it, so that a fast or small mode is not taken for a good
one."""


@dataclass(frozen=True)
class Claim:
    """What to use and why: the answer in a few words, then the numbers it rests on."""

    title: str
    mode: str
    text: str


def headline(group: Group) -> list[Claim]:
    """Which mode to use, from the numbers alone; an empty list where no mode was measured."""
    claims = [_choice(group)] if group.measured and group.modes else []
    timed = sorted((r for r in group.modes if r.step), key=lambda r: r.step or 0.0)
    fastest = timed[0] if timed else None
    if fastest and (not claims or claims[0].mode != fastest.name):
        claims.append(Claim("Fastest", fastest.name, _numbers(group, fastest)))
    small = min((r for r in group.modes if r.gpu), key=lambda r: r.gpu or 0, default=None)
    if small and all(c.mode != small.name for c in claims):
        claims.append(Claim("Least GPU memory", small.name, _numbers(group, small)))
    return claims


def _choice(group: Group) -> Claim:
    def cost(row: Row) -> tuple[float, float]:
        return row.step or float("inf"), row.gpu or float("inf")

    within = sorted((r for r in group.modes if r.verdict and r.verdict.kind == "floor"), key=cost)
    noise = [r for r in within if r.verdict and r.verdict.is_noise]
    if within:
        best = (noise or within)[0]
        fast, numbers = "The fastest" if best.step else "A", _numbers(group, best)
        if noise:
            return Claim("Use", best.name, f"{fast} mode that cannot be told from rounding noise: {numbers}")
        return Claim("Nearest to noise", best.name, f"{fast} mode whose intervals overlap the floor's: {numbers}")
    judged = [r for r in group.modes if r.verdict and r.verdict.kind != "unknown"]
    if not judged:
        return Claim("No verdict", "", "No noise floor was measured, so these numbers do not say which drift is noise.")
    near = sorted((r for r in judged if r.verdict and r.verdict.kind == "open" and _ratio(r) <= NEAR), key=cost)
    if near:
        one = group.prompts == 1
        at = f" at {measured_steps(group)}," if group.levels else ""
        which = "The fastest" if near[0].step else "A"
        few = (
            f"{'1 prompt' if one else f'{group.prompts} prompts'}{at} {'is' if one else 'are'} too few for an interval"
        )
        text = (
            f"{which} mode whose {'' if one else 'median '}error is at most {NEAR} times the floor's; {few}: "
            f"{_numbers(group, near[0])}"
        )
        return Claim(f"Near the floor, by {'one prompt' if one else 'the medians'}", near[0].name, text)
    best = min(judged, key=_off)
    why = "No mode here is within the noise floor"
    if any(r.verdict and r.verdict.kind == "open" for r in judged):
        why = f"Too few prompts for a verdict: {group.prompts}, {fewest()} make an interval"
    return Claim("Nearest to the floor", best.name, f"{why}; {_numbers(group, best)}")


def _ratio(row: Row) -> float:
    return row.verdict.ratio if row.verdict and row.verdict.ratio is not None else float("inf")


def _off(row: Row) -> tuple[float, float]:
    """How far a judged mode is from the floor; of a floor of 0, which is no times anything, how far from the
    reference."""
    assert row.verdict is not None
    measure = next(iter(row.verdict.parts))
    median = row.drift[measure].median
    return _ratio(row), median if DRIFT[measure].better == "lower" else -median


def _numbers(group: Group, row: Row) -> str:
    """The numbers of a mode in a line, each beside what it is compared with."""
    parts, reference = [], group.reference
    if row.step:
        parts.append(f"{number(row.step)} s a step" + _beside_bf16(group, row))
    if row.end_to_end.get("50"):
        parts.append(f"{end_to_end(row.end_to_end['50'], '50' in row.resumed)} for 50 steps")
    if row.gpu:
        beside = f" (reference: {gigabytes(reference.gpu)})" if reference and reference.gpu else ""
        parts.append(f"{gigabytes(row.gpu)} of GPU memory{beside}")
    measure = yardstick(group.rows) or next((m for m in ("teacher", "free", "blocks") if m in row.drift), None)
    if measure and measure in row.drift:
        own = row.drift[measure]
        floors = [f.drift[measure].median for f in group.floors if measure in f.drift]
        beside = f" (floor: {amount(measure, max(floors))})" if floors else ""
        parts.append(f"{DRIFT[measure].label} {amount(measure, own.median)} {span(measure, own)}".rstrip() + beside)
    parts += _beside_floor(row.verdict) if row.verdict else []
    parts += [lost_text(row)] if row.lost else []
    far = row.verdict and any((part.ratio or 0.0) > FAR for part in row.verdict.parts.values())
    return ", ".join(parts) + "." + (" That is far above the floor." if far else "")


def _beside_bf16(group: Group, row: Row) -> str:
    """How many times as fast as the official order a mode is, and as this engine's own bf16, in brackets."""
    ratio = group.ratio(row)
    plain = [r for r in group.modes if r.step and (r.cell.precision, r.cell.attention) == ("bf16", "bf16")]
    found = [f"{ratio:.2f} times as fast as the official order in bf16"] if ratio else []
    if row.step and plain and row not in plain:
        fastest = min(plain, key=lambda r: r.step or 0.0)
        found.append(f"{(fastest.step or 0.0) / row.step:.2f} times as fast as {fastest.name} here")
    return f" ({', '.join(found)})" if found else ""


def _beside_floor(verdict: Verdict) -> list[str]:
    """Every ratio of a mode to the floor, and what its interval says."""
    if verdict.kind == "open":
        return [verdict.text.partition(";")[0]]
    found = []
    for measure, part in verdict.parts.items():
        if part.ratio is None:
            found.append(f"{DRIFT[measure].label} beside a floor of 0")
            continue
        ratio = f"{number(part.ratio)} times the floor {times_span(part.times)}".rstrip()
        overlap = "" if part.is_noise or part.kind != "floor" else ", intervals overlap"
        found.append(f"{DRIFT[measure].label} {ratio}{overlap}")
    return found
