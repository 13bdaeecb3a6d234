"""What stands behind a row of a report: the plan beside what was taken, what the run said, the command that made it,
and what its drift did along the way. Taken from the results themselves; nothing is added.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from solostep.benchmarks.report_data import MODE, Group, events_of, results_of
from solostep.benchmarks.report_measures import DRIFT, MISSING, gigabytes, number, seconds
from solostep.benchmarks.report_tables import Cell, Table, run_title, without_empty
from solostep.benchmarks.results import Result
from solostep.benchmarks.statistics import Interval, median_interval


@dataclass(frozen=True)
class Run:
    """One row's results: ``plan`` in words, the forecast of each stage beside what it took, events, commands."""

    title: str
    plan: str
    stages: Table | None
    events: tuple[str, ...]
    commands: tuple[str, ...]
    ids: tuple[str, ...] = field(default=())

    @property
    def is_empty(self) -> bool:
        return not (self.plan or self.stages or self.events or self.commands)


def runs(group: Group) -> tuple[list[Run], list[str]]:
    """A run for each row of a group that has anything to tell, and sentences about what all of them share."""
    return _shared([run_of(row.name, results_of(group, row)) for row in group.rows])


def budget_runs(results: Sequence[Result]) -> tuple[list[Run], list[str]]:
    """A run for each result of a table of budgets."""
    return _shared([run_of(run_title(result), [result]) for result in results])


def _shared(found: list[Run]) -> tuple[list[Run], list[str]]:
    """Events and commands of all runs are told once, and not in each."""
    found = [run for run in found if not run.is_empty]
    if len(found) < 2:
        return found, []
    events = [e for e in found[0].events if all(e in run.events for run in found)]
    commands = [c for c in found[0].commands if all(c in run.commands for run in found)]
    told = [f"All of them said: {event}" for event in events]
    told += [f"All of them were made by: {command}" for command in commands]
    found = [
        replace(
            run,
            events=tuple(e for e in run.events if e not in events),
            commands=tuple(c for c in run.commands if c not in commands),
        )
        for run in found
    ]
    return [run for run in found if not run.is_empty], told


def run_of(title: str, results: Sequence[Result]) -> Run:
    """Of one row's results, newest first; the plan and its stages are those of the run whose memory is shown."""
    timed = next((r for r in results if r.speed), None)
    return Run(
        title,
        plan_text(timed.plan) if timed else "",
        stages_beside(timed) if timed else None,
        tuple(dict.fromkeys(event for r in results for event in events_of(r))),
        tuple(dict.fromkeys(str(c) for r in results if (c := r.environment.get("command")))),
        tuple(r.id for r in results),
    )


# --- plans --------------------------------------------------------------------------------------------------------


def plan_text(plan: Mapping[str, Any] | None) -> str:
    """A plan in a sentence; empty where nothing was planned."""
    if not plan:
        return ""
    parts = []
    if plan.get("budget_bytes") is not None:
        parts.append(f"{gigabytes(plan['budget_bytes'])} of card memory")
    resident, streamed = plan.get("resident_blocks"), plan.get("streamed_blocks")
    if resident is not None and streamed is not None:
        text = f"{resident} of {resident + streamed} blocks stay on the card"
        if streamed:
            disk = plan.get("blocks_from_disk") or 0
            text += f", {streamed} take turns in {plan.get('slots')} slots"
            text += f" ({disk} of them read from disk at every step)" if disk else ""
        parts.append(text)
    parts += _savings(plan)
    ahead = [
        f"{number(plan['step_seconds'])} s a step" if plan.get("step_seconds") is not None else "",
        f"{seconds(plan['seconds'])} in all" if plan.get("seconds") is not None else "",
    ]
    if any(ahead):
        parts.append("forecast: " + ", ".join(filter(None, ahead)))
    return "; ".join(parts)


def _savings(plan: Mapping[str, Any]) -> list[str]:
    """What a plan does to take less memory; nothing of what it leaves as it is."""
    found = []
    if (plan.get("head_groups") or 1) > 1:
        found.append(f"attention in {plan['head_groups']} groups of heads")
    if plan.get("keep_text") is False:
        found.append("the text's keys and values made anew at each step")
    if plan.get("park"):
        found.append("one guidance branch waits in host memory")
    frames, strips = plan.get("decode_frames"), plan.get("decode_strips") or 1
    if frames is not None:
        found.append(f"decoding {frames} latent frame{'s' * (frames != 1)} at a time")
    if strips > 1:
        found.append(f"decoding in {strips} strips")
    if (plan.get("frame_strips") or 1) > 1:
        found.append(f"the first frame encoded in {plan['frame_strips']} strips")
    return found


