"""Results of `solostep bench` (one JSON file each) as what a report shows: groups of one model and clip, a row a mode.

Rows of different models, weights, sizes, cards or drift settings (steps, guidance, prompts, seeds) never stand in one
table: what they were compared with is not the same. Times and memory do not depend on the prompts or the number of
steps, so a result that measured only those joins the group of its model, size and card, if it computed as many guidance
branches; and it is said.

Cost: reading the files and a bootstrap a measure, mode and step. Error: none is added; medians come with a
95 % interval over prompts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from solostep.benchmarks.report_measures import Share
from solostep.benchmarks.report_origins import mixed
from solostep.benchmarks.report_pairs import (
    Pair,
    Samples,
    by_step,
    followed_by,
    lost,
    names_of,
    samples_of,
    summarized,
)
from solostep.benchmarks.report_verdicts import Verdict, judge
from solostep.benchmarks.results import Cell, Result
from solostep.benchmarks.statistics import Interval

REFERENCE, MODE, OTHER_SEED = "reference", "mode", "other-seed"
FLOORS = {"floor-backend": "noise floor: another back end", "floor-order": "noise floor: another order"}


@dataclass
class Row:
    """One mode (or floor, or the reference) of a group. None is: not measured.

    ``end_to_end``: seconds of a whole video by its steps, and whether they are calculated; ``resumed``: of those that
    were run to the end in several processes, the steps of each, as text.
    ``text_precision``: of Step-LLM in the run that was timed.
    ``sigmas``: of the steps whose errors were measured; ``drawn``: from latents that are no trajectory's (is_drawn).
    ``samples``: the values that ``drift`` is the medians of, by measure and pair. ``followed``: which aspects the video
    of each pair shows; ``lost``: the pairs, and aspects, that the reference's shows and this one's does not.
    """

    name: str
    role: str
    cell: Cell
    ids: list[str] = field(default_factory=list)
    step: float | None = None
    steps_timed: int = 0
    text_precision: str | None = None
    first_step: float | None = None
    end_to_end: dict[str, tuple[float, bool]] = field(default_factory=dict)
    resumed: dict[str, str] = field(default_factory=dict)
    video_seconds: float | None = None
    frames_written: int | None = None
    stages: dict[str, float] = field(default_factory=dict)
    gpu: int | None = None
    driver: int | None = None
    host: int | None = None
    step_times: list[float] = field(default_factory=list)
    drift: dict[str, Interval] = field(default_factory=dict)
    samples: dict[str, Samples] = field(default_factory=dict)
    teacher_steps: list[Interval] = field(default_factory=list)
    free_steps: list[Interval] = field(default_factory=list)
    sigmas: list[float] = field(default_factory=list)
    drawn: bool = False
    blocks: dict[str, float] = field(default_factory=dict)
    operators: dict[str, float] = field(default_factory=dict)
    block_samples: dict[str, Samples] = field(default_factory=dict)
    operator_samples: dict[str, Samples] = field(default_factory=dict)
    score: dict[str, Share] = field(default_factory=dict)
    followed: dict[Pair, dict[str, bool]] = field(default_factory=dict)
    lost: dict[Pair, list[str]] | None = None
    diverged: list[int | None] = field(default_factory=list)
    frames: Path | None = None
    events: list[str] = field(default_factory=list)
    verdict: Verdict | None = None

    @cached_property
    def block_spans(self) -> dict[str, Interval]:
        """Medians of each block with their intervals; a bootstrap each, so only where they are shown."""
        return {name: summarized(samples) for name, samples in self.block_samples.items()}

    @cached_property
    def operator_spans(self) -> dict[str, Interval]:
        """Those of each operator, over all blocks."""
        return {name: summarized(samples) for name, samples in self.operator_samples.items()}

    @property
    def is_floor(self) -> bool:
        return self.role in FLOORS


@dataclass
class Group:
    """What may be compared: one model, clip size, card and set of drift settings."""

    model: str
    synthetic: Mapping[str, Any] | None
    size: tuple[int, int, int]
    card: str
    settings: Mapping[str, Any] | None
    rows: list[Row]
    results: list[Result]
    pairs: int
    notes: list[str] = field(default_factory=list)

    weights: str | None = None
    guided: bool = True

    @property
    def title(self) -> str:
        """``weights`` are told only where others have the same name."""
        frames, height, width = self.size
        name = self.model if self.weights is None else f"{self.model} (weights {self.weights})"
        return f"{name}, {frames} frames of {height}x{width}" + ("" if self.guided else ", one guidance branch")

    @property
    def reference(self) -> Row | None:
        return next((row for row in self.rows if row.role == REFERENCE), None)

    @property
    def modes(self) -> list[Row]:
        return [row for row in self.rows if row.role == MODE]

    @property
    def floors(self) -> list[Row]:
        return [row for row in self.rows if row.is_floor]

    @property
    def other_seed(self) -> Row | None:
        return next((row for row in self.rows if row.role == OTHER_SEED), None)

    @property
    def prompts(self) -> int:
        """How many prompts the drift is over."""
        return max((i.n for row in self.rows for i in row.drift.values()), default=0)

    @property
    def drawn(self) -> bool:
        """Whether all drift was measured from latents that were drawn and are no trajectory's."""
        found = [row.drawn for row in self.rows if row.drift or row.blocks]
        return bool(found) and all(found)

    @property
    def levels(self) -> list[float]:
        """The noise levels (sigma) of the steps that teacher-forced errors are of, where those are not all steps of a
        run; else none."""
        steps = self.settings["num_inference_steps"] if self.settings else 0
        rows = [row for row in self.rows if row.teacher_steps]
        if all(len(row.teacher_steps) == steps for row in rows):
            return []
        return sorted({sigma for row in rows for sigma in row.sigmas})

    @property
    def measured(self) -> bool:
        """Whether any drift was measured."""
        return any(row.drift or row.blocks for row in self.rows)

    def ratio(self, row: Row) -> float | None:
        """How many times as fast as the reference a step is."""
        reference = self.reference
        return reference.step / row.step if reference and reference.step and row.step else None


