"""The plots of a report: drift step by step and block by block, seconds in memory budgets; report_pareto.py has seconds
against drift.

How they look, and what they cost, is said in report_drawing.py. Error: none; what was not measured is not drawn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from solostep.benchmarks.report_data import Group, Row
from solostep.benchmarks.report_drawing import (
    MUTED,
    NARROW,
    PAPER,
    Look,
    Plot,
    ends_of,
    left_out,
    log_axis,
    looks,
    name_lines,
    panel_of,
)
from solostep.benchmarks.report_measures import amount, number
from solostep.benchmarks.report_pareto import pareto
from solostep.benchmarks.report_tables import measured_steps
from solostep.benchmarks.report_verdicts import yardstick

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from solostep.benchmarks.statistics import Interval

# --- drift step by step -------------------------------------------------------------------------------------------


def by_step(group: Group, kind: str, style: Mapping[str, Look]) -> Plot | None:
    """ "free": latents after each step of a video of its own; "teacher": each step from the reference's latents."""

    if kind == "teacher" and group.levels:
        return by_level(group, style)

    def series(row: Row) -> list[Interval]:
        return row.free_steps if kind == "free" else row.teacher_steps

    measured = [r for r in group.modes if len(series(r)) > 1]
    rows = [r for r in measured if _shown(series(r))[1]]
    if not rows:
        return None
    rows.sort(key=lambda r: -series(r)[-1].median)

    def draw(width: str) -> Figure:
        figure, panel = panel_of(width, 4.6 if width != NARROW else 4.2 + 0.2 * len(rows))
        panel.set_yscale("log")
        floors = [f for f in group.floors if series(f)]
        _step_band(panel, [series(f) for f in floors], "noise floor")
        if group.other_seed and series(group.other_seed):
            _step_band(panel, [series(group.other_seed)], "another seed", hatch="///")
        for row in rows:
            look, found = style[row.name], series(row)
            x, kept = _shown(found)
            low, high = zip(*(ends_of([i]) for i in kept), strict=True)
            panel.fill_between(x, low, high, color=look.colour, alpha=0.16, linewidth=0)
            panel.plot(
                x,
                [i.median for i in kept],
                color=look.colour,
                linestyle=look.dash,
                marker=look.marker,
                markersize=4.5,
                markevery=max(1, len(x) // 10),
                label=row.name,
            )
        panel.set_xlabel(
            "step"
            if width == NARROW or not rows[0].sigmas
            else f"step (noise level {number(rows[0].sigmas[0], 2)} to {number(rows[0].sigmas[-1], 2)})"
        )
        panel.set_ylabel("relative L2 to the reference")
        panel.xaxis.get_major_locator().set_params(integer=True)
        log_axis(panel.yaxis)
        ends = [(r.name, _shown(series(r))[1][-1].median, style[r.name].colour) for r in rows]
        name_lines(figure, panel, width, ends)
        return figure

    what = "latents after each step" if kind == "free" else "error of each step by itself"
    alt = "At the last step: " + "; ".join(f"{r.name} {amount('teacher', series(r)[-1].median)}" for r in rows)
    return Plot(
        f"{kind}-steps",
        f"{'Running freely' if kind == 'free' else 'Teacher-forced'}: {what}",
        alt,
        (
            "Each mode makes the whole video by itself from the same noise; differences grow with the steps."
            if kind == "free"
            else "Each step starts from the reference's own latents, so nothing adds up."
        )
        + " "
        + _medians([i for row in rows for i in series(row)])
        + ("; grey: the noise floor." if any(series(f) for f in group.floors) else ".")
        + left_out((r.name for r in measured), (r.name for r in rows)),
        draw,
    )


def by_level(group: Group, style: Mapping[str, Look]) -> Plot | None:
    """Teacher-forced errors of a few steps of a run by their noise levels, as marks that no line joins. None: there is
    but one level, which is told in words."""
    measured = [r for r in group.modes if r.teacher_steps]
    rows = [r for r in measured if _levels(r)]
    if len(group.levels) < 2 or not rows:
        return None
    rows.sort(key=lambda r: -r.teacher_steps[-1].median)
    floors = [f for f in group.floors if f.teacher_steps]

    def draw(width: str) -> Figure:
        figure, panel = panel_of(width, 4.6 if width != NARROW else 4.2 + 0.2 * len(rows))
        panel.set_yscale("log")
        for i, row in enumerate(floors):
            _marks(panel, row, color=MUTED, marker="_", markersize=26, label=None if i else "noise floor")
        for row in rows:
            look = style[row.name]
            _marks(panel, row, color=look.colour, marker=look.marker, markersize=7, label=row.name)
        panel.set_xlim(-0.04, max(group.levels) + 0.04)
        panel.set_xlabel("sigma (noise level: 0 is noise, 1 is video)")
        panel.set_ylabel("relative L2 to the reference")
        log_axis(panel.yaxis)
        ends = [(r.name, _levels(r)[-1][1].median, style[r.name].colour) for r in rows]
        name_lines(figure, panel, width, ends)
        return figure

    errors = [[f"{amount('teacher', i.median)} at {number(s, 2)}" for s, i in _levels(row)] for row in rows]
    return Plot(
        "teacher-steps",
        "Error of single steps, by noise level",
        "By sigma: " + "; ".join(f"{row.name} {', '.join(own)}" for row, own in zip(rows, errors, strict=True)),
        f"{levels_text(group)} {_medians([i for row in rows for i in row.teacher_steps])}"
        + ("; grey: the noise floor." if floors else ".")
        + left_out((r.name for r in measured), (r.name for r in rows)),
        draw,
    )


def levels_text(group: Group) -> str:
    """A sentence on the few steps that teacher-forced errors are of; empty where they are of all."""
    if not group.levels:
        return ""
    steps = measured_steps(group).removesuffix(", drawn latents")
    start = "drawn latents, which are no points of a trajectory" if group.drawn else "the reference's own latents"
    each = f"Each by itself, from {start}" if len(group.levels) > 1 else f"By itself, from {start}"
    return f"{steps} {'were' if len(group.levels) > 1 else 'was'} measured. {each}: nothing adds up."


def _levels(row: Row) -> list[tuple[float, Interval]]:
    """Noise levels and errors that a logarithmic axis can show."""
    return [(s, i) for s, i in zip(row.sigmas, row.teacher_steps, strict=True) if ends_of([i])[0] > 0]


def _marks(panel: Axes, row: Row, color: str, **look: Any) -> None:
    """A mark a noise level, with a stroke for its interval where it has one."""
    for sigma, found in _levels(row):
        panel.plot([sigma] * 2, ends_of([found]), color=color, linewidth=1, zorder=2)
    panel.plot(*zip(*[(s, i.median) for s, i in _levels(row)], strict=True), color=color, linestyle="", **look)


def _medians(found: Sequence[Interval]) -> str:
    """What lines are of; intervals are promised only where there are some."""
    prompts = max((i.n for i in found), default=0)
    if prompts == 1:
        return "Of 1 prompt, without intervals"
    text = f"Medians over {prompts} prompts"
    return text + (", with 95 % intervals" if any(i.low is not None for i in found) else ", too few for intervals")


def _shown(found: Sequence[Interval]) -> tuple[list[int], list[Interval]]:
    """Steps from 1 and their intervals, without those that a logarithmic axis cannot show."""
    steps = [(i + 1, each) for i, each in enumerate(found) if ends_of([each])[0] > 0]
    return [s for s, _ in steps], [each for _, each in steps]


def _step_band(panel: Axes, many: Sequence[Sequence[Interval]], text: str, hatch: str | None = None) -> None:
    ends = [(i + 1, *ends_of(step)) for i, step in enumerate(zip(*many, strict=False))]
    ends = [end for end in ends if end[1] > 0]
    if not ends:
        return
    x, low, high = zip(*ends, strict=True)
    panel.fill_between(x, low, high, facecolor=MUTED, alpha=0.3, linewidth=0, label=None if hatch else text)
    if hatch:
        panel.fill_between(x, low, high, facecolor="none", edgecolor=MUTED, hatch=hatch, linewidth=0.6, label=text)
    else:  # an edge: without intervals, one floor is a line
        panel.plot(x, high, color=MUTED, linewidth=0.7)


# --- blocks -------------------------------------------------------------------------------------------------------


def heat_map(group: Group) -> Plot | None:
    """Error of each block, a row a mode."""
    rows = [r for r in [*group.floors, *group.modes] if r.blocks]
    names = list(dict.fromkeys(name for row in rows for name in row.blocks))
    values = [[row.blocks[name] if name in row.blocks else math.nan for name in names] for row in rows]
    positive = [v for line in values for v in line if v > 0]
    if not positive or len(names) < 2:
        return None

    def draw(width: str) -> Figure:
        from matplotlib.colors import LogNorm

        figure, panel = panel_of(width, 1.3 + 0.36 * len(rows) + (0.5 if width == NARROW else 0))
        panel.grid(False)
        norm = LogNorm(min(positive), max(max(positive), min(positive) * 1.01))
        mesh = panel.pcolormesh(
            [[v if v > 0 else math.nan for v in line] for line in values],
            cmap="cividis",
            norm=norm,
            edgecolors=PAPER,
            linewidth=0.6,
        )
        every = max(1, math.ceil(len(names) / (24 if width != NARROW else 10)))
        panel.set_xticks([i + 0.5 for i in range(0, len(names), every)], names[::every], fontsize=8.5)
        panel.set_yticks([i + 0.5 for i in range(len(rows))], [_folded(r.name, width) for r in rows], fontsize=9)
        panel.invert_yaxis()
        panel.tick_params(length=0)
        panel.spines[:].set_visible(False)
        panel.set_xlabel("block")
        bar = figure.colorbar(
            mesh,
            ax=panel,
            orientation="horizontal" if width == NARROW else "vertical",
            aspect=25,
            pad=0.02,
            fraction=0.05,
        )
        bar.outline.set_visible(False)  # type: ignore[operator]
        log_axis(bar.ax.xaxis if width == NARROW else bar.ax.yaxis)
        bar.ax.tick_params(labelsize=8.5)
        return figure

    worst = []
    for row in rows:
        name, found = max(row.blocks.items(), key=lambda item: item[1])
        worst.append(f"{row.name}: worst in block {name}, {amount('blocks', found)}")
    return Plot(
        "blocks",
        "Error of each block",
        "; ".join(worst),
        "What a block adds to its input, on the input that the reference recorded; medians over pairs, steps and "
        "branches, on a logarithmic scale."
        + (f" Measured at {measured_steps(group)}." if group.levels else "")
        + " The numbers are in the table below.",
        draw,
    )


def _folded(name: str, width: str) -> str:
    return name.replace(": ", ":\n", 1).replace(" · ", "\n", 1) if width == NARROW else name


# --- budgets ------------------------------------------------------------------------------------------------------


def budgets(lines: Mapping[str, Sequence[tuple[float, float]]], unlimited: Mapping[str, float]) -> Plot | None:
    """Seconds a step by memory budget, a line a mode and clip length: (budget in GB, seconds); what each takes without
    a budget stands at the right end."""
    lines = {name: sorted(points) for name, points in lines.items() if points}
    if not any(len(points) > 1 for points in lines.values()):
        return None
    style = looks(lines)
    ticks = sorted({x for points in lines.values() for x, _ in points})
    end = ticks[-1] * 1.5

    def draw(width: str) -> Figure:
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

        figure, panel = panel_of(width, 4.4 if width != NARROW else 4.2 + 0.2 * len(lines))
        panel.set_xscale("log")
        panel.set_yscale("log")
        ordered = sorted(lines.items(), key=lambda item: -item[1][-1][1])
        ends = []
        for name, points in ordered:
            look, own = style[name], list(points)
            own += [(end, unlimited[name])] if name in unlimited else []
            panel.plot(
                *zip(*own, strict=True),
                color=look.colour,
                linestyle=look.dash,
                marker=look.marker,
                markersize=6,
                label=name,
            )
            ends.append((name, own[-1][1], look.colour))
        shown = [*ticks, *([end] if unlimited else [])]
        panel.set_xticks(shown, [*(f"{number(t)} GB" for t in ticks), *(["none"] if unlimited else [])])
        panel.xaxis.set_minor_locator(NullLocator())
        panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
        panel.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{number(v, 1)} s"))
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.set_xlabel("GPU memory budget (--vram)")
        panel.set_ylabel("seconds a step")
        name_lines(figure, panel, width, ends)
        return figure

    alt = "; ".join(
        f"{n}: {', '.join(f'{number(s)} s in {number(b)} GB' for b, s in points)}" for n, points in lines.items()
    )
    return Plot("budgets", "Seconds a step in each memory budget", alt, "Both axes are logarithmic.", draw)


# --- all of a group -----------------------------------------------------------------------------------------------


def group_plots(group: Group, prefix: str) -> dict[str, Plot]:
    """The plots that a group's results allow, by kind; ``prefix`` sets their names apart from other groups'."""
    style = looks(r.name for r in group.modes)
    measures = dict.fromkeys(m for m in (yardstick(group.rows), "teacher", "free") if m)
    found = {f"pareto {m}": pareto(group, m, style) for m in measures}
    found |= {kind: by_step(group, kind, style) for kind in ("free", "teacher")}
    found |= {"blocks": heat_map(group)}
    return {k: Plot(f"{prefix}-{p.name}", p.title, p.alt, p.caption, p.draw) for k, p in found.items() if p}
