"""The tables of a report and its headline, as texts: the page and the Markdown show the same ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from solostep.benchmarks.report_data import (
    IMAGE_TO_VIDEO,
    Group,
    Row,
    card_of,
    is_guided,
    mode_key,
    model_name,
    size_of,
    takes_a_frame,
)
from solostep.benchmarks.report_measures import (
    DRIFT,
    MISSING,
    VIDEO,
    amount,
    end_to_end,
    gigabytes,
    number,
    share,
    span,
    times_span,
)
from solostep.benchmarks.report_origins import mixed
from solostep.benchmarks.report_verdicts import Verdict
from solostep.benchmarks.results import Result, environment_key
from solostep.benchmarks.statistics import Interval, fewest
from solostep.engine.config import HOST_RAM, VRAM

RESUMED = (
    "‡ run to the end in several processes, each of which went on where the one before was stopped: every step once, "
    "loading once, and no time between them."
)


def calculated(rows: Sequence[tuple[str, Row]]) -> list[str]:
    """What † means, where rows have it: from how many timed steps their whole videos are. Empty where none has."""
    counts: dict[int, list[str]] = {}
    for name, row in rows:
        if any(extrapolated for _, extrapolated in row.end_to_end.values()):
            counts.setdefault(row.steps_timed, []).append(name)
    if not counts:
        return []
    return [
        "† calculated, not run to the end: the other stages as measured, and so many times "
        f"{_timed(counts)}. All other times were measured as they stand."
    ]


def _timed(counts: Mapping[int, Sequence[str]]) -> str:
    """The step that times are calculated from; ``counts``: the names of rows by how many of their steps were timed."""
    if len(counts) == 1:
        (n,) = counts
        return "the one step that was timed after the first" if n == 1 else f"the median of {n} steps after the first"
    most = max(counts, key=lambda n: len(counts[n]))
    some = [f"{n} in {'; '.join(names)}" for n, names in counts.items() if n != most]
    return f"the median of the steps after the first ({', '.join(some)}, {'one' if most == 1 else most} in all others)"


def text_precisions(rows: Sequence[tuple[str, Row]]) -> list[str]:
    """In what Step-LLM's weights were, where any timed row had them in other numbers than the model's own 16 bits."""
    timed = [(name, row.text_precision or "bf16") for name, row in rows if row.step is not None]
    found = {precision: [n for n, own in timed if own == precision] for precision in dict.fromkeys(p for _, p in timed)}
    if len(found) == 1:
        (own,) = found
        return [] if own == "bf16" else [f"Step-LLM in {own} in all rows that have a time."]
    return [f"Step-LLM in {own}: {'; '.join(names)}." for own, names in found.items() if own != "bf16"]


def measured_steps(group: Group) -> str:
    """``1 of 50 steps (sigma 0.469), drawn latents``: where teacher-forced errors are of a few steps; else empty."""
    if not group.levels or group.settings is None:
        return ""
    steps = f"{len(group.levels)} of {group.settings['num_inference_steps']} steps"
    return f"{steps} (sigma {listed([number(sigma, 2) for sigma in group.levels])})" + ", drawn latents" * group.drawn


def listed(texts: Sequence[str]) -> str:
    """``a, b and c``."""
    return " and ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)


def _drift_note(group: Group) -> str:
    """Over what the drift is, and whether that makes an interval."""
    where = f" at {measured_steps(group)}" if group.levels else ""
    where += ", the median of those" if len(group.levels) > 1 else ""
    if group.prompts == 1:
        return f"Drift: of 1 prompt{where}: no interval, so small differences between modes mean nothing. "
    known = "95 % intervals in brackets. " if group.prompts >= fewest() else "too few for intervals. "
    return f"Drift: medians over {group.prompts} prompts{where}, {known}"


@dataclass(frozen=True)
class Cell:
    """A text, and what stands under it in small print. ``mark`` is a class: floor, above, open, or none."""

    text: str
    more: str = ""
    mark: str = ""


@dataclass
class Table:
    """``heads`` are (over-heading, heading); ``marks`` a class a row (reference, floor, or none)."""

    name: str
    caption: str
    heads: list[tuple[str, str]]
    rows: list[list[Cell]]
    marks: list[str] = field(default_factory=list)
    footnotes: list[str] = field(default_factory=list)


def without_empty(table: Table) -> Table:
    """Without columns in which nothing was measured, the first always stays."""
    kept = [i for i in range(len(table.heads)) if i == 0 or any(row[i].text not in ("", MISSING) for row in table.rows)]
    heads, rows = [table.heads[i] for i in kept], [[row[i] for i in kept] for row in table.rows]
    return Table(table.name, table.caption, heads, rows, table.marks, table.footnotes)


# --- summary ------------------------------------------------------------------------------------------------------


def summary(group: Group) -> Table:
    """One row a mode: time, memory, drift, videos, prompts, verdict; floors, reference and other seed set apart."""
    heads = [("", "mode"), ("", "verdict"), ("", "times the floor")]
    heads += [("time", "seconds a step"), ("time", "50 steps"), ("time", "15 steps")]
    heads += [("peak memory", "GPU"), ("peak memory", "host")]
    heads += [("drift", "teacher-forced error"), ("drift", "latents at the end"), ("drift", "of a block")]
    heads += [("", "prompt following")]
    heads += [("video beside the reference's", DRIFT[m].label) for m in VIDEO]
    rows = [_summary_row(group, row) for row in group.rows]
    marks = ["" if row.role == "mode" else "reference" if row.role == "reference" else "floor" for row in group.rows]
    named = [(row.name, row) for row in group.rows]
    notes = calculated(named)
    if any(row.resumed for row in group.rows):
        notes.append(RESUMED)
    notes += text_precisions(named)
    if group.measured:
        notes.append(f"{_drift_note(group)}{MISSING} was not measured.")
    if any(row.verdict and row.verdict.ratio is not None and len(row.verdict.parts) > 1 for row in group.modes):
        measure = next(iter(next(r.verdict.parts for r in group.modes if r.verdict and r.verdict.parts)))
        notes.append(f"Times the floor: of the {DRIFT[measure].label}. Other measures may lie further above theirs.")
    if any(row.score and "all" not in row.score for row in group.rows):
        notes.append("Prompt following: of what prompts ask for, that which is followed least, by name.")
    return without_empty(Table("summary", f"Modes: {group.title}", heads, rows, marks, notes))


def _summary_row(group: Group, row: Row) -> list[Cell]:
    ratio = group.ratio(row)
    found = [Cell(row.name), _verdict(row), times_cell(row.verdict)]
    found.append(Cell(number(row.step), f"{ratio:.2f}×" if ratio and row.role != "reference" else ""))
    found += [whole_video(row, steps) for steps in ("50", "15")]
    found += [_gpu(row), Cell(gigabytes(row.host))]
    for name in ("teacher", "free", "blocks", "", *VIDEO):
        if not name:
            found.append(followed(row))
            continue
        interval = row.drift.get(name)
        found.append(Cell(amount(name, interval.median if interval else None), span(name, interval)))
    return found


def whole_video(row: Row, steps: str) -> Cell:
    """Seconds of a whole video of so many steps, and the steps of each process, where it was made in several."""
    parts = row.resumed.get(steps, "")
    return Cell(end_to_end(row.end_to_end.get(steps), bool(parts)), f"{parts} steps" if parts else "")


def _gpu(row: Row) -> Cell:
    """What the allocator held at most, and under it what the driver reported."""
    return Cell(gigabytes(row.gpu), "" if row.driver is None else f"driver: {gigabytes(row.driver)}")


def _verdict(row: Row) -> Cell:
    verdict = row.verdict
    if verdict is None:
        return Cell(MISSING)
    text, _, more = verdict.text.partition("; ")
    more = "; ".join(filter(None, [more, steps_text(verdict)]))
    return Cell(text, more, verdict.kind if verdict.kind in ("floor", "above", "open") else "")


def times_cell(verdict: Verdict | None) -> Cell:
    """The ratio to the floor, and its interval."""
    if verdict is None or verdict.ratio is None:
        return Cell(MISSING)
    return Cell(f"{number(verdict.ratio)}×", times_span(verdict.times))


def steps_text(verdict: Verdict) -> str:
    return f"{verdict.steps[0]} of {verdict.steps[1]} steps above the floor" if verdict.steps else ""


def verdicts(group: Group) -> Table | None:
    """Each mode beside the floor in every measure that it is judged by, and at how many steps it lies above. None: it
    is not judged by several."""
    rows = [row for row in group.modes if row.verdict and row.verdict.parts]
    if not rows:
        return None
    measures = [m for m in DRIFT if any(m in row.verdict.parts for row in rows if row.verdict)]
    if len(measures) < 2:  # the summary has it
        return None
    heads = [("", "mode")]
    for m in measures:
        heads += [(DRIFT[m].label, "verdict"), (DRIFT[m].label, "times the floor")]
    heads.append(("", "steps above the floor"))
    cells = []
    for row in rows:
        assert row.verdict is not None
        line = [Cell(row.name)]
        for m in measures:
            part = row.verdict.parts.get(m)
            text, _, more = part.text.partition("; ") if part else (MISSING, "", "")
            line += [Cell(text, more, part.kind if part else ""), times_cell(part)]
        steps = row.verdict.steps
        cells.append([*line, Cell(f"{steps[0]} of {steps[1]}" if steps else MISSING)])
    return without_empty(Table("verdicts", "Beside the noise floor, measure by measure", heads, cells))


def followed(row: Row) -> Cell:
    """All four aspects where they were counted, else the worst of them; and how many prompts were lost."""
    if not row.score:
        return Cell(MISSING)
    name = "all" if "all" in row.score else min(row.score, key=lambda k: row.score[k].part)
    text, _, interval = share(row.score[name]).partition(" [")
    more = f"[{interval}" + ("" if name == "all" else f" {name}")
    return Cell(text, more + (f", {lost_text(row)}" if row.lost else ""))


def lost_text(row: Row) -> str:
    """How many of the prompts that the reference follows a mode does not."""
    prompts = len({prompt for prompt, _ in row.lost or ()})
    return f"{prompts} prompt{'s' * (prompts != 1)} lost"


def scores(group: Group) -> Table | None:
    """Prompt following, aspect by aspect, and the prompts that a mode loses."""
    rows = [row for row in group.rows if row.score]
    if not rows:
        return None
    aspects = list(dict.fromkeys(name for row in rows for name in row.score))
    cells = [
        [
            Cell(row.name),
            *(Cell(share(row.score[a])) if a in row.score else Cell(MISSING) for a in aspects),
            Cell(MISSING if row.lost is None else str(len({prompt for prompt, _ in row.lost}))),
        ]
        for row in rows
    ]
    heads = [("", "mode"), *(("", a) for a in aspects), ("", "prompts lost")]
    several = any(len({seed for _, seed in row.followed}) > 1 for row in rows)
    notes = [
        f"Lost by {row.name}: {prompt}{f' (seed {seed})' if several else ''}: {', '.join(aspects)}."
        for row in rows
        for (prompt, seed), aspects in (row.lost or {}).items()
    ]
    return without_empty(Table("score", "Prompt following, aspect by aspect", heads, cells, footnotes=notes))


def stages(group: Group) -> Table | None:
    """Where the seconds of one video went, as it was run."""
    rows = [row for row in group.rows if row.stages]
    if not rows:
        return None
    names = list(dict.fromkeys(name for row in rows for name in row.stages))
    cells = [
        [
            Cell(r.name),
            *(Cell(number(r.stages.get(n))) for n in names),
            Cell(number(r.first_step)),
            Cell(str(r.steps_timed)),
            Cell(number(r.video_seconds)),
            Cell(MISSING if r.frames_written is None else str(r.frames_written)),
        ]
        for r in rows
    ]
    more = ["first step", "steps timed", "one video as run", "frames written"]
    heads = [("", "mode"), *(("seconds of a stage", n) for n in names), *(("", m) for m in more)]
    return Table("stages", "Seconds of each stage of one video, as it was run", heads, cells)


def blocks(group: Group) -> Table | None:
    """The numbers of the heat map."""
    rows = [row for row in [*group.floors, *group.modes] if row.blocks]
    if not rows:
        return None
    names = list(dict.fromkeys(name for row in rows for name in row.blocks))
    cells = [[Cell(n), *(_error(r.block_spans.get(n), unit=False) for r in rows)] for n in names]
    heads = [("", "block"), *(("", r.name) for r in rows)]
    return Table("blocks", "Error of each block, per cent of what it adds; medians", heads, cells)


def operators(group: Group) -> Table | None:
    rows = [row for row in group.rows if row.operators]
    if not rows:
        return None
    names = list(dict.fromkeys(name for row in rows for name in row.operators))
    cells = [[Cell(r.name), *(_error(r.operator_spans.get(n)) for n in names)] for r in rows]
    heads = [("", "mode"), *(("", n) for n in names)]
    return Table(
        "operators", "Error of each operator, on the reference's input; medians over blocks and samples", heads, cells
    )


def _error(found: Interval | None, unit: bool = True) -> Cell:
    return Cell(amount("blocks", found.median if found else None, unit), span("blocks", found))


# --- budgets ------------------------------------------------------------------------------------------------------


@dataclass
class Budgets:
    """Speed in memory budgets and clip lengths, of one model and card."""

    title: str
    table: Table
    lines: dict[str, list[tuple[float, float]]]
    unlimited: dict[str, float]
    results: list[Result]


def budgets(rows: Sequence[tuple[Result, Row]]) -> list[Budgets]:
    """Every result with a speed, where a model and card has more than one budget or clip length of a mode."""
    places: dict[tuple[Any, ...], list[tuple[Result, Row]]] = {}
    for result, row in rows:
        if row.step is not None and result.role == "mode":
            place = (
                model_name(result),
                card_of(result.environment),
                bool(result.synthetic),
                is_guided(result.cell),
            )
            places.setdefault(place, []).append((result, row))
    found = []
    for (model, card, synthetic, guided), own in places.items():
        if len({(r.cell.vram, r.cell.host_ram, size_of(r.cell)) for r, _ in own}) < 2:
            continue
        title = f"{model} on {card}" + (", synthetic weights" if synthetic else "")
        title += "" if guided else ", one guidance branch"
        found.append(_budgets(title, own))
    return found


def _budgets(title: str, rows: list[tuple[Result, Row]]) -> Budgets:
    heads = [
        ("", "mode"),
        ("", "clip"),
        ("", "GPU budget"),
        ("", "host budget"),
        ("", "seconds a step"),
        ("", "50 steps"),
        ("", "15 steps"),
        ("", "GPU peak"),
        ("", "host peak"),
        ("", "events"),
    ]
    cells, lines, unlimited = [], {}, {}
    rows = sorted(rows, key=_budget_order)
    several = len({mode_key(r.cell, False) for r, _ in rows}) > 1
    sizes = len({(r.cell.height, r.cell.width) for r, _ in rows})
    for result, row in rows:
        cell = result.cell
        mode = mode_text(result)
        cells.append(
            [
                Cell(mode),
                Cell(f"{cell.num_frames} × {cell.height}x{cell.width}"),
                _budget(result, cell.vram, VRAM),
                _budget(result, cell.host_ram, HOST_RAM),
                Cell(number(row.step)),
                whole_video(row, "50"),
                whole_video(row, "15"),
                _gpu(row),
                Cell(gigabytes(row.host)),
                Cell("; ".join(row.events)),
            ]
        )
        line = f"{cell.num_frames} frames" + (f" of {cell.height}x{cell.width}" if sizes > 1 else "")
        line = f"{mode}, {line}" if several else line
        if cell.vram is None:
            unlimited[line] = row.step or 0.0
        elif gigabytes_of(cell.vram) is not None and cell.host_ram is None:
            lines.setdefault(line, []).append((gigabytes_of(cell.vram) or 0.0, row.step or 0.0))
    lines = {name: points for name, points in lines.items() if len(points) > 1}
    unlimited = {name: value for name, value in unlimited.items() if name in lines}
    named = [(run_title(result), row) for result, row in rows]
    notes = [*calculated(named), *([RESUMED] if any(row.resumed for _, row in rows) else []), *text_precisions(named)]
    told = mixed([(run_title(result), [result]) for result, _ in rows])
    notes += [told] if told else []
    return Budgets(
        title,
        without_empty(Table("budgets", f"Memory budgets and clip lengths: {title}", heads, cells, footnotes=notes)),
        lines,
        unlimited,
        [result for result, _ in rows],
    )


def _budget(result: Result, given: str | None, variable: str) -> Cell:
    """A budget that was given, or else stood in the environment, as a run takes it."""
    there = (result.environment.get("variables") or {}).get(variable)
    return Cell(given or str(there), "" if given else f"by ${variable}") if given or there else Cell("none")


def run_title(result: Result) -> str:
    """A row of a table of budgets in words."""
    cell = result.cell
    limits = [f"{kind} {value}" for kind, value in (("GPU", cell.vram), ("host", cell.host_ram)) if value]
    return f"{mode_text(result)}, {cell.num_frames} frames, " + (", ".join(limits) or "no budget")


def mode_text(result: Result) -> str:
    """The mode's label, without its budget; and that it made a video from an image, where drawn weights did."""
    cell, parts = result.cell, result.label.split(" · ")
    budget = {str(v).replace(" ", "").lower() for v in (cell.vram, cell.host_ram) if v}
    name = " · ".join(p for p in parts if p.replace(" ", "").lower() not in budget) or result.label
    return f"{name}, {IMAGE_TO_VIDEO}" if takes_a_frame(result) else name