# --- groups -------------------------------------------------------------------------------------------------------

DRAWN = "synthetic"
IMAGE_TO_VIDEO = "image-to-video"
"""What models of drawn weights are called; and behind it, those that take a first frame."""


def takes_a_frame(result: Result) -> bool:
    """Whether drawn weights are of a model for image-to-video, as synthetic.py marks them."""
    return isinstance(result.synthetic, dict) and bool(result.synthetic.get("image_to_video"))


def model_name(result: Result) -> str:
    """The model's name, or the last part of its path; drawn weights have one name in whatever folder they lie."""
    cell = result.cell
    if result.synthetic:
        return DRAWN + (f", {IMAGE_TO_VIDEO}" if takes_a_frame(result) else "")
    return cell.model.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1] or cell.model


def card_of(environment: Mapping[str, Any]) -> str:
    return str(environment.get("card") or f"CPU ({environment.get('cpu') or 'unknown'})")


def is_guided(cell: Cell) -> bool:
    """Whether a step computes two branches; up to a scale of 1 it is one, in half the time."""
    return cell.guidance_scale > 1


def _place(result: Result) -> str:
    """Model, size, number of guidance branches and card, as a key."""
    cell = result.cell
    place = [model_name(result), result.synthetic, size_of(cell), is_guided(cell), card_of(result.environment)]
    return json.dumps(place, sort_keys=True)


def size_of(cell: Cell) -> tuple[int, int, int]:
    """Frames, height, width."""
    return cell.num_frames, cell.height, cell.width


DRAWN_TEXT = "drawn text"
"""How the prompts of drawn inputs begin."""


def is_drawn(result: Result) -> bool:
    """Whether drift was measured from latents that are noise mixed with a drawn field, and no points of a trajectory,
    as full_size.py does with drawn weights. A run of `solostep bench` on such weights has a trajectory of its own."""
    named = [str(pair["prompt"]).startswith(DRAWN_TEXT) for pair in result.pairs]
    return bool(result.synthetic and result.drift and named and all(named))


SETTINGS = ("num_inference_steps", "guidance_scale", "time_shift", "prompts", "seeds")


def _settings(result: Result) -> str:
    return json.dumps([getattr(result.cell, name) for name in SETTINGS])


def _yardstick_of(result: Result, settings: str) -> bool:
    """Whether a result is another seed's for these settings: it needs more seeds than the modes, or fewer prompts."""
    steps = len(json.dumps([getattr(result.cell, name) for name in SETTINGS[:3]])) - 1
    return result.role == OTHER_SEED and _settings(result)[:steps] == settings[:steps]


def mode_key(cell: Cell, budgets: bool = True) -> tuple[Any, ...]:
    """What makes a mode: numbers and kernels, and the memory it may use."""
    names = ["role", "precision", "text_precision", "attention", "attention_backend", "recipe"]
    return tuple(getattr(cell, name) for name in names + (["vram", "host_ram"] if budgets else []))


