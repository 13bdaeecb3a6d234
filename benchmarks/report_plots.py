"""The plots of a report: seconds against drift, drift step by step and block by block, seconds in memory budgets.

How they look, and what they cost, is said in report_drawing.py. Error: none; what was not measured is not drawn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from solostep.benchmarks.report_data import Group, Row
from solostep.benchmarks.report_drawing import (
    INK,
    MUTED,
    NARROW,
    PAPER,
    Look,
    Plot,
    band,
    ends_of,
    halo,
    log_axis,
    looks,
    name_lines,
    panel_of,
)
from solostep.benchmarks.report_labels import place_labels
from solostep.benchmarks.report_measures import DRIFT, amount, number
from solostep.benchmarks.report_verdicts import yardstick

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from solostep.benchmarks.statistics import Interval

# --- seconds against drift ----------------------------------------------------------------------------------------


def pareto(group: Group, measure: str, style: Mapping[str, Look]) -> Plot | None:
    """Seconds a step against drift; None: there are not two modes with both."""
    rows = [r for r in group.modes if r.step and measure in r.drift and r.drift[measure].median > 0]
    if len(rows) < 2:
        return None
    label = DRIFT[measure].label

    def draw(width: str) -> Figure:
        figure, panel = panel_of(width, 5.2 if width != NARROW else 5.4)
        panel.set_yscale("log")
        band(panel, width, [f.drift[measure] for f in group.floors if measure in f.drift], "noise floor")
        other = group.other_seed
        if other and measure in other.drift:
            band(panel, width, [other.drift[measure]], "another seed", hatch="///")
        biggest = max((r.gpu or 0 for r in rows), default=0)
        front = _front(rows, measure)
        panel.plot(
            [r.step for r in front],
            [r.drift[measure].median for r in front],
            color=MUTED,
            linewidth=0.9,
            linestyle=(0, (2, 2)),
            zorder=1,
        )
        for row in rows:
            found, look = row.drift[measure], style[row.name]
            area = 40 + 320 * (row.gpu / biggest if row.gpu and biggest else 0.3)
            low, high = ends_of([found])
            panel.plot([row.step] * 2, [max(low, found.median / 1e3), high], color=look.colour, zorder=2)
            panel.scatter(
                [row.step],
                [found.median],
                s=area,
                marker=look.marker,
                facecolor=look.colour,
                edgecolor=PAPER,
                linewidth=0.9,
                zorder=3,
            )
        _reference_line(panel, width, group)
        panel.set_xlabel("seconds a step" + ("" if width == NARROW else f" ({group.card})"))
        panel.set_ylabel(f"{label}, relative L2")
        log_axis(panel.yaxis)
        panel.set_xlim(left=0)
        panel.margins(x=0.12, y=0.1)
        texts = [r.name + (f"\n{r.gpu / 1e9:.0f} GB" if r.gpu and width != NARROW else "") for r in rows]
        strokes = [[(r.step or 0.0, end) for end in ends_of([r.drift[measure]])] for r in rows]
        strokes.append([(r.step or 0.0, r.drift[measure].median) for r in front])
        points = [(r.step or 0.0, r.drift[measure].median) for r in rows]
        place_labels(figure, panel, points, texts, INK, halo(width), [s for s in strokes if all(y > 0 for _, y in s)])
        return figure

    best = sorted(rows, key=lambda r: r.step or 0.0)
    alt = "; ".join(f"{r.name}: {number(r.step)} s, {amount(measure, r.drift[measure].median)}" for r in best)
    return Plot(
        f"pareto-{measure}",
        f"Seconds a step against {label}",
        alt,
        "Left and down is better. Larger marks took more GPU memory; strokes are 95 % intervals, the dotted line "
        "joins the "
        "modes that no other beats in both. Grey bands: the noise floor"
        + (" and, hatched, another seed." if group.other_seed and measure in group.other_seed.drift else "."),
        draw,
    )


def _front(rows: Sequence[Row], measure: str) -> list[Row]:
    """The modes that no other beats in both seconds and drift, from fast to slow."""
    front: list[Row] = []
    for row in sorted(rows, key=lambda r: (r.step or 0.0, r.drift[measure].median)):
        if not front or row.drift[measure].median < front[-1].drift[measure].median:
            front.append(row)
    return front


def _reference_line(panel: Axes, width: str, group: Group) -> None:
    if group.reference and group.reference.step:
        panel.axvline(group.reference.step, color=MUTED, linewidth=1, linestyle=(0, (1, 2)), zorder=0)
        panel.annotate(
            "reference",
            (group.reference.step, 0),
            xycoords=("data", "axes fraction"),
            xytext=(-4, 6),
            textcoords="offset points",
            rotation=90,
            ha="right",
            va="bottom",
            fontsize=9,
            color=INK,
            **halo(width),
        )


# --- drift step by step -------------------------------------------------------------------------------------------


def by_step(group: Group, kind: str, style: Mapping[str, Look]) -> Plot | None:
    """ "free": latents after each step of a video of its own; "teacher": each step from the reference's latents."""

    def series(row: Row) -> list[Interval]:
        return row.free_steps if kind == "free" else row.teacher_steps

    rows = [r for r in group.modes if len(series(r)) > 1]
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
            ends = [ends_of([i]) for i in kept]
            panel.fill_between(
                x, [e[0] for e in ends], [e[1] for e in ends], color=look.colour, alpha=0.16, linewidth=0
            )
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
        name_lines(figure, panel, width, [(r.name, series(r)[-1].median, style[r.name].colour) for r in rows])
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
        + " Medians over prompts, with their 95 % intervals; grey: the noise floor.",
        draw,
    )


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
        "branches, on a logarithmic scale. The numbers are in the table below.",
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
