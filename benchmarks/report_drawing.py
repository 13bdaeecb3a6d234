"""How the plots of a report are drawn, with matplotlib without its global state: SVG for a page, PNG beside Markdown.

Colours are Okabe and Ito's (2008), told apart by people with any colour vision; each mode also has a marker and a dash
of its own, the same in every plot. In the page's SVG, texts stay texts, and ink, grid and paper are CSS variables, so
that a plot follows the page's light or dark scheme. Each is drawn twice, for a wide and for a narrow page.

Cost: a third of a second a drawing. Error: none; values that a logarithmic axis cannot show (0) are left out.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from solostep.benchmarks.report_labels import spread
from solostep.benchmarks.report_measures import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from solostep.benchmarks.statistics import Interval

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (6, 2, 1, 2)))
INK, MUTED, GRID, PAPER = "#010203", "#646566", "#d4d5d6", "#fdfdfe"
"""Stand for the page's CSS variables; as they are, they are the colours of a PNG."""
_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--line", PAPER: "--paper"}
WIDE, NARROW, PICTURE = "wide", "narrow", "picture"
WIDTHS = {WIDE: 9.6, NARROW: 4.7, PICTURE: 9.6}
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "svg.fonttype": "none",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "legend.frameon": False,
    "lines.linewidth": 1.6,
}


@dataclass(frozen=True)
class Plot:
    """A plot that can be drawn: ``name`` is fit for an id and a file, ``alt`` says what is to be seen."""

    name: str
    title: str
    alt: str
    caption: str
    draw: Callable[[str], Figure]

    def svg(self, width: str) -> str:
        """The SVG element, for the inside of a page."""
        salt = f"{self.name}-{width}"
        with _style({"svg.hashsalt": salt}):
            figure, data = self.draw(width), io.StringIO()
            figure.savefig(data, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
        return inline_svg(data.getvalue(), salt, f"{self.title}. {self.alt}", f"plot {width}")

    def png(self) -> bytes:
        with _style({}):
            figure, data = self.draw(PICTURE), io.BytesIO()
            figure.savefig(data, format="png", dpi=110, facecolor="white", metadata={"Software": None})
        return data.getvalue()


def _style(more: Mapping[str, Any]) -> Any:
    from matplotlib import rc_context

    return rc_context(STYLE | dict(more))


def inline_svg(text: str, salt: str, alt: str, classes: str) -> str:
    """A file of matplotlib's as an element of a page: ids of its own, colours by CSS variable, no address of
    anything."""
    from html import escape

    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="halo">', '<g class="halo">', text)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{salt}-\1"', text)
    text = re.sub(r'(?:xlink:)?href="#([^"]+)"', rf'href="#{salt}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{salt}-\1)", text)
    text = re.sub(r'xlink:href="data:', 'href="data:', text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--font)", text)
    box = re.search(r'viewBox="([^"]+)"', text)
    head = (
        f'<svg class="{classes}" viewBox="{box.group(1) if box else "0 0 1 1"}" role="img" aria-label="{escape(alt)}">'
    )
    return re.sub(r"^<svg[^>]*>", lambda _: head, text, count=1)


# --- what modes look like -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Look:
    colour: str
    marker: str
    dash: Any


def looks(names: Iterable[str]) -> dict[str, Look]:
    """A look a name; after the sixth, colours come again with another dash, and markers only after the tenth."""
    return {
        name: Look(COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)], DASHES[(i + i // len(COLOURS)) % len(DASHES)])
        for i, name in enumerate(names)
    }


def panel_of(width: str, tall: float) -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTHS[width], tall), layout="constrained")
    FigureCanvasAgg(figure)  # measures texts, for what is placed by their size
    return figure, figure.subplots()


def log_axis(axis: Any) -> None:
    """A logarithmic axis with plain per cents: 1, 2, 5 of each decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{number(v * 100, 1)} %"))
    axis.set_minor_formatter(NullFormatter())


def left_out(all_of_them: Iterable[str], drawn: Iterable[str]) -> str:
    """A sentence on the modes that a logarithmic axis cannot show, as one that equals the reference; or nothing."""
    missing = set(all_of_them) - set(drawn)
    return f" Not drawn, because a logarithmic axis has no 0: {'; '.join(sorted(missing))}." if missing else ""


def band(panel: Axes, width: str, found: Sequence[Interval], text: str, hatch: str | None = None) -> None:
    """A grey band across the panel from the lowest to the highest end of the intervals."""
    if not found:
        return
    low, high = ends_of(found)
    if not low > 0:
        return
    panel.axhspan(low, high, facecolor=MUTED, alpha=0.22, linewidth=0, zorder=0)
    if hatch:  # by itself: the band's transparency would make it vanish
        panel.axhspan(low, high, facecolor="none", edgecolor=MUTED, hatch=hatch, linewidth=0, zorder=0)
    panel.axhline(low, color=MUTED, linewidth=0.7, zorder=0)
    panel.axhline(high, color=MUTED, linewidth=0.7, zorder=0)
    panel.annotate(
        text,
        (0, high),
        xycoords=("axes fraction", "data"),
        xytext=(5, 3),
        textcoords="offset points",
        va="bottom",
        fontsize=9,
        color=INK,
        zorder=6,
        **halo(width),
    )


def ends_of(found: Sequence[Interval]) -> tuple[float, float]:
    """From the lowest to the highest end of intervals; of the medians where there are no intervals."""
    ends = [
        end for i in found for end in ((i.median, i.median) if i.low is None or i.high is None else (i.low, i.high))
    ]
    return min(ends), max(ends)


def halo(width: str) -> dict[str, Any]:
    """Properties of a text that is read on top of lines. In SVG an outline would make paths of it: CSS does it
    there."""
    if width != PICTURE:
        return {"gid": "halo"}
    from matplotlib.patheffects import withStroke

    return {"path_effects": [withStroke(linewidth=2.5, foreground=PAPER)]}


def name_lines(figure: Figure, panel: Axes, width: str, lines: Sequence[tuple[str, float, str]]) -> None:
    """Names at the ends of the lines on a wide page, a legend below on a narrow one."""
    if width == NARROW:
        figure.legend(*panel.get_legend_handles_labels(), loc="outside lower left", fontsize=9, handlelength=3.2)
        return
    handles = [
        h for h in zip(*panel.get_legend_handles_labels(), strict=True) if h[1] in ("noise floor", "another seed")
    ]
    if handles:
        panel.legend([h for h, _ in handles], [t for _, t in handles], loc="best", fontsize=9)
    figure.draw_without_rendering()
    tall = panel.get_window_extent().height
    places = [panel.transAxes.inverted().transform(panel.transData.transform((1, v)))[1] for _, v, _ in lines]
    found = spread(places, 15.5 * figure.dpi / 100 / tall)
    right = max(float(max(line.get_xdata())) for line in panel.lines)
    start = panel.transAxes.inverted().transform(panel.transData.transform((right, lines[0][1])))[0]
    for (name, _, colour), own, place in zip(lines, places, found, strict=True):
        panel.text(1.04, place, name, transform=panel.transAxes, va="center", fontsize=9, color=INK)
        panel.plot(
            [start + 0.012, 1.03],
            [own, place],
            transform=panel.transAxes,
            color=colour,
            linewidth=0.8,
            clip_on=False,
            zorder=1,
        )