def make_groups(results: Sequence[Result]) -> list[Group]:
    """The groups of a page, the largest clips of trained models first."""
    places: dict[str, list[Result]] = {}
    for result in results:
        places.setdefault(_place(result), []).append(result)
    groups = []
    for weights, found in (part for place in places.values() for part in _by_weights(place)):
        settings = list(dict.fromkeys(_settings(r) for r in found if r.drift and r.role != OTHER_SEED))
        settings = settings or list(dict.fromkeys(_settings(r) for r in found if r.drift))
        for own in settings or [None]:
            members = [r for r in found if own is None or _settings(r) == own or _yardstick_of(r, own)]
            # Times from other settings: of the same kernels on the same card, so they hold here as well. Videos do not:
            # the reference's prompts that were followed, and its frames, are of its own steps and prompts.
            others = [
                replace(r, score=None, frames=None) for r in found if r not in members and r.speed and not r.drift
            ]
            groups.append(_group(members, others, own is not None, weights))
    return sorted(groups, key=lambda g: (not g.measured, -math.prod(g.size), g.synthetic is not None, g.title))


def _by_weights(found: list[Result]) -> list[tuple[str | None, list[Result]]]:
    """Results of one model's name, apart where they tell of several models that have it. Older results do not tell
    their weights; where there is no more than one model, they are taken to be of it. Drawn weights are known by their
    generator."""
    if found[0].synthetic or len({r.weights for r in found if r.weights}) < 2:
        return [(None, found)]
    names = dict.fromkeys(r.weights for r in found)
    return [(name or "not recorded", [r for r in found if r.weights == name]) for name in names]


def _group(members: list[Result], others: list[Result], with_drift: bool, weights: str | None = None) -> Group:
    first = next((r for r in members if r.drift), members[0])
    cell = first.cell
    rows: dict[tuple[Any, ...], list[Result]] = {}
    for result in [*_newest_first(members), *_newest_first(others)]:
        rows.setdefault(mode_key(result.cell), []).append(result)
    group = Group(
        model=model_name(first),
        synthetic=first.synthetic if isinstance(first.synthetic, dict) else None,
        size=size_of(cell),
        card=card_of(first.environment),
        settings={name: getattr(cell, name) for name in SETTINGS} if with_drift else None,
        rows=_without_budgets([row_of(found) for found in rows.values()]),
        results=[*members, *others],
        pairs=max((len(r.pairs) for r in members), default=0),
        weights=weights,
        guided=is_guided(cell),
    )
    for found in rows.values():
        _say_repeats(group, found)
    _order(group)
    _name_apart(group)
    _say_origins(group, others if with_drift else [])
    _judge(group)
    return group


def _without_budgets(rows: list[Row]) -> list[Row]:
    """Without rows that are a row again in less memory: drift does not depend on it, and the table of budgets has
    them."""

    def again(row: Row) -> bool:
        twins = [r for r in rows if r is not row and mode_key(r.cell, False) == mode_key(row.cell, False)]
        limited = row.cell.vram is not None or row.cell.host_ram is not None
        return limited and not row.drift and any(t.drift or t.cell.vram is None for t in twins)

    return [row for row in rows if not again(row)]


def _newest_first(results: Sequence[Result]) -> list[Result]:
    return sorted(results, key=lambda r: str(r.environment.get("date") or ""), reverse=True)


def _say_repeats(group: Group, found: Sequence[Result]) -> None:
    for part in ("speed", "drift"):
        with_it = [r for r in found if getattr(r, part)]
        if len(with_it) > 1:
            text = f"{with_it[0].label}: {len(with_it)} results have {part}; the newest, {with_it[0].id}, is shown"
            group.notes.append(text + (_run_before(with_it) if part == "speed" else "") + ".")


def results_of(group: Group, row: Row) -> list[Result]:
    """The results that a row was made of, in its order."""
    by_id = {result.id: result for result in group.results}
    return [by_id[i] for i in dict.fromkeys(row.ids) if i in by_id]