def _budget_order(item: tuple[Result, Row]) -> tuple[Any, ...]:
    cell = item[0].cell
    return mode_text(item[0]), -cell.num_frames, *budget_sizes(cell.vram, cell.host_ram)


def budget_sizes(vram: str | None, host_ram: str | None) -> tuple[float, float]:
    """Budgets of the card and of the host as numbers to sort by: none is the largest."""
    return gigabytes_of(vram) or 1e9, gigabytes_of(host_ram) or 1e9


def gigabytes_of(text: str | None) -> float | None:
    """A budget as GB; None: there is none, or it is not written as a size."""
    from solostep.engine.units import parse_size

    if text is None:
        return None
    try:
        return parse_size(text, "--vram") / 1e9
    except ValueError:
        return None


# --- environment and files ----------------------------------------------------------------------------------------


def environment_line(environment: Mapping[str, Any]) -> str:
    """Card, versions and commit in a line."""
    found = [card_of(environment)]
    power = (environment.get("clocks") or {}).get("power_limit_w")
    found += [f"{number(power)} W"] if isinstance(power, (int, float)) and power else []
    for name in ("driver", "cuda", "torch", "triton", "commit"):
        if environment.get(name):
            found.append(f"{name} {environment[name]}")
    return ", ".join(found)


def environment_lines(results: Sequence[Result]) -> list[str]:
    """A line for each card with its versions, and the commits that were measured there."""
    commits: dict[str, dict[str, None]] = {}
    for result in results:
        own = commits.setdefault(environment_line({**result.environment, "commit": None}), {})
        if commit := result.environment.get("commit"):
            own[str(commit)] = None
    return [
        f"{line}, commit{'s' * (len(own) > 1)} {listed(list(own))}" if own else line for line, own in commits.items()
    ]


