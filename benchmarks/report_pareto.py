"""Seconds a step against drift, a mark a mode, with memory as its size. How plots look is said in report_drawing.py.

Error: none; what was not measured is not drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
    left_out,
    log_axis,
    panel_of,
)
from solostep.benchmarks.report_labels import place_labels
from solostep.benchmarks.report_measures import DRIFT, amount, gigabytes, number
from solostep.benchmarks.report_tables import measured_steps

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HOLLOW: dict[str, Any] = {"marker": "o", "facecolor": "none", "edgecolor": INK, "linewidth": 1.1}


@dataclass(frozen=True)
class Memory:
    """What the size of a mark stands for: the card's memory, without a card the host's, or nothing."""

    kind: str
    peaks: Mapping[str, int]

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Memory:
        for kind, name in (("GPU", "gpu"), ("host", "host")):
            peaks = {row.name: getattr(row, name) for row in rows if getattr(row, name)}
            if peaks:
                return cls(kind, peaks)
        return cls("", {})

    @property
    def caption(self) -> str:
        if not self.kind:
            return "All marks are of one size: memory was not measured."
        return f"The larger a mark, the more {self.kind} memory was taken at the peak."

    def area(self, row: Row) -> float:
        """In square points."""
        return self._area(self.peaks.get(row.name, 0))

    def _area(self, peak: float) -> float:
        return 40 + 320 * peak / max(self.peaks.values()) if self.peaks else 130.0

    def text(self, row: Row) -> str:
        return gigabytes(self.peaks[row.name]) if row.name in self.peaks else ""

    def legend(self, figure: Figure, panel: Axes) -> None:
        """Marks of three sizes below the plot, up to the most, in round numbers."""
        if not self.peaks:
            return
        most = max(self.peaks.values())
        sizes = list(dict.fromkeys(float(f"{most * part:.1g}") for part in (1 / 3, 2 / 3, 1)))
        marks = [panel.scatter([], [], s=self._area(size), **HOLLOW) for size in sizes]
        figure.legend(
            marks, [f"{number(s / 1e9, 1)} GB" if s >= 1e9 else f"{s / 1e6:.0f} MB" for s in sizes],
            title=f"peak of {self.kind} memory", title_fontsize=9, fontsize=9, ncols=3, loc="outside lower left",
        )  # fmt: skip


def pareto(group: Group, measure: str, style: Mapping[str, Look]) -> Plot | None:
    """Seconds a step against drift; None: there are not two modes with both."""
    timed = [r for r in group.modes if r.step and measure in r.drift]
    rows = [r for r in timed if r.drift[measure].median > 0]
    if len(rows) < 2:
        return None
    label = DRIFT[measure].label
    floors = [f for f in group.floors if f.step and measure in f.drift and f.drift[measure].median > 0]
    memory = Memory.of([*rows, *floors, *([group.reference] if group.reference else [])])

    def draw(width: str) -> Figure:
        figure, panel = panel_of(width, 5.6 if width != NARROW else 7.0)
        panel.set_yscale("log")
        band(panel, width, [f.drift[measure] for f in group.floors if measure in f.drift], "noise floor")
        other = group.other_seed
        if other and measure in other.drift:
            band(panel, width, [other.drift[measure]], "another seed", hatch="///")
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
            low, high = ends_of([found])
            panel.plot([row.step] * 2, [max(low, found.median / 1e3), high], color=look.colour, zorder=2)
            panel.scatter(
                [row.step],
                [found.median],
                s=memory.area(row),
                marker=look.marker,
                facecolor=look.colour,
                edgecolor=PAPER,
                linewidth=0.9,
                zorder=3,
            )
        for row in floors:
            panel.scatter([row.step], [row.drift[measure].median], s=memory.area(row), zorder=2, **HOLLOW)
        _reference_line(panel, width, group, memory)
        panel.set_xlabel("seconds a step" + ("" if width == NARROW else f" ({group.card})"))
        panel.set_ylabel(f"{label}, relative L2")
        log_axis(panel.yaxis)
        panel.margins(y=0.1)
        panel.set_xlim(0, 1.1 * max(r.step or 0.0 for r in [*rows, *floors, group.reference or rows[0]]))
        memory.legend(figure, panel)
        marked = [*rows, *floors]
        texts = ["\n".join(filter(None, [_floor_text(r), memory.text(r)])) for r in marked]
        strokes = [[(r.step or 0.0, end) for end in ends_of([r.drift[measure]])] for r in rows]
        strokes.append([(r.step or 0.0, r.drift[measure].median) for r in front])
        points = [(r.step or 0.0, r.drift[measure].median) for r in marked]
        place_labels(figure, panel, points, texts, INK, halo(width), [s for s in strokes if all(y > 0 for _, y in s)])
        return figure

    best = sorted(rows, key=lambda r: r.step or 0.0)
    alt = "; ".join(f"{r.name}: {number(r.step)} s, {amount(measure, r.drift[measure].median)}" for r in best)
    return Plot(
        f"pareto-{measure}",
        f"Seconds a step against {label}",
        alt,
        _pareto_caption(group, measure, rows, floors, memory)
        + left_out((r.name for r in timed), (r.name for r in rows)),
        draw,
    )


def _pareto_caption(group: Group, measure: str, rows: Sequence[Row], floors: Sequence[Row], memory: Memory) -> str:
    other = group.other_seed and measure in group.other_seed.drift
    parts = ["Left and down is better.", memory.caption]
    if any(r.drift[measure].low is not None for r in rows):
        parts.append("Strokes are 95 % intervals.")
    parts.append("The dotted line joins the modes that no other beats in both.")
    if any(measure in f.drift for f in group.floors):
        parts.append("Grey bands: the noise floor" + (" and, hatched, another seed." if other else "."))
    if floors:
        parts.append("Hollow marks are the floor's own runs.")
    if group.reference and group.reference.step:
        parts.append("The reference has no drift; its mark on the lower axis is at its seconds a step.")
    if measure == "teacher" and group.levels:
        parts.append(f"Drift is of {measured_steps(group)}, {group.prompts} prompt{'s' * (group.prompts != 1)}.")
    return " ".join(parts)


def _floor_text(row: Row) -> str:
    return row.name.replace("noise floor: ", "floor: ", 1)


def _front(rows: Sequence[Row], measure: str) -> list[Row]:
    """The modes that no other beats in both seconds and drift, from fast to slow."""
    front: list[Row] = []
    for row in sorted(rows, key=lambda r: (r.step or 0.0, r.drift[measure].median)):
        if not front or row.drift[measure].median < front[-1].drift[measure].median:
            front.append(row)
    return front


def _reference_line(panel: Axes, width: str, group: Group, memory: Memory) -> None:
    """The reference's seconds; its drift is 0, which a logarithmic axis lacks, so its mark is on the axis."""
    from matplotlib.markers import CARETUPBASE

    if group.reference and group.reference.step:
        panel.scatter(
            [group.reference.step],
            [0],
            s=memory.area(group.reference),
            marker=CARETUPBASE,  # stands on the axis
            color=INK,
            transform=panel.get_xaxis_transform(),
            clip_on=False,
            zorder=4,
        )
        panel.axvline(group.reference.step, color=MUTED, linewidth=1, linestyle=(0, (1, 2)), zorder=0)
        panel.annotate(
            ", ".join(filter(None, ["reference", memory.text(group.reference)])),
            (group.reference.step, 0.5),
            xycoords=("data", "axes fraction"),
            xytext=(-4, 0),
            textcoords="offset points",
            rotation=90,
            ha="right",
            va="center",
            fontsize=9,
            color=INK,
            **halo(width),
        )