def _say_origins(group: Group, others: Sequence[Result]) -> None:
    """What rows were measured at other settings, and which of them in other environments than the rest."""
    told = [(row.name, results_of(group, row)) for row in group.rows]
    joined: dict[int, list[str]] = {}
    for name, found in told:
        timed = next((r for r in found if r.speed), None)
        if timed is not None and any(timed is other for other in others):
            joined.setdefault(timed.cell.num_inference_steps, []).append(name)
    if joined:
        runs = ". Of ".join(f"{n} steps: {'; '.join(names)}" for n, names in joined.items())
        group.notes.append(
            f"Seconds a step and memory from runs with other settings, on which they do not depend, of {runs}."
        )
    note = mixed(told)
    group.notes += [note] if note else []


def _run_before(found: Sequence[Result]) -> str:
    """Which whole videos are shown from older results than the newest, which did not run to their end."""
    from_older = {}
    for result in found:
        for steps, told in ((result.speed or {}).get("end_to_end") or {}).items():
            if not told.get("extrapolated"):
                from_older.setdefault(steps, result)
    return "".join(f", but for {n} steps, as {r.id} ran them" for n, r in from_older.items() if r is not found[0])


def _order(group: Group) -> None:
    roles = [REFERENCE, *FLOORS, OTHER_SEED, MODE]
    group.rows.sort(key=lambda r: (roles.index(r.role), r.step is None, r.step or 0.0, r.name))


def _name_apart(group: Group) -> None:
    """Two rows never have one name: what differs is added, and if nothing visible does, the id."""
    names = [row.name for row in group.rows]
    for row in group.rows:
        if names.count(row.name) > 1:
            more = [
                str(getattr(row.cell, k))
                for k in ("attention_backend", "text_precision", "recipe", "vram")
                if getattr(row.cell, k)
            ]
            row.name = f"{row.name} · {' · '.join(more)}" if more else row.name
    names = [row.name for row in group.rows]
    for row in group.rows:
        if names.count(row.name) > 1:
            row.name += f" · {row.ids[0][:6]}"


# --- rows ---------------------------------------------------------------------------------------------------------


def row_of(found: Sequence[Result]) -> Row:
    """One row of the results of one mode, newest first: what the first has not measured comes from the next."""
    first = found[0]
    role = first.role
    name = FLOORS.get(role) or {REFERENCE: "reference: bf16, official", OTHER_SEED: "another seed"}.get(role)
    row = Row(name or first.label, role, first.cell, [r.id for r in found])
    speed, scored = _first(found, "speed"), next((r for r in found if r.score), None)
    # Only what made a video by itself: a run for drift alone holds other things as well.
    memory = _first([r for r in found if r.speed], "memory")
    _add_speed(row, speed or {})
    for older in found:
        _add_whole_videos(row, older.speed or {})
    memory = memory or {}
    row.gpu, row.driver, row.host = (memory.get(k) for k in ("gpu_peak_bytes", "driver_peak_bytes", "host_peak_bytes"))
    if scored is not None and scored.score is not None:
        prompts = len(scored.cell.prompts)
        row.score = {k: Share(int(v[0]), int(v[1]), prompts) for k, v in scored.score.items() if k != "pairs"}
        row.followed = followed_by(scored.score, scored.pairs)
    row.events = list(dict.fromkeys(event for r in found for event in events_of(r)))
    for result in found:
        if result.frames and result.path and row.frames is None:
            row.frames = result.path.parent / Path(result.frames["file"]).name
    drifts = [r for r in found if r.drift]
    parts = {part: d[part] for r in reversed(drifts) if (d := r.drift) for part in d if d[part]}
    _add_drift(row, parts, drifts[0].pairs if drifts else [])
    row.drawn = bool(drifts) and all(map(is_drawn, drifts))
    return row


def events_of(result: Result) -> list[str]:
    """What a run said, without what its plan had said before it: how it saves memory is no event then."""
    from solostep.engine.decoding import how_decoded

    plan, planned = result.plan or {}, []
    if "decode_frames" in plan:
        planned.append(f"Decoding {how_decoded(plan['decode_frames'], plan.get('decode_strips') or 1)},")
    if (plan.get("frame_strips") or 1) > 1:
        planned.append(f"The first frame is encoded in {plan['frame_strips']} strips,")
    return [str(event) for event in result.events if not str(event).startswith(tuple(planned))]


def _first(found: Sequence[Result], part: str) -> Any:
    return next((getattr(r, part) for r in found if getattr(r, part)), None)