def flat(environment: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Every entry as a name and a text; sizes in GB."""
    found: list[tuple[str, str]] = []
    for name, value in environment.items():
        if isinstance(value, Mapping):
            found += flat(value, f"{prefix}{name} ")
        elif value is None or value == "":
            continue
        elif name.endswith("_bytes"):
            sizes = value if isinstance(value, list) else [value]
            text = ", ".join(gigabytes(v) if isinstance(v, (int, float)) else str(v) for v in sizes)
            found.append((prefix + name.removesuffix("_bytes").replace("_", " "), text))
        else:
            found.append(
                (prefix + name.replace("_", " "), ", ".join(map(str, value)) if isinstance(value, list) else str(value))
            )
    return found


def environments(results: Sequence[Result]) -> list[tuple[list[tuple[str, str]], list[Result]]]:
    """Each environment once, with the results from it. What differs between its runs and does not make another one
    (which card of several, clocks, a path) is told as all that they say of it; date and command are left to files."""
    found: dict[str, list[Result]] = {}
    for result in results:
        where = environment_key(result.environment) + environment_line(result.environment)
        found.setdefault(where, []).append(result)
    return [(_facts(own), own) for own in found.values()]


def _facts(results: Sequence[Result]) -> list[tuple[str, str]]:
    """What the results of one environment say of it, by name."""
    steady: dict[str, list[str]] = {}
    clocks: dict[str, list[str]] = {}
    for result in results:
        for name, text in flat({k: v for k, v in result.environment.items() if k not in ("date", "command", "clocks")}):
            steady.setdefault(name, []).append(text)
        for name, value in (result.environment.get("clocks") or {}).items():
            if isinstance(value, (int, float)):
                clocks.setdefault(f"clocks {name.replace('_', ' ')}", []).append(f"{value:g}")
    told = [(name, " or ".join(sorted(set(texts)))) for name, texts in steady.items()]
    return told + [(name, _range(texts)) for name, texts in clocks.items()]


def _range(texts: Sequence[str]) -> str:
    """What several results say of one thing: all of it where it is the same, else the least and the most."""
    if len(set(texts)) == 1:
        return texts[0]
    ordered = sorted(texts, key=float)
    return f"{ordered[0]} to {ordered[-1]}"


def files(results: Sequence[Result]) -> Table:
    heads = [("", h) for h in ("file", "id", "label", "clip", "date", "commit", "measured")]
    rows = []
    for result in results:
        parts = [p for p in ("speed", "memory", "drift", "score") if getattr(result, p)]
        clip = f"{model_name(result)}, {result.cell.clip}"
        rows.append(
            [
                Cell(result.path.name if result.path else MISSING),
                Cell(result.id),
                Cell(result.label),
                Cell(clip),
                Cell(str(result.environment.get("date") or MISSING)),
                Cell(str(result.environment.get("commit") or MISSING)),
                Cell(", ".join(parts) or "nothing"),
            ]
        )
    return Table("files", "Result files", heads, rows)


def commands(results: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(str(c) for r in results if (c := r.environment.get("command"))))