def stages_beside(result: Result) -> Table | None:
    """Each stage of a run: what was forecast, and what it took. None: its stages were not kept."""
    rows = (result.memory or {}).get("stages") or []
    forecast = {str(s.get("name")): s for s in (result.plan or {}).get("stages") or []}
    if not rows:
        return None
    heads = [("", "stage"), ("seconds", "forecast"), ("seconds", "taken"), ("GPU peak", "forecast")]
    heads += [("GPU peak", "taken"), ("GPU peak", "reserved"), ("host peak", "forecast"), ("host peak", "taken")]
    heads += [("read from disk", "forecast")]
    cells = []
    for row in rows:
        plan = forecast.get(str(row.get("stage")), {})
        planned = (row.get("planned_seconds", plan.get("seconds")), row.get("planned_gpu_bytes", plan.get("device")))
        cells.append(
            [
                Cell(str(row.get("stage"))),
                Cell(number(planned[0])),
                Cell(number(row.get("seconds"))),
                Cell(gigabytes(planned[1])),
                Cell(gigabytes(row.get("gpu_peak_bytes"))),
                Cell(gigabytes(row.get("gpu_reserved_peak_bytes"))),
                Cell(gigabytes(plan.get("host"))),
                Cell(gigabytes(row.get("host_peak_bytes"))),
                Cell(gigabytes(plan.get("disk") or None)),
            ]
        )
    notes = []
    if any(row[6].text != MISSING for row in cells):
        notes.append("Forecasts of host memory are beside the program itself; what was taken includes it.")
    return without_empty(Table("run", "Each stage: forecast, and taken", heads, cells, footnotes=notes))


# --- along the trajectory -----------------------------------------------------------------------------------------


def trajectory(group: Group) -> Table | None:
    """The angle of single steps, and how many free runs left the reference's video, and where."""
    rows, marks, limits = [], [], []
    for row in group.rows:
        drifts = [(r, r.drift) for r in results_of(group, row) if r.drift]
        teacher = next(((r, d["teacher"]) for r, d in drifts if (d.get("teacher") or {}).get("cosine")), None)
        free = next((d["free"] for _, d in drifts if (d.get("free") or {}).get("diverged_at")), None)
        if teacher is None and free is None:
            continue
        cosines = _cosines(*teacher) if teacher else []
        rows.append([Cell(row.name), *_cosine_cells(cosines), *_diverged_cells(free)])
        marks.append("" if row.role == MODE else "floor")
        limits += [free["diverged_limit"]] if free and free.get("diverged_limit") is not None else []
    if not rows:
        return None
    heads = [("", "mode"), ("single steps", "median cosine"), ("single steps", "lowest cosine")]
    heads += [("free runs", "diverged"), ("free runs", "from step")]
    steps = group.settings["num_inference_steps"] if group.settings else None
    limit = f" by more than {limits[0] * 100:g} % (relative L2)" if limits else ""
    cosine = (
        "Cosine: of the angle between a teacher-forced step's velocity and the reference's; 1 is the same direction."
    )
    diverged = f"Diverged: free runs whose latents came to differ from the reference's{limit}"
    begun = "; from step: the first such one" + (f" of {steps}" if steps else "") + ", the median of those runs"
    made = without_empty(Table("trajectory", "Along the trajectory", heads, rows, marks))
    there = {name for _, name in made.heads}
    parts = [cosine] if "median cosine" in there else []
    parts += [diverged + (begun if "from step" in there else "") + "."] if "diverged" in there else []
    made.footnotes.append(" ".join(parts))
    return made


def _cosines(result: Result, teacher: Mapping[str, Any]) -> list[tuple[float, str]]:
    """Every cosine with its prompt, over which its interval is."""
    prompts = [pair["prompt"] for pair in result.pairs]
    return [
        (float(c), prompts[i] if i < len(prompts) else f"pair {i}")
        for i, row in enumerate(teacher["cosine"])
        for c in row
        if c is not None
    ]


def _cosine_cells(cosines: Sequence[tuple[float, str]]) -> list[Cell]:
    if not cosines:
        return [Cell(MISSING), Cell(MISSING)]
    found: Interval = median_interval([c for c, _ in cosines], clusters=[prompt for _, prompt in cosines])
    span = "" if found.low is None or found.high is None else f"[{found.low:.6f}, {found.high:.6f}]"
    return [Cell(f"{found.median:.6f}", span), Cell(f"{min(c for c, _ in cosines):.6f}")]


def _diverged_cells(free: Mapping[str, Any] | None) -> list[Cell]:
    if free is None:
        return [Cell(MISSING), Cell(MISSING)]
    steps = sorted(step + 1 for step in free["diverged_at"] if step is not None)
    n = len(free["diverged_at"])
    middle = f"{(steps[(len(steps) - 1) // 2] + steps[len(steps) // 2]) / 2:g}" if steps else MISSING
    return [Cell(f"{len(steps)} of {n}"), Cell(middle, f"{steps[0]} to {steps[-1]}" if len(set(steps)) > 1 else "")]


# --- what could not be measured -----------------------------------------------------------------------------------

_MISSING_METRIC = re.compile(r"No (\w+): (.+)", re.DOTALL)


def missing_metrics(group: Group) -> list[str]:
    """A sentence for each measure of videos that a run could not take, with its reason as the run told it."""
    found: dict[str, dict[str, int]] = {}
    for result in group.results:
        for event in result.events:
            told = _MISSING_METRIC.fullmatch(str(event))
            if told and told[1] in DRIFT:
                reasons = found.setdefault(told[1], {})
                reasons[told[2]] = reasons.get(told[2], 0) + 1
    return [
        f"No {DRIFT[name].label} in {count} of {len(group.results)} results: {reason.rstrip('.')}."
        for name, reasons in found.items()
        for reason, count in reasons.items()
    ]