def _add_speed(row: Row, speed: Mapping[str, Any]) -> None:
    steps = [float(s) for s in speed.get("step_seconds") or []]
    first = speed.get("first_step_seconds")
    if steps:
        row.step = _middle(steps)
    row.steps_timed, row.step_times, row.first_step = len(steps), steps, first
    row.text_precision = (speed.get("ran") or {}).get("text_precision")
    row.video_seconds, row.frames_written = speed.get("video_seconds"), speed.get("frames_written")
    row.stages = {name: float(s) for name, s in (speed.get("stages") or {}).items() if s is not None}
    for steps_wanted, found in (speed.get("end_to_end") or {}).items():
        if found and found.get("seconds") is not None:
            row.end_to_end[str(steps_wanted)] = (float(found["seconds"]), bool(found.get("extrapolated")))


def _add_whole_videos(row: Row, speed: Mapping[str, Any]) -> None:
    """What was run to the end takes the place of what was calculated from fewer steps, however new that is."""
    for steps, told in (speed.get("end_to_end") or {}).items():
        if told.get("extrapolated"):
            continue
        if row.end_to_end.get(str(steps), (0.0, True))[1]:
            row.end_to_end[str(steps)] = (float(told["seconds"]), False)
        if row.end_to_end[str(steps)][0] == told["seconds"] and speed.get("resumed"):
            row.resumed[str(steps)] = " + ".join(map(str, speed["resumed"]))


def _middle(values: Sequence[float]) -> float:
    ordered = sorted(values)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


def _add_drift(row: Row, drift: Mapping[str, Any], pairs: Sequence[Mapping[str, Any]]) -> None:
    row.samples = samples_of(drift, pairs)
    row.drift = {name: summarized(samples) for name, samples in row.samples.items()}
    teacher, free = drift.get("teacher") or {}, drift.get("free") or {}
    row.teacher_steps, row.free_steps = (_steps(part.get("error"), pairs) for part in (teacher, free))
    row.sigmas = [float(s) for s in teacher.get("sigmas") or free.get("sigmas") or []]
    row.diverged = list(free.get("diverged_at") or [])
    blocks = drift.get("blocks") or {}
    labels = blocks.get("samples") or []
    for name, errors in zip(blocks.get("names") or [], blocks.get("error") or [], strict=True):
        if errors:
            row.block_samples[str(name)] = _by_pair([errors], labels, pairs)
    for name, by_block in (drift.get("operators") or {}).items():
        if any(by_block):
            row.operator_samples[name] = _by_pair(by_block, labels, pairs)
    row.blocks = {name: _median(samples) for name, samples in row.block_samples.items()}
    row.operators = {name: _median(samples) for name, samples in row.operator_samples.items()}


def _steps(error: Sequence[Sequence[float]] | None, pairs: Sequence[Mapping[str, Any]]) -> list[Interval]:
    """One interval a step, over the prompts."""
    rows = [list(row) for row in error or []]
    return by_step(dict(zip(names_of(pairs, len(rows)), rows, strict=True))) if rows else []


def _by_pair(
    rows: Sequence[Sequence[float]], labels: Sequence[Mapping[str, Any]], pairs: Sequence[Mapping[str, Any]]
) -> Samples:
    """Rows of errors, one for each labelled sample, by the samples' pairs."""
    names = names_of(pairs, max((label["pair"] for label in labels), default=-1) + 1)
    found: Samples = {}
    for row in rows:
        for error, label in zip(row, labels, strict=True):
            found.setdefault(names[label["pair"]], []).append(float(error))
    return found


def _median(samples: Samples) -> float:
    return _middle([value for values in samples.values() for value in values])


# --- verdicts -----------------------------------------------------------------------------------------------------


def _judge(group: Group) -> None:
    for row in group.modes:
        row.verdict = judge(row, group.floors)
    for floor in group.floors:
        if floor.drift:
            floor.verdict = Verdict("unknown", "what rounding alone does")
    if group.reference:
        group.reference.verdict = Verdict("unknown", "what all others are compared with")
        for row in [*group.modes, *group.floors]:
            row.lost = lost(row.followed, group.reference.followed)
    elif not group.drawn or any(row.step for row in group.rows):  # else its drift has the reference in every pass
        group.notes.append(
            "No result of the reference (role reference: precision bf16, attention official) is among these, so no "
            "mode "
            "has a ratio to it; run its cell with solostep bench and give that file as well."
        )
    if group.other_seed:
        group.other_seed.verdict = Verdict("unknown", "how far apart two videos of one prompt are")
    if group.modes and group.measured and not group.floors:
        group.notes.append(
            "No noise floor was measured here, so no mode has a verdict; run solostep bench with its floors."
        )
